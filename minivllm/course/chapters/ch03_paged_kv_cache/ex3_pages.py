"""03.3: your pages carry the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.guard import guard
from minivllm.course.grading.judges import counted, expect, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch
from minivllm.course.chapters.ch03_paged_kv_cache.common import SIZES, the_diagnose, the_pages
from minivllm.course.grading.exercise import Exercise, Known


def check_pages(store: Callable, decode: Callable) -> str:
    from minivllm.kernels import Kernels

    stores = _check_store(store)
    decodes = _check_decode(decode)
    mine = counted(store), counted(decode)
    kernels = replace(Kernels.reference(), store_kv=mine[0], decode_attention=mine[1])
    return f"{stores} times stored, {decodes} times read; {engine_agrees(*mine, kernels=kernels)}"


def _check_store(answer: Callable) -> int:
    import torch

    from minivllm.kernels.kv_cache import store_kv_reference

    random = seeded(3)

    def case(kv_heads: int, size: int, dim: int, slots: list[int], strided: bool = False) -> tuple:
        count = len(slots)
        if strided:  # as the engine gives them: parts of one matrix product's result
            qkv = torch.randn(count, 4 * kv_heads, dim, generator=random)
            key, value = qkv[:, kv_heads : 2 * kv_heads], qkv[:, -kv_heads:]
        else:
            key, value = torch.randn(2, count, kv_heads, dim, generator=random)
        caches = [guard(torch.randn(6, kv_heads, size, dim, generator=random)) for _ in range(2)]
        return key, value, *caches, torch.tensor(slots, dtype=torch.int64)

    cases = [
        case(1, 4, 8, [9]),
        case(1, 4, 8, [4, 5, 6, 7, 20]),
        case(2, 4, 8, [22, 3, 8, 17]),
        case(2, 16, 4, [40, 33, 95, 1], strided=True),
        case(3, 3, 5, [2, 17, 9, 4], strided=True),
        case(2, 4, 8, [0, 13, -1, -1]),
        case(2, 4, 8, [7, -1, 13, -1, 2], strided=True),
        case(2, 4, 8, [-1, -1]),
        case(2, 4, 8, []),
    ]

    def wrong(key, value, k_cache, v_cache, slots, rows: Callable, put: Callable) -> None:
        key, value, slots = rows(key, value, slots)
        for new, cache in ((key, k_cache), (value, v_cache)):
            put(cache, slots, new)

    def wanted(key, value, slots):
        keep = slots >= 0
        return key[keep], value[keep], slots[keep]

    def until_padding(key, value, slots):
        count = next((i for i, slot in enumerate(slots.tolist()) if slot < 0), len(slots))
        return key[:count], value[:count], slots[:count]

    def out_of_step(key, value, slots):
        slots = slots[slots >= 0]
        return key[: len(slots)], value[: len(slots)], slots

    def put(cache, slots, rows) -> None:
        size = cache.shape[2]
        for slot, row in zip(slots.tolist(), rows, strict=True):  # in order, as a loop would
            cache[slot // size, :, slot % size] = row

    def put_in_blocks_of(size: int) -> Callable:
        """With another block size; 0: the number of blocks."""

        def put(cache, slots, rows) -> None:
            other = size or cache.shape[0]
            for slot, row in zip(slots.tolist(), rows, strict=True):
                cache[slot // other, :, slot % other] = row

        return put

    def put_in_copy(cache, slots, rows) -> None:
        # a view only of a single KV head
        cache.transpose(1, 2).reshape(-1, *cache.shape[1::2])[slots] = rows

    def put_by_heads(cache, slots, rows) -> None:
        for slot, row in zip(slots.tolist(), rows, strict=True):
            cache[slot // cache.shape[1], :, slot % cache.shape[1]] = row

    def put_tokens_first(cache, slots, rows) -> None:
        cache.view(-1, *cache.shape[1::2])[slots] = rows

    suspects = {
        "minus-one-is-the-last-slot": (
            (
                "A token of slot -1 was stored in the last slot of the last block: in Python, -1 //"
                " block_size is -1, and index -1 is the last one. Whoever owns that block has lost"
                " a token.\nDrop those tokens before you write."
            ),
            partial(wrong, rows=lambda *all: all, put=put),
        ),
        "minus-one-is-slot-0": (
            (
                "A token of slot -1 was stored in slot 0: padding overwrites the first token of"
                " block 0.\nDrop those tokens instead of clamping their slots."
            ),
            partial(wrong, rows=lambda k, v, s: (k, v, s.clamp(min=0)), put=put),
        ),
        "slot-0-dropped": (
            (
                "A token of slot 0 was not stored.\nSlot 0 is a slot like any other: keep"
                " `slot_mapping >= 0`."
            ),
            partial(wrong, rows=lambda k, v, s: (k[s > 0], v[s > 0], s[s > 0]), put=put),
        ),
        "stops-at-minus-one": (
            (
                "You stop at the first slot of -1. Tokens behind it may have real slots.\nSkip, and"
                " go on."
            ),
            partial(wrong, rows=until_padding, put=put),
        ),
        "rows-out-of-step": (
            (
                "You drop the slots of -1, but not the keys and values that belong to them: what"
                " follows is stored one too early.\nUse the same mask on slots, keys and values."
            ),
            partial(wrong, rows=out_of_step, put=put),
        ),
        "tokens-before-heads": (
            (
                "You treat the cache as [slots, KV heads, head_dim]. It is [num_blocks, KV heads,"
                " block_size, head_dim]: inside a block the heads come first.\nWrite to cache[slot"
                " // size, :, slot % size]."
            ),
            partial(wrong, rows=wanted, put=put_tokens_first),
        ),
        "keys-as-values": (
            "The value cache got keys.\nkey goes to k_cache, value to v_cache.",
            lambda k, v, kc, vc, s: wrong(k, k, kc, vc, s, wanted, put),
        ),
        "only-keys": (
            "The value cache is as it was before.\nStore the values, too.",
            lambda k, v, kc, vc, s: put(kc, wanted(k, v, s)[2], wanted(k, v, s)[0]),
        ),
        "not-in-place": (
            (
                "The caches are as they were before: you wrote to copies. `cache[...] = rows`"
                " writes in place; `cache = …`, index_put and indexing twice, cache[blocks][…], do"
                " not; nor does what you assign to a transposed cache after reshape, flatten or"
                " contiguous."
            ),
            lambda *all: None,
            partial(wrong, rows=wanted, put=put_in_copy),
        ),
        "wrong-block-size": (
            (
                "store_kv: your blocks have another size than the cache's.\nIt is k_cache.shape[2]:"
                " the caches are [num_blocks, KV heads, block_size, head_dim]."
            ),
            partial(wrong, rows=wanted, put=put_by_heads),
            *(partial(wrong, rows=wanted, put=put_in_blocks_of(size)) for size in (0, *SIZES)),
        ),
    }
    return the_diagnose(answer, cases, store_kv_reference, suspects, writes=(2, 3))


def _check_decode(answer: Callable) -> int:
    import torch

    from minivllm.kernels.online_softmax import merge_attention_reference
    from minivllm.kernels.paged_attention import decode_attention_reference

    random = seeded(4)

    def case(
        contexts: list[int],
        kv_heads: int,
        group: int,
        dim: int,
        size: int,
        junk="nan",
        scale=0.0,
        **more,
    ) -> tuple:
        pages = the_pages(contexts, kv_heads, dim, size, seed=sum(contexts), junk=junk, **more)
        wide = torch.randn(len(contexts), kv_heads * group + 2, dim, generator=random) * 2
        return wide[:, 1:-1], *pages, scale or dim**-0.5

    cases = [
        case([1], 1, 1, 4, 4),
        case([4, 8], 1, 1, 8, 4),
        case([7], 1, 1, 8, 4, junk="numbers"),
        case([12, 5], 2, 1, 8, 4),
        case([16, 1, 33], 2, 2, 16, 16),
        case([16, 1, 33], 2, 3, 16, 16, junk="numbers"),
        case([5, 0, 9], 2, 2, 8, 4, junk="numbers"),
        case([20, 64, 31], 3, 2, 12, 8, scale=0.7),
    ]

    def call(function: Callable) -> Callable:
        def run(query, k_cache, v_cache, block_table, seq_lens, scale) -> torch.Tensor:
            limits = {
                "max_seq_len": int(seq_lens.max()),
                "merge_attention": merge_attention_reference,
            }
            return function(query, k_cache, v_cache, block_table, seq_lens, scale, **limits)

        return run

    def right(query, k_cache, v_cache, block_table, seq_lens, scale) -> torch.Tensor:
        return call(decode_attention_reference)(
            query, k_cache, v_cache, block_table, seq_lens, scale
        )

    def wrong(mistake: str) -> Callable:
        return partial(_wrong_decode, mistake)

    sizes = [lambda shape, axis=axis: shape[axis] for axis in (0, 1, 3)]
    sizes += [lambda shape, size=size: size for size in SIZES]

    suspects = {
        "reads-beyond-the-context": (
            (
                "You read all slots of a request's blocks. The last block is rarely full: what lies"
                " behind the context is somebody's old memory (here: junk, or NaN).\nCut off at the"
                " context, or mask scores and values."
            ),
            wrong("reads-beyond-the-context"),
        ),
        "values-not-masked": (
            (
                "The scores beyond the context are masked, the values are not. Their weight is 0,"
                " but 0 · NaN is NaN, and a fresh or reused slot may hold NaN.\nCut keys and values"
                " off, or set such values to 0."
            ),
            wrong("values-not-masked"),
        ),
        "heads-interleaved": (
            (
                "Query head h reads KV head h % KV heads. It must be h // group: the first `group`"
                " query heads share KV head 0.\nrepeat_interleave repeats each KV head side by"
                " side; repeat and tile repeat them all in turn."
            ),
            wrong("heads-interleaved"),
        ),
        "no-scale": (
            "The scores are not multiplied by scale.\nDo so before the softmax.",
            wrong("no-scale"),
        ),
        "own-scale": (
            (
                "You scale by 1 / √head_dim. That is the usual scale, but the model decides: use"
                " the argument `scale`.\nOne of the cases has another."
            ),
            wrong("own-scale"),
        ),
        "table-ignored": (
            (
                "You read blocks 0, 1, 2 …, as if a request's blocks lay in order.\nblock_table[i]"
                " says which they are."
            ),
            wrong("table-ignored"),
        ),
        "one-table-for-all": (
            (
                "You read the first request's blocks for all requests.\nRow i of block_table"
                " belongs to request i."
            ),
            wrong("one-table-for-all"),
        ),
        "new-token-missing": (
            (
                "The last token of each context is left out. seq_lens counts the new token, too,"
                " and its key and value are in the cache already: it sees itself."
            ),
            wrong("new-token-missing"),
        ),
        "last-block-missing": (
            (
                "A block that is not full is left out: context // block_size rounds down.\nRound"
                " up: a context of 5 in blocks of 4 needs two."
            ),
            wrong("last-block-missing"),
        ),
        "heads-and-tokens-mixed": (
            (
                "cache[blocks] is [n, KV heads, block_size, head_dim]; a reshape to [KV heads, n ·"
                " block_size, head_dim] mixes heads with tokens.\nTranspose KV heads to the front"
                " first."
            ),
            wrong("heads-and-tokens-mixed"),
        ),
        "keys-as-values": (
            "You average keys.\nThe weights come from the keys; what is averaged are the values.",
            wrong("keys-as-values"),
        ),
        "padded-row": (
            (
                "A context of 0 (a padded row) gave NaN: a softmax over nothing but -inf is 0 /"
                " 0.\nSuch a row's output is 0."
            ),
            wrong("padded-row"),
        ),
        "wrong-block-size": (
            (
                "decode_attention: your blocks have another size than the cache's.\nIt is"
                " k_cache.shape[2]: the caches are [num_blocks, KV heads, block_size, head_dim]."
            ),
            *(partial(_decode_in_blocks_of, f, tokens) for f in sizes for tokens in (False, True)),
        ),
    }
    count = the_diagnose(call(answer), cases, right, suspects)
    low = case([5, 8], 2, 2, 8, 4)
    low = (*(x.bfloat16() for x in low[:3]), *low[3:])
    dtype = call(answer)(*low).dtype
    expect(
        dtype == torch.bfloat16,
        "wrong-dtype",
        f"query is bfloat16, and your result {dtype}.\nIt has query's dtype:"
        " torch.zeros_like(query).",
    )
    for size in (4, 16):
        # three whole blocks: the entry behind them is not needed
        poisoned = case([size + 1, 3 * size], 2, 2, 8, size)
        poisoned[3][0, 2:], poisoned[3][1, 3:] = 10**6, 10**6
        expected = right(*poisoned)
        try:
            same = torch.allclose(call(answer)(*poisoned), expected, atol=1e-4)
        except IndexError:
            same = False
        expect(
            same,
            "table-beyond-the-context",
            "You look up entries of the block table that the context does not need. They may be"
            " anything, here a million; on a GPU that reads from a wild address.\nTake only the"
            " first ⌈context / block_size⌉ entries of a row; block_size is k_cache.shape[2].",
        )
    return count + 1


def _decode_in_blocks_of(
    size_of: Callable, tokens: bool, query, k_cache, v_cache, block_table, seq_lens, scale
) -> torch.Tensor:
    """Decode attention with another block size; tokens: read one by one, not by blocks."""
    import torch

    size, kv_heads, out = size_of(k_cache.shape), k_cache.shape[1], torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        if tokens and context:
            k, v = (
                torch.stack(
                    [cache[block_table[i, p // size], :, p % size] for p in range(context)], dim=1
                )
                for cache in (k_cache, v_cache)
            )
        else:
            blocks = block_table[i, : -(-context // size)].long()
            k, v = (
                cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
                for cache in (k_cache, v_cache)
            )
        q = query[i].unflatten(0, (kv_heads, -1))
        out[i] = ((q @ k.transpose(1, 2) * scale).softmax(dim=-1) @ v).flatten(0, 1)
    return out


def _wrong_decode(mistake: str, query, k_cache, v_cache, block_table, seq_lens, scale) -> Any:
    """Decode attention with one mistake."""
    import torch

    kv_heads, size = k_cache.shape[1:3]
    heads, dim = query.shape[1:]
    scale = {"no-scale": 1.0, "own-scale": dim**-0.5}.get(mistake, scale)
    out = torch.zeros_like(query)
    for i, known in enumerate(seq_lens.tolist()):
        known = max(0, known - (mistake == "new-token-missing"))
        count = known // size if mistake == "last-block-missing" else -(-known // size)
        count = max(count, mistake == "padded-row")
        row = block_table[0 if mistake == "one-table-for-all" else i]
        blocks = torch.arange(count) if mistake == "table-ignored" else row[:count].long()
        k, v = (
            cache[blocks]
            for cache in (k_cache, k_cache if mistake == "keys-as-values" else v_cache)
        )
        if mistake == "heads-and-tokens-mixed":
            k, v = (x.reshape(kv_heads, -1, dim) for x in (k, v))
        else:
            k, v = (x.transpose(0, 1).flatten(1, 2) for x in (k, v))
        if known and mistake not in ("reads-beyond-the-context", "values-not-masked"):
            k, v = k[:, :known], v[:, :known]
        if mistake == "heads-interleaved":
            k, v = (x.repeat(heads // kv_heads, 1, 1) for x in (k, v))
        else:
            k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
        scores = torch.einsum("hd,hnd->hn", query[i], k) * scale
        if mistake in ("values-not-masked", "padded-row"):
            scores[:, known:] = -math.inf
        out[i] = torch.einsum("hn,hnd->hd", scores.softmax(dim=-1), v)
        if mistake == "padded-row" and not known:
            out[i] = math.nan
    return out


EXERCISE = Exercise(
    id="03.3",
    title="Your pages carry the engine",
    check=check_pages,
    mistakes=(
        Known(
            "minus-one-is-the-last-slot",
            hint=1,
            answers=r'''
# %% -1 // 16 is -1, which is a block, too
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
-    wanted = slot_mapping >= 0
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    size = k_cache.shape[2]
+    for token, slot in enumerate(slot_mapping.tolist()):
+        k_cache[slot // size, :, slot % size] = key[token]
+        v_cache[slot // size, :, slot % size] = value[token]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
''',
        ),
        Known(
            "minus-one-is-slot-0",
            hint=1,
            answers=r'''
# %% clamped, so that it does not fail
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
-    wanted = slot_mapping >= 0
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    size, slots = k_cache.shape[2], slot_mapping.clamp(min=0).tolist()
+    for token, slot in enumerate(slots):
+        k_cache[slot // size, :, slot % size] = key[token]
+        v_cache[slot // size, :, slot % size] = value[token]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
''',
        ),
        Known(
            "stops-at-minus-one",
            hint=1,
            answers=r'''
# %% padding is at the end, is it not?
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
-    wanted = slot_mapping >= 0
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    size = k_cache.shape[2]
+    for token, slot in enumerate(slot_mapping.tolist()):
+        if slot < 0:
+            break
+        k_cache[slot // size, :, slot % size] = key[token]
+        v_cache[slot // size, :, slot % size] = value[token]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
''',
        ),
        Known(
            "rows-out-of-step",
            hint=1,
            answers=r'''
# %% filters the slots, not the rows
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
-    wanted = slot_mapping >= 0
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    slots, size = slot_mapping[slot_mapping >= 0], k_cache.shape[2]
+    k_cache[slots // size, :, slots % size] = key[: len(slots)]
+    v_cache[slots // size, :, slots % size] = value[: len(slots)]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
''',
        ),
        Known(
            "tokens-before-heads",
            hint=1,
            answers=r'''
# %% the cache as rows of slots
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    _, kv_heads, _, dim = k_cache.shape
+    k_cache.view(-1, kv_heads, dim)[slot_mapping[wanted]] = key[wanted]
+    v_cache.view(-1, kv_heads, dim)[slot_mapping[wanted]] = value[wanted]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
''',
        ),
        Known(
            "keys-as-values",
            answers=r'''
# %% copied the line, changed one name
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    v_cache[slots // size, :, slots % size] = key[wanted]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
''',
        ),
        Known(
            "not-in-place",
            hint=1,
            answers=r'''
# %% indexing twice makes a copy
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    k_cache[slots // size][:, :, 0] = key[wanted]
+    v_cache[slots // size][:, :, 0] = value[wanted]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""

# %% a transposed cache cannot be laid out anew without a copy
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    _, kv_heads, _, dim = k_cache.shape
+    k_cache.transpose(1, 2).reshape(-1, kv_heads, dim)[slot_mapping[wanted]] = key[
+        wanted
+    ]
+    v_cache.transpose(1, 2).reshape(-1, kv_heads, dim)[slot_mapping[wanted]] = value[
+        wanted
+    ]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
''',
        ),
        Known(
            "reads-beyond-the-context",
            hint=2,
            answers=r'''
# %% the last block in full
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
-            for cache in (k_cache, v_cache)
+            cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache)
''',
        ),
        Known(
            "values-not-masked",
            hint=2,
            answers=r'''
# %% scores are masked, values are not
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
     for i, context in enumerate(seq_lens.tolist()):
+        if context == 0:
+            continue
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
-            for cache in (k_cache, v_cache)
+            cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache)
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
-        out[i] = (weights @ v).flatten(0, 1)
+        scores = q @ k.transpose(1, 2) * scale
+        scores[..., context:] = -math.inf
+        out[i] = (torch.softmax(scores, dim=-1) @ v).flatten(0, 1)
''',
        ),
        Known(
            "heads-interleaved",
            hint=3,
            answers=r'''
# %% repeat instead of repeat_interleave
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
-    kv_heads, size = k_cache.shape[1:3]
+    group, size = query.shape[1] // k_cache.shape[1], k_cache.shape[2]
@@
-        q = query[i].unflatten(0, (kv_heads, -1))
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
-        out[i] = (weights @ v).flatten(0, 1)
+        k, v = k.repeat(group, 1, 1), v.repeat(group, 1, 1)
+        weights = torch.softmax(
+            (query[i].unsqueeze(1) @ k.transpose(1, 2)) * scale, dim=-1
+        )
+        out[i] = (weights @ v).squeeze(1)
''',
        ),
        Known(
            "own-scale",
            hint=3,
            answers=r'''
# %% 1 / √head_dim, as always
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
+        weights = torch.softmax(q @ k.transpose(1, 2) * query.shape[-1] ** -0.5, dim=-1)
''',
        ),
        Known(
            "table-ignored",
            hint=2,
            answers=r'''
# %% blocks from 0 on
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = torch.arange(math.ceil(context / size))
''',
        ),
        Known(
            "one-table-for-all",
            answers=r'''
# %% block_table[0]
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[0, : math.ceil(context / size)]
''',
        ),
        Known(
            "new-token-missing",
            answers=r'''
# %% the context without the new token
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
+            cache[blocks].transpose(0, 1).flatten(1, 2)[:, : max(context - 1, 0)]
''',
        ),
        Known(
            "last-block-missing",
            hint=2,
            answers=r'''
# %% rounds down
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i, : context // size]
''',
        ),
        Known(
            "heads-and-tokens-mixed",
            hint=2,
            answers=r'''
# %% reshape without transpose
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
+            cache[blocks].reshape(kv_heads, -1, query.shape[-1])[:, :context]
''',
        ),
        Known(
            "padded-row",
            answers=r'''
# %% a mask over one block, even for a context of 0
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i, : max(1, math.ceil(context / size))]
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
-            for cache in (k_cache, v_cache)
+            cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache)
@@
-        q = query[i].unflatten(0, (kv_heads, -1))
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
-        out[i] = (weights @ v).flatten(0, 1)
+        beyond = torch.arange(k.shape[1]) >= context
+        scores = query[i].unflatten(0, (kv_heads, -1)) @ k.transpose(1, 2) * scale
+        weights = torch.softmax(scores.masked_fill(beyond, -math.inf), dim=-1)
+        out[i] = (weights @ v.masked_fill(beyond[:, None], 0.0)).flatten(0, 1)
''',
        ),
        Known(
            "table-beyond-the-context",
            hint=2,
            answers=r'''
# %% all entries first, then the cut
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i]

# %% one block more, when the last is full
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i, : context // size + 1]
''',
        ),
        Known(
            "wrong-dtype",
            answers=r'''
# %% float32, always
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
@@
-    out = torch.zeros_like(query)
+    out = torch.zeros(query.shape)
@@
-        q = query[i].unflatten(0, (kv_heads, -1))
+        q, k, v = query[i].unflatten(0, (kv_heads, -1)).float(), k.float(), v.float()
''',
        ),
        Known(
            "slot-0-dropped",
            hint=1,
            answers=r'''
# %% more than 0
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
-    wanted = slot_mapping >= 0
+    wanted = slot_mapping > 0
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
''',
        ),
        Known(
            "wrong-block-size",
            answers=r'''
# %% 16, as the engine has it, to store
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
+    size, slots = 16, slot_mapping[wanted]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""

# %% the number of KV heads, to store
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
+    size, slots = k_cache.shape[1], slot_mapping[wanted]
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""

# %% 16, to read
@@
-    """Write key, value [T, KV heads, head_dim] to their slots; -1 is nowhere. Changes the caches in place."""
@@
-    """One token a request over its whole context: [B, heads, head_dim]; 0 where the context is 0."""
-    kv_heads, size = k_cache.shape[1:3]
+    kv_heads, size = k_cache.shape[1], 16
''',
        ),
    ),
    right=r"""
# %% plain loops, token by token and head by head
def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        for head in range(key.shape[1]):
            k_cache[slot // size, head, slot % size] = key[token, head]
            v_cache[slot // size, head, slot % size] = value[token, head]


def decode_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    max_seq_len: int,
    merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    heads, size = query.shape[1], k_cache.shape[2]
    group = heads // k_cache.shape[1]
    out = torch.zeros_like(query)
    for i in range(len(query)):
        context = int(seq_lens[i])
        if context == 0:
            continue
        rows = [(int(block_table[i, p // size]), p % size) for p in range(context)]
        for head in range(heads):
            k = torch.stack(
                [k_cache[block, head // group, offset] for block, offset in rows]
            )
            v = torch.stack(
                [v_cache[block, head // group, offset] for block, offset in rows]
            )
            out[i, head] = torch.softmax(k @ query[i, head] * scale, dim=0) @ v
    return out

# %% block by block, with the online softmax, and parts merged
def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    _, kv_heads, size, dim = k_cache.shape
    heads = torch.arange(kv_heads)
    for slot, k, v in zip(slot_mapping, key, value):
        if slot != -1:
            k_cache[slot // size, heads, slot % size] = k
            v_cache[slot // size, heads, slot % size] = v


def decode_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    max_seq_len: int,
    merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    (batch, heads, dim), (kv_heads, size) = query.shape, k_cache.shape[1:3]
    splits = max(1, -(-max_seq_len // size))
    out = torch.zeros(splits, batch, heads, dim)
    lse = torch.full((splits, batch, heads), -math.inf)
    for i, context in enumerate(seq_lens.tolist()):
        for s in range(-(-context // size)):
            inside = min(size, context - s * size)
            k, v = (
                cache[block_table[i, s], :, :inside] for cache in (k_cache, v_cache)
            )
            scores = query[i].view(kv_heads, -1, dim) @ k.transpose(1, 2) * scale
            lse[s, i] = torch.logsumexp(scores.float(), dim=-1).flatten()
            out[s, i] = (torch.softmax(scores, dim=-1) @ v).flatten(0, 1)
    return merge_attention(out, lse).to(query.dtype)
""",
)
