"""What the exercises of chapter 01 share: the recurrence, and the slips that people make in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from minivllm.course.grading.exercise import Known

if TYPE_CHECKING:
    import torch

INF = math.inf


def finite(maximum: torch.Tensor) -> torch.Tensor:
    """What to subtract: the maximum, but 0 for -inf, because -inf - -inf is NaN."""
    return maximum.masked_fill(maximum == -INF, 0.0)


@dataclass(frozen=True)
class Walk:
    """The recurrence by tiles: right by default, and wrong in the ways that the fields name."""

    #: The maximum before the first tile.
    start: float = -INF
    #: Whether 0 is subtracted where the maximum is -inf.
    guarded: bool = True
    #: What is subtracted is at least this.
    clamp: float = -INF
    #: Whether the 0 is subtracted wherever a tile is masked, whatever came before it.
    guard_by_tile: bool = False
    #: Whether that holds for the weights of a masked tile after others, too.
    guards_weights: bool = True
    #: The maximum under which the weights of a tile are taken.
    under: Literal["new", "tile", "old", "old or new", "nothing"] = "new"
    #: What multiplies what was summed before.
    factor: Literal["shrinks", "grows", "grows, 0 at first", "by tile", "one"] = "shrinks"
    #: Whether the factor is used, for the sum and for the output.
    rescales_sum: bool = True
    rescales_out: bool = True
    #: Whether the tile is added before the factor is used.
    late: bool = False
    #: Whether the new maximum is the larger one of the old and the tile's, and whether it is kept.
    compares: bool = True
    keeps: bool = True
    #: Whether the tile's own maximum is kept in its place.
    keeps_tile_max: bool = False
    #: Whether the number that stands in for a maximum of -inf is kept.
    keeps_finite: bool = False
    #: Whether absolute values are compared.
    magnitudes: bool = False
    #: Whether a tile that does not raise the maximum is left out.
    only_rises: bool = False
    #: Whether all rows share one maximum.
    shared: bool = False
    #: Whether all rows share one sum.
    sums_all: Literal["", "in each tile", "at the end"] = ""
    #: Which tiles count.
    tiles: Literal[
        "all",
        "full",
        "first",
        "but the last",
        "until masked",
        "none if the first is masked",
        "without masked scores",
    ] = "all"
    #: Whether the output is divided by the sum so far in each tile.
    divides_each: bool = False
    #: Whether exp2 stands in place of exp.
    base_two: bool = False

    def __call__(
        self, scores: torch.Tensor, block: int, values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores [M, N] and values [N, E] -> maximum [M, 1], sum [M, 1], weighted sum [M, E]."""
        import torch

        values = scores.new_zeros(scores.shape[1], 1) if values is None else values
        m, l = torch.full((len(scores), 1), self.start), torch.zeros(len(scores), 1)
        acc = torch.zeros(len(scores), values.shape[1])
        for tile, value in zip(*self._tiles(scores, values, block), strict=True):
            tile_max = (finite(tile).abs() if self.magnitudes else tile).amax(dim=1, keepdim=True)
            tile_max = tile_max.max().expand_as(m) if self.shared else tile_max
            new = torch.maximum(m, tile_max) if self.compares else tile_max
            under = new.masked_fill(tile_max == -INF, 0.0) if self.guard_by_tile else new
            under = under.clamp(min=self.clamp)
            weights = self.exp(tile - self._under(m, tile_max, under))
            factor = self._factor(m, tile_max, under)
            added, out = weights.sum(dim=1, keepdim=True), weights @ value
            added = added.sum().expand_as(m) if self.sums_all == "in each tile" else added
            if self.only_rises:
                rises = tile_max > m
                added, out, factor = added * rises, out * rises, factor.where(rises, 1.0)
            if self.late:
                l, acc = (l + added) * factor, (acc + out) * factor
            else:
                l = (l * factor if self.rescales_sum else l) + added
                acc = (acc * factor if self.rescales_out else acc) + out
            acc = acc / l if self.divides_each else acc
            kept = tile_max if self.keeps_tile_max else new
            kept = finite(kept) if self.keeps_finite else kept
            m = kept if self.keeps else m
        return m, l.sum().expand_as(m) if self.sums_all == "at the end" else l, acc

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        """The power that the walk takes for exp."""
        return x.exp2() if self.base_two else x.exp()

    def probabilities(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """The softmax of the rows [T, N] that a second loop writes after this walk."""
        m, l, _ = self(x, block)
        return self.exp(x if self.under == "nothing" else x - m) / l

    def _safe(self, maximum: torch.Tensor) -> torch.Tensor:
        return finite(maximum) if self.guarded else maximum

    def _under(self, m: torch.Tensor, tile_max: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not self.guards_weights:
            return tile_max.masked_fill(new == -INF, 0.0)
        bases = {"new": new, "tile": tile_max, "old": m, "old or new": m.where(m > -INF, new)}
        return 0.0 * finite(new) if self.under == "nothing" else self._safe(bases[self.under])

    def _factor(self, m: torch.Tensor, tile_max: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.factor == "one" or self.under == "nothing":
            return 0.0 * finite(new) + 1.0
        if self.factor == "by tile":
            return self.exp(m - self._safe(tile_max))
        if self.factor == "shrinks":
            return self.exp(m - self._safe(new))
        grown = self.exp(new - m)
        return grown.masked_fill(m == -INF, 0.0) if self.factor == "grows, 0 at first" else grown

    def _tiles(self, scores: torch.Tensor, values: torch.Tensor, block: int) -> tuple:
        tiles, parts = scores.split(block, dim=1), values.split(block)
        last, tail = len(tiles) - 1, scores.shape[1] % block > 0
        masked = [bool((tile == -INF).all()) for tile in tiles]
        counts = {
            "all": lambda i: True,
            "full": lambda i: not (i == last and tail),
            "first": lambda i: i == 0,
            "but the last": lambda i: i < last,
            "but the last of several": lambda i: i < max(last, 1),
            "until masked": lambda i: not any(masked[: i + 1]),
            "none if the first is masked": lambda i: not masked[0],
            "without masked scores": lambda i: bool((tiles[i] > -INF).all()),
        }[self.tiles]
        chosen = [i for i in range(len(tiles)) if counts(i)]
        return [tiles[i] for i in chosen], [parts[i] for i in chosen]


#: Mistake's name, its message, the walks that make it. Where two walks look alike in all cases, the
#: first name is given, and the message shows the others, too.
_SLIPS: tuple[tuple[str, str, tuple[Walk, ...]], ...] = (
    (
        "masked-tile-is-nan",
        "A tile in which everything is masked makes nan, if no score came before it: its maximum is"
        " -inf, and -inf - -inf is nan. Once the sum is nan it stays nan.\nWhere the new maximum is"
        " -inf, subtract 0 instead: exp(-inf - 0) is 0, which is what a masked score is worth.",
        (Walk(guarded=False),),
    ),
    (
        "tile-under-its-own-maximum",
        "A tile's weights are taken under the tile's own maximum. Where an earlier tile held a"
        " larger score, they are too large.\nTake them under the running maximum, after it has seen"
        " the tile: then the whole sum stands under one maximum.",
        (Walk(under="tile"), Walk(under="tile", guards_weights=False)),
    ),
    (
        "only-rising-tiles",
        "A tile counts only when it raises the maximum; the others are left out, though their"
        " scores have weights, too.\nAdd every tile to the sum. What depends on the maximum is the"
        " rescaling: without a rise its factor is 1.",
        (Walk(only_rises=True),),
    ),
    (
        "tile-under-the-old-maximum",
        "A tile's weights are taken under the maximum from before the tile. Where the tile holds a"
        " larger score, they are too large.\n"
        "Find the new maximum first, and take the weights under that.",
        (Walk(under="old or new"),),
    ),
    (
        "no-rescale",
        "What was summed before is not rescaled when the maximum grows: older pieces stay as they"
        " were, under a maximum that no longer holds.\nMultiply them by exp(old maximum - new"
        " maximum) before you add the tile.",
        (Walk(factor="one"),),
    ),
    (
        "guard-changes-low-maxima",
        "What you subtract is never below a limit (0, for example), also where the maximum is an"
        " ordinary number below it. The sum then stands under another maximum than the one that you"
        " keep.\nOnly a maximum of -inf needs another number in its place.",
        tuple(Walk(clamp=limit) for limit in (0.0, -1e2, -1e3, -1e4)),
    ),
    (
        "rescaled-the-wrong-way",
        "What was summed before grows when the maximum grows. Its terms are exp(score - maximum):"
        " under a larger maximum they must shrink.\nThe factor is exp(old - new), at most 1.",
        (Walk(factor="grows, 0 at first"),),
    ),
    (
        "nan-from-the-first-tile",
        "Your sum is nan from the first tile on. Before it the maximum is -inf and the sum is 0, so"
        " a factor of exp(new - old), which is inf, makes 0 * inf = nan; a quotient, or a"
        " difference without exp, does the same; weights under the OLD maximum of -inf are"
        " inf.\nThe factor is exp(old - new), here exp(-inf) = 0, and the weights stand under the"
        " new maximum.",
        (Walk(factor="grows"), Walk(under="old")),
    ),
    (
        "tile-rescaled-too",
        "The tile is added before the rescaling, so that its own weights shrink as well. They are"
        " under the new maximum already.\nRescale only what was there before, then add the tile.",
        (Walk(late=True),),
    ),
    (
        "rescaled-by-the-tile",
        "What was summed before is rescaled by exp(old maximum - the TILE's maximum). Where the"
        " tile holds nothing larger, the maximum does not change, and the factor must be 1.\nUse"
        " the new running maximum in the factor: exp(old - new).",
        (Walk(factor="by tile"),),
    ),
    (
        "maximum-of-the-last-tile",
        "Your running maximum is the maximum of the latest tile: a larger score of an earlier tile"
        " is forgotten.\nThe new maximum is the larger one of two: of the old maximum and the"
        " tile's.",
        (Walk(compares=False), Walk(keeps_tile_max=True)),
    ),
    (
        "stand-in-kept",
        "While all scores are masked you subtract 0 in place of -inf, which is right, and you keep"
        " this 0 as the maximum, which is not: no score is 0, and scores far below it underflow to"
        " a sum of 0.\nSubtract the number that stands in, and keep the maximum itself.",
        (Walk(keeps_finite=True),),
    ),
    (
        "maximum-not-kept",
        "The new maximum is not kept for the next tile: there the old maximum is still the one from"
        " before the loop.\nAt the end of each step the new maximum becomes the old one.",
        (Walk(keeps=False),),
    ),
    (
        "maximum-starts-at-zero",
        "Your running maximum starts at 0. A row of negative scores then has the maximum 0, which"
        " is not among them, and far below it everything underflows to a sum of 0.\nStart at -inf:"
        " exp(-inf) = 0 rescales the empty sum.",
        (Walk(start=0.0),),
    ),
    (
        "maximum-starts-too-high",
        "Your running maximum starts at a finite number in place of -inf. Where all scores of a row"
        " lie below it, that number stays the maximum, though it is not among the scores.\nStart at"
        " -inf, which is below everything.",
        tuple(
            Walk(start=start)
            for start in (-1e2, -1e3, -1e4, -1e5, -1e6, -1e9, -1e10, -1e20, -1e30, -1e38)
        ),
    ),
    (
        "largest-magnitude",
        "Your maximum is that of the absolute values. For scores far below 0 it is far above them,"
        " and everything underflows to a sum of 0.\nTake the largest score itself, which may be"
        " negative.",
        (Walk(magnitudes=True),),
    ),
    (
        "no-maximum",
        "You take exp of the scores as they are: large ones give inf, and inf / inf is nan.\nKeep a"
        " running maximum, subtract it in the exponent, and rescale when it grows.",
        (Walk(under="nothing"),),
    ),
    (
        "tail-dropped",
        "Your loop ends before the last tile when that is not full: its scores are ignored.\nA"
        " row's length need not be a multiple of the tile's; go on until the row ends, not for"
        " length // tile steps.",
        (Walk(tiles="full"),),
    ),
    (
        "last-tile-dropped",
        "Your loop ends one tile too early: the last tile is ignored, full or not.\nCount the steps"
        " for a row that fits into one tile.",
        (Walk(tiles="but the last"), Walk(tiles="but the last of several")),
    ),
    (
        "first-tile-only",
        "Only the first tile of a row counts; the row may be longer.\nLoop over the tiles: one"
        " begins at each multiple of the tile's length.",
        (Walk(tiles="first"),),
    ),
    (
        "stops-at-a-masked-tile",
        "Your walk ends at a tile in which everything is masked. Scores may follow after it.\nLeave"
        " that tile out, and go on with the next one: `continue`, not `break`.",
        (Walk(tiles="until masked"), Walk(tiles="none if the first is masked")),
    ),
    (
        "tiles-with-masked-scores-left-out",
        "You leave out each tile that holds a masked score, and with it the scores beside that"
        " one.\nA masked score (-inf) adds exp(-inf) = 0 by itself. Only a tile in which ALL scores"
        " are masked needs care.",
        (Walk(tiles="without masked scores"),),
    ),
    (
        "guard-looks-at-the-tile",
        "You subtract 0 wherever a TILE is masked. If scores came before it, the maximum is not"
        " -inf, and the sum must stay under it; yours is multiplied by exp(maximum - 0).\nSubtract"
        " 0 only where the new running maximum is -inf: then nothing but masked scores came so"
        " far.",
        (Walk(guard_by_tile=True),),
    ),
    (
        "base-two",
        "Your weights are powers of 2, and softmax is made of powers of e.\nexp2(x) is exp(x) only"
        " when x is multiplied by log2(e) first; here plain exp is asked for.",
        (Walk(base_two=True),),
    ),
    (
        "one-maximum-for-all-rows",
        "All rows of scores share one running maximum. A row whose scores lie far below another"
        " row's underflows: 0 / 0.\nThe maximum is taken along each row: dim=1, with keepdim=True.",
        (Walk(shared=True),),
    ),
    (
        "one-sum-for-all-rows",
        "All rows of scores share one sum: you divide each row by the weights of all of them.\nThe"
        " sum is taken along each row: dim=1, with keepdim=True.",
        (Walk(sums_all="in each tile"), Walk(sums_all="at the end")),
    ),
    (
        "output-not-rescaled",
        "The sum is rescaled when the maximum grows, but the running output is not: older values"
        " count too much.\nThe output stands under the same maximum as the sum: multiply both by"
        " exp(old - new).",
        (Walk(rescales_out=False),),
    ),
    (
        "sum-not-rescaled",
        "The running output is rescaled when the maximum grows, but the sum is not: you divide by"
        " too much.\nThe sum stands under the same maximum as the output: multiply both by"
        " exp(old - new).",
        (Walk(rescales_sum=False),),
    ),
    (
        "divided-in-each-tile",
        "You divide the running output by the sum in each tile, and carry on with the quotient: old"
        " pieces are divided again and again.\nKeep the weighted sum as it is, and divide once,"
        " after the loop.",
        (Walk(divides_each=True),),
    ),
)


def _unguarded(walk: Walk) -> Walk:
    return replace(walk, guarded=False)


def slips(
    use: Callable[[Walk], Callable],
    hints: Mapping[str, int],
    answers: Mapping[str, str],
    without: tuple[str, ...] = (),
) -> tuple[Known, ...]:
    """The slips that every exercise of the chapter can name.

    use: from a walk to a function with the parameters of the exercise's answer. hints, answers: of
    `Known`, by mistake's name. without: names of slips that cannot show in this exercise.
    """
    known = [
        Known(
            name,
            message,
            hints.get(name),
            # People make a slip with the guard against -inf - -inf, and without it.
            tuple(use(walk) for walk in dict.fromkeys((*walks, *map(_unguarded, walks)))),
            answers.get(name, ""),
        )
        for name, message, walks in _SLIPS
        if name not in without
    ]
    if lost := {*hints, *answers} - {slip.name for slip in known}:
        raise ValueError(f"No slips of chapter 01: {', '.join(sorted(lost))}")
    return tuple(known)
