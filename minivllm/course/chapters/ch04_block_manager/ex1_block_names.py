"""04.1: warm-up: name the blocks of a prompt."""

from __future__ import annotations

import random
from collections.abc import Callable

from minivllm.course.chapters.ch04_block_manager.common import names_of
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.engine.block_manager import hash_block


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
            lambda tokens, size: names_of(tokens[:-1], size),
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
    count = diagnose(answer, cases, names_of, suspects)
    return f"{count} prompts, in blocks of 1, 4 and 16 tokens"


EXERCISE = Exercise(
    id="04.1",
    title="Warm-up: name the blocks of a prompt",
    check=check_block_names,
    mistakes=(
        Known(
            "unchained",
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
