"""02.2: predict: what a chunk costs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect_all

if TYPE_CHECKING:
    pass
from minivllm.course.grading.exercise import Exercise, Known


def check_predictions(
    computed_tiles: float, masked_tiles: float, matrix_mb: float, flash_mb: float
) -> str:
    import torch

    from minivllm.viz.tiles import attention_tiles

    new, context, heads, kv_heads, dim, block = 1024, 4096, 16, 8, 128, 64
    counts = attention_tiles(new, context, block, block).counts
    computed, rows, columns = counts["full"] + counts["masked"], new // block, context // block

    def megabytes(*shapes: tuple[int, ...]) -> float:
        return (
            sum(torch.empty(shape, dtype=torch.bfloat16, device="meta").nbytes for shape in shapes)
            / 1e6
        )

    matrix = megabytes((heads, new, context))
    flash = megabytes(
        (new, heads, dim), (context, kv_heads, dim), (context, kv_heads, dim), (new, heads, dim)
    )

    def judge(what: str, said: Any, right: float, unit: str, near: float, usual: dict) -> None:
        if not isinstance(said, int | float) or isinstance(said, bool):
            raise Mistake("wrong-type", f"{what} should be one number.\nIt is {said!r}.")
        if abs(said - right) <= near * right:
            return
        for name, (wrong, why) in usual.items():
            if abs(said - wrong) <= near * wrong:
                raise Mistake(
                    name, f"{what}: you said {said:,.6g}, measured are {right:,.6g} {unit}.\n{why}"
                )
        draw = (
            "Draw it: draw_attention_tiles(1024, 4096, 64, 64), or take it on paper with 4 new"
            " tokens after 12."
        )
        count = (
            "Write down each tensor's shape, multiply its sides, by two bytes a number, and divide"
            " by 10⁶."
        )
        said_and_right = f"{what}: you said {said:,.6g}, measured are {right:,.6g} {unit}."
        advice = draw if what.endswith("tiles") else count
        raise Mistake(f"wrong-{what.replace('_', '-')}", f"{said_and_right}\n{advice}")

    start_aligned = attention_tiles(new, new, block, block).counts
    usual_computed = {
        "half-is-skipped": (
            rows * columns // 2,
            (
                "Half is skipped for a whole prompt. This chunk has a past of 3,072 tokens, which"
                " all its queries see: only the corner at the end is skipped."
            ),
        ),
        "nothing-is-skipped": (
            rows * columns,
            (
                "The first queries of the chunk do not see its last: that corner is skipped, 15"
                " tiles in the first row of tiles, 14 in the second, and so on."
            ),
        ),
        "past-forgotten": (
            start_aligned["full"] + start_aligned["masked"],
            (
                "That is the chunk alone, without its past. All queries also see the 3,072 keys"
                " from the cache."
            ),
        ),
        "diagonal-forgotten": (
            counts["full"],
            "The tiles on the diagonal are computed, too: with a mask.",
        ),
    }
    usual_masked = {
        "all-computed-are-masked": (
            computed,
            (
                "A tile whose queries all see all of its keys needs no mask, and that is nearly"
                " every one. Only the diagonal does."
            ),
        ),
        "a-mask-for-each-column": (
            columns,
            (
                "The diagonal crosses one tile in each ROW of tiles; the past's columns are seen by"
                " all queries."
            ),
        ),
        "two-in-a-row": (
            2 * rows,
            (
                "3,072 is a multiple of 64: the diagonal starts at a tile's corner, and crosses one"
                " tile in each row of tiles, not two."
            ),
        ),
    }
    usual_matrix = {
        "one-head": (matrix / heads, "That is one head; each of the 16 has scores of its own."),
        "kv-heads": (
            matrix / heads * kv_heads,
            (
                "Scores are there for each QUERY head, 16: two that share keys still ask different"
                " questions."
            ),
        ),
        "in-float32": (2 * matrix, "bfloat16 takes two bytes a number."),
        "square": (
            megabytes((heads, context, context)),
            "Only the 1,024 new tokens are queries; the matrix is 1,024 × 4,096.",
        ),
        "chunk-only": (
            megabytes((heads, new, new)),
            "Each query has a score for all 4,096 keys, not only for those of its chunk.",
        ),
    }
    query, keys = megabytes((new, heads, dim)), megabytes((context, kv_heads, dim))
    usual_flash = {
        "heads-not-shared": (
            2 * query + 4 * keys,
            "Keys and values have 8 heads, not 16: two query heads share one.",
        ),
        "keys-of-the-chunk-only": (
            2 * query + 2 * keys * new / context,
            (
                "The chunk reads the keys and values of its whole context, 4,096 tokens, from the"
                " cache."
            ),
        ),
        "result-forgotten": (query + 2 * keys, "The result is written, and as large as Q."),
        "values-forgotten": (2 * query + keys, "Keys AND values are read, and are equally large."),
        "as-if-whole-prompt": (
            megabytes((context, 2 * heads + 2 * kv_heads, dim)),
            "Only 1,024 tokens have a query and a result; keys and values have all 4,096.",
        ),
    }
    tiles = f"of {rows * columns:,}"
    expect_all(
        partial(judge, "computed_tiles", computed_tiles, computed, tiles, 0.0, usual_computed),
        partial(judge, "masked_tiles", masked_tiles, counts["masked"], "tiles", 0.0, usual_masked),
        partial(judge, "matrix_mb", matrix_mb, matrix, "MB", 0.06, usual_matrix),
        partial(judge, "flash_mb", flash_mb, flash, "MB", 0.06, usual_flash),
    )
    return (
        f"{computed} of {rows * columns:,} tiles, {counts['masked']} masked; {matrix:.0f} MB become"
        f" {flash:.0f}"
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
            "as-if-whole-prompt",
            hint=2,
            answers=r"""
# %% 4,096 queries
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 4096 * (2 * 16 + 2 * 8) * 128 * 2 / 1e6
""",
        ),
        Known(
            "wrong-matrix-mb",
            answers=r"""
# %% in bytes
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 4096 * 2
flash_mb = 25.2
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
