"""Pictures of the paged KV cache: its cost, the waste of reservation, tokens' places, readers.

`draw_slots` replays a real trace (put it under `scrub` with functools.partial); the others take
plain numbers. `Span` is the input of `draw_memory_map` and `memory_shares`: a piece of the cache
that belongs to a request at one step.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.patches import Patch, Rectangle

from minivllm.engine.trace import Trace
from minivllm.viz import palette
from minivllm.viz.block_table import Row, block_tables, busiest_step, check_step
from minivllm.viz.figure import WIDTH, Box, Figure, describe, prepare

#: Pixels of a memory map across and down; more are not visible and make the file large.
_MAP_WIDTH, _MAP_HEIGHT = 900, 230


# --- what a token costs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """The numbers that determine a model's KV cache, and its number of parameters."""

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def kv_bytes(self, bytes_per_number: int = 2) -> int:
        """Bytes of K and V per token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_number


def draw_kv_bytes(models: Sequence[ModelShape], ax: Axes | None = None) -> MatplotlibFigure:
    """Draw one bar per model: KiB of K and V per token.

    Beside it stands the size that it would have if every query head had its own K and V. On the
    right stands how many tokens of cache weigh as much as the model. All numbers have 2 bytes.
    """
    own_figure = ax is None
    figure, ax = prepare(ax, 0.95 + 0.37 * len(models))
    if own_figure:
        top, bottom = 0.62 / figure.get_figheight(), 0.42 / figure.get_figheight()
        ax.set_position((0.115, bottom, 0.74, 1 - top - bottom))
    ungrouped = [m.kv_bytes() * m.heads // m.kv_heads / 1024 for m in models]
    longest = max(ungrouped)
    dashed = {
        "facecolor": palette.FREE,
        "edgecolor": palette.SOFT_INK,
        "linewidth": 0.8,
        "linestyle": (0, (3, 2)),
    }
    column = ax.get_yaxis_transform()
    for y, (model, mha) in enumerate(zip(models, ungrouped, strict=True)):
        kib = model.kv_bytes() / 1024
        ax.barh(y, mha, 0.62, **dashed)
        ax.barh(y, kib, 0.62, facecolor=palette.USED)
        text = {"va": "center", "fontsize": 9.5}
        anchor = ax.text(
            mha + longest * 0.012, y, f"{kib:,.0f}", color=palette.USED, weight="bold", **text
        )
        beside = {"xycoords": anchor, "textcoords": "offset points", "xytext": (4, 0)}
        ax.annotate(f"instead of {mha:,.0f}", (1, 0.5), color=palette.SOFT_INK, **beside, **text)
        ax.text(
            1.16,
            y,
            f"{_tokens_of_weights(model):,}",
            ha="right",
            color=palette.INK,
            transform=column,
            **text,
        )
    _plain_axes(ax, "KiB of keys and values per token")
    ax.set_yticks(
        range(len(models)), [model.name for model in models], fontsize=10, color=palette.INK
    )
    ax.set_xlim(0, longest * 1.3)
    ax.set_ylim(len(models) - 0.5, -0.5)
    ax.set_title(
        "What one token takes", loc="left", fontsize=12, weight="bold", color=palette.INK, pad=16
    )
    small = {"transform": ax.transAxes, "fontsize": 9, "va": "bottom"}
    ax.text(0, 1.02, "■ as it is (GQA)", color=palette.USED, **small)
    ax.text(
        0.16, 1.02, "┅ if each query head had a K and V of its own", color=palette.SOFT_INK, **small
    )
    ax.text(
        1.16, 1.02, "tokens as heavy\nas the weights", ha="right", color=palette.SOFT_INK, **small
    )
    parts = [f"{m.name} {m.kv_bytes() / 1024:,.0f} KiB" for m in models]
    saved = ", ".join(f"{m.heads // m.kv_heads}" for m in models)
    heavy = [f"{_tokens_of_weights(m):,} tokens of {m.name}" for m in models]
    caption = (
        f"{_tokens_of_weights(models[0]):,} tokens are as heavy as the weights of {models[0].name}."
    )
    describe(
        figure,
        f"Chart: bytes of keys and values per token in {len(models)} models, with and without GQA."
        f" A token takes {', '.join(parts)}. Sharing K and V among query heads makes that {saved}"
        f" times smaller. As heavy as the weights: {', '.join(heavy)}.",
        caption,
    )
    return figure


def _tokens_of_weights(model: ModelShape) -> int:
    """The cache tokens that weigh as much as the model, rounded to hundreds.

    The size in a model's name is not more exact.
    """
    return round(2 * model.parameters / model.kv_bytes() / 100) * 100


def _plain_axes(ax: Axes, xlabel: str) -> None:
    ax.set_facecolor(palette.PAPER)
    ax.set_xlabel(xlabel, fontsize=9.5, color=palette.SOFT_INK)
    ax.tick_params(colors=palette.SOFT_INK, labelsize=9, length=3)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(palette.LINE)


# --- what reservation wastes ----------------------------------------------------------------------


class Span(NamedTuple):
    """A piece of the cache that belongs to one request.

    Room for `room` tokens from `begin` on belongs to request `owner` (0, 1 …) and holds `held`
    tokens now. needed: how many tokens it will hold before the request ends; -1 where that is not
    used.
    """

    owner: int
    begin: int
    room: int
    held: int
    needed: int = -1


@dataclass(frozen=True)
class MemoryShares:
    """Shares of the pool, averaged over steps; they add up to 1.

    later: reserved, and a token will come. never: reserved, and no token will come. outside:
    without an owner.
    """

    tokens: float
    later: float
    never: float
    outside: float
    #: The average number of running requests.
    running: float


def memory_shares(steps: Sequence[Sequence[Span]], capacity: int) -> MemoryShares:
    """The average use of the pool in these steps. ValueError without steps."""
    if not steps:
        raise ValueError("memory_shares: no steps")
    totals, running = np.zeros(3), 0
    for step in steps:
        owner, _, room, held, needed = _columns(step)
        totals += (
            held.sum(),
            np.where(needed < 0, held, np.clip(needed, held, room)).sum(),
            room.sum(),
        )
        running += len(np.unique(owner))
    tokens, needed, room = totals / (capacity * len(steps))
    return MemoryShares(
        *map(float, (tokens, needed - tokens, room - needed, 1 - room)), running / len(steps)
    )


def _columns(spans: Sequence[Span]) -> np.ndarray:
    """[5, spans] int64: owner, begin, room, held, needed; by address."""
    table = np.array(spans, dtype=np.int64).reshape(-1, 5)
    return table[table[:, 1].argsort()].T


_SHARES = (
    ("tokens", "tokens", {"facecolor": palette.USED}),
    ("later", "kept for tokens to come", {"facecolor": palette.tint(palette.USED, 0.4)}),
    ("never", "reserved, never used", {"facecolor": palette.WASTED, "hatch": palette.HATCH_WASTED}),
    ("outside", "nobody's", {"facecolor": palette.CACHED}),
)


def draw_memory_shares(
    shares: Mapping[str, MemoryShares],
    published: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> MatplotlibFigure:
    """Draw one bar per way to allocate: the use of the pool.

    published: shares of tokens, from 0 to 1, to mark.
    """
    published = published or {}
    own_figure = ax is None
    figure, ax = prepare(ax, 1.35 + 0.46 * len(shares))
    height = figure.get_figheight()
    if own_figure:
        ax.set_position((0.155, 0.45 / height, 0.73, 1 - 1.2 / height))
    beside = {"va": "center", "fontsize": 9.5}
    for y, (name, share) in enumerate(shares.items()):
        left = 0.0
        for field, _, style in _SHARES:
            width = 100 * getattr(share, field)
            ax.barh(y, width, 0.62, left=left, edgecolor=palette.PAPER, linewidth=0.6, **style)
            left += width
        ax.text(1, y, f"{100 * share.tokens:.1f} %", weight="bold", color=palette.PAPER, **beside)
        right = ax.get_yaxis_transform()
        ax.text(
            1.02, y, f"{share.running:.1f} at once", color=palette.INK, transform=right, **beside
        )
        if name in published:
            x = 100 * published[name]
            ax.plot(
                [x, x], [y - 0.43, y + 0.43], color=palette.INK, linewidth=2, solid_capstyle="butt"
            )
    _plain_axes(ax, "% of the pool, on average while requests wait")
    ax.set_yticks(range(len(shares)), list(shares), fontsize=10, color=palette.INK)
    ax.set_xlim(0, 100)
    ax.set_ylim(len(shares) - 0.5, -0.5)
    handles: list = [Patch(edgecolor=palette.PAPER, **style) for _, _, style in _SHARES]
    names = [name for _, name, _ in _SHARES]
    if published:
        handles.append(ax.plot([], [], color=palette.INK, linewidth=2)[0])
        names.append("tokens, in the paper")
    ax.set_title(
        "What the pool was used for",
        loc="left",
        fontsize=12,
        weight="bold",
        color=palette.INK,
        pad=27,
    )
    place = {
        "loc": "lower left",
        "bbox_to_anchor": (-0.01, 1.0),
        "ncols": len(names),
        "borderaxespad": 0.2,
    }
    spaces = {"handlelength": 1.2, "handletextpad": 0.4, "columnspacing": 1.0}
    ax.legend(
        handles, names, frameon=False, fontsize=8.5, labelcolor=palette.INK, **place, **spaces
    )
    parts = []
    for name, share in shares.items():
        paper = f" (paper: {100 * published[name]:.1f} %)" if name in published else ""
        parts.append(
            f"{name}: {100 * share.tokens:.1f} % tokens{paper}, {share.running:.1f} requests at"
            " once"
        )
    alt = (
        f"Chart: what KV memory was used for under {len(shares)} ways to allocate it, while"
        f" requests wait. {'; '.join(parts)}."
    )
    best = max(shares, key=lambda name: shares[name].tokens)
    describe(figure, alt, f"The largest share of tokens: {best}.")
    return figure


def draw_memory_map(
    maps: Mapping[str, Sequence[Sequence[Span]]], capacity: int, num_steps: int | None = None
) -> MatplotlibFigure:
    """Draw what lies at the cache's addresses (up) at every step (right).

    The colours are those of `draw_memory_shares`: a token, room for a token to come, room for none,
    nobody's room. One panel per way to allocate. num_steps: draw only this many steps, from the
    first.
    """
    num_steps = num_steps or max(map(len, maps.values()))
    panel, gap, top, bottom = 1.5, 0.42, 0.66, 0.5
    height = top + len(maps) * panel + (len(maps) - 1) * gap + bottom
    figure = Figure(height)
    parts: list[str] = []
    finished: dict[str, int] = {}
    for i, (name, steps) in enumerate(maps.items()):
        y = height - top - panel - i * (panel + gap)
        ax = figure.add_axes((0.075, y / height, 0.905, panel / height))
        ax.imshow(
            _map_pixels(steps, capacity, num_steps),
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(0, num_steps, 0, capacity),
        )
        last_seen = {span[0]: step for step, spans in enumerate(steps) for span in spans}
        finished[name] = sum(step + 1 < num_steps for step in last_seen.values())
        first_seen = {
            span[0]: step for step, spans in reversed(list(enumerate(steps))) for span in spans
        }
        share = memory_shares(
            steps[: min(num_steps, max(first_seen.values()) + 1)], capacity
        ).tokens
        ax.set_title(name, loc="left", fontsize=11, weight="bold", color=palette.INK, pad=4)
        note = (
            f"{100 * share:.0f} % tokens while requests wait ·"
            f" {finished[name]} of {len(last_seen)} finished"
        )
        if len(steps) < num_steps:
            note += f" after {len(steps):,} steps"
        ax.set_title(note, loc="right", fontsize=9.5, color=palette.SOFT_INK, pad=4)
        ax.tick_params(colors=palette.SOFT_INK, labelsize=8.5, length=3)
        ax.set_yticks([0, capacity], ["0", f"{capacity:,}"])
        ax.set_ylabel("slot", fontsize=9, color=palette.SOFT_INK, labelpad=-14)
        for spine in ax.spines.values():
            spine.set_color(palette.LINE)
        if i + 1 < len(maps):
            ax.set_xticklabels([])
        else:
            ax.set_xlabel("step", fontsize=9.5, color=palette.SOFT_INK)
        parts.append(f"{name}: {note}.")
    handles = [Patch(facecolor=color) for color in _MAP_COLORS.values()]
    names = [name for field, name, _ in _SHARES if field in _MAP_COLORS]
    spaces = {"handlelength": 1.2, "handletextpad": 0.4, "columnspacing": 1.4}
    figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.065, 1.0),
        ncols=len(names),
        frameon=False,
        fontsize=9,
        labelcolor=palette.INK,
        **spaces,
    )
    alt = (
        f"Map: what lies where in the cache over {num_steps:,} steps. Panels: {len(maps)}."
        f" {' '.join(parts)}"
    )
    describe(figure, alt, _map_caption(finished))
    return figure


def _map_caption(finished: Mapping[str, int]) -> str:
    if len(finished) == 1:
        name, count = next(iter(finished.items()))
        return f"{count:,} request{'' if count == 1 else 's'} finished with {name}."
    return f"The most requests finished with {max(finished, key=lambda name: finished[name])}."


#: Colours of the map, by the fields of `MemoryShares`.
_MAP_COLORS = {field: style["facecolor"] for field, _, style in _SHARES}


def _map_pixels(steps: Sequence[Sequence[Span]], capacity: int, num_steps: int) -> np.ndarray:
    """[height, width, 4] uint8, red, green, blue, opacity: the state of each address at each step.

    Addresses and steps are thinned out to what is visible.
    """
    colors = {
        field: np.array(palette.rgba(color), np.uint8) for field, color in _MAP_COLORS.items()
    }
    width, height = min(num_steps, _MAP_WIDTH), min(capacity, _MAP_HEIGHT)
    pixels = np.empty((height, width, 4), np.uint8)
    pixels[:] = colors["outside"]
    addresses = (np.arange(height) * capacity) // height
    for column in range(width):
        step = column * num_steps // width
        if step < len(steps) and steps[step]:
            _, begin, room, held, needed = _columns(steps[step])
            needed = np.where(needed < 0, held, np.clip(needed, held, room))
            span = np.searchsorted(begin, addresses, side="right") - 1
            # An address beyond the room of the nearest span below has no owner.
            inside = addresses - begin[span]
            for field, size in (("never", room), ("later", needed), ("tokens", held)):
                pixels[(span >= 0) & (inside < size[span]), column] = colors[field]
    return pixels


# --- where a token lies ---------------------------------------------------------------------------

#: Blocks side by side in `draw_slots`; inches of a slot, of the space above a row of blocks, and
#: between blocks.
_BLOCKS_ABREAST, _SLOT_HEIGHT, _ABOVE, _BETWEEN = 4, 0.27, 0.22, 0.22


def draw_slots(
    trace: Trace,
    step: int | None = None,
    request: int = 0,
    pieces: Mapping[str, Sequence[str]] | None = None,
    ax: Axes | None = None,
) -> MatplotlibFigure:
    """Draw one request's tokens in order, and below them the whole cache, slot by slot.

    step: index into trace.steps, None for the one with the most blocks in use. request: the
    request's index by order of arrival. pieces: the text of each token of "request/index". For
    small blocks and pools: everything is drawn.
    """
    step = busiest_step(trace) if step is None else check_step(trace, step)
    tables, pieces = block_tables(trace, step), pieces or {}
    row = tables.rows[request]
    # The layout depends on the trace, not on the step: a replay must not jump.
    most = max((len(t) for record in trace.steps for t in record.block_tables.values()), default=1)
    line = _SLOT_HEIGHT + _ABOVE
    below = 0.62 + -(-most // _BLOCKS_ABREAST) * line
    height = below + 0.42 + -(-trace.num_blocks // _BLOCKS_ABREAST) * line + 0.08
    figure, ax = prepare(ax, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    painter = _Slots(ax, trace, step, row, pieces)
    title = f"Step {step} of {len(trace.steps) - 1}"
    ax.text(0.08, 0.2, title, fontsize=12, weight="bold", color=palette.INK, va="center")
    ax.text(
        1.75,
        0.2,
        f"Request {row.letter}: {_state(row)}",
        fontsize=10,
        color=palette.SOFT_INK,
        va="center",
    )
    painter.note(
        0.48,
        f"What {row.letter} sees: its positions in order. Each “→ block” is an entry of its block"
        " table.",
    )
    for index in range(len(row.blocks)):
        painter.logical(0.62, index)
    painter.note(
        below + 0.26,
        "Where they lie: every slot of the cache. Thick frame: written in this step. Arrow:"
        f" {row.letter}'s newest token.",
    )
    for block in range(trace.num_blocks):
        painter.physical(below + 0.42, block, tables.owners.get(block, ()))
    painter.arrow(0.62, below + 0.42)
    alt = (
        f"Picture: where the tokens of request {row.letter} lie in the KV cache, slot by slot, at"
        f" step {step}."
    )
    words = pieces.get(row.name, ())
    describe(
        figure,
        f"{alt} {_slots_in_words(step, row, words, trace.block_size)}",
        _slots_caption(step, row, words, trace.block_size),
    )
    return figure


def _state(row: Row) -> str:
    return f"{row.num_tokens} tokens in {len(row.blocks)} blocks" if row.blocks else row.state


def _newest(row: Row, words: Sequence[str], size: int) -> tuple[int, int, str]:
    """(position, slot, its word in a sentence) of the newest token of a request."""
    position = row.num_tokens - 1
    index, offset = divmod(position, size)
    word = words[position].strip() if position < len(words) else ""
    return position, row.blocks[index][0] * size + offset, f", “{word}”," if word else ""


def _slots_caption(step: int, row: Row, words: Sequence[str], size: int) -> str:
    if not row.blocks:
        return f"Step {step}: request {row.letter} is {row.state} and holds no block."
    _, slot, piece = _newest(row, words, size)
    return f"Step {step}: the newest token{piece} of {row.letter} lies in slot {slot}."


def _slots_in_words(step: int, row: Row, words: Sequence[str], size: int) -> str:
    if not row.blocks:
        return _slots_caption(step, row, words, size)
    position, slot, piece = _newest(row, words, size)
    (index, offset), block = divmod(position, size), slot // size
    return (
        f"The newest token{piece} of {row.letter} has position {position}. Entry {position} //"
        f" {size} = {index} of the block table says block {block}, the offset is {position} %"
        f" {size} = {offset}: slot {block} · {size} + {offset} = {slot}."
    )


class _Slots:
    def __init__(
        self, ax: Axes, trace: Trace, step: int, row: Row, pieces: Mapping[str, Sequence[str]]
    ) -> None:
        self.ax, self.size, self.row, self.pieces = ax, trace.block_size, row, pieces
        self.width = (WIDTH - 0.16 - (_BLOCKS_ABREAST - 1) * _BETWEEN) / (
            _BLOCKS_ABREAST * self.size
        )
        record = trace.steps[step]
        self.written = {
            (f"{item.request_id}/{item.index}", item.start + i)
            for item in record.scheduled
            for i in range(item.num_new_tokens)
        }

    def note(self, y: float, text: str) -> None:
        self.ax.text(0.08, y, text, fontsize=9.5, color=palette.SOFT_INK, va="center")

    def corner(self, top: float, index: int) -> tuple[float, float]:
        line, column = divmod(index, _BLOCKS_ABREAST)
        x = 0.08 + column * (self.size * self.width + _BETWEEN)
        return x, top + line * (_SLOT_HEIGHT + _ABOVE) + _ABOVE

    def slot(self, x: float, y: float, row: Row | None, position: int, chosen: bool) -> None:
        style = {"facecolor": palette.FREE, "edgecolor": palette.LINE, "linewidth": 0.7}
        if row is not None:
            style |= {
                "facecolor": palette.tint(row.color, 0.45 if chosen else 0.16),
                "edgecolor": palette.SOFT_INK,
            }
            if (row.name, position) in self.written:
                style |= {"edgecolor": palette.INK, "linewidth": 2.2, "zorder": 2}
        self.ax.add_patch(Rectangle((x, y), self.width, _SLOT_HEIGHT, **style))
        if row is not None:
            text = self.piece(row, position)
            points = max(5.5, min(8.0, 113 * self.width / max(1, len(text))))
            color = palette.INK if chosen else palette.SOFT_INK
            place = {"ha": "center", "va": "center", "zorder": 3}
            self.ax.text(
                x + self.width / 2,
                y + _SLOT_HEIGHT / 2,
                text,
                fontsize=points,
                color=color,
                **place,
            )

    def piece(self, row: Row, position: int) -> str:
        words = self.pieces.get(row.name, ())
        text = words[position].strip() if position < len(words) else str(position)
        return (text if len(text) <= 9 else text[:8] + "…") or "␣"

    def logical(self, top: float, index: int) -> None:
        x, y = self.corner(top, index)
        block, held = self.row.blocks[index]
        first = index * self.size
        label = f"positions {first}–{first + self.size - 1}  →  block {block}"
        self.ax.text(x, y - 0.035, label, fontsize=8, color=palette.INK, va="bottom")
        for offset in range(self.size):
            filled = offset < held
            self.slot(
                x + offset * self.width, y, self.row if filled else None, first + offset, True
            )

    def arrow(self, logical: float, physical: float) -> None:
        """Draw an arrow from the newest token, as the request sees it, to where it lies."""
        if not self.row.blocks:
            return
        index, offset = divmod(self.row.num_tokens - 1, self.size)
        middle = (offset + 0.5) * self.width
        x, y = self.corner(logical, index)
        to_x, to_y = self.corner(physical, self.row.blocks[index][0])
        style = {
            "arrowstyle": "-|>",
            "color": palette.RESERVED,
            "linewidth": 1.5,
            "connectionstyle": "arc3,rad=0.12",
            "shrinkA": 0,
            "shrinkB": 0,
        }
        start, end = (x + middle, y + _SLOT_HEIGHT), (to_x + middle, to_y)
        self.ax.annotate("", end, start, arrowprops=style, zorder=4)

    def physical(self, top: float, block: int, owners: Sequence[Row]) -> None:
        x, y = self.corner(top, block)
        owner = self.row if self.row in owners else owners[0] if owners else None
        chosen = owner is self.row
        name = {
            "weight": "bold" if chosen else "normal",
            "color": palette.INK if owner else palette.SOFT_INK,
        }
        self.ax.text(x, y - 0.035, f"block {block}", fontsize=8, va="bottom", **name)
        if owners:
            letters = "".join(f"{row.letter}, " for row in owners)
            slots = f"{letters}slots {block * self.size}–{(block + 1) * self.size - 1}"
            right = {"va": "bottom", "ha": "right", "color": palette.SOFT_INK}
            self.ax.text(x + self.size * self.width, y - 0.035, slots, fontsize=7.5, **right)
        if owner is None:
            held, index = 0, 0
        else:
            index, held = next((i, held) for i, (b, held) in enumerate(owner.blocks) if b == block)
        for offset in range(self.size):
            row = owner if offset < held else None
            self.slot(x + offset * self.width, y, row, index * self.size + offset, chosen)


# --- who reads it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reads:
    """The slots that were read, beside those that should be read."""

    num_positions: int
    #: Slot -> the position whose token it holds.
    position_of: dict[int, int]
    #: Slot -> how many times it was read.
    counts: dict[int, int]
    missed: list[int]
    foreign: list[int]
    repeated: list[int]
    wrong_order: bool

    @classmethod
    def of(cls, wanted: Sequence[int], got: Sequence[int]) -> _Reads:
        position_of = {slot: position for position, slot in enumerate(wanted)}
        counts = {slot: list(got).count(slot) for slot in set(got)}
        missed = [slot for slot in wanted if slot not in counts]
        foreign = sorted(slot for slot in counts if slot not in position_of)
        repeated = sorted(slot for slot in counts if slot in position_of and counts[slot] > 1)
        wrong_order = not (missed or foreign or repeated) and list(got) != list(wanted)
        return cls(len(wanted), position_of, counts, missed, foreign, repeated, wrong_order)

    @property
    def faults(self) -> list[str]:
        """What should not be, each in a few words."""
        position_of = self.position_of
        found = {
            "not read:": [position_of[slot] for slot in self.missed],
            "read more than once:": [position_of[slot] for slot in self.repeated],
            "slots of nobody or somebody else:": self.foreign,
        }
        faults = [f"{name} {_some(numbers)}" for name, numbers in found.items() if numbers]
        return [*faults, *["read in another order"] * self.wrong_order]

    @property
    def caption(self) -> str:
        """Say in words what was wrong."""
        if not self.faults:
            return "Every position was read once."
        return f"{self.faults[0][0].upper()}{'; '.join(self.faults)[1:]}."

    @property
    def in_words(self) -> str:
        """Say in words what was read and what was not."""
        read = self.num_positions - len(self.missed)
        return (
            f"{'; '.join([f'Of {self.num_positions} positions {read} were read', *self.faults])}."
        )


def draw_reads(
    wanted: Sequence[int],
    got: Sequence[int],
    num_blocks: int,
    block_size: int,
    ax: Axes | None = None,
) -> MatplotlibFigure:
    """Draw which slots of a cache were read, beside those that hold the context.

    wanted: the slots of positions 0, 1 …; got: the slots that were really read, in order (-1:
    something that is in no slot). The number in a slot is the position whose token it holds.
    """
    abreast = max(1, min(num_blocks, 32 // block_size))
    lines = -(-num_blocks // abreast)
    line, top, bottom = 0.27 + 0.24, 0.45, 0.42
    height = top + lines * line + bottom
    figure, ax = prepare(ax, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    between = 0.16
    width = (WIDTH - 0.16 - (abreast - 1) * between) / (abreast * block_size)
    reads = _Reads.of(wanted, got)
    ax.text(
        0.08,
        0.2,
        "What was read of the cache",
        fontsize=12,
        weight="bold",
        color=palette.INK,
        va="center",
    )
    for block in range(num_blocks):
        row, column = divmod(block, abreast)
        x, y = 0.08 + column * (block_size * width + between), top + row * line + 0.2
        mine = any(slot // block_size == block for slot in wanted)
        ax.text(
            x,
            y - 0.035,
            f"block {block}" + (" (another's)" if not mine else ""),
            fontsize=8,
            va="bottom",
            weight="bold" if mine else "normal",
            color=palette.INK if mine else palette.SOFT_INK,
        )
        for offset in range(block_size):
            place = Box(x + offset * width, y, width, 0.27)
            _draw_read(ax, place, block * block_size + offset, reads)
    entries = [
        ("right", "read, as it should be"),
        ("missed", "not read"),
        ("twice", "read more than once"),
        ("foreign", "read, but not of this context"),
    ]
    ax.legend(
        [Patch(**_READ[key]) for key, _ in entries],
        [name for _, name in entries],
        loc="lower left",
        ncols=4,
        bbox_to_anchor=(0.0, -0.005),
        frameon=False,
        fontsize=9,
        labelcolor=palette.INK,
        handlelength=1.4,
        borderaxespad=0.1,
    )
    describe(
        figure,
        f"Map: which slots of a cache of {num_blocks} blocks were read for one context."
        f" {reads.in_words}",
        reads.caption,
    )
    return figure


def _draw_read(ax: Axes, place: Box, slot: int, reads: _Reads) -> None:
    """Draw one slot: its colour says how it was read, its number which position it holds."""
    style, text, color = _READ["other"], "", palette.SOFT_INK
    count = reads.counts.get(slot, 0)
    if slot in reads.position_of:
        text = str(reads.position_of[slot])
        style = _READ["missed" if count == 0 else "twice" if count > 1 else "right"]
        color = palette.PAPER if count == 1 else palette.INK
    elif count:
        style, text, color = _READ["foreign"], "✗", palette.PAPER
    ax.add_patch(Rectangle(place.corner, place.width, place.height, linewidth=0.7, **style))
    box = {
        "boxstyle": "round,pad=0.1",
        "facecolor": palette.PAPER,
        "edgecolor": "none",
        "alpha": 0.85,
    }
    hatched = slot in reads.position_of and color == palette.INK
    ax.text(
        place.center[0],
        place.y + 0.14,
        text,
        fontsize=min(8, place.width * 26),
        ha="center",
        va="center",
        color=color,
        bbox=box if hatched else None,
    )


_READ = {
    "right": {"facecolor": palette.USED, "edgecolor": palette.PAPER},
    "missed": {"facecolor": palette.PAPER, "edgecolor": palette.WASTED, "hatch": "////"},
    "twice": {"facecolor": palette.WASTED, "edgecolor": palette.PAPER},
    "foreign": {"facecolor": palette.RESERVED, "edgecolor": palette.PAPER},
    "other": {"facecolor": palette.FREE, "edgecolor": palette.LINE},
}


def _some(numbers, limit: int = 8) -> str:
    """The numbers in words: runs as 4–7, at most `limit` numbers."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}–{b}" for a, b in runs]
    return ", ".join(texts[:limit]) + (" …" if len(texts) > limit else "")


# --- who is busy ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitCase:
    """A decode step of one layer.

    programs = sequences · kv_heads · splits, each with its share of the tiles.
    """

    label: str
    sequences: int
    kv_heads: int
    context: int
    splits: int = 1


def schedule_programs(
    case: SplitCase, multiprocessors: int, tile: int = 64
) -> list[tuple[int, int, int, int]]:
    """Place each program on a multiprocessor: (multiprocessor, begin, end, group), in tiles.

    A multiprocessor runs one program at a time. The next program goes to the first free one. This
    is a model, not a measurement: real multiprocessors run several programs at once and share the
    memory's bandwidth. group: the pair of sequence and KV head.
    """
    tiles = -(-case.context // tile)
    share = -(-tiles // case.splits)
    free = [(0, i) for i in range(multiprocessors)]
    placed = []
    for group in range(case.sequences * case.kv_heads):
        for split in range(case.splits):
            length = max(0, min(share, tiles - split * share))
            time, processor = heapq.heappop(free)
            heapq.heappush(free, (time + length, processor))
            placed.append((processor, time, time + length, group))
    return placed


#: Multiprocessors side by side in `draw_split_kv`, inches between two, and the side of one.
_ABREAST, _PITCH, _SIDE = 22, 0.155, 0.125


def draw_split_kv(
    cases: Sequence[SplitCase], multiprocessors: int = 132, tile: int = 64
) -> MatplotlibFigure:
    """Draw one square per multiprocessor, and one bar for the time: one panel per case.

    A square is the bluer the longer its multiprocessor works. All bars have the same scale.
    """
    plans = [schedule_programs(case, multiprocessors, tile) for case in cases]
    ends = [max(end for _, _, end, _ in plan) for plan in plans]
    squares = -(-multiprocessors // _ABREAST) * _PITCH
    top, panel = 0.62, squares + 0.5
    height = top + len(cases) * panel - 0.4
    figure, ax = prepare(None, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    heads = {"fontsize": 9.5, "color": palette.SOFT_INK, "va": "center"}
    left, bar = 0.1, 3.85
    ax.text(left, 0.2, f"{multiprocessors} multiprocessors: blue ones work", **heads)
    ax.text(bar, 0.2, f"time, in tiles of {tile} tokens", **heads)
    parts = []
    for i, (case, plan, end) in enumerate(zip(cases, plans, ends, strict=True)):
        y = top + i * panel
        ax.text(left, y - 0.1, case.label, fontsize=10, weight="bold", color=palette.INK)
        _draw_multiprocessors(ax, plan, multiprocessors, Box(left, y, 0, 0))
        length = 4.3 * end / max(ends)
        ax.add_patch(Rectangle((bar, y + squares / 2 - 0.17), length, 0.3, facecolor=palette.USED))
        text = {"fontsize": 10, "color": palette.INK, "va": "center"}
        ax.text(bar + length + 0.08, y + squares / 2 - 0.02, f"{end:,} tiles", **text)
        busy = len({processor for processor, *_ in plan})
        parts.append(
            f"{case.label}: {busy} of {multiprocessors} multiprocessors work; done after"
            f" {end:,} tiles."
        )
    alt = (
        f"Chart: which of {multiprocessors} multiprocessors work, and for how long, in"
        f" {len(cases)} ways to read a context. {' '.join(parts)}"
    )
    slowest = f"The longest takes {max(ends) / min(ends):.3g} times as long as the shortest."
    describe(figure, alt, slowest)
    return figure


def _draw_multiprocessors(
    ax: Axes, plan: Sequence[tuple[int, int, int, int]], count: int, place: Box
) -> None:
    """Draw one square per multiprocessor; its blue is the share of the time that it works."""
    end = max(stop for _, _, stop, _ in plan)
    work = [0] * count
    for processor, begin, stop, _ in plan:
        work[processor] += stop - begin
    for index, tiles in enumerate(work):
        row, column = divmod(index, _ABREAST)
        corner = place.x + column * _PITCH, place.y + row * _PITCH
        color = palette.tint(palette.USED, 0.25 + 0.75 * tiles / end) if tiles else palette.FREE
        style = {"facecolor": color, "edgecolor": palette.LINE, "linewidth": 0.5}
        ax.add_patch(Rectangle(corner, _SIDE, _SIDE, **style))
