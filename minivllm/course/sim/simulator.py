"""A serving engine without a model: the real scheduler and block manager on a calculated clock.

A scheduler's decisions depend on token counts alone, so the tokens can be left out. `simulate`
gives requests to a scheduler class (the package's or yours) and lets it plan step after step. It
adds up the time that each step would take on a GPU according to a `CostModel`. Minutes of serving
take a fraction of a second here, and two policies can be compared request by request. The result
holds a `minivllm.engine.trace.Trace`, the same record that the engine makes.

    from minivllm.course.sim.simulator import azure_chat, simulate

    run = simulate(azure_chat(faster=4), max_num_batched_tokens=512)
    print(run.summary())

Left out: prefix caching, sampling, and the CPU's own time. Only the simulator knows when a request
will end; the scheduler sees an end-of-sequence token, as in the engine. Taught in
notebooks/05_scheduler.ipynb.
"""

from __future__ import annotations

import math
import statistics
from collections import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.scheduler import Scheduler, SchedulerStats
from minivllm.engine.sequence import Sequence, max_steps
from minivllm.engine.trace import Trace, record_step
from minivllm.errors import SchedulerStalledError
from minivllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class CostModel:
    """The seconds that a step takes, from token counts.

    The model is a roofline for the matrix products and one for each sequence's attention:

        seconds = max(weights, token · new tokens)
                  + Σ over sequences of max(key · context, pair · new tokens · context)

    A step reads the weights once, for any number of tokens, so a step with few tokens takes the
    time of reading. With many tokens, computing takes longer than reading. The same holds for a
    sequence's keys and values. `context` counts the tokens up to and including the new ones. Of n
    new tokens of a chunk, the first sees the fewest, so the pairs are counted exactly: n·start +
    n(n + 1)/2.
    """

    name: str
    #: Seconds to read all weights.
    weights: float
    #: Seconds to compute one token's matrix products.
    token: float
    #: Seconds to read one token's K and V.
    key: float
    #: Seconds to compute one query against one key, for all heads and layers.
    pair: float
    source: str = "assumed"

    def seconds(self, parts: Iterable[tuple[int, int]]) -> float:
        """The seconds of one step.

        parts: for each sequence in the step (tokens computed before, new tokens).
        """
        tokens, attention = 0, 0.0
        for start, new in parts:
            tokens += new
            pairs = new * start + new * (new + 1) / 2
            attention += max(self.key * (start + new), self.pair * pairs)
        return (max(self.weights, self.token * tokens) + attention) if tokens else 0.0


#: The kernel time of minivllm's steps with a model of Qwen3-8B's size in bfloat16. Tests compare it
#: with the record.
H200 = CostModel(
    "Qwen3-8B on one H200",
    weights=4.9e-3,
    token=19.8e-6,
    key=34e-9,
    pair=1.25e-9,
    source="fitted to the gpu_seconds of minivllm/bench/recorded/steps-h200.json",
)
#: The last token of every sequence in the simulation.
END = 1
#: One second per step, for any number of tokens: times are then step numbers.
STEPS = CostModel("one second a step", weights=1.0, token=0.0, key=0.0, pair=0.0)


@dataclass(frozen=True)
class Arrival:
    """A request, as the scheduler sees it."""

    #: Seconds.
    time: float
    prompt_tokens: int
    output_tokens: int


@dataclass(eq=False)
class SimulatedRequest:
    """The course of one request. Times are in seconds from the start of the simulation."""

    arrival: Arrival
    sequence: Sequence
    token_times: list[float] = field(default_factory=list)
    first_scheduled: float | None = None
    #: The steps in whose planning the request stayed in the queue.
    steps_waited: int = 0

    @property
    def finished(self) -> bool:
        return self.sequence.is_finished

    @property
    def ttft(self) -> float:
        """Time to first token; infinite where there was none."""
        return self.token_times[0] - self.arrival.time if self.token_times else float("inf")

    @property
    def gaps(self) -> list[float]:
        """The times between its tokens."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def latency(self) -> float:
        """The time from arrival to the last token; infinite where the request did not finish."""
        return self.token_times[-1] - self.arrival.time if self.finished else float("inf")


@dataclass
class Simulation:
    """A finished run."""

    requests: list[SimulatedRequest]
    stats: SchedulerStats
    #: From the first arrival to the last token.
    seconds: float
    trace: Trace | None
    #: Tokens computed a second time, after preemptions.
    num_wasted_tokens: int
    #: Why the run did not finish; "" where it did.
    stalled: str = ""

    @property
    def lost(self) -> list[int]:
        """The numbers of the requests that did not get all their tokens.

        The scheduler has nothing left to do, so they will not get them.
        """
        return [
            i for i, r in enumerate(self.requests) if len(r.token_times) < r.arrival.output_tokens
        ]

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return (
            sum(len(request.token_times) for request in self.requests) / self.seconds
            if self.seconds
            else 0.0
        )

    @property
    def ttfts(self) -> list[float]:
        return [request.ttft for request in self.requests]

    @property
    def gaps(self) -> list[float]:
        """All times between tokens."""
        return [gap for request in self.requests for gap in request.gaps]

    def summary(self) -> dict[str, float]:
        """Rounded numbers to print: rates in tokens per second, times in milliseconds."""
        gaps = self.gaps or [0.0]
        return {
            "output tokens/s": round(self.throughput),
            "TTFT median": round(1000 * statistics.median(self.ttfts)),
            "TTFT worst": round(1000 * max(self.ttfts)),
            "gap median": round(1000 * statistics.median(gaps), 1),
            "gap p99": round(1000 * percentile(gaps, 99), 1),
            "gap worst": round(1000 * max(gaps), 1),
            "steps": self.stats.num_steps,
            "preemptions": self.stats.num_preemptions,
        }


def percentile(values: abc.Sequence[float], percent: float) -> float:
    """The smallest value such that at least this percentage of the values is not larger."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True)
class Limits:
    """The engine's limits.

    The defaults are those of an engine on an H200: 12,288 blocks of 64 tokens are 116 GB of KV.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    num_blocks: int = 12_288
    block_size: int = 64
    max_model_len: int = 8192


def simulate(
    workload: abc.Sequence[Arrival],
    *,
    scheduler_cls: Callable[..., Any] = Scheduler,
    cost: CostModel = H200,
    block_manager_cls: Callable[..., Any] = BlockManager,
    trace: bool = True,
    raise_on_stall: bool = True,
    **limits: int,
) -> Simulation:
    """Serve the workload with a scheduler, and return what happened.

    scheduler_cls: called as the engine calls it, with (block manager, max_num_seqs,
    max_num_batched_tokens). trace: record every step; False is faster. limits: as in `Limits`, for
    example ``max_num_seqs=4``.

    Requests that the scheduler forgets are in `Simulation.lost`. SchedulerStalledError is raised
    where the scheduler plans nothing although requests wait, or does not finish. Without
    raise_on_stall the run ends there, and `Simulation.stalled` says why.
    """
    limit = Limits(**limits)
    scheduler = scheduler_cls(
        block_manager_cls(limit.num_blocks, limit.block_size, False),
        limit.max_num_seqs,
        limit.max_num_batched_tokens,
    )
    arrivals = sorted(workload, key=lambda arrival: arrival.time)
    sequences = [_sequence(i, a, limit.max_model_len) for i, a in enumerate(arrivals)]
    clock = _Clock(list(map(SimulatedRequest, arrivals, sequences)), scheduler)
    recorder = Trace(
        cost.name,
        limit.num_blocks,
        limit.block_size,
        limit.max_num_seqs,
        limit.max_num_batched_tokens,
        0,
        limit.max_model_len,
    )
    most_steps = 2 * max_steps((a.prompt_tokens, a.output_tokens) for a in workload) + 100
    num_steps = num_wasted = 0
    furthest = [0] * len(workload)
    stalled = ""
    while clock.admit():
        batch = scheduler.schedule()
        num_steps += 1
        if not batch or num_steps > most_steps:
            stalled = _stalled(scheduler, num_steps - 1, bool(batch))
            break
        record = None
        if trace:
            record = record_step(len(recorder.steps), batch, scheduler, clock.now)
            recorder.steps.append(record)
        seconds = cost.seconds((item.start, item.num_new_tokens) for item in batch.items)
        for item in batch.items:
            request = clock.requests[item.sequence.seq_id]
            if request.first_scheduled is None:
                request.first_scheduled = clock.now
            num_wasted += max(0, min(item.end, furthest[item.sequence.seq_id]) - item.start)
            furthest[item.sequence.seq_id] = max(furthest[item.sequence.seq_id], item.end)
        for seq in scheduler.waiting:
            clock.requests[seq.seq_id].steps_waited += 1
        clock.now += seconds
        sampled = [clock.requests[item.sequence.seq_id] for item in batch.sampled]
        ends = [
            len(request.token_times) + 1 == request.arrival.output_tokens for request in sampled
        ]
        accepted = scheduler.update(batch, [[END if end else 0] for end in ends])
        for item in accepted:
            clock.requests[item.sequence.seq_id].token_times.append(clock.now)
        if record is not None:
            record.duration = seconds
            record.finished = [f"{i.sequence.seq_id}/0" for i in accepted if i.sequence.is_finished]
    if stalled and raise_on_stall:
        raise SchedulerStalledError(stalled)
    return Simulation(
        clock.requests, scheduler.stats, clock.now, recorder if trace else None, num_wasted, stalled
    )


class _Clock:
    """Gives each request to the scheduler at its arrival time."""

    def __init__(self, requests: list[SimulatedRequest], scheduler: Any) -> None:
        self.now, self.requests, self.scheduler = 0.0, requests, scheduler
        self._next = 0

    def admit(self) -> bool:
        """Add the requests that have arrived; with nothing to do, go on to the next arrival.

        Returns False when no request is left.
        """
        if not self.scheduler.has_unfinished:
            if self._next == len(self.requests):
                return False
            self.now = max(self.now, self.requests[self._next].arrival.time)
        while (
            self._next < len(self.requests) and self.requests[self._next].arrival.time <= self.now
        ):
            self.scheduler.add(self.requests[self._next].sequence)
            self._next += 1
        return True


def _sequence(number: int, arrival: Arrival, max_num_tokens: int) -> Sequence:
    prompt = [0] * arrival.prompt_tokens
    ends = frozenset([END])
    return Sequence(number, prompt, SamplingParams(), ends, max_num_tokens, request_id=str(number))


def _stalled(scheduler: Any, num_steps: int, planned: bool) -> str:
    queues = f"{len(scheduler.running)} requests run and {len(scheduler.waiting)} wait"
    if not planned:
        return f"Step {num_steps} has nothing in it, although {queues}."
    return f"After {num_steps} steps, more than one token at a time would have needed, {queues}."


# --- workloads ------------------------------------------------------------------------------------


def workload_of(outputs: Iterable[Any], together: bool = True) -> list[Arrival]:
    """The workload of real outputs (of `LLM.generate`), with their real lengths.

    together: all requests arrive at time 0; otherwise at their real times.
    """
    outputs = list(outputs)
    first = min(output.metrics.arrival_time for output in outputs)
    return [
        Arrival(
            0.0 if together else output.metrics.arrival_time - first,
            len(output.prompt_token_ids),
            len(output.outputs[0].token_ids),
        )
        for output in outputs
    ]


def azure_chat(faster: float = 1.0) -> list[Arrival]:
    """22 seconds of a real chat service: 111 requests in order of arrival.

    faster: the factor by which the arrivals are sped up. From "Azure LLM inference trace 2023",
    conversation, 2023-11-16, 18:16:20 to 18:16:42, times rounded to 0.01 s. CC BY,
    github.com/Azure/AzurePublicDataset; described in Patel et al., Splitwise, arXiv 2311.18677.
    """
    numbers = [request.split("/") for request in _AZURE_CHAT.split()]
    return [
        Arrival(float(time) / faster, int(prompt), int(output)) for time, prompt, output in numbers
    ]


#: Arrival in seconds/prompt tokens/output tokens.
_AZURE_CHAT = """
0.09/203/217 0.17/898/94 0.21/181/253 0.33/320/18 0.43/1119/414 0.51/124/157 0.61/1313/179
1.43/1096/383 1.97/400/102 2.82/1057/424 3.20/203/162 3.55/1314/216 3.81/2/93 4.16/1065/409
4.84/372/60 5.07/4094/82 5.23/1104/394 5.49/1075/415 5.77/4088/37 5.90/1225/372 6.00/1118/426
6.32/380/102 6.33/1133/385 6.72/42/167 7.03/2590/50 7.16/1140/377 7.81/126/203 8.04/431/84
9.01/1115/421 9.21/206/179 9.21/400/91 9.23/1123/396 9.24/862/379 9.37/859/422 9.37/890/402
9.40/1192/419 9.49/899/403 9.68/163/224 9.87/181/212 10.27/416/88 10.29/1163/426 10.47/243/14
10.57/1041/428 10.60/1350/146 10.72/1104/396 10.74/1127/426 11.51/1114/414 11.69/1083/396
11.71/1313/173 11.79/888/395 11.80/13/130 11.86/874/89 11.93/1065/395 12.18/1157/426 12.21/1077/390
12.66/2903/59 12.78/4079/27 12.87/1149/411 12.91/996/389 13.09/990/394 13.31/197/183 13.36/4107/49
13.89/197/217 14.14/1378/407 14.41/1214/421 14.61/1016/375 14.71/1186/398 14.73/4076/60
14.82/1100/426 14.98/218/217 15.39/1232/419 15.68/975/416 15.91/209/217 16.24/181/85 16.27/1029/388
16.34/888/418 16.41/1113/375 16.42/1035/520 16.42/1009/425 16.51/869/450 16.56/1183/431
16.91/972/395 17.17/1097/396 17.31/206/183 17.34/181/208 17.34/1316/200 17.42/908/456 17.57/1094/422
17.59/996/422 17.68/420/89 17.80/1112/385 18.05/1133/396 18.16/890/403 18.30/833/36 18.36/1093/426
18.62/206/211 18.80/898/454 18.91/1312/180 18.93/1129/396 18.94/375/67 19.56/862/425 19.82/167/179
19.85/914/414 20.24/209/217 20.39/982/594 20.67/200/161 20.70/1313/156 20.80/999/416 21.76/1084/397
21.79/399/106 22.02/1065/594
"""
