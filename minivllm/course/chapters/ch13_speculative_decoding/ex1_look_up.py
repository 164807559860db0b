"""13.1: prompt lookup."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import Any

from minivllm.course.chapters.ch13_speculative_decoding.common import (
    MAX_TOKENS,
    REQUESTS,
    engine_with,
)
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import (
    expect,
    expect_new_result,
    expect_nothing_kept,
    one_by_one,
)
from minivllm.engine.speculation import Proposer


class _LookUp:
    """The right one; its methods are what wrong ones replace."""

    def __call__(self, token_ids: list[int], k: int, longest: int, shortest: int) -> list[int]:
        for n in self.sizes(longest, shortest, len(token_ids)):
            start = next(iter(self.starts(token_ids, n)), None)
            if start is not None:
                return self.followers(list(token_ids), start, n, k)
        return []

    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return range(min(longest, length - 1), shortest - 1, -1)

    def starts(self, text: list[int], n: int) -> Iterable[int]:
        """Where the last n tokens occurred before, the best place first."""
        last = text[-n:]
        return (i for i in range(len(text) - n - 1, -1, -1) if text[i : i + n] == last)

    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        end = len(text)
        for i in range(k):
            text.append(text[start + n + i])
        return text[end:]


class _Oldest(_LookUp):
    def starts(self, text: list[int], n: int) -> Iterable[int]:
        return reversed(list(super().starts(text, n)))


class _Itself(_LookUp):
    def starts(self, text: list[int], n: int) -> Iterable[int]:
        return [len(text) - n]

    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        return []


class _ShortestFirst(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return range(shortest, min(longest, length - 1) + 1)


class _LongestOnly(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return [longest] if longest < length else []


class _LongestOrWhole(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return [min(longest, length - 1)] if length > 1 else []


class _ShortestOnly(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return [shortest] if shortest < length else []


class _NotShortest(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return range(min(longest, length - 1), shortest, -1)


class _NotLongest(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return range(min(longest - 1, length - 1), shortest - 1, -1)


class _DownToOne(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return range(min(longest, length - 1), 0, -1)


class _Longer(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return range(min(longest + 1, length - 1), shortest - 1, -1)


class _AnyLength(_LookUp):
    """The longest match that there is."""

    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return range(length - 1, shortest - 1, -1)


class _GivesUp(_LookUp):
    """Nothing, where the text is not longer than `longest`."""

    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return () if length <= longest else super().sizes(longest, shortest, length)


class _GivesUpBelow(_LookUp):
    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return () if length < longest else super().sizes(longest, shortest, length)


class _Stops(_LookUp):
    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        return text[start + n : start + n + k]


class _FromTheBeginning(_LookUp):
    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        return [text[(start + n + i) % len(text)] for i in range(k)]


class _LastAgain(_LookUp):
    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        found = text[start + n : start + n + k]
        return found + found[-1:] * (k - len(found))


class _FromTheMatch(_LookUp):
    """Begins again at the match, not behind it."""

    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        period = len(text) - start
        return [text[start + (n + i) % period] for i in range(k)]


class _NoOverlap(_LookUp):
    def starts(self, text: list[int], n: int) -> Iterable[int]:
        return [i for i in super().starts(text, n) if i + n <= len(text) - n]


class _NoOverlapOrTouch(_LookUp):
    def starts(self, text: list[int], n: int) -> Iterable[int]:
        return [i for i in super().starts(text, n) if i + n < len(text) - n]


class _Match(_LookUp):
    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        return super().followers(text, start, 0, k)


class _MatchEnd(_LookUp):
    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        return super().followers(text, start, n - 1, k)


class _OneLater(_LookUp):
    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        return [*super().followers(text, start, n, k + 1)][1:]


class _NotAtZero(_LookUp):
    def starts(self, text: list[int], n: int) -> Iterable[int]:
        return [i for i in super().starts(text, n) if i > 0]


class _NotTheNext(_LookUp):
    """Never the place directly before the end."""

    def starts(self, text: list[int], n: int) -> Iterable[int]:
        return [i for i in super().starts(text, n) if i < len(text) - n - 1]


class _RoomForTwo(_LookUp):
    """Only lengths that stand in the text twice without an overlap."""

    def sizes(self, longest: int, shortest: int, length: int) -> Iterable[int]:
        return range(min(longest, length // 2), shortest - 1, -1)


class _Everything(_LookUp):
    def followers(self, text: list[int], start: int, n: int, k: int) -> list[int]:
        return text[start + n :]


class _MostFrequent(_LookUp):
    """What followed most often, and of these the newest."""

    def starts(self, text: list[int], n: int) -> Iterable[int]:
        found = list(super().starts(text, n))
        then = [text[i + n] for i in found]
        return sorted(found, key=lambda i: (-then.count(text[i + n]), -i))


# --- the check ------------------------------------------------------------------------------------


def _cases() -> list[tuple[list[int], int, int, int]]:
    cases = [
        ([], 4, 3, 1),
        ([5], 4, 3, 1),
        ([5, 5], 3, 3, 1),
        ([5, 6], 3, 3, 1),
        ([1, 2, 3, 1, 2], 1, 2, 1),
        ([1, 2, 3, 1, 2], 4, 2, 1),
        ([1, 2, 3, 1, 2], 4, 9, 1),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 2, 3, 2),
        ([1, 2, 3, 4, 1, 9, 2], 3, 3, 2),
        ([7, 7, 7, 7], 5, 3, 1),
        ([7, 8, 7, 8, 7], 6, 4, 2),
        ([3, 1, 2, 5, 1, 2], 0, 2, 1),
        ([4, 1, 4, 2, 4, 3, 4], 2, 1, 1),
        ([1, 11, 2, 5, 11, 1, 2], 3, 2, 2),
        ([21, 3, 8, 9, 1, 3], 3, 2, 2),
        ([1, 2, 6, 6, 1, 2], 2, 2, 2),
        # The token that followed most often is not the newest one.
        ([1, 2, 1, 2, 1, 3, 1], 1, 1, 1),
        # Only the shorter one is at the very beginning.
        ([1, 2, 3, 4, 2], 3, 2, 1),
        ([2, 3, 4, 2], 3, 2, 1),
        # No length but one that is more than half of the text.
        ([1, 2, 1, 2, 1], 3, 3, 3),
        # Other numbers, and the same digits.
        ([1, 23, 5, 12, 3], 2, 2, 2),
    ]
    rng = Random(13)
    for _ in range(60):
        kinds = rng.randint(1, 9)
        ids = [rng.choice((rng.randrange(30), rng.randrange(150_000))) for _ in range(kinds)]
        length = rng.choice((2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 130))
        text = [rng.choice(ids) for _ in range(length)]
        shortest = rng.randint(1, 4)
        cases.append((text, rng.randint(1, 9), shortest + rng.randint(0, 5), shortest))
    # The only match is far back, and so is the end of what followed.
    for length in (257, 600, 1300, 5000):
        text = [300 + i for i in range(length)]
        cases.append(([*text, 301, 302, 303], 40, 5, 2))
        cases.append(([1, 2, 3, *text, 1, 2, 3], 3, 3, 3))
        cases.append(([*text, *text[:80]], 5, 70, 66))
    # The same tokens in another order.
    for seed in range(6):
        text = [rng.randrange(5) for _ in range(9 + seed)]
        for _ in range(3):
            cases.append((list(text), 4, 3, 1))
            rng.shuffle(text)
    # Ids that are equal and not the same object, and k beyond the text.
    cases.append(([100_000 + i for i in range(9)] * 2 + [int("100000")], 70, 12, 1))
    return cases


class _Looking(Proposer):
    """The answer as a proposer of the engine."""

    def __init__(self, answer: Callable) -> None:
        self.answer = answer

    def propose(self, sequences: Any, num_tokens: Any) -> list[list[int]]:
        return [
            self.answer(list(seq.token_ids), k, 3, 1)
            for seq, k in zip(sequences, num_tokens, strict=True)
        ]


def check_look_up(answer: Callable) -> str:
    count = diagnose(answer, _cases(), partial(_LookUp()), EXERCISE.suspects)
    pairs = one_by_one(([1, 2, 3, 1, 2], 2, 2, 1), ([3, 1, 2, 1, 3], 3, 1, 1))
    expect_nothing_kept(answer, pairs, _LookUp().__call__, "the text or a number has changed")
    expect_new_result(answer, ([1, 2, 3, 1, 2], 2, 2, 1))
    metrics = engine_with(_Looking(answer))
    expect(metrics.num_accepted_tokens > 10, "not-accepted", "The engine accepted next to nothing.")
    total = len(REQUESTS) * MAX_TOKENS
    return f"{count} texts, and the engine writes the same {total} tokens with it in fewer steps"


EXERCISE = Exercise(
    id="13.1",
    title="Warm-up: prompt lookup",
    check=check_look_up,
    mistakes=(
        Known(
            "finds-itself",
            "Your function never proposes anything. The last n tokens are always found at the very"
            " end, where they stand: an *earlier* place is asked for.",
            hint=1,
            suspects=(_Itself(),),
            answers=r"""
# %% searches the whole text
@@
-        for start in range(len(token_ids) - n - 1, -1, -1):
+        for start in range(len(token_ids) - n, -1, -1):
@@
-                text = list(token_ids)
-                for i in range(k):
-                    text.append(text[start + n + i])
-                return text[len(token_ids) :]
+                return token_ids[start + n : start + n + k]
""",
        ),
        Known(
            "oldest-place",
            "You take the oldest place at which the last tokens stood. What was written lately is"
            " more likely to come again: take the newest.",
            hint=1,
            suspects=(_Oldest(),),
            answers=r"""
# %% from the beginning
@@
-        for start in range(len(token_ids) - n - 1, -1, -1):
+        for start in range(len(token_ids) - n):
""",
        ),
        Known(
            "shortest-first",
            "A short end of the text decides, where a longer one has a place, too. A long one says"
            " more about what comes: look for `longest` tokens in the whole text first, and for"
            " fewer only if they have no place.",
            suspects=(_ShortestFirst(),),
            answers=r"""
# %% upwards
@@
-    for n in range(longest, shortest - 1, -1):
+    for n in range(shortest, longest + 1):

# %% a loop of places around the one of lengths
def look_up(
    token_ids: list[int], k: int, longest: int, shortest: int
) -> list[int]:
    size = len(token_ids)
    for start in range(size - 2, -1, -1):
        for n in range(min(longest, size - start - 1), shortest - 1, -1):
            if token_ids[start : start + n] == token_ids[-n:]:
                text = list(token_ids)
                for i in range(k):
                    text.append(text[start + n + i])
                return text[size:]
    return []
""",
        ),
        Known(
            "other-lengths",
            "You try other lengths than asked for: every n from `longest` down to `shortest`, both"
            " included, that leaves room for an earlier place.",
            hint=1,
            suspects=(
                _NotShortest(),
                _NotLongest(),
                _LongestOnly(),
                _LongestOrWhole(),
                _ShortestOnly(),
                _DownToOne(),
                _Longer(),
                _AnyLength(),
                _GivesUp(),
                _GivesUpBelow(),
            ),
            answers=r"""
# %% without the shortest
@@
-    for n in range(longest, shortest - 1, -1):
+    for n in range(longest, shortest, -1):

# %% down to one
@@
-    for n in range(longest, shortest - 1, -1):
+    for n in range(longest, 0, -1):

# %% a short text is given up
@@
-    for n in range(longest, shortest - 1, -1):
+    if len(token_ids) <= longest:
+        return []
+    for n in range(longest, shortest - 1, -1):

# %% the longest only
@@
-    for n in range(longest, shortest - 1, -1):
+    for n in [longest]:
""",
        ),
        Known(
            "stops-at-the-end",
            "The place is near the end of the text, and fewer than k tokens follow. Go on with the"
            " tokens that you have proposed: a text that repeats itself goes on so.",
            hint=2,
            suspects=(_Stops(),),
            answers=r"""
# %% a slice
@@
-                text = list(token_ids)
-                for i in range(k):
-                    text.append(text[start + n + i])
-                return text[len(token_ids) :]
+                return token_ids[start + n : start + n + k]
""",
        ),
        Known(
            "goes-on-elsewhere",
            "Where the text ends, your proposal goes on with other tokens. As if your guesses stood"
            " in the text: after its last token comes the first one that you have proposed.",
            hint=2,
            suspects=(_FromTheBeginning(), _LastAgain(), _FromTheMatch()),
            answers=r"""
# %% at the beginning of the text
@@
-                text = list(token_ids)
-                for i in range(k):
-                    text.append(text[start + n + i])
-                return text[len(token_ids) :]
+                size = len(token_ids)
+                return [token_ids[(start + n + i) % size] for i in range(k)]

# %% the last token again and again
@@
-                text = list(token_ids)
-                for i in range(k):
-                    text.append(text[start + n + i])
-                return text[len(token_ids) :]
+                found = token_ids[start + n : start + n + k]
+                return found + found[-1:] * (k - len(found))
""",
        ),
        Known(
            "no-overlap",
            "You leave out a place that overlaps with the last n tokens. It is an earlier place as"
            " well: in 7 7 7 7 the last three stood one token before.",
            hint=1,
            suspects=(_NoOverlap(), _NoOverlapOrTouch(), _RoomForTwo()),
            answers=r"""
# %% two n-grams apart
@@
-        for start in range(len(token_ids) - n - 1, -1, -1):
+        for start in range(len(token_ids) - 2 * n, -1, -1):

# %% searches the text without its end
@@
-        for start in range(len(token_ids) - n - 1, -1, -1):
+        before = token_ids[:-n]
+        for start in range(len(before) - n, -1, -1):

# %% wants room for two of them
@@
-        for start in range(len(token_ids) - n - 1, -1, -1):
+        if 2 * n > len(token_ids):
+            continue
+        for start in range(len(token_ids) - n - 1, -1, -1):
""",
        ),
        Known(
            "not-the-nearest",
            "You never try the place directly before: the newest one begins one token before the"
            " last n do.",
            hint=1,
            suspects=(_NotTheNext(),),
            answers=r"""
# %% begins two tokens before
@@
-        for start in range(len(token_ids) - n - 1, -1, -1):
+        for start in range(len(token_ids) - n - 2, -1, -1):
""",
        ),
        Known(
            "wrong-followers",
            "You have found the place, and propose other tokens than those that followed there:"
            " they begin n tokens behind its beginning.",
            hint=2,
            suspects=(_Match(), _MatchEnd(), _OneLater()),
            answers=r"""
# %% the match itself
@@
-                    text.append(text[start + n + i])
+                    text.append(text[start + i])
""",
        ),
        Known(
            "not-the-first",
            "The very beginning of the text is a place, too: start = 0.",
            suspects=(_NotAtZero(),),
            answers=r"""
# %% stops before 0
@@
-        for start in range(len(token_ids) - n - 1, -1, -1):
+        for start in range(len(token_ids) - n - 1, 0, -1):
""",
        ),
        Known(
            "too-many",
            "You propose all that follows. At most k tokens are of use, and each one costs.",
            suspects=(_Everything(),),
            answers=r"""
# %% all of it
@@
-                text = list(token_ids)
-                for i in range(k):
-                    text.append(text[start + n + i])
-                return text[len(token_ids) :]
+                return token_ids[start + n :]
""",
        ),
        Known(
            "another-choice",
            "You take another place than the newest: the one whose next token came most often.",
            suspects=(_MostFrequent(),),
            answers=r"""
# %% counts what followed
def look_up(
    token_ids: list[int], k: int, longest: int, shortest: int
) -> list[int]:
    for n in range(longest, shortest - 1, -1):
        last = token_ids[-n:]
        then = {}
        for i in range(len(token_ids) - n):
            if token_ids[i : i + n] == last:
                then.setdefault(token_ids[i + n], []).append(i)
        if then:
            best = max(then.values(), key=lambda places: (len(places), places[-1]))
            text = list(token_ids)
            for i in range(k):
                text.append(text[best[-1] + n + i])
            return text[len(token_ids) :]
    return []
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% appends to the caller's list, and takes away again too little
@@
-                text = list(token_ids)
+                size, text = len(token_ids), token_ids
@@
-                return text[len(token_ids) :]
+                return text[size:]
""",
        ),
        Known(
            "result-reused",
            answers=r"""
# %% one list for all calls
@@
-                return text[len(token_ids) :]
+                GUESSES[:] = text[len(token_ids) :]
+                return GUESSES
@@
-def look_up(token_ids: list[int], k: int, longest: int, shortest: int) -> list[int]:
+GUESSES: list[int] = []
+
+
+def look_up(token_ids: list[int], k: int, longest: int, shortest: int) -> list[int]:
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% remembers the first answer to a text
KNOWN = {}


def look_up(
    token_ids: list[int], k: int, longest: int, shortest: int
) -> list[int]:
    key = (len(token_ids), k, longest, shortest)
    if key not in KNOWN:
        KNOWN[key] = _search(token_ids, k, longest, shortest)
    return list(KNOWN[key])


def _search(token_ids, k, longest, shortest):
    for n in range(longest, shortest - 1, -1):
        for start in range(len(token_ids) - n - 1, -1, -1):
            if token_ids[start : start + n] == token_ids[-n:]:
                text = list(token_ids)
                for i in range(k):
                    text.append(text[start + n + i])
                return text[len(token_ids) :]
    return []
""",
        ),
        Known(
            "wrong-values",
            answers=r"""
# %% searches in digits
def look_up(
    token_ids: list[int], k: int, longest: int, shortest: int
) -> list[int]:
    for n in range(min(longest, len(token_ids) - 1), shortest - 1, -1):
        digits = " ".join(map(str, token_ids[:-1]))
        place = digits.rfind(" ".join(map(str, token_ids[-n:])))
        if place >= 0:
            start = digits[:place].count(" ")
            text = list(token_ids)
            for i in range(k):
                text.append(text[start + n + i])
            return text[len(token_ids) :]
    return []
""",
        ),
    ),
    right=r"""
# %% a string of characters, as the engine does it
def look_up(
    token_ids: list[int], k: int, longest: int, shortest: int
) -> list[int]:
    text = "".join(map(chr, token_ids))
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        place = text.rfind(text[-n:], 0, len(text) - 1)
        if place >= 0:
            period = text[place + n :]
            return [ord(period[i % len(period)]) for i in range(k)]
    return []

# %% an index of all n-grams
def look_up(
    token_ids: list[int], k: int, longest: int, shortest: int
) -> list[int]:
    for n in reversed(range(shortest, longest + 1)):
        ends = {tuple(token_ids[i - n : i]): i for i in range(n, len(token_ids))}
        end = ends.get(tuple(token_ids[-n:]))
        if end is not None and n < len(token_ids):
            guesses = []
            for i in range(k):
                guesses.append((token_ids + guesses)[end + i])
            return guesses
    return []
""",
)
