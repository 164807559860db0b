"""What the answers of both APIs share: how they begin, and how they become a stream of events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from minivllm.errors import MiniVLLMError
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.serving import responses
from minivllm.serving.api_errors import as_api_error
from minivllm.serving.protocol import SamplingFields
from minivllm.serving.state import Job


class Answer:
    """The answer to a request, as one object (`whole`) or as a stream of events.

    prefix: of its id. kind: OpenAI's name of such an object.
    """

    def __init__(self, body: SamplingFields, job: Job, prefix: str, kind: str) -> None:
        self.job = job
        self._wants = body
        self.head: dict[str, Any] = {
            "id": f"{prefix}-{job.request_id}",
            "object": kind,
            "created": job.state.created_now(),
            "model": job.state.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises the error of a prompt that failed."""
        raise NotImplementedError

    def chunk_choice(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        """What a chunk of a stream says of one completion of the position-th prompt."""
        raise NotImplementedError

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error becomes the last event."""
        counts, cached = [0] * len(self.job.inputs), 0
        try:
            async for position, output in self.job.outputs():
                cached += output.num_cached_tokens * output.finished
                for completion in output.outputs:
                    counts[position] += len(completion.token_ids)
                    choice = self.chunk_choice(position, output, completion)
                    chunk: dict[str, Any] = {**self.head, "choices": [choice]}
                    if self._wants.continuous_usage:
                        num_prompt = len(output.prompt_token_ids)
                        chunk["usage"] = responses.usage(num_prompt, counts[position])
                    elif self._wants.include_usage:
                        chunk["usage"] = None
                    yield responses.event(chunk)
            if self._wants.include_usage:
                num_prompt = sum(len(checked.prompt_token_ids) for checked in self.job.inputs)
                usage = responses.usage(num_prompt, sum(counts), cached)
                yield responses.event({**self.head, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except MiniVLLMError as error:
            yield responses.event(as_api_error(error).body)
