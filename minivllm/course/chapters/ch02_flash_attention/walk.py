"""Attention of one head: by the formula, and in tiles, right and in all the usual wrong ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INF = math.inf
LOG2E = math.log2(math.e)
#: What is taken for "minus infinity" by those who do not take -inf.
LOW = -1e4


def exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    context: int | None = None,
) -> torch.Tensor:
    """Attention of the last tokens of a context, one head, by the formula and in float64; float32.

    context: its length, where it is another than the number of keys.
    """
    import torch

    queries, keys = len(query), len(key)
    last = keys if context is None else context
    scores = query.double() @ key.double().T * scale
    hidden = torch.arange(keys) > torch.arange(last - queries, last)[:, None]
    return (scores.masked_fill(hidden, -INF).softmax(dim=-1) @ value.double()).float()


@dataclass
class _Sums:
    """What a walk carries along: for each row the output so far, the sum and the maximum."""

    acc: torch.Tensor
    l: torch.Tensor
    m: torch.Tensor
    scale: float
    walked: int = 0


@dataclass(frozen=True)
class Walk:
    """Flash attention of one head in tiles of block_m queries and block_n keys.

    how: words for what is done otherwise. None is right; "unmasked walk-all" is wrong in two ways.
    """

    how: frozenset[str] = frozenset()

    @classmethod
    def of(cls, words: str) -> Walk:
        """The walk that is wrong in these ways, words with spaces between them."""
        return cls(frozenset(words.split()))

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        block_m: int = 16,
        block_n: int = 16,
    ) -> torch.Tensor:
        """The walk's result, [Q, D], float32; a walk that never had a key gives nan."""
        import torch

        past, room = len(key) - len(query), len(key)
        if "padded-keys" in self.how:  # keys that do not exist have scores of 0, and values of 0
            extra = (0, 0, 0, -room % block_n)
            key, value = (torch.nn.functional.pad(x, extra) for x in (key, value))
        if "values-are-keys" in self.how:
            value = key
        query, key, value = (self._rounded(x) for x in (query, key, value))
        query = query * self._factor(scale, query.shape[1])
        out = torch.empty_like(query)
        for top in range(0, len(query), block_m):
            rows = torch.arange(top, min(top + block_m, len(query)))
            sums = self._sums(len(rows), value.shape[1], scale)
            end = self._end(past, rows, room, block_m, block_n)
            for first in range(self._start(past, block_n), end, block_n):
                last = min(first + block_n, end if "cut" in self.how else len(key))
                columns = torch.arange(first, last)
                keys = key[columns - first] if "first-keys" in self.how else key[columns]
                scores = query[rows] @ keys.T
                hidden = self._hidden(columns, past, rows)
                values = value[columns - first] if "first-values" in self.how else value[columns]
                self._step(sums, scores, hidden, values, block_m)
            out[rows] = self._divided(sums)
        return out

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("float16", "bfloat16"):
            if name in self.how:
                import torch

                return x.to(getattr(torch, name)).float()
        return x

    def _factor(self, scale: float, dim: int) -> float:
        """What queries are multiplied by; the weights are exp of the scores."""
        factors = {
            "unscaled": 1.0,
            "base-2-unscaled": 1 / LOG2E,
            "scaled-twice": scale**2,
            "no-log2e": scale / LOG2E,
            "log2e": scale * LOG2E,
            "scale-of-the-width": dim**-0.5,
            "scale-inverted": 1 / scale,
        }
        return next((factors[word] for word in self.how & factors.keys()), scale)

    def _sums(self, rows: int, dim: int, scale: float) -> _Sums:
        import torch

        low = LOW if "start-at-a-number" in self.how else -INF
        start = 0.0 if "start-at-zero" in self.how else low
        m = torch.full((rows,), start)
        return _Sums(torch.zeros(rows, dim), torch.zeros(rows), m, scale)

    def _start(self, past: int, block_n: int) -> int:
        starts = {"walk-of-the-chunk": past, "walk-of-the-chunk's-tiles": past // block_n * block_n}
        return next((starts[word] for word in self.how & starts.keys()), 0)

    def _end(self, past: int, rows: torch.Tensor, keys: int, block_m: int, block_n: int) -> int:
        """Where the walk of a tile of queries ends."""
        top, last = int(rows[0]), int(rows[-1]) + 1
        end = min(past + last, keys)
        ends = {
            "walk-all": keys,
            "walk-from-start": min(top + block_m, keys),
            "walk-from-start-cut": min(last, keys),
            "walk-of-the-first": min(past + block_m, keys),
            "walk-to-the-queries": min(past + last, keys - past),
            "walk-before": (past + top) // block_n * block_n,
            "walk-up-to-the-first": past + top,
            "walk-to-the-first": past + top + 1,
            "walk-one-less": end - 1,
            "walk-one-less-or-one": max(end - 1, 1),
            "walk-of-the-block-less": min(past + top + block_m - 1, keys),
            "walk-beyond": past + top + block_m,
            "walk-whole-tiles": end // block_n * block_n,
            "walk-one-more": min(end + 1, keys),
        }
        return next((ends[word] for word in self.how & ends.keys()), end)

    def _hidden(self, columns: torch.Tensor, past: int, rows: torch.Tensor) -> torch.Tensor:
        """Which scores of a tile are hidden, bool."""
        import torch

        how = self.how
        positions = rows if "mask-from-start" in how else past + rows
        shift = ("mask-one-more" in how) - ("mask-one-less" in how)
        if "mask-of-the-first" in how:
            positions = positions[:1].expand_as(positions)
        if "mask-of-the-first-tile" in how:
            positions = past + torch.arange(len(rows))
        hidden = columns > positions[:, None] + shift
        on_diagonal = columns[-1] > past + rows[0]
        if "mask-in-the-tile" in how and ("diagonal-only" not in how or on_diagonal):
            hidden = torch.arange(len(columns)) > torch.arange(len(rows))[:, None]
        late = "mask-late" in how and columns[0] < past + rows[0]
        late = late or ("mask-of-the-chunk" in how and columns[0] < past)
        return torch.zeros_like(hidden) if "unmasked" in how or late else hidden

    def _step(
        self,
        sums: _Sums,
        scores: torch.Tensor,
        hidden: torch.Tensor,
        value: torch.Tensor,
        block_m: int,
    ) -> None:
        """Take one tile of keys into the sums."""
        import torch

        how = self.how
        seen = self._masked(scores, hidden)
        largest = (scores if how & {"maximum-before-mask", "sum-before-mask"} else seen).amax(dim=1)
        new = largest if "tile-maximum" in how else torch.maximum(sums.m, largest)
        if "no-maximum" in how:
            new = torch.zeros_like(new)
        if "one-maximum" in how:
            new = new.max().expand_as(new)
        if "padded" in how and len(scores) < block_m:  # rows that do not exist have scores of 0
            new = new.clamp(min=0.0)
        weights = self._weights(seen, sums.m, new)
        rescale = self._rescale(sums.m, new, sums.scale)
        total = weights.sum(dim=1)
        if "sum-before-mask" in how:
            total = torch.exp(scores - new[:, None]).sum(dim=1)
        if "one-sum" in how:
            total = total.sum().expand_as(total)
        kept = torch.ones_like(new)
        sums.acc = sums.acc * (kept if "same-acc" in how else rescale)[:, None] + weights @ value
        sums.l = sums.l * (kept if "same-sum" in how else rescale) + total
        if "maximum-forgotten" not in how:
            sums.m = new
        sums.walked += 1
        if "divide-at-once" in how:
            sums.acc = sums.acc / sums.l[:, None]
        if "begin-the-sum-again" in how:
            import torch

            sums.l = torch.ones_like(sums.l)

    def _masked(self, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if "hidden-minus-a-number" in self.how:
            return scores + hidden * LOW
        low = LOW if "hidden-at-a-number" in self.how else -INF
        return scores.masked_fill(hidden, 0.0 if "hidden-are-zero" in self.how else low)

    def _weights(self, scores: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        import torch

        if "softmax-a-tile" in self.how:
            return scores.softmax(dim=1)
        under = scores.amax(dim=1) if "own-maximum" in self.how else new
        if "old-maximum" in self.how:
            under = old
        return torch.exp(scores - under[:, None])

    def _rescale(self, old: torch.Tensor, new: torch.Tensor, scale: float) -> torch.Tensor:
        """The factor for the old sums."""
        import torch

        if "softmax-a-tile" in self.how:
            return torch.ones_like(old)
        if "rescale-inverted" in self.how:
            return torch.exp(new - old)
        if "rescale-unscaled" in self.how:
            return torch.exp((old - new) / scale)
        # Maxima and weights are in base two, and the factor is not; and the other way round.
        if "rescale-base-e" in self.how:
            return torch.exp((old - new) * LOG2E)
        if "rescale-base-2" in self.how:
            return torch.exp((old - new) / LOG2E)
        return torch.exp(old - new)

    def _divided(self, sums: _Sums) -> torch.Tensor:
        if "undivided" in self.how:
            return sums.acc
        if "mean" in self.how:
            return sums.acc / sums.walked
        return sums.acc / sums.l[:, None]
