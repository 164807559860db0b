"""What the exercises of chapter 14 share: numbers that every right formula rounds alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minivllm.course.grading.exercise import Exercise

if TYPE_CHECKING:
    import torch

#: The largest int8 that is used, and the largest e4m3.
INT8_MAX, FP8_MAX = 127.0, 448.0


def clear_of_ties(x: torch.Tensor, scale: torch.Tensor, margin: float = 2e-3) -> torch.Tensor:
    """x, with 0 in place of what lies nearly in the middle between two steps of scale.

    There a right formula could round up or down: x / scale and x · (1 / scale) differ in their last
    bit. scale must broadcast with x. The largest number of a scale is no tie, and stays.
    """
    steps = x.double() / scale.double()
    return x.masked_fill(((steps % 1) - 0.5).abs() < margin, 0)


def half_away(steps: torch.Tensor) -> torch.Tensor:
    """Round half away from zero, as C's round()."""
    return (steps.abs() + 0.5).floor() * steps.sign()


def half_up(steps: torch.Tensor) -> torch.Tensor:
    return (steps + 0.5).floor()


def wrapped(steps: torch.Tensor) -> torch.Tensor:
    """To int8 without a clip: 128 becomes -128, and so on."""
    import torch

    return ((steps.clamp(-1e9, 1e9).long() + 128) % 256 - 128).to(torch.int8)


def suspects_of(exercise: Exercise, kind: type | tuple[type, ...]) -> dict[str, tuple]:
    """The suspects of one of an exercise's functions: those that are instances of `kind`."""
    found = {}
    for name, (message, *implementations) in exercise.suspects.items():
        if mine := [wrong for wrong in implementations if isinstance(wrong, kind)]:
            found[name] = (message, *mine)
    return found


#: From steps, numbers on the format's line, to whole ones.
Rounding = Callable[["torch.Tensor"], "torch.Tensor"]
