"""What learners do to their files of exercises, harmless or not, and the verdicts on a file."""

from __future__ import annotations

from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output

from minivllm.course.grading.graft import graft
from minivllm.course.grading.runner import Verdict, verdicts
from minivllm.course.notebooks import Chapter
from support import demo

WRONG = "def double(x):\n    return x * x"


def judge(
    chapter: Chapter, path: Path, timeout: float = 30, ids: set[str] | None = None
) -> dict[str, Verdict]:
    """The verdicts by id.

    Also asserts that the learner's file was not changed.
    """
    before, since = path.read_bytes(), path.stat().st_mtime_ns
    found = {
        verdict.id: verdict for verdict in verdicts(graft(path, chapter), path.parent, ids, timeout)
    }
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, since)
    return found


def states(found: dict[str, Verdict]) -> dict[str, str]:
    return {id: verdict.state for id, verdict in found.items()}


def insert(notebook: NotebookNode, after: str, source: str) -> None:
    """Insert a cell that a learner added."""
    notebook.cells.insert(
        notebook.cells.index(demo.find(notebook, after)) + 1, new_code_cell(source)
    )


def without(notebook: NotebookNode, *ids: str) -> None:
    notebook.cells = [cell for cell in notebook.cells if cell.id not in ids]


def saved_as_passed(notebook: NotebookNode) -> None:
    """Make the notebook look as if the checks had been run and had passed."""
    for id, printed in demo.PRINTED.items():
        check = demo.find(notebook, f"check-{id[-1]}")
        check.outputs = [new_output("stream", name="stdout", text=f"{id} passed: {printed}\n")]
        check.execution_count = 1


def check_prints_what_it_should(notebook: NotebookNode) -> None:
    saved_as_passed(notebook)
    demo.find(notebook, "check-1").source = "print('99.1 passed: right on 3 numbers')"


def checks_deleted(notebook: NotebookNode) -> None:
    without(notebook, "check-1", "check-2", "check-3")


def run_and_saved(notebook: NotebookNode) -> None:
    error = new_output("error", ename="Mistake", evalue="squared", traceback=[])
    demo.find(notebook, "check-1").update(outputs=[error], execution_count=7)


def markers(notebook: NotebookNode) -> None:
    demo.find(notebook, "answer-1").source = (
        "# NBVAL_SKIP\n" + WRONG + "\n    ## NBVAL_RAISES_EXCEPTION"
    )
    demo.find(notebook, "answer-1").metadata.tags = [
        "exercise",
        "nbval-skip",
        "raises-exception",
        "skip-execution",
    ]
    check = demo.find(notebook, "check-1")
    check.source = "# NBVAL_IGNORE_OUTPUT\n# NBVAL_RAISES_EXCEPTION\n" + check.source
    check.metadata.tags += ["nbval-skip", "raises-exception"]


def outputs_cleared(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)


def check_redefined_in_own_cell(notebook: NotebookNode) -> None:
    insert(notebook, "setup", "def check(id, *answers):\n    print(id, 'passed')")


def check_redefined_in_answer(notebook: NotebookNode) -> None:
    demo.find(notebook, "answer-1").source = (
        WRONG + "\n\ndef check(*_):\n    print('99.1 passed: right on 3 numbers')"
    )


def check_replaced_in_the_setup(notebook: NotebookNode) -> None:
    demo.find(notebook, "setup").source += "\ncheck = print"


def exceptions_swallowed(notebook: NotebookNode) -> None:
    source = (
        "try:\n    check('99.1', double)\nexcept Exception:\n    print('99.1 passed: right on 3"
        " numbers')"
    )
    demo.find(notebook, "check-1").source = source
