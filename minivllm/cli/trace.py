"""`minivllm trace`: a record of every engine step, saved as JSON and printed as a table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from minivllm.cli.options import (
    ChatOrRaw,
    Engine,
    MaxTokens,
    Model,
    Seed,
    System,
    Temperature,
    open_llm,
)
from minivllm.cli.prompts import prompts_from_stdin, render_all, say_refused, serve
from minivllm.cli.stdio import USER_ERROR
from minivllm.engine.trace import Trace
from minivllm.errors import ConfigError, RequestError
from minivllm.files import reason, require_writable, write_atomically
from minivllm.sampling_params import SamplingParams
from minivllm.text import printable
from minivllm.viz.terminal import SafeConsole, step_table


def trace(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to record: one prompt or several."),
    ] = None,
    show: Annotated[
        Path | None, typer.Option("--show", help="Print a saved trace instead of recording one.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to save the record.")] = Path(
        "trace.json"
    ),
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Also write a page that plays the record in any browser."),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option("--svg", help="Also write an animated picture of the first 200 steps."),
    ] = None,
    every_step: Annotated[
        bool,
        typer.Option(
            "--every-step", help="A row for every step, also for those that change nothing."
        ),
    ] = False,
    model: Model = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    chat: ChatOrRaw = None,
    system: System = None,
    engine: Engine = None,
) -> None:
    """Record what the engine does at every step, save it as JSON for minivllm.viz, and print it as
    a table.
    """
    pictures = _Pictures(html, svg)
    if show is not None:
        if prompts:
            raise typer.BadParameter("--show prints a saved trace and takes no prompts.")
        saved = _load_trace(show)
        pictures.write(saved)
        _print_trace(saved, every_step)
        return
    prompts = prompts or prompts_from_stdin()
    require_writable(out, "The trace")
    pictures.require()
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm = open_llm(model, engine, trace=True)
    inputs = render_all(llm, prompts, chat, system)
    refused = 0
    for index, piece in serve(llm, inputs, [params] * len(prompts), stream=False):
        if isinstance(piece, RequestError):
            say_refused(piece, index, len(prompts))
            refused += 1
    if refused < len(prompts):
        try:
            save_trace(llm.trace, out)
            pictures.write(llm.trace)
        finally:  # a full disk must not lose what was recorded
            _print_trace(llm.trace, every_step)
    if refused:
        raise typer.Exit(USER_ERROR)


@dataclass(frozen=True)
class _Pictures:
    """Files to write beside the trace: a page that plays it, and a film."""

    html: Path | None
    svg: Path | None

    def require(self) -> None:
        """Raise `ConfigError` before the run where a file could not be written after it."""
        if self.html is not None:
            require_writable(self.html, "The page")
        if self.svg is not None:
            require_writable(self.svg, "The picture")

    def write(self, trace: Trace) -> None:
        if self.html is not None:
            save_page(trace, self.html)
        if self.svg is not None:
            save_film(trace, self.svg)


def _load_trace(path: Path) -> Trace:
    return Trace.load(path)


def _print_trace(trace: Trace, every_step: bool) -> None:
    # For a file or a pipe, the table is as wide as it needs to be.
    SafeConsole(width=None if sys.stdout.isatty() else 160).print(step_table(trace, every_step))


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace as JSON and say where. Raises `ConfigError`."""
    try:
        trace.save(path)
    except OSError as error:
        raise ConfigError(f"The trace cannot be written to {path}: {reason(error)}.") from error
    said = f"Trace of {len(trace.steps)} steps saved to {path}; minivllm trace --show {path}"
    typer.secho(printable(said), dim=True, err=True)


def save_page(trace: Trace, path: Path, title: str = "minivllm at work") -> None:
    """Write the page that plays a trace, and say where. Raises `ConfigError`."""
    from minivllm.viz.player import write_page

    try:
        write_page(trace, path, title)
    except OSError as error:
        raise ConfigError(f"The page cannot be written to {path}: {reason(error)}.") from error
    said = f"A page that plays the {len(trace.steps)} steps: {path}. Open it in any browser."
    typer.secho(printable(said), dim=True, err=True)


def save_film(trace: Trace, path: Path) -> None:
    """Write the animated picture of a trace, and say where. Raises `ConfigError`."""
    from minivllm.viz.player.animated import animated_svg

    try:
        write_atomically(path, animated_svg(trace, last=200))
    except OSError as error:
        raise ConfigError(f"The picture cannot be written to {path}: {reason(error)}.") from error
    typer.secho(printable(f"An animated picture of the run: {path}"), dim=True, err=True)
