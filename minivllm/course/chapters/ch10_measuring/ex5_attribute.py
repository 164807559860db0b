"""10.5: where a step's time went."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    pass
from minivllm.course.grading.exercise import Exercise, Known

Spans = list[tuple[float, float]]


def _union(
    spans: Spans, begin: float, end: float, *, nested: bool = True, ordered: bool = True
) -> Spans:
    """Disjoint spans in order, cut to the step."""
    cut = [(max(s, begin), min(e, end)) for s, e in spans]
    found: Spans = []
    for s, e in sorted(cut) if ordered else cut:
        if s >= e:
            continue
        if found and s <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], e) if nested else e)
        else:
            found.append((s, e))
    return found


def _length(spans: Spans) -> float:
    return sum(e - s for s, e in spans)


def _accounted(
    length: Callable, begin: float, end: float, kernels: Spans, cpu: Spans
) -> dict[str, float]:
    """`_attribute` of somebody for whom many spans take length(spans, begin, end)."""
    gpu, either = length(kernels, begin, end), length([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": either - gpu, "idle": end - begin - either}


def _attribute(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    return _accounted(lambda *spans: _length(_union(*spans)), begin, end, kernels, cpu)


def _rest(gpu: float, exposed: float, begin: float, end: float) -> dict[str, float]:
    return {"gpu": gpu, "exposed_cpu": exposed, "idle": end - begin - gpu - exposed}


def _added_up(spans: Spans, begin: float, end: float) -> float:
    return sum(max(0.0, min(e, end) - max(s, begin)) for s, e in spans)


def _summed(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    gpu, right = _added_up(kernels, begin, end), _attribute(begin, end, kernels, cpu)
    return {**right, "gpu": gpu, "idle": end - begin - gpu - right["exposed_cpu"]}


def _summed_kept_idle(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    return {**_attribute(begin, end, kernels, cpu), "gpu": _added_up(kernels, begin, end)}


def _summed_clamped(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    found = _summed(begin, end, kernels, cpu)
    return {**found, "idle": max(0.0, found["idle"])}


def _all_cpu(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    gpu = _length(_union(kernels, begin, end))
    return _rest(gpu, _length(_union(cpu, begin, end)), begin, end)


def _all_cpu_kept_idle(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    return {**_attribute(begin, end, kernels, cpu), "exposed_cpu": _length(_union(cpu, begin, end))}


def _cpu_for_idle(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    gpu = _length(_union(kernels, begin, end))
    return _rest(gpu, end - begin - gpu, begin, end)


def _envelope(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    whole = [(min(s for s, _ in kernels), max(e for _, e in kernels))] if kernels else []
    return _attribute(begin, end, whole, cpu)


def _dropped(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    def inside(spans: Spans) -> Spans:
        return [(s, e) for s, e in spans if s >= begin and e <= end]

    return _attribute(begin, end, inside(kernels), inside(cpu))


def _variant(**how: bool) -> Callable:
    return functools.partial(_accounted, lambda *spans: _length(_union(*spans, **how)))


def _walked(spans: Spans, begin: float, end: float, *, back: bool) -> float:
    """For those who walk instead of merging. back: to the end of a short span in a long one; else
    less than nothing is added for it."""
    total, reached = 0.0, begin
    for s, e in sorted(spans):
        s, e = max(s, begin), min(e, end)
        added = e - max(s, reached)
        total += max(0.0, added) if back else added
        reached = max(begin if back else reached, e)
    return total


def _walked_in_any_order(spans: Spans, begin: float, end: float) -> float:
    total, reached = 0.0, begin
    for s, e in spans:
        total += max(0.0, min(e, end) - max(s, reached))
        reached = max(reached, min(e, end))
    return total


def _gaps_as_idle(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    right = _attribute(begin, end, kernels, cpu)
    return {**right, "idle": end - begin - right["gpu"]}


def _traces() -> list[tuple[float, float, Spans, Spans]]:
    """Steps: made by hand, and drawn."""
    import torch

    cases: list[tuple[float, float, Spans, Spans]] = [
        (0.0, 10.0, [(2.0, 5.0)], [(0.0, 1.0)]),
        (0.0, 10.0, [], [(3.0, 4.0)]),
        (0.0, 10.0, [(1.0, 9.0)], []),
        (0.0, 10.0, [(1.0, 4.0), (6.0, 9.0)], [(0.0, 2.0), (3.0, 7.0)]),
        (0.0, 20.0, [(2.0, 12.0), (4.0, 6.0), (14.0, 18.0)], [(0.0, 3.0), (12.0, 13.0)]),
        (0.0, 20.0, [(10.0, 15.0), (1.0, 4.0), (3.0, 8.0)], [(8.0, 9.0), (0.0, 1.0)]),
        (
            5.0,
            15.0,
            [(2.0, 7.0), (8.0, 11.0), (14.0, 18.0)],
            [(3.0, 6.0), (11.0, 12.0), (13.0, 20.0)],
        ),
        (0.0, 12.0, [(0.0, 4.0), (4.0, 8.0)], [(8.0, 9.0), (8.5, 11.0)]),
        (0.0, 5.0, [], []),
        (0.0, 10.0, [(-20.0, -10.0), (30.0, 40.0)], [(3.0, 4.0)]),
        (0.0, 10.0, [(1.0, 2.0)], [(10.0, 12.0)]),
        (-20.0, -5.0, [(-30.0, -12.0), (-9.0, 0.0)], [(-12.0, -10.0), (3.0, 4.0)]),
        (100, 200, [(10, 90), (120, 120), (150, 160), (220, 230)], [(155, 170), (95, 101)]),
        (1e6, 1e6 + 50.0, [(1e6 + 10.0, 1e6 + 20.0)], [(1e6 - 5.0, 1e6 + 60.0)]),
    ]
    generator = seeded(10)
    for size in (6, 15, 40, 5000):
        starts = torch.rand(2, size, generator=generator).mul(100).sub(5)
        lengths = torch.rand(2, size, generator=generator).mul(120 / size)
        spans = [
            [(round(s, 2), round(s + n, 2)) for s, n in zip(*rows, strict=True)]
            for rows in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        cases.append((0.0, 100.0, spans[0], spans[1]))
    return cases


def check_attribute(answer: Callable) -> str:
    count = diagnose(answer, _traces(), _attribute, EXERCISE.suspects, rtol=1e-6, atol=1e-6)
    return f"{count} recorded steps, every microsecond once"


EXERCISE = Exercise(
    id="10.5",
    title="Where a step's time went",
    check=check_attribute,
    mistakes=(
        Known(
            "overlap-counted-twice",
            message=(
                "Kernels on two streams can run at the same time. Whenever at least one runs, the"
                " GPU is busy: once, not twice. Add up the union, not the kernels."
            ),
            hint=1,
            suspects=(
                _summed,
                _summed_kept_idle,
                _summed_clamped,
                functools.partial(_accounted, _added_up),
            ),
            answers=r"""
# %% the sum of all kernels
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    total = sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in kernels)
    return {"gpu": total, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}

# %% the sum, and what is left
def union(spans, begin, end):
    marks = sorted(
        {begin, end, *(min(max(x, begin), end) for span in spans for x in span)}
    )
    return sum(
        b - a
        for a, b in zip(marks, marks[1:])
        if any(s <= a and b <= e for s, e in spans)
    )


def attribute(begin, end, kernels, cpu):
    gpu = sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in kernels)
    exposed = union([*kernels, *cpu], begin, end) - union(kernels, begin, end)
    return {"gpu": gpu, "exposed_cpu": exposed, "idle": end - begin - gpu - exposed}

# %% in both sums
def union(spans, begin, end):
    total, reached = 0, begin
    for a, b in sorted(spans):
        a, b = max(a, begin), min(b, end)
        total += max(0, b - a)
        reached = max(reached, b)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    some = union(kernels + cpu, begin, end)
    return {"gpu": gpu, "exposed_cpu": some - gpu, "idle": end - begin - some}
""",
        ),
        Known(
            "hidden-cpu-counted",
            message=(
                "CPU time costs something only where no kernel runs meanwhile. What the GPU's work"
                " hides is free."
            ),
            hint=2,
            suspects=(
                _all_cpu,
                _all_cpu_kept_idle,
            ),
            answers=r"""
# %% all that the CPU did
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {
        "gpu": gpu,
        "exposed_cpu": union(cpu, begin, end),
        "idle": end - begin - somebody,
    }

# %% and idle is the rest
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    busy = union(cpu, begin, end)
    return {"gpu": gpu, "exposed_cpu": busy, "idle": end - begin - gpu - busy}
""",
        ),
        Known(
            "idle-is-not-cpu",
            message=(
                "Where no kernel runs, the CPU may be at fault, or it may be waiting too (for a"
                " lock, for the network, for the next request). Only time in which it works is"
                " exposed CPU time."
            ),
            suspects=(_cpu_for_idle,),
            answers=r"""
# %% where no kernel runs, it is the CPU's fault
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    return {"gpu": gpu, "exposed_cpu": end - begin - gpu, "idle": 0.0}
""",
        ),
        Known(
            "cpu-counted-as-idle",
            message=(
                "Your idle time holds the CPU's as well. Idle is where neither works: the three"
                " numbers add up to the step."
            ),
            suspects=(_gaps_as_idle,),
            answers=r"""
# %% all but the kernels
def union(spans, begin, end):
    total, reached = 0, begin
    for a, b in sorted(spans):
        a, b = max(a, begin), min(b, end)
        total += max(0, b - max(a, reached))
        reached = max(reached, b)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    some = union(kernels + cpu, begin, end)
    return {"gpu": gpu, "exposed_cpu": some - gpu, "idle": end - begin - gpu}
""",
        ),
        Known(
            "less-than-nothing",
            message=(
                "A span that lies within an earlier one adds nothing; yours takes something away:"
                " max(0, …)."
            ),
            suspects=(functools.partial(_accounted, functools.partial(_walked, back=False)),),
            answers=r"""
# %% no max(0, ...)
def union(spans, begin, end):
    total, reached = 0, begin
    for a, b in sorted(spans):
        a, b = max(a, begin), min(b, end)
        total += b - max(a, reached)
        reached = max(reached, b)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    some = union(kernels + cpu, begin, end)
    return {"gpu": gpu, "exposed_cpu": some - gpu, "idle": end - begin - some}
""",
        ),
        Known(
            "gaps-counted",
            message=(
                "From the first kernel's start to the last one's end is not what the kernels ran:"
                " there are gaps between them."
            ),
            suspects=(_envelope,),
            answers=r"""
# %% from the first to the last
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    if kernels:
        kernels = [(min(s for s, _ in kernels), max(e for _, e in kernels))]
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}
""",
        ),
        Known(
            "not-cut-to-the-step",
            message=(
                "What reaches beyond the step belongs to its neighbours: count only the part"
                " between begin and end."
            ),
            suspects=(
                functools.partial(
                    _accounted, lambda spans, *_: _length(_union(spans, -math.inf, math.inf))
                ),
            ),
            answers=r"""
# %% whole spans
def union(spans, begin, end):
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}
""",
        ),
        Known(
            "dropped-at-the-edge",
            message=(
                "A kernel that begins before the step, or ends after it, runs partly within it."
                " That part counts."
            ),
            suspects=(_dropped,),
            answers=r"""
# %% only what lies within
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(
        span for span in spans if span[0] >= begin and span[1] <= end
    ):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}
""",
        ),
        Known(
            "nested-cuts-short",
            message=(
                "A short kernel may lie within a long one on another stream. After it, the long one"
                " still runs: go on from the later of the two ends."
            ),
            hint=3,
            suspects=(
                _variant(nested=False),
                functools.partial(_accounted, functools.partial(_walked, back=True)),
            ),
            answers=r"""
# %% goes on from the end of the last one
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(begin, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}

# %% merges, and takes the last end
def union(spans, begin, end):
    merged = []
    for start, stop in sorted((max(s, begin), min(e, end)) for s, e in spans):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1][1] = stop
        else:
            merged.append([start, stop])
    return sum(stop - start for start, stop in merged)


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}
""",
        ),
        Known(
            "order-assumed",
            message=(
                "The spans come in no particular order: streams are recorded one after the other."
                " Sort them by their start."
            ),
            hint=3,
            suspects=(
                _variant(ordered=False),
                functools.partial(_accounted, _walked_in_any_order),
            ),
            answers=r"""
# %% merges in the order of the list
def union(spans, begin, end):
    merged = []
    for start, stop in spans:
        start, stop = max(start, begin), min(stop, end)
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return sum(stop - start for start, stop in merged)


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}

# %% walks in the order of the list
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in spans:
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": somebody - gpu, "idle": end - begin - somebody}
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% shares of the step
def union(spans, begin, end):
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        stop = min(stop, end)
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def attribute(begin, end, kernels, cpu):
    gpu = union(kernels, begin, end)
    somebody = union([*kernels, *cpu], begin, end)
    return {
        "gpu": gpu / (end - begin),
        "exposed_cpu": (somebody - gpu) / (end - begin),
        "idle": 1 - somebody / (end - begin),
    }
""",
        ),
    ),
)
