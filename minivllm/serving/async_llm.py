"""`AsyncLLM`: an engine for programs with an event loop, such as a server.

::

    async with AsyncLLM() as llm:                                # the bundled model
        async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)                        # all text so far

The engine's steps run in a process or a thread of their own. The event loop never waits for a step:
it puts requests into a queue and is woken once per step with everything that the step brought. A
step never waits for the event loop, or for a caller that reads slowly: what a request gained while
nobody read is joined into one output. The names are vLLM's. Taught in notebooks/12_serving.ipynb.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self
from uuid import uuid4

from minivllm import errors
from minivllm.config import EngineArgs, EngineConfig
from minivllm.engine.engine_core import EnginePieces
from minivllm.engine.input_processor import EngineInput, InputProcessor
from minivllm.engine.llm_engine import EngineMetrics
from minivllm.inputs import PromptType
from minivllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.serving import wire
from minivllm.serving.core_client import Core, ProcessCore, Receive, ThreadCore, error_of
from minivllm.tokenizer import Tokenizer

#: A prompt text of more characters is encoded in a thread, because that takes a millisecond.
LONG_TEXT = 4000
#: Seconds that the engine may take to answer `check_health`: longer than any step should take.
HEALTH_TIMEOUT = 30.0


class AsyncLLM:
    """An engine that serves many callers of one event loop at a time.

    model: None (the bundled one), a directory, or a Hugging Face hub id. core: "process" or
    "thread", where the engine's steps run; or a function that makes another `Core`, such as one
    that passes requests on to engines elsewhere, and takes neither model nor config. config: how
    the engine runs; its fields may be given as keyword arguments instead. pieces: your own parts,
    with core="thread".

    The constructor waits until the model is loaded. In a running event loop, use ``await
    AsyncLLM.create(...)``.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        core: Literal["process", "thread"] | Callable[[Receive], Core] = "process",
        config: EngineConfig | None = None,
        pieces: EnginePieces | None = None,
        **options: Any,
    ) -> None:
        self._streams: dict[str, Stream] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: errors.MiniVLLMError | None = None
        self._is_closed = False
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="encode")
        #: The state after the latest step; of all engines together, where there are several.
        self.stats = wire.Stats()
        self._on_step: Callable[[wire.Step], None] | None = None
        #: Called once, in the event loop, when the core has died.
        self.on_death: Callable[[errors.MiniVLLMError], None] | None = None
        if callable(core):
            self._core = core(self._receive)
        else:
            config = EngineConfig.choose(config, options)
            self._core = _make_core(model, core, config, pieces, self._receive)
        started = self._core.started
        self.model_path = Path(started.model_path)
        self.model_config, self.config = started.model_config, started.config
        self.kv_bytes_per_token = started.kv_bytes_per_token
        self.tokenizer = None if self.config.skip_tokenizer_init else Tokenizer(self.model_path)
        self.input_processor = InputProcessor(
            self.model_path,
            self.model_config,
            self.config,
            self.tokenizer,
            started.takes_cache_salt,
        )

    @classmethod
    async def create(cls, model: str | Path | None = None, **options: Any) -> Self:
        """Make an `AsyncLLM` without blocking the event loop while the model loads."""
        return await asyncio.to_thread(cls, model, **options)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """The engine that these arguments describe, as in vLLM."""
        return cls(engine_args.model, **engine_args.options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- requests -------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serve one request, and yield its outputs as they come.

        ``output_kind`` of the parameters says what an output holds: everything so far (CUMULATIVE),
        what is new (DELTA), or only the end (FINAL_ONLY). Closing the iterator, or cancelling its
        task, aborts the request. An aborted request ends with finish_reason "abort".

        Raises a `RequestError` for a request that cannot be served, and `EngineEndedError` when the
        engine has died or was closed.
        """
        checked = await self.check(prompt, sampling_params)
        stream = self.start(checked, request_id)
        try:
            while not stream.is_finished:
                yield await stream.next()
        finally:
            self.drop(stream)

    async def check(self, prompt: PromptType, params: SamplingParams | None = None) -> EngineInput:
        """Check and encode a request. Raises a `RequestError` if it cannot be served."""
        self._require_alive()
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        is_long = isinstance(text, str) and len(text) > LONG_TEXT
        # A grammar may take as long to compile.
        if is_long or (params is not None and params.structured_outputs is not None):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._encoders, self.input_processor.process, prompt, params
            )
        return self.input_processor.process(prompt, params)

    def start(self, checked: EngineInput, request_id: str | None = None) -> Stream:
        """Hand a checked request to the engine. The caller must `drop` the stream in the end."""
        self._require_alive()
        if request_id is None:
            request_id = f"req-{uuid4().hex}"
        if request_id in self._streams:
            raise errors.RequestError(
                f"Request id {request_id!r} is in use; finish or abort that request first."
            )
        self._loop = asyncio.get_running_loop()
        stream = self._streams[request_id] = Stream(request_id, checked)
        self._core.send(wire.Add(request_id, checked))
        return stream

    def drop(self, stream: Stream) -> None:
        """Forget a stream, and abort its request if that has not finished."""
        if self._streams.pop(stream.request_id, None) is stream and not stream.is_finished:
            self._core.send(wire.Abort([stream.request_id]))

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests now. They return the tokens so far; unknown ids are ignored."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._core.send(wire.Abort(ids))

    async def abort_all(self) -> None:
        """End all requests now. They return the tokens so far."""
        self._core.send(wire.Abort(list(self._streams)))

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._streams)

    # --- the engine -------------------------------------------------------------------------------

    def metrics(self) -> EngineMetrics:
        """The engine's counters after its latest step."""
        return self.stats.counters

    @property
    def errored(self) -> bool:
        """Whether the engine has died. It does not come back; make a new one."""
        return self._error is not None

    async def check_health(self, timeout: float = HEALTH_TIMEOUT) -> None:
        """Return if the engine can run a step. timeout: in seconds.

        Raises `EngineEndedError` if it has died, was closed, or does not answer in time.
        """
        try:
            await asyncio.wait_for(self._ask(wire.Ping), timeout)
        except TimeoutError:
            raise errors.EngineEndedError(
                f"The engine has not answered for {timeout:g} seconds."
            ) from None

    async def reset_prefix_cache(self) -> bool:
        """Forget the content of all KV blocks. Returns False while requests are unfinished."""
        done: bool = await self._ask(wire.ResetPrefixCache)
        return done

    async def cached_hashes(self) -> list[int]:
        """The hashes of all KV blocks in the prefix cache (`hash_block`: 128 bits), in any order.

        Empty with a block manager of your own that has no `hash_to_block`.
        """
        hashes: list[int] = await self._ask(wire.ListCached)
        return hashes

    async def refresh(self) -> None:
        """Bring `engines` up to date, where they are several and elsewhere."""
        await self._core.refresh()

    @property
    def started(self) -> wire.Started:
        """What the engine said of itself when it was ready."""
        return self._core.started

    @property
    def engines(self) -> dict[str, wire.Stats]:
        """The state of each engine by its name; here it is one, "0"."""
        return self._core.engines or {"0": self.stats}

    def watch(self, on_step: Callable[[wire.Step], None] | None, with_text: bool = False) -> None:
        """Give a description of the engine's steps to a function, from now on; None ends this.

        Called at most 30 times per second. with_text: with prompts and answers. Nothing is recorded
        while nobody watches.
        """
        self._loop = asyncio.get_running_loop()
        self._on_step = on_step
        self._core.send(wire.Watch(on_step is not None, with_text))

    async def close(self) -> None:
        """End what runs, and free the engine. Callers that wait get `EngineEndedError`."""
        self._is_closed = True
        self._fail(errors.EngineEndedError("This engine has been closed. Make a new one."))
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """`close` for code without an event loop."""
        self._is_closed = True
        self._core.close()
        self._encoders.shutdown(wait=False)
        if self.tokenizer is not None:
            self.tokenizer.close()

    # --- messages ---------------------------------------------------------------------------------

    def _require_alive(self) -> None:
        if self._is_closed:
            raise errors.EngineEndedError("This engine has been closed. Make a new one.")
        if self._error is not None:
            raise self._error

    async def _ask(self, question: Callable[[int], Any]) -> Any:
        self._require_alive()
        self._loop = asyncio.get_running_loop()
        number = next(self._numbers)
        answer = self._answers[number] = self._loop.create_future()
        self._core.send(question(number))
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    def _receive(self, message: Any) -> None:
        """Take a message of the core, in the core's thread, to the event loop."""
        if isinstance(message, wire.Failed) and self._error is None:
            # Set here, so that a program without a running event loop sees it, too.
            self._error = error_of(message)
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(self._take, message)
        except RuntimeError:
            # The event loop was closed, and with it everyone who waited.
            return

    def _take(self, message: Any) -> None:
        match message:
            case wire.News(gains, stats, step):
                self.stats = stats
                for gain in gains:
                    stream = self._streams.get(gain[0])
                    if stream is not None:
                        stream.put(gain)
                if step is not None and self._on_step is not None:
                    self._on_step(step)
            case wire.Pong(number, result):
                answer = self._answers.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(result)
            case wire.Failed():
                assert self._error is not None
                self._fail(self._error)
                if self.on_death is not None and not self._is_closed:
                    self.on_death(self._error)

    def _fail(self, error: errors.MiniVLLMError) -> None:
        """Give everyone who waits an error."""
        for stream in self._streams.values():
            stream.fail(error)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)


def _make_core(
    model: str | Path | None,
    core: str,
    config: EngineConfig,
    pieces: EnginePieces | None,
    receive: Receive,
) -> Core:
    name = None if model is None else str(model)
    if core == "process":
        if pieces is not None:
            raise errors.ConfigError('Parts of your own need core="thread".')
        return ProcessCore(name, config, receive)
    if core == "thread":
        return ThreadCore(name, config, pieces or EnginePieces(), receive)
    raise errors.ConfigError(f'core is "process" or "thread", not {core!r}.')


class Stream:
    """One request as its caller sees it."""

    def __init__(self, request_id: str, checked: EngineInput) -> None:
        self.request_id, self.input = request_id, checked
        self.kind = checked.params.output_kind
        #: Whether the caller has got the last output.
        self.is_finished = False
        self.metrics: RequestMetrics | None = None
        #: Tokens of all completions in the outputs so far.
        self.num_output_tokens = 0
        self._waiting: list[wire.Gain] = []
        self._completions = [CompletionOutput(i) for i in range(checked.params.n)]
        self._ended: set[int] = set()
        self._prompt_logprobs: Any = None
        self._num_cached_tokens = 0
        self._error: errors.MiniVLLMError | None = None
        #: Wakes the caller; None while nobody waits.
        self._news: asyncio.Future[None] | None = None

    def put(self, gain: wire.Gain) -> None:
        """Take in what a step has brought."""
        self._waiting.append(gain)
        self._wake()

    def fail(self, error: errors.MiniVLLMError) -> None:
        """End the stream with an error for its caller."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None:
            if not self._news.done():
                self._news.set_result(None)
            self._news = None

    async def next(self) -> RequestOutput:
        """The next output. Raises `EngineEndedError` when the engine has died.

        For one caller at a time.
        """
        await self._news_or_error()
        return self._join()

    async def next_gains(self) -> list[wire.Gain]:
        """What has come since the last call, as the core sent it: for a caller that passes it on.

        Instead of `next`, and with its errors.
        """
        await self._news_or_error()
        gains, self._waiting = self._waiting, []
        self.is_finished = any(is_finished for _, _, is_finished, *_ in gains)
        return gains

    async def _news_or_error(self) -> None:
        """Wait until something has come. Raises the stream's error after the last news."""
        if not self._waiting and self._error is None:
            # Not an `asyncio.Event`, which costs three times as much: this runs for each token.
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if not self._waiting and self._error is not None:
            self.is_finished = True
            raise self._error

    def _join(self) -> RequestOutput:
        """Join what has come since the last output into one output."""
        gains, self._waiting = self._waiting, []
        delta = self.kind is RequestOutputKind.DELTA
        changed: dict[int, CompletionOutput] = {}
        error = None
        for _, pieces, finished, prompt_logprobs, num_cached, metrics, failure in gains:
            self._num_cached_tokens, error = num_cached, failure
            self._prompt_logprobs = prompt_logprobs or self._prompt_logprobs
            self.metrics = metrics or self.metrics
            self.is_finished = finished
            for piece in pieces:
                index = piece[0]
                if index in self._ended:
                    continue
                output = changed.get(index) if delta else self._completions[index]
                if output is None:
                    output = changed[index] = CompletionOutput(*piece)
                else:
                    _extend(output, piece)
                self.num_output_tokens += len(piece[2])
                if output.finish_reason is not None:
                    self._ended.add(index)
        outputs = (
            list(changed.values())
            if delta
            else [
                CompletionOutput(
                    c.index,
                    c.text,
                    list(c.token_ids),
                    c.cumulative_logprob,
                    None if c.logprobs is None else list(c.logprobs),
                    c.finish_reason,
                    c.stop_reason,
                )
                for c in self._completions
            ]
        )
        return RequestOutput(
            self.request_id,
            self.input.prompt_text,
            self.input.prompt_token_ids,
            outputs,
            self.is_finished,
            self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            metrics=self.metrics,
            error=error,
        )


def _extend(output: CompletionOutput, piece: wire.Piece) -> None:
    """Add what a step has brought to a completion."""
    _, text, token_ids, cumulative, logprobs, finish_reason, stop_reason = piece
    output.text += text
    output.token_ids += token_ids
    output.cumulative_logprob = cumulative
    if logprobs is not None:
        output.logprobs = (output.logprobs or []) + logprobs
    output.finish_reason, output.stop_reason = finish_reason, stop_reason
