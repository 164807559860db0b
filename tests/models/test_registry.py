"""The registry: an architecture in config.json finds the class that computes it, and no other name
does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.errors import UnsupportedModelError
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.loader import iterate_weights, load_config
from minivllm.models.qwen3 import Qwen3ForCausalLM
from minivllm.models.registry import MODELS, model_class
from support.checkpoints import FAMILIES as CLASSES
from support.checkpoints import TransformersReference, random_prompt, write_checkpoint

FAMILIES = {family: f"{name}ForCausalLM" for family, (name, _) in CLASSES.items()}
OPTIONS = {"device": "cpu", "num_kv_blocks": 16, "skip_tokenizer_init": True}


def test_every_line_of_the_registry_is_a_class_of_that_name() -> None:
    assert set(MODELS) == set(FAMILIES.values())
    for architecture in MODELS:
        assert model_class(architecture).__name__ == architecture


@pytest.mark.parametrize("name", ["GemmaForCausalLM", "qwen3forcausallm", "", None, ["x"], 3])
def test_other_architectures_are_refused_with_a_list(name: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        model_class(name)
    assert all(architecture in str(caught.value) for architecture in MODELS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_knows_its_layers(family: str, bias: bool, tmp_path: Path) -> None:
    """The config says of biases and norms what transformers has written into the checkpoint."""
    changes = {"attention_bias": bias} if family != "qwen2" else {}
    write_checkpoint(tmp_path, family, num_hidden_layers=1, **changes)
    config, names = load_config(tmp_path), dict(iterate_weights(tmp_path)).keys()
    layer = "model.layers.0.self_attn."
    assert config.architecture == FAMILIES[family]
    assert config.qkv_bias == (f"{layer}k_proj.bias" in names)
    assert config.o_bias == (f"{layer}o_proj.bias" in names)
    assert config.qk_norm == (f"{layer}k_norm.weight" in names)
    assert not config.mlp_bias


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_builds_the_familys_class(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, num_hidden_layers=2)
    model = LLM(tmp_path, **OPTIONS).llm_engine.model_runner.model
    assert type(model) is model_class(FAMILIES[family])
    assert [layer.self_attn.layer_index for layer in model.model.layers] == [0, 1]


def test_a_class_of_ones_own_comes_before_the_registry(tmp_path: Path) -> None:
    class Mine(Qwen3ForCausalLM):
        pass

    write_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    assert type(LLM(tmp_path, **OPTIONS, model_cls=Mine).llm_engine.model_runner.model) is Mine


@pytest.mark.slow
def test_a_new_family_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed-OSS without biases is Llama under another name: refused before its line, and
    transformers' tokens after it.
    """
    from transformers import AutoModelForCausalLM, SeedOssConfig

    write_checkpoint(tmp_path / "llama", "llama", num_hidden_layers=2)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    said = json.loads((tmp_path / "llama" / "config.json").read_text())
    said = {k: v for k, v in said.items() if k not in ("architectures", "model_type")}
    without_biases = {"attention_bias": False, "attention_out_bias": False}
    stranger = AutoModelForCausalLM.from_config(SeedOssConfig(**said | without_biases))
    stranger.load_state_dict(llama.state_dict())
    stranger.save_pretrained(tmp_path / "stranger")
    with pytest.raises(UnsupportedModelError, match="'SeedOssForCausalLM' is none of"):
        LLM(tmp_path / "stranger", **OPTIONS)
    monkeypatch.setitem(MODELS, "SeedOssForCausalLM", LlamaForCausalLM)
    prompt = random_prompt(9)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    [output] = LLM(tmp_path / "stranger", **OPTIONS).generate([prompt], params, use_tqdm=False)
    reference = TransformersReference(tmp_path / "stranger").greedy(prompt, 12)
    assert output.outputs[0].token_ids == reference.token_ids
