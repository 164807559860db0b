"""`LLM`: the offline face of the engine. Prompts in, texts out. Taught in
notebooks/11_using_minivllm.ipynb.

from minivllm import LLM, SamplingParams

llm = LLM()                                         # the bundled model; or a directory, or a hub id
outputs = llm.generate(["Once upon a time", "KV cache:"], SamplingParams(max_tokens=64))
for chunk in llm.stream("Tell me a story."):
    print(chunk.text, end="", flush=True)"""

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

from tqdm.auto import tqdm

from minivllm import inputs
from minivllm.compat.calls import refuse_arguments, refuse_method
from minivllm.engine.llm_engine import EngineMetrics, LLMEngine
from minivllm.engine.output_processor import OutputCollector
from minivllm.engine.trace import Trace
from minivllm.errors import (
    ConcurrentUseError,
    EngineEndedError,
    RequestError,
    TokenizerRequiredError,
)
from minivllm.inputs import Message, Params, Prompts, PromptType, RefusedPrompt, TokensPrompt
from minivllm.metrics import COUNTERS, Counter, Gauge, Metric
from minivllm.outputs import CompletionOutput, RequestOutput, StreamOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

#: True or False, or what makes a bar, called as `tqdm` is.
Tqdm = bool | Callable[..., Any]


class LLM:
    """One model and its engine. Arguments are those of `LLMEngine`. A context manager: leaving it
    frees the memory.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self.llm_engine: LLMEngine | None = LLMEngine(model, **options)
        #: The calls that are under way, and the thread that is at each; a stream may be open during
        #: a `generate`.
        self._turns: dict[OutputCollector, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what is running and let go of model and cache. The object cannot be used
        afterwards.
        """
        if self.llm_engine is not None:
            self.llm_engine.close()
            self.llm_engine = None

    @property
    def trace(self) -> Trace | None:
        """What happened at each step, if the engine was made with ``trace=True``."""
        return self._open_engine().trace

    def metrics(self) -> EngineMetrics:
        return self._open_engine().metrics()

    def __getattr__(self, name: str) -> NoReturn:
        # Only called for what is not there: a method of vLLM's says what to do instead.
        refuse_method(self, name)

    def get_metrics(self) -> list[Metric]:
        """`metrics` in vLLM's form: a list of named counters and gauges."""
        engine, found = self._open_engine(), self.metrics()
        labels = {"model_name": engine.model_path.name, "engine": "0"}
        running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
        usage = found.num_used_kv_blocks / found.num_kv_blocks
        return [
            Gauge("vllm:num_requests_running", labels, running),
            Gauge("vllm:num_requests_waiting", labels, waiting),
            Gauge("vllm:kv_cache_usage_perc", labels, usage),  # 1.0 is full
            *(Counter(name, labels, getattr(found, field)) for name, field in COUNTERS.items()),
        ]

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds for requests without parameters: those of the checkpoint's
        generation_config.json.

        With ``generation_config="vllm"`` they are `SamplingParams()`.
        """
        return self._open_engine().input_processor.default_params

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. False, and nothing done, while requests are unfinished."""
        return self._open_engine().reset_prefix_cache()

    def get_tokenizer(self) -> Any:
        """The tokenizer (`encode`, `decode`, `apply_chat_template`); raises without one."""
        if self._open_engine().tokenizer is None:
            raise TokenizerRequiredError("This engine was made with skip_tokenizer_init=True.")
        return self.llm_engine.tokenizer

    # --- the three ways to ask --------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: Params = None,
        use_tqdm: Tqdm = True,
        **unsupported: Any,
    ) -> list[RequestOutput]:
        """Complete the prompts; results in their order.

        prompts: one or a list, each a string, token ids, or a dict of vLLM's (`TextPrompt`,
        `TokensPrompt`). sampling_params: one for all, or one each; None takes
        `get_default_sampling_params`. use_tqdm: whether to show progress, or what makes the bar.
        Other arguments of vLLM's are refused by name.

        A request that cannot be served raises if it is the only one. In a list it comes back in its
        place with `error` set and finish_reason "error", and the others are served as if it were
        not there.
        """
        refuse_arguments("LLM.generate", unsupported, ("prompts", "sampling_params", "use_tqdm"))
        batch, single = inputs.as_batch(prompts)
        results: dict[int, RequestOutput] = {}
        with _progress(use_tqdm, len(batch)) as bar:
            # Never bound to a name: whatever cuts this loop short ends the iterator, and so its
            # requests.
            for position, output in self._outputs(
                batch, sampling_params, RequestOutputKind.FINAL_ONLY, raises=single
            ):
                results[position] = output
                bar.update(1)
        if single and results[0].error is not None:
            raise results[0].error
        return [results[position] for position in range(len(batch))]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: Tqdm = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **unsupported: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered with a chat template (in a sandbox).

        messages: a list of ``{"role": ..., "content": ...}``, or a list of such lists.
        chat_template: a template's text in place of the checkpoint's. add_generation_prompt: end
        with the start of an answer. continue_final_message: go on writing the last message; needs
        add_generation_prompt=False. chat_template_kwargs: further variables for the template, such
        as tools.

        A conversation that cannot be answered is treated like a prompt that cannot be served, see
        `generate`.
        """
        names = (
            "messages",
            "sampling_params",
            "use_tqdm",
            "chat_template",
            "add_generation_prompt",
        )
        known = (*names, "continue_final_message", "chat_template_kwargs")
        refuse_arguments("LLM.chat", unsupported, known)
        variables = {
            "add_generation_prompt": add_generation_prompt,
            **inputs.check_template_kwargs(chat_template_kwargs),
        }
        if continue_final_message:
            if variables["add_generation_prompt"]:
                raise RequestError("continue_final_message=True needs add_generation_prompt=False.")
            variables["continue_final_message"] = True
        if chat_template is not None:
            variables["chat_template"] = chat_template
        conversations, single = inputs.as_conversations(messages)
        prompts: list[PromptType | RefusedPrompt] = []
        for conversation in conversations:
            try:
                prompts.append(self._chat_prompt(conversation, variables))
            except TokenizerRequiredError:
                raise  # true of all of them
            except RequestError as error:
                if single:
                    raise
                prompts.append(RefusedPrompt(error))
        return self.generate(prompts[0] if single else prompts, sampling_params, use_tqdm)

    def stream(self, prompts: Prompts, sampling_params: Params = None) -> Iterator[StreamOutput]:
        """Yield what each completion gains as it comes; `text` never ends inside a character or a
        stop string.

        Joined, the increments are the text that `generate` returns. Bad requests raise before the
        first increment. Closing the iterator aborts what is still running.
        """
        batch, _ = inputs.as_batch(prompts)
        collector = OutputCollector()
        increments = self._increments(
            self._run(collector, batch, sampling_params, RequestOutputKind.DELTA, raises=True)
        )
        collector.read_by(increments)
        return increments

    def _increments(self, outputs: Iterator[tuple[int, RequestOutput]]) -> Iterator[StreamOutput]:
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

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template_variables: Any,
    ) -> Iterator[StreamOutput]:
        """`stream` for one conversation."""
        return self.stream(self._chat_prompt(messages, template_variables), sampling_params)

    def render_chat(self, messages: Sequence[Message], **template_variables: Any) -> list[int]:
        """Token ids of the prompt that the chat template makes of a conversation.

        The template writes the special tokens itself, so none are added. Raises `RequestError` for
        a conversation that is none, or that the template refuses.
        """
        return list(self._chat_prompt(messages, template_variables)["prompt_token_ids"])

    def _chat_prompt(
        self, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> TokensPrompt:
        tokenizer = self.get_tokenizer()
        inputs.check_conversation(messages)
        rendered = tokenizer.apply_chat_template(messages, **variables)
        if not isinstance(rendered, str):  # with the variable tokenize=True
            return {"prompt_token_ids": rendered}
        token_ids = tokenizer.encode(rendered, add_special_tokens=False)
        return {"prompt": rendered, "prompt_token_ids": token_ids}

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests early; whoever waits for them gets what there is, with finish_reason
        "abort".
        """
        self._open_engine().abort_request(request_ids)

    # --- plumbing ---------------------------------------------------------------------------------

    def _params_for(self, batch: list[Any], params: Params) -> list[SamplingParams]:
        """One for each prompt of a batch."""
        return inputs.as_params(
            self.get_default_sampling_params() if params is None else params, len(batch)
        )

    def _outputs(
        self, batch: list[Any], params: Params, output_kind: RequestOutputKind, raises: bool
    ) -> Iterator[tuple[int, RequestOutput]]:
        """(position, output) of these prompts as they come. Their requests live as long as this
        iterator.

        raises: whether a request that is refused raises; otherwise it is an output with an error.
        """
        collector = OutputCollector()
        outputs = self._run(collector, batch, params, output_kind, raises)
        collector.read_by(outputs)
        return outputs

    def _run(
        self,
        collector: OutputCollector,
        batch: list[Any],
        params: Params,
        output_kind: RequestOutputKind,
        raises: bool,
    ) -> Iterator[tuple[int, RequestOutput]]:
        engine = self._open_engine()
        self._take_turn(collector)
        position_of: dict[str, int] = {}
        try:
            engine.drop_abandoned()
            for position, (prompt, own) in enumerate(
                zip(batch, self._params_for(batch, params), strict=True)
            ):
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
        """Note which thread reads these outputs; raises `ConcurrentUseError` while another thread
        reads others.
        """
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


@contextmanager
def _progress(use_tqdm: Tqdm, total: int) -> Iterator[Any]:
    """A bar with `update`; called and closed as vLLM does it with a bar of the caller's."""
    make = use_tqdm if callable(use_tqdm) else tqdm
    options = {} if callable(use_tqdm) else {"disable": not use_tqdm, "unit": "req"}
    bar = make(total=total, desc="Processed prompts", dynamic_ncols=True, **options)
    try:
        yield bar
    finally:
        bar.close()


def _refused(
    position: int, prompt: Any, params: SamplingParams, error: RequestError
) -> RequestOutput:
    text, token_ids = inputs.describe_prompt(prompt)
    outputs = [CompletionOutput(index=i, finish_reason="error") for i in range(params.n)]
    return RequestOutput(
        f"refused-{position}", text, token_ids, outputs, finished=True, error=error
    )
