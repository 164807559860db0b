"""From a directory to a model: what fits is loaded to the last tensor, and what does not is refused
by name.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm import LLM
from minivllm.config import ModelConfig
from minivllm.errors import ConfigError, UnsupportedModelError, WeightLoadingError
from minivllm.kernels import Kernels
from minivllm.models.loader import (
    LoadOptions,
    iterate_weights,
    load_config,
    load_model,
    resolve_model_path,
)
from minivllm.models.qwen3 import Qwen3ForCausalLM
from minivllm.parallel.group import TensorParallelGroup
from support.checkpoints import TransformersReference, random_prompt, write_checkpoint
from support.parity import greedy

TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 64,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, "qwen3", **TINY)


def load(path: Path, **options: Any) -> LLM:
    return LLM(path, skip_tokenizer_init=True, num_kv_blocks=16, dtype="float32", **options)


def edit_config(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    file = path / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in remove}
    file.write_text(json.dumps(config | changes))
    return path


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def parameters(llm: LLM) -> dict[str, torch.Tensor]:
    return {name: p.cpu() for name, p in llm.llm_engine.model_runner.model.named_parameters()}


# --- weights --------------------------------------------------------------------------------------


def test_every_tensor_arrives(checkpoint: Path) -> None:
    """Fused layers hold their shards in order; nothing keeps what it was born with."""
    theirs, ours = load_file(checkpoint / "model.safetensors"), parameters(load(checkpoint))
    for prefix, fused, names in (
        ("self_attn", "qkv_proj", "qkv"),
        ("mlp", "gate_up_proj", ("gate", "up")),
    ):
        parts = [theirs.pop(f"model.layers.0.{prefix}.{name}_proj.weight") for name in names]
        torch.testing.assert_close(
            ours.pop(f"model.layers.0.{prefix}.{fused}.weight"), torch.cat(parts), rtol=0, atol=0
        )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_every_bias_arrives(tmp_path: Path, family: str) -> None:
    shape = {k: v for k, v in TINY.items() if k != "head_dim"}
    biases = {} if family == "qwen2" else {"attention_bias": True, "mlp_bias": True}
    write_checkpoint(tmp_path, family, **shape, **biases)
    theirs, ours = load_file(tmp_path / "model.safetensors"), parameters(load(tmp_path))
    expected = torch.cat([theirs[f"model.layers.0.self_attn.{name}_proj.bias"] for name in "qkv"])
    torch.testing.assert_close(
        ours["model.layers.0.self_attn.qkv_proj.bias"], expected, rtol=0, atol=0
    )
    assert ("model.layers.0.self_attn.o_proj.bias" in ours) == (family == "llama")
    assert ("model.layers.0.mlp.gate_up_proj.bias" in ours) == (family == "llama")


def test_bfloat16_checkpoint_in_float32(checkpoint: Path) -> None:
    edit_weights(
        checkpoint, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()})
    )
    edit_config(checkpoint, dtype="bfloat16")
    expected = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"].float()
    ours = parameters(load(checkpoint))["model.embed_tokens.weight"]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert load_config(checkpoint).dtype == "bfloat16"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor(checkpoint: Path, name: str) -> None:
    edit_weights(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightLoadingError, match=f"missing {name}"):
        load(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.bias", "score.weight"],
)
def test_unexpected_tensor(checkpoint: Path, name: str) -> None:
    edit_weights(checkpoint, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(WeightLoadingError, match=f"unexpected {name}"):
        load(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.v_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_misshapen_tensor(checkpoint: Path, name: str) -> None:
    """A shape that could be broadcast into place must not be."""
    edit_weights(checkpoint, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    with pytest.raises(WeightLoadingError, match=rf"{name} has shape \(1"):
        load(checkpoint)


def test_quantized_tensor_without_a_word_in_the_config(checkpoint: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(WeightLoadingError, match=f"{name} is of type torch.int8"):
        load(checkpoint)


def test_tied_head(tmp_path: Path) -> None:
    """Without a head of its own, or with a copy of the embedding: the head is the embedding."""
    write_checkpoint(tmp_path, "qwen3", **TINY, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path).llm_engine.model_runner.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit_weights(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    model = load(tmp_path).llm_engine.model_runner.model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def own_head(path: Path, **options: Any) -> Path:
    """A checkpoint with a head of its own whose config says that there is none."""
    write_checkpoint(path, "qwen3", **{**TINY, "vocab_size": 131}, **options)
    return edit_config(path, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "4KB"}], ids=["one file", "shards, the head first"]
)
def test_a_head_that_the_config_does_not_speak_of(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is used, as transformers does."""
    own_head(tmp_path, **options)
    prompt = random_prompt(9, vocab_size=131)
    llm = load(tmp_path)
    [output] = llm.generate([prompt], greedy(12), use_tqdm=False)
    reference = TransformersReference(tmp_path)
    assert reference.model.lm_head.weight is not reference.model.model.embed_tokens.weight
    assert output.outputs[0].token_ids == reference.greedy(prompt, 12).token_ids
    tensors = dict(iterate_weights(tmp_path))
    assert torch.equal(parameters(llm)["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(
        parameters(llm)["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"]
    )
    assert "ships another lm_head.weight" in caplog.text


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_rank_takes_its_part_of_such_a_head(tmp_path: Path, rank: int) -> None:
    """131 rows over 4 ranks: 33 each, and the last one has 32 and a row of zeros."""
    own_head(tmp_path, num_attention_heads=4, num_key_value_heads=4)
    options = LoadOptions(torch.float32, torch.device("cpu"), max_position=16)
    group = TensorParallelGroup(rank, 4)
    model = load_model(tmp_path, load_config(tmp_path), Kernels.reference(), options, group)
    whole = load_file(tmp_path / "model.safetensors")
    for place, name in (
        (model.lm_head, "lm_head.weight"),
        (model.model.embed_tokens, "model.embed_tokens.weight"),
    ):
        rows = whole[name][rank * 33 : rank * 33 + 33]
        assert torch.equal(place.weight[: len(rows)], rows)
        assert not place.weight[len(rows) :].any()
        assert len(place.weight) == 33


def test_another_head_beside_quantized_layers(tmp_path: Path) -> None:
    """When the head is read, the linear layers have been quantized already."""
    own_head(tmp_path)
    llm = load(tmp_path, quantization="int8")
    whole = load_file(tmp_path / "model.safetensors")
    assert torch.equal(parameters(llm)["lm_head.weight"], whole["lm_head.weight"])
    assert llm.generate([[1, 2, 3]], greedy(4), use_tqdm=False)[0].outputs[0].token_ids


def test_one_number_makes_another_head(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3", **TINY, tie_word_embeddings=True)
    edit_weights(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    edit_weights(tmp_path, lambda t: t["lm_head.weight"][-1, -1].add_(1.0))
    model = load(tmp_path).llm_engine.model_runner.model
    difference = model.lm_head.weight - model.model.embed_tokens.weight
    assert difference.nonzero().tolist() == [[63, 15]]


def test_a_tied_checkpoint_with_the_head_alone(tmp_path: Path) -> None:
    """transformers ties either way."""
    write_checkpoint(tmp_path, "qwen3", **TINY, tie_word_embeddings=True)
    matrix = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(
        tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})
    )
    model = load(tmp_path).llm_engine.model_runner.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, matrix)


def test_a_misshapen_head_of_a_tied_checkpoint(tmp_path: Path) -> None:
    own_head(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:5].clone()}))
    with pytest.raises(WeightLoadingError, match=r"lm_head\.weight has shape \(5"):
        load(tmp_path)


def test_dummy_weights_are_tied_as_the_config_says(tmp_path: Path) -> None:
    model = load(own_head(tmp_path), load_format="dummy").llm_engine.model_runner.model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_of_ones_own_without_a_head(tmp_path: Path) -> None:
    class Headless(Qwen3ForCausalLM):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            del self.lm_head

    with pytest.raises(
        WeightLoadingError, match="differs from the embedding, and this model has no such parameter"
    ):
        load(own_head(tmp_path), model_cls=Headless)


def test_old_rotary_buffers_are_ignored(checkpoint: Path) -> None:
    edit_weights(
        checkpoint,
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    assert load(checkpoint).generate([[1, 2]], greedy(2), use_tqdm=False)[0].finished


# --- files ----------------------------------------------------------------------------------------


class Bomb:
    """What a pickled checkpoint could do to whoever loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_never_unpickles(checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(mark))
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "training_args.bin"):
        (checkpoint / name).write_bytes(bomb)
    load(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(WeightLoadingError, match="never unpickles"):
        load(checkpoint)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the test has no power: the bomb is a dud"


def test_pickle_under_a_safetensors_name(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(16)}, checkpoint / "model.safetensors")
    with pytest.raises(WeightLoadingError, match="not a readable safetensors file"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_corrupt_file(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    assert file.stat().st_size > 3000
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightLoadingError, match="not a readable safetensors file"):
        load(checkpoint)


def sharded(path: Path) -> list[Path]:
    write_checkpoint(path, "qwen3", **TINY, max_shard_size="4KB")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    return shards


def test_shards(tmp_path: Path) -> None:
    """The index says which files belong to the model; another one beside them does not."""
    sharded(tmp_path)
    save_file({"stranger": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert "stranger" not in dict(iterate_weights(tmp_path))
    load(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    gone = sharded(tmp_path)[1]
    gone.unlink()
    with pytest.raises(WeightLoadingError, match=f"lists {gone.name}, which is not there"):
        load(tmp_path)


def test_missing_shard_without_an_index(tmp_path: Path) -> None:
    shards = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    load(tmp_path)
    shards[0].unlink()
    with pytest.raises(WeightLoadingError, match="missing"):
        load(tmp_path)


def test_index_without_a_map(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(WeightLoadingError, match="safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        {},
        "model.safetensors",
        5,
        ["a"],
        {"a": None},
        {"a": 5, "b": "x"},
        {"a": ["x"]},
        {"a": {"x": 1}},
        {"a": ""},
        {"a": True},
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/model.safetensors"},
        {"a": ".."},
        {"a": "."},
        {"a": "..\\model.safetensors"},
        {"a": "C:model.safetensors"},
        {"a": "x\0.safetensors"},
        {"a": "model/../../model.safetensors"},
    ],
    ids=repr,
)
def test_what_an_index_may_not_say(tmp_path: Path, weight_map: Any) -> None:
    """Files lie beside it: it is somebody else's, and must not make us read what is elsewhere."""
    shards = sharded(tmp_path / "sub")
    for shard in shards:
        shard.rename(tmp_path / shard.name)
    (tmp_path / shards[0].name).rename(tmp_path / "model.safetensors")  # what ../ would find
    index = tmp_path / "sub" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightLoadingError) as caught:
        load(tmp_path / "sub")
    assert str(caught.value).startswith(str(index))


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_an_index_that_is_no_json_object(tmp_path: Path, content: str) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        load(tmp_path)


def test_a_shard_may_be_a_link(tmp_path: Path) -> None:
    """In the hub's cache all files are links to another folder."""
    shards = sharded(tmp_path / "model")
    (tmp_path / "blobs").mkdir()
    for number, shard in enumerate(shards):
        shard.rename(tmp_path / "blobs" / str(number))
        shard.symlink_to(f"../blobs/{number}")
    load(tmp_path / "model")


def test_a_link_to_nothing(tmp_path: Path) -> None:
    shard = sharded(tmp_path)[0]
    shard.unlink()
    shard.symlink_to("nowhere")
    with pytest.raises(WeightLoadingError, match=f"lists {shard.name}, which is not there"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "a shard"])
def test_a_folder_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    shard = sharded(tmp_path)[0]
    file = shard if name == "a shard" else tmp_path / name
    file.unlink(missing_ok=True)
    file.mkdir()
    with pytest.raises(WeightLoadingError, match=f"{file.name} is not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)
def test_a_file_that_may_not_be_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").chmod(0)
    with pytest.raises(WeightLoadingError, match=r"model\.safetensors is not a readable"):
        load(checkpoint)


def test_other_files_beside_the_model(checkpoint: Path) -> None:
    save_file({"stranger": torch.zeros(1)}, checkpoint / "adapter_model.safetensors")
    load(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_config_that_is_no_json_object(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(checkpoint)


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"]
)
def test_config_lacks_a_field(checkpoint: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load(edit_config(checkpoint, remove=(field,)))


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["/no/such/directory", "./nowhere", "~/nowhere", "nowhere", "a/b/c"]
)
def test_no_such_directory(name: str) -> None:
    with pytest.raises(ConfigError, match="No model directory"):
        LLM(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a/", "could not be fetched"),
        ("a b/c..d", "could not be fetched"),
        ("/", "no config"),
        ("owner/" + "x" * 300, "could not be fetched"),
        ("x" * 300, "No model directory"),
        ("x" * 5000, "No model directory"),
        ("~nobodyhere/x", "No model directory"),
        ("~nobodyhere", "No model directory"),
        ("a\0/b", "could not be fetched"),
        ("a\0b", "No model directory"),
        ("\ud800/x", "could not be fetched"),
        ("", "model is a directory"),
        (5, "model is a directory"),
        (b"x", "model is a directory"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_names_that_are_none(name: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(ConfigError, match=said):
        LLM(name)


def test_a_file_is_no_model_directory(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="No model directory"):
        LLM(checkpoint / "model.safetensors")


def hub_errors() -> list[Exception]:
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    return [
        errors.HFValidationError("no id"),
        errors.GatedRepoError("gated", response=response),
        errors.RepositoryNotFoundError("not found", response=response),
        errors.OfflineModeIsEnabled("offline"),
        errors.LocalEntryNotFoundError("no network"),
        httpx.ConnectError("no network"),
        httpx.ReadTimeout("slow"),
        ConnectionError("reset"),
        TimeoutError("slow"),
        PermissionError(13, "the cache"),
        OSError(28, "disk full"),
        ImportError("No module named 'huggingface_hub'"),
        RuntimeError("hub"),
        ValueError("hub"),
    ]


@pytest.mark.parametrize("error", hub_errors(), ids=lambda error: type(error).__name__)
def test_whatever_the_hub_says(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def failing(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    with pytest.raises(
        ConfigError, match="'someone/model' is no directory here and could not be fetched"
    ) as caught:
        resolve_model_path("someone/model")
    assert str(error) in str(caught.value)


def test_an_interrupt_while_downloading_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_model_path("someone/model")


FETCHED = """config.json generation_config.json model.safetensors model-00001-of-00002.safetensors
model.safetensors.index.json tokenizer.json tokenizer_config.json special_tokens_map.json
added_tokens.json chat_template.jinja chat_template.json additional_chat_templates/tool_use.jinja
vocab.json merges.txt vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model"""
LEFT_THERE = """original/consolidated.00.pth original/params.json original/tokenizer.model
original/model.safetensors consolidated.safetensors consolidated.00.pth pytorch_model.bin model.pth
README.md onnx/model.onnx onnx/config.json onnx/model.safetensors adapter_model.safetensors
flax_model.msgpack tf_model.h5 model.gguf training_args.bin runs/events.json LICENSE.txt
modeling_mine.py"""


def test_what_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Slow tokenizers' files too; not the same weights again in another format."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted = FETCHED.split()
    asked = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model_path("someone/model") == tmp_path
    assert list(filter_repo_objects([*wanted, *LEFT_THERE.split()], **asked)) == wanted


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def no_network(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        raise LocalEntryNotFoundError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(ConfigError, match="could not be fetched"):
        resolve_model_path("someone/model")
    [(name, patterns)] = asked
    assert name == "someone/model"
    assert not any("bin" in pattern or "pt" in pattern for pattern in patterns)


def test_dummy_needs_config_only(checkpoint: Path) -> None:
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            file.unlink()
    with pytest.raises(WeightLoadingError):
        load(checkpoint)
    outputs = [
        load(checkpoint, load_format="dummy", seed=seed)
        .generate([[1, 2, 3]], greedy(16), use_tqdm=False)[0]
        .outputs[0]
        for seed in (0, 0, 1)
    ]
    assert outputs[0].token_ids == outputs[1].token_ids != outputs[2].token_ids
    weights = parameters(load(checkpoint, load_format="dummy"))
    assert all(
        tensor.isfinite().all() and tensor.std() > 0
        for tensor in weights.values()
        if tensor.dim() > 1
    )


# --- config.json ----------------------------------------------------------------------------------


def rope_scaling(kind: str) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": ["GraniteForCausalLM"]}, "GraniteForCausalLM"),
        ({"architectures": []}, "none"),
        ({"use_sliding_window": True, "sliding_window": 32, "layer_types": None}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"partial_rotary_factor": 0.5}, "Partial rotary"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "Partial rotary",
        ),
        (rope_scaling("dynamic"), "dynamic"),
        (rope_scaling("longrope"), "longrope"),
        (rope_scaling("proportional"), "proportional"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 4.0}}, "su"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
            "each type of layer",
        ),
    ],
)
def test_unsupported_is_refused_by_name(
    checkpoint: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        load(edit_config(checkpoint, **changes))


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_without_its_factor(checkpoint: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match="factor"):
        load(edit_config(checkpoint, rope_parameters={"rope_type": kind, "rope_theta": 1e4}))


def test_windows_that_are_switched_off(checkpoint: Path) -> None:
    """Qwen2.5's config: a window is named and not used; a null factor means the whole head."""
    edit_config(
        checkpoint,
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=1,
        layer_types=None,
    )
    load(edit_config(checkpoint, partial_rotary_factor=None))


def test_old_and_new_style_say_the_same(checkpoint: Path) -> None:
    """transformers 5 writes dtype and rope_parameters; before it, torch_dtype, rope_theta and
    rope_scaling.
    """
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    new = {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling},
        "dtype": "bfloat16",
    }
    old = {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **scaling},
        "torch_dtype": "bfloat16",
    }
    oldest = {**old, "rope_scaling": {"type": "llama3", **scaling}, "torch_dtype": "torch.bfloat16"}
    read = []
    for style in (new, old, oldest):
        edit_config(
            checkpoint,
            remove=("rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype"),
            **style,
        )
        read.append(load_config(checkpoint))
    assert read[0] == read[1] == read[2]
    assert read[0].rope.rope_type == "llama3"
    assert (read[0].rope.theta, read[0].rope.factor, read[0].rope.original_max_position) == (
        5e5,
        8.0,
        128,
    )
    assert read[0].dtype == "bfloat16"


def test_length_before_stretching_beside_the_rope(checkpoint: Path) -> None:
    edit_config(checkpoint, **rope_scaling("yarn"), original_max_position_embeddings=256)
    assert load_config(checkpoint).rope.original_max_position == 256


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (3, None, (3,)),
        (None, 5, (5,)),
        ([3, 4], 5, (5,)),
        ([3, 4], [], (3, 4)),
        ([3, 64, -1], None, (3,)),
        (3, [5, 7, 3], (5, 7, 3)),
        (0, [0], (0,)),
        (None, None, ()),
    ],
)
def test_end_of_sequence_tokens(
    checkpoint: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    edit_config(checkpoint, eos_token_id=config)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_config(checkpoint).eos_token_ids == expected


def test_second_end_of_sequence_token_ends(checkpoint: Path) -> None:
    """Of a list in generation_config.json every token ends a sequence, unless the request ignores
    them.
    """
    prompt = random_prompt(5, vocab_size=64)
    [output] = load(checkpoint).generate([prompt], greedy(12), use_tqdm=False)
    tokens = output.outputs[0].token_ids
    position, end = next((i, t) for i, t in enumerate(tokens) if i > 1 and t not in tokens[:i])
    unused = next(t for t in range(64) if t not in tokens)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [unused, end]}))
    llm = load(checkpoint)
    [output] = llm.generate([prompt], greedy(12, ignore_eos=False), use_tqdm=False)
    assert output.outputs[0].token_ids == tokens[: position + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    [output] = llm.generate([prompt], greedy(12), use_tqdm=False)
    assert output.outputs[0].token_ids == tokens


def test_nothing_is_typed_in_by_hand(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    assert isinstance(config, ModelConfig)
    written = json.loads((checkpoint / "config.json").read_text())
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "head_dim",
        "rms_norm_eps",
    ):
        assert getattr(config, name) == written[name]
    assert config.max_position_embeddings == 1024
    assert config.rope.theta == written["rope_parameters"]["rope_theta"]
