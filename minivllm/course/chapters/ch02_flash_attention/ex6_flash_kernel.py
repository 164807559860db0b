"""02.6: the walk in Triton."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from minivllm.course.chapters.ch02_flash_attention.cases import faint, giants, long, plain, steep
from minivllm.course.chapters.ch02_flash_attention.common import Case, judge, walks
from minivllm.course.chapters.ch02_flash_attention.walk import LOG2E, Walk, exact
from minivllm.course.grading.accesses import Accesses, accesses
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.guard import guard, guarded
from minivllm.course.grading.isolated import isolated
from minivllm.course.grading.judges import expect, expect_triton


def _cases() -> list[Case]:
    shapes = [
        # queries, keys, dim, block_m, block_n
        (16, 16, 16, 16, 16),
        (1, 1, 32, 16, 16),
        (5, 5, 32, 16, 16),
        (32, 32, 64, 16, 32),
        (33, 33, 16, 16, 32),
        (7, 40, 32, 16, 64),
        (20, 61, 64, 16, 16),
        (40, 40, 16, 32, 16),
        (17, 64, 32, 16, 16),
        # The tile's last query stands at the beginning of a tile of keys.
        (16, 17, 16, 16, 16),
        (70, 131, 16, 64, 32),
    ]
    heads = [(plain(q, n, d, 200 + seed), m, b) for seed, (q, n, d, m, b) in enumerate(shapes)]
    heads += [
        (plain(20, 40, 32, 250, size=4.0), 16, 16),
        (plain(9, 20, 32, 252, scale=1.0), 16, 16),
        (steep(16, 253), 16, 16),
        (giants(16, 254), 16, 32),
        (long(3, 4201, 16, 255), 16, 64),
        (faint(16, 256), 16, 16),
    ]
    return [
        Case((guarded(*head.query.shape), *map(guard, head.args[:3]), head.scale, m, n), head.about)
        for head, m, n in heads
    ]


def _run(kernel: Any, programs: int, args: tuple) -> Accesses:
    """Launch the kernel. Mistake where it writes outside of its tensors."""
    out, query, key, value, scale, block_m, block_n = args
    constants = {"D": query.shape[1], "BLOCK_M": block_m, "BLOCK_N": block_n}
    # The interpreter's warnings about nan would stand before the verdict.
    with warnings.catch_warnings(), accesses(out=out, query=query, key=key, value=value) as seen:
        warnings.simplefilter("ignore", RuntimeWarning)
        kernel[(programs,)](
            out, query, key, value, len(query), len(key), scale * LOG2E, **constants
        )
    if seen.written_outside:
        raise Mistake(
            "out-of-bounds-write",
            f"Your kernel writes outside of its tensors: {seen.written_outside[0]}"
            f" ({_sizes(args)}).\nThe last tile of queries may stick out: its rows from Q on do not"
            " exist. tl.store goes to out_ptr + query_places, with the mask that loaded the"
            " queries, (rows < Q)[:, None].",
        )
    return seen


def _sizes(args: tuple) -> str:
    _, query, key, _, _, block_m, block_n = args
    return (
        f"Q = {len(query)}, N = {len(key)}, D = {query.shape[1]}, BLOCK_M = {block_m}, BLOCK_N ="
        f" {block_n}"
    )


def _right(
    out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
) -> None:
    out.copy_(exact(query, key, value, scale))


def _written(walk: Callable) -> Callable:
    """A walk as a function that writes its result."""

    def run(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        out.copy_(walk(query, key, value, scale, block_m, block_n))

    return run


def _poisoned(
    out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
) -> None:
    """What lies beyond the keys is read: NaN, in each tile of queries that comes so far."""
    out.copy_(exact(query, key, value, scale))
    for top in range(0, len(query), block_m):
        seen = len(key) - len(query) + min(top + block_m, len(query))
        if -(-seen // block_n) * block_n > len(key):
            out[top : top + block_m] = math.nan


def _first_program(
    out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
) -> None:
    out[:block_m] = exact(query, key, value, scale)[:block_m]


def _strided(of_queries: bool) -> Callable:
    """Rows of keys and values begin BLOCK_M or BLOCK_N numbers apart and not D; NaN outside."""

    def run(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        import torch

        rows, columns = torch.arange(len(key))[:, None], torch.arange(key.shape[1])
        places = rows * (block_m if of_queries else block_n) + columns
        outside = places >= key.numel()
        key, value = (
            x.flatten()[places.clamp(max=x.numel() - 1)].masked_fill(outside, math.nan)
            for x in (key, value)
        )
        out.copy_(Walk()(query, key, value, scale, block_m, block_n))

    return run


def _turned(
    out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
) -> None:
    """Keys are read as if they lay as [D, N]."""
    turned = key.flatten().view(key.shape[1], key.shape[0]).T
    out.copy_(Walk()(query, turned, value, scale, block_m, block_n))


def _expect_inside(outside: list[tuple[str, str]]) -> None:
    """Nothing may have been read outside. outside: (the place, the sizes) of such reads."""
    if not outside:
        return
    place, sizes = min(outside, key=lambda pair: len(pair[1]))
    queries = "of query" in place or "of out" in place
    mask = "(rows < Q)[:, None]" if queries else "(tokens < N)[:, None]"
    raise Mistake(
        "reads-outside" if queries else "reads-beyond-the-keys",
        f"The result is right, but your kernel reads outside of its tensors: {place} ({sizes})."
        " Your mask of the scores hides it; on a GPU such a read may end the program.\nEach tl.load"
        f" needs a mask: mask={mask}, other=0.0, for keys AND values.",
    )


def _expect_no_future(kernel: Any) -> None:
    """The first tile of a prompt of three must not read keys that it does not see."""
    head = plain(48, 48, 16, 260)
    args = (guarded(48, 16), *map(guard, head.args[:3]), head.scale, 16, 16)
    seen = _run(kernel, 1, args)
    rows = {name: seen.read[name].reshape(48, 16).any(axis=1) for name in ("key", "value")}
    last = max((int(r.nonzero()[0].max()) for r in rows.values() if r.any()), default=0)
    expect(
        last < 16,
        "visits-the-future",
        "The result is right, but tiles are visited that hold nothing but the future: program 0 has"
        f" the queries 0 to 15 of 48, and reads keys up to {last}.\nEnd the loop at the position"
        " after the tile's last query, N - Q + (program + 1) · BLOCK_M, or at N.",
    )


def _expect_no_tile_in_vain(kernel: Any) -> None:
    """A chunk with a past: each product of queries and keys must have a pair that counts."""
    from minivllm.viz.tiles import attention_tiles

    # The last tile of queries sticks out, and the last tile of keys does not.
    (queries, keys, dim), (block_m, block_n) = (70, 128, 64), (16, 32)
    args = (guarded(queries, dim), *map(guard, plain(queries, keys, dim, 261).args[:3]))
    with _products() as shapes:
        _run(kernel, -(-queries // block_m), (*args, dim**-0.5, block_m, block_n))
    mine = sum(sorted(shape) == [block_m, block_n] for shape in shapes)
    counts = attention_tiles(queries, keys, block_m, block_n).counts
    needed = counts["full"] + counts["masked"]
    expect(
        mine <= needed,
        "visits-the-future",
        f"The result is right, but the queries and keys of {mine} tiles are multiplied, and only"
        f" {needed} hold a pair that counts ({_sizes((*args, 0.0, block_m, block_n))}).\nThe loop"
        " of a program ends at N - Q + (program + 1) · BLOCK_M, and at N at the latest: behind it"
        " lies the future, or nothing at all. A mask at the load does not spare the work.",
    )


@contextlib.contextmanager
def _products() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the results of each `tl.dot` in this block; none where no interpreter runs."""
    shapes: list[tuple[int, ...]] = []
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield shapes
        return
    from triton.runtime.interpreter import interpreter_builder

    original = interpreter_builder.create_dot

    def dot(*args: Any, **more: Any) -> Any:
        result = original(*args, **more)
        shapes.append(tuple(result.data.shape))
        return result

    interpreter_builder.create_dot = dot
    try:
        yield shapes
    finally:
        del interpreter_builder.create_dot


def _judged(kernel: Any) -> int:
    outside: list[tuple[str, str]] = []

    def launch(*args: Any) -> None:
        seen = _run(kernel, -(-len(args[1]) // args[5]), args)
        outside.extend((place, _sizes(args)) for place in seen.read_outside)

    def attend(query: Any, key: Any, value: Any, scale: float) -> Any:
        args = guarded(*query.shape), *map(guard, (query, key, value)), scale, 32, 16
        launch(*args)
        return args[0]

    number = judge(EXERCISE, launch, _cases(), _right, attend, writes=(0,))
    _expect_inside(outside)
    _expect_no_future(kernel)
    _expect_no_tile_in_vain(kernel)
    return number


def check_flash_kernel(answer: Any) -> str:
    """Judge an answer to 02.6."""
    expect_triton("Exercise 02.3 is the same walk in torch.")
    number = isolated(lambda: _judged(answer))
    return f"{number} cases, ragged at both ends, and no tile in vain"


def _use(name: str, walk: Walk) -> Sequence[Callable]:
    """A kernel's tile is always full: keys that do not exist have scores of 0."""
    padded = replace(walk, how=walk.how | {"padded-keys"})
    return _written(walk), _written(padded)


EXERCISE = Exercise(
    id="02.6",
    title="The walk in Triton",
    check=check_flash_kernel,
    mistakes=walks(
        _use,
        Known(
            "aligned-to-start",
            hint=3,
            answers=r"""
# %% no past
@@
-    positions = N - Q + rows
+    positions = rows
@@
-    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, N)

# %% no past in the mask, and the walk goes on
@@
-    positions = N - Q + rows
+    positions = rows
""",
        ),
        Known(
            "walk-ends-too-early",
            hint=3,
            answers=r"""
# %% no past in the walk
@@
-    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, N)
""",
        ),
        Known(
            "reads-beyond-the-keys",
            "Where the last tile of keys is not full, what its rows beyond N hold gets into the"
            " result: poison here, nan. A weight of 0 does not help, for 0 · nan is nan.\nLoad key"
            " AND value with mask=(… < N)[:, None] and other=0.0. Without `other`, a masked lane"
            " can hold anything.",
            hint=2,
            suspects=(_poisoned,),
            answers=r"""
# %% no mask for keys and values
@@
-        key = tl.load(key_ptr + places, mask=inside, other=0.0)
-        value = tl.load(value_ptr + places, mask=inside, other=0.0)
+        key = tl.load(key_ptr + places)
+        value = tl.load(value_ptr + places)

# %% no other: a masked lane can hold anything
@@
-        value = tl.load(value_ptr + places, mask=inside, other=0.0)
+        value = tl.load(value_ptr + places, mask=inside)

# %% no mask for the keys: their scores are hidden anyway
@@
-        key = tl.load(key_ptr + places, mask=inside, other=0.0)
+        key = tl.load(key_ptr + places)
""",
        ),
        Known(
            "out-of-bounds-write",
            answers=r"""
# %% as if out were as long as the context
@@
-    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])
+    places = (N - Q) * D + query_places
+    tl.store(out_ptr + places, acc / l[:, None], mask=(rows < Q)[:, None])

# %% no mask at the store
@@
-    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])
+    tl.store(out_ptr + query_places, acc / l[:, None])
""",
        ),
        Known(
            "program-id-ignored",
            "Only the first BLOCK_M queries have a result; the other programs did the same ones"
            " again.\nProgram p does the queries from p · BLOCK_M on: tl.program_id(0).",
            suspects=(_first_program,),
            answers=r"""
# %% every program does the first tile
@@
-    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
+    rows = tl.arange(0, BLOCK_M)
@@
-    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = tl.minimum(N - Q + BLOCK_M, N)
""",
        ),
        Known(
            "exp-of-base-two-scores",
            hint=3,
            answers=r"""
# %% tl.exp
@@
-        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
+        rescale, weights = tl.exp(m - new), tl.exp(scores - new[:, None])
""",
        ),
        Known(
            "mixed-bases",
            answers=r"""
# %% tl.exp for the rescaling
@@
-        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
+        rescale, weights = tl.exp(m - new), tl.exp2(scores - new[:, None])
""",
        ),
        Known(
            "not-rescaled",
            hint=1,
            answers=r"""
# %% neither sum nor output
@@
-        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
-        l = l * rescale + tl.sum(weights, axis=1)
+        acc = acc + tl.dot(weights, value, input_precision="ieee")
+        l = l + tl.sum(weights, axis=1)
""",
        ),
        Known(
            "sum-not-rescaled",
            answers=r"""
# %% acc alone
@@
-        l = l * rescale + tl.sum(weights, axis=1)
+        l = l + tl.sum(weights, axis=1)
""",
        ),
        Known(
            "output-not-rescaled",
            answers=r"""
# %% l alone
@@
-        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
+        acc = acc + tl.dot(weights, value, input_precision="ieee")
""",
        ),
        Known(
            "no-scale",
            answers=r"""
# %% scale_log2 unused
@@
-        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
+        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
""",
        ),
        Known(
            "diagonal-not-masked",
            hint=3,
            answers=r"""
# %% the end of the walk is taken for a mask
@@
-        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
+        scores = tl.where((tokens < N)[None, :], scores, float("-inf"))

# %% no tl.where at all
@@
-        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
""",
        ),
        Known(
            "hidden-scores-are-zero",
            answers=r"""
# %% 0 for -inf
@@
-        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
+        scores = tl.where(tokens[None, :] <= positions[:, None], scores, 0.0)
""",
        ),
        Known(
            "one-maximum-for-all-rows",
            hint=3,
            answers=r"""
# %% tl.max over everything
@@
-        new = tl.maximum(m, tl.max(scores, axis=1))
+        new = tl.maximum(m, tl.max(tl.max(scores, axis=1), axis=0))
""",
        ),
        Known(
            "stops-before-the-diagonal",
            answers=r"""
# %% the last tile left out
@@
-    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = (N - Q + tl.program_id(0) * BLOCK_M) // BLOCK_N * BLOCK_N
""",
        ),
        Known(
            "maximum-not-kept",
            hint=1,
            answers=r"""
# %% m = new is missing
@@
-        m = new
""",
        ),
        Known(
            "straddling-tile-not-masked",
            answers=r"""
# %% no mask before the tile's first position
@@
-        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
+        scores = tl.where(
+            (tokens[None, :] <= positions[:, None])
+            | (first < N - Q + tl.program_id(0) * BLOCK_M),
+            scores,
+            float("-inf"),
+        )
""",
        ),
        Known(
            "visits-the-future",
            hint=3,
            answers=r"""
# %% all keys
@@
-    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = N

# %% on past the end, where the last tile of queries is not full
@@
-    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = N - Q + (tl.program_id(0) + 1) * BLOCK_M

# %% all keys, and no lane of the future's tiles is loaded
@@
-    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = N
+    last = N - Q + (tl.program_id(0) + 1) * BLOCK_M
@@
-        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
+        places = tokens[:, None] * D + columns[None, :]
+        inside = ((tokens < N) & (first < last))[:, None]
""",
        ),
        Known(
            "stops-one-short",
            answers=r"""
# %% up to the last query's position, which range leaves out, and one key at least
@@
-    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
+    end = tl.maximum(end - 1, 1)
""",
        ),
        Known(
            "not-divided",
            hint=1,
            answers=r"""
# %% acc as it is
@@
-    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])
+    tl.store(out_ptr + query_places, acc, mask=(rows < Q)[:, None])
""",
        ),
        Known(
            "keys-turned-round",
            "The keys are read as if they lay as [D, N]: number d of token t at d · N + t. They lie"
            " as [N, D].\nNumber d of token t is at t · D + d. tl.trans turns the tile that was"
            " loaded.",
            suspects=(_turned,),
            answers=r"""
# %% transposed by the load, with the wrong row length
@@
-        key = tl.load(key_ptr + places, mask=inside, other=0.0)
+        turned = columns[:, None] * N + tokens[None, :]
+        key = tl.load(key_ptr + turned, mask=(tokens < N)[None, :], other=0.0)
@@
-        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
+        scores = tl.dot(query, key, input_precision="ieee") * scale_log2
""",
        ),
        Known(
            "rows-begin-elsewhere",
            "Keys and values are read from the wrong places: as if a row had BLOCK_N or BLOCK_M"
            " numbers. Where D is the same number, that is right by accident.\nRow t of key begins"
            " at t · D.",
            suspects=(_strided(of_queries=False), _strided(of_queries=True)),
            answers=r"""
# %% the block for the width
@@
-        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
+        places = tokens[:, None] * BLOCK_N + columns[None, :]
+        inside = (tokens < N)[:, None]
""",
        ),
        Known(
            "maximum-starts-at-zero",
            answers=r"""
# %% zeros
@@
-    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
+    m = tl.zeros([BLOCK_M], dtype=tl.float32)
""",
        ),
        Known(
            "maximum-before-the-mask",
            answers=r"""
# %% the weights are masked
@@
-        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
-        new = tl.maximum(m, tl.max(scores, axis=1))
-        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
+        new = tl.maximum(m, tl.max(scores, axis=1))
+        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
+        weights = tl.where(tokens[None, :] <= positions[:, None], weights, 0.0)
""",
        ),
        Known(
            "mask-of-the-first-tile",
            answers=r"""
# %% positions of program 0 for all
@@
-    positions = N - Q + rows
+    positions = N - Q + tl.arange(0, BLOCK_M)
""",
        ),
        Known(
            "low-precision",
            answers=r"""
# %% half precision for the first product
@@
-        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
+        halves = tl.dot(query.to(tl.float16), tl.trans(key.to(tl.float16)))
+        scores = halves.to(tl.float32) * scale_log2
""",
        ),
        Known(
            "keys-left-out",
            answers=r"""
# %% the last two tiles of a long context
@@
-    for first in range(0, end, BLOCK_N):
+    for first in range(tl.maximum(0, (end - 256) // BLOCK_N * BLOCK_N), end, BLOCK_N):
""",
        ),
    ),
    right=r"""
# %% two loops, and base e
@@
-        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
+        scores = (
+            tl.dot(query, tl.trans(key), input_precision="ieee")
+            * scale_log2
+            * 0.6931471805599453
+        )
@@
-        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
+        rescale, weights = tl.exp(m - new), tl.exp(scores - new[:, None])

# %% acc inside of the dot, ceil-divided loop
@@
-    for first in range(0, end, BLOCK_N):
+    for j in range(0, tl.cdiv(end, BLOCK_N)):
+        first = j * BLOCK_N
@@
-        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
+        acc = tl.dot(weights, value, acc * rescale[:, None], input_precision="ieee")
""",
)
