"""06.2: predict: Qwen3-4B in six numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake

if TYPE_CHECKING:
    import torch

from minivllm.course.grading.exercise import Exercise, Known

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


EXERCISE = Exercise(
    id="06.2",
    title="Predict: Qwen3-4B in six numbers",
    check=check_predictions,
    mistakes=(
        Known(
            "head-dim-from-hidden-size",
            answers=r"""
# %% square projections, as in Llama
layer_weights = 2 * 2560 * 2560 + 2 * 2560 * 8 * 80 + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637

# %% heads that fill the stream
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 2 * 36 * 2560 * 2
context = 13_637
""",
        ),
        Known(
            "forgot-gqa",
            answers=r"""
# %% k and v as large as q
layer_weights = 4 * 2560 * 4096 + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637

# %% query heads are not kept
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 2 * 36 * 32 * 128 * 2
kv_bytes_all_heads = 589_824
context = 13_637

# %% no difference seen
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 147_456
context = 13_637

# %% KV heads alone compute scores
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 8_044_936_192 / (4 * 36 * 8 * 128)
""",
        ),
        Known(
            "two-matrices-in-the-mlp",
            answers=r"""
# %% an MLP with two matrices
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 2 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637
""",
        ),
        Known(
            "forgot-o-proj",
            answers=r"""
# %% q, k, v
layer_weights = 2560 * (4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637
""",
        ),
        Known(
            "head-counted-twice",
            answers=r"""
# %% a head of its own
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 2 * 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637
""",
        ),
        Known(
            "forgot-the-embedding",
            answers=r"""
# %% the layers alone
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637
""",
        ),
        Known(
            "multiplications-only",
            answers=r"""
# %% one FLOP a weight
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 36 * 100_925_440 + 151_936 * 2560
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637

# %% one side in FLOPs, the other in multiplications
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 4_022_468_096 / (4 * 36 * 32 * 128)
""",
        ),
        Known(
            "forgot-the-head",
            answers=r"""
# %% as if the embedding were free twice
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * 36 * 100_925_440
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637
""",
        ),
        Known(
            "look-up-counted",
            answers=r"""
# %% the embedding as a product at both ends
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 2 * 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637
""",
        ),
        Known(
            "keys-or-values",
            answers=r"""
# %% keys alone
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 36 * 8 * 128 * 2
kv_bytes_all_heads = 589_824
context = 13_637
""",
        ),
        Known(
            "float32",
            answers=r"""
# %% four bytes
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 2 * 36 * 8 * 128 * 4
kv_bytes_all_heads = 589_824
context = 13_637
""",
        ),
        Known(
            "one-of-two-products",
            answers=r"""
# %% scores alone
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 8_044_936_192 / (2 * 36 * 32 * 128)
""",
        ),
        Known(
            "wrong-prediction",
            answers=r"""
# %% a guess
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 4096
""",
        ),
    ),
    right=r"""
# %% rounded
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 4.022e9
flops = 8.04e9
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_640
""",
)
