"""Checkpoints of 8-bit weights as they are published: the engine's weights are those that they
mean, on one rank and on two, and what is not supported is named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm import LLM, Kernels
from minivllm.config import QuantizedCheckpoint
from minivllm.errors import ConfigError, UnsupportedModelError, WeightLoadingError
from minivllm.kernels.quantized import dequantize_reference
from minivllm.layers.linear import FusedLinear, Linear
from minivllm.models.hf_config import config_from_hf
from minivllm.parallel.group import TensorParallelGroup
from support.checkpoints import TransformersReference, random_prompt, write_checkpoint
from support.parity import RecordedLLM, assert_same_greedy
from support.quantized import (
    FLOATS,
    FORMATS,
    INTEGERS,
    compressed_tensors,
    write_quantized,
)
from support.ranks import run_ranks

#: Blocks of 128 that two ranks can share, and a hidden size that ends within a block.
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "head_dim": 128, "num_hidden_layers": 2}
WEIGHT_ONLY = ("fp8 blocks", "compressed fp8 blocks", "compressed int8", "compressed int8 packed")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), attention_bias=True, **SHAPE)


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers 5 dequantizes right if blocks end where the weight ends: it divides the rows by
    the number of rows of scales.
    """
    shape = {**SHAPE, "hidden_size": 256}
    return write_checkpoint(tmp_path_factory.mktemp("whole"), attention_bias=True, **shape)


@pytest.fixture(params=FORMATS)
def published(
    request: pytest.FixtureRequest, plain: Path, tmp_path: Path
) -> tuple[str, Path, Path]:
    """(name, the quantized checkpoint, the same weights in float32)."""
    stored, meant = tmp_path / "stored", tmp_path / "meant"
    write_quantized(plain, stored, meant, request.param)
    return request.param, stored, meant


def engine(path: Path, **options: Any) -> LLM:
    options = {"kernels": Kernels.reference(), "num_kv_blocks": 16, **options}
    return LLM(path, device="cpu", skip_tokenizer_init=True, **options)


def weights(llm: LLM) -> dict[str, torch.Tensor]:
    """Name in the checkpoint -> what the engine multiplies by, dequantized."""
    found = {}
    for name, layer in llm.llm_engine.model_runner.model.named_modules():
        if not isinstance(layer, Linear):
            continue
        weight = layer.weight
        if name != "lm_head":
            weight = dequantize_reference(weight, layer.weight_scale, torch.float32)
        if isinstance(layer, FusedLinear):
            sizes = [len(part) for part in layer.shards.values()]
            parent = name.rpartition(".")[0]
            parts = zip(layer.shards, weight.split(sizes), strict=True)
            found |= {f"{parent}.{shard}.weight": part for shard, part in parts}
        else:
            found[f"{name}.weight"] = weight
    return found


def test_weights_are_those_that_are_meant(published: tuple[str, Path, Path]) -> None:
    """Merged layers have a scale for each of their parts; the head is not quantized."""
    _, stored, meant = published
    expected, found = load_file(meant / "model.safetensors"), weights(engine(stored))
    assert len(found) == 2 * 7 + 1
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_tokens_are_those_of_transformers(whole_blocks: Path, name: str, tmp_path: Path) -> None:
    """On the dequantized weights; for blocks, transformers dequantizes the same files itself."""
    stored, meant = tmp_path / "stored", tmp_path / "meant"
    write_quantized(whole_blocks, stored, meant, name)
    reference = TransformersReference(meant)
    prompt = random_prompt(11)
    if name == "fp8 blocks":
        from transformers import AutoModelForCausalLM, FineGrainedFP8Config

        theirs = AutoModelForCausalLM.from_pretrained(
            stored, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
        )
        reference.model = theirs.eval()
    llm = RecordedLLM(stored, kernels=Kernels.reference(), num_kv_blocks=32)
    [completion] = llm.complete([prompt], num_tokens=NUM_TOKENS)
    assert llm.launches["linear_w8a16"] == 2 * 4 * NUM_TOKENS
    assert len(set(completion.token_ids)) > NUM_TOKENS // 2
    assert_same_greedy(reference, [completion], NUM_TOKENS, min_distinct=NUM_TOKENS // 2)


@pytest.mark.parametrize(
    "published", ["fp8 blocks", "compressed fp8 tensor", "compressed int8 packed"], indirect=True
)
def test_ranks_hold_their_parts(published: tuple[str, Path, Path]) -> None:
    """Rows of merged layers, columns of the others, and the scales that belong to them."""
    _, stored, _ = published
    whole = weights(engine(stored))

    def on_rank(group: TensorParallelGroup) -> dict[str, torch.Tensor]:
        return weights(engine(stored, tensor_parallel_size=2, group=group))

    ranks = run_ranks(2, on_rank)
    for name, weight in whole.items():
        columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        joined = torch.cat([rank[name] for rank in ranks], dim=1 if columns else 0)
        assert torch.equal(joined, weight), name


def test_modules_that_are_not_converted(plain: Path, tmp_path: Path) -> None:
    """A whole block, by its name: its weights come as they are."""
    stored, meant = tmp_path / "stored", tmp_path / "meant"
    write_quantized(plain, stored, meant, "fp8 blocks")
    tensors = load_file(stored / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        del tensors[name]
    original = load_file(plain / "model.safetensors")
    tensors |= {name: t for name, t in original.items() if name.startswith("model.layers.1.")}
    save_file(tensors, stored / "model.safetensors")
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "model.layers.1"]
    (stored / "config.json").write_text(json.dumps(config))
    blocks = engine(stored).llm_engine.model_runner.model.model.layers
    assert blocks[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(
        blocks[1].mlp.down_proj.weight, original["model.layers.1.mlp.down_proj.weight"]
    )


# --- config.json ----------------------------------------------------------------------------------

WEIGHTS = {"type": "int", "strategy": "channel"}


def read(quantization_config: dict[str, Any]) -> QuantizedCheckpoint | None:
    from transformers import Qwen3Config

    config = Qwen3Config(architectures=["Qwen3ForCausalLM"]).to_dict()
    return config_from_hf({**config, "quantization_config": quantization_config}).quantization


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"bits": 4}, "'unknown'"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'e5m2'"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "'ue8m0'"),
        (compressed_tensors(WEIGHTS | {"num_bits": 4}, format="pack-quantized"), "of 4 bits"),
        (compressed_tensors(WEIGHTS | {"symmetric": False}), "asymmetric weights"),
        (compressed_tensors(WEIGHTS | {"strategy": "group", "group_size": 128}), "group of 128"),
        (compressed_tensors({"type": "int", "strategy": "tensor"}), "integer weights with a scale"),
        (compressed_tensors(WEIGHTS, INTEGERS | {"dynamic": False}), "static scales"),
        (compressed_tensors(WEIGHTS, INTEGERS | {"symmetric": False}), "asymmetric activations"),
        (compressed_tensors(WEIGHTS, FLOATS), "different types"),
        (compressed_tensors(WEIGHTS | {"type": "float"}), "weights only"),
        (compressed_tensors(WEIGHTS, format="marlin-24"), "'marlin-24'"),
        (compressed_tensors(WEIGHTS, quantization_status="frozen"), "'frozen'"),
        (compressed_tensors(WEIGHTS, sparsity_config={"format": "sparse-24"}), "sparse"),
        (compressed_tensors(WEIGHTS, transform_config={"R1": {}}), "transform_config"),
        (compressed_tensors(WEIGHTS, config_groups={}), "no config_groups"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{named}.*minivllm reads"):
        read(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": 8}, "quant_method"),
        ({"quant_method": "fp8", "modules_to_not_convert": [3]}, "list of names, got 3"),
        (compressed_tensors(WEIGHTS, ignore=["re:("]), "wrong expression"),
        (compressed_tensors(WEIGHTS, config_groups={"group_0": 1}), "must hold objects"),
    ],
)
def test_a_wrong_value_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(config)


def test_targets_and_exceptions() -> None:
    """By name, by the end of a name, by a module that holds it, and by an expression."""
    found = read(compressed_tensors(WEIGHTS, ignore=["lm_head", "re:.*down_proj", "layers.1.mlp"]))
    assert found is not None
    assert found.of("model.layers.0.mlp.up_proj") is not None
    assert found.of("model.layers.11.mlp.up_proj") is not None
    for name in ("lm_head", "model.layers.0.mlp.down_proj"):
        assert found.of(name) is None
    assert read({"quant_method": "fp8"}).of("lm_head") is None  # type: ignore[union-attr]


def test_parts_of_a_merged_layer_must_be_alike(plain: Path, tmp_path: Path) -> None:
    write_quantized(plain, tmp_path, tmp_path / "meant", "compressed int8")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"] += ["re:.*k_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"k_proj.*in different ways"):
        engine(tmp_path)


def test_ranks_that_would_cut_a_block(plain: Path, tmp_path: Path) -> None:
    write_quantized(plain, tmp_path, tmp_path / "meant", "fp8 blocks")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def on_rank(group: TensorParallelGroup) -> LLM:
        return engine(tmp_path, tensor_parallel_size=4, group=group)

    with pytest.raises((ConfigError, UnsupportedModelError), match="block"):
        run_ranks(4, on_rank)


def test_the_checkpoints_method_is_the_engines(plain: Path, tmp_path: Path) -> None:
    write_quantized(plain, tmp_path, tmp_path / "meant", "compressed int8")
    assert engine(tmp_path).llm_engine.config.quantization == "int8"
    assert engine(tmp_path, quantization="int8").llm_engine.config.quantization == "int8"
    with pytest.raises(ConfigError, match="is quantized to int8 already"):
        engine(tmp_path, quantization="fp8")


def test_quantized_tensors_without_a_word_in_the_config(plain: Path, tmp_path: Path) -> None:
    write_quantized(plain, tmp_path, tmp_path / "meant", "fp8 tensor")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightLoadingError, match=r"float8_e4m3fn.*quantization_config"):
        engine(tmp_path)


def test_random_weights_of_a_quantized_shape(plain: Path, tmp_path: Path) -> None:
    write_quantized(plain, tmp_path, tmp_path / "meant", "fp8 blocks")
    model = engine(tmp_path, load_format="dummy").llm_engine.model_runner.model
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
