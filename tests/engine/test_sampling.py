"""Sampling through the engine: every parameter does what it says, in any batch, any chunking, and
after preemption.

Distributions are compared with transformers' logits by a chi-square test over many fixed seeds;
deterministic effects with a plain re-implementation that knows only the token ids
(`decode_reference`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.errors import SamplingParamsError, TokenizerRequiredError
from minivllm.sampling_params import MAX_LOGPROBS, RequestOutputKind
from support import sampling
from support.checkpoints import TransformersReference
from support.sampling import PROMPT, VOCAB, decode_reference, generate, tokens_of, write_model

DRAWS = 4000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sampling"))


@pytest.fixture(scope="module")
def reference(checkpoint):
    return TransformersReference(checkpoint)


def make_llm(checkpoint, **options) -> LLM:
    return sampling.make_llm(checkpoint, skip_tokenizer_init=True, **options)


@pytest.fixture(scope="module")
def llm(checkpoint):
    return make_llm(checkpoint)


@pytest.fixture(scope="module")
def chunked(checkpoint):
    """Three tokens a step: every prompt comes in chunks, mixed with decodes."""
    return make_llm(checkpoint, max_num_batched_tokens=3)


@pytest.fixture(scope="module")
def cramped(checkpoint):
    """A pool that two requests cannot share to their end: every batch preempts."""
    return make_llm(checkpoint, num_kv_blocks=14, enable_prefix_caching=False)


# --- distributions --------------------------------------------------------------------------------


def probabilities(
    logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logit_bias=None
) -> np.ndarray:
    """The distribution that the parameters describe: temperature first, then top-k, top-p, min-p.
    In float64.
    """
    x = logits.double().numpy().copy()
    for token, bias in (logit_bias or {}).items():
        x[token] += bias
    p = np.exp((x - x.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = np.ones(len(p), bool)
    if top_k > 0:
        keep[order[top_k:]] = False
    q = np.where(keep, p, 0.0) / p[keep].sum()
    before = np.concatenate([[0.0], np.cumsum(q[order])[:-1]])  # mass of the likelier tokens
    if top_p < 1.0:
        keep[order[before >= top_p]] = False
    keep &= p >= min_p * p.max()
    p = np.where(keep, p, 0.0)
    return p / p.sum()


def chi_square(counts: Counter, expected: np.ndarray) -> tuple[float, float]:
    """(statistic, the value that chance exceeds once in ten thousand times). Rare tokens are
    counted together.
    """
    total = sum(counts.values())
    cells = [(counts[t], p * total) for t, p in enumerate(expected) if p * total >= 8]
    rest = total - sum(n for n, _ in cells), total - sum(e for _, e in cells)
    if rest[1] >= 8:
        cells.append(rest)
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    k = len(cells) - 1
    return (
        statistic,
        k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3,
    )  # Wilson and Hilferty, 1931


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 4.0},
        {"temperature": 12.0},
        {"temperature": 8.0, "top_k": 5},
        {"temperature": 8.0, "top_k": VOCAB + 1},
        {"temperature": 8.0, "top_k": -1},
        {"temperature": 8.0, "top_p": 0.7},
        {"temperature": 3.0, "top_p": 0.99},
        {"temperature": 8.0, "min_p": 0.15},
        {"temperature": 8.0, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
        {"temperature": 6.0, "top_k": 20, "top_p": 0.95},
        {"temperature": 8.0, "logit_bias": {0: 12.0, 7: -9.5, 11: 30.0}},
    ],
    ids=str,
)
def test_distribution(llm, reference, params):
    expected = probabilities(reference.logits(PROMPT)[-1], **params)
    seeds = [SamplingParams(max_tokens=1, seed=seed, **params) for seed in range(DRAWS)]
    counts = Counter(ids[0] for ids in tokens_of(llm, [PROMPT] * DRAWS, seeds))
    assert not [t for t in counts if expected[t] == 0.0], (
        "a token that the filters exclude was drawn"
    )
    assert len(counts) > 1
    statistic, limit = chi_square(counts, expected)
    assert statistic < limit


@pytest.mark.slow
def test_distribution_over_completions_and_positions(llm, reference):
    """One request with n completions draws as independently as many requests; and so does its
    second position.
    """
    outputs = generate(
        llm, PROMPT, SamplingParams(n=DRAWS, max_tokens=2, temperature=8.0, top_k=3, seed=5)
    )[0].outputs
    first = probabilities(reference.logits(PROMPT)[-1], 8.0, top_k=3)
    statistic, limit = chi_square(Counter(o.token_ids[0] for o in outputs), first)
    assert statistic < limit
    for token in np.flatnonzero(first):
        following = probabilities(reference.logits([*PROMPT, int(token)])[-1], 8.0, top_k=3)
        counts = Counter(o.token_ids[1] for o in outputs if o.token_ids[0] == token)
        statistic, limit = chi_square(counts, following)
        assert statistic < limit


def test_top_p_comes_after_temperature(llm, reference):
    logits = reference.logits(PROMPT)[-1]
    hot, cold = probabilities(logits, 10.0, top_p=0.6), probabilities(logits, 1.0, top_p=0.6)
    assert (hot > 0).sum() > (cold > 0).sum() + 3, "the case does not tell the two orders apart"
    seeds = [SamplingParams(max_tokens=1, seed=s, temperature=10.0, top_p=0.6) for s in range(1000)]
    drawn = {ids[0] for ids in tokens_of(llm, [PROMPT] * 1000, seeds)}
    assert drawn == set(np.flatnonzero(hot).tolist())


@pytest.mark.parametrize(
    "params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}], ids=str
)
def test_the_tightest_filter_is_greedy(llm, params):
    greedy = tokens_of(llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=12))
    assert tokens_of(llm, PROMPT, SamplingParams(max_tokens=12, seed=1, **params)) == greedy


def test_greedy_ignores_filters_and_seed(llm):
    greedy = tokens_of(llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=12))
    other = SamplingParams(temperature=0.0, top_k=7, top_p=0.5, min_p=0.2, seed=9, max_tokens=12)
    assert tokens_of(llm, PROMPT, other) == greedy


# --- seeds ----------------------------------------------------------------------------------------

SAMPLED = SamplingParams(
    temperature=6.0, top_k=30, top_p=0.95, min_p=0.01, seed=1234, max_tokens=24
)


def neighbours(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = np.random.default_rng(count)
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 20)).tolist() for _ in range(count)]
    params = [
        SamplingParams(temperature=float(t), max_tokens=20, ignore_eos=True)
        for t in rng.choice([0, 1, 5], count)
    ]
    return prompts, params


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_seed_gives_the_same_tokens_in_any_batch(llm, place):
    alone = tokens_of(llm, PROMPT, SAMPLED)[0]
    prompts, params = neighbours(7)
    prompts.insert(place, PROMPT)
    params.insert(place, SAMPLED)
    assert tokens_of(llm, prompts, params)[place] == alone
    assert len(set(alone)) > 8


def test_a_seed_gives_the_same_tokens_in_chunks(llm, chunked):
    before = chunked.metrics().num_chunks
    prompts, params = neighbours(4)
    assert (
        tokens_of(chunked, [*prompts, PROMPT], [*params, SAMPLED])[-1]
        == tokens_of(llm, PROMPT, SAMPLED)[0]
    )
    assert chunked.metrics().num_chunks > before


def test_a_seed_gives_the_same_tokens_after_preemption(llm, cramped):
    before = cramped.metrics().num_preemptions
    alone = tokens_of(llm, PROMPT, SAMPLED)[0]
    assert tokens_of(cramped, [PROMPT] * 4, SAMPLED) == [alone] * 4
    assert cramped.metrics().num_preemptions > before


def test_different_seeds_differ(llm):
    drawn = tokens_of(llm, [PROMPT] * 50, [dataclasses.replace(SAMPLED, seed=s) for s in range(50)])
    assert len(set(map(tuple, drawn))) == 50


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 2**64 + 5])
def test_seeds_of_any_size(llm, seed):
    params = dataclasses.replace(SAMPLED, seed=seed)
    assert tokens_of(llm, PROMPT, params) == tokens_of(llm, PROMPT, params)


def test_seeds_use_their_high_bits(llm):
    seeds = [1, 1 + 2**32, 1 + 2**40, 1 + 2**61]
    drawn = tokens_of(llm, [PROMPT] * 4, [dataclasses.replace(SAMPLED, seed=s) for s in seeds])
    assert len(set(map(tuple, drawn))) == 4


@pytest.mark.slow
def test_n_completions_differ_and_can_be_repeated(llm, cramped):
    params = dataclasses.replace(SAMPLED, n=8)
    first = [o.token_ids for o in generate(llm, PROMPT, params)[0].outputs]
    assert len(set(map(tuple, first))) == 8
    assert [o.token_ids for o in generate(llm, PROMPT, params)[0].outputs] == first
    assert [o.token_ids for o in generate(cramped, PROMPT, params)[0].outputs] == first
    assert first[0] == tokens_of(llm, PROMPT, SAMPLED)[0], (
        "the first of n is what the seed gives alone"
    )
    assert [o.index for o in generate(llm, PROMPT, params)[0].outputs] == list(range(8))


def test_n_completions_share_the_blocks_of_their_prompt(checkpoint):
    llm = make_llm(checkpoint, num_kv_blocks=64)
    generate(llm, list(range(17)), SamplingParams(n=4, seed=1, max_tokens=2))
    assert llm.metrics().prefix_cache_hits == 3 * 16


def test_without_a_seed_the_engines_seed_decides(checkpoint):
    params = SamplingParams(temperature=6.0, max_tokens=16)

    def run(seed):
        return tokens_of(make_llm(checkpoint, seed=seed), [PROMPT] * 3, params)

    first = run(0)
    assert len(set(map(tuple, first))) == 3, (
        "equal requests without a seed must not repeat each other"
    )
    assert run(0) == first
    assert run(1) != first


# --- what changes the logits ----------------------------------------------------------------------


EDITS = [
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.6},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    {"logit_bias": {5: 3.0, 6: -4.0, 40: 2.5}},
    {"logit_bias": {5: 8.0}, "frequency_penalty": 1.0},
    {"stop_token_ids": list(range(0, VOCAB, 2)), "min_tokens": 9},
    {
        "stop_token_ids": list(range(0, VOCAB, 3)),
        "min_tokens": 4,
        "frequency_penalty": 0.5,
        "logit_bias": {3: 4.0},
    },
    {"allowed_token_ids": [4, 9, 17, 30, 30, 41]},
    {"allowed_token_ids": [7]},
    {
        "allowed_token_ids": list(range(10, 30)),
        "frequency_penalty": 1.0,
        "logit_bias": {12: 5.0, 40: 100.0},
    },
    {
        "allowed_token_ids": [1, 2, 3, 6],
        "stop_token_ids": [3, 6],
        "min_tokens": 5,
        "repetition_penalty": 1.3,
    },
]


@pytest.fixture(scope="module")
def edited(reference):
    """(prompt, params, what the book says) of every edit, and of none."""
    cases = []
    for i, edit in enumerate([*EDITS, {}]):
        prompt = [(11 * i + 5 * j + 1) % VOCAB for j in range(3 + i)]
        params = SamplingParams(temperature=0.0, max_tokens=20, **edit)
        cases.append((prompt, params, decode_reference(reference, prompt, params)))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(EDITS)), ids=[str(edit) for edit in EDITS])
def test_edits_of_the_logits(llm, edited, case):
    prompt, params, expected = edited[case]
    assert tokens_of(llm, prompt, params) == [expected]
    plain = SamplingParams(temperature=0.0, max_tokens=20)
    assert tokens_of(llm, prompt, plain) != [expected], "the edit changes nothing here"


@pytest.mark.slow
def test_edits_in_one_batch(llm, chunked, cramped, edited):
    """All of them together, whole, in chunks, with preemption: a row's edits are its own and
    survive recomputing.
    """
    prompts, params, expected = map(list, zip(*edited, strict=True))
    assert tokens_of(llm, prompts, params) == expected
    assert tokens_of(chunked, prompts, params) == expected
    before = cramped.metrics().num_preemptions
    assert tokens_of(cramped, prompts, params) == expected
    assert cramped.metrics().num_preemptions > before + 3


@pytest.mark.slow
def test_edits_one_step_late(checkpoint, edited):
    """Planned before the last token is known on the CPU: penalties and minimum lengths must not lag
    behind.
    """
    prompts, params, expected = map(list, zip(*edited, strict=True))
    for blocks in (1024, 14):
        llm = make_llm(
            checkpoint, async_scheduling=True, num_kv_blocks=blocks, enable_prefix_caching=False
        )
        assert tokens_of(llm, prompts, params) == expected
    assert llm.metrics().num_preemptions > 3


def test_sampling_one_step_late(checkpoint, llm):
    prompts, params = neighbours(7)
    params = [
        dataclasses.replace(p, seed=i, n=1 + i % 2, logprobs=i % 3) for i, p in enumerate(params)
    ]
    late = make_llm(checkpoint, async_scheduling=True, num_kv_blocks=24)
    for a, b in zip(generate(llm, prompts, params), generate(late, prompts, params), strict=True):
        assert [o.token_ids for o in a.outputs] == [o.token_ids for o in b.outputs]
        assert [len(o.logprobs) for o in b.outputs] == [len(o.token_ids) for o in b.outputs]
    assert late.metrics().num_preemptions > 0


@pytest.mark.slow
def test_a_slot_forgets_the_penalties_of_its_last_sequence(checkpoint, edited):
    llm = make_llm(checkpoint, max_num_seqs=1)
    prompts, params, expected = map(list, zip(*edited, strict=True))
    assert (
        tokens_of(llm, prompts + prompts[::-1], params + params[::-1]) == expected + expected[::-1]
    )


def test_logit_bias_forces_and_forbids(llm):
    assert tokens_of(
        llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=5, logit_bias={17: 100.0})
    ) == [[17] * 5]
    only = {token: -100.0 for token in range(VOCAB) if token not in (4, 5)}
    params = SamplingParams(temperature=4.0, n=20, seed=0, max_tokens=10, logit_bias=only)
    drawn = {t for o in generate(llm, PROMPT, params)[0].outputs for t in o.token_ids}
    assert drawn == {4, 5}


# --- where it ends --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eos_checkpoint(tmp_path_factory, checkpoint):
    """The same weights, with two end-of-sequence tokens in generation_config.json, one of them in
    config.json too.
    """
    import json
    import shutil

    path = tmp_path_factory.mktemp("eos")
    shutil.copytree(checkpoint, path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": 11}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 20]}))
    return path


class TestEnds:
    FORCE_20 = {"logit_bias": {20: 100.0}, "temperature": 0.0}
    FORCE_11 = {"logit_bias": {11: 100.0}, "temperature": 0.0}

    @pytest.fixture(scope="class")
    def eos_llm(self, eos_checkpoint):
        return make_llm(eos_checkpoint)

    @pytest.mark.parametrize("force", [FORCE_20, FORCE_11])
    def test_end_of_sequence(self, eos_llm, force):
        out = generate(eos_llm, PROMPT, SamplingParams(max_tokens=8, **force))[0].outputs[0]
        assert (len(out.token_ids), out.finish_reason, out.stop_reason) == (1, "stop", None)

    def test_ignore_eos(self, eos_llm):
        out = generate(
            eos_llm, PROMPT, SamplingParams(max_tokens=8, ignore_eos=True, **self.FORCE_20)
        )[0].outputs[0]
        assert (out.token_ids, out.finish_reason, out.stop_reason) == ([20] * 8, "length", None)

    def test_min_tokens_holds_back_end_of_sequence(self, eos_llm):
        out = generate(
            eos_llm, PROMPT, SamplingParams(max_tokens=8, min_tokens=3, **self.FORCE_20)
        )[0].outputs[0]
        assert len(out.token_ids) == 4
        assert not {11, 20} & set(out.token_ids[:3])
        assert out.token_ids[3] == 20

    def test_ignore_eos_keeps_stop_tokens(self, eos_llm):
        params = SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=[20], **self.FORCE_20)
        out = generate(eos_llm, PROMPT, params)[0].outputs[0]
        assert (out.token_ids, out.finish_reason, out.stop_reason) == ([20], "stop", 20)

    def test_stop_token_ids(self, llm):
        free = tokens_of(llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=20))[0]
        stop = free[7]
        end = free.index(stop) + 1
        out = generate(
            llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[stop])
        )[0].outputs[0]
        assert (out.token_ids, out.finish_reason, out.stop_reason) == (free[:end], "stop", stop)

    def test_a_stop_token_within_min_tokens_is_never_chosen(self, llm):
        params = SamplingParams(
            n=30, seed=2, temperature=8.0, max_tokens=12, min_tokens=6, stop_token_ids=[1, 2, 3]
        )
        for out in generate(llm, PROMPT, params)[0].outputs:
            assert len(out.token_ids) >= 6
            assert not {1, 2, 3} & set(out.token_ids[:6])

    def test_stop_tokens_in_the_prompt_do_not_count(self, llm):
        params = SamplingParams(
            temperature=0.0, max_tokens=3, logit_bias={5: 100.0}, stop_token_ids=[PROMPT[0]]
        )
        assert generate(llm, PROMPT, params)[0].outputs[0].finish_reason == "length"

    @pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 16])
    def test_max_tokens(self, llm, max_tokens):
        out = generate(llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=max_tokens))[
            0
        ].outputs[0]
        assert (len(out.token_ids), out.finish_reason, out.stop_reason) == (
            max_tokens,
            "length",
            None,
        )

    def test_without_max_tokens_the_model_length_ends_it(self, checkpoint):
        llm = make_llm(checkpoint, max_model_len=20)
        out = generate(llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=None))[0].outputs[0]
        assert (len(out.token_ids), out.finish_reason) == (20 - len(PROMPT), "length")

    def test_without_max_tokens_the_pool_ends_it(self, checkpoint):
        llm = make_llm(checkpoint, num_kv_blocks=3)
        out = generate(llm, PROMPT, SamplingParams(temperature=0.0, max_tokens=None))[0].outputs[0]
        assert (len(out.token_ids), out.finish_reason) == (3 * 4 + 1 - len(PROMPT), "length")


# --- log-probabilities ----------------------------------------------------------------------------


def check_logprobs(found: dict, logprobs: torch.Tensor, token: int, k: int) -> None:
    """One position's dict against log_softmax of transformers' logits."""
    assert token in found
    ranks = {entry.rank for t, entry in found.items() if t != token}
    assert set(range(1, k + 1)) <= {entry.rank for entry in found.values()}
    assert len(found) in ((k, k + 1) if k else (1,))
    assert max(ranks, default=0) <= k
    for t, entry in found.items():
        assert entry.logprob == pytest.approx(float(logprobs[t]), abs=2e-4)
        assert entry.rank == int((logprobs > logprobs[t]).sum()) + 1
        assert entry.decoded_token is None  # there is no tokenizer here


@pytest.mark.parametrize("k", [0, 1, 5, MAX_LOGPROBS])
def test_logprobs(llm, reference, k):
    params = SamplingParams(
        temperature=5.0, top_k=40, seed=4, max_tokens=10, logprobs=k, frequency_penalty=0.5
    )
    out = generate(llm, PROMPT, params)[0].outputs[0]
    logprobs = reference.logits([*PROMPT, *out.token_ids]).log_softmax(-1)[len(PROMPT) - 1 :]
    assert len(out.logprobs) == len(out.token_ids) == 10
    for found, row, token in zip(out.logprobs, logprobs, out.token_ids, strict=False):
        check_logprobs(found, row, token, k)
    total = sum(float(row[token]) for row, token in zip(logprobs, out.token_ids, strict=False))
    assert out.cumulative_logprob == pytest.approx(total, abs=1e-3)
    assert max(found[t].rank for found, t in zip(out.logprobs, out.token_ids, strict=True)) > 1


def test_logprobs_of_another_request_change_nothing(llm):
    plain, asking = SAMPLED, dataclasses.replace(SAMPLED, logprobs=3)
    outputs = generate(llm, [PROMPT, PROMPT], [plain, asking])
    assert outputs[0].outputs[0].logprobs is None
    assert outputs[0].outputs[0].cumulative_logprob is None
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_each_request_gets_as_many_logprobs_as_it_asked_for(llm):
    asked = [2, None, 0, 7]
    outputs = generate(
        llm,
        [PROMPT] * 4,
        [SamplingParams(temperature=0.0, max_tokens=3, logprobs=k) for k in asked],
    )
    assert [o.outputs[0].logprobs and {len(d) for d in o.outputs[0].logprobs} for o in outputs] == [
        {2},
        None,
        {1},
        {7},
    ]


def test_logprobs_after_preemption(llm, cramped):
    params = dataclasses.replace(SAMPLED, logprobs=2)
    alone = generate(llm, PROMPT, params)[0].outputs[0]
    before = cramped.metrics().num_preemptions
    for output in generate(cramped, [PROMPT] * 4, params):
        out = output.outputs[0]
        assert out.token_ids == alone.token_ids
        assert [list(d) for d in out.logprobs] == [list(d) for d in alone.logprobs]
        assert out.cumulative_logprob == pytest.approx(alone.cumulative_logprob, abs=1e-3)
    assert cramped.metrics().num_preemptions > before


@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("engine", ["llm", "chunked", "cramped"])
def test_prompt_logprobs(request, reference, engine, k):
    llm = request.getfixturevalue(engine)
    prompts = [PROMPT, [1], list(range(30)), [9, 9, 9]]
    params = SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=k)
    for prompt, output in zip(prompts, generate(llm, prompts, params), strict=True):
        found = output.prompt_logprobs
        assert len(found) == len(prompt)
        assert found[0] is None
        logprobs = reference.logits(prompt).log_softmax(-1)
        for position in range(1, len(prompt)):
            check_logprobs(found[position], logprobs[position - 1], prompt[position], k)


def test_prompt_logprobs_take_no_prefix_hit(llm, reference):
    prompt = [(5 * i + 1) % VOCAB for i in range(24)]
    plain = SamplingParams(temperature=0.0, max_tokens=4)
    asking = dataclasses.replace(plain, prompt_logprobs=2)
    first = generate(llm, prompt, plain)[0]
    hits = llm.metrics().prefix_cache_hits
    second = generate(llm, prompt, asking)[0]
    assert second.num_cached_tokens == 0
    assert llm.metrics().prefix_cache_hits == hits
    assert None not in second.prompt_logprobs[1:]
    third = generate(llm, prompt, plain)[0]
    assert third.num_cached_tokens == 20
    assert llm.metrics().prefix_cache_hits == hits + 20
    assert first.outputs[0].token_ids == second.outputs[0].token_ids == third.outputs[0].token_ids
    assert first.prompt_logprobs is None


def test_prompt_logprobs_of_a_long_prompt_come_in_parts(checkpoint, reference, monkeypatch):
    """More rows than the runner turns into logits at a time."""
    from minivllm.engine import model_runner

    monkeypatch.setattr(model_runner, "LOGIT_ROWS", 7)
    prompt = [(11 * i + 3) % VOCAB for i in range(40)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    found = generate(make_llm(checkpoint), prompt, params)[0].prompt_logprobs
    logprobs = reference.logits(prompt).log_softmax(-1)
    for position in range(1, 40):
        check_logprobs(found[position], logprobs[position - 1], prompt[position], 1)


def test_prompt_logprobs_with_several_completions(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=3, prompt_logprobs=1, logprobs=1)
    output = generate(llm, list(range(20, 40)), params)[0]
    assert len(output.prompt_logprobs) == 20
    assert None not in output.prompt_logprobs[1:]
    assert [len(o.logprobs) for o in output.outputs] == [3, 3, 3]


# --- what is refused ------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD_VALUES = {
    "n": [0, -1, 1.0, True, "2", None],
    "temperature": [-0.1, NAN, INF, "1", None, True],
    "top_k": [-2, 1.5, True, "5", None],
    "top_p": [0.0, -0.1, 1.01, NAN, None, "0.9"],
    "min_p": [-0.1, 1.01, NAN, None, "0"],
    "seed": [-1, 1.5, True, "7"],
    "stop": ["", ["a", ""], [1], [None]],
    "stop_token_ids": [[-1], [1.5], ["a"], [True], [None]],
    "min_tokens": [-1, 1.5, True, None],
    "max_tokens": [0, -5, 2.0, True, "3"],
    "presence_penalty": [-2.1, 2.1, NAN, None, "1"],
    "frequency_penalty": [-2.1, 2.1, INF, None, "1"],
    "repetition_penalty": [0.0, -1.0, 2.1, NAN, None, "1"],
    "logprobs": [-2, 1.0, True, "1"],
    "prompt_logprobs": [-2, 1.0, True, "1"],
    "logit_bias": [
        {-1: 1.0},
        {1.5: 1.0},
        {"a": 1.0},
        {True: 1.0},
        {1: 101.0},
        {1: NAN},
        {1: None},
        {1: "x"},
    ],
    "allowed_token_ids": [[], [-1], [1.5], ["a"], [True], [None]],
    "bad_words": ["", ["a", ""], [1], [None]],
    "truncate_prompt_tokens": [0, -2, 1.5, True, "3"],
}
#: Of the wrong type altogether.
WRONG_TYPES = {
    "stop": [5, {1: 2}, {"a"}, iter(["a"]), b"a", np.array(["a"])[0:1].reshape(1, 1)],
    "stop_token_ids": [5, "12", b"12", {1}, iter([1])],
    "allowed_token_ids": [5, "12", b"12", {1}, iter([1])],
    "bad_words": [5, {"a"}, iter(["a"]), b"a"],
    "logit_bias": [[1, 2], 5],
    "structured_outputs": [{"regex": "a"}, "a"],
    "ignore_eos": ["yes", None, 1],
    "detokenize": ["yes", None, 0],
    "skip_special_tokens": ["yes", None],
    "spaces_between_special_tokens": ["yes", None],
    "include_stop_str_in_output": ["yes", None],
    "output_kind": ["delta", None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values]
)
def test_bad_values_are_refused(name, value):
    with pytest.raises(SamplingParamsError, match=name.removesuffix("s")):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values]
)
def test_wrong_types_are_refused(name, value):
    with pytest.raises(SamplingParamsError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "params",
    [
        {"n": 1, "temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0, "seed": 0},
        {"max_tokens": None, "min_tokens": 1000},
        {"max_tokens": 3, "min_tokens": 3},
        {"stop": "x"},
        {"stop": ["x", "yz"]},
        {"stop": ()},
        {"stop_token_ids": []},
        {"logit_bias": {}},
        {"logit_bias": {0: -100, 1: 100}},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 2},
        {"logprobs": 0, "prompt_logprobs": MAX_LOGPROBS},
        {"logprobs": -1, "prompt_logprobs": 10**6},
        {"allowed_token_ids": [3], "bad_words": "word", "truncate_prompt_tokens": -1},
        {"bad_words": []},
        {"output_kind": RequestOutputKind.DELTA},
    ],
    ids=str,
)
def test_values_at_the_limits_are_accepted(params):
    SamplingParams(**params)


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(SamplingParamsError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_params_cannot_be_changed_afterwards():
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 2.0
    with pytest.raises(SamplingParamsError):
        dataclasses.replace(params, temperature=-1.0)


def test_every_field_is_covered_here():
    fields = {field.name for field in dataclasses.fields(SamplingParams) if field.init}
    assert fields == set(BAD_VALUES) | set(WRONG_TYPES)


@pytest.mark.parametrize(
    "params",
    [{"stop_token_ids": [VOCAB]}, {"logit_bias": {VOCAB: 1.0}}, {"allowed_token_ids": [0, VOCAB]}],
    ids=str,
)
def test_tokens_beyond_the_vocabulary_are_refused_by_the_engine(llm, params):
    with pytest.raises(SamplingParamsError, match=str(VOCAB - 1)):
        generate(llm, PROMPT, SamplingParams(**params))


def test_stop_strings_need_a_tokenizer(llm):
    with pytest.raises(TokenizerRequiredError):
        generate(llm, PROMPT, SamplingParams(stop="x"))


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"top_k": 2**31}, id="top_k=2**31"),
        pytest.param({"top_k": 2**70}, id="top_k=2**70"),
        pytest.param({"temperature": 10**400}, id="temperature=10**400"),
        pytest.param({"temperature": 1e39}, id="temperature=1e39"),
        pytest.param({"temperature": 1e-46}, id="temperature=1e-46"),
    ],
)
def test_extreme_values_harm_nobody(checkpoint, params):
    """What fits no float32 or int32 is either refused, or served; and the engine lives on."""
    llm = make_llm(checkpoint)
    neighbour = SamplingParams(temperature=0.0, max_tokens=6)
    expected = tokens_of(llm, PROMPT, neighbour)
    try:
        extreme = SamplingParams(
            seed=1, max_tokens=6, logit_bias={0: 1.0}, min_tokens=2, stop_token_ids=[5], **params
        )
    except SamplingParamsError:
        return
    outputs = tokens_of(llm, [PROMPT, PROMPT], [extreme, neighbour])
    assert len(outputs[0]) >= 2
    assert outputs[1] == expected[0]
    assert tokens_of(llm, PROMPT, neighbour) == expected
