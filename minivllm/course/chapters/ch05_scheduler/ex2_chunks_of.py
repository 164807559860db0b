"""05.2: chunks between decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_nothing_kept

#: (tokens left of each request, budget) -> how many of them decode; counts their tokens down.
Decode = Callable[[list[int], int], int]


def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    return _planned(prompt, decodes, budget, _oldest_first)


def _planned(prompt: int, decodes: list[int], budget: int, decode: Decode) -> list[int]:
    left, chunks = list(decodes), []
    # A right step uses up at least one token. A wrong plan that never ends is cut off here.
    most_steps = prompt + sum(decodes)
    while prompt > 0 and len(chunks) < most_steps:
        chunks.append(min(prompt, budget - decode(left, budget)))
        prompt -= chunks[-1]
    return chunks


def _oldest_first(left: list[int], budget: int) -> int:
    chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
    for i in chosen:
        left[i] -= 1
    return len(chosen)


def _newest_first(left: list[int], budget: int) -> int:
    chosen = [i for i, tokens in enumerate(left) if tokens > 0][-budget:]
    for i in chosen:
        left[i] -= 1
    return len(chosen)


def _everybody(left: list[int], budget: int) -> int:
    active = [i for i, tokens in enumerate(left) if tokens > 0]
    for i in active:
        left[i] -= 1
    return len(active)


def _one_too_few(left: list[int], budget: int) -> int:
    _everybody(left, budget)
    return sum(tokens > 0 for tokens in left)


def _one_too_many(left: list[int], budget: int) -> int:
    """A request with nothing left decodes once more."""
    chosen = [i for i, tokens in enumerate(left) if tokens >= 0][:budget]
    for i in chosen:
        left[i] -= 1
    return len(chosen)


def _first_only(left: list[int], budget: int) -> int:
    """Only the first in the list can decode."""
    return _everybody_of(left, range(min(budget, len(left))))


def _by_rest(left: list[int], budget: int) -> int:
    """Those with the fewest tokens left first."""
    return _everybody_of(left, _active(left, lambda i: left[i])[:budget])


def _by_rest_down(left: list[int], budget: int) -> int:
    """Those with the most tokens left first."""
    return _everybody_of(left, _active(left, lambda i: -left[i])[:budget])


def _active(left: list[int], key: Callable[[int], int]) -> list[int]:
    return sorted((i for i, tokens in enumerate(left) if tokens > 0), key=key)


def _everybody_of(left: list[int], some: Iterable[int]) -> int:
    chosen = [i for i in some if left[i] > 0]
    for i in chosen:
        left[i] -= 1
    return len(chosen)


def _until_empty(left: list[int], budget: int) -> int:
    """All of a request's tokens in one step."""
    used = 0
    for i, tokens in enumerate(left):
        now = min(tokens, budget - used)
        left[i] -= now
        used += now
    return used


def _with(decode: Decode) -> Callable[[int, list[int], int], list[int]]:
    return lambda prompt, decodes, budget: _planned(prompt, decodes, budget, decode)


# --- suspects -------------------------------------------------------------------------------------

ignoring = _with(lambda left, budget: 0)
endless = _with(lambda left, budget: len(left))
endless_waiting = _with(lambda left, budget: min(len(left), budget))
early = _with(_one_too_few)
late = _with(_one_too_many)
first_only = _with(_first_only)
shortest_rest_first = _with(_by_rest)
longest_rest_first = _with(_by_rest_down)
one_place_kept = _with(lambda left, budget: _oldest_first(left, budget - 1))
at_once = _with(_until_empty)
negative = _with(_everybody)
clamped = _with(lambda left, budget: min(budget, _everybody(left, budget)))
from_behind = _with(_newest_first)
at_least_one = _with(lambda left, budget: min(budget - 1, _everybody(left, budget)))
at_least_one_in_turn = _with(lambda left, budget: min(budget - 1, _oldest_first(left, budget)))


def even(prompt: int, decodes: list[int], budget: int) -> list[int]:
    count = len(chunks_of(prompt, decodes, budget))
    return [prompt // count + (i < prompt % count) for i in range(count)]


def fixed(prompt: int, decodes: list[int], budget: int) -> list[int]:
    chunk = max(1, budget - sum(tokens > 0 for tokens in decodes))
    return [min(chunk, prompt - start) for start in range(0, prompt, chunk)]


def full_last(prompt: int, decodes: list[int], budget: int) -> list[int]:
    chunks = chunks_of(prompt, decodes, budget)
    left = [max(0, tokens - len(chunks) + 1) for tokens in decodes]
    return [*chunks[:-1], budget - sum(tokens > 0 for tokens in left)] if chunks else []


def last_missing(prompt: int, decodes: list[int], budget: int) -> list[int]:
    return chunks_of(prompt, decodes, budget)[:-1]


def without_zeros(prompt: int, decodes: list[int], budget: int) -> list[int]:
    return [chunk for chunk in chunks_of(prompt, decodes, budget) if chunk]


def clamped_without_zeros(prompt: int, decodes: list[int], budget: int) -> list[int]:
    return [chunk for chunk in clamped(prompt, decodes, budget) if chunk]


# --- the check ------------------------------------------------------------------------------------


def check_chunks_of(answer: Callable) -> str:
    rng = Random(2)
    roomy = [
        (100, [3, 1], 32),
        (5, [], 8),
        (8, [], 8),
        (9, [], 8),
        (7, [2, 2, 2], 4),
        (1, [9], 2),
        (30, [0, 4], 8),
        (3000, [1 + 37 * i % 150 for i in range(30)], 48),
        # Many who decode, and long chunks.
        (9000, [1 + 37 * i % 9 for i in range(300)], 8192),
    ]
    for _ in range(6):
        decodes = [rng.randint(1, 12) for _ in range(rng.randint(1, 8))]
        roomy.append((rng.randint(20, 150), decodes, len(decodes) + rng.randint(4, 24)))
    # First where all who decode fit the budget, so that mistakes about more have names of theirs.
    diagnose(answer, roomy, chunks_of, EXERCISE.suspects)
    tight = [
        (6, [2, 2], 2),
        (5, [3, 1, 2], 2),
        (10, [1, 1, 1, 1], 3),
        (4, [1, 5, 1], 1),
        (3, [2], 1),
        (90, [1 + 29 * i % 40 for i in range(40)], 16),
        # Thousands of steps: a long wait, and a long prompt in small chunks.
        (1500, [1200, 0, 700], 1),
        (6100, [10], 1),
    ]
    for _ in range(5):
        decodes = [rng.randint(1, 9) for _ in range(rng.randint(5, 9))]
        tight.append((rng.randint(5, 40), decodes, rng.randint(1, 4)))
    diagnose(answer, roomy + tight, chunks_of, EXERCISE.suspects)
    again = [((7, [2, 2], 4), (9, [1, 5], 3))]
    expect_nothing_kept(answer, again, chunks_of, "the prompt and the budget have changed")
    return f"right for {len(roomy) + len(tight)} prompts"


EXERCISE = Exercise(
    id="05.2",
    title="Chunks between decodes",
    check=check_chunks_of,
    mistakes=(
        Known(
            "ignores-decodes",
            "Every chunk of yours is as large as the whole budget. Those who decode take a token"
            " each out of it first.",
            suspects=(ignoring,),
            answers=r"""
# %% chunks of the whole budget
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    return [min(budget, prompt - start) for start in range(0, prompt, budget)]
""",
        ),
        Known(
            "fixed-chunk",
            "Your chunk is the same in every step. When a running request ends, its token of the"
            " budget is free.",
            suspects=(fixed,),
            answers=r"""
# %% what the first step leaves, in every step
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    room = max(1, budget - sum(1 for tokens in decodes if tokens > 0))
    return [min(room, prompt - start) for start in range(0, prompt, room)]
""",
        ),
        Known(
            "decodes-never-end",
            "Your running requests decode for ever. `decodes[i]` is how many tokens request i has"
            " left: once they are decoded, its token of the budget goes to the prompt.",
            suspects=(endless, endless_waiting),
            answers=r"""
# %% len(decodes) tokens in every step
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    chunks = []
    while prompt > 0:
        chunk = min(prompt, max(1, budget - len(decodes)))
        chunks.append(chunk)
        prompt -= chunk
    return chunks
""",
        ),
        Known(
            "ends-too-early",
            "In the step in which a running request decodes its last token, it still takes one"
            " token of the budget; you count it off before.",
            suspects=(early,),
            answers=r"""
# %% counts down before it counts
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        left = [tokens - 1 for tokens in left if tokens > 1]
        chunk = min(prompt, max(0, budget - len(left)))
        chunks.append(chunk)
        prompt -= chunk
    return chunks
""",
        ),
        Known(
            "last-chunk-too-long",
            "Your chunks add up to more than the prompt. The last one is what is left of the"
            " prompt, not of the budget.",
            hint=3,
            suspects=(full_last,),
            answers=r"""
# %% forgets that the prompt ends
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while sum(chunks) < prompt:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
        for i in chosen:
            left[i] -= 1
        chunks.append(budget - len(chosen))
    return chunks
""",
        ),
        Known(
            "over-budget",
            "More requests want to decode than the budget has tokens. You let all of them go on."
            " Only the oldest, as many as fit, get their token in this step; the others have as"
            " many left as before.",
            hint=2,
            suspects=(clamped,),
            answers=r"""
# %% everybody decodes, however small the budget
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        active = sum(tokens > 0 for tokens in left)
        left = [max(0, tokens - 1) for tokens in left]
        chunk = min(prompt, max(0, budget - active))
        chunks.append(chunk)
        prompt -= chunk
    return chunks
""",
        ),
        Known(
            "never-waits",
            "You give the prompt a token in every step, even where those who decode have used up"
            " the budget.",
            suspects=(at_least_one, at_least_one_in_turn, one_place_kept),
            answers=r"""
# %% a token for the prompt in every step, so that it gets on
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        active = sum(tokens > 0 for tokens in left)
        left = [max(0, tokens - 1) for tokens in left]
        chunk = min(prompt, max(1, budget - active))
        chunks.append(chunk)
        prompt -= chunk
    return chunks
""",
        ),
        Known(
            "negative-chunk",
            "More requests decode than the budget has tokens, and your chunk becomes negative:"
            " the prompt grows. Only as many decode as the budget allows, and the chunk is 0.",
            hint=2,
            suspects=(negative,),
            answers=r"""
# %% more decode than the budget has
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        active = sum(tokens > 0 for tokens in left)
        left = [tokens - 1 for tokens in left]
        chunks.append(min(prompt, budget - active))
        prompt -= chunks[-1]
    return chunks
""",
        ),
        Known(
            "skips-empty-steps",
            "A step that has nothing left for the prompt is a step all the same: the prompt"
            " waits, and its chunk is 0. Only as many requests decode in it as the budget allows.",
            suspects=(without_zeros, clamped_without_zeros),
            answers=r"""
# %% leaves out the steps in which the prompt waits
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
        for i in chosen:
            left[i] -= 1
        chunk = min(prompt, budget - len(chosen))
        if chunk:
            chunks.append(chunk)
        prompt -= chunk
    return chunks
""",
        ),
        Known(
            "newest-first",
            "When the budget is too small for all who decode, the *oldest* go first.",
            hint=2,
            suspects=(from_behind,),
            answers=r"""
# %% the last ones decode when the budget is short
@@
-        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
+        chosen = [i for i, tokens in enumerate(left) if tokens > 0][-budget:]
""",
        ),
        Known(
            "ends-too-late",
            "A request that has no tokens left decodes once more in your plan, or one that never"
            " had any. Only those with tokens left take part.",
            suspects=(late,),
            answers=r"""
# %% `>=` for `>`
@@
-        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
+        chosen = [i for i, tokens in enumerate(left) if tokens >= 0][:budget]
""",
        ),
        Known(
            "first-in-the-list-only",
            "You look at the first `budget` requests of the list only. When these have no tokens"
            " left, the next in the list decode.",
            hint=2,
            suspects=(first_only,),
            answers=r"""
# %% cut first, filtered then
@@
-        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
+        chosen = [i for i, tokens in enumerate(left[:budget]) if tokens > 0]
""",
        ),
        Known(
            "ordered-by-rest",
            "When the budget is too small for all who decode, you choose by how much they have"
            " left. The oldest go first: those in front in the list.",
            hint=2,
            suspects=(shortest_rest_first, longest_rest_first),
            answers=r"""
# %% who is nearly done goes first
@@
-        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
+        active = [i for i, tokens in enumerate(left) if tokens > 0]
+        chosen = sorted(active, key=lambda i: left[i])[:budget]
""",
        ),
        Known(
            "even-chunks",
            "You cut the prompt into equal chunks. Each step gives it all that is left of the"
            " budget.",
            suspects=(even,),
            answers=r"""
# %% equal parts
@@
         prompt -= chunks[-1]
-    return chunks
+    total, count = sum(chunks), len(chunks)
+    return [total // count + (i < total % count) for i in range(count)]
""",
        ),
        Known(
            "last-chunk-missing",
            "The last chunk is missing: the prompt is complete when its chunks add up to it.",
            suspects=(last_missing,),
            answers=r"""
# %% the loop ends when the rest fits
@@
-        chunks.append(min(prompt, budget - len(chosen)))
-        prompt -= chunks[-1]
+        if prompt <= budget - len(chosen):
+            break
+        chunks.append(budget - len(chosen))
+        prompt -= chunks[-1]
""",
        ),
        Known(
            "all-at-once",
            "A request decodes one token per step. You let it take all that it has left at once, as"
            " far as the budget goes.",
            suspects=(at_once,),
            answers=r"""
# %% all tokens that are left, at once
@@
-        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
-        for i in chosen:
-            left[i] -= 1
-        chunks.append(min(prompt, budget - len(chosen)))
+        room = budget
+        for i, tokens in enumerate(left):
+            left[i] -= min(tokens, room)
+            room -= min(tokens, room)
+        chunks.append(min(prompt, room))
""",
        ),
        Known(
            "raised",
            answers=r"""
# %% calls itself for the rest, too deep for a long prompt
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    if prompt <= 0:
        return []
    chosen = [i for i, tokens in enumerate(decodes) if tokens > 0][:budget]
    left = [tokens - (i in chosen) for i, tokens in enumerate(decodes)]
    chunk = min(prompt, budget - len(chosen))
    return [chunk, *chunks_of(prompt - chunk, left, budget)]
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% gives up after a thousand steps
@@
-    while prompt > 0:
+    while prompt > 0 and len(chunks) < 1000:

# %% at most 64 decode in a step
@@
-        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
+        chosen = [i for i, tokens in enumerate(left) if tokens > 0][: min(budget, 64)]

# %% no chunk above 2,048 tokens
@@
-        chunks.append(min(prompt, budget - len(chosen)))
+        chunks.append(min(prompt, budget - len(chosen), 2048))
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% counts down the caller's list
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    chunks = []
    while prompt > 0:
        chosen = [i for i, tokens in enumerate(decodes) if tokens > 0][:budget]
        for i in chosen:
            decodes[i] -= 1
        chunks.append(min(prompt, budget - len(chosen)))
        prompt -= chunks[-1]
    return chunks
""",
        ),
    ),
    right=r"""
# %% one by one
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left = decodes.copy()
    chunks = []
    while True:
        room = budget
        for i in range(len(left)):
            if left[i] and room:
                left[i] -= 1
                room -= 1
        if prompt <= room:
            return [*chunks, prompt]
        chunks.append(room)
        prompt -= room
""",
)
