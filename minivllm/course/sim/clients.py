"""Clients of a server without a server: what a client notes, and event loops to try answers in.

A notebook's own event loop is running while its cells run, so a coroutine gets a loop in a thread
of its own: `run_in_thread`. With a `VirtualLoop`, no time passes while everybody waits.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Record:
    """What a client noted about one request. All times are seconds of one clock.

    due: when the request was to be sent. sent: when it was. events: (time, number of new tokens) of
    each event of the answer's stream. end: when the answer had ended, or had failed. ok: whether
    the whole answer came.
    """

    due: float
    sent: float
    events: list[tuple[float, int]] = field(default_factory=list)
    end: float = 0.0
    ok: bool = True


class StuckError(Exception):
    """All tasks of a `VirtualLoop` wait, and nothing is left that could wake one of them."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it.

    For programs of one thread without sockets. Raises `StuckError` where a real loop would wait
    for ever, and after `most` turns.
    """

    def __init__(self, most: int = 50_000) -> None:
        self.now = 0.0
        #: Turns of the loop, and timers that were set.
        self.num_turns = self.num_timers = 0
        self._most = most
        super().__init__(_NoWait(self))

    def time(self) -> float:
        """The virtual time, in seconds."""
        return self.now

    def call_at(self, when: float, callback: Any, *args: Any, **more: Any) -> asyncio.TimerHandle:
        """As `asyncio`'s, and counted."""
        self.num_timers += 1
        return super().call_at(when, callback, *args, **more)

    def skip(self, seconds: float | None) -> None:
        """Take a turn: move the clock by the time until the next timer; None: there is none."""
        self.num_turns += 1
        if seconds is None or self.num_turns > self._most:
            self.num_turns = 0
            raise StuckError
        self.now += seconds


class _NoWait(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        self._loop.skip(timeout)
        return super().select(0)


def run_in_thread(
    main: Callable[[], Coroutine[Any, Any, Any]],
    loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    timeout: float | None = None,
) -> Any:
    """Run main() in an event loop in a thread of its own, and return its result.

    Raises what main raises. timeout: in seconds; then the tasks are cancelled, and TimeoutError is
    raised.
    """
    done: list[Any] = []
    errors: list[BaseException] = []
    running: list[asyncio.AbstractEventLoop] = []

    async def watched() -> Any:
        running.append(asyncio.get_running_loop())
        return await main()

    def work() -> None:
        try:
            with asyncio.Runner(loop_factory=loop) as runner:
                done.append(runner.run(watched()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="clients", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        if running:
            running[0].call_soon_threadsafe(_cancel_all)
        thread.join(1.0)
        raise TimeoutError(f"not done after {timeout:g} seconds")
    if errors:
        raise errors[0]
    return done[0]


def _cancel_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()
