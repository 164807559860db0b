"""`minivllm check`, `minivllm course` and `minivllm course reset`: the exercises, and how far you
are.
"""

from __future__ import annotations

from typing import Annotated

import typer

from minivllm.cli.options import require_number
from minivllm.course.grading import progress
from minivllm.text import printable
from minivllm.viz.terminal import SafeConsole

course_app = typer.Typer(
    help="Show how far you are in the course, and what comes next.", invoke_without_command=True
)


def check(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[NN | PATH | capstone]",
            help=(
                "A chapter (03), an exercise (03.2), its notebook; or all you wrote, as one engine."
            ),
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="How many seconds one cell may take.", min=1.0, max=86400.0)
    ] = 120.0,
) -> None:
    """Check the exercises of a chapter, or of all that were begun. Exits with 0 when all of them
    passed.
    """
    require_number(timeout, "--timeout")
    raise typer.Exit(progress.check(what, _console(), timeout))


@course_app.callback()
def course(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        progress.overview(_console())


@course_app.command()
def reset(
    what: Annotated[
        str, typer.Argument(metavar="NN | PATH", help="The chapter whose exercises to renew.")
    ],
) -> None:
    """Begin a chapter's exercises anew. What you have is kept in another file beside it."""
    fresh, kept = progress.reset(what)
    typer.echo(
        printable(
            f"{fresh.name} is as it came." + (f" What you had is {kept.name}." if kept else "")
        )
    )


def _console() -> SafeConsole:
    """A console that shows everything and obeys nothing: a learner's answer may print anything."""
    return SafeConsole(highlight=True)
