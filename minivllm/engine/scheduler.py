"""The scheduler: which tokens of which sequences the next step computes. Plain Python, no tensors.

`SchedulerBase` is the mechanism: queues, slots, results, ends, invariants. `Scheduler` is the
package's policy: it decides which sequences the next step computes, with the public methods of its
base. Your own policy is a subclass of either class; pass it as `LLM(scheduler_cls=...)`.

What a policy may rely on:

- `schedule` is called once per step and returns a `ScheduledBatch`. The batch is empty when there
  is nothing to compute until results arrive. Only the engine calls `schedule`, and it calls no
  other method meanwhile.
- `waiting` and `running` belong to the policy: it moves sequences between them, in any order. It
  reports each move to the mechanism: `start` for a sequence that it has moved to `running`,
  `give_up` for one that it has moved back. `compute` and `verify` say what the step computes of a
  running sequence.
- These methods raise AssertionError, with the reason, for impossible decisions. They keep slots,
  counts and statistics, and note the batch as in flight with its first item.
- The policy gets blocks (`block_manager.find_cached_prefix`, `allocate`) before it calls `start`
  and `compute`. The mechanism gives blocks back (`give_up`, `finish`, rejected proposals).
- Between two calls of `schedule` sequences may arrive (`add`), end (`finish`) and get tokens
  (`update`). Results arrive in the order of the steps, at once or one step late.
- All ranks of an engine must decide alike: use no clock, no random numbers, no order of a set.

The package's policy is continuous batching (Yu et al., Orca, OSDI 2022): the batch is chosen anew
at every step. Running sequences come first, oldest first, then waiting ones in order of arrival,
until `max_num_batched_tokens` are planned. A prompt that does not fit the budget is computed in
chunks (Agrawal et al., Sarathi-Serve, 2024); prompt chunks and decodes share a step.

One step ahead: `compute` advances the counts of the sequences that it plans, and marks a token that
is not known yet; `update` brings its value. So a driver may plan step N + 1 while step N runs.

Speculation (Leviathan et al., 2023): `propose` notes guesses of a sequence's next tokens. The step
computes the guesses together with the last known token, and samples after each of them, so one step
may yield several tokens. `update` takes rejected tokens back by lowering `num_computed_tokens`.
Only verified tokens are hashed. While a sequence's proposals are in flight, its next tokens are
unknown, so the sequence rests; all other sequences go on.

No starvation: under the package's policy, `running` followed by `waiting` is always in order of
arrival, the newest sequence is preempted first, and the oldest gets at least one token in every
step. `sequence.max_steps` states the bound that follows. Taught in notebooks/05_scheduler.ipynb.
"""

from collections import abc, deque
from dataclasses import dataclass, field

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sequence import (
    PENDING,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    num_equal,
)
from minivllm.errors import ConfigError

#: Slots are a list. A number that was meant to be "no limit" would fill the memory with it.
MOST_SLOTS = 1 << 20


@dataclass
class SchedulerStats:
    """Counters since the start. The tests use them to prove that a mode was entered."""

    num_steps: int = 0
    num_preemptions: int = 0
    #: Steps that computed prompt tokens and decodes together.
    num_mixed_steps: int = 0
    #: Parts of a prompt after which the rest was left to a later step.
    num_chunks: int = 0
    num_computed_tokens: int = 0
    prefix_cache_queries: int = 0  # tokens of admitted sequences
    prefix_cache_hits: int = 0  # tokens that the prefix cache supplied
    #: Sequences in steps that verified proposals for them, these proposals, and the right ones.
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    #: How often the first, second, ... proposal was right.
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    def note_proposals(self, num_proposed: int, num_accepted: int) -> None:
        """Count the proposals that a step has verified for one sequence."""
        self.num_drafts += 1
        self.num_draft_tokens += num_proposed
        self.num_accepted_tokens += num_accepted
        per_pos = self.num_accepted_tokens_per_pos
        per_pos += [0] * (num_proposed - len(per_pos))
        for position in range(num_accepted):
            per_pos[position] += 1


@dataclass
class SchedulerBase:
    """A scheduler without decisions.

    A subclass writes `schedule`, which decides with `start`, `compute`, `verify` and `give_up`.
    Everything else is here: requests come by `add`, proposals by `propose`, results by `update`,
    ends by `finish`.

    waiting: a deque of sequences. running: a list. max_num_seqs: the largest number of sequences
    that may run at once, each in its own slot. max_num_batched_tokens: the largest number of tokens
    per step.
    """

    block_manager: BlockManager
    max_num_seqs: int
    max_num_batched_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    #: For policies to read: the free slots, and the batches whose results have not arrived.
    free_slots: list[int] = field(init=False)
    in_flight: deque[ScheduledBatch] = field(init=False, default_factory=deque)
    #: Whether any running sequence may have proposals. If not, no sequence need be checked.
    has_proposals: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.max_num_seqs > MOST_SLOTS:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} is too large; at most {MOST_SLOTS:,} sequences"
                " run at once."
            )
        self.free_slots = list(reversed(range(self.max_num_seqs)))

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    # --- what the engine calls --------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Append seq to the queue. The caller has checked that seq can fit the pool."""
        self.waiting.append(seq)

    def schedule(self) -> ScheduledBatch:
        """Plan the next step."""
        raise TypeError(f"{type(self).__name__} makes no decisions: write a `schedule` method.")

    def propose(self, seq: Sequence, token_ids: abc.Sequence[int]) -> None:
        """Guess that token_ids follow the tokens of seq. A step may verify them.

        New guesses replace earlier ones. They are cut where the sequence would become too long.
        They are ignored if they are useless: if seq does not run, if its last token is not known
        yet, or if the block manager has no `trim` to give back the blocks of rejected tokens.
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
        """Take in the results of a step. Steps must come in the order in which they were planned.

        token_ids: for each of `batch.sampled` the tokens that the step verified: the accepted
        proposals, and one more. The list is empty if the caller ends the sequence right afterwards.

        A sequence takes its tokens one by one, up to a stop token or its greatest length. Returns
        the items whose tokens count; the tokens are in `new_token_ids`. A sequence that ended in
        the meantime has no such item: its last step was computed for nothing.
        """
        assert self.in_flight.popleft() is batch, "results must arrive in the order of the steps"
        finished, register_computed = SequenceStatus.FINISHED, self.block_manager.register_computed
        has_proposals = batch.has_proposals
        for item in batch.items:
            # Registered below, when the number of right proposals is known.
            if has_proposals and item.proposed_token_ids:
                continue
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
            # Without proposals, this is one token.
            for token_id in tokens:
                seq.token_ids[position] = token_id
                if token_id in seq.stop_ids or position + 1 >= seq.max_num_tokens:
                    ending = self._ending(seq, position, token_id)
                    if ending is not None:
                        self.finish(seq, *ending)
        return accepted

    def finish(self, seq: Sequence, reason: str, stop_reason: str | int | None = None) -> None:
        """End seq, in whatever state it is, and free its blocks and its slot.

        A step in flight may still write to these blocks. Steps run in order, so the next owner of a
        block writes to it later.
        """
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif not seq.is_finished:
            # A stop string may end a sequence whose last permitted token has ended it already.
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason

    def check(self) -> None:
        """Raise AssertionError if an invariant of queues, slots or blocks is broken."""
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
        """Note that seq runs: you have moved it from `waiting` to `running`. Gives it a slot.

        num_cached: the number of its tokens in blocks from the prefix cache.
        """
        # Only the head of the queue is checked, where a policy may have left seq by mistake.
        assert not (self.waiting and self.waiting[0] is seq), (
            f"sequence {seq.seq_id} is started, but is still in `waiting`"
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
        """Have the step compute the next num_new tokens of seq, at least 1. Returns the item.

        The blocks of these tokens must be allocated.
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
        # Blocks become full in this step.
        if end % size < num_new:
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
        """Have the step also compute and verify the first num_proposals proposals of an item.

        The step samples after each proposal. The blocks of the proposals must be allocated. The
        item must compute its sequence's last known token. A policy that never calls this method
        loses only the speedup of the proposals.
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
        """Take back the blocks and the slot of seq (preemption by recompute).

        You have moved seq from `running` to `waiting`. It keeps its tokens, but none of them counts
        as computed any more.
        """
        assert seq.slot is not None, f"sequence {seq.seq_id} is given up, but was not running"
        assert seq not in self.running, (
            f"sequence {seq.seq_id} is given up, but is still in `running`"
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
        """Whether this batch, or a step in flight, computes block `index` for another sequence."""
        # Only a sequence that may use cached blocks has hashes. Its last token is never cached.
        if index >= min(
            len(seq.block_hashes), (seq.num_tokens - 1) // self.block_manager.block_size
        ):
            return False
        block_hash = seq.block_hashes[index]
        return any(block_hash in other.block_hashes for other in (batch, *self.in_flight))

    # --- results ----------------------------------------------------------------------------------

    def _take_verified(self, item: ScheduledSequence, tokens: list[int]) -> None:
        """Append the verified tokens of a step with proposals, and take back the rejected ones."""
        seq, position = item.sequence, item.sample_position
        assert position is not None
        item.num_accepted = num_equal(item.proposed_token_ids, tokens)
        self.stats.note_proposals(len(item.proposed_token_ids), item.num_accepted)
        ending: tuple[str, str | int | None] | None = None
        count = 0
        while count < len(tokens) and ending is None:
            ending = self._ending(seq, position + count, tokens[count])
            count += 1
        item.new_token_ids = tokens[:count]
        if count:
            seq.token_ids[position:] = item.new_token_ids
        if item.num_preemptions == seq.num_preemptions:
            # The newest token was sampled but not computed. All tokens before it were computed.
            verified_end = position + max(0, count - 1)
            seq.num_computed_tokens = verified_end
            self.block_manager.register_computed(seq, item.start, verified_end)
            # If they stayed, the blocks of rejected tokens might force a preemption.
            self.block_manager.trim(seq, verified_end)
        if ending is not None:
            self.finish(seq, *ending)

    def _ending(
        self, seq: Sequence, position: int, token_id: int
    ) -> tuple[str, str | int | None] | None:
        """(finish_reason, stop_reason) if the token at this position is the last of seq."""
        if token_id in seq.stop_ids and (
            position + 1 - seq.num_prompt_tokens >= seq.params.min_tokens
            # The sampler chose it before min_tokens because the grammar allowed nothing else.
            or seq.params.structured_outputs is not None
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
        """Plan the next step. The batch is empty if all computation has to wait for results."""
        batch = ScheduledBatch()
        budget = self.schedule_running(batch, self.max_num_batched_tokens)
        if not batch.preempted:
            self.schedule_waiting(batch, budget)
        return batch

    def schedule_running(self, batch: ScheduledBatch, budget: int) -> int:
        """Plan the running sequences, oldest first. Returns the budget that is left."""
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
        """Allocate blocks for seq; preempt the newest sequences until there are enough.

        Returns False if seq itself was preempted.
        """
        while not self.block_manager.allocate(seq, num_tokens):
            # The sequences before seq are older and already planned in this step. The victim is
            # never one of them, because it comes from the end of the list.
            victim = self.running.pop()
            self.waiting.appendleft(victim)  # next in line
            self.give_up(batch, victim)
            if victim is seq:
                return False
        return True

    def schedule_proposals(self, batch: ScheduledBatch, budget: int) -> int:
        """Verify proposals with the budget and the blocks that are left. Returns the budget left.

        No sequence is preempted for a guess.
        """
        for item in batch.items:
            seq = item.sequence
            # The rest of the prompt comes first.
            if item.sample_position is None:
                continue
            count = 0 if batch.preempted else min(len(seq.proposed_token_ids), budget)
            while count and not self.block_manager.allocate(seq, item.end + count):
                count -= 1
            if count:
                self.verify(batch, item, count)
                budget -= count
            # Proposals that are not verified now would be out of date in the next step.
            seq.proposed_token_ids = []
        self.has_proposals = any(seq.proposed_token_ids for seq in self.running)
        return budget

    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        """Admit waiting sequences in order of arrival, while budget, slots and blocks last."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            # Preempted while its last token was in flight. The next update brings that token.
            if seq.has_pending_token:
                break
            prefix = self.block_manager.find_cached_prefix(seq)
            # Waiting for a block is cheaper than computing it twice.
            if self.is_being_computed(seq, len(prefix), batch):
                break
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, budget)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq, num_cached)
            self.compute(batch, seq, num_new)
            budget -= num_new

    def check(self) -> None:
        """Check the base's invariants, and the order of this policy."""
        order = [seq.seq_id for seq in [*self.running, *self.waiting]]
        assert order == sorted(order), "running, then waiting, must be in order of arrival"
        super().check()
