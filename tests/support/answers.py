"""The exercises of a chapter, the wrong answers to them, and exercises that show an answer."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from minivllm.course.grading.exercise import find, modules
from minivllm.course.grading.wrong_answers import EditError, sections, source_of
from minivllm.course.notebooks import Chapter, compared_text, role
from minivllm.course.stubs import make_exercises, stub_source


@dataclass
class Part:
    """One exercise of a solution: the sources of its cells.

    pictures: the given cells before the next statement.
    """

    id: str
    answer: str = ""
    stub: str = ""
    given_stub: bool = False
    pictures: list[str] = field(default_factory=list)
    check: str = ""
    printed: str = ""


@dataclass(frozen=True)
class Wrong:
    """A wrong answer, or another right one."""

    id: str
    name: str
    why: str
    source: str


def parts_of(chapter: Chapter) -> tuple[list[str], list[Part]]:
    """(sources of the given cells before the first exercise, the exercises)."""
    setup: list[str] = []
    parts: dict[str, Part] = {}
    for cell in chapter.solution.cells:
        kind, id = role(cell)
        if kind != "given":
            part = parts.setdefault(id, Part(id))
        if kind == "exercise":
            part.answer, part.given_stub = cell.source, "stub" in cell.metadata.minivllm
            # Another test reports an answer without a stub.
            with contextlib.suppress(ValueError, SyntaxError):
                part.stub = stub_source(cell)
        elif kind == "check":
            part.check, part.printed = cell.source, compared_text(cell)
        elif kind == "given" and cell.cell_type == "code":
            (part.pictures if parts else setup).append(cell.source)
    return setup, list(parts.values())


def wrong_answers(chapter: Chapter) -> list[Wrong]:
    """The answers in the modules of a chapter's exercises, edits applied to the solutions.

    The name of another right answer is "right". EditError where an edit does not fit any more.
    """
    solutions = {part.id: part.answer for part in parts_of(chapter)[1]}
    found = []
    for id in modules(chapter.number):
        exercise = find(id)
        named = [(known.name, known.answers) for known in exercise.mistakes]
        for name, text in [*named, ("right", exercise.right)]:
            try:
                found += [
                    Wrong(id, name, why, source_of(body, solutions[id]))
                    for why, body in sections(text)
                ]
            except EditError as error:
                raise EditError(f"{id}, {name}: {error}") from None
            except KeyError:
                raise EditError(f"{id} has a module, and no answer cell in the solution.") from None
    return found


def leaks(chapter: Chapter, path: Path | None = None) -> list[str]:
    """Find the cells of the generated exercises that show an answer.

    These are cells with most of an answer's lines, and cells with outputs or stubs left in them.
    """
    found = []
    exercises = make_exercises(chapter)
    for cell in exercises.cells:
        if cell.get("outputs") or "stub" in cell.metadata.get("minivllm", {}):
            found.append(f"cell {cell.id}: an output, or the stub's metadata")
    cells = {f"cell {cell.id}": cell.source for cell in exercises.cells}
    return found + shown_answers(chapter, cells)


def shown_answers(chapter: Chapter, sources: dict[str, str]) -> list[str]:
    """Find the sources that have most of the lines of an answer. sources: by their place."""
    found = []
    for part in parts_of(chapter)[1]:
        lines = _lines(part.answer) - _lines(part.stub)
        for place, source in sources.items():
            if len(lines) >= 3 and len(lines & _lines(source)) > len(lines) / 2:
                found.append(f"{place}: most of the answer to {part.id}")
    return found


def _lines(source: str) -> set[str]:
    """The meaningful lines of a source: no comments, no lines shorter than 12 characters."""
    return {
        line.strip()
        for line in source.splitlines()
        if len(line.strip()) >= 12 and not line.strip().startswith("#")
    }
