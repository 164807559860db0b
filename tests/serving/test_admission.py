"""Who may come in, by a clock of the test; and a burst against a real server."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from minivllm.serving.admission import Admission
from minivllm.serving.state import ServerOptions
from support.servers import PATIENCE, server

pytestmark = pytest.mark.slow


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_places_are_counted_with_those_that_are_promised() -> None:
    admission = Admission(slots=2, max_queue=3)
    assert admission.has_room(5, 0)
    assert not admission.has_room(6, 0)
    admission.num_promised = 2
    assert admission.has_room(1, 2)
    assert not admission.has_room(1, 3)


@pytest.mark.parametrize(
    ("ends", "inside", "seconds"),
    [
        (0, 10, 1),  # nothing is known yet
        (5, 6, 8),  # 4 wait; 5 ends in 10 seconds
        (5, 2, 1),  # nobody waits
        (1, 30, 60),  # 28 wait: 280 seconds
        (1000, 3, 1),
    ],
)
def test_retry_after_is_the_queue_by_the_rate(ends: int, inside: int, seconds: int) -> None:
    admission = Admission(slots=2, max_queue=8, clock=Clock(), window=10.0)
    for _ in range(ends):
        admission.note_end()
    assert admission.retry_after(inside) == seconds


def test_ends_are_forgotten() -> None:
    clock = Clock()
    admission = Admission(slots=1, max_queue=4, clock=clock, window=10.0)
    for _ in range(100):
        admission.note_end()
        clock.now += 1
    assert len(admission._ends) <= 11
    assert admission.retry_after(3) == 3  # 2 wait; 9 ends in the last 10 seconds
    clock.now += 10
    assert admission.retry_after(3) == 60


@pytest.mark.parametrize("stream", [True, False])
def test_a_burst_does_not_pass_the_door_at_once(stream: bool) -> None:
    """All prompts are checked at the same time; then each needs a place of its own."""
    body = {
        "prompt": ["Once upon a time there was a fox. " * 30],
        "max_tokens": 60,
        "ignore_eos": True,
        "stream": stream,
    }
    with server(ServerOptions(max_queue=2), max_num_seqs=1) as running:
        most = 0
        start, check = running.state.llm.start, running.state.llm.check

        async def slow_check(*args, **kwargs):
            await asyncio.sleep(0.5)  # all have come in before the first is checked
            return await check(*args, **kwargs)

        def counting(*args, **kwargs):
            nonlocal most
            found = start(*args, **kwargs)
            most = max(most, running.state.llm.num_unfinished)
            return found

        running.state.llm.start, running.state.llm.check = counting, slow_check

        def ask(_: int) -> httpx.Response:
            return httpx.post(f"{running.address}/v1/completions", json=body, timeout=PATIENCE)

        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(ask, range(24)))
        counts = Counter(answer.status_code for answer in answers)
        assert set(counts) == {200, 429}
        assert counts[200] >= 3
        assert most <= 3
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert running.state.admission.num_promised == 0
        assert running.is_idle()
