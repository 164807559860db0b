"""02.1: warm-up: who may look at whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose

if TYPE_CHECKING:
    import torch
from minivllm.course.grading.exercise import Exercise, Known


def check_causal_mask(answer: Callable) -> str:
    import torch

    def mask(query_len: int, context: int, offset: Callable[[int, int], int]) -> torch.Tensor:
        positions = torch.arange(query_len) + offset(query_len, context)
        return torch.arange(context) <= positions[:, None]

    def causal_mask(query_len: int, context: int) -> torch.Tensor:
        return mask(query_len, context, lambda q, n: n - q)

    suspects = {
        "aligned-to-start": (
            (
                "Your triangle begins at the top left: query 0 sees key 0 and nothing else, though"
                " all keys of the past come before it.\nThe queries are the LAST tokens of the"
                " context: query i stands at position context - query_len + i."
            ),
            lambda q, n: mask(q, n, lambda q, n: 0),
        ),
        "sees-the-next-token": (
            (
                "Each query sees one key too many: the token after its own, which the model is"
                " about to predict.\nCompare with <=, not with < and one more; the last row's last"
                " key is its own."
            ),
            lambda q, n: mask(q, n, lambda q, n: n - q + 1),
        ),
        "hides-its-own-token": (
            (
                "A query does not see its own token. It may: only what comes AFTER it is the"
                " future.\nKey j is visible when j <= position, not j < position."
            ),
            lambda q, n: mask(q, n, lambda q, n: n - q - 1),
        ),
        "hides-nothing": (
            (
                "All queries see all keys. Only the last one may: for the others, later tokens are"
                " the future.\nA mask that does not care for the row is none."
            ),
            lambda q, n: mask(q, n, lambda q, n: n),
        ),
        "same-for-all-queries": (
            (
                "All rows are alike. Each query sees one key more than the one before it: its"
                " own.\nQuery i stands at position context - query_len + i."
            ),
            lambda q, n: mask(q, n, lambda q, n: n - q)[:1].expand(q, n).clone(),
        ),
        "true-means-hidden": (
            (
                "The triangle is right, and turned over: here True means that the query MAY look.\n"
                "Return its opposite, ~mask."
            ),
            lambda q, n: ~causal_mask(q, n),
        ),
    }
    cases = [(1, 1), (4, 4), (1, 7), (3, 8), (5, 6), (2, 2), (16, 70)]
    number = diagnose(answer, cases, causal_mask, suspects)
    return f"{number} masks, of whole prompts, of chunks with a past, and of single tokens"


EXERCISE = Exercise(
    id="02.1",
    title="Warm-up: who may look at whom",
    check=check_causal_mask,
    mistakes=(
        Known(
            "aligned-to-start",
            hint=2,
            answers=r"""
# %% tril as it comes
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril()

# %% row i sees the columns up to i
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.arange(context)[None, :] <= torch.arange(query_len)[:, None]
""",
        ),
        Known(
            "sees-the-next-token",
            hint=3,
            answers=r"""
# %% off by one at the diagonal
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(
        diagonal=context - query_len + 1
    )
""",
        ),
        Known(
            "hides-its-own-token",
            hint=3,
            answers=r"""
# %% strictly before
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    positions = torch.arange(context - query_len, context)
    return torch.arange(context) < positions[:, None]
""",
        ),
        Known(
            "hides-nothing",
            answers=r"""
# %% the diagonal too far to the right
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(diagonal=context)
""",
        ),
        Known(
            "same-for-all-queries",
            hint=2,
            answers=r"""
# %% the past and one, for every row
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    visible = torch.arange(context) <= context - query_len
    return visible.repeat(query_len, 1)
""",
        ),
        Known(
            "true-means-hidden",
            answers=r"""
# %% what masked_fill wants
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).triu(
        diagonal=context - query_len + 1
    )
""",
        ),
        Known(
            "wrong-dtype",
            answers=r"""
# %% numbers instead of truths
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context).tril(diagonal=context - query_len)
""",
        ),
        Known(
            "wrong-shape",
            answers=r"""
# %% the queries' own square only
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, query_len, dtype=torch.bool).tril()
""",
        ),
    ),
    right=r"""
# %% tril with the right diagonal
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(
        diagonal=context - query_len
    )

# %% the last rows of the whole mask
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(context, context, dtype=torch.bool).tril()[context - query_len :]

# %% cell by cell
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    past = context - query_len
    return torch.tensor(
        [[j <= past + i for j in range(context)] for i in range(query_len)]
    )
""",
)
