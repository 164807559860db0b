"""01.2: debug this: the sum depends on the tile size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import (
    expect,
    seeded,
)

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch01_online_softmax.common import INF, the_finite, the_online
from minivllm.course.grading.exercise import Exercise, Known


def check_max_and_sum(answer: Callable) -> str:
    import torch

    random = seeded(2)
    rows = [
        torch.tensor([3.0]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([4.0, 3.0, 2.0, 1.0]),
        torch.full((8,), -7.5),
        torch.randn(33, generator=random) * 4,
        torch.randn(64, generator=random) * 4 - 300,
        torch.tensor([2.0, 1.0, -INF, -INF, 0.5]),
        torch.tensor([-INF, -INF, 1.0, 2.0, -INF, 0.0]),
        torch.full((5,), -INF),
    ]
    cases = [(row, block) for row in rows for block in (1, 2, 4, 16)]

    def right(scores: torch.Tensor, block: int) -> tuple[float, float]:
        m = scores.max()
        return m.item(), torch.exp(scores - the_finite(m)).sum().item()

    def numbers(function: Callable) -> Callable:
        def of(scores: torch.Tensor, block: int) -> Any:
            result = function(scores, block)
            if isinstance(result, tuple | list) and len(result) == 2:
                return tuple(float(value) for value in result)
            return result

        return of

    own = (
        "Each tile's weights are taken under the tile's own maximum. Where an earlier tile held a"
        " larger score, they are too large: they must be taken under the same maximum as the rest"
        " of the sum."
    )
    nan = (
        "A tile in which everything is masked still gives -inf - -inf = nan, if no score came"
        " before it."
    )
    suspects = {
        "not-mended": (
            (
                f"Both bugs are still there. {own}\n{nan} Compare the tile's weights with the claim"
                " that l must keep: l = Σ exp(score - m)."
            ),
            partial(the_online, tile_sum="own", guarded_max=False),
        ),
        "tile-under-its-own-maximum": (
            (
                f"Masked tiles are right now. But: {own}\nUnder which maximum does the sum stand"
                " once the tile is in it?"
            ),
            partial(the_online, tile_sum="own"),
        ),
        "masked-tile-is-nan": (
            (
                f"The tiles agree now. But: {nan}\nOnce l is nan it stays nan. When the new maximum"
                " is -inf, subtract 0 instead: exp(-inf - 0) is 0, which is what a masked score is"
                " worth."
            ),
            partial(the_online, guarded_max=False),
        ),
        "no-rescale": (
            (
                "What was summed before is not rescaled when the maximum grows: older pieces stay"
                " as they were, under a maximum that no longer holds.\nMultiply the old sum by"
                " exp(old maximum - new maximum)."
            ),
            partial(the_online, rescale="none"),
            partial(the_online, rescale="none", guarded_max=False),
        ),
        "rescaled-the-wrong-way": (
            (
                "The old sum grows when the maximum grows. Its terms are exp(score - maximum):"
                " under a larger maximum they must shrink.\nThe factor is exp(old - new), at"
                " most 1."
            ),
            partial(the_online, rescale="swapped"),
            partial(the_online, rescale="swapped", guarded_max=False),
        ),
        "maximum-starts-at-zero": (
            (
                "Your running maximum starts at 0. A row of negative scores then has the maximum 0,"
                " which is not among them, and far below it everything underflows to a sum of"
                " 0.\nStart at -inf: exp(-inf) = 0 rescales the empty sum."
            ),
            partial(the_online, start=0.0),
            partial(the_online, start=0.0, guarded_max=False),
        ),
    }
    suspects = {
        name: (why, *map(numbers, functions)) for name, (why, *functions) in suspects.items()
    }
    diagnose(
        numbers(answer), cases, right, suspects, wording={"item 0: ": "m: ", "item 1: ": "l: "}
    )
    _expect_one_walk(answer)
    return f"{len(rows)} rows in tiles of 1, 2, 4 and 16"


def _expect_one_walk(answer: Callable) -> None:
    """Watch where in the row each operation reads: at most a tile at a time, and never back to
    an earlier tile.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    block = 16
    scores = torch.randn(5 * block, generator=seeded(22)) * 4
    place = scores.untyped_storage().data_ptr()
    reads: list[tuple[int, int, str]] = []  # first score, how many, by what

    def within(tree: Any) -> list[torch.Tensor]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() == place]

    def note(args: Any, name: str) -> None:
        reads.extend((tensor.storage_offset(), tensor.numel(), name) for tensor in within(args))

    class Python(TorchFunctionMode):  # what goes to Python's own numbers
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = getattr(func, "__name__", "")
            if name in ("tolist", "numpy", "__array__"):
                note(args, name)
            return func(*args, **(kwargs or {}))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if not within(result):  # else a view, which reads nothing
                note((args, kwargs), func.overloadpacket.__name__.strip("_"))
            return result

    with Python(), Watch():
        answer(scores, block)
    farthest = 0
    for first, count, name in reads:
        expect(
            count <= block,
            "whole-row",
            f"The result is right, but `{name}` takes in {count} scores at once, in tiles of"
            f" {block}: the row does not come tile by tile.\nTake each tile's maximum when you come"
            " to it, and rescale the sum when it grows.",
        )
        expect(
            first >= farthest,
            "two-passes",
            f"The result is right, but after score {farthest} your code goes back to score {first}:"
            " a second pass.\nThe maximum needs no pass of its own: when it grows, multiply the"
            " sum so far by exp(old - new).",
        )
        farthest = first


EXERCISE = Exercise(
    id="01.2",
    title="Debug this: the sum depends on the tile size",
    check=check_max_and_sum,
    mistakes=(
        Known(
            "not-mended",
            hint=1,
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
        Known(
            "tile-under-its-own-maximum",
            hint=2,
            answers=r"""
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
        ),
        Known(
            "masked-tile-is-nan",
            hint=3,
            answers=r"""
# %% only the tiles are mended
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * torch.exp(m - new) + torch.exp(tile - new).sum()
        m = new
    return m, l
""",
        ),
        Known(
            "no-rescale",
            hint=2,
            answers=r'''
# %% takes the tile under the new maximum, and loses the rescaling
@@
-    """Maximum m of a row [N] and the sum of exp(score - m), in one pass over tiles of `block`."""
@@
-        l = l * torch.exp(m - finite) + torch.exp(tile - finite).sum()
+        l = l + torch.exp(tile - finite).sum()
''',
        ),
        Known(
            "rescaled-the-wrong-way",
            answers=r"""
# %% new minus old
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * (torch.exp(new - m) if l > 0 else 0.0) + torch.exp(tile - new).sum()
        m = new
    return m, l
""",
        ),
        Known(
            "maximum-starts-at-zero",
            answers=r"""
# %% 0 in place of -inf gets rid of the nan
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(0.0), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * torch.exp(m - new) + torch.exp(tile - new).sum()
        m = new
    return m, l
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
""",
)
