"""The pictures of CPU and GPU at work, of buckets, padding and writes show what they were given."""

from __future__ import annotations

import itertools

import pytest
import torch

from minivllm.course.sim.streams import SimulatedGPU, Span

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.patches import Rectangle, StepPatch

from minivllm.engine.cuda_graphs import graph_sizes
from minivllm.viz import palette, scrub
from minivllm.viz.streams import (
    HARM,
    KINDS,
    draw_buckets,
    draw_padding,
    draw_slots_state,
    draw_streams,
    draw_writes,
    find_writes,
    lane_times,
    padded_rows,
    recorded_size,
    replay_padding,
)
from support.pictures import BLINDNESS, MAX_PNG_BYTES, seen

SEEN = {1: 5, 3: 7, 5: 20, 12: 9, 24: 30, 32: 50}


@pytest.fixture
def runs() -> dict[str, list[Span]]:
    gpu = SimulatedGPU(launch_us=10, replay_us=20)
    for _ in range(6):
        gpu.launch("kernel", 3)
    gpu.synchronize()
    one_by_one = list(gpu.spans)
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        for _ in range(6):
            gpu.launch("kernel", 3)
    gpu.forget_spans()
    gpu.work("plan", 5)
    graph.replay()
    gpu.synchronize()
    return {"One by one": one_by_one, "As a graph": list(gpu.spans)}


def test_times_add_up(runs: dict[str, list[Span]]) -> None:
    first, second = (lane_times(spans) for spans in runs.values())
    assert (first.total, first.gpu, first.waiting, first.launches, first.replays) == (
        63,
        18,
        3,
        6,
        0,
    )
    assert (second.total, second.gpu, second.waiting, second.launches, second.replays) == (
        43,
        18,
        18,
        0,
        1,
    )
    assert second.gpu_share == pytest.approx(18 / 43)
    with pytest.raises(ValueError, match="nothing"):
        lane_times([])


def test_bars_are_the_spans(runs: dict[str, list[Span]]) -> None:
    figure = draw_streams(runs)
    [ax] = figure.axes
    bars = sorted(
        (round(p.get_x(), 6), round(p.get_width(), 6))
        for p in ax.patches
        if isinstance(p, Rectangle)
    )
    spans = [(s.start, round(s.end - s.start, 6)) for all_spans in runs.values() for s in all_spans]
    lanes = [(0, 63), (0, 63), (0, 43), (0, 43)]
    assert bars == sorted(spans + lanes)
    assert {text.get_text() for text in ax.texts} >= {
        "One by one",
        "As a graph",
        "CPU",
        "GPU",
        "kernel",
        "plan",
    } - {"plan"}
    assert "63 microseconds" in figure.alt
    assert "6 launches" in figure.alt
    assert "1 launch of a graph" in figure.alt
    assert figure.caption == "The GPU is busiest in “As a graph”."
    assert "2 runs" in figure.alt


def test_long_runs_are_in_milliseconds() -> None:
    spans = [Span("CPU", "plan", "work", 0, 12_000), Span("GPU", "step", "kernel", 12_000, 30_000)]
    figure = draw_streams({"A run": spans})
    assert "30.0 milliseconds, of which the GPU is busy 60%" in figure.alt
    assert figure.caption == "The GPU is busy 60% of the time."
    assert figure.axes[0].get_xlabel() == "milliseconds"
    assert max(p.get_x() + p.get_width() for p in figure.axes[0].patches) == pytest.approx(30)


def test_nothing_to_draw_is_said(runs: dict[str, list[Span]]) -> None:
    with pytest.raises(ValueError, match="no run"):
        draw_streams({})
    with pytest.raises(ValueError, match="no graph for 40"):
        recorded_size([8, 32], 40)
    with pytest.raises(ValueError, match="no graph"):
        draw_buckets({"Too small": [4]}, SEEN)
    with pytest.raises(IndexError):
        draw_padding(replay_padding([1, 2], [4]), 2)


def test_recorded_sizes() -> None:
    sizes = graph_sizes(32)
    assert [recorded_size(sizes[::-1], n) for n in (1, 2, 3, 8, 9, 17, 32)] == [
        1,
        2,
        4,
        8,
        16,
        24,
        32,
    ]
    assert padded_rows([32], SEEN) == sum(steps * (32 - n) for n, steps in SEEN.items())
    assert padded_rows(range(1, 33), SEEN) == 0


def test_stairs_are_the_rows() -> None:
    figure = draw_buckets({"Powers": [1, 2, 4, 8, 16, 32], "One": [32]}, SEEN)
    assert len(figure.axes) == 2
    for ax, sizes in zip(figure.axes, ([1, 2, 4, 8, 16, 32], [32]), strict=True):
        stairs = [patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch)]
        assert list(stairs[1].values) == list(range(1, 33))
        assert list(stairs[2].values) == [recorded_size(sizes, n) for n in range(1, 33)]
        highest = max(range(1, 33), key=lambda n: SEEN.get(n, 0))
        assert list(stairs[0].values).index(max(stairs[0].values)) == highest - 1
    rows = sum(n * steps for n, steps in SEEN.items())
    assert f"{rows:,} rows of sequences" in figure.alt
    assert f"One: 1 graph, {padded_rows([32], SEEN):,} rows of padding" in figure.alt
    assert figure.caption == "The least padding: “Powers”."


def test_padding_of_each_step() -> None:
    replay = replay_padding([3, 8, 5, 1], [1, 4, 8])
    assert [(s.count, s.size) for s in replay.steps] == [(3, 4), (8, 8), (5, 8), (1, 1)]
    figure = draw_padding(replay, 2)
    boxes = [p for p in figure.axes[1].patches if isinstance(p, Rectangle)]
    assert len(boxes) == 8
    assert sum(bool(box.get_hatch()) for box in boxes) == 3
    assert "Step 2: 5 sequences in the graph of 8, 3 of its rows padding." in figure.alt
    assert "4 rows of padding beside 17" in figure.alt
    assert figure.caption == "Step 2: 3 rows of padding."
    assert scrub(replay, draw_padding, step=1).figure(1).caption == "Step 1: 0 rows of padding."


def test_writes_are_found_and_judged() -> None:
    before = torch.zeros(6, 4)
    before[0] = 1
    after = before.clone()
    after[0, 1], after[2, 3], after[5, 0] = 7, 1, 2
    tables = {"A": [0, 2], "B": [1]}
    writes = find_writes(before, after, tables, [(2, 3), (1, 0)])
    assert [(w.block, w.offset, w.owner, w.allowed) for w in writes] == [
        (0, 1, "A", False),
        (2, 3, "A", True),
        (5, 0, "", False),
    ]
    figure = draw_writes(before, after, tables, [(2, 3)])
    dots = [text for text in figure.axes[0].texts if text.get_text() == "●"]
    crosses = [line for line in figure.axes[0].lines if line.get_color() == HARM]
    assert len(dots) == 1 + 1  # and one that explains it
    assert len(crosses) == 2 * 2
    assert "3 places written, 1 of them" in figure.alt
    assert "Block 0, place 1, of A, was written by somebody else." in figure.alt
    assert "Block 5, place 0, of nobody" in figure.alt
    assert figure.caption == "Block 0, place 1, of A, and 1 other place: written by somebody else."
    assert "A, B, nobody" in figure.alt


def test_what_an_earlier_sequence_left_is_grey() -> None:
    before = torch.ones(2, 4)
    after = before.clone()
    after[1, 0] = 2
    figure = draw_writes(before, after, {"A": [0, 1]}, [(1, 0)], lengths={"A": 5})
    faces = [to_hex(p.get_facecolor()).upper() for p in figure.axes[0].patches if p.get_fill()]
    assert faces.count(palette.CACHED) == 3
    assert any("earlier sequence" in text.get_text() for text in figure.axes[0].texts)


def test_a_slot_shows_where_its_step_writes() -> None:
    figure = draw_slots_state([5, 2], [7, 8], [[3, 4], [6, 0]], 4, running=[0])
    framed = [p for p in figure.axes[0].patches if to_hex(p.get_edgecolor()) == palette.INK.lower()]
    assert len(framed) == 1  # slot 0 at position 5, in its second block
    assert framed[0].get_x() > min(p.get_x() for p in figure.axes[0].patches)
    assert "slots 0 reads" in figure.caption


@pytest.mark.slow
def test_pictures_are_small_and_have_words(runs: dict[str, list[Span]]) -> None:
    for figure in (
        draw_streams(runs),
        draw_buckets({"The engine's": graph_sizes(32)}, SEEN),
        draw_padding(replay_padding([3, 8, 5, 1] * 30, [1, 4, 8]), 7),
        draw_writes(torch.zeros(3, 16), torch.ones(3, 16), {"A": [0, 1]}, []),
        draw_slots_state([96, 87], [1235, 510], [[0, 3, 6], [1, 4, 7]], 16, running=[0, 1]),
    ):
        assert len(figure.to_png()) < MAX_PNG_BYTES
        assert len(figure.alt) > 30
        assert figure.caption.endswith(".")


def test_axes_of_ones_own(runs: dict[str, list[Span]]) -> None:
    figure = MatplotlibFigure()
    axes = figure.subplots(3)
    assert draw_streams(runs, ax=axes[0]) is figure
    assert draw_buckets({"Mine": [8, 32]}, SEEN, ax=axes[1]) is figure
    assert draw_padding(replay_padding([1, 2], [4]), ax=axes[2]) is figure
    assert len(figure.axes) == 3
    with pytest.raises(ValueError, match="one choice"):
        draw_buckets({"Mine": [32], "Other": [16, 32]}, SEEN, ax=axes[1])


@pytest.mark.parametrize("kind", [None, *BLINDNESS])
def test_kinds_in_a_lane_stay_apart(kind: str | None) -> None:
    lanes = (("launch", "replay", "work"), ("kernel", "copy"))  # waiting is hatched
    for names in lanes:
        for one, other in itertools.combinations(names, 2):
            a, b = seen(KINDS[one][0], kind), seen(KINDS[other][0], kind)
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 12, (one, other)
