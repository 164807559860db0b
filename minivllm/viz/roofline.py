"""A machine's best possible rates and the measured ones: pictures of `minivllm bench` reports.

The roofline (Williams, Waterman & Patterson, CACM 2009): a kernel that does I operations per moved
byte is at most as fast as ``min(matmul rate, I · bandwidth)``. Reports are plain dicts, as in their
JSON files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivllm.viz import palette
from minivllm.viz.figure import describe, prepare

#: Parts of a floor: name in the report, name in the picture, colour.
PARTS = (
    ("layers", "matrices of the layers", palette.REQUESTS[1]),
    ("head", "matrix of the head", palette.REQUESTS[5]),
    ("decode_attention", "K and V of decodes", palette.REQUESTS[0]),
    ("prefill_attention", "attention of prompts", palette.REQUESTS[2]),
)
#: Points closer than this (in decades) share a label.
TOGETHER = 0.2


@dataclass(frozen=True)
class Point:
    """A measured kernel on the roofline."""

    letter: str
    kernel: str
    case: str
    flops_per_byte: float
    flops_per_second: float
    share_of_floor: float


def roofline_points(
    report: dict[str, Any], kernels: Sequence[str], variant: str = "minivllm"
) -> list[Point]:
    """The measured rows of a kernel report that do arithmetic. ValueError when there are none."""
    rows = [
        row
        for name in kernels
        for row in report["rows"]
        if row["kernel"] == name and row["variant"] == variant
    ]
    rows = [row for row in rows if "failed" not in row and row["flops"] and row["bytes"]]
    if not rows:
        raise ValueError(f"the report has no measured row of {', '.join(kernels)} by {variant!r}")
    return [
        Point(
            palette.request_letter(index),
            row["kernel"],
            row["case"],
            row["flops"] / row["bytes"],
            row["flops"] / row["median_us"] * 1e6,
            row["share_of_floor"],
        )
        for index, row in enumerate(rows)
    ]


def draw_roofline(
    report: dict[str, Any],
    kernels: Sequence[str] = ("decode_attention", "prefill_attention"),
    variant: str = "minivllm",
    ax: Axes | None = None,
) -> Figure:
    """Draw kernels under the roof of the machine that they were measured on.

    report: of ``minivllm bench kernels``. variant: the variant whose rows are drawn. ax: draw there
    instead of on a new figure.
    """
    points = roofline_points(report, kernels, variant)
    bandwidth, peak = (
        report["rates"][f"{name}_per_second"] for name in ("read_bytes", "matmul_flops")
    )
    own_figure = ax is None
    figure, ax = prepare(ax, max(3.9, 0.26 * len(points) + 1.1))
    if own_figure:
        ax.set_position((0.085, 0.13, 0.475, 0.74))
    ridge = peak / bandwidth
    left = min(0.4, *(point.flops_per_byte / 2 for point in points))
    right = max(4 * ridge, *(2 * point.flops_per_byte for point in points))
    roof_x, roof_y = [left, ridge, right], [left * bandwidth / 1e12, peak / 1e12, peak / 1e12]
    low = min(roof_y[0], *(point.flops_per_second / 1e12 for point in points)) / 2
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.fill_between(roof_x, roof_y, low, color=palette.FREE, linewidth=0)
    ax.plot(roof_x, roof_y, color=palette.INK, linewidth=1.6)
    ax.set_xlim(left, right)
    ax.set_ylim(low, 3 * peak / 1e12)
    colors = {name: palette.request_color(index) for index, name in enumerate(kernels)}
    for point in points:
        ax.plot(
            point.flops_per_byte,
            point.flops_per_second / 1e12,
            "o",
            markersize=7,
            color=colors[point.kernel],
            markeredgecolor=palette.INK,
            markeredgewidth=0.7,
        )
    for x, y, letters in _labels(points):
        ax.annotate(
            letters,
            (x, y / 1e12),
            xytext=(7, -9),
            textcoords="offset points",
            fontsize=9.5,
            color=palette.INK,
        )
    _style_roofline(ax, bandwidth, peak, ridge)
    if own_figure:
        _roofline_key(figure, points, colors)
    numbers = _roofline_in_words(points, bandwidth, peak, ridge)
    caption = "On the roof, a kernel is as fast as the machine allows."
    describe(figure, f"{_roofline_alt(points)} {numbers}", caption)
    return figure


def _labels(points: Sequence[Point]) -> list[tuple[float, float, str]]:
    """One label for points that lie together."""
    from math import log10

    groups: list[list[Point]] = []
    for point in points:
        for group in groups:
            near = group[-1]
            dx = abs(log10(point.flops_per_byte / near.flops_per_byte))
            dy = abs(log10(point.flops_per_second / near.flops_per_second))
            if max(dx, dy) < TOGETHER:
                group.append(point)
                break
        else:
            groups.append([point])
    # On the right of the rightmost point, so that no other point lies on the label.
    places = [max(group, key=lambda point: point.flops_per_byte) for group in groups]
    return [
        (place.flops_per_byte, place.flops_per_second, " ".join(p.letter for p in group))
        for place, group in zip(places, groups, strict=True)
    ]


def _style_roofline(ax: Axes, bandwidth: float, peak: float, ridge: float) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.set_facecolor(palette.PAPER)
    ax.set_title(
        "Kernels under the machine's roof",
        loc="left",
        fontsize=12,
        weight="bold",
        color=palette.INK,
    )
    ax.set_xlabel("FLOPs for each byte moved", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel("TFLOP/s", fontsize=9.5, color=palette.SOFT_INK)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.tick_params(which="both", colors=palette.SOFT_INK, labelsize=9, length=3)
    ax.spines[["top", "right"]].set_visible(False)
    for spine in ax.spines.values():
        spine.set_color(palette.LINE)
    # On the slope, where a kernel is unlikely to lie.
    beside = ridge / 6
    ax.annotate(
        f"multiplies {_rate(peak)}FLOP/s",
        (ridge, 1.2 * peak / 1e12),
        fontsize=9,
        color=palette.SOFT_INK,
    )
    place = (beside, 1.3 * beside * bandwidth / 1e12)
    ax.annotate(
        f"reads {_rate(bandwidth)}B/s", place, fontsize=9, color=palette.SOFT_INK, ha="right"
    )


def _rate(value: float) -> str:
    """ "4.40 T" for 4.4e12."""
    scale, unit = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:.3g} {unit}"


def _roofline_key(figure: Figure, points: Sequence[Point], colors: dict[str, str]) -> None:
    """Draw a bar for each point, on the right: points that lie on one spot differ in their bars."""
    axes = figure.add_axes((0.82, 0.13, 0.12, 0.74))
    places = range(len(points))
    shares = [point.share_of_floor for point in points]
    bars = {"height": 0.6, "color": [colors[point.kernel] for point in points]}
    axes.barh(places, shares, edgecolor=palette.INK, linewidth=0.5, **bars)
    for y, share in zip(places, shares, strict=True):
        axes.text(share + 0.03, y, f"{share:.0%}", fontsize=9, color=palette.INK, va="center")
    names = [f"{p.letter}  {p.kernel.removesuffix('_attention')} {p.case}" for p in points]
    axes.set_yticks(places, names, fontsize=8.5, color=palette.INK)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor(palette.PAPER)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(palette.LINE)
    title = {"fontsize": 10, "weight": "bold", "color": palette.INK}
    axes.set_title("Share of the best speed", loc="center", x=0.1, **title)


def _roofline_alt(points: Sequence[Point]) -> str:
    return (
        f"Chart: {len(points)} measured kernels under the roofline of the machine, on logarithmic"
        " axes."
    )


def _roofline_in_words(points: Sequence[Point], bandwidth: float, peak: float, ridge: float) -> str:
    best, worst = (choose(points, key=lambda p: p.share_of_floor) for choose in (max, min))
    return (
        f"The machine reads {_rate(bandwidth)}B/s and multiplies {_rate(peak)}FLOP/s: below"
        f" {ridge:.0f} FLOPs a byte memory is the limit, above it arithmetic. Nearest to its floor"
        f" is {best.kernel} {best.case} with {best.share_of_floor:.0%} of it, furthest"
        f" {worst.kernel} {worst.case} with {worst.share_of_floor:.0%}."
    )


# --- the floor of whole workloads -----------------------------------------------------------------


def draw_floor(report: dict[str, Any], ax: Axes | None = None) -> Figure:
    """Draw the necessary part of the measured time, for each case of a report.

    report: of ``minivllm bench roofline``. A case without a measured time is drawn as its floor
    alone. ax: draw there instead of on a new figure.
    """
    cases = report["cases"]
    own_figure = ax is None
    height = 1.3 + 0.46 * len(cases)
    figure, ax = prepare(ax, height)
    if own_figure:
        ax.set_position((0.1, 0.85 / height, 0.69, 0.46 * len(cases) / height))
    for row, case in enumerate(cases.values()):
        whole = case.get("measured_seconds", case["floor"]["seconds"])
        left = 0.0
        for part, _, color in PARTS:
            width = case["floor"]["parts"][part]["seconds"] / whole
            ax.barh(
                row,
                width,
                left=left,
                height=0.62,
                color=color,
                edgecolor=palette.PAPER,
                linewidth=0.6,
            )
            left += width
        if left < 1:
            ax.barh(
                row,
                1 - left,
                left=left,
                height=0.62,
                facecolor=palette.FREE,
                edgecolor=palette.LINE,
            )
        ax.annotate(
            _floor_label(case),
            (max(1.0, left), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=palette.INK,
            annotation_clip=False,
        )
    _style_floor(ax, list(cases))
    describe(figure, f"{_floor_alt(cases)} {_floor_in_words(cases)}", _floor_caption(cases))
    return figure


def _floor_label(case: dict[str, Any]) -> str:
    seconds = case["floor"]["seconds"]
    if "measured_seconds" not in case:
        return f"{seconds:.2f} s at least"
    return f"{case['share_of_floor']:.0%}: {seconds:.2f} of {case['measured_seconds']:.2f} s"


def _style_floor(ax: Axes, names: list[str]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    ax.set_facecolor(palette.PAPER)
    ax.set_title(
        "How much of the time was necessary",
        loc="left",
        fontsize=12,
        weight="bold",
        color=palette.INK,
    )
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ends = [patch.get_x() + patch.get_width() for patch in ax.patches]
    ax.set_xlim(0, max(1.0, *ends))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.tick_params(colors=palette.SOFT_INK, labelsize=9.5, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(palette.LINE)
    handles = [Patch(facecolor=color) for _, _, color in PARTS]
    handles.append(Patch(facecolor=palette.FREE, edgecolor=palette.LINE))
    ax.legend(
        handles,
        [name for _, name, _ in PARTS] + ["not necessary"],
        loc="upper left",
        ncols=5,
        frameon=False,
        bbox_to_anchor=(-0.08, -0.3 / (0.46 * len(names))),
        fontsize=9,
        labelcolor=palette.INK,
        handlelength=1.2,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _floor_alt(cases: dict[str, Any]) -> str:
    return (
        f"Chart: the parts of the floor of {len(cases)} workloads as shares of the time that they"
        " took."
    )


def _floor_caption(cases: dict[str, Any]) -> str:
    shares = {
        name: case["share_of_floor"] for name, case in cases.items() if "share_of_floor" in case
    }
    if not shares:
        return "A bar is the least time that the hardware needs."
    return f"Farthest from its floor: {min(shares, key=lambda name: shares[name])}."


def _floor_in_words(cases: dict[str, Any]) -> str:
    names = {part: name for part, name, _ in PARTS}
    sentences = []
    for name, case in cases.items():
        parts = case["floor"]["parts"]
        largest = max(parts, key=lambda part: parts[part]["seconds"])
        share = parts[largest]["seconds"] / case["floor"]["seconds"]
        text = (
            f"{name}: at least {case['floor']['seconds']:.2f} s, {share:.0%} of that for the"
            f" {names[largest]}"
        )
        if "share_of_floor" in case:
            text += (
                f"; took {case['measured_seconds']:.2f} s, so {case['share_of_floor']:.0%} was"
                " necessary"
            )
        sentences.append(text)
    return ". ".join(sentences) + "."
