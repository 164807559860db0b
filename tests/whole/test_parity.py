"""The engine gives transformers' tokens and logits: on every kind of checkpoint, in every mode, on
every backend.

Each test proves that it ran what it is about: counters of the engine, launches, block tables. On a
machine with a GPU all of this runs there in float32, the modes with the compiled Triton kernels
too; elsewhere those are interpreted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import Kernels
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.layers.rotary import rope_frequencies
from minivllm.models.loader import load_config
from support.checkpoints import TransformersReference
from support.parity import (
    MIN_DISTINCT,
    NUM_TOKENS,
    REPORT,
    Checkpoint,
    Errs,
    RecordedLLM,
    assert_same_greedy,
    greedy,
    run_hit_after_miss,
)
from support.variants import VARIANTS, Variant, heads, rope

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.gpu)]
#: (backend, block size): the reference kernels take any size, the Triton kernels powers of two from
#: 16 up.
BLOCK_SIZES = [("torch", n) for n in (1, 3, 16, 256)]
BLOCK_SIZES += [pytest.param("triton", n, marks=pytest.mark.gpu) for n in (16, 64, 256)]
KERNEL_FIELDS = {
    "prefill_attention",
    "decode_attention",
    "qk_norm_rope_store",
    "rms_norm",
    "add_rms_norm",
}
KERNEL_FIELDS |= {"linear", "silu_mul", "sample"}


@pytest.fixture(scope="module", autouse=True)
def _few_differences(one_thread: None) -> Iterator[None]:
    """At the end, at most one token of a thousand may have differed."""
    yield
    REPORT.check()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Qwen3 with 4 query and 2 KV heads of 32: head_dim is not hidden_size / heads."""
    return Checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=1)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, id=name, marks=[] if name == v.family else pytest.mark.slow)
        for name, v in VARIANTS.items()
    ],
)
def test_checkpoint(variant: Variant, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, variant.family, **variant.changes)
    config = load_config(tmp_path)
    assert {name: getattr(config, name) for name in variant.expected} == variant.expected
    if variant.unlike:
        (ours, scale), (theirs, other_scale) = (
            rope_frequencies(r, config.head_dim)
            for r in (config.rope, dataclasses.replace(config.rope, **variant.unlike))
        )
        assert scale != other_scale or not torch.allclose(ours, theirs, rtol=1e-3)
    if "max_shard_size" in variant.changes:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2

    llm = RecordedLLM(tmp_path, num_kv_blocks=48)
    prompts = checkpoint.prompts(1, 16, 75)
    completions = llm.complete(prompts)
    assert_same_greedy(checkpoint.reference, completions)
    speculating = RecordedLLM(tmp_path, num_kv_blocks=48, proposer=Errs(checkpoint.reference))
    completions = speculating.complete(prompts[1:2])
    assert speculating.metrics().num_accepted_tokens > 20
    assert_same_greedy(checkpoint.reference, completions)


@pytest.mark.slow
def test_old_style_config(tmp_path: Path) -> None:
    """Before transformers 5: rope_theta and rope_scaling in place of rope_parameters, torch_dtype
    for dtype.
    """
    checkpoint = Checkpoint(tmp_path, "llama", **rope("llama3", rope_theta=500000.0))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config |= {
        "rope_theta": scaling.pop("rope_theta"),
        "rope_scaling": scaling,
        "torch_dtype": config.pop("dtype"),
    }
    path.write_text(json.dumps(config))
    assert load_config(tmp_path).rope.theta == 500000.0
    completions = RecordedLLM(tmp_path, num_kv_blocks=48).complete(checkpoint.prompts(5, 70))
    assert_same_greedy(checkpoint.reference, completions)


# --- batches and blocks ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_at_a_time(model: Checkpoint, backend: str) -> None:
    llm = RecordedLLM(model.path, attention_backend=backend, num_kv_blocks=16)
    for prompt in model.prompts(1, 2, 33):
        assert_same_greedy(model.reference, llm.complete([prompt]))
    assert llm.max_batch == 1
    assert llm.metrics().num_steps == 3 * NUM_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_lengths(model: Checkpoint, backend: str) -> None:
    """More requests than may run at once, of different ends: prompts join while others decode."""
    llm = RecordedLLM(model.path, attention_backend=backend, num_kv_blocks=64, max_num_seqs=4)
    lengths = [1, 90, 2, 33, 16, 17, 64, 5, 31]
    names = [llm.add(model.prompt(n), num_tokens=NUM_TOKENS - i) for i, n in enumerate(lengths)]
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert llm.max_batch == 4
    assert llm.metrics().num_mixed_steps > 0
    completions = llm.completions()
    assert [len(c.token_ids) for c in completions] == [NUM_TOKENS - i for i in range(len(names))]
    assert_same_greedy(model.reference, completions, partial=True)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "block_size"), BLOCK_SIZES)
def test_block_sizes(model: Checkpoint, backend: str, block_size: int) -> None:
    """Prompts that end just before, at and just after the end of a block."""
    multiples = (1,) if block_size == 256 else (1, 2) if block_size > 3 else (5, 20)
    lengths = [
        n
        for m in multiples
        for n in (m * block_size - 1, m * block_size, m * block_size + 1)
        if n > 0
    ]
    llm = RecordedLLM(
        model.path,
        attention_backend=backend,
        block_size=block_size,
        num_kv_blocks=1400 // block_size + 8,
    )
    completions = llm.complete(model.prompts(*lengths))
    # The last token is never fed back, and needs no place.
    blocks = [-(-(n + NUM_TOKENS - 1) // block_size) for n in lengths]
    assert [len(c.block_table) for c in completions] == blocks
    assert llm.metrics().peak_used_kv_blocks == sum(blocks)
    assert_same_greedy(model.reference, completions)


# --- prefix cache ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "block_size"),
    [
        ("torch", 3),
        ("torch", 16),
        ("torch", 64),
        *(pytest.param("triton", n, marks=pytest.mark.gpu) for n in (16, 64)),
    ],
)
def test_shared_prefixes(model: Checkpoint, backend: str, block_size: int) -> None:
    """Same beginning, different ends, all at once: the later ones wait for the blocks that the
    first computes.
    """
    shared = model.prompt(133)
    prompts = [model.prompt(n, after=shared) for n in (3, 9, 20, 33)] + [shared]
    llm = RecordedLLM(
        model.path,
        attention_backend=backend,
        block_size=block_size,
        num_kv_blocks=1600 // block_size,
    )
    completions = llm.complete(prompts)
    full = len(shared) // block_size
    assert full > 1
    assert llm.metrics().prefix_cache_hits == full * block_size * (len(prompts) - 1)
    tables = [c.block_table for c in completions]
    assert len({tuple(t[:full]) for t in tables}) == 1
    assert len({t[full] for t in tables}) == len(prompts)
    assert_same_greedy(model.reference, completions)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [31, 32, 33, 48])
def test_fully_cached_prompt(model: Checkpoint, backend: str, length: int) -> None:
    """The same prompt again: everything is cached, but the last token must run, or there are no
    logits.
    """
    llm = RecordedLLM(model.path, attention_backend=backend, block_size=16, num_kv_blocks=16)
    prompt = model.prompt(length)
    first = llm.complete([prompt])
    assert llm.metrics().prefix_cache_hits == 0
    again = llm.complete([prompt])
    assert llm.metrics().prefix_cache_hits == (length - 1) // 16 * 16 > 0
    assert_same_greedy(model.reference, first + again)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_output(model: Checkpoint, backend: str) -> None:
    """A second turn brings the first answer back as prompt: blocks that decoding filled serve as a
    prefix.
    """
    llm = RecordedLLM(model.path, attention_backend=backend, block_size=16, num_kv_blocks=32)
    [first] = llm.complete([model.prompt(17)])
    second = llm.complete([model.prompt(5, after=[*first.prompt, *first.token_ids])])
    assert llm.metrics().prefix_cache_hits == (17 + NUM_TOKENS - 1) // 16 * 16 == 80
    assert second[0].block_table[:5] == first.block_table[:5]
    assert_same_greedy(model.reference, [first, *second])


@pytest.mark.slow
def test_hit_after_a_miss(model: Checkpoint) -> None:
    """A cached block whose predecessor was evicted is no prefix: it must be computed again."""
    llm = RecordedLLM(model.path, block_size=4, num_kv_blocks=20)
    assert_same_greedy(
        model.reference, run_hit_after_miss(llm, model), num_tokens=16, min_distinct=8
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_prefix_caching(model: Checkpoint, backend: str) -> None:
    llm = RecordedLLM(
        model.path, attention_backend=backend, num_kv_blocks=32, enable_prefix_caching=False
    )
    completions = llm.complete([model.prompt(48)] * 2) + llm.complete([model.prompt(48)])
    assert llm.metrics().prefix_cache_hits == 0
    assert not set(completions[0].block_table) & set(completions[1].block_table)
    assert_same_greedy(model.reference, completions)


# --- chunks, preemption ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "budget", "block_size"),
    [("torch", *pair) for pair in ((1, 16), (2, 3), (5, 1), (7, 16), (16, 16), (33, 16))]
    + [
        pytest.param("triton", *pair, marks=pytest.mark.gpu)
        for pair in ((1, 16), (7, 16), (33, 64))
    ],
)
def test_chunks(model: Checkpoint, backend: str, budget: int, block_size: int) -> None:
    llm = RecordedLLM(
        model.path,
        attention_backend=backend,
        max_num_batched_tokens=budget,
        block_size=block_size,
        num_kv_blocks=640 // block_size,
    )
    lengths = (20, 48) if budget == 1 else (5, 48, 16, 33)
    completions = llm.complete(model.prompts(*lengths))
    metrics = llm.metrics()
    assert metrics.num_chunks > 0
    assert budget > 1 or metrics.num_chunks == sum(lengths) - len(lengths)
    assert (metrics.num_mixed_steps > 0) == (budget > 1)
    assert metrics.num_computed_tokens == sum(lengths) + len(lengths) * (NUM_TOKENS - 1)
    assert_same_greedy(model.reference, completions)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_after_a_prefix(model: Checkpoint, backend: str) -> None:
    """Chunks of 7 that start inside a prompt, behind blocks of 16 that came from the cache."""
    llm = RecordedLLM(
        model.path,
        attention_backend=backend,
        max_num_batched_tokens=7,
        block_size=16,
        num_kv_blocks=32,
    )
    shared = model.prompt(33)
    before = llm.complete([shared])
    chunks = llm.metrics().num_chunks
    after = llm.complete([model.prompt(20, after=shared), model.prompt(31, after=shared)])
    assert llm.metrics().num_chunks > chunks > 0
    assert llm.metrics().prefix_cache_hits >= 64
    assert_same_greedy(model.reference, before + after)


PREEMPTION = [
    pytest.param({"block_size": 16, "num_kv_blocks": 9}, id="block16"),
    pytest.param({"block_size": 1, "num_kv_blocks": 130}, id="block1"),
    pytest.param(
        {"block_size": 3, "num_kv_blocks": 50, "max_num_batched_tokens": 8}, id="block3-chunks"
    ),
    pytest.param(
        {"block_size": 16, "num_kv_blocks": 8, "enable_prefix_caching": False},
        id="block16-no-cache",
    ),
    # A decode takes one token of the budget, which leaves one for a prompt.
    pytest.param(
        {"block_size": 16, "num_kv_blocks": 7, "max_num_batched_tokens": 2},
        id="block16-chunks-of-1",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", PREEMPTION)
def test_preemption(model: Checkpoint, backend: str, options: dict[str, Any]) -> None:
    if backend == "triton" and options["block_size"] < 16:
        pytest.skip("the Triton kernels take blocks from 16 up")
    llm = RecordedLLM(model.path, attention_backend=backend, **options)
    completions = llm.complete(model.prompts(20, 33, 16, 31))
    assert llm.metrics().num_preemptions > 0
    assert max(llm.outputs_at_preemption) > 1, "nobody was preempted with output of its own"
    assert sum(c.num_preemptions for c in completions) == llm.metrics().num_preemptions
    assert_same_greedy(model.reference, completions)
    assert llm.metrics().num_used_kv_blocks == 0


@pytest.mark.slow
def test_preemption_then_hits_on_ones_own_blocks(model: Checkpoint) -> None:
    llm = RecordedLLM(model.path, block_size=4, num_kv_blocks=34)
    completions = llm.complete(model.prompts(20, 33, 16))
    assert llm.metrics().num_preemptions > 0
    # No two prompts share a block, so every hit is a preempted sequence finding its own.
    assert llm.metrics().prefix_cache_hits > 0
    assert_same_greedy(model.reference, completions)


# --- neighbours -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_abort_of_neighbours(model: Checkpoint, backend: str) -> None:
    """One is aborted while it decodes, one in the middle of its prompt; newcomers take over their
    blocks and slots.
    """
    llm = RecordedLLM(
        model.path,
        attention_backend=backend,
        block_size=16,
        num_kv_blocks=17,
        max_num_batched_tokens=24,
        max_num_seqs=3,
    )
    engine = llm.llm_engine
    stays, decodes = llm.add(model.prompt(5)), llm.add(model.prompt(20))
    for _ in range(12):
        engine.step()
    in_prompt = llm.add(model.prompt(90))
    engine.step()
    aborted = [seq for seq in engine.scheduler.running if seq.num_prompt_tokens != 5]
    assert [seq.num_output_tokens > 5 for seq in aborted] == [True, False]
    assert 0 < aborted[1].num_computed_tokens < 90
    freed = {block for seq in aborted for block in seq.block_table}
    engine.abort_request([decodes, in_prompt])
    newcomers = [llm.add(model.prompt(33)), llm.add(model.prompt(75))]
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {o.request_id: o.outputs[0].finish_reason for o in engine.step() if o.finished}
    assert finished == {
        decodes: "abort",
        in_prompt: "abort",
        stays: "length",
        **dict.fromkeys(newcomers, "length"),
    }
    completions = llm.completions()
    assert freed & {block for c in completions[3:] for block in c.block_table}
    assert_same_greedy(model.reference, completions, partial=True)
    assert [len(c.token_ids) == NUM_TOKENS for c in completions] == [True, False, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", [64, 12])
def test_several_completions(model: Checkpoint, backend: str, pool: int) -> None:
    """n > 1 shares the prompt's full blocks, with room for all or (12 blocks) with preemption."""
    llm = RecordedLLM(model.path, attention_backend=backend, block_size=16, num_kv_blocks=pool)
    completions = llm.complete([model.prompt(33), model.prompt(5)], n=3)
    assert llm.metrics().prefix_cache_hits >= 2 * 32
    assert (llm.metrics().num_preemptions > 0) == (pool == 12)
    if pool == 64:
        assert len({tuple(c.block_table[:2]) for c in completions[:3]}) == 1
        assert len({c.block_table[2] for c in completions[:3]}) == 3
    assert len(completions) == 6
    assert_same_greedy(model.reference, completions)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_engines_in_one_process(model: Checkpoint, other: Checkpoint, backend: str) -> None:
    """Different models, options and pools, stepped in turns."""
    a = RecordedLLM(model.path, attention_backend=backend, block_size=16, num_kv_blocks=24)
    b = RecordedLLM(
        other.path,
        attention_backend=backend,
        block_size=64,
        num_kv_blocks=9,
        max_num_batched_tokens=10,
    )
    for length in (20, 33):
        a.add(model.prompt(length))
        b.add(other.prompt(length))
    turns = 0
    while a.llm_engine.has_unfinished_requests() or b.llm_engine.has_unfinished_requests():
        both = a.llm_engine.has_unfinished_requests() and b.llm_engine.has_unfinished_requests()
        turns += both
        for llm in (a, b):
            if llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
    assert turns > NUM_TOKENS - 2
    assert_same_greedy(model.reference, a.completions())
    assert_same_greedy(other.reference, b.completions())


# --- logprobs of the prompt -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="whole"),
        pytest.param({"max_num_batched_tokens": 7}, id="chunks"),
        pytest.param(
            {"max_num_batched_tokens": 2, "num_kv_blocks": 7}, id="preemption-chunks-of-1"
        ),
        pytest.param({"num_kv_blocks": 8, "max_num_batched_tokens": 24}, id="preemption"),
    ],
)
def test_prompt_logprobs(model: Checkpoint, backend: str, options: dict[str, Any]) -> None:
    llm = RecordedLLM(
        model.path, attention_backend=backend, **{"block_size": 16, "num_kv_blocks": 64, **options}
    )
    prompts = [*model.prompts(20, 33, 31, 1), model.prompt(33)]
    outputs = llm.generate(prompts, greedy(prompt_logprobs=3), use_tqdm=False)
    metrics = llm.metrics()
    assert (metrics.num_chunks > 0) == ("max_num_batched_tokens" in options)
    assert (metrics.num_preemptions > 0) == ("num_kv_blocks" in options)
    assert metrics.prefix_cache_hits == 0, (
        "the same prompt twice, and still every position was computed"
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        expected = torch.log_softmax(model.reference.logits(prompt), dim=-1)
        for position, found in enumerate(output.prompt_logprobs[1:], start=1):
            row = expected[position - 1]
            best = {
                token: float(row[token])
                for token in [*row.topk(3).indices.tolist(), prompt[position]]
            }
            assert {token: entry.logprob for token, entry in found.items()} == pytest.approx(
                best, abs=2e-3
            )
            assert found[prompt[position]].rank == int((row > row[prompt[position]]).sum()) + 1
    assert_same_greedy(model.reference, llm.completions())


# --- one step ahead -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_kv_blocks": 64}, id="roomy"),
        pytest.param(
            {"num_kv_blocks": 64, "max_num_batched_tokens": 7, "max_num_seqs": 3}, id="chunks"
        ),
        pytest.param({"num_kv_blocks": 9}, id="preemption"),
        pytest.param({"num_kv_blocks": 8, "max_num_batched_tokens": 9}, id="preemption-chunks"),
    ],
)
def test_results_one_step_late(model: Checkpoint, backend: str, options: dict[str, Any]) -> None:
    """Each step is planned and launched before the tokens of the one before are known: the runner
    fills them in.
    """
    shared = model.prompt(33)
    prompts = [shared, model.prompt(5), model.prompt(3, after=shared), model.prompt(16), shared]
    options = {"attention_backend": backend, "block_size": 16, **options}
    in_step, late = RecordedLLM(model.path, **options), RecordedLLM(model.path, **options)
    expected = in_step.complete(prompts)
    for prompt in prompts:
        late.add(prompt)
    completions = late.run_one_step_late()
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert_same_greedy(model.reference, completions)
    stats = late.metrics()
    assert stats.prefix_cache_hits > 0
    assert (stats.num_preemptions > 0) == (options["num_kv_blocks"] < 64)
    assert stats.num_preemptions == 0 or max(late.outputs_at_preemption) > 1
    assert (stats.num_chunks > 0) == ("max_num_batched_tokens" in options)
    assert stats.num_used_kv_blocks == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_kv_blocks": 64}, id="roomy"),
        pytest.param(
            {"num_kv_blocks": 64, "max_num_batched_tokens": 7, "max_num_seqs": 3}, id="chunks"
        ),
        pytest.param({"num_kv_blocks": 9}, id="preemption"),
    ],
)
def test_async_scheduling(model: Checkpoint, backend: str, options: dict[str, Any]) -> None:
    """The engine's own loop running one step ahead, with several completions and logprobs of a
    prompt.
    """
    llm = RecordedLLM(
        model.path, attention_backend=backend, block_size=16, async_scheduling=True, **options
    )
    ahead, execute = [], llm.llm_engine.model_runner.execute

    def noticing(batch: Any) -> Any:
        ahead.append(any(item.sequence.token_ids[item.start] < 0 for item in batch.items))
        return execute(batch)

    llm.llm_engine.model_runner.execute = noticing
    [shared] = model.prompts(33)
    outputs = llm.generate(
        [shared, model.prompt(5)], [greedy(n=2), greedy(prompt_logprobs=1)], use_tqdm=False
    )
    again = llm.complete([model.prompt(3, after=shared), shared])
    assert sum(ahead) > NUM_TOKENS, "steps were not planned before their tokens were known"
    assert [len(o.outputs) for o in outputs] == [2, 1]
    assert all(len(entry) >= 1 for entry in outputs[1].prompt_logprobs[1:])
    metrics = llm.metrics()
    assert metrics.prefix_cache_hits > 0
    assert (metrics.num_preemptions > 0) == (options["num_kv_blocks"] == 9)
    assert (metrics.num_chunks > 0) == ("max_num_batched_tokens" in options)
    assert len(again) == 2
    assert_same_greedy(model.reference, llm.completions())


def test_stop_token_one_step_late(model: Checkpoint) -> None:
    """The step after a stop token is computed for nothing, and must leave no trace in blocks that
    others take over.
    """
    prompts = model.prompts(20, 33, 16, 5)
    stops = [model.reference.greedy(p, NUM_TOKENS).token_ids[12 + i] for i, p in enumerate(prompts)]
    late = RecordedLLM(model.path, block_size=4, num_kv_blocks=40, max_num_seqs=2)
    for prompt, stop in zip(prompts, stops, strict=True):
        late.add(prompt, stop_token_ids=[stop])
    completions = late.run_one_step_late()
    assert [c.token_ids[-1] for c in completions] == stops
    computed_for_nothing = late.metrics().num_computed_tokens - sum(
        len(c.prompt) + len(c.token_ids) - 1 for c in completions
    )
    assert computed_for_nothing == len(prompts)
    assert_same_greedy(model.reference, completions, partial=True)


# --- speculation ----------------------------------------------------------------------------------


SPECULATION = {
    "errs": lambda model, other: {"proposer": Errs(model.reference)},
    # The draft's own caches are right if it agrees with itself.
    "itself": lambda model, other: {
        "speculative_config": {"model": str(model.path), "num_speculative_tokens": 4}
    },
    "other": lambda model, other: {
        "speculative_config": {"model": str(other.path), "num_speculative_tokens": 3}
    },
    "ngram": lambda model, other: {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 5,
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        }
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_kv_blocks": 64}, id="roomy"),
        pytest.param(
            {"num_kv_blocks": 64, "max_num_batched_tokens": 7, "max_num_seqs": 3}, id="chunks"
        ),
        pytest.param({"num_kv_blocks": 9}, id="preemption"),
        pytest.param({"num_kv_blocks": 64, "enable_prefix_caching": False}, id="no-cache"),
    ],
)
@pytest.mark.parametrize("how", SPECULATION)
def test_speculation(
    model: Checkpoint, other: Checkpoint, backend: str, options: dict[str, Any], how: str
) -> None:
    """Steps that verify proposals, beside chunks, hits, preemptions and plain decodes."""
    llm = RecordedLLM(
        model.path,
        attention_backend=backend,
        block_size=16,
        **options,
        **SPECULATION[how](model, other),
    )
    shared = model.prompt(33)
    prompts = [shared, model.prompt(5), model.prompt(3, after=shared), model.prompt(16)]
    completions = llm.complete(prompts)
    metrics = llm.metrics()
    assert (metrics.prefix_cache_hits > 0) == options.get("enable_prefix_caching", True)
    assert (metrics.num_preemptions > 0) == (options["num_kv_blocks"] == 9)
    assert (metrics.num_chunks > 0) == ("max_num_batched_tokens" in options)
    assert metrics.num_draft_tokens > 20
    assert metrics.num_accepted_tokens < metrics.num_draft_tokens or how == "itself"
    if how == "itself":
        assert metrics.num_accepted_tokens == metrics.num_draft_tokens > 100
    elif how == "errs":
        assert metrics.num_accepted_tokens > 50
    assert_same_greedy(model.reference, completions)


# --- kernels --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """For the interpreter, which runs every program of a launch one after another in Python."""
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 16, "intermediate_size": 48}
    return Checkpoint(tmp_path_factory.mktemp("tiny"), **shape)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels run all of this")
@pytest.mark.parametrize("block_size", [16, 32])
def test_triton_interpreter(tiny: Checkpoint, block_size: int) -> None:
    """Chunks, mixed steps, a shared prefix and preemption, all on Triton kernels."""
    pytest.importorskip("triton")
    llm = RecordedLLM(
        tiny.path,
        attention_backend="triton",
        block_size=block_size,
        num_kv_blocks=96 // block_size,
        max_num_batched_tokens=24,
    )
    shared = tiny.prompt(33)
    completions = llm.complete([shared, tiny.prompt(25), [*shared[:32], 7]], num_tokens=10)
    metrics = llm.metrics()
    assert metrics.num_preemptions > 0
    assert metrics.prefix_cache_hits >= 32
    assert metrics.num_chunks > 0
    assert metrics.num_mixed_steps > 0
    assert_only_triton(llm)
    assert_same_greedy(tiny.reference, completions, 10, min_distinct=5)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels run all of this")
def test_triton_interpreter_without_qk_norm(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, **heads(8, 1)}
    checkpoint = Checkpoint(tmp_path, "qwen2", **shape)
    llm = RecordedLLM(tmp_path, attention_backend="triton", block_size=16, num_kv_blocks=16)
    completions = llm.complete(checkpoint.prompts(17, 3), num_tokens=6)
    assert_only_triton(llm)
    assert_same_greedy(checkpoint.reference, completions, 6, min_distinct=3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["qwen3-group8", "qwen3-biases", "qwen2", "llama-mlp-biases", "llama-group4", "yarn"]
)
def test_triton_compiled(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    checkpoint = Checkpoint(tmp_path, variant.family, **variant.changes)
    llm = RecordedLLM(
        tmp_path, attention_backend="triton", num_kv_blocks=48, max_num_batched_tokens=50
    )
    completions = llm.complete(checkpoint.prompts(1, 16, 75))
    assert llm.metrics().num_mixed_steps > 0
    assert llm.num_replays > 0
    assert_only_triton(llm)
    assert_same_greedy(checkpoint.reference, completions)


@pytest.mark.gpu
def test_triton_without_graphs(model: Checkpoint) -> None:
    llm = RecordedLLM(model.path, attention_backend="triton", num_kv_blocks=48, enforce_eager=True)
    completions = llm.complete(model.prompts(1, 16, 75))
    assert llm.num_replays == 0
    assert_only_triton(llm)
    assert_same_greedy(model.reference, completions)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 3, 8, 9])
def test_padded_graphs(model: Checkpoint, size: int) -> None:
    """Batches of 1, 3 (padded to 4), 8 and 9 (padded to 16); padded rows must not write where
    others read.
    """
    llm = RecordedLLM(model.path, attention_backend="triton", block_size=16, num_kv_blocks=80)
    completions = llm.complete(model.prompts(*[20 + i for i in range(size)]))
    assert llm.num_replays > NUM_TOKENS // 2
    assert llm.max_batch == size
    assert_same_greedy(model.reference, completions)


def test_reference_kernels(model: Checkpoint) -> None:
    """Also where an engine has faster ones: `dataclasses.replace` begins with the references."""
    llm = RecordedLLM(model.path, kernels=Kernels.reference(), num_kv_blocks=48)
    assert_same_greedy(model.reference, llm.complete(model.prompts(5, 33)))


@pytest.mark.gpu
def test_reference_kernels_on_a_gpu(model: Checkpoint) -> None:
    """attention_backend="torch" needs no further option: the references ask the GPU for numbers, no
    graph can.
    """
    completions = RecordedLLM(model.path, attention_backend="torch", num_kv_blocks=48).complete(
        model.prompts(5, 33)
    )
    assert_same_greedy(model.reference, completions)


def assert_only_triton(llm: RecordedLLM) -> None:
    """Every operation was launched, and the functions behind them are the Triton ones."""
    from minivllm import Kernels

    assert {name for name, count in llm.launches.items() if count > 0} >= KERNEL_FIELDS
    assert (
        llm.llm_engine.model_runner.model.model.layers[0].mlp.kernels.name
        == Kernels.triton().name
        == "triton"
    )


# --- the bundled model ----------------------------------------------------------------------------

TEXTS = [
    "Tell me a story about a fox and a lantern.",
    "Once upon a time",
    "What is a KV cache?",
    (
        "Tell me a story about a baker, a storm and a lost key. It should be long, and it should"
        " end well."
    ),
    "Sort these numbers: 7 3 9 1",
]


@pytest.fixture(scope="module")
def bundled() -> TransformersReference:
    return TransformersReference(BUNDLED_MODEL_PATH, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_kv_blocks": 64}, id="roomy"),
        pytest.param({"num_kv_blocks": 64, "max_num_batched_tokens": 11}, id="chunks"),
        pytest.param({"num_kv_blocks": 13, "max_num_batched_tokens": 64}, id="preemption"),
    ],
)
def test_bundled_model(
    bundled: TransformersReference, backend: str, options: dict[str, Any]
) -> None:
    """Chats and plain text at once, then all of it again, which the prefix cache remembers in
    part.
    """
    llm = RecordedLLM(
        None, attention_backend=backend, block_size=16, skip_tokenizer_init=False, **options
    )
    prompts = [llm.render_chat([{"role": "user", "content": text}]) for text in TEXTS]
    prompts += [llm.get_tokenizer().encode("Once upon a time there was")]
    completions = llm.complete(prompts) + llm.complete(prompts)
    metrics = llm.metrics()
    assert metrics.prefix_cache_hits > 0
    assert (metrics.num_preemptions > 0) == (options["num_kv_blocks"] == 13)
    assert (metrics.num_chunks > 0) == ("max_num_batched_tokens" in options)
    assert_same_greedy(bundled, completions, min_distinct=1)
    stories = [len(set(c.token_ids)) for c in completions]
    assert sorted(stories)[len(stories) // 2] >= MIN_DISTINCT


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_bundled_model_at_full_length(bundled: TransformersReference, backend: str) -> None:
    """A prompt of a thousand tokens and more, up to the last position that the config promises."""
    llm = RecordedLLM(
        None, attention_backend=backend, skip_tokenizer_init=False, num_kv_blocks=160, block_size=16
    )
    limit = llm.llm_engine.config.max_model_len
    text = llm.get_tokenizer().encode(" ".join(TEXTS) + " ")
    prompt = (text * (limit // len(text) + 1))[: limit - NUM_TOKENS]
    [completion] = llm.complete([prompt])
    assert len(completion.prompt) + len(completion.token_ids) == limit == 2048
    assert_same_greedy(bundled, [completion], min_distinct=1)
