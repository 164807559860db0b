"""01.2: debug this: the sum depends on the tile size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch01_online_softmax.common import INF, Walk, finite, slips
from minivllm.course.chapters.ch01_online_softmax.watch import first_return, watch
from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, seeded

if TYPE_CHECKING:
    import torch

_BLOCKS = (1, 2, 3, 16)


def _rows() -> list[torch.Tensor]:
    """Short rows, which come in tiles of each of `_BLOCKS`."""
    import torch

    random = seeded(2)
    return [
        torch.tensor([3.0]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([4.0, 3.0, 2.0, 1.0]),
        torch.full((8,), -7.5),
        torch.randn(33, generator=random) * 4,
        torch.randn(32, generator=random) * 4 - 300,
        torch.randn(9, generator=random) * 400,
        torch.tensor([-20300.0, -20150.0, -INF, -20000.0]),
        torch.tensor([2.0, 1.0, -INF, -INF, 0.5]),
        torch.tensor([-INF, -INF, 1.0, 2.0, -INF, 0.0]),
        torch.cat([torch.full((17,), -INF), torch.tensor([-3.0, 5.0])]),
        torch.cat([torch.tensor([5.0, -3.0]), torch.full((35,), -INF), torch.tensor([6.0])]),
        torch.full((5,), -INF),
        torch.randn(20, 3, generator=random)[:, 1],
    ]


def _cases() -> list[tuple[torch.Tensor, int]]:
    import torch

    random = seeded(21)
    cases = [(row, block) for row in _rows() for block in _BLOCKS]
    # The maximum grows a little in each of many tiles.
    slow = torch.linspace(-0.2, 0.5, 1200)
    cases += [(slow, 1), (slow, 7)]
    long = torch.randn(1000, generator=random) * 3
    cases += [(long, block) for block in (5, 100, 128, 999, 1000, 4096)]
    return [*cases, (torch.randn(5001, generator=random) * 3, 2)]


def _right(scores: torch.Tensor, block: int) -> tuple[float, float]:
    m = scores.max()
    return m.item(), (scores - finite(m)).exp().sum().item()


def _numbers(answer: Callable) -> Callable:
    """The answer, with Python numbers in place of tensors without dimensions."""

    def of(scores: torch.Tensor, block: int) -> Any:
        result = answer(scores, block)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise Mistake("wrong-type", f"Return two values, m and l.\nYou return {show(result)}.")
        for name, value in zip("ml", result, strict=True):
            expect(
                not getattr(value, "shape", ()),
                "wrong-shape",
                f"{name} should be one number, a tensor without dimensions.\nYours is"
                f" {show(value)}. A maximum or a sum over a whole tile has no dimensions; with"
                " keepdim=True, or from a slice of length 1, it has one.",
            )
        return tuple(float(value) for value in result)

    return of


def _by(walk: Walk) -> Callable:
    def of(scores: torch.Tensor, block: int) -> tuple[float, float]:
        m, l, _ = walk(scores[None], block)
        return m.item(), l.item()

    return of


def _of_right(change: Callable[[float, float], tuple[float, float]]) -> Callable:
    return lambda scores, block: change(*_right(scores, block))


def check_max_and_sum(answer: Callable) -> str:
    """Judge an answer to 01.2."""
    words = {"item 0: ": "m: ", "item 1: ": "l: "}
    cases = _cases()
    diagnose(_numbers(answer), cases, _right, EXERCISE.suspects, wording=words)
    _expect_one_walk(answer)
    return f"{len(cases)} cases, tiles of 1 to 4096, and each row read once"


def _expect_one_walk(answer: Callable) -> None:
    """The answer reads at most a tile at a time, never an earlier tile, and keeps no tiles."""
    import torch

    # So small tiles that one number of each would be far more than the last of them has.
    block, length = 3, 1003
    scores = torch.randn(length, generator=seeded(22)) * 4
    seen = watch(answer, (scores, block), {"scores": scores})
    widest = seen.widest("scores")
    expect(
        len(widest.rows) <= block,
        "whole-row",
        f"The result is right, but `{widest.operation}` takes in {len(widest.rows)} scores at once,"
        f" in tiles of {block}: the row does not come tile by tile.\nTake each tile's maximum when"
        " you come to it, and rescale the sum when it grows.",
    )
    back = first_return(seen.reads["scores"], block)
    expect(
        back is None,
        "two-passes",
        f"The result is right, but your code goes back to score {back} after it has left that tile:"
        " a second pass.\nThe maximum needs no pass of its own: when it grows, multiply the sum so"
        " far by exp(old - new).",
    )
    expect(
        seen.held < length // block - 50,
        "tiles-kept",
        f"The result is right, but your code holds {seen.held:,} numbers at once, for a row of"
        f" {length:,} in tiles of {block}: it keeps what it has read, or something of every"
        " tile.\nOf all the tiles that went by, keep two numbers: the running m and l.",
    )


_ANSWERS = {
    "tile-under-its-own-maximum": r"""
# %% only the nan is mended
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        tile_max = tile.max()
        weights = torch.exp(tile - torch.where(tile_max == -math.inf, 0.0, tile_max))
        new = torch.maximum(m, tile_max)
        l = l * torch.exp(m - torch.where(new == -math.inf, 0.0, new)) + weights.sum()
        m = new
    return m, l

# %% nan made 0 at the end of each step
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        tile_max = tile.max()
        weights = torch.exp(tile - tile_max)
        new = torch.maximum(m, tile_max)
        l = l * torch.exp(m - new).nan_to_num(0.0) + weights.sum().nan_to_num(0.0)
        m = new
    return m, l
""",
    "masked-tile-is-nan": r"""
# %% only the tiles are mended
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * torch.exp(m - new) + torch.exp(tile - new).sum()
        m = new
    return m, l
""",
    "no-rescale": r"""
# %% takes the tile under the new maximum, and loses the rescaling
@@
-        l = l * torch.exp(m - finite) + torch.exp(tile - finite).sum()
+        l = l + torch.exp(tile - finite).sum()
""",
    "rescaled-the-wrong-way": r"""
# %% new minus old
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * (torch.exp(new - m) if l > 0 else 0.0) + torch.exp(tile - new).sum()
        m = new
    return m, l
""",
    "maximum-starts-at-zero": r"""
# %% 0 in place of -inf gets rid of the nan
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(0.0), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * torch.exp(m - new) + torch.exp(tile - new).sum()
        m = new
    return m, l
""",
    "tile-rescaled-too": r"""
# %% adds, then rescales
@@
-        l = l * torch.exp(m - finite) + torch.exp(tile - finite).sum()
+        l = (l + torch.exp(tile - finite).sum()) * torch.exp(m - finite)
""",
    "maximum-starts-too-high": r"""
# %% -1e4 gets rid of the nan
@@
-    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
+    m, l = torch.tensor(-1e4), torch.tensor(0.0)
""",
    "stops-at-a-masked-tile": r"""
# %% break for continue
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        if tile.max() == -math.inf:
            break
        l = l * torch.exp(m - new) + torch.exp(tile - new).sum()
        m = new
    return m, l
""",
    "only-rising-tiles": r"""
# %% nothing to do without a rise
@@
-        l = l * torch.exp(m - finite) + torch.exp(tile - finite).sum()
-        m = new
+        if new > m:
+            l = l * torch.exp(m - finite) + torch.exp(tile - finite).sum()
+            m = new
""",
    "nan-from-the-first-tile": r"""
# %% a factor without exp
@@
-        l = l * torch.exp(m - finite) + torch.exp(tile - finite).sum()
+        l = l * (m - finite) + torch.exp(tile - finite).sum()
""",
    "guard-changes-low-maxima": r"""
# %% a clamp gets rid of -inf
@@
-        finite = torch.where(new == -math.inf, 0.0, new)
+        finite = new.clamp(min=0.0)
""",
    "stand-in-kept": r"""
# %% 0 becomes the maximum
@@
-        m = new
+        m = finite
""",
    "guard-looks-at-the-tile": r"""
# %% asks the tile, not the maximum
@@
-        finite = torch.where(new == -math.inf, 0.0, new)
+        finite = torch.where(tile.max() == -math.inf, 0.0, new)
""",
}


#: Walks that still have the first bug, and not the second.
_OWN_MAXIMUM = (Walk(under="tile"), Walk(under="tile", guards_weights=False))


def _slips() -> tuple[Known, ...]:
    """The chapter's slips; both bugs of the given code together are `not-mended`."""
    hints = {"tile-under-its-own-maximum": 2, "masked-tile-is-nan": 3, "no-rescale": 2}
    hints |= {"stops-at-a-masked-tile": 3, "guard-looks-at-the-tile": 3}
    known = slips(
        _by,
        hints,
        _ANSWERS,
        without=(
            *(
                "one-maximum-for-all-rows",
                "one-sum-for-all-rows",
                "output-not-rescaled",
                "sum-not-rescaled",
            ),
            "divided-in-each-tile",
        ),
    )
    own = "tile-under-its-own-maximum"
    return tuple(
        replace(slip, suspects=tuple(map(_by, _OWN_MAXIMUM))) if slip.name == own else slip
        for slip in known
    )


EXERCISE = Exercise(
    id="01.2",
    title="Debug this: the sum depends on the tile size",
    check=check_max_and_sum,
    mistakes=(
        Known(
            "not-mended",
            "Both bugs are still there. Each tile's weights are taken under the tile's own maximum,"
            " and a tile in which everything is masked gives -inf - -inf = nan.\nCompare the tile's"
            " weights with the claim that l must keep: l = Σ exp(score - m).",
            hint=1,
            suspects=(_by(Walk(under="tile", guarded=False)),),
            answers=r"""
# %% as it was given
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        tile_max = tile.max()
        weights = torch.exp(tile - tile_max)
        new = torch.maximum(m, tile_max)
        l = l * torch.exp(m - new) + weights.sum()
        m = new
    return m, l
""",
        ),
        *_slips(),
        Known(
            "logarithm-of-the-sum",
            "Your l is a logarithm: that of the sum, or the log-sum-exp. Asked is the sum itself, l"
            " = Σ exp(score - m).\nThe logarithm is for parts that are merged later, in 01.4.",
            suspects=(
                _of_right(lambda m, l: (m, math.log(l) if l else -INF)),
                _of_right(lambda m, l: (m, m + math.log(l) if l else -INF)),
            ),
        ),
        Known(
            "results-swapped",
            "m and l come in the wrong order.\nReturn the maximum first, then the sum.",
            suspects=(_of_right(lambda m, l: (l, m)),),
        ),
        Known(
            "sum-without-maximum",
            "Your l is Σ exp(score), without the maximum: for large scores that is inf.\nThe"
            " exponents are score - m.",
            suspects=(lambda scores, block: (scores.max().item(), scores.exp().sum().item()),),
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% goes on from the row before
@@
+running = {}
+
+
 def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
@@
-    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
+    m, l = running.get(block, (torch.tensor(-math.inf), torch.tensor(0.0)))
@@
-    return m, l
+    running[block] = m, l
+    return m, l
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% stops after 2,000 tiles
@@
-    for tile in scores.split(block):
+    for tile in scores.split(block)[:2000]:
""",
        ),
        Known(
            "wrong-shape",
            answers=r"""
# %% one number in a row of one
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.full((1,), -math.inf), torch.zeros(1)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        finite = torch.where(new == -math.inf, 0.0, new)
        l = l * torch.exp(m - finite) + torch.exp(tile - finite).sum()
        m = new
    return m, l
""",
        ),
        Known(
            "tiles-kept",
            answers=r"""
# %% copies of all tiles, for a second pass
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    tiles = [tile.clone() for tile in scores.split(block)]
    m = torch.stack([tile.max() for tile in tiles]).max()
    finite = torch.where(m == -math.inf, 0.0, m)
    return m, sum(torch.exp(tile - finite).sum() for tile in tiles)

# %% all scores as Python numbers, tile by tile
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[float, float]:
    kept = []
    for tile in scores.split(block):
        kept.extend(tile.tolist())
    m = max(kept)
    return m, sum(math.exp(x - m) for x in kept if x > -math.inf)

# %% the exps of each tile, in a list of lists
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[float, float]:
    m, kept = -math.inf, []
    for tile in scores.split(block):
        top = max(float(x) for x in tile)
        if top > -math.inf:
            kept.append((top, [math.exp(float(x) - top) for x in tile]))
            m = max(m, top)
    return m, sum(sum(exps) * math.exp(top - m) for top, exps in kept)

# %% each tile's maximum and sum, merged at the end
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    ms, ls = [], []
    for tile in scores.split(block):
        top = tile.max()
        ms.append(top)
        ls.append(torch.exp(tile - torch.where(top == -math.inf, 0.0, top)).sum())
    m = torch.stack(ms).max()
    finite = torch.where(m == -math.inf, 0.0, m)
    return m, sum(l * torch.exp(top - finite) for top, l in zip(ms, ls))

# %% the same as Python numbers
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[float, float]:
    ms, ls = [], []
    for tile in scores.split(block):
        top = tile.max().item()
        ms.append(top)
        ls.append(torch.exp(tile - top).sum().item() if top > -math.inf else 0.0)
    m = max(ms)
    if m == -math.inf:
        return m, 0.0
    return m, sum(l * math.exp(top - m) for top, l in zip(ms, ls))
""",
        ),
        Known(
            "two-passes",
            answers=r"""
# %% the maximum first, in a loop of its own
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        m = torch.maximum(m, tile.max())
    finite = torch.where(m == -math.inf, 0.0, m)
    for tile in scores.split(block):
        l = l + torch.exp(tile - finite).sum()
    return m, l
""",
        ),
        Known(
            "whole-row",
            answers=r"""
# %% the maximum of the row before its tiles
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m = scores.max()
    finite = torch.where(m == -math.inf, 0.0, m)
    return m, sum(torch.exp(tile - finite).sum() for tile in scores.split(block))

# %% by the log-sum-exp of all
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m = torch.tensor(-math.inf)
    for tile in scores.split(block):
        m = torch.maximum(m, tile.max())
    finite = torch.where(m == -math.inf, 0.0, m)
    return m, torch.exp(torch.logsumexp(scores, 0) - finite)

# %% as a list
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[float, float]:
    row = scores.tolist()
    m = max(row)
    return m, sum(math.exp(x - m) for x in row if x > -math.inf)
""",
        ),
    ),
    right=r"""
# %% score by score, whatever the block
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for x in scores:
        new = torch.maximum(m, x)
        finite = torch.where(new == -math.inf, 0.0, new)
        l = l * torch.exp(m - finite) + torch.exp(x - finite)
        m = new
    return m, l

# %% each tile under its own maximum, then merged
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        tile_max = tile.max()
        if tile_max == -math.inf:
            continue
        new = torch.maximum(m, tile_max)
        l = l * torch.exp(m - new) + torch.exp(tile - tile_max).sum() * torch.exp(
            tile_max - new
        )
        m = new
    return m, l

# %% plain floats
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[float, float]:
    m, l = -math.inf, 0.0
    for start in range(0, len(scores), block):
        tile = scores[start : start + block].tolist()
        new = max(m, *tile)
        if new > -math.inf:
            l = l * math.exp(m - new) + sum(math.exp(x - new) for x in tile)
            m = new
    return m, l

# %% a sum per tile, the larger one of both maxima keeps its sum as it is
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        top = tile.max()
        own = (tile - torch.nan_to_num(top, neginf=0.0)).exp().sum()
        if top > m:
            m, l = top, own + l * torch.exp(m - top)
        elif top > -math.inf:
            l = l + own * torch.exp(top - m)
    return m, l

# %% from the end of the row
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in reversed(scores.split(block)):
        if tile.max() > -math.inf:
            old, m = m, torch.maximum(m, tile.max())
            l = l * (old - m).exp() + (tile - m).exp().sum()
    return m, l

# %% in float64, as 0-dimensional tensors
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0, dtype=torch.float64)
    for start in range(0, scores.shape[0], block):
        tile = scores[start : start + block]
        new = max(m, tile.max())
        l = (l * (m - new).exp()).nan_to_num(0.0)
        l = l + (tile - new).double().exp().nan_to_num(0.0).sum()
        m = new
    return m, l
""",
)
