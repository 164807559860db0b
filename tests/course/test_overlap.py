"""CPU and GPU in turns or one step ahead: the clock, what is known, and what is for nothing."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from minivllm.course.sim.overlap import END, OverlapStep, StepTimes, run_steps
from minivllm.engine.sequence import PENDING
from minivllm.viz.scheduling import draw_overlap, draw_step_costs, draw_waits

TIMES = StepTimes(plan=1.5, compute=5.0, update=3.0)
ANSWERS = {"A": [41, 42, END], "B": [71, 72, 73, 74, 75]}


def end(steps: list[OverlapStep]) -> float:
    return steps[-1].updated[1]


def test_in_turns_the_times_add_up() -> None:
    steps = run_steps(ANSWERS, TIMES)
    assert end(steps) == pytest.approx(5 * (1.5 + 5.0 + 3.0))
    assert all(step.planned[0] >= before.updated[1] for before, step in pairwise(steps))
    assert not any(PENDING in known for step in steps for known in step.known.values())
    assert not any(step.wasted for step in steps)


def test_one_step_ahead_the_slower_of_the_two_sets_the_pace() -> None:
    for update in (0.5, 3.0, 3.5, 9.0):
        times = StepTimes(plan=1.5, compute=5.0, update=update)
        steps = run_steps({"A": [7] * 30}, times, ahead=True)
        pace = (steps[20].computed[1] - steps[10].computed[1]) / 10
        assert pace == pytest.approx(max(5.0, 1.5 + update))


def test_each_plan_is_made_before_the_last_result_is_there() -> None:
    steps = run_steps(ANSWERS, TIMES, ahead=True)
    for before, step in pairwise(steps):
        assert step.planned[0] < before.updated[0]
        assert step.computed[0] >= max(step.planned[1], before.computed[1])
    for step in steps[1:4]:
        assert step.known["A"][-1] == step.known["B"][-1] == PENDING
        assert step.known["B"][:-1] == ANSWERS["B"][: step.number - 1]


def test_only_a_stop_token_costs_a_useless_step() -> None:
    wasted = [step.wasted for step in run_steps(ANSWERS, TIMES, ahead=True)]
    assert wasted == [[], [], [], ["A"], []]


@pytest.mark.parametrize("seed", range(20))
def test_the_same_tokens_either_way(seed: int) -> None:
    rng = Random(seed)
    answers = {
        name: [rng.randint(1, 99) for _ in range(rng.randint(1, 12))] + [END] * rng.randint(0, 1)
        for name in "ABC"
    }
    for ahead in (False, True):
        steps = run_steps(answers, TIMES, ahead=ahead)
        for name, answer in answers.items():
            useful = sum(name in step.names and name not in step.wasted for step in steps)
            assert useful == len(answer)
    stops = sum(answer[-1] == END for answer in answers.values())
    assert sum(len(step.wasted) for step in steps) == stops


def test_the_picture_says_what_it_shows() -> None:
    runs = {
        "In turns": run_steps(ANSWERS, TIMES),
        "Ahead": run_steps(ANSWERS, TIMES, ahead=True),
    }
    figure = draw_overlap(runs, end_token=END)
    texts = [text.get_text() for text in figure.axes[0].texts]
    # Before steps 1 to 3 both requests miss a token, before step 4 only B.
    assert texts.count("?") == 7
    assert "end" in texts
    assert "In turns: 5 steps in 47.5, the GPU is busy for 25.0" in figure.alt
    assert len(figure.to_png()) < 60_000


def test_charts_of_costs_and_waits() -> None:
    costs = draw_step_costs({"a prompt": [(64, 5.0), (512, 10.4)]}, 4.9)
    assert "a prompt: 5.0 at 64 to 10.4 at 512" in costs.alt
    waits = {"in order": [(1, 0.1), (2, 0.1)], "shortest first": [(1, 0.2), (2, 0.9)]}
    figure = draw_waits(waits, "others", "The wait")
    assert "shortest first" in figure.caption
    assert len(figure.axes[0].lines) == 2
