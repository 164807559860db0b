"""Run a check in a child process, so that a crash of the answer is a verdict and not the end."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

from minivllm.course.grading import errors
from minivllm.course.grading.errors import CheckError, Mistake
from minivllm.course.grading.guard import BEYOND

#: Seconds that a child may take. After them the check runs in this process.
LIMIT = 100.0


def isolated(judge: Callable[[], Any]) -> Any:
    """judge(), run in a fork of this process; its result, or the CheckError that it raised.

    Mistake("crashed") where the fork was ended by a signal such as a segmentation fault. Triton's
    interpreter writes through raw addresses, so a store far outside of a tensor ends Python; in
    Jupyter that is a kernel that dies without a word. Without `os.fork`, or where the compiled
    kernels of a GPU run, judge() runs in this process.
    """
    if not hasattr(os, "fork") or os.environ.get("TRITON_INTERPRET") != "1":
        return judge()
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_in_child(judge, writing)
    os.close(writing)
    try:
        written, late = _read(reading)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if late:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if late or (not written and code >= 0):
        return judge()
    if not written:
        raise Mistake(
            "crashed",
            f"Your kernel ended the Python process ({signal.Signals(-code).name}). It probably"
            f" wrote or read far outside of a tensor.\n{BEYOND}",
        )
    kind, value = pickle.loads(written)
    if kind == "result":
        return value
    raise value


def _run_in_child(judge: Callable[[], Any], writing: int) -> None:
    """Run judge, send what came out, and end this process."""
    try:
        # After a fork only one thread is left, so the thread pools of the parent must not be used.
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        try:
            answer = ("result", judge())
        except CheckError as error:
            answer = ("error", error)
        except Exception as error:
            stub = next(
                (c for c in errors.causes(error) if isinstance(c, NotImplementedError)), None
            )
            answer = ("error", stub or errors.raised(error))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
    finally:
        os._exit(0)


def _read(reading: int) -> tuple[bytes, bool]:
    """What the child sent, and whether it took longer than `LIMIT`."""
    written = b""
    with os.fdopen(reading, "rb") as pipe:
        while select.select([pipe], [], [], LIMIT)[0]:
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                return written, False
            written += part
    return written, True
