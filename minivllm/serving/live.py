"""The live page: the player (viz/player), fed with the engine's steps as they happen, and a chat.

Each viewer has a packer of their own, so that anyone may come at any time. Nothing is recorded
while nobody looks. A viewer who reads too slowly is told to begin anew.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from minivllm.engine.trace import new_trace
from minivllm.serving import wire
from minivllm.serving.state import ServerState
from minivllm.viz.player.live import live_page
from minivllm.viz.player.pack import Packer, pack

#: Steps that may wait for a viewer: some seconds.
MOST_WAITING = 150
#: Seconds after which a viewer without steps gets a sign of life, and the page is seen to close.
HEARTBEAT = 1.0


class LiveFeed:
    """Gives the engine's steps to whoever looks."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self._viewers: set[Viewer] = set()

    @property
    def page(self) -> str:
        """The page at ``/``."""
        llm = self.state.llm
        return live_page(
            self.state.model_name,
            shows_text=self.state.options.show_text,
            needs_key=self.state.options.api_key is not None,
            has_chat=llm.tokenizer is not None,
        )

    async def events(self) -> AsyncGenerator[str, None]:
        """The engine's steps as server-sent events, beginning with the engine's sizes."""
        viewer = Viewer()
        try:
            self._join(viewer)
            yield _event("start", self._sizes())
            while not self.state.is_draining:
                try:
                    step = await asyncio.wait_for(viewer.queue.get(), HEARTBEAT)
                except TimeoutError:
                    yield ": nothing happens\n\n"
                    continue
                if step is None:
                    viewer.reset()
                    yield _event("start", self._sizes())
                else:
                    yield _event("step", step)
        finally:
            self._leave(viewer)

    def _join(self, viewer: Viewer) -> None:
        self._viewers.add(viewer)
        if len(self._viewers) == 1:
            self.state.llm.watch(self._on_step, self.state.options.show_text)

    def _leave(self, viewer: Viewer) -> None:
        self._viewers.discard(viewer)
        if not self._viewers and not self.state.llm.errored:
            self.state.llm.watch(None)

    def _on_step(self, step: wire.Step) -> None:
        for viewer in self._viewers:
            viewer.put(step)

    def _sizes(self) -> dict[str, Any]:
        """The head of a trace, without names and steps, as the player reads it."""
        llm = self.state.llm
        return pack(new_trace(self.state.model_name, llm.config, llm.kv_bytes_per_token))


class Viewer:
    """One open page."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.reset()

    def reset(self) -> None:
        """Begin anew: forget what waits, and what the page knows."""
        while not self.queue.empty():
            self.queue.get_nowait()
        self._packer = Packer()
        self._is_lost = False

    def put(self, step: wire.Step) -> None:
        """Pack a step for this page."""
        if self._is_lost:
            return
        if self.queue.qsize() >= MOST_WAITING:
            self._is_lost = True
            self.queue.put_nowait(None)
            return
        packed = self._packer.step(step)
        packed["new"] = [[name, step.prompts.get(name, "")] for name in self._packer.added]
        for name in step.finished:
            self._packer.forget(name)
        self.queue.put_nowait(packed)


def _event(kind: str, data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
