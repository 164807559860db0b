"""Pictures of a CPU and a GPU at work, and of batches padded to a recorded size.

The pictures show two timelines, buckets, rows and writes. `draw_streams` takes any objects with
lane, name, kind, start and end, such as `minivllm.course.sim.streams.Span`; the others take plain
numbers. This module does not import the simulator.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from minivllm.viz import palette
from minivllm.viz.block_table import check_step
from minivllm.viz.figure import WIDTH, Box, describe, plain_axes, prepare

#: What is done in a lane: kind -> (colour, hatch, words of the legend).
KINDS: dict[str, tuple[str, str, str]] = {
    "launch": (palette.REQUESTS[1], "", "CPU launches a kernel"),
    "replay": (palette.REQUESTS[3], "", "CPU launches a whole graph"),
    "work": (palette.REQUESTS[4], "", "CPU plans and looks at results"),
    "wait": (palette.FREE, "/////", "CPU waits for the GPU"),
    "kernel": (palette.REQUESTS[0], "", "GPU computes"),
    "copy": (palette.REQUESTS[6], "", "GPU copies"),
}
LANES = ("CPU", "GPU")
#: Rows that compute something, and rows that only fill a recorded size.
REAL, PADDING = palette.USED, palette.WASTED
#: A place that was written although it must not be.
HARM = palette.RESERVED
#: Inches of a lane, of a run's heading, and of the margins around all runs.
_LANE, _HEAD, _TOP, _BOTTOM, _LEFT, _RIGHT = 0.42, 0.42, 0.1, 0.95, 0.62, 0.25
#: Inches: the least width of a bar with an edge, and the width of a letter of a bar's name.
_EDGE_BAR, _LETTER = 0.05, 0.078


class SpanLike(Protocol):
    """Times in microseconds."""

    lane: str
    name: str
    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class LaneTimes:
    """The numbers of a run, in microseconds."""

    #: Until the last thing ends.
    total: float
    #: The time in which the GPU does something.
    gpu: float
    #: The time in which the CPU waits for the GPU.
    waiting: float
    #: Launches of single kernels and of whole graphs.
    launches: int
    replays: int

    @property
    def gpu_share(self) -> float:
        return self.gpu / self.total if self.total else 0.0


def lane_times(spans: Sequence[SpanLike]) -> LaneTimes:
    """The sums over the spans of a run. ValueError without spans."""
    if not spans:
        raise ValueError("nothing has happened: there is no span to draw")
    kinds = Counter(span.kind for span in spans)
    total = max(span.end for span in spans)
    gpu = sum(span.end - span.start for span in spans if span.lane == "GPU")
    waiting = sum(span.end - span.start for span in spans if span.kind == "wait")
    return LaneTimes(total, gpu, waiting, kinds["launch"], kinds["replay"])


def draw_streams(runs: Mapping[str, Sequence[SpanLike]], ax: Axes | None = None) -> Figure:
    """Draw the work of CPU and GPU: a pair of lanes per run, all on one time scale.

    runs: title -> spans. ax: draw there instead of on a new figure.
    """
    times = {title: lane_times(spans) for title, spans in runs.items()}
    if not times:
        raise ValueError("there is no run to draw")
    height = _TOP + _BOTTOM + len(runs) * (_HEAD + 2 * _LANE)
    own_figure = ax is None
    figure, ax = prepare(ax, height)
    if own_figure:
        ax.set_position(
            (
                _LEFT / WIDTH,
                _BOTTOM / height,
                1 - (_LEFT + _RIGHT) / WIDTH,
                1 - (_TOP + _BOTTOM) / height,
            )
        )
    longest = max(run.total for run in times.values())
    unit, name = (1.0, "microseconds") if longest < 10_000 else (1000.0, "milliseconds")
    inches = (WIDTH - _LEFT - _RIGHT) / longest
    y = 0.0
    for title, spans in runs.items():
        _draw_heading(ax, y, title, times[title], unit, longest)
        y += _HEAD
        for lane in LANES:
            ax.add_patch(
                Rectangle(
                    (0, y), times[title].total / unit, _LANE, facecolor=palette.FREE, linewidth=0
                )
            )
            ax.annotate(
                lane,
                (0, y + _LANE / 2),
                (-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
                weight="bold",
                color=palette.INK,
            )
            for span in spans:
                if span.lane == lane:
                    _draw_span(ax, span, y, unit, inches)
            y += _LANE
    _style_streams(ax, longest / unit, y, name)
    _stream_legend(
        figure, [span.kind for spans in runs.values() for span in spans], height, own_figure
    )
    describe(figure, f"{_streams_alt(runs)} {_streams_in_words(times)}", _streams_caption(times))
    return figure


def _draw_heading(
    ax: Axes, y: float, title: str, run: LaneTimes, unit: float, longest: float
) -> None:
    ax.text(
        0, y + _HEAD * 0.68, title, fontsize=10.5, weight="bold", color=palette.INK, va="center"
    )
    ax.text(
        longest / unit,
        y + _HEAD * 0.68,
        f"{_duration(run.total)}, GPU busy {run.gpu_share:.0%}",
        fontsize=9,
        color=palette.SOFT_INK,
        ha="right",
        va="center",
    )


def _draw_span(ax: Axes, span: SpanLike, y: float, unit: float, inches: float) -> None:
    color, hatch, _ = KINDS[span.kind]
    wide, pad = (span.end - span.start) * inches, 0.05
    box = Rectangle(
        (span.start / unit, y + pad),
        (span.end - span.start) / unit,
        _LANE - 2 * pad,
        facecolor=color,
    )
    box.set(linewidth=0.6 if wide >= _EDGE_BAR else 0, edgecolor=palette.PAPER)
    if hatch:
        box.set(hatch=hatch, edgecolor=palette.LINE)
    ax.add_patch(box)
    if wide >= _LETTER * (len(span.name) + 1):
        words = (
            {"boxstyle": "square,pad=0.12", "facecolor": color, "edgecolor": "none"}
            if hatch
            else None
        )
        ax.text(
            (span.start + span.end) / 2 / unit,
            y + _LANE / 2,
            span.name,
            fontsize=8.5,
            ha="center",
            va="center",
            color=palette.text_on(color),
            bbox=words,
        )


def _style_streams(ax: Axes, longest: float, bottom: float, unit: str) -> None:
    ax.set_facecolor(palette.PAPER)
    ax.set_xlim(0, longest)
    ax.set_ylim(bottom, 0)
    ax.set_yticks([])
    ax.set_xlabel(unit, fontsize=9.5, color=palette.SOFT_INK)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=9))
    ax.tick_params(colors=palette.SOFT_INK, labelsize=9, length=3)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(palette.LINE)


def _stream_legend(figure: Figure, kinds: Sequence[str], height: float, own_figure: bool) -> None:
    if not own_figure:
        return
    handles = [
        Patch(facecolor=color, hatch=hatch, label=words, edgecolor=palette.LINE if hatch else color)
        for kind, (color, hatch, words) in KINDS.items()
        if kind in kinds
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.01, 0.06 / height),
        ncols=5,
        frameon=False,
        fontsize=8,
        labelcolor=palette.INK,
        handlelength=1.2,
        columnspacing=0.9,
        handletextpad=0.5,
    )


def _duration(us: float) -> str:
    return f"{us:,.0f} µs" if us < 10_000 else f"{us / 1000:,.1f} ms"


def _streams_alt(runs: Mapping[str, Any]) -> str:
    return (
        "Chart: what a CPU and a GPU do over time, a lane for each, in"
        f" {_plural(len(runs), 'run')}."
    )


def _streams_caption(times: Mapping[str, LaneTimes]) -> str:
    busiest = max(times, key=lambda title: times[title].gpu_share)
    if len(times) == 1:
        return f"The GPU is busy {times[busiest].gpu_share:.0%} of the time."
    return f"The GPU is busiest in “{busiest}”."


def _streams_in_words(times: Mapping[str, LaneTimes]) -> str:
    parts = []
    for title, run in times.items():
        text = f"{title}: {_words(run.total)}, of which the GPU is busy {run.gpu_share:.0%}"
        counts = [_plural(run.launches, "launch", "launches")] * bool(run.launches)
        counts += [_plural(run.replays, "launch of a graph", "launches of a graph")] * bool(
            run.replays
        )
        text += f", after {' and '.join(counts)}" if counts else ""
        text += f"; the CPU waits {_words(run.waiting)}" if run.waiting else ""
        parts.append(text)
    return ". ".join(parts) + "."


def _words(us: float) -> str:
    """A time with its unit in words, so that a simulated time does not look measured."""
    return f"{us:,.0f} microseconds" if us < 10_000 else f"{us / 1000:,.1f} milliseconds"


def _plural(count: int, word: str, many: str = "") -> str:
    return f"{count:,} {word if count == 1 else many or word + 's'}"


# --- buckets --------------------------------------------------------------------------------------


def recorded_size(sizes: Sequence[int], count: int) -> int:
    """The smallest recorded size for this many sequences.

    ValueError where the largest size is too small.
    """
    ordered = sorted(sizes)
    if not ordered or count > ordered[-1]:
        raise ValueError(f"no graph for {count} sequences: the recorded sizes are {ordered}")
    return ordered[bisect_left(ordered, count)]


def draw_buckets(
    choices: Mapping[str, Sequence[int]], seen: Mapping[int, int], ax: Axes | None = None
) -> Figure:
    """Draw recorded sizes, and their effect on the observed batches.

    choices: title -> sizes. seen: sequences in a step -> the number of such steps. One panel per
    choice: a step of n sequences computes n rows, and padding up to the stairs. ax: draw the only
    choice there.
    """
    top = max(max(sizes) for sizes in choices.values())
    for sizes in choices.values():
        recorded_size(sizes, max(seen))
    height = 3.4
    figure, first = prepare(ax, height)
    axes = [first]
    if ax is None:
        figure.delaxes(first)
        wide = (1 - 0.11) / len(choices)
        axes = [
            figure.add_axes((0.06 + i * (wide + 0.01), 0.24, wide - 0.02, 0.6))
            for i in range(len(choices))
        ]
    elif len(choices) > 1:
        raise ValueError("one choice on axes of your own")
    for axes_of, (title, sizes) in zip(axes, choices.items(), strict=True):
        _draw_choice(axes_of, title, sizes, seen, top)
    for later in axes[1:]:
        later.set_yticklabels([])
    if ax is None:
        axes[0].set_ylabel("rows computed", fontsize=9.5, color=palette.SOFT_INK)
        handles = [
            Patch(facecolor=REAL, label="a sequence"),
            Patch(facecolor=palette.PAPER, hatch="////", edgecolor=PADDING, label="padding"),
            Patch(facecolor=palette.CACHED, label="how many steps had so many sequences"),
        ]
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0.05, 0.0),
            ncols=3,
            frameon=False,
            fontsize=8.5,
            labelcolor=palette.INK,
            handlelength=1.4,
        )
    words = _buckets_in_words(choices, seen)
    describe(figure, f"{_buckets_alt(choices, seen)} {words}", _buckets_caption(choices, seen))
    return figure


def _draw_choice(
    ax: Axes, title: str, sizes: Sequence[int], seen: Mapping[int, int], top: int
) -> None:
    counts = range(1, top + 1)
    rows = [recorded_size(sizes, n) if n <= max(sizes) else n for n in counts]
    edges = [n - 0.5 for n in range(1, top + 2)]
    most = max(seen.values())
    steps = [0.3 * top * seen.get(n, 0) / most for n in counts]
    ax.stairs(steps, edges, fill=True, color=palette.CACHED, baseline=0, zorder=3)
    ax.stairs(list(counts), edges, fill=True, color=REAL, zorder=1)
    hatched = ax.stairs(
        rows, edges, baseline=list(counts), fill=True, facecolor=palette.PAPER, zorder=2
    )
    hatched.set(hatch="////", edgecolor=PADDING, linewidth=0)
    ax.stairs(rows, edges, baseline=None, color=palette.INK, linewidth=1.1, zorder=4)
    ax.set_xlim(0.5, top + 0.5)
    ax.set_ylim(0, top * 1.04)
    share = padded_rows(sizes, seen) / sum(n * steps for n, steps in seen.items())
    ax.set_title(
        f"{title}: {_plural(len(set(sizes)), 'graph')}",
        loc="left",
        fontsize=10.5,
        weight="bold",
        color=palette.INK,
    )
    box = {"boxstyle": "square,pad=0.2", "facecolor": palette.PAPER, "edgecolor": "none"}
    ax.text(
        0.04 * top,
        0.92 * top,
        f"{share:.1%} more rows",
        fontsize=9,
        color=palette.INK,
        bbox=box,
        zorder=5,
    )
    ax.set_xlabel("sequences in the step", fontsize=9.5, color=palette.SOFT_INK)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    plain_axes(ax)


def padded_rows(sizes: Sequence[int], seen: Mapping[int, int]) -> int:
    """The rows of padding in all observed steps."""
    return sum(steps * (recorded_size(sizes, count) - count) for count, steps in seen.items())


def _buckets_alt(choices: Mapping[str, Sequence[int]], seen: Mapping[int, int]) -> str:
    return (
        f"Chart: for every number of sequences in a step, up to {max(seen)}, how many rows are"
        f" computed with {_plural(len(choices), 'choice')} of recorded sizes."
    )


def _buckets_caption(choices: Mapping[str, Sequence[int]], seen: Mapping[int, int]) -> str:
    least = min(choices, key=lambda title: padded_rows(choices[title], seen))
    return f"The least padding: “{least}”."


def _buckets_in_words(choices: Mapping[str, Sequence[int]], seen: Mapping[int, int]) -> str:
    total, steps = sum(n * count for n, count in seen.items()), sum(seen.values())
    parts = [f"{_plural(steps, 'step')} with {total:,} rows of sequences."]
    for title, sizes in choices.items():
        rows = padded_rows(sizes, seen)
        parts.append(
            f"{title}: {_plural(len(set(sizes)), 'graph')}, {_plural(rows, 'row')} of padding"
            f" ({rows / total:.1%})."
        )
    return " ".join(parts)


# --- one batch after the other --------------------------------------------------------------------


@dataclass(frozen=True)
class PaddedStep:
    """A step of `count` sequences, in a graph of `size` rows."""

    count: int
    size: int


@dataclass(frozen=True)
class PaddingReplay:
    """The steps for `scrub`."""

    steps: tuple[PaddedStep, ...]
    sizes: tuple[int, ...]


def replay_padding(counts: Iterable[int], sizes: Sequence[int]) -> PaddingReplay:
    """The padded steps.

    counts: sequences in each step. sizes: the recorded sizes. ValueError for a step that fits no
    graph.
    """
    steps = tuple(PaddedStep(count, recorded_size(sizes, count)) for count in counts)
    return PaddingReplay(steps, tuple(sorted(sizes)))


def draw_padding(replay: PaddingReplay, step: int = -1, ax: Axes | None = None) -> Figure:
    """Draw sequences and rows of each step above, and the rows of one step below."""
    step = check_step(replay, step)  # type: ignore[arg-type]
    own_figure = ax is None
    figure, ax = prepare(ax, 3.0)
    if own_figure:
        ax.set_position((0.06, 0.42, 0.925, 0.46))
    edges = list(range(len(replay.steps) + 1))
    counts, sizes = [s.count for s in replay.steps], [s.size for s in replay.steps]
    ax.stairs(counts, edges, fill=True, color=REAL)
    hatched = ax.stairs(sizes, edges, baseline=counts, fill=True, facecolor=palette.PAPER)
    hatched.set(hatch="////", edgecolor=PADDING, linewidth=0)
    ax.stairs(sizes, edges, baseline=None, color=palette.INK, linewidth=1.1)
    ax.axvline(step + 0.5, color=palette.INK, linewidth=1.2, linestyle=(0, (3, 2)))
    ax.set_xlim(0, len(replay.steps))
    ax.set_ylim(0, max(sizes) * 1.08)
    ax.set_title(
        "Rows of each step's graph", loc="left", fontsize=12, weight="bold", color=palette.INK
    )
    ax.set_xlabel("step", fontsize=9.5, color=palette.SOFT_INK)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    plain_axes(ax)
    if own_figure:
        _draw_rows(figure, replay, replay.steps[step], step)
    words = _padding_in_words(replay, step)
    describe(figure, f"{_padding_alt(replay, step)} {words}", _padding_caption(replay, step))
    return figure


def _draw_rows(figure: Figure, replay: PaddingReplay, now: PaddedStep, step: int) -> None:
    rows = figure.add_axes((0.06, 0.03, 0.925, 0.17))
    rows.axis("off")
    largest = replay.sizes[-1]
    rows.set_xlim(0, largest)
    rows.set_ylim(0, 1.75)
    for row in range(now.size):
        real = row < now.count
        box = Rectangle(
            (row + 0.06, 0.1), 0.88, 0.8, facecolor=REAL if real else palette.PAPER, linewidth=0.8
        )
        box.set(edgecolor=REAL if real else PADDING, hatch="" if real else "////")
        rows.add_patch(box)
    words = f"step {step}: {_plural(now.count, 'sequence')} in the graph of {now.size}"
    rows.text(0, 1.25, words, fontsize=9.5, color=palette.INK)


def _padding_alt(replay: PaddingReplay, step: int) -> str:
    return (
        f"Chart: sequences and padded rows of {_plural(len(replay.steps), 'step')}, and below it"
        f" the rows of step {step}."
    )


def _padding_caption(replay: PaddingReplay, step: int) -> str:
    now = replay.steps[step]
    return f"Step {step}: {_plural(now.size - now.count, 'row')} of padding."


def _padding_in_words(replay: PaddingReplay, step: int) -> str:
    now = replay.steps[step]
    padding = now.size - now.count
    total = sum(s.count for s in replay.steps)
    return (
        f"Step {step}: {_plural(now.count, 'sequence')} in the graph of {now.size}, {padding} of"
        f" its rows padding. Over all {len(replay.steps)} steps"
        f" {sum(s.size for s in replay.steps) - total:,} rows of padding beside {total:,} of"
        " sequences."
    )


# --- what the GPU knows of each slot --------------------------------------------------------------


def draw_slots_state(
    position: Sequence[int],
    last_token: Sequence[int],
    block_table: Sequence[Sequence[int]],
    block_size: int,
    running: Sequence[int],
) -> Figure:
    """Draw the tensors that a decode step reads: a row per slot, and where the step writes.

    position, last_token: a number for each slot. block_table: the blocks of each slot. running: the
    slots of this step; the other rows are pale. The block that gets the step's K and V is framed.
    """
    columns = max(len(blocks) for blocks in block_table)
    rows, high = len(position), 0.34
    height = 0.95 + rows * high
    figure, ax = prepare(None, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.axis("off")
    left, wide = 3.3, (WIDTH - 3.45) / columns
    heads = [(0.75, "slot"), (1.55, "position"), (2.55, "last token"), (left, "block table")]
    for x, words in heads:
        place = {"ha": "left" if words == "block table" else "center", "va": "center"}
        ax.text(x, 0.25, words, fontsize=9.5, weight="bold", color=palette.INK, **place)
    for slot in range(rows):
        y, runs = 0.45 + slot * high, slot in running
        ink = palette.INK if runs else palette.SOFT_INK
        texts = [(0.75, str(slot)), (1.55, f"{position[slot]}"), (2.55, f"{last_token[slot]}")]
        for x, words in texts:
            style = {"ha": "center", "va": "center", "weight": "bold" if x == 0.75 else "normal"}
            ax.text(x, y + high / 2, words, fontsize=9, color=ink, **style)
        for column, block in enumerate(block_table[slot]):
            box = Box(left + column * wide, y + 0.03, wide, high - 0.06)
            writes = runs and column == position[slot] // block_size
            _draw_entry(ax, box, str(block), palette.request_color(slot) if runs else None, writes)
    ax.text(
        left,
        height - 0.2,
        "thick frame: this block gets the step's K and V",
        fontsize=8.5,
        color=palette.INK,
        va="center",
    )
    describe(
        figure,
        f"Picture: position, last token and block table of {_plural(rows, 'slot')}.",
        f"A step of slots {', '.join(map(str, running))} reads these rows and advances them.",
    )
    return figure  # type: ignore[return-value]


def _draw_entry(ax: Axes, box: Box, words: str, color: str | None, writes: bool) -> None:
    """Draw an entry of a block table. color: None for a slot that does not run."""
    face = palette.FREE if color is None else palette.tint(color, 0.35)
    edge = palette.INK if writes else palette.PAPER
    entry = Rectangle(box.corner, box.width - 0.03, box.height, facecolor=face, edgecolor=edge)
    entry.set(linewidth=2.0 if writes else 0.8, zorder=3 if writes else 2)
    ax.add_patch(entry)
    ink = palette.SOFT_INK if color is None else palette.INK
    ax.text(*box.center, words, fontsize=8, color=ink, ha="center", va="center", zorder=4)


# --- what a step wrote ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """A place of the cache that changed.

    owner: the letter of the table that it belongs to, "" where it belongs to none.
    """

    block: int
    offset: int
    owner: str
    allowed: bool


def find_writes(
    before: Any,
    after: Any,
    tables: Mapping[str, Sequence[int]],
    expected: Iterable[tuple[int, int]],
) -> list[Write]:
    """Find the places that differ.

    before, after: a number for each place, [num_blocks][block_size]. tables: letter -> blocks.
    expected: (block, offset) of the places that the step's sequences write.
    """
    owners = {block: letter for letter, blocks in tables.items() for block in blocks}
    allowed = set(expected)
    return [
        Write(block, offset, owners.get(block, ""), (block, offset) in allowed)
        for block in range(len(before))
        for offset in range(len(before[block]))
        if float(before[block][offset]) != float(after[block][offset])
    ]


def draw_writes(
    before: Any,
    after: Any,
    tables: Mapping[str, Sequence[int]],
    expected: Iterable[tuple[int, int]],
    ax: Axes | None = None,
    lengths: Mapping[str, int] | None = None,
) -> Figure:
    """Draw the blocks of some sequences, and the places that a step wrote.

    A dot marks a correct place, a red cross a wrong one. The first arguments are those of
    `find_writes`. The blocks stand in the order of the tables, one row of blocks per sequence.
    lengths: letter -> the tokens that the sequence has in the cache. What stands behind them is an
    earlier sequence's, and is drawn in grey; without lengths, all is drawn in the owner's colour.
    """
    writes = find_writes(before, after, tables, expected)
    shown = {letter: list(blocks) for letter, blocks in tables.items()}
    strays = sorted({w.block for w in writes if not w.owner})
    if strays:
        shown["nobody"] = strays
    size, most = len(before[0]), max(len(blocks) for blocks in shown.values())
    row, gap = 0.36, 0.24
    height = 0.62 + len(shown) * (row + gap) + 0.2
    own_figure = ax is None
    figure, ax = prepare(ax, height)
    if own_figure:
        ax.set_position((0.0, 0.0, 1.0, 1.0))
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.axis("off")
    cell = min((WIDTH - 1.1 - 0.12 * most) / (most * size), 0.24)
    ax.text(
        0.15,
        0.26,
        "What one step wrote",
        fontsize=12,
        weight="bold",
        color=palette.INK,
        va="center",
    )
    writes_of: dict[int, dict[int, Write]] = {}
    for write in writes:
        writes_of.setdefault(write.block, {})[write.offset] = write
    y = 0.66
    letters = [palette.request_letter(index) for index in range(64)]
    for index, (letter, blocks) in enumerate(shown.items()):
        number = letters.index(letter) if letter in letters else index
        color = palette.CACHED if letter == "nobody" else palette.request_color(number)
        _draw_owner(ax, y, row, letter, color)
        own = (lengths or {}).get(letter, len(blocks) * size)
        for column, block in enumerate(blocks):
            box = Box(0.95 + column * (cell * size + 0.12), y, cell * size, row)
            _draw_block(
                ax, box, after[block], writes_of.get(block, {}), (color, own - column * size)
            )
            ax.text(
                *box.corner, f"block {block}", fontsize=6.5, color=palette.SOFT_INK, va="bottom"
            )
        y += row + gap
    _writes_notes(ax, height - 0.17, lengths is not None)
    describe(figure, f"{_writes_alt(shown)} {_writes_in_words(writes)}", _writes_caption(writes))
    return figure


def _draw_owner(ax: Axes, y: float, row: float, letter: str, color: str) -> None:
    chip = {"boxstyle": "square,pad=0.25", "facecolor": color, "edgecolor": "none"}
    ax.text(
        0.75,
        y + row / 2,
        letter,
        fontsize=8.5,
        weight="bold",
        ha="right",
        va="center",
        bbox=chip,
        color=palette.text_on(color),
    )


def _writes_notes(ax: Axes, y: float, has_lengths: bool) -> None:
    """Draw the line below the blocks that explains the marks."""
    notes = [("●", palette.INK, "written by its own sequence")]
    notes += [("✕", HARM, "written by another row")]
    notes += [("■", palette.CACHED, "left by an earlier sequence")] * has_lengths
    x = 0.95
    for mark, color, words in notes:
        ax.text(x, y, mark, fontsize=11, weight="bold", color=color, va="center")
        ax.text(x + 0.2, y, words, fontsize=8.5, color=palette.INK, va="center")
        x += 0.5 + 0.072 * len(words)


def _draw_block(
    ax: Axes,
    box: Box,
    values: Any,
    writes: Mapping[int, Write],
    owner: tuple[str, int],
) -> None:
    """Draw a block after the step, one cell per place.

    values: the contents of the places. writes: the step's writes, by place. owner: the colour of
    the block's sequence, and the number of places from here on that the sequence has filled.
    """
    x, y = box.corner
    cell = box.width / len(values)
    color, own = owner
    for offset, value in enumerate(values):
        face = palette.FREE
        if float(value) != 0.0:
            face = palette.tint(color, 0.45) if offset < own else palette.CACHED
        write = writes.get(offset)
        if write is not None and write.allowed:
            face = color
        place = Rectangle((x + offset * cell, y), cell, box.height, facecolor=face)
        place.set(edgecolor=palette.PAPER, linewidth=0.5)
        ax.add_patch(place)
        if write is not None and write.allowed:
            mark = {"fontsize": 7, "color": palette.text_on(color), "ha": "center", "va": "center"}
            ax.text(x + (offset + 0.5) * cell, box.center[1], "●", **mark)
    frame = {"fill": False, "edgecolor": palette.SOFT_INK, "linewidth": 0.9}
    ax.add_patch(Rectangle(box.corner, box.width, box.height, **frame))
    for offset, write in writes.items():
        if not write.allowed:
            _draw_harm(ax, x + (offset + 0.5) * cell, box.center[1])


def _draw_harm(ax: Axes, x: float, y: float) -> None:
    """Draw a large red cross on a place that somebody else has written."""
    reach = 0.15
    for slope in (-1, 1):
        ends = ([x - reach, x + reach], [y - slope * reach, y + slope * reach])
        ax.plot(*ends, color=palette.PAPER, linewidth=6, solid_capstyle="round", zorder=5)
        ax.plot(*ends, color=HARM, linewidth=3.2, solid_capstyle="round", zorder=6)


def _writes_alt(shown: Mapping[str, Sequence[int]]) -> str:
    return f"Picture: the KV blocks of {', '.join(shown)}, with the places that one step wrote."


def _writes_caption(writes: Sequence[Write]) -> str:
    wrong = [w for w in writes if not w.allowed]
    if not wrong:
        return "Every place was written by the sequence that it belongs to."
    more = f", and {_plural(len(wrong) - 1, 'other place')}" if len(wrong) > 1 else ""
    return f"{_place(wrong[0])}{more}: written by somebody else."


def _place(w: Write) -> str:
    return f"Block {w.block}, place {w.offset}, of {w.owner or 'nobody'}"


def _writes_in_words(writes: Sequence[Write]) -> str:
    right = [w for w in writes if w.allowed]
    wrong = [w for w in writes if not w.allowed]
    text = (
        f"{_plural(len(writes), 'place')} written, {len(right)} of them by the sequence that it"
        " belongs to."
    )
    for w in wrong[:4]:
        text += f" {_place(w)}, was written by somebody else."
    if len(wrong) > 4:
        text += f" And {len(wrong) - 4} more."
    return text
