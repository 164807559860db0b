"""A server from its start to its end: the engine, the port, signals, and the exit code.

The end, at 3 a.m.: SIGTERM stops taking requests, lets what runs finish for `drain_seconds`, aborts
the rest, and exits with 0. If the engine dies, /health says 503 at once, everyone who waits gets an
error, and the process exits with 1, so that its supervisor starts a new one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from typing import Any

import uvicorn

from minivllm import errors
from minivllm.serving.app import build_app
from minivllm.serving.async_llm import AsyncLLM
from minivllm.serving.demo_load import keep_busy
from minivllm.serving.state import ServerOptions, ServerState

logger = logging.getLogger("minivllm.serving")

#: Seconds between aborting what still runs and closing connections.
LAST_WORDS = 2.0


class Server(uvicorn.Server):
    """uvicorn, which ends as the text above says."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.engine_state = state
        self._load: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.engine_state.llm.on_death = self._end_dead
        if self.engine_state.options.demo:
            self._load = asyncio.create_task(keep_busy(self.engine_state.llm))

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called at SIGTERM and SIGINT. The second SIGINT ends at once."""
        state = self.engine_state
        if not state.is_draining:
            state.is_draining = True
            name = signal.Signals(sig).name
            logger.info("%s: %d requests may finish", name, state.llm.num_unfinished)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        state = self.engine_state
        state.is_draining = True
        if self._load is not None:
            self._load.cancel()
        watch = asyncio.create_task(self._abort_late())
        try:
            await super().shutdown(sockets)
        finally:
            watch.cancel()

    async def _abort_late(self) -> None:
        """Abort what has not finished in time: its clients get what there is."""
        state = self.engine_state
        await asyncio.sleep(state.options.drain_seconds)
        if state.llm.num_unfinished:
            logger.warning("%d requests are aborted: time is up", state.llm.num_unfinished)
            await state.llm.abort_all()

    def _end_dead(self, error: errors.MiniVLLMError) -> None:
        logger.critical("The engine has died, and the server ends: %s", error)
        self.should_exit = True


def serve(llm: AsyncLLM, options: ServerOptions, **uvicorn_options: Any) -> int:
    """Serve until a signal, or until the engine dies. Returns the exit code.

    uvicorn_options: host, port, TLS and more, as `uvicorn.Config` takes them. Closes the engine.
    """
    state = ServerState(llm, options)
    config = uvicorn.Config(
        build_app(state),
        log_config=None,
        access_log=False,
        # Time for the aborted answers to be written.
        timeout_graceful_shutdown=int(options.drain_seconds + LAST_WORDS) + 1,
        **uvicorn_options,
    )
    server = Server(config, state)
    # What is loaded by now stays. Python would look through it for garbage every now and then,
    # which takes 0.1 s, and every client would wait.
    gc.collect()
    gc.freeze()
    # uvicorn raises a signal once more after its end; by then all is done, and the exit code is 0.
    before = {sig: signal.signal(sig, _ignore) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    except SystemExit:
        # uvicorn has said why it cannot listen.
        return 1
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
        llm.shutdown()
    if llm.errored or not server.started:
        return 1
    return 0


def _ignore(sig: int, frame: Any) -> None:
    """A handler, and not SIG_IGN, which child processes would inherit."""
