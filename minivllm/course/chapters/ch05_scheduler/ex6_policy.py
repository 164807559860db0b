"""05.6: a better queue."""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from minivllm.course.chapters.ch05_scheduler.watch import Watch
from minivllm.course.grading.chance import expect_no_chance, world
from minivllm.course.grading.compare import difference
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_all
from minivllm.course.sim.queues import (
    CRAMPED,
    CROWDS,
    EARLY,
    ROOMY,
    Crowd,
    busy_day,
    longest_early_wait,
)
from minivllm.course.sim.simulator import Arrival, Simulation, simulate
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import Sequence
from minivllm.errors import SchedulerStalledError
from minivllm.sampling_params import SamplingParams

#: What a policy must reach, beside the order of arrival.
MEDIAN, WORST, THROUGHPUT = 0.7, 1.5, 0.97
#: By how much an early wait may grow when four times as many requests come: this factor, and steps.
GROWTH, STEPS_MORE = 1.6, 10
#: So many steps the engine has had when a crowd comes.
LONG_AT_WORK = 100_000


def check_policy(answer: type) -> str:
    expect(
        isinstance(answer, type) and issubclass(answer, Scheduler) and answer is not Scheduler,
        "wrong-type",
        f"Hand in a subclass of Scheduler.\nYou handed in {answer!r}.",
    )
    mine = _run(answer, "On the busy day", busy_day)
    _judge_alike(answer)
    for crowd in CROWDS:
        _judge_crowd(answer, crowd)
    _judge_busy_day(mine)
    # An engine that has been at work for long must be as good as a new one.
    where = f"On the busy day of an engine that has taken {LONG_AT_WORK:,} steps"
    later = _run(answer, where, busy_day, steps_before=LONG_AT_WORK)
    _judge_busy_day(later, f"{where}: ")
    return "better for most, bearable for all, and nobody starves"


def _run(answer: type, where: str, runs: Callable[[Any], Any], **watched: Any) -> Any:
    """runs(scheduler_cls), where the scheduler is the learner's, under watch."""
    try:
        return runs(Watch(answer, where, **watched))
    except SchedulerStalledError as error:
        raise EXERCISE.mistake("stalled", f"{where}: {error}") from error


# --- on the busy day ------------------------------------------------------------------------------


@functools.cache
def _in_order() -> Simulation:
    """The busy day in order of arrival."""
    return busy_day(Scheduler)


def _judge_busy_day(mine: Simulation, begins: str = "") -> None:
    """Throughput, median and worst of TTFT; one Mistake for all that are missed.

    begins: of the messages.
    """
    right = _in_order()
    my_median, median = (run.summary()["TTFT median"] for run in (mine, right))
    my_worst, worst = (1000 * max(run.ttfts) for run in (mine, right))
    seen = (
        f"{mine.throughput:,.0f} tokens per second, beside {right.throughput:,.0f} in order of"
        " arrival.",
        f"The median TTFT is {my_median:,.0f} ms, beside {median:,.0f} ms in order of arrival; at"
        f" most {MEDIAN * median:,.0f} ms are asked for.",
        f"The worst TTFT is {my_worst:,.0f} ms, beside {worst:,.0f} ms in order of arrival; at most"
        f" {WORST * worst:,.0f} ms are asked for.",
    )
    seen = tuple(begins + one for one in seen)
    expect_all(
        partial(_require, mine.throughput >= THROUGHPUT * right.throughput, "too-slow", seen[0]),
        partial(_require, my_median <= MEDIAN * median, "no-better", seen[1]),
        partial(_require, my_worst <= WORST * worst, "worst-too-long", seen[2]),
    )


def _require(condition: bool, name: str, seen: str) -> None:
    if not condition:
        raise EXERCISE.mistake(name, seen)


# --- in a crowd -----------------------------------------------------------------------------------


def _judge_crowd(answer: type, crowd: Crowd) -> None:
    """An early request must not wait for longer because more requests come later."""
    waits = {}
    for count in (150, 600):
        where = f"In a crowd of {count} requests that come {crowd.what}"
        runs = partial(longest_early_wait, crowd=crowd, num_requests=count)
        # An engine that has been at work for long must be as fair as a new one.
        waits[count] = _run(answer, where, runs, steps_before=LONG_AT_WORK)
    few, many = waits[150], waits[600]
    if many.steps_waited <= GROWTH * few.steps_waited + STEPS_MORE:
        return
    seq, fair = many.sequence, longest_early_wait(Scheduler, crowd, 600)
    went = " After a preemption it had to wait again." if seq.num_preemptions else ""
    raise EXERCISE.mistake(
        "starves",
        f"Requests keep coming, {crowd.what}. Of those who come in the first {EARLY:.0f} s, one"
        f" waits for {few.steps_waited:,} steps if 150 come in all, and one for"
        f" {many.steps_waited:,} if 600 come; in order of arrival it is {fair.steps_waited:,}.\nThe"
        f" second is request {seq.seq_id}: its prompt has {seq.num_prompt_tokens:,} tokens, it came"
        f" at {many.arrival.time:.2f} s.{went}",
    )


# --- the same decisions everywhere ----------------------------------------------------------------

#: Requests of which three come at the same moment, with prompts of the same length.
TIES = [Arrival(0.024 * (i // 3), (100, 400, 400, 900)[i // 3 % 4], 10 + i % 31) for i in range(90)]


def _order(answer: type, where: str, **watched: Any) -> list[int]:
    """The order in which the requests of `TIES` begin to run, those again that were preempted.

    First with a large cache, then with a small one.
    """
    order: list[int] = []
    for limits in (ROOMY, CRAMPED):
        watch = Watch(answer, where, [arrival.output_tokens for arrival in TIES], **watched)
        _run_ties(watch, limits)
        # Of one length, so that the first difference is shown, and not the lengths.
        order += watch.admitted + [-1] * (400 - len(watch.admitted))
    return order


def _run_ties(watch: Watch, limits: dict[str, int]) -> None:
    try:
        simulate(TIES, scheduler_cls=watch, trace=False, **limits)
    except SchedulerStalledError as error:
        raise EXERCISE.mistake("stalled", f"{watch.where}: {error}") from error


def _judge_alike(answer: type) -> None:
    """The order may depend on the requests and on counts of steps, and on nothing else."""
    where, before = "Where several requests come at once", _notes(answer)
    with world(1, answer) as asked:
        alone = _order(answer, where)
    if clocks := sorted(asked - {"hash", "id", "os.getpid"}):
        raise EXERCISE.mistake("machine-clock", f"Your order calls {', '.join(clocks)}.")
    kept = _shuffled_addresses()
    try:
        again = expect_no_chance(
            lambda: _order(answer, where), "the order in which requests begin to run", answer
        )
    except Mistake:
        _judge_notes(answer, before, "")
        raise
    del kept
    if found := difference(again, alone, 0.0, 0.0):
        _judge_notes(answer, before, found[1])
        raise Mistake(
            "by-chance",
            f"Two runs on the same requests begin them in another order: {found[1]}.\nYour order"
            " depends on more than the requests and counts of steps: on random numbers, on the"
            " order of a set, or on notes that outlive a scheduler.",
        )
    if asked and (found := difference(_order(answer, where), alone, 0.0, 0.0)):
        raise Mistake(
            "by-chance",
            f"Two runs on the same requests begin them in another order: {found[1]}.\nYour order"
            f" depends on {', '.join(sorted(asked))}, which another process answers otherwise. Use"
            " the requests and your counts only.",
        )
    other = _order(answer, where, honest=False)
    if found := difference(other, alone, 0.0, 0.0):
        _judge_notes(answer, before, found[1])
        raise EXERCISE.mistake(
            "knows-the-answer",
            f"With other parameters and other words the order changes: {found[1]}.",
        )
    beside = _order(answer, f"{where}, beside another scheduler of your class", neighbour=True)
    if found := difference(beside, alone, 0.0, 0.0):
        raise EXERCISE.mistake("shared-notes", f"The order changes: {found[1]}.")


def _shuffled_addresses() -> list[Sequence]:
    """Have the next sequences lie at addresses in no order, so that a set of them has another one.

    It is so as long as the result is kept.
    """
    spare = [Sequence(i, [0], SamplingParams()) for i in range(2000)]
    Random(6).shuffle(spare)
    kept = spare[::8]
    while spare:
        spare.pop()
    return kept


def _judge_notes(answer: type, before: dict[str, Any], seen: str) -> None:
    """Raise Mistake where variables outside of the schedulers have changed."""
    after = _notes(answer)
    if names := sorted(name for name in after if after[name] != before.get(name)):
        raise EXERCISE.mistake(
            "shared-notes",
            f"{', '.join(names)} changed while schedulers worked. {seen}".strip(),
        )


def _notes(answer: type) -> dict[str, Any]:
    """Copies of what the answer could keep outside of `self`: on classes, in global variables."""
    found: dict[str, Any] = {}
    plain = (dict, list, set, deque, int, float, tuple)
    for kind in answer.__mro__:
        if kind.__module__.startswith(("minivllm.", "builtins")):
            continue
        for name, value in vars(kind).items():
            if isinstance(value, plain) and not name.startswith("__"):
                found[f"{kind.__name__}.{name}"] = copy.copy(value)
            code = getattr(value, "__code__", None)
            for used in code.co_names if code else ():
                if isinstance(value.__globals__.get(used), plain):
                    found[used] = copy.copy(value.__globals__[used])
    return found


EXERCISE = Exercise(
    id="05.6",
    title="A better queue",
    check=check_policy,
    mistakes=(
        Known(
            "starves",
            "Who has waited for long enough must be next, however long the prompt, whoever has come"
            " since, and however many wait. Those who have waited for long enough go in order of"
            " arrival: if they go by length, the longest of them waits again. A request that was"
            " preempted keeps its age.",
            hint=1,
            answers=r"""
# %% the shortest first
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.num_tokens))
        return super().schedule()

# %% two lanes, the short one first; best on the busy day
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(
            sorted(self.waiting, key=lambda seq: (seq.num_tokens > 900, seq.seq_id))
        )
        return super().schedule()

# %% who has waited for long is ordered by length again
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        return (age <= 20, seq.num_tokens)

# %% patience for very long prompts only
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        late = age > 20 and seq.num_tokens > 2500
+        return (False, seq.seq_id) if late else (True, seq.num_tokens)

# %% the shortest first while the queue is short, in order of arrival else
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        late = len(self.waiting) > 40
+        return (False, seq.seq_id) if late else (True, seq.num_tokens)

# %% no patience while the queue is long
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        late = age > 20 and len(self.waiting) < 300
+        return (False, seq.seq_id) if late else (True, seq.num_tokens)

# %% the age of a request begins anew when it is preempted
@@
         self.waiting = deque(sorted(self.waiting, key=self.rank))
-        return super().schedule()
+        batch = super().schedule()
+        for seq in batch.preempted:
+            self.arrived[seq.seq_id] = self.stats.num_steps
+        return batch

# %% patience in the first steps of the engine only
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        late = age > 20 and self.stats.num_steps < 2000
+        return (False, seq.seq_id) if late else (True, seq.num_tokens)

# %% age in relation to length: the longer the prompt, the longer everybody lets it wait
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        return True, -(300 * age + seq.num_tokens) // seq.num_tokens
""",
        ),
        Known("stalled", "Reorder `self.waiting`; leave the planning to `super().schedule()`."),
        Known(
            "too-slow",
            "Is the budget used up in every step while somebody waits?",
        ),
        Known(
            "no-better",
            "Let short prompts pass more often, or patience last longer.",
            hint=3,
            answers=r"""
# %% in order of arrival, which it is anyway
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.seq_id))
        return super().schedule()

# %% age counts so much that nothing else does
@@
-    def rank(self, seq: Sequence) -> tuple[bool, int]:
+    def rank(self, seq: Sequence) -> int:
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        return seq.num_tokens - 1000 * age

# %% the clock of the notes begins anew every thousand steps
@@
-        self.arrived[seq.seq_id] = self.stats.num_steps
+        self.arrived[seq.seq_id] = self.stats.num_steps % 1000
""",
        ),
        Known(
            "worst-too-long",
            "In the crowds nobody starves, but here somebody waits for too long: let patience end"
            " earlier.",
            hint=3,
            answers=r"""
# %% age counts, but too little
@@
-    def rank(self, seq: Sequence) -> tuple[bool, int]:
+    def rank(self, seq: Sequence) -> int:
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        return seq.num_tokens - 100 * age
""",
        ),
        Known(
            "lost-request",
            answers=r"""
# %% long prompts are sent away
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        for seq in [seq for seq in self.waiting if seq.num_tokens > 2500]:
            self.finish(seq, "abort")
        return super().schedule()

# %% only the first hundred are kept
@@
-        self.waiting = deque(sorted(self.waiting, key=self.rank))
+        self.waiting = deque(sorted(self.waiting, key=self.rank)[:100])
""",
        ),
        Known(
            "holds-back",
            answers=r"""
# %% few at a time, so that nobody waits behind a long one
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        waiting = sorted(self.waiting, key=lambda seq: seq.seq_id)
        keep = waiting if len(self.running) < 8 else []
        self.waiting = deque(keep)
        batch = super().schedule()
        if not keep:
            self.waiting = deque(waiting)
        return batch
""",
        ),
        Known(
            "changes-limits",
            answers=r"""
# %% more places
@@
         self.waiting = deque(sorted(self.waiting, key=self.rank))
+        self.max_num_seqs = 1000
         return super().schedule()

# %% a larger budget while the step is planned
@@
         self.waiting = deque(sorted(self.waiting, key=self.rank))
-        return super().schedule()
+        self.max_num_batched_tokens *= 2
+        batch = super().schedule()
+        self.max_num_batched_tokens //= 2
+        return batch
""",
        ),
        Known(
            "changes-running",
            answers=r"""
# %% somebody who runs is sent back to the queue
@@
         self.waiting = deque(sorted(self.waiting, key=self.rank))
-        return super().schedule()
+        batch = super().schedule()
+        if self.waiting and len(self.running) > 4:
+            self.waiting.append(self.running.pop())
+        return batch

# %% the running ones are ordered, too
@@
         self.waiting = deque(sorted(self.waiting, key=self.rank))
+        self.running.sort(key=lambda seq: -seq.num_tokens)
         return super().schedule()
""",
        ),
        Known(
            "never-queued",
            answers=r"""
# %% `add` takes a note, and nothing else
@@
-        super().add(seq)
         self.arrived[seq.seq_id] = self.stats.num_steps
""",
        ),
        Known(
            "no-plan",
            answers=r"""
# %% the plan is not returned
@@
-        return super().schedule()
+        super().schedule()
""",
        ),
        Known(
            "planned-twice",
            answers=r"""
# %% two plans
@@
         self.waiting = deque(sorted(self.waiting, key=self.rank))
+        super().schedule()
         return super().schedule()
""",
        ),
        Known(
            "not-a-deque",
            answers=r"""
# %% a sorted list
@@
-        self.waiting = deque(sorted(self.waiting, key=self.rank))
+        self.waiting = sorted(self.waiting, key=self.rank)
""",
        ),
        Known(
            "forgets-the-preempted",
            answers=r"""
# %% the note is thrown away when a request begins to run
@@
         self.waiting = deque(sorted(self.waiting, key=self.rank))
-        return super().schedule()
+        batch = super().schedule()
+        for seq in batch.admitted:
+            del self.arrived[seq.seq_id]
+        return batch
""",
        ),
        Known(
            "machine-clock",
            "Several GPUs, each with a process and a clock of its own, must decide alike, and a"
            " slow machine like a fast one. Count steps: `self.stats.num_steps`.",
            hint=2,
            answers=r"""
# %% a clock under a name of its own, which decides the order of arrival only
from time import perf_counter_ns as now


class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {
            seq.seq_id: (now(), self.stats.num_steps)
        }

    def schedule(self) -> ScheduledBatch:
        late = self.stats.num_steps - 20
        self.waiting = deque(sorted(self.waiting, key=lambda s: self.rank(s, late)))
        return super().schedule()

    def rank(self, seq: Sequence, late: int) -> tuple:
        born, step = self.born[seq.seq_id]
        return (0, born) if step < late else (1, seq.num_tokens)

# %% ties by a clock of the thread
@@
+import time
+
+
 class FairQueue(Scheduler):
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        tie = int(time.thread_time() * 1e9) % 7
+        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens, tie)

# %% the time of day
from datetime import datetime


class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: datetime.now()}

    def schedule(self) -> ScheduledBatch:
        by_age = self.stats.num_steps % 2 == 0
        self.waiting = deque(
            sorted(
                self.waiting,
                key=lambda s: (
                    self.born[s.seq_id] if by_age else datetime.min,
                    s.num_tokens,
                ),
            )
        )
        return super().schedule()
""",
        ),
        Known(
            "by-chance",
            answers=r"""
# %% ties by dice
import random


class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        by_age = self.stats.num_steps % 2 == 0
        self.waiting = deque(
            sorted(
                self.waiting,
                key=lambda s: (by_age or s.num_tokens, random.random()),
            )
        )
        return super().schedule()

# %% ties by the number of the process
import os


class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        sign = -1 if os.getpid() % 2 else 1
        by_age = self.stats.num_steps % 2 == 0
        self.waiting = deque(
            sorted(
                self.waiting,
                key=lambda s: (by_age or s.num_tokens, sign * s.seq_id),
            )
        )
        return super().schedule()

# %% patience by a hash of a text
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        late = age > 15 + hash(f"r{seq.seq_id}") % 7
+        return (False, seq.seq_id) if late else (True, seq.num_tokens)

# %% the order of a set decides ties
@@
-        self.waiting = deque(sorted(self.waiting, key=self.rank))
+        self.waiting = deque(sorted(set(self.waiting), key=self.rank))
""",
        ),
        Known(
            "knows-the-answer",
            "How long an answer will be nobody knows: `params` and `max_num_tokens` say what is"
            " allowed, not what comes, and the words of a prompt do not say it either. Order by"
            " `num_tokens`, by `seq_id`, and by what you have counted yourself.",
            answers=r"""
# %% short answers first
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        length = seq.num_tokens + seq.params.max_tokens
+        return (False, seq.seq_id) if age > 20 else (True, length)

# %% the words decide
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        rank = 1000 * seq.num_tokens + sum(seq.token_ids)
+        return (False, seq.seq_id) if age > 20 else (True, rank)
""",
        ),
        Known(
            "shared-notes",
            "Two engines may live in one process, and number their requests alike. Keep your notes"
            " in `self`, and make them in `__post_init__`: not in the class, not in a global"
            " variable.",
            answers=r"""
# %% the notes lie in the class
@@
-    def __post_init__(self) -> None:
-        super().__post_init__()
-        self.arrived = {}  # seq_id -> the step in which it came
-
+    arrived = {}
+
     def add(self, seq: Sequence) -> None:

# %% a count of all requests that ever came to a scheduler of the class
@@
         super().add(seq)
         self.arrived[seq.seq_id] = self.stats.num_steps
+        FairQueue.count = getattr(FairQueue, "count", 0) + 1
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        patience = 15 + FairQueue.count % 11
+        return (False, seq.seq_id) if age > patience else (True, seq.num_tokens)
""",
        ),
    ),
    right=r"""
# %% age against length
@@
-    def rank(self, seq: Sequence) -> tuple[bool, int]:
+    def rank(self, seq: Sequence) -> int:
@@
-        return (False, seq.seq_id) if age > 20 else (True, seq.num_tokens)
+        return seq.num_tokens - 300 * age

# %% every second step belongs to the oldest
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        by_age = self.stats.num_steps % 2 == 0
        self.waiting = deque(
            sorted(
                self.waiting, key=lambda seq: seq.seq_id if by_age else seq.num_tokens
            )
        )
        return super().schedule()

# %% two lanes, and patience; the order is made where the waiting ones are planned
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}
        super().add(seq)

    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        late = self.stats.num_steps - 25
        order = sorted(
            self.waiting,
            key=lambda s: (
                self.born[s.seq_id] > late,
                self.born[s.seq_id] > late and s.num_tokens > 900,
                s.seq_id,
            ),
        )
        self.waiting.clear()
        self.waiting.extend(order)
        super().schedule_waiting(batch, budget)

# %% by turns: a step in order of arrival, a step with the shortest first
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        short = self.stats.num_steps % 2 == 0
        self.waiting = deque(
            sorted(self.waiting, key=lambda s: (short and s.num_tokens, s.seq_id))
        )
        return super().schedule()

# %% two lists that are put together, and notes that are thrown away in the end
@@
-        self.waiting = deque(sorted(self.waiting, key=self.rank))
-        return super().schedule()
+        alive = {seq.seq_id for seq in [*self.waiting, *self.running]}
+        self.arrived = {i: step for i, step in self.arrived.items() if i in alive}
+        now = self.stats.num_steps
+        late = [seq for seq in self.waiting if now - self.arrived[seq.seq_id] > 15]
+        rest = [seq for seq in self.waiting if now - self.arrived[seq.seq_id] <= 15]
+        late.sort(key=lambda seq: (self.arrived[seq.seq_id], seq.seq_id))
+        rest.sort(key=lambda seq: seq.num_tokens)
+        self.waiting = deque(late + rest)
+        return super().schedule()
""",
)
