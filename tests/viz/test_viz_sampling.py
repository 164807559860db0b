"""The pictures of chapter 07 show what an engine does: steps, distributions, rulers, draws, lives;
and stay small.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.patches import Rectangle

from minivllm import LLM, SamplingParams
from minivllm.engine.batch import BatchRow, build_batch
from minivllm.engine.trace import Trace
from minivllm.viz import scrub
from minivllm.viz.figure import Figure
from minivllm.viz.sampling import (
    Draw,
    SampledText,
    draw_distributions,
    draw_flat_batch,
    draw_frequencies,
    draw_life,
    draw_ruler,
    life,
    ruler,
)

MAX_PNG_BYTES = 60_000
WORDS = ("the", " fox", "\n", " owl")
ROWS = [
    BatchRow([5], 9, True),
    BatchRow([1, 2, 3, 4, 5, 6], 8, False),
    BatchRow([7, 8, 9], 0, True),
]
TABLE = np.array([[1, 3, 4, 0], [7, 2, 5, 9], [6, 0, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def trace() -> Trace:
    llm = LLM(device="cpu", trace=True, max_num_seqs=2, max_num_batched_tokens=16)
    chats = [
        llm.render_chat([{"role": "user", "content": f"What is {n} + 7?"}]) for n in (12, 30, 41)
    ]
    llm.generate(chats, SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)
    return llm.trace


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts] + [
        text.get_text() for text in figure.texts
    ]


def widths(figure: Figure) -> list[float]:
    return [
        patch.get_width()
        for ax in figure.axes
        for patch in ax.patches
        if isinstance(patch, Rectangle)
    ]


# --- a step's tokens ------------------------------------------------------------------------------


def test_a_flat_batch_shows_tokens_positions_slots_and_who_is_asked() -> None:
    step = build_batch(ROWS, TABLE, block_size=4)
    figure = draw_flat_batch(step, block_size=4)
    shown = texts(figure)
    for values in (
        step.token_ids,
        step.positions,
        step.attention.slot_mapping,
        step.attention.query_start_loc,
    ):
        assert all(str(value) in shown for value in values.tolist())
    assert shown.count("next?") == 2
    assert "One step: 10 tokens of 3 requests" in shown
    assert "B 6 tokens from position 8" in figure.alt
    assert "A next token is chosen for A and C." in figure.caption


def test_words_take_the_place_of_ids() -> None:
    step = build_batch(ROWS[:1], TABLE[:1], block_size=4)
    assert "␣fox" in texts(draw_flat_batch(step, 4, words=[" fox"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [[BatchRow([1] * 90, 0, False)], [BatchRow([1], i, True) for i in range(40)]]
)
def test_long_steps_are_drawn_without_numbers(rows: list[BatchRow]) -> None:
    table = np.zeros((len(rows), 30), np.int32)
    figure = draw_flat_batch(build_batch(rows, table, 4), 4)
    assert len(figure.to_png()) < MAX_PNG_BYTES
    asked = "nobody" if not rows[0].samples else "A, B"
    assert f"A next token is chosen for {asked}" in figure.caption


# --- distributions --------------------------------------------------------------------------------


def test_what_is_cut_keeps_an_outline() -> None:
    figure = draw_distributions(WORDS, {"all": [0.5, 0.2, 0.2, 0.1], "top_k=2": [0.71, 0.29, 0, 0]})
    assert texts(figure).count("cut") == 2
    assert widths(figure) == pytest.approx([0.5, 0.2, 0.2, 0.1, 0.71, 0.29, 0.2, 0.1])
    assert "top_k=2: 'the' has 0.71, 2 of 4 left" in figure.alt
    assert "cut off" in figure.caption
    assert "cut off" not in draw_distributions(WORDS, {"all": [0.25] * 4}).caption


def test_panels_that_do_not_match_are_refused() -> None:
    for panels in ({}, {"all": [1.0]}):
        with pytest.raises(ValueError, match="4 labels"):
            draw_distributions(WORDS, panels)


# --- the ruler ------------------------------------------------------------------------------------


def test_the_ruler_is_in_order_and_ends_at_one() -> None:
    parts = ruler([2.0, 0.0, 1.0, 1.0])
    assert parts == [(0, 0.5), (0.5, 0.5), (0.5, 0.75), (0.75, 1.0)]
    with pytest.raises(ValueError, match="add up to 0"):
        ruler([0.0, 0.0])


def test_a_draw_shows_where_u_fell() -> None:
    replay = SampledText((Draw((0.5, 0.2, 0.2, 0.1), 0.75, 2, "Once upon a time"),), WORDS)
    figure = draw_ruler(replay)
    assert "u = 0.750  →  '↵'" in texts(figure)
    assert "from 0.700 to 0.900" in figure.alt
    assert figure.caption == "Step 0: the random number falls into the part of '↵'."
    assert "Once upon a time ▁" in texts(figure)
    with pytest.raises(IndexError, match="no step 1 among 1"):
        draw_ruler(replay, step=1)


def test_few_names_leave_the_rest_grey() -> None:
    probabilities = tuple([0.01] * 60 + [0.4])
    replay = SampledText((Draw(probabilities, 0.9, 60),), tuple(f"w{i}" for i in range(61)))
    figure = draw_ruler(replay, names=7)
    assert "1 token with a name, 0.40 of the line." in figure.alt, "the others have no room"
    assert "tokens in order of their ids; grey: all others" in texts(figure)


def test_a_ruler_without_grey_tells_of_none_and_the_first_step_says_so() -> None:
    replay = SampledText((Draw((0.5, 0.2, 0.2, 0.1), 0.75, 2),), WORDS)
    figure = draw_ruler(replay)
    assert "4 tokens with a name, 1.00 of the line." in figure.alt
    assert "tokens in order of their ids" in texts(figure)
    assert "The first token of the answer" in texts(figure)


def test_a_sampled_text_can_be_scrubbed() -> None:
    steps = tuple(Draw((0.6, 0.4, 0.0, 0.0), u, int(u > 0.6)) for u in (0.1, 0.8))
    scrubber = scrub(SampledText(steps, WORDS), draw_ruler, step=1)
    assert scrubber.figure(0).caption != scrubber.figure(1).caption


# --- draws ----------------------------------------------------------------------------------------


def test_frequencies_say_how_far_they_are_off() -> None:
    figure = draw_frequencies(
        WORDS, [0.5, 0.2, 0.2, 0.1], {"right": [50, 20, 20, 10], "greedy": [100, 0, 0, 0]}
    )
    assert "right: 0 % of the draws fell on another token" in figure.alt
    assert "greedy: 50 % of the draws" in figure.alt
    assert figure.caption == "Farthest from the probabilities: greedy."
    for draws in ({"one": [1, 2]}, {"none": [0, 0, 0, 0]}):
        with pytest.raises(ValueError, match="4 labels"):
            draw_frequencies(WORDS, [0.25] * 4, draws)


# --- the life of a request ------------------------------------------------------------------------


def test_a_life_is_counted_in_steps(trace: Trace) -> None:
    first, last = life(trace, "0/0"), life(trace, "2/0")
    assert (first.num_tokens, last.num_tokens) == (9, 9)
    assert first.first_scheduled == 0
    assert first.states.count("wait") == 0
    assert last.states.count("wait") > 5, "two places for three"
    for one in (first, last):
        assert one.first_scheduled < one.ttft
        assert one.tpot == pytest.approx((one.finished - one.first_token) / 8)
    assert life(trace, "2/0", arrival=3).ttft == last.ttft - 3


def test_the_picture_says_the_same(trace: Trace) -> None:
    one, figure = life(trace, "2/0"), draw_life(trace, "2/0")
    assert f"time to first token: {one.ttft} steps" in texts(figure)
    assert f"The first token is there after {one.ttft} steps" in figure.caption
    assert "asked" in texts(figure)
    assert "in a batch" not in texts(draw_life(trace, "0/0")), "it came into the first step"


def test_a_life_in_milliseconds_has_steps_of_their_own_widths(trace: Trace) -> None:
    one, durations = life(trace, "2/0"), [1.0 + record.num_tokens for record in trace.steps]
    figure = draw_life(trace, "2/0", durations=durations)
    assert widths(figure)[: len(one.states)] == pytest.approx(durations[: len(one.states)])
    ttft = sum(durations[: one.ttft])
    rest = sum(durations[one.ttft : one.finished + 1])
    assert f"time to first token: {ttft:.1f} milliseconds" in texts(figure)
    assert f"{rest:.1f} milliseconds: {rest / 8:.2f} per token" in figure.alt
    later = draw_life(trace, "2/0", arrival=3, durations=durations)
    assert f"time to first token: {ttft - sum(durations[:3]):.1f} milliseconds" in texts(later)


def test_who_is_not_there_has_no_life(trace: Trace) -> None:
    with pytest.raises(KeyError):
        life(trace, "9/0")
    unfinished = Trace(**{**vars(trace), "steps": trace.steps[:3]})
    with pytest.raises(ValueError, match="has not finished"):
        life(unfinished, "0/0")


@pytest.mark.slow
def test_all_pictures_are_small_and_bring_words(trace: Trace) -> None:
    replay = SampledText((Draw((0.5, 0.2, 0.2, 0.1), 0.75, 2),), WORDS)
    figures = [
        draw_flat_batch(build_batch(ROWS, TABLE, block_size=4), 4),
        draw_distributions(WORDS, {"all": [0.25] * 4}),
        draw_ruler(replay),
        draw_frequencies(WORDS, [0.25] * 4, {"n": [1, 1, 1, 1]}),
        draw_life(trace, "1/0"),
    ]
    for figure in figures:
        assert len(figure.to_png()) < MAX_PNG_BYTES
        assert len(figure.alt) > 30
        assert figure.caption.endswith(".")
