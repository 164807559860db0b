"""09.4: a vocabulary in parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect, seeded

if TYPE_CHECKING:
    import torch

    from minivllm.course.sim.ranks import Group
from minivllm.course.chapters.ch09_tensor_parallel.common import (
    Case,
    collect,
    same_calls,
    the_n,
    the_run,
)
from minivllm.course.grading.exercise import Exercise, Known


def _right_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    import torch.nn.functional as F

    count = -(-len(table) // size)
    return F.pad(table, (0, 0, 0, count * size - len(table)))[rank * count : (rank + 1) * count]


def _padded_rows(case: Case, rank: int) -> torch.Tensor:
    """The rows of a rank, with large numbers where padding is: nothing may depend on it."""
    rows = _right_rows(case.data["table"], rank, case.size).clone()
    rows[max(0, len(case.data["table"]) - rank * len(rows)) :] = 77.0
    return rows


def _check_rows(shard_rows: Callable, case: Case) -> None:
    import torch

    table, size = case.data["table"], case.size
    parts = [shard_rows(table.clone(), rank, size) for rank in range(size)]
    vocab, count = len(table), -(-len(table) // size)
    expect(
        all(isinstance(part, torch.Tensor) for part in parts),
        "wrong-type",
        f"shard_rows returned {show(parts[0])}.\nIt should be a tensor.",
    )
    lengths = [len(part) for part in parts]
    if size > 1 and lengths == [vocab] * size:
        raise Mistake(
            "kept-whole",
            f"Each rank gets all {vocab} rows.\nThat is what one wants to avoid: a rank has "
            f"{count} of them.",
        )
    if len(set(lengths)) > 1:
        raise Mistake(
            "uneven-parts",
            f"The ranks get {', '.join(map(str, lengths))} rows.\nA collective needs the same "
            f"shape on all ranks: {count} rows each, the last ones padded.",
        )
    if lengths[0] * size < vocab:
        raise Mistake(
            "tokens-without-a-row",
            f"{size} ranks get {lengths[0]} rows each, together {lengths[0] * size}: the last"
            f" {vocab - lengths[0] * size} of {vocab} tokens have none.\nRound up: {count} rows"
            " each.",
        )
    expect(
        lengths[0] == count,
        "wrong-shape",
        f"Each rank gets {lengths[0]} rows.\nWith {vocab} tokens on {size} ranks it "
        f"is {count}, rounded up.",
    )
    for rank, part in enumerate(parts):
        right = table[rank * count : (rank + 1) * count]
        expect(
            part.shape[1:] == table.shape[1:],
            "wrong-shape",
            f"Rank {rank} gets {list(part.shape)}.\nOnly rows are "
            "divided; each keeps all its numbers.",
        )
        expect(
            torch.equal(part[: len(right)], right),
            "wrong-rows",
            f"The rows of rank {rank} are not those of the tokens {rank * count} to"
            f" {rank * count + len(right) - 1}.\nRank r has the r-th block of {count}, in order,"
            " and padding comes after the last token.",
        )


def _embed_on_ranks(embed: Callable, case: Case) -> list[torch.Tensor]:
    ids = case.data["token_ids"]
    results, case.data["calls"] = the_run(
        case.size, lambda group: embed(group, ids.clone(), _padded_rows(case, group.rank))
    )
    return results


def _logits_on_ranks(logits: Callable, case: Case) -> list[torch.Tensor]:
    hidden, vocab = case.data["hidden"], len(case.data["table"])
    results, case.data["calls"] = the_run(
        case.size,
        lambda group: logits(group, hidden.clone(), _padded_rows(case, group.rank), vocab),
    )
    return results


def _local(group: Group, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return ids - group.rank * len(rows)


def check_vocabulary(shard_rows: Callable, embed: Callable, logits: Callable) -> str:
    import torch

    cases = []
    for seed, (size, vocab, hidden, tokens) in enumerate(
        [
            (1, 5, 3, 4),
            (2, 8, 4, 8),
            (2, 7, 4, 7),
            (4, 10, 6, 20),
            (3, 12, 5, 12),
            (4, 16, 8, 1),
            (8, 9, 4, 9),
        ]
    ):
        random = seeded(40 + seed)
        ids = torch.randint(0, vocab, (tokens,), generator=random)
        ids = torch.randperm(vocab, generator=random)[:tokens] if tokens <= vocab else ids
        data = {
            "table": torch.randn(vocab, hidden, generator=random),
            "token_ids": ids,
            "hidden": torch.randn(1 + seed % 3, hidden, generator=random),
        }
        cases.append(
            Case(
                f"{the_n(size, 'rank')}, {vocab} tokens in the vocabulary, hidden {hidden}",
                size,
                data,
            )
        )
    collect(partial(_check_rows, shard_rows), cases)
    words = {"case = ": "", **{f"item {r}: ": f"rank {r}: " for r in range(8)}}

    embedded = collect(partial(_embed_on_ranks, embed), cases)
    embed_calls = {case: case.data["calls"] for case in cases}
    known = {
        name: (why, *(partial(_embed_on_ranks, wrong) for wrong in usual))
        for name, (why, *usual) in _embed_suspects().items()
    }
    number = diagnose(
        embedded.__getitem__,
        [(case,) for case in cases],
        lambda case: [case.data["table"][case.data["token_ids"]]] * case.size,
        known,
        wording=words,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        shape = (len(case.data["token_ids"]), case.data["table"].shape[1])
        same_calls(
            embed_calls[case],
            [("all_reduce", shape)],
            case,
            "Weights stay where they are; what was looked up is added.",
        )

    scored = collect(partial(_logits_on_ranks, logits), cases)
    logit_calls = {case: case.data["calls"] for case in cases}
    known = {
        name: (why, *(partial(_logits_on_ranks, wrong) for wrong in usual))
        for name, (why, *usual) in _logit_suspects().items()
    }
    diagnose(
        scored.__getitem__,
        [(case,) for case in cases],
        lambda case: [case.data["hidden"] @ case.data["table"].T] * case.size,
        known,
        wording=words,
    )
    for case in sorted(cases, key=lambda case: case.size == 1):
        shape = (len(case.data["hidden"]), -(-len(case.data["table"]) // case.size))
        same_calls(
            logit_calls[case],
            [("all_gather", shape)],
            case,
            "Each rank brings the scores of its own tokens.",
        )
    return f"{number} vocabularies, looked up and scored"


def _embed_suspects() -> dict[str, tuple]:
    import torch

    def zeroed(group: Group, ids: Any, rows: Any, mine: Any) -> Any:
        found = rows[_local(group, ids, rows).clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, torch.zeros_like(found)))

    def inclusive(group: Group, ids: Any, rows: Any) -> Any:
        local = _local(group, ids, rows)
        return zeroed(group, ids, rows, (local >= 0) & (local <= len(rows)))

    def exclusive(group: Group, ids: Any, rows: Any) -> Any:
        local = _local(group, ids, rows)
        return zeroed(group, ids, rows, (local > 0) & (local < len(rows)))

    def only_below(group: Group, ids: Any, rows: Any) -> Any:
        return zeroed(group, ids, rows, _local(group, ids, rows) < len(rows))

    def only_above(group: Group, ids: Any, rows: Any) -> Any:
        return zeroed(group, ids, rows, _local(group, ids, rows) >= 0)

    def not_summed(group: Group, ids: Any, rows: Any) -> Any:
        local = _local(group, ids, rows)
        mine = (local >= 0) & (local < len(rows))
        return rows[local.clamp(0, len(rows) - 1)] * mine[:, None]

    return {
        "not-masked": (
            (
                "A rank also adds a row for tokens that it does not have. Another index instead"
                " (clamped, or modulo) keeps the look-up from failing, but what it finds is some"
                " other token's row: set those results to zero before they are added."
            ),
            lambda group, ids, rows: group.all_reduce(
                rows[_local(group, ids, rows).clamp(0, len(rows) - 1)]
            ),
            lambda group, ids, rows: group.all_reduce(rows[ids % len(rows)]),
            lambda group, ids, rows: group.all_reduce(rows[_local(group, ids, rows) % len(rows)]),
            only_below,
            only_above,
        ),
        "token-zero-instead": (
            (
                "For tokens that are another rank's you look up row 0, and add that. Looking up"
                " something harmless keeps the index legal; what it finds must still be set to"
                " zero."
            ),
            lambda group, ids, rows: group.all_reduce(
                rows[
                    torch.where(
                        (_local(group, ids, rows) >= 0) & (_local(group, ids, rows) < len(rows)),
                        _local(group, ids, rows),
                        0,
                    )
                ]
            ),
        ),
        "boundary": (
            (
                "At the border between two ranks a token belongs to both, or to neither. Rank r has"
                " the tokens from r · n up to, and without, (r + 1) · n."
            ),
            inclusive,
            exclusive,
        ),
        "not-summed": (
            (
                "Each rank returns what it found itself, zeros where the token is another's. The"
                " rows must get to all ranks: all_reduce adds them, and all but one are zeros."
            ),
            not_summed,
        ),
    }


def _logit_suspects() -> dict[str, tuple]:
    import torch.nn.functional as F

    def summed(group: Group, hidden: Any, rows: Any, vocab: int) -> Any:
        return group.all_reduce(hidden @ rows.T)

    def placed(group: Group, hidden: Any, rows: Any, vocab: int) -> Any:
        mine, before = hidden @ rows.T, group.rank * len(rows)
        return group.all_reduce(F.pad(mine, (before, (group.size - group.rank - 1) * len(rows))))

    return {
        "padding-kept": (
            (
                "The padding comes back as tokens: there are more scores than tokens. One of them"
                " may even win, and then a token is sampled that does not exist. Cut the logits off"
                " at vocab_size, after gathering."
            ),
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T),
            placed,
        ),
        "added-not-gathered": (
            (
                "You add the ranks' scores. They are scores of different tokens: they belong side"
                " by side, all_gather."
            ),
            summed,
        ),
        "gathered-along-rows": (
            (
                "You put the ranks' scores below each other, as if they were further sequences."
                " They are further tokens: gather along the last dimension."
            ),
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T, dim=0)[:, :vocab],
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T, dim=0),
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T, dim=0)[:vocab],
        ),
        "scrambled": (
            (
                "The scores are there, but in the wrong order: gathered below each other, and then"
                " only reshaped. With one sequence that is right; with more, rows of different"
                " ranks get mixed. Gather along the last dimension."
            ),
            lambda group, hidden, rows, vocab: group.all_gather(hidden @ rows.T, dim=0).reshape(
                len(hidden), -1
            )[:, :vocab],
        ),
        "not-gathered": (
            (
                "Each rank returns the scores of its own tokens only, so the ranks would sample"
                " different ones. Gather them."
            ),
            lambda group, hidden, rows, vocab: hidden @ rows.T,
            lambda group, hidden, rows, vocab: (hidden @ rows.T)[:, :vocab],
        ),
    }


EXERCISE = Exercise(
    id="09.4",
    title="A vocabulary in parts",
    check=check_vocabulary,
    mistakes=(
        Known(
            "not-masked",
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
            "not-summed",
            answers=r"""
# %% what the rank found itself
@@
-    return group.all_reduce(torch.where(mine[:, None], found, 0.0))
+    return torch.where(mine[:, None], found, 0.0)
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

# %% states summed first, as if they were terms
@@
     """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
+    hidden = group.broadcast(hidden)
''',
        ),
        Known(
            "padding-kept",
            answers=r"""
# %% no cut at the end
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    return group.all_gather(hidden @ rows.T)
""",
        ),
        Known(
            "added-not-gathered",
            answers=r"""
# %% all_reduce of the scores
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    return group.all_reduce(hidden @ rows.T)[:, :vocab_size]
""",
        ),
        Known(
            "not-gathered",
            answers=r"""
# %% own tokens only
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    return (hidden @ rows.T)[:, :vocab_size]
""",
        ),
        Known(
            "scrambled",
            answers=r"""
# %% gathered below each other and reshaped
@@
-    return group.all_gather(hidden @ rows.T)[:, :vocab_size]
+    found = group.all_gather(hidden @ rows.T, dim=0)
+    return found.reshape(len(hidden), -1)[:, :vocab_size]
""",
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
            "tokens-without-a-row",
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
    ),
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
    found = torch.zeros(len(token_ids), rows.shape[1])
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
