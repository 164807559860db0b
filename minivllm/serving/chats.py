"""``POST /v1/chat/completions``: the next message of a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from minivllm import errors, inputs
from minivllm.engine.input_processor import EngineInput
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.serving import responses
from minivllm.serving.api_errors import APIError, as_api_error
from minivllm.serving.protocol import ChatCompletionRequest
from minivllm.serving.state import Job, ServerState, check_all


async def check(state: ServerState, body: ChatCompletionRequest) -> list[EngineInput]:
    """The engine's request. Raises `APIError` or `RequestError`, and starts nothing."""
    state.require_model(body.model)
    state.admit(1, body.n or 1)
    params = body.params(state.llm.input_processor.default_params)
    prompt = await render(state, body.conversation, body.template_variables)
    if body.cache_salt is not None:
        prompt["cache_salt"] = body.cache_salt
    return await check_all(state, [prompt], params)


async def render(
    state: ServerState, conversation: list[dict[str, Any]], variables: dict[str, Any]
) -> dict[str, Any]:
    """A conversation as the prompt that the model's template makes of it.

    Raises `RequestError` for a bad conversation, and `APIError` (400) without a template.
    """
    inputs.check_conversation(conversation)
    variables = {**inputs.check_template_kwargs(variables)}
    try:
        # In a thread: the template runs in a process of its own, with a time limit.
        chat_prompt = state.llm.input_processor.chat_prompt
        return {**await asyncio.to_thread(chat_prompt, conversation, variables)}
    except errors.ConfigError as error:
        raise APIError(400, str(error), param="messages") from error


class ChatAnswer:
    """The answer to a chat request, as one object or as a stream of events."""

    def __init__(self, body: ChatCompletionRequest, job: Job) -> None:
        self.body, self.job = body, job
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{job.request_id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": job.state.created_now(),
            "model": job.state.model_name,
        }
        self._begun: set[int] = set()

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises the error of a request that failed."""
        (output,) = await self.job.whole()
        choices = []
        for completion in output.outputs:
            message = {"role": "assistant", "content": completion.text}
            choices.append({**self._choice(output, completion), "message": message})
        answer: dict[str, Any] = {
            **self.head,
            "choices": choices,
            "usage": responses.usage_of([output]),
        }
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = responses.prompt_logprobs(output.prompt_logprobs)
        return answer

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error becomes the last event."""
        num_prompt, count, cached = len(self.job.inputs[0].prompt_token_ids), 0, 0
        try:
            async for _, output in self.job.outputs():
                cached = output.num_cached_tokens
                for completion in output.outputs:
                    count += len(completion.token_ids)
                    choice = {**self._choice(output, completion), "delta": self._delta(completion)}
                    chunk: dict[str, Any] = {**self.head, "choices": [choice]}
                    if self.body.continuous_usage:
                        chunk["usage"] = responses.usage(num_prompt, count)
                    elif self.body.include_usage:
                        chunk["usage"] = None
                    yield f"data: {responses.to_json(chunk)}\n\n"
            if self.body.include_usage:
                usage = responses.usage(num_prompt, count, cached)
                yield f"data: {responses.to_json({**self.head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except errors.MiniVLLMError as error:
            yield f"data: {responses.to_json(as_api_error(error).body)}\n\n"

    def _delta(self, completion: CompletionOutput) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": completion.text}
        if completion.index not in self._begun:
            self._begun.add(completion.index)
            delta = {"role": "assistant", **delta}
        return delta

    def _choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": completion.index,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.body.logprobs:
            choice["logprobs"] = responses.chat_logprobs(
                completion.token_ids, completion.logprobs or [], self.body.top_logprobs or 0
            )
        if self.body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice
