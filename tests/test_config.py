"""config.json and generation_config.json: nonsense is refused with file, field and value; what is
valid stays so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from minivllm import LLM
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.config import EngineConfig
from minivllm.errors import ConfigError, MiniVLLMError, UnsupportedModelError
from minivllm.models.hf_config import config_from_hf
from minivllm.models.loader import default_sampling_params, load_config, load_generation_config
from minivllm.validation import Range, check
from support.checkpoints import TransformersReference, random_prompt, write_checkpoint
from support.ids import plain
from support.parity import greedy

CONFIG = json.loads((BUNDLED_MODEL_PATH / "config.json").read_text())
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def written(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def refused(folder: Path, name: str, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, CONFIG | {name: value}))
    return str(caught.value)


# --- nonsense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [-1, 0, "7", 7.0, 1e9, True, [4], {"a": 4}, 2**31, 10**30], ids=plain
)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(tmp_path: Path, name: str, value: Any) -> None:
    message = refused(tmp_path, name, value)
    assert (
        message
        == f"{tmp_path / 'config.json'}: {name} must be an integer from 1 to 2147483647, got"
        f" {value!r}."
    )


@pytest.mark.parametrize(
    "name", [name for name in SIZES if name not in ("num_key_value_heads", "head_dim")]
)
@pytest.mark.parametrize("is_null", [True, False])
def test_a_required_field_is_missing_or_null(tmp_path: Path, name: str, is_null: bool) -> None:
    config = {k: v for k, v in CONFIG.items() if k != name} | ({name: None} if is_null else {})
    with pytest.raises(ConfigError, match=rf"config\.json lacks the field '{name}'"):
        load_config(written(tmp_path, config))


@pytest.mark.parametrize("value", ["false", "true", 0, 1, [], {}], ids=plain)
@pytest.mark.parametrize("name", FLAGS)
def test_flags(tmp_path: Path, name: str, value: Any) -> None:
    """Any text is true in Python, "false" too."""
    assert f"{name} must be true or false, got {value!r}" in refused(tmp_path, name, value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rms_norm_eps", "x", "must be a finite number of at least 0.0"),
        ("rms_norm_eps", -1, "of at least 0.0, got -1"),
        ("rms_norm_eps", float("nan"), "finite number"),
        ("rms_norm_eps", float("inf"), "finite number"),
        ("rms_norm_eps", True, "finite number"),
        ("rms_norm_eps", [1e-6], "finite number"),
        ("rope_theta", -1, "above 0.0, got -1"),
        ("rope_theta", 0, "above 0.0"),
        ("rope_theta", [1], "finite number"),
        ("rope_theta", "10000", "finite number"),
        ("rope_theta", 10**400, "finite number"),
        ("rope_scaling", "x", "must be an object"),
        ("rope_scaling", [1], "must be an object"),
        ("rope_parameters", 5, "must be an object"),
        ("quantization_config", "x", "must be an object"),
        ("layer_types", 5, "must be a list"),
        ("layer_types", "full_attention", "must be a list"),
        ("architectures", "Qwen3ForCausalLM", "must be a list"),
        ("architectures", {"a": 1}, "must be a list"),
        ("sliding_window", "x", "must be an integer"),
        ("partial_rotary_factor", "x", "finite number"),
        ("head_dim", 7, "must be even"),
        ("eos_token_id", "x", "must be an integer, got 'x'"),
        ("eos_token_id", {"a": 1}, "must be an integer"),
        ("eos_token_id", 2.0, "must be an integer"),
        ("eos_token_id", True, "must be an integer"),
        ("eos_token_id", [2, "x"], "must be an integer, got 'x'"),
        ("eos_token_id", [[2]], "must be an integer"),
        ("torch_dtype", "int8", "must be one of float32, float16, bfloat16, got 'int8'"),
        ("torch_dtype", 5, "must be text"),
        ("dtype", {"": "bfloat16"}, "must be text"),
        ("dtype", "float8_e4m3fn", "must be one of"),
        ("original_max_position_embeddings", 0, "from 1 to"),
    ],
    ids=plain,
)
def test_other_fields(tmp_path: Path, name: str, value: Any, said: str) -> None:
    message = refused(tmp_path, name, value)
    assert message.startswith(f"{tmp_path / 'config.json'}: {name} ")
    assert said in message


def test_hidden_size_without_head_dim(tmp_path: Path) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "head_dim"} | {
        "num_attention_heads": 6,
        "hidden_size": 256,
    }
    with pytest.raises(
        ConfigError, match="hidden_size must be a multiple of num_attention_heads=6, got 256"
    ):
        load_config(written(tmp_path, config))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "field"),
    [
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": "x"}, "factor"),
        ({"rope_type": "linear", "factor": -2.0}, "factor"),
        ({"rope_type": "linear", "factor": float("inf")}, "factor"),
        ({"rope_type": "linear", "factor": 1e300}, "factor"),
        ({"rope_type": "linear", "factor": None}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        (YARN | {"original_max_position_embeddings": "512"}, "original_max_position_embeddings"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        (YARN | {"beta_fast": 0}, "beta_fast"),
        (YARN | {"beta_slow": "x"}, "beta_slow"),
        (YARN | {"attention_factor": -1}, "attention_factor"),
        (YARN | {"mscale": "x"}, "mscale"),
        (YARN | {"truncate": "false"}, "truncate"),
        (YARN | {"rope_theta": 1.0}, "rope_theta"),
        (YARN | {"rope_theta": [1]}, "rope_theta"),
        (LLAMA3 | {"low_freq_factor": 0}, "low_freq_factor"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
        (LLAMA3 | {"high_freq_factor": "x"}, "high_freq_factor"),
    ],
    ids=plain,
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope(tmp_path: Path, name: str, rope: dict[str, Any], field: str) -> None:
    message = refused(tmp_path, name, rope)
    assert message.startswith(f"{tmp_path / 'config.json'}, rope parameters")
    assert field in message


@pytest.mark.parametrize("rope_type", [5, [], ["yarn"], True, {"a": 1}], ids=plain)
def test_rope_type(tmp_path: Path, rope_type: Any) -> None:
    with pytest.raises(
        (ConfigError, UnsupportedModelError), match=r"rope_type must be text|each type of layer"
    ):
        load_config(
            written(tmp_path, CONFIG | {"rope_scaling": {"rope_type": rope_type, "factor": 2.0}})
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": [None]}, "Architecture None"),
        ({"architectures": [["Qwen3ForCausalLM"]]}, "Architecture"),
        ({"architectures": None}, "none"),
        ({"layer_types": ["linear_attention"] * 6}, "'linear_attention'"),
        ({"layer_types": [5]}, "type 5"),
        ({"hidden_act": 5}, "Activation 5"),
        ({"hidden_act": None}, "Activation None"),
        ({"num_key_value_heads": 8}, "multiple of num_key_value_heads, got 4 and 8"),
    ],
    ids=plain,
)
def test_what_is_not_implemented(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load_config(written(tmp_path, CONFIG | changes))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": ' * 100_000, "\ufeff{}", '{"a": 1e', "nul", "NaN"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_no_json(tmp_path: Path, name: str, content: str) -> None:
    (written(tmp_path, CONFIG) / name).write_text(content)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        load_config(tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        load_config(tmp_path)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (written(tmp_path, CONFIG) / "config.json").chmod(0)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        load_config(tmp_path)


def test_the_file_of_a_wrong_end_of_sequence_is_named(tmp_path: Path) -> None:
    """Also where the other file has a good one."""
    with pytest.raises(
        ConfigError, match=r"generation_config\.json: eos_token_id must be an integer, got 'x'"
    ):
        load_config(written(tmp_path, CONFIG, {"eos_token_id": ["x"]}))
    with pytest.raises(
        ConfigError, match=r"[^_]config\.json: eos_token_id must be an integer, got 'x'"
    ):
        load_config(written(tmp_path, CONFIG | {"eos_token_id": "x"}, {"eos_token_id": [2]}))


def test_the_engine_says_the_same(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        LLM(
            written(tmp_path, CONFIG | {"hidden_size": "x"}),
            load_format="dummy",
            skip_tokenizer_init=True,
        )


# --- what is valid --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen2Config", "Qwen3Config", "LlamaConfig"])
def test_configs_of_transformers(tmp_path: Path, family: str) -> None:
    import transformers

    cls = getattr(transformers, family)
    theirs = cls(architectures=[family.replace("Config", "ForCausalLM")], dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        assert getattr(config, name) == getattr(theirs, name)
    assert config.num_key_value_heads == theirs.num_key_value_heads
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    "name",
    [
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "torch_dtype",
        "dtype",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "use_sliding_window",
        "sliding_window",
        "layer_types",
        "quantization_config",
        "partial_rotary_factor",
        "eos_token_id",
        "original_max_position_embeddings",
    ],
)
def test_null_is_as_good_as_absent(tmp_path: Path, name: str) -> None:
    absent = load_config(written(tmp_path, {k: v for k, v in CONFIG.items() if k != name}))
    assert load_config(written(tmp_path, CONFIG | {name: None})) == absent


def test_numbers_may_be_written_as_integers(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, CONFIG | {"rope_theta": 1000000, "rms_norm_eps": 1}))
    assert (config.rope.theta, config.rms_norm_eps) == (1e6, 1.0)
    assert type(config.rope.theta) is float


@pytest.mark.parametrize(
    ("said", "dtype"), [("torch.float16", "float16"), ("half", "float16"), ("float", "float32")]
)
def test_names_of_types(tmp_path: Path, said: str, dtype: str) -> None:
    assert load_config(written(tmp_path, CONFIG | {"torch_dtype": said})).dtype == dtype


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted(tmp_path: Path, tied: bool) -> None:
    """Within a thousandth: biases and norms are left out."""
    config = load_config(written(tmp_path, CONFIG | {"tie_word_embeddings": tied}))
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "num_kv_blocks": 8,
        "device": "cpu",
    }
    real = sum(
        p.numel() for p in LLM(tmp_path, **options).llm_engine.model_runner.model.parameters()
    )
    assert real * 0.999 < config.num_parameters <= real


# --- the longest sequence -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 2048),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, 5120),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 8192),
        ({"rope_scaling": YARN}, 2048),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 2048}}, 8192),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 1024}, 4096),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 512}},
            2048,
        ),  # factor of lengths
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, 8192),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 256}}, 2048),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, 2048),
    ],
    ids=plain,
)
def test_longest_sequence(tmp_path: Path, changes: dict[str, Any], length: int) -> None:
    """As vLLM derives it."""
    config = load_config(written(tmp_path, CONFIG | changes))
    assert config.max_model_len == length
    assert EngineConfig().resolve(config, "cpu").max_model_len == length
    assert EngineConfig(max_model_len=length).resolve(config, "cpu").max_model_len == length
    with pytest.raises(ConfigError) as caught:
        EngineConfig(max_model_len=length + 1).resolve(config, "cpu")
    assert f"max_model_len={length + 1} is beyond the {length} positions" in str(caught.value)
    is_scaled = config.rope.rope_type != "default"
    assert ("set rope scaling" in str(caught.value)) != is_scaled, (
        "advice that was followed already"
    )
    assert ("raise that factor" in str(caught.value)) == (
        config.rope.rope_type in ("yarn", "linear")
    )


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_beyond_the_trained_length_tokens_are_transformers(tmp_path: Path, kind: str) -> None:
    """The rope table is as long as the stretched context, and right there."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 64} if kind == "yarn" else {}
    shape = {"num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 64}
    write_checkpoint(tmp_path, "qwen3", **shape, rope_parameters=rope)
    prompt = random_prompt(200, vocab_size=512)
    llm = LLM(tmp_path, skip_tokenizer_init=True, device="cpu", num_kv_blocks=32)
    assert llm.llm_engine.config.max_model_len == 256
    [output] = llm.generate([prompt], greedy(8), use_tqdm=False)
    assert (
        output.outputs[0].token_ids == TransformersReference(tmp_path).greedy(prompt, 8).token_ids
    )


# --- end-of-sequence tokens and sampling defaults -------------------------------------------------


def test_without_a_generation_config_the_config_ends(tmp_path: Path) -> None:
    shape = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "head_dim": 8,
        "intermediate_size": 24,
        "vocab_size": 64,
    }
    write_checkpoint(tmp_path, "qwen3", **shape)
    options = {"skip_tokenizer_init": True, "num_kv_blocks": 16, "device": "cpu"}
    [output] = LLM(tmp_path, **options).generate([[1, 2, 3]], greedy(12), use_tqdm=False)
    tokens = output.outputs[0].token_ids
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    written(tmp_path, config | {"eos_token_id": tokens[4]})
    [output] = LLM(tmp_path, **options).generate(
        [[1, 2, 3]], greedy(12, ignore_eos=False), use_tqdm=False
    )
    assert output.outputs[0].token_ids == tokens[: tokens.index(tokens[4]) + 1]
    assert output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        ),
        ({"repetition_penalty": 1.1, "min_p": 0.05}, {"repetition_penalty": 1.1, "min_p": 0.05}),
        ({"max_new_tokens": 7, "max_length": 9}, {"max_tokens": 7}),
        (
            {"do_sample": False, "temperature": 0.6},
            {"temperature": 0.6},
        ),  # vLLM does not look at do_sample
        ({"temperature": None, "top_p": 0.5}, {"top_p": 0.5}),
        ({"eos_token_id": 2, "pad_token_id": 0, "num_beams": 4}, {}),
        ({}, {}),
        (None, {}),
    ],
    ids=plain,
)
def test_sampling_defaults(
    tmp_path: Path, generation: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    written(tmp_path, CONFIG, generation)
    assert load_generation_config(tmp_path) == (generation or {})
    assert default_sampling_params(tmp_path) == expected
    assert default_sampling_params(generation or {}) == expected
    assert default_sampling_params(tmp_path, "auto") == expected
    assert default_sampling_params(tmp_path, "vllm") == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "x"),
        ("temperature", -1),
        ("top_p", 7),
        ("top_p", 0),
        ("top_k", 1.5),
        ("top_k", [5]),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("max_new_tokens", 0),
        ("max_new_tokens", "x"),
    ],
)
def test_sampling_defaults_that_cannot_be(tmp_path: Path, name: str, value: Any) -> None:
    written(tmp_path, CONFIG, {name: value})
    with pytest.raises(ConfigError) as caught:
        default_sampling_params(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'generation_config.json'}: ")
    assert {"max_new_tokens": "max_tokens"}.get(name, name) in str(caught.value)
    assert "generation_config='vllm'" in str(caught.value)
    assert default_sampling_params(tmp_path, "vllm") == {}


# --- validation.py --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "annotation", "taken"),
    [
        (True, bool, True),
        (np.bool_(False), bool, False),
        (3, int, 3),
        (np.int16(3), int, 3),
        (np.array(3), int, 3),
        (3, float, 3.0),
        (np.float32(0.5), float, 0.5),
        ("a", Literal["a", "b"], "a"),
        (None, int | None, None),
        (None, Annotated[int, Range(1)] | None, None),
        (1, Annotated[int, Range(1, 3)], 1),
        (3, Annotated[int, Range(1, 3)], 3),
        (0.1, Annotated[float, Range(0.0, above=True)], 0.1),
        (-5, Annotated[int, Range(high=3)], -5),
    ],
    ids=plain,
)
def test_check_takes(value: Any, annotation: Any, taken: Any) -> None:
    got = check(value, annotation)
    assert (got, type(got)) == (taken, type(taken))


@pytest.mark.parametrize(
    ("value", "annotation", "said"),
    [
        (1, bool, "must be true or false, got 1"),
        (True, int, "must be an integer, got True"),
        (np.bool_(True), int, "must be an integer, got "),
        (3.0, int, "must be an integer, got 3.0"),
        (np.array([3]), int, "must be an integer, got array([3])"),
        (None, int, "must be an integer, got None"),
        (10**400, float, "must be a finite number, got 1000"),
        ("3", float, "must be a finite number, got '3'"),
        (3 + 0j, float, "must be a finite number"),
        (b"a", str, "must be text, got b'a'"),
        ("c", Literal["a", "b"], "must be one of a, b, got 'c'"),
        (5, Literal["a", "b"] | None, "must be one of a, b, got 5"),
        (0, Annotated[int, Range(1)], "must be an integer of at least 1, got 0"),
        (4, Annotated[int, Range(1, 3)] | None, "must be an integer from 1 to 3, got 4"),
        (0, Annotated[float, Range(0.0, above=True)], "must be a finite number above 0.0, got 0"),
        (4, Annotated[int, Range(high=3)], "must be an integer of at most 3, got 4"),
        ("\x1b[31m" + "x" * 1000, int, r"must be an integer, got '\x1b[31mxxx"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_check_refuses(value: Any, annotation: Any, said: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        check(value, annotation)
    assert str(caught.value).startswith(said)
    assert len(str(caught.value)) < 200


def test_no_value_of_any_kind_is_a_bare_error() -> None:
    """Every field of a config, with values of every kind: it is read, or refused with a typed
    error.
    """
    values = [
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        7,
        2.5,
        -0.5,
        1e300,
        float("nan"),
        "",
        "x",
        "1",
        [],
        [1],
        ["x"],
        {},
        {"a": 1},
    ]
    names = [
        *CONFIG,
        "rope_scaling",
        "rope_parameters",
        "dtype",
        "layer_types",
        "quantization_config",
        "sliding_window",
    ]
    names += ["mlp_bias", "partial_rotary_factor", "original_max_position_embeddings"]
    read, unnamed = 0, []
    for name in names:
        for value in values:
            try:
                EngineConfig().resolve(config_from_hf(CONFIG | {name: value}), "cpu")
                read += 1
            except UnsupportedModelError:
                pass
            except MiniVLLMError as error:
                if name not in str(error) and "rope parameters" not in str(error):
                    unnamed.append((name, value, str(error)))
    assert unnamed == []
    assert read > len(names)
