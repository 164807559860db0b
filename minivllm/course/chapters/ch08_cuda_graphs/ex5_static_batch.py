"""08.5: debug this: somebody writes into my story."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch08_cuda_graphs.common import (
    QUESTIONS,
    cuda_errors,
    expected_answers,
    amount,
    prompts,
)
from minivllm.course.grading.exercise import Exercise, Known


def check_static_batch(answer: Callable) -> str:
    faults = {
        "table-too-narrow": _table_fault(answer),
        "stale-rows": _stale_fault(answer),
        "largest-graph-always": _size_fault(answer),
    }
    left = {name: why for name, why in faults.items() if why}
    if len(left) == 3:
        raise Mistake(
            "not-mended", "All three bugs are still there. The first: " + left["table-too-narrow"]
        )
    for name, why in left.items():
        raise Mistake(
            name,
            why
            + (f"\n(And another of the three is left, {list(left)[1]}.)" if len(left) > 1 else ""),
        )
    tokens = _serve_rows(answer)
    return f"rows come and go, and {tokens} tokens are what they should be"


_MAX_MODEL_LEN = 254  # 15 full blocks of 16, and one that is not


def _make_batch(answer: Callable) -> tuple[Any, Any]:
    from minivllm.course.sim.streams import SimulatedGPU

    gpu = SimulatedGPU()
    return gpu, answer(gpu, [8, 1, 4, 2], 16, _MAX_MODEL_LEN, 40)


def _some_rows(count: int, blocks: int = 2) -> list[Any]:
    from minivllm.course.sim.streams import Row

    return [
        Row(10 + i, 16 * blocks - 3 - i, [blocks * i + j + 1 for j in range(blocks)])
        for i in range(count)
    ]


def _table_fault(answer: Callable) -> str:
    gpu, batch = _make_batch(answer)
    columns = batch.block_table.shape[1]
    room = columns * 16
    if columns == _MAX_MODEL_LEN // 16:
        raise Mistake(
            "rounded-down",
            f"For max_model_len = {_MAX_MODEL_LEN} and blocks of 16 your table has {columns}"
            f" columns: room for {room} tokens.\nThe last block of a sequence need not be full:"
            " round up, -(-max_model_len // block_size).",
        )
    if room >= _MAX_MODEL_LEN:
        rows = _some_rows(3, blocks=16)
        with cuda_errors("in fill"):
            batch.fill(rows)
        gpu.synchronize()
        for row, table in zip(rows, batch.block_table.tolist(), strict=False):
            if table[:16] != row.blocks:
                raise Mistake(
                    "table-not-filled",
                    "The table is wide enough now, but for a sequence of 16 blocks,"
                    f" {show(row.blocks)}, fill wrote {show(table)}.\nEvery block of the sequence"
                    " must stand in its row.",
                )
        return ""
    return (
        f"block_table has {columns} columns: room for {room} tokens of 16 a block.\nSequences may"
        f" get max_model_len = {_MAX_MODEL_LEN} tokens, 16 blocks. What is cut off is then read"
        " from somewhere else. The recording's table must be wide enough for the longest sequence"
        " there can ever be."
    )


def _stale_fault(answer: Callable) -> str:
    """After a step of many, a step of few: what do the rows behind them hold?"""
    gpu, batch = _make_batch(answer)
    for many, few in ((8, 3), (4, 3), (7, 5), (3, 1)):
        with cuda_errors("in fill"):
            batch.fill(_some_rows(many))
            size = batch.fill(_some_rows(few))
        gpu.synchronize()
        places, lengths = batch.slot_mapping.tolist()[few:size], batch.seq_lens.tolist()[few:size]
        if any(place != -1 for place in places):
            index = next(i for i, place in enumerate(places) if place != -1)
            return (
                f"After fill of {many} sequences and then of {few}, row {few + index} of the graph"
                f" of {size} still writes: slot_mapping is {places[index]}.\nNobody runs in it, and"
                " its place may belong to somebody else by now. Every row behind the real ones, up"
                " to the size that is replayed, gets −1, at each fill."
            )
        if any(lengths):
            return (
                f"After fill of {many} sequences and then of {few}, the padded rows of the graph of"
                f" {size} write nowhere, but they still read: seq_lens {lengths}.\nNo harm is done,"
                " but it is work, and those blocks may be gone. A padded row reads 0 tokens."
            )
    return ""


def _size_fault(answer: Callable) -> str:
    _, batch = _make_batch(answer)
    for count in (1, 2, 3, 4, 5, 8):
        best = min(size for size in (1, 2, 4, 8) if size >= count)
        with cuda_errors("in fill"):
            size = batch.fill(_some_rows(count))
        if size not in (1, 2, 4, 8) or size < count:
            raise Mistake(
                "no-such-graph",
                f"For {amount(count, 'sequence')} fill returned {show(size)}.\nRecorded are 1, 2, 4"
                " and 8.",
            )
        if size != best:
            return (
                f"For {amount(count, 'sequence')} fill returned {size}; the smallest graph that is"
                f" large enough has {amount(best, 'row')}.\nAll others are computed for nobody."
            )
    return ""


def _serve_rows(answer: Callable) -> int:
    from minivllm.course.sim.streams import RowServer, SimulatedGPU

    gpu, prompts, expected = SimulatedGPU(), prompts(), expected_answers(120)
    server = RowServer(gpu, answer, [1, 2, 4], longest_prompt=max(map(len, prompts)))
    addresses = [getattr(server.batch, name).data_ptr() for name in _TENSORS]
    order = {"A": 0, "B": 1, "C": 2, "D": 3}
    with cuda_errors("while steps were served"):
        server.admit("A", prompts[0], 119)
        server.admit("B", prompts[1], 24)
        server.admit("D", prompts[3], 12)
        for number in range(118):
            if number == 8:
                server.leave("D")
            if number == 10:
                server.leave("B")
                server.admit("C", prompts[2], 110)
            server.step()
    for name, address in zip(_TENSORS, addresses, strict=True):
        expect(
            getattr(server.batch, name).data_ptr() == address,
            "new-address",
            f"fill has put another tensor under the name {name}.\nThe recording goes on reading the"
            " old one. Write into the tensor that is there: `self._put(…)`, `tensor[:n].copy_(…)`,"
            " `tensor.fill_(…)`.",
        )
    for name, i in order.items():
        mine, right = server.answers[name], expected[i]
        if mine != right[: len(mine)]:
            at = next(k for k, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b)
            raise Mistake(
                "wrong-values",
                f"{name}'s answer to {QUESTIONS[i]!r} goes wrong at its token {at}, when its"
                f" context is {len(prompts[i]) + at} tokens long: got {mine[at]}, expected"
                f" {right[at]}.\nCompare, before and after that step, what each of the five tensors"
                " holds in its row.",
            )
    return sum(map(len, server.answers.values()))


_TENSORS = ("token_ids", "positions", "seq_lens", "block_table", "slot_mapping")


EXERCISE = Exercise(
    id="08.5",
    title="Debug this: somebody writes into my story",
    check=check_static_batch,
    mistakes=(
        Known(
            "not-mended",
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
            "stale-rows",
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

# %% padded with zeros, which is a place
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
        for tensor in (
            self.token_ids,
            self.positions,
            self.seq_lens,
            self.block_table,
            self.slot_mapping,
        ):
            tensor.zero_()
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
            "largest-graph-always",
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
        Known(
            "no-such-graph",
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
""",
        ),
        Known(
            "new-address",
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
            "table-not-filled",
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
            "rounded-down",
            answers=r"""
# %% whole blocks only
@@
-        rows, width = self.sizes[-1], -(-max_model_len // block_size)
+        rows, width = self.sizes[-1], max_model_len // block_size
""",
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
