"""14.2: scales per tensor, channel and block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch14_quantization.common import (
    INT8_MAX,
    Rounding,
    suspects_of,
)
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    import torch

Block = tuple[int, int]


def _starts(length: int, size: int) -> list[int]:
    return list(range(0, length, size))


def _whole_only(length: int, size: int) -> list[int]:
    return list(range(0, length - size + 1, size))


@dataclass(frozen=True)
class _Scales:
    """The scale of each block. starts: where blocks begin along a dimension."""

    top: Callable[[torch.Tensor], torch.Tensor] = lambda part: part.abs().amax()
    divisor: float = INT8_MAX
    starts: Callable[[int, int], list[int]] = _starts
    #: What the block is taken to be: (block, shape) -> block.
    block: Callable[[Block, Block], Block] = lambda block, shape: block
    #: Whether a last block that is not whole is a part of the one before.
    merges: bool = False

    def __call__(self, weight: torch.Tensor, block: Block) -> torch.Tensor:
        import torch

        shape = tuple(weight.shape)
        rows, columns = self.block(block, shape)
        if self.merges:
            rows, columns = min(rows, shape[0]), min(columns, shape[1])
        begins = [self.starts(n, size) for n, size in zip(shape, (rows, columns), strict=True)]
        if self.merges:
            begins = [
                b[:-1] if n % size else b
                for b, n, size in zip(begins, shape, (rows, columns), strict=True)
            ]
        scales = torch.empty(len(begins[0]), len(begins[1]))
        for i, r in enumerate(begins[0]):
            for j, c in enumerate(begins[1]):
                last = (
                    self.merges and (i + 1 == len(begins[0])),
                    self.merges and (j + 1 == len(begins[1])),
                )
                part = weight[
                    r : None if last[0] else r + rows, c : None if last[1] else c + columns
                ]
                scales[i, j] = self.top(part) / self.divisor
        return scales


def _chunks(length: int, size: int) -> list[int]:
    """As `torch.chunk`: as many blocks as there are, of equal sizes."""
    return list(range(0, length, math.ceil(length / math.ceil(length / size))))


class _EqualChunks(_Scales):
    """Blocks of equal sizes, none larger than asked for."""

    def __call__(self, weight: torch.Tensor, block: Block) -> torch.Tensor:
        rows, columns = (
            math.ceil(n / math.ceil(n / size)) for n, size in zip(weight.shape, block, strict=True)
        )
        return _Scales()(weight, (rows, columns))


@dataclass(frozen=True)
class _Error:
    """What is lost by rounding to the blocks' scales."""

    measure: str = "root of the ratio"
    round: Rounding = lambda steps: steps.round()
    #: How the scales become one per weight.
    spread: str = "repeated"
    zeros: bool = True
    guard: float = 0.0
    adds: bool = False
    back: bool = True

    def __call__(self, weight: torch.Tensor, block: Block) -> float:
        import torch

        scales = self._each(weight, block)
        safe = torch.where(scales > 0, scales, 1.0) if self.zeros else scales
        if self.guard:
            safe = scales + self.guard if self.adds else scales.clamp(min=self.guard)
        steps = self.round(weight / safe)
        restored = steps * scales if self.back else steps
        lost, whole = restored - weight, weight
        if self.zeros and not whole.any():
            return 0.0
        return {
            "root of the ratio": lambda: lost.norm() / whole.norm(),
            "ratio": lambda: lost.square().sum() / whole.square().sum(),
            "root": lambda: lost.norm(),
            "root of the mean": lambda: lost.square().mean().sqrt(),
            "mean square": lambda: lost.square().mean(),
            "magnitudes": lambda: lost.abs().sum() / whole.abs().sum(),
            "mean": lambda: lost.abs().mean(),
            "largest": lambda: lost.abs().amax(),
            "largest ratio": lambda: lost.abs().amax() / whole.abs().amax(),
            "each": lambda: (lost / whole).square().mean().sqrt(),
            "each, magnitudes": lambda: (lost / whole).abs().mean(),
            "of the restored": lambda: lost.norm() / restored.norm(),
        }[self.measure]().item()

    def _each(self, weight: torch.Tensor, block: Block) -> torch.Tensor:
        scales = _Scales()(weight, block)
        for dim, size in enumerate(block):
            if self.spread == "repeated":
                scales = scales.repeat_interleave(min(size, weight.shape[dim]), dim)
            else:
                times = -(-weight.shape[dim] // scales.shape[dim])
                if self.spread == "tiled":
                    scales = scales.repeat((times, 1) if dim == 0 else (1, times))
                else:
                    scales = scales.repeat_interleave(times, dim)
            scales = scales.narrow(dim, 0, weight.shape[dim])
        return scales


@dataclass(frozen=True)
class _Cheapest:
    """The block with the fewest bytes that meets the bound."""

    weight_bytes: float = 1
    scale_bytes: int = 4
    #: How many blocks there are along a dimension.
    count: Callable[[int, int], int] = lambda length, size: -(-length // size)
    error: Callable[[torch.Tensor, Block], float] = _Error()
    meets: Callable[[float, float], bool] = lambda error, bound: error <= bound
    #: The smallest of these wins: (place in the list, bytes, error, block).
    order: Callable[[int, float, float, Block], tuple] = lambda i, size, error, block: (size, i)

    def __call__(
        self, weight: torch.Tensor, blocks: list[Block], bound: float
    ) -> tuple[Block, int] | None:
        found = []
        for i, block in enumerate(blocks):
            counts = [self.count(n, b) for n, b in zip(weight.shape, block, strict=True)]
            size = int(self.weight_bytes * weight.numel() + self.scale_bytes * math.prod(counts))
            error = self.error(weight, block)
            if self.meets(error, bound):
                found.append((self.order(i, size, error, block), (block, size)))
        return min(found)[1] if found else None


# --- the check ------------------------------------------------------------------------------------


def _weight(n: int, k: int, seed: int, *, loud: str = "") -> torch.Tensor:
    """A weight; loud: "row", "column", "one" or "negative" for what is far out."""
    import torch

    weight = torch.randn(n, k, generator=seeded(seed))
    if loud == "row":
        weight[n // 2] *= 30
    elif loud == "column":
        weight[:, k // 3] *= 30
    elif loud:
        weight[n // 3, k // 2] = -60.0 if loud == "negative" else 60.0
    return weight


def _cases() -> list[tuple[torch.Tensor, Block]]:
    import torch

    holes = _weight(9, 12, 21)
    holes[:4, 8:] = 0.0
    holes[8] = 0.0
    return [
        (torch.tensor([[2.0]]), (1, 1)),
        (torch.tensor([[1.0, -3.0]]), (1, 1)),
        (_weight(4, 6, 1), (4, 6)),
        (_weight(4, 6, 2), (1, 6)),
        (_weight(4, 6, 3), (4, 1)),
        (_weight(6, 6, 4), (2, 3)),
        (_weight(6, 6, 5, loud="row"), (3, 2)),
        (_weight(5, 7, 6), (2, 3)),
        (_weight(7, 5, 7, loud="negative"), (4, 4)),
        (_weight(5, 10, 8), (1, 4)),
        (_weight(10, 5, 9, loud="column"), (4, 1)),
        (_weight(3, 4, 10), (8, 100)),
        (_weight(3, 40, 11), (8, 16)),
        (-_weight(4, 4, 12).abs() - 1, (2, 2)),
        (holes, (4, 4)),
        (torch.zeros(3, 5), (2, 2)),
        (_weight(140, 300, 13, loud="one"), (128, 128)),
        (_weight(129, 256, 14, loud="column"), (128, 128)),
        (_weight(64, 130, 15, loud="row") * 1e-3, (1, 130)),
        (_weight(4, 6, 16) * 1e-9, (2, 4)),
    ]


def _choices() -> list[tuple[torch.Tensor, list[Block], float]]:
    import torch

    plain, one = _weight(130, 130, 31), _weight(130, 130, 32, loud="one")
    row, column = _weight(64, 96, 33, loud="row"), _weight(64, 96, 34, loud="column")
    exact = torch.randint(-127, 128, (16, 16), generator=seeded(35)).float() / 32
    exact[::4, ::4] = 127 / 32
    usual = [(130, 130), (1, 130), (128, 128)]
    return [
        (torch.tensor([[1.0, 0.4]]), [(1, 1), (1, 2)], 0.5),
        (plain, usual, 0.02),
        (plain, usual[::-1], 0.02),
        (one, usual, 0.02),
        (one, usual, 0.03),
        (one, usual, 0.001),
        (one, usual, 0.012),
        (one, [], 1.0),
        (plain, [(128, 128), (130, 65), (65, 65)], 0.02),
        (row, [(64, 96), (1, 96), (64, 1), (16, 16)], 0.012),
        (column, [(64, 96), (1, 96), (64, 1), (16, 16)], 0.012),
        (column, [(1, 96), (96, 1), (1, 8), (8, 8)], 0.03),
        (exact, [(16, 16), (4, 4), (1, 4)], 0.0),
        (_weight(64, 64, 36), [(64, 32), (32, 64), (64, 16)], 0.02),
        (_weight(64, 64, 36), [(32, 64), (64, 32), (64, 16)], 0.02),
        (_weight(30, 50, 37), [(100, 100), (30, 25)], 0.02),
        (torch.zeros(4, 4), [(1, 1), (4, 4)], 0.0),
    ]


def check_outlier(scales: Callable, error: Callable, cheapest: Callable) -> str:
    cut = diagnose(scales, _cases(), _Scales(), suspects_of(EXERCISE, _Scales), rtol=1e-6, atol=0.0)
    diagnose(error, _cases(), _Error(), suspects_of(EXERCISE, _Error), rtol=2e-4, atol=1e-7)
    chosen = diagnose(cheapest, _choices(), _Cheapest(), suspects_of(EXERCISE, _Cheapest))
    return f"{cut} weights were cut into blocks, and {chosen} times the cheapest was found"


_SMALL = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)
_TRANSPOSED = _Scales(block=lambda block, shape: (block[1], block[0]))

EXERCISE = Exercise(
    id="14.2",
    title="Who pays for the outlier",
    check=check_outlier,
    mistakes=(
        Known(
            "signed-maximum",
            "A scale of yours looks at the largest number, and the largest magnitude is that of a"
            " negative one. Take abs() first.",
            suspects=(
                _Scales(top=lambda part: part.amax()),
                _Scales(top=lambda part: part.amax().abs()),
                _Scales(top=lambda part: part.amin().abs()),
            ),
            answers=r"""
# %% no abs
@@
-    tops = [[part.abs().amax() for part in strip] for strip in parts]
+    tops = [[part.amax() for part in strip] for strip in parts]
""",
        ),
        Known(
            "other-top",
            "The largest magnitude of a block becomes another number of steps than 127. A scale is"
            " largest magnitude / 127: not / 128, not of the spread, not of the mean.",
            suspects=(
                *(_Scales(divisor=d) for d in (1.0, 127.5, 128.0, 255.0, 256.0)),
                *(_Scales(lambda part: part.amax() - part.amin(), d) for d in (254.0, 255.0)),
                _Scales(top=lambda part: part.abs().mean()),
            ),
            answers=r"""
# %% / 128
@@
-    return torch.stack([torch.stack(strip) for strip in tops]) / 127
+    return torch.stack([torch.stack(strip) for strip in tops]) / 128
# %% the mean
@@
-    tops = [[part.abs().amax() for part in strip] for strip in parts]
+    tops = [[part.abs().mean() for part in strip] for strip in parts]
""",
        ),
        Known(
            "rows-and-columns",
            "Rows and columns are mixed up: a block of (rows, columns) takes `rows` of the N rows,"
            " and (1, K) is a scale for each row.",
            suspects=(_TRANSPOSED,),
        ),
        Known(
            "ragged-block-lost",
            "The last block of a row or a column is missing where it is not whole, or a part of"
            " the one before. It is a block like the others, with a scale of its own, made of what"
            " is there: ⌈K / columns⌉ rounds up.",
            hint=1,
            suspects=(
                _Scales(starts=_whole_only),
                replace(_TRANSPOSED, starts=_whole_only),
                _Scales(merges=True),
            ),
            answers=r"""
# %% whole blocks only
def block_scales(weight: Tensor, block: tuple[int, int]) -> Tensor:
    n, k = weight.shape[0] // block[0], weight.shape[1] // block[1]
    whole = weight[: n * block[0], : k * block[1]]
    parts = whole.reshape(n, block[0], k, block[1])
    if not parts.numel():
        return weight.new_zeros(n, k)
    return parts.abs().amax((1, 3)) / 127


def relative_error(weight: Tensor, block: tuple[int, int]) -> float:
    return 0.0


def cheapest(
    weight: Tensor, blocks: list[tuple[int, int]], bound: float
) -> tuple[tuple[int, int], int] | None:
    return None
""",
        ),
        Known(
            "equal-chunks",
            "Your blocks are of equal sizes where the last one is not whole: `chunk` divides the"
            " weight evenly. Blocks have the size that is asked for, and only the last is smaller:"
            " `split` does that.",
            hint=1,
            suspects=(_EqualChunks(),),
            answers=r"""
# %% chunk for split
@@
-    parts = [strip.split(block[1], dim=1) for strip in weight.split(block[0])]
+    n, k = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
+    parts = [strip.chunk(k, dim=1) for strip in weight.chunk(n)]
""",
        ),
        Known(
            "one-scale",
            "Your scales are those of other blocks than asked for: of the whole weight, or of whole"
            " rows.",
            suspects=(
                _Scales(block=lambda block, shape: shape),
                _Scales(block=lambda block, shape: (1, shape[1])),
                _Scales(block=lambda block, shape: (block[0], shape[1])),
                _Scales(block=lambda block, shape: (shape[0], block[1])),
            ),
        ),
        Known(
            "other-measure",
            "The error is another measure than asked for: √(Σ (restored − weight)² / Σ weight²)."
            " Sums over the whole weight, a ratio, then the root; not of each block or row by"
            " itself, and not per weight.",
            suspects=tuple(
                _Error(measure=measure)
                for measure in (
                    *("ratio", "root", "root of the mean", "mean square", "magnitudes", "mean"),
                    *("largest", "largest ratio", "each", "each, magnitudes", "of the restored"),
                )
            ),
            answers=r"""
# %% without the root
@@
-    return (lost / whole).sqrt().item() if whole > 0 else 0.0
+    return (lost / whole).item() if whole > 0 else 0.0
# %% not as a share
@@
-    return (lost / whole).sqrt().item() if whole > 0 else 0.0
+    return (lost / weight.numel()).sqrt().item() if whole > 0 else 0.0
""",
        ),
        Known(
            "not-rounded-to-nearest",
            "A weight is not rounded to the nearest step: it is cut off.",
            suspects=(
                _Error(round=lambda steps: steps.trunc()),
                _Error(round=lambda steps: steps.floor()),
            ),
            answers=r"""
# %% conversion cuts off
@@
-    lost = (steps.round() * scales - weight).square().sum()
+    lost = (steps.to(torch.int8) * scales - weight).square().sum()
""",
        ),
        Known(
            "other-blocks-scale",
            "A weight was rounded with the scale of another block. Each scale stands for `rows` ×"
            " `columns` weights that lie side by side: repeat_interleave, by the block's size, not"
            " by how often it fits.",
            hint=2,
            suspects=(_Error(spread="tiled"), _Error(spread="evenly")),
            answers=r"""
# %% repeat for repeat_interleave
@@
-        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
+        times = -(-weight.shape[dim] // scales.shape[dim])
+        scales = scales.repeat((times, 1) if dim == 0 else (1, times))
+        scales = scales.narrow(dim, 0, weight.shape[dim])
# %% as often as it fits
@@
-        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
+        times = -(-weight.shape[dim] // scales.shape[dim])
+        scales = scales.repeat_interleave(times, dim)
+        scales = scales.narrow(dim, 0, weight.shape[dim])
""",
        ),
        Known(
            "zeros-are-nan",
            "A block of zeros makes the error nan: its scale is 0, and 0 / 0 is nan. Nothing is"
            " lost there.",
            hint=2,
            suspects=(_Error(zeros=False),),
            answers=r"""
# %% divides by 0
@@
-    steps = weight / torch.where(scales > 0, scales, 1.0)
+    steps = weight / scales
@@
-    return (lost / whole).sqrt().item() if whole > 0 else 0.0
+    return (lost / whole).sqrt().item()
""",
        ),
        Known(
            "guard-too-large",
            "What keeps you from dividing by 0 changes small weights, too: added to the scale, or"
            " as a least value. Divide by another number only where the scale is 0.",
            hint=2,
            suspects=(
                *(_Scales(top=lambda part, n=n: part.abs().amax().clamp(min=n)) for n in _SMALL),
                *(
                    _Scales(top=lambda part, n=n: part.abs().amax().clamp(min=n * INT8_MAX))
                    for n in _SMALL
                ),
                *(_Error(guard=n) for n in _SMALL),
                *(_Error(guard=n, adds=True) for n in _SMALL),
            ),
            answers=r"""
# %% a little more
@@
-    steps = weight / torch.where(scales > 0, scales, 1.0)
+    steps = weight / (scales + 1e-8)
# %% no scale is smaller
@@
-    return torch.stack([torch.stack(strip) for strip in tops]) / 127
+    return (torch.stack([torch.stack(strip) for strip in tops]) / 127).clamp(min=1e-8)
""",
        ),
        Known(
            "not-restored",
            "You compare steps with weights. Multiply by the scale again before you subtract.",
            suspects=(_Error(back=False),),
        ),
        Known(
            "other-bytes",
            "The number of bytes is another one: a byte per weight, and four for each scale, also"
            " for those of smaller last blocks.",
            hint=3,
            suspects=(
                *(_Cheapest(scale_bytes=n) for n in (0, 1, 2, 8)),
                *(_Cheapest(weight_bytes=n) for n in (0, 0.125, 2, 4)),
                _Cheapest(count=lambda length, size: length // size),
                _Cheapest(count=lambda length, size: max(1, length // size)),
            ),
            answers=r"""
# %% scales are free
@@
-    costs = [weight.numel() + 4 * block_scales(weight, block).numel() for block in good]
+    costs = [weight.numel() for block in good]
# %% a scale is a byte
@@
-    costs = [weight.numel() + 4 * block_scales(weight, block).numel() for block in good]
+    costs = [weight.numel() + block_scales(weight, block).numel() for block in good]
""",
        ),
        Known(
            "other-choice",
            "You chose another block. Of those that are good enough, the one with the fewest bytes:"
            " not the most exact one, not the first or the last, and not the largest block, which"
            " may need more scales.",
            hint=3,
            suspects=(
                _Cheapest(order=lambda i, size, error, block: (error, i)),
                _Cheapest(order=lambda i, size, error, block: (error, size, i)),
                _Cheapest(order=lambda i, size, error, block: (error, block)),
                _Cheapest(order=lambda i, size, error, block: (i,)),
                _Cheapest(order=lambda i, size, error, block: (-i,)),
                _Cheapest(order=lambda i, size, error, block: (-size, i)),
                _Cheapest(order=lambda i, size, error, block: (-error, i)),
                _Cheapest(order=lambda i, size, error, block: (-block[0] * block[1], i)),
            ),
            answers=r"""
# %% the most exact one
@@
-    return min(zip(good, costs), key=lambda pair: pair[1], default=None)
+    exact = [(relative_error(weight, block), block, cost) for block, cost in zip(good, costs)]
+    return min(exact)[1:] if exact else None
# %% the first that will do
@@
-    return min(zip(good, costs), key=lambda pair: pair[1], default=None)
+    return next(zip(good, costs), None)
# %% the largest block
@@
-    return min(zip(good, costs), key=lambda pair: pair[1], default=None)
+    return max(zip(good, costs), key=lambda pair: pair[0][0] * pair[0][1], default=None)
""",
        ),
        Known(
            "ties",
            "Of several blocks with equally few bytes you took another one than the first in the"
            " list.",
            hint=3,
            suspects=(
                _Cheapest(order=lambda i, size, error, block: (size, -i)),
                _Cheapest(order=lambda i, size, error, block: (size, error)),
                _Cheapest(order=lambda i, size, error, block: (size, block)),
                _Cheapest(order=lambda i, size, error, block: (size, -block[0] * block[1], block)),
            ),
            answers=r"""
# %% the smallest pair
@@
-    return min(zip(good, costs), key=lambda pair: pair[1], default=None)
+    found = min(((cost, block) for block, cost in zip(good, costs)), default=None)
+    return found and found[::-1]
""",
        ),
        Known(
            "bound-excluded",
            "A block whose error is exactly the bound is good enough: at most.",
            suspects=(_Cheapest(meets=lambda error, bound: error < bound),),
            answers=r"""
# %% less than
@@
-    good = [block for block in blocks if relative_error(weight, block) <= bound]
+    good = [block for block in blocks if relative_error(weight, block) < bound]
""",
        ),
        Known(
            "bound-ignored",
            "You chose a block that is not good enough. Where none is, the result is None; and an"
            " error is compared as it is, not rounded.",
            suspects=(
                _Cheapest(meets=lambda error, bound: True),
                _Cheapest(meets=lambda error, bound: error >= bound),
                *(
                    _Cheapest(meets=lambda error, bound, n=n: round(error, n) <= bound)
                    for n in (1, 2, 3)
                ),
            ),
            answers=r"""
# %% of two digits
@@
-    good = [block for block in blocks if relative_error(weight, block) <= bound]
+    good = [block for block in blocks if round(relative_error(weight, block), 2) <= bound]
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% sorts the caller's list
@@
-    good = [block for block in blocks if relative_error(weight, block) <= bound]
+    order = list(blocks)
+    blocks.sort()
+    good = [block for block in order if relative_error(weight, block) <= bound]
""",
        ),
    ),
    right=r"""
# %% padded to whole blocks
@@
-    parts = [strip.split(block[1], dim=1) for strip in weight.split(block[0])]
-    tops = [[part.abs().amax() for part in strip] for strip in parts]
-    return torch.stack([torch.stack(strip) for strip in tops]) / 127
+    n, k = weight.shape
+    (rows, columns) = block
+    padded = torch.nn.functional.pad(weight.abs(), (0, -k % columns, 0, -n % rows))
+    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3)) / 127
# %% an error that clips, and in double precision
@@
-    lost = (steps.round() * scales - weight).square().sum()
+    q = steps.round().clamp(-127, 127).to(torch.int8)
+    lost = (q.double() * scales - weight).square().sum()
""",
)
