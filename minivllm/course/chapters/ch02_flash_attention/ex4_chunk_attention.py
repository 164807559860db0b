"""02.4: debug this: the chunk that forgets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch02_flash_attention.common import (
    exact,
    the_inputs,
    the_suspects,
    the_walk,
)
from minivllm.course.grading.exercise import Exercise, Known


def check_chunk_attention(answer: Callable) -> str:
    from minivllm.viz.tiles import attention_tiles

    shapes = [
        (1, 1, 4),
        (16, 16, 16),
        (16, 16, 4),
        (30, 30, 8),
        (1, 33, 8),
        (8, 40, 8),
        (16, 56, 8),
        (13, 50, 8),
        (40, 41, 16),
    ]
    cases = [(*the_inputs(q, n, 8, 100 + seed), block) for seed, (q, n, block) in enumerate(shapes)]

    def right(query: Any, key: Any, value: Any, scale: float, block: int) -> Any:
        return exact(query, key, value, scale)

    def square(walk: Callable) -> Callable:
        return lambda query, key, value, scale, block: walk(query, key, value, scale, block, block)

    walks = the_suspects(square)
    suspects = {
        "mask-spoilt-instead": (
            (
                "The walk comes far enough now, but the mask has been moved to the start: queries"
                " of a chunk see its first keys only.\nThe mask was right as it stood: key > past +"
                " row. Undo that."
            ),
            square(partial(the_walk, wrong="mask-from-start")),
        ),
        "walk-ends-too-early": walks["walk-ends-too-early"],
        "all-walks-end-alike": (
            (
                "All walks end where the first one does: the tiles further down miss the chunk's"
                " own tokens before them.\nThe end depends on the tile of queries, `top`, as well"
                " as on the past."
            ),
            square(partial(the_walk, wrong="walk-of-the-first")),
        ),
        **{name: suspect for name, suspect in walks.items() if name != "walk-ends-too-early"},
    }
    number = diagnose(lambda *args: answer(*args), cases, right, suspects)
    for (q, n, block), case in zip(shapes, cases, strict=True):
        tiles, visited = attention_tiles(q, n, block, block).kinds, []
        answer(*case, visited=visited)
        needed = {
            (i * block, j * block)
            for i, row in enumerate(tiles)
            for j, kind in enumerate(row)
            if kind != "skipped"
        }
        where = f"A chunk of {q} after {n - q}, tiles of {block}: "
        expect(
            set(visited) >= needed,
            "visited-not-noted",
            f"{where}of the tiles that are needed ({len(needed)}) only {len(set(visited) & needed)}"
            " stand in `visited`.\nThe result is right; leave the line that notes (top, first)"
            " where a tile is visited.",
        )
        wasted = len(set(visited) - needed)
        expect(
            not wasted,
            "visits-the-future",
            f"{where}the result is right, but {wasted} of {len(visited)} visited tiles hold nothing"
            " but the future.\nA walk ends at the position of the tile's last query, not at the"
            " end of the context.",
        )
    return f"{number} chunks, every tile visited that is needed, and no other"


EXERCISE = Exercise(
    id="02.4",
    title="Debug this: the chunk that forgets",
    check=check_chunk_attention,
    mistakes=(
        Known(
            "walk-ends-too-early",
            hint=2,
            answers=r'''
# %% as it came
@@
-            0, min(past + top + block, len(key)), block
+            0, min(top + block, len(key)), block

# %% the length of the queries for that of the keys
@@
-    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
@@
-            0, min(past + top + block, len(key)), block
+            0, min(past + top + block, len(query)), block
''',
        ),
        Known(
            "mask-spoilt-instead",
            hint=2,
            answers=r"""
# %% the walk mended, and the mask changed with it
@@
-            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+            scores = scores.masked_fill(columns > rows[:, None], -math.inf)

# %% mask and walk both without a past
@@
-            0, min(past + top + block, len(key)), block
+            0, min(top + block, len(key)), block
@@
-            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
+            scores = scores.masked_fill(columns > rows[:, None], -math.inf)
""",
        ),
        Known(
            "stops-before-the-diagonal",
            hint=3,
            answers=r'''
# %% up to the past and the tile's first row
@@
-            0, min(past + top + block, len(key)), block
+            0, (past + top) // block * block, block

# %% up to the position of the first query
@@
-    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
@@
-        for first in range(
-            0, min(past + top + block, len(key)), block
-        ):  # … walks along the keys
+        for first in range(0, past + top, block):  # … walks along the keys
''',
        ),
        Known(
            "all-walks-end-alike",
            hint=3,
            answers=r"""
# %% top is gone
@@
-            0, min(past + top + block, len(key)), block
+            0, min(past + block, len(key)), block
""",
        ),
        Known(
            "visits-the-future",
            hint=3,
            answers=r"""
# %% simply all keys
@@
-        for first in range(
-            0, min(past + top + block, len(key)), block
-        ):  # … walks along the keys
+        for first in range(0, len(key), block):  # … walks along the keys

# %% all keys, but for the last tile
@@
-            0, min(past + top + block, len(key)), block
+            0, min(past + len(query), len(key)), block
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
            answers=r'''
# %% up to the position of the last query, which range leaves out
@@
-    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
@@
-        for first in range(
-            0, min(past + top + block, len(key)), block
-        ):  # … walks along the keys
+        for first in range(0, past + int(rows[-1]), block):  # … walks along the keys
''',
        ),
        Known(
            "walks-beyond-the-context",
            hint=3,
            answers=r'''
# %% no min at the end of the context
@@
-    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
@@
-        for first in range(
-            0, min(past + top + block, len(key)), block
-        ):  # … walks along the keys
+        for first in range(0, past + top + block, block):  # … walks along the keys
''',
        ),
        Known(
            "past-not-visited",
            hint=2,
            answers=r'''
# %% the walk begins where the chunk does
@@
-    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
@@
-            0, min(past + top + block, len(key)), block
+            past, min(past + top + block, len(key)), block
''',
        ),
    ),
    right=r"""
# %% by the last row
@@
-            0, min(past + top + block, len(key)), block
+            0, past + int(rows[-1]) + 1, block

# %% all keys, with a break
@@
-        for first in range(
-            0, min(past + top + block, len(key)), block
-        ):  # … walks along the keys
+        for first in range(0, len(key), block):  # … walks along the keys
+            if first > past + rows[-1]:
+                break
""",
)
