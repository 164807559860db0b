"""A family of classes as a tree, for example the errors of the package."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass

from minivllm.viz import palette
from minivllm.viz.figure import WIDTH, Figure, describe

#: Inches: the height of a line, the indent of a level, and where the second column begins.
_LINE, _INDENT, _SECOND = 0.245, 0.28, 3.0
#: The most letters of a sentence in the second column.
_LETTERS = 90


@dataclass(frozen=True)
class Member:
    """One class of a family: its depth below the root, and the first sentence about it."""

    name: str
    depth: int
    sentence: str


def family(root: type) -> list[Member]:
    """The root and its subclasses in the same module, parents first, in order of definition.

    A class with several parents stands below the first of them that belongs to the family.
    """
    found: list[Member] = []

    def visit(kind: type, depth: int) -> None:
        text = inspect.getdoc(kind) or ""
        found.append(Member(kind.__name__, depth, text.replace("\n", " ").partition(". ")[0]))
        for child in kind.__subclasses__():
            parents = [base for base in child.__bases__ if issubclass(base, root)]
            if child.__module__ == root.__module__ and parents[0] is kind:
                visit(child, depth + 1)

    visit(root, 0)
    return found


def draw_class_tree(root: type, title: str) -> Figure:
    """Draw the subclasses of a class as a tree.

    Those directly below the root bring the first sentence of their docstring.
    """
    members = family(root)
    figure = Figure(0.55 + _LINE * len(members))
    height = figure.get_figheight()
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    ax.text(0.15, 0.26, title, fontsize=12, weight="bold", color=palette.INK, va="center")
    line = {"color": palette.LINE, "linewidth": 1.2}
    parents: dict[int, float] = {}
    for row, member in enumerate(members):
        x, y = 0.15 + _INDENT * member.depth, 0.6 + _LINE * row
        parents[member.depth] = y
        if member.depth:
            stem = x - 0.6 * _INDENT
            ax.plot([stem, stem, x - 0.05], [parents[member.depth - 1] + 0.09, y, y], **line)
        weight = "bold" if member.depth < 2 else "normal"
        ax.text(x, y, member.name, fontsize=9.5, weight=weight, color=palette.INK, va="center")
        if member.depth > 1:
            continue
        text = textwrap.shorten(member.sentence.rstrip("."), _LETTERS, placeholder=" …")
        ax.text(_SECOND, y, text, fontsize=8.5, color=palette.SOFT_INK, va="center")
    first = [member.name for member in members if member.depth == 1]
    alt = f"Picture: {root.__name__} and the {len(members) - 1} classes below it, as a tree."
    alt += f" Directly below {root.__name__}: {', '.join(first)}."
    describe(figure, alt, f"What is bold lies directly below {root.__name__}.")
    return figure
