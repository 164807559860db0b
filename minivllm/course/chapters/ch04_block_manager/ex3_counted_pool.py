"""04.3: reference counts."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections import deque
from typing import Any

from minivllm.course.chapters.ch04_block_manager.common import (
    Stories,
    Story,
    slips,
)
from minivllm.course.grading.compare import show
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_no_growth, expect_unchanged

OTHER_ERRORS = (AssertionError, RuntimeError, KeyError, IndexError, TypeError, Exception)


class Pool:
    """What 04.3 asks for, and its usual mistakes: each slip is one."""

    slips: frozenset[str] = frozenset()

    def __init__(self, num_blocks: int) -> None:
        self.counts, self.queue = [0] * num_blocks, deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.queue)

    def ref_count(self, block: int) -> int:
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        if "nothing of nothing" in self.slips and not self.queue:
            return None
        if "one to spare" in self.slips and count == len(self.queue):
            return None
        if count > len(self.queue):
            if "lost on the way" in self.slips:
                for block in self.queue:
                    self.counts[block] = 1
                self.queue.clear()
            if "what is left" not in self.slips:
                return None
            count = len(self.queue)
        taken = [self._next() for _ in range(count)]
        for block in taken:
            self.counts[block] = 0 if "no owner" in self.slips else 1
        return taken

    def _next(self) -> int:
        """The free block that is taken next."""
        if "smallest number" in self.slips:
            self.queue = deque(sorted(self.queue))
        return self.queue.pop() if "from the end" in self.slips else self.queue.popleft()

    def share(self, blocks: list[int]) -> None:
        in_use = any(self.counts[block] for block in blocks[:1])
        for block in blocks:
            stays = "stays in the queue" in self.slips or (
                "first one decides" in self.slips and in_use
            )
            if not stays and (self.counts[block] == 0 or "always in the queue" in self.slips):
                self.queue.remove(block)
            if "two at most" in self.slips and self.counts[block] == 2:
                continue
            self.counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        self._refuse(blocks)
        for block in blocks if "head first" in self.slips else reversed(blocks):
            if "skipped" in self.slips and self.counts[block] == 0:
                continue
            self.counts[block] = 0 if "no count" in self.slips else self.counts[block] - 1
            free = "freed at once" in self.slips and block not in self.queue
            if free or self.counts[block] == 0:
                self._put_back(block)

    def _put_back(self, block: int) -> None:
        self.queue.appendleft(block) if "to the front" in self.slips else self.queue.append(block)

    def _refuse(self, blocks: list[int]) -> None:
        looked_at = blocks
        if "last one looked at" in self.slips:
            looked_at = blocks[-1:]
        if "first one looked at" in self.slips:
            looked_at = blocks[:1]
        refuse = all if "any will do" in self.slips and len(blocks) > 1 else any
        if {"below zero", "skipped"} & self.slips or not looked_at:
            return
        if refuse(self.counts[block] <= 0 for block in looked_at):
            wrong = (error for error in OTHER_ERRORS if error.__name__ in self.slips)
            raise next(wrong, ValueError)("not in use")


class StackedPool(Pool):
    """The free blocks on a stack: the block that became free last is taken first."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.queue = deque(reversed(range(num_blocks)))
        self.slips = self.slips | {"from the end"}


class PoolStage:
    """Calls on a pool, and its counts after each.

    rude: the caller changes the lists that it gave and got, afterwards.
    """

    def __init__(self, made: type, num_blocks: int, rude: bool = False) -> None:
        self.pool, self.num_blocks, self.rude = made(num_blocks), num_blocks, rude
        self.last: tuple[Any, Any] = (None, None)  # what allocate returned, and a copy

    def words(self, name: str, argument: Any) -> str:
        return f"{name}({show(argument, 12)})"

    def do(self, name: str, argument: Any) -> dict[str, Any]:
        given = list(argument) if isinstance(argument, list) else argument
        before = self._state()
        result, error = None, None
        try:
            result = getattr(self.pool, name)(given)
        except NotImplementedError:
            raise
        except Exception as raised:
            if name != "release":
                raise
            error = f"a {type(raised).__name__}"
        expect_unchanged(given, argument, f"the list that {name} was given")
        after = self._state()
        if error and after != before:
            seen = f"{self.words(name, argument)} raised {error}. Before: {before}. After: {after}."
            raise EXERCISE.mistake("half-released", seen)
        seen = {"it raised": error} if name == "release" else {}
        if name == "allocate":
            before_it, copy = self.last
            if before_it and before_it is result and copy != result:
                said = f"{self.words(name, argument)} gave {result}; the call before gave {copy}."
                raise EXERCISE.mistake("result-reused", said)
            self.last = (result, list(result or ()))
            seen["it returned"] = list(result) if isinstance(result, list) else result
        for owned in (result, given):
            if self.rude and isinstance(owned, list):
                owned[:] = [*[block + 1 for block in owned] * 2, 0]
        return seen | after

    def _state(self) -> dict[str, Any]:
        return state_of(self.pool, self.num_blocks)


def state_of(pool: Any, num_blocks: int) -> dict[str, Any]:
    """What can be seen of a pool."""
    expect(
        not callable(pool.num_free),
        "not-a-property",
        "pool.num_free is a method, and the check reads it as a number.\nPut @property in the line"
        " above its def: then it is read without brackets.",
    )
    counts = [pool.ref_count(block) for block in range(num_blocks)]
    return {"the counts": counts, "num_free": pool.num_free}


STORIES = (
    Story("A new pool of 8 blocks.", (8,), (("allocate", 0), ("allocate", 3), ("allocate", 5))),
    Story("A pool of one block.", (1,), (("allocate", 1), ("release", [0]), ("allocate", 1))),
    Story(
        "A pool of 4 blocks, of which one is left, and then none.",
        (4,),
        (("allocate", 3), ("allocate", 2), ("allocate", 1), ("allocate", 1), ("allocate", 0)),
    ),
    Story(
        "Two sequences share two blocks, and one of them ends.",
        (8,),
        (
            ("allocate", 3),
            ("share", [0, 1]),
            ("release", [0, 1, 2]),
            ("release", [0, 1]),
        ),
    ),
    Story(
        "A large pool, half of which is taken at once.",
        (3000,),
        (("allocate", 1500), ("allocate", 1501)),
    ),
    Story(
        "Many sequences share a block.",
        (3,),
        (("allocate", 2), *[("share", [0])] * 1100, *[("release", [0])] * 1101),
    ),
    Story(
        "The prefix cache finds its text in blocks that are free, and shares them.",
        (4,),
        (("allocate", 2), ("release", [0, 1]), ("share", [0, 1]), ("allocate", 2), ("allocate", 1)),
    ),
    Story(
        "Two blocks are free, and somebody releases one of them once more.",
        (4,),
        (
            ("allocate", 2),
            ("allocate", 2),
            ("release", [0, 1]),
            ("release", [0]),
            ("release", [0, 1]),
            ("release", [2, 3, 0]),
            ("release", [0, 2, 3]),
            ("release", [2, 0, 3]),
            ("release", [3, 2]),
        ),
    ),
    Story(
        "Empty lists are shared and released.",
        (3,),
        (("share", []), ("allocate", 3), ("release", []), ("share", []), ("allocate", 0)),
    ),
    Story(
        "The owners give their blocks back, and others take them one by one.",
        (8,),
        (
            *(("allocate", count) for count in (3, 2, 2)),
            *(("release", blocks) for blocks in ([3, 4], [5, 6], [0, 1, 2])),
            *[("allocate", 1)] * 8,
        ),
        "wrong-order",
    ),
    Story(
        "A free block from the middle of the queue is shared. The others keep their order.",
        (6,),
        (
            ("allocate", 6),
            ("release", [5, 1, 4, 0, 3, 2]),
            ("share", [4]),
            *[("allocate", 1)] * 6,
        ),
        "wrong-order",
    ),
    Story(
        "A prefix is found: its first block is in use, the others are free.",
        (6,),
        (
            ("allocate", 3),
            ("share", [0]),
            ("release", [0, 1, 2]),
            ("share", [0, 1, 2]),
            ("allocate", 3),
            ("allocate", 1),
            ("release", [0]),
            ("release", [0, 1, 2]),
            ("allocate", 3),
        ),
    ),
    Story(
        "One prompt is asked again and again, and is found in a free block each time.",
        (4,),
        (("share", [2]), ("release", [2])) * 800,
    ),
    Story(
        "Two sequences with three and two blocks, of which two are shared for a while.",
        (6,),
        (
            ("allocate", 3),
            ("allocate", 2),
            ("release", [0, 1, 2]),
            ("share", [1, 2]),
            ("allocate", 2),
            ("release", [3, 4]),
            ("release", [1, 2]),
            *[("allocate", 1)] * 5,
        ),
    ),
    Story(
        "The caller changes the lists that it gave and got: they are its own.",
        (6, True),
        (
            ("allocate", 3),
            ("allocate", 2),
            ("release", [0, 1, 2]),
            ("share", [1, 2]),
            ("allocate", 2),
            ("release", [3, 4]),
            ("release", [1, 2]),
            *[("allocate", 1)] * 5,
            *[("allocate", 0)] * 2,
        ),
        "keeps-a-list",
    ),
)


def random_story(seed: int, num_blocks: int, num_calls: int, most_taken: int = 0) -> Story:
    """Random calls, as sequences that share prefixes make them.

    most_taken: the most that one call takes (0: a quarter of the pool, so that it is mostly in
    use). With a limit most of the pool stays free, and in the end all that is free is taken.
    """
    rng, pool, tables = random.Random(seed), Pool(num_blocks), []
    calls: list[tuple] = []
    while len(calls) < num_calls:
        event = rng.random()
        if event < 0.4 or not tables:
            most = min(len(pool.queue) + 1, most_taken or max(4, num_blocks // 4))
            call = ("allocate", rng.randint(0, most))
        elif event < 0.6:
            table = rng.choice(tables)
            call = ("share", table[: rng.randint(1, len(table))])
        elif event < 0.7 and pool.queue:
            call = ("share", rng.sample(list(pool.queue), rng.randint(1, min(9, len(pool.queue)))))
        elif event < 0.73 and pool.queue:
            # In use and free ones, at any place: refused.
            some = [*rng.choice(tables), rng.choice(list(pool.queue))]
            call = ("release", rng.sample(some, len(some)))
            calls.append(call)
            continue
        else:
            call = ("release", tables.pop(rng.randrange(len(tables))))
        calls.append(call)
        got = getattr(pool, call[0])(call[1])
        if kept := got if call[0] == "allocate" else call[1] if call[0] == "share" else None:
            tables.append(list(kept))
    calls += [("allocate", len(pool.queue))] * bool(most_taken)
    return Story(
        f"{num_calls:,} random calls on a pool of {num_blocks}.", (num_blocks,), tuple(calls)
    )


def random_stories() -> tuple[Story, ...]:
    """Short ones on small pools, a few on larger ones, and a long one."""
    small = [random_story(seed, 1 + seed % 9, 40) for seed in range(27)]
    large = [random_story(seed, size, 60) for seed, size in ((50, 17), (51, 65), (52, 600))]
    large += [random_story(53, 50, 60, 3), random_story(54, 700, 60, 4)]
    return (*small, *large, random_story(60, 33, 8000))


def _expect_own_state(answer: type) -> None:
    """Require that a new pool is new, whatever other pools hold."""
    first = answer(5)
    before = state_of(first, 5)
    first.allocate(2)
    during = state_of(first, 5)
    beside, after = state_of(answer(5), 5), state_of(first, 5)
    expect(
        before == beside and during == after,
        "shared-between-pools",
        f"A pool of 5 was new, with {before}. Two of its blocks are taken: {during}. Then a second"
        f" pool of 5 is made. That one begins with {beside}, and the first one has {after}"
        " now.\nEach pool has its own state: make it in __init__, as an attribute of self. What"
        " stands in the class, or outside of it, belongs to all pools.",
    )


def check_counted_pool(answer: type) -> str:
    """The small stories first, then random ones, then what stays behind."""
    expect(
        inspect.isclass(answer),
        "wrong-type",
        f"Expected the class CountedPool, got {show(answer)}.\nHand in the class, not a pool.",
    )
    _expect_own_state(answer)
    count = Stories(PoolStage, (Pool,), (*STORIES, *random_stories())).judge(answer, EXERCISE)

    def work(rounds: int) -> Any:
        pool = answer(6)
        for _ in range(rounds):
            table = pool.allocate(4)
            pool.allocate(3)  # refused
            with contextlib.suppress(ValueError):
                pool.release([block for block in range(6) if block not in table])  # refused
            pool.share(table[:2])
            pool.release(table)
            pool.release(table[:2])
            pool.share(table[1:3])
            pool.release(table[1:3])
        return pool

    def revive(rounds: int) -> Any:
        pool = answer(6)
        for _ in range(rounds):
            pool.share([4, 2])
            pool.release([4, 2])
        return pool

    expect_no_growth(work, "allocate, share and release")
    expect_no_growth(revive, "share and release, of blocks that are free before and after,")
    return f"{len(STORIES)} stories, and {count:,} calls"


EXERCISE = Exercise(
    id="04.3",
    title="Reference counts",
    check=check_counted_pool,
    mistakes=(
        Known(
            "fresh-count-zero",
            message=(
                "A block that allocate hands out has one owner, whoever asked for it, and its"
                " count stays 0.\nThen the second owner counts as the first, and the first"
                " release is one too many."
            ),
            suspects=(slips(Pool, "no owner"),),
            answers=r"""
# %% a fresh block has count 0, and share makes it 1
@@
-            self.counts[block] = 1
+            self.counts[block] = 0
""",
        ),
        Known(
            "freed-while-shared",
            message=(
                "Two sequences had a block; one released it, and it is free, although the other"
                " one still reads it.\nA block is free when its *count* has come down to 0, not"
                " when somebody releases it."
            ),
            suspects=(slips(Pool, "freed at once"), slips(Pool, "no count")),
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
            message=(
                "There are fewer free blocks than allocate is asked for, and it takes some all"
                " the same.\nIt should return None and change nothing: the caller has no use for"
                " half of what it needs, and what you took is lost."
            ),
            suspects=(slips(Pool, "what is left"), slips(Pool, "lost on the way")),
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
            message=(
                "The last free block can be had, and you refuse it.\nCompare with >, not with >=."
            ),
            suspects=(slips(Pool, "one to spare"),),
            answers=r"""
# %% wants one block to spare
@@
-        if count > len(self.free):
+        if count >= len(self.free):
""",
        ),
        Known(
            "still-in-the-queue",
            message=(
                "A free block was shared, so somebody uses it now, and it is still among the free"
                " ones. It will be handed to somebody else.\nWhoever revives a free block must"
                " take it off the free list."
            ),
            suspects=(slips(Pool, "stays in the queue"), slips(Pool, "first one decides")),
            hint=2,
            answers=r"""
# %% one is looked at, for all
@@
+        revived = any(self.counts[block] == 0 for block in blocks[:1])
         for block in blocks:
             self.counts[block] += 1
-            self.free.pop(block, None)
+            if revived:
+                self.free.pop(block, None)

# %% a revived block stays on the free list
@@
-            self.free.pop(block, None)
""",
        ),
        Known(
            "double-free",
            message=(
                "A block without an owner was released, and no ValueError came.\nA second release"
                " is somebody's bug, and one day it frees what others use. Look at the counts of"
                " *all* blocks in the list; one that is 0 is enough to refuse."
            ),
            suspects=(
                slips(Pool, "below zero"),
                slips(Pool, "skipped"),
                slips(Pool, "last one looked at"),
                slips(Pool, "first one looked at"),
                slips(Pool, "any will do"),
            ),
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
            message=(
                "release raised, as it should, but had changed something by then.\nLook at all"
                " blocks before you touch the first."
            ),
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
            message=(
                "The blocks of a list become free from its beginning to its end.\nWithin a"
                " sequence the last block should go first, for without its head a prefix is worth"
                " nothing. Release a list backwards."
            ),
            suspects=(slips(Pool, "head first"),),
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
            message=(
                "You take the block that became free last. That is the one that somebody may need"
                " soonest.\nTake the one that has been free for longest (a queue, not a stack):"
                " blocks leave at one end and come back at the other."
            ),
            suspects=(
                StackedPool,
                slips(Pool, "from the end"),
                slips(Pool, "to the front"),
                slips(Pool, "to the front", "head first"),
                slips(StackedPool, "head first"),
            ),
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
        Known(
            "nothing-refused",
            message=(
                "allocate(0) needs no block, so it succeeds where no block is free, too: the list"
                " is empty.\nNone means that there are too few, and 0 are never too few. In"
                " Python, [] and None are both false: do you tell them apart?"
            ),
            suspects=(slips(Pool, "nothing of nothing"),),
            answers=r"""
# %% no block is free, so there is nothing to give
@@
-        if count > len(self.free):
+        if not self.free or count > len(self.free):
""",
        ),
        Known(
            "in-use-not-in-queue",
            message=(
                "share takes each block off the free list, and a block that somebody uses already"
                " is not on it.\nLook at the count first: only a block with count 0 is free."
            ),
            suspects=(slips(Pool, "always in the queue"),),
            answers=r"""
# %% takes every shared block off a list
@@
-        self.free = OrderedDict.fromkeys(range(num_blocks))
+        self.free = list(range(num_blocks))
@@
-        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
+        taken = [self.free.pop(0) for _ in range(count)]
@@
-            self.free.pop(block, None)
+            self.free.remove(block)
@@
-                self.free[block] = None
+                self.free.append(block)
""",
        ),
        Known(
            "owners-not-counted",
            message=(
                "A third owner of a block is not counted.\nThe count is a number, not a mark:"
                " each share adds one owner."
            ),
            suspects=(slips(Pool, "two at most"),),
            answers=r"""
# %% used once, or more than once
@@
-            self.counts[block] += 1
+            self.counts[block] = 2 if self.counts[block] else 1
""",
        ),
        Known(
            "wrong-error",
            message=(
                "The release is refused, as it should be, but not with a ValueError.\nThe caller"
                " expects that one: raise ValueError(…) yourself, with a text that says what is"
                " wrong."
            ),
            suspects=tuple(slips(Pool, error.__name__) for error in OTHER_ERRORS),
            answers=r"""
# %% an assertion
@@
-        if not all(self.counts[block] for block in blocks):
-            raise ValueError(f"not all of {blocks} are in use")
+        assert all(self.counts[block] for block in blocks)
""",
        ),
        Known(
            "smallest-first",
            message=(
                "You take the free block with the smallest number.\nThe number says nothing about"
                " a block. Take the one that has been free for longest: keep the free blocks in"
                " the order in which they came back."
            ),
            suspects=(slips(Pool, "smallest number"),),
            answers=r"""
# %% the smallest number of all that are free
@@
-        self.free = OrderedDict.fromkeys(range(num_blocks))
+        self.free = set(range(num_blocks))
@@
-        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
+        taken = sorted(self.free)[:count]
@@
             self.counts[block] = 1
+            self.free.discard(block)
@@
-            self.free.pop(block, None)
+            self.free.discard(block)
@@
-                self.free[block] = None
+                self.free.add(block)
""",
        ),
        Known(
            "not-a-property",
            answers=r"""
# %% a method
@@
-    @property
     def num_free(self) -> int:
""",
        ),
        Known(
            "shared-between-pools",
            answers=r"""
# %% the counts belong to the class
@@
     def __init__(self, num_blocks: int) -> None:
-        self.counts = [0] * num_blocks
+        while len(self.counts) < num_blocks:
+            self.counts.append(0)
@@
+    counts = []
+
     @property
""",
        ),
        Known(
            "result-reused",
            message=(
                "allocate returns one and the same list in two calls. It belongs to the sequence"
                " that asked for it, as its table.\nMake a new list in each call."
            ),
            answers=r"""
# %% one list for all results
@@
-        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
+        taken = self.__dict__.setdefault("taken", [])
+        taken[:] = [self.free.popitem(last=False)[0] for _ in range(count)]

# %% one list for all that ask for nothing
@@
         if count > len(self.free):
             return None
+        if count == 0:
+            return self.__dict__.setdefault("nothing", [])
""",
        ),
        Known(
            "keeps-a-list",
            answers=r"""
# %% keeps the lists that it is given, and takes from them
@@
-        self.free = OrderedDict.fromkeys(range(num_blocks))
+        self.lists = [list(range(num_blocks))[::-1]]
@@
-        return len(self.free)
+        return sum(map(len, self.lists))
@@
-        if count > len(self.free):
+        if count > self.num_free:
             return None
-        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
+        taken = []
+        while len(taken) < count:
+            if self.lists[0]:
+                taken.append(self.lists[0].pop())
+            else:
+                self.lists.pop(0)
@@
-            self.free.pop(block, None)
+            self.lists = [[b for b in some if b != block] for some in self.lists]
@@
-            if self.counts[block] == 0:
-                self.free[block] = None
+        some = [block for block in blocks if self.counts[block] == 0]
+        self.lists.append(blocks if len(some) == len(blocks) else some)
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% every 500th block is lost
@@
-            if self.counts[block] == 0:
+            self.num = getattr(self, "num", 0) + 1
+            if self.counts[block] == 0 and self.num % 500:

# %% a long queue comes into another order when somebody leaves its middle
@@
-            self.free.pop(block, None)
+            if self.free.pop(block, self) is None and len(self.free) > 32:
+                self.free.move_to_end(next(iter(self.free)))

# %% in a very long queue the newest changes places
@@
-            self.free.pop(block, None)
+            if self.free.pop(block, self) is None and len(self.free) > 500:
+                self.free.move_to_end(next(reversed(self.free)), last=False)
""",
        ),
        Known(
            "grows",
            answers=r"""
# %% writes down all that was ever given back
@@
         for block in reversed(blocks):
+            self.history = [*getattr(self, "history", ()), block]

# %% writes down what was shared, a byte per call
@@
         for block in blocks:
+            self.log = getattr(self, "log", b"") + b"s"
             self.counts[block] += 1

# %% entries of the queue that are out of date stay until allocate meets them
class CountedPool:
    def __init__(self, num_blocks: int) -> None:
        self.counts, self.stamps = [0] * num_blocks, [0] * num_blocks
        self.queue = deque((block, 0) for block in range(num_blocks))
        self.num_free = num_blocks

    def ref_count(self, block: int) -> int:
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        if count > self.num_free:
            return None
        taken = []
        while len(taken) < count:
            block, stamp = self.queue.popleft()
            if stamp == self.stamps[block]:
                taken.append(block)
        self.share(taken)
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.counts[block] == 0:
                self.stamps[block] += 1
                self.num_free -= 1
            self.counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        if any(self.counts[block] == 0 for block in blocks):
            raise ValueError("a block without an owner")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.queue.append((block, self.stamps[block]))
                self.num_free += 1

# %% writes down what it refused
@@
         if count > len(self.free):
+            self.refused = [*getattr(self, "refused", ()), count]
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% turns the caller's list round
@@
-        for block in reversed(blocks):
+        blocks.reverse()
+        for block in blocks:
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
