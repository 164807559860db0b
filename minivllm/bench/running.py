"""Requests that are all decoding, and how long their steps take, for `latency` and `breakdown`."""

from __future__ import annotations

import random
import time

from minivllm.engine.llm_engine import LLMEngine
from minivllm.sampling_params import RequestOutputKind, SamplingParams

#: Steps after the last prompt that are not timed.
WARM_UP_STEPS = 8


def start_decoding(
    engine: LLMEngine,
    num_requests: int,
    prompt_tokens: int,
    num_steps: int,
    temperature: float = 0.6,
    output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
) -> None:
    """Give the engine requests of random tokens and step until all are decoding, with num_steps
    steps to come.

    ValueError when the KV cache or the slots cannot hold all of them until then: they would be
    preempted.
    """
    config = engine.config
    prompt_steps = -(
        -num_requests * prompt_tokens // max(1, config.max_num_batched_tokens - num_requests)
    )
    max_tokens = num_steps + WARM_UP_STEPS + prompt_steps + 8
    blocks = num_requests * -(-(prompt_tokens + max_tokens) // config.block_size)
    if num_requests > config.max_num_seqs or blocks > config.num_kv_blocks:
        raise ValueError(
            f"{num_requests} requests of {prompt_tokens + max_tokens} tokens need {blocks} blocks"
            f" and as many slots as requests; the engine has {config.num_kv_blocks} and"
            f" {config.max_num_seqs}"
        )
    engine.reset_prefix_cache()
    rng = random.Random(num_requests * 1_000_003 + prompt_tokens)
    top = min(engine.model_config.vocab_size - 1, 10_000)
    params = SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        ignore_eos=True,
        output_kind=output_kind,
    )
    for i in range(num_requests):
        engine.add_request([rng.randint(0, top) for _ in range(prompt_tokens)], params, _name(i))
    while not _all_decoding(engine):
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()


def _all_decoding(engine: LLMEngine) -> bool:
    scheduler = engine.scheduler
    running = scheduler.running
    return not scheduler.waiting and all(
        seq.num_computed_tokens >= seq.num_prompt_tokens for seq in running
    )


def timed_steps(engine: LLMEngine, num_steps: int) -> list[float]:
    """Seconds of each step.

    With overlap a step returns when the results of the step before it have been read. The time
    between two returns is still that of one step.
    """
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times


def drain(engine: LLMEngine) -> None:
    """End the requests of `start_decoding`, and bring in the steps in flight."""
    engine.abort_request([_name(i) for i in range(engine.config.max_num_seqs)])
    while engine.has_unfinished_requests():
        engine.step()


def _name(index: int) -> str:
    return f"bench {index}"
