"""08.2: which sizes to record."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from random import Random
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_unchanged

#: Seconds of CPU time that an answer may take for all cases of a kind. The right one takes less
#: than a tenth of a second.
LIMIT = 6.0

_Case = tuple[dict[int, int], int, int]


def _padding(sizes: Sequence[int], seen: dict[int, int]) -> int:
    return sum(steps * (min(size for size in sizes if size >= n) - n) for n, steps in seen.items())


def _best_sizes(seen: dict[int, int], max_num_seqs: int, num_graphs: int) -> list[int]:
    return _cheapest(seen, max_num_seqs, num_graphs, lambda n, size: seen.get(n, 0) * (size - n))


def _cheapest(
    seen: dict[int, int], max_num_seqs: int, num_graphs: int, cost: Callable[[int, int], float]
) -> list[int]:
    """The sizes with the least sum of costs. cost(n, size): of all steps of n sequences."""
    counts = sorted({*seen, max_num_seqs})
    best: dict[int, tuple[float, list[int]]] = {0: (0, [])}
    for _ in range(num_graphs):
        further = dict(best)
        for done, (padding, sizes) in best.items():
            for end in range(done + 1, len(counts) + 1):
                size = counts[end - 1]
                total = padding + sum(cost(n, size) for n in counts[done:end])
                if end not in further or total < further[end][0]:
                    further[end] = total, [*sizes, size]
        best = further
    return best[len(counts)][1]


# --- usual mistakes -------------------------------------------------------------------------------


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


def _shares_of_numbers(seen: dict[int, int], top: int, k: int) -> list[int]:
    """As many different numbers in each group."""
    counts = sorted({*seen, top})
    cuts = [math.ceil(len(counts) * (i + 1) / k) for i in range(min(k, len(counts)))]
    return sorted({*(counts[cut - 1] for cut in cuts), top})


def _shares_of_steps(seen: dict[int, int], top: int, k: int) -> list[int]:
    """As many steps in each group."""
    total, done, sizes = sum(seen.values()), 0, {top}
    for n in sorted(seen):
        done += seen[n]
        if done * k >= total * len(sizes) and len(sizes) < k:
            sizes.add(n)
    return sorted(sizes)


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


def _exchanged(seen: dict[int, int], top: int, k: int) -> list[int]:
    """Greedy, and then one size for another for as long as that helps."""
    sizes = _greedy(seen, top, k)
    while True:
        others = [
            sorted([*(s for s in sizes if s != out), n])
            for out in sizes[:-1]
            for n in seen
            if n not in sizes
        ]
        found = min(others, key=lambda some: _padding(some, seen), default=sizes)
        if _padding(found, seen) >= _padding(sizes, seen):
            return sizes
        sizes = found


def _unweighted(seen: dict[int, int], top: int, k: int) -> list[int]:
    return _best_sizes(dict.fromkeys(seen, 1), top, k)


def _steps_padded(seen: dict[int, int], top: int, k: int) -> list[int]:
    return _cheapest(seen, top, k, lambda n, size: seen.get(n, 0) * (size != n))


def _shares_padded(seen: dict[int, int], top: int, k: int) -> list[int]:
    return _cheapest(seen, top, k, lambda n, size: seen.get(n, 0) * (size - n) / size)


def _rows_twice(seen: dict[int, int], top: int, k: int) -> list[int]:
    return _cheapest(seen, top, k, lambda n, size: seen.get(n, 0) * n * (size - n))


# --- the cases ------------------------------------------------------------------------------------


def _small_cases() -> list[_Case]:
    cases: list[_Case] = [
        ({1: 1}, 1, 1),
        ({3: 5, 8: 2}, 8, 2),
        ({1: 9, 2: 1, 7: 4, 8: 4}, 8, 2),
        ({5: 10}, 16, 4),
        ({8: 1, 3: 7}, 8, 5),
        ({1: 8, 2: 5, 3: 7, 4: 8}, 6, 3),
        ({1: 2, 3: 3, 4: 3, 5: 6, 6: 1}, 6, 3),
        ({5: 10, 6: 1}, 16, 1),
        ({1: 10, 4: 10, 9: 10, 12: 1, 16: 1}, 16, 3),
        ({1: 100, 9: 40, 10: 40, 11: 40, 20: 1, 31: 60, 32: 60}, 32, 4),
        (dict.fromkeys(range(1, 13), 1), 12, 4),
        # Memory for more graphs than there are sizes.
        ({3: 5, 8: 2, 11: 1}, 16, 64),
    ]
    random = Random(28)
    for _ in range(250):
        top = random.randint(2, 40)
        counts = random.sample(range(1, top + 1), random.randint(1, min(top, 11)))
        steps = {
            n: random.choice((1, random.randint(1, 9), random.randint(1, 300))) for n in counts
        }
        cases.append((steps, top, random.randint(1, 5)))
    # The same numbers of sequences, in other numbers of steps.
    twins = [
        (dict(zip(seen, reversed(seen.values()), strict=True)), top, graphs)
        for seen, top, graphs in cases[-60:]
    ]
    return cases + twins


def _large_cases() -> list[_Case]:
    random, cases = Random(8), [({n: 1 + 30 * (n % 8 == 5) for n in range(1, 41)}, 48, 6)]
    for top, many, graphs in ((32, 10, 3), (64, 20, 5), (128, 30, 13), (200, 50, 8)):
        for _ in range(3):
            counts = random.sample(range(1, top + 1), many)
            cases.append(({n: random.randint(1, 200) for n in counts}, top, graphs))
    # Few graphs for many numbers: groups are long.
    cases += [(cases[-1][0], 200, 2), (cases[-2][0], 200, 1)]
    # Years of steps: sums that float32 and int32 do not hold, and the last digits decide.
    for many, graphs, spread in ((20, 3, 50), (20, 3, 60), (50, 7, 300), (50, 7, 400)):
        years = {n: 10**9 + random.randint(0, spread) for n in range(1, many + 1)}
        cases.append((years, many + 5, graphs))
    return cases


def check_choose_sizes(answer: Callable) -> str:
    small, large = _small_cases(), _large_cases()
    _judge_padding(small, _all_sizes(answer, small))
    with _cpu_limit("With 50 different numbers and 8 graphs"):
        found = _all_sizes(answer, large)
    _judge_padding(large, found)
    count = len(small) + len(large)
    return f"{count} kinds of traffic, nowhere a row of padding too many"


def _described(case: _Case) -> str:
    seen, top, graphs = case
    return f"With seen = {show(seen)}, max_num_seqs = {top}, num_graphs = {graphs}"


def _all_sizes(answer: Callable, cases: Sequence[_Case]) -> list[list[int]]:
    """The sizes that the answer chooses in each case; a later call must not change them."""
    found: list[list[int]] = []
    before: Any = []
    for case in cases:
        sizes = _sizes_of(answer, case)
        if found and list(before) != found[-1]:
            raise EXERCISE.mistake(
                "result-reused", f"The list {show(found[-1])} has become {show(list(before))}."
            )
        found.append(list(sizes))
        before = sizes
    return found


def _sizes_of(answer: Callable, case: _Case) -> Sequence[int]:
    """The sizes that the answer chooses; they must be sizes that could be recorded."""
    seen, top, graphs = case
    given, what = dict(seen), _described(case)
    sizes: Any = answer(given, top, graphs)
    expect_unchanged(given, seen, "`seen`")
    is_list = isinstance(sizes, list | tuple) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in sizes
    )
    expect(
        is_list and sizes,
        "wrong-type",
        f"{what}: got {show(sizes)}.\nExpected a list of at least one integer.",
    )
    if len(set(sizes)) > graphs:
        raise EXERCISE.mistake(
            "too-many-graphs", f"{what}: you record {len(set(sizes))} sizes, {show(sizes)}."
        )
    if max(sizes) < top:
        raise EXERCISE.mistake("largest-missing", f"{what}: your largest size is {max(sizes)}.")
    if max(sizes) > top or min(sizes) < 1:
        raise EXERCISE.mistake("useless-size", f"{what}: got {show(sizes)}.")
    if any(a >= b for a, b in pairwise(sizes)):
        raise EXERCISE.mistake("not-ascending", f"{what}: got {show(sizes)}.")
    return sizes


def _judge_padding(cases: Sequence[_Case], found: Sequence[list[int]]) -> None:
    """Compare with the least padding, and name a rule that pads as much in all cases."""
    best = [_padding(_best_sizes(*case), case[0]) for case in cases]
    mine = [_padding(sizes, case[0]) for sizes, case in zip(found, cases, strict=True)]
    worse = [i for i in range(len(cases)) if mine[i] > best[i]]
    if not worse:
        return
    i = min(worse, key=lambda i: (len(cases[i][0]), sum(cases[i][0].values())))
    seen = (
        f"{_described(cases[i])}: your sizes {show(found[i])} make {mine[i]:,} rows of padding;"
        f" {show(_best_sizes(*cases[i]))} make {best[i]:,}."
    )
    for name, (_, *rules) in EXERCISE.suspects.items():
        if any(_pads_like(rule, cases, mine) for rule in rules):
            raise EXERCISE.mistake(name, seen)
    if _gave_before(i, cases, found):
        raise EXERCISE.mistake("same-as-before", seen)
    raise EXERCISE.mistake(
        "too-much-padding", f"{seen}\nIn {len(worse)} of {len(cases)} cases a better choice exists."
    )


def _gave_before(i: int, cases: Sequence[_Case], found: Sequence[list[int]]) -> bool:
    """Whether these sizes were the right ones for an earlier case with the same numbers."""
    (seen, *rest) = cases[i]
    return any(
        (set(other), *more) == (set(seen), *rest)
        and other != seen
        and found[j] == found[i] == _best_sizes(other, *more)
        for j, (other, *more) in enumerate(cases[:i])
    )


def _pads_like(rule: Callable, cases: Sequence[_Case], mine: Sequence[int]) -> bool:
    return all(
        _padding(rule(*case), case[0]) == padding for case, padding in zip(cases, mine, strict=True)
    )


@contextmanager
def _cpu_limit(what: str) -> Iterator[None]:
    """Mistake("too-slow") after `LIMIT` seconds of this process's CPU time.

    No limit where there is no such timer (Windows), or outside of the main thread.
    """

    def stop(*args: Any) -> None:
        raise EXERCISE.mistake("too-slow", f"{what} your code had not ended after {LIMIT:g} s.")

    try:
        before = signal.signal(signal.SIGVTALRM, stop)
    except (AttributeError, ValueError):
        yield
        return
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


EXERCISE = Exercise(
    id="08.2",
    title="Which sizes to record",
    check=check_choose_sizes,
    mistakes=(
        Known(
            "powers-of-two",
            message=(
                "You take powers of two, whatever comes. If most steps have 33 sequences, 64 is"
                " a bad home for them."
            ),
            hint=1,
            suspects=(_powers, _small_powers),
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
            message=("You space the sizes evenly, whatever comes. Look at `seen`."),
            hint=1,
            suspects=(_even, _even_up),
            answers=r"""
# %% whatever comes
def choose_sizes(seen, max_num_seqs, num_graphs):
    return sorted(
        {max(1, max_num_seqs * (i + 1) // num_graphs) for i in range(num_graphs)}
    )
""",
        ),
        Known(
            "equal-shares",
            message=(
                "You cut the numbers into groups of equal shares. Groups may be as unequal as"
                " the traffic is: count the rows of padding that a cut makes."
            ),
            hint=2,
            suspects=(_shares_of_numbers, _shares_of_steps),
            answers=r"""
# %% as many numbers in each group
def choose_sizes(seen, max_num_seqs, num_graphs):
    counts = sorted({*seen, max_num_seqs})
    groups = min(num_graphs, len(counts))
    return sorted(
        {counts[-(-len(counts) * (i + 1) // num_graphs) - 1] for i in range(groups)}
        | {max_num_seqs}
    )
""",
        ),
        Known(
            "most-frequent",
            message=(
                "You take the numbers that come most often. A number that is rare and far from"
                " the next size can cost more, and two frequent neighbours can share a size."
            ),
            hint=2,
            suspects=(_frequent, _most_rows),
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
            message=(
                "You add, one after the other, the size that helps most at that moment. The"
                " best pair need not contain the best single one: an early choice may stand in"
                " the way of better ones."
            ),
            hint=2,
            suspects=(_greedy,),
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
            message=(
                "You begin with all sizes and drop, one after the other, the one that costs"
                " least. An early drop may have been wrong: two neighbours dropped together may"
                " cost less."
            ),
            hint=2,
            suspects=(_merged,),
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
            "exchanged-one-by-one",
            message=(
                "You exchange one size for another for as long as that helps. The best choice"
                " may differ in two sizes at once, and neither change alone helps."
            ),
            hint=2,
            suspects=(_exchanged,),
            answers=r"""
# %% exchanges one size while that helps
def choose_sizes(seen, max_num_seqs, num_graphs):
    def padding(sizes):
        return sum(
            steps * (min(s for s in sizes if s >= n) - n) for n, steps in seen.items()
        )

    sizes = [max_num_seqs]
    while len(sizes) < num_graphs and set(seen) - set(sizes):
        left = sorted(set(seen) - set(sizes))
        sizes = sorted([*sizes, min(left, key=lambda n: padding([*sizes, n]))])
    while True:
        others = [
            sorted([*(s for s in sizes if s != out), n])
            for out in sizes[:-1]
            for n in seen
            if n not in sizes
        ]
        found = min(others, key=padding, default=sizes)
        if padding(found) >= padding(sizes):
            return sizes
        sizes = found
""",
        ),
        Known(
            "frequency-ignored",
            message=(
                "You count each number once. But seen[n] is in how many steps it ran: a row of"
                " padding in 200 steps is 200 rows."
            ),
            suspects=(_unweighted,),
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
            "steps-counted",
            message=(
                "You count the steps that are padded. Count the rows of padding: a step of 9 in"
                " a graph of 16 has 7, in a graph of 10 only one."
            ),
            suspects=(_steps_padded,),
            answers=r"""
# %% a padded step counts once
@@
-                more = sum(seen.get(n, 0) * (size - n) for n in counts[done:end])
+                more = sum(seen.get(n, 0) for n in counts[done : end - 1])
""",
        ),
        Known(
            "shares-counted",
            message=(
                "You add up the share of padding in each step. The statement asks for rows: 8"
                " rows too many in a step of 100 are more than 4 too many in a step of 5."
            ),
            suspects=(_shares_padded,),
            answers=r"""
# %% the share of each step
@@
-                more = sum(seen.get(n, 0) * (size - n) for n in counts[done:end])
+                more = sum(
+                    seen.get(n, 0) * (size - n) / size for n in counts[done:end]
+                )
""",
        ),
        Known(
            "rows-weighted-twice",
            message=(
                "You multiply by the number of sequences as well. A step of n sequences in a"
                " graph of `size` has size - n rows of padding, however large n is."
            ),
            suspects=(_rows_twice,),
            answers=r"""
# %% times n
@@
-                more = sum(seen.get(n, 0) * (size - n) for n in counts[done:end])
+                more = sum(seen.get(n, 0) * n * (size - n) for n in counts[done:end])
""",
        ),
        Known(
            "too-much-padding",
            message=(
                "What does the best choice for the first few numbers look like, if the last"
                " group is taken away?"
            ),
            hint=3,
            answers=r"""
# %% the last group is not counted
@@
-                more = sum(seen.get(n, 0) * (size - n) for n in counts[done:end])
+                more = sum(
+                    seen.get(n, 0) * (size - n)
+                    for n in counts[done:end]
+                    if end < len(counts)
+                )

# %% adds up in float32
@@
-                more = sum(seen.get(n, 0) * (size - n) for n in counts[done:end])
+                rows = [float(seen.get(n, 0) * (size - n)) for n in counts[done:end]]
+                more = torch.tensor(rows).sum().item()
""",
        ),
        Known(
            "same-as-before",
            message=(
                "These sizes were right for an earlier call, with the same numbers of sequences"
                " in other numbers of steps. Does your code keep something from one call to the"
                " next?"
            ),
            answers=r"""
# %% remembers by the numbers alone
@@
     counts = sorted({*seen, max_num_seqs})
+    memory = choose_sizes.__dict__
+    key = str((counts, num_graphs))
+    if key in memory:
+        return list(memory[key])
@@
-    return best[len(counts)][1]
+    memory[key] = best[len(counts)][1]
+    return list(memory[key])
""",
        ),
        Known(
            "result-reused",
            message=(
                "Your function returns the same list at each call, and overwrites it. Its"
                " caller may still use it: make a new one in each call."
            ),
            answers=r"""
# %% one list for all calls
@@
-    return best[len(counts)][1]
+    if not hasattr(choose_sizes, "sizes"):
+        choose_sizes.sizes = []
+    choose_sizes.sizes[:] = best[len(counts)][1]
+    return choose_sizes.sizes
""",
        ),
        Known(
            "largest-missing",
            message=(
                "A step may have up to max_num_seqs sequences, and no graph would fit it."
                " max_num_seqs always belongs to the sizes."
            ),
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
            message=("There is memory for num_graphs recordings, and max_num_seqs is one of them."),
            answers=r"""
# %% the largest comes on top
def choose_sizes(seen, max_num_seqs, num_graphs):
    often = sorted(seen, key=lambda n: -seen[n])[:num_graphs]
    return sorted({*often, max_num_seqs})
""",
        ),
        Known(
            "useless-size",
            message=("No step has more than max_num_seqs sequences, or fewer than 1."),
            answers=r"""
# %% rounded up to a multiple of eight
@@
-    return best[len(counts)][1]
+    return [-(-size // 8) * 8 for size in best[len(counts)][1]]
""",
        ),
        Known(
            "not-ascending",
            message=("Each size once, in ascending order."),
            answers=r"""
# %% in the order in which they were found
def choose_sizes(seen, max_num_seqs, num_graphs):
    often = sorted((n for n in seen if n != max_num_seqs), key=lambda n: -seen[n])
    return [max_num_seqs, *often[: num_graphs - 1]]
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% the largest is put into the caller's numbers
@@
-    counts = sorted({*seen, max_num_seqs})
+    seen.setdefault(max_num_seqs, 0)
+    counts = sorted(seen)
""",
        ),
        Known(
            "too-slow",
            message=(
                "Trying all choices takes too long: there are over a hundred million. Look for"
                " a way in which the best choice for few numbers and graphs is used for more."
            ),
            hint=2,
            answers=r"""
# %% every choice
def choose_sizes(seen, max_num_seqs, num_graphs):
    from itertools import combinations

    counts = sorted(set(seen) - {max_num_seqs})

    def padding(sizes):
        return sum(
            steps * (min(s for s in sizes if s >= n) - n) for n, steps in seen.items()
        )

    count = min(num_graphs - 1, len(counts))
    some = ([*chosen, max_num_seqs] for chosen in combinations(counts, count))
    return min(some, key=padding)
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
