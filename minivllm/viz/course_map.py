"""The map of the course: a box for each chapter, with its minutes.

An arrow leads from each chapter to those that need it. Chapters are plain data
(`minivllm.course.notebooks.road`). The place of a box follows from what the chapter needs.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from minivllm.viz import palette
from minivllm.viz.figure import Figure, describe

#: The size of a box, in units of a column's width and a row's height.
BOX_WIDTH, BOX_HEIGHT = 0.82, 0.66
#: Inches of a row, and of the words below the map.
ROW, MARGIN = 1.12, 0.3
WORDS = (
    "Minutes to read + minutes of exercises.   Arrow: needed for the next.   Dashed: good to know,"
    " not needed."
)
#: Too pale for the outline of a box.
YELLOW = palette.REQUESTS[5]


class StopLike(Protocol):
    """A chapter: number, title, part, minutes, and the chapters to read before.

    The chapters of one part have one colour.
    """

    number: str
    title: str
    part: str
    needs: Sequence[str]
    helps: Sequence[str]
    reading: int
    exercises: int


def columns(stops: Sequence[StopLike]) -> dict[str, int]:
    """Number -> column: one further right than the last chapter that it needs.

    ValueError when a chapter needs one that does not come before it.
    """
    column: dict[str, int] = {}
    for stop in stops:
        before = [*stop.needs, *stop.helps]
        if unknown := [number for number in before if number not in column]:
            raise ValueError(
                f"{stop.number} needs {', '.join(unknown)}, which do not come before it."
            )
        column[stop.number] = max((column[number] for number in stop.needs), default=-1) + 1
    return column


def direct(stops: Sequence[StopLike]) -> dict[str, list[str]]:
    """Number -> the chapters that it needs, without those that another of them needs already."""
    before: dict[str, set[str]] = {}
    arrows = {}
    for stop in stops:
        beyond: set[str] = set().union(*(before[number] for number in stop.needs))
        arrows[stop.number] = [number for number in stop.needs if number not in beyond]
        before[stop.number] = beyond.union(stop.needs, stop.helps)
    return arrows


def places(stops: Sequence[StopLike]) -> dict[str, tuple[int, int]]:
    """Number -> (column, row from the top).

    Row 0 is the road; chapters beside it stand below, out of the way of the arrows between others.
    A chapter that needs none and is needed by none (the tour) stands below the first chapter.
    """
    column = columns(stops)
    used = {number for stop in stops for number in (*stop.needs, *stop.helps)}
    alone = [s.number for s in stops if s.number not in used and not s.needs]
    arrows = direct(stops)
    found: dict[str, tuple[int, int]] = {}
    taken: set[tuple[int, int]] = set()
    for stop in sorted(stops, key=lambda stop: (stop.number in alone, stop.number)):
        x = column[stop.number]
        y = next(row for row in itertools.count() if (x, row) not in taken)
        found[stop.number] = (x, y)
        taken.add((x, y))
        for number in (*arrows[stop.number], *stop.helps):
            first, row = found[number]
            # An arrow crosses the columns between in the lower of its two rows.
            taken |= {(between, max(row, y)) for between in range(first + 1, x)}
    return found


def draw_course_map(stops: Sequence[StopLike]) -> Figure:
    """Draw the chapters in the order of their needs, with the minutes to read and to do each."""
    where = places(stops)
    wide, high = max(x for x, _ in where.values()) + 1, max(y for _, y in where.values()) + 1
    figure = Figure(ROW * high + MARGIN)
    colors = [color for color in palette.REQUESTS if color != YELLOW]
    ax = figure.add_axes((0.005, 0.0, 0.99, 1.0))
    ax.set(xlim=(0, wide), ylim=(high + MARGIN / ROW, 0))
    ax.axis("off")
    parts = list(dict.fromkeys(stop.part for stop in stops))
    for stop in stops:
        for number in direct(stops)[stop.number]:
            _arrow(ax, where[number], where[stop.number], "-")
        for number in stop.helps:
            _arrow(ax, where[number], where[stop.number], (0, (3, 2)))
    for stop in stops:
        _box(ax, *where[stop.number], stop, colors[parts.index(stop.part) % len(colors)])
    ax.text(0.09, high + 0.08, WORDS, fontsize=9.5, color=palette.SOFT_INK, va="center")
    describe(figure, f"{_alt(stops)} {_in_words(stops)}", _caption(stops))
    return figure


def _box(ax: Axes, column: int, row: int, stop: StopLike, color: str) -> None:
    x, y = column + (1 - BOX_WIDTH) / 2, row + (1 - BOX_HEIGHT) / 2
    style = "round,pad=0,rounding_size=0.06"
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            BOX_WIDTH,
            BOX_HEIGHT,
            boxstyle=style,
            linewidth=1.6,
            edgecolor=color,
            facecolor=palette.tint(color, 0.1),
            zorder=2,
        )
    )
    center = x + BOX_WIDTH / 2
    ax.text(
        center,
        y + 0.13,
        stop.number,
        ha="center",
        va="center",
        fontsize=10,
        weight="bold",
        color=palette.INK,
    )
    title = "\n".join(textwrap.wrap(stop.title, 12))
    ax.text(
        center,
        y + 0.34,
        title,
        ha="center",
        va="center",
        fontsize=9,
        color=palette.INK,
        linespacing=1.1,
    )
    ax.text(
        center,
        y + 0.56,
        _minutes(stop),
        ha="center",
        va="center",
        fontsize=8.5,
        color=palette.SOFT_INK,
    )


def _minutes(stop: StopLike) -> str:
    if not stop.reading:
        return "to come"
    return f"{stop.reading} + {stop.exercises}" if stop.exercises else f"{stop.reading}"


def _arrow(ax: Axes, start: tuple[int, int], end: tuple[int, int], style: object) -> None:
    """Draw an arrow from the right edge of one box to the left edge of another.

    An arrow downwards turns in the gap after the first box, an arrow upwards in the gap before the
    second: higher rows hold more boxes.
    """
    half, gap = BOX_WIDTH / 2, (1 - BOX_WIDTH) / 2
    a, b = (start[0] + 0.5 + half, start[1] + 0.5), (end[0] + 0.5 - half, end[1] + 0.5)
    if start[1] == end[1]:
        points = [a, b]
    else:
        # An arrow from below ends a little lower, so that the arrowheads stay apart.
        b = (b[0], b[1] + (0.14 if end[1] < start[1] else 0.0))
        shift = (0.8 if style == "-" else 1.5) * gap
        turn = b[0] - shift if end[1] < start[1] else a[0] + 2 * gap - shift
        points = [a, (turn, a[1]), (turn, b[1]), b]
    ax.add_patch(
        FancyArrowPatch(
            path=Path(points),
            arrowstyle="-|>",
            mutation_scale=11,
            linewidth=1.5,
            linestyle=style,
            color=palette.SOFT_INK,
            zorder=1,
        )
    )


def _alt(stops: Sequence[StopLike]) -> str:
    return (
        f"Map: the {len(stops)} chapters of the course, their minutes, and which must be read"
        " before which."
    )


def _caption(stops: Sequence[StopLike]) -> str:
    reading, exercises = (
        sum(getattr(stop, name) for stop in stops) for name in ("reading", "exercises")
    )
    later = [stop.number for stop in stops if not stop.reading]
    to_come = f" Still to come: {', '.join(later)}." if later else ""
    return f"{_hours(reading)} of reading and {_hours(exercises)} of exercises.{to_come}"


def _in_words(stops: Sequence[StopLike]) -> str:
    arrows = [
        f"{stop.number} after {' and '.join(direct(stops)[stop.number])}"
        for stop in stops
        if stop.needs
    ]
    free = " and ".join(stop.number for stop in stops if not stop.needs)
    return f"Nothing is needed for {free}; {', '.join(arrows)}."


def _hours(minutes: int) -> str:
    """Minutes in words, rounded to half hours, because they are estimates."""
    halves = round(minutes / 30)
    return f"{halves // 2}½ hours" if halves % 2 else f"{halves // 2} hours"
