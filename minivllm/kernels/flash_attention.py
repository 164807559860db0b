"""Causal attention of many query tokens over the paged cache, without ever writing the matrix of
scores (FlashAttention: Dao et al. 2022, arXiv:2205.14135; FlashAttention-2: Dao 2023,
arXiv:2307.08691).

``out = softmax(scale · q Kᵀ + mask) V``. A program takes BLOCK_M queries of one head of one
sequence and walks along the keys by tiles of BLOCK_N with a running maximum, sum and output
(`online_softmax`). The mask is aligned to the END: query i of q_len sits at position
``context - q_len + i`` and sees the keys up to there. So a whole prompt, a chunk of one and the
rest after a prefix hit are one case. Keys below every query of the tile need no mask, keys above
all of them are never visited, and only the tiles on the diagonal are masked.
``exp(x) = exp2(x · log2 e)``, the constant folded into scale. Taught in
notebooks/02_flash_attention.ipynb.

Cost of a prompt of n tokens, per head: 4·D·n²/2 FLOPs (two matrix products, half of each above the
diagonal) against 4·n·D numbers. Arithmetic is the floor from a few hundred tokens on: 16 heads of
128 and n = 4096 are 69 GFLOP, 0.1 ms at 680 TFLOP/s. An H200 reached (cuDNN): 16 x 1024 311 TFLOP/s
(403), 4 x 4096 417 (507), 1 x 16384 462 (561). What paid: the tiles and stages of `_tiles`, equal
offsets in every tile (`cache_rows`: 313 to 328), for short prompts at most 168 registers (64 x 256:
146 to 168). What did not: tensor descriptors (+1 to 3 %), loads without the mask of columns.
"""

import math

import torch

from minivllm.kernels._triton import tl, triton
from minivllm.kernels.kv_cache import (
    Cache,
    cache_parts,
    cache_rows,
    check_attention,
    read_blocks,
)


def prefill_attention_reference(
    query: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    max_query_len: int,
    max_seq_len: int,
) -> torch.Tensor:
    """As `prefill_attention`, for any block_size: one sequence after the other."""
    num_kv_heads, block_size, dim = k_cache.shape[1:]
    group = query.shape[1] // num_kv_heads
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    starts = query_start_loc.tolist()
    for i, context in enumerate(seq_lens.tolist()):
        first, last = starts[i], starts[i + 1]
        blocks = block_table[i, : -(-context // block_size)]
        key, value = (
            read_blocks(cache, blocks).transpose(0, 1).reshape(num_kv_heads, -1, dim)[:, :context]
            for cache in (k_cache, v_cache)
        )
        # The query heads that share a KV head stand below each other: [KH, q_len · group, D].
        rows = (
            query[first:last]
            .unflatten(1, (num_kv_heads, group))
            .transpose(0, 1)
            .flatten(1, 2)
            .float()
        )
        scores = (
            torch.matmul(rows, key.transpose(1, 2)).mul_(scale).unflatten(1, (last - first, group))
        )
        # aligned to the END
        positions = torch.arange(context - (last - first), context, device=query.device)
        hidden = (torch.arange(context, device=query.device) > positions.unsqueeze(1)).unsqueeze(1)
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        weights = weights.masked_fill_(hidden, 0.0)  # a row that sees no key: 0, not NaN
        attended = torch.matmul(weights.flatten(1, 2), value).unflatten(1, (last - first, group))
        out[first:last] = attended.transpose(0, 1).flatten(1, 2)
    return out


@triton.jit
def _attend_tile(
    acc,
    row_max,
    row_sum,
    query,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    table_ptr,
    first,
    context,
    positions,
    kv_head,
    scale_log2,
    KH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
):
    """One step of the online softmax, over keys first ... first + BLOCK_N - 1."""
    columns = tl.arange(0, BLOCK_D)
    tokens = first + tl.arange(0, BLOCK_N)
    base, rows = cache_rows(table_ptr, first, context, kv_head, KH, D, BLOCK_SIZE, BLOCK_N)
    offsets = rows[:, None] + columns[None, :]
    inside = (columns < D)[None, :]
    if MASKED:
        # Beyond the context lies anything, NaN too, and 0 · NaN is NaN: it must be read as 0.
        inside = inside & (tokens < context)[:, None]
    key = tl.load(k_cache_ptr + base + offsets, mask=inside, other=0.0)
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
    if KIND == "int8":
        scale_rows, known = base // D + rows // D, tokens < context
        scores *= tl.load(k_scales_ptr + scale_rows, mask=known, other=0.0)[None, :]
    if MASKED:
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
    finite_max = new_max
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - finite_max)
    weights = tl.exp2(scores * scale_log2 - finite_max[:, None])  # one fused multiply-add per score
    row_sum = row_sum * rescale + tl.sum(weights, axis=1)
    value = tl.load(v_cache_ptr + base + offsets, mask=inside, other=0.0)
    if KIND == "int8":
        weights *= tl.load(v_scales_ptr + scale_rows, mask=known, other=0.0)[None, :]
    weights, value = weights.to(query.dtype), value.to(query.dtype)
    acc = tl.dot(weights, value, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit(
    do_not_specialize=["block_table_ptr", "query_start_loc_ptr", "seq_lens_ptr", "table_stride"]
)
def _prefill_kernel(
    out_ptr,
    query_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    scale_log2,
    query_stride,
    table_stride,
    H: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
):
    """Program (head, tile of queries, sequence). The grid suits the longest query; tiles beyond
    others end at once.
    """
    head = tl.program_id(0)
    # The last tile has the most keys: it starts first, so that no long program is left for the end.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    sequence = tl.program_id(2).to(tl.int64)
    start = tl.load(query_start_loc_ptr + sequence)
    query_len = tl.load(query_start_loc_ptr + sequence + 1) - start
    context = tl.load(seq_lens_ptr + sequence)
    if first_row < query_len:
        members = first_row + tl.arange(0, BLOCK_M)
        # rows beyond query_len: see, but not stored
        positions = tl.minimum(context - query_len + members, context - 1)
        columns = tl.arange(0, BLOCK_D)
        inside = (members < query_len)[:, None] & (columns < D)[None, :]
        token = (start + members).to(tl.int64)
        query_rows = query_ptr + token * query_stride + head * D
        query = tl.load(query_rows[:, None] + columns[None, :], mask=inside, other=0.0)
        table_ptr = block_table_ptr + sequence * table_stride
        kv_head = head // (H // KH)
        if KIND == "fp8":
            scale_log2 *= tl.load(k_scales_ptr + kv_head)
            if query.dtype == tl.bfloat16:
                query = query.to(tl.float16)  # as in decode_attention

        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        # keys that the tile's first query sees
        seen_by_all = tl.maximum(context - query_len + first_row + 1, 0)
        diagonal = seen_by_all // BLOCK_N * BLOCK_N
        end = tl.minimum(context - query_len + first_row + BLOCK_M, context)
        for first in range(0, diagonal, BLOCK_N):
            acc, row_max, row_sum = _attend_tile(
                acc,
                row_max,
                row_sum,
                query,
                k_cache_ptr,
                v_cache_ptr,
                k_scales_ptr,
                v_scales_ptr,
                table_ptr,
                first,
                context,
                positions,
                kv_head,
                scale_log2,
                KH,
                D,
                BLOCK_D,
                BLOCK_SIZE,
                BLOCK_N,
                MASKED=False,
                KIND=KIND,
            )
        for first in range(diagonal, end, BLOCK_N):
            acc, row_max, row_sum = _attend_tile(
                acc,
                row_max,
                row_sum,
                query,
                k_cache_ptr,
                v_cache_ptr,
                k_scales_ptr,
                v_scales_ptr,
                table_ptr,
                first,
                context,
                positions,
                kv_head,
                scale_log2,
                KH,
                D,
                BLOCK_D,
                BLOCK_SIZE,
                BLOCK_N,
                MASKED=True,
                KIND=KIND,
            )
        out = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]  # a row that sees no key gives 0
        if KIND == "fp8":
            out *= tl.load(v_scales_ptr + kv_head)
        tl.store(out_ptr + ((token * H + head) * D)[:, None] + columns[None, :], out, mask=inside)


def _tiles(row_bytes: int, max_query_len: int, max_seq_len: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps, stages, swept on an H200 for head_dim 128 in bf16; narrower where a
    row is longer.
    """
    if row_bytes > 256:
        return 32, 32, 4, 2
    if max_query_len <= 16:  # a few tokens each: wide tiles would be mostly padding
        return 16, 64, 4, 4
    if max_query_len <= 256:
        return 64, 32, 4, 5
    return (64, 64, 4, 5) if max_seq_len <= 8192 else (128, 64, 8, 5)


def prefill_attention(
    query: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    max_query_len: int,
    max_seq_len: int,
) -> torch.Tensor:
    """query ``[T, H, D]`` (tokens may be strided) -> ``[T, H, D]``: each sequence's new tokens over
    its whole context.

    Rows query_start_loc[i] to query_start_loc[i + 1] (``[B + 1]`` int32, from 0 to T) belong to
    sequence i. Contiguous caches ``[num_blocks, KH, block_size, D]`` of query.dtype or quantized,
    which hold these tokens' K and V already; block_size a power of two from 16 up. block_table
    ``[B, max_blocks]`` int32, never read beyond a context; seq_lens ``[B]`` int32, the context with
    the new tokens. max_query_len, max_seq_len: upper bounds that the host knows, so that no launch
    waits for the GPU. ValueError for other shapes, strides or dtypes.
    """
    check_attention("prefill_attention", query, k_cache, v_cache, block_table)
    tokens, heads, dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    block_m, block_n, warps, stages = _tiles(dim * query.element_size(), max_query_len, max_seq_len)
    keys, k_scales, kind = cache_parts(k_cache)
    values, v_scales, _ = cache_parts(v_cache)
    if tokens:
        _prefill_kernel[(heads, triton.cdiv(max_query_len, block_m), len(seq_lens))](
            out,
            query,
            keys,
            values,
            k_scales,
            v_scales,
            block_table,
            query_start_loc,
            seq_lens,
            scale * math.log2(math.e),
            query.stride(0),
            block_table.stride(0),
            H=heads,
            KH=num_kv_heads,
            D=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            BLOCK_SIZE=block_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            KIND=kind,
            num_warps=warps,
            num_stages=stages,
        )
    return out
