"""The scheduler: which tokens of which sequences the next step computes. Plain Python, no tensors.

Continuous batching (Yu et al., Orca, OSDI 2022): the batch is chosen anew at every step. Running
sequences come first, oldest first, then waiting ones in order of arrival, until
`max_num_batched_tokens` are planned. A prompt that does not fit the budget is computed in chunks
(Agrawal et al., Sarathi-Serve, 2024); prompt chunks and decodes share a step.

One step ahead: `schedule()` advances the counts of what it plans and marks the tokens it does not
know yet; `update()` brings their values, at once or one step late. A driver may therefore plan step
N + 1 while step N runs.

No starvation: `running` followed by `waiting` is always in order of arrival, the newest is
preempted first, and the oldest gets at least one token in every step. `sequence.max_steps` states
the bound that follows. Taught in notebooks/05_scheduler.ipynb."""

from collections import abc, deque
from dataclasses import dataclass, field

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sequence import (
    PENDING,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)


@dataclass
class SchedulerStats:
    """Counters since the start; the tests use them to prove that a mode was entered."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_mixed_steps: int = 0  # steps that computed prompt tokens and decodes together
    num_chunks: int = 0  # parts of a prompt that left the rest of it to a later step
    num_computed_tokens: int = 0
    prefix_cache_queries: int = 0  # tokens that admitted sequences had
    prefix_cache_hits: int = 0  # how many of those the prefix cache supplied


@dataclass
class Scheduler:
    """Plans steps. `max_num_seqs` is the most sequences running at once, each in a slot of its
    own.
    """

    block_manager: BlockManager
    max_num_seqs: int
    max_num_batched_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)

    def __post_init__(self) -> None:
        self._free_slots = list(reversed(range(self.max_num_seqs)))
        self._in_flight: deque[ScheduledBatch] = deque()  # batches whose results have not arrived

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Put seq at the end of the queue. The caller has checked that it can ever fit the pool."""
        self.waiting.append(seq)

    def schedule(self) -> ScheduledBatch:
        """Plan the next step. Empty when there is nothing to compute until results arrive."""
        batch = ScheduledBatch()
        budget = self._schedule_running(batch, self.max_num_batched_tokens)
        if not batch.preempted:
            self._schedule_waiting(batch, budget)
        if batch:
            self._count(batch)
            self._in_flight.append(batch)
        return batch

    def update(
        self, batch: ScheduledBatch, token_ids: abc.Sequence[int]
    ) -> list[ScheduledSequence]:
        """Bring the results of a step: token_ids has one entry for each of `batch.sampled`.

        Batches come back in the order they were planned. Returns the items whose token counts: not
        those of a sequence that ended in the meantime, whose last step was computed for nothing.
        """
        assert self._in_flight.popleft() is batch, "results must arrive in the order of the steps"
        finished, register_computed = SequenceStatus.FINISHED, self.block_manager.register_computed
        for item in batch.items:
            seq = item.sequence
            if seq.status is not finished and item.generation == seq.num_preemptions:
                register_computed(seq, item.start, item.start + item.num_new_tokens)
        accepted = []
        for item, token_id in zip(batch.sampled, token_ids, strict=True):
            seq, position = item.sequence, item.sample_position
            if seq.status is finished:
                continue
            assert seq.token_ids[position] == PENDING
            seq.token_ids[position] = token_id
            accepted.append(item)
            self._finish_if_done(seq, position, token_id)
        return accepted

    def finish(self, seq: Sequence, reason: str, stop_reason: str | int | None = None) -> None:
        """End seq, wherever it is, and free what it holds. A step in flight may still write to its
        blocks: steps run in order, so whoever gets such a block next writes it later."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif not seq.is_finished:  # a stop string may come with a sequence's last permitted token
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason

    def recover(self) -> None:
        """After a step that failed or was interrupted, whose results will not come: compute again
        what was running.
        """
        self._in_flight.clear()
        while self.running:
            self._preempt(self.running.pop(), ScheduledBatch())
        for seq in self.waiting:
            while seq.has_pending_token:
                seq.token_ids.pop()

    def check(self) -> None:
        """Raise AssertionError unless every invariant of queues, slots and blocks holds."""
        order = [seq.seq_id for seq in [*self.running, *self.waiting]]
        assert order == sorted(set(order)), "running, then waiting, must be in order of arrival"
        assert all(seq.status is SequenceStatus.RUNNING for seq in self.running)
        assert all(
            seq.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED) for seq in self.waiting
        )
        assert all(not seq.block_table and seq.slot is None for seq in self.waiting), (
            "a waiting sequence holds blocks"
        )
        slots = [seq.slot for seq in self.running]
        assert sorted([*slots, *self._free_slots]) == list(range(self.max_num_seqs)), (
            "a slot is lost or shared"
        )
        self.block_manager.check(self.running)

    # --- planning ---------------------------------------------------------------------------------

    def _schedule_running(self, batch: ScheduledBatch, budget: int) -> int:
        """Plan the running sequences, oldest first; returns what is left of the budget."""
        index = 0
        while index < len(self.running) and budget > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, budget)
            if num_new > 0:
                if not self._make_room(seq, seq.num_computed_tokens + num_new, batch):
                    break
                self._plan(batch, seq, num_new)
                budget -= num_new
            index += 1
        return budget

    def _make_room(self, seq: Sequence, num_tokens: int, batch: ScheduledBatch) -> bool:
        """Allocate for seq, preempting from the newest on; False if seq itself had to go."""
        while not self.block_manager.allocate(seq, num_tokens):
            # Everything before seq was planned in this step and is older, so the victim is never
            # one of those.
            victim = self.running.pop()
            self._preempt(victim, batch)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence, batch: ScheduledBatch) -> None:
        """Preemption by recompute: all tokens are kept, all blocks given up, and the sequence is
        next in line.
        """
        self._release(seq)
        seq.status, seq.num_computed_tokens = SequenceStatus.PREEMPTED, 0
        seq.num_preemptions += 1
        self.waiting.appendleft(seq)
        batch.preempted.append(seq)

    def _schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if seq.has_pending_token:
                break  # preempted while its last token was in flight; the next update brings it
            prefix = self.block_manager.find_cached_prefix(seq)
            if self._is_being_computed(seq, len(prefix), batch):
                break  # cheaper to wait for a block than to compute it twice
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, budget)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self._admit(batch, self.waiting.popleft(), num_cached)
            self._plan(batch, seq, num_new)
            budget -= num_new

    def _admit(self, batch: ScheduledBatch, seq: Sequence, num_cached: int) -> None:
        seq.status, seq.slot = SequenceStatus.RUNNING, self._free_slots.pop()
        seq.num_computed_tokens = seq.num_cached_tokens = num_cached
        self.running.append(seq)
        batch.admitted.append(seq)
        self.stats.prefix_cache_queries += seq.num_tokens
        self.stats.prefix_cache_hits += num_cached

    def _plan(self, batch: ScheduledBatch, seq: Sequence, num_new: int) -> None:
        start, size = seq.num_computed_tokens, self.block_manager.block_size
        seq.num_computed_tokens = end = start + num_new
        if start // size != end // size:
            batch.block_hashes.update(seq.block_hashes[start // size : end // size])
        position = seq.append_pending() if end == seq.num_tokens else None
        batch.items.append(ScheduledSequence(seq, start, num_new, position, seq.num_preemptions))

    def _is_being_computed(self, seq: Sequence, index: int, batch: ScheduledBatch) -> bool:
        """Whether block `index` of seq is computed for another sequence by `batch` or by a step in
        flight.
        """
        # Hashes are there only for a sequence that may take hits; its last token is never a hit.
        if index >= min(
            len(seq.block_hashes), (seq.num_tokens - 1) // self.block_manager.block_size
        ):
            return False
        return any(
            seq.block_hashes[index] in other.block_hashes for other in (batch, *self._in_flight)
        )

    def _finish_if_done(self, seq: Sequence, position: int, token_id: int) -> None:
        num_output = position + 1 - seq.num_prompt_tokens
        if token_id in seq.stop_ids and num_output >= seq.params.min_tokens:
            self.finish(
                seq, "stop", token_id if token_id in (seq.params.stop_token_ids or ()) else None
            )
        elif position + 1 >= seq.max_num_tokens:
            self.finish(seq, "length")

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        self._free_slots.append(seq.slot)
        seq.slot = None

    def _count(self, batch: ScheduledBatch) -> None:
        decodes = sum(item.start >= item.sequence.num_prompt_tokens for item in batch.items)
        self.stats.num_steps += 1
        self.stats.num_preemptions += len(batch.preempted)
        self.stats.num_mixed_steps += 0 < decodes < len(batch.items)
        self.stats.num_chunks += sum(item.sample_position is None for item in batch.items)
        self.stats.num_computed_tokens += batch.num_tokens
