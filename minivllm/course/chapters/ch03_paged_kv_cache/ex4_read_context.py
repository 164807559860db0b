"""03.4: debug this: right for months."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch03_paged_kv_cache.common import (
    SIZES,
    judge,
    pages,
)
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import counted, expect_nothing_kept, one_by_one
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

#: (first token of the tile, token, tile, block size) -> the table's entry, or the offset.
Place = Callable[[int, int, int, int], int]


def _case(
    context: int, size: int, tile: int, shape: tuple[int, int] = (2, 4), seed: int = 0
) -> tuple:
    """Arguments of read_context. shape: KV heads and head_dim."""
    kv_heads, dim = shape
    # The table has as many entries as a wrong reader may ask for.
    k_cache, _, table, _ = pages(
        [context, 9], (kv_heads, size, dim), seed or context, width=2 * context
    )
    return k_cache, table[0], context, tile


def _cases() -> list[tuple]:
    sizes = [
        # context, block size, tile
        (1, 4, 4),
        (5, 4, 64),
        (16, 16, 16),
        (45, 16, 16),
        (27, 8, 4),
        (20, 8, 8),
        (21, 4, 1),
        (37, 4, 16),
        (30, 8, 12),
        (25, 8, 5),
        (64, 16, 32),
        (41, 16, 6),
        (31, 7, 9),
        (300, 12, 16),
        (520, 64, 16),
        (130, 48, 20),
        (4500, 16, 64),
    ]
    cases = [_case(context, size, tile) for context, size, tile in sizes]
    k_cache, *more = _case(18, 8, 4)
    low = (k_cache.bfloat16(), *more)
    return [*cases, _case(26, 6, 4, (3, 5)), _case(19, 16, 8, (1, 3)), low]


def _reader(block: Place, offset: Place, *, whole: bool = False, smaller: bool = False) -> Callable:
    """A reader. whole: reads the last tile to its end. smaller: tiles no larger than a block."""

    def read(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
        import torch

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


def _right(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    import torch

    tokens, size = torch.arange(context), cache.shape[2]
    return cache[table.long()[tokens // size], :, tokens % size]


def _in_order(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    import torch

    return _right(cache, torch.arange(len(table)), context, tile)


def _in_blocks_of(size_of: Callable[[torch.Size], int], block: bool, offset: bool) -> Callable:
    """Blocks of another size: for the table's entry, for the offset, or for both."""

    def read(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
        other = size_of(cache.shape)
        return _reader(
            lambda f, p, t, s: p // (other if block else s),
            lambda f, p, t, s: p % (other if offset else s),
        )(cache, table, context, tile)

    return read


_SIZES = [lambda shape, n=n: n for n in SIZES]
_SIZES += [lambda shape, axis=axis: shape[axis] for axis in (0, 1, 3)]


def _rows_of(*orders: tuple[int, ...]) -> list[Callable]:
    """The right rows, with their dimensions in another order."""

    def reader(order: tuple[int, ...]) -> Callable:
        return lambda cache, table, context, tile: _right(cache, table, context, tile).permute(
            order
        )

    return [reader(order) for order in orders]


def _decode_with(read_context: Callable) -> Callable:
    """The colleague's decode attention, for the engine."""
    import torch

    def decode(
        query: Any,
        k_cache: Any,
        v_cache: Any,
        block_table: Any,
        seq_lens: Any,
        scale: float,
        **limits: Any,
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for i, context in enumerate(seq_lens.tolist()):
            k, v = (
                read_context(cache, block_table[i], context, 16) for cache in (k_cache, v_cache)
            )
            k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (k, v))
            weights = torch.softmax(torch.einsum("hd,nhd->hn", query[i], k) * scale, dim=-1)
            out[i] = torch.einsum("hn,nhd->hd", weights, v)
        return out

    return decode


def check_read_context(answer: Callable) -> str:
    """Judge an answer to 03.4."""
    from minivllm.kernels import Kernels

    number = judge(answer, _cases(), _right, EXERCISE.suspects)
    first, second = _case(22, 8, 4, seed=51), (*_case(22, 8, 4, seed=52)[:2], 20, 8)
    what = "another request has come, with other blocks"
    expect_nothing_kept(answer, one_by_one(first, second), _right, what)
    mine = counted(answer)
    kernels = replace(Kernels.reference(), decode_attention=_decode_with(mine))
    line = engine_agrees(mine, kernels=kernels, block_size=64)
    return f"{number} pairs of tile and block; in blocks of 64, {line}"


EXERCISE = Exercise(
    id="03.4",
    title="Debug this: right for months",
    check=check_read_context,
    mistakes=(
        Known(
            "wrong-dtype",
            answers=r"""
# %% float32, whatever the cache holds
@@
-    return torch.stack(rows)
+    return torch.stack(rows).float()
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% one slot too far from the thousandth token on
@@
-            rows.append(cache[table[token // size], :, token % size])
+            late = token >= 1000
+            rows.append(cache[table[token // size], :, (token + late) % size])
""",
        ),
        Known(
            "tile-taken-for-a-block",
            "It reads as if a tile were a block: right as long as both are 16.\nLook at the"
            " picture: which slots of its own blocks are read, and which others? The block size is"
            " cache.shape[2].",
            hint=1,
            suspects=(
                _reader(lambda f, p, t, s: f // t, lambda f, p, t, s: p % t),
                _reader(lambda f, p, t, s: p // t, lambda f, p, t, s: p % t),
            ),
            answers=r"""
# %% as it was
def read_context(
    cache: torch.Tensor, table: torch.Tensor, context: int, tile: int
) -> torch.Tensor:
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
            "The offset is right now, but the table is still asked for tile number first //"
            " tile.\nEntries of a table stand for blocks: token // block_size.",
            hint=2,
            suspects=(
                _reader(lambda f, p, t, s: f // t, lambda f, p, t, s: p % s),
                _reader(lambda f, p, t, s: p // t, lambda f, p, t, s: p % s),
            ),
            answers=r"""
# %% the offset mended, the look-up not
@@
-            rows.append(cache[table[token // size], :, token % size])
+            rows.append(cache[table[first // tile], :, token % size])
""",
        ),
        Known(
            "offset-in-tiles",
            "The block is right now, but the offset is still counted in tiles.\nA token lies at"
            " offset token % block_size.",
            hint=2,
            suspects=(
                _reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p % t),
                _reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % t),
                _reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p - f),
            ),
            answers=r"""
# %% the look-up mended, the offset not
@@
-            rows.append(cache[table[token // size], :, token % size])
+            rows.append(cache[table[token // size], :, token % tile])

# %% the offset counted from the tile's first token
@@
-            rows.append(cache[table[token // size], :, token % size])
+            rows.append(cache[table[token // size], :, token - first])
""",
        ),
        Known(
            "one-look-up-a-tile",
            "You look up one block for a whole tile. That is right while a tile lies inside a"
            " block; a larger tile, or one that does not divide the block, reaches into the"
            " next.\nLook up table[token // size] for each token.",
            hint=3,
            suspects=(
                _reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % s),
                _reader(lambda f, p, t, s: f // s, lambda f, p, t, s: f % s + p - f),
                _reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % s, smaller=True),
                _reader(lambda f, p, t, s: f // s, lambda f, p, t, s: f % s + p - f, smaller=True),
            ),
            answers=r"""
# %% right as long as a tile lies inside a block
@@
-            rows.append(cache[table[token // size], :, token % size])
+            rows.append(cache[table[first // size], :, token % size])

# %% steps that are no larger than a block
@@
-    for first in range(0, context, tile):
+    tile = min(tile, size)
+    for first in range(0, context, tile):
@@
-            rows.append(cache[table[token // size], :, token % size])
+            rows.append(cache[table[first // size], :, token % size])
""",
        ),
        Known(
            "wrong-block-size",
            "Your blocks have another size than the cache's.\nIt is cache.shape[2]: the cache is"
            " [num_blocks, KH, block_size, D].",
            hint=3,
            suspects=tuple(
                _in_blocks_of(size, block, offset)
                for block, offset in ((True, True), (True, False), (False, True))
                for size in _SIZES
            ),
            answers=r"""
# %% 16
@@
-    size = cache.shape[2]
+    size = 16

# %% the number of KV heads
@@
-    size = cache.shape[2]
+    size = cache.shape[1]
""",
        ),
        Known(
            "table-ignored",
            "You read blocks 0, 1, 2 …, as if a request's blocks lay in order.\nEntry token //"
            " block_size of the table says which block it is.",
            hint=2,
            suspects=(_in_order,),
            answers=r"""
# %% the block's number is not looked up
@@
-            rows.append(cache[table[token // size], :, token % size])
+            rows.append(cache[token // size, :, token % size])
""",
        ),
        Known(
            "whole-tiles",
            "The last tile is read to its end, beyond the context.\nStop at min(first + tile,"
            " context).",
            suspects=(_reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p % s, whole=True),),
            answers=r"""
# %% reads the last tile to its end
@@
-        for token in range(first, min(first + tile, context)):
+        for token in range(first, first + tile):
""",
        ),
        Known(
            "whole-blocks",
            "The last block is read to its end, beyond the context.\nStop at the context: the"
            " result has `context` rows.",
            suspects=(
                lambda cache, table, context, tile: _right(
                    cache, table, -(-context // cache.shape[2]) * cache.shape[2], tile
                ),
            ),
            answers=r"""
# %% block by block
@@
-    for first in range(0, context, tile):
-        for token in range(first, min(first + tile, context)):
+    for first in range(0, context, size):
+        for token in range(first, first + size):
""",
        ),
        Known(
            "last-tile-missing",
            "The tokens behind the last whole tile are left out.\nThe last tile may be shorter:"
            " range(0, context, tile), up to min(first + tile, context).",
            suspects=(
                lambda cache, table, context, tile: _right(
                    cache, table, context // tile * tile, tile
                ),
            ),
        ),
        Known(
            "heads-first",
            "The rows are right, but their dimensions are in another order.\nThe result is"
            " [context, KH, D]: cache[block, :, offset] is one token's [KH, D].",
            suspects=(*_rows_of((1, 0, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)),),
            answers=r"""
# %% [KH, context, D]
@@
-    return torch.stack(rows)
+    return torch.stack(rows, dim=1)
""",
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
