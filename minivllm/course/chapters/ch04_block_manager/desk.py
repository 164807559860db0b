"""A stage for block managers, and stories that a real scheduler writes on it."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections import abc
from collections.abc import Iterator
from typing import Any

from minivllm.course.chapters.ch04_block_manager.common import Story
from minivllm.course.chapters.ch04_block_manager.manager import Manager
from minivllm.course.grading.compare import show
from minivllm.course.grading.judges import expect
from minivllm.engine.block_manager import hash_block
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import Sequence, SequenceStatus, max_steps
from minivllm.sampling_params import SamplingParams

#: Stands in a story about hashes that collide: a name knows how many blocks are before it, and
#: nothing else.
COLLIDING = "colliding"


def sequence(seq_id: int, tokens: abc.Sequence[int], **params: Any) -> Sequence:
    """A sequence of these tokens without a limit on its answer."""
    return Sequence(seq_id, list(tokens), SamplingParams(max_tokens=None, **params))


class Desk:
    """Sequences come to a block manager, and this writes down what they get.

    Any empty block may be taken, so numbers of blocks say nothing. Here a block has a new number
    each time that it is taken for something new: 0, 1, 2, … in that order.
    """

    def __init__(
        self, made: type, num_blocks: int, size: int, caching: bool = True, hashes: str = ""
    ) -> None:
        self.made, self.colliding = made, hashes == COLLIDING
        self.manager = made(num_blocks, size, caching)
        self.seqs: dict[int, Sequence] = {}
        self.found: dict[int, list[int]] = {}
        self.numbers: dict[int, int] = {}  # of the manager -> here
        self.num_handed_out = 0
        self.probes: list[Sequence] = []
        self.last: tuple[Any, list[int]] = ([], [])  # what a look gave, and a copy

    def words(self, name: str, *args: Any) -> str:
        """The call, with the tokens of a sequence that comes or grows."""
        if name == "come":
            more = "".join(f", {key}={value}" for key, value in (args[2] if args[2:] else ()))
            return f"sequence {args[0]} comes: {show(list(args[1]), 16)}{more}"
        if name == "tokens":
            return f"sequence {args[0]} has the tokens {show(list(args[1]), 16)}"
        if name == "preempt":
            return f"free(sequence {args[0]}), which is preempted and waits again"
        if name == "probe":
            return f"find_cached_prefix for {show(list(args[0]), 16)}"
        method = {"find": "find_cached_prefix", "register": "register_computed"}.get(name, name)
        prefix = ", what was found" if name == "allocate" and self.found.get(args[0]) else ""
        return f"{method}({', '.join([f'sequence {args[0]}', *map(str, args[1:])])}{prefix})"

    def do(self, name: str, *args: Any) -> dict[str, Any]:
        with colliding_hashes(self.made) if self.colliding else contextlib.nullcontext():
            returned = getattr(self, f"_{name}")(*args)
        free = self.manager.num_free_blocks
        expect(
            not callable(free),
            "not-a-property",
            "num_free_blocks is a method, and the engine reads it as a number.\nPut @property in"
            " the line above its def.",
        )
        tables = {
            f"the table of sequence {key}": self._numbered(seq.block_table)
            for key, seq in self.seqs.items()
            if seq.block_table
        }
        seen = {} if name in ("come", "tokens") else {"num_free_blocks": free, **tables}
        if name in ("find", "register"):
            seen["_named"] = len(self.seqs[args[0]].block_hashes)
        return seen if returned is None else {"it returned": returned, **seen}

    def _numbered(self, blocks: abc.Sequence[int]) -> list[Any]:
        return [self.numbers.get(block, f"number {block} of yours") for block in blocks]

    def _come(self, key: int, tokens: tuple, params: tuple = ()) -> None:
        self.seqs[key] = sequence(key, tokens, **dict(params))

    def _tokens(self, key: int, tokens: tuple) -> None:
        self.seqs[key].token_ids[:] = tokens

    def _probe(self, tokens: tuple, params: tuple = ()) -> list[Any]:
        # All are kept, so that no two have the same id.
        self.probes.append(sequence(-1, tokens, **dict(params)))
        return self._numbered(self._look(self.probes[-1]))

    def _find(self, key: int) -> list[Any]:
        self.found[key] = self._look(self.seqs[key])
        return self._numbered(self.found[key])

    def _look(self, seq: Sequence) -> list[int]:
        before = (list(seq.block_table), self.manager.num_free_blocks)
        found = self.manager.find_cached_prefix(seq)
        expect(
            isinstance(found, list | tuple),
            "wrong-type",
            f"find_cached_prefix returned {show(found)}.\nIt should be a list of block numbers, []"
            " where nothing is found.",
        )
        after = (list(seq.block_table), self.manager.num_free_blocks)
        expect(
            after == before,
            "changed-by-looking",
            f"Before find_cached_prefix the sequence's table was {before[0]}, and {before[1]}"
            f" blocks were free; after it, {after[0]} and {after[1]}.\nIt only looks: the scheduler"
            " may decide not to admit the sequence. allocate takes.",
        )
        earlier, copy = self.last
        expect(
            list(earlier) == copy,
            "result-reused",
            f"find_cached_prefix returned {copy}. After the next call of it, the same list is"
            f" {list(earlier)}.\nA list that you have returned belongs to the caller, who may still"
            " need it. Make a new one in each call.",
        )
        self.last = (found, list(found))
        return list(found)

    def _allocate(self, key: int, num_tokens: int) -> Any:
        seq, prefix = self.seqs[key], self.found.pop(key, [])
        known = len(seq.block_table) + len(prefix)
        given = self.manager.allocate(seq, num_tokens, list(prefix))
        expect(
            given is not None,
            "nothing-returned",
            "allocate returned None, where it should say True or False: is there room?\nThe blocks"
            " may well be in the table. Does every way through allocate end in a `return`, the one"
            " where nothing is missing as well?",
        )
        expect(
            given in (True, False),
            "wrong-type",
            f"allocate returned {show(given)}.\nIt should say True or False: is there room?",
        )
        for block in seq.block_table[known:]:
            self.numbers[block] = self.num_handed_out
            self.num_handed_out += 1
        return bool(given)

    def _register(self, key: int, start: int, end: int) -> None:
        self.manager.register_computed(self.seqs[key], start, end)

    def _preempt(self, key: int) -> None:
        self._free(key)
        self.seqs[key].num_preemptions += 1
        self.seqs[key].status = SequenceStatus.PREEMPTED

    def _free(self, key: int) -> None:
        seq = self.seqs[key]
        self.manager.free(seq)
        expect(
            not seq.block_table,
            "table-not-cleared",
            f"After free, the sequence still has the table {seq.block_table}.\nIts blocks belong to"
            " others now: clear seq.block_table.",
        )


@contextlib.contextmanager
def colliding_hashes(made: type) -> Iterator[None]:
    """All blocks with as many blocks before them get one name.

    For a class that takes `hash_block` from its module.
    """
    spaces = _spaces(made)
    for space in spaces:
        space["hash_block"] = lambda previous, tokens: hash_block(previous, [0])
    try:
        yield
    finally:
        for space in spaces:
            space["hash_block"] = hash_block


def can_collide(made: type) -> bool:
    """Whether `colliding_hashes` works for this class."""
    return bool(_spaces(made))


def _spaces(made: type) -> list[dict[str, Any]]:
    """The global names of a class's methods, where `hash_block` is the package's."""
    members = [member for each in made.__mro__ for member in vars(each).values()]
    found = {id(m.__globals__): m.__globals__ for m in members if inspect.isfunction(m)}
    spaces = [space for space in found.values() if space.get("hash_block") is hash_block]
    return [space for space in spaces if space.get("__name__") != hash_block.__module__]


# --- stories from a real scheduler ----------------------------------------------------------------


class _Writer(Manager):
    """The right manager, which writes down how it is called."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[tuple] = []
        self.known: dict[int, tuple] = {}

    def _note(self, name: str, seq: Sequence, *args: Any) -> None:
        tokens = tuple(seq.token_ids)
        if self.known.get(seq.seq_id) != tokens:
            came = seq.seq_id not in self.known
            self.calls.append(("come" if came else "tokens", seq.seq_id, tokens))
            self.known[seq.seq_id] = tokens
        self.calls.append((name, seq.seq_id, *args))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        self._note("find", seq)
        return super().find_cached_prefix(seq)

    def allocate(
        self, seq: Sequence, num_tokens: int, cached_prefix: abc.Sequence[int] = ()
    ) -> bool:
        self._note("allocate", seq, num_tokens)
        return super().allocate(seq, num_tokens, cached_prefix)

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        self._note("register", seq, start, end)
        super().register_computed(seq, start, end)

    def free(self, seq: Sequence) -> None:
        self._note("free", seq)
        super().free(seq)


def random_story(
    seed: int,
    *,
    blocks: range,
    sizes: range,
    lengths: range,
    num_events: int,
    most: int = 60,
    ahead: bool = False,
) -> Story:
    """What a real scheduler does for random requests that begin alike.

    blocks, sizes, lengths: of the pool, of a block, of the new part of a prompt. most: the largest
    number of requests. ahead: whether the scheduler plans each step before it has the tokens of the
    step before.
    """
    rng = random.Random(seed)
    num_blocks, size = rng.choice(blocks), rng.choice(sizes)
    caching = rng.random() < 0.9
    writer = _Writer(num_blocks, size, caching)
    scheduler = Scheduler(writer, rng.randint(1, 4), rng.choice([2, 5, 16, 4 * size]))
    seqs: list[Sequence] = []
    planned: list[Any] = []

    def add() -> None:
        room = num_blocks * size
        known = rng.choice(seqs).token_ids if seqs else []
        tokens = [t for t in known[: rng.randint(0, len(known))] if t >= 0]
        tokens = [*tokens, *(rng.randrange(2) for _ in range(rng.choice(lengths)))][:room]
        seq = sequence(len(seqs), tokens)
        seq.max_num_tokens = min(len(tokens) + rng.randint(1, 6 + size), room + 1)
        seqs.append(seq)
        scheduler.add(seq)

    def step() -> None:
        batch = scheduler.schedule() if scheduler.has_unfinished else None
        planned.extend([batch] if batch else [])
        while len(planned) > (ahead if batch else 0):
            batch = planned.pop(0)
            scheduler.update(batch, [[rng.randrange(2)] for _ in batch.sampled])
        if seqs:
            tokens = tuple(t for t in rng.choice(seqs).token_ids if t >= 0)
            writer.calls.append(("probe", (*tokens, 9)))

    for _ in range(num_events):
        add() if rng.random() < 0.4 and len(seqs) < most else step()
    limit = 2 * max_steps((s.num_prompt_tokens, 6 + size) for s in seqs) + 50
    while scheduler.has_unfinished and limit:
        step()
        limit -= 1
    assert limit, "the right manager does not come to an end"
    off = "" if caching else ", caching off"
    title = f"A random history on a pool of {num_blocks} blocks of {size} tokens{off}."
    return Story(title, (num_blocks, size, caching), tuple(writer.calls))


def random_stories() -> tuple[Story, ...]:
    """Many on tiny pools, a few on larger ones, and a long one."""
    tiny = [
        random_story(
            seed,
            blocks=range(2, 11),
            sizes=range(1, 5),
            lengths=range(1, 7),
            num_events=24,
            ahead=bool(seed % 2),
        )
        for seed in range(40)
    ]
    large = [
        random_story(
            seed,
            blocks=range(40, 80),
            sizes=range(5, 20),
            lengths=range(30, 200),
            num_events=12,
            ahead=bool(seed % 2),
        )
        for seed in (101, 102, 103)
    ]
    long = random_story(
        200,
        blocks=range(20, 21),
        sizes=range(3, 4),
        lengths=range(1, 12),
        num_events=500,
        most=200,
    )
    return (*tiny, *large, long)
