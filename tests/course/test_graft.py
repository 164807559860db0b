"""Every state that a learner's file may be in: `graft` and `verdicts` say what is true of the
answers, in words.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from minivllm.course.grading.graft import answers, chapter_of, graft
from minivllm.course.grading.runner import FAILED, NOT_ATTEMPTED, NOT_RUNNABLE, PASSED
from minivllm.course.notebooks import ChangedSolutionError, Chapter, CourseNotFoundError, role
from support import demo
from support.learners_files import (
    WRONG,
    check_prints_what_it_should,
    check_redefined_in_answer,
    check_redefined_in_own_cell,
    check_replaced_in_the_setup,
    checks_deleted,
    exceptions_swallowed,
    insert,
    judge,
    markers,
    outputs_cleared,
    run_and_saved,
    saved_as_passed,
    states,
    without,
)

pytestmark = pytest.mark.slow

Learner = Callable[..., Path]
ALL_PASSED = {"99.1": PASSED, "99.2": PASSED, "99.3": PASSED}


# --- what is right --------------------------------------------------------------------------------


def test_right(chapter: Chapter, learner: Learner) -> None:
    found = judge(chapter, learner())
    assert states(found) == ALL_PASSED
    assert found["99.1"].message == "99.1 passed: right on 3 numbers"
    assert not any(verdict.notes for verdict in found.values())


def test_right_with_prints_and_cells_of_their_own(chapter: Chapter, learner: Learner) -> None:
    def change(notebook: NotebookNode) -> None:
        answer = (
            "def double(x):\n    print('x is', x)\n    return helper(x)\nprint('defined')\ndouble"
        )
        demo.fill_in(notebook, answer_1=answer)
        insert(notebook, "setup", "def helper(x):\n    return x + x\nprint('hello')")
        insert(notebook, "check-1", "1 / 0  # trying things")
        insert(notebook, "text-3", "%time double(4)")
        notebook.cells.insert(0, new_code_cell("# mine\nprint('first of all')"))
        notebook.cells.append(new_markdown_cell("my notes"))

    assert states(judge(chapter, learner(change))) == ALL_PASSED


def test_an_import_added_to_the_setup_is_there(chapter: Chapter, learner: Learner) -> None:
    def change(notebook: NotebookNode) -> None:
        demo.find(notebook, "setup").source += "\nimport operator"
        demo.fill_in(notebook, answer_1="def double(x):\n    return operator.mul(x, 2)")

    assert states(judge(chapter, learner(change))) == ALL_PASSED


def test_what_was_written_for_other_exercises_may_be_used(
    chapter: Chapter, learner: Learner
) -> None:
    def change(notebook: NotebookNode) -> None:
        stub = (
            "def double(x):\n    raise NotImplementedError('99.1: your code here')\n\nsixteen = 16"
        )
        demo.fill_in(notebook, answer_1=stub, answer_3="blocks = four\ntokens = sixteen * four")
        insert(notebook, "check-1", "four = 4")
        insert(notebook, "check-2", "import os")

    assert states(judge(chapter, learner(change))) == ALL_PASSED | {"99.1": NOT_ATTEMPTED}
    assert states(judge(chapter, learner(change), ids={"99.3"})) == {"99.3": PASSED}

    def ends(notebook: NotebookNode) -> None:
        change(notebook)
        demo.fill_in(notebook, answer_2="exit()", answer_3="blocks = four\ntokens = 64")

    assert states(judge(chapter, learner(ends))) == ALL_PASSED | {"99.2": FAILED}


def test_answers_are_found_wherever_they_stand(chapter: Chapter, learner: Learner) -> None:
    def change(notebook: NotebookNode) -> None:
        notebook.cells = [cell for cell in notebook.cells if role(cell)[0] == "exercise"][::-1]

    assert states(judge(chapter, learner(change))) == ALL_PASSED


def test_a_notebook_whose_cells_lost_their_ids(chapter: Chapter, learner: Learner) -> None:
    path = learner()
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        del cell["id"]
    notebook.nbformat_minor = 4
    nbformat.write(notebook, path)
    groups = graft(path, chapter)
    assert not any(cell.kind == "own" for group in groups for cell in group.cells)
    assert states(judge(chapter, path)) == ALL_PASSED


# --- what is wrong, and a saved notebook would hide -----------------------------------------------


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (saved_as_passed, None),
        (run_and_saved, None),
        (outputs_cleared, None),
        (check_prints_what_it_should, "Its check cell was changed"),
        (exceptions_swallowed, "Its check cell was changed"),
        (checks_deleted, "Its check cell was deleted"),
        (markers, "NBVAL markers in an answer are ignored"),
        (check_redefined_in_own_cell, "Your cells redefine `check`"),
        (check_redefined_in_answer, "Your cells redefine `check`"),
        (check_replaced_in_the_setup, "Your cells redefine `check`"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_a_wrong_answer_stays_wrong(
    chapter: Chapter, learner: Learner, change: Callable, note: str | None
) -> None:
    def wrong(notebook: NotebookNode) -> None:
        demo.fill_in(notebook, answer_1=WRONG)
        change(notebook)

    verdict = judge(chapter, learner(wrong), ids={"99.1"})["99.1"]
    assert (verdict.state, verdict.name) == (FAILED, "squared")
    assert verdict.message.startswith(
        "You square; twice is asked for.\nWith x = 3: got 9, expected 6"
    )
    assert note is None or any(note in text for text in verdict.notes), verdict.notes


def test_a_namespace_wiped_is_not_passed(chapter: Chapter, learner: Learner) -> None:
    path = learner(lambda notebook: insert(notebook, "answer-1", "%reset -f"))
    verdict = judge(chapter, path, ids={"99.1"})["99.1"]
    assert verdict.state == FAILED
    assert "NameError: name 'double' is not defined" in verdict.message


def test_print_taken_away_is_no_verdict(chapter: Chapter, learner: Learner) -> None:
    path = learner(
        lambda notebook: insert(notebook, "picture", "import io, sys\nsys.stdout = io.StringIO()")
    )
    verdict = judge(chapter, path, ids={"99.1"})["99.1"]
    assert (verdict.state, verdict.name) == (FAILED, "no-verdict")
    assert "sys.stdout" in verdict.message


# --- answers that are not there -------------------------------------------------------------------


def test_stubs_are_not_attempted(chapter: Chapter) -> None:
    began = time.perf_counter()
    assert set(states(judge(chapter, chapter.exercises)).values()) == {NOT_ATTEMPTED}
    assert time.perf_counter() - began < 1, "no kernel is needed to know that"


def test_an_empty_answer_is_not_attempted_and_a_renamed_one_is_told(
    chapter: Chapter, learner: Learner
) -> None:
    path = learner(
        lambda notebook: demo.fill_in(
            notebook, answer_1="def my_double(x): return 2 * x", answer_2="# later"
        )
    )
    found = judge(chapter, path)
    assert states(found) == {"99.1": FAILED, "99.2": NOT_ATTEMPTED, "99.3": PASSED}
    assert "NameError: name 'double' is not defined" in found["99.1"].message
    assert "Your answer does not define double, which its check asks for." in found["99.1"].notes


def test_half_an_answer_is_not_attempted(chapter: Chapter, learner: Learner) -> None:
    half = demo.DOUBLE.replace(
        "result = x * by\n    return result", 'raise NotImplementedError("99.1: your code here")'
    )
    path = learner(
        lambda notebook: demo.fill_in(notebook, answer_1=half, answer_3="blocks = 4\ntokens = ...")
    )
    found = judge(chapter, path)
    assert states(found) == {"99.1": NOT_ATTEMPTED, "99.2": PASSED, "99.3": NOT_ATTEMPTED}
    assert "your code calls _times, which is still to write" in found["99.1"].message
    assert "still to write: tokens (still `...`)" in found["99.3"].message


def test_missing_answers_are_told(chapter: Chapter, learner: Learner) -> None:
    def change(notebook: NotebookNode) -> None:
        without(notebook, "answer-1", "answer-2")
        insert(notebook, "text-2", demo.COUNTER)
        demo.find(notebook, "answer-3").cell_type = "raw"

    found = judge(chapter, learner(change))
    assert {id: verdict.name for id, verdict in found.items()} == dict.fromkeys(
        demo.SOURCES, "answer-missing"
    )
    assert "is missing from your file" in found["99.1"].message
    assert "minivllm course reset 99" in found["99.1"].message
    assert "The hints are in the notebook" in found["99.1"].message
    assert "defines Counter, but it is not the given cell for the answer" in found["99.2"].message
    assert "is a raw cell: make it code" in found["99.3"].message


def test_an_answer_in_two_cells_is_put_together(chapter: Chapter, learner: Learner) -> None:
    def split(notebook: NotebookNode) -> None:
        answer = demo.find(notebook, "answer-1")
        first, second = demo.DOUBLE.split("\n\n\n")
        other = copy.deepcopy(answer)
        answer.source, other.source, other.id = first, second, "split"
        notebook.cells.insert(notebook.cells.index(answer) + 1, other)

    path = learner(split)
    found = judge(chapter, path)
    assert states(found) == ALL_PASSED
    assert found["99.1"].notes == (
        "It has 2 answer cells (cells 4 and 5 of your file). They were run in this order.",
    )
    assert answers(path)["99.1"] == demo.DOUBLE.replace("\n\n\n", "\n\n")


# --- answers that do not come back ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("def double(x):\n    while True: pass", "endless", "still ran after 2 seconds"),
        (
            "def double(x):\n    while True: print('on and on' * 99)",
            "endless",
            "still ran after 2 seconds",
        ),
        ("while True: pass", "endless", "While your answer ran"),
        ("def double(x): exit()", "process-ended", "calls exit()"),
        ("quit()", "process-ended", "While your answer ran: it calls exit()"),
        ("import os\ndef double(x): os._exit(0)", "process-ended", "the Python process ended"),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            "process-ended",
            "While your answer ran",
        ),
        ("def double(x):\n    import sys\n    sys.exit()", "raised", "SystemExit"),
        ("def double(x):\n    return input('x? ')", "raised", "input"),
        (
            "def double(x:\n    return 2 * x",
            "syntax-error",
            "Python cannot read the cell of your answer",
        ),
        (
            "def double(x):\n    return 2 * x\n\nraise KeyError('z')",
            "raised",
            "line 4: raise KeyError('z')",
        ),
        ("def double(x):\n    return y", "raised", "line 2 of its cell: return y"),
    ],
    ids=lambda value: value.splitlines()[-1].strip(),
)
def test_trouble_is_named_soon_and_harms_no_other(
    chapter: Chapter, learner: Learner, source: str, name: str, said: str
) -> None:
    path = learner(lambda notebook: demo.fill_in(notebook, answer_1=source))
    began = time.perf_counter()
    found = judge(chapter, path, timeout=2)
    assert time.perf_counter() - began < 20
    assert (found["99.1"].state, found["99.1"].name) == (FAILED, name), found
    assert said in found["99.1"].message
    assert found["99.1"].hinted == (name in ("raised", "endless"))
    assert found["99.1"].hinted or "The hints are in the notebook" in found["99.1"].message
    assert name != "syntax-error" or not found["99.1"].notes, (
        "that nothing is defined needs no saying"
    )
    assert states(found) == ALL_PASSED | {"99.1": FAILED}


def test_what_cannot_be_interrupted_is_ended(
    chapter: Chapter, learner: Learner, monkeypatch
) -> None:
    monkeypatch.setattr("minivllm.course.grading.runner.GRACE", 1.0)
    stubborn = (
        "import signal\ndef double(x):\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    while"
        " True: pass"
    )
    found = judge(
        chapter, learner(lambda notebook: demo.fill_in(notebook, answer_1=stubborn)), timeout=2
    )
    assert "could not be interrupted" in found["99.1"].message
    assert states(found) == ALL_PASSED | {"99.1": FAILED}


@pytest.mark.parametrize("source", ["while True: pass", "exit()", "import os; os._exit(1)"])
def test_cells_of_their_own_decide_nothing(chapter: Chapter, learner: Learner, source: str) -> None:
    path = learner(lambda notebook: insert(notebook, "check-2", source))
    assert states(judge(chapter, path, timeout=2)) == ALL_PASSED


def test_a_cell_that_ends_the_process_before_the_check_is_named(
    chapter: Chapter, learner: Learner
) -> None:
    found = judge(
        chapter, learner(lambda notebook: insert(notebook, "answer-2", "exit()")), timeout=2
    )
    assert states(found) == ALL_PASSED | {"99.2": FAILED}
    assert "While a cell of yours ran: it calls exit()" in found["99.2"].message
    found = judge(chapter, learner(lambda notebook: insert(notebook, "setup", "exit()")), timeout=2)
    assert {verdict.name for verdict in found.values()} == {"process-ended"}


def test_what_a_cell_of_theirs_raises_is_noted_when_it_may_matter(
    chapter: Chapter, learner: Learner
) -> None:
    def change(notebook: NotebookNode) -> None:
        demo.fill_in(notebook, answer_1="def double(x): return helper(x)")
        insert(notebook, "setup", "def helper(x) return 2 * x")

    verdict = judge(chapter, learner(change))["99.1"]
    assert verdict.name == "raised"
    assert any("A cell of yours raises SyntaxError" in note for note in verdict.notes)


def test_what_given_cells_raise_is_noise_once_the_check_has_spoken(
    chapter: Chapter, learner: Learner
) -> None:
    for answer, noted in (
        ("def double(x): return x / 0", False),
        ("def doubled(x): return 2 * x", True),
    ):
        verdict = judge(
            chapter, learner(lambda n, answer=answer: demo.fill_in(n, answer_1=answer))
        )["99.1"]
        assert verdict.name == "raised"
        assert any("A given cell raises" in note for note in verdict.notes) == noted, verdict


def test_a_changed_setup_is_said_once_and_not_to_those_who_passed(
    chapter: Chapter, learner: Learner
) -> None:
    def change(notebook: NotebookNode) -> None:
        demo.find(notebook, "setup").source += "\noffset = 3"
        demo.find(notebook, "picture").source += "\n# tried"

    assert not any(verdict.notes for verdict in judge(chapter, learner(change)).values())

    def wrong(notebook: NotebookNode) -> None:
        change(notebook)
        demo.fill_in(notebook, answer_2="Counter = dict", answer_3="blocks, tokens = 3, 64")

    found = judge(chapter, learner(wrong))
    said = (
        "Cell 2 of your file is a given cell, and it was changed. The original was run first, and"
        " then your version."
    )
    assert [found[id].notes for id in demo.SOURCES] == [(), (said,), ()]

    def ends(notebook: NotebookNode) -> None:
        wrong(notebook)
        demo.fill_in(
            notebook, answer_2="class Counter: pass\nexit()", answer_3="blocks, tokens = 3, 64"
        )

    found = judge(chapter, learner(ends))
    assert [found[id].notes for id in demo.SOURCES] == [
        (),
        (said,),
        (),
    ], "not again after a new kernel"


def test_not_runnable_here_is_never_passed(chapter: Chapter, learner: Learner) -> None:
    cell = demo.find(chapter.solution, "setup")
    cell.source = cell.source.replace(
        "    suspects = ",
        "    from minivllm.course.grading.errors import NotRunnableHere\n"
        "    raise NotRunnableHere('Triton has no wheels')\n    suspects = ",
    )
    chapter.digests.unlink()
    verdict = judge(chapter, learner())["99.1"]
    assert (verdict.state, verdict.message) == (NOT_RUNNABLE, "Triton has no wheels")


# --- files ----------------------------------------------------------------------------------------


def test_a_changed_solution_is_refused_and_says_how_to_restore_it(
    chapter: Chapter, learner: Learner
) -> None:
    path = learner()
    notebook = copy.deepcopy(chapter.solution)
    demo.find(notebook, "check-2").source = "print('99.2 passed: counts')"
    nbformat.write(notebook, chapter.solution_path)
    with pytest.raises(
        ChangedSolutionError, match=r"the check of 99\.2.*git checkout -- solutions/99_demo\.ipynb"
    ):
        graft(path, Chapter(chapter.root, chapter.name))


def test_a_solution_run_again_or_with_another_answer_is_none_the_worse(
    chapter: Chapter, learner: Learner
) -> None:
    notebook = copy.deepcopy(chapter.solution)
    answer = demo.find(notebook, "answer-1")
    answer.source = answer.source.replace("x * by", "x + x")
    demo.find(notebook, "picture").outputs = []
    notebook.metadata.language_info.version = "3.99"
    nbformat.write(notebook, chapter.solution_path)
    assert states(judge(Chapter(chapter.root, chapter.name), learner())) == ALL_PASSED


def test_files_that_cannot_be_read(chapter: Chapter) -> None:
    chapter.exercises.write_text("<<<<<<< HEAD\n{}")
    with pytest.raises(CourseNotFoundError, match="not a notebook that can be read"):
        graft(chapter.exercises, chapter)
    chapter.exercises.unlink()
    with pytest.raises(CourseNotFoundError, match="minivllm course reset 99"):
        graft(chapter.exercises, chapter)
    chapter.solution_path.unlink()
    with pytest.raises(
        ChangedSolutionError, match=r"99_demo\.ipynb is missing.*git checkout -- solutions/99_demo"
    ):
        graft(chapter.exercises, Chapter(chapter.root, chapter.name))


def test_chapter_of(chapter: Chapter, learner: Learner, tmp_path: Path) -> None:
    path = learner()
    elsewhere = tmp_path / "exercises" / "mine.ipynb"
    elsewhere.write_bytes(path.read_bytes())
    assert chapter_of(path) == chapter_of(elsewhere) == chapter
    assert chapter_of(chapter.solution_path) is None
    assert chapter_of(tmp_path / "missing.ipynb") is None
    path.write_text("not json")
    assert chapter_of(path) == chapter


def test_answers_by_id(learner: Learner) -> None:
    path = learner(lambda notebook: demo.fill_in(notebook, answer_3="# NBVAL_SKIP\nblocks = 5"))
    found = answers(path)
    assert found["99.1"] == demo.DOUBLE
    assert found["99.3"] == "# (a marker stood here)\nblocks = 5"
    assert set(found) == set(demo.SOURCES)
