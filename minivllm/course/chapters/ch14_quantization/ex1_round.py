"""14.1: absmax, and rounding to int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch14_quantization.common import (
    INT8_MAX,
    Rounding,
    clear_of_ties,
    half_away,
    half_up,
    suspects_of,
    wrapped,
)
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    import torch

#: Which dimensions share a scale: (number of dimensions, axis) -> dimensions.
Dims = Callable[[int, int | None], tuple[int, ...]]


def _asked(ndim: int, axis: int | None) -> tuple[int, ...]:
    return tuple(range(ndim)) if axis is None else (axis % ndim,)


def _all_others(ndim: int, axis: int | None) -> tuple[int, ...]:
    """`axis` taken for the dimension that keeps its scales."""
    shared = tuple(i for i in range(ndim) if axis is None or i != axis % ndim)
    return shared or tuple(range(ndim))


def _the_next(ndim: int, axis: int | None) -> tuple[int, ...]:
    return tuple(range(ndim)) if axis is None else ((axis + 1) % ndim,)


@dataclass(frozen=True)
class _Scale:
    """A scale per group of numbers: the largest magnitude / 127."""

    top: str = "magnitude"
    divisor: float = INT8_MAX
    dims: Dims = _asked
    low: str = ""
    inverse: bool = False

    def __call__(self, x: torch.Tensor, axis: int | None) -> torch.Tensor:
        dims = self.dims(x.ndim, axis)
        wide = x if self.low else x.float()
        most, least = wide.amax(dims, keepdim=True), wide.amin(dims, keepdim=True)
        top = {
            "magnitude": wide.abs().amax(dims, keepdim=True),
            "largest": most,
            "magnitude of the largest": most.abs(),
            "magnitude of the smallest": least.abs(),
            "spread": most - least,
        }[self.top]
        scale = self.divisor / top if self.inverse else top / self.divisor
        return scale.float() if self.low == "computed" else scale


@dataclass(frozen=True)
class _Quantize:
    """Round x / scale to int8. order: what comes first where it matters."""

    round: Rounding = lambda steps: steps.round()
    low: float = -INT8_MAX
    high: float = INT8_MAX
    wraps: bool = False
    zeros: str = "zero"
    first: str = "divide"

    def __call__(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        import torch

        wide = x.float()
        if self.first == "clip":
            wide = wide.clamp(self.low, self.high)
        steps = wide * scale if self.first == "multiply" else wide / scale
        if self.zeros == "zero":
            steps = torch.where(scale == 0, 0.0, steps)
        elif self.zeros == "as one":
            steps = torch.where(scale == 0, wide, steps)
        steps = self.round(steps.nan_to_num(0.0, posinf=1e30, neginf=-1e30))
        if self.wraps:
            return wrapped(steps)
        return wrapped(steps.clamp(self.low, self.high))


@dataclass(frozen=True)
class _Back:
    """The numbers again: q · scale."""

    how: str = "multiply"

    def __call__(self, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        import torch

        return {
            "multiply": lambda: q.float() * scale,
            "divide": lambda: q.float() / scale,
            "no scale": lambda: q.float() * torch.ones_like(scale),
            "unsigned": lambda: q.view(torch.uint8).float() * scale,
            "rounded": lambda: (q.float() * scale).round(),
            "bfloat16": lambda: (q.float() * scale).bfloat16(),
        }[self.how]()


# --- the check ------------------------------------------------------------------------------------


def _scale_cases() -> list[tuple]:
    import torch

    random = seeded(141)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    negative = drawn(3, 5) - 9.0
    zeros = drawn(4, 6)
    zeros[1] = 0.0
    tiny = drawn(3, 4) * torch.tensor([[1e-9], [1.0], [1e-20]])
    wide = drawn(2, 33)
    wide[0, 7], wide[1, 32] = -300.0, 4000.0
    cases = [
        (torch.tensor([2.54]), None),
        (torch.tensor([-1.0, 0.5, -12.7]), 0),
        (torch.tensor([-1.0, 0.5, 12.7]), -1),
        (negative, None),
        (negative, 1),
        (drawn(3, 4), 0),
        (drawn(5, 3), -2),
        (drawn(5, 5), 0),
        (drawn(5, 5), -1),
        (zeros, 1),
        (zeros, None),
        (torch.zeros(2, 3), None),
        (torch.zeros(2, 3), 0),
        (tiny, 1),
        (wide, 1),
        (wide, 0),
        (drawn(2, 3, 4), 2),
        (drawn(2, 3, 4), 1),
        (drawn(2, 3, 4), -3),
        (drawn(3, 2, 4), None),
        (drawn(3, 7).bfloat16(), 1),
        (drawn(4, 9).bfloat16() * 30, None),
        (drawn(6, 2).half(), 0),
    ]
    return cases


def _steps_on(scale: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Numbers [len(scale), count] under scales [n, 1], some of them beyond 127 steps."""
    import torch

    random = seeded(seed)
    x = torch.randn(len(scale), count, generator=random) * 60 * scale
    x[:, 0] = 1000.0 * scale[:, 0]
    return clear_of_ties(x, scale)


def _quantize_cases() -> list[tuple]:
    import torch

    one = torch.ones(1, 1)
    whole = torch.arange(-300.0, 300.0)[None]
    ties = torch.arange(-130.0, 130.0)[None] + 0.5
    scales = torch.tensor([[0.013], [7.1], [1e-12], [0.25]])
    with_zero = torch.tensor([[0.1], [0.0], [0.0]])
    under_zero = torch.tensor([[0.12, -0.3, 0.5], [0.0, 0.0, 0.0], [2.0, -1.0, 0.0]])
    return [
        (torch.tensor([0.9, -0.9, 0.2]), torch.tensor([1.0])),
        (torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]]), one),
        (torch.tensor([[126.4, 127.6, 128.0, 300.0, -127.4, -128.0, -1e6]]), one),
        (whole * 0.5, one * 0.5),
        (ties * 4.0, one * 4.0),
        (ties * 0.125, one * 0.125),
        (torch.tensor([[0.6, -0.9, 1.2]]), one * 0.3),
        (_steps_on(scales, 40, 1), scales),
        (_steps_on(scales, 7, 2).T.contiguous(), scales.T.contiguous()),
        (_steps_on(scales, 4, 3), scales),
        (_steps_on(one * 0.37, 24, 4).view(2, 3, 4), torch.full((1, 1, 1), 0.37)),
        (under_zero, with_zero),
        (torch.zeros(2, 2), torch.zeros(1, 1)),
        (ties.bfloat16(), one * 2.0),
        (_steps_on(one * 3.0, 50, 5).bfloat16().float().round(), one * 3.0),
    ]


def _back_cases() -> list[tuple]:
    import torch

    every = torch.arange(-127, 128, dtype=torch.int8)
    scales = torch.tensor([[0.01], [1.0], [300.0], [0.0]])
    return [
        (torch.tensor([3, -5], dtype=torch.int8), torch.tensor([0.5])),
        (every[None], torch.tensor([[0.7]])),
        (every[:100].view(4, 25), scales),
        (every[:100].view(25, 4), scales.T.contiguous()),
        (every[:24].view(2, 3, 4), torch.tensor([[[0.3]], [[1e-9]]])),
    ]


def _judge_scale(answer: Callable) -> int:
    right, cases = _Scale(), _scale_cases()
    suspects = suspects_of(EXERCISE, _Scale)
    try:
        return diagnose(answer, cases, right, suspects, rtol=1e-6, atol=0.0)
    except Mistake as mistake:
        if mistake.name == "wrong-values" and _has_floor(answer, cases):
            seen = mistake.message.rpartition("\n")[2]
            raise EXERCISE.mistake("scale-has-a-floor", seen) from None
        raise


def _has_floor(answer: Callable, cases: list[tuple]) -> bool:
    """Whether only the scales of very small numbers are wrong, and these are too large."""
    import torch

    for x, axis in cases:
        right, got = _Scale()(x, axis), answer(x.clone(), axis)
        wrong = ~torch.isclose(got, right, rtol=1e-6, atol=0.0)
        if (wrong & ((right > 1e-7) | ~(got > right))).any():
            return False
    return True


def check_round(scale: Callable, quantize: Callable, dequantize: Callable) -> str:
    scales = _judge_scale(scale)
    rounded = diagnose(
        quantize, _quantize_cases(), _Quantize(), suspects_of(EXERCISE, _Quantize), twins=False
    )
    back = diagnose(
        dequantize, _back_cases(), _Back(), suspects_of(EXERCISE, _Back), rtol=1e-6, atol=0.0
    )
    return f"{scales} tensors got scales, {rounded} were rounded, and {back} came back"


#: A slip is named also where the limits are wrong, too.
_LIMITS = ((-INT8_MAX, INT8_MAX), (-128.0, INT8_MAX), (-1e9, 1e9))

EXERCISE = Exercise(
    id="14.1",
    title="Warm-up: round to a format",
    check=check_round,
    mistakes=(
        Known(
            "signed-maximum",
            "Your scale looks at the signed numbers. The farthest one from 0 counts, on whichever"
            " side: here it may be negative.\nTake abs() first, then the maximum.",
            hint=1,
            suspects=(
                _Scale(top="largest"),
                _Scale(top="magnitude of the largest"),
                _Scale(top="magnitude of the smallest"),
            ),
            answers=r"""
# %% the largest number
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    return x.float().amax(dims, keepdim=True) / 127
# %% the magnitude of the largest number
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    return x.float().amax(dims, keepdim=True).abs() / 127
""",
        ),
        Known(
            "other-top",
            "Your largest number becomes another one than 127. The scale is the largest magnitude"
            " / 127: not / 128, and not the distance from the smallest to the largest number.",
            hint=1,
            suspects=(
                *(_Scale(divisor=d) for d in (126.0, 127.5, 128.0, 254.0, 255.0, 256.0)),
                *(_Scale(top="spread", divisor=d) for d in (127.0, 254.0, 255.0, 256.0)),
            ),
            answers=r"""
# %% 128 steps
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    return x.float().abs().amax(dims, keepdim=True) / 128
# %% the range over 255 steps
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    wide = x.float()
+    spread = wide.amax(dims, keepdim=True) - wide.amin(dims, keepdim=True)
+    return spread / 255
""",
        ),
        Known(
            "inverse-scale",
            "You return 127 / largest magnitude, which says how many steps make 1. A scale is the"
            " size of a step: largest magnitude / 127. Zeros have a scale then, too.",
            hint=1,
            suspects=(_Scale(inverse=True), _Scale(inverse=True, top="largest")),
            answers=r"""
# %% the other way, everywhere
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    return 127 / x.float().abs().amax(dims, keepdim=True)
@@
-    steps = torch.where(scale == 0, 0.0, x.float() / scale)
+    steps = torch.where(scale == 0, 0.0, x.float() * scale)
@@
-    return q.float() * scale
+    return q.float() / scale
""",
        ),
        Known(
            "other-axis",
            "The wrong numbers share a scale. Those that lie *along* `axis` do: with axis 1, all"
            " columns of a row, and the scales of [N, K] are [N, 1].",
            hint=2,
            suspects=(_Scale(dims=_all_others), _Scale(dims=_the_next)),
            answers=r"""
# %% the axis that keeps its scales
@@
-    dims = tuple(range(x.ndim)) if axis is None else axis
+    every = range(x.ndim)
+    dims = tuple(d for d in every if axis is None or d != axis % x.ndim) or (0,)
""",
        ),
        Known(
            "axis-ignored",
            "There are other scales than asked for: with `axis` None one for the whole tensor, else"
            " one for each group along this axis, wherever it is.",
            hint=2,
            suspects=(
                _Scale(dims=lambda ndim, axis: tuple(range(ndim))),
                _Scale(dims=lambda ndim, axis: (ndim - 1,)),
                _Scale(dims=lambda ndim, axis: (0,)),
                _Scale(dims=lambda ndim, axis: (ndim - 1 if axis is None else axis % ndim,)),
                _Scale(dims=lambda ndim, axis: (axis % ndim,) if axis else tuple(range(ndim))),
            ),
            answers=r"""
# %% 0 is falsy
@@
-    dims = tuple(range(x.ndim)) if axis is None else axis
+    dims = axis or tuple(range(x.ndim))
# %% None taken for the last one
@@
-    dims = tuple(range(x.ndim)) if axis is None else axis
+    dims = -1 if axis is None else axis
""",
        ),
        Known(
            "scale-in-low-precision",
            "The scale of 16-bit numbers is a 16-bit number, or was divided as one. A scale is off"
            " for all numbers under it: convert x to float32 before you divide.",
            suspects=(_Scale(low="returned"), _Scale(low="computed")),
            answers=r"""
# %% in x's own dtype
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    return x.abs().amax(dims, keepdim=True) / 127
# %% converted too late
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    return (x.abs().amax(dims, keepdim=True) / 127).float()
""",
        ),
        Known(
            "scale-has-a-floor",
            "Scales of very small numbers, or of zeros, are larger than the largest magnitude /"
            " 127. A weight may be that small. Zeros have the scale 0, and `quantize` takes care of"
            " that.",
            answers=r"""
# %% a clamp, to be safe
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    return x.float().abs().amax(dims, keepdim=True).clamp(min=1e-8) / 127
# %% 1 in place of 0
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    scale = x.float().abs().amax(dims, keepdim=True) / 127
+    return torch.where(scale > 0, scale, 1.0)
""",
        ),
        Known(
            "truncates",
            "Your steps are cut off, not rounded: 0.9 of a step becomes 0, or always the lower one."
            " This doubles the largest error. Conversion to int8 cuts off: round before it.",
            hint=3,
            suspects=tuple(
                _Quantize(round=wrong, low=low, high=high)
                for wrong in (
                    lambda steps: steps.trunc(),
                    lambda steps: steps.floor(),
                    lambda steps: steps.ceil(),
                    lambda steps: steps.abs().ceil() * steps.sign(),
                )
                for low, high in _LIMITS
            ),
            answers=r"""
# %% no round
@@
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    return steps.clamp(-127, 127).to(torch.int8)
""",
        ),
        Known(
            "ties-not-to-even",
            "A number in the middle between two steps goes to the even one: 0.5 to 0, 1.5 to 2, 2.5"
            " to 2. Yours always go the same way, so that a sum of many drifts.",
            hint=3,
            suspects=tuple(
                _Quantize(round=wrong, low=low, high=high)
                for wrong in (half_up, half_away, lambda steps: (steps - 0.5).ceil())
                for low, high in _LIMITS
            ),
            answers=r"""
# %% floor(x + 0.5)
@@
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    return (steps + 0.5).floor().clamp(-127, 127).to(torch.int8)
# %% away from zero
@@
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    steps = (steps.abs() + 0.5).floor() * steps.sign()
+    return steps.clamp(-127, 127).to(torch.int8)
""",
        ),
        Known(
            "wraps-around",
            "A number beyond 127 steps comes out as something else, with the other sign perhaps:"
            " int8 has 256 values, and a conversion begins again at -128. Clip before you convert.",
            hint=3,
            suspects=(
                _Quantize(wraps=True),
                _Quantize(low=-128.0, high=128.0),
                _Quantize(low=-255.0, high=255.0),
                _Quantize(high=1e9),
                _Quantize(low=-1e9),
                _Quantize(low=-INT8_MAX, high=128.0),
            ),
            answers=r"""
# %% no clip
@@
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    return steps.round().to(torch.int64).to(torch.int8)
# %% one side only
@@
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    return steps.round().clamp(min=-127).to(torch.int64).to(torch.int8)
# %% up to 128
@@
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    return steps.round().clamp(-128, 128).to(torch.int16).to(torch.int8)
""",
        ),
        Known(
            "minus-128",
            "-128 is in your result. The format is symmetric: -127 to 127, so that x and -x become"
            " the same number with another sign.",
            hint=3,
            suspects=(_Quantize(low=-128.0),),
            answers=r"""
# %% all that int8 has
@@
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    return steps.round().clamp(-128, 127).to(torch.int8)
""",
        ),
        Known(
            "zero-scale",
            "Under a scale of 0 you store other numbers than 0. x / 0 is infinite, or nan: choose 0"
            " there with torch.where.",
            hint=3,
            suspects=(_Quantize(zeros="divide"), _Quantize(zeros="as one")),
            answers=r"""
# %% divides by 0
@@
-    steps = torch.where(scale == 0, 0.0, x.float() / scale)
+    steps = x.float() / scale
# %% divides by 1
@@
-    steps = torch.where(scale == 0, 0.0, x.float() / scale)
+    steps = x.float() / torch.where(scale == 0, 1.0, scale)
""",
        ),
        Known(
            "clipped-too-early",
            "You clip x itself to 127, and then divide. What must lie between -127 and 127 is x /"
            " scale.",
            suspects=(_Quantize(first="clip"),),
            answers=r"""
# %% clips, then divides
@@
-    steps = torch.where(scale == 0, 0.0, x.float() / scale)
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    steps = torch.where(scale == 0, 0.0, x.float().clamp(-127, 127) / scale)
+    return steps.round().clamp(-127, 127).to(torch.int8)
""",
        ),
        Known(
            "multiplied",
            "You multiply by the scale where you must divide. A scale is the size of a step: x /"
            " scale says how many steps it is to x.",
            suspects=(_Quantize(first="multiply"),),
        ),
        Known(
            "not-multiplied",
            "`dequantize` gives something else than q · scale. A scale is the size of a step, and q"
            " counts steps.",
            suspects=(
                _Back("divide"),
                _Back("no scale"),
                _Back("unsigned"),
                _Back("rounded"),
                _Back("bfloat16"),
            ),
            answers=r"""
# %% divides
@@
-    return q.float() * scale
+    return q.float() / scale
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% float() of a float32 is no copy
@@
-    steps = torch.where(scale == 0, 0.0, x.float() / scale)
+    steps = x.float().div_(scale).masked_fill(scale == 0, 0.0)
# %% abs_ of it
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    return x.float().abs_().amax(dims, keepdim=True) / 127
""",
        ),
    ),
    right=r"""
# %% without where
@@
-    steps = torch.where(scale == 0, 0.0, x.float() / scale)
-    return steps.round().clamp(-127, 127).to(torch.int8)
+    steps = (x.float() / scale).masked_fill(scale == 0, 0)
+    return steps.clamp(-127, 127).round().to(torch.int8)
# %% the reciprocal
@@
-    return x.float().abs().amax(dims, keepdim=True) / 127
+    x = x.float()
+    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True)) * (1 / 127)
""",
)
