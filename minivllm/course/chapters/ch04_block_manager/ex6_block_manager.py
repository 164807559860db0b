"""04.6: your block manager, in the engine."""

from __future__ import annotations

import inspect
import random
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.course.grading.with_engine import engine_agrees
from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import PENDING, Sequence, max_steps
from minivllm.sampling_params import SamplingParams

NUM_HISTORIES = 120


_METHODS = ("find_cached_prefix", "allocate", "register_computed", "free")


def _seq(seq_id: int, tokens: abc.Sequence[int], **params: Any) -> Sequence:
    return Sequence(seq_id, list(tokens), SamplingParams(max_tokens=None, **params))


def _compute(manager: Any, seq: Sequence, end: int | None = None) -> list[int]:
    """Find, allocate, "compute" and register the tokens of seq up to end, as a step of the
    engine does.
    """
    end, start = seq.num_tokens if end is None else end, seq.num_computed_tokens
    prefix = _find(manager, seq) if not seq.block_table else []
    start = max(start, len(prefix) * manager.block_size)
    given = manager.allocate(seq, end, prefix)
    _expect_answer(given)
    expect(
        given,
        "room-refused",
        f"allocate said False for {end} tokens in blocks of {manager.block_size}, with"
        f" {len(prefix)} blocks from the cache.\nThere was room. Count only the blocks that are"
        " still missing.",
    )
    seq.num_computed_tokens = end
    _register(manager, seq, start, end)
    return list(seq.block_table)


def _expect_answer(given: Any) -> None:
    """What `allocate` returns must be True or False."""
    expect(
        given is not None,
        "nothing-returned",
        "allocate returned None, where it should say True or False: is there room?\nThere was, and"
        " the blocks may well be in the table: does every way through it end in a `return`, the one"
        " where nothing is missing as well?",
    )
    expect(
        given in (True, False),
        "wrong-type",
        f"allocate returned {show(given)}.\nIt should say True or False: is there room?",
    )


def _rule_answers(answer: type) -> None:
    """The most frequent slip, before others blur it: a `return True` is missing."""
    manager, seq = answer(8, 4), _seq(0, range(100, 120))
    for num_tokens in (5, 6, 9):  # two blocks are new, none is, one is
        _expect_answer(manager.allocate(seq, num_tokens))


def _release(manager: Any, *seqs: Sequence) -> None:
    for seq in seqs:
        manager.free(seq)
        expect(
            not seq.block_table,
            "table-not-cleared",
            f"After free, the sequence still has the table {seq.block_table}.\nIts blocks belong to"
            " others now: clear seq.block_table.",
        )
        seq.num_computed_tokens = 0


def _not_extended(method: str) -> Mistake:
    return Mistake(
        "names-not-extended",
        f"{method} needs the names of the sequence's blocks, and its seq.block_hashes is"
        " empty.\nThe sequence comes with an empty list, and only your code fills it: call"
        " self._extend_names(seq) before you look.",
    )


@contextmanager
def _names_at_hand(method: str, seq: Sequence) -> Iterator[None]:
    """An IndexError in this method, while seq has no names, comes from looking for them."""
    try:
        yield
    except IndexError as error:
        if seq.block_hashes:
            raise
        raise _not_extended(method) from error


def _register(manager: Any, seq: Sequence, start: int, end: int) -> None:
    with _names_at_hand("register_computed", seq):
        manager.register_computed(seq, start, end)


def _find(manager: Any, seq: Sequence) -> list[int]:
    before = list(seq.block_table)
    with _names_at_hand("find_cached_prefix", seq):
        found = manager.find_cached_prefix(seq)
    expect(
        isinstance(found, list | tuple),
        "wrong-type",
        f"find_cached_prefix returned {show(found)}.\nIt should be a list of block ids, [] where"
        " nothing is found.",
    )
    expect(
        seq.block_table == before,
        "changed-by-looking",
        f"find_cached_prefix changed the sequence's table to {seq.block_table}.\nIt only looks: the"
        " scheduler may decide not to admit the sequence. allocate takes.",
    )
    return list(found)


def check_block_manager(answer: type) -> str:
    expect(
        inspect.isclass(answer),
        "wrong-type",
        f"Expected a class, got {show(answer)}.\nThe engine makes the object itself.",
    )
    borrowed = [
        name for name in _METHODS if getattr(answer, name, None) is getattr(BlockManager, name)
    ]
    expect(
        not borrowed,
        "not-yours",
        f"{', '.join(borrowed)}: inherited from the package's BlockManager.\nHere you write them.",
    )
    rules: list[Callable[[type], None]] = [
        _rule_answers,
        _rule_growth,
        _rule_sharing,
        _rule_reuse,
        _rule_forgetting,
        _rule_one_token_left,
        _rule_first_miss,
        _rule_chain,
        _rule_collision,
        _rule_computed_first,
        _rule_revival,
        _rule_eviction,
        _rule_pending,
        _rule_logprobs,
        _rule_off,
    ]
    for rule in rules:
        rule(answer)
    for seed in range(NUM_HISTORIES):
        _Simulation(answer, seed).run()
    line = engine_agrees(block_manager_cls=answer)
    _check_in_engine(answer)
    return f"{len(rules) - 1} rules, {NUM_HISTORIES} random histories, and {line}"


def _rule_growth(answer: type) -> None:
    manager, seq = answer(8, 4), _seq(0, range(100, 120))
    expect(
        manager.num_free_blocks == 8,
        "wrong-values",
        f"A new pool of 8 blocks has num_free_blocks = {manager.num_free_blocks}.\nAll are free.",
    )
    sizes = []
    for num_tokens in (1, 3, 4, 5, 8, 9, 16):
        expect(
            manager.allocate(seq, num_tokens),
            "room-refused",
            f"allocate(seq, {num_tokens}) said False, with a pool of 32 tokens.\nseq has"
            f" {len(seq.block_table)} blocks; only what is missing must be free.",
        )
        sizes.append(len(seq.block_table))
    expect(
        sizes == [1, 1, 1, 2, 2, 3, 4],
        "wrong-boundary",
        f"For 1, 3, 4, 5, 8, 9 and 16 tokens in blocks of 4 the table had {sizes} blocks.\nExpected"
        " [1, 1, 1, 2, 2, 3, 4]: the quotient, rounded up. At an exact multiple the last block is"
        " full, not missing, and not yet followed by another.",
    )
    manager, seq = answer(4, 4), _seq(0, range(100, 120))
    expect(
        manager.allocate(seq, 16),
        "room-refused",
        "16 tokens, a new pool of 4 blocks of 4, and allocate said False.\nThe last free block may"
        " be taken, too.",
    )
    expect(
        manager.num_free_blocks == 0 and len(set(seq.block_table)) == 4,
        "wrong-values",
        f"Four blocks of four are taken: table {seq.block_table}, num_free_blocks"
        f" {manager.num_free_blocks}.\nExpected four different ones, and none left.",
    )
    other = _seq(1, range(8))
    given = manager.allocate(other, 1)
    expect(
        given is False,
        "nothing-returned" if given is None else "wrong-values",
        f"The pool is full, and allocate returned {show(given)}.\nIt should say False, and change"
        " nothing.",
    )
    _release(manager, seq)
    expect(
        manager.num_free_blocks == 4,
        "leaked",
        f"The only sequence is gone, and {manager.num_free_blocks} of 4 blocks are free.\nA block"
        " that was allocated has count 1: free must bring it to 0, and put it back.",
    )
    long = _seq(2, range(20))
    expect(
        not manager.allocate(long, 20),
        "wrong-values",
        "A pool of 16 tokens, and allocate gave room for 20.\nCount again.",
    )
    expect(
        not long.block_table and manager.num_free_blocks == 4,
        "not-all-or-nothing",
        "20 tokens do not fit into 4 blocks of 4. allocate said so, but left the table"
        f" {long.block_table} and {manager.num_free_blocks} free blocks.\nLook first, then take:"
        " the scheduler goes on as if nothing had happened.",
    )


def _rule_sharing(answer: type) -> None:
    manager = answer(8, 2)
    first, second = _seq(0, [1, 2, 3, 4, 5]), _seq(1, [1, 2, 3, 4, 6])
    table = _compute(manager, first)
    found = _find(manager, second)
    if not found and not second.block_hashes:
        raise _not_extended("find_cached_prefix")
    expect(
        found == table[:2],
        "not-found",
        "A prompt begins with two full blocks that a running sequence has computed (its table is"
        f" {table}), and find_cached_prefix gave {found}.\nBlocks in use can be shared, too:"
        " register_computed names them as soon as they are computed.",
    )
    shared = _compute(manager, second)
    expect(
        shared[:2] == table[:2] and shared[2] not in table,
        "wrong-values",
        f"The second prompt shares two blocks with the table {table} and got {shared}.\nThe prefix"
        " comes first, in order, and the rest is its own.",
    )
    expect(
        manager.num_free_blocks == 4,
        "wrong-values",
        f"Two tables, {table} and {shared}, in a pool of 8: num_free_blocks is"
        f" {manager.num_free_blocks}.\nExpected 4, for a shared block counts once.",
    )
    _release(manager, first)
    expect(
        manager.num_free_blocks == 5,
        "freed-while-shared" if manager.num_free_blocks > 5 else "leaked",
        f"The first of two sequences that share blocks {table[:2]} is gone, and"
        f" {manager.num_free_blocks} of 8 blocks are free.\nExpected 5: only the block that it had"
        " alone comes back. Count the owners.",
    )
    _release(manager, second)
    expect(
        manager.num_free_blocks == 8,
        "leaked",
        f"Nobody is left, and {manager.num_free_blocks} of 8 blocks are free.\nEach table that"
        " lists a block counts once, and is subtracted once.",
    )


def _rule_reuse(answer: type) -> None:
    manager = answer(6, 2)
    seq = _seq(0, [1, 2, 3, 4, 5])
    table = _compute(manager, seq)
    _release(manager, seq)
    found = _find(manager, _seq(1, [1, 2, 3, 4, 9, 9]))
    expect(
        found == table[:2],
        "forgets-when-freed",
        f"A sequence with the table {table} is done. The next one begins alike, and"
        f" find_cached_prefix gave {found}.\nExpected {table[:2]}: freed blocks keep their names,"
        " and what is in them, until somebody takes them.",
    )


def _rule_one_token_left(answer: type) -> None:
    for num_tokens, expected in ((4, 1), (5, 2), (2, 0)):
        manager = answer(6, 2)
        seq = _seq(0, range(10, 14))
        _compute(manager, seq)
        _release(manager, seq)
        found = _find(manager, _seq(1, range(10, 10 + num_tokens)))
        text = (
            f"Four tokens are cached in blocks of 2; a prompt of {num_tokens} that begins alike"
            f" gets {len(found)} "
        )
        expect(
            len(found) <= expected,
            "nothing-left-to-compute",
            f"{text}blocks.\nAt least one token must be left: without computing it there are no"
            " logits to sample from.",
        )
        expect(
            len(found) == expected,
            "block-given-up",
            f"{text}blocks.\nExpected {expected}: with a token left to compute, every full block"
            " before it may be used.",
        )


def _rule_first_miss(answer: type) -> None:
    manager = answer(6, 2)
    tokens = [1, 2, 3, 4, 5, 6]
    one, other, stranger = _seq(0, tokens), _seq(1, tokens), _seq(2, [8] * 4)
    # Both compute the same text side by side; the first has come to token 4 when the second is
    # through.
    expect(
        manager.allocate(one, 6) and manager.allocate(other, 6),
        "room-refused",
        "Two prompts of 6 tokens, a new pool of 6 blocks of 2, and allocate said False.\nThey fit.",
    )
    _register(manager, one, 0, 4)
    _register(manager, other, 0, 6)
    head, table = one.block_table[0], list(other.block_table)
    manager.free(one)
    manager.allocate(stranger, 4)
    found = _find(manager, _seq(3, [*tokens, 7]))
    # Whoever lets the newer blocks take the names finds all three of them.
    expect(
        len(found) < 2 or found == table,
        "hit-after-a-miss",
        f"Of the three blocks of a prompt the first (block {head}) and the third (block {table[2]})"
        " are in the cache; the second was taken for another text. find_cached_prefix gave"
        f" {found}.\nThe cached part is a prefix: it ends at the first miss, whatever is known"
        " behind it.",
    )


def _rule_chain(answer: type) -> None:
    manager = answer(12, 2)
    _compute(manager, _seq(0, [1, 1, 5, 5, 9]))
    _compute(manager, _seq(1, [2, 2, 7, 7, 9]))
    for tokens, expected in (([5, 5, 9], 0), ([2, 2, 5, 5, 9], 1)):
        found = _find(manager, _seq(2, tokens))
        expect(
            len(found) <= expected,
            "unchained",
            f"[1, 1, 5, 5] and [2, 2, 7, 7] are cached in blocks of 2, and the prompt {tokens}"
            f" finds {len(found)} blocks.\nExpected {expected}. Keys and values depend on all that"
            " came before, so a block's name must, too: chain it.",
        )


@contextmanager
def _colliding_hashes(answer: type) -> Iterator[bool]:
    """All first blocks get one name: where the class takes `hash_block` from its module. Yields
    whether it does.
    """
    spaces = [
        vars(answer)[name].__globals__
        for name in vars(answer)
        if inspect.isfunction(vars(answer)[name])
    ]
    spaces = [space for space in spaces if space.get("hash_block") is hash_block]
    for space in spaces:
        space["hash_block"] = lambda previous, tokens: (
            42 if previous is None else hash_block(previous, tokens)
        )
    try:
        yield bool(spaces)
    finally:
        for space in spaces:
            space["hash_block"] = hash_block


def _rule_collision(answer: type) -> None:
    with _colliding_hashes(answer) as works:
        if not works:
            return
        manager = answer(8, 2)
        _compute(manager, _seq(0, [1, 2, 7, 7, 3]))
        other = _seq(1, [3, 4, 7, 7, 3])
        found = _find(manager, other)
        expect(
            found == [],
            "hash-trusted",
            "For this test [1, 2] and [3, 4] have the same hash. [1, 2, …] is cached, and [3, 4,"
            f" …] finds {found}.\nIt would read another prompt's keys and values. Keep the tokens"
            " of a named block, and compare them.",
        )
        _compute(manager, other)
        _release(manager, other)
        found = _find(manager, _seq(2, [1, 2, 7, 7, 3]))
        expect(
            len(found) == 2,
            "name-overwritten",
            "For this test [1, 2] and [3, 4] have the same hash. The second came later, and now"
            f" the first finds {found}.\nExpected its two blocks. A name that is in the table"
            " already stays where it is; the newcomer gets none.",
        )


def _rule_computed_first(answer: type) -> None:
    manager = answer(8, 4)
    writer = _seq(0, range(10, 22))
    manager.allocate(writer, 12)
    found = _find(manager, _seq(1, range(10, 24)))
    expect(
        found == [],
        "registered-before-computed",
        "Blocks were allocated for a prompt and nothing has been computed, and another prompt"
        f" finds {found} in the cache.\nIt would read what is not there yet. Name a block in"
        " register_computed, not in allocate.",
    )
    for end, expected in ((3, 0), (4, 1), (7, 1), (8, 2)):
        _register(manager, writer, {3: 0, 4: 3, 7: 4, 8: 7}[end], end)
        found = _find(manager, _seq(1, range(10, 24)))
        if expected and not found and not writer.block_hashes:
            raise _not_extended("register_computed")
        text = (
            f"{end} of 12 tokens are computed, in blocks of 4, and {len(found)} blocks can be found"
        )
        expect(
            len(found) <= expected,
            "registered-before-computed",
            f"{text}.\nExpected {expected}: only blocks whose last token is computed are full,"
            " whatever the sequence has been allocated.",
        )
        expect(
            len(found) == expected,
            "registered-too-late",
            f"{text}.\nExpected {expected}: register_computed was called up to {end}, token by"
            " token too, and a block is full when its last token comes.",
        )


def _rule_revival(answer: type) -> None:
    manager = answer(3, 2)
    seq = _seq(0, [1, 2, 3, 4])
    table = _compute(manager, seq)
    _release(manager, seq)
    back = _seq(1, [1, 2, 3, 4, 5, 6, 7])
    prefix = _find(manager, back)
    try:
        got = manager.allocate(back, 7, prefix)
    except (IndexError, KeyError) as error:
        got = f"{type(error).__name__}: {error}"
    expect(
        got is False and not back.block_table and manager.num_free_blocks == 3,
        "revived-not-counted",
        f"Three blocks are free, two of them are the prefix {prefix} itself, and two more are"
        f" needed. allocate said {got}, left the table {back.block_table} and"
        f" {manager.num_free_blocks} free.\nExpected False, and nothing changed: a cached block"
        " that the prefix revives is no longer free for the rest.",
    )
    expect(
        manager.allocate(back, 6, prefix),
        "room-refused",
        "Three blocks are free, two of them are the prefix, and one more is needed: allocate said"
        " False.\nThat fits.",
    )
    expect(
        manager.num_free_blocks == 0 and len(set(back.block_table)) == 3,
        "still-in-the-queue",
        f"A sequence revived the cached blocks {table} and took the third of three. Its table is"
        f" {back.block_table}, and num_free_blocks is {manager.num_free_blocks}.\nExpected three"
        " different blocks and none free: take a revived block off the free list.",
    )
    _release(manager, back)


def _rule_eviction(answer: type) -> None:
    manager = answer(4, 2)
    seq = _seq(0, [1, 2, 3])
    table = _compute(manager, seq)
    _release(manager, seq)
    other = _seq(1, [9] * 6)
    manager.allocate(other, 6)
    expect(
        len(_find(manager, _seq(2, [1, 2, 3]))) == 1,
        "cached-evicted-first",
        f"Of four blocks one ({table[0]}) is cached and three hold nothing known. Three were taken,"
        " and the cached one was among them.\nTake blocks of unknown content first: they are worth"
        " nothing.",
    )
    manager = answer(2, 2)
    known, unknown = _seq(0, [1, 2]), _seq(1, [9])
    _compute(manager, known)
    _compute(manager, unknown)
    _release(manager, known)
    _release(manager, unknown)
    manager.allocate(_seq(2, [8]), 1)
    expect(
        len(_find(manager, _seq(3, [1, 2, 3]))) == 1,
        "cached-evicted-first",
        "Two blocks are free: one that is cached, and one, freed after it, that was never full, so"
        " nobody can find what is in it. One was taken, and it was the cached one.\nTake blocks of"
        " unknown content first, whenever they were freed.",
    )
    manager = answer(3, 2)
    seq = _seq(0, [1, 2, 3, 4, 5, 6])
    _compute(manager, seq)
    _release(manager, seq)
    manager.allocate(_seq(1, [9, 9]), 2)
    left = len(_find(manager, _seq(2, [1, 2, 3, 4, 5, 6, 7])))
    expect(
        left == 2,
        "heads-first",
        f"Three cached blocks of one prompt, and one of them is taken: {left} can still be"
        " found.\nExpected 2. Evict the tail before the head (without its head nothing of a prefix"
        " is found): free a table from its end.",
    )
    manager = answer(3, 2)
    seqs = [_seq(i, [i, i]) for i in range(3)]
    for seq in seqs:
        _compute(manager, seq)
    for i in (1, 0, 2):
        _release(manager, seqs[i])
    again = _seq(3, [1, 1, 7])  # used once more, and so the most recent
    manager.allocate(again, 2, _find(manager, again))
    _release(manager, again)
    order = []
    for i in range(3):
        manager.allocate(_seq(10 + i, [8, 8]), 2)
        kept = [k for k in range(3) if _find(manager, _seq(20, [k, k, 7]))]
        order += [k for k in range(3) if k not in kept and k not in order]
    text = (
        "Prompts 0, 1, 2 were released in the order 1, 0, 2; then 1 was used once more. They were"
        f" evicted: {order}"
    )
    name = {(1, 0, 2): "first-in-first-out", (1, 2, 0): "newest-first"}.get(
        tuple(order), "wrong-order"
    )
    expect(
        order == [0, 2, 1],
        name,
        f"{text}.\nExpected [0, 2, 1]: the least recently *used* goes first, and using 1 again made"
        " it the most recent.",
    )


def _rule_forgetting(answer: type) -> None:
    manager = answer(1, 2)
    seq = _seq(0, [1, 2])
    _compute(manager, seq)
    _release(manager, seq)
    manager.allocate(_seq(1, [3, 4]), 1)
    found = _find(manager, _seq(2, [1, 2, 3]))
    expect(
        found == [],
        "name-outlives-content",
        "The only block held [1, 2] and was taken for something else, and [1, 2, …] still finds"
        f" {found}.\nForget a block's name when it is handed out, in every table that has it.",
    )


def _rule_pending(answer: type) -> None:
    """The engine plans one step ahead: when the blocks of a step are named, its last two tokens
    may be unknown.
    """
    manager, seq = answer(8, 2), _seq(0, [1, 2, 3])
    manager.allocate(seq, 3)
    seq.token_ids.append(PENDING)  # the first step samples it
    manager.allocate(seq, 4)
    seq.token_ids.append(PENDING)  # the second step is planned
    _register(manager, seq, 0, 3)
    seq.token_ids[3] = 4
    _register(manager, seq, 3, 4)
    found = _find(manager, _seq(1, [1, 2, 3, 4, 5]))
    expect(
        found == seq.block_table[:2],
        "pending-token-named",
        "[1, 2, 3] was answered with 4, in blocks of 2, and the prompt [1, 2, 3, 4, 5] finds"
        f" {found}, expected {seq.block_table[:2]}.\nWhile 4 was on its way there was a -1"
        " (PENDING) in its place, and one more behind it for the step after. Was a block named by"
        " then? Name none that has an unknown token.",
    )


def _rule_logprobs(answer: type) -> None:
    manager = answer(4, 2)
    _compute(manager, _seq(0, [1, 2, 3, 4, 5]))
    found = _find(manager, _seq(1, [1, 2, 3, 4, 5], prompt_logprobs=0))
    expect(
        found == [],
        "hits-for-prompt-logprobs",
        f"A request that wants the log-probabilities of its prompt found {found} in the"
        " cache.\nThose come from computing the prompt. With seq.params.prompt_logprobs other than"
        " None, nothing may be taken from the cache.",
    )


def _rule_off(answer: type) -> None:
    manager = answer(4, 2, False)
    _compute(manager, _seq(0, [1, 2, 3, 4, 5]))
    found = _find(manager, _seq(1, [1, 2, 3, 4, 5]))
    expect(
        found == [],
        "caching-not-off",
        f"With enable_prefix_caching=False a prompt found {found} in the cache.\nThen"
        " find_cached_prefix finds nothing.",
    )


class _Simulation:
    """The real scheduler over a learner's block manager, and a fake model that knows what memory
    would hold.

    Every entry of the fake KV cache is a hash of all tokens up to there, as they were read through
    the block table: a stale, foreign or misplaced block is noticed at once.
    """

    def __init__(self, answer: type, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.num_blocks, self.size = rng.randint(2, 10), rng.randint(1, 4)
        self.manager = answer(self.num_blocks, self.size, rng.random() < 0.9)
        self.scheduler = Scheduler(self.manager, rng.randint(1, 4), rng.choice([2, 5, 16]))
        self.memory: dict[tuple[int, int], int] = {}
        self.seqs: list[Sequence] = []

    def add(self) -> None:
        rng, room = self.rng, self.num_blocks * self.size
        known = rng.choice(self.seqs).token_ids if self.seqs else []
        tokens = [t for t in known[: rng.randint(0, len(known))] if t >= 0]
        tokens = [*tokens, *(rng.randrange(2) for _ in range(rng.randint(1, 6)))][:room]
        seq = _seq(len(self.seqs), tokens)
        seq.max_num_tokens = min(len(tokens) + rng.randint(1, 6), room + 1)
        self.seqs.append(seq)
        self.scheduler.add(seq)

    def run(self) -> None:
        """One random history, to its end; raises Mistake."""
        for _ in range(30):
            self.add() if self.rng.random() < 0.4 else self.step()
        limit = max_steps((s.num_prompt_tokens, 7) for s in self.seqs) + 50
        while self.scheduler.has_unfinished:
            limit -= 1
            expect(
                limit,
                "stalled",
                "Random requests do not come to an end: the scheduler waits for blocks that never"
                " come.\nIs allocate right about the room that there is, and does free give"
                " everything back?",
            )
            self.step()
        expect(
            self.manager.num_free_blocks == self.num_blocks,
            "leaked",
            f"All random requests are done, and {self.manager.num_free_blocks} of {self.num_blocks}"
            " blocks are free.\nSome count never came down to 0, or came down twice.",
        )

    def step(self) -> None:
        if not self.scheduler.has_unfinished:
            return
        batch = self.scheduler.schedule()
        self._check_tables()
        tokens = []
        for item in batch.items:
            seq = item.sequence
            for position in range(item.start):
                found = self.memory.get(self._place(seq, position))
                expect(
                    found == self._entry(seq, position),
                    "foreign-content",
                    f"In a random history, sequence {seq.seq_id} reads at position {position} what"
                    f" belongs to another text.\nIts table is {seq.block_table}, in blocks of"
                    f" {self.size}. Some block was handed out while it was in use, or found under a"
                    " name that is not its own.",
                )
            for position in range(item.start, item.end):
                self.memory[self._place(seq, position)] = self._entry(seq, position)
            if item.sample_position is not None:
                tokens.append([hash((self._entry(seq, item.end - 1), 7)) % 2])
        self.scheduler.update(batch, tokens)

    def _check_tables(self) -> None:
        used = set()
        for seq in self.scheduler.running:
            num = -(-seq.num_computed_tokens // self.size)
            expect(
                len(seq.block_table) == num,
                "wrong-boundary",
                f"A sequence of {seq.num_computed_tokens} tokens in blocks of {self.size} has the"
                f" table {seq.block_table}.\nExpected {num} blocks.",
            )
            used.update(seq.block_table)
        free = self.manager.num_free_blocks
        expect(
            free == self.num_blocks - len(used),
            "wrong-values",
            f"{len(used)} of {self.num_blocks} blocks are in tables, and num_free_blocks says"
            f" {free}.\nWhat is in no table is free, and what is in one is not.",
        )

    def _place(self, seq: Sequence, position: int) -> tuple[int, int]:
        return seq.block_table[position // self.size], position % self.size

    def _entry(self, seq: Sequence, position: int) -> int:
        return hash(tuple(seq.token_ids[: position + 1]))


_SYSTEM = (
    "You are a helpful assistant that explains terms, tells stories and solves small tasks. Answer"
    " in a few sentences."
)


_QUESTIONS = (
    "What is a KV cache?",
    "What is a block table?",
    "What is 12 + 7?",
    "Tell me a story about a fox and a kite.",
)


@cache
def _engine_run(manager_cls: type, num_kv_blocks: int) -> tuple[list[list[int]], Any]:
    """(tokens, metrics) of chats that share a system prompt, through the bundled model."""
    from minivllm import LLM

    options = {
        "device": "cpu",
        "block_size": 16,
        "num_kv_blocks": num_kv_blocks,
        "max_model_len": 192,
    }
    with LLM(block_manager_cls=manager_cls, **options) as llm:
        chats = [
            [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": q}]
            for q in _QUESTIONS
        ]
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
        for chat, output in zip(chats, outputs, strict=True):
            chat += [{"role": "assistant", "content": output.outputs[0].text}]
            chat += [{"role": "user", "content": "Say that again."}]
        outputs += llm.chat(
            chats[:2], SamplingParams(temperature=0, max_tokens=25, n=2), use_tqdm=False
        )
        metrics = llm.metrics()
    return [
        list(completion.token_ids) for output in outputs for completion in output.outputs
    ], metrics


def _check_in_engine(answer: type) -> None:
    for num_kv_blocks in (16, 96):
        tokens, right = _engine_run(BlockManager, num_kv_blocks)
        mine, metrics = _engine_run.__wrapped__(answer, num_kv_blocks)
        assert right.prefix_cache_hits
        assert (right.num_preemptions > 0) == (num_kv_blocks == 16), (
            "one pool is meant to be tight, the other is not"
        )
        expect(
            mine == tokens,
            "engine-differs",
            f"Six chats through the bundled model with a pool of {num_kv_blocks} blocks: with your"
            " manager the engine writes other tokens.\nSome sequence reads blocks that are not its"
            " own.",
        )
    hits, computed = metrics.prefix_cache_hits, metrics.num_computed_tokens
    expect(
        hits >= right.prefix_cache_hits * 0.95,
        "too-few-hits",
        f"Six chats that share a system prompt: with your manager {hits} tokens come from the"
        f" cache, {right.prefix_cache_hits} could, and {computed} are computed instead of"
        f" {right.num_computed_tokens}.\nAre the names of a sequence's full blocks in"
        " seq.block_hashes? The scheduler looks there whether somebody else is just computing a"
        " block, and then waits for it.",
    )


EXERCISE = Exercise(
    id="04.6",
    title="Your block manager, in the engine",
    check=check_block_manager,
    mistakes=(
        Known(
            "leaked",
            answers=r"""
# %% a fresh block has count 0, and free waits for 0 after subtracting
@@
-            self.counts[block] = 1
+            self.counts[block] = 0
""",
        ),
        Known(
            "nothing-returned",
            answers=r"""
# %% takes its blocks and does not say so
@@
-        return True

# %% says nothing where nothing is missing
@@
         )
+        if num_new <= 0 and not cached_prefix:
+            return
         revived = [block for block in cached_prefix if self.counts[block] == 0]

# %% says nothing where there is no room
@@
-            return False
+            return
""",
        ),
        Known(
            "freed-while-shared",
            answers=r"""
# %% who leaves, frees all its blocks
@@
-            if self.counts[block] == 0:
+            if block not in self.free_blocks:
""",
        ),
        Known(
            "wrong-boundary",
            hint=2,
            answers=r"""
# %% one block more at an exact multiple
@@
-            -(-num_tokens // self.block_size)
+            (num_tokens // self.block_size + 1)
""",
        ),
        Known(
            "not-all-or-nothing",
            answers=r"""
# %% takes blocks until there are none
@@
-        if max(num_new, 0) + len(revived) > len(self.free_blocks):
-            return False
@@
         for _ in range(num_new):
+            if not self.free_blocks:
+                return False
""",
        ),
        Known(
            "forgets-when-freed",
            answers=r"""
# %% free clears what a block holds
@@
-                if self.names[block] is None:
-                    self.free_blocks.move_to_end(block, last=False)
+                self.where.pop(self.names[block], None)
+                self.names[block], self.tokens[block] = None, ()
""",
        ),
        Known(
            "nothing-left-to-compute",
            answers=r"""
# %% a prompt may be served whole
@@
-        for index in range((seq.num_tokens - 1) // self.block_size):
+        for index in range(seq.num_tokens // self.block_size):
""",
        ),
        Known(
            "hit-after-a-miss",
            answers=r"""
# %% a miss is a matter of one block
@@
-                break
+                continue
""",
        ),
        Known(
            "unchained",
            answers=r"""
# %% names without a chain
@@
-        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
-            tokens = self._tokens_of(seq, index)
-            if PENDING in tokens:
-                break  # sampled, but not known yet
-            previous = seq.block_hashes[-1] if seq.block_hashes else None
-            seq.block_hashes.append(hash_block(previous, tokens))
+        num_known = seq.num_tokens - seq.has_pending_token
+        for index in range(len(seq.block_hashes), num_known // self.block_size):
+            previous = None
+            seq.block_hashes.append(hash_block(previous, self._tokens_of(seq, index)))
""",
        ),
        Known(
            "hash-trusted",
            answers=r"""
# %% a name is enough
@@
-            if block is None or self.tokens[block] != self._tokens_of(seq, index):
+            if block is None:
""",
        ),
        Known(
            "name-overwritten",
            answers=r"""
# %% the newest block takes the name
@@
-            if self.names[block] is None and name not in self.where:
+            if self.names[block] is None:
""",
        ),
        Known(
            "registered-before-computed",
            hint=3,
            answers=r"""
# %% names the blocks up to the sequence's last token
@@
-        for index in range(start // self.block_size, end // self.block_size):
+        for index in range(
+            start // self.block_size, min(len(seq.block_table), len(seq.block_hashes))
+        ):

# %% names what was allocated
@@
             seq.block_table.append(block)
+        self.register_computed(seq, 0, num_tokens)
         return True
""",
        ),
        Known(
            "registered-too-late",
            hint=3,
            answers=r"""
# %% counts full blocks from where the step began
@@
-        for index in range(start // self.block_size, end // self.block_size):
+        for index in range(-(-start // self.block_size), end // self.block_size):
""",
        ),
        Known(
            "still-in-the-queue",
            hint=2,
            answers=r"""
# %% a revived block stays on the free list
@@
-            self.free_blocks.pop(block, None)
""",
        ),
        Known(
            "revived-not-counted",
            hint=2,
            answers=r"""
# %% room is what is free now
@@
-        if max(num_new, 0) + len(revived) > len(self.free_blocks):
+        if num_new > len(self.free_blocks):
""",
        ),
        Known(
            "cached-evicted-first",
            hint=3,
            answers=r"""
# %% all freed blocks go to the front
@@
-                if self.names[block] is None:
-                    self.free_blocks.move_to_end(block, last=False)
+                self.free_blocks.move_to_end(block, last=False)

# %% one queue for all, in order of time
@@
-                if self.names[block] is None:
-                    self.free_blocks.move_to_end(block, last=False)
""",
        ),
        Known(
            "heads-first",
            hint=3,
            answers=r"""
# %% frees a table from its beginning
@@
-        for block in reversed(seq.block_table):
+        for block in seq.block_table:
""",
        ),
        Known(
            "first-in-first-out",
            answers=r"""
# %% the order of eviction is that of first use
@@
-            self.free_blocks.pop(block, None)
+            if block in self.free_blocks:
+                del self.free_blocks[block]
+                self.revived = {*getattr(self, "revived", ()), block}
@@
-                if self.names[block] is None:
+                if self.names[block] is None or block in getattr(self, "revived", ()):
""",
        ),
        Known(
            "name-outlives-content",
            hint=2,
            answers=r"""
# %% an evicted block can still be found, by its tokens
@@
-            if self.names[block] is not None:
-                del self.where[self.names[block]]
-                self.names[block], self.tokens[block] = None, ()
+            self.names[block] = None
""",
        ),
        Known(
            "pending-token-named",
            answers=r"""
# %% takes the last token alone for unknown
@@
-        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
-            tokens = self._tokens_of(seq, index)
-            if PENDING in tokens:
-                break  # sampled, but not known yet
+        num_known = seq.num_tokens - seq.has_pending_token
+        for index in range(len(seq.block_hashes), num_known // self.block_size):
@@
-            seq.block_hashes.append(hash_block(previous, tokens))
+            seq.block_hashes.append(hash_block(previous, self._tokens_of(seq, index)))
""",
        ),
        Known(
            "names-not-extended",
            answers=r"""
# %% looks for names that nobody has made
@@
             return []
-        self._extend_names(seq)

# %% goes through the names that are there, and none is
@@
             return []
-        self._extend_names(seq)
@@
-        for index in range((seq.num_tokens - 1) // self.block_size):
-            block = self.where.get(seq.block_hashes[index])
+        for index, name in enumerate(
+            seq.block_hashes[: (seq.num_tokens - 1) // self.block_size]
+        ):
+            block = self.where.get(name)

# %% leaves it to find_cached_prefix
@@
             return
-        self._extend_names(seq)

# %% names what has been named, at its registration
@@
-        self._extend_names(seq)
-        for index in range(start // self.block_size, end // self.block_size):
+        for index in range(
+            start // self.block_size, min(end // self.block_size, len(seq.block_hashes))
+        ):
""",
        ),
        Known(
            "hits-for-prompt-logprobs",
            answers=r"""
# %% serves everybody from the cache
@@
-        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
+        if not self.enable_prefix_caching:
""",
        ),
        Known(
            "caching-not-off",
            answers=r"""
# %% never looks at the switch
@@
-        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
+        if seq.params.prompt_logprobs is not None:
@@
-        if not self.enable_prefix_caching:
-            return
""",
        ),
        Known(
            "table-not-cleared",
            answers=r"""
# %% the sequence keeps its table
@@
-        seq.block_table.clear()
""",
        ),
        Known(
            "too-few-hits",
            answers=r"""
# %% keeps the names to itself, so nobody waits for a block that is being computed
@@

+    def _names_of(self, seq: Sequence) -> list[int]:
+        names = []
+        for index in range(seq.num_tokens // self.block_size):
+            tokens = self._tokens_of(seq, index)
+            if PENDING in tokens:
+                break
+            names.append(hash_block(names[-1] if names else None, tokens))
+        return names
+
     def find_cached_prefix(self, seq: Sequence) -> list[int]:
@@
             return []
-        self._extend_names(seq)
+        names = self._names_of(seq)
@@
-            block = self.where.get(seq.block_hashes[index])
+            block = self.where.get(names[index])
@@
-        self._extend_names(seq)
+        names = self._names_of(seq)
@@
-            block, name = seq.block_table[index], seq.block_hashes[index]
+            block, name = seq.block_table[index], names[index]
""",
        ),
        Known(
            "changed-by-looking",
            answers=r"""
# %% takes what it finds at once
@@
             found.append(block)
+        for block in found:
+            seq.block_table.append(block)
""",
        ),
        Known(
            "not-yours",
            answers=r"""
# %% the package's, under another name
from minivllm.engine.block_manager import BlockManager


class MyBlockManager(BlockManager):
    pass
""",
        ),
    ),
    right=r"""
# %% a set of free blocks with times of last use, and blocks as objects
class MyBlockManager:
    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size, self.caching = block_size, enable_prefix_caching
        self.owners = [0] * num_blocks
        self.content = [None] * num_blocks  # (name, tokens)
        self.last_use = [0] * num_blocks
        self.clock = 0

    @property
    def num_free_blocks(self) -> int:
        return self.owners.count(0)

    def _tokens_of(self, seq: Sequence, index: int) -> list[int]:
        return seq.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _extend_names(self, seq: Sequence) -> None:
        while (len(seq.block_hashes) + 1) * self.block_size <= seq.num_tokens:
            tokens = self._tokens_of(seq, len(seq.block_hashes))
            if PENDING in tokens:
                return
            seq.block_hashes.append(
                hash_block(seq.block_hashes[-1] if seq.block_hashes else None, tokens)
            )

    def _block_of(self, name: int) -> int | None:
        return next(
            (
                i
                for i, content in enumerate(self.content)
                if content and content[0] == name
            ),
            None,
        )

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        found = []
        if self.caching and seq.params.prompt_logprobs is None:
            self._extend_names(seq)
            for index, name in enumerate(seq.block_hashes):
                block = self._block_of(name)
                enough = (index + 1) * self.block_size < seq.num_tokens
                if (
                    block is None
                    or not enough
                    or self.content[block][1] != self._tokens_of(seq, index)
                ):
                    break
                found.append(block)
        return found

    def allocate(
        self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()
    ) -> bool:
        missing = (
            (num_tokens + self.block_size - 1) // self.block_size
            - len(seq.block_table)
            - len(cached_prefix)
        )
        candidates = [
            i
            for i, count in enumerate(self.owners)
            if count == 0 and i not in cached_prefix
        ]
        if len(candidates) < missing:
            return False
        candidates.sort(key=lambda i: (self.content[i] is not None, self.last_use[i]))
        fresh = candidates[: max(missing, 0)]
        for block in fresh:
            self.content[block] = None
        for block in [*cached_prefix, *fresh]:
            self.owners[block] += 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        if self.caching:
            self._extend_names(seq)
            for index in range(start // self.block_size, end // self.block_size):
                block, name = seq.block_table[index], seq.block_hashes[index]
                if self.content[block] is None and self._block_of(name) is None:
                    self.content[block] = (name, self._tokens_of(seq, index))

    def free(self, seq: Sequence) -> None:
        while seq.block_table:
            block = seq.block_table.pop()
            self.clock += 1
            self.last_use[block] = self.clock
            self.owners[block] -= 1
""",
)
