"""Qwen3, and through the same decoder Qwen2, Qwen2.5 and Llama: they differ in biases and in
QK-norm only.

A block reads the residual stream, normalises, attends, adds; normalises, applies the MLP, adds. The
additions are fused into the next norm, so `hidden` (what a block has just produced) and `residual`
(the stream before it) travel together. Module names follow the checkpoint's tensor names; q, k, v
and gate, up are fused (layers/linear.py). Taught in notebooks/06_qwen3.ipynb."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from minivllm.config import ModelConfig
from minivllm.kernels import Kernels
from minivllm.kernels.rotary import NormRope
from minivllm.layers.attention import AttentionMetadata, KVCache, attend
from minivllm.layers.embedding import Embedding, OutputHead
from minivllm.layers.linear import FusedLinear, Linear, RowParallelLinear
from minivllm.layers.mlp import SwiGLU
from minivllm.layers.norm import RMSNorm
from minivllm.layers.rotary import rope_table
from minivllm.parallel.group import SINGLE, TensorParallelGroup


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions and, in Qwen3, a norm on
    every head.
    """

    def __init__(
        self, config: ModelConfig, kernels: Kernels, group: TensorParallelGroup = SINGLE
    ) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        # Whole heads: this rank's query heads, and the KV heads that those attend to.
        q, kv = (
            group.part(n, config.head_dim)
            for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_size, self.kv_size, shards = (
            len(q),
            len(kv),
            {"q_proj": q, "k_proj": kv, "v_proj": kv},
        )
        self.qkv_proj = FusedLinear(config.hidden_size, shards, config.qkv_bias, kernels)
        self.o_proj = RowParallelLinear(q.total, config.hidden_size, config.o_bias, kernels, group)
        # Two norms, with a weight each (reference bug 9); applied inside the qk_norm_rope kernel.
        self.q_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps, kernels) if config.qk_norm else None
        )
        self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps, kernels) if config.qk_norm else None
        )

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        head_dim = self.config.head_dim
        query, key, value = self.qkv_proj(hidden).split(
            [self.q_size, self.kv_size, self.kv_size], dim=-1
        )
        query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in (query, key, value))
        q_weight, k_weight = (
            (self.q_norm.weight, self.k_norm.weight) if self.q_norm is not None else (None, None)
        )
        given = NormRope(q_weight, k_weight, cos_sin, positions, self.config.rms_norm_eps)
        query = self.kernels.qk_norm_rope_store(
            query, key, value, given, cache, metadata.slot_mapping
        )
        out = attend(query, cache, metadata, head_dim**-0.5, self.kernels)
        return self.o_proj(out.flatten(-2))


class DecoderLayer(nn.Module):
    def __init__(
        self, config: ModelConfig, kernels: Kernels, group: TensorParallelGroup = SINGLE
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.self_attn = Attention(config, kernels, group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp = SwiGLU(
            config.hidden_size, config.intermediate_size, config.mlp_bias, kernels, group
        )

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, residual) -> (hidden, residual), each [T, hidden_size]; the stream is their
        sum.
        """
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, positions, cos_sin, cache, metadata)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Decoder(nn.Module):
    """Everything between token ids and the final norm; called `model` in checkpoints."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, group: TensorParallelGroup = SINGLE
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, group)
        self.layers = nn.ModuleList(
            DecoderLayer(config, kernels, group) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)


class Qwen3ForCausalLM(nn.Module):
    """The decoder and its head, or one rank's share of them. max_position: rows of the rope
    table.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        max_position: int,
        device: torch.device,
        group: TensorParallelGroup = SINGLE,
    ) -> None:
        super().__init__()
        self.config, self.model = config, Decoder(config, kernels, group)
        tied_to = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = OutputHead(config.vocab_size, config.hidden_size, tied_to, kernels, group)
        # A plain attribute: derived, in float32 whatever the model's dtype, and in no checkpoint.
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions: [T] int64; caches: one a layer -> normalised hidden states, [T,
        hidden_size].
        """
        hidden, residual = self.model.embed_tokens(token_ids), None
        for layer, cache in zip(self.model.layers, caches, strict=True):
            hidden, residual = layer(hidden, residual, positions, self.cos_sin, cache, metadata)
        return self.model.norm(hidden, residual)[0]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> [R, vocab_size]."""
        return self.lm_head(hidden)


def weight_shapes(config: ModelConfig, group: TensorParallelGroup = SINGLE) -> set[tuple[int, int]]:
    """[output features, input features] of every matrix product of the model, or of this rank's
    share: found in a model of one layer that takes no memory.
    """
    nowhere = torch.device("meta")
    with nowhere:
        layer = replace(config, num_hidden_layers=1)
        model = Qwen3ForCausalLM(layer, Kernels.reference(), 1, nowhere, group)
    products = [part for part in model.modules() if isinstance(part, Linear | OutputHead)]
    return {(part.weight.shape[0], part.weight.shape[1]) for part in products}
