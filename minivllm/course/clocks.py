"""A computer whose clock is calculated: what makes honest timing hard, without any real time
passing.

    machine = SimulatedMachine(heat=0.3)
    multiply = machine.task("multiply", seconds=200e-6, cold=0.02)
    before = machine.clock()
    multiply()                      # returns at once: the work was only put into a queue
    machine.synchronize()           # waits until it has been done
    print(machine.clock() - before) # the first call: 20 milliseconds and more

Four things happen here that happen on GPUs (and on laptops). The first call of a task compiles.
Calls return before the work is done. A chip that works gets warm and lowers its clock. And now and
then somebody else needs the machine. Everything is drawn from a seed, so two runs of the same
program see the same times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(eq=False, kw_only=True)
class SimulatedMachine:
    """See the module. Times in seconds.

    launch: CPU time of a call. heat: how much slower (0.3 is 30 %) work gets in the end, warmth:
    after so many seconds of work about two thirds of that. noise: spread of a task's time, as a
    share of it. disturbed: the share of calls that somebody disturbs; disturbance: how many times
    as long these take. boosted: the share of calls that happen to run at a higher clock, boost: the
    share of its time that such a call takes.
    """

    seed: int = 0
    launch: float = 5e-6
    heat: float = 0.0
    warmth: float = 0.02
    noise: float = 0.0
    disturbed: float = 0.0
    disturbance: float = 6.0
    boosted: float = 0.0
    boost: float = 0.7

    def __post_init__(self) -> None:
        self.now = 0.0
        #: What happened: ("call", name), ("clock", ""), ("synchronize", "").
        self.log: list[tuple[str, str]] = []
        self._idle_at = 0.0  # when everything in the queue will have been done
        self._worked = 0.0  # seconds of work so far
        self._calls: Counter[str] = Counter()

    def clock(self) -> float:
        """Seconds, as `time.perf_counter`."""
        self.log.append(("clock", ""))
        return self.now

    def synchronize(self) -> None:
        """Wait until everything that has been called is done, as `torch.cuda.synchronize`."""
        self.log.append(("synchronize", ""))
        self.now = max(self.now, self._idle_at)

    def wait(self, seconds: float) -> None:
        """The caller does something else for a while."""
        self.now += seconds

    def task(self, name: str, seconds: float, cold: float = 0.0) -> Callable[[], None]:
        """A function whose call puts so many seconds of work into the queue. cold: its first call
        takes more by this much, in which the caller waits (it compiles)."""

        def call() -> None:
            self.log.append(("call", name))
            self.now += self.launch
            if self._calls[name] == 0:
                self.now += cold
            duration = seconds * self._factor(name)
            self._calls[name] += 1
            self._worked += duration
            self._idle_at = max(self._idle_at, self.now) + duration

        call.__name__ = name
        return call

    @property
    def speed(self) -> float:
        """How fast it works now; 1.0 when cold."""
        return 1 / (1 + self.heat * (1 - math.exp(-self._worked / self.warmth)))

    def _factor(self, name: str) -> float:
        # Drawn for this call of this task, whatever else has been called: programs that differ
        # elsewhere see the same.
        random = Random(f"{self.seed} {name} {self._calls[name]}")
        factor = (1 + self.noise * random.random()) / self.speed
        chance = random.random()
        if chance < self.disturbed:
            factor *= self.disturbance * (0.5 + random.random())
        elif chance > 1 - self.boosted:
            factor *= self.boost
        return factor


class EngineClock:
    """A clock for the engine on the bundled model: it goes on with every step, by what the step's
    tokens would cost.

        timer = EngineClock()
        llm = LLM(device="cpu", build_batch=timer.build_batch)  # it sees every step
        start = timer.clock()

    step: seconds of a step, token: of each token in it, cold: of the very first step, on top. Some
    of the stretches between two readings of the clock are slower (somebody else needed the machine)
    or faster than usual: `pace` says how many times as long the steps take in the first stretch,
    the second …, over and over.
    """

    def __init__(
        self,
        *,
        step: float = 4e-3,
        token: float = 1e-4,
        cold: float = 2.0,
        pace: tuple[float, ...] = (1.0,),
    ) -> None:
        self.step, self.token, self.cold, self.pace = step, token, cold, pace
        self.now, self.num_readings, self.num_tokens = 0.0, 0, 0

    def clock(self) -> float:
        """Seconds, as `time.perf_counter`."""
        self.num_readings += 1
        return self.now

    def build_batch(self, rows: Any, *more: Any) -> Any:
        """The package's `build_batch`, and the time of the step that it is for."""
        from minivllm.engine.batch import build_batch

        tokens = sum(len(row.token_ids) for row in rows)
        seconds = self.step + self.token * tokens
        if self.num_tokens == 0:
            seconds += self.cold
        stretch = max(0, self.num_readings - 1) // 2  # two readings make one measurement
        self.now += seconds * self.pace[stretch % len(self.pace)]
        self.num_tokens += tokens
        return build_batch(rows, *more)
