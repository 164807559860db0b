"""07.2: flatten a mixed batch."""

from __future__ import annotations

import copy
import numbers
from collections import abc
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference, is_tensor, show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import counted, expect, expect_unchanged
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import numpy as np
    import torch

    from minivllm.engine.batch import BatchRow


def _same(one: Any, other: Any) -> bool:
    return difference(one, other) is None


#: (start, number of tokens, samples) of a row.
_Spec = tuple[int, int, bool]


def _step_case(
    spec: list[_Spec],
    block_size: int,
    seed: int,
    first_block: int = 1,
    wide: bool = False,
    twins: bool = False,
) -> tuple:
    """(rows, block_table, block_size).

    first_block: the smallest number of a block. wide: the table is a part of a wider array, so that
    its rows do not lie one after the other in memory. twins: the first two rows are equal, and end
    with token 0.
    """
    import numpy as np

    from minivllm.engine.batch import BatchRow

    draws = np.random.default_rng(seed)
    rows = [
        BatchRow(draws.integers(0, 300_000, count).tolist(), start, samples)
        for start, count, samples in spec
    ]
    if twins:
        for row in rows[:2]:
            row.token_ids[:] = [*rows[0].token_ids[:-1], 0]
    widths = [-(-(start + count) // block_size) for start, count, _ in spec]
    # A row of the runner's table is as wide as the longest sequence could need.
    total = max(max(widths), *(-(-(start + count) // 16) for start, count, _ in spec), 0) + 2
    blocks = draws.permutation(len(spec) * total).astype(np.int32).reshape(len(spec), total)
    blocks += np.int32(first_block)
    if wide:
        whole = np.full((len(spec), total + 5), -7, np.int32)
        whole[:, :total] = blocks
        blocks = whole[:, :total]
    return rows, blocks, block_size


#: Decodes come first, as the runner has sorted them; a prompt's last token may be alone in its
#: step, too.
_STEPS: dict[str, tuple[list[_Spec], int]] = {
    "one decode": ([(6, 1, True)], 4),
    "a prompt of three": ([(0, 3, True)], 4),
    "a decode and a prompt": ([(5, 1, True), (0, 4, True)], 4),
    "two prompts, both with 8 cached tokens": ([(8, 3, True), (8, 5, True)], 4),
    "three decodes, one at the start of a block": (
        [(15, 1, True), (16, 1, True), (3, 1, True)],
        16,
    ),
    "decodes, and a chunk in the middle of a prompt": (
        [(40, 1, True), (2, 1, True), (16, 16, False)],
        16,
    ),
    "a prompt of one token": ([(0, 1, True), (0, 2, True)], 1),
    "a decode, the last of a prompt, two chunks": (
        [(9, 1, True), (12, 1, True), (4, 7, False), (0, 5, True)],
        4,
    ),
    "a chunk alone": ([(32, 20, False)], 16),
    "a chunk of one token": ([(7, 1, False), (9, 1, True), (0, 6, True)], 4),
    "blocks of 5": ([(14, 1, True), (15, 1, True), (10, 11, True), (3, 4, False)], 5),
    "blocks of 48": ([(100, 1, True), (47, 3, True), (0, 97, False)], 48),
    "blocks of 2,048": ([(3000, 1, True), (0, 5, True)], 2048),
    "large block numbers": ([(70, 1, True), (0, 40, True)], 16),
    "a long past": ([(70_000, 1, True), (2**24 + 5, 1, True), (5, 300, True)], 16),
    "300 requests": (
        [(37 * i % 211, 1, i % 5 > 0) for i in range(260)]
        + [(16 * (i % 7), 2 + i % 9, i % 3 > 0) for i in range(40)],
        16,
    ),
    "a table that is part of a wider one": ([(9, 1, True), (2, 9, True)], 4),
    "two requests that say the same": ([(5, 1, True), (5, 1, True), (0, 3, True)], 4),
    "a prompt of 9,000 tokens": ([(31, 1, True), (0, 9000, True)], 16),
}


def _cases() -> dict[str, tuple]:
    special = {
        "large block numbers": {"first_block": 1_500_000_000},
        "a table that is part of a wider one": {"wide": True},
        "two requests that say the same": {"twins": True},
    }
    return {
        name: _step_case(spec, size, seed, **special.get(name, {}))
        for seed, (name, (spec, size)) in enumerate(_STEPS.items())
    }


_COUNTS = ("num_decodes", "max_query_len", "max_seq_len", "max_decode_seq_len")


def _fields(inputs: Any) -> dict[str, Any]:
    """What was made, by field."""
    attention = inputs.attention
    names = ("query_start_loc", "seq_lens", "slot_mapping", "block_table", *_COUNTS)
    found = {name: getattr(inputs, name) for name in ("token_ids", "positions", "logits_indices")}
    return found | {name: getattr(attention, name) for name in names}


_RESTART = (
    "You count positions from 0 in every row. A request that was computed in part before (a decode,"
    " a later chunk, a prompt with cached tokens) goes on at `row.start`; from 0, the model reads"
    " its words in the wrong places, and writes fluent nonsense."
)


_LAST = "`query_start_loc[i + 1] - 1` is the number of row i's last token in the step."

_LOOKED_UP = (
    "Two rows of a step may be equal: two requests with the same text. Yours are then taken for"
    " one: `rows.index(row)` finds the first row that is *equal*. Let `enumerate(rows)` say which"
    " row it is."
)

_ROUNDED = (
    "Large numbers come out rounded: float32 holds integers exactly up to 2²⁴ only. Make them"
    " integers from the beginning, with dtype=torch.int64 or int32."
)


#: field -> mistake's name -> explanation; what somebody who makes it has there, `_wrong_fields`
#: computes.
_FIELD_MISTAKES = {
    "query_start_loc": {
        "no-zero": (
            "Row i lies from query_start_loc[i] to query_start_loc[i + 1]. Yours begins with the"
            " first end: a 0 must come before it, B + 1 numbers in all."
        ),
        "no-end": "The last row's end is missing: B rows need B + 1 numbers.",
        "lengths-not-sums": (
            "These are the lengths of the rows. query_start_loc says where each begins: their"
            " running sum."
        ),
    },
    "seq_lens": {
        "forgets-the-past": (
            "seq_lens are contexts: what is in the cache already (row.start) and the new tokens."
            " With the new tokens alone, a decode sees nobody but itself."
        ),
        "leaves-itself-out": (
            "seq_lens count this step's tokens, too: each token attends to itself. The context is "
            "row.start + len(row.token_ids)."
        ),
        "rounded-numbers": _ROUNDED,
    },
    "positions": {
        "restarts-at-zero": _RESTART,
        "one-long-line": (
            "You number the tokens of the whole step. A position is a token's place in its *own*"
            " request: row.start, row.start + 1, …"
        ),
        "starts-at-one": (
            "All positions are one too high. Positions begin at 0, and row.start is the position of"
            " a row's first new token."
        ),
        "rounded-numbers": _ROUNDED,
    },
    "slot_mapping": {
        "restarts-at-zero": f"{_RESTART} And the new keys would overwrite those of the beginning.",
        "position-as-slot": (
            "These are positions. Where a position is *stored*, the block table says: "
            "block_table[row, position // block_size] * block_size + position % block_size."
        ),
        "block-not-slot": "These are blocks. A slot is block * block_size + offset.",
        "block-size-forgotten": (
            "You add the offset to the block's number. A block holds block_size tokens: "
            "block * block_size + offset."
        ),
        "offset-forgotten": (
            "Every token goes to the first slot of its block. Add position % block_size."
        ),
        "blocks-of-16": (
            "You take blocks of 16 tokens, whatever block_size says. It is an argument: other"
            " engines have other blocks."
        ),
        "int32-overflow": (
            "You compute slots with 32 bits, and large ones come out wrong. A large GPU has more"
            " slots than fit: block_table holds int32, so make each entry a Python `int`, or"
            " int64, before you multiply."
        ),
        "int16-overflow": (
            "You compute slots with 16 bits, and large ones come out wrong. A large GPU has more"
            " slots than fit: block_table holds int32, so make each entry a Python `int`, or"
            " int64, before you multiply."
        ),
        "first-table-for-all": (
            "You look everything up in the first row's blocks. Each request has a table of its own,"
            " and those blocks belong to somebody else."
        ),
        "row-looked-up": _LOOKED_UP,
        "rounded-numbers": _ROUNDED,
    },
    "logits_indices": {
        "every-row-samples": (
            "A chunk that leaves part of its prompt for later has no next token to choose. Only"
            " rows with `row.samples` give a logit row."
        ),
        "one-too-far": f"These are the tokens *behind* each row. {_LAST}",
        "first-token": (
            "These are the rows' first tokens. What comes next, the *last* token of a row knows."
        ),
        "row-numbers": (
            f"These are numbers of rows. The model gives a hidden state for each *token*. {_LAST}"
        ),
        "positions": (
            "These are positions in the requests. logits_indices count the tokens of the step."
            f" {_LAST}"
        ),
        "row-looked-up": _LOOKED_UP,
        "token-0-left-out": (
            "A row whose last token is 0 gives no logit row. 0 is a token id like any other; only"
            " `row.samples` decides."
        ),
    },
    "num_decodes": {
        "all-rows": (
            "num_decodes counts the rows with exactly one new token: they take the decode kernel."
            " You count all rows."
        ),
        "old-rows-only": (
            "A prompt of one token has a row of one token, too. The rows with one token come first,"
            " and num_decodes says how many they are, whatever they are."
        ),
        "sampling-rows-only": (
            "A chunk may be one token long and not sample. num_decodes is about the length alone."
        ),
        "all-with-a-past": (
            "A later chunk of a prompt has a past, too, and more than one token. num_decodes counts"
            " the rows with exactly one new token."
        ),
    },
    "max_query_len": {
        "context": (
            "That is the longest context. max_query_len is the most *new* tokens that a row has."
        ),
        "all-tokens": "That is all tokens of the step. max_query_len is the longest row.",
        "first-row": "That is the first row's length. Rows come in any order: take the maximum.",
        "last-row": "That is the last row's length. Rows come in any order: take the maximum.",
    },
    "max_seq_len": {
        "new-tokens": (
            "That is the longest row. max_seq_len is the longest *context*: past and new tokens."
        ),
        "leaves-itself-out": "The context counts this step's tokens, too.",
        "first-row": "That is the first row's context. Rows come in any order: take the maximum.",
        "last-row": "That is the last row's context. Rows come in any order: take the maximum.",
    },
    "max_decode_seq_len": {
        "all-rows": (
            "Only the rows with one token count here: the decode kernel gets no others. Where there"
            " are none, it is 0."
        ),
        "leaves-itself-out": (
            "The context of a row with one token counts that token, too: row.start + 1."
        ),
        "new-tokens": "That is the number of new tokens. Asked for is the longest *context*.",
        "sampling-rows-only": (
            "Only rows that sample are among yours. A chunk may be one token long and not sample,"
            " and the decode kernel gets it as well."
        ),
        "old-rows-only": (
            "Only rows with a past are among yours. A prompt of one token has one token, too."
        ),
    },
}


def _wrong_fields(
    rows: abc.Sequence[BatchRow], table: np.ndarray, size: int
) -> dict[str, dict[str, Any]]:
    """field -> name of a mistake in `_FIELD_MISTAKES` -> what somebody who makes it has there."""
    import torch

    lens, starts = [len(row.token_ids) for row in rows], [row.start for row in rows]
    ends = [sum(lens[: i + 1]) for i in range(len(rows))]
    contexts = [start + n for start, n in zip(starts, lens, strict=True)]
    local = [
        (i, j) for i, n in enumerate(lens) for j in range(n)
    ]  # (row, number of the token in it)
    places = [(i, starts[i] + j) for i, j in local]
    sampling = [i for i, row in enumerate(rows) if row.samples]

    def ints(values: Iterable[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(list(values), dtype=dtype)

    def small(values: Iterable[int]) -> torch.Tensor:
        return ints(values, torch.int32)

    def rounded(values: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float32).to(dtype)

    def block(i: int, position: int) -> int:
        return int(table[i, min(position // size, table.shape[1] - 1)])

    single = [i for i, n in enumerate(lens) if n == 1]
    return {
        "query_start_loc": {
            "no-zero": small(ends),
            "no-end": small([0, *ends[:-1]]),
            "lengths-not-sums": small([0, *lens]),
        },
        "seq_lens": {
            "forgets-the-past": small(lens),
            "leaves-itself-out": small(starts),
            "rounded-numbers": rounded(contexts, torch.int32),
        },
        "positions": {
            "restarts-at-zero": ints(j for _, j in local),
            "one-long-line": ints(range(len(local))),
            "starts-at-one": ints(p + 1 for _, p in places),
            "rounded-numbers": rounded((p for _, p in places), torch.int64),
        },
        "slot_mapping": {
            "restarts-at-zero": ints(block(i, j) * size + j % size for i, j in local),
            "position-as-slot": ints(p for _, p in places),
            "block-not-slot": ints(block(i, p) for i, p in places),
            "block-size-forgotten": ints(block(i, p) + p % size for i, p in places),
            "offset-forgotten": ints(block(i, p) * size for i, p in places),
            "blocks-of-16": ints(block(i, p * size // 16) * 16 + p % 16 for i, p in places),
            "int32-overflow": ints(
                (block(i, p) * size + p % size + 2**31) % 2**32 - 2**31 for i, p in places
            ),
            "int16-overflow": ints(
                (block(i, p) * size + p % size + 2**15) % 2**16 - 2**15 for i, p in places
            ),
            "first-table-for-all": ints(block(0, p) * size + p % size for _, p in places),
            "row-looked-up": ints(
                block(rows.index(rows[i]), p) * size + p % size for i, p in places
            ),
            "rounded-numbers": rounded(
                (block(i, p) * size + p % size for i, p in places), torch.int64
            ),
        },
        "logits_indices": {
            "every-row-samples": ints(end - 1 for end in ends),
            "one-too-far": ints(ends[i] for i in sampling),
            "first-token": ints(ends[i] - lens[i] for i in sampling),
            "row-numbers": ints(sampling),
            "positions": ints(contexts[i] - 1 for i in sampling),
            "row-looked-up": ints(ends[rows.index(rows[i])] - 1 for i in sampling),
            "token-0-left-out": ints(ends[i] - 1 for i in sampling if rows[i].token_ids[-1]),
        },
        "num_decodes": {
            "all-rows": len(rows),
            "old-rows-only": sum(
                n == 1 and start > 0 for n, start in zip(lens, starts, strict=True)
            ),
            "sampling-rows-only": sum(
                n == 1 and row.samples for n, row in zip(lens, rows, strict=True)
            ),
            "all-with-a-past": sum(start > 0 for start in starts),
        },
        "max_query_len": {
            "context": max(contexts),
            "all-tokens": sum(lens),
            "first-row": lens[0],
            "last-row": lens[-1],
        },
        "max_seq_len": {
            "new-tokens": max(lens),
            "leaves-itself-out": max(starts),
            "first-row": contexts[0],
            "last-row": contexts[-1],
        },
        "max_decode_seq_len": {
            "all-rows": max(contexts),
            "leaves-itself-out": max((starts[i] for i in single), default=0),
            "new-tokens": int(bool(single)),
            "sampling-rows-only": max((contexts[i] for i in single if rows[i].samples), default=0),
            "old-rows-only": max((contexts[i] for i in single if starts[i] > 0), default=0),
        },
    }


_ORDER = (
    *("token_ids", "query_start_loc", "seq_lens", "positions", "slot_mapping", "logits_indices"),
    *(*_COUNTS, "block_table"),
)


def check_build_batch(answer: Callable) -> str:
    from minivllm.engine.batch import build_batch

    cases = _cases()
    # All calls come first: a result must not change when the next one is made.
    made = {name: _made(answer, *case) for name, case in cases.items()}
    got = {name: _fields(inputs) for name, inputs in made.items()}
    right = {name: _fields(build_batch(*case)) for name, case in cases.items()}
    for name, (rows, table, size) in cases.items():
        right[name]["block_table"] = _as_given(got[name]["block_table"], rows, table, size)
    wrong = {name: _wrong_fields(*case) for name, case in cases.items()}
    for field in _ORDER:
        failing = [name for name in cases if not _same(got[name][field], right[name][field])]
        if failing:
            mine, expected, theirs = (
                {n: f.get(field, {}) for n, f in found.items()} for found in (got, right, wrong)
            )
            _expect_own_results(answer, cases, failing, field, right)
            _name_field(field, failing, mine, expected, theirs, cases)
    _expect_plain_counts(got)
    mine = counted(answer)
    line = engine_agrees(mine, build_batch=mine, max_num_batched_tokens=24)
    return f"{len(cases)} steps; {line}"


def _as_given(said: Any, rows: list[BatchRow], table: np.ndarray, size: int) -> torch.Tensor:
    """The table that is right beside this one: columns that no row needs may be left out."""
    import torch

    needed = max(-(-(row.start + len(row.token_ids)) // size) for row in rows)
    width = said.shape[1] if is_tensor(said) and said.ndim == 2 else table.shape[1]
    return torch.tensor(table[:, : max(width, needed)])


def _made(answer: Callable, rows: list[BatchRow], table: np.ndarray, size: int) -> Any:
    """The answer's result, if it is of the right kind and the arguments are as they were."""
    rows_before, table_before = copy.deepcopy(rows), table.copy()
    inputs = answer(rows, table, size)
    expect(
        hasattr(inputs, "attention") and hasattr(inputs, "token_ids"),
        "wrong-type",
        f"build_batch gave {show(inputs)}.\nIt has to give BatchInputs, with AttentionMetadata in"
        " it." + (" Is a `return` missing?" if inputs is None else ""),
    )
    expect(
        (table_before == table).all(),
        "changed-input",
        "Your code changed block_table.\nThe runner keeps using it.",
    )
    expect_unchanged(rows, rows_before, "rows")
    return inputs


def _expect_own_results(
    answer: Callable, cases: dict, failing: list[str], field: str, right: dict
) -> None:
    """A field that is right when it is read at once, and wrong after other calls."""
    first = cases[failing[0]]
    one, other = (copy.deepcopy(_fields(_made(answer, *first))[field]) for _ in range(2))
    expect(
        _same(one, other),
        "keeps-state",
        f"The same call was made twice, and {field} differs: {show(one)}, then {show(other)}.\nYour"
        " code keeps something between calls: a default argument that is a list, a list outside of"
        " the function.",
    )
    alone = all(
        _same(_fields(_made(answer, *cases[name]))[field], right[name][field]) for name in failing
    )
    expect(
        not alone,
        "result-reused",
        f"{field} is right when it is made, and another after later calls: your code uses one"
        " tensor or list again and again.\nMake new ones in each call: a step may still run while"
        " the next is planned.",
    )


def _expect_plain_counts(got: dict[str, dict[str, Any]]) -> None:
    for name, fields in got.items():
        for count in _COUNTS:
            expect(
                isinstance(fields[count], numbers.Integral),
                "wrong-type",
                f"In a step of {name}, {count} is {show(fields[count])}, a"
                f" {type(fields[count]).__name__}.\nThe four counts are plain integers: the engine"
                " plans with them, and a tensor on a GPU would make it wait. Take `int(…)`.",
            )


def _name_field(
    field: str, failing: list[str], got: dict, right: dict, wrong: dict, cases: dict
) -> None:
    """Raise the Mistake about one field. All dicts are by the names of the steps."""
    first = failing[0]
    rows, _, size = cases[first]
    spec = ", ".join(
        f"{len(row.token_ids)} from position {row.start}{'' if row.samples else ' (not sampled)'}"
        for row in rows[:8]
    )
    spec += ", …" * (len(rows) > 8)
    where = (
        f"In a step of {first} (tokens: {spec}; blocks of {size}), {field} is"
        f" {show(got[first], 12)}, expected "
    )
    where += f"{show(right[first], 12)}."
    for names in (cases, failing):  # in all steps; or in these, with another mistake elsewhere
        for mistake, why in _FIELD_MISTAKES.get(field, {}).items():
            if all(_same(got[name], wrong[name][mistake]) for name in names):
                raise Mistake(mistake, f"{where}\n{why}")
    found = difference(got[first], right[first])
    why = {
        "wrong-dtype": (
            "The kernels read memory by its type: int64 for token_ids, positions, slot_mapping and "
            "logits_indices, int32 for the rest."
        ),
        "wrong-type": "The fields are torch tensors and plain integers.",
    }
    some = (
        f"{len(failing)} of {len(cases)} steps differ in this field ({'; '.join(failing[:4])}):"
        f" {found[1]}."
    )
    raise Mistake(found[0], f"{where}\n{why.get(found[0], some)}")


EXERCISE = Exercise(
    id="07.2",
    title="Flatten a mixed batch",
    check=check_build_batch,
    mistakes=(
        Known(
            "restarts-at-zero",
            answers=r"""
# %% positions from 0, whatever is in the cache
@@
-            position = row.start + j
+            position = j

# %% right positions, slots from 0
@@
-                int(block_table[i, position // block_size]) * block_size
-                + position % block_size
+                int(block_table[i, j // block_size]) * block_size + j % block_size
""",
        ),
        Known(
            "every-row-samples",
            answers=r"""
# %% asks every row what comes next
@@
-        if row.samples:
-            logits_indices.append(len(token_ids) - 1)
+        logits_indices.append(len(token_ids) - 1)
""",
        ),
        Known(
            "forgets-the-past",
            answers=r"""
# %% contexts of the new tokens alone
@@
-    contexts = [row.start + len(row.token_ids) for row in rows]
+    contexts = [len(row.token_ids) for row in rows]
""",
        ),
        Known(
            "no-zero",
            answers=r"""
# %% the ends of the rows
@@
-    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
+    token_ids, positions, slots, logits_indices, ends = [], [], [], [], []
""",
        ),
        Known(
            "position-as-slot",
            answers=r"""
# %% no look at the block table
@@
-            slots.append(
-                int(block_table[i, position // block_size]) * block_size
-                + position % block_size
-            )
+            slots.append(position)
""",
        ),
        Known(
            "block-size-forgotten",
            answers=r"""
# %% block + offset
@@
-                int(block_table[i, position // block_size]) * block_size
-                + position % block_size
+                int(block_table[i, position // block_size]) + position % block_size
""",
        ),
        Known(
            "first-table-for-all",
            answers=r"""
# %% the first row's blocks for everybody
@@
-                int(block_table[i, position // block_size]) * block_size
+                int(
+                    block_table[
+                        0, min(position // block_size, block_table.shape[1] - 1)
+                    ]
+                )
+                * block_size
""",
        ),
        Known(
            "one-too-far",
            answers=r"""
# %% the token behind the last
@@
-            logits_indices.append(len(token_ids) - 1)
+            logits_indices.append(len(token_ids))
""",
        ),
        Known(
            "row-numbers",
            answers=r"""
# %% numbers of rows, not of tokens
@@
-            logits_indices.append(len(token_ids) - 1)
+            logits_indices.append(i)
""",
        ),
        Known(
            "all-rows",
            answers=r"""
# %% all rows are decodes
@@
-        num_decodes=len(decodes),
+        num_decodes=len(rows),

# %% the longest context of all
@@
-        max_decode_seq_len=max(decodes, default=0),
+        max_decode_seq_len=max(contexts),
""",
        ),
        Known(
            "old-rows-only",
            answers=r"""
# %% a decode is a row with a past
@@
-        num_decodes=len(decodes),
+        num_decodes=sum(row.start > 0 and len(row.token_ids) == 1 for row in rows),
""",
        ),
        Known(
            "wrong-dtype",
            answers=r"""
# %% everything int64
@@
-        query_start_loc=torch.tensor(ends, dtype=torch.int32),
-        seq_lens=torch.tensor(contexts, dtype=torch.int32),
+        query_start_loc=torch.tensor(ends, dtype=torch.int64),
+        seq_lens=torch.tensor(contexts, dtype=torch.int64),
""",
        ),
        Known(
            "int32-overflow",
            answers=r"""
# %% multiplies in the table's own type
@@
-        slot_mapping=torch.tensor(slots, dtype=torch.int64),
+        slot_mapping=torch.tensor(np.array(slots).astype(np.int32)).long(),
""",
        ),
        Known(
            "blocks-of-16",
            answers=r"""
# %% the usual block size
@@
     token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
+    block_size = 16
""",
        ),
        Known(
            "row-looked-up",
            answers=r"""
# %% looks for its number in the list, for the logits
@@
-        if row.samples:
-            logits_indices.append(len(token_ids) - 1)
     lens = [len(row.token_ids) for row in rows]
+    logits_indices = [ends[rows.index(row) + 1] - 1 for row in rows if row.samples]

# %% looks for its number in the list, for the blocks
@@
-                int(block_table[i, position // block_size]) * block_size
+                int(block_table[rows.index(row), position // block_size]) * block_size
""",
        ),
        Known(
            "token-0-left-out",
            answers=r"""
# %% whether there is a token
@@
-        if row.samples:
+        if row.samples and row.token_ids[-1]:
""",
        ),
        Known(
            "rounded-numbers",
            answers=r"""
# %% positions by way of float32
@@
-    token_ids, positions, logits_indices = numbers
+    token_ids, _, logits_indices = numbers
+    positions = torch.tensor(positions, dtype=torch.float32).long()
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% a default argument that grows
@@
-    rows: list[BatchRow], block_table: np.ndarray, block_size: int
-) -> BatchInputs:
+    rows: list[BatchRow], block_table: np.ndarray, block_size: int, slots: list = []
+) -> BatchInputs:
@@
-    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
+    token_ids, positions, logits_indices, ends = [], [], [], [0]
""",
        ),
        Known(
            "last-row",
            answers=r"""
# %% the last row is taken for the longest
@@
-        max_query_len=max(lens),
+        max_query_len=lens[-1],
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% a count as a tensor
@@
-        max_query_len=max(lens),
+        max_query_len=torch.tensor(lens).max(),
""",
        ),
        Known(
            "new-tokens",
            answers=r"""
# %% the longest row for the longest context
@@
-        max_seq_len=max(contexts),
+        max_seq_len=max(lens),
""",
        ),
        Known(
            "wrong-shape",
            answers=r"""
# %% takes a long row for a chunk
@@
-        if row.samples:
+        if row.samples and len(row.token_ids) < 4096:
""",
        ),
    ),
    right=r"""
# %% with torch's own repeat_interleave
def build_batch(
    rows: list[BatchRow], block_table: np.ndarray, block_size: int
) -> BatchInputs:
    table = torch.tensor(block_table)
    lens = torch.tensor([len(row.token_ids) for row in rows])
    starts = torch.tensor([row.start for row in rows])
    edges = torch.cat((torch.zeros(1, dtype=torch.int64), lens.cumsum(0)))
    owner = torch.arange(len(rows)).repeat_interleave(lens)
    positions = torch.arange(int(edges[-1])) - edges[owner] + starts[owner]
    slots = (
        table[owner, positions // block_size].long() * block_size
        + positions % block_size
    )
    contexts, single = starts + lens, lens == 1
    attention = AttentionMetadata(
        edges.int(),
        contexts.int(),
        table,
        slots,
        int(single.sum()),
        int(lens.max()),
        int(contexts.max()),
        int(contexts[single].max()) if single.any() else 0,
    )
    token_ids = torch.tensor([token for row in rows for token in row.token_ids])
    samples = torch.tensor([row.samples for row in rows])
    return BatchInputs(token_ids, positions, attention, (edges[1:] - 1)[samples])
""",
)
