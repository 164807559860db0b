"""08.6: one step ahead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from random import Random
from typing import Any

from minivllm.course.chapters.ch08_cuda_graphs.common import amount, cuda_errors
from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known

#: How often a loop may ask an event that has not passed yet.
QUERIES = 2


class _TooLong(Exception):
    """The loop goes on and on."""


class _Event:
    """A step's event, which tells the engine who waits for it."""

    def __init__(self, event: Any, number: int, watch: _Watch) -> None:
        self._event, self._number, self._watch = event, number, watch
        self._asked = 0

    def synchronize(self) -> None:
        self._watch.waited_for(self._number)
        self._event.synchronize()

    def query(self) -> bool:
        passed = self._event.query()
        self._asked += not passed
        if self._asked > QUERIES:
            raise self._watch.mistake(
                "spins", f"your loop asked the event of step {self._number} {self._asked} times."
            )
        return passed


class _Watch:
    """What a loop does with an engine, call by call. what: the load, in words."""

    def __init__(self, engine: Any, what: str, limit: int) -> None:
        self.engine, self.what, self.limit = engine, what, limit
        self.calls = 0
        #: Batches that were planned and not launched.
        self.planned: list[Any] = []
        #: (batch, the engine's own step) in the order of the launches; how many were updated.
        self.launched: list[tuple[Any, Any]] = []
        self.num_updated = 0
        self.waits_when_planned = 0
        self.last_planned: Any = None
        # Symptoms that matter only if the whole run is slow.
        self.waited_for_newer = self.emptied = 0

    def mistake(self, name: str, seen: str) -> Mistake:
        return EXERCISE.mistake(name, f"{self.what}: {seen}")

    def planning(self, caller: Any) -> None:
        from minivllm.course.sim.streams import drive

        if caller is drive.__code__:
            raise self.mistake("drive-did-it", "your code calls `drive`.")
        self.calls += 1
        if self.calls > self.limit:
            raise _TooLong

    def has_planned(self, batch: Any) -> None:
        self.last_planned = batch
        self.waits_when_planned = self.engine.gpu.num_waits
        if batch is not None:
            self.planned.append(batch)

    def launching(self, batch: Any) -> None:
        if not any(batch is other for other in self.planned):
            twice = any(batch is other for other, _ in self.launched)
            raise self.mistake(
                "launched-twice" if twice else "launched-something-else",
                f"launch got {'a batch that was launched before' if twice else show(batch)}.",
            )
        if batch is not self.planned[0]:
            raise self.lost()
        self.planned.pop(0)
        if self.engine.gpu.num_waits != self.waits_when_planned:
            raise self.mistake(
                "waits-before-launch",
                "between schedule() and launch() your loop waits for the GPU.",
            )

    def lost(self) -> Mistake:
        return self.mistake(
            "planned-not-launched",
            f"of {len(self.launched) + len(self.planned)} batches that schedule() gave,"
            f" {len(self.launched)} were launched.",
        )

    def waited_for(self, number: int) -> None:
        self.waited_for_newer += number > self.num_updated

    def updating(self, batch: Any, tokens: Any) -> None:
        """Judge the arguments of update."""
        if not (isinstance(tokens, list | tuple) and all(isinstance(t, int) for t in tokens)):
            raise self.mistake("no-list-of-integers", f"update got {show(tokens)}.")
        numbers = [i for i, (other, _) in enumerate(self.launched) if other is batch]
        if not numbers:
            if any(batch is other for other in self.planned):
                raise self.mistake("updated-before-launch", "update got a batch before its launch.")
            raise self.mistake("updated-something-else", f"update got {show(batch)}.")
        number, wanted, tokens = numbers[0], self.num_updated, list(tokens)
        if number < wanted:
            raise self.mistake("updated-twice", f"update got the batch of step {number} again.")
        if number > wanted and tokens == self.tokens(wanted) != self.tokens(number):
            raise self.mistake(
                "tokens-of-another-step",
                f"update got the batch of step {number} with the tokens of step {wanted},"
                f" {show(tokens)}.",
            )
        if number > wanted:
            raise self.mistake(
                "out-of-order", f"update got step {number}; step {wanted} has not come yet."
            )
        self.judge_tokens(number, tokens)

    def judge_tokens(self, number: int, tokens: list[int]) -> None:
        """The batch is the right one: are these its tokens?"""
        arrived = self.launched[number][1].arrived.query()
        if arrived and tokens == self.tokens(number):
            return
        got = f"update got the tokens {show(tokens)} with the batch of step {number}"
        if not arrived:
            raise self.mistake("tokens-read-too-early", f"{got}, which had not run yet.")
        if tokens and not any(tokens):
            raise self.mistake(
                "tokens-read-too-early", f"{got}; they are {show(self.tokens(number))}."
            )
        others = [i for i in range(len(self.launched)) if tokens == self.tokens(i)]
        if others:
            raise self.mistake(
                "tokens-of-another-step", f"{got}; they are those of step {others[-1]}."
            )
        raise self.mistake("wrong-tokens", f"{got}, expected {show(self.tokens(number))}.")

    def updated(self) -> None:
        self.num_updated += 1
        nothing_left = self.num_updated == len(self.launched)
        self.emptied += nothing_left and self.last_planned is not None

    def tokens(self, number: int) -> list[int]:
        return self.launched[number][1].token_ids.tolist()


def _watched(requests: list[tuple[int, int]], times: dict[str, Any], what: str, limit: int) -> Any:
    """An engine that tells its `watch` about every call."""
    from minivllm.course.sim.streams import SimulatedEngine, SimulatedGPU, StepInFlight

    class Watched(SimulatedEngine):
        def schedule(self) -> Any:
            self.watch.planning(sys._getframe(1).f_code)
            batch = super().schedule()
            self.watch.has_planned(batch)
            return batch

        def launch(self, batch: Any) -> Any:
            self.watch.launching(batch)
            step = super().launch(batch)
            self.watch.launched.append((batch, step))
            number = len(self.watch.launched) - 1
            return StepInFlight(step.token_ids, _Event(step.arrived, number, self.watch))

        def update(self, batch: Any, token_ids: Any) -> None:
            self.watch.updating(batch, token_ids)
            super().update(batch, token_ids)
            self.watch.updated()

    engine: Any = Watched(SimulatedGPU(), requests, **times)
    engine.watch = _Watch(engine, what, limit)
    return engine


def check_serve(answer: Callable) -> str:
    random = Random(6)
    cases: list[tuple[list[tuple[int, int]], dict[str, Any]]] = [
        ([(5, 1)], {}),
        ([(5, 6)], {}),
        # It ends early, so one step is under way for nobody when all requests are finished.
        ([(5, 60)], {}),
        ([(5, 9), (7, 20), (3, 4)], {}),
        ([(5, 4), (7, 3), (3, 5)], {"max_num_seqs": 1}),
        ([(5, 9), (7, 20), (3, 4), (9, 30), (4, 12), (6, 25), (8, 1)], {}),
        ([(4, 10)] * 3, {"schedule_us": 900.0, "update_us": 900.0, "step_us": 1000.0}),
        ([(random.randint(2, 40), random.randint(1, 40)) for _ in range(14)], {"step_us": 2500.0}),
        # A long run: what is lost or kept only now and then shows.
        ([(random.randint(2, 40), random.randint(20, 90)) for _ in range(24)], {"max_num_seqs": 3}),
        ([(3, 80)] * 16, {"max_num_seqs": 1}),
    ]
    for requests, times in cases:
        _serve_one(answer, requests, times)
    return f"{len(cases)} loads, the right tokens, and never more than two steps under way"


def _serve_one(answer: Callable, requests: list[tuple[int, int]], times: dict[str, Any]) -> None:
    """Let the loop serve a load, and compare with loops that are known to be right."""
    from minivllm.course.sim.streams import SimulatedEngine, SimulatedGPU, drive

    reference = SimulatedEngine(SimulatedGPU(), requests, **times)
    limit = 4 * (drive(reference, ahead=0) + 10)
    ideal = SimulatedEngine(SimulatedGPU(), requests, **times)
    drive(ideal, ahead=1)
    engine = _watched(requests, times, f"Requests {show(requests)}", limit)
    watch = engine.watch
    try:
        with cuda_errors("in serve"):
            count = answer(engine)
    except _TooLong:
        if watch.planned:
            raise watch.lost() from None
        raise watch.mistake(
            "never-ends",
            f"after {limit} calls of schedule() your loop still runs;"
            f" {amount(engine.unfinished, 'request')} unfinished,"
            f" {amount(len(engine._in_flight), 'step')} under way.",
        ) from None
    _judge_end(engine, reference)
    _judge_speed(engine, ideal)
    if isinstance(count, bool) or not isinstance(count, int) or count != engine.num_steps:
        raise watch.mistake(
            "wrong-count", f"serve returned {show(count)}; {engine.num_steps} steps were launched."
        )


def _judge_end(engine: Any, reference: Any) -> None:
    """The loop has ended: is everything done?"""
    watch = engine.watch
    if watch.planned:
        raise watch.lost()
    if engine._in_flight:
        raise watch.mistake(
            "last-step-lost",
            f"your loop has ended with {amount(len(engine._in_flight), 'step')} under way.",
        )
    if engine.unfinished:
        raise watch.mistake(
            "stops-too-early",
            f"your loop has ended; {amount(engine.unfinished, 'request')} unfinished.",
        )
    if engine.answers != reference.answers:
        raise watch.mistake(
            "wrong-values",
            f"the answers are {show(engine.answers)}, expected {show(reference.answers)}.",
        )


def _judge_speed(engine: Any, ideal: Any) -> None:
    """As far ahead as asked for, and as fast as that can be."""
    watch, took, best = engine.watch, engine.gpu.now, ideal.gpu.now
    if engine.most_in_flight > 2:
        raise watch.mistake(
            "too-far-ahead", f"{engine.most_in_flight} steps were under way at once."
        )
    slow = f"it took {took:,.0f} microseconds; one step ahead takes {best:,.0f}."
    if engine.most_in_flight < 2 and ideal.most_in_flight == 2:
        raise watch.mistake("no-overlap", f"never more than one step was under way, and {slow}")
    if took <= 1.05 * best:
        if watch.emptied and ideal.most_in_flight == 2:
            raise watch.mistake(
                "emptied-once",
                f"after {amount(watch.emptied, 'update')} nothing was under way, though schedule()"
                " had given a batch.",
            )
        return
    if any(span.name == "wait for the GPU" for span in engine.gpu.spans):
        raise watch.mistake("waits-for-everything", slow)
    if watch.waited_for_newer > 1:
        raise watch.mistake("waits-for-the-newest", slow)
    if watch.emptied > 2:
        raise watch.mistake("two-at-a-time", slow)
    raise watch.mistake("too-slow", slow)


EXERCISE = Exercise(
    id="08.6",
    title="One step ahead",
    check=check_serve,
    mistakes=(
        Known(
            "drive-did-it",
            message=(
                "`drive` is the loop that the picture below compares with. Write your own, with"
                " schedule, launch and update."
            ),
            hint=2,
            answers=r"""
# %% the given loop
def serve(engine):
    return drive(engine, ahead=1)
""",
        ),
        Known(
            "no-overlap",
            message=("Launch the next step *before* you wait for the one that runs."),
            hint=2,
            answers=r"""
# %% wait for each step
def serve(engine):
    count = 0
    while (batch := engine.schedule()) is not None:
        step = engine.launch(batch)
        count += 1
        step.arrived.synchronize()
        engine.update(batch, step.token_ids.tolist())
    return count

# %% the older step first, then the next one
def serve(engine):
    count, before = 0, None
    while True:
        if before is not None:
            before[1].arrived.synchronize()
            engine.update(before[0], before[1].token_ids.tolist())
            before = None
        batch = engine.schedule()
        if batch is None:
            return count
        before = batch, engine.launch(batch)
        count += 1
""",
        ),
        Known(
            "waits-before-launch",
            message=(
                "Meanwhile the step that you have planned could run already. Plan, launch, and"
                " only then wait for the older step."
            ),
            hint=2,
            answers=r"""
# %% plans, waits for the older step, launches
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is None and not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            step.arrived.synchronize()
            engine.update(before, step.token_ids.tolist())
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1
""",
        ),
        Known(
            "tokens-read-too-early",
            message=(
                "The pinned tensor holds whatever was there until the copy has run. Wait for"
                " `step.arrived` first, and read the tokens after that."
            ),
            hint=1,
            answers=r"""
# %% no event
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            engine.update(oldest, step.token_ids.tolist())

# %% read first, waited afterwards
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            step = engine.launch(batch)
            under_way.append((batch, step, step.token_ids.tolist()))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step, tokens = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, tokens)
""",
        ),
        Known(
            "tokens-of-another-step",
            message=(
                "A batch and the tokens of its own step belong together: keep them as a pair"
                " from launch to update."
            ),
            hint=2,
            answers=r"""
# %% the old tokens with the new batch
@@
-            engine.update(oldest, step.token_ids.tolist())
+            engine.update(batch or oldest, step.token_ids.tolist())

# %% the old batch with the tokens of the step before it
@@
-            engine.update(oldest, step.token_ids.tolist())
+            tokens = step.token_ids.tolist()
+            before = getattr(engine, "before", tokens)
+            engine.before = tokens
+            engine.update(oldest, before)
""",
        ),
        Known(
            "waits-for-everything",
            message=(
                "gpu.synchronize() waits for all that was launched, the next step too. Wait for"
                " the event of the older one."
            ),
            hint=3,
            answers=r"""
# %% the whole GPU
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            engine.gpu.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "waits-for-the-newest",
            message=(
                "You wait for the event of a step that was launched later than the one whose"
                " tokens you bring next. The older one's has come long before."
            ),
            hint=3,
            answers=r"""
# %% the event of the step just launched
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            under_way[-1][1].arrived.synchronize()
            oldest, step = under_way.popleft()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "two-at-a-time",
            message=(
                "Again and again nothing is under way, though schedule() has just given a"
                " batch. Bring the oldest step only, and keep the newer one under way while you"
                " plan."
            ),
            hint=2,
            answers=r"""
# %% two are launched, and both are brought
def serve(engine):
    under_way, num_steps = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            num_steps += 1
        elif not under_way:
            return num_steps
        if len(under_way) > 1 or batch is None:
            while under_way:
                oldest, step = under_way.popleft()
                step.arrived.synchronize()
                engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "too-slow",
            message=(
                "The GPU waits for your loop now and then. When is no step under way, though"
                " there is something to compute?"
            ),
            hint=2,
            answers=r"""
# %% one step ahead in every second turn only, after a while
def serve(engine):
    under_way, num_steps = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            num_steps += 1
            engine.gpu.work("look around", 3000.0)
        elif not under_way:
            return num_steps
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "planned-not-launched",
            message=(
                "What schedule() gives is planned: the scheduler counts on it, and does not"
                " plan it again. Call schedule() once per turn, keep what it gives, and launch"
                " it."
            ),
            hint=1,
            answers=r"""
# %% asks twice
@@
-        batch = engine.schedule()
-        if batch is not None:
-            under_way.append((batch, engine.launch(batch)))
+        batch = None
+        if engine.schedule() is not None:
+            batch = engine.schedule()
+        if batch is not None:
+            under_way.append((batch, engine.launch(batch)))

# %% a plan for the end of the turn
def serve(engine):
    num_steps = 0
    while (batch := engine.schedule()) is not None:
        step = engine.launch(batch)
        num_steps += 1
        ahead = engine.schedule()
        step.arrived.synchronize()
        engine.update(batch, step.token_ids.tolist())
    return num_steps
""",
        ),
        Known(
            "launched-twice",
            message=("Each batch is launched once. Call schedule() for the next one."),
            hint=1,
            answers=r"""
# %% the same batch again
@@
-            under_way.append((batch, engine.launch(batch)))
+            under_way.append((batch, engine.launch(batch)))
+            if num_steps == 3:
+                engine.launch(batch)
""",
        ),
        Known(
            "launched-something-else",
            message=("launch wants a batch that schedule() has given."),
            hint=1,
            answers=r"""
# %% None is launched, too
@@
-        if batch is not None:
-            under_way.append((batch, engine.launch(batch)))
+        if batch is not None or under_way:
+            under_way.append((batch, engine.launch(batch)))
""",
        ),
        Known(
            "updated-twice",
            message=(
                "Each step's tokens are brought once. Take the step out of those that are under"
                " way when you bring it."
            ),
            hint=2,
            answers=r"""
# %% looks at the oldest, and leaves it there
def serve(engine):
    under_way, num_steps = [], 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            num_steps += 1
        elif not under_way:
            return num_steps
        if len(under_way) > 1 or batch is None:
            oldest, step = under_way[0]
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "updated-before-launch",
            message=(
                "update brings the tokens of a step that was launched, with the batch of the"
                " same step."
            ),
            hint=1,
            answers=r"""
# %% the old tokens with the batch that was just planned
def serve(engine):
    before, num_steps = None, 0
    while True:
        batch = engine.schedule()
        if before is not None:
            before[1].arrived.synchronize()
            engine.update(batch or before[0], before[1].token_ids.tolist())
        if batch is None and before is None:
            return num_steps
        before = (batch, engine.launch(batch)) if batch is not None else None
        num_steps += before is not None
""",
        ),
        Known(
            "updated-something-else",
            message=("update wants a batch that was launched, and then its tokens."),
            hint=2,
            answers=r"""
# %% the step for the batch
@@
-            engine.update(oldest, step.token_ids.tolist())
+            engine.update(step, step.token_ids.tolist())
""",
        ),
        Known(
            "last-step-lost",
            message=(
                "Nobody got the tokens of that step. Before you leave, bring what is still"
                " under way."
            ),
            hint=3,
            answers=r"""
# %% None means done
def serve(engine):
    under_way, count = deque(), 0
    while (batch := engine.schedule()) is not None:
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    return count

# %% leaves when no request is unfinished
@@
-    while True:
+    while engine.unfinished:
@@
             engine.update(oldest, step.token_ids.tolist())
+    return num_steps
""",
        ),
        Known(
            "stops-too-early",
            message=(
                "schedule() may give None only because tokens are missing. After an update, ask"
                " again."
            ),
            hint=3,
            answers=r"""
# %% empties what is under way, and leaves
def serve(engine):
    under_way, count = deque(), 0
    while (batch := engine.schedule()) is not None:
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    for oldest, step in under_way:
        step.arrived.synchronize()
        engine.update(oldest, step.token_ids.tolist())
    return count
""",
        ),
        Known(
            "out-of-order",
            message=(
                "The oldest step that is under way comes first: append on one side, take from"
                " the other."
            ),
            hint=2,
            answers=r"""
# %% takes from the side where it puts
def serve(engine):
    under_way, count = [], 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.pop()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "too-far-ahead",
            message=(
                "One ahead is enough to keep the GPU busy. Every further one is computed for"
                " nothing when an answer ends, and delays whoever is new."
            ),
            hint=2,
            answers=r"""
# %% three under way
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (2 if batch is not None else 0):
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "never-ends",
            message=(
                "When schedule() gives None, the tokens of a step that is under way may be what"
                " it lacks: bring them. When nothing is under way either, you are done."
            ),
            hint=3,
            answers=r"""
# %% None is passed over, and nothing is brought
def serve(engine):
    under_way, count = deque(), 0
    while engine.unfinished:
        batch = engine.schedule()
        if batch is None:
            continue
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    return count
""",
        ),
        Known(
            "wrong-values",
            message=("Which step's tokens went where?"),
        ),
        Known(
            "wrong-count",
            message=("Return how many steps were launched."),
            answers=r"""
# %% nothing returned
def serve(engine):
    under_way = deque()
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
        elif not under_way:
            return
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "emptied-once",
            message=(
                "Until the next launch the GPU has nothing to do. Bring the older of two steps,"
                " and keep the newer one under way, every time."
            ),
            hint=2,
            answers=r"""
# %% now and then both are brought
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
            if len(under_way) < 2 and count % 64:
                continue
        elif not under_way:
            return count
        while under_way:
            batch, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(batch, step.token_ids.tolist())
            if count % 64:
                break
""",
        ),
        Known(
            "spins",
            message=(
                "On a real machine that keeps a CPU core busy with nothing but asking."
                " `step.arrived.synchronize()` waits."
            ),
            hint=3,
            answers=r"""
# %% asks until the answer is yes
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1
        elif not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            while not step.arrived.query():
                pass
            engine.update(before, step.token_ids.tolist())

# %% works a little between the questions
@@
-            step.arrived.synchronize()
+            while not step.arrived.query():
+                engine.gpu.work("ask again", 1.0)
""",
        ),
        Known(
            "wrong-tokens",
            message=(
                "update wants all tokens of the step, as its pinned tensor holds them: one for"
                " each sequence that got a token."
            ),
            hint=1,
            answers=r"""
# %% one token for all
@@
-            engine.update(oldest, step.token_ids.tolist())
+            engine.update(oldest, [step.token_ids[0].item()] * len(step.token_ids))
""",
        ),
        Known(
            "no-list-of-integers",
            message=("It wants a list of integers: step.token_ids.tolist()."),
            hint=1,
            answers=r"""
# %% the tensor as it is
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1
        elif not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            step.arrived.synchronize()
            engine.update(before, step.token_ids)
""",
        ),
    ),
    right=r"""
# %% one variable in place of a queue
def serve(engine):
    before, count = None, 0
    while True:
        batch = engine.schedule()
        now = (batch, engine.launch(batch)) if batch is not None else None
        count += now is not None
        if before is None and now is None:
            return count
        if before is not None:
            before[1].arrived.synchronize()
            engine.update(before[0], before[1].token_ids.tolist())
        before = now

# %% asks the event before it waits
def serve(engine):
    under_way, count = [], 0
    batch = engine.schedule()
    while batch is not None or under_way:
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        if batch is None or len(under_way) == 2:
            oldest, step = under_way.pop(0)
            if not step.arrived.query():
                step.arrived.synchronize()
            engine.update(oldest, [int(token) for token in step.token_ids])
        batch = engine.schedule()
    return count
""",
)
