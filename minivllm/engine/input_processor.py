"""Turn a caller's input into the engine's input: token ids, and checked parameters.

This is the only place that decides what is refused before a request exists. A refusal raises a
`RequestError` and leaves no trace in the engine, so it never affects another request. Taught in
notebooks/07_engine.ipynb.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minivllm import errors
from minivllm.config import ModelConfig, ResolvedConfig
from minivllm.engine.structured_outputs import GrammarCompiler, end_ids
from minivllm.inputs import (
    Message,
    ParsedPrompt,
    PromptType,
    TokensPrompt,
    check_conversation,
    check_params,
    parse_prompt,
)
from minivllm.models.loader import default_sampling_params
from minivllm.sampling_params import SamplingParams
from minivllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineInput:
    """A request that has passed every check."""

    prompt_text: str | None  # None if the caller gave token ids only
    prompt_token_ids: list[int]
    #: `logprobs` and `prompt_logprobs` are counts here: -1 has become the vocabulary size.
    params: SamplingParams
    #: Tokens that end a sequence: end-of-sequence tokens, and the request's stop tokens.
    stop_ids: frozenset[int]
    #: Token sequences that the output must not complete.
    bad_words: tuple[tuple[int, ...], ...]
    #: A sequence ends at this many tokens, prompt included.
    max_num_tokens: int
    #: Two requests share cached blocks only if their salts are equal.
    cache_salt: str | None = None
    #: When the request arrived, in seconds of `time.perf_counter`, whose zero is the same in all
    #: processes of a machine. A server's queues come after this.
    arrival_time: float = field(default_factory=time.perf_counter, compare=False)


class InputProcessor:
    """Check and encode requests for one model.

    config: resolved, with its number of KV blocks. takes_cache_salt: whether the block manager
    never shares blocks between requests with different salts. grammars: those of the engine, if it
    is in this process.
    """

    def __init__(
        self,
        path: Path,
        model_config: ModelConfig,
        config: ResolvedConfig,
        tokenizer: Tokenizer | None,
        takes_cache_salt: bool = True,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.takes_cache_salt = takes_cache_salt or not config.enable_prefix_caching
        self.path, self.config, self.tokenizer = path, config, tokenizer
        self.vocab_size = model_config.vocab_size
        self.max_logprobs = self.vocab_size if config.max_logprobs == -1 else config.max_logprobs
        self.eos_ids = end_ids(model_config, tokenizer)
        self.grammars = grammars or GrammarCompiler(path, model_config)
        self.grammars.tokenizer = tokenizer

    @cached_property
    def default_params(self) -> SamplingParams:
        """The parameters of a request that brings none."""
        return SamplingParams(**default_sampling_params(self.path, self.config.generation_config))

    def process(self, prompt: PromptType, params: SamplingParams | None = None) -> EngineInput:
        """Check and encode a request. prompt: text, token ids, or a dict as in vLLM.

        Raises the subclass of `RequestError` that names what is wrong with the request.
        """
        arrival_time = time.perf_counter()
        params = self.default_params if params is None else params
        check_params(params)
        parsed = parse_prompt(prompt)
        if parsed.cache_salt is not None and not self.takes_cache_salt:
            raise errors.RequestError(
                "This engine's block manager ignores cache_salt, so requests with different salts"
                " would share blocks. Hash `seq.extra_keys` into a sequence's first block and set"
                " supports_extra_keys = True, or start with enable_prefix_caching=False."
            )
        token_ids = self._truncate(self._encode(parsed), params)
        if not token_ids:
            raise errors.EmptyPromptError("The prompt has no tokens; give at least one.")
        max_num_tokens = self._max_num_tokens(len(token_ids), params)
        self._check_params(params)
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos or params.structured_outputs is not None:
            # Where a grammar has come to its end, nothing else is left to choose.
            stop_ids |= self.eos_ids
        bad_words = self._encode_bad_words(params.bad_words or ())
        self._check_choice(params, stop_ids, bad_words)
        return EngineInput(
            parsed.text,
            token_ids,
            self._count_all(params),
            stop_ids,
            bad_words,
            max_num_tokens,
            parsed.cache_salt,
            arrival_time,
        )

    def chat_prompt(
        self, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> TokensPrompt:
        """The prompt that the model's chat template makes of a conversation.

        The template writes the special tokens itself, so none are added. Raises `RequestError` for
        an invalid conversation, for one that the template refuses, and without a tokenizer.
        """
        if self.tokenizer is None:
            raise errors.TokenizerRequiredError(
                "This engine was made with skip_tokenizer_init=True."
            )
        check_conversation(messages)
        rendered = self.tokenizer.apply_chat_template(messages, **variables)
        # With the variable tokenize=True the result is a list of token ids already.
        if not isinstance(rendered, str):
            return {"prompt_token_ids": rendered}
        token_ids = self.tokenizer.encode(rendered, add_special_tokens=False)
        return {"prompt": rendered, "prompt_token_ids": token_ids}

    # --- the prompt -------------------------------------------------------------------------------

    def _encode(self, prompt: ParsedPrompt) -> list[int]:
        """The prompt's token ids. Raises `InvalidTokenError` for an id outside the vocabulary."""
        tokenizer = self.tokenizer
        if prompt.token_ids is not None:
            token_ids = prompt.token_ids
        elif tokenizer is not None:
            token_ids = tokenizer.encode(prompt.text or "")
        else:
            raise errors.TokenizerRequiredError(
                "This engine has no tokenizer; give the prompt as token ids."
            )
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            return token_ids
        bad = next(t for t in token_ids if not 0 <= t < self.vocab_size)
        if prompt.token_ids is not None or tokenizer is None:
            raise errors.InvalidTokenError(
                f"Token id {bad} is not an integer from 0 to {self.vocab_size - 1}."
            )
        text = tokenizer.decode([bad], skip_special_tokens=False)
        raise errors.InvalidTokenError(
            f"The tokenizer encodes {text!r} in the prompt as token {bad}, but the last id of the"
            f" model's vocabulary is {self.vocab_size - 1}. Remove this text, or use the tokenizer"
            " of this checkpoint."
        )

    def _truncate(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """The last `truncate_prompt_tokens` tokens of the prompt."""
        keep, limit = params.truncate_prompt_tokens, self.config.max_model_len
        if keep is None:
            return token_ids
        if keep > limit:
            raise errors.SamplingParamsError(
                f"truncate_prompt_tokens={keep} is above max_model_len={limit}."
            )
        # -1 keeps as many as fit, with room for one token of output.
        return token_ids[-(limit - 1 if keep == -1 else keep) :]

    def _max_num_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """The length, prompt included, at which the sequences end. Raises if it can never fit."""
        limit = self.config.max_model_len
        if num_prompt_tokens >= limit:
            raise errors.PromptTooLongError(
                f"The prompt has {num_prompt_tokens} tokens; max_model_len={limit} leaves room for "
                f"{limit - 1} and one of output. Shorten the prompt, raise max_model_len, or set "
                "truncate_prompt_tokens=-1."
            )
        # The last token of a sequence is never fed back to the model, so it needs no cache entry.
        pool = self.config.num_kv_blocks * self.config.block_size + 1
        wanted = num_prompt_tokens + (params.max_tokens or limit)
        max_num_tokens = min(limit, wanted if params.max_tokens else min(wanted, pool))
        if max_num_tokens > pool or num_prompt_tokens >= pool:
            raise errors.PromptTooLongError(
                f"{num_prompt_tokens} prompt tokens with max_tokens={params.max_tokens} never fit "
                f"the KV cache of {pool - 1} tokens. Lower max_tokens, shorten the prompt or raise "
                "num_kv_blocks."
            )
        return max_num_tokens

    # --- the parameters ---------------------------------------------------------------------------

    def _check_params(self, params: SamplingParams) -> None:
        """Raise for parameters that this model or this engine cannot serve."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(params, name) or ():
                if token_id >= self.vocab_size:
                    raise errors.SamplingParamsError(
                        f"{name}: token {token_id}; the vocabulary ends at {self.vocab_size - 1}."
                    )
        if params.structured_outputs is not None:
            if self.tokenizer is None:
                raise errors.TokenizerRequiredError(
                    "structured_outputs needs a tokenizer, and this engine has none."
                )
            # Raises what is wrong with the grammar.
            self.grammars.compile(params.structured_outputs)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name) or 0
            if (self.vocab_size if count == -1 else count) > self.max_logprobs:
                raise errors.SamplingParamsError(
                    f"{name}={count} is above max_logprobs={self.max_logprobs}; start the engine "
                    "with a larger max_logprobs, -1 for the whole vocabulary."
                )
        for name, wanted in (("stop", params.stop_strings), ("bad_words", params.bad_words)):
            if wanted and self.tokenizer is None:
                raise errors.TokenizerRequiredError(
                    f"{name} needs a tokenizer, and this engine has none; use stop_token_ids, "
                    "allowed_token_ids and logit_bias."
                )

    def _count_all(self, params: SamplingParams) -> SamplingParams:
        """Replace -1 (the whole vocabulary) by the vocabulary size."""
        if params.logprobs == -1:
            params = replace(params, logprobs=self.vocab_size)
        if params.prompt_logprobs == -1:
            params = replace(params, prompt_logprobs=self.vocab_size)
        return params

    def _encode_bad_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences of the words: at the start of a text, and after a space.

        The second form is left out if it ends with the tokens of the first form: the first form
        then finds the word after a space, too. vLLM keeps the second form only if both have the
        same number of tokens, so it lets " fox" pass where "fox" is two tokens.
        """
        found: dict[tuple[int, ...], None] = {}
        tokenizer = self.tokenizer
        # Without a tokenizer there are no words: `_check_params` has refused them.
        if tokenizer is None:
            return ()
        for word in words:
            plain, spaced = (
                tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False))
                for space in ("", " ")
            )
            if not plain:
                raise errors.SamplingParamsError(f"bad_words: {word!r} has no tokens.")
            found[plain] = None
            if spaced[-len(plain) :] != plain:
                found[spaced] = None
        for token_id in (t for sequence in found for t in sequence):
            if not 0 <= token_id < self.vocab_size:
                raise errors.SamplingParamsError(
                    f"bad_words: token {token_id}; the vocabulary ends at {self.vocab_size - 1}."
                )
        return tuple(found)

    def _check_choice(
        self,
        params: SamplingParams,
        stop_ids: frozenset[int],
        bad_words: tuple[tuple[int, ...], ...],
    ) -> None:
        """Raise if these parameters could leave a step without any token to choose."""
        allowed = None if params.allowed_token_ids is None else set(params.allowed_token_ids)
        # If one token of a word is not allowed, the word can never be completed.
        banned = {word[-1] for word in bad_words if allowed is None or allowed.issuperset(word)}
        if params.min_tokens:
            banned |= stop_ids
        num_left = self.vocab_size - len(banned) if allowed is None else len(allowed - banned)
        if num_left == 0:
            raise errors.SamplingParamsError(
                "allowed_token_ids, bad_words and min_tokens (which bans stop tokens at first) "
                "together can leave no token to choose; allow more."
            )


def in_our_order(prompt: Any, params: Any, request_id: Any) -> tuple[Any, Any, str | None]:
    """Sort the arguments of `add_request` into (prompt, params, request_id).

    Also understands vLLM's order: request_id, prompt, params. Raises `RequestError` for a mixture.
    """
    if isinstance(request_id, SamplingParams):
        prompt, params, request_id = params, request_id, prompt
    elif isinstance(params, str):
        raise errors.RequestError(
            "add_request takes (prompt, params, request_id), or vLLM's (request_id, prompt,"
            f" params); got the texts {prompt!r} and {params!r} without a SamplingParams after"
            " them."
        )
    if request_id is not None and not isinstance(request_id, str):
        raise errors.RequestError(f"A request id is a string, not {request_id!r}.")
    return prompt, params, request_id
