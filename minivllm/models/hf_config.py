"""From a Hugging Face config.json to a `ModelConfig`.

What all families share is read here; the class of the family, which registry.py finds, reads the
rest. Whatever a config asks for and this package lacks is refused by name: a field that is not
looked at would give wrong tokens and no error."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from minivllm.config import DTYPE_ALIASES, DTYPES, ModelConfig, RopeConfig
from minivllm.errors import UnsupportedModelError
from minivllm.models.config_fields import ConfigFields, Factor, Positive, Size
from minivllm.models.quantization_config import read_quantization
from minivllm.models.registry import model_class
from minivllm.validation import Range, shown

#: Fields that every config must have.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def config_from_hf(
    config: dict[str, Any],
    generation_config: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> ModelConfig:
    """Read a Hugging Face config.json, and generation_config.json for the end-of-sequence
    tokens.

    folder: where they were found, for error messages. A field that is null counts as absent.
    Raises `ConfigError` naming file, field and value for what no model can have, and
    `UnsupportedModelError` for anything that would otherwise give silently wrong tokens.
    """
    read = ConfigFields(config, str(folder / "config.json" if folder else "config.json"))
    architecture = (read.a(list, "architectures") or ["(none)"])[0]
    family = model_class(architecture)
    _check_supported(read)
    sizes: dict[str, Any] = {name: read(name, Size) for name in SIZES}
    sizes |= _heads_from_hf(read, sizes["hidden_size"])
    options: dict[str, Any] = dataclasses.asdict(family.read_layer_options(read))
    sources = [
        ConfigFields(generation_config or {}, str((folder or Path()) / "generation_config.json")),
        read,
    ]
    return ModelConfig(
        architecture=architecture,
        **sizes,
        rms_norm_eps=read("rms_norm_eps", Annotated[float, Range(0.0)], 1e-6),
        rope=_rope_from_hf(read),
        tie_word_embeddings=read("tie_word_embeddings", bool, False),
        **options,
        dtype=_dtype_from_hf(read),
        eos_token_ids=_eos_token_ids(sources, sizes["vocab_size"]),
        quantization=read_quantization(read),
    )


def _check_supported(read: ConfigFields) -> None:
    """Raises `UnsupportedModelError` for what no family here implements."""
    kinds = read.a(list, "layer_types")
    window = read("sliding_window", int, None)
    if (read("use_sliding_window", bool, False) and window) or "sliding_attention" in kinds:
        raise UnsupportedModelError(
            "This checkpoint uses sliding-window attention, which minivllm does not implement."
        )
    if others := [kind for kind in kinds if kind != "full_attention"]:
        raise UnsupportedModelError(f"Layers of type {shown(others[0])} are not supported.")
    if (activation := read.content.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(
            f"Activation {shown(activation)} is not supported; the decoder's MLP is SwiGLU."
        )


def _heads_from_hf(read: ConfigFields, hidden_size: int) -> dict[str, int]:
    """Numbers of heads and their dimension."""
    heads = read("num_attention_heads", Size)
    kv_heads = read("num_key_value_heads", Size, heads)
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"{read.where}: num_attention_heads must be a multiple of num_key_value_heads, got"
            f" {heads} and {kv_heads}."
        )
    head_dim = read("head_dim", Size, None)
    if head_dim is None:
        if hidden_size % heads:
            raise read.wrong(
                "hidden_size",
                f"must be a multiple of num_attention_heads={heads}, got {hidden_size}",
            )
        head_dim = hidden_size // heads
    if head_dim % 2:
        raise read.wrong(
            "head_dim", f"must be even, for dimensions are rotated in pairs, got {head_dim}"
        )
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _dtype_from_hf(read: ConfigFields) -> str:
    """transformers 5 writes `dtype`; before it, the field was called `torch_dtype`."""
    name = "dtype" if read.content.get("dtype") is not None else "torch_dtype"
    dtype = read(name, str, "float32").removeprefix("torch.")
    dtype = DTYPE_ALIASES.get(dtype, dtype)
    if dtype not in DTYPES:
        raise read.wrong(name, f"must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    return dtype


def _rope_from_hf(read: ConfigFields) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; before it, `rope_scaling` stood beside `rope_theta`.
    parameters = {**read.a(dict, "rope_scaling"), **read.a(dict, "rope_parameters")}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError("A rope of its own for each type of layer is not supported.")
    rope = ConfigFields(parameters, f"{read.where}, rope parameters")
    rope_type = rope("rope_type", str, rope("type", str, "default"))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"Rope type {shown(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}."
        )
    if any(fields("partial_rotary_factor", float, 1.0) != 1.0 for fields in (rope, read)):
        raise UnsupportedModelError("Partial rotary embeddings are not supported.")
    name, longest = "original_max_position_embeddings", read("max_position_embeddings", Size)
    # Some configs have the length before stretching beside the rope's fields; transformers prefers
    # that one.
    original = read(name, Size, rope(name, Size, longest))
    theta = rope("rope_theta", Positive, read("rope_theta", Positive, 10000.0))
    if rope_type == "default":
        return RopeConfig(theta, original_max_position=original)
    factor = rope(
        "factor", Factor, longest / original if rope_type == "yarn" else ConfigFields.REQUIRED
    )
    optional: dict[str, Any] = {}  # a field that is absent has the default of `RopeConfig`
    if rope_type == "llama3":
        optional = {"low_freq_factor": Positive, "high_freq_factor": Positive}
    if rope_type == "yarn":  # without a factor: DeepSeek-V3's convention, followed by transformers
        optional = {
            "beta_fast": Positive,
            "beta_slow": Positive,
            "attention_factor": Positive,
            "truncate": bool,
        }
        optional |= {
            "mscale": Annotated[float, Range(0.0)],
            "mscale_all_dim": Annotated[float, Range(0.0)],
        }
    given = {field: rope(field, kind, None) for field, kind in optional.items()}
    given = {field: value for field, value in given.items() if value is not None}
    stretched = RopeConfig(theta, rope_type, factor, original, **given)
    if rope_type == "llama3" and stretched.high_freq_factor <= stretched.low_freq_factor:
        raise rope.wrong(
            "high_freq_factor", f"must be above low_freq_factor={stretched.low_freq_factor}"
        )
    if rope_type == "yarn" and theta <= 1.0:
        raise rope.wrong("rope_theta", f"must be above 1 for YaRN, got {theta}")
    return stretched


def _eos_token_ids(sources: list[ConfigFields], vocab_size: int) -> tuple[int, ...]:
    """What ends a sequence: the ids of the first source that has any, as in transformers and vLLM.

    The engine adds the tokenizer's. Ids outside the vocabulary are never sampled, and are left out.
    """
    found = [_ids(read) for read in sources]
    first = next((ids for ids in found if ids), [])
    return tuple(dict.fromkeys(token_id for token_id in first if 0 <= token_id < vocab_size))


def _ids(read: ConfigFields) -> list[int]:
    """eos_token_id as a list: it may be one id, several or null."""
    value = read.content.get("eos_token_id")
    ids = value if isinstance(value, list) else [value] if value is not None else []
    return [
        ConfigFields({"eos_token_id": token_id}, read.where)("eos_token_id", int)
        for token_id in ids
    ]
