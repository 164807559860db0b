"""A test of the tests: bugs that people really write make `assert_same_greedy` fail.

Every mutation runs in a scenario that first passes without it, so that what fails is the mutation.
They come in through the seams that a learner uses (kernels, scheduler_cls, block_manager_cls,
build_batch), or as a patch of the runner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minivllm import Kernels
from minivllm.engine import block_manager, engine_core
from minivllm.engine.batch import BatchInputs, BatchRow, build_batch
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.model_runner import ModelRunner
from minivllm.engine.scheduler import Scheduler
from support.parity import (
    Checkpoint,
    Completion,
    Errs,
    ParityError,
    RecordedLLM,
    Report,
    assert_same_greedy,
    run_hit_after_miss,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

REFERENCE = Kernels.reference()
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2)


# --- scenarios ------------------------------------------------------------------------------------


def in_step(model: Checkpoint, **options: Any) -> RecordedLLM:
    """An engine whose results arrive at once (on a GPU too), so that a mutated scheduler meets
    tokens, not places.
    """
    return RecordedLLM(
        model.path, **{"block_size": 4, "num_kv_blocks": 64, "async_scheduling": False, **options}
    )


def batch(model: Checkpoint, **options: Any) -> list[Completion]:
    """Prompts of several lengths together, in blocks of 4."""
    llm = in_step(model, **options)
    return llm.complete(model.prompts(5, 20, 33), NUM_TOKENS)


def chunks(model: Checkpoint, **options: Any) -> list[Completion]:
    return batch(model, max_num_batched_tokens=9, **options)


def repeated_prompt(model: Checkpoint, **options: Any) -> list[Completion]:
    llm = in_step(model, **options)
    return llm.complete([model.prompt(20)], NUM_TOKENS) + llm.complete(
        [model.prompt(20)], NUM_TOKENS
    )


def preemption(model: Checkpoint, **options: Any) -> list[Completion]:
    llm = in_step(model, num_kv_blocks=19, **options)
    completions = llm.complete(model.prompts(20, 33, 16), NUM_TOKENS)
    assert max(llm.outputs_at_preemption) > 1
    return completions


def one_step_late(model: Checkpoint, **options: Any) -> list[Completion]:
    llm = in_step(model, max_num_seqs=2, **options)
    for prompt in model.prompts(5, 20, 16, 33):
        llm.add(prompt, NUM_TOKENS)
    return llm.run_one_step_late()


def hit_after_miss(model: Checkpoint, **options: Any) -> list[Completion]:
    return run_hit_after_miss(in_step(model, num_kv_blocks=20, **options), model)


def same_block_elsewhere(model: Checkpoint, **options: Any) -> list[Completion]:
    """The second block of the last prompt is cached, but behind another first block."""
    llm = in_step(model, **options)
    a, b, c = model.prompt(4), model.prompt(4, 1), model.prompt(4, 2)
    prompts = [model.prompt(3, after=a + b), model.prompt(3, after=c), model.prompt(5, after=c + b)]
    completions = [
        completion for prompt in prompts for completion in llm.complete([prompt], NUM_TOKENS)
    ]
    assert llm.metrics().prefix_cache_hits >= 4
    return completions


def slots_change_hands(model: Checkpoint, late: bool = False, **options: Any) -> list[Completion]:
    """Many requests, two slots, and a pool so small that blocks change hands with them."""
    llm = in_step(model, num_kv_blocks=24, max_num_seqs=2, **options)
    prompts = model.prompts(33, 5, 20, 16, 31, 9)
    for prompt in prompts if late else ():
        llm.add(prompt, NUM_TOKENS)
    return llm.run_one_step_late() if late else llm.complete(prompts, NUM_TOKENS)


def slots_change_hands_late(model: Checkpoint, **options: Any) -> list[Completion]:
    return slots_change_hands(model, late=True, **options)


def speculation(model: Checkpoint, **options: Any) -> list[Completion]:
    """Some proposals are right, some are wrong; rejected ones reach into other blocks."""
    llm = in_step(model, proposer=Errs(model.reference, NUM_TOKENS), **options)
    completions = llm.complete(model.prompts(5, 20, 16, 33), NUM_TOKENS)
    assert llm.metrics().num_draft_tokens > 10
    return completions


def prompt_of_an_aborted_request(model: Checkpoint, **options: Any) -> list[Completion]:
    """A request is aborted in the middle of its prompt; the next one has the same prompt."""
    llm = in_step(model, max_num_batched_tokens=9, **options)
    aborted = llm.add(model.prompt(33), NUM_TOKENS)
    llm.llm_engine.step()
    llm.abort(aborted)
    completions = llm.complete([model.prompt(33)], NUM_TOKENS)
    assert llm.metrics().prefix_cache_hits > 0
    return completions


# --- mutations ------------------------------------------------------------------------------------


def kernels(**changes: Callable) -> dict[str, Any]:
    return {"kernels": dataclasses.replace(REFERENCE, **changes)}


def decode_position_off_by_one(rows: list[BatchRow], table: np.ndarray, size: int) -> BatchInputs:
    inputs = build_batch(rows, table, size)
    inputs.positions[: inputs.attention.num_decodes] += 1
    return inputs


def positions_restart_behind_a_prefix(
    rows: list[BatchRow], table: np.ndarray, size: int
) -> BatchInputs:
    inputs = build_batch(rows, table, size)
    starts = inputs.attention.query_start_loc.long()
    for i, row in enumerate(rows):
        if len(row.token_ids) > 1:
            inputs.positions[starts[i] : starts[i + 1]] -= row.start
    return inputs


def newest_entry_hidden(query, k_cache, v_cache, table, seq_lens, *args, **kwargs):
    return REFERENCE.decode_attention(query, k_cache, v_cache, table, seq_lens - 1, *args, **kwargs)


def one_entry_never_written(key, value, k_cache, v_cache, slots):
    """Of a prompt, not of a decode: one token's K and V are lost."""
    slots = slots.clone()
    if len(slots) > 4:
        slots[len(slots) // 2] = -1
    REFERENCE.store_kv(key, value, k_cache, v_cache, slots)


def decode_with_another_block_size(query, k_cache, v_cache, table, *args, **kwargs):
    blocks, heads, size, dim = k_cache.shape
    k, v = (c.reshape(blocks * 2, heads, size // 2, dim) for c in (k_cache, v_cache))
    # twice as many look-ups: stay inside the table
    wide = torch.nn.functional.pad(table, (0, table.shape[1]))
    return REFERENCE.decode_attention(query, k, v, wide, *args, **kwargs)


def mask_aligned_to_the_start(query, k_cache, v_cache, table, starts, seq_lens, scale, **_):
    out = torch.empty_like(query)
    heads = k_cache.shape[1]
    for i, context in enumerate(seq_lens.tolist()):
        rows = query[starts[i] : starts[i + 1]].unflatten(1, (heads, -1))
        # [context, KH, D]
        key, value = (
            c[table[i].long()].transpose(1, 2).flatten(0, 1)[:context] for c in (k_cache, v_cache)
        )
        scores = torch.einsum("qhgd,khd->hgqk", rows, key) * scale
        allowed = torch.ones(len(rows), context, device=query.device).tril().bool()
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        out[starts[i] : starts[i + 1]] = torch.einsum("hgqk,khd->qhgd", weights, value).flatten(
            1, 2
        )
    return out


def merge_without_rescale(outs, lses):
    """Online, part by part, but what was summed under the old maximum stays as it was."""
    top = torch.full_like(lses[0], -torch.inf)
    total = torch.zeros_like(lses[0])
    acc = torch.zeros_like(outs[0])
    for out, lse in zip(outs, lses, strict=True):
        top = torch.maximum(top, lse)
        weight = torch.exp(lse - top)
        total, acc = total + weight, acc + weight.unsqueeze(-1) * out
    return acc / total.unsqueeze(-1)


def merge_by_mean(outs, lses):
    present = (lses > -torch.inf).float().unsqueeze(-1)
    return (outs * present).sum(0) / present.sum(0)


def interleaved_pairs(query, key, q_weight, k_weight, cos_sin, positions, eps):
    """Rotates (x0, x1), (x2, x3), ... where Qwen and Llama checkpoints pair x[i] with x[i +
    D/2].
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x, weight):
        a, b = REFERENCE.rms_norm(x, weight, eps).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    return turn(query, q_weight), turn(key, k_weight)


def q_norm_for_k(query, key, q_weight, k_weight, *args):
    return REFERENCE.qk_norm_rope(query, key, q_weight, q_weight, *args)


def no_qk_norm(query, key, q_weight, k_weight, *args):
    return REFERENCE.qk_norm_rope(query, key, None, None, *args)


def interleaved_groups(query, k_cache, *args, **kwargs):
    """Query head h reads KV head h % KH; it should read h // group."""
    heads = k_cache.shape[1]
    mixed = query.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)
    out = REFERENCE.decode_attention(mixed, k_cache, *args, **kwargs)
    return out.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1, 2)


def another_eps(field: str) -> Callable:
    def call(*args):
        return getattr(REFERENCE, field)(*args[:-1], 1e-6)

    return call


def gate_and_up_swapped(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return REFERENCE.silu_mul(torch.cat([up, gate], dim=-1))


def residual_forgotten(x, residual, weight, eps):
    return REFERENCE.rms_norm(x, weight, eps), x


class HitAfterMissCounts(BlockManager):
    """Looks at every block for itself, and takes the hits for the beginning of the table."""

    def find_cached_prefix(self, seq: Any) -> list[int]:
        if seq.params.prompt_logprobs is not None:
            return []
        self.extend_hashes(seq)
        hashes = seq.block_hashes[: (seq.num_tokens - 1) // self.block_size]
        return [self.hash_to_block[h] for h in hashes if h in self.hash_to_block]


class RegistersBeforeComputing(BlockManager):
    """Takes a sequence for computed to its end as soon as its first chunk is."""

    def register_computed(self, seq: Any, start: int, end: int) -> None:
        super().register_computed(seq, start, seq.num_tokens - seq.has_pending_token)

    def allocate(self, seq: Any, num_tokens: int, cached_prefix: Any = ()) -> bool:
        return super().allocate(seq, max(num_tokens, seq.num_tokens), cached_prefix)


class SampledTokenLost(Scheduler):
    """Preemption throws away the token that was sampled last, and goes on behind it."""

    def give_up(self, batch: Any, seq: Any) -> None:
        super().give_up(batch, seq)
        if seq.num_output_tokens > 1:
            del seq.token_ids[-2]


class SampledTokenRepeated(Scheduler):
    """The token sampled before the preemption is appended once more when the sequence comes
    back.
    """

    def give_up(self, batch: Any, seq: Any) -> None:
        super().give_up(batch, seq)
        if 1 < seq.num_output_tokens < NUM_TOKENS - 1:
            seq.token_ids.append(seq.token_ids[-1])


class SampledTokenSampledAgain(Scheduler):
    """Greedy tokens come out right all the same; with a stream, the caller would see one token
    twice.
    """

    def give_up(self, batch: Any, seq: Any) -> None:
        super().give_up(batch, seq)
        if seq.num_output_tokens > 1:
            del seq.token_ids[-1]


class PreemptedKeepsItsCount(Scheduler):
    """The blocks are gone, but the sequence is taken for computed: only the last block's tokens run
    again.
    """

    def start(self, batch: Any, seq: Any, num_cached: int = 0) -> None:
        super().start(batch, seq, num_cached)
        if seq.num_preemptions:
            seq.num_computed_tokens = max(num_cached, seq.num_tokens - 2)

    def compute(self, batch: Any, seq: Any, num_new: int) -> Any:
        num_left = seq.num_tokens - seq.num_computed_tokens
        return super().compute(batch, seq, min(num_new, num_left))


class StaleBlockTable(ModelRunner):
    """A new sequence in a slot keeps the block ids of the one before it."""

    def execute(self, batch: Any) -> Any:
        self._written_before = self._num_blocks.copy()
        return super().execute(batch)

    def _write_new_blocks(self, items: Any) -> None:
        self._num_blocks[:] = self._written_before
        super()._write_new_blocks(items)


class StaleLastToken(ModelRunner):
    """A step planned before its tokens are known reads the token of the step before."""

    def _note_sampled(self, items: Any, token_ids: torch.Tensor, positions: Any) -> None:
        super()._note_sampled(items, token_ids, positions)
        newest, last = self._state.last_token.clone(), self._state.last_token
        last.copy_(getattr(self, "_older", torch.zeros_like(last)))
        self._older = newest


class AcceptsOneWrongToken(ModelRunner):
    """Takes the first wrong proposal that it meets for right."""

    has_erred = False

    def _sample_at_once(self, items: Any, logits: Any, places: Any, verified: Any, *rest: Any):
        super()._sample_at_once(items, logits, places, verified, *rest)
        for item, tokens in zip(items, verified, strict=True):
            if not self.has_erred and 0 < len(tokens) <= len(item.proposed_token_ids):
                tokens[-1] = item.proposed_token_ids[len(tokens) - 1]
                self.has_erred = True


class SamplesOneRowTooEarly(ModelRunner):
    """Verifies a proposal by the logits of the token before the one that it follows."""

    def _verified_rows(self, items: Any) -> torch.Tensor:
        rows = super()._verified_rows(items)
        rows[1:] -= (rows[1:] == rows[:-1] + 1).long()
        return rows


def unchained_hash(_previous: int | None, token_ids: Any, _extra_keys: Any = ()) -> int:
    return hash(tuple(token_ids)) % (1 << 128)


MUTATIONS = {
    "decode-position-off-by-one": (batch, {"build_batch": decode_position_off_by_one}),
    "positions-restart": (chunks, {"build_batch": positions_restart_behind_a_prefix}),
    "positions-restart-behind-a-hit": (
        repeated_prompt,
        {"build_batch": positions_restart_behind_a_prefix},
    ),
    "newest-entry-hidden": (batch, kernels(decode_attention=newest_entry_hidden)),
    "one-entry-never-written": (batch, kernels(store_kv=one_entry_never_written)),
    "eps-of-rms_norm": (batch, kernels(rms_norm=another_eps("rms_norm"))),
    "eps-of-add_rms_norm": (batch, kernels(add_rms_norm=another_eps("add_rms_norm"))),
    "eps-of-qk_norm_rope": (batch, kernels(qk_norm_rope=another_eps("qk_norm_rope"))),
    "mask-aligned-to-the-start": (chunks, kernels(prefill_attention=mask_aligned_to_the_start)),
    "mask-aligned-to-the-start-behind-a-hit": (
        repeated_prompt,
        {"max_num_batched_tokens": 30, **kernels(prefill_attention=mask_aligned_to_the_start)},
    ),
    "merge-without-rescale": (batch, kernels(merge_attention=merge_without_rescale)),
    "merge-by-mean": (batch, kernels(merge_attention=merge_by_mean)),
    "another-block-size-in-decode": (
        batch,
        kernels(decode_attention=decode_with_another_block_size),
    ),
    "interleaved-rope-pairs": (batch, kernels(qk_norm_rope=interleaved_pairs)),
    "q_norm-for-k": (batch, kernels(qk_norm_rope=q_norm_for_k)),
    "no-qk-norm": (batch, kernels(qk_norm_rope=no_qk_norm)),
    "interleaved-groups": (batch, kernels(decode_attention=interleaved_groups)),
    "gate-and-up-swapped": (batch, kernels(silu_mul=gate_and_up_swapped)),
    "residual-forgotten": (batch, kernels(add_rms_norm=residual_forgotten)),
    "hit-after-a-miss": (hit_after_miss, {"block_manager_cls": HitAfterMissCounts}),
    "registered-before-computed": (
        prompt_of_an_aborted_request,
        {"block_manager_cls": RegistersBeforeComputing},
    ),
    "sampled-token-lost": (preemption, {"scheduler_cls": SampledTokenLost}),
    "sampled-token-repeated": (preemption, {"scheduler_cls": SampledTokenRepeated}),
    "sampled-token-sampled-again": (preemption, {"scheduler_cls": SampledTokenSampledAgain}),
    "preempted-keeps-its-count": (preemption, {"scheduler_cls": PreemptedKeepsItsCount}),
}
SCENARIOS = [
    batch,
    chunks,
    repeated_prompt,
    preemption,
    one_step_late,
    hit_after_miss,
    same_block_elsewhere,
    slots_change_hands,
    slots_change_hands_late,
    prompt_of_an_aborted_request,
    speculation,
]


def judge(model: Checkpoint, completions: list[Completion]) -> None:
    assert_same_greedy(
        model.reference, completions, NUM_TOKENS, min_distinct=8, partial=True, report=Report()
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_passes(model: Checkpoint, scenario: Callable) -> None:
    judge(model, scenario(model))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(model: Checkpoint, name: str) -> None:
    scenario, options = MUTATIONS[name]
    with pytest.raises(ParityError):
        judge(model, scenario(model, **options))


@pytest.mark.parametrize(
    ("scenario", "runner"),
    [
        (slots_change_hands, StaleBlockTable),
        (slots_change_hands_late, StaleBlockTable),
        (one_step_late, StaleLastToken),
        (slots_change_hands_late, StaleLastToken),
        (speculation, AcceptsOneWrongToken),
        (speculation, SamplesOneRowTooEarly),
    ],
)
def test_wrong_runner_is_found(
    model: Checkpoint,
    scenario: Callable,
    runner: type[ModelRunner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_core, "ModelRunner", runner)
    with pytest.raises(ParityError):
        judge(model, scenario(model))


def test_unchained_hash_is_found(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager, "hash_block", unchained_hash)
    with pytest.raises(ParityError):
        judge(model, same_block_elsewhere(model))


def test_a_lost_request_is_found(model: Checkpoint) -> None:
    """The helper must not be content with the completions that did come."""
    completions = batch(model)
    short = dataclasses.replace(
        completions[0], token_ids=completions[0].token_ids[:-1], logits=completions[0].logits[:-1]
    )
    with pytest.raises(ParityError):
        assert_same_greedy(model.reference, [short], NUM_TOKENS, min_distinct=8, report=Report())
    with pytest.raises(AssertionError):
        assert_same_greedy(model.reference, [], NUM_TOKENS)
