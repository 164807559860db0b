"""Checks of chapter 03: the paged KV cache."""

from __future__ import annotations

import math
import re
import warnings
from collections import abc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.checking import (
    Mistake,
    counted,
    diagnose,
    engine_agrees,
    exercise,
    expect,
    expect_triton,
    guard,
    guarded,
    intact,
    seeded,
)

if TYPE_CHECKING:
    import torch

#: A block that is none: what stands in it lies before the cache, in the poison of a guarded tensor.
NO_BLOCK = -1
#: What a block size is taken to be by somebody who writes a number.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _diagnose(
    answer: Callable, cases: abc.Sequence[tuple], right: Callable, suspects: dict, **more: Any
) -> int:
    """`diagnose`, without the numbers of tensors: of keys and values the shape says enough, and
    the table is seen.
    """
    try:
        return diagnose(answer, cases, right, suspects, **more)
    except Mistake as mistake:
        message = re.sub(r"= (float32 \[[\d, ]+\]) \([^()]*\)", r"= \1", mistake.message)
        raise Mistake(mistake.name, message) from mistake.__cause__


# --- 03.1 -----------------------------------------------------------------------------------------


@exercise(
    "03.1",
    "Warm-up: bytes a token",
    hints={"one-layer": 1, "hidden-size": 1, "query-heads": 2, "head-dim-from-hidden-size": 2},
)
def check_kv_bytes(answer: Callable) -> str:
    def config(layers: int, hidden: int, heads: int, kv_heads: int, dim: int) -> dict[str, int]:
        return {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": dim,
        }

    cases = [
        (config(28, 1024, 16, 8, 128), 2),  # Qwen3-0.6B
        (config(64, 5120, 64, 8, 128), 2),  # Qwen3-32B
        (config(28, 1024, 16, 8, 128), 1),
        (config(6, 256, 4, 2, 64), 4),  # the bundled model
        (
            config(32, 4096, 32, 32, 128),
            2,
        ),  # Llama-2-7B: every query head has its own keys and values
        (config(1, 64, 4, 1, 16), 2),
    ]

    def bytes_of(
        c: dict[str, int], b: int, parts: int = 2, heads: str = "num_key_value_heads", dim: int = 0
    ) -> int:
        return parts * c["num_hidden_layers"] * c[heads] * (dim or c["head_dim"]) * b

    def right(config: dict[str, int], bytes_per_number: int) -> int:
        return bytes_of(config, bytes_per_number)

    suspects = {
        "only-keys": (
            "That is the keys alone, or the values alone.\nA token leaves both: twice as much.",
            lambda c, b: bytes_of(c, b, parts=1),
        ),
        "query-heads": (
            (
                "You count query heads. Queries are not stored; what is stored are the keys and"
                " values of the KV heads, and several query heads share one.\nTake"
                " num_key_value_heads."
            ),
            lambda c, b: bytes_of(c, b, heads="num_attention_heads"),
        ),
        "head-dim-from-hidden-size": (
            (
                "You take hidden_size / num_attention_heads as a head's length. In many models it"
                " is; Qwen3-0.6B has 1024 / 16 = 64, and heads of 128.\nWhere config.json says"
                " head_dim, that is it."
            ),
            lambda c, b: bytes_of(c, b, dim=c["hidden_size"] // c["num_attention_heads"]),
        ),
        "hidden-size": (
            (
                "You count hidden_size numbers for keys and values each. The cache holds no hidden"
                " states, but rows of num_key_value_heads · head_dim numbers."
            ),
            lambda c, b: 2 * c["num_hidden_layers"] * c["hidden_size"] * b,
        ),
        "hidden-size-a-head": (
            "You count hidden_size numbers a KV head. A head is head_dim numbers long.",
            lambda c, b: bytes_of(c, b, dim=c["hidden_size"]),
        ),
        "one-layer": (
            (
                "That is one layer. Every layer has keys and values of its own.\nMultiply by"
                " num_hidden_layers."
            ),
            lambda c, b: bytes_of(c, b) // c["num_hidden_layers"],
        ),
        "ignores-bytes-per-number": (
            (
                "You always count 2 bytes a number. In float32 it is 4, in fp8 it is 1.\nMultiply"
                " by bytes_per_number."
            ),
            lambda c, b: bytes_of(c, 2),
        ),
        "counts-numbers": (
            "You count numbers, not bytes.\nMultiply by bytes_per_number.",
            lambda c, b: bytes_of(c, 1),
        ),
    }
    _diagnose(answer, cases, right, suspects)
    return f"{len(cases)} models; Qwen3-0.6B takes 114,688 bytes a token, Qwen3-32B 262,144"


# --- 03.2 -----------------------------------------------------------------------------------------


@exercise(
    "03.2",
    "Slot mapping",
    hints={
        "position-from-zero": 1,
        "table-from-its-first-entry": 1,
        "offset-from-the-chunk": 1,
        "table-ignored": 1,
        "block-not-a-slot": 1,
        "no-offset": 1,
        "slots-in-a-row": 2,
        "one-table-for-all": 2,
        "ends-at-the-length": 3,
        "wrong-block-size": 3,
        "padded-with-zero": 3,
        "not-padded": 3,
    },
)
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
    _diagnose(answer, cases, right, suspects)
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


# --- pages to read and write ----------------------------------------------------------------------


def _pages(
    contexts: abc.Sequence[int],
    kv_heads: int,
    dim: int,
    size: int,
    seed: int,
    junk: str = "nan",
    stale: str = "other",
    width: int = 0,
) -> tuple:
    """Caches, block table ``[B, …]`` and contexts ``[B]``.

    junk: what is in slots that hold no token, "nan" or "numbers". stale: table entries that no
    context needs, "other" (a block that belongs to nobody) or "none" (no block at all).
    """
    import torch

    random = seeded(seed)
    needed = [-(-context // size) for context in contexts]
    total = sum(needed) + 2  # the first and the last are nobody's
    k_cache, v_cache = (guarded(total, kv_heads, size, dim) for _ in range(2))
    for cache in (k_cache, v_cache):
        if junk == "numbers":
            cache.copy_(torch.randn(cache.shape, generator=random) * 3)
    order = torch.randperm(total - 2, generator=random).int() + 1
    full = torch.full(
        (len(contexts), max(1, width, max(needed, default=1)) + 4), NO_BLOCK, dtype=torch.int32
    )
    table = full[:, :-2]
    if stale == "other":
        table[:] = total - 1
    for i, context in enumerate(contexts):
        table[i, : needed[i]] = order[sum(needed[:i]) : sum(needed[: i + 1])]
        for p in range(context):
            for cache in (k_cache, v_cache):
                cache[table[i, p // size], :, p % size] = torch.randn(
                    kv_heads, dim, generator=random
                )
    return k_cache, v_cache, table, torch.tensor(contexts, dtype=torch.int32)


# --- 03.3 -----------------------------------------------------------------------------------------


@exercise(
    "03.3",
    "Your pages carry the engine",
    hints={
        "minus-one-is-the-last-slot": 1,
        "minus-one-is-slot-0": 1,
        "slot-0-dropped": 1,
        "stops-at-minus-one": 1,
        "rows-out-of-step": 1,
        "tokens-before-heads": 1,
        "not-in-place": 1,
        "reads-beyond-the-context": 2,
        "values-not-masked": 2,
        "table-ignored": 2,
        "last-block-missing": 2,
        "heads-and-tokens-mixed": 2,
        "table-beyond-the-context": 2,
        "heads-interleaved": 3,
        "own-scale": 3,
    },
)
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
    return _diagnose(answer, cases, store_kv_reference, suspects, writes=(2, 3))


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
        pages = _pages(contexts, kv_heads, dim, size, seed=sum(contexts), junk=junk, **more)
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
    count = _diagnose(call(answer), cases, right, suspects)
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


# --- 03.4 -----------------------------------------------------------------------------------------


@exercise(
    "03.4",
    "Debug this: right for months",
    hints={
        "tile-taken-for-a-block": 1,
        "look-up-in-tiles": 2,
        "offset-in-tiles": 2,
        "one-look-up-a-tile": 3,
        "wrong-block-size": 3,
    },
)
def check_read_context(answer: Callable) -> str:
    import torch

    from minivllm.kernels import Kernels

    def case(context: int, size: int, tile: int, kv_heads: int = 2) -> tuple:
        # As many entries as a wrong reader may ask for.
        k_cache, _, table, _ = _pages(
            [context, 9], kv_heads, 4, size, seed=context, width=2 * context
        )
        return k_cache, table[0], context, tile

    cases = [
        case(1, 4, 4),
        case(16, 16, 16),
        case(45, 16, 16),
        case(27, 8, 4),
        case(20, 8, 8),
        case(21, 4, 1),
        case(37, 4, 16),
        case(30, 8, 12),
        case(25, 8, 5),
        case(64, 16, 32),
        case(41, 16, 6),
    ]

    def reader(
        block: Callable, offset: Callable, whole: bool = False, smaller: bool = False
    ) -> Callable:
        def read(cache, table, context: int, tile: int) -> torch.Tensor:
            size, rows = cache.shape[2], []
            tile = min(tile, size) if smaller else tile
            for first in range(0, context, tile):
                last = first + tile if whole else min(first + tile, context)
                rows += [
                    cache[table[block(first, p, tile, size)], :, offset(first, p, tile, size)]
                    for p in range(first, last)
                ]
            return torch.stack(rows)

        return read

    def right(cache, table, context: int, tile: int) -> torch.Tensor:
        size = cache.shape[2]
        return torch.stack([cache[table[p // size], :, p % size] for p in range(context)])

    suspects = {
        "tile-taken-for-a-block": (
            (
                "It reads as if a tile were a block: right as long as both are 16.\nLook at the"
                " picture: which slots of its own blocks are read, and which others? The block size"
                " is cache.shape[2]."
            ),
            reader(lambda f, p, t, s: f // t, lambda f, p, t, s: p % t),
            reader(lambda f, p, t, s: p // t, lambda f, p, t, s: p % t),
        ),
        "look-up-in-tiles": (
            (
                "The offset is right now, but the table is still asked for tile number first //"
                " tile.\nEntries of a table stand for blocks: token // block_size."
            ),
            reader(lambda f, p, t, s: f // t, lambda f, p, t, s: p % s),
            reader(lambda f, p, t, s: p // t, lambda f, p, t, s: p % s),
        ),
        "offset-in-tiles": (
            (
                "The block is right now, but the offset is still counted in tiles.\nA token lies at"
                " offset token % block_size."
            ),
            reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p % t),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % t),
            reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p - f),
        ),
        "one-look-up-a-tile": (
            (
                "You look up one block for a whole tile. That is right while a tile lies inside a"
                " block; a larger tile, or one that does not divide the block, reaches into the"
                " next.\nLook up table[token // size] for each token."
            ),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % s),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: f % s + p - f),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: p % s, smaller=True),
            reader(lambda f, p, t, s: f // s, lambda f, p, t, s: f % s + p - f, smaller=True),
        ),
        "wrong-block-size": (
            (
                "Your blocks have another size than the cache's.\nIt is cache.shape[2]: the cache"
                " is [num_blocks, KH, block_size, D]."
            ),
            *(
                reader(lambda f, p, t, s, n=n: p // n, lambda f, p, t, s, n=n: p % n) for n in SIZES
            ),  # KH is 2, D is 4
            *(reader(lambda f, p, t, s, n=n: p // n, lambda f, p, t, s: p % s) for n in SIZES),
            *(reader(lambda f, p, t, s: p // s, lambda f, p, t, s, n=n: p % n) for n in SIZES),
        ),
        "whole-tiles": (
            (
                "The last tile is read to its end, beyond the context.\nStop at min(first + tile,"
                " context)."
            ),
            reader(lambda f, p, t, s: p // s, lambda f, p, t, s: p % s, whole=True),
        ),
    }
    _diagnose(answer, cases, right, suspects)
    mine = counted(answer)

    def decode(
        query, k_cache, v_cache, block_table, seq_lens, scale, **limits: Any
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for i, context in enumerate(seq_lens.tolist()):
            k, v = (mine(cache, block_table[i], context, 16) for cache in (k_cache, v_cache))
            k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (k, v))
            weights = torch.softmax(torch.einsum("hd,nhd->hn", query[i], k) * scale, dim=-1)
            out[i] = torch.einsum("hn,nhd->hd", weights, v)
        return out

    kernels = replace(Kernels.reference(), decode_attention=decode)
    line = engine_agrees(mine, kernels=kernels, block_size=64)
    return f"{len(cases)} pairs of tile and block; in blocks of 64, {line}"


# --- 03.5 -----------------------------------------------------------------------------------------


@exercise(
    "03.5",
    "Predict: who fits",
    hints={
        "rounded-up": 1,
        "rounded-down": 1,
        "tokens-not-blocks": 1,
        "whole-block": 2,
        "share-of-tokens": 2,
        "only-keys": 3,
        "query-heads": 3,
    },
)
def check_predictions(
    blocks: int, reserved: int, paged: int, wasted_16: float, wasted_256: float, splits: int
) -> str:
    for name, value in locals().copy().items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        expect(
            number,
            "not-a-number",
            f"{name} is {value!r}.\nCommit to a number; the check says how far off it was.",
        )
    pool, token = 14_000_000_000, 2 * 36 * 8 * 128 * 2
    count, chats = _measure_pool(pool // (16 * token))
    _check_pieces("blocks", blocks, pool, 16 * token)
    _check_pieces("reserved", reserved, pool, 4096 * token)
    if paged != chats:
        expect(
            not chats < paged < chats + 2,
            "tokens-not-blocks",
            f"paged is {paged}: so many chats' tokens fit, but not their blocks. 700 tokens take 43"
            f" full blocks and one that holds 12, which is taken as a whole.\n{count} blocks, 44"
            f" for each chat: {chats}.",
        )
        expect(
            int(paged) != count // 43,
            "rounded-down",
            f"paged is {paged}: that is 43 blocks a chat, which hold 688 tokens.\nThe last 12 need"
            " a block, too.",
        )
        raise Mistake(
            "wrong-values",
            f"paged is {paged}, counted: {chats}.\n{count} blocks, 44 of them for each chat.",
        )
    _check_waste("wasted_16", wasted_16, 16, 0.3)
    _check_waste("wasted_256", wasted_256, 256, 1.0)
    if splits != 16:
        programs = "\n8 · splits programs for 132 multiprocessors."
        expect(
            splits != 132,
            "kv-heads-forgotten",
            f"splits is {splits}: as if one program read all KV heads. Each of the 8 has programs"
            f" of its own.{programs}",
        )
        expect(
            int(splits) != 132 // 32,
            "query-heads",
            f"splits is {splits}: as if each query head had programs of its own; those of a group"
            f" share one.{programs}",
        )
        expect(
            not 16 < splits <= 17,
            "rounded-up",
            f"splits is {splits}: with 17, 8 · 17 = 136 programs, four multiprocessors get two, and"
            " all the others wait.\nRound down.",
        )
        raise Mistake("wrong-values", f"splits is {splits}, right is 16.{programs}")
    empty = f"{_empty_share(16):.1f} and {_empty_share(256):.1f} % empty"
    return f"{count:,} blocks; {pool // (4096 * token)} chats reserved, {chats} paged; {empty}"


def _check_pieces(name: str, value: float, pool: int, piece: int) -> None:
    """Whether value is how many pieces of so many bytes fit."""
    right = pool // piece
    if value == right:
        return
    a_token = "\nA token takes 2 · 36 layers · 8 KV heads · 128 · 2 bytes = 147,456 bytes."
    for times, mistake, why in (
        (4, "query-heads", "that is with 32 query heads; what is cached are the 8 KV heads."),
        (1 / 2, "only-keys", "that is with keys alone, or values alone."),
        (1 / 36, "one-layer", "that is one layer; there are 36."),
        (2, "four-bytes", "that is in float32; bfloat16 has 2 bytes a number."),
    ):
        expect(
            int(value) != int(pool / (piece * times)),
            mistake,
            f"{name} is {value:,}: {why}{a_token}",
        )
    expect(
        not right < value <= right + 1,
        "rounded-up",
        f"{name} is {value}, but {pool / piece:.2f} fit.\nA piece that does not fit as a whole is"
        " none: round down.",
    )
    raise Mistake(
        "wrong-values",
        f"{name} is {value:,}, counted: {right:,}.\n{pool:,} bytes, {piece:,} for each.",
    )


def _check_waste(name: str, value: float, size: int, slack: float) -> None:
    """Whether value is the empty share, in percent, of blocks of this size."""
    right = _empty_share(size)
    if abs(value - right) <= slack:
        return
    counted = f"\nCounted over all lengths: {right:.1f} %."
    expect(
        abs(100 * value - right) > slack,
        "not-in-percent",
        f"{name} is {value}: a share, not percent.\nTimes 100.",
    )
    for whole in (size, size - 1):
        for beside in (500.5, 500.5 + whole):
            expect(
                abs(value - 100 * whole / beside) > slack / 2,
                "whole-block",
                f"{name} is {value:.1f}: you take a whole block of each chat as empty. A last block"
                f" holds 1 to {size} tokens, all equally often: about half of it is"
                f" empty.{counted}",
            )
    for half in (size / 2, (size - 1) / 2):
        expect(
            abs(value - 100 * half / 500.5) > slack,
            "share-of-tokens",
            f"{name} is {value:.1f}: empty room for each *token*. Asked for is its share of the"
            f" *memory* in use, tokens and empty room together.{counted}",
        )
    raise Mistake(
        "wrong-values",
        f"{name} is {value:.1f} %. About {(size - 1) / 2} of a chat's slots are empty, beside 500.5"
        f" tokens.{counted}",
    )


def _measure_pool(num_blocks: int) -> tuple[int, int]:
    """(blocks, how many chats of 700 tokens a real block manager takes)."""
    from minivllm.engine.block_manager import BlockManager
    from minivllm.engine.sequence import Sequence
    from minivllm.sampling_params import SamplingParams

    manager = BlockManager(num_blocks, 16, enable_prefix_caching=False)
    chats = 0
    while manager.allocate(Sequence(chats, [0] * 700, SamplingParams()), 700):
        chats += 1
    return manager.num_blocks, chats


def _empty_share(size: int) -> float:
    """Percent of the slots in use that are empty, over chats of 1 to 1,000 tokens."""
    slots = sum(-(-n // size) * size for n in range(1, 1001))
    return 100 * (slots - sum(range(1, 1001))) / slots


# --- 03.6 -----------------------------------------------------------------------------------------


@exercise(
    "03.6",
    "A Triton kernel that splits",
    hints={
        "no-maximum": 1,
        "no-rescale": 1,
        "reads-beyond-the-context": 1,
        "values-not-masked": 1,
        "tile-taken-for-a-block": 1,
        "query-head-as-kv-head": 1,
        "no-scale": 1,
        "every-split-reads-all": 2,
        "splits-overlap": 2,
        "tokens-left-out": 2,
        "empty-split-is-nan": 3,
        "empty-split-counts": 3,
        "empty-split-wrote-nothing": 3,
        "walks-beyond-the-context": 2,
    },
)
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
        pages = _pages(
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
        _diagnose(
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
