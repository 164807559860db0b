"""15.2: where the prefix is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from random import Random

from minivllm.course.chapters.ch15_a_fleet.common import suspects_of
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_nothing_kept, one_by_one
from minivllm.engine.block_manager import hash_block

_MASK = 0xFFFFFFFF

# --- the right one, and its options ---------------------------------------------------------------


def _summary(
    hashes: Iterable[int],
    *,
    size: int = 4,
    high: bool = False,
    endian: str = "little",
    twice: str = "once",
    ordered: str = "cut",
) -> bytes:
    """The right one; each option makes it a wrong one.

    twice: where equal ones are dropped: "once" they are short, when "whole", or "never". ordered:
    by the "cut" or the "whole" hash.
    """
    found = list(hashes)
    if twice == "whole":
        found = list(dict.fromkeys(found))
    if ordered == "whole":
        found = sorted(found)
    found = [value >> (128 - 8 * size) if high else value & (1 << 8 * size) - 1 for value in found]
    if twice == "once":
        found = list(dict.fromkeys(found))
    if ordered == "cut":
        found.sort()
    return b"".join(value.to_bytes(size, endian) for value in found)  # type: ignore[arg-type]


def _hashes(
    token_ids: Sequence[int],
    size: int,
    *,
    chain: str = "whole",
    ends: str = "",
    mask: int = _MASK,
) -> list[int]:
    """The hashes of a prompt's blocks, their lowest 32 bits.

    chain: what the next block's hash gets: the "whole" hash, its "short" form, or "no" hash; "from
    0" begins with 0, and "all" hashes all tokens up to the block's end. ends:
    "full" where the last block may hold the last token, "part" where it may be a part.
    """
    stop = {"": len(token_ids), "full": len(token_ids) + 1, "part": len(token_ids) + size}[ends]
    found: list[int] = []
    previous = 0 if chain == "from 0" else None
    for end in range(size, stop, size):
        value = hash_block(previous, token_ids[0 if chain == "all" else end - size : end])
        found.append(value & mask)
        previous = {"short": value & _MASK, "no": None, "all": None}.get(chain, value)
    return found


def _num_cached(
    token_ids: Sequence[int],
    block_size: int,
    summary: bytes,
    *,
    chain: str = "whole",
    ends: str = "",
    reads: str = "four by four",
    counts: str = "leading",
) -> int:
    mine = [value.to_bytes(4, "little") for value in _hashes(
        token_ids, block_size, chain=chain, ends=ends
    )]  # fmt: skip
    known = {summary[i : i + 4] for i in range(0, len(summary), 4)}
    if reads == "high bits":
        whole = _hashes(token_ids, block_size, chain=chain, ends=ends, mask=-1)
        mine = [(value >> 96).to_bytes(4, "little") for value in whole]
    if reads == "anywhere":
        is_known = [value in summary for value in mine]
    elif reads == "backwards":
        is_known = [value[::-1] in known for value in mine]
    else:
        is_known = [value in known for value in mine]
    if counts == "all":
        return sum(is_known)
    if counts == "last":
        return max((i + 1 for i, one in enumerate(is_known) if one), default=0)
    if counts == "shared":
        return len(known)
    leading = is_known.index(False) if False in is_known else len(is_known)
    if counts == "tokens":
        return leading * block_size
    if counts == "one more":
        return min(leading + 1, len(mine))
    if counts == "all or none":
        return leading if leading == len(mine) else 0
    return leading


def _order(
    token_ids: Sequence[int],
    block_size: int,
    replicas: Sequence[tuple[int, bytes]],
    *,
    key: Callable[[int, int, int], object] = lambda cached, load, i: (-cached, load, i),
    gives: str = "all",
) -> list[int]:
    places = {
        i: key(_num_cached(token_ids, block_size, summary), load, i)
        for i, (load, summary) in enumerate(replicas)
    }
    found = sorted(places, key=lambda i: places[i])  # type: ignore[arg-type, return-value]
    if gives == "the best":
        return found[:1]
    if gives == "who has any":
        return [
            i for i in found if _num_cached(token_ids, block_size, replicas[i][1]) > 0
        ] or found[:1]
    if gives == "ranks":
        return [found.index(i) for i in range(len(found))]
    return found


# --- the check ------------------------------------------------------------------------------------


class _Held(bytes):
    """A summary that says in a message what it is, for a prompt of so many blocks' hashes."""

    wanted: Sequence[int] = ()

    def __repr__(self) -> str:
        known = {int.from_bytes(self[i : i + 4], "little") for i in range(0, len(self), 4)}
        named = [place for place, value in enumerate(self.wanted) if value in known]
        which = ", ".join(map(str, named[:8])) + ", …" * (len(named) > 8)
        blocks = f"the prompt's {len(self.wanted)} blocks"
        return f"<{len(known)} entries, of {blocks} {which or 'none'}>"


def _told(prompt: Sequence[int], size: int, summary: bytes) -> _Held:
    held = _Held(summary)
    held.wanted = _hashes(prompt, size)
    return held


#: (tokens of a prompt, block size): one, exact multiples and their neighbours, and many blocks.
_SIZES = ((1, 1), (2, 1), (4, 4), (5, 4), (9, 4), (12, 4), (13, 4), (48, 16), (49, 16), (403, 13))


def _summary_cases() -> list[tuple[list[int]]]:
    rng = Random(1521)
    cases: list[list[int]] = [[], [0], [7, 7], [(1 << 128) - 1], [5 << 100, 3 << 100]]
    # The same lowest 32 bits.
    cases.append([(9 << 64) + 5, (2 << 64) + 5, (1 << 64) + 70000])
    for count in (3, 20, 200):
        cases.append([rng.getrandbits(128) for _ in range(count)])
    cases.append(cases[-1][:9] + cases[-1][4:20])
    return [(case,) for case in cases]


def _prompt(rng: Random, length: int) -> list[int]:
    return [rng.randrange(2048) for _ in range(length)]


def _cached_cases() -> list[tuple[list[int], int, bytes]]:
    rng = Random(1522)
    cases: list[tuple[list[int], int, bytes]] = []
    for length, size in _SIZES:
        prompt = _prompt(rng, length)
        longer = _hashes([*prompt, *_prompt(rng, size + 1)], size)
        others = [rng.getrandbits(32) for _ in range(5)]
        cases.append((prompt, size, b""))
        cases.append((prompt, size, _summary(longer + others)))
        for missing in sorted({0, 1, len(longer) // 2, len(longer) - 1}):
            held = longer[:missing] + longer[missing + 1 :]
            cases.append((prompt, size, _summary(held + others)))
        cases.append((prompt, size, _summary(longer[: len(longer) // 2])))
    # Equal blocks: they have other hashes in other places.
    same = [7] * 13
    cases.append((same, 4, _summary(_hashes(same, 4)[:1])))
    cases.append((same, 4, _summary([*_hashes(same, 4)[:2], hash_block(None, same[:4])])))
    # The wanted bytes stand across two entries; and then also where they belong.
    cases += [_across(rng, shift, ends) for shift in (1, 2, 3) for ends in (0, 1)]
    prompt = _prompt(rng, 9)
    # Another prompt began in another way, and went on with the same tokens.
    cases.append((prompt, 4, _summary(_hashes([1, 2, 3, 4, *prompt], 4) + _hashes(prompt, 4)[:1])))
    return cases


def _across(rng: Random, shift: int, num_real: int) -> tuple[list[int], int, bytes]:
    """A prompt and a summary in which its first hash stands across two entries.

    num_real: how many entries are that hash.
    """
    while True:
        prompt = _prompt(rng, 9)
        wanted = _hashes(prompt, 4)[0].to_bytes(4, "little")
        held = b"\x01" * (4 - shift) + wanted + b"\x80" * shift + wanted * num_real
        numbers = [int.from_bytes(held[i : i + 4], "little") for i in range(0, len(held), 4)]
        if numbers == sorted(set(numbers)):
            return prompt, 4, held


def _order_cases() -> list[tuple[list[int], int, list[tuple[int, bytes]]]]:
    rng = Random(1523)
    cases: list[tuple[list[int], int, list[tuple[int, bytes]]]] = []
    for length, size, count in ((13, 4, 1), (13, 4, 3), (9, 1, 4), (100, 16, 6), (97, 16, 12)):
        for _ in range(5):
            prompt = _prompt(rng, length)
            mine = _hashes([*prompt, *_prompt(rng, size + 1)], size)
            replicas = []
            for _ in range(count):
                held = mine[: rng.choice((0, 1, 1, 2, len(mine)))]
                held += [rng.getrandbits(32) for _ in range(rng.randrange(9))]
                replicas.append((rng.randrange(4), _summary(held)))
            cases.append((prompt, size, replicas))
    # Nobody knows anything; two are equal; everybody knows everything.
    prompt = _prompt(rng, 20)
    all_ = _summary(_hashes(prompt, 4))
    cases.append((prompt, 4, [(3, b""), (1, b""), (2, b""), (1, b"")]))
    cases.append((prompt, 4, [(2, all_), (2, all_), (0, b""), (2, all_)]))
    cases.append((prompt, 4, [(0, b""), (50, all_), (0, all_[:0])]))
    cases.append((prompt, 4, []))
    # As many blocks, not as many leading ones.
    found = _hashes(prompt, 4)
    cases.append((prompt, 4, [(0, _summary(found[1:])), (1, _summary(found[:1]))]))
    return cases


def check_where(summary: Callable, num_cached: Callable, order: Callable) -> str:
    caches = diagnose(summary, _summary_cases(), _summary, suspects_of(EXERCISE, _summary))
    suspects = suspects_of(EXERCISE, _num_cached)
    cases = [(prompt, size, _told(prompt, size, held)) for prompt, size, held in _cached_cases()]
    prompts = diagnose(num_cached, cases, _num_cached, suspects)
    choices = [
        (prompt, size, [(load, _told(prompt, size, held)) for load, held in replicas])
        for prompt, size, replicas in _order_cases()
    ]
    fleets = diagnose(order, choices, _order, suspects_of(EXERCISE, _order))
    changed = "the numbers have changed"
    pairs = one_by_one(([3, 1, 2],), ([9, 8, 3],))
    expect_nothing_kept(summary, pairs, _summary, changed)
    first, second = list(range(20)), list(range(50, 70))
    both = [_summary(_hashes(prompt, 4)) for prompt in (first, second)]
    two = _summary(_hashes(first, 2))
    pairs = [*one_by_one((first, 4, both[0]), (second, 2, both[1]))]
    pairs += one_by_one((first, 4, both[0]), (first, 2, two))
    expect_nothing_kept(num_cached, pairs, _num_cached, changed)
    fleet, other = [(1, both[0]), (0, both[1])], [(0, both[1]), (3, two), (1, both[0])]
    pairs = [*one_by_one((first, 4, fleet), (second, 4, other))]
    expect_nothing_kept(order, pairs, _order, changed)
    return f"{caches} caches, {prompts} prompts, {fleets} fleets"


EXERCISE = Exercise(
    id="15.2",
    title="Where the prefix is",
    check=check_where,
    mistakes=(
        Known(
            "other-bits",
            "That is not the form asked for: the lowest 32 bits of each hash, as 4 bytes, the"
            " lowest byte first. All must cut a hash at the same place, or nothing is ever found.",
            hint=1,
            suspects=(
                partial(_summary, size=16),
                partial(_summary, size=8),
                partial(_summary, high=True),
                partial(_summary, endian="big"),
                partial(_summary, high=True, endian="big"),
            ),
            answers=r"""
# %% the highest bits
@@
-    short = sorted({value & MASK for value in hashes})
+    short = sorted({value >> 96 for value in hashes})

# %% the highest byte first
@@
-    return b"".join(value.to_bytes(4, "little") for value in short)
+    return b"".join(value.to_bytes(4, "big") for value in short)
""",
        ),
        Known(
            "not-once",
            "Each entry is there once. Two hashes may have the same lowest 32 bits: equal ones are"
            " dropped after the cut, not before it.",
            hint=1,
            suspects=(partial(_summary, twice="never"), partial(_summary, twice="whole")),
            answers=r"""
# %% equal hashes are dropped
@@
-    short = sorted({value & MASK for value in hashes})
+    short = sorted(value & MASK for value in set(hashes))

# %% a list
@@
-    short = sorted({value & MASK for value in hashes})
+    short = sorted([value & MASK for value in hashes])
""",
        ),
        Known(
            "not-ascending",
            "The entries ascend. Then a summary of the same blocks is the same bytes, and who gets"
            " it twice sees at once that nothing is new.",
            hint=1,
            suspects=(partial(_summary, ordered="no"), partial(_summary, ordered="whole")),
            answers=r"""
# %% as they come
@@
-    short = sorted({value & MASK for value in hashes})
+    short = list(dict.fromkeys(value & MASK for value in hashes))

# %% sorted before the cut
@@
-    short = sorted({value & MASK for value in hashes})
+    short = list(dict.fromkeys(value & MASK for value in sorted(hashes)))
""",
        ),
        Known(
            "last-token",
            "A block that holds the prompt's last token does not count, even if it is full and"
            " known: the last token is always computed, for its logits. A part of a block is no"
            " block.",
            hint=2,
            suspects=(partial(_num_cached, ends="full"), partial(_num_cached, ends="part")),
            answers=r"""
# %% all full blocks
@@
-    for end in range(block_size, len(token_ids), block_size):
+    for end in range(block_size, len(token_ids) + 1, block_size):
""",
        ),
        Known(
            "never-found",
            "You find nothing, whatever the summary holds. What is looked up must be made as it was"
            " made there: the first hash is `hash_block(None, …)`, and of each hash the lowest 32"
            " bits, the lowest byte first.",
            hint=2,
            suspects=(
                partial(_num_cached, reads="backwards"),
                partial(_num_cached, reads="high bits"),
                partial(_num_cached, chain="from 0"),
            ),
            answers=r"""
# %% other bits are looked up
@@
-        if (previous & MASK).to_bytes(4, "little") not in known:
+        if (previous >> 96).to_bytes(4, "little") not in known:

# %% the chain begins with 0
@@
-    count, previous = 0, None
+    count, previous = 0, 0
""",
        ),
        Known(
            "wrong-chain",
            "The chain is not that of the block manager. Each hash gets the *whole* hash of the"
            " block before it, 128 bits; what is cut off is only missing in the summary.",
            hint=2,
            suspects=(
                partial(_num_cached, chain="short"),
                partial(_num_cached, chain="no"),
                partial(_num_cached, chain="all"),
            ),
            answers=r"""
# %% goes on from the short hash
@@
-        previous = hash_block(previous, token_ids[end - block_size : end])
-        if (previous & MASK).to_bytes(4, "little") not in known:
+        previous = hash_block(previous, token_ids[end - block_size : end]) & MASK
+        if previous.to_bytes(4, "little") not in known:

# %% each block by itself
@@
-        previous = hash_block(previous, token_ids[end - block_size : end])
+        previous = hash_block(None, token_ids[end - block_size : end])
""",
        ),
        Known(
            "behind-a-gap",
            "You count blocks behind one that is missing. Their keys and values are there, and"
            " nobody can use them without those before: the prefix ends at the first miss.",
            hint=2,
            suspects=(partial(_num_cached, counts="all"), partial(_num_cached, counts="last")),
            answers=r"""
# %% all that are known
@@
-            break
+            continue
""",
        ),
        Known(
            "across-entries",
            "You find four bytes anywhere in the summary, also where the end of one entry and the"
            " beginning of the next one make them. Read it entry by entry.",
            hint=2,
            suspects=(partial(_num_cached, reads="anywhere"),),
            answers=r"""
# %% bytes in bytes
@@
-    known = {summary[i : i + 4] for i in range(0, len(summary), 4)}
+    known = summary
""",
        ),
        Known(
            "another-count",
            "That is another number than that of the leading blocks that are known.",
            hint=2,
            suspects=(
                partial(_num_cached, counts="tokens"),
                partial(_num_cached, counts="one more"),
                partial(_num_cached, counts="all or none"),
                partial(_num_cached, counts="shared"),
            ),
            answers=r"""
# %% tokens
@@
-    return count
+    return count * block_size
""",
        ),
        Known(
            "load-first",
            "The load decides only between replicas that hold as many leading blocks; a load is"
            " good if it is small.",
            hint=3,
            suspects=(
                partial(_order, key=lambda cached, load, i: (load, -cached, i)),
                partial(_order, key=lambda cached, load, i: (load, i)),
                partial(_order, key=lambda cached, load, i: (load - cached, i)),
                partial(_order, key=lambda cached, load, i: (load - cached, load, i)),
                partial(_order, key=lambda cached, load, i: (-(cached > 0), load, i)),
                partial(_order, key=lambda cached, load, i: (-cached, -load, i)),
                partial(_order, key=lambda cached, load, i: (-cached, -load, -i)),
            ),
            answers=r"""
# %% the other way round
@@
-        return -num_cached(token_ids, block_size, held), load
+        return load, -num_cached(token_ids, block_size, held)

# %% the largest load first
@@
-        return -num_cached(token_ids, block_size, held), load
+        return -num_cached(token_ids, block_size, held), -load
""",
        ),
        Known(
            "load-forgotten",
            "Of replicas that hold as many leading blocks, the one with the least load is first.",
            hint=3,
            suspects=(
                partial(_order, key=lambda cached, load, i: (-cached, i)),
                partial(_order, key=lambda cached, load, i: (-cached, -i)),
            ),
            answers=r"""
# %% by blocks alone
@@
-        return -num_cached(token_ids, block_size, held), load
+        return -num_cached(token_ids, block_size, held)
""",
        ),
        Known(
            "fewest-first",
            "Who holds the most comes first.",
            hint=3,
            suspects=(
                partial(_order, key=lambda cached, load, i: (cached, load, i)),
                partial(_order, key=lambda cached, load, i: (cached, -load, i)),
                partial(_order, key=lambda cached, load, i: (cached, -load, -i)),
                partial(_order, key=lambda cached, load, i: (cached, i)),
            ),
            answers=r"""
# %% fewest first
@@
-        return -num_cached(token_ids, block_size, held), load
+        return num_cached(token_ids, block_size, held), load
""",
        ),
        Known(
            "not-stable",
            "Where blocks and load are equal, the replicas stay in their order. `sorted` does that"
            " by itself; `reverse=True` and a set do not.",
            hint=3,
            suspects=(partial(_order, key=lambda cached, load, i: (-cached, load, -i)),),
            answers=r"""
# %% the last of equal ones first
@@
-    return sorted(range(len(replicas)), key=place)
+    return sorted(reversed(range(len(replicas))), key=place)
""",
        ),
        Known(
            "not-all",
            "All replicas are in the order, each once, by its number in the list: if the first one"
            " refuses, the next one is asked.",
            hint=3,
            suspects=(
                partial(_order, gives="the best"),
                partial(_order, gives="who has any"),
                partial(_order, gives="ranks"),
            ),
            answers=r"""
# %% the best one
@@
-    return sorted(range(len(replicas)), key=place)
+    return sorted(range(len(replicas)), key=place)[:1]
""",
        ),
    ),
    right=r"""
# %% arrays
from array import array

MASK = 2**32 - 1


def summary(hashes):
    return array("I", sorted({value & MASK for value in hashes})).tobytes()


def num_cached(token_ids, block_size, summary):
    known, previous = frozenset(array("I", summary)), None
    blocks = (len(token_ids) - 1) // block_size
    for i in range(blocks):
        block = token_ids[i * block_size : (i + 1) * block_size]
        previous = hash_block(previous, block)
        if previous & MASK not in known:
            return i
    return max(0, blocks)


def order(token_ids, block_size, replicas):
    scores = [num_cached(token_ids, block_size, held) for _, held in replicas]
    by_load = sorted(range(len(replicas)), key=lambda i: replicas[i][0])
    return sorted(by_load, key=lambda i: scores[i], reverse=True)
""",
)
