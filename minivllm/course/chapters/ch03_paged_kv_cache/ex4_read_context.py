"""03.4: debug this: right for months."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.judges import counted
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch03_paged_kv_cache.common import SIZES, the_diagnose, the_pages
from minivllm.course.grading.exercise import Exercise, Known


def check_read_context(answer: Callable) -> str:
    import torch

    from minivllm.kernels import Kernels

    def case(context: int, size: int, tile: int, kv_heads: int = 2) -> tuple:
        # As many entries as a wrong reader may ask for.
        k_cache, _, table, _ = the_pages(
            [context, 9], kv_heads, 4, size, seed=context, width=2 * context
        )
        return k_cache, table[0], context, tile

    cases = [
        case(1, 4, 4),
        case(16, 16, 16),
        case(45, 16, 16),
        case(27, 8, 4),
        case(20, 8, 8),
        case(21, 4, 1),
        case(37, 4, 16),
        case(30, 8, 12),
        case(25, 8, 5),
        case(64, 16, 32),
        case(41, 16, 6),
    ]

    def reader(
        block: Callable, offset: Callable, whole: bool = False, smaller: bool = False
    ) -> Callable:
        def read(cache, table, context: int, tile: int) -> torch.Tensor:
            size, rows = cache.shape[2], []
            tile = min(tile, size) if smaller else tile
            for first in range(0, context, tile):
                last = first + tile if whole else min(first + tile, context)
                rows += [
                    cache[table[block(first, p, tile, size)], :, offset(first, p, tile, size)]
                    for p in range(first, last)
                ]
            return torch.stack(rows)

        return read

    def right(cache, table, context: int, tile: int) -> torch.Tensor:
        size = cache.shape[2]
        return torch.stack([cache[table[p // size], :, p % size] for p in range(context)])

    suspects = {
        "tile-taken-for-a-block": (
            (
                "It reads as if a tile were a block: right as long as both are 16.\nLook at the"
                " picture: which slots of its own blocks are read, and which others? The block size"
                " is cache.shape[2]."
            ),
            reader(lambda f, p, t, s: f // t, lambda f, p, t, s: p % t),
            reader(lambda f, p, t, s: p // t, lambda f, p, t, s: p % t),
        ),
        "look-up-in-tiles": (
            (
                "The offset is right now, but the table is still asked for tile number first //"
                " tile.\nEntries of a table stand for blocks: token // block_size."
            ),
            reader(lambda f, p, t, s: f // t, lambda f, p, t, s: p % s),
            reader(lambda f, p, t, s: p // t, lambda f, p, t, s: p % s),
        ),
        "offset-in-tiles": (
            (
                "The block is right now, but the offset is still counted in tiles.\nA token lies at"
                " offset token % block_size."
            ),
            reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p % t),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % t),
            reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p - f),
        ),
        "one-look-up-a-tile": (
            (
                "You look up one block for a whole tile. That is right while a tile lies inside a"
                " block; a larger tile, or one that does not divide the block, reaches into the"
                " next.\nLook up table[token // size] for each token."
            ),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % s),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: f % s + p - f),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % s, smaller=True),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: f % s + p - f, smaller=True),
        ),
        "wrong-block-size": (
            (
                "Your blocks have another size than the cache's.\nIt is cache.shape[2]: the cache"
                " is [num_blocks, KH, block_size, D]."
            ),
            *(
                reader(lambda f, p, t, s, n=n: p // n, lambda f, p, t, s, n=n: p % n) for n in SIZES
            ),  # KH is 2, D is 4
            *(reader(lambda f, p, t, s, n=n: p // n, lambda f, p, t, s: p % s) for n in SIZES),
            *(reader(lambda f, p, t, s: p // s, lambda f, p, t, s, n=n: p % n) for n in SIZES),
        ),
        "whole-tiles": (
            (
                "The last tile is read to its end, beyond the context.\nStop at min(first + tile,"
                " context)."
            ),
            reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p % s, whole=True),
        ),
    }
    the_diagnose(answer, cases, right, suspects)
    mine = counted(answer)

    def decode(
        query, k_cache, v_cache, block_table, seq_lens, scale, **limits: Any
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for i, context in enumerate(seq_lens.tolist()):
            k, v = (mine(cache, block_table[i], context, 16) for cache in (k_cache, v_cache))
            k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (k, v))
            weights = torch.softmax(torch.einsum("hd,nhd->hn", query[i], k) * scale, dim=-1)
            out[i] = torch.einsum("hn,nhd->hd", weights, v)
        return out

    kernels = replace(Kernels.reference(), decode_attention=decode)
    line = engine_agrees(mine, kernels=kernels, block_size=64)
    return f"{len(cases)} pairs of tile and block; in blocks of 64, {line}"


EXERCISE = Exercise(
    id="03.4",
    title="Debug this: right for months",
    check=check_read_context,
    mistakes=(
        Known(
            "tile-taken-for-a-block",
            hint=1,
            answers=r"""
# %% as it was
def read_context(
    cache: torch.Tensor, table: torch.Tensor, context: int, tile: int
) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // tile]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % tile])
    return torch.stack(rows)
""",
        ),
        Known(
            "look-up-in-tiles",
            hint=2,
            answers=r"""
# %% the offset mended, the look-up not
def read_context(
    cache: torch.Tensor, table: torch.Tensor, context: int, tile: int
) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // tile]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % size])
    return torch.stack(rows)
""",
        ),
        Known(
            "offset-in-tiles",
            hint=2,
            answers=r'''
# %% the look-up mended, the offset not
@@
-    """A request's rows, tile by tile: cache [num_blocks, KH, block_size, D] -> [context, KH, D]."""
@@
-            rows.append(cache[table[token // size], :, token % size])
+            rows.append(cache[table[token // size], :, token % tile])

# %% the offset counted from the tile's first token
@@
-    """A request's rows, tile by tile: cache [num_blocks, KH, block_size, D] -> [context, KH, D]."""
@@
-            rows.append(cache[table[token // size], :, token % size])
+            rows.append(cache[table[token // size], :, token - first])
''',
        ),
        Known(
            "one-look-up-a-tile",
            hint=3,
            answers=r"""
# %% right as long as a tile lies inside a block
def read_context(
    cache: torch.Tensor, table: torch.Tensor, context: int, tile: int
) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // size]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % size])
    return torch.stack(rows)

# %% with a running offset
def read_context(
    cache: torch.Tensor, table: torch.Tensor, context: int, tile: int
) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // size]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, first % size + token - first])
    return torch.stack(rows)

# %% steps that are no larger than a block
def read_context(
    cache: torch.Tensor, table: torch.Tensor, context: int, tile: int
) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    tile = min(tile, size)
    for first in range(0, context, tile):
        block = table[first // size]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % size])
    return torch.stack(rows)
""",
        ),
        Known(
            "whole-tiles",
            answers=r'''
# %% reads the last tile to its end
@@
-    """A request's rows, tile by tile: cache [num_blocks, KH, block_size, D] -> [context, KH, D]."""
@@
-        for token in range(first, min(first + tile, context)):
+        for token in range(first, first + tile):
''',
        ),
        Known(
            "wrong-block-size",
            hint=3,
            answers=r'''
# %% 16
@@
-    """A request's rows, tile by tile: cache [num_blocks, KH, block_size, D] -> [context, KH, D]."""
-    size = cache.shape[2]
+    size = 16

# %% the number of KV heads
@@
-    """A request's rows, tile by tile: cache [num_blocks, KH, block_size, D] -> [context, KH, D]."""
-    size = cache.shape[2]
+    size = cache.shape[1]
''',
        ),
    ),
    right=r"""
# %% a tile is made as large as a block
def read_context(
    cache: torch.Tensor, table: torch.Tensor, context: int, tile: int
) -> torch.Tensor:
    tile = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // tile]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % tile])
    return torch.stack(rows)

# %% a tile at once, vectorised
def read_context(
    cache: torch.Tensor, table: torch.Tensor, context: int, tile: int
) -> torch.Tensor:
    size, rows = cache.shape[2], []
    for first in range(0, context, tile):
        tokens = torch.arange(first, min(first + tile, context))
        rows.append(cache[table[tokens // size], :, tokens % size])
    return torch.cat(rows)
""",
)
