"""The feed-forward part of a block: SwiGLU (Shazeer, 2020, arXiv 2002.05202), ``down(silu(gate(x)) * up(x))``."""

import torch
from torch import nn

from minivllm.kernels import Kernels
from minivllm.layers.linear import FusedLinear, Linear


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, kernels: Kernels) -> None:
        super().__init__()
        shards = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = FusedLinear(hidden_size, shards, bias, kernels)
        self.down_proj = Linear(intermediate_size, hidden_size, bias, kernels)
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        return self.down_proj(self.kernels.silu_mul(self.gate_up_proj(x)))
