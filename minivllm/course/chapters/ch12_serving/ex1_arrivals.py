"""12.1: arrivals."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_nothing_kept, one_by_one

Times = list[tuple[float, float]]


class _Rng(random.Random):
    def __repr__(self) -> str:
        return "a seeded random.Random"


def _rng(seed: int) -> _Rng:
    rng = _Rng()
    rng.seed(seed)
    return rng


# --- arrivals -------------------------------------------------------------------------------------


def poisson_arrivals(rate: float, count: int, rng: random.Random) -> list[float]:
    return _added_up([rng.expovariate(rate) for _ in range(count)])


def _added_up(gaps: list[float]) -> list[float]:
    times, now = [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    return times


def regular(rate: float, count: int, rng: random.Random) -> list[float]:
    return _added_up([1 / rate] * count)


def regular_from_zero(rate: float, count: int, rng: random.Random) -> list[float]:
    return [i / rate for i in range(count)]


def rate_for_mean(rate: float, count: int, rng: random.Random) -> list[float]:
    return _added_up([rng.expovariate(1 / rate) for _ in range(count)])


def only_gaps(rate: float, count: int, rng: random.Random) -> list[float]:
    return [rng.expovariate(rate) for _ in range(count)]


def from_zero(rate: float, count: int, rng: random.Random) -> list[float]:
    return _added_up([0.0, *(rng.expovariate(rate) for _ in range(count - 1))][:count])


def from_zero_drawn(rate: float, count: int, rng: random.Random) -> list[float]:
    return [0.0, *poisson_arrivals(rate, count, rng)][:count]


def uniform_gaps(rate: float, count: int, rng: random.Random) -> list[float]:
    return _added_up([rng.uniform(0, 2 / rate) for _ in range(count)])


def around_regular(rate: float, count: int, rng: random.Random) -> list[float]:
    return [i / rate + rng.expovariate(rate) for i in range(count)]


def uniform_times(rate: float, count: int, rng: random.Random) -> list[float]:
    return sorted(rng.uniform(0, count / rate) for _ in range(count))


def one_too_many(rate: float, count: int, rng: random.Random) -> list[float]:
    return [0.0, *poisson_arrivals(rate, count, rng)]


def in_whole_seconds(rate: float, count: int, rng: random.Random) -> list[float]:
    return [float(int(time)) for time in poisson_arrivals(rate, count, rng)]


# --- the queue ------------------------------------------------------------------------------------


def serve(arrivals: list[float], services: list[float], slots: int) -> Times:
    return _in_turn(arrivals, services, slots, range(len(arrivals)))


def _in_turn(arrivals: list[float], services: list[float], slots: int, order: Any) -> Times:
    """Requests begin in this order; times in the order of the arrivals."""
    free, times = [0.0] * slots, {}
    for i in order:
        start = max(arrivals[i], heapq.heappop(free))
        heapq.heappush(free, start + services[i])
        times[i] = start, start + services[i]
    return [times[i] for i in range(len(arrivals))]


def nobody_waits(arrivals: list[float], services: list[float], slots: int) -> Times:
    return [(a, a + s) for a, s in zip(arrivals, services, strict=True)]


def one_place(arrivals: list[float], services: list[float], slots: int) -> Times:
    return serve(arrivals, services, 1)


def one_fewer(arrivals: list[float], services: list[float], slots: int) -> Times:
    return serve(arrivals, services, max(1, slots - 1))


def one_more(arrivals: list[float], services: list[float], slots: int) -> Times:
    return serve(arrivals, services, slots + 1)


def takes_turns(arrivals: list[float], services: list[float], slots: int) -> Times:
    free, times = [0.0] * slots, []
    for i, (arrival, service) in enumerate(zip(arrivals, services, strict=True)):
        start = max(arrival, free[i % slots])
        free[i % slots] = start + service
        times.append((start, start + service))
    return times


def waits_for_batch(arrivals: list[float], services: list[float], slots: int) -> Times:
    """A place is taken again when all places are free."""
    times: Times = []
    for first in range(0, len(arrivals), slots):
        begin = max((finish for _, finish in times), default=0.0)
        for i in range(first, min(first + slots, len(arrivals))):
            start = max(begin, arrivals[i])
            times.append((start, start + services[i]))
    return times


def waits_for_full_batch(arrivals: list[float], services: list[float], slots: int) -> Times:
    """As above, and a batch begins when its last request has come."""
    times: Times = []
    for first in range(0, len(arrivals), slots):
        batch = range(first, min(first + slots, len(arrivals)))
        begin = max([finish for _, finish in times] + [arrivals[i] for i in batch])
        times += [(begin, begin + services[i]) for i in batch]
    return times


def _chosen(better: Callable[[int, list[float]], Any]) -> Callable[..., Times]:
    """A server that gives a free place to the waiting request for which better() is least."""

    def run(arrivals: list[float], services: list[float], slots: int) -> Times:
        free, times, left = [0.0] * slots, {}, list(range(len(arrivals)))
        while left:
            now = max(heapq.heappop(free), min(arrivals[i] for i in left))
            here = [i for i in left if arrivals[i] <= now]
            i = min(here, key=lambda i: better(i, services))
            left.remove(i)
            heapq.heappush(free, now + services[i])
            times[i] = now, now + services[i]
        return [times[i] for i in range(len(arrivals))]

    return run


def relative(arrivals: list[float], services: list[float], slots: int) -> Times:
    times = serve(arrivals, services, slots)
    return [(start - a, finish - a) for a, (start, finish) in zip(arrivals, times, strict=True)]


def finish_from_arrival(arrivals: list[float], services: list[float], slots: int) -> Times:
    free, times = [0.0] * slots, []
    for arrival, service in zip(arrivals, services, strict=True):
        start = max(arrival, heapq.heappop(free))
        heapq.heappush(free, arrival + service)
        times.append((start, arrival + service))
    return times


def finish_from_arrival_told(arrivals: list[float], services: list[float], slots: int) -> Times:
    times = serve(arrivals, services, slots)
    both = zip(arrivals, services, times, strict=True)
    return [(start, a + s) for a, s, (start, _) in both]


def order_of_finish(arrivals: list[float], services: list[float], slots: int) -> Times:
    return sorted(serve(arrivals, services, slots), key=lambda times: times[1])


def behind_the_last(arrivals: list[float], services: list[float], slots: int) -> Times:
    """Who finds no free place waits for the one that is free last."""
    free, times = [0.0] * slots, []
    for arrival, service in zip(arrivals, services, strict=True):
        place = min(range(slots), key=lambda j: (free[j] > arrival, -free[j]))
        start = max(arrival, free[place])
        free[place] = start + service
        times.append((start, start + service))
    return times


def all_at_once(arrivals: list[float], services: list[float], slots: int) -> Times:
    return serve([0.0] * len(arrivals), services, slots)


# --- the check ------------------------------------------------------------------------------------


def _expect_drawn(answer: Callable) -> None:
    """Arrivals that do not come from rng at all."""
    rng = _rng(5)
    before, state = rng.getstate(), random.getstate()
    found = answer(4.0, 20, rng)
    if rng.getstate() != before or found in (
        regular(4.0, 20, rng),
        regular_from_zero(4.0, 20, rng),
    ):
        return
    random.setstate(state)
    expect(
        False,
        "other-rng",
        "Your function drew nothing from `rng`: it draws somewhere else.\nA load must be the same"
        " when it is measured again, so its caller seeds a generator and hands it over. Use"
        " `rng.expovariate`.",
    )


def _expect_draws(answer: Callable) -> None:
    """rng stands where `count` gaps leave it: the caller goes on drawing."""
    for rate, count in _RATES[:4]:
        rng, right = _rng(6), _rng(6)
        answer(rate, count, rng)
        poisson_arrivals(rate, count, right)
        if rng.getstate() != right.getstate():
            seen = f"With rate = {rate:g}, count = {count}: `rng` is not where {count} draws"
            raise EXERCISE.mistake("other-draws", f"{seen} leave it.")


def check_arrivals(poisson_arrivals_: Callable, serve_: Callable) -> str:
    _expect_drawn(poisson_arrivals_)
    cases = [(rate, count, _rng(seed)) for seed, (rate, count) in enumerate(_RATES)]
    exact = {"rtol": 1e-9, "atol": 1e-9}
    diagnose(poisson_arrivals_, cases, poisson_arrivals, _suspects("arrivals"), **exact)
    queues = _queues()
    diagnose(serve_, queues, serve, _suspects("queue"), **exact)
    loads = [((2.0, 5, _rng(1)), (2.0, 5, _rng(2))), ((2.0, 5, _rng(1)), (9.0, 5, _rng(1)))]
    expect_nothing_kept(poisson_arrivals_, loads, poisson_arrivals, "the load has changed")
    _expect_draws(poisson_arrivals_)
    first, second = ([1.0, 1.5], [3.0, 2.0], 1), ([1.0, 4.0], [1.0, 2.0], 2)
    pairs = one_by_one(first, second)
    expect_nothing_kept(serve_, pairs, serve, "requests or places have changed")
    return f"{len(cases)} loads, and {len(queues)} queues in which the right ones wait"


_RATES = ((2.0, 1), (0.25, 3), (1.0, 0), (10.0, 7), (80.0, 64), (0.5, 65), (3.7, 300))


def _queues() -> list[tuple[list[float], list[float], int]]:
    rng = random.Random(12)
    queues: list[tuple[list[float], list[float], int]] = [
        ([1.0], [2.0], 1),
        ([], [], 3),
        ([0.0, 0.0, 0.0], [3.0, 1.0, 2.0], 2),
        ([0.5, 0.5], [1.0, 1.0], 4),
        # A long one first: the second place serves all the others.
        ([0.0, 1.0, 2.0, 3.0, 4.0], [10.0, 2.0, 2.0, 2.0, 2.0], 2),
        # Short ones behind a long one, and one that arrives at the very moment a place is free.
        ([0.0, 0.25, 0.5, 3.0], [3.0, 2.0, 0.5, 0.25], 1),
        # The server is idle in between.
        ([0.0, 10.0, 10.5, 30.0], [1.0, 4.0, 1.0, 1.0], 2),
    ]
    for count, slots, rate in (
        (9, 1, 1.5),
        (20, 3, 3.5),
        (64, 4, 3.6),
        (65, 8, 9.0),
        (200, 16, 15),
    ):
        arrivals = poisson_arrivals(rate, count, rng)
        queues.append((arrivals, [rng.choice((0.25, 0.5, 1.0, 3.0)) for _ in arrivals], slots))
    # A hundred places, nearly all of them taken, for longer than any start lasts.
    arrivals = poisson_arrivals(80, 1300, rng)
    queues.append((arrivals, [rng.choice((0.25, 0.5, 1.0, 3.0)) for _ in arrivals], 100))
    # In steps of a quarter of a second: many come together.
    arrivals = sorted(rng.randrange(40) / 4 for _ in range(40))
    queues.append((arrivals, [rng.randrange(1, 9) / 4 for _ in arrivals], 4))
    return queues


def _suspects(of: str) -> dict[str, tuple]:
    names = [known.name for known in EXERCISE.mistakes]
    border = names.index("nobody-waits")
    mine = names[:border] if of == "arrivals" else names[border:]
    return {name: what for name, what in EXERCISE.suspects.items() if name in mine}


EXERCISE = Exercise(
    id="12.1",
    title="Warm-up: arrivals, and who waits",
    check=check_arrivals,
    mistakes=(
        Known(
            "regular-arrivals",
            "All your gaps are equal. Users do not agree to come at equal distances: the gaps of a"
            " Poisson process are drawn, and short ones are common. Queues come from these.",
            hint=1,
            suspects=(regular, regular_from_zero),
            answers=r"""
# %% one every 1 / rate seconds
@@
-        now += rng.expovariate(rate)
+        now += 1 / rate

# %% from 0 on
@@
-    times, now = [], 0.0
-    for _ in range(count):
-        now += rng.expovariate(rate)
-        times.append(now)
-    return times
+    return [i / rate for i in range(count)]
""",
        ),
        Known(
            "rate-for-mean",
            "`expovariate` takes the rate, not the mean gap, which is 1 / rate. With 2 requests per"
            " second the mean gap is half a second.",
            hint=1,
            suspects=(rate_for_mean,),
            answers=r"""
# %% the mean gap is handed over
@@
-        now += rng.expovariate(rate)
+        now += rng.expovariate(1 / rate)
""",
        ),
        Known(
            "gaps-for-times",
            "These are the gaps. The times are asked for: each is the one before, plus a gap.",
            suspects=(only_gaps,),
            answers=r"""
# %% does not add them up
@@
-    times, now = [], 0.0
-    for _ in range(count):
-        now += rng.expovariate(rate)
-        times.append(now)
-    return times
+    return [rng.expovariate(rate) for _ in range(count)]
""",
        ),
        Known(
            "first-at-zero",
            "Your first request comes at 0. A gap comes before the first one, too: else each run"
            " begins with a request that no chance has sent.",
            suspects=(from_zero, from_zero_drawn),
            answers=r"""
# %% notes the time, then adds the gap
@@
-        now += rng.expovariate(rate)
-        times.append(now)
+        times.append(now)
+        now += rng.expovariate(rate)
""",
        ),
        Known(
            "other-distribution",
            "The mean of your gaps is right, but they are not exponential. In a Poisson process it"
            " does not matter how long ago the last request came: only `rng.expovariate(rate)` has"
            " this property.",
            hint=1,
            suspects=(uniform_gaps, around_regular),
            answers=r"""
# %% uniform gaps
@@
-        now += rng.expovariate(rate)
+        now += rng.uniform(0, 2 / rate)

# %% a regular grid with noise
@@
-        now += rng.expovariate(rate)
-        times.append(now)
+        times.append(now + rng.expovariate(rate))
+        now += 1 / rate
""",
        ),
        Known(
            "count-fixes-the-span",
            "You draw all times in a span of count / rate seconds. Then the last one never comes"
            " late: how long it takes until `count` requests have come is chance, too.",
            suspects=(uniform_times,),
            answers=r"""
# %% throws all of them into the span
@@
-    times, now = [], 0.0
-    for _ in range(count):
-        now += rng.expovariate(rate)
-        times.append(now)
-    return times
+    return sorted(rng.uniform(0, count / rate) for _ in range(count))
""",
        ),
        Known(
            "one-too-many",
            "You return the 0 at which the clock starts as a request. `count` requests are asked"
            " for, and the first comes after a gap.",
            suspects=(one_too_many,),
            answers=r"""
# %% the start is in the list
@@
-    times, now = [], 0.0
+    times, now = [0.0], 0.0
""",
        ),
        Known(
            "whole-seconds",
            "You cut the times to whole seconds. At 80 requests per second, everything happens in"
            " between.",
            suspects=(in_whole_seconds,),
        ),
        Known(
            "other-draws",
            "Your times are right, but you draw more numbers than the gaps (or set `rng` back)."
            " Whoever draws next from it, the lengths for example, gets other ones: draw one gap"
            " per request, and no more.",
            answers=r"""
# %% draws the gap behind the last one, too
@@
-    times, now = [], 0.0
-    for _ in range(count):
-        now += rng.expovariate(rate)
-        times.append(now)
-    return times
+    times, now = [], rng.expovariate(rate)
+    for _ in range(count):
+        times.append(now)
+        now += rng.expovariate(rate)
+    return times
""",
        ),
        Known(
            "other-rng",
            answers=r"""
# %% the module's own generator
@@
-    times, now = [], 0.0
+    import random
+
+    times, now = [], 0.0
@@
-        now += rng.expovariate(rate)
+        now += random.expovariate(rate)

# %% seeds a new one
@@
-    times, now = [], 0.0
+    import random
+
+    times, now, own = [], 0.0, random.Random(0)
@@
-        now += rng.expovariate(rate)
+        now += own.expovariate(rate)
""",
        ),
        Known(
            "nobody-waits",
            "In your queue every request begins when it arrives, however many are being served. At"
            " most `slots` are served at a time; the others wait for a place.",
            hint=2,
            suspects=(nobody_waits,),
            answers=r"""
# %% begins at once
@@
-        start = max(arrival, free[place])
+        start = arrival
""",
        ),
        Known(
            "another-number-of-places",
            "So many requests are served as if there were another number of places than `slots`:"
            " one, one fewer, or one more.",
            suspects=(one_place, one_fewer, one_more),
            answers=r"""
# %% a single place
@@
-    free, times = [0.0] * slots, []
+    free, times = [0.0], []

# %% one too many
@@
-    free, times = [0.0] * slots, []
+    free, times = [0.0] * (slots + 1), []
""",
        ),
        Known(
            "takes-turns",
            "You give request i the place i % slots, also where another place is free. Behind a"
            " long answer somebody then waits for nothing. A request takes the place that is free"
            " first.",
            hint=2,
            suspects=(takes_turns,),
            answers=r"""
# %% one place after the other
@@
-        place = free.index(min(free))
+        place = len(times) % slots
""",
        ),
        Known(
            "waits-for-a-batch",
            "A request gets a place only when *all* places are free again. That is static batching"
            " (chapter 5): the next request begins as soon as *one* place is free.",
            hint=3,
            suspects=(waits_for_batch, waits_for_full_batch),
            answers=r"""
# %% batch after batch
@@
-        place = free.index(min(free))
-        start = max(arrival, free[place])
-        free[place] = start + service
-        times.append((start, start + service))
+        if len(times) % slots == 0:
+            begin = max((finish for _, finish in times), default=0.0)
+        start = max(arrival, begin)
+        times.append((start, start + service))
""",
        ),
        Known(
            "shortest-first",
            "You serve the shortest of those that wait. That makes the mean wait shorter, and a"
            " long request may wait for ever; besides, no server knows beforehand how long an"
            " answer gets. First come, first served.",
            suspects=(
                _chosen(lambda i, services: (services[i], i)),
                _chosen(lambda i, services: (services[i], -i)),
            ),
            answers=r"""
# %% a queue ordered by length
@@
-    free, times = [0.0] * slots, []
-    for arrival, service in zip(arrivals, services):
-        place = free.index(min(free))
-        start = max(arrival, free[place])
-        free[place] = start + service
-        times.append((start, start + service))
-    return times
+    free, times, left = [0.0] * slots, {}, set(range(len(arrivals)))
+    while left:
+        place = free.index(min(free))
+        now = max(free[place], min(arrivals[i] for i in left))
+        here = [i for i in left if arrivals[i] <= now]
+        i = min(here, key=lambda i: (services[i], i))
+        left.remove(i)
+        free[place] = now + services[i]
+        times[i] = (now, now + services[i])
+    return [times[i] for i in range(len(arrivals))]
""",
        ),
        Known(
            "last-come-first",
            "The request that came last gets the free place: your list of waiting requests is a"
            " stack. First come, first served.",
            suspects=(_chosen(lambda i, services: -i),),
            answers=r"""
# %% a stack
@@
-    free, times = [0.0] * slots, []
-    for arrival, service in zip(arrivals, services):
-        place = free.index(min(free))
-        start = max(arrival, free[place])
-        free[place] = start + service
-        times.append((start, start + service))
-    return times
+    free, times, left = [0.0] * slots, {}, list(range(len(arrivals)))
+    while left:
+        place = free.index(min(free))
+        now = max(free[place], arrivals[left[0]])
+        i = max(i for i in left if arrivals[i] <= now)
+        left.remove(i)
+        free[place] = now + services[i]
+        times[i] = (now, now + services[i])
+    return [times[i] for i in range(len(arrivals))]
""",
        ),
        Known(
            "spans-for-times",
            "These are spans from each request's arrival. The times of the clock are asked for, as"
            " for the arrivals.",
            suspects=(relative,),
            answers=r"""
# %% how long each waited, and took
@@
-        times.append((start, start + service))
+        times.append((start - arrival, start + service - arrival))
""",
        ),
        Known(
            "finish-from-arrival",
            "You add the service time to the arrival. A request that has waited is done later: its"
            " service begins at its start.",
            hint=2,
            suspects=(finish_from_arrival, finish_from_arrival_told),
            answers=r"""
# %% from the arrival on, also for the place
@@
-        free[place] = start + service
-        times.append((start, start + service))
+        free[place] = arrival + service
+        times.append((start, arrival + service))

# %% the place is right
@@
-        times.append((start, start + service))
+        times.append((start, arrival + service))
""",
        ),
        Known(
            "order-of-finish",
            "The times are right, but in the order in which the requests finish. Entry i belongs to"
            " request i.",
            suspects=(order_of_finish,),
            answers=r"""
# %% sorted by the end
@@
-        times.append((start, start + service))
-    return times
+        times.append((start, start + service))
+    return sorted(times, key=lambda pair: pair[1])
""",
        ),
        Known(
            "wrong-place",
            "Where all places are busy you let a request wait for one that is not free first.",
            suspects=(behind_the_last,),
        ),
        Known(
            "all-at-once",
            "You forget when the requests arrive: they begin before they are there.",
            suspects=(all_at_once,),
            answers=r"""
# %% begins when a place is free
@@
-        start = max(arrival, free[place])
+        start = free[place]
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% takes the arrivals from the caller's list
@@
-    for arrival, service in zip(arrivals, services):
+    while arrivals:
+        arrival, service = arrivals.pop(0), services.pop(0)
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% remembers loads by their rate and count
@@
-def poisson_arrivals(rate: float, count: int, rng: Random) -> list[float]:
+KNOWN = {}
+
+
+def poisson_arrivals(rate: float, count: int, rng: Random) -> list[float]:
@@
-    times, now = [], 0.0
+    if (rate, count) in KNOWN:
+        return KNOWN[rate, count]
+    times, now = KNOWN.setdefault((rate, count), []), 0.0
""",
        ),
    ),
    right=r"""
# %% a heap of places
@@
-    free, times = [0.0] * slots, []
+    import heapq
+
+    free, times = [0.0] * slots, []
@@
-        place = free.index(min(free))
-        start = max(arrival, free[place])
-        free[place] = start + service
-        times.append((start, start + service))
+        start = max(arrival, heapq.heappop(free))
+        heapq.heappush(free, start + service)
+        times.append((start, start + service))

# %% the times at which those end that run; gaps from the formula
@@
-    times, now = [], 0.0
+    import math
+
+    times, now = [], 0.0
@@
-        now += rng.expovariate(rate)
+        now -= math.log(1 - rng.random()) / rate
@@
-    free, times = [0.0] * slots, []
-    for arrival, service in zip(arrivals, services):
-        place = free.index(min(free))
-        start = max(arrival, free[place])
-        free[place] = start + service
-        times.append((start, start + service))
-    return times
+    ends, times = [], []
+    for arrival, service in zip(arrivals, services, strict=True):
+        start = arrival if len(ends) < slots else max(arrival, sorted(ends)[-slots])
+        ends.append(start + service)
+        times.append((start, start + service))
+    return times
""",
)
