"""How fast a learner's engine is beside the package's, measured as chapter 10 teaches: after a
warm-up, in turn, several rounds, medians with their spread.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minivllm.course.grading.capstone.engine import build
from minivllm.course.grading.capstone.requests import SPEED
from minivllm.course.grading.capstone.run import asked

#: Measured rounds of each engine; one more before them warms up.
NUM_ROUNDS = 5
#: Above this ratio of the two times the slow piece is looked for.
SLOW = 1.3


@dataclass(frozen=True)
class Speed:
    """Output tokens per second of each round, the learner's engine and the package's.

    slow: the piece whose replacement by the package's own helps most, or "" where none is slow.
    gain: how many times as fast the learner's engine is with that replacement.
    """

    mine: list[float]
    package: list[float]
    slow: str = ""
    gain: float = 1.0

    @property
    def ratio(self) -> float:
        """How many times as fast the package's engine is: the median's ratio."""
        return statistics.median(self.package) / statistics.median(self.mine)

    @property
    def overlap(self) -> bool:
        """Whether the two engines' rounds overlap, so that no difference is measured."""
        return max(self.mine) >= min(self.package) and max(self.package) >= min(self.mine)

    def text(self) -> str:
        """Both speeds in words, with the spread of their rounds, and the slow piece if any."""
        said = [
            f"{name}: {statistics.median(found):,.0f} tokens per second"
            f" ({min(found):,.0f} to {max(found):,.0f})"
            for name, found in (("Yours", self.mine), ("The package in plain torch", self.package))
        ]
        rounds = f"{len(self.mine)} rounds in turn, medians, on this CPU."
        if self.overlap:
            beside = "The rounds overlap: no difference was measured."
        elif self.ratio > 1:
            beside = f"The package is {self.ratio:.2f} times as fast as yours."
        else:
            beside = f"Yours is {1 / self.ratio:.2f} times as fast as the package."
        slow = (
            f" The slow piece is {self.slow}: with the package's own in its place, your engine is"
            f" {self.gain:.2f} times as fast."
            if self.slow
            else ""
        )
        return f"{said[0]}. {said[1]}. {rounds} {beside}{slow}"


def measure(answers: dict[str, Any], alive: Callable[[], None] = lambda: None) -> Speed:
    """Measure both engines in turn on `SPEED`. alive: is called after each round."""
    mine, package = _Timed(answers), _Timed({})
    speeds: tuple[list[float], list[float]] = ([], [])
    for number in range(NUM_ROUNDS + 1):
        # The order alternates, so that a machine that slows down harms both alike.
        pairs = [(mine, speeds[0]), (package, speeds[1])]
        for engine, found in pairs if number % 2 else reversed(pairs):
            found.append(engine.tokens_per_second())
            alive()
    found = Speed(speeds[0][1:], speeds[1][1:])
    if found.overlap or found.ratio < SLOW:
        return found
    slow, gain = _slow_piece(answers, alive)
    return Speed(found.mine, found.package, slow, gain)


def _slow_piece(answers: dict[str, Any], alive: Callable[[], None]) -> tuple[str, float]:
    """The piece without which the engine gains most, and how many times as fast it then is.

    ("", 1.0) where no single replacement gains a tenth.
    """
    engines = {"": _Timed(answers)}
    for name in answers:
        engines[name] = _Timed({n: answer for n, answer in answers.items() if n != name})
    best = dict.fromkeys(engines, 0.0)
    for _ in range(2):
        for name, engine in engines.items():
            best[name] = max(best[name], engine.tokens_per_second())
            alive()
    gains = {name: best[name] / best[""] for name in answers}
    slow = max(gains, key=gains.__getitem__)
    return (slow, gains[slow]) if gains[slow] > 1.1 else ("", 1.0)


class _Timed:
    """An engine, and how fast it serves `SPEED`. The prefix cache is emptied before each run."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._llm, self._loop = build(
            answers, Counter(), {**SPEED.room, "enable_prefix_caching": False}
        )
        self._asked = asked(self._llm, SPEED)

    def tokens_per_second(self) -> float:
        engine = self._loop()
        start = time.perf_counter()
        outputs = engine.run(*self._asked)
        seconds = time.perf_counter() - start
        return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
