"""A replica: one engine as a Ray Serve deployment.

The engine's core runs in a child process of the replica's (or in a thread). When the engine dies,
the replica ends itself at once: a replica without an engine has the shortest queue of all, and
would attract every request until a health check finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from ray import serve

from minivllm import errors
from minivllm.serving import wire
from minivllm.serving.async_llm import AsyncLLM, Stream
from minivllm.serving.replicas.messages import LOAD, SUMMARY, Order, Part
from minivllm.serving.replicas.prefixes import pack_hashes

logger = logging.getLogger(__name__)

#: Seconds after which a replica whose engine does not answer is replaced.
HEALTH_TIMEOUT = 20.0
#: Seconds between two times that the requests' parts tell the engine's state.
STATE_PERIOD = 0.5


class Replica:
    """One engine.

    core: "process" or "thread". engine: options of `EngineConfig`. interval: seconds for which news
    of a request are gathered after its first token.
    """

    # Ray awaits it, which Python itself would not.
    async def __init__(  # type: ignore[misc]
        self, model: str | None, core: str, engine: dict[str, Any], interval: float
    ) -> None:
        log_with_ray()
        self.llm = await AsyncLLM.create(model, core=core, **engine)
        self.llm.on_death = _end
        self.name = str(serve.get_replica_context().replica_id.unique_id)
        self.interval = interval
        #: When a part last told the engine's state.
        self.told = float("-inf")

    async def describe(self) -> wire.Started:
        """What the front must know of the engine to check requests."""
        return self.llm.started

    async def generate(self, order: Order) -> AsyncGenerator[Part, None]:
        """Serve a request. Ends it when the caller goes away."""
        # The front's clock may be another host's; it puts its own arrival in again.
        checked = replace(order.input, arrival_time=time.perf_counter())
        stream = self.llm.start(checked, order.request_id)
        has_begun = False
        try:
            while not stream.is_finished:
                if has_begun:
                    # A message costs more than a token of a small model does.
                    await asyncio.sleep(self.interval)
                gains = await self._gains(stream)
                is_first, has_begun = bool(gains) and not has_begun, has_begun or bool(gains)
                with_state = is_first or stream.is_finished or self._is_time()
                if with_state:
                    self.told = time.monotonic()
                yield Part(self.name, gains, self.llm.stats if with_state else None)
        finally:
            self.llm.drop(stream)

    async def _gains(self, stream: Stream) -> list[wire.Gain]:
        """What a request has gained; nothing where it is time to tell the engine's state."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATE_PERIOD):
                    return await stream.next_gains()
            if self._is_time():
                return []

    def _is_time(self) -> bool:
        return time.monotonic() >= self.told + STATE_PERIOD

    async def reset_prefix_cache(self) -> bool:
        """Forget the content of all KV blocks. Returns False while requests are unfinished."""
        return await self.llm.reset_prefix_cache()

    async def state(self) -> tuple[str, wire.Stats]:
        """The replica's name, and its engine's state."""
        return self.name, self.llm.stats

    async def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises an error."""
        await self.llm.check_health(HEALTH_TIMEOUT)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the routers get to know; Ray asks now and then."""
        if not self.llm.config.enable_prefix_caching:
            return {LOAD: self.llm.num_unfinished}
        hashes = await self.llm.cached_hashes()
        return {SUMMARY: pack_hashes(hashes), LOAD: self.llm.num_unfinished}

    def __del__(self) -> None:
        # Ray calls this at the end of a drained replica. `__init__` may have failed.
        if hasattr(self, "llm"):
            self.llm.on_death = None
            self.llm.shutdown()


def log_with_ray() -> None:
    """Write minivllm's log into the file that Ray keeps for a replica's."""
    ours = logging.getLogger("minivllm")
    ours.handlers, ours.propagate = logging.getLogger("ray.serve").handlers, False
    ours.setLevel(logging.INFO)


def _end(error: errors.MiniVLLMError) -> None:
    logger.critical("The engine has died, and its replica ends: %s", error)
    logging.shutdown()
    os._exit(1)
