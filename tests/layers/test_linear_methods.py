"""What a linear layer does with its weight is a class: engines with other methods than the
package's give transformers' tokens, on one rank and on two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minivllm import LLM, SamplingParams
from minivllm.errors import WeightLoadingError
from minivllm.kernels import Kernels
from minivllm.layers.linear import (
    FusedLinear,
    Linear,
    LinearMethod,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from minivllm.models.qwen3 import Qwen3ForCausalLM
from minivllm.parallel.group import Part, TensorParallelGroup
from support.checkpoints import TransformersReference, random_prompt, write_checkpoint
from support.ranks import run_ranks

NUM_TOKENS = 24


class Transposed(UnquantizedLinearMethod):
    """The weight as [in_features, out_features], from when it has been loaded."""

    def process_weights_after_loading(self, layer: Linear) -> None:
        layer.weight = nn.Parameter(layer.weight.T.contiguous(), requires_grad=False)

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        product = x @ layer.weight
        return product if bias is None else product + bias


class InBFloat16(UnquantizedLinearMethod):
    """Stored in bfloat16, multiplied in the dtype of x."""

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        weight = torch.empty(out_features, in_features, dtype=torch.bfloat16)
        layer.register_weight("weight", weight)

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer.kernels.linear(x, layer.weight.to(x.dtype), bias)


class Int8:
    """8-bit integers and a scale per output feature, both from the checkpoint, multiplied in the
    dtype of x: weight = integers · scale.
    """

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        layer.register_weight("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        layer.register_weight("weight_scale", torch.empty(out_features, 1), features_per=(1, 0))

    def process_weights_after_loading(self, layer: Linear) -> None:
        pass

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer.kernels.linear(x, layer.weight.to(x.dtype) * layer.weight_scale, bias)


Tensors = dict[str, torch.Tensor]


def as_they_are(tensors: Tensors) -> tuple[Tensors, Tensors]:
    return tensors, tensors


def rounded(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Matrices that bfloat16 can hold."""
    kept = {k: v.bfloat16().float() if is_linear(k) else v for k, v in tensors.items()}
    return kept, kept


def quantized(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """(integers and scales, what they stand for)."""
    stored, meant = dict(tensors), dict(tensors)
    for name in filter(is_linear, tensors):
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        integers = (tensors[name] / scale).round().to(torch.int8)
        stored |= {name: integers, f"{name}_scale": scale}
        meant[name] = integers.float() * scale
    return stored, meant


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or name == "lm_head.weight"


METHODS: dict[str, tuple[LinearMethod, Callable[[Tensors], tuple[Tensors, Tensors]]]] = {
    "transposed": (Transposed(), as_they_are),
    "bfloat16": (InBFloat16(), rounded),
    "int8": (Int8(), quantized),
}


def run(path: Path, prompt: list[int], method: LinearMethod, **options: Any) -> list[int]:
    model_cls = partial(Qwen3ForCausalLM, method=method)
    options |= {"device": "cpu", "num_kv_blocks": 16, "skip_tokenizer_init": True}
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    [output] = LLM(path, model_cls=model_cls, **options).generate([prompt], params, use_tqdm=False)
    return output.outputs[0].token_ids


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_those_of_the_weights(name: str, size: int, tmp_path: Path) -> None:
    """Biases, fused layers, rows and columns of ranks, and a vocabulary that two do not divide."""
    method, store = METHODS[name]
    for folder in ("ours", "theirs"):
        write_checkpoint(tmp_path / folder, "qwen3", attention_bias=True, vocab_size=1021)
    stored, meant = store(load_file(tmp_path / "ours" / "model.safetensors"))
    for folder, tensors in (("ours", stored), ("theirs", meant)):
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    prompt = random_prompt(11, vocab_size=1021)
    expected = TransformersReference(tmp_path / "theirs").greedy(prompt, NUM_TOKENS).token_ids
    assert len(set(expected)) > NUM_TOKENS // 2, "a model that repeats itself shows little"

    def on_rank(group: TensorParallelGroup) -> list[int]:
        return run(tmp_path / "ours", prompt, method, tensor_parallel_size=size, group=group)

    assert run_ranks(size, on_rank) == [expected] * size


def test_every_linear_layer_asks_the_method(tmp_path: Path) -> None:
    """Created, prepared once when it is filled, and applied: 4 layers in a block, and the head."""
    calls: list[tuple[str, Linear]] = []

    class Counting(UnquantizedLinearMethod):
        def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
            calls.append(("create", layer))
            super().create_weights(layer, in_features, out_features)

        def process_weights_after_loading(self, layer: Linear) -> None:
            assert layer.weight.isfinite().all()
            calls.append(("process", layer))

        def apply(self, layer: Linear, *arguments: Any) -> torch.Tensor:
            calls.append(("apply", layer))
            return super().apply(layer, *arguments)

    write_checkpoint(tmp_path, "qwen3", num_hidden_layers=2)
    run(tmp_path, [1, 2, 3], Counting())
    layers = {layer for what, layer in calls if what == "create"}
    assert len(layers) == 2 * 4 + 1
    for what in ("create", "process"):
        assert [call for call, _ in calls].count(what) == len(layers)
    assert {layer for what, layer in calls if what == "apply"} == layers


def test_a_tied_head_keeps_the_embeddings_weight(tmp_path: Path) -> None:
    """Whatever the method: the embedding looks rows up in that matrix."""
    write_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    prompt = random_prompt(11)
    expected = TransformersReference(tmp_path).greedy(prompt, NUM_TOKENS).token_ids
    assert run(tmp_path, prompt, Transposed()) == expected


def test_integers_need_a_method_that_has_a_place_for_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    stored, _ = quantized(load_file(tmp_path / "model.safetensors"))
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightLoadingError, match="quantization_config"):
        run(tmp_path, [1, 2, 3], UnquantizedLinearMethod())


class Blocks:
    """A scale per block of 4 x 8 weights, as in checkpoints of 8-bit floats."""

    def create_weights(self, layer: Linear, in_features: int, out_features: int) -> None:
        layer.register_weight("weight", torch.empty(out_features, in_features))
        layer.register_weight("scale", torch.empty(out_features // 4, in_features // 8), (4, 8))

    def process_weights_after_loading(self, layer: Linear) -> None:
        pass

    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        scales = layer.get_parameter("scale").repeat_interleave(4, 0).repeat_interleave(8, 1)
        return layer.kernels.linear(x, layer.weight * scales, bias)


def test_a_scale_per_block_is_placed_by_blocks() -> None:
    """Rank 1 of 2: the second half of the rows of each shard, and of the columns."""
    group = TensorParallelGroup(1, 2)
    shards = {"q_proj": Part(16, 8, 16), "k_proj": Part(8, 4, 8)}
    fused = FusedLinear(32, shards, False, Kernels.reference(), Blocks())
    places = fused.places()
    assert list(places) == ["q_proj.weight", "k_proj.weight", "q_proj.scale", "k_proj.scale"]
    assert places["q_proj.scale"].shape == (4, 4)
    assert places["q_proj.scale"].index == (slice(2, 4), slice(0, 4))
    assert places["k_proj.scale"].shape == (2, 4)
    assert places["k_proj.scale"].index == (slice(1, 2), slice(0, 4))
    assert places["k_proj.scale"].tensor.data_ptr() == fused.get_parameter("scale")[2].data_ptr()
    rows = RowParallelLinear(32, 16, False, Kernels.reference(), group, Blocks())
    assert rows.places()["scale"].shape == (4, 4)
    assert rows.places()["scale"].index == (slice(0, 4), slice(2, 4))
    assert rows.places()["scale"].tensor.shape == (4, 2)
