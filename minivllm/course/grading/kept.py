"""What an answer keeps from one call to the next, and how to make it forget."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from minivllm.course.grading.compare import difference, is_tensor
from minivllm.course.grading.copies import copied

_PLAIN = (bool, int, float, str, tuple, list, dict, set, deque, type(None))


@dataclass(frozen=True)
class _Place:
    """One value that outlives a call. before: a copy of what was there when we looked."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    before: Any


@dataclass(frozen=True)
class Memory:
    """The values that a function can keep between calls, as they were at one time.

    These are global variables that it uses, what its closures hold, defaults, attributes, and
    caches of functools; also those of functions that it calls by a global name.
    """

    places: tuple[_Place, ...]

    @classmethod
    def of(cls, function: Callable) -> Memory:
        """The memory of an answer, or of a check's function that holds one in a closure."""
        return cls(tuple(_places(function)))

    def forget(self) -> bool:
        """Put everything back as it was. Whether anything had changed."""
        changed = [place for place in self.places if not _same(place.read(), place.before)]
        for place in changed:
            place.write(copied(place.before))
        return bool(changed)


def _places(function: Any) -> Iterator[_Place]:
    seen: set[int] = set()
    todo = [function]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if hasattr(item, "cache_clear") and hasattr(item, "cache_info"):
            yield _cache(item)
        if isinstance(item, functools.partial):
            todo.append(item.func)
        todo.append(getattr(item, "__wrapped__", None))
        if not isinstance(item, FunctionType):
            continue
        cells = item.__closure__ or ()
        todo += [held for cell in cells if callable(held := _held(cell))]
        if item.__globals__.get("__name__", "").startswith("minivllm."):
            continue  # a check's own function: only the answer in it counts
        used = [name for name in _names(item.__code__) if name in item.__globals__]
        # Functions of libraries are not the answer's.
        todo += [f for f in map(item.__globals__.get, used) if _written_beside(f, item)]
        yield from _data(item, cells, used)


def _cache(function: Any) -> _Place:
    """What functools keeps for a function: where its size has changed, all of it is dropped."""
    return _Place(
        lambda: function.cache_info().currsize,
        lambda _: function.cache_clear(),
        function.cache_info().currsize,
    )


def _data(function: FunctionType, cells: tuple, used: list[str]) -> Iterator[_Place]:
    """The values of one function that are no functions."""
    variables = function.__globals__
    for name in used:
        yield from _place(variables[name], lambda n=name: variables[n], _setter(variables, name))
    for cell in cells:
        write = functools.partial(setattr, cell, "cell_contents")
        yield from _place(_held(cell), functools.partial(_held, cell), write)
    kept = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for value in (*kept, function.__dict__):
        if not isinstance(value, tuple):  # nobody can change it in place
            yield from _place(value, lambda v=value: v, lambda _: None)


def _written_beside(value: Any, function: FunctionType) -> bool:
    inner = inspect.unwrap(value) if callable(value) else value
    return isinstance(inner, FunctionType) and inner.__globals__ is function.__globals__


def _setter(variables: dict[str, Any], name: str) -> Callable[[Any], None]:
    return lambda value: variables.update({name: value})


def _place(value: Any, read: Callable[[], Any], rebind: Callable[[Any], None]) -> Iterator[_Place]:
    if not isinstance(value, _PLAIN) and not is_tensor(value):
        return

    def write(old: Any) -> None:
        if is_tensor(value) and is_tensor(old):
            value.copy_(old)
        elif isinstance(value, list | deque):
            value.clear()
            value.extend(old)
        elif isinstance(value, dict | set):
            value.clear()
            value.update(old)
        rebind(value if isinstance(value, list | deque | dict | set) or is_tensor(value) else old)

    try:
        yield _Place(read, write, copied(value))
    except Exception:
        return  # what cannot be copied cannot be put back


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function's code may look up, also inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _same(now: Any, before: Any) -> bool:
    if type(now) is not type(before):
        return False
    try:
        return difference(now, before, 0.0, 0.0) is None
    except Exception:
        return True  # nothing is known; the answer keeps its own name of a mistake
