"""`minivllm bench replicas`: its clients against a server of one engine, and its tables."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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
    # Requests that come at the same time miss some.
    assert 0.8 * found["best_hit_rate"] < found["hit_rate"] <= found["best_hit_rate"]
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


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: pip install 'minivllm[ray]'"
)
def test_the_command_measures_routers_and_scale_with_ray(tmp_path: Path) -> None:
    """Ray's own router by prefix is loaded from Ray, without the packages of ray[llm]."""
    flags = ["--routers=ray-prefix", "--replicas=2", "--scale=1", "--clients=2", "--requests=4"]
    flags += [
        "--conversations=3",
        "--rate=20",
        "--pause=0.1",
        "-edevice=cpu",
        "-enum_kv_blocks=512",
    ]
    out = tmp_path / "report.json"
    subprocess.run(
        [sys.executable, "-m", "minivllm", "bench", "replicas", *flags, f"--out={out}"],
        check=True,
        timeout=590,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    report = json.loads(out.read_text())
    found = report["routers"]["ray-prefix"]
    assert found["problem"] is None
    assert found["completed"] == found["requests"] >= 9
    assert found["hit_rate"] > 0
    assert len(found["engines"]) == 2
    assert report["scale"][0]["completed"] == 4


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
