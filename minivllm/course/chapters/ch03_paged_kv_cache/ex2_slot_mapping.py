"""03.2: slot mapping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch03_paged_kv_cache.common import (
    SIZES,
    judge,
)
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import (
    counted,
    expect_nothing_kept,
    one_by_one,
    seeded,
)
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import numpy as np
    import torch

#: (entries of the request's row, position, number of the new token, block size) -> its slot.
Slot = Callable[[list[int], int, int, int], int]


def _case(
    blocks: list[list[int]],
    starts: list[int],
    lens: list[int],
    size: int,
    pad: int = 0,
    spare: int = 1,
) -> tuple:
    """Arguments of slot_mapping; the table is a part of a wider one, with stale entries.

    spare: the columns that no request needs.
    """
    import torch

    width = max(map(len, blocks)) + spare
    rows = [
        [-7, *row, *[-5 if i % 2 else 77 + i] * (width - len(row)), -8]
        for i, row in enumerate(blocks)
    ]
    table = torch.tensor(rows, dtype=torch.int32)[:, 1:-1]
    return table, starts, lens, size, sum(lens) + pad


def _cases() -> list[tuple]:
    import torch

    random = seeded(2)
    order = torch.randperm(30, generator=random).tolist()
    many = torch.randperm(2000, generator=random).tolist()
    starts = torch.randint(0, 300, (40,), generator=random).tolist()
    lens = [1] * 20 + torch.randint(1, 130, (20,), generator=random).tolist()
    needed = [-(-(start + count) // 12) for start, count in zip(starts, lens, strict=True)]
    crowd = [many[40 * i : 40 * i + count] for i, count in enumerate(needed)]
    return [
        _case([[5, 2]], [0], [6], 4),
        _case([[5, 2]], [3], [2], 4, pad=1),
        _case([[0, 1, 2]], [0], [9], 4),
        _case([[3]], [0], [1], 16),
        _case([[9, 4, 6, 8]], [8], [8], 4, pad=2, spare=0),
        _case([[4, 0, 2]], [2], [1], 1, pad=3),
        _case([[7, 3, 12, 5]], [4], [8], 3, pad=2),
        _case([[8, 1, 3], [6, 2], [7, 5, 9]], [7, 4, 0], [1, 1, 9], 4, pad=5),
        _case(
            [order[:5], order[5:8], order[8:10], order[10:]], [70, 40, 16, 100], [1, 1, 3, 190], 16
        ),
        _case(crowd, starts, lens, 12, pad=9),
        _case([[70_001, 65_536, 40_000]], [30], [70], 48),
        _case([[2_000_000, 300_000_001]], [12], [9], 16, pad=1),
        _case([[2_000_000_001]], [5], [3], 1024),
    ]


def _mapping(slot: Slot, *, row: int | None = None, fill: int | None = -1) -> Callable:
    """A slot mapping. row: of the table, for all requests. fill: what stands behind the tokens."""

    def mapped(
        block_table: torch.Tensor,
        starts: list[int],
        query_lens: list[int],
        block_size: int,
        pad_to: int,
    ) -> torch.Tensor:
        import torch

        found = []
        for i, (start, count) in enumerate(zip(starts, query_lens, strict=True)):
            entries = block_table[i if row is None else row].tolist()
            found += [slot(entries, start + j, j, block_size) for j in range(count)]
        padding = [] if fill is None else [fill] * (pad_to - len(found))
        return torch.tensor(found + padding, dtype=torch.int64)

    return mapped


def _good(table: list[int], position: int, j: int, size: int) -> int:
    return table[position // size] * size + position % size


def _right(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    return _mapping(_good)(block_table, starts, query_lens, block_size, pad_to)


def _from_first(table: list[int], position: int, j: int, size: int) -> int:
    """The slot j behind the first new token's slot."""
    return _good(table, position - j, 0, size) + j


def _wrapped(table: list[int], position: int, j: int, size: int) -> int:
    """What an int32 holds of the slot."""
    return (_good(table, position, j, size) + 2**31) % 2**32 - 2**31


def _until_the_length(
    table: torch.Tensor, starts: list[int], lens: list[int], size: int, pad_to: int
) -> torch.Tensor:
    left = [max(0, count - start) for start, count in zip(starts, lens, strict=True)]
    return _right(table, starts, left, size, pad_to)


def _one_each(last: bool) -> Callable:
    """Only the first or the last new token of each request gets its slot."""

    def mapped(
        table: torch.Tensor, starts: list[int], lens: list[int], size: int, pad_to: int
    ) -> torch.Tensor:
        ends = [start + (count - 1) * last for start, count in zip(starts, lens, strict=True)]
        return _right(table, ends, [1] * len(lens), size, pad_to)

    return mapped


def _one_more(
    table: torch.Tensor, starts: list[int], lens: list[int], size: int, pad_to: int
) -> torch.Tensor:
    return _right(table, starts, [count + 1 for count in lens], size, pad_to)


def _padding_first(
    table: torch.Tensor, starts: list[int], lens: list[int], size: int, pad_to: int
) -> torch.Tensor:
    return _right(table, starts, lens, size, pad_to).roll(pad_to - sum(lens))


def _in_blocks_of(size: int) -> Callable:
    """With another block size; 0: the table's width."""

    def mapped(
        table: torch.Tensor, starts: list[int], lens: list[int], block_size: int, pad_to: int
    ) -> torch.Tensor:
        return _right(table, starts, lens, size or table.shape[1], pad_to)

    return mapped


def _offsets_in_blocks_of(size: int) -> Callable:
    return _mapping(lambda t, p, j, s: t[p // s] * s + p % size)


def _build_batch_with(slot_mapping: Callable) -> Callable:
    """The package's build_batch, with a learner's slot mapping."""
    import numpy as np
    import torch

    from minivllm.engine.batch import build_batch

    def build(rows: Sequence, block_table: np.ndarray, block_size: int) -> Any:
        batch = build_batch(rows, block_table, block_size)
        table = torch.from_numpy(np.array(block_table, dtype=np.int32))
        lens = [len(row.token_ids) for row in rows]
        slots = slot_mapping(table, [row.start for row in rows], lens, block_size, sum(lens))
        return replace(batch, attention=replace(batch.attention, slot_mapping=slots))

    return build


def check_slot_mapping(answer: Callable) -> str:
    """Judge an answer to 03.2."""
    number = judge(answer, _cases(), _right, EXERCISE.suspects)
    first = _case([[5, 2, 8], [6, 4, 1]], [3, 0], [2, 5], 4)
    second = _case([[7, 3, 0], [9, 2, 4]], [6, 1], [3, 4], 3, pad=2)
    what = "other requests have come, with other blocks"
    expect_nothing_kept(answer, one_by_one(first, second), _right, what)
    mine = counted(answer)
    line = engine_agrees(mine, build_batch=_build_batch_with(mine))
    return f"{number} steps; {line}"


EXERCISE = Exercise(
    id="03.2",
    title="Slot mapping",
    check=check_slot_mapping,
    mistakes=(
        Known(
            "ends-at-the-length",
            "A request's positions end at query_lens[i]. That is how many new tokens it has, not"
            " where they end: a request with many tokens in the cache stores none.\nThe range ends"
            " at starts[i] + query_lens[i].",
            hint=2,
            suspects=(_until_the_length,),
            answers=r"""
# %% range(start, n)
@@
-        for position in range(start, start + count):
+        for position in range(start, count):
""",
        ),
        Known(
            "wrong-block-size",
            "Your blocks have another size than the cache's.\nIt is the argument block_size, here"
            " and in the engine: no number of your own, and nothing that block_table's shape says.",
            hint=1,
            suspects=(
                *(_in_blocks_of(size) for size in (0, *SIZES)),
                *(_offsets_in_blocks_of(size) for size in SIZES[1:]),
            ),
            answers=r"""
# %% 16, as the engine has it
@@
-                table[position // block_size] * block_size + position % block_size
+                table[position // 16] * 16 + position % 16

# %% the table's width
@@
-        for position in range(start, start + count):
+        block_size = block_table.shape[1]
+        for position in range(start, start + count):
""",
        ),
        Known(
            "position-from-zero",
            "The new tokens of a request do not begin at position 0, but at starts[i]: what came"
            " before is in the cache, and you would write over it.\nThe j-th new token has"
            " position starts[i] + j.",
            hint=1,
            suspects=(_mapping(lambda t, p, j, size: _good(t, j, j, size)),),
            answers=r"""
# %% the new tokens are counted from 0
@@
-        for position in range(start, start + count):
+        for position in range(count):
""",
        ),
        Known(
            "one-position-late",
            "Your positions are one too large: you store the first new token where the second one"
            " belongs.\nThe first of them has position starts[i], the last starts[i] +"
            " query_lens[i] - 1.",
            hint=1,
            suspects=(
                _mapping(lambda t, p, j, size: _good(t, p + 1, j, size)),
                _mapping(
                    lambda t, p, j, size: (
                        _good(t, p + 1, j, size) if (p + 1) // size < len(t) else -1
                    )
                ),
            ),
            answers=r"""
# %% counted from 1
@@
-        for position in range(start, start + count):
+        for position in range(start + 1, start + count + 1):
""",
        ),
        Known(
            "table-from-its-first-entry",
            "You go through the table from its first entry on, though the new tokens begin at"
            " starts[i].\nThe entry is position // block_size, with the position in the whole"
            " request.",
            hint=1,
            suspects=(_mapping(lambda t, p, j, size: t[j // size] * size + p % size),),
            answers=r"""
# %% the entry is counted from the chunk's first token
@@
-                table[position // block_size] * block_size + position % block_size
+                table[(position - start) // block_size] * block_size
+                + position % block_size
""",
        ),
        Known(
            "table-not-divided",
            "You ask the table for entry number position. Its entries stand for blocks: entry 0 for"
            " the positions 0 to block_size - 1.\nThe entry is position // block_size.",
            hint=1,
            suspects=(_mapping(lambda t, p, j, size: t[p] * size + p % size),),
            answers=r"""
# %% an entry per token
@@
-                table[position // block_size] * block_size + position % block_size
+                table[position] * block_size + position % block_size
""",
        ),
        Known(
            "offset-from-the-chunk",
            "You count the offset from the first new token. A block is counted from position 0 of"
            " the request.\nThe offset is (starts[i] + j) % block_size.",
            hint=1,
            suspects=(_mapping(lambda t, p, j, size: t[p // size] * size + j % size),),
            answers=r"""
# %% the offset is counted from the chunk's first token
@@
-                table[position // block_size] * block_size + position % block_size
+                table[position // block_size] * block_size
+                + (position - start) % block_size
""",
        ),
        Known(
            "position-for-offset",
            "You add the whole position to the block's first slot. The block holds block_size"
            " tokens, and the earlier ones lie in other blocks.\nAdd position % block_size.",
            hint=1,
            suspects=(_mapping(lambda t, p, j, size: t[p // size] * size + p),),
            answers=r"""
# %% no remainder
@@
-                table[position // block_size] * block_size + position % block_size
+                table[position // block_size] * block_size + position
""",
        ),
        Known(
            "table-ignored",
            "Your slots are the positions themselves: as if the blocks lay in order from 0 on. The"
            " table says where they lie.\nLook up block_table[i, position // block_size].",
            hint=1,
            suspects=(_mapping(lambda t, p, j, size: p),),
            answers=r"""
# %% position taken for the slot
@@
-                table[position // block_size] * block_size + position % block_size
+                position // block_size * block_size + position % block_size
""",
        ),
        Known(
            "slots-in-a-row",
            "You give a request's new tokens consecutive slots. Right inside one block; the next"
            " block lies elsewhere: ask the table for every position.",
            hint=2,
            suspects=(_mapping(_from_first),),
            answers=r"""
# %% only the first slot is looked up
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        first = table[start // block_size] * block_size + start % block_size
        slots += range(first, first + count)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "block-not-a-slot",
            "You add the offset to the block's number. Block b begins at slot b ·"
            " block_size.\nMultiply first.",
            hint=1,
            suspects=(
                _mapping(lambda t, p, j, size: t[p // size] + p % size),
                _mapping(lambda t, p, j, size: t[p // size] + p),
            ),
            answers=r"""
# %% forgets to multiply
@@
-                table[position // block_size] * block_size + position % block_size
+                table[position // block_size] + position % block_size
""",
        ),
        Known(
            "no-offset",
            "All tokens of a block get its first slot: each writes over the one before.\nAdd"
            " position % block_size.",
            hint=1,
            suspects=(_mapping(lambda t, p, j, size: t[p // size] * size),),
            answers=r"""
# %% every token at its block's begin
@@
-                table[position // block_size] * block_size + position % block_size
+                table[position // block_size] * block_size
""",
        ),
        Known(
            "one-table-for-all",
            "You use the first request's blocks for all: they would write into its memory.\nRow i"
            " of block_table belongs to request i.",
            hint=2,
            suspects=(_mapping(_good, row=0),),
            answers=r"""
# %% the first request's blocks
@@
-                table[position // block_size] * block_size + position % block_size
+                int(block_table[0, position // block_size]) * block_size
+                + position % block_size
""",
        ),
        Known(
            "one-slot-per-request",
            "Each request got one slot, however many new tokens it has.\nRequest i needs"
            " query_lens[i] slots, one per new token: a loop in the loop.",
            hint=2,
            suspects=(_one_each(last=False), _one_each(last=True)),
            answers=r"""
# %% as in a decode step
@@
-        for position in range(start, start + count):
+        for position in [start + count - 1]:
""",
        ),
        Known(
            "one-token-too-many",
            "A request got one slot more than it has new tokens.\nIts last new token has position"
            " starts[i] + query_lens[i] - 1; `range` stops before its second number.",
            hint=2,
            suspects=(_one_more,),
            answers=r"""
# %% up to and with the end
@@
-        for position in range(start, start + count):
+        for position in range(start, start + count + 1):
""",
        ),
        Known(
            "padding-first",
            "The -1 stand before the slots.\nThe tokens come first, request after request, and -1"
            " fills up what is left behind them.",
            suspects=(_padding_first,),
        ),
        Known(
            "padded-with-zero",
            "You pad with 0. That is a slot like any other: the padded rows would write into block"
            " 0, which is somebody's.\nPad with -1: nowhere.",
            hint=3,
            suspects=(_mapping(_good, fill=0),),
            answers=r"""
# %% 0 seems harmless
@@
-    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
+    return torch.tensor(slots + [0] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "not-padded",
            "Behind the last token nothing is left, but the result must have pad_to"
            " entries.\nFill up with -1.",
            hint=3,
            suspects=(_mapping(_good, fill=None),),
            answers=r"""
# %% pad_to is not used
@@
-    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
+    return torch.tensor(slots, dtype=torch.int64)
""",
        ),
        Known(
            "int32-overflow",
            "A large slot came out as another, often negative number: block · block_size was"
            " computed in int32, which ends at 2,147,483,647.\nMake the entry a Python int, or use"
            " .long() before you multiply.",
            suspects=(_mapping(_wrapped),),
            answers=r"""
# %% int32 times a number is int32
@@
-    for table, start, count in zip(block_table.tolist(), starts, query_lens):
+    for table, start, count in zip(block_table, starts, query_lens):
""",
        ),
        Known(
            "wrong-dtype",
            answers=r"""
# %% as int32, like the table
@@
-    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
+    slots = torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
+    return slots.to(block_table.dtype)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% starts is counted up
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for i, table in enumerate(block_table.tolist()):
        for _ in range(query_lens[i]):
            index, offset = divmod(starts[i], block_size)
            slots.append(table[index] * block_size + offset)
            starts[i] += 1
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "raised",
            answers=r"""
# %% looks the next block up at the end of a block, which may be the table's end
@@
+            if (position + 1) % block_size == 0:
+                following = table[(position + 1) // block_size]
             slots.append(

# %% looks up the block behind the last token
@@
-        for position in range(start, start + count):
+        following = table[(start + count) // block_size]
+        for position in range(start, start + count):
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% results are remembered by all arguments but the table
KNOWN = {}


def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    key = tuple(starts), tuple(query_lens), block_size, pad_to
    if key in KNOWN:
        return KNOWN[key].clone()
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for position in range(start, start + count):
            slots.append(
                table[position // block_size] * block_size + position % block_size
            )
    KNOWN[key] = torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
    return KNOWN[key].clone()

# %% tables are remembered by their address
TABLES = {}


def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    key = block_table.data_ptr(), block_table.shape
    _, tables = TABLES.setdefault(key, (block_table, block_table.tolist()))
    slots = []
    for table, start, count in zip(tables, starts, query_lens):
        for position in range(start, start + count):
            slots.append(
                table[position // block_size] * block_size + position % block_size
            )
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "result-reused",
            answers=r"""
# %% a buffer for each length, as with CUDA graphs
BUFFERS = {}


def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for position in range(start, start + count):
            slots.append(
                table[position // block_size] * block_size + position % block_size
            )
    if pad_to not in BUFFERS:
        BUFFERS[pad_to] = torch.empty(pad_to, dtype=torch.int64)
    out = BUFFERS[pad_to].fill_(-1)
    out[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
    return out
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% the table in float32
@@
-    for table, start, count in zip(block_table.tolist(), starts, query_lens):
+    tables = block_table.float().long().tolist()
+    for table, start, count in zip(tables, starts, query_lens):

# %% slots of 40 bits
@@
-                table[position // block_size] * block_size + position % block_size
+                (table[position // block_size] * block_size + position % block_size)
+                % 2**40
""",
        ),
    ),
    right=r"""
# %% vectorised
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    lens, begin = torch.tensor(query_lens), torch.tensor(starts)
    row = torch.repeat_interleave(torch.arange(len(query_lens)), lens)
    first = torch.cumsum(lens, 0) - lens
    positions = torch.arange(len(row)) - first[row] + begin[row]
    out = torch.full((pad_to,), -1, dtype=torch.int64)
    out[: len(row)] = (
        block_table[row, positions // block_size].long() * block_size
        + positions % block_size
    )
    return out

# %% divmod, and a tensor written in place
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    out, at = torch.full((pad_to,), -1), 0
    for i, start in enumerate(starts):
        for position in range(start, start + query_lens[i]):
            index, offset = divmod(position, block_size)
            out[at] = int(block_table[i][index]) * block_size + offset
            at += 1
    return out
""",
)
