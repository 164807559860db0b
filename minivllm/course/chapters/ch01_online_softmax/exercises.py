"""Chapter 01, online softmax: the checks of its exercises."""

from __future__ import annotations

import ast
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.checking import (
    BEYOND,
    Mistake,
    counted,
    diagnose,
    engine_agrees,
    exercise,
    expect,
    expect_all,
    expect_own_work,
    expect_triton,
    guarded,
    seeded,
    show,
)

if TYPE_CHECKING:
    import torch

INF = math.inf


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """What to subtract: the maximum, but 0 for -inf, because -inf - -inf is NaN."""
    return maximum.masked_fill(maximum == -INF, 0.0)


# --- 01.1 -----------------------------------------------------------------------------------------


@exercise(
    "01.1",
    "Warm-up: safe softmax",
    hints={
        "no-maximum": 1,
        "clamped": 1,
        "one-maximum-for-all-rows": 2,
        "sum-over-all-rows": 2,
        "wrong-axis": 2,
    },
)
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
            lambda x: by_exp(x - _finite(x.amax(dim=0, keepdim=True)), dim=0),
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


# --- 01.2 -----------------------------------------------------------------------------------------


def _online(
    scores: torch.Tensor,
    block: int,
    *,
    start: float = -INF,
    guarded_max: bool = True,
    tile_sum: str = "running",
    rescale: str = "right",
    tail: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence by tiles, right by default, and wrong in the ways that the options name."""
    import torch

    safe = _finite if guarded_max else (lambda maximum: maximum)
    m, l = torch.tensor(start), torch.tensor(0.0)
    for tile in scores.split(block):
        if not tail and len(tile) < block:
            break
        tile_max = tile.max()
        new = torch.maximum(m, tile_max)
        base = {"running": new, "own": tile_max, "old": m if m > -INF else new}[tile_sum]
        added = torch.exp(tile - safe(base)).sum()
        factors = {
            "right": lambda old, new: torch.exp(old - safe(new)),
            "none": lambda old, new: 1.0,
        }
        factors["swapped"] = lambda old, new: torch.exp(new - old) if old > -INF else 0.0
        l = l * factors[rescale](m, new) + added
        m = new
    return m, l


@exercise(
    "01.2",
    "Debug this: the sum depends on the tile size",
    hints={
        "not-mended": 1,
        "tile-under-its-own-maximum": 2,
        "no-rescale": 2,
        "masked-tile-is-nan": 3,
    },
)
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
        return m.item(), torch.exp(scores - _finite(m)).sum().item()

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
            partial(_online, tile_sum="own", guarded_max=False),
        ),
        "tile-under-its-own-maximum": (
            (
                f"Masked tiles are right now. But: {own}\nUnder which maximum does the sum stand"
                " once the tile is in it?"
            ),
            partial(_online, tile_sum="own"),
        ),
        "masked-tile-is-nan": (
            (
                f"The tiles agree now. But: {nan}\nOnce l is nan it stays nan. When the new maximum"
                " is -inf, subtract 0 instead: exp(-inf - 0) is 0, which is what a masked score is"
                " worth."
            ),
            partial(_online, guarded_max=False),
        ),
        "no-rescale": (
            (
                "What was summed before is not rescaled when the maximum grows: older pieces stay"
                " as they were, under a maximum that no longer holds.\nMultiply the old sum by"
                " exp(old maximum - new maximum)."
            ),
            partial(_online, rescale="none"),
            partial(_online, rescale="none", guarded_max=False),
        ),
        "rescaled-the-wrong-way": (
            (
                "The old sum grows when the maximum grows. Its terms are exp(score - maximum):"
                " under a larger maximum they must shrink.\nThe factor is exp(old - new), at"
                " most 1."
            ),
            partial(_online, rescale="swapped"),
            partial(_online, rescale="swapped", guarded_max=False),
        ),
        "maximum-starts-at-zero": (
            (
                "Your running maximum starts at 0. A row of negative scores then has the maximum 0,"
                " which is not among them, and far below it everything underflows to a sum of"
                " 0.\nStart at -inf: exp(-inf) = 0 rescales the empty sum."
            ),
            partial(_online, start=0.0),
            partial(_online, start=0.0, guarded_max=False),
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


# --- 01.3 -----------------------------------------------------------------------------------------


class _Memory:
    """A row that counts what is read and written."""

    def __init__(self, row: Sequence[float]) -> None:
        self.row, self.moves = list(row), 0

    def __getitem__(self, i: int) -> float:
        self.moves += 1
        return self.row[i]

    def __setitem__(self, i: int, value: float) -> None:
        self.moves += 1
        self.row[i] = value


def _count_moves(online: bool, n: int = 64) -> int:
    """Numbers moved per number of a row, counted while it is done."""
    x, out = _Memory([math.sin(i) for i in range(n)]), _Memory([0.0] * n)
    if online:
        m, l = -INF, 0.0
        for i in range(n):
            score = x[i]
            new = max(m, score)
            m, l = new, l * math.exp(m - new) + math.exp(score - new)
    else:
        m = max(x[i] for i in range(n))
        l = sum(math.exp(x[i] - m) for i in range(n))
    for i in range(n):
        out[i] = math.exp(x[i] - m) / l
    return (x.moves + out.moves) // n


def _count_exps(n: int, block: int) -> int:
    """How often exp is taken for the maximum and sum of a row of n."""
    exps, m, l = 0, -INF, 0.0

    def exp(x: float) -> float:
        nonlocal exps
        exps += 1
        return math.exp(x)

    row = [math.sin(i) for i in range(n)]
    for start in range(0, n, block):
        tile = row[start : start + block]
        new = max(m, *tile)
        l = l * exp(m - new) + sum(exp(x - new) for x in tile)
        m = new
    return exps


@exercise(
    "01.3",
    "Predict: what moves",
    hints={
        "forgot-the-write": 1,
        "forgot-passes": 1,
        "no-pass-saved": 1,
        "forgot-lse": 3,
        "max-and-sum": 3,
        "forgot-the-rescale": 2,
        "rescaled-each-score": 2,
    },
)
def check_predictions(
    safe_bytes: float,
    online_bytes: float,
    exps_one_by_one: float,
    exps_in_tiles: float,
    matrix_bytes: float,
    merge_bytes: float,
) -> str:
    import torch

    table = 256 * 151_936
    safe, online = _count_moves(online=False), _count_moves(online=True)
    matrix = torch.empty(8192, 8192, device="meta").nbytes
    parts = [torch.empty(8, 4, 16, 128, device="meta"), torch.empty(8, 4, 16, device="meta")]
    merge = sum(part.nbytes for part in parts)
    tiles, single = _count_exps(4096, 64), _count_exps(4096, 1)

    def judge(
        name: str, guess: Any, right: int, measured: str, known: dict[float, tuple[str, str]]
    ) -> None:
        if isinstance(guess, bool) or not isinstance(guess, int | float):
            raise Mistake("wrong-type", f"{name} is {show(guess)}.\nA prediction is one number.")
        if math.isclose(guess, right, rel_tol=0.002):
            return
        numbers = {right / 4: ("numbers-not-bytes", "That counts numbers; a float32 has 4 bytes.")}
        numbers[right * 8] = ("bits-not-bytes", "That counts bits; a byte has 8.")
        for value, (mistake, why) in {
            **(numbers if name.endswith("bytes") else {}),
            **known,
        }.items():
            if math.isclose(guess, value, rel_tol=0.002):
                raise Mistake(
                    mistake,
                    f"{name}: you predicted {guess:,.0f}, measured: {right:,}.\n{why} {measured}",
                )
        raise Mistake(
            "wrong-prediction",
            f"{name}: you predicted {guess:,.0f}, measured: {right:,}.\n{measured} "
            "Find out where the difference comes from, then correct your number.",
        )

    output = 4 * 16 * 128 * 4
    expect_all(
        partial(
            judge,
            "safe_bytes",
            safe_bytes,
            table * safe * 4,
            f"Counted: {safe} numbers moved for each number of the table, 3 read and 1 written.",
            {
                table * 3 * 4: (
                    "forgot-the-write",
                    "Three passes read; the third also writes the result.",
                ),
                table * 2 * 4: ("forgot-passes", "Maximum, sum and result are a pass each."),
                table * 4: ("forgot-passes", "Maximum, sum and result are a pass each."),
            },
        ),
        partial(
            judge,
            "online_bytes",
            online_bytes,
            table * online * 4,
            f"Counted: {online} numbers moved for each number of the table, 2 read and 1 written.",
            {
                table * 2 * 4: (
                    "forgot-the-write",
                    "Two passes read; the second also writes the result.",
                ),
                table * 4 * 4: (
                    "no-pass-saved",
                    "Maximum and sum share a pass now: one read fewer than safe softmax.",
                ),
                table * 4: (
                    "forgot-passes",
                    "It is one pass to find m and l, but another to write the result.",
                ),
            },
        ),
        partial(
            judge,
            "exps_one_by_one",
            exps_one_by_one,
            single,
            "Each score takes two: exp(m - new) for the old sum, exp(x - new) for itself.",
            {
                4096: (
                    "forgot-the-rescale",
                    "The factor for the old sum is an exp as well, even when it is exp(0).",
                )
            },
        ),
        partial(
            judge,
            "exps_in_tiles",
            exps_in_tiles,
            tiles,
            "One for each score, and one a tile to rescale: 4096 + 64.",
            {
                4096: (
                    "forgot-the-rescale",
                    "Each of the 64 tiles also takes an exp to rescale the old sum.",
                ),
                64: (
                    "forgot-the-scores",
                    "That is the rescaling alone; each score still takes its own exp.",
                ),
                2 * 4096: (
                    "rescaled-each-score",
                    "In tiles the old sum is rescaled once a tile, not once a score.",
                ),
            },
        ),
        partial(
            judge,
            "matrix_bytes",
            matrix_bytes,
            matrix,
            "A float32 tensor of [8192, 8192] was made, and asked for its size.",
            {
                matrix / 2: (
                    "half-the-matrix",
                    "Half of it is masked, but a matrix in memory is whole: zeros take room.",
                ),
                8192 * 4: (
                    "one-row",
                    "That is a row. All 8192 words of a prompt are queries, with a row each.",
                ),
                8192 * 128 * 4: (
                    "keys-not-scores",
                    "That is the keys. Scores are a number for each query with each key.",
                ),
            },
        ),
        partial(
            judge,
            "merge_bytes",
            merge_bytes,
            merge,
            "Measured: the tensors [8, 4, 16, 128] and [8, 4, 16] in float32.",
            {
                parts[0].nbytes: (
                    "forgot-lse",
                    "Beside its output, each part hands over a log-sum-exp.",
                ),
                parts[1].nbytes: (
                    "forgot-outputs",
                    "Beside its log-sum-exp, each part hands over an output of 128.",
                ),
                merge + parts[1].nbytes: (
                    "max-and-sum",
                    "Maximum and sum come as one number, the log-sum-exp.",
                ),
                merge + output: (
                    "counted-the-write",
                    "Asked was what the merge reads; the result is written.",
                ),
                merge / 8: ("one-part", "That is one part; there are 8."),
            },
        ),
    )
    return "six predictions, all as measured"


# --- 01.4 -----------------------------------------------------------------------------------------


@exercise(
    "01.4",
    "Merge what was computed apart",
    hints={
        "equal-weights": 1,
        "lse-as-weight": 1,
        "no-maximum": 2,
        "one-maximum-for-all": 2,
        "wrong-axis": 2,
        "not-divided": 2,
        "empty-row-is-nan": 3,
    },
)
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
        return torch.exp(lse - _finite(lse.amax(dim=0)))

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
            lambda out, lse: _merged(out, torch.exp2(lse - _finite(lse.amax(dim=0)))),
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


# --- 01.5 -----------------------------------------------------------------------------------------


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


@exercise(
    "01.5",
    "softmax·V in one pass",
    hints={
        "one-maximum-for-all-queries": 1,
        "tail-dropped": 2,
        "output-not-rescaled": 3,
        "sum-not-rescaled": 3,
        "no-rescale": 3,
        "tile-under-its-own-maximum": 3,
        "not-divided": 3,
        "whole-row": 2,
        "two-passes": 3,
        "query-by-query": 1,
    },
)
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


# --- 01.6 -----------------------------------------------------------------------------------------


@exercise(
    "01.6",
    "A Triton kernel for rows of any length",
    hints={
        "row-stride-ignored": 1,
        "output-rows-too-far-apart": 1,
        "first-tile-only": 1,
        "tail-as-zero": 2,
        "no-rescale": 2,
        "masked-tile-is-nan": 3,
        "a-softmax-for-each-tile": 3,
        "out-of-bounds-write": 3,
    },
)
def check_softmax_kernel(answer: Any) -> str:
    import torch

    expect_triton("Exercise 01.5 asks for the same recurrence in torch, and runs everywhere.")
    random = seeded(6)

    def case(
        rows: int, columns: int, block: int, size: float = 2.0, shift: float = 0.0, pad: int = 0
    ) -> tuple:
        wide = guarded(rows, columns + pad)
        x = wide[:, :columns]
        x.copy_(torch.randn(rows, columns, generator=random) * size + shift)
        return guarded(rows, columns), x, block

    rising, falling = case(2, 24, 8), case(2, 24, 8)
    rising[1].copy_(torch.linspace(-3, 3, 24).repeat(2, 1))
    falling[1].copy_(torch.linspace(3, -3, 24).repeat(2, 1))
    masked = case(3, 20, 8)
    masked[1][0, :9], masked[1][1, 8:16], masked[1][2, 1:] = -INF, -INF, -INF
    cases = [
        case(1, 1, 4),
        case(2, 8, 8),
        case(3, 16, 8),
        case(2, 11, 4),
        case(2, 7, 16, shift=-400.0),
        case(2, 13, 8, 60),
        case(3, 18, 4, shift=500.0),
        case(3, 10, 4, pad=6),
        case(2, 16, 8, pad=3),
        rising,
        falling,
        masked,
    ]

    def launch(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        answer[(len(x),)](out, x, x.stride(0), x.shape[1], BLOCK=block)

    def right(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.softmax(x, dim=1))

    def row_by_row(**wrong: Any) -> Callable:
        def run(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
            for target, row in zip(out, x, strict=True):
                m, l = _online(row, block, **wrong)
                target.copy_(torch.exp(row - m) / l)

        return run

    def own_first_tile(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out[:, :block] = torch.softmax(x[:, :block], dim=1)

    def padded(value: float) -> Callable:
        def run(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
            full = torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=value)
            out.copy_(torch.softmax(full, dim=1)[:, : x.shape[1]])

        return run

    def sum_of_tail(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        for target, row in zip(out, x, strict=True):
            m, l = _online(row, block, tail=False)
            target.copy_(torch.exp(row - m) / l)

    def tail_unwritten(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        whole = x.shape[1] // block * block
        out[:, :whole] = torch.softmax(x, dim=1)[:, :whole]

    def stride_ignored(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.softmax(x.as_strided(x.shape, (x.shape[1], 1)), dim=1))

    def output_stride(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        flat = out.view(-1)
        for r, row in enumerate(torch.softmax(x, dim=1)):
            inside = flat[r * x.stride(0) :][: len(row)]  # the rest is written beyond the tensor
            inside.copy_(row[: len(inside)])

    def tile_wise(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.cat([torch.softmax(tile, dim=1) for tile in x.split(block, dim=1)], dim=1))

    def no_max(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.exp(x) / torch.exp(x).sum(dim=1, keepdim=True))

    def undivided(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        out.copy_(torch.exp(x - x.amax(dim=1, keepdim=True)))

    def tail_unmasked(out: torch.Tensor, x: torch.Tensor, block: int) -> None:
        # on into the next row, or poison
        whole = x.as_strided((len(x), -(-x.shape[1] // block) * block), x.stride())
        out.copy_(torch.softmax(whole, dim=1)[:, : x.shape[1]])

    tail = (
        "In the last tile, lanes beyond the row count as scores of 0: they add to the sum, and in a"
        " row of negative scores 0 becomes the maximum.\nMasked lanes need other=float('-inf'): it"
        " never wins, and its exp is 0."
    )
    nan = (
        "A row whose first tile is all -inf gives nan: new maximum and old are -inf, and -inf -"
        " -inf is nan.\nSubtract tl.where(new_max == float('-inf'), 0.0, new_max) instead."
    )
    suspects = {
        "tail-as-zero": (tail, padded(0.0)),
        "no-rescale": (
            (
                "The sum is not rescaled when a later tile has a larger maximum.\nMultiply the old"
                " sum by tl.exp(row_max - new_max) before you add the tile."
            ),
            row_by_row(rescale="none"),
            row_by_row(rescale="none", guarded_max=False),
        ),
        "rescaled-the-wrong-way": (
            (
                "The sum grows when the maximum grows; under a larger maximum its terms must"
                " shrink.\nThe factor is exp(old - new), at most 1."
            ),
            row_by_row(rescale="swapped"),
            row_by_row(rescale="swapped", guarded_max=False),
        ),
        "tile-under-its-own-maximum": (
            (
                "You add a tile's weights under the tile's own maximum. Where an earlier tile held"
                " a larger score they are too large.\nTake them under the new running maximum."
            ),
            row_by_row(tile_sum="own"),
            row_by_row(tile_sum="own", guarded_max=False),
        ),
        "masked-tile-is-nan": (nan, row_by_row(guarded_max=False)),
        "maximum-starts-at-zero": (
            (
                "Your running maximum starts at 0: rows of negative scores get the maximum 0, and"
                " underflow.\nStart at float('-inf')."
            ),
            row_by_row(start=0.0),
            row_by_row(start=0.0, guarded_max=False),
        ),
        "tail-not-summed": (
            (
                "Scores in the last, ragged tile are missing from maximum and sum.\n"
                "range(0, N, BLOCK) comes to that tile, too; N // BLOCK tiles are too few."
            ),
            sum_of_tail,
        ),
        "tail-not-written": (
            (
                "The last, ragged tile is never written: what was in `out` before is still there.\n"
                "Your second loop must come to it as the first does; the mask keeps it inside."
            ),
            tail_unwritten,
        ),
        "not-divided": (
            (
                "Your rows do not add up to 1: what you store is not divided by the row's sum.\n"
                "Store tl.exp(x - row_max) / row_sum."
            ),
            undivided,
        ),
        "first-tile-only": (
            (
                "Only the first BLOCK numbers of a row are computed; the row may be longer.\n"
                "Loop: for start in range(0, N, BLOCK)."
            ),
            own_first_tile,
        ),
        "a-softmax-for-each-tile": (
            (
                "Each tile adds up to 1 by itself: you write a tile's result before the row's sum"
                " is known.\nA first loop finds maximum and sum of the whole row; a second one"
                " writes."
            ),
            tile_wise,
        ),
        "row-stride-ignored": (
            (
                "Row r does not begin at r · N: here the rows lie further apart, and you read the"
                " gap between them.\nOf x, row r begins at x_ptr + r · row_stride. (Only `out` has"
                " its rows side by side.)"
            ),
            stride_ignored,
        ),
        "output-rows-too-far-apart": (
            (
                "Your results lie as far apart as the rows of x, in `out` and beyond its end. Its"
                " rows lie side by side.\nOf out, row r begins at out_ptr + r · N. (Only x has gaps"
                " between its rows: row_stride.)"
            ),
            output_stride,
        ),
        "no-maximum": (
            (
                "You take exp of the scores as they are: large ones give inf, and inf / inf is"
                " nan.\nKeep a running maximum, and rescale the sum when it grows."
            ),
            no_max,
        ),
        "load-without-mask": (
            (
                "Where the last tile is not full, your kernel reads beyond the row: into the next"
                " row, or what follows the last (here: poison, nan).\nGive tl.load a mask, and"
                " other=float('-inf')."
            ),
            tail_unmasked,
        ),
    }
    beyond = (
        "Where the last tile is not full, tl.store writes over what follows the row, unless it has"
        " mask=inside; and in out, row r begins at out_ptr + r · N."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, about the nan of a wrong kernel
        diagnose(launch, cases, right, suspects, writes=(0,), wording={BEYOND: beyond})
    loops = _loops_that_load(answer)
    expect(
        loops <= 2,
        "three-passes",
        f"The result is right, but {loops} loops load the row: that is safe softmax, which reads it"
        " three times.\nFind maximum and sum in one loop: rescale the sum when the maximum grows.",
    )
    return f"{len(cases)} tables, with ragged tails, gaps between rows and masked tiles"


def _loops_that_load(kernel: Any) -> int:
    """How many loops of a kernel load something, nested ones once; 0 where the source cannot be
    found.
    """
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kernel.fn)))
    except (OSError, SyntaxError, AttributeError, TypeError):
        return 0

    def loops(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.For | ast.While):
                yield child
            else:
                yield from loops(child)

    calls = [
        [n for n in ast.walk(loop) if isinstance(n, ast.Attribute) and n.attr == "load"]
        for loop in loops(tree)
    ]
    return sum(map(bool, calls))
