"""RMSNorm (Zhang and Sennrich, 2019): divide by the root mean square, multiply by a learned weight.

Taught in notebooks/06_qwen3.ipynb."""

import torch
from torch import nn

from minivllm.kernels import Kernels


class RMSNorm(nn.Module):
    """weight: [size]. eps: what is added to the mean square, from the checkpoint's config."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        # A parameter, not a buffer, so that the loader notices when the checkpoint does not fill
        # it.
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps, self.kernels = eps, kernels

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual: [T, size] -> (the norm of their sum, the sum): the block's input and the
        residual stream.
        """
        if residual is None:
            return self.kernels.rms_norm(x, self.weight, self.eps), x
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
