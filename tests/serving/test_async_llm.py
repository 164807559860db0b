"""AsyncLLM: the same texts as LLM, whoever else asks, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from minivllm import LLM, SamplingParams
from minivllm.errors import (
    ConfigError,
    EmptyPromptError,
    EngineEndedError,
    PromptTooLongError,
    RequestError,
)
from minivllm.sampling_params import RequestOutputKind
from minivllm.serving.async_llm import AsyncLLM

OPTIONS = {"device": "cpu", "num_kv_blocks": 200}
PROMPTS = [f"Tell me a story about fox number {n}." for n in range(8)]


def params(n: int, kind: str = "DELTA", **more: Any) -> SamplingParams:
    options = {"temperature": 0.8, "seed": n, "max_tokens": 24, "ignore_eos": True, **more}
    return SamplingParams(output_kind=RequestOutputKind[kind], **options)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with LLM(**OPTIONS) as llm:
        own = [params(n, "FINAL_ONLY") for n in range(len(PROMPTS))]
        return [o.outputs[0].text for o in llm.generate(PROMPTS, own, use_tqdm=False)]


def run(test: Callable[[AsyncLLM], Awaitable[None]], core: str = "thread", **options: Any) -> None:
    async def main() -> None:
        async with await AsyncLLM.create(core=core, **{**OPTIONS, **options}) as llm:
            await asyncio.wait_for(test(llm), 100)

    asyncio.run(main())


async def blocks_are_back(llm: AsyncLLM) -> bool:
    """Whether the engine soon has all its blocks, and no request."""
    for _ in range(200):
        await llm.check_health()
        if not llm.num_unfinished and await llm.reset_prefix_cache():
            return True
        await asyncio.sleep(0.02)
    return False


@pytest.mark.parametrize("core", ["thread", "process"])
def test_a_request_arrives_when_it_is_checked(core: str) -> None:
    """A server's queue comes between the check and the start; its time counts, in any process."""

    async def test(llm: AsyncLLM) -> None:
        before = time.perf_counter()
        checked = await llm.check(PROMPTS[0], params(0, "FINAL_ONLY"))
        after = time.perf_counter()
        await asyncio.sleep(0.3)
        stream = llm.start(checked)
        times = (await stream.next()).metrics
        llm.drop(stream)
        assert before <= times.arrival_time <= after
        assert times.time_to_first_token > 0.3

    run(test, core)


@pytest.mark.parametrize("core", ["thread", "process"])
@pytest.mark.parametrize("kind", ["DELTA", "CUMULATIVE", "FINAL_ONLY"])
def test_the_texts_are_those_of_generate(core: str, kind: str, texts: list[str]) -> None:
    async def one(llm: AsyncLLM, n: int) -> str:
        parts = [o.outputs[0] async for o in llm.generate(PROMPTS[n], params(n, kind))]
        assert parts[-1].finish_reason == "length"
        if kind == "DELTA":
            assert sum(len(part.token_ids) for part in parts) == 24
            return "".join(part.text for part in parts)
        if kind == "FINAL_ONLY":
            assert len(parts) == 1
        assert len(parts[-1].token_ids) == 24
        return parts[-1].text

    async def test(llm: AsyncLLM) -> None:
        assert await asyncio.gather(*(one(llm, n) for n in range(len(PROMPTS)))) == texts
        assert await blocks_are_back(llm)

    run(test, core)


@pytest.mark.slow
@pytest.mark.parametrize("core", ["thread", "process"])
def test_tensor_parallelism(core: str, texts: list[str]) -> None:
    async def one(llm: AsyncLLM, n: int) -> str:
        outputs = [o.outputs[0].text async for o in llm.generate(PROMPTS[n], params(n))]
        return "".join(outputs)

    async def test(llm: AsyncLLM) -> None:
        found = await asyncio.gather(*(one(llm, n) for n in range(len(PROMPTS))))
        assert found == texts
        assert await blocks_are_back(llm)

    run(test, core, tensor_parallel_size=2, dtype="float32")


def test_a_slow_reader_gets_everything_in_one_output(texts: list[str]) -> None:
    async def test(llm: AsyncLLM) -> None:
        outputs: AsyncIterator[Any] = llm.generate(PROMPTS[0], params(0))
        first = await anext(outputs)
        while llm.stats.counters.num_generated_tokens < 24:
            await asyncio.sleep(0.01)
        rest = [output async for output in outputs]
        assert len(rest) == 1
        assert first.outputs[0].text + rest[0].outputs[0].text == texts[0]

    run(test)


def test_who_goes_away_leaves_nothing() -> None:
    async def test(llm: AsyncLLM) -> None:
        async def long() -> None:
            async for _ in llm.generate(PROMPTS[0], params(0, max_tokens=1000)):
                pass

        tasks = [asyncio.create_task(long()) for _ in range(5)]
        while llm.stats.num_running < 5:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert llm.num_unfinished == 0
        assert await blocks_are_back(llm)
        assert llm.metrics().num_generated_tokens < 5 * 1000

    run(test)


def test_abort_ends_with_what_there_is() -> None:
    async def test(llm: AsyncLLM) -> None:
        outputs = llm.generate(PROMPTS[0], params(0, max_tokens=1000), "mine")
        await anext(outputs)
        await llm.abort(["mine", "unknown"])
        last = [output async for output in outputs][-1]
        assert last.finished
        assert last.outputs[0].finish_reason == "abort"

    run(test)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("", EmptyPromptError), ("a " * 9000, PromptTooLongError), (b"bytes", RequestError)],
)
def test_a_bad_request_harms_nobody(prompt: Any, error: type, texts: list[str]) -> None:
    async def test(llm: AsyncLLM) -> None:
        outputs = llm.generate(PROMPTS[1], params(1))
        parts = [(await anext(outputs)).outputs[0].text]
        with pytest.raises(error):
            await anext(llm.generate(prompt, params(2)))
        with pytest.raises(RequestError, match="in use"):
            llm.start(await llm.check("a"), next(iter(llm._streams)))
        parts += [output.outputs[0].text async for output in outputs]
        assert "".join(parts) == texts[1]

    run(test)


def test_several_completions_and_logprobs_of_the_prompt() -> None:
    async def test(llm: AsyncLLM) -> None:
        own = params(3, logprobs=2, prompt_logprobs=1, max_tokens=6).clone(n=3)
        seen: dict[int, list[Any]] = {0: [], 1: [], 2: []}
        first = None
        async for output in llm.generate(PROMPTS[3], own):
            first = first or output
            for completion in output.outputs:
                seen[completion.index] += completion.logprobs
        assert [len(entries) for entries in seen.values()] == [6, 6, 6]
        assert first.prompt_logprobs[0] is None
        assert len(first.prompt_logprobs) == len(first.prompt_token_ids)

    run(test)


@pytest.mark.parametrize("core", ["thread", "process"])
def test_a_closed_engine_says_so(core: str) -> None:
    async def main() -> None:
        llm = await AsyncLLM.create(core=core, **OPTIONS)
        outputs = llm.generate(PROMPTS[0], params(0, max_tokens=1000))
        await anext(outputs)
        await llm.close()
        with pytest.raises(EngineEndedError, match="closed"):
            async for _ in outputs:
                pass
        with pytest.raises(EngineEndedError, match="closed"):
            await anext(llm.generate("a"))

    asyncio.run(main())


def test_a_core_that_dies_tells_everyone() -> None:
    async def test(llm: AsyncLLM) -> None:
        told: list[Any] = []
        llm.on_death = told.append
        outputs = llm.generate(PROMPTS[0], params(0, max_tokens=1000))
        await anext(outputs)
        os.kill(llm._core.pid, signal.SIGKILL)

        async def rest() -> None:
            async for _ in outputs:
                pass

        with pytest.raises(EngineEndedError, match="died"):
            await asyncio.wait_for(rest(), 1)
        assert llm.errored
        assert len(told) == 1
        with pytest.raises(EngineEndedError, match="died"):
            await llm.check_health()

    run(test, "process")


@pytest.mark.parametrize("core", ["thread", "process"])
def test_what_cannot_start_says_why(core: str) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        AsyncLLM(core=core, device="cpu", block_size=-3)
    with pytest.raises(ConfigError, match="No model directory"):
        AsyncLLM("/no/such/model", core=core)
    with pytest.raises(ConfigError, match="thread"):
        AsyncLLM(core="planet")


def test_steps_come_only_while_somebody_watches() -> None:
    async def test(llm: AsyncLLM) -> None:
        steps: list[Any] = []

        async def ask(n: int) -> str:
            outputs = [o async for o in llm.generate(PROMPTS[n], params(n))]
            await llm.check_health()
            return "".join(o.outputs[0].text for o in outputs)

        await ask(0)
        llm.watch(steps.append, with_text=True)
        text = await ask(1)
        seen = len(steps)
        assert 2 <= seen <= 30
        (name,) = steps[0].running
        assert steps[0].prompts[name].endswith(PROMPTS[1])
        # Steps are left out where they come fast; their texts are not.
        assert "".join(step.texts.get(name, "") for step in steps) == text
        assert steps[-1].finished == [name]
        llm.watch(None)
        await ask(2)
        assert len(steps) == seen
        llm.watch(steps.append)
        await ask(3)
        assert len(steps) > seen
        assert not any(step.texts or any(step.prompts.values()) for step in steps[seen:])

    run(test)
