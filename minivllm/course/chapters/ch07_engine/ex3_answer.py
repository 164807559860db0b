"""07.3: debug this: the answer that never ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake

if TYPE_CHECKING:
    pass
from minivllm.course.grading.exercise import Exercise, Known


class _Answer:
    """`Answer` as it should be, or with mistakes, words such as "length last"."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int, mistakes: str = "") -> None:
        self.token_ids, self.num_prompt_tokens = list(prompt), len(prompt)
        self.max_tokens, self.eos, self.mistakes = max_tokens, eos, mistakes.split()
        self.num_tokens, self.last_token, self.num_computed = len(prompt), prompt[-1], 0

    def to_compute(self) -> tuple[list[int], int]:
        if "all" in self.mistakes:
            return list(self.token_ids), 0
        if self.num_computed == 0:
            if "repeat" in self.mistakes and len(self.token_ids) > self.num_prompt_tokens:
                return self.token_ids[:-1], 0
            return (
                self.token_ids[: self.num_prompt_tokens]
                if "preempt" in self.mistakes
                else list(self.token_ids)
            ), 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        if "length" not in self.mistakes:
            self.num_tokens += 1
        if "last" not in self.mistakes:
            self.last_token = token

    def preempt(self) -> None:
        self.num_computed = 0
        if "begin" in self.mistakes:
            del self.token_ids[self.num_prompt_tokens :]
            self.num_tokens, self.last_token = len(self.token_ids), self.token_ids[-1]

    @property
    def finished(self) -> bool:
        shift = ("late" in self.mistakes) - ("early" in self.mistakes)
        full = self.num_tokens - self.num_prompt_tokens >= self.max_tokens + shift
        return full or ("eos" not in self.mistakes and self.last_token == self.eos)


#: Steps after which a conversation counts as endless.
_ENDLESS = 60


def _converse(
    answer_cls: Callable,
    prompt: list[int],
    max_tokens: int,
    eos: int,
    eos_at: int,
    preempted: list[int],
) -> dict:
    """Serve one answer with a model that says what depends on all it has in its cache, each word in
    its place.

    eos_at: how long the context is after which it ends; preempted: the steps after which the blocks
    are taken away.
    """
    answer, cache, steps = answer_cls(list(prompt), max_tokens, eos), {}, []
    while not answer.finished and len(steps) < _ENDLESS:
        tokens, start = answer.to_compute()
        tokens = [int(token) for token in tokens]
        steps.append((len(tokens), int(start)))
        if not tokens:
            break
        cache.update(enumerate(tokens, start=start))
        seen = [(position, cache.get(position, -7)) for position in range(start + len(tokens))]
        chosen = 10 + sum((p + 3) * (token + 5) for p, token in seen) % 83
        answer.append(eos if len(seen) == eos_at else chosen)
        if len(steps) in preempted:
            cache.clear()
            answer.preempt()
    return {
        "tokens": list(answer.token_ids)[len(prompt) :],
        "endless": len(steps) == _ENDLESS,
        "steps": steps,
    }


def check_answer(answer: Callable) -> str:
    prompts = [[5, 6, 7], [9], list(range(20, 36))]
    cases = [
        (prompt, max_tokens, 1, len(prompt) + (3 if short else 99), preempted)
        for prompt in prompts
        for max_tokens, short, preempted in (
            (1, False, []),
            (6, False, []),
            (12, True, []),
            (8, False, [4]),
            (8, False, [1]),
            (9, True, [2]),
            (9, False, [2, 5]),
        )
    ]
    preempt = (
        "After a preemption `to_compute` asks for the prompt alone. But the tokens that were"
        " written since are lost from the cache as well: everything in token_ids has to be computed"
        " again, and only then comes something new."
    )
    suspects = {
        "not-mended": (
            (
                "Both complaints stand. `append` keeps the token and nothing else: `num_tokens`"
                " and `last_token` still say what they said after the prompt, so the same token is"
                f" computed for ever. {preempt}"
            ),
            "length last preempt",
        ),
        "same-token-again": (
            (
                "The length grows now, but `last_token` does not move: the model gets the prompt's"
                " last token at every step."
            ),
            "last",
            "last preempt",
        ),
        "never-ends": (
            (
                "The right token is computed now, but `num_tokens` does not grow: it always goes to"
                " the same position, and max_tokens is never reached."
            ),
            "length",
            "length preempt",
        ),
        "loses-what-it-said": (f"The endless answers are mended. {preempt}", "preempt"),
        "begins-again": (
            (
                "A preemption throws the written tokens away, and the answer starts anew; with"
                " other random numbers it would be another one, and somebody may have read the"
                " first. A preempted request keeps its tokens and loses only their keys and values."
            ),
            "begin",
        ),
        "repeats-the-last-token": (
            (
                "After a preemption you compute all tokens but the last. The step then samples the"
                " token that is there already, and the text has it twice. Compute the last one,"
                " too."
            ),
            "repeat",
        ),
        "computes-everything-again": (
            (
                "The text is right, at a price: every step computes the whole text. What the cache"
                " has, need not be computed; after the first step one token a step is enough."
            ),
            "all",
            "all last",
            "all length",
        ),
        "one-too-many": ("Answers get one token more than max_tokens.", "late"),
        "one-too-few": ("Answers end one token before max_tokens.", "early"),
        "end-not-seen": ("The end-of-sequence token does not end the answer.", "eos"),
    }

    def talk(cls: Callable) -> Callable:
        def conversation(prompt, max_tokens, eos, eos_at, preempted_after) -> dict:
            return _converse(cls, prompt, max_tokens, eos, eos_at, preempted_after)

        return conversation

    named = {
        f"{name} {i}": (why, talk(partial(_Answer, mistakes=mistakes)))
        for name, (why, *variants) in suspects.items()
        for i, mistakes in enumerate(variants)
    }
    try:
        number = diagnose(talk(answer), cases, talk(_Answer), named)
    except Mistake as mistake:
        raise Mistake(mistake.name.split()[0], mistake.message) from mistake.__cause__
    return (
        f"{number} answers, short, long and preempted: the right tokens at the right positions,"
        " none twice"
    )


EXERCISE = Exercise(
    id="07.3",
    title="Debug this: the answer that never ends",
    check=check_answer,
    mistakes=(
        Known(
            "not-mended",
            answers=r"""
# %% as it was given
@@
         self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
+        self.num_tokens, self.last_token = len(prompt), prompt[-1]
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        if self.num_computed == 0:
+            return self.token_ids[: self.num_prompt_tokens], 0
+        return [self.last_token], self.num_tokens - 1
@@
-        self.num_computed = len(self.token_ids)
+        self.num_computed = self.num_tokens
@@
-        written = len(self.token_ids) - self.num_prompt_tokens
-        return written >= self.max_tokens or self.token_ids[-1] == self.eos
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
        ),
        Known(
            "same-token-again",
            answers=r"""
# %% only the length grows
@@
         self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
+        self.num_tokens, self.last_token = len(prompt), prompt[-1]
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        if self.num_computed == 0:
+            return self.token_ids[: self.num_prompt_tokens], 0
+        return [self.last_token], self.num_tokens - 1
@@
-        self.num_computed = len(self.token_ids)
+        self.num_computed = self.num_tokens
@@
         self.token_ids.append(token)
+        self.num_tokens += 1
@@
-        written = len(self.token_ids) - self.num_prompt_tokens
-        return written >= self.max_tokens or self.token_ids[-1] == self.eos
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
        ),
        Known(
            "never-ends",
            answers=r"""
# %% only the last token is noted
@@
         self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
+        self.num_tokens, self.last_token = len(prompt), prompt[-1]
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        if self.num_computed == 0:
+            return self.token_ids[: self.num_prompt_tokens], 0
+        return [self.last_token], self.num_tokens - 1
@@
-        self.num_computed = len(self.token_ids)
+        self.num_computed = self.num_tokens
@@
         self.token_ids.append(token)
+        self.last_token = token
@@
-        written = len(self.token_ids) - self.num_prompt_tokens
-        return written >= self.max_tokens or self.token_ids[-1] == self.eos
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
        ),
        Known(
            "loses-what-it-said",
            answers=r"""
# %% the first complaint alone
@@
         self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
+        self.num_tokens, self.last_token = len(prompt), prompt[-1]
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        if self.num_computed == 0:
+            return self.token_ids[: self.num_prompt_tokens], 0
+        return [self.last_token], self.num_tokens - 1
@@
-        self.num_computed = len(self.token_ids)
+        self.num_computed = self.num_tokens
@@
         self.token_ids.append(token)
+        self.num_tokens, self.last_token = self.num_tokens + 1, token
@@
-        written = len(self.token_ids) - self.num_prompt_tokens
-        return written >= self.max_tokens or self.token_ids[-1] == self.eos
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
        ),
        Known(
            "begins-again",
            answers=r'''
# %% a preemption starts the answer anew
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_tokens, self.last_token = len(prompt), prompt[-1]
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        if self.num_computed == 0:
            return self.token_ids[: self.num_prompt_tokens], 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        self.num_tokens, self.last_token = self.num_tokens + 1, token

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        del self.token_ids[self.num_prompt_tokens :]
        self.num_tokens, self.last_token = len(self.token_ids), self.token_ids[-1]
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = self.num_tokens - self.num_prompt_tokens
        return written >= self.max_tokens or self.last_token == self.eos
''',
        ),
        Known(
            "computes-everything-again",
            answers=r"""
# %% the whole text at every step
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        return self.token_ids, 0
""",
        ),
        Known(
            "repeats-the-last-token",
            answers=r"""
# %% recomputes all but the last
@@
         self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
+        self.num_tokens, self.last_token = len(prompt), prompt[-1]
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        if self.num_computed == 0:
+            known = (
+                self.num_prompt_tokens
+                if len(self.token_ids) == self.num_prompt_tokens
+                else -1
+            )
+            return (self.token_ids[:known] if known < 0 else self.token_ids[:]), 0
+        return [self.last_token], self.num_tokens - 1
@@
-        self.num_computed = len(self.token_ids)
+        self.num_computed = self.num_tokens
@@
         self.token_ids.append(token)
+        self.num_tokens, self.last_token = self.num_tokens + 1, token
@@
-        written = len(self.token_ids) - self.num_prompt_tokens
-        return written >= self.max_tokens or self.token_ids[-1] == self.eos
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
        ),
        Known(
            "one-too-many",
            answers=r"""
# %% ends after max_tokens + 1
@@
-        return written >= self.max_tokens or self.token_ids[-1] == self.eos
+        return written > self.max_tokens or self.token_ids[-1] == self.eos
""",
        ),
    ),
    right=r"""
# %% three numbers, all updated
@@
         self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
+        self.num_tokens, self.last_token = len(prompt), prompt[-1]
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        if self.num_computed == 0:
+            return list(self.token_ids), 0
+        return [self.last_token], self.num_tokens - 1
@@
-        self.num_computed = len(self.token_ids)
+        self.num_computed = self.num_tokens
@@
         self.token_ids.append(token)
+        self.num_tokens, self.last_token = self.num_tokens + 1, token
@@
-        written = len(self.token_ids) - self.num_prompt_tokens
-        return written >= self.max_tokens or self.token_ids[-1] == self.eos
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
)
