"""The pictures of quantization show what they were given."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from minivllm.viz.quantization import (
    draw_amounts,
    draw_bits,
    draw_channels,
    draw_levels,
    draw_rounding,
    draw_sharing,
)
from support.pictures import check_small_and_described

LEVELS = [-1.0, -0.5, 0.0, 0.5, 1.0]
ROUNDING = {"few": ([0.4, -0.2, 0.0], LEVELS), "many": ([0.1, 0.2, 4.0], [0.0, 2.0, 4.0])}
PICTURES = {
    "bits": lambda: draw_bits({"float32": (1, 8, 23), "int8": (1, 0, 7)}),
    "levels": lambda: draw_levels({"int8": [k / 127 for k in range(128)], "two": [0.0, 1.0]}),
    "rounding": lambda: draw_rounding(ROUNDING, "Rounding"),
    "sharing": lambda: draw_sharing((8, 16), {"tensor": (8, 16), "block": (3, 5)}),
    "channels": lambda: draw_channels({"even": [1.0] * 256, "odd": [1.0, 1.0, 9.0]}, "Channels"),
    "amounts": lambda: draw_amounts({"a": 120.0, "b": 0.4}, "Amounts", "bytes", logarithmic=True),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small_and_bring_words(name: str) -> None:
    check_small_and_described(PICTURES[name]())


def boxes(ax) -> list[tuple[float, float, str]]:
    """(x, y, colour) of each rectangle."""
    return [
        (p.get_x(), round(p.get_y()), to_hex(p.get_facecolor()))
        for p in ax.patches
        if isinstance(p, Rectangle)
    ]


def test_every_bit_is_a_box_of_its_field() -> None:
    figure = draw_bits({"wide": (1, 4, 3), "narrow": (1, 0, 2)})
    found = boxes(figure.axes[0])
    assert [(x, y) for x, y, _ in found] == [(x, 0) for x in range(8)] + [(x, 1) for x in range(3)]
    colors = [color for _, y, color in found if not y]
    assert colors == [colors[0], *[colors[1]] * 4, *[colors[5]] * 3]
    assert len(set(colors)) == 3
    assert "narrow: 1 sign, 0 exponent, 2 fraction" in figure.alt
    assert figure.caption == "From 8 bits to the 3 of narrow."
    for formats in ({}, {"none": (0, 0, 0)}):
        with pytest.raises(ValueError, match="with bits"):
            draw_bits(formats)


def test_a_number_is_a_tick_once_and_inside() -> None:
    figure = draw_levels({"even": [-1.0, 0.0, 0.5, 0.5, 1.0], "uneven": [0.05, 0.25, 1.0, 3.0]})
    ticks = [[s[0][0] for s in lines.get_segments()] for lines in figure.axes[0].collections]
    assert ticks == [[0.0, 0.5, 1.0], [0.05, 0.25, 1.0]]
    assert "uneven has 3, 1 of them below 0.1" in figure.alt
    assert figure.caption == (
        "The widest step is at the top of uneven: 0.75 of the largest number."
    )
    with pytest.raises(ValueError, match="from 0 to 1"):
        draw_levels({"beyond": [2.0]})


def test_a_stroke_leads_from_a_value_to_the_nearest_number() -> None:
    figure = draw_rounding(ROUNDING, "Rounding")
    [ax] = figure.axes
    few, many = [(0.4, 0.5), (-0.2, 0.0), (0.0, 0.0)], [(0.1, 0.0), (0.2, 0.0), (4.0, 4.0)]
    ends = [tuple(line.get_xdata()) for line in ax.lines if line.get_ydata()[-1] in (0.52, 1.52)]
    assert ends == [*few, *many]
    assert figure.caption == "With “many”, 2 of 3 values become 0 (crosses)."
    assert "few: 3 values, 5 numbers; values that become 0: 1" in figure.alt
    crosses = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "X"]
    assert crosses == [-0.2, 0.1, 0.2], "a zero that stays one is not lost"
    with pytest.raises(ValueError, match="without values"):
        draw_rounding({"empty": ([], LEVELS)}, "Nothing")


def test_a_colour_is_a_scale_and_ends_with_its_block() -> None:
    figure = draw_sharing((4, 5), {"tensor": (4, 5), "row": (1, 5), "block": (3, 2)})
    tensor, row, block = (boxes(ax) for ax in figure.axes)
    assert len({color for *_, color in tensor}) == 1
    by_place = {(x, y): color for x, y, color in row}
    assert all(by_place[x, y] == by_place[0, y] for x in range(5) for y in range(4))
    assert len({by_place[0, y] for y in range(4)}) == 4
    by_place = {(x, y): color for x, y, color in block}
    assert by_place[0, 0] == by_place[1, 2]
    assert len({by_place[x, y] for x in (1, 2, 4) for y in (2, 3)}) == 6, "2 x 3 blocks"
    assert "tensor 1, row 4, block 6" in figure.alt
    for shape, ways in (((4, 5), {}), ((4, 5), {"none": (0, 1)}), ((0, 5), {"row": (1, 1)})):
        with pytest.raises(ValueError, match="at least 1 x 1"):
            draw_sharing(shape, ways)


def test_channels_are_multiples_of_their_median_on_one_axis() -> None:
    figure = draw_channels({"even": [2.0, 2.0, 2.0], "odd": [1.0, 1.0, 9.0]}, "Channels")
    heights = [[s[1][1] for s in ax.collections[0].get_segments()] for ax in figure.axes]
    assert heights == [[1.0, 1.0, 1.0], [1.0, 1.0, 9.0]]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert figure.caption.startswith("The largest channel of odd is 9 times the median")
    with pytest.raises(ValueError, match="above 0"):
        draw_channels({"zeros": [0.0, 0.0]}, "Nothing")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_amounts_are_bars_with_their_number(logarithmic: bool) -> None:
    figure = draw_amounts({"a": 1234.0, "b": 0.0281}, "Amounts", "bytes", logarithmic=logarithmic)
    [ax] = figure.axes
    assert [p.get_width() for p in ax.patches] == [1234.0, 0.0281]
    assert [text.get_text() for text in ax.texts] == ["1,234", "0.0281"]
    assert (ax.get_xscale() == "log") == logarithmic
    assert ax.get_xlim()[0] == (0.01 if logarithmic else 0)
    assert figure.caption == "The least: b, with 0.0281."
    with pytest.raises(ValueError, match="above 0"):
        draw_amounts({"a": 0.0}, "Amounts", "bytes")


def test_groups_of_amounts_have_the_same_colours() -> None:
    figure = draw_amounts(dict.fromkeys("abcd", 1.0), "Amounts", "bytes", group=2)
    one, other, *rest = (to_hex(p.get_facecolor()) for p in figure.axes[0].patches)
    assert one != other
    assert rest == [one, other]
