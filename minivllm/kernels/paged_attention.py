"""Attention of one query token per sequence over the paged cache (PagedAttention: Kwon et al. 2023,
arXiv:2309.06180).

Cost per sequence of context n with e bytes per number: 2·n·KH·D·e bytes of K and V against 4·n·H·D
FLOPs. That is 2·H/(KH·e) FLOPs per byte, 2 for Qwen3-0.6B in bf16, so bandwidth is the floor: 256
sequences of 1024 tokens with 8 KV heads of 128 are 1.07 GB per layer, 0.23 ms at 4.6 TB/s. Reached
on an H200: 0.24 ms. Tried without gain: tensor descriptors, all KV heads in one program. Taught in
notebooks/03_paged_kv_cache.ipynb.

- The H/KH query heads that share a KV head are the rows of one program, padded to the 16 that
  `tl.dot` wants. K and V are read once for all of them. Bandwidth is the floor, so the padding is
  free.
- B·KH programs may leave multiprocessors idle. Then each context is cut into splits with a program
  each, and `merge_attention` joins their results by their log-sum-exps (Flash-Decoding: Dao et al.
  2023).
- The tile BLOCK_N is chosen for speed; block_size only says where the tile's tokens lie
  (`cache_rows`).
- ``exp(x) = exp2(x · log2 e)``, and that constant is folded into the scale.
"""

import math
from collections.abc import Callable

import torch

from minivllm.kernels._triton import launched_early, num_multiprocessors, tl, triton
from minivllm.kernels.kv_cache import cache_rows, check_attention


def decode_attention_reference(
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
    """As `decode_attention`, for any block_size. Every block of the longest context is a split;
    what lies beyond a context is masked.
    """
    batch, heads, dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    splits = max(1, -(-int(seq_lens.max()) // block_size))
    positions = torch.arange(splits * block_size, device=query.device).view(splits, block_size)
    known = positions < seq_lens.view(-1, 1, 1)  # [B, S, block_size]
    # Beyond a context the table holds anything, and the cache too, NaN as well: 0 · NaN is NaN.
    blocks = block_table[:, :splits].where(known.any(dim=-1), 0)
    key = k_cache[blocks].float()  # [B, S, KH, block_size, D]
    value = v_cache[blocks].float().masked_fill(~known[:, :, None, :, None], 0.0)

    # The query heads that share a KV head stand below each other: [B, 1, KH, H / KH, D].
    rows = query.float().view(batch, 1, num_kv_heads, -1, dim) * scale
    scores = rows @ key.transpose(-1, -2)  # [B, S, KH, H / KH, block_size]
    scores = scores.masked_fill(~known[:, :, None, None], float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a split without a key gives 0
    partial_out = (weights @ value).view(batch, splits, heads, dim).transpose(0, 1).contiguous()
    lse = scores.logsumexp(dim=-1).view(batch, splits, heads).transpose(0, 1).contiguous()
    out = merge_attention(partial_out, lse) if splits > 1 else partial_out[0]
    return out.to(query.dtype)


# What changes from step to step must not make Triton compile anew: neither numbers nor the
# alignment of slices.
@triton.jit(do_not_specialize=["block_table_ptr", "seq_lens_ptr", "table_stride", "num_splits"])
def _decode_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    scale_log2,
    query_stride,
    table_stride,
    num_splits,
    KH: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (KV head, sequence, split): an equal share of the context's tiles."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    context = tl.load(seq_lens_ptr + sequence)
    members = tl.arange(0, 16)  # query heads of this KV head; rows from GROUP on are padding
    columns = tl.arange(0, BLOCK_D)
    inside_q = (members < GROUP)[:, None] & (columns < D)[None, :]
    heads = kv_head * GROUP + members
    query_rows = query_ptr + sequence * query_stride + heads * D
    query = tl.load(query_rows[:, None] + columns[None, :], mask=inside_q, other=0.0)

    acc = tl.zeros([16, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([16], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([16], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, BLOCK_N), num_splits) * BLOCK_N
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), BLOCK_N):
        base, rows = cache_rows(
            block_table_ptr + sequence * table_stride,
            first,
            context,
            kv_head,
            KH,
            D,
            BLOCK_SIZE,
            BLOCK_N,
        )
        # true for a tile's first token: no tile is without a key
        known = first + tl.arange(0, BLOCK_N) < context
        inside = known[:, None] & (columns < D)[None, :]
        key = tl.load(k_cache_ptr + base + rows[:, None] + columns[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(known[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        # Beyond the context lies anything, NaN too, and 0 · NaN is NaN: it must be read as 0.
        value_rows = v_cache_ptr + base + rows[:, None]
        value = tl.load(value_rows + columns[None, :], mask=inside, other=0.0)
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max

    # an empty split, or a padded sequence: output 0, lse -inf
    safe_sum = tl.where(row_sum > 0.0, row_sum, 1.0)
    target = (split * tl.num_programs(1) + sequence) * (KH * GROUP) + heads
    tl.store(
        out_ptr + target[:, None] * D + columns[None, :], acc / safe_sum[:, None], mask=inside_q
    )
    if SPLIT:
        # from base 2 to the natural logarithm
        lse = (row_max + tl.log2(safe_sum)) * 0.6931471805599453
        tl.store(lse_ptr + target, lse, mask=members < GROUP)


def choose_num_splits(programs: int, max_seq_len: int, multiprocessors: int) -> int:
    """As many as give every multiprocessor a program, but at most one per 128 tokens begun, for
    merging costs a launch.
    """
    return max(1, min(-(-multiprocessors // max(1, programs)), -(-max_seq_len // 128)))


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
    """query ``[B, H, D]``, one new token per sequence (which may be strided) -> ``[B, H, D]`` in
    query.dtype.

    Contiguous caches ``[num_blocks, KH, block_size, D]`` of query.dtype, which hold this token's K
    and V already; block_size a power of two from 16 up, H/KH at most 16. block_table
    ``[B, max_blocks]`` int32, never read beyond a context; seq_lens ``[B]`` int32, the context with
    this token, 0 = a padded row, whose output is 0. max_seq_len: an upper bound that the host
    knows. num_splits: None = `choose_num_splits`. With more than one, merge_attention gets float32
    ``[S, B, H, D]`` and ``[S, B, H]`` (see `online_softmax`); if it gives query.dtype already
    (`Kernels.merge_into`), no launch is needed to convert. ValueError for other shapes, strides or
    dtypes.
    """
    check_attention("decode_attention", query, k_cache, v_cache, block_table)
    batch, heads, dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    if heads > 16 * num_kv_heads:
        raise ValueError(
            f"decode_attention: at most 16 query heads a KV head, got {heads // num_kv_heads}"
        )
    if num_splits is None:
        num_splits = choose_num_splits(
            batch * num_kv_heads, max_seq_len, num_multiprocessors(query.device)
        )
    split = num_splits > 1
    out_dtype = torch.float32 if split else query.dtype
    out = torch.empty(num_splits, batch, heads, dim, dtype=out_dtype, device=query.device)
    lse = (
        torch.empty(num_splits, batch, heads, dtype=torch.float32, device=query.device)
        if split
        else out
    )
    # BLOCK_N, warps, stages from a sweep on an H200 for head_dim 128 in bf16, narrower where a row
    # is longer. With many programs, small ones keep more bytes in flight; a few that share a
    # context do better with a deeper pipeline.
    block_n, warps, stages = (64, 4, 5) if split else (32, 2, 5)
    if dim * query.element_size() > 256:
        block_n, warps, stages = 32, 4, 2
    if batch:
        _decode_kernel[(num_kv_heads, batch, num_splits)](
            out,
            lse,
            query,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            scale * math.log2(math.e),
            query.stride(0),
            block_table.stride(0),
            num_splits,
            KH=num_kv_heads,
            GROUP=heads // num_kv_heads,
            D=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)),
            BLOCK_SIZE=block_size,
            BLOCK_N=block_n,
            SPLIT=split,
            num_warps=warps,
            num_stages=stages,
            **launched_early(batch, query.device),
        )
    if not split:
        return out[0]
    return merge_attention(out, lse).to(query.dtype)
