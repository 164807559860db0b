"""10.2: predict: the turning points."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import Prediction, expect_all

if TYPE_CHECKING:
    from minivllm.bench.costs import ModelCosts
from minivllm.course.grading.exercise import Exercise, Known

#: What the statement gives: bytes read and operations multiplied in a second.
READS, MULTIPLIES = 4.5e12, 675e12


def _costs() -> ModelCosts:
    from minivllm.bench.costs import ModelCosts
    from minivllm.bench.shapes import shape_config

    return ModelCosts.of(shape_config("qwen3-0.6b"), 2)


def _step_seconds(batch: int, context: int, kv_bytes: int = 2, compute: bool = True) -> float:
    costs = _costs()
    weights = costs.layer_weights + costs.head_weights
    matrices = max(2 * weights / READS, 2 * batch * weights / MULTIPLIES if compute else 0.0)
    return matrices + batch * context * costs.kv_elements_per_token * kv_bytes / READS


def _kv_passes_weights(name: str, context: int) -> Prediction:
    """From how many sequences on K and V are more bytes than the matrices."""
    costs = _costs()
    weights, kv = costs.layer_weights + costs.head_weights, costs.kv_elements_per_token
    right = weights / kv / context
    usual = {
        "query-heads-for-kv": (right / 2, "You counted K and V for 16 heads; there are 8."),
        "k-without-v": (2 * right, "You counted keys or values; a step reads both."),
        "head-forgotten": (
            costs.layer_weights / kv / context,
            "The matrix of the head is read as well.",
        ),
        "embedding-counted": (
            (weights + costs.head_weights) / kv / context,
            "You counted the embeddings and the head; tied, they are one matrix.",
        ),
        "kv-of-one-layer": (28 * right, "Each of the 28 layers has K and V."),
    }
    advice = "Divide the bytes of all matrices by the bytes of K and V of one sequence."
    return Prediction(name, right, "sequences", 0.03, usual, advice)


def _matrices_turn() -> Prediction:
    ridge = MULTIPLIES / READS
    missing = "2 bytes per weight, and 2 operations per weight and sequence."
    usual = {
        "bytes-or-operations": (ridge / 2, f"A factor of two is missing: {missing}"),
        "bytes-or-operations-twice": (2 * ridge, f"A factor of two too many: {missing}"),
    }
    advice = (
        "With n sequences a weight makes 2 · n operations and has 2 bytes. Where do both take"
        " equally long? The model's size does not matter."
    )
    return Prediction("matrices_turn", ridge, "sequences", 0.03, usual, advice)


def _attention_flops_per_byte() -> Prediction:
    costs = _costs()
    right = costs.attention_flops_per_pair / (2 * costs.kv_elements_per_token)
    usual = {
        "gqa-forgotten": (1.0, "That would be without GQA: each pair of K and V serves 2 heads."),
        "bytes-or-operations-twice": (
            4.0,
            "A factor of two too many. A number has 2 bytes; and where the operations with K and"
            " with V count, so do the bytes of both.",
        ),
        "all-heads-share": (16.0, "Only 16 / 8 query heads share a pair of K and V, not all 16."),
        "bytes-or-operations": (0.5, "2 bytes per number, 2 operations per query that meets it."),
    }
    advice = (
        "A key and its value are 2 · 128 numbers of 2 bytes. They meet the queries of 16 / 8 heads,"
        " with 2 operations per number and query."
    )
    return Prediction("attention_flops_per_byte", right, "FLOPs per byte", 0.03, usual, advice)


def _small_kv_speedup() -> Prediction:
    costs = _costs()
    weights, kv = costs.layer_weights + costs.head_weights, costs.kv_elements_per_token
    before, after = _step_seconds(256, 1024), _step_seconds(256, 1024, kv_bytes=1)
    only_reading = 256 * 1024 * kv
    cache = 2 * only_reading / READS

    def with_weights(count: int) -> float:
        """The speedup of somebody who counts so many numbers in the matrices."""
        matrices = max(2 * count / READS, 2 * 256 * count / MULTIPLIES)
        return (matrices + cache) / (matrices + cache / 2)

    usual = {
        "head-forgotten": (
            with_weights(costs.layer_weights),
            "The matrix of the head is read as well.",
        ),
        "embedding-counted": (
            with_weights(weights + costs.head_weights),
            "You counted the embeddings and the head; tied, they are one matrix.",
        ),
        "query-heads-for-kv": (
            (before + cache) / before,
            "You counted K and V for 16 heads; there are 8.",
        ),
        "weights-forgotten": (2.0, "Half of K and V is not half of the step."),
        "upside-down": (after / before, "That is the new time divided by the old."),
        "matrices-only-read": (
            (weights + only_reading) / (weights + only_reading / 2),
            "With 256 sequences the matrices take longer to multiply than to read.",
        ),
        "weights-forgotten-before": (
            only_reading / (weights + only_reading / 2),
            "The weights are read before, too.",
        ),
    }
    advice = "Compute both times: the matrices take as long as before, K and V half as long."
    # Nearer than two percent to the right number lies that of matrices that are only read.
    return Prediction("small_kv_speedup", before / after, "times", 0.011, usual, advice)


def _judge_attention_turns(said: Any) -> None:
    """Never is +inf, and nothing else."""
    number = isinstance(said, int | float) and not isinstance(said, bool) and not math.isnan(said)
    if not number:
        raise Mistake(
            "wrong-type", f"attention_turns is {show(said)}.\nA prediction is one number."
        )
    if said < 0:
        raise Mistake(
            "less-than-nothing",
            f"attention_turns: {said:,.4g} sequences.\nA number of sequences is at least 1;"
            " `float('inf')` stands for never.",
        )
    if math.isfinite(said):
        raise Mistake(
            "attention-does-not-share",
            f"attention_turns: you predicted {said:,.4g}.\nMore sequences bring more operations,"
            " and as many more bytes: nobody shares K and V. So what happens to the FLOPs per byte"
            " when a sequence is added?",
        )


def check_turning_points(
    kv_passes_weights_1k: float,
    kv_passes_weights_8k: float,
    matrices_turn: float,
    attention_flops_per_byte: float,
    attention_turns: float,
    small_kv_speedup: float,
) -> str:
    """Judge the six numbers; a message names each that is wrong, and tells none."""
    predictions = (
        (_kv_passes_weights("kv_passes_weights_1k", 1024), kv_passes_weights_1k),
        (_kv_passes_weights("kv_passes_weights_8k", 8192), kv_passes_weights_8k),
        (_matrices_turn(), matrices_turn),
        (_attention_flops_per_byte(), attention_flops_per_byte),
        (_small_kv_speedup(), small_kv_speedup),
    )
    expect_all(
        *(partial(prediction.judge, said) for prediction, said in predictions),
        partial(_judge_attention_turns, attention_turns),
    )
    return "six turning points"


EXERCISE = Exercise(
    id="10.2",
    title="Predict: the turning points",
    check=check_turning_points,
    mistakes=(
        Known(
            "query-heads-for-kv",
            answers=r"""
# %% K and V of 16 heads
kv_passes_weights_1k = 595_984_384 / (114_688 * 1024)
kv_passes_weights_8k = 595_984_384 / (114_688 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "k-without-v",
            answers=r"""
# %% keys alone
kv_passes_weights_1k = 595_984_384 / (28_672 * 1024)
kv_passes_weights_8k = 595_984_384 / (28_672 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "head-forgotten",
            answers=r"""
# %% the layers alone
kv_passes_weights_1k = 440_401_920 / (57_344 * 1024)
kv_passes_weights_8k = 440_401_920 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "embedding-counted",
            answers=r"""
# %% all 0.75 billion parameters
kv_passes_weights_1k = 751_566_848 / (57_344 * 1024)
kv_passes_weights_8k = 751_566_848 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "kv-of-one-layer",
            answers=r"""
# %% 28 layers forgotten
kv_passes_weights_1k = 595_984_384 / (2_048 * 1024)
kv_passes_weights_8k = 595_984_384 / (2_048 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "bytes-or-operations",
            answers=r"""
# %% bytes of a weight forgotten
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 75
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "bytes-or-operations-twice",
            answers=r"""
# %% a multiplication and an addition counted as one
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 300
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88

# %% operations per number of K and V
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 4
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "gqa-forgotten",
            answers=r"""
# %% a query head for each K and V
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 1
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "all-heads-share",
            answers=r"""
# %% all query heads share
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 16
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
        Known(
            "matrices-only-read",
            answers=r"""
# %% the matrices take as long as reading them
@@
-small_kv_speedup = (0.452e-3 + 30.06e9 / 4.5e12) / (0.452e-3 + 15.03e9 / 4.5e12)
+small_kv_speedup = (1.19e9 + 30.06e9) / (1.19e9 + 15.03e9)
""",
        ),
        Known(
            "less-than-nothing",
            answers=r"""
# %% minus infinity for never
@@
-attention_turns = float("inf")
+attention_turns = float("-inf")
""",
        ),
        Known(
            "attention-does-not-share",
            answers=r"""
# %% the same as for the matrices
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = 150
small_kv_speedup = 1.88

# %% the machine's number by two
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = 75
small_kv_speedup = 1.88
""",
        ),
        Known(
            "weights-forgotten",
            answers=r"""
# %% half of the bytes, half of the time
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 2
""",
        ),
        Known(
            "upside-down",
            answers=r"""
# %% new by old
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 0.532
""",
        ),
        Known(
            "wrong-small-kv-speedup",
            answers=r"""
# %% attention with many queries
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.5
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% not a number
@@
-attention_turns = float("inf")
+attention_turns = float("nan")

# %% a text
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = "150"
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.88
""",
        ),
    ),
    right=r"""
# %% rounded by hand
kv_passes_weights_1k = 10
kv_passes_weights_8k = 1.25
matrices_turn = 150
attention_flops_per_byte = 2
attention_turns = float("inf")
small_kv_speedup = 1.9
""",
)
