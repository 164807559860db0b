"""A fake model that knows what a KV cache would hold, and random requests served with it.

Every entry of the cache is (token, position, chain). The chain hashes all tokens up to there *as
they were read through the block table*. The next token is a function of the last chain, so a stale,
foreign or misplaced block changes the text. Each sequence's true text is known beforehand, whatever
the schedule. Results arrive at once, or one step late (step N + 1 is planned and run before the
results of step N are reported).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import PENDING, Sequence, SequenceStatus, max_steps
from minivllm.sampling_params import SamplingParams

# With few tokens, prompts and outputs share prefixes also by chance.
VOCAB = 3


class Truth:
    """The text of one sequence, from its request alone.

    Each token follows from the tokens before it.
    """

    def __init__(
        self, prompt: list[int], stop_ids: frozenset[int], min_tokens: int, max_num_tokens: int
    ) -> None:
        self.tokens, self.chains, self._block_hashes = [], [], []
        self.num_prompt, self.stop_ids, self.min_tokens = len(prompt), stop_ids, min_tokens
        for token in prompt:
            self._append(token)
        self.reason = "length"
        while len(self.tokens) < max_num_tokens:
            token = self.token(len(self.tokens))
            if token in stop_ids and len(self.tokens) - self.num_prompt >= min_tokens:
                self.reason = "stop"
                break
        self.output = self.tokens[self.num_prompt :]

    def token(self, position: int) -> int:
        """The token at a position.

        Beyond the end it is the token that a superfluous step would sample.
        """
        while len(self.tokens) <= position:
            banned = (
                self.stop_ids
                if len(self.tokens) - self.num_prompt < self.min_tokens
                else frozenset()
            )
            self._append(fake_sample(self.chains[-1], banned))
        return self.tokens[position]

    def block_hashes(self, count: int, block_size: int) -> list[int]:
        """The hashes of the first `count` blocks of the true text."""
        for index in range(len(self._block_hashes), count):
            previous = self._block_hashes[-1] if self._block_hashes else None
            tokens = self.tokens[index * block_size : (index + 1) * block_size]
            self._block_hashes.append(hash_block(previous, tokens))
        return self._block_hashes[:count]

    def _append(self, token: int) -> None:
        self.chains.append(hash((self.chains[-1] if self.chains else 0, token)))
        self.tokens.append(token)


def fake_sample(chain: int, banned: frozenset[int]) -> int:
    allowed = [token for token in range(VOCAB) if token not in banned]
    return allowed[hash((chain, 1)) % len(allowed)]


@dataclass(frozen=True)
class Pool:
    """The sizes of an engine."""

    num_blocks: int = 8
    block_size: int = 2
    max_num_seqs: int = 4
    budget: int = 8
    caching: bool = True

    @property
    def max_num_tokens(self) -> int:
        """The longest sequence that the pool can hold; the last token is never an input."""
        return self.num_blocks * self.block_size + 1


class Simulation:
    """A scheduler, its block manager, and the fake model.

    Each step asserts everything that must hold.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        late: bool = False,
        manager_cls=BlockManager,
        scheduler_cls=Scheduler,
        sequence_cls=Sequence,
    ) -> None:
        self.pool, self.late, self.sequence_cls = pool, late, sequence_cls
        self.manager_cls, self.scheduler_cls = manager_cls, scheduler_cls
        self._new_scheduler()
        #: The content of memory: block -> offset -> (token, position, chain), or None where nothing
        #: was written yet.
        self.content = [[None] * pool.block_size for _ in range(pool.num_blocks)]
        self.last_token = [None] * pool.max_num_seqs
        self.truths: dict[int, Truth] = {}
        self.live: dict[int, Sequence] = {}
        self.results: deque = deque()
        self.num_steps = self.num_deferrals = self.num_late_accepted = 0
        #: Verified proposals, refused ones, and those dropped because a stop came before them; and
        #: steps with proposals whose sequence had been preempted before its results arrived.
        self.num_right = self.num_wrong = self.num_cut = self.num_late_verified = 0
        self.has_proposed = False
        #: The chains of all verified tokens: block hashes may be made of these only.
        self.verified_chains: set[int] = set()
        self.chain_of_hash: dict[int, int] = {}
        #: The tokens of each sequence, the prompt's included, whose values have been reported.
        self.num_reported: dict[int, int] = {}

    def _new_scheduler(self) -> None:
        pool = self.pool
        self.manager = self.manager_cls(pool.num_blocks, pool.block_size, pool.caching)
        self.scheduler = self.scheduler_cls(self.manager, pool.max_num_seqs, pool.budget)

    # --- what happens -----------------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        stop_ids=(),
        min_tokens: int = 0,
        prompt_logprobs: int | None = None,
    ) -> Sequence:
        """Add a request, shortened to what the pool can hold, as the engine's checks would."""
        prompt = prompt[: self.pool.max_num_tokens - 1]
        max_num_tokens = min(len(prompt) + max_tokens, self.pool.max_num_tokens)
        min_tokens = min(min_tokens, max_num_tokens - len(prompt))
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=sorted(stop_ids),
            prompt_logprobs=prompt_logprobs,
        )
        seq_id = len(self.truths)
        stop_ids = frozenset(stop_ids)
        seq = self.sequence_cls(
            seq_id, list(prompt), params, stop_ids=stop_ids, max_num_tokens=max_num_tokens
        )
        self.truths[seq_id] = Truth(prompt, stop_ids, min_tokens, max_num_tokens)
        self.live[seq_id] = seq
        self.verified_chains.update(self.truths[seq_id].chains[: len(prompt)])
        self.scheduler.add(seq)
        return seq

    def propose(self, seq: Sequence, num_right: int, num_wrong: int) -> None:
        """Propose the next tokens of seq, like a draft model that sometimes errs.

        num_right right tokens come first, then num_wrong wrong ones.
        """
        known = seq.num_tokens - seq.has_pending_token
        truth = self.truths[seq.seq_id]
        right = [truth.token(known + i) for i in range(num_right + num_wrong)]
        wrong = [(token + 1) % VOCAB for token in right[num_right:]]
        proposals = right[:num_right] + wrong
        self.scheduler.propose(seq, proposals)
        self.has_proposed = True
        taken = seq.proposed_token_ids
        if seq.status is not SequenceStatus.RUNNING or seq.has_pending_token:
            assert taken == [], "a proposal for a sequence that cannot use it"
        else:
            room = max(0, seq.max_num_tokens - seq.num_tokens - 1)
            assert taken == proposals[:room]

    def propose_at_random(self, rng: random.Random) -> None:
        """Propose right, wrong and partly right tokens for some of the sequences.

        Some of these are running, others are not.
        """
        for seq in list(self.live.values()):
            if rng.random() < 0.7:
                self.propose(seq, rng.choice([0, 0, 1, 2, 3, 6]), rng.choice([0, 0, 1, 2]))

    def abort(self, seq: Sequence) -> None:
        self.scheduler.finish(seq, "abort")
        assert seq.is_finished
        assert seq.finish_reason == "abort"
        assert not seq.block_table
        del self.live[seq.seq_id]
        known = [token for token in seq.output_token_ids if token != PENDING]
        assert known == self.truths[seq.seq_id].output[: len(known)]
        self.check()

    def interrupt(self) -> None:
        """Let a step fail while it is computed, perhaps after it wrote.

        The results in flight never arrive. The engine starts again with the tokens that it knows
        (`EngineCore.restart`).
        """
        batch = self.scheduler.schedule()
        self._execute(batch)
        self.results.clear()
        stats = self.scheduler.stats
        self._new_scheduler()
        self.scheduler.stats = stats
        for seq_id, seq in self.live.items():
            self.live[seq_id] = self.sequence_cls(
                seq_id,
                [token for token in seq.token_ids if token != PENDING],
                seq.params,
                stop_ids=seq.stop_ids,
                max_num_tokens=seq.max_num_tokens,
                num_prompt_tokens=seq.num_prompt_tokens,
            )
            self.scheduler.add(self.live[seq_id])
        self.check()

    def step(self) -> None:
        """Plan and run a step; report it at once, or report the step before."""
        if not self.live and not self.results:
            assert not self.scheduler.schedule(), "planned a step for nobody"
            return
        self.num_steps += 1
        oldest = min(self.live, default=None)
        batch = self.last_batch = self.scheduler.schedule()
        self._check_plan(batch, oldest)
        if batch:
            self.results.append((batch, self._execute(batch)))
        else:
            assert self.results, "stalled: nothing planned, nothing in flight, requests unfinished"
        self.check()
        if self.results and (not self.late or not batch or len(self.results) > 1):
            self._update(*self.results.popleft())
            self.check()

    def drain(self, guesses: random.Random | None = None) -> None:
        """Run until all requests have finished, within the stated bound.

        Then no block and no slot may be in use.
        """
        left = max_steps(
            (s.num_prompt_tokens, s.max_num_tokens - s.num_prompt_tokens)
            for s in self.live.values()
        )
        if self.late and self.has_proposed:
            # A sequence rests while its proposals are verified.
            left *= 2
        while self.live or self.results:
            if self.live:
                assert left > 0, (
                    f"requests {sorted(self.live)} starve: the bound of max_steps is reached"
                )
            left -= 1
            if guesses is not None:
                self.propose_at_random(guesses)
            self.step()
        assert not self.scheduler.has_unfinished
        assert self.manager.num_free_blocks == self.pool.num_blocks, "blocks leaked"
        assert sorted(self.scheduler.free_slots) == list(range(self.pool.max_num_seqs)), (
            "slots leaked"
        )

    # --- the fake model ---------------------------------------------------------------------------

    def _execute(self, batch) -> list[list[int]]:
        tokens = []
        for item in batch.items:
            seq, truth = item.sequence, self.truths[item.sequence.seq_id]
            self._check_history(seq, truth, item.start)
            for position, token in enumerate(item.token_ids, item.start):
                if token == PENDING:
                    assert item.num_new_tokens == 1, "an unknown token shares its row with others"
                    token = self.last_token[seq.slot]
                is_proposal = item.proposed_token_ids and position >= item.sample_position
                assert is_proposal or token == truth.token(position), (
                    f"sequence {seq.seq_id} computes another token at {position}"
                )
                before = self._entry(seq, position - 1)[2] if position else 0
                self._write(seq, position, (token, position, hash((before, token))))
            if item.sample_position is not None:
                tokens.append(self._verify(item))
                self.last_token[seq.slot] = tokens[-1][-1]
        return tokens

    def _verify(self, item) -> list[int]:
        """Sample after the known tokens and after each proposal, until a proposal is wrong."""
        seq, verified = item.sequence, []
        assert item.sample_positions[-1] == item.end, (
            "samples somewhere else than behind what it computed"
        )
        for position, proposal in zip(
            item.sample_positions, [*item.proposed_token_ids, None], strict=True
        ):
            too_short = position - seq.num_prompt_tokens < seq.params.min_tokens
            banned = seq.stop_ids if too_short else frozenset()
            verified.append(fake_sample(self._entry(seq, position - 1)[2], banned))
            if verified[-1] != proposal:
                break
        return verified

    def _check_history(self, seq: Sequence, truth: Truth, end: int) -> None:
        """Check that a step reads only this sequence's own history, written before."""
        for position in range(end):
            expected = (truth.token(position), position, truth.chains[position])
            found = self._entry(seq, position)
            assert found == expected, (
                f"sequence {seq.seq_id} reads {found} at {position} instead of {expected}"
            )

    def _entry(self, seq: Sequence, position: int):
        block, offset = divmod(position, self.pool.block_size)
        return self.content[seq.block_table[block]][offset]

    def _write(self, seq: Sequence, position: int, entry: tuple[int, int, int]) -> None:
        block, offset = divmod(position, self.pool.block_size)
        block_id = seq.block_table[block]
        assert self.manager.blocks[block_id].ref_count == 1, (
            f"writes to block {block_id}, which others share"
        )
        self.content[block_id][offset] = entry

    # --- what must hold ---------------------------------------------------------------------------

    def _check_plan(self, batch, oldest: int | None) -> None:
        ids = [item.sequence.seq_id for item in batch.items]
        assert ids == sorted(set(ids)), "a step takes each sequence once, oldest first"
        assert batch.num_tokens <= self.pool.budget, "over the token budget"
        for item in batch.items:
            seq = item.sequence
            assert item.num_new_tokens >= 1
            assert item.start + item.num_new_tokens == seq.num_computed_tokens
            assert (item.sample_position is None) == (seq.token_ids[-1] != PENDING)
            assert len(seq.block_table) == -(-seq.num_computed_tokens // self.pool.block_size), (
                "too many or few blocks"
            )
        for seq in batch.admitted:
            if seq.params.prompt_logprobs is not None or not self.pool.caching:
                assert seq.num_cached_tokens == 0, "took a hit that it must not take"
            assert seq.num_cached_tokens % self.pool.block_size == 0
            assert seq.num_cached_tokens < seq.num_computed_tokens
        assert not (batch.preempted and batch.has_proposals), "a guess in a step that preempts"
        assert batch.has_proposals == any(item.proposed_token_ids for item in batch.items)
        assert oldest is None or oldest not in [seq.seq_id for seq in batch.preempted], (
            "the oldest was preempted"
        )
        if oldest is not None and oldest not in ids:
            # It may rest only while its own results, or those of a block that it waits for, are in
            # flight.
            assert self.results, "the oldest request got nothing in this step"
        self.num_deferrals += self._deferred(batch)

    def _deferred(self, batch) -> bool:
        """Whether the head of the queue waited only for a block that another sequence computes."""
        scheduler = self.scheduler
        has_room = (
            len(scheduler.running) < self.pool.max_num_seqs and batch.num_tokens < self.pool.budget
        )
        if (
            not has_room
            or batch.preempted
            or not scheduler.waiting
            or scheduler.waiting[0].has_pending_token
        ):
            return False
        head = scheduler.waiting[0]
        return scheduler.is_being_computed(head, len(self.manager.find_cached_prefix(head)), batch)

    def _update(self, batch, tokens: list[list[int]]) -> None:
        verified = {id(i): len(t) for i, t in zip(batch.sampled, tokens, strict=True)}
        accepted = self.scheduler.update(batch, tokens)
        for item in accepted:
            seq = item.sequence
            assert seq.seq_id in self.live, "a token for a sequence that has ended"
            truth = self.truths[seq.seq_id]
            start = self.num_reported.get(seq.seq_id, seq.num_prompt_tokens)
            end = self.num_reported[seq.seq_id] = start + len(item.new_token_ids)
            assert item.sample_position == start < end, "a position is sampled twice, or never"
            self.num_late_accepted += item.num_preemptions != seq.num_preemptions
            assert list(item.new_token_ids) == [truth.token(i) for i in range(start, end)]
            assert seq.token_ids[start:end] == list(item.new_token_ids)
            self.verified_chains.update(truth.chains[start:end])
            self._note_proposals(item, verified[id(item)])
            if seq.is_finished:
                assert [t for t in seq.output_token_ids if t != PENDING] == truth.output
                assert seq.finish_reason == truth.reason
                assert seq.stop_reason == (truth.output[-1] if truth.reason == "stop" else None)
                del self.live[seq.seq_id]

    def _note_proposals(self, item, num_verified: int) -> None:
        if not item.proposed_token_ids:
            return
        seq, num_new = item.sequence, len(item.new_token_ids)
        self.num_right += num_new - 1
        self.num_wrong += len(item.proposed_token_ids) - (num_verified - 1)
        self.num_cut += num_verified - num_new
        self.num_late_verified += item.num_preemptions != seq.num_preemptions
        if seq.status is SequenceStatus.RUNNING:
            assert seq.num_computed_tokens == seq.num_tokens - 1, "rejected tokens were kept"
        else:
            assert not seq.block_table

    def check(self) -> None:
        """Check the classes' own invariants, that no request is lost, and the prefix cache.

        The prefix cache must describe the content of memory correctly.
        """
        self.scheduler.check()
        queued = {seq.seq_id for seq in [*self.scheduler.running, *self.scheduler.waiting]}
        assert queued == set(self.live), "a request is lost, or runs although it has ended"
        for seq in self.live.values():
            truth = self.truths[seq.seq_id]
            known = [token for token in seq.token_ids if token != PENDING]
            assert known == truth.tokens[: len(known)], (
                f"sequence {seq.seq_id} lost or repeated a token"
            )
            assert all(token == PENDING for token in seq.token_ids[len(known) :])
            assert len(seq.block_hashes) * self.pool.block_size <= len(known), (
                "a hash of tokens that nobody has verified"
            )
            right = truth.block_hashes(len(seq.block_hashes), self.pool.block_size)
            assert seq.block_hashes == right, (
                "a block's hash is not that of its tokens and all before"
            )
        for block_hash, block_id in self.manager.hash_to_block.items():
            entries = self.content[block_id]
            assert None not in entries, f"block {block_id} was registered before it was computed"
            assert {entry[2] for entry in entries} <= self.verified_chains, (
                f"block {block_id} was registered with tokens that nobody has verified"
            )
            assert tuple(entry[0] for entry in entries) == self.manager.blocks[block_id].token_ids
            chain = self.chain_of_hash.setdefault(block_hash, entries[-1][2])
            assert chain == entries[-1][2], (
                f"block {block_id} is registered for a prefix that it does not hold"
            )


def random_pool(rng: random.Random) -> Pool:
    return Pool(
        num_blocks=rng.randint(1, 10),
        block_size=rng.randint(1, 4),
        max_num_seqs=rng.randint(1, 5),
        budget=rng.choice([1, 2, 3, 5, 8, 16]),
        caching=rng.random() < 0.85,
    )


def random_prompt(rng: random.Random, known: list[list[int]], longest: int) -> list[int]:
    """A random prompt. Most begin like an earlier prompt, or continue like its text."""
    length = rng.randint(1, longest)
    prompt: list[int] = []
    if known and rng.random() < 0.75:
        source = rng.choice(known)
        prompt = source[: rng.randint(1, len(source))]
    return (prompt + [rng.randrange(VOCAB) for _ in range(length)])[:length]


def run_random(
    seed: int, *, late: bool, num_events: int = 40, proposing: bool = False, **classes
) -> Simulation:
    """Run one random history of adds, aborts and steps; then all requests have to finish.

    proposing: with proposals before each step.
    """
    rng, guesses = random.Random(seed), random.Random(seed + 1)
    sim = Simulation(random_pool(rng), late=late, **classes)
    for _ in range(num_events):
        event = rng.random()
        if event < 0.3 and len(sim.live) < 8:
            sim.add(
                random_prompt(
                    rng, [t.tokens for t in sim.truths.values()], sim.pool.max_num_tokens - 1
                ),
                max_tokens=rng.randint(1, 12),
                stop_ids=[rng.randrange(VOCAB)] if rng.random() < 0.4 else [],
                min_tokens=rng.randint(0, 3) if rng.random() < 0.3 else 0,
                prompt_logprobs=0 if rng.random() < 0.1 else None,
            )
        elif event < 0.35 and sim.live:
            sim.abort(rng.choice(list(sim.live.values())))
        elif event < 0.36:
            sim.manager.reset_prefix_cache()
        elif event < 0.37:
            sim.interrupt()
        else:
            if proposing:
                sim.propose_at_random(guesses)
            sim.step()
    sim.drain(guesses if proposing else None)
    return sim


def run_many(seeds, late: bool, **options) -> dict[str, int]:
    """Counters over many random histories; a test asserts which situations occurred."""
    total = dict.fromkeys(
        ("preemptions", "hits", "chunks", "mixed", "finished", "deferrals", "late_accepted"), 0
    )
    total |= dict.fromkeys(("right", "wrong", "cut", "late_verified"), 0)
    for seed in seeds:
        sim = run_random(seed, late=late, **options)
        stats = sim.scheduler.stats
        for name, value in (
            ("preemptions", stats.num_preemptions),
            ("hits", stats.prefix_cache_hits),
            ("chunks", stats.num_chunks),
            ("mixed", stats.num_mixed_steps),
            ("finished", len(sim.truths)),
            ("deferrals", sim.num_deferrals),
            ("late_accepted", sim.num_late_accepted),
            ("right", sim.num_right),
            ("wrong", sim.num_wrong),
            ("cut", sim.num_cut),
            ("late_verified", sim.num_late_verified),
        ):
            total[name] += value
    return total


def make_seq(seq_id: int, tokens: list[int], **changes) -> Sequence:
    return Sequence(seq_id, list(tokens), SamplingParams(max_tokens=None), **changes)


def compute(manager: BlockManager, seq: Sequence, end: int | None = None) -> list[int]:
    """Allocate, compute and register a sequence's tokens up to end, as a step would.

    Returns its block table.
    """
    end = seq.num_tokens if end is None else end
    start = seq.num_computed_tokens
    prefix = manager.find_cached_prefix(seq) if not seq.block_table else []
    assert manager.allocate(seq, end, prefix)
    seq.num_computed_tokens = end
    manager.register_computed(seq, max(start, len(prefix) * manager.block_size), end)
    return list(seq.block_table)


def release(manager: BlockManager, *seqs: Sequence) -> None:
    for seq in seqs:
        manager.free(seq)
        seq.num_computed_tokens = 0
