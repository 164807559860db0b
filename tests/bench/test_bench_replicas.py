"""`minivllm bench replicas`: its clients against a server of one engine, and its tables."""

from __future__ import annotations

import asyncio

import pytest

from minivllm.bench.conversations import TraceSettings
from minivllm.bench.replicas import Plan, _loaded, _play
from minivllm.bench.report import environment
from minivllm.bench.sse import Endpoint
from minivllm.bench.tables import show
from support.servers import server

pytestmark = pytest.mark.slow


def test_conversations_against_a_server_hit_what_can_be_hit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = TraceSettings(
        conversations=4, groups=2, turns=(2, 3), answer=(4, 8), rate=50, pause=0.05
    )
    with server(num_kv_blocks=512) as running:
        found = asyncio.run(_play(Endpoint.parse(running.address), Plan(replicas=1, trace=trace)))
        scaled = _loaded(running.address, 1, Plan(clients=2, requests=4))
    assert scaled["completed"] == 4
    assert scaled["output_tokens_per_second"] > 0
    assert found["problem"] is None
    assert found["completed"] == found["requests"] >= 8
    assert found["imbalance"] == 1.0
    (engine,) = found["engines"].values()
    assert engine["hits"] == sum(record["cached"] for record in found["records"])
    assert engine["queries"] == found["prompt_tokens"]
    # Blocks that end in an answer are hits that `cacheable` does not count; requests that come at
    # the same time miss some that it counts.
    assert 0.8 * found["best_hit_rate"] < found["hit_rate"] < found["best_hit_rate"] + 0.2
    later = [record for record in found["records"] if record["turn"]]
    assert all(record["cached"] >= 64 for record in later)
    assert found["ttft_later_turns"]["count"] == len(later)

    report = {
        "benchmark": "replicas",
        "environment": environment() | {"cores": 2},
        "model": "bundled",
        "settings": {"trace": {"conversations": 4}, "replicas": 1, "clients": 2},
        "routers": {"prefix": found, "ray-prefix": {"problem": "no package"}},
        "scale": [scaled],
    }
    show(report)
    said = capsys.readouterr().out
    assert "no package" in said
    assert f"{found['hit_rate']:.3f}" in said
    assert "1.00 ×" in said


def test_a_conversation_ends_where_a_turn_fails() -> None:
    trace = TraceSettings(conversations=2, first=(3000, 3000), rate=50)
    with server() as running:
        found = asyncio.run(_play(Endpoint.parse(running.address), Plan(replicas=1, trace=trace)))
    assert found["completed"] == 0
    assert found["requests"] == 2
    assert found["ttft"] is None
    assert found["hit_rate"] is None
    assert "2 failed" in found["problem"]
    assert all("400" in record["why"] for record in found["records"])
