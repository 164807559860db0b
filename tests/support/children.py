"""Run answers in forked children of one process per chapter.

The process has already imported torch and run the chapter's given cells. It is a process of its
own, not a fork of pytest, for two reasons. It computes on one thread from the start, because
OpenMP's other threads do not survive a fork. And it sets TRITON_INTERPRET before anything imports
triton.
"""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import pickle
import select
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

# Seconds that one answer may take: many times what it takes on a quiet machine.
LIMIT = 150


class Children:
    """The process of one chapter. Close it, or use `with`.

    setup: the chapter's given cells before the first statement. RuntimeError where they fail.
    """

    def __init__(self, setup: list[str], chapter: str, folder: Path) -> None:
        if not hasattr(os, "fork"):
            import pytest

            pytest.skip("answers run in forked processes, which this system does not have")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__], cwd=folder, env=environment, **pipes
        )
        self._ask({"setup": setup, "chapter": chapter})

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def run(self, *cells: str, limit: int = LIMIT) -> dict[str, Any]:
        """Execute cells one after the other in a child.

        Returns {"raised": the type of a cell's exception, or None; "cell": the number of that cell;
        "name": the name of a Mistake; "message"; "printed": what the last cell printed}.
        """
        return self._ask({"cells": cells, "limit": limit})

    def warm(self, *cells: str) -> dict[str, Any]:
        """`run`, but in the process itself: each child then has the checks' cached results."""
        return self._ask({"warm": cells})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                "the process that runs the answers has ended; its error output stands above"
            )
        answer = json.loads(line)
        if "setup_failed" in answer:
            raise RuntimeError(f"the chapter's given cells failed:\n{answer['setup_failed']}")
        return answer


def execute(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute a cell, and register its lines with `linecache`.

    Triton reads the lines of a function again to compile it as a kernel.
    """
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


def run_cells(cells: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    from minivllm.course.grading.errors import Mistake

    result: dict[str, Any] = {
        "raised": None,
        "cell": None,
        "name": None,
        "message": "",
        "printed": "",
    }
    for number, source in enumerate(cells):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                execute(source, f"<cell {number}>", namespace)
        except BaseException as error:
            name = error.name if isinstance(error, Mistake) else None
            return result | {
                "raised": type(error).__name__,
                "cell": number,
                "name": name,
                "message": str(error),
            }
        result["printed"] = printed.getvalue().strip()
    return result


def run_forked(cells: list[str], limit: int, namespace: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        sys.stdin, code = None, 1
        try:
            known, before = set(diagnosing().suspected), set(diagnosing().given)
            result = json.dumps(run_cells(cells, namespace)).encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(result + b"\n" + packed_runs(known, before))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        written, left = b"", True
        while left and select.select([pipe], [], [], limit)[0]:
            left = os.read(pipe.fileno(), 1 << 16)
            written += left
    if left:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if left or code:
        why = f"ran for more than {limit} s" if left else f"ended the process: exit code {code}"
        return {
            "raised": "TimeoutError" if left else "ProcessEnded",
            "cell": None,
            "name": None,
            "message": why,
            "printed": "",
        }
    result, _, packed = written.partition(b"\n")
    for key, run in pickle.loads(packed).items():
        diagnosing().given[key] = pickle.loads(run)
    return json.loads(result)


def packed_runs(known: set[int], before: set[tuple[int, bytes]]) -> bytes:
    """What suspects have given in this child, for its parent. known: the parent's suspects.

    before: of which runs the parent knows. See `minivllm.course.grading.diagnose.given`.
    """
    packed = {}
    if known <= diagnosing().suspected.keys():
        for key, run in diagnosing().given.items():
            if key[0] in known and key not in before:
                with contextlib.suppress(Exception):
                    pickle.loads(text := pickle.dumps(run))
                    packed[key] = text
    return pickle.dumps(packed)


def diagnosing() -> Any:
    from minivllm.course.grading import diagnose

    return diagnose


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    # Output that bypasses Python's sys.stdout goes to stderr.
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line in sys.stdin:
        request = json.loads(line)
        if "setup" in request:
            try:
                preload(request["chapter"])
                for number, source in enumerate(request["setup"]):
                    execute(source, f"<given cell {number}>", namespace)
                answer = {}
            except Exception:
                answer = {"setup_failed": traceback.format_exc()}
        elif "warm" in request:
            answer = run_cells(request["warm"], dict(namespace))
        else:
            answer = run_forked(request["cells"], request["limit"], namespace)
        print(json.dumps(answer), file=answers, flush=True)


def preload(chapter: str) -> None:
    """Import what the checks need, and compute once what they compare with."""
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401
    import minivllm.llm  # noqa: F401
    from minivllm.course.grading.exercise import modules
    from minivllm.course.grading.with_engine import engine_tokens

    found = [vars(import_module(name)) for name in modules(chapter).values()]
    if any("engine_agrees" in names for names in found):
        engine_tokens()


if __name__ == "__main__":
    main()
