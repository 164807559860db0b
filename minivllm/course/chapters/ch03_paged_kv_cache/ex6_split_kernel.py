"""03.6: a Triton kernel that splits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.guard import guarded, intact
from minivllm.course.grading.judges import counted, expect, expect_triton, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch03_paged_kv_cache.common import the_diagnose, the_pages
from minivllm.course.grading.exercise import Exercise, Known


def check_split_kernel(answer: Any) -> str:
    import torch

    from minivllm.kernels import Kernels
    from minivllm.kernels.online_softmax import merge_attention_reference

    expect_triton(
        "Exercise 03.3 asks for the same in torch, but for the splitting, and runs everywhere."
    )
    random = seeded(6)

    def case(
        contexts: list[int],
        kv_heads: int,
        group: int,
        size: int,
        tile: int,
        splits: int,
        junk="nan",
        pad=0,
        loud=2.0,
    ) -> tuple:
        pages = the_pages(
            contexts, kv_heads, 16, size, seed=sum(contexts) + splits, junk=junk, stale="none"
        )
        wide = guarded(len(contexts), kv_heads * group + pad, 16)
        wide.copy_(torch.randn(wide.shape, generator=random) * loud)
        return wide[:, : kv_heads * group], *pages, 0.3, tile, splits

    cases = [
        case([8], 1, 1, 4, 4, 1),
        case([11], 1, 1, 4, 4, 1),
        case([11], 1, 1, 4, 4, 1, junk="numbers"),
        case([16, 32], 1, 2, 8, 8, 2),
        case([9, 16], 2, 2, 8, 4, 1, pad=2),
        case([13, 24], 2, 2, 4, 8, 1),
        case([26, 5], 1, 2, 8, 4, 3),
        case([40, 3], 2, 1, 8, 16, 2, junk="numbers"),
        case([5, 0], 1, 2, 4, 4, 4),
        case(
            [24, 19], 1, 2, 8, 8, 2, loud=200.0
        ),  # scores of several hundred: exp of them is more than float32 holds
    ]

    outputs_intact = []

    def joined(out: torch.Tensor, lse: torch.Tensor) -> tuple:
        merged = merge_attention_reference(out, lse)
        # What NaN leaves of a maximum depends on how it was taken: where the output is NaN, so is
        # this.
        return merged, torch.logsumexp(lse, dim=0).masked_fill(merged.isnan().any(dim=-1), math.nan)

    def launch(query, k_cache, v_cache, table, lens, scale, tile, splits) -> tuple:
        batch, heads, dim = query.shape
        kv_heads, size = k_cache.shape[1:3]
        out, lse = guarded(splits, batch, heads, dim), guarded(splits, batch, heads)
        poison = lse.view(torch.int32).clone()
        answer[(batch, heads, splits)](
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
            splits,
            KH=kv_heads,
            GROUP=heads // kv_heads,
            D=dim,
            SIZE=size,
            TILE=tile,
        )
        outputs_intact.append(intact(out, lse))
        nothing = lse.view(torch.int32) == poison
        expect(
            not (
                intact(out, lse)
                and nothing.any()
                and not nothing.all()
                and out[nothing].isnan().all()
            ),
            "empty-split-wrote-nothing",
            "A split without tokens wrote nothing: in out and lse stays what was there, and the"
            " merge reads it.\nWrite 0 to out and -inf to lse; so do not return early.",
        )
        return joined(out, lse)

    def right(query, k_cache, v_cache, block_table, seq_lens, scale, tile, num_splits) -> tuple:
        return joined(
            *_split_decode(
                "", query, k_cache, v_cache, block_table, seq_lens, scale, tile, num_splits
            )
        )

    def wrong(*mistakes: str) -> list[Callable]:
        return [
            lambda *case, mistake=mistake: joined(*_split_decode(mistake, *case))
            for mistake in mistakes
        ]

    suspects = {
        "every-split-reads-all": (
            (
                "The merged output is right, and yet nothing is gained: every split reads the whole"
                " context (the log-sum-exp of all parts is too large by log(num_splits)).\nA"
                " program walks from its split's begin to its end only."
            ),
            *wrong("all"),
        ),
        "splits-overlap": (
            (
                "Some tokens belong to more than one split, and count more than once.\nLet a split"
                " begin at a whole number of tiles, and end where the next one begins: range(begin,"
                " tl.minimum(begin + share, context), TILE). Or your `known` is too wide: end at"
                " tl.minimum(begin + share, context)."
            ),
            *wrong("to-the-end", "shares-of-tokens"),
        ),
        "tokens-left-out": (
            (
                "Tokens at the end of a context belong to no split: the share was rounded"
                " down.\nUse tl.cdiv, which rounds up: the last split may get less."
            ),
            *wrong(
                "rounded-down-tiles",
                "rounded-down-tokens",
                "whole-tiles-only",
                "rounded-down",
                "rounded-down-and-cut",
            ),
        ),
        "no-maximum": (
            (
                "Scores of several hundred are given to exp as they are: the result is more than a"
                " float32 holds, inf, and inf / inf is NaN.\nKeep a running maximum m: the weights"
                " are tl.exp(scores - new)."
            ),
            *wrong("no-maximum", "no-maximum-empty-nan"),
        ),
        "target-counts-rows": (
            (
                "You write out at target + columns: the programs write over each other's numbers."
                " target counts rows, and a row of out has D numbers.\nIt begins at target * D:"
                " `target * D + columns`."
            ),
            *wrong("target-plus-columns"),
        ),
        "lse-without-the-maximum": (
            (
                "lse is log(l) alone. l was summed under the split's own maximum, and another split"
                " has another: the merge cannot compare them.\nlse = m + log(l)."
            ),
            *wrong("lse-log-l"),
        ),
        "lse-in-base-2": (
            (
                "lse has a logarithm of base 2 in it; the merge expects natural ones.\nlse = m +"
                " tl.log(l)."
            ),
            *wrong("lse-base-2"),
        ),
        "not-divided": (
            (
                "out is acc, not yet divided by the sum of the weights.\nEach part is a finished"
                " average of its own: acc / l."
            ),
            *wrong("not-divided"),
        ),
        "empty-split-is-nan": (
            (
                "A split without tokens gives 0 / 0 = NaN. Its weight in the merge is 0, but 0 ·"
                " NaN is NaN.\nDivide by tl.where(l > 0.0, l, 1.0)."
            ),
            *wrong("empty-nan", "empty-nan-lse"),
        ),
        "walks-beyond-the-context": (
            (
                "A split that ends beyond the context walks over tiles in which no token is known."
                " Where nothing came before, scores - new is -inf - -inf, which is NaN.\nEnd at"
                " tl.minimum(begin + share, context)."
            ),
            *wrong("unclamped", "unclamped-empty-nan"),
        ),
        "empty-split-counts": (
            (
                "A split without tokens has the log-sum-exp 0: in the merge that is a weight of 1,"
                " for nothing.\nIts lse is -inf. Let m start at float('-inf'), not at 0."
            ),
            *wrong("starts-at-zero", "empty-lse-zero"),
        ),
        "no-rescale": (
            (
                "When a later tile has a larger maximum, what was summed before must shrink: both l"
                " and acc.\nMultiply both by tl.exp(m - new)."
            ),
            *wrong("no-rescale", "no-rescale-acc", "no-rescale-l"),
        ),
        "reads-beyond-the-context": (
            (
                "In the last tile, scores of tokens beyond the context count (here: junk).\nSet"
                " them to -inf: tl.where(known, scores, float('-inf'))."
            ),
            *wrong("unmasked", "unmasked-zero", "unmasked-scores"),
        ),
        "values-not-masked": (
            (
                "The values of tokens beyond the context are read. Their weight is 0, but what lies"
                " there may be NaN, and 0 · NaN is NaN.\nLoad values with mask=known[:, None],"
                " other=0.0."
            ),
            *wrong("values-unmasked"),
        ),
        "tile-taken-for-a-block": (
            (
                "You ask the table for entry first // TILE. That is right only when a tile is"
                " exactly a block.\nEntries stand for blocks: tokens // SIZE for each token, as"
                " rows_of does."
            ),
            *wrong("table-by-tile"),
        ),
        "heads-interleaved": (
            (
                "Query head h reads KV head h % KH.\nIt is h // GROUP: the first GROUP query heads"
                " share KV head 0."
            ),
            *wrong("interleaved"),
        ),
        "query-head-as-kv-head": (
            (
                "You ask rows_of for the query head's number. There are only KH heads in the cache;"
                " the others lie in the next block.\nThe KV head is head // GROUP."
            ),
            *wrong("no-group"),
        ),
        "no-scale": (
            "The scores are not multiplied by scale.\nDo so before the maximum.",
            *wrong("no-scale"),
        ),
        "query-stride-ignored": (
            (
                "Request r's queries do not begin at r · heads · D: here they lie further"
                " apart.\nThey begin at r · query_stride."
            ),
            *wrong("query-stride"),
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, about the NaN of a wrong kernel
        the_diagnose(
            launch,
            cases,
            right,
            suspects,
            wording={
                "item 0: ": "the merged output: ",
                "item 1: ": "the log-sum-exp of all splits: ",
            },
            atol=1e-4,
        )
        expect(
            all(outputs_intact),
            "out-of-bounds-write",
            "Your kernel writes outside of out or lse.\nout is [num_splits, B, heads, D]: `target *"
            " D + columns`; lse has one number a program, at `target`.",
        )
        mine = counted(_engine_decode(answer))
        line = engine_agrees(
            mine, kernels=replace(Kernels.reference(), decode_attention=mine), max_tokens=4
        )
    return f"{len(cases)} batches, in up to 4 splits; {line}"


def _engine_decode(kernel: Any) -> Callable:
    """A decode attention for the engine that launches the learner's kernel, in two splits."""
    import torch

    def decode_attention(
        query, k_cache, v_cache, block_table, seq_lens, scale, *, merge_attention, **_: Any
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
            TILE=16,
        )
        return merge_attention(out, lse)

    return decode_attention


def _split_decode(
    mistake: str, query, k_cache, v_cache, block_table, seq_lens, scale, tile, num_splits
) -> tuple:
    """(out [S, B, H, D], lse [S, B, H]) as the kernel gives them, with one mistake; "" is right."""
    import torch

    batch, heads, dim = query.shape
    kv_heads, size = k_cache.shape[1:3]
    if mistake == "query-stride":
        query = query.as_strided(query.shape, (heads * dim, dim, 1))
    memory = [
        torch.as_strided(cache, (2 * 1024 + cache.numel(),), (1,), 0)
        for cache in (k_cache, v_cache)
    ]
    # entries behind it are -1
    table = block_table.as_strided((batch, block_table.shape[1] + 2), block_table.stride())
    out, lse = torch.empty(num_splits, batch, heads, dim), torch.empty(num_splits, batch, heads)
    columns = torch.arange(dim)
    for split in range(num_splits):
        for i, context in enumerate(seq_lens.tolist()):
            begin, end = _share(mistake, context, tile, split, num_splits)
            for head in range(heads):
                kv_head = {"interleaved": head % kv_heads, "no-group": head}.get(
                    mistake, head // (heads // kv_heads)
                )
                start = (
                    0.0
                    if mistake == "starts-at-zero" or mistake.startswith("no-maximum")
                    else -math.inf
                )
                m, l, acc = torch.tensor(start), torch.tensor(0.0), torch.zeros(dim)
                for first in range(begin, end, tile):
                    tokens = first + torch.arange(tile)
                    known = tokens < (end if mistake == "rounded-down-and-cut" else context)
                    entries = (
                        torch.full_like(tokens, first // tile)
                        if mistake == "table-by-tile"
                        else tokens // size
                    )
                    blocks = table[i].long()[entries.clamp(max=table.shape[1] - 1)]
                    if mistake != "unmasked":
                        blocks = torch.where(known, blocks, 0)
                    rows = ((blocks * kv_heads + kv_head) * size + tokens % size) * dim + 1024
                    k, v = (x[(rows[:, None] + columns).clamp(0, len(x) - 1)] for x in memory)
                    if mistake not in ("unmasked", "unmasked-zero"):
                        k = k.masked_fill(~known[:, None], 0.0)
                    if mistake not in ("unmasked", "unmasked-zero", "values-unmasked"):
                        v = v.masked_fill(~known[:, None], 0.0)
                    scores = k @ query[i, head] * (1.0 if mistake == "no-scale" else scale)
                    if not mistake.startswith("unmasked"):
                        scores = scores.masked_fill(~known, -math.inf)
                    new = (
                        torch.tensor(0.0)
                        if mistake.startswith("no-maximum")
                        else torch.maximum(m, scores.max())
                    )
                    weights, rescale = torch.exp(scores - new), torch.exp(m - new)
                    l = (
                        l * (1.0 if mistake in ("no-rescale", "no-rescale-l") else rescale)
                        + weights.sum()
                    )
                    acc = acc * (
                        1.0 if mistake in ("no-rescale", "no-rescale-acc") else rescale
                    ) + (weights[:, None] * v).sum(0)
                    m = new
                safe = l if "empty-nan" in mistake else torch.where(l > 0, l, 1.0)
                out[split, i, head] = acc if mistake == "not-divided" else acc / safe
                log = torch.log2(safe) if mistake == "lse-base-2" else torch.log(safe)
                lse[split, i, head] = log if mistake == "lse-log-l" else m + log
                if mistake.startswith("no-maximum"):
                    lse[split, i, head] = torch.log(l)
                if mistake in ("empty-nan-lse", "empty-lse-zero") and not l > 0:
                    lse[split, i, head] = math.nan if mistake == "empty-nan-lse" else 0.0
    if mistake == "target-plus-columns":
        rows, out = out.flatten(0, 2), torch.full_like(out, math.nan)
        for i in range(batch):  # in the order in which the interpreter runs the programs
            for head in range(heads):
                for split in range(num_splits):
                    target = (split * batch + i) * heads + head
                    out.view(-1)[target : target + dim] = rows[target]
    return out, lse


def _share(mistake: str, context: int, tile: int, split: int, num_splits: int) -> tuple[int, int]:
    """(begin, end) of a split's tokens."""
    tiles = -(-context // tile)
    share = -(-tiles // num_splits) * tile
    if mistake == "all":
        return 0, context
    if mistake == "rounded-down-tiles":
        share = tiles // num_splits * tile
    elif mistake == "rounded-down-tokens":
        share = context // num_splits // tile * tile
    elif mistake == "whole-tiles-only":
        context = context // tile * tile
    elif mistake.startswith("rounded-down"):
        share = context // num_splits
    elif mistake == "shares-of-tokens":
        share = -(-context // num_splits)
    begin = split * share
    if mistake.startswith("unclamped"):
        return begin, begin + share
    return begin, context if mistake == "to-the-end" else min(begin + share, context)


EXERCISE = Exercise(
    id="03.6",
    title="A Triton kernel that splits",
    check=check_split_kernel,
    mistakes=(
        Known(
            "every-split-reads-all",
            hint=2,
            answers=r"""
# %% the chapter's loop, as it was
@@
-    for first in range(begin, tl.minimum(begin + share, context), TILE):
+    for first in range(0, context, TILE):
""",
        ),
        Known(
            "splits-overlap",
            hint=2,
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
            hint=2,
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
            answers=r"""
# %% log(l) alone
@@
-    tl.store(lse_ptr + target, m + tl.log(safe))
+    tl.store(lse_ptr + target, tl.log(safe))
""",
        ),
        Known(
            "lse-in-base-2",
            answers=r"""
# %% log2
@@
-    tl.store(lse_ptr + target, m + tl.log(safe))
+    tl.store(lse_ptr + target, m + tl.log2(safe))
""",
        ),
        Known(
            "not-divided",
            answers=r"""
# %% the merge will divide, will it not?
@@
-    tl.store(out_ptr + target * D + columns, acc / safe)
+    tl.store(out_ptr + target * D + columns, acc)
""",
        ),
        Known(
            "empty-split-is-nan",
            hint=3,
            answers=r"""
# %% 0 / 0
@@
-    tl.store(out_ptr + target * D + columns, acc / safe)
+    tl.store(out_ptr + target * D + columns, acc / l)
""",
        ),
        Known(
            "no-rescale",
            hint=1,
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
            hint=3,
            answers=r"""
# %% the maximum starts at 0
@@
-    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
+    m, l, acc = 0.0, 0.0, tl.zeros([D], dtype=tl.float32)
""",
        ),
        Known(
            "reads-beyond-the-context",
            hint=1,
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
            hint=1,
            answers=r"""
# %% their weight is 0 anyway
@@
-        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
+        v = tl.load(v_cache_ptr + rows)
""",
        ),
        Known(
            "tile-taken-for-a-block",
            hint=1,
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
            answers=r"""
# %% head % KH
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, known, head % KH, KH, SIZE, D)[:, None]
""",
        ),
        Known(
            "query-head-as-kv-head",
            hint=1,
            answers=r"""
# %% head
@@
-            rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None]
+            rows_of(table_ptr, tokens, known, head, KH, SIZE, D)[:, None]
""",
        ),
        Known(
            "no-scale",
            hint=1,
            answers=r"""
# %% forgets it
@@
-    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
+    query = tl.load(query_ptr + request * query_stride + head * D + columns)
""",
        ),
        Known(
            "query-stride-ignored",
            answers=r"""
# %% heads · D
@@
-    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
+    query = tl.load(query_ptr + (request * KH * GROUP + head) * D + columns) * scale
""",
        ),
        Known(
            "out-of-bounds-write",
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
            hint=1,
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
            "target-counts-rows",
            answers=r"""
# %% out at target + columns
@@
-    tl.store(out_ptr + target * D + columns, acc / safe)
+    tl.store(out_ptr + target + columns, acc / safe)
""",
        ),
        Known(
            "walks-beyond-the-context",
            hint=2,
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
