"""minivllm: a vLLM-like inference engine that you can read, built piece by piece in ten notebooks.

Importing the package is cheap; torch is loaded with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivllm.engine.llm_engine import LLMEngine
    from minivllm.kernels import Kernels
    from minivllm.llm import LLM
    from minivllm.sampling_params import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "minivllm.llm",
    "LLMEngine": "minivllm.engine.llm_engine",
    "SamplingParams": "minivllm.sampling_params",
    "Kernels": "minivllm.kernels",
}
__all__ = ["LLM", "Kernels", "LLMEngine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minivllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
