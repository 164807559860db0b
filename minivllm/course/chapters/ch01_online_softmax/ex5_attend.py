"""01.5: softmax·V in one pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import (
    expect_own_work,
    seeded,
)

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch01_online_softmax.common import INF
from minivllm.course.grading.exercise import Exercise, Known


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    block: int,
    *,
    sum_rescaled: bool = True,
    acc_rescaled: bool = True,
    swapped: bool = False,
    one_max: bool = False,
    subtract: bool = True,
    tail: bool = True,
    divide: bool = True,
    tile_own: bool = False,
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v by tiles: right by default, and wrong in the ways that the options
    name.
    """
    import torch

    m, l = torch.full((len(q), 1), -INF if subtract else 0.0), torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for key, value in zip(k.split(block), v.split(block), strict=True):
        if not tail and len(key) < block:
            break
        scores = q @ key.T * scale
        tile_max = scores.max().expand(len(q), 1) if one_max else scores.amax(dim=1, keepdim=True)
        new = torch.maximum(m, tile_max) if subtract else m
        weights = torch.exp(scores - (tile_max if tile_own else new))
        factor = torch.exp(m - new)
        if swapped:
            factor = torch.where(m == -INF, 0.0, torch.exp(new - m))
        l = (l * factor if sum_rescaled else l) + weights.sum(dim=1, keepdim=True)
        acc = (acc * factor if acc_rescaled else acc) + weights @ value
        m = new
    return acc / l if divide else acc


def check_attend(answer: Callable) -> str:
    import torch

    random = seeded(5)

    def case(
        queries: int, keys: int, dim: int, value_dim: int, block: int, size: float = 1.0
    ) -> tuple:
        q, k = (torch.randn(n, dim, generator=random) * size for n in (queries, keys))
        return q, k, torch.randn(keys, value_dim, generator=random), dim**-0.5, block

    falling, rising = case(1, 12, 4, 4, 4), case(2, 16, 4, 3, 4)
    for (q, k, *_), sign in ((falling, -1.0), (rising, 1.0)):
        k.copy_((sign * torch.linspace(-2, 2, len(k))).unsqueeze(1) * q[0] / q[0].norm() * 2)
    equal = case(3, 8, 4, 5, 4)
    equal[1].fill_(0.5)
    far = case(2, 9, 4, 4, 4)
    # the scores of one query are high, of the other low
    far[0].copy_(torch.tensor([[40.0] * 4, [-40.0] * 4]))
    far[1].fill_(2.0).add_(torch.randn(9, 4, generator=random) * 0.01)
    simple = (
        torch.ones(1, 1),
        torch.tensor([[1.0], [2.0], [0.0]]),
        torch.tensor([[1.0], [0.0], [0.0]]),
        1.0,
        1,
    )
    cases = [
        case(1, 1, 1, 1, 4),
        simple,
        case(1, 5, 4, 3, 8),
        case(3, 8, 4, 4, 4),
        case(4, 33, 8, 6, 16),
        case(5, 7, 4, 4, 1),
    ]
    cases += [case(2, 32, 16, 16, 8), falling, rising, equal, case(3, 21, 8, 8, 4, size=5.0), far]

    def right(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
    ) -> torch.Tensor:
        return torch.softmax(q @ k.T * scale, dim=1) @ v

    def averaged(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
    ) -> torch.Tensor:
        tiles = zip(k.split(block), v.split(block), strict=True)
        return torch.stack([right(q, key, value, scale, block) for key, value in tiles]).mean(dim=0)

    suspects = {
        "output-not-rescaled": (
            (
                "The sum is rescaled when the maximum grows, but the running output is not: older"
                " values count too much.\nacc stands under the same maximum as l: multiply both by"
                " exp(old - new)."
            ),
            partial(_attend, acc_rescaled=False),
        ),
        "sum-not-rescaled": (
            (
                "The running output is rescaled when the maximum grows, but the sum is not: you"
                " divide by too much.\nl stands under the same maximum as acc: multiply both by"
                " exp(old - new)."
            ),
            partial(_attend, sum_rescaled=False),
        ),
        "no-rescale": (
            (
                "Neither sum nor output is rescaled when the maximum grows: older keys count too"
                " much.\nMultiply both by exp(old maximum - new maximum) before you add the tile."
            ),
            partial(_attend, sum_rescaled=False, acc_rescaled=False),
        ),
        "rescaled-the-wrong-way": (
            (
                "Sum and output grow when the maximum grows; under a larger maximum they must"
                " shrink.\nThe factor is exp(old - new), at most 1."
            ),
            partial(_attend, swapped=True),
        ),
        "tile-under-its-own-maximum": (
            (
                "You take a tile's weights under the tile's own maximum. Where an earlier tile held"
                " a larger score they are too large.\nTake them under the running maximum, after it"
                " has seen the tile."
            ),
            partial(_attend, tile_own=True),
        ),
        "no-maximum": (
            (
                "You take exp of the scores as they are: large ones give inf, and inf / inf is"
                " nan.\nKeep a running maximum for each query, and rescale when it grows."
            ),
            partial(_attend, subtract=False),
        ),
        "one-maximum-for-all-queries": (
            (
                "All queries share one running maximum. A query whose scores lie far below"
                " another's underflows: 0 / 0.\nm has a number for each query: the maximum over the"
                " keys only, dim=1."
            ),
            partial(_attend, one_max=True),
        ),
        "tail-dropped": (
            (
                "Your loop ends before the last tile when that is not full: its keys are"
                " ignored.\nThe number of keys need not be a multiple of block; `k.split(block)`"
                " gives the short tile, too."
            ),
            partial(_attend, tail=False),
        ),
        "not-divided": (
            (
                "Your output is the weighted sum, not yet the weighted average: nothing divides it"
                " by l.\nDivide once, at the end."
            ),
            partial(_attend, divide=False),
        ),
        "tiles-averaged": (
            (
                "You take a softmax for each tile and average the results: a tile of unimportant"
                " keys counts as much as any other.\nThe tiles share one sum: keep m, l and acc"
                " over all of them."
            ),
            averaged,
        ),
        "no-scale": (
            (
                "Your scores are q·k, without the scale.\nscale is an argument: multiply the scores"
                " by it."
            ),
            lambda q, k, v, scale, block: right(q, k, v, 1.0, block),
        ),
        "scaled-twice": (
            (
                "Your scores are scaled twice.\nscale is already 1 / √D: multiply the scores by it"
                " once, and nothing else."
            ),
            lambda q, k, v, scale, block: right(q, k, v, scale * scale, block),
        ),
    }
    diagnose(answer, cases, right, suspects)
    expect_own_work(
        answer, cases[0], ("scaled_dot_product_attention",), "exp, maxima, sums and products"
    )
    _expect_one_pass(answer, case(5, 509, 8, 8, 16))
    return f"{len(cases)} cases, each key and value read once, and no row of scores kept"


def _expect_one_pass(answer: Callable, case: tuple) -> None:
    """Watch what is computed from keys and values, and how large what comes out is."""
    q, k, v, _, block = case
    watched = {"keys": k, "values": v}
    reads, whole = _watch(answer, case, watched, len(k))
    if whole is not None:
        raise Mistake(
            "whole-row",
            f"The result is right, but on the way you made a tensor {list(whole)}, as long as the"
            f" context of {len(k)} keys.\nThat is the row of scores that this exercise does"
            f" without: hold no more than a tile of {block}.",
        )
    for name, tensor in watched.items():
        times = reads[name] / tensor.numel()
        if times > 1.01:
            why = (
                "A loop over the queries reads them anew for each query: handle all queries of a"
                " tile together."
                if round(times) == len(q)
                else "The maximum needs no pass of its own: rescale instead."
            )
            mistake = "query-by-query" if round(times) == len(q) else "two-passes"
            raise Mistake(
                mistake, f"The result is right, but the {name} were read {times:.1f} times.\n{why}"
            )


def _watch(
    answer: Callable, case: tuple, watched: dict[str, torch.Tensor], length: int
) -> tuple[Counter, Any]:
    """(numbers used of each watched tensor, shape of a new tensor with a side of `length`, or
    None).
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    reads: Counter = Counter()
    whole = None
    storages = {tensor.untyped_storage().data_ptr(): name for name, tensor in watched.items()}

    def tensors(tree: Any) -> Iterator[torch.Tensor]:
        return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal whole
            result = func(*args, **(kwargs or {}))
            made = [t for t in tensors(result) if t.untyped_storage().data_ptr() not in storages]
            if made or not list(tensors(result)):  # else a view, which reads nothing
                for tensor in tensors((args, kwargs)):
                    if name := storages.get(tensor.untyped_storage().data_ptr()):
                        sides = zip(tensor.shape, tensor.stride(), strict=True)
                        reads[name] += math.prod(size for size, stride in sides if stride)
            for tensor in made:
                if tensor.is_floating_point() and length in tensor.shape:
                    whole = tensor.shape
            return result

    with Watch():
        answer(*case)
    return reads, whole


EXERCISE = Exercise(
    id="01.5",
    title="softmax·V in one pass",
    check=check_attend,
    mistakes=(
        Known(
            "output-not-rescaled",
            hint=3,
            answers=r'''
# %% the sum is rescaled, the output forgotten
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-        acc = acc * rescale + weights @ tile_v
+        acc = acc + weights @ tile_v
''',
        ),
        Known(
            "sum-not-rescaled",
            hint=3,
            answers=r'''
# %% the output is rescaled, the sum forgotten
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
+        l = l + weights.sum(dim=1, keepdim=True)
''',
        ),
        Known(
            "no-rescale",
            hint=3,
            answers=r'''
# %% neither is
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
-        acc = acc * rescale + weights @ tile_v
+        l = l + weights.sum(dim=1, keepdim=True)
+        acc = acc + weights @ tile_v
''',
        ),
        Known(
            "rescaled-the-wrong-way",
            answers=r'''
# %% new minus old
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
+        rescale, weights = (
+            torch.where(m == -math.inf, 0.0, torch.exp(new - m)),
+            torch.exp(scores - new),
+        )
''',
        ),
        Known(
            "tile-under-its-own-maximum",
            hint=3,
            answers=r'''
# %% weights under the tile's maximum
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
+        rescale, weights = (
+            torch.exp(m - new),
+            torch.exp(scores - scores.amax(dim=1, keepdim=True)),
+        )
''',
        ),
        Known(
            "one-maximum-for-all-queries",
            hint=1,
            answers=r'''
# %% scores.max() is the largest of all queries
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
+        new = torch.maximum(m, scores.max())
''',
        ),
        Known(
            "not-divided",
            hint=3,
            answers=r'''
# %% the weighted sum
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-    return acc / l
+    return acc
''',
        ),
        Known(
            "no-scale",
            answers=r'''
# %% scale is not used
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-        scores = q @ tile_k.T * scale
+        scores = q @ tile_k.T
''',
        ),
        Known(
            "scaled-twice",
            answers=r'''
# %% 1 / sqrt(D) once more
@@
-    """softmax(scale · q kᵀ) v in one pass over tiles of `block` keys: [M, D], [N, D], [N, E] -> [M, E]."""
@@
-        scores = q @ tile_k.T * scale
+        scores = q @ tile_k.T * scale / math.sqrt(q.shape[1])
''',
        ),
        Known(
            "no-maximum",
            answers=r"""
# %% sums of exp as they are
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    l, acc = torch.zeros(len(q), 1), torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        weights = torch.exp(q @ tile_k.T * scale)
        l += weights.sum(dim=1, keepdim=True)
        acc += weights @ tile_v
    return acc / l
""",
        ),
        Known(
            "tail-dropped",
            hint=2,
            answers=r"""
# %% whole tiles only
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for i in range(len(k) // block):
        tile = slice(i * block, (i + 1) * block)
        scores = q @ k[tile].T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ v[tile]
        m = new
    return acc / l
""",
        ),
        Known(
            "tiles-averaged",
            answers=r"""
# %% a softmax for each tile, then the mean
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    parts = []
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        parts.append(torch.softmax(q @ tile_k.T * scale, dim=1) @ tile_v)
    return torch.stack(parts).mean(dim=0)
""",
        ),
        Known(
            "whole-row",
            hint=2,
            answers=r"""
# %% the plain way
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    return torch.softmax(q @ k.T * scale, dim=1) @ v

# %% scores tile by tile, but all of them kept
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    scores = torch.cat([q @ tile.T * scale for tile in k.split(block)], dim=1)
    weights = torch.exp(scores - scores.amax(dim=1, keepdim=True))
    return weights @ v / weights.sum(dim=1, keepdim=True)
""",
        ),
        Known(
            "two-passes",
            hint=3,
            answers=r"""
# %% the maximum first, in a loop of its own
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    for tile_k in k.split(block):
        m = torch.maximum(m, (q @ tile_k.T * scale).amax(dim=1, keepdim=True))
    l, acc = torch.zeros(len(q), 1), torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        weights = torch.exp(q @ tile_k.T * scale - m)
        l += weights.sum(dim=1, keepdim=True)
        acc += weights @ tile_v
    return acc / l
""",
        ),
        Known(
            "query-by-query",
            hint=1,
            answers=r"""
# %% a loop over the queries around it
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    outputs = []
    for query in q:
        m, l, acc = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(v.shape[1])
        for tile_k, tile_v in zip(k.split(block), v.split(block)):
            scores = tile_k @ query * scale
            new = torch.maximum(m, scores.max())
            rescale, weights = torch.exp(m - new), torch.exp(scores - new)
            l = l * rescale + weights.sum()
            acc = acc * rescale + weights @ tile_v
            m = new
        outputs.append(acc / l)
    return torch.stack(outputs)
""",
        ),
        Known(
            "torch-did-it",
            answers=r"""
# %% torch has it ready
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], scale=scale
    )[0]
""",
        ),
    ),
    right=r"""
# %% queries as columns
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    m, l = torch.full((len(q),), -math.inf), torch.zeros(len(q))
    acc = torch.zeros(v.shape[1], len(q))
    for start in range(0, len(k), block):
        scores = k[start : start + block] @ (q * scale).T
        new = torch.maximum(m, scores.amax(dim=0))
        weights = torch.exp(scores - new)
        l = l * torch.exp(m - new) + weights.sum(dim=0)
        acc = acc * torch.exp(m - new) + v[start : start + block].T @ weights
        m = new
    return (acc / l).T.contiguous()

# %% each tile's softmax, merged by log-sum-exps
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    out, lse = torch.zeros(len(q), v.shape[1]), torch.full((len(q), 1), -math.inf)
    for tile_k, tile_v in zip(torch.split(k, block), torch.split(v, block)):
        scores = torch.einsum("md,nd->mn", q, tile_k) * scale
        tile_lse = torch.logsumexp(scores, dim=1, keepdim=True)
        new = torch.logaddexp(lse, tile_lse)
        out = out * torch.exp(lse - new) + torch.exp(scores - new) @ tile_v
        lse = new
    return out

# %% key by key, whatever the block
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    m, l = torch.full((len(q), 1), -math.inf), torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for key, value in zip(k, v):
        score = (q @ key * scale).unsqueeze(1)
        new = torch.maximum(m, score)
        l = l * torch.exp(m - new) + torch.exp(score - new)
        acc = acc * torch.exp(m - new) + torch.exp(score - new) * value
        m = new
    return acc / l
""",
)
