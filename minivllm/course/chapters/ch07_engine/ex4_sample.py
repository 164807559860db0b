"""07.4: choose a token."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference, show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import counted, expect, expect_unchanged, seeded

if TYPE_CHECKING:
    import torch

INF = math.inf


#: What is taken for -inf.
_FILLS = {"fill-1e4": -1e4, "fill-1e9": -1e9, "fill-1e10": -1e10, "fill-1000": -1000.0}


# --- filter_logits ----------------------------------------------------------------------------


def _filter(
    logits: torch.Tensor, temperature: Any, top_k: Any, top_p: Any, min_p: Any, mistake: str = ""
) -> torch.Tensor:
    """`filter_logits` row by row, right by default, and wrong in the way that mistake says."""
    import torch

    rows = []
    for i in range(len(logits)):
        j = 0 if mistake.startswith("first-row") else i
        row = logits[i] if mistake == "half" else logits[i].float()
        heat = float(temperature[0 if mistake == "first-row-too-hot" else i])
        scaled = row * heat if mistake == "multiplied" else row / heat
        order = _order(scaled, "ties-higher" if mistake == "ties-higher" else "")
        keep = _kept_by_k(scaled, order, 0 if top_k is None else int(top_k[j]), mistake)
        p = 1.0 if top_p is None else float(top_p[j])
        if p < 1 or mistake == "p-of-one":
            keep &= _kept_by_p(row, scaled, keep, p, mistake)
        least = 0.0 if min_p is None else float(min_p[j])
        if least > 0:
            keep &= _kept_by_min_p(row, scaled, keep, least, mistake)
        shown = scaled.to(logits.dtype) if mistake == "returns-scaled" else logits[i]
        fill = {"zero": 0.0, **_FILLS}.get(mistake, -INF)
        kept = shown.masked_fill(~keep, fill)
        rows.append(kept[order] if mistake == "sorted" else kept)
    return torch.stack(rows)


def _first(order: torch.Tensor, k: int) -> torch.Tensor:
    import torch

    return torch.zeros(len(order), dtype=torch.bool).scatter_(0, order[:k], True)


def _kept_by_k(scaled: torch.Tensor, order: torch.Tensor, k: int, mistake: str) -> torch.Tensor:
    if k == 0 or (k < 0 and mistake != "negative-k"):
        k = len(order)
    least = scaled[order[min(k, len(order)) - 1]]
    if mistake == "ties":
        return scaled >= least
    if mistake == "ties-dropped":
        return (scaled > least) | (k >= len(order))
    if mistake == "above-the-next":
        above = scaled > scaled[order[k]] if k < len(order) else scaled > -INF
        return above | _first(order, 1)
    return _first(order, k)


def _order(scaled: torch.Tensor, mistake: str) -> torch.Tensor:
    """The ids in order of size, of equal ones the lower first."""
    import torch

    if mistake == "id-order":
        return torch.arange(len(scaled))
    if mistake == "ties-higher":
        return len(scaled) - 1 - scaled.flip(0).sort(descending=True, stable=True).indices
    return scaled.sort(descending=True, stable=True).indices


def _kept_by_p(
    row: torch.Tensor, scaled: torch.Tensor, keep: torch.Tensor, p: float, mistake: str
) -> torch.Tensor:
    import torch

    order = _order(scaled, mistake)
    base = row if mistake == "p-before-temperature" else scaled
    if mistake != "p-of-everything":
        base = base.masked_fill(~keep, -INF)
    probability = base.softmax(0)[order]
    total = probability.cumsum(0)
    before = total - probability
    few = {
        "stops-short": total <= p,
        "stops-short-empty": total <= p,
        "stops-short-below": total < p,
        "exact-too-many": before <= p,
        "one-too-many": torch.cat((torch.tensor([True]), (before < p)[:-1])),
    }.get(mistake, before < p)
    few = torch.zeros_like(keep).scatter_(0, order, few)
    if mistake not in ("stops-short-empty", "empty-at-zero"):
        few[_order(scaled, mistake if mistake == "ties-higher" else "")[0]] = True
    return few


def _kept_by_min_p(
    row: torch.Tensor, scaled: torch.Tensor, keep: torch.Tensor, least: float, mistake: str
) -> torch.Tensor:
    base = row if mistake == "min-p-before-temperature" else scaled
    weights = base.masked_fill(~keep, -INF).softmax(0)
    if mistake == "min-p-overflow":
        weights = base.masked_fill(~keep, -INF).exp()
    if mistake == "absolute-min-p":
        return weights >= least
    if mistake == "absolute-and-best":
        kept = base.softmax(0) >= least
        kept[scaled.argmax()] = True
        return kept
    bound = least * weights.max()
    kept = weights > bound if mistake == "min-p-strict" else weights >= bound
    kept[scaled.argmax()] = True
    return kept


def _wrong_filter(mistake: str) -> Callable:
    return partial(_filter, mistake=mistake)


def _reached(logits: torch.Tensor, heat: float, count: int) -> float:
    """A top_p that the `count` likeliest tokens reach, and that no rounding moves to others."""
    total = (logits.double() / heat).softmax(0).sort(descending=True).values.cumsum(0)
    return float((total[count - 2] + total[count - 1]) / 2) if count > 1 else float(total[0] / 2)


def _shared(logits: torch.Tensor, heat: float, count: int) -> float:
    """A min_p that the `count` likeliest tokens have."""
    weights = (logits.double() / heat).softmax(0).sort(descending=True).values
    return float((weights[count - 1] + weights[count]) / 2 / weights[0])


def _filter_case(logits: torch.Tensor, *rows: dict[str, Any], without: str = "") -> tuple:
    """The arguments of `filter_logits`. rows: t, k, p, m of each; without: what is None."""
    import torch

    wishes = [{"t": 1.0, "k": 0, "p": 1.0, "m": 0.0} | row for row in rows]
    made = [torch.tensor([float(w[key]) for w in wishes]) for key in "tkpm"]
    made[1] = made[1].int()
    asked = zip("tkpm", made, strict=True)
    return logits, *(None if key in without else value for key, value in asked)


def _filter_cases() -> list[tuple]:
    import torch

    random, case = seeded(74), _filter_case
    word = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    spread = torch.randn(3, 40, generator=random) * 2
    wide = torch.randn(2, 9001, generator=random) * 2
    tall = (torch.randn(40, 5, generator=random) * 2).t()
    masked = torch.tensor([[-3.0, -INF, -1.0, -2.0, -INF, -9.0]])
    return [
        case(word, {"k": 2}, without="pm"),
        case(word, {"k": -1}, without="pm"),
        case(word, {"k": 4}, without="pm"),
        case(word, {"p": 0.6}, without="km"),
        case(word, {"p": 0.3}, without="km"),
        case(word, {"m": 0.3}, without="kp"),
        # The likeliest has all of a float32 sum, and top_p = 1 keeps the others; 0 keeps itself.
        case(torch.tensor([[1.0, 30.0, 0.0, -2.0]]), {"p": 1.0}, without="km"),
        case(word, {"p": 0.0}, without="km"),
        case(word, {"p": 0.6, "t": 0.5}, without="km"),
        case(word, {"m": 0.3, "t": 3.0}, without="kp"),
        case(word, {"k": 2, "p": 0.71}, without="m"),
        case(torch.zeros(1, 6), {"k": 2}, without="pm"),
        # Sums that reach top_p exactly, also in binary: tokens of a quarter each.
        case(torch.zeros(1, 4), {"p": 0.5}, without="km"),
        case(torch.zeros(2, 8), {"k": 4, "p": 0.75}, {"p": 0.125}, without="m"),
        # Equal to the likeliest, which is exactly min_p = 1 times as probable.
        case(torch.tensor([[1.0, 3.0, -INF, 3.0, 2.0]]), {"m": 1.0}, without="kp"),
        case(torch.tensor([[-3.0, -1.0, -1.0, -2.0, -1.0, -9.0]]), {"k": 2}, without="pm"),
        case(masked, {"p": 0.97, "m": 0.01}, without="k"),
        case(masked, {"k": 5}, without="pm"),
        case(spread, {"p": 0.7, "t": 9.0}, {"m": 0.8, "t": 20.0}, {"p": 0.5, "t": 50.0}),
        # Nearly all, and not all.
        case(torch.tensor([[0.0, 10.0, 2.0, 5.0]]), {"p": 0.9998}, without="km"),
        case(torch.tensor([[0.0, 10.0, 2.0, 5.0]]), {"m": 1e-4}, without="kp"),
        case(torch.tensor([[2.5]]), {"k": 1, "p": 0.4, "m": 0.5}),
        case(torch.tensor([[0.0, 500.0, 499.0, -1000.0]]), {"p": 0.9, "m": 0.1}),
        case(
            torch.tensor([[2000.0, 1999.0, 1990.0, 95.0], [-2001.0, -2000.0, -2009.0, -2900.0]]),
            {"m": 0.1},
            {"m": 0.2},
            without="kp",
        ),
        case(spread, {"k": 5}, {"p": 0.8}, {"m": 0.1}),
        case(spread, {"k": 50, "t": 2.0}, {"p": 0.01}, {"m": 1.0, "t": 0.7}),
        case(spread, {}, {"k": 12, "p": 0.7, "m": 0.05, "t": 1.7}, {"k": 1}),
        # As many rows as tokens; and rows that do not lie one after the other in memory.
        case(spread[:, :3] * 1.5, {"t": 0.4, "p": 0.7}, {"t": 1.0, "p": 0.7}, {"t": 4.0, "p": 0.7}),
        case(tall, {"k": 3}, {"p": 0.8, "t": 0.5}, {}, {"m": 0.2}, {"k": 39, "p": 0.3}),
        case(
            wide,
            {"p": _reached(wide[0], 0.6, 2500), "t": 0.6},
            {"k": 6000, "m": _shared(wide[1], 1.5, 5500), "t": 1.5},
        ),
        case(wide, {"k": 5003}, {"p": _reached(wide[1], 1.3, 5200), "t": 1.3}),
        case(
            (torch.randn(2, 700, generator=random) * 2).bfloat16(),
            {"p": 0.95},
            {"p": 0.9, "m": 0.003},
        ),
    ]


# --- sample -----------------------------------------------------------------------------------


def _sample(*case: Any, mistake: str = "") -> torch.Tensor:
    """`sample`, right by default, and wrong in the way that mistake says. case: its arguments."""
    import torch

    from minivllm.kernels.sampling import filter_logits

    logits, temperature, top_k, top_p, min_p, seeds, positions = case
    greedy = logits.argmax(dim=-1)
    if mistake == "last-of-equal":
        greedy = logits.shape[1] - 1 - logits.flip(1).argmax(dim=-1)
    if temperature is None:
        return greedy
    cold = temperature <= _COLD.get(mistake, 0.0)
    heat = temperature.masked_fill(cold, 1.0).unsqueeze(1)
    if (mistake == "greedy-for-all" and cold.any()) or (mistake == "as-the-first" and cold[0]):
        return greedy
    original = logits
    if mistake == "filters-scaled":
        logits = filter_logits(logits / heat, temperature, top_k, top_p, min_p) * heat
    elif mistake != "no-filter":
        logits = filter_logits(logits, temperature, top_k, top_p, min_p)
    weights = _weights(original, logits, heat, mistake)
    u = _uniform(seeds, positions, mistake)
    if mistake == "sorted":
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        chosen = order.gather(1, _invert(ordered, u))
    else:
        chosen = _invert(weights, u)
    chosen = chosen.squeeze(1)
    if mistake == "one-before":
        chosen = (chosen - 1).clamp_min(0)
    return chosen if mistake == "greedy-sampled" else torch.where(cold, greedy, chosen)


def _weights(
    original: torch.Tensor, logits: torch.Tensor, heat: torch.Tensor, mistake: str
) -> torch.Tensor:
    """The probabilities, or numbers in proportion to them."""
    scaled = {
        "multiplied": logits.float() * heat,
        "no-temperature": logits.float(),
        "twice": logits.float() / heat**2,
    }.get(mistake, logits.float() / heat)
    if mistake == "half":
        return (logits / heat.to(logits.dtype)).softmax(-1).float()
    if mistake == "half-of-all":
        return scaled.half().softmax(-1).float()
    if mistake == "overflow":
        return scaled.exp()
    if mistake == "batch-maximum":
        return (scaled - scaled[scaled.isfinite()].max()).exp()
    if mistake == "not-filled-up":
        return (original.float() / heat).softmax(-1) * logits.isfinite()
    return scaled.softmax(-1)


def _uniform(seeds: torch.Tensor, positions: torch.Tensor, mistake: str) -> torch.Tensor:
    """The random numbers [B]."""
    import torch

    from minivllm.kernels.sampling import philox_uniform

    keys = {
        "seed-only": (seeds, torch.zeros_like(positions)),
        "position-only": (torch.zeros_like(seeds), positions),
        "swapped": (positions, seeds),
        "seed-31": (seeds & 0x7FFFFFFF, positions),
        "seed-32": (seeds & 0xFFFFFFFF, positions),
        "seed-int": (seeds.int().long(), positions),
        "position-16": (seeds, positions & 0xFFFF),
        "position-32": (seeds, positions & 0xFFFFFFFF),
        "position-int": (seeds, positions.int().long()),
        "sum": (seeds + positions, torch.zeros_like(positions)),
        "one-too-far": (seeds, positions + 1),
    }.get(mistake, (seeds, positions))
    u = philox_uniform(*keys)
    if mistake == "first-row":
        return u[:1].expand_as(u)
    return 1 - u if mistake == "one-minus" else u


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    import torch

    running = weights.double().cumsum(-1)
    chosen = torch.searchsorted(running, (u.double() * running[:, -1]).unsqueeze(1), right=True)
    return chosen.clamp_max(weights.shape[1] - 1)


#: Up to which temperature rows are taken for greedy ones.
_COLD = {f"cold-{bound:g}": bound for bound in (2e-2, 2e-3, 2e-4, 2e-5, 2e-6)}


def _wrong_sample(mistake: str) -> Callable:
    return partial(_sample, mistake=mistake)


#: Names of cases in which only a mistake with large numbers shows.
_LARGE, _STAIRS = "logits around 300", "each row 300 above the one before"
_HARDLY_WARM = "equal logits, hardly warm"


def _sample_cases() -> dict[str, tuple]:
    import torch

    random = seeded(75)

    def keys(count: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(count) * 977 + 11 + first, torch.arange(count) * 3 + 40 + first

    def floats(*values: float) -> torch.Tensor:
        return torch.tensor(values)

    word = floats(0.5, 0.2, 0.2, 0.1).log()
    logits = torch.randn(8, 60, generator=random) * 2
    heat = floats(1, 0.5, 2, 0, 0.8, 1.3, 0, 5)
    masked = logits.clone()
    masked[:, ::2] = -INF
    wide = torch.randn(4, 20_011, generator=random) * 4
    equal = torch.randint(0, 3, (6, 500), generator=random).float()
    far = torch.tensor([3, 70_000, 131_071, 2**31 + 7, 1_000_001, 65_536, 2**32 + 9, 2**40])
    seeds = torch.tensor([2**31 + 5, 2**32 + 5, 2**40 + 1, 2**62 + 9, -3, -(2**35), 5, 2**33])
    flat, many = torch.zeros(8, 4096), 1024
    plain = (None, None, None)
    k3 = torch.full((8,), 3, dtype=torch.int32)
    return {
        "one row": (word[None], floats(1.0), *plain, *keys(1)),
        "one greedy row": (word[None], floats(0.0), *plain, *keys(1)),
        "no temperatures": (logits[:2], None, *plain, None, None),
        "equal logits, no temperatures": (equal, None, *plain, None, None),
        "equal logits, greedy": (equal.bfloat16(), torch.zeros(6), *plain, *keys(6)),
        _HARDLY_WARM: (
            *(equal, floats(1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0), *plain),
            *keys(6, 7),
        ),
        "nearly equal logits, hardly warm": (
            *(equal * 1e-4, floats(1e-2, 1e-3, 1e-4, 3e-5, 1e-6, 0), *plain),
            *keys(6, 17),
        ),
        "twelve equal rows": (word.repeat(12, 1), torch.ones(12), *plain, *keys(12)),
        "unlike logits, greedy": (logits, torch.zeros(8), *plain, *keys(8, 1)),
        "one seed": (flat[:6], torch.ones(6), *plain, torch.full((6,), 3), torch.arange(6)),
        "large seeds": (flat, torch.ones(8), *plain, seeds, torch.arange(8) + 40),
        "late positions": (flat, torch.ones(8), *plain, torch.arange(8), far),
        "eight temperatures": (logits, heat, *plain, *keys(8)),
        "a greedy row first": (logits, heat.flip(0).roll(2), *plain, *keys(8, 3)),
        "logits of -inf": (masked, heat, *plain, *keys(8, 5)),
        _LARGE: (logits + 300, heat, *plain, *keys(8, 2)),
        _STAIRS: (logits + torch.arange(8)[:, None] * 300, heat, *plain, *keys(8, 4)),
        "top_k": (logits, heat, k3, None, None, *keys(8, 9)),
        "top_p and min_p": (
            *(logits, heat, None, torch.full((8,), 0.3), torch.full((8,), 0.4)),
            *keys(8, 13),
        ),
        "top_p": (logits, heat, None, torch.full((8,), 0.7), None, *keys(8, 21)),
        "20,011 tokens": (wide, floats(1, 1.5, 0.9, 0), *plain, *keys(4, 1)),
        "rows in columns": (wide[:, :90].t()[:, :3], torch.ones(90), *plain, *keys(90)),
        "bfloat16": (torch.zeros(6, 2048, dtype=torch.bfloat16), torch.ones(6), *plain, *keys(6)),
        "1,024 positions": (
            *(logits[:1, :8].repeat(many, 1), torch.full((many,), 1.7), *plain),
            *(torch.full((many,), 5), torch.arange(many)),
        ),
    }


def _off_the_ruler(case: tuple, chosen: torch.Tensor, u: torch.Tensor | None = None) -> list[int]:
    """Rows whose token is not where the ruler has u, within what rounding may do."""
    import torch

    from minivllm.kernels.sampling import filter_logits, philox_uniform

    logits, temperature, top_k, top_p, min_p, seeds, positions = case
    outside = (chosen < 0) | (chosen >= logits.shape[1])
    token = chosen.clamp(0, logits.shape[1] - 1)[:, None]
    greedy = logits.float().argmax(-1) != token[:, 0]
    if temperature is None:
        return (greedy | outside).nonzero().flatten().tolist()
    u = philox_uniform(seeds, positions) if u is None else u
    kept = filter_logits(logits, temperature, top_k, top_p, min_p).double()
    weights = (kept / temperature.masked_fill(temperature == 0, 1.0)[:, None]).softmax(-1)
    weight = weights.gather(1, token)[:, 0]
    end = weights.cumsum(-1).gather(1, token)[:, 0]
    beside = (u < end - weight - 1e-5) | (u > end + 1e-5) | (weight == 0)
    wrong = torch.where(temperature == 0, greedy, beside) | outside
    return wrong.nonzero().flatten().tolist()


def check_sample(answer_filter: Callable, answer: Callable) -> str:
    from minivllm.kernels.sampling import filter_logits

    try:
        num_filters = diagnose(answer_filter, _filter_cases(), filter_logits, _suspects(FILTER))
    except Mistake as mistake:
        raise Mistake(mistake.name, f"filter_logits: {mistake.message}") from mistake.__cause__
    cases = _sample_cases()
    num_rows = _check_tokens(answer, cases)
    _check_borders(answer)
    mine = counted(answer)
    return (
        f"{num_filters} filters, {len(cases)} batches of {num_rows:,} rows;"
        f" {_seeded_engine_agrees(mine)}"
    )


def _suspects(mistakes: tuple[Known, ...]) -> dict[str, tuple]:
    return {known.name: (known.message, *known.suspects) for known in mistakes if known.suspects}


def _check_tokens(answer: Callable, cases: dict[str, tuple]) -> int:
    """Every row's token is where its ruler has u. Returns the number of rows."""
    import torch

    results, got = {}, {}
    for name, case in cases.items():
        results[name] = _tokens_of(answer, case)
        # A copy at once: a later call may overwrite it.
        got[name] = results[name].clone()
    for name, case in cases.items():
        again = _tokens_of(answer, case)
        expect(
            torch.equal(got[name], again),
            "not-repeatable",
            f"The same call gave {show(got[name])} and then {show(again)}.\nA number from torch's"
            " own generator depends on all that was drawn before, so on who else is in the batch."
            " philox_uniform(seeds, positions) depends on nothing else.",
        )
    off = {name: _off_the_ruler(case, got[name]) for name, case in cases.items()}
    if any(off.values()):
        _name_sample(answer, cases, got, off)
    for name, case in cases.items():
        _expect_alone(answer, case, got[name])
    for name, tokens in results.items():
        expect(
            torch.equal(tokens, got[name]),
            "result-reused",
            "A later call of your `sample` has overwritten the tokens of an earlier one.\nMake a"
            " new tensor in each call.",
        )
    return sum(map(len, got.values()))


def _tokens_of(answer: Callable, case: tuple) -> torch.Tensor:
    import torch

    given = [None if part is None else part.clone() for part in case]
    chosen = answer(*given)
    problem = difference(chosen, torch.zeros(len(case[0]), dtype=torch.int64))
    if problem and problem[0] != "wrong-values":
        raise Mistake(
            problem[0],
            f"sample for logits {list(case[0].shape)}: {problem[1]}.\nIt gives a token id for each"
            " row.",
        )
    names = ("logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    for name, now, before in zip(names, given, case, strict=True):
        expect_unchanged(now, before, f"{name}, in `sample`")
    return chosen


def _expect_alone(answer: Callable, case: tuple, together: torch.Tensor) -> None:
    """A row must get the same token in a batch of its own."""
    if len(together) == 1 or case[1] is None:
        return
    for i in {0, len(together) // 2, len(together) - 1}:
        alone = _tokens_of(
            answer, tuple(None if part is None else part[i : i + 1] for part in case)
        )
        expect(
            alone.item() == together[i].item(),
            "depends-on-the-batch",
            f"The same request, with the same seed and position, gets token {alone.item()} alone"
            f" and {together[i].item()} as row {i} of {len(together)}.\nWhat a request writes must"
            " not depend on who else is in the batch: nothing of another row, neither its number"
            " nor its largest logit nor its temperature, may come into it.",
        )


def _name_sample(
    answer: Callable,
    cases: dict[str, tuple],
    got: dict[str, torch.Tensor],
    off: dict[str, list[int]],
) -> None:
    """Raise what is wrong with the tokens. off: the rows with wrong ones. All by the cases."""
    import torch

    failing = [name for name, rows in off.items() if rows]
    first, row = failing[0], off[failing[0]][0]
    case = cases[first]
    heat = "all greedy" if case[1] is None else f"temperature {float(case[1][row]):g}"
    where = (
        f"{first[0].upper()}{first[1:]}: row {row} of logits {list(case[0].shape)}, {heat}: your"
        f" sample gives token {int(got[first][row])}, expected {int(_sample(*case)[row])}."
    )
    if all(cases[name][0].dtype == torch.bfloat16 for name in failing):
        raise EXERCISE.mistake("half-precision", where)
    for known in SAMPLE:
        if any(_gives_the_same(wrong, cases, got) for wrong in known.suspects):
            raise EXERCISE.mistake(known.name, where)
    # Large numbers come of low temperatures, too.
    large = {*failing} - {_HARDLY_WARM}
    if large == {_STAIRS}:
        raise EXERCISE.mistake("batch-wide-maximum", where)
    if large == {_STAIRS, _LARGE}:
        alone = [_right_alone(answer, cases[name]) for name in failing]
        raise EXERCISE.mistake("batch-wide-maximum" if all(alone) else "overflow", where)
    expect(
        not all(torch.equal(got[name], c[0].argmax(-1)) for name, c in cases.items()),
        "always-greedy",
        f"{where}\nYour sample takes the likeliest token always. Above temperature 0 the others"
        " have a chance, too.",
    )
    for name, each in cases.items():
        _expect_alone(answer, each, got[name])
    expect(
        all(
            bool(((got[name] >= 0) & (got[name] < c[0].shape[1])).all())
            for name, c in cases.items()
        ),
        "no-such-token",
        f"{where}\nTokens are numbers from 0 to V - 1. Is no running sum above your u? The ruler's"
        " end may be a little below 1: multiply u by the last running sum.",
    )
    beside = max(
        int((got[name] - _sample(*cases[name]))[rows].abs().max())
        for name, rows in off.items()
        if rows
    )
    rounded = (
        " All wrong tokens are neighbours of the right ones: is something rounded, as by a softmax"
        " or a sum in half precision?"
    )
    raise Mistake(
        "wrong-values",
        f"{where}\nWrong are these batches: {'; '.join(failing)}. The other"
        f" {len(cases) - len(failing)} are right: what do the wrong ones have in common?"
        f"{rounded if beside <= 3 else ''}",
    )


def _right_alone(answer: Callable, case: tuple) -> bool:
    """Whether each row gets its token in a batch of its own."""
    rows = [
        tuple(None if part is None else part[i : i + 1] for part in case)
        for i in range(len(case[0]))
    ]
    return not any(_off_the_ruler(row, _tokens_of(answer, row)) for row in rows)


def _gives_the_same(wrong: Callable, cases: dict[str, tuple], got: dict[str, torch.Tensor]) -> bool:
    """Whether a wrong implementation gives the answer's tokens, and they are wrong.

    One row may differ by rounding. What lies beyond the vocabulary counts as its last token.
    """
    theirs = {name: wrong(*case) for name, case in cases.items()}
    differ = sum(
        int((theirs[name] != got[name].clamp(0, case[0].shape[1] - 1)).sum())
        for name, case in cases.items()
    )
    return differ <= 1 and any(_off_the_ruler(cases[name], theirs[name]) for name in cases)


@contextlib.contextmanager
def _numbers(u: torch.Tensor, *answers: Callable) -> Iterator[list]:
    """philox_uniform gives u until the end of the block. Yields a list with an item per call."""
    from minivllm.kernels import sampling

    real, calls = sampling.philox_uniform, []

    def given(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        calls.append(len(seeds))
        return u[: len(seeds)].clone()

    places = [vars(sampling), *(getattr(answer, "__globals__", {}) for answer in answers)]
    found = [(names, name) for names in places for name, value in names.items() if value is real]
    try:
        for names, name in found:
            names[name] = given
        yield calls
    finally:
        for names, name in found:
            names[name] = real


def _check_borders(answer: Callable) -> None:
    """Numbers exactly on a border of the ruler, and at its very ends."""
    import torch

    keys = (torch.arange(4), torch.arange(4))
    u = torch.tensor([0.25, 0.5, 0.75, 0.5 - 2.0**-24])
    with _numbers(u, answer) as calls:
        case = (torch.zeros(4, 4), torch.ones(4), None, None, None, *keys)
        chosen = answer(*case).tolist()
        # An answer with another source of numbers, or with one call per row, is judged elsewhere.
        usual = calls == [4]
    expect(
        not usual or chosen == [1, 2, 3, 1],
        "on-the-border",
        f"Four tokens have a quarter each, and u is {u.tolist()[:3]} and a little less than 0.5:"
        f" your sample gives {chosen}.\nA part of the ruler has its beginning, not its end: where u"
        " is exactly on a border, the running sum in front does not *exceed* u. `right=True` says"
        " this to searchsorted.",
    )
    logits = torch.randn(64, 5003, generator=seeded(76)) * 3
    logits[:, :100] = logits[:, -700:] = -INF
    for u in (torch.full((64,), 2.0**-24), torch.full((64,), 1 - 2.0**-24)):
        case = (logits, torch.ones(64), None, None, None, torch.arange(64), torch.arange(64))
        with _numbers(u, answer) as calls:
            chosen = answer(*case)
            usual = calls == [64]
        wrong = _off_the_ruler(case, chosen, u) if usual else []
        if wrong:
            token = int(chosen[wrong[0]])
            raise Mistake(
                "end-of-the-ruler",
                f"The first 100 and the last 700 of 5,003 logits are -inf, and u is {float(u[0])!r}"
                f" (as near to an end of the ruler as it comes): your sample gives token {token}"
                ".\nThe ruler's end is not quite 1, because sums are rounded: multiply u by the"
                " last running sum, and it falls into the part of a token that has one.",
            )


#: What seeded requests ask for.
_SEEDED = (
    ("Tell me a story about a fox named Pip.", {"temperature": 1.0, "seed": 1}),
    ("Tell me a story about an owl.", {"temperature": 0.8, "top_p": 0.9, "seed": 2}),
    ("What is a KV cache?", {"temperature": 1.3, "top_k": 20, "seed": 3}),
    ("Tell me a story about a robot.", {"temperature": 1.0, "min_p": 0.1, "seed": 4}),
    ("What is 12 + 7?", {"temperature": 0.0}),
)


@functools.cache
def _seeded_tokens() -> list[list[int]]:
    return _generate_seeded(None)


def _generate_seeded(kernels: Any) -> list[list[int]]:
    from minivllm import LLM, SamplingParams

    with LLM(device="cpu", kernels=kernels) as llm:
        params = [SamplingParams(max_tokens=24, **wishes) for _, wishes in _SEEDED]
        outputs = llm.generate([prompt for prompt, _ in _SEEDED], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _seeded_engine_agrees(mine: Callable) -> str:
    from minivllm.kernels import Kernels

    right, got = _seeded_tokens(), _generate_seeded(replace(Kernels.reference(), sample=mine))
    for (prompt, wishes), one, other in zip(_SEEDED, got, right, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
        expect(
            one == other,
            "engine-differs",
            f"With your sample the engine writes other tokens. {prompt!r} with {wishes} begins with"
            f" {same} tokens that agree; then comes {one[same : same + 1]}, expected"
            f" {other[same : same + 1]}.",
        )
    expect(
        mine.calls,
        "not-used",
        "The engine never called your sample.\nIs it the function that you gave to the check?",
    )
    return f"the engine draws the same {sum(map(len, right))} tokens with it"


FILTER = (
    Known(
        "top-p-of-one",
        message=(
            "top_p = 1 asks for nothing, and you drop tokens for it. Where the likeliest is far"
            " ahead, a float32 sum is 1 long before the last token.\nAll stay where top_p is 1:"
            " leave such a row alone."
        ),
        suspects=(_wrong_filter("p-of-one"),),
        answers=r"""
# %% adds up for a top_p of 1, too
@@
-        if top_p is not None and top_p[i] < 1:
+        if top_p is not None:
""",
    ),
    Known(
        "nothing-left",
        message=(
            "top_p = 0 leaves no token at all.\nThe likeliest token always stays: note it last,"
            " whatever the sums say."
        ),
        suspects=(_wrong_filter("empty-at-zero"),),
        answers=r"""
# %% the likeliest may go, too
@@
-        keep[order[0]] = True
""",
    ),
    Known(
        "half-precision-filter",
        message=(
            "You filter in the dtype of the logits. In bfloat16 a sum stops growing long before it"
            " reaches top_p, and tokens that should go stay.\nlogits.float() first."
        ),
        suspects=(_wrong_filter("half"),),
        answers=r"""
# %% filters in the dtype that came
@@
-        scaled = logits[i].float() / divisor
+        scaled = logits[i] / divisor.to(logits.dtype)
@@
-            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
+            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order].to(
+                logits.dtype
+            )
""",
    ),
    Known(
        "top-p-before-temperature",
        message=(
            "Top-p looks at the probabilities before the temperature. A hot distribution is"
            " flatter, so more tokens are needed to reach top_p, and a cold one needs fewer.\nThe"
            " temperature comes first: take the softmax of logits / temperature."
        ),
        suspects=(_wrong_filter("p-before-temperature"),),
        answers=r"""
# %% filters first, then the temperature
@@
-        scaled = logits[i].float() / divisor
+        scaled = logits[i].float()
@@
-            keep &= scaled >= scaled.max() + min_p[i].log()
+            keep &= scaled / divisor >= scaled.max() / divisor + min_p[i].log()
""",
    ),
    Known(
        "min-p-before-temperature",
        message=(
            "Min-p looks at the probabilities before the temperature.\nTake them of logits /"
            " temperature, as for top-p."
        ),
        suspects=(_wrong_filter("min-p-before-temperature"),),
        answers=r"""
# %% min-p of the logits as they came
@@
-            keep &= scaled >= scaled.max() + min_p[i].log()
+            row = logits[i].float()
+            keep &= row >= row.max() + min_p[i].log()
""",
    ),
    Known(
        "min-p-overflow",
        message=(
            "Min-p takes exp of the logits as they are; from 89 on that is inf, and far below 0 it"
            " is 0.\nSubtract the row's maximum first, or compare the logits themselves."
        ),
        suspects=(_wrong_filter("min-p-overflow"),),
        answers=r"""
# %% exp of the scores
@@
-            keep &= scaled >= scaled.max() + min_p[i].log()
+            weights = scaled.exp()
+            keep &= weights >= min_p[i] * weights.max()
""",
    ),
    Known(
        "stops-short",
        message=(
            "Top-p stops *before* the sum reaches top_p: the token that crosses the line is"
            " missing.\nTop-p keeps the fewest tokens that reach it. Keep a token if the sum of"
            " those *before* it is still below top_p: cumsum - probability < top_p."
        ),
        suspects=(
            _wrong_filter("stops-short"),
            _wrong_filter("stops-short-empty"),
            _wrong_filter("stops-short-below"),
        ),
        answers=r"""
# %% the token that crosses the line is dropped
@@
-            before = probability.cumsum(0) - probability
-            keep[order[before >= top_p[i]]] = False
+            keep[order[probability.cumsum(0) > top_p[i]]] = False
""",
    ),
    Known(
        "one-too-many",
        message=(
            "Top-p keeps one token more than it needs: the sum of those before it has reached top_p"
            " already.\nKeep a token if cumsum - probability < top_p."
        ),
        suspects=(_wrong_filter("one-too-many"),),
    ),
    Known(
        "top-p-of-everything",
        message=(
            "Top-p adds up probabilities of the whole vocabulary, also of tokens that top-k has"
            " thrown out.\nWhat top-k left is a distribution of its own: mask the others with -inf,"
            " take the softmax again, and then add up."
        ),
        suspects=(_wrong_filter("p-of-everything"),),
        answers=r"""
# %% top-p without a softmax over what is left
@@
-            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
+            probability = scaled.softmax(0)[order]
""",
    ),
    Known(
        "top-k-keeps-ties",
        message=(
            "Where several tokens are equal to the k-th, you keep them all, more than k. A row of"
            " equal logits would lose nothing.\nKeep exactly k, of equal ones those with the lower"
            " ids: a stable sort does that."
        ),
        suspects=(_wrong_filter("ties"),),
        answers=r"""
# %% a threshold instead of places
@@
-            keep[order[top_k[i] :]] = False
+            keep &= scaled >= scaled[order[top_k[i] - 1]]
""",
    ),
    Known(
        "absolute-min-p",
        message=(
            "You take min_p as a probability. It is a share of the *best* token's: where the best"
            " has 0.5, min_p = 0.1 drops what is below 0.05."
        ),
        suspects=(_wrong_filter("absolute-min-p"), _wrong_filter("absolute-and-best")),
        answers=r"""
# %% a probability of min_p at least
@@
-            keep &= scaled >= scaled.max() + min_p[i].log()
-        keep[order[0]] = True
+            keep &= scaled.masked_fill(~keep, -torch.inf).softmax(0) >= min_p[i]
+        if min_p is None:
+            keep[order[0]] = True
""",
    ),
    Known(
        "zero-is-a-logit",
        message=(
            "You set what is excluded to 0. A logit of 0 is quite a likely token where others are"
            " negative.\nExcluded is -inf: its weight is exp(-inf) = 0."
        ),
        suspects=(_wrong_filter("zero"),),
        answers=r"""
# %% 0 for what is excluded
@@
-        filtered[i, ~keep] = -torch.inf
+        filtered[i, ~keep] = 0.0
""",
    ),
    Known(
        "left-sorted",
        message=(
            "The logits come back in order of size. Position i of a row has to be token i"
            " again.\nscatter them back by the order that the sort gave, or mask the original by a"
            " threshold in each row."
        ),
        suspects=(_wrong_filter("sorted"),),
    ),
    Known(
        "first-row-for-all",
        message=(
            "Every row gets the first row's top_k, top_p and min_p.\nThe rows are different"
            " requests with different wishes."
        ),
        suspects=(
            _wrong_filter("first-row"),
            _wrong_filter("first-row-too-hot"),
        ),
        answers=r"""
# %% the first row's wishes
@@
-        if top_k is not None and 0 < top_k[i] < len(scaled):
-            keep[order[top_k[i] :]] = False
-        if top_p is not None and top_p[i] < 1:
+        if top_k is not None and 0 < top_k[0] < len(scaled):
+            keep[order[top_k[0] :]] = False
+        if top_p is not None and top_p[0] < 1:
@@
-            keep[order[before >= top_p[i]]] = False
-        if min_p is not None and min_p[i] > 0:
-            keep &= scaled >= scaled.max() + min_p[i].log()
+            keep[order[before >= top_p[0]]] = False
+        if min_p is not None and min_p[0] > 0:
+            keep &= scaled >= scaled.max() + min_p[0].log()
""",
    ),
    Known(
        "top-k-drops-ties",
        message=(
            "Where several tokens are equal to the k-th, you keep none of them, or those with the"
            " higher ids.\nKeep exactly k, of equal ones those with the lower ids: a stable sort in"
            " descending order does that."
        ),
        suspects=(
            _wrong_filter("ties-dropped"),
            _wrong_filter("above-the-next"),
            _wrong_filter("ties-higher"),
        ),
        answers=r"""
# %% only what is above the next one
@@
-            keep[order[top_k[i] :]] = False
+            keep = scaled > scaled[order[top_k[i]]]
""",
    ),
    Known(
        "nearly-excluded",
        message=(
            "What is excluded has a large negative logit, and not -inf.\nIn a row of logits far"
            " below 0, or at a high temperature, such a token is drawn: only -inf has the weight 0."
        ),
        suspects=tuple(map(_wrong_filter, _FILLS)),
        answers=r"""
# %% a large negative number
@@
-        filtered[i, ~keep] = -torch.inf
+        filtered[i, ~keep] = -1e4
""",
    ),
    Known(
        "negative-k",
        message=(
            "top_k = -1 asks for nothing, and you drop a token for it.\nA slice up to -1 leaves"
            " the last one out: 0 or less means all."
        ),
        suspects=(_wrong_filter("negative-k"),),
        answers=r"""
# %% -1 as the end of a slice
@@
-        if top_k is not None and 0 < top_k[i] < len(scaled):
+        if top_k is not None and 0 != top_k[i] < len(scaled):
""",
    ),
    Known(
        "reached-exactly",
        message=(
            "A sum reaches top_p *exactly*, and you take one more token.\nReached is reached: a"
            " token stays if the sum of those before it is below top_p, and not equal to it."
        ),
        suspects=(_wrong_filter("exact-too-many"),),
        answers=r"""
# %% equal counts as not reached
@@
-            keep[order[before >= top_p[i]]] = False
+            keep[order[before > top_p[i]]] = False
""",
    ),
    Known(
        "min-p-strict",
        message=(
            "A token is exactly min_p times as probable as the likeliest, and you drop it.\nAt"
            " *least* min_p times: compare with `>=`."
        ),
        suspects=(_wrong_filter("min-p-strict"),),
        answers=r"""
# %% more than min_p
@@
-            keep &= scaled >= scaled.max() + min_p[i].log()
+            keep &= scaled > scaled.max() + min_p[i].log()
""",
    ),
    Known(
        "returns-scaled",
        message=(
            "You return the logits divided by the temperature. `sample` divides again.\nThe"
            " temperature decides what is kept; what is kept keeps its logit."
        ),
        suspects=(_wrong_filter("returns-scaled"),),
        answers=r"""
# %% scaled logits
@@
-        filtered[i, ~keep] = -torch.inf
+        filtered[i] = scaled.masked_fill(~keep, -torch.inf)
""",
    ),
    Known(
        "filter-multiplies",
        message=("In the filter you multiply by the temperature: then hot is cold.\nDivide."),
        suspects=(_wrong_filter("multiplied"),),
    ),
    Known(
        "sums-in-order-of-ids",
        message=(
            "Top-p adds up the probabilities in order of the token ids.\nThe *likeliest* tokens"
            " are kept: sort first, add up in that order, and bring the result back to the ids."
        ),
        suspects=(_wrong_filter("id-order"),),
        answers=r"""
# %% adds up without a sort
@@
-            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
+            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)
@@
-            keep[order[before >= top_p[i]]] = False
+            keep[before >= top_p[i]] = False
""",
    ),
)

SAMPLE = (
    Known(
        "no-temperature",
        message=(
            "The temperature changes nothing.\nDivide the logits by it, each row by its own, before"
            " the softmax."
        ),
        suspects=(_wrong_sample("no-temperature"),),
        answers=r"""
# %% no temperature
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    ruler = logits.softmax(dim=-1).cumsum(dim=-1)
""",
    ),
    Known(
        "multiplied-by-temperature",
        message=(
            "You multiply by the temperature: then hot is cold. A high temperature must make a "
            "flat distribution.\nDivide."
        ),
        suspects=(_wrong_sample("multiplied"),),
        answers=r"""
# %% hot is cold
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    ruler = (logits * divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
""",
    ),
    Known(
        "filters-ignored",
        message=(
            "top_k, top_p and min_p change nothing: your `sample` does not use `filter_logits`.\nIt"
            " comes before the softmax."
        ),
        suspects=(_wrong_sample("no-filter"),),
        answers=r"""
# %% no filter
@@
-    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
+    logits = logits.float()
""",
    ),
    Known(
        "same-number-every-time",
        message=(
            "Your random number depends on the seed alone: at every position of a text the same u "
            "is drawn, and a text soon goes in circles.\nphilox_uniform(seeds, positions) takes "
            "both."
        ),
        suspects=(_wrong_sample("seed-only"),),
        answers=r"""
# %% the seed alone
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(seeds, torch.zeros_like(positions))[:, None]
""",
    ),
    Known(
        "seed-ignored",
        message=(
            "Your random number depends on the position alone: every seed writes the same "
            "text.\nphilox_uniform(seeds, positions) takes both."
        ),
        suspects=(_wrong_sample("position-only"),),
        answers=r"""
# %% the position alone
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(torch.zeros_like(seeds), positions)[:, None]
""",
    ),
    Known(
        "swapped-key",
        message=(
            "You give philox_uniform positions and seeds in the wrong order: (1, 2) then draws what"
            " (2, 1) draws.\nIt is philox_uniform(seeds, positions)."
        ),
        suspects=(_wrong_sample("swapped"),),
        answers=r"""
# %% positions and seeds
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(positions, seeds)[:, None]
""",
    ),
    Known(
        "one-number-for-all",
        message=(
            "All rows use the first row's random number. What a request writes then depends on who "
            "else is in the batch.\nu is [B]: a number for each row."
        ),
        suspects=(_wrong_sample("first-row"),),
        answers=r"""
# %% the first row's number
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(seeds, positions)[:1, None].expand(len(logits), 1)
""",
    ),
    Known(
        "sorted-order",
        message=(
            "You lay the tokens on the ruler in order of probability. That draws as often as it"
            " should, but other tokens than the rule says: the ruler is in order of the token ids."
            " (The kernel needs no sort then.)"
        ),
        suspects=(_wrong_sample("sorted"),),
        answers=r"""
# %% the likeliest first
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    weights, order = (
+        (logits / divisor[:, None])
+        .softmax(dim=-1)
+        .sort(dim=-1, descending=True, stable=True)
+    )
+    ruler = weights.cumsum(dim=-1)
@@
-    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
+    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True).clamp(
+        max=logits.shape[1] - 1
+    )
+    chosen = order.gather(1, chosen)[:, 0]
""",
    ),
    Known(
        "other-end",
        message=(
            "You take 1 - u: as random, but not the same token. The ruler begins with token 0, at u"
            " = 0."
        ),
        suspects=(_wrong_sample("one-minus"),),
    ),
    Known(
        "one-before",
        message=(
            "You take the last token whose sum is *below* u, and that one's part of the ruler has"
            " ended. The token is the first whose running sum exceeds u."
        ),
        suspects=(_wrong_sample("one-before"),),
    ),
    Known(
        "greedy-not-greedy",
        message=(
            "A row of temperature 0 is greedy: the likeliest token, without any chance. Yours draws"
            " it at random, as at temperature 1."
        ),
        suspects=(_wrong_sample("greedy-sampled"),),
        answers=r"""
# %% temperature 0 drawn as temperature 1
@@
-    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))
+    return chosen.clamp(max=logits.shape[1] - 1)
""",
    ),
    Known(
        "cold-is-not-greedy",
        message=(
            "A row whose temperature is small gets its likeliest token, the first of equal ones."
            "\nOnly temperature 0 is greedy: at any other, equal logits have equal chances."
        ),
        suspects=tuple(map(_wrong_sample, _COLD)),
        answers=r"""
# %% greedy below 0.01
@@
-    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))
+    chosen = chosen.clamp(max=logits.shape[1] - 1)
+    return torch.where(temperature < 1e-2, greedy, chosen)

# %% greedy below 1e-5
@@
-    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))
+    chosen = chosen.clamp(max=logits.shape[1] - 1)
+    return torch.where(temperature < 1e-5, greedy, chosen)
""",
    ),
    Known(
        "half-precision",
        message=(
            "The logits came as bfloat16, and you took the softmax in that. It has 8 bits: sums"
            " stop growing long before they reach 1, and the tokens behind are never"
            " drawn.\nlogits.float() first."
        ),
        suspects=(
            _wrong_sample("half"),
            _wrong_sample("half-of-all"),
        ),
        answers=r"""
# %% the softmax of what came
@@
-    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
+    logits = filter_logits(logits, temperature, top_k, top_p, min_p)
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    ruler = (logits / divisor[:, None].to(logits.dtype)).softmax(dim=-1).cumsum(dim=-1)
@@
-    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
+    chosen = torch.searchsorted(ruler, (u * ruler[:, -1:]).to(ruler.dtype), right=True)[
+        :, 0
+    ]
""",
    ),
    Known(
        "overflow",
        message=(
            "You take exp of the logits as they are; from 89 on that is inf, and inf / inf is"
            " nan.\nSubtract each row's maximum first, or use torch.softmax, which does."
        ),
        suspects=(_wrong_sample("overflow"),),
        answers=r"""
# %% exp of the scores as they are
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    ruler = (logits / divisor[:, None]).exp().cumsum(dim=-1)
""",
    ),
    Known(
        "one-greedy-for-all",
        message=(
            "One request of the batch is greedy, and all of them get their likeliest"
            " token.\nTemperature 0 is a wish of one row: take the argmax there, and draw in the"
            " others."
        ),
        suspects=(
            _wrong_sample("greedy-for-all"),
            _wrong_sample("as-the-first"),
        ),
        answers=r"""
# %% any greedy row makes all greedy
@@
-    if temperature is None:
+    if temperature is None or (temperature == 0).any():
""",
    ),
    Known(
        "batch-wide-maximum",
        message=(
            "You subtract one maximum for the whole batch. A row whose logits are far below those"
            " of another row has weights of 0 only.\nEach row needs its own maximum: `amax(-1,"
            " keepdim=True)`, or torch.softmax with dim=-1."
        ),
        suspects=(_wrong_sample("batch-maximum"),),
        answers=r"""
# %% one maximum for all rows
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    scaled = logits / divisor[:, None]
+    ruler = (scaled - scaled.max()).exp().cumsum(dim=-1)

# %% one maximum for all rows, before the temperature, and a division by the sum
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    weights = ((logits - logits.max()) / divisor[:, None]).exp()
+    ruler = (weights / weights.sum(-1, keepdim=True)).cumsum(dim=-1)
""",
    ),
    Known(
        "last-of-equal",
        message=(
            "Of several likeliest tokens you take the last.\nOf equal ones the first counts:"
            " `argmax` takes it, and a sort that is not stable may not."
        ),
        suspects=(_wrong_sample("last-of-equal"),),
        answers=r"""
# %% from behind
@@
-    greedy = logits.argmax(dim=-1)
+    greedy = logits.shape[1] - 1 - logits.flip(1).argmax(dim=-1)
""",
    ),
    Known(
        "filters-scaled-logits",
        message=(
            "You divide by the temperature, and hand the result to `filter_logits`, which divides"
            " once more.\nGive it the logits as they came, and divide afterwards."
        ),
        suspects=(_wrong_sample("filters-scaled"),),
        answers=r"""
# %% divides before the filter, too
@@
-    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
     divisor = torch.where(temperature == 0, 1.0, temperature)
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    scaled = logits.float() / divisor[:, None]
+    scaled = filter_logits(scaled, temperature, top_k, top_p, min_p)
+    ruler = scaled.softmax(dim=-1).cumsum(dim=-1)
""",
    ),
    Known(
        "temperature-twice",
        message=(
            "You divide by the temperature twice.\nThe filter returns the original logits, so one"
            " division is left to do."
        ),
        suspects=(_wrong_sample("twice"),),
        answers=r"""
# %% divides again
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    ruler = (logits / divisor[:, None] / divisor[:, None]).softmax(dim=-1)
+    ruler = ruler.cumsum(dim=-1)
""",
    ),
    Known(
        "seed-cut",
        message=(
            "Two seeds that differ by 2^32, or a negative one, draw the same numbers or wrong"
            " ones: your code makes seeds shorter than they are.\nA seed has 64 bits: hand it on"
            " as it is."
        ),
        suspects=(
            _wrong_sample("seed-31"),
            _wrong_sample("seed-32"),
            _wrong_sample("seed-int"),
        ),
        answers=r"""
# %% 32 bits of the seed
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(seeds & 0xFFFFFFFF, positions)[:, None]
""",
    ),
    Known(
        "position-cut",
        message=(
            "Two positions that differ by 2^16 or 2^32 draw the same number: your code makes"
            " positions shorter than they are.\nHand them on as they are: all 64 bits count."
        ),
        suspects=(
            _wrong_sample("position-16"),
            _wrong_sample("position-32"),
            _wrong_sample("position-int"),
        ),
        answers=r"""
# %% 32 bits of the position
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(seeds, positions.int().long())[:, None]
""",
    ),
    Known(
        "seed-plus-position",
        message=(
            "You make one number of the seed and the position by adding them: seed 1 at position 2"
            " then draws what seed 2 draws at position 1, and texts repeat each"
            " other.\nphilox_uniform(seeds, positions) takes both."
        ),
        suspects=(_wrong_sample("sum"),),
        answers=r"""
# %% one key of both
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(seeds + positions, torch.zeros_like(positions))[:, None]
""",
    ),
    Known(
        "another-position",
        message=(
            "You draw the number of the position after the one that was given.\nHand positions on"
            " as they are."
        ),
        suspects=(_wrong_sample("one-too-far"),),
    ),
    Known(
        "depends-on-the-batch",
        answers=r"""
# %% all rows greedy: forgets to look
@@
+    if (temperature == 0).all():
+        return torch.zeros_like(greedy)
     logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()

# %% a generator for the batch, seeded by the first request
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    random = torch.Generator().manual_seed(int(seeds[0] + positions[0]))
+    u = torch.rand(len(logits), 1, generator=random)
""",
    ),
    Known(
        "on-the-border",
        answers=r"""
# %% the first sum that reaches u
@@
-    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
+    chosen = torch.searchsorted(ruler, u * ruler[:, -1:])[:, 0]
""",
    ),
    Known(
        "end-of-the-ruler",
        answers=r"""
# %% the ruler is taken to end at 1
@@
-    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
+    chosen = torch.searchsorted(ruler, u, right=True)[:, 0]
""",
    ),
    Known(
        "result-reused",
        answers=r"""
# %% one tensor for all batches of a size
@@
+_tokens = {}
+
+
 def sample(
@@
-    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))
+    tokens = _tokens.setdefault(len(logits), torch.zeros_like(greedy))
+    chosen = chosen.clamp(max=logits.shape[1] - 1)
+    return tokens.copy_(torch.where(temperature == 0, greedy, chosen))
""",
    ),
    Known(
        "not-repeatable",
        answers=r"""
# %% torch's own generator
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = torch.rand(len(logits), 1)

# %% torch.multinomial
@@
-    u = philox_uniform(seeds, positions)[:, None]
-    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
+    chosen = torch.multinomial((logits / divisor[:, None]).softmax(dim=-1), 1)[:, 0]
""",
    ),
    Known(
        "always-greedy",
        answers=r"""
# %% the likeliest token, always
@@
-    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))
+    return greedy
""",
    ),
    Known(
        "changed-input",
        answers=r"""
# %% filters in place
@@
-    filtered = logits.clone()
+    filtered = logits
""",
    ),
    Known(
        "wrong-values",
        answers=r"""
# %% nearly 1 is 1
@@
-        if top_p is not None and top_p[i] < 1:
+        if top_p is not None and top_p[i] < 0.999:

# %% nearly 0 is 0
@@
-        if min_p is not None and min_p[i] > 0:
+        if min_p is not None and min_p[i] > 1e-3:

# %% no temperature below 0.01
@@
-    divisor = torch.where(temperature == 0, 1.0, temperature)
+    divisor = torch.where(temperature == 0, 1.0, temperature.clamp(min=0.01))
""",
    ),
)

EXERCISE = Exercise(
    id="07.4",
    title="Choose a token",
    check=check_sample,
    mistakes=(*FILTER, *SAMPLE),
    right=r"""
# %% row by row, with loops
def filter_logits(logits, temperature, top_k, top_p, min_p):
    rows = []
    for i, row in enumerate(logits):
        scaled = row.double() / (float(temperature[i]) or 1.0)
        places = sorted(range(len(row)), key=lambda t: (-float(scaled[t]), t))
        if top_k is not None and top_k[i] > 0:
            places = places[: int(top_k[i])]
        weights = torch.exp(scaled[places] - scaled.max())
        if top_p is not None and top_p[i] < 1:
            total, so_far, kept = float(weights.sum()), 0.0, 0
            while so_far < float(top_p[i]) * total - 1e-7 and kept < len(places):
                so_far, kept = so_far + float(weights[kept]), kept + 1
            places = places[: max(kept, 1)]
        if min_p is not None and min_p[i] > 0:
            least = float(min_p[i]) - 1e-7
            places = [
                t
                for t in places
                if t == places[0] or torch.exp(scaled[t] - scaled.max()) >= least
            ]
        out = torch.full_like(row, -torch.inf)
        out[places] = row[places]
        rows.append(out)
    return torch.stack(rows)


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    if temperature is None:
        return logits.argmax(-1)
    kept = filter_logits(logits, temperature, top_k, top_p, min_p)
    chosen = []
    for i in range(len(logits)):
        if temperature[i] == 0:
            chosen.append(int(logits[i].argmax()))
            continue
        scaled = kept[i].double() / float(temperature[i])
        weights = torch.exp(scaled - scaled.max())
        target = float(philox_uniform(seeds[i : i + 1], positions[i : i + 1])) * float(
            weights.sum()
        )
        chosen.append(int((weights.cumsum(0) > target).nonzero()[0]))
    return torch.tensor(chosen)
""",
)
