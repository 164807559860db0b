"""07.1: predict: one step, seven numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake

if TYPE_CHECKING:
    pass
from minivllm.course.grading.exercise import Exercise, Known

#: Names of wrong numbers -> (the number, what it means).
KnownNumbers = dict[str, tuple[Any, str]]


def check_predictions(
    query_start_loc: list[int],
    slot: int,
    num_sampled: int,
    token: int,
    kept: int,
    kept_cold: int,
    tpot: float,
) -> str:
    import numpy as np
    import torch

    from minivllm.engine.batch import BatchRow, build_batch
    from minivllm.kernels.sampling import filter_logits
    from minivllm.outputs import RequestMetrics

    rows = [
        BatchRow([1], 9, True),
        BatchRow([1], 4, True),
        BatchRow([1] * 6, 8, False),
        BatchRow([1] * 3, 0, True),
    ]
    table = np.array([[1, 3, 4, 0], [6, 8, 0, 0], [7, 2, 5, 9], [10, 0, 0, 0]], np.int32)
    step = build_batch(rows, table, block_size=4)

    right = step.attention.query_start_loc.tolist()
    got = query_start_loc.tolist() if hasattr(query_start_loc, "tolist") else list(query_start_loc)
    _expect_number(
        "query_start_loc",
        got,
        right,
        {
            "no-zero": (
                [1, 2, 8, 11],
                "These are the ends. The first request has a beginning, too: 0 comes first.",
            ),
            "no-end": (
                [0, 1, 2, 8],
                (
                    "These are the beginnings. The last request has an end, too: so many tokens in"
                    " all."
                ),
            ),
            "lengths-not-sums": (
                [1, 1, 6, 3],
                (
                    "These are how many tokens each request has. Asked for is where each "
                    "begins: add them up."
                ),
            ),
            "counts-requests": (
                [0, 1, 2, 3, 4],
                "That is a token for each request. C has six in this step, and D three.",
            ),
            "whole-contexts": (
                [0, 10, 15, 29, 32],
                "You count what is in the cache, too. A step computes only the new tokens.",
            ),
        },
    )

    _expect_number(
        "slot",
        slot,
        step.attention.slot_mapping[7].item(),
        {
            "restarted": (
                2 * 4 + 1,
                (
                    "You count C's positions from 0 within this step. Eight tokens came before: its"
                    " sixth new token has position 13."
                ),
            ),
            "position": (
                13,
                (
                    "That is its position. Where it is *stored* says the block table: position 13"
                    " is in the fourth block that C has, which is block 9 of the cache."
                ),
            ),
            "one-too-far": (
                9 * 4 + 2,
                (
                    "That is the slot of position 14. The first of C's six tokens has position 8,"
                    " so the last has 13."
                ),
            ),
            "block": (9, "That is the block. A slot says where in the cache: block · 4 + offset."),
            "wrong-entry": (
                5 * 4 + 1,
                "Block 5 is the third of C's blocks and holds positions 8 to 11.",
            ),
        },
    )

    _expect_number(
        "num_sampled",
        num_sampled,
        len(step.logits_indices),
        {
            "half-a-prompt": (
                4,
                (
                    "C's prompt is not whole yet: what follows its token 13 is known, it is token"
                    " 14. Nothing is to be sampled."
                ),
            ),
            "decodes-only": (
                2,
                (
                    "D's prompt is whole after this step. Its last token says what comes next: that"
                    " is the first token of the answer."
                ),
            ),
            "every-token": (
                11,
                (
                    "The model gives a hidden state for each of the 11 tokens, and most are never"
                    " asked what comes next: in a prompt that is known."
                ),
            ),
        },
    )

    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1])
    right_token = int((probabilities.cumsum(0) <= 0.75).sum())
    _expect_number(
        "token",
        token,
        right_token,
        {
            "greedy": (
                0,
                (
                    "That is the likeliest token. u = 0.75 lies beyond the first half of the ruler,"
                    " which is its part."
                ),
            ),
            "one-too-low": (
                1,
                "Tokens 0 and 1 together take the ruler from 0 to 0.7, and 0.75 lies beyond.",
            ),
            "one-too-high": (
                3,
                (
                    "Tokens 0, 1 and 2 together reach 0.9, and 0.75 lies below: it is in the part"
                    " of token 2."
                ),
            ),
        },
    )

    def kept_at(temperature: float) -> int:
        only_p = (torch.tensor([temperature]), None, torch.tensor([0.6]), None)
        return int(filter_logits(probabilities.log()[None], *only_p).isfinite().sum())

    _expect_number(
        "kept",
        kept,
        kept_at(1.0),
        {
            "stops-short": (
                1,
                (
                    "One token has 0.5, which does not *reach* 0.6. Top-p keeps the fewest that do,"
                    " so it takes the next one as well."
                ),
            ),
            "one-too-many": (3, "Two tokens have 0.5 + 0.2 = 0.7, and that reaches 0.6 already."),
        },
    )
    _expect_number(
        "kept_cold",
        kept_cold,
        kept_at(0.5),
        {
            "top-p-first": (
                2,
                (
                    "At temperature 0.5 the probabilities are squared and made to add up to 1"
                    " again: 0.25, 0.04, 0.04, 0.01 become 0.74, 0.12, 0.12, 0.03. The temperature"
                    " comes first, so top-p sees *these*."
                ),
            ),
            "one-too-many": (
                3,
                (
                    "At temperature 0.5 the distribution is sharper, so fewer tokens reach 0.6, not"
                    " more."
                ),
            ),
        },
    )

    metrics = RequestMetrics(
        0.0, first_token_time=50.0, finished_time=100.0, num_generation_tokens=4
    )
    _expect_number(
        "tpot",
        tpot,
        metrics.time_per_output_token,
        {
            "counts-the-first-wait": (
                25.0,
                (
                    "That is 100 ms / 4 tokens: the wait for the first token is in it. That wait "
                    "is the TTFT, and has a number of its own."
                ),
            ),
            "divides-by-tokens": (
                12.5,
                "50 ms is right, but between four tokens there are three gaps.",
            ),
            "median": (
                10.0,
                "That is the gap in the middle. TPOT is their mean, and the last gap was long.",
            ),
            "in-seconds": (metrics.time_per_output_token / 1000, "Asked for are milliseconds."),
            "ttft": (
                50.0,
                "That is the time to the first token, TTFT. TPOT is about the tokens after it.",
            ),
        },
        "The mean of the gaps between tokens, in milliseconds: from the first token to the last, by"
        " their number.",
    )
    return "seven predictions; the package's own functions say the same"


def _expect_number(
    name: str,
    value: Any,
    right: Any,
    known: KnownNumbers,
    advice: str = "Go through the step token by token.",
) -> None:
    """Raise a Mistake unless value is right; one of the known wrong ones gives it its name, for
    others there is advice.
    """
    near = (
        isinstance(right, float)
        and isinstance(value, int | float)
        and abs(value - right) <= 0.01 * right
    )
    if value == right or near:
        return
    shown = f"{name} = {show(value)}: "
    for mistake, (wrong, why) in known.items():
        same = (
            abs(value - wrong) <= 0.01 * wrong
            if isinstance(right, float) and isinstance(value, int | float)
            else False
        )
        if value == wrong or same:
            raise Mistake(mistake, f"{shown}not what the package counts.\n{why}")
    raise Mistake("wrong-values", f"{shown}the package counts {show(right)}.\n{advice}")


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
            "restarted",
            answers=r"""
# %% C's tokens counted from 0
@@
-slot = 9 * 4 + 13 % 4
+slot = 2 * 4 + 5 % 4
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
