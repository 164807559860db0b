"""What the exercises of chapter 06 share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minivllm.course.sim.bundled_layers import Layer, attend, rope

if TYPE_CHECKING:
    import torch


EPS = 1e-6


def the_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    import torch

    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def the_block(
    x: torch.Tensor,
    w: dict[str, torch.Tensor],
    positions: torch.Tensor,
    *,
    stream: tuple[str, str] = ("x", "x"),
    norms: str = "qk",
    swapped: bool = False,
    post: bool = False,
    same_norm: bool = False,
    order: str = "norm first",
    mlp_reads: str = "its norm",
) -> torch.Tensor:
    """A decoder block: right by default, and wrong in the ways that the options name.

    stream: what the result of each branch is added to: the stream "x", its norm "h", "both", or
    "nothing". norms: whose norm the query and the key get; "--" is none.
    """
    import torch.nn.functional as F

    def added(branch: torch.Tensor, h: torch.Tensor, how: str) -> torch.Tensor:
        return branch + {"x": x, "h": h, "both": x + h, "twice": 2 * x, "nothing": 0.0}[how]

    dim = len(w["self_attn.q_norm.weight"])
    h = x if post else the_norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, dim)) for p in "qkv")
    turned = []
    for y, which in zip((q, k), norms, strict=True):
        weight = w.get(f"self_attn.{which}_norm.weight")
        if order == "norm first":
            turned.append(rope(y if weight is None else the_norm(y, weight), positions))
        else:
            turned.append(the_norm(rope(y, positions), weight))
    branch = attend(*turned, v).flatten(1) @ w["self_attn.o_proj.weight"].T
    x = added(branch, h, stream[0])
    if post:
        x = the_norm(x, w["input_layernorm.weight"])
    second = (
        x
        if post
        else the_norm(
            x, w["input_layernorm.weight" if same_norm else "post_attention_layernorm.weight"]
        )
    )
    h = {"its norm": second, "the stream": x, "the first norm": h}[mlp_reads]
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    if swapped:
        gate, up = up, gate
    x = added((F.silu(gate) * up) @ w["mlp.down_proj.weight"].T, h, stream[1])
    return the_norm(x, w["post_attention_layernorm.weight"]) if post else x


def random_layer(
    random: torch.Generator,
    hidden: int,
    heads: int,
    kv_heads: int,
    dim: int,
    wide: int,
    fresh: bool,
) -> dict:
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
