"""The CPU's work for a step in which every request streams text, by part; and the longest steps.

The model and its graphs are replaced by a stand-in that gives tokens at once, so what is left is
the engine's own Python: plans, slots, texts, outputs. On a GPU this work hides behind the kernels,
as long as it takes less time than they do. Times are of the thread (`time.thread_time`), so they
grow little where other programs want the same core.

    schedule              which tokens of which sequences
    launch the step       rows, slots, new blocks; on a GPU also copies and the launch itself
    update                new tokens into the sequences, full blocks into the prefix cache
    extend the requests   tokens into text
    make the outputs      what each reader gets
    everything else       what connects these

Beside the parts stands how often Python's garbage collector ran, and for how long. A step that it
interrupts is the long tail that a reader notices.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minivllm.bench.breakdown import COLLECTOR, cpu_parts
from minivllm.bench.report import Deadline, attempt, environment, percentiles, say
from minivllm.bench.running import drain, start_decoding
from minivllm.engine.engine_core import EnginePieces
from minivllm.engine.llm_engine import LLMEngine
from minivllm.kernels import Kernels
from minivllm.sampling_params import RequestOutputKind

PROMPT_TOKENS = 96


class NoModel(nn.Module):
    """Costs nothing. Its hidden states and logits have one column."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, token_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros(len(token_ids), 1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class NoGraphs:
    """In the place of `DecodeGraphs`: each step gives tokens of ordinary text, without a GPU."""

    memory_bytes = 0

    def __init__(self, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        # Beyond the single bytes and special tokens that most vocabularies begin with.
        self._tokens = torch.randint(
            min(300, vocab_size - 1), vocab_size, (4096,), generator=generator
        )
        self._steps = itertools.count()

    def replay(self, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B], and hidden states that nobody reads."""
        first = 61 * next(self._steps) % len(self._tokens)
        tokens = self._tokens.roll(-first).repeat(-(-len(slots) // len(self._tokens)))
        return tokens[: len(slots)], torch.zeros(len(slots), 1)

    def release(self) -> None:
        """There is nothing to release."""


def _no_sampling(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.full((len(logits),), 300)


def engine_without_model(model: str | Path | None, num_requests: int, num_steps: int) -> LLMEngine:
    """An engine with the tokenizer of `model`, for so many requests and steps at once."""
    longest = PROMPT_TOKENS + num_steps + 64
    kernels = replace(Kernels.reference(), sample=_no_sampling)
    engine = LLMEngine(
        model,
        pieces=EnginePieces(kernels=kernels, model_cls=NoModel),
        device="cpu",
        attention_backend="torch",
        load_format="dummy",
        async_scheduling=True,
        max_num_seqs=num_requests,
        max_num_batched_tokens=max(8192, num_requests),
        max_model_len=longest,
        block_size=64,
        num_kv_blocks=num_requests * -(-longest // 64),
    )
    return engine


def _decode(engine: LLMEngine, num_requests: int, num_steps: int) -> None:
    """All requests decode, with num_steps steps to come."""
    engine.model_runner.graphs = None
    start_decoding(
        engine, num_requests, PROMPT_TOKENS, num_steps, output_kind=RequestOutputKind.DELTA
    )
    graphs: Any = NoGraphs(engine.model_config.vocab_size)
    engine.model_runner.graphs = graphs


def measure(model: str | Path | None, num_requests: int, num_steps: int) -> dict[str, Any]:
    """A row: seconds of a step, and milliseconds of its parts, with so many streams."""
    engine = engine_without_model(model, num_requests, num_steps)
    try:
        _decode(engine, num_requests, num_steps)
        runs_before = sum(generation["collections"] for generation in gc.get_stats())
        times = []
        for _ in range(num_steps):
            start = time.thread_time()
            engine.step()
            times.append(time.thread_time() - start)
        runs = sum(generation["collections"] for generation in gc.get_stats()) - runs_before
        drain(engine)
        _decode(engine, num_requests, num_steps)
        parts = cpu_parts(engine, num_steps, time.thread_time)
        drain(engine)
    finally:
        engine.close()
    found = percentiles(times)
    return {
        "step_seconds": found,
        "p99_by_median": found["p99"] / found["median"],
        "us_per_request": 1e6 * found["median"] / num_requests,
        "collector_runs": runs,
        "cpu_ms": {COLLECTOR: 0.0, **parts},
    }


def run(
    model: str | Path | None = None,
    running: Sequence[int] = (256, 1024),
    *,
    num_steps: int = 256,
    max_seconds: float | None = None,
) -> dict[str, Any]:
    """Measure so many streams at once. model: whose tokenizer; None is the bundled one's.

    max_seconds: rows that would begin later are left out.
    """
    deadline = Deadline(max_seconds)
    rows = []
    for count in running:
        say(f"streams: {count} at once")
        row = attempt(f"{count} streams", deadline, lambda n=count: measure(model, n, num_steps))
        rows.append({"running": count} | row)
    return {
        "benchmark": "streams",
        "model": "the bundled model" if model is None else Path(model).name,
        "steps": num_steps,
        "rows": rows,
        "seconds": round(deadline.elapsed, 1),
        "environment": environment(),
    }
