"""What the exercises of chapter 05 share."""

from __future__ import annotations

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
        "computed-twice",
        "Call `compute` once for a sequence, and begin each step with a new `ScheduledBatch()`.",
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
        "A step computes 1 to `num_uncomputed_tokens` tokens of a sequence, and its budget"
        " shrinks by just as many.",
    ),
}


def misuse(what: str) -> tuple[str, str]:
    """(name of the mistake, hint) for a refusal of SchedulerBase."""
    pairs = (pair for part, pair in MISUSES.items() if part in what)
    return next(pairs, ("misused", "That cannot be."))


def the_count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
