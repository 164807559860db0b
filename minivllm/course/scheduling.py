"""A scheduler without its decisions: what an exercise of chapter 05 starts from, so that nothing
else is in the way.
"""

from __future__ import annotations

from collections import abc

from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import ScheduledBatch, ScheduledSequence, Sequence, SequenceStatus


class SchedulerBase(Scheduler):
    """Write `schedule`: it decides, with the three methods below, and moves sequences between
    `waiting` and `running`.

    waiting: a deque of sequences, oldest first. running: a list, oldest first. max_num_seqs: the
    most that may run. max_num_batched_tokens: the most tokens of a step. block_manager: see
    `minivllm.engine.block_manager`.

    Everything else is the package's scheduler: requests come by `add`, results by `update`, ends by
    `finish`. The results of a step must arrive before the next one is planned (an engine with
    async_scheduling=False).
    """

    def schedule(self) -> ScheduledBatch:
        """Plan the next step."""
        raise TypeError("SchedulerBase has no decisions of its own: write a `schedule`.")

    def start(self, batch: ScheduledBatch, seq: Sequence, num_cached: int = 0) -> None:
        """Note that seq, which you have moved from `waiting` to `running`, runs: it gets one of the
        places.

        num_cached: how many of its tokens lie in blocks that it got from the prefix cache.
        """
        assert seq not in self.waiting, (
            f"sequence {seq.seq_id} is started, and stands in `waiting` still"
        )
        assert self._free_slots, (
            f"sequence {seq.seq_id} is started, but all {self.max_num_seqs} places are taken"
        )
        seq.status, seq.slot = SequenceStatus.RUNNING, self._free_slots.pop()
        seq.num_computed_tokens = seq.num_cached_tokens = num_cached
        batch.admitted.append(seq)
        self.stats.prefix_cache_queries += seq.num_tokens
        self.stats.prefix_cache_hits += num_cached

    def compute(self, batch: ScheduledBatch, seq: Sequence, num_new: int) -> None:
        """Have the step compute the next num_new tokens of seq, at least 1; its blocks must be
        there.
        """
        room = len(seq.block_table) * self.block_manager.block_size
        end = seq.num_computed_tokens + num_new
        assert seq.slot is not None, f"sequence {seq.seq_id} is computed, but was not started"
        assert all(item.sequence is not seq for item in batch.items), (
            f"sequence {seq.seq_id} is in this step twice"
        )
        assert 1 <= num_new <= seq.num_uncomputed_tokens, (
            f"{num_new} tokens of {seq.num_uncomputed_tokens} uncomputed"
        )
        assert end <= room, (
            f"sequence {seq.seq_id} computes up to token {end}, and has blocks for {room}"
        )
        self._plan(batch, seq, num_new)

    def give_up(self, batch: ScheduledBatch, seq: Sequence) -> None:
        """Take back all blocks and the place of seq, which you have moved from `running` to
        `waiting`.

        It keeps its tokens; none of them counts as computed any more.
        """
        assert seq.slot is not None, f"sequence {seq.seq_id} is given up, but was not running"
        assert seq not in self.running, (
            f"sequence {seq.seq_id} is given up, and stands in `running` still"
        )
        assert all(item.sequence is not seq for item in batch.items), (
            f"this step computes sequence {seq.seq_id}"
        )
        self._release(seq)
        seq.status, seq.num_computed_tokens = SequenceStatus.PREEMPTED, 0
        seq.num_preemptions += 1
        batch.preempted.append(seq)

    def update(
        self, batch: ScheduledBatch, token_ids: abc.Sequence[int]
    ) -> list[ScheduledSequence]:
        """As in the package; the step is counted here, so that `schedule` need not."""
        self._count(batch)
        self._in_flight.append(batch)
        return super().update(batch, token_ids)

    #: The package's decisions are not for sale here.
    _schedule_running = _schedule_waiting = _make_room = None  # type: ignore[assignment]
