"""09.2: predict: Qwen3-8B on four GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch09_tensor_parallel.rank_model import RightRankModel
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import Prediction, expect_predictions

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
    from minivllm.course.sim.ranks import Group

#: The share by which a number of bytes may miss.
_NEAR = 0.002
_LAYERS, _HIDDEN, _WIDE, _VOCABULARY = 36, 4096, 12_288, 151_936
_SEQUENCES = 16

_FLOAT32 = "bfloat16 has 2 bytes per number."
_HALF = "That is how many numbers they are. Each has two bytes."
_RING = (
    "A ring of n works in two rounds, and each rank sends its share of the tensor n − 1 times in"
    " each: first while the sums grow, then to hand them out."
)


@cache
def _meta_weights() -> tuple[ModelConfig, Any, dict[str, torch.Tensor], torch.Tensor]:
    """Qwen3-8B's shape in bfloat16, without memory: its config, kernels that compute nothing,
    weights, rope table.
    """
    import torch

    from minivllm.bench.shapes import shape_config
    from minivllm.kernels import Kernels
    from minivllm.models.loader import parameter_places
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    config, meta = shape_config("qwen3-8b"), torch.device("meta")
    nothing = replace(
        Kernels.reference(),
        decode_attention=lambda query, *_, **__: query,
        store_kv=lambda *_: None,
        qk_norm_rope=lambda query, key, *_: (query, key),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with meta:
            weights = parameter_places(Qwen3ForCausalLM(config, nothing, 16, meta))
    finally:
        torch.set_default_dtype(before)
    return config, nothing, weights, torch.empty(16, config.head_dim, device=meta)


def _models(size: int, count: int) -> list[Any]:
    """The first `count` of `size` ranks."""
    config, kernels, weights, cos_sin = _meta_weights()
    return [RightRankModel(config, kernels, weights, cos_sin, rank, size) for rank in range(count)]


def _kv_bytes_on(size: int) -> int:
    """Bytes of a token in the cache of a rank of so many."""
    [part] = _models(size, 1)
    keys = part.w["model.layers.0.self_attn.k_proj.weight"].shape[0]
    return 2 * 2 * part.config.num_hidden_layers * keys


@cache
def _measure() -> dict[str, float]:
    """A decode step of 16 sequences on 4 ranks without memory: its collectives, a rank's weights
    and cache.
    """
    import torch

    from minivllm.course.sim.ranks import Ranks

    parts, metadata = _models(4, 4), _DecodeOnly(16)
    ids = torch.empty(16, dtype=torch.int64, device="meta")

    def step(group: Group) -> None:
        mine = parts[group.rank]
        caches = [(None, None)] * mine.config.num_hidden_layers
        mine.compute_logits(group, mine.forward(group, ids, ids, caches, metadata))

    ranks = Ranks(4)
    ranks.run(step)
    reduces = [call for call in ranks.calls if call.name == "all_reduce"]
    [gather] = [call for call in ranks.calls if call.name == "all_gather"]
    return {
        "all_reduces": len(reduces),
        "one": reduces[0].num_bytes,
        "sent": sum(call.sent_bytes for call in reduces),
        "gathered": gather.sent_bytes,
        "weights": 2 * sum(t.numel() for t in parts[0].w.values() if t.dim() == 2),
        "kv": _kv_bytes_on(4),
    }


class _DecodeOnly:
    """As much metadata as a decode step without memory asks for."""

    def __init__(self, sequences: int) -> None:
        import torch

        self.num_decodes = sequences
        self.seq_lens = torch.empty(sequences, device="meta")
        self.block_table = self.slot_mapping = self.seq_lens
        self.max_decode_seq_len = 1


def _all_reduces() -> Prediction:
    """How many all-reduces a step has."""
    per_layer = (
        "Count the products in a layer whose results are terms: attention's output and down."
    )
    columns = "Columns, then rows: between the two nothing is sent."
    usual = {
        "forgot-the-embedding": (
            2 * _LAYERS,
            "The embedding is split by rows, too: its look-up ends in an all-reduce.",
        ),
        "one-per-layer": (_LAYERS, per_layer),
        "one-per-layer-and-embedding": (_LAYERS + 1, per_layer),
        "one-layer": (2, "That is one of 36 layers, without the embedding."),
        "one-layer-and-embedding": (3, "That is one of 36 layers, and the embedding."),
        "logits-reduced": (
            2 * _LAYERS + 2,
            "The logits are not added up: each rank has other tokens, so they are gathered.",
        ),
        "after-every-matrix": (7 * _LAYERS, columns),
        "after-every-matrix-and-embedding": (7 * _LAYERS + 1, columns),
    }
    advice = "Count those of one layer, then multiply. What else is split, besides the layers?"
    return Prediction("all_reduces", _measure()["all_reduces"], "", 0.0, usual, advice)


def _one_all_reduce() -> Prediction:
    """Bytes of the tensor that is summed."""
    one, count = _measure()["one"], _measure()["all_reduces"]
    usual = {
        "one-sequence": (one / _SEQUENCES, "A step sends the states of all 16 sequences at once."),
        "float32": (2 * one, _FLOAT32),
        "numbers-not-bytes": (one / 2, _HALF),
        "divided-by-the-ranks": (
            one / 4,
            "A rank's term of the sum is as wide as the result: it is no part of the result.",
        ),
        "before-down": (
            _SEQUENCES * _WIDE * 2,
            "The MLP's wide numbers stay where they are; the result of down is summed.",
        ),
        "before-down-on-a-rank": (
            _SEQUENCES * _WIDE * 2 / 4,
            "The MLP's wide numbers stay where they are; the result of down is summed.",
        ),
        "all-of-them": (one * count, "That is all of them together. This asks for one."),
        "on-all-ranks": (4 * one, "That is the tensors of four ranks. This asks for one tensor."),
    }
    advice = "How many tokens does a step have here, and how wide is the state of a token?"
    return Prediction("one_all_reduce", one, "bytes", _NEAR, usual, advice)


def _sent(all_reduces: Any, one_all_reduce: Any) -> Prediction:
    """Bytes that a rank sends in all all-reduces, in a ring. The arguments are predictions, too."""
    m = _measure()
    one, whole = m["one"], m["one"] * m["all_reduces"]
    usual = {
        "once-the-tensor": (whole, _RING),
        "own-share-sent-too": (2 * whole, _RING),
        "half-of-the-ring": (0.75 * whole, _RING),
        "sent-to-each": (
            3 * whole,
            f"Each sends everything to each other: that is no ring. {_RING}",
        ),
        "one-all-reduce": (m["sent"] / m["all_reduces"], "That is one of all the all-reduces."),
        "forgot-the-embedding": (1.5 * one * 2 * _LAYERS, "The embedding has one, too."),
        "all-ranks": (
            4 * m["sent"],
            "That is what all four send together. This asks for one rank.",
        ),
        "one-sequence": (m["sent"] / _SEQUENCES, "A step has 16 sequences."),
    }
    if isinstance(all_reduces, int | float) and isinstance(one_all_reduce, int | float):
        first = 1.5 * all_reduces * one_all_reduce
        usual = {"follows": (first, "It follows from your first two numbers.")} | usual
    advice = "Your first two numbers, and what a ring sends of a tensor: follow one share of it."
    return Prediction("sent", m["sent"], "bytes", _NEAR, usual, advice)


def _gathered() -> Prediction:
    """Bytes that a rank gets in the all-gather."""
    right = _measure()["gathered"]
    all_logits = 2 * _SEQUENCES * _VOCABULARY
    usual = {
        "own-part-counted": (all_logits, "A rank has its own part of the logits already."),
        "own-part-only": (
            all_logits / 4,
            "That is what it brings. It gets as much from each of the others.",
        ),
        "one-sequence": (right / _SEQUENCES, "16 sequences want logits."),
        "numbers-not-bytes": (right / 2, _HALF),
        "twice-as-much": (
            1.5 * all_logits,
            "bfloat16 has 2 bytes per number, and nothing is summed: parts are collected, and each"
            " rank gets each other part once.",
        ),
        "states-not-logits": (
            3 * 2 * _SEQUENCES * _HIDDEN,
            "The logits are gathered, not the states: one number per token of the vocabulary.",
        ),
        "all-ranks": (4 * right, "That is what all four get together. This asks for one rank."),
    }
    advice = "How many tokens can one rank score, and how many parts does it lack?"
    return Prediction("gathered", right, "bytes", _NEAR, usual, advice)


def _weights() -> Prediction:
    """Bytes of the matrices of a rank."""
    right, table = _measure()["weights"], 2 * _VOCABULARY * _HIDDEN
    layers = 4 * right - 2 * table
    projections = _HIDDEN * 128 * 2 * _LAYERS
    usual = {
        "not-divided": (4 * right, "Each rank has a part of every matrix."),
        "numbers-not-bytes": (right / 2, _HALF),
        "float32": (2 * right, _FLOAT32),
        "forgot-the-vocabulary": (
            layers / 4,
            "Embedding and head are matrices, too: they are split, and they count.",
        ),
        "tied": (
            (layers + table) / 4,
            "This model is not tied: embedding and head are two matrices.",
        ),
        "vocabulary-not-divided": (
            layers / 4 + 2 * table,
            "Embedding and head are split by rows, too.",
        ),
        "kv-as-wide-as-queries": (
            right + projections * (2 * 32 - 2 * 8) / 4,
            "Keys and values have 8 heads, not 32: their matrices are narrower.",
        ),
        "forgot-the-output-of-attention": (
            right - projections * 32 / 4,
            "Attention has four matrices: q, k, v and the one behind it, o.",
        ),
        "two-matrices-in-the-mlp": (
            right - _HIDDEN * _WIDE * 2 * _LAYERS / 4,
            "The MLP has three matrices: gate, up and down.",
        ),
        "one-layer": (
            (layers / _LAYERS + 2 * table) / 4,
            "That has one of 36 layers.",
        ),
        "forgot-one-of-k-and-v": (
            right - projections * 8 / 4,
            "Keys and values have a matrix each.",
        ),
    }
    advice = "List the seven matrices of a layer with their shapes. What has the model besides?"
    return Prediction("weights", right, "bytes", _NEAR, usual, advice)


def _kv(name: str, right: float, usual: Mapping[str, tuple[float, str]]) -> Prediction:
    """Bytes of a token in the cache of a rank."""
    both = {
        "keys-or-values": (right / 2, "Keys and values are kept, with two bytes per number."),
        "one-layer": (right / _LAYERS, "Each of the 36 layers keeps its own."),
    }
    advice = "Which KV heads does a rank keep? Each has a key and a value in each layer."
    return Prediction(name, right, "bytes", _NEAR, {**usual, **both}, advice)


def _kv_bytes() -> Prediction:
    right = _measure()["kv"]
    usual = {
        "not-divided": (4 * right, "A rank keeps its own KV heads only."),
        "float32": (2 * right, _FLOAT32),
        "forgot-gqa": (
            4 * right * 4,
            "Only KV heads are kept, not the 32 query heads, and a rank has a part of them.",
        ),
    }
    return _kv("kv_bytes", right, usual)


def _kv_bytes_16() -> Prediction:
    right = _kv_bytes_on(16)
    usual = {
        "half-a-head": (
            right / 2,
            "There are 8 KV heads for 16 ranks, and half a head is no head.",
        ),
        "two-heads": (2 * right, "That is as much as on four ranks. Here a rank needs less."),
        "not-divided": (
            8 * right,
            "A rank keeps the KV heads that its query heads read, not all of them.",
        ),
    }
    return _kv("kv_bytes_16", right, usual)


def check_predictions(
    all_reduces: float,
    one_all_reduce: float,
    sent: float,
    gathered: float,
    weights: float,
    kv_bytes: float,
    kv_bytes_16: float,
) -> str:
    """Compare seven predictions with a step that was run and counted."""
    expect_predictions(
        (_all_reduces(), all_reduces),
        (_one_all_reduce(), one_all_reduce),
        (_sent(all_reduces, one_all_reduce), sent),
        (_gathered(), gathered),
        (_weights(), weights),
        (_kv_bytes(), kv_bytes),
        (_kv_bytes_16(), kv_bytes_16),
    )
    return "seven predictions, all as measured"


EXERCISE = Exercise(
    id="09.2",
    title="Predict: Qwen3-8B on four GPUs",
    check=check_predictions,
    mistakes=(
        Known(
            "forgot-the-embedding",
            answers=r"""
# %% two a layer
@@
-all_reduces = 2 * 36 + 1
+all_reduces = 2 * 36
""",
        ),
        Known(
            "after-every-matrix",
            answers=r"""
# %% seven matrices
@@
-all_reduces = 2 * 36 + 1
+all_reduces = 7 * 36
""",
        ),
        Known(
            "one-sequence",
            hint=1,
            answers=r"""
# %% the step has sixteen
@@
-one_all_reduce = 16 * 4096 * 2
+one_all_reduce = 4096 * 2
""",
        ),
        Known(
            "divided-by-the-ranks",
            hint=1,
            answers=r"""
# %% a term is taken for a part
@@
-one_all_reduce = 16 * 4096 * 2
+one_all_reduce = 16 * 4096 * 2 / 4
""",
        ),
        Known(
            "before-down",
            hint=1,
            answers=r"""
# %% the wide numbers
@@
-one_all_reduce = 16 * 4096 * 2
+one_all_reduce = 16 * 12_288 * 2
""",
        ),
        Known(
            "once-the-tensor",
            hint=2,
            answers=r"""
# %% each sends its tensor once
@@
-sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
+sent = 73 * 16 * 4096 * 2
""",
        ),
        Known(
            "sent-to-each",
            hint=2,
            answers=r"""
# %% each to each
@@
-sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
+sent = 73 * 16 * 4096 * 2 * 3
""",
        ),
        Known(
            "half-of-the-ring",
            hint=2,
            answers=r"""
# %% while sums grow
@@
-sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
+sent = 73 * 16 * 4096 * 2 * 3 / 4
""",
        ),
        Known(
            "own-part-counted",
            hint=3,
            answers=r"""
# %% all of the logits
@@
-gathered = 16 * (151_936 / 4) * 2 * 3
+gathered = 16 * 151_936 * 2
""",
        ),
        Known(
            "own-part-only",
            answers=r"""
# %% what it brings
@@
-gathered = 16 * (151_936 / 4) * 2 * 3
+gathered = 16 * 151_936 * 2 / 4
""",
        ),
        Known(
            "not-divided",
            answers=r"""
# %% weights of the whole model
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (
    36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096
)
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2

# %% the whole cache
@@
-kv_bytes = 2 * 36 * 2 * 128 * 2
+kv_bytes = 2 * 36 * 8 * 128 * 2
""",
        ),
        Known(
            "tied",
            answers=r"""
# %% one matrix for embedding and head
@@
-    2
-    * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096)
-    / 4
+    2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 151_936 * 4096) / 4
""",
        ),
        Known(
            "numbers-not-bytes",
            answers=r"""
# %% one byte per number
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = (
    36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096
) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2
""",
        ),
        Known(
            "keys-or-values",
            answers=r"""
# %% one of the two
@@
-kv_bytes = 2 * 36 * 2 * 128 * 2
+kv_bytes = 36 * 2 * 128 * 2
""",
        ),
        Known(
            "half-a-head",
            hint=3,
            answers=r"""
# %% eight heads on sixteen ranks
@@
-kv_bytes_16 = 2 * 36 * 1 * 128 * 2
+kv_bytes_16 = 2 * 36 * 8 * 128 * 2 / 16
""",
        ),
        Known(
            "two-heads",
            answers=r"""
# %% as on four ranks
@@
-kv_bytes_16 = 2 * 36 * 1 * 128 * 2
+kv_bytes_16 = 2 * 36 * 2 * 128 * 2
""",
        ),
        Known(
            "float32",
            answers=r"""
# %% four bytes per number
@@
-one_all_reduce = 16 * 4096 * 2
+one_all_reduce = 16 * 4096 * 4
""",
        ),
        Known(
            "wrong-all-reduces",
            answers=r"""
# %% a sum gone wrong
@@
-all_reduces = 2 * 36 + 1
+all_reduces = 74 + 36
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% not a number
@@
-all_reduces = 2 * 36 + 1
+all_reduces = float("nan")
""",
        ),
        Known(
            "one-per-layer",
            answers=r"""
# %% attention and MLP together
@@
-all_reduces = 2 * 36 + 1
+all_reduces = 36
""",
        ),
        Known(
            "kv-as-wide-as-queries",
            answers=r"""
# %% no grouped queries in the matrices
@@
-    * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096)
+    * (36 * (4096 * (4 * 32) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096)
""",
        ),
        Known(
            "forgot-gqa",
            answers=r"""
# %% a cache for query heads
@@
-kv_bytes = 2 * 36 * 2 * 128 * 2
+kv_bytes = 2 * 36 * 32 * 128 * 2
""",
        ),
    ),
)
