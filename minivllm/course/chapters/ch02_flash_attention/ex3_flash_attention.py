"""02.3: flash attention, tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch02_flash_attention.common import (
    exact,
    the_inputs,
    the_suspects,
    the_watch,
)
from minivllm.course.grading.exercise import Exercise, Known


def _expect_tiles(answer: Callable, dim: int, block: int) -> None:
    """An answer that is right must not hold the matrix, nor multiply tiles that nobody sees."""
    from minivllm.viz.tiles import attention_tiles

    queries, keys = 64, 1024
    seen = the_watch(answer, *the_inputs(queries, keys, dim, 99), block, block)
    expect(
        not seen.fused,
        "done-by-torch",
        "The result is right, but scaled_dot_product_attention made it.\nHere you build what stands"
        " behind it.",
    )
    expect(
        seen.largest < queries * keys,
        "whole-matrix",
        f"The result is right, but a tensor of {seen.largest:,} numbers was made on the way: for"
        f" {queries} queries and {keys:,} keys that is the whole matrix (masks count, too).\nHold"
        f" one tile of scores, {block} × {block}, at a time.",
    )
    limit = keys * dim  # all keys, which are given
    expect(
        seen.largest <= limit,
        "whole-rows",
        f"The result is right, but a tensor of {seen.largest:,} numbers was made on the way:"
        f" {block} queries against all {keys:,} keys.\nThe keys come in tiles, too, with a running"
        f" maximum and sum: {block} × {block} scores at a time.",
    )
    queries = keys = 128
    counts = attention_tiles(queries, keys, block, block).counts
    computed, tile_flops = counts["full"] + counts["masked"], 4 * block * block * dim
    flops = the_watch(answer, *the_inputs(queries, keys, dim, 98), block, block).flops
    expect(
        flops <= computed * tile_flops,
        "visits-the-future",
        f"The result is right, but matrix products of {flops / tile_flops:.0f} tiles were computed,"
        f" and only {computed} of {counts.total()} hold a pair that counts.\nA walk ends at the"
        " diagonal: at the position of the tile's last query.",
    )


def check_flash_attention(answer: Callable) -> str:
    shapes = [
        # queries, keys, dim, block_m, block_n
        (1, 1, 4, 16, 16),
        (4, 4, 8, 16, 16),
        (16, 16, 8, 16, 16),
        (32, 32, 8, 16, 16),
        (33, 33, 16, 16, 16),
        (1, 40, 8, 16, 16),
        (7, 40, 8, 16, 16),
        (20, 61, 16, 8, 16),
        (48, 48, 16, 16, 8),
        (17, 50, 8, 4, 32),
        (9, 9, 8, 1, 1),
    ]
    cases = [(*the_inputs(q, n, d, seed), m, b) for seed, (q, n, d, m, b) in enumerate(shapes)]
    cases += [
        (*the_inputs(24, 40, 8, 50, size=5.0), 8, 8),
        (*the_inputs(4, 30, 8, 51, spread=60.0), 16, 8),
    ]
    query, key, value, _ = the_inputs(5, 21, 8, 52)
    cases += [(query, key, value, 1.0, 4, 8), (query * 0, key, value, 0.3, 2, 4)]

    def right(query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int) -> Any:
        return exact(query, key, value, scale)

    number = diagnose(answer, cases, right, the_suspects(), rtol=1e-3, atol=2e-4)
    _expect_tiles(answer, dim=8, block=16)
    return f"{number} cases; one tile of scores at a time, and none in vain"


EXERCISE = Exercise(
    id="02.3",
    title="Flash attention, tile by tile",
    check=check_flash_attention,
    mistakes=(
        Known(
            "aligned-to-start",
            hint=2,
            answers=r"""
# %% no past in mask and walk
@@
-    past, out = len(key) - len(query), torch.empty_like(query)
+    past, out = 0, torch.empty_like(query)
""",
        ),
        Known(
            "walk-ends-too-early",
            hint=2,
            answers=r"""
# %% the mask knows of the past, the walk does not
@@
-            past + int(rows[-1]) + 1
+            int(rows[-1]) + 1
""",
        ),
        Known(
            "no-scale",
            answers=r"""
# %% the constant for base two without scale
@@
-        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
+        tile = query[rows] * math.log2(math.e)  # scores in base two
""",
        ),
        Known(
            "scaled-twice",
            answers=r"""
# %% with the query, and again with the scores
@@
-            scores = tile @ key[columns].T
+            scores = tile @ key[columns].T * scale
""",
        ),
        Known(
            "no-log2e",
            answers=r"""
# %% exp2 with the scale for exp
@@
-        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
+        tile = query[rows] * scale  # scores in base two
""",
        ),
        Known(
            "exp-of-base-two-scores",
            answers=r"""
# %% exp of scores for base two
@@
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
+            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
""",
        ),
        Known(
            "mixed-bases",
            answers=r'''
# %% the rescaling stays in base e
@@
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
+            rescale, weights = torch.exp(m - new), torch.exp2(scores - new[:, None])

# %% base e, and the rescaling in base two
@@
-        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
+        tile = query[rows] * scale  # scores in base two
@@
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
+            rescale, weights = torch.exp2(m - new), torch.exp(scores - new[:, None])

# %% natural scores, weights in base two, rescaling in base e
@@
-    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
@@
-        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
+        tile = query[rows] * scale
@@
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
+            rescale, weights = torch.exp(m - new), torch.exp2(scores - new[:, None])

# %% scores in base two, weights in base e, rescaling in base two
@@
-    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
@@
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
+            rescale, weights = torch.exp2(m - new), torch.exp(scores - new[:, None])
''',
        ),
        Known(
            "sum-not-rescaled",
            answers=r"""
# %% only acc is
@@
-            l = l * rescale + weights.sum(dim=1)
+            l = l + weights.sum(dim=1)
""",
        ),
        Known(
            "output-not-rescaled",
            answers=r"""
# %% only l is
@@
-            acc = acc * rescale[:, None] + weights @ value[columns]
+            acc = acc + weights @ value[columns]
""",
        ),
        Known(
            "not-rescaled",
            hint=3,
            answers=r"""
# %% neither is
@@
-            acc = acc * rescale[:, None] + weights @ value[columns]
-            l = l * rescale + weights.sum(dim=1)
+            acc = acc + weights @ value[columns]
+            l = l + weights.sum(dim=1)
""",
        ),
        Known(
            "tile-under-its-own-maximum",
            answers=r"""
# %% scores - scores.amax
@@
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
+            rescale, weights = (
+                torch.exp2(m - new),
+                torch.exp2(scores - scores.amax(dim=1, keepdim=True)),
+            )
""",
        ),
        Known(
            "not-divided",
            hint=3,
            answers=r"""
# %% returns acc
@@
-        out[rows] = acc / l[:, None]
+        out[rows] = acc
""",
        ),
        Known(
            "divided-in-each-tile",
            hint=3,
            answers=r"""
# %% normalised at once
@@
-        out[rows] = acc / l[:, None]
+            acc = acc / l[:, None]
+        out[rows] = acc
""",
        ),
        Known(
            "diagonal-not-masked",
            hint=3,
            answers=r"""
# %% stops at the diagonal and thinks that is enough
@@
-            if columns[-1] > past + top:  # on the diagonal
-                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
""",
        ),
        Known(
            "indices-within-the-tile",
            hint=3,
            answers=r"""
# %% torch.triu of the tile
@@
-            if columns[-1] > past + top:  # on the diagonal
-                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+            scores = scores.masked_fill(
+                torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf
+            )
""",
        ),
        Known(
            "mask-of-the-first-query",
            hint=3,
            answers=r"""
# %% one position for the tile
@@
-                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+                scores = scores.masked_fill(columns > past + top, -math.inf)
""",
        ),
        Known(
            "hides-its-own-token",
            answers=r"""
# %% >= for >
@@
-            if columns[-1] > past + top:  # on the diagonal
-                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+            if columns[-1] >= past + top:  # on the diagonal
+                scores = scores.masked_fill(columns >= past + rows[:, None], -math.inf)
""",
        ),
        Known(
            "sees-the-next-token",
            answers=r"""
# %% one too many
@@
-                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+                scores = scores.masked_fill(
+                    columns > past + rows[:, None] + 1, -math.inf
+                )
""",
        ),
        Known(
            "maximum-starts-at-zero",
            answers=r"""
# %% zeros for everything
@@
-        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
+        m, l = torch.zeros(len(rows)), torch.zeros(len(rows))
""",
        ),
        Known(
            "rescaled-the-wrong-way",
            answers=r"""
# %% new - m for m - new
@@
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
+            rescale, weights = torch.exp2(new - m), torch.exp2(scores - new[:, None])
""",
        ),
        Known(
            "maximum-not-kept",
            hint=3,
            answers=r"""
# %% m = new is missing
@@
-            m = new
""",
        ),
        Known(
            "straddling-tile-not-masked",
            hint=3,
            answers=r"""
# %% masked from the tile on that begins at the diagonal
@@
-            if columns[-1] > past + top:  # on the diagonal
+            if first >= past + top:  # on the diagonal
""",
        ),
        Known(
            "hidden-scores-are-zero",
            answers=r"""
# %% multiplies with the mask
@@
-                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+                scores = scores * (columns <= past + rows[:, None])
""",
        ),
        Known(
            "one-maximum-for-all-rows",
            answers=r"""
# %% the tile's largest score
@@
-            new = torch.maximum(m, scores.amax(dim=1))
+            new = torch.maximum(m, scores.amax())
""",
        ),
        Known(
            "stops-before-the-diagonal",
            hint=2,
            answers=r"""
# %% only the tiles before
@@
-            past + int(rows[-1]) + 1
+            (past + top) // block_n * block_n
""",
        ),
        Known(
            "tail-dropped",
            hint=2,
            answers=r"""
# %% whole tiles only
@@
-        for first in range(0, end, block_n):
-            columns = torch.arange(first, min(first + block_n, end))
+        for j in range(end // block_n):
+            columns = torch.arange(j * block_n, (j + 1) * block_n)
""",
        ),
        Known(
            "a-softmax-for-each-tile",
            answers=r"""
# %% torch.softmax of each tile, added up
@@
-            new = torch.maximum(m, scores.amax(dim=1))
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
-            acc = acc * rescale[:, None] + weights @ value[columns]
-            l = l * rescale + weights.sum(dim=1)
-            m = new
-        out[rows] = acc / l[:, None]
+            acc = (
+                acc + torch.softmax(scores / math.log2(math.e), dim=1) @ value[columns]
+            )
+        out[rows] = acc
""",
        ),
        Known(
            "visits-the-future",
            hint=2,
            answers=r"""
# %% walks to the end of the context
@@
-        end = (
-            past + int(rows[-1]) + 1
-        )  # behind the last key that the last of these queries sees
+        end = len(key)  # behind the last key that the last of these queries sees
""",
        ),
        Known(
            "whole-matrix",
            answers=r"""
# %% the naive way, and it is right
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    block_m: int = 16,
    block_n: int = 16,
) -> torch.Tensor:
    hidden = (
        torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
    )
    return (query @ key.T * scale).masked_fill(hidden, -math.inf).softmax(-1) @ value

# %% tiles of scores, and the mask of all tokens
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    block_m: int = 16,
    block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    hidden = torch.ones(len(query), len(key), dtype=torch.bool).triu(past + 1)
    for top in range(0, len(query), block_m):
        rows = slice(top, min(top + block_m, len(query)))
        acc, m, l = 0.0, torch.full((rows.stop - top, 1), -math.inf), 0.0
        for first in range(0, past + rows.stop, block_n):
            tile = slice(first, first + block_n)
            scores = (query[rows] @ key[tile].T * scale).masked_fill(
                hidden[rows, tile], -math.inf
            )
            new = torch.maximum(m, scores.amax(1, keepdim=True))
            weights, rescale, m = torch.exp(scores - new), torch.exp(m - new), new
            acc, l = (
                acc * rescale + weights @ value[tile],
                l * rescale + weights.sum(1, keepdim=True),
            )
        out[rows] = acc / l
    return out
""",
        ),
        Known(
            "whole-rows",
            answers=r"""
# %% tiles of queries against all keys
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    block_m: int = 16,
    block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        end = past + int(rows[-1]) + 1
        scores = query[rows] @ key[:end].T * scale
        scores = scores.masked_fill(torch.arange(end) > past + rows[:, None], -math.inf)
        out[rows] = scores.softmax(-1) @ value[:end]
    return out
""",
        ),
        Known(
            "done-by-torch",
            answers=r"""
# %% what torch has
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    block_m: int = 16,
    block_n: int = 16,
) -> torch.Tensor:
    hidden = (
        torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
    )
    return torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=~hidden, scale=scale
    )[0]
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% scales the caller's query
@@
     past, out = len(key) - len(query), torch.empty_like(query)
+    query *= scale * math.log2(math.e)
@@
-        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
+        tile = query[rows].mul_(1.0)
""",
        ),
    ),
    right=r"""
# %% base e, all tiles masked, -1e30 for -inf
@@
-        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
+        tile = query[rows] * scale  # scores in base two
@@
-            if columns[-1] > past + top:  # on the diagonal
-                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+            scores = scores.masked_fill(columns > past + rows[:, None], -1e30)
@@
-            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
+            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])

# %% slices, columns of m and l, padded tiles
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    block_m: int = 16,
    block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    dim = query.shape[1]
    for top in range(0, len(query), block_m):
        count = min(block_m, len(query) - top)
        tile = torch.zeros(block_m, dim)
        tile[:count] = query[top : top + count] * scale
        acc, m, l = (
            torch.zeros(block_m, dim),
            torch.full((block_m, 1), -math.inf),
            torch.zeros(block_m, 1),
        )
        for first in range(0, past + top + count, block_n):
            k, v = torch.zeros(block_n, dim), torch.zeros(block_n, dim)
            there = min(block_n, len(key) - first)
            k[:there], v[:there] = (
                key[first : first + there],
                value[first : first + there],
            )
            visible = (
                torch.arange(first, first + block_n)
                <= torch.arange(past + top, past + top + block_m)[:, None]
            )
            scores = torch.where(visible, tile @ k.T, -math.inf)
            new = torch.maximum(m, scores.max(dim=1, keepdim=True).values)
            rescale, weights = (m - new).exp(), (scores - new).exp()
            acc, l, m = (
                acc * rescale + weights @ v,
                l * rescale + weights.sum(1, keepdim=True),
                new,
            )
        out[top : top + count] = (acc / l)[:count]
    return out

# %% the full tiles first, then the diagonal, with einsum
def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    block_m: int = 16,
    block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.zeros_like(query)

    def add(state, rows, first, last, masked):
        acc, m, l = state
        scores = torch.einsum("md,nd->mn", query[rows], key[first:last]) * scale
        if masked:
            scores[
                torch.arange(first, last)[None, :] > (past + rows)[:, None]
            ] = -math.inf
        new = torch.maximum(m, scores.amax(1))
        weights, rescale = torch.exp(scores - new[:, None]), torch.exp(m - new)
        return (
            rescale[:, None] * acc
            + torch.einsum("mn,nd->md", weights, value[first:last]),
            new,
            l * rescale + weights.sum(1),
        )

    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        state = (
            torch.zeros(len(rows), query.shape[1]),
            torch.full((len(rows),), -math.inf),
            torch.zeros(len(rows)),
        )
        diagonal = (past + top + 1) // block_n * block_n
        for first in range(0, diagonal, block_n):
            state = add(state, rows, first, first + block_n, masked=False)
        for first in range(diagonal, past + int(rows[-1]) + 1, block_n):
            state = add(state, rows, first, min(first + block_n, len(key)), masked=True)
        out[rows] = state[0] / state[2][:, None]
    return out
""",
)
