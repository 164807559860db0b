"""Pictures of attention tiles: what they show is what a mask, and the kernel's own walk, say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure as MatplotlibFigure

from minivllm.viz import scrub
from minivllm.viz.tiles import (
    attention_tiles,
    draw_attention_memory,
    draw_attention_tiles,
    draw_attention_weights,
    draw_tile_replay,
    draw_tile_room,
    replay_tiles,
)
from minivllm.viz.widgets import LIVE_DPI

MAX_PNG_BYTES = 60_000
SHAPES = [(1, 1), (1, 40), (16, 16), (17, 17), (16, 56), (13, 50), (64, 64), (70, 70), (9, 73)]
BLOCKS = [(1, 1), (16, 16), (8, 32), (32, 8), (128, 128)]


def by_mask(query_len: int, context: int, block_m: int, block_n: int) -> list[list[str]]:
    """The kinds of all tiles, from the mask, padded with keys that nobody sees."""
    columns = -(-context // block_n)
    sees = np.arange(columns * block_n) <= np.arange(context - query_len, context)[:, None]
    rows = []
    for top in range(0, query_len, block_m):
        tiles = [sees[top : top + block_m, j * block_n : (j + 1) * block_n] for j in range(columns)]
        rows.append(
            ["full" if tile.all() else "masked" if tile.any() else "skipped" for tile in tiles]
        )
    return rows


@pytest.mark.parametrize(("shape", "blocks"), itertools.product(SHAPES, BLOCKS))
def test_kinds_are_those_of_the_mask(shape: tuple[int, int], blocks: tuple[int, int]) -> None:
    tiles = attention_tiles(*shape, *blocks)
    assert [list(row) for row in tiles.kinds] == by_mask(*shape, *blocks)
    assert tiles.counts.total() == -(-shape[0] // blocks[0]) * -(-shape[1] // blocks[1])


def test_skipping_changes_no_result() -> None:
    """Attention over the tiles that are not skipped, with a mask only where one is called for, is
    attention.
    """
    query, key, value = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0)).double()
    query, block = query[-21:], 8
    scores, weights = query @ key.T, torch.zeros(21, 50).double()
    positions = torch.arange(29, 50)
    for i, row in enumerate(attention_tiles(21, 50, block, block).kinds):
        for j, kind in enumerate(row):
            rows, columns = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            if kind != "skipped":
                hidden = torch.arange(50)[columns] > positions[rows, None]
                weights[rows, columns] = (
                    scores[rows, columns].exp().masked_fill(hidden & (kind == "masked"), 0.0)
                )
    expected = (
        scores.masked_fill(torch.arange(50) > positions[:, None], -torch.inf).softmax(-1) @ value
    )
    torch.testing.assert_close(weights / weights.sum(1, keepdim=True) @ value, expected)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (5, 4, 8, 8), (4, 4, 0, 8), (4, 4, 8, 0)])
def test_impossible_tiles_are_refused(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no tiles of"):
        attention_tiles(*shape)


def areas(figure: MatplotlibFigure) -> list[int]:
    """How many polygons each collection on the score matrix has, the legend's apart."""
    return [len(c.get_paths()) for c in figure.axes[0].collections if isinstance(c, PolyCollection)]


def test_drawn_tiles_are_the_tiles() -> None:
    figure = draw_attention_tiles(70, 70, 16, 16)
    # skipped, full, masked: hidden and seen; the legend's one
    assert sorted(areas(figure)) == sorted([10, 10, 5, 5, 1])
    assert "Of 25 tiles 10 are computed without a mask, 5 with one, 10 (40 %) never." in figure.alt
    assert figure.caption == "40 % of the tiles are never visited."
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "computed, masked (5)" in texts
    assert "70 queries" in texts


def test_a_past_is_shown() -> None:
    figure = draw_attention_tiles(16, 56, 8, 8)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "40 keys from the cache" in texts
    assert "16 new" in texts
    assert "Chunk of 16 after 40 tokens." in figure.alt


def test_a_ragged_batch() -> None:
    figure = draw_attention_tiles([17, 35, 1], [17, 35, 40], 16, 16)
    assert "A: prompt of 17 tokens; B: prompt of 35 tokens; C: chunk of 1 after 39 tokens." in (
        figure.alt
    )
    counts = [attention_tiles(q, c, 16, 16).counts for q, c in ((17, 17), (35, 35), (1, 40))]
    assert f"Of {sum(c.total() for c in counts)} tiles" in figure.alt
    assert "Padded to the longest, the batch would have 27 tiles." in figure.alt
    with pytest.raises(ValueError, match="one sequence only"):
        draw_attention_tiles([4, 4], [4, 4], 4, 4, visited=[])
    with pytest.raises(ValueError, match="zip"):
        draw_attention_tiles([4, 4], [4], 4, 4)


def test_faults_are_marked() -> None:
    visited = [(row, key) for row in (0, 8) for key in range(0, row + 8, 8)] + [(0, 48)]
    figure = draw_attention_tiles(16, 56, 8, 8, visited=visited)
    assert figure.caption.endswith("This function missed 10 tiles and visited 1 for nothing.")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "needed, but missed (10)" in texts
    assert "visited for nothing (1)" in texts
    needed = [
        (8 * i, 8 * j)
        for i, row in enumerate(attention_tiles(16, 56, 8, 8).kinds)
        for j, k in enumerate(row)
        if k != "skipped"
    ]
    good = draw_attention_tiles(16, 56, 8, 8, visited=needed)
    assert good.caption.endswith("This function missed 0 tiles and visited 0 for nothing.")
    assert "missed" not in "".join(text.get_text() for text in good.axes[0].texts)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(8, 45, generator=torch.Generator().manual_seed(1)) * 4


def test_a_replay_is_the_softmax(scores: torch.Tensor) -> None:
    replay = replay_tiles(scores, block_n=16)
    hidden = torch.arange(45) > torch.arange(37, 45)[:, None]
    exact = scores.double().masked_fill(hidden, -torch.inf)
    assert [(step.first, step.last) for step in replay.steps] == [(0, 16), (16, 32), (32, 45)]
    for step in replay.steps:
        seen = exact[:, : step.last]
        assert step.row_max == pytest.approx(seen.amax(1).tolist())
        assert step.row_sum == pytest.approx(
            (seen - seen.amax(1, keepdim=True)).exp().sum(1).tolist()
        )
        assert step.share == pytest.approx(exact.softmax(1)[:, : step.last].sum(1).tolist())
    for before, after in itertools.pairwise(replay.steps):
        grown = [np.exp(old - new) for old, new in zip(before.row_max, after.row_max, strict=True)]
        assert after.rescale == pytest.approx(grown)


def test_a_replay_of_one_tile_and_of_a_first_token() -> None:
    [step] = replay_tiles([[0.5]], block_n=16).steps
    assert (step.row_max, step.row_sum, step.share) == ((0.5,), (1.0,), (1.0,))
    replay = replay_tiles(torch.zeros(3, 3), block_n=2)
    assert replay.steps[0].row_sum == (1.0, 2.0, 2.0)
    assert replay.steps[-1].row_sum == (1.0, 2.0, 3.0)
    for step in range(2):
        assert draw_tile_replay(replay, step).to_png()


@pytest.mark.slow
def test_each_step_draws_small_with_words_and_one_size(scores: torch.Tensor) -> None:
    replay = replay_tiles(scores, block_n=8)
    figures = [draw_tile_replay(replay, step) for step in range(len(replay.steps))]
    assert len({tuple(figure.get_size_inches()) for figure in figures}) == 1
    assert len({figure.caption for figure in figures}) == len(figures)
    assert figures[-1].caption == draw_tile_replay(replay).caption
    assert "100 % of the final sum" in figures[-1].alt
    for figure in figures:
        assert len(figure.to_png()) < MAX_PNG_BYTES
    with pytest.raises(IndexError, match="There is no tile 6: the walk has tiles 0 to 5"):
        draw_tile_replay(replay, 6)


@pytest.mark.slow
def test_a_replay_scrubs(scores: torch.Tensor) -> None:
    pytest.importorskip("ipywidgets")
    replay = replay_tiles(scores, block_n=8)
    controls, image, caption = scrub(replay, draw_tile_replay, step=1).widget().children
    assert image.value == draw_tile_replay(replay, 1).to_png(LIVE_DPI, small=False)
    assert "Tile 2 of 6" in caption.value
    controls.children[1].value = 5
    assert image.value == draw_tile_replay(replay, 4).to_png(LIVE_DPI, small=False)
    assert draw_tile_replay(replay, 4).caption in caption.value


def test_what_tiles_take_is_held_against_what_there_is() -> None:
    figure = draw_tile_room(
        {"small": (96, 112), "wide": (256, 227), "deep": (100, 448), "both": (300, 448)}, 255, 227
    )
    assert figure.alt.endswith(
        " small: fits; wide: too many registers; deep: too much shared memory; both: too many"
        " registers and shared memory."
    )
    assert figure.caption == "1 of these 4 tiles fit."
    hatched = [sum(bool(patch.get_hatch()) for patch in ax.patches) for ax in figure.axes[1:]]
    assert hatched == [2, 2]
    said = [text.get_text() for text in figure.texts]
    assert said.count("too large") == 3
    assert len(figure.to_png()) < MAX_PNG_BYTES


def test_weights_are_explained() -> None:
    weights = (
        torch.eye(5).tril() * 0.75 + torch.ones(5, 5).tril() / torch.arange(1, 6)[:, None] * 0.25
    )
    figure = draw_attention_weights(weights, ["a", " b", "c\n", "$d", "e"], query=3)
    assert "Of 25 weights 10 belong to the future and are zero; of the other 15, 0 %" in figure.alt
    assert figure.caption.startswith("Token 3, ‘d’, looks most at ‘d’ and")
    bars = figure.axes[-1]
    assert [round(bar.get_width(), 4) for bar in bars.patches] == [0.8125, 0.0625, 0.0625, 0.0625]


def test_memory_is_the_bytes() -> None:
    figure = draw_attention_memory([1024, 2048, 4096], 16, 8, 128, 2, memory=300e6, name="card")
    scores, others = figure.axes[0].lines[:2]
    assert list(scores.get_ydata()) == [16 * n * n * 2 for n in (1024, 2048, 4096)]
    assert list(others.get_ydata()) == [n * 48 * 128 * 2 for n in (1024, 2048, 4096)]
    assert figure.caption == "The scores of 4,096 tokens no longer fit into the memory of one card."


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_attention_tiles(4096, 4096, 64, 64),
        lambda: draw_attention_tiles([300, 7, 64, 1], [300, 512, 64, 900], 64, 64),
        lambda: draw_attention_tiles(1, 4096, 64, 64),
        lambda: draw_attention_weights(torch.ones(300, 300).tril() / 300, ["x"] * 300),
        lambda: draw_attention_memory([2**i for i in range(10, 18)], 16, 8, 128, 2, 141e9, "H200"),
    ],
)
def test_pictures_are_small_and_bring_words(draw) -> None:
    figure = draw()
    png = figure.to_png()
    assert len(png) < MAX_PNG_BYTES
    assert figure.alt.encode() in png
    assert len(figure.alt) > 30
    assert len(figure.caption) > 30


def test_drawing_on_given_axes(scores: torch.Tensor) -> None:
    for draw in (
        lambda ax: draw_attention_tiles(20, 20, 8, 8, ax=ax),
        lambda ax: draw_tile_replay(replay_tiles(scores, 8), ax=ax),
    ):
        figure = MatplotlibFigure()
        one, other = figure.subplots(1, 2)
        assert draw(one) is figure
        assert one.patches
        assert not other.patches
