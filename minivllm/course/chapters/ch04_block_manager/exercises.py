"""Chapter 04, the block manager: the checks of its exercises."""

from __future__ import annotations

import inspect
import random
from collections import abc, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from minivllm.course.grading.checking import (
    Mistake,
    diagnose,
    engine_agrees,
    exercise,
    expect,
    show,
)
from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import PENDING, Sequence, max_steps
from minivllm.sampling_params import SamplingParams

# --- 04.1 -----------------------------------------------------------------------------------------


def _names(tokens: abc.Sequence[int], size: int) -> list[int]:
    names: list[int] = []
    for start in range(0, len(tokens) - size + 1, size):
        names.append(hash_block(names[-1] if names else None, tokens[start : start + size]))
    return names


@exercise(
    "04.1",
    "Warm-up: name the blocks of a prompt",
    hints={"last-block-dropped": 1, "partial-block-named": 2, "unchained": 2},
)
def check_block_names(answer: Callable) -> str:
    rng = random.Random(1)
    sizes = (
        (0, 4),
        (1, 1),
        (3, 4),
        (4, 4),
        (5, 4),
        (11, 4),
        (12, 4),
        (13, 4),
        (64, 16),
        (70, 16),
        (6, 1),
    )
    cases = [([rng.randrange(2048) for _ in range(n)], size) for n, size in sizes]
    cases += [([7] * 12, 4), ([1, 2, 3, 4, 9, 9, 9, 9, 1, 2, 3, 4], 4)]

    def unchained(tokens: list[int], size: int) -> list[int]:
        return [
            hash_block(None, tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size)
        ]

    def with_rest(tokens: list[int], size: int) -> list[int]:
        names: list[int] = []
        for i in range(0, len(tokens), size):
            names.append(hash_block(names[-1] if names else None, tokens[i : i + size]))
        return names

    def whole_prefix(tokens: list[int], size: int) -> list[int]:
        return [
            hash_block(None, tokens[: i + size]) for i in range(0, len(tokens) - size + 1, size)
        ]

    def tokens_before(tokens: list[int], size: int) -> list[int]:
        """Each block is chained to the unchained name of its neighbour."""
        return [
            hash_block(hash_block(None, tokens[i - size : i]) if i else None, tokens[i : i + size])
            for i in range(0, len(tokens) - size + 1, size)
        ]

    def to_the_first(tokens: list[int], size: int) -> list[int]:
        names: list[int] = []
        for i in range(0, len(tokens) - size + 1, size):
            names.append(hash_block(names[0] if names else None, tokens[i : i + size]))
        return names

    suspects = {
        "unchained": (
            (
                "Each of your names stands for its own block alone: hash_block got None, where it"
                " needs the name before.\nTwo prompts with the same second block behind different"
                " first ones would share it."
            ),
            unchained,
        ),
        "partial-block-named": (
            (
                "You name the last block although it is not full. More tokens will be written into"
                " it, and its name would be wrong from then on."
            ),
            with_rest,
        ),
        "last-block-dropped": (
            (
                "A prompt that ends exactly where a block ends lacks its last name. That block is"
                " full, so it has one (the token that must be left to compute is a matter of"
                " *finding* a prefix)."
            ),
            lambda tokens, size: _names(tokens[:-1], size),
        ),
        "whole-prefix": (
            (
                "You hash the whole beginning anew for every block. Such names would do, but take"
                " quadratic work, and they are not the names asked for: the name before stands for"
                " all that came before."
            ),
            whole_prefix,
        ),
        "one-step-memory": (
            (
                "The name that you chain to was itself made with None: a name then knows its"
                " neighbour and forgets all before it. Chain to the name in your list."
            ),
            tokens_before,
        ),
        "always-the-first-name": (
            (
                "Every block is chained to the first block's name. It should be the name of the"
                " block just before it."
            ),
            to_the_first,
        ),
    }
    count = diagnose(answer, cases, _names, suspects)
    return f"{count} prompts, in blocks of 1, 4 and 16 tokens"


# --- 04.2 -----------------------------------------------------------------------------------------

SIZE = 16


@cache
def _measured() -> dict[str, Any]:
    """What the engine and the block manager really do in the six situations of 04.2."""
    from minivllm import LLM

    rng = random.Random(2)

    def draw(count: int) -> list[int]:
        return [rng.randrange(300, 2048) for _ in range(count)]

    def hits(llm: Any, prompt: list[int], max_tokens: int = 1) -> tuple[int, list[int]]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        [output] = llm.generate([prompt], params, use_tqdm=False)
        return output.num_cached_tokens, list(output.outputs[0].token_ids)

    def engine(**options: Any) -> Any:
        return LLM(device="cpu", block_size=SIZE, num_kv_blocks=64, max_model_len=256, **options)

    prompt, found = draw(64), {}
    with engine() as llm:
        hits(llm, prompt)
        found["same_again"] = hits(llm, prompt)[0]
        found["longer"] = hits(llm, prompt[:40] + draw(30))[0]
        found["changed"] = hits(llm, [*prompt[:20], prompt[20] ^ 1, *prompt[21:], *draw(10)])[0]
    with engine() as llm:
        first = draw(50)
        _, answer = hits(llm, first, max_tokens=30)
        found["second_turn"] = hits(llm, first + answer + draw(20))[0]
    with engine(trace=True) as llm:
        llm.generate(
            [draw(40)], SamplingParams(n=4, max_tokens=3, seed=0, ignore_eos=True), use_tqdm=False
        )
        together = next(record for record in llm.trace.steps if len(record.running) == 4)
        found["blocks_of_four"] = len(
            {block for table in together.block_tables.values() for block in table}
        )
    manager = BlockManager(6, SIZE)
    seq, other = (Sequence(i, draw(n), SamplingParams()) for i, n in enumerate((56, 96)))
    manager.allocate(seq, 56)
    manager.register_computed(seq, 0, 56)
    manager.free(seq)
    manager.allocate(other, 96)
    found["evicted"] = other.block_table[3:]
    return found


_COUNT_HITS = (
    "Draw its blocks of 16 tokens. Which are full, and have behind them exactly the same beginning"
    " as a block that was computed before? Count the tokens in those, and leave one token to"
    " compute."
)
#: What to look at again after a number that no known mistake explains.
_ADVICE = {
    **dict.fromkeys(("same_again", "longer", "changed", "second_turn"), _COUNT_HITS),
    "blocks_of_four": (
        "Draw the prompt's blocks. Which are full, and so the same for all four? The others each"
        " has for itself: count a shared block once."
    ),
    "evicted": (
        "Of blocks 0 to 3, which have a name? Those are cached when the sequence ends. Write their"
        " three numbers, in the order in which they are taken."
    ),
}


@exercise(
    "04.2",
    "Predict: hits, blocks, evictions",
    hints={
        "nothing-left-to-compute": 1,
        "partial-block-shared": 1,
        "hit-after-a-miss": 1,
        "last-token-not-fed-back": 2,
        "heads-first": 2,
    },
)
def check_predictions(
    same_again: int,
    longer: int,
    changed: int,
    second_turn: int,
    blocks_of_four: int,
    evicted: list[int],
) -> str:
    given: dict[str, Any] = {
        "same_again": same_again,
        "longer": longer,
        "changed": changed,
        "second_turn": second_turn,
    }
    given["blocks_of_four"] = blocks_of_four
    given["evicted"] = list(evicted) if isinstance(evicted, list | tuple) else evicted
    known: dict[tuple[str, Any], tuple[str, str]] = {
        ("same_again", 64): (
            "nothing-left-to-compute",
            (
                "All 64 tokens are known, but without computing one of them there are no logits to"
                " sample from. The engine gives up the last block."
            ),
        ),
        ("same_again", 63): (
            "less-than-a-block",
            "63 tokens would be enough to leave one, but a hit is counted in whole blocks.",
        ),
        ("longer", 40): (
            "partial-block-shared",
            (
                "40 tokens are equal, but the third block of 16 has only 8 of them: it is another"
                " block, with another name."
            ),
        ),
        ("changed", 64 - SIZE): (
            "hit-after-a-miss",
            (
                "The blocks behind the changed one hold the same tokens, but not the same keys and"
                " values: theirs depend on the changed token. Their names differ, too, and the"
                " cached part ends at the first miss."
            ),
        ),
        ("changed", 20): (
            "less-than-a-block",
            (
                "Twenty equal tokens are one block and a bit; the bit belongs to the block that"
                " differs."
            ),
        ),
        ("changed", 0): (
            "block-before-lost",
            "The first 16 tokens lie before the changed one. Their block is the same.",
        ),
        ("second_turn", 80): (
            "last-token-not-fed-back",
            (
                "50 + 30 = 80 tokens have been seen, but the last of them was only sampled: it was"
                " never an input, so it has no keys and values. 79 were computed."
            ),
        ),
        ("second_turn", 48): (
            "answer-not-cached",
            (
                "That is what the prompt alone would give. What the model wrote was computed, too,"
                " and its full blocks have names like all others."
            ),
        ),
        ("second_turn", 79): (
            "less-than-a-block",
            "79 tokens were computed; a hit is counted in whole blocks.",
        ),
        ("blocks_of_four", 12): (
            "nothing-shared",
            (
                "Each of the four would take three blocks if they shared nothing; but the prompt's"
                " full blocks are found by the second, the third and the fourth."
            ),
        ),
        ("blocks_of_four", 3): (
            "half-full-block-shared",
            (
                "The third block has 8 of 16 tokens, and each of the four goes on writing there,"
                " something else. Without copy-on-write such a block is never shared."
            ),
        ),
    }
    if not isinstance(given["evicted"], list) or len(given["evicted"]) != 3:
        raise Mistake(
            "wrong-type",
            f"evicted = {show(evicted)}: a list of three block numbers is asked"
            f" for.\n{_ADVICE['evicted']}",
        )
    if given["evicted"] == [0, 1, 2]:
        raise Mistake(
            "heads-first",
            "You predict that the cached blocks go in the order of the prompt.\nWithout its first"
            " block the rest of a prefix cannot be found. So a sequence's blocks are freed from the"
            " last to the first, and go in that order.",
        )
    for name, expected in _measured().items():
        if given[name] == expected:
            continue
        if (name, given[name]) in known:
            mistake, why = known[name, given[name]]
            raise Mistake(mistake, f"{name} = {given[name]}: the engine says otherwise.\n{why}")
        raise Mistake(
            "wrong-values", f"{name} = {show(given[name])} is not what comes out.\n{_ADVICE[name]}"
        )
    return "six predictions, measured"


# --- 04.3 -----------------------------------------------------------------------------------------


class _CountedPool:
    """What 04.3 asks for."""

    def __init__(self, num_blocks: int) -> None:
        self.counts, self.queue = [0] * num_blocks, deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.queue)

    def ref_count(self, block: int) -> int:
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.queue):
            return None
        taken = [self.queue.popleft() for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.counts[block] == 0:
                self.queue.remove(block)
            self.counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        if any(self.counts[block] == 0 for block in blocks):
            raise ValueError("not in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.queue.append(block)


def _counts(pool: Any, num_blocks: int) -> list[int]:
    return [pool.ref_count(block) for block in range(num_blocks)]


def _took(pool: Any, count: int, story: str) -> list[int]:
    taken = pool.allocate(count)
    expect(
        isinstance(taken, list) and len(taken) == len(set(taken)) == count,
        "wrong-type" if not isinstance(taken, list) else "wrong-values",
        f"{story}: allocate({count}) gave {show(taken)}.\nIt should return a list of {count}"
        " different free blocks.",
    )
    return taken


@exercise(
    "04.3",
    "Reference counts",
    hints={"still-in-the-queue": 2, "half-released": 3, "heads-first": 3},
)
def check_counted_pool(answer: type) -> str:
    pool = answer(8)
    expect(
        pool.num_free == 8 and _counts(pool, 8) == [0] * 8,
        "wrong-values",
        f"A new pool of 8 blocks has num_free = {pool.num_free} and counts {_counts(pool, 8)}.\nAll"
        " 8 are free, nobody uses any.",
    )
    a = _took(pool, 3, "From a new pool of 8")
    expect(
        [pool.ref_count(block) for block in a] != [0] * 3,
        "fresh-count-zero",
        "A block that has just been allocated has count 0.\nIt has one owner: whoever asked for it."
        " With 0, the first release would make it -1 and free it never, or the second owner would"
        " be counted as the first.",
    )
    expect(
        [pool.ref_count(block) for block in a] == [1] * 3 and pool.num_free == 5,
        "wrong-values",
        f"After allocate(3) the counts are {_counts(pool, 8)} and num_free is"
        f" {pool.num_free}.\nExpected 1 for the three blocks, and 5 free.",
    )
    pool.share(a[:2])
    expect(
        [pool.ref_count(block) for block in a] == [2, 2, 1],
        "wrong-values",
        f"share({a[:2]}) after allocate(3) = {a} gives the counts"
        f" {[pool.ref_count(b) for b in a]}.\nExpected 2, 2, 1.",
    )
    pool.release(a)
    expect(
        pool.num_free != 8,
        "freed-while-shared",
        f"Two sequences had blocks {a[:2]}; one released them, and they are free.\nThe other one"
        " still reads them. A block is free when its *count* has come down to 0, not when somebody"
        " releases it.",
    )
    expect(
        [pool.ref_count(block) for block in a] == [1, 1, 0] and pool.num_free == 6,
        "wrong-values",
        f"After that release the counts are {[pool.ref_count(b) for b in a]} and {pool.num_free}"
        " blocks are free.\nExpected 1, 1, 0, and 6 free.",
    )
    _check_all_or_nothing(answer)
    _check_revival(answer)
    _check_double_free(answer)
    _check_order(answer)
    return _check_random_pools(answer)


def _check_all_or_nothing(answer: type) -> None:
    pool = answer(4)
    first = _took(pool, 3, "From a new pool of 4")
    got = pool.allocate(2)
    expect(
        got is None and pool.num_free == 1 and sum(_counts(pool, 4)) == 3,
        "not-all-or-nothing",
        f"One block is free, and allocate(2) gave {show(got)} and left {pool.num_free} free.\nIt"
        " should return None and change nothing: the one block would be lost, for the caller has"
        " no use for half of what it needs.",
    )
    last = pool.allocate(1)
    expect(
        isinstance(last, list) and len(last) == 1,
        "last-block-refused",
        f"One block is free, and allocate(1) gave {show(last)}.\nThe last free block can be had:"
        " compare with >, not >=.",
    )
    pool.release(first)
    pool.release(last)
    expect(
        pool.allocate(0) == [],
        "wrong-values",
        "allocate(0) should return an empty list.\nNothing is needed.",
    )


def _check_revival(answer: type) -> None:
    pool = answer(4)
    old = _took(pool, 2, "From a new pool of 4")
    pool.release(old)
    pool.share(old)  # the prefix cache found them
    expect(
        [pool.ref_count(block) for block in old] == [1, 1],
        "wrong-values",
        f"Blocks {old} were free and are shared; their counts are"
        f" {[pool.ref_count(b) for b in old]}.\nExpected 1: their only owner is the one who found"
        " them.",
    )
    expect(
        pool.num_free == 2,
        "still-in-the-queue",
        f"Blocks {old} were free, a request found its prefix in them and shares them, and num_free"
        f" says {pool.num_free} of 4.\nWhoever revives a free block must take it off the free list,"
        " or it is handed to somebody else while in use.",
    )
    new = _took(pool, 2, "Two of four blocks are in use")
    expect(
        not set(new) & set(old),
        "still-in-the-queue",
        f"Blocks {old} are in use (they were free, and were shared again), and allocate(2) gave"
        f" {new}.\nshare must take a block that was free off the free list.",
    )


def _check_double_free(answer: type) -> None:
    pool = answer(4)
    mine, other = _took(pool, 2, "From a new pool of 4"), _took(pool, 2, "Two of four are taken")
    pool.release(mine)
    before = (_counts(pool, 4), pool.num_free)
    # Ownerless blocks at the end, at the beginning and in the middle: whatever is looked at first,
    # or alone.
    for blocks in (mine, [*other, *mine], [*mine, *other], [other[0], *mine, other[1]]):
        try:
            pool.release(blocks)
        except ValueError:
            after = (_counts(pool, 4), pool.num_free)
            expect(
                after == before,
                "half-released",
                f"release({blocks}) raised, as it should, but had changed something by then: counts"
                f" and free blocks were {before} and are {after}.\nLook at all blocks before you"
                " touch the first.",
            )
            continue
        raise Mistake(
            "double-free",
            f"Blocks {mine} are free, and release({blocks}) passed without an error; now the counts"
            f" are {_counts(pool, 4)}, {pool.num_free} free.\nA second release is somebody's bug,"
            " and it frees what others use one day. Raise ValueError where a block's count is 0.",
        )


def _check_order(answer: type) -> None:
    pool = answer(6)
    a, b = _took(pool, 3, "From a new pool of 6"), _took(pool, 2, "Three of six are taken")
    untouched = next(block for block in range(6) if block not in a + b)
    pool.release(b)
    pool.release(a)
    got = [_took(pool, 1, "All six are free")[0] for _ in range(6)]
    right = [untouched, *reversed(b), *reversed(a)]
    text = (
        f"{b} were released, then {a}; block {untouched} was never used. They are taken again in"
        f" the order {got}"
    )
    expect(
        got != [untouched, *b, *a],
        "heads-first",
        f"{text}.\nWithin a sequence the last block should go first: without its head, a prefix is"
        " worth nothing. Release a list backwards.",
    )
    expect(
        got[-1] != untouched and got != [*reversed(right)],
        "newest-first",
        f"{text}.\nYou take what became free last. That is what somebody may need soonest: take the"
        " block that has been free for longest (a queue, not a stack).",
    )
    expect(
        got == right,
        "wrong-order",
        f"{text}; expected {right}.\nThe one that has been free for longest comes first.",
    )


def _check_random_pools(answer: type) -> str:
    num_events = 0
    for seed in range(60):
        rng = random.Random(seed)
        num_blocks = rng.randint(1, 9)
        mine, right = answer(num_blocks), _CountedPool(num_blocks)
        tables: list[list[int]] = []
        for _ in range(40):
            num_events += 1
            event = rng.random()
            if event < 0.4 or not tables:
                count = rng.randint(0, 4)
                got, expected = mine.allocate(count), right.allocate(count)
                what = f"allocate({count})"
                expect(
                    got == expected,
                    "wrong-values",
                    f"After {num_events} random events {what} gave {show(got)}, expected"
                    f" {show(expected)}.\nCounts before it: {_counts(right, num_blocks)}.",
                )
                if expected:
                    tables.append(expected)
            elif event < 0.6:
                table = rng.choice(tables)
                prefix = table[: rng.randint(1, len(table))]
                mine.share(prefix), right.share(prefix)
                tables.append(prefix)
                what = f"share({prefix})"
            elif event < 0.7 and right.queue:
                found = rng.sample(list(right.queue), rng.randint(1, len(right.queue)))
                mine.share(found), right.share(found)
                tables.append(found)
                what = f"share({found}), of free blocks,"
            else:
                table = tables.pop(rng.randrange(len(tables)))
                mine.release(table), right.release(table)
                what = f"release({table})"
            got = (_counts(mine, num_blocks), mine.num_free)
            expected = (_counts(right, num_blocks), right.num_free)
            expect(
                got == expected,
                "wrong-values",
                f"After {what} counts and free blocks are {got}, expected {expected}.\nEvery owner"
                " of a block counts once; a block is free when its count is 0, and not before.",
            )
    return f"seven rules, and {num_events:,} random events"


# --- 04.4 -----------------------------------------------------------------------------------------

Cache = dict[int, tuple[int, tuple[int, ...]]]


def _prefix(tokens: list[int], cache: Cache, size: int) -> list[int]:
    found: list[int] = []
    name = None
    for start in range(0, len(tokens) - size, size):
        block_tokens = tuple(tokens[start : start + size])
        name = hash_block(name, block_tokens)
        block, known = cache.get(name, (None, None))
        if known != block_tokens:
            break
        found.append(block)
    return found


def _prefix_cases() -> list[tuple[list[int], Cache, int]]:
    rng = random.Random(4)
    cases = []
    for length, size in (
        (1, 1),
        (2, 1),
        (4, 4),
        (5, 4),
        (16, 16),
        (17, 16),
        (33, 16),
        (48, 16),
        (49, 16),
        (50, 16),
    ):
        tokens = [rng.randrange(2048) for _ in range(length)]
        names = _names(tokens, size)
        blocks = rng.sample(range(100), len(names))
        cache = {
            name: (block, tuple(tokens[i * size : (i + 1) * size]))
            for i, (name, block) in enumerate(zip(names, blocks, strict=True))
        }
        other = [rng.randrange(2048) for _ in range(3 * size)]
        strangers = {
            name: (100 + i, tuple(other[i * size : (i + 1) * size]))
            for i, name in enumerate(_names(other, size))
        }
        cases.append((tokens, {**cache, **strangers}, size))
        # known blocks behind another beginning
        cases.append((other[:size] + tokens, {**cache, **strangers}, size))
        if len(names) >= 3:
            # a hole
            cases.append((tokens, {name: cache[name] for name in names if name != names[1]}, size))
            forged = dict(cache)
            forged[names[1]] = (cache[names[1]][0], tuple(reversed(cache[names[1]][1])))
            cases.append((tokens, forged, size))  # a name that two blocks share
        cases.append((tokens, {}, size))
    # Another prompt went on from the first block with what is the third here: behind a miss the
    # chain is another.
    tokens = [rng.randrange(2048) for _ in range(13)]
    other = tokens[:4] + tokens[8:12]
    cases.append(
        (
            tokens,
            {name: (i, tuple(other[4 * i : 4 * i + 4])) for i, name in enumerate(_names(other, 4))},
            4,
        )
    )
    # Equal blocks: whoever slices at the wrong places finds them, whoever names them in another way
    # does not.
    tokens = [7] * 13
    cases.append((tokens, {name: (i, (7,) * 4) for i, name in enumerate(_names(tokens, 4))}, 4))
    # Blocks that were registered for themselves, as an unchained cache would.
    tokens = [rng.randrange(2048) for _ in range(14)]
    alone = {
        hash_block(None, tokens[i : i + 4]): (i, tuple(tokens[i : i + 4])) for i in range(0, 12, 4)
    }
    return [*cases, (tokens, alone, 4)]


@exercise(
    "04.4",
    "The longest prefix that may be reused",
    hints={
        "nothing-left-to-compute": 1,
        "last-hit-given-up": 1,
        "two-tokens-left": 2,
        "block-given-up": 2,
        "unchained": 3,
        "another-chain": 3,
        "list-against-tuple": 3,
        "block-index-for-position": 3,
        "not-the-numbers": 3,
    },
)
def check_cached_prefix(answer: Callable) -> str:
    def walk(
        tokens: list[int],
        cache: Cache,
        size: int,
        *,
        end: int | None = None,
        compare: bool = True,
        goes_on: abc.Sequence[str] = (),
        chained: bool = True,
    ) -> list[int]:
        found: list[int] = []
        name = None
        for start in range(0, len(tokens) - size if end is None else end, size):
            block_tokens = tuple(tokens[start : start + size])
            name = hash_block(name if chained else None, block_tokens)
            block, known = cache.get(name, (None, None))
            if known is None or (compare and known != block_tokens):
                if ("miss" if known is None else "collision") in goes_on:
                    continue
                break
            found.append(block)
        return found

    both = ("miss", "collision")

    def at_least_one_block_left(tokens: list[int], cache: Cache, size: int) -> list[int]:
        return walk(tokens, cache, size, end=(len(tokens) // size - 1) * size)

    def named_by(name_of: Callable[[list[int], Cache, int, int], int]) -> Callable[..., list[int]]:
        """Blocks by another name: name_of(tokens, cache, size, start) is that of the block that
        begins at start.
        """

        def walk_by(tokens: list[int], cache: Cache, size: int) -> list[int]:
            found: list[int] = []
            for start in range(0, len(tokens) - size, size):
                block, known = cache.get(name_of(tokens, cache, size, start), (None, None))
                if known != tuple(tokens[start : start + size]):
                    break
                found.append(block)
            return found

        return walk_by

    def by_number(tokens: list[int], cache: Cache, size: int, start: int) -> int:
        """Chained to the number of the block before."""
        before = (
            cache.get(by_number(tokens, cache, size, start - size), (None,))[0] if start else None
        )
        return hash_block(before, tokens[start : start + size])

    def by_neighbour(tokens: list[int], cache: Cache, size: int, start: int) -> int:
        return hash_block(
            hash_block(None, tokens[start - size : start]) if start else None,
            tokens[start : start + size],
        )

    def by_the_first(tokens: list[int], cache: Cache, size: int, start: int) -> int:
        return hash_block(
            hash_block(None, tokens[:size]) if start else None, tokens[start : start + size]
        )

    def chained_over_hits(tokens: list[int], cache: Cache, size: int) -> list[int]:
        """A miss is passed over, and the chain goes on from the last hit."""
        found: list[int] = []
        name = None
        for start in range(0, len(tokens) - size, size):
            block_tokens = tuple(tokens[start : start + size])
            block, known = cache.get(hash_block(name, block_tokens), (None, None))
            if known == block_tokens:
                name = hash_block(name, block_tokens)
                found.append(block)
        return found

    def sliced_by_index(tokens: list[int], cache: Cache, size: int) -> list[int]:
        found: list[int] = []
        name = None
        for index in range((len(tokens) - 1) // size):
            block_tokens = tuple(tokens[index : index + size])
            name = hash_block(name, block_tokens)
            block, known = cache.get(name, (None, None))
            if known != block_tokens:
                break
            found.append(block)
        return found

    suspects = {
        "nothing-left-to-compute": (
            (
                "A prompt that ends where a block ends is served from the cache to its last token."
                " Then nothing is left to compute, and there are no logits to sample from: leave at"
                " least one token."
            ),
            lambda t, c, s: walk(t, c, s, end=len(t) - s + 1),
            lambda t, c, s: walk(t, c, s, end=len(t) - s + 1, compare=False),
            lambda t, c, s: walk(t, c, s, end=len(t) - s + 1, goes_on=both),
            lambda t, c, s: walk(t, c, s, end=len(t) - s + 1, goes_on=both, compare=False),
        ),
        "block-given-up": (
            (
                "You always give up the last full block. Only a prompt that would be covered"
                " *completely* has to: with 49 tokens, three blocks of 16 leave one to compute."
            ),
            at_least_one_block_left,
            lambda t, c, s: walk(t, c, s, end=(len(t) // s - 1) * s, compare=False),
        ),
        "two-tokens-left": (
            (
                "You leave at least two tokens to compute, where one is enough: 17 tokens may have"
                " 16 from the cache.\nWhich is the last beginning of a block with a token behind"
                " its end?"
            ),
            lambda t, c, s: walk(t, c, s, end=len(t) - s - 1),
            lambda t, c, s: walk(t, c, s, end=len(t) - s - 1, compare=False),
        ),
        "another-chain": (
            (
                "You find the first block, and hardly ever one behind it. A name is hash_block of"
                " the *name* just before it, itself made in that way, and of its own block's"
                " tokens. Those alone stand in the cache to be compared."
            ),
            named_by(by_number),
            named_by(by_neighbour),
            named_by(by_the_first),
            named_by(lambda t, c, s, start: hash_block(None, t[: start + s])),
        ),
        "hash-trusted": (
            (
                "You take a block because its name is in the cache. A hash can be equal by chance,"
                " or by somebody's design: compare the block's tokens with yours."
            ),
            lambda t, c, s: walk(t, c, s, compare=False),
        ),
        "hit-after-a-miss": (
            (
                "You go on looking after a miss. What is found there has a hole before it: the"
                " blocks would be taken for the *beginning* of the prompt. Stop at the first miss."
            ),
            lambda t, c, s: walk(t, c, s, goes_on=both),
            lambda t, c, s: walk(t, c, s, goes_on=both, compare=False),
            lambda t, c, s: walk(t, c, s, goes_on=["miss"]),
            lambda t, c, s: walk(t, c, s, goes_on=["collision"]),
            chained_over_hits,
        ),
        "unchained": (
            (
                "You look blocks up by their own tokens alone. The cache is keyed by chained names:"
                " each is made from the name before it."
            ),
            lambda t, c, s: walk(t, c, s, chained=False),
            lambda t, c, s: walk(t, c, s, chained=False, compare=False),
            lambda t, c, s: walk(t, c, s, chained=False, goes_on=both),
            lambda t, c, s: walk(t, c, s, chained=False, end=len(t) - s + 1),
        ),
        "list-against-tuple": (
            (
                "You find nothing, ever. The cache holds tuples of tokens, a slice of token_ids is"
                " a list, and in Python [1, 2] == (1, 2) is False."
            ),
            lambda t, c, s: [],
        ),
        "last-hit-given-up": (
            (
                "You give up the last block that you find, always. That is needed only where all of"
                " the prompt's tokens would come from the cache; here something is left to compute"
                " anyway."
            ),
            lambda t, c, s: _prefix(t, c, s)[:-1],
            lambda t, c, s: walk(t, c, s, end=len(t) - s + 1)[:-1],
        ),
        "not-the-numbers": (
            (
                "The blocks are the right ones, but you return something else about them."
                " cache.get(name) is a pair `(block, tokens)`: the block's number is its first"
                " part."
            ),
            lambda t, c, s: [
                pair
                for name in _names(t, s)
                if (pair := c.get(name)) and pair[0] in _prefix(t, c, s)
            ],
            lambda t, c, s: _names(t, s)[: len(_prefix(t, c, s))],
            lambda t, c, s: [c[name][1] for name in _names(t, s)[: len(_prefix(t, c, s))]],
        ),
        "block-index-for-position": (
            (
                "Block number i begins at token i * block_size. Your slices begin at token i, so"
                " that all but the first block are cut in the wrong place."
            ),
            sliced_by_index,
        ),
    }
    count = diagnose(answer, _prefix_cases(), _prefix, suspects)
    return f"{count} prompts and caches: with holes, forged names, and nothing at all"


# --- 04.5 -----------------------------------------------------------------------------------------


class _Cache:
    """What 04.5's class should do."""

    def __init__(self, num_blocks: int) -> None:
        self.uses, self.queue = [0] * num_blocks, list(range(num_blocks))
        self.names: list[Any] = [None] * num_blocks
        self.where: dict[Any, int] = {}

    def look_up(self, names: list) -> list[int]:
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        revived = [block for block in found if self.uses[block] == 0]
        if num_new + len(revived) > len(self.queue):
            return None
        for block in found:
            self.uses[block] += 1
        for block in revived:
            self.queue.remove(block)
        fresh = [self.queue.pop(0) for _ in range(num_new)]
        for block in fresh:
            self.where.pop(self.names[block], None)
            self.names[block], self.uses[block] = None, 1
        return found + fresh

    def name(self, block: int, name: Any) -> None:
        if name not in self.where and self.names[block] is None:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


def _serve(cache: Any, names: list, num_rest: int = 1) -> list[int] | None:
    """Open a table for a prompt with these names and some blocks more, and name what was
    computed.
    """
    found = cache.look_up(names)
    table = cache.open(list(found), len(names) + num_rest - len(found))
    if table is not None:
        for block, name in zip(table, names, strict=False):
            cache.name(block, name)
    return table


@exercise(
    "04.5",
    "Debug this: one block, two owners",
    hints={
        "still-in-the-queue": 1,
        "revived-not-counted": 2,
        "shared-refused": 2,
        "name-outlives-content": 3,
    },
)
def check_mended_cache(answer: type) -> str:
    cache = answer(6)
    table = _serve(cache, ["a1", "a2"])
    expect(
        table == [0, 1, 2],
        "wrong-values",
        f"On a new cache of 6, a prompt of two names and a rest got {show(table)}.\nExpected [0, 1,"
        " 2]; that worked before.",
    )
    cache.close(table)
    again = _serve(cache, ["a1", "a2"])  # found: blocks 0 and 1, which nobody used
    left = [_serve(cache, [], 1) for _ in range(4)]
    both = sorted({block for other in left if other for block in other} & set(again or []))
    expect(
        not both,
        "still-in-the-queue",
        f"Chat A came back, found blocks 0 and 1 and has the table {again}. Then four others asked"
        f" for one block each: {left}.\nBlocks {both} have two owners who share nothing. What"
        " `open` finds in the cache is in use from then on: it may not stay in the queue.",
    )
    expect(
        again == [0, 1, 3] and left == [[4], [5], [2], None],
        "wrong-values",
        f"A came back with the table {again}, then four others asked for a block each and got"
        f" {left}.\nExpected [0, 1, 3] and [[4], [5], [2], None]: free blocks leave the queue at"
        " its front and enter at its end.",
    )
    _check_room(answer)
    _check_old_names(answer)
    return _check_random_caches(answer)


def _check_room(answer: type) -> None:
    cache = answer(3)
    table = _serve(cache, ["a1", "a2"])
    cache.close(table)
    found = cache.look_up(["a1", "a2"])
    before = (list(cache.uses), list(cache.queue))
    try:
        got = cache.open(list(found), 2)
    except (IndexError, KeyError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
    after = (list(cache.uses), list(cache.queue))
    expect(
        got is None,
        "revived-not-counted",
        f"Three blocks are free; two of them are the prefix {found} itself, and two new ones are"
        f" wanted. open gave {show(got)}.\nIt should be None: one is left for two. Blocks that the"
        " prefix revives leave the queue as well.",
    )
    expect(
        after == before,
        "not-all-or-nothing",
        f"open returned None, but uses and queue were {before} and are {after}.\nLook whether there"
        " is room before you change anything.",
    )
    owner = answer(4)
    table = _serve(owner, ["a1", "a2"])
    got = owner.open(owner.look_up(["a1", "a2"]), 1)
    expect(
        got == [0, 1, 3] and owner.uses[:2] == [2, 2],
        "shared-refused",
        "Blocks 0 and 1 are in use by A, one block is free, and B shares 0 and 1 and wants one"
        f" more. open gave {show(got)}.\nExpected [0, 1, 3]. A block that somebody uses is not in"
        " the queue: finding it takes nothing from it.",
    )


def _check_old_names(answer: type) -> None:
    cache = answer(3)
    cache.close(_serve(cache, ["a1", "a2"]))
    cache.close(_serve(cache, ["c1", "c2", "c3"], 0))
    got = cache.look_up(["a1", "a2"])
    expect(
        got == [],
        "name-outlives-content",
        f"All three blocks have been taken for C, and look_up for A's prompt still says {got}.\nA"
        " would read C's text. When `open` takes a block for something new, its old name must"
        " leave `where`.",
    )
    got = cache.look_up(["c1", "c2", "c3"])
    expect(
        got == [2, 1, 0] or len(got) == 3,
        "new-name-lost",
        f"C's three blocks are named and free, and look_up says {got}.\nA block that changes hands"
        " gets a new name: forget the old one in both places, or `name` finds the block taken.",
    )


def _check_random_caches(answer: type) -> str:
    num_events = 0
    for seed in range(60):
        rng = random.Random(seed)
        size = rng.randint(2, 8)
        mine, right = answer(size), _Cache(size)
        tables: list[list[int]] = []
        for _ in range(40):
            num_events += 1
            if tables and rng.random() < 0.45:
                table = tables.pop(rng.randrange(len(tables)))
                mine.close(list(table)), right.close(list(table))
                what = f"close({table})"
            else:
                chat = rng.choice("ab")
                names, rest = [f"{chat}{i}" for i in range(rng.randint(0, 4))], rng.randint(0, 2)
                got, expected = _serve(mine, names, rest), _serve(right, names, rest)
                what = f"serving {names} and {rest} more"
                expect(
                    got == expected,
                    "wrong-values",
                    f"After {num_events} random events {what} gave the table {show(got)}, expected"
                    f" {show(expected)}.\nThe queue before it was {right.queue}.",
                )
                if expected:
                    tables.append(expected)
            got, expected = (list(mine.uses), list(mine.queue)), (right.uses, right.queue)
            expect(
                got == expected,
                "wrong-values",
                f"After {what} uses and queue are {got}, expected {expected}.\nFree blocks enter"
                " the queue at its end when nobody uses them any more, the last of a table first.",
            )
    return f"three complaints settled, and {num_events:,} random events"


# --- 04.6 -----------------------------------------------------------------------------------------

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


@exercise(
    "04.6",
    "Your block manager, in the engine",
    hints={
        "wrong-boundary": 2,
        "revived-not-counted": 2,
        "still-in-the-queue": 2,
        "name-outlives-content": 2,
        "registered-before-computed": 3,
        "registered-too-late": 3,
        "heads-first": 3,
        "cached-evicted-first": 3,
    },
)
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
