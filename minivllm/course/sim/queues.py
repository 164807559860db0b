"""Traffic to compare queue orders on, and a scoreboard. For exercise 05.6.

A policy is a subclass of `Scheduler`. All runs are those of `simulate`: the real scheduler and
block manager, and a calculated clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Crowd:
    """Requests that keep coming, and the engine that they come to.

    what: in words, after "Requests keep coming". gap: seconds from one to the next. at_once: so
    many come at the beginning.
    """

    what: str
    gap: float
    at_once: int
    limits: Mapping[str, int]

    def arrivals(self, num_requests: int) -> list[Arrival]:
        """So many requests with prompts of 200 to 600 tokens, and four more among the early ones.

        The four have prompts of 3,000, 1,500, 600 and 3,000 tokens. All answers have 60.
        """
        many = [
            Arrival(max(0.0, self.gap * (i - self.at_once)), 200 + 37 * i % 401, 60)
            for i in range(num_requests)
        ]
        long = [Arrival(0.05, 3000, 60), Arrival(0.3, 1500, 60), Arrival(0.6, 600, 60)]
        return [*many, *long, Arrival(0.9, 3000, 60)]


#: In the second one the queue stays short, and never becomes empty.
CROWDS = (
    Crowd("faster than the GPU can take them", 0.007, 0, ROOMY),
    Crowd("about as fast as the GPU can take them, after 25 at once", 0.0105, 25, ROOMY),
    Crowd("faster than a GPU with few blocks (250 of 16 tokens) can take them", 0.007, 0, CRAMPED),
)


def busy_day(policy: Callable[..., Any]) -> Simulation:
    """The chapter's traffic, eight times as fast as it came, with a budget of 1,024 tokens."""
    return simulate(
        azure_chat(faster=8), scheduler_cls=policy, max_num_batched_tokens=1024, trace=False
    )


def longest_early_wait(
    policy: Callable[..., Any], crowd: Crowd, num_requests: int
) -> SimulatedRequest:
    """Of the early requests in a crowd, the one that waits for the most steps (`steps_waited`)."""
    arrivals = crowd.arrivals(num_requests)
    run = simulate(arrivals, scheduler_cls=policy, trace=False, **crowd.limits)
    early = [request for request in run.requests if request.arrival.time < EARLY]
    return max(early, key=lambda request: request.steps_waited)


def scoreboard(**policies: type) -> None:
    """Print for each policy the busy day's numbers, and the longest early wait in three crowds.

    Each wait is for 150 requests and for 600.
    """
    print(
        f"{'':16}    busy day, TTFT   output   longest early wait, in steps, of 150 / 600 requests"
    )
    print(f"{'':16} median  worst ms    per s         rush       steady    few blocks")
    for name, policy in policies.items():
        numbers = busy_day(policy).summary()
        print(
            f"{name:16} {numbers['TTFT median']:6,} {numbers['TTFT worst']:6,}"
            f" {numbers['output tokens/s']:11,}",
            *(f"{_waits(policy, crowd):>13}" for crowd in CROWDS),
        )


def _waits(policy: type, crowd: Crowd) -> str:
    waits = (longest_early_wait(policy, crowd, count).steps_waited for count in (150, 600))
    return " / ".join(f"{wait:,}" for wait in waits)
