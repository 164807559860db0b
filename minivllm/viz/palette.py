"""The one palette of all pictures: plain constants, no matplotlib.

Pictures have no background: a light or a dark page shines through. So text and lines on the page
have a middle brightness, which has a contrast of at least 4 to both (`mid_tone`), and fills bring
their own contrast: `text_on` names the colour of a text on them, and `minivllm.viz.themes` applies
it. Request colours are those of Okabe and Ito (2008), which stay distinct for the common kinds of
colour blindness. Eight colours never suffice, so every coloured thing also has a letter, a hatch or
an outline. tests/viz/test_viz.py checks the contrasts and the distances.
"""

from __future__ import annotations

#: Light text on dark fills; gaps and hatches inside fills.
PAPER = "#FFFFFF"
#: Dark text on light fills.
DARK_TEXT = "#14171F"
#: Text and lines on the page, and those of less weight.
INK = "#6E7785"
SOFT_INK = "#757E8C"
#: Outlines that only decorate: half transparent.
LINE = "#757E8C8C"

#: Requests, by order of arrival. In this order, neighbouring colours differ most. `request_color`
#: goes on with lighter and darker forms.
REQUESTS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#56B4E9", "#5F6673")

#: States of KV memory.
USED = "#0072B2"
WASTED = "#E69F00"
CACHED = "#C9CFDA"
#: Nearly transparent, so that free memory is the quietest on light and dark pages.
FREE = "#757E8C14"
#: The room that contiguous reservation would take.
RESERVED = "#D0451B"

HATCH_CACHED = "//////"
HATCH_WASTED = "....."


def request_color(index: int) -> str:
    """The colour of the index-th request to arrive.

    After the eight of `REQUESTS` come eight lighter and eight darker ones. The 24 are repeated.
    """
    color = REQUESTS[index % len(REQUESTS)]
    target, share = _FORMS[index // len(REQUESTS) % len(_FORMS)]
    return _hex(tuple(c + (t - c) * share for c, t in zip(rgb(color), rgb(target), strict=True)))


#: (the colour to mix with, its share) of the plain, the lighter and the darker request colours.
_FORMS = ((PAPER, 0.0), (PAPER, 0.55), ("#000000", 0.45))


def request_letter(index: int) -> str:
    """The name of the index-th request in a picture: A … Z, AA, AB …"""
    letters = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters


def rgb(color: str) -> tuple[float, float, float]:
    """``"#RRGGBB"`` or ``"#RRGGBBAA"`` as three numbers from 0 to 1; the opacity is left out."""
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def opacity(color: str) -> float:
    """The AA of ``"#RRGGBBAA"``, from 0 to 1; 1 without it."""
    return int(color[7:9] or "FF", 16) / 255


def rgba(color: str) -> tuple[int, int, int, int]:
    """``"#RRGGBB"`` or ``"#RRGGBBAA"`` as four numbers from 0 to 255."""
    red, green, blue = (round(255 * x) for x in rgb(color))
    return red, green, blue, round(255 * opacity(color))


def tint(color: str, strength: float) -> str:
    """A paler form of `color`; strength 1 is the colour itself.

    Below `VEIL`, the colour as a veil through which the page shines. From there on, mixed with
    paper, for fills with text.
    """
    if strength < VEIL:
        return f"{color[:7]}{round(255 * strength):02X}"
    mixed = (s * strength + p * (1 - strength) for s, p in zip(rgb(color), rgb(PAPER), strict=True))
    return _hex(tuple(mixed))


#: The strength from which on a `tint` is opaque.
VEIL = 0.23


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, section 1.4.3)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def text_on(background: str) -> str:
    """The text colour that is easiest to read on a fill; on a veil, that of text on the page."""
    if opacity(background) < VEIL:
        return INK
    return max((DARK_TEXT, PAPER), key=lambda color: contrast(color, background))


#: The luminances of `mid_tone`: between them, the contrast with #FFFFFF and #111111 is above 4.
_DARKEST, _LIGHTEST = 0.176, 0.21


def mid_tone(color: str) -> str:
    """The colour nearest to `color` that can be read on white and on nearly black pages."""
    if _DARKEST <= _luminance(color) <= _LIGHTEST:
        return color[:7]
    darker = _luminance(color) < _DARKEST
    target = rgb(PAPER) if darker else (0.0, 0.0, 0.0)
    low, high, mixed = 0.0, 1.0, color[:7]
    for _ in range(12):
        share = (low + high) / 2
        mixed = _hex(tuple(c + (t - c) * share for c, t in zip(rgb(color), target, strict=True)))
        too_little = _luminance(mixed) < _DARKEST if darker else _luminance(mixed) > _LIGHTEST
        low, high = (share, high) if too_little else (low, share)
    return _hex(tuple(c + (t - c) * high for c, t in zip(rgb(color), target, strict=True)))


def _hex(color: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * x):02X}" for x in color)


def _luminance(color: str) -> float:
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
