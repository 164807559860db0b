"""What the exercises of chapter 05 share."""

from __future__ import annotations

from minivllm.course.sim.simulator import Arrival, Simulation, azure_chat, simulate

#: What the refusals of `SchedulerBase` say, and how to call and explain the mistake.
MISUSES = {
    "places are taken": ("too-many-places", "Admit only while fewer than `max_num_seqs` run."),
    "was not started": (
        "never-started",
        "Whoever is admitted gets a place by `start`, and only then computes.",
    ),
    "still in `": (
        "wrong-queue",
        "Move the sequence from one queue to the other first, then tell the base.",
    ),
    "in this step": (
        "planned-and-preempted",
        "Make room before you plan, and for nobody twice in a step.",
    ),
    "this step computes": (
        "planned-and-preempted",
        "Whoever is in the step already keeps its blocks: take from the end of `running`.",
    ),
    "has blocks for": (
        "computed-without-blocks",
        "`allocate` counts all of its tokens, from the first on.",
    ),
    "uncomputed": (
        "wrong-number",
        "A step computes 1 to `num_uncomputed_tokens` tokens of a sequence.",
    ),
}


def misuse(what: str) -> tuple[str, str]:
    """(name of the mistake, hint) for a refusal of SchedulerBase."""
    pairs = (pair for part, pair in MISUSES.items() if part in what)
    return next(pairs, ("misused", "That cannot be."))


def the_count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def busy_day(policy: type) -> Simulation:
    """The traffic of the chapter under a policy: eight times as fast as it came, a budget of
    1,024.
    """
    return simulate(
        azure_chat(faster=8), scheduler_cls=policy, max_num_batched_tokens=1024, trace=False
    )


def longest_early_wait(policy: type, num_short: int) -> int:
    """Steps that anybody waits who comes in the first half second, where so many come, a bit faster
    than they can go.

    They have 400 tokens each; one that comes early has 3,000.
    """
    stream = [Arrival(0.008 * i, 400, 40) for i in range(num_short)] + [Arrival(0.05, 3000, 40)]
    limits = {"max_num_batched_tokens": 256, "max_num_seqs": 32, "trace": False}
    requests = simulate(stream, scheduler_cls=policy, **limits).requests
    return max(request.steps_waited for request in requests if request.arrival.time <= 0.5)


def scoreboard(**policies: type) -> None:
    """Print how each policy does: for most, for whom it is worst, in all; and whether somebody
    starves.
    """
    print(
        f"{'':16} TTFT median  TTFT worst  tokens/second  longest early wait, of 150 / 300 requests"
    )
    for name, policy in policies.items():
        s = busy_day(policy).summary()
        waits = " / ".join(f"{longest_early_wait(policy, count)}" for count in (150, 300))
        print(
            f"{name:16} {s['TTFT median']:11,} {s['TTFT worst']:11,} {s['output tokens/s']:14,} "
            f" {waits} steps"
        )
