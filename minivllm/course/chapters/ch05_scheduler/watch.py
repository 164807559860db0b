"""A scheduler under watch: does a queue order of 05.6 do more than order the queue?"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from minivllm.course.chapters.ch05_scheduler.common import misuse, the_count
from minivllm.course.grading.errors import CheckError, Mistake
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sequence import ScheduledBatch, Sequence
from minivllm.sampling_params import SamplingParams

#: What the message of a broken rule ends with.
ONLY_ORDER = (
    "Before each step you may put `self.waiting` into another order. All the rest stays as it is,"
    " and `super().schedule()` plans the step."
)


class Watch:
    """Makes schedulers of a learner's class for `simulate`, and judges each of their steps.

    where: the run, as messages name it ("On the busy day"). answers: for each request, by number,
    the length of its answer, which the sequence then carries in its parameters; None: they do not
    tell. honest: False gives them other lengths than those that come. neighbour: whether another
    scheduler of the class works in between. steps_before: how many steps the engine has had.

    admitted: the numbers of the requests, in the order in which they began to run.
    """

    def __init__(
        self,
        answer: type,
        where: str,
        answers: list[int] | None = None,
        honest: bool = True,
        neighbour: bool = False,
        steps_before: int = 0,
    ) -> None:
        self.answer, self.where, self.answers, self.honest = answer, where, answers, honest
        self.neighbour = _Neighbour(answer) if neighbour else None
        self.admitted: list[int] = []
        self.preempted: set[int] = set()
        self.steps_before = steps_before
        self.number = -1
        self.ran_last: list[Sequence] = []

    def __call__(self, manager: Any, places: int, budget: int) -> Any:
        """What `simulate` calls to make its scheduler."""
        self.scheduler = scheduler = self.answer(manager, places, budget)
        self.limits = (places, budget, manager.num_blocks)
        scheduler.stats.num_steps = self.steps_before
        self.plan, self.take = scheduler.schedule, scheduler.add
        scheduler.schedule, scheduler.add = self.schedule, self.add
        return scheduler

    def fail(self, name: str, seen: str, hint: str = ONLY_ORDER) -> None:
        raise Mistake(name, f"{self.where}, in step {self.number}: {seen}\n{hint}")

    def add(self, seq: Sequence) -> None:
        """Tell what the parameters may tell, and require that the request is in the queue then."""
        if self.answers is not None:
            length = self.answers[seq.seq_id]
            if not self.honest:
                length = max(self.answers) + min(self.answers) + 1 - length
                seq.request_id, seq.seed = f"r{10_000 - seq.seq_id}", 7 * seq.seq_id
                seq.token_ids = [(37 * seq.seq_id + i) % 101 for i in range(seq.num_tokens)]
            seq.params = SamplingParams(max_tokens=length)
            # An answer may not end before the simulator ends it.
            seq.max_num_tokens = seq.num_tokens + length + (0 if self.honest else 4096)
        self.take(seq)
        if not any(seq is other for other in self.scheduler.waiting):
            raise Mistake(
                "never-queued",
                f"{self.where}: request {seq.seq_id} came, and after your `add` it is not in"
                " `self.waiting`.\nWhatever you note in `add`, call `super().add(seq)` too: it"
                " puts the request into the queue.",
            )

    def schedule(self) -> ScheduledBatch:
        """The learner's step, judged."""
        self.number += 1
        scheduler = self.scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        if [seq for seq in self.ran_last if not seq.is_finished] != running:
            self.fail("changes-running", "the list `running` was changed between two steps.")
        if self.neighbour:
            self.neighbour.work()
        batch = self._planned()
        if not isinstance(batch, ScheduledBatch):
            self.fail(
                "no-plan",
                f"your `schedule` returned {batch!r}.",
                "The step is what `super().schedule()` returns: return it.",
            )
        if len(scheduler.in_flight) > 1:
            self.fail(
                "planned-twice",
                "your `schedule` planned two steps, and returned one.",
                "Each call of `super().schedule()` plans a step: call it once.",
            )
        self._require_deque()
        self._judge_queues(batch, running, waiting)
        self._judge_limits(batch)
        self._judge_running(batch, running)
        self._judge_held_back(batch)
        self.admitted += [seq.seq_id for seq in batch.admitted]
        self.preempted |= {seq.seq_id for seq in batch.preempted}
        self.ran_last = list(scheduler.running)
        return batch

    def _planned(self) -> Any:
        try:
            return self.plan()
        except CheckError:
            raise
        except KeyError as error:
            if error.args and error.args[0] in self.preempted:
                raise Mistake(
                    "forgets-the-preempted",
                    f"{self.where}, in step {self.number}: your code raised KeyError:"
                    f" {error.args[0]}.\nRequest {error.args[0]} had begun to run, and was"
                    " preempted. So it is in `waiting` again, without another `add`: keep your"
                    " note about it until it has finished.",
                ) from error
            raise
        except AttributeError:
            self._require_deque()
            raise
        except AssertionError as error:
            if not str(error):
                raise
            name, hint = misuse(str(error))
            raise Mistake(
                name, f"{self.where}, in step {self.number}: {error}.\n{hint} {ONLY_ORDER}"
            ) from error

    def _require_deque(self) -> None:
        waiting = self.scheduler.waiting
        if not isinstance(waiting, deque):
            self.fail(
                "not-a-deque",
                f"`self.waiting` is a {type(waiting).__name__} now.",
                "The scheduler takes requests from its left end with `popleft`, so it must stay a"
                " deque: `self.waiting = deque(sorted(…))`.",
            )

    def _judge_queues(
        self, batch: ScheduledBatch, running: list[Sequence], waiting: list[Sequence]
    ) -> None:
        """Nobody may be missing afterwards, and nobody may be there twice."""
        scheduler = self.scheduler
        ids = [seq.seq_id for seq in [*scheduler.running, *scheduler.waiting]]
        before = {seq.seq_id for seq in [*running, *waiting]}
        if len(ids) == len(before) and before == set(ids):
            return
        after = Counter(ids)
        if lost := sorted(before - set(after)):
            self.fail(
                "lost-request",
                f"{the_count(len(lost), 'request')} went missing; the first is number {lost[0]},"
                " neither in `waiting` nor in `running` afterwards.",
                "A queue may let requests wait, but not send them away: `waiting` must hold the"
                " same requests as before, in another order.",
            )
        twice = [number for number, count in after.items() if count > 1 or number not in before]
        if twice:
            self.fail("queued-twice", f"request {twice[0]} stands in the queues twice.")

    def _judge_limits(self, batch: ScheduledBatch) -> None:
        scheduler = self.scheduler
        places, budget, _ = self.limits
        now = (
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens,
            scheduler.block_manager.num_blocks,
        )
        if now != self.limits:
            self.fail(
                "changes-limits",
                f"the limits are {_limits(now)}; they were {_limits(self.limits)}.",
            )
        if len(scheduler.running) > places or batch.num_tokens > budget:
            self.fail(
                "changes-limits",
                f"{len(scheduler.running)} requests run and {batch.num_tokens} tokens are"
                f" computed; the limits are {_limits(self.limits)}.",
            )

    def _judge_running(self, batch: ScheduledBatch, running: list[Sequence]) -> None:
        """Who ran before comes first, in the same order; only the last ones may be preempted."""
        after = self.scheduler.running
        if gone := [seq for seq in running if seq not in after and seq not in batch.preempted]:
            self.fail("changes-running", f"request {gone[0].seq_id} was taken out of `running`.")
        kept = len(running) - len([seq for seq in batch.preempted if seq in running])
        if after[:kept] != running[:kept]:
            self.fail(
                "changes-running",
                "the list `running` has another order than before, or not its last was preempted.",
            )

    def _judge_held_back(self, batch: ScheduledBatch) -> None:
        scheduler = self.scheduler
        places, budget, _ = self.limits
        left, free = budget - batch.num_tokens, scheduler.block_manager.num_free_blocks
        if batch.preempted or not left or len(scheduler.running) >= places:
            return
        # A queue of hundreds, in each step: only its first one that does not fit is looked for.
        blocks, waiting = scheduler.block_manager.num_blocks_for, scheduler.waiting
        if waiting and all(blocks(min(seq.num_tokens, left)) <= free for seq in waiting):
            self.fail(
                "holds-back",
                f"{the_count(left, 'token')} of the budget, a place and blocks are free, and yet"
                f" {the_count(len(waiting), 'request')} must wait.",
                f"A step that is not full costs the time of a full one. {ONLY_ORDER}",
            )
        if not batch and (waiting or scheduler.running):
            self.fail("stalled", "nothing is planned.")


class _Neighbour:
    """Another scheduler of the class, in the same process, with requests of the same numbers.

    Two engines may live in one process. Their requests are numbered from 0 in both.
    """

    def __init__(self, answer: type) -> None:
        self.scheduler: Any = answer(BlockManager(64, 16, False), 4, 64)
        self.scheduler.stats.num_steps = 5000  # it has been at work for long
        self.count = 0

    def work(self) -> None:
        """One step, and a new request before it."""
        if self.count % 3 == 0:
            number = self.count // 3
            self.scheduler.add(
                Sequence(number, [0] * 100, SamplingParams(), max_num_tokens=102 + number % 4)
            )
        self.count += 1
        batch = self.scheduler.schedule()
        if batch:
            self.scheduler.update(batch, [[0] for _ in batch.sampled])


def _limits(limits: tuple[int, int, int]) -> str:
    places, budget, blocks = limits
    return f"{places} places, a budget of {budget} tokens and {blocks} blocks"
