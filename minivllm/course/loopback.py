"""A server of this machine for a notebook, and loads for it.

::

    server = start_server("--max-queue=8", max_num_seqs=4)
    point = await server.offer(requests=40, rate=10.0)    # what its clients saw
    server.close()

It is `minivllm serve` on a free port of loopback, in a process of its own. It ends with `close`, or
with the Python that started it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import io
from typing import Any

from minivllm.bench import serving
from minivllm.bench.loads import Settings
from minivllm.bench.spawned import spawned
from minivllm.bench.sse import Endpoint

#: Tokens of the prompts and of the answers of a load: a laptop serves some in a second.
PROMPTS, ANSWERS = (20, 60), (16, 48)


class LocalServer:
    """A server that runs. url: its address."""

    def __init__(self, flags: tuple[str, ...], engine: dict[str, Any]) -> None:
        self._stack = contextlib.ExitStack()
        options = [f"{name}={value}" for name, value in engine.items()]
        with contextlib.redirect_stderr(io.StringIO()):
            self.url = self._stack.enter_context(spawned(None, options, flags=flags))
        self.endpoint = Endpoint.parse(self.url)
        self._loads = 0
        atexit.register(self._stack.close)

    async def offer(
        self, requests: int, *, clients: int | None = None, rate: float | None = None
    ) -> dict[str, Any]:
        """Send a load, and return what its clients saw: a point of ``minivllm bench serve``.

        clients: so many in a closed loop; or rate: open arrivals per second. The prompts are new
        each time. Raises `ConfigError` where the server does not answer.
        """
        self._loads += 1
        settings = Settings(
            clients=(clients,) if clients else (),
            rates=(rate,) if rate else (),
            input=PROMPTS,
            output=ANSWERS,
            requests=requests,
            seed=self._loads,
        )
        with contextlib.redirect_stderr(io.StringIO()):
            report = await asyncio.to_thread(serving.run, self.url, settings)
        point: dict[str, Any] = report["points"][0]
        return point

    async def state(self) -> dict[str, float]:
        """What the server says of its engine: requests that run and wait, KV blocks in use."""
        reader, writer = await asyncio.open_connection(self.endpoint.host, self.endpoint.port)
        try:
            writer.write(self.endpoint.request("/metrics").replace(b"1.1\r\n", b"1.0\r\n", 1))
            text = (await reader.read()).decode()
        finally:
            writer.close()
        found = {}
        for name, metric in _METRICS.items():
            lines = [line for line in text.splitlines() if line.startswith(metric)]
            found[name] = sum(float(line.rpartition(" ")[2]) for line in lines)
        return found

    def close(self) -> None:
        """End the server, and wait for its end. A second call does nothing."""
        self._stack.close()
        atexit.unregister(self._stack.close)


_METRICS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "KV cache in use": "vllm:kv_cache_usage_perc",
}


def start_server(*flags: str, **engine: Any) -> LocalServer:
    """Start a server of the bundled model on the CPU, and return when it answers.

    flags: of ``minivllm serve``, as "--max-queue=8". engine: options of the engine. Raises
    `ConfigError` where it does not start.
    """
    return LocalServer(flags, {"device": "cpu", **engine})
