"""The mistakes that all exercises of chapter 02 can name, and how they are found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minivllm.course.chapters.ch02_flash_attention.cases import abyss
from minivllm.course.chapters.ch02_flash_attention.probe import Attend, described
from minivllm.course.chapters.ch02_flash_attention.walk import Walk, exact
from minivllm.course.grading.compare import difference
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known

#: What `judge` compares with. Sums of thousands of terms in float32 stay far below.
TOLERANCES = {"rtol": 2e-4, "atol": 1e-4}

#: Makes of a wrong walk the functions that an exercise compares with answers.
Use = Callable[[str, Walk], Sequence[Callable]]


#: Each mistake in a walk: its name, its message, and the words for `Walk` that make it.
_CATALOGUE = (
    (
        "aligned-to-start",
        "Your mask is aligned to the start: query 0 sees key 0 only, whatever came "
        "before it. Whole prompts are right with it, and chunks with a past are not.\n"
        "The queries are the LAST tokens: query i stands at position (number of keys) "
        "- (number of queries) + i.",
        "mask-from-start walk-from-start",
        "mask-from-start",
        "mask-from-start walk-all",
        "mask-from-start walk-from-start-cut cut",
    ),
    (
        "walk-ends-too-early",
        "The mask is right, but the walk ends where it would for a chunk without a "
        "past: the last keys are never visited.\n"
        "A tile's last query stands at position past + its row; the walk must come so "
        "far.",
        "walk-from-start",
        "walk-from-start-cut cut",
        "walk-from-start-cut",
        "walk-from-start cut",
        "walk-to-the-queries",
        "walk-to-the-queries cut",
    ),
    (
        "past-not-visited",
        "The walk begins at the chunk: the keys of the past are never visited, and a "
        "chunk forgets what came before it.\n"
        "A walk begins at key 0. Only its end depends on the tile of queries.",
        "walk-of-the-chunk",
        "walk-of-the-chunk cut",
        "walk-of-the-chunk's-tiles",
        "walk-of-the-chunk's-tiles cut",
    ),
    (
        "no-mask",
        "Queries see the future: changing a later token changes what earlier ones get.\n"
        "In tiles on the diagonal, scores of keys after the query's position must be "
        "-inf.",
        "unmasked walk-all",
    ),
    (
        "diagonal-not-masked",
        "The walk ends at the diagonal, but its last tile is used whole: its first "
        "queries see keys that come after them.\n"
        "Tiles on the diagonal need the mask: -inf where key > position.",
        "unmasked",
        "unmasked cut",
    ),
    (
        "stops-before-the-diagonal",
        "The walk ends before the tile on the diagonal. There the queries' own tokens "
        "stand, and they may be seen, with a mask.\n"
        "Walk until the position of the tile's LAST query, that key included.",
        "walk-before",
        "walk-up-to-the-first",
        "walk-up-to-the-first cut",
    ),
    (
        "stops-one-short",
        "The walk ends one key too early: range() stops BEFORE its end. Where the "
        "tile's last query stands at the beginning of a tile of keys, that tile is "
        "missed, and with it the query's own key.\n"
        "The end is one more than the position of the tile's last query.",
        "walk-one-less",
        "walk-one-less cut",
        "walk-one-less-or-one",
        "walk-one-less-or-one cut",
        "walk-of-the-block-less",
        "walk-of-the-block-less cut",
    ),
    (
        "walks-beyond-the-context",
        "Where the last tile of queries is not full, the walk goes on past the end of "
        "the context: there is a tile without a single key, and torch has no maximum "
        "of nothing.\n"
        "It ends at min(…, len(key)).",
        "walk-beyond",
        "walk-beyond cut",
    ),
    (
        "indices-within-the-tile",
        "Your mask compares indices within the tile: row 3 of ANY tile sees columns 0 "
        "to 3 of it.\n"
        "Compare positions in the context: first key of the tile + column against "
        "position of the query.",
        "mask-in-the-tile",
        "mask-in-the-tile cut",
        "mask-in-the-tile diagonal-only",
        "mask-in-the-tile diagonal-only cut",
    ),
    (
        "straddling-tile-not-masked",
        "You mask the tiles that begin at the diagonal or behind it. Where past and "
        "tiles do not fit together, the diagonal starts WITHIN a tile that begins "
        "before it: its last keys are the future of its first queries.\n"
        "A tile needs no mask only when its last key comes no later than the tile's "
        "first query.",
        "mask-late",
        "mask-late cut",
        "mask-of-the-chunk",
        "mask-of-the-chunk cut",
    ),
    (
        "mask-of-the-first-query",
        "All queries of a tile get the mask of its first one.\n"
        "The mask has two axes: keys across, and down the position of each query ([:, "
        "None]).",
        "mask-of-the-first",
    ),
    (
        "mask-of-the-first-tile",
        "All tiles of queries get the mask of the first tile: the queries further down do not see"
        " the keys between those and their own.\n"
        "A query's position is past + its row in the whole chunk, not in its tile.",
        "mask-of-the-first-tile",
        "mask-of-the-first-tile cut",
    ),
    (
        "walk-of-the-first-query",
        "The walk of a tile ends at the position of its FIRST query: the others do not see the"
        " keys between that and their own.\n"
        "It ends behind the position of the tile's LAST query.",
        "walk-to-the-first cut",
        "walk-to-the-first",
    ),
    (
        "sees-the-next-token",
        "Each query sees one key too many: the token after its own.\nHidden is key > position.",
        "mask-one-more walk-one-more",
        "mask-one-more walk-one-more cut",
        "mask-one-more",
        "mask-one-more cut",
    ),
    (
        "hides-its-own-token",
        "A query does not see its own token; the very first one sees nothing at all.\n"
        "Hidden is key > position, not >=.",
        "mask-one-less",
    ),
    (
        "hidden-scores-are-zero",
        "Hidden scores are 0 instead of -inf. exp(0 - m) is a weight like any other, "
        "so the future counts.\n"
        "Fill with -inf (-math.inf): its exp is 0.",
        "hidden-are-zero",
        "hidden-are-zero cut",
        "hidden-are-zero walk-all",
    ),
    (
        "hidden-scores-too-high",
        "Hidden scores get a number such as -10,000 instead of -inf. Where all scores "
        "that a query may see are lower than that (here some are about -10¹²), the "
        "weight goes to the future.\n"
        "Fill with -inf (-math.inf) by masked_fill or where; adding a number is not "
        "enough, either.",
        "hidden-at-a-number",
        "hidden-at-a-number cut",
        "hidden-minus-a-number",
        "hidden-minus-a-number cut",
    ),
    (
        "maximum-before-the-mask",
        "The maximum is taken before the mask: over hidden scores, too. One large key "
        "in the future, and the weights of what a query may see are all 0; then 0 / 0 "
        "is nan.\n"
        "Mask the scores first, then take their maximum.",
        "maximum-before-mask",
        "maximum-before-mask cut",
    ),
    (
        "sum-before-the-mask",
        "Hidden keys are left out of the output, and are in the sum: the weights of "
        "each query add up to less than 1.\n"
        "Mask the scores before exp, so that sum and output get the same weights.",
        "sum-before-mask",
        "sum-before-mask cut",
    ),
    (
        "no-scale",
        "Scores are not multiplied by `scale`, so the softmax is far too sharp.\nscale · q·k.",
        "unscaled",
        "base-2-unscaled",
    ),
    (
        "scaled-twice",
        "Scores are multiplied by `scale` twice, perhaps once with the query and once "
        "as a product.\n"
        "Once is enough.",
        "scaled-twice",
    ),
    (
        "scale-of-your-own",
        "You compute the scale from the number of columns, D ** -0.5, and do not use "
        "the `scale` that you are given. They are often equal, and not always.\n"
        "The argument `scale` decides.",
        "scale-of-the-width",
    ),
    (
        "divided-by-scale",
        "Scores are divided by `scale`. It is 1 / sqrt(D) already, so it makes scores "
        "smaller.\n"
        "Multiply: scale · q·k.",
        "scale-inverted",
    ),
    (
        "no-log2e",
        "You use exp2 on scores that are meant for exp. 2^x is not e^x.\n"
        "exp(x) = exp2(x · log2 e): multiply `scale` by math.log2(math.e).",
        "no-log2e",
    ),
    (
        "exp-of-base-two-scores",
        "The scores are made for base two, with log2 e in them, and you take exp of "
        "them, or multiply by log2 e once more: the softmax is too sharp.\n"
        "exp2 for both, the weights and the rescaling, with log2 e once; or exp without it.",
        "log2e",
    ),
    (
        "mixed-bases",
        "Two bases are mixed: the weights are powers of one, and the factor for the "
        "old sums is a power of the other. It shows only where a maximum grows.\n"
        "Maximum and scores are in the same unit: exp2 for both, or exp for both.",
        "rescale-base-e",
        "rescale-base-2",
        "no-log2e rescale-base-e",
        "log2e rescale-base-2",
    ),
    (
        "not-rescaled",
        "When a later tile brings a larger maximum, neither the old sum nor the old "
        "output is scaled down.\n"
        "Multiply both by exp(old maximum - new maximum) before you add the tile; and "
        "keep the old maximum until that factor is computed.",
        "same-acc same-sum",
    ),
    (
        "rescaled-the-wrong-way",
        "The factor for the old sums is upside down: exp(new - old) is at least 1, and "
        "inf at the first tile.\n"
        "Under a larger maximum, old terms must shrink: exp(old - new).",
        "rescale-inverted",
    ),
    (
        "maximum-not-kept",
        "The new maximum is never kept: for each tile the old one is still -inf, so "
        "that the factor is exp(-inf) = 0, and only the last tile counts.\n"
        "m = new, at the end of each step.",
        "maximum-forgotten",
    ),
    (
        "sum-not-rescaled",
        "The output is rescaled when the maximum grows, and the sum is not: in the end "
        "you divide by too much.\n"
        "l = l · rescale + …, with the same factor.",
        "same-sum",
    ),
    (
        "output-not-rescaled",
        "The sum is rescaled when the maximum grows, and the output so far is not: old "
        "values count too much.\n"
        "acc = acc · rescale + …, with the same factor, for each row.",
        "same-acc",
    ),
    (
        "rescaled-without-scale",
        "The weights are exp(scale · (score - maximum)), and what was summed before is multiplied "
        "by exp(old - new), where these maxima have no scale in them.\n"
        "Multiply the scores by scale as soon as you have them: then maxima, weights and factors "
        "all have it.",
        "rescale-unscaled",
    ),
    (
        "tile-under-its-own-maximum",
        "A tile's weights are taken under its own maximum. Where an earlier tile had a "
        "larger score they are too large.\n"
        "Take them under the new running maximum: exp(scores - new).",
        "own-maximum",
    ),
    (
        "weights-under-the-old-maximum",
        "A tile's weights are taken under the maximum from BEFORE the tile: -inf at "
        "the first one, so that exp gives inf.\n"
        "First the new running maximum, then exp(scores - new).",
        "old-maximum",
    ),
    (
        "maximum-of-the-tile-only",
        "The new maximum is that of the tile alone. Where it is far lower than the one "
        "before, the factor exp(old - new) overflows to inf, and inf / inf is nan; a "
        "tile of which a row sees nothing gives nan at once.\n"
        "A running maximum never falls: maximum(m, that of the tile).",
        "tile-maximum",
        "tile-maximum cut",
    ),
    (
        "a-softmax-for-each-tile",
        "Each tile gets a softmax of its own, as if there were no other keys.\n"
        "Carry m and l along the whole walk, and divide once, behind the loop.",
        "softmax-a-tile undivided",
        "softmax-a-tile mean",
    ),
    (
        "divided-in-each-tile",
        "You divide by the sum in every tile, so that older tiles are divided again "
        "and again.\n"
        "Divide once, after the walk.",
        "divide-at-once undivided",
        "divide-at-once",
        "divide-at-once begin-the-sum-again undivided",
    ),
    (
        "not-divided",
        "The weights do not add up to 1: the division by the sum is missing.\n"
        "Divide each row by its l after the walk.",
        "undivided",
    ),
    (
        "one-maximum-for-all-rows",
        "One maximum serves all queries of a tile. A query whose scores are far below "
        "it gets weights of 0 alone, and 0 / 0 is nan.\n"
        "Each row needs its own maximum: amax(dim=1), or tl.max(…, axis=1).",
        "one-maximum",
        "one-maximum padded",
    ),
    (
        "one-sum-for-all-rows",
        "The weights of all queries of a tile are added into one sum, and each row is "
        "divided by it.\n"
        "Each row needs its own sum: sum(dim=1), or tl.sum(…, axis=1).",
        "one-sum",
        "one-sum cut",
    ),
    (
        "tail-dropped",
        "The last tile of keys is left out where it is not full.\n"
        "range(first, end, block) comes to it; counting end // block whole tiles does "
        "not. Its missing keys are masked.",
        "walk-whole-tiles",
    ),
    (
        "maximum-starts-at-zero",
        "The running maximum starts at 0: a query whose scores are all far below that "
        "gets weights of 0 alone, and 0 / 0 is nan.\n"
        "Start at -inf.",
        "start-at-zero",
    ),
    (
        "maximum-starts-at-a-number",
        "The running maximum starts at a number such as -10,000. A query whose scores "
        "are all far below that (here some are about -10¹²) gets weights of 0 alone, "
        "and 0 / 0 is nan.\n"
        "Start at -inf.",
        "start-at-a-number",
    ),
    (
        "values-are-keys",
        "The weights are right, and what they weigh is the keys: the result is made of "
        "keys.\n"
        "Multiply the weights by the values.",
        "values-are-keys",
        "values-are-keys cut",
    ),
    (
        "values-of-the-first-tile",
        "The weights of each tile are multiplied by the values of the FIRST tile.\n"
        "Keys and values of a tile are the same rows: value[columns], like key[columns].",
        "first-values",
        "first-values cut",
    ),
    (
        "keys-of-the-first-tile",
        "The queries are multiplied by the keys of the FIRST tile in each step of the walk.\n"
        "Keys and values of a tile are the same rows: key[columns], like value[columns].",
        "first-keys",
        "first-keys cut",
    ),
    (
        "no-maximum",
        "No maximum is taken from the scores before exp. Large scores (here up to 400) give inf,"
        " and very low ones give 0 alone: inf / inf and 0 / 0 are nan.\n"
        "Keep a running maximum per row, and take exp(scores - maximum).",
        "no-maximum",
    ),
)

#: Symptoms, which `judge` reports where no mistake of the catalogue explains them.
SYMPTOMS = (
    "rows-of-nan",
    "sees-later-keys",
    "keys-left-out",
    "keys-counted-twice",
    "wrong-scale",
    "weights-do-not-add-up",
    "wrong-weights",
)


def walks(use: Use, *own: Known) -> tuple[Known, ...]:
    """The mistakes of an exercise: its own, and all of the catalogue.

    use: see `Use`. own: those with a name from the catalogue get its message and its suspects, and
    the others come first.
    """
    mine = {known.name: known for known in own}
    found = []
    for name, message, *ways in _CATALOGUE:
        suspects = tuple(wrong for way in ways for wrong in use(name, Walk.of(way)))
        known = mine.pop(name, Known(name))
        found.append(
            replace(known, message=known.message or message, suspects=(*known.suspects, *suspects))
        )
    return (*mine.values(), *found)


@dataclass(frozen=True)
class Case:
    """Arguments of an answer. about: what is special in them, for the learner; "": nothing."""

    args: tuple
    about: str = ""


def judge(
    exercise: Exercise,
    answer: Callable,
    cases: Sequence[Case],
    right: Callable,
    attend: Attend,
    *,
    writes: Sequence[int] = (),
    otherwise: str = "The weights that your queries give to keys look right in a small case.",
) -> int:
    """`diagnose`, which describes what the answer's queries look at where no mistake matches.

    attend: the answer as a function of one head. otherwise: what to say where that one head is
    right. The number of cases, or Mistake.
    """
    try:
        number = diagnose(
            answer,
            [case.args for case in cases],
            right,
            exercise.suspects,
            writes=writes,
            **TOLERANCES,
        )
        _expect_far_below(attend)
        return number
    except Mistake as mistake:
        if mistake.name != "wrong-values":
            raise
        name, text = _symptom(answer, cases, right, attend, writes)
        raise Mistake(name or mistake.name, f"{text or otherwise}\n{mistake.message}") from None


def _expect_far_below(attend: Attend) -> None:
    """Scores far below 0 that differ; not in `diagnose`, whose other numbers would spoil them."""
    head = abyss(16, 91)
    if found := difference(attend(*head.args), exact(*head.args), **TOLERANCES):
        raise Mistake(
            "scores-cut-off",
            "All is right but where the scores lie far below 0: for one query after 19 keys, that"
            " of key 2 is about -5·10¹¹ and all others are about -10¹², so key 2 has all the"
            " weight.\nLook for a clamp, or for a number that stands for -inf. A maximum of the"
            f" scores, taken from them, is all that exp needs. {found[1]}.",
        )


def _symptom(
    answer: Callable,
    cases: Sequence[Case],
    right: Callable,
    attend: Attend,
    writes: Sequence[int],
) -> tuple[str, str]:
    """The name of a symptom, or "", and what it looks like."""
    ordinary = [case for case in cases if not case.about]
    off = sum(not _agrees(answer, right, case, writes) for case in ordinary)
    # A key of little weight that is left out shows in a case or two; rounding shows in most.
    if off > len(ordinary) // 3 and all(
        _agrees(answer, right, case, writes, rough=True) for case in ordinary
    ):
        return "low-precision", (
            "All numbers are nearly right, and not all are right: something on the way is rounded"
            " to less than float32, a constant is not exact, or a small number is added to a sum or"
            " a score.\nCompute in the dtype of the inputs, and by the formula."
        )
    found = described(attend)
    failing = [case for case in cases if case.about and not _agrees(answer, right, case, writes)]
    if failing and not off:
        if found and found[0] in ("keys-left-out", "sees-later-keys"):
            return found
        return "", f"Ordinary inputs are right. It fails where {failing[0].about}."
    if found:
        return found
    return "", ""


def _agrees(
    answer: Callable, right: Callable, case: Case, writes: Sequence[int], rough: bool = False
) -> bool:
    tolerances = {"rtol": 0.03, "atol": 0.03} if rough else TOLERANCES

    def outcome(function: Callable) -> Any:
        args = copy.deepcopy(case.args)
        result = function(*args)
        return [args[i] for i in writes] if writes else result

    try:
        return difference(outcome(answer), outcome(right), **tolerances) is None
    except Exception:
        return False
