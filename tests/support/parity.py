"""The comparison of the engine with transformers: a recorded run, and the one rule to judge it.

`RecordedLLM` is the unchanged engine. Through the engine's own arguments (`kernels`,
`scheduler_cls`) it counts launches and records what the scheduler did. It keeps the logits of every
token, also those of recorded graphs. `assert_same_greedy` compares logits and tokens with those of
transformers on the same weights, in float32.
"""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minivllm import LLM, Kernels, SamplingParams
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.speculation import Proposer
from minivllm.kernels import Fused
from minivllm.kernels.cpu import choose_onednn
from minivllm.models.loader import load_config, weight_shapes
from minivllm.outputs import RequestOutput
from support.checkpoints import (
    MARGIN_FACTOR,
    TransformersReference,
    random_prompt,
    write_checkpoint,
)

# On a GPU, float32 must mean float32: TF32 keeps ten bits of a product's factors.
torch.backends.cuda.matmul.allow_tf32 = False
torch.set_float32_matmul_precision("highest")

#: The largest logit error that counts as rounding, as a share of the logits' standard deviation.
#: Measured: at most 2e-5 on random checkpoints; the weakest of the mutations in test_mutations.py
#: gives 2e-3.
TOLERANCE = 2e-4
#: How many tokens per thousand may differ at all (by the margin rule).
MAX_DIFFERENCES_PER_1000 = 1
NUM_TOKENS = 64
MIN_DISTINCT = 30


class Checkpoint:
    """A random checkpoint, transformers on it, and prompts with varied completions."""

    def __init__(self, path: Path, family: str = "qwen3", **changes: Any) -> None:
        self.path = write_checkpoint(path, family, **changes)
        self.reference = TransformersReference(path, "cuda" if torch.cuda.is_available() else "cpu")
        self._prompts: dict[tuple[int, ...], list[list[int]]] = {}
        self._salts: Counter[tuple[int, ...]] = Counter()

    def prompt(self, length: int, which: int = 0, after: Sequence[int] = ()) -> list[int]:
        """`after`, then `length` random tokens; with another `which`, the first token differs.

        The prompt is chosen so that its completion holds at least MIN_DISTINCT tokens.
        """
        key = (length, *after)
        found = self._prompts.setdefault(key, [])
        while len(found) <= which:
            assert self._salts[key] < 40, (
                "a checkpoint that repeats itself after almost every prompt"
            )
            candidate = [*after, *random_prompt(length, self._salts[key])]
            self._salts[key] += 1
            if len(set(self.reference.greedy(candidate, NUM_TOKENS).token_ids)) >= MIN_DISTINCT:
                found.append(candidate)
        return found[which]

    def prompts(self, *lengths: int) -> list[list[int]]:
        """One prompt per length, all different."""
        return [self.prompt(n, lengths[:i].count(n)) for i, n in enumerate(lengths)]


class ParityError(AssertionError):
    """The engine and transformers disagree by more than rounding."""


@dataclass(frozen=True)
class Completion:
    """One sequence as the engine ran it."""

    prompt: list[int]
    token_ids: list[int]
    #: [len(token_ids), V] float32: row i holds the logits of token i.
    logits: torch.Tensor
    #: The block table when the sequence was last scheduled.
    block_table: list[int]
    num_preemptions: int


def _engines_choice(path: Path | None, attention_backend: str) -> Kernels:
    """The kernels that an engine takes when none are given."""
    if attention_backend == "triton":
        return Kernels.triton()
    if torch.cuda.is_available():
        return Kernels.reference()
    return Kernels.cpu(choose_onednn(weight_shapes(load_config(path or BUNDLED_MODEL_PATH))))


class RecordedLLM(LLM):
    """An `LLM` in float32 that records its run, on a GPU where there is one. Options are LLM's."""

    def __init__(
        self,
        path: Path | None,
        *,
        attention_backend: str = "torch",
        kernels: Kernels | None = None,
        scheduler_cls: type[Scheduler] = Scheduler,
        skip_tokenizer_init: bool = True,
        **options: Any,
    ) -> None:
        #: Calls of each of the fields of `Kernels`; a graph calls them once, when it is recorded.
        self.launches: Counter[str] = Counter()
        self.num_replays = 0
        self.max_batch = 0
        #: Output tokens that sequences had when they were preempted.
        self.outputs_at_preemption: list[int] = []
        self._sequences: list[Any] = []
        self._logits: dict[tuple[int, int], torch.Tensor] = {}
        self._tables: dict[int, list[int]] = {}
        #: The logits of the present step, of the steps whose results the scheduler has not seen
        #: (with the order of their rows), and of each graph.
        self._fresh: torch.Tensor | None = None
        self._in_flight: deque[tuple[torch.Tensor, list[int]]] = deque()
        self._captured: dict[int, torch.Tensor] = {}
        if kernels is None:
            kernels = _engines_choice(path, attention_backend)
        options = {"skip_tokenizer_init": skip_tokenizer_init, "max_num_seqs": 16, **options}
        if options.get("tensor_parallel_size", 1) == 1 or "group" in options:
            options |= {
                "kernels": self._counting(kernels),
                "scheduler_cls": self._recording(scheduler_cls),
            }
        super().__init__(path, dtype="float32", attention_backend=attention_backend, **options)
        # Recording kernels cannot be sent to other ranks; recording here is enough.
        if "kernels" not in options:
            engine = self.llm_engine
            engine.model_runner.sampler.kernels = self._counting(kernels)
            engine.scheduler.__class__ = self._recording(scheduler_cls)
        self._watch(self.llm_engine.model_runner)

    def complete(
        self, prompts: Sequence[Sequence[int]], num_tokens: int = NUM_TOKENS, **params: Any
    ) -> list[Completion]:
        """Greedy completions of all prompts at once, in their order (n of each)."""
        first = len(self._sequences)
        outputs = self.generate(list(prompts), greedy(num_tokens, **params), use_tqdm=False)
        completions = self.completions()[first:]
        self._check_outputs(outputs, completions)
        return completions

    def completions(self) -> list[Completion]:
        """Every sequence so far, in the order of arrival, also unfinished ones."""
        found = []
        for seq in self._sequences:
            token_ids = [t for t in seq.output_token_ids if t >= 0]
            positions = range(seq.num_prompt_tokens, seq.num_prompt_tokens + len(token_ids))
            if any((seq.seq_id, p) not in self._logits for p in positions):
                raise ParityError(f"sequence {seq.seq_id} holds a token that no step sampled")
            rows = [self._logits[seq.seq_id, p] for p in positions]
            found.append(
                Completion(
                    prompt=seq.token_ids[: seq.num_prompt_tokens],
                    token_ids=token_ids,
                    logits=torch.stack(rows) if rows else torch.empty(0),
                    block_table=self._tables.get(seq.seq_id, []),
                    num_preemptions=seq.num_preemptions,
                )
            )
        return found

    def add(self, prompt: Sequence[int], num_tokens: int = NUM_TOKENS, **params: Any) -> str:
        """Add a greedy request to the engine, for a test with its own loop; returns its id."""
        return self.llm_engine.add_request(prompt, greedy(num_tokens, **params))

    def run_one_step_late(self) -> list[Completion]:
        """Run the added requests; launch each step before the last step's results are known."""
        scheduler, runner = self.llm_engine.scheduler, self.llm_engine.model_runner
        waiting = None
        while scheduler.has_unfinished or waiting is not None:
            batch = scheduler.schedule()
            launched = (batch, runner.execute(batch)) if batch else None
            assert launched or waiting, "nothing to compute, and no result to wait for"
            if waiting is not None:
                scheduler.update(waiting[0], waiting[1].wait())
            scheduler.check()
            waiting = launched
        return self.completions()

    # --- recording --------------------------------------------------------------------------------

    def _counting(self, kernels: Kernels) -> Kernels:
        def counted(name: str, function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.launches[name] += 1
                if name == "sample":
                    logits = (args[0] if args else kwargs["logits"]).detach().float().clone()
                    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                        # Every replay overwrites them.
                        self._captured[len(logits)] = logits
                    else:
                        self._fresh = logits
                return function(*args, **kwargs)

            return call

        names = [f.name for f in dataclasses.fields(kernels) if callable(getattr(kernels, f.name))]
        fused = kernels.fused_operations
        if fused is not None:
            fused = Fused(
                counted("qk_norm_rope_store", fused.qk_norm_rope_store),
                counted("merge_attention", fused.merge_attention),
            )
        operations = {name: counted(name, getattr(kernels, name)) for name in names}
        return dataclasses.replace(kernels, **operations, fused=fused)

    def _watch(self, runner: Any) -> None:
        execute = runner.execute
        # A draft records graphs, too, with the same kernels. So with speculation the logits of a
        # replay are computed again, from its hidden states.
        speculates = self.llm_engine.core.speculator is not None
        replayed: list[torch.Tensor] = []
        for graphs in (runner.graphs, runner.verifying) if speculates else ():
            if graphs is not None:
                self._keep_hidden(graphs, replayed)

        def recorded(batch: Any) -> Any:
            self._fresh = None
            result = execute(batch)
            if batch.sampled:
                rows = len(batch.sampled)
                if self._fresh is None:
                    self.num_replays += 1
                if self._fresh is None and speculates:
                    self._fresh = self._logits_of(runner, batch, replayed[-1])
                elif self._fresh is None:
                    self._fresh = self._captured[min(n for n in self._captured if n >= rows)][
                        :rows
                    ].clone()
                self._in_flight.append((self._fresh, result.sampled.order))
            return result

        runner.execute = recorded

    @staticmethod
    def _keep_hidden(graphs: Any, kept: list[torch.Tensor]) -> None:
        replay = graphs.replay

        def keeping(*args: Any) -> Any:
            token_ids, hidden = replay(*args)
            kept[:] = [hidden]
            return token_ids, hidden

        graphs.replay = keeping

    @staticmethod
    @torch.inference_mode()
    def _logits_of(runner: Any, batch: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [R, V] of a replay, without the padding in front of fewer proposals."""
        if batch.has_proposals:
            width = runner.verifying.num_proposals + 1
            ends = range(width, len(hidden) + 1, width)
            counts = [len(item.proposed_token_ids) + 1 for item in batch.items]
            hidden = hidden[
                [row for n, end in zip(counts, ends, strict=True) for row in range(end - n, end)]
            ]
        return runner.model.compute_logits(hidden).float().clone()

    def _recording(self, base: type[Scheduler]) -> type[Scheduler]:
        llm = self

        class RecordingScheduler(base):
            def add(self, seq: Any) -> None:
                llm._sequences.append(seq)
                super().add(seq)

            def schedule(self) -> Any:
                before = {seq.seq_id: seq.num_output_tokens for seq in self.running}
                batch = super().schedule()
                llm.max_batch = max(llm.max_batch, len(batch.items))
                llm.outputs_at_preemption += [before[seq.seq_id] for seq in batch.preempted]
                for item in batch.items:
                    llm._tables[item.sequence.seq_id] = list(item.sequence.block_table)
                return batch

            def update(self, batch: Any, token_ids: Any) -> Any:
                logits, order = llm._in_flight.popleft() if batch.sampled else (None, [])
                logits = None if logits is None else logits.cpu()
                # With k proposals, an item has k + 1 rows.
                row_of, row = {}, 0
                for item in (batch.sampled[place] for place in order):
                    row_of[id(item)], row = row, row + len(item.proposed_token_ids) + 1
                accepted = super().update(batch, token_ids)
                for item in accepted:
                    for number in range(len(item.new_token_ids)):
                        key = item.sequence.seq_id, item.sample_position + number
                        if key in llm._logits:
                            raise ParityError(
                                f"sequence {key[0]}: the token at position {key[1]} was sampled"
                                " twice"
                            )
                        llm._logits[key] = logits[row_of[id(item)] + number]
                return accepted

        return RecordingScheduler

    @staticmethod
    def _check_outputs(outputs: list[RequestOutput], completions: list[Completion]) -> None:
        reported = [(o.prompt_token_ids, c.token_ids) for o in outputs for c in o.outputs]
        recorded = [(c.prompt, c.token_ids) for c in completions]
        if reported != recorded:
            raise ParityError(
                f"The outputs are not what the sequences hold: {reported} and {recorded}"
            )


def greedy(num_tokens: int = NUM_TOKENS, **params: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True, **params}
    )


class Errs(Proposer):
    """Proposes a random number of the reference's tokens, and then a wrong one."""

    def __init__(self, reference: TransformersReference, num_tokens: int = NUM_TOKENS) -> None:
        self.reference, self.num_tokens = reference, num_tokens
        self.vocab_size = reference.model.config.vocab_size
        self.random = random.Random(0)

    def propose(self, sequences: Sequence[Any], num_tokens: Sequence[int]) -> list[list[int]]:
        found = []
        for seq in sequences:
            prompt = seq.token_ids[: seq.num_prompt_tokens]
            text = self.reference.greedy(prompt, self.num_tokens).token_ids
            right = text[seq.num_output_tokens :]
            count = self.random.randint(0, 4)
            wrong = [(token + 1) % self.vocab_size for token in right[count : count + 1]]
            found.append([*right[:count], *wrong])
        return found


@dataclass
class Report:
    """The differences that the margin rule accepted, over many comparisons."""

    num_tokens: int = 0
    max_error: float = 0.0
    differences: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise unless at most one token per thousand differs (of fewer than a thousand, one)."""
        allowed = max(1, self.num_tokens * MAX_DIFFERENCES_PER_1000 // 1000)
        if len(self.differences) > allowed:
            raise ParityError(
                f"{len(self.differences)} of {self.num_tokens} tokens differ: "
                + "; ".join(self.differences)
            )


#: Everything compared in this process; test_parity.py checks it at the end.
REPORT = Report()


def assert_same_greedy(
    reference: TransformersReference,
    completions: Sequence[Completion],
    num_tokens: int = NUM_TOKENS,
    *,
    min_distinct: int = MIN_DISTINCT,
    partial: bool = False,
    report: Report = REPORT,
    tolerance: float = TOLERANCE,
) -> None:
    """Raise `ParityError` unless completions and logits are transformers', up to rounding.

    Logits: each one lies within the tolerance of the reference's at the same position, after the
    same tokens. Tokens: each is the first choice of the reference, or (the margin rule) its two
    best logits lie within 10 x the error measured there. partial: completions may be shorter than
    num_tokens (aborted, or ended by themselves). min_distinct: how many different tokens each of
    the reference's completions must hold; a comparison with few different tokens would prove
    little.
    """
    assert completions, "nothing to compare"
    here = Report()
    for number, completion in enumerate(completions):
        count = len(completion.token_ids)
        if count > num_tokens or (count < num_tokens and not partial):
            raise ParityError(f"completion {number} has {count} tokens, not {num_tokens}")
        expected = reference.greedy(completion.prompt, num_tokens)
        if len(set(expected.token_ids)) < min_distinct:
            raise AssertionError(
                f"a test of little power: {len(set(expected.token_ids))} distinct tokens in an"
                " output"
            )
        if completion.token_ids == expected.token_ids[:count]:
            logits = expected.logits[:count]
        else:
            # The reference's logits after the tokens that the engine chose.
            fed = completion.prompt + completion.token_ids[:-1]
            logits = reference.logits(fed)[len(completion.prompt) - 1 :]
        _compare(
            completion,
            logits,
            f"completion {number} ({len(completion.prompt)} prompt tokens)",
            here,
            tolerance,
        )
    here.check()
    report.num_tokens += here.num_tokens
    report.max_error = max(report.max_error, here.max_error)
    report.differences += here.differences
    for difference in here.differences:
        warnings.warn(f"a tie was decided otherwise: {difference}", stacklevel=2)


def _compare(
    completion: Completion, expected: torch.Tensor, name: str, report: Report, tolerance: float
) -> None:
    """Compare one completion. expected: [steps, V]."""
    if not len(completion.token_ids):
        return
    errors = (completion.logits - expected).abs().amax(-1)
    relative = float(errors.max() / expected.std())
    # NaN is an error, too.
    if not relative <= tolerance:
        step = (
            int((errors > tolerance * expected.std()).nonzero()[0])
            if not errors.isnan().any()
            else "?"
        )
        raise ParityError(
            f"{name}: logits differ by {relative:.1e} of their deviation, first at token {step}"
        )
    report.num_tokens += len(completion.token_ids)
    report.max_error = max(report.max_error, relative)
    top = expected.topk(2, dim=-1)
    for step, token in enumerate(completion.token_ids):
        if token == int(top.indices[step, 0]):
            continue
        margin, error = float(top.values[step, 0] - top.values[step, 1]), float(errors[step])
        what = (
            f"{name}, token {step}: {token} for {int(top.indices[step, 0])}, margin {margin:.1e},"
            f" error {error:.1e}"
        )
        if token != int(top.indices[step, 1]) or margin > MARGIN_FACTOR * error:
            raise ParityError(what)
        report.differences.append(what)


def run_hit_after_miss(llm: RecordedLLM, model: Checkpoint) -> list:
    """Leave the third block of a prompt cached and its first two evicted, then run that prompt.

    The request with prompt_logprobs takes no hits. It computes the first two blocks again (the
    cache keeps the other request's copies) and registers the third, which stays cached longer than
    the others.
    """
    head, tail, last = model.prompt(8), model.prompt(4), model.prompt(2)
    manager = llm.llm_engine.scheduler.block_manager
    llm.complete([[*head, 1]], num_tokens=1)
    llm.complete([[*head, *tail, 1]], num_tokens=1, prompt_logprobs=0)
    llm.complete([model.prompt(75)], num_tokens=2)
    registered = {manager.blocks[i].token_ids for i in manager.hash_to_block.values()}
    assert tuple(tail) in registered
    assert tuple(head[:4]) not in registered
    return llm.complete([head + tail + last], num_tokens=16)
