"""13.3: does it pay?"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_nothing_kept, one_by_one

Steps = list[tuple[int, int]]

# --- the right ones, and wrong ones ---------------------------------------------------------------


def _rate(steps: Steps) -> float:
    tried = sum(min(accepted + 1, proposed) for proposed, accepted in steps)
    return sum(accepted for _, accepted in steps) / tried if tried else 0.0


def _over_proposed(steps: Steps) -> float:
    proposed = sum(proposed for proposed, _ in steps)
    return sum(accepted for _, accepted in steps) / proposed if proposed else 0.0


def _mean_of_shares(steps: Steps) -> float:
    shares = [accepted / proposed for proposed, accepted in steps if proposed]
    return sum(shares) / len(shares) if shares else 0.0


def _mean_of_rates(steps: Steps) -> float:
    shares = [a / min(a + 1, p) for p, a in steps if p]
    return sum(shares) / len(shares) if shares else 0.0


def _mean_of_all(steps: Steps) -> float:
    """Steps without proposals count as failures."""
    return sum(a / p if p else 0.0 for p, a in steps) / len(steps) if steps else 0.0


def _always_a_miss(steps: Steps) -> float:
    tried = sum(accepted + 1 for proposed, accepted in steps if proposed)
    return sum(accepted for _, accepted in steps) / tried if tried else 0.0


def _always_a_miss_everywhere(steps: Steps) -> float:
    tried = sum(accepted + 1 for _, accepted in steps)
    return sum(accepted for _, accepted in steps) / tried if tried else 0.0


def _own_counts(steps: Steps) -> float:
    proposed = sum(proposed + 1 for proposed, _ in steps)
    return sum(accepted + 1 for _, accepted in steps) / proposed if proposed else 0.0


def _whole_steps(steps: Steps) -> float:
    some = [(p, a) for p, a in steps if p]
    return sum(p == a for p, a in some) / len(some) if some else 0.0


def _first_alone(steps: Steps) -> float:
    some = [(p, a) for p, a in steps if p]
    return sum(a > 0 for _, a in some) / len(some) if some else 0.0


def _one_if_nothing(steps: Steps) -> float:
    return _rate(steps) if any(p for p, _ in steps) else 1.0


def _expected(rate: float, k: int) -> float:
    return float(sum(rate**i for i in range(k + 1)))


def _without_own(rate: float, k: int) -> float:
    return _expected(rate, k) - 1


def _linear(rate: float, k: int) -> float:
    return 1 + rate * k


def _linear_without_own(rate: float, k: int) -> float:
    return rate * k


def _one_more(rate: float, k: int) -> float:
    return _expected(rate, k + 1)


def _one_fewer(rate: float, k: int) -> float:
    return _expected(rate, k - 1)


def _never_ends(rate: float, k: int) -> float:
    """As if the number of proposals had no limit."""
    return 1 / (1 - rate) if rate < 1 else k + 1.0


def _all_or_one(rate: float, k: int) -> float:
    return 1 + k * rate**k


def _without_last(rate: float, k: int) -> float:
    """The mean of a count that ends nowhere, cut at k."""
    return sum((i + 1) * rate**i * (1 - rate) for i in range(k + 1))


def _failures(rate: float, k: int) -> float:
    """The rate of failures in its place."""
    return _expected(1 - rate, k)


class _Best:
    """The right one; its methods are what wrong ones replace."""

    def __call__(self, rate: float, draft: float, verify: list[float]) -> tuple[int, float]:
        gains = {k: self.gain(rate, draft, verify, k) for k in self.counts(verify)}
        best = self.choose(gains)
        return best, self.told(gains[best], rate, draft, verify, best)

    def counts(self, verify: list[float]) -> range:
        return range(len(verify))

    def gain(self, rate: float, draft: float, verify: list[float], k: int) -> float:
        return _expected(rate, k) * verify[0] / self.cost(draft, verify, k)

    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return k * draft + verify[k]

    def choose(self, gains: dict[int, float]) -> int:
        return max(gains, key=lambda k: (gains[k], -k))

    def told(self, gain: float, rate: float, draft: float, verify: list[float], k: int) -> float:
        return gain


class _DraftForgotten(_Best):
    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return verify[k]


class _DraftOnce(_Best):
    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return (draft if k else 0.0) + verify[k]


class _DraftOnceAlways(_Best):
    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return draft + verify[k]


class _DraftAlsoOwn(_Best):
    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return (k + 1) * draft + verify[k]


class _AtOnce(_Best):
    """As if draft and target worked side by side."""

    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return max(k * draft, verify[k])


class _PlainStep(_Best):
    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return k * draft + verify[0]


class _PlusPlain(_Best):
    """The target computes once more for its own token."""

    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return k * draft + verify[k] + verify[0]


class _PerToken(_Best):
    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return k * draft + verify[k] * (k + 1)


class _VerifyOneFewer(_Best):
    """Counts the tokens of the step, and takes the time of the one before."""

    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return k * draft + verify[max(0, k - 1)]


class _DraftOneFewer(_Best):
    def cost(self, draft: float, verify: list[float], k: int) -> float:
        return max(0, k - 1) * draft + verify[k]


class _MostTokens(_Best):
    def __call__(self, rate: float, draft: float, verify: list[float]) -> tuple[int, float]:
        gains = {k: self.gain(rate, draft, verify, k) for k in self.counts(verify)}
        best = max(gains, key=lambda k: (_expected(rate, k), -k))
        return best, gains[best]


class _Largest(_Best):
    """Always the largest number of proposals."""

    def choose(self, gains: dict[int, float]) -> int:
        return max(gains)


class _NeverNone(_Best):
    def counts(self, verify: list[float]) -> range:
        return range(1, len(verify)) if len(verify) > 1 else range(1)


class _NotTheLast(_Best):
    def counts(self, verify: list[float]) -> range:
        return range(max(1, len(verify) - 1))


class _FirstPeak(_Best):
    """Stops where one more does not help."""

    def choose(self, gains: dict[int, float]) -> int:
        k = 0
        while k + 1 in gains and gains[k + 1] > gains[k]:
            k += 1
        return k


class _LargestOfEqual(_Best):
    def choose(self, gains: dict[int, float]) -> int:
        return max(gains, key=lambda k: (gains[k], k))


class _PerSecond(_Best):
    def told(self, gain: float, rate: float, draft: float, verify: list[float], k: int) -> float:
        return gain / verify[0]


class _Tokens(_Best):
    def told(self, gain: float, rate: float, draft: float, verify: list[float], k: int) -> float:
        return _expected(rate, k)


class _Saved(_Best):
    """The part that is gained."""

    def told(self, gain: float, rate: float, draft: float, verify: list[float], k: int) -> float:
        return gain - 1


class _Inverse(_Best):
    def told(self, gain: float, rate: float, draft: float, verify: list[float], k: int) -> float:
        return 1 / gain


# --- the check ------------------------------------------------------------------------------------


def _rate_cases() -> list[tuple[Steps]]:
    cases: list[tuple[Steps]] = [
        ([],),
        ([(0, 0)],),
        ([(4, 0)],),
        ([(4, 4)],),
        ([(4, 2)],),
        ([(1, 1), (1, 0)],),
        ([(0, 0), (2, 1), (0, 0)],),
        ([(8, 1), (2, 2)],),
    ]
    rng = Random(1331)
    for length in (1, 3, 7, 16, 40, 300, 2500):
        most = rng.randint(1, 9)
        proposed = [rng.randint(0, most) for _ in range(length)]
        cases.append(([(p, rng.randint(0, p)) for p in proposed],))
    return cases


def _expected_cases() -> list[tuple[float, int]]:
    rates = (0.0, 0.1, 0.25, 0.5, 0.6, 0.8, 0.9, 0.99, 0.9995, 0.99999, 1.0)
    return [(rate, k) for rate in rates for k in (0, 1, 2, 3, 4, 5, 8, 16, 33, 100, 1000)]


def _best_cases() -> list[tuple[float, float, list[float]]]:
    """(rate, seconds per token of the draft, seconds of the step with 0, 1, ... proposals)."""
    cases: list[tuple[float, float, list[float]]] = [
        (0.5, 0.01, [0.02]),
        (0.0, 0.0, [0.02, 0.02, 0.02]),  # all the same: the fewest
        (1.0, 0.0, [0.02, 0.02, 0.02]),
        (0.8, 0.001, [0.02, 0.02, 0.02, 0.02, 0.02]),
        (0.8, 0.02, [0.02, 0.021, 0.022]),  # a draft as slow as the target
        (0.3, 0.004, [0.02, 0.024, 0.03]),
        # A kernel that takes tokens by fours: the fourth costs what the first did.
        (0.9, 0.0005, [0.02, 0.041, 0.042, 0.043, 0.044]),
        (0.95, 0.0, [0.01, 0.02, 0.021, 0.022, 0.04, 0.041]),
        # Nine tokens fill a tile, and cost no more than three; a better kernel begins there.
        (0.97, 0.0, [0.01, 0.012, 0.03, 0.04, 0.04, 0.04, 0.04, 0.04, 0.03, 0.05]),
        (1.0, 0.005, [0.02 + 0.0001 * k for k in range(40)]),
        (0.97, 0.0001, [0.02 + 0.00002 * k for k in range(70)]),
    ]
    rng = Random(1332)
    for _ in range(40):
        plain, most = rng.uniform(0.005, 2.0), rng.randint(1, 12)
        verify = [plain]
        for _ in range(most):
            verify.append(verify[-1] + plain * rng.choice((0.0, 0.02, 0.1, 0.5)))
        cases.append((rng.uniform(0.1, 0.98), plain * rng.choice((0.0, 0.02, 0.2, 0.7)), verify))
    return cases


def _suspects(which: type | Callable) -> dict[str, tuple]:
    """The suspects of one of the three functions."""
    functions = {_rate: _RATES, _expected: _EXPECTED}.get(which, ())

    def of_this(made: Any) -> bool:
        return made in functions if functions else isinstance(made, _Best)

    return {
        known.name: (known.message, *found)
        for known in EXERCISE.mistakes
        if (found := [made for made in known.suspects if of_this(made)])
    }


_RATES = (
    _over_proposed,
    _mean_of_shares,
    _mean_of_rates,
    _mean_of_all,
    _always_a_miss,
    _always_a_miss_everywhere,
    _own_counts,
    _whole_steps,
    _one_if_nothing,
    _first_alone,
)
_EXPECTED = (
    _without_own,
    _linear,
    _linear_without_own,
    _one_more,
    _one_fewer,
    _never_ends,
    _all_or_one,
    _failures,
    _without_last,
)


def check_pays(acceptance_rate: Callable, expected_tokens: Callable, best_k: Callable) -> str:
    tight = {"rtol": 1e-6, "atol": 1e-9}
    count = diagnose(acceptance_rate, _rate_cases(), _rate, _suspects(_rate), **tight)
    diagnose(expected_tokens, _expected_cases(), _expected, _suspects(_expected), **tight)
    wording = {"item 0: ": "the number of proposals: ", "item 1: ": "the speed-up: "}
    machines = diagnose(
        best_k, _best_cases(), _Best().__call__, _suspects(_Best), wording=wording, **tight
    )
    _expect_nothing_kept(acceptance_rate, expected_tokens, best_k)
    return f"{count} records, and {machines} machines with a draft"


def _expect_nothing_kept(rate: Callable, expected: Callable, best: Callable) -> None:
    changed = "the numbers have changed"
    pairs = [(([(4, 2), (1, 1)],), ([(4, 1), (2, 0)],))]
    expect_nothing_kept(rate, pairs, _rate, changed)
    expect_nothing_kept(expected, one_by_one((0.5, 3), (0.25, 4)), _expected, changed)
    times = (0.9, 0.1, [1.0, 1.1, 1.2, 1.3]), (0.5, 0.01, [1.0, 1.01, 1.9, 2.0])
    expect_nothing_kept(best, one_by_one(*times), _Best().__call__, changed)


EXERCISE = Exercise(
    id="13.3",
    title="Does it pay?",
    check=check_pays,
    mistakes=(
        Known(
            "all-proposals-tried",
            "You divide by all proposals. Those after the first wrong one were not tried: nobody"
            " knows whether they would have been right. So your rate is too low, and the longer the"
            " proposals, the lower.",
            hint=1,
            suspects=(_over_proposed, _mean_of_shares, _mean_of_all),
            answers=r"""
# %% accepted of proposed
@@
-    tried = sum(min(accepted + 1, proposed) for proposed, accepted in steps)
+    tried = sum(proposed for proposed, _ in steps)

# %% a mean of shares
@@
-    tried = sum(min(accepted + 1, proposed) for proposed, accepted in steps)
-    return sum(accepted for _, accepted in steps) / tried if tried else 0.0
+    shares = [a / p for p, a in steps if p]
+    return sum(shares) / len(shares) if shares else 0.0
""",
        ),
        Known(
            "always-a-miss",
            "You count a failed try in a step without one: where all proposals were accepted,"
            " nothing failed.",
            hint=1,
            suspects=(_always_a_miss, _always_a_miss_everywhere),
            answers=r"""
# %% one more than accepted
@@
-    tried = sum(min(accepted + 1, proposed) for proposed, accepted in steps)
+    tried = sum(accepted + 1 for proposed, accepted in steps if proposed)
""",
        ),
        Known(
            "steps-not-tries",
            "Your rate weighs steps, not tries. Add up what was accepted, and add up what was"
            " tried; then divide once.",
            hint=1,
            suspects=(_mean_of_rates, _whole_steps, _own_counts, _first_alone),
            answers=r"""
# %% a mean of rates
@@
-    tried = sum(min(accepted + 1, proposed) for proposed, accepted in steps)
-    return sum(accepted for _, accepted in steps) / tried if tried else 0.0
+    shares = [a / min(a + 1, p) for p, a in steps if p]
+    return sum(shares) / len(shares) if shares else 0.0
""",
        ),
        Known(
            "nothing-tried",
            "Where nothing was tried, the rate is said to be 0.0.",
            suspects=(_one_if_nothing,),
            answers=r"""
# %% 1.0
@@
-    return sum(accepted for _, accepted in steps) / tried if tried else 0.0
+    return sum(accepted for _, accepted in steps) / tried if tried else 1.0
""",
        ),
        Known(
            "no-own-token",
            "A step without a right proposal brings a token all the same: the target's own.",
            hint=2,
            suspects=(_without_own, _linear_without_own),
            answers=r"""
# %% proposals only
@@
-    return sum(rate**i for i in range(k + 1))
+    return sum(rate**i for i in range(1, k + 1))
""",
        ),
        Known(
            "each-by-itself",
            "You count each proposal by itself. The second one is of use only if the first is"
            " right, too: that is rate * rate.",
            hint=2,
            suspects=(_linear, _all_or_one),
            answers=r"""
# %% k times the rate
@@
-    return sum(rate**i for i in range(k + 1))
+    return 1 + k * rate

# %% all or one
@@
-    return sum(rate**i for i in range(k + 1))
+    return 1 + k * rate**k
""",
        ),
        Known(
            "another-k",
            "That is the number for another k than the one given. With k = 1 it is 1 + rate.",
            hint=2,
            suspects=(_one_more, _one_fewer, _never_ends, _without_last),
            answers=r"""
# %% one fewer
@@
-    return sum(rate**i for i in range(k + 1))
+    return sum(rate**i for i in range(k)) or 0.0

# %% without end
@@
-    return sum(rate**i for i in range(k + 1))
+    return 1 / (1 - rate) if rate < 1 else k + 1
""",
        ),
        Known(
            "upside-down-rate",
            "You use the rate of failures, 1 - rate, where the rate belongs.",
            suspects=(_failures,),
            answers=r"""
# %% failures
@@
-    return sum(rate**i for i in range(k + 1))
+    return sum((1 - rate) ** i for i in range(k + 1))
""",
        ),
        Known(
            "wrong-cost",
            "That is not what the step costs. The draft computes one token after the other, k"
            " tokens, and then the target verifies them: `k * draft + verify[k]`.",
            hint=3,
            suspects=(
                _DraftForgotten(),
                _DraftOnce(),
                _DraftOnceAlways(),
                _DraftAlsoOwn(),
                _AtOnce(),
                _PlainStep(),
                _PlusPlain(),
                _PerToken(),
                _VerifyOneFewer(),
                _DraftOneFewer(),
            ),
            answers=r"""
# %% the draft is free
@@
-        cost = k * draft + verify[k]
+        cost = verify[k]

# %% one draft step
@@
-        cost = k * draft + verify[k]
+        cost = draft + verify[k]

# %% verifying costs what a plain step does
@@
-        cost = k * draft + verify[k]
+        cost = k * draft + verify[0]
""",
        ),
        Known(
            "most-tokens",
            "You take the k that brings the most tokens per *step*, and that is always the largest."
            " What counts is tokens per second.",
            hint=3,
            suspects=(_MostTokens(), _Largest()),
            answers=r"""
# %% by tokens
@@
-        gain = expected_tokens(rate, k) * verify[0] / cost
-        if gain > best[1]:
-            best = k, gain
+        gain = expected_tokens(rate, k) * verify[0] / cost
+        if expected_tokens(rate, k) > expected_tokens(rate, best[0]):
+            best = k, gain
""",
        ),
        Known(
            "some-k-left-out",
            "You do not look at every k from 0 to the last one that `verify` has a time for. 0 is"
            " a choice, too: not to speculate. And a second best place may come before the best.",
            hint=3,
            suspects=(_NeverNone(), _NotTheLast(), _FirstPeak()),
            answers=r"""
# %% at least one
@@
-    best = 0, 1.0
+    best = (1, 0.0) if len(verify) > 1 else (0, 1.0)

# %% up to the first that does not help
@@
-        if gain > best[1]:
-            best = k, gain
+        if gain <= best[1]:
+            break
+        best = k, gain
""",
        ),
        Known(
            "largest-of-equal",
            "Of several k that are equally good take the smallest: it wastes less when the batch"
            " grows.",
            suspects=(_LargestOfEqual(),),
            answers=r"""
# %% the last of them
@@
-        if gain > best[1]:
+        if gain >= best[1]:
""",
        ),
        Known(
            "no-speed-up",
            "The k is right, and the number beside it is no speed-up: tokens per second with"
            " speculation, divided by tokens per second without. Without, one token takes"
            " `verify[0]`.",
            hint=3,
            suspects=(_PerSecond(), _Tokens(), _Saved(), _Inverse()),
            answers=r"""
# %% tokens per second
@@
-        gain = expected_tokens(rate, k) * verify[0] / cost
+        gain = expected_tokens(rate, k) / cost
@@
-    best = 0, 1.0
+    best = 0, 1 / verify[0]

# %% what is gained
@@
-    return best
+    return best[0], best[1] - 1
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% remembers by k
@@
-def best_k(rate: float, draft: float, verify: list[float]) -> tuple[int, float]:
+FOUND = {}
+
+
+def best_k(rate: float, draft: float, verify: list[float]) -> tuple[int, float]:
@@
-        gain = expected_tokens(rate, k) * verify[0] / cost
+        gain = FOUND.setdefault((k, rate), expected_tokens(rate, k) * verify[0] / cost)
""",
        ),
    ),
    right=r"""
# %% the closed formula
@@
-    return sum(rate**i for i in range(k + 1))
+    if rate == 1:
+        return k + 1
+    return (1 - rate ** (k + 1)) / (1 - rate)

# %% max
@@
-    best = 0, 1.0
-    for k in range(1, len(verify)):
-        cost = k * draft + verify[k]
-        gain = expected_tokens(rate, k) * verify[0] / cost
-        if gain > best[1]:
-            best = k, gain
-    return best
+
+    def gain(k):
+        return expected_tokens(rate, k) * verify[0] / (k * draft + verify[k])
+
+    best = max(range(len(verify)), key=gain)
+    return best, gain(best)
""",
)
