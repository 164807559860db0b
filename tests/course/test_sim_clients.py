"""Event loops to try answers in: virtual time, loops that are stuck, results from a thread."""

from __future__ import annotations

import asyncio
import time

import pytest

from minivllm.course.sim.clients import StuckError, VirtualLoop, run_in_thread


def test_an_hour_passes_in_no_time() -> None:
    async def main() -> tuple[float, list[str]]:
        loop, order = asyncio.get_running_loop(), []

        async def later(seconds: float, name: str) -> None:
            await asyncio.sleep(seconds)
            order.append(name)

        await asyncio.gather(later(3600, "slow"), later(1, "fast"), later(0, "now"))
        return loop.time(), order

    began = time.monotonic()
    now, order = run_in_thread(main, VirtualLoop)
    assert now == pytest.approx(3600)
    assert order == ["now", "fast", "slow"]
    assert time.monotonic() - began < 60


def test_a_wait_without_end_is_named_at_once() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(StuckError):
        run_in_thread(main, VirtualLoop)


def test_a_loop_that_asks_for_ever_is_stopped() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(StuckError):
        run_in_thread(main, lambda: VirtualLoop(most=100))


def test_errors_and_results_come_back() -> None:
    async def main(error: Exception | None = None) -> str:
        if error is not None:
            raise error
        return "done"

    assert run_in_thread(main) == "done"
    with pytest.raises(KeyError, match="this one"):
        run_in_thread(lambda: main(KeyError("this one")))


def test_what_takes_too_long_is_cancelled() -> None:
    cancelled = []

    async def main() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(TimeoutError):
        run_in_thread(main, timeout=0.1)
    assert cancelled == [True]
