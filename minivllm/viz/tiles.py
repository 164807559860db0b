"""Pictures of attention: its weights, its memory, and the tiles of flash attention.

`attention_tiles` says which tiles of the score matrix are computed, masked or never visited.
`replay_tiles` plays the online softmax of one tile of queries, key tile by key tile (`scrub(replay,
draw_tile_replay)` puts it under a slider).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minivllm.viz import palette
from minivllm.viz.figure import WIDTH, describe, prepare

Kind = Literal["full", "masked", "skipped"]
Fault = Literal["missed", "wasted"]

#: From the page, which shines through, to the blue of computed tiles.
BLUES = LinearSegmentedColormap.from_list(
    "blues", [(*palette.rgb(palette.USED), strength) for strength in (0.0, 0.35, 1.0)]
)
_FULL = palette.tint(palette.USED, 0.75)
_MASKED = palette.WASTED
_HIDDEN = {"facecolor": palette.FREE, "edgecolor": palette.LINE, "hatch": "////", "linewidth": 0.0}
_GONE = palette.RESERVED
#: What should have been done with a tile of each kind; shown beside what a function visited.
_NEEDED = {"full": "needed, no mask", "masked": "needed, masked", "skipped": "not needed"}
_NAMES = {
    "full": "computed, no mask",
    "masked": "computed, masked",
    "skipped": "never visited",
    "missed": "needed, but missed",
    "wasted": "visited for nothing",
}


# --- which tiles ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SequenceTiles:
    """The tiles of one sequence's score matrix ``[query_len, context]``.

    The queries are the last tokens of the sequence.
    """

    query_len: int
    context: int
    block_m: int
    block_n: int
    #: kinds[i][j] is tile i of the queries and tile j of the keys.
    kinds: tuple[tuple[Kind, ...], ...]

    @property
    def counts(self) -> Counter[str]:
        """The number of tiles of each kind."""
        return Counter({"full": 0, "masked": 0, "skipped": 0}) + Counter(
            kind for row in self.kinds for kind in row
        )


def attention_tiles(query_len: int, context: int, block_m: int, block_n: int) -> SequenceTiles:
    """What a causal kernel does with each tile of block_m queries and block_n keys.

    The mask is aligned to the end: query i has position ``context - query_len + i`` and sees the
    keys up to that position. A tile is "skipped" when none of its queries sees any of its keys. It
    is "full" when all see all and the tile does not extend beyond the context, else "masked".
    ValueError unless ``1 <= query_len <= context`` and both blocks are positive.
    """
    if not 1 <= query_len <= context or block_m < 1 or block_n < 1:
        raise ValueError(
            f"no tiles of {block_m} x {block_n} for {query_len} queries in a context of {context}"
        )
    rows: list[tuple[Kind, ...]] = []
    for first_row in range(0, query_len, block_m):
        first_position = context - query_len + first_row
        last_position = min(first_position + block_m, context) - 1
        row: list[Kind] = []
        for first_key in range(0, context, block_n):
            if first_key > last_position:
                row.append("skipped")
            else:
                row.append("full" if first_key + block_n - 1 <= first_position else "masked")
        rows.append(tuple(row))
    return SequenceTiles(query_len, context, block_m, block_n, tuple(rows))


def draw_attention_tiles(
    query_lens: int | Sequence[int],
    contexts: int | Sequence[int],
    block_m: int,
    block_n: int,
    *,
    visited: Iterable[tuple[int, int]] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the score matrix of one sequence, or of each of a ragged batch, in tiles.

    query_lens, contexts: a number for one sequence, or as many numbers as there are sequences;
    contexts include the new tokens. visited: for one sequence, the tiles ``(first query, first
    key)`` that some function really visited; missed tiles and unnecessary visits are marked. ax:
    draw there instead of on a new figure.
    """
    query_lens = [query_lens] if isinstance(query_lens, int) else list(query_lens)
    contexts = [contexts] if isinstance(contexts, int) else list(contexts)
    tiles = [
        attention_tiles(q, c, block_m, block_n) for q, c in zip(query_lens, contexts, strict=True)
    ]
    if visited is not None and len(tiles) != 1:
        raise ValueError("visited tiles can be shown for one sequence only")
    went = None if visited is None else {(row // block_m, key // block_n) for row, key in visited}

    side, gap, top, bottom, limit = 0.62, 0.5, 1.12 + 0.26 * (went is not None), 0.15, 3.5
    room = WIDTH - 2 * side - gap * (len(tiles) - 1)
    # Inches per token.
    unit = min(room / sum(contexts), limit / max(query_lens))
    height = top + unit * max(query_lens) + bottom
    figure, ax = prepare(ax, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    total: Counter[str] = sum((one.counts for one in tiles), Counter())
    faults: Counter[str] = Counter()
    left = side
    for index, one in enumerate(tiles):
        faults += _draw_grid(ax, one, left, top, unit, went)
        letter = f"{palette.request_letter(index)}: " if len(tiles) > 1 else ""
        _label_grid(ax, one, left, top, unit, letter)
        left += one.context * unit + gap
    what = "a batch of " + str(len(tiles)) if len(tiles) > 1 else _name(tiles[0])
    title = f"The scores of {what}, in tiles of {block_m} × {block_n}"
    ax.text(side, 0.2, title, fontsize=12, weight="bold", color=palette.INK, va="center")
    shown = ["full", "masked", "skipped", *(name for name in ("missed", "wasted") if faults[name])]
    names = _NAMES if went is None else _NAMES | _NEEDED
    _legend(ax, {name: total[name] for name in shown[:3]}, names, side, 0.52)
    _legend(ax, {name: faults[name] for name in shown[3:]}, names, side, 0.78)
    describe(
        figure,
        f"{_tiles_alt(tiles, went)} {_tiles_in_words(tiles, total, went)}",
        _tiles_caption(total, faults if went is not None else None),
    )
    return figure


def _draw_grid(
    ax: Axes, one: SequenceTiles, left: float, top: float, unit: float, went: set | None
) -> Counter[str]:
    """Draw one score matrix; returns how many tiles were missed or visited unnecessarily."""
    faults: Counter[str] = Counter()
    polygons: dict[str, list] = {"full": [], "masked": [], "hidden": [], "skipped": []}
    marks: list[tuple[str, float, float, float, float]] = []
    for i, row in enumerate(one.kinds):
        for j, kind in enumerate(row):
            first_row, first_key = i * one.block_m, j * one.block_n
            rows = min(one.block_m, one.query_len - first_row)
            keys = min(one.block_n, one.context - first_key)
            x, y = left + first_key * unit, top + first_row * unit
            corners = [
                (x, y),
                (x + keys * unit, y),
                (x + keys * unit, y + rows * unit),
                (x, y + rows * unit),
            ]
            if kind == "masked":
                seen = [
                    max(0, min(keys, one.context - one.query_len + first_row + r - first_key + 1))
                    for r in range(rows)
                ]
                polygons["hidden"].append(corners)
                polygons["masked"].append(_stairs(seen, x, y, unit))
            else:
                polygons[kind].append(corners)
            if went is not None and ((i, j) in went) != (kind != "skipped"):
                fault = "wasted" if kind == "skipped" else "missed"
                faults[fault] += 1
                marks.append((fault, x, y, keys * unit, rows * unit))
    width = min(1.2, max(0.3, min(one.block_m, one.block_n) * unit * 4))
    styles = {
        "skipped": {"facecolor": palette.FREE, "edgecolor": palette.LINE},
        "full": {"facecolor": _FULL, "edgecolor": palette.PAPER},
        "hidden": {"facecolor": palette.FREE, "edgecolor": palette.LINE, "hatch": "/////"},
        "masked": {"facecolor": _MASKED, "edgecolor": "none"},
    }
    for name, style in styles.items():
        if polygons[name]:
            ax.add_collection(
                PolyCollection(polygons[name], linewidth=0 if name == "masked" else width, **style)
            )
    for fault, x, y, w, h in marks:
        style = "-" if fault == "missed" else (0, (2, 1.5))
        if fault == "missed":
            ax.add_patch(
                Rectangle((x, y), w, h, facecolor=palette.PAPER, alpha=0.75, linewidth=0, zorder=3)
            )
        ax.add_patch(
            Rectangle(
                (x, y), w, h, fill=False, edgecolor=_GONE, linewidth=1.6, linestyle=style, zorder=3
            )
        )
        if fault == "missed":
            ax.plot([x, x + w], [y, y + h], color=_GONE, linewidth=1.0, zorder=3)
            ax.plot([x, x + w], [y + h, y], color=_GONE, linewidth=1.0, zorder=3)
    outline = Rectangle(
        (left, top),
        one.context * unit,
        one.query_len * unit,
        fill=False,
        edgecolor=palette.SOFT_INK,
    )
    ax.add_patch(outline)
    return faults


def _stairs(seen: list[int], x: float, y: float, unit: float) -> list[tuple[float, float]]:
    """The visible part of a tile, as a polygon: seen[r] keys in its row r."""
    right = [
        (x + count * unit, y + (row + down) * unit)
        for row, count in enumerate(seen)
        for down in (0, 1)
    ]
    return [(x, y), *right, (x, y + len(seen) * unit)]


def _label_grid(
    ax: Axes, one: SequenceTiles, left: float, top: float, unit: float, letter: str
) -> None:
    """Label a grid.

    Above it: the keys that were in the cache already. Beside it: the queries.
    """
    cached = one.context - one.query_len
    split = left + cached * unit
    small = {"fontsize": 8.5, "color": palette.SOFT_INK}
    for start, stop, color in (
        (left, split, palette.CACHED),
        (split, left + one.context * unit, palette.INK),
    ):
        if stop > start:
            ax.add_patch(
                Rectangle((start, top - 0.1), stop - start, 0.05, facecolor=color, linewidth=0)
            )
    width = one.context * unit
    if cached and width > 2.6:
        ax.text(left, top - 0.2, f"{letter}{cached} keys from the cache", **small, va="center")
        ax.text(left + width, top - 0.2, f"{one.query_len} new", **small, va="center", ha="right")
    else:
        words = f"{cached} + {one.query_len} keys" if cached else f"{one.context} keys"
        ax.text(left, top - 0.2, letter + words, **small, va="center")
    middle = top + one.query_len * unit / 2
    room = one.query_len * unit
    words = f"{one.query_len} queries" if room > 0.8 else str(one.query_len)
    ax.text(left - 0.14, middle, words, **small, ha="center", va="center", rotation=90)


def _legend(ax: Axes, numbers: dict[str, int], names: dict[str, str], x: float, y: float) -> None:
    swatches: dict[str, dict[str, Any]] = {
        "full": {"facecolor": _FULL, "linewidth": 0},
        "masked": {"facecolor": _MASKED, "linewidth": 0},
        "skipped": {"facecolor": palette.FREE, "edgecolor": palette.SOFT_INK, "linewidth": 0.6},
        "missed": {"facecolor": palette.PAPER, "edgecolor": _GONE, "linewidth": 1.6},
        "wasted": {
            "facecolor": palette.FREE,
            "edgecolor": _GONE,
            "linewidth": 1.6,
            "linestyle": (0, (2, 1.5)),
        },
    }
    for name, number in numbers.items():
        ax.add_patch(Rectangle((x, y - 0.08), 0.18, 0.16, **swatches[name]))
        # Half of such a tile is hidden.
        if name == "masked":
            corners = [(x + 0.02, y - 0.08), (x + 0.18, y - 0.08), (x + 0.18, y + 0.08)]
            ax.add_collection(
                PolyCollection(
                    [corners], facecolor=palette.FREE, edgecolor=palette.LINE, hatch="/////"
                )
            )
        if name == "missed":
            ax.plot([x, x + 0.18], [y - 0.08, y + 0.08], color=_GONE, linewidth=1.0)
            ax.plot([x, x + 0.18], [y + 0.08, y - 0.08], color=_GONE, linewidth=1.0)
        text = f"{names[name]} ({number:,})"
        ax.text(x + 0.25, y, text, fontsize=9, color=palette.INK, va="center")
        x += 0.25 + 0.0725 * len(text) + 0.15


def _name(one: SequenceTiles) -> str:
    cached = one.context - one.query_len
    return (
        f"a chunk of {one.query_len:,} after {cached:,}"
        if cached
        else f"a prompt of {one.context:,}"
    )


def _tiles_alt(tiles: list[SequenceTiles], went: set | None) -> str:
    what = _name(tiles[0]) + " tokens" if len(tiles) == 1 else f"a batch of {len(tiles)} sequences"
    how = "" if went is None else ", with the tiles that a function really visited"
    return (
        f"Picture: which tiles of the attention scores of {what} are computed, masked or"
        f" skipped{how}."
    )


def _tiles_caption(total: Counter[str], faults: Counter[str] | None) -> str:
    if faults is not None:
        return (
            f"This function missed {faults['missed']:,} tiles and visited {faults['wasted']:,} for"
            " nothing."
        )
    return f"{100 * total['skipped'] / total.total():.0f} % of the tiles are never visited."


def _tiles_in_words(tiles: list[SequenceTiles], total: Counter[str], went: set | None) -> str:
    parts = [f"{_name(one)[2:]} tokens" for one in tiles]
    text = (
        parts[0].capitalize()
        if len(parts) == 1
        else "; ".join(f"{palette.request_letter(i)}: {part}" for i, part in enumerate(parts))
    )
    count = sum(total.values())
    what = "computed" if went is None else "needed"
    text += (
        f". Of {count:,} tiles {total['full']:,} are {what} without a mask, {total['masked']:,}"
        f" with one, {total['skipped']:,} ({100 * total['skipped'] / count:.0f} %) never."
    )
    if len(tiles) > 1:
        block_m, block_n = tiles[0].block_m, tiles[0].block_n
        rows = max(-(-one.query_len // block_m) for one in tiles)
        columns = max(-(-one.context // block_n) for one in tiles)
        text += (
            f" Padded to the longest, the batch would have {len(tiles) * rows * columns:,} tiles."
        )
    return text


# --- one tile of queries walks along the keys -----------------------------------------------------


@dataclass(frozen=True)
class TileStep:
    """The state of the online softmax after the tile of keys first … last - 1.

    Each tuple has one number per query.
    """

    first: int
    last: int
    #: The factor for the old sums, because the maximum grew; 0 at a row's first tile.
    rescale: tuple[float, ...]
    row_max: tuple[float, ...]
    row_sum: tuple[float, ...]
    #: The share of the final sum that has been seen, from 0 to 1.
    share: tuple[float, ...]


@dataclass(frozen=True)
class TileReplay:
    """The walk of one tile of queries along its keys, one step per tile.

    Tiles that no query sees are not visited.
    """

    scores: np.ndarray
    block_n: int
    steps: tuple[TileStep, ...]
    first_position: int
    #: The number of the first step in `scrub` and in captions.
    first_step = 1


def replay_tiles(scores: Any, block_n: int) -> TileReplay:
    """Replay the online softmax over scores ``[queries, keys]``, in tiles of block_n keys.

    scores: anything that NumPy accepts. The queries are consecutive tokens; the last of them is
    also the last key that any query sees. Keys after a query's own position are hidden here,
    whatever their score. Scores are in units of the natural exponential.
    """
    scores = np.array(scores, dtype=np.float64)
    queries, keys = scores.shape
    positions = np.arange(keys - queries, keys)
    scores[np.arange(keys) > positions[:, None]] = -np.inf
    row_max, row_sum = np.full(queries, -np.inf), np.zeros(queries)
    states = []
    for first in range(0, keys, block_n):
        tile = scores[:, first : first + block_n]
        new_max = np.maximum(row_max, tile.max(axis=1))
        safe = np.where(np.isinf(new_max), 0.0, new_max)
        rescale = np.exp(row_max - safe)
        row_sum = row_sum * rescale + np.exp(tile - safe[:, None]).sum(axis=1)
        row_max = new_max
        states.append((first, first + tile.shape[1], rescale, row_max, row_sum))
    steps = tuple(
        TileStep(
            first,
            last,
            *(tuple(x.tolist()) for x in (rescale, m, l, l * np.exp(m - row_max) / row_sum)),
        )
        for first, last, rescale, m, l in states
    )
    return TileReplay(scores, block_n, steps, int(positions[0]))


def draw_tile_replay(replay: TileReplay, step: int = -1, ax: Axes | None = None) -> Figure:
    """Draw the running maximum and sum after one tile of keys.

    step: index into replay.steps, negative from the end; IndexError where there is no such step.
    (The picture counts from 1.)
    """
    count = len(replay.steps)
    if not -count <= step < count:
        raise IndexError(f"There is no tile {step}: the walk has tiles 0 to {count - 1}.")
    step %= count
    state = replay.steps[step]
    queries, keys = replay.scores.shape
    row = 0.3
    top, bottom, left = 1.0, 0.34, 0.62
    height = top + queries * row + bottom
    figure, ax = prepare(ax, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    title = f"Tile {step + 1} of {count}: keys {state.first} to {state.last - 1}"
    ax.text(left, 0.2, title, fontsize=12, weight="bold", color=palette.INK, va="center")
    _draw_scores(ax, replay, state, left, top, 4.1 / keys, row)
    _draw_state(ax, replay, step, left + 4.1 + 0.3, top, row)
    words = _replay_in_words(replay, step)
    describe(figure, f"{_replay_alt(replay)} {words}", _replay_caption(replay, step))
    return figure


def _draw_scores(
    ax: Axes, replay: TileReplay, state: TileStep, left: float, top: float, unit: float, row: float
) -> None:
    queries, keys = replay.scores.shape
    finite = replay.scores[np.isfinite(replay.scores)]
    low, high = float(finite.min()), float(finite.max())
    small = {"fontsize": 8.5, "color": palette.SOFT_INK, "va": "center"}
    seen, colors, hidden = [], [], []
    for i in range(queries):
        for j in range(state.last):
            x, y = left + j * unit, top + i * row
            corners = [(x, y), (x + unit, y), (x + unit, y + row), (x, y + row)]
            if j > replay.first_position + i:
                hidden.append(corners)
            else:
                seen.append(corners)
                colors.append(BLUES((replay.scores[i, j] - low) / max(high - low, 1e-9)))
    ax.add_patch(
        Rectangle(
            (left, top),
            keys * unit,
            queries * row,
            facecolor=palette.FREE,
            edgecolor=palette.LINE,
            linewidth=0.6,
        )
    )
    ax.add_collection(
        PolyCollection(seen, facecolors=colors, linewidth=0.2, edgecolors=palette.PAPER)
    )
    if hidden:
        ax.add_collection(
            PolyCollection(
                hidden, facecolor=palette.FREE, edgecolor=palette.LINE, hatch="/////", lw=0.2
            )
        )
    for first in range(0, keys, replay.block_n):
        ax.plot(
            [left + first * unit] * 2,
            [top, top + queries * row],
            color=palette.SOFT_INK,
            linewidth=0.6,
        )
    width = (state.last - state.first) * unit
    ax.add_patch(
        Rectangle(
            (left + state.first * unit, top),
            width,
            queries * row,
            fill=False,
            edgecolor=_GONE,
            linewidth=2.2,
        )
    )
    ax.text(
        left,
        top - 0.42,
        "scores: the bluer, the larger; hatched is hidden",
        fontsize=9.5,
        color=palette.INK,
        va="center",
    )
    ax.text(left, top - 0.15, "key 0", **small)
    ax.text(left + keys * unit, top - 0.15, f"key {keys - 1}", **small, ha="right")
    for i in range(queries):
        ax.text(
            left - 0.08, top + (i + 0.5) * row, f"{replay.first_position + i}", **small, ha="right"
        )
    ax.text(left - 0.08, top - 0.15, "query", **small, ha="right")
    if state.last < keys:
        middle = left + (state.last + keys) / 2 * unit
        label = {"facecolor": palette.FREE, "edgecolor": "none", "pad": 2}
        ax.text(
            middle, top + queries * row / 2, "not yet\nvisited", **small, ha="center", bbox=label
        )


def _draw_state(
    ax: Axes, replay: TileReplay, step: int, left: float, top: float, row: float
) -> None:
    """Draw the state beside each query.

    The state is the running maximum, the factor for the old sums, the sum, and the share of the
    final sum that has been seen.
    """
    state, before = replay.steps[step], replay.steps[step - 1] if step else None
    maxima = [m for s in replay.steps for m in s.row_max if np.isfinite(m)]
    low, high = min(maxima), max(maxima)
    columns = {
        "max": (left, 1.15),
        "factor": (left + 1.3, 0.6),
        "sum": (left + 2.0, 0.55),
        "share": (left + 2.7, 0.75),
    }
    heads = {"max": "running max m", "factor": "rescale", "sum": "sum ℓ", "share": "of final ℓ"}
    for name, (x, width) in columns.items():
        align = {"max": "left", "share": "left"}.get(name, "right")
        x_text = x if align == "left" else x + width
        ax.text(
            x_text, top - 0.15, heads[name], fontsize=9, color=palette.INK, va="center", ha=align
        )
    for i in range(len(state.row_max)):
        y = top + (i + 0.5) * row
        x, width = columns["max"]
        ax.plot([x, x + width], [y, y], color=palette.LINE, linewidth=0.6)

        def at(value: float, x: float = x, width: float = width) -> float:
            return x + width * (0.06 + 0.88 * (value - low) / max(high - low, 1e-9))

        if np.isfinite(state.row_max[i]):
            grew = (
                before is not None
                and np.isfinite(before.row_max[i])
                and state.row_max[i] > before.row_max[i]
            )
            if grew:
                old = at(before.row_max[i])
                ax.plot([old, at(state.row_max[i])], [y, y], color=_GONE, linewidth=1.6)
                ax.plot([old], [y], "o", ms=5, markerfacecolor=palette.PAPER, markeredgecolor=_GONE)
            ax.plot([at(state.row_max[i])], [y], "o", ms=6, color=_GONE if grew else palette.INK)
            x, width = columns["factor"]
            factor = f"{state.rescale[i]:.2f}" if state.rescale[i] >= 0.005 else "<0.01"
            word = f"× {factor}" if grew else ("first" if before is None else "× 1")
            color = _GONE if grew else palette.SOFT_INK
            ax.text(x + width, y, word, fontsize=9, color=color, va="center", ha="right")
        x, width = columns["sum"]
        ax.text(
            x + width,
            y,
            f"{state.row_sum[i]:.2f}",
            fontsize=9,
            color=palette.INK,
            va="center",
            ha="right",
        )
        x, width = columns["share"]
        ax.add_patch(
            Rectangle(
                (x, y - 0.07),
                width,
                0.14,
                facecolor=palette.FREE,
                edgecolor=palette.LINE,
                linewidth=0.5,
            )
        )
        ax.add_patch(
            Rectangle(
                (x, y - 0.07), width * state.share[i], 0.14, facecolor=palette.USED, linewidth=0
            )
        )


def _replay_alt(replay: TileReplay) -> str:
    queries = len(replay.scores)
    return (
        f"Picture: a tile of {queries} queries walks along its keys, {replay.block_n} at a time, "
        "with the running maximum and sum of each query."
    )


def _replay_caption(replay: TileReplay, step: int) -> str:
    if step == 0:
        what = "all queries get their first maximum and sum"
    elif any(map(operator.gt, replay.steps[step].row_max, replay.steps[step - 1].row_max)):
        what = "some maxima grow, and what was summed under them is scaled down"
    else:
        what = "no maximum grows"
    return f"Tile {step + 1} of {len(replay.steps)}: {what}."


def _replay_in_words(replay: TileReplay, step: int) -> str:
    state, queries = replay.steps[step], len(replay.scores)
    text = f"Tile {step + 1} of {len(replay.steps)}, keys {state.first} to {state.last - 1}: "
    if step == 0:
        text += f"all {queries} queries get their first maximum and sum."
    else:
        before = replay.steps[step - 1]
        grew = sum(new > old for new, old in zip(state.row_max, before.row_max, strict=True))
        text += (
            f"the maximum of {grew} of {queries} queries grows, and what they had summed is scaled"
            " down."
        )
    return (
        text
        + f" On average {100 * sum(state.share) / queries:.0f} % of the final sum has been seen."
    )


# --- the whole matrix, that flash attention never makes -------------------------------------------


def draw_attention_weights(
    weights: Any, tokens: Sequence[str], query: int = -1, top: int = 7
) -> Figure:
    """Draw the attention weights ``[n, n]`` of one head, and the strongest keys of one query.

    tokens: n strings. query: the row to explain. top: how many of its keys to name.
    """
    weights = np.asarray(weights, dtype=np.float64)
    count = len(tokens)
    query %= count
    height = 4.6
    figure, ax = prepare(None, height)
    ax.set_axis_off()
    grid = figure.add_axes((0.07, 0.06, 4.0 / WIDTH, 4.0 / height))
    grid.imshow(np.sqrt(weights), cmap=BLUES, interpolation="nearest", vmin=0, vmax=1)
    above = [
        (-0.5, -0.5),
        *((i + 0.5, i + down - 0.5) for i in range(count) for down in (0, 1)),
        (count - 0.5, -0.5),
    ]
    grid.add_collection(
        PolyCollection([above], facecolor=palette.FREE, edgecolor=palette.LINE, hatch="////", lw=0)
    )
    grid.add_patch(
        Rectangle((-0.5, query - 0.5), query + 1, 1, fill=False, edgecolor=_GONE, linewidth=1.4)
    )
    grid.set_xticks([])
    grid.set_yticks([])
    for spine in grid.spines.values():
        spine.set_color(palette.SOFT_INK)
    grid.set_title(
        f"Attention weights of {count} tokens",
        loc="left",
        fontsize=12,
        weight="bold",
        color=palette.INK,
    )
    grid.set_ylabel("queries", fontsize=9.5, color=palette.SOFT_INK)
    label = {"fontsize": 9.5, "color": palette.INK, "ha": "right", "va": "center"}
    paper = {"facecolor": palette.PAPER, "edgecolor": "none", "pad": 2}
    grid.text(count * 0.97, count * 0.06, "the future: all zero", bbox=paper, **label)

    best = sorted(range(query + 1), key=lambda j: -weights[query, j])[:top]
    bars = figure.add_axes((0.66, 0.14, 0.3, 0.66))
    bars.set_facecolor(palette.PAPER)
    bars.barh(range(len(best)), [weights[query, j] for j in best], color=palette.USED, height=0.6)
    names = [f"{_shown(tokens[j])}  {j}" for j in best]
    bars.set_yticks(range(len(best)), names, fontsize=9.5, color=palette.INK)
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.tick_params(colors=palette.SOFT_INK, labelsize=9, length=0)
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    bars.set_title(
        f"Where {_shown(tokens[query])} (token {query}) looks",
        loc="left",
        fontsize=10.5,
        color=palette.INK,
    )
    seen = np.tril(np.ones((count, count), dtype=bool))
    small = int((weights[seen] < 0.01).sum())
    describe(
        figure,
        f"Picture: the attention weights of one head for a text of {count} tokens, as a matrix."
        f" Of {count * count:,} weights {count * (count - 1) // 2:,} belong to the future and are"
        f" zero; of the other {int(seen.sum()):,}, {100 * small / seen.sum():.0f} % are below"
        " 0.01.",
        f"Token {query}, {_shown(tokens[query])}, looks most at {_shown(tokens[best[0]])} and"
        f" {_shown(tokens[best[1]])}.",
    )
    return figure


def _shown(token: str) -> str:
    return "‘" + token.replace("\n", "⏎").replace("$", "") + "’"


def draw_attention_memory(
    lengths: Sequence[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    bytes_each: int,
    memory: float,
    name: str,
) -> Figure:
    """Draw how the bytes of one layer's scores, inputs and output grow with the prompt.

    memory: bytes of the machine called name, drawn as a line.
    """
    figure, ax = prepare(None, 3.6)
    ax.set_position((0.09, 0.15, 0.66, 0.72))
    ax.set_facecolor(palette.PAPER)
    scores = [heads * n * n * bytes_each for n in lengths]
    others = [n * (2 * heads + 2 * kv_heads) * head_dim * bytes_each for n in lengths]
    ax.loglog(lengths, scores, color=_GONE, linewidth=2.4, marker="o", ms=4, base=2)
    ax.loglog(lengths, others, color=palette.USED, linewidth=2.4, marker="s", ms=4, base=2)
    ax.axhline(memory, color=palette.INK, linewidth=1.2, linestyle=(0, (4, 2)))
    ax.text(
        lengths[0], memory * 1.25, f"{name}: {memory / 1e9:.0f} GB", fontsize=9.5, color=palette.INK
    )
    ax.text(
        lengths[-1] * 1.12, scores[-1], "the N × N scores", fontsize=9.5, color=_GONE, va="center"
    )
    ax.text(
        lengths[-1] * 1.12,
        others[-1],
        "Q, K, V and output",
        fontsize=9.5,
        color=palette.USED,
        va="center",
    )
    ax.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    ticks = {
        10**6: "1 MB",
        10**7: "10 MB",
        10**8: "100 MB",
        10**9: "1 GB",
        10**10: "10 GB",
        10**11: "100 GB",
        10**12: "1 TB",
    }
    ax.set_ylim(min(others) / 2, max(*scores, memory) * 3)
    ax.set_yticks([t for t in ticks if ax.get_ylim()[0] <= t <= ax.get_ylim()[1]])
    ax.set_yticklabels([ticks[int(t)] for t in ax.get_yticks()])
    ax.minorticks_off()
    ax.tick_params(colors=palette.SOFT_INK, labelsize=9, length=3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color=palette.LINE, linewidth=0.4)
    ax.set_title(
        "One attention layer, one prompt", loc="left", fontsize=12, weight="bold", color=palette.INK
    )
    ax.set_xlabel("tokens of the prompt", fontsize=9.5, color=palette.SOFT_INK)
    over = next((n for n, s in zip(lengths, scores, strict=True) if s > memory), None)
    describe(
        figure,
        "Chart: bytes of the attention scores, and of Q, K, V and the output, against the length of"
        f" the prompt. At {lengths[0]:,} tokens the scores take {scores[0] / others[0]:.1f} times"
        f" the bytes of Q, K, V and the output together, at {lengths[-1]:,} tokens"
        f" {scores[-1] / others[-1]:,.0f} times.",
        f"The scores of {over:,} tokens no longer fit into the memory of one {name}."
        if over
        else f"The scores of all these prompts fit into the memory of one {name}.",
    )
    return figure


# --- what a tile takes of a multiprocessor --------------------------------------------------------


def draw_tile_room(
    tiles: Mapping[str, tuple[float, float]], registers: float, shared_kib: float
) -> Figure:
    """Draw what tiles take of a multiprocessor.

    tiles: name -> (registers per thread, KiB of shared memory). registers, shared_kib: the most
    that there is; a larger demand is hatched.
    """
    names = list(tiles)
    limits = {"registers per thread": registers, "KiB of shared memory": shared_kib}
    height = 1.05 + 0.34 * len(names)
    figure, ax = prepare(None, height)
    ax.set_axis_off()
    lacks: dict[str, list[str]] = {name: [] for name in names}
    for index, (what, limit) in enumerate(limits.items()):
        ax = figure.add_axes((0.26 + 0.33 * index, 0.08 / height, 0.27, 0.34 * len(names) / height))
        _draw_room(ax, what, limit, numbers := [tiles[name][index] for name in names])
        for line, (name, number) in enumerate(zip(names, numbers, strict=True)):
            lacks[name] += [("registers", "shared memory")[index]] * (number > limit)
            if index == 0:
                style = {"fontsize": 9.5, "color": palette.INK, "ha": "right", "va": "center"}
                ax.text(-0.04 * ax.get_xlim()[1], line, name, **style)
    title = "What a tile takes of a multiprocessor, and what there is"
    figure.text(0.02, 1 - 0.25 / height, title, fontsize=12, weight="bold", color=palette.INK)
    for line, missing in enumerate(lacks.values()):
        style = {"color": _GONE, "weight": "bold"} if missing else {"color": palette.INK}
        y = (0.08 + 0.34 * (len(names) - line - 0.5)) / height
        figure.text(0.9, y, "too large" if missing else "fits", fontsize=9.5, va="center", **style)
    said = [
        f"{name}: " + (f"too much {' and '.join(m)}" if m else "fits") for name, m in lacks.items()
    ]
    alt = (
        f"Chart: registers and shared memory that {len(names)} tiles take, beside what a"
        " multiprocessor has of each."
        f" {'; '.join(said).replace('too much registers', 'too many registers')}."
    )
    fitting = sum(not missing for missing in lacks.values())
    describe(figure, alt, f"{fitting} of these {len(names)} tiles fit.")
    return figure  # type: ignore[return-value]


def _draw_room(ax: Axes, what: str, limit: float, numbers: Sequence[float]) -> None:
    """Draw a bar for each number, hatched beyond the limit."""
    ax.set_xlim(0, 1.05 * max(limit, *numbers))
    ax.set_ylim(len(numbers) - 0.5, -0.5)
    ax.set_axis_off()
    for line, number in enumerate(numbers):
        ax.add_patch(
            Rectangle(
                (0, line - 0.32), min(number, limit), 0.64, facecolor=palette.USED, linewidth=0
            )
        )
        if number > limit:
            style = {
                "facecolor": palette.PAPER,
                "edgecolor": _GONE,
                "hatch": "/////",
                "linewidth": 1.0,
            }
            ax.add_patch(Rectangle((limit, line - 0.32), number - limit, 0.64, **style))
        inside = {
            "color": palette.text_on(palette.USED),
            "fontsize": 9.5,
            "va": "center",
            "weight": "bold",
        }
        ax.text(
            0.02 * ax.get_xlim()[1],
            line,
            f"{number:.0f}" + (f" > {limit:.0f}" if number > limit else ""),
            **inside,
        )
    ax.axvline(limit, color=_GONE, linewidth=1.6)
    ax.text(0, -1.25, what, fontsize=9.5, color=palette.INK, va="bottom")
    ax.text(
        limit,
        -0.6,
        f"{limit:.0f}",
        fontsize=9.5,
        color=_GONE,
        ha="center",
        va="bottom",
        weight="bold",
    )
