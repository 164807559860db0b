"""Replicas behind routers: the same conversations for each way to choose a replica.

A router is judged by three things: the share of prompt tokens that a cache knew (the hit rate), the
time to the first token, and the load imbalance: the tokens that the busiest replica computed,
divided by the mean. One replica for everybody would have the best hit rate of all.

The replicas are on this machine, each with one thread, and so is all the rest; with fewer cores
than processes, times show the machine as much as the router. Hit rate and imbalance do not.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

# Each replica has one core at most; Ray's processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from minivllm.bench import serving
from minivllm.bench.conversations import Conversation, TraceSettings, cacheable, draw_conversations
from minivllm.bench.loads import Settings
from minivllm.bench.report import environment, percentiles, say
from minivllm.bench.sse import Client, Endpoint, HTTPError
from minivllm.errors import ConfigError

#: The metrics of an engine that count what it computed, and their short names.
COUNTERS = {
    "vllm:prompt_tokens_total": "computed",
    "vllm:generation_tokens_total": "generated",
    "vllm:prefix_cache_queries_total": "queries",
    "vllm:prefix_cache_hits_total": "hits",
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    routers: names of `ROUTERS`. scale: numbers of replicas whose throughput is measured with so
    many clients. fleet: further fields of `Fleet`.
    """

    routers: Sequence[str] = ("random", "load", "ray-prefix", "prefix")
    replicas: int = 3
    scale: Sequence[int] = ()
    clients: int = 24
    requests: int = 96
    trace: TraceSettings = field(default_factory=TraceSettings)
    fleet: Mapping[str, Any] = field(default_factory=dict)


def run(plan: Plan) -> dict[str, Any]:
    """Measure each router, then the throughput by number of replicas.

    Raises `ConfigError` without Ray, and `EngineEndedError` where the replicas do not start.
    """
    try:
        from minivllm.serving.replicas.local import Fleet, free_port, ray_here
    except ImportError as error:
        raise ConfigError(
            f"{error}. Install what replicas need: pip install 'minivllm[ray]'."
        ) from error
    first = Fleet(**_fields(plan))
    report: dict[str, Any] = {
        "benchmark": "replicas",
        "environment": environment() | {"cores": os.cpu_count(), "ray": version("ray")},
        "model": first.model or "bundled",
        "settings": {**asdict(plan), "fleet": dict(plan.fleet)},
        "routers": {},
        "scale": [],
    }
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    say("replicas: Ray starts")
    with ray_here("127.0.0.1", port):
        for router in plan.routers:
            report["routers"][router] = _routed(url, router, plan)
        for count in plan.scale:
            report["scale"].append(_scaled(url, count, plan))
    return report


def _fields(plan: Plan, **more: Any) -> dict[str, Any]:
    """The fields of a `Fleet`, whose processes ask Ray for no CPUs: see `local.checked`."""
    return {**plan.fleet, "cpus": 0, "front_cpus": 0, **more}


# --- routers --------------------------------------------------------------------------------------


def _routed(url: str, router: str, plan: Plan) -> dict[str, Any]:
    from minivllm.serving.replicas.local import Fleet, deploy

    say(f"replicas: {plan.replicas} behind the router {router!r}")
    try:
        # Anew: with empty caches, and quicker than one replica after the other.
        deploy(Fleet(**_fields(plan, min_replicas=plan.replicas, router=router)), anew=True)
    except ConfigError as error:
        return {"problem": str(error)}
    return asyncio.run(_play(Endpoint.parse(url), plan))


async def _play(endpoint: Endpoint, plan: Plan) -> dict[str, Any]:
    client = Client(endpoint)
    try:
        await _wait_for_all(client, plan.replicas)
        before = await _counters(client)
        start = time.perf_counter()
        talks = [Talk(client, talk, start) for talk in draw_conversations(plan.trace)]
        await asyncio.gather(*(talk.run() for talk in talks))
        seconds = time.perf_counter() - start
        after = await _counters(client)
    finally:
        client.close()
    records = sorted((r for talk in talks for r in talk.records), key=lambda r: r["sent"])
    prompts, answers = ([record.pop(name) for record in records] for name in ("prompt", "answer"))
    good = [record for record in records if record["ttft"] is not None]
    engines = {
        name: {short: after[name][short] - before.get(name, {}).get(short, 0.0) for short in values}
        for name, values in after.items()
    }
    work = [engine["computed"] + engine["generated"] for engine in engines.values()]
    prompt_tokens = sum(record["prompt_tokens"] for record in good)
    return {
        "problem": None if len(good) == len(records) else f"{len(records) - len(good)} failed",
        "seconds": seconds,
        "requests": len(records),
        "completed": len(good),
        "prompt_tokens": prompt_tokens,
        "hit_rate": sum(r["cached"] for r in good) / prompt_tokens if prompt_tokens else None,
        "best_hit_rate": cacheable(
            prompts, plan.fleet.get("engine", {}).get("block_size", 16), answers
        )
        / max(1, sum(map(len, prompts))),
        "ttft": _spread([r["ttft"] for r in good]),
        "ttft_later_turns": _spread([r["ttft"] for r in good if r["turn"]]),
        "end_to_end": _spread([r["e2e"] for r in good]),
        "imbalance": max(work) * len(work) / sum(work) if sum(work) else None,
        "engines": engines,
        "records": records,
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    return percentiles(values) if values else None


class Talk:
    """One conversation as its person has it. start: of the trace, on perf_counter's clock."""

    def __init__(self, client: Client, conversation: Conversation, start: float) -> None:
        self.client, self.conversation, self.start = client, conversation, start
        self.records: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Have the conversation; ends early where a turn fails."""
        await asyncio.sleep(self.start + self.conversation.start - time.perf_counter())
        answers: list[list[int]] = []
        for number, turn in enumerate(self.conversation.turns):
            await asyncio.sleep(turn.pause)
            prompt = self.conversation.prompt(number, answers)
            record, answer = await self._ask(prompt, turn.answer)
            place = {"conversation": self.conversation.number, "turn": number, "answer": answer}
            self.records.append(place | record)
            if record["ttft"] is None:
                return
            answers.append(answer)

    async def _ask(self, prompt: list[int], max_tokens: int) -> tuple[dict[str, Any], list[int]]:
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        sent = time.perf_counter()
        record: dict[str, Any] = {
            "sent": sent - self.start,
            "prompt": prompt,
            "prompt_tokens": len(prompt),
            "ttft": None,
            "why": None,
        }
        try:
            request = self.client.endpoint.request("/v1/completions", body)
            response = await self.client.ask(request, keeps_events=True)
        except (HTTPError, OSError) as error:
            return record | {"why": str(error)}, []
        if response.status != 200 or response.error or not response.arrivals:
            return record | {"why": response.error or f"status {response.status}"}, []
        answer: list[int] = []
        for event in response.events or ():
            for choice in json.loads(event)["choices"]:
                answer += choice["token_ids"]
        usage = response.usage or {}
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        times = {"ttft": response.arrivals[0] - sent, "e2e": time.perf_counter() - sent}
        return record | times | {"cached": cached}, answer


async def _counters(client: Client) -> dict[str, dict[str, float]]:
    """The counters of each replica, by its name."""
    text = bytes((await client.ask(client.endpoint.request("/metrics"))).body).decode()
    found: dict[str, dict[str, float]] = {}
    for name, short in COUNTERS.items():
        for engine, value in re.findall(rf'^{name}{{engine="(\w+)".*}} (\S+)$', text, re.MULTILINE):
            found.setdefault(engine, {})[short] = float(value)
    return found


async def _wait_for_all(client: Client, count: int, seconds: float = 120.0) -> None:
    """Return when so many replicas answer, and no others. Raises `ConfigError` after some time."""
    deadline = time.monotonic() + seconds
    while len(await _counters(client)) != count:
        if time.monotonic() > deadline:
            raise ConfigError(f"There are not {count} replicas after {seconds:g} seconds.")
        await asyncio.sleep(0.2)


# --- scale ----------------------------------------------------------------------------------------


def _scaled(url: str, count: int, plan: Plan) -> dict[str, Any]:
    """The throughput of so many replicas, for clients in a closed loop."""
    from minivllm.serving.replicas.local import Fleet, deploy

    say(f"replicas: {count}, {plan.clients} clients")
    # Anew: otherwise the second number would find the prompts of the first one in the caches.
    deploy(Fleet(**_fields(plan, min_replicas=count)), anew=True)
    return _loaded(url, count, plan)


def _loaded(url: str, count: int, plan: Plan) -> dict[str, Any]:
    asyncio.run(_wait(url, count))
    settings = Settings(clients=(plan.clients,), requests=plan.requests, processes=1)
    measured = serving.run(url, settings)
    (point,) = measured["points"]
    kept = (
        "completed",
        "seconds",
        "requests_per_second",
        "output_tokens_per_second",
        "ttft",
        "tpot",
    )
    return {"replicas": count, "problem": measured["problem"]} | {
        name: point[name] for name in kept
    }


async def _wait(url: str, count: int) -> None:
    client = Client(Endpoint.parse(url))
    try:
        await _wait_for_all(client, count)
    finally:
        client.close()
