"""03.2: slot mapping."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.judges import counted, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch03_paged_kv_cache.common import SIZES, the_diagnose
from minivllm.course.grading.exercise import Exercise, Known


def check_slot_mapping(answer: Callable) -> str:
    import torch

    def case(
        blocks: list[list[int]], starts: list[int], lens: list[int], size: int, pad: int = 0
    ) -> tuple:
        width = max(map(len, blocks)) + 1  # stale entries behind those in use, as in a real table
        table = [row + [77 + i] * (width - len(row)) for i, row in enumerate(blocks)]
        return torch.tensor(table, dtype=torch.int32), starts, lens, size, sum(lens) + pad

    order = torch.randperm(30, generator=seeded(2)).tolist()
    cases = [
        case([[5, 2]], [0], [6], 4),
        case([[5, 2]], [3], [2], 4, pad=1),
        case([[0, 1, 2]], [0], [9], 4),
        case([[3]], [0], [1], 16),
        case([[9, 4, 6, 8]], [8], [8], 4, pad=2),
        case([[4, 0, 2]], [2], [1], 1, pad=3),
        case([[8, 1, 3], [6, 2], [7, 5, 9]], [7, 4, 0], [1, 1, 9], 4, pad=5),
        case(
            [order[:5], order[5:8], order[8:10], order[10:]], [70, 40, 16, 100], [1, 1, 3, 190], 16
        ),
    ]

    def slots(
        table: Any,
        starts: list,
        lens: list,
        size: int,
        pad_to: int,
        slot: Callable,
        row: Any = None,
        fill=-1,
    ) -> Any:
        found = []
        for i, (start, count) in enumerate(zip(starts, lens, strict=True)):
            entries = table[i if row is None else row].tolist()
            entries = entries + [0] * (start + count)  # a wrong slot may look beyond the table
            found += [slot(entries, start + j, j, size) for j in range(count)]
        return torch.tensor(
            found + [fill] * (pad_to - len(found) if fill is not None else 0), dtype=torch.int64
        )

    def good(t: list[int], p: int, j: int, size: int) -> int:
        return t[p // size] * size + p % size

    def right(
        block_table: Any, starts: list, query_lens: list, block_size: int, pad_to: int
    ) -> torch.Tensor:
        return slots(block_table, starts, query_lens, block_size, pad_to, good)

    def until(
        block_table: Any, starts: list, query_lens: list, block_size: int, pad_to: int
    ) -> torch.Tensor:
        left = [max(0, count - start) for start, count in zip(starts, query_lens, strict=True)]
        return right(block_table, starts, left, block_size, pad_to)

    def in_blocks_of(size: int) -> Callable:
        """With another block size; 0: the table's width. A look-up beyond the table fails, as an
        answer's does.
        """

        def wrong(
            block_table: Any, starts: list, query_lens: list, block_size: int, pad_to: int
        ) -> torch.Tensor:
            def slot(table: Any, p: int, j: int, _: int) -> int:
                return good(table[: block_table.shape[1]], p, j, size or block_table.shape[1])

            return slots(block_table, starts, query_lens, block_size, pad_to, slot)

        return wrong

    suspects = {
        "ends-at-the-length": (
            (
                "A request's positions end at query_lens[i]. That is how many new tokens it has,"
                " not where they end: a request with many tokens in the cache stores none.\nThe"
                " range ends at starts[i] + query_lens[i]."
            ),
            until,
        ),
        "wrong-block-size": (
            (
                "Your blocks have another size than the cache's.\nIt is the argument block_size,"
                " here and in the engine: no number of your own, and nothing that block_table's"
                " shape says."
            ),
            *(in_blocks_of(size) for size in (0, *SIZES)),
        ),
        "position-from-zero": (
            (
                "The new tokens of a request do not begin at position 0, but at starts[i]: what"
                " came before is in the cache, and you would write over it.\nThe j-th new token has"
                " position starts[i] + j."
            ),
            partial(slots, slot=lambda t, p, j, size: good(t, j, j, size)),
        ),
        "table-from-its-first-entry": (
            (
                "You go through the table from its first entry on, though the new tokens begin at"
                " starts[i].\nThe entry is position // block_size, with the position in the whole"
                " request."
            ),
            partial(slots, slot=lambda t, p, j, size: t[j // size] * size + p % size),
        ),
        "offset-from-the-chunk": (
            (
                "You count the offset from the first new token. A block is counted from position 0"
                " of the request.\nThe offset is (starts[i] + j) % block_size."
            ),
            partial(slots, slot=lambda t, p, j, size: t[p // size] * size + j % size),
        ),
        "table-ignored": (
            (
                "Your slots are the positions themselves: as if the blocks lay in order from 0 on."
                " The table says where they lie.\nLook up block_table[i, position // block_size]."
            ),
            partial(slots, slot=lambda t, p, j, size: p),
        ),
        "slots-in-a-row": (
            (
                "You give a request's new tokens consecutive slots. Right inside one block; the"
                " next block lies elsewhere: ask the table for every position."
            ),
            partial(slots, slot=lambda t, p, j, size: good(t, p - j, 0, size) + j),
        ),
        "block-not-a-slot": (
            (
                "You add the offset to the block's number. Block b begins at slot b ·"
                " block_size.\nMultiply first."
            ),
            partial(slots, slot=lambda t, p, j, size: t[p // size] + p % size),
        ),
        "no-offset": (
            (
                "All tokens of a block get its first slot: each writes over the one before.\nAdd"
                " position % block_size."
            ),
            partial(slots, slot=lambda t, p, j, size: t[p // size] * size),
        ),
        "one-table-for-all": (
            (
                "You use the first request's blocks for all: they would write into its memory.\nRow"
                " i of block_table belongs to request i."
            ),
            partial(slots, slot=good, row=0),
        ),
        "padded-with-zero": (
            (
                "You pad with 0. That is a slot like any other: the padded rows would write into"
                " block 0, which is somebody's.\nPad with -1: nowhere."
            ),
            partial(slots, slot=good, fill=0),
        ),
        "not-padded": (
            (
                "Behind the last token nothing is left, but the result must have pad_to"
                " entries.\nFill up with -1."
            ),
            partial(slots, slot=good, fill=None),
        ),
    }
    the_diagnose(answer, cases, right, suspects)
    mine = counted(answer)
    line = engine_agrees(mine, build_batch=_build_batch_with(mine))
    return f"{len(cases)} steps; {line}"


def _build_batch_with(slot_mapping: Callable) -> Callable:
    """The package's build_batch, with a learner's slot mapping."""
    import numpy as np
    import torch

    from minivllm.engine.batch import build_batch

    def build(rows: abc.Sequence, block_table: np.ndarray, block_size: int) -> Any:
        batch = build_batch(rows, block_table, block_size)
        table = torch.from_numpy(np.array(block_table, dtype=np.int32))
        lens = [len(row.token_ids) for row in rows]
        slots = slot_mapping(table, [row.start for row in rows], lens, block_size, sum(lens))
        return replace(batch, attention=replace(batch.attention, slot_mapping=slots))

    return build


EXERCISE = Exercise(
    id="03.2",
    title="Slot mapping",
    check=check_slot_mapping,
    mistakes=(
        Known(
            "position-from-zero",
            hint=1,
            answers=r"""
# %% the new tokens are counted from 0
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[i // block_size] * block_size + i % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "table-from-its-first-entry",
            hint=1,
            answers=r"""
# %% the entry is counted from the chunk's first token
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[i // block_size] * block_size + position % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "offset-from-the-chunk",
            hint=1,
            answers=r"""
# %% the offset is counted from the chunk's first token
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] * block_size + i % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "table-ignored",
            hint=1,
            answers=r"""
# %% position taken for the slot
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(position)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "block-not-a-slot",
            hint=1,
            answers=r"""
# %% forgets to multiply
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] + position % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "no-offset",
            hint=1,
            answers=r"""
# %% every token at its block's begin
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] * block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
""",
        ),
        Known(
            "one-table-for-all",
            hint=2,
            answers=r'''
# %% the first request's blocks
@@
-    """Slots of a step's new tokens, request after request: [pad_to] int64, -1 behind the last token."""
@@
-        for position in range(start, start + count):
+        for i in range(count):
+            position = start + i
@@
-                table[position // block_size] * block_size + position % block_size
+                block_table[0, position // block_size] * block_size
+                + position % block_size
''',
        ),
        Known(
            "padded-with-zero",
            hint=3,
            answers=r'''
# %% 0 seems harmless
@@
-    """Slots of a step's new tokens, request after request: [pad_to] int64, -1 behind the last token."""
@@
-        for position in range(start, start + count):
+        for i in range(count):
+            position = start + i
@@
-    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
+    return torch.tensor(slots + [0] * (pad_to - len(slots)), dtype=torch.int64)
''',
        ),
        Known(
            "not-padded",
            hint=3,
            answers=r'''
# %% pad_to is not used
@@
-    """Slots of a step's new tokens, request after request: [pad_to] int64, -1 behind the last token."""
@@
-        for position in range(start, start + count):
+        for i in range(count):
+            position = start + i
@@
-    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
+    return torch.tensor(slots + [], dtype=torch.int64)
''',
        ),
        Known(
            "wrong-dtype",
            answers=r'''
# %% as int32, like the table
@@
-    """Slots of a step's new tokens, request after request: [pad_to] int64, -1 behind the last token."""
@@
-        for position in range(start, start + count):
+        for i in range(count):
+            position = start + i
@@
-    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)
+    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int32)
''',
        ),
        Known(
            "slots-in-a-row",
            hint=2,
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
            "wrong-block-size",
            hint=3,
            answers=r'''
# %% 16, as the engine has it
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // 16] * 16 + position % 16)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)

# %% 4, as in the example
def slot_mapping(
    block_table: torch.Tensor,
    starts: list[int],
    query_lens: list[int],
    block_size: int,
    pad_to: int,
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // 4] * 4 + position % 4)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)

# %% the table's width
@@
-    """Slots of a step's new tokens, request after request: [pad_to] int64, -1 behind the last token."""
@@
-        for position in range(start, start + count):
+        for i in range(count):
+            position = start + i
@@
-                table[position // block_size] * block_size + position % block_size
+                table[position // block_table.shape[1]] * block_table.shape[1]
+                + position % block_table.shape[1]
''',
        ),
        Known(
            "ends-at-the-length",
            hint=3,
            answers=r'''
# %% range(start, n)
@@
-    """Slots of a step's new tokens, request after request: [pad_to] int64, -1 behind the last token."""
@@
-        for position in range(start, start + count):
+        for position in range(start, count):
''',
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
            out[at] = block_table[i][index] * block_size + offset
            at += 1
    return out
""",
)
