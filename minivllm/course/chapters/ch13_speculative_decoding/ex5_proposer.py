"""13.5: a proposer of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from minivllm.course.chapters.ch13_speculative_decoding.common import (
    MAX_TOKENS,
    REQUESTS,
    engine_with,
)
from minivllm.course.chapters.ch13_speculative_decoding.stream import (
    LAST,
    Asked,
    Played,
    Scene,
    Text,
    expect_form,
    play,
)
from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import CheckError, Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_no_growth, footprint
from minivllm.engine.sequence import Sequence, SequenceStatus
from minivllm.engine.speculation import NgramProposer, Proposer
from minivllm.sampling_params import SamplingParams

#: The share of what prompt lookup accepts that an answer must reach.
FLOOR = 0.85


class _Stateless(Proposer):
    """Proposes by a function of the text."""

    def __init__(self, look_up: Callable[[list[int], int], list[int]]) -> None:
        self.look_up = look_up

    def propose(self, sequences: Any, num_tokens: Any) -> list[list[int]]:
        return [
            self.look_up(list(seq.token_ids), k)
            for seq, k in zip(sequences, num_tokens, strict=True)
        ]


class _Fresh(Proposer):
    """A new proposer for each guess, which cannot remember anything."""

    def __init__(self, make: Callable[[], Proposer]) -> None:
        self.make = make

    def propose(self, sequences: Any, num_tokens: Any) -> list[list[int]]:
        found = []
        for seq, k in zip(sequences, num_tokens, strict=True):
            one = self.make().propose([seq], [k])
            expect_form(one, [k])
            found.append(one[0])
        return found


class _Pair(Proposer):
    """Two proposers, as two engines have them. A sequence's seed tells to whom it belongs."""

    def __init__(self, make: Callable[[], Proposer]) -> None:
        self.both = make(), make()

    def propose(self, sequences: Any, num_tokens: Any) -> list[list[int]]:
        found: list[list[int]] = []
        for seq, k in zip(sequences, num_tokens, strict=True):
            one = self.both[seq.seed].propose([seq], [k])
            expect_form(one, [k])
            found.append(one[0])
        return found


# --- proposers that guess worse -------------------------------------------------------------------


def _places(text: list[int], n: int) -> list[int]:
    """What follows each earlier place of the last n tokens begins here, the newest first."""
    last = text[-n:]
    return [i + n for i in range(len(text) - n - 1, -1, -1) if text[i : i + n] == last]


def _guess(text: list[int], k: int, sizes: tuple[int, ...] = (3, 2, 1)) -> list[int]:
    for n in sizes:
        places = _places(text, n)
        if places:
            long, start = list(text), places[0]
            for i in range(k):
                long.append(long[start + i])
            return long[len(text) :]
    return []


def _stopping(text: list[int], k: int, sizes: tuple[int, ...]) -> list[int]:
    for n in sizes:
        if places := _places(text, n):
            return text[places[0] : places[0] + k]
    return []


#: Lengths of the end of a text that somebody may look up.
_SIZES = ((3, 2, 1), (4, 3, 2, 1), (2, 1), (3, 2), (1,), (2,), (3,))


@dataclass(frozen=True)
class _Way:
    """A way to guess worse. sizes: see `_guess`. stops: where the text ends.

    part: "all" of the text, its "prompt" or its "output".
    """

    sizes: tuple[int, ...] = (3, 2, 1)
    stops: bool = False
    part: str = "all"

    def guesses(self, asked: Asked) -> list[int]:
        text = asked.text[asked.num_prompt :] if self.part == "output" else asked.text
        if self.part == "prompt":
            # The text's end, looked up in the prompt.
            return self._in_prompt(asked)
        return (_stopping if self.stops else _guess)(text, asked.k, self.sizes)

    def _in_prompt(self, asked: Asked) -> list[int]:
        for n in self.sizes:
            for start in _places(asked.text, n):
                if start < asked.num_prompt:
                    long = list(asked.text)
                    for i in range(asked.k):
                        long.append(long[start + i])
                    return long[len(asked.text) :]
        return []

    def did(self, log: list[Asked]) -> bool:
        """Whether this way explains all guesses, and no better way explains them, too."""
        if any(self.guesses(asked) != asked.guesses for asked in log):
            return False
        better = _Way(self.sizes) if self.stops or self.part != "all" else _Way()
        return any(better.guesses(asked) != asked.guesses for asked in log)


# --- the texts ------------------------------------------------------------------------------------


def _passages(rng: Random, length: int, kinds: int = 60, prompt: int = 90) -> tuple[list, list]:
    """A text that copies passages of itself, with other tokens between them."""
    text = [rng.randrange(kinds) + 7 for _ in range(prompt)]
    while len(text) < prompt + length:
        start, size = rng.randrange(len(text) - 12), rng.randint(5, 11)
        text += text[start : start + size]
        text += [rng.randrange(kinds) + 7 for _ in range(rng.randint(1, 2))]
    return text[:prompt], text[prompt : prompt + length]


def _loop(rng: Random, period: int, length: int) -> tuple[list, list]:
    """A text that ends in a loop."""
    round_ = [rng.randrange(100, 140_000) for _ in range(period)]
    prompt = [rng.randrange(100) for _ in range(9)] + round_ * 2
    return prompt, (round_ * length)[:length]


def _changing(rng: Random, length: int) -> tuple[list, list]:
    """Lines that are alike; now and then they all change."""
    line = [rng.randrange(40) for _ in range(8)]
    text: list[int] = []
    while len(text) < length + 40:
        line = [token + 50 * (i % 3 > 0) for i, token in enumerate(line)]
        line = [token if rng.random() < 0.6 else rng.randrange(90) for token in line]
        text += [200, 201, 202, *line] * 4
    return text[:40], text[40 : 40 + length]


def _texts(first: int, made: list[tuple[list, list]], same: int = 1) -> list[Text]:
    """same: so many texts have the same id, one for each seed."""
    return [Text(first + i // same, *one, seed=i % same) for i, one in enumerate(made)]


@functools.cache
def _scenes() -> list[Scene]:
    rng = Random(135)
    loops = [_loop(rng, period, 60) for period in (16, 7, 3, 2, 1)]
    alone = [_passages(rng, 150), _passages(rng, 150, kinds=90, prompt=33), _changing(rng, 200)]
    others = [_passages(rng, 80) for _ in range(12)]
    going = [_passages(rng, 400, prompt=20) for _ in range(6)]
    again = [_passages(rng, 120) for _ in range(5)]
    twice = [_passages(rng, 70) for _ in range(4)]
    scenes = [
        Scene("misses-tokens", "Alone, a text that repeats itself", [text])
        for text in _texts(100, loops)
    ]
    scenes.append(
        Scene("misses-tokens", "Up to 24 guesses in a loop", _texts(150, loops[1:2]), k=24)
    )
    scenes += [
        Scene("guesses-kept", "Alone, a text that is often another one", [text])
        for text in _texts(200, alone)
    ]
    return [
        *scenes,
        Scene("texts-mixed-up", "Five texts at once, in any order", _texts(300, others), 5),
        Scene("left-out", "Texts that are left out of some calls", _texts(400, going), 4, 0.6),
        Scene(
            "not-restarted",
            "Texts with the same number, and `restart` between them",
            [Text(500, *one) for one in again],
            restarts=True,
        ),
        Scene("shared-between-objects", "Two engines", _texts(600, twice, 2), 4),
    ]


def _expect_good(make: Callable[[], Proposer], scene: Scene) -> None:
    """Judge how many guesses are accepted in a scene."""
    pair = scene.name == "shared-between-objects"
    best = play(_Stateless(_guess), scene)
    floor = int(FLOOR * best.num_accepted)
    wrong: Exception | None = None
    try:
        mine = play(_Pair(make) if pair else make(), scene)
    except Mistake as mistake:
        if mistake.name != "other-order" or scene.at_once == 1:
            raise
        # The limits are kept in another order: these are the guesses for another text.
        seen = f"{scene.what}: {mistake.message.splitlines()[0]}"
        raise EXERCISE.mistake(scene.name, seen) from None
    except (CheckError, NotImplementedError):
        raise
    except Exception as error:
        wrong = error
        seen = f"{scene.what}: your code raised {type(error).__name__}: {error}."
    else:
        if mine.num_accepted >= floor:
            return
        seen = (
            f"{scene.what}: {mine.num_accepted} of your guesses are accepted; with prompt lookup"
            f" it is {best.num_accepted}, and {floor} are asked for.\n{_example(mine)}"
        )
    if pair or play(_Fresh(make), scene).num_accepted >= floor:
        raise EXERCISE.mistake(scene.name, seen) from wrong
    raise wrong or _guesses_badly(mine, seen)


_WAYS = {
    "stops-at-the-end": [_Way(sizes, stops=True) for sizes in _SIZES],
    "half-of-the-text": [_Way(s, part=part) for s in _SIZES for part in ("prompt", "output")],
    "looks-at-one-token": [_Way((1,)), _Way((1, 2, 3)), _Way((1, 2)), _Way((1, 2, 3, 4))],
    "one-length": [_Way((n,)) for n in (2, 3, 4)],
}


def _guesses_badly(mine: Played, seen: str) -> Mistake:
    longest = max((len(asked.guesses) for asked in mine.log), default=0)
    if longest == 0:
        return EXERCISE.mistake("proposes-nothing", seen)
    for name, ways in _WAYS.items():
        if any(way.did(mine.log) for way in ways):
            return EXERCISE.mistake(name, seen)
    short = [asked for asked in mine.log if asked.k > longest and asked.guesses]
    if short and all(len(asked.guesses) == longest for asked in short):
        return EXERCISE.mistake("fewer-than-asked", seen)
    return EXERCISE.mistake("too-few-accepted", seen)


def _example(played: Played) -> str:
    """The shortest text after which prompt lookup would have been right, and the answer is not."""
    for asked in sorted(played.log, key=lambda asked: len(asked.text)):
        come = asked.come
        best = _guess(asked.text, asked.k)
        if best[: len(come)] == come and asked.guesses[: len(come)] != come:
            return (
                f"For example, after {len(asked.text)} tokens that end with {asked.text[-4:]} you"
                f" guess {show(asked.guesses)}, and {show(come)} come."
            )
    return ""


# --- what is kept ---------------------------------------------------------------------------------


@functools.cache
def _long() -> Scene:
    rng = Random(7)
    # In some of them many a token is new, and nothing can be looked up.
    kinds = (300, 100_000) * 3
    made = [_passages(rng, 90, kinds=count, prompt=1600) for count in kinds]
    return Scene("texts-mixed-up", "Long texts, four at once", _texts(800, made), 4)


def _expect_little_reading(make: Callable[[], Proposer]) -> None:
    scene = _long()
    played = play(make(), scene)
    length = len(scene.texts[0].prompt)
    expect(
        played.num_read <= played.num_free,
        "reads-again",
        f"{len(scene.texts)} texts have {length:,} tokens at first, and for {len(played.log)}"
        f" guesses you read {played.num_read:,} tokens of them.\nRead what is new since the last"
        f" call, and up to {LAST} tokens at the end. The others you have seen: keep what you need.",
    )


def _expect_forgets(make: Callable[[], Proposer]) -> None:
    few, many = (footprint(_come_and_go(make, False, rounds)) for rounds in (2, 42))
    expect(
        many <= few + 100,
        "grows",
        f"After 2 texts that have come and ended your object holds {few:,} things, after 42 texts"
        f" {many:,}.\nWhat belongs to a text that has ended is dropped in the next call.",
    )
    for ends_alone in (False, True):
        what = "texts that come and end"
        expect_no_growth(functools.partial(_come_and_go, make, ends_alone), what)


def _come_and_go(make: Callable[[], Proposer], ends_alone: bool, rounds: int) -> Any:
    """A proposer after so many texts have ended. ends_alone: whether each is in one call only."""
    mine = make()
    for number in range(rounds):
        seq = Sequence(
            9000 + number,
            [number, number + 1, number, number + 2, number],
            SamplingParams(temperature=0),
            status=SequenceStatus.RUNNING,
        )
        for _ in range(1 if ends_alone else 2):
            mine.propose([seq], [2])
            seq.token_ids.append(number + 3)
        seq.status = SequenceStatus.FINISHED
    return mine


def check_proposer(answer: type[Proposer]) -> str:
    expect(
        isinstance(answer, type) and issubclass(answer, Proposer),
        "wrong-form",
        f"{show(answer)} is no class of proposers.\nHand in the class, a subclass of `Proposer`.",
    )
    for scene in (*_scenes(), _long()):
        _expect_good(answer, scene)
    _expect_little_reading(answer)
    _expect_forgets(answer)
    accepted = engine_with(answer()).num_accepted_tokens
    least = int(FLOOR * _by_the_engine())
    if accepted < least:
        raise EXERCISE.mistake(
            "too-few-accepted",
            f"In the engine {accepted} of your guesses are accepted, and {least} are asked for.",
        )
    num_texts = sum(len(scene.texts) for scene in _scenes())
    total = len(REQUESTS) * MAX_TOKENS
    return f"{num_texts} texts that come and go, and the engine writes the same {total} tokens"


@functools.cache
def _by_the_engine() -> int:
    """How many guesses of the package's prompt lookup the engine accepts."""
    return engine_with(NgramProposer(3, 1)).num_accepted_tokens


EXERCISE = Exercise(
    id="13.5",
    title="Your proposer in the engine",
    check=check_proposer,
    mistakes=(
        Known(
            "misses-tokens",
            "A proposer that sees this text for the first time would do better. So what you"
            " remember is not the text: a call may bring any number of new tokens, from 1 to k + 1"
            " or more. They are `seq.token_ids[n:]` where n counts those that you have taken in.",
            hint=1,
            answers=r"""
# %% takes in the last token
@@
-        for token_id in seq.token_ids[len(tokens) :]:
+        for token_id in seq.token_ids[-1:] if tokens else seq.token_ids[:]:

# %% counts its guesses as read
@@
-        for token_id in seq.token_ids[len(tokens) :]:
+        new = seq.token_ids[self.num_read.get(seq.seq_id, 0) :]
+        self.num_read[seq.seq_id] = len(seq.token_ids) + k
+        for token_id in new:
@@
-        self.texts = {}
+        self.texts, self.num_read = {}, {}
""",
        ),
        Known(
            "guesses-kept",
            "A proposer that sees this text for the first time would do better. It begins where"
            " guesses are wrong: what was rejected is still in your memory. Only `token_ids` is"
            " known; a guess is nobody's token until it stands there.",
            hint=2,
            answers=r"""
# %% appends its guesses
@@
-                for i in range(start, start + k):
-                    # Behind the end of the text stand the guesses themselves.
-                    inside = i < len(tokens)
-                    guesses.append(tokens[i] if inside else guesses[i - len(tokens)])
-                return guesses
+                for i in range(start, start + k):
+                    tokens.append(tokens[i])
+                return tokens[-k:]
""",
        ),
        Known(
            "texts-mixed-up",
            "Alone, your proposer is good enough, and among others it is not: it takes one text for"
            " another. A text's place in the list changes from call to call; its `seq_id` stays.",
            hint=1,
            answers=r"""
# %% by the place in the call
@@
-        return [self.guess(seq, k) for seq, k in zip(sequences, num_tokens)]
+        return [self.guess(seq, k, i) for i, (seq, k) in enumerate(zip(sequences, num_tokens))]
@@
-    def guess(self, seq, k: int) -> list[int]:
+    def guess(self, seq, k: int, number: int = 0) -> list[int]:
@@
-        _, tokens, ends = self.texts.setdefault(seq.seq_id, (seq, [], {}))
+        _, tokens, ends = self.texts.setdefault(number, (seq, [], {}))

# %% one table for all texts
@@
-        _, tokens, ends = self.texts.setdefault(seq.seq_id, (seq, [], {}))
+        _, tokens, _ = self.texts.setdefault(seq.seq_id, (seq, [], {}))
+        ends = self.ends
@@
-        self.texts = {}
+        self.texts, self.ends = {}, {}
""",
        ),
        Known(
            "left-out",
            "In every call your proposer is good enough; it is not when a text is left out of some"
            " calls and comes back with more tokens. Forget it completely, or not at all.",
            hint=2,
            answers=r"""
# %% a table that is emptied while the count stays
@@
-        return [self.guess(seq, k) for seq, k in zip(sequences, num_tokens)]
+        here = {seq.seq_id for seq in sequences}
+        for seq_id, (_, _, ends) in self.texts.items():
+            if seq_id not in here:
+                ends.clear()
+        return [self.guess(seq, k) for seq, k in zip(sequences, num_tokens)]
""",
        ),
        Known(
            "not-restarted",
            "After `restart` the old texts are gone, and a new one may have the number of an old"
            " one. Forget everything there.",
            hint=2,
            answers=r"""
# %% under another name
@@
-        self.restart()
+        self.forget()
@@
-    def restart(self) -> None:
+    def forget(self) -> None:

# %% restarts half
@@
-        self.texts = {}
+        self.texts = getattr(self, "texts", {})
+        for seq, tokens, _ in self.texts.values():
+            tokens.clear()
""",
        ),
        Known(
            "shared-between-objects",
            "Each is good by itself, and two of them are not: they share what they remember. It"
            " belongs into `__init__`, as `self.…`.",
            answers=r"""
# %% an attribute of the class
@@
-        self.texts = {}
+        type(self).texts.clear()
@@
-    def __init__(self) -> None:
-        self.restart()
+    texts = {}
""",
        ),
        Known(
            "stops-at-the-end",
            "Your guesses end where the text ends. In a loop of two tokens that is one or two"
            " guesses; go on with those that you have made.",
            hint=3,
            answers=r"""
# %% a slice
@@
-                guesses: list[int] = []
-                for i in range(start, start + k):
-                    # Behind the end of the text stand the guesses themselves.
-                    inside = i < len(tokens)
-                    guesses.append(tokens[i] if inside else guesses[i - len(tokens)])
-                return guesses
+                return tokens[start : start + k]
""",
        ),
        Known(
            "looks-at-one-token",
            "You look at the last token only. Many others followed it somewhere; with two or three"
            " tokens the place is nearly always the right one. Try the longest first.",
            hint=3,
            answers=r"""
# %% one token
@@
-        for n in (3, 2, 1):
+        for n in (1,):
""",
        ),
        Known(
            "one-length",
            "You look up the last tokens in one number only. Three are often new where two are not:"
            " then two are tried, then one.",
            hint=3,
            answers=r"""
# %% three
@@
-        for n in (3, 2, 1):
+        for n in (3,):
""",
        ),
        Known(
            "half-of-the-text",
            "You look the text's end up in a part of the text only. A text is prompt and output,"
            " and either may be repeated.",
            hint=1,
            answers=r"""
# %% the output
@@
-        for token_id in seq.token_ids[len(tokens) :]:
+        for token_id in seq.token_ids[seq.num_prompt_tokens + len(tokens) :]:
""",
        ),
        Known(
            "proposes-nothing",
            "Not one guess comes from your proposer.",
            hint=3,
            answers=r"""
# %% looks itself up
@@
-            for n in (1, 2, 3):
-                ends[tuple(tokens[-n:])] = len(tokens)
-            tokens.append(token_id)
+            tokens.append(token_id)
+            for n in (1, 2, 3):
+                ends[tuple(tokens[-n:])] = len(tokens)
@@
-                for i in range(start, start + k):
+                for i in range(start, min(start + k, len(tokens))):
""",
        ),
        Known(
            "fewer-than-asked",
            "You never make more than so many guesses, and the engine asked for more. With one"
            " guess a step brings two tokens at most.",
            hint=3,
            answers=r"""
# %% four at most
@@
-                for i in range(start, start + k):
+                for i in range(start, start + min(k, 4)):
""",
        ),
        Known(
            "too-few-accepted",
            "Your guesses are wrong more often than prompt lookup's, which takes the longest end of"
            " the text, of three tokens at most, that stood before; and the newest such place.",
            hint=3,
            answers=r"""
# %% the match itself
@@
-                for i in range(start, start + k):
+                for i in range(start - 1, start - 1 + k):
""",
        ),
        Known(
            "reads-again",
            answers=r"""
# %% builds its table anew in each call
@@
-        _, tokens, ends = self.texts.setdefault(seq.seq_id, (seq, [], {}))
+        tokens, ends = [], {}

# %% compares what it knows with the text
@@
-        _, tokens, ends = self.texts.setdefault(seq.seq_id, (seq, [], {}))
+        _, tokens, ends = self.texts.setdefault(seq.seq_id, (seq, [], {}))
+        if tokens != seq.token_ids[: len(tokens)]:
+            tokens.clear()
+            ends.clear()
""",
        ),
        Known(
            "grows",
            answers=r"""
# %% never forgets
@@
-        gone = [i for i, (seq, _, _) in self.texts.items() if seq.is_finished]
-        for seq_id in gone:
-            del self.texts[seq_id]

# %% forgets the text, and keeps a count of it
@@
-        self.texts = {}
+        self.texts, self.counts = {}, {}
@@
-        for token_id in seq.token_ids[len(tokens) :]:
+        self.counts[seq.seq_id] = len(seq.token_ids)
+        for token_id in seq.token_ids[len(tokens) :]:
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% takes the engine's list for its own
@@
-                for i in range(start, start + k):
-                    # Behind the end of the text stand the guesses themselves.
-                    inside = i < len(tokens)
-                    guesses.append(tokens[i] if inside else guesses[i - len(tokens)])
-                return guesses
+                text = seq.token_ids
+                for i in range(start, start + k):
+                    text.append(text[i])
+                return text[-k:]
""",
        ),
        Known(
            "too-many",
            answers=r"""
# %% always five
@@
-                for i in range(start, start + k):
+                for i in range(start, start + 5):

# %% as many for all
@@
-        return [self.guess(seq, k) for seq, k in zip(sequences, num_tokens)]
+        return [self.guess(seq, max(num_tokens)) for seq in sequences]
""",
        ),
        Known(
            "wrong-form",
            answers=r"""
# %% one list for all
@@
-        return [self.guess(seq, k) for seq, k in zip(sequences, num_tokens)]
+        return [g for seq, k in zip(sequences, num_tokens) for g in self.guess(seq, k)]
""",
        ),
    ),
    right=r"""
# %% strings, and what is left out is forgotten
class Echo(Proposer):
    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.texts = {}

    def propose(self, sequences, num_tokens):
        before, self.texts = self.texts, {}
        found = []
        for seq, k in zip(sequences, num_tokens):
            text = before.get(seq.seq_id, "")
            text += "".join(map(chr, seq.token_ids[len(text) :]))
            self.texts[seq.seq_id] = text
            found.append(self.guess(text, k))
        return found

    def guess(self, text, k):
        for n in range(min(4, len(text) - 1), 0, -1):
            place = text.rfind(text[-n:], 0, len(text) - 1)
            if place >= 0:
                loop = text[place + n :]
                return [ord(loop[i % len(loop)]) for i in range(k)]
        return []

# %% guess by guess, each after the last two tokens
@@
-        for n in (3, 2, 1):
-            start = ends.get(tuple(tokens[-n:]))
-            if start is not None:
-                guesses: list[int] = []
-                for i in range(start, start + k):
-                    # Behind the end of the text stand the guesses themselves.
-                    inside = i < len(tokens)
-                    guesses.append(tokens[i] if inside else guesses[i - len(tokens)])
-                return guesses
-        return []
+        text = list(tokens[-3:])
+        for _ in range(k):
+            places = [ends.get(tuple(text[-n:])) for n in (3, 2, 1)]
+            place = next((p for p in places if p is not None), None)
+            if place is None:
+                break
+            text.append(tokens[place])
+        return text[len(tokens[-3:]) :]
""",
)
