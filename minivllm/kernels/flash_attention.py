"""Causal attention for many query tokens at a time, over the paged cache (FlashAttention-2: Dao 2023, arXiv:2307.08691)."""

from __future__ import annotations

import torch


def prefill_attention_reference(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    max_query_len: int,
    max_seq_len: int,
) -> torch.Tensor:
    num_kv_heads, block_size, dim = k_cache.shape[1:]
    group = query.shape[1] // num_kv_heads
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    starts = query_start_loc.tolist()
    for i, context in enumerate(seq_lens.tolist()):
        first, last = starts[i], starts[i + 1]
        if first == last:
            continue
        blocks = block_table[i, : -(-context // block_size)]
        key = k_cache.index_select(0, blocks).transpose(0, 1).reshape(num_kv_heads, -1, dim)[:, :context].float()
        value = v_cache.index_select(0, blocks).transpose(0, 1).reshape(num_kv_heads, -1, dim)[:, :context].float()
        # The query heads that share a KV head stand below each other: [KH, q_len * group, D].
        rows = query[first:last].unflatten(1, (num_kv_heads, group)).transpose(0, 1).flatten(1, 2).float()
        scores = torch.matmul(rows, key.transpose(1, 2)).mul_(scale).unflatten(1, (-1, group))
        position = torch.arange(context - (last - first), context, device=query.device)  # aligned to the END
        hidden = torch.arange(context, device=query.device) > position.unsqueeze(1)
        weights = scores.masked_fill_(hidden.unsqueeze(1), float("-inf")).softmax(dim=-1).flatten(1, 2)
        attended = torch.matmul(weights, value).unflatten(1, (-1, group))  # [KH, q_len, group, D]
        out[first:last] = attended.transpose(0, 1).flatten(1, 2)
    return out


def prefill_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    max_query_len: int,
    max_seq_len: int,
) -> torch.Tensor:
    raise NotImplementedError
