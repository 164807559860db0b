"""The exercises of a chapter, the wrong answers to them, and exercises that show an answer."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from minivllm.course.authoring.tool import ROOT
from minivllm.course.notebooks import Chapter, compared_text, role
from minivllm.course.stubs import make_exercises, stub_source

SECTION = re.compile(r"^# %% (\d\d\.\d+) ([a-z0-9-]+): *(.+)$", re.MULTILINE)
WRONG_ANSWERS = ROOT / "tests/wrong_answers"


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
    """A section of tests/wrong_answers/chNN.py."""

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


def sections(text: str) -> list[Wrong]:
    """The sections of a file of wrong answers.

    ValueError for a line that looks like a heading and is not one.
    """
    if bad := [
        line for line in text.splitlines() if line.startswith("# %%") and not SECTION.match(line)
    ]:
        raise ValueError(f"not of the form `# %% 01.2 its-name: what is wrong`: {bad}")
    found = list(SECTION.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [
        Wrong(m[1], m[2], m[3], text[m.end() : end].strip())
        for m, end in zip(found, ends, strict=True)
    ]


def wrong_answers(chapter: Chapter) -> list[Wrong]:
    path = WRONG_ANSWERS / f"ch{chapter.number}.py"
    return sections(path.read_text(encoding="utf-8")) if path.exists() else []


def leaks(chapter: Chapter, path: Path | None = None) -> list[str]:
    """Find the cells of the generated exercises that show an answer.

    These are cells with most of an answer's lines, and cells with outputs or stubs left in them.
    """
    found = []
    exercises = make_exercises(chapter)
    for cell in exercises.cells:
        if cell.get("outputs") or "stub" in cell.metadata.get("minivllm", {}):
            found.append(f"cell {cell.id}: an output, or the stub's metadata")
    for part in parts_of(chapter)[1]:
        lines = _lines(part.answer) - _lines(part.stub)
        for cell in exercises.cells:
            if len(lines) >= 3 and len(lines & _lines(cell.source)) > len(lines) / 2:
                found.append(f"cell {cell.id}: most of the answer to {part.id}")
    return found


def _lines(source: str) -> set[str]:
    """The meaningful lines of a source: no comments, no lines shorter than 12 characters."""
    return {
        line.strip()
        for line in source.splitlines()
        if len(line.strip()) >= 12 and not line.strip().startswith("#")
    }
