"""The block table, drawn: which request owns which KV block at one step of a trace.

On the left is each request's own view: its tokens in order, in blocks that are numbered by their
real places. On the right is the KV cache itself, block by block, in the colours of the owners.
`block_tables` computes what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minivllm.engine.trace import Trace
from minivllm.viz import palette
from minivllm.viz.figure import WIDTH, describe, prepare

#: With at most this many requests, each keeps its own row through the whole trace, so that rows do
#: not jump.
MAX_FIXED_ROWS = 12
MAX_ROWS = 24
#: In cells: room for a row's name before it, for its state after it, and between the two halves.
_NAME, _STATE, _GAP = 1.1, 2.6, 1.0
#: Inches: largest side of a cell; room for title and subtitles, and for the legend.
_MAX_CELL, _TOP, _BOTTOM, _MARGIN = 0.42, 0.85, 0.5, 0.2
#: Inches: with smaller cells, one half is drawn above the other, with room for a subtitle between.
_MIN_CELL_ABREAST, _SUBTITLE = 0.36, 0.5
_POOL_WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128)

_CACHED_STYLE = {
    "facecolor": palette.CACHED,
    "edgecolor": palette.SOFT_INK,
    "hatch": palette.HATCH_CACHED,
    "linewidth": 0.5,
}
_FREE_STYLE = {"facecolor": palette.FREE, "edgecolor": palette.LINE, "linewidth": 0.7}
#: Paper under a number that would be hard to read otherwise.
_LABEL = {"boxstyle": "round,pad=0.12", "facecolor": palette.PAPER, "edgecolor": "none"}

State = Literal["running", "waiting", "finished", "absent"]


@dataclass(frozen=True)
class Row:
    """One sequence's view."""

    #: The name is "request/index", as in the trace. The letter stands for it in pictures.
    name: str
    letter: str
    color: str
    state: State
    num_tokens: int
    #: (physical block, tokens in it), in order.
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BlockTables:
    """The KV cache at one step. Every block is in exactly one of `owners`, `cached` and `free`."""

    step: int
    block_size: int
    rows: tuple[Row, ...]
    #: Block -> its owners' rows, in order; and block -> tokens in it.
    owners: dict[int, tuple[Row, ...]]
    filled: dict[int, int]
    #: Blocks without an owner: content known to the prefix cache, or not.
    cached: frozenset[int]
    free: frozenset[int]

    @property
    def shared(self) -> frozenset[int]:
        """Blocks with more than one owner."""
        return frozenset(block for block, owners in self.owners.items() if len(owners) > 1)


def names_in_order(trace: Trace) -> list[str]:
    """All sequences of a trace ("request/index"), in order of arrival."""
    return list(
        dict.fromkeys(name for record in trace.steps for name in (*record.running, *record.waiting))
    )


def check_step(trace: Trace, step: int) -> int:
    """Turn `step` into an index from 0; negative steps count from the end.

    IndexError for a step that the trace does not have.
    """
    count = len(trace.steps)
    if not count:
        raise IndexError(
            "The trace is empty; make the engine with trace=True and generate something."
        )
    if not -count <= step < count:
        raise IndexError(f"There is no step {step}: the trace has steps 0 to {count - 1}.")
    return step % count


def busiest_step(trace: Trace) -> int:
    """The first of the steps with the most blocks in use."""
    check_step(trace, 0)
    return min(range(len(trace.steps)), key=lambda i: trace.steps[i].num_free_blocks)


def block_tables(trace: Trace, step: int) -> BlockTables:
    """The block tables and the pool after step `step` of the trace."""
    step = check_step(trace, step)
    record = trace.steps[step]
    seen_later = {name for later in trace.steps[step:] for name in (*later.running, *later.waiting)}
    rows: list[Row] = []
    for index, name in enumerate(names_in_order(trace)):
        table = record.block_tables.get(name, [])
        num_tokens = record.num_computed_tokens.get(name, 0)
        fill = [
            min(trace.block_size, max(0, num_tokens - i * trace.block_size))
            for i in range(len(table))
        ]
        if name in record.running:
            state: State = "running"
        elif name in record.waiting:
            state = "waiting"
        else:
            state = "absent" if name in seen_later else "finished"
        letter, color = palette.request_letter(index), palette.request_color(index)
        rows.append(
            Row(name, letter, color, state, num_tokens, tuple(zip(table, fill, strict=True)))
        )
    owners: dict[int, tuple[Row, ...]] = {}
    filled: dict[int, int] = {}
    for row in rows:
        for block, tokens in row.blocks:
            owners[block] = (*owners.get(block, ()), row)
            filled[block] = max(tokens, filled.get(block, 0))
    cached = frozenset(record.cached_blocks)
    free = frozenset(range(trace.num_blocks)) - cached - owners.keys()
    return BlockTables(step, trace.block_size, tuple(rows), owners, filled, cached, free)


def draw_block_table(trace: Trace, step: int | None = None, ax: Axes | None = None) -> Figure:
    """Draw the block tables and the KV cache after one step.

    step: index into trace.steps, negative from the end; None is the (first) step with the most
    blocks in use. ax: draw there instead of on a new figure. Returns the figure; it displays
    itself, with a caption in words.
    """
    tables = block_tables(trace, busiest_step(trace) if step is None else step)
    layout = _Layout(trace, tables)
    figure, ax = prepare(ax, layout.height)
    ax.set_xlim(-_MARGIN / layout.cell, (WIDTH - _MARGIN) / layout.cell)
    ax.set_ylim(layout.num_lines + _BOTTOM / layout.cell, -_TOP / layout.cell)
    ax.set_axis_off()
    painter = _Painter(ax, layout)
    painter.titles(trace, tables)
    for line, row in enumerate(layout.rows):
        painter.row(line, row, tables)
    for index, block in enumerate(layout.pool):
        painter.pool_cell(index, block, tables)
    painter.notes()
    painter.legend()
    describe(figure, f"{_alt(tables)} {_in_words(trace, tables)}", _caption(tables))
    return figure


class _Layout:
    """The places of all parts of the picture, in cells.

    They depend on the trace, not on the step, so that a replay does not jump. The halves stand side
    by side, or one above the other where long block tables would make the cells too small.
    """

    def __init__(self, trace: Trace, tables: BlockTables) -> None:
        fixed = len(tables.rows) <= MAX_FIXED_ROWS
        rows = [row for row in tables.rows if fixed or row.state in _PRESENT]
        self.rows = rows[:MAX_ROWS]
        self.num_hidden_rows = len(rows) - len(self.rows)
        most_rows = (
            len(rows)
            if fixed
            else max(len(step.running) + len(step.waiting) for step in trace.steps)
        )
        row_lines = max(4, min(most_rows, MAX_ROWS)) + (most_rows > MAX_ROWS)
        in_tables = [table for record in trace.steps for table in record.block_tables.values()]
        table_width = max(1, *map(len, in_tables), 1)
        # All blocks above the highest one that the trace ever used look the same, so a large pool
        # is drawn without them.
        last = max((max(table) for table in in_tables if table), default=0)
        self.pool = range(trace.num_blocks if trace.num_blocks <= 128 else last + 1)
        self.num_untouched = trace.num_blocks - len(self.pool)
        self.pool_width = next(
            (w for w in _POOL_WIDTHS if self._pool_lines(w) <= max(row_lines, w * 0.75)), 128
        )
        self.pool_x, self.pool_y = _NAME + table_width + _STATE + _GAP, 0.0
        room = WIDTH - 2 * _MARGIN
        self.cell = min(_MAX_CELL, room / (self.pool_x + self.pool_width))
        self.num_lines: float = max(row_lines, self._pool_lines(self.pool_width))
        if self.cell < _MIN_CELL_ABREAST:
            self.cell = min(_MAX_CELL, room / (_NAME + table_width + _STATE))
            fitting = [w for w in _POOL_WIDTHS if _NAME + w <= room / self.cell]
            self.pool_width = max(fitting, default=_POOL_WIDTHS[0])
            self.pool_x, self.pool_y = _NAME, row_lines + _SUBTITLE / self.cell
            self.num_lines = self.pool_y + self._pool_lines(self.pool_width)
        self.height = _TOP + self.num_lines * self.cell + _BOTTOM

    def _pool_lines(self, width: int) -> int:
        return -(-len(self.pool) // width) + (self.num_untouched > 0)


_PRESENT = ("running", "waiting")


class _Painter:
    def __init__(self, ax: Axes, layout: _Layout) -> None:
        self.ax, self.layout = ax, layout
        # A cell's side in points.
        self.points = layout.cell * 72
        self.has_text = self.points >= 13

    def text(
        self, x: float, y: float, text: str, size: float = 9, color: str = palette.INK, **options
    ) -> None:
        self.ax.text(x, y, text, fontsize=size, color=color, **{"va": "center", **options})

    def box(self, x: float, y: float, width: float, height: float, **options) -> None:
        self.ax.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0, **options}))

    def cell(self, x: float, y: float, colors: tuple[str, ...], fill: float, shared: bool) -> None:
        """Draw a block in use: one band per owner, filled from the left.

        The paler rest is free room.
        """
        band = 0.84 / len(colors)
        for i, color in enumerate(colors):
            top = y + 0.08 + i * band
            self.box(x + 0.08, top, 0.84, band, facecolor=palette.tint(color, 0.22))
            self.box(x + 0.08, top, 0.84 * fill, band, facecolor=color)
        edge, width = (palette.INK, 1.8) if shared else (palette.SOFT_INK, 0.7)
        self.box(x + 0.08, y + 0.08, 0.84, 0.84, fill=False, edgecolor=edge, linewidth=width)

    def chip_text(
        self, x: float, y: float, text: str, background: str, size: float, fill: float = 1.0
    ) -> None:
        # Text lies across the filled part and the pale rest; a light label under it keeps it
        # readable on both.
        if fill > 0.8:
            self.text(x, y, text, size, palette.text_on(background), ha="center", weight="bold")
            return
        self.text(x, y, text, size, ha="center", weight="bold", bbox={**_LABEL, "alpha": 0.85})

    def titles(self, trace: Trace, tables: BlockTables) -> None:
        cell = self.layout.cell
        title = f"Step {tables.step} of {len(trace.steps) - 1}"
        anchor = self.ax.text(
            0, -0.62 / cell, title, fontsize=12, weight="bold", color=palette.INK, va="center"
        )
        self.ax.annotate(
            f"{len(tables.owners)} of {trace.num_blocks} blocks in use, {len(tables.shared)} of"
            " them shared",
            (1, 0.5),
            xycoords=anchor,
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=palette.SOFT_INK,
        )
        self.text(0, -0.2 / cell, "What each request sees: its block table", 9.5, palette.SOFT_INK)
        x, y = self.layout.pool_x, self.layout.pool_y - 0.2 / cell
        self.text(x, y, "Where the blocks lie: the KV cache", 9.5, palette.SOFT_INK)

    def row(self, line: int, row: Row, tables: BlockTables) -> None:
        present = row.state in _PRESENT
        color = row.color if present else palette.tint(row.color, 0.3)
        self.box(0.05, line + 0.2, 0.75, 0.6, facecolor=color)
        size = min(10, self.points * 0.36)
        self.text(
            0.42, line + 0.52, row.letter, size, palette.text_on(color), ha="center", weight="bold"
        )
        for i, (block, tokens) in enumerate(row.blocks):
            fill = tokens / tables.block_size
            self.cell(_NAME + i, line, (row.color,), fill, block in tables.shared)
            if self.has_text:
                self.chip_text(
                    _NAME + i + 0.5,
                    line + 0.52,
                    str(block),
                    row.color,
                    min(8.5, self.points * 0.3),
                    fill,
                )
        words = {
            "running": f"{row.num_tokens} tokens",
            "waiting": "waiting",
            "finished": "finished",
            "absent": "",
        }
        x = _NAME + len(row.blocks) + 0.2
        self.text(x, line + 0.52, words[row.state], min(9, self.points * 0.32), palette.SOFT_INK)

    def pool_cell(self, index: int, block: int, tables: BlockTables) -> None:
        line, column = divmod(index, self.layout.pool_width)
        x, y = self.layout.pool_x + column, self.layout.pool_y + line
        owners = tables.owners.get(block)
        size = min(8.5, self.points * 0.3)
        if column == 0:
            first = min(8, max(6, self.points * 0.3))
            self.text(x - 0.1, y + 0.5, str(block), first, palette.SOFT_INK, ha="right")
        if owners:
            fill = tables.filled[block] / tables.block_size
            self.cell(x, y, tuple(row.color for row in owners), fill, len(owners) > 1)
            if self.has_text:
                letters = (
                    "".join(row.letter for row in owners) if len(owners) <= 3 else f"×{len(owners)}"
                )
                self.chip_text(
                    x + 0.5,
                    y + 0.52,
                    letters,
                    owners[0].color,
                    size,
                    fill if len(owners) == 1 else 0,
                )
            return
        self.unused(x + 0.08, y + 0.08, 0.84, block in tables.cached)
        if self.has_text:
            box, color = (
                (_LABEL, palette.INK) if block in tables.cached else (None, palette.SOFT_INK)
            )
            self.text(x + 0.5, y + 0.52, str(block), size * 0.85, color, ha="center", bbox=box)

    def unused(self, x: float, y: float, side: float, cached: bool) -> None:
        self.box(x, y, side, side, **(_CACHED_STYLE if cached else _FREE_STYLE))

    def notes(self) -> None:
        layout, y = self.layout, self.layout.num_lines - 0.5
        if layout.num_untouched:
            first = len(layout.pool)
            note = (
                f"… and blocks {first} to {first + layout.num_untouched - 1}, never used in this"
                " trace"
            )
            self.text(layout.pool_x, y, note, 8.5, palette.SOFT_INK)
        if layout.num_hidden_rows:
            self.text(
                0,
                len(layout.rows) + 0.4,
                f"… and {layout.num_hidden_rows} more",
                8.5,
                palette.SOFT_INK,
            )

    def legend(self) -> None:
        side = 0.24 / self.layout.cell
        y = self.layout.num_lines + 0.1 / self.layout.cell
        step = 1.62 / self.layout.cell
        for i, label in enumerate(("tokens", "room left", "shared", "cached, reusable", "free")):
            x = i * step
            if label in ("cached, reusable", "free"):
                self.unused(x, y, side, label != "free")
            else:
                color = palette.REQUESTS[0]
                face = palette.tint(color, 0.22) if label == "room left" else color
                edge, width = (palette.INK, 1.8) if label == "shared" else (palette.SOFT_INK, 0.7)
                self.box(x, y, side, side, facecolor=face, edgecolor=edge, linewidth=width)
            self.text(x + side * 1.35, y + side / 2, label, 9, palette.SOFT_INK)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _alt(tables: BlockTables) -> str:
    running = sum(row.state == "running" for row in tables.rows)
    return (
        f"Picture: the block tables of {_plural(running, 'request')} at step {tables.step}, and the"
        " KV cache."
    )


def _caption(tables: BlockTables) -> str:
    if groups := _shared_groups(tables, limit=1):
        what = f"{groups[0][1]} share blocks."
    elif not tables.free:
        what = "no block is free."
    elif tables.cached:
        what = "hatched blocks belong to nobody, and can be used again."
    else:
        what = "no block is shared."
    return f"Step {tables.step}: {what}"


def _in_words(trace: Trace, tables: BlockTables) -> str:
    running = [row for row in tables.rows if row.state == "running"]
    waiting = sum(row.state == "waiting" for row in tables.rows)
    tokens = sum(tables.filled.values())
    text = (
        f"Step {tables.step}: {_plural(len(running), 'request')} running, {waiting} waiting."
        f" {_plural(len(tables.owners), 'block')} of {trace.num_blocks} in use, holding"
        f" {_plural(tokens, 'token')}; {len(tables.cached)} cached, {len(tables.free)} free."
    )
    for blocks, letters in _shared_groups(tables):
        verb = "is" if len(blocks) == 1 else "are"
        text += (
            f" {_plural(len(blocks), 'block')} ({', '.join(map(str, blocks))}) {verb} shared by"
            f" {letters}."
        )
    return text


def _shared_groups(tables: BlockTables, limit: int = 3) -> list[tuple[list[int], str]]:
    """(blocks, owners' letters) of the largest groups of blocks with the same owners."""
    groups: dict[str, list[int]] = {}
    for block in sorted(tables.shared):
        letters = [row.letter for row in tables.owners[block]]
        groups.setdefault(", ".join(letters[:-1]) + " and " + letters[-1], []).append(block)
    return sorted(
        ((blocks, letters) for letters, blocks in groups.items()), key=lambda g: -len(g[0])
    )[:limit]
