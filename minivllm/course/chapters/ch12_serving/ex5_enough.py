"""12.5: enough is enough."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch12_serving.common import run_virtual
from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_no_growth

if TYPE_CHECKING:
    from minivllm.course.sim.clients import VirtualLoop

# --- admission ------------------------------------------------------------------------------------


class Admission:
    """The right one; its methods are what wrong ones replace."""

    def __init__(
        self, slots: int, max_queue: int, clock: Callable[[], float], window: float
    ) -> None:
        self.slots, self.max_queue, self.clock, self.window = slots, max_queue, clock, window
        self.inside = 0
        self.ends: deque[float] = deque()

    @property
    def room(self) -> int:
        return self.slots + self.max_queue

    def admit(self) -> int:
        if self.inside < self.room:
            self.inside += 1
            return 0
        return self.rounded(self.seconds(self.count()))

    def end(self) -> None:
        self.inside -= 1
        self.ends.append(self.clock())

    def count(self) -> int:
        return sum(end > self.clock() - self.window for end in self.ends)

    def seconds(self, count: int) -> float:
        return self.waiting() * self.window / count if count else 60

    def waiting(self) -> int:
        return self.inside - self.slots

    def rounded(self, seconds: float) -> int:
        return min(60, max(1, math.ceil(seconds)))


class _RefusedCount(Admission):
    def admit(self) -> int:
        self.inside += 1
        if self.inside <= self.room:
            return 0
        return self.rounded(self.seconds(self.count()))


class _RefusedCountLater(Admission):
    def admit(self) -> int:
        found = super().admit()
        self.inside += found > 0
        return found

    def waiting(self) -> int:
        return min(self.inside, self.room) - self.slots


class _OneMore(Admission):
    @property
    def room(self) -> int:
        return super().room + 1


class _OneFewer(Admission):
    @property
    def room(self) -> int:
        return super().room - 1


class _QueueOnly(Admission):
    @property
    def room(self) -> int:
        return self.max_queue


class _SlotsOnly(Admission):
    @property
    def room(self) -> int:
        return self.slots


class _AllInside(Admission):
    def waiting(self) -> int:
        return self.inside


class _OneToCome(Admission):
    def waiting(self) -> int:
        return self.inside - self.slots + 1


class _ForOne(Admission):
    def waiting(self) -> int:
        return 1


class _ForOneMore(Admission):
    def waiting(self) -> int:
        return max(1, self.inside - self.slots)


class _Edge(Admission):
    def count(self) -> int:
        return sum(end >= self.clock() - self.window for end in self.ends)


class _SinceEver(Admission):
    def count(self) -> int:
        return len(self.ends)


class _SinceEverByTime(Admission):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.began = self.clock()

    def seconds(self, count: int) -> float:
        elapsed = self.clock() - self.began
        return self.waiting() * elapsed / len(self.ends) if self.ends else 60


class _ByElapsed(Admission):
    """The window is as short as the life of the object."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.began = self.clock()

    def seconds(self, count: int) -> float:
        span = min(self.window, self.clock() - self.began)
        return self.waiting() * span / count if count else 60


class _BySlots(Admission):
    def seconds(self, count: int) -> float:
        return self.waiting() * self.window / count / self.slots if count else 60


class _Inverted(Admission):
    def seconds(self, count: int) -> float:
        return self.waiting() * count / self.window if count else 60


class _NotPerSecond(Admission):
    def seconds(self, count: int) -> float:
        return self.waiting() / count if count else 60


class _Cut(Admission):
    def rounded(self, seconds: float) -> int:
        return min(60, max(1, int(seconds)))


class _Nearest(Admission):
    def rounded(self, seconds: float) -> int:
        return min(60, max(1, round(seconds)))


class _PlusOne(Admission):
    def rounded(self, seconds: float) -> int:
        return min(60, int(seconds) + 1)


class _NotRounded(Admission):
    def rounded(self, seconds: float) -> Any:
        return min(60, max(1, seconds))


class _NoLeast(Admission):
    def rounded(self, seconds: float) -> int:
        return min(60, math.ceil(seconds))


class _NoMost(Admission):
    def rounded(self, seconds: float) -> int:
        return max(1, math.ceil(seconds))


class _OneForNobody(Admission):
    def seconds(self, count: int) -> float:
        return self.waiting() * self.window / count if count else 1


class _WindowForNobody(Admission):
    def seconds(self, count: int) -> float:
        return self.waiting() * self.window / count if count else self.window


class _AsIfOne(Admission):
    def seconds(self, count: int) -> float:
        return self.waiting() * self.window / max(1, count)


class _Clears(Admission):
    """Forgets what it has counted."""

    def admit(self) -> int:
        found = super().admit()
        if found:
            self.ends.clear()
        return found


class _CountsAdmitted(Admission):
    """Measures what comes in, not what gets done."""

    def admit(self) -> int:
        found = super().admit()
        if not found:
            self.ends.append(self.clock())
        return found

    def end(self) -> None:
        self.inside -= 1


#: ("admit" or "end", seconds since the operation before).
Operation = tuple[str, float]


def _play(
    made: Callable, operations: list[Operation], slots: int, max_queue: int, window: float
) -> list[Any]:
    """What each `admit` returned."""
    now = 100.0
    mine, results = made(slots, max_queue, lambda: now, window), []
    for what, later in operations:
        now += later
        if what == "admit":
            results.append(mine.admit())
        else:
            mine.end()
    return results


def _admissions() -> list[tuple[list[Operation], int, int, float]]:
    admit, soon = ("admit", 0.0), ("admit", 0.25)
    cases: list[tuple[list[Operation], int, int, float]] = [
        ([admit], 1, 0, 8.0),
        ([admit, admit], 1, 0, 8.0),
        ([admit] * 5, 2, 2, 8.0),
        # Refused ones are not inside: one ends, and one comes in.
        ([admit] * 9 + [("end", 1.0), soon, soon], 2, 2, 8.0),
        # Nobody waits, and one ends now and then.
        ([admit, ("end", 1.0), soon, soon], 1, 0, 8.0),
        # The only end is exactly as old as the window, and then a bit older.
        ([admit] * 4 + [("end", 1.0), ("admit", 0.0), ("admit", 7.75), soon, soon], 1, 3, 8.0),
        # Many have ended, and then none for long.
        ([admit] * 2 + [("end", 0.25), soon] * 20 + [soon, ("admit", 60.0)], 1, 1, 8.0),
        # Two ends: each of seven waits four seconds.
        ([admit] * 8 + [("end", 1.0), admit, ("end", 1.0), admit, admit], 1, 7, 8.0),
        ([admit] * 40 + [("end", 1.0), admit, admit], 2, 30, 16.0),
        # A fast server: 300 ends in a window.
        ([admit] * 900 + [("end", 0.0), admit] * 300 + [("admit", 0.25)], 2, 800, 8.0),
    ]
    for seed in range(6):
        rng = Random(seed)
        slots, max_queue = rng.randint(1, 8), rng.randint(0, 20)
        inside, operations = 0, []
        for _ in range(200):
            later = rng.choice((0.0, 0.25, 0.5, 1.0) if rng.random() < 0.95 else (12.0,))
            if inside and rng.random() < 0.4:
                inside -= 1
                operations.append(("end", later))
            else:
                inside = min(inside + 1, slots + max_queue)
                operations.append(("admit", later))
        cases.append((operations, slots, max_queue, rng.choice((4.0, 8.0, 16.0))))
    return cases


def _expect_admission(answer: Callable) -> int:
    cases = _admissions()
    wording = {"operations = ": "these operations (what, seconds later) = "}
    diagnose(partial(_play, answer), cases, partial(_play, Admission), _suspects(), wording=wording)
    one, other = (answer(2, 1, lambda: 0.0, 8.0) for _ in range(2))
    for _ in range(9):
        one.admit()
    expect(
        [other.admit() for _ in range(4)][:3] == [0, 0, 0],
        "shared-between-objects",
        "Two objects were made, and one of them was filled: now the other one is full, too.\nWhat"
        " changes belongs into `__init__`, as `self.…`.",
    )

    for most in (6, 4):
        what = "a rush and its end" if most > 4 else "requests that all find room"
        expect_no_growth(partial(_busy, answer, most), what)
    return len(cases)


def _busy(answer: Callable, count: int, rounds: int) -> Any:
    """An object after so many rounds, in each of which `count` come to 4 places and 4 end."""
    now = 0.0
    mine = answer(2, 2, lambda: now, 8.0)
    for _ in range(rounds):
        now += 0.5
        for _ in range(count):
            mine.admit()
        for _ in range(4):
            mine.end()
    return mine


def _suspects() -> dict[str, tuple]:
    return {
        known.name: (known.message, *(partial(_play, made) for made in known.suspects))
        for known in EXERCISE.mistakes
        if known.suspects
    }


# --- the mailbox ----------------------------------------------------------------------------------

Scene = Callable[[Any, "VirtualLoop"], Awaitable[None]]


async def _turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _expect_piece(got: Any, right: Any, how: str) -> None:
    """Name the difference between a piece that was read and the right one."""
    if got == right:
        return
    seen = f"{how}. Then `get` gave {show(got)}, expected {show(right)}."
    if right is None:
        raise EXERCISE.mistake("end-again", seen)
    good = isinstance(got, tuple) and len(got) == 2 and isinstance(got[0], str)
    expect(good, "wrong-form", f"{seen}\nA piece is a pair (text, finish reason).")
    if got[0] == "" and right[0]:
        raise EXERCISE.mistake("empty-piece", seen)
    if got[0] == right[0]:
        raise EXERCISE.mistake("end-lost", seen)
    if right[0].startswith(got[0]):
        raise EXERCISE.mistake("not-joined", seen)
    if got[0].startswith(right[0]):
        raise EXERCISE.mistake("wakes-late", seen)
    if got[0].endswith(right[0]):
        raise EXERCISE.mistake("text-again", seen)
    raise EXERCISE.mistake("text-lost", seen)


async def _one_by_one(made: Callable, loop: VirtualLoop) -> None:
    box = made()
    for text in ("Once ", "upon", " ", "a time", "\n\n"):
        box.put(text)
        _expect_piece(await box.get(), (text, None), f"put({text!r})")
    box.put(".", "stop")
    _expect_piece(await box.get(), (".", "stop"), "put('.', 'stop')")
    for _ in range(3):
        await _expect_over(box)


async def _expect_over(box: Any) -> None:
    reader = asyncio.create_task(box.get())
    await asyncio.wait([reader], timeout=100)
    if not reader.done():
        reader.cancel()
        raise EXERCISE.mistake("end-again", "The last piece was read, and `get` waits for ever.")
    _expect_piece(reader.result(), None, "The last piece was read")


async def _joins(made: Callable, loop: VirtualLoop) -> None:
    """A slow reader."""
    box, words = made(), [f"w{i} " for i in range(20_000)]
    for word in words:
        box.put(word)
    _expect_piece(await box.get(), ("".join(words), None), "put was called 20,000 times")
    box.put("a")
    box.put("b", "length")
    _expect_piece(await box.get(), ("ab", "length"), "put('a'), put('b', 'length')")
    await _expect_over(box)


async def _ends_without_text(made: Callable, loop: VirtualLoop) -> None:
    box = made()
    box.put("a")
    _expect_piece(await box.get(), ("a", None), "put('a')")
    box.put("", "stop")
    reader = asyncio.create_task(box.get())
    await asyncio.wait([reader], timeout=100)
    if not reader.done():
        reader.cancel()
        raise EXERCISE.mistake("end-lost", "put('', 'stop'), and `get` waits for ever.")
    _expect_piece(reader.result(), ("", "stop"), "put('', 'stop')")
    box = made()
    box.put("a")
    box.put("", "stop")
    _expect_piece(await box.get(), ("a", "stop"), "put('a'), put('', 'stop')")
    await _expect_over(box)


async def _wakes(made: Callable, loop: VirtualLoop) -> None:
    """A reader that waits, and asks again at once."""
    box, got = made(), []

    async def read() -> None:
        while len(got) < 20 and (piece := await box.get()) is not None:
            got.append(piece)

    task = asyncio.create_task(read())
    for texts in (["a"], ["b", "c"], [], ["d"]):
        await _turns()
        for text in texts:
            box.put(text)
    await _turns()
    box.put("e", "stop")
    await asyncio.wait([task], timeout=100)
    expect(task.done(), "stuck", f"A reader got {show(got)}, and waits.\n{_STUCK}")
    task.result()
    right = [("a", None), ("bc", None), ("d", None), ("e", "stop")]
    for mine, piece in zip([*got, ("", None)], right, strict=False):
        _expect_piece(mine, piece, "put('a'), put('b'), put('c'), put('d'), put('e', 'stop')")


async def _ignores_nothing(made: Callable, loop: VirtualLoop) -> None:
    """A token that gave no text yet is no piece."""
    box = made()
    task = asyncio.create_task(box.get())
    await _turns()
    box.put("")
    await _turns()
    if task.done():
        got = task.result()
        raise EXERCISE.mistake("empty-piece", f"put('') woke a reader with {show(got)}.")
    box.put("🦊")
    _expect_piece(await task, ("🦊", None), "put(''), put('🦊')")
    box.put("")
    task = asyncio.create_task(box.get())
    await _turns()
    if task.done():
        raise EXERCISE.mistake("empty-piece", f"After put('') `get` gave {show(task.result())}.")
    task.cancel()


async def _sleeps(made: Callable, loop: VirtualLoop) -> None:
    """A reader waits, and nobody asks again and again."""
    box = made()
    task = asyncio.create_task(box.get())
    await _turns()
    timers, turns = loop.num_timers, loop.num_turns
    await asyncio.sleep(10.0)
    timers, turns = loop.num_timers - timers - 1, loop.num_turns - turns
    expect(
        turns <= 4 and timers <= 0,
        "polls",
        f"A reader waited for 10 seconds, and the event loop woke up {turns} times.\nAsking again"
        " and again costs time for each reader that waits. `await` something that `put` wakes: an"
        " `asyncio.Event`.",
    )
    await asyncio.sleep(7200.0)
    box.put("a")
    _expect_piece(await task, ("a", None), "A reader waited for two hours; put('a')")


async def _is_cancelled(made: Callable, loop: VirtualLoop) -> None:
    """A reader gives up: before something comes, and in the same turn."""
    box = made()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(box.get(), 1.0)
    box.put("a")
    _expect_piece(await box.get(), ("a", None), "A reader gave up waiting; put('a')")
    for text in ("b", "c"):
        task = asyncio.create_task(box.get())
        await _turns()
        box.put(text)
        task.cancel()
        await asyncio.wait([task])
        how = f"A reader was cancelled in the moment of put({text!r})"
        if not task.cancelled():
            _expect_piece(task.result(), (text, None), how)
            continue
        again = asyncio.create_task(box.get())
        await asyncio.wait([again], timeout=100)
        if not again.done():
            again.cancel()
            raise EXERCISE.mistake("text-lost", f"{how}. Then the next reader waits for ever.")
        _expect_piece(again.result(), (text, None), how)


async def _at_any_turn(made: Callable, loop: VirtualLoop) -> None:
    """A writer and readers side by side; some readers are cancelled, after any number of turns."""
    for seed in range(24):
        rng, box = Random(seed), made()
        words = [f"{seed}.{i} " for i in range(30)]

        async def write(box: Any = box, words: list[str] = words, rng: Random = rng) -> None:
            for word in words:
                box.put(word)
                for _ in range(rng.randint(0, 3)):
                    await asyncio.sleep(0)
            box.put("", "stop")

        writer, got, reason = asyncio.create_task(write()), "", None
        while reason is None:
            reader = asyncio.create_task(box.get())
            if rng.random() < 0.5 * (seed > 5):
                await _turns(rng.randint(0, 3))
                reader.cancel()
            await asyncio.wait([reader], timeout=100)
            how = "A writer put 30 words, and readers took them"
            how += ", some of whom were cancelled" if seed > 5 else ""
            if not reader.done():
                reader.cancel()
                raise EXERCISE.mistake("text-lost", f"{how}. After {got[-12:]!r} nothing comes.")
            if not reader.cancelled():
                text, reason = reader.result()
                got += text
        await writer
        if got != "".join(words):
            seen = f"{how}: {show(got)}, expected {show(''.join(words))}."
            raise EXERCISE.mistake("text-lost", seen)


async def _two_boxes(made: Callable, loop: VirtualLoop) -> None:
    one, other = made(), made()
    one.put("a")
    other.put("b", "stop")
    _expect_piece(await one.get(), ("a", None), "Two mailboxes: one.put('a'), other.put('b')")
    one.put("c")
    _expect_piece(await one.get(), ("c", None), "Two mailboxes: one.put('c')")
    _expect_piece(await other.get(), ("b", "stop"), "Two mailboxes: other.put('b', 'stop')")


_STUCK = (
    "The text is there, and nothing wakes the reader any more.\nA reader that comes after `put`"
    " must not wait, and one that waits must be woken by every `put` that brings something."
)
_SCENES: tuple[Scene, ...] = (
    _one_by_one,
    _sleeps,
    _joins,
    _ends_without_text,
    _is_cancelled,
    _wakes,
    _ignores_nothing,
    _at_any_turn,
    _two_boxes,
)


def check_enough(admission: Callable, mailbox: Callable) -> str:
    count = _expect_admission(admission)
    for scene in _SCENES:
        stuck = Mistake("stuck", _STUCK)
        run_virtual(partial(scene, mailbox), stuck)
    return f"{count} rushes of clients, and {len(_SCENES)} readers, fast and slow"


EXERCISE = Exercise(
    id="12.5",
    title="Enough is enough",
    check=check_enough,
    mistakes=(
        Known(
            "refused-counted",
            "A request that was refused is not in the server: it must not be counted, or the server"
            " is full for ever after a rush.",
            hint=1,
            suspects=(_RefusedCount, _RefusedCountLater),
            answers=r"""
# %% counts first
@@
-        if self.num_inside < self.slots + self.max_queue:
-            self.num_inside += 1
-            return 0
+        self.num_inside += 1
+        if self.num_inside <= self.slots + self.max_queue:
+            return 0
""",
        ),
        Known(
            "another-room",
            "`slots` requests run and `max_queue` wait: so many may be inside, not one more and not"
            " one fewer.",
            hint=1,
            suspects=(_OneMore, _OneFewer, _QueueOnly, _SlotsOnly),
            answers=r"""
# %% one more
@@
-        if self.num_inside < self.slots + self.max_queue:
+        if self.num_inside <= self.slots + self.max_queue:

# %% the queue alone
@@
-        if self.num_inside < self.slots + self.max_queue:
+        if self.num_inside < self.max_queue:
""",
        ),
        Known(
            "counts-all-inside",
            "You take everybody inside for waiting. Those in the `slots` run already; behind them"
            " is the queue.",
            suspects=(_AllInside,),
            answers=r"""
# %% everybody
@@
-        waiting = self.num_inside - self.slots
+        waiting = self.num_inside
""",
        ),
        Known(
            "another-queue",
            "That is the time for another number of waiting requests than there are.",
            suspects=(_OneToCome, _ForOne, _ForOneMore),
            answers=r"""
# %% the one who asks waits, too
@@
-        waiting = self.num_inside - self.slots
+        waiting = self.num_inside - self.slots + 1

# %% the next place
@@
-        waiting = self.num_inside - self.slots
+        waiting = 1
""",
        ),
        Known(
            "edge-of-the-window",
            "An end exactly `window` seconds ago is no longer counted.",
            suspects=(_Edge,),
            answers=r"""
# %% counts it
@@
-        while self.ends and self.ends[0] <= now - self.window:
+        while self.ends and self.ends[0] < now - self.window:
""",
        ),
        Known(
            "not-the-last-seconds",
            "Your rate is not that of the last `window` seconds. A server that was fast this"
            " morning may stand still now.",
            hint=2,
            suspects=(_SinceEver, _SinceEverByTime, _ByElapsed),
            answers=r"""
# %% all ends since the start
@@
-        while self.ends and self.ends[0] <= now - self.window:
-            self.ends.popleft()
+        return now
""",
        ),
        Known(
            "wrong-rate",
            "The rate is ends per second: their number in the window, divided by the window. The"
            " wait is the number of those who wait, divided by the rate.",
            hint=2,
            suspects=(_BySlots, _Inverted, _NotPerSecond, _CountsAdmitted),
            answers=r"""
# %% upside down
@@
-        seconds = math.ceil(waiting * self.window / len(self.ends))
+        seconds = math.ceil(waiting * len(self.ends) / self.window)

# %% per window
@@
-        seconds = math.ceil(waiting * self.window / len(self.ends))
+        seconds = math.ceil(waiting / len(self.ends))

# %% notes who comes in
@@
-            self.num_inside += 1
+            self.num_inside += 1
+            self.ends.append(self.clock())
@@
-        self.num_inside -= 1
-        self.ends.append(self.clock())
-        self.forget()
+        self.num_inside -= 1
""",
        ),
        Known(
            "not-rounded-up",
            "Retry-After is a whole number of seconds. Rounded down, clients come before there is"
            " room: round up (`math.ceil`).",
            suspects=(_Cut, _Nearest, _PlusOne, _NotRounded),
            answers=r"""
# %% cut
@@
-        seconds = math.ceil(waiting * self.window / len(self.ends))
+        seconds = int(waiting * self.window / len(self.ends))

# %% one more than cut
@@
-        seconds = math.ceil(waiting * self.window / len(self.ends))
+        seconds = int(waiting * self.window / len(self.ends)) + 1
""",
        ),
        Known(
            "out-of-bounds",
            "A client that is refused is told 1 to 60 seconds: 0 would mean that it was let in, and"
            " nobody waits for an hour.",
            hint=3,
            suspects=(_NoLeast, _NoMost),
            answers=r"""
# %% may be 0
@@
-        return min(60, max(1, seconds))
+        return min(60, seconds)

# %% may be anything
@@
-        return min(60, max(1, seconds))
+        return max(1, seconds)
""",
        ),
        Known(
            "nobody-ended",
            "When nothing has ended in the window, nobody knows how long it takes: say 60.",
            hint=3,
            suspects=(_OneForNobody, _WindowForNobody, _AsIfOne),
            answers=r"""
# %% as if one had
@@
-        if not self.ends:
-            return 60
@@
-        seconds = math.ceil(waiting * self.window / len(self.ends))
+        seconds = math.ceil(waiting * self.window / max(1, len(self.ends)))
""",
        ),
        Known(
            "shared-between-objects",
            answers=r"""
# %% a list of the class
@@
-        self.num_inside = 0
-        self.ends: deque[float] = deque()
+        type(self).num_inside = 0
+        self.ends: deque[float] = deque()
@@
-            self.num_inside += 1
+            type(self).num_inside += 1
@@
-        self.num_inside -= 1
+        type(self).num_inside -= 1
""",
        ),
        Known(
            "grows",
            answers=r"""
# %% forgets only when somebody is refused
@@
-        self.ends.append(self.clock())
-        self.forget()
+        self.ends.append(self.clock())

# %% keeps all ends
@@
-        while self.ends and self.ends[0] <= now - self.window:
-            self.ends.popleft()
+        return now
@@
-        self.forget()
-        if not self.ends:
-            return 60
-        waiting = self.num_inside - self.slots
-        seconds = math.ceil(waiting * self.window / len(self.ends))
+        waiting, now = self.num_inside - self.slots, self.clock()
+        ends = [end for end in self.ends if end > now - self.window]
+        if not ends:
+            return 60
+        seconds = math.ceil(waiting * self.window / len(ends))
""",
        ),
        Known(
            "not-joined",
            "What came while nobody read is one piece: a slow reader then takes few large pieces,"
            " and its queue does not grow with each token.",
            hint=4,
            answers=r"""
# %% a queue of pieces
class Mailbox:
    def __init__(self):
        self.queue = asyncio.Queue()
        self.is_over = False

    def put(self, text, finish_reason=None):
        if text or finish_reason:
            self.queue.put_nowait((text, finish_reason))

    async def get(self):
        if self.is_over:
            return None
        piece = await self.queue.get()
        self.is_over = piece[1] is not None
        return piece


class Admission:
    def __init__(self, slots, max_queue, clock, window=10.0):
        self.slots, self.max_queue, self.clock, self.window = slots, max_queue, clock, window
        self.num_inside, self.ends = 0, []

    def admit(self):
        now = self.clock()
        self.ends = [end for end in self.ends if end > now - self.window]
        if self.num_inside < self.slots + self.max_queue:
            self.num_inside += 1
            return 0
        if not self.ends:
            return 60
        waiting = self.num_inside - self.slots
        return min(60, max(1, math.ceil(waiting * self.window / len(self.ends))))

    def end(self):
        self.num_inside -= 1
        self.ends.append(self.clock())
""",
        ),
        Known(
            "text-lost",
            "Text has disappeared. All of it must come, in order; also what comes while nobody"
            " waits, and what a cancelled reader has not taken.",
            hint=4,
            answers=r"""
# %% the latest piece
@@
-        self.text += text
+        self.text = text

# %% takes the text, and awaits something before it returns
@@
-        self.has_news.clear()
-        text, self.text = self.text, ""
+        text, self.text = self.text, ""
+        await asyncio.sleep(0)
+        self.has_news.clear()

# %% a future per wait, which takes the text with it
@@
-        self.text += text
-        self.finish_reason = finish_reason or self.finish_reason
-        if text or finish_reason:
-            self.has_news.set()
+        if text or finish_reason:
+            self.text += text
+            self.finish_reason = finish_reason or self.finish_reason
+            if self.reader is not None and not self.reader.done():
+                self.reader.set_result((self.text, self.finish_reason))
+                self.text = ""
+            else:
+                self.has_news.set()
@@
-        await self.has_news.wait()
+        if not self.has_news.is_set():
+            self.reader = asyncio.get_running_loop().create_future()
+            piece = await self.reader
+            self.is_over = piece[1] is not None
+            return piece
@@
-        self.is_over = False
+        self.is_over, self.reader = False, None
""",
        ),
        Known(
            "text-again",
            "Text that was read comes a second time.",
            hint=4,
            answers=r"""
# %% all text so far
@@
-        text, self.text = self.text, ""
+        text = self.text
""",
        ),
        Known(
            "end-lost",
            "The reason of the end is missing, or comes with the wrong piece. It belongs to the"
            " last piece, whether that has text or not.",
            hint=4,
            answers=r"""
# %% only with text
@@
-        if text or finish_reason:
-            self.has_news.set()
+        if not text:
+            return
+        self.has_news.set()
@@
-        self.text += text
-        self.finish_reason = finish_reason or self.finish_reason
+        self.text += text
+        self.finish_reason = finish_reason if text else None

# %% a piece of its own
@@
-        self.is_over = self.finish_reason is not None
-        return text, self.finish_reason
+        if text and self.finish_reason:
+            self.has_news.set()
+            return text, None
+        self.is_over = self.finish_reason is not None
+        return text, self.finish_reason
""",
        ),
        Known(
            "end-again",
            "After the last piece there is nothing: `get` returns None, at once, as often as it is"
            " asked.",
            answers=r"""
# %% waits for something after the end
@@
-        if self.is_over:
-            return None

# %% the end again and again
@@
-        if self.is_over:
-            return None
-        await self.has_news.wait()
+        if self.is_over:
+            return "", self.finish_reason
+        await self.has_news.wait()
""",
        ),
        Known(
            "empty-piece",
            "A reader gets a piece without text and without an end: a client would be sent an empty"
            " event. Wait until there is something.",
            hint=4,
            answers=r"""
# %% is never cleared
@@
-        self.has_news.clear()

# %% wakes for nothing
@@
-        if text or finish_reason:
-            self.has_news.set()
+        self.has_news.set()
""",
        ),
        Known(
            "polls",
            answers=r"""
# %% asks again and again
@@
-        await self.has_news.wait()
+        while not self.has_news.is_set():
+            await asyncio.sleep(0.01)
""",
        ),
        Known(
            "wakes-late",
            "A reader was waiting when the first of these came, and it got them only together with"
            " later ones. `put` wakes it at once.",
            answers=r"""
# %% waits a moment for more
@@
-        await self.has_news.wait()
-        self.has_news.clear()
+        await self.has_news.wait()
+        for _ in range(20):
+            await asyncio.sleep(0)
+        self.has_news.clear()
""",
        ),
        Known(
            "stuck",
            answers=r"""
# %% forgets what came before it waits
@@
-        await self.has_news.wait()
-        self.has_news.clear()
+        self.has_news.clear()
+        await self.has_news.wait()
""",
        ),
    ),
    right=r"""
# %% a list of parts
@@
-        self.text += text
-        self.finish_reason = finish_reason or self.finish_reason
-        if text or finish_reason:
-            self.has_news.set()
+        if text or finish_reason:
+            self.parts.append(text)
+            self.finish_reason = finish_reason
+            self.has_news.set()
@@
-        text, self.text = self.text, ""
+        text, self.parts = "".join(self.parts), []
@@
-        self.text, self.finish_reason = "", None
+        self.parts, self.finish_reason = [], None

# %% a queue that is emptied at once
@@
-        self.has_news = asyncio.Event()
+        self.queue = asyncio.Queue()
@@
-        self.text += text
-        self.finish_reason = finish_reason or self.finish_reason
-        if text or finish_reason:
-            self.has_news.set()
+        if text or finish_reason:
+            self.queue.put_nowait((text, finish_reason))
@@
-        await self.has_news.wait()
-        self.has_news.clear()
-        text, self.text = self.text, ""
-        self.is_over = self.finish_reason is not None
-        return text, self.finish_reason
+        text, reason = await self.queue.get()
+        while not self.queue.empty():
+            more, reason = self.queue.get_nowait()
+            text += more
+        self.is_over = reason is not None
+        return text, reason
""",
)
