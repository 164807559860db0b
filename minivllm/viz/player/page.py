"""The HTML around the player's program."""

from __future__ import annotations

import base64
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


@cache
def _source(name: str) -> str:
    return files("minivllm.viz.player").joinpath(name).read_text(encoding="utf-8")


def _as_script(data: Any) -> str:
    """JSON that may stand inside a <script> element, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _options(**more: Any) -> dict[str, Any]:
    return {"colors": list(palette.REQUESTS), **more}


def page(trace: Trace, title: str = "minivllm at work", step: int | None = None) -> str:
    """One self-contained HTML page that plays a trace.

    title: its heading. step: the first step to show, counted from 0; None: the first. The address
    of a step is the page's own with ``#step=12``.
    """
    data = _as_script({"trace": pack(trace), "options": _options(title=title, step=step or 0)})
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
{_source("player.css")}</style>
</head>
<body>
<main id="player"><noscript>The player needs JavaScript.</noscript></main>
<script>
{_source("player.js")}
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
    and no style of the page reaches it. height: of the frame, in CSS pixels.
    """

    def __init__(
        self, trace: Trace, title: str = "", step: int | None = None, height: int = 760
    ) -> None:
        self.trace, self.title, self.step, self.height = trace, title, step, height

    def _repr_html_(self) -> str:
        whole = page(self.trace, self.title or "A run of the engine", self.step)
        # As a data address, the page has an origin of its own and cannot touch the notebook.
        address = base64.b64encode(whole.encode()).decode()
        return (
            f'<iframe title="{html.escape(self.title or "A run of the engine")}"'
            f' src="data:text/html;base64,{address}" loading="lazy" style="width: 100%;'
            f' height: {self.height}px; border: 0"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Player({len(self.trace.steps)} steps)"


def play(trace: Trace, title: str = "", step: int | None = None, height: int = 760) -> Player:
    """The player of a trace, for the last line of a cell."""
    return Player(trace, title, step, height)
