"""A page to keep: which engine this is, and whose."""

from __future__ import annotations

import datetime
import html
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.course.grading.capstone.pieces import PIECES
from minivllm.course.grading.capstone.requests import QUESTION
from minivllm.files import write_atomically

if TYPE_CHECKING:
    from minivllm.course.grading.capstone.examine import Report

PAGE = "exercises/my_engine.html"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8886; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
blockquote { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid #009E73; }
"""


def write_page(root: Path, report: Report) -> Path:
    """Write the page of an engine that passed, and return its path. OSError where it cannot be."""
    path = root / PAGE
    write_atomically(path, render(report, datetime.date.today()))
    return path


def render(report: Report, date: datetime.date) -> str:
    """The page as HTML, with nothing to load from elsewhere."""
    rows = "".join(
        f"<tr><td>{html.escape(piece.name)}</td><td><code>{piece.answer}</code></td>"
        f"<td>{report.found[piece.answer]}</td>"
        f'<td class="number">{report.lines.get(piece.answer, 0):,}</td>'
        f'<td class="number">{report.calls.get(piece.answer, 0):,}</td></tr>\n'
        for piece in PIECES
    )
    num_lines = sum(report.lines.get(piece.answer, 0) for piece in PIECES)
    speed = f"<p>{html.escape(report.speed.text())}</p>" if report.speed else ""
    machine = html.escape(f"{platform.machine()}, Python {platform.python_version()}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The engine that I wrote</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>The engine that I wrote</h1>
<p>{date.isoformat()} · {num_lines:,} lines of my own in {len(PIECES)} pieces · {machine}</p>
<p>All {report.num_tokens:,} tokens of three rounds of requests equal those of minivllm's own
engine, and none of its own pieces ran in these places.</p>
<table>
<tr><th>piece</th><th>my code</th><th>exercise</th><th class="number">lines</th>
<th class="number">calls</th></tr>
{rows}</table>
{speed}
<p>I asked it: {html.escape(QUESTION)}</p>
<blockquote>{html.escape(report.text)}</blockquote>
</body>
</html>
"""
