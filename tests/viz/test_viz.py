"""The pictures show what the trace holds: numbers, words, sizes, contrasts. Traces of a real, tiny
engine.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minivllm import LLM, SamplingParams
from minivllm.engine.trace import Trace
from support.checkpoints import write_checkpoint
from support.pictures import BLINDNESS, MAX_PNG_BYTES, seen

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.patches import Rectangle, StepPatch
from PIL import Image

from minivllm.viz import block_tables, draw_block_table, draw_kv_memory, kv_memory, palette, scrub
from minivllm.viz.block_table import busiest_step
from minivllm.viz.figure import Figure
from minivllm.viz.themes import DARK, LIGHT, text_contrasts
from minivllm.viz.widgets import LIVE_DPI, WIDGET_MIMETYPE

PICTURES = [draw_block_table, draw_kv_memory]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("viz") / "model")


def run(model: Path, prompts: list[list[int]], max_tokens: list[int], **options) -> Trace:
    with LLM(
        model, device="cpu", skip_tokenizer_init=True, trace=True, block_size=4, **options
    ) as llm:
        params = [SamplingParams(temperature=0.0, max_tokens=count) for count in max_tokens]
        llm.generate(prompts, params, use_tqdm=False)
        return llm.trace


@pytest.fixture(scope="module")
def shared(model: Path) -> Trace:
    """Four requests that share two full blocks; three slots, so the last one waits."""
    prompts = [[*range(10), 20 + i] for i in range(4)]
    return run(model, prompts, [5, 14, 9, 12], num_kv_blocks=32, max_num_seqs=3, max_model_len=64)


@pytest.fixture(scope="module")
def tight(model: Path) -> Trace:
    """A pool too small for its requests: preemption and eviction, and more requests than rows that
    stay in place.
    """
    prompts = [[i, *range(30, 37)] for i in range(15)]
    trace = run(model, prompts, [10] * 15, num_kv_blocks=9, max_num_seqs=4, max_model_len=32)
    assert any(record.preempted for record in trace.steps)
    return trace


@pytest.fixture(params=["shared", "tight"])
def trace(request: pytest.FixtureRequest) -> Trace:
    return request.getfixturevalue(request.param)


def test_block_tables_are_those_of_the_trace(trace: Trace) -> None:
    for step, record in enumerate(trace.steps):
        tables = block_tables(trace, step)
        drawn = {row.name: [block for block, _ in row.blocks] for row in tables.rows if row.blocks}
        assert drawn == {name: table for name, table in record.block_tables.items() if table}
        for row in tables.rows:
            assert sum(tokens for _, tokens in row.blocks) == record.num_computed_tokens.get(
                row.name, 0
            )
            assert (row.state == "running") == (row.name in record.running)
            assert (row.state == "waiting") == (row.name in record.waiting)
        assert tables.cached == set(record.cached_blocks)
        assert len(tables.cached) + len(tables.free) == record.num_free_blocks
        parts = [*tables.owners, *tables.cached, *tables.free]
        assert sorted(parts) == list(range(trace.num_blocks))


def test_sharing_is_seen(shared: Trace) -> None:
    tables = block_tables(shared, 1)
    assert [row.letter for row in tables.rows] == ["A", "B", "C", "D"]
    assert [row.state for row in tables.rows] == ["running", "running", "running", "waiting"]
    assert tables.shared == {0, 1}
    assert [row.letter for row in tables.owners[0]] == ["A", "B", "C"]
    assert tables.filled[0] == 4
    assert [row.state for row in block_tables(shared, -1).rows].count("finished") >= 2


def test_kv_memory_adds_up(trace: Trace) -> None:
    memory = kv_memory(trace)
    assert memory.capacity == trace.num_blocks * trace.block_size
    for step, record in enumerate(trace.steps):
        parts = (memory.tokens[step], memory.wasted[step], memory.cached[step], memory.free[step])
        assert min(parts) >= 0
        assert sum(parts) == memory.capacity
        assert memory.cached[step] + memory.free[step] == record.num_free_blocks * trace.block_size
        assert memory.unshared[step] == sum(record.num_computed_tokens.values())
        assert memory.reserved[step] == trace.max_model_len * len(record.running)
        # A sequence wastes less than a block.
        assert memory.wasted[step] < trace.block_size * max(1, len(record.running))
    assert max(memory.cached) > 0


def test_kv_memory_counts_a_shared_token_once(shared: Trace) -> None:
    memory = kv_memory(shared, reserve=48)
    # Step 1: the first request has 12 tokens, two have 11; all share 8 of them.
    assert (memory.unshared[1], memory.tokens[1], memory.wasted[1]) == (34, 8 + 4 + 3 + 3, 2)
    assert memory.reserved[1] == 3 * 48


def test_drawn_bars_are_the_numbers(trace: Trace) -> None:
    memory = kv_memory(trace, reserve=16)
    [ax] = draw_kv_memory(trace, reserve=16).axes
    bars = [patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch)]
    heights = [list(top - bottom) for top, _, bottom in bars[:4]]
    assert heights == [memory.tokens, memory.wasted, memory.cached, memory.free]
    assert list(bars[4].values) == pytest.approx(memory.reserved)


def test_drawn_cells_are_the_blocks(shared: Trace) -> None:
    step = 1
    [ax] = draw_block_table(shared, step).axes
    texts = [text.get_text() for text in ax.texts]
    for row in block_tables(shared, step).rows:
        for block, _ in row.blocks:
            assert str(block) in texts
    assert texts.count("ABC") == 2
    assert "waiting" in texts
    assert "11 tokens" in texts


@pytest.mark.slow
@pytest.mark.parametrize("draw", PICTURES)
def test_every_step_draws_small_with_words_and_one_size(draw, trace: Trace) -> None:
    sizes, captions = set(), set()
    for step in range(len(trace.steps)):
        figure = draw(trace, step=step)
        sizes.add(tuple(figure.get_size_inches()))
        captions.add(figure.caption)
        assert f"Step {step}:" in figure.caption
    assert len(sizes) == 1, "a replay must not jump"
    assert len(captions) > len(trace.steps) / 2
    data, metadata = figure.mimebundle()
    assert metadata["image/png"]["alt"] == data["text/plain"] == figure.alt
    assert len(figure.alt) > 30
    png = figure.to_png()
    assert png.startswith(b"\x89PNG")
    assert len(png) < MAX_PNG_BYTES
    assert figure.alt.encode() in png


def test_alt_text_names_the_numbers_and_the_caption_one_thing(shared: Trace) -> None:
    figure = draw_block_table(shared, 1)
    assert "3 requests running, 1 waiting" in figure.alt
    assert "2 blocks (0, 1) are shared by A, B and C." in figure.alt
    assert figure.caption == "Step 1: A, B and C share blocks."
    memory = draw_kv_memory(shared, 1)
    assert "hold 18 tokens in blocks with room for 20 (90 % filled)" in memory.alt
    assert memory.caption.startswith("Step 1: a contiguous reservation would")


def test_default_step_is_the_busiest(shared: Trace) -> None:
    busiest = busiest_step(shared)
    assert shared.steps[busiest].num_free_blocks == min(
        record.num_free_blocks for record in shared.steps
    )
    assert draw_block_table(shared).caption == draw_block_table(shared, busiest).caption
    assert (
        draw_kv_memory(shared, -1).caption == draw_kv_memory(shared, len(shared.steps) - 1).caption
    )


@pytest.mark.parametrize("draw", PICTURES)
def test_drawing_on_given_axes(draw, shared: Trace) -> None:
    figure = MatplotlibFigure()
    one, other = figure.subplots(1, 2)
    assert draw(shared, step=1, ax=one) is figure
    assert one.patches
    assert not other.patches


@pytest.mark.parametrize("draw", PICTURES)
def test_what_is_not_in_the_trace_is_refused(draw, shared: Trace) -> None:
    with pytest.raises(IndexError, match="There is no step 9999"):
        draw(shared, step=9999)
    with pytest.raises(IndexError, match="trace=True"):
        draw(dataclasses.replace(shared, steps=[]))


@pytest.mark.slow
def test_large_pools_and_many_requests_stay_small(shared: Trace) -> None:
    large = dataclasses.replace(shared, num_blocks=100_000)
    for draw in PICTURES:
        assert len(draw(large, step=1).to_png()) < MAX_PNG_BYTES
    texts = [text.get_text() for text in draw_block_table(large, 1).axes[0].texts]
    assert any("never used in this trace" in text for text in texts)


def test_a_reservation_beyond_the_axis_is_said(shared: Trace) -> None:
    [ax] = draw_kv_memory(shared, reserve=4096).axes
    assert ax.get_ylim()[1] < 3 * kv_memory(shared).capacity
    assert "▲ up to 12,288" in [text.get_text() for text in ax.texts]


@pytest.mark.slow
def test_a_saved_trace_draws_the_same(shared: Trace, tmp_path: Path) -> None:
    shared.save(tmp_path / "trace.json")
    loaded = Trace.load(tmp_path / "trace.json")
    assert kv_memory(loaded) == kv_memory(shared)
    assert draw_block_table(loaded, 3).to_png() == draw_block_table(shared, 3).to_png()


# --- in a notebook --------------------------------------------------------------------------------


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    display = pytest.importorskip("IPython.display")
    outputs: list[tuple[dict, dict]] = []
    monkeypatch.setattr(
        display, "display", lambda data, metadata=None, raw=False: outputs.append((data, metadata))
    )
    return outputs


@pytest.mark.slow
def test_a_figure_displays_picture_and_caption(shared: Trace, displayed: list) -> None:
    figure = draw_block_table(shared, 1)
    figure._ipython_display_()
    (picture, metadata), (caption, _) = displayed
    assert set(picture) == {"image/png", "text/plain"}
    assert metadata["image/png"]["alt"] == figure.alt
    assert caption["text/markdown"] == f"*{figure.caption}*"


@pytest.mark.slow
def test_scrubber_moves_and_has_a_static_twin(shared: Trace, displayed: list) -> None:
    pytest.importorskip("ipywidgets")
    scrubber = scrub(shared, step=1)
    controls, image, caption = scrubber.widget().children
    first = image.value
    controls.children[1].value = 5
    live = draw_block_table(shared, 5).to_png(LIVE_DPI, small=False)
    assert image.value == live != first
    assert draw_block_table(shared, 5).caption in caption.value
    assert controls.children[1].max == len(shared.steps) - 1
    scrubber._ipython_display_()
    picture, _ = displayed[0]
    assert "application/vnd.jupyter.widget-view+json" in picture
    assert picture["image/png"] == draw_block_table(shared, 1).mimebundle()[0]["image/png"]
    note, _ = displayed[1]
    assert note["text/markdown"].startswith("*Without a running kernel")
    assert WIDGET_MIMETYPE in note, "with a running kernel, nothing is shown in its place"


def test_without_ipywidgets_the_twin_remains(
    shared: Trace, displayed: list, monkeypatch, caplog
) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    scrub(shared, draw_kv_memory)._ipython_display_()
    assert set(displayed[0][0]) == {"image/png", "text/plain"}
    assert set(displayed[1][0]) == {"text/markdown", "text/plain"}
    assert "pip install ipywidgets" in caplog.text


def test_imports_are_lazy() -> None:
    code = (
        "import sys, minivllm.viz, minivllm.viz.palette as _; print({'matplotlib', 'ipywidgets'} &"
        " set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


@pytest.mark.slow
def test_pictures_need_no_pyplot_and_no_main_thread(shared: Trace) -> None:
    pngs: list[bytes] = []
    thread = threading.Thread(target=lambda: pngs.append(draw_block_table(shared, 2).to_png()))
    thread.start()
    thread.join()
    assert pngs == [draw_block_table(shared, 2).to_png()]


# --- the palette ----------------------------------------------------------------------------------


PAGES = (LIGHT, DARK, "#0D1117")  # the last one is GitHub's dark page


@pytest.mark.parametrize("page", PAGES)
def test_text_and_lines_are_legible_on_light_and_dark_pages(page: str) -> None:
    for color in (palette.INK, palette.SOFT_INK, palette.RESERVED):
        assert palette.contrast(color, page) >= 4
    for color in (*palette.REQUESTS, palette.RESERVED, "#000000", "#FFFFFF", "#882255"):
        assert palette.contrast(palette.mid_tone(color), page) >= 4


def test_a_mid_tone_keeps_what_can_be_read_and_the_hue() -> None:
    assert palette.mid_tone(palette.INK) == palette.INK
    red, green, blue = palette.rgb(palette.mid_tone("#882255"))
    assert red > blue > green


def test_text_is_legible_on_every_fill() -> None:
    for color in (
        *map(palette.request_color, range(24)),
        *(palette.tint(c, 0.3) for c in palette.REQUESTS),
        palette.CACHED,
    ):
        assert palette.opacity(color) == 1
        assert palette.contrast(palette.text_on(color), color) >= 4.2
    for veil in (palette.FREE, palette.tint(palette.USED, 0.2)):
        assert palette.text_on(veil) == palette.INK


def test_texts_take_the_colour_that_can_be_read_where_they_lie() -> None:
    figure = Figure(2.0)
    ax = figure.add_axes((0, 0, 1, 1), facecolor=palette.PAPER)
    ax.set_xlim(0, 4)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines["left"].set_color("#000000")
    ax.add_patch(Rectangle((1, 0), 1, 1, facecolor=palette.request_color(5)))
    ax.add_patch(Rectangle((2, 0), 1, 1, facecolor=palette.tint(palette.USED, 0.1)))
    ax.add_patch(Rectangle((3, 0), 1, 1, fill=False, hatch="/////", edgecolor=palette.INK))
    box = {"facecolor": palette.PAPER, "edgecolor": "none"}
    texts = [ax.text(x + 0.3, 0.5, f"text {x}", color=palette.INK, bbox=box) for x in (0, 3)]
    texts += [ax.text(x + 0.3, 0.5, f"text {x}", color="#000000") for x in (1, 2)]
    image = Image.open(io.BytesIO(figure.to_png())).convert("RGBA")
    bare, hatched, filled, veiled = (to_hex(text.get_color()).upper() for text in texts)
    assert bare == palette.INK
    assert texts[0].get_bbox_patch().get_facecolor()[3] == 0, "no white box on a dark page"
    assert hatched == palette.DARK_TEXT
    assert texts[1].get_bbox_patch().get_facecolor() == (1, 1, 1, 1)
    assert palette.contrast(filled, palette.request_color(5)) > 4.5
    assert palette.contrast(veiled, LIGHT) > 4 < palette.contrast(veiled, DARK)
    assert image.getpixel((20, 20))[3] == 0, "the page shines through"
    frame = to_hex(ax.spines["left"].get_edgecolor())
    assert palette.contrast(frame, LIGHT) > 4 < palette.contrast(frame, DARK)
    fill = image.getpixel((int(image.width * 0.45), 20))
    assert fill == pytest.approx(palette.rgba(palette.REQUESTS[5]), abs=3)
    contrasts = text_contrasts(figure)
    assert min(contrasts[f"text {x}"] for x in range(4)) > 3.5


def test_a_tick_at_the_edge_is_not_cut() -> None:
    figure = Figure(2.0)
    ax = figure.add_axes((0.1, 0.3, 0.9, 0.6))
    ax.set_xlim(0, 1000)
    figure.to_png()
    last = [label for label in ax.get_xticklabels() if label.get_text() == "1000"]
    assert last
    figure.canvas.draw()
    assert all(label.get_window_extent().x1 <= figure.bbox.width for label in last)


@pytest.mark.parametrize("kind", [None, *BLINDNESS])
def test_colours_stay_apart_for_the_colour_blind(kind: str | None) -> None:
    def distance(one: str, other: str) -> float:
        return (
            sum((a - b) ** 2 for a, b in zip(seen(one, kind), seen(other, kind), strict=True))
            ** 0.5
        )

    # Neighbours in order of arrival are those that lie side by side; every colour also carries a
    # letter.
    for one, other in itertools.pairwise(palette.REQUESTS):
        assert distance(one, other) > 20, (one, other)
    for one, other in itertools.combinations(palette.REQUESTS, 2):
        assert distance(one, other) > 15, (one, other)
    for one, other in itertools.combinations(
        (palette.USED, palette.WASTED, palette.CACHED, palette.FREE), 2
    ):
        assert distance(one, other) > 10, (one, other)


def test_more_requests_than_colours_stay_apart() -> None:
    """Lighter and darker forms follow the eight colours; neighbours differ for everybody."""
    colors = [palette.request_color(i) for i in range(24)]
    assert colors[:8] == list(palette.REQUESTS)
    assert len(set(colors)) == 24
    for kind in (None, *BLINDNESS):
        looks = [seen(color, kind) for color in colors]
        for i, j in [(i, i + 1) for i in range(23)] + [(i, i + 8) for i in range(16)]:
            assert math.dist(looks[i], looks[j]) > 10, (kind, colors[i], colors[j])


def test_letters_do_not_end() -> None:
    assert [palette.request_letter(i) for i in (0, 25, 26, 51, 52, 701, 702)] == [
        "A",
        "Z",
        "AA",
        "AZ",
        "BA",
        "ZZ",
        "AAA",
    ]
