"""Batches over a paged cache, and attention that reads them, right and wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch02_flash_attention.cases import Head
from minivllm.course.chapters.ch02_flash_attention.walk import INF, exact
from minivllm.course.grading.guard import guarded
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    import torch

#: A block that no cache has.
NOWHERE = 1_000_000


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads, numbers per head, and tokens per block."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int


def batch(
    requests: Sequence[tuple[int, int]],
    shape: Shape,
    seed: int,
    *,
    in_order: bool = False,
    scale: float | None = None,
    nowhere: bool = False,
    special: Mapping[int, Head] | None = None,
) -> tuple:
    """Arguments of prefill_attention for requests of (new tokens, context).

    NaN lies where no token does. Beyond a context the table names a block of NaN or, with nowhere,
    one that does not exist. special: a request's number -> its queries, keys and values, the same
    for all heads. query is not contiguous.
    """
    import torch

    random = seeded(seed)
    size = shape.block_size
    needed = [-(-context // size) for _, context in requests]
    total, width = sum(needed) + 3, max(needed) + 2
    blocks = torch.arange(total) if in_order else torch.randperm(total, generator=random)
    spare = torch.tensor(NOWHERE) if nowhere else blocks[-1]
    table = spare.repeat(len(requests), width).to(torch.int32)
    caches = [guarded(total, shape.kv_heads, size, shape.dim, fill=math.nan) for _ in range(2)]
    lens = [new for new, _ in requests]
    wide = torch.randn(sum(lens), shape.heads + 2, shape.dim, generator=random)
    query = wide[:, 1 : shape.heads + 1]
    used = row = 0
    for i, (new, context) in enumerate(requests):
        mine = blocks[used : used + needed[i]]
        table[i, : needed[i]], used = mine, used + needed[i]
        tokens = [torch.randn(shape.kv_heads, context, shape.dim, generator=random) for _ in caches]
        if special and i in special:
            query[row : row + new] = special[i].query[:, None]
            for values, given in zip(tokens, (special[i].key, special[i].value), strict=True):
                values[:] = given
        for cache, values in zip(caches, tokens, strict=True):
            for j, block in enumerate(mine.tolist()):
                part = values[:, j * size : (j + 1) * size]
                cache[block, :, : part.shape[1]] = part
        row += new
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([context for _, context in requests], dtype=torch.int32)
    return query, *caches, table, starts, lengths, shape.dim**-0.5 if scale is None else scale


@dataclass(frozen=True)
class Prefill:
    """Attention of a ragged batch over the paged cache, head by head.

    wrong: what is done otherwise, in one word; "" is right. attend: makes one head.
    """

    wrong: str = ""
    attend: Callable = exact

    def __call__(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The result, [T, H, D]; nan where nothing was written."""
        import torch

        out = torch.full(query.shape, math.nan)
        heads, kv_heads = query.shape[1], k_cache.shape[1]
        starts = query_start_loc.tolist()
        for i in range(len(seq_lens)):
            rows = slice(starts[i], starts[i + 1])
            context = self._context(i, seq_lens)
            blocks = self._blocks(i, context, block_table, k_cache.shape[2])
            key, value = (
                cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache)
            )
            length = int(seq_lens.max()) if self.wrong == "cut-at-the-longest" else context
            if self.wrong != "reads-beyond-the-context":
                key, value = key[:, :length], value[:, :length]
            for head in range(heads):
                kv_head = self._kv_head(head, heads, kv_heads)
                inputs = query[rows, head], key[kv_head], value[kv_head]
                out[rows, head] = self._head(*inputs, scale, context)
        return out

    def _context(self, i: int, seq_lens: torch.Tensor) -> int:
        which = {"length-of-the-longest": seq_lens.max(), "length-of-the-first": seq_lens[0]}
        return int(which.get(self.wrong, seq_lens[i]))

    def _blocks(
        self, i: int, context: int, block_table: torch.Tensor, block_size: int
    ) -> torch.Tensor:
        import torch

        down = self.wrong in ("blocks-rounded-down", "blocks-rounded-down-in-place")
        size = 16 if self.wrong == "blocks-of-16" else block_size
        count = context // size if down else -(-context // size)
        if self.wrong == "whole-table":
            count = block_table.shape[1]
        if self.wrong == "one-block-more":
            count = context // size + 1
        if self.wrong == "block-table-ignored":
            return torch.arange(count)
        if self.wrong == "blocks-in-a-row":
            return block_table[i, 0] + torch.arange(count)
        return block_table[0 if self.wrong == "first-table" else i, :count].long()

    def _kv_head(self, head: int, heads: int, kv_heads: int) -> int:
        if self.wrong == "head-modulo":
            return head % kv_heads
        if self.wrong == "head-by-kv-heads":
            return min(head // kv_heads, kv_heads - 1)
        return 0 if self.wrong == "first-kv-head" else head // (heads // kv_heads)

    def _head(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        context: int,
    ) -> torch.Tensor:
        if self.wrong == "reads-beyond-the-context":
            return _beyond(query, key, value, scale, context)
        if self.wrong == "blocks-rounded-down-in-place":
            return exact(query, key, value, scale, context)
        return self.attend(query, key, value, scale)


def _beyond(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, context: int
) -> torch.Tensor:
    """As `exact` for the context, over longer keys and values: hidden, but 0 · NaN is NaN."""
    import torch

    scores = query @ key.T * scale
    hidden = torch.arange(len(key)) > torch.arange(context - len(query), context)[:, None]
    return scores.masked_fill(hidden, -INF).softmax(dim=-1) @ value
