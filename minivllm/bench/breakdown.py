"""Where the time of a decode step goes: kernels by name, the gaps between them, and the CPU time
that the GPU waits for.

Three things are measured while all requests decode. The requests have the same length in the middle
of each measurement.

    wall time      of a step
    graph time     the GPU's time for the step's CUDA graph: many replays are queued, so the GPU
                   never waits for the CPU
    profile        which kernels ran, and how long, as `torch.profiler` sees them

    step = kernels (at least one is running) + gaps (between the kernels of a graph)
           + exposed CPU time (the step's time beyond its graph)

Without a graph, the gaps are taken from the profile. A step begins where a kernel that runs once
per step runs again, and the longest gap before that kernel is the gap between two steps. Python
then launches every kernel, so it causes the gaps, too. Taught in notebooks/10_measuring.ipynb.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minivllm.bench.report import Deadline, attempt, environment, percentiles, say
from minivllm.bench.running import WARM_UP_STEPS, drain, start_decoding, timed_steps
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.model_runner import StepResult
from minivllm.parallel.launch import pick_device

#: Kernels listed by name; the others are summed up.
MOST_NAMES = 30

#: The part of a step that belongs to no line of the engine.
COLLECTOR = "Python's garbage collector"


@dataclass(frozen=True)
class Interval:
    """Something that ran on the GPU, in microseconds from some start."""

    name: str
    start: float
    end: float
    is_kernel: bool = True  # and not a copy or a fill


def gpu_intervals(profiler: Any) -> list[Interval]:
    """What ran on the GPU, in order of its start."""
    found = []
    for event in profiler.events():
        if (
            event.device_type == torch.autograd.DeviceType.CUDA
            and event.time_range.end > event.time_range.start
        ):
            copied = event.name.startswith(("Memcpy", "Memset"))
            found.append(
                Interval(event.name, event.time_range.start, event.time_range.end, not copied)
            )
    return sorted(found, key=lambda interval: interval.start)


def busy_us(intervals: Sequence[Interval]) -> float:
    """Microseconds in which at least one of them (in order of start) ran."""
    total, reached = 0.0, float("-inf")
    for interval in intervals:
        total += max(0.0, interval.end - max(interval.start, reached))
        reached = max(reached, interval.end)
    return total


def step_marker(intervals: Sequence[Interval], num_steps: int) -> str:
    """The name of a kernel that ran once in every step; ValueError when there is none."""
    counts = Counter(interval.name for interval in intervals if interval.is_kernel)
    for tolerance in (0, 1):  # the profiler may begin or end within a step that overlaps
        names = [name for name, count in counts.items() if abs(count - num_steps) <= tolerance]
        if names:
            return names[-1]
    raise ValueError(f"no kernel ran once in each of the {num_steps} steps")


def split_steps(intervals: Sequence[Interval], num_steps: int) -> list[dict[str, float]]:
    """Of every whole step: microseconds of its period, of kernels running in it, and of its longest
    gap.
    """
    kernels = [interval for interval in intervals if interval.is_kernel]
    marker = step_marker(kernels, num_steps)
    marks = [index for index, kernel in enumerate(kernels) if kernel.name == marker]
    steps = []
    for first, last in pairwise(marks):
        inside = kernels[first:last]
        gaps, reached = [], inside[0].end
        for kernel in kernels[first + 1 : last + 1]:
            gaps.append(max(0.0, kernel.start - reached))
            reached = max(reached, kernel.end)
        period = kernels[last].start - kernels[first].start
        steps.append({"period": period, "busy": busy_us(inside), "longest_gap": max(gaps)})
    return steps


def by_name(intervals: Sequence[Interval], num_steps: int) -> list[dict[str, Any]]:
    """Microseconds and calls per step of each name, the longest first; beyond `MOST_NAMES` they are
    one row.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for interval in intervals:
        times[interval.name].append(interval.end - interval.start)
    total = sum(map(sum, times.values())) or 1.0
    ordered = sorted(times.items(), key=lambda pair: -sum(pair[1]))
    rows = [(_short(name), values) for name, values in ordered[:MOST_NAMES]]
    if rest := [value for _, values in ordered[MOST_NAMES:] for value in values]:
        rows.append((f"{len(ordered) - MOST_NAMES} others", rest))
    return [
        {
            "name": name,
            "calls_per_step": len(values) / num_steps,
            "us_per_step": sum(values) / num_steps,
            "share": sum(values) / total,
        }
        for name, values in rows
    ]


def _short(name: str) -> str:
    """A kernel's name without its template arguments, which are long."""
    name = name.removeprefix("void ")
    return name if len(name) <= 90 else f"{name[:87]}..."


class _Timers:
    """Seconds of the CPU's parts of a step, by wrapping the engine's own objects.

    A run of Python's garbage collector begins in whatever part happens to make the next object. So
    its seconds are a part of their own, and no other part's.
    """

    def __init__(self, engine: LLMEngine, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock
        self._collector_start = 0.0
        gc.callbacks.append(self._note_collector)
        scheduler, runner, processor = engine.scheduler, engine.model_runner, engine.processor
        execute = self._timed("launch the step", runner.execute)
        waited = self._timed("wait for the GPU", lambda result: StepResult.wait(result))
        scheduler.schedule = self._timed("schedule", scheduler.schedule)
        scheduler.update = self._timed("update", scheduler.update)

        class Waiting(StepResult):
            def wait(self) -> list[list[int]]:
                return waited(self)

        runner.execute = lambda batch: Waiting(**vars(execute(batch)))
        processor.process = self._timed("extend the requests", processor.process)
        processor.collect = self._timed("make the outputs", processor.collect)
        self._owners = [
            (scheduler, "schedule"),
            (scheduler, "update"),
            (runner, "execute"),
            (processor, "process"),
            (processor, "collect"),
        ]

    def _note_collector(self, phase: str, info: dict[str, int]) -> None:
        now = self._clock()
        if phase == "start":
            self._collector_start = now
        else:
            self.seconds[COLLECTOR] += now - self._collector_start

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            start, collected = self._clock(), self.seconds[COLLECTOR]
            try:
                return function(*args)
            finally:
                taken = self._clock() - start
                self.seconds[name] += taken - (self.seconds[COLLECTOR] - collected)

        return wrapper

    def remove(self) -> None:
        gc.callbacks.remove(self._note_collector)
        for owner, attribute in self._owners:
            delattr(owner, attribute)


def cpu_parts(
    engine: LLMEngine, num_steps: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Milliseconds per step of the CPU's parts, as means over the steps.

    In "wait for the GPU" the CPU has nothing to do. "everything else" has no timer of its own.
    """
    timers = _Timers(engine, clock)
    try:
        start = clock()
        for _ in range(num_steps):
            engine.step()
        total = clock() - start
    finally:
        timers.remove()
    parts = {name: seconds for name, seconds in timers.seconds.items() if seconds}
    parts["everything else"] = total - sum(parts.values())
    return {
        name: 1e3 * seconds / num_steps
        for name, seconds in sorted(parts.items(), key=lambda pair: -pair[1])
    }


def profile_gpu(engine: LLMEngine, num_steps: int) -> list[Interval]:
    """What ran on the GPU in so many steps."""
    for count in (2, num_steps):  # the first time, the profiler itself has to start
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(count):
                engine.step()
            torch.cuda.synchronize()
    return gpu_intervals(profiler)


@torch.inference_mode()
def graph_us(engine: LLMEngine, num_replays: int) -> float | None:
    """Microseconds of the running requests' graph, replayed back to back; None without graphs.

    Their positions advance with every replay, behind the scheduler's back: these requests must end
    now.
    """
    runner = engine.model_runner
    if runner.graphs is None:
        return None
    slots = [seq.slot for seq in engine.scheduler.running]
    runner.graphs.replay(slots)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_replays + 1)]
    events[0].record()
    for event in events[1:]:
        runner.graphs.replay(slots)
        event.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in pairwise(events))


@torch.inference_mode()
def recorded_graphs(engine: LLMEngine) -> dict[str, Any] | None:
    """The sizes of the engine's graphs, their bytes, and the seconds of recording all of them once
    more (the first time includes the compiling of kernels); None without graphs.
    """
    runner = engine.model_runner
    if runner.graphs is None:
        return None
    sizes, memory_bytes = runner.graphs.sizes, runner.graphs.memory_bytes
    runner.release_graphs()
    start = time.perf_counter()
    runner.graphs = runner._capture_graphs(sizes)
    seconds = time.perf_counter() - start
    return {"sizes": sizes, "memory_bytes": memory_bytes, "seconds": seconds}


def profile_cpu(engine: LLMEngine, num_steps: int) -> list[dict[str, Any]]:
    """Operations by name on a CPU, each without those that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(num_steps):
            engine.step()
    found = [
        (e.key, e.count, e.self_cpu_time_total)
        for e in profiler.key_averages()
        if e.self_cpu_time_total > 0
    ]
    total = sum(us for _, _, us in found) or 1.0
    ordered = sorted(found, key=lambda row: -row[2])[:MOST_NAMES]
    return [
        {
            "name": name,
            "calls_per_step": count / num_steps,
            "us_per_step": us / num_steps,
            "share": us / total,
        }
        for name, count, us in ordered
    ]


def gpu_summary(
    intervals: list[Interval], num_steps: int, step_us: float, replay_us: float | None = None
) -> dict[str, Any]:
    """Milliseconds per step: kernels, gaps between them, and exposed CPU time.

    step_us: a step's time without the profiler. replay_us: of its graph, see `graph_us`.
    """
    found: dict[str, Any] = {"kernels": by_name(intervals, num_steps)}
    found["copies_per_step"] = sum(not interval.is_kernel for interval in intervals) / num_steps
    try:
        steps = split_steps(intervals, num_steps)
    except ValueError as error:  # the list of kernels is worth having by itself
        steps = []
        found["profile_not_split"] = str(error)
    busy = (
        sum(interval.end - interval.start for interval in intervals if interval.is_kernel)
        / num_steps
    )
    span = None
    if steps:
        busy = statistics.median(step["busy"] for step in steps)
        span = statistics.median(step["period"] - step["longest_gap"] for step in steps)
        found["profiled_period_ms"] = statistics.median(step["period"] for step in steps) / 1e3
        found["profiled_longest_gap_ms"] = (
            statistics.median(step["longest_gap"] for step in steps) / 1e3
        )
    found |= {"kernels_ms": busy / 1e3, "gpu_idle_share": max(0.0, 1 - busy / step_us)}
    if replay_us is not None:
        found["graph_ms"] = replay_us / 1e3
    on_gpu = span if replay_us is None else replay_us
    if on_gpu is not None:
        found["gaps_ms"] = max(0.0, on_gpu - busy) / 1e3
        found["exposed_cpu_ms"] = max(0.0, step_us - on_gpu) / 1e3
    return found


def one_engine(
    model: str | Path | None,
    requests: Sequence[int],
    context: int,
    num_steps: int,
    deadline: Deadline,
    overlap: bool,
    engine_options: dict[str, Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the engine is, a row for each number of requests), on one engine with overlap on or
    off.
    """
    eager = engine_options["enforce_eager"]
    how = f"overlap {'on' if overlap else 'off'}, graphs {'off' if eager else 'on'}"
    say(f"breakdown: starting the engine, {how}")
    engine = LLMEngine(model, skip_tokenizer_init=True, async_scheduling=overlap, **engine_options)
    on_gpu = engine.model_runner.device.type == "cuda"
    num_profiled = max(4, num_steps // 4)

    def decode(num_requests: int, measured: int = num_steps) -> None:
        """All requests anew, with as many steps behind them as bring the measured ones to the
        middle of num_steps.
        """
        drain(engine)
        start_decoding(engine, num_requests, context, num_steps + num_profiled + 8)
        for _ in range((num_steps - measured) // 2):
            engine.step()

    def on_gpu_part(num_requests: int, step_us: float) -> dict[str, Any]:
        decode(num_requests, num_profiled)
        intervals = profile_gpu(engine, num_profiled)
        decode(num_requests, num_profiled)
        return gpu_summary(intervals, num_profiled, step_us, graph_us(engine, num_profiled))

    def one(num_requests: int) -> dict[str, Any]:
        try:
            decode(num_requests)
            times = timed_steps(engine, num_steps)
            # the mean would include the runs of Python's garbage collector
            step_us = 1e6 * statistics.median(times)
            row: dict[str, Any] = {
                "step_seconds": percentiles(times),
                "median_step_ms": step_us / 1e3,
            }
            row["mean_context"] = context + WARM_UP_STEPS + num_steps / 2
            decode(num_requests)
            row["cpu_ms"] = cpu_parts(engine, num_steps)
            if on_gpu:
                kernels = partial(on_gpu_part, num_requests, step_us)
                row |= attempt(f"{num_requests} running, kernels", Deadline(), kernels)
            else:
                decode(num_requests, num_profiled)
                row["operations"] = profile_cpu(engine, num_profiled)
            return row
        finally:
            drain(engine)

    rows = [
        {
            "running": n,
            "context": context,
            "overlap": overlap,
            "graphs": not engine.config.enforce_eager,
        }
        | attempt(f"{n} running, {how}", deadline, lambda n=n: one(n))
        for n in requests
    ]
    about = {
        "model": engine.model_path.name,
        "model_config": asdict(engine.model_config),
        "dtype": engine.config.dtype,
        "engine": {
            k: v
            for k, v in asdict(engine.config).items()
            if k not in ("device", "async_scheduling", "enforce_eager")
        },
    }
    if graphs := recorded_graphs(engine):
        about["recorded_graphs"] = graphs
    return about, rows


def run(
    model: str | Path | None = None,
    *,
    requests: Sequence[int] | None = None,
    context: int | None = None,
    num_steps: int = 64,
    overlaps: Sequence[bool] = (True, False),
    graphs: Sequence[bool] = (True,),
    max_seconds: float | None = None,
    **engine_options: Any,
) -> dict[str, Any]:
    """Break a decode step down at each number of running requests, with overlap on and off.

    graphs: True replays each step as a CUDA graph, False launches its kernels one by one; a CPU has
    no graphs. context: tokens of each prompt; None is 512 on a GPU, 64 on a CPU. max_seconds: rows
    that would begin later are left out. Other options are the engine's.
    """
    on_gpu = pick_device(engine_options.get("device", "auto")).startswith("cuda")
    requests, context = requests or ((256,) if on_gpu else (8,)), context or (512 if on_gpu else 64)
    deadline = Deadline(max_seconds)
    engine_options.setdefault("max_num_seqs", max(requests))
    engine_options.setdefault("max_model_len", -(-(context + 4 * num_steps + 192) // 64) * 64)
    about: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for has_graphs, overlap in product(graphs, overlaps):
        options = {**engine_options, "enforce_eager": not has_graphs}
        found_about, found = one_engine(
            model, requests, context, num_steps, deadline, overlap, options
        )
        about |= found_about
        rows += found
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    seconds = round(deadline.elapsed, 1)
    return {
        "benchmark": "breakdown",
        **about,
        "rows": rows,
        "seconds": seconds,
        "environment": environment(),
    }
