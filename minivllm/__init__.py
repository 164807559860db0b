"""minivllm: a readable inference engine in the manner of vLLM, built piece by piece in a course.

Importing the package is cheap: torch is loaded with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivllm.config import EngineArgs
    from minivllm.engine.llm_engine import LLMEngine
    from minivllm.inputs import PromptType, TextPrompt, TokensPrompt
    from minivllm.kernels import Kernels
    from minivllm.llm import LLM
    from minivllm.outputs import CompletionOutput, RequestOutput
    from minivllm.sampling_params import (
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

__version__ = "0.1.0"

_HOMES = {
    "LLM": "minivllm.llm",
    "LLMEngine": "minivllm.engine.llm_engine",
    "SamplingParams": "minivllm.sampling_params",
    "RequestOutputKind": "minivllm.sampling_params",
    "StructuredOutputsParams": "minivllm.sampling_params",
    "RequestOutput": "minivllm.outputs",
    "CompletionOutput": "minivllm.outputs",
    "PromptType": "minivllm.inputs",
    "TextPrompt": "minivllm.inputs",
    "TokensPrompt": "minivllm.inputs",
    "EngineArgs": "minivllm.config",
    "Kernels": "minivllm.kernels",
}
__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineArgs",
    "Kernels",
    "LLMEngine",
    "PromptType",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minivllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
