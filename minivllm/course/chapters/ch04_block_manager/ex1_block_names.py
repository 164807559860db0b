"""04.1: warm-up: name the blocks of a prompt."""

from __future__ import annotations

import random
from collections.abc import Callable

from minivllm.course.chapters.ch04_block_manager.common import names_of
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_new_result, expect_nothing_kept, one_by_one
from minivllm.engine.block_manager import hash_block

#: (tokens, block size): none, one, exact multiples and their neighbours, on both sides of powers of
#: two, and block sizes that are no powers of two.
SIZES = (
    *((n, 4) for n in (0, 3, 4, 5, 11, 12, 13)),
    *((n, 1) for n in (0, 1, 6, 33, 2051)),
    *((n, 3) for n in (2, 6, 50, 2051)),
    *((n, 16) for n in (15, 64, 70, 271, 272, 273, 513, 4099)),
    *((n, 7) for n in (70, 1001)),
    *((300, size) for size in (100, 151, 300, 301)),
)


def _cases() -> list[tuple[list[int], int]]:
    rng = random.Random(1)
    cases = [([rng.randrange(2048) for _ in range(n)], size) for n, size in SIZES]
    # Large vocabularies, and the tokens 0 and 1.
    cases += [([rng.choice((0, 1, 65_535, 65_536, 151_935)) for _ in range(21)], 5)]
    # Any number from 0 up: of more than 32 bits, too.
    cases += [([rng.choice((5, 2**31 + 5, 2**32 + 5, 2**40 + 5)) for _ in range(22)], 4)]
    # The same tokens, in blocks of other sizes.
    cases += [(list(cases[5][0]), size) for size in (2, 3, 6)]
    return [*cases, ([7] * 12, 4), ([0] * 9, 3), ([1, 2, 3, 4, 9, 9, 9, 9, 1, 2, 3, 4], 4)]


def check_block_names(answer: Callable) -> str:
    count = diagnose(answer, _cases(), names_of, EXERCISE.suspects)
    first = list(range(12)), 4
    expect_new_result(answer, first)
    for second in (([*range(6), 50, *range(7, 12)], 4), (list(range(100, 109)), 3)):
        pairs = one_by_one(first, second)
        expect_nothing_kept(answer, pairs, names_of, "the list has other tokens")
    return f"{count} prompts of 0 to 4,099 tokens, in blocks of 1 to 301"


# --- wrong answers --------------------------------------------------------------------------------


def _unchained(tokens: list[int], size: int) -> list[int]:
    return [hash_block(None, tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size)]


def _with_rest(tokens: list[int], size: int) -> list[int]:
    names: list[int] = []
    for i in range(0, len(tokens), size):
        names.append(hash_block(names[-1] if names else None, tokens[i : i + size]))
    return names


def _without_last(tokens: list[int], size: int) -> list[int]:
    return names_of(tokens[:-1], size)


def _always_without_last(tokens: list[int], size: int) -> list[int]:
    return names_of(tokens, size)[:-1]


def _whole_prefix(tokens: list[int], size: int) -> list[int]:
    return [hash_block(None, tokens[: i + size]) for i in range(0, len(tokens) - size + 1, size)]


def _chained_whole_prefix(tokens: list[int], size: int) -> list[int]:
    names: list[int] = []
    for i in range(0, len(tokens) - size + 1, size):
        names.append(hash_block(names[-1] if names else None, tokens[: i + size]))
    return names


def _one_step(tokens: list[int], size: int) -> list[int]:
    """Each block is chained to the unchained name of its neighbour."""
    names = _unchained(tokens, size)
    return [
        hash_block(names[i - 1] if i else None, tokens[i * size : (i + 1) * size])
        for i in range(len(names))
    ]


def _to_the_first(tokens: list[int], size: int) -> list[int]:
    names: list[int] = []
    for i in range(0, len(tokens) - size + 1, size):
        names.append(hash_block(names[0] if names else None, tokens[i : i + size]))
    return names


def _by_index(tokens: list[int], size: int) -> list[int]:
    names: list[int] = []
    for i in range(len(tokens) // size):
        names.append(hash_block(names[-1] if names else None, tokens[i : i + size]))
    return names


def _from_zero(tokens: list[int], size: int) -> list[int]:
    names = [0]
    for i in range(0, len(tokens) - size + 1, size):
        names.append(hash_block(names[-1], tokens[i : i + size]))
    return names[1:]


EXERCISE = Exercise(
    id="04.1",
    title="Warm-up: name the blocks of a prompt",
    check=check_block_names,
    mistakes=(
        Known(
            "unchained",
            message=(
                "Each of your names stands for its own block alone: hash_block got None, where it"
                " needs the name before.\nTwo prompts with the same second block behind different"
                " first ones would share it."
            ),
            suspects=(_unchained,),
            hint=2,
            answers=r"""
# %% every block for itself
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    return [
        hash_block(None, token_ids[i * block_size : (i + 1) * block_size])
        for i in range(len(token_ids) // block_size)
    ]
""",
        ),
        Known(
            "partial-block-named",
            message=(
                "You name the last block although it is not full.\nMore tokens will be written"
                " into it, and its name would be wrong from then on."
            ),
            suspects=(_with_rest,),
            hint=2,
            answers=r"""
# %% the rest of the prompt gets a name, too
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names = []
    for start in range(0, len(token_ids), block_size):
        names.append(
            hash_block(
                names[-1] if names else None, token_ids[start : start + block_size]
            )
        )
    return names
""",
        ),
        Known(
            "last-block-dropped",
            message=(
                "A prompt that ends exactly where a block ends lacks its last name.\nThat block"
                " is full, so it has one. (A token must be left to compute where a prefix is"
                " *looked for*; that comes later.)"
            ),
            suspects=(_without_last, _always_without_last),
            hint=1,
            answers=r"""
# %% takes an exact multiple for a block that is not full
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        name = hash_block(
            name, token_ids[index * block_size : (index + 1) * block_size]
        )
        names.append(name)
    return names

# %% range ends one too early
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, name = [], None
    for start in range(0, len(token_ids) - block_size, block_size):
        name = hash_block(name, token_ids[start : start + block_size])
        names.append(name)
    return names
""",
        ),
        Known(
            "whole-prefix",
            message=(
                "You hash the whole beginning anew for every block.\nThat takes quadratic work,"
                " and these are not the names asked for: hash_block gets the tokens of one block,"
                " and the name before stands for all that came before."
            ),
            suspects=(_whole_prefix, _chained_whole_prefix),
            answers=r"""
# %% hashes the whole beginning anew each time
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    return [
        hash_block(None, token_ids[:end])
        for end in range(block_size, len(token_ids) + 1, block_size)
    ]
""",
        ),
        Known(
            "always-the-first-name",
            message=(
                "Every block is chained to the first block's name.\nIt should be the name of the"
                " block just before it."
            ),
            suspects=(_to_the_first,),
            answers=r"""
# %% names[0] for names[-1]
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        previous = names[0] if names else None
        names.append(hash_block(previous, token_ids[start : start + block_size]))
    return names
""",
        ),
        Known(
            "one-step-memory",
            message=(
                "The name that you chain to was itself made with None: a name then knows its"
                " neighbour and forgets all before it.\nChain to the name in your list."
            ),
            suspects=(_one_step,),
            answers=r"""
# %% chains to a name that was made without a chain
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, before = [], None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = token_ids[start : start + block_size]
        names.append(hash_block(before, tokens))
        before = hash_block(None, tokens)
    return names
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% eats the caller's list
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, name = [], None
    while len(token_ids) >= block_size:
        name = hash_block(name, token_ids[:block_size])
        del token_ids[:block_size]
        names.append(name)
    return names
""",
        ),
        Known(
            "block-index-for-position",
            message=(
                "Block number i begins at token i * block_size. Your slices begin at token i.\n"
                "All but the first block are cut in the wrong place."
            ),
            suspects=(_by_index,),
            answers=r"""
# %% the slice begins at the index of the block
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, name = [], None
    for index in range(len(token_ids) // block_size):
        name = hash_block(name, token_ids[index : index + block_size])
        names.append(name)
    return names
""",
        ),
        Known(
            "starts-with-zero",
            message=(
                "You chain the first block to 0, and that is a name like any other.\nBefore the"
                " first block there is no name: hash_block gets None."
            ),
            suspects=(_from_zero,),
            answers=r"""
# %% 0 for no name
@@
-    names, name = [], None
+    names, name = [], 0
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% remembers prompts by their length and their ends
SEEN_BY_ENDS = {}


def block_names(token_ids: list[int], block_size: int) -> list[int]:
    key = len(token_ids), block_size, *token_ids[:1], *token_ids[-1:]
    if key not in SEEN_BY_ENDS:
        names, name = [], None
        for start in range(0, len(token_ids) - block_size + 1, block_size):
            name = hash_block(name, token_ids[start : start + block_size])
            names.append(name)
        SEEN_BY_ENDS[key] = names
    return list(SEEN_BY_ENDS[key])

# %% remembers the names of a list, by its address and length
SEEN = {}


def block_names(token_ids: list[int], block_size: int) -> list[int]:
    last, names = SEEN.get("last", (None, None))
    if last is token_ids and len(names) == len(token_ids) // block_size:
        return list(names)
    names, name = [], None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        name = hash_block(name, token_ids[start : start + block_size])
        names.append(name)
    SEEN["last"] = token_ids, list(names)
    return names
""",
        ),
        Known(
            "result-reused",
            answers=r"""
# %% remembers prompts, and gives the same list again
SEEN = {}


def block_names(token_ids: list[int], block_size: int) -> list[int]:
    key = block_size, *token_ids
    if key not in SEEN:
        names, name = [], None
        for start in range(0, len(token_ids) - block_size + 1, block_size):
            name = hash_block(name, token_ids[start : start + block_size])
            names.append(name)
        SEEN[key] = names
    return SEEN[key]
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% tokens of 16 bits
@@
-        name = hash_block(name, token_ids[start : start + block_size])
+        name = hash_block(
+            name, [t & 0xFFFF for t in token_ids[start : start + block_size]]
+        )

# %% tokens of 31 bits
@@
-        name = hash_block(name, token_ids[start : start + block_size])
+        name = hash_block(
+            name, [t & 0x7FFFFFFF for t in token_ids[start : start + block_size]]
+        )

# %% nothing where a large block leaves room for no second one
@@
     names, name = [], None
+    if block_size > 64 and 2 * block_size > len(token_ids):
+        return names

# %% a thousand blocks at most
@@
-        names.append(name)
-    return names
+        names.append(name)
+    return names[:1000]

# %% sixteen blocks at most
@@
-        names.append(name)
-    return names
+        names.append(name)
+    return names[:16]
""",
        ),
    ),
    right=r"""
# %% a while loop, and numpy would do as well
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names = []
    end = block_size
    while end <= len(token_ids):
        names += [
            hash_block(
                names[-1] if names else None, tuple(token_ids[end - block_size : end])
            )
        ]
        end += block_size
    return names
""",
)
