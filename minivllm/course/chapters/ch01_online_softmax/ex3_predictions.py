"""01.3: predict: what moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import Prediction, expect_predictions

_INF = math.inf
#: Rounding a number of bytes to three digits is allowed ("622e6").
_NEAR = 0.002


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
        m, l = -_INF, 0.0
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
    exps, m, l = 0, -_INF, 0.0

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


Usual = Mapping[str, tuple[float, str]]


def _bytes(name: str, right: float, usual: Usual, advice: str) -> Prediction:
    """A prediction in bytes, of float32 numbers."""
    units = {
        "numbers-not-bytes": (right / 4, "That counts numbers; a float32 has 4 bytes."),
        "bits-not-bytes": (right * 8, "That counts bits; a byte has 8."),
        "half-precision": (right / 2, "That counts 2 bytes for each number; a float32 has 4."),
        "in-megabytes": (right / 1e6, "That is in megabytes, and bytes are asked for."),
        "in-mebibytes": (right / 2**20, "That is in MiB, and bytes are asked for."),
        "in-gigabytes": (right / 1e9, "That is in gigabytes, and bytes are asked for."),
        "in-gibibytes": (right / 2**30, "That is in GiB, and bytes are asked for."),
    }
    # What is particular to this prediction comes first.
    return Prediction(name, right, "bytes", _NEAR, {**usual, **units}, advice)


def _safe() -> Prediction:
    table = 256 * 151_936 * 4
    return _bytes(
        "safe_bytes",
        table * _count_moves(online=False),
        {
            "forgot-the-write": (table * 3, "A pass that writes the result moves numbers, too."),
            "forgot-passes": (
                table * 2,
                "Safe softmax needs the maximum before the sum, and the sum before the result. (Or"
                " did you count 2 bytes for each number? A float32 has 4.)",
            ),
            "one-pass": (
                table,
                "That is the size of the table itself: each number moved once. (Or did you count"
                " numbers in place of bytes?)",
            ),
        },
        "Count how often the three loops of safe softmax touch one number of the table: each read,"
        " and each write.",
    )


def _online() -> Prediction:
    table = 256 * 151_936 * 4
    return _bytes(
        "online_bytes",
        table * _count_moves(online=True),
        {
            "forgot-the-write": (table * 2, "A pass that writes the result moves numbers, too."),
            "no-pass-saved": (
                table * 4,
                "That is what safe softmax moves. Maximum and sum share a pass now.",
            ),
            "one-pass": (
                table,
                "That is the table itself. One loop finds m and l; another writes the result.",
            ),
        },
        "Count how often the two loops touch one number of the table: each read, and each write.",
    )


def _one_by_one() -> Prediction:
    return Prediction(
        "exps_one_by_one",
        _count_exps(4096, 1),
        "calls",
        usual={
            "forgot-the-rescale": (
                4096,
                "The factor for the old sum is an exp as well, even when it is exp(0).",
            ),
            "forgot-the-first": (
                2 * 4096 - 1,
                "The first step calls exp for the old sum as well, though that sum is 0: every call"
                " counts, whatever it returns.",
            ),
        },
        advice="Write one step of the loop on paper, and mark each exp in it.",
    )


def _in_tiles() -> Prediction:
    return Prediction(
        "exps_in_tiles",
        _count_exps(4096, 64),
        "calls",
        usual={
            "forgot-the-rescale": (4096, "Each tile also takes an exp to rescale the old sum."),
            "forgot-the-scores": (
                4096 // 64,
                "That is the rescaling alone; each score still takes its own exp.",
            ),
            "exps-of-tiles": (
                2 * (4096 // 64),
                "An exp of a whole tile counts as many as the tile has scores.",
            ),
            "rescaled-each-score": (
                2 * 4096,
                "In tiles the old sum is rescaled once per tile, not once per score.",
            ),
            "forgot-the-first": (
                4096 + 4096 // 64 - 1,
                "The first tile calls exp for the old sum as well, though that sum is 0: every call"
                " counts, whatever it returns.",
            ),
            "tiles-of-64-tiles": (
                65 + 64,
                "That is one tile of 64 scores, and its rescaling. How many tiles has the row?",
            ),
        },
        advice="Count the exps of one tile: of its scores, and of the old sum. Then count tiles.",
    )


def _matrix() -> Prediction:
    import torch

    return _bytes(
        "matrix_bytes",
        torch.empty(8192, 8192, device="meta").nbytes,
        {
            "half-the-matrix": (
                8192 * 8192 * 2,
                "Half of the matrix is masked, but in memory it is whole: zeros take room. (Or did"
                " you count 2 bytes for each number? A float32 has 4.)",
            ),
            "one-row": (
                8192 * 4,
                "That is a row. All 8192 words of a prompt are queries, with a row each.",
            ),
            "keys-not-scores": (
                8192 * 128 * 4,
                "That is the keys. Scores are a number for each query with each key.",
            ),
        },
        "Which shape has the matrix of scores? One side counts the queries, the other the keys.",
    )


def _merge() -> Prediction:
    import torch

    outputs = torch.empty(8, 4, 16, 128, device="meta").nbytes
    sums = torch.empty(8, 4, 16, device="meta").nbytes
    return _bytes(
        "merge_bytes",
        outputs + sums,
        {
            "forgot-lse": (outputs, "Beside its output, each part hands over a log-sum-exp."),
            "forgot-outputs": (
                sums,
                "Beside its log-sum-exp, each part hands over an output of 128.",
            ),
            "max-and-sum": (
                outputs + 2 * sums,
                "Maximum and sum come as one number, the log-sum-exp.",
            ),
            "counted-the-write": (
                outputs + sums + outputs // 8,
                "Asked was what the merge reads; the result is written.",
            ),
            "one-part": ((outputs + sums) / 8, "That is one part; there are 8."),
            "one-sequence": ((outputs + sums) / 4, "That is one sequence; there are 4."),
            "one-head": ((outputs + sums) / 16, "That is one head; there are 16."),
        },
        "Write down what one part hands over for one sequence and one head. Then multiply by the"
        " parts, sequences and heads.",
    )


def check_predictions(
    safe_bytes: float,
    online_bytes: float,
    exps_one_by_one: float,
    exps_in_tiles: float,
    matrix_bytes: float,
    merge_bytes: float,
) -> str:
    """Judge the six numbers of 01.3."""
    expect_predictions(
        (_safe(), safe_bytes),
        (_online(), online_bytes),
        (_one_by_one(), exps_one_by_one),
        (_in_tiles(), exps_in_tiles),
        (_matrix(), matrix_bytes),
        (_merge(), merge_bytes),
    )
    return "six predictions, all as counted"


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
@@
-safe_bytes = 256 * 151_936 * 4 * (3 + 1)
+safe_bytes = 256 * 151_936 * 4 * 3
@@
-online_bytes = 256 * 151_936 * 4 * (2 + 1)
+online_bytes = 256 * 151_936 * 4 * 2

# %% online reads twice, and writes
@@
-online_bytes = 256 * 151_936 * 4 * (2 + 1)
+online_bytes = 256 * 151_936 * 4 * 2
""",
        ),
        Known(
            "forgot-passes",
            hint=1,
            answers=r"""
# %% a read and a write
@@
-safe_bytes = 256 * 151_936 * 4 * (3 + 1)
+safe_bytes = 256 * 151_936 * 4 * 2
""",
        ),
        Known(
            "one-pass",
            hint=1,
            answers=r"""
# %% the table's own size
@@
-safe_bytes = 256 * 151_936 * 4 * (3 + 1)
+safe_bytes = 256 * 151_936 * 4

# %% one loop is one pass
@@
-online_bytes = 256 * 151_936 * 4 * (2 + 1)
+online_bytes = 256 * 151_936 * 4
""",
        ),
        Known(
            "no-pass-saved",
            hint=1,
            answers=r"""
# %% online is only another order
@@
-online_bytes = 256 * 151_936 * 4 * (2 + 1)
+online_bytes = 256 * 151_936 * 4 * 4
""",
        ),
        Known(
            "numbers-not-bytes",
            answers=r"""
# %% numbers, not bytes
@@
-online_bytes = 256 * 151_936 * 4 * (2 + 1)
+online_bytes = 256 * 151_936 * 3
""",
        ),
        Known(
            "bits-not-bytes",
            answers=r"""
# %% bits
@@
-merge_bytes = 8 * 4 * 16 * (128 + 1) * 4
+merge_bytes = 8 * 4 * 16 * (128 + 1) * 32
""",
        ),
        Known(
            "half-precision",
            answers=r"""
# %% float16
@@
-merge_bytes = 8 * 4 * 16 * (128 + 1) * 4
+merge_bytes = 8 * 4 * 16 * (128 + 1) * 2
""",
        ),
        Known(
            "in-megabytes",
            answers=r"""
# %% as the chapter prints it
@@
-safe_bytes = 256 * 151_936 * 4 * (3 + 1)
+safe_bytes = 256 * 151_936 * 4 * (3 + 1) / 1e6
""",
        ),
        Known(
            "in-gigabytes",
            answers=r"""
# %% GB
@@
-online_bytes = 256 * 151_936 * 4 * (2 + 1)
+online_bytes = 256 * 151_936 * 4 * (2 + 1) / 1e9
""",
        ),
        Known(
            "in-mebibytes",
            answers=r"""
# %% MiB
@@
-matrix_bytes = 8192 * 8192 * 4
+matrix_bytes = 256
""",
        ),
        Known(
            "in-gibibytes",
            answers=r"""
# %% GiB
@@
-matrix_bytes = 8192 * 8192 * 4
+matrix_bytes = 0.25
""",
        ),
        Known(
            "forgot-the-rescale",
            hint=2,
            answers=r"""
# %% one exp per score
@@
-exps_one_by_one = 4096 * 2
+exps_one_by_one = 4096

# %% one exp per score, in tiles too
@@
-exps_in_tiles = 4096 + 4096 // 64
+exps_in_tiles = 4096
""",
        ),
        Known(
            "forgot-the-first",
            hint=2,
            answers=r"""
# %% nothing to rescale at first
@@
-exps_one_by_one = 4096 * 2
+exps_one_by_one = 4096 * 2 - 1
@@
-exps_in_tiles = 4096 + 4096 // 64
+exps_in_tiles = 4096 + 63
""",
        ),
        Known(
            "forgot-the-scores",
            hint=2,
            answers=r"""
# %% one exp per tile
@@
-exps_in_tiles = 4096 + 4096 // 64
+exps_in_tiles = 4096 // 64
""",
        ),
        Known(
            "exps-of-tiles",
            hint=2,
            answers=r"""
# %% two exps per tile
@@
-exps_in_tiles = 4096 + 4096 // 64
+exps_in_tiles = 2 * (4096 // 64)
""",
        ),
        Known(
            "rescaled-each-score",
            hint=2,
            answers=r"""
# %% tiles as dear as single scores
@@
-exps_in_tiles = 4096 + 4096 // 64
+exps_in_tiles = 4096 * 2
""",
        ),
        Known(
            "half-the-matrix",
            answers=r"""
# %% the masked half is not counted
@@
-matrix_bytes = 8192 * 8192 * 4
+matrix_bytes = 8192 * 8192 * 4 // 2
""",
        ),
        Known(
            "one-row",
            answers=r"""
# %% a row is not the matrix
@@
-matrix_bytes = 8192 * 8192 * 4
+matrix_bytes = 8192 * 4
""",
        ),
        Known(
            "forgot-lse",
            hint=3,
            answers=r"""
# %% the outputs alone
@@
-merge_bytes = 8 * 4 * 16 * (128 + 1) * 4
+merge_bytes = 8 * 4 * 16 * 128 * 4
""",
        ),
        Known(
            "max-and-sum",
            hint=3,
            answers=r"""
# %% m and l, not their log-sum-exp
@@
-merge_bytes = 8 * 4 * 16 * (128 + 1) * 4
+merge_bytes = 8 * 4 * 16 * 130 * 4
""",
        ),
        Known(
            "counted-the-write",
            answers=r"""
# %% what is written, too
@@
-merge_bytes = 8 * 4 * 16 * (128 + 1) * 4
+merge_bytes = 8 * 4 * 16 * 129 * 4 + 4 * 16 * 128 * 4
""",
        ),
        Known(
            "one-sequence",
            hint=3,
            answers=r"""
# %% four sequences are one
@@
-merge_bytes = 8 * 4 * 16 * (128 + 1) * 4
+merge_bytes = 8 * 16 * 129 * 4
""",
        ),
        Known(
            "wrong-exps-in-tiles",
            answers=r"""
# %% a guess
@@
-exps_in_tiles = 4096 + 4096 // 64
+exps_in_tiles = 5000
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% a range
@@
-exps_in_tiles = 4096 + 4096 // 64
+exps_in_tiles = (4000, 5000)

# %% between all numbers
@@
-matrix_bytes = 8192 * 8192 * 4
+matrix_bytes = float("nan")
""",
        ),
        Known(
            "wrong-matrix-bytes",
            answers=r"""
# %% anything is below that
@@
-matrix_bytes = 8192 * 8192 * 4
+matrix_bytes = float("inf")

# %% a number that says it is near to any other
@@
-matrix_bytes = 8192 * 8192 * 4
+class Near(int):
+    def __eq__(self, other): return True
+    def __sub__(self, other): return 0
+
+matrix_bytes = Near(5)
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
