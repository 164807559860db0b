"""`FleetCore`: what stands in the place of one engine's core, and speaks to many replicas.

`AsyncLLM` and the OpenAI application above it do not know the difference. A request is a streaming
call of a Ray handle, whose router chooses the replica. A replica that dies ends its own requests
only: one of which nothing has come yet is sent to another replica, and one that has begun ends with
an error. Its text is lost on purpose: another replica would go on from tokens that were sampled
elsewhere, and only the client knows whether it wants that.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from minivllm import errors
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.engine.input_processor import EngineInput
from minivllm.engine.llm_engine import EngineMetrics
from minivllm.models.loader import resolve_model_path
from minivllm.serving import wire
from minivllm.serving.api_errors import APIError
from minivllm.serving.replicas.messages import Order, Part
from minivllm.serving.replicas.prefixes import prompt_hashes

logger = logging.getLogger(__name__)

#: How many replicas a request may lose before it ends with an error. It may be what kills them.
TRIES = 3
#: Seconds after which the state of a replica that says nothing is forgotten.
SILENCE = 60.0
#: Seconds for which somebody waits until all replicas have told their state.
REFRESH_TIMEOUT = 2.0
#: Seconds for which something that a replica sent shows that the fleet is well.
HEARD = 5.0


class FleetCore:
    """A `Core` (core_client.py) over the replicas of a deployment. For use in an event loop.

    handle: of the `Replica` deployment. started: what one of the replicas said, with the model's
    path on this machine.
    """

    def __init__(
        self, handle: DeploymentHandle, started: wire.Started, receive: Callable[[Any], None]
    ) -> None:
        self.started, self._receive, self._handle = started, receive, handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._loop = asyncio.get_running_loop()
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._others: set[asyncio.Task[None]] = set()
        #: The replica's name -> its latest state, and when it came.
        self._engines: dict[str, tuple[wire.Stats, float]] = {}
        #: When a replica last sent anything.
        self._heard = float("-inf")
        #: The question to all replicas that is under way, and until when somebody waits for it.
        self._refresh: tuple[asyncio.Task[None], float] | None = None

    @property
    def engines(self) -> dict[str, wire.Stats]:
        """The replicas that have said something lately, and their state."""
        oldest = time.monotonic() - SILENCE
        self._engines = {n: pair for n, pair in self._engines.items() if pair[1] >= oldest}
        return {name: stats for name, (stats, _) in sorted(self._engines.items())}

    def send(self, message: Any) -> None:
        """Take a message of `AsyncLLM`, in its event loop."""
        match message:
            case wire.Add(request_id, checked):
                call = _Call(self, request_id, checked)
                task = self._requests[request_id] = self._spawn(self._serve(call))
                task.add_done_callback(partial(self._forget, call))
            case wire.Abort(request_ids):
                for request_id in request_ids:
                    if request_id in self._requests:
                        self._requests[request_id].cancel()
            case wire.Ping(number) if time.monotonic() < self._heard + HEARD:
                # Replicas that are full would answer a call only when they have a place again.
                self._receive(wire.Pong(number))
            case wire.Ping(number):
                self._ask(number, self._handle.describe.remote, lambda _: True)
            case wire.ResetPrefixCache(number):
                self._ask(number, lambda: self._broadcast("reset_prefix_cache"), all)
            case wire.ListCached(number):
                self._receive(wire.Pong(number, []))
            case wire.Close():
                for task in (*self._requests.values(), *self._others):
                    task.cancel()

    def close(self) -> None:
        """End what runs. May be called in any thread."""
        # The loop may have been closed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.send, wire.Close())

    def _forget(self, call: _Call, task: asyncio.Task[None]) -> None:
        """A request has ended. One that was aborted says so here, even before its first step."""
        self._requests.pop(call.request_id, None)
        if task.cancelled() and not call.is_finished:
            # With `AsyncLLM.abort`, somebody still reads.
            pieces: list[wire.Piece] = [
                (i, "", [], None, None, "abort", None) for i in range(call.input.params.n)
            ]
            self._end(call, pieces, None)

    async def refresh(self) -> None:
        """Ask every replica for its state, and forget those that are gone.

        A replica that is full answers when it has a place again. Until then it is not asked a
        second time, and what its requests' parts say stands (`Part.stats`).
        """
        if self._refresh is None or self._refresh[0].done():
            task = self._spawn(self._ask_all())
            self._refresh = task, time.monotonic() + REFRESH_TIMEOUT
            self._others.add(task)
            task.add_done_callback(self._others.discard)
        task, until = self._refresh
        await asyncio.wait([task], timeout=max(0.0, until - time.monotonic()))

    async def _ask_all(self) -> None:
        began = time.monotonic()
        try:
            answers = await asyncio.wait_for(self._broadcast("state"), SILENCE)
        except (TimeoutError, RayError, RayServeException):
            # What is known already stays where not all of them answer.
            return
        now = time.monotonic()
        newer = {name: pair for name, pair in self._engines.items() if pair[1] > began}
        self._engines = {name: (stats, now) for name, stats in answers} | newer

    # --- calls ------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # In a context of its own: Ray gives all calls that an HTTP request makes one id, and routes
        # one call per id at a time; a request with two prompts makes two.
        return self._loop.create_task(work, context=contextvars.Context())

    def _ask(
        self, number: int, call: Callable[[], Any], judge: Callable[[Any], Any] = lambda _: True
    ) -> None:
        async def ask() -> None:
            try:
                answer = judge(await call())
            except (RayError, RayServeException) as error:
                # Whoever asked waits with a time limit, and another replica may answer then.
                logger.warning("No replica answers: %s", error)
                return
            self._receive(wire.Pong(number, answer))

        task = self._spawn(ask())
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    async def _broadcast(self, method: str) -> list[Any]:
        answers: list[Any] = await self._handle.broadcast(method).results_async()
        return answers

    async def _serve(self, call: _Call) -> None:
        """One request, from the first try to its last news."""
        try:
            error = await call.run()
        except Exception as bug:
            logger.exception("request %s failed", call.request_id)
            error = errors.EngineEndedError(f"Internal error: {type(bug).__name__}.")
        if error is not None:
            self._end(call, [], error)

    def _end(self, call: _Call, pieces: list[wire.Piece], error: Exception | None) -> None:
        gain: wire.Gain = (call.request_id, pieces, True, None, 0, None, error)
        self._receive(wire.News([gain], self._sum()))

    def take(self, part: Part, gains: list[wire.Gain]) -> None:
        """Pass on what a replica sent."""
        self._heard = time.monotonic()
        if part.stats is not None:
            self._engines[part.engine] = part.stats, self._heard
        self._receive(wire.News(gains, self._sum()))

    def _sum(self) -> wire.Stats:
        return add_stats([stats for stats, _ in self._engines.values()])

    def order(self, request_id: str, checked: EngineInput) -> Order:
        """A request as it is sent to a replica."""
        config, params = self.started.config, checked.params
        # What the engine would not look up: see `BlockManager.find_cached_prefix`.
        is_known = config.enable_prefix_caching and params.prompt_logprobs is None
        ids, salt = checked.prompt_token_ids, checked.cache_salt
        hashes = prompt_hashes(ids, config.block_size, salt) if is_known else []
        return Order(request_id, checked, hashes)

    def call(self, order: Order) -> Any:
        """A try: the stream of a replica's parts."""
        return self._generate.remote(order)


class _Call:
    """One request of a fleet, in as many tries as it needs."""

    def __init__(self, fleet: FleetCore, request_id: str, checked: EngineInput) -> None:
        self.fleet, self.request_id, self.input = fleet, request_id, checked
        self.has_begun = self.is_finished = False

    async def run(self) -> errors.MiniVLLMError | None:
        """Serve it. Returns the error with which it ends, if there is one."""
        for number in range(TRIES):
            try:
                # A replica that is asked twice has its own id for each try.
                await self._try(self.fleet.order(f"{self.request_id}.{number}", self.input))
                if self.is_finished:
                    return None
                cause = "it has ended the request without an end"
            except BackPressureError as error:
                return APIError(429, f"The queue is full: {error.message}")
            except RayActorError as error:
                cause = type(error).__name__
            except (RayError, RayServeException) as error:
                # An error of the replica's own code, such as of an engine that has just died.
                cause = str(error).strip().rpartition("\n")[2]
            if self.is_finished:  # the replica died after its last part
                return None
            logger.warning("request %s has lost its replica: %s", self.request_id, cause)
            if self.has_begun:
                break
        what = "while it answered" if self.has_begun else f"{TRIES} times before the first token"
        return errors.EngineEndedError(f"The replica of this request has died, {what} ({cause}).")

    async def _try(self, order: Order) -> None:
        response = self.fleet.call(order)
        try:
            async for part in response:
                self.has_begun = self.has_begun or bool(part.gains)
                self.fleet.take(part, [self._adopt(gain) for gain in part.gains])
        except asyncio.CancelledError:
            response.cancel()
            raise

    def _adopt(self, gain: wire.Gain) -> wire.Gain:
        """A replica's gain under the request's own id, and with the times that its client sees."""
        _, pieces, is_finished, logprobs, num_cached, times, error = gain
        self.is_finished = self.is_finished or is_finished
        if times is not None and times.finished_time is not None:
            # The clocks of two machines differ, so only durations count. What the engine has not
            # seen, the request spent on its way.
            whole = time.perf_counter() - self.input.arrival_time
            times = dataclasses.replace(times, arrival_time=times.finished_time - whole)
        return self.request_id, pieces, is_finished, logprobs, num_cached, times, error


def add_stats(parts: list[wire.Stats]) -> wire.Stats:
    """The state of several engines as that of one."""
    total = EngineMetrics()
    for field in dataclasses.fields(EngineMetrics):
        values = [getattr(part.counters, field.name) for part in parts]
        if values and isinstance(values[0], int | float):
            setattr(total, field.name, sum(values))
        elif values:
            longest = max(map(len, values))
            padded = [[*value, *[0] * (longest - len(value))] for value in values]
            setattr(total, field.name, [sum(column) for column in zip(*padded, strict=True)])
    return wire.Stats(
        sum(part.num_running for part in parts), sum(part.num_waiting for part in parts), total
    )


def local_path(started: wire.Started, model: str | None) -> wire.Started:
    """The same with the model's path on this machine, which downloads it where it is not there."""
    path = BUNDLED_MODEL_PATH if model is None else resolve_model_path(model)
    return dataclasses.replace(started, model_path=str(path))
