"""Pictures of speculative decoding: one step's check, a text by its steps, random numbers that two
models share, the overlap of two distributions, and what became of the proposals of a run.

All take plain numbers, words or traces; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from minivllm.engine.sequence import num_equal
from minivllm.engine.trace import Trace
from minivllm.viz import palette
from minivllm.viz.figure import WIDTH, Figure, describe, plain_axes, side_legend
from minivllm.viz.sampling import ruler

_BOLD = {"fontsize": 12, "weight": "bold", "color": palette.INK}
_SOFT = {"fontsize": 9.5, "color": palette.SOFT_INK}
_MIDDLE = {"ha": "center", "va": "center"}
#: Tokens that were guessed and are right, that the model chose itself, and that were wrong.
_RIGHT, _OWN, _WRONG = palette.REQUESTS[2], palette.REQUESTS[0], palette.REQUESTS[3]
#: Inches per letter of the fixed-width font, per point of its size.
_LETTER = 0.602 / 72
#: What separates the steps of a text, in letters.
_GAP = 0.4


# --- one step -------------------------------------------------------------------------------------


def draw_check(
    known: Sequence[str], proposed: Sequence[str], sampled: Sequence[str], title: str = ""
) -> Figure:
    """Draw one step that verifies proposals: what is guessed, what the model samples, what stays.

    known: the last words of the text so far. proposed: k guesses. sampled: the model's own choices,
    after the known words and after each guess; ValueError unless there are k + 1.
    """
    if len(sampled) != len(proposed) + 1:
        raise ValueError(f"{len(proposed)} guesses need one sample more, not {len(sampled)}.")
    right = num_equal(proposed, sampled)  # type: ignore[arg-type]
    count = len(known) + len(sampled)
    figure = Figure(2.75)
    ax = figure.add_axes((0.12, 0.02, 0.86, 0.82), xlim=(0, count), ylim=(4.1, -0.15))
    ax.set_axis_off()
    for y, name in ((0.5, "guessed"), (1.7, "sampled"), (3.1, "the text")):
        ax.text(-0.1, y, name, ha="right", va="center", **_SOFT)
    size = min(10.0, 9 * 0.8 / count / _LETTER / max(map(len, (*known, *proposed, *sampled))))
    for i, word in enumerate(known):
        for y in (0, 2.6):
            _box(ax, (i, y), word, palette.CACHED, size)
    for i, word in enumerate(proposed):
        place = (len(known) + i, 0.0)
        _box(ax, place, word, _RIGHT if i < right else palette.tint(_WRONG, 0.45), size)
        if i >= right:
            middle = place[1] + 0.5
            ax.plot([place[0] + 0.06, place[0] + 0.94], [middle, middle], color=palette.INK, lw=1.6)
    for i, word in enumerate(sampled):
        x = len(known) + i
        kept = i <= right
        _box(ax, (x, 1.2), word, _RIGHT if i < right else _OWN if kept else palette.FREE, size)
        if i < len(proposed) and i <= right:
            ax.text(x + 0.5, 1.1, "=" if i < right else "≠", **_MIDDLE, **_BOLD)
        if kept:
            _box(ax, (x, 2.6), word, _RIGHT if i < right else _OWN, size)
    note = "one more than there were right guesses"
    ax.text(len(known) + (right + 1) / 2, 3.95, note, **_MIDDLE, **_SOFT)
    figure.text(0.01, 0.91, title or "One step, several tokens", **_BOLD)
    describe(
        figure,
        f"Picture: {len(proposed)} guessed tokens below each other with the"
        f" {len(sampled)} tokens that the model samples there. The first {right} are equal. The"
        f" text grows by {right + 1}.",
        f"{right} of {len(proposed)} guesses are right, and the step brings {right + 1} tokens.",
    )
    return figure


def _box(ax: Axes, place: tuple[float, float], word: str, color: str, size: float) -> None:
    face = {"facecolor": color, "edgecolor": palette.SOFT_INK, "linewidth": 0.5}
    ax.add_patch(Rectangle((place[0] + 0.03, place[1] + 0.05), 0.94, 0.85, **face))
    ink = palette.text_on(color)
    where = (place[0] + 0.5, place[1] + 0.47)
    ax.text(*where, _shown(word), color=ink, fontsize=size, family="monospace", **_MIDDLE)


def _shown(word: str) -> str:
    """A token's text with visible spaces and line ends."""
    return word.replace("\n", "↵").replace(" ", "␣")


# --- a text ---------------------------------------------------------------------------------------


def draw_written(steps: Sequence[Sequence[str]], title: str, width: int = 100) -> Figure:
    """Draw a text by the steps that wrote it.

    steps: the words that each step brought; all but the last of a step were guessed. width: the
    most letters in a line. ValueError where a step brought nothing.
    """
    if not steps or not all(steps):
        raise ValueError("a step without a token")
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0.0
    for words in steps:
        for i, word in enumerate(words):
            if used + len(word) > width:
                lines.append([])
                used = 0.0
            lines[-1].append((word.replace("\n", "↵"), i < len(words) - 1))
            used += len(word)
        used += _GAP
    height = 1.0 + 0.32 * len(lines)
    figure = Figure(height)
    ax = figure.add_axes((0.01, 0.1 / height, 0.98, 0.32 * len(lines) / height))
    ax.set(xlim=(0, width + 1), ylim=(len(lines), 0))
    ax.set_axis_off()
    size = 0.98 * WIDTH / (width + 1) / _LETTER
    for y, line in enumerate(lines):
        x = 0.0
        for word, guessed in line:
            color = _RIGHT if guessed else _OWN
            face = {"facecolor": color, "linewidth": 0}
            ax.add_patch(Rectangle((x, y + 0.1), len(word), 0.76, **face))
            style = {"color": palette.text_on(color), "fontsize": size, "family": "monospace"}
            ax.text(x + len(word) / 2, y + 0.49, word, **style, **_MIDDLE)
            x += len(word) + (0 if guessed else _GAP)
    handles = [Patch(color=_RIGHT), Patch(color=_OWN)]
    names = ["guessed, and right", "the model's own token, the last of each step"]
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, 1 - 0.38 / height), "ncols": 2}
    figure.legend(
        handles, names, frameon=False, fontsize=9.5, labelcolor=palette.INK, borderpad=0, **place
    )
    figure.text(0.01, 1 - 0.25 / height, title, **_BOLD)
    tokens, guessed = sum(map(len, steps)), sum(len(words) - 1 for words in steps)
    describe(
        figure,
        f"Picture: a text of {tokens} tokens that {len(steps)} steps wrote; {guessed} tokens were"
        f" guessed. The most that one step brought is {max(map(len, steps))}.",
        f"{len(steps)} steps for {tokens} tokens; a gap ends each step.",
    )
    return figure


# --- one random number for two models -------------------------------------------------------------


def draw_shared_number(
    models: Mapping[str, Sequence[float]], u: float, words: Sequence[str], names: int = 6
) -> Figure:
    """Draw the probabilities of several models on rulers from 0 to 1, under one random number.

    models: name -> probabilities, in the order of the token ids. words: of the tokens. names: the
    most tokens with a colour. ValueError for lengths that do not match.
    """
    if not models or any(len(values) != len(words) for values in models.values()):
        raise ValueError(f"{len(words)} words, {[len(values) for values in models.values()]}.")
    best = sorted(range(len(words)), key=lambda i: -max(values[i] for values in models.values()))[
        :names
    ]
    colors = {token: palette.request_color(place) for place, token in enumerate(sorted(best))}
    height = 0.85 + 0.72 * len(models)
    figure = Figure(height)
    ax = figure.add_axes(
        (0.09, 0.3 / height, 0.76, 0.72 * len(models) / height),
        xlim=(0, 1),
        ylim=(len(models), 0),
    )
    ax.set_axis_off()
    chosen = {}
    for y, (name, values) in enumerate(models.items()):
        parts = ruler(values)
        ax.add_patch(Rectangle((0, y + 0.2), 1, 0.6, facecolor=palette.CACHED, linewidth=0))
        for token, color in colors.items():
            _part(ax, parts[token], y, color, words[token])
        chosen[name] = next((i for i, (_, end) in enumerate(parts) if u < end), len(words) - 1)
        ax.text(-0.012, y + 0.5, name, ha="right", va="center", color=palette.INK, fontsize=10)
        word = _shown(words[chosen[name]])
        ax.text(1.015, y + 0.5, word, ha="left", va="center", family="monospace", **_BOLD)
    ax.plot([u, u], [0.02, len(models) - 0.02], color=palette.INK, linewidth=2.4)
    ax.plot([u, u], [0.02, len(models) - 0.02], color=palette.PAPER, linewidth=0.8)
    note = "tokens in order of their ids; grey: all others"
    ax.text(0.5, len(models) + 0.1, note, ha="center", va="top", **_SOFT)
    figure.text(0.01, 1 - 0.25 / height, f"One random number for both: u = {u:.3f}", **_BOLD)
    drawn = [f"{name} draws {_shown(words[token])!r}" for name, token in chosen.items()]
    differ = len(set(chosen.values())) > 1
    describe(
        figure,
        f"Picture: the next token's probabilities of {len(models)} models, each laid on a line"
        f" from 0 to 1, and one random number {u:.3f} on both. {'; '.join(drawn)}.",
        f"{'; '.join(drawn)}: {'not the same token' if differ else 'the same token'}.",
    )
    return figure


def _part(ax: Axes, part: tuple[float, float], y: float, color: str, word: str) -> None:
    begin, end = part
    face = {"facecolor": color, "edgecolor": palette.PAPER, "linewidth": 0.6}
    ax.add_patch(Rectangle((begin, y + 0.2), end - begin, 0.6, **face))
    fits = 0.76 * WIDTH * (end - begin) / (_LETTER * (len(word) + 0.6))
    if fits >= 6.5:
        style = {"fontsize": min(fits, 10), "family": "monospace"}
        where = ((begin + end) / 2, y + 0.5)
        ax.text(*where, _shown(word), color=palette.text_on(color), **style, **_MIDDLE)


# --- two distributions ----------------------------------------------------------------------------


def draw_overlap(labels: Sequence[str], target: Sequence[float], draft: Sequence[float]) -> Figure:
    """Draw what two distributions have in common, and where each has more than the other.

    ValueError for lengths that do not match.
    """
    if not len(labels) == len(target) == len(draft):
        raise ValueError(f"{len(labels)} labels, {len(target)} and {len(draft)} probabilities.")
    figure = Figure(3.2)
    ax = figure.add_axes((0.07, 0.13, 0.62, 0.73))
    plain_axes(ax)
    look = {"width": 0.7, "edgecolor": palette.SOFT_INK, "linewidth": 0.6}
    for i, (p, q) in enumerate(zip(target, draft, strict=True)):
        both = min(p, q)
        ax.bar(i, both, color=_RIGHT, **look)
        if p > q:
            ax.bar(i, p - q, bottom=both, color=_OWN, **look)
        elif q > p:
            pale = palette.tint(_WRONG, 0.45)
            ax.bar(i, q - p, bottom=both, color=pale, hatch=palette.HATCH_CACHED, **look)
    ax.set_xticks(range(len(labels)), [_shown(label) for label in labels], family="monospace")
    ax.tick_params(axis="x", length=0, labelcolor=palette.INK, labelsize=10)
    ax.set_ylabel("probability", **_SOFT)
    handles = [
        Patch(facecolor=palette.tint(_WRONG, 0.45), hatch=palette.HATCH_CACHED),
        Patch(color=_OWN),
        Patch(color=_RIGHT),
    ]
    names = ["only the draft's: rejected", "only the model's: the residual", "both: accepted"]
    side_legend(ax, handles, names, "Whose probability")
    figure.text(0.01, 0.93, "Two distributions, and what they share", **_BOLD)
    shared = sum(map(min, target, draft))
    described = ", ".join(
        f"{_shown(label)} {p:.2f} and {q:.2f}"
        for label, p, q in zip(labels, target, draft, strict=True)
    )
    describe(
        figure,
        f"Chart: the probabilities of {len(labels)} tokens, of the model and of the draft:"
        f" {described}.",
        f"The two share {shared:.2f} of their probability: a guess is accepted so often.",
    )
    return figure


# --- a run ----------------------------------------------------------------------------------------


def draw_proposals(trace: Trace, request: str = "0/0", title: str = "") -> Figure:
    """Draw, step by step, how many tokens were proposed for a request, and how many were right.

    request: "request/index", as in the trace. ValueError where no step verifies proposals for it.
    """
    counts = proposals_of(trace, request)
    if not any(proposed for proposed, _ in counts):
        raise ValueError(f"no proposals for {request}")
    figure = Figure(2.6)
    ax = figure.add_axes((0.06, 0.2, 0.66, 0.63))
    plain_axes(ax)
    for step, (proposed, accepted) in enumerate(counts):
        if accepted:
            ax.bar(step, accepted, color=_RIGHT, width=0.85)
        if proposed > accepted:
            pale = {"color": palette.tint(_WRONG, 0.45), "hatch": palette.HATCH_CACHED}
            look = {"edgecolor": palette.SOFT_INK, "linewidth": 0.0}
            ax.bar(step, proposed - accepted, bottom=accepted, width=0.85, **(pale | look))
    ax.set_xlim(-0.6, len(counts) - 0.4)
    ax.set_yticks(range(max(proposed for proposed, _ in counts) + 1))
    ax.set_xlabel("step", **_SOFT)
    ax.set_ylabel("tokens proposed", **_SOFT)
    handles = [
        Patch(facecolor=palette.tint(_WRONG, 0.45), hatch=palette.HATCH_CACHED),
        Patch(color=_RIGHT),
    ]
    side_legend(ax, handles, ["rejected", "accepted"], "Proposals")
    figure.text(0.01, 0.91, title or "What was proposed in each step", **_BOLD)
    proposed, accepted = (sum(column) for column in zip(*counts, strict=True))
    rests = sum(not count for count, _ in counts)
    describe(
        figure,
        f"Chart: the tokens proposed in each of {len(counts)} steps, {proposed} together, of which"
        f" {accepted} were accepted. {rests} steps had no proposals.",
        f"{accepted} of {proposed} proposals were right; {rests} of {len(counts)} steps had none.",
    )
    return figure


def proposals_of(trace: Trace, request: str = "0/0") -> list[tuple[int, int]]:
    """(proposed, accepted) tokens of a request in each step that took it along."""
    return [
        (len(item.proposed_token_ids), step.num_accepted.get(request, 0))
        for step in trace.steps
        for item in step.scheduled
        if f"{item.request_id}/{item.index}" == request
    ]
