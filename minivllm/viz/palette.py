"""The one palette of all pictures: plain constants, no matplotlib.

Pictures bring their own light background (`PAPER`), because no text colour has enough contrast on
both white and black; in dark mode a picture looks like a card. Request colours are those of Okabe
and Ito (2008), which stay distinct for the common kinds of colour blindness. Eight colours never
suffice, so every coloured thing also has a letter, a hatch or an outline. tests/viz/test_viz.py
checks the contrasts and the distances.
"""

from __future__ import annotations

PAPER = "#FFFFFF"
INK = "#14171F"
#: Secondary text and outlines.
SOFT_INK = "#596070"
LINE = "#B4BAC6"

#: Requests, by order of arrival; repeated after the last. In this order, neighbouring colours
#: differ most.
REQUESTS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#56B4E9", "#5F6673")

#: States of KV memory.
USED = "#0072B2"
WASTED = "#E69F00"
CACHED = "#C9CFDA"
FREE = "#F4F6FA"
#: The room that contiguous reservation would take.
RESERVED = "#B23A00"

HATCH_CACHED = "//////"
HATCH_WASTED = "....."


def request_color(index: int) -> str:
    """The colour of the index-th request to arrive."""
    return REQUESTS[index % len(REQUESTS)]


def request_letter(index: int) -> str:
    """The name of the index-th request in a picture: A … Z, AA, AB …"""
    letters = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters


def rgb(color: str) -> tuple[float, float, float]:
    """``"#RRGGBB"`` as three numbers from 0 to 1."""
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def tint(color: str, strength: float) -> str:
    """`color` mixed with the paper; strength 1 is the colour itself."""
    mixed = (s * strength + p * (1 - strength) for s, p in zip(rgb(color), rgb(PAPER), strict=True))
    return "#" + "".join(f"{round(255 * x):02X}" for x in mixed)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, section 1.4.3; 4.5 is enough for text)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def text_on(background: str) -> str:
    """The text colour, dark or light, that is easier to read on a background."""
    return max((INK, PAPER), key=lambda color: contrast(color, background))


def _luminance(color: str) -> float:
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
