"""07.3: debug this: the answer that never ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_unchanged

#: The end token of all conversations: no small number, of which Python keeps one object.
_EOS = 151_645


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
            return list(self.token_ids)[: self._end_of_first()], 0
        if "nothing" in self.mistakes:
            return [], self.num_tokens
        if "prompt-stays" in self.mistakes:
            return self.token_ids[self.num_computed :], self.num_computed
        return [self.last_token], self.num_tokens - 1

    def _end_of_first(self) -> int | None:
        """Where the tokens end that are computed while nothing is in the cache."""
        if "repeat" in self.mistakes and len(self.token_ids) > self.num_prompt_tokens:
            return -1
        return self.num_prompt_tokens if "preempt" in self.mistakes else None

    def append(self, token: int) -> None:
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        if "length" not in self.mistakes:
            self.num_tokens += 1
        if "last" not in self.mistakes:
            self.last_token = token

    def preempt(self) -> None:
        self.num_computed = self.num_prompt_tokens if "prompt-stays" in self.mistakes else 0
        if "begin" in self.mistakes:
            del self.token_ids[self.num_prompt_tokens :]
            self.num_tokens, self.last_token = len(self.token_ids), self.token_ids[-1]
        if "counts-again" in self.mistakes:
            self.num_prompt_tokens = len(self.token_ids)

    @property
    def finished(self) -> bool:
        shift = ("late" in self.mistakes) - ("early" in self.mistakes)
        written = self.num_tokens - self.num_prompt_tokens * ("whole" not in self.mistakes)
        if written >= self.max_tokens + shift or "eos" in self.mistakes:
            return written >= self.max_tokens + shift
        if "anywhere" in self.mistakes:
            return self.eos in self.token_ids
        if "identity" in self.mistakes:
            # What `is` says of an int from elsewhere: never the same object.
            return False
        return self.last_token == self.eos and (written > 0 or "prompt-eos" in self.mistakes)


#: Steps after which a conversation counts as endless.
_ENDLESS = 700


def _says(seen: list[tuple[int, int]], words: str) -> int:
    """The next token: it depends on all tokens in the cache, each in its place.

    words: "many": a word is hardly said twice; "few": the same words come again and again.
    """
    mixed = sum((position + 3) * (token + 5) * (position % 7 + 1) for position, token in seen)
    return 10 + mixed % 83 if words == "many" else 5 + mixed % 2


def _converse(
    answer_cls: Callable,
    prompt: list[int],
    max_tokens: int,
    ends_at: int,
    preempted: list[int],
    words: str,
) -> dict[str, Any]:
    """Serve one answer with a model that says what depends on all it has in its cache.

    ends_at: the length of the context after which it says the end token. preempted: the steps
    after which the blocks are taken away; a step that is there twice: twice in a row; 0: before
    the first.
    """
    # No object of Python's own: `is` must not say of it what `==` says.
    answer, cache, steps = answer_cls(list(prompt), max_tokens, int(str(_EOS))), {}, []
    for _ in range(preempted.count(0)):
        answer.preempt()
    while not answer.finished and len(steps) < _ENDLESS:
        tokens, start = answer.to_compute()
        tokens = [int(token) for token in tokens]
        steps.append((len(tokens), int(start)))
        if not tokens:
            break
        cache.update(enumerate(tokens, start=start))
        seen = [(position, cache.get(position, -7)) for position in range(start + len(tokens))]
        answer.append(int(str(_EOS)) if len(seen) == ends_at else _says(seen, words))
        for _ in range(preempted.count(len(steps))):
            cache.clear()
            answer.preempt()
    return {
        "tokens": list(answer.token_ids)[len(prompt) :],
        "endless": len(steps) == _ENDLESS,
        "steps": steps,
        "the prompt's part": list(answer.token_ids)[: len(prompt)],
    }


def _cases() -> list[tuple]:
    never = 10_000
    short = [
        ([5, 6, 7], 1, never, []),
        ([9], 6, never, []),
        ([5, 6, 7], 12, 6, []),
        (list(range(20, 36)), 8, never, [4]),
        ([9], 8, never, [1]),
        ([5, 6, 7], 9, 6, [2]),
        (list(range(20, 36)), 9, never, [2, 5]),
        # Nothing is in the cache, and it is taken away; or it is taken away twice.
        ([5, 6, 7], 4, never, [0]),
        ([5, 6, 7], 6, never, [3, 3]),
        ([5, 6, 7], 5, never, [1, 2, 3, 4]),
    ]
    ends = [
        # The prompt has the end token in it, or as its last: a chat does.
        ([5, _EOS, 7], 4, never, []),
        ([5, 6, _EOS], 4, never, []),
        ([_EOS], 3, never, [2]),
        ([5, 6, _EOS], 9, 5, [1]),
        # The end at once, and at the last token that is allowed.
        ([5, 6, 7], 4, 3, []),
        ([5, 6, 7], 4, 6, []),
        ([5, 6, 7], 4, 6, [3]),
        ([5, 6, 7], 9, 6, [4]),
    ]
    long = [
        (list(range(1000, 1300)), 8, never, [3]),
        # More tokens than many an engine takes in one step.
        (list(range(7, 3007)), 4, never, [2]),
        ([5, 6, 7], 300, never, [40, 217]),
        ([5, 6, 7], 300, 140, [65, 66]),
    ]
    cases = [(*case, "many") for case in (*short, *ends, *long)]
    return [*cases, ([5, 5, 5], 12, never, [6], "few"), ([5], 5, never, [], "few")]


def _talk(cls: Callable) -> Callable:
    def conversation(prompt, max_tokens, ends_at, preempted_after, words) -> dict[str, Any]:
        return _converse(cls, prompt, max_tokens, ends_at, preempted_after, words)

    return conversation


def _wrong(mistakes: str) -> Callable:
    return _talk(partial(_Answer, mistakes=mistakes))


def check_answer(answer: Callable) -> str:
    _expect_asked_twice(answer)
    _expect_own_lists(answer)
    try:
        number = diagnose(_talk(answer), _cases(), _talk(_Answer), EXERCISE.suspects)
    except Mistake as mistake:
        seen = _first_wrong_step(answer)
        raise Mistake(mistake.name, f"{mistake.message}\n{seen}".strip()) from mistake.__cause__
    _expect_token_0(answer)
    return (
        f"{number} answers, short, long and preempted: the right tokens at the right positions,"
        " none twice"
    )


def _first_wrong_step(answer: Callable) -> str:
    """Where the answer first leaves the right one in its shortest case; "" where it raises."""
    for case in sorted(_cases(), key=lambda case: len(case[0]) + case[1]):
        right = _talk(_Answer)(*case)
        try:
            mine = _talk(answer)(*case)
        except Exception:
            return ""
        if mine == right:
            continue
        prompt, max_tokens, _, preempted, _ = case
        begins = f"The shortest wrong answer: {_tokens(len(prompt))} of prompt, max_tokens="
        begins += str(max_tokens)
        begins += f", preempted after step {', '.join(map(str, preempted))}" * bool(preempted)
        for number, (one, other) in enumerate(
            zip(mine["steps"], right["steps"], strict=False), start=1
        ):
            if one != other:
                return (
                    f"{begins}: in step {number} `to_compute` gives {_tokens(one[0])} from position"
                    f" {one[1]}, expected {other[0]} from position {other[1]}."
                )
        return (
            f"{begins}: the first steps are right, and the answer ends after"
            f" step {len(mine['steps'])}, expected after {len(right['steps'])}. Who says when it is"
            " `finished`?"
        )
    return ""


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _expect_asked_twice(answer: Callable) -> None:
    """`to_compute` and `finished` are questions: asked twice, they say the same."""
    one = answer([5, 6, 7], 6, _EOS)
    expect(
        not callable(one.finished),
        "finished-is-a-method",
        f"`answer.finished` is {one.finished!r}.\nIt is a property: whoever asks `while not"
        " answer.finished` sees a method, which counts as true. Put `@property` above it.",
    )
    for token in (11, 12):
        said = [(list(tokens), start) for tokens, start in (one.to_compute(), one.to_compute())]
        expect(
            said[0] == said[1] and one.finished == one.finished,
            "question-changes-something",
            f"`to_compute()` was called twice before a step: first {said[0]}, then {said[1]}.\nIt"
            " only says what is to be computed. What has been computed, `append` brings.",
        )
        one.append(token)


def _expect_token_0(answer: Callable) -> None:
    """0 is an id like any other, as the end token and as a token that was written; so is a large
    one.
    """
    for eos in (0, 3, 2**40 + 3):
        one, right = answer([5, 6, 7], 6, eos), _Answer([5, 6, 7], 6, eos)
        for token in (11, 0) if eos == 0 else (11, 0, eos):
            one.append(token)
            right.append(token)
            tokens, start = one.to_compute()
            expect(
                (list(tokens), start) == right.to_compute(),
                "token-0-left-out",
                f"The token {token} was written, and `to_compute` gives {list(tokens)} from"
                f" position {start}, expected {right.to_compute()}.\n0 is an id like any other:"
                " compare with `is None` or count, rather than ask `if token`.",
            )
            expect(
                bool(one.finished) == right.finished,
                "end-not-seen" if right.finished else "end-too-early",
                f"eos is {eos}, and when {token} was written, `finished` is {one.finished!r},"
                f" expected {right.finished}.\nAny number from 0 on may be the end token: compare"
                " the last token with `eos`, by `==`, and do not ask `if eos`.",
            )


def _expect_own_lists(answer: Callable) -> None:
    """The caller's prompt stays its own, and so do the tokens of another answer."""
    prompt = [5, 6, 7]
    one, other = answer(prompt, 6, _EOS), answer(prompt, 6, _EOS)
    tokens, start = other.to_compute()
    alone = (list(tokens), start)
    for token in (11, 12):
        one.to_compute()
        one.append(token)
    expect_unchanged(prompt, [5, 6, 7], "prompt")
    tokens, start = other.to_compute()
    expect(
        (list(tokens), start) == alone,
        "shared-between-answers",
        f"Two answers were begun with the same prompt. One got two tokens, and the other says"
        f" {list(tokens)} from position {start}.\nEach has tokens of its own: make them in"
        " `__init__`, not in the class.",
    )
    prompt += [8, 9]
    tokens, start = other.to_compute()
    expect(
        (list(tokens), start) == alone,
        "prompt-not-copied",
        "The caller went on to use its list `prompt`, and the answer's tokens changed with it.\n"
        "Keep a copy: `list(prompt)`.",
    )


MISTAKES = (
    Known(
        "not-mended",
        message=(
            "Both complaints stand. `append` keeps the token and nothing else: `num_tokens` and"
            " `last_token` still say what they said after the prompt, so the same token is computed"
            " for ever.\n"
            "After a preemption `to_compute` asks for the prompt alone. But the tokens that were"
            " written since are lost from the cache as well: everything in token_ids has to be"
            " computed again, and only then comes something new."
        ),
        suspects=(
            _wrong("length last preempt prompt-eos"),
            _wrong("length last preempt"),
        ),
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
-        return written >= self.max_tokens or (
-            written > 0 and self.token_ids[-1] == self.eos
-        )
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
    ),
    Known(
        "same-token-again",
        message=(
            "The length grows now, but `last_token` does not move: the model gets the prompt's last"
            " token at every step.\nWhich attributes describe the last token? All of them change"
            " when a token comes."
        ),
        suspects=(
            _wrong("last"),
            _wrong("last preempt"),
            _wrong("last prompt-eos"),
            _wrong("last preempt prompt-eos"),
        ),
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
-        return written >= self.max_tokens or (
-            written > 0 and self.token_ids[-1] == self.eos
-        )
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
    ),
    Known(
        "never-ends",
        message=(
            "The right token is computed now, but `num_tokens` does not grow: it always goes to the"
            " same position, and max_tokens is never reached.\n`append` has to note that the text"
            " is longer."
        ),
        suspects=(
            _wrong("length"),
            _wrong("length preempt"),
            _wrong("length prompt-eos"),
            _wrong("length preempt prompt-eos"),
        ),
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
-        return written >= self.max_tokens or (
-            written > 0 and self.token_ids[-1] == self.eos
-        )
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
    ),
    Known(
        "loses-what-it-said",
        message=(
            "The endless answers are mended.\n"
            "After a preemption `to_compute` asks for the prompt alone. But the tokens that were"
            " written since are lost from the cache as well: everything in token_ids has to be"
            " computed again, and only then comes something new."
        ),
        suspects=(
            _wrong("preempt"),
            _wrong("preempt prompt-eos"),
        ),
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
-        return written >= self.max_tokens or (
-            written > 0 and self.token_ids[-1] == self.eos
-        )
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
    ),
    Known(
        "begins-again",
        message=(
            "A preemption throws the written tokens away, and the answer starts anew; with other"
            " random numbers it would be another one, and somebody may have read the first.\nA"
            " preempted request keeps its tokens and loses only their keys and values."
        ),
        suspects=(
            _wrong("begin"),
            _wrong("begin prompt-eos"),
        ),
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
        "repeats-the-last-token",
        message=(
            "After a preemption you compute all tokens but the last. The step then samples the"
            " token that is there already, and the text has it twice.\nCompute the last one, too."
        ),
        suspects=(
            _wrong("repeat"),
            _wrong("repeat prompt-eos"),
        ),
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
-        return written >= self.max_tokens or (
-            written > 0 and self.token_ids[-1] == self.eos
-        )
+        written = self.num_tokens - self.num_prompt_tokens
+        return written >= self.max_tokens or self.last_token == self.eos
""",
    ),
    Known(
        "computes-everything-again",
        message=(
            "The text is right, at a price: every step computes the whole text.\nWhat is in the"
            " cache need not be computed: after the first step, one token per step is enough."
        ),
        suspects=(
            _wrong("all"),
            _wrong("all last"),
            _wrong("all length"),
            _wrong("all prompt-eos"),
        ),
        answers=r"""
# %% the whole text at every step
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        return self.token_ids, 0
""",
    ),
    Known(
        "one-too-many",
        message=(
            "Answers get one token more than max_tokens.\nCount the written tokens when there are"
            " exactly max_tokens of them: is your answer finished?"
        ),
        suspects=(
            _wrong("late"),
            _wrong("late prompt-eos"),
        ),
        answers=r"""
# %% ends after max_tokens + 1
@@
-        return written >= self.max_tokens or (
+        return written > self.max_tokens or (
""",
    ),
    Known(
        "one-too-few",
        message=(
            "Answers end one token before max_tokens.\nCount the written tokens: the prompt's are"
            " not among them."
        ),
        suspects=(
            _wrong("early"),
            _wrong("early prompt-eos"),
        ),
        answers=r"""
# %% ends one early
@@
-        return written >= self.max_tokens or (
+        return written >= self.max_tokens - 1 or (
""",
    ),
    Known(
        "end-not-seen",
        message=(
            "The end token does not end the answer.\nCompare the last token with `eos`, by `==`:"
            " `is` asks whether they are one object in memory, which large numbers are not."
        ),
        suspects=(
            _wrong("eos"),
            _wrong("identity"),
        ),
        answers=r"""
# %% the same object
@@
-            written > 0 and self.token_ids[-1] == self.eos
+            written > 0 and self.token_ids[-1] is self.eos

# %% an id of 0 counts as none
@@
-            written > 0 and self.token_ids[-1] == self.eos
+            written > 0 and self.eos and self.token_ids[-1] == self.eos
""",
    ),
    Known(
        "prompt-ends-it",
        message=(
            "A prompt that has the end token in it is finished before a word is written.\nOnly"
            " what the model has *written* ends the answer: the prompt's tokens do not count."
        ),
        suspects=(
            _wrong("prompt-eos"),
            _wrong("anywhere"),
        ),
        answers=r"""
# %% the end token, wherever it is from
@@
-        return written >= self.max_tokens or (
-            written > 0 and self.token_ids[-1] == self.eos
-        )
+        return written >= self.max_tokens or self.token_ids[-1] == self.eos

# %% the end token anywhere
@@
-        return written >= self.max_tokens or (
-            written > 0 and self.token_ids[-1] == self.eos
-        )
+        return written >= self.max_tokens or self.eos in self.token_ids
""",
    ),
    Known(
        "counts-from-the-preemption",
        message=(
            "After a preemption max_tokens are allowed once more.\nWhat was written before the"
            " preemption counts, too: `num_prompt_tokens` is the prompt's length for good."
        ),
        suspects=(
            _wrong("counts-again"),
            _wrong("counts-again prompt-eos"),
        ),
        answers=r'''
# %% counts the text so far as the prompt
@@
     def preempt(self) -> None:
         """All blocks are gone, and with them the keys and values of everything."""
+        self.num_prompt_tokens = len(self.token_ids)
''',
    ),
    Known(
        "nothing-to-compute",
        message=(
            "After the first step `to_compute` asks for no tokens at all.\nThe token that was just"
            " chosen is not in the cache: the step that chose it computed the tokens before it."
        ),
        suspects=(_wrong("nothing"), _wrong("nothing prompt-eos")),
        answers=r"""
# %% counts the chosen token as computed
@@
-        self.num_computed = len(self.token_ids)
         self.token_ids.append(token)
+        self.num_computed = len(self.token_ids)
""",
    ),
    Known(
        "prompt-counted-as-written",
        message=(
            "The prompt's tokens are counted among those that are written, so a long prompt gets a"
            " short answer or none.\nmax_tokens is about what was written after the prompt."
        ),
        suspects=(_wrong("whole"), _wrong("whole prompt-eos")),
        answers=r"""
# %% counts the prompt
@@
-        written = len(self.token_ids) - self.num_prompt_tokens
+        written = len(self.token_ids)
""",
    ),
    Known(
        "prompt-kept-in-the-cache",
        message=(
            "After a preemption you compute only what was written, as if the prompt were still in"
            " the cache.\nAll blocks were taken away, the prompt's as well."
        ),
        suspects=(_wrong("prompt-stays"), _wrong("prompt-stays prompt-eos")),
        answers=r'''
# %% the prompt counts as computed
@@
         """All blocks are gone, and with them the keys and values of everything."""
-        self.num_computed = 0
+        self.num_computed = self.num_prompt_tokens
''',
    ),
    Known(
        "question-changes-something",
        answers=r"""
# %% takes for granted that it is computed
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        start, self.num_computed = self.num_computed, len(self.token_ids)
+        return self.token_ids[start:], start
@@
-        self.num_computed = len(self.token_ids)
         self.token_ids.append(token)
""",
    ),
    Known(
        "changed-input",
        answers=r"""
# %% writes into the caller's list
@@
-        self.token_ids = list(prompt)
+        self.token_ids = prompt
""",
    ),
    Known(
        "wrong-values",
        answers=r"""
# %% a long prompt, in pieces that nobody asked for
@@
-        return self.token_ids[self.num_computed :], self.num_computed
+        end = self.num_computed + 2048
+        return self.token_ids[self.num_computed : end], self.num_computed
""",
    ),
)

EXERCISE = Exercise(
    id="07.3",
    title="Debug this: the answer that never ends",
    check=check_answer,
    mistakes=MISTAKES,
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
-        return written >= self.max_tokens or (
-            written > 0 and self.token_ids[-1] == self.eos
-        )
+        written = self.num_tokens - self.num_prompt_tokens
+        ended = written > 0 and self.last_token == self.eos
+        return written >= self.max_tokens or ended
""",
)
