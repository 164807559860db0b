"""The floor of a whole workload: the least time that a machine with these rates needs, and which
share of it was reached.

The engine's steps are simulated (`steps_of`), and each costs the sum of four parts that follow one
another:

    layers             the longer of reading all their matrices once and multiplying them with the
                       step's tokens
    head               the same for the matrix that gives the logits
    decode attention   the longer of reading the K and V of every decoding request and its
                       arithmetic
    prefill attention  the same for the requests with several new tokens

Left out: activations, norms, sampling, launches, Python. So the floor is a bound, not a forecast.
Taught in notebooks/10_measuring.ipynb.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from minivllm.bench.cases import Workload
from minivllm.bench.costs import ModelCosts, Rates, causal_pairs
from minivllm.bench.report import environment

PARTS = ("layers", "head", "decode_attention", "prefill_attention")


@dataclass(frozen=True)
class Step:
    """What one step computes: (new tokens, context with them) of every request, and how many of
    them sample.
    """

    items: list[tuple[int, int]]
    num_sampled: int

    @property
    def num_tokens(self) -> int:
        return sum(new for new, _ in self.items)


@dataclass
class _Request:
    num_tokens: int  # prompt and what has been sampled
    end: int  # tokens at which it ends; the last one is never computed
    computed: int = 0


def steps_of(
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> Iterator[Step]:
    """The steps of continuous batching when all requests are there at the start and memory never
    runs out.

    As `minivllm.engine.scheduler`: running requests first, oldest first, then waiting ones, within
    the token budget.
    """
    waiting = deque(_Request(p, p + o) for p, o in zip(prompt_lens, output_lens, strict=True))
    running: list[_Request] = []
    while waiting or running:
        budget, items, sampled = max_num_batched_tokens, [], 0
        index = 0
        while budget > 0 and (index < len(running) or (waiting and len(running) < max_num_seqs)):
            if index == len(running):
                running.append(waiting.popleft())
            request = running[index]
            new = min(request.num_tokens - request.computed, budget)
            budget -= new
            request.computed += new
            items.append((new, request.computed))
            if request.computed == request.num_tokens:
                request.num_tokens += 1
                sampled += 1
            index += 1
        running = [request for request in running if request.num_tokens < request.end]
        yield Step(items, sampled)


@dataclass
class Floor:
    """What a workload needs at least: seconds, bytes and operations of each part, over so many
    steps.
    """

    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    bytes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, part: str, num_bytes: float, flops: float, rates: Rates) -> None:
        self.bytes[part] += num_bytes
        self.flops[part] += flops
        self.seconds[part] += rates.seconds(num_bytes, flops)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def floor_of(steps: Iterator[Step] | Sequence[Step], costs: ModelCosts, rates: Rates) -> Floor:
    """The floor of these steps."""
    floor, element = Floor(), costs.bytes_per_element
    for step in steps:
        floor.steps += 1
        flops = 2 * step.num_tokens * costs.layer_weights
        floor.add("layers", costs.layer_weights * element, flops, rates)
        if step.num_sampled:
            flops = 2 * step.num_sampled * costs.head_weights
            floor.add("head", costs.head_weights * element, flops, rates)
        kv, pairs = {True: 0, False: 0}, {True: 0, False: 0}
        for new, context in step.items:
            kv[new == 1] += context
            pairs[new == 1] += causal_pairs(new, context)
        for alone, part in ((True, "decode_attention"), (False, "prefill_attention")):
            num_bytes = kv[alone] * costs.kv_bytes_per_token
            floor.add(part, num_bytes, pairs[alone] * costs.attention_flops_per_pair, rates)
    return floor


def case_floor(
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
    costs: ModelCosts,
    rates: Rates,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> dict[str, Any]:
    """The floor of a workload as a report has it: seconds, its parts, and tokens per second at the
    floor.
    """
    floor = floor_of(
        steps_of(prompt_lens, output_lens, max_num_seqs, max_num_batched_tokens), costs, rates
    )
    return {
        "seconds": floor.total_seconds,
        "steps": floor.steps,
        "parts": {
            part: {
                "seconds": floor.seconds[part],
                "bytes": floor.bytes[part],
                "flops": floor.flops[part],
            }
            for part in PARTS
        },
        "output_tokens_per_second": sum(output_lens) / floor.total_seconds,
        "prompt_tokens_per_second": sum(prompt_lens) / floor.total_seconds,
    }


def run(
    report: dict[str, Any], rates: Rates | None = None, cases: Sequence[str] | None = None
) -> dict[str, Any]:
    """The floors of a throughput report's cases, and the share that was reached (floor / measured
    time).

    report: of ``minivllm bench throughput --case …``. rates: None takes those measured in that run.
    A case that failed there has its floor here and no share. ValueError for a report of another
    kind.
    """
    if report.get("benchmark") != "throughput" or "cases" not in report:
        raise ValueError("roofline needs a report of `minivllm bench throughput --case …`")
    engine, measured = report["engine"], report["rates"]
    rates = rates or Rates(measured["read_bytes_per_second"], measured["matmul_flops_per_second"])
    element, kind = 4 if report["dtype"] == "float32" else 2, engine.get("kv_cache_dtype", "auto")
    costs = ModelCosts.of(report["model_config"], element, kind)
    found: dict[str, Any] = {}
    for name in cases or report["cases"]:
        case = report["cases"][name]
        workload = Workload(**case["workload"])
        prompts, output_lens = workload.draw(report["model_config"]["vocab_size"])
        limits = {key: engine[key] for key in ("max_num_seqs", "max_num_batched_tokens")}
        row = {"floor": case_floor([len(p) for p in prompts], output_lens, costs, rates, **limits)}
        if "seconds" in case:
            taken = case["seconds"]["median"]
            row |= {"measured_seconds": taken, "share_of_floor": row["floor"]["seconds"] / taken}
        found[name] = row
    return {
        "benchmark": "roofline",
        "model": report["model"],
        "dtype": report["dtype"],
        "rates": asdict(rates),
        "cases": found,
        "measured": {"date": report["environment"]["date"], "gpu": report["environment"]["gpu"]},
        "environment": environment(),
    }
