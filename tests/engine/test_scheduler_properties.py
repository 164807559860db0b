"""BlockManager and Scheduler under random requests, with a fake model in place of the real one.
What it knows stands in support/scheduling.py.
"""

from __future__ import annotations

import copy
import random
from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.engine import block_manager as block_manager_module
from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import PENDING, Sequence, SequenceStatus, max_steps
from minivllm.sampling_params import SamplingParams
from support.scheduling import (
    VOCAB,
    Pool,
    Simulation,
    compute,
    make_seq,
    random_pool,
    release,
    run_many,
)

settings.register_profile(
    "minivllm",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["at_once", "one_step_late"])
def test_thousands_of_random_histories(late):
    met = run_many(range(1200), late)
    assert met["finished"] > 10_000
    assert met["preemptions"] > 1000
    assert met["hits"] > 1000
    assert met["chunks"] > 1000
    assert met["mixed"] > 1000
    assert met["deferrals"] > 100
    assert (
        met["late_accepted"] > 50
    ) == late  # tokens that arrived after their sequence had been preempted


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["at_once", "one_step_late"])
def test_thousands_of_random_histories_with_proposals(late):
    """The texts are those of `Truth`, which knows no proposals."""
    met = run_many(range(1200), late, proposing=True)
    assert met["finished"] > 10_000
    for name in ("preemptions", "hits", "chunks", "mixed"):
        assert met[name] > 1000, name
    assert min(met["right"], met["wrong"]) > 400
    assert met["deferrals"] > 100
    assert met["cut"] > 50  # a stop token among the accepted proposals
    assert (met["late_verified"] > 10) == late  # preempted while its proposals were in flight


class RegistersProposals(Scheduler):
    """Takes what was computed for what was verified."""

    def update(self, batch, token_ids):
        for item in batch.items:
            seq = item.sequence
            if item.proposed_token_ids and seq.status is SequenceStatus.RUNNING:
                known = seq.token_ids
                seq.token_ids = [*known[:-1], *item.proposed_token_ids]
                self.block_manager.register_computed(seq, item.start, item.end)
                seq.token_ids = known
        return super().update(batch, token_ids)


class KeepsRejected(Scheduler):
    """Leaves the count of computed tokens as if all proposals had been right."""

    def update(self, batch, token_ids):
        ends = [(item, item.sequence.num_computed_tokens) for item in batch.items]
        accepted = super().update(batch, token_ids)
        for item, end in ends:
            if item.proposed_token_ids and item.sequence.status is SequenceStatus.RUNNING:
                item.sequence.num_computed_tokens = min(end, item.sequence.num_tokens)
        return accepted


class TakesAllProposals(Scheduler):
    """Believes every proposal."""

    def update(self, batch, token_ids):
        token_ids = [
            [*item.proposed_token_ids, tokens[-1]]
            for item, tokens in zip(batch.sampled, token_ids, strict=True)
        ]
        return super().update(batch, token_ids)


@pytest.mark.parametrize("mutant", [RegistersProposals, KeepsRejected, TakesAllProposals])
def test_wrong_handling_of_proposals_is_found(mutant):
    with pytest.raises((AssertionError, IndexError)):
        run_many(range(60), False, proposing=True, scheduler_cls=mutant)


@pytest.mark.slow
def test_nobody_is_preempted_or_delayed_for_a_guess():
    """Each step is planned a second time without the proposals: the running ones lose nothing."""
    compared = 0
    for seed in range(150):
        rng = random.Random(seed)
        sim = Simulation(random_pool(rng), late=seed % 2 == 1)
        for _ in range(4):
            sim.add([rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))], 9)
        while sim.live:
            sim.propose_at_random(rng)
            plain = copy.deepcopy(sim.scheduler)
            for seq in plain.running:
                seq.proposed_token_ids = []
            running = {seq.seq_id for seq in plain.running}
            without = plain.schedule()
            sim.step()
            batch = sim.last_batch
            assert [s.seq_id for s in batch.preempted] == [s.seq_id for s in without.preempted]
            assert [
                (seq_id, start, num_new)
                for seq_id, start, num_new in planned(without)
                if seq_id in running
            ] == [
                (i.sequence.seq_id, i.start, i.num_new_tokens - len(i.proposed_token_ids))
                for i in batch.items
                if i.sequence.seq_id in running
            ]
            compared += batch.has_proposals
    assert compared > 300


# --- the same rules as hypothesis state machines: fewer, but shrunk to the shortest failure -------


class SchedulerMachine(RuleBasedStateMachine):
    late = False

    @initialize(
        num_blocks=st.integers(1, 6),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 9),
        caching=st.sampled_from([True, True, True, False]),
    )
    def make_pool(self, num_blocks, block_size, max_num_seqs, budget, caching):
        self.sim = Simulation(
            Pool(num_blocks, block_size, max_num_seqs, budget, caching), late=self.late
        )

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
        source=st.integers(0, 7),
        num_shared=st.sampled_from([0, 1, 2, 4, 6, 8, 12]),
        max_tokens=st.integers(1, 9),
        stop=st.sampled_from([None, None, 0, 1]),
        min_tokens=st.sampled_from([0, 0, 1, 3]),
        prompt_logprobs=st.sampled_from([None, None, None, None, 0]),
    )
    def add(self, prompt, source, num_shared, max_tokens, stop, min_tokens, prompt_logprobs):
        if len(self.sim.live) >= 8:
            return
        truths = list(self.sim.truths.values())
        shared = truths[-1 - source % len(truths)].tokens[:num_shared] if truths else []
        self.sim.add(
            shared + prompt, max_tokens, [] if stop is None else [stop], min_tokens, prompt_logprobs
        )

    @rule(count=st.integers(1, 6))
    def steps(self, count):
        for _ in range(count):
            self.sim.step()

    @precondition(lambda self: self.sim.live)
    @rule(
        which=st.integers(0, 7),
        num_right=st.integers(0, 4),
        num_wrong=st.integers(0, 2),
        then_step=st.booleans(),
    )
    def propose(self, which, num_right, num_wrong, then_step):
        live = list(self.sim.live.values())
        self.sim.propose(live[which % len(live)], num_right, num_wrong)
        if then_step:
            self.sim.step()

    @precondition(lambda self: self.sim.live)
    @rule(which=st.integers(0, 7))
    def abort(self, which):
        live = list(self.sim.live.values())
        self.sim.abort(live[which % len(live)])

    @rule()
    def interrupt(self):
        self.sim.interrupt()

    @rule()
    def forget_the_cache(self):
        self.sim.manager.reset_prefix_cache()

    @invariant()
    def holds(self):
        if hasattr(self, "sim"):
            self.sim.check()

    def teardown(self):
        if hasattr(self, "sim"):
            self.sim.drain()


class LateSchedulerMachine(SchedulerMachine):
    late = True


_profile = settings(settings.get_profile("minivllm"), max_examples=250, stateful_step_count=25)
TestAtOnce = SchedulerMachine.TestCase
TestOneStepLate = LateSchedulerMachine.TestCase
TestAtOnce.settings = TestOneStepLate.settings = _profile


# --- BlockManager, case by case -------------------------------------------------------------------


class TestBlockManager:
    def test_a_new_pool_is_free_and_knows_nothing(self):
        manager = BlockManager(4, 2)
        assert (manager.num_blocks, manager.num_free_blocks, manager.num_cached_blocks) == (4, 4, 0)
        manager.check([])

    @pytest.mark.parametrize(
        ("tokens", "blocks"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
    )
    def test_blocks_for_tokens(self, tokens, blocks):
        assert BlockManager(8, 4).num_blocks_for(tokens) == blocks

    def test_allocate_is_all_or_nothing(self):
        manager = BlockManager(3, 2)
        first, second = make_seq(0, [1] * 4), make_seq(1, [2] * 4)
        assert manager.allocate(first, 4)
        before = list(manager.free_blocks)
        assert not manager.allocate(second, 4)
        assert second.block_table == []
        assert list(manager.free_blocks) == before
        assert manager.allocate(second, 2)
        manager.check([first, second])

    def test_allocate_grows_only_at_a_boundary(self):
        manager, seq = BlockManager(3, 2), make_seq(0, [1])
        sizes = []
        for num_tokens in range(1, 7):
            assert manager.allocate(seq, num_tokens)
            sizes.append(len(seq.block_table))
        assert sizes == [1, 1, 2, 2, 3, 3]
        assert not manager.allocate(seq, 7)

    def test_full_blocks_are_shared_and_counted(self):
        manager = BlockManager(6, 2)
        first, second = make_seq(0, [1, 2, 3, 4, 5]), make_seq(1, [1, 2, 3, 4, 6])
        table = compute(manager, first)
        assert manager.find_cached_prefix(second) == table[:2]
        assert compute(manager, second)[:2] == table[:2]
        assert [manager.blocks[i].ref_count for i in table] == [2, 2, 1]
        manager.check([first, second])
        release(manager, first)
        assert [manager.blocks[i].ref_count for i in table] == [1, 1, 0]
        manager.check([second])

    def test_content_survives_the_end_of_its_sequence(self):
        manager, seq = BlockManager(4, 2), make_seq(0, [1, 2, 3, 4, 5])
        table = compute(manager, seq)
        release(manager, seq)
        assert (manager.num_free_blocks, manager.num_cached_blocks) == (4, 2)
        assert manager.find_cached_prefix(make_seq(1, [1, 2, 3, 4, 5])) == table[:2]

    def test_at_least_the_last_token_is_left_to_compute(self):
        manager, seq = BlockManager(4, 2), make_seq(0, [1, 2, 3, 4])
        table = compute(manager, seq)
        release(manager, seq)
        assert manager.find_cached_prefix(make_seq(1, [1, 2, 3, 4])) == table[:1]
        assert manager.find_cached_prefix(make_seq(1, [1, 2, 3, 4, 5])) == table[:2]
        assert manager.find_cached_prefix(make_seq(1, [1, 2])) == []

    def test_the_prefix_ends_at_the_first_miss(self):
        manager = BlockManager(8, 2)
        seq = make_seq(0, [1, 2, 3, 4, 5, 6, 7])
        table = compute(manager, seq)
        release(manager, seq)
        manager._forget(manager.blocks[table[1]])
        assert manager.find_cached_prefix(make_seq(1, [1, 2, 3, 4, 5, 6, 7])) == table[:1]

    def test_blocks_without_content_are_taken_first(self):
        manager = BlockManager(4, 2)
        seq = make_seq(0, [1, 2, 3])
        table = compute(manager, seq)
        release(manager, seq)  # table[0] is cached, table[1] held half a block and is worth nothing
        assert list(manager.free_blocks) == [table[1], 2, 3, table[0]]
        other = make_seq(1, [9] * 6)
        assert manager.allocate(other, 6)
        assert manager.num_cached_blocks == 1
        manager.check([other])

    def test_the_least_recently_used_is_evicted_first(self):
        manager = BlockManager(3, 2)
        seqs = [make_seq(i, [i, i]) for i in range(3)]
        tables = [compute(manager, seq) for seq in seqs]
        for i in (1, 0, 2):
            release(manager, seqs[i])
        again = make_seq(3, [1, 1, 7])  # a hit, and then freed: block 1 becomes the most recent
        assert manager.allocate(again, 2, manager.find_cached_prefix(again))
        release(manager, again)
        assert list(manager.free_blocks) == [tables[0][0], tables[2][0], tables[1][0]]
        new = make_seq(4, [8, 8])
        assert manager.allocate(new, 2)
        assert new.block_table == tables[0]

    def test_the_tail_is_evicted_before_the_head(self):
        manager = BlockManager(3, 2)
        seq = make_seq(0, [1, 2, 3, 4, 5, 6])
        table = compute(manager, seq)
        release(manager, seq)
        other = make_seq(1, [9, 9])
        assert manager.allocate(other, 2)
        assert other.block_table == table[-1:]
        assert manager.find_cached_prefix(make_seq(2, [1, 2, 3, 4, 5, 6])) == table[:2]

    def test_an_evicted_block_is_forgotten(self):
        manager = BlockManager(1, 2)
        seq, other = make_seq(0, [1, 2]), make_seq(1, [3, 4])
        compute(manager, seq)
        release(manager, seq)
        assert manager.find_cached_prefix(make_seq(2, [1, 2, 3])) == [0]
        assert manager.allocate(other, 1)
        assert manager.find_cached_prefix(make_seq(2, [1, 2, 3])) == []
        assert manager.hash_to_block == {}
        manager.check([other])

    def test_revived_blocks_count_as_taken(self):
        manager = BlockManager(3, 2)
        seq = make_seq(0, [1, 2, 3, 4])
        compute(manager, seq)
        release(manager, seq)
        other = make_seq(1, [1, 2, 3, 4, 5, 6, 7])
        prefix = manager.find_cached_prefix(other)
        assert len(prefix) == 2
        # Three blocks are free, but two of them are the prefix itself: one is left, and two more
        # are needed.
        assert not manager.allocate(other, 7, prefix)
        assert other.block_table == []
        assert manager.num_free_blocks == 3
        assert manager.allocate(other, 6, prefix)
        manager.check([other])

    def test_a_prefix_in_use_costs_nothing(self):
        manager = BlockManager(3, 2)
        first, second = make_seq(0, [1, 2, 3, 4]), make_seq(1, [1, 2, 3, 4, 5])
        compute(manager, first)
        prefix = manager.find_cached_prefix(second)
        assert manager.allocate(second, 5, prefix)
        assert manager.num_free_blocks == 0
        manager.check([first, second])

    def test_hashes_are_chained(self):
        manager = BlockManager(8, 2)
        seq = make_seq(0, [1, 1, 5, 5, 9])
        compute(manager, seq)
        # the second block of another prefix
        assert manager.find_cached_prefix(make_seq(1, [5, 5, 9])) == []
        assert manager.find_cached_prefix(make_seq(1, [2, 2, 5, 5, 9])) == []
        assert hash_block(None, [5, 5]) != hash_block(hash_block(None, [1, 1]), [5, 5])

    def test_hashes_depend_on_every_token(self):
        tokens = [7, 300, 151935, 2]
        hashes = {hash_block(1, [*tokens[:i], tokens[i] + 1, *tokens[i + 1 :]]) for i in range(4)}
        assert len(hashes | {hash_block(1, tokens)}) == 5

    def test_a_collision_is_noticed(self, monkeypatch):
        """Two first blocks with the same hash: the second one is neither served nor registered."""

        def hash_with_collisions(previous, token_ids, extra_keys=()):
            return 42 if previous is None else hash_block(previous, token_ids, extra_keys)

        monkeypatch.setattr(block_manager_module, "hash_block", hash_with_collisions)
        manager = BlockManager(8, 2)
        first, second = make_seq(0, [1, 2, 7, 7, 3]), make_seq(1, [3, 4, 7, 7, 3])
        table = compute(manager, first)
        assert manager.find_cached_prefix(make_seq(2, [1, 2, 7, 7, 3])) == table[:2]
        assert manager.find_cached_prefix(second) == []
        compute(manager, second)
        assert manager.blocks[second.block_table[0]].block_hash is None
        assert manager.find_cached_prefix(make_seq(3, [1, 2, 7, 7, 3])) == table[:2]
        manager.check([first, second])

    def test_equal_blocks_computed_side_by_side_are_registered_once(self):
        manager = BlockManager(4, 2)
        first, second = make_seq(0, [1, 2]), make_seq(1, [1, 2])
        for seq in (first, second):
            assert manager.allocate(seq, 2)
            seq.num_computed_tokens = 2
        for seq in (first, second):
            manager.register_computed(seq, 0, 2)
        assert manager.hash_to_block == {hash_block(None, [1, 2]): first.block_table[0]}
        release(manager, first, second)
        assert manager.num_cached_blocks == 1
        manager.check([])

    def test_a_block_is_registered_when_its_last_token_is_computed(self):
        manager, seq = BlockManager(4, 3), make_seq(0, [1, 2, 3, 4, 5, 6, 7])
        registered = []
        for end in range(1, 8):
            compute(manager, seq, end)
            registered.append(len(manager.hash_to_block))
        assert registered == [0, 0, 1, 1, 1, 2, 2]

    def test_trim_gives_back_the_end_of_a_table(self):
        manager = BlockManager(6, 2)
        seq = make_seq(0, [1, 2, 3])
        assert manager.allocate(seq, 9)
        table = list(seq.block_table)
        manager.trim(seq, 3)
        assert seq.block_table == table[:2]
        assert manager.num_free_blocks == 4
        manager.trim(seq, 4)  # the same blocks: nothing to give back
        assert seq.block_table == table[:2]
        manager.check([seq])

    def test_unknown_tokens_are_never_hashed(self):
        """Planned one step ahead, a sequence ends with two unknown tokens; neither may enter a
        hash.
        """
        manager, seq = BlockManager(4, 1), make_seq(0, [5])
        assert manager.allocate(seq, 1)
        seq.append_pending()
        assert manager.allocate(seq, 2)
        seq.append_pending()
        manager.register_computed(seq, 0, 1)
        assert seq.block_hashes == [hash_block(None, [5])]
        seq.token_ids[1] = 6
        manager.register_computed(seq, 1, 2)
        assert seq.block_hashes == [hash_block(None, [5]), hash_block(hash_block(None, [5]), [6])]

    def test_requests_for_prompt_logprobs_take_no_hits_but_leave_some(self):
        manager = BlockManager(4, 2)
        asking = Sequence(0, [1, 2, 3], SamplingParams(prompt_logprobs=0))
        compute(manager, asking)
        assert (
            manager.find_cached_prefix(Sequence(1, [1, 2, 3], SamplingParams(prompt_logprobs=1)))
            == []
        )
        assert manager.find_cached_prefix(make_seq(2, [1, 2, 3])) == asking.block_table[:1]

    def test_prefix_caching_can_be_switched_off(self):
        manager = BlockManager(4, 2, enable_prefix_caching=False)
        seq = make_seq(0, [1, 2, 3])
        compute(manager, seq)
        assert manager.hash_to_block == {}
        assert manager.find_cached_prefix(make_seq(1, [1, 2, 3])) == []

    def test_reset_forgets_content_but_takes_nothing_away(self):
        manager = BlockManager(4, 2)
        seq = make_seq(0, [1, 2, 3, 4, 5])
        table = compute(manager, seq)
        manager.reset_prefix_cache()
        assert manager.find_cached_prefix(make_seq(1, [1, 2, 3, 4, 5])) == []
        assert seq.block_table == table
        manager.check([seq])
        release(manager, seq)
        manager.check([])

    @pytest.mark.parametrize(
        "damage",
        [
            lambda m, s: setattr(m.blocks[s.block_table[0]], "ref_count", 2),
            lambda m, s: setattr(m.blocks[s.block_table[0]], "ref_count", 0),
            lambda m, s: m.free_blocks.popitem(),
            lambda m, s: m.free_blocks.__setitem__(s.block_table[0], None),
            lambda m, s: s.block_table.append(s.block_table[0]),
            lambda m, s: s.block_table.pop(),
            lambda m, s: m.hash_to_block.clear(),
            lambda m, s: setattr(m.blocks[s.block_table[0]], "block_hash", None),
            lambda m, s: setattr(m.blocks[s.block_table[0]], "token_ids", (1,)),
            lambda m, s: setattr(m.blocks[s.block_table[0]], "token_ids", (1, PENDING)),
            lambda m, s: m.hash_to_block.__setitem__(12345, 0),
        ],
    )
    def test_check_notices(self, damage):
        manager = BlockManager(4, 2)
        seq = make_seq(0, [1, 2, 3])
        compute(manager, seq)
        manager.check([seq])
        damage(manager, seq)
        with pytest.raises((AssertionError, KeyError)):
            manager.check([seq])


# --- Scheduler, case by case ----------------------------------------------------------------------


def planned(batch) -> list[tuple[int, int, int]]:
    """(sequence, start, new tokens) of each item."""
    return [(item.sequence.seq_id, item.start, item.num_new_tokens) for item in batch.items]


class TestScheduler:
    def make(
        self, num_blocks=16, block_size=2, max_num_seqs=4, budget=16, caching=True, late=False
    ) -> Simulation:
        return Simulation(Pool(num_blocks, block_size, max_num_seqs, budget, caching), late=late)

    def run_step(self, sim: Simulation):
        """A step by hand; returns what was planned."""
        batch = sim.scheduler.schedule()
        sim.results.append((batch, sim._execute(batch)))
        if not sim.late or len(sim.results) > 1:
            sim._update(*sim.results.popleft())
        sim.check()
        return batch

    def test_nothing_to_do_is_an_empty_batch(self):
        sim = self.make()
        batch = sim.scheduler.schedule()
        assert not batch
        assert batch.items == []
        assert sim.scheduler.stats.num_steps == 0

    def test_running_first_then_waiting_in_order_of_arrival(self):
        sim = self.make()
        for i in range(3):
            sim.add([i, 0, 0], 4)
        assert planned(self.run_step(sim)) == [(0, 0, 3), (1, 0, 3), (2, 0, 3)]
        sim.add([2, 2], 4)
        assert planned(self.run_step(sim)) == [(0, 3, 1), (1, 3, 1), (2, 3, 1), (3, 0, 2)]
        assert sim.scheduler.stats.num_mixed_steps == 1

    def test_no_more_sequences_than_slots(self):
        sim = self.make(max_num_seqs=2)
        for _ in range(3):
            sim.add([1], 1, prompt_logprobs=0)
        assert planned(self.run_step(sim)) == [(0, 0, 1), (1, 0, 1)]
        assert planned(self.run_step(sim)) == [(2, 0, 1)]

    def test_the_budget_cuts_a_prompt_into_chunks(self):
        sim = self.make(budget=4)
        sim.add([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], 2)
        sim.add([2], 2)
        assert [planned(self.run_step(sim)) for _ in range(3)] == [
            [(0, 0, 4)],
            [(0, 4, 4)],
            [(0, 8, 2), (1, 0, 1)],
        ]
        assert sim.scheduler.stats.num_chunks == 2
        sim.drain()

    def test_a_chunk_samples_only_with_the_prompts_last_token(self):
        sim = self.make(budget=3)
        seq = sim.add([0, 1, 2, 0, 1], 2)
        batch = self.run_step(sim)
        assert batch.sampled == []
        assert seq.num_output_tokens == 0
        batch = self.run_step(sim)
        assert [item.sample_position for item in batch.sampled] == [5]

    def test_decodes_take_the_budget_before_chunks_of_newer_prompts(self):
        sim = self.make(budget=3)
        sim.add([0], 8)
        sim.add([1], 8)
        self.run_step(sim)
        sim.add([2, 2, 2, 2], 1)
        assert planned(self.run_step(sim)) == [(0, 1, 1), (1, 1, 1), (2, 0, 1)]

    def test_budget_of_one_serves_everybody_in_turn(self):
        sim = self.make(budget=1)
        for i in range(3):
            sim.add([i, i], 3)
        sim.drain()
        assert sim.num_steps <= max_steps([(2, 3)] * 3)

    def test_the_newest_is_preempted(self):
        sim = self.make(num_blocks=3, block_size=2, caching=False)
        seqs = [sim.add([i, i], 5) for i in range(3)]
        self.run_step(sim)
        batch = self.run_step(sim)  # each needs a second block, and none is free
        assert [seq.seq_id for seq in batch.preempted] == [2, 1]
        assert [seq.status for seq in seqs] == [
            SequenceStatus.RUNNING,
            *[SequenceStatus.PREEMPTED] * 2,
        ]
        assert [seq.seq_id for seq in sim.scheduler.waiting] == [1, 2]
        assert planned(batch) == [(0, 2, 1)]
        assert sim.scheduler.stats.num_preemptions == 2
        sim.drain()

    def test_a_sequence_may_preempt_itself_but_not_an_older_one(self):
        sim = self.make(num_blocks=3, block_size=2, caching=False)
        sim.add([0, 0, 0], 2)
        newest = sim.add([1, 1], 2)
        self.run_step(sim)
        batch = self.run_step(sim)
        assert [seq.seq_id for seq in batch.preempted] == [newest.seq_id]
        assert planned(batch) == [(0, 3, 1)]
        sim.drain()

    def test_nobody_is_admitted_in_a_step_that_preempts(self):
        sim = self.make(num_blocks=3, block_size=2, caching=False, max_num_seqs=3)
        for i in range(3):
            sim.add([i, i], 5)
        self.run_step(sim)
        sim.add([0], 1)
        assert self.run_step(sim).admitted == []
        sim.drain()

    def test_a_preempted_sequence_takes_its_own_blocks_back(self):
        sim = self.make(num_blocks=4, block_size=2)
        old = sim.add([0, 0, 1, 1], 3)
        new = sim.add([1, 1, 0, 2], 3)
        while not new.num_preemptions:
            self.run_step(sim)
        sim.abort(old)
        batch = sim.scheduler.schedule()
        assert [seq.seq_id for seq in batch.admitted] == [new.seq_id]
        assert new.num_cached_tokens > 0
        sim.results.append((batch, sim._execute(batch)))
        sim._update(*sim.results.popleft())
        sim.drain()

    def test_who_shares_a_block_that_is_being_computed_waits_one_step(self):
        sim = self.make()
        sim.add([0, 1, 2, 0], 4)
        sharing = sim.add([0, 1, 2, 1], 4)
        sim.add([2, 2, 2], 4)
        assert planned(self.run_step(sim)) == [(0, 0, 4)]
        assert planned(self.run_step(sim)) == [(0, 4, 1), (1, 2, 2), (2, 0, 3)]
        assert sharing.num_cached_tokens == 2
        assert sim.scheduler.stats.prefix_cache_hits == 2

    def test_one_step_late_the_sharer_waits_until_the_block_is_there(self):
        sim = self.make(late=True)
        sim.add([0, 1, 2, 0], 4)
        sim.add([0, 1, 2, 1], 4)
        assert planned(self.run_step(sim)) == [(0, 0, 4)]
        assert planned(self.run_step(sim)) == [
            (0, 4, 1)
        ]  # planned before the first step was reported
        assert planned(self.run_step(sim)) == [(0, 5, 1), (1, 2, 2)]
        sim.drain()

    def test_a_request_for_prompt_logprobs_does_not_wait_for_blocks(self):
        sim = self.make()
        sim.add([0, 1, 2, 0], 4)
        sim.add([0, 1, 2, 1], 4, prompt_logprobs=0)
        assert planned(self.run_step(sim)) == [(0, 0, 4), (1, 0, 4)]

    def test_the_sharer_computes_the_block_itself_when_its_writer_is_aborted(self):
        for late in (False, True):
            sim = self.make(late=late)
            writer = sim.add([0, 1, 2, 0], 4)
            sim.add([0, 1, 2, 1], 4)
            batch = sim.scheduler.schedule()
            sim.results.append((batch, sim._execute(batch)))
            sim.abort(writer)  # before the step is reported: nothing of it may be registered
            sim.drain()

    def test_abort_while_waiting(self):
        sim = self.make()
        seq = sim.add([1, 2], 3)
        sim.abort(seq)
        assert not sim.scheduler.has_unfinished
        assert not sim.scheduler.schedule()

    @pytest.mark.parametrize("late", [False, True])
    def test_abort_in_the_middle_of_a_prompt(self, late):
        sim = self.make(budget=3, late=late)
        seq, other = sim.add([0, 1, 2, 0, 1, 2], 3), sim.add([1, 1], 3)
        self.run_step(sim)
        assert seq.status is SequenceStatus.RUNNING
        assert seq.num_output_tokens == 0
        sim.abort(seq)
        sim.drain()
        assert other.finish_reason == "length"

    @pytest.mark.parametrize("late", [False, True])
    def test_abort_while_decoding(self, late):
        sim = self.make(late=late)
        seq, other = sim.add([0, 1, 2], 6), sim.add([1, 1], 6)
        for _ in range(3):
            self.run_step(sim)
        sim.abort(seq)
        sim.drain()
        assert other.finish_reason == "length"

    @pytest.mark.parametrize("late", [False, True])
    def test_abort_while_preempted(self, late):
        sim = self.make(num_blocks=3, block_size=2, caching=False, late=late)
        seqs = [sim.add([i, i], 5) for i in range(3)]
        while seqs[1].status is not SequenceStatus.PREEMPTED:
            sim.step()
        sim.abort(seqs[1])
        sim.drain()
        assert [seq.finish_reason for seq in seqs] == ["length", "abort", "length"]

    def test_to_finish_twice_frees_once(self):
        """A stop string may come with the last permitted token: the reason changes, nothing else
        does.
        """
        sim = self.make()
        seq = sim.add([1], 1)
        sim.drain()
        assert seq.finish_reason == "length"
        sim.scheduler.finish(seq, "stop", "END")
        assert (seq.finish_reason, seq.stop_reason) == ("stop", "END")
        sim.check()

    def test_one_step_late_a_token_that_comes_after_preemption_counts(self):
        """Step 2 samples for the newest; step 3, planned before that is reported, preempts it."""
        sim = self.make(num_blocks=3, block_size=2, caching=False, late=True)
        sim.add([0, 0], 5)
        newest = sim.add([1], 5)
        while not newest.num_preemptions:
            sim.step()
        assert newest.status is SequenceStatus.PREEMPTED
        length = newest.num_tokens
        assert sim.num_late_accepted > 0
        sim.drain()
        assert newest.finish_reason == "length"
        assert newest.num_tokens > length

    def test_one_step_late_a_preempted_sequence_waits_for_its_token(self):
        sim = self.make(num_blocks=3, block_size=2, caching=False, late=True)
        oldest, newest = sim.add([0, 0], 5), sim.add([1], 5)
        batches = deque()
        while not newest.num_preemptions:
            batch = sim.scheduler.schedule()
            batches.append((batch, sim._execute(batch)))
            if len(batches) > 1 and not newest.num_preemptions:
                sim._update(*batches.popleft())
        assert newest.has_pending_token
        sim.scheduler.finish(oldest, "abort")
        del sim.live[oldest.seq_id]
        assert not sim.scheduler.schedule(), "it was admitted although its last token is not known"
        while batches:
            sim._update(*batches.popleft())
        assert not newest.has_pending_token
        sim.drain()

    def test_one_step_late_the_step_after_the_end_is_computed_for_nothing(self):
        sim = self.make(late=True)
        seq = sim.add([0, 1], 9, stop_ids=[0, 1, 2])
        self.run_step(sim)
        assert planned(self.run_step(sim)) == [(0, 2, 1)]
        assert seq.is_finished
        assert seq.finish_reason == "stop"
        assert not sim.scheduler.schedule()
        sim.drain()

    def test_one_step_late_nothing_is_planned_beyond_the_last_token(self):
        sim = self.make(late=True)
        seq = sim.add([0, 1], 2)
        self.run_step(sim)
        self.run_step(sim)
        assert seq.num_tokens == 4
        assert not sim.scheduler.schedule()
        sim.drain()
        assert sim.scheduler.stats.num_computed_tokens == 3

    def test_results_out_of_order_are_refused(self):
        sim = self.make()
        sim.add([0], 4)
        first = sim.scheduler.schedule()
        second = sim.scheduler.schedule()
        sim._execute(first)
        with pytest.raises(AssertionError, match="order of the steps"):
            sim.scheduler.update(second, [[0]])

    def test_end_by_stop_token_and_by_length(self):
        sim = self.make()
        stopped = sim.add([0], 9, stop_ids=[0, 1, 2])
        full = sim.add([1], 3)
        sim.drain()
        assert (stopped.finish_reason, stopped.num_output_tokens) == ("stop", 1)
        assert stopped.stop_reason == stopped.token_ids[-1]
        assert (full.finish_reason, full.stop_reason, full.num_output_tokens) == ("length", None, 3)

    def test_the_end_of_sequence_token_is_no_stop_reason(self):
        sim = self.make()
        seq = Sequence(0, [0], SamplingParams(), stop_ids=frozenset(range(VOCAB)), max_num_tokens=5)
        sim.scheduler.add(seq)
        sim.scheduler.update(sim.scheduler.schedule(), [[1]])
        assert (seq.finish_reason, seq.stop_reason) == ("stop", None)

    def test_the_pool_may_be_filled_to_the_last_slot(self):
        for late in (False, True):
            sim = self.make(num_blocks=2, block_size=2, late=late)
            seq = sim.add([0, 1], 99)
            assert seq.max_num_tokens == 5
            sim.drain()
            assert seq.num_output_tokens == 3

    @pytest.mark.parametrize(
        "damage",
        [
            lambda s: s.running.reverse(),
            lambda s: s.free_slots.pop(),
            lambda s: setattr(s.running[0], "status", SequenceStatus.WAITING),
            lambda s: setattr(s.running[0], "slot", s.running[1].slot),
            lambda s: s.waiting.append(s.running[0]),
            lambda s: setattr(s.waiting[0], "slot", 0),
            lambda s: setattr(s.waiting[0], "status", SequenceStatus.RUNNING),
            lambda s: s.waiting[0].block_table.append(0),
        ],
    )
    def test_check_notices(self, damage):
        sim = self.make(max_num_seqs=3, budget=2)
        for i in range(3):
            sim.add([i], 9, prompt_logprobs=0)
        self.run_step(sim)
        damage(sim.scheduler)
        with pytest.raises(AssertionError):
            sim.scheduler.check()


def test_max_steps_bounds_the_worst_case():
    """One token a step, everybody preempting everybody: the bound holds, and is not absurdly
    loose.
    """
    requests = [(6, 3)] * 4
    for late in (False, True):
        sim = Simulation(
            Pool(num_blocks=8, block_size=1, max_num_seqs=4, budget=1, caching=False), late=late
        )
        for i, (prompt, output) in enumerate(requests):
            sim.add([i % VOCAB] * prompt, output)
        sim.drain()
        assert sim.num_steps <= max_steps(requests) <= 3 * sim.num_steps
