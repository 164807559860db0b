"""The pictures of chapter 03 show what they are told, and the traces of a real, tiny engine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from minivllm import LLM, SamplingParams
from minivllm.engine.trace import Trace
from support.checkpoints import write_checkpoint

pytest.importorskip("matplotlib")

from matplotlib.patches import Rectangle

from minivllm.viz import palette
from minivllm.viz.block_table import block_tables
from minivllm.viz.paging import (
    _MAP_COLORS,
    ModelShape,
    Span,
    SplitCase,
    _map_pixels,
    draw_kv_bytes,
    draw_memory_map,
    draw_memory_shares,
    draw_reads,
    draw_slots,
    draw_split_kv,
    memory_shares,
    schedule_programs,
)

MAX_PNG_BYTES = 60_000
MODELS = [
    ModelShape("Qwen3-0.6B", 0.596e9, 28, 16, 8, 128),
    ModelShape("Qwen3-32B", 32.8e9, 64, 64, 8, 128),
]
#: Two requests with a piece each, of which one ends; then one is alone.
STEPS = [
    [Span(0, 0, 8, 3, 5), Span(1, 8, 4, 1, 2)],
    [Span(0, 0, 8, 4, 5), Span(1, 8, 4, 2, 2)],
    [Span(0, 0, 8, 5, 5)],
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Three requests in blocks of 4, of which two run at once."""
    model = write_checkpoint(tmp_path_factory.mktemp("paging") / "model")
    options = {"block_size": 4, "num_kv_blocks": 12, "max_model_len": 32, "max_num_seqs": 2}
    with LLM(
        model,
        device="cpu",
        skip_tokenizer_init=True,
        trace=True,
        enable_prefix_caching=False,
        **options,
    ) as llm:
        params = [SamplingParams(temperature=0.0, max_tokens=count) for count in (7, 3, 5)]
        llm.generate([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]], params, use_tqdm=False)
        return llm.trace


def check(figure) -> None:
    """Words and size."""
    png = figure.to_png()
    assert png.startswith(b"\x89PNG")
    assert len(png) < MAX_PNG_BYTES
    assert len(figure.alt) > 30
    assert figure.caption.endswith(".")


def test_kv_bytes_are_those_of_the_models() -> None:
    assert MODELS[0].kv_bytes() == 114_688
    assert MODELS[1].kv_bytes(4) == 2 * 262_144
    figure = draw_kv_bytes(MODELS)
    check(figure)
    [ax] = figure.axes
    widths = sorted(patch.get_width() for patch in ax.patches)
    assert widths == [112, 224, 256, 2048]
    assert "10,400 tokens are as heavy as the weights of Qwen3-0.6B" in figure.caption


def test_shares_add_up() -> None:
    shares = memory_shares(STEPS, 16)
    assert shares.tokens == pytest.approx((4 + 6 + 5) / 48)
    assert shares.later == pytest.approx((3 + 1 + 0) / 48)
    assert shares.never == pytest.approx((5 + 5 + 3) / 48)
    assert shares.tokens + shares.later + shares.never + shares.outside == pytest.approx(1)
    assert shares.running == pytest.approx(5 / 3)
    # A request's blocks count as one request; what is needed later is nobody's question there.
    paged = memory_shares([[Span(0, 0, 4, 4), Span(0, 8, 4, 1)]], 12)
    assert (paged.tokens, paged.later, paged.never, paged.running) == pytest.approx(
        (5 / 12, 0, 3 / 12, 1)
    )
    with pytest.raises(ValueError, match="no steps"):
        memory_shares([], 16)


def test_drawn_shares_are_the_numbers() -> None:
    shares = {"mine": memory_shares(STEPS, 16)}
    figure = draw_memory_shares(shares, {"mine": 0.25})
    check(figure)
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == pytest.approx([100 * 15 / 48, 100 * 4 / 48, 100 * 13 / 48, 100 * 16 / 48])
    assert "mine: 31.2 % tokens (paper: 25.0 %), 1.7 requests at once" in figure.alt
    assert figure.caption == "The largest share of tokens: mine."


def test_the_map_paints_what_lies_where() -> None:
    pixels = _map_pixels(STEPS, capacity=16, num_steps=4)
    assert pixels.shape == (16, 4, 4)

    def color(name: str) -> list[int]:
        return list(palette.rgba(name))

    token, later, never, outside = (
        color(_MAP_COLORS[field]) for field in ("tokens", "later", "never", "outside")
    )
    assert len({tuple(one) for one in (token, later, never, outside)}) == 4
    for step, spans in enumerate(STEPS):
        drawn = pixels[:, step].tolist()
        held = sum(span.held for span in spans)
        room = sum(span.room for span in spans)
        assert drawn.count(token) == held
        assert drawn.count(later) == sum(max(0, span.needed - span.held) for span in spans)
        assert drawn.count(outside) == 16 - room
        assert drawn.count(never) == 16 - drawn.count(outside) - sum(s.needed for s in spans)
    begin = STEPS[0][0].begin
    assert pixels[begin, 0].tolist() == token, "a piece is filled from its begin"
    assert (pixels[:, 3] == outside).all()  # nobody is left


def test_the_map_thins_out_large_pools() -> None:
    spans = [[Span(i % 5, 100 * i, 100, i % 101) for i in range(150)]] * 3000
    pixels = _map_pixels(spans, 20_000, 3000)
    assert pixels.shape[0] < 1000
    assert pixels.shape[1] < 1000
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) == 3, "tokens, empty ends, nobody's"


def test_the_map_counts_who_has_finished() -> None:
    figure = draw_memory_map({"a": STEPS, "b": STEPS[:1]}, 16, num_steps=3)
    check(figure)
    assert len(figure.axes) == 2
    assert "a: 25 % tokens while requests wait · 1 of 2 finished" in figure.alt
    assert "after 1 steps" in figure.alt
    assert figure.caption == "The most requests finished with b."
    alone = draw_memory_map({"a": STEPS}, 16)
    assert "a: " in alone.alt
    assert alone.caption.endswith("finished with a.")


@pytest.mark.slow
def test_slots_are_those_of_the_trace(trace: Trace) -> None:
    pieces = {"0/0": [f"w{i}" for i in range(12)]}
    for step, record in enumerate(trace.steps):
        figure = draw_slots(trace, step=step, request=0, pieces=pieces)
        check(figure)
        texts = [text.get_text() for text in figure.axes[0].texts]
        row = block_tables(trace, step).rows[0]
        # Each token of the request stands there twice: as it sees it, and where it lies.
        for position in range(row.num_tokens):
            assert texts.count(f"w{position}") == 2, (step, position)
        for index, (block, _) in enumerate(row.blocks):
            assert f"positions {4 * index}–{4 * index + 3}  →  block {block}" in texts
        if row.blocks:
            last = record.num_computed_tokens["0/0"] - 1
            slot = record.block_tables["0/0"][last // 4] * 4 + last % 4
            assert f"position {last}" in figure.alt
            assert figure.alt.endswith(f"= {slot}.")
            assert figure.caption.endswith(f"lies in slot {slot}.")
        arrows = [text for text in figure.axes[0].texts if getattr(text, "arrow_patch", None)]
        assert len(arrows) == bool(row.blocks), "an arrow from the newest token"
        # A thick frame for each token of this step, twice for those of the chosen request.
        thick = sum(
            patch.get_linewidth() > 2
            for patch in figure.axes[0].patches
            if isinstance(patch, Rectangle)
        )
        mine = sum(item.num_new_tokens for item in record.scheduled if item.request_id == "0")
        finished = {name.partition("/")[0] for name in record.finished}
        if not finished:
            assert thick == record.num_tokens + mine


@pytest.mark.slow
def test_slots_of_a_request_without_blocks(trace: Trace) -> None:
    figure = draw_slots(trace, step=0, request=2)
    assert "request C is waiting and holds no block" in figure.caption
    sizes = {tuple(draw_slots(trace, step=i).get_size_inches()) for i in range(len(trace.steps))}
    assert len(sizes) == 1, "a replay must not jump"
    assert draw_slots(trace).axes  # the busiest step
    with pytest.raises(IndexError, match="There is no step 999"):
        draw_slots(trace, step=999)


@pytest.mark.slow
def test_reads_are_sorted_into_right_missed_repeated_and_foreign() -> None:
    table, size = [3, 0, 5], 4
    wanted = [table[p // size] * size + p % size for p in range(10)]
    figure = draw_reads(wanted, wanted, 6, size)
    check(figure)
    assert figure.caption == "Every position was read once."
    got = [*wanted[:6], wanted[0], 23, 22, -1]
    faulty = draw_reads(wanted, got, 6, size)
    assert "Of 10 positions 6 were read" in faulty.alt
    assert faulty.caption.startswith("Not read: 6–9; read more than once: 0;")
    assert "slots of nobody or somebody else: -1, 22–23" in faulty.caption
    assert "in another order" in draw_reads(wanted, wanted[::-1], 6, size).caption


def test_programs_fill_the_machine_and_keep_the_work() -> None:
    whole, split = SplitCase("whole", 1, 8, 32_768), SplitCase("split", 1, 8, 32_768, splits=16)
    for case, busy, end in ((whole, 8, 512), (split, 128, 32)):
        plan = schedule_programs(case, 132)
        assert len({processor for processor, *_ in plan}) == busy
        assert max(stop for _, _, stop, _ in plan) == end
        assert sum(stop - begin for _, begin, stop, _ in plan) == 8 * 512
    # More programs than multiprocessors: a second wave, and none runs two at once.
    plan = sorted(schedule_programs(SplitCase("waves", 17, 8, 640), 132))
    for one, other in itertools.pairwise(plan):
        assert one[0] != other[0] or one[2] <= other[1]
    assert max(stop for _, _, stop, _ in plan) == 20
    # A share that does not divide: the last split has less, and further ones nothing.
    plan = schedule_programs(SplitCase("ragged", 1, 1, 64 * 5, splits=4), 8)
    assert [stop - begin for _, begin, stop, _ in plan] == [2, 2, 1, 0]


@pytest.mark.slow
def test_the_split_picture_says_who_works() -> None:
    figure = draw_split_kv(
        [SplitCase("one", 1, 8, 4096), SplitCase("cut", 1, 8, 4096, splits=16)], 132
    )
    check(figure)
    assert "one: 8 of 132 multiprocessors work; done after 64 tiles." in figure.alt
    assert "cut: 128 of 132 multiprocessors work; done after 4 tiles." in figure.alt
    assert figure.caption == "The longest takes 16 times as long as the shortest."
    idle, blue = palette.rgb(palette.FREE), palette.rgb(palette.USED)
    colors = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    assert len(colors) == 2 * (132 + 1), "squares, and a bar of the time for each case"
    assert colors.count(idle) == (132 - 8) + (132 - 128)
    assert colors.count(blue) == 8 + 128 + 2
    # Two waves of programs: whoever works in one of them only is paler.
    waves = draw_split_kv([SplitCase("waves", 17, 8, 640)])
    pale = [patch.get_facecolor()[:3] for patch in waves.axes[0].patches]
    assert pale.count(blue) == 4 + 1
    assert len(set(pale)) == 2
