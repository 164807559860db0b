"""The pictures of a fleet show what they were given."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from minivllm.viz import palette
from minivllm.viz.fleet import (
    Answer,
    Turn,
    draw_answers,
    draw_router,
    draw_steps,
    draw_turns,
    draw_work,
)
from support.pictures import check_small_and_described

RUNS = {
    "at random": [[Turn(0, 100, 0), Turn(1, 150, 50), Turn(1, 200, 190)], [Turn(2, 80, 64)]],
    "by prefix": [[Turn(0, 100, 0), Turn(0, 150, 100)], [Turn(2, 80, 0)]],
}
WORK = {"at random": [(100, 300), (100, 100)], "by prefix": [(500, 200), (0, 200)]}
STEPS = {
    "A": [(0.0, 0.01, 512, 0), (0.01, 0.02, 100, 3), (0.02, 0.025, 0, 4), (0.5, 0.6, 0, 1)],
    "B": [(0.0, 0.006, 0, 9)],
}
ANSWERS = [
    Answer(0, 0.0, 0.5, 2.0),
    Answer(0, 1.0, 1.5, 4.0),
    Answer(0, 2.5, 2.6, 3.0),
    Answer(1, 0.0, 0.5, 1.0, failed=True),
    Answer(2, 0.5, None, 3.0, tries=2),
]
PICTURES = {
    "router": draw_router,
    "turns": lambda: draw_turns(RUNS, "Turns"),
    "work": lambda: draw_work(WORK, "Work"),
    "steps": lambda: draw_steps(STEPS, (0.0, 0.1), "Steps"),
    "answers": lambda: draw_answers(ANSWERS, 1.0, "B dies", "A death"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small_and_bring_words(name: str) -> None:
    check_small_and_described(PICTURES[name]())


def test_a_prompt_is_what_was_known_and_what_was_computed() -> None:
    figure = draw_turns(RUNS, "Turns")
    left, right = figure.axes
    widths = [round(patch.get_width() / 0.92, 3) for patch in left.patches]
    assert widths == [1, 0.333, 0.667, 0.95, 0.05, 0.8, 0.2]
    colors = [to_hex(patch.get_facecolor()).upper() for patch in left.patches]
    own = [palette.REQUESTS[i] for i in (0, 1, 1, 2)]
    assert [color for color in colors if color != palette.CACHED] == own
    letters = [text.get_text() for text in left.texts if text.get_text() in "ABC"]
    assert letters == ["A", "B", "B", "C"]
    assert len(right.patches) == 4
    assert (
        figure.caption == "So often a conversation changed its engine: at random: 1; by prefix: 0."
    )
    assert "at random: 4 turns, 1 times another engine than the turn before, 57%" in figure.alt
    with pytest.raises(ValueError, match="no turns"):
        draw_turns({"nothing": []}, "Turns")


def test_bars_are_the_tokens_of_each_engine() -> None:
    figure = draw_work(WORK, "Work")
    bars = [(patch.get_y(), patch.get_height()) for patch in figure.axes[0].patches]
    assert bars == [(0, 300), (300, 100), (0, 100), (100, 100),
                    (0, 200), (200, 500), (0, 200), (200, 0)]  # fmt: skip
    assert figure.caption.endswith("at random 1.50, by prefix 1.00.")
    with pytest.raises(ValueError, match="no engines"):
        draw_work({"nothing": []}, "Work")


def test_steps_are_those_of_the_window() -> None:
    figure = draw_steps(STEPS, (0.005, 0.105), "Steps")
    spans = [
        (round(p.get_x(), 6), round(p.get_width(), 6), p.get_facecolor())
        for p in figure.axes[0].patches
    ]
    assert [span[:2] for span in spans] == [(0, 5), (5, 10), (15, 5), (0, 1)], "cut at the start"
    assert len({color for _, _, color in spans}) == 3
    with pytest.raises(ValueError, match="no steps"):
        draw_steps(STEPS, (7.0, 8.0), "Steps")


def test_answers_stand_at_their_engines_without_an_overlap() -> None:
    figure = draw_answers(ANSWERS, 1.0, "B dies", "A death")
    [ax] = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "engine A",
        "engine B",
        "engine C",
    ]
    waits = [line.get_data() for line in ax.lines if line.get_linewidth() == 1]
    rows = [(float(x[0]), float(y[0])) for x, y in waits]
    assert rows == [(0.0, 0.5), (2.5, 0.5), (1.0, 1.5), (0.0, 3.5), (0.5, 5.5)]
    marks = {line.get_marker(): float(line.get_xdata()[0]) for line in ax.lines}
    assert (marks["X"], marks["^"]) == (1.0, 3.0)
    assert figure.caption.startswith("1 of 5 requests end with an error, 1 were sent again")
    with pytest.raises(ValueError, match="no answers"):
        draw_answers([], 1.0, "", "")
