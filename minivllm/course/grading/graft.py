"""Combine a learner's answers with the published notebook.

A saved notebook is no proof: its check cells may be edited or missing, and its outputs may be old.
So only the answers and the cells that the learner added are taken from it. Everything else comes
from the solution, also the text that each check has to print. The learner's file is read and never
written.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.course.notebooks import (
    Chapter,
    CourseNotFoundError,
    compared_text,
    find_root,
    read,
    role,
)
from minivllm.course.stubs import defined_names, names_in, require_published, stub_source

if TYPE_CHECKING:
    from nbformat import NotebookNode

#: Comments that make nbval skip a cell. An answer must not contain them.
_MARKER = re.compile(r"^(\s*)#+\s*(NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """One cell to run.

    kind: "given", "answer", "check" or "own". An "own" cell is the learner's; it runs and is not
    judged.
    """

    kind: str
    source: str


@dataclass
class Group:
    """An exercise: its cells, from the statement to the next statement.

    id: "" for the cells before the first exercise. printed: what the check prints when the answer
    is right. notes: what the learner should know about the file. broken: (name, why) where there is
    nothing to run. untouched: the answer is still the stub.
    """

    id: str
    cells: list[Cell] = field(default_factory=list)
    printed: str = ""
    notes: list[str] = field(default_factory=list)
    broken: tuple[str, str] | None = None
    untouched: bool = False


def chapter_of(path: Path) -> Chapter | None:
    """The chapter whose exercises a file contains; None for any other file.

    The file names the chapter in its metadata, or its path is exercises/NN_name.ipynb.
    CourseNotFoundError where the repository cannot be found.
    """
    import json

    path = path.resolve()
    try:
        metadata = json.loads(path.read_text(encoding="utf-8")).get("metadata", {})
        name = metadata.get("minivllm", {}).get("chapter")
    except (OSError, ValueError, AttributeError):
        name = None
    if (
        name is None
        and path.parent.name == "exercises"
        and (path.parent.parent / "solutions" / path.name).exists()
    ):
        name = path.stem
    return Chapter(find_root(path.parent), name) if isinstance(name, str) else None


def answers(path: Path) -> dict[str, str]:
    """The sources of the answers in a learner's notebook, by exercise: {"01.2": "def …"}.

    Stubs are included. The parts of an answer that stands in several cells are joined in their
    order.
    """
    return {
        id: "\n\n".join(source for _, source in cells)
        for id, cells in _answer_cells(read(path)).items()
    }


def _answer_cells(notebook: NotebookNode) -> dict[str, list[tuple[int, str]]]:
    found = defaultdict(list)
    for number, cell in enumerate(notebook.cells, start=1):
        kind, id = role(cell)
        if kind == "exercise" and cell.cell_type == "code":
            found[id].append((number, without_markers(cell.source)))
    return dict(found)


def without_markers(source: str) -> str:
    """The source without the comments that make nbval skip a cell or not compare its output."""
    return _MARKER.sub(r"\1# (a marker stood here)", source)


def graft(path: Path, chapter: Chapter) -> list[Group]:
    """The groups of cells to run.

    The cells are the solution's, in their order, with the learner's answers. Each cell that the
    learner added comes after the cell that it follows in the learner's notebook. The first group
    holds the cells before the first exercise.

    ChangedSolutionError where the solution differs from the published one; CourseNotFoundError
    where a file cannot be read.
    """
    require_published(chapter)
    if not path.exists():
        raise CourseNotFoundError(
            f"{path.name} is missing; `minivllm course reset {chapter.number}` writes a fresh one."
        )
    learner, solution = read(path), chapter.solution
    found = _answer_cells(learner)
    own = _own_cells(learner, solution)
    wanted = {
        id: names_in(cell.source)
        for cell in solution.cells
        for kind, id in [role(cell)]
        if kind == "check"
    }
    groups = [Group("", own[""], notes=_changed_setup(learner, solution))]
    for cell in solution.cells:
        kind, id = role(cell)
        if kind == "statement":
            groups.append(Group(id))
        group = groups[-1]
        if kind == "exercise" and id not in found:
            group.broken = "answer-missing", _missing(id, cell, learner)
        elif kind == "exercise":
            _put_answer(group, found[id], stub_source(cell), wanted[id])
        elif cell.cell_type == "code":
            group.cells.append(Cell("check" if kind == "check" else "given", cell.source))
        if kind == "check":
            group.printed = compared_text(cell)
            group.notes += _notes_on_check(id, cell, learner)
        group.cells += own[cell.id]
    return groups


def _put_answer(group: Group, cells: list[tuple[int, str]], stub: str, wanted: set[str]) -> None:
    sources = [source for _, source in cells]
    group.untouched = all(_same_code(source, stub) or _same_code(source, "") for source in sources)
    group.cells += [Cell("answer", source) for source in sources]
    if len(cells) > 1:
        where = " and ".join(str(number) for number, _ in cells)
        group.notes.append(
            f"It has {len(cells)} answer cells (cells {where} of your file). They were run in this"
            " order."
        )
    if any("(a marker stood here)" in source for source in sources):
        group.notes.append("NBVAL markers in an answer are ignored.")
    lost = sorted(
        (defined_names(stub) & wanted).difference(
            *(names_in(source, ast.Store) for source in sources)
        )
    )
    if lost and not group.untouched and all(map(_is_python, sources)):
        group.notes.append(
            f"Your answer does not define {', '.join(lost)}, which its check asks for."
        )


def _own_cells(learner: NotebookNode, solution: NotebookNode) -> dict[str, list[Cell]]:
    """The cells that the learner added, by the id of the solution's cell before them.

    "" stands for the beginning. An edited given cell runs as it was given, and then as it is now.
    """
    given = {cell.id: cell.source for cell in solution.cells if role(cell)[0] == "given"}
    place = {role(cell): cell.id for cell in solution.cells if role(cell)[0] != "given"}
    found, after = defaultdict(list), ""
    for cell in learner.cells:
        kind, id = role(cell)
        if (kind, id) in place:
            after = place[kind, id]
        elif cell.get("id") in given or cell.source in given.values():
            after = (
                cell.id
                if cell.get("id") in given
                else next(id for id in given if given[id] == cell.source)
            )
            if cell.cell_type == "code" and cell.source != given[after]:
                found[after].append(Cell("own", without_markers(cell.source)))
        elif cell.cell_type == "code" and cell.source.strip():
            found[after].append(Cell("own", without_markers(cell.source)))
    return found


def _changed_setup(learner: NotebookNode, solution: NotebookNode) -> list[str]:
    """The cells before the first exercise that the learner has edited."""
    before = itertools.takewhile(lambda cell: role(cell)[0] == "given", solution.cells)
    given = {cell.id: cell.source for cell in before if cell.cell_type == "code"}
    return [
        f"Cell {number} of your file is a given cell, and it was changed. The original was run"
        " first, and then your version."
        for number, cell in enumerate(learner.cells, start=1)
        if cell.get("id") in given and cell.cell_type == "code" and cell.source != given[cell.id]
    ]


def _missing(id: str, answer: NotebookNode, learner: NotebookNode) -> str:
    """Explain, as far as possible, why there is no answer, and what to do."""
    for number, cell in enumerate(learner.cells, start=1):
        if role(cell) == ("exercise", id):
            return (
                f"The answer to {id}, cell {number} of your file, is a {cell.cell_type} cell: make"
                " it code (press Y)."
            )
    names = defined_names(stub_source(answer))
    for number, cell in enumerate(learner.cells, start=1):
        try:
            defines = cell.cell_type == "code" and names <= defined_names(cell.source)
        except SyntaxError:
            defines = False
        if defines and names:
            why = (
                f"Cell {number} defines {', '.join(sorted(names))}, but it is not the given"
                " cell for the answer"
            )
            break
    else:
        why = f"The cell for the answer to {id} is missing from your file"
    return (
        f"{why}. Get a fresh copy with `minivllm course reset {id[:2]}` (yours is kept beside it),"
        " and paste your code."
    )


def _notes_on_check(id: str, check: NotebookNode, learner: NotebookNode) -> list[str]:
    sources = [cell.source for cell in learner.cells if role(cell) == ("check", id)]
    if sources == [check.source]:
        return []
    return [
        f"Its check cell was {'changed' if sources else 'deleted'} in your file; the original was"
        " run."
    ]


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _same_code(left: str, right: str) -> bool:
    """Whether two sources differ at most in comments and layout."""
    try:
        return ast.dump(ast.parse(left)) == ast.dump(ast.parse(right))
    except SyntaxError:
        return left.strip() == right.strip()
