"""`minivllm generate`: answers to prompts, or their continuations."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from minivllm.cli.options import (
    ChatOrRaw,
    Engine,
    MaxTokens,
    MinP,
    Model,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    open_llm,
)
from minivllm.cli.prompts import prompts_from_stdin, render_all, say_refused, serve
from minivllm.cli.stdio import USER_ERROR, write
from minivllm.errors import RequestError
from minivllm.sampling_params import SamplingParams
from minivllm.text import one_line

if TYPE_CHECKING:
    from minivllm.engine.llm_engine import EngineMetrics
    from minivllm.llm import LLM


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
    chat: ChatOrRaw = None,
    system: System = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or when done.")
    ] = True,
    stats: Annotated[
        bool, typer.Option("--stats", help="At the end, say how long it took (on stderr).")
    ] = False,
    engine: Engine = None,
) -> None:
    """Answer or continue prompts. Several prompts run as one batch; their texts are printed in the
    order of the prompts.
    """
    prompts = prompts or prompts_from_stdin()
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    start = time.perf_counter()
    llm = open_llm(model, engine)
    inputs = render_all(llm, prompts, chat, system)
    seeded = [
        params if seed is None else replace(params, seed=seed + i) for i in range(len(prompts))
    ]
    first_text, current, refused = None, -1, 0
    for index, piece in serve(llm, inputs, seeded, stream):
        while current < index:
            current += 1
            if len(prompts) > 1:
                write(f"{'' if current == 0 else chr(10) * 2}--- {one_line(prompts[current])}\n")
        if isinstance(piece, RequestError):
            say_refused(piece, index, len(prompts))
            refused += 1
            continue
        if piece and first_text is None:
            first_text = time.perf_counter() - start
        write(piece)
    write("\n")
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
        " from the prefix cache" + _acceptance(metrics),
        dim=True,
        err=True,
    )


def _acceptance(metrics: EngineMetrics) -> str:
    """What became of the proposals, if any were made."""
    if not metrics.num_draft_tokens:
        return ""
    return f"; {metrics.num_accepted_tokens} of {metrics.num_draft_tokens} proposed tokens accepted"
