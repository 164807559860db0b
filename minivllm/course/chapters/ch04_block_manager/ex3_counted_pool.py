"""04.3: reference counts."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect


class _CountedPool:
    """What 04.3 asks for."""

    def __init__(self, num_blocks: int) -> None:
        self.counts, self.queue = [0] * num_blocks, deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.queue)

    def ref_count(self, block: int) -> int:
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.queue):
            return None
        taken = [self.queue.popleft() for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.counts[block] == 0:
                self.queue.remove(block)
            self.counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        if any(self.counts[block] == 0 for block in blocks):
            raise ValueError("not in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.queue.append(block)


def _counts(pool: Any, num_blocks: int) -> list[int]:
    return [pool.ref_count(block) for block in range(num_blocks)]


def _took(pool: Any, count: int, story: str) -> list[int]:
    taken = pool.allocate(count)
    expect(
        isinstance(taken, list) and len(taken) == len(set(taken)) == count,
        "wrong-type" if not isinstance(taken, list) else "wrong-values",
        f"{story}: allocate({count}) gave {show(taken)}.\nIt should return a list of {count}"
        " different free blocks.",
    )
    return taken


def check_counted_pool(answer: type) -> str:
    pool = answer(8)
    expect(
        pool.num_free == 8 and _counts(pool, 8) == [0] * 8,
        "wrong-values",
        f"A new pool of 8 blocks has num_free = {pool.num_free} and counts {_counts(pool, 8)}.\nAll"
        " 8 are free, nobody uses any.",
    )
    a = _took(pool, 3, "From a new pool of 8")
    expect(
        [pool.ref_count(block) for block in a] != [0] * 3,
        "fresh-count-zero",
        "A block that has just been allocated has count 0.\nIt has one owner: whoever asked for it."
        " With 0, the first release would make it -1 and free it never, or the second owner would"
        " be counted as the first.",
    )
    expect(
        [pool.ref_count(block) for block in a] == [1] * 3 and pool.num_free == 5,
        "wrong-values",
        f"After allocate(3) the counts are {_counts(pool, 8)} and num_free is"
        f" {pool.num_free}.\nExpected 1 for the three blocks, and 5 free.",
    )
    pool.share(a[:2])
    expect(
        [pool.ref_count(block) for block in a] == [2, 2, 1],
        "wrong-values",
        f"share({a[:2]}) after allocate(3) = {a} gives the counts"
        f" {[pool.ref_count(b) for b in a]}.\nExpected 2, 2, 1.",
    )
    pool.release(a)
    expect(
        pool.num_free != 8,
        "freed-while-shared",
        f"Two sequences had blocks {a[:2]}; one released them, and they are free.\nThe other one"
        " still reads them. A block is free when its *count* has come down to 0, not when somebody"
        " releases it.",
    )
    expect(
        [pool.ref_count(block) for block in a] == [1, 1, 0] and pool.num_free == 6,
        "wrong-values",
        f"After that release the counts are {[pool.ref_count(b) for b in a]} and {pool.num_free}"
        " blocks are free.\nExpected 1, 1, 0, and 6 free.",
    )
    _check_all_or_nothing(answer)
    _check_revival(answer)
    _check_double_free(answer)
    _check_order(answer)
    return _check_random_pools(answer)


def _check_all_or_nothing(answer: type) -> None:
    pool = answer(4)
    first = _took(pool, 3, "From a new pool of 4")
    got = pool.allocate(2)
    expect(
        got is None and pool.num_free == 1 and sum(_counts(pool, 4)) == 3,
        "not-all-or-nothing",
        f"One block is free, and allocate(2) gave {show(got)} and left {pool.num_free} free.\nIt"
        " should return None and change nothing: the one block would be lost, for the caller has"
        " no use for half of what it needs.",
    )
    last = pool.allocate(1)
    expect(
        isinstance(last, list) and len(last) == 1,
        "last-block-refused",
        f"One block is free, and allocate(1) gave {show(last)}.\nThe last free block can be had:"
        " compare with >, not >=.",
    )
    pool.release(first)
    pool.release(last)
    expect(
        pool.allocate(0) == [],
        "wrong-values",
        "allocate(0) should return an empty list.\nNothing is needed.",
    )


def _check_revival(answer: type) -> None:
    pool = answer(4)
    old = _took(pool, 2, "From a new pool of 4")
    pool.release(old)
    pool.share(old)  # the prefix cache found them
    expect(
        [pool.ref_count(block) for block in old] == [1, 1],
        "wrong-values",
        f"Blocks {old} were free and are shared; their counts are"
        f" {[pool.ref_count(b) for b in old]}.\nExpected 1: their only owner is the one who found"
        " them.",
    )
    expect(
        pool.num_free == 2,
        "still-in-the-queue",
        f"Blocks {old} were free, a request found its prefix in them and shares them, and num_free"
        f" says {pool.num_free} of 4.\nWhoever revives a free block must take it off the free list,"
        " or it is handed to somebody else while in use.",
    )
    new = _took(pool, 2, "Two of four blocks are in use")
    expect(
        not set(new) & set(old),
        "still-in-the-queue",
        f"Blocks {old} are in use (they were free, and were shared again), and allocate(2) gave"
        f" {new}.\nshare must take a block that was free off the free list.",
    )


def _check_double_free(answer: type) -> None:
    pool = answer(4)
    mine, other = _took(pool, 2, "From a new pool of 4"), _took(pool, 2, "Two of four are taken")
    pool.release(mine)
    before = (_counts(pool, 4), pool.num_free)
    # Ownerless blocks at the end, at the beginning and in the middle: whatever is looked at first,
    # or alone.
    for blocks in (mine, [*other, *mine], [*mine, *other], [other[0], *mine, other[1]]):
        try:
            pool.release(blocks)
        except ValueError:
            after = (_counts(pool, 4), pool.num_free)
            expect(
                after == before,
                "half-released",
                f"release({blocks}) raised, as it should, but had changed something by then: counts"
                f" and free blocks were {before} and are {after}.\nLook at all blocks before you"
                " touch the first.",
            )
            continue
        raise Mistake(
            "double-free",
            f"Blocks {mine} are free, and release({blocks}) passed without an error; now the counts"
            f" are {_counts(pool, 4)}, {pool.num_free} free.\nA second release is somebody's bug,"
            " and it frees what others use one day. Raise ValueError where a block's count is 0.",
        )


def _check_order(answer: type) -> None:
    pool = answer(6)
    a, b = _took(pool, 3, "From a new pool of 6"), _took(pool, 2, "Three of six are taken")
    untouched = next(block for block in range(6) if block not in a + b)
    pool.release(b)
    pool.release(a)
    got = [_took(pool, 1, "All six are free")[0] for _ in range(6)]
    right = [untouched, *reversed(b), *reversed(a)]
    text = (
        f"{b} were released, then {a}; block {untouched} was never used. They are taken again in"
        f" the order {got}"
    )
    expect(
        got != [untouched, *b, *a],
        "heads-first",
        f"{text}.\nWithin a sequence the last block should go first: without its head, a prefix is"
        " worth nothing. Release a list backwards.",
    )
    expect(
        got[-1] != untouched and got != [*reversed(right)],
        "newest-first",
        f"{text}.\nYou take what became free last. That is what somebody may need soonest: take the"
        " block that has been free for longest (a queue, not a stack).",
    )
    expect(
        got == right,
        "wrong-order",
        f"{text}; expected {right}.\nThe one that has been free for longest comes first.",
    )


def _check_random_pools(answer: type) -> str:
    num_events = 0
    for seed in range(60):
        rng = random.Random(seed)
        num_blocks = rng.randint(1, 9)
        mine, right = answer(num_blocks), _CountedPool(num_blocks)
        tables: list[list[int]] = []
        for _ in range(40):
            num_events += 1
            event = rng.random()
            if event < 0.4 or not tables:
                count = rng.randint(0, 4)
                got, expected = mine.allocate(count), right.allocate(count)
                what = f"allocate({count})"
                expect(
                    got == expected,
                    "wrong-values",
                    f"After {num_events} random events {what} gave {show(got)}, expected"
                    f" {show(expected)}.\nCounts before it: {_counts(right, num_blocks)}.",
                )
                if expected:
                    tables.append(expected)
            elif event < 0.6:
                table = rng.choice(tables)
                prefix = table[: rng.randint(1, len(table))]
                mine.share(prefix), right.share(prefix)
                tables.append(prefix)
                what = f"share({prefix})"
            elif event < 0.7 and right.queue:
                found = rng.sample(list(right.queue), rng.randint(1, len(right.queue)))
                mine.share(found), right.share(found)
                tables.append(found)
                what = f"share({found}), of free blocks,"
            else:
                table = tables.pop(rng.randrange(len(tables)))
                mine.release(table), right.release(table)
                what = f"release({table})"
            got = (_counts(mine, num_blocks), mine.num_free)
            expected = (_counts(right, num_blocks), right.num_free)
            expect(
                got == expected,
                "wrong-values",
                f"After {what} counts and free blocks are {got}, expected {expected}.\nEvery owner"
                " of a block counts once; a block is free when its count is 0, and not before.",
            )
    return f"seven rules, and {num_events:,} random events"


EXERCISE = Exercise(
    id="04.3",
    title="Reference counts",
    check=check_counted_pool,
    mistakes=(
        Known(
            "fresh-count-zero",
            answers=r"""
# %% a fresh block has count 0, and share makes it 1
@@
-            self.counts[block] = 1
+            self.counts[block] = 0
""",
        ),
        Known(
            "freed-while-shared",
            answers=r"""
# %% who releases, frees
@@
-            if self.counts[block] == 0:
-                self.free[block] = None
+            self.free[block] = None
""",
        ),
        Known(
            "not-all-or-nothing",
            answers=r"""
# %% hands out what is left
@@
-        if count > len(self.free):
-            return None
-        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
+        taken = [
+            self.free.popitem(last=False)[0] for _ in range(min(count, len(self.free)))
+        ]

# %% notices too late that there are too few
@@
-        if count > len(self.free):
-            return None
-        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
-        for block in taken:
+        taken = []
+        for _ in range(count):
+            if not self.free:
+                return None
+            block, _ = self.free.popitem(last=False)
@@
             self.counts[block] = 1
+            taken.append(block)
""",
        ),
        Known(
            "last-block-refused",
            answers=r"""
# %% wants one block to spare
@@
-        if count > len(self.free):
+        if count >= len(self.free):
""",
        ),
        Known(
            "still-in-the-queue",
            hint=2,
            answers=r"""
# %% a revived block stays on the free list
@@
-            self.free.pop(block, None)
""",
        ),
        Known(
            "double-free",
            answers=r"""
# %% counts below zero
@@
-        if not all(self.counts[block] for block in blocks):
-            raise ValueError(f"not all of {blocks} are in use")

# %% a second release is ignored
@@
-        if not all(self.counts[block] for block in blocks):
-            raise ValueError(f"not all of {blocks} are in use")
@@
         for block in reversed(blocks):
+            if self.counts[block] == 0:
+                continue

# %% looks at the last block only
@@
-        if not all(self.counts[block] for block in blocks):
-            raise ValueError(f"not all of {blocks} are in use")
+        if blocks and self.counts[blocks[-1]] == 0:
+            raise ValueError(f"{blocks[-1]} is not in use")
""",
        ),
        Known(
            "half-released",
            hint=3,
            answers=r"""
# %% raises when half of it is done
@@
-        if not all(self.counts[block] for block in blocks):
-            raise ValueError(f"not all of {blocks} are in use")
+        for block in blocks:
+            if self.counts[block] == 0:
+                raise ValueError(f"{block} is not in use")
+            self.counts[block] -= 1
@@
         for block in reversed(blocks):
-            self.counts[block] -= 1

# %% looks at a block when it comes to it, from the end
@@
-        if not all(self.counts[block] for block in blocks):
-            raise ValueError(f"not all of {blocks} are in use")
@@
         for block in reversed(blocks):
+            if self.counts[block] == 0:
+                raise ValueError(f"{block} is not in use")
""",
        ),
        Known(
            "heads-first",
            hint=3,
            answers=r"""
# %% frees a list from its beginning
@@
-        for block in reversed(blocks):
+        for block in blocks:
""",
        ),
        Known(
            "newest-first",
            answers=r"""
# %% a stack: the block freed last is taken first
@@
-        self.free = OrderedDict.fromkeys(range(num_blocks))
+        self.free = OrderedDict.fromkeys(reversed(range(num_blocks)))
@@
-        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
+        taken = [self.free.popitem(last=True)[0] for _ in range(count)]
""",
        ),
    ),
    right=r"""
# %% a deque, and a Counter
class CountedPool:
    def __init__(self, num_blocks: int) -> None:
        self.owners = {block: 0 for block in range(num_blocks)}
        self.queue = deque(self.owners)

    @property
    def num_free(self) -> int:
        return list(self.owners.values()).count(0)

    def ref_count(self, block: int) -> int:
        return self.owners[block]

    def allocate(self, count: int) -> list[int] | None:
        if len(self.queue) < count:
            return None
        table = []
        while len(table) < count:
            table.append(self.queue.popleft())
            self.owners[table[-1]] += 1
        return table

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if not self.owners[block]:
                self.queue.remove(block)
            self.owners[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.owners[block] < 1:
                raise ValueError(block)
        for block in blocks:
            self.owners[block] -= 1
        self.queue.extend(block for block in blocks[::-1] if not self.owners[block])
""",
)
