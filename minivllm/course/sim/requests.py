"""Requests and sequences for parts of the engine that are used alone, and a loop over the parts."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivllm.engine.engine_core import EngineCore
    from minivllm.engine.input_processor import EngineInput, InputProcessor
    from minivllm.engine.output_processor import OutputCollector, OutputProcessor, Request
    from minivllm.engine.sequence import Sequence
    from minivllm.llm import LLM
    from minivllm.outputs import RequestOutput
    from minivllm.sampling_params import SamplingParams
    from minivllm.tokenizer import Tokenizer


def new_sequence(llm: LLM, seq_id: int, prompt: str | list[int], **params: Any) -> Sequence:
    """A sequence for a scheduler or a core. prompt: a question, put into the chat template, or
    token ids.

    params: fields of `SamplingParams`. Without a seed the sequence gets seq_id as its seed.
    """
    from minivllm.sampling_params import SamplingParams

    ids = in_chat(llm, prompt) if isinstance(prompt, str) else list(prompt)
    checked = llm.llm_engine.input_processor.process(ids, SamplingParams(**params))
    return _sequence(checked, seq_id, seq_id, ids)


class RequestMaker:
    """Makes the requests that an `OutputProcessor` keeps, as `LLMEngine.add_request` does: ids are
    "0", "1", …, in order of arrival.

    request_cls: `Request`, or a class of one's own that behaves like it.
    """

    def __init__(
        self, tokenizer: Tokenizer, request_cls: Callable[..., Request] | None = None
    ) -> None:
        from minivllm.engine.output_processor import Request

        self.tokenizer, self.request_cls = tokenizer, request_cls or Request
        self.num_made = 0

    def __call__(self, checked: EngineInput, collector: OutputCollector) -> Request:
        """The request of what an `InputProcessor` has checked. collector: who waits for its
        outputs.
        """
        from minivllm.outputs import RequestMetrics

        number, self.num_made = self.num_made, self.num_made + 1

        def new_sequence(request: Request, index: int) -> Sequence:
            if not request.completions:
                raise RuntimeError(
                    "a request has no completions before outputs.add(request): ask it for its"
                    " sequences afterwards"
                )
            completion = request.completions[index]
            ids = [*request.prompt_token_ids, *completion.token_ids]
            return _sequence(checked, completion.seq_id, number, ids, index)

        return self.request_cls(
            str(number),
            number,
            checked.prompt_text,
            checked.prompt_token_ids,
            checked.params,
            self.tokenizer,
            RequestMetrics(arrival_time=perf_counter()),
            collector,
            new_sequence,
        )


def in_chat(llm: LLM, question: str) -> list[int]:
    return llm.render_chat([{"role": "user", "content": question}])


def _sequence(
    checked: EngineInput, seq_id: int, number: int, token_ids: list[int], index: int = 0
) -> Sequence:
    """What the core gets of a request. number: the seed of a request that brings none.

    index: which of its completions; each has a seed of its own.
    """
    from minivllm.engine.sequence import Sequence

    seed = number if checked.params.seed is None else checked.params.seed
    return Sequence(
        seq_id,
        token_ids,
        checked.params,
        checked.stop_ids,
        max_num_tokens=checked.max_num_tokens,
        seed=seed + index,
        bad_words=checked.bad_words,
        index=index,
        num_prompt_tokens=len(checked.prompt_token_ids),
    )


class EngineLoop:
    """The loop as it should be; runs in the capstone where the learner's own is not asked for."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: RequestMaker,
    ) -> None:
        from minivllm.engine.output_processor import OutputCollector

        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request, self.collector = new_request, OutputCollector()

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. Raises `RequestError` for a bad one."""
        checked = self.inputs.process(prompt, params)
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request; the next step reports it."""
        if (request := self.outputs.requests.get(request_id)) is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for all requests; the outputs with news."""
        for seq_id, stop in self.outputs.process(self.core.step()):
            self.core.finish([seq_id], "stop", stop)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve all of these; the last output of each, in their order."""
        ids = [self.add(*asked) for asked in zip(prompts, params, strict=True)]
        last = {}
        while self.outputs.requests:
            last |= {output.request_id: output for output in self.step()}
        return [last[id] for id in ids]
