"""Qwen3, and through the same decoder the other families of registry.py (Qwen2, Llama, …): they
differ in biases and in QK-norm only.

A block reads the residual stream twice. It normalises, attends, and adds the result to the stream;
it normalises, applies the MLP, and adds again. The additions are fused into the next norm. So
`hidden` (the newest result) and `residual` (the stream before it) travel together. Module names
follow the checkpoint's tensor names; q, k, v and gate, up are fused (layers/linear.py). Taught in
notebooks/06_qwen3.ipynb."""

from collections.abc import Sequence

import torch
from torch import nn

from minivllm.config import LayerOptions, ModelConfig
from minivllm.kernels import Kernels
from minivllm.kernels.rotary import NormRope
from minivllm.layers.attention import AttentionMetadata, ForwardContext, KVCache, cached_attention
from minivllm.layers.embedding import Embedding, OutputHead
from minivllm.layers.linear import UNQUANTIZED, FusedLinear, LinearMethod, RowParallelLinear
from minivllm.layers.mlp import SwiGLU
from minivllm.layers.norm import RMSNorm
from minivllm.layers.rotary import rope_table
from minivllm.models.config_fields import ConfigFields
from minivllm.parallel.group import SINGLE, TensorParallelGroup


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions and, in Qwen3, a norm on
    every head. layer_index: which of the KV caches is this layer's.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        layer_index: int,
        group: TensorParallelGroup = SINGLE,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        super().__init__()
        self.config, self.kernels, self.layer_index = config, kernels, layer_index
        self.scale = config.head_dim**-0.5
        # Whole heads: this rank's query heads, and the KV heads that those cached_attention to.
        q = group.part(config.num_attention_heads, config.head_dim)
        kv = group.part(config.num_key_value_heads, config.head_dim)
        self.qkv_sizes = [len(q), len(kv), len(kv)]
        shards = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = FusedLinear(config.hidden_size, shards, config.qkv_bias, kernels, method)
        self.o_proj = RowParallelLinear(
            q.total, config.hidden_size, config.o_bias, kernels, group, method
        )
        # Two norms, with a weight each (reference bug 9); applied inside the qk_norm_rope kernel.
        self.q_norm = self._head_norm() if config.qk_norm else None
        self.k_norm = self._head_norm() if config.qk_norm else None

    def _head_norm(self) -> RMSNorm:
        return RMSNorm(self.config.head_dim, self.config.rms_norm_eps, self.kernels)

    def forward(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        q, k, v = self.qkv_proj(hidden).split(self.qkv_sizes, dim=-1)
        query, key, value = (x.unflatten(-1, (-1, self.config.head_dim)) for x in (q, k, v))
        cache, metadata = context.caches[self.layer_index], context.metadata
        q_norm, k_norm = self.q_norm, self.k_norm
        norm_rope = NormRope(
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            context.cos_sin,
            context.positions,
            self.config.rms_norm_eps,
        )
        query = self.kernels.qk_norm_rope_store(
            query, key, value, norm_rope, cache, metadata.slot_mapping
        )
        out = cached_attention(query, cache, metadata, self.scale, self.kernels)
        return self.o_proj(out.flatten(-2))


class DecoderLayer(nn.Module):
    """One block: attention and the MLP, each behind a norm. layer_index: its number, from 0."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        layer_index: int,
        group: TensorParallelGroup = SINGLE,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.self_attn = Attention(config, kernels, layer_index, group, method)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp = SwiGLU(*sizes, config.mlp_bias, kernels, group, method)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, residual) -> (hidden, residual), each [T, hidden_size]; their sum is the
        stream. residual is None in the first block.
        """
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, context)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Decoder(nn.Module):
    """Everything between token ids and the final norm; called `model` in checkpoints."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        group: TensorParallelGroup = SINGLE,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, group)
        self.layers = nn.ModuleList(
            DecoderLayer(config, kernels, layer_index, group, method)
            for layer_index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def forward(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """token_ids: [T] int64 -> normalised hidden states, [T, hidden_size]."""
        hidden, residual = self.embed_tokens(token_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, context)
        return self.norm(hidden, residual)[0]


class Qwen3ForCausalLM(nn.Module):
    """The decoder and its head, or one rank's share of them.

    max_position: rows of the rope table. method: what every linear layer does with its weight.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        max_position: int,
        device: torch.device,
        group: TensorParallelGroup = SINGLE,
        method: LinearMethod = UNQUANTIZED,
    ) -> None:
        super().__init__()
        sizes = (config.vocab_size, config.hidden_size)
        self.config, self.model = config, Decoder(config, kernels, group, method)
        tied_to = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = OutputHead(*sizes, tied_to, kernels, group, method)
        # A plain attribute: derived, in float32 whatever the model's dtype, and in no checkpoint.
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    @staticmethod
    def read_layer_options(read: ConfigFields) -> LayerOptions:
        """What this family's layers are, from config.json. A family that differs overrides it.

        Raises `UnsupportedModelError` for what the family's checkpoints may ask for and its class
        does not do.
        """
        bias = read("attention_bias", bool, False)
        return LayerOptions(bias, bias, read("mlp_bias", bool, False), qk_norm=True)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: Sequence[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions: [T] int64; caches: one per layer -> normalised hidden states, [T,
        hidden_size].
        """
        return self.model(token_ids, ForwardContext(positions, self.cos_sin, caches, metadata))

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> [R, vocab_size]."""
        return self.lm_head(hidden)
