"""Pictures of chapter 5 that are not about a trace: costs of steps, waiting times, CPU and GPU.

    draw_step_costs(measured)     # milliseconds of a step, against its number of tokens
    draw_waits(curves)            # how long somebody waits, against how many others come
    draw_overlap(runs)            # CPU and GPU in turns, or the CPU one step ahead

All take plain numbers. `draw_overlap` takes any objects with the fields of `StepLike`, such as
`minivllm.course.sim.overlap.OverlapStep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from minivllm.engine.sequence import PENDING
from minivllm.viz import palette
from minivllm.viz.figure import WIDTH, Box, describe, plain_axes, prepare, side_legend

Points = Sequence[tuple[float, float]]

_LINES = ("-", "--", (0, (1.5, 1.2)), "-.")
_MARKERS = ("o", "s", "^", "D")


def draw_step_costs(measured: Mapping[str, Points], floor: float) -> Figure:
    """Draw what a step takes by its number of tokens; both scales are logarithmic.

    measured: what the tokens are -> (tokens in the step, milliseconds). floor: milliseconds to read
    the weights.
    """
    figure, ax = _chart(3.5)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    handles = _lines(ax, measured)
    handles.append(ax.axhline(floor, color=palette.SOFT_INK, linewidth=1.2, linestyle=(0, (1, 2))))
    _name_axes(ax, "What a step takes", "tokens in the step", "milliseconds")
    ax.set_yticks([5, 10, 20, 50, 100, 200], minor=False)
    ax.yaxis.set_minor_locator(NullLocator())
    for axis, form in ((ax.xaxis, "{:,.0f}"), (ax.yaxis, "{:g}")):
        axis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form.format(value)))
    side_legend(ax, handles, [*measured, "reading the weights"], "Tokens of")
    parts = []
    for name, points in measured.items():
        (x0, y0), (x1, y1) = points[0], points[-1]
        parts.append(f"{name}: {y0:.1f} at {x0:,} to {y1:.1f} at {x1:,}")
    alt = f"Chart: milliseconds of a step against its tokens. {'; '.join(parts)}."
    describe(figure, alt, "A step is never faster than reading the weights, the dotted line.")
    return figure


def draw_waits(curves: Mapping[str, Points], xlabel: str, title: str) -> Figure:
    """Draw seconds of waiting, as one line per policy.

    curves: policy -> (number of the others, seconds).
    """
    figure, ax = _chart(3.0)
    handles = _lines(ax, curves)
    ax.set_ylim(bottom=0)
    _name_axes(ax, title, xlabel, "seconds")
    side_legend(ax, handles, list(curves), "Policy")
    parts = []
    for name, points in curves.items():
        (x0, y0), (x1, y1) = points[0], points[-1]
        parts.append(f"{name}: {y0:.2f} with {x0:,}, {y1:.2f} with {x1:,}")
    alt = f"Chart: {title[0].lower()}{title[1:]}, in seconds. {'; '.join(parts)}."
    highest = max(curves, key=lambda name: curves[name][-1][1])
    describe(figure, alt, f"The more come, the longer it waits under “{highest}”.")
    return figure


def _chart(height: float) -> tuple[Any, Axes]:
    figure, ax = prepare(None, height)
    ax.set_position((0.085, 0.5 / height, 0.66, 1 - 0.95 / height))
    plain_axes(ax)
    return figure, ax


def _lines(ax: Axes, curves: Mapping[str, Points]) -> list[Any]:
    handles = []
    for i, points in enumerate(curves.values()):
        xs, ys = zip(*points, strict=True)
        style = {"linestyle": _LINES[i % 4], "marker": _MARKERS[i % 4], "markersize": 4.5}
        handles += ax.plot(xs, ys, color=palette.request_color(i), linewidth=2, **style)
    return handles


def _name_axes(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, weight="bold", color=palette.INK)
    ax.set_xlabel(xlabel, fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel(ylabel, fontsize=9.5, color=palette.SOFT_INK)


# --- CPU and GPU ----------------------------------------------------------------------------------

#: What the CPU does before and after the GPU, what the GPU does, and what it does for nothing.
PLAN, UPDATE, COMPUTE, USELESS = "#56B4E9", "#009E73", palette.REQUESTS[7], palette.RESERVED
#: Inches: a panel's heading, a lane and the arrows between the lanes, a row of tokens, a token.
_HEAD, _LANE, _ARROW, _ROW, _CHIP = 0.36, 0.3, 0.24, 0.24, 0.21
#: Inches: below a panel, below all panels, and the margins at the sides.
_GAP, _BOTTOM, _LEFT, _RIGHT = 0.2, 0.78, 1.32, 0.2


class StepLike(Protocol):
    """A step; its times are (start, end)."""

    number: int
    planned: tuple[float, float]
    computed: tuple[float, float]
    updated: tuple[float, float]
    #: What `schedule` knew: request -> its output tokens, PENDING where the value is not known.
    known: dict[str, list[int]]
    names: list[str]
    wasted: list[str]


def draw_overlap(
    runs: Mapping[str, Sequence[StepLike]],
    *,
    end_token: int | None = None,
    unit: str = "milliseconds",
    ax: Axes | None = None,
) -> Figure:
    """Draw what CPU and GPU do, one panel per run, and what `schedule` knew of the tokens.

    runs: title -> steps in order, not empty. All panels have one scale. end_token: this token is
    called "end".
    """
    letters = list(next(iter(runs.values()))[0].known)
    panel = _HEAD + 2 * _LANE + _ARROW + 0.12 + _ROW * len(letters) + _GAP
    height = 0.1 + panel * len(runs) + _BOTTOM
    figure, ax, own = *prepare(ax, height), ax is None
    if own:
        bottom = _BOTTOM / height
        width = (WIDTH - _LEFT - _RIGHT) / WIDTH
        ax.set_position((_LEFT / WIDTH, bottom, width, 1 - bottom))
    longest = max(steps[-1].updated[1] for steps in runs.values())
    ax.set_xlim(0, longest)
    ax.set_ylim(height - _BOTTOM, 0)
    plain_axes(ax)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(unit, fontsize=9.5, color=palette.SOFT_INK)
    scale = longest / (WIDTH - _LEFT - _RIGHT)
    for i, (title, steps) in enumerate(runs.items()):
        _Panel(ax, 0.1 + i * panel, scale, end_token).draw(title, steps, letters)
    _overlap_legend(ax, height, any(step.wasted for steps in runs.values() for step in steps))
    describe(figure, _overlap_alt(runs), _overlap_caption(runs))
    return figure


@dataclass(frozen=True)
class _Panel:
    """A run: its top in inches, and the width of an inch in units of time."""

    ax: Axes
    top: float
    scale: float
    end_token: int | None

    def draw(self, title: str, steps: Sequence[StepLike], letters: Sequence[str]) -> None:
        """Draw the heading, both lanes, and the tokens that each `schedule` knew."""
        cpu = self.top + _HEAD
        gpu = cpu + _LANE + _ARROW
        rows = gpu + _LANE + 0.12
        heading = {"fontsize": 11, "weight": "bold", "color": palette.INK, "va": "center"}
        self._left(title, self.top + 0.16, **heading)
        self._left("CPU", cpu + _LANE / 2)
        self._left("GPU", gpu + _LANE / 2)
        for i, letter in enumerate(letters):
            self._left(f"known of {letter}", rows + (i + 0.5) * _ROW)
        self._idle(steps, gpu)
        for step in steps:
            name = str(step.number)
            self._bar(step.planned, cpu, PLAN, name)
            self._bar(step.updated, cpu, UPDATE, name)
            self._bar(step.computed, gpu, COMPUTE, f"{name}: {' '.join(step.names)}")
            self._useless(step, gpu)
            self._arrow(step.planned[1], cpu + _LANE, step.computed[0], gpu)
            self._arrow(step.computed[1], gpu, step.updated[0], cpu + _LANE)
            self._line(step.planned[0], cpu + _LANE, rows + _ROW * len(letters))
            for i, letter in enumerate(letters):
                self._tokens(step.planned[0], rows + i * _ROW, step.known[letter])

    def _left(self, text: str, y: float, **options: Any) -> None:
        style = {"fontsize": 9.5, "color": palette.SOFT_INK, "va": "center"} | options
        self.ax.text((0.15 - _LEFT) * self.scale, y, text, **style)

    def _bar(self, span: tuple[float, float], y: float, color: str, text: str) -> None:
        start, width = span[0], span[1] - span[0]
        style = {"facecolor": color, "edgecolor": palette.PAPER, "linewidth": 1, "zorder": 3}
        self.ax.add_patch(Rectangle((start, y), width, _LANE, **style))
        ink = palette.text_on(color)
        # In a narrow bar, a larger letter would stand over the edges.
        size = 8.5 if width > 0.15 * self.scale else 6.5
        middle = {"ha": "center", "va": "center", "fontsize": size, "weight": "bold"}
        self.ax.text(start + width / 2, y + _LANE / 2, text, color=ink, zorder=5, **middle)

    def _useless(self, step: StepLike, y: float) -> None:
        """Mark the part of a step that nobody needs: the lower edge of its bar."""
        if step.wasted:
            (start, end), tall = step.computed, 0.3 * _LANE
            style = {"facecolor": USELESS, "edgecolor": palette.PAPER, "linewidth": 0}
            box = Rectangle((start, y + _LANE - tall), end - start, tall, zorder=4, **style)
            box.set_hatch("/////")
            self.ax.add_patch(box)

    def _idle(self, steps: Sequence[StepLike], y: float) -> None:
        """Draw the times without work of the GPU as a pale, hatched band."""
        end = 0.0
        for step in steps:
            box = Rectangle((end, y), step.computed[0] - end, _LANE, facecolor=palette.FREE)
            box.set(hatch=palette.HATCH_CACHED, edgecolor=palette.LINE, linewidth=0)
            self.ax.add_patch(box)
            end = step.computed[1]

    def _arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 7, "color": palette.INK, "lw": 0.9}
        ends = (x0, y0), (x1, y1)
        self.ax.add_patch(FancyArrowPatch(*ends, shrinkA=0, shrinkB=0, zorder=6, **style))

    def _line(self, x: float, y0: float, y1: float) -> None:
        self.ax.plot([x, x], [y0, y1], color=palette.LINE, linewidth=0.9, zorder=1)

    def _tokens(self, x: float, y: float, tokens: Sequence[int]) -> None:
        width = _CHIP * self.scale
        for i, token in enumerate(tokens):
            missing = token == PENDING
            text = "?" if missing else "end" if token == self.end_token else str(token)
            box = Box(x + (i + 0.12) * width, y + 0.02, width, _ROW - 0.04)
            style = {"facecolor": palette.PAPER if missing else palette.FREE, "zorder": 3}
            edge = (
                {"edgecolor": palette.INK, "linewidth": 1.2, "linestyle": (0, (2, 1.5))}
                if missing
                else {}
            )
            edge = edge or {"edgecolor": palette.LINE, "linewidth": 0.8}
            self.ax.add_patch(Rectangle(box.corner, box.width, box.height, **style, **edge))
            options = {"ha": "center", "va": "center", "fontsize": 6.8, "zorder": 4}
            self.ax.text(*box.center, text, color=palette.INK, **options)


def _overlap_legend(ax: Axes, height: float, useless: bool) -> None:
    words = [
        (PLAN, "", "schedule() and launch"),
        (COMPUTE, "", "the GPU computes"),
        (UPDATE, "", "update()"),
        (palette.FREE, palette.HATCH_CACHED, "idle"),
    ]
    words += [(USELESS, "/////", "for nothing")] * useless
    x, y = 0.15, 0.16 / height
    for color, hatch, text in words:
        box = Rectangle((x / WIDTH, y - 0.06 / height), 0.24 / WIDTH, 0.14 / height)
        edge = palette.LINE if color == palette.FREE else palette.PAPER
        box.set(facecolor=color, hatch=hatch, edgecolor=edge, linewidth=0.5)
        box.set(transform=ax.figure.transFigure, figure=ax.figure)
        ax.figure.add_artist(box)
        style = {"fontsize": 9, "color": palette.INK, "va": "center"}
        ax.figure.text((x + 0.32) / WIDTH, y, text, **style)
        x += 0.5 + 0.073 * len(text)
    ax.figure.text(
        x / WIDTH, y, "? value not known yet", fontsize=9, color=palette.INK, va="center"
    )


def _overlap_alt(runs: Mapping[str, Sequence[StepLike]]) -> str:
    parts = []
    for title, steps in runs.items():
        busy = sum(step.computed[1] - step.computed[0] for step in steps)
        end = steps[-1].updated[1]
        parts.append(f"{title}: {len(steps)} steps in {end:.1f}, the GPU is busy for {busy:.1f}")
    return f"Chart: what CPU and GPU do over some steps. {'; '.join(parts)}."


def _overlap_caption(runs: Mapping[str, Sequence[StepLike]]) -> str:
    ends = {title: steps[-1].updated[1] for title, steps in runs.items()}
    first, last = next(iter(ends)), list(ends)[-1]
    share = round(100 * ends[last] / ends[first])
    return f"“{last}” needs {share} % of the time of “{first}”."
