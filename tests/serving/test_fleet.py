"""The front's half of a fleet, and a replica's, in one process, without Ray's processes.

test_replicas.py has both with all that Ray starts.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.errors import EngineEndedError
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.serving.async_llm import AsyncLLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60),
    pytest.mark.skipif(
        find_spec("ray") is None, reason="Ray is not installed: pip install 'minivllm[ray]'"
    ),
]

PROMPT = "Tell me a story about a fox."
OPTIONS = {"device": "cpu", "num_kv_blocks": 200, "max_num_seqs": 4}


@pytest.fixture(scope="module", autouse=True)
def settings() -> None:
    """Ray reads what local.py sets when it is imported, so that comes before any of its parts."""
    import_module("minivllm.serving.replicas.local")


class Handle:
    """In the place of Ray's handle of the replicas: one replica, which does as it is told.

    die: called with the number of parts that a try has sent, before the next one and after the
    last one; an error that it returns ends the try. is_full: whether calls wait for ever.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        from minivllm.serving.replicas.replica import Replica

        self.replica = object.__new__(Replica)
        self.replica.llm, self.replica.name = llm, "r1"
        self.replica.interval, self.replica.told = 0.0, float("-inf")
        self.die: Callable[[int, bool], BaseException | None] = lambda sent, is_end: None
        self.is_full = False
        self.tries: list[str] = []
        self.asked: list[str] = []
        self.describe = self
        self._method = ""

    def options(self, *, method_name: str, stream: bool) -> Handle:
        assert (method_name, stream) == ("generate", True)
        return self

    def remote(self, *args: Any) -> Any:
        return Response(self, args[0]) if args else self._answer("describe")

    def broadcast(self, method: str) -> Any:
        self._method = method
        return self

    async def results_async(self) -> list[Any]:
        return [await self._answer(self._method)]

    async def _answer(self, method: str) -> Any:
        self.asked.append(method)
        while self.is_full:
            await asyncio.sleep(0.01)
        return await getattr(self.replica, method)()


class Response:
    """In the place of Ray's response: the parts of one try."""

    def __init__(self, handle: Handle, order: Any) -> None:
        self.handle, self.order, self.is_cancelled = handle, order, False
        handle.tries.append(order.request_id)

    async def __aiter__(self) -> AsyncIterator[Any]:
        sent = 0
        if error := self.handle.die(sent, False):
            raise error
        async for part in self.handle.replica.generate(self.order):
            yield part
            sent += 1
            is_end = any(gain[2] for gain in part.gains)
            if error := self.handle.die(sent, is_end):
                raise error

    def cancel(self) -> None:
        self.is_cancelled = True


Test = Callable[[AsyncLLM, Handle], Coroutine[Any, Any, None]]


def run(test: Test) -> None:
    """Call a test with a front's `AsyncLLM` over the handle of a replica with the bundled model."""
    from minivllm.serving.replicas.fleet import FleetCore, local_path

    async def main() -> None:
        async with await AsyncLLM.create(core="thread", **OPTIONS) as engine:
            handle = Handle(engine)
            started = local_path(engine.started, None)

            def core(receive: Any) -> Any:
                return FleetCore(handle, started, receive)  # type: ignore[arg-type]

            async with AsyncLLM(core=core) as front:
                await asyncio.wait_for(test(front, handle), 50)

    asyncio.run(main())


async def ends(front: AsyncLLM, max_tokens: int = 12, n: int = 1) -> list[str | None]:
    """How the completions of a stream end. Raises the error that it ends with."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, n=n, ignore_eos=True)
    async for output in front.generate(PROMPT, params):
        if output.error is not None:
            raise output.error
    return [completion.finish_reason for completion in output.outputs]


def died() -> BaseException:
    from ray.exceptions import RayActorError

    return RayActorError()


def test_an_abort_before_the_first_step_ends_the_request_for_whoever_reads() -> None:
    async def test(front: AsyncLLM, handle: Handle) -> None:
        params = SamplingParams(n=2, max_tokens=12)
        stream = front.start(await front.check(PROMPT, params))
        # Nothing has run since: the request's task has not taken its first step.
        await front.abort(stream.request_id)
        output = await asyncio.wait_for(stream.next(), 10)
        front.drop(stream)
        assert output.finished
        assert [completion.finish_reason for completion in output.outputs] == ["abort"] * 2
        assert handle.tries == []
        assert await ends(front) == ["length"]

    run(test)


def test_an_abort_in_mid_stream_keeps_what_came_and_ends_the_call() -> None:
    async def test(front: AsyncLLM, handle: Handle) -> None:
        params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
        stream = front.start(await front.check(PROMPT, params))
        first = await stream.next()
        await front.abort(stream.request_id)
        while not stream.is_finished:
            last = await stream.next()
        front.drop(stream)
        assert last.outputs[0].finish_reason == "abort"
        assert last.outputs[0].text.startswith(first.outputs[0].text)

    run(test)


def test_a_replica_that_dies_after_its_last_part_has_answered() -> None:
    async def test(front: AsyncLLM, handle: Handle) -> None:
        handle.die = lambda sent, is_end: died() if is_end else None
        assert await ends(front, n=2) == ["length", "length"]
        assert len(handle.tries) == 1

    run(test)


def test_a_replica_that_dies_in_mid_stream_ends_the_request_with_an_error() -> None:
    async def test(front: AsyncLLM, handle: Handle) -> None:
        handle.die = lambda sent, is_end: died() if sent else None
        with pytest.raises(EngineEndedError, match="while it answered"):
            await ends(front, max_tokens=900)
        assert len(handle.tries) == 1

    run(test)


def test_a_request_that_has_not_begun_goes_elsewhere_and_not_for_ever() -> None:
    async def test(front: AsyncLLM, handle: Handle) -> None:
        handle.die = lambda sent, is_end: died() if len(handle.tries) < 3 else None
        assert await ends(front) == ["length"]
        assert len(set(handle.tries)) == 3, "each try has its own id"
        handle.tries.clear()
        handle.die = lambda sent, is_end: died()
        with pytest.raises(EngineEndedError, match="3 times before the first token"):
            await ends(front)
        assert len(handle.tries) == 3

    run(test)


def test_a_full_fleet_is_well_and_tells_its_state_without_a_call() -> None:
    async def test(front: AsyncLLM, handle: Handle) -> None:
        handle.is_full = True
        params = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
        streams = [front.start(await front.check(f"{n}", params)) for n in range(6)]
        await streams[0].next()
        # Its calls are not answered, and its streams say how it is: four run, and two wait.
        await front.check_health(2)
        began = time.monotonic()
        for _ in range(3):
            await front.refresh()
        assert time.monotonic() - began < 5
        assert handle.asked == ["state"], "it is not asked again while a question waits"
        state = front.engines["r1"]
        while (state.num_running, state.num_waiting) != (4, 2):
            await streams[0].next()
            state = front.engines["r1"]
        handle.is_full = False
        for stream in streams:
            front.drop(stream)
        while front.engines["r1"].num_running:
            await front.refresh()
        assert set(handle.asked) == {"state"}

    run(test)


def test_whole_answers_of_a_full_fleet_tell_its_state_while_nobody_reads_a_token() -> None:
    async def test(front: AsyncLLM, handle: Handle) -> None:
        handle.is_full = True
        kind = RequestOutputKind.FINAL_ONLY
        params = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True, output_kind=kind)
        streams = [front.start(await front.check(f"{n}", params)) for n in range(5)]
        while "r1" not in front.engines or front.engines["r1"].num_waiting != 1:
            await asyncio.sleep(0.05)
        await front.check_health(2)
        assert handle.asked == []
        # A part without news is no beginning: the request may still go elsewhere.
        handle.die = lambda sent, is_end: died() if len(handle.tries) == 5 else None
        while len(handle.tries) == 5:
            await asyncio.sleep(0.05)
        for stream in streams:
            front.drop(stream)

    run(test)


def test_a_fleet_of_which_nothing_is_heard_is_not_well() -> None:
    async def test(front: AsyncLLM, handle: Handle) -> None:
        await front.check_health(10)
        assert handle.asked == ["describe"]
        handle.is_full = True
        with pytest.raises(EngineEndedError, match="not answered"):
            await front.check_health(0.2)

    run(test)


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        (None, {}, "bundled"),
        (f"{BUNDLED_MODEL_PATH}/", {}, BUNDLED_MODEL_PATH.name),
        (str(BUNDLED_MODEL_PATH), {"served_model_name": "fox"}, "fox"),
    ],
)
def test_the_front_serves_the_model_under_the_name_that_it_was_given(
    model: str | None, options: dict[str, Any], name: str
) -> None:
    async def test(_: AsyncLLM, handle: Handle) -> None:
        from minivllm.serving.replicas.front import Front

        front = object.__new__(Front)
        # Ray awaits it as well.
        await front.__init__(handle, model, options, 2)  # type: ignore[misc,arg-type]
        try:
            assert front.state.model_name == name
        finally:
            await front.llm.close()

    run(test)


def test_a_start_of_ray_that_fails_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from minivllm.serving.replicas import local

    parts: list[subprocess.Popen[bytes]] = []

    def init(**_: Any) -> None:
        parts.append(subprocess.Popen(["sleep", "600"]))
        raise Exception("The current node timed out during startup.")

    with subprocess.Popen(["sleep", "600"]) as other:
        monkeypatch.setattr(local.ray, "init", init)
        try:
            with (
                pytest.raises(EngineEndedError, match="timed out during startup"),
                local.ray_here("127.0.0.1", 1),
            ):
                pass
            assert len(parts) == local.RAY_TRIES
            assert all(part.poll() is not None for part in parts)
            assert other.poll() is None, "it was there before"
        finally:
            for process in (other, *parts):
                process.kill()
