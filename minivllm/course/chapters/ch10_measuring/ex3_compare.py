"""10.3: an honest stopwatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    from minivllm.course.sim.clocks import SimulatedMachine
from minivllm.course.chapters.ch10_measuring.common import close
from minivllm.course.grading.exercise import Exercise, Known

US = 1e-6


def _machine(**what: Any) -> SimulatedMachine:
    from minivllm.course.sim.clocks import SimulatedMachine

    return SimulatedMachine(**what)


def _compared(
    answer: Callable, machine: SimulatedMachine, tasks: dict, rounds: int
) -> dict[str, tuple]:
    """The answer's result, once its form is right: floats (median, least, greatest) by name."""
    found = answer(dict(tasks), machine.clock, machine.synchronize, rounds)
    good = isinstance(found, dict) and list(found) == list(tasks)
    good = good and all(isinstance(row, tuple | list) and len(row) == 3 for row in found.values())
    expect(
        good,
        "wrong-form",
        f"Got {show(found)}.\nExpected a dict with the names {', '.join(tasks)}, each with (median,"
        " least, greatest).",
    )
    for name, (middle, low, high) in found.items():
        expect(
            low <= middle <= high,
            "other-order",
            f"For {name} you report {show(found[name])}.\nThe median comes first, then the least,"
            " then the greatest.",
        )
    return {name: tuple(map(float, row)) for name, row in found.items()}


def _listed(factor: Callable[[int], float]) -> SimulatedMachine:
    """A machine on which call n of a task takes factor(n) times as long."""
    from minivllm.course.sim.clocks import SimulatedMachine

    class Listed(SimulatedMachine):
        def _factor(self, name: str) -> float:
            return factor(self._calls[name])

    return Listed()


def _waits(answer: Callable) -> None:
    """Work that is done behind the caller's back: 5 µs to call, 300 and 200 to do."""
    machine = _machine()
    tasks = {"A": machine.task("A", 300 * US), "B": machine.task("B", 200 * US)}
    found = _compared(answer, machine, tasks, 7)
    names = [name for kind, name in machine.log if kind == "call"]
    for name in tasks:
        expect(
            names.count(name) >= 7,
            "too-few-rounds",
            f"With rounds = 7, {name} was called {names.count(name)} times.\nOne warm-up, and then"
            " 7 that are timed.",
        )
    for name, right in (("A", 305 * US), ("B", 205 * US)):
        median, low, high = found[name]
        got = (
            f"{name} takes 5 microseconds to call and {right / US - 5:.0f} to do. Its median is"
            f" {median / US:.1f}."
        )
        expect(
            not close(median, 5 * US, 0.2) and not close(low, 5 * US, 0.2),
            "not-synchronised",
            f"{got}\nYour second reading of the clock comes when the work was put into the queue,"
            " not when it was done. Synchronize before you read it.",
        )
        expect(
            not close(high, 505 * US)
            and not close(high, 510 * US)
            and not close(median, 500 * US, 0.03),
            "starts-while-busy",
            f"{got} The greatest is {high / US:.1f}.\nThe clock was started while other work still"
            " stood in the queue. Synchronize before the first reading, too.",
        )
        expect(
            close(median, right) and low <= median <= high,
            "wrong-values",
            f"{got}\nExpected {right / US:.1f}: from an idle machine to an idle machine, one call.",
        )


def _warms_up(answer: Callable) -> None:
    """First calls that compile, and a machine that is busy afterwards."""
    machine = _machine()
    tasks = {"A": machine.task("A", 100 * US, cold=0.05), "B": machine.task("B", 80 * US, cold=0.3)}
    found = _compared(answer, machine, tasks, 5)
    for name, (_, low, high) in found.items():
        expect(
            high < 0.01,
            "not-warmed-up",
            f"The first call of {name} compiles. Your greatest time is {high / US:,.0f}"
            f" microseconds, the least {low / US:,.0f}.\nCall each candidate once before you time"
            " anything: that happens once, not in each run.",
        )
        expect(
            high < 150 * US,
            "starts-while-busy",
            f"{name}: from {low / US:.1f} to {high / US:.1f} microseconds, on a machine where all"
            " calls take the same.\nWhat was called before (the warm-up) was still running when"
            " the clock was started: synchronize first.",
        )


def _interleaves(answer: Callable) -> None:
    """The same work twice, on a machine that slows down as it gets warm."""
    machine = _machine(heat=0.5, warmth=0.004)
    tasks = {name: machine.task(name, 200 * US) for name in ("A", "B", "C")}
    found = _compared(answer, machine, tasks, 15)
    medians = {name: row[0] for name, row in found.items()}
    if max(medians.values()) > 1.05 * min(medians.values()):
        calls = [name for kind, name in machine.log if kind == "call"]
        said = ", ".join(f"{name} {median / US:.0f}" for name, median in medians.items())
        raise Mistake(
            "not-interleaved",
            f"A, B and C do the same work, and your medians are {said} microseconds. You called"
            f" {' '.join(calls[3:12])} …\nThe chip gets warm, and lowers its clock: whoever comes"
            " last is the slowest. Take one run of each candidate in every round.",
        )


def _takes_medians(answer: Callable) -> None:
    """Some calls are disturbed, some happen to run at a higher clock."""
    machine = _machine(disturbed=0.2, boosted=0.12, seed=3)
    durations, factor = {"A": [], "B": []}, machine._factor

    def noted(name: str) -> float:
        durations[name].append(factor(name))
        return durations[name][-1]

    machine._factor = noted  # type: ignore[method-assign]
    tasks = {"A": machine.task("A", 100 * US), "B": machine.task("B", 400 * US)}
    found = _compared(answer, machine, tasks, 31)
    for name, usual in (("A", 105 * US), ("B", 405 * US)):
        median, low, high = found[name]
        got = (
            f"Most calls of {name} take {usual / US:.0f} microseconds, and you report"
            f" {median / US:.1f}."
        )
        expect(
            not close(median, low) or median > 0.99 * usual,
            "least-for-median",
            f"{got}\nThat is the least: a run in which the clock happened to be high. It can't be"
            " repeated at will, and the more often one tries, the better it gets.",
        )
        mean = 5 * US + sum(durations[name][-31:]) / 31 * (usual - 5 * US)
        expect(
            not close(median, mean, 0.02),
            "mean-for-median",
            f"{got}\nA mean has everything in it that disturbed the machine; one bad run moves it"
            " as far as it likes. Take the median.",
        )
        expect(
            close(median, usual),
            "wrong-values",
            f"{got}\nThe median is the one in the middle when all times are sorted.",
        )
        expect(
            low < 0.9 * usual and high > 1.5 * usual,
            "no-spread",
            f"{name}: you report from {low / US:.1f} to {high / US:.1f} microseconds.\nReport the"
            " least and the greatest of the timed runs as they were: they say how far to trust the"
            " median.",
        )


def _counts_to_an_even_number(answer: Callable) -> None:
    """Four timed calls that take 1, 2, 4 and 8 times as long, however many came before."""
    machine = _listed(lambda call: (1.0, 8.0, 2.0, 4.0)[call % 4])
    tasks = {"A": machine.task("A", 100 * US), "B": machine.task("B", 50 * US)}
    found = _compared(answer, machine, tasks, 4)
    names = [name for kind, name in machine.log if kind == "call"]
    for name, unit in (("A", 100), ("B", 50)):
        median, low, high = (seconds / US - 5 for seconds in found[name])
        got = (
            f"Four calls of {name} take {unit}, {2 * unit}, {4 * unit} and {8 * unit} microseconds"
            f" of work. You report a median of {median:.0f}, from {low:.0f} to {high:.0f}."
        )
        expect(
            names.count(name) <= 5
            or (close(low, unit) and close(high, 8 * unit) and close(median, 3 * unit)),
            "called-too-often",
            f"{got}\nWith rounds = 4, {name} was called {names.count(name)} times. Call it once to"
            " warm up, and then once per round.",
        )
        expect(
            close(low, unit) and close(high, 8 * unit),
            "not-all-rounds",
            f"{got}\nThe least and the greatest are those of all `rounds` timed calls: here 4.",
        )
        expect(
            close(median, 3 * unit),
            "one-of-the-two-middles",
            f"{got}\nOf an even number of values, the median is the mean of the two in the middle,"
            f" {2 * unit} and {4 * unit}. `statistics.median` knows that.",
        )


def _keeps_the_extremes(answer: Callable) -> None:
    """Of 201 timed calls one takes four times as long, and one half as long."""
    machine = _listed(lambda call: {120: 4.0, 160: 0.5}.get(call, 1.0))
    tasks = {"A": machine.task("A", 100 * US), "B": machine.task("B", 50 * US)}
    found = _compared(answer, machine, tasks, 201)
    names = [name for kind, name in machine.log if kind == "call"]
    for name, unit in (("A", 100), ("B", 50)):
        _, low, high = (seconds / US - 5 for seconds in found[name])
        got = f"With rounds = 201, {name} was called {names.count(name)} times."
        expect(names.count(name) >= 201, "not-all-rounds", f"{got}\nEach round has a timed call.")
        expect(
            close(low, 0.5 * unit) and close(high, 4 * unit),
            "no-spread",
            f"{got} One call took {4 * unit} microseconds of work, one {0.5 * unit:.0f}, all others"
            f" {unit}. You report from {low:.0f} to {high:.0f}.\nReport the least and the greatest"
            " of the timed runs as they were, also where one lies far from all others.",
        )


def _starts_anew(answer: Callable) -> None:
    """The same names twice, the second time on a machine on which they take longer.

    An answer whose first call is wrong already is left to the other judges.
    """
    for times in (1, 3):
        machine, right = _machine(), (5 + times * 100) * US
        tasks = {name: machine.task(name, times * 100 * US, cold=0.05) for name in ("A", "B")}
        found = _compared(answer, machine, tasks, 5)
        wrong = [name for name, row in found.items() if not all(close(x, right) for x in row)]
        if wrong and times == 1:
            return
        for name in wrong:
            median, low, high = (seconds / US for seconds in found[name])
            raise Mistake(
                "keeps-state",
                f"{name} takes {right / US:.0f} microseconds in every call but the first, which"
                f" compiles. You report {median:,.0f}, from {low:,.0f} to {high:,.0f}.\nA first"
                " call of `compare` was right and this one is not: your code keeps something of the"
                " call before, times or which tasks are warm. Make it inside of the function.",
            )


def check_compare(answer: Callable) -> str:
    """Judge a stopwatch on simulated machines, each with one trap."""
    judges = (_starts_anew, _waits, _warms_up, _interleaves, _takes_medians)
    for judge in (*judges, _counts_to_an_even_number, _keeps_the_extremes):
        judge(answer)
    return "cold, warm, busy and disturbed machines, and the medians are what they should be"


EXERCISE = Exercise(
    id="10.3",
    title="An honest stopwatch",
    check=check_compare,
    mistakes=(
        Known(
            "called-too-often",
            answers=r"""
# %% a warm-up before each timed call
@@
-    for task in tasks.values():
-        task()
@@
             synchronize()
             start = clock()
             task()
-            synchronize()
-            times[name].append(clock() - start)
+            synchronize()
+            start = clock()
+            task()
+            synchronize()
+            times[name].append(clock() - start)
""",
        ),
        Known(
            "one-of-the-two-middles",
            answers=r"""
# %% the middle of the sorted list
@@
-        name: (median(found), min(found), max(found)) for name, found in times.items()
+        name: (sorted(found)[len(found) // 2], min(found), max(found))
+        for name, found in times.items()
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% the times in a default argument
@@
-    tasks: dict[str, Callable], clock: Callable, synchronize: Callable, rounds: int
+    tasks: dict[str, Callable],
+    clock: Callable,
+    synchronize: Callable,
+    rounds: int,
+    times={},
@@
-    times = {name: [] for name in tasks}
+    for name in tasks:
+        times.setdefault(name, [])
@@
-        name: (median(found), min(found), max(found)) for name, found in times.items()
+        name: (median(found), min(found), max(found))
+        for name, found in times.items()
+        if name in tasks

# %% remembers which tasks are warm
@@
-def compare(
+WARM = set()
+
+
+def compare(
@@
-    for task in tasks.values():
-        task()
+    for name, task in tasks.items():
+        if name not in WARM:
+            task()
+            WARM.add(name)
""",
        ),
        Known(
            "other-order",
            answers=r"""
# %% the least first
@@
-        name: (median(found), min(found), max(found)) for name, found in times.items()
+        name: (min(found), median(found), max(found)) for name, found in times.items()
""",
        ),
        Known(
            "not-all-rounds",
            answers=r"""
# %% fifty rounds are enough
@@
-    for _ in range(rounds):
+    for _ in range(min(rounds, 50)):
""",
        ),
        Known(
            "not-warmed-up",
            hint=1,
            answers=r"""
# %% the first call counts
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {
        name: (median(found), min(found), max(found)) for name, found in times.items()
    }
""",
        ),
        Known(
            "not-synchronised",
            hint=1,
            answers=r'''
# %% the clock stops when the call returns
@@
-def compare(
-    tasks: dict[str, Callable], clock: Callable, synchronize: Callable, rounds: int
-) -> dict[str, tuple[float, float, float]]:
-    """Name -> (median, least, greatest) of `rounds` timed calls, in seconds."""
+def compare(tasks, clock, synchronize, rounds):
@@
             task()
-            synchronize()

# %% never waits at all
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            start = clock()
            task()
            times[name].append(clock() - start)
    return {
        name: (median(found), min(found), max(found)) for name, found in times.items()
    }
''',
        ),
        Known(
            "starts-while-busy",
            hint=1,
            answers=r'''
# %% the warm-up still runs
@@
-def compare(
-    tasks: dict[str, Callable], clock: Callable, synchronize: Callable, rounds: int
-) -> dict[str, tuple[float, float, float]]:
-    """Name -> (median, least, greatest) of `rounds` timed calls, in seconds."""
+def compare(tasks, clock, synchronize, rounds):
@@
         for name, task in tasks.items():
-            synchronize()
''',
        ),
        Known(
            "not-interleaved",
            hint=2,
            answers=r"""
# %% one task after the other
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for name, task in tasks.items():
        for _ in range(rounds):
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {
        name: (median(found), min(found), max(found)) for name, found in times.items()
    }

# %% a function for each task
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for name, task in tasks.items():
        task()
        for _ in range(rounds):
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {
        name: (median(found), min(found), max(found)) for name, found in times.items()
    }
""",
        ),
        Known(
            "mean-for-median",
            answers=r'''
# %% the mean
@@
-def compare(
-    tasks: dict[str, Callable], clock: Callable, synchronize: Callable, rounds: int
-) -> dict[str, tuple[float, float, float]]:
-    """Name -> (median, least, greatest) of `rounds` timed calls, in seconds."""
+def compare(tasks, clock, synchronize, rounds):
@@
-        name: (median(found), min(found), max(found)) for name, found in times.items()
+        name: (sum(found) / len(found), min(found), max(found))
+        for name, found in times.items()

# %% many calls, each waited for, one time
def compare(tasks, clock, synchronize, rounds):
    times = dict.fromkeys(tasks, 0.0)
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name] += clock() - start
    return {
        name: (total / rounds, total / rounds, total / rounds)
        for name, total in times.items()
    }
''',
        ),
        Known(
            "least-for-median",
            answers=r"""
# %% the best
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: (min(found), min(found), max(found)) for name, found in times.items()}
""",
        ),
        Known(
            "no-spread",
            answers=r'''
# %% the median three times
@@
-def compare(
-    tasks: dict[str, Callable], clock: Callable, synchronize: Callable, rounds: int
-) -> dict[str, tuple[float, float, float]]:
-    """Name -> (median, least, greatest) of `rounds` timed calls, in seconds."""
+def compare(tasks, clock, synchronize, rounds):
@@
-        name: (median(found), min(found), max(found)) for name, found in times.items()
+        name: (median(found), median(found), median(found))
+        for name, found in times.items()

# %% outliers thrown away
@@
-def compare(
-    tasks: dict[str, Callable], clock: Callable, synchronize: Callable, rounds: int
-) -> dict[str, tuple[float, float, float]]:
-    """Name -> (median, least, greatest) of `rounds` timed calls, in seconds."""
+def compare(tasks, clock, synchronize, rounds):
@@
             times[name].append(clock() - start)
+    times = {
+        name: sorted(found)[len(found) // 4 : -len(found) // 4]
+        for name, found in times.items()
+    }

# %% the greatest of one more round thrown away
@@
-    for _ in range(rounds):
+    for _ in range(rounds + 1):
@@
             times[name].append(clock() - start)
+    times = {name: sorted(found)[:-1] for name, found in times.items()}
''',
        ),
        Known(
            "too-few-rounds",
            answers=r'''
# %% the warm-up is one of the rounds
@@
-def compare(
-    tasks: dict[str, Callable], clock: Callable, synchronize: Callable, rounds: int
-) -> dict[str, tuple[float, float, float]]:
-    """Name -> (median, least, greatest) of `rounds` timed calls, in seconds."""
+def compare(tasks, clock, synchronize, rounds):
@@
-    for _ in range(rounds):
+    for _ in range(rounds - 2):
''',
        ),
        Known(
            "wrong-form",
            answers=r"""
# %% the medians alone
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {name: median(found) for name, found in times.items()}
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% many calls, one time
def compare(tasks, clock, synchronize, rounds):
    found = {}
    for task in tasks.values():
        task()
    for name, task in tasks.items():
        synchronize()
        start = clock()
        for _ in range(rounds):
            task()
        synchronize()
        seconds = (clock() - start) / rounds
        found[name] = (seconds, seconds, seconds)
    return found

# %% the middle of times that are not sorted
@@
-        name: (median(found), min(found), max(found)) for name, found in times.items()
+        name: (found[len(found) // 2], min(found), max(found))
+        for name, found in times.items()
""",
        ),
    ),
    right=r'''
# %% the first round is the warm-up
def compare(tasks, clock, synchronize, rounds):
    taken = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name in tasks:
            synchronize()
            before = clock()
            tasks[name]()
            synchronize()
            taken[name].append(clock() - before)
    result = {}
    for name, values in taken.items():
        values = sorted(values[1:])
        middle = (values[(rounds - 1) // 2] + values[rounds // 2]) / 2
        result[name] = (middle, values[0], values[-1])
    return result

# %% the order turns in every other round
def compare(tasks, clock, synchronize, rounds):
    times = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for number in range(rounds):
        for name, task in list(tasks.items())[:: 1 - 2 * (number % 2)]:
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return {
        name: (median(found), min(found), max(found)) for name, found in times.items()
    }

# %% three warm-ups, each waited for
@@
-def compare(
-    tasks: dict[str, Callable], clock: Callable, synchronize: Callable, rounds: int
-) -> dict[str, tuple[float, float, float]]:
-    """Name -> (median, least, greatest) of `rounds` timed calls, in seconds."""
+def compare(tasks, clock, synchronize, rounds):
@@
-        task()
+        for _ in range(3):
+            task()
+            synchronize()
''',
)
