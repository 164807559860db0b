"""Decode attention over a paged cache, right and with the usual mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch03_paged_kv_cache.common import SIZES

if TYPE_CHECKING:
    import torch

#: Keys and values are cut off at the context, unless one of these is the mistake.
_NOT_CUT = (
    "reads-beyond-the-context",
    "values-not-masked",
    "masked-with-zero",
    "masked-with-1e4",
    "masked-with-1e9",
)


@dataclass(frozen=True)
class Decode:
    """One new token per request over its whole context, ``[B, heads, head_dim]``.

    mistake: what is done otherwise, in a few words; "" is right. window: only so many of the last
    tokens count. size_of: takes blocks to be as large as it says for a cache's shape.
    token_by_token: looks each token up, and does not cut blocks out of the cache.
    """

    mistake: str = ""
    window: int = 0
    size_of: Callable[[torch.Size], int] | None = None
    token_by_token: bool = False

    def __call__(
        self,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        import torch

        out = torch.zeros_like(query)
        for i in range(len(query)):
            context = self._context(i, seq_lens)
            row = block_table[0 if self.mistake == "one-table-for-all" else i]
            caches = k_cache, k_cache if self.mistake == "keys-as-values" else v_cache
            ends = {"cut-at-the-longest": seq_lens.max(), "cut-at-the-first": seq_lens[0]}
            cut = int(ends[self.mistake]) if self.mistake in ends else None
            k, v = (self._rows(cache, row, context, query.shape[1], cut) for cache in caches)
            heads = self._queries(query.shape[1], k_cache.shape[1])
            out[i] = self._attend(query[i][heads], (k, v), context, scale, k_cache.shape[1])
        return out

    def _context(self, i: int, seq_lens: torch.Tensor) -> int:
        if self.mistake == "longest-for-all":
            return int(seq_lens.max())
        if self.mistake == "first-for-all":
            return int(seq_lens[0])
        return max(0, int(seq_lens[i]) - (self.mistake == "new-token-missing"))

    def _rows(
        self, cache: torch.Tensor, row: torch.Tensor, context: int, heads: int, cut: int | None
    ) -> torch.Tensor:
        """The rows that are read for each query head, ``[heads, tokens, head_dim]``."""
        import torch

        size = self.size_of(cache.shape) if self.size_of else cache.shape[2]
        if self.token_by_token and context:
            tokens = torch.arange(context)
            rows = cache[row[tokens // size].long(), :, tokens % size].transpose(0, 1)
        else:
            blocks = cache[self._blocks(row, context, size)]
            mixed = self.mistake == "heads-and-tokens-mixed"
            rows = (
                blocks.reshape(cache.shape[1], -1, cache.shape[3])
                if mixed
                else blocks.transpose(0, 1).flatten(1, 2)
            )
        if self.mistake not in _NOT_CUT and (context or self.mistake != "padded-row"):
            rows = rows[:, : context if cut is None else cut]
        if self.window:
            rows = rows[:, -self.window :]
        return rows[self._kv_heads(heads, cache.shape[1])]

    def _blocks(self, row: torch.Tensor, context: int, size: int) -> torch.Tensor:
        import torch

        count = -(-context // size)
        if self.mistake == "last-block-missing":
            count = context // size
        elif self.mistake == "last-block-missing-but-one":
            count = max(1, context // size)
        elif self.mistake == "last-block-missing-if-begun":
            count = (context - 1) // size
        elif self.mistake == "padded-row":
            count = max(1, count)
        return torch.arange(count) if self.mistake == "table-ignored" else row[:count].long()

    def _queries(self, heads: int, kv_heads: int) -> torch.Tensor:
        """The query head whose output is head 0, 1 …."""
        import torch

        numbers = torch.arange(heads)
        if self.mistake == "heads-out-of-order":
            return numbers.view(-1, kv_heads).T.flatten()
        return numbers

    def _kv_heads(self, heads: int, kv_heads: int) -> torch.Tensor:
        """The KV head of each query head."""
        import torch

        numbers = torch.arange(heads)
        if self.mistake == "heads-interleaved":
            return numbers % kv_heads
        return numbers * 0 if self.mistake == "first-kv-head" else numbers // (heads // kv_heads)

    def _attend(
        self,
        query: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        context: int,
        scale: float,
        kv_heads: int,
    ) -> torch.Tensor:
        """The output of one request's heads. rows: keys and values, [heads, tokens, head_dim]."""
        import torch

        k, v = rows

        usual = query.shape[-1] ** -0.5
        factors = {
            "no-scale": 1.0,
            "own-scale": usual,
            "scaled-twice": scale * scale,
            "scaled-by-both": scale * usual,
            "divided-by-scale": 1 / scale,
        }
        scores = torch.einsum("hd,hnd->hn", query, k) * factors.get(self.mistake, scale)
        hidden = {
            "values-not-masked": -math.inf,
            "padded-row": -math.inf,
            "masked-with-1e4": -1e4,
            "masked-with-1e9": -1e9,
            "masked-with-zero": 0.0,
        }
        if self.mistake in hidden:
            scores[:, context:] = hidden[self.mistake]
        if self.mistake.startswith("masked-with"):
            v = v.clone()
            v[:, context:] = 0.0
        if self.mistake == "padded-row" and not context:
            return torch.full_like(query, math.nan)
        return torch.einsum("hn,hnd->hd", self._weights(scores, kv_heads), v)

    def _weights(self, scores: torch.Tensor, kv_heads: int) -> torch.Tensor:
        if self.mistake == "no-maximum":
            return scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        if self.mistake.startswith("maximum-from-zero"):
            least = 1e-30 if self.mistake.endswith("kept") else 0.0
            top = scores.amax(dim=-1, keepdim=True).clamp(min=0.0) if scores.numel() else 0.0
            weights = (scores - top).exp()
            return weights / weights.sum(dim=-1, keepdim=True).clamp(min=least)
        if self.mistake == "not-normalised":
            return (scores - scores.amax(dim=-1, keepdim=True)).exp() if scores.numel() else scores
        if self.mistake in ("softmax-over-group", "softmax-over-kv-heads"):
            dim = 1 if self.mistake == "softmax-over-group" else 0
            return scores.unflatten(0, (kv_heads, -1)).softmax(dim=dim).flatten(0, 1)
        return scores.softmax(dim=0 if self.mistake == "softmax-over-heads" else -1)


def decodes(*mistakes: str) -> tuple[Decode, ...]:
    return tuple(Decode(mistake) for mistake in mistakes)


def in_other_blocks() -> tuple[Decode, ...]:
    """All that take a number of their own, or another part of the shape, for the block size."""
    sizes = [lambda shape, axis=axis: shape[axis] for axis in (0, 1, 3)]
    sizes += [lambda shape, size=size: size for size in SIZES]
    return tuple(
        Decode(size_of=size, token_by_token=tokens) for size in sizes for tokens in (False, True)
    )
