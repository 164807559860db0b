"""The rules of 05.5 as a scheduler, and schedulers that break one of them.

A wrong scheduler differs from the right one in one method. It names a mistake when it plans exactly
what the learner's scheduler planned, in all steps that were seen.
"""

from __future__ import annotations

from collections import deque

from minivllm.course.grading.exercise import Known
from minivllm.engine.scheduler import SchedulerBase
from minivllm.engine.sequence import ScheduledBatch, Sequence


class ByTheRules(SchedulerBase):
    """The rules, in pieces that a wrong scheduler can replace."""

    def schedule(self) -> ScheduledBatch:
        batch = ScheduledBatch()
        left = self.plan_running(batch, self.max_num_batched_tokens)
        if self.may_admit(batch):
            self.plan_waiting(batch, left)
        return batch

    def plan_running(self, batch: ScheduledBatch, left: int) -> int:
        """Returns the tokens of the budget that are left."""
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            count = self.share(seq, left)
            if count < 0 or (count and not self.make_room(batch, seq, count)):
                break
            if count:
                self.compute(batch, seq, count)
                left -= count
            index += 1
        return left

    def share(self, seq: Sequence, left: int) -> int:
        """The tokens that a running sequence computes; -1: nobody gets any more."""
        return min(seq.num_uncomputed_tokens, left)

    def make_room(self, batch: ScheduledBatch, seq: Sequence, count: int) -> bool:
        while not self.block_manager.allocate(seq, seq.num_computed_tokens + count):
            victim = self.victim(batch, seq)
            self.running.remove(victim)
            self.requeue(victim)
            self.give_up(batch, victim)
            if victim is seq:
                return False
        return True

    def victim(self, batch: ScheduledBatch, seq: Sequence) -> Sequence:
        return self.running[-1]

    def requeue(self, victim: Sequence) -> None:
        self.waiting.appendleft(victim)

    def may_admit(self, batch: ScheduledBatch) -> bool:
        return not batch.preempted

    def plan_waiting(self, batch: ScheduledBatch, left: int) -> int:
        """Returns the tokens of the budget that are left."""
        while self.waiting and left > 0 and self.has_place():
            seq = self.waiting[0]
            prefix = self.prefix(seq)
            cached = len(prefix) * self.block_manager.block_size
            count = self.first_chunk(batch, seq, cached, left)
            if count < 1:
                break
            if not self.block_manager.allocate(seq, self.wanted(seq, cached + count), prefix):
                break
            self.admit(batch, cached, count)
            left -= self.cost(cached, count)
        return left

    def admit(self, batch: ScheduledBatch, cached: int, count: int) -> None:
        seq = self.waiting.popleft()
        self.running.append(seq)
        self.start(batch, seq, cached)
        self.compute(batch, seq, count)

    def has_place(self) -> bool:
        return len(self.running) < self.max_num_seqs

    def prefix(self, seq: Sequence) -> list[int]:
        return self.block_manager.find_cached_prefix(seq)

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        """The tokens that a waiting sequence computes first; 0: it is not admitted now."""
        return min(seq.num_tokens - cached, left)

    def wanted(self, seq: Sequence, num_tokens: int) -> int:
        """The tokens for which a waiting sequence asks for blocks."""
        return num_tokens

    def cost(self, cached: int, count: int) -> int:
        """What an admission takes from the budget."""
        return count


# --- also right -----------------------------------------------------------------------------------


class ShorterChunks(ByTheRules):
    """A shorter chunk where there are no blocks for a whole one."""

    def share(self, seq: Sequence, left: int) -> int:
        manager = self.block_manager
        room = (len(seq.block_table) + manager.num_free_blocks) * manager.block_size
        room -= seq.num_computed_tokens
        count = super().share(seq, left)
        return min(count, room) if room > 0 else count


class ShorterFirstChunks(ByTheRules):
    """A shorter first chunk, too, where there are no blocks for a whole one."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        manager = self.block_manager
        revived = sum(manager.blocks[i].ref_count == 0 for i in self.prefix(seq))
        room = (manager.num_free_blocks - revived) * manager.block_size
        return min(super().first_chunk(batch, seq, cached, left), room)


class ShorterEverywhere(ShorterChunks, ShorterFirstChunks):
    """Both."""


class WaitsForBlocks(ByTheRules):
    """Waits for a block that another request computes in this step, as the package does."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        if self.is_being_computed(seq, cached // self.block_manager.block_size, batch):
            return 0
        return super().first_chunk(batch, seq, cached, left)


#: Plans of these are accepted.
RIGHT = (ByTheRules, ShorterChunks, ShorterFirstChunks, ShorterEverywhere, WaitsForBlocks)


# --- wrong: who comes first -----------------------------------------------------------------------


class WaitingFirst(ByTheRules):
    def schedule(self) -> ScheduledBatch:
        batch, before = ScheduledBatch(), list(self.running)
        left = self.plan_waiting(batch, self.max_num_batched_tokens)
        for seq in before:
            count = min(seq.num_uncomputed_tokens, left)
            if count and seq in self.running:
                if not self.make_room(batch, seq, count):
                    break
                self.compute(batch, seq, count)
                left -= count
        return batch

    def victim(self, batch: ScheduledBatch, seq: Sequence) -> Sequence:
        planned = {id(item.sequence) for item in batch.items}
        free = [other for other in self.running if id(other) not in planned]
        return free[-1]


class PromptsAlone(ByTheRules):
    """A step admits, or it continues; not both."""

    def schedule(self) -> ScheduledBatch:
        batch = ScheduledBatch()
        self.plan_waiting(batch, self.max_num_batched_tokens)
        if not batch:
            self.plan_running(batch, self.max_num_batched_tokens)
        return batch


class StaticBatches(ByTheRules):
    def may_admit(self, batch: ScheduledBatch) -> bool:
        return super().may_admit(batch) and not self.running


class AdmitsBesideNothing(ByTheRules):
    def may_admit(self, batch: ScheduledBatch) -> bool:
        return super().may_admit(batch) and not batch


class AdmitsBesideNobody(ByTheRules):
    """Admits one where nobody runs."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        return 0 if self.running else super().first_chunk(batch, seq, cached, left)


class Overtaken(ByTheRules):
    """Who does not fit is skipped, and the next one tried."""

    def plan_waiting(self, batch: ScheduledBatch, left: int) -> int:
        for seq in list(self.waiting):
            if left <= 0 or not self.has_place():
                break
            prefix = self.prefix(seq)
            cached = len(prefix) * self.block_manager.block_size
            count = min(seq.num_tokens - cached, left)
            if self.block_manager.allocate(seq, cached + count, prefix):
                self.waiting.remove(seq)
                self.running.append(seq)
                self.start(batch, seq, cached)
                self.compute(batch, seq, count)
                left -= count
        return left


class OvertakenWhole(ByTheRules):
    """Who does not fit the budget as a whole is skipped."""

    def plan_waiting(self, batch: ScheduledBatch, left: int) -> int:
        for seq in list(self.waiting):
            if not self.has_place():
                break
            prefix = self.prefix(seq)
            cached = len(prefix) * self.block_manager.block_size
            count = seq.num_tokens - cached
            if count <= left and self.block_manager.allocate(seq, cached + count, prefix):
                self.waiting.remove(seq)
                self.running.append(seq)
                self.start(batch, seq, cached)
                self.compute(batch, seq, count)
                left -= count
        return left


class NewestFirst(ByTheRules):
    """The end of the queue is admitted first."""

    def plan_waiting(self, batch: ScheduledBatch, left: int) -> int:
        self.waiting.reverse()
        left = super().plan_waiting(batch, left)
        self.waiting.reverse()
        return left


class ShortestFirst(ByTheRules):
    """The queue is ordered by length."""

    def plan_waiting(self, batch: ScheduledBatch, left: int) -> int:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.num_tokens))
        return super().plan_waiting(batch, left)


class BackOfTheQueue(ByTheRules):
    """The head of the queue goes to its end when it does not fit."""

    def plan_waiting(self, batch: ScheduledBatch, left: int) -> int:
        left = super().plan_waiting(batch, left)
        if self.waiting:
            self.waiting.rotate(-1)
        return left


# --- wrong: how many tokens -----------------------------------------------------------------------


class WholePrompts(ByTheRules):
    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        count = seq.num_tokens - cached
        return count if count <= left else 0


class WholePromptsBesideOthers(ByTheRules):
    """Chunks only in a step that is empty so far."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        count = seq.num_tokens - cached
        return 0 if count > left and batch else min(count, left)


class WholePromptsBesideRunning(ByTheRules):
    """Chunks only where nobody runs."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        count = seq.num_tokens - cached
        return 0 if count > left and self.running else min(count, left)


class WholePromptsUncached(ByTheRules):
    """The prompt must fit the budget with its cached tokens."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        return seq.num_tokens - cached if seq.num_tokens <= left else 0


class PromptOnly(ByTheRules):
    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        return min(max(seq.num_prompt_tokens - cached, 1), left)


class PrefixAgain(ByTheRules):
    """All tokens of a waiting request are computed, those from the cache, too."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        return min(seq.num_tokens, left)


class CachedInBudget(ByTheRules):
    def cost(self, cached: int, count: int) -> int:
        return cached + count


class CachedInBudgetBefore(ByTheRules):
    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        return min(seq.num_tokens, left) - cached


class CachedInBudgetTwice(CachedInBudget, CachedInBudgetBefore):
    pass


class OneAdmission(ByTheRules):
    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        return 0 if batch.admitted else super().first_chunk(batch, seq, cached, left)


class OneToken(ByTheRules):
    """Whoever runs computes one token."""

    def share(self, seq: Sequence, left: int) -> int:
        return min(seq.num_uncomputed_tokens, left, 1)


class RunningWholeOrEnd(ByTheRules):
    """Whoever runs gets all of its tokens or none, and then nobody behind it gets any."""

    def share(self, seq: Sequence, left: int) -> int:
        return seq.num_uncomputed_tokens if seq.num_uncomputed_tokens <= left else -1


class RunningWhole(ByTheRules):
    """Whoever runs gets all of its tokens or none."""

    def share(self, seq: Sequence, left: int) -> int:
        return seq.num_uncomputed_tokens if seq.num_uncomputed_tokens <= left else 0


class BudgetOneLess(ByTheRules):
    def plan_waiting(self, batch: ScheduledBatch, left: int) -> int:
        return super().plan_waiting(batch, left - 1)


class BudgetOverOneRunning(ByTheRules):
    """Lets the running ones go on only while more than one token is left."""

    def share(self, seq: Sequence, left: int) -> int:
        return super().share(seq, left) if left > 1 else -1


class BudgetOverOneBoth(BudgetOverOneRunning):
    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        return super().first_chunk(batch, seq, cached, left) if left > 1 else 0


class BudgetOverOne(ByTheRules):
    """Admits only while more than one token is left."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        return super().first_chunk(batch, seq, cached, left) if left > 1 else 0


# --- wrong: places and blocks ---------------------------------------------------------------------


class PlaceUnused(ByTheRules):
    def has_place(self) -> bool:
        return len(self.running) < self.max_num_seqs - 1


class BlocksForAll(ByTheRules):
    def wanted(self, seq: Sequence, num_tokens: int) -> int:
        return seq.num_tokens


class BlocksToTheEnd(ByTheRules):
    def wanted(self, seq: Sequence, num_tokens: int) -> int:
        return seq.max_num_tokens


class BlockOfReserve(ByTheRules):
    """One block must stay free."""

    def first_chunk(self, batch: ScheduledBatch, seq: Sequence, cached: int, left: int) -> int:
        manager, count = self.block_manager, super().first_chunk(batch, seq, cached, left)
        needed = manager.num_blocks_for(cached + count) - cached // manager.block_size
        return count if needed < manager.num_free_blocks or not self.running else 0


class NoPrefix(ByTheRules):
    def prefix(self, seq: Sequence) -> list[int]:
        return []


class NoPrefixAfterPreemption(ByTheRules):
    def prefix(self, seq: Sequence) -> list[int]:
        return [] if seq.num_preemptions else super().prefix(seq)


class OneBlockOfPrefix(ByTheRules):
    MOST = 1

    def prefix(self, seq: Sequence) -> list[int]:
        return super().prefix(seq)[: self.MOST]


class TwoBlocksOfPrefix(OneBlockOfPrefix):
    MOST = 2


class LessThanThePrefix(ByTheRules):
    def prefix(self, seq: Sequence) -> list[int]:
        return super().prefix(seq)[:-1]


# --- wrong: preemption ----------------------------------------------------------------------------


class OldestVictim(ByTheRules):
    def victim(self, batch: ScheduledBatch, seq: Sequence) -> Sequence:
        return self.running[0]


class OldestUnplannedVictim(ByTheRules):
    def victim(self, batch: ScheduledBatch, seq: Sequence) -> Sequence:
        planned = {id(item.sequence) for item in batch.items}
        return next(other for other in self.running if id(other) not in planned)


class SelfVictim(ByTheRules):
    def victim(self, batch: ScheduledBatch, seq: Sequence) -> Sequence:
        return seq


class SelfVictimGoesOn(SelfVictim):
    def plan_running(self, batch: ScheduledBatch, left: int) -> int:
        for seq in list(self.running):
            count = min(seq.num_uncomputed_tokens, left)
            if count and self.make_room(batch, seq, count):
                self.compute(batch, seq, count)
                left -= count
        return left


class LongestVictim(ByTheRules):
    def victim(self, batch: ScheduledBatch, seq: Sequence) -> Sequence:
        planned = {id(item.sequence) for item in batch.items}
        free = [other for other in self.running if id(other) not in planned]
        return max(free, key=lambda other: other.num_tokens)


class SecondNewestVictim(ByTheRules):
    """Never the one that needs the blocks, as long as there is another."""

    def victim(self, batch: ScheduledBatch, seq: Sequence) -> Sequence:
        others = [other for other in self.running if other is not seq]
        return others[-1] if others else seq


class RequeuedBehind(ByTheRules):
    def requeue(self, victim: Sequence) -> None:
        self.waiting.append(victim)


class OneVictim(ByTheRules):
    """`if` for `while`: one goes; whether that was enough is not asked, or the step ends."""

    def make_room(self, batch: ScheduledBatch, seq: Sequence, count: int) -> bool:
        end = seq.num_computed_tokens + count
        if self.block_manager.allocate(seq, end):
            return True
        victim = self.victim(batch, seq)
        self.running.remove(victim)
        self.requeue(victim)
        self.give_up(batch, victim)
        return victim is not seq and self.block_manager.allocate(seq, end)


class NoSecondTry(OneVictim):
    """One goes, and who needed the blocks gets nothing in this step."""

    def make_room(self, batch: ScheduledBatch, seq: Sequence, count: int) -> bool:
        if self.block_manager.allocate(seq, seq.num_computed_tokens + count):
            return True
        super().make_room(batch, seq, count)
        return False


class StopsWithoutBlocks(ByTheRules):
    """Who needs blocks that are not there waits, and nobody is preempted."""

    def make_room(self, batch: ScheduledBatch, seq: Sequence, count: int) -> bool:
        return self.block_manager.allocate(seq, seq.num_computed_tokens + count)


class SkipsWithoutBlocks(ByTheRules):
    """Who needs blocks that are not there is passed over."""

    def plan_running(self, batch: ScheduledBatch, left: int) -> int:
        for seq in self.running:
            count = min(seq.num_uncomputed_tokens, left)
            if count and self.block_manager.allocate(seq, seq.num_computed_tokens + count):
                self.compute(batch, seq, count)
                left -= count
        return left


class NeverItself(ByTheRules):
    """The sequence that needs blocks waits where it is the newest itself."""

    def make_room(self, batch: ScheduledBatch, seq: Sequence, count: int) -> bool:
        while not self.block_manager.allocate(seq, seq.num_computed_tokens + count):
            victim = self.running[-1]
            if victim is seq:
                return False
            self.running.remove(victim)
            self.requeue(victim)
            self.give_up(batch, victim)
        return True


class AlongACopy(ByTheRules):
    """Walks along a copy of `running`, and comes to sequences that were preempted."""

    def plan_running(self, batch: ScheduledBatch, left: int) -> int:
        for seq in list(self.running):
            count = min(seq.num_uncomputed_tokens, left)
            if count:
                if not self.make_room(batch, seq, count):
                    break
                self.compute(batch, seq, count)
                left -= count
        return left


class NewestRunningFirst(ByTheRules):
    """The end of `running` is planned first."""

    def plan_running(self, batch: ScheduledBatch, left: int) -> int:
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[-1 - index]
            count = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, count):
                break
            self.compute(batch, seq, count)
            left -= count
            index += 1
        return left


class NewestRunningFirstOfCopy(ByTheRules):
    def plan_running(self, batch: ScheduledBatch, left: int) -> int:
        for seq in reversed(list(self.running)):
            count = min(seq.num_uncomputed_tokens, left)
            if count and seq in self.running and self.make_room(batch, seq, count):
                self.compute(batch, seq, count)
                left -= count
        return left


class DecodesFirst(ByTheRules):
    def plan_running(self, batch: ScheduledBatch, left: int) -> int:
        for seq in sorted(self.running, key=lambda seq: seq.num_uncomputed_tokens > 1):
            count = min(seq.num_uncomputed_tokens, left)
            if count and seq in self.running:
                if not self.make_room(batch, seq, count):
                    break
                self.compute(batch, seq, count)
                left -= count
        return left


class DecodesFirstSorted(ByTheRules):
    """Sorts `running` itself, so that the end of it is not the newest any more."""

    def plan_running(self, batch: ScheduledBatch, left: int) -> int:
        self.running.sort(key=lambda seq: seq.num_uncomputed_tokens > 1)
        return super().plan_running(batch, left)


class AdmitsAfterPreempting(ByTheRules):
    def may_admit(self, batch: ScheduledBatch) -> bool:
        return True


class AdmitsUnlessItselfWent(ByTheRules):
    """Admits after a preemption, unless the one went that needed the blocks."""

    def may_admit(self, batch: ScheduledBatch) -> bool:
        return not batch.preempted or len(self.running) == len(batch.items)


#: The mistakes that a whole scheduler and its part for waiting requests have in common.
ADMISSION = (
    Known(
        "whole-prompts-only",
        "You admit a prompt only if all of it fits. Admit it with as many tokens as the budget has"
        " left; the rest comes in later steps.",
        suspects=(
            WholePrompts,
            WholePromptsBesideOthers,
            WholePromptsBesideRunning,
            WholePromptsUncached,
        ),
    ),
    Known(
        "prompt-only",
        "You give a waiting request the tokens of its prompt. One that was preempted has written"
        " tokens, too, and all of them have to be computed again: `num_tokens` counts them.",
        suspects=(PromptOnly,),
    ),
    Known(
        "one-admission",
        "You admit one request per step. Go on as long as budget, places and blocks last.",
        suspects=(OneAdmission,),
    ),
    Known(
        "static-batching",
        "You admit only where nobody runs. A free place can be taken in each step: that is what"
        " continuous batching means.",
        suspects=(StaticBatches, AdmitsBesideNothing, AdmitsBesideNobody),
    ),
    Known(
        "overtaken",
        "Requests are admitted in order of arrival. Who is at the head of the queue and does not"
        " fit stays there, and nobody passes: else it might wait for ever.",
        suspects=(Overtaken, OvertakenWhole, NewestFirst, BackOfTheQueue, ShortestFirst),
    ),
    Known(
        "blocks-for-all",
        "You ask for the blocks of the whole request before its first chunk. Ask for those of the"
        " tokens that this step computes; the others come with their chunks.",
        suspects=(BlocksForAll, BlocksToTheEnd),
    ),
    Known(
        "block-in-reserve",
        "You keep a block free for those who run. Admit as long as there are blocks for the tokens"
        " of this step, down to the last one: who needs a block later preempts somebody for it.",
        suspects=(BlockOfReserve,),
    ),
    Known(
        "place-unused",
        "`max_num_seqs` requests may run. You stop one earlier.",
        suspects=(PlaceUnused,),
    ),
    Known(
        "budget-unused",
        "The last token of the budget is a token, too: admit while any is left.",
        suspects=(BudgetOneLess, BudgetOverOne, BudgetOverOneRunning, BudgetOverOneBoth),
    ),
)

#: The mistakes of a whole scheduler.
DECISIONS = (
    Known(
        "waiting-first",
        "You plan the waiting requests before the running ones. Those who run come first, each with"
        " as many tokens as the budget allows; the waiting ones get what is left.",
        suspects=(WaitingFirst,),
    ),
    Known(
        "prompts-alone",
        "A step of yours either admits requests or lets the running ones go on. It does both: the"
        " running ones first, then the waiting ones with what is left of the budget.",
        suspects=(PromptsAlone,),
    ),
    Known(
        "cached-in-budget",
        "You count tokens from the prefix cache against the budget. They are not computed: only"
        " what a step computes counts.",
        suspects=(CachedInBudget, CachedInBudgetBefore, CachedInBudgetTwice),
    ),
    Known(
        "computes-the-prefix",
        "You compute all tokens of a waiting request, those in blocks from the prefix cache, too."
        " Before `start` its `num_uncomputed_tokens` does not know them: take them off.",
        suspects=(PrefixAgain,),
        hint=3,
    ),
    Known(
        "ignores-prefix-cache",
        "Before you admit a sequence, ask `find_cached_prefix`, also when it was preempted; hand"
        " the blocks to `allocate`, and the number of their tokens to `start`.",
        suspects=(NoPrefix, NoPrefixAfterPreemption),
        hint=3,
    ),
    Known(
        "part-of-the-prefix",
        "You use only a part of the blocks that `find_cached_prefix` found. All of them are good:"
        " it leaves the last token out by itself.",
        suspects=(OneBlockOfPrefix, TwoBlocksOfPrefix, LessThanThePrefix),
    ),
    Known(
        "too-short-a-chunk",
        "A running sequence gets as many of its uncomputed tokens as the budget allows: one where"
        " it decodes, many where its prompt is not complete.",
        suspects=(OneToken,),
    ),
    Known(
        "no-chunks-for-running",
        "A running sequence gets nothing where its uncomputed tokens do not fit the budget as a"
        " whole. It gets as many as the budget has left.",
        suspects=(RunningWhole, RunningWholeOrEnd),
    ),
    Known(
        "preempts-the-oldest",
        "You preempt the first in the list, or the oldest that this step has not planned: that is"
        " the very sequence that needs the blocks. The newest of the running goes, the last in the"
        " list: else nobody is sure ever to finish.",
        suspects=(OldestVictim, OldestUnplannedVictim, SelfVictim, SelfVictimGoesOn),
        hint=2,
    ),
    Known(
        "wrong-victim",
        "The newest of the running goes, the last in the list: whatever its length, and also where"
        " it is the one that needs the blocks.",
        suspects=(LongestVictim, SecondNewestVictim),
        hint=2,
    ),
    Known(
        "preempted-to-the-back",
        "Who was preempted is older than those who wait: it goes to the front of the queue.",
        suspects=(RequeuedBehind,),
        hint=2,
    ),
    Known(
        "one-victim-only",
        "One preemption may not be enough. Preempt until `allocate` says True, or until the"
        " sequence itself has gone.",
        suspects=(OneVictim,),
        hint=2,
    ),
    Known(
        "no-second-try",
        "You preempt somebody to make room, and who needed it gets nothing in this step all the"
        " same. Ask `allocate` again, and compute.",
        suspects=(NoSecondTry,),
        hint=2,
    ),
    Known(
        "never-preempts",
        "Where there are no blocks for a running sequence, you let it wait, and keep its blocks."
        " Preempt the newest of the running until there are: if need be, the sequence itself.",
        suspects=(StopsWithoutBlocks, SkipsWithoutBlocks, NeverItself),
        hint=2,
    ),
    Known(
        "plans-the-preempted",
        "You walk along a copy of `running`, and come to a sequence that this step has preempted."
        " Look whether it still runs.",
        suspects=(AlongACopy,),
        hint=2,
    ),
    Known(
        "newest-running-first",
        "You plan the running sequences newest first. They are planned oldest first; only"
        " preemption begins at the end of `running`.",
        suspects=(NewestRunningFirst, NewestRunningFirstOfCopy),
    ),
    Known(
        "decodes-first",
        "You plan those who decode before those whose prompt is not complete. Running sequences"
        " are planned oldest first, whatever they do.",
        suspects=(DecodesFirst, DecodesFirstSorted),
    ),
    Known(
        "admits-after-preempting",
        "A step that had to preempt admits nobody, or it would soon have to make room again.",
        suspects=(AdmitsAfterPreempting, AdmitsUnlessItselfWent),
    ),
)
