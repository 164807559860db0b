"""The command `minivllm`: generate, chat, demo, trace, bench, check, course, doctor.

torch takes seconds to import, so it is imported by the commands that compute, when they start to.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from minivllm import __version__
from minivllm.errors import ConfigError, MiniVLLMError

if TYPE_CHECKING:
    from minivllm.engine.trace import Trace
    from minivllm.llm import LLM
    from minivllm.sampling_params import SamplingParams

#: Exit code for what the caller can put right.
USER_ERROR = 2


class _Commands(TyperGroup):
    """Shows errors that minivllm raises on purpose as one line, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MiniVLLMError as error:
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(USER_ERROR) from error


app = typer.Typer(
    cls=_Commands,
    name="minivllm",
    help="A vLLM-like inference engine that you can read. Without --model, every command uses the small bundled model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A model directory, or a Hugging Face id such as Qwen/Qwen3-0.6B.", show_default="bundled"
    ),
]
Engine = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        "-e",
        metavar="OPTION=VALUE",
        help="An engine option under its Python name, e.g. -e block_size=16 -e num_kv_blocks=64. May be repeated.",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens that together have this probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens less likely than this share of the likeliest.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Other seeds give other texts; the same seed, the same text.", min=0)
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text. May be repeated.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Put the prompt to the model as a chat message, or let it continue the bare text.",
        show_default="chat if the model has a chat template",
    ),
]
System = Annotated[str | None, typer.Option("--system", "-s", help="A system message to begin the chat with.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minivllm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# --- generate -----------------------------------------------------------------------------------------------------


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="One prompt or several; standard input if none.")
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
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or when done.")] = True,
    stats: Annotated[bool, typer.Option("--stats", help="At the end, say how long it took (on stderr).")] = False,
    engine: Engine = None,
) -> None:
    """Answer or continue prompts. Several prompts run as one batch and are printed in their order."""
    prompts = prompts or _prompts_from_stdin()
    params = _sampling_params(max_tokens, temperature, top_p, top_k, min_p, seed, stop)
    start = time.perf_counter()
    llm = _open_llm(model, engine)
    inputs = [_render(llm, prompt, chat, system) for prompt in prompts]
    seeded = [params if seed is None else replace(params, seed=seed + i) for i in range(len(prompts))]
    texts = _in_order(llm, inputs, seeded) if stream else _all_at_once(llm, inputs, seeded)
    first_text = None
    current = -1
    for index, text in texts:
        while current < index:
            current += 1
            if len(prompts) > 1:
                _write(f"{'' if current == 0 else chr(10) * 2}--- {_one_line(prompts[current])}\n")
        if text and first_text is None:
            first_text = time.perf_counter() - start
        _write(text)
    _write("\n")
    if stats:
        metrics = llm.metrics()
        typer.secho(
            f"{metrics.num_generated_tokens} tokens in {metrics.step_time:.2f} s of {metrics.num_steps} steps "
            f"({metrics.num_generated_tokens / metrics.step_time:.0f} tokens/s); first text {first_text or 0.0:.2f} s "
            f"after the start, loading included; {metrics.prefix_cache_hits} of {metrics.prefix_cache_queries} prompt "
            "tokens from the prefix cache",
            dim=True,
            err=True,
        )


def _prompts_from_stdin() -> list[str]:
    text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
    if not text:
        raise typer.BadParameter('Give a prompt, e.g. minivllm generate "Tell me a story about a fox."')
    return [text]


def _in_order(llm: LLM, inputs: list[Any], params: list[SamplingParams]) -> Iterator[tuple[int, str]]:
    """(prompt, text) as it comes, but the second prompt's only when the first has ended, and so on."""
    waiting: list[list[str]] = [[] for _ in inputs]
    ended = [False] * len(inputs)
    current = 0
    for output in llm.stream(inputs, params):
        ended[output.prompt_index] |= output.finish_reason is not None
        if output.prompt_index == current:
            yield current, output.text
        else:
            waiting[output.prompt_index].append(output.text)
        while ended[current] and current + 1 < len(inputs):
            current += 1
            yield current, "".join(waiting[current])


def _all_at_once(llm: LLM, inputs: list[Any], params: list[SamplingParams]) -> Iterator[tuple[int, str]]:
    for index, output in enumerate(llm.generate(inputs, params, use_tqdm=sys.stderr.isatty())):
        if output.error is not None:
            raise output.error
        yield index, output.outputs[0].text


# --- chat ---------------------------------------------------------------------------------------------------------

CHAT_HELP = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


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
    """Talk with the model. Questions may also be piped in, one a line."""
    params = _sampling_params(max_tokens, temperature, top_p, top_k, min_p, seed, None)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        import readline  # noqa: F401 (gives input() its line editing)
    llm = _open_llm(model, engine)
    opening = [{"role": "system", "content": system}] if system else []
    llm.render_chat([*opening, {"role": "user", "content": "."}])  # a model without a template says so at once
    messages = list(opening)
    if interactive:
        typer.secho(f"Chatting with {_model_name(llm)}. {CHAT_HELP}", dim=True)
    while (line := _read_line(interactive)) is not None:
        command = line.strip()
        if command in ("/exit", "/quit"):
            break
        elif command == "/reset":
            messages = list(opening)
            _note("The conversation begins anew.", interactive)
        elif command.startswith("/"):
            _note(CHAT_HELP, True)
        elif command:
            messages.append({"role": "user", "content": command})
            answer = _answer(llm, messages, len(opening), params, interactive)
            messages.append({"role": "assistant", "content": answer})


def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end. Ctrl-C drops the line that is being typed."""
    while True:
        try:
            return input("\n> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            _note(f"\n{CHAT_HELP}", True)


def _answer(
    llm: LLM, messages: list[dict[str, str]], num_opening: int, params: SamplingParams, interactive: bool
) -> str:
    """Stream the answer to the last message, and return it. Forgets the oldest turns when the context is full."""
    config = llm.llm_engine.config
    limit = min(config.max_model_len, config.num_kv_blocks * config.block_size)
    room = min(params.max_tokens, limit // 4)
    prompt = llm.render_chat(messages)
    while len(prompt) + room > limit and len(messages) > num_opening + 2:
        del messages[num_opening : num_opening + 2]
        prompt = llm.render_chat(messages)
        _note("(The context is full: the oldest turn is forgotten.)", True)
    params = replace(params, max_tokens=max(1, min(params.max_tokens, limit - len(prompt))))
    before, start, parts = llm.metrics(), time.perf_counter(), []
    stream = llm.stream(prompt, params)
    with _interrupts() as interrupted:
        for output in stream:
            parts.append(output.text)
            _write(output.text)
            if interrupted():
                stream.close()  # which aborts the request
                _note(" (stopped)", interactive, newline=False)
                break
    _write("\n")
    after, elapsed = llm.metrics(), time.perf_counter() - start
    num_tokens = after.num_generated_tokens - before.num_generated_tokens
    hits = after.prefix_cache_hits - before.prefix_cache_hits
    _note(
        f"{num_tokens} tokens in {elapsed:.1f} s; {hits} of {len(prompt)} prompt tokens from the prefix cache",
        interactive,
    )
    return "".join(parts)


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Yields a function that says whether Ctrl-C was pressed. A step is never cut in two; a second Ctrl-C leaves."""
    pressed = False

    def on_interrupt(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


# --- demo, trace, bench, check, course, doctor ----------------------------------------------------------------------


@app.command()
def demo(
    model: Model = None,
    pace: Annotated[
        float | None,
        typer.Option(help="Least seconds a step stays on the screen; 0 is full speed.", min=0.0, show_default="0.05"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also save the trace to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the step in which most happens, as SVG, to this file.")
    ] = None,
    engine: Engine = None,
) -> None:
    """Watch the engine serve a batch of prompts: its block tables, its KV cache, and the texts as they come."""
    from minivllm.demo import run_demo

    trace = run_demo(lambda options: _open_llm(model, engine, **options), pace, picture)
    if out is not None:
        _save_trace(trace, out)


@app.command()
def trace(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to record: one prompt or several.")
    ] = None,
    show: Annotated[Path | None, typer.Option("--show", help="Print a saved trace instead of recording one.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to save the record.")] = Path("trace.json"),
    every_step: Annotated[
        bool, typer.Option("--every-step", help="A row for every step, also for those that change nothing.")
    ] = False,
    model: Model = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    chat: Chat = None,
    system: System = None,
    engine: Engine = None,
) -> None:
    """Record what the engine does at every step, save it as JSON for minivllm.viz, and print it as a table."""
    if show is not None:
        if prompts:
            raise typer.BadParameter("--show prints a saved trace and takes no prompts.")
        _print_trace(_load_trace(show), every_step)
        return
    prompts = prompts or _prompts_from_stdin()
    params = _sampling_params(max_tokens, temperature, 1.0, 0, 0.0, seed, None)
    llm = _open_llm(model, engine, trace=True)
    for _ in _all_at_once(llm, [_render(llm, prompt, chat, system) for prompt in prompts], [params] * len(prompts)):
        pass
    _save_trace(llm.trace, out)
    _print_trace(llm.trace, every_step)


def _save_trace(trace: Trace, path: Path) -> None:
    try:
        trace.save(path)
    except OSError as error:
        raise ConfigError(f"The trace cannot be written to {path}: {error.strerror}.") from error
    typer.secho(f"Trace of {len(trace.steps)} steps saved to {path}; minivllm trace --show {path}", dim=True, err=True)


def _load_trace(path: Path) -> Trace:
    from minivllm.engine.trace import Trace

    try:
        return Trace.load(path)
    except OSError as error:
        raise ConfigError(f"The trace {path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} holds no trace that this version of minivllm can read ({error}).") from error


def _print_trace(trace: Trace, every_step: bool) -> None:
    from rich.console import Console

    from minivllm.viz.terminal import step_table

    # For a file or a pipe, the table is as wide as it needs to be.
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(step_table(trace, every_step))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="",
)
def bench(
    ctx: typer.Context, arguments: Annotated[list[str] | None, typer.Argument(metavar="COMMAND [ARGS]...")] = None
) -> None:
    """Measure speed; `minivllm bench --help` lists the benchmarks."""
    from minivllm.bench.cli import app as bench_app

    bench_app(args=[*(arguments or []), *ctx.args], prog_name="minivllm bench")


@app.command()
def check(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[NN | PATH | capstone]",
            help="A chapter (03), an exercise (03.2) or its notebook; or all that you wrote, as one engine.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one cell may take.", min=1.0)] = 120.0,
) -> None:
    """Check the exercises of a chapter, or of all that were begun. Exits with 0 when all of them passed."""
    from rich.console import Console

    from minivllm.course import progress

    raise typer.Exit(progress.check(what, Console(), timeout))


course_app = typer.Typer(help="Show how far you are in the course, and what comes next.", invoke_without_command=True)
app.add_typer(course_app, name="course")


@course_app.callback()
def course(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        from rich.console import Console

        from minivllm.course import progress

        progress.overview(Console())


@course_app.command()
def reset(
    what: Annotated[str, typer.Argument(metavar="NN | PATH", help="The chapter whose exercises to renew.")],
) -> None:
    """Begin a chapter's exercises anew; what you have is kept beside it."""
    from minivllm.course import progress

    fresh, kept = progress.reset(what)
    typer.echo(f"{fresh.name} is as it came." + (f" What you had is {kept.name}." if kept else ""))


@app.command()
def doctor() -> None:
    """Say what was found on this machine, what it means for the course, and how to cure what is broken."""
    from minivllm.doctor import run_doctor

    raise typer.Exit(run_doctor())


# --- shared -------------------------------------------------------------------------------------------------------


def _open_llm(model: str | None, engine: list[str] | None, **options: Any) -> LLM:
    options = {**options, **_engine_options(engine)}
    try:
        from minivllm.llm import LLM
    except ImportError as error:
        raise ConfigError(f"{error}. `minivllm doctor` says what is missing and how to get it.") from error
    return LLM(model, **options)


def _engine_options(assignments: list[str] | None) -> dict[str, Any]:
    """``["block_size=16"]`` -> ``{"block_size": 16}``, names checked against `EngineConfig`."""
    from minivllm.config import EngineConfig

    known = [field.name for field in fields(EngineConfig)]
    options = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise ConfigError(f"--engine {assignment}: write OPTION=VALUE; the options are {', '.join(known)}.")
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options


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
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )


def _render(llm: LLM, prompt: str, chat: bool | None, system: str | None) -> str | list[int]:
    """The prompt as the engine is to see it: bare text, or a chat's token ids."""
    if chat is False:
        if system is not None:
            raise ConfigError("--system needs a chat; --raw continues the bare text.")
        return prompt
    opening = [{"role": "system", "content": system}] if system else []
    try:
        return llm.render_chat([*opening, {"role": "user", "content": prompt}])
    except ConfigError:  # the model has no chat template
        if chat or system is not None:
            raise
        return prompt


def _model_name(llm: LLM) -> str:
    from minivllm.bundled import BUNDLED_MODEL_PATH

    path = llm.llm_engine.model_path
    return "the bundled model" if path == BUNDLED_MODEL_PATH else path.name


def _write(text: str) -> None:
    """Text to the terminal at once; control characters, which a model may write, have no business there."""
    sys.stdout.write("".join(c for c in text if c in "\n\t" or c.isprintable() or ord(c) > 0x9F))
    sys.stdout.flush()


def _note(text: str, wanted: bool, newline: bool = True) -> None:
    if wanted:
        typer.secho(text, dim=True, err=not sys.stdout.isatty(), nl=newline)


def _one_line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


if __name__ == "__main__":
    app()
