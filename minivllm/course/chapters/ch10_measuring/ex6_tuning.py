"""10.6: tune an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    pass
from minivllm.course.grading.exercise import Exercise, Known

#: What has to be reached: the 99th percentile of the gaps and the worst TTFT in milliseconds, and
#: output tokens a second.
GAP, TTFT, RATE = 25.0, 3000.0, 6300.0


def evening() -> list:
    """A busy evening: the chat service's 22 seconds three times over, at eight times the pace."""
    from minivllm.course.sim.simulator import Arrival, azure_chat

    day = azure_chat(8)
    return [
        Arrival(a.time + k * 22.1 / 8, a.prompt_tokens, a.output_tokens)
        for k in range(3)
        for a in day
    ]


def check_tuning(max_num_batched_tokens: int, max_num_seqs: int) -> str:
    from minivllm.course.sim.simulator import simulate

    for name, value in (
        ("max_num_batched_tokens", max_num_batched_tokens),
        ("max_num_seqs", max_num_seqs),
    ):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        expect(
            is_count, "wrong-type", f"{name} is {show(value)}.\nIt is a whole number, at least 1."
        )
    expect(
        max_num_seqs <= max_num_batched_tokens,
        "more-seats-than-tokens",
        f"{max_num_seqs} sequences may run, and a step has {max_num_batched_tokens} tokens.\nEach"
        " running sequence needs one of them in every step.",
    )

    def serve(budget: int, seats: int) -> dict[str, float]:
        return simulate(
            evening(), trace=False, max_num_batched_tokens=budget, max_num_seqs=seats
        ).summary()

    found = serve(max_num_batched_tokens, max_num_seqs)
    gap, ttft, rate = found["gap p99"], found["TTFT worst"], found["output tokens/s"]
    got = (
        f"99 % of the gaps are at most {gap:.1f} milliseconds, the worst TTFT is {ttft:,}, and"
        f" {rate:,} tokens come "
    )
    got += "out a second."
    expect(
        gap <= GAP,
        "gaps-too-long",
        f"{got}\nThe gaps are longer than {GAP:.0f} milliseconds. Whoever waits for the next token"
        " waits for the whole step: which of the two numbers says how long a step may become?",
    )
    if ttft <= TTFT and rate >= RATE:
        return "short gaps, short waits, and hardly a token lost"
    more = serve(max_num_batched_tokens, min(4 * max_num_seqs, max_num_batched_tokens))
    # Near the limit of the gaps a larger budget does not help who has too few seats.
    enough = more["TTFT worst"] <= TTFT and more["output tokens/s"] >= RATE
    if enough or more["output tokens/s"] > 1.01 * rate:
        raise Mistake(
            "too-few-seats",
            f"{got}\nWanted: {TTFT:,.0f} and {RATE:,.0f}. With more sequences at once, each reading"
            " of the weights would serve more of them; and who has no seat waits for the first"
            " token.",
        )
    raise Mistake(
        "budget-too-small",
        f"{got}\nWanted: {TTFT:,.0f} and {RATE:,.0f}. Prompts are read in small pieces, and each"
        " piece comes with a step that reads all weights: a larger budget reads them in fewer"
        " steps.",
    )


EXERCISE = Exercise(
    id="10.6",
    title="Tune an engine",
    check=check_tuning,
    mistakes=(
        Known(
            "gaps-too-long",
            hint=1,
            answers=r"""
# %% the defaults
max_num_batched_tokens = 2048
max_num_seqs = 256

# %% a little too much
max_num_batched_tokens = 1024
max_num_seqs = 256

# %% fewer sequences do not help
max_num_batched_tokens = 1024
max_num_seqs = 96
""",
        ),
        Known(
            "budget-too-small",
            hint=2,
            answers=r"""
# %% the shortest gaps
max_num_batched_tokens = 256
max_num_seqs = 256

# %% half way
max_num_batched_tokens = 512
max_num_seqs = 256
""",
        ),
        Known(
            "too-few-seats",
            hint=3,
            answers=r"""
# %% the right budget, no room
max_num_batched_tokens = 768
max_num_seqs = 64

# %% a few too few
max_num_batched_tokens = 768
max_num_seqs = 96

# %% hardly too few
max_num_batched_tokens = 700
max_num_seqs = 160
""",
        ),
        Known(
            "more-seats-than-tokens",
            answers=r"""
# %% turned round
max_num_batched_tokens = 192
max_num_seqs = 768
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% a text
max_num_batched_tokens = "768"
max_num_seqs = 192
""",
        ),
    ),
    right=r"""
# %% another good choice
max_num_batched_tokens = 720
max_num_seqs = 256
""",
)
