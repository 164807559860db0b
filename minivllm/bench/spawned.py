"""A server of our own for the time of a measurement: `minivllm serve` on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minivllm.bench.report import say
from minivllm.errors import ConfigError

#: Seconds that the server may take to end.
_PATIENCE = 15.0
#: A process that ends the server when its stdin ends, so when this process has ended, however.
_WATCH = "import os, signal, sys; sys.stdin.read(); os.kill(int(sys.argv[1]), signal.SIGTERM)"


@contextlib.contextmanager
def spawned(
    model: str | None,
    engine: Sequence[str] = (),
    *,
    flags: Sequence[str] = (),
    key: str | None = None,
    start_seconds: float = 1800.0,
) -> Iterator[str]:
    """The address of a server that runs until the context ends.

    engine: options as "block_size=16". flags: of the command, as "--max-queue=8". key: what clients
    must send. start_seconds: how long it may take to answer. Raises `ConfigError` with the end of
    its log where it does not start.
    """
    command = [sys.executable, "-m", "minivllm", "serve", *([model] if model else [])]
    command += [
        "--port=0",
        "--drain-seconds=1",
        *(f"--engine={option}" for option in engine),
        *flags,
    ]
    # Not among the arguments, which every user of the machine can read.
    environment = {**os.environ, **({"MINIVLLM_API_KEY": key} if key else {})}
    with tempfile.TemporaryDirectory() as folder, _ended_by_sigterm():
        log = Path(folder) / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        watch = subprocess.Popen(
            [sys.executable, "-I", "-c", _WATCH, str(process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            say("serve: the server starts")
            yield _address(process, log, time.monotonic() + start_seconds)
        finally:
            # First: once the server has ended, its number may be another process's.
            watch.kill()
            watch.communicate()
            _end(process)


def _address(process: subprocess.Popen[bytes], log: Path, deadline: float) -> str:
    """The server's address, as soon as it listens."""
    while True:
        said = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"running on (https?://[\d.]+:\d+)", said):
            return found[1]
        last = " ".join(said.split())[-600:] or "it said nothing"
        if process.poll() is not None:
            raise ConfigError(f"The server did not start (exit code {process.returncode}): {last}")
        if time.monotonic() > deadline:
            raise ConfigError(f"The server does not answer; its last words: {last}")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as an exception does, so that it does not leave the server."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
