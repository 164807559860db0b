"""What a model's operations cost at least: bytes that must cross the memory bus once, and
floating-point operations.

A multiplication and an addition are two operations. Bytes count each input read once and each
output written once; weights and caches come from memory, for they are far larger than any cache on
the way. Taught in notebooks/10_measuring.ipynb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivllm.config import SCALE_BYTES, ModelConfig


@dataclass(frozen=True)
class Rates:
    """What a machine can do: bytes read per second, operations of matrix products per second."""

    read_bytes_per_second: float
    matmul_flops_per_second: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The longer of the two: no implementation is faster."""
        return max(num_bytes / self.read_bytes_per_second, flops / self.matmul_flops_per_second)


@dataclass(frozen=True)
class ModelCosts:
    """A decoder in numbers; all counts are of elements but for the last three."""

    layer_weights: int  # of the matrices of all layers
    head_weights: int  # of the matrix that gives the logits
    kv_elements_per_token: int
    attention_flops_per_pair: (
        int  # of one query token looking at one key, over all heads and layers
    )
    bytes_per_element: int
    #: With a quantized KV cache the bytes of a token's K and V; None: those of its elements.
    quantized_kv_bytes: int | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        return self.quantized_kv_bytes or self.kv_elements_per_token * self.bytes_per_element

    @staticmethod
    def of(
        config: ModelConfig | dict[str, Any], bytes_per_element: int, kv_cache_dtype: str = "auto"
    ) -> ModelCosts:
        """config: a `ModelConfig`, or the "model_config" of a report."""
        values = config if isinstance(config, dict) else vars(config)
        hidden, layers, dim = values["hidden_size"], values["num_hidden_layers"], values["head_dim"]
        heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        layer = (
            hidden * (heads + 2 * kv_heads) * dim
            + heads * dim * hidden
            + 3 * hidden * values["intermediate_size"]
        )
        return ModelCosts(
            layer_weights=layers * layer,
            head_weights=values["vocab_size"] * hidden,
            kv_elements_per_token=2 * layers * kv_heads * dim,
            attention_flops_per_pair=layers * attention_flops(heads, dim, 1),
            bytes_per_element=bytes_per_element,
            quantized_kv_bytes=None
            if kv_cache_dtype == "auto"
            else 2 * layers * kv_heads * kv_row_bytes(dim, bytes_per_element, kv_cache_dtype),
        )


def kv_row_bytes(head_dim: int, element: int, kv_cache_dtype: str) -> int:
    """Bytes of a head's key or value in the cache. element: bytes per number of the model's."""
    if kv_cache_dtype == "auto":
        return head_dim * element
    return head_dim + (SCALE_BYTES if kv_cache_dtype == "int8" else 0)


def attention_flops(heads: int, head_dim: int, pairs: int) -> int:
    """Two matrix products of head_dim for every pair of a query token and a key that it sees."""
    return 4 * heads * head_dim * pairs


def causal_pairs(query_len: int, context: int) -> int:
    """Pairs of query and visible key: the last query_len tokens of a context, each of which sees
    itself and before.
    """
    return query_len * (context - query_len) + query_len * (query_len + 1) // 2


def attention_bytes(
    query_len: int, context: int, heads: int, kv_heads: int, head_dim: int, element: int
) -> int:
    """Queries and outputs once, keys and values of the context once. element: bytes per number."""
    return (2 * query_len * heads + 2 * context * kv_heads) * head_dim * element
