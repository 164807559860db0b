"""Sampling parameters: how the next token of a request is chosen.

Names, defaults, order and meaning are vLLM's. Taught in notebooks/11_using_minivllm.ipynb.
"""

import dataclasses
import enum
import functools
import json
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from minivllm.compat.calls import STRUCTURES, refuse_parameter
from minivllm.errors import SamplingParamsError

#: Largest number of completions per prompt; each is a sequence of its own.
MAX_N = 16384
#: Default of the engine option max_logprobs: the most alternatives that `logprobs` and
#: `prompt_logprobs` may ask for.
MAX_LOGPROBS = 20

_T = TypeVar("_T")


#: The parameters that filter the distribution, each with the values that switch it off. The first
#: of these is what the sampling kernel gets for a row without the filter.
FILTERS: dict[str, tuple[int | float, ...]] = {
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
}


class RequestOutputKind(enum.Enum):
    """Which part of a running request a step reports."""

    CUMULATIVE = "cumulative"  # everything so far, whenever something is new
    DELTA = "delta"  # only what is new since the last report
    FINAL_ONLY = "final_only"  # nothing before the request has finished


def _names_unknown_fields(cls: type[_T]) -> type[_T]:
    """Make the constructor refuse unknown keywords by name, not with Python's short TypeError.

    The signature stays the dataclass's own.
    """
    init, names = cls.__init__, [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    known = frozenset(names)

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not known.issuperset(kwargs):
            refuse_parameter(
                next(name for name in kwargs if name not in known), names, cls.__name__
            )
        init(self, *args, **kwargs)

    cls.__init__ = checked_init  # type: ignore[method-assign]
    return cls


@_names_unknown_fields
@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the whole output must be: exactly one of the first five fields says it.

    The names are vLLM's. Needs the package llguidance: ``pip install 'minivllm[serve]'``.
    """

    #: A JSON text that fits this JSON schema: a dict, or JSON.
    json: str | dict[str, Any] | None = None
    #: A text that fits this regular expression as a whole (Rust's syntax, without look-around).
    regex: str | None = None
    choice: Sequence[str] | None = None  # one of these strings
    #: A text of this context-free grammar: in Lark's language, or in llama.cpp's GBNF.
    grammar: str | None = None
    json_object: bool | None = None  # True: any JSON object
    disable_any_whitespace: bool = False  # no space between the parts of a JSON text
    #: The space between the parts of a JSON text, as a regular expression. None: a space, or a new
    #: line with its indentation.
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise SamplingParamsError(
                f"structured_outputs needs exactly one of {', '.join(KINDS)}; got"
                f" {' and '.join(given) or 'none'}."
            )
        self._check_types()
        _ = self.text  # raises for a text that is not JSON

    def _check_types(self) -> None:
        _flag("json_object", self.json_object or False)
        _flag("disable_any_whitespace", self.disable_any_whitespace)
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, name), str | None):
                raise _wrong_structure(name, getattr(self, name), "it is a string.")
        if self.choice is not None:
            words = _list("choice", self.choice)
            if not words:
                raise SamplingParamsError(
                    "structured_outputs: choice is empty; give at least one string."
                )
            if not all(isinstance(word, str) for word in words):
                raise _wrong_structure("choice", self.choice, "it is a list of strings.")
            object.__setattr__(self, "choice", words)

    @functools.cached_property
    def kind(self) -> str:
        """The field that is set: one of `KINDS`."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @functools.cached_property
    def text(self) -> str:
        """The value of this field as a string. It is JSON, except for regex and grammar."""
        kind, value = self.kind, getattr(self, self.kind)
        if kind == "json_object":
            return '{"type": "object"}'
        if kind == "choice":
            return json.dumps(value)
        if kind != "json":
            return value
        if hasattr(value, "model_json_schema"):
            raise _wrong_structure("json", value, "pass its model_json_schema().")
        try:
            schema = json.loads(value) if isinstance(value, str) else value
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise SamplingParamsError(
                f"structured_outputs: json is not a JSON schema: {error}."
            ) from error
        if not isinstance(schema, dict | bool):
            raise _wrong_structure("json", value, "a JSON schema is an object.")
        return text

    @property
    def key(self) -> tuple[str, str, bool, str | None]:
        """Equal for parameters that mean the same."""
        return self.kind, self.text, self.disable_any_whitespace, self.whitespace_pattern

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold. Keyword arguments of the constructor."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }


#: The fields of `StructuredOutputsParams` that say what the output must be.
KINDS = ("json", "regex", "choice", "grammar", "json_object")


def _wrong_structure(name: str, value: Any, what: str) -> SamplingParamsError:
    return SamplingParamsError(
        f"structured_outputs: {name} has the wrong type: {value!r:.80}; {what}"
    )


@_names_unknown_fields
@dataclass(frozen=True)
class SamplingParams:
    """The parameters of a request. They are immutable and checked when they are made.

    An invalid value raises `SamplingParamsError` in the constructor. Values are stored as plain
    numbers, strings and lists; NumPy's scalars and arrays are converted. `clone(temperature=0.5)`
    makes a changed copy.
    """

    #: Number of independent completions of the prompt.
    n: int = 1
    #: Subtracted once from the logit of each token that the output holds already.
    presence_penalty: float = 0.0
    #: Subtracted from a token's logit once per occurrence of the token in the output.
    frequency_penalty: float = 0.0
    #: Divides positive logits and multiplies negative logits of tokens in prompt or output (Keskar
    #: et al., 2019).
    repetition_penalty: float = 1.0
    temperature: float = 1.0  # 0 is greedy; applied before the filters below
    #: Keep the smallest set of likeliest tokens whose probabilities add up to top_p (nucleus
    #: sampling).
    top_p: float = 1.0
    #: Keep the k likeliest tokens; 0 (or -1) keeps all.
    top_k: int = 0
    #: Drop tokens less likely than min_p times the likeliest one.
    min_p: float = 0.0
    #: The same seed gives the same text, whatever else is in the batch. None derives a seed from
    #: the engine's seed.
    seed: int | None = None
    stop: str | Sequence[str] | None = None  # end before the first of these strings
    stop_token_ids: Sequence[int] | None = None  # end after any of these tokens
    #: Continue after the model's end-of-sequence tokens.
    ignore_eos: bool = False
    #: End after this number of tokens. None: as many as `max_model_len` has room for.
    max_tokens: int | None = 16
    #: Neither an end-of-sequence token nor a stop token is chosen before this number of tokens.
    min_tokens: int = 0
    #: Return the log-probabilities of the chosen token and of this number of likeliest tokens. 0:
    #: the chosen token alone. -1: the whole vocabulary. The engine option `max_logprobs` bounds it.
    logprobs: int | None = None
    #: The same for the prompt's tokens. Such a request uses no cached prefix, because every
    #: position must be computed.
    prompt_logprobs: int | None = None
    detokenize: bool = True  # False: token ids only, no text
    skip_special_tokens: bool = True  # leave special tokens out of the text
    #: False: no space between special tokens that follow each other in the text.
    spaces_between_special_tokens: bool = True
    #: Keep the stop string, or the stop token, in the text.
    include_stop_str_in_output: bool = False
    #: What `LLMEngine.step` reports. `LLM.generate` and `LLM.stream` set it themselves.
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    #: What the whole output must be: JSON of a schema, a text of a grammar, ...
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None  # added to the logits of these tokens
    allowed_token_ids: Sequence[int] | None = None  # no other token may be chosen
    #: Words that the output must not contain, at the start of a text or after a space. A word of
    #: several tokens is stopped at its last token, which is banned after the other tokens.
    bad_words: Sequence[str] | None = None
    #: Keep only this number of tokens at the end of the prompt. -1: as many as fit `max_model_len`.
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in _FLAGS:
            if type(value := getattr(self, name)) is not bool:
                self._set(name, _flag(name, value))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise SamplingParamsError(
                f"output_kind has the wrong type: {self.output_kind!r}; use RequestOutputKind."
            )
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise SamplingParamsError(
                f"structured_outputs has the wrong type: {self.structured_outputs!r:.80}; use"
                f" {STRUCTURES}."
            )
        for name, (low, high) in _INTEGERS.items():
            given = getattr(self, name)
            if given is None and name in _OPTIONAL:
                continue
            if (value := _integer(name, given, low, high)) is not given:
                self._set(name, value)
        for name, (least, greatest) in _NUMBERS.items():
            given = getattr(self, name)
            if (number := _number(name, given, least, greatest)) is not given:
                self._set(name, number)
        self._take_lists()
        self._check_together()

    def _take_lists(self) -> None:
        """Check the fields that hold several values, and store them as new lists."""
        for name in ("stop", "bad_words"):
            words = getattr(self, name)
            if words is None or (name == "stop" and isinstance(words, str) and words):
                continue
            words = [words] if isinstance(words, str) else _list(name, words)
            if not all(isinstance(word, str) and word for word in words):
                raise SamplingParamsError(
                    f"{name} must be a non-empty string or a list of them, got"
                    f" {getattr(self, name)!r}."
                )
            self._set(name, words)
        for name in ("stop_token_ids", "allowed_token_ids"):
            if (ids := getattr(self, name)) is not None:
                self._set(
                    name, [_integer(f"a token id in {name}", t, 0, None) for t in _list(name, ids)]
                )
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise SamplingParamsError(
                    f"logit_bias has the wrong type: {self.logit_bias!r}; it maps token ids to"
                    " numbers."
                )
            self._set("logit_bias", {_bias_key(t): _bias(b) for t, b in self.logit_bias.items()})

    def _check_together(self) -> None:
        """Raise for combinations that are wrong, and for values that are wrong in range."""
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingParamsError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}."
            )
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0.0:
                raise SamplingParamsError(f"{name} must be above 0; 1 switches it off.")
        if self.truncate_prompt_tokens == 0:
            raise SamplingParamsError("truncate_prompt_tokens must be -1 or at least 1, got 0.")
        if self.allowed_token_ids == []:
            raise SamplingParamsError(
                "allowed_token_ids is empty: no token could be chosen. None allows all."
            )
        if self.stop_strings and not self.detokenize:
            raise SamplingParamsError("stop needs the text, and detokenize=False makes none.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def clone(self, **changes: Any) -> Self:
        """A copy with these fields changed."""
        return dataclasses.replace(self, **{**_copies(self), **changes})

    @classmethod
    def from_optional(cls, **fields: Any) -> Self:
        """Make parameters from fields of which None means the default."""
        return cls(**{name: value for name, value in fields.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold. `from_dict` makes the same parameters again."""
        wanted = self.structured_outputs
        return {
            **_copies(self),
            "output_kind": self.output_kind.value,
            "structured_outputs": None if wanted is None else wanted.to_dict(),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Make parameters from `to_dict`'s result, also after JSON has turned keys into strings."""
        kind = fields.get("output_kind", RequestOutputKind.CUMULATIVE)
        wanted = fields.get("structured_outputs")
        read = {
            "output_kind": RequestOutputKind(kind),
            "structured_outputs": None if wanted is None else StructuredOutputsParams(**wanted),
        }
        return cls(**{**fields, **read})

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, which is empty if no stop string was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_filter(self) -> bool:
        """Whether any of `FILTERS` restricts the choice."""
        return any(getattr(self, name) not in off for name, off in FILTERS.items())

    @property
    def has_penalty(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
#: The smallest and the largest valid value. None: no limit.
_INTEGERS: dict[str, tuple[int, int | None]] = {
    "n": (1, MAX_N),
    "top_k": (-1, None),
    "seed": (0, None),
    "min_tokens": (0, None),
    "max_tokens": (1, None),
    "logprobs": (-1, None),
    "prompt_logprobs": (-1, None),
    "truncate_prompt_tokens": (-1, None),
}
_NUMBERS = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 2.0),
}


def _plain(value: Any) -> Any:
    """A scalar of NumPy or torch as a Python scalar; any other value as it is."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def _flag(name: str, value: Any) -> bool:
    if type(value := _plain(value)) is not bool:
        raise SamplingParamsError(f"{name} has the wrong type: {value!r}; it is True or False.")
    return value


def _integer(name: str, value: Any, low: int, high: int | None) -> int:
    if type(value) is not int:
        value = _plain(value)
        # Integers of other libraries are valid. True and 1.0 are not.
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            value = operator.index(value)
    if type(value) is not int or value < low or (high is not None and value > high):
        limits = (
            f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        )
        raise SamplingParamsError(f"{name} must be {limits}, got {value!r}.")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    if type(value) is not float and type(value) is not int:
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SamplingParamsError(f"{name} must be a finite number, got {value!r}.")
    if not abs(value) < math.inf:
        raise SamplingParamsError(f"{name} must be a finite number, got {value!r}.")
    if not low <= value <= high:
        raise SamplingParamsError(f"{name} must be from {low} to {high}, got {value!r}.")
    return value


def _list(name: str, values: Any) -> list[Any]:
    """A new list, from a sequence or a one-dimensional array."""
    if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        raise SamplingParamsError(f"{name} has the wrong type: {values!r}; give a list.")
    return list(values)


def _bias_key(token: Any) -> int:
    """A token id as an integer: OpenAI's API and JSON have token ids as strings."""
    if isinstance(token, str) and token.isdecimal() and token.isascii():
        token = int(token)
    return _integer("a token id in logit_bias", token, 0, None)


def _bias(value: Any) -> float:
    return _number("a value of logit_bias", value, -100.0, 100.0)


def _copies(params: SamplingParams) -> dict[str, Any]:
    """The fields, with new lists and dicts. (`dataclasses.asdict` would call deepcopy.)"""
    fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return {k: v.copy() if isinstance(v, list | dict) else v for k, v in fields.items()}
