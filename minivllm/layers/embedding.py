"""Token embedding and the output head, which are one matrix in models with tied embeddings.

Taught in notebooks/09_tensor_parallel.ipynb."""

import torch
import torch.nn.functional as F
from torch import nn

from minivllm.kernels import Kernels


class Embedding(nn.Module):
    """weight ``[vocab_size, hidden_size]``: row t is the vector of token t."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, hidden_size]."""
        return F.embedding(token_ids, self.weight)


class OutputHead(nn.Module):
    """Logits by comparing the hidden state with every row of ``[vocab_size, hidden_size]``."""

    def __init__(self, vocab_size: int, hidden_size: int, tied_to: Embedding | None, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = (tied_to or Embedding(vocab_size, hidden_size)).weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> [R, vocab_size]."""
        return self.kernels.linear(hidden, self.weight)
