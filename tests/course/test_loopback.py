"""The server of chapter 12's page: it serves loads, says how it is, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from minivllm.course.loopback import start_server
from minivllm.errors import ConfigError

pytestmark = pytest.mark.slow


def test_it_serves_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    server = start_server("--max-queue=3", max_num_seqs=2, num_kv_blocks=64)
    address = (server.endpoint.host, server.endpoint.port)
    try:
        points = [
            asyncio.run(server.offer(6, clients=2)),
            asyncio.run(server.offer(4, rate=50.0)),
        ]
        assert [point["completed"] for point in points] == [6, 4]
        assert points[0]["clients"] == 2
        assert points[1]["rate"] == 50.0
        assert not points[1]["cached_prompt_tokens"], "each load has prompts of its own"
        assert asyncio.run(server.state()) == {"running": 0, "waiting": 0, "KV cache in use": 0}
        assert asyncio.run(is_refused(server))
    finally:
        server.close()
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ConnectionRefusedError), socket.create_connection(address, timeout=5):
        pytest.fail("it still listens")
    server.close()


async def is_refused(server) -> bool:
    """Whether the sixth request finds no room, and the state says who runs and waits."""
    body = {"model": "bundled", "prompt": [7, 8, 9], "max_tokens": 500, "ignore_eos": True}
    request = server.endpoint.request("/v1/completions", body | {"stream": True})
    host, port = server.endpoint.host, server.endpoint.port
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            _, writer = await asyncio.open_connection(host, port)
            stack.callback(writer.close)
            writer.write(request)
        async with asyncio.timeout(60):
            while (state := await server.state())["waiting"] < 3:
                await asyncio.sleep(0.02)
        assert state["running"] == 2
        assert state["KV cache in use"] > 0
        reader, writer = await asyncio.open_connection(host, port)
        stack.callback(writer.close)
        writer.write(request)
        return b" 429 " in await reader.readline()


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(ConfigError, match="did not start"):
        start_server(block_size=0)
