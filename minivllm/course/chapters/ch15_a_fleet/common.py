"""What the exercises of chapter 15 share: suspects that are the right function, done otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from minivllm.course.grading.diagnose import Suspects
from minivllm.course.grading.exercise import Exercise


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
