"""04.5: debug this: one block, two owners."""

from __future__ import annotations

import random
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect


class _Cache:
    """What 04.5's class should do."""

    def __init__(self, num_blocks: int) -> None:
        self.uses, self.queue = [0] * num_blocks, list(range(num_blocks))
        self.names: list[Any] = [None] * num_blocks
        self.where: dict[Any, int] = {}

    def look_up(self, names: list) -> list[int]:
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        revived = [block for block in found if self.uses[block] == 0]
        if num_new + len(revived) > len(self.queue):
            return None
        for block in found:
            self.uses[block] += 1
        for block in revived:
            self.queue.remove(block)
        fresh = [self.queue.pop(0) for _ in range(num_new)]
        for block in fresh:
            self.where.pop(self.names[block], None)
            self.names[block], self.uses[block] = None, 1
        return found + fresh

    def name(self, block: int, name: Any) -> None:
        if name not in self.where and self.names[block] is None:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


def _serve(cache: Any, names: list, num_rest: int = 1) -> list[int] | None:
    """Open a table for a prompt with these names and some blocks more, and name what was
    computed.
    """
    found = cache.look_up(names)
    table = cache.open(list(found), len(names) + num_rest - len(found))
    if table is not None:
        for block, name in zip(table, names, strict=False):
            cache.name(block, name)
    return table


def check_mended_cache(answer: type) -> str:
    cache = answer(6)
    table = _serve(cache, ["a1", "a2"])
    expect(
        table == [0, 1, 2],
        "wrong-values",
        f"On a new cache of 6, a prompt of two names and a rest got {show(table)}.\nExpected [0, 1,"
        " 2]; that worked before.",
    )
    cache.close(table)
    again = _serve(cache, ["a1", "a2"])  # found: blocks 0 and 1, which nobody used
    left = [_serve(cache, [], 1) for _ in range(4)]
    both = sorted({block for other in left if other for block in other} & set(again or []))
    expect(
        not both,
        "still-in-the-queue",
        f"Chat A came back, found blocks 0 and 1 and has the table {again}. Then four others asked"
        f" for one block each: {left}.\nBlocks {both} have two owners who share nothing. What"
        " `open` finds in the cache is in use from then on: it may not stay in the queue.",
    )
    expect(
        again == [0, 1, 3] and left == [[4], [5], [2], None],
        "wrong-values",
        f"A came back with the table {again}, then four others asked for a block each and got"
        f" {left}.\nExpected [0, 1, 3] and [[4], [5], [2], None]: free blocks leave the queue at"
        " its front and enter at its end.",
    )
    _check_room(answer)
    _check_old_names(answer)
    return _check_random_caches(answer)


def _check_room(answer: type) -> None:
    cache = answer(3)
    table = _serve(cache, ["a1", "a2"])
    cache.close(table)
    found = cache.look_up(["a1", "a2"])
    before = (list(cache.uses), list(cache.queue))
    try:
        got = cache.open(list(found), 2)
    except (IndexError, KeyError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
    after = (list(cache.uses), list(cache.queue))
    expect(
        got is None,
        "revived-not-counted",
        f"Three blocks are free; two of them are the prefix {found} itself, and two new ones are"
        f" wanted. open gave {show(got)}.\nIt should be None: one is left for two. Blocks that the"
        " prefix revives leave the queue as well.",
    )
    expect(
        after == before,
        "not-all-or-nothing",
        f"open returned None, but uses and queue were {before} and are {after}.\nLook whether there"
        " is room before you change anything.",
    )
    owner = answer(4)
    table = _serve(owner, ["a1", "a2"])
    got = owner.open(owner.look_up(["a1", "a2"]), 1)
    expect(
        got == [0, 1, 3] and owner.uses[:2] == [2, 2],
        "shared-refused",
        "Blocks 0 and 1 are in use by A, one block is free, and B shares 0 and 1 and wants one"
        f" more. open gave {show(got)}.\nExpected [0, 1, 3]. A block that somebody uses is not in"
        " the queue: finding it takes nothing from it.",
    )


def _check_old_names(answer: type) -> None:
    cache = answer(3)
    cache.close(_serve(cache, ["a1", "a2"]))
    cache.close(_serve(cache, ["c1", "c2", "c3"], 0))
    got = cache.look_up(["a1", "a2"])
    expect(
        got == [],
        "name-outlives-content",
        f"All three blocks have been taken for C, and look_up for A's prompt still says {got}.\nA"
        " would read C's text. When `open` takes a block for something new, its old name must"
        " leave `where`.",
    )
    got = cache.look_up(["c1", "c2", "c3"])
    expect(
        got == [2, 1, 0] or len(got) == 3,
        "new-name-lost",
        f"C's three blocks are named and free, and look_up says {got}.\nA block that changes hands"
        " gets a new name: forget the old one in both places, or `name` finds the block taken.",
    )


def _check_random_caches(answer: type) -> str:
    num_events = 0
    for seed in range(60):
        rng = random.Random(seed)
        size = rng.randint(2, 8)
        mine, right = answer(size), _Cache(size)
        tables: list[list[int]] = []
        for _ in range(40):
            num_events += 1
            if tables and rng.random() < 0.45:
                table = tables.pop(rng.randrange(len(tables)))
                mine.close(list(table)), right.close(list(table))
                what = f"close({table})"
            else:
                chat = rng.choice("ab")
                names, rest = [f"{chat}{i}" for i in range(rng.randint(0, 4))], rng.randint(0, 2)
                got, expected = _serve(mine, names, rest), _serve(right, names, rest)
                what = f"serving {names} and {rest} more"
                expect(
                    got == expected,
                    "wrong-values",
                    f"After {num_events} random events {what} gave the table {show(got)}, expected"
                    f" {show(expected)}.\nThe queue before it was {right.queue}.",
                )
                if expected:
                    tables.append(expected)
            got, expected = (list(mine.uses), list(mine.queue)), (right.uses, right.queue)
            expect(
                got == expected,
                "wrong-values",
                f"After {what} uses and queue are {got}, expected {expected}.\nFree blocks enter"
                " the queue at its end when nobody uses them any more, the last of a table first.",
            )
    return f"three complaints settled, and {num_events:,} random events"


EXERCISE = Exercise(
    id="04.5",
    title="Debug this: one block, two owners",
    check=check_mended_cache,
    mistakes=(
        Known(
            "still-in-the-queue",
            hint=1,
            answers=r"""
# %% counts the revived ones, but leaves them in the queue
@@
-        for block in revived:
-            self.queue.remove(block)
""",
        ),
        Known(
            "revived-not-counted",
            hint=2,
            answers=r"""
# %% looks for room as before
@@
-        if num_new + len(revived) > len(self.queue):
+        if num_new > len(self.queue):
""",
        ),
        Known(
            "name-outlives-content",
            hint=3,
            answers=r"""
# %% mends only what the first picture shows
@@
-            self.where.pop(self.names[block], None)
-            self.names[block] = None

# %% forgets one way of two
@@
-            self.where.pop(self.names[block], None)
""",
        ),
        Known(
            "new-name-lost",
            answers=r"""
# %% forgets the other way of two
@@
-            self.names[block] = None
""",
        ),
        Known(
            "shared-refused",
            hint=2,
            answers=r"""
# %% takes every found block for revived
@@
-        revived = [block for block in found if self.uses[block] == 0]
+        revived = found
@@
-            self.queue.remove(block)
+            if block in self.queue:
+                self.queue.remove(block)
""",
        ),
        Known(
            "not-all-or-nothing",
            answers=r"""
# %% raises the counts first and then looks for room
@@
-        if num_new + len(revived) > len(self.queue):
-            return None
@@
             self.queue.remove(block)
+        if num_new > len(self.queue):
+            return None
""",
        ),
    ),
    right=r"""
# %% one pass over what was found, and a check before it
@@
-        revived = [block for block in found if self.uses[block] == 0]
-        if num_new + len(revived) > len(self.queue):
+        rest = [block for block in self.queue if block not in found]
+        if len(rest) < num_new:
@@
             return None
+        self.queue = rest
@@
-        for block in revived:
-            self.queue.remove(block)
""",
)
