"""The pictures of requests that come from outside show what they were given."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from minivllm.viz.clients import (
    draw_arrivals,
    draw_lines,
    draw_request,
    draw_seen,
    draw_two_loops,
)
from support.pictures import check_small_and_described

TIMES = {"even": [0.5, 1.5, 2.5], "random": [0.1, 0.2, 0.3, 2.9, 7.0]}
CURVES = {"kept": [(64, 2.0), (1024, 0.5)], "answered": [(64, 2.0), (1024, 1234.5)]}
SEEN = {"closed": [(0.0, 1.0), (4.0, 8.0)], "open": [(0.0, 1.0), (1.0, 3.0), (2.0, 2.5)]}
PICTURES = {
    "two loops": draw_two_loops,
    "arrivals": lambda: draw_arrivals(TIMES, 3),
    "lines": lambda: draw_lines(CURVES, "A load", ("rate", "seconds"), note="It bends."),
    "logarithmic": lambda: draw_lines(CURVES, "A load", ("rate", "seconds"), logarithmic=True),
    "seen": lambda: draw_seen(SEEN, "Two loops"),
    "request": lambda: draw_request([0.2, 0.3, 0.45], 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small_and_bring_words(name: str) -> None:
    check_small_and_described(PICTURES[name]())


def test_ticks_are_the_arrivals() -> None:
    figure = draw_arrivals(TIMES, 3)
    rows = [
        [float(segment[0][0]) for segment in lines.get_segments()]
        for lines in figure.axes[0].collections
    ]
    assert rows == [[0.5, 1.5, 2.5], [0.1, 0.2, 0.3, 2.9]], "the one at 7 is beyond the end"
    assert "even 1 to 1 in a second; random 0 to 3 in a second" in figure.alt
    assert figure.caption.startswith("“random”")
    with pytest.raises(ValueError, match="no arrivals"):
        draw_arrivals({"none": []}, 3)


def test_curves_go_through_their_points() -> None:
    figure = draw_lines(CURVES, "A load", ("rate", "seconds"), note="It bends.")
    [ax] = figure.axes
    assert [list(zip(*line.get_data(), strict=True)) for line in ax.lines] == list(CURVES.values())
    assert len({line.get_linestyle() for line in ax.lines}) == 2, "not known by colour alone"
    assert ax.get_xscale() == ax.get_yscale() == "linear"
    assert "kept: 2 at 64, 0.5 at 1,024; answered: 2 at 64, 1,234 at 1,024." in figure.alt
    assert figure.caption == "It bends."
    [other] = draw_lines(CURVES, "A load", ("rate", "seconds"), logarithmic=True).axes
    assert other.get_xscale() == other.get_yscale() == "log"
    assert list(other.get_xticks()) == [64, 1024]
    [other] = draw_lines(CURVES, "A load", ("rate", "seconds"), logarithmic="x").axes
    assert (other.get_xscale(), other.get_yscale()) == ("log", "linear")
    assert list(other.get_xticks()) == [64, 1024]
    with pytest.raises(ValueError, match="without points"):
        draw_lines({"empty": []}, "A load", ("rate", "seconds"))


def test_dots_are_the_requests_on_equal_axes() -> None:
    figure = draw_seen(SEEN, "Two loops")
    dots = [list(zip(*ax.lines[0].get_data(), strict=True)) for ax in figure.axes]
    assert dots == list(SEEN.values())
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    assert "closed: 2 requests, half of them up to 4.5, the slowest 8" in figure.alt
    assert figure.caption.endswith("1 in “closed”, 2 in “open”.")
    with pytest.raises(ValueError, match="no requests"):
        draw_seen({"empty": []}, "Two loops")


def test_spans_of_a_request_are_ttft_and_the_rest() -> None:
    figure = draw_request([0.2, 0.3, 0.45], 4)
    [ax] = figure.axes
    spans = [(round(p.get_x(), 6), round(p.get_width(), 6)) for p in ax.patches]
    assert spans == [(0, 200.0), (200.0, 250.0)]
    assert [text.get_text() for text in ax.texts] == ["TTFT", "3 × TPOT"]
    assert "3 events of one answer of 4 tokens, the first after 200, the last after 450" in (
        figure.alt
    )
    with pytest.raises(ValueError, match="two events"):
        draw_request([0.2], 1)
