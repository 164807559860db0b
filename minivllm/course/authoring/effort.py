"""How many exercises a chapter has and how long they take, wherever a page says so.

The statements say it: each has a line like `●●○ · 15 minutes`. Chapters, exercises and the table in
README.md repeat the sums, so nobody writes those by hand: `python -m minivllm.course.authoring
links` does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.course.notebooks import Chapter, road

if TYPE_CHECKING:
    from nbformat import NotebookNode

#: What a page says -> how it is said. A sum stands near the top of a page.
_SAID = {
    re.compile(r"\bThe \d+ exercises of this\b"): "The {count} exercises of this",
    re.compile(r"\babout \d+ minutes\s+together\b"): "about {minutes} minutes together",
    re.compile(r"\b\d+ minutes of exercises\b"): "{minutes} minutes of exercises",
}
_TOP = 5


def refresh_page(notebook: NotebookNode, chapter: Chapter) -> None:
    """Write the sums of a chapter's exercises into one of its pages. The other texts stay."""
    if not chapter.solution_path.exists():
        return
    minutes = sum(statement.minutes for statement in chapter.statements)
    for cell in notebook.cells[:_TOP]:
        if cell.cell_type == "markdown":
            for said, how in _SAID.items():
                text = how.format(count=len(chapter.statements), minutes=minutes)
                cell.source = said.sub(text, cell.source)


def refresh_table(readme: str, root: Path) -> str:
    """README.md with the minutes of the chapters in root, in the last column of its table."""
    said = {
        f"](notebooks/{stop.name}.ipynb) |": (
            f"{stop.reading}, {stop.exercises}" if stop.exercises else f"{stop.reading}"
        )
        for stop in road(root)
        if stop.reading
    }
    lines = readme.split("\n")
    for i, line in enumerate(lines):
        for chapter, minutes in said.items():
            if line.startswith("| ") and chapter in line:
                lines[i] = re.sub(r"\|[^|]*\|$", f"| {minutes} |", line)
    return "\n".join(lines)
