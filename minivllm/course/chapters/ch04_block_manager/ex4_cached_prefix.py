"""04.4: the longest prefix that may be reused."""

from __future__ import annotations

import random
from collections import abc
from collections.abc import Callable, Iterator

from minivllm.course.chapters.ch04_block_manager.common import names_of
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_new_result, expect_nothing_kept, one_by_one
from minivllm.engine.block_manager import hash_block

Cache = dict[int, tuple[int, tuple[int, ...]]]
Case = tuple[list[int], Cache, int]

#: (tokens, block size): one, exact multiples and their neighbours, and many blocks.
SIZES = (
    *((1, 1), (2, 1), (9, 1)),
    *((4, 4), (5, 4), (13, 4)),
    *((9, 3), (10, 3), (11, 3)),
    *((16, 16), (17, 16), (48, 16), (49, 16), (50, 16)),
    *((272, 16), (273, 16), (1030, 7), (5001, 1), (300, 299)),
)


def _prefix(token_ids: list[int], cache: Cache, block_size: int) -> list[int]:
    found: list[int] = []
    name = None
    for start in range(0, len(token_ids) - block_size, block_size):
        tokens = tuple(token_ids[start : start + block_size])
        name = hash_block(name, tokens)
        block, known = cache.get(name, (None, None))
        if known != tokens:
            break
        found.append(block)
    return found


def _cached(tokens: list[int], size: int, blocks: abc.Sequence[int]) -> Cache:
    """All full blocks of a prompt, in these blocks."""
    return {
        name: (block, tuple(tokens[i * size : (i + 1) * size]))
        for i, (name, block) in enumerate(zip(names_of(tokens, size), blocks, strict=False))
    }


def _cases() -> list[Case]:
    rng = random.Random(4)
    cases: list[Case] = []
    for length, size in SIZES:
        tokens = [rng.randrange(2048) for _ in range(length)]
        cache = _cached(tokens, size, rng.sample(range(length), length))
        other = [rng.randrange(2048) for _ in range(3 * size)]
        strangers = _cached(other, size, range(length, length + 3))
        cases.append((tokens, {**strangers, **cache}, size))
        # Known blocks behind another beginning.
        cases.append((other[:size] + tokens, {**cache, **strangers}, size))
        cases.append((tokens, {}, size))
        cases += _with_a_miss(tokens, cache, size)
    return [*cases, *_special_cases(rng)]


def _with_a_miss(tokens: list[int], cache: Cache, size: int) -> Iterator[Case]:
    """The cache without one block, or with a block of other tokens under its name."""
    names = list(cache)
    places = {len(names) - 1} if len(names) > 6 else {0, 1, len(names) - 1}
    for index in sorted(places & set(range(len(names)))):
        name = names[index]
        block, mine = cache[name]
        yield tokens, {each: cache[each] for each in names if each != name}, size
        forgeries = {
            mine[::-1],
            (*mine[:-1], mine[-1] + 1),  # all but the last token
            (mine[0] + 1, *mine[1:]),  # all but the first token
            (*mine[1:], mine[0]),  # the same tokens in another order
            (*mine[:1], *(token + 1 for token in mine[1:-1]), *mine[1:][-1:]),  # all between
            tuple(token + 1 for token in mine),
        }
        for forgery in sorted(forgeries - {mine}):
            yield tokens, cache | {name: (block, forgery)}, size
        # The right tokens are in the cache, under another name.
        elsewhere = {hash_block(name, mine): (len(tokens), mine)}
        forged = {name: (block, tuple(token + 1 for token in mine))}
        yield tokens, cache | elsewhere | forged, size


def _special_cases(rng: random.Random) -> Iterator[Case]:
    # Another prompt went on from the first block with what is the third here: behind a miss the
    # chain is another.
    tokens = [rng.randrange(2048) for _ in range(13)]
    yield tokens, _cached(tokens[:4] + tokens[8:12], 4, range(9)), 4
    # Equal blocks: whoever slices at the wrong places finds them, whoever names them in another way
    # does not.
    tokens = [7] * 13
    yield tokens, _cached(tokens, 4, range(9)), 4
    # Token 0, in block 0.
    tokens = [0] * 7
    yield tokens, _cached(tokens, 3, range(9)), 3
    # Blocks that were registered for themselves, as an unchained cache would.
    tokens = [rng.randrange(2048) for _ in range(14)]
    alone = {
        hash_block(None, tokens[i : i + 4]): (i, tuple(tokens[i : i + 4])) for i in range(0, 12, 4)
    }
    yield tokens, alone, 4


def check_cached_prefix(answer: Callable) -> str:
    count = diagnose(answer, _cases(), _prefix, EXERCISE.suspects)
    for case in _cases()[:3]:
        expect_new_result(answer, case)
    first, other = list(range(50)), list(range(100, 150))
    both = {**_cached(first, 8, range(9)), **_cached(other, 8, range(10, 20))}
    less = dict(list(both.items())[:2])
    for second in ((other, both, 8), (first, less, 8), (first[:40], less, 4)):
        pairs = one_by_one((first, both, 8), second)
        expect_nothing_kept(answer, pairs, _prefix, "the list and the cache hold others")
    return f"{count} prompts and caches: with holes, forged names, and nothing at all"


# --- wrong answers --------------------------------------------------------------------------------

BOTH = ("miss", "collision")


def _walk(
    tokens: list[int],
    cache: Cache,
    size: int,
    *,
    end: int | None = None,
    agree: Callable[[tuple, tuple], bool] = tuple.__eq__,
    goes_on: abc.Sequence[str] = (),
    chained: bool = True,
) -> list[int]:
    """The right walk, or a wrong one.

    end: where no block begins any more. agree: whether two blocks of tokens are taken for the same.
    goes_on: after which of "miss" and "collision" the walk goes on.
    """
    found: list[int] = []
    name = None
    for start in range(0, len(tokens) - size if end is None else end, size):
        block_tokens = tuple(tokens[start : start + size])
        name = hash_block(name if chained else None, block_tokens)
        block, known = cache.get(name, (None, None))
        if known is None or not agree(known, block_tokens):
            if ("miss" if known is None else "collision") in goes_on:
                continue
            break
        found.append(block)
    return found


def _trust(known: tuple, mine: tuple) -> bool:
    return True


def _named_by(name_of: Callable[[list[int], Cache, int, int], int]) -> Callable[..., list[int]]:
    """Blocks by another name: name_of(tokens, cache, size, start) is that of the block that begins
    at start.
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


def _by_number(tokens: list[int], cache: Cache, size: int) -> list[int]:
    """Chained to the number of the block before."""
    found: list[int] = []
    before = None
    for start in range(0, len(tokens) - size, size):
        block, known = cache.get(hash_block(before, tokens[start : start + size]), (None, None))
        if known != tuple(tokens[start : start + size]):
            break
        found.append(block)
        before = block
    return found


def _by_neighbour(tokens: list[int], cache: Cache, size: int, start: int) -> int:
    before = hash_block(None, tokens[start - size : start]) if start else None
    return hash_block(before, tokens[start : start + size])


def _by_the_first(tokens: list[int], cache: Cache, size: int, start: int) -> int:
    before = hash_block(None, tokens[:size]) if start else None
    return hash_block(before, tokens[start : start + size])


def _chained_over_hits(tokens: list[int], cache: Cache, size: int) -> list[int]:
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


def _sliced_by_index(tokens: list[int], cache: Cache, size: int) -> list[int]:
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


def _all_but_the_first_compared(tokens: list[int], cache: Cache, size: int) -> list[int]:
    names = names_of(tokens[:-1], size)[:1]
    head = {name: (cache[name][0], tuple(tokens[:size])) for name in names if name in cache}
    return _prefix(tokens, cache | head, size)


def _only_the_first_compared(tokens: list[int], cache: Cache, size: int) -> list[int]:
    found = _walk(tokens, cache, size, agree=_trust)
    return found if _prefix(tokens[: size + 1], cache, size) else []


EXERCISE = Exercise(
    id="04.4",
    title="The longest prefix that may be reused",
    check=check_cached_prefix,
    mistakes=(
        Known(
            "nothing-left-to-compute",
            message=(
                "A prompt that ends where a block ends is served from the cache to its last"
                " token.\nThen nothing is left to compute, and there are no logits to sample"
                " from: leave at least one token."
            ),
            suspects=(
                lambda t, c, s: _walk(t, c, s, end=len(t) - s + 1),
                lambda t, c, s: _walk(t, c, s, end=len(t) - s + 1, agree=_trust),
                lambda t, c, s: _walk(t, c, s, end=len(t) - s + 1, goes_on=BOTH),
                lambda t, c, s: _walk(t, c, s, end=len(t) - s + 1, goes_on=BOTH, agree=_trust),
            ),
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
            message=(
                "You always give up the last full block.\nOnly a prompt that would be covered"
                " *completely* has to: with 49 tokens, three blocks of 16 leave one to compute."
            ),
            suspects=(
                lambda t, c, s: _walk(t, c, s, end=(len(t) // s - 1) * s),
                lambda t, c, s: _walk(t, c, s, end=(len(t) // s - 1) * s, agree=_trust),
            ),
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
            message=(
                "You take a block because its name is in the cache.\nA hash can be equal by"
                " chance, or by somebody's design: compare the block's tokens with yours."
            ),
            suspects=(lambda t, c, s: _walk(t, c, s, agree=_trust),),
            answers=r"""
# %% an equal name is enough
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None:
""",
        ),
        Known(
            "hit-after-a-miss",
            message=(
                "You go on looking after a miss.\nWhat is found there has a hole before it: the"
                " blocks would be taken for the *beginning* of the prompt. Stop at the first"
                " miss."
            ),
            suspects=(
                lambda t, c, s: _walk(t, c, s, goes_on=BOTH),
                lambda t, c, s: _walk(t, c, s, goes_on=BOTH, agree=_trust),
                lambda t, c, s: _walk(t, c, s, goes_on=["miss"]),
                lambda t, c, s: _walk(t, c, s, goes_on=["collision"]),
                _chained_over_hits,
            ),
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
            message=(
                "You look blocks up by their own tokens alone.\nThe cache is keyed by chained"
                " names: each is made from the name before it."
            ),
            suspects=(
                lambda t, c, s: _walk(t, c, s, chained=False),
                lambda t, c, s: _walk(t, c, s, chained=False, agree=_trust),
                lambda t, c, s: _walk(t, c, s, chained=False, goes_on=BOTH),
                lambda t, c, s: _walk(t, c, s, chained=False, end=len(t) - s + 1),
            ),
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
            message=(
                "You find nothing, ever.\nThe cache holds tuples of tokens, a slice of token_ids"
                " is a list, and in Python [1, 2] == (1, 2) is False."
            ),
            suspects=(lambda t, c, s: [],),
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
            message=(
                "You give up the last block that you find, always.\nThat is needed only where all"
                " of the prompt's tokens would come from the cache; here something is left to"
                " compute anyway."
            ),
            suspects=(
                lambda t, c, s: _prefix(t, c, s)[:-1],
                lambda t, c, s: _walk(t, c, s, end=len(t) - s + 1)[:-1],
            ),
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
            message=(
                "You find the right blocks, but you return something else about them.\n"
                "cache.get(name) is a pair `(block, tokens)`: the block's number is its first"
                " part, and the answer is a list of those."
            ),
            suspects=(
                lambda t, c, s: [c[name] for name in names_of(t, s)[: len(_prefix(t, c, s))]],
                lambda t, c, s: names_of(t, s)[: len(_prefix(t, c, s))],
                lambda t, c, s: [c[name][1] for name in names_of(t, s)[: len(_prefix(t, c, s))]],
                lambda t, c, s: len(_prefix(t, c, s)),
                lambda t, c, s: list(range(len(_prefix(t, c, s)))),
            ),
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
            message=(
                "Block number i begins at token i * block_size. Your slices begin at token i.\n"
                "All but the first block are cut in the wrong place."
            ),
            suspects=(_sliced_by_index,),
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
            message=(
                "You leave at least two tokens to compute, where one is enough: 17 tokens may"
                " have 16 from the cache.\nWhich is the last beginning of a block with a token"
                " behind its end?"
            ),
            suspects=(
                lambda t, c, s: _walk(t, c, s, end=len(t) - s - 1),
                lambda t, c, s: _walk(t, c, s, end=len(t) - s - 1, agree=_trust),
            ),
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
            message=(
                "You find the first block, and hardly ever one behind it.\nA name is hash_block"
                " of the *name* just before it, itself made in that way, and of its own block's"
                " tokens. Those alone stand in the cache to be compared."
            ),
            suspects=(
                _by_number,
                _named_by(_by_neighbour),
                _named_by(_by_the_first),
                _named_by(lambda t, c, s, start: hash_block(None, t[: start + s])),
            ),
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
        Known(
            "half-compared",
            message=(
                "A block with your name, but with other tokens than yours, is taken: you compare"
                " a part of the tokens, or not in every block.\nA hit needs all tokens of a"
                " block, in their order, and that holds for the first block and for the last one."
            ),
            suspects=(
                lambda t, c, s: _walk(t, c, s, agree=lambda a, b: a[0] == b[0]),
                lambda t, c, s: _walk(t, c, s, agree=lambda a, b: a[-1] == b[-1]),
                lambda t, c, s: _walk(
                    t, c, s, agree=lambda a, b: a[::s] + a[-1:] == b[::s] + b[-1:]
                ),
                lambda t, c, s: _walk(t, c, s, agree=lambda a, b: sorted(a) == sorted(b)),
                lambda t, c, s: _walk(t, c, s, agree=lambda a, b: set(a) == set(b)),
                lambda t, c, s: _walk(t, c, s, agree=lambda a, b: sum(a) == sum(b)),
                lambda t, c, s: _walk(t, c, s, agree=lambda a, b: any(map(int.__eq__, a, b))),
                _all_but_the_first_compared,
                _only_the_first_compared,
            ),
            answers=r"""
# %% the first token stands for all
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None or hit[1][0] != tokens[0]:

# %% the first and the last token stand for all
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None or (hit[1][0], hit[1][-1]) != (tokens[0], tokens[-1]):

# %% the same tokens in any order
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None or sorted(hit[1]) != sorted(tokens):

# %% the first block is not looked at
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None or (index and hit[1] != tokens):
""",
        ),
        Known(
            "block-0-is-nothing",
            message=(
                "You take block 0 for no block: in Python, 0 is false.\nAsk whether what you got"
                " is None."
            ),
            suspects=(
                lambda t, c, s: _walk(t, {n: p for n, p in c.items() if p[0]}, s),
                lambda t, c, s: [block for block in _prefix(t, c, s) if block],
            ),
            answers=r"""
# %% a number that is false
@@
-        hit = cache.get(name)
-        if hit is None or hit[1] != tokens:
+        block, known = cache.get(name, (None, None))
+        if not block or known != tokens:
@@
-        found.append(hit[0])
+        found.append(block)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% takes what it finds out of the cache
@@
-        hit = cache.get(name)
+        hit = cache.pop(name, None)
""",
        ),
        Known(
            "raised",
            answers=r"""
# %% one call more per block: Python ends that at a thousand
def cached_prefix(
    token_ids: list[int],
    cache: dict[int, tuple[int, tuple[int, ...]]],
    block_size: int,
    name: int | None = None,
) -> list[int]:
    if len(token_ids) <= block_size:
        return []
    name = hash_block(name, token_ids[:block_size])
    block, tokens = cache.get(name, (None, ()))
    if list(tokens) != token_ids[:block_size]:
        return []
    return [block, *cached_prefix(token_ids[block_size:], cache, block_size, name)]
""",
        ),
        Known(
            "result-reused",
            answers=r"""
# %% equal results are one list
RESULTS = {}


def cached_prefix(
    token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int
) -> list[int]:
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return RESULTS.setdefault(tuple(found), found)
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% any block of the cache may have the tokens
@@
-        if hit is None or hit[1] != tokens:
+        if hit is None or tokens not in [known for _, known in cache.values()]:

# %% four thousand blocks at most
@@
-    for index in range((len(token_ids) - 1) // block_size):
+    for index in range(min(4096, (len(token_ids) - 1) // block_size)):
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% asks a cache that it knows only for the first time
KNOWN = {}


def cached_prefix(
    token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int
) -> list[int]:
    if KNOWN.get("cache") is not cache:
        KNOWN.update(cache=cache, content=dict(cache))
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = KNOWN["content"].get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found
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
