"""03.6: a Triton kernel that splits."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch03_paged_kv_cache.common import (
    NO_BLOCK,
    WEIGHTS_ARE_RIGHT,
    judge,
    pages,
    weights_seen,
)
from minivllm.course.chapters.ch03_paged_kv_cache.splits import (
    Splits,
    in_other_blocks,
    joined,
    splits,
)
from minivllm.course.grading.accesses import Accesses, accesses
from minivllm.course.grading.compare import difference
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.guard import guarded
from minivllm.course.grading.isolated import isolated
from minivllm.course.grading.judges import counted, expect_triton, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import numpy as np
    import torch


#: Numbers that are taken for -inf.
_STARTS = ("-1e3", "-1e4", "-1e5", "-1e6", "-1e9", "-1e10", "-1e30", "-1e38")

# --- cases ----------------------------------------------------------------------------------------


def _case(
    contexts: list[int],
    shape: tuple[int, int, int],
    group: int,
    tile: int,
    num_splits: int,
    *,
    junk: str = "nan",
    loud: float = 2.0,
) -> tuple:
    """Arguments of `_Kernel`. shape: KV heads, block size, D. loud: how large queries are.

    One request's queries lie further apart than they need to.
    """
    import torch

    kv_heads, _, dim = shape
    caches = pages(contexts, shape, sum(contexts) + num_splits, junk=junk, stale=NO_BLOCK)
    heads = kv_heads * group
    wide = guarded(len(contexts), heads + 2, dim)
    random = seeded(600 + sum(contexts) + tile)
    wide.copy_(torch.randn(wide.shape, generator=random) * loud)
    return wide[:, :heads], *caches, 0.3, (tile, num_splits)


def _deep(factor: float = 1.0) -> tuple:
    """A case whose scores are all about -12,000 · factor. Its numbers are exact in float32.

    With a factor, all scores of a request are equal, and there is one split: a log-sum-exp of that
    size has no room for the number of tokens, so splits of unequal length could not be merged.

    One context fills its tiles: there it does not matter with what others are masked.
    """
    import torch

    case = _case([5, 9, 8], (1, 4, 16), 1, 4, 2 if factor == 1 else 1)
    case[0].fill_(-2048.0 * factor)
    keys = case[1]
    steps = torch.randint(0, 2, keys.shape, generator=seeded(5)) / 1024 * (factor == 1)
    keys.copy_(torch.where(keys.isnan(), keys, 1.5 + steps))
    return (*case[:5], 0.25, case[6])


def _cases() -> list[tuple]:
    return [
        _case([8], (1, 4, 16), 1, 4, 1),
        _case([11], (1, 4, 16), 1, 4, 1),
        _case([11], (1, 4, 16), 1, 4, 1, junk="numbers"),
        _case([16, 32], (1, 8, 16), 2, 8, 2),
        _case([9, 16], (2, 8, 16), 2, 4, 1),
        _case([13, 24], (2, 4, 16), 2, 8, 1),
        _case([26, 5], (1, 8, 16), 2, 4, 3),
        _case([40, 3], (2, 8, 16), 1, 16, 2, junk="numbers"),
        _case([5, 0], (1, 4, 16), 2, 4, 4),
        _case([24, 19], (1, 8, 16), 2, 8, 2, loud=200.0),
        _case([7, 33], (3, 16, 8), 1, 4, 3),
        _case([130], (1, 4, 8), 1, 4, 2),
        _case([270], (1, 16, 32), 1, 16, 3),
    ]


def _long() -> tuple:
    """A context of 263 tiles: a second of the interpreter's time."""
    return _case([4200], (1, 32, 4), 1, 16, 1)


# --- launching ------------------------------------------------------------------------------------


@dataclass
class _Kernel:
    """The learner's kernel as a function of the arguments of `_case`.

    hidden: (how large the case is, what was loaded though it holds no token of the context, in
    words), for the launches so far.
    """

    kernel: Any
    hidden: list[tuple[int, str]] = field(default_factory=list)

    def __call__(self, *case: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, seen = self.launch(case)
        self._note_hidden(case, seen)
        return joined(out, lse)

    def launch(
        self, case: tuple, reads: dict[tuple, tuple[int, int]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Accesses]:
        """(out, lse, what was read and written).

        reads: is filled by `_by_program`. Mistake where the kernel writes outside, or where some
        programs write nothing.
        """
        import torch

        query, k_cache, v_cache, table, lens, scale, (tile, num_splits) = case
        batch, heads, dim = query.shape
        kv_heads, size = k_cache.shape[1:3]
        out, lse = guarded(num_splits, batch, heads, dim), guarded(num_splits, batch, heads)
        poison = lse.view(torch.int32).clone()
        tensors = {
            "out": out,
            "lse": lse,
            "query": _whole(query),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": _whole(table),
            "seq_lens": lens,
        }
        with contextlib.ExitStack() as watch:
            seen = watch.enter_context(accesses(**tensors))
            if reads is not None:
                watch.enter_context(_by_program(seen, k_cache, reads))
            self.kernel[(batch, heads, num_splits)](
                out,
                lse,
                query,
                k_cache,
                v_cache,
                table,
                lens,
                scale,
                query.stride(0),
                table.stride(0),
                num_splits,
                KH=kv_heads,
                GROUP=heads // kv_heads,
                D=dim,
                SIZE=size,
                TILE=tile,
            )
        if seen.written_outside:
            raise EXERCISE.mistake(
                "out-of-bounds-write",
                f"Your kernel writes outside of its tensors: {seen.written_outside[0]}"
                f" ({_sizes(case)}).",
            )
        nothing = lse.view(torch.int32) == poison
        if nothing.any() and not nothing.all() and out[nothing].isnan().all():
            split, request, head = nothing.nonzero()[0].tolist()
            raise EXERCISE.mistake(
                "empty-split-wrote-nothing",
                f"Program (request {request}, head {head}, split {split}) wrote nothing"
                f" ({_sizes(case)}).",
            )
        return out, lse, seen

    def _note_hidden(self, case: tuple, seen: Accesses) -> None:
        """Note loads of what holds no token of a context."""
        _, k_cache, _, table, lens, _, (tile, _) = case
        entries, slots = _allowed(k_cache, table, lens.tolist())
        size = k_cache.shape[2]
        found = []
        for name in ("k_cache", "v_cache"):
            read = seen.read[name].reshape(*k_cache.shape).any(axis=(1, 3))
            beyond = (read & ~slots).nonzero()
            if len(beyond[0]):
                slot = int(beyond[0][0]) * size + int(beyond[1][0])
                found.append(f"{name} was loaded at slot {slot}, which holds no token of a context")
        stale = seen.read["block_table"] & ~entries
        if stale.any():
            found.append("an entry of block_table was loaded that no context needs")
        found += [f"{place} was loaded" for place in seen.read_outside[:1]]
        if found:
            self.hidden.append((sum(lens.tolist()) * tile, f"{found[0]} ({_sizes(case)})"))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All numbers that lie in the memory of a tensor that is a part of another one."""
    import torch

    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor, (count,), (1,), 0)


def _allowed(
    k_cache: torch.Tensor, table: torch.Tensor, contexts: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(entries of the table's memory that are needed, slots ``[num_blocks, block_size]``)."""
    import numpy as np

    size = k_cache.shape[2]
    entries = np.zeros(len(_whole(table)), dtype=bool)
    slots = np.zeros((len(k_cache), size), dtype=bool)
    for i, context in enumerate(contexts):
        tokens = np.arange(context)
        slots[table[i].numpy()[tokens // size], tokens % size] = True
        first = table.storage_offset() + i * table.stride(0)
        entries[first : first - (-context // size)] = True
    return entries, slots


def _sizes(case: tuple) -> str:
    _, k_cache, _, _, lens, _, (tile, num_splits) = case
    return (
        f"contexts {lens.tolist()}, KH = {k_cache.shape[1]}, SIZE = {k_cache.shape[2]}, TILE ="
        f" {tile}, num_splits = {num_splits}"
    )


# --- judging --------------------------------------------------------------------------------------


def _right(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    block_table: Any,
    seq_lens: Any,
    scale: float,
    tile_and_num_splits: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    case = query, k_cache, v_cache, block_table, seq_lens, scale, tile_and_num_splits
    return Splits()(*case)


@contextlib.contextmanager
def _by_program(
    seen: Accesses, k_cache: torch.Tensor, reads: dict[tuple, tuple[int, int]]
) -> Iterator[None]:
    """Note in reads what each program loads of the key cache, by its place in the grid.

    (how many numbers, in how many loads); loads whose mask hides everything count, too.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import interpreter_builder

    original, load = interpreter_builder.set_grid_idx, interpreter_builder.create_masked_load
    place, loads = [], [0]
    begin = k_cache.data_ptr()
    end = begin + k_cache.numel() * k_cache.element_size()

    def note() -> None:
        rows = seen.read["k_cache"]
        if place:
            reads[place.pop()] = int(rows.sum()), loads[0]
        rows[:] = False
        loads[0] = 0

    def setting(*at: int) -> None:
        note()
        place.append(at)
        original(*at)

    def loading(ptrs: Any, *more: Any) -> Any:
        address = ptrs.data
        loads[0] += bool(((address >= begin) & (address < end)).any())
        return load(ptrs, *more)

    interpreter_builder.set_grid_idx = setting
    interpreter_builder.create_masked_load = loading
    try:
        yield
        note()
    finally:
        del interpreter_builder.set_grid_idx
        interpreter_builder.create_masked_load = load


def _expect_fair_splits(kernel: _Kernel) -> None:
    """No split may count, or load, more tokens than its share."""
    for context, shape, tile, num_splits in (
        (56, (1, 8, 16), 8, 4),
        (50, (1, 4, 16), 8, 3),
        (100, (1, 16, 16), 4, 2),
        # Few tiles, which must be shared as well.
        *((context, (1, 4, 4), 4, num_splits) for context in (8, 11, 15) for num_splits in (2, 3)),
    ):
        case = _case([context], shape, 1, tile, num_splits)
        case[0].zero_()  # all scores are 0: the sum of a split's weights is its number of tokens
        reads: dict[tuple, tuple[int, int]] = {}
        _, lse, _ = kernel.launch(case, reads)
        counts = [round(math.exp(x)) for x in lse[:, 0, 0].tolist()]
        found = [reads.get((0, 0, split), (0, 0)) for split in range(num_splits)]
        loaded = [numbers // shape[2] for numbers, _ in found]
        walked = [loads * tile for _, loads in found]
        tiles = -(-context // tile)
        most = -(-tiles // num_splits)
        where = (
            f"A context of {context} tokens, TILE = {tile}, num_splits = {num_splits}: that are"
            f" {tiles} tiles, at most {most} for each split."
        )
        for what, numbers in (
            ("have", counts),
            ("load the keys of", loaded),
            ("walk over", walked),
        ):
            if max(numbers) > most * tile:
                said = ", ".join(map(str, numbers))
                raise EXERCISE.mistake(
                    "unfair-splits", f"{where} Your splits {what} {said} tokens."
                )


def _closer(kernel: _Kernel) -> str:
    """A line about the weights, of one split or, where that is right, of two."""

    def attend(tile: int, num_splits: int) -> Callable:
        return lambda *args: kernel(*args, (tile, num_splits))[0]

    if alone := weights_seen(attend(4, 1)):
        return f"{alone} That is with num_splits = 1 and TILE = 4."
    if split := weights_seen(attend(4, 2)):
        return f"{split} That is with num_splits = 2; with 1 all weights are right."
    return weights_seen(attend(16, 2), 200, 16) or WEIGHTS_ARE_RIGHT


def _judged(answer: Any) -> int:
    kernel = _Kernel(answer)
    with warnings.catch_warnings():
        # NumPy's, about the NaN of a wrong kernel
        warnings.simplefilter("ignore", RuntimeWarning)
        wording = {
            "item 0: ": "the merged output: ",
            "item 1: ": "the log-sum-exp of all splits: ",
        }
        number = judge(
            kernel,
            _cases(),
            _right,
            EXERCISE.suspects,
            closer=lambda: _closer(kernel),
            wording=wording,
            atol=1e-4,
        )
        # Once, for a right answer: a wrong one is found by the others. What lacks some of 4,200
        # tokens is nearly right, so nothing is said of precision.
        long = _long()
        if difference(kernel(*long), _right(*long), atol=1e-4):
            diagnose(kernel, [long], _right, EXERCISE.suspects, wording=wording, atol=1e-4)
        number += 1
        # A float32 of 12,000 has three decimals, and so has a log-sum-exp.
        # Here much becomes 0 / 0: only what is right in the other cases may be the mistake.
        from_zero = splits("starts-at-zero", "no-maximum", "no-maximum-empty-nan")
        deep = {
            "mask-too-small": EXERCISE.suspects["mask-too-small"],
            "maximum-starts-at-a-number": (
                *EXERCISE.suspects["maximum-starts-at-a-number"],
                *from_zero,
            ),
        }
        judge(
            kernel, [_deep(), _deep(2.0**27)], _right, deep, rtol=0.01, atol=0.01, wording=wording
        )
        if kernel.hidden:
            _, what = min(kernel.hidden)
            raise EXERCISE.mistake("loads-without-a-mask", f"The result is right, but: {what}.")
        _expect_fair_splits(kernel)
    return number


def _engine_decode(kernel: Any) -> Callable:
    """A decode attention for the engine that launches the learner's kernel, in two splits."""
    import torch

    def decode_attention(
        query: Any,
        k_cache: Any,
        v_cache: Any,
        block_table: Any,
        seq_lens: Any,
        scale: float,
        *,
        merge_attention: Callable,
        **_: Any,
    ) -> Any:
        batch, heads, dim = query.shape
        out, lse = torch.empty(2, batch, heads, dim), torch.empty(2, batch, heads)
        kernel[(batch, heads, 2)](
            out,
            lse,
            query,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            scale,
            query.stride(0),
            block_table.stride(0),
            2,
            KH=k_cache.shape[1],
            GROUP=heads // k_cache.shape[1],
            D=dim,
            SIZE=k_cache.shape[2],
            TILE=64,
        )
        return merge_attention(out, lse)

    return decode_attention


def _in_the_engine(answer: Any) -> str:
    from minivllm.kernels import Kernels

    mine = counted(_engine_decode(answer))
    kernels = replace(Kernels.reference(), decode_attention=mine)
    return engine_agrees(mine, kernels=kernels, max_tokens=2)


def check_split_kernel(answer: Any) -> str:
    """Judge an answer to 03.6."""
    expect_triton(
        "Exercise 03.3 asks for the same in torch, but for the splitting, and runs everywhere."
    )
    number = isolated(lambda: _judged(answer))
    line = isolated(lambda: _in_the_engine(answer))
    return f"{number} batches, in up to 4 splits; {line}"


EXERCISE = Exercise(
    id="03.6",
    title="A Triton kernel that splits",
    check=check_split_kernel,
    mistakes=(
        Known(
            "every-split-reads-all",
            "The merged output is right, and yet nothing is gained: every split reads the whole"
            " context (the log-sum-exp of all parts is too large by log(num_splits)).\nA"
            " program walks from its split's begin to its end only.",
            hint=2,
            suspects=splits("all"),
            answers=r"""
# %% the chapter's loop, as it was
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    for first in range(0, context, TILE):
""",
        ),
        Known(
            "splits-overlap",
            "Some tokens belong to more than one split, and count more than once.\nLet a split"
            " begin at a whole number of tiles, and end where the next one begins: range(begin,"
            " tl.minimum(begin + share, context), TILE). Or your `known` is too wide: end at"
            " tl.minimum(begin + share, context).",
            hint=2,
            suspects=splits("to-the-end", "shares-of-tokens"),
            answers=r"""
# %% each split runs to the context's end
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    for first in range(begin, context, TILE):

# %% shares are not whole tiles
@@
-    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
+    share = tl.cdiv(context, num_splits)
""",
        ),
        Known(
            "tokens-left-out",
            "Tokens at the end of a context belong to no split: the share was rounded"
            " down.\nUse tl.cdiv, which rounds up: the last split may get less.",
            hint=2,
            suspects=splits(
                "rounded-down-tiles",
                "rounded-down-tokens",
                "whole-tiles-only",
                "rounded-down",
                "rounded-down-and-cut",
            ),
            answers=r"""
# %% rounds the share down
@@
-    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
+    share = (tl.cdiv(context, TILE) // num_splits) * TILE

# %% only tiles that are full
@@
     m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
+    context = context // TILE * TILE

# %% context // num_splits
@@
-    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
+    share = context // num_splits

# %% context // num_splits, with a mask for the split's end
@@
-    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
+    share = context // num_splits
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    end = tl.minimum(begin + share, context)
+    for first in range(begin, end, TILE):
@@
-        known = tokens < context
+        known = tokens < end
""",
        ),
        Known(
            "lse-without-the-maximum",
            "lse is log(l) alone, or m alone. l was summed under the split's own maximum, and"
            " another split has another: the merge cannot compare them.\nlse = m + log(l).",
            suspects=splits("lse-log-l", "lse-is-m"),
            answers=r"""
# %% log(l) alone
@@
-    tl.store(lse_ptr + target, m + tl.log(safe))
+    tl.store(lse_ptr + target, tl.log(safe))
""",
        ),
        Known(
            "lse-in-base-2",
            "lse has a logarithm of base 2 in it; the merge expects natural ones.\nlse = m +"
            " tl.log(l).",
            suspects=splits("lse-base-2"),
            answers=r"""
# %% log2
@@
-    tl.store(lse_ptr + target, m + tl.log(safe))
+    tl.store(lse_ptr + target, m + tl.log2(safe))
""",
        ),
        Known(
            "not-divided",
            "out is acc, not yet divided by the sum of the weights.\nEach part is a finished"
            " average of its own: acc / l.",
            suspects=splits("not-divided"),
            answers=r"""
# %% the merge will divide, will it not?
@@
-    tl.store(out_ptr + target * D + columns, acc / safe)
+    tl.store(out_ptr + target * D + columns, acc)
""",
        ),
        Known(
            "empty-split-is-nan",
            "A split without tokens gives 0 / 0 = NaN. Its weight in the merge is 0, but 0 ·"
            " NaN is NaN.\nDivide by tl.where(l > 0.0, l, 1.0).",
            hint=3,
            suspects=splits("empty-nan", "empty-nan-lse"),
            answers=r"""
# %% 0 / 0
@@
-    tl.store(out_ptr + target * D + columns, acc / safe)
+    tl.store(out_ptr + target * D + columns, acc / l)
""",
        ),
        Known(
            "no-rescale",
            "When a later tile has a larger maximum, what was summed before must shrink: both l"
            " and acc.\nMultiply both by tl.exp(m - new).",
            hint=1,
            suspects=splits("no-rescale", "no-rescale-acc", "no-rescale-l"),
            answers=r"""
# %% the sum is rescaled, the output is not
@@
-        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
+        acc = acc + tl.sum(weights[:, None] * v, axis=0)

# %% neither
@@
-        l = l * rescale + tl.sum(weights, axis=0)
-        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
+        l = l + tl.sum(weights, axis=0)
+        acc = acc + tl.sum(weights[:, None] * v, axis=0)
""",
        ),
        Known(
            "empty-split-counts",
            "A split without tokens has the log-sum-exp 0: in the merge that is a weight of 1,"
            " for nothing.\nIts lse is -inf. Let m start at float('-inf'), not at 0.",
            hint=3,
            suspects=splits("starts-at-zero", "empty-lse-zero"),
            answers=r"""
# %% the maximum starts at 0
@@
-    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
+    m, l, acc = 0.0, 0.0, tl.zeros([D], dtype=tl.float32)
""",
        ),
        Known(
            "reads-beyond-the-context",
            "In the last tile, scores of tokens beyond the context count (here: junk).\nSet"
            " them to -inf: tl.where(known, scores, float('-inf')).",
            hint=1,
            suspects=splits("unmasked", "unmasked-zero", "unmasked-scores"),
            answers=r"""
# %% no mask at all on keys, values and scores
@@
-        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
-        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
-        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
+        k = tl.load(k_cache_ptr + rows)
+        v = tl.load(v_cache_ptr + rows)
+        scores = tl.sum(k * query[None, :], axis=1)

# %% masked keys give scores of 0, which count
@@
-        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
+        scores = tl.sum(k * query[None, :], axis=1)
""",
        ),
        Known(
            "values-not-masked",
            "The values of tokens beyond the context are read. Their weight is 0, but what lies"
            " there may be NaN, and 0 · NaN is NaN.\nLoad values with mask=known[:, None],"
            " other=0.0.",
            hint=1,
            suspects=splits("values-unmasked"),
            answers=r"""
# %% their weight is 0 anyway
@@
-        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
+        v = tl.load(v_cache_ptr + rows)
""",
        ),
        Known(
            "tile-taken-for-a-block",
            "You ask the table for entry first // TILE. That is right only when a tile is"
            " exactly a block.\nEntries stand for blocks: tokens // SIZE for each token, as"
            " rows_of does.",
            hint=1,
            suspects=splits("table-by-tile"),
            answers=r"""
# %% one look-up a tile, by the tile's number
@@
-        rows = (
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
-            + columns[None, :]
-        )
+        block = tl.load(table_ptr + first // TILE)
+        rows = ((block * KH + head // GROUP) * SIZE + tokens % SIZE)[
+            :, None
+        ] * D + columns[None, :]
""",
        ),
        Known(
            "heads-interleaved",
            "Query head h reads KV head h % KH.\nIt is h // GROUP: the first GROUP query heads"
            " share KV head 0.",
            suspects=splits("interleaved"),
            answers=r"""
# %% head % KH
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, known, head % KH, KH, SIZE, D)[:, None]
""",
        ),
        Known(
            "query-head-as-kv-head",
            "You ask rows_of for the query head's number. There are only KH heads in the cache;"
            " the others lie in the next block.\nThe KV head is head // GROUP.",
            hint=1,
            suspects=splits("no-group"),
            answers=r"""
# %% head
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, known, head, KH, SIZE, D)[:, None]
""",
        ),
        Known(
            "no-scale",
            "The scores are not multiplied by scale.\nDo so before the maximum.",
            hint=1,
            suspects=splits("no-scale"),
            answers=r"""
# %% forgets it
@@
-    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
+    query = tl.load(query_ptr + request * query_stride + head * D + columns)
""",
        ),
        Known(
            "query-stride-ignored",
            "Request r's queries do not begin at r · heads · D: here they lie further"
            " apart.\nThey begin at r · query_stride.",
            suspects=splits("query-stride"),
            answers=r"""
# %% heads · D
@@
-    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
+    query = tl.load(query_ptr + (request * KH * GROUP + head) * D + columns) * scale
""",
        ),
        Known(
            "out-of-bounds-write",
            "out is [num_splits, B, heads, D]: `target * D + columns`; lse has one number per"
            " program, at `target`.",
            answers=r"""
# %% a tile of columns twice as wide as the head
@@
     tl.store(out_ptr + target * D + columns, acc / safe)
+    if target == tl.num_programs(0) * KH * GROUP * num_splits - 1:
+        tl.store(out_ptr + (target + 1) * D + columns, acc)
""",
        ),
        Known(
            "no-maximum",
            "Scores of several hundred are given to exp as they are: the result is more than a"
            " float32 holds, inf, and inf / inf is NaN.\nKeep a running maximum m: the weights"
            " are tl.exp(scores - new).",
            hint=1,
            suspects=splits("no-maximum", "no-maximum-empty-nan"),
            answers=r"""
# %% exp of the scores as they are
@@
-    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
+    l, acc = 0.0, tl.zeros([D], dtype=tl.float32)
@@
-        new = tl.maximum(m, tl.max(scores, axis=0))
-        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
-        l = l * rescale + tl.sum(weights, axis=0)
-        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
-        m = new
+        weights = tl.exp(scores)
+        l = l + tl.sum(weights, axis=0)
+        acc = acc + tl.sum(weights[:, None] * v, axis=0)
@@
-    tl.store(lse_ptr + target, m + tl.log(safe))
+    tl.store(lse_ptr + target, tl.log(l))

# %% nor is an empty split thought of
@@
-    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
+    l, acc = 0.0, tl.zeros([D], dtype=tl.float32)
@@
-        new = tl.maximum(m, tl.max(scores, axis=0))
-        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
-        l = l * rescale + tl.sum(weights, axis=0)
-        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
-        m = new
-    safe = tl.where(l > 0.0, l, 1.0)
-    tl.store(out_ptr + target * D + columns, acc / safe)
-    tl.store(lse_ptr + target, m + tl.log(safe))
+        weights = tl.exp(scores)
+        l = l + tl.sum(weights, axis=0)
+        acc = acc + tl.sum(weights[:, None] * v, axis=0)
+    tl.store(out_ptr + target * D + columns, acc / l)
+    tl.store(lse_ptr + target, tl.log(l))
""",
        ),
        Known(
            "empty-split-wrote-nothing",
            "In out and lse stays what was there, and the merge reads it.\nA split without tokens"
            " writes 0 to out and -inf to lse: do not return early.",
            hint=3,
            answers=r"""
# %% returns early
@@
     begin = split * share
+    if begin >= context:
+        return
""",
        ),
        Known(
            "exp2-without-log2e",
            "You take powers of 2 where powers of e are asked for.\nUse tl.exp; or multiply the"
            " scale by log2(e) first, and turn m and l back at the end: lse is natural.",
            hint=1,
            suspects=splits("exp2"),
            answers=r"""
# %% exp2 is faster, is it not?
@@
-        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
+        weights, rescale = tl.exp2(scores - new), tl.exp2(m - new)
""",
        ),
        Known(
            "divided-by-kv-heads",
            "You take head // KH for the KV head. Each KV head has GROUP query heads.\nThe KV head"
            " is head // GROUP.",
            hint=1,
            suspects=splits("divided-by-kv-heads"),
            answers=r"""
# %% head // KH
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, known, head // KH, KH, SIZE, D)[:, None]
""",
        ),
        Known(
            "own-scale",
            "You scale by 1 / √D. That is the usual scale, but the model decides: use the argument"
            " `scale`.\nHere it is another one.",
            hint=1,
            suspects=splits("own-scale"),
            answers=r"""
# %% as always
@@
-    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
+    query = tl.load(query_ptr + request * query_stride + head * D + columns) * D**-0.5
""",
        ),
        Known(
            "scaled-twice",
            "The scores are scaled, but not by `scale` once: you multiply twice, or by log2(e) and"
            " then take exp.\nMultiply the query, or the scores, by scale; with exp2 by scale ·"
            " log2(e).",
            hint=1,
            suspects=splits("scaled-twice", "scaled-by-log2e"),
            answers=r"""
# %% the query, and the scores
@@
-        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
+        scores = tl.sum(k * query[None, :], axis=1) * scale
+        scores = tl.where(known, scores, float("-inf"))
""",
        ),
        Known(
            "wrong-block-size",
            "You look tokens up in blocks of another size than the cache's: a number of your own,"
            " or TILE.\nBlocks have SIZE tokens: give SIZE to rows_of.",
            hint=1,
            suspects=in_other_blocks(),
            answers=r"""
# %% a tile for a block
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, known, head // GROUP, KH, TILE, D)[:, None]

# %% 16, as the engine has it
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, known, head // GROUP, KH, 16, D)[:, None]
""",
        ),
        Known(
            "first-kv-head",
            "All query heads read KV head 0.\nThe KV head is head // GROUP.",
            hint=1,
            suspects=splits("first-kv-head"),
            answers=r"""
# %% always 0
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, known, 0, KH, SIZE, D)[:, None]
""",
        ),
        Known(
            "averages-keys",
            "You average keys.\nThe weights come from the keys; what is averaged are the values,"
            " from v_cache_ptr.",
            suspects=splits("keys-as-values"),
            answers=r"""
# %% copied the line
@@
-        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
+        v = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
""",
        ),
        Known(
            "mask-too-small",
            "The scores beyond the context are masked with a number that is not small enough: real"
            " scores may be smaller, and then what is hidden gets the weight.\nMask with"
            " float('-inf').",
            hint=1,
            suspects=splits("masked-with-1e4", "masked-with-1e9"),
            answers=r"""
# %% -1e9 is very small
@@
-        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
+        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), -1e9)

# %% -1e4 is small, is it not?
@@
-        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
+        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), -1e4)
""",
        ),
        Known(
            "maximum-starts-at-a-number",
            "Your running maximum m does not start at -inf, but at a number. Real scores may be"
            " smaller: then all weights are exp of something far below 0, and their sum is 0. And"
            " the lse of an empty split is that number, not -inf.\nLet m start at float('-inf').",
            hint=3,
            suspects=splits(*(f"starts-at:{start}" for start in _STARTS)),
            answers=r"""
# %% a large negative number
@@
-    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
+    m, l, acc = -1e9, 0.0, tl.zeros([D], dtype=tl.float32)

# %% 0, and what is empty is thought of
@@
-    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
+    m, l, acc = 0.0, 0.0, tl.zeros([D], dtype=tl.float32)
@@
-    tl.store(lse_ptr + target, m + tl.log(safe))
+    tl.store(lse_ptr + target, tl.where(l > 0.0, m + tl.log(safe), float("-inf")))
""",
        ),
        Known(
            "forgets-earlier-tiles",
            "Each split counts only its last tiles. Right while a share is short; in a long context"
            " most of it is left out.\nBegin at split * share, and take all tiles up to the end.",
            hint=2,
            suspects=tuple(Splits(last=last) for last in (1, 2, 3, 4, 5, 6, 8, 12, 16)),
            answers=r"""
# %% the last four tiles
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    end = tl.minimum(begin + share, context)
+    start = end - tl.cdiv(end - begin, TILE) * TILE
+    start = tl.maximum(begin, begin + (tl.cdiv(end - begin, TILE) - 4) * TILE)
+    for first in range(start, end, TILE):
""",
        ),
        Known(
            "unfair-splits",
            "The merged output is right, but a split does more than its share, and the others wait"
            " for it.\nNo split may have more than ⌈tiles / num_splits⌉ tiles.",
            hint=2,
            answers=r"""
# %% split 0 does everything
@@
-    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
+    share = tl.cdiv(context, TILE) * TILE

# %% a context of few tiles is not worth the trouble
@@
     share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
+    share = tl.where(context <= 2 * TILE, 2 * TILE, share)

# %% all walk over everything, and mask what is another split's
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    for first in range(0, context, TILE):
@@
-        known = tokens < context
+        known = (tokens >= begin) & (tokens < tl.minimum(begin + share, context))
@@
-        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
+        base = tl.where(new == float("-inf"), 0.0, new)
+        weights, rescale = tl.exp(scores - base), tl.exp(m - base)

# %% one tile each, and the last split takes the rest
@@
-    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
-    begin = split * share
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    begin = split * TILE
+    end = tl.where(split == num_splits - 1, context, begin + TILE)
+    for first in range(begin, tl.minimum(end, context), TILE):
""",
        ),
        Known(
            "loads-without-a-mask",
            "Your kernel loads what is not there for it: what lies beyond the context. A mask of"
            " the scores hides it here; on a GPU the address may be anybody's, and the program"
            " ends.\nGive each tl.load of keys, values and table entries mask=known (with [:, None]"
            " for rows) and other=0.0.",
            hint=1,
            answers=r"""
# %% keys without a mask
@@
-        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
+        k = tl.load(k_cache_ptr + rows)

# %% table entries without a mask
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, tokens >= 0, head // GROUP, KH, SIZE, D)[:, None]
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% a split has 64 tiles at most
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    share = tl.minimum(share, 64 * TILE)
+    for first in range(begin, tl.minimum(begin + share, context), TILE):

# %% of a long context the last tiles
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    begin = tl.maximum(begin, tl.minimum(begin + share, context) - 256 * TILE)
+    for first in range(begin, tl.minimum(begin + share, context), TILE):
""",
        ),
        Known(
            "target-counts-rows",
            "You write out at target + columns: the programs write over each other's numbers."
            " target counts rows, and a row of out has D numbers.\nIt begins at target * D:"
            " `target * D + columns`.",
            suspects=splits("target-plus-columns"),
            answers=r"""
# %% out at target + columns
@@
-    tl.store(out_ptr + target * D + columns, acc / safe)
+    tl.store(out_ptr + target + columns, acc / safe)
""",
        ),
        Known(
            "walks-beyond-the-context",
            "A split that ends beyond the context walks over tiles in which no token is known."
            " Where nothing came before, scores - new is -inf - -inf, which is NaN.\nEnd at"
            " tl.minimum(begin + share, context).",
            hint=2,
            suspects=splits("unclamped", "unclamped-empty-nan"),
            answers=r"""
# %% walks over tiles beyond the context
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    for first in range(begin, begin + share, TILE):
""",
        ),
    ),
    right=r"""
# %% tiles dealt out in turn: split s takes tiles s, s + num_splits …
@@
-    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
-    begin = split * share
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    for first in range(split * TILE, context, num_splits * TILE):

# %% base 2 inside, natural at the end
@@
-    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
+    query = tl.load(query_ptr + request * query_stride + head * D + columns) * (
+        scale * 1.4426950408889634
+    )
@@
-        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
+        weights, rescale = tl.exp2(scores - new), tl.exp2(m - new)
@@
-    tl.store(lse_ptr + target, m + tl.log(safe))
+    tl.store(lse_ptr + target, (m + tl.log2(safe)) * 0.6931471805599453)

# %% shares of tokens, with a mask for the split's end
@@
-    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
+    share = tl.cdiv(context, num_splits)
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    context = tl.minimum(begin + share, context)
+    for first in range(begin, context, TILE):
""",
)
