"""02.6: the walk in Triton."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.guard import BEYOND, guard, guarded
from minivllm.course.grading.judges import expect, expect_triton

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch02_flash_attention.common import (
    LOG2E,
    exact,
    the_inputs,
    the_suspects,
)
from minivllm.course.grading.exercise import Exercise, Known


def check_flash_kernel(answer: Any) -> str:
    import torch

    expect_triton("Exercise 02.3 is the same walk in torch.")
    shapes = [
        # queries, keys, dim, block_m, block_n
        (16, 16, 16, 16, 16),
        (1, 1, 16, 16, 16),
        (5, 5, 16, 16, 16),
        (32, 32, 16, 16, 16),
        (33, 33, 16, 16, 16),
        (7, 40, 32, 16, 32),
        (20, 61, 16, 16, 16),
        (40, 40, 16, 32, 16),
        (17, 64, 16, 16, 32),
    ]
    made = [(the_inputs(q, n, d, 200 + seed), m, b) for seed, (q, n, d, m, b) in enumerate(shapes)]
    made += [
        (the_inputs(20, 40, 16, 250, size=4.0), 16, 16),
        (the_inputs(4, 30, 16, 251, spread=60.0), 16, 16),
    ]
    query, key, value, _ = the_inputs(9, 20, 16, 252)
    made.append(((query, key, value, 1.0), 16, 16))
    cases = [
        (guarded(*q.shape), guard(q), guard(k), guard(v), scale, m, n)
        for (q, k, v, scale), m, n in made
    ]

    def launch(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        grid = (-(-len(query) // block_m),)
        constants = {"D": query.shape[1], "BLOCK_M": block_m, "BLOCK_N": block_n}
        answer[grid](out, query, key, value, len(query), len(key), scale * LOG2E, **constants)

    def right(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        out.copy_(exact(query, key, value, scale))

    def written(walk: Callable) -> Callable:
        def run(
            out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
        ) -> None:
            out.copy_(walk(query, key, value, scale, block_m, block_n))

        return run

    def beyond(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        out.copy_(exact(query, key, value, scale))
        for top in range(0, len(query), block_m):
            seen = len(key) - len(query) + min(top + block_m, len(query))
            if -(-seen // block_n) * block_n > len(key):
                out[top : top + block_m] = math.nan

    def first_program(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        out[:block_m] = exact(query, key, value, scale)[:block_m]

    suspects = {
        "reads-beyond-the-keys": (
            (
                "Where the last tile of keys is not full, its rows beyond N are read: poison here,"
                " nan. A weight of 0 does not help, for 0 · nan is nan.\nLoad key AND value with"
                " mask=(…< N)[:, None] and other=0.0."
            ),
            beyond,
        ),
        "program-id-ignored": (
            (
                "Only the first BLOCK_M queries have a result; the other programs did the same ones"
                " again.\nProgram p does the queries from p · BLOCK_M on: tl.program_id(0)."
            ),
            first_program,
        ),
        **the_suspects(written, also="padded-keys"),
    }
    store = (
        "The last tile of queries may stick out: its rows from Q on do not exist. tl.store needs"
        " the mask that loaded them, (rows < Q)[:, None]."
    )
    number = diagnose(
        launch, cases, right, suspects, writes=(0,), wording={BEYOND: store}, rtol=1e-3, atol=2e-4
    )

    # The first tile of a prompt of three, where keys that it must not visit are nan.
    query, key, value, scale = the_inputs(48, 48, 16, 260)
    expected = exact(query, key, value, scale)[:16]
    key[16:], value[16:], out = math.nan, math.nan, guarded(48, 16)
    answer[(1,)](
        out,
        guard(query),
        guard(key),
        guard(value),
        48,
        48,
        scale * LOG2E,
        D=16,
        BLOCK_M=16,
        BLOCK_N=16,
    )
    expect(
        torch.allclose(out[:16], expected, rtol=1e-3, atol=2e-4),
        "visits-the-future",
        "The result is right, but tiles are visited that hold nothing but the future (here they are"
        " nan, which shows).\nEnd the loop at the position after the tile's last query, N - Q +"
        " (program + 1) · BLOCK_M, or at N.",
    )
    return f"{number} cases, ragged at both ends, and no tile in vain"


EXERCISE = Exercise(
    id="02.6",
    title="The walk in Triton",
    check=check_flash_kernel,
    mistakes=(
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
            hint=2,
            answers=r"""
# %% no mask for keys and values
@@
-        key = tl.load(key_ptr + places, mask=inside, other=0.0)
-        value = tl.load(value_ptr + places, mask=inside, other=0.0)
+        key = tl.load(key_ptr + places)
+        value = tl.load(value_ptr + places)

# %% no mask for the values: their weight is 0 anyway
@@
-        value = tl.load(value_ptr + places, mask=inside, other=0.0)
+        value = tl.load(value_ptr + places)
""",
        ),
        Known(
            "out-of-bounds-write",
            answers=r"""
# %% no mask at the store
@@
-    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])
+    tl.store(out_ptr + query_places, acc / l[:, None])
""",
        ),
        Known(
            "program-id-ignored",
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
