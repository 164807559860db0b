"""The server at 3 a.m.: clients that go away, full queues, signals, and an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from minivllm.serving.state import ServerOptions
from support.servers import PATIENCE, command, server, wait_for

pytestmark = pytest.mark.slow

LONG = {"prompt": "Tell me a story about a fox.", "max_tokens": 1500, "ignore_eos": True}


def post(address: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE, **more)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(stream: bool) -> None:
    with server() as running:
        host, _, port = running.address.removeprefix("http://").partition(":")
        content = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            wait_for(lambda: running.state.llm.stats.num_running == 2)
        assert running.is_idle()
        assert running.state.llm.metrics().num_generated_tokens < 2000


def test_a_slow_reader_slows_nobody() -> None:
    """Its text is joined while it waits; the others are served meanwhile."""
    with (
        server() as running,
        running.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as slow,
    ):
        lines = slow.iter_lines()
        next(lines)
        for n in range(3):
            body = {"prompt": f"Story {n}", "max_tokens": 8}
            assert running.client.post("/v1/completions", json=body).status_code == 200
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"


def test_sigterm_lets_requests_finish(tmp_path: Path) -> None:
    with command(tmp_path) as serve, ThreadPoolExecutor(1) as pool:
        body = {**LONG, "max_tokens": 300}
        answer = pool.submit(post, serve.address, body)
        wait_for(
            lambda: (
                "num_requests_running{" in (text := metrics(serve.address))
                and value(text, "vllm:num_requests_running") == 1
            )
        )
        code = serve.end()
        assert answer.result().json()["usage"]["completion_tokens"] == 300
        assert code == 0
        assert "SIGTERM: 1 requests may finish" in serve.log.read_text()


def metrics(address: str) -> str:
    return httpx.get(f"{address}/metrics", timeout=PATIENCE).text


def value(text: str, name: str) -> float:
    return float(
        next(line for line in text.splitlines() if line.startswith(f"{name}{{")).split()[-1]
    )


def test_sigterm_aborts_what_does_not_finish(tmp_path: Path) -> None:
    with (
        command(tmp_path, "--drain-seconds=0.5") as serve,
        httpx.stream(
            "POST",
            f"{serve.address}/v1/completions",
            json={**LONG, "n": 8, "stream": True},
            timeout=PATIENCE,
        ) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        serve.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-2:]
        assert json.loads(last[0][6:])["choices"][0]["finish_reason"] == "abort"
        assert last[1] == "data: [DONE]"
        assert serve.process.wait(PATIENCE) == 0


def test_a_core_that_is_killed_ends_the_server(tmp_path: Path) -> None:
    with (
        command(tmp_path) as serve,
        httpx.stream(
            "POST",
            f"{serve.address}/v1/completions",
            json={**LONG, "stream": True},
            timeout=PATIENCE,
        ) as stream,
        ThreadPoolExecutor(1) as pool,
    ):
        lines = stream.iter_lines()
        next(lines)
        whole = pool.submit(post, serve.address, LONG)
        wait_for(lambda: value(metrics(serve.address), "vllm:num_requests_running") == 2)
        (core,) = [
            p
            for p in psutil.Process(serve.process.pid).children()
            if "core_process" in " ".join(p.cmdline())
        ]
        core.kill()
        killed = time.monotonic()
        last = [line for line in lines if line][-1]
        assert "died (signal 9)" in json.loads(last[6:])["error"]["message"]
        assert time.monotonic() - killed < 5  # a second, on a machine with nothing else to do
        assert whole.result().status_code == 503
        assert serve.process.wait(PATIENCE) == 1
        assert "The engine has died" in serve.log.read_text()


def test_the_core_ends_with_its_server(tmp_path: Path) -> None:
    with command(tmp_path) as serve:
        children = psutil.Process(serve.process.pid).children(recursive=True)
        assert children
        serve.end(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, PATIENCE)
        assert not alive


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "65535"),
        (["--ssl-certfile", "nowhere.pem"], "both"),
        (["-e", "block_size=x"], "block_size"),
        (["/no/such/model"], "No model directory"),
        (["--core", "planet"], "planet"),
    ],
)
def test_what_cannot_start_says_why(arguments: list[str], said: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "minivllm", "serve", *arguments], capture_output=True, timeout=120
    )
    text = (found.stdout + found.stderr).decode()
    assert found.returncode not in (0, -9), text
    assert said in text
    assert "Traceback" not in text


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command_line = [sys.executable, "-m", "minivllm", "serve", "--port", str(port)]
        found = subprocess.run(command_line, capture_output=True, timeout=120)
    text = (found.stdout + found.stderr).decode()
    assert found.returncode == 1
    assert "address already in use" in text
    assert "Traceback" not in text


def test_the_log_has_one_line_per_request_and_no_prompt(tmp_path: Path) -> None:
    for arguments, is_there in (([], False), (["--log-prompts"], True)):
        with command(tmp_path, *arguments) as serve:
            headers = {"X-Request-Id": "mine-7"}
            post(serve.address, {"prompt": "Sesame, open!", "max_tokens": 2}, headers=headers)
            serve.end()
            lines = [line for line in serve.log.read_text().splitlines() if "mine-7" in line]
            assert len(lines) == 1
            assert "POST /v1/completions 200" in lines[0]
            assert "tokens=" in lines[0]
            assert ("Sesame" in serve.log.read_text()) == is_there


def test_https(tmp_path: Path) -> None:
    openssl = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    made = [*openssl.split(), "-keyout", "key.pem", "-out", "cert.pem"]
    try:
        subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    files = [
        "--ssl-certfile",
        str(tmp_path / "cert.pem"),
        "--ssl-keyfile",
        str(tmp_path / "key.pem"),
    ]
    with command(tmp_path, *files) as serve:
        assert serve.address.startswith("https://")
        found = httpx.get(f"{serve.address}/v1/models", verify=False, timeout=PATIENCE)
        assert found.json()["data"][0]["id"] == "bundled"


NUM_REQUESTS = int(os.environ.get("MINIVLLM_STORM", "300"))
#: What a client of the storm may end with: a status, or that it went away itself.
ENDS = {200, 400, 413, 429, "gone"}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_storm_of_clients(tmp_path: Path) -> None:
    """MINIVLLM_STORM=10000 for the whole storm: a third of the clients goes away, others send
    nonsense, read slowly, or send far too much. Nothing stays.
    """
    engine = ["-enum_kv_blocks=300", "-emax_num_seqs=12"]
    with command(tmp_path, "--max-queue=8", *engine) as serve:
        me = psutil.Process(serve.process.pid)
        processes = [me, *me.children()]
        post(serve.address, {"prompt": "a", "max_tokens": 2})

        def sizes() -> tuple[int, int]:
            return (
                sum(p.memory_info().rss for p in processes),
                sum(p.num_fds() for p in processes),
            )

        started = time.monotonic()
        counts = storm(serve.address, range(NUM_REQUESTS // 3))
        began = sizes()
        counts += storm(serve.address, range(NUM_REQUESTS // 3, NUM_REQUESTS))
        seconds = time.monotonic() - started
        wait_for(lambda: value(metrics(serve.address), "vllm:num_requests_running") == 0)
        time.sleep(1)
        text, ended = metrics(serve.address), sizes()
        print(f"{seconds:.0f} s, {dict(counts)}, bytes and files: {began} to {ended}")
        assert value(text, "vllm:num_requests_waiting") == 0
        assert value(text, "vllm:kv_cache_usage_perc") == 0
        assert sum(counts.values()) == NUM_REQUESTS
        assert set(counts) <= ENDS, counts
        assert counts[200] > NUM_REQUESTS // 20
        assert counts[429], "fewer may be in than there are clients"
        aborted = 'vllm:request_success_total{engine="0",finished_reason="abort"'
        assert re.search(rf"{re.escape(aborted)}.*}} [1-9]", text), "some of them had begun"
        assert ended[0] - began[0] < 100e6, f"memory: {began[0]:,} to {ended[0]:,}"
        assert ended[1] <= began[1] + 8, "sockets"
        assert post(serve.address, {"prompt": "a", "max_tokens": 2}).status_code == 200
        assert serve.end() == 0
        assert "Traceback" not in serve.log.read_text()


@pytest.mark.slow
def test_a_storm_leaves_no_task() -> None:
    with server(ServerOptions(max_queue=8), num_kv_blocks=300) as running:
        post(running.address, {"prompt": "a", "max_tokens": 2})
        loop = running.state.llm._loop
        assert loop is not None

        def tasks() -> int:
            return len(asyncio.all_tasks(loop))

        before = tasks()
        counts = storm(running.address, range(150))
        assert set(counts) <= ENDS, counts
        assert running.is_idle()
        wait_for(lambda: tasks() <= before)
        assert not running.state.llm._streams


def storm(address: str, numbers: Iterable[int]) -> Counter[Any]:
    """Clients of all kinds, 48 at a time. Returns how many ended how."""
    with ThreadPoolExecutor(48) as pool:
        return Counter(pool.map(lambda number: misbehave(address, random.Random(number)), numbers))


NONSENSE = [b'{"prompt": ', b"[]", b'{"prompt": {}}', b'{"prompt": "a", "n": "x"}', b"\0"]


def misbehave(address: str, dice: random.Random) -> Any:
    """One client of the storm. Returns the status, or "gone"."""
    path, kind = dice.choice(["completions", "chat/completions"]), dice.random()
    url, text = f"{address}/v1/{path}", f"Story {dice.random()}"
    body: dict[str, Any] = {"max_tokens": dice.randint(1, 40), "seed": dice.randint(0, 99)}
    body |= {"stream": dice.random() < 0.5}
    if path == "completions":
        body["prompt"] = text
    else:
        body["messages"] = [{"role": "user", "content": text}]
    if kind < 0.3:
        leave(url, {**body, "max_tokens": 400, "ignore_eos": True}, dice)
        return "gone"
    if kind < 0.4:
        headers = {"Content-Type": "application/json"}
        content = dice.choice(NONSENSE)
        return httpx.post(url, content=content, headers=headers, timeout=300).status_code
    if kind < 0.42:
        large = b"x" * 20_000_000
        # An iterator has no length: the server learns it only by reading.
        parts = large if dice.random() < 0.5 else iter([large[:1_000_000]] * 20)
        return httpx.post(url, content=parts, timeout=300).status_code
    if kind < 0.5:
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=300) as slow:
            for _ in slow.iter_raw(64):
                time.sleep(0.02)
            return slow.status_code
    return httpx.post(url, json=body, timeout=300).status_code


def leave(url: str, body: dict[str, Any], dice: random.Random) -> None:
    """Ask for a long answer, and close the connection somewhere on the way."""
    if body["stream"]:
        with httpx.stream("POST", url, json=body, timeout=300) as response:
            for _ in zip(range(dice.randint(0, 40)), response.iter_lines(), strict=False):
                pass
        return
    if dice.random() < 0.7:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(url, json=body, timeout=dice.uniform(0.05, 1.0))
        return
    # In the middle of its own body, with a reset instead of a farewell.
    host, _, rest = url.removeprefix("http://").partition("/")
    name, _, port = host.partition(":")
    content = json.dumps(body).encode()
    head = f"POST /{rest} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((name, int(port)), 300) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode())
        connection.sendall(content[: dice.randint(0, len(content))])
        time.sleep(dice.uniform(0, 0.1))
