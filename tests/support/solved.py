"""A repository whose learner has solved all exercises.

It holds copies of the exercises with the solutions' answers filled in.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import nbformat

from minivllm.course.notebooks import Chapter, role
from minivllm.course.stubs import make_exercises


def answers_of(chapter: Chapter) -> dict[str, str]:
    """The solution's answers, by exercise."""
    return {
        role(cell)[1]: cell.source for cell in chapter.solution.cells if role(cell)[0] == "exercise"
    }


def write_solved(root: Path, chapters: Iterable[Chapter]) -> Path:
    """Write these chapters' solutions and solved exercises below root, and return root."""
    for folder in ("notebooks", "solutions", "exercises"):
        (root / folder).mkdir()
    for chapter in chapters:
        shutil.copy(chapter.solution_path, root / "solutions")
        notebook, right = make_exercises(chapter), answers_of(chapter)
        for cell in notebook.cells:
            if role(cell)[0] == "exercise":
                cell.source = right[role(cell)[1]]
        nbformat.write(notebook, root / "exercises" / f"{chapter.name}.ipynb")
    return root
