"""How long a user waits: for the first token (TTFT), between tokens (TPOT), and how that grows with
the work.

All requests arrive at once, so a TTFT includes the prefill of the whole batch. TPOT is the mean
time between a request's tokens after the first. Growth is measured while all requests decode.
Taught in notebooks/10_measuring.ipynb.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minivllm.bench.cases import Workload
from minivllm.bench.report import Deadline, attempt, environment, percentiles, say, spread
from minivllm.bench.running import drain, start_decoding, timed_steps
from minivllm.llm import LLM
from minivllm.parallel.launch import pick_device
from minivllm.sampling_params import SamplingParams

BATCHES = {"cuda": (1, 8, 64, 256), "cpu": (1, 4, 16)}
RUNNING = {"cuda": (1, 4, 16, 64, 256, 1024), "cpu": (1, 4, 16)}
CONTEXTS = {"cuda": (1024, 8192, 32768), "cpu": (64, 256)}
#: (requests, tokens of the prefix they share, tokens of their own)
PREFIX = {"cuda": (64, 2048, 64), "cpu": (8, 128, 16)}


def serve(
    llm: LLM, batch: int, prompt_tokens: int, output_tokens: int, repeats: int
) -> dict[str, Any]:
    """TTFT and TPOT in seconds over `repeats` rounds of `batch` requests, and output tokens per
    second of each round.
    """
    workload = Workload(
        batch, (prompt_tokens, prompt_tokens), (output_tokens, output_tokens), 0, 0.6
    )
    prompts, output_lens = workload.draw(llm.llm_engine.model_config.vocab_size)
    params = SamplingParams(temperature=0.6, max_tokens=output_tokens, ignore_eos=True)
    first, between, rates = [], [], []
    for round_number in range(1 + repeats):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        if round_number:  # the first is the warm-up
            first += [output.metrics.time_to_first_token for output in outputs]
            between += [output.metrics.time_per_output_token for output in outputs]
            rates.append(sum(output_lens) / elapsed)
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "ttft": percentiles(first),
        "tpot": percentiles(between),
        "output_tokens_per_second": spread(rates),
    }


def decode_steps(llm: LLM, num_requests: int, context: int, num_steps: int) -> dict[str, Any]:
    """Seconds of a step, and tokens per second, while so many requests of about this context
    decode.
    """
    engine = llm.llm_engine
    try:
        start_decoding(engine, num_requests, context, num_steps)
        before = engine.metrics()
        times = timed_steps(engine, num_steps)
        after = engine.metrics()
    finally:
        drain(engine)
    return {
        "running": num_requests,
        "context": context,
        "steps": num_steps,
        "step_seconds": percentiles(times),
        "tokens_per_second": (
            (after.num_generated_tokens - before.num_generated_tokens) / sum(times)
        ),
    }


def shared_prefix(
    llm: LLM, num_requests: int, prefix: int, own: int, repeats: int
) -> dict[str, Any]:
    """Seconds until every request has its first token, where all share a prefix and where none
    does.

    The cache is emptied before each round: computing the prefix once is part of the time.
    """
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.6, max_tokens=1, ignore_eos=True)
    times: dict[str, list[float]] = {"distinct": [], "shared": []}
    for round_number in range(1 + repeats):
        for kind, seconds in times.items():
            prompts = _prompts(
                kind == "shared", num_requests, prefix, own, engine.model_config.vocab_size
            )
            llm.reset_prefix_cache()
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            if round_number:
                seconds.append(time.perf_counter() - start)
    ratios = [slow / fast for slow, fast in zip(times["distinct"], times["shared"], strict=True)]
    return {
        "requests": num_requests,
        "prefix_tokens": prefix,
        "own_tokens": own,
        **{f"{kind}_seconds": spread(values) for kind, values in times.items()},
        "faster_by": spread(ratios),
    }


def _prompts(
    shared: bool, num_requests: int, prefix: int, own: int, vocab_size: int
) -> list[list[int]]:
    rng = random.Random(prefix)
    first = [rng.randrange(vocab_size) for _ in range(prefix)]
    prompts = []
    for _ in range(num_requests):
        start = first if shared else [rng.randrange(vocab_size) for _ in range(prefix)]
        prompts.append(start + [rng.randrange(vocab_size) for _ in range(own)])
    return prompts


@dataclass(frozen=True)
class Loads:
    """What the engine is given. None takes what suits the device.

    batches: numbers of requests that arrive at once, each of prompt_tokens and output_tokens.
    running: numbers of requests that decode at a short context. contexts: lengths, in tokens, at
    which context_requests requests decode.
    """

    batches: Sequence[int] | None = None
    running: Sequence[int] | None = None
    contexts: Sequence[int] | None = None
    prompt_tokens: int = 512
    output_tokens: int = 128
    context_requests: int = 8


def run(
    model: str | Path | None = None,
    loads: Loads = Loads(),
    *,
    num_steps: int = 64,
    repeats: int = 3,
    max_seconds: float | None = None,
    **engine_options: Any,
) -> dict[str, Any]:
    """TTFT and TPOT at these batch sizes, steps at these numbers of requests and contexts, and
    prefix hits.

    num_steps: decode steps timed at each size. repeats: rounds of a batch after its warm-up.
    max_seconds: rows that would begin later are left out. Other options are the engine's.
    """
    kind = pick_device(engine_options.get("device", "auto")).partition(":")[0]
    batches = loads.batches or BATCHES[kind]
    running = loads.running or RUNNING[kind]
    contexts = loads.contexts or CONTEXTS[kind]
    deadline = Deadline(max_seconds)
    short_context = 128 if kind == "cuda" else 32
    longest = max(
        *contexts,
        short_context,
        loads.prompt_tokens + loads.output_tokens,
        sum(PREFIX[kind][1:]),
    )
    engine_options.setdefault("max_model_len", -(-(longest + num_steps + 128) // 64) * 64)
    engine_options.setdefault(
        "max_num_seqs", max(*running, *batches, loads.context_requests, PREFIX[kind][0])
    )
    say("latency: starting the engine")
    llm = LLM(model, skip_tokenizer_init=True, **engine_options)

    def serving(batch: int) -> dict[str, Any]:
        return {"batch": batch} | attempt(
            f"batch {batch}",
            deadline,
            lambda: serve(llm, batch, loads.prompt_tokens, loads.output_tokens, repeats),
        )

    def decoding(label: str, requests: int, context: int) -> dict[str, Any]:
        return {"running": requests, "context": context} | attempt(
            label, deadline, lambda: decode_steps(llm, requests, context, num_steps)
        )

    report: dict[str, Any] = {
        "benchmark": "latency",
        "model": llm.llm_engine.model_path.name,
        "model_config": asdict(llm.llm_engine.model_config),
        "dtype": llm.llm_engine.config.dtype,
        "engine": {k: v for k, v in asdict(llm.llm_engine.config).items() if k != "device"},
        "serving": [serving(n) for n in batches],
        "growth_with_requests": [decoding(f"{n} running", n, short_context) for n in running],
        "growth_with_context": [
            decoding(f"context {n}", loads.context_requests, n) for n in contexts
        ],
        "shared_prefix": attempt(
            "shared prefix", deadline, lambda: shared_prefix(llm, *PREFIX[kind], repeats)
        ),
    }
    return report | {"seconds": round(deadline.elapsed, 1), "environment": environment()}
