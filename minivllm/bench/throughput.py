"""Tokens per second on a batch of requests of random lengths, beside `transformers` on the same
weights.

All prompts are random token ids, so that nothing depends on a tokenizer; outputs have fixed lengths
(ignore_eos). The time is wall clock from the first request handed over to the last token received,
after a warm-up.

`run` measures one workload, beside transformers if asked to; `run_cases` measures named ones
(`cases.CASES`, among them nano-vLLM's protocol) in one engine, each beside its floor.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minivllm.bench.cases import Workload
from minivllm.bench.costs import ModelCosts
from minivllm.bench.report import Deadline, attempt, environment, say, spread
from minivllm.bench.roofline import case_floor
from minivllm.bench.running import drain
from minivllm.bench.timing import measure_rates, rates_of
from minivllm.engine.llm_engine import EngineMetrics
from minivllm.errors import ConfigError
from minivllm.kernels import Kernels
from minivllm.layers.linear import Linear
from minivllm.llm import LLM
from minivllm.sampling_params import SamplingParams

#: Output tokens per request of the warm-up. It is short, compiles every kernel, and has steps of
#: every size.
WARM_UP_TOKENS = 8

#: A way to run the workload once; returns seconds.
Runner = Callable[[list[list[int]], list[int]], float]


def minivllm_runner(llm: LLM, temperature: float = 0.0) -> Runner:
    """`LLM.generate` on all requests at once. The prefix cache is emptied first: a repeat must not
    profit.
    """

    def run(prompts: list[list[int]], output_lens: list[int]) -> float:
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        params = [
            SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True)
            for n in output_lens
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        for output in outputs:
            if output.error is not None:
                raise output.error
        if [len(output.outputs[0].token_ids) for output in outputs] != output_lens:
            limit = llm.llm_engine.config.max_model_len
            raise ConfigError(
                f"max_model_len={limit} has no room for these prompts and outputs; raise it."
            )
        return elapsed

    return run


def static_batch_runner(model: Any) -> Runner:
    """transformers' `generate` on one left-padded batch, which runs until its longest output is
    done.
    """

    def run(prompts: list[list[int]], output_lens: list[int]) -> float:
        longest = max(len(prompt) for prompt in prompts)
        start = time.perf_counter()
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device
        )
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(output_lens),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
        out.tolist()
        elapsed = time.perf_counter() - start
        assert out.shape[1] == longest + max(output_lens)
        return elapsed

    return run


def generate_batch_runner(model: Any) -> Runner:
    """transformers' continuous batching, with the output length of each request."""
    from transformers import GenerationConfig

    def run(prompts: list[list[int]], output_lens: list[int]) -> float:
        config = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(output_lens)
        )
        start = time.perf_counter()
        with model.continuous_batching_context_manager(
            generation_config=config, block=True, timeout=5
        ) as manager:
            for prompt, length in zip(prompts, output_lens, strict=True):
                manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
            finished: dict[str, list[int]] = {}
            while len(finished) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    finished[result.request_id] = result.generated_tokens
                elif not manager.is_running():
                    raise RuntimeError(
                        "transformers' continuous batching stopped before the requests had finished"
                    )
        elapsed = time.perf_counter() - start
        assert sorted(map(len, finished.values())) == sorted(output_lens)
        return elapsed

    return run


@torch.inference_mode()
def gemm_floor(
    model: nn.Module, num_rows: list[int], num_logit_rows: list[int], repeats: int = 5
) -> dict[str, float]:
    """Seconds that the matrix products of these steps take here by themselves, and their FLOPs.

    num_rows: tokens through the layers in each step; num_logit_rows: rows through the head. Timed
    with the engine's own product and the model's matrices in their order: they come from memory as
    they do in a step, not from the cache.
    """
    linears = [layer for layer in model.model.modules() if isinstance(layer, Linear)]
    weights, product = [linear.weight for linear in linears], linears[0].kernels.linear

    def seconds(rows: int, matrices: list[torch.Tensor]) -> float:
        inputs = [torch.randn(rows, matrix.shape[1]) for matrix in matrices]
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for x, matrix in zip(inputs, matrices, strict=True):
                product(x, matrix)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    head = [model.lm_head.weight]
    layers_take = {rows: seconds(rows, weights) for rows in sorted(set(num_rows))}
    head_takes = {rows: seconds(rows, head) for rows in sorted(set(num_logit_rows))}
    flops = (
        2 * sum(num_rows) * sum(w.numel() for w in weights)
        + 2 * sum(num_logit_rows) * head[0].numel()
    )
    total = sum(layers_take[n] for n in num_rows) + sum(head_takes[n] for n in num_logit_rows)
    return {"flops": float(flops), "seconds": total}


def run(
    model: str | Path | None = None,
    workload: Workload | None = None,
    *,
    repeats: int = 3,
    compare: bool = False,
    **engine_options: Any,
) -> dict[str, Any]:
    """Run the workload `repeats` times after a warm-up; with compare, in turn with transformers,
    order alternated.
    """
    workload = workload or Workload()
    llm = LLM(model, skip_tokenizer_init=True, **engine_options)
    engine = llm.llm_engine
    prompts, output_lens = workload.draw(engine.model_config.vocab_size)
    runners: dict[str, Runner] = {"minivllm": minivllm_runner(llm, workload.temperature)}
    if compare:
        runners |= _transformers_runners(
            engine.model_path, engine.model_runner.dtype, engine.config.device
        )
    order = list(runners)
    for name in tqdm(order, desc="warm-up"):
        runners[name](prompts, output_lens)
    times: dict[str, list[float]] = {name: [] for name in order}
    for round_number in tqdm(range(repeats), desc="rounds"):
        for name in order if round_number % 2 == 0 else reversed(order):
            # what one runner leaves behind (gigabytes of cache, say) must not be freed while
            # another is timed
            gc.collect()
            times[name].append(runners[name](prompts, output_lens))
    num_output = sum(output_lens)
    report = {
        "benchmark": "throughput",
        "model": engine.model_path.name,
        "dtype": engine.config.dtype,
        "workload": asdict(workload),
        "engine": {k: v for k, v in asdict(engine.config).items() if k != "device"},
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": num_output,
        "results": {
            name: {
                "seconds": spread(values),
                "output_tokens_per_second": spread([num_output / t for t in values]),
            }
            for name, values in times.items()
        },
        "environment": environment(),
    }
    for name in order[1:]:
        ratios = [
            theirs / ours for theirs, ours in zip(times[name], times["minivllm"], strict=True)
        ]
        report["results"][name]["minivllm_is_faster_by"] = spread(ratios)
    if engine.config.speculative_config is not None:
        report["speculation"] = acceptance(llm.metrics())
    if engine.config.device == "cpu":
        report["floor"] = _floor(llm, prompts, output_lens)
        kernels = engine.model_runner.sampler.kernels
        report["step_parts"] = _step_parts(model, kernels, prompts, output_lens, engine_options)
    return report


def run_cases(
    cases: dict[str, Workload],
    model: str | Path | None = None,
    *,
    repeats: int = 3,
    max_seconds: float | None = None,
    **engine_options: Any,
) -> dict[str, Any]:
    """Run each workload `repeats` times on one engine, after a short warm-up of its own.

    max_seconds: a case, or a repeat of one, that would begin later is left out. The engine takes
    sequences just long enough for the longest case unless max_model_len says otherwise.
    """
    deadline = Deadline(max_seconds)
    longest = max(w.prompt_tokens[1] + w.output_tokens[1] for w in cases.values())
    engine_options.setdefault("max_model_len", -(-(longest + 1) // 64) * 64)
    say("throughput: starting the engine")
    start = time.perf_counter()
    llm = LLM(model, skip_tokenizer_init=True, **engine_options)
    engine = llm.llm_engine
    started = time.perf_counter() - start
    minivllm_runner(llm)([[1] * 16], [1])
    first_token = time.perf_counter() - start
    runner = engine.model_runner
    measured = measure_rates(runner.device, runner.dtype)
    config = asdict(engine.model_config)
    costs = ModelCosts.of(config, runner.dtype.itemsize)
    limits = {
        name: getattr(engine.config, name) for name in ("max_num_seqs", "max_num_batched_tokens")
    }
    results: dict[str, Any] = {}
    for name, workload in cases.items():
        found = attempt(name, deadline, lambda w=workload: _run_case(llm, w, repeats, deadline))
        if "failed" in found:
            attempt(f"{name}, clearing up", Deadline(), lambda: drain(engine) or {}, quiet=True)
        else:
            prompts, output_lens = workload.draw(engine.model_config.vocab_size)
            floor = case_floor(
                list(map(len, prompts)), output_lens, costs, rates_of(measured), **limits
            )
            found |= {
                "floor": floor,
                "share_of_floor": floor["seconds"] / found["seconds"]["median"],
            }
        results[name] = {"workload": asdict(workload)} | found
    return {
        "benchmark": "throughput",
        "model": engine.model_path.name,
        "model_config": config,
        "dtype": engine.config.dtype,
        "engine": {k: v for k, v in asdict(engine.config).items() if k != "device"},
        "start": {"engine_seconds": started, "first_token_seconds": first_token},
        "rates": measured,
        "cases": results,
        "seconds": round(deadline.elapsed, 1),
        "environment": environment(),
    }


def acceptance(after: EngineMetrics, before: EngineMetrics | None = None) -> dict[str, Any]:
    """What became of the proposals between two snapshots of an engine's counters.

    accepted_per_position: the share of the steps with proposals in which the first, second, ...
    proposal was right.
    """
    before = before or EngineMetrics()
    drafts = after.num_drafts - before.num_drafts
    earlier = before.num_accepted_tokens_per_pos
    counts = [
        count - (earlier[position] if position < len(earlier) else 0)
        for position, count in enumerate(after.num_accepted_tokens_per_pos)
    ]
    return {
        "drafts": drafts,
        "proposed": after.num_draft_tokens - before.num_draft_tokens,
        "accepted": after.num_accepted_tokens - before.num_accepted_tokens,
        "accepted_per_position": [count / max(drafts, 1) for count in counts],
    }


def _run_case(llm: LLM, workload: Workload, repeats: int, deadline: Deadline) -> dict[str, Any]:
    prompts, output_lens = workload.draw(llm.llm_engine.model_config.vocab_size)
    runner = minivllm_runner(llm, workload.temperature)
    runner(prompts, [min(WARM_UP_TOKENS, n) for n in output_lens])
    before = llm.metrics()
    times: list[float] = []
    while len(times) < repeats and not (times and deadline.passed):
        gc.collect()
        times.append(runner(prompts, output_lens))
    after = llm.metrics()
    num_prompt, num_output = sum(map(len, prompts)), sum(output_lens)
    return {
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "seconds": spread(times),
        "output_tokens_per_second": spread([num_output / t for t in times]),
        "prompt_tokens_per_second": spread([num_prompt / t for t in times]),
        "steps": (after.num_steps - before.num_steps) // len(times),
        "preemptions": after.num_preemptions - before.num_preemptions,
        **({"speculation": acceptance(after, before)} if after.num_drafts else {}),
    }


def _transformers_runners(path: Path, dtype: torch.dtype, device: str) -> dict[str, Runner]:
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
        model.generation_config.eos_token_id = None
        return model

    # One model each: continuous batching replaces the attention implementation of the model it is
    # given.
    return {
        "transformers.generate": static_batch_runner(load()),
        "transformers.generate_batch": generate_batch_runner(load()),
    }


def _floor(llm: LLM, prompts: list[list[int]], output_lens: list[int]) -> dict[str, float]:
    """The matrix products of the steps that the engine really took."""
    engine = llm.llm_engine
    rows, logit_rows = [], []
    execute = engine.model_runner.execute

    def counted(batch: Any) -> Any:
        rows.append(batch.num_tokens)
        logit_rows.append(len(batch.sampled))
        return execute(batch)

    engine.model_runner.execute = counted
    minivllm_runner(llm)(prompts, output_lens)
    return gemm_floor(engine.model_runner.model, rows, [n for n in logit_rows if n]) | {
        "steps": len(rows)
    }


def _step_parts(
    model: str | Path | None,
    kernels: Kernels,
    prompts: list[list[int]],
    output_lens: list[int],
    engine_options: dict[str, Any],
) -> dict[str, float]:
    """Share of a run's time by part of a step, on an engine whose parts are wrapped in timers."""
    seconds: dict[str, float] = defaultdict(float)
    inside: list[float] = [
        0.0
    ]  # of each timed call that is open: seconds of the timed calls within it

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            elapsed = time.perf_counter() - start
            seconds[name] += elapsed - inside.pop()  # every second belongs to the innermost part
            inside[-1] += elapsed
            return result

        return wrapper

    # merge_attention runs inside decode_attention and is part of its time.
    names = [
        name for name, part in vars(kernels).items() if callable(part) and name != "merge_attention"
    ]
    timers = {name: timed(name, getattr(kernels, name)) for name in names}
    mine = replace(kernels, **timers)
    llm = LLM(model, skip_tokenizer_init=True, kernels=mine, **engine_options)
    runner, scheduler = llm.llm_engine.model_runner, llm.llm_engine.scheduler
    for owner, attribute, name in (
        (runner, "_build", "build_batch"),
        (runner.model, "forward", "forward"),
        (runner.model, "compute_logits", "lm_head"),
        (scheduler, "schedule", "schedule"),
        (scheduler, "update", "update"),
    ):
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    minivllm_runner(llm)(prompts, output_lens)  # warm-up
    seconds.clear()
    total = minivllm_runner(llm)(prompts, output_lens)
    seconds["embedding and module calls"] = seconds.pop("forward")
    seconds["everything else"] = total - sum(seconds.values())
    return {
        name: value / total for name, value in sorted(seconds.items(), key=lambda pair: -pair[1])
    }
