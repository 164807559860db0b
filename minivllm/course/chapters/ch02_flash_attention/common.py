"""What the exercises of chapter 02 share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import Suspects
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    import torch


INF = math.inf


LOG2E = math.log2(math.e)


def exact(
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


def the_walk(
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
        end = the_end(past, top, int(rows[-1]) + 1, keys, block_m, block_n, how)
        starts = {"walk-of-the-chunk": past, "walk-of-the-chunk's-tiles": past // block_n * block_n}
        for first in range(next((starts[word] for word in how & starts.keys()), 0), end, block_n):
            columns = torch.arange(first, min(first + block_n, end if "cut" in how else len(key)))
            hidden = the_hidden(columns, past, rows, how)
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


def the_end(
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


def the_hidden(columns: torch.Tensor, past: int, rows: torch.Tensor, how: set[str]) -> torch.Tensor:
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


WALKS = {
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


def the_suspects(
    use: Callable[[Callable], Callable] = lambda walk: walk, also: str = ""
) -> Suspects:
    """All wrong walks; use makes of a walk what is compared with the answer. also: done as well,
    a second time.
    """
    found = {}
    for name, (why, *ways) in WALKS.items():
        ways += [f"{way} {also}" for way in ways if also]
        found[name] = (why, *(use(partial(the_walk, wrong=way)) for way in ways))
    return found


def the_inputs(
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


@dataclass
class Watched:
    """What torch did meanwhile: the largest tensor made, and the FLOPs of matrix products."""

    largest: int = 0
    flops: int = 0
    fused: bool = False


def the_watch(function: Callable, *args: Any) -> Watched:
    """Run a function and watch; views count like tensors."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = Watched()

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
