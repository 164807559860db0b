"""Attention of one query token a sequence over the paged cache (PagedAttention: Kwon et al. 2023, arXiv:2309.06180), split
along the context where there are too few sequences to fill the GPU (Flash-Decoding: Dao et al. 2023).

Cost per sequence of context n with e bytes a number: 2·n·KH·D·e bytes of K and V against 4·n·H·D FLOPs, that is 2·H/(KH·e)
FLOPs a byte: 2 for Qwen3-0.6B in bf16. The floor is the bandwidth: 256 sequences of 1024 tokens, 8 KV heads of 128, are
1.07 GB a layer, 0.24 ms at 4.4 TB/s.

- The H/KH query heads that share a KV head are one program's rows, padded to the 16 that `tl.dot` wants: K and V are read
  once for all of them, and the padding is free where bandwidth is the floor.
- B · KH programs may leave multiprocessors idle. Then a context is cut into splits, each with its own program, and
  `merge_attention` joins their results by their log-sum-exps.
- The tile BLOCK_N is chosen for speed; block_size only says where the tile's tokens lie (`page_of`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from minivllm.kernels._triton import num_multiprocessors, tl, triton
from minivllm.kernels.kv_cache import check_layout, page_of


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr, scale_log2,
    query_stride, query_head_stride, block_stride, head_stride, slot_stride, table_stride, num_splits,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (sequence, KV head, split): an equal share of the context's tiles."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(seq_lens_ptr + sequence)
    members = tl.arange(0, 16)  # query heads of this KV head; rows from GROUP on are padding
    columns = tl.arange(0, BLOCK_D)
    inside_d = (columns < D)[None, :]
    inside_q = (members < GROUP)[:, None] & inside_d
    heads = kv_head * GROUP + members
    query_rows = query_ptr + sequence.to(tl.int64) * query_stride + heads[:, None] * query_head_stride
    query = tl.load(query_rows + columns[None, :], mask=inside_q, other=0.0)
    k_ptr = k_cache_ptr + kv_head.to(tl.int64) * head_stride
    v_ptr = v_cache_ptr + kv_head.to(tl.int64) * head_stride
    table_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride

    acc = tl.zeros([16, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([16], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([16], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, BLOCK_N), num_splits) * BLOCK_N
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), BLOCK_N):
        block, offset = page_of(table_ptr, first, context, BLOCK_SIZE, BLOCK_N)
        rows = (block * block_stride + offset * slot_stride)[:, None] + columns[None, :]
        known = first + tl.arange(0, BLOCK_N) < context  # the first token of a tile always is: no row is without a key
        inside = known[:, None] & inside_d
        key = tl.load(k_ptr + rows, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(known[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        value = tl.load(v_ptr + rows, mask=inside, other=0.0)  # 0 beyond the context, where 0 · NaN would be NaN
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max

    safe_sum = tl.where(row_sum > 0.0, row_sum, 1.0)  # an empty split, or a padded sequence: output 0, lse -inf
    target = (split.to(tl.int64) * tl.num_programs(0) + sequence) * H + heads
    tl.store(out_ptr + target[:, None] * D + columns[None, :], acc / safe_sum[:, None], mask=inside_q)
    if SPLIT:
        lse = (row_max + tl.log2(safe_sum)) * 0.6931471805599453  # from base 2 to the natural logarithm
        tl.store(lse_ptr + target, lse, mask=members < GROUP)


def choose_num_splits(programs: int, max_seq_len: int, multiprocessors: int) -> int:
    """As many splits as keep one wave of programs, but none of fewer than 128 tokens: merging costs a launch."""
    return max(1, min(multiprocessors // programs, -(-max_seq_len // 128)))


def _tiles(dim: int, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_N, warps, stages; from a sweep on an H200 for head_dim 128 in bf16, scaled to fit elsewhere."""
    return (32, 4, 2) if itemsize == 4 or dim > 128 else (64, 4, 4)


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
    """query ``[B, H, D]``, one new token a sequence -> ``[B, H, D]`` in query.dtype.

    query may be a strided view. Caches ``[num_blocks, KH, block_size, D]`` of one layout and of query.dtype, which hold this token's
    K and V already; block_size a power of two, H/KH at most 16. block_table ``[B, max_blocks]`` int32, entries beyond a context
    are never read; seq_lens ``[B]`` int32 counts the context with this token, 0 = a padded row, whose output is 0.
    max_seq_len: an upper bound known to the host. num_splits: None = `choose_num_splits`. With more than one split,
    merge_attention gets ``[S, B, H, D]`` and ``[S, B, H]`` float32 (see `online_softmax`). Raises ValueError for heads that do not
    divide or more than 16 a group, a block_size that is no power of two, or an unsuitable layout.
    """
    batch, heads, dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    check_layout("decode_attention", query, k_cache, v_cache, block_table)
    if heads // num_kv_heads > 16:
        raise ValueError(f"decode_attention: at most 16 query heads a KV head, got {heads // num_kv_heads}")
    if num_splits is None:
        programs = max(1, batch * num_kv_heads)
        num_splits = choose_num_splits(programs, max_seq_len, num_multiprocessors(query.device))
    split = num_splits > 1
    shape, dtype = (num_splits, batch, heads, dim), torch.float32 if split else query.dtype
    out = torch.empty(shape, dtype=dtype, device=query.device)
    lse = torch.empty(shape[:3], dtype=torch.float32, device=query.device) if split else out
    block_n, warps, stages = _tiles(dim, query.element_size())
    if batch:
        _decode_kernel[(batch, num_kv_heads, num_splits)](
            out, lse, query, k_cache, v_cache, block_table, seq_lens, scale * math.log2(math.e),
            query.stride(0), query.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
            block_table.stride(0), num_splits, H=heads, GROUP=heads // num_kv_heads, D=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_SIZE=block_size, BLOCK_N=block_n, SPLIT=split,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return merge_attention(out, lse).to(query.dtype) if split else out[0]


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
    """As `decode_attention`, for any block_size, on any device: every block of every sequence is a split.

    Only the blocks in use are gathered, nothing is padded to the longest context. Two threads of the course's CPU, float32,
    4 query and 2 KV heads of 64, block_size 16, contexts 10 to 256 (best of 80):
    @TABLE@
    """
    batch, heads, dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    blocks_used = (seq_lens + block_size - 1) // block_size
    splits = max(1, int(blocks_used.max()))
    # Row s * batch + b of the partial results is block s of sequence b; `used` lists the rows that have a block.
    used = (torch.arange(splits, device=query.device).unsqueeze(1) < blocks_used).flatten().nonzero().squeeze(1)
    split, sequence = used // batch, used % batch
    blocks = block_table[sequence, split]
    key, value = k_cache.index_select(0, blocks).float(), v_cache.index_select(0, blocks).float()  # [P, KH, bs, D]
    tokens_left = seq_lens[sequence] - split * block_size
    beyond = torch.arange(block_size, device=query.device) >= tokens_left.unsqueeze(1)  # [P, bs]
    last = beyond[:, -1].nonzero().squeeze(1)  # only a sequence's last block can be partly empty: 0 · NaN is NaN
    value[last] = value[last].masked_fill(beyond[last].view(-1, 1, block_size, 1), 0.0)

    rows = query.float().index_select(0, sequence).view(-1, heads // num_kv_heads, dim)  # [P * KH, group, D]
    scores = torch.bmm(rows, key.flatten(0, 1).transpose(1, 2)).mul_(scale).view(len(used), heads, block_size)
    scores.masked_fill_(beyond.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(dim=-1, keepdim=True)
    weights = scores.sub_(lse).exp_().view(-1, heads // num_kv_heads, block_size)
    out = torch.bmm(weights, value.flatten(0, 1)).view(len(used), heads, dim)

    partial_out = torch.zeros(splits * batch, heads, dim, device=query.device).index_copy_(0, used, out)
    partial_lse = torch.full((splits * batch, heads), float("-inf"), device=query.device)
    partial_lse.index_copy_(0, used, lse.squeeze(2))
    if splits == 1:
        return partial_out.to(query.dtype)
    partial_out, partial_lse = partial_out.view(splits, batch, heads, dim), partial_lse.view(splits, batch, heads)
    return merge_attention(partial_out, partial_lse).to(query.dtype)
