"""What the exercises of chapter 01 share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


INF = math.inf


def the_finite(maximum: torch.Tensor) -> torch.Tensor:
    """What to subtract: the maximum, but 0 for -inf, because -inf - -inf is NaN."""
    return maximum.masked_fill(maximum == -INF, 0.0)


def the_online(
    scores: torch.Tensor,
    block: int,
    *,
    start: float = -INF,
    guarded_max: bool = True,
    tile_sum: str = "running",
    rescale: str = "right",
    tail: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence by tiles, right by default, and wrong in the ways that the options name."""
    import torch

    safe = the_finite if guarded_max else (lambda maximum: maximum)
    m, l = torch.tensor(start), torch.tensor(0.0)
    for tile in scores.split(block):
        if not tail and len(tile) < block:
            break
        tile_max = tile.max()
        new = torch.maximum(m, tile_max)
        base = {"running": new, "own": tile_max, "old": m if m > -INF else new}[tile_sum]
        added = torch.exp(tile - safe(base)).sum()
        factors = {
            "right": lambda old, new: torch.exp(old - safe(new)),
            "none": lambda old, new: 1.0,
        }
        factors["swapped"] = lambda old, new: torch.exp(new - old) if old > -INF else 0.0
        l = l * factors[rescale](m, new) + added
        m = new
    return m, l
