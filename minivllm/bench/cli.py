"""`minivllm bench`: commands that measure. Imported only when one of them is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from minivllm.bench import breakdown as breakdowns
from minivllm.bench import kernels as kernel_bench
from minivllm.bench import latency as latencies
from minivllm.bench import record as recording
from minivllm.bench import roofline as rooflines
from minivllm.bench.costs import Rates
from minivllm.bench.report import machine, save_report
from minivllm.bench.shapes import SHAPES, shape_directory
from minivllm.bench.tables import show
from minivllm.bench.throughput import CASES, Workload, run, run_cases

app = typer.Typer(
    help="Measure speed, and print what was measured on which machine.", no_args_is_help=True, add_completion=False
)

Model = Annotated[str | None, typer.Option(help="Directory or hub id; the bundled model if left out.")]
Shape = Annotated[
    str | None, typer.Option(help=f"Random weights in this shape instead of a model: {', '.join(SHAPES)}.")
]
Dtype = Annotated[str, typer.Option(help="'auto', 'float32', 'float16' or 'bfloat16'.")]
Device = Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.")]
Out = Annotated[Path | None, typer.Option(help="Write everything measured to this JSON file.")]
MaxSeconds = Annotated[float | None, typer.Option(min=0, help="Rows that would begin later are left out.")]
Eager = Annotated[bool, typer.Option(help="Without CUDA graphs.")]
SmallInt = Annotated[int, typer.Option(min=1)]
Maybe = Annotated[int | None, typer.Option(min=1)]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds after a warm-up; medians are quoted.")]


def _numbers(text: str | None) -> list[int] | None:
    """ "1,8,64" as numbers; None stays None."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers like 1,8,64")
    return numbers


Numbers = Annotated[str | None, typer.Option(metavar="N,N,…", help="Left out: what suits the device.")]


@contextmanager
def _model(model: str | None, shape: str | None) -> Iterator[tuple[str | Path | None, dict[str, Any]]]:
    """(model, engine options): the model, or a directory with the shape's config and random weights."""
    if shape is None:
        yield model, {}
        return
    if model is not None:
        raise typer.BadParameter("give a model or a shape, not both", param_hint="--shape")
    if shape not in SHAPES:
        raise typer.BadParameter(f"there are {', '.join(SHAPES)}", param_hint="--shape")
    with shape_directory(shape) as path:
        yield path, {"load_format": "dummy"}


def _finish(report: dict[str, Any], out: Path | None, show: Callable[[dict[str, Any]], None] = show) -> None:
    if out is not None:  # first: a table that cannot be drawn must not lose the numbers
        save_report(report, out)
    show(report)
    if out is not None:
        typer.echo(f"Saved to {out}.")


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
        typer.Option(help=f"A named workload ({', '.join(CASES)}), several, or 'all'; see --protocol."),
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="'nano': nano-vLLM's bench.py; the same as --case nano.")] = None,
    compare: Annotated[str | None, typer.Option(help="'transformers': run it beside us on the same requests.")] = None,
    num_requests: SmallInt = 32,
    prompt_tokens: Annotated[tuple[int, int], typer.Option(help="Least and most tokens of a prompt.")] = (10, 128),
    output_tokens: Annotated[tuple[int, int], typer.Option(help="Least and most tokens of an output.")] = (16, 128),
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Draws lengths and prompts.")] = 0,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds after the warm-up; 3 of a case, else 7.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_num_seqs: SmallInt = 256,
    max_num_batched_tokens: Maybe = None,
    max_model_len: Maybe = None,
    enforce_eager: Eager = False,
    dummy_weights: Annotated[bool, typer.Option(help="Random weights; needs only config.json.")] = False,
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """Output tokens a second: named cases beside their floor, or one batch of requests of random lengths."""
    if protocol not in (None, "nano"):
        raise typer.BadParameter("only 'nano' is known", param_hint="--protocol")
    names = [*(case or []), *([protocol] if protocol else [])]
    names = list(CASES) if "all" in names else list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in CASES]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(CASES)}, all", param_hint="--case")
    if compare not in (None, "transformers"):
        raise typer.BadParameter("only 'transformers' can be compared with", param_hint="--compare")
    if compare and (temperature or names or shape):
        raise typer.BadParameter("the comparison is greedy, on one batch and real weights", param_hint="--compare")
    options = _set(max_model_len=max_model_len, enforce_eager=enforce_eager or None)
    options |= {"dtype": dtype, "device": device, "max_num_seqs": max_num_seqs}
    options |= {"max_num_batched_tokens": max_num_batched_tokens, "load_format": "dummy" if dummy_weights else "auto"}
    with _model(model, shape) as (path, more):
        if names:
            chosen = {name: CASES[name] for name in names}
            report = run_cases(chosen, path, repeats=repeats or 3, max_seconds=max_seconds, **(options | more))
        else:
            workload = Workload(num_requests, prompt_tokens, output_tokens, seed, temperature)
            report = run(path, workload, repeats=repeats or 7, compare=compare is not None, **(options | more))
    _finish(report, out, show if names else _print)


@app.command()
def latency(
    model: Model = None,
    shape: Shape = None,
    batches: Numbers = None,
    running: Numbers = None,
    contexts: Numbers = None,
    prompt_tokens: SmallInt = 512,
    output_tokens: SmallInt = 128,
    context_requests: Annotated[int, typer.Option(min=1, help="Requests running at each of the contexts.")] = 8,
    num_steps: Annotated[int, typer.Option(min=1, help="Decode steps timed at each size.")] = 64,
    repeats: Repeats = 3,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_num_batched_tokens: Maybe = None,
    max_model_len: Maybe = None,
    enforce_eager: Eager = False,
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """TTFT and TPOT by batch size; a step's time by running requests and by context; prefix hits."""
    options = _set(max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len)
    with _model(model, shape) as (path, more):
        report = latencies.run(
            path, batches=_numbers(batches), running=_numbers(running), contexts=_numbers(contexts),
            prompt_tokens=prompt_tokens, output_tokens=output_tokens, context_requests=context_requests,
            num_steps=num_steps, repeats=repeats, max_seconds=max_seconds, dtype=dtype, device=device,
            enforce_eager=enforce_eager, **options, **more,
        )  # fmt: skip
    _finish(report, out)


@app.command()
def kernels(
    shape: Annotated[str | None, typer.Option(help=f"Heads and widths of: {', '.join(SHAPES)}.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Some of: {', '.join(kernel_bench.NAMES)}.")] = None,
    block_size: Maybe = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile too; on a GPU unless refused.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Measuring time of a row, about.")] = 0.2,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """Each kernel beside its floor and beside torch's own."""
    if shape not in (None, *SHAPES):
        raise typer.BadParameter(f"there are {', '.join(SHAPES)}", param_hint="--shape")
    if unknown := set(only or ()) - set(kernel_bench.NAMES):
        raise typer.BadParameter(f"{min(unknown)!r} is none of {', '.join(kernel_bench.NAMES)}", param_hint="--only")
    report = kernel_bench.run(
        shape, names=tuple(only or kernel_bench.NAMES), device=device, dtype=dtype, block_size=block_size,
        compiled=compile, seconds=seconds, max_seconds=max_seconds,
    )  # fmt: skip
    _finish(report, out)


@app.command()
def breakdown(
    model: Model = None,
    shape: Shape = None,
    running: Annotated[str | None, typer.Option(metavar="N,N,…", help="Running requests: 256; 8 on a CPU.")] = None,
    context: Maybe = None,
    num_steps: Annotated[int, typer.Option(min=4)] = 64,
    overlap: Annotated[str, typer.Option(help="'on', 'off' or 'both'.")] = "both",
    dtype: Dtype = "auto",
    device: Device = "auto",
    enforce_eager: Eager = False,
    max_seconds: MaxSeconds = None,
    out: Out = None,
) -> None:
    """Where a decode step's time goes: kernels by name, gaps, exposed CPU time; overlap on and off."""
    overlaps = {"on": (True,), "off": (False,), "both": (True, False)}
    if overlap not in overlaps:
        raise typer.BadParameter("'on', 'off' or 'both'", param_hint="--overlap")
    with _model(model, shape) as (path, more):
        report = breakdowns.run(
            path, requests=_numbers(running), context=context, num_steps=num_steps, overlaps=overlaps[overlap],
            max_seconds=max_seconds, dtype=dtype, device=device, enforce_eager=enforce_eager, **more,
        )  # fmt: skip
    _finish(report, out)


@app.command()
def roofline(
    report: Annotated[Path, typer.Argument(help="JSON of `minivllm bench throughput --case … --out FILE`.")],
    case: Annotated[list[str] | None, typer.Option(help="Only these cases of it.")] = None,
    read_tb_per_s: Annotated[float | None, typer.Option(help="Instead of what was measured in that run.")] = None,
    matmul_tflops: Annotated[float | None, typer.Option(help="Instead of what was measured in that run.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this PNG file.")] = None,
    out: Out = None,
) -> None:
    """The floor of a throughput report's cases, computed step by step, and the share of it that was reached."""
    measured = json.loads(report.read_text(encoding="utf-8"))
    known = measured.get("rates")
    if known is None or measured.get("benchmark") != "throughput":
        raise typer.BadParameter("no report of `minivllm bench throughput --case …`", param_hint="REPORT")
    if unknown := [name for name in case or () if name not in measured["cases"]]:
        raise typer.BadParameter(f"{unknown[0]!r} is not in the report", param_hint="--case")
    read = 1e12 * read_tb_per_s if read_tb_per_s else known["read_bytes_per_second"]
    matmul = 1e12 * matmul_tflops if matmul_tflops else known["matmul_flops_per_second"]
    found = rooflines.run(measured, Rates(read, matmul), case)
    if picture is not None:
        from minivllm.viz.roofline import draw_floor

        picture.write_bytes(draw_floor(found).to_png())
    _finish(found, out)


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="Directory for the JSON files and logs.")],
    shape: Shape = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile beside sampling.")] = True,
) -> None:
    """Run kernels, throughput, latency, breakdown and roofline, each in a process of its own; minutes on a GPU."""
    summary = recording.run(out, shape, compile)
    for name, found in summary.items():
        typer.echo(f"{name}: {found['problem'] or 'done'} ({found['seconds']} s)")
    raise typer.Exit(any(found["problem"] for found in summary.values()))


def _print(report: dict[str, Any]) -> None:
    console = Console()
    title = f"{report['model']}, {report['dtype']}: {report['workload']['num_requests']} requests, "
    table = Table(title=title + f"{report['prompt_tokens']} prompt + {report['output_tokens']} output tokens")
    for column in ("", "seconds (min…max)", "output tokens/s", "minivllm is faster by"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in report["results"].items():
        seconds, rate = result["seconds"], result["output_tokens_per_second"]["median"]
        times = f"{seconds['median']:.3f} ({seconds['min']:.3f}…{seconds['max']:.3f})"
        ratio = result.get("minivllm_is_faster_by")
        ratio_text = "" if ratio is None else f"{ratio['median']:.2f} × ({ratio['min']:.2f}…{ratio['max']:.2f})"
        table.add_row(name, times, f"{rate:,.0f}", ratio_text)
    console.print(table)
    if "floor" in report:
        floor, ours = report["floor"], report["results"]["minivllm"]["seconds"]["median"]
        console.print(
            f"Floor: {floor['flops'] / 1e9:.1f} GFLOP of matrix products in {floor['steps']} steps take "
            f"{floor['seconds']:.3f} s here by themselves ({floor['flops'] / floor['seconds'] / 1e9:.0f} GFLOP/s); "
            f"minivllm takes {ours / floor['seconds']:.2f} × that."
        )
    if "step_parts" in report:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in report["step_parts"].items() if share >= 0.005)
        console.print(f"Where the time goes: {parts}.")
    console.print(f"{machine(report)}.")
