"""05.4: debug this: requests that vanish."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from minivllm.course.chapters.ch05_scheduler.common import misuse, the_count
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.course.sim.simulator import STEPS, Arrival, Simulation, simulate
from minivllm.engine.scheduler import Scheduler
from minivllm.errors import SchedulerStalledError


def check_admission(answer: type) -> str:
    expect(
        isinstance(answer, type) and issubclass(answer, Scheduler),
        "wrong-type",
        "Leave it a subclass of Scheduler, with a method `schedule_waiting(self, batch,"
        f" budget)`.\nYou handed in {answer!r}.",
    )
    rng = Random(4)
    count = 0
    for number in range(60):
        work = [
            Arrival(rng.randint(0, 12), rng.randint(1, 20), rng.randint(1, 8))
            for _ in range(3 + number // 4)
        ]
        limits = {
            "max_num_batched_tokens": rng.choice([3, 8, 16, 64]),
            "max_num_seqs": rng.randint(1, 4),
            "num_blocks": rng.randint(8, 20),
            "block_size": 4,
        }
        told = f"With {len(work)} requests, {_words(limits)}:"
        try:
            run = simulate(work, scheduler_cls=answer, cost=STEPS, **limits)
        except SchedulerStalledError as error:
            raise Mistake(
                "stalled", f"{told} {error}\nDoes anybody wait who fits, or would fit in chunks?"
            ) from error
        except AssertionError as error:
            if not str(error):
                raise
            name, hint = misuse(str(error))
            raise Mistake(name, f"{told} {error}.\n{hint}") from error
        _check_admission(run, told, limits)
        right = simulate(work, cost=STEPS, **limits)
        for step, (mine, theirs) in enumerate(zip(_plans(run), _plans(right), strict=False)):
            if mine != theirs:
                raise Mistake(
                    "another-plan",
                    f"{told} nobody is lost, but step {step} computes {mine}; expected {theirs}"
                    " (request: tokens).\nAdmit whoever is at the head of the queue with as many"
                    " tokens as fit the budget; stop at the first who does not fit.",
                )
        count += len(work)
    return f"{count} requests in, {count} answers out"


def _check_admission(run: Simulation, told: str, limits: dict[str, int]) -> None:
    budget = limits["max_num_batched_tokens"]
    for step in run.trace.steps:
        expect(
            step.num_tokens <= budget,
            "over-budget",
            f"{told} step {step.step} computes {step.num_tokens} tokens.\nThe budget is {budget}"
            " tokens a step.",
        )
    if run.lost:
        first = run.lost[0]
        waited = run.requests[first].steps_waited
        raise Mistake(
            "lost-request",
            f"{told} {len(run.lost)} never get an answer. The first is number {first}: it stood in"
            f" the queue for {the_count(waited, 'step')}, then it was neither there nor running.\nWho"
            " takes a request out of the queue must run it, or put it back where it was.",
        )
    started = sorted(run.requests, key=lambda r: (r.first_scheduled, r.sequence.seq_id))
    ids = [request.sequence.seq_id for request in started]
    late = next((b for a, b in pairwise(ids) if b < a), None)
    for (
        step
    ) in run.trace.steps:  # who was preempted has started before, and may be overtaken all the same
        running, waiting = (
            [int(name.partition("/")[0]) for name in names]
            for names in (step.running, step.waiting)
        )
        if late is None and running and waiting and min(waiting) < max(running):
            late = min(waiting)
    if late is not None:
        raise Mistake(
            "overtaken",
            f"{told} nobody is lost, but request {late} waits while one that came later runs.\nA"
            " request that does not fit stays at the head of the queue: put back at its end, or"
            " skipped, it could wait for ever.",
        )


def _plans(run: Simulation) -> list[dict[str, int]]:
    return [
        {item.request_id: item.num_new_tokens for item in step.scheduled}
        for step in run.trace.steps
    ]


def _words(limits: dict[str, int]) -> str:
    return (
        f"a budget of {limits['max_num_batched_tokens']}, {the_count(limits['max_num_seqs'], 'place')}"
        f" and {limits['num_blocks']} blocks of {limits['block_size']} tokens"
    )


EXERCISE = Exercise(
    id="05.4",
    title="Debug this: requests that vanish",
    check=check_admission,
    mistakes=(
        Known(
            "lost-request",
            hint=2,
            answers=r"""
# %% put back when there are no blocks, not when there is no budget
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting:
            seq = self.waiting.popleft()
            num_new = min(seq.num_tokens, budget)
            if num_new == 0 or len(self.running) == self.max_num_seqs:
                break
            if not self.block_manager.allocate(seq, num_new):
                self.waiting.appendleft(seq)
                break
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new

# %% goes on with the next one instead of stopping
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            seq = self.waiting.popleft()
            num_new = min(seq.num_tokens, budget)
            if not self.block_manager.allocate(seq, num_new):
                continue
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new
""",
        ),
        Known(
            "overtaken",
            hint=3,
            answers=r"""
# %% put back at the end of the queue
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting:
            seq = self.waiting.popleft()
            num_new = min(seq.num_tokens, budget)
            no_place = len(self.running) == self.max_num_seqs
            if (
                num_new == 0
                or no_place
                or not self.block_manager.allocate(seq, num_new)
            ):
                self.waiting.append(seq)
                break
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new

# %% who does not fit is skipped, and the next one tried
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        for seq in list(self.waiting):
            num_new = min(seq.num_tokens, budget)
            no_place = len(self.running) == self.max_num_seqs
            if (
                num_new == 0
                or no_place
                or not self.block_manager.allocate(seq, num_new)
            ):
                continue
            self.waiting.remove(seq)
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new
""",
        ),
        Known(
            "over-budget",
            answers=r"""
# %% takes the whole prompt whenever anything of the budget is left
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not self.block_manager.allocate(seq, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
            self.compute(batch, seq, seq.num_tokens)
            budget -= seq.num_tokens
""",
        ),
        Known(
            "stalled",
            hint=2,
            answers=r"""
# %% waits until the whole prompt fits the budget
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting:
            seq = self.waiting[0]
            no_place = len(self.running) == self.max_num_seqs
            if (
                seq.num_tokens > budget
                or no_place
                or not self.block_manager.allocate(seq, seq.num_tokens)
            ):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
            self.compute(batch, seq, seq.num_tokens)
            budget -= seq.num_tokens
""",
        ),
        Known(
            "another-plan",
            answers=r"""
# %% one admission a step
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        if not self.waiting or budget == 0 or len(self.running) == self.max_num_seqs:
            return
        seq = self.waiting[0]
        num_new = min(seq.num_tokens, budget)
        if self.block_manager.allocate(seq, num_new):
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
""",
        ),
        Known(
            "too-many-places",
            answers=r"""
# %% the check for a free place got lost
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0:
            seq = self.waiting[0]
            num_new = min(seq.num_tokens, budget)
            if not self.block_manager.allocate(seq, num_new):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new
""",
        ),
    ),
    right=r"""
# %% put back where it was
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting:
            seq = self.waiting.popleft()
            num_new = min(seq.num_tokens, budget)
            no_place = len(self.running) == self.max_num_seqs
            if (
                num_new == 0
                or no_place
                or not self.block_manager.allocate(seq, num_new)
            ):
                self.waiting.appendleft(seq)
                break
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new

# %% the conditions in the loop's head
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            num_new = min(seq.num_tokens, budget)
            if not self.block_manager.allocate(seq, num_new):
                return
            self.waiting.popleft()
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new
""",
)
