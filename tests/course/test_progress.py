"""`minivllm check`, `minivllm course` and `minivllm course reset`: what they say, write, and answer
with.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from typer.testing import CliRunner

from minivllm.cli.app import app
from minivllm.course.grading import exercise
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.notebooks import Chapter, Statement, Stop, find_root, read
from minivllm.course.stubs import make_exercises
from support import demo
from support.learners_files import WRONG, without

pytestmark = pytest.mark.slow

Learner = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_the_repository(chapter: Chapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chapter.root)
    monkeypatch.setenv("COLUMNS", "200")


def minivllm(*arguments: str, code: int = 0) -> str:
    """What the command prints, lines joined where the terminal broke them."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.output


def two_wrong(notebook: NotebookNode) -> None:
    demo.fill_in(notebook, answer_1=WRONG, answer_3="blocks = ...\ntokens: int = ...  # yet")


# --- check ----------------------------------------------------------------------------------------


def test_check_says_how_each_exercise_is(learner: Learner) -> None:
    learner(two_wrong)
    said = minivllm("check", "99", code=1)
    assert "99 demo  (exercises/99_demo.ipynb)" in said
    assert " ✗ 99.1  Double: failed: squared\n        You square; twice is asked for." in said
    assert "Hint 1 of 1: Twice." in said
    assert " ✓ 99.2  Debug this: passed\n" in said
    assert " · 99.3  Predict: not attempted · 5 minutes\n" in said
    assert "1 of 3 passed." in said


def test_hints_come_one_by_one_with_answers_that_fail(chapter: Chapter, learner: Learner) -> None:
    text = demo.find(chapter.solution, "text-1")
    text.source += "<details><summary>Hint 2</summary>\n\nNearly all.\n\n</details>"
    nbformat.write(chapter.solution, chapter.solution_path)
    learner(two_wrong)
    for _ in range(2):  # the same answer again is no new try
        assert "Hint 1 of 2: Twice." in minivllm("check", "99.1", code=1)
    learner(lambda notebook: demo.fill_in(notebook, answer_1="def double(x): return x"))
    for _ in range(2):
        assert "Hint 2 of 2: Nearly all." in minivllm("check", "99.1", code=1)


def test_a_hint_s_lines_are_joined_but_not_its_lists(chapter: Chapter, learner: Learner) -> None:
    text = demo.find(chapter.solution, "text-1")
    text.source = text.source.replace("Twice.", "Once, and\nonce more:\n\n- one\n- two")
    nbformat.write(chapter.solution, chapter.solution_path)
    learner(two_wrong)
    said = [line.strip() for line in minivllm("check", "99.1", code=1).splitlines()]
    assert "Hint 1 of 1: Once, and once more:" in said
    assert {"- one", "- two"} <= set(said)


def test_a_hint_may_belong_to_the_mistake(chapter: Chapter, learner: Learner, monkeypatch) -> None:
    known = (Known("squared", hint=2),)
    monkeypatch.setitem(exercise._DRAFTS, "99.1", Exercise("99.1", "Double", str, known))
    text = demo.find(chapter.solution, "text-1")
    text.source += "<details><summary>Hint 2</summary>\n\nNot a square.\n\n</details>"
    nbformat.write(chapter.solution, chapter.solution_path)
    learner(two_wrong)
    assert "Hint 2 of 2: Not a square." in minivllm("check", "99.1", code=1)


@pytest.mark.parametrize("source", ["def double(x) return 2 * x", "exit()", None])
def test_no_hint_is_about_a_file_that_does_not_run(learner: Learner, source: str | None) -> None:
    def change(notebook: NotebookNode) -> None:
        demo.fill_in(notebook, answer_1=source or "")
        without(notebook, *["answer-1"] * (source is None))

    learner(change)
    said = minivllm("check", "99.1", code=1)
    assert "The hints are in the notebook, under the statement of the exercise." in said
    assert "Hint 1" not in said
    assert json.loads(Path("exercises/.progress.json").read_text())["99.1"]["tries"] == 0


def test_all_right_exits_with_0(learner: Learner) -> None:
    learner()
    assert "3 of 3 passed." in minivllm("check")


def test_check_ends_with_the_next_step(chapter: Chapter, learner: Learner, monkeypatch) -> None:
    first = "Next: 99.1, Double (5 minutes), in exercises/99_demo.ipynb; then minivllm check 99"
    learner(two_wrong)
    assert minivllm("check", "99", code=1).splitlines()[-1] == first
    learner(lambda notebook: demo.fill_in(notebook, answer_3="blocks = ...\ntokens: int = ..."))
    assert minivllm("check", "99", code=1).splitlines()[-1].startswith("Next: 99.3, Predict")
    learner()
    assert "Next:" not in minivllm("check", "99"), "no chapter comes after it"

    nbformat.write(nbformat.v4.new_notebook(), chapter.root / "notebooks/98_more.ipynb")
    for module in ("notebooks", "navigation", "grading.next_step"):
        road = (Stop("99_demo", "use", "a demo"), Stop("98_more", "use", "more"))
        monkeypatch.setattr(f"minivllm.course.{module}.ROAD", road)
    last = minivllm("check", "99").splitlines()[-1]
    assert last == "Next: read notebooks/98_more.ipynb, the next chapter."
    assert "Next:" not in minivllm("check", str(learner().rename(chapter.root / "copy.ipynb")))


@pytest.mark.parametrize(
    "what", ["99", "99_demo", "exercises/99_demo.ipynb", "solutions/99_demo.ipynb"]
)
def test_a_chapter_has_many_names(learner: Learner, what: str) -> None:
    learner(lambda notebook: without(notebook, "answer-1", "answer-2", "answer-3"))
    assert "0 of 3 passed." in minivllm("check", what, code=1)


def test_one_exercise_is_enough(learner: Learner) -> None:
    learner(two_wrong)
    said = minivllm("check", "99.2")
    assert "99.2" in said
    assert "99.1" not in said


def test_a_copy_elsewhere_is_checked(chapter: Chapter, learner: Learner) -> None:
    copy = chapter.root / "mine.ipynb"
    learner().replace(copy)
    assert "99 demo  (mine.ipynb)" in minivllm("check", "mine.ipynb")


def test_it_works_in_a_subfolder(
    chapter: Chapter, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner(two_wrong)
    monkeypatch.chdir(chapter.root / "notebooks")
    assert "1 of 1 passed." in minivllm("check", "99.2")
    assert "0 of 1 passed." in minivllm("check", "99.3", code=1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("12", "There are no exercises '12'. Chapters with exercises: 99."),
        ("99.7", "There is no exercise 99.7. Chapter 99 has 99.1, 99.2, 99.3."),
        ("nowhere/x.ipynb", "There is no file nowhere/x.ipynb"),
        ("", "There are no exercises ''"),
    ],
)
def test_what_does_not_exist_is_an_error(what: str, message: str) -> None:
    assert message in minivllm("check", what, code=2)


def test_where_nothing_was_begun(chapter: Chapter) -> None:
    assert "minivllm course" in minivllm("check", code=1)
    chapter.exercises.unlink()
    assert "minivllm course reset 99" in minivllm("check", "99", code=2)


def test_a_changed_solution_is_an_error_that_says_what_to_do(
    chapter: Chapter, learner: Learner
) -> None:
    learner()
    demo.find(chapter.solution, "check-1").source += "  # mine"
    nbformat.write(chapter.solution, chapter.solution_path)
    for command in (["check", "99"], ["check"], ["course", "reset", "99"]):
        said = minivllm(*command, code=2)
        assert "the check of 99.1" in said
        assert "git checkout -- solutions/99_demo.ipynb" in said
    assert "git checkout -- solutions/99_demo.ipynb" in minivllm("course")


def test_without_the_notebooks_it_says_so(
    tmp_path_factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setattr(
        "minivllm.course.notebooks.__file__",
        str(elsewhere / "site-packages/minivllm/course/notebooks.py"),
    )
    monkeypatch.chdir(elsewhere)
    for command in (["check"], ["course"], ["course", "reset", "1"]):
        assert "minivllm is installed without them" in minivllm(*command, code=2)


def test_without_jupyter_it_says_so(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner()
    monkeypatch.setitem(__import__("sys").modules, "nbformat", None)
    assert "make lab" in minivllm("check", "99", code=2)
    monkeypatch.undo()


def test_the_repository_is_found_from_inside(chapter: Chapter) -> None:
    assert find_root(chapter.root / "exercises") == chapter.root
    assert (find_root(Path("/")) / "minivllm").is_dir(), "the one that the package stands in"


# --- course ---------------------------------------------------------------------------------------


def test_course_says_what_to_do_next(chapter: Chapter, learner: Learner) -> None:
    text = "# Demo\n\n20 minutes"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    nbformat.write(notebook, chapter.notebook)
    said = minivllm("course")
    assert "0 of 3" in said
    assert "35 minutes left." in said
    assert "Next: read notebooks/99_demo.ipynb, then open exercises/99_demo.ipynb." in said

    learner(two_wrong)
    said = minivllm("course")
    assert "? ? ·" in said
    assert "15 minutes left." in said
    assert "Next: minivllm check 99" in said

    minivllm("check", code=1)
    said = minivllm("course")
    assert "✗ ✓ ·" in said
    assert "1 of 3" in said
    assert "10 minutes left." in said
    assert (
        "Next: 99.1, Double (5 minutes), in exercises/99_demo.ipynb; then minivllm check 99" in said
    )

    learner()
    assert "? ✓ ?" in minivllm("course"), "what was changed since has not been checked"
    minivllm("check")
    assert "All exercises have passed." in minivllm("course")


DAMAGED: list[bytes] = [
    b"",
    b"[]",
    b"null",
    b"3",
    b'{"99.1": 3}',
    b'{"99.1": {"colour": "red"}}',
    b"\x00",
    b"\xff\xfe",
    b'{"99.1": ',
    b'{"99.1": {"state": 5}}',
    b'{"99.1": {"state": []}}',
    b'{"99.1": {"state": "great"}}',
    b'{"99.1": {"tries": "1"}}',
    b'{"99.1": {"tries": -1}}',
    b'{"99.1": {"tries": true}}',
    b'{"99.1": {"answer": 1}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("kept", DAMAGED)
def test_a_damaged_record_is_said_once_and_kept(
    chapter: Chapter, learner: Learner, kept: bytes
) -> None:
    learner(two_wrong)
    record, aside = (
        chapter.root / "exercises" / name for name in (".progress.json", ".progress.damaged-1.json")
    )
    record.write_bytes(kept)
    said = minivllm("course")
    assert f"{record} cannot be read (" in said
    assert f"It is kept as {aside.name}. All exercises count as not checked" in said
    assert "Next: minivllm check 99" in said
    assert aside.read_bytes() == kept
    assert "cannot be read" not in minivllm("course")
    assert "cannot be read" not in minivllm("check", "99.2")
    assert json.loads(record.read_text())["99.2"]["state"] == "passed"
    assert aside.read_bytes() == kept


@pytest.mark.parametrize("command", [["course"], ["check", "99.2"], ["check", "capstone"]])
def test_every_command_says_that_the_record_is_damaged(
    learner: Learner, command: list[str], monkeypatch
) -> None:
    monkeypatch.setattr("minivllm.course.grading.capstone.command.check", lambda *_: 0)
    learner()
    for number in (1, 2):
        Path("exercises/.progress.json").write_text("damaged")
        assert minivllm(*command).count("cannot be read") == 1
        assert Path(f"exercises/.progress.damaged-{number}.json").read_text() == "damaged"


def test_a_record_that_is_a_folder_or_a_pipe(chapter: Chapter, learner: Learner) -> None:
    learner()
    record = chapter.root / "exercises/.progress.json"
    record.mkdir()
    (record / "mine").write_text("x")
    assert "it is not a file" in minivllm("check", "99.2")
    assert (chapter.root / "exercises/.progress.damaged-1.json/mine").read_text() == "x"
    record.unlink()
    os.mkfifo(record)
    assert "it is not a file" in minivllm("course")


def _fails(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_damaged_record_that_cannot_be_renamed_is_not_overwritten(
    learner: Learner, monkeypatch
) -> None:
    learner()
    record = Path("exercises/.progress.json")
    record.write_text("damaged")
    monkeypatch.setattr(Path, "rename", _fails)
    said = minivllm("check", "99.2")
    assert "cannot be renamed either (Read-only file system)" in said
    assert "1 of 1 passed." in said
    assert "could not be saved in exercises/: the damaged .progress.json is in the way" in said
    assert record.read_text() == "damaged"


def test_progress_that_cannot_be_kept_is_one_line(learner: Learner, monkeypatch) -> None:
    """And what was there is whole: it is written beside, and then takes its place."""
    learner()
    minivllm("check", "99.2")
    before = Path("exercises/.progress.json").read_bytes()
    for method in ("write_bytes", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, _fails)
            said = minivllm("check", "99.3")
        assert "Your progress could not be saved in exercises/: Read-only file system.\n" in said
        assert Path("exercises/.progress.json").read_bytes() == before
        assert list(Path("exercises").glob("*progress*")) == [Path("exercises/.progress.json")]


def test_an_answer_that_no_encoding_can_say(learner: Learner) -> None:
    """JSON may hold half a surrogate pair."""
    path = learner()
    path.write_text(path.read_text().replace("def double", "# \\ud800\\ndef double"))
    assert "is not a notebook that can be read" in minivllm("check", "99.1", code=2)


# --- reset ----------------------------------------------------------------------------------------


def test_reset_keeps_what_there_was(chapter: Chapter, learner: Learner) -> None:
    before = learner(two_wrong).read_bytes()
    assert "What you had is 99_demo.kept-1.ipynb" in minivllm("course", "reset", "99")
    assert (chapter.root / "exercises/99_demo.kept-1.ipynb").read_bytes() == before
    assert read(chapter.exercises) == make_exercises(chapter)
    assert "99_demo.kept-2.ipynb" in minivllm("course", "reset", "99")
    chapter.exercises.unlink()
    assert "kept" not in minivllm("course", "reset", "exercises/99_demo.ipynb", code=2)
    assert "kept" not in minivllm("course", "reset", "99")
    assert "Error" in minivllm("course", "reset", "12", code=2)


@pytest.mark.parametrize(("method", "call"), [("write_text", 1), ("replace", 1), ("rename", 1)])
def test_reset_where_nothing_can_be_written(
    chapter: Chapter, learner: Learner, monkeypatch, method, call
) -> None:
    """It names the folder, and nothing is half done, whichever step fails."""
    before = learner(two_wrong).read_bytes()
    names = sorted(path.name for path in chapter.exercises.parent.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(Path, method, _fails)
        if method == "replace":  # putting back is a rename
            patched.setattr(Path, "rename", Path.rename)
        said = minivllm("course", "reset", "99", code=2)
    assert (
        f"in the folder {chapter.exercises.parent}: Read-only file system. Nothing was changed."
        in said
    )
    assert chapter.exercises.read_bytes() == before
    assert sorted(path.name for path in chapter.exercises.parent.iterdir()) == names


@pytest.mark.parametrize("what", ["x" * 300, "x" * 300 + ".ipynb", "\udcff", "9" * 5000])
def test_names_that_no_file_can_have(what: str) -> None:
    assert "There " in minivllm("check", what, code=2)


def test_statements_are_read() -> None:
    text = (
        "## 01.2 · One · two\n\n●●○ · 15 minutes\n\nDo.\n\n<details><summary>Hint"
        " 1</summary>\n\nA\n</details>"
    )
    assert Statement.parse("01.2", text) == Statement("01.2", "One · two", "●●○", 15, ("A",))
    assert Statement.parse("01.2", "nothing") == Statement("01.2", "01.2", "", 0, ())
