"""Pictures of softmax: overflow of exp, online softmax, merging, memory traffic, Triton's tiles.

`online_softmax` computes what the replay draws: the running maximum, the running sum, and the
factor that rescales the old sum when the maximum grows (Milakov and Gimelshein 2018, arXiv
1805.02867). All take plain floats; torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from minivllm.viz import palette
from minivllm.viz.figure import Figure, describe, plain_axes, prepare

#: The largest x whose exp a format can hold: the logarithm of its largest number.
EXP_LIMITS = {"float16": math.log(65504.0), "float32, bfloat16": math.log(3.4028234e38)}
_BOLD = {"fontsize": 12, "weight": "bold", "color": palette.INK, "loc": "left"}
_LABEL = {
    "boxstyle": "round,pad=0.12",
    "facecolor": palette.PAPER,
    "edgecolor": "none",
    "alpha": 0.85,
}


@dataclass(frozen=True)
class SoftmaxStep:
    """The state after one more tile, scores[start:end].

    old_sum · rescale + added = new_sum.
    """

    start: int
    end: int
    old_max: float
    new_max: float
    rescale: float
    old_sum: float
    added: float
    new_sum: float

    @property
    def jumped(self) -> bool:
        """Whether the maximum grew, so that an old sum had to be rescaled."""
        return self.new_max > self.old_max and self.old_sum > 0


@dataclass(frozen=True)
class SoftmaxReplay:
    """The online softmax of a row, step by step; the input of `draw_online_softmax` and `scrub`."""

    scores: tuple[float, ...]
    labels: tuple[str, ...]
    block: int
    steps: tuple[SoftmaxStep, ...]
    #: The number of the first step in `scrub` and in captions.
    first_step = 1

    def pieces(self, step: int) -> list[float]:
        """What each score so far contributes to the sum after this step: exp(score - maximum)."""
        record = self.steps[step]
        return [_exp(score, record.new_max) for score in self.scores[: record.end]]


def online_softmax(
    scores: Sequence[float], block: int = 1, labels: Sequence[str] | None = None
) -> SoftmaxReplay:
    """Replay the recurrence over a row, `block` scores per step (the last step may have fewer).

    labels: a word for each score; None numbers them. ValueError for no scores, for a block below 1,
    or for labels that do not match.
    """
    row = tuple(map(float, scores))
    names = tuple(map(str, range(len(row)) if labels is None else labels))
    if not row or block < 1 or len(names) != len(row):
        raise ValueError(
            f"{len(row)} scores, {len(names)} labels, blocks of {block}: there is nothing to draw."
        )
    steps, maximum, total = [], -math.inf, 0.0
    for start in range(0, len(row), block):
        tile = row[start : start + block]
        new_max = max(maximum, *tile)
        rescale = _exp(maximum, new_max)
        added = sum(_exp(score, new_max) for score in tile)
        new_sum = total * rescale + added
        steps.append(
            SoftmaxStep(start, start + len(tile), maximum, new_max, rescale, total, added, new_sum)
        )
        maximum, total = new_max, new_sum
    return SoftmaxReplay(row, names, block, tuple(steps))


def draw_online_softmax(
    replay: SoftmaxReplay, step: int = -1, found: Sequence[float] | None = None
) -> Figure:
    """Draw the scores with the running maximum, and below, the parts of the running sum.

    The picture shows the state after one step. step: index into replay.steps, negative from the
    end; IndexError where there is no such step. (The picture counts from 1.) found: the sums of
    another function after each step, marked beside the right ones; NaN is left out. With a slider:
    ``scrub(replay, draw_online_softmax, step=0)``.
    """
    count = len(replay.steps)
    if not -count <= step < count:
        raise IndexError(f"There is no step {step}: the replay has steps 0 to {count - 1}.")
    step %= count
    figure = Figure(5.0)
    top = figure.add_axes((0.075, 0.545, 0.905, 0.385))
    bottom = figure.add_axes((0.075, 0.145, 0.905, 0.375))
    for ax in (top, bottom):
        ax.set_xlim(-0.6, len(replay.scores) - 0.4)
        ax.set_xticks([])
        plain_axes(ax)
    _draw_scores(top, replay, step)
    _draw_sums(bottom, replay, step, numbers=found is None)
    bottom.set_xticks(range(len(replay.scores)), [_shown(label) for label in replay.labels])
    bottom.tick_params(
        axis="x", colors=palette.INK, length=0, labelsize=10 if len(replay.scores) <= 14 else 8
    )
    figure.text(0.075, 0.025, _sentence(replay, step), fontsize=10.5, color=palette.INK)
    caption = _replay_caption(replay, step)
    if found is not None:
        caption += _mark_found(bottom, replay, step, found)
    describe(figure, f"{_replay_alt(replay, step)} {_replay_in_words(replay, step)}", caption)
    return figure


def _shades(count: int) -> list[str]:
    """One colour per score, from dark to light in their order, so that no two are the same."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.9 * i / max(1, count - 1))) for i in range(count)]


def _draw_scores(ax: Axes, replay: SoftmaxReplay, step: int) -> None:
    seen, shades = replay.steps[step].end, _shades(len(replay.scores))
    finite = [score for score in replay.scores if math.isfinite(score)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    room = max(high - low, 1.0)
    ax.set_ylim(low - 0.16 * room * (low < 0), high + 0.18 * room)
    ax.set_title(f"Step {step + 1} of {len(replay.steps)}: scores, as they come", **_BOLD)
    ax.set_ylabel("score and maximum", fontsize=9.5, color=palette.SOFT_INK)
    ax.spines["bottom"].set_position(("data", 0.0))
    for i, score in enumerate(replay.scores):
        color = shades[i] if i < seen else palette.CACHED
        if not math.isfinite(score):
            continue
        ax.add_patch(Rectangle((i - 0.3, 0), 0.6, score, facecolor=color, linewidth=0))
        # The number stands inside a bar that has room for it: above a bar runs the maximum.
        inside = abs(score) > 0.2 * room
        up = (score >= 0) != inside
        ax.text(
            i,
            score + (0.03 if up else -0.03) * room,
            f"{score:.1f}",
            va="bottom" if up else "top",
            ha="center",
            fontsize=9,
            color=palette.text_on(color) if inside else palette.INK,
            bbox=None if inside else _LABEL,
        )
    for record in replay.steps[: step + 1]:
        left, right = record.start - 0.5, record.end - 0.5
        if math.isfinite(record.new_max):
            ax.plot(
                [left, right],
                [record.new_max] * 2,
                color=palette.INK,
                linewidth=2.4,
                solid_capstyle="butt",
            )
            if record.jumped:
                ax.plot(
                    [left, left], [record.old_max, record.new_max], color=palette.INK, linewidth=1.2
                )


def _draw_sums(ax: Axes, replay: SoftmaxReplay, step: int, numbers: bool) -> None:
    # The scale is that of the whole replay, so that a slider does not make it jump.
    height = max(record.new_sum for record in replay.steps) or 1.0
    ax.set_ylim(0, 1.3 * height)
    ax.set_ylabel("sum of exp(score − max)", fontsize=9.5, color=palette.SOFT_INK)
    shades = _shades(len(replay.scores))
    for index, record in enumerate(replay.steps[: step + 1]):
        left, right = record.start - 0.3, record.end - 0.7
        base = 0.0
        for i, piece in enumerate(replay.pieces(index)):
            style = {"facecolor": shades[i], "edgecolor": palette.PAPER, "linewidth": 0.6}
            ax.add_patch(Rectangle((left, base), right - left, piece, **style))
            base += piece
        if not numbers:
            continue
        middle = (left + right) / 2
        weight = "bold" if index == step else "normal"
        ax.text(
            middle,
            base + 0.03 * height,
            f"{record.new_sum:.2f}",
            ha="center",
            fontsize=9,
            weight=weight,
        )
        if record.jumped:
            label = f"× {record.rescale:.2f}"
            style = {"ha": "center", "va": "bottom", "fontsize": 8.5, "color": palette.RESERVED}
            ax.text(middle, base + 0.15 * height, label, weight="bold", **style)


def _mark_found(ax: Axes, replay: SoftmaxReplay, step: int, found: Sequence[float]) -> str:
    """Draw crosses at another function's sums; returns a sentence about them."""
    places = [
        ((r.start + r.end - 1) / 2, value)
        for r, value in zip(replay.steps[: step + 1], found, strict=False)
    ]
    places = [(x, value) for x, value in places if math.isfinite(value)]
    style = {
        "color": palette.INK,
        "markersize": 10,
        "markeredgewidth": 2.4,
        "linewidth": 1.2,
        "zorder": 5,
    }
    ax.plot(*zip(*places, strict=True) if places else ([], []), "x", linestyle=":", **style)
    ax.set_ylim(0, max(ax.get_ylim()[1], 1.1 * max((value for _, value in places), default=0.0)))
    steps = enumerate(zip(replay.steps[: step + 1], found, strict=False))
    wrong = [
        i for i, (record, value) in steps if not math.isclose(value, record.new_sum, rel_tol=1e-4)
    ]
    if not wrong:
        return " The crosses, sums found by another function, agree."
    return (
        f" The crosses, sums found by another function, differ from step {wrong[0] + 1} on:"
        f" {found[wrong[0]]:.2f}, not {replay.steps[wrong[0]].new_sum:.2f}."
    )


def _sentence(replay: SoftmaxReplay, step: int) -> str:
    record = replay.steps[step]
    if record.old_max == -math.inf:
        return f"The first maximum is {record.new_max:.1f}, and the sum {record.new_sum:.2f}."
    if record.jumped:
        return (
            f"The maximum grows from {record.old_max:.1f} to {record.new_max:.1f}: everything so"
            f" far × exp({record.old_max:.1f} − {record.new_max:.1f}) = {record.rescale:.2f}."
            f" {record.old_sum:.2f} × {record.rescale:.2f} + {record.added:.2f} ="
            f" {record.new_sum:.2f}"
        )
    return (
        f"The maximum stays {record.new_max:.1f}: {record.old_sum:.2f} + {record.added:.2f} ="
        f" {record.new_sum:.2f}"
    )


def _replay_alt(replay: SoftmaxReplay, step: int) -> str:
    return (
        f"Chart: {len(replay.scores)} scores with their running maximum after step {step + 1}, and"
        " below it the running sum, each column made of one piece per score."
    )


def _replay_caption(replay: SoftmaxReplay, step: int) -> str:
    record = replay.steps[step]
    what = "grows, and the sum so far is scaled down" if record.jumped else "stays"
    return f"Step {step + 1}: the maximum {what if step else 'is the first'}."


def _replay_in_words(replay: SoftmaxReplay, step: int) -> str:
    done = replay.steps[: step + 1]
    jumps = [f"× {record.rescale:.2f}" for record in done if record.jumped]
    text = (
        f"Step {step + 1}: {done[-1].end} of {len(replay.scores)} scores seen, maximum"
        f" {done[-1].new_max:.1f}, sum {done[-1].new_sum:.2f}. "
    )
    if not jumps:
        return text + "The sum has not been rescaled yet."
    times = "once" if len(jumps) == 1 else f"{len(jumps)} times"
    return f"{text}The sum was rescaled {times}: {', '.join(jumps)}."


# --- where exp overflows --------------------------------------------------------------------------


def draw_exp_range(rows: Mapping[str, Sequence[float]]) -> Figure:
    """Draw rows of scores on one axis, with the limits beyond which exp overflows.

    rows: name -> scores.
    """
    figure, ax = prepare(None, 0.95 + 0.5 * len(rows))
    height = figure.get_figheight()
    ax.set_position((0.16, 0.5 / height, 0.82, 1 - 1.0 / height))
    high = max(*EXP_LIMITS.values(), *(max(scores) for scores in rows.values()))
    low = min(0.0, *(min(scores) for scores in rows.values()))
    ax.set_xlim(low - 0.04 * (high - low), high + 0.06 * (high - low))
    ax.set_ylim(len(rows) - 0.4, -0.75)
    limit = EXP_LIMITS["float32, bfloat16"]
    ax.axvspan(limit, ax.get_xlim()[1], color=palette.tint(palette.RESERVED, 0.1), linewidth=0)
    for name, edge in EXP_LIMITS.items():
        ax.axvline(
            edge,
            color=palette.RESERVED,
            linewidth=1.6,
            linestyle=(0, (4, 2)) if name == "float16" else "-",
        )
        ax.text(
            edge + 1, -0.56, f"{edge:.1f}: {name}", fontsize=9, color=palette.RESERVED, va="center"
        )
    for line, scores in enumerate(rows.values()):
        inside, beyond = [x for x in scores if x <= limit], [x for x in scores if x > limit]
        ax.plot([min(scores), max(scores)], [line] * 2, color=palette.LINE, linewidth=1)
        ax.plot(
            inside, [line] * len(inside), "|", color=palette.USED, markersize=13, markeredgewidth=1
        )
        ax.plot(
            beyond,
            [line] * len(beyond),
            "x",
            color=palette.RESERVED,
            markersize=8,
            markeredgewidth=2,
        )
    ax.set_yticks(range(len(rows)), rows)
    ax.set_title("Where exp leaves the number format", **_BOLD)
    ax.set_xlabel("score", fontsize=9.5, color=palette.SOFT_INK)
    plain_axes(ax)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", colors=palette.INK, length=0, labelsize=10)
    lost = {name: sum(x > limit for x in scores) for name, scores in rows.items()}
    parts = [f"{name}: largest {max(rows[name]):.1f}, {lost[name]} beyond" for name in rows]
    alt = (
        f"Chart: {len(rows)} rows of scores on a line, with the largest numbers whose exp float16"
        f" and float32 can hold. {'; '.join(parts)}."
    )
    describe(figure, alt, f"exp overflows float32 beyond {limit:.1f}.")
    return figure  # type: ignore[return-value]


# --- merging --------------------------------------------------------------------------------------


def draw_merge(
    scores: Sequence[float], cuts: Sequence[int], labels: Sequence[str] | None = None
) -> Figure:
    """Draw the separately summed parts of a row, and the same pieces when merged.

    Each part has its own maximum. cuts: where a new part begins, rising, for example ``[4, 8]`` for
    three parts. ValueError for an empty part.
    """
    row = tuple(map(float, scores))
    edges = [0, *cuts, len(row)]
    if any(begin >= end for begin, end in pairwise(edges)):
        raise ValueError(f"cuts {list(cuts)} leave an empty part of {len(row)} scores.")
    names = tuple(map(str, range(len(row)) if labels is None else labels))
    parts = [
        online_softmax(row[begin:end], block=len(row)).steps[0] for begin, end in pairwise(edges)
    ]
    total_max = max(part.new_max for part in parts)
    total = sum(_exp(part.new_max, total_max) * part.new_sum for part in parts)
    figure = Figure(4.4)
    top = figure.add_axes((0.075, 0.565, 0.905, 0.33))
    bottom = figure.add_axes((0.075, 0.12, 0.905, 0.30))
    for ax in (top, bottom):
        ax.set_xlim(-0.6, len(row) - 0.4)
        ax.set_ylim(0, 1.28)
        ax.set_xticks([])
        ax.set_ylabel("exp(score − max)", fontsize=9.5, color=palette.SOFT_INK)
        plain_axes(ax)
    top.set_title("Summed apart, each part under its own maximum", **_BOLD)
    terms = []
    for index, (part, (begin, end)) in enumerate(zip(parts, pairwise(edges), strict=True)):
        color = palette.request_color(index)
        letter = palette.request_letter(index)
        factor = _exp(part.new_max, total_max)
        for i in range(begin, end):
            for ax, maximum in ((top, part.new_max), (bottom, total_max)):
                ax.add_patch(
                    Rectangle(
                        (i - 0.35, 0), 0.7, _exp(row[i], maximum), facecolor=color, linewidth=0
                    )
                )
        middle = (begin + end - 1) / 2
        text = f"{letter}: max {part.new_max:.1f}, sum {part.new_sum:.2f}"
        top.text(middle, 1.12, text, ha="center", fontsize=10, weight="bold", color=palette.INK)
        bottom.text(
            middle,
            1.5,
            f"× exp({part.new_max:.1f} − {total_max:.1f}) = {factor:.2f}",
            ha="center",
            fontsize=10,
            weight="bold",
            color=palette.RESERVED,
        )
        arrow = {"arrowstyle": "-|>", "color": palette.RESERVED, "linewidth": 1.6}
        bottom.annotate("", (middle, 1.2), (middle, 1.45), arrowprops=arrow, annotation_clip=False)
        terms.append(f"{letter} {part.new_sum:.2f} × {factor:.2f}")
        for ax in (top, bottom):
            if begin:
                ax.axvline(begin - 0.5, color=palette.LINE, linewidth=1)
    bottom.set_xticks(range(len(row)), [_shown(name) for name in names])
    bottom.tick_params(
        axis="x", colors=palette.INK, length=0, labelsize=10 if len(row) <= 14 else 8
    )
    alt = (
        f"Chart: {len(row)} scores in {len(parts)} parts, summed under each part's own maximum, and"
        " below it the same pieces rescaled to the common maximum."
        f" Merged: maximum {total_max:.1f}, sum {' + '.join(terms)} = {total:.2f}."
    )
    describe(figure, alt, "Sums can be added once they have a common maximum.")
    return figure


# --- numbers moved --------------------------------------------------------------------------------


def draw_passes(versions: Mapping[str, Sequence[str]]) -> Figure:
    """Draw how often each version moves a row.

    versions: name -> the purpose of each move, for example ``["read: max", "write"]``.
    """
    figure, ax = prepare(None, 0.75 + 0.55 * len(versions))
    height = figure.get_figheight()
    ax.set_position((0.27, 0.1 / height, 0.71, 1 - 0.6 / height))
    most = max(map(len, versions.values()))
    ax.set_xlim(0, most + 0.55)
    ax.set_ylim(len(versions) - 0.4, -0.6)
    for line, moves in enumerate(versions.values()):
        for i, move in enumerate(moves):
            color = palette.WASTED if move.startswith("write") else palette.USED
            ax.add_patch(
                Rectangle((i + 0.02, line - 0.34), 0.96, 0.68, facecolor=color, linewidth=0)
            )
            ax.text(
                i + 0.5,
                line,
                move,
                ha="center",
                va="center",
                fontsize=9.5,
                color=palette.text_on(color),
            )
        ax.text(
            len(moves) + 0.12, line, f"{len(moves)} × N", va="center", fontsize=11, weight="bold"
        )
    ax.set_yticks(range(len(versions)), versions)
    ax.set_xticks([])
    ax.set_title("How often a row of N numbers goes through memory", **_BOLD)
    plain_axes(ax)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(axis="y", colors=palette.INK, length=0, labelsize=10.5)
    counts = [f"{name}: {len(moves)}" for name, moves in versions.items()]
    alt = (
        f"Chart: the passes over memory of {len(versions)} ways to compute softmax, a box for each"
        f" read and write. Times that a row is read or written: {'; '.join(counts)}."
    )
    fewest = min(versions, key=lambda name: len(versions[name]))
    describe(figure, alt, f"The fewest passes: {fewest}.")
    return figure  # type: ignore[return-value]


# --- Triton's tiles -------------------------------------------------------------------------------


def draw_programs(columns: int, block: int, rows: int | None = None) -> Figure:
    """Draw which program works on which number, and the masked lanes of a tile.

    A lane is masked where the data end. rows None: a vector of `columns` numbers, one program per
    tile. Otherwise a matrix, one program per row, which goes along the row tile by tile.
    """
    tiles = -(-columns // block)
    lines = tiles if rows is None else rows
    width = block if rows is None else tiles * block
    figure, ax = prepare(None, 0.85 + 0.42 * lines)
    height = figure.get_figheight()
    cell = 0.42
    ax.set_position((0.02, 0.35 / height, 0.96, 1 - 0.75 / height))
    ax.set_xlim(0, 0.96 * figure.get_figwidth() / cell)
    ax.set_ylim(lines + 0.05, -0.05)
    ax.set_axis_off()
    left = 4.0
    for line in range(lines):
        color = palette.request_color(line)
        name = f"program_id {line}"
        ax.text(
            left - 0.3, line + 0.5, name, ha="right", va="center", fontsize=10.5, color=palette.INK
        )
        for lane in range(width):
            offset = line * block + lane if rows is None else lane
            tile_gap = 0.0 if rows is None else 0.3 * (lane // block)
            style = {"facecolor": color, "edgecolor": palette.PAPER, "linewidth": 1}
            if offset >= columns:
                style = {
                    "facecolor": palette.FREE,
                    "edgecolor": palette.SOFT_INK,
                    "hatch": palette.HATCH_CACHED,
                }
                style["linewidth"] = 0.5
            ax.add_patch(
                Rectangle((left + lane + tile_gap + 0.04, line + 0.06), 0.92, 0.88, **style)
            )
            on_color = (
                {"color": palette.text_on(color)}
                if offset < columns
                else {"color": palette.INK, "bbox": _LABEL}
            )
            ax.text(
                left + lane + tile_gap + 0.5,
                line + 0.52,
                str(offset),
                ha="center",
                va="center",
                fontsize=9,
                **on_color,
            )
    what = f"{columns} numbers" if rows is None else f"a row of {columns} numbers"
    figure.text(
        0.02,
        1 - 0.25 / height,
        f"Tiles of {block} for {what}",
        fontsize=12,
        weight="bold",
        color=palette.INK,
    )
    masked = (tiles * block - columns) * (1 if rows is None else rows)
    figure.text(
        0.02,
        0.1 / height,
        "Hatched: lanes that the mask switches off.",
        fontsize=9.5,
        color=palette.SOFT_INK,
    )
    if rows is None:
        who = f"{lines} programs of one tile"
        beyond = f"The lanes beyond the end are masked: {masked}"
    else:
        who = f"{rows} programs, one for each row, with {tiles} tiles each"
        beyond = f"The lanes beyond the end of a row are masked: {masked // rows} of each row"
    alt = f"Picture: {who}, a tile {block} lanes wide, with the offset that each lane works on."
    describe(figure, alt, f"{beyond}.")
    return figure  # type: ignore[return-value]


# --- helpers --------------------------------------------------------------------------------------


def _exp(score: float, maximum: float) -> float:
    """exp(score - maximum), and 0 for -inf, where -inf - -inf would be NaN."""
    return 0.0 if score == -math.inf else math.exp(score - maximum)


def _shown(label: str) -> str:
    return label.strip() or "␣"
