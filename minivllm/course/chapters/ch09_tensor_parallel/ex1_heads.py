"""09.1: warm-up: whose heads are these?."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch09_tensor_parallel.common import Case, collect, refuses, the_n
from minivllm.course.grading.exercise import Exercise, Known


def right_heads(rank: int, size: int, num_heads: int, num_kv_heads: int) -> tuple[range, range]:
    """(query heads, KV heads) of a rank."""
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError(f"{num_heads} query heads and {num_kv_heads} KV heads on {size} ranks")
    queries = range(rank * num_heads // size, (rank + 1) * num_heads // size)
    group = num_heads // num_kv_heads
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)


def _all_heads(function: Callable, case: Case) -> dict[str, list[int]]:
    found = {}
    for rank in range(case.size):
        pair = function(rank, case.size, case.data["heads"], case.data["kv_heads"])
        expect(
            isinstance(pair, tuple | list) and len(pair) == 2,
            "wrong-type",
            f"rank {rank} gets {show(pair)}.\nReturn a pair: the query heads, then the KV heads.",
        )
        found |= {f"rank {rank}, query heads": [*pair[0]], f"rank {rank}, KV heads": [*pair[1]]}
    return found


def check_heads(answer: Callable) -> str:
    shapes = [
        (1, 4, 2),
        (2, 4, 2),
        (4, 4, 2),
        (2, 16, 8),
        (8, 16, 8),
        (16, 16, 8),
        (4, 32, 8),
        (16, 32, 8),
        (32, 32, 8),
    ]
    shapes += [(3, 12, 6), (2, 6, 6), (6, 6, 6), (4, 8, 1), (3, 9, 3), (8, 64, 8), (10, 40, 5)]
    cases = [
        Case(
            f"{the_n(size, 'rank')}, {the_n(heads, 'query head')}, {the_n(kv, 'KV head')}",
            size,
            {"heads": heads, "kv_heads": kv},
        )
        for size, heads, kv in shapes
    ]
    suspects = {
        "no-kv-head-left": (
            (
                "You divide the KV heads among the ranks, and with more ranks than KV heads nothing"
                " is left for a rank. Its query heads need keys and values all the same: such a KV"
                " head is kept by several ranks."
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * (k // n), (r + 1) * (k // n)),
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * k // n, (r + 1) * k // n),
            ),
        ),
        "order-exchanged": (
            "The pair is the wrong way round: query heads first, then KV heads.",
            lambda r, n, h, k: right_heads(r, n, h, k)[::-1],
        ),
        "kv-heads-beyond-the-last": (
            (
                "Each rank takes the next KV head, also when there are fewer of them than ranks."
                " Head numbers must stay below num_kv_heads: neighbours share one."
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * max(1, k // n), (r + 1) * max(1, k // n)),
            ),
        ),
        "dealt-around": (
            (
                "With more ranks than KV heads you deal them around like cards: rank %"
                " num_kv_heads. But neighbouring query heads read the same KV head, so neighbouring"
                " *ranks* must share it."
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * k // n, (r + 1) * k // n) if k >= n else range(r % k, r % k + 1),
            ),
        ),
        "every-nth-head": (
            (
                "You give each rank every n-th head. Then its query heads read KV heads that other"
                " ranks have; heads that stand together belong together."
            ),
            lambda r, n, h, k: (
                range(r, h, n),
                range(r, k, n) if k >= n else range(r * k // n, r * k // n + 1),
            ),
            lambda r, n, h, k: (range(r, h, n), range(r, k, n)),
            lambda r, n, h, k: (
                range(r, h, n),
                range(r * k // n, max(r * k // n + 1, (r + 1) * k // n)),
            ),
        ),
        "all-kv-heads": (
            (
                "Every rank has all KV heads. That would work, but the cache, which is most of the"
                " memory, would not be split at all. A rank needs the KV heads that its own query"
                " heads read."
            ),
            lambda r, n, h, k: (range(r * h // n, (r + 1) * h // n), range(k)),
        ),
        "a-kv-head-for-each-query-head": (
            (
                "You list a KV head for each query head. Several query heads read the same one:"
                " num_heads // num_kv_heads of them. A rank keeps each KV head once."
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                [q // (h // k) for q in range(r * h // n, (r + 1) * h // n)],
            ),
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n),
                range(r * h // n, (r + 1) * h // n),
            ),
        ),
        "last-head-left-out": (
            "Your ranges end one too early: `range(a, b)` does not hold b.",
            lambda r, n, h, k: (
                range(r * h // n, (r + 1) * h // n - 1),
                right_heads(r, n, h, k)[1],
            ),
            lambda r, n, h, k: (
                right_heads(r, n, h, k)[0],
                right_heads(r, n, h, k)[1][:-1] or range(0),
            ),
        ),
    }
    found = collect(partial(_all_heads, answer), cases)

    def every(function: Callable) -> Callable:
        return lambda case: _all_heads(function, case)

    known = {name: (why, *map(every, wrong)) for name, (why, *wrong) in suspects.items()}
    number = diagnose(
        found.__getitem__,
        [(case,) for case in cases],
        partial(_all_heads, right_heads),
        known,
        wording={"case = ": ""},
    )
    for size, heads, kv in ((3, 32, 8), (8, 4, 2), (2, 3, 1), (6, 12, 4), (4, 12, 6)):
        what = f"With {size} ranks, {heads} query heads and {kv} KV heads"
        refuses(lambda s=size, h=heads, k=kv: answer(1, s, h, k), "not-refused", what)
    return f"{number} models split, 5 refused"


EXERCISE = Exercise(
    id="09.1",
    title="Warm-up: whose heads are these?",
    check=check_heads,
    mistakes=(
        Known(
            "no-kv-head-left",
            answers=r"""
# %% KV heads divided like query heads
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    k = num_kv_heads // size
    return queries, range(rank * k, (rank + 1) * k)

# %% rounded down at both ends
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    return queries, range(
        rank * num_kv_heads // size, (rank + 1) * num_kv_heads // size
    )
""",
        ),
        Known(
            "kv-heads-beyond-the-last",
            answers=r"""
# %% at least one, counted on and on
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    k = max(1, num_kv_heads // size)
    return queries, range(rank * k, rank * k + k)
""",
        ),
        Known(
            "dealt-around",
            answers=r"""
# %% replicated like cards
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    if num_kv_heads >= size:
        k = num_kv_heads // size
        return queries, range(rank * k, rank * k + k)
    k = rank % num_kv_heads
    return queries, range(k, k + 1)
""",
        ),
        Known(
            "every-nth-head",
            answers=r"""
# %% strided
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    return range(rank, num_heads, size), range(rank, num_kv_heads, size)
""",
        ),
        Known(
            "all-kv-heads",
            answers=r"""
# %% the cache is not split
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    return queries, range(num_kv_heads)
""",
        ),
        Known(
            "a-kv-head-for-each-query-head",
            answers=r"""
# %% a list with repetitions
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, [h // group for h in queries]
""",
        ),
        Known(
            "last-head-left-out",
            answers=r"""
# %% the range ends too early
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, range(queries[0] // group, queries[-1] // group)
""",
        ),
        Known(
            "order-exchanged",
            answers=r"""
# %% KV heads first
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return range(queries[0] // group, queries[-1] // group + 1), queries
""",
        ),
        Known(
            "not-refused",
            answers=r"""
# %% rounds down instead
def my_heads(rank, size, num_heads, num_kv_heads):
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)

# %% looks at the query heads only
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size:
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)
""",
        ),
        Known(
            "raised",
            answers=r"""
# %% refuses more ranks than KV heads
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or num_kv_heads % size:
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    k = num_kv_heads // size
    return queries, range(rank * k, (rank + 1) * k)
""",
        ),
    ),
    right=r"""
# %% by the number of ranks that share a KV head
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    if num_kv_heads >= size:
        k = num_kv_heads // size
        return queries, range(rank * k, (rank + 1) * k)
    k = rank // (size // num_kv_heads)
    return queries, range(k, k + 1)

# %% lists, of the KV heads that are read
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return list(queries), sorted({h // group for h in queries})
""",
)
