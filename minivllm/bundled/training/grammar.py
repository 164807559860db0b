"""Random text from templates: the small language in which the corpus is written.

A template is ordinary text with two additions:

- ``[red|green|]`` draws one alternative (an alternative may be empty, and choices may nest);
- ``{name}`` is replaced by a value, or by the result of a function when the value is one.

    >>> import random
    >>> expand("[A|The] {colour} hat", random.Random(1), {"colour": "red"})
    'A red hat'

Templates are parsed once and cached, because a corpus expands the same few hundred lines a million
times.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache

Slot = str | Callable[[], str]
# A parsed template is a tuple of parts: literal text, a slot name, or a choice between parsed
# templates.
Node = tuple[str, object]

_MARKS = re.compile(r"([\[\]|]|\{\w+\})")
_SENTENCE_START = re.compile(r"(^|[.!?]\s+|\n\s*)([\"“]?)([a-zéñø])")
_SPACES = re.compile(r" {2,}")
_SPACE_BEFORE_PUNCTUATION = re.compile(r" +([,.!?;:])")
_VOWEL_SOUND = re.compile(r"(?:(?!uni|use|one)[aeiouéAEIOUÉ]|honest)")


@cache
def parse(template: str) -> tuple[Node, ...]:
    """Parse a template. ValueError when its brackets do not match."""
    pieces = [piece for piece in _MARKS.split(template) if piece]
    nodes, position = _parse_sequence(pieces, 0, depth=0, template=template)
    if position != len(pieces):
        raise ValueError(f"unexpected {pieces[position]!r} in template {template!r}")
    return nodes


def _parse_sequence(
    pieces: Sequence[str], position: int, depth: int, template: str
) -> tuple[tuple[Node, ...], int]:
    nodes: list[Node] = []
    while position < len(pieces):
        piece = pieces[position]
        if piece == "[":
            choices: list[tuple[Node, ...]] = []
            while True:
                choice, position = _parse_sequence(pieces, position + 1, depth + 1, template)
                choices.append(choice)
                if position >= len(pieces):
                    raise ValueError(f"missing ']' in template {template!r}")
                if pieces[position] == "]":
                    break
            nodes.append(("choice", tuple(choices)))
        elif piece in "]|":
            if depth == 0:
                raise ValueError(f"unexpected {piece!r} in template {template!r}")
            return tuple(nodes), position
        elif piece[0] == "{":
            nodes.append(("slot", piece[1:-1]))
        else:
            nodes.append(("text", piece))
        position += 1
    return tuple(nodes), position


def expand(template: str, rng: random.Random, slots: Mapping[str, Slot]) -> str:
    """Draw one text from the template."""
    output: list[str] = []
    _expand(parse(template), rng, slots, output)
    return "".join(output)


def _expand(
    nodes: tuple[Node, ...], rng: random.Random, slots: Mapping[str, Slot], output: list[str]
) -> None:
    for kind, value in nodes:
        if kind == "text":
            output.append(value)  # type: ignore[arg-type]
        elif kind == "slot":
            slot = slots[value]  # type: ignore[index]
            output.append(slot if isinstance(slot, str) else slot())
        else:
            choices: Sequence[tuple[Node, ...]] = value  # type: ignore[assignment]
            _expand(choices[int(rng.random() * len(choices))], rng, slots, output)


def pick(rng: random.Random, items: Sequence[str]) -> str:
    """Draw one item; a little faster than `rng.choice`."""
    return items[int(rng.random() * len(items))]


def tidy(text: str) -> str:
    """Remove the doubled spaces that empty alternatives leave behind."""
    return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", _SPACES.sub(" ", text)).strip()


def sentence_case(text: str) -> str:
    """Tidy the text, and capitalise the first letter of every sentence."""
    return _SENTENCE_START.sub(lambda match: match[1] + match[2] + match[3].upper(), tidy(text))


def with_article(noun: str) -> str:
    """Add the indefinite article: `fox` -> `a fox`, `owl` -> `an owl`."""
    return ("an " if _VOWEL_SOUND.match(noun) else "a ") + noun
