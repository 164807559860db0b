"""Token embedding and the output head, which are one matrix in models with tied embeddings.

Each rank has an equal share of the vocabulary; where it does not divide, rows of zeros fill up the
last one. Taught in notebooks/09_tensor_parallel.ipynb."""

import torch
import torch.nn.functional as F
from torch import nn

from minivllm.kernels import Kernels
from minivllm.layers.linear import UNQUANTIZED, Linear, LinearMethod, TiedLinearMethod
from minivllm.layers.place import Place
from minivllm.parallel.group import SINGLE, Part, TensorParallelGroup


class Embedding(nn.Module):
    """weight ``[vocab_size, hidden_size]``, or this rank's rows of it: row t is the vector of token
    t.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, group: TensorParallelGroup = SINGLE
    ) -> None:
        super().__init__()
        self.group, self.part = group, group.part(vocab_size, pad=True)
        self.weight = nn.Parameter(
            torch.empty(-(-vocab_size // group.size), hidden_size), requires_grad=False
        )
        self.weight[len(self.part) :] = 0.0

    def places(self) -> dict[str, Place]:
        """Name of a tensor in the checkpoint, without the layer's -> its place."""
        shape = torch.Size((self.part.total, self.weight.shape[1]))
        held = self.weight.data[: len(self.part)]
        return {"weight": Place(held, shape, (self.part.slice,))}

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, hidden_size]."""
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        # A rank finds the vectors of its own tokens and 0 for the others; the sum over the ranks
        # has them all.
        elsewhere = (token_ids < self.part.start) | (token_ids >= self.part.stop)
        rows = (token_ids - self.part.start).masked_fill(elsewhere, 0)
        return self.group.all_reduce(
            F.embedding(rows, self.weight).masked_fill(elsewhere[:, None], 0.0)
        )


class OutputHead(Linear):
    """Logits by comparing the hidden state with every row of ``[vocab_size, hidden_size]``.

    A head that is tied to the embedding has the embedding's weight as it is, whatever the method.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        tied_to: Embedding | None,
        kernels: Kernels,
        group: TensorParallelGroup = SINGLE,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        if tied_to is not None:
            method = TiedLinearMethod(tied_to.weight)
        inputs, rows = Part(hidden_size, 0, hidden_size), -(-vocab_size // group.size)
        super().__init__(inputs, rows, False, kernels, method)
        self.group, self.part = group, group.part(vocab_size, pad=True)
        self._fill_up()

    def use(self, method: LinearMethod) -> None:
        super().use(method)
        self._fill_up()

    def _fill_up(self) -> None:
        """Zeros in the rows behind this rank's part of the vocabulary."""
        for kind, parameter in self.named_parameters(recurse=False):
            parameter.data[len(self.place(kind, self.part).tensor) :].zero_()

    def places(self) -> dict[str, Place]:
        kinds = [kind for kind, _ in self.named_parameters(recurse=False)]
        return {kind: self.place(kind, self.part) for kind in kinds}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> [R, vocab_size], on every rank."""
        logits = self.group.all_gather(super().forward(hidden))
        return logits[:, : self.part.total]
