"""Attention of one query token a sequence over the paged cache, split along the context."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
    raise NotImplementedError
