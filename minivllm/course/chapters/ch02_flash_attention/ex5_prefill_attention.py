"""02.5: your attention reads for the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import Suspects, diagnose
from minivllm.course.grading.guard import guarded
from minivllm.course.grading.judges import counted, expect, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch02_flash_attention.common import (
    INF,
    WALKS,
    exact,
    the_walk,
    the_watch,
)
from minivllm.course.grading.exercise import Exercise, Known

#: What depends on where tiles begin.
_TILE_BY_TILE = {
    "stops-before-the-diagonal",
    "stops-one-short",
    "past-not-visited",
    "straddling-tile-not-masked",
    "indices-within-the-tile",
    "mixed-bases",
    "not-rescaled",
    "maximum-not-kept",
    "sum-not-rescaled",
    "output-not-rescaled",
    "tile-under-its-own-maximum",
    "tail-dropped",
    "a-softmax-for-each-tile",
    "divided-in-each-tile",
}


def _batch(
    query_lens: Sequence[int],
    contexts: Sequence[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    seed: int,
    in_order: bool = False,
    scale: float | None = None,
) -> tuple:
    """Arguments of prefill_attention. NaN lies where no token does, and in blocks that a table
    names past a context.
    """
    import torch

    random = seeded(seed)
    needed = [-(-context // block_size) for context in contexts]
    total, width = sum(needed) + 3, max(needed) + 2
    blocks = torch.arange(total) if in_order else torch.randperm(total, generator=random)
    table = blocks[-1].repeat(len(contexts), width).to(torch.int32)
    caches = [guarded(total, kv_heads, block_size, dim, fill=math.nan) for _ in range(2)]
    used = 0
    for i, (context, count) in enumerate(zip(contexts, needed, strict=True)):
        mine = blocks[used : used + count]
        table[i, :count], used = mine, used + count
        for cache in caches:
            tokens = torch.randn(kv_heads, context, dim, generator=random)
            for j, block in enumerate(mine.tolist()):
                part = tokens[:, j * block_size : (j + 1) * block_size]
                cache[block, :, : part.shape[1]] = part
    query = torch.randn(sum(query_lens), heads, dim, generator=random)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    return query, *caches, table, starts, lengths, dim**-0.5 if scale is None else scale


def _prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    wrong: str = "",
    attend: Callable | None = None,
) -> torch.Tensor:
    """Attention of a ragged batch over the paged cache, head by head with `attend`; wrong in the
    way that is named.
    """
    import torch

    out = torch.full_like(query, math.nan)
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    starts = query_start_loc.tolist()
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        if wrong in ("length-of-the-longest", "length-of-the-first"):
            context = int(seq_lens.max() if wrong == "length-of-the-longest" else seq_lens[0])
        count = (
            context // block_size if wrong == "blocks-rounded-down" else -(-context // block_size)
        )
        blocks = block_table[0 if wrong == "first-table" else i, :count].long()
        if wrong == "block-table-ignored":
            blocks = torch.arange(count)
        room = count * block_size if wrong == "reads-beyond-the-context" else context
        key, value = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :room] for cache in (k_cache, v_cache)
        )
        for head in range(heads):
            kv_head = head % kv_heads if wrong == "wrong-kv-head" else head // (heads // kv_heads)
            inputs = query[rows, head], key[kv_head], value[kv_head]
            if wrong == "reads-beyond-the-context":
                out[rows, head] = _beyond(*inputs, scale, context)
            else:
                out[rows, head] = (attend or exact)(*inputs, scale)
    return out


def _right_walks(tiles: Sequence[tuple[int, int]]) -> list[Callable]:
    """Attention of one head in tiles of these sizes; where no key is left to see, it is 0 / 0."""
    return [partial(the_walk, block_m=queries, block_n=keys) for queries, keys in tiles]


def _beyond(query: Any, key: Any, value: Any, scale: float, context: int) -> Any:
    """As `exact` for the context, over keys and values that are longer: hidden, but 0 · NaN is
    NaN.
    """
    import torch

    scores = query @ key.T * scale
    hidden = torch.arange(len(key)) > torch.arange(context - len(query), context)[:, None]
    return scores.masked_fill(hidden, -INF).softmax(dim=-1) @ value


def check_prefill_attention(answer: Callable) -> str:
    from minivllm.kernels import Kernels

    cases = [
        _batch([4], [4], 1, 1, 8, 16, 1, in_order=True),
        _batch([1], [1], 4, 2, 8, 16, 2),
        _batch([16], [16], 2, 2, 8, 16, 3),
        _batch([5, 20, 1], [5, 20, 1], 4, 2, 8, 16, 4),
        _batch([7, 7], [7, 7], 4, 4, 8, 4, 5),
        _batch([3], [35], 2, 1, 8, 16, 6, scale=1.0),
        _batch([16, 2, 9], [48, 33, 9], 4, 2, 16, 16, 7),
        _batch([33, 64, 17], [70, 64, 80], 6, 2, 8, 32, 8),
        _batch([30, 5], [150, 200], 2, 2, 8, 16, 10),
    ]

    def call(*args: Any) -> Any:
        query_lens = (args[4][1:] - args[4][:-1]).tolist()
        return answer(*args, max_query_len=max(query_lens), max_seq_len=int(args[5].max()))

    def right(
        query: Any,
        k_cache: Any,
        v_cache: Any,
        block_table: Any,
        query_start_loc: Any,
        seq_lens: Any,
        scale: float,
    ) -> Any:
        return _prefill(query, k_cache, v_cache, block_table, query_start_loc, seq_lens, scale)

    # Nobody is told how large a tile is here, and many keep all queries of a request in one.
    tiles = [(queries, keys) for keys in (64, 16, 32) for queries in (1 << 20, keys)]

    def walks(name: str, way: str) -> list[Callable]:
        sizes = tiles if name in _TILE_BY_TILE else tiles[:1]
        return [
            partial(_prefill, attend=partial(the_walk, block_m=m, block_n=n, wrong=way))
            for m, n in sizes
        ]

    suspects: Suspects = {
        "wrong-kv-head": (
            (
                "The query heads read the wrong KV heads: as if 0, 2, 4 shared one and 1, 3, 5"
                " another (head % KH).\nNEIGHBOURS share: query head h reads KV head h // (H //"
                " KH)."
            ),
            partial(_prefill, wrong="wrong-kv-head"),
        ),
        "block-table-ignored": (
            (
                "You read blocks 0, 1, 2, … of the cache, which belong to anybody.\n"
                "Block j of sequence i lies in block_table[i, j]."
            ),
            partial(_prefill, wrong="block-table-ignored"),
        ),
        "table-of-the-first-sequence": (
            (
                "All sequences read through the block table of the first one.\nRow i of block_table"
                " belongs to sequence i."
            ),
            partial(_prefill, wrong="first-table"),
        ),
        "blocks-rounded-down": (
            (
                "The last block of a request is left out where it is not full: its keys are"
                " missing, among them those of the newest tokens.\nA context of 35 tokens lies in 3"
                " blocks of 16: round up, -(-context // block_size)."
            ),
            partial(_prefill, wrong="blocks-rounded-down"),
            *(
                partial(_prefill, wrong="blocks-rounded-down", attend=walk)
                for walk in _right_walks(tiles)
            ),
        ),
        "one-length-for-all": (
            (
                "All requests get the same length of context, that of the longest or of the first."
                " What lies in the cache beyond a request's own context belongs to nobody (here it"
                " is nan).\nRequest i has seq_lens[i] tokens; max_seq_len is only what a kernel's"
                " grid needs."
            ),
            *(partial(_prefill, wrong=f"length-of-the-{which}") for which in ("longest", "first")),
            *(
                partial(_prefill, wrong=f"length-of-the-{which}", attend=walk)
                for which in ("longest", "first")
                for walk in _right_walks(tiles)
            ),
        ),
        "reads-beyond-the-context": (
            (
                "The last block is read to its end, and what lies beyond the context can be"
                " anything: here it is nan. A weight of 0 does not help: 0 · nan is nan.\nCut keys"
                " and values at the context, seq_lens[i]."
            ),
            partial(_prefill, wrong="reads-beyond-the-context"),
        ),
        **{
            name: (why, *(f for way in ways for f in walks(name, way)))
            for name, (why, *ways) in WALKS.items()
        },
    }
    number = diagnose(call, cases, right, suspects)

    queries = keys = 320
    seen = the_watch(call, *_batch([queries], [keys], 2, 1, 8, 16, 9))
    limit = 2 * queries * 64
    expect(
        not seen.fused,
        "done-by-torch",
        "The result is right, but scaled_dot_product_attention made it.\nHere you build what stands"
        " behind it.",
    )
    expect(
        seen.largest <= limit,
        "whole-matrix",
        f"The result is right, but a tensor of {seen.largest:,} numbers was made on the way, for a"
        f" prompt of {keys} tokens and 2 heads: a score for each pair of tokens (a mask counts,"
        f" too).\nWalk along the keys in tiles of at most 64: {limit:,} numbers for all queries and"
        " heads at once.",
    )
    mine = counted(answer)
    kernels = replace(Kernels.reference(), prefill_attention=mine)
    line = engine_agrees(mine, kernels=kernels, max_num_batched_tokens=16)
    return f"{number} batches; in chunks of 16, {line}"


EXERCISE = Exercise(
    id="02.5",
    title="Your attention reads for the engine",
    check=check_prefill_attention,
    mistakes=(
        Known(
            "aligned-to-start",
            answers=r"""
# %% query i at position i
@@
-    positions = torch.arange(len(key) - len(query), len(key))[:, None]
+    positions = torch.arange(len(query))[:, None]
""",
        ),
        Known(
            "wrong-kv-head",
            hint=3,
            answers=r"""
# %% head modulo KH
@@
-            kv_head = head // (heads // kv_heads)
+            kv_head = head % kv_heads
""",
        ),
        Known(
            "block-table-ignored",
            hint=2,
            answers=r"""
# %% blocks in the order of the cache
@@
-        blocks = block_table[i, : -(-context // block_size)]
+        blocks = torch.arange(-(-context // block_size))
""",
        ),
        Known(
            "table-of-the-first-sequence",
            hint=2,
            answers=r"""
# %% row 0 for all
@@
-        blocks = block_table[i, : -(-context // block_size)]
+        blocks = block_table[0, : -(-context // block_size)]
""",
        ),
        Known(
            "reads-beyond-the-context",
            hint=2,
            answers=r"""
# %% the last block to its end
@@
-    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
+    query: torch.Tensor,
+    key: torch.Tensor,
+    value: torch.Tensor,
+    scale: float,
+    context: int,
@@
-    positions = torch.arange(len(key) - len(query), len(key))[:, None]
+    positions = torch.arange(context - len(query), context)[:, None]
@@
-            side_by_side(cache, blocks, context) for cache in (k_cache, v_cache)
+            side_by_side(cache, blocks, len(blocks) * block_size)
+            for cache in (k_cache, v_cache)
@@
-                query[rows, head], keys[kv_head], values[kv_head], scale
+                query[rows, head], keys[kv_head], values[kv_head], scale, context
""",
        ),
        Known(
            "no-mask",
            answers=r"""
# %% all see all
@@
-        scores = scores.masked_fill(
-            torch.arange(tile.start, tile.stop) > positions, -math.inf
-        )
""",
        ),
        Known(
            "no-scale",
            answers=r"""
# %% scale unused
@@
-        scores = query @ key[tile].T * scale
+        scores = query @ key[tile].T
""",
        ),
        Known(
            "not-rescaled",
            answers=r"""
# %% the first tile's maximum is enough
@@
-        acc = acc * rescale + weights @ value[tile]
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
+        acc = acc + weights @ value[tile]
+        l = l + weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "sum-not-rescaled",
            answers=r"""
# %% acc alone
@@
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
+        l = l + weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "maximum-not-kept",
            answers=r"""
# %% m = new is missing
@@
-        m = new
""",
        ),
        Known(
            "whole-matrix",
            hint=3,
            answers=r'''
# %% the naive way for each head
@@
-    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
-    positions = torch.arange(len(key) - len(query), len(key))[:, None]
-    acc, m, l = (
-        torch.zeros_like(query),
-        torch.full((len(query), 1), -math.inf),
-        torch.zeros(len(query), 1),
+    hidden = (
+        torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
@@
-    for first in range(0, len(key), 64):
-        tile = slice(first, min(first + 64, len(key)))
-        scores = query @ key[tile].T * scale
-        scores = scores.masked_fill(
-            torch.arange(tile.start, tile.stop) > positions, -math.inf
-        )
-        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
-        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
-        acc = acc * rescale + weights @ value[tile]
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
-        m = new
-    return acc / l
+    return (query @ key.T * scale).masked_fill(hidden, -math.inf).softmax(-1) @ value
''',
        ),
        Known(
            "done-by-torch",
            answers=r'''
# %% what torch has
@@
-    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
-    positions = torch.arange(len(key) - len(query), len(key))[:, None]
-    acc, m, l = (
-        torch.zeros_like(query),
-        torch.full((len(query), 1), -math.inf),
-        torch.zeros(len(query), 1),
+    hidden = (
+        torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
@@
-    for first in range(0, len(key), 64):
-        tile = slice(first, min(first + 64, len(key)))
-        scores = query @ key[tile].T * scale
-        scores = scores.masked_fill(
-            torch.arange(tile.start, tile.stop) > positions, -math.inf
-        )
-        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
-        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
-        acc = acc * rescale + weights @ value[tile]
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
-        m = new
-    return acc / l
+    attention = torch.nn.functional.scaled_dot_product_attention
+    return attention(
+        query[None], key[None], value[None], attn_mask=~hidden, scale=scale
+    )[0]
''',
        ),
        Known(
            "blocks-rounded-down",
            hint=2,
            answers=r'''
# %% whole blocks only
@@
-    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
@@
-    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
@@
-        blocks = block_table[i, : -(-context // block_size)]
+        blocks = block_table[i, : context // block_size]

# %% whole blocks only, and the formula
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    hidden = torch.ones(len(query), len(key), dtype=torch.bool).triu(
        len(key) - len(query) + 1
    )
    return (query @ key.T * scale).masked_fill(hidden, -math.inf).softmax(
        dim=-1
    ) @ value


def prefill_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    max_query_len: int,
    max_seq_len: int,
) -> torch.Tensor:
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : context // block_size]
        keys, values = (
            side_by_side(cache, blocks, context) for cache in (k_cache, v_cache)
        )
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(
                query[rows, head], keys[kv_head], values[kv_head], scale
            )
    return out
''',
        ),
        Known(
            "one-length-for-all",
            hint=2,
            answers=r'''
# %% the longest context for all
@@
-    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
@@
-    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
@@
         rows = slice(starts[i], starts[i + 1])
+        context = max_seq_len

# %% the first request's context for all
@@
-    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
@@
-    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
@@
         rows = slice(starts[i], starts[i + 1])
+        context = int(seq_lens[0])
''',
        ),
    ),
    right=r'''
# %% all heads of a request at once
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """query [KH, group, Q, D], key and value [KH, 1, N, D]."""
    q, n = query.shape[2], key.shape[2]
    positions = torch.arange(n - q, n)[:, None]
    acc, m, l = (
        torch.zeros_like(query),
        torch.full((*query.shape[:3], 1), -math.inf),
        torch.zeros(*query.shape[:3], 1),
    )
    for k, v, tokens in zip(
        key.split(32, 2), value.split(32, 2), torch.arange(n).split(32)
    ):
        scores = (query @ k.transpose(2, 3) * scale).masked_fill(
            tokens > positions, -math.inf
        )
        new = torch.maximum(m, scores.amax(-1, keepdim=True))
        rescale, weights, m = torch.exp(m - new), torch.exp(scores - new), new
        acc, l = (
            acc * rescale + weights @ v,
            l * rescale + weights.sum(-1, keepdim=True),
        )
    return acc / l


def prefill_attention(
    query,
    k_cache,
    v_cache,
    block_table,
    query_start_loc,
    seq_lens,
    scale,
    *,
    max_query_len,
    max_seq_len,
):
    out = torch.empty_like(query)
    kv_heads = k_cache.shape[1]
    for i, (start, stop) in enumerate(
        zip(query_start_loc[:-1].tolist(), query_start_loc[1:].tolist())
    ):
        keys, values = (
            side_by_side(c, block_table[i], int(seq_lens[i]))[:, None]
            for c in (k_cache, v_cache)
        )
        mine = query[start:stop].transpose(0, 1).unflatten(0, (kv_heads, -1))
        out[start:stop] = (
            attend(mine, keys, values, scale).flatten(0, 1).transpose(0, 1)
        )
    return out
''',
)
