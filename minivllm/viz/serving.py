"""Pictures of a server under load: the report of `minivllm bench serve`.

One load: how its requests' times are distributed, and its tokens per second over time. Several
loads: latency and throughput against the load.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from minivllm.viz import palette
from minivllm.viz.figure import Figure, describe, plain_axes

#: Line style and key of each percentile.
_QUANTILES = (("median", "-", "o"), ("p90", "--", "s"), ("p99", ":", "^"))


def draw_served(report: Mapping[str, Any]) -> Figure:
    """Draw a report of ``minivllm bench serve``. ValueError where no request was answered."""
    points = [point for point in report["points"] if point["completed"]]
    if not points:
        raise ValueError("no request was answered")
    return _draw_one(points[0]) if len(points) == 1 else _draw_sweep(points, report.get("knee"))


def to_svg(figure: Figure) -> bytes:
    """The picture as an SVG, its alt text and caption as the description."""
    from minivllm.viz.themes import adapt

    adapt(figure)
    file = io.BytesIO()
    about = {"Date": None, "Description": f"{figure.alt} {figure.caption}"}
    figure.savefig(file, format="svg", metadata=about)
    return file.getvalue()


def _axes(figure: Figure, count: int) -> list[Axes]:
    width = 0.93 / count
    return [figure.add_axes((0.08 + i * width, 0.26, width - 0.06, 0.6)) for i in range(count)]


def _style(ax: Axes, title: str, x: str, y: str) -> None:
    plain_axes(ax)
    ax.set_title(title, loc="left", fontsize=11, weight="bold", color=palette.INK)
    ax.set_xlabel(x, fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel(y, fontsize=9.5, color=palette.SOFT_INK)
    ax.grid(color=palette.LINE, linewidth=0.5, alpha=0.6)


# --- one load -------------------------------------------------------------------------------------


def _draw_one(point: Mapping[str, Any]) -> Figure:
    figure = Figure(3.0)
    first, between, over = _axes(figure, 3)
    rows = [row for row in point["requests"] if row["status"] == "ok"]
    for ax, name, index in ((first, "ttft", 0), (between, "tpot", 1)):
        _shares(ax, [1e3 * row[name] for row in rows if row[name] is not None], index)
    _style(first, "First token (TTFT)", "milliseconds", "share of the requests")
    _style(between, "Per token (TPOT)", "milliseconds", "")
    rates, width = (
        point["over_time"]["output_tokens_per_second"],
        point["over_time"]["slice_seconds"],
    )
    edges = [width * i for i in range(len(rates) + 1)]
    over.stairs(rates, edges, fill=True, color=palette.REQUESTS[2], alpha=0.8)
    over.set_xlim(0, edges[-1])
    over.set_ylim(bottom=0)
    _style(over, "Output tokens per second", "seconds", "")
    alt = (
        f"Charts: the distribution of TTFT and TPOT of {point['completed']} requests, and output"
        " tokens per second over time."
    )
    describe(figure, alt, _one_in_words(point))
    return figure


def _shares(ax: Axes, values: Sequence[float], index: int) -> None:
    """Draw the share of the values up to each value, and mark the median and 99 %."""
    if not values:
        return
    ax.ecdf(values, color=palette.REQUESTS[index], linewidth=2)
    for share, label in ((0.5, "half"), (0.99, "99 %")):
        ax.axhline(share, color=palette.LINE, linestyle=":", linewidth=1)
        ax.annotate(
            label,
            (0.0, share),
            xycoords=("axes fraction", "data"),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=8.5,
            color=palette.SOFT_INK,
        )
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1.03)


def _ms(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "not measured"
    return " / ".join(f"{1e3 * spread[name]:,.1f}" for name, _, _ in _QUANTILES)


def _one_in_words(point: Mapping[str, Any]) -> str:
    return (
        f"{point['output_tokens_per_second']:,.0f} output tokens per second. Median / p90 / p99 in"
        f" milliseconds: TTFT {_ms(point['ttft'])}, TPOT {_ms(point['tpot'])}."
    )


# --- several loads --------------------------------------------------------------------------------


def _draw_sweep(points: Sequence[Mapping[str, Any]], knee: float | None) -> Figure:
    # Clients and rates are two different axes; a report with both shows the rates.
    kind = "rate" if any("rate" in point for point in points) else "clients"
    points = sorted((p for p in points if kind in p), key=lambda point: point[kind])
    x = [point[kind] for point in points]
    label = "requests per second offered" if kind == "rate" else "clients"
    figure = Figure(3.0)
    first, between, speed = _axes(figure, 3)
    for ax, name, index in ((first, "ttft", 0), (between, "tpot", 1)):
        for quantile, style, marker in _QUANTILES:
            pairs = [(p[kind], 1e3 * p[name][quantile]) for p in points if p[name]]
            look = {"color": palette.REQUESTS[index], "linewidth": 1.8, "ms": 5, "marker": marker}
            if pairs:
                ax.plot(*zip(*pairs, strict=True), style, label=quantile, **look)
        ax.set_ylim(bottom=0)
    _style(first, "First token (TTFT)", label, "milliseconds")
    _style(between, "Per token (TPOT)", label, "")
    tokens = [point["output_tokens_per_second"] for point in points]
    speed.plot(x, tokens, "-o", color=palette.REQUESTS[2], linewidth=2, ms=5)
    speed.set_ylim(bottom=0)
    _style(speed, "Output tokens per second", label, "")
    for ax in (first, between, speed):
        ax.set_xlim(left=0)
        if knee is not None and kind == "rate":
            look = {"color": palette.INK, "linestyle": "-.", "linewidth": 1.2}
            ax.axvline(knee, label="the highest rate that the server holds", **look)
    alt = f"Charts: TTFT, TPOT and output tokens per second at {len(points)} loads."
    _key(figure, first)
    describe(figure, alt, _sweep_in_words(points, kind, knee))
    return figure


def _key(figure: Figure, ax: Axes) -> None:
    """Name the lines below the charts: they have the same styles in each."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.05, -0.01),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=palette.INK,
    )


def _sweep_in_words(points: Sequence[Mapping[str, Any]], kind: str, knee: float | None) -> str:
    unit = "requests per second" if kind == "rate" else "clients"
    parts = [
        f"{point[kind]:g} {unit}: TTFT {_ms(point['ttft'])}, TPOT {_ms(point['tpot'])} (median /"
        f" p90 / p99 in ms), {point['output_tokens_per_second']:,.0f} tokens per second"
        for point in points
    ]
    held = f" The server holds {knee:g} requests per second." if knee is not None else ""
    return f"{'; '.join(parts)}.{held}"
