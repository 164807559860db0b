"""Pictures of requests that come from outside: the two loops of a server, arrivals, and waits.

All take plain numbers. Times are in seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from minivllm.viz import palette
from minivllm.viz.figure import Figure, describe, plain_axes, side_legend

_BOLD = {"fontsize": 12, "weight": "bold", "color": palette.INK}
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


# --- two loops ------------------------------------------------------------------------------------


def draw_two_loops() -> Figure:
    """Draw the event loop and the thread of the steps, and the two queues between them."""
    figure = Figure(3.3)
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, 100), ylim=(0, 37))
    ax.set_axis_off()
    left, right = palette.REQUESTS[0], palette.REQUESTS[1]
    _box(ax, (18, 4, 27, 25), "The event loop", left)
    _box(ax, (66, 4, 27, 25), "The thread of the steps", right)
    _lines(ax, 20, ("checks a request", "sleeps until there is news", "writes to the sockets"))
    _lines(ax, 68, ("takes in what has come", "runs one step", "hands over what it brought"))
    _arrow(ax, (45, 20), (66, 20), "new request, abort", "a queue: never waits", left)
    _arrow(ax, (66, 10), (45, 10), "tokens of the step", "call_soon_threadsafe", right)
    for i in range(3):
        y = 9 + 6.5 * i
        color = palette.REQUESTS[2 + i]
        ax.annotate("", (18, y), (8.5, y), arrowprops={"arrowstyle": "<|-|>", "color": color})
        ax.text(8, y, f"client {'CBA'[i]}", ha="right", va="center", color=palette.INK, fontsize=10)
    ax.text(2, 33, "Two loops that never wait for each other", va="center", **_BOLD)
    describe(
        figure,
        "Picture: clients talk to the event loop. It puts new requests and aborts into a queue for"
        " the thread of the steps, which hands the tokens of each step back by"
        " call_soon_threadsafe.",
        "Requests go to the right, tokens to the left.",
    )
    return figure


def _box(ax: Axes, place: tuple[float, float, float, float], name: str, color: str) -> None:
    x, y, width, height = place
    style = "round,pad=0,rounding_size=1.2"
    ax.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle=style, fill=False, edgecolor=color, linewidth=2
        )
    )
    where = {"ha": "center", "va": "center", "color": palette.INK, "fontsize": 11}
    ax.text(x + width / 2, y + height - 3.2, name, weight="bold", **where)


def _lines(ax: Axes, x: float, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines):
        ax.text(x, 20 - 5.5 * number, line, va="center", color=palette.INK, fontsize=9.5)


def _arrow(
    ax: Axes,
    tail: tuple[float, float],
    head: tuple[float, float],
    above: str,
    below: str,
    color: str,
) -> None:
    ax.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2})
    middle = (tail[0] + head[0]) / 2
    where = {"ha": "center", "va": "center", "fontsize": 9.5}
    ax.text(middle, tail[1] + 2, above, color=palette.INK, **where)
    ax.text(middle, tail[1] - 2, below, color=palette.SOFT_INK, **where)


# --- arrivals -------------------------------------------------------------------------------------


def draw_arrivals(rows: Mapping[str, Sequence[float]], seconds: float) -> Figure:
    """Draw when requests arrive: a row of ticks for each name, from 0 to `seconds`.

    ValueError where a row is empty.
    """
    if not rows or not all(rows.values()):
        raise ValueError("no arrivals to draw")
    height = 0.95 + 0.5 * len(rows)
    figure = Figure(height)
    ax = figure.add_axes((0.14, 0.55 / height, 0.83, 0.5 * len(rows) / height))
    plain_axes(ax)
    for y, times in enumerate(rows.values()):
        shown = [time for time in times if time <= seconds]
        ax.vlines(shown, y - 0.32, y + 0.32, color=palette.REQUESTS[y], linewidth=2)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=9.5)
    ax.tick_params(axis="y", length=0, labelcolor=palette.INK)
    ax.set_ylim(len(rows) - 0.45, -0.55)
    ax.set_xlim(0, seconds)
    ax.set_xlabel("seconds", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_title("When requests arrive", loc="left", **_BOLD)
    counts = {
        name: [sum(i <= time < i + 1 for time in times) for i in range(int(seconds))]
        for name, times in rows.items()
    }
    said = "; ".join(f"{name} {min(c)} to {max(c)} in a second" for name, c in counts.items())
    widest = max(counts, key=lambda name: max(counts[name]) - min(counts[name]))
    describe(
        figure,
        f"Chart: the arrivals of {len(rows)} loads over {seconds:g} seconds. {said}.",
        f"“{widest}” has crowds and pauses: {min(counts[widest])} to {max(counts[widest])} arrivals"
        " in a second.",
    )
    return figure


# --- lines ----------------------------------------------------------------------------------------


def draw_lines(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    axes: tuple[str, str],
    *,
    note: str = "",
    logarithmic: bool | Literal["x"] = False,
) -> Figure:
    """Draw curves through their points, with a legend at the side.

    curves: name -> points (x, y), ascending in x. axes: what x and y are. note: what there is to
    see, for the caption. logarithmic: both axes, or only "x". ValueError where a curve has no
    point.
    """
    if not curves or not all(curves.values()):
        raise ValueError("a curve without points")
    figure = Figure(3.4)
    ax = figure.add_axes((0.085, 0.16, 0.6, 0.7))
    plain_axes(ax)
    handles = []
    for i, points in enumerate(curves.values()):
        look = {"marker": _MARKERS[i % 4], "color": palette.REQUESTS[i], "linewidth": 2, "ms": 6}
        handles += ax.plot(*zip(*points, strict=True), _STYLES[i % 4], **look)
    ax.set_title(title, loc="left", **_BOLD)
    for name, set_label in zip(axes, (ax.set_xlabel, ax.set_ylabel), strict=True):
        set_label(name, fontsize=9.5, color=palette.SOFT_INK)
    ax.grid(color=palette.LINE, linewidth=0.5, alpha=0.6)
    if logarithmic:
        ax.set_xscale("log", base=2)
        ax.set_xticks([x for x, _ in next(iter(curves.values()))])
        ax.xaxis.set_major_formatter(lambda value, _: _number(value))
    else:
        ax.set_xlim(left=0)
    if logarithmic is True:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: _number(value))
    else:
        ax.set_ylim(bottom=0)
    side_legend(ax, handles, list(curves), axes[1][:1].upper() + axes[1][1:])
    said = "; ".join(
        f"{name}: {', '.join(f'{_number(y)} at {_number(x)}' for x, y in points)}"
        for name, points in curves.items()
    )
    alt = f"Chart: {title[0].lower()}{title[1:]}, {axes[1]} against {axes[0]}. {said}."
    describe(figure, alt, note or f"{title}.")
    return figure


def _number(value: float) -> str:
    """Three significant digits at least: 0.195, 10.4, 1,024."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- what clients saw -----------------------------------------------------------------------------


def draw_request(arrivals: Sequence[float], num_tokens: int) -> Figure:
    """Draw what one client saw of its request: when the events came, TTFT, and the rest.

    arrivals: seconds from sending to each event. num_tokens: of the answer. ValueError for fewer
    than two events.
    """
    if len(arrivals) < 2:
        raise ValueError("two events at least are drawn")
    times = [1e3 * time for time in arrivals]
    first, last = times[0], times[-1]
    figure = Figure(1.9)
    ax = figure.add_axes((0.03, 0.3, 0.94, 0.5))
    plain_axes(ax)
    ax.spines["left"].set_visible(False)
    ax.set_yticks([])
    ax.set(xlim=(-0.01 * last, 1.01 * last), ylim=(0, 3))
    ax.vlines(times, 0.1, 0.9, color=palette.REQUESTS[0], linewidth=2)
    spans = ((0, first, "TTFT", 1), (first, last, f"{num_tokens - 1} × TPOT", 0))
    for begin, end, name, color in spans:
        ax.barh(1.5, end - begin, left=begin, height=0.35, color=palette.REQUESTS[color])
        ax.text((begin + end) / 2, 2.3, name, ha="center", va="center", color=palette.INK)
    ax.set_xlabel("milliseconds since the request was sent", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_title("One request, as its client saw it", loc="left", **_BOLD)
    describe(
        figure,
        f"Chart: {len(times)} events of one answer of {num_tokens} tokens, the first after"
        f" {first:.0f}, the last after {last:.0f} milliseconds.",
        "The events of one answer: first a wait, then a steady stream.",
    )
    return figure


def draw_seen(rows: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """Draw what the requests of several runs saw: a dot for each, by its time and its wait.

    rows: name -> (time at which it was due, seconds it took) of each request. All charts have the
    same axes. ValueError where a row is empty.
    """
    if not rows or not all(rows.values()):
        raise ValueError("no requests to draw")
    figure = Figure(3.1)
    width = 0.92 / len(rows)
    most = max(seconds for seen in rows.values() for _, seconds in seen)
    end = max(time for seen in rows.values() for time, _ in seen)
    for i, (name, seen) in enumerate(rows.items()):
        ax = figure.add_axes((0.065 + i * width, 0.16, width - 0.05, 0.62))
        plain_axes(ax)
        look = {"color": palette.REQUESTS[i], "markersize": 4.5, "alpha": 0.7}
        ax.plot(*zip(*seen, strict=True), _MARKERS[i % 4], **look)
        ax.set_xlim(0, 1.02 * end)
        ax.set_ylim(-0.03 * most, 1.08 * most)
        ax.set_title(name, loc="left", fontsize=10.5, color=palette.INK)
        ax.set_xlabel("due at (seconds)", fontsize=9.5, color=palette.SOFT_INK)
        if not i:
            ax.set_ylabel("seconds it took", fontsize=9.5, color=palette.SOFT_INK)
        ax.grid(color=palette.LINE, linewidth=0.5, alpha=0.6)
    figure.text(0.01, 0.94, title, **_BOLD)
    told = [
        f"{name}: {len(seen)} requests, half of them up to"
        f" {statistics.median(s for _, s in seen):.3g}, the slowest {max(s for _, s in seen):.3g}"
        for name, seen in rows.items()
    ]
    counts = {name: sum(s > most / 4 for _, s in seen) for name, seen in rows.items()}
    described = ", ".join(f"{count} in “{name}”" for name, count in counts.items())
    describe(
        figure,
        "Charts: the seconds that each request took, by the time at which it was due."
        f" {'; '.join(told)}.",
        f"So many requests took more than a quarter of the longest time: {described}.",
    )
    return figure
