"""What all handlers of a server share: its engine, its limits, and how requests are admitted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from minivllm import errors
from minivllm.engine.input_processor import EngineInput
from minivllm.outputs import RequestOutput
from minivllm.serving.admission import Admission
from minivllm.serving.api_errors import APIError
from minivllm.serving.async_llm import AsyncLLM, Stream
from minivllm.serving.metrics import ServerMetrics


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves. The engine has options of its own (`EngineConfig`)."""

    #: The name of the model in the API. None: the model as it was given, or "bundled".
    served_model_name: str | None = None
    #: Clients must send this key; None lets everyone in.
    api_key: str | None = None
    #: Requests that may wait beside those that run (max_num_seqs). More get a 429.
    max_queue: int = 1024
    #: The largest body of a request, in bytes.
    max_body_bytes: int = 4 << 20
    #: The most completions of one HTTP request: prompts times n.
    max_completions: int = 256
    #: Whether the live page may show what clients ask and get.
    show_text: bool = False
    #: Whether the log holds prompts.
    log_prompts: bool = False
    #: Whether the server asks its engine for stories, so that the page has something to show.
    demo: bool = False
    #: Seconds that running requests have left after SIGTERM.
    drain_seconds: float = 30.0


@dataclass
class ServerState:
    """One server. `is_draining`: it has been told to end, and takes no requests.

    num_engines: how many engines work behind `llm`, at most.
    """

    llm: AsyncLLM
    options: ServerOptions = field(default_factory=ServerOptions)
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    num_engines: int = 1

    def __post_init__(self) -> None:
        self.metrics = ServerMetrics(self.llm, self.model_name)
        slots = self.num_engines * self.llm.config.max_num_seqs
        self.admission = Admission(slots, self.options.max_queue)

    @property
    def model_name(self) -> str:
        return self.options.served_model_name or self.llm.model_path.name

    @staticmethod
    def created_now() -> int:
        """The time of an answer, in seconds since 1970."""
        return int(time.time())

    def require_model(self, name: str | None) -> None:
        """Raises `APIError` (404) for a model that is not served here."""
        if name is not None and name not in (self.model_name, str(self.llm.model_path)):
            raise APIError(
                404,
                f"The model {name!r} is not here; this server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def admit(self, num_prompts: int, n: int) -> None:
        """Raises `APIError` when these requests cannot be taken now, or at all."""
        count, most = num_prompts * n, self.options.max_completions
        if count > most:
            raise APIError(
                400,
                f"{num_prompts} prompts with n={n} are {count} completions; a request may have"
                f" {most}.",
                param="n",
            )
        if self.is_draining:
            raise APIError(503, "This server is shutting down.")
        self.require_room(num_prompts)

    def require_room(self, count: int) -> None:
        """Raises `APIError` (429) where `count` more requests would be too many."""
        unfinished = self.llm.num_unfinished
        if not self.admission.has_room(count, unfinished):
            self.metrics.refused.inc()
            raise APIError(
                429,
                f"The queue is full: {unfinished} requests run or wait.",
                retry_after=self.admission.retry_after(unfinished),
            )


@dataclass
class Job:
    """The engine's requests of one HTTP request: one for each prompt.

    request_id: of the HTTP request. note: becomes part of the line in the log.
    """

    state: ServerState
    inputs: Sequence[EngineInput]
    request_id: str
    note: dict[str, Any] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)
    _has_place: bool = False

    def take_place(self) -> None:
        """Hold places in the queue until the engine has the requests, or `give_place_back`.

        Checking the prompts takes time, in which others came in. Raises `APIError` (429) where no
        place is left.
        """
        self.state.require_room(len(self.inputs))
        self.state.admission.num_promised += len(self.inputs)
        self._has_place = True

    def give_place_back(self) -> None:
        """For a job that may not have begun. A second call does nothing."""
        if self._has_place:
            self.state.admission.num_promised -= len(self.inputs)
            self._has_place = False

    async def whole(self) -> list[RequestOutput]:
        """The finished outputs, one for each prompt. Raises the error of a prompt that failed."""
        self._start()
        try:
            outputs = list(await asyncio.gather(*(stream.next() for stream in self.streams)))
            for output in outputs:
                self._finish(output)
            return outputs
        finally:
            self._drop()

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield (number of the prompt, output) as they come."""
        self._start()
        try:
            if len(self.streams) == 1:
                (stream,) = self.streams
                while not stream.is_finished:
                    output = await stream.next()
                    self._finish(output)
                    yield 0, output
                return
            async for position, output in self._interleaved():
                self._finish(output)
                yield position, output
        finally:
            self._drop()

    async def _interleaved(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """The outputs of several streams, each as soon as it is there."""
        waiting = {asyncio.ensure_future(s.next()): i for i, s in enumerate(self.streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    position = waiting.pop(task)
                    yield position, task.result()
                    stream = self.streams[position]
                    if not stream.is_finished:
                        waiting[asyncio.ensure_future(stream.next())] = position
        finally:
            for task in waiting:
                task.cancel()

    def _start(self) -> None:
        # Not earlier: a handler whose client is gone before its first output must leave nothing.
        llm = self.state.llm
        self.give_place_back()
        for checked in self.inputs:
            # A client may send an id twice, so the engine's ids have a part of their own.
            self.streams.append(llm.start(checked, f"{self.request_id}-{uuid4().hex[:8]}"))

    def _finish(self, output: RequestOutput) -> None:
        if output.error is not None:
            raise output.error
        if output.finished:
            self.state.metrics.observe(output)

    def _drop(self) -> None:
        for stream in self.streams:
            if not stream.is_finished:
                self.state.metrics.observe_abort()
            self.state.llm.drop(stream)
            self.state.admission.note_end()
        num_prompt = sum(len(checked.prompt_token_ids) for checked in self.inputs)
        num_output = sum(stream.num_output_tokens for stream in self.streams)
        self.note["tokens"] = f"{num_prompt}+{num_output}"
        if self.state.options.log_prompts:
            self.note["prompt"] = repr([checked.prompt_text for checked in self.inputs])[:2000]


async def check_all(state: ServerState, prompts: Sequence[Any], params: Any) -> list[EngineInput]:
    """Check every prompt before any is started. Raises the first `RequestError`."""
    checked = []
    for number, prompt in enumerate(prompts):
        try:
            checked.append(await state.llm.check(prompt, params))
        except errors.RequestError as error:
            if len(prompts) == 1:
                raise
            raise type(error)(f"prompt {number}: {error}") from error
    return checked
