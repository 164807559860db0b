"""Attention over the paged KV cache: read this step's and all earlier keys and values through the
block table.

Taught in notebooks/03_paged_kv_cache.ipynb."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minivllm.kernels import Kernels
from minivllm.kernels.kv_cache import Cache

#: (k_cache, v_cache) of one layer, each [num_blocks, num_kv_heads, block_size, head_dim]: tensors
#: of the model's dtype, or `QuantizedCache`s.
KVCache = tuple[Cache, Cache]


@dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens belong to which sequence, and where their keys and values live. B sequences, T
    tokens.
    """

    query_start_loc: torch.Tensor  # [B + 1] int32: cumulative number of new tokens
    seq_lens: torch.Tensor  # [B] int32: context length, this step's tokens included
    block_table: torch.Tensor  # [B, max_blocks] int32: entries beyond a context are arbitrary
    #: [T] int64: block * block_size + offset, where K and V are written; -1 writes nowhere
    slot_mapping: torch.Tensor
    num_decodes: int  # the first so many sequences have exactly one new token
    max_query_len: int
    max_seq_len: int
    max_decode_seq_len: int  # the longest context among the decodes; 0 when there are none


@dataclass(frozen=True)
class ForwardContext:
    """What one run of the model hands to every layer beside its input (vLLM's term). T tokens."""

    positions: torch.Tensor  # [T] int64, of each token in its sequence
    cos_sin: torch.Tensor  # [max_position, head_dim] float32: the rope table
    caches: Sequence[KVCache]  # one per layer: a layer finds its own by its index
    metadata: AttentionMetadata


def cached_attention(
    query: torch.Tensor, cache: KVCache, metadata: AttentionMetadata, scale: float, kernels: Kernels
) -> torch.Tensor:
    """query: [T, H, D] -> [T, H, D]. The cache holds this step's keys and values already.

    The first `metadata.num_decodes` sequences have one token each and take the decode kernel, which
    spreads a long context over the machine; the others take the prefill kernel, which works on
    tiles of queries.
    """
    num_decodes, num_seqs = metadata.num_decodes, metadata.seq_lens.shape[0]
    parts = []
    if num_decodes:
        table, seq_lens = metadata.block_table[:num_decodes], metadata.seq_lens[:num_decodes]
        limits = {
            "max_seq_len": metadata.max_decode_seq_len,
            "merge_attention": kernels.merge_into(query.dtype),
        }
        parts.append(
            kernels.decode_attention(query[:num_decodes], *cache, table, seq_lens, scale, **limits)
        )
    if num_decodes < num_seqs:
        table, seq_lens = metadata.block_table[num_decodes:], metadata.seq_lens[num_decodes:]
        starts = metadata.query_start_loc[num_decodes:] - num_decodes  # each decode has one token
        limits = {"max_query_len": metadata.max_query_len, "max_seq_len": metadata.max_seq_len}
        parts.append(
            kernels.prefill_attention(
                query[num_decodes:], *cache, table, starts, seq_lens, scale, **limits
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)
