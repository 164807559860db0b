"""The engine's core: sequences of token ids in, new token ids out.

The core plans steps, runs them and returns their results. It knows no text and no callers. For each
sequence, `step` returns the new tokens and, at the end, a finish reason; the driver (`LLMEngine`)
keeps these results. So the core is disposable: `restart` builds queues, slots and blocks anew from
given sequences, wherever the step before was interrupted.

With tensor_parallel_size > 1 every rank runs such a core on its share of the model; see
parallel/launch.py. Taught in notebooks/07_engine.ipynb.
"""

from __future__ import annotations

import logging
import time
import weakref
from array import array
from collections import abc, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from minivllm.config import EngineConfig, ModelConfig, ResolvedConfig, SpeculativeConfig
from minivllm.engine.batch import build_batch
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.collector import calm_collector
from minivllm.engine.draft_model import DraftModel, check_vocabulary, draft_config, draft_path
from minivllm.engine.model_runner import ModelRunner, StepResult
from minivllm.engine.sampler import TokenLogprobs
from minivllm.engine.scheduler import Scheduler, SchedulerBase
from minivllm.engine.sequence import ScheduledBatch, ScheduledSequence, Sequence
from minivllm.engine.speculation import NgramProposer, Proposer, Speculator
from minivllm.engine.trace import StepRecord, Trace, label, new_trace, record_step
from minivllm.errors import ConfigError, SchedulerStalledError, UnsupportedFeatureError
from minivllm.kernels import Kernels
from minivllm.kernels.cpu import choose_onednn
from minivllm.kernels.sampling import NOT_A_TOKEN
from minivllm.models.loader import load_config, weight_shapes
from minivllm.parallel.group import SINGLE, TensorParallelGroup
from minivllm.parallel.launch import EngineRanks, pick_device
from minivllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePieces:
    """The parts of an engine. A caller may replace each of them by a part of their own.

    kernels: None chooses the kernels by the backend. model_cls: None takes the class that the
    registry has for the checkpoint's architecture.
    """

    kernels: Kernels | None = None
    block_manager_cls: Callable[..., BlockManager] = BlockManager
    scheduler_cls: Callable[..., SchedulerBase] = Scheduler
    model_cls: Callable[..., Any] | None = None
    build_batch: Callable[..., Any] = build_batch
    #: None: the one that speculative_config names, if any.
    proposer: Proposer | None = None


@dataclass(eq=False, slots=True)
class SequenceOutput:
    """The result of a step for one sequence: new tokens, and perhaps its end.

    Valid until the next step, which uses the object again.
    """

    seq_id: int
    token_ids: abc.Sequence[int]
    #: "stop", "length", or "error" (the model's logits were not finite).
    finish_reason: str | None = None
    #: The request's stop token that ended the sequence; of an error, why the grammar failed.
    stop_reason: str | int | None = None
    #: Logprobs of the whole step. Those of token_ids[i] stand in row `row + i`.
    logprobs: TokenLogprobs | None = None
    row: int = 0
    #: The proposals that the step has verified for the sequence, and the right ones among them.
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(eq=False)
class StepOutput:
    """The results of a step. All lists may be empty."""

    #: When the planning of the step began, in seconds of time.perf_counter.
    start_time: float
    #: (seq_id, number of tokens from the prefix cache).
    admitted: list[tuple[int, int]] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    #: (seq_id, position of the first token, logprobs of the prompt's tokens from that position on).
    prompt_logprobs: list[tuple[int, int, TokenLogprobs]] = field(default_factory=list)


def choose_kernels(
    config: ResolvedConfig, model_config: ModelConfig, group: TensorParallelGroup = SINGLE
) -> Kernels:
    """The fastest kernels for a config. Every rank of the group gets the same choice.

    What is fast on a CPU is measured, and rank 0 decides for all: each rank samples for itself, so
    the ranks' logits must be equal to the last bit.
    """
    if config.attention_backend == "triton":
        return Kernels.triton()
    if torch.device(config.device).type != "cpu":
        return Kernels.reference()
    shapes = sorted(weight_shapes(model_config, group)) if config.dtype == "float32" else []
    mine = choose_onednn(shapes) if group.rank == 0 else frozenset()
    # The choice as bits of a number, which is what ranks can exchange at any time.
    chosen = group.exchange(sum((shape in mine) << i for i, shape in enumerate(shapes)))[0]
    return Kernels.cpu(frozenset(shape for i, shape in enumerate(shapes) if chosen >> i & 1))


class EngineCore:
    """Scheduler, block manager, model runner, and the connection to the other ranks.

    config: the caller's config, not yet resolved.
    """

    def __init__(
        self,
        model_path: Path,
        config: EngineConfig,
        pieces: EnginePieces,
        group: TensorParallelGroup | None = None,
    ) -> None:
        device = pick_device(config.device)
        if pieces.proposer is not None and config.speculative_config is None:
            config = replace(config, speculative_config=SpeculativeConfig())
        self.model_path, self.model_config = model_path, load_config(model_path)
        self.config = replace(config, device=device).resolve(
            self.model_config, device.partition(":")[0]
        )
        if pieces.kernels is not None and not pieces.kernels.can_be_recorded:
            self.config = replace(self.config, enforce_eager=True)
        self._pieces = pieces
        arguments = (self.config.device, _run_rank, model_path, config, pieces)
        self.ranks = EngineRanks(config.tensor_parallel_size, *arguments, group=group)
        # The finalizer also runs at garbage collection and at the end of the program.
        self.close = weakref.finalize(self, self.ranks.close)
        self.restore_collector = calm_collector(self)
        try:
            kernels = pieces.kernels or choose_kernels(
                self.config, self.model_config, self.ranks.group
            )
            # A draft model first: the KV cache takes what memory is left.
            self.speculator = self._new_speculator()
            self.model_runner = ModelRunner(
                model_path,
                self.model_config,
                self.config,
                kernels,
                model_cls=pieces.model_cls,
                build_batch=pieces.build_batch,
                group=self.ranks.group,
            )
        except BaseException as error:
            self.ranks.give_up(error)
            raise
        self.ranks.release = self.model_runner.release_graphs
        self.config = replace(self.config, num_kv_blocks=self.model_runner.num_kv_blocks)
        self.trace: Trace | None = None
        if config.trace:
            self.trace = new_trace(
                model_path.name, self.config, self.model_runner.kv_bytes_per_token
            )
        self._trace_start = 0.0
        #: Gets the record of each step that has ended, while somebody watches the engine.
        self.watcher: Callable[[StepRecord], None] | None = None
        # A running hash of every token so far.
        self._token_hash = xxhash.xxh3_64()
        # The number of steps that may still run when the next one is planned.
        self._depth = int(self.config.async_scheduling)
        self.peak_used_kv_blocks = 0
        self.scheduler = self._new_scheduler()
        self._check_takes_proposals()
        self._sequences: dict[int, Sequence] = {}  # unfinished sequences
        self._in_flight: deque[tuple[ScheduledBatch, StepResult, StepRecord | None]] = deque()
        #: The objects of `StepOutput.outputs`, used again in every step: with some hundred new
        #: objects per step, Python's garbage collector runs a hundred times as often.
        self._spare_outputs: list[SequenceOutput] = []
        # The record of the step whose results came last.
        self._last_record: StepRecord | None = None

    # --- sequences --------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. The caller has checked that it can be served."""
        self._sequences[seq.seq_id] = seq
        if seq.params.structured_outputs is not None:
            # In the background, while the sequence waits.
            self.model_runner.grammars.begin(seq.params.structured_outputs)
        self.scheduler.add(seq)
        if self.ranks.were_started_here:
            self.ranks.mirror("add_described", _describe(seq))

    def add_described(self, description: dict[str, Any]) -> None:
        """`add` on another rank, from the description that rank 0 has sent."""
        self.add(_from_description(description))

    def finish(self, seq_ids: Iterable[int], reason: str, stop_reason: str | None = None) -> None:
        """End sequences now, in whatever state they are, and free their blocks and slots.

        Sequences that have finished already are left alone.
        """
        for seq_id in seq_ids:
            seq = self._sequences.pop(seq_id, None)
            if seq is not None and not seq.is_finished:
                self.scheduler.finish(seq, reason, stop_reason)
                if self.speculator is not None:
                    self.speculator.forget(seq_id)
                self.ranks.mirror("finish", [seq_id], reason, stop_reason)
                if reason == "stop" and self._last_record is not None:
                    self._last_record.finished.append(label(seq))

    def reset_prefix_cache(self) -> bool:
        """Forget the content of all blocks. Returns False, and does nothing, if sequences exist."""
        manager = self.scheduler.block_manager
        if not hasattr(manager, "reset_prefix_cache"):
            raise UnsupportedFeatureError(
                f"{type(manager).__name__} has no method reset_prefix_cache; write one."
            )
        if self._sequences:
            logger.warning(
                "The prefix cache stays: %d sequences are unfinished.", len(self._sequences)
            )
            return False
        manager.reset_prefix_cache()
        self.ranks.mirror("reset_prefix_cache")
        return True

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Forget queues, slots, blocks and steps in flight, and start again with these sequences.

        The sequences may have output already; its keys and values are computed again. The content
        of the prefix cache is forgotten. The other ranks cannot follow, because their state is
        unknown: with other ranks, the engine ends.
        """
        if self.ranks.group.size > 1:
            self.ranks.close("A call was interrupted, and this ended the engine's ranks.")
        scheduler = self._new_scheduler()
        scheduler.stats = self.scheduler.stats
        self.model_runner.forget_sequences()
        if self.speculator is not None:
            self.speculator.restart()
        self._in_flight.clear()
        self._sequences = {seq.seq_id: seq for seq in sequences}
        for seq in self._sequences.values():
            scheduler.add(seq)
        self.scheduler = scheduler

    @property
    def num_used_kv_blocks(self) -> int:
        return self.config.num_kv_blocks - self.scheduler.block_manager.num_free_blocks

    # --- stepping ---------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Plan and start one step, and return the results of one step.

        The results are those of the planned step, or, with async scheduling, of the step before it.
        """
        output = StepOutput(time.perf_counter())
        try:
            self.ranks.agree(self, self._state)
            if self.speculator is not None:
                self.speculator.propose(self.scheduler)
            batch = self.scheduler.schedule()
            if batch:
                self._launch(batch, output)
            elif self._sequences and not self._in_flight:
                waiting = len({seq.request_id for seq in self._sequences.values()})
                raise SchedulerStalledError(
                    f"Nothing was planned while {waiting} requests are unfinished."
                )
            # With async scheduling, the results of the previous step are processed while this step
            # runs. Otherwise the results of this step are processed.
            while len(self._in_flight) > (self._depth if batch else 0):
                self._apply(*self._in_flight.popleft(), output)
        except BaseException as error:
            self.ranks.give_up(error)
            raise
        return output

    def _launch(self, batch: ScheduledBatch, output: StepOutput) -> None:
        """Start a step that has just been planned."""
        self.peak_used_kv_blocks = max(self.peak_used_kv_blocks, self.num_used_kv_blocks)
        is_recorded = self.trace is not None or self.watcher is not None
        record = self._record(batch, output.start_time) if is_recorded else None
        output.admitted = [(seq.seq_id, seq.num_cached_tokens) for seq in batch.admitted]
        self._in_flight.append((batch, self.model_runner.execute(batch), record))

    def _apply(
        self,
        batch: ScheduledBatch,
        result: StepResult,
        record: StepRecord | None,
        output: StepOutput,
    ) -> None:
        """Pass the results of a step to the scheduler and to `output`."""
        self.ranks.group.wait_for(result.arrived)
        token_ids = result.wait()
        self.ranks.group.check()
        # The same tokens as in token_ids, in the order of the runner's rows.
        flat = result.token_ids.numpy()
        self._token_hash.update(flat.tobytes())
        has_failed = bool((flat == NOT_A_TOKEN).any())
        failed = _take_out_failed(batch, token_ids) if has_failed else []
        row_of = {}
        if result.logprobs is not None:
            items = map(id, batch.sampled)
            row_of = dict(zip(items, result.first_rows(), strict=True))
        accepted = self.scheduler.update(batch, token_ids)
        self._end_failed(failed)
        used = len(output.outputs)
        while len(self._spare_outputs) < used + len(accepted):
            self._spare_outputs.append(SequenceOutput(0, []))
        outputs = self._spare_outputs[used : used + len(accepted)]
        logprobs = result.logprobs
        for found, item in zip(outputs, accepted, strict=True):
            seq = item.sequence
            found.seq_id, found.token_ids = seq.seq_id, item.new_token_ids
            found.finish_reason, found.stop_reason = seq.finish_reason, seq.stop_reason
            found.logprobs, found.row = logprobs, row_of.get(id(item), 0) if row_of else 0
            if found.finish_reason is not None:
                self._sequences.pop(seq.seq_id, None)
        if self.speculator is not None:
            self._note_proposals(self.speculator, accepted, outputs)
        output.outputs += outputs
        for item, logprobs in result.prompt_logprobs:
            output.prompt_logprobs.append((item.sequence.seq_id, item.start + 1, logprobs))
        if record is not None:
            record.duration = time.perf_counter() - self._trace_start - record.start_time
            record.new_token_ids = {label(i.sequence): list(i.new_token_ids) for i in accepted}
            record.num_accepted = {
                label(i.sequence): i.num_accepted for i in accepted if i.proposed_token_ids
            }
            record.finished = [label(i.sequence) for i in accepted if i.sequence.is_finished]
            self._last_record = record
            if self.watcher is not None:
                self.watcher(record)

    def _note_proposals(
        self,
        speculator: Speculator,
        items: list[ScheduledSequence],
        outputs: list[SequenceOutput],
    ) -> None:
        """Report how the proposals of a step have fared, and have the speculator learn from it."""
        speculator.note(items)
        for found, item in zip(outputs, items, strict=True):
            found.num_draft_tokens = len(item.proposed_token_ids)
            found.num_accepted_tokens = item.num_accepted
            if found.finish_reason is not None:
                speculator.forget(found.seq_id)

    def _end_failed(self, failed: list[Sequence]) -> None:
        """End sequences whose logits were not finite, and reset the prefix cache.

        Cached keys and values may be not finite either.
        """
        for seq in failed:
            # If a stop token has ended the sequence already, the failure came after its last token.
            if not seq.is_finished:
                self.scheduler.finish(seq, "error", seq.failure)
        if any(seq.failure is None for seq in failed):
            self.scheduler.block_manager.reset_prefix_cache()

    def _state(self) -> int:
        """Hash the tokens so far and everything that the next plan depends on.

        The hash is the same on every rank that has the same state.
        """
        state, scheduler = self._token_hash.copy(), self.scheduler
        plan = [seq.seq_id for seq in (*scheduler.running, *scheduler.waiting)]
        if scheduler.has_proposals:
            plan += [t for seq in scheduler.running for t in (seq.seq_id, *seq.proposed_token_ids)]
        state.update(array("q", [*plan, scheduler.block_manager.num_free_blocks]).tobytes())
        return state.intdigest() >> 1

    def _new_speculator(self) -> Speculator | None:
        """What proposes tokens, as the config and the caller's pieces say; None if nothing does."""
        wanted, mine, group = (
            self.config.speculative_config,
            self._pieces.proposer,
            self.ranks.group,
        )
        if wanted is None:
            return None
        if (wanted.method is None) == (mine is None):
            raise ConfigError(
                "speculative_config needs a method, 'ngram' or 'draft_model'."
                if mine is None
                else f"speculative_config has method={wanted.method!r}, and there is a proposer,"
                " too; leave one of them out."
            )
        # The other ranks get the proposals of rank 0.
        proposer = mine
        if group.rank:
            proposer = None
        elif wanted.method == "ngram":
            proposer = NgramProposer(wanted.prompt_lookup_max or 1, wanted.prompt_lookup_min or 1)
        elif wanted.method == "draft_model":
            proposer = self._load_draft(wanted)
        return Speculator(proposer, wanted, self.model_config.vocab_size, group)

    def _check_takes_proposals(self) -> None:
        """Raise `ConfigError` if proposals would be ignored."""
        manager = self.scheduler.block_manager
        if self.speculator is None or hasattr(manager, "trim"):
            return
        self.close()
        self.speculator.release()
        self.model_runner.release()
        raise ConfigError(
            f"{type(manager).__name__} has no method `trim`, which gives back the blocks of"
            " rejected proposals: write one, or leave speculative_config out."
        )

    def _load_draft(self, wanted: SpeculativeConfig) -> DraftModel:
        path = draft_path(wanted.model or "")
        model = load_config(path)
        names_tokens = not self.config.skip_tokenizer_init
        check_vocabulary(path, model, self.model_path, self.model_config, names_tokens)
        num_seqs = min(self.config.max_num_seqs, wanted.disable_by_batch_size or 1)
        config = draft_config(self.config, model, num_seqs)
        return DraftModel(
            path, model, config, self._pieces.kernels or choose_kernels(config, model)
        )

    def _new_scheduler(self) -> SchedulerBase:
        config, pieces = self.config, self._pieces
        manager = pieces.block_manager_cls(
            config.num_kv_blocks, config.block_size, config.enable_prefix_caching
        )
        return pieces.scheduler_cls(manager, config.max_num_seqs, config.max_num_batched_tokens)

    # --- trace ------------------------------------------------------------------------------------

    def _record(self, batch: ScheduledBatch, now: float) -> StepRecord:
        """Record a step that has just been planned, in the trace if there is one."""
        steps = [] if self.trace is None else self.trace.steps
        if self.trace is not None and not steps:
            self._trace_start = now
        record = record_step(len(steps), batch, self.scheduler, now - self._trace_start)
        steps.append(record)
        return record


def _take_out_failed(batch: ScheduledBatch, token_ids: list[list[int]]) -> list[Sequence]:
    """Remove `NOT_A_TOKEN` from a step's results and return the sequences that had it.

    `NOT_A_TOKEN` is always the last token of its sequence.
    """
    failed = []
    for item, tokens in zip(batch.sampled, token_ids, strict=True):
        if tokens[-1] == NOT_A_TOKEN:
            tokens.pop()
            failed.append(item.sequence)
    return failed


def _describe(seq: Sequence) -> dict[str, Any]:
    """Describe a new sequence in JSON's types, for the other ranks."""
    names = ("seq_id", "token_ids", "max_num_tokens", "seed", "bad_words", "request_id", "index")
    return {
        **{name: getattr(seq, name) for name in names},
        "num_prompt_tokens": seq.num_prompt_tokens,
        "stop_ids": sorted(seq.stop_ids),
        "extra_keys": seq.extra_keys,
        "params": seq.params.to_dict(),
    }


def _from_description(description: dict[str, Any]) -> Sequence:
    read = {
        "params": SamplingParams.from_dict(description["params"]),
        "stop_ids": frozenset(description["stop_ids"]),
        "bad_words": tuple(map(tuple, description["bad_words"])),
        "extra_keys": tuple(description["extra_keys"]),
    }
    return Sequence(**{**description, **read})


def _run_rank(
    group: TensorParallelGroup, model_path: Path, config: EngineConfig, pieces: EnginePieces
) -> None:
    """Run the core of a rank that `RankProcesses` has started: one step for each of rank 0's."""
    core = EngineCore(model_path, config, pieces, group=group)
    while True:
        core.step()
