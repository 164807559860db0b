"""Traffic to compare queue orders on, and a scoreboard. For exercise 05.6.

A policy is a subclass of `Scheduler`. All runs are those of `simulate`: the real scheduler and
block manager, and a calculated clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minivllm.course.sim.simulator import (
    Arrival,
    SimulatedRequest,
    Simulation,
    azure_chat,
    simulate,
)

#: Requests of a crowd that come before this time are early.
EARLY = 1.0
#: The limits of an engine that a crowd visits: with all blocks, and with 250 blocks of 16 tokens,
#: where requests have to be preempted.
ROOMY = {"max_num_batched_tokens": 256, "max_num_seqs": 32}
CRAMPED = {**ROOMY, "num_blocks": 250, "block_size": 16}


def busy_day(policy: Callable[..., Any]) -> Simulation:
    """The chapter's traffic, eight times as fast as it came, with a budget of 1,024 tokens."""
    return simulate(
        azure_chat(faster=8), scheduler_cls=policy, max_num_batched_tokens=1024, trace=False
    )


def crowd(num_requests: int) -> list[Arrival]:
    """Requests that keep coming faster than the GPU can take them: one each 7 ms.

    Their prompts have 200 to 600 tokens, their answers 60. Among the early ones are four more, with
    prompts of 3,000, 1,500, 600 and 3,000 tokens.
    """
    many = [Arrival(0.007 * i, 200 + 37 * i % 401, 60) for i in range(num_requests)]
    long = [Arrival(0.05, 3000, 60), Arrival(0.3, 1500, 60), Arrival(0.6, 600, 60)]
    return [*many, *long, Arrival(0.9, 3000, 60)]


def longest_early_wait(
    policy: Callable[..., Any], num_requests: int, limits: dict[str, int]
) -> SimulatedRequest:
    """Of the early requests in a crowd, the one that waits for the most steps (`steps_waited`)."""
    run = simulate(crowd(num_requests), scheduler_cls=policy, trace=False, **limits)
    early = [request for request in run.requests if request.arrival.time < EARLY]
    return max(early, key=lambda request: request.steps_waited)


def scoreboard(**policies: type) -> None:
    """Print for each policy the busy day's numbers, and the longest early wait in four crowds."""
    print(f"{'':16}                           output    longest early wait, in steps, where")
    print(f"{'':16} TTFT, median and worst  tokens/s    150 / 600 come  ... and blocks are few")
    for name, policy in policies.items():
        numbers = busy_day(policy).summary()
        waits = [
            " / ".join(
                f"{longest_early_wait(policy, count, limits).steps_waited:,}"
                for count in (150, 600)
            )
            for limits in (ROOMY, CRAMPED)
        ]
        print(
            f"{name:16} {numbers['TTFT median']:7,} {numbers['TTFT worst']:10,} ms"
            f" {numbers['output tokens/s']:8,}    {waits[0]:>14}  {waits[1]:>15}"
        )
