"""A rank's part of Qwen3, right or with a mistake: for 09.6, and for the counts of 09.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
    from minivllm.course.sim.ranks import Group


def rank_model_with(**mistakes: Any) -> type[RightRankModel]:
    """A subclass of `RightRankModel` with these mistakes: names of `_Mistakes`, and values."""
    return type("RankModel", (RightRankModel,), {"mistakes": _Mistakes(mistakes)})


class _Mistakes:
    """Ways to be wrong, by name; those that are not named are None.

    residual, doubled, averaged: "attention", "mlp" or "both", where the stream is inside the sum,
    the sum is made twice, and the sum is divided. strided: the end of the names of weights that are
    cut in steps of size. dealt: KV heads are dealt around; first: only the first ones are kept.
    heads: "q" or "qo", which of these two are cut in steps of whole heads. no_mask, inclusive,
    mean_rows: faults of embed. swapped: of mlp. always_tied, padding_kept, scrambled, added, below:
    of compute_logits.
    """

    _NAMES = frozenset(
        (
            "residual",
            "doubled",
            "averaged",
            "strided",
            "dealt",
            "first",
            "heads",
            "no_mask",
            "inclusive",
            "mean_rows",
            "swapped",
            "always_tied",
            "padding_kept",
            "scrambled",
            "added",
            "below",
        )
    )

    def __init__(self, made: Mapping[str, Any]) -> None:
        unknown = made.keys() - self._NAMES
        assert not unknown, f"no such mistakes: {unknown}"
        self._made = made

    def __getattr__(self, name: str) -> Any:
        if name not in self._NAMES:
            raise AttributeError(name)
        return self._made.get(name)

    def strides(self, name: str) -> bool:
        return bool(self.strided) and name.endswith(self.strided)

    def at(self, kind: str, place: str) -> bool:
        """Whether this mistake is made in attention, or in mlp."""
        return self._made.get(kind) in (place, "both")


class _Parts:
    """Which part of a tensor of the checkpoint a rank keeps."""

    def __init__(self, config: ModelConfig, rank: int, size: int, mistakes: _Mistakes) -> None:
        self.config, self.rank, self.size, self.mistakes = config, rank, size, mistakes

    def of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return self.outputs(name, tensor)
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return self.kv_heads(tensor)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return self.inputs(name, tensor)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            return self.tokens(tensor)
        return tensor

    def outputs(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("q_proj.weight") and "q" in (self.mistakes.heads or ""):
            by_head = tensor.unflatten(0, (-1, self.config.head_dim))
            return by_head[self.rank :: self.size].flatten(0, 1)
        if self.mistakes.strides(name):
            return tensor[self.rank :: self.size]
        return tensor.chunk(self.size)[self.rank]

    def inputs(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("o_proj.weight") and "o" in (self.mistakes.heads or ""):
            by_head = tensor.unflatten(1, (-1, self.config.head_dim))
            return by_head[:, self.rank :: self.size].flatten(1, 2)
        if self.mistakes.strides(name):
            return tensor[:, self.rank :: self.size]
        return tensor.chunk(self.size, dim=1)[self.rank]

    def kv_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = min(self.size, self.config.num_key_value_heads)
        place = self.rank % parts if self.mistakes.dealt else self.rank * parts // self.size
        return tensor.chunk(parts)[0 if self.mistakes.first and self.size > parts else place]

    def tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        vocab, rows = self.config.vocab_size, -(-self.config.vocab_size // self.size)
        padded = F.pad(tensor, (0, 0, 0, rows * self.size - vocab))
        return padded[self.rank * rows : (self.rank + 1) * rows]


class RightRankModel:
    """The class of 09.6. Subclasses have mistakes."""

    mistakes = _Mistakes({})

    def __init__(
        self,
        config: ModelConfig,
        kernels: Any,
        weights: Mapping[str, torch.Tensor],
        cos_sin: torch.Tensor,
        rank: int,
        size: int,
    ) -> None:
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        parts = _Parts(config, rank, size, self.mistakes)
        self.w = {name: parts.of(name, tensor) for name, tensor in weights.items()}

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        import torch

        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows) + bool(self.mistakes.inclusive))
        found = rows[local.clamp(0, len(rows) - 1)]
        if not self.mistakes.no_mask:
            found = torch.where(mine[:, None], found, torch.zeros_like(found))
        total = group.all_reduce(found)
        return total / group.size if self.mistakes.mean_rows else total

    def attention(
        self,
        group: Group,
        layer: str,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        metadata: Any,
    ) -> torch.Tensor:
        from minivllm.layers.attention import cached_attention

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
        import torch

        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        if self.mistakes.swapped:
            gate, up = up, gate
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return self._sum(group, h @ down.T, "mlp")

    def _sum(self, group: Group, term: torch.Tensor, place: str) -> torch.Tensor:
        total = group.all_reduce(term)
        if self.mistakes.at("doubled", place):
            total = group.all_reduce(total)
        return total / group.size if self.mistakes.at("averaged", place) else total

    def _stream(self, group: Group, x: torch.Tensor, place: str) -> torch.Tensor:
        return x * group.size if self.mistakes.at("residual", place) else x

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
        wrong, embedding = self.mistakes, self.w["model.embed_tokens.weight"]
        head = embedding if wrong.always_tied else self.w.get("lm_head.weight", embedding)
        if wrong.added:
            logits = group.all_reduce(hidden @ head.T)
        elif wrong.scrambled or wrong.below:
            logits = group.all_gather(hidden @ head.T, dim=0)
            logits = logits.reshape(len(hidden), -1) if wrong.scrambled else logits
        else:
            logits = group.all_gather(hidden @ head.T)
        return logits if wrong.padding_kept else logits[:, : self.config.vocab_size]
