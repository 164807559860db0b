"""The front: the OpenAI application as a Ray Serve deployment, over the replicas.

It checks and encodes requests, so it needs the tokenizer and no GPU. Its answers are those of one
server, except for the live page, which shows the steps of one engine.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from minivllm.serving import wire
from minivllm.serving.app import build_app
from minivllm.serving.async_llm import AsyncLLM
from minivllm.serving.replicas.fleet import FleetCore, local_path
from minivllm.serving.replicas.replica import log_with_ray
from minivllm.serving.state import ServerOptions, ServerState

logger = logging.getLogger("minivllm.serving")


class Front:
    """handle: of the replicas. model: as they got it. num_engines: how many there are at most."""

    # Ray awaits it, which Python itself would not.
    async def __init__(  # type: ignore[misc]
        self,
        handle: DeploymentHandle,
        model: str | None,
        options: dict[str, Any],
        num_engines: int,
    ) -> None:
        log_with_ray()
        # Waits until a replica is up.
        said: wire.Started = await handle.describe.remote()
        started = await asyncio.to_thread(local_path, said, model)
        self.llm = AsyncLLM(core=lambda receive: FleetCore(handle, started, receive))
        server = ServerOptions(**options)
        if server.served_model_name is None and model is not None:
            # The directory of a model from the hub has a name that nobody would write.
            name = model.rstrip("/").rpartition("/")[2]
            server = replace(server, served_model_name=name)
        self.state = ServerState(self.llm, server, num_engines=num_engines)
        # As in `serve` (server.py).
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_app(self.state, has_page=False)

    async def drain(self) -> int:
        """Take no more requests. Returns how many are unfinished."""
        self.state.is_draining = True
        return self.llm.num_unfinished

    async def abort_all(self) -> None:
        """End all requests: they return what they have."""
        await self.llm.abort_all()

    def __del__(self) -> None:
        if hasattr(self, "llm"):
            self.llm.shutdown()
