"""04.4: the longest prefix that may be reused."""

from __future__ import annotations

import random
from collections import abc
from collections.abc import Callable

from minivllm.course.chapters.ch04_block_manager.common import names_of
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.engine.block_manager import hash_block

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
        names = names_of(tokens, size)
        blocks = rng.sample(range(100), len(names))
        cache = {
            name: (block, tuple(tokens[i * size : (i + 1) * size]))
            for i, (name, block) in enumerate(zip(names, blocks, strict=True))
        }
        other = [rng.randrange(2048) for _ in range(3 * size)]
        strangers = {
            name: (100 + i, tuple(other[i * size : (i + 1) * size]))
            for i, name in enumerate(names_of(other, size))
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
            {
                name: (i, tuple(other[4 * i : 4 * i + 4]))
                for i, name in enumerate(names_of(other, 4))
            },
            4,
        )
    )
    # Equal blocks: whoever slices at the wrong places finds them, whoever names them in another way
    # does not.
    tokens = [7] * 13
    cases.append((tokens, {name: (i, (7,) * 4) for i, name in enumerate(names_of(tokens, 4))}, 4))
    # Blocks that were registered for themselves, as an unchained cache would.
    tokens = [rng.randrange(2048) for _ in range(14)]
    alone = {
        hash_block(None, tokens[i : i + 4]): (i, tuple(tokens[i : i + 4])) for i in range(0, 12, 4)
    }
    return [*cases, (tokens, alone, 4)]


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
                for name in names_of(t, s)
                if (pair := c.get(name)) and pair[0] in _prefix(t, c, s)
            ],
            lambda t, c, s: names_of(t, s)[: len(_prefix(t, c, s))],
            lambda t, c, s: [c[name][1] for name in names_of(t, s)[: len(_prefix(t, c, s))]],
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


EXERCISE = Exercise(
    id="04.4",
    title="The longest prefix that may be reused",
    check=check_cached_prefix,
    mistakes=(
        Known(
            "nothing-left-to-compute",
            hint=1,
            answers=r"""
# %% all full blocks
@@
-    for index in range((len(token_ids) - 1) // block_size):
+    for index in range(len(token_ids) // block_size):

# %% all full blocks, and no look at the tokens
@@
-    for index in range((len(token_ids) - 1) // block_size):
+    for index in range(len(token_ids) // block_size):
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None:
""",
        ),
        Known(
            "block-given-up",
            hint=2,
            answers=r"""
# %% always one block less
@@
-    for index in range((len(token_ids) - 1) // block_size):
+    for index in range(len(token_ids) // block_size - 1):
""",
        ),
        Known(
            "hash-trusted",
            answers=r"""
# %% an equal name is enough
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None:
""",
        ),
        Known(
            "hit-after-a-miss",
            answers=r"""
# %% looks at every block for itself
@@
-            break
+            continue

# %% a flag for each block, and the names are trusted
@@
-        if hit is None or hit[1] != tokens:
-            break
-        found.append(hit[0])
+        if hit is not None:
+            found.append(hit[0])

# %% passes over a miss, and chains to the last hit
@@
         tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
+        hit = cache.get(hash_block(name, tokens))
+        if hit is None or hit[1] != tokens:
+            continue
@@
-        hit = cache.get(name)
-        if hit is None or hit[1] != tokens:
-            break

# %% stops at a miss, passes over a collision
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None:
@@
             break
+        if hit[1] != tokens:
+            continue
""",
        ),
        Known(
            "unchained",
            hint=3,
            answers=r"""
# %% forgets the name before
@@
-        name = hash_block(name, tokens)
+        name = hash_block(None, tokens)
""",
        ),
        Known(
            "list-against-tuple",
            hint=3,
            answers=r"""
# %% a list never equals a tuple
@@
-        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
+        tokens = token_ids[index * block_size : (index + 1) * block_size]
""",
        ),
        Known(
            "last-hit-given-up",
            hint=1,
            answers=r"""
# %% one block back, to be safe
@@
-    return found
+    return found[:-1]

# %% all full blocks, and one back
@@
-    for index in range((len(token_ids) - 1) // block_size):
+    for index in range(len(token_ids) // block_size):
@@
-    return found
+    return found[:-1]
""",
        ),
        Known(
            "not-the-numbers",
            hint=3,
            answers=r"""
# %% what the cache gives, as it is
@@
-        found.append(hit[0])
+        found.append(hit)

# %% the names
@@
-        found.append(hit[0])
+        found.append(name)
""",
        ),
        Known(
            "block-index-for-position",
            hint=3,
            answers=r"""
# %% the slice begins at the index of the block
@@
-        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
+        tokens = tuple(token_ids[index : index + block_size])
""",
        ),
        Known(
            "two-tokens-left",
            hint=2,
            answers=r"""
# %% one token more than needed
@@
-    for index in range((len(token_ids) - 1) // block_size):
+    for index in range(max(0, len(token_ids) - 2) // block_size):
""",
        ),
        Known(
            "another-chain",
            hint=3,
            answers=r"""
# %% chains to the block's number
@@
-        found.append(hit[0])
+        name = hit[0]
+        found.append(name)

# %% the whole beginning, hashed at once
@@
-        name = hash_block(name, tokens)
+        name = hash_block(None, token_ids[: (index + 1) * block_size])
""",
        ),
    ),
    right=r"""
# %% names first, then the walk
def cached_prefix(
    token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int
) -> list[int]:
    blocks = [
        token_ids[i : i + block_size] for i in range(0, len(token_ids), block_size)
    ][:-1]
    found, name = [], None
    for tokens in blocks:
        name = hash_block(name, tokens)
        block, known = cache.get(name, (None, ()))
        if list(known) != tokens:
            return found
        found.append(block)
    return found
""",
)
