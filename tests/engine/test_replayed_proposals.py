"""Steps with proposals as a CUDA graph runs them: on a CPU what is recorded runs eagerly, in place
of a replay; on a GPU it is recorded.
"""

from __future__ import annotations

import bisect
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.engine.cuda_graphs import NO_PROPOSAL, graph_sizes
from minivllm.engine.speculation import Proposer
from support.checkpoints import TINY, random_prompt, write_checkpoint

K = 3
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), **TINY)


class Eager:
    """Stands for recorded graphs: pads as they do, and runs the step."""

    def __init__(self, runner: Any, step: Any, sizes: list[int], num_proposals: int = 0) -> None:
        self.runner, self.step, self.sizes = runner, step, sizes
        self.num_proposals, self.spare_slot = num_proposals, runner.config.max_num_seqs
        self.memory_bytes = 0

    @torch.inference_mode()
    def replay(self, slots: Any, proposals: Any = ()) -> Any:
        size = self.sizes[bisect.bisect_left(self.sizes, len(slots))]
        padded = torch.tensor([*slots, *[self.spare_slot] * (size - len(slots))])
        inputs = [padded]
        if self.num_proposals:
            none = [NO_PROPOSAL] * self.num_proposals
            inputs.append(torch.tensor([*proposals, *[none] * (size - len(slots))]))
        sampler = self.runner.sampler
        # On a CPU the sampler keeps these in NumPy's arrays only.
        sampler._device_temperature[:-1] = torch.from_numpy(sampler._temperature)
        sampler._device_seed[:-1] = torch.from_numpy(sampler._seed)
        tokens, hidden = self.step(*inputs)
        return tokens[: len(slots)], hidden[: len(slots) * (self.num_proposals + 1)]

    def release(self) -> None:
        """There is nothing to destroy."""


class Knows(Proposer):
    """Proposes what it knows of the texts, and spoils some of it. style: "right", "wrong" or
    "partly".
    """

    def __init__(self, texts: dict[tuple[int, ...], list[int]], style: str, vocab: int) -> None:
        self.texts, self.style, self.vocab = texts, style, vocab
        self.random = random.Random(style)

    def propose(self, sequences: Any, num_tokens: Any) -> list[list[int]]:
        found = []
        for seq, count in zip(sequences, num_tokens, strict=True):
            known = seq.num_prompt_tokens
            text = self.texts[tuple(seq.token_ids[:known])]
            guess = text[seq.num_tokens - known :][:count]
            guess = guess[: self.random.choice([count, count, count, 1, 0])]
            wrong = [(token + 1) % self.vocab for token in guess]
            cut = {"right": len(guess), "wrong": 0}.get(
                self.style, self.random.randint(0, len(guess))
            )
            found.append(guess[:cut] + wrong[cut:])
        return found


@contextmanager
def engine(path: Path, device: str, graphs: bool = True, **options: Any) -> Iterator[LLM]:
    options = {
        "num_kv_blocks": 40,
        "block_size": 16 if device == "cuda" else 4,
        "max_num_seqs": 5,
        "enforce_eager": not graphs,
        "dtype": "float32",
        **options,
    }
    with LLM(path, device=device, skip_tokenizer_init=True, **options) as llm:
        core = llm.llm_engine.core
        if device == "cpu" and graphs:
            runners = [core.model_runner]
            if core.speculator is not None and hasattr(core.speculator.proposer, "runner"):
                runners.append(core.speculator.proposer.runner)
            for runner in runners:
                sizes = graph_sizes(runner.config.max_num_seqs)
                runner.graphs = Eager(runner, runner._decode_step, sizes)
                if runner is core.model_runner:
                    step = runner._verify_step
                    runner.verifying = Eager(runner, step, graph_sizes(runner._most_verified()), K)
        yield llm


def count_replays(runner: Any) -> Counter:
    """How often each kind of graph is replayed from now on."""
    met: Counter = Counter()

    def watch(name: str, graphs: Any) -> None:
        replay = graphs.replay

        def counted(slots: Any, *proposals: Any) -> Any:
            met[name] += 1
            met["with fewer proposals"] += any(
                NO_PROPOSAL in row for row in proposals and proposals[0]
            )
            met["padded"] += len(slots) not in graphs.sizes
            return replay(slots, *proposals)

        graphs.replay = counted

    for name, graphs in (("decode", runner.graphs), ("verify", runner.verifying)):
        if graphs is not None:
            watch(name, graphs)
    return met


def requests(with_edits: bool) -> tuple[list[list[int]], list[SamplingParams]]:
    prompts = [random_prompt(3 + 5 * i, i, vocab_size=60) for i in range(8)]
    params = []
    for i in range(len(prompts)):
        edits: dict[str, Any] = {}
        if with_edits:
            edits = [{}, {"top_k": 5}, {"repetition_penalty": 1.3}, {"logprobs": 2}][i % 4]
        temperature = (0.0, 0.7, 1.5)[i % 3]
        params.append(
            SamplingParams(
                temperature=temperature, seed=i, max_tokens=12 + i, ignore_eos=True, **edits
            )
        )
    return prompts, params


def texts(llm: LLM, with_edits: bool) -> tuple[list[list[int]], list[Any]]:
    """The tokens of each request, and its logprobs."""
    prompts, params = requests(with_edits)
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [list(o.token_ids) for o in outputs], [o.logprobs for o in outputs]


@pytest.fixture(scope="module")
def expected(path: Path) -> dict[tuple[str, bool], tuple[list[list[int]], list[Any]]]:
    """Device and whether there are edits -> what an engine without speculation writes."""
    found = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        with engine(path, device, graphs=False) as llm:
            for with_edits in (False, True):
                found[device, with_edits] = texts(llm, with_edits)
    return found


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("with_edits", [False, True], ids=["plain", "edits"])
@pytest.mark.parametrize("style", ["right", "wrong", "partly"])
def test_a_replay_changes_no_token(
    path: Path, expected: Any, device: str, style: str, with_edits: bool
) -> None:
    """Steps with 0 to K proposals per sequence replay the graph of K, also padded batches.

    Sequences grow over blocks that are given back, and end in the middle of a step.
    """
    wanted, logprobs = expected[device, with_edits]
    prompts, _ = requests(with_edits)
    known = dict(zip(map(tuple, prompts), wanted, strict=True))
    config = {"num_speculative_tokens": K, "disable_by_batch_size": 5}
    mine = Knows(known, style, vocab=60)
    with engine(path, device, proposer=mine, speculative_config=config) as llm:
        met = count_replays(llm.llm_engine.core.model_runner)
        found = texts(llm, with_edits)
        assert found[0] == wanted
        for mine_of, theirs in zip(found[1], logprobs, strict=True):
            assert (mine_of is None) == (theirs is None)
            for one, other in zip(mine_of or (), theirs or (), strict=True):
                assert {t: x.rank for t, x in one.items()} == {t: x.rank for t, x in other.items()}
        metrics = llm.metrics()
        assert met["verify"] > 8
        assert met["with fewer proposals"] > 2
        assert met["padded"] > 0
        if style == "right":
            assert metrics.num_accepted_tokens == metrics.num_draft_tokens > 30
        elif style == "wrong":
            assert metrics.num_accepted_tokens == 0 < metrics.num_draft_tokens
        else:
            assert 10 < metrics.num_accepted_tokens < metrics.num_draft_tokens


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_draft_replays_its_steps(path: Path, expected: Any, device: str) -> None:
    """A draft that is the model is always right, so its replays compute what steps compute."""
    config = {"model": str(path), "num_speculative_tokens": K, "disable_by_batch_size": 5}
    with engine(path, device, speculative_config=config) as llm:
        core = llm.llm_engine.core
        assert core.speculator is not None
        met = count_replays(core.speculator.proposer.runner)
        assert texts(llm, False)[0] == expected[device, False][0]
        metrics = llm.metrics()
        assert metrics.num_accepted_tokens == metrics.num_draft_tokens > 50
        # All but the steps that take in prompts: those of each sequence, at the least.
        assert met["decode"] > 30


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_verified_step_leaves_the_rest_of_the_cache_alone(path: Path, device: str) -> None:
    """Padding writes nowhere: what a replay writes is one place for each token that there is."""
    config = {"num_speculative_tokens": K}
    idle = Knows({}, "right", 60)
    idle.propose = lambda sequences, num_tokens: [[] for _ in sequences]  # type: ignore[method-assign]
    with engine(path, device, proposer=idle, speculative_config=config) as llm:
        core = llm.llm_engine.core
        for i in range(3):
            params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
            llm.llm_engine.add_request(random_prompt(6, i, vocab_size=60), params, str(i))
        for _ in range(3):
            llm.llm_engine.step()
        runner = core.model_runner
        before = [tensor.clone() for pair in runner.kv_caches for tensor in pair]
        for seq, count in zip(core.scheduler.running, (0, 1, K), strict=True):
            core.scheduler.propose(seq, [7] * count)
        met = count_replays(runner)
        llm.llm_engine.step()
        assert met["verify"] == 1
        for old, new in zip(before, (t for pair in runner.kv_caches for t in pair), strict=True):
            # [blocks, heads, block_size, dim] -> one flag for each place of a token.
            places = (old != new).any(dim=3).any(dim=1).sum()
            assert places == 1 + 2 + K + 1
