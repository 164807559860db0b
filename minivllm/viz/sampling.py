"""Pictures for the engine's chapter: a flat batch, sampling, and the life of a request.

The pictures show a step's tokens in one row, distributions and what filters leave of them, the
ruler that a random number falls on, and how often each token is drawn. `ruler` lays probabilities
on a line from 0 to 1 in the order of the token ids; `draw_ruler` shows it. All take plain numbers
or traces; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from minivllm.engine.trace import Trace
from minivllm.viz import palette
from minivllm.viz.figure import Figure, describe, plain_axes
from minivllm.viz.timeline import STYLES, timeline

_BOLD = {"fontsize": 12, "weight": "bold", "color": palette.INK}
_SOFT = {"fontsize": 9.5, "color": palette.SOFT_INK}
#: Columns narrower than this (inches) get no numbers.
_NARROW = 0.2


# --- a step's tokens ------------------------------------------------------------------------------


def draw_flat_batch(inputs: Any, block_size: int, words: Sequence[str] | None = None) -> Figure:
    """Draw a step's tokens: their requests, positions and slots, and which tokens get logits.

    inputs: a `minivllm.engine.batch.BatchInputs`. words: the text for each token; None shows the
    token ids.
    """
    tokens, positions = inputs.token_ids.tolist(), inputs.positions.tolist()
    edges, slots = inputs.attention.query_start_loc.tolist(), inputs.attention.slot_mapping.tolist()
    asked, count, num_rows = inputs.logits_indices.tolist(), len(inputs.token_ids), len(edges) - 1
    figure = Figure(3.3)
    ax = figure.add_axes((0.135, 0.02, 0.845, 0.86))
    width = 9.0 * 0.845 / max(count, 1)
    ax.set_xlim(0, max(count, 1))
    ax.set_ylim(7.35, -1.0)
    ax.set_axis_off()
    size = 10 if width > 0.42 else 8.5 if width > 0.3 else 7.5
    names = [palette.request_letter(i) for i in range(num_rows)]
    for row in range(num_rows):
        begin, end = edges[row], edges[row + 1]
        color = palette.request_color(row)
        ax.text((begin + end) / 2, -0.5, names[row], ha="center", va="center", **_BOLD)
        for i in range(begin, end):
            face = {"facecolor": color, "edgecolor": palette.PAPER, "linewidth": 1}
            ax.add_patch(Rectangle((i, 0.0), 1, 1, **face))
            pale = {
                "facecolor": palette.tint(color, 0.25),
                "edgecolor": palette.PAPER,
                "linewidth": 1,
            }
            for y in (1.25, 2.5):
                ax.add_patch(Rectangle((i, y), 1, 1, **pale))
            if width < _NARROW:
                continue
            style = {"ha": "center", "va": "center", "fontsize": size}
            label = str(tokens[i]) if words is None else _shown(words[i])
            ax.text(i + 0.5, 0.5, label, color=palette.text_on(color), **style)
            ax.text(i + 0.5, 1.75, str(positions[i]), color=palette.INK, **style)
            ax.text(i + 0.5, 3.0, str(slots[i]), color=palette.INK, **style)
    for edge in edges:
        ax.plot([edge, edge], [0, 4.15], color=palette.INK, linewidth=1.4, clip_on=False)
        ax.text(
            edge,
            4.6,
            str(edge),
            ha="center",
            va="center",
            fontsize=10,
            weight="bold",
            color=palette.INK,
        )
    for i in asked:
        arrow = {"arrowstyle": "-|>", "color": palette.RESERVED, "linewidth": 1.6}
        ax.annotate("", (i + 0.5, 6.65), (i + 0.5, 5.2), arrowprops=arrow, annotation_clip=False)
        ax.text(
            i + 0.5,
            7.0,
            "next?",
            ha="center",
            va="center",
            fontsize=9.5,
            color=palette.RESERVED,
            weight="bold",
        )
    labels = ("token", "position", "slot", "query_start_loc", "logits_indices")
    for y, name in zip((0.5, 1.75, 3.0, 4.6, 5.9), labels, strict=True):
        ax.text(
            -0.012 * count, y, name, ha="right", va="center", fontsize=9, color=palette.SOFT_INK
        )
    rows = [
        f"{names[i]} {_plural(edges[i + 1] - edges[i], 'token')} from position"
        f" {positions[edges[i]]}"
        for i in range(num_rows)
    ]
    alt = (
        f"Picture: the {count} tokens of a step laid end to end, with positions and slots in blocks"
        f" of {block_size}. {'; '.join(rows)}."
    )
    followed = [names[next(r for r in range(num_rows) if i < edges[r + 1])] for i in asked]
    followed = " and ".join(filter(None, [", ".join(followed[:-1]), *followed[-1:]])) or "nobody"
    figure.text(
        0.01,
        0.93,
        f"One step: {_plural(count, 'token')} of {_plural(num_rows, 'request')}",
        **_BOLD,
    )
    describe(figure, alt, f"A next token is chosen for {followed}.")
    return figure


# --- distributions --------------------------------------------------------------------------------


def draw_distributions(
    labels: Sequence[str], panels: Mapping[str, Sequence[float]], title: str = ""
) -> Figure:
    """Draw distributions over the same tokens side by side; a 0 is drawn as cut off.

    panels: name -> probabilities. Where another panel lacks a token of the first panel, it shows
    the token's outline. ValueError for panels that do not match the labels.
    """
    if not panels or any(len(values) != len(labels) for values in panels.values()):
        raise ValueError(
            f"{len(labels)} labels, panels of {[len(values) for values in panels.values()]}."
        )
    figure = Figure(0.95 + 0.27 * len(labels))
    height, first = figure.get_figheight(), next(iter(panels.values()))
    top = max(max(values) for values in panels.values())
    left, gap = 0.11, 0.025
    width = (0.99 - left - gap * (len(panels) - 1)) / len(panels)
    for column, (name, values) in enumerate(panels.items()):
        ax = figure.add_axes(
            (left + column * (width + gap), 0.12 / height, width, 1 - 0.95 / height)
        )
        ax.set_xlim(0, 1.32 * top)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        for i, value in enumerate(values):
            color = palette.request_color(column)
            if value > 0:
                ax.add_patch(Rectangle((0, i - 0.36), value, 0.72, facecolor=color, linewidth=0))
                text, ink = f"{value:.2f}", palette.INK
            else:
                ghost = {
                    "facecolor": palette.FREE,
                    "edgecolor": palette.LINE,
                    "hatch": palette.HATCH_CACHED,
                }
                ax.add_patch(Rectangle((0, i - 0.36), first[i], 0.72, linewidth=0.6, **ghost))
                text, ink = "cut", palette.SOFT_INK
            ax.text(
                max(value, first[i] * (value == 0)) + 0.02 * top,
                i,
                text,
                va="center",
                fontsize=8.5,
                color=ink,
            )
        ax.set_title(name, fontsize=10.5, color=palette.INK, loc="left")
        ax.set_xticks([])
        ax.set_yticks(
            range(len(labels)), [_shown(label) if column == 0 else "" for label in labels]
        )
        plain_axes(ax)
        ax.tick_params(axis="y", colors=palette.INK, length=0, labelsize=10)
        ax.spines["bottom"].set_visible(False)
    figure.text(0.01, 1 - 0.3 / height, title or "What may come next", **_BOLD)
    parts = []
    for name, values in panels.items():
        best = max(range(len(values)), key=values.__getitem__)
        kept = sum(value > 0 for value in values)
        left = f", {kept} of {len(labels)} left" if kept < len(labels) else ""
        parts.append(f"{name}: {_shown(labels[best])!r} has {values[best]:.2f}{left}")
    alt = (
        f"Chart: {_plural(len(panels), 'distribution')} over the same {len(labels)} tokens, side by"
        f" side. {'; '.join(parts)}."
    )
    cut = any(value == 0 for values in panels.values() for value in values)
    caption = (
        "A hatched bar is a token that was cut off." if cut else "The numbers are probabilities."
    )
    describe(figure, alt, caption)
    return figure


# --- the ruler ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One drawn token: u fell into the part of `chosen`.

    probabilities: of all tokens, in order of their ids.
    """

    probabilities: tuple[float, ...]
    u: float
    chosen: int
    #: The text so far.
    before: str = ""


@dataclass(frozen=True)
class SampledText:
    """How an answer was drawn, token by token: the input of `draw_ruler` and `scrub`."""

    steps: tuple[Draw, ...]
    #: The words of all tokens.
    words: tuple[str, ...]


def ruler(probabilities: Sequence[float]) -> list[tuple[float, float]]:
    """(begin, end) of each token's part of the line from 0 to 1, in the order of the ids.

    The probabilities are scaled to add up to 1. ValueError where they add up to 0.
    """
    total, edge, parts = sum(probabilities), 0.0, []
    if not total > 0:
        raise ValueError("These probabilities add up to 0.")
    for p in probabilities:
        parts.append((edge, edge + p / total))
        edge += p / total
    return parts


def draw_ruler(replay: SampledText, step: int = -1, names: int = 7) -> Figure:
    """Draw the ruler of one step with its u: likely tokens by name, the others in grey.

    step: index into replay.steps, negative from the end; IndexError where there is no such step.
    names: the most tokens to name. A token whose name does not fit into its part stays grey.
    """
    count = len(replay.steps)
    if not -count <= step < count:
        raise IndexError(f"There is no step {step} among {count}.")
    step %= count
    draw = replay.steps[step]
    parts = ruler(draw.probabilities)
    likeliest = sorted(range(len(parts)), key=lambda i: parts[i][0] - parts[i][1])[:names]
    words = {token: _shown(replay.words[token]) for token in likeliest}
    sizes = {
        token: _fitting_size(words[token], parts[token][1] - parts[token][0]) for token in words
    }
    named = sorted(token for token, size in sizes.items() if size)
    figure = Figure(2.2)
    ax = figure.add_axes((0.02, 0.03, 0.96, 0.79))
    ax.set_xlim(-0.005, 1.005)
    ax.set_ylim(0, 3)
    ax.set_axis_off()
    ax.add_patch(Rectangle((0, 1), 1, 0.8, facecolor=palette.CACHED, linewidth=0))
    for place, token in enumerate(named):
        _draw_part(ax, parts[token], palette.request_color(place), words[token], sizes[token])
    begin, end = parts[draw.chosen]
    ax.plot([draw.u, draw.u], [0.9, 2.15], color=palette.INK, linewidth=2.2)
    frame = {"fill": False, "edgecolor": palette.INK, "linewidth": 2}
    ax.add_patch(Rectangle((begin, 1), max(end - begin, 0.002), 0.8, **frame))
    side = "left" if draw.u < 0.2 else "right" if draw.u > 0.8 else "center"
    chosen = _shown(replay.words[draw.chosen])
    ax.text(draw.u, 2.42, f"u = {draw.u:.3f}  →  {chosen!r}", ha=side, va="center", **_BOLD)
    rest = 1 - sum(parts[i][1] - parts[i][0] for i in named)
    grey = "; grey: all others" if rest >= _SEEN else ""
    notes = ((0, "0", "left"), (0.5, f"tokens in order of their ids{grey}", "center"))
    for x, text, align in (*notes, (1, "1", "right")):
        ax.text(x, 0.25, text, ha=align, va="center", **_SOFT)
    text = draw.before.replace("\n", " ")
    if not text:
        title = "The first token of the answer"
    else:
        title = f"… {text[-68:]} ▁" if len(text) > 70 else f"{text} ▁"
    figure.text(0.02, 0.86, title, **_BOLD)
    describe(
        figure,
        f"Picture: the probabilities of step {step} laid on a line from 0 to 1, and the random"
        f" number on it. {_plural(len(named), 'token')} with a name, {1 - rest:.2f} of the line."
        f" {draw.u:.3f} falls into the part from {begin:.3f} to {end:.3f}.",
        f"Step {step}: the random number falls into the part of {chosen!r}.",
    )
    return figure


#: The smallest grey part of a ruler that a reader sees.
_SEEN = 0.004


def _fitting_size(name: str, width: float) -> float:
    """The largest font size with which the name fits into a part of the ruler; 0 for none."""
    sizes = (10.5, 9.0, 7.5)
    return next((s for s in sizes if width > (0.011 * len(name) + 0.012) * s / sizes[0]), 0.0)


def _draw_part(ax: Axes, part: tuple[float, float], color: str, name: str, fontsize: float) -> None:
    """Draw one token's part of the ruler: its name in it, its length below it."""
    begin, end = part
    face = {"facecolor": color, "edgecolor": palette.PAPER, "linewidth": 0.8}
    ax.add_patch(Rectangle((begin, 1), end - begin, 0.8, **face))
    middle = {"ha": "center", "va": "center"}
    ink = palette.text_on(color)
    ax.text((begin + end) / 2, 1.4, name, fontsize=fontsize, color=ink, **middle)
    ax.text((begin + end) / 2, 0.72, f"{end - begin:.2f}", **middle, **_SOFT)


# --- how often ------------------------------------------------------------------------------------


def draw_frequencies(
    labels: Sequence[str], probabilities: Sequence[float], draws: Mapping[str, Sequence[int]]
) -> Figure:
    """Draw probabilities as bars, and beside them the frequency of each drawn token.

    draws: name -> counts. ValueError where the lengths differ, or nothing was drawn.
    """
    if any(len(counts) != len(labels) or not sum(counts) for counts in draws.values()) or len(
        probabilities
    ) != len(labels):
        raise ValueError(
            f"{len(labels)} labels, {len(probabilities)} probabilities, draws of"
            f" {list(map(len, draws.values()))}."
        )
    figure = Figure(3.0)
    ax = figure.add_axes((0.065, 0.13, 0.925, 0.73))
    shares = {name: [count / sum(counts) for count in counts] for name, counts in draws.items()}
    width = 0.8 / (1 + len(shares))
    everything = {"probability": list(probabilities), **shares}
    for k, (name, values) in enumerate(everything.items()):
        color = palette.CACHED if k == 0 else palette.request_color(k - 1)
        for i, value in enumerate(values):
            style = {"facecolor": color, "linewidth": 0, "label": name if i == 0 else None}
            ax.add_patch(Rectangle((i - 0.4 + k * width, 0), 0.92 * width, value, **style))
    ax.set_xlim(-0.55, len(labels) - 0.45)
    ax.set_ylim(0, 1.18 * max(max(values) for values in everything.values()))
    ax.set_xticks(range(len(labels)), [_shown(label) for label in labels])
    plain_axes(ax)
    ax.tick_params(axis="x", colors=palette.INK, length=0, labelsize=10)
    ax.legend(frameon=False, fontsize=9.5, loc="upper right", ncols=len(everything))
    figure.text(0.01, 0.92, "How often each token comes", **_BOLD)
    gaps = {
        name: 100 * sum(abs(a - b) for a, b in zip(values, probabilities, strict=True)) / 2
        for name, values in shares.items()
    }
    parts = [
        f"{name}: {gap:.0f} % of the draws fell on another token" for name, gap in gaps.items()
    ]
    alt = (
        f"Chart: the probabilities of {len(labels)} tokens, and the shares with which they were"
        f" drawn. Against the probabilities, {'; '.join(parts)}."
    )
    worst = max(gaps, key=lambda name: gaps[name])
    describe(figure, alt, f"Farthest from the probabilities: {worst}.")
    return figure


# --- the life of a request ------------------------------------------------------------------------


@dataclass(frozen=True)
class Life:
    """The steps of one sequence, counted from the first step after its request arrived (0)."""

    states: tuple[str, ...]
    first_scheduled: int
    first_token: int
    finished: int
    num_tokens: int

    @property
    def ttft(self) -> int:
        """The number of steps until the first token."""
        return self.first_token + 1

    @property
    def tpot(self) -> float:
        """The mean number of steps between tokens after the first; 0 where there is only one."""
        return (
            (self.finished - self.first_token) / (self.num_tokens - 1)
            if self.num_tokens > 1
            else 0.0
        )


def life(trace: Trace, name: str, arrival: int = 0) -> Life:
    """The life of the sequence called name ("3/0") in a trace.

    arrival: the first step after its request arrived. KeyError for a name that is not in the trace;
    ValueError for a sequence that got no token or has not finished.
    """
    row = {row.name: row for row in timeline(trace)}[name]
    sampled = [
        record.step - trace.steps[0].step
        for record in trace.steps
        for item in record.scheduled
        if f"{item.request_id}/{item.index}" == name and item.samples
    ]
    if row.finished is None or not sampled:
        raise ValueError(f"{name} has not finished in this trace.")
    states = row.states[arrival : row.finished + 1]
    begins = next(i for i, state in enumerate(states) if state not in ("wait", "absent"))
    return Life(tuple(states), begins, sampled[0] - arrival, row.finished - arrival, len(sampled))


def draw_life(
    trace: Trace, name: str, arrival: int = 0, durations: Sequence[float] | None = None
) -> Figure:
    """Draw one request from its arrival to its last token: waiting, prompt, decodes.

    durations: the milliseconds of each step of the trace; a step is then as wide as it is long, and
    TTFT and TPOT are in milliseconds. None gives them in steps.
    """
    found = life(trace, name, arrival)
    steps = len(found.states)
    edges = [0.0, *accumulate(list(durations or [1] * (arrival + steps))[arrival:][:steps])]
    first, total = edges[found.ttft], edges[-1]
    figure = Figure(2.4)
    ax = figure.add_axes((0.02, 0.03, 0.96, 0.84))
    ax.set_xlim(-0.005 * total, 1.005 * total)
    ax.set_ylim(4.1, -0.3)
    ax.set_axis_off()
    for i, state in enumerate(found.states):
        color, height, hatch = STYLES.get(state, (palette.FREE, 0.46, ""))
        line = {"edgecolor": palette.PAPER, "linewidth": 0.8 if steps < 90 else 0, "hatch": hatch}
        box = (edges[i], 1.5 - height / 2), edges[i + 1] - edges[i], height
        ax.add_patch(Rectangle(*box, facecolor=color, **line))
    ttft, gaps = _in_words(found, durations and first, durations and total - first)
    _bracket(ax, 0, first, 0.55, f"time to first token: {ttft}")
    rest, more = "", found.num_tokens - 1
    if more:
        _bracket(ax, first, total, 2.45, f"{_plural(more, 'more token')} in {gaps}", below=True)
        rest = f" {_plural(more, 'more token')} in {gaps}."
    begins = edges[found.first_scheduled]
    marks = [(0, "asked", "left"), (first, "first token", "left"), (total, "done", "right")]
    if begins >= 0.1 * total:
        # Where the first step comes at once, this mark has no room and says nothing.
        marks.append((begins, "in a batch", "right"))
    for x, label, align in marks:
        ax.plot([x, x], [1.0, 3.35], color=palette.INK, linewidth=1.2, linestyle=(0, (3, 2)))
        ax.text(x, 3.65, label, ha=align, va="center", fontsize=10, color=palette.INK)
    figure.text(0.01, 0.9, "The life of a request", **_BOLD)
    waits = sum(state == "wait" for state in found.states)
    prompt = sum(state in ("prefill", "chunk") for state in found.states)
    describe(
        figure,
        f"Timeline: one request over {steps} steps, from its arrival to its last token. It waits"
        f" for {_plural(waits, 'step')}, its prompt takes {prompt}.{rest}",
        f"The first token is there after {ttft}.",
    )
    return figure


def _in_words(found: Life, ttft: float | None, rest: float | None) -> tuple[str, str]:
    """TTFT, and how long the tokens after the first took; in steps where no times are given.

    ttft, rest: milliseconds until the first token, and from there to the last one.
    """
    if ttft is None or rest is None:
        steps = _plural(found.finished - found.first_token, "step")
        return _plural(found.ttft, "step"), f"{steps}: {found.tpot:.2f} per token"
    each = rest / max(found.num_tokens - 1, 1)
    return f"{ttft:.1f} milliseconds", f"{rest:.1f} milliseconds: {each:.2f} per token"


def _bracket(ax: Axes, begin: float, end: float, y: float, text: str, below: bool = False) -> None:
    tip = y - 0.25 if below else y + 0.25
    ax.plot([begin, begin, end, end], [tip, y, y, tip], color=palette.RESERVED, linewidth=1.6)
    middle, limits = (begin + end) / 2, ax.get_xlim()
    align, x = ("left", limits[0]) if end < 0.4 * limits[1] else ("center", middle)
    style = {
        "ha": align,
        "va": "center",
        "fontsize": 10.5,
        "weight": "bold",
        "color": palette.RESERVED,
    }
    ax.text(x, y + (0.36 if below else -0.36), text, **style)


# --- helpers --------------------------------------------------------------------------------------


def _shown(label: str) -> str:
    """A token's text with visible spaces and line ends."""
    return label.replace("\n", "↵").replace(" ", "␣") or "∅"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)
