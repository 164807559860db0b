"""Checkpoints of 8-bit weights, written in the formats in which they are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Published:
    """One format. store: a weight [N, K] -> the tensors that stand for it, by the ends of their
    names, and what they mean, [N, K] float32.
    """

    config: dict[str, Any]
    store: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def write_quantized(plain: Path, stored: Path, meant: Path, name: str) -> None:
    """Of the unquantized checkpoint in `plain`: the same in the format of this name, and its
    dequantized weights.
    """
    published = FORMATS[name]
    tensors = load_file(plain / "model.safetensors")
    ours, theirs = dict(tensors), dict(tensors)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        module = key.removesuffix(".weight")
        parts, theirs[key] = published.store(ours.pop(key))
        ours |= {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}
    config = json.loads((plain / "config.json").read_text())
    for folder, content, extra in (
        (stored, ours, {"quantization_config": published.config}),
        (meant, theirs, {}),
    ):
        folder.mkdir(exist_ok=True)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | extra))


def compressed_tensors(
    weights: dict[str, Any], activations: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    described = {"num_bits": 8, "symmetric": True, "group_size": None, "dynamic": False, **weights}
    group = {
        "targets": ["Linear"],
        "weights": described,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **fields,
    }


PER_TOKEN = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}
FLOATS, INTEGERS = PER_TOKEN | {"type": "float"}, PER_TOKEN | {"type": "int"}


def _to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quantized = (weight / scale).clamp(-448, 448).to(FP8)
    return quantized, quantized.float() * scale


def _channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    quantized, meant = _to_fp8(weight, scale.float())
    return {"weight": quantized, "weight_scale": scale}, meant


def _tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax() / 448).reshape(1)
    quantized, meant = _to_fp8(weight, scale)
    return {"weight": quantized, "weight_scale": scale}, meant


def _scalar(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, meant = _tensor(weight)
    return tensors | {"weight_scale": tensors["weight_scale"].reshape(())}, meant


def _blocks(kind: str) -> Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]:
    def store(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = (-(-n // 128) for n in weight.shape)
        scale, meant = torch.empty(rows, columns), torch.empty_like(weight)
        quantized = torch.empty(weight.shape, dtype=FP8)
        for row in range(rows):
            for column in range(columns):
                place = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
                scale[row, column] = weight[place].abs().max() / 448
                quantized[place], meant[place] = _to_fp8(weight[place], scale[row, column])
        return {"weight": quantized, kind: scale}, meant

    return store


def _integers(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    quantized = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": quantized, "weight_scale": scale}, quantized.float() * scale.float()


def _packed(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, meant = _integers(weight)
    digits = (tensors["weight"].to(torch.int64) + 128).unflatten(1, (-1, 4))
    packed = (digits << torch.tensor([0, 8, 16, 24])).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    shape = torch.tensor(weight.shape)
    scale = tensors["weight_scale"]
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}, meant


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
FORMATS = {
    "fp8 blocks": Published(
        {**_FP8, "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
        _blocks("weight_scale_inv"),
    ),
    "fp8 tensor": Published(_FP8, _scalar),
    "compressed fp8 channel": Published(
        compressed_tensors({"type": "float", "strategy": "channel"}, FLOATS), _channels
    ),
    "compressed fp8 tensor": Published(
        compressed_tensors({"type": "float", "strategy": "tensor"}, FLOATS), _tensor
    ),
    "compressed fp8 blocks": Published(
        compressed_tensors(
            {"type": "float", "strategy": "block", "block_structure": [128, 128]},
            FLOATS | {"strategy": "group", "group_size": 128},
        ),
        _blocks("weight_scale"),
    ),
    "compressed int8": Published(
        compressed_tensors(
            {"type": "int", "strategy": "channel"}, INTEGERS, format="int-quantized"
        ),
        _integers,
    ),
    "compressed int8 packed": Published(
        compressed_tensors({"type": "int", "strategy": "channel"}, format="pack-quantized"),
        _packed,
    ),
}
