"""A gentle load of its own for a server, so that its page has something to show."""

from __future__ import annotations

import asyncio
import logging
import random

from minivllm import errors
from minivllm.sampling_params import SamplingParams
from minivllm.serving.async_llm import AsyncLLM

logger = logging.getLogger("minivllm.serving")

SYSTEM = "You are a helpful assistant who tells short stories and explains LLM inference."
HEROES = ("a fox", "an owl", "a robot named Ada", "a dragon", "a snail", "two ravens")
THINGS = ("a silver key", "a lantern", "a broken clock", "a paper boat", "an old map")
TERMS = ("the KV cache", "a block table", "preemption", "prefix caching", "chunked prefill")
#: Mean seconds between two requests: some run together, and the queue is sometimes not empty.
PAUSE = 1.5


async def keep_busy(llm: AsyncLLM, pause: float = PAUSE) -> None:
    """Ask for stories and explanations for ever, at random times (exponential, seeded)."""
    dice = random.Random(0)
    running: set[asyncio.Task[None]] = set()
    try:
        while True:
            task = asyncio.create_task(_ask(llm, _question(dice), dice.randint(60, 200)))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(dice.expovariate(1 / pause))
    finally:
        for task in running:
            task.cancel()


def _question(dice: random.Random) -> str:
    if dice.random() < 0.3:
        return f"What is {dice.choice(TERMS)}?"
    return f"Tell me a story about {dice.choice(HEROES)} and {dice.choice(THINGS)}."


async def _ask(llm: AsyncLLM, question: str, max_tokens: int) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    try:
        prompt = await asyncio.to_thread(llm.input_processor.chat_prompt, messages, {})
        async for _ in llm.generate(prompt, SamplingParams(max_tokens=max_tokens)):
            pass
    except errors.EngineEndedError:
        return
    except errors.MiniVLLMError as error:
        # A model without a chat template, or with a short context: nothing to show, no harm done.
        logger.warning("The demo's request was refused: %s", error)
