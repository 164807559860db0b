"""07.1: predict: one step, seven numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import Prediction, expect_all


def check_predictions(
    query_start_loc: list[int],
    slot: int,
    num_sampled: int,
    token: int,
    kept: int,
    kept_cold: int,
    tpot: float,
) -> str:
    step, choice = _step_predictions(), _choice_predictions()
    said = (slot, num_sampled, token, kept, kept_cold, tpot)
    expect_all(
        partial(_expect_starts, query_start_loc),
        *(
            partial(prediction.judge, _plain(value))
            for prediction, value in zip((*step, *choice), said, strict=True)
        ),
    )
    return "seven predictions; the package's own functions say the same"


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own; everything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value


def _step() -> Any:
    """The step of the statement, as the package lays it out."""
    import numpy as np

    from minivllm.engine.batch import BatchRow, build_batch

    rows = [
        BatchRow([1], 9, True),
        BatchRow([1], 4, True),
        BatchRow([1] * 6, 8, False),
        BatchRow([1] * 3, 0, True),
    ]
    table = np.array([[1, 3, 4, 0], [6, 8, 0, 0], [7, 2, 5, 9], [10, 0, 0, 0]], np.int32)
    return build_batch(rows, table, block_size=4)


#: Wrong lists for query_start_loc -> (the mistake's name, what is wrong).
_STARTS = {
    (1, 2, 8, 11): (
        "no-zero",
        "These are the ends. The first request has a beginning, too, and it comes first.",
    ),
    (0, 1, 2, 8): (
        "no-end",
        "These are the beginnings. The last request has an end, too: so many tokens in all.",
    ),
    (1, 1, 6, 3): (
        "lengths-not-sums",
        "These are how many tokens each request has. Asked for is where each begins: add them up.",
    ),
    (0, 1, 1, 6, 3): (
        "lengths-not-sums",
        "These are how many tokens each request has. Asked for is where each begins: add them up.",
    ),
    (0, 1, 2, 3, 4): (
        "counts-requests",
        "That is a token for each request. C has six in this step, and D three.",
    ),
    (0, 10, 15, 29, 32): (
        "whole-contexts",
        "You count what is in the cache, too. A step computes only the new tokens.",
    ),
    (9, 4, 8, 0): (
        "positions-not-places",
        "These are positions in the requests. Asked for are places in the step, where all tokens"
        " lie end to end.",
    ),
}


def _expect_starts(said: Any) -> None:
    """Raise Mistake where query_start_loc is wrong. The message does not tell the right one."""
    right = _step().attention.query_start_loc.tolist()
    values = said.tolist() if hasattr(said, "tolist") else said
    if not isinstance(values, list | tuple) or not all(
        isinstance(value, int) and not isinstance(value, bool) for value in values
    ):
        raise Mistake(
            "wrong-type", f"query_start_loc should be a list of whole numbers.\nIt is {show(said)}."
        )
    if list(values) == right:
        return
    seen = f"query_start_loc = {list(values)} is not what the package has."
    if tuple(values) in _STARTS:
        name, why = _STARTS[tuple(values)]
        raise Mistake(name, f"{seen}\n{why}")
    if len(values) != len(right):
        why = (
            f"It has {len(values)} numbers. Four requests have a beginning each, and the last one"
            " has an end."
        )
    else:
        place = next(i for i, (a, b) in enumerate(zip(values, right, strict=True)) if a != b)
        why = f"The first wrong number is the one at index {place}: count the tokens before it."
    raise Mistake("wrong-query-start-loc", f"{seen}\n{why}")


#: name of a mistake -> (the number that it leads to, what is wrong).
_Usual = Mapping[str, tuple[float, str]]

_SLOTS: _Usual = {
    # Two ways lead to 9.
    "block-or-restarted": (
        9,
        "9 is the number of C's last block, and a slot says where in the cache: block · 4 + offset."
        " Or did you count C's positions from 0 within this step (2 · 4 + 1 is 9, too)? Eight"
        " tokens came before, so its sixth new token has not position 5.",
    ),
    "position": (
        13,
        "That is its position. Where it is *stored*, the block table says: which of C's blocks"
        " holds this position, and what is that block's number in the cache?",
    ),
    "one-too-far": (
        9 * 4 + 2,
        "That is the slot of the position behind it. The first of C's six tokens has position 8:"
        " which one has the sixth?",
    ),
    "offset-forgotten": (36, "That is the first slot of the block. Add the offset in it."),
    "wrong-entry": (
        5 * 4 + 1,
        "That block is the third of C's and holds positions 8 to 11.",
    ),
    "first-token": (
        5 * 4,
        "That is the slot of C's *first* token in this step. Asked for is the last.",
    ),
    "end-of-the-prompt": (
        9 * 4 + 3,
        "That is the last slot of C's table. This step does not fill it.",
    ),
}

_SAMPLED: _Usual = {
    "half-a-prompt": (
        4,
        "C's prompt is not whole yet: what follows its last token here is known, it is the next"
        " one of the prompt. Nothing is to be sampled.",
    ),
    "decodes-only": (
        2,
        "D's prompt is whole after this step. Its last token says what comes next: that is the"
        " first token of the answer.",
    ),
    "every-token": (
        11,
        "The model gives a hidden state for each of the 11 tokens, and most are never asked what"
        " comes next: in a prompt that is known.",
    ),
}


def _step_predictions() -> tuple[Prediction, ...]:
    step = _step()
    return (
        Prediction(
            "slot",
            step.attention.slot_mapping[7].item(),
            usual=_SLOTS,
            advice="Which position does the token have, which block holds it, at which offset?",
        ),
        Prediction(
            "num_sampled",
            len(step.logits_indices),
            "requests",
            usual=_SAMPLED,
            advice="Go through the four requests: is what follows its last token known already?",
        ),
    )


_TOKENS: _Usual = {
    "greedy": (
        0,
        "That is the likeliest token. u = 0.75 lies beyond the first half of the ruler, which is"
        " its part.",
    ),
    "one-too-low": (
        1,
        "Tokens 0 and 1 together take the ruler from 0 to 0.7, and 0.75 lies beyond.",
    ),
    "one-too-high": (
        3,
        "The three tokens before it reach 0.9 together, and 0.75 lies below.",
    ),
}

_KEPT: _Usual = {
    "stops-short": (
        1,
        "One token has 0.5, which does not *reach* 0.6. Top-p keeps the fewest that do, so it takes"
        " more.",
    ),
    "one-too-many": (3, "The three likeliest have 0.9. Do fewer reach 0.6 already?"),
}

_KEPT_COLD: _Usual = {
    "top-p-first": (
        2,
        "At temperature 0.5 the probabilities are squared and made to add up to 1 again. The"
        " temperature comes first, so top-p sees *these*. What is 0.25 of the sum of the squares?",
    ),
    "one-too-many": (
        3,
        "At temperature 0.5 the distribution is sharper, so fewer tokens reach 0.6, not more.",
    ),
    "nothing-kept": (0, "The likeliest token always stays."),
}


def _tpot_mistakes(right: float) -> _Usual:
    return {
        "counts-the-first-wait": (
            25.0,
            "That is 100 ms / 4 tokens: the wait for the first token is in it. That wait is the"
            " TTFT, and has a number of its own.",
        ),
        "divides-by-tokens": (
            12.5,
            "50 ms is right, but how many gaps are there between four tokens?",
        ),
        "median": (
            10.0,
            "That is the gap in the middle. TPOT is their mean, and the last gap was long.",
        ),
        "in-seconds": (right / 1000, "Asked for are milliseconds."),
        "ttft": (
            50.0,
            "That is the time to the first token, TTFT. TPOT is about the tokens after it.",
        ),
        "counts-the-first-wait-by-gaps": (
            100 / 3,
            "The wait for the first token is in it. Count from the first token on.",
        ),
    }


def _choice_predictions() -> tuple[Prediction, ...]:
    import torch

    from minivllm.kernels.sampling import filter_logits
    from minivllm.outputs import RequestMetrics

    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1])

    def kept_at(temperature: float) -> int:
        only_p = (torch.tensor([temperature]), None, torch.tensor([0.6]), None)
        return int(filter_logits(probabilities.log()[None], *only_p).isfinite().sum())

    metrics = RequestMetrics(
        0.0, first_token_time=50.0, finished_time=100.0, num_generation_tokens=4
    )
    tpot = metrics.time_per_output_token
    advice = "Draw the ruler: where does the part of each token begin and end?"
    return (
        Prediction(
            "token", int((probabilities.cumsum(0) <= 0.75).sum()), usual=_TOKENS, advice=advice
        ),
        Prediction(
            "kept",
            kept_at(1.0),
            "tokens",
            usual=_KEPT,
            advice="Add up probabilities from the largest on: when do they reach 0.6?",
        ),
        Prediction(
            "kept_cold",
            kept_at(0.5),
            "tokens",
            usual=_KEPT_COLD,
            advice="Square the probabilities, divide by their sum, and add up from the largest on.",
        ),
        Prediction(
            "tpot",
            tpot,
            "ms",
            near=0.01,
            usual=_tpot_mistakes(tpot),
            advice="The mean of the gaps between tokens: from the first token to the last, by their"
            " number.",
        ),
    )


EXERCISE = Exercise(
    id="07.1",
    title="Predict: one step, seven numbers",
    check=check_predictions,
    mistakes=(
        Known(
            "no-zero",
            answers=r"""
# %% the ends alone
@@
-query_start_loc = [0, 1, 2, 8, 11]
+query_start_loc = [1, 2, 8, 11]
""",
        ),
        Known(
            "no-end",
            answers=r"""
# %% the beginnings alone
@@
-query_start_loc = [0, 1, 2, 8, 11]
+query_start_loc = [0, 1, 2, 8]
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% a range for one number
@@
-slot = 9 * 4 + 13 % 4
+slot = (36, 39)

# %% not a number
@@
-tpot = (100 - 50) / 3
+tpot = float("nan")
""",
        ),
        Known(
            "wrong-slot",
            answers=r"""
# %% somewhere
@@
-slot = 9 * 4 + 13 % 4
+slot = float("inf")
""",
        ),
        Known(
            "lengths-not-sums",
            answers=r"""
# %% how long each row is
@@
-query_start_loc = [0, 1, 2, 8, 11]
+query_start_loc = [1, 1, 6, 3]
""",
        ),
        Known(
            "whole-contexts",
            answers=r"""
# %% counts what is in the cache, too
@@
-query_start_loc = [0, 1, 2, 8, 11]
+query_start_loc = [0, 10, 15, 29, 32]
""",
        ),
        Known(
            "block-or-restarted",
            answers=r"""
# %% C's tokens counted from 0
@@
-slot = 9 * 4 + 13 % 4
+slot = 2 * 4 + 5 % 4

# %% the number of the block
@@
-slot = 9 * 4 + 13 % 4
+slot = 9
""",
        ),
        Known(
            "position",
            answers=r"""
# %% takes the position for the slot
@@
-slot = 9 * 4 + 13 % 4
+slot = 13
""",
        ),
        Known(
            "one-too-far",
            answers=r"""
# %% the position behind the last
@@
-slot = 9 * 4 + 13 % 4
+slot = 9 * 4 + 14 % 4
""",
        ),
        Known(
            "half-a-prompt",
            answers=r"""
# %% everybody gets a token
@@
-num_sampled = 3
+num_sampled = 4
""",
        ),
        Known(
            "decodes-only",
            answers=r"""
# %% a prompt's last token says nothing
@@
-num_sampled = 3
+num_sampled = 2
""",
        ),
        Known(
            "greedy",
            answers=r"""
# %% the likeliest
@@
-token = 2
+token = 0
""",
        ),
        Known(
            "one-too-low",
            answers=r"""
# %% 0.7 is nearly 0.75
@@
-token = 2
+token = 1
""",
        ),
        Known(
            "stops-short",
            answers=r"""
# %% stays below top_p
@@
-kept = 2
+kept = 1
""",
        ),
        Known(
            "top-p-first",
            answers=r"""
# %% top-p of the probabilities as they were
@@
-kept_cold = 1
+kept_cold = 2
""",
        ),
        Known(
            "counts-the-first-wait",
            answers=r"""
# %% the whole time by all tokens
@@
-tpot = (100 - 50) / 3
+tpot = 100 / 4
""",
        ),
        Known(
            "divides-by-tokens",
            answers=r"""
# %% four tokens, so four gaps
@@
-tpot = (100 - 50) / 3
+tpot = 50 / 4
""",
        ),
    ),
    right=r"""
# %% numbers, worked out
query_start_loc = [0, 1, 2, 8, 11]
slot = 37
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = 16.67
""",
)
