"""08.2: which sizes to record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    pass
from minivllm.course.grading.exercise import Exercise, Known


def _padding(sizes: Sequence[int], seen: dict[int, int]) -> int:
    return sum(steps * (min(size for size in sizes if size >= n) - n) for n, steps in seen.items())


def _best_sizes(seen: dict[int, int], max_num_seqs: int, num_graphs: int) -> list[int]:
    counts = sorted({*seen, max_num_seqs})
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for _ in range(num_graphs):
        further = dict(best)
        for done, (padding, sizes) in best.items():
            rows = steps = 0  # of the group counts[done:end], as if nothing were padded
            for end in range(done + 1, len(counts) + 1):
                size = counts[end - 1]
                rows, steps = rows + size * seen.get(size, 0), steps + seen.get(size, 0)
                total = padding + size * steps - rows
                if end not in further or total < further[end][0]:
                    further[end] = total, [*sizes, size]
        best = further
    return best[len(counts)][1]


def _powers(seen: dict[int, int], top: int, k: int) -> list[int]:
    sizes = [top]
    power = 1 << (top - 1).bit_length() - 1 if top > 1 else 1
    while len(sizes) < k and power >= 1:
        if power < top:
            sizes.append(power)
        power //= 2
    return sorted(sizes)


def _small_powers(seen: dict[int, int], top: int, k: int) -> list[int]:
    return sorted({*[1 << i for i in range(k - 1) if 1 << i < top], top})


def _even(seen: dict[int, int], top: int, k: int) -> list[int]:
    return sorted({max(1, top * (i + 1) // k) for i in range(k)})


def _even_up(seen: dict[int, int], top: int, k: int) -> list[int]:
    return sorted({math.ceil(top * (i + 1) / k) for i in range(k)})


def _frequent(seen: dict[int, int], top: int, k: int) -> list[int]:
    often = sorted((n for n in seen if n != top), key=lambda n: -seen[n])
    return sorted([*often[: k - 1], top])


def _most_rows(seen: dict[int, int], top: int, k: int) -> list[int]:
    often = sorted((n for n in seen if n != top), key=lambda n: -seen[n] * n)
    return sorted([*often[: k - 1], top])


def _greedy(seen: dict[int, int], top: int, k: int) -> list[int]:
    sizes = [top]
    while len(sizes) < k and (left := [n for n in seen if n not in sizes]):
        sizes.append(min(sorted(left), key=lambda n: _padding([*sizes, n], seen)))
    return sorted(sizes)


def _merged(seen: dict[int, int], top: int, k: int) -> list[int]:
    sizes = sorted({*seen, top})
    while len(sizes) > k:
        sizes.remove(min(sizes[:-1], key=lambda n: _padding([s for s in sizes if s != n], seen)))
    return sizes


def _unweighted(seen: dict[int, int], top: int, k: int) -> list[int]:
    return _best_sizes(dict.fromkeys(seen, 1), top, k)


def check_choose_sizes(answer: Callable) -> str:
    random = Random(8)
    cases: list[tuple[dict[int, int], int, int]] = [
        ({1: 1}, 1, 1),
        ({3: 5, 8: 2}, 8, 2),
        ({1: 9, 2: 1, 7: 4, 8: 4}, 8, 2),
        ({5: 10}, 16, 4),
        ({1: 8, 2: 5, 3: 7, 4: 8}, 6, 3),
        ({1: 2, 3: 3, 4: 3, 5: 6, 6: 1}, 6, 3),
        ({5: 10, 6: 1}, 16, 1),
        ({1: 10, 4: 10, 9: 10, 12: 1, 16: 1}, 16, 3),
        ({1: 100, 9: 40, 10: 40, 11: 40, 20: 1, 31: 60, 32: 60}, 32, 4),
        (dict.fromkeys(range(1, 13), 1), 12, 4),
        ({n: 1 + 30 * (n % 8 == 5) for n in range(1, 41)}, 48, 6),
    ]
    for top, many, graphs in ((32, 10, 3), (64, 20, 5), (128, 30, 6), (256, 50, 8)):
        counts = random.sample(range(1, top + 1), many)
        cases.append(({n: random.randint(1, 200) for n in counts}, top, graphs))
    suspects = {
        "powers-of-two": (
            (
                "You take powers of two, whatever comes. If most steps have 33 sequences, 64 is a"
                " bad home for them."
            ),
            (_powers, _small_powers),
        ),
        "evenly-spaced": (
            "You space the sizes evenly, whatever comes. Look at `seen`.",
            (_even, _even_up),
        ),
        "most-frequent": (
            (
                "You take the numbers that come most often. A number that is rare and far from the"
                " next size can cost more, and two frequent neighbours can share a size."
            ),
            (_frequent, _most_rows),
        ),
        "greedy": (
            (
                "You add, one after the other, the size that helps most at that moment. The best"
                " pair need not contain the best single one: an early choice may stand in the way"
                " of better ones."
            ),
            (_greedy,),
        ),
        "merged-step-by-step": (
            (
                "You begin with all sizes and drop, one after the other, the one that costs least."
                " An early drop may have been wrong: two neighbours dropped together may cost less."
            ),
            (_merged,),
        ),
        "frequency-ignored": (
            (
                "You count each number once. But seen[n] is in how many steps it ran: a row of"
                " padding in 200 steps is 200 rows."
            ),
            (_unweighted,),
        ),
    }
    found = []
    for seen, top, graphs in cases:
        given = dict(seen)
        sizes = answer(given, top, graphs)
        case = f"With seen = {show(seen)}, max_num_seqs = {top}, num_graphs = {graphs}"
        expect(
            given == seen,
            "changed-input",
            f"{case}: your code changed `seen`, which belongs to its caller.\nCopy it.",
        )
        is_list = isinstance(sizes, list | tuple) and all(
            isinstance(n, int) and not isinstance(n, bool) for n in sizes
        )
        expect(
            is_list and sizes,
            "wrong-type",
            f"{case}: got {show(sizes)}.\nExpected a list of at least one integer.",
        )
        found.append(list(sizes))
        expect(
            len(set(sizes)) <= graphs,
            "too-many-graphs",
            f"{case}: you record {len(set(sizes))} sizes, {show(found[-1])}.\nThere is memory for"
            f" {graphs}.",
        )
        expect(
            max(sizes) >= top,
            "largest-missing",
            f"{case}: your largest size is {max(sizes)}.\nA step may have up to {top} sequences,"
            " and no graph would fit it. max_num_seqs always belongs to the sizes.",
        )
        expect(
            max(sizes) == top and min(sizes) >= 1,
            "useless-size",
            f"{case}: {show(found[-1])}.\nNo step has more than {top} sequences or fewer than 1.",
        )
        expect(
            list(sizes) == sorted(set(sizes)),
            "not-ascending",
            f"{case}: got {show(found[-1])}.\nEach size once, in ascending order.",
        )
    best = [_padding(_best_sizes(*case), case[0]) for case in cases]
    mine = [_padding(sizes, case[0]) for sizes, case in zip(found, cases, strict=True)]
    worse = [i for i in range(len(cases)) if mine[i] > best[i]]
    if worse:
        i = worse[0]
        seen, top, graphs = cases[i]
        what = (
            f"With seen = {show(seen)}, max_num_seqs = {top}, num_graphs = {graphs}: your sizes"
            f" {show(found[i])} make {mine[i]:,} rows of padding; {show(_best_sizes(*cases[i]))}"
            f" make {best[i]:,}."
        )
        for name, (why, functions) in suspects.items():
            if any(
                all(_padding(f(*case), case[0]) == m for case, m in zip(cases, mine, strict=True))
                for f in functions
            ):
                raise Mistake(name, f"{what}\n{why}")
        raise Mistake(
            "too-much-padding",
            f"{what}\nIn {len(worse)} of {len(cases)} cases there is a better choice. What does "
            "the best "
            "choice for the first few numbers look like, if the last group is taken away?",
        )
    return f"{len(cases)} kinds of traffic, nowhere a row of padding too many"


EXERCISE = Exercise(
    id="08.2",
    title="Which sizes to record",
    check=check_choose_sizes,
    mistakes=(
        Known(
            "powers-of-two",
            answers=r"""
# %% whatever comes
def choose_sizes(seen, max_num_seqs, num_graphs):
    sizes, power = [max_num_seqs], 1
    while power < max_num_seqs and len(sizes) < num_graphs:
        sizes.append(power)
        power *= 2
    return sorted(sizes)

# %% the largest ones
def choose_sizes(seen, max_num_seqs, num_graphs):
    powers = [2**i for i in range(20) if 2**i < max_num_seqs]
    return (powers[-(num_graphs - 1) :] if num_graphs > 1 else []) + [max_num_seqs]
""",
        ),
        Known(
            "evenly-spaced",
            answers=r"""
# %% whatever comes
def choose_sizes(seen, max_num_seqs, num_graphs):
    return sorted(
        {max(1, max_num_seqs * (i + 1) // num_graphs) for i in range(num_graphs)}
    )
""",
        ),
        Known(
            "most-frequent",
            answers=r"""
# %% the numbers that come most often
def choose_sizes(seen, max_num_seqs, num_graphs):
    others = [n for n in seen if n != max_num_seqs]
    others.sort(key=lambda n: seen[n], reverse=True)
    return sorted(others[: num_graphs - 1] + [max_num_seqs])
""",
        ),
        Known(
            "greedy",
            answers=r"""
# %% always the one that helps most now
def choose_sizes(seen, max_num_seqs, num_graphs):
    def padding(sizes):
        return sum(
            steps * (min(s for s in sizes if s >= n) - n) for n, steps in seen.items()
        )

    sizes = [max_num_seqs]
    while len(sizes) < num_graphs and set(seen) - set(sizes):
        sizes.append(
            min(sorted(set(seen) - set(sizes)), key=lambda n: padding(sizes + [n]))
        )
    return sorted(sizes)
""",
        ),
        Known(
            "merged-step-by-step",
            answers=r"""
# %% drop the cheapest until few are left
def choose_sizes(seen, max_num_seqs, num_graphs):
    def padding(sizes):
        return sum(
            steps * (min(s for s in sizes if s >= n) - n) for n, steps in seen.items()
        )

    sizes = sorted(set(seen) | {max_num_seqs})
    while len(sizes) > num_graphs:
        drop = min(sizes[:-1], key=lambda n: padding([s for s in sizes if s != n]))
        sizes.remove(drop)
    return sizes
""",
        ),
        Known(
            "frequency-ignored",
            answers=r"""
# %% every number counts once
def choose_sizes(seen, max_num_seqs, num_graphs):
    counts = sorted({*seen, max_num_seqs})
    best = {0: (0, [])}
    for _ in range(num_graphs):
        further = dict(best)
        for done, (padding, sizes) in best.items():
            for end in range(done + 1, len(counts) + 1):
                size = counts[end - 1]
                more = sum(size - n for n in counts[done:end])
                if end not in further or padding + more < further[end][0]:
                    further[end] = padding + more, [*sizes, size]
        best = further
    return best[len(counts)][1]
""",
        ),
        Known(
            "largest-missing",
            answers=r"""
# %% only numbers that were seen
def choose_sizes(seen, max_num_seqs, num_graphs):
    counts = sorted(seen)
    best = {0: (0, [])}
    for _ in range(num_graphs):
        further = dict(best)
        for done, (padding, sizes) in best.items():
            for end in range(done + 1, len(counts) + 1):
                size = counts[end - 1]
                more = sum(seen[n] * (size - n) for n in counts[done:end])
                if end not in further or padding + more < further[end][0]:
                    further[end] = padding + more, [*sizes, size]
        best = further
    return best[len(counts)][1]
""",
        ),
        Known(
            "too-many-graphs",
            answers=r"""
# %% the largest comes on top
def choose_sizes(seen, max_num_seqs, num_graphs):
    often = sorted(seen, key=lambda n: -seen[n])[:num_graphs]
    return sorted({*often, max_num_seqs})
""",
        ),
        Known(
            "not-ascending",
            answers=r"""
# %% in the order in which they were found
def choose_sizes(seen, max_num_seqs, num_graphs):
    often = sorted((n for n in seen if n != max_num_seqs), key=lambda n: -seen[n])
    return [max_num_seqs, *often[: num_graphs - 1]]
""",
        ),
    ),
    right=r"""
# %% recursion with a memory
def choose_sizes(seen, max_num_seqs, num_graphs):
    from functools import cache

    counts = sorted(set(seen) | {max_num_seqs})

    @cache
    def cost(first, last):
        return sum(
            seen.get(n, 0) * (counts[last] - n) for n in counts[first : last + 1]
        )

    @cache
    def best(last, graphs):
        alone = (cost(0, last), (counts[last],))
        if graphs == 1:
            return alone
        options = [alone]
        for before in range(last):
            padding, sizes = best(before, graphs - 1)
            options.append((padding + cost(before + 1, last), (*sizes, counts[last])))
        return min(options)

    return list(best(len(counts) - 1, num_graphs)[1])
""",
)
