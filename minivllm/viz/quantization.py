"""Pictures of quantization: the bits of a number, the numbers that a format has, how values are
rounded to them, which numbers share a scale, and how large the numbers of each channel are.

All take plain numbers; torch is not imported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from minivllm.viz import palette
from minivllm.viz.figure import WIDTH, Figure, describe, plain_axes

_BOLD = {"fontsize": 12, "weight": "bold", "color": palette.INK}
_SOFT = {"fontsize": 9.5, "color": palette.SOFT_INK}
_MIDDLE = {"ha": "center", "va": "center"}
#: What the bits of a number are for.
_FIELDS = (
    ("sign", palette.REQUESTS[3]),
    ("exponent", palette.REQUESTS[1]),
    ("fraction", palette.REQUESTS[0]),
)
#: Values that become 0, and those that do not.
_LOST, _KEPT = palette.REQUESTS[3], palette.REQUESTS[2]


# --- formats --------------------------------------------------------------------------------------


def draw_bits(formats: Mapping[str, tuple[int, int, int]]) -> Figure:
    """Draw the bits of each format, one box per bit.

    formats: name -> bits of (sign, exponent, fraction). ValueError without a format, or for one
    without bits.
    """
    if not formats or not all(map(sum, formats.values())):
        raise ValueError("formats with bits are drawn, at least one")
    height = 1.0 + 0.42 * len(formats)
    figure = Figure(height)
    widest = max(map(sum, formats.values()))
    ax = figure.add_axes(
        (0.12, 0.1 / height, 0.8, 0.42 * len(formats) / height),
        xlim=(0, widest),
        ylim=(len(formats), 0),
    )
    ax.set_axis_off()
    for y, (name, sizes) in enumerate(formats.items()):
        x = 0
        for (_, color), size in zip(_FIELDS, sizes, strict=True):
            for _ in range(size):
                face = {"facecolor": color, "edgecolor": palette.PAPER, "linewidth": 1}
                ax.add_patch(Rectangle((x, y + 0.14), 1, 0.72, **face))
                x += 1
        ax.text(-0.3, y + 0.5, name, ha="right", va="center", color=palette.INK, fontsize=10)
        ax.text(x + 0.3, y + 0.5, f"{x} bits", ha="left", va="center", **_SOFT)
    figure.legend(
        [Patch(color=color) for _, color in _FIELDS],
        [name for name, _ in _FIELDS],
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.38 / height),
        ncols=3,
        frameon=False,
        fontsize=9.5,
        labelcolor=palette.INK,
    )
    figure.text(0.01, 1 - 0.27 / height, "What the bits are for", **_BOLD)
    said = "; ".join(
        f"{name}: {s} sign, {e} exponent, {f} fraction" for name, (s, e, f) in formats.items()
    )
    smallest = min(formats, key=lambda name: sum(formats[name]))
    describe(
        figure,
        f"Picture: the bits of {len(formats)} number formats. {said}.",
        f"From {widest} bits to the {sum(formats[smallest])} of {smallest}.",
    )
    return figure


def draw_levels(rows: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Draw the numbers of each format as ticks on a line from 0 to 1.

    rows: name -> numbers; those outside of 0 to 1 are left out. ValueError where none is left.
    """
    shown = {name: sorted({x for x in xs if 0 <= x <= 1}) for name, xs in rows.items()}
    if not shown or not all(shown.values()):
        raise ValueError("a format without a number from 0 to 1")
    height = 0.95 + 0.5 * len(shown)
    figure = Figure(height)
    ax = figure.add_axes((0.12, 0.5 / height, 0.84, 0.5 * len(shown) / height))
    plain_axes(ax)
    for y, values in enumerate(shown.values()):
        look = {"color": palette.REQUESTS[y % len(palette.REQUESTS)], "linewidth": 1.1}
        ax.vlines(values, y - 0.34, y + 0.34, **look)
    ax.set_yticks(range(len(shown)), list(shown), fontsize=10)
    ax.tick_params(axis="y", length=0, labelcolor=palette.INK)
    ax.set(ylim=(len(shown) - 0.45, -0.55), xlim=(-0.006, 1.006))
    ax.set_xlabel("the number, as a share of the largest", **_SOFT)
    figure.text(0.01, 1 - 0.26 / height, title or "The numbers that there are", **_BOLD)
    gaps = {name: _gap_at_the_top(values) for name, values in shown.items()}
    said = ", ".join(
        f"{name} has {len(values)}, {sum(x < 0.1 for x in values)} of them below 0.1"
        for name, values in shown.items()
    )
    widest = max(gaps, key=lambda name: gaps[name])
    describe(
        figure,
        f"Chart: the numbers from 0 to 1 of {len(shown)} formats: {said}.",
        f"The widest step is at the top of {widest}: {gaps[widest]:.2g} of the largest number.",
    )
    return figure


def _gap_at_the_top(values: Sequence[float]) -> float:
    return values[-1] - values[-2] if len(values) > 1 else 0.0


# --- rounding -------------------------------------------------------------------------------------


def draw_rounding(
    rows: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str
) -> Figure:
    """Draw how values fall on the nearest of a format's numbers: a value is a dot above the line,
    and a stroke leads from it to the number that it becomes.

    rows: name -> (values, the format's numbers). All rows have one axis, which is that of the
    widest. ValueError where a row has no value or no number.
    """
    if not rows or not all(values and levels for values, levels in rows.values()):
        raise ValueError("a row without values or without numbers")
    height = 0.85 + 0.95 * len(rows)
    figure = Figure(height)
    low = min(min(*levels, *values) for values, levels in rows.values())
    high = max(max(*levels, *values) for values, levels in rows.values())
    room = 0.03 * (high - low or 1)
    ax = figure.add_axes((0.17, 0.35 / height, 0.8, 0.95 * len(rows) / height))
    plain_axes(ax)
    ax.spines[["left"]].set_visible(False)
    ax.set(ylim=(len(rows) - 0.1, -0.25), xlim=(low - room, high + room))
    ax.set_yticks([y + 0.5 for y in range(len(rows))], list(rows), fontsize=10)
    ax.tick_params(axis="y", length=0, labelcolor=palette.INK)
    lost: dict[str, int] = {}
    for y, (name, (values, levels)) in enumerate(rows.items()):
        ax.vlines(levels, y + 0.52, y + 0.82, color=palette.SOFT_INK, linewidth=1.2)
        ax.plot([levels[0], levels[-1]], [y + 0.82] * 2, color=palette.SOFT_INK, linewidth=1)
        lost[name] = 0
        for value in values:
            nearest = min(levels, key=lambda level: abs(level - value))
            gone = nearest == 0 and value != 0
            lost[name] += gone
            color = _LOST if gone else _KEPT
            ax.plot([value, nearest], [y + 0.12, y + 0.52], color=color, linewidth=1.4)
            ax.plot([value], [y + 0.12], "X" if gone else "o", color=color, markersize=6)
    figure.text(0.01, 1 - 0.26 / height, title, **_BOLD)
    told = "; ".join(
        f"{name}: {len(values)} values, {len(levels)} numbers; values that become 0: {lost[name]}"
        for name, (values, levels) in rows.items()
    )
    worst = max(lost, key=lambda name: lost[name])
    describe(
        figure,
        f"Picture: values and the numbers that they are rounded to. {told}.",
        f"With “{worst}”, {lost[worst]} of {len(rows[worst][0])} values become 0 (crosses).",
    )
    return figure


# --- who shares a scale ---------------------------------------------------------------------------


def draw_sharing(shape: tuple[int, int], blocks: Mapping[str, tuple[int, int]]) -> Figure:
    """Draw which numbers of a matrix share a scale, once for each way to cut it.

    shape: rows and columns. blocks: name -> rows and columns that have one scale; blocks at the
    edges may be smaller. ValueError without a way, or for blocks without a number.
    """
    rows, columns = shape
    if not blocks or min(rows, columns, *(n for block in blocks.values() for n in block)) < 1:
        raise ValueError("a matrix, and blocks of at least 1 x 1, are drawn")
    figure = Figure(2.2)
    width = 0.98 / len(blocks)
    counts = {}
    for i, (name, (down, across)) in enumerate(blocks.items()):
        place = (0.01 + i * width, 0.17, width - 0.03, 0.6)
        ax = figure.add_axes(place, xlim=(-0.1, columns + 0.1), ylim=(rows + 0.1, -0.1))
        ax.set_axis_off()
        along = -(-columns // across)
        counts[name] = -(-rows // down) * along
        for y in range(rows):
            for x in range(columns):
                number = y // down * along + x // across
                color = palette.REQUESTS[(number + number // 8) % 8]
                face = {"facecolor": color, "edgecolor": palette.PAPER, "linewidth": 0.5}
                ax.add_patch(Rectangle((x, y), 1, 1, **face))
        ax.text(columns / 2, -0.35, name, ha="center", va="bottom", color=palette.INK, fontsize=10)
        many = f"{counts[name]} scale{'s' if counts[name] > 1 else ''}"
        ax.text(columns / 2, rows + 0.35, many, ha="center", va="top", **_SOFT)
    figure.text(0.01, 0.91, "Which numbers share a scale", **_BOLD)
    said = ", ".join(f"{name} {count}" for name, count in counts.items())
    describe(
        figure,
        f"Picture: a matrix of {rows} x {columns} numbers, coloured by the scale that they share;"
        f" scales: {said}.",
        f"One matrix, cut in {len(blocks)} ways: {said}.",
    )
    return figure


# --- channels -------------------------------------------------------------------------------------


def draw_channels(rows: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Draw the largest magnitude of each channel, as a multiple of the median channel's.

    rows: name -> one magnitude per channel; each row has a chart, and all charts have one axis.
    ValueError where a median is not above 0.
    """
    if not rows or not all(values and statistics.median(values) > 0 for values in rows.values()):
        raise ValueError("channels with a median above 0 are drawn")
    scaled = {name: [x / statistics.median(xs) for x in xs] for name, xs in rows.items()}
    most = max(map(max, scaled.values()))
    figure = Figure(2.9)
    width = 0.93 / len(scaled)
    for i, (name, values) in enumerate(scaled.items()):
        ax = figure.add_axes((0.06 + i * width, 0.17, width - 0.035, 0.6))
        plain_axes(ax)
        color = palette.REQUESTS[i % len(palette.REQUESTS)]
        ax.vlines(range(len(values)), 0, values, color=color, linewidth=_stroke(len(values), width))
        ax.axhline(1, color=palette.SOFT_INK, linewidth=0.8, linestyle="--")
        ax.set(xlim=(-1, len(values)), ylim=(0, 1.08 * most))
        ax.set_title(name, loc="left", fontsize=10, color=palette.INK)
        ax.set_xlabel("channel", **_SOFT)
        if i:
            ax.set_yticklabels([])
        else:
            ax.set_ylabel("times the median", **_SOFT)
    figure.text(0.01, 0.92, title, **_BOLD)
    tops = {name: max(values) for name, values in scaled.items()}
    said = ", ".join(f"{name} {top:.3g}" for name, top in tops.items())
    worst = max(tops, key=lambda name: tops[name])
    describe(
        figure,
        f"Charts: the largest magnitude of each channel, as a multiple of the median. The largest"
        f" channel: {said}.",
        f"The largest channel of {worst} is {tops[worst]:.3g} times the median; the dashed line is"
        " the median.",
    )
    return figure


def _stroke(count: int, width: float) -> float:
    """Points, for so many strokes beside each other in a share of the picture's width."""
    return max(0.7, 0.7 * 72 * WIDTH * (width - 0.035) / count)


# --- what it saves --------------------------------------------------------------------------------


def draw_amounts(
    rows: Mapping[str, float],
    title: str,
    unit: str,
    *,
    group: int | None = None,
    logarithmic: bool = False,
) -> Figure:
    """Draw one bar per row, in `unit`, with its amount.

    group: after so many rows, colours begin again. logarithmic: bars begin a little below the
    smallest. ValueError without a row, or for an amount that is not above 0.
    """
    if not rows or min(rows.values()) <= 0:
        raise ValueError("amounts above 0 are drawn, at least one")
    height = 0.95 + 0.4 * len(rows)
    figure = Figure(height)
    left = min(0.36, 0.03 + 0.0088 * max(map(len, rows)))
    ax = figure.add_axes((left, 0.5 / height, 0.88 - left, 0.4 * len(rows) / height))
    plain_axes(ax)
    for y, amount in enumerate(rows.values()):
        ax.barh(y, amount, height=0.64, color=palette.request_color(y % (group or len(rows))))
        where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(_number(amount), (amount, y), fontsize=9.5, color=palette.INK, **where)
    _style_amounts(ax, list(rows), unit)
    if logarithmic:
        ax.set_xscale("log")
        ax.set_xlim(10 ** math.floor(math.log10(0.9 * min(rows.values()))), None)
        ax.tick_params(axis="x", which="minor", length=0)
    figure.text(0.01, 1 - 0.27 / height, title, **_BOLD)
    said = ", ".join(f"{name} {_number(amount)}" for name, amount in rows.items())
    least = min(rows, key=lambda name: rows[name])
    describe(
        figure,
        f"Chart: {title[0].lower()}{title[1:]}, in {unit}. {said}.",
        f"The least: {least}, with {_number(rows[least])}.",
    )
    return figure


def _style_amounts(ax: Axes, names: Sequence[str], unit: str) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=9.5, color=palette.INK)
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0, labelcolor=palette.INK)
    ax.set_xlabel(unit, **_SOFT)


def _number(value: float) -> str:
    """Three significant digits, or whole numbers with separators: 0.00281, 10.4, 77,200."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
