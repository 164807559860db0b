"""The command `minivllm`: generate, chat, serve, demo, trace, bench, check, course, doctor.

Each command is a file of this folder. torch takes seconds to import, so no file of this folder
imports it at its top: a command does when it starts to compute.
"""

from __future__ import annotations

from typing import Annotated

import typer

from minivllm import __version__
from minivllm.cli.bench import app as bench
from minivllm.cli.chat import chat
from minivllm.cli.course import check, course_app
from minivllm.cli.demo import demo
from minivllm.cli.doctor import doctor
from minivllm.cli.generate import generate
from minivllm.cli.serve import serve
from minivllm.cli.stdio import EXIT_CODES, App, Commands, prepare_streams
from minivllm.cli.trace import trace

app = App(
    cls=Commands,
    name="minivllm",
    help=(
        "A vLLM-like inference engine that you can read. Without --model, every command uses the"
        " small model that comes with it."
    ),
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minivllm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    prepare_streams()


app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(demo)
app.command()(trace)
app.add_typer(
    bench, name="bench", short_help="Measure speed. `minivllm bench --help` lists the benchmarks."
)
app.command()(check)
app.add_typer(course_app, name="course")
app.command()(doctor)

if __name__ == "__main__":
    app()
