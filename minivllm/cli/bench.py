"""`minivllm bench`: commands that measure.

What measures needs torch, so each command imports it when it starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from minivllm.bench.cases import CASES, KERNELS, Workload
from minivllm.bench.costs import Rates
from minivllm.bench.shapes import SHAPES, shape_directory
from minivllm.cli import options
from minivllm.cli.options import Engine, engine_options
from minivllm.cli.stdio import FAILED, Commands
from minivllm.config import DTYPES
from minivllm.errors import ConfigError
from minivllm.files import reason, require_writable, write_atomically
from minivllm.text import printable

if TYPE_CHECKING:
    from minivllm.bench.loads import Settings

T = TypeVar("T")

app = typer.Typer(
    cls=Commands,
    help="Measure speed, and print what was measured on which machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _dtype(name: str) -> str:
    if name not in ("auto", *DTYPES):
        raise typer.BadParameter(f"{name!r} is none of auto, {', '.join(DTYPES)}")
    return name


def _device(name: str) -> str:
    from minivllm.parallel.launch import pick_device

    pick_device(name)
    return name


def _no_nan(value: float | None) -> float | None:
    """Refuse NaN, which passes every comparison with a bound."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be measured with")
    return value


def _rate(value: float | None) -> float | None:
    if _no_nan(value) is not None and value <= 0:
        raise typer.BadParameter("a rate must be above 0")
    return value


def _range(least_and_most: tuple[int, int]) -> tuple[int, int]:
    least, most = least_and_most
    if not 1 <= least <= most:
        raise typer.BadParameter(f"give the least, from 1, and the most; not {least} {most}")
    return least_and_most


def _folder(path: Path) -> Path:
    require_writable(path / "summary", "What is measured", make_folder=True)
    return path


def _writable(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before minutes of measuring, not after them. Its folder
    is made.
    """
    if path is not None:
        require_writable(path, "What is measured", make_folder=True)
    return path


Model = Annotated[
    str | None, typer.Option(help="Directory or hub id; the bundled model if left out.")
]
Shape = Annotated[
    str | None,
    typer.Option(help=f"Random weights in this shape instead of a model: {', '.join(SHAPES)}."),
]
Dtype = Annotated[
    str, typer.Option(callback=_dtype, help="'auto', 'float32', 'float16' or 'bfloat16'.")
]
Device = Annotated[str, typer.Option(callback=_device, help="'auto', 'cpu' or 'cuda'.")]
Out = Annotated[
    Path | None,
    typer.Option(callback=_writable, help="Write everything measured to this JSON file."),
]
MaxSeconds = Annotated[
    float | None,
    typer.Option(min=0, callback=_no_nan, help="No row begins after this many seconds."),
]
Eager = Annotated[bool, typer.Option(help="Without CUDA graphs.")]
SmallInt = Annotated[int, typer.Option(min=1)]
Maybe = Annotated[int | None, typer.Option(min=1)]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds after a warm-up; medians are quoted.")]


def _numbers(text: str | None, option: str | None = None) -> list[int] | None:
    """The numbers of a list like "1,8,64"; None stays None."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers like 1,8,64", param_hint=option)
    return numbers


Numbers = Annotated[
    str | None, typer.Option(metavar="N,N,…", help="Without it: what suits the device.")
]


@contextmanager
def _model(
    model: str | None, shape: str | None
) -> Iterator[tuple[str | Path | None, dict[str, Any]]]:
    """(model, engine options) for what was asked: a model, or a shape.

    A shape becomes a directory with its config.json, and its weights are random.
    """
    if shape is None:
        yield model, {}
        return
    if model is not None:
        raise typer.BadParameter("give a model or a shape, not both", param_hint="--shape")
    if shape not in SHAPES:
        raise typer.BadParameter(f"there are {', '.join(SHAPES)}", param_hint="--shape")
    with shape_directory(shape) as path:
        yield path, {"load_format": "dummy"}


def _finish(report: dict[str, Any], out: Path | None) -> None:
    """Write the report to `out`, print its tables, and say where it was saved."""
    from minivllm.bench.report import save_report
    from minivllm.bench.tables import show

    problem = None
    try:
        if out is not None:  # first: a table that cannot be drawn must not lose the numbers
            save_report(report, out)
    except OSError as error:  # nor must a full disk
        problem = ConfigError(f"What was measured cannot be written to {out}: {reason(error)}.")
    show(report)
    if problem is not None:
        raise problem
    if out is not None:
        typer.echo(printable(f"Saved to {out}."))


def _set(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


@app.callback()
def bench() -> None:
    """Measure speed, and print what was measured on which machine."""


@app.command()
def throughput(
    model: Model = None,
    shape: Shape = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A named workload ({', '.join(CASES)}), several, or 'all'; see --protocol."
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="'nano': nano-vLLM's bench.py; the same as --case nano.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="'transformers': run it beside us on the same requests.")
    ] = None,
    num_requests: SmallInt = 32,
    prompt_tokens: Annotated[
        tuple[int, int], typer.Option(callback=_range, help="Least and most tokens of a prompt.")
    ] = (10, 128),
    output_tokens: Annotated[
        tuple[int, int], typer.Option(callback=_range, help="Least and most tokens of an output.")
    ] = (16, 128),
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=_no_nan, help="0 is greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Draws lengths and prompts.")] = 0,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds after the warm-up; 3 of a case, else 7.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_num_seqs: SmallInt = 256,
    max_num_batched_tokens: Maybe = None,
    max_model_len: Maybe = None,
    enforce_eager: Eager = False,
    dummy_weights: Annotated[
        bool, typer.Option(help="Random weights; needs only config.json.")
    ] = False,
    speculative_config: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Speculative decoding, as LLM(...) takes it."),
    ] = None,
    engine: Engine = None,
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """Output tokens per second: of named cases, beside their floor, or of one batch of requests
    of random lengths.
    """
    from minivllm.bench.throughput import run, run_cases

    names = _case_names(case, protocol)
    if compare is not None:
        _require_comparable(compare, is_plain=not (temperature or names or shape))
    options = _set(max_model_len=max_model_len, enforce_eager=enforce_eager or None)
    options |= {"dtype": dtype, "device": device, "max_num_seqs": max_num_seqs}
    options |= {
        "max_num_batched_tokens": max_num_batched_tokens,
        "load_format": "dummy" if dummy_weights else "auto",
    }
    if speculative_config is not None:
        options |= engine_options([f"speculative_config={speculative_config}"])
    options |= engine_options(engine)
    with _model(model, shape) as (path, more):
        options |= more
        if names:
            chosen = {name: CASES[name] for name in names}
            report = run_cases(
                chosen, path, repeats=repeats or 3, max_seconds=max_seconds, **options
            )
        else:
            workload = Workload(num_requests, prompt_tokens, output_tokens, seed, temperature)
            report = run(
                path, workload, repeats=repeats or 7, compare=compare is not None, **options
            )
    _finish(report, out)


def _case_names(case: list[str] | None, protocol: str | None) -> list[str]:
    """The named workloads that were asked for; [] where none was. Raises `typer.BadParameter`."""
    if protocol not in (None, "nano"):
        raise typer.BadParameter("only 'nano' is known", param_hint="--protocol")
    names = [*(case or []), *([protocol] if protocol else [])]
    names = list(CASES) if "all" in names else list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in CASES]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is none of {', '.join(CASES)}, all", param_hint="--case"
        )
    return names


def _require_comparable(compare: str, is_plain: bool) -> None:
    """Raises `typer.BadParameter` where transformers cannot run the same requests.

    is_plain: whether one greedy batch of a real model was asked for.
    """
    if compare != "transformers":
        raise typer.BadParameter("only 'transformers' can be compared with", param_hint="--compare")
    if not is_plain:
        raise typer.BadParameter(
            "the comparison is greedy, on one batch and real weights", param_hint="--compare"
        )
    if find_spec("transformers") is None:
        raise typer.BadParameter(
            "transformers is not installed: pip install transformers", param_hint="--compare"
        )


@app.command()
def latency(
    model: Model = None,
    shape: Shape = None,
    batches: Numbers = None,
    running: Numbers = None,
    contexts: Numbers = None,
    prompt_tokens: SmallInt = 512,
    output_tokens: SmallInt = 128,
    context_requests: Annotated[
        int, typer.Option(min=1, help="Requests running at each of the contexts.")
    ] = 8,
    num_steps: Annotated[int, typer.Option(min=1, help="Decode steps timed at each size.")] = 64,
    repeats: Repeats = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_num_batched_tokens: Maybe = None,
    max_model_len: Maybe = None,
    enforce_eager: Eager = False,
    engine: Engine = None,
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """TTFT and TPOT by batch size; the time of a step by running requests and by context; prefix
    hits.
    """
    from minivllm.bench.latency import Loads, run

    loads = Loads(
        batches=_numbers(batches),
        running=_numbers(running),
        contexts=_numbers(contexts),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        context_requests=context_requests,
    )
    options = _set(max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len)
    options |= {"dtype": dtype, "device": device, "enforce_eager": enforce_eager}
    options |= engine_options(engine)
    with _model(model, shape) as (path, more):
        report = run(
            path,
            loads,
            num_steps=num_steps,
            repeats=repeats,
            max_seconds=max_seconds,
            **{**options, **more},
        )
    _finish(report, out)


@app.command()
def kernels(
    shape: Annotated[
        str | None, typer.Option(help=f"Heads and widths of: {', '.join(SHAPES)}.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Some of: {', '.join(KERNELS)}.")] = None,
    block_size: Maybe = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile too; on a GPU unless refused."),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=3600.0,
            callback=_no_nan,
            help="About how many seconds to measure per row.",
        ),
    ] = 0.2,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """The time of each kernel, beside its floor and beside torch's own kernel."""
    from minivllm.bench.kernels import Budget, run

    if shape not in (None, *SHAPES):
        raise typer.BadParameter(f"there are {', '.join(SHAPES)}", param_hint="--shape")
    if unknown := set(only or ()) - set(KERNELS):
        raise typer.BadParameter(
            f"{min(unknown)!r} is none of {', '.join(KERNELS)}", param_hint="--only"
        )
    report = run(
        shape,
        names=tuple(only or KERNELS),
        device=device,
        dtype=dtype,
        block_size=block_size,
        compiled=compile,
        budget=Budget(seconds, max_seconds),
    )
    _finish(report, out)


@app.command()
def breakdown(
    model: Model = None,
    shape: Shape = None,
    running: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Running requests: 256; 8 on a CPU.")
    ] = None,
    context: Maybe = None,
    num_steps: Annotated[int, typer.Option(min=4)] = 64,
    overlap: Annotated[str, typer.Option(help="'on', 'off' or 'both'.")] = "both",
    graphs: Annotated[
        str, typer.Option(help="'on', 'off' (every kernel is launched by itself) or 'both'.")
    ] = "on",
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """Where the time of a decode step goes: kernels by name, gaps, exposed CPU time; with overlap
    on and off, as a CUDA graph and without.
    """
    from minivllm.bench.breakdown import run

    choices = {"on": (True,), "off": (False,), "both": (True, False)}
    for option, choice in (("--overlap", overlap), ("--graphs", graphs)):
        if choice not in choices:
            raise typer.BadParameter("'on', 'off' or 'both'", param_hint=option)
    with _model(model, shape) as (path, more):
        report = run(
            path,
            requests=_numbers(running),
            context=context,
            num_steps=num_steps,
            overlaps=choices[overlap],
            graphs=choices[graphs],
            max_seconds=max_seconds,
            dtype=dtype,
            device=device,
            **more,
        )
    _finish(report, out)


@app.command()
def speculate(
    model: Model = None,
    shape: Shape = None,
    draft: Annotated[
        str, typer.Option(help="Directory or hub id of the draft; 'draft' is the bundled one.")
    ] = "draft",
    draft_shape: Annotated[
        str | None, typer.Option(help="Random weights in this shape as the draft.")
    ] = None,
    requests: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Running requests: 1,4,16,64.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="N,N,…", help="Proposed tokens per request and step.")
    ] = "1,2,4,8",
    context: Maybe = None,
    repeats: Repeats = 8,
    enforce_eager: Eager = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """Speculative decoding: what a step with proposals and a draft's steps cost, and the acceptance
    from which on it pays; with the bundled model also its speed on texts.
    """
    from minivllm.bench.speculate import Plan, run

    if (shape is None) != (draft_shape is None):
        raise typer.BadParameter("give --shape and --draft-shape, or neither")
    with _model(model, shape) as (path, more), _model(None, draft_shape) as (other, _):
        plan = Plan(
            requests=_numbers(requests, "--requests"),
            ks=_numbers(tokens, "--tokens") or (),
            context=context,
            repeats=repeats,
            has_texts=path is None,
            max_seconds=max_seconds,
        )
        more |= {"enforce_eager": enforce_eager, "dtype": dtype, "device": device}
        report = run(path, other or draft, plan, **more)
    _finish(report, out)


@app.command()
def streams(
    model: Model = None,
    running: Annotated[str, typer.Option(metavar="N,N,…", help="Streams at once.")] = "256,1024",
    num_steps: Annotated[int, typer.Option(min=4)] = 256,
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """The CPU's work for a step in which every request streams text, by part, without the model;
    and the longest steps.
    """
    from minivllm.bench.streams import run

    counts = _numbers(running, "--running") or []
    _finish(run(model, counts, num_steps=num_steps, max_seconds=max_seconds), out)


@app.command()
def roofline(
    report: Annotated[
        Path, typer.Argument(help="JSON of `minivllm bench throughput --case … --out FILE`.")
    ],
    case: Annotated[list[str] | None, typer.Option(help="Only these cases of it.")] = None,
    read_tb_per_s: Annotated[
        float | None, typer.Option(callback=_rate, help="Instead of what was measured in that run.")
    ] = None,
    matmul_tflops: Annotated[
        float | None, typer.Option(callback=_rate, help="Instead of what was measured in that run.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(callback=_writable, help="Draw it into this PNG file.")
    ] = None,
    out: Out = None,
) -> None:
    """The floor of a throughput report's cases, computed step by step, and the share of it that was
    reached.
    """
    found = _floors(_read_report(report), case, read_tb_per_s, matmul_tflops)
    if picture is not None:
        try:
            from minivllm.viz.roofline import draw_floor
        except ImportError as error:
            raise ConfigError(f"Drawing takes matplotlib ({error}): make lab") from error
        try:
            write_atomically(picture, draw_floor(found).to_png())
        except OSError as error:
            raise ConfigError(
                f"The picture cannot be written to {picture}: {reason(error)}."
            ) from error
    _finish(found, out)


def _read_report(path: Path) -> dict[str, Any]:
    """A report of `minivllm bench throughput --case …`. Raises `typer.BadParameter` for another
    file.
    """
    try:
        measured = json.loads(path.read_bytes())
    except OSError as error:
        raise typer.BadParameter(
            f"{path} cannot be read: {reason(error)}", param_hint="REPORT"
        ) from error
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path} is not JSON ({error})", param_hint="REPORT") from error
    parts = (dict, "rates"), (dict, "cases")
    whole = isinstance(measured, dict) and all(
        isinstance(measured.get(name), kind) for kind, name in parts
    )
    if not whole or measured.get("benchmark") != "throughput":
        raise typer.BadParameter(
            "no report of `minivllm bench throughput --case …`", param_hint="REPORT"
        )
    return measured


def _floors(
    measured: dict[str, Any],
    case: list[str] | None,
    read_tb_per_s: float | None,
    matmul_tflops: float | None,
) -> dict[str, Any]:
    from minivllm.bench.roofline import run

    if unknown := [name for name in case or () if name not in measured["cases"]]:
        raise typer.BadParameter(f"{unknown[0]!r} is not in the report", param_hint="--case")
    known = measured["rates"]
    try:
        read = 1e12 * read_tb_per_s if read_tb_per_s else known["read_bytes_per_second"]
        matmul = 1e12 * matmul_tflops if matmul_tflops else known["matmul_flops_per_second"]
        return run(measured, Rates(read, matmul), case)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}"
        raise typer.BadParameter(f"the report is damaged ({why})", param_hint="REPORT") from error


@app.command()
def quality(
    model: Model = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="OPTION=VALUE,…",
            help="Engine options to measure, one row; may be repeated. Without it: each way to"
            " quantize.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file to read instead of the default text.")
    ] = None,
    num_tokens: Annotated[int, typer.Option(min=64, help="About how many are scored.")] = 8192,
    engine: Engine = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Out = None,
) -> None:
    """What quantization costs: perplexity, greedy agreement and KL divergence beside the same
    engine without it.
    """
    from minivllm.bench.quality import run

    rows = [engine_options(row.split(",")) for row in with_ or []]
    options = {"dtype": dtype, "device": device} | engine_options(engine)
    _finish(run(model, rows, text=text, num_tokens=num_tokens, **options), out)


@app.command()
def record(
    out: Annotated[
        Path, typer.Option(callback=_folder, help="Directory for the JSON files and logs.")
    ],
    shape: Shape = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile beside sampling.")
    ] = True,
) -> None:
    """Run kernels, throughput, latency, breakdown and roofline, each in a process of its own;
    minutes on a GPU.
    """
    from minivllm.bench.record import run

    summary = run(out, shape, compile)
    for name, found in summary.items():
        typer.echo(printable(f"{name}: {found['problem'] or 'done'} ({found['seconds']} s)"))
    raise typer.Exit(any(found["problem"] for found in summary.values()))


def _picture(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"{path} ends neither in .png nor in .svg")
    return _writable(path)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="What --spawn serves: a directory or hub id.", show_default="bundled model"
        ),
    ] = None,
    base_url: Annotated[
        str, typer.Option(help="The server, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    spawn: Annotated[
        bool, typer.Option("--spawn", help="Start `minivllm serve [MODEL]` here, and end it.")
    ] = False,
    engine: Engine = None,
    core: Annotated[
        str, typer.Option(help='Where --spawn runs the engine: in a "process" or a "thread".')
    ] = "process",
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="Run the requests of closed loops through LLM.generate, too."
        ),
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MINIVLLM_API_KEY",
            show_envvar=False,
            help="The server's key; MINIVLLM_API_KEY sets it, too.",
        ),
    ] = None,
    served_model: Annotated[
        str | None,
        typer.Option("--model", help="The model's name there.", show_default="the first one"),
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…",
            help="Closed loops: N clients, each sends when its last request has ended.",
            show_default="8, without --rate",
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,…", help="Open arrivals: R requests per second, with random gaps."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each load.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before each, not counted.")] = 4,
    input: Annotated[
        str, typer.Option(metavar="N-N", help="Least and most tokens of a prompt.")
    ] = "100-300",
    output: Annotated[
        str, typer.Option(metavar="N-N", help="Least and most tokens of an answer.")
    ] = "64-192",
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=_no_nan, help="0 is greedy.")
    ] = 0.0,
    vocab: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts are of token ids below this.",
            show_default="what /tokenize shows to exist",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws lengths, prompts and arrivals.")] = 0,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Client processes.", show_default="half the cores, at most 8"
        ),
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MS",
            help="A target for ttft, tpot or e2e, in milliseconds, for goodput. May be repeated.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, callback=_no_nan, help="Seconds of a request at most.")
    ] = 600.0,
    picture: Annotated[
        Path | None, typer.Option(callback=_picture, help="Draw it into this PNG or SVG file.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--save", callback=_writable, help="Write everything measured to this JSON."
        ),
    ] = None,
) -> None:
    """A server under load: TTFT, TPOT, throughput and goodput of any server with OpenAI's API.

    Several --clients or --rate are measured one after the other: latency against load.
    """
    from minivllm.bench import loads

    if not spawn and (model or engine or offline):
        wanting = "MODEL, --engine and --offline need --spawn"
        raise typer.BadParameter(wanting, param_hint="--spawn")
    if core not in ("process", "thread"):
        raise typer.BadParameter(f'{core!r} is not "process" or "thread"', param_hint="--core")
    engine_options = options.engine_options(engine)
    settings = loads.Settings(
        clients=tuple(_numbers(clients, "--clients") or (() if rate else (8,))),
        rates=_read(loads.parse_rates, rate, "--rate") if rate is not None else (),
        model=served_model,
        input=_read(loads.parse_span, input, "--input"),
        output=_read(loads.parse_span, output, "--output"),
        requests=requests,
        warmup=warmup,
        processes=processes,
        seed=seed,
        vocab=vocab,
        temperature=temperature,
        timeout=timeout,
        slo=_read(loads.parse_slo, slo or [], "--slo"),
    )
    own = (model, engine or [], core) if spawn else None
    report = _served(settings, base_url, api_key, own)
    if offline:
        from minivllm.bench.offline import compare

        compare(report, settings, model, engine_options)
    _finish(report, out)
    if picture is not None:
        _draw_served(report, picture)
    if report["problem"]:
        raise typer.Exit(FAILED)


def _read(parse: Callable[[T], Any], given: T, option: str) -> Any:
    """What was given, parsed. Raises `typer.BadParameter` where `parse` raises ValueError."""
    try:
        return parse(given)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _served(
    settings: Settings, url: str, key: str | None, spawn: tuple[str | None, list[str], str] | None
) -> dict[str, Any]:
    """The report of a server. spawn: the model, the engine options and the core of our own."""
    from minivllm.bench.serving import run

    if spawn is None:
        return run(url, settings, key=key)
    from minivllm.bench.spawned import spawned

    model, engine, core = spawn
    with spawned(model, engine, flags=[f"--core={core}"], key=key) as own:
        found = {"model": model or "bundled", "engine": engine, "core": core}
        return run(own, settings, key=key, spawned=found)


def _draw_served(report: dict[str, Any], picture: Path) -> None:
    try:
        from minivllm.viz.serving import draw_served, to_svg
    except ImportError as error:
        raise ConfigError(f"Drawing takes matplotlib ({error}): make lab") from error
    if not any(point["completed"] for point in report["points"]):
        return
    figure = draw_served(report)
    try:
        write_atomically(picture, to_svg(figure) if picture.suffix == ".svg" else figure.to_png())
    except OSError as error:
        raise ConfigError(
            f"The picture cannot be written to {picture}: {reason(error)}."
        ) from error
    typer.echo(printable(f"Drawn to {picture}."))


@app.command()
def replicas(
    model: Annotated[
        str | None, typer.Argument(help="A directory or hub id.", show_default="bundled model")
    ] = None,
    routers: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Ways to choose a replica: random, load (Ray's power of two), ray-prefix (Ray's"
            " own by prefix), prefix.",
        ),
    ] = "random,load,ray-prefix,prefix",
    count: Annotated[int, typer.Option("--replicas", min=1, help="Replicas behind a router.")] = 3,
    conversations: Annotated[int, typer.Option(min=1, help="Conversations of the trace.")] = 60,
    rate: Annotated[
        float, typer.Option(callback=_rate, help="Conversations that begin per second.")
    ] = 2.0,
    pause: Annotated[
        float, typer.Option(min=0.0, callback=_no_nan, help="Mean seconds between two turns.")
    ] = 2.0,
    balance: Annotated[
        int,
        typer.Option(min=0, help="For prefix: how much longer the chosen queue may be."),
    ] = 4,
    scale: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Throughput of so many replicas, one thread each."),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients that measure throughput.")] = 24,
    requests: Annotated[int, typer.Option(min=1, help="Their requests.")] = 96,
    seed: Annotated[int, typer.Option(help="Draws the conversations.")] = 0,
    engine: Engine = None,
    out: Out = None,
) -> None:
    """Several engines behind routers (needs the extra ray): hit rate, TTFT and load imbalance of
    multi-turn conversations; throughput by number of replicas.
    """
    from minivllm.bench.conversations import TraceSettings
    from minivllm.bench.replicas import Plan, run

    names = tuple(name for name in routers.split(",") if name)
    known = ("random", "load", "ray-prefix", "prefix")
    if unknown := set(names) - set(known):
        raise typer.BadParameter(
            f"{min(unknown)!r} is none of {', '.join(known)}", param_hint="--routers"
        )
    fleet = {"model": model, "engine": engine_options(engine), "balance": balance}
    report = run(
        Plan(
            routers=names,
            replicas=count,
            scale=tuple(_numbers(scale, "--scale") or ()),
            clients=clients,
            requests=requests,
            trace=TraceSettings(
                conversations=conversations, rate=rate or 2.0, pause=pause, seed=seed
            ),
            fleet=fleet,
        )
    )
    _finish(report, out)
    if any(found["problem"] for found in (*report["routers"].values(), *report["scale"])):
        raise typer.Exit(FAILED)
