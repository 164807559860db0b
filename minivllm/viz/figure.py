"""`Figure`: a matplotlib figure with its alt text, which displays the same way everywhere, on light
and on dark pages.

JupyterLab, nbconvert's default template and GitHub ignore alt text in an output's metadata, so the
metadata alone do not suffice. A figure therefore displays as two outputs. The first is the PNG,
with `alt` in the metadata (some front ends read it there) and as ``text/plain``. The second is
`caption`, one thing that the picture shows, as Markdown below the PNG. Both texts are computed from
the plotted data. nbval compares these texts; it does not compare images.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure

from minivllm.viz import palette

#: Inches across; all pictures of a page have the same width.
WIDTH = 9.0
#: Pixels per inch in the file, and on the page: sharp on dense screens.
FILE_DPI, PAGE_DPI = 160, 96
#: Colours in the file. Flat pictures need few, and the file becomes a fourth of the size.
NUM_COLORS = 256


@dataclass(frozen=True)
class Box:
    """A rectangle on a picture: its corner, width and height, in the units of the axes."""

    x: float
    y: float
    width: float
    height: float

    @property
    def corner(self) -> tuple[float, float]:
        return self.x, self.y

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


class Figure(MatplotlibFigure):
    """A figure with `alt` (what it is, and its numbers) and `caption` (one thing to see in it).

    Made without pyplot, so nothing is registered globally, and no cell shows the figure twice.
    """

    def __init__(self, height: float) -> None:
        super().__init__(figsize=(WIDTH, height), facecolor=palette.PAPER)
        FigureCanvasAgg(self)
        self.alt = ""
        self.caption = ""

    def to_png(self, dpi: int = FILE_DPI, *, small: bool = True) -> bytes:
        """The picture as a PNG; its metadata hold the alt text and the caption.

        dpi: pixels per inch. small: spend the time to make the file small.
        """
        from PIL import Image, PngImagePlugin

        from minivllm.viz.themes import adapt

        adapt(self)
        canvas: FigureCanvasAgg = self.canvas  # type: ignore[assignment]
        self.set_dpi(dpi)
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
        info = PngImagePlugin.PngInfo()
        info.add_itxt("Description", f"{self.alt} {self.caption}")
        file = io.BytesIO()
        if small:
            # The only way of Pillow to reduce colours that keeps their opacity.
            image = image.quantize(
                NUM_COLORS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
            )
        image.save(file, "PNG", optimize=small, compress_level=6 if small else 1, pnginfo=info)
        return file.getvalue()

    def mimebundle(self) -> tuple[dict[str, str], dict[str, Any]]:
        """(data, metadata) of the picture as a notebook output."""
        width, height = (round(PAGE_DPI * inches) for inches in self.get_size_inches())
        data = {
            "image/png": base64.b64encode(self.to_png()).decode("ascii"),
            "text/plain": self.alt,
        }
        return data, {"image/png": {"alt": self.alt, "width": width, "height": height}}

    def _ipython_display_(self) -> None:
        show(*self.mimebundle(), self.caption)


def show(
    data: dict[str, Any],
    metadata: dict[str, Any],
    caption: str,
    live: dict[str, Any] | None = None,
) -> None:
    """Display a mimebundle and, below it, its caption.

    live: what a front end with a running kernel shows in place of the caption, by its MIME type.
    """
    from IPython.display import display

    display(data, metadata=metadata, raw=True)
    display({"text/markdown": f"*{caption}*", "text/plain": caption, **(live or {})}, raw=True)


def prepare(ax: Axes | None, height: float) -> tuple[MatplotlibFigure, Axes]:
    """The axes to draw on, and their figure: a new figure of this height unless axes were given."""
    if ax is not None:
        return ax.figure, ax  # type: ignore[return-value]
    figure = Figure(height)
    return figure, figure.add_axes((0.0, 0.0, 1.0, 1.0))


def describe(figure: MatplotlibFigure, alt: str, caption: str) -> None:
    """Set alt text and caption of one of our figures; a caller's own figure is not changed."""
    if isinstance(figure, Figure):
        figure.alt, figure.caption = alt, caption


def plain_axes(ax: Axes) -> None:
    """Set the look of every chart: no frame at the top and on the right, quiet ticks."""
    ax.set_facecolor(palette.PAPER)
    ax.tick_params(colors=palette.SOFT_INK, labelsize=9, length=3)
    ax.spines[["top", "right"]].set_visible(False)
    for spine in ax.spines.values():
        spine.set_color(palette.LINE)


def side_legend(ax: Axes, handles: Sequence[Any], labels: Sequence[str], title: str) -> None:
    """Draw a legend on the right of the axes, with a title in bold."""
    legend = ax.legend(
        handles,
        labels,
        title=title,
        loc="center left",
        bbox_to_anchor=(1.02, 0.55),
        frameon=False,
        fontsize=9.5,
        labelcolor=palette.INK,
        alignment="left",
        handlelength=1.6,
        handleheight=1.2,
        labelspacing=0.7,
    )
    legend.get_title().set(color=palette.INK, fontsize=10.5, fontweight="bold")
