"""Every chapter's exercises: solutions pass, stubs fail at their own check, wrong answers fail with
the right name.

Wrong answers, and other right ones, stand in the modules of the exercises
(minivllm/course/chapters). `-k ch01` selects a chapter.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from minivllm.course.authoring.tool import ROOT, problems
from minivllm.course.grading.exercise import find, modules
from minivllm.course.notebooks import (
    DIGESTS,
    Chapter,
    CourseNotFoundError,
    as_committed,
    chapters,
    read,
    role,
)
from minivllm.course.stubs import (
    defined_names,
    exercises_of,
    make_exercises,
    require_published,
)
from support.answers import Part, Wrong, leaks, parts_of, wrong_answers
from support.children import Children

pytestmark = pytest.mark.slow

LEAST_WRONG_ANSWERS = 3
CHAPTERS = chapters(ROOT)
PARTS = [(chapter, part) for chapter in CHAPTERS for part in parts_of(chapter)[1]]
WRONG = [(chapter, wrong) for chapter in CHAPTERS for wrong in wrong_answers(chapter)]


def label(chapter: Chapter, *what: str) -> str:
    return "-".join([f"ch{chapter.number}", *what])


@pytest.fixture(params=CHAPTERS, ids=label, scope="module")
def chapter(request: pytest.FixtureRequest) -> Chapter:
    return request.param


_running: dict[str, Children] = {}
#: Exercise -> what its solution and its check gave.
_solved: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module", autouse=True)
def _no_child_stays() -> Iterator[None]:
    yield
    _solved.clear()
    while _running:
        _running.popitem()[1].close()


def solve(chapter: Chapter, part: Part) -> dict[str, Any]:
    """`Children.run` of an exercise's solution, once; skipped where its check cannot run.

    It runs in the process that the others are forked from. So imports, and the runs that a check
    compares with and keeps, are made once, not for each answer.
    """
    if chapter.name not in _running:
        folder = chapter.exercises.parent
        _running[chapter.name] = Children(parts_of(chapter)[0], chapter.number, folder)
    if part.id not in _solved:
        cells = (part.answer, *part.pictures, part.check)
        _solved[part.id] = _running[chapter.name].warm(*cells)
    return _runnable(_solved[part.id])


def run(chapter: Chapter, part: Part, *cells: str) -> dict[str, Any]:
    """`Children.run` of cells for an exercise, skipped where this machine cannot run its check."""
    solve(chapter, part)
    return _runnable(_running[chapter.name].run(*cells))


def _runnable(result: dict[str, Any]) -> dict[str, Any]:
    if result["raised"] == "NotRunnableHere":
        pytest.skip(f"not runnable here: {result['message']}")
    return result


# --- the exercises --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chapter", "part"), PARTS, ids=[label(c, part.id, "solution") for c, part in PARTS]
)
def test_the_solution_passes(chapter: Chapter, part: Part) -> None:
    result = solve(chapter, part)
    assert result["raised"] is None, f"{result}\n{as_committed(chapter.solution_path)[1]}"
    assert result["printed"] == part.printed, (
        "the check prints something else than the solution's notebook shows:"
        f" python -m minivllm.course.authoring execute solutions/{chapter.name}.ipynb"
    )


@pytest.mark.parametrize(
    ("chapter", "part"), PARTS, ids=[label(c, part.id, "stub") for c, part in PARTS]
)
def test_the_stub_fails_at_its_own_check(chapter: Chapter, part: Part) -> None:
    result = run(chapter, part, part.stub, *part.pictures, part.check)
    assert result["cell"] == 1 + len(part.pictures), f"failed before its check: {result}"
    assert result["raised"] in ("NotAttempted", *["Mistake"] * part.given_stub), result


@pytest.mark.parametrize(
    ("chapter", "wrong"), WRONG, ids=[label(c, w.id, w.name) for c, w in WRONG]
)
def test_wrong_answers_are_named(chapter: Chapter, wrong: Wrong) -> None:
    part = next(part for part in parts_of(chapter)[1] if part.id == wrong.id)
    assert defined_names(wrong.source) >= defined_names(part.answer), (
        "it replaces the whole answer cell"
    )
    result = run(chapter, part, wrong.source, part.check)
    if wrong.name == "right":
        assert result["raised"] is None, f"{wrong.why}: this is right, and the check says: {result}"
        if part.printed:  # else the notebook has not been executed yet: the solution's test says so
            assert result["printed"] == part.printed
    else:
        assert result["raised"] == "Mistake", f"{wrong.why}: {result}"
        assert result["name"] == wrong.name, result
        assert len(result["message"].splitlines()) >= 2, f"say what is wrong: {result['message']}"


def test_hints_belong_to_mistakes_that_are_shown(chapter: Chapter) -> None:
    shown = {(wrong.id, wrong.name) for wrong in wrong_answers(chapter)}
    for statement in chapter.statements:
        for name, number in find(statement.id).hints.items():
            assert 1 <= number <= len(statement.hints), f"{statement.id} has no hint {number}"
            assert (
                statement.id,
                name,
            ) in shown, f"{statement.id}: no wrong answer is called {name}"


def test_modules_and_statements_say_the_same(chapter: Chapter) -> None:
    said = {statement.id: statement.title for statement in chapter.statements}
    made = {id: find(id) for id in modules(chapter.number)}
    assert [*said] == [*made], "each statement has a module exK_….py, and each module a statement"
    assert {id: exercise.id for id, exercise in made.items()} == {id: id for id in made}
    assert {id: exercise.title for id, exercise in made.items()} == said


def test_enough_wrong_answers(chapter: Chapter) -> None:
    wrong = wrong_answers(chapter)
    ids = {part.id for part in parts_of(chapter)[1]}
    assert {w.id for w in wrong} <= ids, "a wrong answer to an exercise that is not there"
    counts = Counter(w.id for w in wrong if w.name not in ("right", "raised"))
    assert {id: counts[id] for id in ids if counts[id] < LEAST_WRONG_ANSWERS} == {}


# --- the notebooks --------------------------------------------------------------------------------


def test_the_solution_may_be_committed(chapter: Chapter) -> None:
    assert problems(chapter.solution) == []


def test_the_solution_is_as_it_was_published(chapter: Chapter) -> None:
    """A learner who changed it is told what, and how to restore it; an author, to write the digests
    anew.
    """
    assert chapter.digests.exists(), "python -m minivllm.course.authoring stubs"
    require_published(chapter)


def test_no_solution_is_missing() -> None:
    published = {path.stem[2:] for path in DIGESTS.glob("ch*.json")}
    missing = sorted(published - {chapter.number for chapter in CHAPTERS})
    assert missing == [], (
        "the solutions of these chapters are gone. Restore them: git checkout -- solutions"
    )


def test_the_exercises_are_in_step(chapter: Chapter) -> None:
    """Compared: everything but answers and outputs. A learner may change more; then the committed
    files count.
    """
    with contextlib.suppress(CourseNotFoundError):
        if given_cells(read(chapter.exercises)) == given_cells(make_exercises(chapter)):
            return
    texts, notes = zip(
        as_committed(chapter.exercises), as_committed(chapter.solution_path), strict=True
    )
    assert any(notes), f"out of step: python -m minivllm.course.authoring stubs {chapter.name}"
    exercises, solution = (nbformat.reads(text or "{}", as_version=4) for text in texts)
    assert exercises == exercises_of(solution, chapter.name), "out of step, and committed so"
    warnings.warn("\n".join(filter(None, notes)), stacklevel=1)


def given_cells(exercises: NotebookNode) -> list[tuple]:
    """What a learner has no reason to change."""
    return [
        (cell.cell_type, cell.metadata.get("minivllm"), role(cell)[0] != "exercise" and cell.source)
        for cell in exercises.cells
    ]


def test_answers_do_not_leak(chapter: Chapter) -> None:
    assert leaks(chapter) == []
