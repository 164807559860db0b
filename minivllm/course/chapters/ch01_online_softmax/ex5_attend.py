"""01.5: softmax·V in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch01_online_softmax.common import Walk, slips
from minivllm.course.chapters.ch01_online_softmax.watch import Seen, first_return, watch
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import ATTENTION, expect, expect_own_work, seeded

if TYPE_CHECKING:
    import torch

#: q, k, v, scale, block.
Case = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor", float, int]
_ATTENTION = (
    *ATTENTION,
    "scaled_dot_product_flash_attention_for_cpu",
    "scaled_dot_product_attention_math",
)


def _drawn(random: torch.Generator) -> Callable[..., Case]:
    """What makes cases of these sizes."""
    import torch

    def case(
        queries: int, keys: int, dim: int, value_dim: int, block: int, scale: float = 0.3
    ) -> Case:
        q, k = (torch.randn(n, dim, generator=random) for n in (queries, keys))
        return q, k, torch.randn(keys, value_dim, generator=random), scale, block

    return case


def _cases() -> list[Case]:
    """Few queries and many, one key and many, tiles of 1 and tiles beyond the context."""
    import torch

    case = _drawn(seeded(5))
    simple = (
        torch.ones(1, 1),
        torch.tensor([[1.0], [2.0], [0.0]]),
        torch.tensor([[1.0], [0.0], [0.0]]),
        1.0,
        1,
    )
    return [
        case(1, 1, 1, 1, 4),
        simple,
        case(1, 5, 4, 3, 8, scale=0.5),
        case(3, 8, 4, 4, 4),
        case(4, 33, 8, 6, 16, scale=1.0),
        case(5, 7, 4, 4, 1),
        case(8, 32, 16, 16, 8, scale=0.25),
        case(6, 6, 6, 6, 3),
        case(40, 7, 3, 5, 5),
        case(3, 21, 8, 8, 4, scale=9.0),
        case(130, 20, 4, 1, 7, scale=1.7),
        case(2, 1500, 8, 3, 64),
        case(1, 2600, 4, 2, 1),
        *_shaped(case),
        _faint(case),
    ]


def _shaped(case: Callable[..., Case]) -> list[Case]:
    """Scores that fall, rise, rise slowly, are equal, are far from 0; and strided inputs."""
    import torch

    falling, rising = case(1, 12, 4, 4, 4, scale=0.5), case(2, 16, 4, 3, 4, scale=0.5)
    for (q, k, *_), sign in ((falling, -1.0), (rising, 1.0)):
        k.copy_((sign * torch.linspace(-2, 2, len(k))).unsqueeze(1) * q[0] / q[0].norm() * 2)
    slow, equal = case(1, 900, 1, 2, 1, scale=1.0), case(3, 8, 4, 5, 4)
    slow[0].fill_(1.0)
    slow[1].copy_(torch.linspace(-0.2, 0.5, 900).unsqueeze(1))
    equal[1].fill_(0.5)
    # The scores of one query are high, of the other low.
    far = case(2, 9, 4, 4, 4, scale=0.5)
    far[1].mul_(0.01).add_(2.0)
    far[0].copy_(torch.tensor([[40.0] * 4, [-40.0] * 4]))
    # Large scores are exact and far apart here, so that rounding does not show.
    low, giant = case(1, 11, 2, 3, 4, scale=1.0), case(2, 13, 1, 3, 4, scale=1.0)
    column = -100.0 - 1.5 * torch.tensor([3, 4, 2, 9, 1, 5, 2, 6, 5, 3, 7])
    low = (low[0].fill_(100.0), torch.stack([column, column]).T, *low[2:])
    giant[0].copy_(torch.tensor([[8.0], [-8.0]]))
    giant[1][0], giant[1][12] = -1250.0, 1250.0
    falls_far = case(1, 12, 1, 2, 3, scale=1.0)
    falls_far[0].fill_(1.0)
    falls_far[1].copy_(-60.0 * torch.arange(12).unsqueeze(1))
    # Columns as queries, and one of two heads that lie side by side.
    q, (_, k, v, *_) = torch.randn(6, 3, generator=seeded(51)).T, case(3, 20, 6, 2, 4)
    k, v = k.view(10, 2, 6)[:, 1], v.view(10, 2, 2)[:, 0]
    # One query's scores lie below all that people take for minus infinity.
    deep = case(2, 11, 1, 3, 4, scale=1.0)
    deep[0].copy_(torch.tensor([[2.0**60], [2.0**-60]]))
    deep[1].copy_(-(2.0**60) * (1 + torch.arange(11)[:, None] * 5 % 11))
    return [falling, rising, slow, equal, far, low, giant, falls_far, deep, (q, k, v, 0.4, 4)]


def _faint(case: Callable[..., Case]) -> Case:
    """Keys whose weights are about e⁻³⁰, and whose values are so large that they count."""
    q, k, v, scale, block = case(3, 40, 4, 2, 4, scale=0.5)
    k[:, 0], q[:, 0] = 0.0, 1.0 / scale
    k[21:, 0], v[21:] = -30.0, v[21:] * 1e15
    return q, k, v, scale, block


def _right(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    return (q @ k.T * scale).softmax(dim=1) @ v


def _averaged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    tiles = zip(k.split(block), v.split(block), strict=True)
    parts = [_right(q, key, value, scale, block) for key, value in tiles]
    return sum(parts[1:], parts[0]) / len(parts)


def _by(walk: Walk, divide: bool = True) -> Callable:
    def of(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
    ) -> torch.Tensor:
        _, l, acc = walk(q @ k.T * scale, block, v)
        return acc / l if divide and not walk.divides_each else acc

    return of


def _by_count(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    return _by(Walk(), divide=False)(q, k, v, scale, block) / len(k)


def check_attend(answer: Callable) -> str:
    """Judge an answer to 01.5."""
    cases = _cases()
    diagnose(answer, cases, _right, EXERCISE.suspects)
    for case in (cases[0], cases[4], cases[11]):
        expect_own_work(answer, case, _ATTENTION, "exp, maxima, sums and products")
    _expect_one_pass(answer, _drawn(seeded(52))(5, 1003, 8, 6, 8))
    return f"{len(cases)} cases, each key and value read once, and no row of scores kept"


def _expect_one_pass(answer: Callable, case: Case) -> None:
    """Watch what is read of keys and values, and how much is held."""
    q, k, v, _, block = case
    seen = watch(answer, case, {"keys": k, "values": v})
    expect(
        seen.largest not in (tuple(k.shape), tuple(v.shape), tuple(k.T.shape), tuple(v.T.shape)),
        "all-keys-at-once",
        f"The result is right, but on the way you made a tensor {list(seen.largest)}: all"
        f" {len(k)} keys or values, copied or scaled before the walk.\nTake each of them when its"
        " tile comes, at most `block` at a time. What is the same for all keys can be done to the"
        " tile, or to q.",
    )
    _expect_small_tiles(seen, len(k), block)
    for name, tensor in (("keys", k), ("values", v)):
        times = sum(read.numbers for read in seen.reads[name]) / tensor.numel()
        if times > 1.01:
            _raise_read_again(name, times, len(q), first_return(seen.reads[name], block))
    expect(
        seen.held < len(k),
        "tiles-kept",
        f"The result is right, but your code holds {seen.held:,} numbers at once, for {len(k):,}"
        " keys: it keeps something of every tile.\nOf the tiles that went by, keep a maximum, a"
        " sum and an output for each query, and nothing else.",
    )


def _expect_small_tiles(seen: Seen, length: int, block: int) -> None:
    """No operation takes in more than a tile, or makes as many numbers as there are keys."""
    if math.prod(seen.largest) >= length:
        read = max(len(seen.widest(name).rows) for name in seen.reads)
        name = "tile-too-large" if read > block else "tiles-kept"
        raise Mistake(
            "whole-row" if length in seen.largest else name,
            f"The result is right, but on the way you made a tensor {list(seen.largest)}, for a"
            f" context of {length} keys in tiles of {block}.\nThis exercise does without the row of"
            " scores: hold no more than the scores of a tile, [M, block].",
        )
    for name in seen.reads:
        widest = seen.widest(name)
        expect(
            len(widest.rows) <= block,
            "tile-too-large",
            f"The result is right, but `{widest.operation}` takes in {len(widest.rows)} {name} at"
            f" once.\nA tile has at most {block} keys, as `block` says.",
        )


def _raise_read_again(name: str, times: float, queries: int, back: int | None) -> None:
    if round(times) == queries:
        mistake, why = (
            "query-by-query",
            "A loop over the queries reads them anew for each query: handle all queries of a tile"
            " together.",
        )
    elif back is not None:
        mistake, why = (
            "two-passes",
            f"Your code goes back to number {back} after it has left that tile. The maximum needs"
            " no pass of its own: rescale instead.",
        )
    else:
        mistake, why = (
            "tile-read-again",
            "A tile is used more than once before the next one comes. Compute its scores once, and"
            " use those.",
        )
    raise Mistake(
        mistake, f"The result is right, but the {name} were read {times:.1f} times.\n{why}"
    )


_ANSWERS = {
    "output-not-rescaled": r"""
# %% the sum is rescaled, the output forgotten
@@
-        acc = acc * rescale + weights @ tile_v
+        acc = acc + weights @ tile_v
""",
    "sum-not-rescaled": r"""
# %% the output is rescaled, the sum forgotten
@@
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
+        l = l + weights.sum(dim=1, keepdim=True)
""",
    "no-rescale": r"""
# %% neither is
@@
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
-        acc = acc * rescale + weights @ tile_v
+        l = l + weights.sum(dim=1, keepdim=True)
+        acc = acc + weights @ tile_v
""",
    "rescaled-the-wrong-way": r"""
# %% new minus old
@@
-        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
+        rescale, weights = (
+            torch.where(m == -math.inf, 0.0, torch.exp(new - m)),
+            torch.exp(scores - new),
+        )
""",
    "tile-under-its-own-maximum": r"""
# %% weights under the tile's maximum
@@
-        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
+        rescale, weights = (
+            torch.exp(m - new),
+            torch.exp(scores - scores.amax(dim=1, keepdim=True)),
+        )
""",
    "no-maximum": r"""
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
    "tail-dropped": r"""
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
    "one-maximum-for-all-rows": r"""
# %% scores.max() is the largest of all queries
@@
-        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
+        new = torch.maximum(m, scores.max())
""",
    "one-sum-for-all-rows": r"""
# %% weights.sum() is the sum of all queries
@@
-        l = l * rescale + weights.sum(dim=1, keepdim=True)
+        l = l * rescale + weights.sum()
""",
    "divided-in-each-tile": r"""
# %% divides in the loop
@@
-        acc = acc * rescale + weights @ tile_v
+        acc = (acc * rescale + weights @ tile_v) / l
@@
-    return acc / l
+    return acc
""",
    "maximum-starts-too-high": r"""
# %% -1e4 in place of -inf
@@
-    m = torch.full((len(q), 1), -math.inf)
+    m = torch.full((len(q), 1), -1e4)

# %% -1e30 in place of -inf
@@
-    m = torch.full((len(q), 1), -math.inf)
+    m = torch.full((len(q), 1), -1e30)
""",
    "maximum-of-the-last-tile": r"""
# %% the old maximum is not asked
@@
-        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
+        new = scores.amax(dim=1, keepdim=True)
""",
    "maximum-not-kept": r"""
# %% forgets m = new
@@
-        m = new
""",
}


EXERCISE = Exercise(
    id="01.5",
    title="softmax·V in one pass",
    check=check_attend,
    mistakes=(
        *slips(
            _by,
            {
                **dict.fromkeys(
                    (
                        *("output-not-rescaled", "sum-not-rescaled", "no-rescale"),
                        *("tile-under-its-own-maximum", "divided-in-each-tile"),
                    ),
                    3,
                ),
                "one-maximum-for-all-rows": 1,
                "tail-dropped": 2,
            },
            _ANSWERS,
            # Nothing is masked here.
            without=(
                *("masked-tile-is-nan", "stops-at-a-masked-tile", "guard-looks-at-the-tile"),
                *("tiles-with-masked-scores-left-out", "guard-changes-low-maxima"),
                "stand-in-kept",
            ),
        ),
        Known(
            "not-divided",
            "Your output is the weighted sum, not yet the weighted average: nothing divides it by"
            " l.\nDivide once, at the end.",
            hint=3,
            suspects=(_by(Walk(), divide=False),),
            answers=r"""
# %% the weighted sum
@@
-    return acc / l
+    return acc
""",
        ),
        Known(
            "divided-by-the-count",
            "You divide the weighted sum by the number of keys. The weights do not add up to that,"
            " but to l.\nDivide by l, the sum of the weights.",
            hint=3,
            suspects=(_by_count,),
            answers=r"""
# %% a mean of the weighted values
@@
-    return acc / l
+    return acc / len(k)
""",
        ),
        Known(
            "tiles-averaged",
            "You take a softmax for each tile and average the results: a tile of unimportant keys"
            " counts as much as any other.\nThe tiles share one sum: keep m, l and acc over all of"
            " them.",
            suspects=(_averaged,),
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
            "no-scale",
            "Your scores are q·k, without the scale.\nscale is an argument: multiply the scores by"
            " it.",
            suspects=(lambda q, k, v, scale, block: _right(q, k, v, 1.0, block),),
            answers=r"""
# %% scale is not used
@@
-        scores = q @ tile_k.T * scale
+        scores = q @ tile_k.T
""",
        ),
        Known(
            "scale-from-head-dim",
            "You scale the scores by 1 / √D, whatever `scale` says.\nscale is an argument: a model"
            " may choose another one. Use what you are given.",
            suspects=(
                lambda q, k, v, scale, block: _right(q, k, v, q.shape[1] ** -0.5, block),
                lambda q, k, v, scale, block: _right(q, k, v, v.shape[1] ** -0.5, block),
            ),
            answers=r"""
# %% as in the formula of the paper
@@
-        scores = q @ tile_k.T * scale
+        scores = q @ tile_k.T / math.sqrt(q.shape[1])
""",
        ),
        Known(
            "scaled-twice",
            "Your scores are scaled twice.\nMultiply them by `scale` once, and by nothing else.",
            suspects=(
                lambda q, k, v, scale, block: _right(q, k, v, scale * scale, block),
                lambda q, k, v, scale, block: _right(q, k, v, scale * q.shape[1] ** -0.5, block),
            ),
            answers=r"""
# %% 1 / sqrt(D) once more
@@
-        scores = q @ tile_k.T * scale
+        scores = q @ tile_k.T * scale / math.sqrt(q.shape[1])
""",
        ),
        Known(
            "divided-by-scale",
            "You divide the scores by `scale`.\nThe scores are scale · q·k: multiply.",
            suspects=(lambda q, k, v, scale, block: _right(q, k, v, 1 / scale, block),),
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
            "all-keys-at-once",
            hint=2,
            answers=r"""
# %% scales the keys, not the scores
@@
-    for tile_k, tile_v in zip(k.split(block), v.split(block)):
+    k, scale = k * scale, 1.0
+    for tile_k, tile_v in zip(k.split(block), v.split(block)):

# %% values made contiguous first
@@
-    for tile_k, tile_v in zip(k.split(block), v.split(block)):
+    for tile_k, tile_v in zip(k.split(block), v.clone().split(block)):
""",
        ),
        Known(
            "tile-too-large",
            answers=r"""
# %% tiles of one less than all
@@
-    for tile_k, tile_v in zip(k.split(block), v.split(block)):
+    block = max(block, len(k) - 1)
+    for tile_k, tile_v in zip(k.split(block), v.split(block)):
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
            "tile-read-again",
            hint=3,
            answers=r"""
# %% the scores twice, once for the maximum
@@
-        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
+        again = q @ tile_k.T * scale
+        new = torch.maximum(m, again.amax(dim=1, keepdim=True))
""",
        ),
        Known(
            "tiles-kept",
            hint=3,
            answers=r"""
# %% the scores of all tiles in a list
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    tiles = [q @ tile.T * scale for tile in k.split(block)]
    m = torch.full((len(q), 1), -math.inf)
    for scores in tiles:
        m = torch.maximum(m, scores.amax(dim=1, keepdim=True))
    l, acc = torch.zeros(len(q), 1), torch.zeros(len(q), v.shape[1])
    for scores, tile_v in zip(tiles, v.split(block)):
        weights = torch.exp(scores - m)
        l += weights.sum(dim=1, keepdim=True)
        acc += weights @ tile_v
    return acc / l
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
        Known(
            "left-torch",
            answers=r"""
# %% the loop in NumPy
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int
) -> torch.Tensor:
    import numpy as np

    q, k, v = q.numpy(), k.numpy(), v.numpy()
    m, l = np.full((len(q), 1), -np.inf, np.float32), 0.0
    acc = np.zeros((len(q), v.shape[1]), np.float32)
    for start in range(0, len(k), block):
        scores = q @ k[start : start + block].T * scale
        new = np.maximum(m, scores.max(axis=1, keepdims=True))
        rescale, weights = np.exp(m - new), np.exp(scores - new)
        l = l * rescale + weights.sum(axis=1, keepdims=True)
        acc = acc * rescale + weights @ v[start : start + block]
        m = new
    return torch.from_numpy((acc / l).astype(np.float32))
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% leaves out tiles whose weights are small
@@
         new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
+        if (scores.amax(dim=1, keepdim=True) < new - 20).all():
+            continue

# %% stops after 2,500 tiles
@@
-    for tile_k, tile_v in zip(k.split(block), v.split(block)):
+    for tile_k, tile_v in zip(k.split(block)[:2500], v.split(block)):
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
