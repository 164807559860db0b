"""Who proposes tokens, how many, and what a draft model keeps; the options, and the metrics.

That texts stay the same is tested in test_proposals.py and in whole/test_parity.py.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minivllm import LLM, SamplingParams
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.config import EngineArgs, EngineConfig, SpeculativeConfig
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.draft_model import check_vocabulary, draft_config
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.speculation import NgramProposer, Pace, Proposer, Speculator
from minivllm.errors import ConfigError, ProposalError
from minivllm.metrics import Counter, Vector
from minivllm.models.loader import load_config
from support.checkpoints import TINY, random_prompt, write_checkpoint
from support.ranks import run_ranks
from support.scheduling import VOCAB, run_many

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), **TINY)


def make(path: Path, **options: Any) -> LLM:
    options = {"num_kv_blocks": 40, "block_size": 4, "max_num_seqs": 4, **options}
    return LLM(path, device="cpu", skip_tokenizer_init=True, **options)


# --- the option -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "eagle"}, "method must be one of ngram, draft_model, got 'eagle'"),
        ({"method": "ngram"}, "give num_speculative_tokens"),
        ({**NGRAM, "num_speculative_tokens": 0}, "num_speculative_tokens must be an integer from"),
        ({**NGRAM, "num_speculative_tokens": "4"}, "num_speculative_tokens must be an integer"),
        ({**NGRAM, "model": "somewhere"}, "method='ngram' takes no model"),
        ({**NGRAM, "prompt_lookup_min": 4, "prompt_lookup_max": 3}, "is above prompt_lookup_max=3"),
        ({**NGRAM, "lookup": 3}, "has no field 'lookup'; its fields are method,"),
        ({"method": "draft_model", "num_speculative_tokens": 3}, "needs a model"),
        ({"model": "x", "num_speculative_tokens": 3, "prompt_lookup_max": 2}, "belong to"),
        ({"num_speculative_tokens": 3, "prompt_lookup_max": 2}, "belong to"),
        ({"num_speculative_tokens": 3}, "needs a method, 'ngram' or 'draft_model'"),
        ({"model": "no/such/place", "num_speculative_tokens": 3}, "No model directory"),
        ("ngram", "must be a dict such as"),
    ],
)
def test_an_option_that_cannot_work(path: Path, given: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(path, speculative_config=given)
    assert said in str(caught.value)


def test_options_of_vllm_are_understood() -> None:
    config = SpeculativeConfig.of(NGRAM)
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == (5, 5)
    config = SpeculativeConfig.of({**NGRAM, "prompt_lookup_max": 4})
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == (4, 4)
    config = SpeculativeConfig.of({"model": "a/b", "num_speculative_tokens": 2})
    assert config.method == "draft_model"
    args = EngineArgs("m", speculative_config=NGRAM)
    assert EngineArgs(**dataclasses.asdict(args)) == args


def test_what_is_decided_at_the_start() -> None:
    model = load_config(BUNDLED_MODEL_PATH)
    config = EngineConfig(speculative_config=SpeculativeConfig.of(NGRAM))
    for device, largest in (("cuda", 64), ("cpu", 8)):
        resolved = config.resolve(model, device)
        assert resolved.async_scheduling is False
        assert resolved.speculative_config is not None
        assert resolved.speculative_config.disable_by_batch_size == largest
    with pytest.raises(ConfigError, match="async_scheduling=True plans a step before"):
        dataclasses.replace(config, async_scheduling=True).resolve(model, "cpu")


def test_a_block_manager_that_cannot_take_blocks_back(path: Path) -> None:
    class Mine(BlockManager):
        trim = property()  # raises AttributeError: it has none

    with pytest.raises(ConfigError, match="Mine has no method `trim`"):
        make(path, speculative_config=NGRAM, block_manager_cls=Mine)


def test_a_draft_must_know_the_same_tokens(path: Path, tmp_path: Path) -> None:
    options = {"speculative_config": {"model": str(path), "num_speculative_tokens": 2}}
    with pytest.raises(ConfigError, match="vocabulary of 64 tokens, and the model bundled one of"):
        LLM(device="cpu", **options)
    target, config = BUNDLED_MODEL_PATH, load_config(BUNDLED_MODEL_PATH)
    tokenizer = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))

    def check(compares_files: bool = True) -> None:
        text = json.dumps(tokenizer, indent=1)
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        check_vocabulary(tmp_path, config, target, config, compares_files)

    check()
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    with pytest.raises(ConfigError, match="the same token id means other text"):
        check()
    check(compares_files=False)


# --- proposers ------------------------------------------------------------------------------------


def look_up_by_hand(tokens: list[int], longest: int, shortest: int, count: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        for place in range(len(tokens) - size - 1, -1, -1):
            if tokens[place : place + size] == tokens[-size:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[place + size + i])
                return text[len(tokens) :]
    return []


def test_prompt_lookup() -> None:
    rng, found = random.Random(0), 0
    for _ in range(400):
        tokens = [rng.randrange(4) * 50_000 for _ in range(rng.randint(1, 20))]
        longest = rng.randint(1, 4)
        shortest, count = rng.randint(1, longest), rng.randint(1, 6)
        proposer = NgramProposer(longest, shortest)
        got = proposer.look_up("".join(map(chr, tokens)), count)
        assert got == look_up_by_hand(tokens, longest, shortest, count)
        found += bool(got)
    assert 100 < found < 400


def test_prompt_lookup_follows_a_growing_sequence() -> None:
    proposer, seq = NgramProposer(2, 1), SimpleNamespace(seq_id=3, token_ids=[7, 8, 9, 7])
    assert proposer.propose([seq], [2]) == [[8, 9]]
    seq.token_ids += [8, 1]
    assert proposer.propose([seq], [2]) == [[]]
    seq.token_ids += [9]
    assert proposer.propose([seq], [1]) == [[7]]


def test_the_pace_follows_the_acceptance() -> None:
    pace = Pace()
    assert pace.num_tokens(4, 0.2) == 4
    for _ in range(8):
        pace.note(4, 0)
    counts = [pace.num_tokens(4, 0.2) for _ in range(16)]
    assert counts == [0] * 15 + [1], "one token is tried now and then"
    for _ in range(30):
        pace.note(1, 1)
    assert pace.num_tokens(4, 0.2) == 4
    half = Pace()
    for i in range(40):
        half.note(1, i % 2)
    assert half.num_tokens(8, 0.2) == 2
    assert half.num_tokens(8, NgramProposer.least_chance) == 4, "looking up costs less"


class Fixed(Proposer):
    """Returns what it was made with, and notes what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, []

    def propose(self, sequences: Any, num_tokens: Any) -> Any:
        self.asked.append(([seq.seq_id for seq in sequences], list(num_tokens)))
        return self.answer if callable(self.answer) is False else self.answer(sequences)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([[64]], "Fixed.propose proposed 64; a token id is an integer from 0 to 63"),
        ([[-1]], "proposed -1"),
        ([["a"]], "proposed 'a'"),
        ([[1.5]], "proposed 1.5"),
        ([[1], [2]], "must return one list per sequence, here 1"),
        (None, "must return one list per sequence"),
        ([None], "must return a list of token ids for each sequence, and returned None"),
        ([7], "returned 7 for one"),
        (["7"], "returned '7' for one"),
    ],
)
def test_a_proposer_that_returns_no_proposals(path: Path, answer: Any, said: str) -> None:
    llm = make(path, proposer=Fixed(answer))
    with pytest.raises(ProposalError) as caught:
        llm.generate([1, 2, 3], use_tqdm=False)
    assert said in str(caught.value)


def test_what_a_proposer_is_asked(path: Path) -> None:
    """For decodes only, never beyond the end of a sequence, and not while many run."""
    mine = Fixed(lambda sequences: [[1, 2, 3]] * len(sequences))
    config = {"num_speculative_tokens": 3, "disable_by_batch_size": 2}
    llm = make(path, proposer=mine, speculative_config=config)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    llm.generate([[1, 2], [3]], params, use_tqdm=False)
    # One of the four tokens is known, and a step samples one more than it verifies.
    assert mine.asked[0] == ([0, 1], [2, 2])
    num_asked = len(mine.asked)
    llm.generate([[1, 2], [3], [4]], params, use_tqdm=False)
    assert [len(ids) for ids, _ in mine.asked[num_asked:] if len(ids) > 2] == []
    with pytest.raises(ConfigError, match="there is a proposer, too"):
        make(path, proposer=mine, speculative_config=NGRAM)


def test_a_proposer_without_a_method_of_its_own(path: Path) -> None:
    with pytest.raises(TypeError, match="Proposer proposes nothing: write a `propose` method"):
        make(path, proposer=Proposer()).generate([1, 2, 3], use_tqdm=False)


# --- the draft model ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_draft_that_is_the_model_is_always_right(path: Path) -> None:
    """Its own cache holds what it should, also when blocks and slots are short.

    The pool of the draft is smaller than that of the model, and its steps are chunks.
    """
    config = {"model": str(path), "num_speculative_tokens": 3, "disable_by_batch_size": 2}
    llm = make(path, speculative_config=config, num_kv_blocks=24)
    engine, rng = llm.llm_engine, random.Random(1)
    draft = engine.core.speculator.proposer
    draft.config = dataclasses.replace(draft.config, num_kv_blocks=13, max_num_batched_tokens=6)
    draft.restart()
    shared, num_added, most = random_prompt(9, vocab_size=64), 0, 0
    while num_added < 30 or engine.has_unfinished_requests():
        if num_added < 30 and len(engine.scheduler.running) < rng.choice([1, 2, 2, 3]):
            tail = random_prompt(rng.randint(1, 8), num_added, vocab_size=64)
            params = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=num_added)
            params = params.clone(max_tokens=rng.randint(2, 20), ignore_eos=True, top_k=9)
            prompt = tail if num_added % 3 else [*shared, *tail]
            engine.add_request(prompt, params, str(num_added))
            num_added += 1
        engine.step()
        if rng.random() < 0.03 and engine.scheduler.running:
            engine.abort_request(rng.choice(engine.scheduler.running).request_id)
        engine.scheduler.check()
        followers = draft.followers.values()
        draft.manager.check([f.sequence for f in followers])
        slots = [f.sequence.slot for f in followers]
        assert sorted([*slots, *draft.free_slots]) == [0, 1]
        most = max(most, draft.manager.num_blocks - draft.manager.num_free_blocks)
    metrics = llm.metrics()
    assert metrics.num_accepted_tokens == metrics.num_draft_tokens > 100
    assert most > 10, "its pool was never nearly full"


def test_the_cache_of_a_draft_is_small() -> None:
    model = load_config(BUNDLED_MODEL_PATH)
    config = EngineConfig().resolve(model, "cpu")
    mine = draft_config(config, model, 8)
    # 3 KiB per token and 64 MiB, or less if that is all that 8 sequences can use.
    per_token = 2 * 6 * 2 * 64 * 4
    assert mine.num_kv_blocks == min((64 << 20) // (per_token * 16), 8 * 128)
    shorter = dataclasses.replace(model, max_position_embeddings=32)
    assert draft_config(config, shorter, 8).max_model_len == 32


def test_beyond_the_length_of_the_draft_nothing_is_proposed(path: Path) -> None:
    config = {"model": str(path), "num_speculative_tokens": 3}
    llm = make(path, speculative_config=config)
    draft = llm.llm_engine.core.speculator.proposer
    draft.config = dataclasses.replace(draft.config, max_model_len=12)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompt = [1, 2, 3, 4, 5]
    [output] = llm.generate([prompt], params, use_tqdm=False)
    [expected] = make(path).generate([prompt], params, use_tqdm=False)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert output.metrics is not None
    assert 0 < output.metrics.num_draft_tokens <= 7


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["draft", "random"])
def test_two_ranks_verify_the_proposals_of_rank_0(path: Path, how: str) -> None:
    """Each rank has a proposer of its own that would propose other tokens; rank 0's counts."""
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    prompts = [[1, 2, 3], [4, 5], [6]]
    expected = make(path).generate(prompts, params, use_tqdm=False)

    def serve(group: Any) -> tuple[list[list[int]], int]:
        rng = random.Random(group.rank)
        mine = Fixed(lambda sequences: [[rng.randrange(64), 1] for _ in sequences])
        draft = {"model": str(path), "num_speculative_tokens": 2}
        options: dict[str, Any] = (
            {"speculative_config": draft} if how == "draft" else {"proposer": mine}
        )
        llm = make(path, group=group, tensor_parallel_size=2, **options)
        found = llm.generate(prompts, params, use_tqdm=False)
        assert (len(mine.asked) > 0) == (how == "random" and group.rank == 0)
        return [o.outputs[0].token_ids for o in found], llm.metrics().num_draft_tokens

    one, other = run_ranks(2, serve)
    assert one == other
    assert one[0] == [o.outputs[0].token_ids for o in expected]
    assert one[1] > 20


# --- random histories -----------------------------------------------------------------------------


class LooksUp(Scheduler):
    """A scheduler that asks the package's speculator before each step, as the engine does."""

    def schedule(self) -> Any:
        if not hasattr(self, "speculator"):
            config = SpeculativeConfig.of({**NGRAM, "disable_by_batch_size": 3})
            self.speculator = Speculator(NgramProposer(3, 1), config, VOCAB)
        self.speculator.propose(self)
        return super().schedule()

    def update(self, batch: Any, token_ids: Any) -> Any:
        accepted = super().update(batch, token_ids)
        self.speculator.note(accepted)
        for item in accepted:
            assert 0 <= item.num_accepted <= len(item.proposed_token_ids) <= 3
        return accepted


@pytest.mark.slow
def test_random_histories_with_prompt_lookup() -> None:
    """Pools so small that sequences are preempted, in steps of a few tokens."""
    met = run_many(range(150), False, scheduler_cls=LooksUp)
    assert min(met["right"], met["wrong"]) > 100
    for name in ("preemptions", "hits", "chunks", "mixed"):
        assert met[name] > 50, name


# --- numbers --------------------------------------------------------------------------------------


def test_metrics_under_the_names_of_vllm(path: Path) -> None:
    names = {"vllm:spec_decode_num_" + n for n in ("drafts", "draft_tokens", "accepted_tokens")}
    per_pos = "vllm:spec_decode_num_accepted_tokens_per_pos"
    assert not {m.name for m in make(path).get_metrics()} & {*names, per_pos}
    llm = make(path, speculative_config={"model": str(path), "num_speculative_tokens": 3})
    assert next(m for m in llm.get_metrics() if m.name == per_pos).values == [0, 0, 0]
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    llm.generate([1, 2, 3], params, use_tqdm=False)
    found = {m.name: m for m in llm.get_metrics()}
    # The first token comes with the prompt; then 4, 4.
    assert isinstance(found[per_pos], Vector)
    assert found[per_pos].values == [2, 2, 2]
    assert {n: m.value for n, m in found.items() if n in names and isinstance(m, Counter)} == {
        "vllm:spec_decode_num_drafts": 2,
        "vllm:spec_decode_num_draft_tokens": 6,
        "vllm:spec_decode_num_accepted_tokens": 6,
    }
    before = llm.metrics()
    llm.generate([1, 2, 3], params, use_tqdm=False)
    assert before.num_accepted_tokens_per_pos == [2, 2, 2], "a snapshot changes"


def test_prometheus() -> None:
    pytest.importorskip("prometheus_client")
    from minivllm.engine.llm_engine import EngineMetrics
    from minivllm.serving.metrics import ServerMetrics
    from minivllm.serving.wire import Stats

    def render(config: SpeculativeConfig | None) -> str:
        counters = EngineMetrics(
            num_drafts=4, num_draft_tokens=9, num_accepted_tokens=5, num_accepted_tokens_per_pos=[3]
        )
        llm: Any = SimpleNamespace(
            config=SimpleNamespace(speculative_config=config), engines={"0": Stats(0, 0, counters)}
        )
        return ServerMetrics(llm, "m").render().decode()

    labels = 'engine="0",model_name="m"'
    text = render(SpeculativeConfig.of({**NGRAM, "num_speculative_tokens": 2}))
    assert f"vllm:spec_decode_num_drafts_total{{{labels}}} 4.0" in text
    assert f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} 9.0" in text
    assert f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} 5.0" in text
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert f'{name}{{{labels},position="0"}} 3.0' in text
    assert f'{name}{{{labels},position="1"}} 0.0' in text
    assert "spec_decode" not in render(None)


def test_a_trace_holds_the_proposals(path: Path, tmp_path: Path) -> None:
    from minivllm.engine.trace import Trace
    from minivllm.viz.player.pack import pack
    from minivllm.viz.timeline import is_prompt, num_again

    mine = Fixed(lambda sequences: [[1, 2]] * len(sequences))
    llm = make(path, proposer=mine, trace=True)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    [output] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert llm.trace is not None
    llm.trace.save(tmp_path / "trace.json")
    trace = Trace.load(tmp_path / "trace.json")
    assert trace == llm.trace
    items = [(record, item) for record in trace.steps for item in record.scheduled]
    assert [is_prompt(item) for _, item in items] == [True] + [False] * (len(items) - 1)
    with_guesses = [(r, i) for r, i in items if i.proposed_token_ids]
    assert output.metrics is not None
    assert sum(len(i.proposed_token_ids) for _, i in with_guesses) == (
        output.metrics.num_draft_tokens
    )
    num_right = sum(sum(record.num_accepted.values()) for record in trace.steps)
    assert num_right == output.metrics.num_accepted_tokens < output.metrics.num_draft_tokens
    # The player draws them; wrong ones are struck out.
    guesses = [guess for step in pack(trace)["steps"] for guess in step.get("g", [])]
    assert [guess[1:3] for guess in guesses] == [
        [len(item.proposed_token_ids), record.num_accepted["0/0"]] for record, item in with_guesses
    ]
    # Rejected guesses are computed again, but the tokens in their place are new.
    assert not any(count for step in num_again(trace) for count in step.values())


def test_the_bench_counts_proposals() -> None:
    from minivllm.bench.tables import acceptance_line
    from minivllm.bench.throughput import acceptance
    from minivllm.engine.llm_engine import EngineMetrics

    before = EngineMetrics(
        num_drafts=1, num_draft_tokens=1, num_accepted_tokens=1, num_accepted_tokens_per_pos=[1]
    )
    after = EngineMetrics(
        num_drafts=5, num_draft_tokens=9, num_accepted_tokens=6, num_accepted_tokens_per_pos=[4, 2]
    )
    found = acceptance(after, before)
    assert found == {
        "drafts": 4,
        "proposed": 8,
        "accepted": 5,
        "accepted_per_position": [0.75, 0.5],
    }
    assert "5 of 8 proposed tokens accepted in 4 verifications (per position: 75%, 50%)" in (
        acceptance_line(found)
    )


def test_the_command_line_takes_the_option_as_json() -> None:
    from minivllm.cli.options import engine_options

    text = '{"method": "ngram", "num_speculative_tokens": 4}'
    assert engine_options([f"speculative_config={text}"]) == {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4}
    }
    assert engine_options(["speculative_config=none"]) == {"speculative_config": None}
    for word in ("ngram", "[1]", "{"):
        with pytest.raises(ConfigError, match="a JSON object such as"):
            engine_options([f"speculative_config={word}"])
