"""Pictures of measurements.

They show the floor of a decode step, the parts of a step's time, throughput against latency, and
repeats. All take plain numbers. Times are seconds unless a parameter says otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivllm.viz import palette
from minivllm.viz.figure import describe, plain_axes, prepare, side_legend

#: Line styles by order, so that lines differ not only in colour.
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v")


def _number(value: float) -> str:
    """A number with three significant digits: 0.27, 5.28, 41.6, 1,230. But 40, not 40.0."""
    whole = abs(value) >= 100 or (abs(value) >= 10 and value == round(value))
    digits = 0 if whole else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


# --- the floor of a decode step -------------------------------------------------------------------


def crossing(
    batches: Sequence[float], one: Sequence[float], other: Sequence[float]
) -> float | None:
    """The place where line `other` overtakes line `one`, linear between the batches.

    None where it does not overtake.
    """
    gaps = [b - a for a, b in zip(one, other, strict=True)]
    for i in range(1, len(gaps)):
        if gaps[i - 1] < 0 <= gaps[i]:
            share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
            return batches[i - 1] + share * (batches[i] - batches[i - 1])
    return None


def draw_decode_floor(
    batches: Sequence[int],
    parts: Mapping[str, Sequence[float]],
    measured: Sequence[tuple[int, float]] = (),
    ax: Axes | None = None,
) -> Figure:
    """Draw the least time of a decode step by number of sequences, and the measured time.

    batches: ascending. parts: name of a part -> its seconds at each batch, the first of them the
    weights. The step's floor is their sum. measured: (sequences, seconds) of real steps. ValueError
    without parts.
    """
    if not parts:
        raise ValueError("no part of a step to draw")
    floor = [sum(values) for values in zip(*parts.values(), strict=True)]
    own_figure = ax is None
    figure, ax = prepare(ax, 3.9)
    if own_figure:
        ax.set_position((0.085, 0.14, 0.62, 0.73))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    handles, labels = [], []
    for index, (name, values) in enumerate(parts.items()):
        style, color = _STYLES[(index + 1) % len(_STYLES)], palette.REQUESTS[index]
        handles += ax.plot(batches, [1e3 * v for v in values], style, color=color, linewidth=2)
        labels.append(name)
    handles += ax.plot(batches, [1e3 * v for v in floor], color=palette.INK, linewidth=2.2)
    labels.append("together: the floor")
    if measured:
        points = [(batch, 1e3 * seconds) for batch, seconds in measured]
        handles += ax.plot(
            *zip(*points, strict=True),
            "o",
            color=palette.PAPER,
            markeredgecolor=palette.INK,
            ms=7,
            clip_on=False,
        )
        labels.append("measured")
    _style_decode_floor(ax, batches)
    side_legend(ax, handles, labels, "A decode step")
    alt = (
        f"Chart: the least time of a decode step for {batches[0]} to {batches[-1]:,} sequences, by"
        f" part. {_decode_floor_in_words(batches, floor, measured)}"
    )
    describe(figure, alt, _decode_floor_caption(batches, parts))
    return figure


def _style_decode_floor(ax: Axes, batches: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter

    plain_axes(ax)
    ax.set_title(
        "What a decode step costs at least",
        loc="left",
        fontsize=12,
        weight="bold",
        color=palette.INK,
    )
    ax.set_xlabel("sequences in the step", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel("milliseconds", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_xlim(batches[0], batches[-1])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.grid(color=palette.LINE, linewidth=0.5, alpha=0.6)


def _decode_floor_caption(batches: Sequence[int], parts: Mapping[str, Sequence[float]]) -> str:
    (first, weights), *others = parts.items()
    found = []
    for name, values in others:
        place = crossing(batches, weights, values)
        where = f"from about {place:.0f} sequences on" if place else "nowhere in this range"
        found.append(f"{name} cost more than {first} {where}")
    return f"{'; '.join(found) or f'Only {first}'}."


def _decode_floor_in_words(
    batches: Sequence[int], floor: Sequence[float], measured: Sequence[tuple[int, float]]
) -> str:
    text = f"With {batches[0]}, a step takes at least {_number(1e3 * floor[0])} milliseconds"
    text += f", with {batches[-1]:,} at least {_number(1e3 * floor[-1])}."
    if measured:
        text += f" Measured: {', '.join(f'{_number(1e3 * s)} with {n:,}' for n, s in measured)}."
    return text


# --- where the time goes --------------------------------------------------------------------------


def draw_parts(
    rows: Mapping[str, Mapping[str, float]],
    title: str = "Where a step's time goes",
    unit: str = "milliseconds",
    pale: Sequence[str] = (),
    ax: Axes | None = None,
) -> Figure:
    """Draw one bar per row, cut into its parts.

    rows: name of a bar -> name of a part -> amount, in `unit`. Parts with the same name have one
    colour. The legend and the bars are in the order in which the names first appear. pale: parts
    drawn without a colour. ValueError without a row, or for a negative part.
    """
    if not rows:
        raise ValueError("no bar to draw")
    if bad := [name for parts in rows.values() for name, value in parts.items() if value < 0]:
        raise ValueError(f"negative: {', '.join(bad)}")
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    own_figure = ax is None
    height = 1.15 + 0.55 * len(rows) + 0.28 * (-(-len(names) // 4))
    figure, ax = prepare(ax, height)
    label_width = min(0.27, 0.03 + 0.0088 * max(map(len, rows)))
    if own_figure:
        bottom = (0.62 + 0.28 * (-(-len(names) // 4))) / height
        ax.set_position((label_width, bottom, 0.9 - label_width, 0.55 * len(rows) / height))
    for y, parts in enumerate(rows.values()):
        left = 0.0
        for name in names:
            if value := parts.get(name, 0.0):
                ax.barh(
                    y,
                    value,
                    left=left,
                    height=0.64,
                    linewidth=0.8,
                    **_part_style(names, name, pale),
                )
                left += value
        if not _is_share(unit):
            where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(_number(left), (left, y), fontsize=9.5, color=palette.INK, **where)
    _style_parts(ax, list(rows), names, pale, title, unit)
    alt = f"Chart: {len(rows)} bars cut into {len(names)} parts, {title[0].lower()}{title[1:]}."
    describe(figure, f"{alt} {_parts_in_words(rows, unit)}", _largest_parts(rows))
    return figure


def _is_share(unit: str) -> bool:
    """Whether the bars are shares of something, so that their lengths say nothing."""
    return unit.startswith("percent")


def _part_style(names: Sequence[str], name: str, pale: Sequence[str]) -> dict[str, str]:
    if name in pale:
        return {"facecolor": palette.FREE, "edgecolor": palette.SOFT_INK}
    index = [other for other in names if other not in pale].index(name)
    hatch = "" if index < len(palette.REQUESTS) else "////"
    return {"facecolor": palette.request_color(index), "edgecolor": palette.PAPER, "hatch": hatch}


def _style_parts(
    ax: Axes, rows: Sequence[str], names: Sequence[str], pale: Sequence[str], title: str, unit: str
) -> None:
    from matplotlib.patches import Patch

    plain_axes(ax)
    ax.set_title(title, loc="left", fontsize=12, weight="bold", color=palette.INK)
    ax.set_yticks(range(len(rows)), rows, fontsize=9.5, color=palette.INK)
    ax.set_ylim(len(rows) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0, labelcolor=palette.INK)
    ax.set_xlabel(unit, fontsize=9.5, color=palette.SOFT_INK)
    handles = [Patch(**_part_style(names, name, pale)) for name in names]
    ax.figure.legend(
        handles,
        names,
        loc="lower left",
        ncols=4,
        frameon=False,
        bbox_to_anchor=(0.02, 0.0),
        fontsize=9,
        labelcolor=palette.INK,
        handlelength=1.2,
        columnspacing=1.4,
        handletextpad=0.5,
    )


def _largest_parts(rows: Mapping[str, Mapping[str, float]]) -> str:
    largest = {name: max(parts, key=lambda part: parts[part]) for name, parts in rows.items()}
    if len(set(largest.values())) == 1:
        return f"The largest part of each bar: {next(iter(largest.values()))}."
    longest = max(rows, key=lambda name: sum(rows[name].values()))
    return f"The largest part of “{longest}”: {largest[longest]}."


def _parts_in_words(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    sentences = []
    for name, parts in rows.items():
        total = sum(parts.values())
        shares = sorted(parts.items(), key=lambda part: -part[1])[:3]
        said = ", ".join(f"{part} {value / total:.0%}" for part, value in shares if value)
        whole = "" if _is_share(unit) else f"{_number(total)} {unit}, most of it "
        sentences.append(f"{name}: {whole}{said}.")
    return " ".join(sentences)


# --- throughput against latency -------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """One point of a throughput-latency curve.

    It holds the number of sequences at once, and the seconds between the tokens of each.
    """

    sequences: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The rate of all sequences together (Little's law: sequences = rate · time)."""
        return self.sequences / self.seconds


def draw_tradeoff(curves: Mapping[str, Sequence[Load]], ax: Axes | None = None) -> Figure:
    """Draw the whole machine's tokens per second against each request's time per token.

    curves: name -> its points, by growing load. Up and left is better. ValueError where a curve has
    no point.
    """
    if not curves or not all(curves.values()):
        raise ValueError("a curve without points")
    own_figure = ax is None
    figure, ax = prepare(ax, 3.9)
    if own_figure:
        ax.set_position((0.1, 0.14, 0.6, 0.73))
    handles = []
    for index, points in enumerate(curves.values()):
        x, y = [1e3 * p.seconds for p in points], [p.tokens_per_second for p in points]
        handles += ax.plot(
            x,
            y,
            _STYLES[index % 4],
            marker=_MARKERS[index % 5],
            ms=6,
            color=palette.REQUESTS[index],
            linewidth=2,
        )
        # The first curve's labels stand on the right of it, the others' on the left.
        where = {"xytext": (7, -11)} if index == 0 else {"xytext": (-7, 5), "ha": "right"}
        for point, px, py in zip(points, x, y, strict=True):
            ax.annotate(
                f"{point.sequences:,}",
                (px, py),
                textcoords="offset points",
                fontsize=9,
                color=palette.INK,
                **where,
            )
    _style_tradeoff(ax)
    side_legend(ax, handles, list(curves), "Sequences at once")
    alt = (
        f"Chart: tokens a second against the time between a request's tokens, {len(curves)} curves."
    )
    describe(figure, f"{alt} {_tradeoff_in_words(curves)}", "Up and to the left is better.")
    return figure


def _style_tradeoff(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    plain_axes(ax)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_title(
        "More for all, slower for each", loc="left", fontsize=12, weight="bold", color=palette.INK
    )
    ax.set_xlabel("milliseconds between a request's tokens", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel("tokens a second, all together", fontsize=9.5, color=palette.SOFT_INK)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
    )
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.tick_params(which="minor", labelsize=8, labelcolor=palette.SOFT_INK)
    ax.grid(color=palette.LINE, linewidth=0.5, alpha=0.6)
    # Room for the labels of the lowest points.
    ax.margins(y=0.12)


def _tradeoff_in_words(curves: Mapping[str, Sequence[Load]]) -> str:
    sentences = []
    for name, points in curves.items():
        first, last = points[0], points[-1]
        text = f"{name}: {first.sequences:,} to {last.sequences:,} sequences make "
        text += (
            f"{last.tokens_per_second / first.tokens_per_second:,.0f} times as many tokens a"
            " second, and each "
        )
        text += f"waits {last.seconds / first.seconds:,.1f} times as long for its own."
        sentences.append(text)
    return " ".join(sentences)


# --- repeats --------------------------------------------------------------------------------------


def draw_samples(
    samples: Mapping[str, Sequence[float]],
    title: str = "Every repeat",
    unit: str = "microseconds",
    ax: Axes | None = None,
) -> Figure:
    """Draw a row of dots for each name, one dot per repeat; a line marks the median.

    samples: name -> the measured values, in `unit`, in the order of measurement (first on the
    left). ValueError where one is empty.
    """
    if not samples or not all(samples.values()):
        raise ValueError("nothing was measured")
    own_figure = ax is None
    figure, ax = prepare(ax, 3.3)
    if own_figure:
        ax.set_position((0.085, 0.16, 0.6, 0.69))
    handles = []
    for index, values in enumerate(samples.values()):
        color = palette.REQUESTS[index]
        marker = _MARKERS[index % len(_MARKERS)]
        handles += ax.plot(range(1, len(values) + 1), values, marker, color=color, ms=5, alpha=0.85)
        ax.axhline(
            statistics.median(values),
            color=color,
            linestyle=_STYLES[(index + 1) % 4],
            linewidth=1.4,
        )
    plain_axes(ax)
    ax.set_title(title, loc="left", fontsize=12, weight="bold", color=palette.INK)
    ax.set_xlabel("repeat", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel(unit, fontsize=9.5, color=palette.SOFT_INK)
    labels = [
        f"{name}: median {_number(statistics.median(values))}" for name, values in samples.items()
    ]
    side_legend(ax, handles, labels, "Measured")
    alt = (
        f"Chart: {sum(map(len, samples.values()))} measured times, repeat by repeat, of"
        f" {', '.join(samples)}."
    )
    describe(figure, f"{alt} {_samples_in_words(samples, unit)}", "A line marks a median.")
    return figure


def _samples_in_words(samples: Mapping[str, Sequence[float]], unit: str) -> str:
    return " ".join(
        f"{name}: median {_number(statistics.median(values))} {unit}, mean"
        f" {_number(statistics.fmean(values))}, from {_number(min(values))} to"
        f" {_number(max(values))}."
        for name, values in samples.items()
    )


# --- a step as a profiler sees it -----------------------------------------------------------------


def draw_intervals(
    lanes: Mapping[str, Sequence[tuple[float, float]]],
    begin: float,
    end: float,
    unit: str = "microseconds",
    ax: Axes | None = None,
) -> Figure:
    """Draw who worked when: a row for each lane.

    lanes: name -> (start, end) of each interval. begin, end: the step, drawn without shading.
    ValueError without a lane.
    """
    if not lanes:
        raise ValueError("no lane to draw")
    height = 0.95 + 0.45 * len(lanes)
    own_figure = ax is None
    figure, ax = prepare(ax, height)
    if own_figure:
        ax.set_position((0.12, 0.52 / height, 0.84, 0.45 * len(lanes) / height))
    spans = [span for lane in lanes.values() for span in lane]
    low, high = min([begin, *(s for s, _ in spans)]), max([end, *(e for _, e in spans)])
    for left, right in ((low, begin), (end, high)):
        if right > left:
            ax.axvspan(left, right, color=palette.tint(palette.SOFT_INK, 0.22), linewidth=0)
    for y, lane in enumerate(lanes.values()):
        color = palette.REQUESTS[y]
        ax.barh(
            [y] * len(lane),
            [e - s for s, e in lane],
            left=[s for s, _ in lane],
            height=0.6,
            color=color,
            edgecolor=palette.INK,
            linewidth=0.7,
        )
    plain_axes(ax)
    ax.set_title(
        "One step, as it was recorded", loc="left", fontsize=12, weight="bold", color=palette.INK
    )
    ax.set_yticks(range(len(lanes)), list(lanes), fontsize=9.5)
    ax.tick_params(axis="y", length=0, labelcolor=palette.INK)
    ax.set_ylim(len(lanes) - 0.4, -0.6)
    ax.set_xlim(low, high)
    ax.set_xlabel(unit, fontsize=9.5, color=palette.SOFT_INK)
    said = ", ".join(f"{name} {sum(e - s for s, e in lane):g}" for name, lane in lanes.items())
    alt = (
        f"Chart: what ran when, in {len(lanes)} lanes: {', '.join(lanes)}. A step of"
        f" {end - begin:g} {unit}. Sums of the lanes' bars: {said}."
    )
    describe(figure, alt, "What is shaded does not belong to this step.")
    return figure


__all__ = [
    "Load",
    "crossing",
    "draw_decode_floor",
    "draw_intervals",
    "draw_parts",
    "draw_samples",
    "draw_tradeoff",
]


# --- beside others --------------------------------------------------------------------------------


def draw_ratios(
    rows: Mapping[str, Mapping[str, float]],
    one: str,
    title: str = "Beside the others",
    ax: Axes | None = None,
) -> Figure:
    """Draw times as multiples of one engine's: a row per workload, a mark per engine.

    rows: workload -> engine -> its time divided by the time of `one`, which is the line at 1. Right
    of the line is slower. Engines need not have every workload. ValueError without a row, or for a
    ratio that is not positive.
    """
    from matplotlib.ticker import FuncFormatter

    ratios = [ratio for found in rows.values() for ratio in found.values()]
    if not ratios or min(ratios) <= 0:
        raise ValueError("ratios above 0 are drawn, at least one")
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    height = 1.2 + 0.4 * len(rows)
    own_figure = ax is None
    figure, ax = prepare(ax, height)
    if own_figure:
        ax.set_position((0.11, 0.65 / height, 0.62, 0.4 * len(rows) / height))
    ax.set_xscale("log")
    ax.axvline(1, color=palette.INK, linewidth=1.6)
    handles = [ax.plot([], [], color=palette.INK, linewidth=1.6)[0]]
    for index, name in enumerate(names):
        points = [(found[name], y) for y, found in enumerate(rows.values()) if name in found]
        marker, color = _MARKERS[index % len(_MARKERS)], palette.request_color(index)
        handles += ax.plot(*zip(*points, strict=True), marker, color=color, ms=9)
    plain_axes(ax)
    ax.set_title(title, loc="left", fontsize=12, weight="bold", color=palette.INK)
    ax.set_xlim(min(0.8, *ratios) / 1.05, 1.25 * max(1.2, *ratios))
    low, high = ax.get_xlim()
    ax.set_xticks([tick for tick in (0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50) if low < tick < high])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
    ax.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    ax.set_yticks(range(len(rows)), list(rows), fontsize=9.5, color=palette.INK)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", color=palette.LINE, linewidth=0.5, alpha=0.6)
    ax.set_xlabel(f"time, as a multiple of {one}'s", fontsize=9.5, color=palette.SOFT_INK)
    side_legend(ax, handles, [one, *names], "Engine")
    told = [
        f"{row}: {', '.join(f'{name} {ratio:.2f}' for name, ratio in found.items())}"
        for row, found in rows.items()
    ]
    describe(
        figure,
        f"Chart: the times of {len(names)} engines in {len(rows)} workloads, divided by {one}'s."
        f" {'; '.join(told)}.",
        f"Right of the line, an engine takes longer than {one}.",
    )
    return figure
