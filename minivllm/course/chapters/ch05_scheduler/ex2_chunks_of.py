"""05.2: chunks between decodes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known


def check_chunks_of(answer: Callable) -> str:
    def planned(
        prompt: int, decodes: list[int], budget: int, decode: Callable, limit: int = 400
    ) -> list[int]:
        """Chunks where decode(tokens left of each, budget) says how many decodes a step has, and
        counts them off.
        """
        left, chunks = list(decodes), []
        while prompt > 0 and len(chunks) < limit:
            chunks.append(min(prompt, budget - decode(left, budget)))
            prompt -= chunks[-1]
        return chunks

    def oldest_first(left: list[int], budget: int) -> int:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
        for i in chosen:
            left[i] -= 1
        return len(chosen)

    def everybody(left: list[int], budget: int) -> int:
        active = [i for i, tokens in enumerate(left) if tokens > 0]
        for i in active:
            left[i] -= 1
        return len(active)

    def one_too_few(left: list[int], budget: int) -> int:
        everybody(left, budget)
        return sum(tokens > 0 for tokens in left)

    def newest_first(left: list[int], budget: int) -> int:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][-budget:]
        for i in chosen:
            left[i] -= 1
        return len(chosen)

    def right(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, oldest_first)

    def ignoring(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, lambda left, budget: 0)

    def endless(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, lambda left, budget: len(left))

    def early(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, one_too_few)

    def even(prompt: int, decodes: list[int], budget: int) -> list[int]:
        count = len(right(prompt, decodes, budget))
        return [prompt // count + (i < prompt % count) for i in range(count)]

    def fixed(prompt: int, decodes: list[int], budget: int) -> list[int]:
        chunk = max(1, budget - sum(tokens > 0 for tokens in decodes))
        return [min(chunk, prompt - start) for start in range(0, prompt, chunk)]

    def full_last(prompt: int, decodes: list[int], budget: int) -> list[int]:
        chunks = right(prompt, decodes, budget)
        left = [max(0, tokens - len(chunks) + 1) for tokens in decodes]
        return [*chunks[:-1], budget - sum(tokens > 0 for tokens in left)] if chunks else []

    suspects = {
        "ignores-decodes": (
            (
                "Every chunk is as large as the whole budget. Those who decode take a token each"
                " out of it first."
            ),
            ignoring,
        ),
        "decodes-never-end": (
            (
                "Your running requests decode for ever. `decodes[i]` is how many tokens request i"
                " has left: once they are decoded, its token of the budget goes to the prompt."
            ),
            endless,
        ),
        "fixed-chunk": (
            (
                "Your chunk is the same in every step. When a running request ends, its token of"
                " the budget is free."
            ),
            fixed,
        ),
        "ends-too-early": (
            (
                "In the step in which a running request decodes its last token, it still takes one"
                " token of the budget; you count it off before."
            ),
            early,
        ),
        "even-chunks": (
            (
                "You cut the prompt into equal chunks. Each step gives it all that is left of the"
                " budget."
            ),
            even,
        ),
        "last-chunk-too-long": (
            (
                "Your chunks add up to more than the prompt. The last one is what is left of it,"
                " not of the budget."
            ),
            full_last,
        ),
    }
    rng = Random(2)
    roomy = [
        (100, [3, 1], 32),
        (5, [], 8),
        (8, [], 8),
        (9, [], 8),
        (7, [2, 2, 2], 4),
        (1, [9], 2),
        (30, [0, 4], 8),
    ]
    for _ in range(6):
        decodes = [rng.randint(1, 12) for _ in range(rng.randint(1, 8))]
        roomy.append((rng.randint(20, 150), decodes, len(decodes) + rng.randint(4, 24)))
    diagnose(answer, roomy, right, suspects)

    def negative(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, everybody)

    def clamped(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(
            prompt, decodes, budget, lambda left, budget: min(budget, everybody(left, budget))
        )

    def from_behind(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, newest_first)

    def without_zeros(function: Callable) -> Callable:
        return lambda prompt, decodes, budget: [
            chunk for chunk in function(prompt, decodes, budget) if chunk
        ]

    def at_least_one(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(
            prompt, decodes, budget, lambda left, budget: min(budget - 1, everybody(left, budget))
        )

    full = {
        "negative-chunk": (
            (
                "More requests decode than the budget has tokens, and your chunk becomes negative:"
                " the prompt grows. Only as many decode as the budget allows, and the chunk is 0."
            ),
            negative,
        ),
        "over-budget": (
            (
                "More requests want to decode than the budget has tokens. You let all of them go"
                " on; only the oldest, as many as fit, get their token in this step. The others"
                " have as many left as before."
            ),
            clamped,
        ),
        "newest-first": (
            "When the budget is too small for all who decode, the *oldest* go first.",
            from_behind,
        ),
        "skips-empty-steps": (
            (
                "A step that has nothing left for the prompt is a step all the same: the prompt"
                " waits, and its chunk is 0. Only as many requests decode in it as the budget"
                " allows."
            ),
            without_zeros(right),
            without_zeros(clamped),
        ),
        "never-waits": (
            (
                "You give the prompt a token in every step, even where those who decode have used"
                " up the budget."
            ),
            at_least_one,
        ),
    }
    tight = [
        (6, [2, 2], 2),
        (5, [3, 1, 2], 2),
        (10, [1, 1, 1, 1], 3),
        (4, [1, 5, 1], 1),
        (3, [2], 1),
    ]
    for _ in range(5):
        decodes = [rng.randint(1, 9) for _ in range(rng.randint(5, 9))]
        tight.append((rng.randint(5, 40), decodes, rng.randint(1, 4)))
    diagnose(answer, tight, right, full)
    return f"right for {len(roomy) + len(tight)} prompts"


EXERCISE = Exercise(
    id="05.2",
    title="Chunks between decodes",
    check=check_chunks_of,
    mistakes=(
        Known(
            "ignores-decodes",
            answers=r"""
# %% chunks of the whole budget
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    return [min(budget, prompt - start) for start in range(0, prompt, budget)]
""",
        ),
        Known(
            "fixed-chunk",
            answers=r"""
# %% what the first step leaves, in every step
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    room = max(1, budget - sum(1 for tokens in decodes if tokens > 0))
    return [min(room, prompt - start) for start in range(0, prompt, room)]
""",
        ),
        Known(
            "decodes-never-end",
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
            hint=3,
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
            hint=2,
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
            hint=2,
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
            hint=2,
            answers=r'''
# %% the last ones decode when the budget is short
@@
-    """Sizes of the chunks in which a prompt is computed beside requests that decode, step by step."""
@@
-        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
+        chosen = [i for i, tokens in enumerate(left) if tokens > 0][-budget:]
''',
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
