"""One learner's journey: every chapter's exercises solved and checked in turn, then the capstone.

It goes by the commands that a learner types. What they keep of one chapter stands in the records of
the next: the last test finds all pieces checked, as `minivllm course` says on the way.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minivllm.cli.app import app
from minivllm.course.grading.capstone.pieces import PIECES
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


def test_the_capstone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    said = minivllm("check", "capstone")
    assert said.count("✓") == len(PIECES)
    assert "You have built an inference engine." in said
    assert "tokens per second" in said
    assert "rounds in turn, medians" in said
    assert "minivllm chat --mine" in said
    calls = dict(re.findall(r"✓ .* (\w+) +\d\d\.\d +([\d,]+) calls", said))
    assert set(calls) == {piece.answer for piece in PIECES}
    assert "0" not in calls.values()

    page = (root / "exercises/my_engine.html").read_text(encoding="utf-8")
    assert "Once" in page
    assert all(piece.answer in page for piece in PIECES)
    assert "http" not in page

    said = minivllm("course")
    assert "All exercises have passed." in said
    assert "the engine that you wrote: passed" in said
