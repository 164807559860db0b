"""Linear layers, and how they take their weights from a checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class FusedLinear(nn.Module):
    """Several linear layers on the same input as one matrix product, e.g. Q, K and V, or gate and up.

    shards: name in the checkpoint -> number of output features, in the order of the output. The weight is
    ``[sum of the outputs, in_features]``; `load_shard` copies one checkpoint tensor into its rows.
    """

    def __init__(self, in_features: int, shards: dict[str, int], bias: bool = False) -> None:
        super().__init__()
        self.shards = shards
        out_features = sum(shards.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def shard(self, kind: str, name: str) -> torch.Tensor:
        """The rows of `weight` or `bias` (kind) that belong to the shard of this name; a view."""
        start = 0
        for shard_name, size in self.shards.items():
            if shard_name == name:
                return getattr(self, kind)[start : start + size]
            start += size
        raise KeyError(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features] -> [T, sum of the outputs]."""
        return F.linear(x, self.weight, self.bias)


class Linear(nn.Module):
    """One linear layer; weight ``[out_features, in_features]``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features] -> [T, out_features]."""
        return F.linear(x, self.weight, self.bias)
