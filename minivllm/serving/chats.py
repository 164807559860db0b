"""``POST /v1/chat/completions``: the next message of a conversation."""

from __future__ import annotations

import asyncio
from typing import Any

from minivllm import errors, inputs
from minivllm.engine.input_processor import EngineInput
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.serving import responses
from minivllm.serving.answers import Answer
from minivllm.serving.api_errors import APIError
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


class ChatAnswer(Answer):
    """The answer to a chat request."""

    def __init__(self, body: ChatCompletionRequest, job: Job) -> None:
        super().__init__(
            body, job, "chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion"
        )
        self.body = body
        self._begun: set[int] = set()

    async def whole(self) -> dict[str, Any]:
        (output,) = await self.job.whole()
        choices = []
        for completion in output.outputs:
            message = {"role": "assistant", "content": completion.text}
            choices.append({**self._choice(completion), "message": message})
        answer: dict[str, Any] = {
            **self.head,
            "choices": choices,
            "usage": responses.usage_of([output]),
        }
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = responses.prompt_logprobs(output.prompt_logprobs)
        return answer

    def chunk_choice(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        return {**self._choice(completion), "delta": self._delta(completion)}

    def _delta(self, completion: CompletionOutput) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": completion.text}
        if completion.index not in self._begun:
            self._begun.add(completion.index)
            delta = {"role": "assistant", **delta}
        return delta

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
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
