"""``POST /v1/completions``: a text, or several, continued."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from minivllm.engine.input_processor import EngineInput
from minivllm.errors import MiniVLLMError
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.serving import responses
from minivllm.serving.api_errors import as_api_error
from minivllm.serving.protocol import CompletionRequest
from minivllm.serving.state import Job, ServerState, check_all


async def check(state: ServerState, body: CompletionRequest) -> list[EngineInput]:
    """The engine's requests. Raises `APIError` or `RequestError`, and starts nothing."""
    state.require_model(body.model)
    prompts = body.prompts
    state.admit(len(prompts), body.n or 1)
    params = body.params(state.llm.input_processor.default_params)
    return await check_all(state, [_prompt(state, body, p) for p in prompts], params)


def _prompt(state: ServerState, body: CompletionRequest, prompt: str | list[int]) -> Any:
    salt = {} if body.cache_salt is None else {"cache_salt": body.cache_salt}
    if isinstance(prompt, str):
        if body.add_special_tokens or state.llm.tokenizer is None:
            return {"prompt": prompt, **salt}
        token_ids = state.llm.tokenizer.encode(prompt, add_special_tokens=False)
        return {"prompt": prompt, "prompt_token_ids": token_ids, **salt}
    return {"prompt_token_ids": prompt, **salt}


class CompletionAnswer:
    """The answer to a completions request, as one object or as a stream of events."""

    def __init__(self, body: CompletionRequest, job: Job) -> None:
        self.body, self.job = body, job
        self.n = job.inputs[0].params.n
        self.head: dict[str, Any] = {
            "id": f"cmpl-{job.request_id}",
            "object": "text_completion",
            "created": job.state.created_now(),
            "model": job.state.model_name,
        }
        #: Characters of each choice so far, for `text_offset`.
        self._lengths: dict[int, int] = {}

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises the error of a prompt that failed."""
        outputs = await self.job.whole()
        choices = [
            self._choice(position, output, completion)
            for position, output in enumerate(outputs)
            for completion in output.outputs
        ]
        usage = responses.usage_of(outputs)
        if self.body.is_scoring:
            usage = responses.usage(usage["prompt_tokens"], 0)
        return {**self.head, "choices": choices, "usage": usage}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error becomes the last event."""
        counts, cached = dict.fromkeys(range(len(self.job.inputs)), 0), 0
        try:
            async for position, output in self.job.outputs():
                cached += output.num_cached_tokens * output.finished
                for completion in output.outputs:
                    counts[position] += len(completion.token_ids)
                    chunk: dict[str, Any] = {
                        **self.head,
                        "choices": [self._choice(position, output, completion)],
                    }
                    if self.body.continuous_usage:
                        num_prompt = len(output.prompt_token_ids)
                        chunk["usage"] = responses.usage(num_prompt, counts[position])
                    elif self.body.include_usage:
                        chunk["usage"] = None
                    yield f"data: {responses.to_json(chunk)}\n\n"
            if self.body.include_usage:
                num_prompt = sum(len(checked.prompt_token_ids) for checked in self.job.inputs)
                usage = responses.usage(num_prompt, sum(counts.values()), cached)
                yield f"data: {responses.to_json({**self.head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except MiniVLLMError as error:
            yield f"data: {responses.to_json(as_api_error(error).body)}\n\n"

    def _choice(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
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
