"""The metrics of `LLM.get_metrics`: vLLM's metrics and names, as far as minivllm counts them.

Code that reads vLLM's metrics by name and type (as in `vllm.v1.metrics.reader`) works unchanged.
"""

from dataclasses import dataclass


@dataclass
class Metric:
    """A metric of one engine. labels: name the engine."""

    name: str
    labels: dict[str, str]


@dataclass
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass
class Vector(Metric):
    """Several numbers that only grow, one per position."""

    values: list[int]


@dataclass
class Gauge(Metric):
    """A number that may rise and fall."""

    value: float


@dataclass
class Histogram(Metric):
    """How often a value was at most each limit. buckets: upper limit, or "+Inf" -> count."""

    count: int
    sum: float
    buckets: dict[str, int]


#: vLLM's name -> the field of `EngineMetrics` that counts it.
COUNTERS = {
    "vllm:num_preemptions": "num_preemptions",
    "vllm:prefix_cache_queries": "prefix_cache_queries",
    "vllm:prefix_cache_hits": "prefix_cache_hits",
    "vllm:generation_tokens": "num_generated_tokens",
    "vllm:request_success": "num_finished_requests",
}

#: The same for an engine with speculative decoding. Others do not report these.
SPECULATION_COUNTERS = {
    "vllm:spec_decode_num_drafts": "num_drafts",
    "vllm:spec_decode_num_draft_tokens": "num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
}
ACCEPTED_PER_POS = "vllm:spec_decode_num_accepted_tokens_per_pos"


def per_position(counts: list[int], num_speculative_tokens: int) -> list[int]:
    """How often each proposal was right, for all positions: also those that none has reached."""
    return counts + [0] * (num_speculative_tokens - len(counts))
