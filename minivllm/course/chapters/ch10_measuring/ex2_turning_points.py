"""10.2: predict: the turning points."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake

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


def check_turning_points(
    kv_passes_weights_1k: float,
    kv_passes_weights_8k: float,
    matrices_turn: float,
    attention_flops_per_byte: float,
    attention_turns: float,
    small_kv_speedup: float,
) -> str:
    costs = _costs()
    weights, kv = costs.layer_weights + costs.head_weights, costs.kv_elements_per_token

    def judge(
        name: str, guess: Any, right: float, why: str, known: dict[float, tuple[str, str]]
    ) -> None:
        if isinstance(guess, bool) or not isinstance(guess, int | float):
            raise Mistake("wrong-type", f"{name} is {show(guess)}.\nA prediction is one number.")
        if guess == right or math.isclose(guess, right, rel_tol=0.03):
            return
        for value, (mistake, explanation) in known.items():
            if guess == value or math.isclose(guess, value, rel_tol=0.03):
                raise Mistake(
                    mistake,
                    f"{name}: you predicted {guess:,.4g}, it is {right:,.4g}.\n{explanation} {why}",
                )
        raise Mistake(
            "wrong-prediction", f"{name}: you predicted {guess:,.4g}, it is {right:,.4g}.\n{why}"
        )

    one = weights / kv
    for name, guess, context in (
        ("kv_passes_weights_1k", kv_passes_weights_1k, 1024),
        ("kv_passes_weights_8k", kv_passes_weights_8k, 8192),
    ):
        judge(
            name,
            guess,
            one / context,
            f"A sequence of {context:,} tokens has {2 * kv * context / 1e6:,.0f} million "
            f"bytes of K and V, the matrices have {2 * weights / 1e6:,.0f} million.",
            {
                one / context / 2: (
                    "query-heads-for-kv",
                    "You counted K and V for 16 heads; there are 8.",
                ),
                2 * one / context: (
                    "k-without-v",
                    "You counted keys or values; a step reads both.",
                ),
                costs.layer_weights / kv / context: (
                    "head-forgotten",
                    "The matrix of the head is read as well.",
                ),
                (weights + costs.head_weights) / kv / context: (
                    "embedding-counted",
                    "You counted the embeddings and the head; tied, they are one matrix.",
                ),
                28 * one / context: ("kv-of-one-layer", "Each of the 28 layers has K and V."),
            },
        )
    ridge = MULTIPLIES / READS
    judge(
        "matrices_turn",
        matrices_turn,
        ridge,
        "A weight has 2 bytes, and makes 2 operations for every sequence: so "
        "many FLOPs a byte as there are sequences. The model's size does not matter.",
        {
            ridge / 2: (
                "bytes-or-operations",
                "A factor of two is missing: 2 bytes a weight, and 2 operations.",
            ),
            2 * ridge: (
                "bytes-or-operations",
                "A factor of two too many: 2 bytes a weight, and 2 operations.",
            ),
        },
    )
    judge(
        "attention_flops_per_byte",
        attention_flops_per_byte,
        costs.attention_flops_per_pair / (2 * kv),
        "A key and its value, 2 · 128 numbers of 2 bytes, meet the queries of 2 heads, with 2"
        " operations a number.",
        {
            1.0: (
                "gqa-forgotten",
                "That would be without GQA: here each pair of K and V serves 16 / 8 query heads.",
            ),
            4.0: (
                "k-without-v",
                "Bytes of K and of V, operations with K and with V: count both on both sides.",
            ),
            16.0: ("gqa-forgotten", "Only 16 / 8 query heads share a pair of K and V, not all 16."),
            0.5: (
                "bytes-or-operations",
                "2 bytes a number, 2 operations for each query that meets it.",
            ),
        },
    )
    if math.isfinite(attention_turns):
        raise Mistake(
            "attention-does-not-share",
            f"attention_turns: you predicted {attention_turns:,.4g}, it is infinite.\nMore"
            " sequences bring more operations, and as many more bytes: nobody shares K and V. It"
            f" stays at {attention_flops_per_byte:g} FLOPs a byte.",
        )
    before, after = _step_seconds(256, 1024), _step_seconds(256, 1024, kv_bytes=1)
    judge(
        "small_kv_speedup",
        small_kv_speedup,
        before / after,
        f"{1e3 * before:.2f} milliseconds before, "
        f"{1e3 * after:.2f} after: the matrices take as long as they did.",
        {
            2.0: ("weights-forgotten", "Half of K and V is not half of the step."),
            after / before: ("upside-down", "That is the new time divided by the old."),
            256 * 1024 * kv / (weights + 256 * 1024 * kv / 2): (
                "weights-forgotten",
                "The weights are read before, too.",
            ),
        },
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

# %% bytes of keys alone
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 150
attention_flops_per_byte = 4
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

# %% a multiplication and an addition counted as one
kv_passes_weights_1k = 595_984_384 / (57_344 * 1024)
kv_passes_weights_8k = 595_984_384 / (57_344 * 8192)
matrices_turn = 300
attention_flops_per_byte = 2
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
            "wrong-prediction",
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
