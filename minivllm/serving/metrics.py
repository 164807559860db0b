"""What a server measures, for Prometheus, under vLLM's names: a dashboard for vLLM works.

Times of a request are observed when it has finished. The engine's state is read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minivllm.metrics import ACCEPTED_PER_POS, COUNTERS, SPECULATION_COUNTERS, per_position
from minivllm.outputs import RequestOutput
from minivllm.serving import wire
from minivllm.serving.async_llm import AsyncLLM

#: Upper limits of the histograms, in seconds; vLLM's.
TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
TPOT = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
)
WHOLE = (
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
#: OpenAI's and vLLM's reasons for the end of an answer; each has a counter from the start.
REASONS = ("stop", "length", "abort", "error")


class ServerMetrics:
    """The metrics of one server, in a registry of its own: two servers may live in a process."""

    def __init__(self, llm: AsyncLLM, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        names = list(self._labels)

        def histogram(name: str, about: str, limits: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", about, names, buckets=limits, registry=self.registry)
            return made.labels(**self._labels)

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time between tokens.", TPOT
        )
        self.whole = histogram("e2e_request_latency_seconds", "Arrival to the last token.", WHOLE)
        self.queue = histogram("request_queue_time_seconds", "Arrival to the first step.", WHOLE)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.output_tokens = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        ends = Counter(
            "vllm:request_success",
            "Requests that have ended, by reason.",
            [*names, "finished_reason"],
            registry=self.registry,
        )
        self._ended = {
            reason: ends.labels(**self._labels, finished_reason=reason) for reason in REASONS
        }
        self.refused = Counter(
            "minivllm:requests_refused",
            "Requests refused because the queue was full.",
            names,
            registry=self.registry,
        ).labels(**self._labels)
        self.registry.register(EngineCollector(llm, self._labels))

    def observe(self, output: RequestOutput) -> None:
        """Count a request that has finished."""
        for completion in output.outputs:
            self._count_end(completion.finish_reason or "stop")
        times = output.metrics
        if times is None:
            return
        for histogram, value in (
            (self.ttft, times.time_to_first_token),
            (self.tpot, times.time_per_output_token),
            (self.queue, times.queue_time),
        ):
            if value is not None:
                histogram.observe(max(value, 0.0))
        if times.finished_time is not None:
            self.whole.observe(max(times.finished_time - times.arrival_time, 0.0))
        self.prompt_tokens.observe(len(output.prompt_token_ids))
        self.output_tokens.observe(times.num_generation_tokens)

    def observe_abort(self) -> None:
        """Count a request whose client has gone away."""
        self._count_end("abort")

    def _count_end(self, reason: str) -> None:
        self._ended[reason if reason in self._ended else "error"].inc()

    def render(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's own gauges and counters, after its latest step."""

    # `labels` has "engine", which becomes the name of each engine.
    def __init__(self, llm: AsyncLLM, labels: dict[str, str]) -> None:
        self.llm, self.labels = llm, labels

    def collect(self) -> Iterator[Metric]:
        """The metrics of one scrape: a value for each engine, under its name."""
        engines = {
            tuple({**self.labels, "engine": name}.values()): stats
            for name, stats in self.llm.engines.items()
        }
        names = list(self.labels)
        gauges: dict[str, tuple[str, Callable[[wire.Stats], float]]] = {
            "vllm:num_requests_running": ("Sequences in the batch.", lambda s: s.num_running),
            "vllm:num_requests_waiting": ("Sequences that wait.", lambda s: s.num_waiting),
            "vllm:kv_cache_usage_perc": ("Share of KV blocks in use.", lambda s: s.kv_cache_usage),
        }
        for name, (about, read) in gauges.items():
            gauge = GaugeMetricFamily(name, about, labels=names)
            for values, stats in engines.items():
                gauge.add_metric(values, read(stats))
            yield gauge
        counters = {**COUNTERS, "vllm:prompt_tokens": "num_computed_tokens"}
        wanted = self.llm.config.speculative_config
        if wanted is not None:
            counters |= SPECULATION_COUNTERS
        # Counted here by reason.
        counters.pop("vllm:request_success", None)
        for name, field in counters.items():
            counter = CounterMetricFamily(name, f"{field} of the engine.", labels=names)
            for values, stats in engines.items():
                counter.add_metric(values, getattr(stats.counters, field))
            yield counter
        if wanted is not None:
            counter = CounterMetricFamily(
                ACCEPTED_PER_POS, "Proposals that were right.", labels=[*names, "position"]
            )
            most = wanted.num_speculative_tokens or 0
            for values, stats in engines.items():
                counts = stats.counters.num_accepted_tokens_per_pos
                for position, count in enumerate(per_position(counts, most)):
                    counter.add_metric([*values, str(position)], count)
            yield counter
