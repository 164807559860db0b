"""05.1: warm-up: what static batching wastes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known


def check_wasted_share(answer: Callable) -> str:
    def batches(lengths: list[int], places: int) -> list[list[int]]:
        return [lengths[i : i + places] for i in range(0, len(lengths), places)]

    def share(used: float, had: float) -> float:
        return 1 - used / had if had else 0.0

    def right(lengths: list[int], places: int) -> float:
        return share(sum(lengths), places * sum(map(max, batches(lengths, places))))

    def sorted_first(lengths: list[int], places: int) -> float:
        return right(sorted(lengths), places)

    def sorted_down(lengths: list[int], places: int) -> float:
        return right(sorted(lengths, reverse=True), places)

    def no_empty_places(lengths: list[int], places: int) -> float:
        return share(
            sum(lengths), sum(len(batch) * max(batch) for batch in batches(lengths, places))
        )

    def mean_of_batches(lengths: list[int], places: int) -> float:
        shares = [share(sum(batch), places * max(batch)) for batch in batches(lengths, places)]
        return sum(shares) / len(shares) if shares else 0.0

    def longest_of_all(lengths: list[int], places: int) -> float:
        return share(sum(lengths), places * max(lengths, default=0) * len(batches(lengths, places)))

    def useful(lengths: list[int], places: int) -> float:
        return 1 - right(lengths, places) if lengths else 0.0

    suspects = {
        "useful-share": (
            "That is the share of the steps that was used; the share that was wasted is asked for.",
            useful,
        ),
        "sorted-first": (
            (
                "You sort the requests before you batch them. Nobody knows lengths beforehand: they"
                " come as they come."
            ),
            sorted_first,
        ),
        "longest-first": (
            "You sort the requests, the longest first. They come as they come.",
            sorted_down,
        ),
        "no-empty-places": (
            (
                "In the last batch fewer requests may be left than places. Those places are empty"
                " from its first step to its last, and that is waste too."
            ),
            no_empty_places,
        ),
        "mean-of-batches": (
            (
                "You take the mean of the batches' shares. A batch of 300 steps wastes more than"
                " one of 10: add up steps and places of all batches, and divide once."
            ),
            mean_of_batches,
        ),
        "longest-of-all": (
            (
                "You let every batch run as long as the longest request of all. A batch ends with"
                " its own longest."
            ),
            longest_of_all,
        ),
    }
    rng = Random(1)
    cases = [
        ([7], 1),
        ([5, 5], 2),
        ([4, 1], 2),
        ([3, 9, 2, 2], 2),
        ([10, 1, 1], 2),
        ([], 4),
        ([6, 6, 6, 6, 6], 4),
    ]
    cases += [
        ([rng.randint(1, 200) for _ in range(count)], places)
        for count, places in ((8, 4), (13, 4), (30, 7))
    ]
    diagnose(answer, cases, right, suspects)
    return f"right for {len(cases)} queues"


EXERCISE = Exercise(
    id="05.1",
    title="Warm-up: what static batching wastes",
    check=check_wasted_share,
    mistakes=(
        Known(
            "no-empty-places",
            hint=2,
            answers=r"""
# %% the last batch has as many places as requests
def wasted_share(lengths: list[int], places: int) -> float:
    had = used = 0
    for i in range(0, len(lengths), places):
        batch = lengths[i : i + places]
        had += max(batch) * len(batch)
        used += sum(batch)
    return 1 - used / had if had else 0.0
""",
        ),
        Known(
            "mean-of-batches",
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
            hint=2,
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
            answers=r"""
# %% batches of equally long ones waste less, but nobody knows lengths
def wasted_share(lengths: list[int], places: int) -> float:
    lengths = sorted(lengths)
    had = places * sum(
        max(lengths[i : i + places]) for i in range(0, len(lengths), places)
    )
    return 1 - sum(lengths) / had if had else 0.0
""",
        ),
        Known(
            "longest-first",
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
            answers=r"""
# %% what was used
def wasted_share(lengths: list[int], places: int) -> float:
    had = places * sum(
        max(lengths[i : i + places]) for i in range(0, len(lengths), places)
    )
    return sum(lengths) / had if had else 0.0
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% percent
def wasted_share(lengths: list[int], places: int) -> float:
    had = places * sum(
        max(lengths[i : i + places]) for i in range(0, len(lengths), places)
    )
    return 100 * (1 - sum(lengths) / had) if had else 0.0
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
