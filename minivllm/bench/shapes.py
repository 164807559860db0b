"""The shapes of models. Speed does not depend on the values of the weights, so a config.json is
enough to measure with.

The numbers are those of the published checkpoints' config.json. `tiny` is for a laptop.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minivllm.config import ModelConfig

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return _QWEN3 | sizes | {"num_attention_heads": heads} | more


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "tiny": _qwen3(
        64, 128, 2, 4, vocab_size=512, head_dim=32, num_key_value_heads=2, eos_token_id=0
    ),
}


def shape_config(name: str) -> ModelConfig:
    """The shape as the engine sees it. ValueError lists the names that there are."""
    if name not in SHAPES:
        raise ValueError(f"No shape {name!r}; there are: {', '.join(SHAPES)}.")
    from minivllm.models.hf_config import config_from_hf  # brings torch

    return config_from_hf(SHAPES[name])


@contextmanager
def shape_directory(name: str) -> Iterator[Path]:
    """A temporary model directory with the shape's config.json, named like the shape; for
    ``load_format="dummy"``.
    """
    shape_config(name)
    with tempfile.TemporaryDirectory(prefix="minivllm-bench-") as folder:
        path = Path(folder) / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
        yield path
