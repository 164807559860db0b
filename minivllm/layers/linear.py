"""Linear layers, and how they take their weights from a checkpoint. Taught in notebooks/09_tensor_parallel.ipynb."""

import torch
from torch import nn

from minivllm.kernels import Kernels


class Linear(nn.Module):
    """One linear layer; weight ``[out_features, in_features]``."""

    def __init__(self, in_features: int, out_features: int, bias: bool, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features] -> [T, out_features]."""
        return self.kernels.linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """Several linear layers on the same input as one matrix product, e.g. Q, K and V, or gate and up.

    shards: name in the checkpoint -> number of output features, in the order of the output. The weight is
    ``[sum of the outputs, in_features]``; the loader copies one checkpoint tensor into the rows of each `shard`.
    """

    def __init__(self, in_features: int, shards: dict[str, int], bias: bool, kernels: Kernels) -> None:
        super().__init__(in_features, sum(shards.values()), bias, kernels)
        self.shards = shards

    def shard(self, kind: str, name: str) -> torch.Tensor:
        """The rows of `weight` or `bias` (kind) that belong to the shard of this name; a view."""
        parts = getattr(self, kind).split(list(self.shards.values()))
        return dict(zip(self.shards, parts, strict=True))[name]
