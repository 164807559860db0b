"""13.6: debug this: a loop that guesses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import CheckError, Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_unchanged
from minivllm.course.grading.kept import Memory
from minivllm.course.sim.drafts import CachedModel, picker
from minivllm.engine.sequence import num_equal


@dataclass(frozen=True)
class _Case:
    """A text to write. noise: of the draft; 0 is the target itself."""

    seed: int
    prompt: tuple[int, ...]
    max_tokens: int = 40
    temperature: float = 0.0
    noise: float = 0.0
    most: int = 5
    stop_ids: frozenset[int] = frozenset({99})

    @property
    def size(self) -> int:
        """The most tokens that the text may have."""
        return len(self.prompt) + self.max_tokens

    def plain(self) -> list[int]:
        """The target's tokens, one per step."""
        model, pick = CachedModel(self.seed), picker(self.seed, self.temperature)
        row, tokens = model.compute(self.prompt)[-1], list(self.prompt)
        for _ in range(self.max_tokens):
            tokens.append(pick(row, len(tokens)))
            if tokens[-1] in self.stop_ids:
                break
            row = model.compute(tokens[-1:])[-1]
        return tokens[len(self.prompt) :]

    @property
    def seen(self) -> str:
        draft = "the target itself as draft" if not self.noise else f"a draft of noise {self.noise}"
        return (
            f"Prompt {list(self.prompt)}, at most {self.max_tokens} tokens, temperature"
            f" {self.temperature}, {draft}, most = {self.most}"
        )


@dataclass(frozen=True)
class _Pick:
    """A call of pick: the row's model, its call of `compute`, and the tokens before it.

    Then the position, and the token that came.
    """

    model: str
    call: int
    context: tuple[int, ...]
    position: int
    token: int


@dataclass
class _Run:
    """An answer at work, watched."""

    case: _Case
    picks: list[_Pick] = field(default_factory=list)
    #: A row of logits -> its model, the number of the call, the tokens before it.
    rows: dict[tuple[float, ...], tuple[str, int, tuple[int, ...]]] = field(default_factory=dict)
    num_computed: dict[str, int] = field(default_factory=lambda: {"target": 0, "draft": 0})
    models: dict[str, CachedModel] = field(default_factory=dict)
    #: What each call of `compute` left in the cache.
    after: list[tuple[int, ...]] = field(default_factory=list)
    #: A model and the tokens up to one that it computed -> how often it did so.
    times: Counter[tuple[str, tuple[int, ...]]] = field(default_factory=Counter)

    def model(self, name: str) -> CachedModel:
        run, case = self, self.case

        class Watched(CachedModel):
            def compute(self, token_ids: Any) -> list[list[float]]:
                token_ids = list(token_ids)
                before = self.cache
                run.after.append((*before, *token_ids))
                _expect_end(len(run.after) < 8 * case.size + 400, case)
                rows = super().compute(token_ids)
                run.num_computed[name] += len(rows)
                _expect_end(run.num_computed[name] < 4 * case.size**2 + 500, case)
                for i, row in enumerate(rows):
                    context = (*before, *token_ids[: i + 1])
                    # The draft's rows are told from the target's where it is the target itself.
                    row[:] = [logit + 1e-10 * (name == "draft") for logit in row]
                    run.rows[tuple(row)] = name, len(run.after) - 1, context
                    run.times[name, context] += 1
                return rows

        self.models[name] = Watched(case.seed, case.noise if name == "draft" else 0.0)
        return self.models[name]

    def pick(self) -> Callable[[list[float], int], int]:
        plain = picker(self.case.seed, self.case.temperature)

        def pick(logits: list[float], position: int) -> int:
            if tuple(logits) not in self.rows:
                raise Mistake(
                    "another-row",
                    f"{self.case.seen}: you call pick with logits that no model has computed:"
                    f" {show(logits)}.\nHand it one row of what `compute` returns, as it is.",
                )
            token = plain(logits, position)
            self.picks.append(_Pick(*self.rows[tuple(logits)], position, token))
            _expect_end(len(self.picks) < 4 * self.case.size + 200, self.case)
            return token

        return pick


def _expect_end(condition: bool, case: _Case) -> None:
    if not condition:
        raise Mistake(
            "never-ends",
            f"{case.seen}: your loop computes and computes.\nEach step brings one token at least."
            " Does it leave the loop when the text has ended?",
        )


# --- step by step ---------------------------------------------------------------------------------


@dataclass
class _Step:
    """The picks between two of the target's rows: guesses of the draft, samples of the target."""

    guesses: list[_Pick] = field(default_factory=list)
    samples: list[_Pick] = field(default_factory=list)


def _steps(picks: list[_Pick]) -> list[_Step]:
    """A step is over where the draft guesses after the target has sampled."""
    steps = [_Step()]
    for pick in picks:
        full = len(steps[-1].samples) > len(steps[-1].guesses)
        if steps[-1].samples and (pick.model == "draft" or full):
            steps.append(_Step())
        (steps[-1].guesses if pick.model == "draft" else steps[-1].samples).append(pick)
    return steps


@dataclass
class _Judge:
    """Goes through an answer's steps, and raises the first thing that goes wrong.

    new, ks: what the answer has returned.
    """

    run: _Run
    new: list[int]
    ks: list[int]
    #: The right number of guesses, if there is room.
    wanted: int = 1
    accepted: int = 0
    #: Of the step before: guesses that were rejected, and samples after the target's own token.
    rejected: list[int] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    ended: bool = True

    def __post_init__(self) -> None:
        self.case = self.run.case
        self.plain = self.case.plain()
        self.right = [*self.case.prompt, *self.plain]
        self.known = len(self.case.prompt)

    @property
    def where(self) -> str:
        done = self.known - len(self.case.prompt)
        return f"{self.case.seen}: step {len(self.sizes) + 1}, after {done} new tokens"

    def judge(self) -> None:
        for step in _steps(self.run.picks):
            if self.known >= len(self.right):
                # The text has ended, and the answer goes on.
                break
            self.step(step)
        _judge_end(self.run, self.new, self.plain)
        if self.ks != self.sizes:
            raise Mistake(
                "other-counts",
                f"{self.case.seen}: you return {show(self.ks)} as the numbers of guesses, and they"
                f" were {show(self.sizes)}.\nOne number per step, in order.",
            )
        _judge_work(self.run, self.right, sum(self.sizes))

    def judge_begun(self) -> None:
        """Judge the steps of an answer that came to no end: it has tokens that nobody computes."""
        self.ended = False
        for step in _steps(self.run.picks)[:-1]:
            if self.known < len(self.right):
                self.step(step)

    def step(self, step: _Step) -> None:
        guesses = [pick.token for pick in step.guesses]
        text = tuple(self.right[: self.known])
        for i, pick in enumerate(step.guesses):
            self.pick(pick, (*text, *guesses[:i]), step)
        for i, pick in enumerate(step.samples[: len(guesses) + 1]):
            self.pick(pick, (*text, *guesses[:i]), step)
        self.size(len(guesses))
        samples = [pick.token for pick in step.samples]
        accepted = num_equal(guesses, samples)
        if len({pick.call for pick in step.samples}) > 1:
            raise EXERCISE.mistake("one-by-one", f"{self.where}: {len(guesses)} guesses.")
        if len(samples) <= len(guesses):
            seen = f"{self.where}: {len(guesses)} guesses, {len(samples)} samples of the target."
            raise EXERCISE.mistake("tokens-lost", seen)
        k = len(guesses)
        self.sizes.append(k)
        self.wanted = min(k + 1, self.case.most) if accepted == k else max(1, accepted)
        self.accepted, self.rejected = accepted, guesses[accepted:]
        self.behind = samples[accepted + 1 :]
        self.known += accepted + 1

    def pick(self, pick: _Pick, text: tuple[int, ...], step: _Step) -> None:
        """Judge the row that a token is picked from. text: what should be before it."""
        if pick.context != text:
            raise self.other_context(pick, text, step)
        if pick.position != len(text):
            raise EXERCISE.mistake(
                "wrong-position",
                f"{self.where}: the {pick.model} picks a token for position {len(text)} with the"
                f" random number of position {pick.position}.",
            )

    def other_context(self, pick: _Pick, text: tuple[int, ...], step: _Step) -> Mistake:
        """The mistake of a row that comes after something else than the text."""
        context, known = pick.context, self.known
        seen = (
            f"{self.where}: the {pick.model}'s row comes after {_tail(context)}, and the text is"
            f" {_tail(text)}."
        )
        if self.ended and context[-1] != text[-1] and context[-1] in self.behind:
            # The newest token of the answer's text is a sample behind the target's own.
            return EXERCISE.mistake("keeps-a-later-sample", seen)
        # In the place of the target's own token there is the guess.
        stale = list(context[known - 1 : known]) == self.rejected[:1] and bool(self.rejected)
        if context[: known - 1] == text[: known - 1] and stale:
            name = "not-taken-back" if len(context) > len(text) else ""
            return EXERCISE.mistake(
                f"{pick.model}-{name}" if name else "keeps-the-wrong-guess", seen
            )
        if len(context) < len(text) and self.run.after[pick.call][: len(text)] == text:
            return EXERCISE.mistake("wrong-row", seen)
        if len(context) < len(text):
            short = context == text[: len(context)]
            target = next(iter(step.samples), pick)
            if short and len(target.context) < known:
                return EXERCISE.mistake("tokens-lost", seen)
            return EXERCISE.mistake(f"{pick.model}-misses-tokens", seen)
        return Mistake(
            "another-text",
            f"{seen}\nBefore each step both models must hold the text, without its last token, and"
            " nothing else.",
        )

    def size(self, k: int) -> None:
        """Judge the number of guesses."""
        room = self.case.max_tokens - (self.known - len(self.case.prompt))
        right = min(self.wanted, room - 1)
        if k == right:
            return
        number = len(self.sizes)
        seen = f"{self.where}: {k} guesses, expected {right}."
        if k == 0 and number < len(self.ks) and self.ks[number]:
            raise EXERCISE.mistake("not-picked", seen)
        if right < k <= self.wanted:
            name = "too-many-tokens"
            if len(self.new) <= self.case.max_tokens:
                name = "more-than-of-use"
            raise EXERCISE.mistake(name, f"{seen[:-1]}: there is room for {room} tokens.")
        if k > self.case.most:
            raise EXERCISE.mistake("beyond-most", seen)
        if k < right and len(self.new) < len(self.plain):
            _judge_end(self.run, self.new, self.plain)
        again = k == 0 and number > 0 and self.accepted == 0
        raise EXERCISE.mistake("never-guesses-again" if again else "other-k", seen)


def _tail(tokens: tuple[int, ...]) -> str:
    return f"… {list(tokens[-6:])} ({len(tokens)} tokens)"


def _judge_end(run: _Run, new: list[int], plain: list[int]) -> None:
    """Judge the text as a whole; what each step did was right."""
    case = run.case
    if new == plain:
        return
    last = len(plain)
    seen = f"{case.seen}: you return {len(new)} tokens, and without speculation it is {last}."
    if new[:last] == plain:
        name = "runs-past-the-stop" if plain[-1] in case.stop_ids else "too-many-tokens"
        raise EXERCISE.mistake(name, seen)
    if plain[: len(new)] == new:
        raise EXERCISE.mistake("ends-early", seen)
    i = next(i for i, (a, b) in enumerate(zip(new, plain, strict=False)) if a != b)
    raise Mistake(
        "another-text",
        f"{case.seen}: token {i} of your text is {new[i]}, and without speculation"
        f" {plain[i]}.\nThe steps were right: what do you take from them?",
    )


def _judge_work(run: _Run, right: list[int], num_guesses: int) -> None:
    num_tokens = len(right)
    for (name, context), times in run.times.items():
        if times > 1 and tuple(right[: len(context)]) == context:
            raise EXERCISE.mistake(
                "computes-again",
                f"{run.case.seen}: the {name} computed the text's token {len(context) - 1}"
                f" {times} times.",
            )
    for name, count in run.num_computed.items():
        if count > num_tokens + num_guesses:
            raise EXERCISE.mistake(
                "computes-again",
                f"{run.case.seen}: the {name} computed {count} tokens for a text of {num_tokens}"
                f" with {num_guesses} guesses.",
            )


# --- the check ------------------------------------------------------------------------------------


def _cases() -> list[_Case]:
    cases = [
        # The target itself is always right.
        _Case(1, (1, 2, 3), 9, most=3),
        _Case(2, (4,), 20, most=4),
        _Case(3, (5, 6), 30, 1.0, most=4),
        _Case(4, (1, 2, 3, 4), 30, noise=0.4),
        _Case(5, (1, 2, 3), 1),
        _Case(6, (1, 2, 3), 2),
        _Case(7, (7, 7), 6, most=1),
        _Case(9, (3, 1), 400, 1.0, most=26),
        _Case(8, (1, 9, 1), 60, noise=30.0),  # nearly never right
    ]
    for seed in range(18):
        prompt = tuple((seed * 7 + i * i) % 12 for i in range(1 + seed * 5 % 23))
        case = _Case(
            100 + seed,
            prompt,
            (7, 16, 33, 64)[seed % 4],
            (0.0, 0.7, 1.5)[seed % 3],
            (0.0, 0.15, 0.3, 0.5)[seed * 5 % 7 % 4],
            (2, 4, 5, 8)[seed // 3 % 4],
        )
        if seed % 2:
            plain = case.plain()
            # The token that comes latest for the first time; and one of the prompt, which ends
            # nothing there.
            stops = {max(plain, key=plain.index), *{prompt[0]}.difference(plain)}
            case = replace(case, stop_ids=frozenset(stops))
        cases.append(case)
    return cases


def _expect_text(answer: Callable, case: _Case) -> int:
    run = _Run(case)
    prompt = list(case.prompt)
    models = run.model("target"), run.model("draft")
    try:
        found = answer(*models, run.pick(), prompt, case.max_tokens, case.stop_ids, case.most)
    except (CheckError, NotImplementedError) as error:
        if isinstance(error, Mistake) and error.name == "never-ends":
            # A wrong step may be why it does not end.
            _Judge(run, case.plain(), []).judge_begun()
        raise
    except Exception as error:
        raise _behind(run, error) from error
    expect_unchanged(prompt, list(case.prompt), "prompt")
    good = isinstance(found, tuple | list) and len(found) == 2
    if not good or not all(isinstance(part, list) for part in found):
        raise Mistake(
            "wrong-type",
            f"{case.seen}: you return {show(found)}.\nReturn two lists: the new tokens, and the"
            " number of guesses of each step.",
        )
    _Judge(run, *found).judge()
    return len(found[0])


def _behind(run: _Run, error: Exception) -> Exception:
    """The mistake behind an exception, if a cache holds what does not belong into it."""
    right = [*run.case.prompt, *run.case.plain()]
    for name, model in run.models.items():
        same = num_equal(model.cache, right)
        # The last pick of the target is the last token of the text; a guess has its place.
        if run.picks and run.picks[-1].model == "target" and same < model.num_computed:
            seen = (
                f"{run.case.seen}: your code raised {type(error).__name__}: {error}. The {name}'s"
                f" cache then is {_tail(tuple(model.cache))}, and the text begins with"
                f" {_tail(tuple(right[: model.num_computed]))}."
            )
            return EXERCISE.mistake(f"{name}-not-taken-back", seen)
    return error


def _expect_texts(answer: Callable) -> int:
    """Judge all cases. Mistake("keeps-state") where one fails only after the others."""
    memory, total = Memory.of(answer), 0
    for case in _cases():
        try:
            total += _expect_text(answer, case)
        except Mistake:
            if memory.forget():
                _expect_text(answer, case)
                raise EXERCISE.mistake("keeps-state", f"{case.seen}.") from None
            raise
    return total


def check_debug(answer: Callable) -> str:
    cases = _cases()
    total = _expect_texts(answer)
    return f"{len(cases)} texts, {total} tokens, each as without speculation"


EXERCISE = Exercise(
    id="13.6",
    title="Debug this: a loop that guesses",
    check=check_debug,
    mistakes=(
        Known(
            "target-not-taken-back",
            "The target's cache still holds a guess that was rejected. Everything it computes from"
            " now on comes after a text that does not exist.",
            hint=1,
            answers=r"""
# %% not at all
@@
-        for model in (target, draft):
-            model.rewind(min(model.num_computed, len(tokens) - 1))
+        draft.rewind(min(draft.num_computed, len(tokens) - 1))
@@
-        rows = target.compute(tokens[target.num_computed :] + guesses)
-        rows = rows[-len(guesses) - 1 :]
+        rows = target.compute(tokens[-1:] + guesses)
@@
-    ks, k = [], 1
+    ks, k = [], 1
+    target.compute(prompt[:-1])

# %% not at all, and then nothing is left to compute
@@
-        for model in (target, draft):
-            model.rewind(min(model.num_computed, len(tokens) - 1))
+        draft.rewind(min(draft.num_computed, len(tokens) - 1))

# %% one token too few
@@
-        for model in (target, draft):
-            model.rewind(min(model.num_computed, len(tokens) - 1))
+        draft.rewind(min(draft.num_computed, len(tokens) - 1))
+        if accepted < len(guesses):
+            target.rewind(len(tokens))
@@
-        rows = target.compute(tokens[target.num_computed :] + guesses)
-        rows = rows[-len(guesses) - 1 :]
+        rows = target.compute(tokens[-1:] + guesses)
@@
-    ks, k = [], 1
+    ks, k = [], 1
+    target.compute(prompt[:-1])
""",
        ),
        Known(
            "draft-not-taken-back",
            "The draft's cache still holds a guess that was rejected. No text is wrong for it; its"
            " next guesses are.",
            hint=1,
            answers=r"""
# %% the target alone
@@
-        for model in (target, draft):
-            model.rewind(min(model.num_computed, len(tokens) - 1))
+        target.rewind(min(target.num_computed, len(tokens) - 1))
@@
-        new = tokens[draft.num_computed :]
+        new = tokens[-fresh:]
@@
-        if accepted == len(guesses):
+        fresh = 2 if accepted == len(guesses) else 1
+        if accepted == len(guesses):
@@
-    ks, k = [], 1
+    ks, k, fresh = [], 1, len(prompt)
""",
        ),
        Known(
            "draft-misses-tokens",
            "A token of the text is not in the draft's cache. When all its guesses are right, it"
            " has not computed the last of them: it only sampled it. The draft has two tokens to"
            " catch up on then.",
            hint=2,
            answers=r"""
# %% the newest token only
@@
-        new = tokens[draft.num_computed :]
+        new = tokens[-1:] if ks else prompt
""",
        ),
        Known(
            "target-misses-tokens",
            "A token of the text is not in the target's cache: you have taken back more than was"
            " rejected, or left out a token that it has not computed yet.",
            hint=1,
            answers=r"""
# %% takes back all guesses
@@
-        for model in (target, draft):
-            model.rewind(min(model.num_computed, len(tokens) - 1))
+        draft.rewind(min(draft.num_computed, len(tokens) - 1))
+        target.rewind(target.num_computed - len(guesses))
@@
-        rows = target.compute(tokens[target.num_computed :] + guesses)
-        rows = rows[-len(guesses) - 1 :]
+        rows = target.compute(tokens[-1:] + guesses)
@@
-    ks, k = [], 1
+    ks, k = [], 1
+    target.compute(prompt[:-1])
""",
        ),
        Known(
            "wrong-position",
            "The random number belongs to the position of the token that is picked. Only with the"
            " same number do draft and target pick the same token: at temperature 0 nobody sees"
            " it.",
            hint=2,
            answers=r"""
# %% the same position for all guesses
@@
-            guesses.append(pick(row, len(tokens) + len(guesses)))
+            guesses.append(pick(row, len(tokens)))

# %% counts from the prompt's end
@@
-            guesses.append(pick(row, len(tokens) + len(guesses)))
+            guesses.append(pick(row, len(tokens) - len(prompt) + len(guesses)))

# %% the target, too
@@
-        samples = [pick(row, len(tokens) + i) for i, row in enumerate(rows)]
+        samples = [pick(row, len(tokens)) for row in rows]
""",
        ),
        Known(
            "keeps-the-wrong-guess",
            "A guess that was rejected stands in the text. In its place belongs what the target"
            " itself has sampled there.",
            hint=1,
            answers=r"""
# %% the guess itself
@@
-        for token_id in samples[: accepted + 1]:
+        for token_id in (guesses + samples[-1:])[: accepted + 1]:
""",
        ),
        Known(
            "keeps-a-later-sample",
            "In your text stands a sample that the target made behind a guess that was wrong: after"
            " its own token, or in its place. Nothing behind the first wrong guess counts, whether"
            " it is equal or not.",
            hint=1,
            answers=r"""
# %% the last sample, wherever the wrong guess is
@@
-        for token_id in samples[: accepted + 1]:
+        for token_id in guesses[:accepted] + samples[-1:]:

# %% counts all that are equal
@@
-        accepted = 0
-        while accepted < len(guesses) and guesses[accepted] == samples[accepted]:
-            accepted += 1
+        accepted = sum(g == s for g, s in zip(guesses, samples))
""",
        ),
        Known(
            "wrong-row",
            "You pick from the row after an earlier token. `compute` returns a row after each of"
            " its tokens: with more than one of them, which rows do you need?",
            answers=r"""
# %% the first rows
@@
-        rows = rows[-len(guesses) - 1 :]
+        rows = rows[: len(guesses) + 1]

# %% the first row
@@
-            row = draft.compute(new)[-1]
+            row = draft.compute(new)[0]
""",
        ),
        Known(
            "one-by-one",
            "The target computes the guesses of a step one after the other: then it could as well"
            " write by itself. All of them go into one call of `compute`.",
            hint=1,
            answers=r"""
# %% a call for each guess
@@
-        rows = target.compute(tokens[target.num_computed :] + guesses)
-        rows = rows[-len(guesses) - 1 :]
+        rows = target.compute(tokens[target.num_computed :])[-1:]
+        for guess in guesses:
+            rows += target.compute([guess])
""",
        ),
        Known(
            "not-picked",
            "No guess was picked from a row of the draft. A guess is what `pick` samples from the"
            " draft's row, with the random number that the target will use.",
            hint=2,
            answers=r"""
# %% the likeliest
@@
-            guesses.append(pick(row, len(tokens) + len(guesses)))
+            guesses.append(row.index(max(row)))
""",
        ),
        Known(
            "keeps-state",
            "By itself this text is right, and after other texts it is not: your code keeps"
            " something between calls. Look for a global variable, a default that is changed, an"
            " attribute.",
            answers=r"""
# %% goes on with the last k
@@
-    ks, k = [], 1
+    ks, k = [], getattr(speculate, "k", 1)
@@
-            k = max(1, accepted)
+            k = max(1, accepted)
+        speculate.k = k
""",
        ),
        Known(
            "tokens-lost",
            "Tokens are missing in your text. A step brings the guesses that equal the samples in"
            " their own places, and after them the target's own sample, whether all were right or"
            " not.",
            hint=1,
            answers=r"""
# %% as many samples as guesses
@@
-        samples = [pick(row, len(tokens) + i) for i, row in enumerate(rows)]
+        size = max(1, len(guesses))
+        samples = [pick(row, len(tokens) + i) for i, row in enumerate(rows[:size])]
""",
        ),
        Known(
            "runs-past-the-stop",
            "The text ended inside of a step, and you give it more. Look at each new token.",
            hint=3,
            answers=r"""
# %% looks at the last token of a step
@@
-            if token_id in stop_ids or len(tokens) == end:
-                return tokens[len(prompt) :], ks
+            if len(tokens) == end:
+                return tokens[len(prompt) :], ks
+        if tokens[-1] in stop_ids:
+            return tokens[len(prompt) :], ks
""",
        ),
        Known(
            "too-many-tokens",
            "The text is longer than max_tokens. A step may bring more than there is room for.",
            hint=3,
            answers=r"""
# %% looks at the length after a step
@@
-            if token_id in stop_ids or len(tokens) == end:
-                return tokens[len(prompt) :], ks
+            if token_id in stop_ids:
+                return tokens[len(prompt) :], ks
+        if len(tokens) >= end:
+            return tokens[len(prompt) :], ks
@@
-        for _ in range(min(k, end - len(tokens) - 1)):
+        for _ in range(k):
""",
        ),
        Known(
            "ends-early",
            "The text ends too early. It has max_tokens tokens besides the prompt, or ends with the"
            " first token of stop_ids, which stays; a token of the prompt ends nothing.",
            hint=3,
            answers=r"""
# %% drops the stop token
@@
-            tokens.append(token_id)
-            if token_id in stop_ids or len(tokens) == end:
-                return tokens[len(prompt) :], ks
+            if token_id in stop_ids:
+                return tokens[len(prompt) :], ks
+            tokens.append(token_id)
+            if len(tokens) == end:
+                return tokens[len(prompt) :], ks
""",
        ),
        Known(
            "never-guesses-again",
            "A step without guesses, though there is room. It teaches nothing, so there is no way"
            " back from 0: k is at least 1.",
            hint=4,
            answers=r"""
# %% as many as were right
@@
-            k = max(1, accepted)
+            k = accepted
""",
        ),
        Known(
            "beyond-most",
            "More guesses than `most`.",
            hint=4,
            answers=r"""
# %% no upper limit
@@
-            k = min(k + 1, most)
+            k += 1
""",
        ),
        Known(
            "more-than-of-use",
            "You guess more tokens than the text has room for. One of the tokens of a step is the"
            " target's own.",
            hint=4,
            answers=r"""
# %% cuts afterwards
@@
-        for _ in range(min(k, end - len(tokens) - 1)):
+        for _ in range(k):
""",
        ),
        Known(
            "other-k",
            "Where all guesses were right, try one more in the next step; else as many as were"
            " right, at least one.",
            hint=4,
            answers=r"""
# %% grows when anything was right
@@
-        if accepted == len(guesses):
+        if accepted:
""",
        ),
        Known(
            "computes-again",
            "A token is computed once, and then it is in the cache. Take back what was rejected,"
            " and no more.",
            hint=1,
            answers=r"""
# %% empties the draft's cache
@@
-            model.rewind(min(model.num_computed, len(tokens) - 1))
+            keep = 0 if model is draft else min(model.num_computed, len(tokens) - 1)
+            model.rewind(keep)

# %% the prompt's last token twice
@@
-    ks, k = [], 1
+    ks, k = [], 1
+    draft.compute(prompt)
+    draft.rewind(len(prompt) - 1)
""",
        ),
        Known(
            "other-counts",
            answers=r"""
# %% notes what it wanted
@@
-        ks.append(len(guesses))
+        ks.append(k)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% appends to the prompt
@@
-    tokens, end = list(prompt), len(prompt) + max_tokens
+    tokens, end = prompt, len(prompt) + max_tokens
+    prompt = list(prompt)
""",
        ),
    ),
    right=r"""
# %% the prompt at first, and takes back what was rejected
@@
-    ks, k = [], 1
+    ks, k = [], 1
+    target.compute(prompt[:-1])
+    draft.compute(prompt[:-1])
@@
-        rows = target.compute(tokens[target.num_computed :] + guesses)
-        rows = rows[-len(guesses) - 1 :]
+        rows = target.compute([tokens[-1], *guesses])
@@
-        for model in (target, draft):
-            model.rewind(min(model.num_computed, len(tokens) - 1))
+        target.rewind(target.num_computed - len(guesses) + accepted)
+        if accepted < len(guesses):
+            draft.rewind(len(tokens) - 1)

# %% the draft computes its last guess, too
@@
-        new = tokens[draft.num_computed :]
-        for _ in range(min(k, end - len(tokens) - 1)):
-            row = draft.compute(new)[-1]
-            guesses.append(pick(row, len(tokens) + len(guesses)))
-            new = guesses[-1:]
+        row = draft.compute(tokens[draft.num_computed :])[-1]
+        for _ in range(min(k, end - len(tokens) - 1)):
+            guesses.append(pick(row, len(tokens) + len(guesses)))
+            row = draft.compute(guesses[-1:])[-1]
""",
)
