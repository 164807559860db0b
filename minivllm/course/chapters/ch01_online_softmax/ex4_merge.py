"""01.4: merge what was computed apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import (
    counted,
    seeded,
)
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch01_online_softmax.common import INF, the_finite
from minivllm.course.grading.exercise import Exercise, Known


def check_merge(answer: Callable) -> str:
    import torch

    from minivllm.kernels import Kernels
    from minivllm.kernels.online_softmax import merge_attention_reference

    random = seeded(4)

    def parts(
        splits: int, batch: int, heads: int, dim: int, spread: float = 2.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.randn(splits, batch, heads, dim, generator=random)
        return out, torch.randn(splits, batch, heads, generator=random) * spread

    simple = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 1.0]]]]), torch.tensor([[[0.0]], [[2.0]]])
    one_part, alike, large = parts(1, 2, 3, 4), parts(3, 1, 2, 5), parts(4, 2, 2, 8, spread=300.0)
    apart, empty, nothing = parts(3, 3, 2, 4), parts(4, 2, 3, 8), parts(2, 2, 2, 4)
    # sequences far from each other
    apart[1].add_(torch.tensor([0.0, 900.0, -900.0])[None, :, None])
    empty[1][2:, 0] = -INF
    empty[0][2:, 0] = 5.0  # any finite number may stand in an empty part
    nothing[1][:, 1] = -INF
    cases = [
        parts(1, 1, 1, 1),
        simple,
        (simple[0], simple[1] + 800.0),
        one_part,
        (alike[0], torch.full_like(alike[1], 1.5)),
        parts(2, 3, 4, 7),
        parts(5, 1, 1, 64),
    ]
    cases += [large, apart, empty, nothing]

    def with_weights(weigh: Callable, divide: bool = True) -> Callable:
        def merge(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
            weights = weigh(partial_lse)
            merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
            return merged / weights.sum(dim=0).unsqueeze(-1) if divide else merged

        return merge

    def unguarded(lse: torch.Tensor) -> torch.Tensor:
        return torch.exp(lse - lse.amax(dim=0))

    def below(lse: torch.Tensor) -> torch.Tensor:
        return torch.exp(lse - the_finite(lse.amax(dim=0)))

    equal = (
        "Every part counts the same in your merge. A part whose scores are small should hardly"
        " count: its weight is exp(lse).\nThe log-sum-exps say how much; compare with the picture"
        " of the three parts."
    )
    no_max = (
        "You take exp of the log-sum-exps as they are: large ones give inf, and inf / inf is nan;"
        " small ones 0 / 0.\nIt is softmax's old problem with softmax's old cure: subtract the"
        " largest over the parts first."
    )
    undivided = (
        "Your weights do not add up to 1: exp(lse - max) is the largest part's weight of 1, plus"
        " the others.\nDivide by their sum over the parts."
    )
    empty_row = (
        "A sequence whose parts are all empty (all lse -inf) came out as nan. A padded row of a"
        " batch is like that: it must give 0.\nTwo places make nan: -inf - -inf, and 0 / 0."
        " Subtract 0 where the maximum is -inf, and divide by 1 where the sum is 0."
    )
    suspects = {
        "equal-weights": (
            equal,
            lambda out, lse: out.mean(dim=0),
            lambda out, lse: _merged(out, (lse > -INF).float()),
        ),
        "no-maximum": (
            no_max,
            with_weights(torch.exp),
            lambda out, lse: _merged(out, torch.exp(lse)),
            lambda out, lse: with_weights(torch.exp)(out, lse).nan_to_num(0.0),
        ),
        "not-divided": (
            undivided,
            with_weights(below, divide=False),
            with_weights(unguarded, divide=False),
        ),
        "empty-row-is-nan": (empty_row, with_weights(unguarded), with_weights(below)),
        "one-maximum-for-all": (
            (
                "You subtract the largest log-sum-exp of all sequences and heads. Where another"
                " sequence has much larger scores, all weights of this one underflow to 0.\nThe"
                " maximum is over the parts only: dim=0."
            ),
            with_weights(lambda lse: torch.exp(lse - lse.max())),
            lambda out, lse: with_weights(lambda lse: torch.exp(lse - lse.max()))(
                out, lse
            ).nan_to_num(0.0),
            lambda out, lse: _merged(out, torch.exp(lse - lse.max())),
        ),
        "wrong-axis": (
            (
                "Your weights add up to 1 over the heads, or the sequences, not over the"
                " parts.\nParts are dim=0 of [S, B, H]: reduce over that."
            ),
            *(
                with_weights(lambda lse, dim=dim: lse.softmax(dim=dim), divide=False)
                for dim in (1, 2)
            ),
            *(
                with_weights(
                    lambda lse, dim=dim: lse.softmax(dim=dim).nan_to_num(0.0), divide=False
                )
                for dim in (1, 2)
            ),
        ),
        "lse-as-weight": (
            (
                "You weigh the parts with their log-sum-exps. Those are logarithms: a part with lse"
                " 2 counts e times as much as one with lse 1, not twice.\nTake exp (after"
                " subtracting the maximum)."
            ),
            with_weights(lambda lse: lse),
        ),
        "base-two": (
            (
                "Your weights are powers of 2; these log-sum-exps are natural logarithms.\n"
                "Inside the kernels scores are in base 2, but what is handed over is not: use exp."
            ),
            lambda out, lse: _merged(out, torch.exp2(lse - the_finite(lse.amax(dim=0)))),
            with_weights(lambda lse: torch.exp2(lse - lse.amax(dim=0))),
        ),
    }
    diagnose(answer, cases, merge_attention_reference, suspects)
    mine = counted(answer)
    line = engine_agrees(mine, kernels=replace(Kernels.reference(), merge_attention=mine))
    return f"{len(cases)} merges, and {line}"


def _merged(partial_out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = weights.sum(dim=0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0) / total.masked_fill(
        total == 0, 1.0
    ).unsqueeze(-1)


EXERCISE = Exercise(
    id="01.4",
    title="Merge what was computed apart",
    check=check_merge,
    mistakes=(
        Known(
            "equal-weights",
            hint=1,
            answers=r"""
# %% the mean of the parts
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    return partial_out.mean(dim=0)

# %% the mean of the parts that are not empty
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    full = (partial_lse > -math.inf).float().unsqueeze(-1)
    return (partial_out * full).sum(dim=0) / full.sum(dim=0).clamp(min=1.0)
""",
        ),
        Known(
            "no-maximum",
            hint=2,
            answers=r"""
# %% exp of log-sum-exps
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.exp(partial_lse)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / weights.sum(dim=0).unsqueeze(-1)

# %% exp of log-sum-exps, nothing divided by 0
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.exp(partial_lse)
    total = weights.sum(dim=0)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / torch.where(total == 0.0, 1.0, total).unsqueeze(-1)

# %% every nan taken for an empty row
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.exp(partial_lse).unsqueeze(-1)
    return torch.nan_to_num(
        (weights * partial_out).sum(dim=0) / weights.sum(dim=0), 0.0
    )
""",
        ),
        Known(
            "not-divided",
            hint=2,
            answers=r"""
# %% weights that do not add up to 1
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    largest = partial_lse.amax(dim=0)
    weights = torch.exp(partial_lse - torch.where(largest == -math.inf, 0.0, largest))
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)
""",
        ),
        Known(
            "empty-row-is-nan",
            hint=3,
            answers=r"""
# %% softmax of -inf alone
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)

# %% -inf - -inf is mended, 0 / 0 is not
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    largest = partial_lse.amax(dim=0)
    weights = torch.exp(partial_lse - torch.where(largest == -math.inf, 0.0, largest))
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0) / weights.sum(
        dim=0
    ).unsqueeze(-1)
""",
        ),
        Known(
            "one-maximum-for-all",
            hint=2,
            answers=r"""
# %% the maximum over everything
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.exp(partial_lse - partial_lse.max())
    total = weights.sum(dim=0)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / torch.where(total == 0.0, 1.0, total).unsqueeze(-1)
""",
        ),
        Known(
            "wrong-axis",
            hint=2,
            answers=r"""
# %% softmax over the heads
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=-1).nan_to_num(0.0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)

# %% softmax over the sequences
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=1)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)
""",
        ),
        Known(
            "base-two",
            answers=r"""
# %% powers of two, as inside the kernels
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    largest = partial_lse.amax(dim=0)
    weights = torch.exp2(partial_lse - torch.where(largest == -math.inf, 0.0, largest))
    total = weights.sum(dim=0)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / torch.where(total == 0.0, 1.0, total).unsqueeze(-1)
""",
        ),
        Known(
            "lse-as-weight",
            hint=1,
            answers=r"""
# %% logarithms as weights
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    merged = (partial_lse.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / partial_lse.sum(dim=0).unsqueeze(-1)
""",
        ),
    ),
    right=r"""
# %% softmax, and nan_to_num for the empty rows
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=0).nan_to_num(0.0)
    return torch.einsum("sbh,sbhd->bhd", weights, partial_out)

# %% part by part, as the recurrence does it
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    m, l = torch.full_like(partial_lse[0], -math.inf), torch.zeros_like(partial_lse[0])
    acc = torch.zeros_like(partial_out[0])
    for out, lse in zip(partial_out, partial_lse):
        new = torch.maximum(m, lse)
        finite = torch.where(new == -math.inf, 0.0, new)
        rescale, weight = torch.exp(m - finite), torch.exp(lse - finite)
        l = l * rescale + weight
        acc = acc * rescale.unsqueeze(-1) + weight.unsqueeze(-1) * out
        m = new
    return acc / l.clamp(min=1e-30).unsqueeze(-1)

# %% with logsumexp
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    total = torch.logsumexp(partial_lse, dim=0)
    weights = torch.exp(partial_lse - torch.where(total == -math.inf, 0.0, total))
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)
""",
)
