"""What the exercises of chapter 12 share: engines under observation, and loops that notice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.errors import Mistake
from minivllm.course.sim.clients import StuckError, VirtualLoop, run_in_thread

if TYPE_CHECKING:
    from minivllm.outputs import RequestOutput

#: Seconds that anything may take that takes milliseconds on a quiet machine.
PATIENCE = 4.0


def output_of(request_id: str, words: list[str], finish_reason: str | None) -> RequestOutput:
    """A request's output with all its words so far."""
    from minivllm.outputs import CompletionOutput, RequestOutput

    completion = CompletionOutput(
        0, " ".join(words), list(range(len(words))), finish_reason=finish_reason
    )
    return RequestOutput(request_id, None, [1], [completion], finish_reason is not None)


def run_virtual(
    main: Callable[[VirtualLoop], Coroutine[Any, Any, Any]],
    stuck: Mistake,
    polls: Mistake | None = None,
) -> Any:
    """Run main(loop) in a `VirtualLoop`. Raises `stuck` where all its tasks wait for ever.

    polls: raised in its place where they go on setting timers.
    """
    loops: list[VirtualLoop] = []

    def make() -> VirtualLoop:
        loops.append(VirtualLoop())
        return loops[-1]

    async def run() -> Any:
        return await main(loops[-1])

    try:
        return run_in_thread(run, make)
    except StuckError:
        raise (polls if polls and loops[-1].num_timers > 10_000 else stuck) from None


class WatchingLoop(asyncio.SelectorEventLoop):
    """A real event loop that notes what another thread does to it without `call_soon_threadsafe`.

    Such a call is passed on in the safe way, so that nobody waits for ever.
    """

    def __init__(self) -> None:
        self.num_foreign = self.num_turns = 0
        self._owner = threading.get_ident()
        super().__init__()

    def call_soon(self, callback: Any, *args: Any, **more: Any) -> asyncio.Handle:
        """As `asyncio`'s, from any thread."""
        if threading.get_ident() == self._owner:
            return super().call_soon(callback, *args, **more)
        self.num_foreign += 1
        return self.call_soon_threadsafe(callback, *args, **more)

    def _run_once(self) -> None:
        self.num_turns += 1
        super()._run_once()  # type: ignore[misc]
