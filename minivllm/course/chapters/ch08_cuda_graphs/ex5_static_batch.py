"""08.5: debug this: somebody writes into my story."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from minivllm.course.chapters.ch08_cuda_graphs import common
from minivllm.course.chapters.ch08_cuda_graphs.common import (
    QUESTIONS,
    amount,
    cuda_errors,
    expected_answers,
    prompts,
    size_mistake,
)
from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_unchanged

TENSORS = ("token_ids", "positions", "seq_lens", "block_table", "slot_mapping")


@dataclass(frozen=True)
class _Setting:
    """The arguments of a batch. Neither the last block nor the last graph is a round number."""

    sizes: tuple[int, ...]
    block_size: int
    max_model_len: int
    longest_prompt: int

    @property
    def columns(self) -> int:
        return -(-self.max_model_len // self.block_size)

    def make(self, answer: Callable) -> tuple[Any, Any]:
        """A new GPU, and the answer's batch on it."""
        from minivllm.course.sim.streams import SimulatedGPU

        gpu, given = SimulatedGPU(), list(self.sizes)
        with cuda_errors("while your class was made"):
            batch = answer(gpu, given, self.block_size, self.max_model_len, self.longest_prompt)
        expect_unchanged(given, list(self.sizes), "the list `sizes`")
        return gpu, batch

    def rows(self, count: int, blocks: int = 0) -> list[Any]:
        """Rows of sequences. blocks: how many each has; 0: each another number."""
        from minivllm.course.sim.streams import Row

        found, next_block = [], 1
        for i in range(count):
            have = blocks or 1 + (3 * i) % self.columns
            numbers = [next_block + j for j in range(have)][::-1]
            next_block += have
            last = min(have * self.block_size, self.max_model_len) - 1
            # The blocks of a sequence are all there from the beginning.
            found.append(Row(10 + i, max(0, last - 5 * i), numbers))
        return found


SETTINGS = (_Setting((4, 1, 8, 2), 16, 254, 40), _Setting((3, 7), 2, 163, 8))

#: Of these only the choice of a size is looked at.
_LARGE = _Setting((24, 16, 40, 32), 16, 64, 16)
#: Of these only the padded rows are looked at: there are many.
_FAR_APART = _Setting((64, 1), 16, 64, 16)


def check_static_batch(answer: Callable) -> str:
    left = _faults(answer)
    three = ["table-too-narrow", "largest-graph-always", "stale-rows"]
    if [fault.name for fault in left] == three:
        raise EXERCISE.mistake("not-mended", f"The first of them: {left[0].message}")
    if left:
        others = [fault.name for fault in left if fault.name != left[0].name]
        more = f"\n(And another one is left: {others[0]}.)" if others else ""
        raise Mistake(left[0].name, left[0].message + more)
    for setting in SETTINGS:
        _judge_rows(answer, setting)
    _judge_size(answer, _LARGE)
    _judge_padding(answer, _FAR_APART)
    _judge_two_steps(answer, SETTINGS[0])
    tokens = _serve_rows(answer)
    return f"rows come and go, and {tokens} tokens are what they should be"


def _faults(answer: Callable) -> list[Mistake]:
    """What is left of each of the three bugs: the first setting in which it shows."""
    left: list[Mistake] = []
    for judge in (_judge_table, _judge_size, _judge_padding):
        for setting in SETTINGS:
            try:
                judge(answer, setting)
            except Mistake as mistake:
                left.append(mistake)
                break
            except Exception:
                # A fault that was found before is told first.
                if left:
                    return left
                raise
    return left


def _fill(gpu: Any, batch: Any, rows: list[Any]) -> Any:
    """What fill returns; it changes neither the rows nor where the tensors are."""
    before = [(row, list(row.blocks)) for row in rows]
    tensors = {name: getattr(batch, name).data_ptr() for name in TENSORS}
    size, failed = None, None
    try:
        with cuda_errors("in fill"):
            size = batch.fill(rows)
            gpu.synchronize()
    except Mistake as mistake:
        failed = mistake
    expect_unchanged(len(rows), len(before), "the list of rows (its length), in fill")
    for row, (same, blocks) in zip(rows, before, strict=True):
        expect_unchanged(row, same, "the list of rows, in fill")
        expect_unchanged(row.blocks, blocks, "the blocks of a row, in fill")
    if failed is not None:
        raise failed
    for name, address in tensors.items():
        if getattr(batch, name).data_ptr() != address:
            raise EXERCISE.mistake(
                "new-address", f"fill has put another tensor under the name {name}."
            )
    return size


def _judge_table(answer: Callable, setting: _Setting) -> None:
    """Is the table wide enough for the longest sequence, and is it filled?"""
    gpu, batch = setting.make(answer)
    size, most, columns = setting.block_size, setting.max_model_len, batch.block_table.shape[1]
    seen = (
        f"For max_model_len = {most} and blocks of {size}, block_table has"
        f" {amount(columns, 'column')}: room for {columns * size} tokens."
    )
    if columns == most // size and columns < setting.columns:
        raise EXERCISE.mistake("rounded-down", seen)
    if columns < setting.columns:
        raise EXERCISE.mistake("table-too-narrow", seen)
    rows = setting.rows(min(setting.sizes) + 1, blocks=setting.columns)
    _fill(gpu, batch, rows)
    for row, table in zip(rows, batch.block_table.tolist(), strict=False):
        if table[: setting.columns] != row.blocks:
            raise EXERCISE.mistake(
                "table-not-filled",
                f"For a sequence of the blocks {show(row.blocks, 20)} fill wrote"
                f" {show(table, 20)}.",
            )


def _judge_padding(answer: Callable, setting: _Setting) -> None:
    """After a step of many, a step of few: what do the rows behind them hold?"""
    gpu, batch = setting.make(answer)
    # What the two tensors hold if only the real rows are ever written.
    places, lengths = [-1] * max(setting.sizes), [0] * max(setting.sizes)
    before = 0
    for few in (max(setting.sizes), 3, 5, 1, 6, 2, 1, 7, 3):
        rows = setting.rows(few)
        size = _fill(gpu, batch, rows)
        places[:few] = [_place(setting, row) for row in rows]
        lengths[:few] = [row.position + 1 for row in rows]
        if not isinstance(size, int) or size not in setting.sizes:
            return
        now = (batch.slot_mapping.tolist()[:size], batch.seq_lens.tolist()[:size])
        what = f"fill of {before} sequences and then of {few}" if before else f"fill of {few}"
        for index in range(few, size):
            _judge_padded_row(
                (now[0][index], now[1][index]),
                (places[index], lengths[index]),
                (places[few - 1], lengths[few - 1]),
                f"After {what}, row {index} of the graph of {size}",
            )
        before = few


def _place(setting: _Setting, row: Any) -> int:
    size = setting.block_size
    return row.blocks[row.position // size] * size + row.position % size


def _judge_padded_row(
    now: tuple[int, int], stale: tuple[int, int], last: tuple[int, int], row: str
) -> None:
    """now, stale, last: (slot_mapping, seq_lens) of the row, of the row as somebody left it, and
    of the last real row.
    """
    place, length = now
    if (place, length) == (-1, 0):
        return
    seen = f"{row} has slot_mapping {place} and seq_lens {length}."
    # A tensor that is right says nothing about the other one.
    if place in (-1, stale[0]) and length in (0, stale[1]):
        raise EXERCISE.mistake("stale-rows", seen)
    if place in (-1, last[0]) and length in (0, last[1]):
        raise EXERCISE.mistake("last-row-repeated", seen)
    raise EXERCISE.mistake("padding-writes" if place != -1 else "padding-reads", seen)


def _judge_size(answer: Callable, setting: _Setting) -> None:
    """Which graph does fill choose for how many sequences?"""
    gpu, batch = setting.make(answer)
    picked: dict[int, int | None] = {}
    failed: Exception = ValueError()
    for count in range(1, max(setting.sizes) + 1):
        try:
            size = _fill(gpu, batch, setting.rows(count))
        except (StopIteration, IndexError, ValueError) as error:
            if count < max(setting.sizes):
                raise
            size, failed = None, error
        seen = f"For {amount(count, 'sequence')} fill returned {show(size)}."
        if size is not None and (isinstance(size, bool) or size not in setting.sizes):
            raise EXERCISE.mistake("no-such-graph", f"{seen} Recorded are {list(setting.sizes)}.")
        picked[count] = size
    for count in range(max(setting.sizes) - 1, 0, -1):
        size = _fill(gpu, batch, setting.rows(count))
        if size != picked[count]:
            raise EXERCISE.mistake(
                "depends-on-the-step-before",
                f"For {amount(count, 'sequence')}, with graphs for {list(setting.sizes)}, fill"
                f" returned {show(picked[count])} after a step of fewer and {show(size)} after a"
                " step of more.",
            )
    found = size_mistake(picked, setting.sizes)
    if found is not None:
        name, count = found
        if name == "not-the-smallest" and picked[count] is None:
            raise failed
        best = min(size for size in setting.sizes if size >= count)
        raise EXERCISE.mistake(
            name,
            f"For {amount(count, 'sequence')}, with graphs for {list(setting.sizes)}, fill"
            f" returned {show(picked[count])}; the smallest that is large enough has {best} rows.",
        )


def _judge_rows(answer: Callable, setting: _Setting) -> None:
    """Do the first rows hold what the sequences need?"""
    gpu, batch = setting.make(answer)
    for count in (max(setting.sizes), 2, 3, 1):
        rows = setting.rows(count)
        # Sequences may share their first blocks: a cached prefix.
        for step in (rows, [_with_large_numbers(row) for row in rows]):
            _fill(gpu, batch, step)
            _judge_row_values(setting, {name: getattr(batch, name) for name in TENSORS}, step)


def _with_large_numbers(row: Any) -> Any:
    """The row with another token, and with other blocks behind its first one, beyond 16 bits."""
    further = [block + 100_000 for block in row.blocks[1:]]
    return replace(row, token_id=row.token_id + 100_000, blocks=[row.blocks[0], *further])


def _judge_row_values(setting: _Setting, tensors: dict[str, Any], rows: list[Any]) -> None:
    count = len(rows)
    right = {
        "token_ids": [row.token_id for row in rows],
        "positions": [row.position for row in rows],
        "seq_lens": [row.position + 1 for row in rows],
        "slot_mapping": [_place(setting, row) for row in rows],
    }
    for name, wanted in right.items():
        mine = tensors[name].tolist()[:count]
        if mine != wanted:
            raise EXERCISE.mistake(
                "wrong-rows",
                f"After fill of {amount(count, 'sequence')}, {name} begins with {show(mine)},"
                f" expected {show(wanted)}.",
            )
    for row, table in zip(rows, tensors["block_table"].tolist(), strict=False):
        if table[: len(row.blocks)] != row.blocks:
            raise EXERCISE.mistake(
                "wrong-rows",
                f"The blocks {show(row.blocks, 20)} became the row {show(table, 20)} of"
                " block_table.",
            )


def _judge_two_steps(answer: Callable, setting: _Setting) -> None:
    """Does a second fill leave alone what a step reads that has not run yet?"""
    gpu, batch = setting.make(answer)
    many = setting.rows(6)
    first, second = many[:3], many[3:]
    with cuda_errors("in fill"):
        # A long step still runs, so copies wait.
        gpu.launch("the step before", 100_000.0)
        batch.fill(list(first))
        # In the place of a step: it reads all tensors when its turn comes.
        read = {name: getattr(batch, name).clone() for name in TENSORS}
        batch.fill(list(second))
        gpu.synchronize()
    try:
        _judge_row_values(setting, read, first)
    except Mistake as mistake:
        raise EXERCISE.mistake(
            "pinned-overwritten",
            "fill was called again while the step before had not run yet, and that step read the"
            f" wrong rows. {mistake.message.splitlines()[0]}",
        ) from None


def _serve_rows(answer: Callable) -> int:
    """Four answers of the bundled model, whose rows come and go; how many tokens."""
    from minivllm.course.sim.streams import RowServer, SimulatedGPU

    asked, expected = prompts(), expected_answers(120)
    server = RowServer(SimulatedGPU(), answer, [1, 2, 4], longest_prompt=max(map(len, asked)))
    order = {"A": 0, "B": 1, "C": 2, "D": 3}
    with cuda_errors("while steps were served"):
        server.admit("A", asked[0], 119)
        server.admit("B", asked[1], 24)
        server.admit("D", asked[3], 12)
        for number in range(118):
            if number == 8:
                server.leave("D")
            if number == 10:
                server.leave("B")
                server.admit("C", asked[2], 110)
            server.step()
    for name, i in order.items():
        mine, right = server.answers[name], expected[i]
        if mine != right[: len(mine)]:
            at = next(k for k, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b)
            raise EXERCISE.mistake(
                "wrong-values",
                f"{name}'s answer to {QUESTIONS[i]!r} goes wrong at its token {at}, when its"
                f" context is {len(asked[i]) + at} tokens long: got {mine[at]}, expected"
                f" {right[at]}.",
            )
    return sum(map(len, server.answers.values()))


EXERCISE = Exercise(
    id="08.5",
    title="Debug this: somebody writes into my story",
    check=check_static_batch,
    mistakes=(
        Known(
            "not-mended",
            message=(
                "All three bugs are still there. Begin with one of the complaints, and find the"
                " line."
            ),
            hint=1,
            answers=r"""
# %% another return, the same bugs
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-longest_prompt // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]
        )
        self._put(self.slot_mapping, places)
        return max(self.sizes)

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)
""",
        ),
        Known(
            "table-too-narrow",
            message=(
                "A sequence may get max_model_len tokens. What is cut off is then read from"
                " somewhere else. The table must be wide enough for the longest sequence that"
                " there can ever be."
            ),
            hint=2,
            answers=r"""
# %% rows and size mended
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-longest_prompt // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self.seq_lens.fill_(0)
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]
        )
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)

# %% twice the longest prompt will do
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-2 * longest_prompt // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self.seq_lens.fill_(0)
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]
        )
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)
""",
        ),
        Known(
            "rounded-down",
            message=(
                "The last block of a sequence need not be full: round up, -(-max_model_len //"
                " block_size)."
            ),
            hint=3,
            answers=r"""
# %% whole blocks only
@@
-        rows, width = self.sizes[-1], -(-max_model_len // block_size)
+        rows, width = self.sizes[-1], max_model_len // block_size
""",
        ),
        Known(
            "table-not-filled",
            message=(
                "The table is wide enough now, but every block of the sequence must stand in"
                " its row."
            ),
            hint=2,
            answers=r"""
# %% the table is wide enough, but still filled only as far as the longest prompt
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.width = -(-longest_prompt // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self.seq_lens.fill_(0)
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table,
            [(row.blocks[: self.width] + [0] * width)[:width] for row in rows],
        )
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)
""",
        ),
        Known(
            "stale-rows",
            message=(
                "That is what another sequence left there, in an earlier step. Nobody runs in"
                " this row, and its place may belong to somebody else by now. Every row behind"
                " the real ones, up to the size that is replayed, gets slot_mapping -1 and"
                " seq_lens 0, at each fill."
            ),
            hint=1,
            answers=r"""
# %% width and size mended; a graph as large as the batch hides it
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]
        )
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)

# %% they write nowhere, and still read
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]
        )
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)

# %% one row behind the real ones is reset
@@
-        padding = graph_size - len(rows)
+        padding = min(1, graph_size - len(rows))

# %% they read nothing, and still write
@@
-        self._put(self.slot_mapping, places + [-1] * padding)
+        self._put(self.slot_mapping, places)
""",
        ),
        Known(
            "last-row-repeated",
            message=(
                "That is what the last real row holds, written a second time. The padded row"
                " would read that sequence's context for nothing, or write into it. Padded rows"
                " get slot_mapping -1 and seq_lens 0."
            ),
            hint=3,
            answers=r"""
# %% the last row again
@@
-        places = [
+        rows = rows + rows[-1:] * padding
+        padding = 0
+        places = [
""",
        ),
        Known(
            "padding-writes",
            message=(
                "A padded row must write nowhere, slot_mapping -1. Every other number is a"
                " place in some block: 0 is the first place of block 0."
            ),
            answers=r"""
# %% padded with zeros, which is a place
@@
-        self._put(self.slot_mapping, places + [-1] * padding)
+        self._put(self.slot_mapping, places + [0] * padding)
""",
        ),
        Known(
            "padding-reads",
            message=(
                "A padded row must read nothing, seq_lens 0. No harm is done here, but it is"
                " work for nobody."
            ),
            answers=r"""
# %% a length of one
@@
-        self._put(self.seq_lens, [row.position + 1 for row in rows] + [0] * padding)
+        self._put(self.seq_lens, [row.position + 1 for row in rows] + [1] * padding)
""",
        ),
        replace(
            common.LARGEST_ALWAYS,
            hint=2,
            answers=r"""
# %% width and rows mended
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self.seq_lens.fill_(0)
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]
        )
        self._put(self.slot_mapping, places)
        return self.sizes[-1]

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)
""",
        ),
        replace(
            common.ONE_TOO_LARGE,
            hint=3,
            answers=r"""
# %% larger, not at least as large
@@
-        graph_size = next(
-            graph_size for graph_size in self.sizes if graph_size >= len(rows)
-        )
+        graph_size = next(
+            (size for size in self.sizes if size > len(rows)), self.sizes[-1]
+        )
""",
        ),
        replace(
            common.NOT_SORTED,
            hint=3,
            answers=r"""
# %% sorts nothing
@@
-        self.gpu, self.sizes = gpu, sorted(sizes)
-        rows, width = self.sizes[-1], -(-max_model_len // block_size)
+        self.gpu, self.sizes = gpu, list(sizes)
+        rows, width = max(sizes), -(-max_model_len // block_size)
""",
        ),
        replace(
            common.TOO_SMALL,
            hint=3,
            answers=r"""
# %% the next smaller one
@@
-        graph_size = next(
-            graph_size for graph_size in self.sizes if graph_size >= len(rows)
-        )
+        smaller = [size for size in self.sizes if size <= len(rows)]
+        graph_size = max(smaller, default=self.sizes[0])
""",
        ),
        replace(
            common.OTHER_SIZE,
            hint=3,
            answers=r"""
# %% the second that fits
@@
-        graph_size = next(
-            graph_size for graph_size in self.sizes if graph_size >= len(rows)
-        )
+        graph_size = [size for size in self.sizes if size >= len(rows)][:2][-1]
""",
        ),
        Known(
            "no-such-graph",
            message=("Only recorded graphs can be replayed: fill returns one of `sizes`."),
            hint=3,
            answers=r"""
# %% a graph for every number
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]
        )
        self._put(self.slot_mapping, places)
        return len(rows)

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)

# %% the next power of two
@@
-        graph_size = next(
-            graph_size for graph_size in self.sizes if graph_size >= len(rows)
-        )
+        graph_size = 1 << (len(rows) - 1).bit_length()
""",
        ),
        Known(
            "new-address",
            message=(
                "The recording goes on reading the old tensor. Write into the tensor that is"
                " there: `self._put(…)`, `tensor[:n].copy_(…)`, `tensor.fill_(…)`."
            ),
            answers=r"""
# %% fresh tensors for slots and lengths
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [
            row.blocks[row.position // size] * size + row.position % size
            for row in rows
        ]
        self.seq_lens = self.gpu.full((self.sizes[-1],), 0, dtype=torch.int32)
        self.slot_mapping = self.gpu.full((self.sizes[-1],), -1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(
            self.block_table, [(row.blocks + [0] * width)[:width] for row in rows]
        )
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)
""",
        ),
        Known(
            "wrong-rows",
            message=(
                "That was right before. Compare your fill with the given one: what has changed"
                " for the real rows?"
            ),
            answers=r"""
# %% everything is reset behind the writing
@@
-        return graph_size
+        self.positions.fill_(0)
+        return graph_size

# %% tables are taken for the same where they begin with the same block
@@
-        self._put(self.block_table, tables + [[0] * width] * padding)
+        first = [table[0] for table in tables]
+        if first != getattr(self, "first", None):
+            self._put(self.block_table, tables + [[0] * width] * padding)
+        self.first = first
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% pads the caller's list
@@
-        places = [
+        rows += [Row(0, 0, [0])] * padding
+        places = [
""",
        ),
        Known(
            "depends-on-the-step-before",
            message=(
                "Take the smallest graph that is large enough, whatever ran before: rows that"
                " nobody needs are computed for nobody."
            ),
            answers=r"""
# %% stays with the larger graph for a while
@@
-        padding = graph_size - len(rows)
+        if graph_size >= 16:
+            before = getattr(self, "before", 0)
+            graph_size = max(graph_size, min(before, 2 * graph_size))
+        self.before = graph_size
+        padding = graph_size - len(rows)
""",
        ),
        Known(
            "pinned-overwritten",
            message=(
                "A copy waits in the stream, and reads the pinned tensor only when its turn comes:"
                " by then your fill had put newer numbers into it. Take a new pinned tensor for"
                " each copy, as the given `_put` does."
            ),
            answers=r"""
# %% a pinned tensor for each of the five, kept
@@
-        host = self.gpu.pinned(values, dtype=tensor.dtype)
+        kept = self.__dict__.setdefault("kept", {})
+        if (id(tensor), len(values)) not in kept:
+            kept[id(tensor), len(values)] = self.gpu.pinned(values, dtype=tensor.dtype)
+        host = kept[id(tensor), len(values)]
+        host.copy_(torch.tensor(values, dtype=tensor.dtype))
""",
        ),
        Known(
            "wrong-values",
            message=(
                "Compare, before and after that step, what each of the five tensors holds in"
                " its row."
            ),
        ),
    ),
    right=r"""
# %% everything reset first, then the real rows
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes, self.block_size = gpu, sorted(sizes), block_size
        rows = max(sizes)
        self.width = (max_model_len + block_size - 1) // block_size
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.zeros(rows, self.width, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)

    def fill(self, rows):
        self.slot_mapping.fill_(-1)
        self.seq_lens.zero_()
        for tensor, values in (
            (self.token_ids, [r.token_id for r in rows]),
            (self.positions, [r.position for r in rows]),
            (self.seq_lens, [r.position + 1 for r in rows]),
            (
                self.slot_mapping,
                [
                    r.blocks[r.position // self.block_size] * self.block_size
                    + r.position % self.block_size
                    for r in rows
                ],
            ),
            (
                self.block_table,
                [r.blocks + [0] * (self.width - len(r.blocks)) for r in rows],
            ),
        ):
            tensor[: len(rows)].copy_(
                self.gpu.pinned(values, dtype=tensor.dtype), non_blocking=True
            )
        return min(size for size in self.sizes if size >= len(rows))
""",
)
