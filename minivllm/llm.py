"""`LLM`: the offline interface of the engine. Prompts in, texts out.

For example::

    from minivllm import LLM, SamplingParams

    llm = LLM()  # the bundled model; or a directory, or a hub id
    outputs = llm.generate(["Once upon a time", "KV cache:"], SamplingParams(max_tokens=64))
    for chunk in llm.stream("Tell me a story."):
        print(chunk.text, end="", flush=True)

Taught in notebooks/11_using_minivllm.ipynb.
"""

import logging
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from tqdm.auto import tqdm

from minivllm import inputs
from minivllm.compat.calls import refuse_arguments, refuse_method
from minivllm.config import EngineConfig, SpeculativeConfig
from minivllm.engine.batch import build_batch
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.engine_core import EnginePieces
from minivllm.engine.llm_engine import EngineMetrics, LLMEngine
from minivllm.engine.output_processor import OutputCollector
from minivllm.engine.scheduler import Scheduler, SchedulerBase
from minivllm.engine.speculation import Proposer
from minivllm.engine.trace import Trace
from minivllm.errors import (
    ConcurrentUseError,
    EngineEndedError,
    RequestError,
    TokenizerRequiredError,
)
from minivllm.inputs import Message, Params, Prompts, RefusedPrompt, TokensPrompt
from minivllm.kernels import Kernels
from minivllm.metrics import (
    ACCEPTED_PER_POS,
    COUNTERS,
    SPECULATION_COUNTERS,
    Counter,
    Gauge,
    Metric,
    Vector,
    per_position,
)
from minivllm.outputs import CompletionOutput, RequestOutput, StreamOutput
from minivllm.parallel.group import TensorParallelGroup
from minivllm.sampling_params import MAX_LOGPROBS, RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

#: True or False, or a function that makes a progress bar and takes the arguments of `tqdm`.
Tqdm = bool | Callable[..., Any]


class LLM:
    """One model and its engine. As a context manager, it frees the memory when it is left.

    model: None (the bundled one), a directory, or a Hugging Face hub id. All other arguments are
    optional, and None means that minivllm decides:

    Numbers and memory

    - dtype: "auto" is the checkpoint's on a GPU and float32 on a CPU.
    - kv_cache_dtype: "fp8" (GPUs) and "int8" hold 8 bits per number, almost twice as many tokens in
      the same memory as bfloat16. "auto": numbers of dtype.
    - calculate_kv_scales: measure the scales of an fp8 cache at the start; else they are 1.
    - device: "auto" is "cuda" if there is a GPU; "cuda:1" and "cpu" work, too.
    - max_model_len: the longest prompt plus output, in tokens. None: what the checkpoint allows; on
      a CPU without num_kv_blocks at most what fits 1 GiB of KV cache.
    - max_num_seqs: the largest number of sequences that run at once.
    - max_num_batched_tokens: the token budget of one step. None: 8192 on a GPU, 2048 on a CPU.
    - block_size: tokens per KV block. None: 64 on a GPU, 16 on a CPU.
    - num_kv_blocks: blocks in the KV cache. None: what gpu_memory_utilization leaves on a GPU; on
      a CPU 256 MiB, or one sequence of max_model_len if that is more.
    - gpu_memory_utilization: the share of the GPU's memory for weights, activations and KV cache.

    How steps are made

    - enable_prefix_caching: prompts with the same beginning share their KV blocks.
    - enforce_eager: use no CUDA graphs.
    - async_scheduling: plan a step while the previous one runs. None: True on a GPU, else False.
    - attention_backend: "auto" is "triton" on a GPU and "torch" on a CPU.
    - tensor_parallel_size: the number of ranks, one per GPU, that share the model.
    - disable_custom_all_reduce: False lets GPUs add up through memory that they share, where that
      is faster. It has not been run on GPUs yet, so NCCL alone is the default.
    - speculative_config: speculative decoding, which verifies several proposed tokens per step and
      gives the same text: a dict with vLLM's names, such as ``{"method": "ngram",
      "num_speculative_tokens": 4}``; see `SpeculativeConfig`. None: off.

    Model and requests

    - load_format: "auto" reads safetensors; "dummy" draws random weights.
    - quantization: "fp8" or "int8" quantizes the weights of the linear layers to 8 bits when they
      are loaded. None: as the checkpoint has them, quantized or not.
    - skip_tokenizer_init: token ids in and out, no text.
    - seed: of dummy weights, and of requests without a seed.
    - generation_config: the sampling defaults. "auto": the checkpoint's; "vllm":
      `SamplingParams()`.
    - max_logprobs: the most alternatives that a request may ask for; -1: the whole vocabulary.
    - trace: record what happens at each step; see `minivllm.engine.trace`.

    Your own pieces in place of the package's, and a group of ranks that have met already: kernels,
    block_manager_cls, scheduler_cls, model_cls, build_batch, proposer, group.

    Raises `ConfigError` for a value that cannot work. Options that only vLLM has (vllm_options) are
    refused with a hint at what to do instead, unless their value asks for what minivllm does
    anyway, such as ``trust_remote_code=False``.
    """

    # The options are arguments of their own, so that an editor shows them.
    def __init__(  # noqa: PLR0913
        self,
        model: str | Path | None = None,
        *,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        kv_cache_dtype: Literal["auto", "fp8", "int8"] = "auto",
        calculate_kv_scales: bool = False,
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        num_kv_blocks: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        async_scheduling: bool | None = None,
        attention_backend: Literal["auto", "triton", "torch"] = "auto",
        load_format: Literal["auto", "safetensors", "dummy"] = "auto",
        quantization: Literal["fp8", "int8"] | None = None,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        disable_custom_all_reduce: bool = True,
        seed: int = 0,
        generation_config: Literal["auto", "vllm"] = "auto",
        max_logprobs: int = MAX_LOGPROBS,
        trace: bool = False,
        speculative_config: Mapping[str, Any] | SpeculativeConfig | None = None,
        kernels: Kernels | None = None,
        block_manager_cls: Callable[..., BlockManager] = BlockManager,
        scheduler_cls: Callable[..., SchedulerBase] = Scheduler,
        model_cls: Callable[..., Any] | None = None,
        build_batch: Callable[..., Any] = build_batch,
        proposer: Proposer | None = None,
        group: TensorParallelGroup | None = None,
        **vllm_options: Any,
    ) -> None:
        options: dict[str, Any] = dict(
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            calculate_kv_scales=calculate_kv_scales,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_kv_blocks=num_kv_blocks,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
            attention_backend=attention_backend,
            load_format=load_format,
            quantization=quantization,
            skip_tokenizer_init=skip_tokenizer_init,
            tensor_parallel_size=tensor_parallel_size,
            disable_custom_all_reduce=disable_custom_all_reduce,
            seed=seed,
            generation_config=generation_config,
            max_logprobs=max_logprobs,
            trace=trace,
            speculative_config=speculative_config,
            **vllm_options,
        )
        config = EngineConfig.from_options(options)
        pieces = EnginePieces(
            kernels, block_manager_cls, scheduler_cls, model_cls, build_batch, proposer
        )
        engine = LLMEngine(model, config=config, pieces=pieces, group=group)
        self.llm_engine: LLMEngine | None = engine
        #: The calls that are under way, and the thread of each. A stream may be open while
        #: `generate` runs.
        self._turns: dict[OutputCollector, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what is running, and free model and cache. The object cannot be used afterwards."""
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
        # Python calls this only for missing attributes. For a method of vLLM's the error says what
        # to do instead.
        refuse_method(self, name)

    def get_metrics(self) -> list[Metric]:
        """`metrics` in vLLM's form: a list of named counters and gauges."""
        engine, found = self._open_engine(), self.metrics()
        labels = {"model_name": engine.model_path.name, "engine": "0"}
        running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
        usage = found.num_used_kv_blocks / found.num_kv_blocks
        names, accepted = dict(COUNTERS), []
        if (wanted := engine.config.speculative_config) is not None:
            names |= SPECULATION_COUNTERS
            most, counts = wanted.num_speculative_tokens or 0, found.num_accepted_tokens_per_pos
            accepted = [Vector(ACCEPTED_PER_POS, labels, per_position(counts, most))]
        return [
            Gauge("vllm:num_requests_running", labels, running),
            Gauge("vllm:num_requests_waiting", labels, waiting),
            # 1.0 means that the cache is full.
            Gauge("vllm:kv_cache_usage_perc", labels, usage),
            *(Counter(name, labels, getattr(found, field)) for name, field in names.items()),
            *accepted,
        ]

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests without parameters, from generation_config.json.

        With ``generation_config="vllm"`` they are `SamplingParams()`.
        """
        return self._open_engine().input_processor.default_params

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Returns False, and does nothing, if requests are running."""
        return self._open_engine().reset_prefix_cache()

    def get_tokenizer(self) -> Any:
        """The tokenizer (`encode`, `decode`, `apply_chat_template`). Raises if there is none."""
        tokenizer = self._open_engine().tokenizer
        if tokenizer is None:
            raise TokenizerRequiredError("This engine was made with skip_tokenizer_init=True.")
        return tokenizer

    # --- the three ways to ask --------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: Params = None,
        use_tqdm: Tqdm = True,
        **unsupported: Any,
    ) -> list[RequestOutput]:
        """Complete the prompts. Returns the results in the order of the prompts.

        prompts: one or a list, each a string, token ids, or a dict as in vLLM (`TextPrompt`,
        `TokensPrompt`). sampling_params: one for all prompts, or one per prompt; None takes
        `get_default_sampling_params`. use_tqdm: whether to show progress, or a function that makes
        the bar. Other arguments of vLLM's are refused by name.

        A single request that cannot be served raises its error. In a list it comes back in its
        place with `error` set and finish_reason "error", and the other requests are served as if
        it were not there.
        """
        refuse_arguments("LLM.generate", unsupported, ("prompts", "sampling_params", "use_tqdm"))
        batch, single = inputs.as_batch(prompts)
        results: dict[int, RequestOutput] = {}
        with _progress(use_tqdm, len(batch)) as bar:
            # The iterator has no name of its own, so it ends, and with it its requests, however
            # this loop is interrupted.
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
        chat_template: the text of a template, in place of the checkpoint's. add_generation_prompt:
        end the prompt with the start of an answer. continue_final_message: continue the last
        message; needs add_generation_prompt=False. chat_template_kwargs: further variables for the
        template, such as tools.

        A conversation that cannot be answered is treated like a prompt that cannot be served; see
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
        # A `RefusedPrompt` stands for a conversation without a prompt.
        prompts: list[Any] = []
        for conversation in conversations:
            try:
                prompts.append(self._chat_prompt(conversation, variables))
            except TokenizerRequiredError:
                # This error holds for all conversations.
                raise
            except RequestError as error:
                if single:
                    raise
                prompts.append(RefusedPrompt(error))
        return self.generate(prompts[0] if single else prompts, sampling_params, use_tqdm)

    def stream(self, prompts: Prompts, sampling_params: Params = None) -> Iterator[StreamOutput]:
        """Yield the new text of each completion as it comes.

        `text` never ends inside a character or inside a stop string. Joined, the pieces are the
        text that `generate` returns. Bad requests raise before the first piece. Closing the
        iterator aborts the requests that still run.
        """
        batch, _ = inputs.as_batch(prompts)
        collector = OutputCollector()
        increments = self._increments(
            self._run(collector, batch, sampling_params, RequestOutputKind.DELTA, raises=True)
        )
        collector.read_by(increments)
        return increments

    def _increments(
        self, outputs: Generator[tuple[int, RequestOutput], None, None]
    ) -> Generator[StreamOutput, None, None]:
        # (prompt, completion): each reports its end once.
        ended: set[tuple[int, int]] = set()
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
        """Stream the answer to one conversation; see `stream`."""
        return self.stream(self._chat_prompt(messages, template_variables), sampling_params)

    def render_chat(self, messages: Sequence[Message], **template_variables: Any) -> list[int]:
        """Render a conversation with the chat template, and return the prompt's token ids.

        The template writes the special tokens itself, so none are added. Raises `RequestError` for
        an invalid conversation, and for one that the template refuses.
        """
        return list(self._chat_prompt(messages, template_variables)["prompt_token_ids"])

    def _chat_prompt(
        self, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> TokensPrompt:
        return self._open_engine().input_processor.chat_prompt(messages, variables)

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests early. They return the tokens so far, with finish_reason "abort"."""
        self._open_engine().abort_request(request_ids)

    # --- plumbing ---------------------------------------------------------------------------------

    def _params_for(self, batch: list[Any], params: Params) -> list[SamplingParams]:
        """One `SamplingParams` per prompt of a batch."""
        return inputs.as_params(
            self.get_default_sampling_params() if params is None else params, len(batch)
        )

    def _outputs(
        self, batch: list[Any], params: Params, output_kind: RequestOutputKind, raises: bool
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Yield (position, output) of these prompts as outputs come.

        The requests end when this iterator ends. raises: whether a refused request raises its
        error; otherwise it yields an output with the error.
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
    ) -> Generator[tuple[int, RequestOutput], None, None]:
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
        """Note the thread that reads these outputs.

        Raises `ConcurrentUseError` while another thread reads other outputs.
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
    """Make a bar with `update`. A bar of the caller's is called and closed as vLLM does it."""
    make: Callable[..., Any] = use_tqdm if callable(use_tqdm) else tqdm
    options: dict[str, Any] = {} if callable(use_tqdm) else {"disable": not use_tqdm, "unit": "req"}
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
