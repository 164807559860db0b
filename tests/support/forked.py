"""The capstone's worker as a fork of a process that has already imported everything.

A test then does not wait for the imports. `python forked.py ADDRESS` listens on a Unix socket and
forks for every connection. The child does what the command's worker does,
`minivllm.course.grading.capstone.worker.main`, with the connection as its standard input and
output.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Server:
    """The process that forks. Close it, or use `with`.

    start: replaces `examine.start`.
    """

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "forks")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, self.address], env=environment
        )
        while not Path(self.address).exists():
            if self.process.poll() is not None:
                raise RuntimeError(
                    "the process that forks has ended; its error output stands above"
                )
            time.sleep(0.05)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def start(self, _: Path) -> Worker:
        return Worker(self.address)


class Worker:
    """What `examine.work` uses of a `subprocess.Popen`: stdin and stdout, kill and wait."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self.stdout = self._socket.makefile("r", encoding="utf-8")
        self._pid, self.stdin = int(self.stdout.readline()), self

    def write(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        self._socket.close()


def main(address: str) -> None:
    from minivllm.course.grading.capstone import requests, worker
    from minivllm.course.grading.capstone.pieces import PIECES
    from minivllm.course.notebooks import chapters, role

    worker.package_run = functools.cache(worker.package_run)
    for round in requests.ROUNDS:
        worker.package_run(round)
    with contextlib.redirect_stdout(io.StringIO()):
        # Afterwards, the modules that the solutions import are loaded.
        for chapter in chapters(Path(__file__).resolve().parents[2]):
            if chapter.number in {piece.chapter for piece in PIECES}:
                first = next(cell for cell in chapter.solution.cells if cell.cell_type == "code")
                assert role(first)[0] == "given"
                exec(compile(first.source, chapter.name, "exec"), {"__name__": "__main__"})

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a child ended
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        os.rename(f"{address}.new", address)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                connection.sendall(f"{os.getpid()}\n".encode())
                os.dup2(connection.fileno(), 0)
                os.dup2(connection.fileno(), 1)
                connection.close()
                sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
                try:
                    worker.main()
                finally:
                    os._exit(0)
            connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
