"""The links from each page of the course to its neighbours.

A page is a notebook in notebooks/, exercises/ or solutions/. Each page has two cells of links, with
the ids `TOP` (below the title) and `BOTTOM` (at the end): to the chapter before, the tour, the
exercises or the chapter that belong to the page, and the chapter after. In exercises/, the cell at
the top also says where the solutions are and when to look. The texts are computed from `ROAD`, so
nobody writes them by hand: `python -m minivllm.course.authoring links` writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minivllm.course.notebooks import ROAD, Stop

if TYPE_CHECKING:
    from nbformat import NotebookNode

TOP, BOTTOM = "nav-top", "nav-bottom"
#: The chapters without exercises.
ONLY_READ = ("00_tour", "11_using_minivllm")
TOUR = "00_tour"
_ADVICE = {
    "exercises": (
        "One answer to each exercise is in [solutions/{name}.ipynb](../solutions/{name}.ipynb)."
        " Look there after an honest try and after the last hint, or as soon as your own answer has"
        " passed. Then compare the two line by line: you see what the other answer does in fewer"
        " steps, and which cases only one of them treats."
    ),
    "solutions": (
        "This page has one answer to each exercise of"
        " [exercises/{name}.ipynb](../exercises/{name}.ipynb). Try each exercise there first: an"
        " answer that you read teaches less than one that you compare with your own."
    ),
}


def neighbours(name: str) -> tuple[Stop | None, Stop | None]:
    """The chapters before and after a chapter; None at the ends of the course.

    ValueError where the course has no chapter of this name.
    """
    at = [stop.name for stop in ROAD].index(name)
    before = ROAD[at - 1] if at else None
    return before, ROAD[at + 1] if at + 1 < len(ROAD) else None


def links(folder: str, name: str) -> str:
    """The line of links of the page folder/name.ipynb, as Markdown.

    folder: "notebooks", "exercises" or "solutions". ValueError where there is no such chapter.
    """
    chapters = "" if folder == "notebooks" else "../notebooks/"
    before, after = neighbours(name)
    number, parts = name[:2], []
    if before:
        parts.append(f"[← {_label(before)}]({chapters}{before.name}.ipynb)")
    if before and before.name != TOUR:
        parts.append(f"[the tour]({chapters}{TOUR}.ipynb)")
    if folder != "notebooks":
        parts.append(f"[chapter {number}]({chapters}{name}.ipynb)")
    if folder != "exercises" and name not in ONLY_READ:
        parts.append(f"[exercises {number}](../exercises/{name}.ipynb)")
    if after:
        parts.append(f"[{_label(after)} →]({chapters}{after.name}.ipynb)")
    return " · ".join(parts)


def _label(stop: Stop) -> str:
    return stop.title if stop.name == TOUR else f"{stop.number} {stop.title}"


def source(id: str, folder: str, name: str) -> str:
    """The source of the navigation cell `TOP` or `BOTTOM` of the page folder/name.ipynb."""
    line = links(folder, name)
    if id == TOP and folder in _ADVICE:
        return f"{line}\n\n{_ADVICE[folder].format(name=name)}"
    return line


def place(notebook: NotebookNode, folder: str, name: str) -> None:
    """Put the two cells of links into the notebook of the page folder/name.ipynb.

    Cells of links that are there already are replaced. The other cells do not change.
    """
    from nbformat.v4 import new_markdown_cell

    top, bottom = (new_markdown_cell(source(id, folder, name), id=id) for id in (TOP, BOTTOM))
    others = [cell for cell in notebook.cells if cell.get("id") not in (TOP, BOTTOM)]
    notebook.cells = [*others[:1], top, *others[1:], bottom]
