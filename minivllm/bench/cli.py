"""`minivllm bench`: commands that measure. Imported only when one of them is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from minivllm.bench.report import save_report
from minivllm.bench.throughput import Workload, run

app = typer.Typer(
    help="Measure speed, and print what was measured on which machine.", no_args_is_help=True, add_completion=False
)


@app.callback()
def bench() -> None:
    """Measure speed, and print what was measured on which machine."""


@app.command()
def throughput(
    model: Annotated[str | None, typer.Option(help="Directory or hub id; the bundled model if left out.")] = None,
    compare: Annotated[str | None, typer.Option(help="'transformers': run it beside us on the same requests.")] = None,
    num_requests: Annotated[int, typer.Option(min=1)] = 32,
    prompt_tokens: Annotated[tuple[int, int], typer.Option(help="Least and most tokens of a prompt.")] = (10, 128),
    output_tokens: Annotated[tuple[int, int], typer.Option(help="Least and most tokens of an output.")] = (16, 128),
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Draws lengths and prompts.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up; medians are quoted.")] = 7,
    dtype: Annotated[str, typer.Option()] = "auto",
    device: Annotated[str, typer.Option()] = "auto",
    max_num_seqs: Annotated[int, typer.Option(min=1)] = 256,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    dummy_weights: Annotated[bool, typer.Option(help="Random weights; needs only config.json.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write everything measured to this JSON file.")] = None,
) -> None:
    """Output tokens a second on a batch of requests of random lengths."""
    if compare not in (None, "transformers"):
        raise typer.BadParameter("only 'transformers' can be compared with", param_hint="--compare")
    if compare and temperature:
        raise typer.BadParameter("the comparison is greedy", param_hint="--temperature")
    report = run(
        model,
        Workload(num_requests, prompt_tokens, output_tokens, seed, temperature),
        repeats=repeats,
        compare=compare is not None,
        dtype=dtype,
        device=device,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        load_format="dummy" if dummy_weights else "auto",
    )
    _print(report)
    if out is not None:
        save_report(report, out)
        typer.echo(f"Saved to {out}.")


def _print(report: dict[str, Any]) -> None:
    console, environment = Console(), report["environment"]
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
    machine = environment["gpu"]["name"] if environment["gpu"] else environment["cpu"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    threads = environment["torch_threads"]
    console.print(f"{machine}, {threads} threads, {versions}; {environment['date']}, commit {environment['commit']}.")
