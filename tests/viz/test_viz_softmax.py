"""The pictures of chapter 01 show what softmax does: sums, factors, limits, words; and stay
small.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

from matplotlib.patches import Rectangle

from minivllm.viz import scrub
from minivllm.viz.softmax import (
    EXP_LIMITS,
    draw_exp_range,
    draw_merge,
    draw_online_softmax,
    draw_passes,
    draw_programs,
    online_softmax,
)
from minivllm.viz.widgets import LIVE_DPI

SCORES = [4.9, 5.2, 4.2, 6.2, 5.5, 6.9, 5.3, 4.9, 4.1, 7.6, 7.7, 7.1]
MAX_PNG_BYTES = 60_000


def rows() -> list[list[float]]:
    draws = random.Random(0)
    drawn = [
        [draws.gauss(0, spread) for _ in range(count)]
        for count, spread in ((1, 1), (7, 3), (40, 30))
    ]
    return [SCORES, [2.0] * 5, [1e4, -1e4, 1e4], [-math.inf, -math.inf, 1.0, -math.inf], *drawn]


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_the_replay_keeps_the_claim_of_the_proof(block: int) -> None:
    for row in rows():
        replay = online_softmax(row, block)
        assert [step.start for step in replay.steps] == list(range(0, len(row), block))
        for index, step in enumerate(replay.steps):
            seen = row[: step.end]
            assert step.new_max == max(seen)
            right = sum(math.exp(x - max(seen)) for x in seen if x > -math.inf)
            assert step.new_sum == pytest.approx(right)
            assert step.old_sum * step.rescale + step.added == pytest.approx(step.new_sum)
            assert sum(replay.pieces(index)) == pytest.approx(right)
            assert step.rescale <= 1


def test_jumps_are_those_of_the_maximum() -> None:
    replay = online_softmax(SCORES)
    assert [step.start for step in replay.steps if step.jumped] == [1, 3, 5, 9, 10]
    assert not any(step.jumped for step in online_softmax(sorted(SCORES, reverse=True)).steps)


def test_what_cannot_be_replayed_is_refused() -> None:
    for scores, block, labels in (([], 1, None), ([1.0], 0, None), ([1.0, 2.0], 1, ["one"])):
        with pytest.raises(ValueError, match="nothing to draw"):
            online_softmax(scores, block, labels)
    with pytest.raises(IndexError, match="There is no step 12: the replay has steps 0 to 11"):
        draw_online_softmax(online_softmax(SCORES), 12)
    for cuts in ([0], [12], [5, 5], [8, 3]):
        with pytest.raises(ValueError, match="empty part"):
            draw_merge(SCORES, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 5])
def test_columns_are_made_of_the_pieces(block: int) -> None:
    replay = online_softmax(SCORES, block)
    for step in range(len(replay.steps)):
        _, bottom = draw_online_softmax(replay, step).axes
        heights = [patch.get_height() for patch in bottom.patches if isinstance(patch, Rectangle)]
        expected = [piece for earlier in range(step + 1) for piece in replay.pieces(earlier)]
        assert heights == pytest.approx(expected)


def test_words_and_sentence_say_the_numbers() -> None:
    figure = draw_online_softmax(online_softmax(SCORES, labels=[f"w{i}" for i in range(12)]), 5)
    assert figure.caption == "Step 6: the maximum grows, and the sum so far is scaled down."
    assert figure.alt.endswith(
        "Step 6: 6 of 12 scores seen, maximum 6.9, sum 2.13. The sum was rescaled 3 times: ×"
        " 0.74, × 0.37, × 0.50."
    )
    [sentence] = [text.get_text() for text in figure.texts]
    assert sentence.endswith("exp(6.2 − 6.9) = 0.50. 2.27 × 0.50 + 1.00 = 2.13")
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == [
        f"w{i}" for i in range(12)
    ]
    masked = draw_online_softmax(online_softmax([-math.inf, -math.inf, 1.0], 2), 0)
    assert "sum 0.00" in masked.alt


@pytest.mark.slow
def test_a_replay_does_not_jump_and_stays_small() -> None:
    replay = online_softmax(SCORES)
    figures = [draw_online_softmax(replay, step) for step in range(12)]
    assert len({figure.axes[1].get_ylim() for figure in figures}) == 1
    assert len({figure.axes[0].get_ylim() for figure in figures}) == 1
    assert len({figure.caption for figure in figures}) == 12
    assert max(len(figure.to_png()) for figure in figures) < MAX_PNG_BYTES


@pytest.mark.slow
def test_another_function_s_sums_are_marked() -> None:
    replay = online_softmax(SCORES)
    right = [step.new_sum for step in replay.steps]
    assert draw_online_softmax(replay, found=right).caption.endswith("agree.")
    found = [*right[:2], right[2] + 0.5, *right[3:]]
    figure = draw_online_softmax(replay, found=found)
    assert figure.caption.endswith("differ from step 3 on: 2.61, not 2.11.")
    [crosses] = figure.axes[1].lines
    assert list(crosses.get_ydata()) == pytest.approx(found)
    assert "nan, not 1.00" in draw_online_softmax(replay, found=[math.nan] * 12).caption
    assert draw_online_softmax(replay, found=[1000.0] * 12).axes[1].get_ylim()[1] > 1000


@pytest.mark.slow
def test_the_slider_shows_each_step() -> None:
    pytest.importorskip("ipywidgets")
    replay = online_softmax(SCORES)
    controls, image, caption = scrub(replay, draw_online_softmax, step=5).widget().children
    slider = controls.children[1]
    assert (slider.min, slider.value, slider.max) == (
        1,
        6,
        12,
    ), "a lesson counts from 1, as its captions do"
    slider.value = 10
    assert image.value == draw_online_softmax(replay, 9).to_png(LIVE_DPI, small=False)
    assert draw_online_softmax(replay, 9).caption in caption.value


def test_exp_overflows_where_the_picture_says() -> None:
    figure = draw_exp_range({"small": [-3.0, 88.7], "large": [88.8, 200.0, 1.0]})
    assert "small: largest 88.7, 0 beyond; large: largest 200.0, 2 beyond." in figure.alt
    limit = EXP_LIMITS["float32, bfloat16"]
    assert math.exp(limit - 1e-6) < 3.4028235e38 < math.exp(limit + 1e-6)
    assert len(figure.to_png()) < MAX_PNG_BYTES


def test_merged_parts_make_the_whole() -> None:
    whole = online_softmax(SCORES).steps[-1]
    figure = draw_merge(SCORES, [4, 9])
    assert f"Merged: maximum {whole.new_max:.1f}, sum A 1.78 × 0.22 + " in figure.alt
    assert figure.alt.endswith(f"= {whole.new_sum:.2f}.")
    top, bottom = figure.axes
    assert sum(
        patch.get_height() for patch in bottom.patches if isinstance(patch, Rectangle)
    ) == pytest.approx(whole.new_sum)
    assert (
        sum(patch.get_height() == 1.0 for patch in top.patches if isinstance(patch, Rectangle)) == 3
    )


def test_passes_are_counted() -> None:
    figure = draw_passes(
        {"safe": ["read: max", "read: sum", "read", "write"], "online": ["read", "read", "write"]}
    )
    assert figure.alt.endswith("Times that a row is read or written: safe: 4; online: 3.")
    assert figure.caption == "The fewest passes: online."
    assert [text.get_text() for text in figure.axes[0].texts].count("4 × N") == 1


def test_programs_and_masked_lanes() -> None:
    one, many = draw_programs(10, 4), draw_programs(10, 4, rows=3)
    assert one.caption == "The lanes beyond the end are masked: 2."
    assert many.caption == "The lanes beyond the end of a row are masked: 2 of each row."
    assert "3 programs, one for each row, with 3 tiles each" in many.alt
    for figure, lanes in ((one, 12), (many, 36)):
        assert len(figure.axes[0].patches) == lanes
        assert sum(bool(patch.get_hatch()) for patch in figure.axes[0].patches) == lanes // 6
        assert len(figure.alt) > 30
        assert len(figure.to_png()) < MAX_PNG_BYTES


def test_imports_are_lazy() -> None:
    code = "import sys, minivllm.viz; print({'matplotlib', 'torch'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
