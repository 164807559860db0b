"""Pictures that read well on light and on dark pages.

A picture has no background of its own: the page shines through. What stands on the page, text and
lines, has a colour of middle brightness. A text that lies on a fill takes the colour that is
easiest to read there. `adapt` does this for a whole figure, just before it becomes a PNG, so that
the functions that draw need not know what lies under a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import to_hex, to_rgba
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from minivllm.viz import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The pages: JupyterLab's and GitHub's light theme, and JupyterLab's dark theme. GitHub's dark
#: theme (#0D1117) is as dark.
LIGHT, DARK = "#FFFFFF", "#111111"
#: Pixels per inch of the drawing in which we look up what lies under a text.
_LOOK_DPI = 40
#: From this opacity on, what lies under a text is a fill, and not the page.
_FILL = 0.6
#: Up to this opacity, nothing lies under a text.
_BARE = 0.1
#: Contrast that a text on a fill keeps its own colour with.
_ENOUGH = 4.5


def adapt(figure: Figure) -> None:
    """Make the figure readable on light and dark pages: background, and the colours of texts."""
    figure.patch.set_alpha(0)
    for ax in figure.axes:
        if to_hex(ax.patch.get_facecolor()).upper() == palette.PAPER:
            ax.patch.set_alpha(0)
        _set_frame(ax)
    for text, pixels in _texts(figure):
        _set_box(text, pixels)
        text.set_color(_readable(to_hex(text.get_color()).upper(), _under(text, pixels)))
    _keep_ticks_inside(figure)


def text_contrasts(figure: Figure) -> dict[str, float]:
    """The contrast of each text with what lies under it, on the page where it is lower.

    Equal texts are one entry, with the lowest contrast among them.
    """
    found: dict[str, float] = {}
    for text, pixels in _texts(figure):
        worst = _worst(to_hex(text.get_color()), _under(text, pixels))
        found[text.get_text()] = min(worst, found.get(text.get_text(), worst))
    return found


def _texts(figure: Figure) -> Iterator[tuple[Text, np.ndarray]]:
    """Yield each text that is seen, and the pixels that lie under it, without its own box.

    The pixels are [n, 4] float: red, green, blue and opacity from 0 to 1.
    """
    for ax in figure.axes:
        # The ticks come into being when somebody asks for them.
        ax.get_xticklabels(), ax.get_yticklabels()
    dpi, canvas = figure.dpi, figure.canvas
    texts = [text for text in figure.findobj(Text) if text.get_visible()]
    inks = [text.get_alpha() for text in texts]
    boxes = [box for text in texts if (box := text.get_bbox_patch()) is not None]
    figure.set_dpi(_LOOK_DPI)
    for text in texts:
        text.set_alpha(0)
    for box in boxes:
        box.set_visible(False)
    try:
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba()).astype(float) / 255  # type: ignore[attr-defined]
        found = [(text, _cut_out(text, pixels)) for text in texts if text.get_text().strip()]
    finally:
        for text, ink in zip(texts, inks, strict=True):
            text.set_alpha(ink)
        for box in boxes:
            box.set_visible(True)
        figure.set_dpi(dpi)
    yield from found


def _cut_out(text: Text, pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    extent = text.get_window_extent()
    left, right = (int(min(max(x, 0), width - 1)) for x in (extent.x0, extent.x1))
    top, bottom = (int(min(max(height - y, 0), height - 1)) for y in (extent.y1, extent.y0))
    return pixels[top : bottom + 1, left : right + 1].reshape(-1, 4)


def _set_frame(ax: Axes) -> None:
    """Give the frame and the ticks of a chart, black where nobody chose a colour, a middle tone."""
    for spine in ax.spines.values():
        *color, opacity = spine.get_edgecolor()
        spine.set_edgecolor((*palette.rgb(palette.mid_tone(to_hex(color).upper())), opacity))
    for line in (*ax.get_xticklines(), *ax.get_yticklines()):
        line.set_color(palette.mid_tone(to_hex(line.get_color()).upper()))


def _set_box(text: Text, pixels: np.ndarray) -> None:
    """Make the box of a text solid where something lies under it, and drop it on the bare page."""
    box = text.get_bbox_patch()
    if box is None:
        return
    color = box.get_facecolor()
    if np.quantile(pixels[:, 3], 0.9) < _BARE:
        if to_hex(color).upper() == palette.PAPER:
            box.set_facecolor("none")
    elif color[3] < palette.VEIL:
        box.set_facecolor(palette.PAPER)
        box.set_alpha(None)


def _under(text: Text, pixels: np.ndarray) -> np.ndarray:
    """The colour under a text, its box and its halo included: [4] float."""
    if any(isinstance(effect, withStroke) for effect in text.get_path_effects()):
        return np.array(to_rgba(palette.PAPER))
    below, box = np.median(pixels, axis=0), text.get_bbox_patch()
    return below if box is None else _over(to_rgba(box.get_facecolor()), below)


def _keep_ticks_inside(figure: Figure) -> None:
    """Move the label of a tick at the right edge to the left, where the edge would cut it."""
    right = figure.bbox.width
    for ax in figure.axes:
        for label in ax.get_xticklabels():
            if label.get_text() and label.get_window_extent().x1 > right:
                label.set_horizontalalignment("right")


def _over(color: tuple[float, ...], below: np.ndarray) -> np.ndarray:
    """A colour with opacity, over another one: [4] float."""
    strength, rest = color[3], below[3] * (1 - color[3])
    total = strength + rest
    if not total:
        return below
    mixed = (np.array(color[:3]) * strength + below[:3] * rest) / total
    return np.array([*mixed, total])


def _worst(color: str, below: np.ndarray) -> float:
    """The lower of the contrasts on the light and on the dark page."""
    return min(
        palette.contrast(
            color, to_hex(_over(tuple(below), np.array([*palette.rgb(page), 1.0]))[:3])
        )
        for page in (LIGHT, DARK)
    )


def _readable(color: str, below: np.ndarray) -> str:
    if below[3] < _FILL:
        return palette.mid_tone(color)
    # The page's own inks are of middle brightness; on a fill, there is always a better one.
    if color not in (palette.INK, palette.SOFT_INK) and _worst(color, below) >= _ENOUGH:
        return color
    return max((palette.DARK_TEXT, palette.PAPER), key=lambda one: _worst(one, below))
