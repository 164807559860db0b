"""Chapter 02, flash attention: the checks of its exercises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.checking import (
    BEYOND,
    Mistake,
    Suspects,
    counted,
    diagnose,
    engine_agrees,
    exercise,
    expect,
    expect_all,
    expect_triton,
    guard,
    guarded,
    seeded,
)

if TYPE_CHECKING:
    import torch

INF = math.inf
LOG2E = math.log2(math.e)


# --- 02.1 -----------------------------------------------------------------------------------------


@exercise(
    "02.1",
    "Warm-up: who may look at whom",
    hints={
        "aligned-to-start": 2,
        "same-for-all-queries": 2,
        "sees-the-next-token": 3,
        "hides-its-own-token": 3,
    },
)
def check_causal_mask(answer: Callable) -> str:
    import torch

    def mask(query_len: int, context: int, offset: Callable[[int, int], int]) -> torch.Tensor:
        positions = torch.arange(query_len) + offset(query_len, context)
        return torch.arange(context) <= positions[:, None]

    def causal_mask(query_len: int, context: int) -> torch.Tensor:
        return mask(query_len, context, lambda q, n: n - q)

    suspects = {
        "aligned-to-start": (
            (
                "Your triangle begins at the top left: query 0 sees key 0 and nothing else, though"
                " all keys of the past come before it.\nThe queries are the LAST tokens of the"
                " context: query i stands at position context - query_len + i."
            ),
            lambda q, n: mask(q, n, lambda q, n: 0),
        ),
        "sees-the-next-token": (
            (
                "Each query sees one key too many: the token after its own, which the model is"
                " about to predict.\nCompare with <=, not with < and one more; the last row's last"
                " key is its own."
            ),
            lambda q, n: mask(q, n, lambda q, n: n - q + 1),
        ),
        "hides-its-own-token": (
            (
                "A query does not see its own token. It may: only what comes AFTER it is the"
                " future.\nKey j is visible when j <= position, not j < position."
            ),
            lambda q, n: mask(q, n, lambda q, n: n - q - 1),
        ),
        "hides-nothing": (
            (
                "All queries see all keys. Only the last one may: for the others, later tokens are"
                " the future.\nA mask that does not care for the row is none."
            ),
            lambda q, n: mask(q, n, lambda q, n: n),
        ),
        "same-for-all-queries": (
            (
                "All rows are alike. Each query sees one key more than the one before it: its"
                " own.\nQuery i stands at position context - query_len + i."
            ),
            lambda q, n: mask(q, n, lambda q, n: n - q)[:1].expand(q, n).clone(),
        ),
        "true-means-hidden": (
            (
                "The triangle is right, and turned over: here True means that the query MAY look.\n"
                "Return its opposite, ~mask."
            ),
            lambda q, n: ~causal_mask(q, n),
        ),
    }
    cases = [(1, 1), (4, 4), (1, 7), (3, 8), (5, 6), (2, 2), (16, 70)]
    number = diagnose(answer, cases, causal_mask, suspects)
    return f"{number} masks, of whole prompts, of chunks with a past, and of single tokens"


# --- 02.2 -----------------------------------------------------------------------------------------


@exercise(
    "02.2",
    "Predict: what a chunk costs",
    hints={
        "half-is-skipped": 1,
        "nothing-is-skipped": 1,
        "past-forgotten": 1,
        "diagonal-forgotten": 1,
        "all-computed-are-masked": 1,
        "heads-not-shared": 2,
        "keys-of-the-chunk-only": 2,
        "result-forgotten": 2,
        "values-forgotten": 2,
        "as-if-whole-prompt": 2,
    },
)
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


# --- walks, right and wrong -----------------------------------------------------------------------


def _exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of the last tokens of a context, one head, by the formula and in float64;
    float32.
    """
    import torch

    queries, keys = len(query), len(key)
    scores = query.double() @ key.double().T * scale
    hidden = torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]
    return (scores.masked_fill(hidden, -INF).softmax(dim=-1) @ value.double()).float()


def _walk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    block_m: int = 16,
    block_n: int = 16,
    wrong: str = "",
) -> torch.Tensor:
    """Flash attention of one head in tiles; `wrong` holds words for what is done otherwise. ""
    is right.
    """
    import torch

    how = set(wrong.split())
    queries, keys = len(query), len(key)
    past = keys - queries
    if "padded-keys" in how:  # keys that do not exist have scores of 0, and values of 0
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, -keys % block_n)) for x in (key, value))
    factors = {
        "unscaled": 1.0,
        "scaled-twice": scale**2,
        "no-log2e": scale / LOG2E,
        "log2e": scale * LOG2E,
    }
    factors["base-2-unscaled"] = 1 / LOG2E
    query, out = (
        query * next((factors[word] for word in how & factors.keys()), scale),
        torch.empty_like(query),
    )
    for top in range(0, queries, block_m):
        rows = torch.arange(top, min(top + block_m, queries))
        m = torch.full((len(rows),), 0.0 if "start-at-zero" in how else -INF)
        acc, l, walked = torch.zeros(len(rows), value.shape[1]), torch.zeros(len(rows)), 0
        end = _end(past, top, int(rows[-1]) + 1, keys, block_m, block_n, how)
        starts = {"walk-of-the-chunk": past, "walk-of-the-chunk's-tiles": past // block_n * block_n}
        for first in range(next((starts[word] for word in how & starts.keys()), 0), end, block_n):
            columns = torch.arange(first, min(first + block_n, end if "cut" in how else len(key)))
            hidden = _hidden(columns, past, rows, how)
            scores = (query[rows] @ key[columns].T).masked_fill(
                hidden, 0.0 if "hidden-are-zero" in how else -INF
            )
            new = torch.maximum(m, scores.amax(dim=1))
            if "one-maximum" in how:
                new = new.max().expand_as(new)
            if "padded" in how and len(rows) < block_m:  # rows that do not exist have scores of 0
                new = new.clamp(min=0.0)
            under = scores.amax(dim=1) if "own-maximum" in how else new
            weights, rescale = torch.exp(scores - under[:, None]), torch.exp(m - new)
            if "rescale-inverted" in how:
                rescale = torch.exp(new - m)
            if (
                "rescale-base-e" in how
            ):  # while maxima and weights are in base two; and the other way round
                rescale = torch.exp((m - new) * LOG2E)
            if "rescale-base-2" in how:
                rescale = torch.exp((m - new) / LOG2E)
            if "softmax-a-tile" in how:
                weights, rescale = scores.softmax(dim=1), torch.ones_like(m)
            acc = acc * (1.0 if "same-acc" in how else rescale[:, None]) + weights @ value[columns]
            l = l * (1.0 if "same-sum" in how else rescale) + weights.sum(dim=1)
            m, walked = m if "maximum-forgotten" in how else new, walked + 1
            if "divide-at-once" in how:
                acc = acc / l[:, None]
        out[rows] = acc if "undivided" in how else acc / (walked if "mean" in how else l[:, None])
    return out


def _end(
    past: int, top: int, last: int, keys: int, block_m: int, block_n: int, how: set[str]
) -> int:
    """Where the walk of the queries top … last - 1 ends."""
    end = min(past + last, keys)
    ends = {
        "walk-all": keys,
        "walk-from-start": min(top + block_m, keys),
        "walk-from-start-cut": min(last, keys),
        "walk-of-the-first": min(past + block_m, keys),
        "walk-to-the-queries": min(past + last, keys - past),
        "walk-before": (past + top) // block_n * block_n,
        "walk-up-to-the-first": past + top,
        "walk-one-less": end - 1,
        "walk-beyond": past + top + block_m,
        "walk-whole-tiles": end // block_n * block_n,
        "walk-one-more": min(end + 1, keys),
    }
    return next((ends[word] for word in how & ends.keys()), end)


def _hidden(columns: torch.Tensor, past: int, rows: torch.Tensor, how: set[str]) -> torch.Tensor:
    """Which scores of a tile are hidden."""
    import torch

    positions = rows if "mask-from-start" in how else past + rows
    if "mask-one-more" in how:
        positions = positions + 1
    if "mask-one-less" in how:
        positions = positions - 1
    if "mask-of-the-first" in how:
        positions = positions[:1].expand_as(positions)
    hidden = columns > positions[:, None]
    on_diagonal = columns[-1] > past + rows[0]
    if "mask-in-the-tile" in how and ("diagonal-only" not in how or on_diagonal):
        hidden = torch.arange(len(columns)) > torch.arange(len(rows))[:, None]
    late = "mask-late" in how and columns[0] < past + rows[0]
    return torch.zeros_like(hidden) if "unmasked" in how or late else hidden


_WALKS = {
    "aligned-to-start": (
        (
            "Your mask is aligned to the start: query 0 sees key 0 only, whatever came before it."
            " Whole prompts are right with it, and chunks with a past are not.\nThe queries are the"
            " LAST tokens: query i stands at position (number of keys) - (number of queries) + i."
        ),
        "mask-from-start walk-from-start",
        "mask-from-start",
        "mask-from-start walk-all",
        "mask-from-start walk-from-start-cut cut",
    ),
    "walk-ends-too-early": (
        (
            "The mask is right, but the walk ends where it would for a chunk without a past: the"
            " last keys are never visited.\nA tile's last query stands at position past + its row;"
            " the walk must come so far."
        ),
        "walk-from-start",
        "walk-from-start-cut cut",
        "walk-from-start-cut",
        "walk-from-start cut",
        "walk-to-the-queries",
        "walk-to-the-queries cut",
    ),
    "past-not-visited": (
        (
            "The walk begins at the chunk: the keys of the past are never visited, and a chunk"
            " forgets what came before it.\nA walk begins at key 0. Only its end depends on the"
            " tile of queries."
        ),
        "walk-of-the-chunk",
        "walk-of-the-chunk cut",
        "walk-of-the-chunk's-tiles",
        "walk-of-the-chunk's-tiles cut",
    ),
    "no-mask": (
        (
            "Queries see the future: changing a later token changes what earlier ones get.\n"
            "In tiles on the diagonal, scores of keys after the query's position must be -inf."
        ),
        "unmasked walk-all",
    ),
    "diagonal-not-masked": (
        (
            "The walk ends at the diagonal, but its last tile is used whole: its first queries see"
            " keys that come after them.\nTiles on the diagonal need the mask: -inf where key >"
            " position."
        ),
        "unmasked",
        "unmasked cut",
    ),
    "stops-before-the-diagonal": (
        (
            "The walk ends before the tile on the diagonal. There the queries' own tokens stand,"
            " and they may be seen, with a mask.\nWalk until the position of the tile's LAST query,"
            " that key included."
        ),
        "walk-before",
        "walk-up-to-the-first",
        "walk-up-to-the-first cut",
    ),
    "stops-one-short": (
        (
            "The walk ends one key too early: range() stops BEFORE its end. Where the tile's last"
            " query stands at the beginning of a tile of keys, that tile is missed, and with it the"
            " query's own key.\nThe end is one more than the position of the tile's last query."
        ),
        "walk-one-less",
        "walk-one-less cut",
    ),
    "walks-beyond-the-context": (
        (
            "Where the last tile of queries is not full, the walk goes on past the end of the"
            " context: there is a tile without a single key, and torch has no maximum of"
            " nothing.\nIt ends at min(…, len(key))."
        ),
        "walk-beyond",
    ),
    "indices-within-the-tile": (
        (
            "Your mask compares indices within the tile: row 3 of ANY tile sees columns 0 to 3 of"
            " it.\nCompare positions in the context: first key of the tile + column against"
            " position of the query."
        ),
        "mask-in-the-tile",
        "mask-in-the-tile cut",
        "mask-in-the-tile diagonal-only",
        "mask-in-the-tile diagonal-only cut",
    ),
    "straddling-tile-not-masked": (
        (
            "You mask the tiles that begin at the diagonal or behind it. Where past and tiles do"
            " not fit together, the diagonal starts WITHIN a tile that begins before it: its last"
            " keys are the future of its first queries.\nA tile needs no mask only when its last"
            " key comes no later than the tile's first query."
        ),
        "mask-late",
        "mask-late cut",
    ),
    "mask-of-the-first-query": (
        (
            "All queries of a tile get the mask of its first one.\n"
            "The mask has two axes: keys across, and down the position of each query ([:, None])."
        ),
        "mask-of-the-first",
    ),
    "sees-the-next-token": (
        "Each query sees one key too many: the token after its own.\nHidden is key > position.",
        "mask-one-more walk-one-more",
        "mask-one-more walk-one-more cut",
        "mask-one-more",
        "mask-one-more cut",
    ),
    "hides-its-own-token": (
        (
            "A query does not see its own token; the very first one sees nothing at all.\n"
            "Hidden is key > position, not >=."
        ),
        "mask-one-less",
    ),
    "hidden-scores-are-zero": (
        (
            "Hidden scores are 0 instead of -inf. exp(0 - m) is a weight like any other, so the"
            " future counts.\nFill with -inf (-math.inf): its exp is 0."
        ),
        "hidden-are-zero",
        "hidden-are-zero cut",
        "hidden-are-zero walk-all",
    ),
    "no-scale": (
        "Scores are not multiplied by `scale`, so the softmax is far too sharp.\nscale · q·k.",
        "unscaled",
        "base-2-unscaled",
    ),
    "scaled-twice": (
        (
            "Scores are multiplied by `scale` twice, perhaps once with the query and once as a"
            " product.\nOnce is enough."
        ),
        "scaled-twice",
    ),
    "no-log2e": (
        (
            "You use exp2 on scores that are meant for exp. 2^x is not e^x.\n"
            "exp(x) = exp2(x · log2 e): multiply `scale` by math.log2(math.e)."
        ),
        "no-log2e",
    ),
    "exp-of-base-two-scores": (
        (
            "The scores are made for base two, with log2 e in them, and you take exp of them: the"
            " softmax is too sharp.\nexp2 for both, the weights and the rescaling; or leave log2 e"
            " out."
        ),
        "log2e",
    ),
    "mixed-bases": (
        (
            "Two bases are mixed: the weights are powers of one, and the factor for the old sums is"
            " a power of the other. It shows only where a maximum grows.\nMaximum and scores are in"
            " the same unit: exp2 for both, or exp for both."
        ),
        "rescale-base-e",
        "rescale-base-2",
        "no-log2e rescale-base-e",
        "log2e rescale-base-2",
    ),
    "not-rescaled": (
        (
            "When a later tile brings a larger maximum, neither the old sum nor the old output is"
            " scaled down.\nMultiply both by exp(old maximum - new maximum) before you add the"
            " tile."
        ),
        "same-acc same-sum",
    ),
    "rescaled-the-wrong-way": (
        (
            "The factor for the old sums is upside down: exp(new - old) is at least 1, and inf at"
            " the first tile.\nUnder a larger maximum, old terms must shrink: exp(old - new)."
        ),
        "rescale-inverted",
    ),
    "maximum-not-kept": (
        (
            "The new maximum is never kept: for each tile the old one is still -inf, so that the"
            " factor is exp(-inf) = 0, and only the last tile counts.\nm = new, at the end of each"
            " step."
        ),
        "maximum-forgotten",
    ),
    "sum-not-rescaled": (
        (
            "The output is rescaled when the maximum grows, and the sum is not: in the end you"
            " divide by too much.\nl = l · rescale + …, with the same factor."
        ),
        "same-sum",
    ),
    "output-not-rescaled": (
        (
            "The sum is rescaled when the maximum grows, and the output so far is not: old values"
            " count too much.\nacc = acc · rescale + …, with the same factor, for each row."
        ),
        "same-acc",
    ),
    "tile-under-its-own-maximum": (
        (
            "A tile's weights are taken under its own maximum. Where an earlier tile had a larger"
            " score they are too large.\nTake them under the new running maximum: exp(scores -"
            " new)."
        ),
        "own-maximum",
    ),
    "a-softmax-for-each-tile": (
        (
            "Each tile gets a softmax of its own, as if there were no other keys.\n"
            "Carry m and l along the whole walk, and divide once, behind the loop."
        ),
        "softmax-a-tile undivided",
        "softmax-a-tile mean",
    ),
    "divided-in-each-tile": (
        (
            "You divide by the sum in every tile, so that older tiles are divided again and"
            " again.\nDivide once, after the walk."
        ),
        "divide-at-once undivided",
    ),
    "not-divided": (
        (
            "The weights do not add up to 1: the division by the sum is missing.\nDivide each row"
            " by its l after the walk."
        ),
        "undivided",
    ),
    "one-maximum-for-all-rows": (
        (
            "One maximum serves all queries of a tile. A query whose scores are far below it gets"
            " weights of 0 alone, and 0 / 0 is nan.\nEach row needs its own maximum: amax(dim=1),"
            " or tl.max(…, axis=1)."
        ),
        "one-maximum",
        "one-maximum padded",
    ),
    "tail-dropped": (
        (
            "The last tile of keys is left out where it is not full.\nrange(first, end, block)"
            " comes to it; counting end // block whole tiles does not. Its missing keys are masked."
        ),
        "walk-whole-tiles",
    ),
    "maximum-starts-at-zero": (
        (
            "The running maximum starts at 0: a query whose scores are all far below that gets"
            " weights of 0 alone, and 0 / 0 is nan.\nStart at -inf."
        ),
        "start-at-zero",
    ),
}
#: What depends on where tiles begin.
_TILE_BY_TILE = {
    "stops-before-the-diagonal",
    "stops-one-short",
    "past-not-visited",
    "straddling-tile-not-masked",
    "indices-within-the-tile",
    "mixed-bases",
    "not-rescaled",
    "maximum-not-kept",
    "sum-not-rescaled",
    "output-not-rescaled",
    "tile-under-its-own-maximum",
    "tail-dropped",
    "a-softmax-for-each-tile",
    "divided-in-each-tile",
}


def _suspects(use: Callable[[Callable], Callable] = lambda walk: walk, also: str = "") -> Suspects:
    """All wrong walks; use makes of a walk what is compared with the answer. also: done as well,
    a second time.
    """
    found = {}
    for name, (why, *ways) in _WALKS.items():
        ways += [f"{way} {also}" for way in ways if also]
        found[name] = (why, *(use(partial(_walk, wrong=way)) for way in ways))
    return found


def _inputs(
    queries: int, keys: int, dim: int, seed: int, size: float = 1.0, spread: float = 0.0
) -> tuple:
    """Query, key, value and scale. spread: how far the scores of one query lie from those of the
    next.
    """
    import torch

    random, scale = seeded(seed), dim**-0.5
    query, key = (torch.randn(count, dim, generator=random) * size for count in (queries, keys))
    value = torch.randn(keys, dim, generator=random)
    if spread:
        key[:, 0] = 1.0
        query[:, 0] = spread / scale * (torch.arange(queries) - queries + 1)
    return query, key, value, scale


# --- 02.3 -----------------------------------------------------------------------------------------


@dataclass
class _Watched:
    """What torch did meanwhile: the largest tensor made, and the FLOPs of matrix products."""

    largest: int = 0
    flops: int = 0
    fused: bool = False


def _watch(function: Callable, *args: Any) -> _Watched:
    """Run a function and watch; views count like tensors."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = _Watched()

    class Names(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.fused |= "scaled_dot_product" in getattr(function, "__name__", "")
            return function(*args, **(kwargs or {}))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = operation(*args, **(kwargs or {}))
            name = operation.overloadpacket.__name__
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    seen.largest = max(seen.largest, tensor.numel())
            if name in ("mm", "bmm", "mv", "addmm", "baddbmm"):
                one = args[1 if "add" in name else 0]
                seen.flops += 2 * result.numel() * one.shape[-1]
            return result

    with Names(), Watch():
        function(*args)
    return seen


def _expect_tiles(answer: Callable, dim: int, block: int) -> None:
    """An answer that is right must not hold the matrix, nor multiply tiles that nobody sees."""
    from minivllm.viz.tiles import attention_tiles

    queries, keys = 64, 1024
    seen = _watch(answer, *_inputs(queries, keys, dim, 99), block, block)
    expect(
        not seen.fused,
        "done-by-torch",
        "The result is right, but scaled_dot_product_attention made it.\nHere you build what stands"
        " behind it.",
    )
    expect(
        seen.largest < queries * keys,
        "whole-matrix",
        f"The result is right, but a tensor of {seen.largest:,} numbers was made on the way: for"
        f" {queries} queries and {keys:,} keys that is the whole matrix (masks count, too).\nHold"
        f" one tile of scores, {block} × {block}, at a time.",
    )
    limit = keys * dim  # all keys, which are given
    expect(
        seen.largest <= limit,
        "whole-rows",
        f"The result is right, but a tensor of {seen.largest:,} numbers was made on the way:"
        f" {block} queries against all {keys:,} keys.\nThe keys come in tiles, too, with a running"
        f" maximum and sum: {block} × {block} scores at a time.",
    )
    queries = keys = 128
    counts = attention_tiles(queries, keys, block, block).counts
    computed, tile_flops = counts["full"] + counts["masked"], 4 * block * block * dim
    flops = _watch(answer, *_inputs(queries, keys, dim, 98), block, block).flops
    expect(
        flops <= computed * tile_flops,
        "visits-the-future",
        f"The result is right, but matrix products of {flops / tile_flops:.0f} tiles were computed,"
        f" and only {computed} of {counts.total()} hold a pair that counts.\nA walk ends at the"
        " diagonal: at the position of the tile's last query.",
    )


@exercise(
    "02.3",
    "Flash attention, tile by tile",
    hints={
        "aligned-to-start": 2,
        "walk-ends-too-early": 2,
        "stops-before-the-diagonal": 2,
        "visits-the-future": 2,
        "tail-dropped": 2,
        "diagonal-not-masked": 3,
        "straddling-tile-not-masked": 3,
        "indices-within-the-tile": 3,
        "mask-of-the-first-query": 3,
        "not-rescaled": 3,
        "maximum-not-kept": 3,
        "divided-in-each-tile": 3,
        "not-divided": 3,
    },
)
def check_flash_attention(answer: Callable) -> str:
    shapes = [
        # queries, keys, dim, block_m, block_n
        (1, 1, 4, 16, 16),
        (4, 4, 8, 16, 16),
        (16, 16, 8, 16, 16),
        (32, 32, 8, 16, 16),
        (33, 33, 16, 16, 16),
        (1, 40, 8, 16, 16),
        (7, 40, 8, 16, 16),
        (20, 61, 16, 8, 16),
        (48, 48, 16, 16, 8),
        (17, 50, 8, 4, 32),
        (9, 9, 8, 1, 1),
    ]
    cases = [(*_inputs(q, n, d, seed), m, b) for seed, (q, n, d, m, b) in enumerate(shapes)]
    cases += [
        (*_inputs(24, 40, 8, 50, size=5.0), 8, 8),
        (*_inputs(4, 30, 8, 51, spread=60.0), 16, 8),
    ]
    query, key, value, _ = _inputs(5, 21, 8, 52)
    cases += [(query, key, value, 1.0, 4, 8), (query * 0, key, value, 0.3, 2, 4)]

    def right(query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int) -> Any:
        return _exact(query, key, value, scale)

    number = diagnose(answer, cases, right, _suspects(), rtol=1e-3, atol=2e-4)
    _expect_tiles(answer, dim=8, block=16)
    return f"{number} cases; one tile of scores at a time, and none in vain"


# --- 02.4 -----------------------------------------------------------------------------------------


@exercise(
    "02.4",
    "Debug this: the chunk that forgets",
    hints={
        "mask-spoilt-instead": 2,
        "walk-ends-too-early": 2,
        "past-not-visited": 2,
        "all-walks-end-alike": 3,
        "stops-before-the-diagonal": 3,
        "stops-one-short": 3,
        "walks-beyond-the-context": 3,
        "visits-the-future": 3,
    },
)
def check_chunk_attention(answer: Callable) -> str:
    from minivllm.viz.tiles import attention_tiles

    shapes = [
        (1, 1, 4),
        (16, 16, 16),
        (16, 16, 4),
        (30, 30, 8),
        (1, 33, 8),
        (8, 40, 8),
        (16, 56, 8),
        (13, 50, 8),
        (40, 41, 16),
    ]
    cases = [(*_inputs(q, n, 8, 100 + seed), block) for seed, (q, n, block) in enumerate(shapes)]

    def right(query: Any, key: Any, value: Any, scale: float, block: int) -> Any:
        return _exact(query, key, value, scale)

    def square(walk: Callable) -> Callable:
        return lambda query, key, value, scale, block: walk(query, key, value, scale, block, block)

    walks = _suspects(square)
    suspects = {
        "mask-spoilt-instead": (
            (
                "The walk comes far enough now, but the mask has been moved to the start: queries"
                " of a chunk see its first keys only.\nThe mask was right as it stood: key > past +"
                " row. Undo that."
            ),
            square(partial(_walk, wrong="mask-from-start")),
        ),
        "walk-ends-too-early": walks["walk-ends-too-early"],
        "all-walks-end-alike": (
            (
                "All walks end where the first one does: the tiles further down miss the chunk's"
                " own tokens before them.\nThe end depends on the tile of queries, `top`, as well"
                " as on the past."
            ),
            square(partial(_walk, wrong="walk-of-the-first")),
        ),
        **{name: suspect for name, suspect in walks.items() if name != "walk-ends-too-early"},
    }
    number = diagnose(lambda *args: answer(*args), cases, right, suspects)
    for (q, n, block), case in zip(shapes, cases, strict=True):
        tiles, visited = attention_tiles(q, n, block, block).kinds, []
        answer(*case, visited=visited)
        needed = {
            (i * block, j * block)
            for i, row in enumerate(tiles)
            for j, kind in enumerate(row)
            if kind != "skipped"
        }
        where = f"A chunk of {q} after {n - q}, tiles of {block}: "
        expect(
            set(visited) >= needed,
            "visited-not-noted",
            f"{where}of the tiles that are needed ({len(needed)}) only {len(set(visited) & needed)}"
            " stand in `visited`.\nThe result is right; leave the line that notes (top, first)"
            " where a tile is visited.",
        )
        wasted = len(set(visited) - needed)
        expect(
            not wasted,
            "visits-the-future",
            f"{where}the result is right, but {wasted} of {len(visited)} visited tiles hold nothing"
            " but the future.\nA walk ends at the position of the tile's last query, not at the"
            " end of the context.",
        )
    return f"{number} chunks, every tile visited that is needed, and no other"


# --- 02.5 -----------------------------------------------------------------------------------------


def _batch(
    query_lens: Sequence[int],
    contexts: Sequence[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    seed: int,
    in_order: bool = False,
    scale: float | None = None,
) -> tuple:
    """Arguments of prefill_attention. NaN lies where no token does, and in blocks that a table
    names past a context.
    """
    import torch

    random = seeded(seed)
    needed = [-(-context // block_size) for context in contexts]
    total, width = sum(needed) + 3, max(needed) + 2
    blocks = torch.arange(total) if in_order else torch.randperm(total, generator=random)
    table = blocks[-1].repeat(len(contexts), width).to(torch.int32)
    caches = [guarded(total, kv_heads, block_size, dim, fill=math.nan) for _ in range(2)]
    used = 0
    for i, (context, count) in enumerate(zip(contexts, needed, strict=True)):
        mine = blocks[used : used + count]
        table[i, :count], used = mine, used + count
        for cache in caches:
            tokens = torch.randn(kv_heads, context, dim, generator=random)
            for j, block in enumerate(mine.tolist()):
                part = tokens[:, j * block_size : (j + 1) * block_size]
                cache[block, :, : part.shape[1]] = part
    query = torch.randn(sum(query_lens), heads, dim, generator=random)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    return query, *caches, table, starts, lengths, dim**-0.5 if scale is None else scale


def _prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    wrong: str = "",
    attend: Callable | None = None,
) -> torch.Tensor:
    """Attention of a ragged batch over the paged cache, head by head with `attend`; wrong in the
    way that is named.
    """
    import torch

    out = torch.full_like(query, math.nan)
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    starts = query_start_loc.tolist()
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        if wrong in ("length-of-the-longest", "length-of-the-first"):
            context = int(seq_lens.max() if wrong == "length-of-the-longest" else seq_lens[0])
        count = (
            context // block_size if wrong == "blocks-rounded-down" else -(-context // block_size)
        )
        blocks = block_table[0 if wrong == "first-table" else i, :count].long()
        if wrong == "block-table-ignored":
            blocks = torch.arange(count)
        room = count * block_size if wrong == "reads-beyond-the-context" else context
        key, value = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :room] for cache in (k_cache, v_cache)
        )
        for head in range(heads):
            kv_head = head % kv_heads if wrong == "wrong-kv-head" else head // (heads // kv_heads)
            inputs = query[rows, head], key[kv_head], value[kv_head]
            if wrong == "reads-beyond-the-context":
                out[rows, head] = _beyond(*inputs, scale, context)
            else:
                out[rows, head] = (attend or _exact)(*inputs, scale)
    return out


def _right_walks(tiles: Sequence[tuple[int, int]]) -> list[Callable]:
    """Attention of one head in tiles of these sizes; where no key is left to see, it is 0 / 0."""
    return [partial(_walk, block_m=queries, block_n=keys) for queries, keys in tiles]


def _beyond(query: Any, key: Any, value: Any, scale: float, context: int) -> Any:
    """As `_exact` for the context, over keys and values that are longer: hidden, but 0 · NaN is
    NaN.
    """
    import torch

    scores = query @ key.T * scale
    hidden = torch.arange(len(key)) > torch.arange(context - len(query), context)[:, None]
    return scores.masked_fill(hidden, -INF).softmax(dim=-1) @ value


@exercise(
    "02.5",
    "Your attention reads for the engine",
    hints={
        "blocks-rounded-down": 2,
        "one-length-for-all": 2,
        "reads-beyond-the-context": 2,
        "block-table-ignored": 2,
        "table-of-the-first-sequence": 2,
        "wrong-kv-head": 3,
        "whole-matrix": 3,
    },
)
def check_prefill_attention(answer: Callable) -> str:
    from minivllm.kernels import Kernels

    cases = [
        _batch([4], [4], 1, 1, 8, 16, 1, in_order=True),
        _batch([1], [1], 4, 2, 8, 16, 2),
        _batch([16], [16], 2, 2, 8, 16, 3),
        _batch([5, 20, 1], [5, 20, 1], 4, 2, 8, 16, 4),
        _batch([7, 7], [7, 7], 4, 4, 8, 4, 5),
        _batch([3], [35], 2, 1, 8, 16, 6, scale=1.0),
        _batch([16, 2, 9], [48, 33, 9], 4, 2, 16, 16, 7),
        _batch([33, 64, 17], [70, 64, 80], 6, 2, 8, 32, 8),
        _batch([30, 5], [150, 200], 2, 2, 8, 16, 10),
    ]

    def call(*args: Any) -> Any:
        query_lens = (args[4][1:] - args[4][:-1]).tolist()
        return answer(*args, max_query_len=max(query_lens), max_seq_len=int(args[5].max()))

    def right(
        query: Any,
        k_cache: Any,
        v_cache: Any,
        block_table: Any,
        query_start_loc: Any,
        seq_lens: Any,
        scale: float,
    ) -> Any:
        return _prefill(query, k_cache, v_cache, block_table, query_start_loc, seq_lens, scale)

    # Nobody is told how large a tile is here, and many keep all queries of a request in one.
    tiles = [(queries, keys) for keys in (64, 16, 32) for queries in (1 << 20, keys)]

    def walks(name: str, way: str) -> list[Callable]:
        sizes = tiles if name in _TILE_BY_TILE else tiles[:1]
        return [
            partial(_prefill, attend=partial(_walk, block_m=m, block_n=n, wrong=way))
            for m, n in sizes
        ]

    suspects: Suspects = {
        "wrong-kv-head": (
            (
                "The query heads read the wrong KV heads: as if 0, 2, 4 shared one and 1, 3, 5"
                " another (head % KH).\nNEIGHBOURS share: query head h reads KV head h // (H //"
                " KH)."
            ),
            partial(_prefill, wrong="wrong-kv-head"),
        ),
        "block-table-ignored": (
            (
                "You read blocks 0, 1, 2, … of the cache, which belong to anybody.\n"
                "Block j of sequence i lies in block_table[i, j]."
            ),
            partial(_prefill, wrong="block-table-ignored"),
        ),
        "table-of-the-first-sequence": (
            (
                "All sequences read through the block table of the first one.\nRow i of block_table"
                " belongs to sequence i."
            ),
            partial(_prefill, wrong="first-table"),
        ),
        "blocks-rounded-down": (
            (
                "The last block of a request is left out where it is not full: its keys are"
                " missing, among them those of the newest tokens.\nA context of 35 tokens lies in 3"
                " blocks of 16: round up, -(-context // block_size)."
            ),
            partial(_prefill, wrong="blocks-rounded-down"),
            *(
                partial(_prefill, wrong="blocks-rounded-down", attend=walk)
                for walk in _right_walks(tiles)
            ),
        ),
        "one-length-for-all": (
            (
                "All requests get the same length of context, that of the longest or of the first."
                " What lies in the cache beyond a request's own context belongs to nobody (here it"
                " is nan).\nRequest i has seq_lens[i] tokens; max_seq_len is only what a kernel's"
                " grid needs."
            ),
            *(partial(_prefill, wrong=f"length-of-the-{which}") for which in ("longest", "first")),
            *(
                partial(_prefill, wrong=f"length-of-the-{which}", attend=walk)
                for which in ("longest", "first")
                for walk in _right_walks(tiles)
            ),
        ),
        "reads-beyond-the-context": (
            (
                "The last block is read to its end, and what lies beyond the context can be"
                " anything: here it is nan. A weight of 0 does not help: 0 · nan is nan.\nCut keys"
                " and values at the context, seq_lens[i]."
            ),
            partial(_prefill, wrong="reads-beyond-the-context"),
        ),
        **{
            name: (why, *(f for way in ways for f in walks(name, way)))
            for name, (why, *ways) in _WALKS.items()
        },
    }
    number = diagnose(call, cases, right, suspects)

    queries = keys = 320
    seen = _watch(call, *_batch([queries], [keys], 2, 1, 8, 16, 9))
    limit = 2 * queries * 64
    expect(
        not seen.fused,
        "done-by-torch",
        "The result is right, but scaled_dot_product_attention made it.\nHere you build what stands"
        " behind it.",
    )
    expect(
        seen.largest <= limit,
        "whole-matrix",
        f"The result is right, but a tensor of {seen.largest:,} numbers was made on the way, for a"
        f" prompt of {keys} tokens and 2 heads: a score for each pair of tokens (a mask counts,"
        f" too).\nWalk along the keys in tiles of at most 64: {limit:,} numbers for all queries and"
        " heads at once.",
    )
    mine = counted(answer)
    kernels = replace(Kernels.reference(), prefill_attention=mine)
    line = engine_agrees(mine, kernels=kernels, max_num_batched_tokens=16)
    return f"{number} batches; in chunks of 16, {line}"


# --- 02.6 -----------------------------------------------------------------------------------------


@exercise(
    "02.6",
    "The walk in Triton",
    hints={
        "not-divided": 1,
        "not-rescaled": 1,
        "maximum-not-kept": 1,
        "reads-beyond-the-keys": 2,
        "aligned-to-start": 3,
        "walk-ends-too-early": 3,
        "visits-the-future": 3,
        "exp-of-base-two-scores": 3,
        "one-maximum-for-all-rows": 3,
        "diagonal-not-masked": 3,
    },
)
def check_flash_kernel(answer: Any) -> str:
    import torch

    expect_triton("Exercise 02.3 is the same walk in torch.")
    shapes = [
        # queries, keys, dim, block_m, block_n
        (16, 16, 16, 16, 16),
        (1, 1, 16, 16, 16),
        (5, 5, 16, 16, 16),
        (32, 32, 16, 16, 16),
        (33, 33, 16, 16, 16),
        (7, 40, 32, 16, 32),
        (20, 61, 16, 16, 16),
        (40, 40, 16, 32, 16),
        (17, 64, 16, 16, 32),
    ]
    made = [(_inputs(q, n, d, 200 + seed), m, b) for seed, (q, n, d, m, b) in enumerate(shapes)]
    made += [
        (_inputs(20, 40, 16, 250, size=4.0), 16, 16),
        (_inputs(4, 30, 16, 251, spread=60.0), 16, 16),
    ]
    query, key, value, _ = _inputs(9, 20, 16, 252)
    made.append(((query, key, value, 1.0), 16, 16))
    cases = [
        (guarded(*q.shape), guard(q), guard(k), guard(v), scale, m, n)
        for (q, k, v, scale), m, n in made
    ]

    def launch(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        grid = (-(-len(query) // block_m),)
        constants = {"D": query.shape[1], "BLOCK_M": block_m, "BLOCK_N": block_n}
        answer[grid](out, query, key, value, len(query), len(key), scale * LOG2E, **constants)

    def right(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        out.copy_(_exact(query, key, value, scale))

    def written(walk: Callable) -> Callable:
        def run(
            out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
        ) -> None:
            out.copy_(walk(query, key, value, scale, block_m, block_n))

        return run

    def beyond(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        out.copy_(_exact(query, key, value, scale))
        for top in range(0, len(query), block_m):
            seen = len(key) - len(query) + min(top + block_m, len(query))
            if -(-seen // block_n) * block_n > len(key):
                out[top : top + block_m] = math.nan

    def first_program(
        out: Any, query: Any, key: Any, value: Any, scale: float, block_m: int, block_n: int
    ) -> None:
        out[:block_m] = _exact(query, key, value, scale)[:block_m]

    suspects = {
        "reads-beyond-the-keys": (
            (
                "Where the last tile of keys is not full, its rows beyond N are read: poison here,"
                " nan. A weight of 0 does not help, for 0 · nan is nan.\nLoad key AND value with"
                " mask=(…< N)[:, None] and other=0.0."
            ),
            beyond,
        ),
        "program-id-ignored": (
            (
                "Only the first BLOCK_M queries have a result; the other programs did the same ones"
                " again.\nProgram p does the queries from p · BLOCK_M on: tl.program_id(0)."
            ),
            first_program,
        ),
        **_suspects(written, also="padded-keys"),
    }
    store = (
        "The last tile of queries may stick out: its rows from Q on do not exist. tl.store needs"
        " the mask that loaded them, (rows < Q)[:, None]."
    )
    number = diagnose(
        launch, cases, right, suspects, writes=(0,), wording={BEYOND: store}, rtol=1e-3, atol=2e-4
    )

    # The first tile of a prompt of three, where keys that it must not visit are nan.
    query, key, value, scale = _inputs(48, 48, 16, 260)
    expected = _exact(query, key, value, scale)[:16]
    key[16:], value[16:], out = math.nan, math.nan, guarded(48, 16)
    answer[(1,)](
        out,
        guard(query),
        guard(key),
        guard(value),
        48,
        48,
        scale * LOG2E,
        D=16,
        BLOCK_M=16,
        BLOCK_N=16,
    )
    expect(
        torch.allclose(out[:16], expected, rtol=1e-3, atol=2e-4),
        "visits-the-future",
        "The result is right, but tiles are visited that hold nothing but the future (here they are"
        " nan, which shows).\nEnd the loop at the position after the tile's last query, N - Q +"
        " (program + 1) · BLOCK_M, or at N.",
    )
    return f"{number} cases, ragged at both ends, and no tile in vain"
