"""09.4: a vocabulary in parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch09_tensor_parallel.common import (
    AVERAGED,
    Case,
    Job,
    collect,
    count_of,
    judge,
    suspects_of,
)
from minivllm.course.grading.compare import is_tensor, show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_unchanged, seeded

if TYPE_CHECKING:
    import torch

    from minivllm.course.sim.ranks import Group

#: What stands in the rows of padding while an answer is judged: no row of a token is near it.
_PADDING = 77.0


def right_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The rows of a rank, padded with zeros."""
    import torch.nn.functional as F

    count = -(-len(table) // size)
    return F.pad(table, (0, 0, 0, count * size - len(table)))[rank * count : (rank + 1) * count]


def _padded_rows(case: Case, rank: int) -> torch.Tensor:
    """The rows of a rank, with other numbers where padding is: nothing may depend on it."""
    rows = right_rows(case.data["table"], rank, case.size).clone()
    rows[max(0, len(case.data["table"]) - rank * len(rows)) :] = case.data["padding"]
    return rows


def _case(size: int, vocab: int, hidden: int, tokens: int, rows: int, seed: int) -> Case:
    """tokens: how many are looked up; where they suffice, each of the vocabulary is among them."""
    import torch

    random, count = seeded(40 + seed), -(-vocab // size)
    every = torch.randperm(vocab, generator=random)
    borders = torch.tensor([r * count + off for r in range(size) for off in (-1, 0)] + [vocab - 1])
    borders = borders[(borders >= 0) & (borders < vocab)].unique()
    if len(borders) >= tokens:
        borders = borders[:0]
    chosen = torch.cat((borders, every))[:tokens]
    further = torch.randint(0, vocab, (tokens - len(chosen),), generator=random)
    ids = torch.cat((chosen, further))
    data = {
        "table": torch.randn(vocab, hidden, generator=random),
        "token_ids": ids[torch.randperm(tokens, generator=random)],
        "hidden": torch.randn(hidden, rows, generator=random).T,
        "padding": _PADDING,
    }
    return Case(f"{count_of(size, 'rank')}, a vocabulary of {vocab}, hidden {hidden}", size, data)


def _cases() -> list[Case]:
    shapes = [
        (1, 5, 3, 4, 2),
        (2, 8, 4, 8, 1),
        (2, 7, 4, 9, 3),
        (4, 10, 6, 20, 4),
        (3, 12, 5, 12, 1),
        (4, 16, 8, 1, 2),
        (8, 9, 4, 9, 5),
        (6, 6, 4, 8, 6),
        (5, 3, 4, 1, 1),
        (3, 131, 7, 700, 650),
        (4, 270_001, 2, 40, 2),
    ]
    return [_case(*shape, seed) for seed, shape in enumerate(shapes)]


def _poisoned(case: Case) -> Case:
    """NaN in the padding, and in the rows of all tokens that are not looked up."""
    import torch

    table = torch.full_like(case.data["table"], math.nan)
    ids = case.data["token_ids"]
    table[ids] = case.data["table"][ids]
    data = {**case.data, "padding": math.nan}
    return Case(f"{case}, NaN in the padding", case.size, {**data, "looked_up": table})


def check_vocabulary(shard_rows: Callable, embed: Callable, logits: Callable) -> str:
    """Each function alone, on the right rows."""
    cases = _cases()
    collect(partial(_check_rows, shard_rows), [*cases, cases[2].in_float64()])
    number = judge(_EMBED_JOB, embed, cases, suspects_of(_EMBED))
    for case in map(_poisoned, cases):
        table = case.data["looked_up"]
        _check_poison(_EMBED_JOB, embed, Case(case.what, case.size, {**case.data, "table": table}))
    _judge_logits(logits, cases)
    for case in map(_poisoned, cases):
        _check_poison(_LOGITS_JOB, logits, case)
    return f"{number} vocabularies, looked up and scored"


def _judge_logits(logits: Callable, cases: list[Case]) -> None:
    """`judge`, which gives scores for the padding their name."""

    def watched(group: Group, hidden: Any, rows: Any, vocab_size: int) -> Any:
        result = logits(group, hidden, rows, vocab_size)
        padded = (len(hidden), len(rows) * group.size)
        if is_tensor(result) and result.shape == padded and padded[1] > vocab_size:
            text = f"logits returns {list(padded)} for a vocabulary of {vocab_size}.\n"
            raise Mistake("padding-kept", text + EXERCISE.mistake("padding-kept").message)
        return result

    judge(_LOGITS_JOB, watched, cases, suspects_of(_LOGITS))


def _check_poison(job: Job, function: Callable, case: Case) -> None:
    """What the right code does not use may be NaN, and does not travel."""

    def watched(group: Group, *args: Any) -> Any:
        def looking(collective: Callable) -> Callable:
            def look(tensor: Any, *more: Any, **named: Any) -> Any:
                if is_tensor(tensor) and not tensor.isfinite().all():
                    travels.append((collective.__name__, tensor))
                return collective(tensor, *more, **named)

            return look

        for name in ("all_reduce", "all_gather"):
            setattr(group, name, looking(getattr(group, name)))
        return function(group, *args)

    travels: list[tuple[str, Any]] = []
    [results] = collect(partial(job.results, watched), [case]).values()
    for rank, result in enumerate(results):
        if is_tensor(result) and not result.isfinite().all():
            seen = f"With {case}: the result on rank {rank} is {show(result)}."
            raise EXERCISE.mistake("nan-let-through", seen)
    # The scores of padding travel with the others.
    if travels and job is _EMBED_JOB:
        name, tensor = travels[0]
        seen = f"With {case}: your embed passes {show(tensor)} to {name}."
        raise EXERCISE.mistake("rows-travel", seen)


def _check_rows(shard_rows: Callable, case: Case) -> None:
    """Each rank must get its block of rows, and zeros behind the last token."""
    table = case.data["table"].clone()
    _check_parts(shard_rows, case, table)
    twin = case.other_numbers()
    table.copy_(twin.data["table"])
    try:
        _check_parts(shard_rows, twin, table)
    except Mistake as mistake:
        raise Mistake(
            "keeps-state",
            "The first calls of shard_rows are right, and others with other numbers are not: your"
            " code keeps something between calls.\nLook for a variable outside of the function, or"
            f" a cache. {mistake.message}",
        ) from mistake


def _check_parts(shard_rows: Callable, case: Case, table: torch.Tensor) -> None:
    """table: to hand in, with the numbers of the case."""
    parts = [shard_rows(table, rank, case.size) for rank in range(case.size)]
    expect(
        all(map(is_tensor, parts)),
        "wrong-type",
        f"shard_rows returned {show(parts)}.\nIt should be a tensor, on every rank.",
    )
    expect_unchanged(table, case.data["table"], "table")
    _check_lengths(parts, len(table))
    for rank, rows in enumerate(parts):
        _check_block(rows, case, rank)


def _check_lengths(parts: list[torch.Tensor], vocab: int) -> None:
    size, count, lengths = len(parts), -(-vocab // len(parts)), [len(part) for part in parts]
    said = ", ".join(map(str, lengths))
    expect(
        size == 1 or vocab == count or lengths != [vocab] * size,
        "kept-whole",
        f"Each rank gets all {vocab} rows.\nThat is what one wants to avoid: a rank has"
        f" {count} of them.",
    )
    expect(
        len(set(lengths)) == 1,
        "uneven-parts",
        f"The ranks get {said} rows.\nA collective needs the same shape on all ranks: {count} rows"
        " each, the last ones padded.",
    )
    missing = vocab - lengths[0] * size
    expect(
        missing <= 0,
        "tokens-without-a-row",
        f"{size} ranks get {lengths[0]} rows each, together {lengths[0] * size}: the last"
        f" {missing} of {vocab} tokens have none.\nRound up: {count} rows each.",
    )
    expect(
        lengths[0] == count,
        "wrong-shape",
        f"Each rank gets {lengths[0]} rows.\nWith {vocab} tokens on {size} ranks it is {count},"
        " rounded up.",
    )


def _check_block(rows: torch.Tensor, case: Case, rank: int) -> None:
    """The rows of one rank, bit by bit."""
    import torch

    table, count = case.data["table"], len(rows)
    own = table[rank * count : (rank + 1) * count]
    expect(
        rows.shape[1:] == table.shape[1:] and rows.dtype == table.dtype,
        "wrong-shape",
        f"Rank {rank} gets {show(rows)}.\nOnly rows are divided; each keeps all its numbers, and"
        " their dtype.",
    )
    expect(
        torch.equal(rows[: len(own)], own),
        "wrong-rows",
        f"The rows of rank {rank} are not those of the tokens {rank * count} to"
        f" {rank * count + len(own) - 1}.\nRank r has the r-th block of {count}, in order, and"
        " padding comes after the last token.",
    )
    expect(
        not rows[len(own) :].any(),
        "padding-not-zero",
        f"Rank {rank} has {count_of(count - len(own), 'row')} of padding: {show(rows[len(own) :])}."
        "\nPadding is zeros. Another token's row would be found twice, and NaN spreads.",
    )


def _looked_up(case: Case) -> torch.Tensor:
    return case.data["table"][case.data["token_ids"]]


_EMBED_JOB = Job(
    "embed's result",
    ("token_ids", "rows"),
    lambda case, rank: (case.data["token_ids"].clone(), _padded_rows(case, rank)),
    _looked_up,
    lambda case: ("all_reduce", (len(case.data["token_ids"]), case.data["table"].shape[1])),
    "Weights stay where they are; what was looked up is added.",
)
_LOGITS_JOB = Job(
    "logits' result",
    ("hidden", "rows", "vocab_size"),
    lambda case, rank: (
        case.data["hidden"].clone(),
        _padded_rows(case, rank),
        len(case.data["table"]),
    ),
    lambda case: case.data["hidden"] @ case.data["table"].T,
    lambda case: (
        "all_gather",
        (len(case.data["hidden"]), -(-len(case.data["table"]) // case.size)),
    ),
    "Each rank brings the scores of its own tokens.",
)


def _embed(found: Callable) -> Callable:
    """A suspect for embed. found(group, local ids, whether they are the rank's, rows)."""

    def embed(group: Group, ids: torch.Tensor, rows: torch.Tensor) -> Any:
        local = ids - group.rank * len(rows)
        return found(group, local, (local >= 0) & (local < len(rows)), rows)

    return partial(_EMBED_JOB.results, embed)


def _near(local: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return rows[local.clamp(0, len(rows) - 1)]


def _own(local: torch.Tensor, mine: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return _near(local, rows) * mine[:, None]


def _zeroed(mask: Callable) -> Callable:
    """A suspect for embed that keeps other rows. mask(local ids, number of rows)."""
    return _embed(
        lambda group, local, mine, rows: group.all_reduce(
            _near(local, rows) * mask(local, len(rows))[:, None]
        )
    )


def _scores(result: Callable) -> Callable:
    """A suspect for logits. result(group, the rank's scores, vocab_size)."""

    def logits(group: Group, hidden: Any, rows: Any, vocab: int) -> Any:
        return result(group, hidden @ rows.T, vocab)

    return partial(_LOGITS_JOB.results, logits)


def _floored_cut(group: Group, scores: Any, vocab: int) -> Any:
    return group.all_gather(scores[:, : vocab // group.size])


_EMBED = (
    Known(
        "not-masked",
        (
            "A rank also adds a row for tokens that it does not have. Another index instead"
            " (clamped, or modulo) keeps the look-up from failing, but what it finds is some other"
            " token's row: set those results to zero before they are added."
        ),
        hint=2,
        suspects=(
            _embed(lambda group, local, mine, rows: group.all_reduce(_near(local, rows))),
            _embed(lambda group, local, mine, rows: group.all_reduce(rows[local % len(rows)])),
            _zeroed(lambda local, count: local < count),
            _zeroed(lambda local, count: local >= 0),
        ),
        answers=r"""
# %% clamped, and added all the same
@@
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return group.all_reduce(found)

# %% modulo
@@
-    local = token_ids - group.rank * len(rows)
-    mine = (local >= 0) & (local < len(rows))
-    found = rows[local.clamp(0, len(rows) - 1)]
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return group.all_reduce(rows[token_ids % len(rows)])
""",
    ),
    Known(
        "token-zero-instead",
        (
            "For tokens that are another rank's you look up row 0, and add that. Looking up"
            " something harmless keeps the index legal; what it finds must still be set to zero."
        ),
        hint=2,
        suspects=(_embed(lambda group, local, mine, rows: group.all_reduce(rows[local * mine])),),
        answers=r"""
# %% row 0 for the others
@@
-    found = rows[local.clamp(0, len(rows) - 1)]
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return group.all_reduce(rows[torch.where(mine, local, 0)])
""",
    ),
    Known(
        "boundary",
        (
            "At the border between two ranks a token belongs to both, or to neither. Rank r has"
            " the tokens from r · n up to, and without, (r + 1) · n."
        ),
        suspects=(
            _zeroed(lambda local, count: (local >= 0) & (local <= count)),
            _zeroed(lambda local, count: (local > 0) & (local < count)),
            _zeroed(lambda local, count: (local >= 0) & (local < count - 1)),
            _zeroed(lambda local, count: (local > 0) & (local <= count)),
        ),
        answers=r"""
# %% one token too many
@@
-    mine = (local >= 0) & (local < len(rows))
+    mine = (local >= 0) & (local <= len(rows))

# %% the first token is nobody's
@@
-    mine = (local >= 0) & (local < len(rows))
+    mine = (local > 0) & (local < len(rows))
""",
    ),
    Known(
        "mask-inverted",
        (
            "You set to zero what a rank has found, and keep what it has not. The condition is the"
            " wrong way round."
        ),
        suspects=(
            _embed(lambda group, local, mine, rows: group.all_reduce(_own(local, ~mine, rows))),
        ),
        answers=r"""
# %% masked_fill with the wrong condition
@@
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return group.all_reduce(found.masked_fill(mine[:, None], 0.0))
""",
    ),
    Known(
        "not-summed",
        (
            "Each rank returns what it found itself, zeros where the token is another's. The rows"
            " must get to all ranks: all_reduce adds them, and all but one are zeros."
        ),
        hint=3,
        suspects=(_embed(lambda group, local, mine, rows: _own(local, mine, rows)),),
        answers=r"""
# %% what the rank found itself
@@
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return torch.where(mine[:, None], found, 0.0)
""",
    ),
    replace(
        AVERAGED,
        hint=3,
        suspects=(
            _embed(
                lambda group, local, mine, rows: (
                    group.all_reduce(_own(local, mine, rows)) / group.size
                )
            ),
        ),
        answers=r"""
# %% divided by the ranks
@@
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return group.all_reduce(torch.where(mine[:, None], found, 0.0)) / group.size
""",
    ),
    Known(
        "gathered-not-summed",
        (
            "You put what the ranks found side by side, or below each other. For each token one"
            " rank has found a row and the others zeros: all_reduce adds them."
        ),
        hint=3,
        suspects=(
            _embed(lambda group, local, mine, rows: group.all_gather(_own(local, mine, rows))),
            _embed(lambda group, local, mine, rows: group.all_gather(_own(local, mine, rows), 0)),
        ),
        answers=r"""
# %% side by side
@@
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return group.all_gather(torch.where(mine[:, None], found, 0.0))
""",
    ),
)

_LOGITS = (
    Known(
        "padding-kept",
        (
            "The padding comes back as tokens: there are more scores than tokens. One of them may"
            " even win, and then a token is sampled that does not exist. Cut the logits off at"
            " vocab_size along the last dimension, after gathering."
        ),
        hint=3,
        answers=r"""
# %% no cut at the end
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    return group.all_gather(hidden @ rows.T)
""",
    ),
    Known(
        "added-not-gathered",
        (
            "You add the ranks' scores. They are scores of different tokens: they belong side by"
            " side, all_gather."
        ),
        hint=3,
        suspects=(
            _scores(lambda group, scores, vocab: group.all_reduce(scores)),
            _scores(lambda group, scores, vocab: group.all_reduce(scores)[:, :vocab]),
        ),
        answers=r"""
# %% all_reduce of the scores
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    return group.all_reduce(hidden @ rows.T)[:, :vocab_size]
""",
    ),
    Known(
        "gathered-along-rows",
        (
            "You put the ranks' scores below each other, as if they were further sequences. They"
            " are further tokens: gather along the last dimension."
        ),
        hint=3,
        suspects=(
            _scores(lambda group, scores, vocab: group.all_gather(scores, dim=0)[:, :vocab]),
            _scores(lambda group, scores, vocab: group.all_gather(scores, dim=0)),
            _scores(lambda group, scores, vocab: group.all_gather(scores, dim=0)[:vocab]),
        ),
        answers=r"""
# %% dim 0
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    return group.all_gather(hidden @ rows.T, dim=0)[:, :vocab_size]
""",
    ),
    Known(
        "scrambled",
        (
            "The scores are there, but in the wrong order: gathered below each other, and then"
            " only reshaped. With one sequence that is right; with more, rows of different ranks"
            " get mixed. Gather along the last dimension."
        ),
        hint=3,
        suspects=(
            _scores(
                lambda group, scores, vocab: group.all_gather(scores, dim=0).reshape(
                    len(scores), -1
                )[:, :vocab]
            ),
        ),
        answers=r"""
# %% gathered below each other and reshaped
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    found = group.all_gather(hidden @ rows.T, dim=0)
+    return found.reshape(len(hidden), -1)[:, :vocab_size]
""",
    ),
    Known(
        "not-gathered",
        (
            "Each rank returns the scores of its own tokens only, so the ranks would sample"
            " different ones. Gather them."
        ),
        hint=3,
        suspects=(
            _scores(lambda group, scores, vocab: scores),
            _scores(lambda group, scores, vocab: scores[:, :vocab]),
        ),
        answers=r"""
# %% own tokens only
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    return (hidden @ rows.T)[:, :vocab_size]
""",
    ),
    Known(
        "cut-before-gathering",
        (
            "You cut off each rank's scores before they are gathered. Only the ranks at the end"
            " have padding; a cut on every rank throws scores of tokens away."
        ),
        suspects=(_scores(_floored_cut),),
        answers=r"""
# %% vocab_size // size scores of each rank
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    return group.all_gather((hidden @ rows.T)[:, : vocab_size // group.size])
""",
    ),
)

_OTHERS = (
    Known(
        "nan-let-through",
        (
            "In the check the padding is NaN, and so is the row of each token that nobody asks"
            " for. NaN times zero is NaN: put zeros in place of what must not count (torch.where,"
            " masked_fill, or an index), and do not multiply by a mask."
        ),
        hint=2,
        answers=r"""
# %% times the mask
@@
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return group.all_reduce(found * mine[:, None])
""",
    ),
    Known(
        "rows-travel",
        (
            "That holds rows of the table for which nobody asks, or padding: weights travel. Send"
            " only what was looked up, in an all-reduce."
        ),
        hint=3,
        answers=r"""
# %% the table travels where there are more tokens than rows
@@
     local = token_ids - group.rank * len(rows)
+    if len(token_ids) > len(rows):
+        return group.all_gather(rows.T).T[token_ids]

# %% the whole table as a sum, for two ranks and many tokens
@@
     local = token_ids - group.rank * len(rows)
+    if group.size == 2 and len(token_ids) >= 2 * len(rows):
+        whole = rows.new_zeros(2 * len(rows), rows.shape[1])
+        whole[group.rank * len(rows) :][: len(rows)] = rows
+        return group.all_reduce(whole)[token_ids]
""",
    ),
    Known(
        "too-much-sent",
        answers=r'''
# %% the table travels
@@
-    local = token_ids - group.rank * len(rows)
-    mine = (local >= 0) & (local < len(rows))
-    found = rows[local.clamp(0, len(rows) - 1)]
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    table = group.all_gather(rows.T).T
+    return table[token_ids]

# %% many tokens in pieces, an all-reduce for each
@@
+    if len(token_ids) > 300:
+        return torch.cat([embed(group, c, rows) for c in token_ids.split(300)])
     local = token_ids - group.rank * len(rows)

# %% many rows in pieces, an all-gather for each
@@
+    if len(hidden) > 256:
+        parts = hidden.split(256)
+        return torch.cat([logits(group, c, rows, vocab_size) for c in parts])
     return group.all_gather(hidden @ rows.T)[:, :vocab_size]

# %% states summed first, as if they were terms
@@
     """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
+    hidden = group.broadcast(hidden)
''',
    ),
    Known(
        "different-shapes",
        answers=r"""
# %% the padding cut off on the last rank, before gathering
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    mine = (hidden @ rows.T)[:, : vocab_size - group.rank * len(rows)]
+    return group.all_gather(mine)
""",
    ),
    Known(
        "never-called",
        answers=r"""
# %% no sum where the rank has none of the tokens
@@
     found = rows[local.clamp(0, len(rows) - 1)]
+    if not mine.any():
+        return torch.zeros_like(found)
""",
    ),
    Known(
        "tokens-without-a-row",
        hint=1,
        answers=r"""
# %% rounded down
@@
-    count = -(-len(table) // size)
-    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
-    return padded[rank * count : (rank + 1) * count]
+    count = len(table) // size
+    return table[rank * count : (rank + 1) * count]
""",
    ),
    Known(
        "uneven-parts",
        hint=1,
        answers=r"""
# %% the last rank gets fewer
@@
-    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
-    return padded[rank * count : (rank + 1) * count]
+    return table[rank * count : (rank + 1) * count]

# %% as evenly as possible
@@
-    count = -(-len(table) // size)
-    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
-    return padded[rank * count : (rank + 1) * count]
+    return table.tensor_split(size)[rank]
""",
    ),
    Known(
        "kept-whole",
        hint=1,
        answers=r"""
# %% everybody has the table
@@
-    count = -(-len(table) // size)
-    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
-    return padded[rank * count : (rank + 1) * count]
+    return table.clone()
""",
    ),
    Known(
        "wrong-rows",
        answers=r"""
# %% every n-th token
@@
-    return padded[rank * count : (rank + 1) * count]
+    return padded[rank::size]
""",
    ),
    Known(
        "padding-not-zero",
        hint=1,
        answers=r"""
# %% pads with the last row
@@
-    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
+    padded = torch.cat((table, table[-1:].expand(count * size - len(table), -1)))

# %% whatever lies in the memory
@@
-    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
+    padded = torch.full((count * size, table.shape[1]), -1e9, dtype=table.dtype)
+    padded[: len(table)] = table
""",
    ),
    Known(
        "changed-input",
        answers=r"""
# %% subtracts from the caller's ids
@@
-    local = token_ids - group.rank * len(rows)
+    token_ids -= group.rank * len(rows)
+    local = token_ids
""",
    ),
    Known(
        "wrong-dtype",
        answers=r"""
# %% float32, whatever the rows have
@@
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return group.all_reduce(torch.where(mine[:, None], found, 0.0).float())
""",
    ),
)

EXERCISE = Exercise(
    id="09.4",
    title="A vocabulary in parts",
    check=check_vocabulary,
    mistakes=(*_EMBED, *_LOGITS, *_OTHERS),
    right=r'''
# %% an index, and a product with the mask
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = (len(table) + size - 1) // size
    rows = table.new_zeros(count, table.shape[1])
    own = table[rank * count : (rank + 1) * count]
    rows[: len(own)] = own
    return rows


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    first = group.rank * len(rows)
    found = rows.new_zeros(len(token_ids), rows.shape[1])
    mine = (token_ids >= first) & (token_ids < first + len(rows))
    found[mine] = rows[token_ids[mine] - first]
    return group.all_reduce(found)


def logits(
    group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(F.linear(hidden, rows), dim=1)[..., :vocab_size]
''',
)
