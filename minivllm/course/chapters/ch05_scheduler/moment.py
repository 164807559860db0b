"""A scheduler's state before a step, from which other schedulers can plan the same step."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from minivllm.engine.block_manager import Block, BlockManager
from minivllm.engine.scheduler import SchedulerBase
from minivllm.engine.sequence import ScheduledBatch, Sequence


@dataclass(frozen=True)
class Plan:
    """What a step does, in a form that can be compared.

    tokens: request's number -> (tokens computed before, new tokens). running, waiting: the queues
    after the planning. error: what was raised instead.
    """

    tokens: dict[int, tuple[int, int]]
    preempted: frozenset[int]
    running: tuple[int, ...]
    waiting: tuple[int, ...]
    error: str = ""

    @classmethod
    def of(cls, batch: ScheduledBatch, scheduler: SchedulerBase) -> Plan:
        return cls(
            {item.sequence.seq_id: (item.start, item.num_new_tokens) for item in batch.items},
            frozenset(seq.seq_id for seq in batch.preempted),
            tuple(seq.seq_id for seq in scheduler.running),
            tuple(seq.seq_id for seq in scheduler.waiting),
        )

    @classmethod
    def failed(cls, error: Exception) -> Plan:
        return cls({}, frozenset(), (), (), f"{type(error).__name__}: {error}")

    def words(self) -> str:
        """For a message: who computes how many tokens, who is preempted, who waits."""
        tokens = ", ".join(
            f"request {number}: {count}" + f" (after {start})" * (start > 0)
            for number, (start, count) in sorted(self.tokens.items())
        )
        went = ", ".join(map(str, sorted(self.preempted)))
        waiting = ", ".join(map(str, self.waiting[:8])) + ", …" * (len(self.waiting) > 8)
        in_order = list(self.running) == sorted(self.running)
        return (
            f"{tokens or 'nothing'}"
            + f"; running: {', '.join(map(str, self.running))}" * (not in_order)
            + f"; {went} preempted" * bool(went)
            + (f"; waiting: {waiting}" if waiting else "; nobody waits")
        )


class Moment:
    """The state of a scheduler and its block manager, copied."""

    def __init__(self, scheduler: Any) -> None:
        self.limits = (scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        self.manager = _copied_manager(scheduler.block_manager)
        self.running = [_noted(seq) for seq in scheduler.running]
        self.waiting = [_noted(seq) for seq in scheduler.waiting]
        self.num_steps = scheduler.stats.num_steps
        self.free_slots = list(scheduler.free_slots)

    def plan(self, policy: type[SchedulerBase]) -> Plan:
        """The step that this policy plans here."""
        scheduler = policy(_copied_manager(self.manager), *self.limits)
        scheduler.running = [_made(noted) for noted in self.running]
        scheduler.waiting = deque(map(_made, self.waiting))
        scheduler.stats.num_steps = self.num_steps
        scheduler.free_slots = list(self.free_slots)
        try:
            return Plan.of(scheduler.schedule(), scheduler)
        except (AssertionError, LookupError, ValueError) as error:
            return Plan.failed(error)


#: What changes in place comes first.
_LISTS = ("token_ids", "block_table", "block_hashes")
_FIELDS = (*_LISTS, *({field.name for field in fields(Sequence)} - set(_LISTS)))
_values = attrgetter(*_FIELDS)


def _noted(seq: Sequence) -> tuple:
    """The values of `_FIELDS`. A check notes a hundred thousand sequences: `copy` takes longer."""
    tokens, table, hashes, *others = _values(seq)
    return (tokens.copy(), table.copy(), hashes.copy(), *others)


def _made(noted: tuple) -> Sequence:
    seq = object.__new__(Sequence)
    for name, value in zip(_FIELDS, noted, strict=True):
        setattr(seq, name, value)
    seq.token_ids, seq.block_table = seq.token_ids.copy(), seq.block_table.copy()
    seq.block_hashes = seq.block_hashes.copy()
    return seq


def _copied_manager(manager: BlockManager) -> BlockManager:
    other = BlockManager(0, manager.block_size, manager.enable_prefix_caching)
    other.blocks = [
        Block(block.block_id, block.ref_count, block.block_hash, block.token_ids)
        for block in manager.blocks
    ]
    other.free_blocks = OrderedDict(manager.free_blocks)
    other.hash_to_block = dict(manager.hash_to_block)
    return other
