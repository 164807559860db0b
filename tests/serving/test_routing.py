"""Where a request of a fleet goes: the parts that need no Ray."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.bench.conversations import TraceSettings, cacheable, draw_conversations
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sequence import Sequence
from minivllm.sampling_params import SamplingParams
from minivllm.serving.replicas.prefixes import (
    num_leading,
    pack_hashes,
    prompt_hashes,
    unpack_hashes,
)
from minivllm.serving.replicas.routing import Candidate, PrefixTable, rank


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.sampled_from([None, "", "a"]),
)
def test_a_prompts_hashes_say_what_the_block_manager_would_find(
    cached: list[int], asked: list[int], salt: str | None
) -> None:
    """The router computes from token ids alone what a replica's engine looks up."""
    manager = BlockManager(64, 4)
    keys = () if salt is None else (salt,)

    def sequence(number: int, token_ids: list[int]) -> Sequence:
        return Sequence(number, token_ids, SamplingParams(), extra_keys=keys)

    if cached:
        first = sequence(0, cached)
        assert manager.allocate(first, len(cached))
        manager.register_computed(first, 0, len(cached))
        manager.free(first)
    known = unpack_hashes(pack_hashes(manager.hash_to_block))
    found = len(manager.find_cached_prefix(sequence(1, asked)))
    assert num_leading(prompt_hashes(asked, 4, salt), known) == found
    if found:
        assert num_leading(prompt_hashes(asked, 4, "other"), known) == 0


def test_a_summary_takes_four_bytes_per_block() -> None:
    hashes = [random.Random(n).getrandbits(128) for n in range(1000)]
    summary = pack_hashes(hashes)
    assert len(summary) == 4000
    assert all(h & 0xFFFFFFFF in unpack_hashes(summary) for h in hashes)
    assert unpack_hashes(pack_hashes([])) == frozenset()


def test_the_best_prefix_wins_unless_its_queue_is_too_long() -> None:
    has, near, idle = Candidate("has", 5, 9), Candidate("near", 2, 3), Candidate("idle", 0)
    names = lambda found: [candidate.name for candidate in found]  # noqa: E731
    assert names(rank([idle, near, has], balance=5)) == ["has", "near", "idle"]
    assert names(rank([idle, near, has], balance=4)) == ["near", "idle", "has"]
    assert names(rank([idle, near, has], balance=0)) == ["idle", "near", "has"]
    assert rank([], balance=0) == []


def test_without_a_prefix_the_shortest_queue_wins_and_chance_decides_between_equals() -> None:
    dice = random.Random(0)
    equal = [Candidate(name, 1) for name in "abc"]
    firsts = [rank([*equal, Candidate("d", 2)], 4, dice)[0].name for _ in range(300)]
    assert set(firsts) == set("abc")
    assert min(firsts.count(name) for name in "abc") > 60


def test_what_was_sent_is_expected_until_a_summary_or_time_says_otherwise() -> None:
    table, hashes = PrefixTable(keep=10.0), prompt_hashes(list(range(64)), 16)
    assert len(hashes) == 3
    assert table.num_cached("a", hashes, 0.0) == 0
    table.note_sent("a", hashes, 0.0)
    assert table.num_cached("a", hashes, 10.0) == 3
    assert table.num_cached("b", hashes, 1.0) == 0
    # An older summary, which does not know the prompt yet, takes nothing away.
    table.publish("a", pack_hashes(hashes[:1]))
    assert table.num_cached("a", hashes, 5.0) == 3
    # After the time, only the summary counts.
    assert table.num_cached("a", hashes, 10.1) == 1
    table.publish("a", pack_hashes([*hashes, 1 << 40]))
    assert table.num_cached("a", hashes, 99.0) == 3
    table.publish("a", b"")
    assert table.num_cached("a", hashes, 99.0) == 0
    table.note_sent("a", hashes, 100.0)
    table.keep_only(["b"])
    assert table.num_cached("a", hashes, 100.0) == 0


def test_the_expected_blocks_are_bounded() -> None:
    table = PrefixTable(keep=1e9)
    for n in range(30):
        table.note_sent("a", [n * 10_000 + i for i in range(10_000)], float(n))
    assert len(table._known["a"].expected) == 65536
    assert table.num_cached("a", [29 * 10_000], 30.0) == 1
    assert table.num_cached("a", [0], 30.0) == 0


def test_conversations_are_the_same_for_a_seed_and_grow_turn_by_turn() -> None:
    trace = TraceSettings(conversations=12, groups=2, seed=3)
    talks = draw_conversations(trace)
    assert talks == draw_conversations(trace)
    assert talks != draw_conversations(TraceSettings(conversations=12, groups=2, seed=4))
    assert len({tuple(talk.system) for talk in talks}) == 2
    assert [talk.start for talk in talks] == sorted(talk.start for talk in talks)
    talk = talks[0]
    answers = [[7] * turn.answer for turn in talk.turns]
    prompts = [talk.prompt(n, answers[:n]) for n in range(len(talk.turns))]
    for before, answer, after in zip(prompts, answers, prompts[1:], strict=False):
        assert after[: len(before) + len(answer)] == before + answer
    assert talk.most_tokens == len(prompts[-1]) + len(answers[-1])
    with pytest.raises(ValueError, match="zip"):
        talk.prompt(2, [])


def test_cacheable_counts_blocks_of_earlier_prompts() -> None:
    a, b = list(range(40)), [*range(32), 99, 98]
    assert cacheable([a], 16) == 0
    assert cacheable([a, a], 16) == 32
    assert cacheable([a, b, [5, *b]], 16) == 32


def test_cacheable_counts_answers_without_their_last_token() -> None:
    a = list(range(40))
    for answer, known in ((7, 32), (8, 32), (9, 48), (25, 64)):
        later = [*a, *range(100, 100 + answer), *range(30)]
        asked = [a, later]
        assert cacheable(asked, 16, [list(range(100, 100 + answer)), []]) == known
        assert cacheable(asked, 16) == 32


def test_prefix_routing_hits_far_more_than_chance_with_real_block_managers() -> None:
    """The whole of routing without Ray: three caches, a trace, and no load to speak of."""

    def play(by_prefix: bool) -> float:
        managers = {name: BlockManager(900, 16) for name in "abc"}
        table, dice, hits, total = PrefixTable(), random.Random(0), 0, 0
        for talk in draw_conversations(TraceSettings(conversations=30)):
            answers: list[list[int]] = []
            for turn, (number, message) in enumerate(enumerate(talk.turns)):
                ids = talk.prompt(turn, answers)
                hashes = prompt_hashes(ids, 16)
                for name, manager in managers.items():
                    table.publish(name, pack_hashes(manager.hash_to_block))
                found = [Candidate(n, 0, table.num_cached(n, hashes, 0.0)) for n in managers]
                name = rank(found, 4, dice)[0].name if by_prefix else dice.choice("abc")
                seq = Sequence(number, ids, SamplingParams())
                prefix = managers[name].find_cached_prefix(seq)
                assert managers[name].allocate(seq, len(ids), prefix)
                managers[name].register_computed(seq, len(prefix) * 16, len(ids))
                managers[name].free(seq)
                hits, total = hits + 16 * len(prefix), total + len(ids)
                answers.append([talk.number % 256] * message.answer)
        return hits / total

    assert play(by_prefix=True) > 1.2 * play(by_prefix=False)


@pytest.mark.slow
def test_the_pure_modules_need_neither_ray_nor_torch() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import minivllm.serving.replicas.routing, minivllm.bench.conversations\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_without_ray_the_command_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from minivllm.cli.app import app; app(['serve', '--replicas', '2'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert found.returncode != 0
    assert b"pip install 'minivllm[ray]'" in found.stderr + found.stdout
