"""14.4: a Triton kernel that dequantizes on the fly."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.accesses import Accesses, accesses
from minivllm.course.grading.compare import difference
from minivllm.course.grading.copies import copied
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.guard import guard, guarded
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

#: out, x, weight, scale, (BLOCK_N, BLOCK_K).
Case = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor", tuple[int, int]]
Run = Callable[..., None]


def _case(shape: tuple[int, int, int], blocks: tuple[int, int], seed: int, *, pad: int = 0) -> Case:
    """shape: T, N, K. pad: numbers between two rows of x."""
    import torch

    (tokens, features, width), random = shape, seeded(seed)
    x = guarded(tokens, width + pad)[:, :width]
    x.copy_(torch.randn(tokens, width, generator=random))
    weight = torch.randint(-128, 128, (features, width), generator=random, dtype=torch.int8)
    scale = torch.rand(features, generator=random) * 0.02 + 0.001
    return guarded(tokens, features), x, guard(weight), guard(scale), blocks


def _cases() -> list[Case]:
    return [
        _case((1, 1, 1), (1, 1), 1),
        _case((1, 2, 3), (1, 1), 2),
        _case((1, 4, 8), (4, 8), 3),
        _case((1, 4, 16), (4, 8), 4),
        _case((1, 8, 8), (4, 8), 5),
        _case((1, 5, 8), (4, 8), 6),
        _case((1, 4, 11), (4, 4), 7),
        _case((2, 4, 6), (8, 16), 8),
        _case((3, 4, 8), (4, 8), 9, pad=3),
        _case((3, 7, 13), (4, 4), 10, pad=5),
        _case((2, 9, 20), (2, 32), 11),
        _case((1, 70, 33), (32, 16), 12),
        _case((2, 33, 300), (16, 64), 13, pad=1),
        _case((1, 3, 1030), (4, 256), 14),
    ]


@dataclass
class _Seen:
    """What the launches of a kernel did beside what was asked for.

    outside, read: (the place in words, the case in words), for writes and reads that are not the
    kernel's. twice: the case in words where an output was stored more than once. loads: the most
    often that a program's weights were loaded. lanes: the most lanes of one load beyond a tile.
    """

    written: list[tuple[str, str]] = field(default_factory=list)
    read: list[tuple[str, str]] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    loads: float = 0.0
    lanes: int = 0


def _launcher(kernel: Any, seen: _Seen) -> Run:
    """The kernel as a function of a case; notes what it does."""

    def launch(
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        blocks: tuple[int, int],
    ) -> None:
        (tokens, width), features, stride = x.shape, len(weight), x.stride(0)
        (block_n, block_k), whole = blocks, x.as_strided((tokens, stride), (stride, 1))
        grid = -(-features // block_n), tokens
        tensors = {"out": out, "x": whole, "weight": weight, "scale": scale}
        with accesses(**tensors) as touched, _traffic(out, weight) as traffic:
            kernel[grid](
                *(out, x, weight, scale, stride, features, width),
                BLOCK_N=block_n,
                BLOCK_K=block_k,
            )
        sizes = f"T = {tokens}, N = {features}, K = {width}, x_stride = {stride}, blocks {blocks}"
        _note_places(touched, (tokens, width, stride), sizes, seen)
        if traffic.stores is not None and (traffic.stores > 1).any():
            seen.twice.append(sizes)
        seen.loads = max(seen.loads, traffic.numbers / (weight.numel() * tokens))
        if traffic.lanes > block_n * block_k:
            seen.lanes = max(seen.lanes, traffic.lanes)

    return launch


def _note_places(touched: Accesses, shape: tuple[int, int, int], sizes: str, seen: _Seen) -> None:
    """Note what was read and written in the gaps between the rows of x, and outside."""
    tokens, width, stride = shape
    seen.written += [(place, sizes) for place in touched.written_outside[:1]]
    seen.read += [(place, sizes) for place in touched.read_outside[:1]]
    for name in ("x", "weight", "scale"):
        if name in touched.written and touched.written[name].any():
            seen.written.append((f"{name}, which is there to be read", sizes))
    if "out" in touched.read and touched.read["out"].any():
        seen.read.append(("out, which is there to be written", sizes))
    if "x" in touched.read and not seen.read:
        gap = touched.read["x"].reshape(tokens, stride)[:, width:]
        if gap.any():
            row, column = gap.nonzero()[0][0], width + gap.nonzero()[1][0]
            seen.read.append((f"column {column} of row {row} of x", sizes))


@dataclass
class _Traffic:
    """numbers: how many weights were loaded in all. lanes: of the widest load. stores: to each
    element of out; None where no interpreter runs.
    """

    numbers: int = 0
    lanes: int = 0
    stores: Any = None


@contextlib.contextmanager
def _traffic(out: torch.Tensor, weight: torch.Tensor) -> Iterator[_Traffic]:
    """Count loads and stores in an `accesses` block."""
    import numpy as np

    found = _Traffic()
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield found
        return
    from triton.runtime.interpreter import interpreter_builder

    found.stores = np.zeros(out.numel(), dtype=np.int64)
    originals = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def places(ptrs: Any, mask: Any, tensor: torch.Tensor) -> Any:
        address = np.asarray(ptrs.data).astype(np.int64)
        asked = np.broadcast_to(np.asarray(mask.data, dtype=bool), address.shape)
        place = (address - tensor.data_ptr()) // tensor.element_size()
        return place[asked & (place >= 0) & (place < tensor.numel())]

    def load(ptrs: Any, mask: Any, *more: Any) -> Any:
        found.numbers += places(ptrs, mask, weight).size
        found.lanes = max(found.lanes, np.asarray(ptrs.data).size)
        return originals[0](ptrs, mask, *more)

    def store(ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
        np.add.at(found.stores, places(ptrs, mask, out), 1)
        return originals[1](ptrs, value, mask, *more)

    interpreter_builder.create_masked_load = functools.wraps(originals[0])(load)
    interpreter_builder.create_masked_store = functools.wraps(originals[1])(store)
    try:
        yield found
    finally:
        interpreter_builder.create_masked_load = originals[0]
        interpreter_builder.create_masked_store = originals[1]


# --- the right one and the wrong ones -------------------------------------------------------------


def _by(compute: Callable) -> Run:
    """compute(x, weight float32, scale, blocks) -> out, as a function that writes it."""

    def run(
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        blocks: tuple[int, int],
    ) -> None:
        result = compute(x, weight.float(), scale, blocks)
        out[: len(result), : result.shape[1]] = result

    return run


_right = _by(lambda x, weight, scale, blocks: x @ weight.T * scale)


def _columns(choose: Callable[[int, int], slice]) -> Run:
    """Only these columns count: (K, BLOCK_K) -> which."""

    def compute(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, blocks: Any) -> Any:
        part = choose(x.shape[1], blocks[1])
        return x[:, part] @ weight[:, part].T * scale

    return _by(compute)


def _scaled(scales: Callable[..., torch.Tensor]) -> Run:
    """Other scales: (scale, blocks) -> [N]."""
    return _by(lambda x, weight, scale, blocks: x @ weight.T * scales(scale, blocks))


def _scaled_in_the_loop(late: bool) -> Run:
    """What was summed so far is multiplied by the scale in each tile."""

    def compute(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, blocks: Any) -> Any:
        acc = x.new_zeros(len(x), len(weight))
        for part, w in zip(x.split(blocks[1], 1), weight.split(blocks[1], 1), strict=True):
            acc = (acc + part @ w.T) * scale
        return acc * scale if late else acc

    return _by(compute)


def _scale_by_column(x: Any, weight: Any, scale: Any, blocks: Any) -> Any:
    import torch

    # Where K is larger than N, what lies behind the scales is poison.
    known = torch.full((max(len(scale), x.shape[1]),), torch.nan)
    known[: len(scale)] = scale
    return (x * known[: x.shape[1]]) @ weight.T


def _transposed(x: Any, weight: Any, scale: Any, blocks: Any) -> Any:
    """The weight read as [K, N]."""
    return x @ weight.reshape(weight.shape[1], weight.shape[0]) * scale


def _rows_side_by_side(x: Any, weight: Any, scale: Any, blocks: Any) -> Any:
    return x.as_strided(x.shape, (x.shape[1], 1)) @ weight.T * scale


def _unsigned(x: Any, weight: Any, scale: Any, blocks: Any) -> Any:
    return x @ (weight % 256).T * scale


def _whole(weight: Any, blocks: Any) -> int:
    """How many features are in whole blocks."""
    return len(weight) // blocks[0] * blocks[0]


def _one_by_one(out: Any, x: Any, weight: Any, scale: Any, blocks: Any) -> None:
    """Each block of features computes the first one's."""
    first = (x @ weight.float().T * scale)[:, : blocks[0]]
    for start in range(0, out.shape[1], blocks[0]):
        part = out[:, start : start + blocks[0]]
        part.copy_(first[:, : part.shape[1]])


# --- the check ------------------------------------------------------------------------------------


def check_kernel(answer: Any) -> str:
    """Judge an answer to 14.4."""
    expect_triton("The other exercises of this chapter need no Triton.")
    expect(
        hasattr(answer, "fn"),
        "not-a-kernel",
        "w8a16_kernel is no Triton kernel.\nKeep the line @triton.jit above its `def`.",
    )
    number = isolated(functools.partial(_judge, answer))
    return f"{number} products of odd sizes, each weight read once and as one byte"


def _judge(kernel: Any) -> int:
    seen = _Seen()
    launch, cases = _launcher(kernel, seen), _cases()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, about the nan of a wrong kernel
        try:
            number = diagnose(
                launch, cases, _right, EXERCISE.suspects, writes=(0,), rtol=1e-4, atol=1e-4
            )
        except Mistake as mistake:
            # A place outside says more than numbers do.
            if mistake.name in ("wrong-values", "changed-input", "keeps-state"):
                expect_inside(EXERCISE, seen.written)
                expect_own_reads(EXERCISE, seen.read)
            if mistake.name == "wrong-values" and _nan_in_tails(launch, cases):
                last = mistake.message.rpartition("\n")[2]
                raise EXERCISE.mistake("other-missing", last) from None
            if mistake.name == "wrong-values" and _nearly(launch, cases):
                last = mistake.message.rpartition("\n")[2]
                raise EXERCISE.mistake("low-precision", last) from None
            raise
    expect_inside(EXERCISE, seen.written)
    expect_own_reads(EXERCISE, seen.read)
    if seen.twice:
        raise EXERCISE.mistake("stored-twice", f"With {seen.twice[0]} the result is right here.")
    if seen.lanes:
        raise EXERCISE.mistake(
            "tile-too-large", f"The result is right, but a load of yours has {seen.lanes} lanes."
        )
    if seen.loads > 1.01:
        raise EXERCISE.mistake(
            "loaded-again", f"The result is right, and weights are loaded {seen.loads:.1f} times."
        )
    return number


def _nan_in_tails(launch: Run, cases: list[Case]) -> bool:
    """Whether all results are right but where the last tile is not full, and there NaN."""
    for case in cases:
        mine, right = copied(case), copied(case)
        launch(*mine)
        _right(*right)
        ragged = case[1].shape[1] % case[4][1]
        if ragged and not mine[0].isnan().all():
            return False
        if not ragged and difference(mine[0], right[0]):
            return False
    return True


def _nearly(launch: Run, cases: list[Case]) -> bool:
    """Whether all results are right within 3 %."""
    for case in cases:
        mine, right = copied(case), copied(case)
        launch(*mine)
        _right(*right)
        if difference(mine[0], right[0], rtol=0.03, atol=0.1):
            return False
    return True


EXERCISE = Exercise(
    id="14.4",
    title="Dequantize on the fly",
    check=check_kernel,
    mistakes=(
        Known(
            "no-scale",
            "Your results lack the scale, or have it twice, or are divided by it. A weight is q ·"
            " scale[n]: multiply once.",
            hint=3,
            suspects=(
                _scaled(lambda scale, blocks: 1.0),
                _scaled(lambda scale, blocks: scale * scale),
                _scaled(lambda scale, blocks: 1.0 / scale),
            ),
            answers=r"""
# %% forgotten
@@
-    scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
-    tl.store(out_ptr + token * N + features, acc * scale, mask=mine)
+    tl.store(out_ptr + token * N + features, acc, mask=mine)
""",
        ),
        Known(
            "one-scale-for-all",
            "All features of a program, or of the weight, get one scale. Each channel has its own:"
            " scale_ptr + features.",
            suspects=(
                _scaled(lambda scale, blocks: scale[0]),
                _scaled(
                    lambda scale, blocks: scale[:: blocks[0]].repeat_interleave(blocks[0])[
                        : len(scale)
                    ]
                ),
                _scaled(lambda scale, blocks: scale[: blocks[0]].repeat(len(scale))[: len(scale)]),
            ),
            answers=r"""
# %% the first scale
@@
-    scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
+    scale = tl.load(scale_ptr)
# %% the block's first scale
@@
-    scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
+    scale = tl.load(scale_ptr + block * BLOCK_N)
""",
        ),
        Known(
            "scaled-in-the-loop",
            "The sum so far is multiplied by the scale in each tile, so that early tiles get it"
            " several times. Multiply what is added, or multiply once after the loop.",
            hint=3,
            suspects=(_scaled_in_the_loop(False), _scaled_in_the_loop(True)),
            answers=r"""
# %% the sum so far
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
-    scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
-    tl.store(out_ptr + token * N + features, acc * scale, mask=mine)
+        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+        acc *= tl.load(scale_ptr + features, mask=mine, other=0.0)
+    tl.store(out_ptr + token * N + features, acc, mask=mine)
""",
        ),
        Known(
            "scale-of-columns",
            "A scale belongs to a channel, a row of the weight. You multiply columns by it.",
            suspects=(_by(_scale_by_column),),
            answers=r"""
# %% along x
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
-    scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
-    tl.store(out_ptr + token * N + features, acc * scale, mask=mine)
+        x *= tl.load(scale_ptr + columns, mask=inside, other=0.0)
+        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+    tl.store(out_ptr + token * N + features, acc, mask=mine)
""",
        ),
        Known(
            "tail-dropped",
            "Columns behind the last whole tile are missing in your sums. range(0, K, BLOCK_K)"
            " comes to them, too, and the mask keeps the last tile inside.",
            hint=2,
            suspects=(_columns(lambda width, block: slice(0, width // block * block)),),
            answers=r"""
# %% whole tiles only
@@
-    for start in range(0, K, BLOCK_K):
+    for start in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):
""",
        ),
        Known(
            "first-tile-only",
            "Only the first BLOCK_K columns count; a row may be longer. Loop over the tiles.",
            hint=1,
            suspects=(_columns(lambda width, block: slice(0, block)),),
            answers=r"""
# %% no loop
@@
-    for start in range(0, K, BLOCK_K):
+    for start in range(0, 1, BLOCK_K):
""",
        ),
        Known(
            "sum-not-kept",
            "Only the last tile counts: each tile's sum replaces the one before. Add them up.",
            suspects=(_columns(lambda width, block: slice((width - 1) // block * block, width)),),
            answers=r"""
# %% = for +=
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+        acc = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
""",
        ),
        Known(
            "first-token-only",
            "Every token gets the first one's result: program_id(1) is the token, and its row"
            " begins at x_ptr + token * x_stride.",
            suspects=(
                _by(lambda x, weight, scale, blocks: (x[:1] @ weight.T * scale).expand(len(x), -1)),
                _by(lambda x, weight, scale, blocks: x[:1] @ weight.T * scale),
                _by(lambda x, weight, scale, blocks: x[-1:] @ weight.T * scale),
            ),
            answers=r"""
# %% reads the first row
@@
-        x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0)
+        x = tl.load(x_ptr + columns, mask=inside, other=0.0)
""",
        ),
        Known(
            "first-features-only",
            "Every program computes the first BLOCK_N features: those of program `block` begin at"
            " block * BLOCK_N.",
            hint=1,
            suspects=(
                _one_by_one,
                _by(lambda x, weight, scale, blocks: (x @ weight.T * scale)[:, : blocks[0]]),
            ),
            answers=r"""
# %% without the block's number
@@
-    features = block * BLOCK_N + tl.arange(0, BLOCK_N)
+    features = tl.arange(0, BLOCK_N)
""",
        ),
        Known(
            "last-features-missing",
            "Where N is no multiple of BLOCK_N, the features of the last program are not written,"
            " or are wrong. It has some features, and lanes without one.",
            hint=2,
            suspects=(
                _by(
                    lambda x, weight, scale, blocks: (x @ weight.T * scale)[
                        :, : _whole(weight, blocks)
                    ]
                ),
            ),
            answers=r"""
# %% only programs that are full
@@
-    mine = features < N
+    mine = (features < N) & ((block + 1) * BLOCK_N <= N)
""",
        ),
        Known(
            "x-stride-ignored",
            "Row t of x does not begin at t · K: here the rows lie further apart, and you read what"
            " is between them. Use x_stride.",
            suspects=(_by(_rows_side_by_side),),
            answers=r"""
# %% K for x_stride
@@
-        x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0)
+        x = tl.load(x_ptr + token * K + columns, mask=inside, other=0.0)
""",
        ),
        Known(
            "weight-transposed",
            "You read the weight as [K, N]. It is [N, K]: feature n, column k lies at n * K + k.",
            hint=1,
            suspects=(_by(_transposed),),
            answers=r"""
# %% k * N + n
@@
-            weight_ptr + features[:, None] * K + columns[None, :],
+            weight_ptr + features[:, None] + columns[None, :] * N,
""",
        ),
        Known(
            "unsigned",
            "Negative weights come out as 256 too large: int8 has a sign.",
            suspects=(_by(_unsigned),),
            answers=r"""
# %% as uint8
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+        weight = weight.to(tl.uint8, bitcast=True)
+        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
""",
        ),
        Known(
            "x-as-int8",
            "x lost what is behind its point: it was converted to whole numbers. Convert the"
            " weights to float32, and leave x as it is.",
            suspects=(
                _by(lambda x, weight, scale, blocks: x.trunc() @ weight.T * scale),
                _by(lambda x, weight, scale, blocks: x.round() @ weight.T * scale),
            ),
            answers=r"""
# %% both in int32
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+        acc += tl.sum(weight.to(tl.int32) * x.to(tl.int32)[None, :], axis=1)
""",
        ),
        Known(
            "low-precision",
            "All results are nearly right, and not exact. Do you compute, or add up, in less than"
            " float32 somewhere?",
            hint=3,
            answers=r"""
# %% float16
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+        product = weight.to(tl.float16) * x[None, :].to(tl.float16)
+        acc += tl.sum(product, axis=1)
""",
        ),
        Known(
            "out-of-bounds-write",
            "Where N is no multiple of BLOCK_N, the last program has lanes without a feature: the"
            " store needs mask=features < N. Row t of out begins at t * N, and t is program_id(1).",
            hint=2,
            answers=r"""
# %% a store without a mask
@@
-    tl.store(out_ptr + token * N + features, acc * scale, mask=mine)
+    tl.store(out_ptr + token * N + features, acc * scale)
""",
        ),
        Known(
            "load-without-mask",
            "A load reads what is not its own: NaN here, anything on a GPU, or the end of the"
            " process. Each load needs a mask for lanes without a feature or a column, and its rows"
            " have their own distance: x_stride in x, K in the weight.",
            hint=2,
            answers=r"""
# %% the weights' columns
@@
-            mask=mine[:, None] & inside[None, :],
+            mask=mine[:, None],
# %% the weights' rows
@@
-            mask=mine[:, None] & inside[None, :],
+            mask=inside[None, :],
# %% the scales
@@
-    scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
+    scale = tl.load(scale_ptr + features)
# %% x
@@
-        x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0)
+        x = tl.load(x_ptr + token * x_stride + columns)
+        x = tl.where(inside, x, 0.0)
""",
        ),
        Known(
            "other-missing",
            "Your sums are NaN where a tile is not full. What a masked lane gets without `other` is"
            " anything, NaN too, and NaN · 0 is NaN: give other=0.0.",
            hint=2,
            answers=r"""
# %% x without other
@@
-        x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0)
+        x = tl.load(x_ptr + token * x_stride + columns, mask=inside)
""",
        ),
        Known(
            "stored-twice",
            "Two programs store the same result, or one stores it twice: on a GPU another one could"
            " win. Store once, under mask=features < N.",
            hint=2,
            answers=r"""
# %% in each tile
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
-    scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
-    tl.store(out_ptr + token * N + features, acc * scale, mask=mine)
+        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+        scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
+        tl.store(out_ptr + token * N + features, acc * scale, mask=mine)
""",
        ),
        Known(
            "loaded-again",
            "Each weight is to be read once by each program: bytes are what the kernel waits for.",
            answers=r"""
# %% twice
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+        again = tl.load(
+            weight_ptr + features[:, None] * K + columns[None, :],
+            mask=mine[:, None] & inside[None, :],
+            other=0,
+        )
+        acc += tl.sum((weight.to(tl.float32) + again) / 2 * x[None, :], axis=1)
""",
        ),
        Known(
            "tile-too-large",
            "A tile has BLOCK_N · BLOCK_K weights: that is what fits into the registers.",
            answers=r"""
# %% two tiles at once
@@
-    for start in range(0, K, BLOCK_K):
-        columns = start + tl.arange(0, BLOCK_K)
+    for start in range(0, K, 2 * BLOCK_K):
+        columns = start + tl.arange(0, 2 * BLOCK_K)
""",
        ),
    ),
    right=r"""
# %% the scale in each tile
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
-    scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
-    tl.store(out_ptr + token * N + features, acc * scale, mask=mine)
+        scale = tl.load(scale_ptr + features, mask=mine, other=0.0)
+        acc += tl.sum(weight * scale[:, None] * x[None, :], axis=1)
+    tl.store(out_ptr + token * N + features, acc, mask=mine)
# %% summed at the end
@@
-    acc = tl.zeros([BLOCK_N], tl.float32)
+    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
@@
-        acc += tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
+        acc += weight.to(tl.float32) * x[None, :]
@@
-    tl.store(out_ptr + token * N + features, acc * scale, mask=mine)
+    tl.store(out_ptr + token * N + features, tl.sum(acc, axis=1) * scale, mask=mine)
""",
)
