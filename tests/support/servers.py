"""Servers of the tests: on loopback, on a free port, ended by their own handle."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from minivllm.serving.app import build_app
from minivllm.serving.async_llm import AsyncLLM
from minivllm.serving.server import Server
from minivllm.serving.state import ServerOptions, ServerState

#: Seconds that a server may take to start, or to end, on a busy machine.
PATIENCE = 60.0


@dataclass
class Running:
    """A server in a thread of the tests. client: for its address."""

    address: str
    state: ServerState
    client: httpx.Client

    def is_idle(self) -> bool:
        """Whether the engine soon has no request and all its blocks."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            stats = self.state.llm.stats
            if not self.state.llm.num_unfinished and not stats.num_running:
                return stats.counters.num_used_kv_blocks == 0
            time.sleep(0.02)
        return False


@contextlib.contextmanager
def server(options: ServerOptions | None = None, **engine: Any) -> Iterator[Running]:
    """A server of the bundled model in a thread, its core in another."""
    llm = AsyncLLM(core="thread", **{"device": "cpu", "num_kv_blocks": 256, **engine})
    state = ServerState(llm, options or ServerOptions())
    config = uvicorn.Config(build_app(state), port=0, log_config=None, access_log=False)
    made = Server(config, state)
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: made.started)
        port = made.servers[0].sockets[0].getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=address, timeout=PATIENCE) as client:
            yield Running(address, state, client)
    finally:
        made.should_exit = made.force_exit = True
        thread.join(PATIENCE)
        llm.shutdown()
    assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = PATIENCE) -> None:
    """Return as soon as the condition is true; AssertionError after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@dataclass
class Command:
    """`minivllm serve` as a process of its own."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def end(self, sig: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(sig)
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def command(folder: Path, *arguments: str, **environment: str) -> Iterator[Command]:
    """`minivllm serve` with these arguments, once it answers. folder: for its log."""
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "minivllm", "serve", "--port=0", "-edevice=cpu", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    try:
        found: list[str] = []

        def is_up() -> bool:
            said = log.read_text(errors="replace")
            assert process.poll() is None, said
            found[:] = re.findall(r"running on (https?://[\d.]+:\d+)", said)
            return bool(found)

        wait_for(is_up)
        yield Command(process, found[0], log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
