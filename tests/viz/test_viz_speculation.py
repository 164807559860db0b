"""The pictures of speculative decoding show what they were given."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.patches import Rectangle

from minivllm.engine.trace import StepRecord, Trace, TracedSequence
from minivllm.viz.speculation import (
    draw_check,
    draw_overlap,
    draw_proposals,
    draw_shared_number,
    draw_written,
    proposals_of,
)
from support.pictures import check_small_and_described

WORDS = ["a", " fox", " owl", ".\n"]
MODELS = {"model": [0.5, 0.3, 0.15, 0.05], "draft": [0.2, 0.5, 0.2, 0.1]}


def step(number: int, proposed: list[int], right: int, request: str = "0") -> StepRecord:
    """A step that verifies proposals for one request."""
    item = TracedSequence(request, 0, "decode", 5, 1 + len(proposed), True)
    item.proposed_token_ids = proposed
    return StepRecord(
        number,
        0.0,
        0.1,
        [item],
        {},
        {},
        [],
        [],
        [],
        0,
        [],
        [],
        num_accepted={f"{request}/0": right},
    )


def trace_of(*steps: StepRecord) -> Trace:
    return Trace("tiny", 8, 16, 4, 64, 1024, 128, list(steps))


TRACE = trace_of(step(0, [], 0), step(1, [7, 8, 9], 2), step(2, [7], 0), step(3, [1], 1, "1"))
PICTURES = {
    "check": lambda: draw_check(WORDS[:1], WORDS[1:3], [WORDS[1], WORDS[3], WORDS[0]]),
    "written": lambda: draw_written([[" fox", " owl"], ["."], ["a" * 60], ["b" * 60]], "A text"),
    "shared": lambda: draw_shared_number(MODELS, 0.6, WORDS),
    "overlap": lambda: draw_overlap(WORDS, *MODELS.values()),
    "proposals": lambda: draw_proposals(TRACE),
}


def fills(ax) -> dict[tuple[float, float], str]:
    """(x, y) of the corner of each rectangle -> its colour."""
    return {
        (round(p.get_x(), 2), round(p.get_y(), 2)): p.get_facecolor()
        for p in ax.patches
        if isinstance(p, Rectangle)
    }


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small_and_bring_words(name: str) -> None:
    check_small_and_described(PICTURES[name]())


@pytest.mark.parametrize(
    ("proposed", "sampled", "right"),
    [
        ("xyz", "xyzw", 3),
        ("xyz", "xwzw", 1),
        ("xyz", "wyzw", 0),
        ("", "w", 0),
    ],
)
def test_a_check_ends_at_the_first_wrong_guess(proposed: str, sampled: str, right: int) -> None:
    figure = draw_check(["known"], list(proposed), list(sampled))
    [ax] = figure.axes
    texts = [text.get_text() for text in ax.texts]
    assert texts.count("=") == right
    assert texts.count("≠") == (right < len(proposed))
    assert len(ax.lines) == len(proposed) - right, "the others are struck out"
    kept = [text.get_text() for text in ax.texts if text.get_position()[1] == pytest.approx(3.07)]
    assert kept == ["known", *sampled[: right + 1]]
    assert f"{right} of {len(proposed)} guesses are right" in figure.caption


def test_a_check_samples_one_more_than_was_guessed() -> None:
    with pytest.raises(ValueError, match="2 guesses need"):
        draw_check([], ["a", "b"], ["a", "b"])


def test_a_text_is_drawn_step_by_step() -> None:
    figure = draw_written([[" fox", "es", " owl"], [".\n"]], "A text")
    [ax] = figure.axes
    assert [text.get_text() for text in ax.texts] == [" fox", "es", " owl", ".↵"]
    colors = list(fills(ax).values())
    assert colors[0] == colors[1] != colors[2] == colors[3], "the last of a step is the model's"
    assert figure.alt.startswith("Picture: a text of 4 tokens that 2 steps wrote; 2 tokens were")
    lines = draw_written([["a" * 60], ["b" * 60]], "Two lines")
    assert {y for _, y in fills(lines.axes[0])} == {0.1, 1.1}
    with pytest.raises(ValueError, match="without a token"):
        draw_written([["a"], []], "Nothing")


@pytest.mark.parametrize(
    ("u", "drawn", "same"), [(0.1, ("a", "a"), True), (0.6, ("␣fox", "␣fox"), True),
                             (0.4, ("a", "␣fox"), False), (0.99, (".↵", ".↵"), True)]
)  # fmt: skip
def test_one_number_falls_on_all_rulers(u: float, drawn: tuple[str, str], same: bool) -> None:
    figure = draw_shared_number(MODELS, u, WORDS)
    [ax] = figure.axes
    assert {line.get_xdata()[0] for line in ax.lines} == {u}
    assert f"model draws {drawn[0]!r}; draft draws {drawn[1]!r}" in figure.alt
    assert figure.caption.endswith("not the same token." if not same else ": the same token.")
    widths = {round(p.get_width(), 2) for p in ax.patches if p.get_y() == pytest.approx(1.2)}
    assert widths == {1, 0.2, 0.5, 0.1}, "the draft's parts, on a whole ruler"
    with pytest.raises(ValueError, match="4 words"):
        draw_shared_number({"model": [1.0]}, 0.5, WORDS)


def test_bars_are_what_both_have_and_what_one_has() -> None:
    figure = draw_overlap(WORDS, *MODELS.values())
    bars = [(p.get_y(), p.get_height()) for p in figure.axes[0].patches]
    assert bars == [
        (0, 0.2), (0.2, pytest.approx(0.3)),
        (0, 0.3), (0.3, pytest.approx(0.2)),
        (0, 0.15), (0.15, pytest.approx(0.05)),
        (0, 0.05), (0.05, pytest.approx(0.05)),
    ]  # fmt: skip
    hatched = [bool(p.get_hatch()) for p in figure.axes[0].patches]
    assert hatched == [False, False, False, True, False, True, False, True]
    assert "share 0.70" in figure.caption
    with pytest.raises(ValueError, match="4 labels"):
        draw_overlap(WORDS, [1.0], [1.0])


def test_proposals_are_those_of_one_request() -> None:
    assert proposals_of(TRACE) == [(0, 0), (3, 2), (1, 0)]
    assert proposals_of(TRACE, "1/0") == [(1, 1)]
    figure = draw_proposals(TRACE)
    bars = [
        (p.get_x() + p.get_width() / 2, p.get_y(), p.get_height()) for p in figure.axes[0].patches
    ]
    assert bars == [(pytest.approx(1), 0, 2), (pytest.approx(1), 2, 1), (pytest.approx(2), 0, 1)]
    assert figure.caption == "2 of 4 proposals were right; 1 of 3 steps had none."
    with pytest.raises(ValueError, match="no proposals for 2/0"):
        draw_proposals(TRACE, "2/0")
