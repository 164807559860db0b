"""Collect a learner's answers, have a worker run them, and find the piece that is wrong."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.capstone.pieces import PIECES, Piece
from minivllm.course.grading.capstone.requests import ROUNDS
from minivllm.course.grading.capstone.speed import Speed
from minivllm.course.grading.capstone.standing import homes, states
from minivllm.course.grading.records import PASSED, Records
from minivllm.course.notebooks import CourseNotFoundError, chapters

if TYPE_CHECKING:
    from minivllm.course.grading.graft import Group


@dataclass
class Finding:
    """A fault of one piece.

    name: like the name of a `Mistake`. piece: "" where the fault cannot be attributed to one piece.
    """

    piece: str
    name: str
    message: str


@dataclass
class Report:
    """The result of the capstone.

    found: the exercise of each piece, by its answer's name. lines: how many lines each piece's
    answer has. calls: the number of calls of each piece in the runs that show that it is right.
    round: the number of the round that ran last. stats: the scheduler's counters. speed: the
    speeds, measured when everything is right. text: the answer to `QUESTION`.
    """

    found: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    round: int = 0
    num_tokens: int = 0
    stats: dict[str, int] = field(default_factory=dict)
    speed: Speed | None = None
    text: str = ""

    @property
    def passed(self) -> bool:
        return not self.problems and bool(self.num_tokens)


def examine(root: Path, timeout: float = 60.0, rounds: int = len(ROUNDS)) -> Report:
    """Run the capstone on the exercises in root.

    timeout: seconds for each part. rounds: how many of `ROUNDS` to serve. ChangedSolutionError
    where a solution differs from the published one.
    """
    report = Report()
    cells = collect(root, report)
    if report.problems:
        return report
    job = {"cells": cells, "found": report.found}
    folder = root / "exercises"
    for event in work({**job, "task": "together", "rounds": rounds}, folder, timeout):
        _take(event, report)
    if not report.problems:
        report.problems += _own_checks(root, report, timeout)
        return report
    if any(finding.piece for finding in report.problems):
        return report
    report.problems, trouble = [], report.problems
    _find_out_which({**job, "round": report.round}, folder, timeout, report)
    report.problems = report.problems or trouble
    return report


def reward(
    root: Path, report: Report, on_text: Callable[[str], None], timeout: float = 60.0
) -> None:
    """Measure how fast the engine of a report that passed is, and let it answer `QUESTION`.

    on_text: gets each new part of the answer's text as it comes. The results go to the report.
    """
    job = {"cells": collect(root, Report()), "found": report.found, "task": "reward"}
    for event in work(job, root / "exercises", timeout):
        _take(event, report)
        if "text" in event:
            on_text(event["text"])


def _own_checks(root: Path, report: Report, timeout: float) -> list[Finding]:
    """Run the exercise checks of the answers that have not passed them yet, and return the faults.

    The verdicts are saved.
    """
    from minivllm.course.grading.graft import graft
    from minivllm.course.grading.runner import FAILED, NOT_RUNNABLE, verdicts

    records, problems = Records(root), []
    passed = states(root, records)
    for chapter in chapters(root):
        ids = {
            id for id in report.found.values() if id[:2] == chapter.number and passed[id] != PASSED
        }
        if not ids:
            continue
        groups = graft(chapter.exercises, chapter)
        by_id = {group.id: group for group in groups}
        for verdict in verdicts(groups, chapter.exercises.parent, ids, timeout):
            records.note(by_id[verdict.id], verdict)
            pieces = [piece for piece, id in report.found.items() if id == verdict.id]
            why = (
                f"The tokens are right, but the piece's own check, {verdict.id}, finds a mistake:"
                f" {verdict.message}"
            )
            if verdict.state == FAILED:
                problems += [Finding(piece, verdict.name, why) for piece in pieces]
            elif verdict.state == NOT_RUNNABLE:
                report.notes.append(
                    f"The check of {verdict.id} cannot run on this machine: {verdict.message}"
                )
    with contextlib.suppress(OSError):
        records.save()
    return problems


def _find_out_which(job: dict[str, Any], folder: Path, timeout: float, report: Report) -> None:
    """Run each piece alone in the package's engine, to find the piece that is wrong.

    If each works alone, run all pieces but one, for every piece.
    """
    for task in ("alone", "without"):
        left = [piece.answer for piece in PIECES]
        while left:
            events = list(work({**job, "task": task, "pieces": left}, folder, timeout))
            for event in events:
                _take(event, report)
            last = next((event["piece"] for event in reversed(events) if "piece" in event), left[0])
            done = left.index(last) + 1 if last in left else len(left)
            left = left[done:] if any("ended" in event for event in events) else []
        if report.problems:
            return


def collect(root: Path, report: Report) -> dict[str, list[tuple[str, str, str]]]:
    """Collect the cells that have to run for the pieces.

    Returns chapter -> (exercise's id, kind, source). Problems go to the report.
    """
    from minivllm.course.grading.graft import graft

    known, home, cells = {chapter.number: chapter for chapter in chapters(root)}, homes(root), {}
    for number in dict.fromkeys(piece.chapter for piece in PIECES):
        pieces = [piece for piece in PIECES if piece.chapter == number]
        try:
            chapter = known[number]
            groups = graft(chapter.exercises, chapter)
        except (KeyError, CourseNotFoundError) as error:
            why = (
                str(error)
                if isinstance(error, CourseNotFoundError)
                else f"There is no chapter {number} here."
            )
            report.problems += [Finding(piece.answer, "missing", why) for piece in pieces]
            continue
        by_id = {group.id: group for group in groups}
        for piece in pieces:
            report.found[piece.answer] = id = home[piece.answer]
            report.lines[piece.answer] = _num_lines(by_id[id], piece.answer)
            if by_id[id].broken:
                report.problems.append(Finding(piece.answer, *by_id[id].broken))
            elif by_id[id].untouched:
                report.problems.append(not_written(piece, id))
        # Pictures and checks are left out. The answers to other exercises stay, because these
        # answers may use them.
        cells[number] = [
            (group.id, cell.kind, cell.source)
            for group in groups
            for cell in group.cells
            if cell.kind in (("given", "own") if not group.id else ("answer", "own"))
        ]
    return cells


def _num_lines(group: Group, name: str) -> int:
    """How many lines of code the definition of a name has, without blank lines and comments."""
    for cell in group.cells:
        with contextlib.suppress(SyntaxError):
            for node in ast.parse(cell.source).body if cell.kind == "answer" else ():
                if getattr(node, "name", "") == name:
                    lines = (ast.get_source_segment(cell.source, node) or "").splitlines()
                    return sum(line.strip()[:1] not in ("", "#") for line in lines)
    return 0


def not_written(piece: Piece, id: str) -> Finding:
    why = (
        f"{piece.answer} is still to write: exercise {id}. `minivllm check {id}` checks it by"
        " itself."
    )
    return Finding(piece.answer, "not-attempted", why)


def _take(event: dict[str, Any], report: Report) -> None:
    """Add an event of the worker to the report."""
    if "problem" in event:
        report.problems.append(Finding(**event["problem"]))
    elif "ended" in event:
        piece, id = event.get("piece", ""), report.found.get(event.get("piece", ""), "")
        where = (
            f"With {piece} ({id}) alone in the package's engine"
            if piece
            else "With all of your pieces together"
        )
        report.problems.append(Finding(piece, event["name"], f"{where}: {event['ended']}."))
    elif "note" in event:
        report.notes.append(event["note"])
    elif "calls" in event:
        report.calls |= event["calls"]
    elif "round" in event:
        report.round = event["round"]
    elif "speed" in event:
        report.speed = Speed(**event["speed"])
    elif "text" in event:
        report.text += event["text"]
    elif "result" in event:
        report.num_tokens, report.stats = event["result"]["num_tokens"], event["result"]["stats"]


def start(folder: Path) -> subprocess.Popen:
    """Start a worker in folder.

    The worker reads its job from stdin and answers on stdout.
    """
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUTF8": "1",
    }
    paths = [str(Path(__file__).resolve().parents[4]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, "-m", "minivllm.course.grading.capstone.worker"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )


def work(job: dict[str, Any], folder: Path, timeout: float) -> Iterator[dict[str, Any]]:
    """Yield the worker's events as they arrive.

    A worker that is silent for longer than timeout is ended; the last event is then {"ended": why}.
    """
    process = start(folder)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        # The pipe is closed.
        with contextlib.suppress(ValueError):
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    piece: dict[str, str] = {}
    try:
        threading.Thread(target=read, daemon=True).start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        while True:
            try:
                line = lines.get(timeout=timeout)
            except queue.Empty:
                yield {
                    **piece,
                    "name": "endless",
                    "ended": f"it still ran after {timeout:g} seconds",
                }
                return
            if line is None:
                yield {
                    **piece,
                    "name": "process-ended",
                    "ended": "the Python process ended (exit(), or a crash)",
                }
                return
            event = json.loads(line)
            if "begins" in event:
                piece = {"piece": event["begins"]} if event["begins"] else {}
            elif "done" in event:
                return
            else:
                yield event
    finally:
        process.kill()
        process.wait()
