"""Each request, step by step: the scheduler's timeline, places in the batch, time between tokens.

All of it is read from a `minivllm.engine.trace.Trace`: the engine's own, or that of
`minivllm.course.sim.simulator`. `timeline`, `places` and `token_gaps` compute what `draw_timeline`,
`draw_places` and `draw_token_gaps` draw.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerBase
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from minivllm.engine.trace import StepRecord, Trace, TracedSequence
from minivllm.viz import palette
from minivllm.viz.block_table import check_step, names_in_order
from minivllm.viz.figure import WIDTH, describe, prepare

#: What a sequence does in a step. "again": the step computes tokens that were computed before a
#: preemption. "idle": it has a place, and the step computes nothing for it. "gone": neither queued
#: nor finished (aborted, or forgotten).
State = Literal["absent", "wait", "prefill", "chunk", "again", "decode", "idle", "finished", "gone"]

#: Tokens of prompts, tokens that a decode computes, and tokens computed again.
PROMPT, DECODE, AGAIN = "#E69F00", "#0072B2", "#882255"
#: Where a request is preempted, or vanishes.
STOP = palette.RESERVED
#: Every state has its own height or hatch, besides its colour: state -> (colour, height in rows,
#: hatch).
STYLES: dict[str, tuple[str, float, str]] = {
    "prefill": (PROMPT, 0.8, ""),
    "chunk": (PROMPT, 0.8, "/////"),
    "again": (AGAIN, 0.8, "xxxxx"),
    "decode": (DECODE, 0.46, ""),
    "idle": (palette.FREE, 0.46, ""),
    "wait": (palette.SOFT_INK, 0.1, ""),
}
_WORDS = {
    "wait": "waits",
    "chunk": "a chunk of its prompt",
    "prefill": "prompt, to its end",
    "decode": "decodes a token",
    "idle": "held, not computed",
    "again": "computed again",
}
#: Inches of the margins around the rows, and of a letter of a label.
_TOP, _BOTTOM, _LEFT, _RIGHT, _LETTER = 0.52, 0.9, 0.55, 0.2, 0.064
#: The most letters of a label.
_LABEL = 44
#: Inches: the largest height of a row, and of all rows together.
_ROW, _ALL_ROWS = 0.27, 6.5
#: Inches: lower rows get no letter, narrower cells no edges.
_LETTER_ROW, _EDGE_CELL = 0.13, 0.045
_FAINT = 0.22


@dataclass(frozen=True)
class TimelineRow:
    """One sequence through the whole trace; the tuples have one entry per step."""

    #: "request/index", as in the trace.
    name: str
    letter: str
    color: str
    states: tuple[State, ...]
    #: The number of tokens computed in the step.
    num_tokens: tuple[int, ...]
    #: Steps in whose planning the sequence lost its blocks.
    preempted: tuple[int, ...]
    #: The step that computed its last token.
    finished: int | None

    def count(self, *states: State) -> int:
        """The number of steps in which the sequence is in one of these states."""
        return sum(state in states for state in self.states)

    @property
    def gone(self) -> int | None:
        """The first step without the sequence, although it has not finished."""
        return self.states.index("gone") if "gone" in self.states else None


def is_prompt(item: TracedSequence) -> bool:
    """Whether a part of a step computes tokens that were known before.

    These are tokens of a prompt, or tokens lost in a preemption.
    """
    num_known = item.num_new_tokens - len(item.proposed_token_ids)
    return item.kind == "prefill" or num_known > 1 or not item.samples


def name_of(item: TracedSequence) -> str:
    """The trace's name for the sequence."""
    return f"{item.request_id}/{item.index}"


def num_again(trace: Trace) -> list[dict[str, int]]:
    """For each step: name -> how many of its computed tokens had been computed before."""
    furthest: dict[str, int] = {}
    steps = []
    for record in trace.steps:
        steps.append({})
        for item in record.scheduled:
            name, end = name_of(item), record.verified_end(item)
            steps[-1][name] = max(0, min(end, furthest.get(name, 0)) - item.start)
            furthest[name] = max(end, furthest.get(name, 0))
    return steps


def timeline(trace: Trace) -> list[TimelineRow]:
    """One row per sequence, in order of arrival. IndexError for an empty trace."""
    check_step(trace, 0)
    names, again = names_in_order(trace), num_again(trace)
    states: dict[str, list[State]] = {name: [] for name in names}
    tokens: dict[str, list[int]] = {name: [] for name in names}
    ends: dict[str, int] = {}
    for step, record in enumerate(trace.steps):
        items = {name_of(item): item for item in record.scheduled}
        queued = {**dict.fromkeys(record.waiting, "wait"), **dict.fromkeys(record.running, "idle")}
        for name in names:
            item = items.get(name)
            tokens[name].append(item.num_new_tokens if item else 0)
            if item is not None:
                state = _computes(item, again[step][name])
            elif name in queued:
                state = queued[name]
            elif name in ends:
                state = "finished"
            else:
                state = "gone" if any(s != "absent" for s in states[name][-1:]) else "absent"
            states[name].append(state)
        ends.update(dict.fromkeys(record.finished, step))
    preempted = {
        name: tuple(i for i, r in enumerate(trace.steps) if name in r.preempted) for name in names
    }
    return [
        TimelineRow(
            name,
            palette.request_letter(i),
            palette.request_color(i),
            tuple(states[name]),
            tuple(tokens[name]),
            preempted[name],
            ends.get(name),
        )
        for i, name in enumerate(names)
    ]


def _computes(item: TracedSequence, again: int) -> State:
    if not is_prompt(item):
        return "decode"
    return "again" if again else "prefill" if item.samples else "chunk"


def draw_timeline(
    trace: Trace,
    step: int | None = None,
    ax: Axes | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw what each request does in each step, one row per request, in order of arrival.

    step: mark this step, and draw the later ones faintly; negative steps count from the end, None
    marks none. ax: draw there instead of on a new figure. labels: one per request, in order of
    arrival; drawn beside its row. title: "" counts the requests. A colour says what a request does,
    so the letters have none. Returns the figure; it displays itself, with a caption in words.
    """
    rows = timeline(trace)
    step = None if step is None else check_step(trace, step)
    own = ax is None
    height = min(_ROW, _ALL_ROWS / len(rows))
    figure, ax = prepare(ax, _TOP + _BOTTOM + height * max(len(rows), 2))
    total = figure.get_size_inches()[1]
    names = [
        textwrap.shorten(label, _LABEL, placeholder=" …") for label in labels or [""] * len(rows)
    ]
    left = _LEFT + _LETTER * max(map(len, names))
    if own:
        ax.set_position(
            (
                left / WIDTH,
                _BOTTOM / total,
                (WIDTH - left - _RIGHT) / WIDTH,
                (total - _TOP - _BOTTOM) / total,
            )
        )
    cell = (WIDTH - left - _RIGHT) / len(trace.steps)
    for y, row in enumerate(rows):
        _draw_row(ax, y, row, step, cell, height)
        if height >= _LETTER_ROW:
            _draw_name(ax, y, row, names[y], height)
    if step is not None:
        ax.axvspan(
            step,
            step + 1,
            ymin=0,
            ymax=1,
            facecolor="none",
            edgecolor=palette.INK,
            linewidth=1.2,
            zorder=5,
            clip_on=False,
        )
    _style(ax, len(trace.steps), max(len(rows), 2), title or _timeline_title(trace, rows), "step")
    _state_legend(figure, rows, total)
    words = _timeline_in_words(trace, rows, step)
    describe(figure, f"{_timeline_alt(trace, rows)} {words}", _timeline_caption(trace, rows, step))
    return figure


def _draw_row(
    ax: Axes, y: int, row: TimelineRow, step: int | None, cell: float, height: float
) -> None:
    edges = cell >= _EDGE_CELL
    key = [(state, i > step if step is not None else False) for i, state in enumerate(row.states)]
    for (state, faint), group in groupby(range(len(key)), key=key.__getitem__):
        if state not in STYLES:
            continue
        steps = list(group)
        split = edges and state not in ("wait", "idle")
        for start, width in [(i, 1) for i in steps] if split else [(steps[0], len(steps))]:
            _bar(ax, state, (start, width), y, faint=faint, edge=0.6 if split else 0.0)
    for kind, at in [("✕", i) for i in row.preempted] + [("?", row.gone)] * (row.gone is not None):
        if step is None or at <= step:
            size = min(13.0, max(6.0, 48 * height))
            mark = ax.text(
                at,
                y + 0.5,
                kind,
                color=STOP,
                fontsize=size,
                weight="bold",
                ha="center",
                va="center",
                zorder=6,
            )
            mark.set_path_effects([withStroke(linewidth=2.5, foreground=palette.PAPER)])
    if row.finished is not None and (step is None or row.finished <= step):
        # In the last step this line stands on the edge of the axes.
        style = {"color": palette.INK, "linewidth": 1.6, "zorder": 4, "clip_on": False}
        ax.plot([row.finished + 1] * 2, [y + 0.1, y + 0.9], **style)


def _bar(
    ax: Axes, state: State, steps: tuple[int, int], y: int, *, faint: bool, edge: float
) -> None:
    """Draw one bar of a row.

    steps: the first one, and how many. edge: the width of the bar's outline.
    """
    (x, width), (color, tall, hatch) = steps, STYLES[state]
    outlined = state == "idle"
    face = palette.tint(color, _FAINT) if faint else color
    line = palette.LINE if faint else palette.SOFT_INK if outlined else palette.INK
    patch = Rectangle((x, y + 0.5 - tall / 2), width, tall, facecolor=face, linewidth=0)
    if hatch and not faint:
        patch.set(hatch=hatch, edgecolor=palette.PAPER)
    ax.add_patch(patch)
    if edge or outlined:
        outline = {"edgecolor": line if outlined else palette.PAPER, "linewidth": edge or 0.7}
        ax.add_patch(Rectangle((x, y + 0.5 - tall / 2), width, tall, fill=False, **outline))


def _draw_name(ax: Axes, y: int, row: TimelineRow, label: str, height: float) -> None:
    """Draw the request's letter left of its row, and its label left of that."""
    points = 72 * height
    chip = {"boxstyle": "square,pad=0.18", "facecolor": palette.FREE, "edgecolor": palette.LINE}
    options = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
    ax.annotate(
        row.letter,
        (0, y + 0.52),
        (-13, 0),
        ha="center",
        fontsize=min(9.0, 0.5 * points),
        weight="bold",
        bbox=chip,
        color=palette.text_on(palette.FREE),
        **options,
    )
    if label:
        ax.annotate(
            label,
            (0, y + 0.52),
            (-28, 0),
            ha="right",
            fontsize=min(8.5, 0.5 * points),
            color=palette.SOFT_INK,
            **options,
        )


def _style(ax: Axes, num_steps: int, num_rows: int, title: str, xlabel: str) -> None:
    ax.set_facecolor(palette.PAPER)
    ax.set_xlim(0, num_steps)
    ax.set_ylim(num_rows, 0)
    ax.set_title(title, loc="left", fontsize=12, weight="bold", color=palette.INK, pad=8)
    ax.set_xlabel(xlabel, fontsize=9.5, color=palette.SOFT_INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    ax.set_yticks([])
    ax.tick_params(colors=palette.SOFT_INK, labelsize=9, length=3)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(palette.LINE)


class _Bar(HandlerBase):
    """Draws a state in the legend as it looks in a row: its height and its hatch."""

    # matplotlib calls the method with these arguments.
    def create_artists(  # noqa: PLR0913
        self, legend, handle, x, y, width, height, fontsize, transform
    ):
        color, tall, hatch = STYLES[handle]
        tall = max(tall, 0.2)
        box = Rectangle(
            (x, y + height * (0.5 - 0.6 * tall)), width, 1.2 * height * tall, transform=transform
        )
        idle = handle == "idle"
        box.set(
            facecolor=color,
            hatch=hatch,
            edgecolor=palette.SOFT_INK if idle else palette.PAPER,
            linewidth=0.7 * idle,
        )
        return [box]


def _state_legend(figure: Figure, rows: list[TimelineRow], total: float) -> None:
    present = [state for state in _WORDS if any(row.count(state) for row in rows)]
    notes = []
    if any(row.preempted for row in rows):
        notes.append("✕ preempted")
    if any(row.gone is not None for row in rows):
        notes.append("? gone, unfinished")
    if any(row.finished is not None for row in rows):
        notes.append("▎done")
    figure.legend(
        present,
        [_WORDS[state] for state in present],
        handler_map={str: _Bar()},
        loc="lower left",
        bbox_to_anchor=(0.012, 0.02 / total),
        ncols=6,
        frameon=False,
        fontsize=8.5,
        labelcolor=palette.INK,
        handlelength=1.5,
        columnspacing=1.3,
        handletextpad=0.5,
    )
    figure.text(
        1 - 0.15 / WIDTH,
        0.17 / total,
        "   ".join(notes),
        fontsize=8.5,
        color=palette.INK,
        ha="right",
        va="center",
    )


def _timeline_title(trace: Trace, rows: list[TimelineRow]) -> str:
    most = max(len(record.running) for record in trace.steps)
    return f"{_plural(len(rows), 'request')}, at most {most} at a time, step by step"


def _timeline_alt(trace: Trace, rows: list[TimelineRow]) -> str:
    return (
        f"Chart: what each of {len(rows)} requests does in each of {len(trace.steps)} steps of the"
        " scheduler."
    )


def _timeline_caption(trace: Trace, rows: list[TimelineRow], step: int | None) -> str:
    """Say one thing: the rarest of what happens."""
    if step is not None:
        return _step_caption(rows, step)
    if gone := [row.letter for row in rows if row.gone is not None]:
        return f"Gone without having finished: {_list(gone)}."
    if again := [row.letter for row in rows if row.preempted]:
        return f"Preempted, and computed again: {_list(again)}."
    if chunked := [row.letter for row in rows if row.count("chunk")]:
        return f"Computed in chunks: the prompt{'s' * (len(chunked) > 1)} of {_list(chunked)}."
    longest = max(rows, key=lambda row: row.count("wait"))
    return f"{longest.letter} waits longest." if longest.count("wait") else "Nobody waits."


def _timeline_in_words(trace: Trace, rows: list[TimelineRow], step: int | None) -> str:
    if step is not None:
        return _step_in_words(trace.steps[step], rows, step)
    waits = [row.count("wait") for row in rows]
    longest = max(rows, key=lambda row: row.count("wait"))
    text = f"{longest.letter} waits longest, {max(waits)} steps." if max(waits) else "Nobody waits."
    if chunked := [row.letter for row in rows if row.count("chunk")]:
        text += f" Computed in chunks: the prompt{'s' * (len(chunked) > 1)} of {_list(chunked)}."
    if again := [row for row in rows if row.preempted]:
        times = sum(len(row.preempted) for row in again)
        tokens = sum(sum(step.values()) for step in num_again(trace))
        text += (
            f" {_plural(times, 'preemption')} ({_list([row.letter for row in again])}); {tokens:,}"
            " tokens were "
        )
        text += "computed a second time."
    if gone := [row.letter for row in rows if row.gone is not None]:
        text += f" Gone without having finished: {_list(gone)}."
    return text


#: What a request does in a step, by its state.
_DOES = {
    "prefill": "computes its prompt to the end",
    "chunk": "computes a chunk of its prompt",
    "again": "computes again what it had lost",
    "decode": "decodes",
    "idle": "holds its place",
    "wait": "waits",
}


def _step_caption(rows: list[TimelineRow], step: int, *, numbers: bool = False) -> str:
    """Who does what in a step; numbers: with the tokens of prompts."""
    parts = []
    for state, verb in _DOES.items():
        who = [row for row in rows if row.states[step] == state]
        if not who:
            continue
        counted = numbers and state in ("prefill", "chunk", "again")
        names = [r.letter + f" ({r.num_tokens[step]})" * counted for r in who]
        verb = verb if len(who) == 1 else _plural_verb(verb)
        parts.append(f"{_list(names)} {verb}")
    text = f"Step {step}: {'; '.join(parts) or 'nothing'}."
    if lost := [row.letter for row in rows if step in row.preempted]:
        text += f" {_list(lost)} {'was' if len(lost) == 1 else 'were'} preempted to make room."
    return text


def _step_in_words(record: StepRecord, rows: list[TimelineRow], step: int) -> str:
    words = _step_caption(rows, step, numbers=True)
    return f"{words} {_plural(record.num_tokens, 'token')} in all."


def _plural_verb(text: str) -> str:
    first, _, rest = text.partition(" ")
    return (
        f"{first[:-1]} {rest}".strip()
        .replace(" its ", " their ")
        .replace(" it ", " they ")
        .replace("place", "places")
    )


def _list(names: Sequence[str], limit: int = 8) -> str:
    if len(names) > limit:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# --- places in the batch --------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Which request takes which of the `max_num_seqs` places of the batch, step by step."""

    #: [place][step]: the request's index in order of arrival, or None.
    seats: list[list[int | None]]
    #: [step]: requests whose prompt is computed.
    prompts: list[set[int]]

    @property
    def num_steps(self) -> int:
        return len(self.prompts)

    @property
    def wasted(self) -> float:
        """The share of empty places, over all steps."""
        cells = [seat for seats in self.seats for seat in seats]
        return sum(seat is None for seat in cells) / len(cells)


def places(trace: Trace) -> Places:
    """Give every running sequence, in order of arrival, the first free place."""
    check_step(trace, 0)
    index = {name: i for i, name in enumerate(names_in_order(trace))}
    seats: list[list[int | None]] = [[] for _ in range(trace.max_num_seqs)]
    now: list[int | None] = [None] * trace.max_num_seqs
    prompts = []
    for record in trace.steps:
        running = [index[name] for name in record.running]
        now = [seat if seat in running else None for seat in now]
        for request in sorted(set(running) - set(now)):
            now[now.index(None)] = request
        for place, seat in enumerate(now):
            seats[place].append(seat)
        prompts.append({index[name_of(item)] for item in record.scheduled if is_prompt(item)})
    return Places(seats, prompts)


def draw_places(traces: Mapping[str, Trace]) -> Figure:
    """Draw which request takes which place of the batch, one panel per trace.

    All panels have one scale of steps. Empty places are hatched. traces: title -> trace, of the
    same requests. Returns the figure; it displays itself, with a caption in words.
    """
    all_places = {title: places(trace) for title, trace in traces.items()}
    longest = max(p.num_steps for p in all_places.values())
    row = 0.3
    heights = [row * len(p.seats) for p in all_places.values()]
    total = sum(heights) + 0.62 * len(heights) + 0.42
    figure, first = prepare(None, total)
    first.remove()
    y = total
    for (title, seating), tall in zip(all_places.items(), heights, strict=True):
        y -= 0.55 + tall
        ax = figure.add_axes((0.2 / WIDTH, y / total, (WIDTH - 0.4) / WIDTH, tall / total))
        _draw_seats(ax, seating, (WIDTH - 0.4) / longest, row)
        words = (
            f"{title}: {seating.num_steps} steps, {round(100 * seating.wasted)} % of the places"
            " empty"
        )
        _style(ax, longest, len(seating.seats), words, "")
        y -= 0.07
    ax.set_xlabel("step", fontsize=9.5, color=palette.SOFT_INK)
    sentences = [
        f"{title}: {p.num_steps} steps with {len(p.seats)} places, {round(100 * p.wasted)} % of"
        " them empty."
        for title, p in all_places.items()
    ]
    alt = f"Chart: who sits in which place of the batch at each step. {' '.join(sentences)}"
    describe(figure, alt, "Grey starts are prompts; hatched places computed nothing.")
    return figure


def _draw_seats(ax: Axes, seating: Places, cell: float, row: float) -> None:
    for place, seats in enumerate(seating.seats):
        for request, group in groupby(range(len(seats)), key=seats.__getitem__):
            steps = list(group)
            start, width = steps[0], len(steps)
            box = Rectangle((start, place + 0.08), width, 0.84, linewidth=0)
            ax.add_patch(box)
            if request is None:
                box.set(facecolor=palette.FREE, hatch=palette.HATCH_CACHED, edgecolor=palette.LINE)
                continue
            color = palette.request_color(request)
            box.set(facecolor=color)
            ax.add_patch(
                Rectangle(
                    (start, place + 0.08),
                    width,
                    0.84,
                    fill=False,
                    edgecolor=palette.PAPER,
                    linewidth=1,
                )
            )
            prompt = [step for step in steps if request in seating.prompts[step]]
            if prompt:
                ax.add_patch(
                    Rectangle(
                        (start, place + 0.08), len(prompt), 0.84, facecolor=palette.INK, linewidth=0
                    )
                )
            letter = palette.request_letter(request)
            if width * cell > 0.13 * len(letter):
                ax.text(
                    start + width / 2,
                    place + 0.52,
                    letter,
                    ha="center",
                    va="center",
                    weight="bold",
                    fontsize=min(9.0, 36 * row),
                    color=palette.text_on(color),
                )


# --- time between tokens --------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenGaps:
    """For each step with the next token of a decoding sequence, the longest wait for a token."""

    #: Seconds: when the step began, and when it ended.
    starts: list[float]
    times: list[float]
    #: Seconds since the token before.
    gaps: list[float]
    #: Whether the step computed prompt tokens, too.
    with_prompt: list[bool]
    #: The gaps of all sequences, one per token.
    every: list[float]


def token_gaps(trace: Trace) -> TokenGaps:
    """The times between tokens, from the durations in the trace."""
    check_step(trace, 0)
    last: dict[str, float] = {}
    found = TokenGaps([], [], [], [], [])
    for record in trace.steps:
        end = record.start_time + record.duration
        gaps = [
            end - last[name_of(item)]
            for item in record.scheduled
            if item.samples and name_of(item) in last
        ]
        if gaps:
            found.starts.append(record.start_time)
            found.times.append(end)
            found.gaps.append(max(gaps))
            found.with_prompt.append(any(is_prompt(item) for item in record.scheduled))
            found.every.extend(gaps)
        last.update({name_of(item): end for item in record.scheduled if item.samples})
    return found


def draw_token_gaps(traces: Mapping[str, Trace]) -> Figure:
    """Draw how long decoding requests wait for their next token, one panel per trace.

    All panels have one scale. A bar is a step: its width is the time of the step, its height the
    longest wait that the step ended. It is orange where the step computed prompt tokens. Returns
    the figure; it displays itself, with a caption in words.
    """
    found = {title: token_gaps(trace) for title, trace in traces.items()}
    count, tall = len(found), 1.55
    total = 0.45 + (tall + 0.5) * count
    figure, first = prepare(None, total)
    first.remove()
    top = 1.08 * max(1000 * max(gaps.gaps) for gaps in found.values())
    right = max(gaps.times[-1] for gaps in found.values())
    sentences = []
    for i, (title, gaps) in enumerate(found.items()):
        bottom = 0.45 + (count - 1 - i) * (tall + 0.5)
        ax = figure.add_axes((0.72 / WIDTH, bottom / total, (WIDTH - 0.92) / WIDTH, tall / total))
        widths = [end - start for start, end in zip(gaps.starts, gaps.times, strict=True)]
        colors = [PROMPT if prompt else DECODE for prompt in gaps.with_prompt]
        heights = [1000 * gap for gap in gaps.gaps]
        ax.bar(
            gaps.starts, heights, widths, align="edge", color=colors, linewidth=0, antialiased=False
        )
        worst, typical, late = (
            1000 * max(gaps.every),
            *(1000 * _share(gaps.every, s) for s in (0.5, 0.99)),
        )
        _style(ax, 1, 1, title, "")
        ax.set(xlim=(0, right), ylim=(0, top))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8))
        ax.spines["left"].set(visible=True, color=palette.LINE)
        ax.text(
            0.995,
            0.94,
            f"worst {worst:.0f}, 99th percentile {late:.0f}, median {typical:.1f}",
            va="top",
            ha="right",
            transform=ax.transAxes,
            fontsize=9.5,
            color=palette.INK,
            bbox={
                "boxstyle": "round,pad=0.2",
                "facecolor": palette.PAPER,
                "edgecolor": "none",
                "alpha": 0.85,
            },
        )
        sentences.append(
            f"{title}: median {typical:.1f}, 99th percentile {late:.0f}, worst {worst:.0f}."
        )
    ax.set_xlabel("seconds", fontsize=9.5, color=palette.SOFT_INK)
    figure.text(
        0.16 / WIDTH,
        0.5,
        "milliseconds between tokens",
        rotation=90,
        va="center",
        fontsize=9.5,
        color=palette.SOFT_INK,
    )
    alt = f"Chart: milliseconds between a request's tokens at each step. {' '.join(sentences)}"
    words = "Orange steps compute prompt tokens beside the decodes; blue ones do not."
    describe(figure, alt, words)
    return figure


def _share(values: Sequence[float], share: float) -> float:
    """The smallest value such that this share of the values is not larger."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]
