"""A rank's part of Qwen3, right or with a mistake: for 09.6, and for the counts of 09.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
    from minivllm.course.sim.ranks import Group


def the_rank_model(**how: Any) -> type:
    """The class of 09.6: right by default, wrong in the ways that the options name.

    residual, doubled, averaged: "attention", "mlp" or "both", where the stream is inside the sum,
    the sum is made twice, and the sum is divided. strided: the end of the names of weights that are
    cut in steps of size. dealt: KV heads are dealt around; first: only the first ones are kept.
    heads: "q" or "qo", which of these two are cut in steps of whole heads. no_mask, inclusive,
    mean_rows: faults of embed. swapped: of mlp. always_tied, padding_kept, scrambled, added, below:
    of compute_logits.
    """
    import torch
    import torch.nn.functional as F

    from minivllm.layers.attention import cached_attention

    def cut(name: str) -> bool:
        return name.endswith(how.get("strided", ("no such name",)))

    class RankModel:
        def __init__(
            self,
            config: ModelConfig,
            kernels: Any,
            weights: Mapping[str, torch.Tensor],
            cos_sin: torch.Tensor,
            rank: int,
            size: int,
        ) -> None:
            self.config = config
            self.kernels = kernels
            self.cos_sin = cos_sin
            self.rank = rank
            self.size = size
            self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

        def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
            rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
            if name.endswith("q_proj.weight") and "q" in how.get("heads", ""):
                return tensor.unflatten(0, (-1, self.config.head_dim))[rank::size].flatten(0, 1)
            if name.endswith("o_proj.weight") and "o" in how.get("heads", ""):
                by_head = tensor.unflatten(1, (-1, self.config.head_dim))
                return by_head[:, rank::size].flatten(1, 2)
            if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
                return tensor[rank::size] if cut(name) else tensor.chunk(size)[rank]
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                parts = min(size, kv_heads)
                place = rank % parts if how.get("dealt") else rank * parts // size
                return tensor.chunk(parts)[0 if how.get("first") and size > kv_heads else place]
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                return tensor[:, rank::size] if cut(name) else tensor.chunk(size, dim=1)[rank]
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                rows = -(-self.config.vocab_size // size)
                padded = F.pad(tensor, (0, 0, 0, rows * size - self.config.vocab_size))
                return padded[rank * rows : (rank + 1) * rows]
            return tensor

        def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
            rows = self.w["model.embed_tokens.weight"]
            local = token_ids - self.rank * len(rows)
            mine = (local >= 0) & (local < len(rows) + bool(how.get("inclusive")))
            found = rows[local.clamp(0, len(rows) - 1)]
            if not how.get("no_mask"):
                found = torch.where(mine[:, None], found, torch.zeros_like(found))
            total = group.all_reduce(found)
            return total / group.size if how.get("mean_rows") else total

        def attention(
            self,
            group: Group,
            layer: str,
            x: torch.Tensor,
            positions: torch.Tensor,
            cache: Any,
            metadata: Any,
        ) -> torch.Tensor:
            c, w = self.config, self.w
            q, k, v = (
                (x @ w[f"{layer}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, c.head_dim))
                for n in "qkv"
            )
            norms = (w[f"{layer}.self_attn.q_norm.weight"], w[f"{layer}.self_attn.k_norm.weight"])
            q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, c.rms_norm_eps)
            self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
            out = cached_attention(q, cache, metadata, c.head_dim**-0.5, self.kernels).flatten(-2)
            return self._sum(group, out @ w[f"{layer}.self_attn.o_proj.weight"].T, "attention")

        def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
            gate, up, down = (
                self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            if how.get("swapped"):
                gate, up = up, gate
            h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
            return self._sum(group, h @ down.T, "mlp")

        def _sum(self, group: Group, term: torch.Tensor, where: str) -> torch.Tensor:
            total = group.all_reduce(term)
            if how.get("doubled") in (where, "both"):
                total = group.all_reduce(total)
            return total / group.size if how.get("averaged") in (where, "both") else total

        def _stream(self, group: Group, x: torch.Tensor, where: str) -> torch.Tensor:
            return x * group.size if how.get("residual") in (where, "both") else x

        def forward(
            self,
            group: Group,
            token_ids: torch.Tensor,
            positions: torch.Tensor,
            caches: Any,
            metadata: Any,
        ) -> torch.Tensor:
            c, norm, w = self.config, self.kernels.rms_norm, self.w
            x = self.embed(group, token_ids)
            for i, pages in enumerate(caches):
                layer = f"model.layers.{i}"
                h = norm(x, w[f"{layer}.input_layernorm.weight"], c.rms_norm_eps)
                branch = self.attention(group, layer, h, positions, pages, metadata)
                x = self._stream(group, x, "attention") + branch
                h = norm(x, w[f"{layer}.post_attention_layernorm.weight"], c.rms_norm_eps)
                branch = self.mlp(group, layer, h)
                x = self._stream(group, x, "mlp") + branch
            return norm(x, w["model.norm.weight"], c.rms_norm_eps)

        def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
            head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
            if how.get("always_tied"):
                head = self.w["model.embed_tokens.weight"]
            if how.get("added"):
                logits = group.all_reduce(hidden @ head.T)
            elif how.get("scrambled") or how.get("below"):
                logits = group.all_gather(hidden @ head.T, dim=0)
                logits = logits.reshape(len(hidden), -1) if how.get("scrambled") else logits
            else:
                logits = group.all_gather(hidden @ head.T)
            return logits if how.get("padding_kept") else logits[:, : self.config.vocab_size]

    return RankModel
