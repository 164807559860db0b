"""Options of an engine: every one is checked for its type, and what the machine cannot give is
said.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minivllm import LLM
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.config import EngineArgs, EngineConfig, ResolvedConfig
from minivllm.engine import memory, model_runner
from minivllm.engine.engine_core import EnginePieces
from minivllm.errors import ConfigError, MiniVLLMError, OutOfMemoryError
from minivllm.models.hf_config import config_from_hf
from minivllm.models.loader import load_config
from minivllm.parallel.launch import pick_device
from minivllm.validation import annotations_of
from support.checkpoints import write_checkpoint
from support.ids import plain

FIELDS = [field.name for field in dataclasses.fields(EngineConfig)]
#: Of no field's type.
NONSENSE = [
    [],
    {},
    object(),
    b"auto",
    float("nan"),
    float("inf"),
    -(2**70),
    2**70,
    "nonsense",
    0.5j,
]
#: Options that are a number of things; max_num_batched_tokens takes no memory until they are there.
SIZES = ("max_num_seqs", "max_model_len", "block_size", "num_kv_blocks", "tensor_parallel_size")
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 64,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "qwen3", **TINY)


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN3 | changes))
    return folder


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NONSENSE, ids=plain)
@pytest.mark.parametrize("name", FIELDS)
def test_no_option_takes_nonsense(name: str, value: Any) -> None:
    if name == "device" and isinstance(
        value, str
    ):  # text: what it may be is known where devices are
        with pytest.raises(ConfigError, match="device must be"):
            pick_device(value)
        return
    if name == "max_num_batched_tokens" and value == 2**70:
        assert EngineConfig(max_num_batched_tokens=value).max_num_batched_tokens == value
        return
    if name in SIZES and value == 2**70:
        with pytest.raises(MiniVLLMError):  # an integer, for which no memory is large enough
            LLM(load_format="dummy", device="cpu", **{name: value})
        return
    with pytest.raises(ConfigError, match=f"^{name} must be "):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("enable_prefix_caching", "off", "true or false, got 'off'"),
        ("enable_prefix_caching", 1, "true or false, got 1"),
        ("enforce_eager", 5, "true or false, got 5"),
        ("async_scheduling", "no", "true or false, got 'no'"),
        ("trace", "x", "true or false, got 'x'"),
        ("skip_tokenizer_init", None, "true or false, got None"),
        ("gpu_memory_utilization", "a", "a finite number above 0.0 and at most 1.0, got 'a'"),
        ("gpu_memory_utilization", 0, "above 0.0 and at most 1.0, got 0"),
        ("gpu_memory_utilization", 1.01, "above 0.0 and at most 1.0, got 1.01"),
        ("gpu_memory_utilization", True, "a finite number"),
        ("seed", "abc", "an integer from -9223372036854775808 to 18446744073709551615, got 'abc'"),
        ("seed", 2**64, "an integer from"),
        ("seed", 1.0, "an integer from"),
        ("device", None, "text, got None"),
        ("dtype", None, "one of auto, float32, float16, bfloat16, got None"),
        ("dtype", "int8", "one of auto, float32"),
        ("load_format", "pt", "one of auto, safetensors, dummy"),
        ("attention_backend", "FLASH_ATTN", "one of auto, triton, torch"),
        ("generation_config", "x", "one of auto, vllm"),
        ("num_kv_blocks", 0, "an integer of at least 1, got 0"),
        ("max_model_len", -1, "an integer of at least 1, got -1"),
        ("max_num_seqs", "8", "an integer of at least 1, got '8'"),
        ("tensor_parallel_size", True, "an integer of at least 1, got True"),
        ("block_size", 16.0, "an integer of at least 1, got 16.0"),
        ("device", "x" * 500, "device must be"),
    ],
)
def test_the_error_says_what_is_allowed(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        (
            LLM(load_format="dummy", **{name: value})
            if name != "load_format"
            else EngineConfig(**{name: value})
        )
    assert said in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("max_num_seqs", np.int64(8), 8),
        ("block_size", np.uint8(16), 16),
        ("seed", np.int32(-3), -3),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("seed", -(2**63), -(2**63)),
        ("enforce_eager", np.bool_(True), True),
        ("gpu_memory_utilization", np.float32(0.5), 0.5),
        ("gpu_memory_utilization", 1, 1.0),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("device", torch.device("cpu"), "cpu"),
        ("max_model_len", None, None),
    ],
)
def test_what_means_the_same_is_taken(name: str, value: Any, taken: Any) -> None:
    got = getattr(EngineConfig(**{name: value}), name)
    assert (got, type(got)) == (taken, type(taken))


def test_every_option_is_checked_for_its_type() -> None:
    """None is left out, and defaults are of their own types."""
    assert annotations_of(EngineConfig).keys() == set(FIELDS)
    EngineConfig(**{field.name: field.default for field in dataclasses.fields(EngineConfig)})


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
def test_every_seed_draws_weights(tmp_path: Path, seed: int) -> None:
    write_config(tmp_path, num_hidden_layers=1)
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "num_kv_blocks": 8,
        "device": "cpu",
    }
    drawn = [
        LLM(tmp_path, seed=s, **options).llm_engine.model_runner.model.model.norm.weight
        for s in (seed, 0)
    ]
    assert all(weight.isfinite().all() for weight in drawn)


@pytest.mark.parametrize("model", [5, b"x", 1.5, [], {}, object(), ""])
def test_a_model_that_is_no_name(model: Any) -> None:
    with pytest.raises(ConfigError, match="model is a directory, a hub id"):
        LLM(model)


# --- EngineArgs -----------------------------------------------------------------------------------


def test_engine_args() -> None:
    args = EngineArgs(model="somewhere", max_num_seqs=4, trust_remote_code=False)
    assert (args.model, args.max_num_seqs, args.block_size) == ("somewhere", 4, None)
    assert args.options == dataclasses.asdict(EngineConfig(max_num_seqs=4))
    assert dataclasses.asdict(args) == args.options | {"model": "somewhere"}
    assert {field.name for field in dataclasses.fields(EngineArgs)} == {*FIELDS, "model"}
    assert EngineArgs("somewhere").model == "somewhere"
    assert dataclasses.replace(args, seed=3) == EngineArgs("somewhere", max_num_seqs=4, seed=3)
    assert EngineArgs().model is None


def test_engine_args_make_the_engine_they_describe(checkpoint: Path) -> None:
    args = EngineArgs(checkpoint, skip_tokenizer_init=True, num_kv_blocks=16, max_num_seqs=3)
    config = LLM(**dataclasses.asdict(args)).llm_engine.config
    assert (config.num_kv_blocks, config.max_num_seqs) == (16, 3)


@pytest.mark.parametrize(
    "options", [{"max_num_seqs": "4"}, {"enable_lora": True}, {"max_num_seq": 4}]
)
def test_engine_args_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"max_num_seqs|enable_lora"):
        EngineArgs(model=None, **options)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_blocks": 10**9},
        {"num_kv_blocks": 10**18},
        {"max_num_seqs": 10**9},
        {"max_num_seqs": 10**30},
        {"block_size": 10**9},
        {"block_size": 2**62},
    ],
    ids=plain,
)
def test_more_memory_than_there_is(options: dict[str, int]) -> None:
    """Said at once, before anything is allocated, with the option to turn."""
    with pytest.raises(
        OutOfMemoryError, match=r"Starting takes .* GiB of memory, .* are free\. Lower"
    ):
        LLM(load_format="dummy", device="cpu", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vocab_size", "intermediate_size", "num_hidden_layers", "hidden_size", "head_dim"]
)
def test_a_model_that_is_too_large(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, **{name: 10**9})
    with pytest.raises(
        OutOfMemoryError, match=r"are the weights; .* Use a smaller model or dtype='bfloat16'"
    ):
        LLM(tmp_path, load_format="dummy", skip_tokenizer_init=True, device="cpu")


def test_a_billion_heads(tmp_path: Path) -> None:
    """The list of possible tensor_parallel_sizes took for ever."""
    write_config(tmp_path, num_attention_heads=10**9, num_key_value_heads=10**9)
    with pytest.raises(OutOfMemoryError, match="weights"):
        LLM(tmp_path, load_format="dummy", skip_tokenizer_init=True, device="cpu")
    with pytest.raises(ConfigError, match="tensor_parallel_size=3 does not divide"):
        LLM(
            tmp_path,
            load_format="dummy",
            skip_tokenizer_init=True,
            device="cpu",
            tensor_parallel_size=3,
        )


@pytest.mark.slow
def test_the_cache_of_a_cpu_is_modest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen3-0.6B's attention: 8.75 GiB for its 40,960 tokens. What fits 1 GiB is offered, and
    said.
    """
    write_config(tmp_path)
    runner = LLM(
        tmp_path, load_format="dummy", skip_tokenizer_init=True, device="cpu"
    ).llm_engine.model_runner
    held = sum(cache.nbytes for pair in runner.kv_caches for cache in pair)
    assert 0.9 * 2**30 < held <= 2**30
    assert runner.config.max_model_len == runner.num_kv_blocks * 16 == 4672
    [record] = [r for r in caplog.records if "max_model_len" in r.getMessage()]
    assert "max_model_len is 4672 here, not the model's 40960" in record.getMessage()
    assert "8.75 GiB" in record.getMessage()
    assert record.levelname == "WARNING"


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_model_len": 8192}, 8192),  # asked for, and there is room
        (
            {"num_kv_blocks": 64},
            40960,
        ),  # the cache is the user's own; a request beyond it is refused
        ({"dtype": "bfloat16"}, 9360),
        ({"block_size": 100}, 4600),
    ],
)
def test_a_length_that_is_asked_for_stays(
    tmp_path: Path, options: dict[str, Any], length: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(**options).resolve(config_from_hf(QWEN3), "cpu")
    assert config.max_model_len == length
    assert ("max_model_len" in caplog.text) == (length < 40960 and "max_model_len" not in options)
    on_gpu = EngineConfig(**options, attention_backend="torch").resolve(
        config_from_hf(QWEN3), "cuda"
    )
    assert on_gpu.max_model_len == options.get("max_model_len", 40960)


def test_a_small_model_has_its_whole_length() -> None:
    with LLM(device="cpu") as llm:
        config = llm.llm_engine.config
        assert (config.max_model_len, config.num_kv_blocks) == (
            2048,
            model_runner.CPU_KV_CACHE_BYTES // 98304,
        )


@pytest.mark.slow
def test_a_length_that_cannot_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 << 30)
    write_config(tmp_path)
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu"}
    with pytest.raises(
        OutOfMemoryError,
        match=r"8\.75 GiB are the KV cache; 4\.00 GiB are free\. Lower max_model_len=40960",
    ):
        LLM(tmp_path, max_model_len=40960, **options)
    LLM(tmp_path, **options)


@pytest.mark.slow
def test_free_memory_heeds_a_limit() -> None:
    """`ulimit -v` is how a shared machine says how much one may take."""
    code = """
import resource
from minivllm.engine.memory import available_bytes
before = available_bytes()
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
after = available_bytes()
assert 0 < after < 8 << 30, after
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
assert 3.9 * 2**30 < after - available_bytes() < 4.1 * 2**30
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("Linux only")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.parametrize(
    ("error", "typed"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemoryError),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
            ),
            OutOfMemoryError,
        ),
        (MemoryError(), OutOfMemoryError),
        (OSError(12, "Cannot allocate memory"), OutOfMemoryError),
        (ImportError("Triton is not installed; it has wheels for Linux only."), ConfigError),
        (RuntimeError("another"), RuntimeError),
        (OSError(13, "Permission denied"), OSError),
        (ImportError("No module named mine"), ImportError),
    ],
    ids=plain,
)
def test_a_start_that_fails(error: Exception, typed: type[Exception]) -> None:
    def failing(*_: object) -> None:
        raise error

    with pytest.raises(typed) as caught:
        LLM(device="cpu", num_kv_blocks=8, model_cls=failing)
    assert isinstance(caught.value, MiniVLLMError) == (typed in (OutOfMemoryError, ConfigError))


# --- the environment ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "0", "off"])
def test_triton_on_a_cpu_needs_its_interpreter(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1 before Python starts"):
        LLM(device="cpu", attention_backend="triton", num_kv_blocks=8)


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "triton" else real(name)
    )
    with pytest.raises(ConfigError, match="needs Triton"):
        LLM(device="cpu", attention_backend="triton", num_kv_blocks=8)


MET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "lacks RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "lacks MASTER_ADDR, MASTER_PORT"),
        ({**MET, "MASTER_PORT": ""}, "lacks MASTER_PORT"),
        ({**MET, "RANK": "x"}, "RANK must be a number"),
        ({**MET, "RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({**MET, "MASTER_PORT": "abc"}, "cannot meet"),
        ({**MET, "MASTER_PORT": "70000"}, "cannot meet"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "3"}, "set tensor_parallel_size=3"),
    ],
    ids=plain,
)
def test_half_of_what_torchrun_sets(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        LLM(device="cpu", tensor_parallel_size=2, num_kv_blocks=8)


def test_one_rank_does_not_look_at_torchrun(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    LLM(checkpoint, device="cpu", num_kv_blocks=8, skip_tokenizer_init=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU every number is refused")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="from cuda:0"):
        pick_device("cuda:99")


def test_options_are_the_same_on_the_command_line() -> None:
    """What the command line hands over is checked as Python's options are."""
    command = [
        sys.executable,
        "-m",
        "minivllm",
        "generate",
        "x",
        "-e",
        "gpu_memory_utilization=abc",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=100
    )
    assert done.returncode == 2
    assert "gpu_memory_utilization is a number" in done.stderr
    assert "Traceback" not in done.stderr


# --- what an editor and help() show ---------------------------------------------------------------


def test_llm_shows_every_option() -> None:
    """Its arguments are the config's fields, with the same defaults, and the engine's pieces."""
    shown = inspect.signature(LLM.__init__).parameters
    options = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    assert {name: shown[name].default for name in options} == options
    pieces = {field.name: field.default for field in dataclasses.fields(EnginePieces)}
    assert {name: shown[name].default for name in pieces} == pieces
    assert set(shown) == {"self", "model", "group", "vllm_options", *options, *pieces}
    for name in set(shown) - {"self"}:
        assert shown[name].annotation not in (inspect.Parameter.empty, Any) or name[:4] == "vllm"
        assert re.search(rf"\b{name}\b", LLM.__doc__ or ""), f"{name} is not explained"


def test_a_resolved_config_has_a_value_for_everything() -> None:
    model = load_config(BUNDLED_MODEL_PATH)
    resolved = EngineConfig().resolve(model, "cpu")
    assert isinstance(resolved, ResolvedConfig)
    assert [name for name, value in vars(resolved).items() if value is None] == [
        "quantization",  # as the checkpoint has the weights
        "speculative_config",  # off
    ]
    assert "auto" not in (resolved.dtype, resolved.device, resolved.attention_backend)
    assert resolved.num_kv_blocks == 0  # not known before the model is loaded
    with pytest.raises(ConfigError, match="block_size"):
        dataclasses.replace(resolved, block_size=None)
