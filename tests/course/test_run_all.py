"""A notebook of exercises under "Run All Cells": every exercise runs, whatever the others do.

nbclient runs the cells as JupyterLab does: it stops at an exception unless the cell's tags allow
it. What a cell shows is compared.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from minivllm.course.authoring.tool import ROOT, write_links
from minivllm.course.grading import next_step
from minivllm.course.notebooks import ROAD, Chapter, chapters, role
from minivllm.course.stubs import MAY_RAISE, make_exercises
from support import demo

pytestmark = pytest.mark.slow

SQUARES = "def double(x):\n    return x * x"


def run_all(notebook: NotebookNode, folder: Path) -> None:
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute(cwd=str(folder))


def shown(notebook: NotebookNode) -> dict[str, list[str]]:
    """What each check cell shows: the lines of its streams, its errors and its displays."""
    found = {}
    for cell in notebook.cells:
        kind, id = role(cell)
        if kind == "check":
            assert cell.execution_count, f"the check of {id} did not run"
            found[id] = [
                line
                for output in cell.outputs
                for line in (
                    output.get("text")
                    or "\n".join(output.get("traceback", []))
                    or output.data["text/markdown"]
                ).splitlines()
            ]
    return found


def test_stubs_are_told_in_one_line_each(chapter: Chapter) -> None:
    notebook = nbformat.read(chapter.exercises, as_version=4)
    run_all(notebook, chapter.exercises.parent)
    lines = shown(notebook)
    assert lines["99.1"] == ["99.1 not attempted: still to write: double."]
    assert lines["99.2"][0] == "\x1b[1mfailed: not-updated\x1b[0m", "its stub is code with a bug"
    [line] = lines["99.3"]
    assert line.startswith("99.3 not attempted: still to write: blocks (still `...`)")


def test_a_mistake_stops_no_other_exercise(chapter: Chapter) -> None:
    notebook = make_exercises(chapter)
    demo.fill_in(notebook, answer_1=SQUARES, answer_2="class Counter(:\n    pass")
    run_all(notebook, chapter.exercises.parent)
    lines = shown(notebook)
    assert lines["99.1"][:2] == [
        "\x1b[1mfailed: squared\x1b[0m",
        "You square; twice is asked for.",
    ]
    assert "NameError" in lines["99.2"][-1], "the cell of the answer cannot be read"
    assert lines["99.3"][0] == "99.3 passed: 4 blocks, 64 tokens"
    failed = [c for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert [cell.id for cell in failed] == ["check-1", "answer-2", "check-2"]


def test_the_set_up_stops_the_run(chapter: Chapter) -> None:
    notebook = make_exercises(chapter)
    demo.find(notebook, "setup").source = "import a_package_that_is_missing"
    with pytest.raises(CellExecutionError):
        run_all(notebook, chapter.exercises.parent)


def test_a_passed_exercise_links_to_the_next(chapter: Chapter) -> None:
    notebook = make_exercises(chapter)
    demo.fill_in(notebook)
    run_all(notebook, chapter.exercises.parent)
    lines = shown(notebook)
    assert lines["99.1"] == [
        "99.1 passed: right on 3 numbers",
        "Next: [99.2 Debug this](99_demo.ipynb#cell-id=text-2) (●●○, 5 minutes)",
    ]
    assert lines["99.3"][1].startswith(
        "That was the last exercise of this chapter. `minivllm check"
    )


@pytest.mark.parametrize("number", ["01", "04"])
def test_a_chapter_of_stubs_runs_to_its_end(number: str) -> None:
    chapter = next(chapter for chapter in chapters(ROOT) if chapter.number == number)
    notebook = make_exercises(chapter)
    run_all(notebook, ROOT / "exercises")
    for id, lines in shown(notebook).items():
        assert (len(lines) == 1 and lines[0].startswith(f"{id} not attempted: ")) or (
            "failed: " in lines[0]
        ), lines
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_the_solutions_carry_no_such_tag() -> None:
    for chapter in chapters(ROOT):
        assert not any(
            MAY_RAISE in cell.metadata.get("tags", []) for cell in chapter.solution.cells
        )


# --- where the links lead -------------------------------------------------------------------------


def test_each_step_leads_somewhere() -> None:
    """Each exercise leads to the next heading, and the last of a chapter to the next chapter."""
    from minivllm.course.authoring.tool import broken_links

    for chapter in chapters(ROOT):
        steps = [next_step.after(statement.id, ROOT) for statement in chapter.statements]
        cells = [nbformat.v4.new_markdown_cell(step) for step in steps]
        page = nbformat.v4.new_notebook(cells=cells)
        assert broken_links(page, ROOT / "exercises") == []
        assert broken_links(page, ROOT / "solutions") == []
        for step, following in zip(steps, chapter.statements[1:], strict=False):
            assert f"[{following.id} {following.title}]" in step
        assert f"`minivllm check {chapter.number}`" in steps[-1]
        assert ("Next chapter: [" in steps[-1]) == (chapter.name != ROAD[-1].name)
        assert ("capstone" in steps[-1]) == (chapter.number == "07")
    assert next_step.after("98.1", ROOT) == ""


def test_the_page_s_links_do_not_change_what_is_graded(chapter: Chapter, monkeypatch) -> None:
    """Cells of links that are in the solution, but not in an older file of a learner."""
    from minivllm.course.grading.graft import graft
    from minivllm.course.notebooks import Stop

    before = [(group.id, group.cells) for group in graft(chapter.exercises, chapter)]
    monkeypatch.setattr("minivllm.course.navigation.ROAD", road := (Stop("99_demo", "use", "x"),))
    monkeypatch.setattr("minivllm.course.authoring.tool.ROAD", road)
    old = chapter.exercises.read_bytes()
    write_links(chapter.root)
    chapter.exercises.write_bytes(old)
    linked = Chapter(chapter.root, chapter.name)
    assert "nav-top" in [cell.id for cell in linked.solution.cells]
    assert [(group.id, group.cells) for group in graft(chapter.exercises, linked)] == before
