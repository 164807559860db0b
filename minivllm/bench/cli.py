"""`minivllm bench`: commands that measure. Imported only when one of them is called."""

from __future__ import annotations

import typer

app = typer.Typer(help="Measure speed, and print what was measured on which machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed, and print what was measured on which machine."""
