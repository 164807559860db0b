"""The interactive form of the pictures: the same functions under a slider.

ipywidgets is imported at the first use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from minivllm.engine.trace import Trace
from minivllm.viz.block_table import busiest_step, check_step, draw_block_table
from minivllm.viz.figure import Figure, show

logger = logging.getLogger(__name__)

STILL = "Without a running kernel you see a still of {}; in JupyterLab, run the cell to scrub."
#: Milliseconds from step to step when the pictures are played. A slower machine skips steps.
PLAY_INTERVAL = 150
#: Pixels per inch of the pictures under the slider. Fewer than in a file, so that they come sooner.
LIVE_DPI = 110
WIDGET_MIMETYPE = "application/vnd.jupyter.widget-view+json"


class Scrubber:
    """A picture with a slider over the steps of a trace.

    Where a kernel is alive, JupyterLab shows the slider. Elsewhere the static picture of the same
    output shows: on GitHub, in nbconvert, or in a closed notebook whose widget output
    `minivllm.course.authoring.tool` removed.
    """

    def __init__(self, trace: Trace, draw: Callable[..., Figure], step: int) -> None:
        self.trace, self.draw, self.step = trace, draw, step
        # An engine counts its steps from 0, a lesson from 1.
        self._first: int = getattr(trace, "first_step", 0)
        # What the slider counts, where it is not steps.
        self._name: str = getattr(trace, "step_name", "step")
        self.figure = lru_cache(maxsize=256)(lambda step: draw(trace, step=step))
        self.png = lru_cache(maxsize=256)(
            lambda step: self.figure(step).to_png(LIVE_DPI, small=False)
        )

    def widget(self) -> Any:
        """The ipywidgets box: a play button, a slider, the picture and its caption."""
        import ipywidgets

        width = {"width": "100%", "max_width": "900px"}
        image = ipywidgets.Image(format="png", layout=width)
        caption = ipywidgets.HTML()
        first, last = self._first, self._first + len(self.trace.steps) - 1
        slider = ipywidgets.IntSlider(
            first + self.step, first, last, description=self._name, layout={"width": "420px"}
        )
        slider.style = {"description_width": "initial"}
        play = ipywidgets.Play(value=first + self.step, min=first, max=last, interval=PLAY_INTERVAL)
        ipywidgets.jslink((play, "value"), (slider, "value"))

        def update(step: int) -> None:
            image.value = self.png(step)
            caption.value = f"<em>{self.figure(step).caption}</em>"

        slider.observe(lambda change: update(change["new"] - first), "value")
        update(self.step)
        return ipywidgets.VBox([ipywidgets.HBox([play, slider]), image, caption])

    def _ipython_display_(self) -> None:
        figure, live = self.figure(self.step), {}
        data, metadata = figure.mimebundle()
        try:
            data |= _only_widget(self.widget())
            live = _nothing()
        except ImportError:
            logger.warning(
                "ipywidgets is not installed, so the picture stands still: pip install ipywidgets"
            )
        data["text/plain"] = f"{figure.alt} {figure.caption}"
        number = self._first + self.step
        what = f"step {number}" if self._name == "step" else f"{number} {self._name}"
        show(data, metadata, STILL.format(what), live)


def _only_widget(widget: Any) -> dict[str, Any]:
    return {WIDGET_MIMETYPE: widget._repr_mimebundle_()[WIDGET_MIMETYPE]}


def _nothing() -> dict[str, Any]:
    """A widget without content.

    It takes the place of the sentence about a missing kernel where a kernel is running.
    """
    import ipywidgets

    return _only_widget(ipywidgets.Box(layout={"display": "none"}))


def scrub(
    trace: Trace, draw: Callable[..., Figure] = draw_block_table, step: int | None = None
) -> Scrubber:
    """Show a picture of the trace with a slider over its steps, and a play button.

    draw: a function of this package that takes ``(trace, step=...)``. step: the first step to show;
    None is the step with the most blocks in use.
    """
    return Scrubber(trace, draw, busiest_step(trace) if step is None else check_step(trace, step))
