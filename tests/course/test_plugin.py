"""Plain `pytest --nbval` on notebooks: exercises judged by the solution, a repository's others by
what is committed.

All states of a learner's file stand in one folder, so that one run of pytest in a process of its
own tells about them all. That pytest finds the plugin by itself is part of what is tested.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from minivllm.course.authoring.tool import write_stubs
from minivllm.course.stubs import make_exercises
from support import demo
from support import learners_files as changes

pytestmark = pytest.mark.slow

Outcomes = dict[str, dict[str, str]]
PASSED = "passed"


def run_pytest(folder: Path, *arguments: str) -> tuple[Outcomes, str]:
    """({file's stem: {test: "passed" or what it says}}, what pytest printed) for pytest --nbval in
    a folder.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "--nbval",
        "-p",
        "no:cacheprovider",
        "--junitxml=report.xml",
        *arguments,
    ]
    options = ["-o", "junit_logging=no", "--nbval-current-env"]
    done = subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    found: Outcomes = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        stem = case.get("classname").rpartition(".")[0].rpartition(".")[2] or case.get("classname")
        trouble = next(
            (child for child in case if child.tag in ("failure", "error", "skipped")), None
        )
        found.setdefault(stem, {})[case.get("name")] = (
            PASSED if trouble is None else trouble.text or trouble.get("message")
        )
    return found, done.stdout + done.stderr


# --- exercises ------------------------------------------------------------------------------------

WRONG = {"answer_1": changes.WRONG}


def prints_and_cells(notebook: NotebookNode) -> None:
    demo.fill_in(
        notebook, answer_1="print('mine')\ndef double(x):\n    print(x)\n    return helper(x)"
    )
    changes.insert(notebook, "setup", "helper = lambda x: 2 * x\nprint('hello')\n1 / 0")


def wrong(change: Callable[[NotebookNode], None]) -> Callable[[NotebookNode], None]:
    return lambda notebook: (demo.fill_in(notebook, answer_1=changes.WRONG), change(notebook))


def stub(notebook: NotebookNode) -> None:
    notebook.cells[
        3
    ].source = "def double(x):\n    raise NotImplementedError('99.1: your code here')"


#: state of a learner's file -> (how it came to be, what is said about 99.1)
STATES = {
    "right": (lambda notebook: None, PASSED),
    "right_with_prints": (prints_and_cells, PASSED),
    "wrong_run_and_saved": (wrong(changes.run_and_saved), "99.1 failed: squared"),
    "wrong_saved_as_passed": (wrong(changes.saved_as_passed), "99.1 failed: squared"),
    "checks_deleted": (wrong(changes.checks_deleted), "99.1 failed: squared"),
    "checks_edited": (wrong(changes.check_prints_what_it_should), "99.1 failed: squared"),
    "markers_typed": (wrong(changes.markers), "99.1 failed: squared"),
    "outputs_cleared": (wrong(changes.outputs_cleared), "99.1 failed: squared"),
    "check_redefined": (wrong(changes.check_redefined_in_answer), "99.1 failed: squared"),
    "stub": (stub, "99.1 not attempted"),
    "answer_missing": (
        lambda notebook: changes.without(notebook, "answer-1"),
        "99.1 failed: answer-missing",
    ),
    "endless": (
        lambda notebook: demo.fill_in(notebook, answer_1="def double(x):\n    while True: pass"),
        "99.1 failed: endless",
    ),
    "ends_the_kernel": (
        lambda notebook: demo.fill_in(notebook, answer_1="import os\ndef double(x): os._exit(1)"),
        "99.1 failed: process-ended",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcomes, dict[str, bool]]:
    """(what pytest said about the files of all states, whether each file is as it was)."""
    root = tmp_path_factory.mktemp("repository")
    chapter = demo.make_chapter(root)
    saved = {}
    for name, (change, _) in STATES.items():
        notebook = make_exercises(chapter)
        demo.fill_in(notebook)
        change(notebook)
        path = root / "exercises" / f"{name}.ipynb"
        nbformat.write(notebook, path)
        saved[path] = path.read_bytes()
    shutil.copy(path, root / "exercises/99_demo.kept-1.ipynb")
    (root / "exercises/unreadable.ipynb").write_text(
        '{"metadata": {"minivllm": {"chapter": "99_demo"}}, "cells": 3}'
    )
    gone = new_notebook(metadata={"minivllm": {"chapter": "98_gone"}})
    nbformat.write(gone, root / "exercises/no_solution.ipynb")
    found, _ = run_pytest(root, "exercises", "--nbval-cell-timeout=3")
    return found, {path.stem: path.read_bytes() == before for path, before in saved.items()}


@pytest.mark.parametrize("state", STATES)
def test_the_verdict_is_right_whatever_was_saved(
    outcomes: tuple[Outcomes, dict[str, bool]], state: str
) -> None:
    found, unchanged = outcomes
    assert found[state]["99.1"].startswith(STATES[state][1])
    assert {found[state][id] for id in ("99.2", "99.3")} == {PASSED}
    assert unchanged[state]


def test_messages_say_what_to_do(outcomes: tuple[Outcomes, dict[str, bool]]) -> None:
    found, _ = outcomes
    assert "You square; twice is asked for.\nWith x = 3" in found["wrong_run_and_saved"]["99.1"]
    assert "Its check cell was deleted" in found["checks_deleted"]["99.1"]
    assert "Traceback" not in str(found["stub"])
    assert "not a notebook that can be read" in found["unreadable"]["file"]
    assert "solutions/98_gone.ipynb is missing" in found["no_solution"]["file"]


def test_what_was_kept_aside_is_not_collected(outcomes: tuple[Outcomes, dict[str, bool]]) -> None:
    assert set(outcomes[0]) == {*STATES, "unreadable", "no_solution"}


def test_a_changed_solution_fails_once_and_says_how_to_restore_it(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("minivllm.course.notebooks.DIGESTS", tmp_path)
    chapter = demo.make_chapter(tmp_path)
    write_stubs(chapter)
    (tmp_path / "conftest.py").write_text(
        "import pathlib, minivllm.course.notebooks as chapters\nchapters.DIGESTS ="
        " pathlib.Path(__file__).parent"
    )
    chapter.solution.cells[1].source += "\n# changed"
    nbformat.write(chapter.solution, chapter.solution_path)
    found, _ = run_pytest(tmp_path, "exercises/99_demo.ipynb")
    assert list(found["99_demo"]) == ["file"]
    assert "git checkout -- solutions/99_demo.ipynb" in found["99_demo"]["file"]


def test_without_nbval_nothing_is_collected(tmp_path: Path) -> None:
    demo.make_chapter(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"], cwd=tmp_path, check=False
    )
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_plugin_is_light() -> None:
    code = (
        "import sys, minivllm.course.grading.plugin;"
        " print({'torch', 'nbformat', 'jupyter_client', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- the notebooks of a repository ----------------------------------------------------------------


def notebook_of(source: str, printed: str) -> NotebookNode:
    output = new_output("stream", name="stdout", text=printed)
    return new_notebook(cells=[new_code_cell(source, outputs=[output], execution_count=1)])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with two notebooks that are committed, of which one was saved with another output; and
    one of a learner's.
    """
    demo.make_chapter(tmp_path)
    shutil.rmtree(tmp_path / "solutions")
    for folder in ("solutions", "minivllm/course"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("01_same", "02_changed"):
        nbformat.write(notebook_of("print(1)", "1\n"), tmp_path / "notebooks" / f"{name}.ipynb")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "notebooks"], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    nbformat.write(notebook_of("print(1)", "2\n"), tmp_path / "notebooks/02_changed.ipynb")
    nbformat.write(notebook_of("1 / 0", "3\n"), tmp_path / "notebooks/scratch.ipynb")
    return tmp_path


def test_a_learners_working_copy_is_green_and_named(repository: Path) -> None:
    found, said = run_pytest(repository, "notebooks")
    assert found == {"01_same": {"Cell 0": PASSED}, "02_changed": {"Cell 0": PASSED}}
    assert "notebooks/02_changed.ipynb was changed; its committed copy was tested" in said
    assert "git checkout -- notebooks/02_changed.ipynb" in said
    assert "notebooks/scratch.ipynb is not in git, and was left out" in said


def test_a_notebook_that_is_named_is_taken_as_it_is(repository: Path) -> None:
    found, _ = run_pytest(repository, "notebooks/02_changed.ipynb", "notebooks/01_same.ipynb")
    assert found["01_same"] == {"Cell 0": PASSED}
    assert "Cell outputs differ" in found["02_changed"]["Cell 0"]


def test_without_git_files_are_taken_as_they_are(repository: Path) -> None:
    shutil.rmtree(repository / ".git")
    found, _ = run_pytest(repository, "notebooks")
    assert set(found) == {"01_same", "02_changed", "scratch"}
    assert found["02_changed"] != {"Cell 0": PASSED}
