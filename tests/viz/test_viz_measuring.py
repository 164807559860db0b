"""The pictures of measurements show what they were given."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.patches import Rectangle

from minivllm.viz import palette
from minivllm.viz.measuring import (
    Load,
    crossing,
    draw_decode_floor,
    draw_intervals,
    draw_parts,
    draw_ratios,
    draw_samples,
    draw_tradeoff,
)
from support.pictures import check_small_and_described

BATCHES = [1, 2, 4, 8, 16]
PARTS = {"weights": [1e-3] * 5, "K and V": [0.25e-3 * n for n in BATCHES]}
ROWS = {
    "off": {"attention": 3.0, "matrices": 1.0, "CPU": 2.0},
    "on": {"attention": 3.0, "matrices": 1.0, "CPU": 0.0},
}
LOADS = {"measured": [Load(1, 1e-3), Load(8, 2e-3)], "floor": [Load(1, 0.5e-3), Load(8, 1e-3)]}
SAMPLES = {"A": [1.0, 2.0, 9.0], "B": [4.0, 4.0, 5.0]}
RATIOS = {"long": {"theirs": 1.5, "slow": 12.0}, "short": {"theirs": 0.9}}
LANES = {"stream 1": [(-5.0, 10.0), (20.0, 40.0)], "CPU": [(10.0, 20.0), (90.0, 130.0)]}
PICTURES = {
    "floor": lambda **more: draw_decode_floor(BATCHES, PARTS, [(1, 2e-3), (16, 6e-3)], **more),
    "parts": lambda **more: draw_parts(ROWS, pale=["CPU"], **more),
    "tradeoff": lambda **more: draw_tradeoff(LOADS, **more),
    "samples": lambda **more: draw_samples(SAMPLES, **more),
    "ratios": lambda **more: draw_ratios(RATIOS, "mine", **more),
    "intervals": lambda **more: draw_intervals(LANES, 0.0, 100.0, **more),
}


def bars(ax) -> list[tuple[float, float]]:
    return [
        (p.get_x(), p.get_width()) for p in ax.patches if isinstance(p, Rectangle) and p.get_width()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small_and_bring_words(name: str) -> None:
    check_small_and_described(PICTURES[name]())


@pytest.mark.parametrize("name", PICTURES)
def test_they_draw_where_they_are_told(name: str) -> None:
    axes = MatplotlibFigure().add_subplot()
    assert PICTURES[name](ax=axes) is axes.figure
    assert axes.get_title(loc="left")


def test_lines_of_the_floor_are_the_parts_and_their_sum() -> None:
    figure = draw_decode_floor(BATCHES, PARTS, [(1, 2e-3), (16, 6e-3)])
    [ax] = figure.axes
    lines = {
        line.get_linestyle(): [round(float(y), 9) for y in line.get_ydata()]
        for line in ax.lines[:2]
    }
    assert sorted(lines.values()) == sorted([[1.0] * 5, [0.25, 0.5, 1.0, 2.0, 4.0]])
    assert len(lines) == 2, "not known by their colours alone"
    assert [float(y) for y in ax.lines[2].get_ydata()] == pytest.approx([1.25, 1.5, 2.0, 3.0, 5.0])
    assert [float(y) for y in ax.lines[3].get_ydata()] == pytest.approx([2.0, 6.0])
    assert figure.caption.endswith(" cost more than weights from about 4 sequences on.")
    assert "Measured: 2.00 with 1, 6.00 with 16" in figure.alt
    with pytest.raises(ValueError, match="no part"):
        draw_decode_floor(BATCHES, {})


def test_where_lines_cross() -> None:
    assert crossing([1, 2, 3], [2, 2, 2], [1, 1.5, 2.5]) == pytest.approx(2.5)
    assert crossing([1, 2, 3], [2, 2, 2], [1, 1, 1]) is None
    assert crossing([1, 2, 3], [2, 2, 2], [3, 3, 3]) is None, "it lies above from the beginning"


def test_bars_are_the_parts() -> None:
    figure = draw_parts(ROWS, pale=["CPU"])
    [ax] = figure.axes
    assert bars(ax) == [(0.0, 3.0), (3.0, 1.0), (4.0, 2.0), (0.0, 3.0), (3.0, 1.0)]
    assert "off: 6.00 milliseconds, most of it attention 50%, CPU 33%, matrices 17%" in figure.alt
    assert "on: 4.00 milliseconds, most of it attention 75%, matrices 25%." in figure.alt
    assert figure.caption == "The largest part of each bar: attention."
    colors = [patch.get_facecolor() for patch in ax.patches]
    assert colors[0] == colors[3] != colors[1]
    assert tuple(round(c, 3) for c in colors[2][:3]) == tuple(
        round(c, 3) for c in palette.rgb(palette.FREE)
    )
    shares = draw_parts({"x": {"a": 60.0, "b": 40.0}}, unit="percent of a step")
    assert shares.alt.endswith(" x: a 60%, b 40%.")
    assert not shares.axes[0].texts, "every bar is 100 long"
    with pytest.raises(ValueError, match="no bar"):
        draw_parts({})
    with pytest.raises(ValueError, match="negative: a"):
        draw_parts({"x": {"a": -1.0}})


def test_more_parts_than_colours_are_hatched() -> None:
    parts = {f"part {i}": 1.0 for i in range(len(palette.REQUESTS) + 2)}
    [ax] = draw_parts({"all": parts}).axes
    assert [bool(patch.get_hatch()) for patch in ax.patches] == [False] * len(palette.REQUESTS) + [
        True
    ] * 2


def test_points_of_the_tradeoff() -> None:
    assert Load(8, 2e-3).tokens_per_second == 4000
    figure = draw_tradeoff(LOADS)
    [ax] = figure.axes
    first = ax.lines[0]
    assert list(map(float, first.get_xdata())) == pytest.approx([1.0, 2.0])
    assert list(map(float, first.get_ydata())) == pytest.approx([1000.0, 4000.0])
    assert (
        "1 to 8 sequences make 4 times as many tokens a second, and each waits 2.0 times as long"
        in figure.alt
    )
    with pytest.raises(ValueError, match="without points"):
        draw_tradeoff({"empty": []})


def test_marks_are_the_ratios() -> None:
    [ax] = draw_ratios(RATIOS, "mine").axes
    marks = {line.get_marker(): line for line in ax.lines if line.get_marker() != "None"}
    assert [list(map(float, line.get_xdata())) for line in marks.values()] == [[1.5, 0.9], [12.0]]
    assert [list(line.get_ydata()) for line in marks.values()] == [[0, 1], [0]]
    assert draw_ratios({"x": {"other": 2.0}}, "mine").alt.endswith("x: other 2.00.")
    for wrong in ({}, {"x": {"other": 0.0}}):
        with pytest.raises(ValueError, match="above 0"):
            draw_ratios(wrong, "mine")


def test_of_bars_with_other_largest_parts_the_longest_is_named() -> None:
    rows = {"off": {"a": 1.0, "b": 2.0}, "on": {"a": 3.0, "b": 1.0}, "late": {"a": 0.5, "b": 9.0}}
    assert draw_parts(rows).caption == "The largest part of “late”: b."


def test_dots_are_the_repeats() -> None:
    figure = draw_samples(SAMPLES, unit="parsecs")
    [ax] = figure.axes
    dots = [line for line in ax.lines if line.get_marker() not in ("None", "", None)]
    assert [list(map(float, line.get_ydata())) for line in dots] == list(SAMPLES.values())
    assert "A: median 2.00 parsecs, mean 4.00, from 1.00 to 9.00." in figure.alt
    assert len({line.get_marker() for line in dots}) == 2
    with pytest.raises(ValueError, match="nothing"):
        draw_samples({"A": []})


def test_lanes_are_the_intervals_and_the_edges_are_shaded() -> None:
    figure = draw_intervals(LANES, 0.0, 100.0)
    [ax] = figure.axes
    found = bars(ax)
    for start, end in [span for lane in LANES.values() for span in lane]:
        assert (start, end - start) in found
    assert (-5.0, 5.0) in found
    assert (100.0, 30.0) in found
    assert "A step of 100 microseconds. Sums of the lanes' bars: stream 1 35, CPU 50." in figure.alt
    with pytest.raises(ValueError, match="no lane"):
        draw_intervals({}, 0, 1)
