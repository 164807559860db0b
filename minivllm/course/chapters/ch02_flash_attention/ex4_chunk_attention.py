"""02.4: debug this: the chunk that forgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minivllm.course.chapters.ch02_flash_attention.cases import (
    Head,
    faint,
    giants,
    long,
    plain,
    steep,
)
from minivllm.course.chapters.ch02_flash_attention.common import Case, judge, walks
from minivllm.course.chapters.ch02_flash_attention.walk import Walk, exact
from minivllm.course.chapters.ch02_flash_attention.watch import expect_own_attention, watch
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect


def _heads() -> list[tuple[Head, int]]:
    """Inputs, and the size of the tiles."""
    shapes = [
        # queries, keys, block
        (1, 1, 4),
        (16, 16, 16),
        (16, 16, 4),
        (30, 30, 8),
        (1, 33, 8),
        (8, 40, 8),
        (16, 56, 8),
        (13, 50, 8),
        (40, 41, 16),
        (11, 47, 5),
        (70, 330, 64),
    ]
    heads = [(plain(q, n, 8, 100 + seed), block) for seed, (q, n, block) in enumerate(shapes)]
    return [
        *heads,
        (steep(8, 120), 4),
        (giants(8, 121), 4),
        (giants(8, 126), 16),
        (plain(200, 300, 8, 127), 80),
        (plain(9, 31, 8, 123, scale=1.0), 8),
        (long(5, 1300, 8, 122), 4),
        (long(3, 33_001, 4, 124), 128),
        (faint(8, 125), 16),
    ]


def _right(query: Any, key: Any, value: Any, scale: float, block: int) -> Any:
    return exact(query, key, value, scale)


def _expect_visits(answer: Callable, head: Head, block: int) -> None:
    """`visited` must name each tile that is needed, once, and no other."""
    from minivllm.viz.tiles import attention_tiles

    queries, keys = len(head.query), len(head.key)
    visited: list[tuple[int, int]] = []
    answer(*head.args, block, visited=visited)
    kinds = attention_tiles(queries, keys, block, block).kinds
    needed = {
        (i * block, j * block)
        for i, row in enumerate(kinds)
        for j, kind in enumerate(row)
        if kind != "skipped"
    }
    noted = set(visited)
    where = f"A chunk of {queries} after {keys - queries}, tiles of {block}: "
    expect(
        noted >= needed,
        "visited-not-noted",
        f"{where}of the {len(needed)} tiles that are needed only {len(noted & needed)} stand in"
        " `visited`.\nThe result is right; leave the line that notes (top, first) where a tile is"
        " visited.",
    )
    wasted = len(visited) - len(needed)
    expect(
        not wasted,
        "visits-the-future",
        f"{where}the result is right, but {wasted} of {len(visited)} visits were for nothing: those"
        " tiles hold nothing but the future, or had been visited before.\nA walk ends at the"
        " position of the tile's last query, not at the end of the context.",
    )


def _expect_real_walk(answer: Callable) -> None:
    """What `visited` says must be what was multiplied."""
    head, block = plain(16, 56, 4, 130), 8
    query, key, value, scale = head.args
    args = (query, key, value, scale, block)
    seen = watch(answer, *args, query=query, key=key, value=value, dim=4)
    expect_own_attention(seen)
    expect(
        seen.products == 13 * [(block, block)],
        "walks-otherwise",
        f"A chunk of 16 after 40, tiles of {block}: the result is right, but queries and keys are"
        f" multiplied {len(seen.products)} times, and 13 tiles are needed, each of {block} ×"
        f" {block}.\nMend the walk that is there; `visited` must say what it really does.",
    )


def check_chunk_attention(answer: Callable) -> str:
    """Judge an answer to 02.4."""
    heads = _heads()

    def attend(query: Any, key: Any, value: Any, scale: float) -> Any:
        return answer(query, key, value, scale, 4)

    cases = [Case((*head.args, block), head.about) for head, block in heads]
    number = judge(EXERCISE, lambda *args: answer(*args), cases, _right, attend)
    for head, block in heads:
        _expect_visits(answer, head, block)
    _expect_real_walk(answer)
    return f"{number} chunks, every tile visited that is needed, and no other"


def _square(walk: Walk) -> Callable:
    """The walk in tiles that have as many keys as queries."""
    return lambda query, key, value, scale, block: walk(query, key, value, scale, block, block)


def _use(name: str, walk: Walk) -> Sequence[Callable]:
    return (_square(walk),)


EXERCISE = Exercise(
    id="02.4",
    title="Debug this: the chunk that forgets",
    check=check_chunk_attention,
    mistakes=walks(
        _use,
        Known(
            "walk-ends-too-early",
            hint=2,
            answers=r"""
# %% as it came
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, min(top + block, len(key)), block):

# %% the length of the queries for that of the keys
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, min(past + top + block, len(query)), block):
""",
        ),
        Known(
            "mask-spoilt-instead",
            "The walk comes far enough now, but the mask has been moved to the start: queries of a"
            " chunk see its first keys only.\nThe mask was right as it stood: key > past + row."
            " Undo that.",
            hint=2,
            suspects=(_square(Walk.of("mask-from-start")),),
            answers=r"""
# %% the walk mended, and the mask changed with it
@@
-            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+            scores = scores.masked_fill(columns > rows[:, None], -math.inf)

# %% mask and walk both without a past
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, min(top + block, len(key)), block):
@@
-            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+            scores = scores.masked_fill(columns > rows[:, None], -math.inf)
""",
        ),
        Known(
            "stops-before-the-diagonal",
            hint=3,
            answers=r"""
# %% up to the past and the tile's first row
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, (past + top) // block * block, block):

# %% up to the position of the first query
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, past + top, block):
""",
        ),
        Known(
            "all-walks-end-alike",
            "All walks end where the first one does: the tiles further down miss the chunk's own"
            " tokens before them.\nThe end depends on the tile of queries, `top`, as well as on the"
            " past.",
            hint=3,
            suspects=(_square(Walk.of("walk-of-the-first")),),
            answers=r"""
# %% top is gone
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, min(past + block, len(key)), block):
""",
        ),
        Known(
            "visits-the-future",
            hint=3,
            answers=r"""
# %% simply all keys
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, len(key), block):

# %% all keys, but for the last tile
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, min(past + len(query), len(key)), block):
""",
        ),
        Known(
            "visited-not-noted",
            answers=r"""
# %% the notes thrown away
@@
-            if visited is not None:
-                visited.append((top, first))
""",
        ),
        Known(
            "stops-one-short",
            hint=3,
            answers=r"""
# %% up to the position of the last query, which range leaves out
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, past + int(rows[-1]), block):
""",
        ),
        Known(
            "walks-beyond-the-context",
            hint=3,
            answers=r"""
# %% no min at the end of the context
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, past + top + block, block):
""",
        ),
        Known(
            "walks-otherwise",
            answers=r"""
# %% the right notes, and the whole matrix at once
def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    block: int = 16,
    visited: list | None = None,
) -> torch.Tensor:
    past = len(key) - len(query)
    for top in range(0, len(query), block):
        for first in range(0, min(past + top + block, len(key)), block):
            if visited is not None:
                visited.append((top, first))
    hidden = torch.arange(len(key)) > torch.arange(past, len(key))[:, None]
    scores = (query @ key.T * scale).masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ value
""",
        ),
        Known(
            "keys-counted-twice",
            answers=r"""
# %% the past, and then from the tile on in which it ends
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        end = min(past + top + block, len(key))
+        for first in [
+            *range(0, past, block),
+            *range(past // block * block, end, block),
+        ]:
""",
        ),
        Known(
            "keys-left-out",
            answers=r"""
# %% the last eight tiles
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        end = min(past + top + block, len(key))
+        for first in range(max(0, (end - 8 * block) // block * block), end, block):

# %% notes all tiles, and multiplies those of the last 2,048 tokens
@@
-            columns = torch.arange(first, min(first + block, len(key)))
+            if first < past + top - 2048:
+                continue
+            columns = torch.arange(first, min(first + block, len(key)))
""",
        ),
        Known(
            "past-not-visited",
            hint=2,
            answers=r"""
# %% the walk begins where the chunk does
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(past, min(past + top + block, len(key)), block):
""",
        ),
    ),
    right=r"""
# %% by the last row
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, past + int(rows[-1]) + 1, block):

# %% all keys, with a break
@@
-        for first in range(0, min(past + top + block, len(key)), block):
+        for first in range(0, len(key), block):
+            if first > past + rows[-1]:
+                break
""",
)
