"""Recognize what a caller passes: a prompt, a batch of prompts, or a conversation.

This file tells the forms apart and checks what can be checked without a model. Checks that need the
tokenizer or the vocabulary are in engine/input_processor.py. Names are vLLM's.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypeAlias, TypedDict

from minivllm.compat.calls import did_you_mean
from minivllm.errors import InvalidTokenError, RequestError, SamplingParamsError
from minivllm.sampling_params import SamplingParams

Message: TypeAlias = Mapping[str, Any]


class TextPrompt(TypedDict):
    """A prompt as text. cache_salt: see `TokensPrompt`."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids. prompt: its text, if known; the text is only handed back.

    cache_salt: a non-empty string. Two requests share blocks of the prefix cache only if both have
    the same salt, or none. So a caller cannot learn from response times what other callers have
    asked. The engine's block manager must support it: with your own block manager without
    `supports_extra_keys`, such a request is refused.
    """

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


@dataclass(frozen=True)
class RefusedPrompt:
    """The place of an invalid prompt in a batch. Its request is refused with `error`."""

    error: RequestError


#: Token ids may also be a one-dimensional array of NumPy or torch.
PromptType: TypeAlias = str | Sequence[int] | TextPrompt | TokensPrompt
Prompts: TypeAlias = PromptType | Sequence[PromptType]
Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt of known form: text, token ids, or token ids together with their text."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None


# --- one prompt -----------------------------------------------------------------------------------

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_UNSUPPORTED_KEYS = {
    "multi_modal_data": "the models here read text only",
    "multi_modal_uuids": "the models here read text only",
    "mm_processor_kwargs": "the models here read text only",
    "prompt_embeds": "give text or token ids",
    "encoder_prompt": "the models here have no encoder",
    "decoder_prompt": "the models here have no encoder",
    "token_type_ids": "the models here do not tell segments apart",
}


def parse_prompt(prompt: Any) -> ParsedPrompt:
    """Find out which form a prompt has.

    Raises `RequestError` for a value that is no prompt, and `InvalidTokenError` for a token id that
    is no integer. Does not check whether the ids lie in the vocabulary.
    """
    if isinstance(prompt, RefusedPrompt):
        raise prompt.error
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if isinstance(prompt, Mapping):
        return _parse_dict(prompt)
    return ParsedPrompt(None, _token_ids(prompt))


def _parse_dict(prompt: Mapping[Any, Any]) -> ParsedPrompt:
    for key, value in prompt.items():
        if key in _KEYS or (key in _UNSUPPORTED_KEYS and value is None):
            continue
        if key in _UNSUPPORTED_KEYS:
            raise RequestError(
                f"A prompt's {key} is not supported by minivllm; {_UNSUPPORTED_KEYS[key]}."
            )
        hint = did_you_mean(key, _KEYS) if isinstance(key, str) else ""
        raise RequestError(
            "A prompt given as a dict has the key 'prompt' or 'prompt_token_ids', not"
            f" {key!r}.{hint}"
        )
    text, token_ids, cache_salt = (prompt.get(key) for key in _KEYS)
    if text is None and token_ids is None:
        raise RequestError("A prompt given as a dict needs the key 'prompt' or 'prompt_token_ids'.")
    if text is not None and not isinstance(text, str):
        raise RequestError(
            f"A prompt's 'prompt' is a string, not {_kind(text)}; token ids are 'prompt_token_ids'."
        )
    if isinstance(token_ids, str | Mapping):
        raise RequestError(
            f"A prompt's 'prompt_token_ids' is a list of integers, not {_kind(token_ids)}."
        )
    if cache_salt is not None and not (isinstance(cache_salt, str) and cache_salt):
        given = "''" if cache_salt == "" else _kind(cache_salt)
        raise RequestError(
            f"A prompt's 'cache_salt' is a string of at least one character, not {given}."
        )
    return ParsedPrompt(text, None if token_ids is None else _token_ids(token_ids), cache_salt)


def _token_ids(values: Any) -> list[int]:
    """Copy token ids into a list of Python integers. `values` is neither changed nor consumed."""
    if isinstance(values, bytes | bytearray | memoryview):
        raise RequestError("A prompt is text or token ids, not bytes; decode them: data.decode().")
    if _is_array(values):
        if values.ndim != 1:
            raise RequestError(f"Token ids are an array of one dimension, not of {values.ndim}.")
        values = values.tolist()
    if not isinstance(values, Sequence | array):
        hint = "; convert it with list(...)" if isinstance(values, Iterable) else ""
        raise RequestError(
            "A prompt is text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids',"
            f" not {_kind(values)}{hint}."
        )
    # A set of the types, because a Python loop over all prompts takes milliseconds.
    if set(map(type, values)) <= {int}:
        return list(values)
    return [_token_id(value) for value in values]


def _token_id(value: Any) -> int:
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if not is_bool:
        try:
            return operator.index(value)  # also accepts NumPy's and torch's integers
        except (TypeError, ValueError):
            pass
    raise InvalidTokenError(f"Token id {value!r} is not an integer.")


def describe_prompt(prompt: Any) -> tuple[str | None, list[int]]:
    """(text, token ids) of a prompt that was refused, as far as they are known. Never raises."""
    try:
        parsed = parse_prompt(prompt)
    except RequestError:
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else None
        known = list(ids) if isinstance(ids, list | tuple) else []
        return text if isinstance(text, str) else None, known
    return parsed.text, parsed.token_ids or []


# --- a batch --------------------------------------------------------------------------------------


def as_batch(prompts: Any) -> tuple[list[Any], bool]:
    """Return (list of prompts, whether there was a single prompt), by the form of the value alone.

    A string, a dict and an array of integers are one prompt. A list that begins with a number, or
    that holds nothing that could be a prompt, is one prompt too. Any other list is a batch, also a
    list of dicts; so are the rows of a two-dimensional array. Each prompt may still be refused.
    Raises `RequestError` for a value that is neither a prompt nor a batch.
    """
    if isinstance(prompts, str | bytes | bytearray | memoryview | Mapping | range | array):
        return [prompts], True
    if _is_array(prompts) and prompts.ndim > 0:
        values = prompts.tolist()
        is_batch = prompts.ndim > 1 or any(_could_be_prompt(value) for value in values)
        return (values, False) if is_batch else ([prompts], True)
    if not isinstance(prompts, Sequence):
        # This call raises an error that says what a prompt is.
        _token_ids(prompts)
    if len(prompts) == 0:
        return [], False
    is_one = _is_number(prompts[0]) or not any(_could_be_prompt(p) for p in prompts)
    return ([prompts], True) if is_one else (list(prompts), False)


def as_params(params: Any, num_prompts: int) -> list[SamplingParams]:
    """One `SamplingParams` per prompt. Raises `SamplingParamsError` for a wrong type or number."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if isinstance(params, str | bytes | Mapping) or not isinstance(params, Sequence):
        check_params(params)
    if len(params) != num_prompts:
        raise SamplingParamsError(
            f"{len(params)} sampling_params for {num_prompts} prompts; give one, or one per prompt."
        )
    for one in params:
        check_params(one)
    return list(params)


def check_params(params: Any) -> None:
    """Raise `SamplingParamsError` unless params is a `SamplingParams`."""
    if isinstance(params, SamplingParams):
        return
    hint = " SamplingParams(**your_dict) makes one." if isinstance(params, Mapping) else ""
    raise SamplingParamsError(f"sampling_params is a SamplingParams, not {_kind(params)}.{hint}")


# --- conversations --------------------------------------------------------------------------------


def as_conversations(messages: Any) -> tuple[list[Any], bool]:
    """Return (list of conversations, whether there was a single one). Each may still be refused.

    Raises `RequestError` for a value that is neither a conversation nor a list of them.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        check_conversation(messages)
    several = any(isinstance(m, list | tuple) for m in messages)
    return (
        (list(messages), False)
        if several and not isinstance(messages[0], Mapping)
        else ([messages], True)
    )


def check_conversation(messages: Any) -> None:
    """Raise `RequestError` unless messages is a list of dicts that have a role."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            'A conversation is a list of messages {"role": ..., "content": ...}, not'
            f" {_kind(messages)}."
        )
    if not messages:
        raise RequestError("The conversation has no messages; give at least one.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            hint = "; call its model_dump()" if hasattr(message, "model_dump") else ""
            raise RequestError(f"Message {number} is a dict, not {_kind(message)}{hint}.")
        if not isinstance(message.get("role"), str):
            raise RequestError(
                f"Message {number} needs a 'role', such as 'user', 'assistant' or 'system'; "
                f"it has {message.get('role')!r}."
            )
        if not isinstance(message.get("content"), str | list | tuple | None):
            raise RequestError(
                f"The content of message {number} is text, not {_kind(message['content'])}."
            )


def check_template_kwargs(variables: Any) -> Mapping[str, Any]:
    """Check variables for a chat template; {} for None. Raises `RequestError` if it is no dict."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise RequestError(f"chat_template_kwargs is a dict of names, not {_kind(variables)}.")
    if "messages" in variables:
        raise RequestError("chat_template_kwargs cannot set 'messages'; they are chat's argument.")
    return variables


# --- what a value looks like ----------------------------------------------------------------------


def _is_array(value: Any) -> bool:
    """Whether value is an array of NumPy or torch. Imports neither."""
    return all(hasattr(value, name) for name in ("ndim", "dtype", "tolist"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (_is_array(value) and value.ndim == 0)


def _could_be_prompt(value: Any) -> bool:
    """Whether a value holds something. Its content is checked later, with its own prompt."""
    return isinstance(value, Iterable | RefusedPrompt) and not _is_number(value)


def _kind(value: Any) -> str:
    """Name the type of a value for an error message."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
