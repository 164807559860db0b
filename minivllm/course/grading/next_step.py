"""What a learner does after an exercise has passed: the next exercise, or the next chapter.

`check` shows it below the line of a passed exercise, with a link, where a notebook runs.
`minivllm check` prints it in words. What is shown goes out as display data, because the text on
stdout is what a graded run compares.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from minivllm.course.navigation import neighbours
from minivllm.course.notebooks import ROAD, Chapter, Statement, chapters, find_root, role
from minivllm.errors import MiniVLLMError

#: Set in the environment of a kernel that grades: there nobody reads what is shown.
GRADED_RUN = "MINIVLLM_GRADED_RUN"
#: The chapter after whose exercises all pieces of the capstone are written.
CAPSTONE_AFTER = "07"
_CAPSTONE = "`minivllm check capstone` runs what you wrote in chapters 01 to 07 as one engine."


def show(id: str) -> None:
    """Display the step after exercise id, where a Jupyter kernel runs this code for a reader.

    Elsewhere, and where the course's notebooks cannot be read, nothing is shown.
    """
    if GRADED_RUN in os.environ or not _in_a_notebook():
        return
    from IPython.display import display

    try:
        markdown = after(id, find_root())
    except MiniVLLMError:
        return
    if markdown:
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "")
        display({"text/markdown": markdown, "text/plain": words}, raw=True)


def _in_a_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def after(id: str, root: Path) -> str:
    """The step after exercise id, in Markdown for a page in exercises/ or solutions/ of root.

    "" where root has no such exercise. ChangedSolutionError where its solution cannot be read.
    """
    chapter = next((one for one in chapters(root) if one.number == id.partition(".")[0]), None)
    statements = chapter.statements if chapter else []
    at = next((i for i, statement in enumerate(statements) if statement.id == id), None)
    if chapter is None or at is None:
        return ""
    if at + 1 < len(statements):
        following = statements[at + 1]
        link = f"{chapter.name}.ipynb#cell-id={_cell_id(chapter, following)}"
        about = f"{following.difficulty}, {following.minutes} minutes"
        return f"Next: [{following.id} {following.title}]({link}) ({about})"
    lines = [
        f"That was the last exercise of this chapter. `minivllm check {chapter.number}` in a"
        " terminal checks them all, and puts them on your record.",
        *[_CAPSTONE] * (chapter.number == CAPSTONE_AFTER),
    ]
    if page := _next_page(chapter):
        label = f"{page[:2]} {next(stop.title for stop in ROAD if stop.name == page)}"
        lines.append(f"Next chapter: [{label}](../notebooks/{page}.ipynb)")
    return " ".join(lines)


def after_chapter(chapter: Chapter) -> str:
    """The step after a chapter whose exercises have all passed, for a terminal; "" at the end."""
    page = _next_page(chapter)
    return f"read notebooks/{page}.ipynb, the next chapter." if page else ""


def _next_page(chapter: Chapter) -> str:
    """The name of the chapter after this one; "" where there is none, or none in this root."""
    if chapter.name not in [stop.name for stop in ROAD]:
        return ""
    _, following = neighbours(chapter.name)
    known = following and Chapter(chapter.root, following.name).notebook.exists()
    return following.name if following and known else ""


def _cell_id(chapter: Chapter, statement: Statement) -> str:
    """The id of the cell with a statement. JupyterLab's links can name a cell by it."""
    return next(c.id for c in chapter.solution.cells if role(c) == ("statement", statement.id))
