"""`minivllm check capstone`: what it prints, records and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.text import Text

from minivllm.course.grading.capstone.examine import Report, examine, reward
from minivllm.course.grading.capstone.page import write_page
from minivllm.course.grading.capstone.pieces import PIECES
from minivllm.course.grading.capstone.requests import QUESTION, ROUNDS
from minivllm.course.grading.capstone.standing import digest
from minivllm.course.grading.records import FAILED, PASSED, Records, keep
from minivllm.course.notebooks import find_root
from minivllm.files import reason

if TYPE_CHECKING:
    from rich.console import Console


def check(console: Console, timeout: float = 120.0) -> int:
    """Run the capstone on this repository's exercises and print the result. Returns the exit code.

    timeout: seconds. Each part may take half of it, because an endless part is run a second time to
    find the piece.
    """
    console.print(Text("Capstone: the engine that you wrote", style="bold"))
    root = find_root()
    with console.status("Running your pieces together …"):
        report = examine(root, timeout / 2)
    if problem := _keep(root, report):
        console.print(Text(problem, style="yellow"), soft_wrap=True)
    _print_pieces(report, console)
    _print_problems(report, console)
    for note in report.notes:
        _say(console, note, style="dim")
    if report.passed:
        _celebrate(root, report, console, timeout / 2)
    elif not report.problems:
        _say(console, "The run did not finish, for an unknown reason.")
    return int(not report.passed)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Padding(Text(text, style=style), (1, 0, 0, 3), expand=False), highlight=False)


def _keep(root: Path, report: Report) -> str:
    """Write the result and the answers' digest into the records. Returns "", or why not."""
    records = Records(root)
    record = records["capstone"]
    record.answer, record.state = digest(root, records), PASSED if report.passed else FAILED
    return keep(records)


def _print_pieces(report: Report, console: Console) -> None:
    wrong = {finding.piece: finding for finding in report.problems}
    for piece in PIECES:
        finding = wrong.get(piece.answer)
        sign, style = ("✗", "red") if finding else ("✓", "green") if report.passed else ("·", "dim")
        where = f"{report.found.get(piece.answer, piece.chapter)}"
        counted = piece.answer in report.calls and not finding
        calls = f"  {report.calls[piece.answer]:>6,} calls" if counted else ""
        line = f" {sign} {piece.name:18} {piece.answer:18} {where}{calls}"
        console.print(Text(line + (f"  {finding.name}" if finding else ""), style=style))


def _print_problems(report: Report, console: Console) -> None:
    """Each message once; of answers that are still to write only how many, and where to begin."""
    missing = [finding for finding in report.problems if finding.name == "not-attempted"]
    if len(missing) > 1:
        first = report.found[missing[0].piece]
        _say(
            console,
            f"{len(missing)} pieces are still to write. Begin with exercise {first}; `minivllm"
            f" check {first}` checks it by itself, and `minivllm course` shows what comes next.",
        )
    shown = [finding for finding in report.problems if len(missing) <= 1 or finding not in missing]
    for name, message in dict.fromkeys((finding.name, finding.message) for finding in shown):
        pieces = [f.piece for f in shown if (f.name, f.message) == (name, message) and f.piece]
        _say(console, f"{', '.join([*pieces, name])}: {message}")


def _celebrate(root: Path, report: Report, console: Console, timeout: float) -> None:
    """Say what was shown, measure the speeds, stream an answer, and write the page to keep."""
    stats = report.stats
    num_requests = sum(len(round.requests) for round in ROUNDS)
    _say(
        console,
        f"{num_requests} requests, greedy and seeded, in three rounds"
        f" ({', '.join(round.name for round in ROUNDS)}): all {report.num_tokens:,} tokens and all"
        f" texts equal the package's. {stats['num_steps']:,} steps, {stats['num_mixed_steps']} of"
        f" them mixed, with {stats['num_preemptions']} preemptions.",
    )
    _say(
        console,
        "None of the package's own pieces was used in these places. You have built an inference"
        " engine.",
        style="bold",
    )
    _say(console, f"It is yours. You ask it: {QUESTION}\n")
    reward(root, report, lambda text: console.print(text, end="", markup=False), timeout)
    console.print()
    if report.speed is not None:
        _say(console, report.speed.text())
    try:
        page = write_page(root, report)
    except OSError as error:
        _say(console, f"Your page could not be written: {reason(error)}.", style="yellow")
    else:
        _say(console, f"A page to keep: {page.relative_to(root)}")
    _say(console, "Talk to your engine: minivllm chat --mine. Watch it: minivllm demo --mine.")
