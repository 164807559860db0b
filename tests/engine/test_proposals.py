"""Steps that verify proposals, in the engine with a real model: the same tokens, logprobs and ends
as without.

First a test plays the proposer: it knows what the engine says without proposals, and hands the
scheduler right, wrong and partly right guesses between the steps. Then the package's own proposers
do it, and bad ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from minivllm import LLM, SamplingParams
from minivllm.engine.sequence import PENDING
from minivllm.engine.speculation import Proposer
from minivllm.errors import InvalidLogitsError
from minivllm.models.qwen3 import Qwen3ForCausalLM
from support.checkpoints import write_checkpoint

VOCAB = 48
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 12], [3], [30, 31, 32, 33, 34] * 3]
#: Of a step: a small pool and budget, so that chunks, preemptions and prefix hits are met.
TIGHT = {"num_kv_blocks": 24, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 24}
POISON = 47  # a model of this file gives no finite numbers behind it


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 tokens: token i is the word "wi"; words stand between spaces."""
    return write_model(tmp_path_factory.mktemp("proposals"), 3)


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft of one layer, with the same tokens."""
    return write_model(tmp_path_factory.mktemp("draft"), 4, num_hidden_layers=1)


def write_model(path: Path, seed: int, num_hidden_layers: int = 2) -> Path:
    shape = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    shape["num_hidden_layers"] = num_hidden_layers
    write_checkpoint(
        path, seed=seed, vocab_size=VOCAB, max_position_embeddings=256, **shape, **heads
    )
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 3},
    "sampled": {"temperature": 1.0, "seed": 7, "n": 2, "logprobs": 2},
    "filtered": {"temperature": 0.9, "seed": 8, "n": 2, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    "penalised": {
        "temperature": 0.0,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "logprobs": 0,
    },
    "penalised and sampled": {
        "temperature": 1.2,
        "seed": 9,
        "n": 2,
        "frequency_penalty": 1.5,
        "logprobs": 1,
    },
    "edited": {
        "temperature": 1.0,
        "seed": 5,
        "min_tokens": 9,
        "stop_token_ids": list(range(0, VOCAB, 5)),
        "logit_bias": {3: 2.0, 4: -5.0},
        "bad_words": ["w3", "w7 w8", "w9", "w11 w12 w13"],
        "prompt_logprobs": 1,
    },
    "stopped": {"temperature": 0.0, "stop_token_ids": list(range(1, VOCAB, 4))},
    "stopped by text": {"temperature": 1.0, "seed": 3, "n": 2, "stop": ["w1", "w20", "w33"]},
}


def params_of(name: str) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **REQUESTS[name]})


class Guesser:
    """Proposes to every sequence of an engine, before each step. style: "right", "wrong", or
    "partly".
    """

    def __init__(self, texts: dict[tuple[str, int], list[int]], style: str, seed: int = 0) -> None:
        self.texts, self.style, self.random = texts, style, random.Random(seed)
        self.num_verified = self.num_accepted = 0

    def watch(self, llm: LLM) -> None:
        scheduler = llm.llm_engine.scheduler
        update = scheduler.update

        def counted(batch: Any, token_ids: Any) -> Any:
            for item, tokens in zip(batch.sampled, token_ids, strict=True):
                self.num_verified += len(item.proposed_token_ids)
                self.num_accepted += len(tokens) - 1
            return update(batch, token_ids)

        scheduler.update = counted

    def propose(self, llm: LLM) -> None:
        scheduler = llm.llm_engine.scheduler
        for seq in [*scheduler.running, *scheduler.waiting]:
            known = [token for token in seq.output_token_ids if token != PENDING]
            right = self.texts[seq.request_id, seq.index][len(known) :]
            guess = right[: self.random.choice([0, 1, 2, 3, 3, 4, 5, 5])]
            wrong = [(token + 1) % (VOCAB - 1) for token in guess]
            if self.style == "wrong":
                guess = wrong
            elif self.style == "partly":
                cut = self.random.randint(0, len(guess))
                guess = guess[:cut] + wrong[cut:]
            scheduler.propose(seq, guess)


def serve(llm: LLM, requests: list[tuple[str, Any, SamplingParams]], guesser: Any = None) -> dict:
    """request id -> its last output."""
    engine, found = llm.llm_engine, {}
    if guesser is not None:
        guesser.watch(llm)
    for request_id, prompt, params in requests:
        engine.add_request(prompt, params, request_id)
    while engine.has_unfinished_requests():
        if guesser is not None:
            guesser.propose(llm)
        for output in engine.step():
            found[output.request_id] = output
        engine.scheduler.check()
    assert engine.metrics().num_used_kv_blocks == 0
    assert len(engine.scheduler.free_slots) == TIGHT["max_num_seqs"]
    return found


def all_requests() -> list[tuple[str, Any, SamplingParams]]:
    return [
        (f"{name} {number}", {"prompt_token_ids": prompt}, params_of(name))
        for name in REQUESTS
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def plain(path: Path) -> dict:
    """What the engine says without proposals, with room for everybody."""
    return serve(make(path, num_kv_blocks=400), all_requests())


def sampled_requests() -> list[tuple[str, Any, SamplingParams]]:
    """Seeds and temperatures."""
    return [
        (
            f"{temperature} {seed} {number}",
            {"prompt_token_ids": prompt},
            SamplingParams(temperature=temperature, seed=seed, max_tokens=16, ignore_eos=True),
        )
        for temperature in (0.0, 0.7, 1.5)
        for seed in (1, 2)
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def plain_sampled(path: Path) -> dict:
    return serve(make(path, num_kv_blocks=400), sampled_requests())


def make(path: Path, **options: Any) -> LLM:
    return LLM(path, device="cpu", **{**TIGHT, **options})


def texts_of(outputs: dict) -> dict[tuple[str, int], list[int]]:
    return {(i, c.index): list(c.token_ids) for i, out in outputs.items() for c in out.outputs}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for request_id, output in expected.items():
        for mine, right in zip(found[request_id].outputs, output.outputs, strict=True):
            assert mine.token_ids == right.token_ids, request_id
            assert (mine.text, mine.finish_reason, mine.stop_reason) == (
                right.text,
                right.finish_reason,
                right.stop_reason,
            )
            assert (mine.logprobs is None) == (right.logprobs is None)
            for one, other in zip(mine.logprobs or [], right.logprobs or [], strict=True):
                assert one.keys() == other.keys()
                for token_id, logprob in other.items():
                    assert one[token_id].logprob == pytest.approx(logprob.logprob, abs=1e-3)
                    assert one[token_id].rank == logprob.rank


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "one-step-late"])
@pytest.mark.parametrize("style", ["right", "wrong", "partly"])
def test_the_same_tokens_and_logprobs(path: Path, plain: dict, style: str, late: bool) -> None:
    guesser = Guesser(texts_of(plain), style)
    # One step late, a sequence takes proposals only when its newest token is known: after a chunk
    # of its prompt, and after a step with proposals. A small budget makes more chunks.
    llm = make(path, async_scheduling=late, max_num_batched_tokens=12 if late else 24)
    found = serve(llm, all_requests(), guesser)
    assert_same(found, plain)
    metrics = llm.metrics()
    assert metrics.num_generated_tokens == sum(map(len, texts_of(plain).values()))
    assert metrics.num_preemptions > 0
    assert metrics.num_chunks > 0
    assert metrics.prefix_cache_hits > 0
    assert guesser.num_verified > (30 if late else 100)
    if style == "wrong":
        assert guesser.num_accepted == 0
    elif style == "right":
        assert guesser.num_accepted == guesser.num_verified
    else:
        assert 0 < guesser.num_accepted < guesser.num_verified


class Random(Proposer):
    """Guesses at random, as many as it likes."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def propose(self, sequences: Any, num_tokens: Any) -> list[list[int]]:
        return [self.random.choices(range(VOCAB), k=self.random.randint(0, 9)) for _ in sequences]


class Repeats(Proposer):
    """Adversarial: proposes what a verifier might take by mistake, such as stop tokens."""

    def propose(self, sequences: Any, num_tokens: Any) -> list[list[int]]:
        return [
            [sorted(seq.stop_ids)[0] if seq.stop_ids else seq.token_ids[-1]] * count
            for seq, count in zip(sequences, num_tokens, strict=True)
        ]


NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1}
SPECULATING: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "ngram": lambda path, other: {"speculative_config": NGRAM | {"prompt_lookup_max": 3}},
    "itself": lambda path, other: {
        "speculative_config": {"model": str(path), "num_speculative_tokens": 3}
    },
    "another model": lambda path, other: {
        "speculative_config": {"model": other, "num_speculative_tokens": 4}
    },
    "random": lambda path, other: {"proposer": Random()},
    "repeats": lambda path, other: {
        "proposer": Repeats(),
        "speculative_config": {"num_speculative_tokens": 2, "disable_by_batch_size": 3},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SPECULATING)
def test_the_same_with_a_proposer(
    path: Path, another: Path, plain: dict, plain_sampled: dict, how: str
) -> None:
    """All kinds of requests together, in a tight pool: texts, logprobs and ends are the same."""
    llm = make(path, **SPECULATING[how](path, another))
    found = serve(llm, all_requests())
    assert_same(found, plain)
    metrics = llm.metrics()
    assert metrics.num_preemptions > 0
    assert metrics.num_chunks > 0
    assert metrics.prefix_cache_hits > 0
    assert metrics.num_draft_tokens > 50
    per_pos = metrics.num_accepted_tokens_per_pos
    assert sum(per_pos) == metrics.num_accepted_tokens < metrics.num_draft_tokens
    assert per_pos == sorted(per_pos, reverse=True)
    requests = [output.metrics for output in found.values()]
    assert sum(m.num_draft_tokens for m in requests) == metrics.num_draft_tokens
    assert sum(m.num_accepted_tokens for m in requests) == metrics.num_accepted_tokens
    if how == "itself":
        assert metrics.num_accepted_tokens > 0.5 * metrics.num_draft_tokens
    assert_same(serve(llm, sampled_requests()), plain_sampled)


@pytest.mark.slow
def test_an_interrupted_proposer_begins_anew(path: Path, plain: dict) -> None:
    """As after Ctrl-C while the draft computes, and while the model does."""
    llm, requests = make(path, **SPECULATING["itself"](path, path)), all_requests()
    engine, found, number = llm.llm_engine, {}, 0
    draft = engine.core.speculator.proposer
    for request_id, prompt, params in requests:
        engine.add_request(prompt, params, request_id)

    def interrupted(execute: Any, period: int) -> Any:
        def run(batch: Any) -> Any:
            nonlocal number
            result, number = execute(batch), number + 1
            if number % period == 0:
                raise KeyboardInterrupt
            return result

        return run

    draft.runner.execute = interrupted(draft.runner.execute, 23)
    engine.model_runner.execute = interrupted(engine.model_runner.execute, 29)
    num_interrupts = 0
    while engine.has_unfinished_requests():
        try:
            for output in engine.step():
                found[output.request_id] = output
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts > 5
    assert_same(found, plain)


def test_right_proposals_save_steps(path: Path, plain: dict) -> None:
    [request] = [r for r in all_requests() if r[0] == "greedy 0"]
    plainly, guessing = make(path), make(path)
    serve(plainly, [request])
    serve(guessing, [request], Guesser(texts_of(plain), "right", seed=2))
    assert guessing.metrics().num_steps < 0.6 * plainly.metrics().num_steps


@pytest.mark.slow
def test_an_interrupt_forgets_proposals_and_no_token(path: Path, plain: dict) -> None:
    """As after Ctrl-C: the core begins anew in the middle, from the tokens that have been told."""
    llm, requests = make(path), all_requests()
    guesser, engine, found = Guesser(texts_of(plain), "partly"), llm.llm_engine, {}
    for request_id, prompt, params in requests:
        engine.add_request(prompt, params, request_id)
    execute, number = engine.model_runner.execute, 0

    def fails_now_and_then(batch: Any) -> Any:
        nonlocal number
        result, number = execute(batch), number + batch.has_proposals
        if number == 7:
            number = 0
            raise KeyboardInterrupt
        return result

    engine.model_runner.execute = fails_now_and_then
    num_interrupts = 0
    while engine.has_unfinished_requests():
        try:
            guesser.propose(llm)
            for output in engine.step():
                found[output.request_id] = output
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts > 3
    assert_same(found, plain)


class Poisoned(Qwen3ForCausalLM):
    """Logits turn bad behind the token POISON."""

    def forward(self, token_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        hidden = super().forward(token_ids, *args)
        return torch.where((token_ids == POISON)[:, None], float("nan"), hidden)


@pytest.mark.parametrize("right", [0, 2, 3])
def test_bad_logits_behind_a_proposal_end_only_their_request(path: Path, right: int) -> None:
    """The row behind a wrong proposal counts for nobody; the row behind a right one ends the
    request, with the tokens before it.
    """
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    forced = SamplingParams(
        temperature=0.0, max_tokens=8, ignore_eos=True, allowed_token_ids=[POISON]
    )
    llm = make(path, model_cls=Poisoned)
    requests = [("a", PROMPTS[0], params), ("b", PROMPTS[1], params)]
    expected = {i: out.outputs[0].token_ids for i, out in serve(llm, requests).items()}
    assert POISON not in [*expected["a"], *expected["b"]]
    llm.llm_engine.add_request(PROMPTS[0], params, "a")
    llm.llm_engine.add_request(PROMPTS[1], params, "b")
    llm.llm_engine.add_request([1, 2], forced, "c")
    found = {o.request_id: o for o in llm.llm_engine.step()}
    scheduler = llm.llm_engine.scheduler
    assert [seq.request_id for seq in scheduler.running] == ["a", "b", "c"]
    guess = {
        "a": [*expected["a"][1 : 1 + right], POISON],
        "b": expected["b"][1:4],
        "c": [POISON] * 3,
    }
    for seq in scheduler.running:
        scheduler.propose(seq, guess[seq.request_id])
    while llm.llm_engine.has_unfinished_requests():
        found |= {o.request_id: o for o in llm.llm_engine.step()}
    assert {i: found[i].outputs[0].token_ids for i in "ab"} == expected
    assert isinstance(found["c"].error, InvalidLogitsError)
    assert found["c"].outputs[0].token_ids == [POISON]
    assert found["c"].outputs[0].finish_reason == "error"
    assert llm.metrics().num_used_kv_blocks == 0
    scheduler.check()


def test_what_cannot_be_proposed(path: Path) -> None:
    llm = make(path)
    engine, scheduler = llm.llm_engine, llm.llm_engine.scheduler
    engine.add_request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    [seq] = scheduler.waiting
    scheduler.propose(seq, [1])
    assert seq.proposed_token_ids == []  # it does not run
    engine.step()
    scheduler.propose(seq, [1, 2, 3, 4, 5])
    assert seq.proposed_token_ids == [1, 2]  # one token is there, and one comes after the proposals
    with pytest.raises(AssertionError, match="not token ids"):
        scheduler.propose(seq, [PENDING])
    engine.step()
    while engine.has_unfinished_requests():
        engine.step()
    scheduler.propose(seq, [1])
    assert seq.proposed_token_ids == []


def test_a_block_manager_without_trim_takes_no_proposals(path: Path) -> None:
    from minivllm.engine.block_manager import BlockManager

    class Mine(BlockManager):
        trim = property()  # raises AttributeError: it has none

        def free(self, seq: Any) -> None:
            BlockManager.trim(self, seq, 0)

    llm = make(path, block_manager_cls=Mine)
    engine, scheduler = llm.llm_engine, llm.llm_engine.scheduler
    engine.add_request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    engine.step()
    [seq] = scheduler.running
    scheduler.propose(seq, [1, 2])
    assert seq.proposed_token_ids == []
    while engine.has_unfinished_requests():
        engine.step()


# --- the order of a step's rows -------------------------------------------------------------------


def test_the_runner_leaves_the_batch_as_it_is(path: Path) -> None:
    """The rest of a prompt stands before a single token in some batches; results come back in the
    batch's order all the same.
    """
    llm = make(path, max_num_batched_tokens=9)
    engine, orders = llm.llm_engine, []
    execute = engine.model_runner.execute

    def watched(batch: Any) -> Any:
        before = list(batch.items)
        result = execute(batch)
        assert batch.items == before
        orders.append(result.sampled.order)
        return result

    engine.model_runner.execute = watched
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    requests = [("a", [1] * 11, params), ("b", [2], params), ("c", [4] * 7, params)]
    alone = {i: serve(make(path), [(i, p, q)])[i].outputs[0].token_ids for i, p, q in requests}
    found = serve(llm, requests)
    assert {i: out.outputs[0].token_ids for i, out in found.items()} == alone
    assert any(order != sorted(order) for order in orders), "no batch had another order"
