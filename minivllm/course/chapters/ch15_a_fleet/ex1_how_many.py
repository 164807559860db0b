"""15.1: how many engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from random import Random

from minivllm.course.chapters.ch15_a_fleet.common import suspects_of
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_nothing_kept, expect_refusal, one_by_one

#: (requests per second that came, that were served, p99 of the TTFT in seconds) for each load.
Curve = list[tuple[float, float, float]]


# --- capacity -------------------------------------------------------------------------------------


def _capacity(
    curve: Curve,
    goal: float,
    *,
    asks: str = "both",
    share: float = 0.95,
    choose: str = "below the first",
    empty: str = "zero",
    gives: int = 0,
) -> float:
    """The right one; each option makes it a wrong one.

    asks: what a point must keep; "below" is both, with a TTFT below the goal. choose: which points
    count. empty: what is said where no point is good. gives: the item of the point.
    """

    def is_bad(point: tuple[float, float, float]) -> bool:
        offered, served, ttft = point
        late = ttft >= goal if asks == "below" else ttft > goal * (1 + 0.1 * (asks == "later"))
        behind = served < share * offered
        return {"ttft": late, "served": behind, "and": late and behind}.get(asks, late or behind)

    bad = [point for point in curve if is_bad(point)]
    first = min((point[0] for point in bad), default=math.inf)
    good = [point for point in curve if point[0] < first]
    if choose == "any good":
        good = [point for point in curve if not is_bad(point)]
    elif choose == "late is the border":
        first = min((point[0] for point in bad if point[2] > goal), default=math.inf)
        good = [point for point in curve if point[0] < first and not is_bad(point)]
    elif choose == "throughput":
        good = list(curve)
    elif choose == "as they come":
        good = curve[: curve.index(bad[0])] if bad else curve
    elif choose == "first of equal":
        good = [p for p in curve if p[0] < first or (p[0] == first and not is_bad(p))]
    elif choose == "with the first bad":
        good = [point for point in curve if point[0] <= first]
    elif choose == "between" and bad and good:
        return _between(max(good), min(bad), goal)
    elif choose == "last of the list":
        good = good[-1:]
    elif choose == "quickest":
        good = [min(good, key=lambda point: point[2])] if good else []
    if not good:
        least = min((point[0] for point in curve), default=0.0)
        return {"zero": 0.0, "least": least, "infinite": math.inf}[empty]
    return max(good)[gives]


def _between(good: tuple[float, ...], bad: tuple[float, ...], goal: float) -> float:
    """Where a line from a good point to a bad one reaches the goal."""
    if bad[2] <= goal:
        return good[0]
    return good[0] + (goal - good[2]) / (bad[2] - good[2]) * (bad[0] - good[0])


# --- the number of engines ------------------------------------------------------------------------


def _num_replicas(
    load: float,
    capacity: float,
    imbalance: float,
    spare: int,
    *,
    rounds: Callable[[float], float] = math.ceil,
    busiest: str = "times",
    spares: str = "added",
) -> int:
    if capacity <= 0:
        raise ValueError("no engine reaches the goal at any load")
    need = load / capacity
    if busiest == "times":
        need *= imbalance
    elif busiest == "over":
        need /= imbalance
    elif busiest == "rounded first":
        need = math.ceil(need) * imbalance
    elif busiest == "excess":
        need += imbalance - 1
    elif busiest == "spare, too":
        return math.ceil((math.ceil(need) + spare) * imbalance)
    number = int(rounds(need))
    return {
        "added": number + spare,
        "none": number,
        "at least": max(number, spare + 1),
        "one": number + 1,
        "taken off": max(1, number - spare),
        "each": number * (1 + spare),
    }[spares]


# --- a day ----------------------------------------------------------------------------------------


def _replica_hours(
    loads: list[float],
    capacity: float,
    imbalance: float,
    spare: int,
    *,
    fixed: str = "peak",
    ahead: str = "next",
    spared: bool = True,
) -> tuple[int, int]:
    need = [_num_replicas(load, capacity, imbalance, spare) for load in loads]
    mean = _num_replicas(sum(loads) / len(loads), capacity, imbalance, spare)
    always = {
        "peak": len(need) * max(need),
        "mean": len(need) * mean,
        "count": max(need),
        "sum": sum(need),
        "day of 24": 24 * max(need),
    }[fixed]
    taken = need if spared else [number - spare for number in need]
    later = taken[1:] + taken[:1]
    if ahead == "no wrap":
        later = taken[1:] + taken[-1:]
    elif ahead == "left off":
        # zip ends with the shorter list.
        later = taken[1:]
    scaled = {
        "no": sum(taken),
        "both": sum(taken) + sum(later),
        "one more": sum(taken) + len(taken),
        "spare twice": sum(max(a, b) + spare for a, b in zip(taken, later, strict=False)),
        "two": sum(map(max, taken, later, later[1:] + later[:1])),
        "average": sum(-(-(a + b) // 2) for a, b in zip(taken, later, strict=False)),
    }.get(ahead)
    if scaled is None:
        scaled = sum(max(a, b) for a, b in zip(taken, later, strict=False))
    return always, scaled


# --- the check ------------------------------------------------------------------------------------


def _curves() -> list[tuple[Curve, float]]:
    cases: list[tuple[Curve, float]] = [
        ([(2.0, 2.0, 0.25)], 0.5),
        ([(2.0, 2.0, 0.75)], 0.5),
        ([], 0.5),
        ([(2.0, 2.0, 0.5)], 0.5),  # exactly the goal
        ([(1.0, 1.0, 0.25), (2.0, 2.0, 0.5), (4.0, 3.9, 1.0)], 0.5),
        # Too many came: the queue grew, and the measurement was too short to show it.
        ([(8.0, 8.0, 0.25), (16.0, 12.0, 0.375), (32.0, 12.0, 2.0)], 0.5),
        ([(8.0, 8.0, 0.25), (16.0, 12.0, 0.375)], 0.5),
        ([(20.0, 19.0, 0.25), (40.0, 38.0, 0.25), (80.0, 75.0, 0.25)], 0.5),  # exactly 95 %
        ([(20.0, 19.9, 0.25), (40.0, 37.9, 0.25)], 0.5),
        # A little beyond: both are bad.
        ([(1.0, 1.0, 0.25), (2.0, 2.0, 0.5078125)], 0.5),
        ([(1.0, 1.0, 0.25), (2.0, 2.0, 0.5000001), (4.0, 4.0, 0.25)], 0.5),
        ([(20.0, 20.0, 0.25), (40.0, 37.0, 0.25), (80.0, 80.0, 0.25)], 0.5),
        ([(0.25, 0.25, 0.25), (0.5, 0.5, 0.25), (0.75, 0.5, 0.25)], 0.5),  # a slow engine
        # A lucky point behind an unlucky one.
        ([(1.0, 1.0, 0.25), (2.0, 2.0, 0.75), (3.0, 3.0, 0.25), (4.0, 4.0, 0.75)], 0.5),
        # In the order in which they were measured.
        ([(4.0, 4.0, 0.75), (1.0, 1.0, 0.25), (2.0, 2.0, 0.25)], 0.5),
        ([(3.0, 3.0, 0.25), (1.0, 1.0, 0.25), (2.0, 2.0, 0.25)], 0.5),
        # Twice at one rate.
        ([(1.0, 1.0, 0.25), (2.0, 2.0, 0.25), (2.0, 2.0, 0.75)], 0.5),
        ([(1.0, 1.0, 0.25), (2.0, 2.0, 0.75), (2.0, 2.0, 0.25)], 0.5),
        ([(2.0, 2.0, 0.25), (2.0, 1.5, 0.25)], 0.5),
        ([(1.0, 1.0, 0.75), (2.0, 2.0, 0.25)], 0.5),  # cold at first: it counts
        ([(1.0, 1.0, 0.75), (2.0, 1.0, 2.0)], 1.0),
    ]
    rng = Random(1511)
    for count in (3, 5, 8, 13, 40):
        for goal in (0.25, 1.0):
            curve = []
            for _ in range(count):
                offered = rng.randrange(1, 64) / 2
                served = min(offered, 24.0) * rng.choice((1.0, 1.0, 0.96875))
                base = 0.0625 + max(0.0, offered - 20) / 16
                curve.append((offered, served, base * rng.choice((1.0, 1.0, 1.0, 2.0))))
            cases.append((curve, goal))
            cases.append((sorted(curve), goal))
    return cases


def _fleets() -> list[tuple[float, float, float, int]]:
    # Powers of two: no quotient that should be whole is a little more.
    cases: list[tuple[float, float, float, int]] = [
        (1.0, 1.0, 1.0, 0),
        (8.0, 2.0, 1.0, 1),
        (8.5, 2.0, 1.0, 1),
        (7.5, 2.0, 1.0, 0),
        (8.0, 2.0, 1.25, 1),
        (8.0, 2.0, 1.5, 2),
        (0.5, 4.0, 1.0, 1),
        (0.25, 32.0, 1.0, 1),
        (0.5, 4.0, 1.5, 3),
        (3.0, 4.0, 1.5, 1),
        (2000.0, 16.0, 1.125, 2),
        (3000.0, 32.0, 1.25, 4),
    ]
    rng = Random(1512)
    for _ in range(40):
        load, capacity = rng.randrange(1, 2000) / 4, 2.0 ** rng.randrange(0, 6)
        cases.append((load, capacity, 1 + rng.randrange(0, 8) / 8, rng.randrange(0, 4)))
    return cases


def _days() -> list[tuple[list[float], float, float, int]]:
    cases: list[tuple[list[float], float, float, int]] = [
        ([4.0], 2.0, 1.0, 1),
        ([4.0, 4.0], 2.0, 1.0, 0),
        ([2.0, 8.0], 2.0, 1.0, 1),
        ([2.0, 2.0, 16.0], 2.0, 1.0, 1),
        ([16.0, 2.0, 2.0], 2.0, 1.0, 1),
        ([2.0, 16.0, 2.0, 2.0], 2.0, 1.25, 0),
        ([1.0, 2.0, 4.0, 8.0, 4.0, 2.0], 2.0, 1.0, 2),
    ]
    rng = Random(1513)
    for hours in (24, 24, 7, 48):
        loads = [rng.randrange(1, 400) / 4 for _ in range(hours)]
        cases.append((loads, 8.0, 1.25, 1))
        cases.append((sorted(loads), 4.0, 1.0, 2))
    return cases


def check_how_many(capacity: Callable, num_replicas: Callable, replica_hours: Callable) -> str:
    tight = {"rtol": 1e-9, "atol": 1e-9}
    curves = diagnose(capacity, _curves(), _capacity, suspects_of(EXERCISE, _capacity), **tight)
    suspects = suspects_of(EXERCISE, _num_replicas)
    fleets = diagnose(num_replicas, _fleets(), _num_replicas, suspects)
    for spare in (0, 2):
        refused = partial(num_replicas, 8.0, 0.0, 1.0, spare)
        expect_refusal(refused, f"a capacity of 0 and spare = {spare}")
    wording = {"item 0: ": "always on: ", "item 1: ": "scaled: "}
    suspects = suspects_of(EXERCISE, _replica_hours)
    days = diagnose(replica_hours, _days(), _replica_hours, suspects, wording=wording)
    loads = [1.0, 9.0, 4.0]
    changed = "the numbers have changed"
    pairs = one_by_one((loads, 2.0, 1.0, 1), ([8.0, 2.0, 30.0], 4.0, 1.5, 2))
    expect_nothing_kept(replica_hours, pairs, _replica_hours, changed)
    pairs = one_by_one((8.0, 2.0, 1.0, 1), (24.0, 4.0, 1.5, 2))
    expect_nothing_kept(num_replicas, pairs, _num_replicas, changed)
    first, second = [(1.0, 1.0, 0.25), (2.0, 2.0, 0.5)], [(1.0, 1.0, 0.5), (3.0, 3.0, 0.75)]
    expect_nothing_kept(capacity, one_by_one((first, 0.25), (second, 0.5)), _capacity, changed)
    return f"{curves} curves, {fleets} fleets, {days} days"


EXERCISE = Exercise(
    id="15.1",
    title="Warm-up: how many engines",
    check=check_how_many,
    mistakes=(
        Known(
            "beyond-a-bad-point",
            "You take a rate although a lower one, or the same one at another time, was bad. A"
            " lucky measurement behind an unlucky one is luck: above the lowest bad rate nothing"
            " counts.",
            hint=1,
            suspects=(
                partial(_capacity, choose="any good"),
                partial(_capacity, choose="first of equal"),
                partial(_capacity, choose="late is the border"),
            ),
            answers=r"""
# %% the highest good one
@@
-    first = min((point[0] for point in curve if is_bad(point)), default=math.inf)
-    return max((offered for offered, _, _ in curve if offered < first), default=0.0)
+    return max((point[0] for point in curve if not is_bad(point)), default=0.0)

# %% an overloaded rate is left out, and ends nothing
@@
-    first = min((point[0] for point in curve if is_bad(point)), default=math.inf)
-    return max((offered for offered, _, _ in curve if offered < first), default=0.0)
+    first = min((point[0] for point in curve if point[2] > goal), default=math.inf)
+    return max((p[0] for p in curve if p[0] < first and not is_bad(p)), default=0.0)

# %% sorted, up to the first bad one: of two at one rate the good one comes first
@@
-    first = min((point[0] for point in curve if is_bad(point)), default=math.inf)
-    return max((offered for offered, _, _ in curve if offered < first), default=0.0)
+    found = 0.0
+    for point in sorted(curve, key=lambda point: (point[0], is_bad(point))):
+        if is_bad(point):
+            break
+        found = point[0]
+    return found
""",
        ),
        Known(
            "overload-unseen",
            "You look at the TTFT alone. Where fewer requests ended than came, a queue grew, and"
            " only the end of the measurement ended it: in an hour the TTFT would be another one.",
            hint=1,
            suspects=(
                partial(_capacity, asks="ttft"),
                partial(_capacity, asks="ttft", choose="any good"),
            ),
            answers=r"""
# %% the TTFT alone
@@
-        return ttft > goal or served < 0.95 * offered
+        return ttft > goal
""",
        ),
        Known(
            "one-is-enough",
            "One of the two is enough to make a point bad: a TTFT above the goal, *or* too few"
            " served.",
            hint=1,
            suspects=(partial(_capacity, asks="and"),),
            answers=r"""
# %% and
@@
-        return ttft > goal or served < 0.95 * offered
+        return ttft > goal and served < 0.95 * offered
""",
        ),
        Known(
            "goal-unseen",
            "You look only at how many requests were served. That a request is served is not"
            " enough: its first token must come in time.",
            suspects=(partial(_capacity, asks="served"),),
            answers=r"""
# %% what was served
@@
-        return ttft > goal or served < 0.95 * offered
+        return served < 0.95 * offered
""",
        ),
        Known(
            "edge",
            "The borders are not those of the statement. A TTFT of exactly the goal is in time, and"
            " so is an engine that serves exactly 95 % of what comes; a little beyond is bad.",
            suspects=(
                partial(_capacity, asks="below"),
                partial(_capacity, share=0.9500001),
                partial(_capacity, asks="below", share=0.9500001),
                partial(_capacity, share=1.0),
                partial(_capacity, share=0.9),
                partial(_capacity, asks="later"),
            ),
            answers=r"""
# %% less than the goal
@@
-        return ttft > goal or served < 0.95 * offered
+        return ttft >= goal or served < 0.95 * offered

# %% a tenth more is taken for the goal
@@
-        return ttft > goal or served < 0.95 * offered
+        return ttft > goal * 1.1 or served < 0.95 * offered

# %% more than 95 %
@@
-        return ttft > goal or served < 0.95 * offered
+        return ttft > goal or served <= 0.95 * offered
""",
        ),
        Known(
            "order-of-the-list",
            "The points stand in the order in which they were measured, not by their rates.",
            hint=1,
            suspects=(
                partial(_capacity, choose="as they come"),
                partial(_capacity, choose="last of the list"),
            ),
            answers=r"""
# %% up to the first bad one in the list
@@
-    first = min((point[0] for point in curve if is_bad(point)), default=math.inf)
-    return max((offered for offered, _, _ in curve if offered < first), default=0.0)
+    found = 0.0
+    for point in curve:
+        if is_bad(point):
+            break
+        found = max(found, point[0])
+    return found
""",
        ),
        Known(
            "not-measured",
            "You return a rate at which nobody has seen that all is well. The capacity is the"
            " highest rate below the lowest bad one that was *measured*; without any, it is 0.0.",
            hint=1,
            suspects=(
                partial(_capacity, choose="with the first bad"),
                partial(_capacity, choose="between"),
                partial(_capacity, empty="least"),
                partial(_capacity, empty="infinite"),
                partial(_capacity, gives=1),
                partial(_capacity, gives=1, choose="throughput"),
                partial(_capacity, choose="quickest"),
            ),
            answers=r"""
# %% the lowest bad rate
@@
-    return max((offered for offered, _, _ in curve if offered < first), default=0.0)
+    return max((offered for offered, _, _ in curve if offered <= first), default=0.0)

# %% what was served there
@@
-    return max((offered for offered, _, _ in curve if offered < first), default=0.0)
+    return max((served for offered, served, _ in curve if offered < first), default=0.0)
""",
        ),
        Known(
            "rounded-down",
            "A part of an engine cannot be bought: round up. And where the load fits exactly, one"
            " more is not needed.",
            hint=2,
            suspects=(
                partial(_num_replicas, rounds=math.floor),
                partial(_num_replicas, rounds=round),
                partial(_num_replicas, rounds=lambda x: math.floor(x) + 1),
                partial(_num_replicas, rounds=lambda x: max(1, math.floor(x))),
                partial(_num_replicas, rounds=lambda x: max(1, round(x))),
            ),
            answers=r"""
# %% rounds to the nearest
@@
-    return math.ceil(load * imbalance / capacity) + spare
+    return round(load * imbalance / capacity) + spare

# %% always one more
@@
-    return math.ceil(load * imbalance / capacity) + spare
+    return int(load * imbalance // capacity) + 1 + spare
""",
        ),
        Known(
            "the-busiest-one",
            "The mean replica is within its capacity, and the busiest one is not, or is far below."
            " It gets `imbalance` times its even share, load / n, and that must fit.",
            hint=2,
            suspects=(
                partial(_num_replicas, busiest="none"),
                partial(_num_replicas, busiest="over"),
                partial(_num_replicas, busiest="rounded first"),
                partial(_num_replicas, busiest="excess"),
                partial(_num_replicas, busiest="spare, too"),
            ),
            answers=r"""
# %% an even share
@@
-    return math.ceil(load * imbalance / capacity) + spare
+    return math.ceil(load / capacity) + spare

# %% rounded up twice
@@
-    return math.ceil(load * imbalance / capacity) + spare
+    return math.ceil(math.ceil(load / capacity) * imbalance) + spare
""",
        ),
        Known(
            "spare",
            "`spare` replicas may be away, and the *others* must be able to carry everything. They"
            " come on top.",
            suspects=(
                partial(_num_replicas, spares="none"),
                partial(_num_replicas, spares="at least"),
                partial(_num_replicas, spares="one"),
                partial(_num_replicas, spares="taken off"),
                partial(_num_replicas, spares="each"),
            ),
            answers=r"""
# %% at least so many
@@
-    return math.ceil(load * imbalance / capacity) + spare
+    return max(math.ceil(load * imbalance / capacity), spare + 1)
""",
        ),
        Known(
            "not-refused",
            answers=r"""
# %% infinitely many
@@
-    if capacity <= 0:
-        raise ValueError("no engine reaches the goal, however little it gets")
-    return math.ceil(load * imbalance / capacity) + spare
+    return math.ceil(load * imbalance / capacity) + spare if capacity else spare
""",
        ),
        Known(
            "always-on",
            "Without scaling there are as many replicas in every hour as the busiest hour needs:"
            " the largest number, times the hours.",
            suspects=(
                partial(_replica_hours, fixed="mean"),
                partial(_replica_hours, fixed="count"),
                partial(_replica_hours, fixed="sum"),
                partial(_replica_hours, fixed="day of 24"),
            ),
            answers=r"""
# %% for the mean load
@@
-    return len(need) * max(need), scaled
+    mean = num_replicas(sum(loads) / len(loads), capacity, imbalance, spare)
+    return len(need) * mean, scaled
""",
        ),
        Known(
            "too-late",
            "A replica that an hour needs must be asked for in the hour before, so that its weights"
            " are there in time. And the day repeats: after the last hour comes the first.",
            hint=3,
            suspects=(
                partial(_replica_hours, ahead="no"),
                partial(_replica_hours, ahead="no wrap"),
                partial(_replica_hours, ahead="left off"),
            ),
            answers=r"""
# %% what the hour itself needs
@@
-    scaled = sum(max(now, then) for now, then in zip(need, need[1:] + need[:1]))
+    scaled = sum(need)

# %% the last hour ends the world
@@
-    scaled = sum(max(now, then) for now, then in zip(need, need[1:] + need[:1]))
+    scaled = sum(max(now, then) for now, then in zip(need, need[1:] + need[-1:]))
""",
        ),
        Known(
            "too-many-hours",
            "An hour needs the larger one of two numbers, its own and the next hour's; the spare"
            " ones are in both.",
            hint=3,
            suspects=(
                partial(_replica_hours, ahead="both"),
                partial(_replica_hours, ahead="one more"),
                partial(_replica_hours, ahead="spare twice"),
                partial(_replica_hours, ahead="two"),
                partial(_replica_hours, ahead="average"),
                partial(_replica_hours, spared=False),
            ),
            answers=r"""
# %% both
@@
-    scaled = sum(max(now, then) for now, then in zip(need, need[1:] + need[:1]))
+    scaled = sum(now + then for now, then in zip(need, need[1:] + need[:1]))
""",
        ),
    ),
    right=r"""
# %% a loop over sorted points, the bad one of equal ones first
@@
-    first = min((point[0] for point in curve if is_bad(point)), default=math.inf)
-    return max((offered for offered, _, _ in curve if offered < first), default=0.0)
+    found = 0.0
+    for point in sorted(curve, key=lambda point: (point[0], not is_bad(point))):
+        if is_bad(point):
+            return found
+        found = point[0]
+    return found

# %% counts up; looks back instead of ahead
@@
-    return math.ceil(load * imbalance / capacity) + spare
+    number = 1
+    while load / number * imbalance > capacity:
+        number += 1
+    return number + spare
@@
-    scaled = sum(max(now, then) for now, then in zip(need, need[1:] + need[:1]))
+    scaled = sum(max(need[i], need[i - 1]) for i in range(len(need)))
""",
)
