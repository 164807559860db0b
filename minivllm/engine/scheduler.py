"""The scheduler: which tokens of which sequences the next step computes. Plain Python, no tensors.

`SchedulerBase` is the mechanism: queues, slots, results, ends, invariants. `Scheduler` is the
package's policy: it decides whom the next step computes, with the public methods of its base. A
policy of your own is a subclass of either; `LLM(scheduler_cls=...)` takes it.

What a policy may rely on:

- `schedule` is called once a step and returns a `ScheduledBatch`, empty when there is nothing to
  compute until results arrive. Nothing else calls it, and no other method is called meanwhile.
- `waiting` and `running` are the policy's: it moves sequences between them, in any order it likes.
  It says so to the mechanism: `start` for a sequence that it has moved to `running`, `give_up` for
  one that it has moved back, `compute` and `verify` for what the step computes of a running one.
- These methods raise AssertionError, with the reason, for what cannot be. They keep slots, counts
  and statistics, and note the batch as in flight with its first item.
- Blocks are the policy's to get (`block_manager.find_cached_prefix`, `allocate`) before it calls
  `start` and `compute`, and the mechanism's to give back (`give_up`, `finish`, rejected proposals).
- Between two calls of `schedule` sequences may arrive (`add`), end (`finish`) and get tokens
  (`update`). Results arrive in the order of the steps, at once or one step late.
- All ranks of an engine must decide alike: no clock, no random numbers, no order of a set.

The package's policy is continuous batching (Yu et al., Orca, OSDI 2022): the batch is chosen anew
at every step. Running sequences come first, oldest first, then waiting ones in order of arrival,
until `max_num_batched_tokens` are planned. A prompt that does not fit the budget is computed in
chunks (Agrawal et al., Sarathi-Serve, 2024); prompt chunks and decodes share a step.

One step ahead: `compute` advances the counts of what it plans and marks the token it does not know
yet; `update` brings its value. A driver may therefore plan step N + 1 while step N runs.

Speculation (Leviathan et al., 2023): `propose` notes guesses at a sequence's next tokens. The step
computes them with its last known token and samples behind each, so that one step may bring several
tokens. `update` takes back what was rejected by lowering `num_computed_tokens`; hashes are made of
verified tokens only. A sequence rests while its proposals are in flight, for nobody knows what
follows them; all others go on.

No starvation: under the package's policy `running` followed by `waiting` is always in order of
arrival, the newest is preempted first, and the oldest gets at least one token in every step.
`sequence.max_steps` states the bound that follows. Taught in notebooks/05_scheduler.ipynb."""

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
class SchedulerBase:
    """A scheduler without its decisions. Write `schedule`; it decides with `start`, `compute`,
    `verify` and `give_up`.

    waiting: a deque of sequences. running: a list. max_num_seqs: the most that may run at once,
    each in a slot of its own. max_num_batched_tokens: the most tokens of a step. All else is here:
    requests come by `add`, guesses at their tokens by `propose`, results by `update`, ends by
    `finish`.
    """

    block_manager: BlockManager
    max_num_seqs: int
    max_num_batched_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    #: To read: slots that nobody has, and the batches whose results have not arrived.
    free_slots: list[int] = field(init=False)
    in_flight: deque[ScheduledBatch] = field(init=False, default_factory=deque)
    #: Whether any running sequence may have proposals; spares a look at each.
    has_proposals: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.free_slots = list(reversed(range(self.max_num_seqs)))

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    # --- what the engine calls --------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Put seq at the end of the queue. The caller has checked that it can ever fit the pool."""
        self.waiting.append(seq)

    def schedule(self) -> ScheduledBatch:
        """Plan the next step."""
        raise TypeError(f"{type(self).__name__} has no decisions of its own: write a `schedule`.")

    def propose(self, seq: Sequence, token_ids: abc.Sequence[int]) -> None:
        """Guess that token_ids follow the tokens of seq; a step may verify them. Replaces earlier
        guesses.

        Cut where the sequence would be longer than it may be. Ignored where it is of no use: seq
        does not run, its last token is not known yet, or the block manager has no `trim`, with
        which the blocks of rejected tokens are given back.
        """
        is_running = seq.status is SequenceStatus.RUNNING
        if is_running and not seq.has_pending_token and hasattr(self.block_manager, "trim"):
            assert all(token_id >= 0 for token_id in token_ids), f"not token ids: {token_ids}"
            # The step samples one token more than there are proposals.
            room = seq.max_num_tokens - seq.num_tokens - 1
            seq.proposed_token_ids = list(token_ids[: max(0, room)])
            self.has_proposals = True

    def update(
        self, batch: ScheduledBatch, token_ids: abc.Sequence[list[int]]
    ) -> list[ScheduledSequence]:
        """Bring the results of a step. token_ids: for each of `batch.sampled` the tokens that the
        step verified, the accepted proposals and one more; none if the caller ends it right after.

        A sequence takes its tokens one by one, up to a stop token or its greatest length. Batches
        come back in the order they were planned. Returns the items whose tokens count, which stand
        in `new_token_ids`; not those of a sequence that ended in the meantime, whose last step was
        computed for nothing.
        """
        assert self.in_flight.popleft() is batch, "results must arrive in the order of the steps"
        finished, register_computed = SequenceStatus.FINISHED, self.block_manager.register_computed
        has_proposals = batch.has_proposals
        for item in batch.items:
            if has_proposals and item.proposed_token_ids:
                continue  # registered below, when it is known how far they are right
            seq = item.sequence
            if seq.status is not finished and item.num_preemptions == seq.num_preemptions:
                register_computed(seq, item.start, item.start + item.num_new_tokens)
        accepted = []
        for item, tokens in zip(batch.sampled, token_ids, strict=True):
            seq, position = item.sequence, item.sample_position
            if seq.status is finished:
                continue
            assert position is not None
            assert seq.token_ids[position] == PENDING
            accepted.append(item)
            if has_proposals and item.proposed_token_ids:
                self._take_verified(item, tokens)
                continue
            item.new_token_ids = tokens
            for token_id in tokens:  # one
                seq.token_ids[position] = token_id
                if token_id in seq.stop_ids or position + 1 >= seq.max_num_tokens:
                    ending = self._ending(seq, position, token_id)
                    if ending is not None:
                        self.finish(seq, *ending)
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

    def check(self) -> None:
        """Raise AssertionError unless every invariant of queues, slots and blocks holds."""
        queued = [seq.seq_id for seq in [*self.running, *self.waiting]]
        assert len(set(queued)) == len(queued), "a sequence is queued twice"
        assert all(seq.status is SequenceStatus.RUNNING for seq in self.running)
        assert all(
            seq.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED) for seq in self.waiting
        )
        assert all(not seq.block_table and seq.slot is None for seq in self.waiting), (
            "a waiting sequence holds blocks"
        )
        assert not any(seq.proposed_token_ids for seq in self.waiting)
        for seq in self.running:
            assert seq.num_tokens + len(seq.proposed_token_ids) < seq.max_num_tokens or (
                not seq.proposed_token_ids
            ), "proposals beyond the greatest length"
        slots = [seq.slot for seq in self.running if seq.slot is not None]
        assert sorted([*slots, *self.free_slots]) == list(range(self.max_num_seqs)), (
            "a slot is lost or shared"
        )
        self.block_manager.check(self.running)

    # --- what a policy calls ----------------------------------------------------------------------

    def start(self, batch: ScheduledBatch, seq: Sequence, num_cached: int = 0) -> None:
        """Note that seq, which you have moved from `waiting` to `running`, runs: it gets one of the
        places.

        num_cached: how many of its tokens lie in blocks that it got from the prefix cache.
        """
        # Only the head is looked at, which is where whoever forgets to take it out has left it.
        assert not (self.waiting and self.waiting[0] is seq), (
            f"sequence {seq.seq_id} is started, and stands in `waiting` still"
        )
        assert self.free_slots, (
            f"sequence {seq.seq_id} is started, but all {self.max_num_seqs} places are taken"
        )
        seq.status, seq.slot = SequenceStatus.RUNNING, self.free_slots.pop()
        seq.num_computed_tokens = seq.num_cached_tokens = num_cached
        batch.admitted.append(seq)
        self.stats.prefix_cache_queries += seq.num_tokens
        self.stats.prefix_cache_hits += num_cached

    def compute(self, batch: ScheduledBatch, seq: Sequence, num_new: int) -> ScheduledSequence:
        """Have the step compute the next num_new tokens of seq, at least 1; its blocks must be
        there. Returns its item of the batch.
        """
        start, size = seq.num_computed_tokens, self.block_manager.block_size
        end = start + num_new
        items, stats, token_ids = batch.items, self.stats, seq.token_ids
        num_tokens = len(token_ids)
        assert seq.slot is not None, f"sequence {seq.seq_id} is computed, but was not started"
        is_decode = start >= seq.num_prompt_tokens
        if not items:
            self.in_flight.append(batch)
            stats.num_steps += 1
            batch.has_decodes = is_decode
            batch.has_prompts = not is_decode
        else:
            assert seq.last_step != stats.num_steps, f"sequence {seq.seq_id} is in this step twice"
            if not (batch.has_decodes if is_decode else batch.has_prompts):
                batch.has_decodes = batch.has_prompts = True
                stats.num_mixed_steps += 1
        assert 1 <= num_new <= num_tokens - start, (
            f"{num_new} tokens of {seq.num_uncomputed_tokens} uncomputed"
        )
        assert end <= len(seq.block_table) * size, (
            f"sequence {seq.seq_id} computes up to token {end}, and has blocks for"
            f" {len(seq.block_table) * size}"
        )
        seq.last_step = stats.num_steps
        stats.num_computed_tokens += num_new
        seq.num_computed_tokens = end
        if end % size < num_new:  # a block becomes full
            batch.block_hashes.update(seq.block_hashes[start // size : end // size])
        position = None
        if end == num_tokens:
            position = seq.append_pending()
        else:
            stats.num_chunks += 1
        item = ScheduledSequence(seq, start, num_new, position, seq.num_preemptions)
        items.append(item)
        return item

    def verify(self, batch: ScheduledBatch, item: ScheduledSequence, num_proposals: int) -> None:
        """Have the step also compute the first num_proposals proposals of an item's sequence, and
        sample behind each of them; their blocks must be there.

        Only for an item that computes its sequence's last known token. A policy that never calls it
        wastes the proposals, and no more.
        """
        seq = item.sequence
        end = item.end + num_proposals
        assert item.sample_position == item.end, f"sequence {seq.seq_id} samples nothing"
        assert 1 <= num_proposals <= len(seq.proposed_token_ids), (
            f"{num_proposals} proposals of {len(seq.proposed_token_ids)}"
        )
        assert end < seq.max_num_tokens, f"sequence {seq.seq_id} would be too long"
        assert end <= len(seq.block_table) * self.block_manager.block_size, (
            f"sequence {seq.seq_id} computes up to token {end}, and has too few blocks"
        )
        item.proposed_token_ids = seq.proposed_token_ids[:num_proposals]
        item.num_new_tokens += num_proposals
        seq.num_computed_tokens = end
        seq.proposed_token_ids = []
        batch.has_proposals = True
        self.stats.num_computed_tokens += num_proposals

    def give_up(self, batch: ScheduledBatch, seq: Sequence) -> None:
        """Take back all blocks and the place of seq, which you have moved from `running` to
        `waiting`: preemption by recompute.

        It keeps its tokens; none of them counts as computed any more.
        """
        assert seq.slot is not None, f"sequence {seq.seq_id} is given up, but was not running"
        assert seq not in self.running, (
            f"sequence {seq.seq_id} is given up, and stands in `running` still"
        )
        assert not (batch.items and seq.last_step == self.stats.num_steps), (
            f"this step computes sequence {seq.seq_id}"
        )
        self._release(seq)
        seq.status, seq.num_computed_tokens = SequenceStatus.PREEMPTED, 0
        seq.num_preemptions += 1
        self.stats.num_preemptions += 1
        batch.preempted.append(seq)

    def is_being_computed(self, seq: Sequence, index: int, batch: ScheduledBatch) -> bool:
        """Whether block `index` of seq is computed for another sequence by `batch` or by a step in
        flight.
        """
        # Hashes are there only for a sequence that may take hits; its last token is never a hit.
        if index >= min(
            len(seq.block_hashes), (seq.num_tokens - 1) // self.block_manager.block_size
        ):
            return False
        block_hash = seq.block_hashes[index]
        return any(block_hash in other.block_hashes for other in (batch, *self.in_flight))

    # --- results ----------------------------------------------------------------------------------

    def _take_verified(self, item: ScheduledSequence, tokens: list[int]) -> None:
        """Give a sequence what a step with proposals verified, and take back the rest."""
        seq, position = item.sequence, item.sample_position
        assert position is not None
        ending: tuple[str, str | int | None] | None = None
        count = 0
        while count < len(tokens) and ending is None:
            ending = self._ending(seq, position + count, tokens[count])
            count += 1
        item.new_token_ids = tokens[:count]
        if count:
            seq.token_ids[position:] = item.new_token_ids
        if item.num_preemptions == seq.num_preemptions:
            # The newest token has been sampled and not computed; all before it have.
            verified_end = position + max(0, count - 1)
            seq.num_computed_tokens = verified_end
            self.block_manager.register_computed(seq, item.start, verified_end)
            # Kept, the blocks of rejected tokens might cost another sequence its place.
            self.block_manager.trim(seq, verified_end)
        if ending is not None:
            self.finish(seq, *ending)

    def _ending(
        self, seq: Sequence, position: int, token_id: int
    ) -> tuple[str, str | int | None] | None:
        """(finish_reason, stop_reason) if the token at this position is the last of seq."""
        if token_id in seq.stop_ids and (
            position + 1 - seq.num_prompt_tokens >= seq.params.min_tokens
        ):
            return "stop", token_id if token_id in (seq.params.stop_token_ids or ()) else None
        return ("length", None) if position + 1 >= seq.max_num_tokens else None

    def _release(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self.block_manager.free(seq)
        self.free_slots.append(seq.slot)
        seq.slot, seq.proposed_token_ids = None, []


@dataclass
class Scheduler(SchedulerBase):
    """The package's policy. Override a part of it, or all of `schedule`."""

    def schedule(self) -> ScheduledBatch:
        """Plan the next step. Empty when there is nothing to compute until results arrive."""
        batch = ScheduledBatch()
        budget = self.schedule_running(batch, self.max_num_batched_tokens)
        if not batch.preempted:
            self.schedule_waiting(batch, budget)
        return batch

    def schedule_running(self, batch: ScheduledBatch, budget: int) -> int:
        """Plan the running sequences, oldest first; returns what is left of the budget."""
        index, running, allocate = 0, self.running, self.block_manager.allocate
        while index < len(running) and budget > 0:
            seq = running[index]
            num_new = seq.num_uncomputed_tokens
            if num_new > 0:
                if num_new > budget:
                    num_new = budget
                end = seq.num_computed_tokens + num_new
                if not allocate(seq, end) and not self.make_room(seq, end, batch):
                    break
                self.compute(batch, seq, num_new)
                budget -= num_new
            index += 1
        return self.schedule_proposals(batch, budget) if self.has_proposals else budget

    def make_room(self, seq: Sequence, num_tokens: int, batch: ScheduledBatch) -> bool:
        """Allocate for seq, preempting from the newest on until there are blocks; False if seq
        itself had to go.
        """
        while not self.block_manager.allocate(seq, num_tokens):
            # Everything before seq was planned in this step and is older, so the victim is never
            # one of those.
            victim = self.running.pop()
            self.waiting.appendleft(victim)  # next in line
            self.give_up(batch, victim)
            if victim is seq:
                return False
        return True

    def schedule_proposals(self, batch: ScheduledBatch, budget: int) -> int:
        """Have proposals verified with what the running sequences have left of budget and blocks:
        nobody is preempted for a guess. Returns what is left of the budget.
        """
        for item in batch.items:
            seq = item.sequence
            if item.sample_position is None:
                continue  # the rest of its prompt comes first
            count = 0 if batch.preempted else min(len(seq.proposed_token_ids), budget)
            while count and not self.block_manager.allocate(seq, item.end + count):
                count -= 1
            if count:
                self.verify(batch, item, count)
                budget -= count
            seq.proposed_token_ids = []  # what could not be verified now is stale in the next step
        self.has_proposals = any(seq.proposed_token_ids for seq in self.running)
        return budget

    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        """Admit waiting sequences, in order of arrival, while budget, slots and blocks last."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if seq.has_pending_token:
                break  # preempted while its last token was in flight; the next update brings it
            prefix = self.block_manager.find_cached_prefix(seq)
            if self.is_being_computed(seq, len(prefix), batch):
                break  # cheaper to wait for a block than to compute it twice
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, budget)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq, num_cached)
            self.compute(batch, seq, num_new)
            budget -= num_new

    def check(self) -> None:
        """The base's invariants, and the order of this policy."""
        order = [seq.seq_id for seq in [*self.running, *self.waiting]]
        assert order == sorted(order), "running, then waiting, must be in order of arrival"
        super().check()
