"""Which model families run: a name in `architectures` of config.json -> the class that computes it.

One line per family. The classes are named here and imported when they are needed, as in vLLM's
registry: `ModelConfig.from_hf` looks a family up, and config.py stands on a floor below the models.
A family says itself what its config.json leaves open (`read_layer_options`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from minivllm.errors import UnsupportedModelError
from minivllm.validation import shown

if TYPE_CHECKING:
    from minivllm.models.qwen3 import Qwen3ForCausalLM

#: Architecture -> "module of minivllm.models:class in it".
MODELS = {
    "Qwen3ForCausalLM": "qwen3:Qwen3ForCausalLM",
    "Qwen2ForCausalLM": "qwen2:Qwen2ForCausalLM",
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
}


def model_class(architecture: object) -> type[Qwen3ForCausalLM]:
    """The class of this architecture. Raises `UnsupportedModelError`, which lists the supported
    ones, for any other name.
    """
    place = MODELS.get(architecture) if isinstance(architecture, str) else None
    if place is None:
        raise UnsupportedModelError(
            f"Architecture {shown(architecture)} is none of the supported {', '.join(MODELS)}."
        )
    module, _, name = place.partition(":")
    found: type[Qwen3ForCausalLM] = getattr(
        importlib.import_module(f"minivllm.models.{module}"), name
    )
    return found
