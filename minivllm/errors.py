"""Typed errors. Each message says what was wrong and what to do about it.

Taught in notebooks/11_using_minivllm.ipynb.
"""

from minivllm.text import printable


class MiniVLLMError(Exception):
    """Base of every error that minivllm raises on purpose."""

    def __str__(self) -> str:
        """The message, without control characters that it may quote from prompts or files."""
        return printable(super().__str__())


class ConfigError(MiniVLLMError, ValueError):
    """An engine option has a value that cannot work, alone or together with another option."""


class UnknownOptionError(ConfigError, TypeError):
    """No engine option has this name. The message suggests another name, or what to do."""


class UnsupportedModelError(MiniVLLMError):
    """The checkpoint needs a feature that minivllm lacks. The message names the feature."""


class WeightLoadingError(MiniVLLMError):
    """A checkpoint's tensors do not fit the model: missing, unexpected, or of another shape."""


class RequestError(MiniVLLMError, ValueError):
    """A request cannot be served. Only this request is refused, not the others of its batch."""


class EmptyPromptError(RequestError):
    """The prompt has no tokens."""


class PromptTooLongError(RequestError):
    """The prompt leaves no room for output in `max_model_len`, or can never fit the KV cache."""


class InvalidTokenError(RequestError):
    """A token id is outside the model's vocabulary."""


class SamplingParamsError(RequestError):
    """A sampling parameter, or a combination of them, is out of range or not supported."""


class UnsupportedParameterError(SamplingParamsError, TypeError):
    """`SamplingParams` has no such field. The message says what to use, or suggests a name."""


class TokenizerRequiredError(RequestError):
    """The request needs a tokenizer, but the engine has none (`skip_tokenizer_init=True`)."""


class UnsupportedFeatureError(MiniVLLMError, NotImplementedError):
    """vLLM has this feature and minivllm does not. The message says what to do instead."""


class UnsupportedArgumentError(UnsupportedFeatureError, TypeError):
    """A method was called with an argument that only vLLM has, or with an unknown argument."""


class UnsupportedMethodError(UnsupportedFeatureError, AttributeError):
    """A method that only vLLM's `LLM` has. Also an AttributeError, so that `hasattr` is False."""


class MissingPackageError(RequestError, ImportError):
    """The request needs an optional package. The message says how to install it."""


class StructuredOutputError(RequestError):
    """The output could not go on as its grammar demands. The message says why."""


class InvalidLogitsError(RequestError):
    """The model's logits for this request are not finite, so no token can be chosen."""

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "The model's logits are not finite (NaN or infinity), so no token can be chosen. "
            "Either the weights are broken, or numbers have overflowed: with dtype='float16', try "
            "'bfloat16' or 'float32'."
        )


class ConcurrentUseError(MiniVLLMError, RuntimeError):
    """Another thread is using this engine. An engine serves one thread at a time."""

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "Another thread is using this engine, and an engine is for one thread at a time. "
            "Give each thread an engine of its own, let one thread make all calls (one generate() "
            "with all prompts is fastest), or hold a threading.Lock around every call."
        )


class OutOfMemoryError(MiniVLLMError):
    """The device has too little memory. The message names the option to change."""


class SchedulerStalledError(MiniVLLMError):
    """The scheduler planned nothing although requests wait: your own scheduler has a bug."""


class ProposalError(MiniVLLMError, ValueError):
    """Your own proposer returned something else than a list of token ids for each sequence."""


class RankError(MiniVLLMError):
    """Ranks of a tensor-parallel engine can no longer work together. Make a new engine."""


class RankFailedError(RankError):
    """A rank died or failed with its own error. The message names the rank and the cause."""


class RankMismatchError(RankError):
    """A rank has other tokens, or other requests, than rank 0."""


class EngineEndedError(RankError):
    """The engine was closed, or its ranks ended because a step failed or was interrupted."""
