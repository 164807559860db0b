"""The demo chapter, and learners' copies of its exercises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from minivllm.course.authoring.tool import write_stubs
from minivllm.course.notebooks import Chapter
from minivllm.course.stubs import make_exercises
from support import demo


@pytest.fixture
def chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chapter:
    """A repository with chapter 99 in it, published: exercises and digests are written."""
    monkeypatch.setattr("minivllm.course.notebooks.DIGESTS", tmp_path)
    chapter = demo.make_chapter(tmp_path)
    assert write_stubs(chapter) == []
    return chapter


@pytest.fixture
def learner(chapter: Chapter) -> Callable[..., Path]:
    """learner(change): the path of exercises whose answers are right, after change(notebook) and
    saving.
    """

    def save(change: Callable[[NotebookNode], None] = lambda notebook: None) -> Path:
        notebook = make_exercises(chapter)
        demo.fill_in(notebook)
        change(notebook)
        nbformat.write(notebook, chapter.exercises)
        return chapter.exercises

    return save
