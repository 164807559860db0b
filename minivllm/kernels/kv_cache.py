"""The paged KV cache (Kwon et al. 2023, arXiv:2309.06180): where a token's key and value live, and how they get there.

A cache is ``[num_blocks, KH, block_size, D]``. Token p of a sequence lies in block ``block_table[p // block_size]`` at offset
``p % block_size``; its *slot* is ``block * block_size + offset``. The heads come before the offset, so that what one attention
program reads of a block, one head's ``[block_size, D]``, is one contiguous piece.

Cost of storing with e bytes a number: 4·T·KH·D·e bytes (K and V, read and written), no arithmetic. One token of Qwen3-0.6B's
shape is 4 kB a layer each way.
"""

from __future__ import annotations

import torch

from minivllm.kernels._triton import tl, triton


@triton.jit
def page_of(table_ptr, first, seq_len, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Block number and offset within it of the tokens first ... first + BLOCK_N - 1 of one sequence.

    first is a multiple of BLOCK_N. Entries of the table at or beyond seq_len are never read: they may be anything.
    """
    if BLOCK_SIZE % BLOCK_N == 0:  # the tile lies within one block: one look-up
        block = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
        return block, first % BLOCK_SIZE + tl.arange(0, BLOCK_N)
    else:
        tokens = first + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < seq_len, other=0).to(tl.int64)
        return block, tokens % BLOCK_SIZE


@triton.jit
def _store_kv_kernel(
    key_ptr, value_ptr, k_cache_ptr, v_cache_ptr, slot_mapping_ptr, key_stride, key_head_stride, value_stride,
    value_head_stride, block_stride, head_stride, slot_stride,
    KH: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token moves all KH·D numbers of its key and its value."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    index = tl.arange(0, BLOCK)
    head, column = index // D, index % D
    inside = (index < KH * D) & (slot >= 0)  # -1: a padded row, or a token whose K/V are there already
    target = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride + head * head_stride + column
    key = tl.load(key_ptr + token * key_stride + head * key_head_stride + column, mask=inside)
    tl.store(k_cache_ptr + target, key, mask=inside)
    value = tl.load(value_ptr + token * value_stride + head * value_head_stride + column, mask=inside)
    tl.store(v_cache_ptr + target, value, mask=inside)


def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write key, value ``[T, KH, D]`` (strided views allowed) to slot_mapping ``[T]`` int64; -1 writes nowhere.

    Caches ``[num_blocks, KH, block_size, D]``, the same strides for both, changed in place. Slots must differ, and lie within
    the cache (not checked: a check would wait for the GPU). Raises ValueError for last dimensions that are not contiguous
    or caches of different layout.
    """
    tokens, num_kv_heads, dim = key.shape
    if k_cache.stride() != v_cache.stride() or any(t.stride(-1) != 1 for t in (key, value, k_cache)):
        raise ValueError("store_kv: needs contiguous last dimensions and two caches of one layout")
    if tokens:
        _store_kv_kernel[(tokens,)](
            key, value, k_cache, v_cache, slot_mapping, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
            KH=num_kv_heads, D=dim, BLOCK_SIZE=k_cache.shape[2], BLOCK=triton.next_power_of_2(num_kv_heads * dim),
        )  # fmt: skip


def store_kv_reference(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    wanted = slot_mapping >= 0
    slots, block_size = slot_mapping[wanted], k_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = key[wanted]
    v_cache[block, :, offset] = value[wanted]
