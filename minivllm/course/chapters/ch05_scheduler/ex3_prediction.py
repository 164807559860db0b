"""05.3: predict: who has to go."""

from __future__ import annotations

from typing import Any

from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.course.sim.simulator import STEPS, Arrival, simulate

#: The situation of the prediction: three requests, and a cache of 24 tokens.
CROWDED = [Arrival(0, 6, 6)] * 3


CROWDED_LIMITS = {"max_num_batched_tokens": 32, "max_num_seqs": 3, "num_blocks": 6, "block_size": 4}


def check_prediction(victim: Any, num_steps: Any, first_step_back: Any, computed_again: Any) -> str:
    run = simulate(CROWDED, cost=STEPS, **CROWDED_LIMITS)
    preempted = [name for step in run.trace.steps for name in step.preempted]
    right = "ABC"[int(preempted[0].partition("/")[0])]
    steps = run.trace.steps
    back = next(
        item.num_new_tokens
        for step in steps[1:]
        for item in step.scheduled
        if f"{item.request_id}/{item.index}" == preempted[0] and item.start == 0
    )
    expect(
        isinstance(victim, str) and len(victim.strip()) == 1,
        "wrong-type",
        f'victim is the letter of a request, "A", "B" or "C".\nYou have {victim!r}.',
    )
    letter = victim.strip().upper()
    expect(
        letter != "A",
        "preempts-the-oldest",
        "A is the oldest. It is A that needs a block first; the scheduler makes room *for* it.\n"
        "If the oldest had to go, nobody would be sure ever to finish.",
    )
    expect(
        letter == right,
        "wrong-victim",
        f"{letter} is not the one to go: the newest is, for it has the least to lose.\n"
        "Once it has gone, its two blocks are enough for the two others.",
    )
    expect(
        num_steps != 6,
        "nobody-waits",
        "6 steps would be enough if the cache had room for all three to the end.\nThe one that is"
        " preempted waits until somebody has finished; count what it does after that.",
    )
    expect(
        num_steps != 12,
        "forgets-its-answer",
        "12 steps: you let the one that comes back write its answer from the beginning.\n"
        "Preemption takes its blocks, not its tokens. What it had written it keeps.",
    )
    expect(
        num_steps == len(steps),
        "wrong-steps",
        f"The simulator counts {len(steps)} steps, not {num_steps!r}.\nA step in which a prompt is"
        " computed brings the first token, too. So A and B finish in the sixth step, and the third"
        f" request comes back in the one after that, with {back - 6} tokens of its answer written.",
    )
    expect(
        first_step_back != 6 and computed_again != 6,
        "only-the-prompt",
        "6 is its prompt alone. Its blocks are gone, and with them K and V of what it had"
        " written.\nAll of its tokens have to be computed again before it can go on.",
    )
    expect(
        first_step_back == back,
        "wrong-first-step",
        f"In its first step back it computes {back} tokens, not {first_step_back!r}: all that it"
        f" has.\nThat is its prompt of 6 and the {back - 6} tokens that it had written before it"
        " went.",
    )
    expect(
        computed_again != back,
        "counts-the-new-one",
        f"{back} tokens are computed in that step, but the last of them for the first time: it had"
        " been sampled, and was about to be computed when its request had to go.\nCounted twice"
        f" are {run.num_wasted_tokens}.",
    )
    expect(
        computed_again == run.num_wasted_tokens,
        "wrong-recomputed",
        f"{run.num_wasted_tokens} tokens are computed a second time, not {computed_again!r}.\n"
        "Those are the tokens whose K and V lay in the blocks that were taken away.",
    )
    return (
        f"{right} goes, {len(steps)} steps, {back} tokens in its first step back,"
        f" {run.num_wasted_tokens} of them again"
    )


EXERCISE = Exercise(
    id="05.3",
    title="Predict: who has to go",
    check=check_prediction,
    mistakes=(
        Known(
            "preempts-the-oldest",
            answers=r"""
# %% whoever needs the block goes
victim = "A"
num_steps = 9
first_step_back = 9
computed_again = 8
""",
        ),
        Known(
            "wrong-victim",
            answers=r"""
# %% the one in the middle, for A needs one block and B the next
victim = "B"
num_steps = 9
first_step_back = 9
computed_again = 8
""",
        ),
        Known(
            "nobody-waits",
            hint=2,
            answers=r"""
# %% as if there were room
victim = "C"
num_steps = 6
first_step_back = 9
computed_again = 8
""",
        ),
        Known(
            "forgets-its-answer",
            hint=3,
            answers=r"""
# %% six tokens from the beginning
victim = "C"
num_steps = 12
first_step_back = 9
computed_again = 8
""",
        ),
        Known(
            "wrong-steps",
            answers=r"""
# %% forgets that the step back brings a token
victim = "C"
num_steps = 10
first_step_back = 9
computed_again = 8
""",
        ),
        Known(
            "only-the-prompt",
            hint=3,
            answers=r"""
# %% as a new request
victim = "C"
num_steps = 9
first_step_back = 6
computed_again = 6
""",
        ),
        Known(
            "wrong-first-step",
            hint=3,
            answers=r"""
# %% the token that was sampled last is forgotten
victim = "C"
num_steps = 9
first_step_back = 8
computed_again = 8
""",
        ),
        Known(
            "counts-the-new-one",
            answers=r"""
# %% all of its tokens are counted as done twice
victim = "C"
num_steps = 9
first_step_back = 9
computed_again = 9
""",
        ),
    ),
    right=r"""
# %% a small letter
victim = "c"
num_steps = 9
first_step_back = 6 + 3
computed_again = 6 + 2
""",
)
