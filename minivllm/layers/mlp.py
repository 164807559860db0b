"""The feed-forward part of a block: SwiGLU (Shazeer, 2020, arXiv 2002.05202),
``down(silu(gate(x)) * up(x))``.
"""

import torch
from torch import nn

from minivllm.kernels import Kernels
from minivllm.layers.linear import UNQUANTIZED, FusedLinear, LinearMethod, RowParallelLinear
from minivllm.parallel.group import SINGLE, TensorParallelGroup


class SwiGLU(nn.Module):
    """The MLP of one layer: gate and up are one product, and down adds up what the ranks have."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        kernels: Kernels,
        group: TensorParallelGroup = SINGLE,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        super().__init__()
        shards = dict.fromkeys(("gate_proj", "up_proj"), group.part(intermediate_size))
        self.gate_up_proj = FusedLinear(hidden_size, shards, bias, kernels, method)
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias, kernels, group, method
        )
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        return self.down_proj(self.kernels.silu_mul(self.gate_up_proj(x)))
