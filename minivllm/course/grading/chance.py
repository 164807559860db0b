"""Does an answer decide by chance? Run it twice in worlds that differ in nothing that it may use.

Ranks and repeated runs must come to the same decisions. So a decision may not depend on `hash` of a
string, `id` of an object or the number of the process (they differ between processes), on a clock,
or on random numbers that nobody asked for.
"""

from __future__ import annotations

import builtins
import contextlib
import datetime
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from minivllm.course.grading.compare import difference
from minivllm.course.grading.errors import Mistake

_NAMES = ("time", "monotonic", "perf_counter", "process_time", "thread_time", "clock_gettime")
#: The clocks of the module `time`.
_CLOCKS = [
    f"{name}{end}" for name in _NAMES for end in ("", "_ns") if hasattr(time, f"{name}{end}")
]


def expect_no_chance(run: Callable[[], Any], what: str, *answers: Any) -> Any:
    """run() twice, in different worlds; its result. Mistake("by-chance") where the results differ.

    what: the decision, as the message names it ("the order of the requests"). answers: the
    learner's functions or classes, whose imported names (``from time import perf_counter``) are
    replaced, too. run must make its inputs anew in each call.
    """
    with world(1, *answers) as asked:
        first = run()
    with world(2, *answers):
        second = run()
    if found := difference(first, second, 0.0, 0.0):
        used = f" It uses {', '.join(sorted(asked))}." if asked else ""
        raise Mistake(
            "by-chance",
            f"Two runs on the same requests differ in {what}: {found[1]}.\nYour code decides by a"
            " clock, by `hash` or `id`, by the order of a set, or by random numbers. Two ranks, or"
            f" two runs, must decide alike: use the requests and your counts only.{used}",
        )
    return first


@contextlib.contextmanager
def world(number: int, *answers: Any) -> Iterator[set[str]]:
    """Clocks, hashes, ids, random numbers and a process number of their own, until the block ends.

    number: worlds with different numbers differ in all of them. Yields a set: the names of the
    clocks, and of `hash`, `id` and `os.getpid`, that code beside the answers has called so far. The
    clocks of other threads stay right, since a notebook's kernel has timers.
    """
    spaces = _namespaces(answers)
    asked: set[str] = set()
    places = {f"builtins.{name}": (builtins, name) for name in ("hash", "id")}
    places |= {f"time.{name}": (time, name) for name in _CLOCKS}
    places["datetime.datetime"] = (datetime, "datetime")
    places["os.getpid"] = (os, "getpid")
    originals = {id(getattr(*place)): name for name, place in places.items()}
    replaced = _Replacements(number, asked, spaces).all()
    undo: list[Callable[[], None]] = []
    state = random.getstate()
    try:
        for namespace in spaces:
            for name, value in list(namespace.items()):
                if callable(value) and id(value) in originals:
                    namespace[name] = replaced[originals[id(value)]]
                    undo.append(_setter(namespace, name, value))
        for name, (module, attribute) in places.items():
            undo.append(_setter(vars(module), attribute, getattr(module, attribute)))
            setattr(module, attribute, replaced[name])
        random.seed(number)
        with _torch_seed(number):
            yield asked
    finally:
        for step in reversed(undo):
            step()
        random.setstate(state)


class _Replacements:
    """What stands in the place of clocks, `hash` and `id` in a world.

    asked: takes the names of those that code with these global names calls.
    """

    def __init__(self, number: int, asked: set[str], spaces: list[dict[str, Any]]) -> None:
        self.number, self.asked, self.spaces = number, asked, spaces
        self.thread = threading.get_ident()

    def all(self) -> dict[str, Any]:
        salt = 0x9E3779B97F4A7C15 * self.number & (1 << 61) - 1
        real_hash, real_id = hash, id

        def salted_hash(value: Any) -> int:
            self.note("hash")
            # The hash of a number is the same in all processes.
            plain = isinstance(value, int | float | bool)
            return real_hash(value) if plain else real_hash(value) ^ salt

        def salted_id(value: Any) -> int:
            self.note("id")
            return real_id(value) ^ salt

        real_process = os.getpid

        def other_process() -> int:
            """The process has another number only for the answers: threads and locks ask, too."""
            names = sys._getframe(1).f_globals
            if not any(names is space for space in self.spaces):
                return real_process()
            self.asked.add("os.getpid")
            return 1000 + self.number

        found: dict[str, Any] = {"builtins.hash": salted_hash, "builtins.id": salted_id}
        found["os.getpid"] = other_process
        for name in _CLOCKS:
            found[f"time.{name}"] = self.other_clock(name)
        found["datetime.datetime"] = self.other_date(datetime.datetime)
        return found

    def note(self, name: str) -> None:
        """Take down who was called, if the caller's caller belongs to the answers."""
        names = sys._getframe(2).f_globals
        if any(names is space for space in self.spaces):
            self.asked.add(name)

    def other_clock(self, name: str) -> Callable[..., Any]:
        clock, factor = getattr(time, name), 1 + 7 * self.number
        ahead = 1237.37 * self.number * (10**9 if name.endswith("_ns") else 1)
        starts: dict[tuple, Any] = {}

        def read(*args: Any) -> Any:
            now = clock(*args)
            if threading.get_ident() != self.thread:
                return now
            self.note(f"time.{name}")
            start = starts.setdefault(args, now)
            return start + type(start)((now - start) * factor) + type(start)(ahead)

        return read

    def other_date(self, real: type[datetime.datetime]) -> type[datetime.datetime]:
        note, thread = self.note, self.thread
        ahead, factor, start = datetime.timedelta(self.number), 1 + 7 * self.number, real.now()

        class OtherDate(real):  # type: ignore[misc, valid-type]
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                moved = real.now(tz)
                if threading.get_ident() != thread:
                    return moved
                note("datetime.now")
                return moved + ahead + (real.now() - start) * (factor - 1)

            @classmethod
            def today(cls) -> Any:
                note("datetime.today")
                return cls.now()

            @classmethod
            def utcnow(cls) -> Any:
                note("datetime.utcnow")
                return cls.now()

        return OtherDate


def _namespaces(answers: tuple) -> list[dict[str, Any]]:
    """The global names of the answers' functions.

    An answer that is a class counts with those of its bases that are not of the package.
    """
    found: dict[int, dict[str, Any]] = {}
    for answer in answers:
        kinds = answer.__mro__ if isinstance(answer, type) else ()
        members = [member for kind in kinds for member in vars(kind).values()] or [answer]
        for member in members:
            names = getattr(getattr(member, "__func__", member), "__globals__", None)
            package = names is not None and names.get("__name__", "").startswith("minivllm.")
            if names is not None and (not package or not kinds):
                found[id(names)] = names
    return list(found.values())


def _setter(namespace: dict[str, Any], name: str, value: Any) -> Callable[[], None]:
    def put_back() -> None:
        namespace[name] = value

    return put_back


@contextlib.contextmanager
def _torch_seed(number: int) -> Iterator[None]:
    if "torch" not in sys.modules:
        yield
        return
    torch = sys.modules["torch"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        yield
