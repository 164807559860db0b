"""03.3: your pages carry the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch03_paged_kv_cache import decodes as reading
from minivllm.course.chapters.ch03_paged_kv_cache import stores as storing
from minivllm.course.chapters.ch03_paged_kv_cache.common import (
    NOWHERE,
    WEIGHTS_ARE_RIGHT,
    judge,
    pages,
    weights_seen,
)
from minivllm.course.chapters.ch03_paged_kv_cache.decodes import Decode, decodes
from minivllm.course.chapters.ch03_paged_kv_cache.stores import Store
from minivllm.course.grading.compare import difference
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.guard import guard
from minivllm.course.grading.judges import counted, expect, expect_nothing_kept, seeded
from minivllm.course.grading.with_engine import engine_agrees

if TYPE_CHECKING:
    import torch


def _suspects(kind: type) -> dict[str, tuple]:
    """The suspects that store, or those that read."""
    found = {}
    for name, (message, *implementations) in EXERCISE.suspects.items():
        if mine := [wrong for wrong in implementations if isinstance(wrong, kind)]:
            found[name] = (message, *mine)
    return found


# --- storing --------------------------------------------------------------------------------------


def _step(
    shape: tuple[int, int, int],
    slots: list[int],
    seed: int,
    *,
    strided: bool = False,
    num_blocks: int = 6,
    stale: bool = False,
) -> tuple:
    """Arguments of store_kv. shape: KV heads, block size, head_dim.

    stale: every other block holds NaN.
    strided: key and value as the engine gives them, as parts of one matrix product's result.
    """
    import torch

    (kv_heads, _, dim), random, count = shape, seeded(seed), len(slots)
    if strided:
        qkv = torch.randn(count, 4 * kv_heads, dim, generator=random)
        key, value = qkv[:, kv_heads : 2 * kv_heads], qkv[:, -kv_heads:]
    else:
        key, value = torch.randn(2, count, kv_heads, dim, generator=random)
    caches = [guard(torch.randn(num_blocks, *shape, generator=random)) for _ in range(2)]
    if stale:
        for cache in caches:
            cache[::2] = math.nan
    return key, value, *caches, torch.tensor(slots, dtype=torch.int64)


def _steps() -> list[tuple]:
    import torch

    many = torch.randperm(40 * 12, generator=seeded(30))[:333]
    many[::9] = -1
    return [
        _step((1, 4, 8), [9], 1),
        _step((1, 4, 8), [4, 5, 6, 7, 20], 2),
        _step((2, 4, 8), [22, 3, 8, 17], 3),
        _step((2, 16, 4), [40, 33, 95, 1], 4, strided=True),
        _step((3, 3, 5), [2, 17, 9, 4], 5, strided=True),
        _step((2, 4, 8), [0, 13, -1, -1], 6),
        _step((2, 4, 8), [7, -1, 13, -1, 2], 7, strided=True),
        _step((2, 4, 8), [-1, -1], 8),
        _step((2, 4, 8), [], 9),
        _step((3, 12, 2), many.tolist(), 10, strided=True, num_blocks=40),
        _step((2, 4, 8), [1, -1, 17], 13, stale=True),
        _step((2, 64, 3), [70, 5, -1, 127, 170, 20], 15),
        _step((1, 16, 2), [40_000, 5, 70_003, -1], 14, num_blocks=4_400),
    ]


def _check_store(answer: Callable) -> int:
    from minivllm.kernels.kv_cache import store_kv_reference

    number = judge(
        answer,
        _steps(),
        store_kv_reference,
        _suspects(Store),
        closer=lambda: _stored_where(answer),
        writes=(2, 3),
    )

    def stored(function: Callable) -> Callable:
        def run(*args: Any) -> tuple:
            function(*args)
            return args[2:4]

        return run

    first = _step((2, 4, 8), [7, 13, -1], 11)
    second = _step((2, 4, 8), [2, -1, 20], 12)
    what = "a step with other slots has come"
    expect_nothing_kept(stored(answer), [(first, second)], stored(store_kv_reference), what)
    return number


def _stored_where(answer: Callable) -> str:
    """A line that says which token lies in a wrong slot, in a small case."""
    import torch

    slots = [9, 3, -1, 14, 0]
    key = torch.arange(1.0, 6.0)[:, None, None].expand(5, 2, 3).clone()
    where = f"A closer look: two KV heads, four blocks of 4, slots {slots}."
    for name, which in (("key", 0), ("value", 1)):
        caches = [torch.zeros(4, 2, 4, 3), torch.zeros(4, 2, 4, 3)]
        try:
            answer(key, 10 + key, *caches, torch.tensor(slots))
        except Exception as error:
            return f"{where} Your code raises {type(error).__name__}: {error}"
        flat = caches[which].transpose(1, 2).reshape(16, 6)
        for token, slot in enumerate(slots):
            number = token + 1 + 10 * which
            found = [int(at) for at in (flat == number).any(dim=1).nonzero()]
            if found != ([slot] if slot >= 0 else []):
                lies = f"in slot {', '.join(map(str, found))}" if found else "in no slot"
                return (
                    f"{where} The {name} of token {token} should be in slot {slot}; it is {lies}."
                )
            if slot >= 0 and not (flat[slot] == number).all():
                return f"{where} The {name} of token {token} is not whole in slot {slot}."
    return f"{where} There everything is in its place. Look at what is different in other sizes."


# --- reading --------------------------------------------------------------------------------------


def _batch(
    contexts: list[int],
    shape: tuple[int, int, int],
    group: int,
    *,
    loud: float = 2.0,
    scale: float = 0.0,
    **more: Any,
) -> tuple:
    """Arguments of decode_attention. shape: KV heads, block size, head_dim.

    loud: how large queries are. more: of `pages`.
    """
    import torch

    kv_heads, _, dim = shape
    caches = pages(contexts, shape, sum(contexts) + group, **more)
    random = seeded(1000 + sum(contexts))
    wide = torch.randn(len(contexts), kv_heads * group + 2, dim, generator=random) * loud
    return wide[:, 1:-1], *caches, scale or dim**-0.5


def _deep(factor: float = 1.0) -> tuple:
    """A batch whose scores are all about -12,000 · factor. Its numbers are exact in float32.

    With a factor, all scores of a request are equal, and each context has one block: a log-sum-exp
    of that size has no room for the number of tokens, so blocks of unequal length could not be
    merged.

    One context fills its blocks: there it does not matter with what others are masked.
    """
    import torch

    contexts = [5, 9, 8] if factor == 1 else [3, 2, 4]
    batch = _batch(contexts, (1, 4, 8), 1, scale=0.5)
    batch[0].fill_(-2048.0 * factor)
    keys = batch[1]
    steps = torch.randint(0, 2, keys.shape, generator=seeded(5)) / 1024 * (factor == 1)
    keys.copy_(torch.where(keys.isnan(), keys, 1.5 + steps))
    return batch


def _batches() -> list[tuple]:
    return [
        _batch([1], (1, 4, 4), 1),
        _batch([4, 8], (1, 4, 8), 1),
        _batch([7], (1, 4, 8), 1, junk="numbers"),
        _batch([12, 5], (2, 4, 8), 1),
        _batch([16, 1, 33], (2, 16, 16), 2),
        _batch([16, 1, 33], (2, 16, 16), 3, junk="numbers"),
        _batch([5, 0, 9], (2, 4, 8), 2, junk="numbers"),
        _batch([20, 64, 31], (3, 8, 12), 2, scale=0.7),
        _batch([24, 10], (2, 6, 5), 3, loud=300.0),
        _batch([130, 257, 0], (2, 16, 8), 2),
        _batch([600], (1, 12, 8), 3, junk="numbers"),
        _batch([4500], (1, 16, 4), 1),
    ]


def _called(function: Callable) -> Callable:
    """A decode attention as a function of the arguments of `_batch`."""
    from minivllm.kernels.online_softmax import merge_attention_reference

    def run(
        query: Any, k_cache: Any, v_cache: Any, block_table: Any, seq_lens: Any, scale: float
    ) -> torch.Tensor:
        limits = {
            "max_seq_len": int(seq_lens.max()),
            "merge_attention": merge_attention_reference,
        }
        return function(query, k_cache, v_cache, block_table, seq_lens, scale, **limits)

    return run


def _right(
    query: Any, k_cache: Any, v_cache: Any, block_table: Any, seq_lens: Any, scale: float
) -> torch.Tensor:
    return Decode()(query, k_cache, v_cache, block_table, seq_lens, scale)


def _check_decode(answer: Callable) -> int:
    mine = _called(answer)
    number = judge(mine, _batches(), _right, _suspects(Decode), closer=lambda: _closer(mine))
    # A float32 of 12,000 has three decimals, and so has a log-sum-exp.
    # Here much becomes 0 / 0: only what is right in the other batches may be the mistake.
    deep = {name: _suspects(Decode)[name] for name in ("maximum-from-zero", "mask-too-small")}
    judge(mine, [_deep(), _deep(2.0**27)], _right, deep, rtol=0.01, atol=0.01)
    _expect_dtype(mine)
    _expect_no_stale_entries(mine)
    first, second = (_batch(contexts, (2, 4, 8), 2) for contexts in ([9, 6], [5, 11]))
    what = "other requests have come, with other blocks and contexts"
    expect_nothing_kept(mine, [(first, second)], _right, what)
    return number


def _closer(mine: Callable) -> str:
    """A line about the weights: in a small case or, where they are right, in a long context."""
    return weights_seen(mine) or weights_seen(mine, 600, 16) or WEIGHTS_ARE_RIGHT


def _expect_dtype(mine: Callable) -> None:
    import torch

    batch = _batch([5, 8], (2, 4, 8), 2)
    low = (*(x.bfloat16() for x in batch[:3]), *batch[3:])
    got = mine(*low)
    expect(
        got.dtype == torch.bfloat16,
        "wrong-dtype",
        f"query is bfloat16, and your result {got.dtype}.\nIt has query's dtype:"
        " torch.zeros_like(query).",
    )
    found = difference(got.float(), _right(*batch), rtol=0.05, atol=0.05)
    expect(
        not found,
        "wrong-in-bfloat16",
        "In float32 your results are right; with query and caches in bfloat16 they are not."
        f"\nWhere does your code take the dtype of a new tensor from? {found and found[1]}.",
    )


def _expect_no_stale_entries(mine: Callable) -> None:
    for size in (4, 16):
        # Three whole blocks: the entry behind them is not needed, and none of a padded row.
        batch = _batch([size + 1, 3 * size, 0], (2, size, 8), 2, stale=NOWHERE)
        try:
            same = difference(mine(*batch), _right(*batch)) is None
        except IndexError:
            same = False
        if not same:
            raise EXERCISE.mistake("table-beyond-the-context")


def check_pages(store: Callable, decode: Callable) -> str:
    """Judge an answer to 03.3."""
    from minivllm.kernels import Kernels

    stores = _check_store(store)
    read = _check_decode(decode)
    mine = counted(store), counted(decode)
    kernels = replace(Kernels.reference(), store_kv=mine[0], decode_attention=mine[1])
    return f"{stores} times stored, {read} times read; {engine_agrees(*mine, kernels=kernels)}"


EXERCISE = Exercise(
    id="03.3",
    title="Your pages carry the engine",
    check=check_pages,
    mistakes=(
        Known(
            "minus-one-is-the-last-slot",
            "A token of slot -1 was stored in the last slot of the last block: in Python, -1 //"
            " block_size is -1, and index -1 is the last one. Whoever owns that block has lost a"
            " token.\nDrop those tokens before you write.",
            hint=1,
            suspects=(Store(choose=lambda rows, slots: (rows, slots)),),
            answers=r"""
# %% -1 // 16 is -1, which is a block, too
@@
-    wanted = slot_mapping >= 0
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    size = k_cache.shape[2]
+    for token, slot in enumerate(slot_mapping.tolist()):
+        k_cache[slot // size, :, slot % size] = key[token]
+        v_cache[slot // size, :, slot % size] = value[token]
""",
        ),
        Known(
            "minus-one-is-slot-0",
            "A token of slot -1 was stored in slot 0: padding overwrites the first token of block"
            " 0.\nDrop those tokens instead of clamping their slots.",
            hint=1,
            suspects=(Store(choose=lambda rows, slots: (rows, slots.clamp(min=0))),),
            answers=r"""
# %% clamped, so that it does not fail
@@
-    wanted = slot_mapping >= 0
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    size, slots = k_cache.shape[2], slot_mapping.clamp(min=0).tolist()
+    for token, slot in enumerate(slots):
+        k_cache[slot // size, :, slot % size] = key[token]
+        v_cache[slot // size, :, slot % size] = value[token]
""",
        ),
        Known(
            "slot-0-dropped",
            "A token of slot 0 was not stored.\nSlot 0 is a slot like any other: keep"
            " `slot_mapping >= 0`.",
            hint=1,
            suspects=(Store(choose=lambda rows, slots: (rows[slots > 0], slots[slots > 0])),),
            answers=r"""
# %% more than 0
@@
-    wanted = slot_mapping >= 0
+    wanted = slot_mapping > 0
""",
        ),
        Known(
            "stops-at-minus-one",
            "You stop at the first slot of -1. Tokens behind it may have real slots.\nSkip, and go"
            " on.",
            hint=1,
            suspects=(Store(choose=storing.until_padding),),
            answers=r"""
# %% padding is at the end, is it not?
@@
-    wanted = slot_mapping >= 0
+    wanted = (slot_mapping >= 0).cumprod(0).bool()
""",
        ),
        Known(
            "rows-out-of-step",
            "You drop the slots of -1, but not the keys and values that belong to them: what"
            " follows is stored one too early.\nUse the same mask on slots, keys and values.",
            hint=1,
            suspects=(Store(choose=storing.out_of_step),),
            answers=r"""
# %% filters the slots, not the rows
@@
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    k_cache[slots // size, :, slots % size] = key[: len(slots)]
+    v_cache[slots // size, :, slots % size] = value[: len(slots)]
""",
        ),
        Known(
            "tokens-before-heads",
            "You treat the cache as [slots, KV heads, head_dim]. It is [num_blocks, KV heads,"
            " block_size, head_dim]: inside a block the heads come first.\nWrite to cache[slot //"
            " size, :, slot % size].",
            hint=1,
            suspects=(Store(keys=storing.put_tokens_first, values=storing.put_tokens_first),),
            answers=r"""
# %% the cache as rows of slots
@@
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    _, kv_heads, _, dim = k_cache.shape
+    k_cache.view(-1, kv_heads, dim)[slot_mapping[wanted]] = key[wanted]
+    v_cache.view(-1, kv_heads, dim)[slot_mapping[wanted]] = value[wanted]
""",
        ),
        Known(
            "keys-as-values",
            "Keys and values are mixed up: a cache got what belongs to the other.\nkey goes to"
            " k_cache, value to v_cache.",
            suspects=tuple(Store(sources=sources) for sources in ((0, 0), (1, 1), (1, 0))),
            answers=r"""
# %% copied the line, changed one name
@@
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    v_cache[slots // size, :, slots % size] = key[wanted]
""",
        ),
        Known(
            "only-keys",
            "The value cache is as it was before.\nStore the values, too, and in place: what you"
            " assign to a copy is lost.",
            suspects=(
                Store(values=storing.put_nowhere),
                Store(values=storing.put_in_copy),
            ),
            answers=r"""
# %% a name for a new tensor
@@
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    v_cache = v_cache.clone()
+    v_cache[slots // size, :, slots % size] = value[wanted]
""",
        ),
        Known(
            "only-values",
            "The key cache is as it was before.\nStore the keys, too, and in place: what you"
            " assign to a copy is lost.",
            suspects=(Store(keys=storing.put_nowhere), Store(keys=storing.put_in_copy)),
        ),
        Known(
            "not-in-place",
            "The caches are as they were before: you wrote to copies. `cache[...] = rows` writes in"
            " place; `cache = …`, index_put and indexing twice, cache[blocks][…], do not; nor does"
            " what you assign to a transposed cache after reshape, flatten or contiguous.",
            hint=1,
            suspects=(
                Store(keys=storing.put_nowhere, values=storing.put_nowhere),
                Store(keys=storing.put_in_copy, values=storing.put_in_copy),
            ),
            answers=r"""
# %% indexing twice makes a copy
@@
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    k_cache[slots // size][:, :, 0] = key[wanted]
+    v_cache[slots // size][:, :, 0] = value[wanted]

# %% a transposed cache cannot be laid out anew without a copy
@@
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
-    k_cache[slots // size, :, slots % size] = key[wanted]
-    v_cache[slots // size, :, slots % size] = value[wanted]
+    rows = k_cache.shape[1], k_cache.shape[3]
+    k_rows = k_cache.transpose(1, 2).reshape(-1, *rows)
+    v_rows = v_cache.transpose(1, 2).reshape(-1, *rows)
+    k_rows[slot_mapping[wanted]] = key[wanted]
+    v_rows[slot_mapping[wanted]] = value[wanted]
""",
        ),
        Known(
            "wrong-block-size",
            "Your blocks have another size than the cache's: a number of your own, or another part"
            " of the shape.\nIt is k_cache.shape[2]: the caches are [num_blocks, KV heads,"
            " block_size, head_dim].",
            suspects=(*storing.in_other_blocks(), *reading.in_other_blocks()),
            answers=r"""
# %% 16, as the engine has it, to store
@@
-    size, slots = k_cache.shape[2], slot_mapping[wanted]
+    size, slots = 16, slot_mapping[wanted]

# %% 16, to read
@@
-    kv_heads, size = k_cache.shape[1:3]
+    kv_heads, size = k_cache.shape[1], 16
""",
        ),
        Known(
            "forgets-the-far-past",
            "Only the last tokens of a long context count; what lies further back is left out. Each"
            " new token attends to its whole context, however long it is.\nLook for a slice from"
            " the end, or a number of blocks that is a constant.",
            hint=2,
            suspects=tuple(
                Decode(window=window)
                for window in (8, 16, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
            ),
            answers=r"""
# %% the last 64 tokens
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
+            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context][:, -64:]

# %% the last 4,096 tokens
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
+            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context][:, -4096:]
""",
        ),
        Known(
            "reads-beyond-the-context",
            "You read all slots of a request's blocks. The last block is rarely full: what lies"
            " behind the context is somebody's old memory (here: junk, or NaN).\nCut off at the"
            " context, or mask scores and values.",
            hint=2,
            suspects=decodes("reads-beyond-the-context"),
            answers=r"""
# %% the last block in full
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
-            for cache in (k_cache, v_cache)
+            cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache)
""",
        ),
        Known(
            "values-not-masked",
            "The scores beyond the context are masked, the values are not. Their weight is 0, but 0"
            " · NaN is NaN, and a fresh or reused slot may hold NaN.\nCut keys and values off, or"
            " set such values to 0.",
            hint=2,
            suspects=decodes("values-not-masked"),
            answers=r"""
# %% scores are masked, values are not
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
""",
        ),
        Known(
            "mask-too-small",
            "The scores beyond the context are masked with a number that is not small enough: real"
            " scores may be smaller, and then what is hidden gets the weight.\nMask with -inf, or"
            " cut keys and values off at the context.",
            hint=2,
            suspects=decodes("masked-with-1e4", "masked-with-1e9", "masked-with-zero"),
            answers=r"""
# %% -1e9 is very small
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
-            for cache in (k_cache, v_cache)
+            cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache)
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
-        out[i] = (weights @ v).flatten(0, 1)
+        v = v.clone()
+        v[:, context:] = 0
+        scores = q @ k.transpose(1, 2) * scale
+        scores[..., context:] = -1e9
+        out[i] = (torch.softmax(scores, dim=-1) @ v).flatten(0, 1)

# %% -1e4 is small, is it not?
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
-            for cache in (k_cache, v_cache)
+            cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache)
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
-        out[i] = (weights @ v).flatten(0, 1)
+        v = v.clone()
+        v[:, context:] = 0
+        scores = q @ k.transpose(1, 2) * scale
+        scores[..., context:] = -1e4
+        out[i] = (torch.softmax(scores, dim=-1) @ v).flatten(0, 1)
""",
        ),
        Known(
            "heads-interleaved",
            "Query head h reads KV head h % KV heads. It must be h // group: the first `group`"
            " query heads share KV head 0.\nrepeat_interleave repeats each KV head side by side;"
            " repeat and tile repeat them all in turn.",
            hint=3,
            suspects=decodes("heads-interleaved"),
            answers=r"""
# %% repeat instead of repeat_interleave
@@
-        q = query[i].unflatten(0, (kv_heads, -1))
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
-        out[i] = (weights @ v).flatten(0, 1)
+        group = query.shape[1] // kv_heads
+        k, v = k.repeat(group, 1, 1), v.repeat(group, 1, 1)
+        scores = query[i].unsqueeze(1) @ k.transpose(1, 2) * scale
+        out[i] = (torch.softmax(scores, dim=-1) @ v).squeeze(1)
""",
        ),
        Known(
            "heads-out-of-order",
            "You view the query heads as [group, KV heads], and the output as [KV heads, group]:"
            " heads get each other's results.\nThe first `group` query heads share KV head 0: view"
            " both as [KV heads, group, head_dim].",
            hint=3,
            suspects=decodes("heads-out-of-order"),
            answers=r"""
# %% the other way round, and not back
@@
-        q = query[i].unflatten(0, (kv_heads, -1))
+        q = query[i].unflatten(0, (-1, kv_heads)).transpose(0, 1)
""",
        ),
        Known(
            "first-kv-head",
            "All query heads read KV head 0.\nQuery heads 0 … group-1 share KV head 0, the next"
            " ones KV head 1, and so on.",
            hint=3,
            suspects=decodes("first-kv-head"),
            answers=r"""
# %% broadcast from one head
@@
-        q = query[i].unflatten(0, (kv_heads, -1))
+        k, v, q = k[:1], v[:1], query[i].unsqueeze(0)
""",
        ),
        Known(
            "no-scale",
            "The scores are not multiplied by scale.\nDo so before the softmax.",
            hint=3,
            suspects=decodes("no-scale"),
            answers=r"""
# %% forgets it
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
+        weights = torch.softmax(q @ k.transpose(1, 2), dim=-1)
""",
        ),
        Known(
            "own-scale",
            "You scale by 1 / √head_dim. That is the usual scale, but the model decides: use the"
            " argument `scale`.\nSome of the cases have another.",
            hint=3,
            suspects=decodes("own-scale"),
            answers=r"""
# %% 1 / √head_dim, as always
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
+        weights = torch.softmax(q @ k.transpose(1, 2) * query.shape[-1] ** -0.5, dim=-1)
""",
        ),
        Known(
            "scaled-twice",
            "The scores are scaled, but not by `scale` once: you multiply twice, or divide by it."
            "\nOne multiplication by `scale`, before the softmax.",
            hint=3,
            suspects=decodes("scaled-twice", "scaled-by-both", "divided-by-scale"),
            answers=r"""
# %% the query, and the scores
@@
-        q = query[i].unflatten(0, (kv_heads, -1))
+        q = query[i].unflatten(0, (kv_heads, -1)) * scale
""",
        ),
        Known(
            "no-maximum",
            "Scores of several hundred are given to exp as they are: the result is more than a"
            " float32 holds, inf, and inf / inf is NaN.\nSubtract the largest score first, or use"
            " torch.softmax.",
            hint=3,
            suspects=decodes("no-maximum"),
            answers=r"""
# %% exp by hand
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
+        weights = torch.exp(q @ k.transpose(1, 2) * scale)
+        weights = weights / weights.sum(dim=-1, keepdim=True)
""",
        ),
        Known(
            "maximum-from-zero",
            "Your maximum is at least 0, as if 0 were one of the scores. All of them may lie far"
            " below: then each weight is exp of something very small, and their sum is 0.\nTake the"
            " maximum of the scores alone; a running one starts at -inf.",
            hint=3,
            suspects=decodes("maximum-from-zero", "maximum-from-zero-kept"),
            answers=r"""
# %% a running maximum that starts at 0
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
+        if context == 0:
+            continue
+        scores = q @ k.transpose(1, 2) * scale
+        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).clamp(min=0))
+        weights = weights / weights.sum(dim=-1, keepdim=True)

# %% the same, and a sum of 0 is thought of
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
+        if context == 0:
+            continue
+        scores = q @ k.transpose(1, 2) * scale
+        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).clamp(min=0))
+        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
""",
        ),
        Known(
            "not-normalised",
            "The weights do not add up to 1.\nDivide by their sum, or use torch.softmax.",
            suspects=decodes("not-normalised"),
        ),
        Known(
            "softmax-over-heads",
            "Your softmax adds up over the heads. The weights of one head over its tokens must add"
            " up to 1.\nLook at dim: the tokens are in the last dimension of the scores.",
            hint=3,
            suspects=decodes("softmax-over-heads", "softmax-over-group", "softmax-over-kv-heads"),
            answers=r"""
# %% the wrong dimension of three
@@
-        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
+        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=1)
""",
        ),
        Known(
            "table-ignored",
            "You read blocks 0, 1, 2 …, as if a request's blocks lay in order.\nblock_table[i]"
            " says which they are.",
            hint=2,
            suspects=decodes("table-ignored"),
            answers=r"""
# %% blocks from 0 on
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = torch.arange(math.ceil(context / size))
""",
        ),
        Known(
            "one-table-for-all",
            "You read the first request's blocks for all requests.\nRow i of block_table belongs"
            " to request i.",
            suspects=decodes("one-table-for-all"),
            answers=r"""
# %% block_table[0]
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[0, : math.ceil(context / size)]
""",
        ),
        Known(
            "one-context-for-all",
            "You take one context for all requests: the first, or the longest.\nseq_lens[i] is"
            " request i's.",
            hint=2,
            suspects=decodes(
                "longest-for-all", "first-for-all", "cut-at-the-longest", "cut-at-the-first"
            ),
            answers=r"""
# %% the longest
@@
-    for i, context in enumerate(seq_lens.tolist()):
+    for i in range(len(query)):
+        context = max_seq_len
""",
        ),
        Known(
            "new-token-missing",
            "The last token of each context is left out. seq_lens counts the new token, too, and"
            " its key and value are in the cache already: it sees itself.",
            suspects=decodes("new-token-missing"),
            answers=r"""
# %% the context without the new token
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
+            cache[blocks].transpose(0, 1).flatten(1, 2)[:, : max(context - 1, 0)]
""",
        ),
        Known(
            "last-block-missing",
            "A block that is not full is left out: context // block_size rounds down.\nRound up: a"
            " context of 5 in blocks of 4 needs two.",
            hint=2,
            suspects=decodes(
                "last-block-missing", "last-block-missing-but-one", "last-block-missing-if-begun"
            ),
            answers=r"""
# %% rounds down
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i, : context // size]

# %% rounds down, but takes at least one
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i, : max(1, context // size)]
""",
        ),
        Known(
            "heads-and-tokens-mixed",
            "cache[blocks] is [n, KV heads, block_size, head_dim]; a reshape to [KV heads, n ·"
            " block_size, head_dim] mixes heads with tokens.\nTranspose KV heads to the front"
            " first.",
            hint=2,
            suspects=decodes("heads-and-tokens-mixed"),
            answers=r"""
# %% reshape without transpose
@@
-            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
+            cache[blocks].reshape(kv_heads, -1, query.shape[-1])[:, :context]
""",
        ),
        Known(
            "averages-keys",
            "You average keys.\nThe weights come from the keys; what is averaged are the values.",
            suspects=decodes("keys-as-values"),
            answers=r"""
# %% k twice
@@
-            for cache in (k_cache, v_cache)
+            for cache in (k_cache, k_cache)
""",
        ),
        Known(
            "padded-row",
            "A context of 0 (a padded row) gave NaN: a softmax over nothing but -inf is 0 /"
            " 0.\nSuch a row's output is 0.",
            suspects=decodes("padded-row"),
            answers=r"""
# %% a mask over one block, even for a context of 0
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
""",
        ),
        Known(
            "table-beyond-the-context",
            "You look up entries of the block table that the context does not need. They may be"
            " anything, here a million; on a GPU that reads from a wild address.\nTake only the"
            " first ⌈context / block_size⌉ entries of a row; block_size is k_cache.shape[2].",
            hint=2,
            answers=r"""
# %% all entries first, then the cut
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i]

# %% one block more, when the last is full
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i, : context // size + 1]
""",
        ),
        Known(
            "wrong-dtype",
            answers=r"""
# %% float32, always
@@
-    out = torch.zeros_like(query)
+    out = torch.zeros(query.shape)
@@
-        q = query[i].unflatten(0, (kv_heads, -1))
+        q, k, v = query[i].unflatten(0, (kv_heads, -1)).float(), k.float(), v.float()
""",
        ),
        Known(
            "low-precision",
            answers=r"""
# %% weights in half precision
@@
-        out[i] = (weights @ v).flatten(0, 1)
+        out[i] = (weights.half() @ v.half()).flatten(0, 1)
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% the blocks of a request, by its length
@@
+kept = {}
+
+
 def decode_attention(
@@
-        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = block_table[i, : math.ceil(context / size)]
+        blocks = kept.setdefault((i, context, size), blocks)

# %% the tables are remembered
@@
-    kv_heads, size = k_cache.shape[1:3]
+    kv_heads, size = k_cache.shape[1:3]
+    tables = decode_attention.__dict__
+    key = block_table.data_ptr(), tuple(block_table.shape)
+    _, block_table = tables.setdefault(key, (block_table, block_table.clone()))
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% clears NaN from the cache
@@
     wanted = slot_mapping >= 0
+    k_cache.nan_to_num_(0.0)
+    v_cache.nan_to_num_(0.0)

# %% slots of 15 bits
@@
-    wanted = slot_mapping >= 0
+    wanted = (slot_mapping >= 0) & (slot_mapping < 1 << 15)
""",
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
