"""The kernel of 03.6 in torch: right, and with the usual mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from minivllm.course.chapters.ch03_paged_kv_cache.common import SIZES

if TYPE_CHECKING:
    import torch


def joined(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged output ``[B, heads, D]`` and the log-sum-exp of all splits ``[B, heads]``.

    What NaN leaves of a maximum depends on how the maximum was taken: where the output is NaN, so
    is the log-sum-exp.
    """
    import torch

    from minivllm.kernels.online_softmax import merge_attention_reference

    merged = merge_attention_reference(out, lse)
    return merged, torch.logsumexp(lse, dim=0).masked_fill(merged.isnan().any(dim=-1), math.nan)


class _Request(NamedTuple):
    """What the programs of one request read."""

    query: torch.Tensor  # [heads, D]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: torch.Tensor
    context: int
    scale: float
    tile: int


@dataclass(frozen=True)
class Splits:
    """Split decode with one mistake, in a few words; "" is right.

    size_of: takes blocks to be as large as it says for (a cache's shape, the tile). last: a split
    reads only so many of its last tiles. Reads outside of a cache give NaN.
    """

    mistake: str = ""
    size_of: Callable[[torch.Size, int], int] | None = None
    last: int = 0

    def __call__(self, *case: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The results as `joined` gives them.

        case: query, k_cache, v_cache, block_table, seq_lens, scale, (tile, num_splits).
        """
        import torch

        query, k_cache, v_cache, block_table, seq_lens, scale, (tile, num_splits) = case
        batch, heads, dim = query.shape
        if self.mistake == "query-stride":
            query = query.as_strided(query.shape, (heads * dim, dim, 1))
        # The entries behind the table are no blocks.
        wide = block_table.shape[1] + 2
        table = block_table.as_strided((batch, wide), block_table.stride()).long()
        out, lse = torch.empty(num_splits, batch, heads, dim), torch.empty(num_splits, batch, heads)
        for i in range(batch):
            caches = k_cache, k_cache if self.mistake == "keys-as-values" else v_cache
            factor = _factor(self.mistake, scale, dim)
            request = _Request(query[i], *caches, table[i], int(seq_lens[i]), factor, tile)
            for split in range(num_splits):
                out[split, i], lse[split, i] = self._program(request, split, num_splits)
        if self.mistake == "target-plus-columns":
            out = _written_over(out)
        return joined(out, lse)

    def _program(
        self, request: _Request, split: int, num_splits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and the log-sum-exp of a split, for all heads."""
        import torch

        heads, dim = request.query.shape
        begin, end = _share(self.mistake, request.context, request.tile, split, num_splits)
        if self.last:
            begin = max(
                begin, begin + (-(-(end - begin) // request.tile) - self.last) * request.tile
            )
        m = torch.full((heads,), _first_maximum(self.mistake))
        l, acc = torch.zeros(heads), torch.zeros(heads, dim)
        for first in range(begin, end, request.tile):
            known_until = end if self.mistake == "rounded-down-and-cut" else request.context
            scores, v = self._tile(request, first, known_until)
            new = torch.maximum(m, scores.amax(dim=1))
            if self.mistake.startswith("no-maximum"):
                new = torch.zeros(heads)
            exp = torch.exp2 if self.mistake == "exp2" else torch.exp
            weights, rescale = exp(scores - new[:, None]), exp(m - new)
            keep_l = self.mistake in ("no-rescale", "no-rescale-l")
            keep_acc = self.mistake in ("no-rescale", "no-rescale-acc")
            l = l * (1.0 if keep_l else rescale) + weights.sum(dim=1)
            acc = acc * (1.0 if keep_acc else rescale[:, None])
            acc = acc + (weights[:, :, None] * v).sum(dim=1)
            m = new
        return self._finished(m, l, acc)

    def _tile(
        self, request: _Request, first: int, known_until: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores ``[heads, tile]`` and values ``[heads, tile, D]`` of a tile's tokens."""
        import torch

        tokens = first + torch.arange(request.tile)
        known = tokens < known_until
        k, v = (self._rows(request, cache, tokens, known) for cache in request[1:3])
        if self.mistake not in ("unmasked", "unmasked-zero"):
            k = k.masked_fill(~known[:, None], 0.0)
            if self.mistake != "values-unmasked":
                v = v.masked_fill(~known[:, None], 0.0)
        scores = (k * request.query[:, None]).sum(dim=-1) * request.scale
        if not self.mistake.startswith("unmasked"):
            _, _, number = self.mistake.partition("masked-with-")
            small = {"": -math.inf, "zero": 0.0}.get(number)
            small = -float(number) if small is None else small
            scores = scores.masked_fill(~known, small)
        return scores, v

    def _rows(
        self, request: _Request, cache: torch.Tensor, tokens: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """What the heads read of a cache, ``[heads, tile, D]``."""
        import torch

        kv_heads, size, dim = cache.shape[1:]
        if self.size_of:
            size = self.size_of(cache.shape, request.tile)
        entries = tokens // size
        if self.mistake == "table-by-tile":
            entries = torch.full_like(tokens, int(tokens[0]) // request.tile)
        blocks = request.table[entries.clamp(max=len(request.table) - 1)]
        if self.mistake != "unmasked":
            blocks = torch.where(known, blocks, 0)
        heads = len(request.query)
        numbers = torch.arange(heads)
        kv_head = {
            "interleaved": numbers % kv_heads,
            "no-group": numbers,
            "first-kv-head": numbers * 0,
            "divided-by-kv-heads": numbers // kv_heads,
        }.get(self.mistake, numbers // (heads // kv_heads))
        rows = ((blocks * kv_heads + kv_head[:, None]) * size + tokens % size) * dim
        places = rows[..., None] + torch.arange(dim)
        outside = (places < 0) | (places >= cache.numel())
        return cache.flatten()[places.clamp(0, cache.numel() - 1)].masked_fill(outside, math.nan)

    def _finished(
        self, m: torch.Tensor, l: torch.Tensor, acc: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        safe = l if "empty-nan" in self.mistake else torch.where(l > 0, l, 1.0)
        out = acc if self.mistake == "not-divided" else acc / safe[:, None]
        log = torch.log2(safe) if self.mistake == "lse-base-2" else torch.log(safe)
        lse = log if self.mistake == "lse-log-l" else m + log
        if self.mistake == "lse-is-m":
            lse = m
        if self.mistake == "lse-is-l":
            lse = l
        if self.mistake.startswith("no-maximum"):
            lse = torch.log(l)
        nothing = {"empty-nan-lse": math.nan, "empty-lse-zero": 0.0}
        if self.mistake in nothing:
            lse = torch.where(l > 0, lse, nothing[self.mistake])
        return out, lse


def _first_maximum(mistake: str) -> float:
    if mistake == "starts-at-zero" or mistake.startswith("no-maximum"):
        return 0.0
    what, _, number = mistake.partition(":")
    return float(number) if what == "starts-at" else -math.inf


def _factor(mistake: str, scale: float, dim: int) -> float:
    """What the scores are multiplied by."""
    return {
        "no-scale": 1.0,
        "own-scale": dim**-0.5,
        "scaled-twice": scale * scale,
        "scaled-by-log2e": scale * math.log2(math.e),
    }.get(mistake, scale)


def _share(mistake: str, context: int, tile: int, split: int, num_splits: int) -> tuple[int, int]:
    """(begin, end) of a split's tokens."""
    tiles = -(-context // tile)
    shares = {
        "rounded-down-tiles": tiles // num_splits * tile,
        "rounded-down-tokens": context // num_splits // tile * tile,
        "rounded-down": context // num_splits,
        "rounded-down-and-cut": context // num_splits,
        "shares-of-tokens": -(-context // num_splits),
    }
    share = shares.get(mistake, -(-tiles // num_splits) * tile)
    if mistake == "whole-tiles-only":
        context = context // tile * tile
        share = -(-(context // tile) // num_splits) * tile
    begin = split * share
    if mistake == "all":
        return 0, context
    if mistake.startswith("unclamped"):
        return begin, begin + share
    return begin, context if mistake == "to-the-end" else min(begin + share, context)


def _written_over(out: torch.Tensor) -> torch.Tensor:
    """The programs' rows written at `target`, not `target * D`, in the interpreter's order."""
    import torch

    splits, batch, heads, dim = out.shape
    rows, written = out.flatten(0, 2), torch.full_like(out, math.nan)
    for i in range(batch):
        for head in range(heads):
            for split in range(splits):
                target = (split * batch + i) * heads + head
                written.view(-1)[target : target + dim] = rows[target]
    return written


def splits(*mistakes: str) -> tuple[Splits, ...]:
    return tuple(Splits(mistake) for mistake in mistakes)


def in_other_blocks() -> tuple[Splits, ...]:
    """All that take a number of their own, the tile or a part of the shape for the block size."""
    sizes = [lambda shape, tile, axis=axis: shape[axis] for axis in (0, 1, 3)]
    sizes += [lambda shape, tile: tile]
    sizes += [lambda shape, tile, size=size: size for size in SIZES]
    return tuple(Splits(size_of=size) for size in sizes)
