"""One learner's journey: every chapter's exercises solved and checked in turn, then the capstone.

It goes by the commands that a learner types. What they keep of one chapter stands in the records of
the next: the last test finds all pieces checked, as `minivllm course` says on the way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from minivllm.cli.app import app
from minivllm.course.grading.records import NOT_RUNNABLE, PASSED, Records
from minivllm.course.notebooks import Chapter, chapters
from support.solved import write_solved

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = chapters(ROOT)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_solved(tmp_path_factory.mktemp("journey"), CHAPTERS)


@pytest.fixture(autouse=True)
def _there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")


def minivllm(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("chapter", CHAPTERS, ids=[f"ch{chapter.number}" for chapter in CHAPTERS])
def test_a_chapter(root: Path, chapter: Chapter) -> None:
    said = minivllm("check", chapter.number)
    records = Records(root)
    states = {statement.id: records[statement.id].state for statement in chapter.statements}
    assert states
    assert set(states.values()) <= {PASSED, NOT_RUNNABLE}, said
    assert f"{list(states.values()).count(PASSED)} of {len(states)} passed." in said


def test_the_capstone() -> None:
    assert "You have built an inference engine." in minivllm("check", "capstone")
    said = minivllm("course")
    assert "All exercises have passed." in said
    assert "the engine that you wrote: passed" in said
