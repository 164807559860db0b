"""Run a grafted notebook in a kernel, and yield a verdict on each exercise, in bounded time.

`minivllm check` and `pytest --nbval` on an exercise both use this. nbval's own run does not fit: it
would also compare what the answers print, and it waits two minutes for a kernel that has died.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from minivllm.course.grading.graft import Cell, Group
from minivllm.course.grading.next_step import GRADED_RUN
from minivllm.course.notebooks import JupyterMissingError
from minivllm.course.stubs import names_in

PASSED = "passed"
FAILED = "failed"
NOT_ATTEMPTED = "not attempted"
NOT_RUNNABLE = "not runnable here"
#: Seconds that a cell may take, and seconds that it has to end after an interrupt.
CELL_TIMEOUT, GRACE = 120.0, 5.0
MAX_OUTPUT = 100_000
#: Mistakes of the file, not of the answer: no hint is about them.
NOT_ABOUT_THE_ANSWER = ("syntax-error", "answer-missing", "process-ended", "no-verdict")
_HINTS = "The hints are in the notebook, under the statement of the exercise."
_ANSI = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class Verdict:
    """The result of an exercise.

    name: the mistake's name, when the exercise failed. notes: what else the learner should know
    about the file.
    """

    id: str
    state: str
    name: str = ""
    message: str = ""
    notes: tuple[str, ...] = ()

    @property
    def hinted(self) -> bool:
        """Whether one of the exercise's hints may help."""
        return self.state == FAILED and self.name not in NOT_ABOUT_THE_ANSWER

    @property
    def headline(self) -> str:
        return f"{self.id} {self.state}" + (f": {self.name}" if self.name else "")


@dataclass
class Result:
    """The result of a cell.

    error: (exception's name, message, traceback). ended: why there is no kernel any more.
    """

    printed: str = ""
    error: tuple[str, str, str] | None = None
    timed_out: bool = False
    ended: str = ""


class JupyterKernel:
    """A Jupyter kernel of this Python, running in folder.

    JupyterMissingError where it cannot start.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from ipykernel.kernelspec import RESOURCES, get_kernel_dict
            from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
            from jupyter_client.manager import KernelManager
        except ImportError as error:
            raise JupyterMissingError(
                f"Checking runs a notebook, which needs Jupyter ({error}): make lab"
            ) from error

        class ThisPython(KernelSpecManager):
            def get_kernel_spec(self, _: str) -> KernelSpec:
                return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())

        self._manager = KernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())
        self._manager.start_kernel(
            cwd=str(folder),
            env={**os.environ, GRADED_RUN: "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._client = self._manager.client()
        self._client.start_channels()
        try:
            self._client.wait_for_ready(timeout=60)
        except RuntimeError as error:
            self.close()
            raise JupyterMissingError(f"The Jupyter kernel does not start: {error}") from error

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def execute(self, source: str, timeout: float = CELL_TIMEOUT) -> Result:
        """Execute a cell; returns after timeout + `GRACE` seconds at the latest.

        After a result with `ended`, call `close`.
        """
        from queue import Empty

        message = self._client.execute(source, allow_stdin=False, stop_on_error=False)
        result, deadline = Result(), time.monotonic() + timeout
        while True:
            try:
                reply = self._client.get_iopub_msg(timeout=0.2)
            except Empty:
                if not self._manager.is_alive():
                    result.ended = "the Python process ended (exit(), a crash, or out of memory)"
                    return result
            else:
                if reply["parent_header"].get("msg_id") == message and _take(reply, result):
                    break
            if time.monotonic() > deadline:
                if result.timed_out:
                    result.ended = "it could not be interrupted"
                    return result
                result.timed_out, deadline = True, time.monotonic() + GRACE
                self._manager.interrupt_kernel()
        try:
            while (reply := self._client.get_shell_msg(timeout=GRACE))["parent_header"].get(
                "msg_id"
            ) != message:
                pass
        except Empty:
            return result
        if any(part.get("source") == "ask_exit" for part in reply["content"].get("payload", [])):
            result.ended = "it calls exit(), which ends the Python process"
        return result


def _take(reply: dict[str, Any], result: Result) -> bool:
    """Add a message of the kernel to the result. Returns whether it was the last message."""
    content = reply["content"]
    if reply["msg_type"] == "stream" and content["name"] == "stdout":
        result.printed = (result.printed + content["text"])[-MAX_OUTPUT:]
    elif reply["msg_type"] == "error":
        result.error = (
            content["ename"],
            content["evalue"],
            _ANSI.sub("", "\n".join(content["traceback"])),
        )
    return reply["msg_type"] == "status" and content["execution_state"] == "idle"


# --- in the kernel --------------------------------------------------------------------------------

_given: dict[str, Any] = {}


def remember(namespace: dict[str, Any], names: list[str]) -> None:
    """Store the values that given cells bound to these names."""
    _given.update({name: namespace[name] for name in names if name in namespace})


def restore(namespace: dict[str, Any], names: list[str]) -> None:
    """Bind the names to the stored values again.

    Print the names of functions and modules that had been bound to something else.
    """
    for name in sorted(_given.keys() & set(names)):
        given = _given[name]
        if namespace.get(name, given) is not given and isinstance(
            given, ModuleType | FunctionType | type
        ):
            print(name)
        namespace[name] = given


def _hidden(call: str, names: Collection[str]) -> str:
    module = "__import__('minivllm.course.grading.runner').course.grading.runner"
    return f"{module}.{call}(globals(), {sorted(names)!r})"


# --- verdicts -------------------------------------------------------------------------------------


def verdicts(
    groups: list[Group],
    folder: Path,
    ids: Collection[str] | None = None,
    timeout: float = CELL_TIMEOUT,
) -> Iterator[Verdict]:
    """Run the groups of a `graft`, and yield a verdict on each exercise as soon as it is known.

    ids: the exercises to judge; None for all. folder: the working directory, as for a notebook in
    it. timeout: seconds per cell. After an exercise that ends the kernel, the next one gets a fresh
    kernel. The learner's code for an exercise that is not judged runs before the next judged one,
    which may use it. Closing the iterator closes the kernel.
    """
    setup, *exercises = groups
    kernel: JupyterKernel | None = None
    # What the learner wrote for the earlier exercises, without those that ended a kernel.
    earlier: list[Cell] = []
    # The cells of `earlier` that this kernel has not run yet.
    waiting: list[Cell] = []
    # What the learner should know about the cells before the first exercise.
    notes: tuple[str, ...] = ()
    told = False
    try:
        for group in exercises:
            theirs = [
                Cell("own", cell.source) for cell in group.cells if cell.kind in ("answer", "own")
            ]
            judged = ids is None or group.id in ids
            if not judged or group.broken or group.untouched:
                if judged and group.broken:
                    name, why = group.broken
                    yield Verdict(group.id, FAILED, name, f"{why}\n{_HINTS}", tuple(group.notes))
                elif judged:
                    yield Verdict(group.id, NOT_ATTEMPTED, notes=tuple(group.notes))
                waiting, earlier = waiting + theirs, earlier + theirs
                continue
            ended = False
            if kernel is None:
                kernel = JupyterKernel(folder)
                verdict, ended = _run(kernel, setup, timeout)
                notes, waiting = () if told else verdict.notes, earlier
            if not ended:
                verdict, ended = _run(
                    kernel, replace(group, cells=[*waiting, *group.cells]), timeout, notes
                )
            yield replace(verdict, id=group.id)
            if verdict.state != PASSED:
                notes, told = (), True
            waiting = []
            if ended:
                kernel.close()
                kernel = None
            else:
                earlier = earlier + theirs
    finally:
        if kernel is not None:
            kernel.close()


_WHAT = {
    "answer": "your answer",
    "own": "a cell of yours",
    "check": "its check",
    "given": "a given cell",
}


def _run(
    kernel: JupyterKernel, group: Group, timeout: float, notes: tuple[str, ...] = ()
) -> tuple[Verdict, bool]:
    """Run a group. Returns the verdict on it, and whether the kernel has ended.

    The results of the learner's own cells do not change the verdict.
    """
    verdict = Verdict(group.id, FAILED, "no-verdict", "Its check did not run.")
    trouble = None
    warnings = list(notes)
    # Exceptions of given cells; not shown when a check has said what is wrong.
    given: list[str] = []
    for cell in group.cells:
        if cell.kind == "check":
            taken = kernel.execute(_hidden("restore", names_in(cell.source))).printed.split()
            warnings += [
                f"Your cells redefine `{name}`; the check used the original." for name in taken
            ]
        result = kernel.execute(cell.source, timeout)
        if result.timed_out or result.ended:
            what = _cut_short(cell, result, timeout)
            if cell.kind != "own":
                name = "endless" if result.timed_out else "process-ended"
                verdict = Verdict(group.id, FAILED, name, what)
            elif result.ended and verdict.name == "no-verdict":
                verdict = replace(verdict, name="process-ended", message=what)
            else:
                warnings.append(what)
            if cell.kind != "own" or result.ended:
                return replace(verdict, notes=(*group.notes, *warnings)), bool(result.ended)
        elif cell.kind == "check":
            verdict = _judge(group, result, trouble)
        elif cell.kind == "given" and not result.error:
            kernel.execute(_hidden("remember", names_in(cell.source, ast.Store)))
        elif result.error and cell.kind == "answer":
            trouble = trouble or result
        elif result.error:
            said = f"{_WHAT[cell.kind].capitalize()} raises {_error(result)}"
            (given if cell.kind == "given" else warnings).append(said)
    if verdict.name == "no-verdict" or verdict.message.startswith(_BROKEN):
        warnings += given
    return (
        replace(verdict, notes=(*group.notes, *(warnings if verdict.state != PASSED else ()))),
        False,
    )


def _cut_short(cell: Cell, result: Result, timeout: float) -> str:
    """The message about a cell that took too long, or in which the process ended."""
    why = result.ended or f"it still ran after {timeout:g} seconds, and was interrupted"
    what = f"While {_WHAT[cell.kind]} ran: {why}."
    return what if result.timed_out else f"{what}\n{_what_to_do(why)}"


def _what_to_do(why: str) -> str:
    """Advice after a process has ended."""
    if "exit()" in why:
        return f"Remove that call, and check again. {_HINTS}"
    return (
        "A process ends without an error when a kernel writes beyond a tensor (does each store"
        f" have a mask?), or when memory runs out. Try it on smaller inputs. {_HINTS}"
    )


_BROKEN = "The check raises"


def _judge(group: Group, result: Result, trouble: Result | None) -> Verdict:
    """The verdict that follows from the result of the check.

    trouble: the exception from the answer's cell.
    """
    if trouble is not None and trouble.error[0] in ("SyntaxError", "IndentationError", "TabError"):
        what = (
            "Python cannot read the cell of your answer, so none of it ran. It raises"
            f" {_error(trouble)}"
        )
        return Verdict(
            group.id,
            FAILED,
            "syntax-error",
            f"{what}\nCorrect that line, and check again. {_HINTS}",
        )
    if trouble is not None:
        return Verdict(
            group.id, FAILED, "raised", f"The cell of your answer raises {_error(trouble)}"
        )
    if result.error is None:
        if group.printed and result.printed.strip().endswith(group.printed):
            return Verdict(group.id, PASSED, message=group.printed)
        why = (
            "Its check ran, but its line was not printed: does a cell of yours change print or"
            " sys.stdout?"
        )
        return Verdict(group.id, FAILED, "no-verdict", why)
    kind, text, _ = result.error
    if kind == "Mistake":
        name, _, message = text.partition("\n")
        return Verdict(group.id, FAILED, name, message)
    if kind in ("NotAttempted", "NotRunnableHere"):
        return Verdict(
            group.id,
            {"NotAttempted": NOT_ATTEMPTED, "NotRunnableHere": NOT_RUNNABLE}[kind],
            message=text,
        )
    return Verdict(group.id, FAILED, "raised", f"{_BROKEN} {_error(result)}")


def _error(result: Result) -> str:
    """An exception in one or two lines: its message, and the line of the cell that raised it."""
    kind, text, trace = result.error
    where = re.search(r"^-+> (\d+) (.*)$", trace, re.MULTILINE)
    text = re.sub(r"\(\S+\.py, line (\d+)\)", r"(line \1)", text)
    return f"{kind}: {text}" + (f"\nline {where[1]}: {where[2].strip()}" if where else "")
