"""01.6: a Triton kernel for rows of any length."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.guard import BEYOND, guarded
from minivllm.course.grading.judges import (
    expect,
    expect_triton,
    seeded,
)

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch01_online_softmax.common import INF, the_online
from minivllm.course.grading.exercise import Exercise, Known


def check_softmax_kernel(answer: Any) -> str:
    import torch

    expect_triton("Exercise 01.5 asks for the same recurrence in torch, and runs everywhere.")
    random = seeded(6)

    def case(
        rows: int, columns: int, block: int, size: float = 2.0, shift: float = 0.0, pad: int = 0
    ) -> tuple:
        wide = guarded(rows, columns + pad)
        x = wide[:, :columns]
        x.copy_(torch.randn(rows, columns, generator=random) * size + shift)
        return guarded(rows, columns), x, block

    rising, falling = case(2, 24, 8), case(2, 24, 8)
    rising[1].copy_(torch.linspace(-3, 3, 24).repeat(2, 1))
    falling[1].copy_(torch.linspace(3, -3, 24).repeat(2, 1))
    masked = case(3, 20, 8)
    masked[1][0, :9], masked[1][1, 8:16], masked[1][2, 1:] = -INF, -INF, -INF
    cases = [
        case(1, 1, 4),
        case(2, 8, 8),
        case(3, 16, 8),
        case(2, 11, 4),
        case(2, 7, 16, shift=-400.0),
        case(2, 13, 8, 60),
        case(3, 18, 4, shift=500.0),
        case(3, 10, 4, pad=6),
        case(2, 16, 8, pad=3),
        rising,
        falling,
        masked,
    ]

    def launch(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        answer[(len(x),)](out, x, x.stride(0), x.shape[1], BLOCK=block)

    def right(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.softmax(x, dim=1))

    def row_by_row(**wrong: Any) -> Callable:
        def run(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
            for target, row in zip(out, x, strict=True):
                m, l = the_online(row, block, **wrong)
                target.copy_(torch.exp(row - m) / l)

        return run

    def own_first_tile(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out[:, :block] = torch.softmax(x[:, :block], dim=1)

    def padded(value: float) -> Callable:
        def run(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
            full = torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=value)
            out.copy_(torch.softmax(full, dim=1)[:, : x.shape[1]])

        return run

    def sum_of_tail(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        for target, row in zip(out, x, strict=True):
            m, l = the_online(row, block, tail=False)
            target.copy_(torch.exp(row - m) / l)

    def tail_unwritten(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        whole = x.shape[1] // block * block
        out[:, :whole] = torch.softmax(x, dim=1)[:, :whole]

    def stride_ignored(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.softmax(x.as_strided(x.shape, (x.shape[1], 1)), dim=1))

    def output_stride(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        flat = out.view(-1)
        for r, row in enumerate(torch.softmax(x, dim=1)):
            inside = flat[r * x.stride(0) :][: len(row)]  # the rest is written beyond the tensor
            inside.copy_(row[: len(inside)])

    def tile_wise(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.cat([torch.softmax(tile, dim=1) for tile in x.split(block, dim=1)], dim=1))

    def no_max(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.exp(x) / torch.exp(x).sum(dim=1, keepdim=True))

    def undivided(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.exp(x - x.amax(dim=1, keepdim=True)))

    def tail_unmasked(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        # on into the next row, or poison
        whole = x.as_strided((len(x), -(-x.shape[1] // block) * block), x.stride())
        out.copy_(torch.softmax(whole, dim=1)[:, : x.shape[1]])

    tail = (
        "In the last tile, lanes beyond the row count as scores of 0: they add to the sum, and in a"
        " row of negative scores 0 becomes the maximum.\nMasked lanes need other=float('-inf'): it"
        " never wins, and its exp is 0."
    )
    nan = (
        "A row whose first tile is all -inf gives nan: new maximum and old are -inf, and -inf -"
        " -inf is nan.\nSubtract tl.where(new_max == float('-inf'), 0.0, new_max) instead."
    )
    suspects = {
        "tail-as-zero": (tail, padded(0.0)),
        "no-rescale": (
            (
                "The sum is not rescaled when a later tile has a larger maximum.\nMultiply the old"
                " sum by tl.exp(row_max - new_max) before you add the tile."
            ),
            row_by_row(rescale="none"),
            row_by_row(rescale="none", guarded_max=False),
        ),
        "rescaled-the-wrong-way": (
            (
                "The sum grows when the maximum grows; under a larger maximum its terms must"
                " shrink.\nThe factor is exp(old - new), at most 1."
            ),
            row_by_row(rescale="swapped"),
            row_by_row(rescale="swapped", guarded_max=False),
        ),
        "tile-under-its-own-maximum": (
            (
                "You add a tile's weights under the tile's own maximum. Where an earlier tile held"
                " a larger score they are too large.\nTake them under the new running maximum."
            ),
            row_by_row(tile_sum="own"),
            row_by_row(tile_sum="own", guarded_max=False),
        ),
        "masked-tile-is-nan": (nan, row_by_row(guarded_max=False)),
        "maximum-starts-at-zero": (
            (
                "Your running maximum starts at 0: rows of negative scores get the maximum 0, and"
                " underflow.\nStart at float('-inf')."
            ),
            row_by_row(start=0.0),
            row_by_row(start=0.0, guarded_max=False),
        ),
        "tail-not-summed": (
            (
                "Scores in the last, ragged tile are missing from maximum and sum.\n"
                "range(0, N, BLOCK) comes to that tile, too; N // BLOCK tiles are too few."
            ),
            sum_of_tail,
        ),
        "tail-not-written": (
            (
                "The last, ragged tile is never written: what was in `out` before is still there.\n"
                "Your second loop must come to it as the first does; the mask keeps it inside."
            ),
            tail_unwritten,
        ),
        "not-divided": (
            (
                "Your rows do not add up to 1: what you store is not divided by the row's sum.\n"
                "Store tl.exp(x - row_max) / row_sum."
            ),
            undivided,
        ),
        "first-tile-only": (
            (
                "Only the first BLOCK numbers of a row are computed; the row may be longer.\n"
                "Loop: for start in range(0, N, BLOCK)."
            ),
            own_first_tile,
        ),
        "a-softmax-for-each-tile": (
            (
                "Each tile adds up to 1 by itself: you write a tile's result before the row's sum"
                " is known.\nA first loop finds maximum and sum of the whole row; a second one"
                " writes."
            ),
            tile_wise,
        ),
        "row-stride-ignored": (
            (
                "Row r does not begin at r · N: here the rows lie further apart, and you read the"
                " gap between them.\nOf x, row r begins at x_ptr + r · row_stride. (Only `out` has"
                " its rows side by side.)"
            ),
            stride_ignored,
        ),
        "output-rows-too-far-apart": (
            (
                "Your results lie as far apart as the rows of x, in `out` and beyond its end. Its"
                " rows lie side by side.\nOf out, row r begins at out_ptr + r · N. (Only x has gaps"
                " between its rows: row_stride.)"
            ),
            output_stride,
        ),
        "no-maximum": (
            (
                "You take exp of the scores as they are: large ones give inf, and inf / inf is"
                " nan.\nKeep a running maximum, and rescale the sum when it grows."
            ),
            no_max,
        ),
        "load-without-mask": (
            (
                "Where the last tile is not full, your kernel reads beyond the row: into the next"
                " row, or what follows the last (here: poison, nan).\nGive tl.load a mask, and"
                " other=float('-inf')."
            ),
            tail_unmasked,
        ),
    }
    beyond = (
        "Where the last tile is not full, tl.store writes over what follows the row, unless it has"
        " mask=inside; and in out, row r begins at out_ptr + r · N."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, about the nan of a wrong kernel
        diagnose(launch, cases, right, suspects, writes=(0,), wording={BEYOND: beyond})
    loops = _loops_that_load(answer)
    expect(
        loops <= 2,
        "three-passes",
        f"The result is right, but {loops} loops load the row: that is safe softmax, which reads it"
        " three times.\nFind maximum and sum in one loop: rescale the sum when the maximum grows.",
    )
    return f"{len(cases)} tables, with ragged tails, gaps between rows and masked tiles"


def _loops_that_load(kernel: Any) -> int:
    """How many loops of a kernel load something, nested ones once; 0 where the source cannot be
    found.
    """
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kernel.fn)))
    except (OSError, SyntaxError, AttributeError, TypeError):
        return 0

    def loops(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.For | ast.While):
                yield child
            else:
                yield from loops(child)

    calls = [
        [n for n in ast.walk(loop) if isinstance(n, ast.Attribute) and n.attr == "load"]
        for loop in loops(tree)
    ]
    return sum(map(bool, calls))


EXERCISE = Exercise(
    id="01.6",
    title="A Triton kernel for rows of any length",
    check=check_softmax_kernel,
    mistakes=(
        Known(
            "tail-as-zero",
            hint=2,
            answers=r'''
# %% masked lanes read as 0
@@
-    """Softmax of one row of N scores; program r does row r."""
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
''',
        ),
        Known(
            "no-rescale",
            hint=2,
            answers=r'''
# %% the sum stays as it was
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
-        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(
-            tl.exp(x - finite), axis=0
-        )
+        row_sum = row_sum + tl.sum(tl.exp(x - finite), axis=0)

# %% the sum stays as it was, and masked tiles are nan
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
-        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
-        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(
-            tl.exp(x - finite), axis=0
-        )
+        finite = new_max
+        row_sum = row_sum + tl.sum(tl.exp(x - finite), axis=0)
''',
        ),
        Known(
            "masked-tile-is-nan",
            hint=3,
            answers=r'''
# %% -inf - -inf
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
-        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
+        finite = new_max
''',
        ),
        Known(
            "maximum-starts-at-zero",
            answers=r'''
# %% 0 in place of -inf
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
-    row_max = float("-inf")
+    row_max = 0.0
''',
        ),
        Known(
            "tile-under-its-own-maximum",
            answers=r'''
# %% weights under the tile's maximum
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
-            tl.exp(x - finite), axis=0
+            tl.exp(x - tl.max(x, axis=0)), axis=0
''',
        ),
        Known(
            "row-stride-ignored",
            hint=1,
            answers=r'''
# %% rows as if they lay side by side
@@
-    """Softmax of one row of N scores; program r does row r."""
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
''',
        ),
        Known(
            "load-without-mask",
            answers=r'''
# %% reads beyond the row
@@
-    """Softmax of one row of N scores; program r does row r."""
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
''',
        ),
        Known(
            "out-of-bounds-write",
            hint=3,
            answers=r'''
# %% stores without a mask
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
-        tl.store(
-            out_ptr + row * N + start + lanes,
-            tl.exp(x - row_max) / row_sum,
-            mask=inside,
-        )
+        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum)
''',
        ),
        Known(
            "output-rows-too-far-apart",
            hint=1,
            answers=r'''
# %% the output's rows as far apart as the input's
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
-            out_ptr + row * N + start + lanes,
+            out_ptr + row * row_stride + start + lanes,
''',
        ),
        Known(
            "tail-not-summed",
            answers=r'''
# %% one tile too few in the first loop
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
     row_sum = 0.0
-    for start in range(0, N, BLOCK):
+    for start in range(0, N // BLOCK * BLOCK, BLOCK):
''',
        ),
        Known(
            "tail-not-written",
            answers=r'''
# %% one tile too few in the second loop
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
         row_max = new_max
-    for start in range(0, N, BLOCK):
+    for start in range(0, N // BLOCK * BLOCK, BLOCK):
''',
        ),
        Known(
            "not-divided",
            answers=r'''
# %% weights, not probabilities
@@
-    """Softmax of one row of N scores; program r does row r."""
@@
-        tl.store(
-            out_ptr + row * N + start + lanes,
-            tl.exp(x - row_max) / row_sum,
-            mask=inside,
-        )
+        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max), mask=inside)
''',
        ),
        Known(
            "first-tile-only",
            hint=1,
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
            hint=3,
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
            "three-passes",
            answers=r'''
# %% maximum, then sum, then result
@@
-    """Softmax of one row of N scores; program r does row r."""
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
''',
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
