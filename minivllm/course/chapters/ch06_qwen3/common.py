"""What the exercises of chapter 06 share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


EPS = 1e-6


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of every head: x [T, heads, D], positions [T] -> [T,
    heads, D].
    """
    import torch

    frequencies = theta ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.outer(positions.float(), frequencies).unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat(
        (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1
    )


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention: query [T, H, D], key and value [T, KH, D] -> [T, H, D]."""
    import torch

    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(dim=-1), value
    )


@cache
def bundled_weights() -> dict[str, torch.Tensor]:
    """The tensors of the bundled model by name, in float32."""
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.models.loader import iterate_weights

    return {name: tensor.float() for name, tensor in iterate_weights(BUNDLED_MODEL_PATH)}


class Layer(dict):
    """The tensors of a layer by name; a dict that a message shows in a few words."""

    def __repr__(self) -> str:
        fresh = all(bool((t == 1).all()) for name, t in self.items() if "norm" in name)
        return f"a layer's tensors (norm weights {'all 1' if fresh else 'not 1'})"


def layer_weights(index: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer of the bundled model, by what follows ``model.layers.N.`` in
    their names.
    """
    prefix = f"model.layers.{index}."
    mine = [(name, tensor) for name, tensor in bundled_weights().items() if name.startswith(prefix)]
    return Layer((name.removeprefix(prefix), tensor) for name, tensor in mine)


def run_blocks(block: Callable, token_ids: Sequence[int]) -> list[torch.Tensor]:
    """The stream of the bundled model at the start and after each block, computed with this
    block.
    """
    import torch

    stream = [bundled_weights()["model.embed_tokens.weight"][torch.tensor(token_ids)]]
    for i in range(6):
        stream.append(block(stream[-1].clone(), layer_weights(i), torch.arange(len(token_ids))))
    return stream


def right_sizes(token_ids: Sequence[int]) -> list[float]:
    """The right size of that stream at each of these places: a root mean square, averaged over
    the tokens.
    """
    return sizes(run_blocks(the_block, token_ids))


def sizes(stream: Iterable[torch.Tensor]) -> list[float]:
    return [x.square().mean(dim=-1).sqrt().mean().item() for x in stream]


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
