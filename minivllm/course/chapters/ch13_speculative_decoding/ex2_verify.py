"""13.2: what was right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_nothing_kept, one_by_one

Verified = tuple[list[int], int, str | None]


class _Verify:
    """The right one; its methods are what wrong ones replace."""

    def __call__(
        self, proposals: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> Verified:
        right = self.count(proposals, samples)
        new = self.candidates(proposals, samples, right)
        found = self.cut(new, samples, room, stop_ids)
        return found[0], self.reported(right, found[0]), found[1]

    def count(self, proposals: list[int], samples: list[int]) -> int:
        same = (p == s for p, s in zip(proposals, samples, strict=False))
        return len(list(itertools.takewhile(bool, same)))

    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return samples[: right + 1]

    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        for i, token_id in enumerate(new):
            if token_id in stop_ids:
                return new[: i + 1], "stop"
            if i + 1 == room:
                return new[:room], "length"
        return new, None

    def reported(self, right: int, new: list[int]) -> int:
        return right


class _NoOwn(_Verify):
    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return samples[:right]


class _NoOwnAfterAll(_Verify):
    """Where all are right, nothing more."""

    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return samples[: min(right + 1, max(1, len(proposals)))]


class _NoOwnAfterAny(_Verify):
    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return samples[: max(1, right)]


class _OwnAfterAllOnly(_Verify):
    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return samples[: right + (right == len(proposals))]


class _CountsAll(_Verify):
    def count(self, proposals: list[int], samples: list[int]) -> int:
        return sum(p == s for p, s in zip(proposals, samples, strict=False))


class _CountsAllReported(_Verify):
    def __call__(self, proposals: list[int], samples: list[int], *more: Any) -> Verified:
        new, _, reason = super().__call__(proposals, samples, *more)
        return new, sum(p == s for p, s in zip(proposals, samples, strict=False)), reason


class _CountsMembers(_Verify):
    def count(self, proposals: list[int], samples: list[int]) -> int:
        return len(list(itertools.takewhile(lambda p: p in samples, proposals)))


class _Shifted(_Verify):
    def count(self, proposals: list[int], samples: list[int]) -> int:
        return super().count(proposals, samples[1:])


class _WrongOne(_Verify):
    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return (proposals + samples[-1:])[: right + 1]


class _AllSamples(_Verify):
    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return samples


class _AllProposals(_Verify):
    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return [*proposals, samples[-1]]


class _LastSample(_Verify):
    """The sample after all proposals, wherever the first wrong one is."""

    def candidates(self, proposals: list[int], samples: list[int], right: int) -> list[int]:
        return [*proposals[:right], samples[-1]]


class _StopsAtTheLast(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        new = new[:room]
        if new and new[-1] in stop_ids:
            return new, "stop"
        return new, "length" if len(new) == room else None


class _NeverStops(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        return super().cut(new, samples, room, frozenset())


class _StopsInRejected(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        found, reason = super().cut(new, samples, room, stop_ids)
        return found, "stop" if stop_ids & {*samples} else reason


class _StopsInCut(_Verify):
    """A stop token behind the last permitted one is a stop, too."""

    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        found, reason = super().cut(new, samples, room, stop_ids)
        return found, "stop" if stop_ids & {*new} else reason


class _LastStop(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        places = [i for i, token_id in enumerate(new[:room]) if token_id in stop_ids]
        if places:
            return new[: places[-1] + 1], "stop"
        return super().cut(new, samples, room, frozenset())


class _StopsIf(_Verify):
    """A stop token counts only among the accepted ones, or only as the target's own."""

    def __init__(self, accepted: bool) -> None:
        self.accepted = accepted

    def __call__(
        self, proposals: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> Verified:
        right = self.count(proposals, samples)
        for i, token_id in enumerate(samples[: right + 1]):
            if token_id in stop_ids and (i < right) == self.accepted:
                return samples[: i + 1], right, "stop"
            if i + 1 == room:
                return samples[:room], right, "length"
        return samples[: right + 1], right, None


class _DropsStop(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        found, reason = super().cut(new, samples, room, stop_ids)
        return found[:-1] if reason == "stop" else found, reason


class _RoomForAccepted(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        return super().cut(new, samples, room + 1, stop_ids)


class _NoRoom(_Verify):
    """Takes all tokens, and says that there is no more room."""

    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        found, reason = super().cut(new, samples, 1 << 60, stop_ids)
        return found, reason or ("length" if len(found) >= room else None)


class _NoRoomAtAll(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        return super().cut(new, samples, 1 << 60, stop_ids)


class _OneFewer(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        return super().cut(new, samples, max(1, room - 1), stop_ids)


class _FullOnlyBeyond(_Verify):
    """Ends for length only where tokens were cut off."""

    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        found, reason = super().cut(new, samples, room, stop_ids)
        return found, None if reason == "length" and len(new) == room else reason


class _LengthFirst(_Verify):
    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        found, reason = super().cut(new, samples, room, stop_ids)
        return found, "length" if len(found) == room else reason


class _LengthAlone(_Verify):
    """Where the room is used up, it does not look for a stop."""

    def cut(
        self, new: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
    ) -> tuple[list[int], str | None]:
        if len(new) >= room:
            return new[:room], "length"
        return super().cut(new, samples, room, stop_ids)


class _CutAt(_Verify):
    """Proposals behind the end do not count, where it has ended for this reason.

    own: tokens that are left out besides.
    """

    def __init__(self, at: str, own: int = 0) -> None:
        self.at, self.own = at, own

    def __call__(self, *args: Any) -> Verified:
        new, right, reason = super().__call__(*args)
        return new, min(right, len(new) - self.own) if reason == self.at else right, reason


class _Delivered(_Verify):
    def reported(self, right: int, new: list[int]) -> int:
        return min(right, len(new))


class _DeliveredButOne(_Verify):
    def reported(self, right: int, new: list[int]) -> int:
        return len(new) - 1


class _CountsOwn(_Verify):
    def reported(self, right: int, new: list[int]) -> int:
        return right + 1


class _CountsNew(_Verify):
    def reported(self, right: int, new: list[int]) -> int:
        return len(new)


# --- the check ------------------------------------------------------------------------------------


def _cases() -> Iterable[tuple[list[int], list[int], int, frozenset[int]]]:
    kinds = (1, 2)
    for k in range(3):
        for tokens in itertools.product(kinds, repeat=2 * k + 1):
            for room, stop_ids in itertools.product((1, 2, 3, 9), ({9}, {2})):
                yield list(tokens[:k]), list(tokens[k:]), room, frozenset(stop_ids)
    yield [], [9], 9, frozenset(range(10))
    rng = Random(132)
    for _ in range(150):
        k = rng.choice((0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 70, 300))
        samples = [rng.choice((rng.randrange(4), rng.randrange(150_000))) for _ in range(k + 1)]
        # Equal numbers that are other objects.
        proposals = [int(str(token_id)) for token_id in samples[:-1]]
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            if k:
                proposals[rng.randrange(k)] = rng.randrange(150_000)
        stop_ids = [*rng.sample(samples, min(k + 1, rng.choice((0, 0, 1, 2)))), 151000]
        yield proposals, samples, rng.choice((1, 2, k, k + 1, k + 2, 500)) or 1, frozenset(stop_ids)


def check_verify(answer: Callable) -> str:
    cases = list(_cases())
    wording = {
        "item 0: item": "the new tokens: item",
        "item 0: ": "the new tokens: ",
        "item 1: ": "the number of accepted proposals: ",
        "item 2: ": "the finish reason: ",
    }
    diagnose(answer, cases, _Verify().__call__, EXERCISE.suspects, wording=wording)
    before = [5, 6, 7], [5, 6, 7, 8], 9, frozenset({1})
    pairs = one_by_one(before, ([5, 9, 7], [5, 9, 2, 8], 2, frozenset({5})))
    expect_nothing_kept(answer, pairs, _Verify().__call__, "the step is another one")
    return f"{len(cases)} steps, right, wrong, and over in the middle"


EXERCISE = Exercise(
    id="13.2",
    title="What was right",
    check=check_verify,
    mistakes=(
        Known(
            "no-own-token",
            "A token is missing. The step also brings the target's own sample at the first wrong"
            " place; if all proposals are right, the one after them. So no step is in vain.",
            hint=1,
            suspects=(_NoOwn(), _NoOwnAfterAll(), _NoOwnAfterAny(), _OwnAfterAllOnly()),
            answers=r"""
# %% the accepted ones only
@@
-    for token_id in samples[: num_accepted + 1]:
+    for token_id in samples[:num_accepted]:

# %% no other one where all are right
@@
-    for token_id in samples[: num_accepted + 1]:
+    for token_id in samples[: min(num_accepted + 1, max(1, len(proposals)))]:
""",
        ),
        Known(
            "counts-after-the-first-wrong",
            "A proposal after a wrong one counts in your answer. It was verified after a text that"
            " does not exist: that it is equal is an accident.",
            hint=1,
            suspects=(_CountsAll(), _CountsAllReported(), _CountsMembers()),
            answers=r"""
# %% all that are equal
@@
-        if proposal != sample:
-            break
-        num_accepted += 1
+        num_accepted += proposal == sample
""",
        ),
        Known(
            "compares-one-later",
            "You compare a proposal with the sample one place later. samples[0] is what follows the"
            " known text, and that is what proposals[0] guesses.",
            hint=1,
            suspects=(_Shifted(),),
            answers=r"""
# %% the sample after the proposal
@@
-    for proposal, sample in zip(proposals, samples):
+    for proposal, sample in zip(proposals, samples[1:]):
""",
        ),
        Known(
            "keeps-the-wrong-one",
            "Your text has a token that the target did not sample there. Take the tokens from"
            " `samples`, and none after the first wrong proposal.",
            hint=1,
            suspects=(_WrongOne(), _AllProposals(), _AllSamples(), _LastSample()),
            answers=r"""
# %% the proposal itself
@@
-    for token_id in samples[: num_accepted + 1]:
+    for token_id in (proposals + samples[-1:])[: num_accepted + 1]:

# %% all samples
@@
-    for token_id in samples[: num_accepted + 1]:
+    for token_id in samples:

# %% the sample of the end, where the first wrong one is
@@
-    for token_id in samples[: num_accepted + 1]:
+    for token_id in proposals[:num_accepted] + samples[-1:]:
""",
        ),
        Known(
            "runs-past-the-stop",
            "The text ended at a stop token inside of the step, and you give it more. Look at each"
            " new token: the first one of `stop_ids` is the last.",
            hint=2,
            suspects=(
                _StopsAtTheLast(),
                _NeverStops(),
                _LastStop(),
                _StopsIf(accepted=True),
                _StopsIf(accepted=False),
            ),
            answers=r"""
# %% looks at the last one
@@
-    new_token_ids = []
-    for token_id in samples[: num_accepted + 1]:
-        new_token_ids.append(token_id)
-        if token_id in stop_ids:
-            return new_token_ids, num_accepted, "stop"
-        if len(new_token_ids) == room:
-            return new_token_ids, num_accepted, "length"
-    return new_token_ids, num_accepted, None
+    new_token_ids = samples[: num_accepted + 1][:room]
+    if new_token_ids[-1] in stop_ids:
+        return new_token_ids, num_accepted, "stop"
+    if len(new_token_ids) == room:
+        return new_token_ids, num_accepted, "length"
+    return new_token_ids, num_accepted, None

# %% never ends
@@
-        if token_id in stop_ids:
-            return new_token_ids, num_accepted, "stop"
""",
        ),
        Known(
            "stops-elsewhere",
            'You say "stop" for a stop token that the sequence does not get: one after the first'
            " wrong proposal, or after the last token that has room.",
            hint=2,
            suspects=(_StopsInRejected(), _StopsInCut()),
            answers=r"""
# %% anywhere in the samples
@@
-    return new_token_ids, num_accepted, None
+    stopped = stop_ids.intersection(samples)
+    return new_token_ids, num_accepted, "stop" if stopped else None
@@
-            return new_token_ids, num_accepted, "length"
+            stopped = stop_ids.intersection(samples)
+            return new_token_ids, num_accepted, "stop" if stopped else "length"
""",
        ),
        Known(
            "drops-the-stop",
            "The stop token is missing. It is sampled and belongs to the sequence; what a user sees"
            " of it is decided elsewhere.",
            hint=2,
            suspects=(_DropsStop(),),
            answers=r"""
# %% leaves before it appends
@@
-        new_token_ids.append(token_id)
-        if token_id in stop_ids:
-            return new_token_ids, num_accepted, "stop"
+        if token_id in stop_ids:
+            return new_token_ids, num_accepted, "stop"
+        new_token_ids.append(token_id)
""",
        ),
        Known(
            "other-room",
            "`room` is the most tokens that the sequence may get, whoever they come from. When it"
            ' has got so many, it ends with "length".',
            hint=2,
            suspects=(
                _RoomForAccepted(),
                _NoRoom(),
                _NoRoomAtAll(),
                _OneFewer(),
                _FullOnlyBeyond(),
            ),
            answers=r"""
# %% room for the accepted ones
@@
-        if len(new_token_ids) == room:
+        if len(new_token_ids) > room:

# %% no limit
@@
-        if len(new_token_ids) == room:
-            return new_token_ids, num_accepted, "length"
-    return new_token_ids, num_accepted, None
+    full = len(new_token_ids) >= room
+    return new_token_ids, num_accepted, "length" if full else None
""",
        ),
        Known(
            "length-before-stop",
            "The last permitted token is a stop token: the text has ended by itself, and that is"
            " what the client should hear.",
            hint=2,
            suspects=(_LengthFirst(), _LengthAlone()),
            answers=r"""
# %% room first
@@
-        if token_id in stop_ids:
-            return new_token_ids, num_accepted, "stop"
-        if len(new_token_ids) == room:
-            return new_token_ids, num_accepted, "length"
+        if len(new_token_ids) == room:
+            return new_token_ids, num_accepted, "length"
+        if token_id in stop_ids:
+            return new_token_ids, num_accepted, "stop"
""",
        ),
        Known(
            "other-count",
            "The number of accepted proposals is another one: how many are right in a row, from the"
            " first on, wherever the text ends. The target's own token is no proposal.",
            suspects=(
                _Delivered(),
                _DeliveredButOne(),
                _CountsOwn(),
                _CountsNew(),
                *(_CutAt(at, own) for at in ("stop", "length") for own in (0, 1)),
            ),
            answers=r"""
# %% those that the sequence has room for
@@
-            return new_token_ids, num_accepted, "length"
+            return new_token_ids, min(room, num_accepted), "length"
@@
-            return new_token_ids, num_accepted, "stop"
+            return new_token_ids, min(len(new_token_ids), num_accepted), "stop"

# %% its own, too
@@
-    new_token_ids = []
+    new_token_ids = []
+    samples, num_accepted = samples[: num_accepted + 1], num_accepted + 1
@@
-    for token_id in samples[: num_accepted + 1]:
+    for token_id in samples:
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% cuts the caller's list
@@
-    for token_id in samples[: num_accepted + 1]:
+    del samples[num_accepted + 1 :]
+    for token_id in samples:
""",
        ),
        Known(
            "result-reused",
            answers=r"""
# %% a list of the module
@@
-    new_token_ids = []
+    new_token_ids = NEW
+    new_token_ids.clear()
@@
-def verify(
+NEW: list[int] = []
+
+
+def verify(
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% a default that is filled
@@
-    proposals: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
-) -> tuple[list[int], int, str | None]:
+    proposals: list[int], samples: list[int], room: int, stop_ids: frozenset[int],
+    new_token_ids=[],
+) -> tuple[list[int], int, str | None]:
@@
-    new_token_ids = []
""",
        ),
    ),
    right=r"""
# %% slices
def verify(
    proposals: list[int], samples: list[int], room: int, stop_ids: frozenset[int]
) -> tuple[list[int], int, str | None]:
    wrong = [i for i, p in enumerate(proposals) if p != samples[i]]
    accepted = wrong[0] if wrong else len(proposals)
    new = samples[: accepted + 1][:room]
    stops = [i for i, token_id in enumerate(new) if token_id in stop_ids]
    if stops:
        return new[: stops[0] + 1], accepted, "stop"
    return new, accepted, "length" if len(new) == room else None
""",
)
