"""How long a call of a kernel takes.

On a GPU the calls are recorded as a CUDA graph, and events time its replays: this measures the GPU
and not Python. A function that cannot be recorded is launched call by call between two events, and
the row says so. The calls rotate over several sets of inputs that together are larger than the
cache; with one set, its inputs would come from the cache and not from memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minivllm.bench.costs import Rates

Call = Callable[[], Any]
#: Together the sets of inputs are so many times as large as the second-level cache.
ROTATION = 3
MOST_SETS = 256


@dataclass(frozen=True)
class Timing:
    """Microseconds per call; timed_as: "graph", "events" or "clock"."""

    median_us: float
    min_us: float
    max_us: float
    timed_as: str


def num_sets(bytes_per_set: int, device: torch.device) -> int:
    """Over how many sets of inputs to rotate."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return max(2, min(MOST_SETS, -(-ROTATION * cache // max(1, bytes_per_set))))


def measure(
    calls: Sequence[Call], device: torch.device, *, graph: bool = True, seconds: float = 0.2
) -> Timing:
    """Time the calls, one after the other and again, for about so many seconds after a warm-up."""
    if device.type != "cuda":
        return _measure_clock(calls, seconds)
    for call in [*calls, *calls[:3]]:  # compiles, and fills what is made once
        call()
    torch.cuda.synchronize(device)
    return _measure_graph(calls, seconds) if graph else _measure_events(calls, seconds)


def _measure_clock(calls: Sequence[Call], seconds: float) -> Timing:
    for call in calls:
        call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 * len(calls) or (
        time.perf_counter() - start < seconds and len(times) < 10_000
    ):
        began = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - began)
    return _timing([1e6 * t for t in times], "clock")


def _measure_events(calls: Sequence[Call], seconds: float) -> Timing:
    """Each time is of one pass over the calls, which are queued faster than they run unless they
    are tiny.
    """

    def one_pass() -> None:
        for call in calls:
            call()

    return _timing([t / len(calls) for t in _between_events(one_pass, seconds)], "events")


def _measure_graph(calls: Sequence[Call], seconds: float) -> Timing:
    """The graph is made long enough (a millisecond, at least a pass over the calls) for its own
    launch not to count.
    """
    single_us = _measure_events(calls, seconds / 10).median_us
    passes = max(1, min(1000 // max(1, len(calls)), round(1000 / max(1.0, single_us * len(calls)))))
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        for _ in range(passes):
            for call in calls:
                call()
    times = _between_events(recording.replay, seconds)
    return _timing([t / (passes * len(calls)) for t in times], "graph")


def _between_events(run: Call, seconds: float) -> list[float]:
    """Microseconds of each run; some first runs, for the clocks to rise, do not count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(2):
        run()
    end.record()
    end.synchronize()
    once = max(1e-6, start.elapsed_time(end) / 2e3)
    for _ in range(min(50, int(0.02 / once))):
        run()
    count = max(5, min(200, int(seconds / once)))
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def _timing(times_us: list[float], timed_as: str) -> Timing:
    return Timing(statistics.median(times_us), min(times_us), max(times_us), timed_as)


@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine's ceilings: reading memory, copying it, and multiplying random square matrices of
    this dtype.
    """
    on_gpu = device.type == "cuda"
    words, side = (1 << 28, 8192) if on_gpu else (1 << 24, 1024)
    source = torch.randint(-(1 << 62), 1 << 62, (words,), device=device)
    read = measure([source.sum], device)
    target = torch.empty_like(source)
    # An elementwise kernel: in a graph, copy_ would be a node of the copy engine, which is slower
    # (2.8 of 4.3 TB/s).
    copied = measure([partial(torch.neg, source, out=target)], device)
    del source, target
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = measure([partial(torch.matmul, a, b)], device, seconds=0.4)
    return {
        "read_bytes_per_second": 8 * words / read.median_us * 1e6,
        "copy_bytes_per_second": 16 * words / copied.median_us * 1e6,
        "matmul_flops_per_second": 2 * side**3 / product.median_us * 1e6,
        "read_of_bytes": 8 * words,
        "matmul": f"{side} x {side} x {side} {str(dtype).removeprefix('torch.')}",
    }


def rates_of(measured: dict[str, Any]) -> Rates:
    """The two that floors are computed from."""
    return Rates(measured["read_bytes_per_second"], measured["matmul_flops_per_second"])
