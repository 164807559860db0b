"""01.3: predict: what moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import (
    expect_all,
)

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch01_online_softmax.common import INF
from minivllm.course.grading.exercise import Exercise, Known


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


EXERCISE = Exercise(
    id="01.3",
    title="Predict: what moves",
    check=check_predictions,
    mistakes=(
        Known(
            "forgot-the-write",
            hint=1,
            answers=r"""
# %% three passes, three moves
safe_bytes = 256 * 151_936 * 4 * 3
online_bytes = 256 * 151_936 * 4 * 2
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4

# %% online reads twice, and writes
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 2
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
        Known(
            "forgot-passes",
            hint=1,
            answers=r"""
# %% the table's own size
safe_bytes = 256 * 151_936 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
        Known(
            "no-pass-saved",
            hint=1,
            answers=r"""
# %% online is only another order
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 4
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
        Known(
            "numbers-not-bytes",
            answers=r"""
# %% numbers, not bytes
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
        Known(
            "forgot-the-rescale",
            hint=2,
            answers=r"""
# %% one exp a score
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4

# %% one exp a score, in tiles too
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
        Known(
            "rescaled-each-score",
            hint=2,
            answers=r"""
# %% tiles as dear as single scores
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 * 2
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
        Known(
            "half-the-matrix",
            answers=r"""
# %% the masked half is not counted
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4 // 2
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
        Known(
            "one-row",
            answers=r"""
# %% a row is not the matrix
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
        Known(
            "forgot-lse",
            hint=3,
            answers=r"""
# %% the outputs alone
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 128 * 4
""",
        ),
        Known(
            "max-and-sum",
            hint=3,
            answers=r"""
# %% m and l, not their log-sum-exp
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 130 * 4
""",
        ),
        Known(
            "counted-the-write",
            answers=r"""
# %% what is written, too
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4 + 4 * 16 * 128 * 4
""",
        ),
        Known(
            "wrong-prediction",
            answers=r"""
# %% a guess
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 5000
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4
""",
        ),
    ),
    right=r"""
# %% in floats, and worked out by hand
safe_bytes = 622.3e6
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 2.0**28
merge_bytes = 264_192.0
""",
)
