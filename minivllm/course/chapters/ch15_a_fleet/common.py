"""What the exercises of chapter 15 share: suspects that are the right function, done otherwise, and
what the objects of a class share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType

from minivllm.course.grading.copies import copied
from minivllm.course.grading.diagnose import Suspects
from minivllm.course.grading.exercise import Exercise
from minivllm.course.grading.kept import Memory


def suspects_of(exercise: Exercise, right: Callable) -> Suspects:
    """The suspects of an exercise which are `partial`s of this function, by name of the mistake."""
    found: dict[str, tuple] = {}
    for known in exercise.mistakes:
        mine: Sequence[Callable] = [
            suspect
            for suspect in known.suspects
            if isinstance(suspect, partial) and suspect.func is right
        ]
        if mine:
            found[known.name] = (known.message, *mine)
    return found


class ClassMemory:
    """What a class and the globals that its methods use hold, beside its objects."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        plain = (dict, list, set, deque, int, float)
        # What Python or a decorator put there (`__dataclass_fields__`) is nobody's memory.
        mine = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
        self.before = {n: copied(v) for n, v in mine.items() if isinstance(v, plain)}
        methods = [value for value in vars(cls).values() if isinstance(value, FunctionType)]
        self.memories = [Memory.of(method) for method in methods]

    def forget(self) -> bool:
        """Put everything back. Whether anything had changed."""
        changed = [name for name, old in self.before.items() if vars(self.cls)[name] != old]
        for name in changed:
            setattr(self.cls, name, copied(self.before[name]))
        return any([memory.forget() for memory in self.memories] + [bool(changed)])
