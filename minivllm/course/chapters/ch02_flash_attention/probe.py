"""What an answer's queries look at: the weights that it gives to keys, read off its results.

The output of attention is a sum of values, so values that are rows of the unit matrix give the
weights themselves. They show a mistake that has no name yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch02_flash_attention.cases import plain
from minivllm.course.chapters.ch02_flash_attention.walk import exact

if TYPE_CHECKING:
    import torch

#: Query, key, value and scale -> the result of the answer, for one head.
Attend = Callable[..., "torch.Tensor"]

_DIM = 64
#: A weight below this share of the largest one of its row counts as none.
_NONE = 1e-3


def described(attend: Attend) -> tuple[str, str] | None:
    """The name of a symptom and what it looks like; None where the weights are right.

    The name is "" where the answer raises.

    attend: must take 64 numbers per query, key and value.
    """
    for queries, keys, seed in (
        (41, 60, 40),
        (13, 13, 42),
        (33, 33, 43),
        (5, 2500, 41),
        (150, 200, 44),
        (1, 60, 45),
    ):
        found = _compared(attend, queries, keys, seed)
        if found:
            name, text = found
            who = "1 query" if queries == 1 else f"{queries} queries"
            return name, f"Tried with {who} after {keys - queries} keys: {text}"
    return None


def _compared(attend: Attend, queries: int, keys: int, seed: int) -> tuple[str, str] | None:
    """Compare the weights of each query, in groups of keys, with the right ones."""
    import torch

    head = plain(queries, keys, _DIM, seed, scale=0.4)
    width = -(-keys // _DIM)
    value = torch.zeros(keys, _DIM)
    value[torch.arange(keys), torch.arange(keys) // width] = 1.0
    groups = -(-keys // width)
    right = exact(head.query, head.key, value, head.scale)[:, :groups]
    try:
        mine = attend(head.query, head.key, value, head.scale)[:, :groups]
    except Exception as error:
        return "", f"your code raises {type(error).__name__}: {error}"
    if mine.shape != right.shape or torch.allclose(mine, right, rtol=1e-3, atol=1e-5):
        return None
    if not mine.isfinite().all():
        rows = (~mine.isfinite().all(dim=1)).nonzero().flatten().tolist()
        return "rows-of-nan", f"the result has nan or inf in the rows {_listed(rows)}."
    row = int((mine - right).abs().amax(dim=1).argmax())
    query, scores = head.query[row].double(), head.key.double()
    exponents = (scores @ query * head.scale) if width == 1 else None
    return _seen_in(row, keys - queries + row, mine[row], right[row], width, exponents)


def _seen_in(
    row: int,
    position: int,
    mine: torch.Tensor,
    right: torch.Tensor,
    width: int,
    exponents: torch.Tensor | None,
) -> tuple[str, str]:
    """What is wrong with the weights of one query. exponents: the right scores, key by key."""
    who = f"query {row} stands at position {position}, and "
    least = _NONE * float(right.max())
    later = [
        group
        for group in range(len(right))
        if group * width > position and abs(float(mine[group])) > least
    ]
    if later:
        return "sees-later-keys", f"{who}gives weight to {_keys(later, width)}, after it."
    sharper = _sharper(mine, right, exponents)
    if sharper is not None and abs(sharper - 1) > 0.01:
        return (
            "wrong-scale",
            f"{who}has the weights of a softmax whose scores are {sharper:.4g} times what they"
            " should be.",
        )
    # A small weight beside others that are too large is not none.
    nothing = (mine.abs() <= _NONE * float(mine.abs().max())) & (mine.abs() < 0.1 * right)
    if bool(((right > least) & nothing).any()):
        # Name those of little weight, too: which keys are missing tells why.
        left_out = ((right > 0) & nothing).nonzero().flatten().tolist()
        return (
            "keys-left-out",
            f"{who}gives no weight to {_keys(left_out, width, position)}, which it may see.",
        )
    again = _counted_twice(mine, right, least)
    if again:
        return (
            "keys-counted-twice",
            f"{who}the weight of {_keys(again, width)} is twice what it should be beside the other"
            " keys: as if their tile were visited twice.",
        )
    total = float(mine.sum())
    if abs(total - 1) > 1e-3:
        return "weights-do-not-add-up", f"{who}its weights add up to {total:.4g} and not to 1."
    parts = list(_ratios(mine, right, width, position))
    if len(parts) > 6:
        return "wrong-weights", f"{who}nearly all of its weights are wrong."
    return "wrong-weights", f"{who}its weights are too large or too small: {'; '.join(parts)}."


def _sharper(
    mine: torch.Tensor, right: torch.Tensor, exponents: torch.Tensor | None
) -> float | None:
    """The factor of the scores that explains all weights of a row; None where no factor does."""
    import torch

    if exponents is None or bool((mine[right > 0] <= 0).any()):
        return None
    x = exponents[right > 0]
    y = mine[right > 0].double().log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    fits = torch.allclose(slope * x, y, rtol=0.0, atol=0.02)
    return float(slope) if fits else None


def _counted_twice(mine: torch.Tensor, right: torch.Tensor, least: float) -> list[int]:
    """The groups of keys whose factor is twice that of all others; none where it is otherwise."""
    import torch

    seen = right > least
    factor = torch.where(seen, mine / right, torch.inf)
    lowest = float(factor.min())
    twice = seen & ((factor / (2 * lowest) - 1).abs() < 0.02)
    once = seen & ((factor / lowest - 1).abs() < 0.02)
    if lowest <= 0 or bool((seen & ~twice & ~once).any()):
        return []
    return twice.nonzero().flatten().tolist()


def _ratios(mine: torch.Tensor, right: torch.Tensor, width: int, position: int) -> Iterator[str]:
    """Runs of keys whose weights are off by the same factor."""
    visible = [group for group in range(len(right)) if group * width <= position]
    factor = {group: float(mine[group] / right[group]) for group in visible}
    runs: list[list[int]] = []
    for group in visible:
        near = runs and abs(factor[group] / factor[runs[-1][0]] - 1) < 0.02
        if near:
            runs[-1].append(group)
        else:
            runs.append([group])
    for run in runs:
        yield f"{_keys(run, width, position)}: {factor[run[0]]:.3g} times"


def _keys(groups: list[int], width: int, last: int | None = None) -> str:
    """The keys of these groups, in words; those after `last` are left out."""
    keys = [key for group in groups for key in range(group * width, (group + 1) * width)]
    keys = [key for key in keys if last is None or key <= last]
    return f"key {keys[0]}" if len(keys) == 1 else f"keys {_listed(keys)}"


def _listed(numbers: list[int]) -> str:
    """Numbers in ascending order, runs as "3 to 7"."""
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        few = len(members) == 1
        runs.append(str(members[0]) if few else f"{members[0]} to {members[-1]}")
    return ", ".join(runs[:4]) + (", …" if len(runs) > 4 else "")
