"""Pictures of several engines behind one router: the fleet, where turns went, what each engine did,
its steps, and what a death does.

All take plain numbers. Times are in seconds. An engine has the colour and the letter of its number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from minivllm.viz import palette
from minivllm.viz.figure import Figure, describe, plain_axes, side_legend

_BOLD = {"fontsize": 12, "weight": "bold", "color": palette.INK}
_SOFT = {"fontsize": 9.5, "color": palette.SOFT_INK}
_MIDDLE = {"ha": "center", "va": "center"}
_CACHED = {
    "facecolor": palette.CACHED,
    "hatch": palette.HATCH_CACHED,
    "edgecolor": palette.SOFT_INK,
    "linewidth": 0.5,
}
#: Steps that compute prompts, prompts and decodes, and decodes only.
_KINDS = {
    "prompts only": palette.REQUESTS[1],
    "prompts and decodes": palette.REQUESTS[3],
    "decodes only": palette.REQUESTS[0],
}


def _color(engine: int) -> str:
    return palette.request_color(engine)


# --- the fleet ------------------------------------------------------------------------------------


def draw_router() -> Figure:
    """Draw what a fleet is made of: people, one address, a router, and engines with caches."""
    figure = Figure(3.3)
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, 100), ylim=(0, 37))
    ax.set_axis_off()
    ax.text(1.5, 34, "One address, several engines", va="center", **_BOLD)
    for y in (10, 16, 22):
        _arrow(ax, (12, y), (21, 16))
    ax.text(6, 16, "people", **_MIDDLE, **_SOFT)
    _frame(ax, (21, 8, 14, 16), palette.INK)
    ax.text(28, 18.5, "the front", **_MIDDLE, **_BOLD)
    ax.text(28, 13, "checks,\nencodes", **_MIDDLE, **_SOFT)
    _frame(ax, (41, 8, 14, 16), palette.INK)
    ax.text(48, 18.5, "the router", **_MIDDLE, **_BOLD)
    ax.text(48, 13, "chooses\none engine", **_MIDDLE, **_SOFT)
    _arrow(ax, (35, 16), (41, 16))
    for i, y in enumerate((24, 13, 2)):
        _arrow(ax, (55, 16), (68, y + 5.6))
        _arrow(ax, (68, y + 2.2), (55, 12.5 - i), dashed=True)
        _frame(ax, (68, y, 30, 8.5), _color(i))
        ax.text(70, y + 5.9, f"engine {palette.request_letter(i)}", va="center", **_BOLD)
        ax.text(96, y + 5.9, "KV cache", va="center", ha="right", **_SOFT)
        for block in range(10):
            look = _CACHED if block < 7 - 2 * i else {"facecolor": "none", "edgecolor": _color(i)}
            ax.add_patch(Rectangle((70 + 2.6 * block, y + 1.2), 2.2, 2.2, **look))
    ax.text(61.5, 29.5, "a request", **_MIDDLE, **_SOFT)
    ax.text(57, 3.4, "what it has cached,\nnow and then", **_MIDDLE, **_SOFT)
    describe(
        figure,
        "Picture: people send requests to one front, a router chooses one of three engines for"
        " each, and the engines say now and then which blocks they have cached.",
        "Each engine has a scheduler, a KV cache and a queue of its own.",
    )
    return figure


def _frame(ax: Axes, place: tuple[float, float, float, float], color: str) -> None:
    x, y, width, height = place
    look = {"boxstyle": "round,pad=0,rounding_size=1.2", "fill": False, "linewidth": 2}
    ax.add_patch(FancyBboxPatch((x, y), width, height, edgecolor=color, **look))


def _arrow(
    ax: Axes, tail: tuple[float, float], head: tuple[float, float], *, dashed: bool = False
) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "color": palette.SOFT_INK}
    style = (0, (3, 2)) if dashed else "-"
    ax.add_patch(FancyArrowPatch(tail, head, linestyle=style, linewidth=1.3, **look))


# --- turns ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation: the engine that answered it, and its prompt, in tokens."""

    engine: int
    prompt: int
    cached: int


def draw_turns(runs: Mapping[str, Sequence[Sequence[Turn]]], title: str) -> Figure:
    """Draw which engine got each turn, and how much of its prompt that engine knew.

    runs: name -> conversations, each a list of turns. Every box is one prompt. ValueError where
    there is nothing to draw.
    """
    if not runs or not all(talks and all(talks) for talks in runs.values()):
        raise ValueError("no turns to draw")
    rows = max(map(len, runs.values()))
    columns = max(len(talk) for talks in runs.values() for talk in talks)
    height = 1.35 + 0.24 * rows
    figure = Figure(height)
    width = 0.94 / len(runs)
    engines: set[int] = set()
    for i, (name, talks) in enumerate(runs.items()):
        place = (0.055 + i * width, 0.5 / height, width - 0.045, 0.24 * rows / height)
        ax = figure.add_axes(place, xlim=(0, columns), ylim=(rows, 0))
        ax.set_axis_off()
        ax.text(0, -0.55, name, va="center", **_SOFT)
        for y, talk in enumerate(talks):
            if not i:
                ax.text(-0.1, y + 0.5, str(y + 1), ha="right", va="center", **_SOFT)
            for x, turn in enumerate(talk):
                _prompt(ax, (x, y), turn)
                engines.add(turn.engine)
    handles = [Patch(**_CACHED), *(Patch(color=_color(engine)) for engine in sorted(engines))]
    names = [
        "known to the engine",
        *(f"computed by {_letter(engine)}" for engine in sorted(engines)),
    ]
    figure.legend(
        handles, names, loc="lower left", bbox_to_anchor=(0.045, 0.0), ncols=len(names),
        frameon=False, fontsize=9.5, labelcolor=palette.INK, borderpad=0.2,
    )  # fmt: skip
    figure.text(0.01, 1 - 0.25 / height, title, **_BOLD)
    moves = {name: _moves(talks) for name, talks in runs.items()}
    told = [
        f"{name}: {sum(map(len, talks))} turns, {moves[name]} times another engine than the turn"
        f" before, {_share(talks):.0%} of the prompts' tokens known"
        for name, talks in runs.items()
    ]
    said = "; ".join(f"{name}: {count}" for name, count in moves.items())
    describe(
        figure,
        f"Picture: the turns of {rows} conversations, by the engine that answered."
        f" {'; '.join(told)}.",
        f"So often a conversation changed its engine: {said}.",
    )
    return figure


def _letter(engine: int) -> str:
    return palette.request_letter(engine)


def _prompt(ax: Axes, corner: tuple[int, int], turn: Turn) -> None:
    x, y = corner[0] + 0.04, corner[1] + 0.1
    known = 0.92 * turn.cached / turn.prompt
    if known:
        ax.add_patch(Rectangle((x, y), known, 0.8, **_CACHED))
    look = {"facecolor": _color(turn.engine), "edgecolor": palette.SOFT_INK, "linewidth": 0.5}
    ax.add_patch(Rectangle((x + known, y), 0.92 - known, 0.8, **look))
    # The letter stands on the wider part, on a ground of one colour.
    wide = known < 0.46
    color = palette.text_on(_color(turn.engine) if wide else palette.CACHED)
    middle = x + (known + 0.92) / 2 if wide else x + known / 2
    box = None if wide else {"facecolor": palette.CACHED, "edgecolor": "none", "pad": 0.8}
    ax.text(middle, y + 0.4, _letter(turn.engine), color=color, fontsize=8.5, bbox=box, **_MIDDLE)


def _moves(talks: Sequence[Sequence[Turn]]) -> int:
    return sum(a.engine != b.engine for talk in talks for a, b in pairwise(talk))


def _share(talks: Sequence[Sequence[Turn]]) -> float:
    turns = [turn for talk in talks for turn in talk]
    return sum(turn.cached for turn in turns) / sum(turn.prompt for turn in turns)


# --- work -----------------------------------------------------------------------------------------


def draw_work(rows: Mapping[str, Sequence[tuple[int, int]]], title: str) -> Figure:
    """Draw what each engine had to do, for several routers.

    rows: name -> (tokens that its cache knew, tokens that it computed) of each engine. ValueError
    where a row is empty.
    """
    if not rows or not all(rows.values()):
        raise ValueError("no engines to draw")
    figure = Figure(3.4)
    ax = figure.add_axes((0.095, 0.16, 0.63, 0.68))
    plain_axes(ax)
    x, centers = 0.0, []
    most = max(a + b for work in rows.values() for a, b in work)
    for work in rows.values():
        for engine, (cached, computed) in enumerate(work):
            look = {"edgecolor": palette.SOFT_INK, "linewidth": 0.5}
            ax.bar(x, computed, 0.84, color=_color(engine), **look)
            ax.bar(x, cached, 0.84, bottom=computed, **_CACHED)
            ax.text(x, computed + cached + 0.03 * most, _letter(engine), **_MIDDLE, **_SOFT)
            x += 1
        centers.append(x - len(work) / 2 - 0.5)
        x += 0.8
    ax.set_xticks(centers, list(rows))
    ax.tick_params(axis="x", length=0, labelcolor=palette.INK, labelsize=10)
    ax.set_ylim(0, 1.1 * most)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_ylabel("tokens", **_SOFT)
    engines = range(max(map(len, rows.values())))
    handles = [Patch(**_CACHED), *(Patch(color=_color(engine)) for engine in engines)]
    names = ["known from the cache", *(f"computed by {_letter(engine)}" for engine in engines)]
    side_legend(ax, handles, names, "Tokens of each engine")
    figure.text(0.01, 0.93, title, **_BOLD)
    told = "; ".join(
        f"{name}: computed {', '.join(f'{b:,}' for _, b in work)}, known"
        f" {', '.join(f'{a:,}' for a, _ in work)}"
        for name, work in rows.items()
    )
    loads = {
        name: max(b for _, b in work) * len(work) / sum(b for _, b in work)
        for name, work in rows.items()
    }
    said = ", ".join(f"{name} {load:.2f}" for name, load in loads.items())
    describe(
        figure,
        f"Chart: the tokens of each engine, for {len(rows)} routers. {told}.",
        f"The busiest engine computed so many times the mean: {said}.",
    )
    return figure


# --- steps ----------------------------------------------------------------------------------------


def draw_steps(
    rows: Mapping[str, Sequence[tuple[float, float, int, int]]],
    window: tuple[float, float],
    title: str,
) -> Figure:
    """Draw the steps of engines, one row for each, in a window of time.

    rows: name -> steps (begin, end, prompt tokens, decodes). ValueError where a row has no step in
    the window.
    """
    start, stop = window
    shown = {
        name: [step for step in steps if step[1] > start and step[0] < stop]
        for name, steps in rows.items()
    }
    if not shown or not all(shown.values()):
        raise ValueError("no steps to draw")
    height = 1.45 + 0.45 * len(rows)
    figure = Figure(height)
    ax = figure.add_axes((0.16, 0.85 / height, 0.81, 0.45 * len(rows) / height))
    plain_axes(ax)
    ax.spines["left"].set_visible(False)
    for y, steps in enumerate(shown.values()):
        for begin, end, prompts, decodes in steps:
            left, right = max(begin, start), min(end, stop)
            look = {
                "edgecolor": palette.PAPER,
                "linewidth": 0.5,
                "facecolor": _kind(prompts, decodes),
            }
            ax.add_patch(
                Rectangle((1e3 * (left - start), y + 0.12), 1e3 * (right - left), 0.76, **look)
            )
    ax.set(xlim=(0, 1e3 * (stop - start)), ylim=(len(rows), 0))
    ax.set_yticks([y + 0.5 for y in range(len(rows))], list(rows), fontsize=9.5)
    ax.tick_params(axis="y", length=0, labelcolor=palette.INK)
    ax.set_xlabel("milliseconds", **_SOFT)
    figure.legend(
        [Patch(color=color) for color in _KINDS.values()], list(_KINDS), loc="lower left",
        bbox_to_anchor=(0.15, 0.0), ncols=3, frameon=False, fontsize=9.5, labelcolor=palette.INK,
        borderpad=0.2,
    )  # fmt: skip
    figure.text(0.01, 1 - 0.25 / height, title, **_BOLD)
    longest = {name: 1e3 * max(end - begin for begin, end, _, _ in s) for name, s in shown.items()}
    told = "; ".join(
        f"{name}: {len(steps)} steps, the longest {longest[name]:.1f} milliseconds"
        for name, steps in shown.items()
    )
    said = ", ".join(f"{name} {ms:.0f}" for name, ms in longest.items())
    describe(
        figure,
        f"Chart: the steps of {len(rows)} engines in {1e3 * (stop - start):.0f} milliseconds."
        f" {told}.",
        f"The longest step of each, in milliseconds: {said}.",
    )
    return figure


def _kind(prompts: int, decodes: int) -> str:
    name = "decodes only" if not prompts else "prompts and decodes" if decodes else "prompts only"
    return _KINDS[name]


# --- a death --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One request, as its client saw it. first: its first token; None: it never came.

    tries: how many engines got it. failed: whether it ended with an error.
    """

    engine: int
    sent: float
    first: float | None
    end: float
    tries: int = 1
    failed: bool = False


def draw_answers(answers: Sequence[Answer], moment: float, what: str, title: str) -> Figure:
    """Draw requests over time, by the engine that had them last, around a moment.

    Each request is a line from when it was sent to its end; pale until its first token. what: said
    at the moment. ValueError without requests.
    """
    if not answers:
        raise ValueError("no answers to draw")
    engines = sorted({answer.engine for answer in answers})
    lanes = [(engine, _stack([a for a in answers if a.engine == engine])) for engine in engines]
    total = sum(len(rows) + 1 for _, rows in lanes)
    height = 1.4 + 0.1 * total
    figure = Figure(height)
    ax = figure.add_axes((0.1, 0.8 / height, 0.87, 0.1 * total / height))
    plain_axes(ax)
    ax.spines["left"].set_visible(False)
    y, places = 0.0, []
    for _, rows in lanes:
        places.append(y + len(rows) / 2)
        for row in rows:
            for answer in row:
                _answer(ax, answer, y + 0.5)
            y += 1
        y += 1
    ax.axvline(moment, color=palette.WASTED, linewidth=1.6, linestyle="--")
    ax.set_ylim(y, -0.5)
    ax.set_yticks(places, [f"engine {_letter(engine)}" for engine in engines], fontsize=9.5)
    ax.tick_params(axis="y", length=0, labelcolor=palette.INK)
    ax.set_xlabel("seconds", **_SOFT)
    handles = [
        Line2D([], [], color=palette.SOFT_INK, lw=1),
        Line2D([], [], color=palette.REQUESTS[0], lw=3),
        Line2D([], [], color=palette.SOFT_INK, marker="^", lw=0, ms=6),
        Line2D([], [], color=palette.RESERVED, marker="X", lw=0, ms=7),
        Line2D([], [], color=palette.WASTED, lw=1.6, ls="--"),
    ]
    names = ["waits", "answers", "sent again", "ends with an error", what]
    figure.legend(
        handles, names, loc="lower left", bbox_to_anchor=(0.09, 0.0), ncols=5, frameon=False,
        fontsize=9.5, labelcolor=palette.INK, borderpad=0.2,
    )  # fmt: skip
    figure.text(0.01, 1 - 0.25 / height, title, **_BOLD)
    failed, again = sum(a.failed for a in answers), sum(a.tries > 1 for a in answers)
    describe(
        figure,
        f"Chart: {len(answers)} requests on {len(engines)} engines over time. At {moment:g} s:"
        f" {what}. {failed} end with an error, {again} were sent to another engine.",
        f"{failed} of {len(answers)} requests end with an error, {again} were sent again, and all"
        " others notice nothing.",
    )
    return figure


def _stack(answers: Sequence[Answer]) -> list[list[Answer]]:
    """The answers in as few rows as hold them without an overlap, in order of sending."""
    rows: list[list[Answer]] = []
    for answer in sorted(answers, key=lambda answer: answer.sent):
        row = next((row for row in rows if row[-1].end <= answer.sent), None)
        if row is None:
            rows.append([answer])
        else:
            row.append(answer)
    return rows


def _answer(ax: Axes, answer: Answer, y: float) -> None:
    first = answer.end if answer.first is None else answer.first
    ax.plot([answer.sent, first], [y, y], color=palette.SOFT_INK, linewidth=1)
    ax.plot(
        [first, answer.end], [y, y], color=_color(answer.engine), linewidth=3, solid_capstyle="butt"
    )
    if answer.tries > 1:
        ax.plot(first, y, "^", color=palette.SOFT_INK, markersize=6)
    if answer.failed:
        ax.plot(answer.end, y, "X", color=palette.RESERVED, markersize=7, markeredgewidth=0)
