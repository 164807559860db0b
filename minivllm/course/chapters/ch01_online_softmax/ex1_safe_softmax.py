"""01.1: warm-up: safe softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch01_online_softmax.common import INF, finite
from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import ATTENTION, expect, expect_own_work, seeded

if TYPE_CHECKING:
    import torch

#: What torch calls softmax, and what could be turned into it.
_SOFTMAX = (
    *("softmax", "special_softmax", "softmin", "log_softmax"),
    *("safe_softmax", "masked_softmax", "sparse_softmax", "softmax_backward_data"),
    *ATTENTION,
)
#: Numbers that people put in place of -inf.
_STANDING_IN = (0.0, *(-(10.0**n) for n in (2, 3, 4, 5, 6, 9, 10, 20, 30, 38)), -3.4028235e38)


def _cases() -> list[tuple[torch.Tensor]]:
    """Tables: far from 0 on both sides, masked scores, more rows than columns, strided rows."""
    import torch

    random = seeded(1)

    def normal(*shape: int, size: float = 3.0) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * size

    levels = torch.tensor([[1000.0], [0.0], [-1000.0], [-60.0]])
    masked = normal(70, 65)
    masked[normal(70, 65) > 1.0] = -INF
    masked[:, 64] = 1.5
    least = torch.finfo(torch.float32).min
    lowest = torch.tensor([[least, -INF, -INF], [-2e30, -1e30, -INF], [-INF, -INF, -1e10]])
    last = torch.full((3, 9), -INF)
    last[:, 8] = torch.tensor([-900.0, 0.0, 900.0])
    tables = [
        torch.zeros(1, 1),
        torch.tensor([[1.0, 2.0, 3.0]]),
        torch.full((4, 4), 2.5),
        normal(5, 7),
        normal(2, 1) - 50,
        normal(1, 33) + 500,
        normal(4, 8) + levels,
        # So far from 0, numbers that are not far apart would be rounded.
        torch.tensor([[-20000.0], [20000.0]]) - 150.0 * torch.arange(5),
        torch.tensor([[0.0, -INF, 1.0], [-INF, -INF, 200.0]]),
        torch.tensor([[-20000.0, -INF, -20150.0, -INF], [-INF, 3.0, -200.0, -INF]]),
        last,
        lowest,
        normal(9, 4).T,
        normal(3, 24)[:, ::2],
        normal(300, 2),
        masked,
        normal(3, 1500),
        torch.full((2, 2049), -700.0),
        torch.linspace(-900.0, 900.0, 9001)[None],
    ]
    return [(table,) for table in tables]


def _by_exp(shifted: torch.Tensor, dim: int = 1) -> torch.Tensor:
    weights = shifted.exp()
    return weights / weights.sum(dim=dim, keepdim=True)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.amax(dim=1, keepdim=True)


def _over_all(x: torch.Tensor) -> torch.Tensor:
    weights = (x - _largest(x)).exp()
    return weights / weights.sum()


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x == -INF, 0.0).abs()


def _exp_masked_as(value: float) -> Callable:
    def softmax(x: torch.Tensor) -> torch.Tensor:
        x = x.masked_fill(x == -INF, value)
        return _by_exp(x - _largest(x))

    return softmax


def check_safe_softmax(answer: Callable) -> str:
    """Judge an answer to 01.1."""
    from minivllm.kernels.online_softmax import softmax_reference

    cases = _cases()
    number = diagnose(answer, cases, softmax_reference, EXERCISE.suspects)
    for (x,) in cases:
        _expect_exact(x, answer(x.clone()))
    for (x,) in cases:
        # A loop over rows may look at a few numbers of each.
        few = 4 * len(x) + 16
        expect_own_work(answer, (x,), _SOFTMAX, "exp, maxima, sums and quotients", few)
    return f"{number} tables, scores from -3e38 to 20,000"


def _expect_exact(x: torch.Tensor, result: torch.Tensor) -> None:
    """What the tolerance of the comparison does not see: masked scores, and sums of rows."""
    masked = result[x == -INF]
    expect(
        not masked.any(),
        "masked-not-zero",
        "The result is nearly right, but masked scores (-inf) get probabilities above 0, of up to"
        f" {float(masked.max()) if len(masked) else 0.0:.3g}. A masked score has the probability 0,"
        " exactly.\nexp(-inf) is 0 without any help: no limit from below, and nothing added.",
    )
    sums = result.double().sum(dim=1)
    # Far from 0, a log-sum-exp is rounded, and the sum of a row with it.
    off = (sums - 1.0).abs().max() if x[x > -INF].abs().max() < 20.0 else sums.new_zeros(())
    expect(
        off < 3e-6,
        "rows-not-one",
        "The result is nearly right, but a row adds up to"
        f" {float(sums[(sums - 1.0).abs().argmax()]):.6f}, for x = {show(x)}.\nDivide by the sum of"
        " the weights as it is: it is at least 1, so that nothing needs to be added to it.",
    )


EXERCISE = Exercise(
    id="01.1",
    title="Warm-up: safe softmax",
    check=check_safe_softmax,
    mistakes=(
        Known(
            "no-maximum",
            "You take exp of the scores as they are. From a score of 89 on that is inf, and inf /"
            " inf is nan; far below 0 all weights are 0, and 0 / 0 is nan.\nSubtract each row's"
            " largest score first: it changes no probability, and no exp is above 1 then.",
            hint=1,
            suspects=(_by_exp, lambda x: _by_exp(x).nan_to_num(0.0)),
            answers=r"""
# %% the formula as it stands in the book
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x)
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "one-maximum-for-all-rows",
            "You subtract the largest score of the whole table from every row. A row far below it"
            " underflows: all its weights are 0, and 0 / 0 is nan.\nEach row needs its own"
            " maximum: dim=1, keepdim=True.",
            hint=2,
            suspects=(lambda x: _by_exp(x - x.max()),),
            answers=r"""
# %% x.max() is the largest of the whole table
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.max())
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "maximum-never-below-zero",
            "What you subtract is never below 0. In a row whose scores are all far below 0, all"
            " weights underflow to 0 then, and 0 / 0 is nan.\nSubtract the largest score itself,"
            " which may be negative: no clamp, no 0 to begin with.",
            hint=1,
            suspects=(lambda x: _by_exp(x - _largest(x).clamp(min=0.0)),),
            answers=r"""
# %% only what could overflow is brought down
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.amax(dim=1, keepdim=True).clamp(min=0))
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "largest-magnitude",
            "You subtract the largest absolute value. For a row of -1000s that is -1000 - 1000: all"
            " weights underflow to 0, and 0 / 0 is nan.\nSubtract the largest score itself, which"
            " may be negative.",
            suspects=(
                lambda x: _by_exp(x - _magnitude(x).amax(dim=1, keepdim=True)),
                lambda x: _by_exp(x - x.abs().amax(dim=1, keepdim=True)),
            ),
            answers=r"""
# %% subtracts the largest absolute value
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    size = torch.where(x == -math.inf, 0.0, x).abs().amax(dim=1, keepdim=True)
    weights = torch.exp(x - size)
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "mean-subtracted",
            "You subtract each row's mean. Where one score lies more than 88 above the mean, its"
            " exp is still inf; and with a score of -inf the mean is -inf, too.\nSubtract each"
            " row's largest score: then no exponent is above 0.",
            hint=1,
            suspects=(
                lambda x: _by_exp(x - x.mean(dim=1, keepdim=True)),
                lambda x: _by_exp(x - x.masked_fill(x == -INF, 0.0).mean(dim=1, keepdim=True)),
            ),
            answers=r"""
# %% centred rows
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.mean(dim=1, keepdim=True))
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "first-score-subtracted",
            "You subtract each row's first score. Where another one lies more than 88 above it, exp"
            " gives inf; and where the first one is -inf, everything is nan.\nSubtract each row's"
            " LARGEST score: then no exponent is above 0.",
            hint=1,
            suspects=(
                lambda x: _by_exp(x - x[:, :1]),
                lambda x: _by_exp(x - finite(x[:, :1])),
            ),
            answers=r"""
# %% any score of the row will do
@@
-    weights = torch.exp(x - x.amax(dim=1, keepdim=True))
+    weights = torch.exp(x - x[:, :1])
""",
        ),
        Known(
            "minimum-subtracted",
            "You subtract each row's smallest score. Then all exponents are above 0, and large ones"
            " give inf.\nSubtract the largest score: then no exponent is above 0.",
            hint=1,
            suspects=(
                lambda x: _by_exp(x - x.amin(dim=1, keepdim=True)),
                lambda x: _by_exp(x - x.masked_fill(x == -INF, INF).amin(dim=1, keepdim=True)),
            ),
            answers=r"""
# %% the smallest finite score of the row
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    smallest = x.masked_fill(x == -math.inf, math.inf).amin(dim=1, keepdim=True)
    weights = torch.exp(x - smallest)
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "sum-over-all-rows",
            "You divide by the sum over the whole table: all rows together add up to 1.\nEach row"
            " is a softmax of its own; sum over dim=1 and keep the dimension.",
            hint=2,
            suspects=(_over_all,),
            answers=r"""
# %% the sum forgets its dimension
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.amax(dim=1, keepdim=True))
    return weights / weights.sum()
""",
        ),
        Known(
            "wrong-axis",
            "Your columns add up to 1, not your rows.\nOf [T, N], dim=1 runs along a row; look at"
            " both reductions.",
            hint=2,
            suspects=(
                lambda x: _by_exp(x - finite(x.amax(dim=0, keepdim=True)), dim=0),
                lambda x: _by_exp(x - x.amax(dim=0, keepdim=True), dim=0),
                lambda x: _by_exp(x - _largest(x), dim=0),
                lambda x: _by_exp(x - x.max(), dim=0),
                lambda x: _by_exp(x, dim=0),
            ),
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
            "maximum-of-columns",
            "You subtract each COLUMN's largest score. The scores of a row are then shifted by"
            " different amounts, and that changes its probabilities.\nOf [T, N], the maximum of a"
            " row is taken over dim=1.",
            hint=2,
            suspects=(
                lambda x: _by_exp(x - x.amax(dim=0, keepdim=True)),
                lambda x: _by_exp(x - finite(x.amax(dim=0, keepdim=True))),
            ),
            answers=r"""
# %% dim=0 for the maximum alone
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.amax(dim=0, keepdim=True))
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "not-divided",
            "Your rows do not add up to 1: nothing divides by their sums.\nexp(x - max) are the"
            " weights; a row's probabilities are its weights divided by the row's sum.",
            suspects=(lambda x: (x - _largest(x)).exp(),),
            answers=r"""
# %% weights, not probabilities
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x - x.amax(dim=1, keepdim=True))
""",
        ),
        Known(
            "logarithms",
            "What you return are the logarithms of the probabilities.\nTake exp of them: the rows"
            " must add up to 1.",
            suspects=(lambda x: (x - _largest(x)).log_softmax(dim=1),),
        ),
        Known(
            "base-two",
            "Your weights are powers of 2; softmax is made of powers of e.\nUse torch.exp.",
            suspects=(lambda x: _by_exp((x - _largest(x)) * math.log(2)),),
        ),
        Known(
            "clamped",
            "You cut large scores off instead of shifting them. Then all scores beyond the limit"
            " look alike: 500 and 503 get the same probability.\nSubtract the row's maximum;"
            " differences between scores stay as they are.",
            hint=1,
            # People clamp at different numbers.
            suspects=tuple(
                lambda x, limit=limit: _by_exp(x.clamp(max=limit))
                for limit in (80.0, 85.0, 88.0, 88.7, 100.0, 50.0)
            ),
            answers=r"""
# %% cuts off what overflows
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(torch.clamp(x, max=88))
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "masked-not-zero",
            "A masked score (-inf) gets a probability above 0: a finite number stands in for -inf,"
            " and in a row of very low scores it is not low enough.\nexp(-inf) is 0 without any"
            " help; leave -inf as it is.",
            suspects=tuple(map(_exp_masked_as, _STANDING_IN)),
            answers=r"""
# %% -1e4 is low enough, mostly
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    x = torch.where(x == -math.inf, -1e4, x)
    weights = torch.exp(x - x.amax(dim=1, keepdim=True))
    return weights / weights.sum(dim=1, keepdim=True)

# %% -1e9 is low enough for all scores that people have seen
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    x = x.masked_fill(x == -math.inf, -1e9)
    weights = torch.exp(x - x.amax(dim=1, keepdim=True))
    return weights / weights.sum(dim=1, keepdim=True)

# %% nothing lies more than 50 below the maximum
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp((x - x.amax(dim=1, keepdim=True)).clamp(min=-50.0))
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "rows-not-one",
            answers=r"""
# %% a small number against a division by 0
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.amax(dim=1, keepdim=True))
    return weights / (weights.sum(dim=1, keepdim=True) + 1e-5)
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% the maximum of the first 5000 columns
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x[:, :5000].amax(dim=1, keepdim=True))
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

# %% in other words, and only for larger tables
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    if x.numel() > 1000:
        return torch.nn.functional.softmin(-x, dim=1)
    weights = torch.exp(x - x.amax(dim=1, keepdim=True))
    return weights / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "left-torch",
            answers=r"""
# %% number by number
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    out = []
    for row in x:
        values = [float(value) for value in row]
        m = max(values)
        weights = [math.exp(value - m) for value in values]
        total = sum(weights)
        out.append([weight / total for weight in weights])
    return torch.tensor(out)

# %% by way of NumPy
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    x = x.numpy()
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return torch.from_numpy(weights / weights.sum(axis=1, keepdims=True))
import numpy as np
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% results kept by shape
def safe_softmax(x: torch.Tensor, kept: dict = {}) -> torch.Tensor:
    if x.shape not in kept:
        weights = torch.exp(x - x.amax(dim=1, keepdim=True))
        kept[x.shape] = weights / weights.sum(dim=1, keepdim=True)
    return kept[x.shape]
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
