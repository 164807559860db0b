"""The command `minivllm`: generate, chat, demo, trace, bench, check, course, doctor.

torch takes seconds to import, so it is imported by the commands that compute, when they start to.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from minivllm import __version__
from minivllm.cli.stdio import (
    EXIT_CODES,
    USER_ERROR,
    App,
    Commands,
    complain,
    note,
    prepare_streams,
    read_all,
)
from minivllm.cli.stdio import write as _write
from minivllm.errors import ConfigError, RequestError
from minivllm.files import reason, require_writable
from minivllm.text import is_unicode, one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

    from minivllm.engine.trace import Trace
    from minivllm.llm import LLM
    from minivllm.sampling_params import SamplingParams


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

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A model directory, or a Hugging Face id such as Qwen/Qwen3-0.6B.",
        show_default="bundled",
    ),
]
Engine = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        "-e",
        metavar="OPTION=VALUE",
        help=(
            "An engine option by its Python name, e.g. -e block_size=16 -e seed=1. May be repeated."
        ),
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 always takes the most likely token.")
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", help="Keep the most likely tokens that have this probability together."
    ),
]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0 keeps all.")]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", help="Drop tokens below this share of the likeliest one's probability."
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same text again.", min=0)
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text. May be repeated."),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Send the prompt as a chat message, or let the model continue the bare text.",
        show_default="chat if the model has a chat template",
    ),
]
System = Annotated[
    str | None, typer.Option("--system", "-s", help="The system message that begins the chat.")
]


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


# --- generate -------------------------------------------------------------------------------------


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="One prompt or several; standard input if none."),
    ] = None,
    model: Model = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    chat: Chat = None,
    system: System = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or when done.")
    ] = True,
    stats: Annotated[
        bool, typer.Option("--stats", help="At the end, say how long it took (on stderr).")
    ] = False,
    engine: Engine = None,
) -> None:
    """Answer or continue prompts. Several prompts run as one batch, and are printed in their
    order.
    """
    prompts = prompts or _prompts_from_stdin()
    params = _sampling_params(max_tokens, temperature, top_p, top_k, min_p, seed, stop)
    start = time.perf_counter()
    llm = _open_llm(model, engine)
    inputs = _render_all(llm, prompts, chat, system)
    seeded = [
        params if seed is None else replace(params, seed=seed + i) for i in range(len(prompts))
    ]
    first_text, current, refused = None, -1, 0
    for index, piece in _serve(llm, inputs, seeded, stream):
        while current < index:
            current += 1
            if len(prompts) > 1:
                _write(f"{'' if current == 0 else chr(10) * 2}--- {one_line(prompts[current])}\n")
        if isinstance(piece, RequestError):
            _say_refused(piece, index, len(prompts))
            refused += 1
            continue
        if piece and first_text is None:
            first_text = time.perf_counter() - start
        _write(piece)
    _write("\n")
    if stats:
        _print_stats(llm, first_text)
    if refused:
        raise typer.Exit(USER_ERROR)


def _print_stats(llm: LLM, first_text: float | None) -> None:
    metrics = llm.metrics()
    first = (
        "no text"
        if first_text is None
        else f"first text {first_text:.2f} s after the start, loading included"
    )
    typer.secho(
        f"{metrics.num_generated_tokens} tokens in {metrics.step_time:.2f} s of {metrics.num_steps}"
        f" steps ({metrics.num_generated_tokens / max(metrics.step_time, 1e-9):.0f} tokens/s);"
        f" {first}; {metrics.prefix_cache_hits} of {metrics.prefix_cache_queries} prompt tokens"
        " from the prefix cache",
        dim=True,
        err=True,
    )


def _prompts_from_stdin() -> list[str]:
    text = read_all().strip()
    if not text:
        raise typer.BadParameter(
            'Give a prompt, e.g. minivllm generate "Tell me a story about a fox."'
        )
    if not is_unicode(text):
        raise typer.BadParameter("Standard input is not text in UTF-8.")
    return [text]


def _serve(
    llm: LLM, inputs: list[Any], params: list[SamplingParams], stream: bool
) -> Iterator[tuple[int, str | RequestError]]:
    """(prompt, a piece of its text) as it comes; the second prompt's only when the first has ended.

    Prompts run as one batch. In the place of one that is refused comes its error; the others are
    not harmed by it.
    stream: whether a text comes in pieces, or when it is done.
    """
    from tqdm.auto import tqdm

    from minivllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    pieces: list[list[str | RequestError]] = [[] for _ in inputs]
    ended, position_of = [False] * len(inputs), {}
    for position, prompt in enumerate(inputs):
        try:
            if isinstance(prompt, RequestError):
                raise prompt
            request_id = llm.llm_engine.add_request(
                prompt, replace(params[position], output_kind=kind)
            )
            position_of[request_id] = position
        except RequestError as error:
            pieces[position], ended[position] = [error], True
    current = 0
    with tqdm(
        total=len(inputs), initial=sum(ended), disable=stream or not sys.stderr.isatty(), unit="req"
    ) as bar:
        while current < len(inputs):
            yield from ((current, piece) for piece in pieces[current])
            pieces[current] = []
            if ended[current]:
                current += 1
                continue
            for output in llm.llm_engine.step():
                position = position_of[output.request_id]
                pieces[position] += (
                    [output.outputs[0].text] if output.error is None else [output.error]
                )
                ended[position] = output.finished or output.error is not None
                bar.update(ended[position])


def _say_refused(error: RequestError, index: int, count: int) -> None:
    """One of several has a line in the place of its text; a single one ends the command."""
    if count == 1:
        raise error
    complain(f"Error: prompt {index + 1} of {count} was refused: {error}")


# --- chat -----------------------------------------------------------------------------------------


@app.command()
def chat(
    model: Model = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    system: System = None,
    engine: Engine = None,
) -> None:
    """Talk with the model. Questions may also be piped in, one per line."""
    from minivllm.cli.chat import HELP, Chat

    params = _sampling_params(max_tokens, temperature, top_p, top_k, min_p, seed, None)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    llm = _open_llm(model, engine)
    conversation = Chat(llm, params, system, interactive)
    if interactive:
        note(f"Chatting with {one_line(_model_name(llm))}. {HELP}")
    conversation.run()


# --- demo, trace, bench, check, course, doctor ----------------------------------------------------


@app.command()
def demo(
    model: Model = None,
    pace: Annotated[
        float | None,
        typer.Option(
            help="How many seconds each step stays on the screen, at least; 0 is full speed.",
            min=0.0,
            max=3600.0,
            show_default="0.05",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also save the trace to this file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the busiest step into this file, as SVG.")
    ] = None,
    engine: Engine = None,
) -> None:
    """Watch the engine serve a batch of prompts: its block tables, its KV cache, and the texts as
    they come.
    """
    from minivllm.cli.demo import run_demo

    if out is not None:
        require_writable(out, "The trace")
    if picture is not None:
        require_writable(picture, "The picture")
    if pace is not None:
        _require_number(pace, "--pace")
    trace = run_demo(lambda options: _open_llm(model, engine, **options), pace, picture)
    if out is not None:
        _save_trace(trace, out)


@app.command()
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
    chat: Chat = None,
    system: System = None,
    engine: Engine = None,
) -> None:
    """Record what the engine does at every step, save it as JSON for minivllm.viz, and print it as
    a table.
    """
    if show is not None:
        if prompts:
            raise typer.BadParameter("--show prints a saved trace and takes no prompts.")
        _print_trace(_load_trace(show), every_step)
        return
    prompts = prompts or _prompts_from_stdin()
    require_writable(out, "The trace")
    params = _sampling_params(max_tokens, temperature, 1.0, 0, 0.0, seed, None)
    llm = _open_llm(model, engine, trace=True)
    inputs = _render_all(llm, prompts, chat, system)
    refused = 0
    for index, piece in _serve(llm, inputs, [params] * len(prompts), stream=False):
        if isinstance(piece, RequestError):
            _say_refused(piece, index, len(prompts))
            refused += 1
    if refused < len(prompts):
        try:
            _save_trace(llm.trace, out)
        finally:  # a full disk must not lose what was recorded
            _print_trace(llm.trace, every_step)
    if refused:
        raise typer.Exit(USER_ERROR)


def _save_trace(trace: Trace, path: Path) -> None:
    try:
        trace.save(path)
    except OSError as error:
        raise ConfigError(f"The trace cannot be written to {path}: {reason(error)}.") from error
    said = f"Trace of {len(trace.steps)} steps saved to {path}; minivllm trace --show {path}"
    typer.secho(printable(said), dim=True, err=True)


def _load_trace(path: Path) -> Trace:
    from minivllm.engine.trace import Trace

    return Trace.load(path)


def _print_trace(trace: Trace, every_step: bool) -> None:
    from minivllm.viz.terminal import SafeConsole, step_table

    # For a file or a pipe, the table is as wide as it needs to be.
    SafeConsole(width=None if sys.stdout.isatty() else 160).print(step_table(trace, every_step))


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    options_metavar="",
)
def bench(
    ctx: typer.Context,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="COMMAND [ARGS]...")] = None,
) -> None:
    """Measure speed. `minivllm bench --help` lists the benchmarks."""
    from minivllm.cli.bench import app as bench_app

    bench_app(args=[*(arguments or []), *ctx.args], prog_name="minivllm bench")


@app.command()
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
    from minivllm.course import progress

    _require_number(timeout, "--timeout")
    raise typer.Exit(progress.check(what, _console(), timeout))


def _console() -> Console:
    """For what the course says: a learner's answer, and its errors, may hold anything."""
    from minivllm.viz.terminal import SafeConsole

    return SafeConsole(highlight=True)


course_app = typer.Typer(
    help="Show how far you are in the course, and what comes next.", invoke_without_command=True
)
app.add_typer(course_app, name="course")


@course_app.callback()
def course(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        from minivllm.course import progress

        progress.overview(_console())


@course_app.command()
def reset(
    what: Annotated[
        str, typer.Argument(metavar="NN | PATH", help="The chapter whose exercises to renew.")
    ],
) -> None:
    """Begin a chapter's exercises anew. What you have is kept in another file beside it."""
    from minivllm.course import progress

    fresh, kept = progress.reset(what)
    typer.echo(
        printable(
            f"{fresh.name} is as it came." + (f" What you had is {kept.name}." if kept else "")
        )
    )


@app.command()
def doctor() -> None:
    """Look at what is installed here, say what it means for the course, and how to repair what is
    broken.
    """
    from minivllm.cli.doctor import run_doctor

    raise typer.Exit(run_doctor())


# --- shared ---------------------------------------------------------------------------------------


def _open_llm(model: str | None, engine: list[str] | None, **options: Any) -> LLM:
    chosen = _engine_options(engine)
    if options.get("trace") and not chosen.get("trace", True):
        raise ConfigError(
            "--engine trace=off: this command records a trace; leave that option out."
        )
    try:
        from minivllm.llm import LLM
    except ImportError as error:
        raise ConfigError(
            f"{error}. `minivllm doctor` says what is missing and how to get it."
        ) from error
    return LLM(model, **{**options, **chosen})


def _engine_options(assignments: list[str] | None) -> dict[str, Any]:
    """``["block_size=16"]`` -> ``{"block_size": 16}``: read as the types that `EngineConfig`
    declares.
    """
    from minivllm.config import EngineConfig

    known, types = [field.name for field in fields(EngineConfig)], get_type_hints(EngineConfig)
    options = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            near = get_close_matches(name, known, 1) if equals else []
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"--engine {assignment}: write OPTION=VALUE; the options are"
                f" {', '.join(known)}.{meant}"
            )
        try:
            options[name] = _as_option(value.strip(), types[name])
        except ValueError as error:
            raise ConfigError(f"--engine {assignment}: {name} is {error}.") from None
    return options


_WORDS = {
    "on": True,
    "yes": True,
    "true": True,
    "1": True,
    "off": False,
    "no": False,
    "false": False,
    "0": False,
}


def _as_option(value: str, kind: Any) -> Any:
    """A typed word as a value of this type. ValueError says what is wanted: "on or off"."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in members and value.lower() in ("none", "null", "auto"):
        return None
    if bool in members and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for number in (int, float):
        if number in members:
            try:
                return number(value)
            except ValueError:
                pass
    if str in members or not {bool, int, float} & set(members):
        return value
    names = {bool: "on or off", int: "a whole number", float: "a number", type(None): "none"}
    raise ValueError(" or ".join(names[member] for member in names if member in members))


def _require_number(value: float, option: str) -> None:
    """NaN passes every comparison with a bound."""
    if math.isnan(value):
        raise typer.BadParameter(f"{option} is a number of seconds, not {value}.")


def _sampling_params(
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int | None,
    stop: list[str] | None,
) -> SamplingParams:
    from minivllm.sampling_params import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )


def _render_all(
    llm: LLM, prompts: list[str], chat: bool | None, system: str | None
) -> list[str | list[int] | RequestError]:
    """What the engine is to see: bare text, or a chat's token ids; or why there is none."""
    if chat is False and system is not None:
        raise ConfigError("--system needs a chat; --raw continues the bare text.")
    rendered: list[str | list[int] | RequestError] = []
    for prompt in prompts:
        try:
            rendered.append(prompt if chat is False else _render(llm, prompt, chat, system))
        except RequestError as error:
            rendered.append(error)
    return rendered


def _render(llm: LLM, prompt: str, chat: bool | None, system: str | None) -> str | list[int]:
    opening = [{"role": "system", "content": system}] if system else []
    try:
        return llm.render_chat([*opening, {"role": "user", "content": prompt}])
    except ConfigError as error:
        if (
            chat or system is not None or "no chat template" not in str(error)
        ):  # a broken one is no reason to do without
            raise
        return prompt


def _model_name(llm: LLM) -> str:
    from minivllm.bundled import BUNDLED_MODEL_PATH

    path = llm.llm_engine.model_path
    return "the bundled model" if path == BUNDLED_MODEL_PATH else path.name


if __name__ == "__main__":
    app()
