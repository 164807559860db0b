"""The output of `minivllm check` and `minivllm course`.

The output shows the verdicts on the answers, the learner's progress and the next step. `records`
stores the verdicts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from minivllm.course.grading import next_step
from minivllm.course.grading.capstone import command
from minivllm.course.grading.capstone.standing import standing
from minivllm.course.grading.errors import UnknownExerciseError
from minivllm.course.grading.exercise import find
from minivllm.course.grading.graft import chapter_of, graft
from minivllm.course.grading.records import (
    SIGNS,
    UNCHECKED,
    Records,
    free_name,
    groups_of,
    keep,
    states_of,
)
from minivllm.course.grading.runner import (
    CELL_TIMEOUT,
    FAILED,
    NOT_ATTEMPTED,
    NOT_RUNNABLE,
    PASSED,
    Verdict,
    verdicts,
)
from minivllm.course.notebooks import Chapter, CourseNotFoundError, Statement, chapters, find_root
from minivllm.course.stubs import make_exercises, require_published
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.files import reason

#: The next step, when all pieces of the capstone have passed.
CAPSTONE = "minivllm check capstone, which runs all that you wrote as one engine."


def _records(root: Path, console: Console) -> Records:
    """The records. Print a message where their file is damaged."""
    records = Records(root)
    if records.damage:
        console.print(Text(records.damage, style="yellow"), soft_wrap=True)
    return records


# --- minivllm check -------------------------------------------------------------------------------


def check(what: str | None, console: Console, timeout: float = CELL_TIMEOUT) -> int:
    """Check a chapter ("3", "03"), an exercise ("03.2"), a file, or "capstone".

    None: all chapters that the learner has begun. Returns the exit code: 0 when all exercises
    passed or cannot run on this machine, else 1. CourseNotFoundError where there is no such
    chapter; ChangedSolutionError; JupyterMissingError.
    """
    if what == "capstone":
        # Prints what is damaged; the capstone itself would not.
        _records(find_root(), console)
        return command.check(console, timeout)
    if what is not None:
        chosen = [_find(what)]
    else:
        begun = [
            c
            for c in chapters(find_root())
            if c.exercises.exists() and not all(g.untouched for g in groups_of(c))
        ]
        chosen = [(chapter, chapter.exercises, None) for chapter in begun]
    if not chosen:
        console.print(
            Text("No exercise has been attempted yet. `minivllm course` says where to begin.")
        )
        return 1
    records = _records(chosen[0][0].root, console)
    worst = max(_check(*one, console, timeout, records) for one in chosen)
    # Records are about the file in exercises/; a copy elsewhere has no next step.
    if in_place := [chapter for chapter, path, _ in chosen if path == chapter.exercises]:
        _print_next(in_place, records, console)
    return worst


def _print_next(checked: list[Chapter], records: Records, console: Console) -> None:
    """Print the next step after these chapters were checked."""
    steps = [_next(chapter, states_of(chapter, records)) for chapter in checked]
    step = next(filter(None, steps), "") or _after(checked[-1])
    if step:
        console.print(Text(f"Next: {step}"))


def _after(chapter: Chapter) -> str:
    """The next step after a chapter whose exercises have all passed."""
    try:
        _, capstone_is_next = standing(chapter.root)
    except MiniVLLMError:
        # A notebook of another chapter cannot be read. `minivllm course` names it.
        capstone_is_next = False
    return CAPSTONE if capstone_is_next else next_step.after_chapter(chapter)


def _find(what: str) -> tuple[Chapter, Path, Collection[str] | None]:
    """Resolve what the user typed: (chapter, file of its exercises, ids to check).

    The ids are None for all exercises.
    """
    path = Path(what)
    if path.suffix == ".ipynb":
        # Path.exists raises for a name that is too long.
        if not os.path.exists(path):
            raise CourseNotFoundError(f"There is no file {what}.")
        chapter = chapter_of(path)
        if chapter is not None:
            return chapter, path.resolve(), None
        what = path.stem
    known = chapters(find_root())
    number, _, exercise = what.partition(".")
    name = number.zfill(2) if number.isdecimal() else number
    for chapter in known:
        if name in (chapter.number, chapter.name):
            id = f"{chapter.number}.{exercise}"
            ids = [statement.id for statement in chapter.statements]
            if exercise and id not in ids:
                raise CourseNotFoundError(
                    f"There is no exercise {id}. Chapter {chapter.number} has {', '.join(ids)}."
                )
            return chapter, chapter.exercises, {id} if exercise else None
    names = ", ".join(chapter.number for chapter in known) or "none yet"
    raise CourseNotFoundError(f"There are no exercises {what!r}. Chapters with exercises: {names}.")


def _check(
    chapter: Chapter,
    path: Path,
    ids: Collection[str] | None,
    console: Console,
    timeout: float,
    records: Records,
) -> int:
    groups = graft(path, chapter)
    by_id = {group.id: group for group in groups}
    statements = {statement.id: statement for statement in chapter.statements}
    found = []
    console.print(Text(f"{chapter.title}  ({_shown(path, chapter.root)})", style="bold"))
    for verdict in verdicts(groups, path.parent, ids, timeout):
        record = records.note(by_id[verdict.id], verdict)
        _print(verdict, statements[verdict.id], record.tries, console)
        found.append(verdict.state)
    if problem := keep(records):
        console.print(Text(problem, style="yellow"), soft_wrap=True)
    console.print(f"{found.count(PASSED)} of {len(found)} passed.\n", highlight=False)
    return int(not set(found) <= {PASSED, NOT_RUNNABLE})


def _print(verdict: Verdict, statement: Statement, tries: int, console: Console) -> None:
    sign, style = SIGNS[verdict.state]
    name = f": {verdict.name}" if verdict.name else ""
    minutes = f" · {statement.minutes} minutes" if verdict.state == NOT_ATTEMPTED else ""
    console.print(
        Text(
            f" {sign} {verdict.id}  {statement.title}: {verdict.state}{name}{minutes}", style=style
        )
    )
    parts = [verdict.message if verdict.state != PASSED else "", *verdict.notes]
    if verdict.hinted and statement.hints:
        number = _hints(verdict.id).get(verdict.name) or min(max(tries, 1), len(statement.hints))
        parts.append(
            f"Hint {number} of {len(statement.hints)}: {_joined(statement.hints[number - 1])}"
        )
    for part in filter(None, parts):
        console.print(Padding(Text(part), (0, 0, 0, 8), expand=False))


def _hints(id: str) -> Mapping[str, int]:
    """The hint number for each mistake that the exercise's check names."""
    try:
        return find(id).hints
    except UnknownExerciseError:
        # The exercise's check stands in the notebook.
        return {}


def _joined(hint: str) -> str:
    """Join the lines of each paragraph, because the terminal breaks lines at other places.

    Lists, tables and code stay as they are.
    """
    return hint if "```" in hint else re.sub(r"(?<=\S)\n(?=[^\s\-*|\d])", " ", hint)


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


# --- minivllm course ------------------------------------------------------------------------------


def overview(console: Console) -> None:
    """Print the state of each chapter, the minutes left, the capstone's state and the next step."""
    root = find_root()
    table = Table("chapter", "exercises", "passed", "minutes left", box=None, pad_edge=False)
    records, left, following = _records(root, console), 0, ""
    for chapter in _road(root):
        if not chapter.solution_path.exists():
            minutes = chapter.reading_minutes
            table.add_row(chapter.title, "to read", "", f"({minutes})" if minutes else "")
            continue
        try:
            states = states_of(chapter, records)
        except MiniVLLMError as error:
            table.add_row(chapter.title, "?", "?", "?")
            following = following or str(error)
            continue
        minutes = sum(s.minutes for s in chapter.statements if states[s.id] != PASSED)
        if set(states.values()) == {NOT_ATTEMPTED}:
            minutes += chapter.reading_minutes
        signs = " ".join(SIGNS.get(state, ("?", ""))[0] for state in states.values())
        table.add_row(
            chapter.title,
            signs,
            f"{list(states.values()).count(PASSED)} of {len(states)}",
            str(minutes),
        )
        left += minutes
        following = following or _next(chapter, states)
    if not chapters(root):
        raise CourseNotFoundError(f"There are no chapters in {root / 'solutions'}.")
    console.print(table)
    console.print(
        "\n✓ passed  ✗ failed  · not attempted  ? not checked  – not runnable here",
        style="dim",
        highlight=False,
    )
    console.print(
        f"{left} minutes left." if left or following else "All exercises have passed.",
        highlight=False,
    )
    try:
        how_near, is_next = standing(root)
    except MiniVLLMError:
        # The table names the chapter with the problem.
        how_near, is_next = "", False
    if how_near:
        how = (
            ""
            if is_next or how_near == "passed"
            else " `minivllm check capstone` runs all of them as one engine."
        )
        console.print(f"The goal, the engine that you wrote: {how_near}.{how}", highlight=False)
    if is_next:
        following = CAPSTONE
    if following:
        console.print(Text(f"Next: {following}"))


def _road(root: Path) -> list[Chapter]:
    """All chapters: those with exercises, and the notebooks that are only read."""
    pages = [Chapter(root, path.stem) for path in (root / "notebooks").glob("[0-9][0-9]_*.ipynb")]
    numbers = {chapter.number for chapter in chapters(root)}
    own = [page for page in pages if page.number not in numbers and "-" not in page.name]
    return sorted([*chapters(root), *own], key=lambda chapter: chapter.name)


def _next(chapter: Chapter, states: dict[str, str]) -> str:
    """The next thing to do in this chapter; "" when all exercises have passed."""
    if set(states.values()) == {NOT_ATTEMPTED} and chapter.notebook.exists():
        return f"read notebooks/{chapter.name}.ipynb, then open exercises/{chapter.name}.ipynb."
    if UNCHECKED in states.values():
        return f"minivllm check {chapter.number}"
    for statement in chapter.statements:
        if states[statement.id] in (FAILED, NOT_ATTEMPTED):
            what = f"{statement.id}, {statement.title} ({statement.minutes} minutes)"
            return (
                f"{what}, in exercises/{chapter.name}.ipynb; then minivllm check {chapter.number}"
            )
    return ""


def reset(what: str) -> tuple[Path, Path | None]:
    """Write a fresh copy of a chapter's exercises.

    Returns the new file, and the new path of the old file, or None where there was no old file.
    ConfigError where the folder cannot be written to; nothing has been changed then.
    """
    import nbformat

    chapter, path, _ = _find(what)
    require_published(chapter)
    fresh = nbformat.writes(make_exercises(chapter)) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(fresh, encoding="utf-8")
        return path, _exchange(path, beside)
    except OSError as error:
        raise ConfigError(
            f"{path.name} cannot be renewed in the folder {path.parent}: {reason(error)}. Nothing"
            " was changed."
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _exchange(path: Path, fresh: Path) -> Path | None:
    """Move the file `fresh` to path. Returns the new path of the file that was there before.

    Either both moves happen or none.
    """
    if not os.path.lexists(path):
        fresh.replace(path)
        return None
    kept = free_name(path, "kept")
    path.rename(kept)
    try:
        fresh.replace(path)
    except BaseException:
        kept.rename(path)
        raise
    return kept
