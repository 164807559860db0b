"""07.4: choose a token."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference, show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import counted, expect, seeded

if TYPE_CHECKING:
    import torch

from minivllm.course.grading.exercise import Exercise, Known

INF = math.inf


def _filter(
    logits: torch.Tensor, temperature: Any, top_k: Any, top_p: Any, min_p: Any, mistake: str = ""
) -> torch.Tensor:
    """`filter_logits` row by row, right by default, and wrong in the way that mistake says."""
    import torch

    rows = []
    for i in range(len(logits)):
        j = 0 if mistake.startswith("first-row") else i
        k = int(top_k[j]) if top_k is not None else 0
        p = float(top_p[j]) if top_p is not None else 1.0
        least = float(min_p[j]) if min_p is not None else 0.0
        row = logits[i] if mistake == "half" else logits[i].float()
        heat = float(temperature[0 if mistake == "first-row-too-hot" else i])
        scaled = row / heat
        ordered, order = scaled.sort(descending=True, stable=True)
        keep = torch.ones(len(row), dtype=torch.bool)
        if k > 0:
            keep = (
                scaled >= ordered[min(k, len(row)) - 1] if mistake == "ties" else _first(order, k)
            )
        base = row if mistake == "p-before-temperature" else scaled
        if mistake != "p-of-everything":
            base = base.masked_fill(~keep, -INF)
        probability = base.softmax(0)[order]
        total = probability.cumsum(0)
        if p < 1:
            few = (
                total <= p
                if mistake in ("stops-short", "stops-short-empty")
                else total - probability < p
            )
            if mistake == "one-too-many":
                few = torch.cat((torch.tensor([True]), few[:-1]))
            if mistake != "stops-short-empty":
                few[0] = True
            keep &= torch.zeros_like(keep).scatter_(0, order, few)
        if least > 0:
            base = row if mistake == "min-p-before-temperature" else scaled
            weights = base.masked_fill(~keep, -INF).softmax(0)
            keep &= weights >= (least if mistake == "absolute-min-p" else least * weights.max())
            if mistake != "absolute-min-p":
                keep[order[0]] = True
        fill = 0.0 if mistake == "zero" else -INF
        kept = logits[i].masked_fill(~keep, fill)
        rows.append(kept[order] if mistake == "sorted" else kept)
    return torch.stack(rows)


def _first(order: torch.Tensor, k: int) -> torch.Tensor:
    import torch

    return torch.zeros(len(order), dtype=torch.bool).scatter_(0, order[:k], True)


_FILTER_MISTAKES = {
    "half-precision": (
        (
            "You filter in the dtype of the logits. In bfloat16 a sum stops growing long before it"
            " reaches top_p, and tokens that should go stay.\nlogits.float() first."
        ),
        "half",
    ),
    "top-p-before-temperature": (
        (
            "Top-p looks at the probabilities before the temperature. A hot distribution is"
            " flatter, so more tokens are needed to reach top_p, and a cold one needs fewer.\nThe"
            " temperature comes first: take the softmax of logits / temperature."
        ),
        "p-before-temperature",
    ),
    "min-p-before-temperature": (
        (
            "Min-p looks at the probabilities before the temperature.\nTake them of logits /"
            " temperature, as for top-p."
        ),
        "min-p-before-temperature",
    ),
    "stops-short": (
        (
            "Top-p stops *before* the sum reaches top_p: the token that crosses the line is"
            " missing.\nTop-p keeps the fewest tokens that reach it. Keep a token if the sum of"
            " those *before* it is still below top_p: cumsum - probability < top_p."
        ),
        "stops-short",
        "stops-short-empty",
    ),
    "one-too-many": (
        (
            "Top-p keeps one token more than it needs: the sum of those before it has reached top_p"
            " already.\nKeep a token if cumsum - probability < top_p."
        ),
        "one-too-many",
    ),
    "top-p-of-everything": (
        (
            "Top-p adds up probabilities of the whole vocabulary, also of tokens that top-k has"
            " thrown out.\nWhat top-k left is a distribution of its own: mask the others with -inf,"
            " take the softmax again, and then add up."
        ),
        "p-of-everything",
    ),
    "top-k-keeps-ties": (
        (
            "Where several tokens are equal to the k-th, you keep them all, more than k. A row of"
            " equal logits would lose nothing.\nKeep exactly k, of equal ones those with the lower"
            " ids: a stable sort does that."
        ),
        "ties",
    ),
    "absolute-min-p": (
        (
            "You take min_p as a probability. It is a share of the *best* token's: where the best"
            " has 0.5, min_p = 0.1 drops what is below 0.05."
        ),
        "absolute-min-p",
    ),
    "zero-is-a-logit": (
        (
            "You set what is excluded to 0. A logit of 0 is quite a likely token where others are"
            " negative.\nExcluded is -inf: its weight is exp(-inf) = 0."
        ),
        "zero",
    ),
    "left-sorted": (
        (
            "The logits come back in order of size. Position i of a row has to be token i"
            " again.\nscatter them back by the order that the sort gave, or mask the original by a"
            " threshold in each row."
        ),
        "sorted",
    ),
    "first-row-for-all": (
        (
            "Every row gets the first row's top_k, top_p and min_p.\nThe rows are different"
            " requests with different wishes."
        ),
        "first-row",
        "first-row-too-hot",
    ),
}


def _filter_cases() -> list[tuple]:
    import torch

    random = seeded(74)
    off = {"k": 0, "p": 1.0, "m": 0.0}

    def case(logits: torch.Tensor, *rows: dict[str, Any], without: str = "") -> tuple:
        wishes = [{"t": 1.0} | off | row for row in rows]
        made = [torch.tensor([float(w[key]) for w in wishes]) for key in "tkpm"]
        made[1] = made[1].int()
        return logits, *(
            None if key in without else value for key, value in zip("tkpm", made, strict=True)
        )

    word = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    spread = torch.randn(3, 40, generator=random) * 2
    return [
        case(word, {"k": 2}, without="pm"),
        case(word, {"p": 0.6}, without="km"),
        case(word, {"p": 0.3}, without="km"),
        case(word, {"m": 0.3}, without="kp"),
        case(word, {"p": 0.6, "t": 0.5}, without="km"),
        case(word, {"m": 0.3, "t": 3.0}, without="kp"),
        case(word, {"k": 2, "p": 0.71}, without="m"),
        case(torch.zeros(1, 6), {"k": 2}, without="pm"),
        case(torch.tensor([[-3.0, -1.0, -1.0, -2.0, -1.0, -9.0]]), {"k": 2}, without="pm"),
        case(
            torch.tensor([[-3.0, -INF, -1.0, -2.0, -INF, -9.0]]),
            {"p": 0.97, "m": 0.01},
            without="k",
        ),
        case(spread, {"k": 5}, {"p": 0.8}, {"m": 0.1}),
        case(spread, {"k": 50, "t": 2.0}, {"p": 0.01}, {"m": 1.0, "t": 0.7}),
        case(spread, {}, {"k": 12, "p": 0.7, "m": 0.05, "t": 1.7}, {"k": 1}),
        case(
            torch.randn(2, 700, generator=random) * 3,
            {"p": 0.95, "t": 0.6},
            {"k": 30, "p": 0.9, "m": 0.2},
        ),
        case(
            (torch.randn(2, 700, generator=random) * 2).bfloat16(),
            {"p": 0.95},
            {"p": 0.9, "m": 0.003},
        ),
    ]


def _sample(
    logits, temperature, top_k, top_p, min_p, seeds, positions, mistake: str = ""
) -> torch.Tensor:
    """`sample`, right by default, and wrong in the way that mistake says."""
    import torch

    from minivllm.kernels.sampling import filter_logits, philox_uniform

    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    heat = temperature.masked_fill(temperature == 0, 1.0).unsqueeze(1)
    if mistake != "no-filter":
        logits = filter_logits(logits, temperature, top_k, top_p, min_p)
    scaled = {"multiplied": logits.float() * heat, "no-temperature": logits.float()}.get(
        mistake, logits.float() / heat
    )
    if mistake == "half":
        weights = (logits / heat.to(logits.dtype)).softmax(-1).float()
    elif mistake == "overflow":
        weights = scaled.exp()
    else:
        weights = scaled.softmax(-1)
    u = philox_uniform(seeds, positions)
    if mistake == "seed-only":
        u = philox_uniform(seeds, torch.zeros_like(positions))
    elif mistake == "position-only":
        u = philox_uniform(torch.zeros_like(seeds), positions)
    elif mistake == "first-row":
        u = u[:1].expand_as(u)
    elif mistake == "swapped":
        u = philox_uniform(positions, seeds)
    elif mistake == "one-minus":
        u = 1 - u
    if mistake == "sorted":
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        chosen = order.gather(1, _invert(ordered, u))
    else:
        chosen = _invert(weights, u)
    chosen = chosen.squeeze(1)
    if mistake == "one-before":
        chosen = (chosen - 1).clamp_min(0)
    return chosen if mistake == "greedy-sampled" else torch.where(temperature == 0, greedy, chosen)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    import torch

    running = weights.double().cumsum(-1)
    chosen = torch.searchsorted(running, (u.double() * running[:, -1]).unsqueeze(1), right=True)
    return chosen.clamp_max(weights.shape[1] - 1)


_SAMPLE_MISTAKES = {
    "no-temperature": (
        (
            "The temperature changes nothing.\nDivide the logits by it, each row by its own, before"
            " the softmax."
        ),
        "no-temperature",
    ),
    "multiplied-by-temperature": (
        (
            "You multiply by the temperature: then hot is cold. A high temperature must make a "
            "flat distribution.\nDivide."
        ),
        "multiplied",
    ),
    "filters-ignored": (
        (
            "top_k, top_p and min_p change nothing: your `sample` does not use `filter_logits`.\nIt"
            " comes before the softmax."
        ),
        "no-filter",
    ),
    "same-number-every-time": (
        (
            "Your random number depends on the seed alone: at every position of a text the same u "
            "is drawn, and a text soon goes in circles.\nphilox_uniform(seeds, positions) takes "
            "both."
        ),
        "seed-only",
    ),
    "seed-ignored": (
        (
            "Your random number depends on the position alone: every seed writes the same "
            "text.\nphilox_uniform(seeds, positions) takes both."
        ),
        "position-only",
    ),
    "swapped-key": (
        (
            "You give philox_uniform positions and seeds in the wrong order: (1, 2) then draws what"
            " (2, 1) draws.\nIt is philox_uniform(seeds, positions)."
        ),
        "swapped",
    ),
    "one-number-for-all": (
        (
            "All rows use the first row's random number. What a request writes then depends on who "
            "else is in the batch.\nu is [B]: a number for each row."
        ),
        "first-row",
    ),
    "sorted-order": (
        (
            "You lay the tokens on the ruler in order of probability. That draws as often as it"
            " should, but other tokens than the rule says: the ruler is in order of the token ids."
            " (The kernel needs no sort then.)"
        ),
        "sorted",
    ),
    "other-end": (
        (
            "You take 1 - u: as random, but not the same token. The ruler begins with token 0, at u"
            " = 0."
        ),
        "one-minus",
    ),
    "one-before": (
        (
            "You take the last token whose sum is *below* u, and that one's part of the ruler has"
            " ended. The token is the first whose running sum exceeds u."
        ),
        "one-before",
    ),
    "greedy-not-greedy": (
        (
            "A row of temperature 0 is greedy: the likeliest token, without any chance. Yours draws"
            " it at random, as at temperature 1."
        ),
        "greedy-sampled",
    ),
    "half-precision": (
        (
            "The logits came as bfloat16, and you took the softmax in that. It has 8 bits: sums"
            " stop growing long before they reach 1, and the tokens behind are never"
            " drawn.\nlogits.float() first."
        ),
        "half",
    ),
    "overflow": (
        (
            "You take exp of the logits as they are; from 89 on that is inf, and inf / inf is"
            " nan.\nSubtract each row's maximum first, or use torch.softmax, which does."
        ),
        "overflow",
    ),
}


def _sample_cases() -> list[tuple]:
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
    wide = torch.randn(4, 2048, generator=random) * 4
    return [
        (word[None], floats(1.0), None, None, None, *keys(1)),
        (word[None], floats(0.0), None, None, None, *keys(1)),
        (logits[:2], None, None, None, None, None, None),
        (logits[:1], floats(0.7), None, None, None, torch.tensor([2**40 + 1]), torch.tensor([5])),
        (word.repeat(12, 1), torch.ones(12), None, None, None, *keys(12)),
        (word.repeat(6, 1), torch.ones(6), None, None, None, torch.full((6,), 3), torch.arange(6)),
        (logits, heat, None, None, None, *keys(8)),
        (masked, heat, None, None, None, *keys(8, 5)),
        (logits + 300, heat, None, None, None, *keys(8, 2)),
        (logits, heat, torch.tensor([3] * 8, dtype=torch.int32), None, None, *keys(8, 9)),
        (logits, heat, None, torch.full((8,), 0.3), torch.full((8,), 0.4), *keys(8, 13)),
        (wide, floats(1, 1.5, 0.9, 0), None, None, None, *keys(4, 1)),
        (torch.zeros(6, 2048, dtype=torch.bfloat16), torch.ones(6), None, None, None, *keys(6, 3)),
    ]


def _off_the_ruler(case: tuple, chosen: torch.Tensor) -> list[int]:
    """Rows whose token is not where the ruler has u, within what rounding may do."""
    from minivllm.kernels.sampling import filter_logits, philox_uniform

    logits, temperature, top_k, top_p, min_p, seeds, positions = case
    best = logits.float().amax(-1)
    if temperature is None:
        return [i for i, token in enumerate(chosen.tolist()) if logits[i, token] < best[i]]
    rows, u = [], philox_uniform(seeds, positions)
    kept = filter_logits(logits, temperature, top_k, top_p, min_p)
    for i, token in enumerate(chosen.tolist()):
        heat = float(temperature[i])
        if heat == 0:
            wrong = token != int(logits[i].argmax())
        else:
            weights = (kept[i].double() / heat).softmax(-1)
            end = float(weights[: token + 1].sum())
            begin = end - float(weights[token])
            wrong = not (begin - 1e-5 <= float(u[i]) <= end + 1e-5) or float(weights[token]) == 0
        if wrong:
            rows.append(i)
    return rows


def check_sample(answer_filter: Callable, answer: Callable) -> str:
    import torch

    from minivllm.kernels.sampling import filter_logits, philox_uniform

    suspects = {
        f"{name} {i}": (why, partial(_filter, mistake=mistake))
        for name, (why, *variants) in _FILTER_MISTAKES.items()
        for i, mistake in enumerate(variants)
    }
    try:
        num_filters = diagnose(answer_filter, _filter_cases(), filter_logits, suspects)
    except Mistake as mistake:
        raise Mistake(
            mistake.name.split()[0], f"filter_logits: {mistake.message}"
        ) from mistake.__cause__

    cases = _sample_cases()
    got = [_tokens_of(answer, case) for case in cases]
    again = [_tokens_of(answer, case) for case in cases]
    for case, one, other in zip(cases, got, again, strict=True):
        expect(
            torch.equal(one, other),
            "not-repeatable",
            f"The same call gave {show(one)} and then {show(other)}.\nA number from torch's own"
            " generator depends on all that was drawn before, so on who else is in the batch."
            " philox_uniform(seeds, positions) depends on nothing else.",
        )
        _expect_alone(answer, case, one)
    off = [_off_the_ruler(case, tokens) for case, tokens in zip(cases, got, strict=True)]
    if any(off):
        _name_sample(cases, got, off)
    _expect_distribution(answer, philox_uniform)
    mine = counted(answer)
    return (
        f"{num_filters} filters, {len(cases)} batches, 8,192 draws; {_seeded_engine_agrees(mine)}"
    )


def _tokens_of(answer: Callable, case: tuple) -> torch.Tensor:
    import torch

    logits = case[0].clone()
    chosen = answer(logits, *case[1:])
    problem = difference(chosen, torch.zeros(len(logits), dtype=torch.int64))
    if problem and problem[0] != "wrong-values":
        raise Mistake(
            problem[0],
            f"sample for logits {list(logits.shape)}: {problem[1]}.\nIt gives a token id for each"
            " row.",
        )
    expect(
        torch.equal(logits.nan_to_num(), case[0].nan_to_num()),
        "changed-input",
        "Your `sample` changed the logits.\nThey are reported as logprobs afterwards: work on a new"
        " tensor.",
    )
    inside = bool(((chosen >= 0) & (chosen < logits.shape[1])).all())
    expect(
        inside,
        "no-such-token",
        f"{show(chosen)} for a vocabulary of {logits.shape[1]}.\nRounding can leave the "
        "running sum just below u: then the last token with a "
        "weight is meant.",
    )
    return chosen


def _expect_alone(answer: Callable, case: tuple, together: torch.Tensor) -> None:
    """A row must get the same token in a batch of its own."""
    if len(together) == 1 or case[1] is None:
        return
    for i in (len(together) - 1,):
        alone = _tokens_of(
            answer, tuple(None if part is None else part[i : i + 1] for part in case)
        )
        expect(
            alone.item() == together[i].item(),
            "one-number-for-all",
            f"The same request, with the same seed and position, gets token {alone.item()} alone"
            f" and {together[i].item()} as row {i} of {len(together)}.\nWhat a request writes must"
            " not depend on who else is in the batch: each row needs its own number, from its own"
            " seed and position.",
        )


def _name_sample(cases: list[tuple], got: list[torch.Tensor], off: list[list[int]]) -> None:
    import torch

    first = next(i for i, rows in enumerate(off) if rows)
    row = off[first][0]
    right = _sample(*cases[first])
    heat = (
        "all greedy" if cases[first][1] is None else f"temperature {float(cases[first][1][row]):g}"
    )
    where = (
        f"Row {row} of logits {list(cases[first][0].shape)}, {heat}: your sample gives token"
        f" {int(got[first][row])}, expected {int(right[row])}."
    )
    if all(case[0].dtype == torch.bfloat16 for case, rows in zip(cases, off, strict=True) if rows):
        raise Mistake("half-precision", f"{where}\n{_SAMPLE_MISTAKES['half-precision'][0]}")
    for name, (why, *variants) in _SAMPLE_MISTAKES.items():
        for mistake in variants:
            theirs = [_sample(*case, mistake=mistake) for case in cases]
            agree = sum(int((a == b).sum()) for a, b in zip(theirs, got, strict=True))
            if agree >= sum(map(len, got)) - 1 and any(
                _off_the_ruler(c, t) for c, t in zip(cases, theirs, strict=True)
            ):
                raise Mistake(name, f"{where}\n{why}")
    expect(
        not all(
            torch.equal(tokens, case[0].argmax(-1)) for case, tokens in zip(cases, got, strict=True)
        ),
        "always-greedy",
        f"{where}\nYour sample takes the likeliest token always. Above temperature 0 the others"
        " have a chance, too.",
    )
    wrong, total = sum(map(len, off)), sum(map(len, got))
    raise Mistake(
        "wrong-values",
        f"{where}\n{wrong} of {total} rows get another token than the ruler has at u.",
    )


def _expect_distribution(answer: Callable, philox_uniform: Callable) -> None:
    """Frequencies over 8,192 positions against the probabilities."""
    import torch

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0, 1.5, 0.0])
    count = 8192
    for heat in (0.6, 1.7):
        case = (logits.repeat(count, 1), torch.full((count,), heat), None, None, None)
        chosen = answer(*case, torch.full((count,), 5), torch.arange(count))
        share = torch.bincount(chosen, minlength=8) / count
        probability = (logits / heat).softmax(0)
        gap = float((share - probability).abs().sum()) / 2
        expect(
            gap < 0.03,
            "wrong-distribution",
            f"Over {count:,} positions at temperature {heat} the tokens come "
            f"with the shares {show(share, 8)}, expected "
            f"{show(probability, 8)}.\nThat is {gap:.0%} of the draws on the "
            "wrong token.",
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


EXERCISE = Exercise(
    id="07.4",
    title="Choose a token",
    check=check_sample,
    mistakes=(
        Known(
            "top-p-before-temperature",
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
            answers=r"""
# %% min-p of the logits as they came
@@
-            keep &= scaled >= scaled.max() + min_p[i].log()
+            row = logits[i].float()
+            keep &= row >= row.max() + min_p[i].log()
""",
        ),
        Known(
            "stops-short",
            answers=r"""
# %% the token that crosses the line is dropped
@@
-            before = probability.cumsum(0) - probability
-            keep[order[before >= top_p[i]]] = False
+            keep[order[probability.cumsum(0) > top_p[i]]] = False
""",
        ),
        Known(
            "top-p-of-everything",
            answers=r"""
# %% top-p without a softmax over what is left
@@
-            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
+            probability = scaled.softmax(0)[order]
""",
        ),
        Known(
            "top-k-keeps-ties",
            answers=r"""
# %% a threshold instead of places
@@
-            keep[order[top_k[i] :]] = False
+            keep &= scaled >= scaled[order[top_k[i] - 1]]
""",
        ),
        Known(
            "absolute-min-p",
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
            answers=r"""
# %% 0 for what is excluded
@@
-        filtered[i, ~keep] = -torch.inf
+        filtered[i, ~keep] = 0.0
""",
        ),
        Known(
            "first-row-for-all",
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
            "no-temperature",
            answers=r"""
# %% no temperature
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    ruler = logits.softmax(dim=-1).cumsum(dim=-1)
""",
        ),
        Known(
            "multiplied-by-temperature",
            answers=r"""
# %% hot is cold
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    ruler = (logits * divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
""",
        ),
        Known(
            "filters-ignored",
            answers=r"""
# %% no filter
@@
-    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
+    logits = logits.float()
""",
        ),
        Known(
            "same-number-every-time",
            answers=r"""
# %% the seed alone
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(seeds, torch.zeros_like(positions))[:, None]
""",
        ),
        Known(
            "seed-ignored",
            answers=r"""
# %% the position alone
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(torch.zeros_like(seeds), positions)[:, None]
""",
        ),
        Known(
            "swapped-key",
            answers=r"""
# %% positions and seeds
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(positions, seeds)[:, None]
""",
        ),
        Known(
            "one-number-for-all",
            answers=r"""
# %% the first row's number
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    u = philox_uniform(seeds, positions)[:1, None].expand(len(logits), 1)

# %% a generator for the batch, seeded by the first request
@@
-    u = philox_uniform(seeds, positions)[:, None]
+    random = torch.Generator().manual_seed(int(seeds[0] + positions[0]))
+    u = torch.rand(len(logits), 1, generator=random)
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
            "sorted-order",
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
            "half-precision",
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
            "greedy-not-greedy",
            answers=r"""
# %% temperature 0 drawn as temperature 1
@@
-    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))
+    return chosen.clamp(max=logits.shape[1] - 1)
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
            "overflow",
            answers=r"""
# %% exp of the scores as they are
@@
-    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
+    ruler = (logits / divisor[:, None]).exp().cumsum(dim=-1)
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
    ),
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
