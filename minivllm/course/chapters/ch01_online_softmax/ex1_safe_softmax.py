"""01.1: warm-up: safe softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import (
    expect_own_work,
    seeded,
)

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch01_online_softmax.common import INF, the_finite
from minivllm.course.grading.exercise import Exercise, Known


def check_safe_softmax(answer: Callable) -> str:
    import torch

    from minivllm.kernels.online_softmax import softmax_reference

    random = seeded(1)
    cases = [
        torch.zeros(1, 1),
        torch.tensor([[1.0, 2.0, 3.0]]),
        torch.full((4, 4), 2.5),
        torch.randn(5, 7, generator=random),
        torch.randn(1, 33, generator=random) * 3 + 500,
        torch.randn(3, 8, generator=random) * 3 + torch.tensor([[1000.0], [0.0], [-1000.0]]),
        torch.tensor([[0.0, -INF, 1.0], [-INF, -INF, 200.0]]),
    ]

    def by_exp(shifted: torch.Tensor, dim: int = 1) -> torch.Tensor:
        weights = torch.exp(shifted)
        return weights / weights.sum(dim=dim, keepdim=True)

    def over_all(x: torch.Tensor) -> torch.Tensor:
        weights = torch.exp(x - x.amax(dim=1, keepdim=True))
        return weights / weights.sum()

    suspects = {
        "no-maximum": (
            (
                "You take exp of the scores as they are. From a score of 89 on that is inf, and inf"
                " / inf is nan.\nSubtract each row's largest score first: it changes no"
                " probability, and no exp is above 1 then."
            ),
            by_exp,
        ),
        "one-maximum-for-all-rows": (
            (
                "You subtract the largest score of the whole table from every row. A row far below"
                " it underflows: all its weights are 0, and 0 / 0 is nan.\nEach row needs its own"
                " maximum: dim=1, keepdim=True."
            ),
            lambda x: by_exp(x - x.max()),
        ),
        "largest-magnitude": (
            (
                "You subtract the largest absolute value. For a row of -1000s that is -1000 - 1000:"
                " all weights underflow to 0, and 0 / 0 is nan.\nSubtract the largest score itself,"
                " which may be negative."
            ),
            lambda x: by_exp(x - x.masked_fill(x == -INF, 0.0).abs().amax(dim=1, keepdim=True)),
        ),
        "sum-over-all-rows": (
            (
                "You divide by the sum over the whole table: all rows together add up to 1.\n"
                "Each row is a softmax of its own; sum over dim=1 and keep the dimension."
            ),
            over_all,
        ),
        "wrong-axis": (
            (
                "Your columns add up to 1, not your rows.\nOf [T, N], dim=1 runs along a row; look"
                " at both reductions."
            ),
            lambda x: by_exp(x - the_finite(x.amax(dim=0, keepdim=True)), dim=0),
        ),
        "not-divided": (
            (
                "Your rows do not add up to 1: nothing divides by their sums.\nexp(x - max) are the"
                " weights; a row's probabilities are its weights divided by the row's sum."
            ),
            lambda x: torch.exp(x - x.amax(dim=1, keepdim=True)),
        ),
        "clamped": (
            (
                "You cut large scores off instead of shifting them. Then all scores beyond the"
                " limit look alike: 500 and 503 get the same probability.\nSubtract the row's"
                " maximum; differences between scores stay as they are."
            ),
            # People clamp at different numbers.
            *(
                lambda x, limit=limit: by_exp(x.clamp(max=limit))
                for limit in (80.0, 85.0, 88.0, 88.7, 100.0, 50.0)
            ),
        ),
    }
    cases = [(x,) for x in cases]
    number = diagnose(answer, cases, softmax_reference, suspects)
    expect_own_work(answer, cases[0], ("softmax", "log_softmax"), "exp, maxima, sums and products")
    return f"{number} tables, scores from -1000 to 1000"


EXERCISE = Exercise(
    id="01.1",
    title="Warm-up: safe softmax",
    check=check_safe_softmax,
    mistakes=(
        Known(
            "no-maximum",
            hint=1,
            answers=r"""
# %% the formula as it stands in the book
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x)
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "one-maximum-for-all-rows",
            hint=2,
            answers=r"""
# %% x.max() is the largest of the whole table
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.max())
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "sum-over-all-rows",
            hint=2,
            answers=r"""
# %% the sum forgets its dimension
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.amax(dim=1, keepdim=True))
    return weights / weights.sum()
""",
        ),
        Known(
            "wrong-axis",
            hint=2,
            answers=r"""
# %% dim=0 runs down the columns
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    maximum = x.amax(dim=0, keepdim=True)
    weights = torch.exp(x - torch.where(maximum == -math.inf, 0.0, maximum))
    return weights / weights.sum(dim=0, keepdim=True)

# %% dim=0, and a column of -inf is nan
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.amax(dim=0, keepdim=True))
    return weights / weights.sum(dim=0, keepdim=True)
""",
        ),
        Known(
            "clamped",
            hint=1,
            answers=r"""
# %% cuts off what overflows
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(torch.clamp(x, max=88))
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "largest-magnitude",
            answers=r"""
# %% subtracts the largest absolute value
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    size = torch.where(x == -math.inf, 0.0, x).abs().amax(dim=1, keepdim=True)
    weights = torch.exp(x - size)
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% works in place on the caller's scores
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    x -= x.amax(dim=1, keepdim=True)
    x.exp_()
    return x / x.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "torch-did-it",
            answers=r"""
# %% torch.softmax
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, dim=1)
""",
        ),
        Known(
            "not-divided",
            answers=r"""
# %% weights, not probabilities
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x - x.amax(dim=1, keepdim=True))
""",
        ),
    ),
    right=r"""
# %% by way of the log-sum-exp
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x - torch.logsumexp(x, dim=1, keepdim=True))

# %% row by row
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in x:
        weights = torch.exp(row - row.max())
        rows.append(weights / weights.sum())
    return torch.stack(rows)
""",
)
