"""04.5: debug this: one block, two owners."""

from __future__ import annotations

import inspect
import random
from typing import Any

from minivllm.course.chapters.ch04_block_manager.common import (
    Stories,
    Story,
    slips,
)
from minivllm.course.grading.compare import show
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_no_growth, expect_unchanged


class Cache:
    """What 04.5's class should do, and its usual mistakes: each slip is one."""

    slips: frozenset[str] = frozenset()

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
        if "taken first" in self.slips:
            self._take_found(found, revived)
        spare = "one to spare" in self.slips and num_new > 0
        if num_new + self._not_room(found, revived) + spare > len(self.queue):
            return None
        fresh = []
        if "fresh first" in self.slips:
            fresh = [self._fresh() for _ in range(num_new)]
        if "taken first" not in self.slips:
            self._take_found(found, revived)
        if "fresh first" not in self.slips:
            fresh = [self._fresh() for _ in range(num_new)]
        return found + fresh

    def _not_room(self, found: list[int], revived: list[int]) -> int:
        """How many blocks of the queue the found ones take."""
        if "revived not counted" in self.slips or "taken first" in self.slips:
            return 0
        return len(found if "all revived" in self.slips else revived)

    def _take_found(self, found: list[int], revived: list[int]) -> None:
        for block in found:
            self.uses[block] = 1 if "used once" in self.slips else self.uses[block] + 1
        for block in found if "always in the queue" in self.slips else revived:
            gone = "removed where there" in self.slips and block not in self.queue
            if "stays in the queue" not in self.slips and not gone:
                self.queue.remove(block)

    def _fresh(self) -> int:
        block = self.queue.pop(-1 if "from the end" in self.slips else 0)
        if not {"old name stays", "still found"} & self.slips:
            self.where.pop(self.names[block], None)
        if not {"old name stays", "name not cleared"} & self.slips:
            self.names[block] = None
        self.uses[block] = 1
        return block

    def name(self, block: int, name: Any) -> None:
        if name not in self.where and self.names[block] is None:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        if "forgotten at once" in self.slips:
            for block in table:
                if self.uses[block] == 1:
                    self.where.pop(self.names[block], None)
                    self.names[block] = None
        for block in table if "head first" in self.slips else table[::-1]:
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


class CacheStage:
    """Chats come to a cache. Their tables, the counts and the queue are seen after each step."""

    def __init__(self, made: type, num_blocks: int) -> None:
        self.cache = made(num_blocks)
        self.tables: dict[str, list[int]] = {}
        self.named: set[str] = set()

    def words(self, what: str, who: str, names: tuple = (), num_rest: int = 1) -> str:
        if what == "leave":
            return f"close({self.tables.get(who)}), the table of {who}"
        if what == "look":
            return f"look_up({list(names)})"
        found = self.cache.look_up(list(names))
        new = len(names) + num_rest - len(found)
        return f"{who} asks about {list(names)} and {num_rest} more: open({found}, {new})"

    def do(self, what: str, who: str, names: tuple = (), num_rest: int = 1) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        if what == "look":
            seen["it returned"] = self.cache.look_up(list(names))
        elif what == "open":
            seen["it returned"] = self._open(who, names, num_rest)[1]
        elif what == "leave":
            self.cache.close(self.tables.pop(who, []))
        else:
            seen["it returned"] = self._serve(who, names, num_rest)
        return seen | {
            "uses": list(self.cache.uses),
            "queue": list(self.cache.queue),
            "blocks that look_up finds, name by name": {
                name: self.cache.look_up([name]) for name in sorted(self.named)
            },
        }

    def _open(self, who: str, names: tuple, num_rest: int) -> tuple[Any, list[int] | None]:
        """Open a table for these names and some blocks more. Returns it, and a copy."""
        found = self.cache.look_up(list(names))
        given = list(found)
        table = self.cache.open(given, len(names) + num_rest - len(found))
        expect_unchanged(given, found, "found, the list that open was given")
        if table is given:
            raise EXERCISE.mistake("found-is-the-table")
        if table is not None:
            self.tables[who] = list(table)
        return table, None if table is None else list(table)

    def _serve(self, who: str, names: tuple, num_rest: int) -> list[int] | None:
        """Open a table, and name what was computed."""
        table, copy = self._open(who, names, num_rest)
        if table is not None:
            self.named |= set(names)
            for block, name in zip(table, names, strict=False):
                self.cache.name(block, name)
        return copy


STORIES = (
    Story(
        "A new cache of 6 blocks.",
        (6,),
        (("serve", "A", ("a1", "a2")), ("leave", "A"), ("look", "A", ("a1", "a2", "a3"))),
    ),
    Story(
        "Complaint 1: A comes back and finds its two blocks, which nobody used. Then four others"
        " ask for a block each.",
        (6,),
        (
            ("serve", "A", ("a1", "a2")),
            ("leave", "A"),
            ("serve", "A", ("a1", "a2")),
            *(("serve", who, ()) for who in "BCDE"),
        ),
    ),
    Story(
        "A uses blocks 0 and 1, one block is free, and B shares the two and wants one more.",
        (4,),
        (
            ("serve", "A", ("a1", "a2")),
            ("serve", "B", ("a1", "a2")),
            ("leave", "A"),
            ("leave", "B"),
        ),
    ),
    Story(
        "Complaint 2: three blocks are free, two of them are A's prefix, and A wants two more. Then"
        " A wants only one more.",
        (3,),
        (
            ("serve", "A", ("a1", "a2")),
            ("leave", "A"),
            ("serve", "A", ("a1", "a2"), 2),
            ("serve", "A", ("a1", "a2"), 1),
            ("serve", "B", (), 1),
            ("serve", "B", ("a1",), 0),
        ),
    ),
    Story(
        "Three hundred ask the same at a time.",
        (3,),
        (
            *(("serve", f"A{i}", ("a1",), 0) for i in range(300)),
            *(("leave", f"A{i}") for i in range(300)),
            ("serve", "B", (), 3),
        ),
    ),
    Story(
        "Complaint 2, too: A comes back, and its two blocks are the next ones in the queue.",
        (4,),
        (
            ("serve", "A", ("a1", "a2")),
            ("leave", "A"),
            ("serve", "B", (), 2),
            ("leave", "B"),
            ("serve", "A", ("a1", "a2")),
        ),
    ),
    Story(
        "A comes back, and its names are looked up before anything new is computed.",
        (5,),
        (
            ("serve", "A", ("a1", "a2")),
            ("leave", "A"),
            ("open", "A", ("a1", "a2")),
            ("look", "B", ("a1", "a2")),
        ),
    ),
    Story(
        "Complaint 3: A's blocks are all taken for C, and both names are asked for.",
        (3,),
        (
            ("serve", "A", ("a1", "a2")),
            ("leave", "A"),
            ("serve", "C", ("c1", "c2", "c3"), 0),
            ("look", "A", ("a1", "a2")),
            ("leave", "C"),
            ("look", "C", ("c1", "c2", "c3")),
            ("serve", "C", ("c1", "c2", "c3"), 0),
        ),
    ),
    Story(
        "Nothing new is wanted, and nothing at all.",
        (3,),
        (
            ("serve", "A", ("a1", "a2", "a3"), 0),
            ("serve", "B", ("a1", "a2", "a3"), 0),
            ("serve", "C", (), 0),
            ("leave", "A"),
            ("leave", "C"),
            ("leave", "B"),
            ("serve", "D", ("a1", "a2", "a3"), 0),
        ),
    ),
)


def random_story(seed: int, num_blocks: int, chats: str, num_calls: int) -> Story:
    """Chats that come and go at random."""
    rng, calls, here = random.Random(seed), [], {}
    stage = CacheStage(Cache, num_blocks)
    most = max(4, num_blocks // 3)
    for number in range(num_calls):
        if here and rng.random() < 0.45:
            who = rng.choice(list(here))
            del here[who]
            call = ("leave", who)
        else:
            chat, who = rng.choice(chats), f"chat {number}"
            names = tuple(f"{chat}{i}" for i in range(rng.randint(0, most)))
            call = ("serve", who, names, rng.randint(0, 2))
        calls.append(call)
        if stage.do(*call).get("it returned") is not None:
            here[who] = True
    return Story(
        f"{num_calls:,} random calls on a cache of {num_blocks}.", (num_blocks,), tuple(calls)
    )


def random_stories() -> tuple[Story, ...]:
    """Short ones on small caches, two on larger ones, and a long one."""
    small = [random_story(seed, 2 + seed % 7, "ab", 40) for seed in range(28)]
    large = [random_story(50, 20, "abc", 60), random_story(51, 70, "abcd", 60)]
    return (*small, *large, random_story(60, 12, "abc", 1500))


def check_mended_cache(answer: type) -> str:
    """The three complaints first, then random chats, then what stays behind."""
    expect(
        inspect.isclass(answer),
        "wrong-type",
        f"Expected the class NamedCache, got {show(answer)}.\nHand in the class, not a cache.",
    )
    _expect_own_state(answer)
    count = Stories(CacheStage, (Cache,), (*STORIES, *random_stories())).judge(answer, EXERCISE)

    def work(rounds: int) -> Any:
        cache = answer(6)
        for number in range(rounds):
            names = [f"{number % 4}{i}" for i in range(3)]
            found = cache.look_up(names)
            table = cache.open(found, 4 - len(found))
            for block, name in zip(table, names, strict=False):
                cache.name(block, name)
            cache.open([], 3)  # refused
            cache.close(table)
        return cache

    expect_no_growth(work, "one chat at a time")
    return f"three complaints settled, and {count:,} calls"


def _expect_own_state(answer: type) -> None:
    """Require that a new cache is new, whatever other caches hold."""

    def scene(cache: Any) -> tuple:
        before = (list(cache.uses), list(cache.queue), cache.look_up(["a"]))
        cache.name(cache.open([], 2)[0], "a")
        return *before, cache.look_up(["a"])

    try:
        first = answer(4)
        alone, beside = scene(first), scene(answer(4))
    except Exception:
        return  # the stories say more about it
    expect(
        alone == beside,
        "shared-between-caches",
        "Two caches of 4 are made, one after the other, and each of them opens a table and names a"
        " block. uses, queue and what is found before it, and what is found after it, are"
        f" {alone} for the first one, and {beside} for the second.\nEach cache has its own state:"
        " make it in __init__, as attributes of self.",
    )


EXERCISE = Exercise(
    id="04.5",
    title="Debug this: one block, two owners",
    check=check_mended_cache,
    mistakes=(
        Known(
            "still-in-the-queue",
            message=(
                "What `open` finds in the cache is in use from then on, and it is still in the"
                " queue: somebody else will get the same block.\nA found block that nobody used"
                " leaves the queue, before new blocks are taken from it."
            ),
            suspects=(
                slips(Cache, "stays in the queue"),
                slips(Cache, "revived not counted", "stays in the queue"),
                slips(Cache, "fresh first"),
                slips(Cache, "fresh first", "removed where there"),
                slips(Cache, "revived not counted", "stays in the queue", "old name stays"),
                slips(Cache, "stays in the queue", "old name stays"),
            ),
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
            message=(
                "Some blocks of the queue are the prefix itself, and `open` counts them as room"
                " for new ones.\nBlocks that the prefix revives leave the queue as well: count"
                " them before you compare, and answer None where the rest does not suffice."
            ),
            suspects=(
                slips(Cache, "revived not counted"),
                slips(Cache, "revived not counted", "old name stays"),
            ),
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
            message=(
                "A block was taken for something new, and its old name still finds it: somebody"
                " would read another one's text.\nWhen `open` takes a block for something new,"
                " its old name must leave `where`."
            ),
            suspects=(slips(Cache, "old name stays"), slips(Cache, "still found")),
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
            message=(
                "A block was taken for something new, and its new name cannot be found.\nA block"
                " that changes hands gets a new name: forget the old one in both places, or"
                " `name` finds the block taken."
            ),
            suspects=(slips(Cache, "name not cleared"),),
            answers=r"""
# %% forgets the other way of two
@@
-            self.names[block] = None
""",
        ),
        Known(
            "last-block-refused",
            message=(
                "The last block of the queue can be had, and you refuse it.\n"
                "Compare with >, not with >=."
            ),
            suspects=(slips(Cache, "one to spare"),),
            answers=r"""
# %% one block to spare
@@
-        if num_new + len(revived) > len(self.queue):
+        if num_new and num_new + len(revived) >= len(self.queue):
""",
        ),
        Known(
            "shared-refused",
            message=(
                "A found block that somebody uses already is not in the queue: finding it takes"
                " nothing from there.\nCount, and remove, only the found blocks whose `uses` is"
                " 0."
            ),
            suspects=(slips(Cache, "all revived"),),
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
            message=(
                "open says that there is no room, and has changed something by then.\nLook"
                " whether there is room before you change anything."
            ),
            suspects=(slips(Cache, "taken first"),),
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
        Known(
            "in-use-not-in-queue",
            message=(
                "Your code removes a block from the queue that is not in it: somebody uses it"
                " already.\nOnly a found block whose `uses` is 0 is in the queue."
            ),
            suspects=(
                slips(Cache, "always in the queue"),
                slips(Cache, "always in the queue", "all revived"),
            ),
            answers=r"""
# %% every found block leaves the queue
@@
-        for block in revived:
+        for block in found:
""",
        ),
        Known(
            "owners-not-counted",
            message=(
                "A block that two tables list is used by two.\nA found block gets one user"
                " *more*; only a new one begins with 1."
            ),
            suspects=(slips(Cache, "used once"),),
            answers=r"""
# %% whoever is in use is in use
@@
-            self.uses[block] += 1
+            self.uses[block] = 1
""",
        ),
        Known(
            "forgotten-at-once",
            message=(
                "What a chat computed cannot be found any more as soon as it is done.\nA block"
                " keeps its name until it is taken for something new: forget it in `open`, and"
                " leave `close` as it is."
            ),
            suspects=(slips(Cache, "forgotten at once"),),
            answers=r"""
# %% forgets the name when the last user leaves
@@
-            self.where.pop(self.names[block], None)
-            self.names[block] = None
@@
             if self.uses[block] == 0:
+                self.where.pop(self.names[block], None)
+                self.names[block] = None
""",
        ),
        Known(
            "newest-first",
            message=(
                "Blocks are taken from the end of the queue, where those are that became free"
                " last.\nTake them from its front, as the colleague's code does."
            ),
            suspects=(slips(Cache, "from the end"),),
            answers=r"""
# %% the other end
@@
-            block = self.queue.pop(0)
+            block = self.queue.pop()
""",
        ),
        Known(
            "heads-first",
            message=(
                "A table is given back from its beginning to its end.\n`close` is right as it"
                " was: the tail first."
            ),
            suspects=(slips(Cache, "head first"),),
            answers=r"""
# %% mends what was right
@@
-        for block in reversed(table):
+        for block in table:
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% forgets what it has found, too
@@
             self.queue.remove(block)
+            self.where.pop(self.names[block], None)
+            self.names[block] = None

# %% every 500th block is lost
@@
             self.uses[block] -= 1
+            self.num = getattr(self, "num", 0) + 1
@@
-            if self.uses[block] == 0:
+            if self.uses[block] == 0 and self.num % 500:
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% lengthens the list that it was given
@@
-        return found + fresh
+        found += fresh
+        return found
""",
        ),
        Known(
            "found-is-the-table",
            message=(
                "open returned the very list that it was given, where nothing new is wanted. The"
                " table grows later, and with it the caller's list of what was found.\nMake a new"
                " list in each call."
            ),
            answers=r"""
# %% nothing to add, so the list as it is
@@
-        return found + fresh
+        return found + fresh if fresh else found
""",
        ),
        Known(
            "shared-between-caches",
            answers=r"""
# %% the names belong to the class
@@
-        self.where = {}  # name -> block
+        self.where = self.WHERE
@@
+    WHERE = {}
+
     def look_up(self, names: list[str]) -> list[int]:
""",
        ),
        Known(
            "grows",
            answers=r"""
# %% keeps the old names
@@
             self.names[block] = None
+            self.old = [*getattr(self, "old", ()), block]
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
