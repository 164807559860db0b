"""The pictures of chapter 09 show what ranks do: cuts, heads, a ring that really adds up, shares;
and stay small.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

from matplotlib.patches import Rectangle

from minivllm.bench.shapes import shape_config
from minivllm.viz import palette, scrub
from minivllm.viz.parallel import (
    PARTS,
    WRONG,
    CollectiveSweep,
    Heads,
    Ring,
    draw_collectives,
    draw_heads,
    draw_parallel_block,
    draw_ring,
    draw_shares,
    draw_splits,
)

MAX_PNG_BYTES = 60_000
TIMES = {
    "one": {"1 GPU": {"weights": 3.0}, "2 GPUs": {"weights": 1.5, "collectives": 0.75}},
    "many": {"1 GPU": {"weights": 4.0}, "2 GPUs": {"weights": 2.0, "collectives": 0.75}},
}


def heads(size: int, num_heads: int = 32, num_kv_heads: int = 8) -> Heads:
    queries = [range(r * num_heads // size, (r + 1) * num_heads // size) for r in range(size)]
    group = num_heads // num_kv_heads
    return [(q, range(q.start // group, (q.stop - 1) // group + 1)) for q in queries]


def texts(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


# --- cuts and blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_has_a_part_in_both_cuts(size: int) -> None:
    found = texts(draw_splits(size))
    assert [found.count(f"rank {rank}") for rank in range(size)] == [4 if size < 4 else 3] * size
    assert sum(text.startswith("a term") for text in found) == size
    for wrong in (1, 5):
        with pytest.raises(ValueError, match="2 to 4"):
            draw_splits(wrong)


def test_the_block_has_a_lane_for_each_rank_and_two_all_reduces() -> None:
    figure = draw_parallel_block(shape_config("qwen3-8b"), 4)
    found = texts(figure)
    assert found.count("all-reduce") == 2
    assert found.count("8 + 2 + 2 heads") == found.count("2 × 3072") == 4
    assert "8 of 32 query heads and 3,072 of 12,288 MLP columns each" in figure.alt
    for size in (3, 8):
        with pytest.raises(ValueError, match="up to 4, that divide 32"):
            draw_parallel_block(shape_config("qwen3-8b"), size)


# --- heads ----------------------------------------------------------------------------------------


def test_heads_say_what_a_rank_has() -> None:
    figure = draw_heads(32, 8, {f"{size} ranks": heads(size) for size in (2, 16)})
    assert figure.alt.endswith(
        "2 ranks: rank 0 has 16 query heads and 4 KV heads. "
        "16 ranks: rank 0 has 2 query heads and 1 KV head, and each KV head is on 2 ranks."
    )
    assert figure.caption == "16 ranks: every KV head is on several ranks."
    assert "every head is on one rank" in draw_heads(32, 8, {"2 ranks": heads(2)}).caption
    assert not [patch for patch in figure.axes[0].patches if patch.get_linewidth() == 2], (
        "nothing is framed"
    )


def test_heads_that_nobody_has_or_two_ranks_compute_are_framed() -> None:
    figure = draw_heads(4, 2, {"wrong": [((0, 1), (0,)), ((1, 2), (0,))]})
    assert (
        "nobody has 1 query head; 1 query head computed twice; nobody has 1 KV head" in figure.alt
    )
    assert figure.caption == "wrong: 1 query head on no rank."
    twice = draw_heads(2, 2, {"wrong": [((0, 1), (0, 1)), ((1,), ())]})
    assert twice.caption == "wrong: 1 query head computed twice."
    lost = draw_heads(2, 2, {"wrong": [((0, 1), (0,))]})
    assert lost.caption == "wrong: 1 KV head on no rank."
    framed = [patch for patch in figure.axes[0].patches if patch.get_linewidth() == 2]
    assert len(framed) == 3
    assert {tuple(patch.get_edgecolor()) for patch in framed} == {(*palette.rgb(WRONG), 1.0)}


# --- the ring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_ring_adds_up_what_it_sends(size: int) -> None:
    """Played with numbers: what `sends` names is moved, and in the end every rank has every sum."""
    ring = Ring(size)
    held = [[10.0**rank + part for part in range(size)] for rank in range(size)]
    for step in ring.steps[1:]:
        before = [list(row) for row in held]
        assert len({part for _, part in ring.sends(step)}) == size, "each rank sends another part"
        for rank, part in ring.sends(step):
            right = (rank + 1) % size
            held[right][part] = before[rank][part] + (before[right][part] if step < size else 0.0)
    total = sum(10.0**rank for rank in range(size))
    assert held == [[total + size * part for part in range(size)]] * size
    last = ring.state(ring.steps[-1])
    assert all(terms == frozenset(range(size)) for row in last for terms in row)


def test_the_ring_draws_its_steps() -> None:
    ring = Ring(4)
    first, third, last = (draw_ring(ring, step) for step in (0, 3, 6))
    assert "0 of 16 parts hold the terms of all 4 ranks" in first.alt
    assert "4 of 16" in third.alt
    assert "Just sent: part 2 by rank 0" in third.alt
    assert "16 of 16" in last.alt
    assert first.caption == "After step 0, no part holds the terms of all ranks."
    assert third.caption == "After step 3, 4 parts hold the terms of all ranks."
    assert last.caption == "After step 6, every part holds the terms of all ranks."
    with pytest.raises(IndexError, match="steps 0 to 6"):
        draw_ring(ring, 7)
    assert scrub(ring, draw_ring, step=2).step == 2
    with pytest.raises(ValueError, match="2 to 8"):
        Ring(1)


# --- the price of a start ---


def test_a_sweep_divides_the_step_by_what_it_becomes() -> None:
    sweep = CollectiveSweep({"small": 0.3}, {"small": 0.1}, {"small": 50})
    assert sweep.speedup("small", 4) == pytest.approx(0.3 / (0.1 + 50 * 0.004))
    assert list(sweep.steps) == list(range(1, 21))
    figure = draw_collectives(sweep, step=3)
    assert figure.caption.startswith("With 4 microseconds per start, ")
    assert "small 1.00" in figure.alt
    assert draw_collectives(sweep, step=19).caption.endswith("one GPU is faster for small.")
    assert "faster for every model" in draw_collectives(sweep, step=0).caption
    slow, fast = (sweep.speedup("small", us) for us in (20, 1))
    curve = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == 20)
    assert list(curve.get_ydata())[::19] == pytest.approx([fast, slow])
    children = scrub(sweep, draw_collectives, step=9).widget().children
    assert [slider.description for slider in children[0].children[1:]] == ["microseconds"]


# --- shares ---------------------------------------------------------------------------------------


def test_columns_stack_their_parts_on_one_scale() -> None:
    figure = draw_shares(TIMES, "milliseconds", "A step", limit=5, limit_name="too slow")
    one, many = figure.axes
    boxes = [(p.get_y(), p.get_height()) for p in one.patches if isinstance(p, Rectangle)]
    assert boxes == [(0, 3.0), (3.0, 0), (0, 1.5), (1.5, 0.75)]
    assert one.get_ylim() == many.get_ylim()
    one, many = draw_shares(TIMES, "milliseconds", "A step", same_scale=False).axes
    assert one.get_ylim() < many.get_ylim()
    assert "one, in milliseconds: 1 GPU: 3, 2 GPUs: 2.25." in figure.alt
    assert figure.caption == "The line is at 5: too slow."
    assert len(PARTS) == len(set(PARTS))
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_shares({}, "GB", "Memory")


@pytest.mark.slow
def test_pictures_are_small_and_say_what_they_are() -> None:
    config = shape_config("qwen3-8b")
    figures = [
        draw_splits(4),
        draw_parallel_block(config, 4),
        draw_heads(32, 8, {f"{size} ranks": heads(size) for size in (2, 4, 8, 16)}),
        draw_ring(Ring(8), 9),
        draw_shares(TIMES, "milliseconds", "A step"),
    ]
    for figure in figures:
        assert len(figure.to_png()) < MAX_PNG_BYTES
        assert len(figure.alt) > 30
        assert len(figure.caption) > 30


@pytest.mark.slow
def test_importing_it_needs_no_torch() -> None:
    code = "import sys, minivllm.viz.parallel; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
