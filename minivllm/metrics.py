"""What `LLM.get_metrics` returns: vLLM's metrics, under vLLM's names, as far as minivllm counts
them.

Code that reads them by name and type, as vLLM's `vllm.v1.metrics.reader` is read, goes on working.
"""

from dataclasses import dataclass


@dataclass
class Metric:
    """labels: which engine it speaks of."""

    name: str
    labels: dict[str, str]


@dataclass
class Counter(Metric):
    """Only ever grows."""

    value: int


@dataclass
class Gauge(Metric):
    """May rise and fall."""

    value: float


@dataclass
class Histogram(Metric):
    """How often a value was at most each of the limits. buckets: upper limit, or "+Inf" ->
    count.
    """

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
