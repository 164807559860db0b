"""Quantized linear layers: what is stored of a weight, where it comes from, and which kernel
multiplies it.

`assign_methods` says for every linear layer of a model which `LinearMethod` it has. There are two
kinds. `Int8LinearMethod` and `Fp8LinearMethod` quantize a weight when it has been loaded; the
`Stored…` methods take quantized weights as checkpoints publish them. All of them leave ``weight``
and ``weight_scale`` behind, which two kernels read: `linear_w8a16` and `linear_w8a8`.

Embeddings are not linear layers and stay as they are, and so does a head that is not quantized in
its checkpoint. Taught in notebooks/14_quantization.ipynb.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from minivllm.config import QuantizedCheckpoint, QuantizedLayers
from minivllm.errors import ConfigError, UnsupportedModelError
from minivllm.kernels.quantized import BLOCK, FP8, quantize_channels
from minivllm.layers.embedding import OutputHead
from minivllm.layers.linear import (
    UNQUANTIZED,
    FusedLinear,
    Linear,
    LinearMethod,
    RowParallelLinear,
    TiedLinearMethod,
)


class WeightOnly:
    """Multiplies by `linear_w8a16`: the activations stay in the dtype of the model."""

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer.kernels.linear_w8a16(x, layer.weight, layer.weight_scale, bias)

    def keep(self, layer: Linear, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Make these the layer's parameters. weight: int8 or e4m3, [out_features, in_features]."""
        scale = scale.float().contiguous()
        set_parameter(layer, "weight_scale", scale)
        set_parameter(layer, "weight", layer.kernels.pack_w8a16(weight, scale))


class DynamicActivations:
    """Multiplies by `linear_w8a8`: activations are quantized to e4m3, with a scale per token."""

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer.kernels.linear_w8a8(x, layer.weight, layer.weight_scale, bias)

    def keep(self, layer: Linear, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Make these the layer's parameters. weight: e4m3, [out_features, in_features]."""
        set_parameter(layer, "weight_scale", scale.float().contiguous())
        set_parameter(layer, "weight", weight)


def set_parameter(layer: Linear, kind: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of the layer's parameter of this name, or add it."""
    setattr(layer, kind, nn.Parameter(tensor, requires_grad=False))


class _Quantize:
    """Created and loaded as an unquantized weight, then quantized, with a scale per channel.

    Of a layer whose columns are split over ranks, the scale is that of the whole row: any number of
    ranks has the same quantized weights.
    """

    dtype: torch.dtype
    keep: Callable

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        UNQUANTIZED.create_weights(layer, in_features, out_features)

    def process_weights_after_loading(self, layer: Linear) -> None:
        weight = layer.weight.data
        top = weight.abs().amax(1, keepdim=True)
        if isinstance(layer, RowParallelLinear):
            top = layer.group.all_gather(top).amax(1, keepdim=True)
        self.keep(layer, *quantize_channels(weight, self.dtype, top))


class Int8LinearMethod(_Quantize, WeightOnly):
    """`quantization="int8"`: int8 weights, and activations in the model's dtype."""

    dtype = torch.int8


class Fp8LinearMethod(_Quantize, DynamicActivations):
    """`quantization="fp8"`: weights and activations in e4m3."""

    dtype = FP8


class StoredInt8(WeightOnly):
    """int8 with a scale per output channel, from the checkpoint."""

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        layer.register_weight("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        _register_channel_scale(layer, out_features)

    def process_weights_after_loading(self, layer: Linear) -> None:
        self.keep(layer, layer.weight.data, layer.weight_scale.data)


class StoredPackedInt8(WeightOnly):
    """int8 plus 128, four to an int32, the first in its lowest bits, as compressed-tensors packs
    them; with a scale per output channel.
    """

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        if in_features % 4 or layer.inputs.start % 4:
            raise ConfigError(
                f"A layer of {layer.inputs.total} input features is packed by fours, and this"
                f" rank's part of {in_features} is no multiple of 4; lower tensor_parallel_size."
            )
        packed = torch.empty(out_features, in_features // 4, dtype=torch.int32)
        layer.register_weight("weight_packed", packed, features_per=(1, 4))
        _register_channel_scale(layer, out_features)

    def process_weights_after_loading(self, layer: Linear) -> None:
        packed = layer.get_parameter("weight_packed").data
        # Little-endian machines only, and torch has no other.
        weight = packed.view(torch.uint8).sub(128).view(torch.int8)
        del layer.weight_packed
        self.keep(layer, weight, layer.weight_scale.data)


class StoredFp8(DynamicActivations):
    """e4m3 with a scale per output channel, or with one per tensor of the checkpoint (per_tensor):
    the shards of a merged layer each have their own.
    """

    def __init__(self, per_tensor: bool = False) -> None:
        self.per_tensor = per_tensor

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        layer.register_weight("weight", torch.empty(out_features, in_features, dtype=FP8))
        _register_channel_scale(layer, out_features, self.per_tensor)

    def process_weights_after_loading(self, layer: Linear) -> None:
        self.keep(layer, layer.weight.data, layer.weight_scale.data)


class StoredFp8Blocks(WeightOnly):
    """e4m3 with a scale per block of 128 x 128. scale: its name in the checkpoint.

    Activations stay in the model's dtype, which loses less than the publishers' 8 bits.
    """

    def __init__(self, scale: str) -> None:
        self.scale = scale

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        _check_blocks(layer)
        layer.register_weight("weight", torch.empty(out_features, in_features, dtype=FP8))
        blocks = (math.ceil(out_features / BLOCK), math.ceil(in_features / BLOCK))
        scale = torch.empty(blocks, dtype=torch.float32)
        layer.register_weight(self.scale, scale, features_per=(BLOCK, BLOCK))

    def process_weights_after_loading(self, layer: Linear) -> None:
        scale = layer.get_parameter(self.scale).data
        delattr(layer, self.scale)
        self.keep(layer, layer.weight.data, scale)


def _register_channel_scale(layer: Linear, out_features: int, per_tensor: bool = False) -> None:
    scale = torch.empty(out_features, 1, dtype=torch.float32)
    layer.register_weight("weight_scale", scale, features_per=(0,) if per_tensor else (1, 0))


def _check_blocks(layer: Linear) -> None:
    """Raise `ConfigError` where a block would be shared by two shards or two ranks."""
    parts = [layer.inputs]
    if isinstance(layer, FusedLinear):
        parts += layer.shards.values()
        *first, _ = layer.shards.values()
        if any(len(part) % BLOCK for part in first):
            raise UnsupportedModelError(
                "A block of 128 x 128 weights would span two merged layers, of"
                f" {[len(part) for part in layer.shards.values()]} output features."
            )
    for part in parts:
        if part.start % BLOCK or (part.stop % BLOCK and part.stop != part.total):
            raise ConfigError(
                f"This rank's features {part.start} to {part.stop} of {part.total} are no whole"
                f" blocks of {BLOCK}; lower tensor_parallel_size."
            )


class Later:
    """No weight yet: `assign_methods` gives the layer another method when its name is known."""

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        """Nothing."""

    def process_weights_after_loading(self, layer: Linear) -> None:
        raise AssertionError("a layer without a method")

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise AssertionError("a layer without a method")


def assign_methods(
    model: nn.Module, checkpoint: QuantizedCheckpoint | None, method: str | None
) -> None:
    """Give every linear layer of the model its method, by its name.

    checkpoint: how its weights are stored; None: unquantized, and `method` ("fp8", "int8") is what
    they are quantized to, except the head's. Raises `UnsupportedModelError` where the parts of a
    merged layer are stored in different ways.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or isinstance(layer.method, TiedLinearMethod):
            continue
        if checkpoint is not None:
            layer.use(_stored_method(_entry(checkpoint, name, layer)))
        elif method is None or isinstance(layer, OutputHead):
            layer.use(UNQUANTIZED)
        else:
            layer.use(Int8LinearMethod() if method == "int8" else Fp8LinearMethod())


def _entry(checkpoint: QuantizedCheckpoint, name: str, layer: Linear) -> QuantizedLayers | None:
    names = [name]
    if isinstance(layer, FusedLinear):
        parent = name.rpartition(".")[0]
        names = [f"{parent}.{shard}" for shard in layer.shards]
    entries = {checkpoint.of(name) for name in names}
    if len(entries) > 1:
        raise UnsupportedModelError(
            f"The checkpoint stores {', '.join(names)} in different ways; minivllm merges these"
            " layers, so they must be stored alike."
        )
    return entries.pop()


def _stored_method(entry: QuantizedLayers | None) -> LinearMethod:
    if entry is None:
        return UNQUANTIZED
    if entry.format == "fp8_block":
        return StoredFp8Blocks(entry.scale)
    if entry.format in ("fp8", "fp8_tensor"):
        return StoredFp8(per_tensor=entry.format == "fp8_tensor")
    return StoredInt8() if entry.format == "int8" else StoredPackedInt8()
