"""Answers in OpenAI's form, from the engine's outputs.

Plain dicts: an answer is built once per chunk of a stream, and goes straight into JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from minivllm.outputs import Logprob, RequestOutput


def usage(num_prompt: int, num_output: int, num_cached: int = 0) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def usage_of(outputs: list[RequestOutput]) -> dict[str, Any]:
    """Counts of the tokens of finished requests."""
    return usage(
        sum(len(o.prompt_token_ids) for o in outputs),
        sum(len(c.token_ids) for o in outputs for c in o.outputs),
        sum(o.num_cached_tokens for o in outputs),
    )


#: Made once: `json.dumps` with options makes an encoder in each call.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(value: Any) -> str:
    """JSON without spaces. Infinite logprobs, which JSON has not, become -9999.0 as in vLLM."""
    try:
        return _encode(value)
    except ValueError:
        return _encode(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not -1e30 < value < 1e30:
        return -9999.0
    return value


# --- logprobs -------------------------------------------------------------------------------------

Entry = dict[int, Logprob]


def token_text(found: Logprob, token_id: int) -> str:
    return f"token_id:{token_id}" if found.decoded_token is None else found.decoded_token


def completion_logprobs(
    token_ids: list[int],
    entries: list[Entry | None],
    count: int,
    offset: int = 0,
    decode: Callable[[int], str] = str,
) -> dict[str, Any]:
    """The completions API's form. entries: one per token; None has no logprob (a first token).

    count: likeliest tokens per position. offset: characters before the first token. decode: the
    text of a token without logprob.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is None:
            tokens.append(decode(token_id))
            values.append(None)
            tops.append(None)
        else:
            chosen = entry[token_id]
            tokens.append(token_text(chosen, token_id))
            values.append(chosen.logprob)
            best = sorted(entry.items(), key=lambda pair: pair[1].rank or 0)[:count]
            top: dict[str, float] = {}
            for t, found in best:
                # Two tokens may have the same text; the likelier one comes first, and stays.
                top.setdefault(token_text(found, t), found.logprob)
            top.setdefault(tokens[-1], chosen.logprob)
            tops.append(top)
        offsets.append(offset)
        offset += len(tokens[-1])
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops if count else None,
        "text_offset": offsets,
    }


def chat_logprobs(token_ids: list[int], entries: list[Entry], count: int) -> dict[str, Any]:
    """The chat API's form."""
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        best = sorted(entry.items(), key=lambda pair: pair[1].rank or 0)[:count]
        content.append(
            {
                **_chat_entry(entry[token_id], token_id),
                "top_logprobs": [_chat_entry(found, t) for t, found in best],
            }
        )
    return {"content": content}


def _chat_entry(found: Logprob, token_id: int) -> dict[str, Any]:
    text = token_text(found, token_id)
    return {"token": text, "logprob": found.logprob, "bytes": list(text.encode())}


def prompt_logprobs(entries: list[Entry | None] | None) -> list[Any] | None:
    """vLLM's form: per position, token id -> logprob, rank and text."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(t): {"logprob": f.logprob, "rank": f.rank, "decoded_token": f.decoded_token}
            for t, f in entry.items()
        }
        for entry in entries
    ]
