"""`LLM`: the offline face of the engine. Prompts in, texts out. Taught in notebooks/11_using_minivllm.ipynb.

from minivllm import LLM, SamplingParams

llm = LLM()                                             # the bundled model; or a directory, or a hub id
outputs = llm.generate(["Once upon a time", "KV cache:"], SamplingParams(max_tokens=64))
for chunk in llm.stream("Tell me a story."):
    print(chunk.text, end="", flush=True)"""

import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from tqdm.auto import tqdm

from minivllm.engine.llm_engine import EngineMetrics, LLMEngine
from minivllm.engine.output_processor import OutputCollector
from minivllm.engine.trace import Trace
from minivllm.errors import ConcurrentUseError, EngineEndedError, RequestError, TokenizerRequiredError
from minivllm.outputs import CompletionOutput, RequestOutput, StreamOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
Message = dict[str, Any]


class LLM:
    """One model and its engine. Arguments are those of `LLMEngine`. A context manager: leaving it frees the memory."""

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self.llm_engine: LLMEngine | None = LLMEngine(model, **options)
        #: The calls that are under way, and the thread that is at each; a stream may be open during a `generate`.
        self._turns: dict[OutputCollector, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what is running and let go of model and cache. The object cannot be used afterwards."""
        if self.llm_engine is not None:
            self.llm_engine.close()
            self.llm_engine = None

    @property
    def trace(self) -> Trace | None:
        """What happened at each step, if the engine was made with ``trace=True``."""
        return self._open_engine().trace

    def metrics(self) -> EngineMetrics:
        return self._open_engine().metrics()

    def get_tokenizer(self) -> Any:
        """The tokenizer (`encode`, `decode`, `apply_chat_template`); raises without one."""
        if self._open_engine().tokenizer is None:
            raise TokenizerRequiredError("This engine was made with skip_tokenizer_init=True.")
        return self.llm_engine.tokenizer

    # --- the three ways to ask ------------------------------------------------------------------------------------

    def generate(self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True) -> list[RequestOutput]:
        """Complete the prompts; results in their order.

        prompts: one or a list, each a string or token ids. sampling_params: one for all, or one each.
        A request that cannot be served raises if it is the only one. In a list it comes back in its place with
        `error` set and finish_reason "error", and the others are served as if it were not there.
        """
        batch, single = _as_list(prompts)
        results: dict[int, RequestOutput] = {}
        with tqdm(total=len(batch), disable=not use_tqdm, unit="req") as bar:
            # Never bound to a name: whatever cuts this loop short ends the iterator, and so its requests.
            for position, output in self._outputs(
                batch, sampling_params, RequestOutputKind.FINAL_ONLY, raises=single
            ):
                results[position] = output
                bar.update()
        if single and results[0].error is not None:
            raise results[0].error
        return [results[position] for position in range(len(batch))]

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None,
        use_tqdm: bool = True, add_generation_prompt: bool = True, chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer one conversation or several, rendered with the checkpoint's chat template (in a sandbox).

        messages: a list of ``{"role": ..., "content": ...}``, or a list of such lists.
        """
        single = not messages or isinstance(messages[0], dict)
        variables = {"add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
        prompts = [self.render_chat(conversation, **variables) for conversation in ([messages] if single else messages)]
        return self.generate(prompts[0] if single else prompts, sampling_params, use_tqdm)

    def stream(self, prompts: Prompts, sampling_params: Params = None) -> Iterator[StreamOutput]:
        """Yield what each completion gains as it comes; `text` never ends inside a character or a stop string.

        Joined, the increments are the text that `generate` returns. Bad requests raise before the first increment.
        Closing the iterator aborts what is still running.
        """
        batch, _ = _as_list(prompts)
        collector = OutputCollector()
        increments = self._increments(
            self._run(collector, batch, sampling_params, RequestOutputKind.DELTA, raises=True)
        )
        collector.read_by(increments)
        return increments

    def _increments(
        self, outputs: Iterator[tuple[int, RequestOutput]]
    ) -> Iterator[StreamOutput]:
        ended: set[tuple[int, int]] = set()  # (prompt, completion): each reports its end once
        try:
            for position, output in outputs:
                for c in output.outputs:
                    if (position, c.index) in ended or not (c.text or c.token_ids or c.finished):
                        continue
                    if c.finished:
                        ended.add((position, c.index))
                    gained = (c.text, c.token_ids, c.finish_reason, c.stop_reason, output.error)
                    yield StreamOutput(output.request_id, position, c.index, *gained)
        finally:
            outputs.close()

    def stream_chat(self, messages: Sequence[Message], sampling_params: SamplingParams | None = None,
                    **template_variables: Any) -> Iterator[StreamOutput]:  # fmt: skip
        """`stream` for one conversation."""
        return self.stream(self.render_chat(messages, **template_variables), sampling_params)

    def render_chat(self, messages: Sequence[Message], **template_variables: Any) -> list[int]:
        """Token ids of the prompt that the chat template makes of a conversation.

        The template writes the special tokens itself, so none are added.
        """
        tokenizer = self.get_tokenizer()
        return tokenizer.encode(tokenizer.apply_chat_template(messages, **template_variables), add_special_tokens=False)

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests early; whoever waits for them gets what there is, with finish_reason "abort"."""
        self._open_engine().abort_request(request_ids)

    # --- plumbing -------------------------------------------------------------------------------------------------

    def _outputs(
        self, batch: list[Prompt], params: Params, output_kind: RequestOutputKind, raises: bool
    ) -> Iterator[tuple[int, RequestOutput]]:
        """(position, output) of these prompts as they come. Their requests live as long as this iterator.

        raises: whether a request that is refused raises; otherwise it is an output with an error.
        """
        collector = OutputCollector()
        outputs = self._run(collector, batch, params, output_kind, raises)
        collector.read_by(outputs)
        return outputs

    def _run(
        self,
        collector: OutputCollector,
        batch: list[Prompt],
        params: Params,
        output_kind: RequestOutputKind,
        raises: bool,
    ) -> Iterator[tuple[int, RequestOutput]]:
        engine = self._open_engine()
        self._take_turn(collector)
        position_of: dict[str, int] = {}
        try:
            engine.drop_abandoned()
            for position, (prompt, own) in enumerate(_with_params(batch, params)):
                try:
                    own = replace(own, output_kind=output_kind)
                    position_of[engine.add_request(prompt, own, collector=collector)] = position
                except RequestError as error:
                    if raises:
                        raise
                    logger.warning("Prompt %d of %d was refused: %s", position, len(batch), error)
                    yield position, _refused(position, prompt, own, error)
            while position_of:
                self._take_turn(collector)
                if not collector.news:
                    engine.advance()
                for output in engine.collect(collector):
                    yield position_of[output.request_id], output
                    if output.finished:
                        del position_of[output.request_id]
        finally:
            self._turns.pop(collector, None)
            collector.is_closed = True
            engine.drop_abandoned()

    def _take_turn(self, collector: OutputCollector) -> None:
        """Note which thread reads these outputs; raises `ConcurrentUseError` while another thread reads others."""
        me = threading.get_ident()
        for other, thread in list(self._turns.items()):
            if other.is_abandoned:
                self._turns.pop(other, None)
            elif other is not collector and thread != me and thread in sys._current_frames():
                raise ConcurrentUseError()
        self._turns[collector] = me

    def _open_engine(self) -> LLMEngine:
        if self.llm_engine is None:
            raise EngineEndedError("This LLM has been closed. Make a new one.")
        return self.llm_engine


def _as_list(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """(list of prompts, whether it was a single one: a string, or token ids)."""
    if isinstance(prompts, dict):
        raise RequestError("A prompt is a string or a list of token ids, not a dict.")
    if isinstance(prompts, str):
        return [prompts], True
    # A list that begins with a number, or holds nothing that could be a prompt, is meant as token ids.
    is_one = len(prompts) > 0 and (isinstance(prompts[0], int) or not any(isinstance(p, Sequence) for p in prompts))
    return ([prompts], True) if is_one else (list(prompts), False)


def _with_params(batch: list[Prompt], params: Params) -> Iterator[tuple[Prompt, SamplingParams]]:
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(batch)
    if len(params) != len(batch):
        raise ValueError(f"{len(params)} sampling_params for {len(batch)} prompts; give one, or one each.")
    return zip(batch, params, strict=True)


def _refused(position: int, prompt: Prompt, params: SamplingParams, error: RequestError) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    token_ids = list(prompt) if isinstance(prompt, Sequence) and text is None else []
    outputs = [CompletionOutput(index=i, finish_reason="error") for i in range(params.n)]
    return RequestOutput(f"refused-{position}", text, token_ids, outputs, finished=True, error=error)
