"""Where the engine's core runs: in a process of its own, or in a thread of this one.

Both speak the messages of wire.py and serve a `CoreLoop`. A process has its own interpreter lock:
an event loop that writes to hundreds of clients then takes no time from the steps. A thread starts
faster, shares memory, and takes parts of your own (`EnginePieces`).
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Protocol

from minivllm import errors
from minivllm.config import EngineConfig
from minivllm.engine.engine_core import EnginePieces
from minivllm.engine.llm_engine import LLMEngine
from minivllm.pipes import read_frame, write_frame
from minivllm.serving import wire
from minivllm.serving.core_loop import CoreLoop

#: Seconds that a core may take to end after a `Close`, and then after each signal.
GRACE = 10.0

Receive = Callable[[Any], None]


class Core(Protocol):
    """A running core. `receive`, given at its start, gets its messages in a thread of its own."""

    @property
    def started(self) -> wire.Started:
        """What it said when it was ready."""

    @property
    def engines(self) -> dict[str, wire.Stats]:
        """The state of each engine by its name, where there are several; else empty."""

    async def refresh(self) -> None:
        """Ask engines elsewhere for their state. A core with one engine has it from each step."""

    def send(self, message: Any) -> None:
        """Pass a message to the core. Never waits, and does nothing if the core has ended."""

    def close(self) -> None:
        """End the core, and wait for its end."""


def error_of(failed: wire.Failed) -> errors.MiniVLLMError:
    """The error that a core has reported, of its own type where minivllm has it."""
    kind = getattr(errors, failed.kind, errors.EngineEndedError)
    error: errors.MiniVLLMError = kind.__new__(kind, failed.message)
    error.args = (failed.message,)
    return error


def describe(error: BaseException) -> wire.Failed:
    """An error as a message."""
    if isinstance(error, errors.MiniVLLMError):
        return wire.Failed(type(error).__name__, str(error))
    return wire.Failed(
        "EngineEndedError", f"The engine's core has failed: {type(error).__name__}: {error}"
    )


class ThreadCore:
    """A core in a thread of this process. Raises what `LLMEngine` raises."""

    def __init__(
        self, model: str | None, config: EngineConfig, pieces: EnginePieces, receive: Receive
    ) -> None:
        self.engines: dict[str, wire.Stats] = {}
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._engine = LLMEngine(model, config=config, pieces=pieces)
        loop = CoreLoop(self._engine, self._inbox, receive)
        self.started = loop.started()
        self._thread = threading.Thread(
            target=self._run, args=(loop, receive), name="minivllm core", daemon=True
        )
        self._thread.start()

    def _run(self, loop: CoreLoop, receive: Receive) -> None:
        try:
            loop.run()
        except BaseException as error:
            receive(describe(error))
        finally:
            self._engine.close()

    async def refresh(self) -> None:
        return

    def send(self, message: Any) -> None:
        self._inbox.put(message)

    def close(self) -> None:
        self.send(wire.Close())
        if threading.current_thread() is not self._thread:
            self._thread.join(GRACE)


class ProcessCore:
    """A core in a process of its own, which ends with this one.

    Raises the error with which the core could not start, and `EngineEndedError` if it died.
    """

    def __init__(self, model: str | None, config: EngineConfig, receive: Receive) -> None:
        self.engines: dict[str, wire.Stats] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minivllm.serving.core_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C in a terminal goes to this process, which decides when the core ends.
            start_new_session=True,
        )
        self._receive = receive
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._is_closing = False
        self._outbox.put((model, config))
        threading.Thread(target=self._write, name="to the core", daemon=True).start()
        first = self._read()
        if not isinstance(first, wire.Started):
            self.close()
            raise error_of(first or self._death())
        self.started = first
        threading.Thread(target=self._read_all, name="from the core", daemon=True).start()

    @property
    def pid(self) -> int:
        """The id of the core's process."""
        return self._process.pid

    async def refresh(self) -> None:
        return

    def send(self, message: Any) -> None:
        self._outbox.put(message)

    def close(self) -> None:
        self._is_closing = True
        self.send(wire.Close())
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            try:
                self._process.wait(GRACE)
                break
            except subprocess.TimeoutExpired:
                continue
        self.send(None)

    def _write(self) -> None:
        """Send what `send` was given, in a thread: a full pipe must not stop the event loop."""
        stream = self._process.stdin
        assert stream is not None
        with contextlib.suppress(OSError, ValueError), stream:
            while (message := self._outbox.get()) is not None:
                write_frame(stream, pickle.dumps(message))

    def _read(self) -> Any:
        """The next message; None at the end of the process."""
        assert self._process.stdout is not None
        frame = read_frame(self._process.stdout)
        return None if frame is None else pickle.loads(frame)

    def _read_all(self) -> None:
        while (message := self._read()) is not None:
            self._receive(message)
            if isinstance(message, wire.Failed):
                return
        if not self._is_closing:
            self._receive(self._death())

    def _death(self) -> wire.Failed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return wire.Failed("EngineEndedError", f"The engine's core has died ({how}).")
