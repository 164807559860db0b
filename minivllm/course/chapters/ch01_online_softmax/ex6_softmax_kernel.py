"""01.6: a Triton kernel for rows of any length."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch01_online_softmax.common import INF, Walk, finite, slips
from minivllm.course.grading.accesses import Accesses, accesses
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.guard import BEYOND, guarded
from minivllm.course.grading.isolated import isolated
from minivllm.course.grading.judges import (
    expect,
    expect_inside,
    expect_own_reads,
    expect_triton,
    seeded,
)

if TYPE_CHECKING:
    import torch

#: out, x, block.
Case = tuple["torch.Tensor", "torch.Tensor", int]
_BEYOND = (
    "Where the last tile is not full, tl.store writes over what follows the row, unless it has"
    " mask=inside; and in out, row r begins at out_ptr + r · N."
)


def _drawn(random: torch.Generator) -> Callable[..., Case]:
    """What makes cases: rows with poison between them, and an output in the middle of poison."""
    import torch

    def case(
        rows: int, columns: int, block: int, size: float = 2.0, shift: float = 0.0, pad: int = 0
    ) -> Case:
        x = guarded(rows, columns + pad)[:, :columns]
        x.copy_(torch.randn(rows, columns, generator=random) * size + shift)
        return guarded(rows, columns), x, block

    return case


def _cases() -> list[Case]:
    """Rows that fit into a tile and rows of many tiles; rising, falling, masked, far from 0."""
    import torch

    case = _drawn(seeded(6))
    rising, falling, slow = case(2, 24, 8), case(2, 24, 8), case(1, 300, 4)
    rising[1].copy_(torch.linspace(-3, 3, 24).repeat(2, 1))
    falling[1].copy_(torch.linspace(3, -3, 24).repeat(2, 1))
    slow[1].copy_(torch.linspace(-0.2, 0.2, 300)[None])
    masked, low = case(4, 20, 8, pad=2), case(3, 13, 4)
    masked[1][0, :9], masked[1][1, 8:16], masked[1][2, 1:] = -INF, -INF, -INF
    masked[1][3, :19] = -INF
    # So far from 0, numbers that are not far apart would be rounded.
    low[1].copy_(-20000.0 - 150.0 * (torch.arange(13) * 5 % 13))
    low[1][1, 4:8] = -INF
    low[1][2] = -1e36 * (1 + torch.arange(13) * 5 % 13)
    low[1][0, :4] = -INF
    return [
        case(1, 1, 4),
        case(2, 8, 8),
        case(3, 16, 8),
        case(2, 11, 4),
        case(2, 5, 1),
        case(2, 7, 16, shift=-400.0),
        case(2, 13, 8, size=60),
        case(3, 18, 4, shift=500.0),
        case(3, 10, 4, pad=6),
        case(2, 16, 8, pad=3),
        case(130, 3, 4, pad=1),
        case(1, 1500, 128),
        case(2, 300, 512, pad=5),
        rising,
        falling,
        slow,
        masked,
        low,
    ]


@dataclass
class _Seen:
    """What the launches of a kernel did beside what was asked for.

    outside, read: (the place in words, the case in words), for writes and reads that are not the
    kernel's. passes: the most often that a launch loaded all of x. lanes: the most lanes of one
    load beyond BLOCK.
    """

    written: list[tuple[str, str]] = field(default_factory=list)
    read: list[tuple[str, str]] = field(default_factory=list)
    passes: float = 0.0
    lanes: int = 0


def _launcher(kernel: Any, seen: _Seen) -> Callable:
    """The kernel as a function of a case; notes what it does."""

    def launch(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        rows, columns, stride = len(x), x.shape[1], x.stride(0)
        # The gaps between the rows are watched, too.
        whole = x.as_strided((rows, stride), (stride, 1))
        with accesses(out=out, x=whole) as touched, _loads(whole) as loads:
            kernel[(rows,)](out, x, stride, columns, BLOCK=block)
        sizes = f"N = {columns}, row_stride = {stride}, BLOCK = {block}, {rows} rows"
        _note_places(touched, (rows, columns, stride), sizes, seen)
        seen.passes = max(seen.passes, loads.numbers / x.numel())
        seen.lanes = max(seen.lanes, loads.lanes if loads.lanes > block else 0)

    return launch


def _note_places(touched: Accesses, shape: tuple[int, int, int], sizes: str, seen: _Seen) -> None:
    """Note what was read and written in the gaps between the rows, and outside."""
    rows, columns, stride = shape
    seen.written += [(place, sizes) for place in touched.written_outside[:1]]
    seen.read += [(place, sizes) for place in touched.read_outside[:1]]
    for places, noted in ((touched.read, seen.read), (touched.written, seen.written)):
        if "x" in places and not noted:
            gap = places["x"].reshape(rows, stride)[:, columns:]
            if gap.any():
                row, column = gap.nonzero()[0][0], columns + gap.nonzero()[1][0]
                noted.append((f"column {column} of row {row} of x", sizes))


@dataclass
class _Loads:
    """numbers: how many numbers of x were loaded in all. lanes: of the widest load."""

    numbers: int = 0
    lanes: int = 0


@contextlib.contextmanager
def _loads(x: torch.Tensor) -> Iterator[_Loads]:
    """Count the loads from x in an `accesses` block; they stay 0 where no interpreter runs."""
    import numpy as np

    found = _Loads()
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield found
        return
    from triton.runtime.interpreter import interpreter_builder

    original = interpreter_builder.create_masked_load
    begin, end = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()

    def load(ptrs: Any, mask: Any, *more: Any) -> Any:
        address = np.asarray(ptrs.data).astype(np.int64)
        inside = np.broadcast_to(np.asarray(mask.data, dtype=bool), address.shape)
        found.numbers += int((inside & (address >= begin) & (address < end)).sum())
        found.lanes = max(found.lanes, address.size)
        return original(ptrs, mask, *more)

    interpreter_builder.create_masked_load = functools.wraps(original)(load)
    try:
        yield found
    finally:
        interpreter_builder.create_masked_load = original


def _right(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
    out.copy_(x.softmax(dim=1))


def _written(function: Callable) -> Callable:
    """(x, block) -> probabilities, as a function that writes them."""

    def run(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        result = function(x, block)
        out[: len(result), : result.shape[1]] = result

    return run


def _by(walk: Walk) -> Callable:
    """What a kernel with this walk writes. Each row has its own program."""

    def rows(x: torch.Tensor, block: int) -> torch.Tensor:
        import torch

        # Lanes beyond the row are masked scores, as in a kernel.
        lanes = -x.shape[1] % block if walk.tiles == "all" else 0
        full = torch.nn.functional.pad(x, (0, lanes), value=-INF)
        parts = [walk.probabilities(row, block) for row in full.split(1)]
        return torch.cat(parts)[:, : x.shape[1]]

    return _written(rows)


def _padded(value: float) -> Callable:
    """Lanes beyond the row count as scores of this value."""

    def run(x: torch.Tensor, block: int) -> torch.Tensor:
        import torch

        full = torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=value)
        return full.softmax(dim=1)[:, : x.shape[1]]

    return _written(run)


def _full(x: torch.Tensor, block: int) -> int:
    """How many columns the full tiles have."""
    return x.shape[1] // block * block


def _output_stride(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
    flat = out.view(-1)
    for r, row in enumerate(x.softmax(dim=1)):
        inside = flat[r * x.stride(0) :][: len(row)]  # the rest is written beyond the tensor
        inside.copy_(row[: len(inside)])


def _tile_wise(x: torch.Tensor, block: int) -> torch.Tensor:
    import torch

    return torch.cat([tile.softmax(dim=1) for tile in x.split(block, dim=1)], dim=1)


def _so_far(x: torch.Tensor, block: int) -> torch.Tensor:
    """Each tile under the maximum and the sum of the row up to its end."""
    import torch

    parts = []
    for start in range(0, x.shape[1], block):
        m, l, _ = Walk()(x[:, : start + block], block)
        parts.append((x[:, start : start + block] - finite(m)).exp() / l)
    return torch.cat(parts, dim=1)


def _under_tiles(x: torch.Tensor, block: int) -> torch.Tensor:
    """The row's sum is right, and each tile stands under its own maximum."""
    import torch

    _, l, _ = Walk()(x, block)
    parts = [(tile - tile.amax(dim=1, keepdim=True)).exp() / l for tile in x.split(block, dim=1)]
    return torch.cat(parts, dim=1)


def _first_unwritten(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
    out[:, block:] = x.softmax(dim=1)[:, block:]


def _tail_unmasked(x: torch.Tensor, block: int) -> torch.Tensor:
    # On into the next row, or poison.
    whole = x.as_strided((len(x), -(-x.shape[1] // block) * block), x.stride())
    return whole.softmax(dim=1)[:, : x.shape[1]]


def check_softmax_kernel(answer: Any) -> str:
    """Judge an answer to 01.6."""
    expect_triton("Exercise 01.5 asks for the same recurrence in torch, and runs everywhere.")
    expect(
        hasattr(answer, "fn"),
        "not-a-kernel",
        "softmax_kernel is no Triton kernel.\nKeep the line @triton.jit above its `def`.",
    )
    number = isolated(functools.partial(_judge, answer))
    return f"{number} tables, with ragged tails, gaps between rows and masked tiles"


def _judge(kernel: Any) -> int:
    seen = _Seen()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, about the nan of a wrong kernel
        try:
            number = diagnose(
                _launcher(kernel, seen),
                _cases(),
                _right,
                EXERCISE.suspects,
                writes=(0,),
                wording={BEYOND: _BEYOND},
            )
        except Mistake as mistake:
            # A place outside says more than numbers do.
            if mistake.name in ("wrong-values", "changed-input", "keeps-state", "first-row-only"):
                expect_inside(EXERCISE, seen.written)
            if mistake.name == "wrong-values":
                expect_own_reads(EXERCISE, seen.read)
            raise
    expect_inside(EXERCISE, seen.written)
    expect_own_reads(EXERCISE, seen.read)
    if seen.lanes:
        raise EXERCISE.mistake(
            "tile-too-large", f"The result is right, but a load of yours has {seen.lanes} lanes."
        )
    if seen.passes > 3.01:
        raise EXERCISE.mistake(
            "loaded-too-often",
            f"The result is right, but some scores of x are loaded more than twice: x was loaded"
            f" {seen.passes:.1f} times.",
        )
    if seen.passes > 2.01:
        raise EXERCISE.mistake(
            "three-passes", f"The result is right, but x was loaded {seen.passes:.1f} times."
        )
    return number


_ANSWERS = {
    "no-rescale": r"""
# %% the sum stays as it was
@@
-        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(
-            tl.exp(x - finite), axis=0
-        )
+        row_sum = row_sum + tl.sum(tl.exp(x - finite), axis=0)

# %% the sum stays as it was, and masked tiles are nan
@@
-        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
-        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(
-            tl.exp(x - finite), axis=0
-        )
+        finite = new_max
+        row_sum = row_sum + tl.sum(tl.exp(x - finite), axis=0)
""",
    "masked-tile-is-nan": r"""
# %% -inf - -inf
@@
-        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
+        finite = new_max
""",
    "maximum-starts-at-zero": r"""
# %% 0 in place of -inf
@@
-    row_max = float("-inf")
+    row_max = 0.0
""",
    "tile-under-its-own-maximum": r"""
# %% weights under the tile's maximum
@@
-            tl.exp(x - finite), axis=0
+            tl.exp(x - tl.max(x, axis=0)), axis=0
""",
    "maximum-not-kept": r"""
# %% forgets row_max = new_max
@@
-        row_max = new_max
""",
    "tile-rescaled-too": r"""
# %% adds, then rescales
@@
-        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(
-            tl.exp(x - finite), axis=0
-        )
+        row_sum = (row_sum + tl.sum(tl.exp(x - finite), axis=0)) * tl.exp(
+            row_max - finite
+        )
""",
    "stand-in-kept": r"""
# %% 0 becomes the maximum
@@
-        row_max = new_max
+        row_max = finite
""",
    "maximum-starts-too-high": r"""
# %% -1e4 in place of -inf
@@
-    row_max = float("-inf")
+    row_max = -10000.0

# %% -1e9 in place of -inf
@@
-    row_max = float("-inf")
+    row_max = -1.0e9
""",
}


EXERCISE = Exercise(
    id="01.6",
    title="A Triton kernel for rows of any length",
    check=check_softmax_kernel,
    mistakes=(
        Known(
            "tail-as-zero",
            "In the last tile, lanes beyond the row count as scores of a finite number (0?): they"
            " add to the sum, and in a row of lower scores that number becomes the maximum.\nMasked"
            " lanes need other=float('-inf'): it never wins, and its exp is 0.",
            hint=2,
            suspects=tuple(map(_padded, (0.0, -1.0, -10.0, -1e2, -1e3, -1e4))),
            answers=r"""
# %% masked lanes read as 0
@@
         inside = start + lanes < N
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
+        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=0.0)
         new_max = tl.maximum(row_max, tl.max(x, axis=0))
@@
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
+        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=0.0)
""",
        ),
        *slips(
            _by,
            {"no-rescale": 2, "tile-rescaled-too": 2, "masked-tile-is-nan": 3},
            _ANSWERS,
            # One program has one row, and no values; the tiles that count are named below.
            without=(
                *("one-maximum-for-all-rows", "one-sum-for-all-rows", "divided-in-each-tile"),
                *("output-not-rescaled", "sum-not-rescaled"),
                *("tail-dropped", "last-tile-dropped", "first-tile-only"),
            ),
        ),
        Known(
            "tail-not-summed",
            "Scores in the last, ragged tile are missing from maximum and sum.\nrange(0, N, BLOCK)"
            " comes to that tile, too; N // BLOCK tiles are too few.",
            suspects=(_by(Walk(tiles="full")),),
            answers=r"""
# %% one tile too few in the first loop
@@
     row_sum = 0.0
-    for start in range(0, N, BLOCK):
+    for start in range(0, N // BLOCK * BLOCK, BLOCK):
""",
        ),
        Known(
            "tail-not-written",
            "The last, ragged tile is never written: what was in `out` before is still there.\nYour"
            " second loop must come to it as the first does; the mask keeps it inside.",
            suspects=(_written(lambda x, block: x.softmax(dim=1)[:, : _full(x, block)]),),
            answers=r"""
# %% one tile too few in the second loop
@@
         row_max = new_max
-    for start in range(0, N, BLOCK):
+    for start in range(0, N // BLOCK * BLOCK, BLOCK):
""",
        ),
        Known(
            "tail-dropped",
            "Both loops leave out the last, ragged tile.\nrange(0, N, BLOCK) comes to that tile,"
            " too; N // BLOCK tiles are too few.",
            suspects=(
                _written(
                    lambda x, block: x[:, :n].softmax(dim=1) if (n := _full(x, block)) else x[:, :0]
                ),
            ),
            answers=r"""
# %% whole tiles only
@@
     row_sum = 0.0
-    for start in range(0, N, BLOCK):
+    for start in range(0, N // BLOCK * BLOCK, BLOCK):
@@
         row_max = new_max
-    for start in range(0, N, BLOCK):
+    for start in range(0, N // BLOCK * BLOCK, BLOCK):
""",
        ),
        Known(
            "not-divided",
            "Your rows do not add up to 1: what you store is not divided by the row's sum.\nStore"
            " tl.exp(x - row_max) / row_sum.",
            suspects=(_written(lambda x, block: (x - x.amax(dim=1, keepdim=True)).exp()),),
            answers=r"""
# %% weights, not probabilities
@@
-        tl.store(
-            out_ptr + row * N + start + lanes,
-            tl.exp(x - row_max) / row_sum,
-            mask=inside,
-        )
+        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max), mask=inside)
""",
        ),
        Known(
            "maximum-not-subtracted-at-the-end",
            "What you store is tl.exp(x) / row_sum, without the maximum. The sum stands under the"
            " row's maximum, and so must the numerator.\nStore tl.exp(x - row_max) / row_sum.",
            suspects=(
                _written(
                    lambda x, block: (
                        x.exp() / (x - x.amax(dim=1, keepdim=True)).exp().sum(dim=1, keepdim=True)
                    )
                ),
            ),
            answers=r"""
# %% forgets the maximum in the second loop
@@
-            tl.exp(x - row_max) / row_sum,
+            tl.exp(x) / row_sum,
""",
        ),
        Known(
            "first-tile-only",
            "Only the first BLOCK numbers of a row are computed; the row may be longer.\nLoop: for"
            " start in range(0, N, BLOCK).",
            hint=1,
            suspects=(
                _written(lambda x, block: x[:, :block].softmax(dim=1)),
                _by(Walk(tiles="first")),
            ),
            answers=r"""
# %% no loop: the chapter's kernel for rows that fit into a tile
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + lanes, mask=lanes < N, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(
        out_ptr + row * N + lanes, weights / tl.sum(weights, axis=0), mask=lanes < N
    )
""",
        ),
        Known(
            "a-softmax-for-each-tile",
            "Each tile adds up to 1 by itself: you write a tile's result before the row's sum is"
            " known.\nA first loop finds maximum and sum of the whole row; a second one writes.",
            hint=3,
            suspects=(_written(_tile_wise),),
            answers=r"""
# %% one loop that writes at once
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(
            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
        )
        weights = tl.exp(x - tl.max(x, axis=0))
        tl.store(
            out_ptr + row * N + start + lanes,
            weights / tl.sum(weights, axis=0),
            mask=inside,
        )
""",
        ),
        Known(
            "written-too-early",
            "You write a tile with the maximum and the sum SO FAR; the rest of the row can still"
            " change both.\nA first loop finds maximum and sum of the whole row; a second one"
            " writes.",
            hint=3,
            suspects=(_written(_so_far),),
            answers=r"""
# %% one loop does both
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(
            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
        )
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp(x - finite)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(p, axis=0)
        row_max = new_max
        tl.store(out_ptr + row * N + start + lanes, p / row_sum, mask=inside)
""",
        ),
        Known(
            "written-under-the-tile-maximum",
            "What you store stands under each tile's own maximum, and row_sum stands under the"
            " row's.\nStore tl.exp(x - row_max) / row_sum, with the row_max from the end of the"
            " first loop.",
            suspects=(_written(_under_tiles),),
        ),
        Known(
            "first-tile-not-written",
            "The first tile of each row is never written: what was in `out` before is still there."
            "\nThe second loop begins at 0, as the first one does.",
            suspects=(_first_unwritten,),
        ),
        Known(
            "first-row-only",
            "Your kernel computes row 0 in every program, or writes all results to row 0.\nProgram"
            " r, tl.program_id(0), reads row r at x_ptr + r * row_stride and writes row r at"
            " out_ptr + r * N.",
            hint=1,
            suspects=(
                _written(lambda x, block: x[:1].softmax(dim=1)),
                _written(lambda x, block: x[-1:].softmax(dim=1)),
                _written(lambda x, block: x[:1].softmax(dim=1).expand(x.shape)),
            ),
            answers=r"""
# %% results all to row 0
@@
-            out_ptr + row * N + start + lanes,
+            out_ptr + start + lanes,
""",
        ),
        Known(
            "row-stride-ignored",
            "Row r does not begin at r · N: here the rows lie further apart, and you read the gap"
            " between them.\nOf x, row r begins at x_ptr + r · row_stride. (Only `out` has its rows"
            " side by side.)",
            hint=1,
            suspects=(
                _written(lambda x, block: x.as_strided(x.shape, (x.shape[1], 1)).softmax(dim=1)),
            ),
            answers=r"""
# %% rows as if they lay side by side
@@
         inside = start + lanes < N
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
+        x = tl.load(x_ptr + row * N + start + lanes, mask=inside, other=float("-inf"))
         new_max = tl.maximum(row_max, tl.max(x, axis=0))
@@
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
+        x = tl.load(x_ptr + row * N + start + lanes, mask=inside, other=float("-inf"))
""",
        ),
        Known(
            "output-rows-too-far-apart",
            "Your results lie as far apart as the rows of x, in `out` and beyond its end. Its rows"
            " lie side by side.\nOf out, row r begins at out_ptr + r · N. (Only x has gaps between"
            " its rows: row_stride.)",
            hint=1,
            suspects=(_output_stride,),
            answers=r"""
# %% the output's rows as far apart as the input's
@@
-            out_ptr + row * N + start + lanes,
+            out_ptr + row * row_stride + start + lanes,
""",
        ),
        Known(
            "load-without-mask",
            "Where the last tile is not full, your kernel reads beyond the row: into the next row,"
            " or what follows the last (here: poison, nan). Elsewhere that can end the process,"
            " even where the numbers are not used.\nEach tl.load needs a mask that is False beyond"
            " the row, start + lanes < N, and other=float('-inf').",
            suspects=(_written(_tail_unmasked),),
            answers=r"""
# %% reads beyond the row
@@
         inside = start + lanes < N
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
+        x = tl.load(x_ptr + row * row_stride + start + lanes)
         new_max = tl.maximum(row_max, tl.max(x, axis=0))
@@
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
+        x = tl.load(x_ptr + row * row_stride + start + lanes)

# %% reads beyond the row, and throws it away
@@
         inside = start + lanes < N
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
+        x = tl.load(x_ptr + row * row_stride + start + lanes)
+        x = tl.where(inside, x, float("-inf"))
         new_max = tl.maximum(row_max, tl.max(x, axis=0))
""",
        ),
        Known(
            "masked-lanes-undefined",
            "The lanes that a mask switches off hold anything where tl.load has no `other` (here:"
            " nan), and you add them to maximum and sum.\nGive tl.load other=float('-inf'): it"
            " never wins, and its exp is 0.",
            hint=2,
            suspects=(_padded(math.nan),),
            answers=r"""
# %% a mask, and no other
@@
     for start in range(0, N, BLOCK):
         inside = start + lanes < N
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
+        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside)
         new_max = tl.maximum(row_max, tl.max(x, axis=0))
""",
        ),
        Known(
            "out-of-bounds-write",
            _BEYOND,
            hint=3,
            answers=r"""
# %% stores without a mask
@@
-        tl.store(
-            out_ptr + row * N + start + lanes,
-            tl.exp(x - row_max) / row_sum,
-            mask=inside,
-        )
+        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum)
""",
        ),
        Known(
            "tile-too-large",
            "A tile has BLOCK scores, and rows may be longer than any number that you choose.\nUse"
            " tl.arange(0, BLOCK), and loop over the tiles.",
            answers=r"""
# %% one tile for all rows there are
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, 4096)
    x = tl.load(x_ptr + row * row_stride + lanes, mask=lanes < N, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(
        out_ptr + row * N + lanes, weights / tl.sum(weights, axis=0), mask=lanes < N
    )
""",
        ),
        Known(
            "loaded-too-often",
            "Perhaps lanes beyond the row load a score of the row once more: mask them, instead of"
            " moving their address. Or a loop takes a tile several times.",
            answers=r"""
# %% lanes beyond the row load its last score
@@
-        x = tl.load(
-            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
-        )
-        new_max = tl.maximum(row_max, tl.max(x, axis=0))
+        x = tl.load(x_ptr + row * row_stride + tl.minimum(start + lanes, N - 1))
+        x = tl.where(inside, x, float("-inf"))
+        new_max = tl.maximum(row_max, tl.max(x, axis=0))
""",
        ),
        Known(
            "three-passes",
            "That is safe softmax, which reads a row three times.\nFind maximum and sum in one"
            " loop: rescale the sum when the maximum grows.",
            answers=r"""
# %% maximum, then sum, then result
@@
     row_max = float("-inf")
+    for start in range(0, N, BLOCK):
+        inside = start + lanes < N
+        x = tl.load(
+            x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf")
+        )
+        row_max = tl.maximum(row_max, tl.max(x, axis=0))
@@
-        new_max = tl.maximum(row_max, tl.max(x, axis=0))
-        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
-        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(
-            tl.exp(x - finite), axis=0
-        )
-        row_max = new_max
+        row_sum += tl.sum(tl.exp(x - row_max), axis=0)
""",
        ),
    ),
    right=r"""
# %% a running maximum and sum for each lane, merged after the loop
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    lane_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    lane_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        x = tl.load(
            x_ptr + row * row_stride + start + lanes,
            mask=start + lanes < N,
            other=float("-inf"),
        )
        new_max = tl.maximum(lane_max, x)
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        lane_sum = lane_sum * tl.exp(lane_max - finite) + tl.exp(x - finite)
        lane_max = new_max
    row_max = tl.max(lane_max, axis=0)
    row_sum = tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0)
    for start in range(0, N, BLOCK):
        x = tl.load(
            x_ptr + row * row_stride + start + lanes, mask=start + lanes < N, other=0.0
        )
        tl.store(
            out_ptr + row * N + start + lanes,
            tl.exp(x - row_max) / row_sum,
            mask=start + lanes < N,
        )

# %% pointers that walk, and the log-sum-exp
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    x_ptr += tl.program_id(0) * row_stride
    out_ptr += tl.program_id(0) * N
    lse = float("-inf")
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < N, other=float("-inf"))
        top = tl.maximum(lse, tl.max(x, axis=0))
        if top > float("-inf"):
            lse = top + tl.log(tl.exp(lse - top) + tl.sum(tl.exp(x - top), axis=0))
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(
            out_ptr + at, tl.exp(tl.load(x_ptr + at, mask=at < N) - lse), mask=at < N
        )
""",
)
