"""A record of what the engine did at each step, for pictures and for questions afterwards. Plain data, saved as JSON.

The engine only appends records; whoever draws them (minivllm.viz) reads them. With ``trace=False`` none is made.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import ScheduledBatch

TRACE_VERSION = 1


@dataclass
class TracedSequence:
    """One sequence's part in a step."""

    request_id: str
    #: Which of the request's n completions.
    index: int
    #: "prefill" (its prompt, or what preemption threw away) or "decode".
    kind: str
    start: int
    num_new_tokens: int
    #: Whether the step ends with a sampled token; a chunk of a prompt does not.
    samples: bool
    #: Tokens the prefix cache supplied; set in the step that admits the sequence.
    num_cached_tokens: int = 0


@dataclass
class StepRecord:
    """The engine after step `step` was planned, and what the step then took."""

    step: int
    #: Seconds since the trace began, and seconds of the step from planning to results.
    start_time: float
    duration: float
    scheduled: list[TracedSequence]
    #: "request/index" of running sequences -> block ids, and -> tokens computed after this step.
    block_tables: dict[str, list[int]]
    num_computed_tokens: dict[str, int]
    running: list[str]
    waiting: list[str]
    preempted: list[str]
    #: Free blocks include the cached ones: content known, space available.
    num_free_blocks: int
    cached_blocks: list[int]
    #: Blocks registered in the prefix cache, used ones included.
    registered_blocks: list[int]
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
    #: Longest sequence, prompt included: what an engine without pages would reserve for each.
    max_model_len: int
    steps: list[StepRecord] = field(default_factory=list)
    version: int = TRACE_VERSION

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read what `save` wrote. Raises ValueError for a file of another version."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("version") != TRACE_VERSION:
            raise ValueError(f"{path} is not a minivllm trace of version {TRACE_VERSION}.")
        steps = [
            StepRecord(**{**step, "scheduled": [TracedSequence(**item) for item in step["scheduled"]]})
            for step in data.pop("steps")
        ]
        return Trace(**data, steps=steps)


def record_step(
    trace: Trace, batch: ScheduledBatch, scheduler: Scheduler, names: dict[int, tuple[str, int]], start_time: float
) -> StepRecord:
    """Append the record of a step that has just been planned. names: seq_id -> (request id, index)."""

    def label(seq_id: int) -> str:
        return "{}/{}".format(*names[seq_id])

    manager = scheduler.block_manager
    admitted = {seq.seq_id for seq in batch.admitted}
    record = StepRecord(
        step=len(trace.steps),
        start_time=start_time,
        duration=0.0,
        scheduled=[
            TracedSequence(
                *names[item.sequence.seq_id],
                kind="decode" if item.start >= item.sequence.num_prompt_tokens else "prefill",
                start=item.start,
                num_new_tokens=item.num_new_tokens,
                samples=item.sample_position is not None,
                num_cached_tokens=item.sequence.num_cached_tokens if item.sequence.seq_id in admitted else 0,
            )
            for item in batch.items
        ],
        block_tables={label(seq.seq_id): list(seq.block_table) for seq in scheduler.running},
        num_computed_tokens={label(seq.seq_id): seq.num_computed_tokens for seq in scheduler.running},
        running=[label(seq.seq_id) for seq in scheduler.running],
        waiting=[label(seq.seq_id) for seq in scheduler.waiting],
        preempted=[label(seq.seq_id) for seq in batch.preempted],
        num_free_blocks=manager.num_free_blocks,
        cached_blocks=[i for i in manager.free_blocks if manager.blocks[i].block_hash is not None],
        registered_blocks=sorted(manager.hash_to_block.values()),
    )
    trace.steps.append(record)
    return record
