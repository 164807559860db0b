"""09.2: predict: Qwen3-8B on four GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake

if TYPE_CHECKING:
    import torch

    from minivllm.config import ModelConfig
    from minivllm.course.sim.ranks import Group
from minivllm.course.chapters.ch09_tensor_parallel.common import the_rank_model
from minivllm.course.grading.exercise import Exercise, Known


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


def _parts(size: int, count: int) -> list[Any]:
    """The first `count` of `size` ranks."""
    config, kernels, weights, cos_sin = _meta_weights()
    return [
        the_rank_model()(config, kernels, weights, cos_sin, rank, size) for rank in range(count)
    ]


def _kv_bytes(parts: Sequence[Any]) -> int:
    keys = parts[0].w["model.layers.0.self_attn.k_proj.weight"].shape[0]
    return 2 * 2 * parts[0].config.num_hidden_layers * keys


@cache
def _measure() -> dict[str, float]:
    """A decode step of 16 sequences on 4 ranks without memory: its collectives, a rank's weights
    and cache.
    """
    import torch

    from minivllm.course.sim.ranks import Ranks

    parts, metadata = _parts(4, 4), _DecodeOnly(16)
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
        "kv": _kv_bytes(parts),
    }


class _DecodeOnly:
    """As much metadata as a decode step without memory asks for."""

    def __init__(self, sequences: int) -> None:
        import torch

        self.num_decodes = sequences
        self.seq_lens = torch.empty(sequences, device="meta")
        self.block_table = self.slot_mapping = self.seq_lens
        self.max_decode_seq_len = 1


def check_predictions(
    all_reduces: float,
    one_all_reduce: float,
    sent: float,
    gathered: float,
    weights: float,
    kv_bytes: float,
    kv_bytes_16: float,
) -> str:
    m, wide = _measure(), {"kv": _kv_bytes(_parts(16, 1))}
    one, count, whole = m["one"], m["all_reduces"], 4 * m["weights"]
    vocabulary, layers = 151_936, 36

    def judge(
        name: str, guess: Any, right: float, measured: str, known: dict[float, tuple[str, str]]
    ) -> None:
        if isinstance(guess, bool) or not isinstance(guess, int | float):
            raise Mistake("wrong-type", f"{name} is {show(guess)}.\nA prediction is one number.")
        if math.isclose(guess, right, rel_tol=0.002):
            return
        for value, (mistake, why) in known.items():
            if math.isclose(guess, value, rel_tol=0.002):
                raise Mistake(
                    mistake,
                    f"{name}: you predicted {guess:,.0f}, measured: {right:,.0f}.\n{why}"
                    f" {measured}",
                )
        raise Mistake(
            "wrong-prediction",
            f"{name}: you predicted {guess:,.0f}, measured: {right:,.0f}.\n{measured} "
            "Find out where the difference comes from, then correct your number.",
        )

    in_float32 = "float32", "bfloat16 has 2 bytes a number."
    judge(
        "all_reduces",
        all_reduces,
        count,
        "Measured: a step was run on four ranks without memory, and every call noted.",
        {
            2 * layers: (
                "forgot-the-embedding",
                "The embedding is split by rows: its look-up ends in an all-reduce, too.",
            ),
            layers: ("one-a-layer", "Two a layer: one after attention's output, one after down."),
            layers + 1: (
                "one-a-layer",
                "Two a layer: one after attention's output, one after down.",
            ),
            2: ("one-layer", "That is one of 36 layers, without the embedding."),
            3: ("one-layer", "That is one of 36 layers, and the embedding."),
            count + 1: (
                "logits-reduced",
                "The logits are not added up: each rank has other tokens, so they are gathered.",
            ),
            7 * layers: (
                "after-every-matrix",
                "Columns, then rows: between the two nothing is sent.",
            ),
            7 * layers + 1: (
                "after-every-matrix",
                "Columns, then rows: between the two nothing is sent.",
            ),
        },
    )
    judge(
        "one_all_reduce",
        one_all_reduce,
        one,
        "Measured: bfloat16 [16, 4096].",
        {
            one / 16: ("one-sequence", "A step sends the states of all 16 sequences at once."),
            one * 2: in_float32,
            one / 2: ("numbers-not-bytes", "That is how many numbers it has, of two bytes each."),
            one / 4: (
                "divided-by-the-ranks",
                "A term of the sum is as large as the whole result: all 4,096 numbers.",
            ),
            16 * 12_288 * 2: (
                "before-down",
                "The MLP's 12,288 numbers stay where they are; the result of down is summed.",
            ),
            one * count: ("all-of-them", "That is all of them together; this asks for one."),
        },
    )
    ring = (
        "A ring of n sends 2 (n − 1) / n of the tensor: (n − 1) / n while sums grow, and as much to"
        " hand them out."
    )
    judge(
        "sent",
        sent,
        m["sent"],
        f"Measured: {count} all-reduces of {one:,} bytes.",
        {
            count * one: ("once-the-tensor", ring),
            2 * count * one: ("own-share-sent-too", ring),
            0.75 * count * one: ("half-of-the-ring", ring),
            3 * count * one: (
                "sent-to-each",
                "Each sends everything to each other: that is no ring. " + ring,
            ),
            1.5 * one: ("one-all-reduce", f"That is one of {count}."),
            1.5 * one * 2 * layers: ("forgot-the-embedding", "The embedding has one, too."),
            4 * m["sent"]: (
                "all-ranks",
                "That is what all four send together; this asks for one rank.",
            ),
        },
    )
    rows = vocabulary // 4
    judge(
        "gathered",
        gathered,
        m["gathered"],
        "Measured: an all-gather of bfloat16 [16, 37984] on each of four ranks.",
        {
            16 * vocabulary * 2: (
                "own-part-counted",
                "A rank has its own quarter already; it gets three.",
            ),
            16 * rows * 2: (
                "own-part-only",
                "That is what it brings; it gets as much from each of the three others.",
            ),
            m["gathered"] / 16: ("one-sequence", "16 sequences want logits."),
            2 * m["gathered"]: in_float32,
            1.5 * 16 * vocabulary * 2: (
                "like-an-all-reduce",
                (
                    "Nothing is summed: parts are collected, each is sent on once "
                    "by everybody but its last receiver."
                ),
            ),
            16 * 4096 * 2 * 3: (
                "states-not-logits",
                "The logits are gathered: 151,936 numbers a sequence.",
            ),
        },
    )
    judge(
        "weights",
        weights,
        m["weights"],
        "Measured: the matrices of rank 0, two bytes a number.",
        {
            whole: ("not-divided", "Each rank has a quarter of every matrix."),
            m["weights"] / 2: (
                "numbers-not-bytes",
                "That is how many numbers; each has two bytes.",
            ),
            2 * m["weights"]: in_float32,
            (whole - 2 * 2 * vocabulary * 4096) / 4: (
                "forgot-the-vocabulary",
                "Embedding and head are split, too, and they count.",
            ),
            (whole - 2 * vocabulary * 4096) / 4: (
                "tied",
                "This model is not tied: embedding and head are two matrices.",
            ),
            (whole - 2 * 2 * vocabulary * 4096) / 4 + 2 * 2 * vocabulary * 4096: (
                "vocabulary-not-divided",
                "Embedding and head are split by rows, too.",
            ),
        },
    )
    keys = "Four ranks share 8 KV heads: two each."
    judge(
        "kv_bytes",
        kv_bytes,
        m["kv"],
        "Measured: keys and values of 2 heads, 36 layers.",
        {
            4 * m["kv"]: ("not-divided", keys),
            m["kv"] / 2: ("keys-or-values", "Keys and values are kept."),
            2 * m["kv"]: in_float32,
            m["kv"] / layers: ("one-layer", "Each of the 36 layers keeps its own."),
            16 * m["kv"]: (
                "forgot-gqa",
                "Only KV heads are kept, not the 32 query heads; and a rank has a quarter.",
            ),
        },
    )
    judge(
        "kv_bytes_16",
        kv_bytes_16,
        wide["kv"],
        "Measured: one KV head on each of 16 ranks.",
        {
            m["kv"] / 4: (
                "half-a-head",
                (
                    "There are 8 KV heads for 16 ranks, and half a head is no head: two ranks keep"
                    " the same one."
                ),
            ),
            m["kv"]: (
                "two-heads",
                "That is two heads, as on four ranks. With 16 ranks each needs one.",
            ),
            4 * m["kv"]: (
                "not-divided",
                "A rank keeps the KV head that its query heads read, not all 8.",
            ),
            wide["kv"] / 4: ("keys-or-values", "Keys and values are kept, of one whole head."),
        },
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
            "one-a-layer",
            answers=r"""
# %% attention and MLP together
@@
-all_reduces = 2 * 36 + 1
+all_reduces = 36
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
            answers=r"""
# %% the step has sixteen
@@
-one_all_reduce = 16 * 4096 * 2
+one_all_reduce = 4096 * 2
""",
        ),
        Known(
            "divided-by-the-ranks",
            answers=r"""
# %% a term is taken for a part
@@
-one_all_reduce = 16 * 4096 * 2
+one_all_reduce = 16 * 4096 * 2 / 4
""",
        ),
        Known(
            "before-down",
            answers=r"""
# %% the wide numbers
@@
-one_all_reduce = 16 * 4096 * 2
+one_all_reduce = 16 * 12_288 * 2
""",
        ),
        Known(
            "once-the-tensor",
            answers=r"""
# %% each sends its tensor once
@@
-sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
+sent = 73 * 16 * 4096 * 2
""",
        ),
        Known(
            "sent-to-each",
            answers=r"""
# %% each to each
@@
-sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
+sent = 73 * 16 * 4096 * 2 * 3
""",
        ),
        Known(
            "half-of-the-ring",
            answers=r"""
# %% while sums grow
@@
-sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
+sent = 73 * 16 * 4096 * 2 * 3 / 4
""",
        ),
        Known(
            "own-part-counted",
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
# %% one byte a number
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
            answers=r"""
# %% eight heads on sixteen ranks
@@
-kv_bytes_16 = 2 * 36 * 1 * 128 * 2
+kv_bytes_16 = 2 * 36 * 8 * 128 * 2 / 16
""",
        ),
        Known(
            "wrong-prediction",
            answers=r"""
# %% a sum gone wrong
@@
-all_reduces = 2 * 36 + 1
+all_reduces = 74 + 36
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
# %% four bytes a number
@@
-one_all_reduce = 16 * 4096 * 2
+one_all_reduce = 16 * 4096 * 4
""",
        ),
    ),
)
