"""What the answers of both APIs share: how they begin, and how they become a stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
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
        # How each event begins: encoded once, because a stream has an event for each token.
        self._opening = f'data: {responses.to_json(self.head)[:-1]},"choices":['

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises the error of a prompt that failed."""
        raise NotImplementedError

    def chunk_choice(
        self, position: int, output: RequestOutput, completion: CompletionOutput
    ) -> dict[str, Any]:
        """What a chunk of a stream says of one completion of the position-th prompt."""
        raise NotImplementedError

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events; an error becomes the last event."""
        counts, cached = [0] * len(self.job.inputs), 0
        continuous = self._wants.continuous_usage
        closing = '],"usage":null}\n\n' if self._wants.include_usage else "]}\n\n"
        try:
            async for position, output in self.job.outputs():
                cached += output.num_cached_tokens * output.finished
                for completion in output.outputs:
                    counts[position] += len(completion.token_ids)
                    choice = responses.to_json(self.chunk_choice(position, output, completion))
                    if continuous:
                        num_prompt = len(output.prompt_token_ids)
                        usage = responses.to_json(responses.usage(num_prompt, counts[position]))
                        closing = f'],"usage":{usage}}}\n\n'
                    yield f"{self._opening}{choice}{closing}"
            if self._wants.include_usage:
                num_prompt = sum(len(checked.prompt_token_ids) for checked in self.job.inputs)
                usage = responses.to_json(responses.usage(num_prompt, sum(counts), cached))
                yield f'{self._opening}],"usage":{usage}}}\n\n'
            yield "data: [DONE]\n\n"
        except MiniVLLMError as error:
            yield f"data: {responses.to_json(as_api_error(error).body)}\n\n"
