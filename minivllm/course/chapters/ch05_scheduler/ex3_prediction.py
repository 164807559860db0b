"""05.3: predict: who has to go."""

from __future__ import annotations

from functools import partial
from typing import Any

from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import Prediction, expect, expect_all
from minivllm.course.sim.simulator import STEPS, Arrival, simulate

#: The situation of the prediction: three requests, and a cache of 24 tokens.
CROWDED = [Arrival(0, 6, 6)] * 3
LIMITS = {"max_num_batched_tokens": 32, "max_num_seqs": 3, "num_blocks": 6, "block_size": 4}

#: What goes wrong where only the prompt is counted.
ONLY_THE_PROMPT = (
    "6 is its prompt alone. Its blocks are gone, and with them K and V of what it had written, too."
)


def check_prediction(victim: Any, num_steps: Any, first_step_back: Any, computed_again: Any) -> str:
    who, steps, back, again = _what_happens()
    expect_all(
        partial(_judge_victim, victim, who),
        partial(
            Prediction(
                "num_steps",
                steps,
                "steps",
                usual={
                    "nobody-waits": (
                        6,
                        "That would be enough if the cache had room for all three to the end. The"
                        " one that is preempted waits until somebody has finished; count what it"
                        " does after that.",
                    ),
                    "forgets-its-answer": (
                        12,
                        "You let the one that comes back write its answer from the beginning."
                        " Preemption takes its blocks, not its tokens: what it had written it"
                        " keeps.",
                    ),
                },
                advice="A step in which a prompt is computed brings a token, too; so does the step"
                " that computes all tokens of the victim again. In which step do the two others"
                " finish, and how many tokens has the victim still to write then?",
            ).judge,
            num_steps,
        ),
        partial(
            Prediction(
                "first_step_back",
                back,
                "tokens",
                usual={
                    "only-the-prompt": (6, ONLY_THE_PROMPT),
                    "keeps-its-blocks": (
                        1,
                        "That would be right if K and V of its tokens were still there. It has"
                        " given back its blocks: all of its tokens have to be computed again.",
                    ),
                    "only-what-was-computed": (
                        8,
                        "So many had been computed when it went. Did it have a token that had not?",
                    ),
                },
                advice="It computes all tokens that it has: its prompt, and what it had written"
                " before it went.",
            ).judge,
            first_step_back,
        ),
        partial(
            Prediction(
                "computed_again",
                again,
                "tokens",
                usual={
                    "only-the-prompt": (6, ONLY_THE_PROMPT),
                    "nothing-again": (
                        0,
                        "The victim gave back its blocks, and K and V in them are lost.",
                    ),
                    "counts-the-new-one": (
                        9,
                        "Are all tokens of its first step back computed for the second time? A"
                        " token that was sampled is computed in the step after that.",
                    ),
                },
                advice="Count the tokens whose K and V lay in the blocks that were taken away.",
            ).judge,
            computed_again,
        ),
    )
    return f"{who} goes, {steps} steps, {back} tokens in its first step back, {again} of them again"


def _what_happens() -> tuple[str, int, int, int]:
    """(who goes, steps, tokens in its first step back, tokens computed again), from a run."""
    run = simulate(CROWDED, cost=STEPS, **LIMITS)
    steps = run.trace.steps
    preempted = next(name for step in steps for name in step.preempted)
    back = next(
        item.num_new_tokens
        for step in steps[1:]
        for item in step.scheduled
        if f"{item.request_id}/{item.index}" == preempted and item.start == 0
    )
    return "ABC"[int(preempted.partition("/")[0])], len(steps), back, run.num_wasted_tokens


def _judge_victim(said: Any, right: str) -> None:
    letter = said.strip().upper() if isinstance(said, str) else ""
    expect(
        letter in ("A", "B", "C"),
        "wrong-type",
        f'victim is the letter of a request, "A", "B" or "C".\nYou have {said!r}.',
    )
    if letter == "A":
        raise Mistake(
            "preempts-the-oldest",
            "victim: A is the oldest. It is A that needs a block first, and the scheduler makes"
            " room *for* it.\nIf the oldest had to go, nobody would be sure ever to finish.",
        )
    expect(
        letter == right,
        "wrong-victim",
        f"victim: {letter} is not the one to go.\nThe blocks of one are enough for the two others."
        " Who of the three it is depends on the order of arrival.",
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
@@
-victim = "C"
+victim = "A"
""",
        ),
        Known(
            "wrong-victim",
            answers=r"""
# %% the one in the middle, for A needs one block and B the next
@@
-victim = "C"
+victim = "B"
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% a number for a letter
@@
-victim = "C"
+victim = 2
""",
        ),
        Known(
            "nobody-waits",
            hint=2,
            answers=r"""
# %% as if there were room
@@
-num_steps = 9
+num_steps = 6
""",
        ),
        Known(
            "forgets-its-answer",
            hint=3,
            answers=r"""
# %% six tokens from the beginning
@@
-num_steps = 9
+num_steps = 12
""",
        ),
        Known(
            "wrong-num-steps",
            answers=r"""
# %% forgets that the step back brings a token
@@
-num_steps = 9
+num_steps = 10

# %% a number that is equal to everything
@@
-num_steps = 9
+class Any(int):
+    def __eq__(self, other: object) -> bool:
+        return True
+
+
+num_steps = Any(1)
""",
        ),
        Known(
            "only-the-prompt",
            hint=3,
            answers=r"""
# %% as a new request
@@
-first_step_back = 9
-computed_again = 8
+first_step_back = 6
+computed_again = 6
""",
        ),
        Known(
            "keeps-its-blocks",
            hint=3,
            answers=r"""
# %% it goes on where it was
@@
-first_step_back = 9
-computed_again = 8
+first_step_back = 1
+computed_again = 0
""",
        ),
        Known(
            "only-what-was-computed",
            hint=3,
            answers=r"""
# %% the token that was sampled last is forgotten
@@
-first_step_back = 9
+first_step_back = 8
""",
        ),
        Known(
            "wrong-first-step-back",
            answers=r"""
# %% the token of that step is counted
@@
-first_step_back = 9
+first_step_back = 10
""",
        ),
        Known(
            "counts-the-new-one",
            answers=r"""
# %% all of its tokens are counted as done twice
@@
-computed_again = 8
+computed_again = 9
""",
        ),
        Known(
            "nothing-again",
            answers=r"""
# %% all is there still
@@
-computed_again = 8
+computed_again = 0
""",
        ),
        Known(
            "wrong-computed-again",
            answers=r"""
# %% its blocks are counted
@@
-computed_again = 8
+computed_again = 2
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
