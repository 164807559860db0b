"""A trace: a record of each step of the engine, for pictures and for later questions.

A trace is plain data, saved as JSON. The engine only appends records; minivllm.viz reads and draws
them. With ``trace=False`` there are no records. Taught in notebooks/11_using_minivllm.ipynb.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from minivllm.config import ResolvedConfig
from minivllm.engine.scheduler import SchedulerBase
from minivllm.engine.sequence import ScheduledBatch, Sequence
from minivllm.errors import MiniVLLMError
from minivllm.files import reason, write_atomically
from minivllm.tokenizer import Detokenizer, Tokenizer

#: Version 2 added the prompts, the new tokens and their texts, version 3 the proposals; files of
#: earlier versions have none.
TRACE_VERSION = 3
#: In bytes. A larger file is not read. 10,000 steps of 256 long sequences take about half of it.
LARGEST_FILE = 1 << 30


class TraceError(MiniVLLMError, ValueError):
    """A trace file cannot be read, or holds no trace. The message names the file."""


@dataclass
class TracedSequence:
    """The part of one sequence in a step."""

    request_id: str
    #: The index of this completion among the request's n completions.
    index: int
    #: "prefill" (of the prompt, or of what preemption threw away) or "decode".
    kind: str
    start: int
    num_new_tokens: int
    #: Whether the step samples a token of this sequence. A chunk before the prompt's end does not.
    samples: bool
    #: Tokens that the prefix cache supplied; set in the step that admits the sequence.
    num_cached_tokens: int = 0
    #: Of speculative decoding: the guesses that the step verifies, the last of its new tokens.
    proposed_token_ids: list[int] = field(default_factory=list)


@dataclass
class StepRecord:
    """The state of the engine after step `step` was planned, and the step's duration."""

    step: int
    start_time: float  # seconds since the trace began
    duration: float  # seconds from planning to results
    scheduled: list[TracedSequence]
    #: "request/index" of running sequences -> block ids.
    block_tables: dict[str, list[int]]
    #: "request/index" -> tokens computed after this step.
    num_computed_tokens: dict[str, int]
    running: list[str]
    waiting: list[str]
    preempted: list[str]
    #: Includes cached blocks: their content is known, their space is free.
    num_free_blocks: int
    cached_blocks: list[int]
    #: Blocks in the prefix cache, including those in use.
    registered_blocks: list[int]
    finished: list[str] = field(default_factory=list)
    #: "request/index" -> the tokens that the step gave it.
    new_token_ids: dict[str, list[int]] = field(default_factory=dict)
    #: "request/index" -> what these tokens add to its text. `add_texts` fills it in.
    texts: dict[str, str] = field(default_factory=dict)
    #: "request/index" -> how many of its proposals were right: the first ones.
    num_accepted: dict[str, int] = field(default_factory=dict)
    #: "request/index" -> the text of its wrong proposals. `add_texts` fills it in.
    rejected_texts: dict[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.scheduled)

    def verified_end(self, item: TracedSequence) -> int:
        """The end of what the step computes of a sequence, without its wrong proposals."""
        end = item.start + item.num_new_tokens - len(item.proposed_token_ids)
        return end + self.num_accepted.get(f"{item.request_id}/{item.index}", 0)


@dataclass
class Trace:
    """The sizes of an engine, and one record per step."""

    model: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_bytes_per_token: int
    #: The longest sequence, prompt included. An engine without pages would reserve this length for
    #: each sequence.
    max_model_len: int
    steps: list[StepRecord] = field(default_factory=list)
    #: request_id -> the text of its prompt, special tokens left out.
    prompts: dict[str, str] = field(default_factory=dict)
    version: int = TRACE_VERSION

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON. Raises OSError, and then keeps the old file at `path`."""
        write_atomically(path, json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def load(path: str | Path) -> "Trace":
        """Read a trace that `save` wrote. Raises `TraceError` for anything else.

        The file may come from an untrusted source, so it is checked completely: every field has its
        type, and every label and block that a record names exists.
        """
        try:
            with Path(path).open("rb") as file:
                too_large = os.fstat(file.fileno()).st_size > LARGEST_FILE
                # The size of a pipe is not known in advance.
                content = b"" if too_large else file.read(LARGEST_FILE + 1)
        except OSError as error:
            raise TraceError(f"The trace {path} cannot be read: {reason(error)}.") from error
        try:
            if too_large or len(content) > LARGEST_FILE:
                raise ValueError(f"it is larger than {LARGEST_FILE >> 20} MiB")
            data = json.loads(content)
            version = data.get("version") if isinstance(data, dict) else None
            if type(version) is not int or not 1 <= version <= TRACE_VERSION:
                raise ValueError(f"it is not of version 1 to {TRACE_VERSION}")
            trace = _as_type({**data, "version": TRACE_VERSION}, Trace, "")
            _require_whole(trace)
        except (ValueError, RecursionError) as error:
            problem = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise TraceError(
                f"{path} holds no trace that this version of minivllm can read ({problem})."
            ) from error
        return trace


def _as_type(value: Any, kind: Any, where: str) -> Any:
    """Convert a JSON value to a field's type. Raises ValueError with the place of a mismatch."""
    if dataclasses.is_dataclass(kind):
        return _as_dataclass(value, kind, where)
    if (
        kind == list[int]
        and type(value) is list
        and set(map(type, value)) <= {int}
        and min(value, default=0) >= 0
    ):
        # Most values of a trace are of this kind.
        return value
    if get_origin(kind) is list and isinstance(value, list):
        return [_as_type(item, get_args(kind)[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {
            key: _as_type(item, get_args(kind)[1], f"{where}.{key}"[:200])
            for key, item in value.items()
        }
    if kind is int and type(value) is int and 0 <= value < 1 << 63:
        return value
    if kind is float and type(value) in (int, float) and math.isfinite(value) and 0 <= value < 1e12:
        return value
    if kind in (bool, str) and type(value) is kind:
        return value
    name = {
        int: "a number from 0",
        float: "a number of seconds from 0",
        bool: "true or false",
        str: "a text",
    }
    raise ValueError(f"{where} should be {name.get(kind) or 'a ' + get_origin(kind).__name__}")


def _as_dataclass(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'all of it'} should be an object")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    if unknown := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{prefix}{unknown[0][:100]} is unknown")
    for name, f in fields.items():
        if (
            name not in value
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ):
            raise ValueError(f"{prefix}{name} is missing")
    return kind(
        **{name: _as_type(item, fields[name].type, prefix + name) for name, item in value.items()}
    )


def _require_whole(trace: Trace) -> None:
    """Raise ValueError if fields contradict each other. Whatever draws a trace relies on this."""
    if not trace.num_blocks or not trace.block_size:
        raise ValueError("num_blocks and block_size should be at least 1")
    for number, record in enumerate(trace.steps):
        tables = record.block_tables
        blocks = [
            *record.cached_blocks,
            *record.registered_blocks,
            *(b for table in tables.values() for b in table),
        ]
        if max(blocks, default=0) >= trace.num_blocks:
            raise ValueError(f"steps[{number}] names block {max(blocks)} of {trace.num_blocks}")
        if not len(record.cached_blocks) <= record.num_free_blocks <= trace.num_blocks:
            raise ValueError(
                f"steps[{number}].num_free_blocks does not fit the other numbers of blocks"
            )
        if lost := set(record.running) - (tables.keys() & record.num_computed_tokens.keys()):
            raise ValueError(f"steps[{number}] lacks the blocks or tokens of {min(lost)[:100]}")
        if any(item.kind not in ("prefill", "decode") for item in record.scheduled):
            raise ValueError(f"steps[{number}].scheduled has a kind other than prefill and decode")


def new_trace(model: str, config: ResolvedConfig, kv_bytes_per_token: int) -> Trace:
    """A trace without steps, of an engine with this config. model: its name."""
    names = ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
    return Trace(
        model,
        config.num_kv_blocks,
        kv_bytes_per_token=kv_bytes_per_token,
        **{name: getattr(config, name) for name in names},
    )


def label(seq: Sequence) -> str:
    """The name of a sequence in a trace."""
    return f"{seq.request_id}/{seq.index}"


def record_step(
    number: int, batch: ScheduledBatch, scheduler: SchedulerBase, start_time: float
) -> StepRecord:
    """Describe a step that has just been planned.

    number: of the step, from 0. start_time: seconds since the trace began.
    """
    manager, running, admitted = scheduler.block_manager, scheduler.running, set(batch.admitted)
    scheduled = []
    for item in batch.items:
        seq, samples = item.sequence, item.sample_position is not None
        kind = "decode" if item.start >= seq.num_prompt_tokens else "prefill"
        num_cached = seq.num_cached_tokens if seq in admitted else 0
        span = (item.start, item.num_new_tokens)
        proposed = list(item.proposed_token_ids)
        scheduled.append(
            TracedSequence(seq.request_id, seq.index, kind, *span, samples, num_cached, proposed)
        )
    return StepRecord(
        step=number,
        start_time=start_time,
        duration=0.0,
        scheduled=scheduled,
        block_tables={label(seq): list(seq.block_table) for seq in running},
        num_computed_tokens={label(seq): seq.num_computed_tokens for seq in running},
        running=[label(seq) for seq in running],
        waiting=[label(seq) for seq in scheduler.waiting],
        preempted=[label(seq) for seq in batch.preempted],
        num_free_blocks=manager.num_free_blocks,
        # A block manager of one's own may not say which blocks are in the prefix cache.
        cached_blocks=getattr(manager, "cached_blocks", []),
        registered_blocks=getattr(manager, "registered_blocks", []),
    )


class TraceTexts:
    """Adds texts to the records of a trace: what each step's tokens add to a completion's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        #: "request/index" -> the text so far.
        self._so_far: dict[str, Detokenizer] = {}
        self._num_done = 0

    def add_to(self, trace: Trace) -> None:
        """Add the texts of the steps that have ended since the last call."""
        if self._num_done > len(trace.steps):
            self._num_done = 0
        for record in trace.steps[self._num_done :]:
            # The results of a step in flight are not known yet.
            if not record.duration:
                return
            self.add(record)
            self._num_done += 1

    def add(self, record: StepRecord) -> None:
        """Add the texts of one step that has ended. Call it for each step once, in order."""
        for name, token_ids in record.new_token_ids.items():
            record.texts[name] = self._added(name, token_ids, name in record.finished)
        for item in record.scheduled:
            name = f"{item.request_id}/{item.index}"
            if rejected := item.proposed_token_ids[record.num_accepted.get(name, 0) :]:
                record.rejected_texts[name] = self._tokenizer.decode(rejected)

    def _added(self, name: str, token_ids: list[int], ends: bool) -> str:
        if name not in self._so_far:
            self._so_far[name] = Detokenizer(self._tokenizer, (), True)
        detokenizer = self._so_far[name]
        before = len(detokenizer.text)
        for token_id in token_ids:
            detokenizer.append(token_id)
        if ends:
            detokenizer.finish()
            del self._so_far[name]
        return detokenizer.text[before:]
