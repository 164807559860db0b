"""``POST /v1/completions``: a text, or several, continued."""

from __future__ import annotations

import asyncio
from typing import Any

from minivllm.engine.input_processor import EngineInput
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.serving import responses
from minivllm.serving.answers import Answer
from minivllm.serving.protocol import CompletionRequest
from minivllm.serving.state import Job, ServerState, check_all


async def check(state: ServerState, body: CompletionRequest) -> list[EngineInput]:
    """The engine's requests. Raises `APIError` or `RequestError`, and starts nothing."""
    state.require_model(body.model)
    prompts = body.prompts
    state.admit(len(prompts), body.n or 1)
    params = body.params(state.llm.input_processor.default_params)
    return await check_all(state, [await _prompt(state, body, p) for p in prompts], params)


async def _prompt(state: ServerState, body: CompletionRequest, prompt: str | list[int]) -> Any:
    salt = {} if body.cache_salt is None else {"cache_salt": body.cache_salt}
    if isinstance(prompt, str):
        if body.add_special_tokens or state.llm.tokenizer is None:
            return {"prompt": prompt, **salt}
        # In a thread: a long text takes milliseconds.
        token_ids = await asyncio.to_thread(state.llm.tokenizer.encode, prompt, False)
        return {"prompt": prompt, "prompt_token_ids": token_ids, **salt}
    return {"prompt_token_ids": prompt, **salt}


class CompletionAnswer(Answer):
    """The answer to a completions request."""

    def __init__(self, body: CompletionRequest, job: Job) -> None:
        super().__init__(body, job, "cmpl", "text_completion")
        self.body, self.n = body, job.inputs[0].params.n
        #: Characters of each choice so far, for `text_offset`.
        self._lengths: dict[int, int] = {}

    async def whole(self) -> dict[str, Any]:
        outputs = await self.job.whole()
        choices = [
            self.chunk_choice(position, output, completion)
            for position, output in enumerate(outputs)
            for completion in output.outputs
        ]
        usage = responses.usage_of(outputs)
        if self.body.is_scoring:
            usage = responses.usage(usage["prompt_tokens"], 0)
        return {**self.head, "choices": choices, "usage": usage}

    def chunk_choice(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        """A choice: of a whole answer, too, which is a stream of one chunk."""
        index = position * self.n + completion.index
        is_first = index not in self._lengths
        text, token_ids = completion.text, completion.token_ids
        entries: list[Any] = list(completion.logprobs or [])
        if self.body.is_scoring:
            text, token_ids, entries = "", [], []
        if self.body.echo and is_first:
            text = self._prompt_text(output) + text
            token_ids = [*output.prompt_token_ids, *token_ids]
            entries = [*(output.prompt_logprobs or []), *entries]
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(text)
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = responses.completion_logprobs(
                token_ids, entries, self.body.logprobs, offset, self._decode
            )
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.body.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = responses.prompt_logprobs(output.prompt_logprobs)
        if self.body.return_token_ids:
            choice["token_ids"] = completion.token_ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _decode(self, token_id: int) -> str:
        tokenizer = self.job.state.llm.tokenizer
        return "" if tokenizer is None else tokenizer.decode([token_id], skip_special_tokens=False)

    def _prompt_text(self, output: RequestOutput) -> str:
        tokenizer = self.job.state.llm.tokenizer
        if output.prompt is not None or tokenizer is None:
            return output.prompt or ""
        return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=True)
