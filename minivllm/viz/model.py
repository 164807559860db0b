"""Pictures of the model: a block, rotating pairs, the residual stream, parameters and FLOPs.

`Rotation` is what RoPE does to one query and one key while both move through a text (Su et al.
2021, arXiv 2104.09864); with a slider: ``scrub(rotation, draw_rotation, step=0)``. All take plain
numbers; torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle, Wedge

from minivllm.config import ModelConfig
from minivllm.viz import palette
from minivllm.viz.figure import Figure, describe

QUERY, KEY = palette.REQUESTS[0], palette.REQUESTS[3]
#: Kinds of parameters, in the order in which a token meets them.
PARTS = {
    "embedding": palette.REQUESTS[6],
    "attention": palette.REQUESTS[0],
    "MLP": palette.REQUESTS[1],
    "head": palette.REQUESTS[2],
}
SCORES = palette.REQUESTS[3]
_TITLE = {"fontsize": 12, "weight": "bold", "color": palette.INK}

Pair = tuple[float, float]


# --- rotary positions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """A query and a key that stand `distance` tokens apart, at several positions.

    For `draw_rotation`. query, key: the two numbers of each pair, before the rotation. names: the
    names of the pairs. frequencies: radians per position of each. steps: positions of the query.
    head_dim: the numbers of the whole head. whole_score: the score over all of its pairs.
    """

    query: tuple[Pair, ...]
    key: tuple[Pair, ...]
    names: tuple[int, ...]
    frequencies: tuple[float, ...]
    distance: int
    steps: tuple[int, ...]
    head_dim: int
    whole_score: float

    def turned(self, step: int) -> list[tuple[Pair, Pair]]:
        """(query, key) of each pair, rotated according to their positions."""
        position = self.steps[step]
        return [
            (turn(q, position * frequency), turn(k, (position - self.distance) * frequency))
            for q, k, frequency in zip(self.query, self.key, self.frequencies, strict=True)
        ]

    def score(self, step: int) -> float:
        """What these pairs add to the score: their dot product, divided by √head_dim."""
        return _score(self.turned(step), self.head_dim)


def _score(hands: Sequence[tuple[Pair, Pair]], head_dim: int) -> float:
    return sum(q[0] * k[0] + q[1] * k[1] for q, k in hands) / math.sqrt(head_dim)


def turn(pair: Pair, angle: float) -> Pair:
    """Rotate a point in the plane counterclockwise by an angle in radians."""
    a, b = pair
    return a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)


def rotation(
    query: Sequence[float],
    key: Sequence[float],
    frequencies: Sequence[float],
    distance: int,
    pairs: Sequence[int] | None = None,
    positions: Sequence[int] = range(64),
) -> Rotation:
    """The rotation of a head.

    query, key: the D numbers of the head; i and i + D/2 are a pair. frequencies: D/2, in radians
    per position. pairs: which to draw, at most six; None spreads five over the head. ValueError for
    lengths that do not fit, or for no position.
    """
    half = len(frequencies)
    chosen = [round(i * (half - 1) / 4) for i in range(5)] if pairs is None else list(pairs)
    if len(query) != 2 * half or len(key) != 2 * half or not positions or not 1 <= len(chosen) <= 6:
        raise ValueError(
            f"A query of {len(query)}, a key of {len(key)}, {half} frequencies, {len(chosen)}"
            f" pairs, {len(positions)} positions: there is nothing to draw."
        )
    q, k = ([(float(x[i]), float(x[i + half])) for i in range(half)] for x in (query, key))
    # Only the distance counts, so the key may stand at position 0.
    hands = [(turn(a, distance * float(f)), b) for a, b, f in zip(q, k, frequencies, strict=True)]
    return Rotation(
        tuple(q[i] for i in chosen),
        tuple(k[i] for i in chosen),
        tuple(chosen),
        tuple(float(frequencies[i]) for i in chosen),
        distance,
        tuple(positions),
        head_dim=2 * half,
        whole_score=_score(hands, 2 * half),
    )


def draw_rotation(rotation: Rotation, step: int = 0) -> Figure:
    """Draw a dial for each pair, with the rotated hands of the query and of the key.

    The angle between the hands is shaded. step: index into rotation.steps; IndexError where there
    is no such step.
    """
    if not 0 <= step < len(rotation.steps):
        raise IndexError(
            f"There is no step {step}: the rotation has steps 0 to {len(rotation.steps) - 1}."
        )
    position, hands = rotation.steps[step], rotation.turned(step)
    figure = Figure(3.15)
    count = len(hands)
    for i, (q, k) in enumerate(hands):
        ax = figure.add_axes((0.01 + i * 0.98 / count, 0.14, 0.96 / count, 0.62))
        _dial(ax, q, k)
        every = 2 * math.pi / rotation.frequencies[i]
        ax.set_title(
            f"pair {rotation.names[i]}\na turn in {_count(every)} tokens",
            fontsize=10,
            color=palette.INK,
        )
        ax.text(
            0,
            -1.32,
            f"between: {_between(q, k)}°",
            ha="center",
            va="center",
            fontsize=10,
            color=palette.INK,
        )
    what = f"Query at position {position}, key at {position - rotation.distance}"
    figure.text(0.012, 0.945, what, va="center", **_TITLE)
    for x, color, name in ((0.74, QUERY, "query"), (0.84, KEY, "key")):
        figure.text(x, 0.945, f"→ {name}", color=color, fontsize=11.5, weight="bold", va="center")
    scores = (
        f"These {count} pairs add {rotation.score(step):.1f} to the score. All"
        f" {rotation.head_dim // 2} pairs together: {rotation.whole_score:.1f}."
    )
    figure.text(0.012, 0.035, scores, fontsize=11, color=palette.INK)
    angles = ", ".join(
        f"pair {n}: {_between(q, k)}°" for n, (q, k) in zip(rotation.names, hands, strict=True)
    )
    describe(
        figure,
        f"Picture: {count} dials, one a pair of numbers, each with a hand for a query and a hand"
        f" for a key. {what}. Angle between them: {angles}. {scores}",
        f"{what}: the distance alone decides the score.",
    )
    return figure


def _dial(ax: Axes, query: Pair, key: Pair) -> None:
    ax.set_xlim(-1.25, 1.25)
    ax.set_ylim(-1.45, 1.15)
    ax.set_aspect("equal")
    ax.axis("off")
    ax.add_patch(Circle((0, 0), 1, facecolor=palette.FREE, edgecolor=palette.LINE, linewidth=1.2))
    from_key, to_query = (math.degrees(math.atan2(b, a)) for a, b in (key, query))
    if (to_query - from_key) % 360 > 180:
        from_key, to_query = to_query, from_key
    ax.add_patch(Wedge((0, 0), 0.42, from_key, to_query, facecolor=palette.CACHED, linewidth=0))
    longest = max(math.hypot(*query), math.hypot(*key)) or 1.0
    for (a, b), color in ((key, KEY), (query, QUERY)):
        style = {
            "arrowstyle": "-|>",
            "mutation_scale": 15,
            "color": color,
            "linewidth": 2.6,
            "shrinkA": 0,
        }
        ax.add_patch(FancyArrowPatch((0, 0), (a / longest, b / longest), shrinkB=0, **style))


def _between(query: Pair, key: Pair) -> int:
    """The angle between the two in degrees, 0 to 180."""
    angle = round(math.degrees(math.atan2(query[1], query[0]) - math.atan2(key[1], key[0]))) % 360
    return min(angle, 360 - angle)


def _count(number: float) -> str:
    return f"{number:,.1f}" if number < 100 else f"{number:,.0f}"


def draw_pairings(head_dim: int, pairings: Mapping[str, Sequence[tuple[int, int]]]) -> Figure:
    """Draw which numbers of a head rotate together: a row per pairing, an arc per pair.

    pairings: name -> pairs of indices. ValueError where a number is in no pair, or in two.
    """
    figure = Figure(1.55 * len(pairings) + 0.1)
    said = []
    for row, (name, pairs) in enumerate(pairings.items()):
        if sorted(i for pair in pairs for i in pair) != list(range(head_dim)):
            raise ValueError(
                f"{name}: {list(pairs)} are not pairs of the numbers 0 to {head_dim - 1}."
            )
        ax = figure.add_axes((0.01, 1 - (row + 1) / len(pairings), 0.98, 0.98 / len(pairings)))
        ax.set_xlim(-4.2, head_dim - 0.3)
        ax.set_ylim(-0.75, 1.75)
        ax.axis("off")
        ax.text(-4.1, 0, name, va="center", **_TITLE)
        for color, (first, second) in enumerate(pairs):
            shade = palette.request_color(color)
            middle, half = (first + second) / 2, (second - first) / 2
            xs = [middle + half * math.cos(math.pi * t / 40) for t in range(41)]
            height = 0.35 + 1.15 * half / (head_dim / 2)
            ax.plot(
                xs,
                [0.42 + height * math.sin(math.pi * t / 40) for t in range(41)],
                color=shade,
                linewidth=2.2,
            )
            for i in (first, second):
                ax.add_patch(Rectangle((i - 0.42, -0.42), 0.84, 0.84, facecolor=shade, linewidth=0))
                ax.text(
                    i,
                    0,
                    f"x{i}",
                    ha="center",
                    va="center",
                    fontsize=11,
                    color=palette.text_on(shade),
                )
        said.append(f"{name}: " + ", ".join(f"{a} with {b}" for a, b in pairs))
    alt = (
        f"Picture: {len(pairings)} ways to pair the {head_dim} numbers of a head."
        f" {'; '.join(said)}."
    )
    describe(figure, alt, "Numbers that an arc joins turn together.")
    return figure


# --- the block and its stream ---------------------------------------------------------------------


def draw_block(config: ModelConfig) -> Figure:
    """Draw one decoder block: the stream as a band, and the two branches.

    Each branch reads the stream, computes, and adds its result to the stream. Every box gives its
    output size: the numbers per token.
    """
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, wide = config.hidden_size, config.intermediate_size
    figure = Figure(3.5)
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 39)
    ax.axis("off")
    ax.add_patch(Rectangle((1, 5), 94, 4, facecolor=palette.tint(palette.USED, 0.28), linewidth=0))
    ax.add_patch(
        FancyArrowPatch((93, 7), (99.4, 7), arrowstyle="-|>", mutation_scale=24, color=palette.USED)
    )
    ax.text(
        2,
        7,
        f"residual stream: {hidden} numbers per token",
        va="center",
        fontsize=11,
        color=palette.INK,
    )
    qk = f"{heads} + {kv_heads} heads of {dim}"
    attention = [
        ("norm", f"{hidden}", palette.CACHED),
        ("q, k, v", f"{(heads + 2 * kv_heads) * dim}", PARTS["attention"]),
        ("QK-norm" if config.qk_norm else "", qk, palette.CACHED),
        ("RoPE", qk, palette.CACHED),
        ("attend", f"{heads} × {dim}", SCORES),
        ("output", f"{hidden}", PARTS["attention"]),
    ]
    mlp = [
        ("norm", f"{hidden}", palette.CACHED),
        ("gate, up", f"2 × {wide}", PARTS["MLP"]),
        ("silu · up", f"{wide}", palette.CACHED),
        ("down", f"{hidden}", PARTS["MLP"]),
    ]
    _branch(ax, [box for box in attention if box[0]], 2, 58, "attention: looks at other tokens")
    _branch(ax, mlp, 59.5, 96.5, "MLP: each token for itself")
    describe(
        figure,
        "Picture: a decoder block, with the residual stream as a band and two branches that read it"
        f" and add to it. The stream has {hidden} numbers per token. Attention branch: "
        + ", ".join(f"{name} ({size})" for name, size, _ in attention if name)
        + ". MLP branch: "
        + ", ".join(f"{name} ({size})" for name, size, _ in mlp)
        + ".",
        "Each branch reads the stream and adds its result to it. Nothing else changes the stream.",
    )
    return figure


def _branch(
    ax: Axes, boxes: Sequence[tuple[str, str, str]], left: float, right: float, title: str
) -> None:
    ax.text((left + right) / 2, 35, title, ha="center", va="center", **_TITLE)
    width = (right - left) / len(boxes)
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": palette.SOFT_INK, "linewidth": 1.6}
    for i, (name, size, color) in enumerate(boxes):
        x = left + i * width
        shape = FancyBboxPatch(
            (x + 0.7, 18),
            width - 2.6,
            9,
            boxstyle="round,pad=0,rounding_size=0.8",
            linewidth=0,
            facecolor=color,
        )
        ax.add_patch(shape)
        center = x + width / 2 - 0.6
        ax.text(
            center, 22.5, name, ha="center", va="center", fontsize=8.8, color=palette.text_on(color)
        )
        ax.text(
            center,
            29.4,
            size.replace(" heads", "\nheads"),
            ha="center",
            va="center",
            fontsize=8.2,
            color=palette.SOFT_INK,
            linespacing=1.1,
        )
        if i:
            ax.add_patch(
                FancyArrowPatch((x - 1.7, 22.5), (x + 0.8, 22.5), shrinkA=0, shrinkB=0, **style)
            )
    first, last = left + width / 2 - 0.6, right - width / 2 - 0.6
    ax.add_patch(FancyArrowPatch((first, 9), (first, 18), shrinkA=0, shrinkB=0, **style))
    ax.add_patch(FancyArrowPatch((last, 18), (last, 9.6), shrinkA=0, shrinkB=0, **style))
    ax.add_patch(
        Circle(
            (last, 7), 1.6, facecolor=palette.PAPER, edgecolor=palette.INK, linewidth=1.4, zorder=3
        )
    )
    ax.text(last, 6.95, "+", ha="center", va="center", fontsize=13, color=palette.INK, zorder=4)


def draw_stream(
    sizes: Sequence[float], labels: Sequence[str], found: Sequence[float] | None = None
) -> Figure:
    """Draw the size of the residual stream at the start and after each half of a block.

    The size is a root mean square, drawn as columns. labels: a word for each. found: sizes that
    another model found there, as crosses. ValueError for lengths that do not fit, or for nothing.
    """
    if not sizes or len(labels) != len(sizes) or (found is not None and len(found) != len(sizes)):
        raise ValueError(f"{len(sizes)} sizes, {len(labels)} labels: there is nothing to draw.")
    figure = Figure(3.4)
    ax = figure.add_axes((0.065, 0.2, 0.925, 0.68))
    others = [x for x in found or () if math.isfinite(x)]
    top = max([*sizes, *others])
    for i, (size, label) in enumerate(zip(sizes, labels, strict=True)):
        part = (
            "MLP"
            if label.startswith("MLP")
            else "attention"
            if label.startswith("att")
            else "embedding"
        )
        ax.add_patch(Rectangle((i - 0.36, 0), 0.72, size, facecolor=PARTS[part], linewidth=0))
        if found is None:
            ax.text(
                i,
                size + 0.015 * top,
                f"{size:.1f}",
                ha="center",
                va="bottom",
                fontsize=9.5,
                color=palette.INK,
            )
    ax.set_xlim(-0.6, len(sizes) - 0.4)
    ax.set_ylim(0, 1.14 * top)
    ax.set_xticks(range(len(sizes)), [label.replace(" ", "\n") for label in labels])
    ax.set_ylabel("size of the stream", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_title("The residual stream, as it grows", loc="left", **_TITLE)
    ax.tick_params(axis="both", colors=palette.INK, length=0, labelsize=9.5)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(palette.LINE)
    largest = labels[max(range(len(sizes)), key=sizes.__getitem__)]
    caption = f"The stream is largest at {largest}."
    if found is not None:
        ax.plot(range(len(found)), found, "x", color=palette.INK, markersize=9, markeredgewidth=2.4)
        caption = _where_they_part(sizes, labels, found)
    alt = (
        f"Chart: the size of the residual stream at {len(sizes)} places, {labels[0]}"
        f" {sizes[0]:.1f}, in the end {sizes[-1]:.1f}."
    )
    describe(figure, alt, caption)
    return figure


def _where_they_part(sizes: Sequence[float], labels: Sequence[str], found: Sequence[float]) -> str:
    apart = [
        i
        for i, (a, b) in enumerate(zip(sizes, found, strict=True))
        if not math.isclose(a, b, rel_tol=0.002)
    ]
    if not apart:
        return "The crosses, sizes found by another model, agree."
    i = apart[0]
    return (
        f"The crosses, sizes found by another model, leave the columns at {labels[i]}:"
        f" {found[i]:.1f} for {sizes[i]:.1f}; in the end {found[-1]:.1f} for {sizes[-1]:.1f}."
    )


def draw_lens(words: Sequence[str], rows: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """Draw the head's prediction from the stream at each stage, as a table of words.

    words: the input, one column per word. rows: stage -> (best next word, its probability) for each
    column; the last stage is the model's answer. Greener is more certain. A frame marks the stage
    from which a column keeps its final word. ValueError for rows that do not fit.
    """
    stages, columns = list(rows), len(words)
    if not stages or not columns or any(len(row) != columns for row in rows.values()):
        raise ValueError(
            f"{columns} words and {len(stages)} rows that do not fit: there is nothing to draw."
        )
    figure = Figure(0.42 * (len(stages) + 1) + 0.2)
    ax = figure.add_axes((0.005, 0.01, 0.99, 0.98))
    left = 1.5
    ax.set_xlim(-left, columns)
    ax.set_ylim(len(stages) + 0.05, -1.05)
    ax.axis("off")
    ax.text(-left + 0.05, -0.5, "reads", va="center", **_TITLE)
    for j, word in enumerate(words):
        ax.text(
            j + 0.5,
            -0.5,
            _word(word),
            ha="center",
            va="center",
            fontsize=10,
            weight="bold",
            color=palette.INK,
        )
    settled = [_settled([rows[stage][j][0] for stage in stages]) for j in range(columns)]
    for i, stage in enumerate(stages):
        ax.text(-left + 0.05, i + 0.5, stage, va="center", fontsize=10, color=palette.SOFT_INK)
        for j, (word, p) in enumerate(rows[stage]):
            shade = palette.tint(palette.REQUESTS[2], 0.06 + 0.72 * p)
            final = i >= settled[j]
            edge = (
                {"edgecolor": palette.INK, "linewidth": 1.3, "zorder": 2}
                if final
                else {"linewidth": 0}
            )
            ax.add_patch(Rectangle((j + 0.03, i + 0.06), 0.94, 0.88, facecolor=shade, **edge))
            ax.text(
                j + 0.5,
                i + 0.5,
                _word(word),
                ha="center",
                va="center",
                fontsize=9.3,
                zorder=3,
                color=palette.text_on(shade),
            )
    ends = ", ".join(
        f"{_word(word)} → {_word(rows[stages[-1]][j][0])}" for j, word in enumerate(words)
    )
    middle = sorted(settled)[columns // 2]
    describe(
        figure,
        f"Picture: the best next word at {len(stages)} stages of the stream, for each of {columns}"
        f" words. In the end: {ends}.",
        "A framed word is already the final one. Half of the columns have found theirs by the stage"
        f" “{stages[middle]}”.",
    )
    return figure


def _settled(column: Sequence[str]) -> int:
    """The first stage from which the column keeps its final word."""
    last = len(column) - 1
    while last and column[last - 1] == column[-1]:
        last -= 1
    return last


def _word(word: str) -> str:
    text = word.strip().replace("\n", "⏎") or "␣"
    return text if len(text) <= 9 else f"{text[:8]}…"


# --- where the numbers are ------------------------------------------------------------------------


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of the matrices by `PARTS`, and of all norms and biases together.

    A tied head has no parameters of its own.
    """
    hidden, layers, dim = config.hidden_size, config.num_hidden_layers, config.head_dim
    q = config.num_attention_heads * dim
    kv = config.num_key_value_heads * dim
    wide = config.intermediate_size
    norms = 2 * hidden + (2 * dim if config.qk_norm else 0)
    biases = (
        (q + 2 * kv) * config.qkv_bias
        + hidden * config.o_bias
        + (2 * wide + hidden) * config.mlp_bias
    )
    return {
        "embedding": config.vocab_size * hidden,
        "attention": layers * hidden * (2 * q + 2 * kv),
        "MLP": layers * 3 * hidden * wide,
        "head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
        "norms and biases": layers * (norms + biases) + hidden,
    }


def count_flops(config: ModelConfig, context: int) -> dict[str, int]:
    """Count the FLOPs of one token in matrix products, in a context of this length.

    The context includes the token. A multiplication and an addition are two FLOPs. Looking up a row
    of the embedding costs none.
    """
    counts = count_parameters(config)
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    head = 2 * config.vocab_size * config.hidden_size
    return {
        "attention": 2 * counts["attention"],
        "MLP": 2 * counts["MLP"],
        "head": head,
        "q·k and weights·v": scores,
    }


def draw_parameters(models: Mapping[str, ModelConfig]) -> Figure:
    """Draw where the parameters of some models are: one bar per model.

    All bars have the same length; their parts are to scale.
    """
    figure = Figure(0.62 * len(models) + 0.85)
    counts = {name: count_parameters(config) for name, config in models.items()}
    captions = _bars(
        figure, counts, lambda total: f"{_short(total)} parameters", "Where the parameters are"
    )
    describe(
        figure,
        f"Chart: shares of the parameters of {len(models)} models. {' '.join(captions)}",
        "All bars have the same length, whatever the size of the model.",
    )
    return figure


def draw_flops(config: ModelConfig, contexts: Sequence[int]) -> Figure:
    """Draw where the FLOPs of one token go: one bar per context length.

    All bars have the same length.
    """
    figure = Figure(0.62 * len(contexts) + 0.85)
    counts = {
        f"{context:,} token{'s' * (context > 1)}": count_flops(config, context)
        for context in contexts
    }
    captions = _bars(
        figure, counts, lambda total: f"{_short(total)}FLOP", "Where the FLOPs of a token go"
    )
    describe(
        figure,
        f"Chart: shares of the FLOPs of one token at {len(contexts)} lengths of context."
        f" {' '.join(captions)}",
        "All bars have the same length, whatever the length of the context.",
    )
    return figure


def _bars(
    figure: Figure, rows: Mapping[str, Mapping[str, int]], total: object, title: str
) -> list[str]:
    colors = {**PARTS, "q·k and weights·v": SCORES}
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.set_xlim(0, 100)
    ax.set_ylim(len(rows) + 0.15, -1.2)
    ax.axis("off")
    ax.text(1, -0.8, title, va="center", **_TITLE)
    shown = [part for part in colors if any(part in row and row[part] for row in rows.values())]
    x = 48.0
    for part in shown:
        ax.add_patch(Rectangle((x, -0.98), 2, 0.36, facecolor=colors[part], linewidth=0))
        ax.text(x + 2.6, -0.8, part, va="center", fontsize=10, color=palette.INK)
        x += 5.2 + 1.15 * len(part)
    captions, left, width = [], 25.0, 74.0
    for i, (name, row) in enumerate(rows.items()):
        whole = sum(row.values())
        ax.text(1, i + 0.27, name, va="center", fontsize=10.5, weight="bold", color=palette.INK)
        ax.text(1, i + 0.67, total(whole), va="center", fontsize=9.5, color=palette.SOFT_INK)  # type: ignore[operator]
        x, parts = left, []
        for part in shown:
            share = row.get(part, 0) / whole
            if share < 0.005:
                continue
            ax.add_patch(
                Rectangle((x, i + 0.08), width * share, 0.76, facecolor=colors[part], linewidth=0)
            )
            if share > 0.05:
                ax.text(
                    x + width * share / 2,
                    i + 0.46,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=10.5,
                    color=palette.text_on(colors[part]),
                )
            parts.append(f"{part} {share:.0%}")
            x += width * share
        captions.append(f"{name}: {total(whole)}, {', '.join(parts)}.")  # type: ignore[operator]
    return captions


def _short(number: float) -> str:
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f} "
