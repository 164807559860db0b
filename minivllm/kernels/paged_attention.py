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

A cache of 8 bits (`kv_cache.QuantizedCache`) halves the bytes, so also the floor: 2·n·KH·D with fp8
and 2·n·KH·(D + 4) with int8. Numbers are converted in registers, and multiplied in 16 bits. A scale
per head is a factor of all its scores, or of the output; a scale per token is a factor of a score,
or of a weight. Now instructions count, too: at 4 TB/s a multiprocessor of an H200 gets about 17
numbers per clock, and can issue 128 instructions of one number each.

- V's tile is the operand that shared memory must transpose, and it transposes 16 bits at a time. So
  V is read as pairs of numbers, and even and odd columns are multiplied apart. As single numbers,
  each would take a load of its own.
- fp8 is multiplied in float16, which holds every e4m3 number: one instruction converts two. In
  bfloat16 it would be three.
- 256 sequences of 1024 tokens, 120 µs at 4.5 TB/s: 131 µs with fp8 (91 % of the bandwidth), 138
  without the assembly of `_unpack`. int8: 172 µs (72 %), as its conversion takes more instructions.
"""

import math
from collections.abc import Callable

import torch

from minivllm.kernels._triton import num_multiprocessors, tl, triton
from minivllm.kernels.early import launched_early, wait_for_earlier
from minivllm.kernels.kv_cache import (
    Cache,
    cache_parts,
    cache_rows,
    check_attention,
    read_blocks,
)


def decode_attention_reference(
    query: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
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
    key = read_blocks(k_cache, blocks)  # [B, S, KH, block_size, D]
    value = read_blocks(v_cache, blocks).masked_fill(~known[:, :, None, :, None], 0.0)

    # The query heads that share a KV head stand below each other: [B, 1, KH, H / KH, D].
    rows = query.float().view(batch, 1, num_kv_heads, -1, dim) * scale
    scores = rows @ key.transpose(-1, -2)  # [B, S, KH, H / KH, block_size]
    scores = scores.masked_fill(~known[:, :, None, None], float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a split without a key gives 0
    partial_out = (weights @ value).view(batch, splits, heads, dim).transpose(0, 1).contiguous()
    lse = scores.logsumexp(dim=-1).view(batch, splits, heads).transpose(0, 1).contiguous()
    out = merge_attention(partial_out, lse) if splits > 1 else partial_out[0]
    return out.to(query.dtype)


@triton.jit
def _unpack(pairs, like, KIND: tl.constexpr):
    """Pairs of 8-bit numbers [n, D / 2] int16 -> those of even and of odd columns, in the dtype of
    like.
    """
    if KIND == "fp8":
        # A register holds pairs a and b. prmt brings its bytes a0 a1 b0 b1 into the order
        # a0 b0 a1 b1, and cvt converts two neighbours, so three instructions serve four numbers.
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 even, odd;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {even, odd}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, even;
            cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even, odd = pairs.to(tl.int8), (pairs >> 8).to(tl.int8)
    return even.to(like.dtype), odd.to(like.dtype)


# What changes from step to step must not make Triton compile anew: neither numbers nor the
# alignment of slices.
@triton.jit(do_not_specialize=["block_table_ptr", "seq_lens_ptr", "table_stride", "num_splits"])
def _decode_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
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
    KIND: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (KV head, sequence, split): an equal share of the context's tiles."""
    wait_for_earlier(EARLY)
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
    if KIND == "fp8":
        scale_log2 *= tl.load(k_scales_ptr + kv_head)
        if query.dtype == tl.bfloat16:
            query = query.to(tl.float16)  # e4m3 becomes float16 in one instruction, without error

    if KIND == "auto":
        acc = tl.zeros([16, BLOCK_D], dtype=tl.float32)
    else:
        halves = tl.arange(0, BLOCK_D // 2)
        acc = tl.zeros([16, BLOCK_D // 2], dtype=tl.float32)
        acc_odd = tl.zeros([16, BLOCK_D // 2], dtype=tl.float32)
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
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        if KIND == "int8":
            scale_rows = base // D + rows // D
            scores *= tl.load(k_scales_ptr + scale_rows, mask=known, other=0.0)[None, :]
        scores = tl.where(known[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        # Beyond the context lies anything, NaN too, and 0 · NaN is NaN: it must be read as 0.
        if KIND == "auto":
            value_rows = v_cache_ptr + base + rows[:, None]
            value = tl.load(value_rows + columns[None, :], mask=inside, other=0.0)
            weights = weights.to(query.dtype)
            acc = tl.dot(weights, value, acc * rescale[:, None], input_precision="ieee")
        else:
            if KIND == "int8":
                weights *= tl.load(v_scales_ptr + scale_rows, mask=known, other=0.0)[None, :]
            weights = weights.to(query.dtype)
            value_rows = v_cache_ptr + base // 2 + rows[:, None] // 2
            pairs = tl.load(
                value_rows + halves[None, :],
                mask=known[:, None] & (halves < D // 2)[None, :],
                other=0,
            )
            even, odd = _unpack(pairs, query, KIND)
            acc = tl.dot(weights, even, acc * rescale[:, None], input_precision="ieee")
            acc_odd = tl.dot(weights, odd, acc_odd * rescale[:, None], input_precision="ieee")
        row_max = new_max

    # an empty split, or a padded sequence: output 0, lse -inf
    safe_sum = tl.where(row_sum > 0.0, row_sum, 1.0)
    if KIND == "fp8":
        acc *= tl.load(v_scales_ptr + kv_head)
        acc_odd *= tl.load(v_scales_ptr + kv_head)
    target = (split * tl.num_programs(1) + sequence) * (KH * GROUP) + heads
    if KIND != "auto":
        acc = tl.reshape(tl.join(acc, acc_odd), [16, BLOCK_D])
    tl.store(
        out_ptr + target[:, None] * D + columns[None, :], acc / safe_sum[:, None], mask=inside_q
    )
    if SPLIT:
        # from base 2 to the natural logarithm
        lse = (row_max + tl.log2(safe_sum)) * 0.6931471805599453
        tl.store(lse_ptr + target, lse, mask=members < GROUP)


#: BLOCK_N, warps, stages by the kind of cache and whether contexts are split, from sweeps on an
#: H200 for head_dim 128 in bf16 (256 sequences of 1024; of 8 bits with splits not measured). With
#: many programs, small ones keep more bytes in flight; a few that share a context do better with a
#: deeper pipeline.
TILES = {
    ("auto", False): (32, 2, 5),
    ("auto", True): (64, 4, 5),
    ("fp8", False): (32, 2, 5),
    ("fp8", True): (128, 4, 5),
    ("int8", False): (64, 2, 3),
    ("int8", True): (128, 4, 5),
}
#: Where a row of the query is longer than 256 bytes.
NARROW_TILE = 32, 4, 2


def choose_num_splits(programs: int, max_seq_len: int, multiprocessors: int) -> int:
    """As many as give every multiprocessor a program, but at most one per 128 tokens begun, for
    merging costs a launch.
    """
    return max(1, min(-(-multiprocessors // max(1, programs)), -(-max_seq_len // 128)))


def decode_attention(
    query: torch.Tensor,
    k_cache: Cache,
    v_cache: Cache,
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

    Contiguous caches ``[num_blocks, KH, block_size, D]`` of query.dtype or quantized, which hold
    this token's K and V already; block_size a power of two from 16 up, H/KH at most 16. block_table
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
    keys, k_scales, kind = cache_parts(k_cache)
    values, v_scales, _ = cache_parts(v_cache)
    block_n, warps, stages = TILES[kind, split]
    if dim * query.element_size() > 256:
        block_n, warps, stages = NARROW_TILE
    if batch:
        _decode_kernel[(num_kv_heads, batch, num_splits)](
            out,
            lse,
            query,
            keys,
            values if kind == "auto" else values.view(torch.int16),
            k_scales,
            v_scales,
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
            KIND=kind,
            num_warps=warps,
            num_stages=stages,
            **launched_early(batch, query.device),
        )
    if not split:
        return out[0]
    return merge_attention(out, lse).to(query.dtype)
