"""The pictures of the scheduler show what the trace holds: traces of a real, tiny engine, and of
the simulator.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from minivllm import LLM, SamplingParams
from minivllm.course.sim.simulator import STEPS, Arrival, simulate
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.trace import Trace
from support.checkpoints import write_checkpoint

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.patches import StepPatch

from minivllm.viz import palette, scrub
from minivllm.viz.composition import composition, draw_composition
from minivllm.viz.timeline import (
    AGAIN,
    DECODE,
    PROMPT,
    STYLES,
    draw_places,
    draw_timeline,
    draw_token_gaps,
    places,
    timeline,
    token_gaps,
)
from minivllm.viz.widgets import LIVE_DPI
from support.pictures import BLINDNESS, MAX_PNG_BYTES, seen

STEPWISE = [draw_timeline, draw_composition]


class Forgetful(Scheduler):
    """Loses whoever does not fit for a second time."""

    def schedule_waiting(self, batch, budget):
        super().schedule_waiting(batch, budget)
        if self.waiting and self.waiting[0] is getattr(self, "head", None):
            self.waiting.popleft()
        self.head = self.waiting[0] if self.waiting else None


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A real engine with a small budget and a small pool: chunks, mixed steps, waiting and
    preemption.
    """
    model = write_checkpoint(tmp_path_factory.mktemp("timeline") / "model")
    sizes = {
        "num_kv_blocks": 12,
        "max_num_seqs": 4,
        "max_model_len": 40,
        "max_num_batched_tokens": 16,
    }
    with LLM(
        model, device="cpu", skip_tokenizer_init=True, trace=True, block_size=4, **sizes
    ) as llm:
        prompts = [[i, *range(30, 30 + 5 * i)] for i in range(1, 7)]
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=9), use_tqdm=False)
        assert llm.metrics().num_preemptions
        assert llm.metrics().num_chunks
        return llm.trace


@pytest.fixture(scope="module")
def simulated() -> Trace:
    """Requests that arrive one after the other, in a pool too small for them."""
    work = [Arrival(2 * i, 5 + 7 * (i % 3), 12) for i in range(7)]
    limits = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "num_blocks": 14, "block_size": 4}
    run = simulate(work, cost=STEPS, **limits)
    assert run.stats.num_preemptions
    return run.trace


@pytest.fixture(scope="module")
def forgetful() -> Trace:
    work = [Arrival(i, 10, 6) for i in range(6)]
    run = simulate(
        work, scheduler_cls=Forgetful, cost=STEPS, max_num_batched_tokens=16, max_num_seqs=2
    )
    assert run.lost
    return run.trace


@pytest.fixture(params=["engine", "simulated", "forgetful"])
def trace(request: pytest.FixtureRequest) -> Trace:
    return request.getfixturevalue(request.param)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_timeline_is_the_trace(trace: Trace) -> None:
    rows = timeline(trace)
    for step, record in enumerate(trace.steps):
        items = {f"{item.request_id}/{item.index}": item for item in record.scheduled}
        assert sum(row.num_tokens[step] for row in rows) == record.num_tokens
        for row in rows:
            state, item = row.states[step], items.get(row.name)
            assert (item is not None) == (state in ("prefill", "chunk", "again", "decode"))
            assert (state == "wait") == (row.name in record.waiting)
            assert (state == "idle") == (row.name in record.running and item is None)
            assert (step in row.preempted) == (row.name in record.preempted)
            if item is not None and state != "again":
                assert (state == "chunk") == (not item.samples)
                assert (state == "decode") <= (item.num_new_tokens == 1)


def test_rows_begin_and_end_as_their_requests_do(trace: Trace) -> None:
    for row in timeline(trace):
        kinds = [state for state, _ in itertools.groupby(row.states)]
        assert kinds[-1] in ("finished", "gone") or row.finished == len(trace.steps) - 1
        assert "absent" not in kinds[1:]
        assert (row.finished is None) == (row.gone is not None)
        if row.finished is not None:
            assert row.name in trace.steps[row.finished].finished
            assert set(row.states[row.finished + 1 :]) <= {"finished"}


def test_who_is_lost_is_seen(forgetful: Trace, simulated: Trace) -> None:
    gone = [row for row in timeline(forgetful) if row.gone is not None]
    assert gone
    for row in gone:
        assert row.states[row.gone - 1] == "wait"
        assert set(row.states[row.gone :]) == {"gone"}
    assert all(row.gone is None for row in timeline(simulated))
    assert "Gone without having finished" in draw_timeline(forgetful).caption
    assert "?" in [text.get_text() for text in draw_timeline(forgetful).axes[0].texts]


def test_what_is_computed_again(simulated: Trace) -> None:
    rows, made = timeline(simulated), composition(simulated)
    assert sum(made.again) > 0
    for step in range(len(simulated.steps)):
        assert (made.again[step] > 0) == any(row.states[step] == "again" for row in rows)
    # A sequence computes all its tokens but the last once, and what preemption cost it a second
    # time.
    computed = sum(sum(row.num_tokens) for row in rows)
    assert computed - sum(made.again) == sum(5 + 7 * (i % 3) + 11 for i in range(7))


def test_composition_adds_up_within_the_budget(trace: Trace) -> None:
    made = composition(trace)
    for step, record in enumerate(trace.steps):
        assert made.total(step) == record.num_tokens == made.budget - made.unused[step]
        assert made.unused[step] >= 0
        assert made.decode[step] <= len(record.running) + len(record.finished)
        assert made.waiting[step] == len(record.waiting)


def test_everybody_has_one_place(trace: Trace) -> None:
    seating = places(trace)
    assert len(seating.seats) == trace.max_num_seqs
    for step, record in enumerate(trace.steps):
        seated = [seats[step] for seats in seating.seats if seats[step] is not None]
        assert len(set(seated)) == len(seated) == len(record.running)
    empty = sum(trace.max_num_seqs - len(record.running) for record in trace.steps)
    assert seating.wasted == pytest.approx(empty / (trace.max_num_seqs * len(trace.steps)))


def test_nobody_changes_place_while_running(simulated: Trace) -> None:
    for seats in places(simulated).seats:
        runs = [(who, len(list(steps))) for who, steps in itertools.groupby(seats)]
        times = [sum(who == other for other, _ in runs) for who, _ in runs if who is not None]
        assert max(times) <= 3  # once, and once more after each preemption


def test_gaps_are_those_of_the_requests() -> None:
    work = [Arrival(3 * i, 4 + 9 * (i % 4), 6) for i in range(9)]
    run = simulate(
        work, cost=STEPS, max_num_batched_tokens=8, max_num_seqs=3, num_blocks=12, block_size=4
    )
    found = token_gaps(run.trace)
    assert sorted(found.every) == pytest.approx(sorted(run.gaps))
    assert max(found.gaps) == max(found.every)
    assert len(found.starts) == len(found.times) == len(found.gaps) == len(found.with_prompt)


# --- the pictures ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("draw", STEPWISE)
def test_every_step_draws_small_with_words_and_one_size(draw, trace: Trace) -> None:
    sizes, captions = set(), set()
    steps = range(0, len(trace.steps), 4)
    for step in steps:
        figure = draw(trace, step=step)
        sizes.add(tuple(figure.get_size_inches()))
        captions.add(figure.caption)
        assert f"Step {step}" in figure.caption
        assert len(figure.alt) > 30
    assert len(sizes) == 1, "a replay must not jump"
    assert len(captions) == len(steps)
    assert len(figure.to_png()) < MAX_PNG_BYTES
    assert figure.alt.encode() in figure.to_png()


@pytest.mark.slow
def test_the_caption_says_who_does_what(simulated: Trace) -> None:
    for step, record in list(enumerate(simulated.steps))[::3]:
        figure = draw_timeline(simulated, step)
        assert f"{record.num_tokens:,} token" in figure.alt
        assert ("wait" in figure.caption) == bool(record.waiting)
        assert ("preempted" in figure.caption) == bool(record.preempted)
    whole = draw_timeline(simulated)
    assert f"each of 7 requests does in each of {len(simulated.steps)} steps" in whole.alt
    assert f"{sum(composition(simulated).again):,} tokens were computed a second time" in whole.alt
    assert whole.caption.startswith("Preempted, and computed again: ")


def test_bars_are_the_tokens(simulated: Trace) -> None:
    made = composition(simulated)
    bars = [
        patch.get_data()
        for patch in draw_composition(simulated).axes[0].patches
        if isinstance(patch, StepPatch)
    ]
    heights = [list(top - bottom) for top, _, bottom in bars]
    assert heights == [made.decode, made.prompt, made.again]


def test_what_comes_later_is_faint(simulated: Trace) -> None:
    def colors(step: int | None) -> set[str]:
        from matplotlib.colors import to_hex

        return {
            # A faint bar is a veil of its colour.
            to_hex(patch.get_facecolor(), keep_alpha=True).upper().removesuffix("FF")
            for patch in draw_timeline(simulated, step).axes[0].patches
        }

    first, whole = colors(0), colors(None)
    assert {PROMPT, DECODE, AGAIN} <= whole
    assert DECODE not in first
    assert any(color not in whole for color in first)


def test_labels_stand_beside_their_rows_and_are_cut(simulated: Trace) -> None:
    labels = ["short", "a very long label " * 9, *"abcde"]
    ax = draw_timeline(simulated, labels=labels).axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert "short" in texts
    assert max(map(len, texts)) <= 44
    assert ax.get_position().x0 > draw_timeline(simulated).axes[0].get_position().x0


@pytest.mark.slow
def test_pictures_of_several_traces(engine: Trace, simulated: Trace) -> None:
    traces = {"one": engine, "other": simulated}
    for draw in (draw_places, draw_token_gaps):
        figure = draw(traces)
        assert len(figure.axes) == 2
        assert len({ax.get_xlim() for ax in figure.axes}) == 1, "one scale"
        assert "one: " in figure.alt
        assert "other: " in figure.alt
        assert len(figure.to_png()) < MAX_PNG_BYTES
    share = round(100 * places(engine).wasted)
    assert (
        f"one: {len(engine.steps)} steps with 4 places, {share} % of them empty."
        in draw_places(traces).alt
    )


@pytest.mark.parametrize("draw", STEPWISE)
def test_drawing_on_given_axes(draw, simulated: Trace) -> None:
    figure = MatplotlibFigure()
    one, other = figure.subplots(1, 2)
    assert draw(simulated, step=1, ax=one) is figure
    assert one.patches
    assert not other.patches


@pytest.mark.parametrize("draw", STEPWISE)
def test_what_is_not_in_the_trace_is_refused(draw, simulated: Trace) -> None:
    with pytest.raises(IndexError, match="There is no step 9999"):
        draw(simulated, step=9999)
    with pytest.raises(IndexError, match="trace=True"):
        draw(dataclasses.replace(simulated, steps=[]))
    for draw_several in (draw_places, draw_token_gaps):
        with pytest.raises(IndexError, match="trace=True"):
            draw_several({"none": dataclasses.replace(simulated, steps=[])})


@pytest.mark.slow
def test_many_requests_and_steps_stay_small() -> None:
    work = [Arrival(0.4 * i, 20 + i % 50, 5 + 7 * i % 60) for i in range(120)]
    run = simulate(work, max_num_batched_tokens=64, max_num_seqs=16, num_blocks=512, block_size=16)
    for figure in (
        draw_timeline(run.trace),
        draw_composition(run.trace),
        draw_places({"all": run.trace}),
        draw_token_gaps({"all": run.trace}),
    ):
        assert len(figure.to_png()) < MAX_PNG_BYTES
        assert figure.get_size_inches()[1] < 8.5


@pytest.mark.slow
def test_a_saved_trace_draws_the_same(engine: Trace, tmp_path: Path) -> None:
    engine.save(tmp_path / "trace.json")
    loaded = Trace.load(tmp_path / "trace.json")
    assert timeline(loaded) == timeline(engine)
    assert draw_timeline(loaded, 3).to_png() == draw_timeline(engine, 3).to_png()


@pytest.mark.slow
def test_scrubbing_the_timeline(simulated: Trace) -> None:
    pytest.importorskip("ipywidgets")
    controls, image, caption = scrub(simulated, draw_timeline, step=1).widget().children
    first = image.value
    controls.children[1].value = 5
    assert image.value == draw_timeline(simulated, 5).to_png(LIVE_DPI, small=False) != first
    assert draw_timeline(simulated, 5).caption in caption.value


@pytest.mark.parametrize("kind", [None, *BLINDNESS])
def test_kinds_stay_apart_for_the_colour_blind(kind: str | None) -> None:
    for one, other in itertools.combinations((PROMPT, DECODE, AGAIN, palette.PAPER), 2):
        distance = (
            sum((a - b) ** 2 for a, b in zip(seen(one, kind), seen(other, kind), strict=True))
            ** 0.5
        )
        assert distance > 20, (one, other)


def test_kinds_stay_apart_without_colour() -> None:
    looks = [(height, hatch) for _, height, hatch in STYLES.values()]
    same = [
        (one, other)
        for one, other in itertools.combinations(STYLES, 2)
        if STYLES[one][1:] == STYLES[other][1:]
    ]
    assert same == [("decode", "idle")], "an outline tells these two apart"
    assert len(looks) == 6
