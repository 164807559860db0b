"""The prefix cache's pictures show what they were given: trees, stories, bars and lines, with words
and small files.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure as MatplotlibFigure

from minivllm import SamplingParams
from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.sequence import Sequence
from minivllm.viz import palette, scrub
from minivllm.viz.prefix import (
    Bar,
    BlockStory,
    draw_block_story,
    draw_hit_rates,
    draw_prefix_tree,
    draw_reuse,
    prefix_tree,
    short_name,
)

MAX_PNG_BYTES = 60_000
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9, 9], [1, 2, 8, 8], [5, 6, 3, 4]]


def random_prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(rng.randint(1, 6))]


def told_story() -> BlockStory:
    """Two sequences that share two blocks, the end of both, and a third that evicts."""
    manager, story = BlockManager(6, 2), BlockStory()
    seqs = {
        letter: Sequence(i, tokens, SamplingParams())
        for i, (letter, tokens) in enumerate(
            {"A": [1, 2, 3, 4, 5], "B": [1, 2, 3, 4, 6, 7, 8], "C": [9] * 8}.items()
        )
    }
    tables: dict[str, list[int]] = {}

    def tell(text: str) -> None:
        names = {
            block.block_id: block.block_hash
            for block in manager.blocks
            if block.block_hash is not None
        }
        story.tell(
            text, [block.ref_count for block in manager.blocks], manager.free_blocks, names, tables
        )

    def arrive(letter: str) -> None:
        seq = seqs[letter]
        prefix = manager.find_cached_prefix(seq)
        assert manager.allocate(seq, seq.num_tokens, prefix)
        manager.register_computed(seq, 2 * len(prefix), seq.num_tokens)
        tables[letter] = seq.block_table
        tell(f"{letter} arrives.")

    tell("Nobody is here.")
    arrive("A")
    arrive("B")
    for letter in "AB":
        tables.pop(letter)
        manager.free(seqs[letter])
        tell(f"{letter} is done.")
    arrive("C")
    return story


def check_words_and_size(figure: MatplotlibFigure) -> None:
    data, metadata = figure.mimebundle()
    assert metadata["image/png"]["alt"] == data["text/plain"] == figure.alt
    assert len(figure.alt) > 30
    assert figure.caption.endswith(".")
    png = figure.to_png()
    assert png.startswith(b"\x89PNG")
    assert len(png) < MAX_PNG_BYTES


# --- the tree -------------------------------------------------------------------------------------


def test_a_tree_has_each_beginning_once() -> None:
    nodes = prefix_tree(PROMPTS, 2)
    assert [(node.depth, node.tokens, node.owners, node.parent) for node in nodes] == [
        (0, (1, 2), [0, 1, 2], None),
        (1, (3, 4), [0, 1], 0),
        (2, (5, 6), [0], 1),
        (3, (7,), [0], 2),
        (2, (9, 9), [1], 1),
        (1, (8, 8), [2], 0),
        (0, (5, 6), [3], None),  # the tokens of another node, but another beginning
        (1, (3, 4), [3], 6),
    ]
    assert nodes[1].block_hash == hash_block(hash_block(None, [1, 2]), [3, 4])
    assert [node.block_hash is None for node in nodes] == [len(node.tokens) < 2 for node in nodes]


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_holds_every_prompt(seed: int) -> None:
    prompts = random_prompts(seed)
    nodes = prefix_tree(prompts, 3)
    for owner, prompt in enumerate(prompts):
        path = [node for node in nodes if owner in node.owners]
        assert [token for node in path for token in node.tokens] == prompt
        assert [node.depth for node in path] == list(range(len(path)))
        assert all(nodes[node.parent] is before for before, node in pairwise(path))
    names = [node.block_hash for node in nodes if node.block_hash is not None]
    assert len(names) == len(set(names))
    assert all(len(node.owners) == 1 for node in nodes if node.block_hash is None)


@pytest.mark.slow
def test_the_tree_is_drawn() -> None:
    figure = draw_prefix_tree(
        PROMPTS, 2, lambda tokens: f"{'-'.join(map(str, tokens))} $5<|im_end|>\n"
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    for node in prefix_tree(PROMPTS, 2):
        assert any(text.startswith("-".join(map(str, node.tokens)) + " ") for text in texts)
        if node.block_hash is not None:
            assert f"{short_name(node.block_hash)} …" in texts
    assert "1 of 2, no name" in texts
    letters = Counter(text for text in texts if text in "ABCD")
    assert letters == {"A": 4, "B": 3, "C": 2, "D": 2}
    assert (
        "Alone they need 11 blocks, together 8: 2 full blocks are shared, 0 of them by all."
        in figure.alt
    )
    check_words_and_size(figure)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_boxes_of_a_tree_do_not_overlap(seed: int) -> None:
    prompts = random_prompts(seed)
    figure = draw_prefix_tree(prompts, 3)
    nodes = prefix_tree(prompts, 3)
    boxes = [
        p for p in figure.axes[0].patches if type(p).__name__ == "Rectangle" and not p.get_fill()
    ]
    places = [(round(box.get_x(), 3), round(box.get_y(), 3)) for box in boxes]
    assert len(places) == len(nodes)
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[:i]:
            assert x != other_x or abs(y - other_y) >= boxes[i].get_height()
    check_words_and_size(figure)


# --- the story ------------------------------------------------------------------------------------


def test_a_story_keeps_what_it_was_told() -> None:
    story = told_story()
    assert [moment.text for moment in story.steps][:3] == [
        "Nobody is here.",
        "A arrives.",
        "B arrives.",
    ]
    assert story.letters == ["A", "B", "C"]
    shared = story.steps[2]
    assert shared.ref_counts[:2] == (2, 2)
    assert shared.tables["A"][:2] == shared.tables["B"][:2] == (0, 1)
    assert len(story.steps[-2].cached) == 3
    assert story.steps[-2].free[-3:] == (3, 1, 0)  # tails before heads


@pytest.mark.slow
@pytest.mark.parametrize("step", range(6))
def test_every_moment_is_drawn(step: int) -> None:
    story = told_story()
    moment, figure = story.steps[step], draw_block_story(story, step)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert moment.text in texts
    assert f"{step} of 5" in texts
    for name in moment.names.values():
        assert name in texts
    shared = sum(count > 1 for count in moment.ref_counts)
    assert texts.count("AB") == shared
    used = sum(count > 0 for count in moment.ref_counts)
    assert f"{used} blocks used" in figure.alt
    assert figure.caption == f"Event {step}: {moment.text}"
    assert (
        f"{len(moment.cached)} cached, {len(moment.free) - len(moment.cached)} empty." in figure.alt
    )
    assert texts.count("holds nothing") == len(story.letters) - len(moment.tables)
    check_words_and_size(figure)


def test_a_story_can_be_scrubbed_without_jumping() -> None:
    story = told_story()
    sizes = {
        tuple(draw_block_story(story, step).get_size_inches()) for step in range(len(story.steps))
    }
    assert len(sizes) == 1
    scrubber = scrub(story, draw_block_story, step=2)
    assert scrubber.figure(2).caption == draw_block_story(story, 2).caption
    with pytest.raises(IndexError):
        draw_block_story(story, 99)


def test_words_may_stand_for_hashes() -> None:
    story = BlockStory()
    story.tell("Words.", [1, 0], [1], {0: "a1", 1: "longer"}, {"A": [0]})
    assert story.steps[0].names == {0: "a1", 1: "long"}
    assert story.steps[0].cached == [1]
    check_words_and_size(draw_block_story(story))


# --- bars and lines -------------------------------------------------------------------------------


def test_bars_are_the_numbers() -> None:
    bars = [Bar("one", 0, 40), Bar("two", 30, 10), Bar("three", 95, 5)]
    figure = draw_reuse(bars, title="Tokens", names=("known from before", "new"))
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights == [40, 10, 5, 0, 30, 95]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0 %", "75 %", "95 %"]
    assert "two: 30 of 40; three: 95 of 100; in all 125 of 180." in figure.alt
    assert figure.caption == "Known from before: the largest share in “three”."
    check_words_and_size(figure)


def test_an_empty_bar_has_no_share() -> None:
    assert Bar("", 0, 0).share == 0


def test_lines_are_the_numbers() -> None:
    curves = {"LRU": [(10, 0.25), (20, 0.5)], "FIFO": [(10, 0.2), (20, 0.4)]}
    figure = draw_hit_rates(curves, title="Hits", xlabel="blocks", limit=0.75)
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines[:2]] == [[25, 50], [20, 40]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["LRU", "FIFO"]
    assert (
        len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines[:2]})
        == 2
    )
    assert "LRU: from 25 % at 10 to 50 % at 20" in figure.alt
    assert "“LRU” is the best" in figure.caption
    assert "75 %" in figure.caption
    check_words_and_size(figure)


def test_pictures_draw_on_given_axes() -> None:
    figure = MatplotlibFigure(figsize=(9, 4))
    for draw in (
        lambda ax: draw_prefix_tree(PROMPTS, 2, ax=ax),
        lambda ax: draw_block_story(told_story(), 1, ax=ax),
        lambda ax: draw_reuse([Bar("one", 1, 2)], title="Tokens", ax=ax),
        lambda ax: draw_hit_rates({"LRU": [(1, 0.5)]}, title="Hits", xlabel="blocks", ax=ax),
    ):
        ax = figure.add_subplot()
        assert draw(ax) is figure
        assert ax.texts or ax.lines
        figure.clear()


def test_text_on_owners_can_be_read() -> None:
    for index in range(len(palette.REQUESTS)):
        color = palette.request_color(index)
        assert palette.contrast(palette.text_on(color), color) > 4.5
