"""The HTML around the player's program."""

from __future__ import annotations

import html
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from minivllm.engine.trace import Trace
from minivllm.files import write_atomically
from minivllm.viz import palette
from minivllm.viz.player.pack import pack

#: Stands in place of the player on a page that keeps frames out; the player removes it.
NOTE = (
    "Here plays a run of the engine, where a page may run programs: in JupyterLab, in VS Code, and"
    " on the course's site."
)


@cache
def source(name: str) -> str:
    """The text of a file of this folder."""
    return files("minivllm.viz.player").joinpath(name).read_text(encoding="utf-8")


def as_script(data: Any) -> str:
    """JSON that may stand inside a <script> element, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def player_options(**more: Any) -> dict[str, Any]:
    """The options of `MinivllmPlayer` in player.js."""
    return {"colors": list(palette.REQUESTS), **more}


def page(trace: Trace, title: str = "minivllm at work", step: int | None = None) -> str:
    """One self-contained HTML page that plays a trace.

    title: its heading. step: the first step to show, counted from 0; None: the first. The address
    of a step is the page's own with ``#step=12``.
    """
    data = as_script(
        {
            "trace": pack(trace),
            "options": player_options(title=title, step=step or 0, wholePage=True),
        }
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; background: light-dark(#ffffff, #14171f); }}
{source("player.css")}</style>
</head>
<body>
<main id="player"><noscript>The player needs JavaScript.</noscript></main>
<script>
{source("run.js")}
{source("player.js")}
(() => {{
  const {{ trace, options }} = {data};
  window.player = new MinivllmPlayer(document.getElementById("player"), trace, options);
}})();
</script>
</body>
</html>
"""


def write_page(trace: Trace, path: str | Path, title: str = "minivllm at work") -> None:
    """Write `page` to a file. Raises OSError, and then keeps the old file at path."""
    write_atomically(path, page(trace, title))


class Player:
    """The player as the output of a notebook's cell.

    It lies in a frame of its own, so that it works without a kernel, in VS Code, and on a web page,
    and no style of the page reaches it. It is light or dark as the page is. height: of the frame,
    in CSS pixels.
    """

    def __init__(
        self, trace: Trace, title: str = "", step: int | None = None, height: int = 760
    ) -> None:
        self.trace, self.title, self.step, self.height = trace, title, step, height

    def _repr_html_(self) -> str:
        title = self.title or "A run of the engine"
        # The page stands in the attribute itself: a frame of a data: address is blocked in VS Code.
        whole = html.escape(page(self.trace, title, self.step))
        return (
            f'<div><p class="mv-note"><em>{NOTE}</em></p>'
            f'<iframe title="{html.escape(title)}" srcdoc="{whole}" loading="lazy"'
            f' style="width: 100%; height: {self.height}px; border: 0"></iframe></div>'
        )

    def __repr__(self) -> str:
        return f"Player({len(self.trace.steps)} steps)"


def play(trace: Trace, title: str = "", step: int | None = None, height: int = 760) -> Player:
    """The player of a trace, for the last line of a cell."""
    return Player(trace, title, step, height)
