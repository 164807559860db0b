"""02.2: predict: what a chunk costs."""

from __future__ import annotations

from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import Prediction, expect_predictions

NEW, CONTEXT, HEADS, KV_HEADS, DIM, BLOCK = 1024, 4096, 16, 8, 128, 64
_DRAW = (
    "Draw it: draw_attention_tiles(1024, 4096, 64, 64), or take it on paper with 4 new tokens after"
    " 12."
)
_COUNT = (
    "Write down each tensor's shape, multiply its sides, by two bytes per number, and divide by"
    " 10⁶."
)
#: How far MB may be off: MiB are 4.9 % fewer.
_NEAR = 0.06


def _megabytes(*shapes: tuple[int, ...]) -> float:
    import torch

    return (
        sum(torch.empty(shape, dtype=torch.bfloat16, device="meta").nbytes for shape in shapes)
        / 1e6
    )


def _computed_tiles() -> Prediction:
    from minivllm.viz.tiles import attention_tiles

    counts = attention_tiles(NEW, CONTEXT, BLOCK, BLOCK).counts
    alone = attention_tiles(NEW, NEW, BLOCK, BLOCK).counts
    usual = {
        "half-is-skipped": (
            counts.total() // 2,
            "Half is skipped for a whole prompt. This chunk has a past of 3,072 tokens, which all"
            " its queries see: only the corner at the end is skipped.",
        ),
        "nothing-is-skipped": (
            counts.total(),
            "The first queries of the chunk do not see its last tokens: that corner is skipped.",
        ),
        "past-forgotten": (
            alone["full"] + alone["masked"],
            "That is the chunk alone, without its past. All queries also see the 3,072 keys from"
            " the cache.",
        ),
        "diagonal-forgotten": (
            counts["full"],
            "The tiles on the diagonal are computed, too: with a mask.",
        ),
    }
    right = counts["full"] + counts["masked"]
    return Prediction("computed_tiles", right, "tiles", usual=usual, advice=_DRAW)


def _masked_tiles() -> Prediction:
    from minivllm.viz.tiles import attention_tiles

    counts = attention_tiles(NEW, CONTEXT, BLOCK, BLOCK).counts
    rows, columns = NEW // BLOCK, CONTEXT // BLOCK
    usual = {
        "all-computed-are-masked": (
            counts["full"] + counts["masked"],
            "A tile whose queries all see all of its keys needs no mask, and that is nearly every"
            " one. Only the diagonal does.",
        ),
        "a-mask-for-each-column": (
            columns,
            "The diagonal begins after the past, whose columns are seen by all queries. Count along"
            " the rows of tiles.",
        ),
        "two-in-a-row": (
            2 * rows,
            "3,072 is a multiple of 64: the diagonal starts at a tile's corner. Does it cross two"
            " tiles in a row of tiles?",
        ),
    }
    return Prediction("masked_tiles", counts["masked"], "tiles", usual=usual, advice=_DRAW)


def _matrix() -> Prediction:
    matrix = _megabytes((HEADS, NEW, CONTEXT))
    usual = {
        "one-head": (matrix / HEADS, "That is one head; each of the 16 has scores of its own."),
        "kv-heads": (
            matrix / HEADS * KV_HEADS,
            "That is half: the scores of 8 heads, or one byte for each. Scores are there for each"
            " QUERY head, 16: two that share keys still ask different questions. And a number in"
            " bfloat16 takes two bytes.",
        ),
        "in-float32": (2 * matrix, "bfloat16 takes two bytes per number."),
        "square": (
            _megabytes((HEADS, CONTEXT, CONTEXT)),
            "Only the 1,024 new tokens are queries: the matrix has fewer rows than columns.",
        ),
        "chunk-only": (
            _megabytes((HEADS, NEW, NEW)),
            "Each query has a score for all 4,096 keys, not only for those of its chunk.",
        ),
        "in-bytes": (matrix * 1e6, "Those are bytes, and MB are asked for: divide by 10⁶."),
    }
    return Prediction("matrix_mb", matrix, "MB", _NEAR, usual, _COUNT)


def _flash() -> Prediction:
    query, keys = _megabytes((NEW, HEADS, DIM)), _megabytes((CONTEXT, KV_HEADS, DIM))
    right = 2 * query + 2 * keys
    usual = {
        "heads-not-shared": (
            2 * query + 4 * keys,
            "Keys and values have 8 heads, not 16: two query heads share one.",
        ),
        "keys-of-the-chunk-only": (
            2 * query + 2 * keys * NEW / CONTEXT,
            "The chunk reads the keys and values of its whole context, 4,096 tokens, from the"
            " cache.",
        ),
        "result-forgotten": (
            query + 2 * keys,
            "Something as large as Q is missing. The result is written, and as large as Q. Queries"
            " and result have 16 heads. Keys and values are those of all 4,096 tokens.",
        ),
        "values-forgotten": (2 * query + keys, "Keys AND values are read, and are equally large."),
        "twice-as-much": (
            2 * right,
            "That is twice what is carried. Only 1,024 tokens have a query and a result, and"
            " bfloat16 takes two bytes per number.",
        ),
        "one-head-each": (
            (2 * query / HEADS) + (2 * keys / KV_HEADS),
            "All heads count: 16 of queries and of results, 8 of keys and of values.",
        ),
        "flash-in-bytes": (right * 1e6, "Those are bytes, and MB are asked for: divide by 10⁶."),
    }
    return Prediction("flash_mb", right, "MB", _NEAR, usual, _COUNT)


def check_predictions(
    computed_tiles: float, masked_tiles: float, matrix_mb: float, flash_mb: float
) -> str:
    """Judge an answer to 02.2."""
    computed, masked, matrix, flash = _computed_tiles(), _masked_tiles(), _matrix(), _flash()
    expect_predictions(
        (computed, computed_tiles), (masked, masked_tiles), (matrix, matrix_mb), (flash, flash_mb)
    )
    tiles = NEW // BLOCK * (CONTEXT // BLOCK)
    return (
        f"{computed.right} of {tiles:,} tiles, {masked.right} masked; {matrix.right:.0f} MB become"
        f" {flash.right:.0f}"
    )


EXERCISE = Exercise(
    id="02.2",
    title="Predict: what a chunk costs",
    check=check_predictions,
    mistakes=(
        Known(
            "half-is-skipped",
            hint=1,
            answers=r"""
# %% as for a whole prompt
computed_tiles = 16 * 64 // 2
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "nothing-is-skipped",
            hint=1,
            answers=r"""
# %% the corner forgotten
computed_tiles = 16 * 64
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "past-forgotten",
            hint=1,
            answers=r"""
# %% the chunk's own triangle
computed_tiles = 16 * 17 // 2
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "diagonal-forgotten",
            hint=1,
            answers=r"""
# %% full tiles only
computed_tiles = 888
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% two numbers
computed_tiles = (904, 1024)
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2

# %% not a number
computed_tiles = 904
masked_tiles = 16
matrix_mb = float("nan")
flash_mb = 25.2
""",
        ),
        Known(
            "wrong-computed-tiles",
            answers=r"""
# %% one off
computed_tiles = 905
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "all-computed-are-masked",
            hint=1,
            answers=r"""
# %% a mask everywhere
computed_tiles = 904
masked_tiles = 904
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "a-mask-for-each-column",
            answers=r"""
# %% one a column
computed_tiles = 904
masked_tiles = 64
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "two-in-a-row",
            answers=r"""
# %% as if the past ended within a tile
computed_tiles = 904
masked_tiles = 32
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "one-head",
            answers=r"""
# %% scores of one head
computed_tiles = 904
masked_tiles = 16
matrix_mb = 1024 * 4096 * 2 / 1e6
flash_mb = 25.2
""",
        ),
        Known(
            "kv-heads",
            answers=r"""
# %% scores of 8 heads
computed_tiles = 904
masked_tiles = 16
matrix_mb = 8 * 1024 * 4096 * 2 / 1e6
flash_mb = 25.2
""",
        ),
        Known(
            "in-float32",
            answers=r"""
# %% four bytes
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 4096 * 4 / 1e6
flash_mb = 25.2
""",
        ),
        Known(
            "square",
            answers=r"""
# %% 4,096 × 4,096
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 4096 * 4096 * 2 / 1e6
flash_mb = 25.2
""",
        ),
        Known(
            "chunk-only",
            answers=r"""
# %% 1,024 × 1,024
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 1024 * 2 / 1e6
flash_mb = 25.2
""",
        ),
        Known(
            "heads-not-shared",
            hint=2,
            answers=r"""
# %% 16 KV heads
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (2 * 1024 + 2 * 4096) * 16 * 128 * 2 / 1e6
""",
        ),
        Known(
            "keys-of-the-chunk-only",
            hint=2,
            answers=r"""
# %% the past not read
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 1024 * (2 * 16 + 2 * 8) * 128 * 2 / 1e6
""",
        ),
        Known(
            "result-forgotten",
            hint=2,
            answers=r"""
# %% only what is read
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (1024 * 16 + 2 * 4096 * 8) * 128 * 2 / 1e6
""",
        ),
        Known(
            "values-forgotten",
            hint=2,
            answers=r"""
# %% only the keys
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (2 * 1024 * 16 + 4096 * 8) * 128 * 2 / 1e6
""",
        ),
        Known(
            "twice-as-much",
            hint=2,
            answers=r"""
# %% four bytes
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (2 * 1024 * 16 + 2 * 4096 * 8) * 128 * 4 / 1e6

# %% 4,096 queries
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 4096 * (2 * 16 + 2 * 8) * 128 * 2 / 1e6
""",
        ),
        Known(
            "in-bytes",
            answers=r"""
# %% not divided by a million
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 4096 * 2
flash_mb = 25.2
""",
        ),
        Known(
            "wrong-matrix-mb",
            answers=r"""
# %% a guess
computed_tiles = 904
masked_tiles = 16
matrix_mb = 150
flash_mb = 25.2
""",
        ),
        Known(
            "wrong-flash-mb",
            answers=r"""
# %% infinitely much
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = float("inf")
""",
        ),
        Known(
            "wrong-masked-tiles",
            answers=r"""
# %% one too many
computed_tiles = 904
masked_tiles = 17
matrix_mb = 134.2
flash_mb = 25.2
""",
        ),
        Known(
            "flash-in-bytes",
            answers=r"""
# %% not divided by a million
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (2 * 1024 * 16 + 2 * 4096 * 8) * 128 * 2
""",
        ),
        Known(
            "one-head-each",
            hint=2,
            answers=r"""
# %% one head of each
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (2 * 1024 + 2 * 4096) * 128 * 2 / 1e6
""",
        ),
    ),
    right=r"""
# %% in MiB
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 4096 * 2 / 2**20
flash_mb = 24
""",
)
