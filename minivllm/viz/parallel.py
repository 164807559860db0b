"""Pictures of tensor parallelism: split matrices, blocks, heads, a ring, memory and time.

Each rank has its colour. `Ring` is an all-reduce that passes parts from neighbour to neighbour;
with a slider: ``scrub(Ring(4), draw_ring, step=0)``. All take plain numbers; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from minivllm.config import ModelConfig
from minivllm.viz import palette
from minivllm.viz.block_table import check_step
from minivllm.viz.figure import Box, Figure, describe, plain_axes

_TITLE = {"fontsize": 12, "weight": "bold", "color": palette.INK}
#: What every rank has, or computes, alike.
ALIKE = palette.CACHED
#: An error: several ranks have it, or no rank has it.
WRONG = palette.RESERVED
#: Parts of a step's time or of a rank's memory: colours, in the order in which the parts first
#: appear.
PARTS = (
    palette.REQUESTS[0],
    palette.REQUESTS[2],
    palette.REQUESTS[1],
    palette.REQUESTS[3],
    palette.REQUESTS[4],
)


def rank_color(rank: int) -> str:
    """The colour of a rank; from the ninth on, paler ones."""
    return palette.request_color(rank)


def _plain(figure: Figure, width: float, height: float) -> Axes:
    """Axes without a frame over the whole figure; the origin is at the top left."""
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.axis("off")
    return ax


def _box(ax: Axes, box: Box, color: str, text: str = "", size: float = 9) -> None:
    ax.add_patch(
        Rectangle(
            box.corner,
            box.width,
            box.height,
            facecolor=color,
            edgecolor=palette.PAPER,
            linewidth=1.2,
        )
    )
    if text:
        ax.text(
            *box.center,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color=palette.text_on(color),
            linespacing=1.15,
        )


# --- two ways to cut a matrix ---------------------------------------------------------------------


def draw_splits(num_ranks: int = 2) -> Figure:
    """Draw y = x · W with W cut by columns (above) and by rows (below).

    ValueError for fewer than 2 or more than 4 ranks.
    """
    if not 2 <= num_ranks <= 4:
        raise ValueError(f"{num_ranks} ranks: the picture is for 2 to 4.")
    figure = Figure(4.9)
    ax = _plain(figure, 100, 54.4)
    _draw_column_split(ax, 6.5, num_ranks)
    _draw_row_split(ax, 33.5, num_ranks)
    parts = {2: "half", 3: "a third", 4: "a quarter"}[num_ranks]
    describe(
        figure,
        f"Picture: the product of x and a matrix, on {num_ranks} ranks, with the matrix cut in two"
        f" ways. By columns: every rank has all of x and {parts} of the columns, and computes"
        f" {parts} of the result's columns; who needs all of them, gathers. By rows: every rank has"
        f" {parts} of x's columns and {parts} of the rows, and computes a term as large as the"
        " whole result; an all-reduce adds the terms.",
        "Cut by columns, the results are gathered; cut by rows, they are added.",
    )
    return figure


def _draw_column_split(ax: Axes, y: float, n: int) -> None:
    ax.text(2, y - 3.6, "Cut by columns: all of x, a part of the result", va="center", **_TITLE)
    _box(ax, Box(6, y + 5, 22, 6), ALIKE, "x, on every rank", 10)
    ax.text(31, y + 8, "·", ha="center", va="center", fontsize=20, color=palette.INK)
    ax.text(65, y + 8, "=", ha="center", va="center", fontsize=16, color=palette.INK)
    for rank in range(n):
        color, wide = rank_color(rank), 28 / n
        _box(ax, Box(34 + rank * wide, y, wide, 16), color, f"rank {rank}", 9.5 if n < 4 else 8)
        _box(ax, Box(68 + rank * wide, y + 5, wide, 6), color, f"rank {rank}", 9.5 if n < 4 else 8)
    ax.text(48, y + 18, "W", ha="center", va="center", fontsize=11, color=palette.INK)
    ax.text(82, y + 13.2, "y", ha="center", va="center", fontsize=11, color=palette.INK)


def _draw_row_split(ax: Axes, y: float, n: int) -> None:
    ax.text(2, y - 3.6, "Cut by rows: a part of x, a term of the result", va="center", **_TITLE)
    for text, x in (("·", 31), ("=", 50.5)):
        ax.text(
            x,
            y + 8,
            text,
            ha="center",
            va="center",
            fontsize=20 if text == "·" else 16,
            color=palette.INK,
        )
    step = 16 / n
    for rank in range(n):
        color, wide = rank_color(rank), 22 / n
        _box(
            ax,
            Box(6 + rank * wide, y + 5, wide, 6),
            color,
            f"rank {rank}" if n < 4 else f"{rank}",
            9.5,
        )
        _box(ax, Box(34, y + rank * step, 13, step), color, f"rank {rank}", 9.5)
        high = min(4.6, 0.8 * step)
        _box(
            ax,
            Box(54, y + (rank + 0.5) * step - high / 2, 13, high),
            color,
            f"a term, rank {rank}",
            8.5,
        )
        ax.add_patch(
            FancyArrowPatch(
                (67.5, y + (rank + 0.5) * step),
                (76, y + 8),
                arrowstyle="-|>",
                mutation_scale=11,
                color=palette.SOFT_INK,
                linewidth=1.4,
            )
        )
    ax.text(17, y + 13.2, "x", ha="center", va="center", fontsize=11, color=palette.INK)
    ax.text(40.5, y + 18, "W", ha="center", va="center", fontsize=11, color=palette.INK)
    ax.text(
        72.5, y + 16.4, "all-reduce", ha="center", va="center", fontsize=9.5, color=palette.SOFT_INK
    )
    _box(ax, Box(76.6, y + 5.2, 19.6, 5.6), ALIKE, "their sum, on every rank", 9)
    ax.text(86.5, y + 13.2, "y", ha="center", va="center", fontsize=11, color=palette.INK)


# --- a block on several ranks ---------------------------------------------------------------------


def draw_parallel_block(config: ModelConfig, num_ranks: int = 2) -> Figure:
    """Draw one decoder block with a lane for each rank.

    A lane shows what the rank computes. Two places show where the ranks add up their results. The
    number of heads must be a multiple of num_ranks.
    """
    if config.num_attention_heads % num_ranks or num_ranks > 4:
        raise ValueError(
            f"{num_ranks} ranks: the picture is for up to 4, that divide"
            f" {config.num_attention_heads}."
        )
    heads = config.num_attention_heads // num_ranks
    kv = max(1, config.num_key_value_heads // num_ranks)
    wide = config.intermediate_size // num_ranks
    # (name, size of the output, whether all ranks compute the same, width); None is an all-reduce.
    columns = [
        ("norm", f"{config.hidden_size}", True, 7.0),
        ("q, k, v", f"{heads} + {kv} + {kv} heads", False, 12.0),
        ("attend", f"{heads} heads", False, 8.3),
        ("output", f"{config.hidden_size}", False, 7.6),
        None,
        ("norm", f"{config.hidden_size}", True, 7.0),
        ("gate, up", f"2 × {wide}", False, 9.6),
        ("silu · up", f"{wide}", False, 8.3),
        ("down", f"{config.hidden_size}", False, 7.6),
        None,
    ]
    figure = Figure(0.82 + 0.72 * num_ranks)
    ax = _plain(figure, 100, 9.1 + 8 * num_ranks)
    x = 8.5
    ax.text(x, 3.2, "attention", va="center", **_TITLE)
    for column in columns:
        if column is None:
            _draw_reduce(ax, x, num_ranks)
            x += 6.8
            continue
        name, size, alike, width = column
        for rank in range(num_ranks):
            color, y = ALIKE if alike else rank_color(rank), 7.4 + 8 * rank
            style = {
                "boxstyle": "round,pad=0,rounding_size=0.6",
                "linewidth": 0,
                "facecolor": color,
            }
            ax.add_patch(FancyBboxPatch((x, y), width, 6.2, **style))
            for text, down, points in ((name, 2.0, 9), (size, 4.5, 7.4)):
                ax.text(
                    x + width / 2,
                    y + down,
                    text,
                    ha="center",
                    va="center",
                    fontsize=points,
                    color=palette.text_on(color),
                )
        x += width + 0.9
        if name == "output":
            ax.text(x + 6.8, 3.2, "MLP", va="center", **_TITLE)
    for rank in range(num_ranks):
        ax.text(
            0.8,
            10.5 + 8 * rank,
            f"rank {rank}",
            va="center",
            fontsize=9.5,
            weight="bold",
            color=palette.INK,
        )
    describe(
        figure,
        f"Picture: a decoder block on {num_ranks} ranks, a lane each, with two all-reduces across"
        f" the lanes. Every rank norms all {config.hidden_size:,} numbers of a token, alike. Then"
        f" {heads} of {config.num_attention_heads} query heads and {wide:,} of"
        f" {config.intermediate_size:,} MLP columns each. After attention's output, and after"
        " down, an all-reduce adds the terms of all ranks.",
        "Attention ends with an all-reduce, and so does the MLP.",
    )
    return figure


def _draw_reduce(ax: Axes, x: float, num_ranks: int) -> None:
    ax.add_patch(Rectangle((x, 7.4), 5.6, 8 * num_ranks - 1.8, facecolor=palette.INK, linewidth=0))
    ax.text(
        x + 2.8,
        6.5 + 4 * num_ranks,
        "all-reduce",
        rotation=90,
        ha="center",
        va="center",
        fontsize=9,
        color=palette.PAPER,
    )


# --- heads ----------------------------------------------------------------------------------------

#: For each rank: its query heads and its KV heads.
Heads = Sequence[tuple[Iterable[int], Iterable[int]]]


def draw_heads(num_heads: int, num_kv_heads: int, splits: Mapping[str, Heads]) -> Figure:
    """Draw which rank has which heads.

    Each split has a row of query heads and, below it, the KV heads that they read. A KV head of
    several ranks has a copy for each of them, one below the other. A query head without exactly one
    rank is framed, and so is a KV head without a rank. splits: title -> heads of each rank.
    """
    figure = Figure(0.15 + 1.12 * len(splits))
    ax = _plain(figure, 100, 12.4 * len(splits) + 0.8)
    said, lists_of = [], {}
    for row, (title, heads) in enumerate(splits.items()):
        top = 12.4 * row
        ax.text(1, top + 2.2, title, va="center", fontsize=11, weight="bold", color=palette.INK)
        lists = lists_of[title] = [([*queries], [*keys]) for queries, keys in heads]
        for kind, (label, number, y) in enumerate(
            (("query heads", num_heads, 3.9), ("KV heads", num_kv_heads, 8.2))
        ):
            ax.text(1, top + y + 1.7, label, va="center", fontsize=9, color=palette.SOFT_INK)
            for head in range(number):
                owners = [rank for rank, both in enumerate(lists) if head in both[kind]]
                _draw_head(
                    ax,
                    13 + head * 86 / number,
                    top + y,
                    86 / number - 0.3,
                    owners,
                    single=kind == 0,
                )
        said.append(f"{title}: {_heads_in_words(num_heads, num_kv_heads, lists)}.")
    alt = (
        f"Picture: which of {num_heads} query heads and {num_kv_heads} KV heads each rank has, in"
        f" {len(splits)} ways. {' '.join(said)}"
    )
    describe(figure, alt, _heads_caption(num_heads, num_kv_heads, lists_of))
    return figure


def _draw_head(
    ax: Axes, x: float, y: float, width: float, owners: Sequence[int], single: bool
) -> None:
    high = 3.4 / max(1, len(owners))
    for i, rank in enumerate(owners):
        size = 9 if len(owners) == 1 else 7.5
        text = f"{rank}" if len(owners) <= 2 else ""
        _box(ax, Box(x, y + i * high, width, high), rank_color(rank), text, size)
    if not owners or (single and len(owners) > 1):
        frame = Rectangle(
            (x, y), width, 3.4, facecolor="none", edgecolor=WRONG, linewidth=2, zorder=4
        )
        ax.add_patch(
            frame
            if owners
            else Rectangle(
                (x, y),
                width,
                3.4,
                facecolor=palette.FREE,
                edgecolor=WRONG,
                linewidth=2,
                hatch="////",
            )
        )


def _heads_caption(num_heads: int, num_kv_heads: int, splits: Mapping[str, Heads]) -> str:
    """The first fault of the ways to split, or what is special about the last of them."""
    for title, lists in splits.items():
        owners = [sum(h in own for _, own in lists) for h in range(num_kv_heads)]
        held = [sum(h in own for own, _ in lists) for h in range(num_heads)]
        for wrong, words in (
            (held.count(0), "{} on no rank"),
            (sum(count > 1 for count in held), "{} computed twice"),
        ):
            if wrong:
                return f"{title}: {words.format(_count(wrong, 'query head'))}."
        if 0 in owners:
            return f"{title}: {_count(owners.count(0), 'KV head')} on no rank."
    shared = any(count > 1 for count in owners)
    where = "every KV head is on several ranks" if shared else "every head is on one rank"
    return f"{title}: {where}."


def _heads_in_words(
    num_heads: int, num_kv_heads: int, lists: Sequence[tuple[list[int], list[int]]]
) -> str:
    queries, keys = lists[0]
    words = f"rank 0 has {_count(len(queries), 'query head')} and {_count(len(keys), 'KV head')}"
    owners = [sum(head in own for _, own in lists) for head in range(num_kv_heads)]
    copies = max(owners, default=0)
    words += (
        f", and each KV head is on {copies} ranks" if copies > 1 and len(set(owners)) == 1 else ""
    )
    held = [sum(head in own for own, _ in lists) for head in range(num_heads)]
    nobody, twice = held.count(0), sum(count > 1 for count in held)
    words += f"; nobody has {_count(nobody, 'query head')}" if nobody else ""
    words += f"; {_count(twice, 'query head')} computed twice" if twice else ""
    return words + (f"; nobody has {_count(owners.count(0), 'KV head')}" if 0 in owners else "")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


# --- a ring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """An all-reduce among `size` ranks in a ring, each with a tensor cut into `size` parts.

    Step 0 is the beginning. In the next size − 1 steps, sums are passed on and grow. In another
    size − 1 steps, finished sums are passed on and replace the old parts. `state(step)[rank][part]`
    is the set of ranks whose terms the rank's part holds then.
    """

    size: int

    def __post_init__(self) -> None:
        if not 2 <= self.size <= 8:
            raise ValueError(f"{self.size} ranks: the ring is for 2 to 8.")

    @property
    def steps(self) -> range:
        return range(2 * self.size - 1)

    def sends(self, step: int) -> list[tuple[int, int]]:
        """The (rank, part) of each transfer to rank + 1 in this step; none in step 0."""
        return [(rank, (rank - step + 1) % self.size) for rank in range(self.size)] if step else []

    def state(self, step: int) -> list[list[frozenset[int]]]:
        """The terms in each part of each rank after this step."""
        held = [[frozenset({rank})] * self.size for rank in range(self.size)]
        for number in range(1, step + 1):
            before = [list(row) for row in held]
            for rank, part in self.sends(number):
                right = (rank + 1) % self.size
                grows = before[right][part] if number < self.size else frozenset()
                held[right][part] = before[rank][part] | grows
        return held


def draw_ring(ring: Ring, step: int) -> Figure:
    """Draw each rank's parts after a step, with a bar for every term in a part.

    Arrows show the transfers of this step.
    """
    check_step(ring, step)  # type: ignore[arg-type]
    n = ring.size
    figure = Figure(0.75 + 0.55 * n)
    ax = _plain(figure, 100, 12 + 9 * n)
    state, sends = ring.state(step), set(ring.sends(step))
    width = 84 / n
    ax.text(1, 4, _ring_title(ring, step), va="center", **_TITLE)
    for part in range(n):
        ax.text(
            15 + (part + 0.5) * width,
            9,
            f"part {part}",
            ha="center",
            va="center",
            fontsize=9.5,
            color=palette.SOFT_INK,
        )
    for rank in range(n):
        y = 11 + 9 * rank
        _box(ax, Box(1, y + 1.6, 2.2, 3.2), rank_color(rank))
        ax.text(
            4.2, y + 3.2, f"rank {rank}", va="center", fontsize=10, weight="bold", color=palette.INK
        )
        for part in range(n):
            x, full = 15 + part * width, len(state[rank][part]) == n
            edge = (
                {"edgecolor": palette.INK, "linewidth": 2}
                if full
                else {"edgecolor": palette.LINE, "linewidth": 0.8}
            )
            ax.add_patch(Rectangle((x + 0.5, y), width - 1.6, 6.4, facecolor=palette.FREE, **edge))
            bar = (width - 3) / n
            for term in state[rank][part]:
                _box(
                    ax, Box(x + 1.2 + term * bar, y + 1, bar, 4.4), rank_color(term), f"{term}", 8.5
                )
            if (rank, part) in sends:
                _draw_send(ax, x + width / 2 - 0.3, y, rank, n)
    full = sum(len(terms) == n for row in state for terms in row)
    describe(
        figure,
        f"Picture: the parts of {n} ranks in a ring, after step {step} of {2 * n - 2} of an"
        f" all-reduce. {full} of {n * n} parts hold the terms of all {n} ranks."
        + (
            " Just sent:"
            f" {', '.join(f'part {part} by rank {rank}' for rank, part in sorted(sends))}."
            if sends
            else ""
        ),
        f"After step {step}, {_ring_caption(full, n * n)}.",
    )
    return figure


def _ring_caption(full: int, parts: int) -> str:
    if full == parts:
        return "every part holds the terms of all ranks"
    count = f"{full} parts hold" if full > 1 else f"{full or 'no'} part holds"
    return f"{count} the terms of all ranks"


def _ring_title(ring: Ring, step: int) -> str:
    if not step:
        return "At the start: each part holds the rank's own term"
    what = "sums are passed on and grow" if step < ring.size else "finished sums are passed on"
    return f"Step {step} of {2 * ring.size - 2}: {what}"


def _draw_send(ax: Axes, x: float, y: float, rank: int, n: int) -> None:
    """Draw an arrow to the next rank's row.

    The last rank's arrow leaves at the bottom and comes in again at the top.
    """
    style = {
        "arrowstyle": "-|>",
        "mutation_scale": 13,
        "color": palette.INK,
        "linewidth": 1.8,
        "zorder": 5,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    if rank < n - 1:
        ax.add_patch(FancyArrowPatch((x, y + 5.4), (x, y + 10), **style))
    else:
        ax.plot([x, x], [y + 5.4, y + 8.6], color=palette.INK, linewidth=1.8, zorder=5)
        ax.add_patch(FancyArrowPatch((x + 4.2, 8.2), (x + 4.2, 11.9), **style))


# --- the price of starting a collective -----------------------------------------------------------


@dataclass(frozen=True)
class CollectiveSweep:
    """A step on several GPUs, for every time that a collective may take to start.

    one: model -> milliseconds of a step on one GPU. many: model -> milliseconds of the step on
    `gpus` GPUs, with collectives that start in no time. collectives: model -> their number in a
    step. A step of the slider is a microsecond per start, from 1 to `most_us`.
    """

    one: Mapping[str, float]
    many: Mapping[str, float]
    collectives: Mapping[str, int]
    gpus: int = 8
    most_us: int = 20
    first_step: int = 1
    step_name: str = "microseconds"

    @property
    def steps(self) -> range:
        return range(1, self.most_us + 1)

    def speedup(self, model: str, us: float) -> float:
        """How many times as fast the step is on all GPUs as on one."""
        return self.one[model] / (self.many[model] + self.collectives[model] * us / 1000)


def _sweep_caption(sweep: CollectiveSweep, us: int) -> str:
    slower = [model for model in sweep.one if sweep.speedup(model, us) < 1]
    what = (
        f"one GPU is faster for {' and '.join(slower)}"
        if slower
        else f"{sweep.gpus} GPUs are faster for every model"
    )
    return f"With {us} microseconds per start, {what}."


def draw_collectives(sweep: CollectiveSweep, step: int) -> Figure:
    """Draw how many times as fast a step is, over the time that a collective takes to start.

    One curve per model; a dashed line marks the chosen time, which is step + 1 microseconds.
    """
    check_step(sweep, step)  # type: ignore[arg-type]
    us = sweep.steps[step]
    figure = Figure(3.6)
    ax = figure.add_axes((0.08, 0.16, 0.7, 0.68))
    for index, model in enumerate(sweep.one):
        values = [sweep.speedup(model, each) for each in sweep.steps]
        style = {"color": PARTS[index], "linewidth": 2.2, "linestyle": ("-", "--", "-.")[index % 3]}
        ax.plot(sweep.steps, values, **style)
        ax.plot(us, sweep.speedup(model, us), "o", color=PARTS[index], ms=8, zorder=5)
        words = f"{model}: {sweep.speedup(model, us):.2f} ×"
        label = {"fontsize": 10, "color": palette.INK, "va": "center", "clip_on": False}
        ax.text(sweep.most_us + 0.3, values[-1], words, **label)
    ax.axhline(1, color=palette.INK, linewidth=1.2)
    as_fast = {"fontsize": 8.5, "color": palette.INK, "ha": "right", "va": "bottom"}
    ax.text(sweep.most_us - 0.1, 1.05, "as fast as one GPU", **as_fast)
    ax.axvline(us, color=palette.INK, linewidth=1.2, linestyle=(0, (3, 2)))
    plain_axes(ax)
    ax.set_xlim(1, sweep.most_us)
    ax.set_ylim(0)
    ax.set_xticks([1, *range(5, sweep.most_us + 1, 5)])
    axis = {"fontsize": 9.5, "color": palette.SOFT_INK}
    ax.set_xlabel("microseconds until a collective has started", **axis)
    ax.set_ylabel("times as fast", **axis)
    title = f"{sweep.gpus} GPUs instead of one, {us} µs per start"
    figure.text(0.01, 0.94, title, va="center", **_TITLE)
    found = [f"{model} {sweep.speedup(model, us):.2f}" for model in sweep.one]
    describe(
        figure,
        f"Chart: how many times as fast a step is on {sweep.gpus} GPUs, for collectives that take 1"
        f" to {sweep.most_us} microseconds to start, for {_count(len(sweep.one), 'model')}."
        f" With {us} microseconds per start, times as fast: {', '.join(found)}.",
        _sweep_caption(sweep, us),
    )
    return figure


# --- memory and time ------------------------------------------------------------------------------


def draw_shares(
    groups: Mapping[str, Mapping[str, Mapping[str, float]]],
    unit: str,
    title: str,
    limit: float | None = None,
    limit_name: str = "",
    same_scale: bool = True,
) -> Figure:
    """Draw the parts of a step's time, or of a rank's memory, as stacked columns.

    groups: panel's title -> column's name -> part -> number, in `unit`. limit: a line across all
    panels. same_scale: False gives each panel a scale of its own. ValueError where there is nothing
    to draw.
    """
    columns = [parts for group in groups.values() for parts in group.values()]
    if not columns:
        raise ValueError("there is nothing to draw")
    names = list(dict.fromkeys(name for parts in columns for name in parts))
    tops = {
        panel: max([*(sum(parts.values()) for parts in group.values()), limit or 0.0])
        for panel, group in groups.items()
    }
    tops = dict.fromkeys(groups, max(tops.values())) if same_scale else tops
    figure = Figure(3.7)
    wide = (1 - 0.085) / len(groups)
    for i, (panel, group) in enumerate(groups.items()):
        ax = figure.add_axes((0.075 + i * wide, 0.21, wide - (0.02 if same_scale else 0.05), 0.58))
        _draw_stacks(ax, group, names, tops[panel])
        ax.set_title(panel, loc="left", fontsize=10.5, weight="bold", color=palette.INK)
        if limit is not None:
            ax.axhline(limit, color=WRONG, linewidth=1.6, linestyle="--")
        if i and same_scale:
            ax.set_yticklabels([])
        if not i:
            ax.set_ylabel(unit, fontsize=9.5, color=palette.SOFT_INK)
    figure.text(0.01, 0.955, title, va="center", **_TITLE)
    handles = [Patch(facecolor=PARTS[i], label=name) for i, name in enumerate(names)]
    if limit is not None:
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color=WRONG, linestyle="--", label=limit_name))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.06, 0.0),
        ncols=5,
        frameon=False,
        fontsize=9,
        labelcolor=palette.INK,
        handlelength=1.4,
    )
    alt = f"Chart: {title}, {_count(len(columns), 'column')} of {_count(len(names), 'part')}."
    caption = "The number above a column is the sum of its parts."
    if limit is not None:
        caption = f"The line is at {_short(limit)}: {limit_name}."
    describe(figure, f"{alt} {_shares_in_words(groups, unit)}", caption)
    return figure


def _draw_stacks(
    ax: Axes, group: Mapping[str, Mapping[str, float]], names: Sequence[str], top: float
) -> None:
    for x, parts in enumerate(group.values()):
        bottom = 0.0
        for name in names:
            high = parts.get(name, 0.0)
            box = Rectangle(
                (x - 0.36, bottom), 0.72, high, facecolor=PARTS[names.index(name)], linewidth=0
            )
            ax.add_patch(box)
            bottom += high
        ax.text(
            x,
            bottom + 0.015 * top,
            _short(bottom),
            ha="center",
            va="bottom",
            fontsize=9,
            color=palette.INK,
        )
    plain_axes(ax)
    ax.set_xlim(-0.6, len(group) - 0.4)
    ax.set_ylim(0, 1.12 * top)
    ax.set_xticks(range(len(group)), list(group))
    ax.tick_params(axis="x", length=0)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _shares_in_words(groups: Mapping[str, Mapping[str, Mapping[str, float]]], unit: str) -> str:
    parts = []
    for panel, group in groups.items():
        columns = ", ".join(
            f"{name}: {_short(sum(values.values()))}" for name, values in group.items()
        )
        parts.append(f"{panel}, in {unit}: {columns}.")
    return " ".join(parts)
