"""The paged KV cache (Kwon et al. 2023, arXiv:2309.06180): where a token's key and value lie, and
how they get there.

A cache is ``[num_blocks, KH, block_size, D]``. Token p of a sequence lies in block
``block_table[p // block_size]`` at offset ``p % block_size``. Its *slot* is
``block · block_size + offset``. Heads come before offsets: what one attention program reads of a
block, one head's ``[block_size, D]``, is one contiguous piece.

Cost of storing with e bytes per number: 4·T·KH·D·e bytes (K and V, read and written) and no
arithmetic, so bandwidth is the floor. A token of Qwen3-0.6B's shape in bf16 is 4 kB per layer.
Taught in notebooks/03_paged_kv_cache.ipynb.
"""

from torch import Tensor

from minivllm.kernels._triton import check_rows, tl, triton


def store_kv_reference(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write key, value ``[T, KH, D]`` to the slots slot_mapping ``[T]`` int64 of the caches; -1
    writes nowhere.
    """
    block_size = k_cache.shape[2]
    wanted = slot_mapping >= 0
    slots = slot_mapping[wanted]
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = key[wanted]
    v_cache[blocks, :, offsets] = value[wanted]


@triton.jit
def _store_kv_kernel(
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    key_stride,
    value_stride,
    KH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token moves all KH·D numbers of its key and its value."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    index = tl.arange(0, BLOCK)
    # -1: a padded row, or a token whose K and V are there already
    inside = index < tl.where(slot >= 0, KH * D, 0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    target = ((block * KH + index // D) * BLOCK_SIZE + offset) * D + index % D
    tl.store(
        k_cache_ptr + target,
        tl.load(key_ptr + token * key_stride + index, mask=inside),
        mask=inside,
    )
    tl.store(
        v_cache_ptr + target,
        tl.load(value_ptr + token * value_stride + index, mask=inside),
        mask=inside,
    )


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write key, value ``[T, KH, D]`` (tokens may be strided) to slot_mapping ``[T]`` int64; -1 =
    nowhere.

    Contiguous caches ``[num_blocks, KH, block_size, D]``, any block_size, changed in place. Slots
    differ and lie within the cache (not checked: a check would wait for the GPU). ValueError for
    other strides.
    """
    check_rows("store_kv", key, value)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("store_kv: needs contiguous caches")
    tokens, num_kv_heads, dim = key.shape
    if tokens:
        _store_kv_kernel[(tokens,)](
            key,
            value,
            k_cache,
            v_cache,
            slot_mapping,
            key.stride(0),
            value.stride(0),
            KH=num_kv_heads,
            D=dim,
            BLOCK_SIZE=k_cache.shape[2],
            BLOCK=triton.next_power_of_2(num_kv_heads * dim),
        )


# --- what both attention kernels use ------------------------------------------------------------


@triton.jit
def cache_rows(
    table_ptr,
    first,
    context,
    kv_head,
    KH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where in a cache the rows of tokens first ... first + BLOCK_N - 1 begin: a base, and offsets
    [BLOCK_N] from it.

    first is a multiple of BLOCK_N. The table's entries beyond the context are never read: they may
    be anything.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        # The tile lies within one block: one look-up, and every tile has the same offsets.
        block = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
        base = ((block * KH + kv_head) * BLOCK_SIZE + first % BLOCK_SIZE) * D
        offsets = tl.arange(0, BLOCK_N) * D
    else:
        tokens = first + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < context, other=0).to(
            tl.int64
        )
        base = kv_head.to(tl.int64) * BLOCK_SIZE * D
        offsets = (block * KH * BLOCK_SIZE + tokens % BLOCK_SIZE) * D
    return base, offsets


def check_attention(name: str, query: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor):
    """What both attention kernels ask of their inputs; ValueError otherwise."""
    check_rows(name, query, table)
    heads, num_kv_heads, block_size = query.shape[1], k_cache.shape[1], k_cache.shape[2]
    if heads % num_kv_heads:
        raise ValueError(f"{name}: {heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"{name}: block_size must be a power of two from 16 up, got {block_size}")
    if not (
        k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and query.dtype == k_cache.dtype == v_cache.dtype
    ):
        raise ValueError(f"{name}: needs contiguous caches of the query's dtype, {query.dtype}")
