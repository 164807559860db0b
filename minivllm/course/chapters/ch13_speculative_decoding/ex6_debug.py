"""13.6: debug this: a loop that guesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_unchanged
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
    """A call of pick: whose row it was, and after which tokens; the position; what came."""

    model: str
    context: tuple[int, ...]
    position: int
    token: int


@dataclass
class _Run:
    """An answer at work, watched."""

    case: _Case
    picks: list[_Pick] = field(default_factory=list)
    rows: dict[tuple[float, ...], tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    num_computed: dict[str, int] = field(default_factory=lambda: {"target": 0, "draft": 0})

    def model(self, name: str) -> CachedModel:
        run, case = self, self.case

        class Watched(CachedModel):
            def compute(self, token_ids: Any) -> list[list[float]]:
                token_ids = list(token_ids)
                before = list(self.cache)
                rows = super().compute(token_ids)
                run.num_computed[name] += len(rows)
                _expect_end(run.num_computed[name] < 40_000, case)
                for i, row in enumerate(rows):
                    context = (*before, *token_ids[: i + 1])
                    # The draft's rows are told from the target's where it is the target itself.
                    row[:] = [logit + 1e-10 * (name == "draft") for logit in row]
                    run.rows[tuple(row)] = name, context
                return rows

        return Watched(case.seed, case.noise if name == "draft" else 0.0)

    def pick(self) -> Callable[[list[float], int], int]:
        plain = picker(self.case.seed, self.case.temperature)

        def pick(logits: list[float], position: int) -> int:
            if tuple(logits) not in self.rows:
                raise Mistake(
                    "another-row",
                    f"{self.case.seen}: you call pick with logits that no model has computed:"
                    f" {show(logits)}.\nHand it one row of what `compute` returns, as it is.",
                )
            model, context = self.rows[tuple(logits)]
            token = plain(logits, position)
            self.picks.append(_Pick(model, context, position, token))
            _expect_end(len(self.picks) < 20_000, self.case)
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


def _judge(run: _Run, new: list[int], ks: list[int]) -> None:
    """Raise the first thing that goes wrong, step by step."""
    case = run.case
    plain = case.plain()
    right = [*case.prompt, *plain]
    known, wanted = len(case.prompt), 1
    rejected: list[int] = []
    steps, sizes = _steps(run.picks), []
    for number, step in enumerate(steps, start=1):
        where = f"{case.seen}: step {number}, after {known - len(case.prompt)} new tokens"
        if known >= len(right):
            # The text has ended, and yours goes on.
            break
        guesses = [pick.token for pick in step.guesses]
        text = tuple(right[:known])
        for i, pick in enumerate(step.guesses):
            _judge_pick(pick, (*text, *guesses[:i]), rejected, where)
        for i, pick in enumerate(step.samples[: len(guesses) + 1]):
            _judge_pick(pick, (*text, *guesses[:i]), rejected, where)
        _judge_k(run, len(guesses), wanted, known - len(case.prompt), where, len(new))
        sizes.append(len(guesses))
        samples = [pick.token for pick in step.samples]
        accepted = num_equal(guesses, samples)
        if len(samples) <= accepted and known + accepted < len(right):
            raise EXERCISE.mistake("own-token-lost", f"{where}: {len(samples)} samples of it.")
        wanted = _next_k(len(guesses), accepted, case.most)
        rejected = guesses[accepted:]
        known += accepted + 1
    _judge_end(run, new, plain, known - len(case.prompt))
    if ks != sizes:
        raise Mistake(
            "other-counts",
            f"{case.seen}: you return {show(ks)} as the numbers of guesses, and they were"
            f" {show(sizes)}.\nOne number per step, in order.",
        )
    _judge_work(run, len(right), sum(sizes))


def _next_k(k: int, accepted: int, most: int) -> int:
    return min(k + 1, most) if accepted == k else max(1, accepted)


def _judge_pick(pick: _Pick, text: tuple[int, ...], rejected: list[int], where: str) -> None:
    """Judge the row that a token is picked from. text: what should be before it."""
    whose = "draft" if pick.model == "draft" else "target"
    seen = (
        f"{where}: the {whose}'s row comes after {show(pick.context[-8:])}, and the text ends with"
        f" {show(text[-8:])}."
    )
    if pick.context != text:
        raise _other_context(pick, text, rejected, seen)
    if pick.position != len(text):
        raise EXERCISE.mistake(
            "wrong-position",
            f"{where}: the {whose} picks a token for position {len(text)} with the random number of"
            f" position {pick.position}.",
        )


def _other_context(pick: _Pick, text: tuple[int, ...], rejected: list[int], seen: str) -> Mistake:
    first = next(
        (i for i, (a, b) in enumerate(zip(pick.context, text, strict=False)) if a != b),
        min(len(text), len(pick.context)),
    )
    stale = pick.context[first : first + 1] == tuple(rejected[:1]) and rejected
    if len(pick.context) > len(text) and stale:
        return EXERCISE.mistake(f"{pick.model}-not-taken-back", seen)
    if len(pick.context) < len(text):
        return EXERCISE.mistake(f"{pick.model}-misses-tokens", seen)
    if stale:
        return EXERCISE.mistake("keeps-the-wrong-guess", seen)
    return Mistake(
        "another-text",
        f"{seen}\nBefore each step both models must hold the text, without its last token, and"
        " nothing else.",
    )


def _judge_k(run: _Run, k: int, wanted: int, known: int, where: str, num_new: int) -> None:
    """Judge the number of guesses. known: new tokens so far. num_new: those of the whole text."""
    most, room = run.case.most, run.case.max_tokens - known
    right = min(wanted, room - 1)
    if k == right:
        return
    seen = f"{where}: {k} guesses, expected {right}."
    if right < k <= wanted:
        long = num_new > run.case.max_tokens
        name = "too-many-tokens" if long else "more-than-of-use"
        raise EXERCISE.mistake(name, f"{seen[:-1]}: there is room for {room} tokens.")
    if k > most:
        raise EXERCISE.mistake("beyond-most", seen)
    raise EXERCISE.mistake("other-k" if k else "never-guesses-again", seen)


def _judge_end(run: _Run, new: list[int], plain: list[int], written: int) -> None:
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


def _judge_work(run: _Run, num_tokens: int, num_guesses: int) -> None:
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
    found = answer(
        run.model("target"),
        run.model("draft"),
        run.pick(),
        prompt,
        case.max_tokens,
        case.stop_ids,
        case.most,
    )
    expect_unchanged(prompt, list(case.prompt), "prompt")
    good = isinstance(found, tuple | list) and len(found) == 2
    if not good or not all(isinstance(part, list) for part in found):
        raise Mistake(
            "wrong-type",
            f"{case.seen}: you return {show(found)}.\nReturn two lists: the new tokens, and the"
            " number of guesses of each step.",
        )
    _judge(run, *found)
    return len(found[0])


def check_debug(answer: Callable) -> str:
    cases = _cases()
    total = sum(_expect_text(answer, case) for case in cases)
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

# %% one further
@@
-            guesses.append(pick(row, len(tokens) + len(guesses)))
+            guesses.append(pick(row, len(tokens) + len(guesses) + 1))

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
            "own-token-lost",
            "A step without the target's own token: it samples after each guess, and once more.",
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
            "The text ends before its end: tokens are missing that the last step has brought.",
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

# %% one too many
@@
-        for _ in range(min(k, end - len(tokens) - 1)):
+        for _ in range(min(k, end - len(tokens))):
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

# %% by the number of tokens
@@
-            k = max(1, accepted)
+            k = accepted + 1

# %% stays
@@
-            k = max(1, accepted)
+            k = max(1, k - 1)
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
""",
        ),
        Known(
            "other-counts",
            answers=r"""
# %% notes what it wanted
@@
-        ks.append(len(guesses))
+        ks.append(k)

# %% notes what was right
@@
-        ks.append(len(guesses))
@@
-        for token_id in samples[: accepted + 1]:
+        ks.append(accepted)
+        for token_id in samples[: accepted + 1]:
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
