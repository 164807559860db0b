"""A fake model that knows what a KV cache would hold, and random requests served with it.

The fake model knows what a KV cache would hold: every entry is (token, position, chain), where
chain hashes all tokens up to there *as they were read through the block table*. The next token is a
function of the last chain, so a stale, foreign or misplaced block changes the text; and each
sequence's true text is known beforehand, whatever the schedule. Results arrive at once, or one step
late (step N + 1 is planned and run before step N is reported).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import PENDING, Sequence, max_steps
from minivllm.sampling_params import SamplingParams

VOCAB = 3  # few tokens, so that prompts and outputs share prefixes by chance as well


class Truth:
    """The text of one sequence, from its request alone: token i follows from the tokens before
    it.
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
        """The token at a position; beyond the end, what a step computed for nothing would
        sample.
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
        """The hashes of the first so many blocks of the true text."""
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
    """What an engine of this size would be made with."""

    num_blocks: int = 8
    block_size: int = 2
    max_num_seqs: int = 4
    budget: int = 8
    caching: bool = True

    @property
    def max_num_tokens(self) -> int:
        """The longest sequence it can hold; the last token is never fed back."""
        return self.num_blocks * self.block_size + 1


class Simulation:
    """A scheduler, its block manager, and the fake model; asserts everything that must hold at each
    step.
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
        self.manager = manager_cls(pool.num_blocks, pool.block_size, pool.caching)
        self.scheduler = scheduler_cls(self.manager, pool.max_num_seqs, pool.budget)
        #: What memory holds: block -> offset -> (token, position, chain), or None where nothing was
        #: written yet.
        self.content = [[None] * pool.block_size for _ in range(pool.num_blocks)]
        self.last_token = [None] * pool.max_num_seqs
        self.truths: dict[int, Truth] = {}
        self.live: dict[int, Sequence] = {}
        self.results: deque = deque()
        self.num_steps = self.num_deferrals = self.num_late_accepted = 0
        self.chain_of_hash: dict[int, int] = {}
        #: Tokens of each sequence, the prompt's included, whose values have been brought.
        self.num_reported: dict[int, int] = {}

    # --- what happens -----------------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        stop_ids=(),
        min_tokens: int = 0,
        prompt_logprobs: int | None = None,
    ) -> Sequence:
        """A request, cut to what the pool can hold, as the engine's own checks would."""
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
        self.scheduler.add(seq)
        return seq

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
        """A step fails while it is computed, maybe after it wrote: the results in flight never
        arrive.
        """
        batch = self.scheduler.schedule()
        self._execute(batch)
        self.results.clear()
        self.scheduler.recover()
        assert not self.scheduler.running
        assert not any(seq.has_pending_token for seq in self.live.values())
        self.check()

    def step(self) -> None:
        """Plan and run a step; report it at once, or report the one before."""
        if not self.live and not self.results:
            assert not self.scheduler.schedule(), "planned a step for nobody"
            return
        self.num_steps += 1
        oldest = min(self.live, default=None)
        batch = self.scheduler.schedule()
        self._check_plan(batch, oldest)
        if batch:
            self.results.append((batch, self._execute(batch)))
        else:
            assert self.results, "stalled: nothing planned, nothing in flight, requests unfinished"
        self.check()
        if self.results and (not self.late or not batch or len(self.results) > 1):
            self._update(*self.results.popleft())
            self.check()

    def drain(self) -> None:
        """Run until everything has finished, within the stated bound; then nothing may be left
        over.
        """
        left = max_steps(
            (s.num_prompt_tokens, s.max_num_tokens - s.num_prompt_tokens)
            for s in self.live.values()
        )
        while self.live or self.results:
            if self.live:
                assert left > 0, (
                    f"requests {sorted(self.live)} starve: the bound of max_steps is reached"
                )
            left -= 1
            self.step()
        assert not self.scheduler.has_unfinished
        assert self.manager.num_free_blocks == self.pool.num_blocks, "blocks leaked"
        assert sorted(self.scheduler._free_slots) == list(range(self.pool.max_num_seqs)), (
            "slots leaked"
        )

    # --- the fake model ---------------------------------------------------------------------------

    def _execute(self, batch) -> list[int]:
        tokens = []
        for item in batch.items:
            seq, truth = item.sequence, self.truths[item.sequence.seq_id]
            self._check_history(seq, truth, item.start)
            for position in range(item.start, item.end):
                token = seq.token_ids[position]
                if token == PENDING:
                    assert item.num_new_tokens == 1, "an unknown token shares its row with others"
                    token = self.last_token[seq.slot]
                assert token == truth.token(position), (
                    f"sequence {seq.seq_id} computes another token at {position}"
                )
                before = self._entry(seq, position - 1)[2] if position else 0
                self._write(seq, position, (token, position, hash((before, token))))
            if item.sample_position is not None:
                assert item.sample_position == item.end, (
                    "samples somewhere else than behind what it computed"
                )
                too_short = item.end - seq.num_prompt_tokens < seq.params.min_tokens
                token = fake_sample(
                    self._entry(seq, item.end - 1)[2], seq.stop_ids if too_short else frozenset()
                )
                self.last_token[seq.slot] = token
                tokens.append(token)
        return tokens

    def _check_history(self, seq: Sequence, truth: Truth, end: int) -> None:
        """What a step reads must be this sequence's own history, written before."""
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
        assert oldest is None or oldest not in [seq.seq_id for seq in batch.preempted], (
            "the oldest was preempted"
        )
        if oldest is not None and oldest not in ids:
            # It may rest only while results of it, or of a block that it waits for, are in flight.
            assert self.results, "the oldest request got nothing in this step"
        self.num_deferrals += self._deferred(batch)

    def _deferred(self, batch) -> bool:
        """Whether the head of the queue stayed there only to wait for a block that somebody else
        computes.
        """
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
        return scheduler._is_being_computed(head, len(self.manager.find_cached_prefix(head)), batch)

    def _update(self, batch, tokens: list[int]) -> None:
        accepted = self.scheduler.update(batch, tokens)
        for item in accepted:
            seq = item.sequence
            assert seq.seq_id in self.live, "a token for a sequence that has ended"
            self.num_reported[seq.seq_id] = (
                self.num_reported.get(seq.seq_id, seq.num_prompt_tokens) + 1
            )
            assert item.sample_position == self.num_reported[seq.seq_id] - 1, (
                "a position is sampled twice, or never"
            )
            self.num_late_accepted += item.generation != seq.num_preemptions
            assert seq.token_ids[item.sample_position] == self.truths[seq.seq_id].token(
                item.sample_position
            )
            if seq.is_finished:
                truth = self.truths[seq.seq_id]
                assert [t for t in seq.output_token_ids if t != PENDING] == truth.output
                assert seq.finish_reason == truth.reason
                assert seq.stop_reason == (truth.output[-1] if truth.reason == "stop" else None)
                del self.live[seq.seq_id]

    def check(self) -> None:
        """The classes' own invariants; nobody lost; and the prefix cache tells the truth about
        memory.
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
            right = truth.block_hashes(len(seq.block_hashes), self.pool.block_size)
            assert seq.block_hashes == right, (
                "a block's hash is not that of its tokens and all before"
            )
        for block_hash, block_id in self.manager.hash_to_block.items():
            entries = self.content[block_id]
            assert None not in entries, f"block {block_id} was registered before it was computed"
            assert tuple(entry[0] for entry in entries) == self.manager.blocks[block_id].token_ids
            chain = self.chain_of_hash.setdefault(block_hash, entries[-1][2])
            assert chain == entries[-1][2], (
                f"block {block_id} is registered for a prefix that it does not hold"
            )


# --- random requests, from a seed: fast, many -----------------------------------------------------


def random_pool(rng: random.Random) -> Pool:
    return Pool(
        num_blocks=rng.randint(1, 10),
        block_size=rng.randint(1, 4),
        max_num_seqs=rng.randint(1, 5),
        budget=rng.choice([1, 2, 3, 5, 8, 16]),
        caching=rng.random() < 0.85,
    )


def random_prompt(rng: random.Random, known: list[list[int]], longest: int) -> list[int]:
    """Most prompts begin as an earlier one did, or as its text went on."""
    length = rng.randint(1, longest)
    prompt: list[int] = []
    if known and rng.random() < 0.75:
        source = rng.choice(known)
        prompt = source[: rng.randint(1, len(source))]
    return (prompt + [rng.randrange(VOCAB) for _ in range(length)])[:length]


def run_random(seed: int, *, late: bool, num_events: int = 40, **classes) -> Simulation:
    """One random history of adds, aborts and steps; then everything has to finish."""
    rng = random.Random(seed)
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
            sim.step()
    sim.drain()
    return sim


def run_many(seeds, late: bool, **classes) -> dict[str, int]:
    """Counters over many random histories, so that a test can assert which situations it met."""
    total = dict.fromkeys(
        ("preemptions", "hits", "chunks", "mixed", "finished", "deferrals", "late_accepted"), 0
    )
    for seed in seeds:
        sim = run_random(seed, late=late, **classes)
        stats = sim.scheduler.stats
        for name, value in (
            ("preemptions", stats.num_preemptions),
            ("hits", stats.prefix_cache_hits),
            ("chunks", stats.num_chunks),
            ("mixed", stats.num_mixed_steps),
            ("finished", len(sim.truths)),
            ("deferrals", sim.num_deferrals),
            ("late_accepted", sim.num_late_accepted),
        ):
            total[name] += value
    return total


def make_seq(seq_id: int, tokens: list[int], **changes) -> Sequence:
    return Sequence(seq_id, list(tokens), SamplingParams(max_tokens=None), **changes)


def compute(manager: BlockManager, seq: Sequence, end: int | None = None) -> list[int]:
    """Allocate, compute and register a sequence's tokens up to end, as a step would; returns its
    block table.
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
