"""Chapter 06, the model: the checks of its exercises, and what their notebook is given (`rope`,
`attend`, …).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.checking import (
    PROMPTS,
    Mistake,
    counted,
    diagnose,
    engine_agrees,
    exercise,
    expect,
    expect_own_work,
    seeded,
    show,
)

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig

EPS = 1e-6


# --- 06.1 -----------------------------------------------------------------------------------------


@exercise("06.1", "Warm-up: two small pieces")
def check_small_pieces(rms_norm: Callable, silu_mul: Callable) -> str:
    norms = _check_rms_norm(rms_norm)
    gates = _check_silu_mul(silu_mul)
    from minivllm.kernels import Kernels

    norm, gate = counted(rms_norm), counted(silu_mul)
    norm.__name__, gate.__name__ = "rms_norm", "silu_mul"

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple:
        return norm(x + residual, weight, eps), x + residual

    kernels = replace(Kernels.reference(), rms_norm=norm, add_rms_norm=add_rms_norm, silu_mul=gate)
    return f"{norms} norms, {gates} gates, and {engine_agrees(norm, gate, kernels=kernels)}"


def _check_rms_norm(answer: Callable) -> int:
    import torch

    from minivllm.kernels.norm import rms_norm_reference

    random = seeded(1)

    def case(
        rows: int,
        width: int,
        size: float = 1.0,
        shift: float = 0.0,
        eps: float = EPS,
        half: bool = False,
    ) -> tuple:
        dtype = torch.float16 if half else torch.float32
        x = torch.randn(rows, width, generator=random) * size + shift
        return x.to(dtype), (torch.rand(width, generator=random) + 0.5).to(dtype), eps

    apart = case(3, 8)
    apart[0].mul_(torch.tensor([[1.0], [100.0], [0.01]]))
    zeros = case(2, 6)
    zeros[0][1] = 0.0
    simple = torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0
    cases = [
        simple,
        case(1, 1),
        case(2, 5),
        case(4, 64),
        case(3, 7, shift=3.0),
        apart,
        zeros,
        case(3, 16, size=0.01, eps=1e-4),
        case(5, 33, eps=1e-5),
        case(3, 64, half=True),
        case(2, 32, size=400.0, half=True),
    ]

    def norm(
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        mean: Callable | None = None,
        low: bool = False,
        root: Callable | None = None,
        weigh: Callable = torch.mul,
    ) -> torch.Tensor:
        wide = x if low else x.float()
        square = (mean or (lambda y: y.square().mean(-1, keepdim=True)))(wide)
        return weigh((wide / (root or (lambda s: torch.sqrt(s + eps)))(square)).to(x.dtype), weight)

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return norm(wide - wide.mean(-1, keepdim=True), weight, eps).to(x.dtype)

    def eps_outside(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norm(x, weight, eps, root=lambda s: s.sqrt() + eps)

    suspects = {
        "layer-norm": (
            (
                "You subtract the mean first: that is LayerNorm. RMSNorm leaves the mean where it"
                " is.\nDivide x by the root of the mean of its squares, and nothing else."
            ),
            layer_norm,
        ),
        "squares-overflow": (
            (
                "In float32 all is right. In float16 it is not: the square of 400 is 160,000,"
                " beyond the largest float16, so the mean is inf and the row becomes 0.\nTake"
                " x.float() for square, mean and root, and come back to x.dtype afterwards."
            ),
            partial(norm, low=True),
        ),
        "sum-not-mean": (
            (
                "You divide by the root of the sum of squares, which makes vectors of length 1:"
                " numbers get smaller the more there are.\nRMSNorm takes the mean of the squares."
            ),
            partial(norm, mean=lambda y: y.square().sum(-1, keepdim=True)),
            partial(
                norm,
                mean=lambda y: y.square().sum(-1, keepdim=True),
                root=lambda s: s.sqrt().clamp(min=1e-12),
            ),
        ),
        "no-root": (
            (
                "You divide by the mean square, not by its root: a row twice as large comes out"
                " half as large.\nTake torch.sqrt (or multiply with torch.rsqrt)."
            ),
            lambda x, weight, eps: norm(x, weight, eps, root=lambda s: s + eps),
        ),
        "eps-outside-the-root": (
            (
                "eps stands outside the root. For small numbers that is another result: √(s + eps)"
                " is not √s + eps.\nAdd it to the mean square, then take the root."
            ),
            eps_outside,
        ),
        "eps-forgotten": (
            (
                "eps is not used: a row of zeros is divided by 0, and small rows come out too"
                " large.\nAdd it to the mean square, inside the root."
            ),
            partial(norm, root=lambda s: s.sqrt()),
        ),
        "eps-typed-in": (
            (
                "You add an eps of your own, not the one you are given. Checkpoints differ: Qwen"
                " has 1e-6, Llama 1e-5.\nUse the argument."
            ),
            *(lambda x, weight, eps, e=e: norm(x, weight, e) for e in (1e-6, 1e-5, 1e-8)),
        ),
        "one-size-for-all-rows": (
            (
                "You divide all rows by the same number, the root mean square of the whole table.\n"
                "Each row (token) has its own: .mean(dim=-1, keepdim=True)."
            ),
            partial(norm, mean=lambda y: y.square().mean()),
        ),
        "wrong-axis": (
            (
                "You take the mean down the columns, over the tokens. A token's norm must not"
                " depend on its neighbours.\nOf [T, N], dim=-1 runs along a row."
            ),
            partial(norm, mean=lambda y: y.square().mean(0, keepdim=True)),
        ),
        "no-weight": (
            (
                "The rows have the right size, but the learned weight is not used.\nMultiply by it"
                " in the end."
            ),
            partial(norm, weigh=lambda y, w: y),
        ),
        "weight-plus-one": (
            (
                "You multiply by 1 + weight. Gemma stores its norms so; Qwen and Llama store the"
                " weight itself.\nMultiply by weight."
            ),
            partial(norm, weigh=lambda y, w: y * (1 + w)),
        ),
        "weight-inside": (
            (
                "You multiply by the weight first, and norm the product: the mean square is then"
                " that of weighted numbers.\nNorm x, then multiply."
            ),
            lambda x, weight, eps: norm(
                x.float() * weight.float(), torch.ones_like(weight).float(), eps
            ).to(x.dtype),
        ),
        "mean-of-sizes": (
            (
                "You divide by the mean absolute value. That is a size, too, but not the root mean"
                " square.\nSquare, mean, root: in this order."
            ),
            lambda x, weight, eps: norm(
                x, weight, eps, mean=lambda y: y.abs().mean(-1, keepdim=True) ** 2
            ),
        ),
    }
    # Half precision: whoever stays in float32 up to the weight rounds once less.
    number = diagnose(answer, cases, rms_norm_reference, suspects, rtol=3e-3)
    expect_own_work(
        answer,
        cases[2],
        ("rms_norm", "layer_norm", "normalize"),
        "squares, means, roots, sigmoid and products",
    )
    return number


def _check_silu_mul(answer: Callable) -> int:
    import torch
    import torch.nn.functional as F

    from minivllm.kernels.activation import silu_mul_reference

    random = seeded(2)
    wide = torch.randn(3, 16, generator=random) * 60
    wide[0, :3] = torch.tensor([-200.0, 200.0, 100.0])
    half = (torch.randn(4, 12, generator=random) * 3).to(torch.float16)
    shapes = ((1, 2), (2, 4), (5, 14), (3, 256))
    tables = [
        torch.zeros(2, 4),
        *(torch.randn(*shape, generator=random) * 2 for shape in shapes),
        wide,
        half,
    ]

    def halves(activate: Callable, order: int = 1) -> Callable:
        def mul(gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)[::order]
            return (activate(gate.float()) * up.float()).to(gate_up.dtype)

        return mul

    def by_exp(z: torch.Tensor) -> torch.Tensor:
        return z * torch.exp(z) / (1 + torch.exp(z))

    suspects = {
        "up-before-gate": (
            (
                "SiLU is taken of the wrong half: the first N columns are the gates, the last N the"
                " ups.\n(Whoever makes this mistake in both, loader and model, would not even"
                " notice.)"
            ),
            halves(F.silu, -1),
        ),
        "interleaved-halves": (
            (
                "You take every second column for the gate. Here the two matrices lie below each"
                " other, so gates are the first N columns, and ups the last N.\n`gate_up.chunk(2,"
                " dim=-1)` cuts there."
            ),
            lambda g: F.silu(g[:, ::2]) * g[:, 1::2],
        ),
        "sigmoid-alone": (
            (
                "Your gate is sigmoid(gate): that is GLU, the parent of SwiGLU.\n"
                "SiLU is gate · sigmoid(gate): three factors with up."
            ),
            halves(torch.sigmoid),
        ),
        "another-activation": (
            (
                "The product is right, but the activation is not SiLU (GEGLU takes GELU, ReGLU"
                " takes ReLU).\nsilu(z) = z · sigmoid(z)."
            ),
            *map(halves, (F.gelu, partial(F.gelu, approximate="tanh"), F.relu, torch.tanh)),
        ),
        "silu-of-both": (
            "Both halves go through SiLU. Only the gate does; up stays as it is.\nsilu(gate) * up.",
            lambda g: F.silu(g.chunk(2, dim=-1)[0]) * F.silu(g.chunk(2, dim=-1)[1]),
        ),
        "silu-of-the-product": (
            (
                "You multiply first, and take SiLU of the product.\nsilu(gate) * up: the gate alone"
                " goes through it."
            ),
            lambda g: F.silu(g.chunk(2, dim=-1)[0] * g.chunk(2, dim=-1)[1]),
        ),
        "no-activation": (
            (
                "You multiply gate and up as they are: nothing is gated.\nThe gate goes through"
                " SiLU first."
            ),
            halves(lambda z: z),
        ),
        "added-not-multiplied": (
            (
                "You add gate and up. A gate multiplies: where it is 0, nothing passes.\nsilu(gate)"
                " * up."
            ),
            lambda g: F.silu(g.chunk(2, dim=-1)[0]) + g.chunk(2, dim=-1)[1],
        ),
        "exp-overflows": (
            (
                "exp(gate) overflows from 89 on: inf / inf is nan. Chapter 1's old friend.\nWrite"
                " sigmoid as 1 / (1 + exp(-gate)), whose limits are 0 and 1, or take torch.sigmoid."
            ),
            halves(by_exp),
        ),
    }
    cases = [(table,) for table in tables]
    number = diagnose(answer, cases, silu_mul_reference, suspects, rtol=3e-3)
    expect_own_work(
        answer, cases[2], ("silu", "glu"), "squares, means, roots, sigmoid and products"
    )
    return number


# --- 06.2 -----------------------------------------------------------------------------------------

#: Qwen3-4B, from its config.json.
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


@cache
def _measure() -> dict[str, int]:
    """Build Qwen3-4B without memory, and count: weights of matrices, and FLOPs of a token
    through the linear layers.
    """
    import torch

    from minivllm.kernels import Kernels
    from minivllm.models.hf_config import config_from_hf
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    flops = 0

    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        nonlocal flops
        flops += 2 * len(x) * weight.numel()
        return x.new_empty(len(x), len(weight))

    config = config_from_hf(QWEN3_4B)
    meta = torch.device("meta")
    with meta:
        model = Qwen3ForCausalLM(
            config, replace(Kernels.reference(), linear=linear), 1, torch.device("cpu")
        )
    layer = model.model.layers[0]
    for each in model.model.layers:
        x = torch.empty(1, config.hidden_size, device=meta)
        heads = torch.empty(1, config.num_attention_heads * config.head_dim, device=meta)
        each.self_attn.qkv_proj(x)
        each.self_attn.o_proj(heads)
        each.mlp(x)
    model.compute_logits(torch.empty(1, config.hidden_size, device=meta))
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    cache_row = torch.empty(
        2,
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        device=meta,
        dtype=torch.bfloat16,
    )
    return {
        "layer": sum(p.numel() for p in layer.parameters() if p.dim() == 2),
        "all": sum(p.numel() for p in matrices.values()),
        "flops": flops,
        "kv": cache_row.nbytes,
        "kv_all_heads": cache_row.nbytes * config.num_attention_heads // config.num_key_value_heads,
        "context": round(flops / pair),
    }


@exercise("06.2", "Predict: Qwen3-4B in six numbers")
def check_predictions(
    layer_weights: float,
    all_weights: float,
    flops: float,
    kv_bytes: float,
    kv_bytes_all_heads: float,
    context: float,
) -> str:
    m = _measure()
    hidden, wide, heads, kv_heads, dim = 2560, 9728, 32, 8, 128
    embedding, layers = 151_936 * hidden, 36
    q, kv, mlp = hidden * heads * dim, hidden * kv_heads * dim, 3 * hidden * wide
    # head_dim taken as hidden_size / heads
    square = 2 * hidden * hidden + 2 * hidden * 8 * 80 + mlp

    def judge(
        name: str, guess: Any, right: int, measured: str, known: dict[float, tuple[str, str]]
    ) -> None:
        if isinstance(guess, bool) or not isinstance(guess, int | float):
            raise Mistake("wrong-type", f"{name} is {show(guess)}.\nA prediction is one number.")
        if math.isclose(guess, right, rel_tol=0.002):
            return
        for value, (mistake, why) in known.items():
            if math.isclose(guess, value, rel_tol=0.002):
                raise Mistake(
                    mistake,
                    f"{name}: you predicted {guess:,.0f}, measured: {right:,}.\n{why} {measured}",
                )
        raise Mistake(
            "wrong-prediction",
            f"{name}: you predicted {guess:,.0f}, measured: {right:,}.\n{measured} "
            "Find out where the difference comes from, then correct your number.",
        )

    not_square = (
        "Of Qwen3, head_dim stands in the config: 32 heads of 128 are 4,096 numbers, more than the"
        " stream has."
    )
    judge(
        "layer_weights",
        layer_weights,
        m["layer"],
        "Measured: the model was built, and one layer's matrices counted: q, k, v, o, gate, up,"
        " down.",
        {
            square: ("head-dim-from-hidden-size", not_square),
            2 * q + 2 * q + mlp: ("forgot-gqa", "k and v have 8 heads, not 32."),
            2 * q + 2 * kv + 2 * hidden * wide: (
                "two-matrices-in-the-mlp",
                "SwiGLU has three: gate, up and down.",
            ),
            q + 2 * kv + mlp: (
                "forgot-o-proj",
                "What the heads say goes through a matrix back to the stream: o_proj.",
            ),
            2 * q + 2 * kv: ("forgot-the-mlp", "That is the attention alone."),
            mlp: ("forgot-attention", "That is the MLP alone."),
            2 * q + kv + mlp: ("one-of-k-and-v", "k and v have a matrix each."),
        },
    )
    judge(
        "all_weights",
        all_weights,
        m["all"],
        "Measured: the model was built, and its matrices counted.",
        {
            layers * m["layer"] + 2 * embedding: (
                "head-counted-twice",
                "The head is tied: it is the embedding.",
            ),
            layers * m["layer"]: (
                "forgot-the-embedding",
                "A row of 2,560 for each of 151,936 tokens is missing.",
            ),
            layers * square + embedding: ("head-dim-from-hidden-size", not_square),
        },
    )
    judge(
        "flops",
        flops,
        m["flops"],
        "Measured: one token went through the model, and every product was counted.",
        {
            m["all"]: (
                "multiplications-only",
                "Each weight is multiplied and added: two operations.",
            ),
            2 * (m["all"] - embedding): (
                "forgot-the-head",
                "Looking a row up is free, but the head is a product with all of the embedding.",
            ),
            2 * (m["all"] + embedding): (
                "look-up-counted",
                "The embedding is only looked up at the start; it is multiplied once, as the head.",
            ),
            m["all"] - embedding: (
                "multiplications-only",
                "Each weight is multiplied and added, the head's too.",
            ),
            6 * m["all"]: (
                "training",
                "Six FLOPs a weight is for training, with the backward pass.",
            ),
        },
    )
    judge(
        "kv_bytes",
        kv_bytes,
        m["kv"],
        "Measured: a tensor of [2, 36, 8, 128] in bfloat16.",
        {
            m["kv"] / 2: ("keys-or-values", "Keys and values are kept, of two bytes a number."),
            m["kv"] * 2: ("float32", "bfloat16 has 2 bytes a number."),
            m["kv_all_heads"]: (
                "forgot-gqa",
                "Only the 8 KV heads are kept; queries are used once and forgotten.",
            ),
            m["kv"] / layers: ("one-layer", "Each of the 36 layers keeps its own."),
            2 * 2 * layers * kv_heads * 80: ("head-dim-from-hidden-size", not_square),
        },
    )
    judge(
        "kv_bytes_all_heads",
        kv_bytes_all_heads,
        m["kv_all_heads"],
        "Four query heads share a KV head: four times.",
        {
            m["kv"]: (
                "forgot-gqa",
                "That is with GQA. Without it each of the 32 query heads has keys and values.",
            ),
            2 * 2 * layers * hidden: ("head-dim-from-hidden-size", not_square),
            m["kv_all_heads"] / 2: (
                "keys-or-values",
                "Keys and values are kept, of two bytes a number.",
            ),
        },
    )
    judge(
        "context",
        context,
        m["context"],
        "Measured: the FLOPs above, over 4 · 36 · 32 · 128 for each token looked at.",
        {
            2 * m["context"]: (
                "one-of-two-products",
                "Attention has two products: query · key, and weights · values.",
            ),
            m["context"] / 2: (
                "multiplications-only",
                (
                    "Count both or neither in FLOPs: attention costs 4 · head_dim a "
                    "head and key, when a multiplication and an addition are two."
                ),
            ),
            4 * m["context"]: (
                "forgot-gqa",
                (
                    "GQA shares keys and values, it saves bytes. All 32 query heads still "
                    "compute their scores."
                ),
            ),
            m["context"] * layers: ("one-layer", "Each of the 36 layers attends."),
            (m["flops"] - 2 * embedding) / (4 * layers * heads * dim): (
                "forgot-the-head",
                "The head is a matrix, too.",
            ),
        },
    )
    return "six predictions, all as measured"


# --- 06.3 -----------------------------------------------------------------------------------------


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
    return sizes(run_blocks(_block, token_ids))


def sizes(stream: Iterable[torch.Tensor]) -> list[float]:
    return [x.square().mean(dim=-1).sqrt().mean().item() for x in stream]


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    import torch

    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _block(
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
    h = x if post else _norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, dim)) for p in "qkv")
    turned = []
    for y, which in zip((q, k), norms, strict=True):
        weight = w.get(f"self_attn.{which}_norm.weight")
        if order == "norm first":
            turned.append(rope(y if weight is None else _norm(y, weight), positions))
        else:
            turned.append(_norm(rope(y, positions), weight))
    branch = attend(*turned, v).flatten(1) @ w["self_attn.o_proj.weight"].T
    x = added(branch, h, stream[0])
    if post:
        x = _norm(x, w["input_layernorm.weight"])
    second = (
        x
        if post
        else _norm(
            x, w["input_layernorm.weight" if same_norm else "post_attention_layernorm.weight"]
        )
    )
    h = {"its norm": second, "the stream": x, "the first norm": h}[mlp_reads]
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    if swapped:
        gate, up = up, gate
    x = added((F.silu(gate) * up) @ w["mlp.down_proj.weight"].T, h, stream[1])
    return _norm(x, w["post_attention_layernorm.weight"]) if post else x


def _random_layer(
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


@exercise("06.3", "Debug this: a block that forgets")
def check_block(answer: Callable) -> str:
    import torch

    random = seeded(3)

    def case(
        tokens: int, fresh: bool, size: float = 1.0, dim: int = 8, heads: int = 4, kv_heads: int = 2
    ) -> tuple:
        layer = _random_layer(random, 24, heads, kv_heads, dim, 40, fresh)
        return torch.randn(tokens, 24, generator=random) * size, layer, torch.arange(tokens)

    cases = [
        case(1, True),
        case(1, False),
        case(4, True, 3.0),
        case(6, False),
        case(9, False, 5.0, dim=6, heads=3, kv_heads=1),
    ]
    real = [torch.randn(12, 256, generator=random) * size for size in (0.13, 8.0)]
    cases += [(x, layer_weights(i), torch.arange(12)) for x, i in zip(real, (0, 5), strict=True)]

    stream = (
        "What a branch finds is added to the normed copy; it belongs to the stream as it was before"
        " the norm.\nGive the norm a name of its own (`h = norm(x, …)`), so that x is still there"
        " to add to."
    )
    shared = (
        "Query and key go through the same norm. There are two weights, q_norm and k_norm: with"
        " both all 1, as in a fresh model, nobody sees it.\nGive each its own."
    )
    suspects = {
        "not-mended": (
            (
                "This block still has both bugs.\nBegin with the picture: which line makes"
                " something else of the stream, so that the addition has nothing of it left to add"
                " to? Then look for a tensor of the layer that is never used."
            ),
            partial(_block, stream=("h", "h"), norms="qq"),
        ),
        "one-norm-for-q-and-k": (
            f"The stream is right now. But: {shared}",
            partial(_block, norms="qq"),
            partial(_block, norms="kk"),
        ),
        "residual-is-the-norm": (
            f"The norms are right now. But: {stream}",
            partial(_block, stream=("h", "h")),
            *(partial(_block, stream=("h", "h"), norms=norms) for norms in ("kk", "kq")),
        ),
        **{
            f"residual-is-the-norm-in-the-{name.lower()}": (
                f"The {name} branch is still wrong. {stream}",
                partial(_block, stream=how),
                partial(_block, stream=how, norms="qq"),
            )
            for name, how in (("attention", ("h", "x")), ("MLP", ("x", "h")))
        },
        "norms-swapped": (
            (
                "Two norms now, but the query gets the key's, and the key the query's.\nq_norm is"
                " for q."
            ),
            partial(_block, norms="kq"),
        ),
        "no-qk-norm": (
            (
                "Query and key are not normed at all now. Qwen2 and Llama do without; Qwen3's"
                " weights need it.\nrope(norm(q, q_norm), positions), and the key with k_norm."
            ),
            partial(_block, norms="--"),
        ),
        "residual-twice": (
            (
                "The stream is added twice: once as it was, and once more. Everything before this"
                " block counts double.\nEach branch adds its result to the stream, once."
            ),
            partial(_block, stream=("twice", "x")),
            partial(_block, stream=("x", "twice")),
            partial(_block, stream=("twice", "twice")),
            partial(_block, stream=("both", "both")),
        ),
        "nothing-added": (
            (
                "A branch's result replaces the stream: what was known before is lost.\nx = x +"
                " branch."
            ),
            *(
                partial(_block, stream=how)
                for how in (("nothing", "x"), ("x", "nothing"), ("nothing", "nothing"))
            ),
        ),
        "norm-after-rope": (
            (
                "The norm comes after the rotation. Its weight multiplies number by number, and"
                " turning has mixed them.\nFirst the norm, then rope."
            ),
            partial(_block, order="rope first"),
        ),
        "one-norm-for-both-branches": (
            "Both branches use input_layernorm. The MLP has its own: post_attention_layernorm.",
            partial(_block, same_norm=True),
        ),
        "mlp-not-normed": (
            (
                "The MLP reads the stream itself, not its normed copy.\nh = norm(x,"
                ' w["post_attention_layernorm.weight"]).'
            ),
            partial(_block, mlp_reads="the stream"),
        ),
        "mlp-reads-the-first-norm": (
            (
                "The MLP reads the copy that was made for attention: it does not see what attention"
                " has added.\nNorm the new x, with post_attention_layernorm."
            ),
            partial(_block, mlp_reads="the first norm"),
        ),
        "post-norm": (
            (
                "You norm after the addition, as the first transformers did: the stream itself is"
                " normed.\nIn Qwen3 a branch norms its own copy; the stream is only ever added to."
            ),
            partial(_block, post=True),
        ),
    }
    number = diagnose(answer, cases, _block, suspects, rtol=1e-3, atol=1e-4)
    return f"{number} blocks, fresh ones and trained ones"


# --- 06.4 -----------------------------------------------------------------------------------------


@exercise("06.4", "QK-norm and RoPE")
def check_qk_norm_rope(answer: Callable) -> str:
    import torch

    from minivllm.config import RopeConfig
    from minivllm.kernels import Kernels
    from minivllm.kernels.rotary import qk_norm_rope_reference
    from minivllm.layers.rotary import rope_table

    random = seeded(4)

    def case(
        positions: Sequence[int],
        heads: int,
        kv_heads: int,
        dim: int,
        norm: bool = True,
        size: float = 1.0,
        eps: float = EPS,
        theta: float = 100.0,
        dtype: torch.dtype | None = None,
    ) -> tuple:
        dtype = dtype or torch.float32
        table = rope_table(RopeConfig(theta), dim, 64, torch.device("cpu"))
        q, k = (
            (torch.randn(len(positions), n, dim, generator=random) * size).to(dtype)
            for n in (heads, kv_heads)
        )
        weights = [
            (torch.rand(dim, generator=random) + 0.5).to(dtype) if norm else None for _ in "qk"
        ]
        return q, k, *weights, table, torch.tensor(positions), eps

    cases = [
        case([0], 1, 1, 2),
        case([0], 2, 1, 4, norm=False),
        case([1], 1, 1, 2, norm=False),
        case([0, 1, 2], 4, 2, 8),
        case([7], 2, 2, 6, size=3.0),
        case([5, 6, 7, 8], 3, 1, 16),
        case([63, 0, 9, 9, 30], 4, 4, 8, norm=False),
        case([3, 40], 2, 1, 8, size=0.01, eps=1e-3),
        case(range(17), 4, 2, 64, theta=1e4),
    ]
    low = [
        case([2, 11, 50], 4, 2, 16, dtype=torch.bfloat16),
        case([4], 2, 1, 8, norm=False, dtype=torch.bfloat16),
        case([3, 20], 2, 1, 16, size=1000.0, dtype=torch.float16),  # its squares are beyond float16
    ]

    def turned(
        query: torch.Tensor,
        key: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        eps: float,
        *,
        pairs: str = "halves",
        sign: float = 1.0,
        order: str = "norm first",
        which: str = "qk",
        turns: str = "qk",
        rows: str = "positions",
        over: str = "head",
        weigh: bool = True,
        eps_used: float | None = None,
        broken: str = "",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Right by default, and wrong in the ways that the options name."""
        at = {
            "positions": positions,
            "from 0": torch.arange(len(positions)),
            "first": positions - positions[0],
            "next": (positions + 1).clamp(max=63),
        }[rows]
        cos, sin = cos_sin[at].unsqueeze(1).chunk(2, dim=-1)
        if broken == "swapped table":
            cos, sin = sin, cos
        weights = {"q": q_weight, "k": k_weight, "-": None}
        eps = eps if eps_used is None else eps_used

        def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
            if weight is None:
                return x
            dims = (-1,) if over == "head" else (-2, -1)
            wide = x if broken == "narrow" else x.float()
            square = wide.square().mean(dims, keepdim=True)
            normed = (wide * torch.rsqrt(square + eps)).to(x.dtype)
            return normed * weight if weigh else normed

        def turn(x: torch.Tensor) -> torch.Tensor:
            c, s = cos, sin * sign
            if pairs == "mixed":  # neighbours turned, by angles laid out for halves
                c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
                partner = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
                return x * c + partner * s
            if pairs == "mixed the other way":  # halves turned, by angles laid out for neighbours
                c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
                a, b = x.chunk(2, dim=-1)
                return x * c + torch.cat((-b, a), -1) * s
            a, b = (x[..., ::2], x[..., 1::2]) if pairs == "interleaved" else x.chunk(2, dim=-1)
            first, second = a * c - b * s, b * c + a * s
            if broken == "sign":
                second = b * c - a * s
            if broken == "in place":
                second = b * c + first * s
            if broken == "no cross":
                first, second = a * c, b * s
            if pairs == "interleaved":
                return torch.stack((first, second), -1).flatten(-2)
            if pairs == "interleaved out":
                return torch.stack((first, second), -1).flatten(-2)
            if pairs == "interleaved in":
                a, b = x[..., ::2], x[..., 1::2]
                return torch.cat((a * c - b * s, b * c + a * s), -1)
            return torch.cat((first, second), -1)

        results = []
        for x, name, own in ((query, which[0], "q"), (key, which[1], "k")):
            weight = weights[name]
            y = norm(x, weight) if order == "norm first" else x
            y = turn(y.float()).to(x.dtype) if own in turns else y
            results.append(norm(y, weight) if order != "norm first" else y)
        return results[0], results[1]

    def wrong(**how: Any) -> Callable:
        return partial(turned, **how)

    halves = (
        "Here pair i is (x[i], x[i + D/2]): `a, b = x.chunk(2, dim=-1)`, and torch.cat puts them"
        " back."
    )
    suspects = {
        "interleaved-pairs": (
            (
                "You turn neighbours, (x[2i], x[2i + 1]), as the paper does. That is a right"
                " rotation for weights that were laid out so; these checkpoints are laid out for"
                f" halves.\n{halves}"
            ),
            wrong(pairs="interleaved"),
        ),
        "pairs-of-one-kind-angles-of-another": (
            (
                "The numbers of your pairs turn by different angles: pairs are of one kind, and"
                f" cosines and sines are laid out for the other.\n{halves} Both get cos[i] and"
                " sin[i]."
            ),
            wrong(pairs="mixed"),
            wrong(pairs="mixed the other way"),
        ),
        "put-back-elsewhere": (
            (
                "You cut in one way and put together in another: numbers come back at other"
                f" places.\n{halves}"
            ),
            wrong(pairs="interleaved out"),
            wrong(pairs="interleaved in"),
        ),
        "turned-backwards": (
            (
                "You turn clockwise: by minus the angle. Distances survive, so it looks right, but"
                " the weights were trained with the other direction.\n(a, b) becomes (a·cos -"
                " b·sin, b·cos + a·sin)."
            ),
            wrong(sign=-1.0),
        ),
        "not-a-rotation": (
            (
                "The second number of a pair is not that of a rotation: lengths change.\n"
                "(a, b) becomes (a·cos - b·sin, b·cos + a·sin), both from the old a and b."
            ),
            wrong(broken="sign"),
            wrong(broken="in place"),
            wrong(broken="no cross"),
        ),
        "cos-and-sin-swapped": (
            (
                "Cosines and sines are exchanged: at position 0 nothing should turn.\n"
                "A row of cos_sin holds D/2 cosines first, then D/2 sines."
            ),
            wrong(broken="swapped table"),
        ),
        "positions-from-zero": (
            (
                "You take the first rows of the table, as if every step began at position 0. A"
                " prompt alone looks right; the first decoded token does not.\nRows of cos_sin are"
                " picked by `positions`: cos_sin[positions]."
            ),
            wrong(rows="from 0"),
            wrong(rows="first"),
        ),
        "one-position-late": (
            (
                "Everything is turned by one position too many: the first token has position 0, and"
                " does not turn.\ncos_sin[positions], as it is."
            ),
            wrong(rows="next"),
        ),
        "one-norm-for-q-and-k": (
            (
                "Query and key are normed with the same weight. With weights of 1 nobody sees it.\n"
                "q_weight is for the query, k_weight for the key."
            ),
            wrong(which="qq"),
            wrong(which="kk"),
        ),
        "norms-swapped": (
            "The query gets the key's weight, and the key the query's.\nq_weight is for the query.",
            wrong(which="kq"),
        ),
        "no-norm": (
            (
                "Nothing is normed: this is RoPE alone, as in Llama.\nWhere weights are given, norm"
                " each head first."
            ),
            wrong(which="--"),
        ),
        "query-normed-only": (
            (
                "The key is not normed. Both sides of the product must be, or scores can still"
                " explode.\nk_weight is for the key."
            ),
            wrong(which="q-"),
        ),
        "norm-after-rope": (
            (
                "You turn first and norm afterwards. Turning keeps lengths, but the norm's weight"
                " multiplies number by number, and turning has mixed two of them.\nFirst the norm,"
                " then the rotation."
            ),
            wrong(order="rope first"),
        ),
        "norm-over-all-heads": (
            (
                "You norm all heads of a token together. Each head is a vector of its own, with its"
                " own size.\nThe mean is over the last dimension only: .mean(dim=-1, keepdim=True)."
            ),
            wrong(over="token"),
        ),
        "norm-without-weight": (
            (
                "The norm's weight is not used: heads have size 1, but not the learned"
                " scale.\nMultiply by it."
            ),
            wrong(weigh=False),
        ),
        "eps-forgotten": (
            (
                "The norm does not use the eps it is given: for small heads that is another"
                " result.\nAdd it to the mean square, inside the root."
            ),
            wrong(eps_used=0.0),
            wrong(eps_used=1e-6),
            wrong(eps_used=1e-5),
            wrong(eps_used=1e-8),
        ),
        "key-not-turned": (
            (
                "The key is not turned. Then a score depends on the query's position alone, not on"
                " the distance.\nTurn both, each by its own position."
            ),
            wrong(turns="q"),
        ),
        "query-not-turned": (
            (
                "The query is not turned. Then a score depends on the key's position alone, not on"
                " the distance.\nTurn both, each by its own position."
            ),
            wrong(turns="k"),
        ),
    }
    items = {"item 0: ": "the query: ", "item 1: ": "the key: "}
    number = diagnose(
        answer, cases, qk_norm_rope_reference, suspects, wording=items, rtol=1e-3, atol=1e-4
    )
    narrow = {
        "norm-in-16-bits": (
            (
                "You norm in the inputs' dtype. In float16 the square of 300 is infinite already,"
                " and nothing is left of the head.\nx.float() first, and back to x.dtype at the"
                " end."
            ),
            wrong(broken="narrow"),
        )
    }
    # In 16 bits, rounding once more or less is no mistake.
    number += diagnose(
        answer, low, qk_norm_rope_reference, narrow, wording=items, rtol=0.03, atol=0.03
    )
    mine = counted(answer)
    line = engine_agrees(mine, kernels=replace(Kernels.reference(), qk_norm_rope=mine))
    return f"{number} batches of heads, and {line}"


# --- 06.5 -----------------------------------------------------------------------------------------

#: Rows of each part of a fused matrix, in a small model and in the bundled one.
SMALL_FUSED = {
    "qkv_proj": {"q_proj": 6, "k_proj": 4, "v_proj": 4},
    "gate_up_proj": {"gate_proj": 5, "up_proj": 5},
}
BUNDLED_FUSED = {
    "qkv_proj": {"q_proj": 256, "k_proj": 128, "v_proj": 128},
    "gate_up_proj": {"gate_proj": 768, "up_proj": 768},
}


@dataclass
class Files:
    """A checkpoint and the parameters that it should fill."""

    what: str
    tensors: list[tuple[str, torch.Tensor]]
    params: dict[str, torch.Tensor]
    tied: bool
    culprit: str = ""  # where they do not fit: what an error must name, a regular expression

    def __repr__(self) -> str:
        return self.what


def _small_checkpoint(
    random: torch.Generator, layers: int, tied: bool, bias: bool
) -> tuple[list, dict]:
    """(tensors in alphabetical order, parameters full of NaN)."""
    import torch

    tensors, params = {"model.embed_tokens.weight": (7, 3), "model.norm.weight": (3,)}, {}
    if not tied:
        tensors["lm_head.weight"] = (7, 3)
    params |= tensors
    for i in range(layers):
        prefix = f"model.layers.{i}."
        own = {
            "input_layernorm.weight": (3,),
            "self_attn.o_proj.weight": (3, 6),
            "mlp.down_proj.weight": (3, 5),
            "self_attn.q_norm.weight": (2,),
            "self_attn.k_norm.weight": (2,),
        }
        for branch, name in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
            kinds = (
                {"weight": (3,), "bias": ()} if bias and branch == "self_attn" else {"weight": (3,)}
            )
            for kind, columns in kinds.items():
                params[f"{prefix}{branch}.{name}.{kind}"] = (
                    sum(SMALL_FUSED[name].values()),
                    *columns,
                )
                for part, rows in SMALL_FUSED[name].items():
                    tensors[f"{prefix}{branch}.{part}.{kind}"] = (rows, *columns)
        tensors |= {prefix + name: shape for name, shape in own.items()}
        params |= {prefix + name: shape for name, shape in own.items()}
    filled = [(name, torch.randn(tensors[name], generator=random)) for name in sorted(tensors)]
    return filled, {name: torch.full(shape, math.nan) for name, shape in params.items()}


def _load(
    params: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]],
    tied: bool,
    *,
    slips: frozenset[str] = frozenset(),
    rows: str = "by name",
    shapes: str = "exact",
) -> None:
    """Right by default; slips: what is not looked at; rows: how the parts of a fused parameter are
    found; shapes: how a tensor's shape is held against its place's."""
    places: dict[str, torch.Tensor] = {}
    whole: dict[str, str] = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        prefix, _, last = module.rpartition(".")
        if last not in fused or (kind == "bias" and "bias-forgotten" in slips):
            places[name] = parameter
            continue
        parts = fused[last] if rows != "alphabetical" else dict(sorted(fused[last].items()))
        sizes = list(parts.values())
        views = parameter.split(sizes) if rows != "equal" else parameter.tensor_split(len(sizes))
        for part, view in zip(parts, views, strict=True):
            places[f"{prefix}.{part}.{kind}"], whole[f"{prefix}.{part}.{kind}"] = view, name
    waiting = dict(places)
    arrived: dict[str, int] = {}
    for name, tensor in tensors:
        if (
            (tied or "head-always-skipped" in slips)
            and name == "lm_head.weight"
            and "tied-copy" not in slips
        ):
            continue
        if name not in places:
            if "unexpected" in slips or ("bias-forgotten" in slips and name.endswith("bias")):
                continue
            raise ValueError(name)
        place = places[name]
        if shapes == "turned" and tensor.ndim == 2 and place.shape == tensor.T.shape:
            tensor = tensor.T
        if shapes == "numel" and place.numel() == tensor.numel():
            tensor = tensor.reshape(place.shape)
        fits = len(place) == len(tensor) if shapes == "rows" else place.shape == tensor.shape
        if not fits and "shape" not in slips:
            raise ValueError(name)
        if rows == "by arrival" and name in whole:
            start = arrived.get(whole[name], 0)
            place = params[whole[name]][start : start + len(tensor)]
            arrived[whole[name]] = start + len(tensor)
        if "not-in-place" in slips:
            params[whole.get(name, name)] = tensor
        else:
            try:
                place.copy_(tensor)
            except RuntimeError:
                raise ValueError(name) from None
        waiting.pop(name, None)
        if "one-part-fills-all" in slips and name in whole:
            waiting = {
                key: value for key, value in waiting.items() if whole.get(key) != whole[name]
            }
    if waiting and "missing" not in slips:
        if "bias-forgotten" in slips and all(name.endswith("bias") for name in waiting):
            return
        raise ValueError(", ".join(waiting))


@exercise("06.5", "A checkpoint finds its places")
def check_loading(answer: Callable) -> str:
    import torch

    random = seeded(5)
    shuffle = torch.randperm(1000, generator=random).tolist()

    def files(
        what: str,
        layers: int = 1,
        tied: bool = True,
        bias: bool = False,
        change: Callable | None = None,
        mixed: bool = False,
        culprit: str = "",
    ) -> Files:
        tensors, params = _small_checkpoint(random, layers, tied, bias)
        if change:
            tensors = [pair for name, tensor in tensors for pair in change(name, tensor)]
        if mixed:
            tensors = [tensors[i] for i in shuffle if i < len(tensors)]
        return Files(what, tensors, params, tied, culprit)

    def without(pattern: str) -> Callable:
        return lambda name, tensor: [] if re.search(pattern, name) else [(name, tensor)]

    def reshaped(pattern: str, change: Callable) -> Callable:
        return lambda name, tensor: [(name, change(tensor) if re.search(pattern, name) else tensor)]

    def extra(at: str, name: str) -> Callable:
        return lambda n, tensor: [(n, tensor), (name, tensor.clone())] if n == at else [(n, tensor)]

    def in_order(name: str, tensor: torch.Tensor) -> list:
        return [(name, tensor)]

    simple = files("q, k, v in the order of the rows", change=in_order)
    simple.tensors.sort(key=lambda pair: ("k_proj" in pair[0]) + 2 * ("v_proj" in pair[0]))
    good = [
        simple,
        files("one layer, tensors in alphabetical order"),
        files("12 layers, tensors shuffled", layers=12, mixed=True),
        files("biases on q, k and v", bias=True),
        files("a head of its own", tied=False),
        files(
            "a tied head, of which the file has a copy",
            change=extra("model.norm.weight", "lm_head.weight"),
        ),
        files("tensors in bfloat16", change=lambda n, t: [(n, t.bfloat16())]),
    ]
    bad = [
        files(
            "no model.norm.weight in the file", change=without("model.norm"), culprit="model.norm"
        ),
        files(
            "no v_proj of layer 1 in the file",
            layers=2,
            change=without(r"1\.self_attn\.v_proj"),
            culprit="v_proj|qkv_proj",
        ),
        files("no k_norm in the file", change=without("k_norm"), culprit="k_norm"),
        files(
            "the head is missing, and nothing is tied",
            tied=False,
            change=without("lm_head"),
            culprit="lm_head",
        ),
        files(
            "a tensor that belongs nowhere",
            change=extra("model.norm.weight", "model.layers.0.self_attn.g_proj.weight"),
            culprit="g_proj",
        ),
        files("a layer too many", layers=2, culprit=r"layers\.1\."),
        files(
            "an input_layernorm of one number",
            change=reshaped("input_layernorm", lambda t: t[:1]),
            culprit="input_layernorm",
        ),
        files("a k_proj of one row", change=reshaped("k_proj", lambda t: t[:1]), culprit="k_proj"),
        files(
            "a q_proj with another number of rows",
            change=reshaped("q_proj", lambda t: t[:5]),
            culprit="q_proj",
        ),
        files(
            "an o_proj on its side, [6, 3] for [3, 6]",
            change=reshaped("o_proj", lambda t: t.T.contiguous()),
            culprit="o_proj",
        ),
        files(
            "a v_proj of one column",
            change=reshaped("v_proj", lambda t: t[:, :1]),
            culprit="v_proj",
        ),
        files(
            "a down_proj of one column",
            change=reshaped("down_proj", lambda t: t[:, :1]),
            culprit="down_proj",
        ),
    ]
    del_layer = bad[5].params
    bad[5].params = {name: tensor for name, tensor in del_layer.items() if ".1." not in name}

    def outcome(load: Callable) -> Callable:
        def of(checkpoint: Files) -> tuple:
            own = dict(checkpoint.params)
            try:
                load(own, iter(checkpoint.tensors), SMALL_FUSED, checkpoint.tied)
            except ValueError:
                return "ValueError", [], {}
            empty = [name for name, tensor in checkpoint.params.items() if tensor.isnan().any()]
            return "no error", empty, dict(checkpoint.params)

        return of

    explain = {
        "not-in-place": (
            "You put the tensor into the dict, in place of the parameter. The model still has its"
            " own, which nobody filled.\nWrite into the parameter that is there:"
            " place.copy_(tensor)."
        ),
        "missing": (
            "Something is missing in the file, and nobody says so: that parameter keeps whatever"
            " was in memory, and the model talks nonsense.\nKeep book of what was filled; raise"
            " ValueError, with names, if anything is left."
        ),
        "one-part-fills-all": (
            "A part of a fused matrix is missing, and nobody says so: its rows keep whatever was in"
            " memory.\nA fused parameter is filled when each of its parts has come."
        ),
        "unexpected": (
            "A tensor of the file fits nowhere, and is passed over in silence. Then the model is"
            " not the one that the file is for.\nRaise ValueError with its name."
        ),
        "shape": (
            "A tensor of another shape was taken: copy_ broadcasts, so that one row fills many.\n"
            "Compare the shapes before you copy, and raise ValueError."
        ),
        "tied-copy": (
            "The model's head is tied, and the file has a copy of it, as many have: that is no"
            " error.\nWith tied=True, pass over lm_head.weight."
        ),
        "bias-forgotten": (
            "Weights are loaded, biases of fused layers are not. Qwen2 has them on q, k and v.\n"
            "What comes after the last dot may be weight or bias; treat both alike."
        ),
        "head-always-skipped": (
            "You pass over lm_head.weight always. Here the head is not tied: it is a matrix of "
            "its own.\n"
            "Pass over it only with tied=True."
        ),
    }
    orders = {
        "by arrival": (
            "rows-by-arrival",
            (
                "You fill the rows of a fused matrix in the order in which the parts come. In the"
                " file that is alphabetical: k, q, v. In the matrix it is q, k, v.\nThe name says"
                " which rows; `fused` says how many each has."
            ),
        ),
        "equal": (
            "equal-parts",
            (
                "You cut a fused matrix into equal parts. With grouped-query attention q has more "
                "rows "
                "than k and v.\nsplit(list(fused[…].values())) cuts where it should."
            ),
        ),
        "alphabetical": (
            "parts-in-alphabetical-order",
            (
                "The parts lie in alphabetical order in your matrix. The "
                "order of "
                "`fused` is what counts: the model cuts its result into q, k, v.\nDo not sort."
            ),
        ),
    }
    measures = {
        "turned": (
            "turned-to-fit",
            (
                "A matrix of the wrong shape was turned until it fitted. Its numbers lie in another"
                " order then.\nA shape that is not exactly the place's is a ValueError."
            ),
        ),
        "numel": (
            "same-numel",
            (
                "You compare how many numbers there are, not the shapes: a matrix on its side has"
                " as many, in another order.\nCompare place.shape and tensor.shape."
            ),
        ),
        "rows": (
            "rows-only",
            (
                "You compare the first dimension only: copy_ broadcasts one column into many.\n"
                "Compare the whole shapes."
            ),
        ),
    }
    suspects: dict[str, tuple] = {}
    for count in (1, 2, 3, 4):
        for slips in combinations(explain, count):
            functions = suspects.get(slips[0], ("",))[1:]
            suspects[slips[0]] = (
                explain[slips[0]],
                *functions,
                outcome(partial(_load, slips=frozenset(slips))),
            )
    loose = [
        frozenset(s)
        for n in range(4)
        for s in combinations(("missing", "unexpected", "shape", "tied-copy"), n)
    ]
    for rows, (name, why) in orders.items():
        suspects[name] = (
            why,
            *(outcome(partial(_load, rows=rows, slips=slips)) for slips in loose),
        )
    for shapes, (name, why) in measures.items():
        suspects[name] = (
            why,
            *(outcome(partial(_load, shapes=shapes, slips=s)) for s in loose if "shape" not in s),
        )
    items = {"item 0: ": "", "item 1: ": "not filled: ", "item 2: ": "parameter "}
    diagnose(
        outcome(answer), [(one,) for one in good + bad], outcome(_load), suspects, wording=items
    )
    for checkpoint in bad:
        fresh = deepcopy(checkpoint)
        try:
            answer(fresh.params, iter(fresh.tensors), SMALL_FUSED, fresh.tied)
        except ValueError as error:
            expect(
                re.search(checkpoint.culprit, str(error)),
                "error-without-name",
                f"{checkpoint}: your ValueError says {str(error)!r}.\nWhoever reads it wants to"
                " know which tensor: put its name in.",
            )
    return f"{len(good)} checkpoints that fit, {len(bad)} that do not, and {_speaks(answer)}"


def _speaks(load: Callable) -> str:
    """The bundled model, filled by this function, in the engine: the same tokens, or Mistake."""
    import torch

    from minivllm import LLM, SamplingParams
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.course.grading import checking
    from minivllm.models.loader import iterate_weights

    expected = checking.engine_tokens()
    with LLM(device="cpu", load_format="dummy") as llm:
        model = llm.llm_engine.model_runner.model
        params = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for parameter in params.values():
            parameter.fill_(math.nan)
        load(dict(params), iterate_weights(BUNDLED_MODEL_PATH), BUNDLED_FUSED, True)
        empty = [name for name, parameter in params.items() if torch.isnan(parameter).any()]
        expect(
            not empty,
            "missing",
            f"The bundled model was loaded, but {', '.join(empty[:3])} are not filled.\n"
            "Each parameter, and each row of it, must have come from the file.",
        )
        outputs = llm.generate(
            list(PROMPTS), SamplingParams(temperature=0, max_tokens=20), use_tqdm=False
        )
    got = [list(output.outputs[0].token_ids) for output in outputs]
    expect(
        got == expected,
        "engine-differs",
        "All parameters are filled, but the model writes other tokens than with the package's"
        " loader.\nSome tensor has found a wrong place; compare with `load_weights` on a model of"
        " your own.",
    )
    return f"the bundled model writes its {sum(map(len, expected))} tokens"


# --- 06.6 -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A small model, and the steps that it is asked to compute: rows (first position, number of
    tokens) a sequence.
    """

    what: str
    steps: tuple[tuple[tuple[int, int] | None, ...], ...]
    changes: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def __repr__(self) -> str:
        return self.what

    def __deepcopy__(self, memo: dict) -> Run:
        return self


_SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
_BLOCK = 4  # tokens of a page


def _computed(build: Callable, run: Run) -> list[torch.Tensor]:
    """Hidden states of each step, and the logits of its last tokens. build(config) -> (forward,
    compute_logits).
    """
    import numpy as np
    import torch

    from minivllm.engine.batch import BatchRow, build_batch
    from minivllm.models.hf_config import config_from_hf

    config = config_from_hf({**_SIZES, **dict(run.changes)})
    forward, compute_logits = build(config, run.seed)
    shape = (10, config.num_key_value_heads, _BLOCK, config.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    tables = np.array([[7, 2, 9, 4], [1, 8, 3, 6]], dtype=np.int32)
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=seeded(run.seed)).tolist()
    found = []
    with torch.inference_mode():
        for step in run.steps:
            here = [(i, *part) for i, part in enumerate(step) if part]
            here.sort(key=lambda row: row[2] > 1)
            rows = [
                BatchRow(tokens[i][start : start + count], start, True) for i, start, count in here
            ]
            batch = build_batch(rows, tables[[i for i, *_ in here]], _BLOCK)
            hidden = forward(batch.token_ids, batch.positions, caches, batch.attention)
            found += [hidden, compute_logits(hidden[batch.logits_indices])]
    return found


def _weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Random weights by checkpoint name; norms are not 1, so that it shows which is used where."""
    import torch

    random = seeded(100 + seed)

    def matrix(rows: int, columns: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * size * columns**-0.5

    weights = {
        "model.embed_tokens.weight": matrix(config.vocab_size, config.hidden_size, 3.0),
        "model.norm.weight": torch.rand(config.hidden_size, generator=random) + 0.5,
    }
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = matrix(config.vocab_size, config.hidden_size)
    sizes = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    for i in range(config.num_hidden_layers):
        layer = _random_layer(random, *sizes, config.intermediate_size, False)
        weights |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return weights


def _filled(model_cls: Callable, config: ModelConfig, seed: int) -> Any:
    """An instance with the random weights. Mistake where its parameters are not those of the
    checkpoint.
    """
    import torch

    from minivllm.kernels import Kernels
    from minivllm.models.loader import parameter_places

    model = model_cls(config, Kernels.reference(), 64, torch.device("cpu"))
    expect(
        isinstance(model, torch.nn.Module),
        "not-a-module",
        "The model must be an nn.Module: the loader asks it for "
        "its parameters.\nDerive your classes from nn.Module, and call super().__init__() first.",
    )
    places, weights = parameter_places(model), _weights(config, seed)
    if config.tie_word_embeddings:
        places.pop("lm_head.weight", None)
    missing = sorted(weights.keys() - places.keys())
    unknown = sorted(places.keys() - weights.keys())
    shapes = [
        name for name in weights if name in places and places[name].shape != weights[name].shape
    ]
    if missing or unknown or shapes:
        raise Mistake(
            "wrong-names",
            "The parameters of your model are not the tensors of the checkpoint, so it could not"
            f" be loaded.\nWithout a parameter: {', '.join(missing[:3]) or 'none'}; without a"
            f" tensor: {', '.join(unknown[:3]) or 'none'}; of another shape:"
            f" {', '.join(shapes[:3]) or 'none'}.\nAttribute names make the names:"
            " self.model.layers[0].self_attn.q_proj.weight.",
        )
    for name, tensor in weights.items():
        places[name].data.copy_(tensor)
    return model


def _wrong_model(config: ModelConfig, seed: int, **wrong: Any) -> tuple[Callable, Callable]:
    """(forward, compute_logits) on the same weights: right by default, wrong in the ways that
    the options name.
    """
    import torch
    import torch.nn.functional as F

    from minivllm.kernels import Kernels
    from minivllm.layers.attention import cached_attention
    from minivllm.layers.rotary import rope_table

    kernels, weights = Kernels.reference(), _weights(config, seed)
    how = {
        "stream": ("x", "x"),
        "at": "positions",
        "scale": config.head_dim**-0.5,
        "eps": config.rms_norm_eps,
    } | wrong
    table = rope_table(config.rope, config.head_dim, 64, torch.device("cpu"))
    if how["scale"] == "hidden":
        how["scale"] = config.hidden_size**-0.5

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return kernels.rms_norm(x, weights[name], how["eps"])

    def forward(token_ids: Any, positions: Any, caches: Any, metadata: Any) -> torch.Tensor:
        x = weights["model.embed_tokens.weight"][token_ids]
        if how.get("embed_scaled"):
            x = x * config.hidden_size**0.5
        at = {
            "positions": positions,
            "restart": torch.arange(len(positions)),
            "nowhere": positions * 0,
        }[how["at"]]
        layers = range(config.num_hidden_layers)
        for i, own in zip(
            [0] * len(layers) if how.get("first_layer") else layers, caches, strict=True
        ):
            p, pages = f"model.layers.{i}.", caches[0] if how.get("one_cache") else own
            h = x if how.get("post") else norm(x, p + "input_layernorm.weight")
            q, k, v = (
                (h @ weights[f"{p}self_attn.{n}_proj.weight"].T).unflatten(
                    -1, (-1, config.head_dim)
                )
                for n in "qkv"
            )
            plain_key = k
            qk = {n: weights.get(f"{p}self_attn.{n}_norm.weight") for n in "qk-"}
            names = how.get("norms", "qk")
            q, k = kernels.qk_norm_rope(q, k, qk[names[0]], qk[names[1]], table, at, how["eps"])
            if not how.get("not_stored"):
                kernels.store_kv(
                    plain_key if how.get("stored_plain") else k, v, *pages, metadata.slot_mapping
                )
            out = cached_attention(q, pages, metadata, how["scale"], kernels).flatten(-2)
            branch = out @ weights[f"{p}self_attn.o_proj.weight"].T
            before = x
            x = branch + {"x": x, "h": h, "twice": 2 * x, "nothing": 0.0}[how["stream"][0]]
            if how.get("post"):
                x = norm(x, p + "input_layernorm.weight")
            second = "input_layernorm" if how.get("same_norm") else "post_attention_layernorm"
            h = (
                x
                if how.get("post")
                else norm(before if how.get("parallel") else x, f"{p}{second}.weight")
            )
            gate, up = (h @ weights[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            gate, up = (up, gate) if how.get("swapped") else (gate, up)
            branch = (F.silu(gate) * up) @ weights[f"{p}mlp.down_proj.weight"].T
            x = branch + {"x": x, "h": h, "twice": 2 * x, "nothing": 0.0}[how["stream"][1]]
            if how.get("post"):
                x = norm(x, p + "post_attention_layernorm.weight")
        return x if how.get("no_final_norm") else norm(x, "model.norm.weight")

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        if how.get("norm_in_head"):
            hidden = norm(hidden, "model.norm.weight")
        name = "model.embed_tokens.weight"
        return hidden @ weights[name if how.get("always_tied") else _head(weights)].T

    return forward, compute_logits


def _head(weights: Mapping[str, Any]) -> str:
    return "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"


@exercise("06.6", "The whole model")
def check_model(answer: Any) -> str:
    from minivllm.models import qwen3
    from minivllm.models.hf_config import config_from_hf

    def mine(config: Any, seed: int) -> tuple[Callable, Callable]:
        model = _filled(answer, config, seed)
        own = [m for m in model.modules() if type(m).__module__ == qwen3.__name__]
        expect(
            not own,
            "package-did-it",
            f"{type(own[0]).__name__ if own else ''} is the package's own class.\n"
            "Here the point is to write it: projections, norms, additions, the head.",
        )
        return model, model.compute_logits

    def package(config: Any, seed: int) -> tuple[Callable, Callable]:
        model = _filled(qwen3.Qwen3ForCausalLM, config, seed)
        return model, model.compute_logits

    untied = (("tie_word_embeddings", False), ("rms_norm_eps", 1e-2), ("rope_theta", 1000.0))
    odd = (
        ("num_attention_heads", 3),
        ("num_key_value_heads", 1),
        ("num_hidden_layers", 3),
        ("hidden_size", 20),
    )
    chunks = (((0, 3), (0, 5)), ((3, 1), (5, 3)), ((4, 1), (8, 1)))
    runs = [
        Run("one token at position 0", (((0, 1), None),)),
        Run("a prompt of 6 tokens", (((0, 6), None),), seed=1),
        Run(
            "a prompt of 5 tokens, then two decodes",
            (((0, 5), None), ((5, 1), None), ((6, 1), None)),
            seed=2,
        ),
        Run("two prompts, a decode beside a chunk, two decodes", chunks, seed=3),
        Run(
            "a head of its own, another eps and theta",
            (((0, 4), (0, 2)), ((4, 1), (2, 1))),
            untied,
            seed=4,
        ),
        Run("three heads that share one KV head, three layers", chunks, odd, seed=5),
    ]

    def outcome(build: Callable) -> Callable:
        return partial(_computed, build)

    def wrong(**how: Any) -> Callable:
        return outcome(partial(_wrong_model, **how))

    stream = (
        "A branch adds to the normed copy; its result belongs to the stream as it was before the"
        " norm.\nKeep x, and give the norm another name."
    )
    suspects = {
        "residual-is-the-norm": (
            stream,
            *(wrong(stream=s) for s in (("h", "h"), ("h", "x"), ("x", "h"))),
        ),
        "nothing-added": (
            (
                "A branch's result replaces the stream: what came before is lost.\nx = x + branch,"
                " for both branches."
            ),
            *(
                wrong(stream=s)
                for s in (("nothing", "nothing"), ("nothing", "x"), ("x", "nothing"))
            ),
        ),
        "residual-twice": (
            (
                "The stream is added twice, so everything before counts double. (With add_rms_norm:"
                " the sum that it returns already holds the residual.)\nAdd each branch once."
            ),
            *(wrong(stream=s) for s in (("twice", "twice"), ("twice", "x"), ("x", "twice"))),
        ),
        "post-norm": (
            (
                "You norm after the addition, as the first transformers did.\nIn Qwen3 each branch"
                " norms its own copy, before it computes; the stream is only added to."
            ),
            wrong(post=True),
        ),
        "parallel-branches": (
            (
                "Your MLP reads the stream as it was before attention, as in GPT-J.\nHere it reads"
                " what attention has added."
            ),
            wrong(parallel=True),
        ),
        "one-norm-for-both-branches": (
            "Both branches use the same norm.\nThe MLP's is post_attention_layernorm.",
            wrong(same_norm=True),
        ),
        "no-final-norm": (
            (
                "The last norm is missing: forward returns normed states (model.norm), of which"
                " compute_logits makes scores.\nNorm once, after the last layer."
            ),
            wrong(no_final_norm=True),
        ),
        "final-norm-twice": (
            (
                "The logits are of states that were normed twice. forward has done it already.\n"
                "compute_logits is a matrix product, and no more."
            ),
            wrong(norm_in_head=True),
        ),
        "norm-in-the-head": (
            (
                "The last norm stands in compute_logits, so forward returns states that are not"
                " normed.\nThe logits agree, but forward's contract is normed states; put it there."
            ),
            wrong(norm_in_head=True, no_final_norm=True),
        ),
        "one-norm-for-q-and-k": (
            (
                "Query and key are normed with the same weight.\nq_norm is the query's, k_norm the"
                " key's."
            ),
            wrong(norms="qq"),
            wrong(norms="kk"),
        ),
        "norms-swapped": (
            "The query gets the key's norm, and the key the query's.\nq_norm is for q.",
            wrong(norms="kq"),
        ),
        "no-qk-norm": (
            (
                "Queries and keys are not normed.\nHand q_norm.weight and k_norm.weight to"
                " qk_norm_rope."
            ),
            wrong(norms="--"),
        ),
        "no-rope": (
            (
                "Nothing is turned: the model cannot know the order of the words.\n"
                "qk_norm_rope takes the table and the positions."
            ),
            wrong(at="nowhere"),
        ),
        "positions-from-zero": (
            (
                "Each step counts its positions from 0. The first step is right; a decoded token,"
                " or the second of two prompts, is not.\nUse the positions that forward is given."
            ),
            wrong(at="restart"),
        ),
        "not-stored": (
            (
                "Keys and values never reach the cache: attention reads what was there"
                " before.\nCall kernels.store_kv(key, value, *cache, metadata.slot_mapping) before"
                " cached_attention."
            ),
            wrong(not_stored=True),
        ),
        "keys-stored-unturned": (
            (
                "The keys in the cache are neither normed nor turned: you store them too early.\n"
                "First qk_norm_rope, then store_kv."
            ),
            wrong(stored_plain=True),
        ),
        "one-cache-for-all-layers": (
            (
                "All layers use the first layer's cache, and overwrite each other. A whole prompt"
                " in one step looks right.\ncaches has one pair a layer: zip it with the layers."
            ),
            wrong(one_cache=True),
        ),
        "one-layer-again-and-again": (
            "You run the first layer as often as there are layers.\nEach has weights of its own.",
            wrong(first_layer=True),
        ),
        "no-scale": (
            "Scores are not scaled.\nThe scale is head_dim ** -0.5.",
            wrong(scale=1.0),
        ),
        "scale-of-the-wrong-size": (
            (
                "Scores are scaled by the root of the hidden size.\nA score is a product over"
                " head_dim numbers: head_dim ** -0.5."
            ),
            wrong(scale="hidden"),
        ),
        "up-before-gate": (
            (
                "gate and up are exchanged.\nsilu_mul takes gates in the first half:"
                " torch.cat((gate, up), dim=-1)."
            ),
            wrong(swapped=True),
        ),
        "eps-typed-in": (
            (
                "An eps is typed in. Checkpoints differ, and the config says which:"
                " config.rms_norm_eps.\nUse it in every norm, the heads' too."
            ),
            wrong(eps=1e-6),
            wrong(eps=1e-5),
        ),
        "always-tied": (
            (
                "Your head is always the embedding. This model's head is a matrix of its own.\n"
                "self.lm_head.weight is the right one in both cases."
            ),
            wrong(always_tied=True),
        ),
        "embedding-scaled": (
            (
                "You scale the embedding by the root of the hidden size, as the first transformer"
                " and Gemma do.\nQwen takes the row as it is."
            ),
            wrong(embed_scaled=True),
        ),
    }
    names = {
        f"item {i}: ": f"step {i // 2 + 1}, {'logits' if i % 2 else 'states'}: " for i in range(6)
    }
    for changes in (
        (),
        untied,
    ):  # outside of diagnose, which would take a Mistake for an exception of the answer's
        mine(config_from_hf({**_SIZES, **dict(changes)}), 0)
    cases = [(run,) for run in runs]
    number = diagnose(
        outcome(mine), cases, outcome(package), suspects, wording=names, rtol=1e-3, atol=1e-4
    )
    forwards = 0

    class Counted(answer):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            return super().forward(*args, **kwargs)

    line = engine_agrees(model_cls=Counted)
    expect(
        forwards,
        "not-used",
        "The engine never called your model's forward.\nIs it defined in the class?",
    )
    return f"{number} small models, and {line}"
