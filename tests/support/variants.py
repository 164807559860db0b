"""Kinds of checkpoints: families, heads, biases, tied weights, shards, scaled rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A kind of checkpoint, and the fields that must show its feature.

    Without these fields the test could pass although the feature is missing.
    """

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    #: Fields of `ModelConfig`.
    expected: dict[str, Any] = field(default_factory=dict)
    #: Changes of `RopeConfig` that must give another rope table. This shows that the variant's
    #: feature is really used.
    unlike: dict[str, Any] = field(default_factory=dict)


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    if rope_type in ("yarn", "llama3"):
        parameters = {"original_max_position_embeddings": 64, **parameters}
    if rope_type == "llama3":
        parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **parameters}
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **parameters}
    return {"rope_parameters": parameters, "max_position_embeddings": 256}


def heads(query: int, kv: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv}


TIED = {"tie_word_embeddings": True}
PLAIN = {"rope_type": "default"}
VARIANTS = {
    "qwen3": Variant(
        "qwen3", expected={"head_dim": 32, "hidden_size": 64, **heads(4, 2), "qk_norm": True}
    ),
    "qwen3-group1": Variant("qwen3", heads(4, 4), heads(4, 4)),
    "qwen3-group4": Variant("qwen3", heads(8, 2), heads(8, 2)),
    "qwen3-group8": Variant("qwen3", heads(8, 1), heads(8, 1)),
    "qwen3-group3": Variant("qwen3", heads(6, 2), heads(6, 2)),
    "qwen3-tied": Variant("qwen3", TIED, TIED),
    "qwen3-biases": Variant("qwen3", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
    "qwen3-epsilon": Variant("qwen3", {"rms_norm_eps": 0.03}, {"rms_norm_eps": 0.03}),
    "qwen3-theta": Variant(
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        unlike={"theta": 1e4},
    ),
    "qwen3-sharded": Variant("qwen3", {"max_shard_size": "100KB"}),
    "qwen3-tied-sharded": Variant("qwen3", {**TIED, "max_shard_size": "100KB"}, TIED),
    "qwen2": Variant(
        "qwen2", expected={"qkv_bias": True, "o_bias": False, "qk_norm": False, "head_dim": 16}
    ),
    "qwen2-tied-group1": Variant("qwen2", {**TIED, **heads(4, 4)}, {**TIED, **heads(4, 4)}),
    "qwen2-group8": Variant("qwen2", heads(8, 1), {**heads(8, 1), "head_dim": 8}),
    "llama": Variant(
        "llama", expected={"qkv_bias": False, "o_bias": False, "mlp_bias": False, "head_dim": 32}
    ),
    "llama-tied": Variant("llama", TIED, TIED),
    "llama-group1": Variant(
        "llama", {**heads(4, 4), "head_dim": 16}, {**heads(4, 4), "head_dim": 16}
    ),
    "llama-group4": Variant("llama", heads(8, 2), heads(8, 2)),
    "llama-attention-biases": Variant(
        "llama", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}
    ),
    "llama-mlp-biases": Variant("llama", {"mlp_bias": True}, {"mlp_bias": True, "qkv_bias": False}),
    "linear": Variant("llama", rope("linear"), unlike=PLAIN),
    "llama3": Variant("llama", rope("llama3"), unlike=PLAIN),
    "llama3-factors": Variant(
        "llama", rope("llama3", low_freq_factor=0.5, high_freq_factor=2.0), unlike=PLAIN
    ),
    "yarn": Variant("qwen3", rope("yarn"), unlike=PLAIN),
    "yarn-qwen2": Variant("qwen2", rope("yarn"), unlike=PLAIN),
    "yarn-betas": Variant(
        "llama", rope("yarn", beta_fast=4.0, beta_slow=0.5), unlike={"beta_fast": 32.0}
    ),
    "yarn-attention-factor": Variant(
        "llama", rope("yarn", attention_factor=1.3), unlike={"attention_factor": None}
    ),
    "yarn-mscale": Variant(
        "llama", rope("yarn", mscale=1.4, mscale_all_dim=0.7), unlike={"mscale": None}
    ),
    "yarn-truncate": Variant("qwen3", rope("yarn", truncate=False), unlike={"truncate": True}),
    "yarn-no-factor": Variant("llama", rope("yarn", factor=None), unlike={"factor": 1.0}),
}
