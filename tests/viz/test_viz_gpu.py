"""The parts of a GPU, and the bars of what kernels reach on it."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure as MatplotlibFigure

from minivllm.viz.gpu import H200, draw_gpu, draw_variants

MAX_PNG_BYTES = 60_000
SPEEDS = {"small": {"ours": 168.0, "theirs": 129.0}, "chunk": {"ours": 434.9}}


def test_the_sums_are_those_of_the_parts() -> None:
    assert H200.registers == 132 * 65_536 * 4
    assert H200.shared == 132 * 228 * 1024
    assert H200.shared_per_program < H200.shared_per_multiprocessor


def test_a_gpu_has_a_square_for_each_multiprocessor() -> None:
    figure = draw_gpu()
    assert len(figure.to_png()) < MAX_PNG_BYTES
    for words in ("132 multiprocessors", "50 MB", "141 GB", "65,536 registers", "228 KiB"):
        assert words in figure.alt
    squares = [p for p in figure.axes[0].patches if p.get_width() == pytest.approx(0.15)]
    assert len(squares) == 132
    assert sum(square.get_linewidth() > 1 for square in squares) == 1, "one is enlarged"


def test_bars_are_the_speeds_and_a_gap_is_a_dash() -> None:
    figure = draw_variants(SPEEDS, "TFLOP/s", limit=680, limit_name="a matrix product")
    assert len(figure.to_png()) < MAX_PNG_BYTES
    [ax] = figure.axes
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == [168.0, 129.0, 434.9]
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["168", "129", "435", "–"]
    assert figure.caption == "The longest bar of “ours”: chunk."
    assert "small: ours 168, theirs 129; chunk: ours 435." in figure.alt
    # An implementation may be missing in the first case.
    later = draw_variants(dict(reversed(SPEEDS.items())), "TFLOP/s").axes[0]
    assert [text.get_text() for text in later.texts] == ["435", "–", "168", "129"]


def test_a_number_never_stands_on_the_line_of_the_limit() -> None:
    figure = draw_variants(
        {"a": {"ours": 98.0}, "b": {"ours": 50.0}, "c": {"ours": 101.0}}, "%", 100
    )
    figure.to_png()
    for text in figure.axes[0].texts:
        place = text.get_window_extent().transformed(figure.axes[0].transData.inverted())
        assert not place.x0 <= 100 <= place.x1, text.get_text()


def test_drawing_on_given_axes() -> None:
    for draw in (lambda ax: draw_gpu(ax=ax), lambda ax: draw_variants(SPEEDS, "TFLOP/s", ax=ax)):
        figure = MatplotlibFigure()
        one, other = figure.subplots(1, 2)
        assert draw(one) is figure
        assert one.patches
        assert not other.patches
