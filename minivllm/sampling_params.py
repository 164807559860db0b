"""How the next token of a request is chosen. Names, defaults and meaning are vLLM's.

Taught in notebooks/11_using_minivllm.ipynb."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.errors import SamplingParamsError

MAX_N = 16384  # most completions of one prompt; each is a sequence of its own
MAX_LOGPROBS = 20  # most alternatives that `logprobs` and `prompt_logprobs` may ask for (vLLM's `max_logprobs`)


class RequestOutputKind(enum.Enum):
    """What a step reports of a running request."""

    CUMULATIVE = "cumulative"  # everything so far, each time something is new
    DELTA = "delta"  # only what is new
    FINAL_ONLY = "final_only"  # nothing until the request has finished


@dataclass(frozen=True)
class SamplingParams:
    """Immutable and validated: an invalid value raises `SamplingParamsError` here, before any engine sees it."""

    n: int = 1  # how many independent completions of the prompt to return
    temperature: float = 1.0  # 0 is greedy; applied first, before the filters below
    top_k: int = 0  # keep the k most likely tokens; 0 (or -1) keeps all
    top_p: float = 1.0  # keep the smallest set of most likely tokens whose probability reaches it (nucleus sampling)
    min_p: float = 0.0  # drop tokens less likely than min_p times the likeliest one
    #: The same seed gives the same text whatever else is in the batch; None derives one from the engine's seed.
    seed: int | None = None
    stop: str | Sequence[str] | None = None  # end before the first of these strings, which is left out of the text
    stop_token_ids: Sequence[int] | None = None  # end after any of these tokens
    min_tokens: int = 0  # neither end-of-sequence nor a stop token may be chosen before this many tokens
    max_tokens: int | None = 16  # end after this many tokens; None: as many as `max_model_len` leaves room for
    ignore_eos: bool = False  # go on past the model's end-of-sequence tokens
    presence_penalty: float = 0.0  # subtracted from the logit of each token that the output holds already
    frequency_penalty: float = 0.0  # subtracted once for every time the output holds the token
    #: Divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al., 2019).
    repetition_penalty: float = 1.0
    logprobs: int | None = None  # return those of the chosen token and of this many likeliest; 0 is the chosen alone
    #: The same for the prompt's tokens. Such a request takes no prefix-cache hits: every position must be computed.
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None  # added to the logits of these tokens
    skip_special_tokens: bool = True  # leave special tokens out of the text
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    spaces_between_special_tokens: bool = True
    #: What `LLMEngine.step` reports; `LLM.generate` and `LLM.stream` set it themselves.
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise SamplingParamsError(f"{name} has the wrong type: {getattr(self, name)!r}.")
        for name, (low, high) in _INTEGERS.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                _check_integer(name, getattr(self, name), low, high)
        for name, (low, high) in _NUMBERS.items():
            _check_number(name, getattr(self, name), low, high)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}.")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0.0:
                raise SamplingParamsError(f"{name} must be above 0; 1 switches it off.")
        if not all(isinstance(s, str) and s for s in self.stop_strings):
            raise SamplingParamsError(f"stop must be a non-empty string or a list of them, got {self.stop!r}.")
        for token_id in (*(self.stop_token_ids or ()), *(self.logit_bias or ())):
            _check_integer("a token id in stop_token_ids or logit_bias", token_id, 0, None)
        for bias in (self.logit_bias or {}).values():
            _check_number("a value of logit_bias", bias, -100.0, 100.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty when none was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_filter(self) -> bool:
        """Whether any of top-k, top-p and min-p restricts the choice."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def has_penalty(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


_KINDS = {
    "stop": str | Sequence | None, "stop_token_ids": Sequence | None, "logit_bias": dict | None,
    "ignore_eos": bool, "skip_special_tokens": bool, "output_kind": RequestOutputKind,
}  # fmt: skip
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
#: Least and greatest legal value; None is no limit.
_INTEGERS = {
    "n": (1, MAX_N), "top_k": (-1, None), "seed": (0, None), "min_tokens": (0, None), "max_tokens": (1, None),
    "logprobs": (0, MAX_LOGPROBS), "prompt_logprobs": (0, MAX_LOGPROBS),
}  # fmt: skip
_NUMBERS = {
    "temperature": (0.0, 1e6), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0), "repetition_penalty": (0.0, 2.0),
}  # fmt: skip


def _check_integer(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise SamplingParamsError(f"{name} must be {limits}, got {value!r}.")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise SamplingParamsError(f"{name} must be a finite number, got {value!r}.")
    if not low <= value <= high:
        raise SamplingParamsError(f"{name} must be from {low} to {high}, got {value!r}.")
