"""Linear layers, and how they take their weights from a checkpoint. Two kinds are split over the
ranks of a group.

By output features (`FusedLinear`): every rank has all of x and computes some of y. By input
features (`RowParallelLinear`): every rank has some of x and computes a part of every y, and the sum
of these is y. The first and then the second, as in attention and the MLP, cost one all-reduce.
Taught in notebooks/09_tensor_parallel.ipynb.
"""

import torch
from torch import nn

from minivllm.kernels import Kernels
from minivllm.parallel.group import SINGLE, Part, TensorParallelGroup


def holds_part(tensor: torch.Tensor, shape: tuple[int, ...], *index: slice) -> torch.Tensor:
    """Note on a parameter, for the loader, that it holds what stands at `index` of a checkpoint
    tensor of `shape`.
    """
    tensor.part = (torch.Size(shape), index)
    return tensor


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
    """Several linear layers on the same input as one matrix product, e.g. Q, K and V, or gate and
    up.

    shards: name in the checkpoint -> number of output features, or this rank's part of them, in the
    output's order. The weight is ``[sum of the outputs, in_features]``; the loader copies one
    checkpoint tensor, or this rank's part of it, into the rows of each `shard`.
    """

    def __init__(
        self, in_features: int, shards: dict[str, int | Part], bias: bool, kernels: Kernels
    ) -> None:
        self.shards = {
            name: Part(n, 0, n) if isinstance(n, int) else n for name, n in shards.items()
        }
        super().__init__(in_features, sum(map(len, self.shards.values())), bias, kernels)

    def shard(self, kind: str, name: str) -> torch.Tensor:
        """The rows of `weight` or `bias` (kind) that belong to the shard of this name; a view."""
        parts = getattr(self, kind).split([len(part) for part in self.shards.values()])
        rows, part = dict(zip(self.shards, parts, strict=True))[name], self.shards[name]
        return holds_part(rows, (part.total, *rows.shape[1:]), part.slice)


class RowParallelLinear(Linear):
    """A linear layer of which each rank has some columns: its weight is
    ``[out_features, in_features / size]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        kernels: Kernels,
        group: TensorParallelGroup = SINGLE,
    ) -> None:
        part, self.group = group.part(in_features), group
        super().__init__(len(part), out_features, bias, kernels)
        holds_part(self.weight, (out_features, in_features), slice(None), part.slice)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features / size], this rank's -> [T, out_features], on every rank."""
        bias = self.bias if self.group.rank == 0 else None  # it is added once
        return self.group.all_reduce(self.kernels.linear(x, self.weight, bias))
