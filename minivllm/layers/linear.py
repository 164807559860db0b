"""Linear layers, what they do with their weights, and how they take them from a checkpoint.

A layer leaves its weight to a `LinearMethod` (vLLM's term): which parameters there are, and how x
is multiplied. Weights that are stored in another way, quantized ones for example, are another
method; no layer has a branch for them.

Two kinds of layers are split over the ranks of a group. By output features (`FusedLinear`): every
rank has all of x and computes some of y. By input features (`RowParallelLinear`): every rank has
some of x and computes a part of every y, and the sum of these is y. The first and then the second,
as in attention and the MLP, cost one all-reduce. Taught in notebooks/09_tensor_parallel.ipynb.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from minivllm.kernels import Kernels
from minivllm.layers.place import Place
from minivllm.parallel.group import SINGLE, Part, TensorParallelGroup


class LinearMethod(Protocol):
    """What a linear layer does with its weight. One object serves many layers: what it keeps of a
    layer are parameters of the layer.
    """

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        """Give the layer its parameters with `Linear.register_weight`, under the names that
        the checkpoint has for them. The sizes are this rank's.
        """

    def process_weights_after_loading(self, layer: Linear) -> None:
        """Bring the parameters, now filled, into the form that `apply` reads. Called once."""

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: [T, in_features] -> [T, out_features], in the dtype of x."""
        ...


class UnquantizedLinearMethod:
    """One ``weight`` of the model's dtype, [out_features, in_features], multiplied by the kernel
    `linear`.
    """

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        layer.register_weight("weight", torch.empty(out_features, in_features))

    def process_weights_after_loading(self, layer: Linear) -> None:
        """The checkpoint's form is the form that the kernel reads."""

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer.kernels.linear(x, layer.weight, bias)


class TiedLinearMethod(UnquantizedLinearMethod):
    """The weight is the parameter of another layer, for example the embedding's."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        layer.register_weight("weight", self.weight)


UNQUANTIZED = UnquantizedLinearMethod()


class Linear(nn.Module):
    """One linear layer: parameters that belong to `method`, a bias or None, and the places that the
    loader fills.

    inputs: the input features that this rank's weight has; out_features: the number of its output
    features.
    """

    #: Of methods that have one parameter of this name.
    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        inputs: Part,
        out_features: int,
        bias: bool,
        kernels: Kernels,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        super().__init__()
        self.inputs, self.out_features = inputs, out_features
        self.kernels, self.has_bias = kernels, bias
        self._features_per: dict[str, tuple[int, ...]] = {}
        Linear.use(self, method)

    def use(self, method: LinearMethod) -> None:
        """Take this method, and its parameters in place of the present ones, before they are
        filled.
        """
        for kind in self._features_per:
            delattr(self, kind)
        self._features_per.clear()
        self.method = method
        method.create_weights(self, len(self.inputs), self.out_features)
        self.register_parameter("bias", None)
        if self.has_bias:
            self.register_weight("bias", torch.empty(self.out_features), features_per=(1,))

    def register_weight(
        self, kind: str, tensor: torch.Tensor, features_per: tuple[int, ...] = (1, 1)
    ) -> None:
        """Add a parameter of one or two dimensions. kind: its name here and in the checkpoint.

        features_per: how many output features a row stands for and, in two dimensions, how many
        input features a column stands for; 0: a column stands for all. (1, 1) is a weight, (1, 0) a
        scale per output feature, ``[out_features, 1]``, and (128, 128) a scale per block. (0,): the
        checkpoint has one number per shard, which fills the rows of all its output features.
        """
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(kind, tensor)
        self._features_per[kind] = features_per

    def place(self, kind: str, outputs: Part, before: int = 0) -> Place:
        """The rows of a parameter that belong to these output features.

        before: the number of output features that stand before them in this layer.
        """
        parameter = self.get_parameter(kind)
        per_row, *per_column = self._features_per[kind]
        if per_row == 0:
            return Place(parameter.data[before : before + len(outputs)], torch.Size((1,)))
        parts = [_in_units(outputs, per_row)]
        for features in per_column:
            whole = Part(parameter.shape[1], 0, parameter.shape[1])
            parts.append(_in_units(self.inputs, features) if features else whole)
        first = before // per_row
        held = parameter.data[first : first + len(parts[0])]
        return Place(held, torch.Size(p.total for p in parts), tuple(p.slice for p in parts))

    def places(self) -> dict[str, Place]:
        """Name of a tensor in the checkpoint, without the layer's -> its place."""
        outputs = Part(self.out_features, 0, self.out_features)
        return {kind: self.place(kind, outputs) for kind, _ in self.named_parameters(recurse=False)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features] -> [T, out_features]."""
        return self.method.apply(self, x, self.bias)


def _in_units(part: Part, features: int) -> Part:
    """A part of features as a part of rows or columns that stand for so many features each; the
    last one may stand for fewer.
    """
    return Part(-(-part.total // features), part.start // features, -(-part.stop // features))


class FusedLinear(Linear):
    """Several linear layers on the same input as one matrix product, e.g. Q, K and V, or gate and
    up.

    shards: name in the checkpoint -> number of output features, or this rank's part of them, in the
    output's order. The weight is ``[sum of the outputs, in_features]``; the loader copies one
    checkpoint tensor, or this rank's part of it, into the rows of each `shard`.
    """

    def __init__(
        self,
        in_features: int,
        shards: Mapping[str, int | Part],
        bias: bool,
        kernels: Kernels,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        parts = {name: Part(n, 0, n) if isinstance(n, int) else n for name, n in shards.items()}
        inputs, out_features = Part(in_features, 0, in_features), sum(map(len, parts.values()))
        super().__init__(inputs, out_features, bias, kernels, method)
        self.shards = parts

    def shard(self, kind: str, name: str) -> Place:
        """The rows of a parameter (kind: "weight", "bias") that belong to the shard of this
        name.
        """
        names = list(self.shards)
        before = sum(len(self.shards[other]) for other in names[: names.index(name)])
        return self.place(kind, self.shards[name], before)

    def places(self) -> dict[str, Place]:
        """The shards' names stand in the checkpoint where this layer's would: ``q_proj.weight``."""
        return {
            f"{name}.{kind}": self.shard(kind, name)
            for kind, _ in self.named_parameters(recurse=False)
            for name in self.shards
        }


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
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        super().__init__(group.part(in_features), out_features, bias, kernels, method)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features / size], this rank's -> [T, out_features], on every rank."""
        bias = self.bias if self.group.rank == 0 else None  # it is added once
        return self.group.all_reduce(self.method.apply(self, x, bias))
