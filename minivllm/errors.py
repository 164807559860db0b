"""Typed errors. Each message says what was wrong and what to do about it.

Taught in notebooks/11_using_minivllm.ipynb."""

from minivllm.text import printable


class MiniVLLMError(Exception):
    """Base of every error that minivllm raises on purpose."""

    def __str__(self) -> str:
        """The message. What it quotes of prompts, templates and files cannot steer a terminal."""
        return printable(super().__str__())


class ConfigError(MiniVLLMError, ValueError):
    """An engine option has a value that cannot work, alone or together with another."""


class UnknownOptionError(ConfigError, TypeError):
    """There is no engine option of this name; the message says which one may have been meant, or
    what to do.
    """


class UnsupportedModelError(MiniVLLMError):
    """The checkpoint's config asks for something minivllm does not implement; the message names
    it.
    """


class WeightLoadingError(MiniVLLMError):
    """A checkpoint's tensors do not fit the model: missing, unexpected, or of another shape."""


class RequestError(MiniVLLMError, ValueError):
    """A request that cannot be served. Only this request is refused; the others in its batch are
    unharmed.
    """


class EmptyPromptError(RequestError):
    """The prompt has no tokens."""


class PromptTooLongError(RequestError):
    """The prompt leaves no room to generate within `max_model_len`, or can never fit into the KV
    cache.
    """


class InvalidTokenError(RequestError):
    """A token id is outside the model's vocabulary."""


class SamplingParamsError(RequestError):
    """A sampling parameter, or a combination of them, is out of range or not supported."""


class UnsupportedParameterError(SamplingParamsError, TypeError):
    """`SamplingParams` has no field of this name; the message says what to use instead, or what may
    have been meant.
    """


class TokenizerRequiredError(RequestError):
    """The request needs a tokenizer, and the engine runs without one
    (`skip_tokenizer_init=True`).
    """


class UnsupportedFeatureError(MiniVLLMError, NotImplementedError):
    """vLLM has this and minivllm does not; the message says what to do instead."""


class UnsupportedArgumentError(UnsupportedFeatureError, TypeError):
    """An argument of vLLM's that a method here does not take, or one that nobody knows."""


class UnsupportedMethodError(UnsupportedFeatureError, AttributeError):
    """A method of vLLM's `LLM` that is not here. Also an AttributeError, so that `hasattr` says
    False.
    """


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
    """Another thread is using this engine, which is for one thread at a time."""

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            or "Another thread is using this engine, and an engine is for one thread at a time. "
            "Give each thread an engine of its own, let one thread make all calls (one generate() "
            "with all prompts is fastest), or hold a threading.Lock around every call."
        )


class OutOfMemoryError(MiniVLLMError):
    """The device has no room for what was asked; the message names the option to turn."""


class SchedulerStalledError(MiniVLLMError):
    """The scheduler planned nothing although requests are waiting; a scheduler of one's own has a
    bug.
    """


class RankError(MiniVLLMError):
    """Ranks of a tensor-parallel engine can no longer work together. Make a new engine."""


class RankFailedError(RankError):
    """A rank died, or failed with an error of its own; the message names the rank and its cause."""


class RankMismatchError(RankError):
    """A rank has other tokens, or other requests, than rank 0."""


class EngineEndedError(RankError):
    """The engine was closed, or a step that failed or was interrupted has ended its ranks."""
