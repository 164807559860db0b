"""The simulated fleet: real schedulers and caches, one clock, and engines that come and go."""

from __future__ import annotations

import pytest

from minivllm.bench.conversations import TraceSettings, draw_conversations
from minivllm.course.sim.apart import Apart, Link
from minivllm.course.sim.fleet import Asked, Engine, Fleet
from minivllm.course.sim.simulator import H200, STEPS, Arrival, simulate

TALKS = draw_conversations(TraceSettings(conversations=12, rate=4.0))
SINGLE = draw_conversations(
    TraceSettings(conversations=40, turns=(1, 1), system=0, answer=(20, 60), rate=30.0)
)
#: Blocks enough for all of these, and quickly made.
SMALL = {"num_blocks": 1500, "block_size": 16}


def shortest(asked: Asked, engines: list[Engine]) -> Engine:
    return min(engines, key=lambda engine: engine.load)


def by_prefix(asked: Asked, engines: list[Engine]) -> Engine:
    return max(engines, key=lambda engine: engine.blocks_of(asked.hashes))


def check(fleet: Fleet) -> None:
    """Everybody has a whole answer in the end, and every block is accounted for."""
    for asked in fleet.answered:
        assert len(asked.token_times) == len(asked.answer)
        assert asked.token_times == sorted(asked.token_times)
        assert asked.time < asked.token_times[0]
        assert asked.end == asked.token_times[-1]
    for engine in fleet.all:
        if engine.is_alive:
            assert engine.load == 0
            assert not engine.scheduler.has_unfinished
            engine.block_manager.check([])


def test_one_engine_is_the_simulator_of_chapter_5() -> None:
    """Without equal prompts, a fleet of one takes the time that `simulate` takes."""
    fleet = Fleet(1, shortest, **SMALL).play(SINGLE)
    arrivals = [Arrival(t.start, len(t.turns[0].message), t.turns[0].answer) for t in SINGLE]
    run = simulate(arrivals, trace=False, **SMALL)
    assert [asked.ttft for asked in fleet.requests] == pytest.approx(run.ttfts)
    assert fleet.hit_rate == 0
    assert fleet.imbalance == 1
    check(fleet)


def test_a_conversation_finds_its_last_turn_in_the_cache() -> None:
    fleet = Fleet(1, shortest, **SMALL).play(TALKS)
    last: dict[int, Asked] = {}
    for asked in fleet.requests:
        if before := last.get(asked.conversation):
            known = len(before.token_ids) + len(before.answer)
            # The last token of an answer is never computed.
            assert asked.num_cached == (known - 1) // 16 * 16
            assert asked.token_ids[:known] == before.token_ids + before.answer
            assert asked.time >= before.end
        last[asked.conversation] = asked
    assert len(fleet.requests) == sum(len(talk.turns) for talk in TALKS)
    computed = sum(len(a.token_ids) - a.num_cached + len(a.answer) - 1 for a in fleet.requests)
    assert fleet.all[0].num_computed == computed
    check(fleet)


def test_by_prefix_a_conversation_stays_and_hits_what_one_engine_would() -> None:
    one, routed = (Fleet(n, by_prefix, **SMALL).play(TALKS) for n in (1, 3))
    engines: dict[int, set[int]] = {}
    for asked in routed.requests:
        engines.setdefault(asked.conversation, set()).add(asked.engine)
    assert all(len(used) == 1 for used in engines.values())
    assert routed.hit_rate == pytest.approx(one.hit_rate, abs=0.03)
    by_load = Fleet(3, shortest, **SMALL).play(TALKS)
    assert by_load.hit_rate < routed.hit_rate
    assert by_load.imbalance < routed.imbalance
    check(routed)


def test_the_same_fleet_twice() -> None:
    runs = [Fleet(3, shortest, **SMALL).play(TALKS).requests for _ in range(2)]
    times = [[(a.engine, a.token_times, a.num_cached) for a in run] for run in runs]
    assert times[0] == times[1]


def test_a_death_ends_what_has_begun_and_moves_what_has_not() -> None:
    fleet = Fleet(2, shortest, cost=STEPS, max_num_seqs=2, **SMALL)
    victim = fleet.engines[1]
    seen: list[list[Asked]] = []

    def die() -> None:
        seen.append(list(victim.requests.values()))
        fleet.kill(victim)

    fleet.at(2.5, die)
    fleet.at(3.0, fleet.start)
    fleet.play(SINGLE)
    [lost] = seen
    begun = [asked for asked in lost if asked.failed]
    waited = [asked for asked in lost if not asked.failed]
    assert len(begun) == 2
    assert waited
    assert all(asked.token_times and asked.end == 2.5 for asked in begun)
    assert all(asked.tries >= 2 and asked.engine != victim.name for asked in waited)
    again = [a for a in fleet.requests if a.conversation == begun[0].conversation]
    assert [asked.failed for asked in again] == [True, False]
    assert again[1].time == 3.5, "a person asks again after a second"
    assert {asked.engine for asked in fleet.answered} == {0, 2}
    check(fleet)


def test_without_an_engine_requests_wait_for_one() -> None:
    fleet = Fleet(1, shortest, **SMALL)
    fleet.at(0.0, lambda: fleet.kill(fleet.engines[0]))
    fleet.at(5.0, fleet.start)
    fleet.play(SINGLE)
    assert min(asked.token_times[0] for asked in fleet.requests) > 5
    check(fleet)


def test_a_drained_engine_finishes_what_it_has() -> None:
    fleet = Fleet(2, shortest, **SMALL)
    fleet.at(0.4, lambda: fleet.drain(fleet.engines[1]))
    fleet.play(SINGLE)
    ours = [asked for asked in fleet.requests if asked.engine == 1]
    assert ours
    assert max(asked.time for asked in ours) <= 0.4 < max(asked.end for asked in ours)
    assert len(fleet.answered) == len(fleet.requests) == 40
    check(fleet)


def test_apart_the_caches_travel_and_decodes_are_left_alone() -> None:
    link = Link(kv_bytes=100_000, bandwidth=1e9)
    fleet = Apart(1, 1, link, **SMALL)
    fleet.play(SINGLE)
    prompts = [len(asked.token_ids) for asked in fleet.requests]
    assert fleet.num_bytes == 100_000 * sum(prompts)
    for asked in fleet.requests:
        assert asked.gaps[0] > link.seconds(len(asked.token_ids)) + H200.weights
    prefill, decode = fleet.all
    assert sum(step.prompt_tokens for step in prefill.steps) == sum(prompts)
    assert not any(step.decodes for step in prefill.steps)
    # Only what is left of a prompt's last block, and the first token.
    rests = [count % 16 + 1 for count in prompts]
    assert sum(step.prompt_tokens for step in decode.steps) == sum(rests)
    check(fleet)


def test_one_link_sends_one_cache_after_the_other() -> None:
    slow = Apart(1, 1, Link(kv_bytes=100_000, bandwidth=1e8), **SMALL)
    slow.play(SINGLE)
    arrived = sorted(asked.token_times[1] for asked in slow.requests)
    whole = slow.num_bytes / 1e8
    assert arrived[-1] - slow.requests[0].token_times[0] > whole
    check(slow)
