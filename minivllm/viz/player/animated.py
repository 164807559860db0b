"""An animated picture of a run: an SVG that plays in an <img>, for a README or a slide.

It has no script. Every change is an animation of SVG itself (SMIL), which browsers play in images,
too. Left: who runs, with the text so far. Right: the pool of KV blocks. Below: who was doing what.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from minivllm.engine.trace import StepRecord, Trace
from minivllm.viz.palette import CACHED, FREE, INK, LINE, PAPER, SOFT_INK, request_color, text_on
from minivllm.viz.palette import request_letter as letter_of
from minivllm.viz.timeline import AGAIN, DECODE, PROMPT, STOP

WIDTH, _MARGIN, _ROW, _BLOCK, _LANE = 960, 12, 40, 24, 9
_POOL_X, _COLUMNS, _LINE_CHARS = 640, 12, 82


@dataclass(frozen=True)
class _Clock:
    """When a step shows, as a share of the whole film."""

    steps: Sequence[StepRecord]
    seconds: float

    def share(self, index: int) -> float:
        """The moment at which the index-th step begins; the last step stays for a tenth."""
        return 0.9 * index / len(self.steps)

    def animate(self, attribute: str, changes: Iterable[tuple[int, str]]) -> str:
        """An attribute that jumps to each value at its step. changes: (step's index, value)."""
        kept: list[tuple[int, str]] = []
        for index, value in changes:
            if not kept or kept[-1][1] != value:
                kept.append((index, value))
        if len(kept) < 2:
            return ""
        values = ";".join(value for _, value in kept)
        times = ";".join(f"{self.share(index):.4f}" for index, _ in kept)
        return (
            f'<animate attributeName="{attribute}" values="{values}" keyTimes="{times}"'
            f' dur="{self.seconds:g}s" calcMode="discrete" repeatCount="indefinite"/>'
        )


def animated_svg(
    trace: Trace, first: int = 0, last: int | None = None, seconds: float = 20.0
) -> str:
    """A film of the steps first … last - 1 of a trace, as the text of an SVG.

    seconds: how long it takes until it begins again. ValueError where there is no such step.
    """
    steps = trace.steps[first:last]
    if not steps:
        raise ValueError(f"The trace has no steps from {first} to {last}.")
    clock = _Clock(steps, seconds)
    names = _names(trace, steps)
    rows = max(len(record.running) for record in steps)
    pool_rows = -(-trace.num_blocks // _COLUMNS)
    top = 34
    middle = top + max(rows * _ROW, pool_rows * _BLOCK + 40) + 26
    height = middle + len(names) * _LANE + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="A run of minivllm: {len(names)} requests, {len(steps)} steps"'
        ' font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{PAPER}"/>',
        _text(_MARGIN, 20, "requests, and their texts as they are written", SOFT_INK),
        _text(_POOL_X, 20, f"the KV cache: {trace.num_blocks} blocks", SOFT_INK),
        *_requests(clock, names, rows, top),
        *_pool(trace, clock, names, top),
        _text(_MARGIN, middle - 8, "the scheduler, step by step", SOFT_INK),
        *_lanes(clock, names, middle),
        _legend(height - 12),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _names(trace: Trace, steps: Sequence[StepRecord]) -> dict[str, int]:
    """The sequences that run or wait in these steps -> their numbers in the whole trace."""
    order: dict[str, int] = {}
    for record in trace.steps:
        for name in (*record.running, *record.waiting):
            order.setdefault(name, len(order))
    seen = {name for record in steps for name in (*record.running, *record.waiting)}
    return {name: number for name, number in order.items() if name in seen}


def _text(x: float, y: float, text: str, color: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{color}" {more}>{html.escape(text)}</text>'


def _requests(clock: _Clock, names: dict[str, int], rows: int, top: int) -> Iterator[str]:
    """A group for each sequence, which moves to its place among the running ones."""
    for name, number in names.items():
        places = [
            (index, record.running.index(name) if name in record.running else -1)
            for index, record in enumerate(clock.steps)
        ]
        if all(place < 0 for _, place in places):
            continue
        color = request_color(number)
        # An animated transform may not jump, so each place has a group of its own.
        for place in sorted({place for _, place in places if 0 <= place < rows}):
            here = clock.animate(
                "display", ((i, "inline" if p == place else "none") for i, p in places)
            )
            y = top + place * _ROW
            yield f'<g display="{"inline" if places[0][1] == place else "none"}">{here}'
            yield (
                f'<rect x="{_MARGIN}" y="{y + 3}" width="26" height="22" rx="5" fill="{color}"'
                f' stroke="{INK}"/>'
            )
            middle = 'text-anchor="middle" font-weight="700"'
            yield _text(_MARGIN + 13, y + 19, letter_of(number), text_on(color), middle)
            yield from _words(clock, name, y)
            yield "</g>"


@dataclass
class _Line:
    """A line of a text: its words with the step that wrote each."""

    words: list[tuple[int, str]]

    @property
    def start(self) -> int:
        return self.words[0][0]

    @property
    def text(self) -> str:
        return " ".join(word for _, word in self.words)


def _lines(steps: Sequence[StepRecord], name: str) -> list[_Line]:
    """The text of a sequence, broken into lines."""
    words: list[tuple[int, str]] = []
    begins = True
    for index, record in enumerate(steps):
        for character in record.texts.get(name, ""):
            if character.isspace():
                begins = True
            elif begins:
                words.append((index, character))
                begins = False
            else:
                start, word = words[-1]
                words[-1] = (start, word + character)
    lines: list[_Line] = []
    for start, word in words:
        if lines and len(lines[-1].text) + len(word) < _LINE_CHARS:
            lines[-1].words.append((start, word))
        else:
            lines.append(_Line([(start, word)]))
    return lines


def _words(clock: _Clock, name: str, y: float) -> Iterator[str]:
    """The text of a sequence in two lines: it is written in the second, and moves up when full."""
    lines, end = _lines(clock.steps, name), len(clock.steps)
    starts = [line.start for line in lines] + [end, end]
    for number, line in enumerate(lines):
        full, gone = starts[number + 1], starts[number + 2]
        written = "".join(
            f'<tspan visibility="{"hidden" if start else "visible"}">{html.escape(word)} '
            f"{clock.animate('visibility', [(0, 'hidden'), (start, 'visible')] if start else [])}"
            "</tspan>"
            for start, word in line.words
        )
        yield _line(clock, y + 31, written, line.start, full)
        if full < end:
            yield _line(clock, y + 15, html.escape(line.text), full, gone)


def _line(clock: _Clock, y: float, inside: str, start: int, stop: int) -> str:
    """A line of text that shows from one step to another."""
    changes = [(0, "none"), (start, "inline")] if start else [(0, "inline")]
    changes += [(stop, "none")] if stop < len(clock.steps) else []
    return (
        f'<text x="{_MARGIN + 36}" y="{y:g}" font-size="12" fill="{INK}"'
        f' display="{changes[0][1]}">{clock.animate("display", changes)}{inside}</text>'
    )


def _pool(trace: Trace, clock: _Clock, names: dict[str, int], top: int) -> Iterator[str]:
    """The blocks; each changes its colour with its owner."""
    owners: list[dict[int, list[str]]] = []
    for record in clock.steps:
        found: dict[int, list[str]] = {}
        for name, table in record.block_tables.items():
            for block in table:
                found.setdefault(block, []).append(name)
        owners.append(found)
    cached = [set(record.cached_blocks) for record in clock.steps]
    for block in range(trace.num_blocks):
        x = _POOL_X + block % _COLUMNS * (_BLOCK + 1)
        y = top + block // _COLUMNS * (_BLOCK + 1)
        fills, widths, letters = [], [], []
        for index, found in enumerate(owners):
            who = found.get(block, [])
            color = request_color(names[who[0]]) if who else FREE
            fills.append((index, CACHED if not who and block in cached[index] else color))
            widths.append((index, "3" if len(who) > 1 else "1"))
            letters.append((index, who[0] if who else ""))
        yield (
            f'<rect x="{x}" y="{y}" width="{_BLOCK - 2}" height="{_BLOCK - 2}" stroke="{INK}"'
            f' stroke-width="{widths[0][1]}" fill="{fills[0][1]}">'
            f"{clock.animate('fill', fills)}{clock.animate('stroke-width', widths)}</rect>"
        )


def _lanes(clock: _Clock, names: dict[str, int], top: float) -> Iterator[str]:
    """A lane for each sequence, and a cursor that walks over them."""
    left, width = _MARGIN + 18, WIDTH - 2 * _MARGIN - 18
    step = width / len(clock.steps)
    for row, (name, number) in enumerate(names.items()):
        y = top + row * _LANE
        yield _text(_MARGIN, y + 8, letter_of(number), INK, 'font-size="9"')
        reached, index = 0, 0
        doing: list[tuple[str, float]] = []
        for record in clock.steps:
            item = next((i for i in record.scheduled if f"{i.request_id}/{i.index}" == name), None)
            if item is not None:
                again = item.start + item.num_new_tokens <= reached
                reached = max(reached, item.start + item.num_new_tokens)
                kind = AGAIN if again else DECODE if item.kind == "decode" else PROMPT
                doing.append((kind, 6 if kind == DECODE else 8))
            else:
                doing.append((SOFT_INK, 1.5) if name in record.waiting else ("", 0))
        while index < len(doing):
            end = index + 1
            while end < len(doing) and doing[end] == doing[index]:
                end += 1
            color, high = doing[index]
            if color:
                yield (
                    f'<rect x="{left + index * step:.1f}" y="{y + (_LANE - high) / 2:g}"'
                    f' width="{(end - index) * step:.1f}" height="{high:g}" fill="{color}"/>'
                )
            index = end
        for index, record in enumerate(clock.steps):
            if name in record.preempted:
                x = left + index * step
                yield f'<rect x="{x - 1:.1f}" y="{y}" width="2.5" height="{_LANE}" fill="{STOP}"/>'
    bottom = top + len(names) * _LANE
    yield (
        f'<line y1="{top - 4}" y2="{bottom + 4}" x1="{left}" x2="{left}" stroke="{INK}"'
        ' stroke-width="2">'
        + "".join(
            f'<animate attributeName="{x}" values="{left};{left + width};{left + width}"'
            f' keyTimes="0;0.9;1" dur="{clock.seconds:g}s" repeatCount="indefinite"/>'
            for x in ("x1", "x2")
        )
        + "</line>"
    )


def _legend(y: float) -> str:
    entries = (
        (PROMPT, "tokens of a prompt"),
        (DECODE, "decode"),
        (AGAIN, "computed again"),
        (STOP, "preempted"),
        (CACHED, "cached block"),
    )
    parts = []
    for i, (color, word) in enumerate(entries):
        x = _MARGIN + 18 + i * 150
        parts.append(
            f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{color}" stroke="{LINE}"/>'
            + _text(x + 20, y, word, SOFT_INK, 'font-size="12"')
        )
    return "".join(parts)
