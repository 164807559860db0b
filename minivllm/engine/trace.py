"""A record of what the engine did at each step, for pictures and for questions afterwards. Plain data, saved as JSON.

The engine only appends records; whoever draws them (minivllm.viz) reads them. With ``trace=False`` none is made.
Taught in notebooks/11_using_minivllm.ipynb."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import ScheduledBatch, Sequence

TRACE_VERSION = 1


@dataclass
class TracedSequence:
    """One sequence's part in a step."""

    request_id: str
    index: int  # which of the request's n completions
    kind: str  # "prefill" (its prompt, or what preemption threw away) or "decode"
    start: int
    num_new_tokens: int
    samples: bool  # whether the step ends with a sampled token; a chunk of a prompt does not
    num_cached_tokens: int = 0  # tokens the prefix cache supplied; set in the step that admits the sequence


@dataclass
class StepRecord:
    """The engine after step `step` was planned, and what the step then took."""

    step: int
    start_time: float  # seconds since the trace began
    duration: float  # seconds from planning to results
    scheduled: list[TracedSequence]
    block_tables: dict[str, list[int]]  # "request/index" of running sequences -> block ids
    num_computed_tokens: dict[str, int]  # the same -> tokens computed after this step
    running: list[str]
    waiting: list[str]
    preempted: list[str]
    num_free_blocks: int  # the cached ones included: content known, space available
    cached_blocks: list[int]
    registered_blocks: list[int]  # those in the prefix cache, used ones included
    finished: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.scheduled)


@dataclass
class Trace:
    """What the engine is, and a record a step."""

    model: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_bytes_per_token: int
    max_model_len: int  # longest sequence, prompt included: what an engine without pages would reserve for each
    steps: list[StepRecord] = field(default_factory=list)
    version: int = TRACE_VERSION

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "Trace":
        """Read what `save` wrote. Raises ValueError for a file of another version."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("version") != TRACE_VERSION:
            raise ValueError(f"{path} is not a minivllm trace of version {TRACE_VERSION}.")
        for step in data["steps"]:
            step["scheduled"] = [TracedSequence(**item) for item in step["scheduled"]]
        data["steps"] = [StepRecord(**step) for step in data["steps"]]
        return Trace(**data)


def label(seq: Sequence) -> str:
    """The name of a sequence in a trace."""
    return f"{seq.request_id}/{seq.index}"


def record_step(
    trace: Trace, batch: ScheduledBatch, scheduler: Scheduler, start_time: float
) -> StepRecord:
    """Append the record of a step that has just been planned. start_time: seconds since the trace began."""

    manager, running, admitted = scheduler.block_manager, scheduler.running, set(batch.admitted)
    scheduled = []
    for item in batch.items:
        seq, samples = item.sequence, item.sample_position is not None
        kind = "decode" if item.start >= seq.num_prompt_tokens else "prefill"
        num_cached = seq.num_cached_tokens if seq in admitted else 0
        scheduled.append(TracedSequence(seq.request_id, seq.index, kind, item.start, item.num_new_tokens, samples, num_cached))
    record = StepRecord(
        step=len(trace.steps), start_time=start_time, duration=0.0, scheduled=scheduled,
        block_tables={label(seq): list(seq.block_table) for seq in running},
        num_computed_tokens={label(seq): seq.num_computed_tokens for seq in running},
        running=[label(seq) for seq in running], waiting=[label(seq) for seq in scheduler.waiting],
        preempted=[label(seq) for seq in batch.preempted], num_free_blocks=manager.num_free_blocks,
        cached_blocks=[i for i in manager.free_blocks if manager.blocks[i].block_hash is not None],
        registered_blocks=sorted(manager.hash_to_block.values()),
    )  # fmt: skip
    trace.steps.append(record)
    return record
