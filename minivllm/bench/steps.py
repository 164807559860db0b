"""How long a step takes: decodes alone, prompt chunks alone, and both together, from an engine that
does nothing else.

Each step has two times, which are medians. `seconds` is from planning the step to its results;
steps do not overlap (``async_scheduling=False``). `gpu_seconds` is how long its kernels ran,
without the gaps between them. The two differ much where Python launches kernels more slowly than
the GPU runs them.
The cost models of `minivllm.course.sim.simulator` are fitted to such a report. Weights are random;
speed does not depend on them.

    # The shape of Qwen3-8B, bfloat16, on a GPU:
    python -m minivllm.bench.steps --out recorded/steps-h200.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minivllm.bench.report import environment, save_report
from minivllm.bench.shapes import shape_directory
from minivllm.engine.llm_engine import LLMEngine
from minivllm.sampling_params import SamplingParams

#: (decoding sequences, tokens each of them has, tokens of a prompt in the same step, prompt tokens
#: computed before).
DECODES = [
    (n, context, 0, 0)
    for n in (1, 8, 32, 64, 128, 256)
    for context in (128, 1024, 4096)
    if n * context < 6e5
]
CHUNKS = [
    (0, 0, n, start) for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192) for start in (0, 4096)
]
MIXED = [(count, 1024, n, 0) for count in (8, 32, 128) for n in (128, 256, 512, 1024, 2048, 4096)]
WARM_UP = 2


def time_step(
    engine: LLMEngine, decodes: int, context: int, prompt: int, start: int, repeats: int
) -> dict[str, Any]:
    """A step with `decodes` sequences of `context` tokens each and `prompt` tokens of a prompt from
    position `start`.

    engine: made without prefix caching and without async scheduling, budget and slots large enough.
    """
    scheduler = engine.scheduler
    budget = scheduler.max_num_batched_tokens
    num_steps = 2 * (repeats + WARM_UP) + 2 + decodes * context // (budget - decodes)
    long = SamplingParams(max_tokens=num_steps, ignore_eos=True, temperature=0)
    names = [engine.add_request([i + 1] * context, long) for i in range(decodes)]
    while scheduler.waiting or any(seq.num_uncomputed_tokens > 1 for seq in scheduler.running):
        engine.step()
    seconds, gpu_seconds, contexts = [], [], []
    for repeat in range(WARM_UP + repeats):
        if prompt:
            short = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)
            last = engine.add_request([7] * (start + prompt), short)
            scheduler.max_num_batched_tokens = decodes + start
            if start:
                engine.step()
            scheduler.max_num_batched_tokens = decodes + prompt
        wall, gpu = _timed(engine) if repeat % 2 else (_wall(engine), None)
        assert len(scheduler.running) == decodes + bool(prompt)
        contexts.append(sum(seq.num_computed_tokens for seq in scheduler.running))
        scheduler.max_num_batched_tokens = budget
        if prompt:
            engine.abort_request(last)
        if repeat >= WARM_UP:  # the first ones compile
            gpu_seconds.append(gpu) if repeat % 2 else seconds.append(wall)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "decodes": decodes,
        "prompt_tokens": prompt,
        "start": start,
        "context": statistics.median(contexts),
        "seconds": round(statistics.median(seconds), 6),
        "min": round(min(seconds), 6),
        "max": round(max(seconds), 6),
        "gpu_seconds": round(statistics.median(gpu_seconds), 6),
    }


def _wall(engine: LLMEngine) -> float:
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began


def _timed(engine: LLMEngine) -> tuple[float, float]:
    """(seconds under the profiler, seconds that kernels and copies ran)."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall = _wall(engine)
        torch.cuda.synchronize()
    on_gpu = [
        event
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return wall, sum(event.self_device_time_total for event in on_gpu) / 1e6


def run(model: str | Path, name: str, repeats: int = 12, **options: Any) -> dict[str, Any]:
    """Time the steps of `DECODES`, `CHUNKS` and `MIXED`. Their context: tokens whose K and V are
    there afterwards.
    """
    engine = LLMEngine(
        model,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        max_num_seqs=256,
        max_num_batched_tokens=8448,
        **options,
    )
    steps = [time_step(engine, *shape, repeats) for shape in [*DECODES, *CHUNKS, *MIXED]]
    return {
        "benchmark": "steps",
        "model": name,
        "dtype": engine.config.dtype,
        "steps": steps,
        "repeats": repeats,
        "num_kv_blocks": engine.config.num_kv_blocks,
        "block_size": engine.config.block_size,
        "kv_bytes_per_token": engine.model_runner.kv_bytes_per_token,
        "environment": environment(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m minivllm.bench.steps", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with shape_directory("qwen3-8b") as folder:
        save_report(
            run(folder, "Qwen3-8B (random weights)", load_format="dummy", max_model_len=16384), out
        )


if __name__ == "__main__":
    main()
