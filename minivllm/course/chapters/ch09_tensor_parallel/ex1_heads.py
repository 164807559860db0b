"""09.1: warm-up: whose heads are these?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from minivllm.course.chapters.ch09_tensor_parallel.common import (
    REFUSED,
    Case,
    collect,
    count_of,
)
from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_refusal


def right_heads(rank: int, size: int, num_heads: int, num_kv_heads: int) -> tuple[range, range]:
    """(query heads, KV heads) of a rank."""
    if not _can_be_split(size, num_heads, num_kv_heads):
        raise ValueError(f"{num_heads} query heads and {num_kv_heads} KV heads on {size} ranks")
    queries = _block(rank, size, num_heads)
    group = num_heads // num_kv_heads
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)


def _can_be_split(size: int, heads: int, kv_heads: int) -> bool:
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _block(rank: int, size: int, count: int) -> range:
    """An equal block for each rank, rounded down."""
    return range(rank * count // size, (rank + 1) * count // size)


def _all_heads(function: Callable, case: Case) -> dict[str, list[int]]:
    """The heads of every rank, in words -> numbers."""
    found = {}
    for rank in range(case.size):
        pair = function(rank, case.size, case.data["heads"], case.data["kv_heads"])
        both = isinstance(pair, tuple | list) and len(pair) == 2
        expect(
            both and all(isinstance(part, Iterable) for part in pair),
            "wrong-type",
            f"rank {rank} gets {show(pair)}.\nReturn a pair of ranges: the query heads, then the"
            " KV heads.",
        )
        found |= {f"rank {rank}, query heads": [*pair[0]], f"rank {rank}, KV heads": [*pair[1]]}
    return found


def _case(size: int, heads: int, kv_heads: int) -> Case:
    what = f"{count_of(size, 'rank')}, {count_of(heads, 'query head')}"
    data = {"heads": heads, "kv_heads": kv_heads}
    return Case(f"{what}, {count_of(kv_heads, 'KV head')}", size, data)


def _cases() -> tuple[list[Case], list[Case]]:
    """(what can be split, what cannot): small models, and some of real sizes."""
    small = [
        (size, group * kv_heads, kv_heads)
        for size, kv_heads, group in product((1, 2, 3, 4, 6, 8, 12), (1, 2, 3, 4, 6), (1, 2, 3, 5))
    ]
    real = [(4, 32, 8), (16, 32, 8), (32, 32, 8), (3, 32, 8), (8, 64, 8), (10, 40, 5), (64, 64, 8)]
    real += [(5, 40, 8), (16, 128, 128), (128, 128, 16), (7, 28, 4), (14, 28, 4), (7, 56, 14)]
    # Odd numbers of query heads that divide, and KV heads that do not.
    real += [(3, 15, 5), (5, 15, 3), (9, 45, 5), (7, 21, 3)]
    # 49 · (1 / 49) is less than 1. And many heads.
    real += [(2, 98, 2), (2, 8192, 64)]
    cases = sorted({*small, *real}, key=lambda shape: (max(shape[:2]), shape))
    splits = [_case(*shape) for shape in cases if _can_be_split(*shape)]
    return splits, [_case(*shape) for shape in cases if not _can_be_split(*shape)]


def check_heads(answer: Callable) -> str:
    """Every rank of many models must get its heads; what cannot be split is refused."""
    splits, others = _cases()
    found = collect(partial(_all_heads, answer), splits)
    number = diagnose(
        found.__getitem__,
        [(case,) for case in splits],
        partial(_all_heads, right_heads),
        EXERCISE.suspects,
        wording={"case = ": ""},
    )
    for case in others:
        _require_refusals(answer, case)
    return f"{number} models split, {len(others)} refused"


def _require_refusals(answer: Callable, case: Case) -> None:
    """Every rank must refuse."""
    heads, kv_heads = case.data["heads"], case.data["kv_heads"]
    for rank in range(case.size):
        try:
            expect_refusal(
                lambda rank=rank: answer(rank, case.size, heads, kv_heads),
                f"{case}, rank {rank},",
            )
        except Mistake as mistake:
            why = (
                f"{count_of(heads, 'query head')} cannot be dealt out to {case.size} ranks."
                if heads % case.size
                else f"Of {case.size} ranks and {kv_heads} KV heads neither is a multiple of the"
                " other. All ranks must refuse, also those whose own heads would fit."
            )
            raise Mistake(mistake.name, f"{mistake.message}\n{why}") from mistake


def _wrong(
    queries: Callable[..., Any] = _block, kv_heads: Callable[..., Any] | None = None
) -> Callable:
    """A suspect. queries(rank, size, heads), kv_heads(rank, size, heads, kv_heads, its queries)."""

    def heads(rank: int, size: int, num_heads: int, num_kv_heads: int) -> tuple:
        mine = queries(rank, size, num_heads)
        if kv_heads is None:
            return mine, right_heads(rank, size, num_heads, num_kv_heads)[1]
        return mine, kv_heads(rank, size, num_heads, num_kv_heads, mine)

    return partial(_all_heads, heads)


def _exchanged(case: Case) -> dict[str, list[int]]:
    def heads(*sizes: int) -> tuple:
        return right_heads(*sizes)[::-1]

    return _all_heads(heads, case)


EXERCISE = Exercise(
    id="09.1",
    title="Warm-up: whose heads are these?",
    check=check_heads,
    mistakes=(
        Known(
            "no-kv-head-left",
            (
                "You divide the KV heads among the ranks, and with more ranks than KV heads"
                " nothing is left for a rank. Its query heads need keys and values all the same:"
                " such a KV head is kept by several ranks."
            ),
            hint=1,
            suspects=(
                _wrong(kv_heads=lambda r, n, h, k, q: range(r * (k // n), (r + 1) * (k // n))),
                _wrong(kv_heads=lambda r, n, h, k, q: _block(r, n, k)),
            ),
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
            "order-exchanged",
            "The pair is the wrong way round: query heads first, then KV heads.",
            suspects=(_exchanged,),
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
            "kv-heads-beyond-the-last",
            (
                "Each rank takes the next KV head, also when there are fewer of them than ranks."
                " Head numbers must stay below num_kv_heads: neighbours share one."
            ),
            suspects=(
                _wrong(
                    kv_heads=lambda r, n, h, k, q: range(
                        r * max(1, k // n), (r + 1) * max(1, k // n)
                    )
                ),
            ),
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
            "kv-heads-of-one-end",
            (
                "With more ranks than KV heads you give most ranks the same KV head, the first or"
                " the last one. Ask which KV head a rank's own query heads read."
            ),
            hint=1,
            suspects=(
                _wrong(kv_heads=lambda r, n, h, k, q: _block(r, n, k) if k >= n else range(0, 1)),
                _wrong(
                    kv_heads=lambda r, n, h, k, q: (
                        _block(r, n, k) if k >= n else range(min(r, k - 1), min(r, k - 1) + 1)
                    )
                ),
                _wrong(
                    kv_heads=lambda r, n, h, k, q: _block(r, n, k) if k >= n else range(k - 1, k)
                ),
            ),
            answers=r"""
# %% zero where nothing is left
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    k = num_kv_heads // size
    return queries, range(rank * k, (rank + 1) * k) if k else range(0, 1)
""",
        ),
        Known(
            "kv-head-of-the-rank-number",
            (
                "You take the KV head with the rank's number. That is right only where there are as"
                " many ranks as KV heads: divide a query head by num_heads // num_kv_heads."
            ),
            hint=1,
            suspects=(
                _wrong(kv_heads=lambda r, n, h, k, q: range(r, r + 1)),
                _wrong(kv_heads=lambda r, n, h, k, q: [r]),
            ),
            answers=r"""
# %% divided by the rank's share of query heads
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    return queries, range(queries[0] // q, queries[-1] // q + 1)
""",
        ),
        Known(
            "borders-for-heads",
            (
                "You return where a range begins and ends, two numbers. Return the range itself, or"
                " all its heads."
            ),
            suspects=(
                _wrong(
                    lambda r, n, h: [r * h // n, (r + 1) * h // n],
                    lambda r, n, h, k, q: [
                        q[0] // (h // k),
                        (q[1] - 1) // (h // k) + 1,
                    ],
                ),
            ),
        ),
        Known(
            "next-head-only",
            (
                "Your blocks of query heads overlap: each begins one head after the block before."
                " Rank r begins where r whole blocks end."
            ),
            hint=1,
            suspects=(
                _wrong(lambda r, n, h: range(r, r + h // n)),
                _wrong(
                    lambda r, n, h: range(r, r + h // n),
                    lambda r, n, h, k, q: range(q[0] // (h // k), q[-1] // (h // k) + 1),
                ),
            ),
            answers=r"""
# %% from the rank on
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank, rank + q)
    group = num_heads // num_kv_heads
    return queries, range(queries[0] // group, queries[-1] // group + 1)
""",
        ),
        Known(
            "dealt-around",
            (
                "With more ranks than KV heads you deal them around like cards: rank %"
                " num_kv_heads. But neighbouring query heads read the same KV head, so"
                " neighbouring *ranks* must share it."
            ),
            suspects=(
                _wrong(
                    kv_heads=lambda r, n, h, k, q: (
                        _block(r, n, k) if k >= n else range(r % k, r % k + 1)
                    )
                ),
            ),
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
            (
                "You give each rank every n-th head. The statement asks for a block: heads that"
                " stand together, because neighbouring query heads read the same KV head."
            ),
            hint=1,
            suspects=(
                _wrong(lambda r, n, h: range(r, h, n)),
                _wrong(
                    lambda r, n, h: range(r, h, n),
                    lambda r, n, h, k, q: (
                        range(r, k, n) if k >= n else range(r * k // n, r * k // n + 1)
                    ),
                ),
                _wrong(lambda r, n, h: range(r, h, n), lambda r, n, h, k, q: range(r, k, n)),
                _wrong(
                    lambda r, n, h: range(r, h, n),
                    lambda r, n, h, k, q: sorted({head // (h // k) for head in q}),
                ),
                _wrong(
                    lambda r, n, h: range(r, h, n),
                    lambda r, n, h, k, q: range(q[0] // (h // k), q[-1] // (h // k) + 1),
                ),
            ),
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
            (
                "Every rank has all KV heads. That would work, but the cache, which is most of the"
                " memory, would not be split at all. A rank needs the KV heads that its own query"
                " heads read."
            ),
            suspects=(_wrong(kv_heads=lambda r, n, h, k, q: range(k)),),
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
            (
                "You list a KV head for each query head. Several query heads read the same one:"
                " num_heads // num_kv_heads of them. A rank keeps each KV head once."
            ),
            suspects=(
                _wrong(kv_heads=lambda r, n, h, k, q: [head // (h // k) for head in q]),
                _wrong(kv_heads=lambda r, n, h, k, q: q),
            ),
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
            "one-kv-head-only",
            (
                "You look at one query head of the rank only. The others may read further KV"
                " heads: ask for the first and for the last one."
            ),
            hint=1,
            suspects=(
                _wrong(
                    kv_heads=lambda r, n, h, k, q: range(q[0] // (h // k), q[0] // (h // k) + 1)
                ),
                _wrong(
                    kv_heads=lambda r, n, h, k, q: range(q[-1] // (h // k), q[-1] // (h // k) + 1)
                ),
            ),
            answers=r"""
# %% the KV head of the first query head
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    k = queries[0] // (num_heads // num_kv_heads)
    return queries, range(k, k + 1)
""",
        ),
        Known(
            "readers-by-remainder",
            (
                "You find the KV head of a query head with a remainder, h % num_kv_heads."
                " Neighbouring query heads read the same one: h // (num_heads // num_kv_heads)."
            ),
            suspects=(
                _wrong(kv_heads=lambda r, n, h, k, q: sorted({head % k for head in q})),
                _wrong(kv_heads=lambda r, n, h, k, q: range(q[0] % k, q[-1] % k + 1)),
                _wrong(kv_heads=lambda r, n, h, k, q: sorted({head % (h // k) for head in q})),
            ),
            answers=r"""
# %% like a modulo hash
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    return queries, sorted({h % num_kv_heads for h in queries})
""",
        ),
        Known(
            "last-head-left-out",
            "Your ranges end one too early: `range(a, b)` does not hold b.",
            hint=2,
            suspects=(
                _wrong(lambda r, n, h: _block(r, n, h)[:-1]),
                _wrong(kv_heads=lambda r, n, h, k, q: range(q[0] // (h // k), q[-1] // (h // k))),
                _wrong(
                    lambda r, n, h: _block(r, n, h)[:-1],
                    lambda r, n, h, k, q: right_heads(r, n, h, k)[1][:-1],
                ),
            ),
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
            "one-head-too-many",
            "Your ranges end one too late: `range(a, b)` ends with b − 1.",
            hint=2,
            suspects=(
                _wrong(
                    kv_heads=lambda r, n, h, k, q: range(q[0] // (h // k), q.stop // (h // k) + 1)
                ),
                _wrong(lambda r, n, h: range(r * h // n, (r + 1) * h // n + 1)),
            ),
            answers=r"""
# %% the stop of a range, taken for its last head
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, range(queries.start // group, queries.stop // group + 1)
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

# %% refuses only the ranks whose own heads straddle
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size:
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    first, last = queries[0], queries[-1]
    if first // group != last // group and (first % group or (last + 1) % group):
        raise ValueError("straddles")
    return queries, range(first // group, last // group + 1)
""",
        ),
        Known(
            "wrong-error",
            answers=r"""
# %% more ranks than query heads: an index error by accident
def my_heads(rank, size, num_heads, num_kv_heads):
    if size % num_kv_heads and num_kv_heads % size:
        raise ValueError("cannot be split")
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, range(queries[0] // group, queries[-1] // group + 1)
""",
        ),
        replace(
            REFUSED,
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
