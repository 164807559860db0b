"""14.6: debug this: a quantized layer that is wrong only sometimes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch14_quantization.common import (
    INT8_MAX,
    clear_of_ties,
    suspects_of,
    wrapped,
)
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_refusal, seeded

if TYPE_CHECKING:
    import torch

#: int8 weights [N, K], and their scales [N, ⌈K / block⌉].
Stored = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class _Quantize:
    #: "magnitude", "signed", or the magnitude of the largest number.
    top: str = "magnitude"
    #: How a row is cut: "split", "chunk", "whole" blocks only for the scales, or not at all.
    cut: str = "split"
    #: The smallest scale that is divided by; 0 where there is no limit; None: 0 / 0.
    floor: float | None = 0.0
    divisor: float = INT8_MAX
    rounds: bool = True
    clips: bool = False
    #: The stored scale of zeros.
    zeros: float = 0.0
    #: Whether the floor is the stored scale, too.
    keeps: bool = True
    #: Whether a negative "scale" is replaced before the division, as 0 is.
    positive: bool = False
    #: What each scale is shared by: "rows" of a block, or all of its rows.
    shared: str = "row"

    def __call__(self, weight: torch.Tensor, block: int) -> Stored:
        import torch

        count = math.ceil(weight.shape[1] / block)
        parts = {
            "split": lambda: weight.split(block, 1),
            "chunk": lambda: weight.chunk(count, 1),
            "one": lambda: [weight],
        }[self.cut]()
        stored, scales = [], []
        for part in parts:
            top = (part.abs() if self.top == "magnitude" else part).amax(1, keepdim=True)
            scale = (top if self.top == "signed" else top.abs()) / self.divisor
            if self.shared == "all":
                scale = scale.amax(0, keepdim=True).expand(len(weight), 1)
            if self.floor is None:
                safe = scale
            elif self.floor:
                safe = scale.clamp(min=self.floor)
            else:
                safe = torch.where((scale <= 0) if self.positive else (scale == 0), 1.0, scale)
            steps = (part / safe).nan_to_num(0.0, posinf=0.0, neginf=0.0)
            steps = steps.round() if self.rounds else steps.trunc()
            stored.append(wrapped(steps.clamp(-127, 127) if self.clips else steps))
            scale = scale.masked_fill(scale == 0, self.zeros)
            scales.append(safe if self.floor and self.keeps else scale)
        return torch.cat(stored, 1), torch.cat(scales, 1)


@dataclass(frozen=True)
class _Restore:
    spread: str = "each"

    def __call__(self, q: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
        import torch

        width, count = q.shape[1], scale.shape[1]
        columns = torch.arange(width)
        which = {
            "each": columns // block,
            "tiled": columns % count,
            "evenly": (columns // math.ceil(width / count)).clamp(max=count - 1),
            "first": columns * 0,
        }.get(self.spread, columns // block)
        each = scale[:, which]
        if self.spread == "none":
            return q.float()
        return q.float() / each if self.spread == "divided" else q.float() * each


@dataclass(frozen=True)
class _Merge:
    scales: str = "kept"

    def __call__(self, parts: list[Stored]) -> Stored:
        import torch

        order = parts[::-1] if self.scales == "all reversed" else parts
        weight = torch.cat([q for q, _ in order])
        scale = torch.cat([s for _, s in order])
        if self.scales == "reversed":
            scale = torch.cat([s for _, s in parts[::-1]])
        elif self.scales == "largest":
            scale = scale.amax(0, keepdim=True).expand(scale.shape).clone()
        elif self.scales == "largest of all":
            scale = torch.full_like(scale, scale.amax())
        elif self.scales == "mean":
            scale = scale.mean(0, keepdim=True).expand(scale.shape).clone()
        elif self.scales == "first":
            first = parts[0][1]
            scale = first.repeat(-(-len(weight) // len(first)), 1)[: len(weight)]
        elif self.scales == "largest of the first":
            scale = parts[0][1].amax(0, keepdim=True).expand(scale.shape).clone()
        elif self.scales == "largest of each":
            tops = [s.amax(0, keepdim=True).expand(s.shape) for _, s in parts]
            scale = torch.cat(tops)
        elif self.scales == "requantized":
            top = scale.amax(0, keepdim=True).expand(scale.shape).clone()
            block = math.ceil(weight.shape[1] / scale.shape[1])
            wide = _Restore()(weight, scale, block) / _Restore()(
                torch.ones_like(weight), top, block
            )
            weight, scale = wrapped(wide.nan_to_num(0.0).round()), top
        return weight, scale


@dataclass(frozen=True)
class _Columns:
    """A rank's columns, refusals aside."""

    scales: str = "its own"
    columns: str = "side by side"

    def __call__(
        self, q: torch.Tensor, scale: torch.Tensor, block: int, rank: int, size: int
    ) -> Stored:
        width = q.shape[1] // size
        begin, end = rank * width, (rank + 1) * width
        part = q[:, rank::size] if self.columns == "interleaved" else q[:, begin:end]
        if self.columns == "rows":
            n = len(q) // size
            return q[rank * n : rank * n + n], scale[rank * n : rank * n + n]
        floor = scale.shape[1] // size
        up = -(-scale.shape[1] // size)
        return part, {
            "its own": scale[:, begin // block : -(-end // block)],
            "rounded down": scale[:, rank * floor : (rank + 1) * floor],
            "whole only": scale[:, begin // block : end // block],
            "rounded up": scale[:, rank * up : (rank + 1) * up],
            "all": scale,
            "first": scale[:, : end // block - begin // block],
            "first, rounded up": scale[:, : -(-width // block)],
            "one more": scale[:, begin // block : end // block + 1],
        }[self.scales]


# --- the check ------------------------------------------------------------------------------------


def _weight(n: int, k: int, block: int, seed: int, size: float = 1.0) -> torch.Tensor:
    """A weight of which no number lies between two steps; its largest ones have both signs."""
    import torch

    weight = torch.randn(n, k, generator=seeded(seed)) * size
    for part in weight.split(block, 1):
        part.copy_(clear_of_ties(part, part.abs().amax(1, keepdim=True) / INT8_MAX))
    return weight


def _weights() -> list[tuple[torch.Tensor, int]]:
    import torch

    holes, rising = _weight(4, 12, 4, 20), _weight(3, 20, 8, 21)
    holes[1, 4:8] = 0.0
    holes[2] = 0.0
    for i, part in enumerate(rising.split(8, 1)):
        part *= 2.0 ** (4 * i)
    return [
        (torch.tensor([[1.0]]), 1),
        (torch.tensor([[1.0, 0.25]]), 4),
        (_weight(2, 4, 4, 1), 4),
        (_weight(2, 8, 4, 2), 4),
        (_weight(3, 6, 4, 3), 4),
        (_weight(3, 300, 128, 4), 128),
        (_weight(3, 9, 4, 5), 4),
        (_weight(2, 10, 16, 6), 16),
        (-_weight(2, 6, 3, 7).abs(), 3),
        (_weight(2, 6, 3, 8).abs(), 3),
        (_weight(3, 6, 3, 9, size=1e-3), 3),
        (_weight(3, 6, 3, 10, size=1e-9), 3),
        (holes, 4),
        (rising, 8),
        (_weight(3, 8, 4, 22) * torch.tensor([[1.0], [1e-6], [1e-3]]), 4),
        (torch.zeros(2, 5), 2),
    ]


def _stored(n: int, k: int, block: int, seed: int) -> Stored:
    import torch

    random = seeded(seed)
    q = torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)
    return q, torch.rand(n, -(-k // block), generator=random) + 0.1


def _layers() -> list[tuple]:
    sizes = [(1, 1, 1), (2, 4, 4), (2, 8, 4), (3, 9, 4), (4, 4, 1), (3, 300, 128), (2, 5, 16)]
    return [(*_stored(n, k, block, 40 + i), block) for i, (n, k, block) in enumerate(sizes)]


def _merges() -> list[tuple[list[Stored]]]:
    rows = [(1,), (2, 2), (4, 2, 2), (3, 1, 2), (1, 5), (2, 1, 3, 2, 1)]
    return [
        ([_stored(n, 10, 4, 60 + 10 * i + j) for j, n in enumerate(part)],)
        for i, part in enumerate(rows)
    ]


#: N, K, block, rank, size.
_RANKS = (
    *((2, 8, 4, 0, 1), (2, 8, 4, 0, 2), (2, 8, 4, 1, 2), (3, 300, 128, 0, 1), (4, 384, 128, 1, 3)),
    *(
        (4, 384, 128, 2, 3),
        (2, 512, 128, 1, 2),
        (6, 12, 1, 2, 4),
        (4, 9, 16, 0, 1),
        (4, 8, 2, 3, 4),
    ),
)
_REFUSED = (
    *((2, 384, 128, 0, 2), (2, 384, 128, 1, 2), (2, 10, 4, 1, 2), (2, 8, 4, 3, 4), (2, 9, 1, 0, 2)),
    *((2, 9, 4, 0, 2), (2, 6, 4, 0, 3), (2, 10, 16, 0, 2), (4, 260, 64, 1, 2), (2, 7, 1, 2, 3)),
    # As many blocks as ranks, or a multiple of that.
    *((2, 6, 4, 0, 2), (2, 14, 4, 1, 2), (2, 7, 4, 0, 2)),
)


def _check_columns(columns_of: Callable) -> int:
    cases = [(*_stored(n, k, block, k), block, rank, size) for n, k, block, rank, size in _RANKS]
    number = diagnose(columns_of, cases, _Columns(), suspects_of(EXERCISE, _Columns))
    for n, k, block, rank, size in _REFUSED:
        q, scale = _stored(n, k, block, k)

        def call(args: tuple = (q, scale, block, rank, size)) -> Any:
            return columns_of(*args)

        told = f"{k} columns in blocks of {block} on {size} ranks"
        expect_refusal(call, told, ValueError, "block-cut-in-two")
    return number


def check_debug(
    quantize: Callable, restore: Callable, merge: Callable, columns_of: Callable
) -> str:
    exact = {"rtol": 1e-6, "atol": 0.0}
    number = diagnose(
        *(quantize, _weights(), _Quantize(), suspects_of(EXERCISE, _Quantize)),
        twins=False,
        **exact,
    )
    number += diagnose(restore, _layers(), _Restore(), suspects_of(EXERCISE, _Restore), **exact)
    number += diagnose(merge, _merges(), _Merge(), suspects_of(EXERCISE, _Merge), **exact)
    number += _check_columns(columns_of)
    return f"{number} layers are right, and {len(_REFUSED)} that cannot be split are refused"


_FLOORS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12, 1e-20)


def _left(tops: tuple[str, ...], cuts: tuple[str, ...]) -> tuple[_Quantize, ...]:
    """All that have a slip, alone or with those that are named after it."""
    floors = ((0.0, False), (0.0, True), (None, False), (1e-3, False), (1e-8, False))
    both = (True, False)
    return tuple(
        _Quantize(top, cut, floor, keeps=keeps, positive=positive, clips=clips)
        for top, cut, (floor, positive), keeps, clips in itertools.product(
            tops, cuts, floors, both, both
        )
        if floor or keeps
    )


EXERCISE = Exercise(
    id="14.6",
    title="Debug this: right for most layers",
    check=check_debug,
    mistakes=(
        Known(
            "signed-maximum",
            "The scale is made of the largest number, not of the largest magnitude: a larger"
            " negative one has more than 127 steps, and an int8 begins again at the other end.",
            hint=1,
            suspects=_left(("signed", "magnitude of the largest"), ("split", "chunk")),
            answers=r"""
# %% as it was
@@
-        scale = part.abs().amax(1, keepdim=True) / 127
+        scale = part.amax(1, keepdim=True) / 127
# %% a clip in place of it
@@
-        scale = part.abs().amax(1, keepdim=True) / 127
-        safe = torch.where(scale > 0, scale, 1.0)
-        stored.append((part / safe).round().to(torch.int8))
+        scale = part.amax(1, keepdim=True) / 127
+        safe = torch.where(scale > 0, scale, 1.0)
+        stored.append((part / safe).round().clamp(-127, 127).to(torch.int8))
# %% the magnitude of the largest number
@@
-        scale = part.abs().amax(1, keepdim=True) / 127
+        scale = part.amax(1, keepdim=True).abs() / 127
""",
        ),
        Known(
            "equal-chunks",
            "Where the last block is not whole, your blocks have other borders: `chunk` cuts a row"
            " into equal parts (of 100, for 300 columns in blocks of 128). A block has `block`"
            " columns, and the last one is shorter.",
            hint=2,
            suspects=_left(("magnitude",), ("chunk",)),
            answers=r"""
# %% as it was
@@
-    for part in weight.split(block, dim=1):
+    for part in weight.chunk(math.ceil(weight.shape[1] / block), dim=1):
""",
        ),
        Known(
            "scale-has-a-floor",
            "Blocks of small weights get a scale that is too large for them, down to nothing but"
            " zeros. What is guarded is the division by 0, and only there another divisor is"
            " needed; the stored scale of zeros is 0.",
            hint=3,
            suspects=tuple(
                _Quantize(floor=floor, keeps=keeps) for floor in _FLOORS for keeps in (True, False)
            ),
            answers=r"""
# %% a smaller floor
@@
-        safe = torch.where(scale > 0, scale, 1.0)
-        stored.append((part / safe).round().to(torch.int8))
+        scale = scale.clamp(min=1e-8)
+        stored.append((part / scale).round().to(torch.int8))
# %% divides by a floor
@@
-        safe = torch.where(scale > 0, scale, 1.0)
+        safe = scale.clamp(min=1e-5)
""",
        ),
        Known(
            "one-stored-for-zeros",
            "The scale of a block of zeros is 0, and nothing else: the largest magnitude / 127."
            " Divide by 1 there, and store 0.",
            hint=3,
            suspects=(_Quantize(zeros=1.0), _Quantize(zeros=math.nan), _Quantize(zeros=1 / 127)),
            answers=r"""
# %% stores what it divides by
@@
-        scales.append(scale)
+        scales.append(safe)
""",
        ),
        Known(
            "scale-shared",
            "Weights share a scale that should not: each row has its own for each of its blocks.",
            suspects=(
                _Quantize(shared="all"),
                _Quantize(cut="one"),
            ),
            answers=r"""
# %% all rows
@@
-        scale = part.abs().amax(1, keepdim=True) / 127
+        scale = (part.abs().amax() / 127).expand(len(part), 1)
""",
        ),
        Known(
            "other-steps",
            "The largest magnitude of a block is 127 steps, and a weight is rounded to the nearest"
            " step: not / 128, and not cut off.",
            suspects=(
                *(_Quantize(divisor=d) for d in (127.5, 128.0, 255.0)),
                _Quantize(rounds=False),
            ),
        ),
        Known(
            "tiled-scales",
            "`restore` multiplies by scales of other blocks: with scales a, b, the columns get a b"
            " a b …, and should get a a … b b …. repeat_interleave is the one that repeats each.",
            hint=4,
            suspects=(_Restore("tiled"),),
            answers=r"""
# %% as it was
@@
-    each = scale.repeat_interleave(block, dim=1)[:, : q.shape[1]]
+    each = scale.repeat(1, block)[:, : q.shape[1]]
""",
        ),
        Known(
            "other-spread",
            "`restore` gives some columns the scale of another block. Column k belongs to block"
            " k // block, also where the last block is not whole.",
            hint=4,
            suspects=(
                _Restore("evenly"),
                _Restore("first"),
                _Restore("none"),
                _Restore("divided"),
            ),
            answers=r"""
# %% as many columns for each
@@
-    each = scale.repeat_interleave(block, dim=1)[:, : q.shape[1]]
+    times = math.ceil(q.shape[1] / scale.shape[1])
+    each = scale.repeat_interleave(times, dim=1)[:, : q.shape[1]]
""",
        ),
        Known(
            "scales-not-kept",
            "A row of the merged layer has another scale than before, and its int8 numbers mean"
            " something else then. Each row keeps its own scales, in the order of the rows.",
            hint=5,
            suspects=tuple(
                _Merge(scales)
                for scales in (
                    *("largest", "largest of all", "largest of each", "mean", "first", "reversed"),
                    "all reversed",
                    "largest of the first",
                )
            ),
            answers=r"""
# %% as it was
@@
-    return torch.cat(weights), torch.cat(scales)
+    top = torch.cat(scales).amax(0, keepdim=True)
+    return torch.cat(weights), top.repeat(sum(map(len, weights)), 1)
# %% one for each part
@@
-    return torch.cat(weights), torch.cat(scales)
+    tops = [scale.amax(0, keepdim=True).expand(scale.shape) for scale in scales]
+    return torch.cat(weights), torch.cat(tops)
""",
        ),
        Known(
            "quantized-again",
            "Your merged layer is quantized a second time, to shared scales: this loses more. A row"
            " keeps its numbers and its scales.",
            hint=5,
            suspects=(_Merge("requantized"),),
            answers=r"""
# %% to one scale per block of columns
@@
-    return torch.cat(weights), torch.cat(scales)
+    weight, scale = torch.cat(weights), torch.cat(scales)
+    top = scale.amax(0, keepdim=True).repeat(len(weight), 1)
+    block = math.ceil(weight.shape[1] / top.shape[1])
+    wide = restore(weight, scale, block)
+    each = restore(torch.ones_like(weight), top, block)
+    return (wide / each).round().to(torch.int8), top
""",
        ),
        Known(
            "other-scales",
            "A rank's scales are not those of its columns: columns begin to end lie in the blocks"
            " begin // block up to end // block.",
            hint=6,
            suspects=tuple(
                _Columns(scales)
                for scales in (
                    "rounded down",
                    "rounded up",
                    "whole only",
                    "first, rounded up",
                    "all",
                    "first",
                    "one more",
                )
            ),
            answers=r"""
# %% the first ones
@@
-    blocks = slice(begin // block, math.ceil((begin + width) / block))
+    blocks = slice(0, math.ceil(width / block))
# %% whole blocks only
@@
-    blocks = slice(begin // block, math.ceil((begin + width) / block))
+    blocks = slice(begin // block, (begin + width) // block)
""",
        ),
        Known(
            "other-columns",
            "A rank has other columns than asked for: rank r has the r-th part of them, side by"
            " side, of all rows.",
            suspects=(_Columns(columns="interleaved"), _Columns(columns="rows")),
            answers=r"""
# %% every second one
@@
-    return q[:, begin : begin + width], scale[:, blocks]
+    return q[:, rank::size], scale[:, blocks]
""",
        ),
        Known(
            "block-cut-in-two",
            "A border between two ranks that lies inside of a block: raise a ValueError.",
            hint=6,
            answers=r"""
# %% as it was
@@
-    if q.shape[1] % size or (size > 1 and q.shape[1] // size % block):
-        raise ValueError(f"{q.shape[1]} columns in blocks of {block}: not for {size}")
+    if q.shape[1] % size:
+        raise ValueError("not divisible")
# %% looks at the blocks alone
@@
-    if q.shape[1] % size or (size > 1 and q.shape[1] // size % block):
-        raise ValueError(f"{q.shape[1]} columns in blocks of {block}: not for {size}")
+    if scale.shape[1] % size:
+        raise ValueError("not divisible")
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% abs in place
@@
-        scale = part.abs().amax(1, keepdim=True) / 127
-        safe = torch.where(scale > 0, scale, 1.0)
-        stored.append((part / safe).round().to(torch.int8))
+        scale = part.abs().amax(1, keepdim=True) / 127
+        part /= torch.where(scale > 0, scale, 1.0)
+        safe = 1
+        stored.append((part / safe).round().to(torch.int8))
""",
        ),
    ),
    right=r"""
# %% by padding, and with other words
def quantize(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    width = weight.shape[1]
    blocks = torch.nn.functional.pad(weight, (0, -width % block)).unflatten(1, (-1, block))
    scale = blocks.abs().amax(2) / 127
    steps = (blocks / scale[..., None]).nan_to_num(0.0).round().clamp(-127, 127)
    return steps.flatten(1)[:, :width].to(torch.int8), scale


def restore(q: Tensor, scale: Tensor, block: int) -> Tensor:
    return q * scale[:, torch.arange(q.shape[1]) // block]


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    q, scale = parts[0]
    for weight, more in parts[1:]:
        q, scale = torch.cat([q, weight]), torch.cat([scale, more])
    return q, scale


def columns_of(
    q: Tensor, scale: Tensor, block: int, rank: int, size: int
) -> tuple[Tensor, Tensor]:
    borders = [r * q.shape[1] / size for r in range(1, size)]
    if any(border % block for border in borders):
        raise ValueError("a block would be cut")
    begin, end = rank * q.shape[1] // size, (rank + 1) * q.shape[1] // size
    return q[:, begin:end].clone(), scale[:, begin // block : -(-end // block)].clone()
""",
)
