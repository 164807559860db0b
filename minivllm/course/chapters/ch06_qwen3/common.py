"""What the exercises of chapter 06 share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minivllm.course.sim.bundled_layers import Layer, attend, rope

if TYPE_CHECKING:
    import torch


EPS = 1e-6


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    import torch

    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@dataclass(frozen=True)
class DecoderBlock:
    """How somebody writes a decoder block; as it stands here, rightly.

    stream: what the result of each branch is added to: the stream "x", its norm "h", "both",
    "twice" the stream, or "nothing". norms: whose norm the query and the key get; "--" is none.
    order: "norm first" or "rope first". attention_reads: "its norm" or "the stream". mlp_reads:
    "its norm", "the stream", "the old stream" or "the first norm". post: whether the stream itself
    is normed, after each addition. same_norm: whether both branches take the first norm's weight.
    positions: "given" or "counted" from 0. swapped: whether
    gate and up are.
    """

    stream: tuple[str, str] = ("x", "x")
    norms: str = "qk"
    order: str = "norm first"
    attention_reads: str = "its norm"
    mlp_reads: str = "its norm"
    post: bool = False
    same_norm: bool = False
    positions: str = "given"
    swapped: bool = False

    def __call__(
        self, x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
    ) -> torch.Tensor:
        """The stream [T, hidden] before the block -> the stream after it."""
        bare = self.post or self.attention_reads == "the stream"
        before, h = x, x if bare else normed(x, w["input_layernorm.weight"])
        x = _added(self.attention(h, w, positions), x, h, self.stream[0])
        if self.post:
            x = h = normed(x, w["input_layernorm.weight"])
        else:
            h = self.for_mlp(before, x, h, w)
        gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        if self.swapped:
            gate, up = up, gate
        branch = (gate * gate.sigmoid() * up) @ w["mlp.down_proj.weight"].T
        x = _added(branch, x, h, self.stream[1])
        return normed(x, w["post_attention_layernorm.weight"]) if self.post else x

    def attention(
        self, h: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor
    ) -> torch.Tensor:
        """What attention adds to the stream."""
        import torch

        dim = len(w["self_attn.q_norm.weight"])
        if self.positions == "counted":
            positions = torch.arange(len(h))
        q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, dim)) for p in "qkv")
        turned = []
        for y, which in zip((q, k), self.norms, strict=True):
            weight = w.get(f"self_attn.{which}_norm.weight")
            if self.order == "norm first":
                turned.append(rope(y if weight is None else normed(y, weight), positions))
            else:
                turned.append(normed(rope(y, positions), weight))
        return attend(*turned, v).flatten(1) @ w["self_attn.o_proj.weight"].T

    def for_mlp(
        self, before: torch.Tensor, x: torch.Tensor, h: torch.Tensor, w: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """What the MLP reads.

        before, x: the stream before and after attention; h: what attention read.
        """
        weight = w[f"{'input' if self.same_norm else 'post_attention'}_layernorm.weight"]
        return {
            "its norm": normed(x, weight),
            "the stream": x,
            "the old stream": normed(before, weight),
            "the first norm": h,
        }[self.mlp_reads]


def _added(branch: torch.Tensor, x: torch.Tensor, h: torch.Tensor, how: str) -> torch.Tensor:
    return branch + {"x": x, "h": h, "both": x + h, "twice": 2 * x, "nothing": 0.0}[how]


def random_layer(
    random: torch.Generator,
    hidden: int,
    heads: int,
    kv_heads: int,
    dim: int,
    wide: int,
    fresh: bool,
) -> dict:
    """A layer's tensors, by their names in the checkpoint. fresh: the weights of norms are 1."""
    import torch

    def norm(size: int) -> torch.Tensor:
        return torch.ones(size) if fresh else torch.rand(size, generator=random) * 1.5 + 0.25

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * columns**-0.5

    return Layer(
        {
            "input_layernorm.weight": norm(hidden),
            "post_attention_layernorm.weight": norm(hidden),
            "self_attn.q_proj.weight": matrix(heads * dim, hidden),
            "self_attn.k_proj.weight": matrix(kv_heads * dim, hidden),
            "self_attn.v_proj.weight": matrix(kv_heads * dim, hidden),
            "self_attn.o_proj.weight": matrix(hidden, heads * dim),
            "self_attn.q_norm.weight": norm(dim),
            "self_attn.k_norm.weight": norm(dim),
            "mlp.gate_proj.weight": matrix(wide, hidden),
            "mlp.up_proj.weight": matrix(wide, hidden),
            "mlp.down_proj.weight": matrix(hidden, wide),
        }
    )
