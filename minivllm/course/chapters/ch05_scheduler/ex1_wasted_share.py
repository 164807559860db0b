"""05.1: warm-up: what static batching wastes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known


def _batches(lengths: list[int], places: int) -> list[list[int]]:
    return [lengths[i : i + places] for i in range(0, len(lengths), places)]


def _share(used: float, had: float) -> float:
    return 1 - used / had if had else 0.0


def wasted_share(lengths: list[int], places: int) -> float:
    return _share(sum(lengths), places * sum(map(max, _batches(lengths, places))))


# --- suspects -------------------------------------------------------------------------------------


def sorted_first(lengths: list[int], places: int) -> float:
    return wasted_share(sorted(lengths), places)


def sorted_down(lengths: list[int], places: int) -> float:
    return wasted_share(sorted(lengths, reverse=True), places)


def no_empty_places(lengths: list[int], places: int) -> float:
    had = sum(len(batch) * max(batch) for batch in _batches(lengths, places))
    return _share(sum(lengths), had)


def as_few_places_as_requests(lengths: list[int], places: int) -> float:
    return wasted_share(lengths, min(places, len(lengths))) if lengths else 0.0


def without_the_rest(lengths: list[int], places: int) -> float:
    whole = lengths[: len(lengths) // places * places]
    return wasted_share(whole, places)


def steps_without_the_rest(lengths: list[int], places: int) -> float:
    whole = lengths[: len(lengths) // places * places]
    return _share(sum(lengths), places * sum(map(max, _batches(whole, places))))


def mean_of_batches(lengths: list[int], places: int) -> float:
    batches = _batches(lengths, places)
    shares = [_share(sum(batch), places * max(batch)) for batch in batches]
    return sum(shares) / len(shares) if shares else 0.0


def mean_without_empty_places(lengths: list[int], places: int) -> float:
    batches = _batches(lengths, places)
    shares = [_share(sum(batch), len(batch) * max(batch)) for batch in batches]
    return sum(shares) / len(shares) if shares else 0.0


def longest_of_all(lengths: list[int], places: int) -> float:
    had = places * max(lengths, default=0) * len(_batches(lengths, places))
    return _share(sum(lengths), had)


def useful(lengths: list[int], places: int) -> float:
    return 1 - wasted_share(lengths, places) if lengths else 0.0


def useful_or_one(lengths: list[int], places: int) -> float:
    return 1 - wasted_share(lengths, places)


def percent(lengths: list[int], places: int) -> float:
    return 100 * wasted_share(lengths, places)


def in_relation_to_work(lengths: list[int], places: int) -> float:
    had = places * sum(map(max, _batches(lengths, places)))
    return had / sum(lengths) - 1 if lengths else 0.0


def continuous(lengths: list[int], places: int) -> float:
    """A place takes the next request as soon as it is free."""
    until = [0] * places
    for length in lengths:
        until[until.index(min(until))] += length
    return _share(sum(lengths), places * max(until))


# --- the check ------------------------------------------------------------------------------------


def check_wasted_share(answer: Callable) -> str:
    rng = Random(1)
    cases = [
        ([7], 1),
        ([5, 5], 2),
        ([4, 1], 2),
        ([4, 1], 8),
        ([9], 3),
        ([3, 9, 2, 2], 2),
        # The same requests in another order.
        ([9, 2, 3, 2], 2),
        ([10, 1, 1], 2),
        ([], 4),
        ([6, 6, 6, 6, 6], 4),
        ([1], 1000),
    ]
    cases += [
        ([rng.randint(1, 200) for _ in range(count)], places)
        for count, places in ((8, 4), (13, 4), (30, 7), (16, 16), (17, 16), (300, 31), (9, 1))
    ]
    # Long queues, and one batch of many.
    cases += [
        ([rng.randint(1, 2000) for _ in range(count)], places)
        for count, places in ((2500, 1), (9001, 64), (3000, 5000))
    ]
    cases.append(([70_000, 5, 2049], 2))
    diagnose(answer, cases, wasted_share, EXERCISE.suspects)
    return f"right for {len(cases)} queues"


EXERCISE = Exercise(
    id="05.1",
    title="Warm-up: what static batching wastes",
    check=check_wasted_share,
    mistakes=(
        Known(
            "no-empty-places",
            "In the last batch fewer requests may be left than places, and the queue itself may be"
            " shorter than that. The other places are empty in all of the batch's steps, and that"
            " is waste, too.",
            hint=2,
            suspects=(no_empty_places, as_few_places_as_requests),
            answers=r"""
# %% the last batch has as many places as requests
@@
-    had = places * sum(max(batch) for batch in batches)
+    had = sum(len(batch) * max(batch) for batch in batches)

# %% no more places than there are requests
@@
     batches = [lengths[i : i + places] for i in range(0, len(lengths), places)]
+    places = min(places, len(lengths))
""",
        ),
        Known(
            "last-batch-missing",
            "You count whole batches only. The last batch takes whoever is left, and they count.",
            suspects=(without_the_rest, steps_without_the_rest),
            answers=r"""
# %% whole batches
@@
+    lengths = lengths[: len(lengths) // places * places]
     batches = [lengths[i : i + places] for i in range(0, len(lengths), places)]
""",
        ),
        Known(
            "mean-of-batches",
            "You take the mean of the batches' shares. A batch of 300 steps wastes more than one of"
            " 10: add up the steps and places of all batches, and divide once.",
            suspects=(mean_of_batches, mean_without_empty_places),
            answers=r"""
# %% every batch counts alike
def wasted_share(lengths: list[int], places: int) -> float:
    shares = []
    for i in range(0, len(lengths), places):
        batch = lengths[i : i + places]
        shares.append(1 - sum(batch) / (places * max(batch)))
    return sum(shares) / len(shares) if shares else 0.0
""",
        ),
        Known(
            "longest-of-all",
            "You let every batch run as long as the longest request of all. A batch ends with its"
            " own longest.",
            hint=2,
            suspects=(longest_of_all,),
            answers=r"""
# %% every batch runs as long as the longest request
def wasted_share(lengths: list[int], places: int) -> float:
    if not lengths:
        return 0.0
    num_batches = -(-len(lengths) // places)
    return 1 - sum(lengths) / (num_batches * places * max(lengths))
""",
        ),
        Known(
            "sorted-first",
            "You sort the requests before you batch them. Nobody knows lengths beforehand: they are"
            " taken in the order of the queue.",
            suspects=(sorted_first,),
            answers=r"""
# %% batches of equally long ones waste less, but nobody knows lengths
@@
+    lengths = sorted(lengths)
     batches = [lengths[i : i + places] for i in range(0, len(lengths), places)]
""",
        ),
        Known(
            "longest-first",
            "You sort the requests, the longest first. They are taken in the order of the queue.",
            suspects=(sorted_down,),
            answers=r"""
# %% the other way round
def wasted_share(lengths: list[int], places: int) -> float:
    lengths = sorted(lengths, reverse=True)
    had = places * sum(lengths[::places])
    return 1 - sum(lengths) / had if had else 0.0
""",
        ),
        Known(
            "useful-share",
            "That is the share that was used. The share that was wasted is asked for.",
            suspects=(useful, useful_or_one),
            answers=r"""
# %% what was used
@@
-    return 1 - sum(lengths) / had if had else 0.0
+    return sum(lengths) / had if had else 0.0
""",
        ),
        Known(
            "percent",
            "Your number is 100 times too large. A share is a number from 0 to 1.",
            suspects=(percent,),
            answers=r"""
# %% percent
@@
-    return 1 - sum(lengths) / had if had else 0.0
+    return 100 * (1 - sum(lengths) / had) if had else 0.0
""",
        ),
        Known(
            "in-relation-to-work",
            "You divide what was wasted by what worked. Divide it by all places that there were, in"
            " all steps.",
            suspects=(in_relation_to_work,),
            answers=r"""
# %% idle places for each one that works
@@
-    return 1 - sum(lengths) / had if had else 0.0
+    return (had - sum(lengths)) / sum(lengths) if had else 0.0
""",
        ),
        Known(
            "continuous-batching",
            "You give a free place to the next request at once. That is continuous batching; here"
            " a batch runs until its longest request is done, and then the next one starts.",
            suspects=(continuous,),
            answers=r"""
# %% who finishes makes room for the next one
def wasted_share(lengths: list[int], places: int) -> float:
    until = [0] * places
    for length in lengths:
        first = until.index(min(until))
        until[first] += length
    had = places * max(until)
    return 1 - sum(lengths) / had if had else 0.0
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% remembers the answer for as many requests with as much work
seen: dict[tuple, float] = {}


def wasted_share(lengths: list[int], places: int) -> float:
    key = len(lengths), sum(lengths), max(lengths, default=0), places
    if key not in seen:
        batches = [lengths[i : i + places] for i in range(0, len(lengths), places)]
        had = places * sum(max(batch) for batch in batches)
        seen[key] = 1 - sum(lengths) / had if had else 0.0
    return seen[key]
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% the places of the first thousand requests
@@
-    batches = [lengths[i : i + places] for i in range(0, len(lengths), places)]
+    batches = [
+        lengths[i : i + places] for i in range(0, min(len(lengths), 1000), places)
+    ]
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% the queue is used up
def wasted_share(lengths: list[int], places: int) -> float:
    had, used = 0, sum(lengths)
    while lengths:
        batch = lengths[:places]
        del lengths[:places]
        had += places * max(batch)
    return 1 - used / had if had else 0.0
""",
        ),
    ),
    right=r"""
# %% place by place
def wasted_share(lengths: list[int], places: int) -> float:
    idle = steps = 0
    queue = list(lengths)
    while queue:
        batch, queue = queue[:places], queue[places:]
        longest = max(batch)
        steps += longest
        idle += sum(longest - length for length in batch) + longest * (
            places - len(batch)
        )
    return idle / (steps * places) if steps else 0.0
""",
)
