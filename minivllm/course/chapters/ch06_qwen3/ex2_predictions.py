"""06.2: predict: Qwen3-4B in six numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from minivllm.course.grading.judges import Prediction, expect_predictions

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
    }


#: Sizes of the model, as its config says.
HIDDEN, WIDE, HEADS, KV_HEADS, DIM, LAYERS = 2560, 9728, 32, 8, 128, 36
EMBEDDING = 151_936 * HIDDEN
#: Weights of matrices: q_proj, k_proj, and the three of the MLP.
Q, KV, MLP = HIDDEN * HEADS * DIM, HIDDEN * KV_HEADS * DIM, 3 * HIDDEN * WIDE
#: A layer with heads of hidden size / heads = 80 numbers.
SQUARE = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * 80 + MLP
NOT_SQUARE = (
    "In Qwen3, the config says what head_dim is: 128, and not hidden size / heads. The heads"
    " together have more numbers than the stream."
)
#: The share by which a prediction may miss, so that rounded numbers pass.
NEAR = 0.002


def _of_weights(measured: dict[str, int]) -> list[Prediction]:
    layers = LAYERS * measured["layer"]
    return [
        Prediction(
            "layer_weights",
            measured["layer"],
            "weights",
            NEAR,
            {
                "head-dim-from-hidden-size": (SQUARE, NOT_SQUARE),
                "forgot-gqa": (4 * Q + MLP, "k and v have fewer heads than q."),
                "two-matrices-in-the-mlp": (
                    2 * Q + 2 * KV + 2 * HIDDEN * WIDE,
                    "The MLP of SwiGLU has three matrices: gate, up and down.",
                ),
                "forgot-o-proj": (
                    Q + 2 * KV + MLP,
                    "The result of the heads goes through a matrix back to the stream: o_proj.",
                ),
                "forgot-the-mlp": (2 * Q + 2 * KV, "These are the matrices of attention alone."),
                "forgot-attention": (MLP, "These are the matrices of the MLP alone."),
                "one-of-k-and-v": (2 * Q + KV + MLP, "k and v have a matrix each."),
            },
            "Write down the rows and columns of each of the seven matrices of a layer, and add.",
        ),
        Prediction(
            "all_weights",
            measured["all"],
            "weights",
            NEAR,
            {
                "head-counted-twice": (
                    layers + 2 * EMBEDDING,
                    "The head is tied: it is the embedding.",
                ),
                "forgot-the-embedding": (
                    layers,
                    "The embedding is a matrix, too, with a row for each token.",
                ),
                "head-dim-from-hidden-size": (LAYERS * SQUARE + EMBEDDING, NOT_SQUARE),
                "one-layer": (
                    measured["layer"] + EMBEDDING,
                    "That is one layer and the embedding. The model has 36 layers.",
                ),
            },
            "Add the matrices of all layers, and the one that is not in a layer.",
        ),
    ]


def _of_flops(measured: dict[str, int]) -> list[Prediction]:
    weights, flops = measured["all"], measured["flops"]
    pair = 4 * LAYERS * HEADS * DIM
    return [
        Prediction(
            "flops",
            flops,
            "FLOPs",
            NEAR,
            {
                "multiplications-only": (
                    weights,
                    "Each weight is multiplied and the product added: two operations.",
                ),
                "forgot-the-head": (
                    2 * (weights - EMBEDDING),
                    "Looking a row up is free, but the head is a product with all of the"
                    " embedding.",
                ),
                "look-up-counted": (
                    2 * (weights + EMBEDDING),
                    "The embedding is only looked up at the start. It is multiplied once, as the"
                    " head.",
                ),
                "layers-without-additions": (
                    weights - EMBEDDING,
                    "Count the additions, too, and the product with the head.",
                ),
                "training": (
                    6 * weights,
                    "Six FLOPs per weight is for training, with the backward pass.",
                ),
            },
            "How often does one token use each weight, and how many operations is that?",
        ),
        Prediction(
            "context",
            flops / pair,
            "tokens",
            NEAR,
            {
                "one-of-two-products": (
                    2 * flops / pair,
                    "Attention has two products: query · key, and weights · values. Each of them"
                    " counts in full: the token sees its whole context.",
                ),
                "multiplications-only": (
                    flops / pair / 2,
                    "Count FLOPs on both sides: a multiplication and an addition are two.",
                ),
                "forgot-gqa": (
                    flops * HEADS / KV_HEADS / pair,
                    "GQA shares keys and values, which saves bytes. Each query head still computes"
                    " its own scores. (One FLOP instead of four for a number of key and value would"
                    " be as far off.)",
                ),
                "head-dim-from-hidden-size": (flops / (4 * LAYERS * HIDDEN), NOT_SQUARE),
                "one-layer": (LAYERS * flops / pair, "Attention runs in each of the 36 layers."),
                "forgot-the-head": (
                    (flops - 2 * EMBEDDING) / pair,
                    "The head is a product with a matrix, too.",
                ),
            },
            "First find the FLOPs that attention takes for one token of context, in all heads and"
            " layers.",
        ),
    ]


def _of_bytes(measured: dict[str, int]) -> list[Prediction]:
    one, every = measured["kv"], measured["kv_all_heads"]
    halves = "Both keys and values are kept, and each number has two bytes."
    return [
        Prediction(
            "kv_bytes",
            one,
            "bytes",
            NEAR,
            {
                "keys-or-values": (one / 2, halves),
                "float32": (one * 2, "A number in bfloat16 has 2 bytes."),
                "forgot-gqa": (every, "Only the KV heads are kept, not the query heads."),
                "one-layer": (one / LAYERS, "Each of the 36 layers keeps its own."),
                "head-dim-from-hidden-size": (4 * LAYERS * KV_HEADS * 80, NOT_SQUARE),
            },
            "First count the bytes of one head's key in one layer.",
        ),
        Prediction(
            "kv_bytes_all_heads",
            every,
            "bytes",
            NEAR,
            {
                "forgot-gqa": (
                    one,
                    "That is with GQA. Without it each query head has keys and values of its own.",
                ),
                "head-dim-from-hidden-size": (4 * LAYERS * HIDDEN, NOT_SQUARE),
                "keys-or-values": (every / 2, halves),
                "float32": (every * 2, "A number in bfloat16 has 2 bytes."),
                "one-layer": (every / LAYERS, "Each of the 36 layers keeps its own."),
            },
            "How many query heads share a KV head?",
        ),
    ]


def check_predictions(
    layer_weights: float,
    all_weights: float,
    flops: float,
    kv_bytes: float,
    kv_bytes_all_heads: float,
    context: float,
) -> str:
    measured = _measure()
    of_layer, of_all = _of_weights(measured)
    of_flops, of_context = _of_flops(measured)
    of_kv, of_all_heads = _of_bytes(measured)
    expect_predictions(
        (of_layer, layer_weights),
        (of_all, all_weights),
        (of_flops, flops),
        (of_kv, kv_bytes),
        (of_all_heads, kv_bytes_all_heads),
        (of_context, context),
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
            "wrong-context",
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
        Known(
            "wrong-type",
            answers=r"""
# %% not a number
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = float("nan")
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637

# %% a range
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = range(10_000, 20_000)
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
