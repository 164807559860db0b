"""Chapter 07, the engine: the checks of its exercises, and what two of them are given."""

from __future__ import annotations

import functools
import math
from collections import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.checking import (
    Mistake,
    counted,
    diagnose,
    difference,
    engine_agrees,
    exercise,
    expect,
    seeded,
    show,
)
from minivllm.course.sim.requests import RequestMaker, in_chat

if TYPE_CHECKING:
    import numpy as np
    import torch

    from minivllm.engine.batch import BatchRow
    from minivllm.engine.engine_core import StepOutput
    from minivllm.engine.sequence import ScheduledBatch, Sequence
    from minivllm.llm import LLM
    from minivllm.outputs import RequestOutput
    from minivllm.sampling_params import SamplingParams
    from minivllm.tokenizer import Tokenizer

INF = math.inf


# --- what exercises are given ---------------------------------------------------------------------


def _same(one: Any, other: Any) -> bool:
    return difference(one, other) is None


# --- 07.1 -----------------------------------------------------------------------------------------

#: Names of wrong numbers -> (the number, what it means).
Known = dict[str, tuple[Any, str]]


@exercise("07.1", "Predict: one step, seven numbers")
def check_predictions(
    query_start_loc: list[int],
    slot: int,
    num_sampled: int,
    token: int,
    kept: int,
    kept_cold: int,
    tpot: float,
) -> str:
    import numpy as np
    import torch

    from minivllm.engine.batch import BatchRow, build_batch
    from minivllm.kernels.sampling import filter_logits
    from minivllm.outputs import RequestMetrics

    rows = [
        BatchRow([1], 9, True),
        BatchRow([1], 4, True),
        BatchRow([1] * 6, 8, False),
        BatchRow([1] * 3, 0, True),
    ]
    table = np.array([[1, 3, 4, 0], [6, 8, 0, 0], [7, 2, 5, 9], [10, 0, 0, 0]], np.int32)
    step = build_batch(rows, table, block_size=4)

    right = step.attention.query_start_loc.tolist()
    got = query_start_loc.tolist() if hasattr(query_start_loc, "tolist") else list(query_start_loc)
    _expect_number(
        "query_start_loc",
        got,
        right,
        {
            "no-zero": (
                [1, 2, 8, 11],
                "These are the ends. The first request has a beginning, too: 0 comes first.",
            ),
            "no-end": (
                [0, 1, 2, 8],
                (
                    "These are the beginnings. The last request has an end, too: so many tokens in"
                    " all."
                ),
            ),
            "lengths-not-sums": (
                [1, 1, 6, 3],
                (
                    "These are how many tokens each request has. Asked for is where each "
                    "begins: add them up."
                ),
            ),
            "counts-requests": (
                [0, 1, 2, 3, 4],
                "That is a token for each request. C has six in this step, and D three.",
            ),
            "whole-contexts": (
                [0, 10, 15, 29, 32],
                "You count what is in the cache, too. A step computes only the new tokens.",
            ),
        },
    )

    _expect_number(
        "slot",
        slot,
        step.attention.slot_mapping[7].item(),
        {
            "restarted": (
                2 * 4 + 1,
                (
                    "You count C's positions from 0 within this step. Eight tokens came before: its"
                    " sixth new token has position 13."
                ),
            ),
            "position": (
                13,
                (
                    "That is its position. Where it is *stored* says the block table: position 13"
                    " is in the fourth block that C has, which is block 9 of the cache."
                ),
            ),
            "one-too-far": (
                9 * 4 + 2,
                (
                    "That is the slot of position 14. The first of C's six tokens has position 8,"
                    " so the last has 13."
                ),
            ),
            "block": (9, "That is the block. A slot says where in the cache: block · 4 + offset."),
            "wrong-entry": (
                5 * 4 + 1,
                "Block 5 is the third of C's blocks and holds positions 8 to 11.",
            ),
        },
    )

    _expect_number(
        "num_sampled",
        num_sampled,
        len(step.logits_indices),
        {
            "half-a-prompt": (
                4,
                (
                    "C's prompt is not whole yet: what follows its token 13 is known, it is token"
                    " 14. Nothing is to be sampled."
                ),
            ),
            "decodes-only": (
                2,
                (
                    "D's prompt is whole after this step. Its last token says what comes next: that"
                    " is the first token of the answer."
                ),
            ),
            "every-token": (
                11,
                (
                    "The model gives a hidden state for each of the 11 tokens, and most are never"
                    " asked what comes next: in a prompt that is known."
                ),
            ),
        },
    )

    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1])
    right_token = int((probabilities.cumsum(0) <= 0.75).sum())
    _expect_number(
        "token",
        token,
        right_token,
        {
            "greedy": (
                0,
                (
                    "That is the likeliest token. u = 0.75 lies beyond the first half of the ruler,"
                    " which is its part."
                ),
            ),
            "one-too-low": (
                1,
                "Tokens 0 and 1 together take the ruler from 0 to 0.7, and 0.75 lies beyond.",
            ),
            "one-too-high": (
                3,
                (
                    "Tokens 0, 1 and 2 together reach 0.9, and 0.75 lies below: it is in the part"
                    " of token 2."
                ),
            ),
        },
    )

    def kept_at(temperature: float) -> int:
        only_p = (torch.tensor([temperature]), None, torch.tensor([0.6]), None)
        return int(filter_logits(probabilities.log()[None], *only_p).isfinite().sum())

    _expect_number(
        "kept",
        kept,
        kept_at(1.0),
        {
            "stops-short": (
                1,
                (
                    "One token has 0.5, which does not *reach* 0.6. Top-p keeps the fewest that do,"
                    " so it takes the next one as well."
                ),
            ),
            "one-too-many": (3, "Two tokens have 0.5 + 0.2 = 0.7, and that reaches 0.6 already."),
        },
    )
    _expect_number(
        "kept_cold",
        kept_cold,
        kept_at(0.5),
        {
            "top-p-first": (
                2,
                (
                    "At temperature 0.5 the probabilities are squared and made to add up to 1"
                    " again: 0.25, 0.04, 0.04, 0.01 become 0.74, 0.12, 0.12, 0.03. The temperature"
                    " comes first, so top-p sees *these*."
                ),
            ),
            "one-too-many": (
                3,
                (
                    "At temperature 0.5 the distribution is sharper, so fewer tokens reach 0.6, not"
                    " more."
                ),
            ),
        },
    )

    metrics = RequestMetrics(
        0.0, first_token_time=50.0, finished_time=100.0, num_generation_tokens=4
    )
    _expect_number(
        "tpot",
        tpot,
        metrics.time_per_output_token,
        {
            "counts-the-first-wait": (
                25.0,
                (
                    "That is 100 ms / 4 tokens: the wait for the first token is in it. That wait "
                    "is the TTFT, and has a number of its own."
                ),
            ),
            "divides-by-tokens": (
                12.5,
                "50 ms is right, but between four tokens there are three gaps.",
            ),
            "median": (
                10.0,
                "That is the gap in the middle. TPOT is their mean, and the last gap was long.",
            ),
            "in-seconds": (metrics.time_per_output_token / 1000, "Asked for are milliseconds."),
            "ttft": (
                50.0,
                "That is the time to the first token, TTFT. TPOT is about the tokens after it.",
            ),
        },
        "The mean of the gaps between tokens, in milliseconds: from the first token to the last, by"
        " their number.",
    )
    return "seven predictions; the package's own functions say the same"


def _expect_number(
    name: str,
    value: Any,
    right: Any,
    known: Known,
    advice: str = "Go through the step token by token.",
) -> None:
    """Raise a Mistake unless value is right; one of the known wrong ones gives it its name, for
    others there is advice.
    """
    near = (
        isinstance(right, float)
        and isinstance(value, int | float)
        and abs(value - right) <= 0.01 * right
    )
    if value == right or near:
        return
    shown = f"{name} = {show(value)}: "
    for mistake, (wrong, why) in known.items():
        same = (
            abs(value - wrong) <= 0.01 * wrong
            if isinstance(right, float) and isinstance(value, int | float)
            else False
        )
        if value == wrong or same:
            raise Mistake(mistake, f"{shown}not what the package counts.\n{why}")
    raise Mistake("wrong-values", f"{shown}the package counts {show(right)}.\n{advice}")


# --- 07.2 -----------------------------------------------------------------------------------------


def _step_case(spec: list[tuple[int, int, bool]], block_size: int, seed: int) -> tuple:
    """(rows, block_table, block_size). spec: (start, number of tokens, samples) of each row."""
    import numpy as np

    from minivllm.engine.batch import BatchRow

    draws = np.random.default_rng(seed)
    rows = [
        BatchRow(draws.integers(0, 2048, count).tolist(), start, samples)
        for start, count, samples in spec
    ]
    widths = [-(-(start + count) // block_size) for start, count, _ in spec]
    # a row of the runner's table is as wide as the longest sequence could need
    total = max(widths) + 2
    blocks = draws.permutation(len(spec) * total).astype(np.int32)
    return rows, blocks.reshape(len(spec), total) + 1, block_size


#: Decodes come first, as the runner has sorted them; a prompt's last token may be alone in its
#: step, too.
_STEPS = {
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
}


def _fields(inputs: Any, rows: abc.Sequence[BatchRow], block_size: int) -> dict[str, Any]:
    """What was made, by field; of the block table only what is needed, for the rest is
    arbitrary.
    """
    attention = inputs.attention
    names = (
        "query_start_loc",
        "seq_lens",
        "slot_mapping",
        "num_decodes",
        "max_query_len",
        "max_seq_len",
        "max_decode_seq_len",
    )
    found = {name: getattr(inputs, name) for name in ("token_ids", "positions", "logits_indices")}
    found |= {name: getattr(attention, name) for name in names}
    table = attention.block_table
    needed = [-(-(row.start + len(row.token_ids)) // block_size) for row in rows]
    expect(
        hasattr(table, "shape")
        and table.ndim == 2
        and len(table) == len(rows)
        and table.shape[1] >= max(needed),
        "wrong-block-table",
        f"attention.block_table is {show(table)}; for {len(rows)} requests it has to be a tensor"
        f" [{len(rows)}, at least {max(needed)}].\nIt is the one you were given, as a tensor:"
        " torch.from_numpy(block_table).",
    )
    found["block_table"] = [table[i, :n].tolist() for i, n in enumerate(needed)]
    found["block_table's dtype"] = str(table.dtype)
    return found


_RESTART = (
    "You count positions from 0 in every row. A request that was computed in part before (a decode,"
    " a later chunk, a prompt with cached tokens) goes on at `row.start`; from 0, the model reads"
    " its words in the wrong places, and writes fluent nonsense."
)
_LAST = "`query_start_loc[i + 1] - 1` is the number of row i's last token in the step."
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
        "first-table-for-all": (
            "You look everything up in the first row's blocks. Each request has a table of its own,"
            " and those blocks belong to somebody else."
        ),
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
    },
    "max_seq_len": {
        "new-tokens": (
            "That is the longest row. max_seq_len is the longest *context*: past and new tokens."
        ),
        "leaves-itself-out": "The context counts this step's tokens, too.",
    },
    "max_decode_seq_len": {
        "all-rows": (
            "Only the rows with one token count here: the decode kernel gets no others. Where there"
            " are none, it is 0."
        )
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

    def block(i: int, position: int) -> int:
        return int(table[i, min(position // size, table.shape[1] - 1)])

    return {
        "query_start_loc": {
            "no-zero": small(ends),
            "no-end": small([0, *ends[:-1]]),
            "lengths-not-sums": small([0, *lens]),
        },
        "seq_lens": {"forgets-the-past": small(lens), "leaves-itself-out": small(starts)},
        "positions": {
            "restarts-at-zero": ints(j for _, j in local),
            "one-long-line": ints(range(len(local))),
            "starts-at-one": ints(p + 1 for _, p in places),
        },
        "slot_mapping": {
            "restarts-at-zero": ints(block(i, j) * size + j % size for i, j in local),
            "position-as-slot": ints(p for _, p in places),
            "block-not-slot": ints(block(i, p) for i, p in places),
            "block-size-forgotten": ints(block(i, p) + p % size for i, p in places),
            "offset-forgotten": ints(block(i, p) * size for i, p in places),
            "first-table-for-all": ints(block(0, p) * size + p % size for _, p in places),
        },
        "logits_indices": {
            "every-row-samples": ints(end - 1 for end in ends),
            "one-too-far": ints(ends[i] for i in sampling),
            "first-token": ints(ends[i] - lens[i] for i in sampling),
            "row-numbers": ints(sampling),
            "positions": ints(contexts[i] - 1 for i in sampling),
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
        "max_query_len": {"context": max(contexts), "all-tokens": sum(lens)},
        "max_seq_len": {"new-tokens": max(lens), "leaves-itself-out": max(starts)},
        "max_decode_seq_len": {"all-rows": max(contexts)},
    }


@exercise("07.2", "Flatten a mixed batch")
def check_build_batch(answer: Callable) -> str:
    from minivllm.engine.batch import build_batch

    cases = {
        name: _step_case(spec, size, seed)
        for seed, (name, (spec, size)) in enumerate(_STEPS.items())
    }
    got: dict[str, dict[str, Any]] = {}
    for name, (rows, table, size) in cases.items():
        before = table.copy()
        inputs = answer(rows, table, size)
        expect(
            hasattr(inputs, "attention") and hasattr(inputs, "token_ids"),
            "wrong-type",
            f"build_batch gave {show(inputs)}.\nIt has to give BatchInputs, with AttentionMetadata"
            " in it." + (" Is a `return` missing?" if inputs is None else ""),
        )
        expect(
            (before == table).all(),
            "changed-input",
            "Your code changed block_table.\nThe runner keeps using it.",
        )
        got[name] = _fields(inputs, rows, size)
    right = {name: _fields(build_batch(*case), case[0], case[2]) for name, case in cases.items()}
    wrong = {name: _wrong_fields(*case) for name, case in cases.items()}
    order = (
        "token_ids",
        "query_start_loc",
        "seq_lens",
        "positions",
        "slot_mapping",
        "logits_indices",
        "num_decodes",
        "max_query_len",
        "max_seq_len",
        "max_decode_seq_len",
        "block_table",
        "block_table's dtype",
    )
    for field in order:
        failing = [name for name in cases if not _same(got[name][field], right[name][field])]
        if failing:
            mine, expected, theirs = (
                {n: f.get(field, {}) for n, f in found.items()} for found in (got, right, wrong)
            )
            _name_field(field, failing, mine, expected, theirs, cases)
    mine = counted(answer)
    line = engine_agrees(mine, build_batch=mine, max_num_batched_tokens=24)
    return f"{len(cases)} steps; {line}"


def _name_field(
    field: str, failing: list[str], got: dict, right: dict, wrong: dict, cases: dict
) -> None:
    """Raise the Mistake about one field. All dicts are by the names of the steps."""
    first = failing[0]
    rows, _, size = cases[first]
    spec = ", ".join(
        f"{len(row.token_ids)} from position {row.start}{'' if row.samples else ' (not sampled)'}"
        for row in rows
    )
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
    some = f"{len(failing)} of {len(cases)} steps differ in this field."
    raise Mistake(found[0], f"{where}\n{why.get(found[0], some)}")


# --- 07.3 -----------------------------------------------------------------------------------------


class _Answer:
    """`Answer` as it should be, or with mistakes, words such as "length last"."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int, mistakes: str = "") -> None:
        self.token_ids, self.num_prompt_tokens = list(prompt), len(prompt)
        self.max_tokens, self.eos, self.mistakes = max_tokens, eos, mistakes.split()
        self.num_tokens, self.last_token, self.num_computed = len(prompt), prompt[-1], 0

    def to_compute(self) -> tuple[list[int], int]:
        if "all" in self.mistakes:
            return list(self.token_ids), 0
        if self.num_computed == 0:
            if "repeat" in self.mistakes and len(self.token_ids) > self.num_prompt_tokens:
                return self.token_ids[:-1], 0
            return (
                self.token_ids[: self.num_prompt_tokens]
                if "preempt" in self.mistakes
                else list(self.token_ids)
            ), 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        if "length" not in self.mistakes:
            self.num_tokens += 1
        if "last" not in self.mistakes:
            self.last_token = token

    def preempt(self) -> None:
        self.num_computed = 0
        if "begin" in self.mistakes:
            del self.token_ids[self.num_prompt_tokens :]
            self.num_tokens, self.last_token = len(self.token_ids), self.token_ids[-1]

    @property
    def finished(self) -> bool:
        shift = ("late" in self.mistakes) - ("early" in self.mistakes)
        full = self.num_tokens - self.num_prompt_tokens >= self.max_tokens + shift
        return full or ("eos" not in self.mistakes and self.last_token == self.eos)


#: Steps after which a conversation counts as endless.
_ENDLESS = 60


def _converse(
    answer_cls: Callable,
    prompt: list[int],
    max_tokens: int,
    eos: int,
    eos_at: int,
    preempted: list[int],
) -> dict:
    """Serve one answer with a model that says what depends on all it has in its cache, each word in
    its place.

    eos_at: how long the context is after which it ends; preempted: the steps after which the blocks
    are taken away.
    """
    answer, cache, steps = answer_cls(list(prompt), max_tokens, eos), {}, []
    while not answer.finished and len(steps) < _ENDLESS:
        tokens, start = answer.to_compute()
        tokens = [int(token) for token in tokens]
        steps.append((len(tokens), int(start)))
        if not tokens:
            break
        cache.update(enumerate(tokens, start=start))
        seen = [(position, cache.get(position, -7)) for position in range(start + len(tokens))]
        chosen = 10 + sum((p + 3) * (token + 5) for p, token in seen) % 83
        answer.append(eos if len(seen) == eos_at else chosen)
        if len(steps) in preempted:
            cache.clear()
            answer.preempt()
    return {
        "tokens": list(answer.token_ids)[len(prompt) :],
        "endless": len(steps) == _ENDLESS,
        "steps": steps,
    }


@exercise("07.3", "Debug this: the answer that never ends")
def check_answer(answer: Callable) -> str:
    prompts = [[5, 6, 7], [9], list(range(20, 36))]
    cases = [
        (prompt, max_tokens, 1, len(prompt) + (3 if short else 99), preempted)
        for prompt in prompts
        for max_tokens, short, preempted in (
            (1, False, []),
            (6, False, []),
            (12, True, []),
            (8, False, [4]),
            (8, False, [1]),
            (9, True, [2]),
            (9, False, [2, 5]),
        )
    ]
    preempt = (
        "After a preemption `to_compute` asks for the prompt alone. But the tokens that were"
        " written since are lost from the cache as well: everything in token_ids has to be computed"
        " again, and only then comes something new."
    )
    suspects = {
        "not-mended": (
            (
                "Both complaints stand. `append` keeps the token and nothing else: `num_tokens`"
                " and `last_token` still say what they said after the prompt, so the same token is"
                f" computed for ever. {preempt}"
            ),
            "length last preempt",
        ),
        "same-token-again": (
            (
                "The length grows now, but `last_token` does not move: the model gets the prompt's"
                " last token at every step."
            ),
            "last",
            "last preempt",
        ),
        "never-ends": (
            (
                "The right token is computed now, but `num_tokens` does not grow: it always goes to"
                " the same position, and max_tokens is never reached."
            ),
            "length",
            "length preempt",
        ),
        "loses-what-it-said": (f"The endless answers are mended. {preempt}", "preempt"),
        "begins-again": (
            (
                "A preemption throws the written tokens away, and the answer starts anew; with"
                " other random numbers it would be another one, and somebody may have read the"
                " first. A preempted request keeps its tokens and loses only their keys and values."
            ),
            "begin",
        ),
        "repeats-the-last-token": (
            (
                "After a preemption you compute all tokens but the last. The step then samples the"
                " token that is there already, and the text has it twice. Compute the last one,"
                " too."
            ),
            "repeat",
        ),
        "computes-everything-again": (
            (
                "The text is right, at a price: every step computes the whole text. What the cache"
                " has, need not be computed; after the first step one token a step is enough."
            ),
            "all",
            "all last",
            "all length",
        ),
        "one-too-many": ("Answers get one token more than max_tokens.", "late"),
        "one-too-few": ("Answers end one token before max_tokens.", "early"),
        "end-not-seen": ("The end-of-sequence token does not end the answer.", "eos"),
    }

    def talk(cls: Callable) -> Callable:
        def conversation(prompt, max_tokens, eos, eos_at, preempted_after) -> dict:
            return _converse(cls, prompt, max_tokens, eos, eos_at, preempted_after)

        return conversation

    named = {
        f"{name} {i}": (why, talk(partial(_Answer, mistakes=mistakes)))
        for name, (why, *variants) in suspects.items()
        for i, mistakes in enumerate(variants)
    }
    try:
        number = diagnose(talk(answer), cases, talk(_Answer), named)
    except Mistake as mistake:
        raise Mistake(mistake.name.split()[0], mistake.message) from mistake.__cause__
    return (
        f"{number} answers, short, long and preempted: the right tokens at the right positions,"
        " none twice"
    )


# --- 07.4 -----------------------------------------------------------------------------------------


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


@exercise("07.4", "Choose a token")
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


# --- 07.5 -----------------------------------------------------------------------------------------


class _Stream:
    """`TextStream`, right by default, and wrong in the ways that mistakes name."""

    def __init__(self, decode: Callable, stops: abc.Sequence[str] = (), mistakes: str = "") -> None:
        self.decode, self.stops, self.mistakes = decode, list(stops), mistakes.split()
        self.token_ids: list[int] = []
        self.text = self.shown = ""
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        if "alone" in self.mistakes:
            self.text += self.decode([token_id])
        else:
            self.text = self.decode(self.token_ids)
        return self._show(last=False)

    def finish(self) -> str:
        return "" if "lost-end" in self.mistakes else self._show(last=True)

    def _show(self, last: bool) -> str:
        if self.stopped is not None and "goes-on" not in self.mistakes:
            return ""
        text, begin = self.text, len(self.shown) if "across" in self.mistakes else 0
        found = [
            (text.find(s, begin), i, s)
            for i, s in enumerate(self.stops)
            if text.find(s, begin) >= 0
        ]
        if found and self.stopped is None:
            key = (lambda f: f[1]) if "list-order" in self.mistakes else (lambda f: f[0])
            position, _, self.stopped = min(found, key=key)
            end = position + (len(self.stopped) if "shows-stop" in self.mistakes else 0)
            if "whole-text" in self.mistakes:
                end = len(text)
        elif last:
            end = len(text.rstrip("\ufffd")) if "drops-broken" in self.mistakes else len(text)
        else:
            if "half" not in self.mistakes:
                text = text.rstrip("\ufffd")
            held = max(
                (k for s in self.stops for k in range(1, len(s)) if text.endswith(s[:k])), default=0
            )
            if "no-hold" in self.mistakes:
                held = 0
            if "hold-all" in self.mistakes:
                held = max((len(s) - 1 for s in self.stops), default=0)
            if "hold-one" in self.mistakes:
                held = max((1 for s in self.stops if text.endswith(s[0])), default=0)
            if "word" in self.mistakes and not self.stops:
                held = len(text) - (text.rfind(" ") + 1)
            end = max(len(text) - held, len(self.shown))
        new = text[len(self.shown) : max(end, len(self.shown))]
        self.shown += new
        return new


_STREAM_MISTAKES = {
    "tokens-decoded-alone": (
        (
            "You decode each token by itself. A character may be spread over several tokens, and"
            " the pieces of é or 🦊 are no characters; a space may depend on what stands"
            " before.\nDecode the tokens *together*, and show what is new."
        ),
        "alone",
        "alone half",
        "alone no-hold",
        "alone half no-hold",
    ),
    "half-characters": (
        (
            "You show a character before all of its bytes are there: the reader sees �, and nothing"
            " can take it back.\nWhile the text ends in �, hold that end back: the next token may"
            " complete it."
        ),
        "half",
        "half no-hold",
    ),
    "stop-in-one-piece-only": (
        (
            "You look for the stop string in the new text alone. It may begin in one token and end"
            " in the next.\nLook in the whole text, or at least from so far back as a stop string"
            " is long."
        ),
        "across",
        "across no-hold",
    ),
    "shows-the-stop": (
        "The stop string itself is shown. The text ends *before* it.",
        "shows-stop",
        "shows-stop no-hold",
        "whole-text",
        "whole-text no-hold",
    ),
    "shows-half-a-stop": (
        (
            "You show the beginning of a stop string before you know whether the rest follows; when"
            " it does, the reader has seen what they should not.\nHold the text's end back as long"
            " as it is the beginning of a stop string."
        ),
        "no-hold",
        "no-hold drops-broken",
    ),
    "holds-one-character": (
        (
            "You hold back one character that could begin a stop string. But of “END” two may have"
            " come: hold back all that could be a beginning, “E” as well as “EN”."
        ),
        "hold-one",
    ),
    "holds-too-much": (
        (
            "You always hold back as many characters as the longest stop string has, less one. The"
            " reader lags behind by that much, for nothing.\nHold back only an end that *is* the"
            " beginning of a stop string."
        ),
        "hold-all",
    ),
    "waits-for-a-space": (
        (
            "You show whole words only. The reader could have had the letters that are there; and"
            " some languages have no spaces."
        ),
        "word",
    ),
    "loses-the-end": (
        (
            "`finish` shows nothing. What was held back, because it could have become a stop"
            " string, did not: it belongs to the text."
        ),
        "lost-end",
    ),
    "drops-broken-bytes": (
        (
            "`finish` drops a � at the end. No more tokens will come, so the bytes stay broken; but"
            " they were written, and decoding all tokens at once shows them, too."
        ),
        "drops-broken",
    ),
    "first-in-the-list": (
        (
            "Where two stop strings are in the text, you take the one that comes first in the list."
            " The one that comes first in the *text* ends it."
        ),
        "list-order",
    ),
    "goes-on-after-the-stop": (
        (
            "After a stop string more text is shown.\nOnce `stopped` is set, `append` and `finish`"
            " return nothing."
        ),
        "goes-on",
    ),
}


@functools.cache
def _tokenizer() -> Tokenizer:
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.tokenizer import Tokenizer as Bundled

    return Bundled(BUNDLED_MODEL_PATH)


#: A tokenizer as Llama's: ▁ stands for a space, and the one at the beginning of a text is dropped.
_PIECES = ("▁Once", "▁upon", "▁a", "▁time", ",", "▁END", "s", "▁", "E", "N", "D", "N")


def _decode_pieces(token_ids: abc.Sequence[int]) -> str:
    return "".join(_PIECES[token] for token in token_ids).replace("▁", " ").removeprefix(" ")


def _stream_cases() -> list[tuple]:
    encode = _tokenizer().encode
    lines = ["Zoë owns a café. Crème brûlée!", "🦊🦉 and a 🌙", "plain words"]
    cases = [("bundled", encode(text), ()) for text in lines]
    cases += [
        ("bundled", encode("🦊🦉 at night")[:6], ()),
        ("bundled", encode("a 🌙")[:-1], (" a", "🌙")),
    ]
    cases += [
        ("pieces", [0, 1, 2, 3, 4, 7, 1], ()),
        ("pieces", [0, 1, 5, 6], ("upon",)),
        ("pieces", [0, 8, 9, 10, 1], ("END",)),
        ("pieces", [0, 8, 9, 8, 9, 6, 2], ("END",)),
        ("pieces", [0, 8, 9], ("END", "xyz")),
        ("pieces", [0, 8, 8, 9, 9, 10, 2, 3], ("END",)),
        ("pieces", [0, 1, 2, 3, 4, 1], ("time", "on a")),
        ("pieces", [0, 1, 2], ("on", "upon")),
        ("pieces", [2, 3, 4, 1, 2, 3, 4, 2], (", upon a time,", "zzzz")),
        ("bundled", encode("One fish, two fish. The end. More."), (". The", "fish, t", "nowhere")),
        ("bundled", encode("The café is open.\n\nUser: hello"), ("\n\nUser:", "é is not")),
        ("bundled", encode("A: yes\nB: no"), ("\n",)),
    ]
    return cases


def _stream_run(cls: Callable) -> Callable:
    decoders = {"bundled": lambda ids: _tokenizer().decode(list(ids)), "pieces": _decode_pieces}

    def follow(tokenizer: str, token_ids: list[int], stops: tuple[str, ...]) -> dict:
        stream = cls(decoders[tokenizer], stops)
        shown = [
            stream.append(token) for token in token_ids
        ]  # the engine would stop; whoever streams late may not
        return {"shown": shown, "finish": stream.finish(), "stopped": stream.stopped}

    return follow


@exercise("07.5", "Text while it comes")
def check_stream(answer: Callable) -> str:
    named = {
        f"{name} {i}": (why, _stream_run(partial(_Stream, mistakes=mistakes)))
        for name, (why, *variants) in _STREAM_MISTAKES.items()
        for i, mistakes in enumerate(variants)
    }
    cases = _stream_cases()
    try:
        number = diagnose(_stream_run(answer), cases, _stream_run(_Stream), named)
    except Mistake as mistake:
        name, message = mistake.name.split()[0], mistake.message
        if name in ("wrong-values", "wrong-type"):
            message = f"{message}\n{_first_wrong_piece(answer, cases)}"
        raise Mistake(name, message) from mistake.__cause__
    return (
        f"{number} texts, piece by piece; no half character, no part of a stop string, and nothing"
        " late"
    )


def _first_wrong_piece(answer: Callable, cases: list[tuple]) -> str:
    for case in cases:
        mine, right = _stream_run(answer)(*case), _stream_run(_Stream)(*case)
        for i, (one, other) in enumerate(zip(mine["shown"], right["shown"], strict=True)):
            if one != other:
                return (
                    f"After {i + 1} tokens `append` returns {one!r}, expected {other!r}; stops are"
                    f" {case[2]}."
                )
        for key in ("finish", "stopped"):
            if mine[key] != right[key]:
                return f"`{key}` gives {mine[key]!r}, expected {right[key]!r}; stops are {case[2]}."
    return ""


# --- 07.6 -----------------------------------------------------------------------------------------

#: More steps of the core than any run here needs.
_MOST_STEPS = 600
#: A small pool: its blocks are zeroed for each engine of the check.
_ROOM = {"num_kv_blocks": 64, "max_model_len": 512}


class _TooManySteps(Exception):
    pass


@dataclass(frozen=True)
class _Asked:
    """A question to be put into the chat template, and what it asks of `SamplingParams` besides."""

    question: str
    wishes: tuple[tuple[str, Any], ...] = ()

    @property
    def prompt(self) -> list[int]:
        return list(_chat_ids(self.question))

    @property
    def params(self) -> SamplingParams:
        from minivllm.sampling_params import SamplingParams

        return SamplingParams(**{"temperature": 0.0, "max_tokens": 24} | dict(self.wishes))


def _ask(question: str, **wishes: Any) -> _Asked:
    return _Asked(question, tuple(wishes.items()))


class _Rig:
    """The three parts of an engine, with a core under observation."""

    def __init__(self, **options: Any) -> None:
        from minivllm import LLM
        from minivllm.engine.output_processor import OutputProcessor

        self.llm = LLM(device="cpu", **_ROOM | options)
        self.core: Any = self.llm.llm_engine.core
        self.inputs, self.outputs = self.llm.llm_engine.input_processor, OutputProcessor()
        self.num_steps = 0
        #: What the core was given, in that order.
        self.sequences: list[Sequence] = []
        self.most_at_once = 0  # sequences that got tokens in one step
        self.served: set[str] = set()  # requests that got tokens in the last step
        self._step, self._add = self.core.step, self.core.add
        self.core.step, self.core.add = self.step, self.add

    def step(self) -> StepOutput:
        self.num_steps += 1
        if self.num_steps > _MOST_STEPS:
            raise _TooManySteps
        step = self._step()
        seq_ids = [output.seq_id for output in step.outputs]
        self.most_at_once = max(self.most_at_once, len(seq_ids))
        try:
            self.served = {self.outputs.owner_of(seq_id).request_id for seq_id in seq_ids}
        except KeyError as error:
            raise Mistake(
                "computes-past-the-stop",
                f"The core gave tokens to sequence {error.args[0]}, of which `outputs` knows"
                " nothing any more: for its reader the request has ended.\nWhoever ends a request"
                " outside of the core, by a stop string or an abort, tells the core, too, with"
                " `core.finish`.",
            ) from error
        return step

    def add(self, seq: Sequence) -> None:
        self.sequences.append(seq)
        self._add(seq)

    def engine(self, cls: Callable) -> Any:
        new_request = RequestMaker(self.llm.get_tokenizer())
        return cls(self.inputs, self.core, self.outputs, new_request)

    @property
    def left_over(self) -> list[Sequence]:
        """What the core has not finished."""
        return [*self.core.scheduler.running, *self.core.scheduler.waiting]

    def run(self, engine: Any, asked: list[_Asked]) -> list[RequestOutput]:
        """engine.run, and an endless loop is a Mistake; so is what it returns, if it is no outputs
        to their end.
        """
        from minivllm.outputs import RequestOutput

        try:
            outputs = engine.run([a.prompt for a in asked], [a.params for a in asked])
        except _TooManySteps:
            num_left = len(self.left_over)
            raise Mistake(
                "endless",
                f"After {_MOST_STEPS} steps of the core `run` goes on; the core has {num_left}"
                " unfinished sequences.\nDoes `outputs` learn what each step brought (`process`),"
                " and do you see when a request has finished (`output.finished`)?",
            ) from None
        expect(
            isinstance(outputs, list) and all(isinstance(o, RequestOutput) for o in outputs),
            "wrong-type",
            f"`run` gave {show(outputs)}.\nIt gives a list of `RequestOutput`s, one for each"
            f" prompt.{_return_missing(outputs)}",
        )
        expect(
            len(outputs) == len(asked),
            "outputs-missing",
            f"`run` gave {len(outputs)} outputs for {len(asked)} prompts.\nEach request must come"
            " back once, the shortest and the last too.",
        )
        unfinished = [output.request_id for output in outputs if not output.finished]
        expect(
            not unfinished,
            "unfinished",
            f"`run` came back with outputs of requests {unfinished} that are not finished.\nGo on"
            " until all have, and return the last output of each.",
        )
        return outputs


@functools.cache
def _right(asked: _Asked) -> RequestOutput:
    """What the package's `generate` gives: made once for a process, whoever is being checked."""
    llm = _package()
    [output] = llm.generate([asked.prompt], asked.params, use_tqdm=False)
    return output


@functools.cache
def _package() -> LLM:
    from minivllm import LLM

    return LLM(device="cpu", **_ROOM)


@functools.cache
def _chat_ids(question: str) -> tuple[int, ...]:
    return tuple(in_chat(_package(), question))


def _right_texts(asked: Iterable[_Asked]) -> list[str]:
    return _texts(map(_right, asked))


def _texts(outputs: Iterable[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


_ASKED = (
    "What is 12 + 7?",
    "What is a KV cache?",
    "Tell me a story about a fox named Zoë.",
    "What is a block table?",
)


@exercise("07.6", "The loop")
def check_loop(answer: Callable) -> str:
    served = _check_texts(answer)
    _check_steps(answer)
    _check_completions(answer)
    _check_crowd(answer)
    _check_guest(answer)
    _check_stops(answer)
    _check_abort(answer)
    _check_refused(answer)
    _check_several_tokens(answer)
    return (
        f"{served} requests in chunks, preempted, stopped, aborted and refused: the package's"
        " texts, and no blocks left behind"
    )


def _check_texts(answer: Callable) -> int:
    """The right texts, in order, served together."""
    rig = _Rig(max_num_batched_tokens=24)
    asked = [_ask(question) for question in (_ASKED[2], _ASKED[0], *_ASKED[1::2])]
    right = _right_texts(asked)
    texts = _texts(rig.run(rig.engine(answer), asked))
    expect(
        rig.most_at_once > 1,
        "one-at-a-time",
        f"Never did two requests get tokens in one step: {rig.num_steps} steps for"
        f" {len(asked)} requests.\nQueue *all* of them first, then step: the scheduler puts them"
        " together, and a step costs a GPU nearly the same for one or for fifty.",
    )
    expect(
        texts == right or sorted(texts) != sorted(right),
        "order-of-the-end",
        "The texts are right, but they come in the order in which the requests ended.\nThe caller"
        " wants them in the order of the prompts: collect by request_id.",
    )
    for text, wanted in zip(texts, right, strict=True):
        expect(
            text == wanted,
            "wrong-text",
            f"Your engine says {text!r}, expected {wanted!r}.\nTake the last output of each"
            " request, the one that is `finished`.",
        )
    expect(
        not rig.left_over and not rig.outputs.requests,
        "left-behind",
        f"After `run` the core has {len(rig.left_over)} sequences and the output processor"
        f" {len(rig.outputs.requests)} requests.\nWho put them there? A request is forgotten when"
        " its end has been collected.",
    )
    return len(asked)


def _return_missing(value: Any) -> str:
    return " Is a `return` missing?" if value is None else ""


def _check_steps(answer: Callable) -> None:
    """`step` by itself: what it returns, requests that come later, and an idle engine."""
    rig = _Rig()
    engine = rig.engine(answer)
    idle = engine.step()
    expect(
        idle == [],
        "idle-step",
        f"With nothing to do, `step` gave {show(idle)}.\nExpected is an empty list."
        f"{_return_missing(idle)}",
    )
    early, late = _ask(_ASKED[1], max_tokens=8), _ask(_ASKED[0])
    ids, last = [_added(engine, early)], {}
    before = rig.num_steps
    for number in range(40):
        if number == 3:
            made = rig.num_steps - before
            expect(
                made <= 3,
                "more-than-a-step",
                f"Three calls of `step` made {made} steps of the core.\n`step` makes one.",
            )
            ids.append(_added(engine, late))
        news = _news(engine)
        silent = rig.served - {output.request_id for output in news}
        expect(
            not silent,
            "unfinished-left-out",
            f"Request {', '.join(sorted(silent))} got a token, and `step` does not mention it."
            "\nReturn all that `outputs.collect` gives, also of requests that go on: somebody reads"
            " along.",
        )
        last |= {output.request_id: output for output in news}
        if len(last) == 2 and all(output.finished for output in last.values()):
            break
    for id, wanted in zip(ids, _right_texts([early, late]), strict=True):
        expect(
            id in last and last[id].finished,
            "late-request-lost",
            f"After 40 steps no output says that request {id} has finished.\nA request may come at"
            " any time, also between two steps: `add` gives it to `outputs` and to the core.",
        )
        text = last[id].outputs[0].text
        expect(
            text == wanted,
            "wrong-text",
            f"Stepped by hand, request {id} says {text!r}, expected {wanted!r}.",
        )


def _added(engine: Any, asked: _Asked) -> str:
    id = engine.add(asked.prompt, asked.params)
    expect(
        isinstance(id, str),
        "no-id",
        f"`add` gave {show(id)}.\nIt returns the `request_id` of the new request: the caller finds"
        f" its outputs by it, and can abort it.{_return_missing(id)}",
    )
    return id


def _news(engine: Any) -> list[RequestOutput]:
    """What a step returns, if it is a list of outputs."""
    from minivllm.outputs import RequestOutput

    news = engine.step()
    expect(
        isinstance(news, list) and all(isinstance(output, RequestOutput) for output in news),
        "wrong-type",
        f"`step` gave {show(news)}, expected a list of `RequestOutput`s: what `outputs.collect`"
        f" returns.{_return_missing(news)}",
    )
    return news


def _check_completions(answer: Callable) -> None:
    """A request may want several completions, and each is a sequence."""
    rig = _Rig()
    asked = [_ask(_ASKED[0], n=2)]
    message = (
        "A request with n=2 has two completions, and the core did not get two sequences for"
        " it.\nEach is a sequence of its own: give the core `request.new_sequence(request, index)`"
        " for every index below `checked.params.n`."
    )
    try:
        [output] = rig.run(rig.engine(answer), asked)
    except Mistake as mistake:
        if mistake.name != "endless" or len(rig.sequences) == 2:
            raise
        raise Mistake("completions-left-out", message) from None
    [wanted] = _right_texts([_ask(_ASKED[0])])
    texts = [completion.text for completion in output.outputs]
    expect(
        texts == [wanted, wanted],
        "wrong-text",
        f"A request with n=2 says {show(texts)}, expected twice {wanted!r}.",
    )


def _check_crowd(answer: Callable) -> None:
    """Equal prompts with other seeds, in a cache too small for all, in chunks: every text as
    when alone.
    """
    options = {
        "max_num_batched_tokens": 16,
        "num_kv_blocks": 12,
        "max_model_len": 128,
        "max_num_seqs": 4,
    }
    rig = _Rig(**options)
    asked = [
        _ask(question, temperature=1.0, seed=seed, max_tokens=32)
        for question in (_ASKED[2], _ASKED[1])
        for seed in (1, 2, 3)
    ]
    right = _right_texts(asked)
    got = _texts(rig.run(rig.engine(answer), asked))
    assert rig.core.scheduler.stats.num_preemptions > 0, "this case should preempt"
    expect(
        not any(got.count(text) > right.count(text) for text in got if text in right),
        "texts-overwritten",
        "Three requests have the same prompt and other seeds, and get the same text.\nKeep what"
        " belongs to a request by its request_id; prompts are no keys.",
    )
    for text, wanted in zip(got, right, strict=True):
        expect(
            text == wanted,
            "wrong-text",
            f"In a full cache a request says {text!r}, expected {wanted!r} as when it is alone."
            "\nWhat belongs to which request? Order and number change in every step.",
        )


def _check_guest(answer: Callable) -> None:
    """`run`, while a request that was added before is still being served."""
    rig = _Rig()
    engine = rig.engine(answer)
    guest, mine = _ask(_ASKED[2], max_tokens=5), _ask(_ASKED[0])
    _added(engine, guest)
    begins = "A request was added before `run` was called for another one"
    try:
        texts = _texts(rig.run(engine, [mine]))
    except KeyError as error:
        raise Mistake(
            "foreign-request",
            f"{begins}: KeyError: {show(error.args[0])}.\nA step serves everybody. `run` collects"
            " the outputs of its own requests, and passes over the others.",
        ) from error
    except Mistake as mistake:
        if mistake.name != "outputs-missing":
            raise
        raise Mistake(
            "foreign-request",
            f"{begins}, and `run` returned both.\nA step serves everybody; `run` returns the"
            " outputs of its own requests.",
        ) from None
    wanted = _right_texts([mine])
    expect(
        texts == wanted,
        "foreign-request",
        f"{begins}, and `run` gave {show(texts)}, expected {show(wanted)}.\nA step serves"
        " everybody; `run` returns the outputs of its own requests.",
    )


def _check_stops(answer: Callable) -> None:
    """Stop strings end the work, not only the text."""
    rig = _Rig()
    [text] = _right_texts([_ask(_ASKED[2], max_tokens=40)])
    words = text.split()
    stop = f"{words[5]} {words[6]}"
    free = rig.core.scheduler.block_manager.num_free_blocks
    [output] = rig.run(rig.engine(answer), [_ask(_ASKED[2], max_tokens=40, stop=stop)])
    [seq] = rig.sequences
    expect(
        seq.is_finished and seq.num_output_tokens < 40,
        "computes-past-the-stop",
        f"The text ended at {stop!r}, and the core knows nothing of it: it went on to"
        f" {seq.num_output_tokens} tokens, and has"
        f" {'' if seq.is_finished else 'not '}finished.\nThe core knows no text. `outputs.process`"
        " returns whom a stop string has ended: tell the core, with `core.finish`.",
    )
    said = (seq.finish_reason, seq.stop_reason)
    expect(
        said == ("stop", stop),
        "no-stop-reason",
        f"The core has noted {said} as the end of the sequence, expected {('stop', stop)}.\nIt is"
        ' `core.finish([seq_id], "stop", stop_string)`.',
    )
    wanted = text[: text.index(stop)]
    expect(
        output.outputs[0].text == wanted,
        "wrong-text",
        f"With the stop string {stop!r} your engine says {output.outputs[0].text!r}, expected"
        f" {wanted!r}.",
    )
    expect(
        rig.core.scheduler.block_manager.num_free_blocks == free,
        "left-behind",
        "After a stop string blocks are still in use.\nUse `core.finish`.",
    )


def _check_abort(answer: Callable) -> None:
    """A reader goes away: both sides of the cut must know."""
    rig = _Rig()
    engine = rig.engine(answer)
    gone, stays = _ask(_ASKED[2], max_tokens=40), _ask(_ASKED[1])
    ids = [_added(engine, gone), _added(engine, stays)]
    for _ in range(3):
        engine.step()
    _aborted(engine, ids[0], "a request that runs")
    seq = rig.sequences[0]
    expect(
        seq.finish_reason == "abort" and not seq.block_table,
        "abort-goes-on",
        "A request was aborted, and the core goes on with it: its sequence has the finish_reason"
        f" {seq.finish_reason!r}.\nNobody reads these tokens, and they keep blocks. Tell the core:"
        ' `core.finish(seq_ids, "abort")`.',
    )
    last: dict[str, RequestOutput] = {}
    while rig.num_steps < 80 and not (ids[1] in last and last[ids[1]].finished):
        last |= {output.request_id: output for output in _news(engine)}
    end = last[ids[0]].outputs[0].finish_reason if ids[0] in last else None
    expect(
        end == "abort",
        "abort-unreported",
        "A request was aborted, and no later `step` says that it has ended: its last output has"
        f" finish_reason {end!r}.\nWhoever waits for it waits for ever. `outputs.end(request)` ends"
        " it on this side of the cut, and returns the seq_ids for the other.",
    )
    [wanted] = _right_texts([stays])
    text = last[ids[1]].outputs[0].text if ids[1] in last else ""
    expect(
        text == wanted,
        "abort-hits-others",
        f"Another request ran beside the one that was aborted: it says {text!r}, expected"
        f" {wanted!r}.",
    )
    _aborted(engine, ids[0], "a request that has ended")


def _aborted(engine: Any, request_id: str, what: str) -> None:
    try:
        engine.abort(request_id)
    except KeyError as error:
        raise Mistake(
            "abort-raises",
            f"`abort` of {what}: KeyError: {show(error.args[0])}.\nA request may end while its"
            " caller decides to abort it. An id that `outputs.requests` does not have is ignored.",
        ) from error


def _check_refused(answer: Callable) -> None:
    """What can never be served is refused, and nothing of that call is left behind."""
    from minivllm.errors import RequestError

    rig = _Rig(num_kv_blocks=8, max_model_len=128)
    engine, good, too_long = rig.engine(answer), _ask(_ASKED[0]), list(range(100, 250))
    try:
        outputs = engine.run([good.prompt, too_long], [good.params] * 2)
    except _TooManySteps:
        outputs = None
    except RequestError:
        expect(
            not rig.left_over and not rig.outputs.requests,
            "queued-before-checked",
            "Of two prompts the second was refused, and so nobody waits for the first; but it"
            f" stands in the engine: sequences in the core: {len(rig.left_over)}, requests in the"
            f" output processor: {len(rig.outputs.requests)}.\nCheck all prompts with"
            " `inputs.process` before you queue one.",
        )
        return
    raise Mistake(
        "request-dropped",
        f"A prompt of 150 tokens never fits a cache of 128, and `run` gave {show(outputs)}.\nLet"
        " the error of `inputs.process` through: the caller has to know.",
    )


def _check_several_tokens(answer: Callable) -> None:
    """A step may bring several tokens of a sequence: all of them count."""
    from minivllm.engine.scheduler import Scheduler

    known: list[int] = []

    class Guessing(Scheduler):
        """Proposes what follows; it happens to know."""

        def schedule(self) -> ScheduledBatch:
            for seq in self.running:
                self.propose(seq, known[seq.num_output_tokens :][:3])
            return super().schedule()

    rig = _Rig(scheduler_cls=Guessing)
    right = _right(_ask(_ASKED[1]))
    known += right.outputs[0].token_ids
    engine = rig.engine(answer)
    [output] = rig.run(engine, [_ask(_ASKED[1])])
    assert rig.num_steps < len(known) / 2, "steps should bring several tokens each"
    text, wanted = output.outputs[0].text, right.outputs[0].text
    expect(
        text == wanted,
        "wrong-text",
        f"With steps that bring several tokens your engine says {text!r}, expected {wanted!r}."
        "\nHand `outputs.process` the step as it is.",
    )
    counts = getattr(engine, "num_tokens", None)
    expect(
        counts == len(known),
        "one-token-per-step",
        f"{rig.num_steps} steps brought {len(known)} tokens, and `num_tokens` is {show(counts)}."
        "\nA step gives each sequence a *list* of tokens: `output.token_ids`, of each output in"
        " `step.outputs`. Add up their lengths.",
    )
