"""Pictures of the prefix cache: prompts as a tree of blocks, the life of blocks, hit rates.

The pictures, and what they show:

    draw_prefix_tree(prompts, 16, decode)  # equal beginnings are equal blocks; the tree branches
    draw_block_story(story, step=3)        # owners, reference counts, states and eviction order
    draw_reuse(bars)                       # cached tokens beside computed tokens
    draw_hit_rates(curves)                 # the share of cached tokens, against any quantity
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from minivllm.engine.block_manager import hash_block
from minivllm.viz import palette
from minivllm.viz.figure import WIDTH, Box, describe, plain_axes, prepare

#: Hexadecimal digits of a block's name that pictures show.
DIGITS = 4
_MARGIN = 0.2
_PLAIN = {"lw": 0.8, "edgecolor": palette.SOFT_INK}


def short_name(name: int | str) -> str:
    """The first digits of a 128-bit hash, or the first characters of a name in words."""
    return (name if isinstance(name, str) else f"{name:032x}")[:DIGITS]


# --- prompts as a tree ----------------------------------------------------------------------------


@dataclass
class Node:
    """A block of the tree.

    block_hash: None where the block is not full; such a block is never shared.
    """

    depth: int
    tokens: tuple[int, ...]
    block_hash: int | None
    parent: int | None
    #: Indices of the prompts that contain the block.
    owners: list[int] = field(default_factory=list)


def prefix_tree(prompts: Sequence[Sequence[int]], block_size: int) -> list[Node]:
    """The blocks of prompts (lists of token ids).

    Prompts that are equal up to a block's end share this block.
    """
    nodes: list[Node] = []
    index_of: dict[int, int] = {}
    for owner, prompt in enumerate(prompts):
        parent: int | None = None
        for start in range(0, len(prompt), block_size):
            tokens = tuple(prompt[start : start + block_size])
            name = None
            if len(tokens) == block_size:
                name = hash_block(None if parent is None else nodes[parent].block_hash, tokens)
            index = index_of.get(name) if name is not None else None
            if index is None:
                index = len(nodes)
                nodes.append(Node(start // block_size, tokens, name, parent))
                if name is not None:
                    index_of[name] = index
            nodes[index].owners.append(owner)
            parent = index
    return nodes


def draw_prefix_tree(
    prompts: Sequence[Sequence[int]],
    block_size: int,
    decode: Callable[[Sequence[int]], str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw `prefix_tree`: blocks from left to right, a row per prompt, one box per shared block.

    decode: token ids -> text, special tokens included; without it the boxes show token ids.
    """
    nodes = prefix_tree(prompts, block_size)
    rows = _rows(nodes, len(prompts))
    columns = 1 + max(node.depth for node in nodes)
    height, row_height, top = 0.75 + 1.18 * len(prompts) + 0.3, 1.18, 0.75
    figure, ax = prepare(ax, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    step = (WIDTH - 2 * _MARGIN + 0.22) / max(columns, 4)
    width, box_height = step - 0.22, 0.98
    full = [node for node in nodes if node.block_hash is not None]
    shared = [node for node in full if len(node.owners) > 1]
    ax.text(
        _MARGIN,
        0.22,
        "Prompts as a tree of blocks",
        fontsize=12,
        weight="bold",
        color=palette.INK,
        va="center",
    )
    subtitle = (
        "Each block is named after its tokens and the name before it: equal names, equal"
        " beginnings."
    )
    ax.text(_MARGIN, 0.48, subtitle, fontsize=9.5, color=palette.SOFT_INK, va="center")
    place = [
        (_MARGIN + node.depth * step, top + row_height * rows[i]) for i, node in enumerate(nodes)
    ]
    for i, node in enumerate(nodes):
        x, y = place[i]
        if node.parent is not None:
            from_x, from_y = place[node.parent]
            ends = (from_x + width, from_y + box_height / 2), (x, y + box_height / 2)
            style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": palette.SOFT_INK, "lw": 1.2}
            ax.add_patch(FancyArrowPatch(*ends, shrinkA=0, shrinkB=0, **style))
        _draw_node(ax, node, Box(x, y, width, box_height), decode, block_size)
    _tree_legend(ax, height - 0.14)
    kept, alone = len(nodes), sum(-(-len(prompt) // block_size) for prompt in prompts)
    letters = [palette.request_letter(i) for i in range(len(prompts))]
    depth = len({node.block_hash for node in full if len(node.owners) == len(prompts)})
    alt = (
        f"Picture: {_listed(letters)}, prompts of {_listed([str(len(p)) for p in prompts])} tokens,"
        f" as a tree of blocks of {block_size}. Alone they need {alone} blocks, together {kept}:"
        f" {len(shared)} full blocks are shared, {depth} of them by all."
    )
    describe(
        figure, alt, "The last block of a prompt, if not full, has no name and is never shared."
    )
    return figure


def _rows(nodes: list[Node], num_prompts: int) -> list[float]:
    """The line of each node: its owner's line, or the middle of its owners' lines.

    Prompts that share blocks are neighbours.
    """
    paths: list[list[int]] = [[] for _ in range(num_prompts)]
    for i, node in enumerate(nodes):
        for owner in node.owners:
            paths[owner].append(i)
    line = {
        owner: float(i)
        for i, owner in enumerate(sorted(range(num_prompts), key=lambda owner: paths[owner]))
    }
    return [sum(line[owner] for owner in node.owners) / len(node.owners) for node in nodes]


def _draw_node(
    ax: Axes,
    node: Node,
    box: Box,
    decode: Callable[[Sequence[int]], str] | None,
    block_size: int,
) -> None:
    (x, y), width, height = box.corner, box.width, box.height
    is_full, strip = node.block_hash is not None, 0.2
    edge = {"edgecolor": palette.INK, "lw": 1.8} if len(node.owners) > 1 else _PLAIN
    face = (
        palette.tint(palette.request_color(node.owners[0]), 0.1)
        if len(node.owners) == 1
        else palette.FREE
    )
    ax.add_patch(Rectangle((x, y), width, height, facecolor=face, linewidth=0))
    band = width / len(node.owners)
    for i, owner in enumerate(node.owners):
        color = palette.request_color(owner)
        ax.add_patch(Rectangle((x + i * band, y), band, strip, facecolor=color, linewidth=0))
        ax.text(
            x + (i + 0.5) * band,
            y + strip / 2,
            palette.request_letter(owner),
            fontsize=8.5,
            weight="bold",
            color=palette.text_on(color),
            ha="center",
            va="center_baseline",
        )
    style = {"linestyle": "-" if is_full else (0, (3, 2))}
    ax.add_patch(Rectangle((x, y), width, height, fill=False, **edge, **style))
    name = (
        short_name(node.block_hash) + " …"
        if is_full
        else f"{len(node.tokens)} of {block_size}, no name"
    )
    color = palette.INK if is_full else palette.SOFT_INK
    family = "monospace" if is_full else None
    ax.text(
        x + 0.06,
        y + strip + 0.11,
        name,
        fontsize=8.5,
        weight="bold",
        color=color,
        va="center",
        family=family,
    )
    text = _readable(decode(node.tokens)) if decode else " ".join(map(str, node.tokens))
    lines = textwrap.wrap(text, max(8, round(width / 0.0665)))
    if len(lines) > 4:
        lines = [*lines[:3], lines[3][:-1] + "…"]
    ax.text(
        x + 0.06,
        y + strip + 0.22,
        "\n".join(lines),
        fontsize=7.6,
        color=palette.INK,
        va="top",
        linespacing=1.25,
    )


def _readable(text: str) -> str:
    """Chat markup in fewer characters: «user⏎ … »."""
    for old, new in (("<|im_start|>", "«"), ("<|im_end|>", "»"), ("\n", "⏎ ")):
        text = text.replace(old, new)
    return text.replace("$", r"\$").strip()


def _tree_legend(ax: Axes, y: float) -> None:
    x = _MARGIN
    for text, style in (
        ("shared by several prompts", {"edgecolor": palette.INK, "lw": 1.8}),
        ("full: named, can be shared", _PLAIN),
        ("not full yet", {**_PLAIN, "linestyle": (0, (3, 2))}),
    ):
        ax.add_patch(Rectangle((x, y - 0.08), 0.24, 0.16, facecolor=palette.FREE, **style))
        ax.text(x + 0.32, y, text, fontsize=9, color=palette.SOFT_INK, va="center")
        x += 0.55 + 0.075 * len(text)
    ax.text(
        x, y, "«  »  begin and end of a message", fontsize=9, color=palette.SOFT_INK, va="center"
    )


# --- the life of blocks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """The pool after something happened."""

    text: str
    ref_counts: tuple[int, ...]
    #: Blocks without an owner; the next to be taken comes first.
    free: tuple[int, ...]
    #: Block -> its short name, where the prefix cache knows its content.
    names: dict[int, str]
    #: Letter -> block table.
    tables: dict[str, tuple[int, ...]]

    @property
    def cached(self) -> list[int]:
        """Free blocks whose content is known."""
        return [block for block in self.free if block in self.names]


@dataclass
class BlockStory:
    """Moments in order, for `draw_block_story`.

    With a slider: ``scrub(story, draw_block_story, step=0)``.
    """

    steps: list[Moment] = field(default_factory=list)

    def tell(
        self,
        text: str,
        ref_counts: Sequence[int],
        free: Sequence[int],
        names: Mapping[int, int | str],
        tables: Mapping[str, Sequence[int]],
    ) -> None:
        """Add a moment: the present state of the pool, after the event in `text`.

        names: block -> hash, or a word. A letter keeps its row through the story, by order of first
        appearance, and its colour.
        """
        short = {block: short_name(name) for block, name in names.items()}
        owned = {letter: tuple(table) for letter, table in tables.items()}
        self.steps.append(Moment(text, tuple(ref_counts), tuple(free), short, owned))

    @property
    def letters(self) -> list[str]:
        """All owners in the story, by first appearance."""
        return list(dict.fromkeys(letter for moment in self.steps for letter in moment.tables))


def draw_block_story(story: BlockStory, step: int = -1, ax: Axes | None = None) -> Figure:
    """Draw one moment: the pool with reference counts, the block tables, the eviction order."""
    step = range(len(story.steps))[step]
    moment, letters = story.steps[step], story.letters
    cell = min(0.66, (WIDTH - 2 * _MARGIN - 0.75) / len(moment.ref_counts))
    small = min(0.36, cell)
    pool_y, rows_y = 1.05, 1.05 + cell + 0.72
    queue_y = rows_y + len(letters) * (small + 0.06) + 0.42
    height = queue_y + small + 0.55
    figure, ax = prepare(ax, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    # A story of one moment needs no number.
    number = f"{step} of {len(story.steps) - 1}" if len(story.steps) > 1 else ""
    _say(ax, _MARGIN, 0.24, number, fontsize=12, color=palette.INK, weight="bold")
    x = _MARGIN + (0.15 + 0.1 * len(number) if number else 0.0)
    _say(ax, x, 0.24, moment.text, fontsize=11, color=palette.INK)
    drawing = _StoryDrawing(ax, moment, _colors(letters))
    drawing.pool(pool_y, cell)
    drawing.tables(rows_y, small)
    drawing.queue(queue_y, small)
    _story_legend(ax, height - 0.18)
    describe(
        figure,
        f"Picture: the blocks of a KV cache{f' after event {step}' * bool(number)}:"
        f" {_story_in_words(moment)}",
        (f"Event {step}: " if number else "") + moment.text,
    )
    return figure


def _colors(letters: Sequence[str]) -> dict[str, str]:
    """The colours of the other pictures for A, B, C and so on; for other names by order."""
    alphabet = {palette.request_letter(i): i for i in range(26)}
    if all(letter in alphabet for letter in letters):
        return {letter: palette.request_color(alphabet[letter]) for letter in letters}
    return {letter: palette.request_color(i) for i, letter in enumerate(letters)}


def _say(ax: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Draw text of a story: small, in a quiet colour, its middle at y, unless options differ."""
    style = {"fontsize": 9.5, "color": palette.SOFT_INK, "va": "center"}
    ax.text(x, y, text, **(style | options))


@dataclass(frozen=True)
class _StoryDrawing:
    """The three parts of a moment's picture, each drawn with its top at y."""

    ax: Axes
    moment: Moment
    #: Letter -> colour, of all owners in the story.
    colors: dict[str, str]
    #: Where the blocks begin, on the right of their labels.
    left: float = _MARGIN + 0.75

    def pool(self, y: float, cell: float) -> None:
        """Draw every block with owners and name; its number above, its reference count below."""
        moment, bold = self.moment, {"ha": "center", "weight": "bold"}
        what = "The pool: who uses each block, its name if it has one, and its reference count"
        _say(self.ax, _MARGIN, y - 0.3, what)
        for block, count in enumerate(moment.ref_counts):
            x = self.left + block * cell
            owners = [letter for letter, table in moment.tables.items() if block in table]
            colors = {letter: self.colors[letter] for letter in owners}
            _pool_cell(self.ax, Box(x, y, cell, cell), colors, moment.names.get(block))
            _say(self.ax, x + cell / 2, y - 0.1, str(block), fontsize=8, ha="center")
            count_y = y + cell + 0.12
            _say(self.ax, x + cell / 2, count_y, f"{count}", fontsize=10, color=palette.INK, **bold)
        _say(self.ax, self.left - 0.1, y - 0.1, "block", fontsize=8, ha="right")
        _say(self.ax, self.left - 0.1, y + cell + 0.12, "count", fontsize=8, ha="right")

    def tables(self, y: float, cell: float) -> None:
        """Draw every owner's block table, one row each."""
        _say(self.ax, _MARGIN, y - 0.18, "Block tables")
        for i, letter in enumerate(self.colors):
            self._table(y + i * (cell + 0.06), cell, letter)

    def _table(self, y: float, cell: float, letter: str) -> None:
        table, middle = self.moment.tables.get(letter, ()), y + cell / 2
        bold = {"ha": "center", "weight": "bold"}
        full = self.colors[letter]
        color = full if table else palette.tint(full, 0.3)
        self.ax.add_patch(
            Rectangle((_MARGIN + 0.2, y + 0.05), 0.32, cell - 0.1, facecolor=color, linewidth=0)
        )
        ink = palette.text_on(color)
        _say(self.ax, _MARGIN + 0.36, middle, letter, fontsize=9, color=ink, **bold)
        if not table:
            _say(self.ax, self.left, middle, "holds nothing", fontsize=8.5)
        for position, block in enumerate(table):
            many = self.moment.ref_counts[block] > 1
            edge = {"edgecolor": palette.INK, "lw": 1.8} if many else _PLAIN
            x = self.left + position * (cell + 0.05)
            self.ax.add_patch(Rectangle((x, y), cell, cell, facecolor=full, **edge))
            ink = palette.text_on(full)
            _say(self.ax, x + cell / 2, middle, str(block), fontsize=8.5, color=ink, **bold)

    def queue(self, y: float, cell: float) -> None:
        """Draw the free blocks; the next one to be taken comes first."""
        what = "Free blocks in order of eviction: the next one to be taken comes first"
        _say(self.ax, _MARGIN, y - 0.2, what)
        middle, style = y + cell / 2, {"ha": "center", "bbox": _PAPER_LABEL, "color": palette.INK}
        for position, block in enumerate(self.moment.free):
            x = self.left + position * (cell + 0.05)
            _unused(self.ax, x, y, cell, block in self.moment.names)
            _say(self.ax, x + cell / 2, middle, str(block), fontsize=8.5, **style)
        first = "next →" if self.moment.free else "none"
        _say(self.ax, self.left - 0.1, middle, first, fontsize=8.5, ha="right")


_PAPER_LABEL = {
    "boxstyle": "round,pad=0.12",
    "facecolor": palette.PAPER,
    "edgecolor": "none",
    "alpha": 0.85,
}


def _unused(ax: Axes, x: float, y: float, side: float, cached: bool) -> None:
    style = {"facecolor": palette.FREE, "edgecolor": palette.LINE, "lw": 0.7}
    if cached:
        style = {
            "facecolor": palette.CACHED,
            "edgecolor": palette.SOFT_INK,
            "lw": 0.5,
            "hatch": palette.HATCH_CACHED,
        }
    ax.add_patch(Rectangle((x, y), side, side, **style))


def _pool_cell(ax: Axes, box: Box, owners: Mapping[str, str], name: str | None) -> None:
    """Draw a block of the pool.

    owners: letter -> colour. name: its short name if the prefix cache knows its content.
    """
    side, left, y = box.width * 0.92, box.x + box.width * 0.04, box.y
    if owners:
        band = side / len(owners)
        for i, color in enumerate(owners.values()):
            ax.add_patch(Rectangle((left, y + i * band), side, band, facecolor=color, linewidth=0))
        edge = {"edgecolor": palette.INK, "lw": 1.8} if len(owners) > 1 else _PLAIN
        ax.add_patch(Rectangle((left, y), side, side, fill=False, **edge))
    else:
        _unused(ax, left, y, side, cached=name is not None)
    middle = box.center[0]
    style = {"ha": "center", "va": "center", "bbox": _PAPER_LABEL, "color": palette.INK}
    letters = "".join(owners) if len(owners) <= 3 else f"×{len(owners)}"
    if owners:
        ax.text(middle, y + side * 0.28, letters, fontsize=8.5, weight="bold", **style)
    if name:
        ax.text(
            middle,
            y + side * (0.7 if owners else 0.5),
            name,
            fontsize=7.5,
            family="monospace",
            **style,
        )


def _story_legend(ax: Axes, y: float) -> None:
    x = _MARGIN
    for kind in ("used", "shared", "cached: free, content known", "empty: free, nothing known"):
        if kind in ("used", "shared"):
            edge = {"edgecolor": palette.INK, "lw": 1.8} if kind == "shared" else _PLAIN
            # Grey, because every colour means a request; pale, so that the frame can be seen.
            face = palette.tint(palette.SOFT_INK, 0.5)
            ax.add_patch(Rectangle((x, y - 0.1), 0.2, 0.2, facecolor=face, **edge))
        else:
            _unused(ax, x, y - 0.1, 0.2, kind.startswith("cached"))
        ax.text(x + 0.28, y, kind, fontsize=9, color=palette.SOFT_INK, va="center")
        x += 0.62 + 0.075 * len(kind)


def _story_in_words(moment: Moment) -> str:
    used = sum(count > 0 for count in moment.ref_counts)
    shared = [str(block) for block, count in enumerate(moment.ref_counts) if count > 1]
    cached = moment.cached
    text = f"{moment.text} {used} blocks used"
    text += f", {len(shared)} of them shared ({_listed(shared)})" if shared else ", none shared"
    text += f"; {len(cached)} cached, {len(moment.free) - len(cached)} empty."
    return text + (
        f" Next to be taken: {_listed([str(b) for b in moment.free[:3]])}." if moment.free else ""
    )


# --- how often it hits ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One bar of `draw_reuse`: cached tokens, and tokens that were computed."""

    label: str
    again: int
    new: int

    @property
    def share(self) -> float:
        """The share of cached tokens, 0 to 1."""
        return self.again / max(1, self.again + self.new)


def draw_reuse(
    bars: Sequence[Bar],
    *,
    title: str,
    names: tuple[str, str] = ("read before", "new"),
    ylabel: str = "prompt tokens",
    ax: Axes | None = None,
) -> Figure:
    """Draw stacked bars, with the cached share above each.

    `names[0]` counts `again`, hatched, and `names[1]` counts `new`.
    """
    figure, ax, is_own = *prepare(ax, 3.4), ax is None
    if is_own:
        ax.set_position((0.085, 0.14, 0.7, 0.72))
    x = range(len(bars))
    again, new = [bar.again for bar in bars], [bar.new for bar in bars]
    ax.bar(
        x,
        new,
        0.62,
        bottom=again,
        color=palette.USED,
        label=names[1],
        edgecolor=palette.PAPER,
        linewidth=0.8,
    )
    ax.bar(
        x,
        again,
        0.62,
        color=palette.CACHED,
        hatch=palette.HATCH_CACHED,
        edgecolor=palette.SOFT_INK,
        linewidth=0.5,
        label=names[0],
    )
    for i, bar in enumerate(bars):
        text = f"{round(100 * bar.share)} %"
        ax.annotate(
            text,
            (i, bar.again + bar.new),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
            weight="bold",
            color=palette.INK,
        )
    ax.set_xticks(list(x), [bar.label for bar in bars])
    ax.set_ylim(0, 1.14 * max(a + n for a, n in zip(again, new, strict=True)))
    ax.set_ylabel(ylabel, fontsize=9.5, color=palette.SOFT_INK)
    _style(ax, title)
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1.02, 0.55),
        frameon=False,
        fontsize=9.5,
        labelcolor=palette.INK,
    )
    total = Bar("", sum(again), sum(new))
    shares = "; ".join(f"{bar.label}: {bar.again:,} of {bar.again + bar.new:,}" for bar in bars)
    what = names[0].capitalize()
    alt = (
        f"Chart: {title[0].lower()}{title[1:]}. {what}: {shares}; in all {total.again:,} of"
        f" {total.again + total.new:,}."
    )
    best = max(bars, key=lambda bar: bar.share)
    describe(figure, alt, f"{what}: the largest share in “{best.label}”.")
    return figure


_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D")


def draw_hit_rates(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
    limit: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw hit rates (0 to 1) as lines.

    limit: the rate that no policy can exceed, as a dotted line.
    """
    figure, ax, is_own = *prepare(ax, 3.6), ax is None
    if is_own:
        ax.set_position((0.085, 0.145, 0.66, 0.72))
    for i, (name, points) in enumerate(curves.items()):
        xs, ys = [x for x, _ in points], [100 * y for _, y in points]
        style = {"linestyle": _LINES[i % 4], "marker": _MARKERS[i % 4], "markersize": 4.5}
        ax.plot(xs, ys, color=palette.request_color(i), lw=2, label=name, zorder=9 - i, **style)
    if limit is not None:
        ax.axhline(100 * limit, color=palette.SOFT_INK, linewidth=1.2, linestyle=(0, (1, 2)))
        text = f"with a pool without end: {round(100 * limit)} %"
        ax.text(
            0.01,
            100 * limit + 1.5,
            text,
            fontsize=9,
            color=palette.SOFT_INK,
            transform=ax.get_yaxis_transform(),
        )
    ax.set_ylim(-3, 104)
    ax.set_xlabel(xlabel, fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel("hit rate (%)", fontsize=9.5, color=palette.SOFT_INK)
    _style(ax, title)
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1.02, 0.55),
        frameon=False,
        fontsize=9.5,
        labelcolor=palette.INK,
        handlelength=3.2,
    )
    parts = []
    for name, points in curves.items():
        (x0, y0), (x1, y1) = points[0], points[-1]
        parts.append(f"{name}: from {round(100 * y0)} % at {x0:g} to {round(100 * y1)} % at {x1:g}")
    alt = f"Chart: {title[0].lower()}{title[1:]}, against {xlabel}. {'; '.join(parts)}."
    best = max(curves, key=lambda name: sum(y for _, y in curves[name]))
    caption = f"“{best}” is the best of them." + (
        f" No policy can exceed {round(100 * limit)} %, the dotted line."
        if limit is not None
        else ""
    )
    describe(figure, alt, caption)
    return figure


def _style(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, weight="bold", color=palette.INK)
    plain_axes(ax)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


__all__ = [
    "Bar",
    "BlockStory",
    "Moment",
    "Node",
    "draw_block_story",
    "draw_hit_rates",
    "draw_prefix_tree",
    "draw_reuse",
    "prefix_tree",
    "short_name",
]
