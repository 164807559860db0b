"""KV memory over the steps of a trace: the use of the blocks, and contiguous reservation.

Before PagedAttention, an engine reserved room for the longest possible sequence when a request
began. Kwon et al. (2023, arXiv 2309.06180, figure 2) found that 20 to 38 % of such memory held
tokens. `kv_memory` computes what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivllm.engine.trace import Trace
from minivllm.viz import palette
from minivllm.viz.block_table import block_tables, busiest_step, check_step
from minivllm.viz.figure import describe, plain_axes, prepare, side_legend

#: The axis ends at this multiple of the pool; a label gives larger values.
MAX_OVERSHOOT = 2.4
_CACHED_STYLE = {
    "facecolor": palette.CACHED,
    "edgecolor": palette.SOFT_INK,
    "hatch": palette.HATCH_CACHED,
}


@dataclass(frozen=True)
class KVMemory:
    """KV memory after each step, counted in tokens.

    tokens + wasted + cached + free = capacity, at every step.
    """

    capacity: int
    kv_bytes_per_token: int
    #: Held tokens; a token in a shared block counts once.
    tokens: list[int]
    #: Room in blocks in use that holds no token yet (in the last block of a sequence).
    wasted: list[int]
    #: Blocks without an owner whose content the prefix cache knows; and all other free blocks.
    cached: list[int]
    free: list[int]
    #: What the running sequences would hold if they shared no block.
    unshared: list[int]
    #: What they would occupy if each had reserved `reserve` tokens when it began.
    reserve: int
    reserved: list[int]
    num_running: list[int]


def kv_memory(trace: Trace, reserve: int | None = None) -> KVMemory:
    """The use of KV memory after each step.

    reserve: tokens per sequence that a contiguous reservation sets aside; None is the engine's
    max_model_len.
    """
    check_step(trace, 0)
    reserve = trace.max_model_len if reserve is None else reserve
    size, capacity = trace.block_size, trace.num_blocks * trace.block_size
    tokens, in_use, cached = [], [], []
    for step in range(len(trace.steps)):
        tables = block_tables(trace, step)
        tokens.append(sum(tables.filled.values()))
        in_use.append(len(tables.owners) * size)
        cached.append(len(tables.cached) * size)
    running = [len(record.running) for record in trace.steps]
    return KVMemory(
        capacity=capacity,
        kv_bytes_per_token=trace.kv_bytes_per_token,
        tokens=tokens,
        wasted=[u - t for u, t in zip(in_use, tokens, strict=True)],
        cached=cached,
        free=[capacity - u - c for u, c in zip(in_use, cached, strict=True)],
        unshared=[sum(record.num_computed_tokens.values()) for record in trace.steps],
        reserve=reserve,
        reserved=[reserve * count for count in running],
        num_running=running,
    )


def draw_kv_memory(
    trace: Trace, step: int | None = None, ax: Axes | None = None, reserve: int | None = None
) -> Figure:
    """Draw the use of KV memory at every step, with the numbers of one step beside it.

    step: the step whose numbers are shown, an index into trace.steps, negative from the end; None
    is the step with the most blocks in use. ax: draw there instead of on a new figure. reserve: as
    for `kv_memory`. Returns the figure; it displays itself.
    """
    memory = kv_memory(trace, reserve)
    step = busiest_step(trace) if step is None else check_step(trace, step)
    own_figure = ax is None
    figure, ax = prepare(ax, 3.7)
    if own_figure:
        ax.set_position((0.075, 0.135, 0.615, 0.735))
    ax.set_facecolor(palette.PAPER)
    count = len(memory.tokens)
    edges = [i - 0.5 for i in range(count + 1)]
    bottom = [0] * count
    for values, style in (
        (memory.tokens, {"facecolor": palette.USED}),
        (memory.wasted, {"facecolor": palette.WASTED}),
        (memory.cached, _CACHED_STYLE),
    ):
        top = [b + v for b, v in zip(bottom, values, strict=True)]
        ax.stairs(top, edges, baseline=bottom, fill=True, linewidth=0, **style)
        bottom = top
    ax.stairs(
        [memory.capacity] * count,
        edges,
        baseline=bottom,
        fill=True,
        linewidth=0,
        facecolor=palette.FREE,
    )
    ax.axhline(memory.capacity, color=palette.SOFT_INK, linewidth=1)
    ceiling = (
        max(memory.capacity, min(max(memory.reserved), MAX_OVERSHOOT * memory.capacity)) * 1.08
    )
    if max(memory.reserved) > ceiling:
        label = f"▲ up to {max(memory.reserved):,}"
        ax.text(
            0.99,
            0.985,
            label,
            transform=ax.transAxes,
            fontsize=9,
            color=palette.RESERVED,
            ha="right",
            va="top",
        )
    ax.stairs(
        [min(r, ceiling * 0.992) for r in memory.reserved],
        edges,
        baseline=None,
        color=palette.RESERVED,
        linewidth=2,
        linestyle=(0, (4, 2)),
    )
    ax.axvline(step, color=palette.INK, linewidth=1.2)
    _style_axes(ax, count, ceiling)
    _key(ax, memory, step)
    describe(figure, f"{_alt(count)} {_in_words(memory, step)}", _caption(memory, step))
    return figure


def _style_axes(ax: Axes, count: int, ceiling: float) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(-0.5, count - 0.5)
    ax.set_ylim(0, ceiling)
    ax.set_title(
        "KV memory, step by step", loc="left", fontsize=12, weight="bold", color=palette.INK
    )
    ax.set_xlabel("step", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel("room for tokens", fontsize=9.5, color=palette.SOFT_INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    plain_axes(ax)


def _key(ax: Axes, memory: KVMemory, step: int) -> None:
    """Draw the legend, with the numbers of one step, on the right of the axes."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    patches: list[tuple[Patch | Line2D, str, int]] = [
        (Patch(facecolor=palette.FREE, edgecolor=palette.LINE), "free", memory.free[step]),
        (Patch(**_CACHED_STYLE, linewidth=0.5), "cached, reusable", memory.cached[step]),
        (Patch(facecolor=palette.WASTED), "wasted in blocks", memory.wasted[step]),
        (Patch(facecolor=palette.USED), "tokens", memory.tokens[step]),
    ]
    pool = Line2D([], [], color=palette.SOFT_INK, linewidth=1)
    dashes = Line2D([], [], color=palette.RESERVED, linewidth=2, linestyle=(0, (4, 2)))
    entries = [
        (dashes, f"if each reserved {memory.reserve:,}", memory.reserved[step]),
        (pool, "the whole pool", memory.capacity),
        *patches,
    ]
    side_legend(
        ax,
        [handle for handle, _, _ in entries],
        [f"{_padded(number)}  {name}" for _, name, number in entries],
        f"At step {step}",
    )


def _padded(number: int, width: int = 6) -> str:
    """The number, right-aligned in a proportional font.

    It is padded with spaces as wide as a digit or as a comma.
    """
    text = f"{number:,}"
    return (
        "".join("\u2008" if i == width - 4 else "\u2007" for i in range(width - len(text))) + text
    )


def _alt(count: int) -> str:
    return (
        f"Chart: what KV memory was used for at each of {count} steps, beside a contiguous"
        " reservation."
    )


def _caption(memory: KVMemory, step: int) -> str:
    fits = "would fit" if memory.reserved[step] <= memory.capacity else "would not fit"
    return f"Step {step}: a contiguous reservation {fits} into the pool."


def _in_words(memory: KVMemory, step: int) -> str:
    taken = memory.tokens[step] + memory.wasted[step]
    share = round(100 * memory.tokens[step] / taken) if taken else 100
    text = (
        f"Step {step}: {memory.num_running[step]} running requests hold {memory.tokens[step]:,}"
        f" tokens in blocks with room for {taken:,} ({share} % filled)."
    )
    if memory.unshared[step] > memory.tokens[step]:
        text += f" Without sharing they would hold {memory.unshared[step]:,}."
    times = memory.reserved[step] / memory.capacity
    return (
        f"{text} Reserving {memory.reserve:,} tokens for each would take {memory.reserved[step]:,},"
        f" {times:.1f} times the whole pool."
    )
