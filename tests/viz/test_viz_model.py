"""The pictures of chapter 06 show what the model does: angles, pairs, sizes, words, counts; and
stay small.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

from matplotlib.patches import Rectangle

from minivllm.bench.shapes import shape_config
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.config import ModelConfig
from minivllm.models.hf_config import config_from_hf
from minivllm.models.loader import iterate_weights, load_config
from minivllm.viz import scrub
from minivllm.viz.model import (
    count_flops,
    count_parameters,
    draw_block,
    draw_flops,
    draw_lens,
    draw_pairings,
    draw_parameters,
    draw_rotation,
    draw_stream,
    rotation,
    turn,
)

MAX_PNG_BYTES = 60_000
HALVES = [(i, i + 4) for i in range(4)]
NEIGHBOURS = [(2 * i, 2 * i + 1) for i in range(4)]
LABELS = ["embed", "attention 1", "MLP 1"]


@pytest.fixture(scope="module")
def bundled() -> ModelConfig:
    return load_config(BUNDLED_MODEL_PATH)


def hands(distance: int = 7, dim: int = 64, **more: object):
    draws = random.Random(0)
    query, key = ([draws.gauss(0, 1) for _ in range(dim)] for _ in "qk")
    frequencies = [10_000 ** (-2 * i / dim) for i in range(dim // 2)]
    return rotation(query, key, frequencies, distance, **more)


# --- rotary positions -----------------------------------------------------------------------------


def test_a_turn_keeps_the_length_and_goes_counterclockwise() -> None:
    assert turn((1.0, 0.0), math.pi / 2) == pytest.approx((0.0, 1.0))
    for angle in (0.0, 1.0, -7.5, 1000.0):
        assert math.hypot(*turn((3.0, -4.0), angle)) == pytest.approx(5.0)


def test_scores_depend_on_the_distance_alone() -> None:
    moving = hands(positions=range(0, 2000, 250))
    scores = [moving.score(step) for step in range(len(moving.steps))]
    assert scores == pytest.approx([scores[0]] * len(scores))
    assert hands(distance=8).score(0) != pytest.approx(hands(distance=7).score(0), abs=1e-3)


def test_all_pairs_together_are_what_the_model_computes(bundled: ModelConfig) -> None:
    torch = pytest.importorskip("torch")
    from minivllm.kernels.rotary import qk_norm_rope_reference
    from minivllm.layers.rotary import rope_table

    draws = random.Random(1)
    query, key = ([draws.gauss(0, 1) for _ in range(8)] for _ in "qk")
    table = rope_table(bundled.rope, 8, 32, torch.device("cpu"))
    frequencies = [bundled.rope.theta ** (-2 * i / 8) for i in range(4)]
    found = rotation(query, key, frequencies, 3, pairs=range(4), positions=[10])
    part = rotation(query, key, frequencies, 3, pairs=[1], positions=[10])
    q, k = torch.tensor(query).expand(1, 1, 8), torch.tensor(key).expand(1, 1, 8)
    q, _ = qk_norm_rope_reference(q, q, None, None, table, torch.tensor([10]), 1e-6)
    _, k = qk_norm_rope_reference(k, k, None, None, table, torch.tensor([7]), 1e-6)
    expected = float((q * k).sum()) / math.sqrt(8)
    assert found.score(0) == pytest.approx(expected, abs=1e-4)
    assert found.whole_score == part.whole_score == pytest.approx(expected, abs=1e-4)
    assert part.score(0) != pytest.approx(expected, abs=1e-2)


def test_dials_say_angles_and_score() -> None:
    moving = hands(positions=range(7, 20))
    first, later = draw_rotation(moving, 0), draw_rotation(moving, 5)
    assert len(first.axes) == 5
    assert first.caption == "Query at position 7, key at 0: the distance alone decides the score."
    begin, end = (
        figure.alt.partition(" Angle between them: pair 0: ")[2] for figure in (first, later)
    )
    assert begin == end != "", "neither angles nor score change"
    assert first.alt.endswith(
        f"These 5 pairs add {moving.score(0):.1f} to the score."
        f" All {moving.head_dim // 2} pairs together: {moving.whole_score:.1f}."
    )
    with pytest.raises(IndexError, match="There is no step 13: the rotation has steps 0 to 12"):
        draw_rotation(moving, 13)
    assert scrub(moving, draw_rotation, step=3).step == 3


@pytest.mark.parametrize("change", [{"pairs": []}, {"pairs": range(7)}, {"positions": []}])
def test_what_cannot_be_turned_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        hands(**change)
    with pytest.raises(ValueError, match="nothing to draw"):
        rotation([1.0, 2.0], [1.0], [0.1], 1)


def test_pairings_name_their_pairs_and_refuse_others() -> None:
    figure = draw_pairings(8, {"halves": HALVES, "interleaved": NEIGHBOURS})
    assert "halves: 0 with 4, 1 with 5" in figure.alt
    assert "interleaved: 0 with 1, 2 with 3" in figure.alt
    for pairs in ([(0, 1)], [(0, 1), (1, 2), (3, 4), (5, 6)]):
        with pytest.raises(ValueError, match="are not pairs"):
            draw_pairings(8, {"wrong": pairs})


# --- the block and its stream ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_block_says_what_each_box_makes(bundled: ModelConfig) -> None:
    alt = draw_block(bundled).alt
    for words in (
        "256 numbers per token",
        "q, k, v (512)",
        "QK-norm (4 + 2 heads of 64)",
        "gate, up (2 × 768)",
    ):
        assert words in alt
    llama = config_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 8,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 8,
        }
    )
    assert "QK-norm" not in draw_block(llama).alt


def test_columns_and_crosses_of_the_stream() -> None:
    ax = draw_stream([0.5, 1.0, 4.0], LABELS).axes[0]
    assert [patch.get_height() for patch in ax.patches if isinstance(patch, Rectangle)] == [
        0.5,
        1.0,
        4.0,
    ]
    assert "agree" in draw_stream([0.5, 1.0, 4.0], LABELS, [0.5, 1.001, 4.0]).caption
    caption = draw_stream([0.5, 1.0, 4.0], LABELS, [0.5, 2.0, 3.0]).caption
    assert "leave the columns at attention 1: 2.0 for 1.0; in the end 3.0 for 4.0" in caption
    assert (
        "leave the columns at MLP 1"
        in draw_stream([0.5, 1.0, 4.0], LABELS, [0.5, 1.0, math.nan]).caption
    )
    for sizes, labels, found in (([], [], None), ([1.0], [], None), ([1.0], ["embed"], [1.0, 2.0])):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw_stream(sizes, labels, found)


def test_the_lens_frames_what_is_settled() -> None:
    stages = [("embedding", "ab"), ("block 1", "xc"), ("block 2", "dc")]
    rows = {name: [(word, 0.3 * i) for word in words] for i, (name, words) in enumerate(stages)}
    figure = draw_lens(["a", "b"], rows)
    framed = [patch for patch in figure.axes[0].patches if patch.get_linewidth() > 1]
    assert len(framed) == 3  # d at last, c twice
    assert figure.alt.endswith("In the end: a → d, b → c.")
    assert figure.caption.endswith("found theirs by the stage “block 2”.")
    for words in (["a"], []):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw_lens(words, rows)


# --- where the numbers are ------------------------------------------------------------------------


def test_parameters_are_those_of_the_checkpoint(bundled: ModelConfig) -> None:
    counts, in_file = count_parameters(bundled), dict.fromkeys(count_parameters(bundled), 0)
    for name, tensor in iterate_weights(BUNDLED_MODEL_PATH):
        kind = "embedding" if "embed" in name else "MLP" if ".mlp." in name else "attention"
        in_file["norms and biases" if tensor.dim() == 1 else kind] += tensor.numel()
    assert counts == in_file


@pytest.mark.parametrize(
    ("family", "bias"), [("Qwen2ForCausalLM", False), ("LlamaForCausalLM", True)]
)
def test_parameters_are_those_of_the_model(family: str, bias: bool) -> None:
    torch = pytest.importorskip("torch")
    from minivllm.kernels import Kernels
    from minivllm.models.qwen3 import Qwen3ForCausalLM

    config = config_from_hf(
        {
            "architectures": [family],
            "vocab_size": 50,
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8,
            "attention_bias": bias,
            "mlp_bias": bias,
        }
    )
    model = Qwen3ForCausalLM(config, Kernels.reference(), 8, torch.device("cpu"))
    assert sum(count_parameters(config).values()) == sum(p.numel() for p in model.parameters())


def test_flops_are_two_a_weight_and_grow_with_the_context() -> None:
    config = shape_config("qwen3-0.6b")
    counts, flops = count_parameters(config), count_flops(config, 0)
    assert sum(flops.values()) == 2 * (counts["attention"] + counts["MLP"] + counts["embedding"])
    assert count_flops(config, 1000)["q·k and weights·v"] == 1000 * 28 * 16 * 4 * 128


def test_bars_say_shares(bundled: ModelConfig) -> None:
    figure = draw_parameters({"bundled": bundled, "Qwen3-8B": shape_config("qwen3-8b")})
    assert "bundled: 5.25 M parameters, embedding 10%, attention 22%, MLP 67%." in figure.alt
    assert "head 8%" in figure.alt
    figure = draw_flops(shape_config("qwen3-0.6b"), [1, 40_000])
    assert "1 token: 1.19 GFLOP" in figure.alt
    assert "40,000 tokens: " in figure.alt


@pytest.mark.slow
def test_pictures_are_small_and_say_what_they_are(bundled: ModelConfig) -> None:
    lens = {f"block {i}": [(f"word {j}", j / 12) for j in range(10)] for i in range(7)}
    figures = [
        draw_rotation(hands()),
        draw_pairings(8, {"halves": HALVES, "interleaved": NEIGHBOURS}),
        draw_block(bundled),
        draw_stream([0.1, 2.0, 18.0], LABELS, [0.1, 1.0, 1.0]),
        draw_lens([f"word {j}" for j in range(10)], lens),
        draw_parameters({"bundled": bundled}),
        draw_flops(bundled, [1, 2048]),
    ]
    for figure in figures:
        assert len(figure.to_png()) < MAX_PNG_BYTES
        assert len(figure.alt) > 30
        assert len(figure.caption) > 30


@pytest.mark.slow
def test_importing_it_needs_no_torch() -> None:
    code = "import sys, minivllm.viz.model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
