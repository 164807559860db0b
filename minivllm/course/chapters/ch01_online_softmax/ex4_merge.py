"""01.4: merge what was computed apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch01_online_softmax.common import INF, finite
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import counted, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch

Parts = tuple["torch.Tensor", "torch.Tensor"]


def _cases() -> list[Parts]:
    """Few parts and many, more sequences than parts, huge log-sum-exps, empty parts anywhere."""
    import torch

    random = seeded(4)

    def parts(splits: int, batch: int, heads: int, dim: int, spread: float = 2.0) -> Parts:
        out = torch.randn(splits, batch, heads, dim, generator=random)
        return out, torch.randn(splits, batch, heads, generator=random) * spread

    simple = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 1.0]]]]), torch.tensor([[[0.0]], [[2.0]]])
    alike, apart, extreme = parts(3, 1, 2, 5), parts(3, 3, 2, 4), parts(6, 2, 2, 3)
    # sequences far from each other
    apart[1].add_(torch.tensor([0.0, 900.0, -900.0])[None, :, None])
    extreme[1].copy_(torch.tensor([-1000.0, -999.0, -1000.5, 1000.0, 998.0, 1000.0])[:, None, None])
    extreme[1][3:, 0] = -1000.0
    turned = parts(2, 4, 3, 5)
    turned = turned[0].transpose(1, 2), turned[1].transpose(1, 2)
    return [
        parts(1, 1, 1, 1),
        simple,
        (simple[0], simple[1] + 800.0),
        (simple[0], simple[1] - 120.0),
        parts(1, 2, 3, 4),
        (alike[0], torch.full_like(alike[1], 1.5)),
        parts(2, 3, 4, 7),
        parts(5, 1, 1, 64),
        parts(3, 3, 3, 3),
        parts(4, 2, 2, 8, spread=300.0),
        parts(65, 2, 3, 4),
        parts(3, 70, 5, 2),
        parts(300, 1, 2, 3, spread=1.0),
        apart,
        extreme,
        turned,
        *_with_empty(parts),
    ]


def _with_empty(parts: Callable[..., Parts]) -> list[Parts]:
    """Parts that are empty at the start, in the middle, at the end, and in all of a row."""
    some, nothing, low = parts(4, 3, 3, 8), parts(2, 2, 2, 4), parts(3, 2, 2, 4)
    single = parts(1, 3, 2, 4)
    for sequence, empty in enumerate((slice(2, 4), slice(0, 2), slice(1, 3))):
        some[1][empty, sequence] = -INF
        # Any finite number may stand in an empty part.
        some[0][empty, sequence] = (5.0, 1e30, -3e38)[sequence]
    nothing[1][:, 1] = -INF
    nothing[0][:, 1] = 7.0
    low[1].fill_(-1000.0)
    low[1][0] = low[1][2, 0] = -INF
    single[1][0, 1] = -INF
    return [some, nothing, low, single]


def _merged(weigh: Callable, divide: bool, guard: bool, clean: bool) -> Callable:
    """A merge with these weights. divide: by their sum. guard: not by 0. clean: nan becomes 0."""

    def merge(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
        weights = weigh(partial_lse)
        merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
        if divide:
            total = weights.sum(dim=0)
            total = total.masked_fill(total == 0, 1.0) if guard else total
            merged = merged / total.unsqueeze(-1)
        return merged.nan_to_num(0.0) if clean else merged

    return merge


def _merges(*weigh: Callable, divide: bool = True) -> tuple[Callable, ...]:
    """Merges with these weights, with each guard against nan that people use, and without."""
    return tuple(
        _merged(weights, divide, guard, clean)
        for weights in weigh
        for guard in ((True, False) if divide else (False,))
        for clean in (False, True)
    )


def _below(lse: torch.Tensor) -> torch.Tensor:
    return (lse - finite(lse.amax(dim=0))).exp()


def _below_unguarded(lse: torch.Tensor) -> torch.Tensor:
    return (lse - lse.amax(dim=0)).exp()


def _over(dim: int) -> Callable:
    return lambda lse: lse.softmax(dim=dim).nan_to_num(0.0)


def _over_unguarded(dim: int) -> Callable:
    return lambda lse: lse.softmax(dim=dim)


def _empty_as(value: float) -> Callable:
    return lambda lse: lse.masked_fill(lse == -INF, value).softmax(dim=0)


def _largest_only(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    best = lse.argmax(dim=0, keepdim=True).unsqueeze(-1).expand(1, *out.shape[1:])
    return out.gather(0, best)[0]


def _single_as_it_is(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    merge = _merged(_below, divide=True, guard=True, clean=False)
    return out[0].clone() if len(out) == 1 else merge(out, lse)


def check_merge(answer: Callable) -> str:
    """Judge an answer to 01.4."""
    from minivllm.kernels import Kernels
    from minivllm.kernels.online_softmax import merge_attention_reference

    number = diagnose(answer, _cases(), merge_attention_reference, EXERCISE.suspects)
    mine = counted(answer)
    line = engine_agrees(mine, kernels=replace(Kernels.reference(), merge_attention=mine))
    return f"{number} merges, and {line}"


EXERCISE = Exercise(
    id="01.4",
    title="Merge what was computed apart",
    check=check_merge,
    mistakes=(
        Known(
            "equal-weights",
            "Every part counts the same in your merge. A part whose scores are small should hardly"
            " count: its weight is exp(lse).\nThe log-sum-exps say how much; compare with the"
            " picture of the three parts.",
            hint=1,
            suspects=(
                lambda out, lse: out.mean(dim=0),
                *_merges(lambda lse: (lse > -INF).float()),
            ),
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
            "added-up",
            "You add the parts' outputs up, as if each had been divided by the sum of the WHOLE"
            " context. Each was divided by its own part's sum.\nA part's share of the whole weight"
            " is exp(lse) of the part, divided by the sum of all these.",
            hint=1,
            suspects=(lambda out, lse: out.sum(dim=0),),
            answers=r"""
# %% the sum of the outputs
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    return partial_out.sum(dim=0)
""",
        ),
        Known(
            "largest-part-only",
            "Your result is the output of the part with the largest log-sum-exp. The other parts"
            " count, too, each by its share.\nWeigh all parts: exp(lse), divided by the sum over"
            " the parts.",
            hint=1,
            suspects=(_largest_only,),
            answers=r"""
# %% the winner takes it all
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    best = partial_lse.argmax(dim=0)
    index = best[None, :, :, None].expand(1, *partial_out.shape[1:])
    return partial_out.gather(0, index)[0]
""",
        ),
        Known(
            "no-maximum",
            "You take exp of the log-sum-exps as they are: large ones give inf, and inf / inf is"
            " nan; small ones 0 / 0.\nIt is softmax's old problem with softmax's old cure:"
            " subtract the largest over the parts first.",
            hint=2,
            suspects=_merges(lambda lse: lse.exp()),
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
            "Your weights do not add up to 1: exp(lse - max) is 1 for the largest part, and the"
            " others come on top.\nDivide by their sum over the parts.",
            hint=2,
            suspects=_merges(_below, _below_unguarded, divide=False),
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
            "A sequence whose parts are all empty (all lse -inf) came out as nan. A padded row of a"
            " batch is like that: it must give 0.\nTwo places make nan: -inf - -inf, and 0 / 0."
            " Subtract 0 where the maximum is -inf, and divide by 1 where the sum is 0.",
            hint=3,
            suspects=(
                _merged(_below, True, False, False),
                _merged(_below_unguarded, True, True, False),
                _merged(_below_unguarded, True, False, False),
            ),
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
            "empty-part-counts",
            "An empty part counts: a finite number stands in for its log-sum-exp of -inf. Where"
            " the other parts lie low, or all are empty, what stands in its output gets a"
            " weight.\nexp(-inf) is 0 without any help: leave -inf as it is, and mend only the"
            " maximum and the sum.",
            hint=3,
            suspects=_merges(
                *map(_empty_as, (0.0, -1e2, -1e3, -1e4, -1e9, -1e30, -3e38)), divide=False
            ),
            answers=r"""
# %% -1e4 is low enough
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.softmax(partial_lse.clamp(min=-1e4), dim=0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)

# %% empty parts made 0
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    lse = torch.where(partial_lse == -math.inf, 0.0, partial_lse)
    weights = torch.softmax(lse, dim=0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)
""",
        ),
        Known(
            "single-part-as-it-is",
            "Where S is 1 you return the part's output as it is. That part may be empty, too: then"
            " the number in its output does not count, and the result is 0.\nOne part needs no rule"
            " of its own: the merge of several is right for it, too.",
            hint=3,
            suspects=(_single_as_it_is,),
            answers=r"""
# %% nothing to merge
@@
-    largest = partial_lse.amax(dim=0)
+    if len(partial_lse) == 1:
+        return partial_out[0].clone()
+    largest = partial_lse.amax(dim=0)
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% low parts taken for empty ones
@@
-    largest = partial_lse.amax(dim=0)
+    partial_lse = partial_lse.masked_fill(partial_lse < -500, -math.inf)
+    largest = partial_lse.amax(dim=0)
""",
        ),
        Known(
            "one-maximum-for-all",
            "You subtract the largest log-sum-exp of all sequences and heads. Where another"
            " sequence has much larger scores, all weights of this one underflow to 0.\nThe"
            " maximum is over the parts only: dim=0.",
            hint=2,
            suspects=_merges(lambda lse: (lse - lse.max()).exp()),
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
            "maximum-never-below-zero",
            "What you subtract is never below 0. Where all log-sum-exps are far below 0, all"
            " weights underflow to 0, and nothing is left to divide.\nSubtract the largest"
            " log-sum-exp over the parts itself, which may be negative.",
            hint=2,
            suspects=_merges(lambda lse: (lse - lse.amax(dim=0).clamp(min=0.0)).exp()),
            answers=r"""
# %% a clamp against -inf
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    largest = partial_lse.amax(dim=0).clamp(min=0.0)
    weights = torch.exp(partial_lse - largest)
    total = weights.sum(dim=0)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / torch.where(total == 0.0, 1.0, total).unsqueeze(-1)
""",
        ),
        Known(
            "clamped",
            "You cut large log-sum-exps off instead of shifting them. Then all parts beyond the"
            " limit look alike: 800 and 802 get the same weight.\nSubtract the largest one over the"
            " parts; differences stay as they are.",
            hint=2,
            suspects=_merges(
                *(
                    lambda lse, limit=limit: lse.clamp(max=limit).exp()
                    for limit in (50.0, 80.0, 85.0, 88.0, 88.7, 100.0)
                )
            ),
            answers=r"""
# %% exp of what is at most 80
@@
-    largest = partial_lse.amax(dim=0)
-    weights = torch.exp(partial_lse - largest.masked_fill(largest == -math.inf, 0.0))
+    weights = torch.exp(partial_lse.clamp(max=80.0))
""",
        ),
        Known(
            "weights-over-everything",
            "Your weights add up to 1 over all parts, sequences and heads together. Each sequence"
            " and head has a merge of its own.\nSum over the parts only: dim=0 of [S, B, H].",
            hint=2,
            suspects=_merges(
                lambda lse: lse.flatten().softmax(0).view(lse.shape),
                lambda lse: (w := _below(lse)) / w.sum(),
                divide=False,
            ),
            answers=r"""
# %% the sum of all weights
@@
-    total = weights.sum(dim=0)
+    total = weights.sum()
""",
        ),
        Known(
            "weights-turned-round",
            "Parts with small log-sum-exps count most in your merge, and it should be the other way"
            " round.\nThe weight of a part is exp(+lse).",
            hint=1,
            suspects=_merges(lambda lse: (-lse).softmax(dim=0), divide=False),
            answers=r"""
# %% the minus sign of a distance
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    weights = torch.softmax(-partial_lse, dim=0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)
""",
        ),
        Known(
            "divided-by-the-parts",
            "Your result is right, but for a division by the number of parts. The weights add up to"
            " 1 already.\nTake a sum over the parts, not a mean.",
            hint=1,
            suspects=tuple(
                lambda out, lse, merge=merge: merge(out, lse) / len(out)
                for merge in _merges(_below, _below_unguarded)
            ),
            answers=r"""
# %% a mean of the weighted outputs
@@
-    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
+    merged = (weights.unsqueeze(-1) * partial_out).mean(dim=0)
""",
        ),
        Known(
            "first-part-as-maximum",
            "You subtract the first part's log-sum-exp, not the largest. Where another part lies"
            " far above it, exp gives inf; and where the first part is empty, everything is nan.\n"
            "Subtract the maximum over the parts, dim=0.",
            hint=2,
            suspects=_merges(
                lambda lse: (lse - lse[0]).exp(), lambda lse: (lse - finite(lse[0])).exp()
            ),
            answers=r"""
# %% any part will do
@@
-    largest = partial_lse.amax(dim=0)
+    largest = partial_lse[0]
""",
        ),
        Known(
            "wrong-axis",
            "Your weights add up to 1 over the heads, or the sequences, not over the parts.\nParts"
            " are dim=0 of [S, B, H]: reduce over that.",
            hint=2,
            suspects=tuple(
                merge
                for dim in (1, 2)
                for merge in _merges(_over(dim), _over_unguarded(dim), divide=False)
            ),
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
            "lse-as-weight",
            "You weigh the parts with their log-sum-exps. Those are logarithms: a part with lse 2"
            " counts e times as much as one with lse 1, not twice.\nTake exp (after subtracting"
            " the maximum).",
            hint=1,
            suspects=_merges(lambda lse: lse),
            answers=r"""
# %% logarithms as weights
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    merged = (partial_lse.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / partial_lse.sum(dim=0).unsqueeze(-1)
""",
        ),
        Known(
            "base-two",
            "Your weights are powers of 2; these log-sum-exps are natural logarithms.\nInside the"
            " kernels scores are in base 2, but what is handed over is not: use exp.",
            suspects=_merges(
                lambda lse: (lse - finite(lse.amax(dim=0))).exp2(),
                lambda lse: (lse - lse.amax(dim=0)).exp2(),
            ),
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
            "changed-input",
            answers=r"""
# %% mends the empty rows in the caller's tensor
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor
) -> torch.Tensor:
    largest = partial_lse.amax(dim=0)
    weights = partial_lse.sub_(largest.masked_fill(largest == -math.inf, 0.0)).exp()
    total = weights.sum(dim=0)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / total.masked_fill(total == 0.0, 1.0).unsqueeze(-1)
""",
        ),
        Known(
            "result-reused",
            answers=r"""
# %% one buffer for all calls of a shape
def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor, buffers: dict = {}
) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=0).nan_to_num(0.0)
    out = buffers.setdefault(partial_out.shape, torch.empty(partial_out.shape[1:]))
    return torch.sum(weights.unsqueeze(-1) * partial_out, dim=0, out=out)
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
