"""Does an answer decide by chance? Run it twice in worlds that differ in nothing that it may use.

Ranks and repeated runs must come to the same decisions. So a decision may not depend on `hash` of a
string or `id` of an object (both differ between processes), on a clock, or on random numbers that
nobody asked for.
"""

from __future__ import annotations

import builtins
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from minivllm.course.grading.compare import difference
from minivllm.course.grading.errors import Mistake

_CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
_CLOCKS_NS = tuple(f"{name}_ns" for name in _CLOCKS)


def expect_no_chance(run: Callable[[], Any], what: str, *answers: Any) -> Any:
    """run() twice, in different worlds; its result. Mistake("by-chance") where the results differ.

    what: the decision, as the message names it ("the order of the requests"). answers: the
    learner's functions or classes, whose imported names (``from time import perf_counter``) are
    replaced, too. run must make its inputs anew in each call.
    """
    with world(1, *answers):
        first = run()
    with world(2, *answers):
        second = run()
    if found := difference(first, second, 0.0, 0.0):
        raise Mistake(
            "by-chance",
            f"Two runs on the same requests differ in {what}: {found[1]}.\nYour code decides by a"
            " clock, by `hash` or `id`, by the order of a set, or by random numbers. Two ranks, or"
            " two runs, must decide alike: use the requests and your counts only.",
        )
    return first


@contextlib.contextmanager
def world(number: int, *answers: Any) -> Iterator[None]:
    """Clocks, hashes, ids and random numbers of their own, until the end of the block.

    number: worlds with different numbers differ in all of them.
    """
    replaced = _replacements(number)
    places = [(builtins, "hash"), (builtins, "id")]
    places += [(time, name) for name in (*_CLOCKS, *_CLOCKS_NS)]
    originals = {id(getattr(module, name)): name for module, name in places}
    undo: list[Callable[[], None]] = []
    state = random.getstate()
    try:
        for namespace in _namespaces(answers):
            for name, value in list(namespace.items()):
                if callable(value) and id(value) in originals:
                    namespace[name] = replaced[originals[id(value)]]
                    undo.append(_setter(namespace, name, value))
        for module, name in places:
            undo.append(_setter(vars(module), name, getattr(module, name)))
            setattr(module, name, replaced[name])
        random.seed(number)
        with _torch_seed(number):
            yield
    finally:
        for step in reversed(undo):
            step()
        random.setstate(state)


def _replacements(number: int) -> dict[str, Callable]:
    """The name of a function -> what stands in its place in this world."""
    salt = 0x9E3779B97F4A7C15 * number & (1 << 61) - 1
    real_hash, real_id = hash, id

    def salted_hash(value: Any) -> int:
        # The hash of a number is the same in all processes.
        plain = isinstance(value, int | float | bool)
        return real_hash(value) if plain else real_hash(value) ^ salt

    found: dict[str, Callable] = {"hash": salted_hash, "id": lambda value: real_id(value) ^ salt}
    for name in (*_CLOCKS, *_CLOCKS_NS):
        found[name] = _other_clock(getattr(time, name), number)
    return found


def _other_clock(clock: Callable[[], Any], number: int) -> Callable[[], Any]:
    start = clock()
    return lambda: (
        start + type(start)((clock() - start) * (1 + 7 * number)) + type(start)(1237.37 * number)
    )


def _namespaces(answers: tuple) -> list[dict[str, Any]]:
    """The global names of the answers' functions."""
    found: dict[int, dict[str, Any]] = {}
    for answer in answers:
        members = vars(answer).values() if isinstance(answer, type) else [answer]
        for member in members:
            names = getattr(getattr(member, "__func__", member), "__globals__", None)
            if names is not None:
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
