"""A computer with a calculated clock. It shows why honest timing is hard; no real time passes.

    machine = SimulatedMachine(heat=0.3)
    multiply = machine.task("multiply", seconds=200e-6, cold=0.02)
    before = machine.clock()
    multiply()                      # returns at once: the work was only put into a queue
    machine.synchronize()           # waits until the queue is empty
    print(machine.clock() - before) # the first call: 20 milliseconds and more

Four effects of GPUs (and of laptops) are simulated. The first call of a task compiles. A call
returns before the work is done. A chip that works gets warm and lowers its clock rate. And
sometimes another program uses the machine. All random effects are drawn from a seed, so two runs of
the same program see the same times.
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
    """The simulated machine. Times are in seconds.

    launch: CPU time of a call. heat: how much slower the work becomes when the chip is hot (0.3 is
    30 %). warmth: seconds of work after which about two thirds of that slowdown are reached. noise:
    the spread of a task's time, as a share of the time. disturbed: the share of calls that another
    program slows down. disturbance: the factor by which such a call takes longer. boosted: the
    share of calls that happen to run at a higher clock rate. boost: the factor for the time of such
    a call.
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
        #: The events in order: ("call", name), ("clock", ""), ("synchronize", "").
        self.log: list[tuple[str, str]] = []
        # When everything in the queue will have been done.
        self._idle_at = 0.0
        # Seconds of work so far.
        self._worked = 0.0
        self._calls: Counter[str] = Counter()

    def clock(self) -> float:
        """The time in seconds, like `time.perf_counter`."""
        self.log.append(("clock", ""))
        return self.now

    def synchronize(self) -> None:
        """Wait until all called work is done, like `torch.cuda.synchronize`."""
        self.log.append(("synchronize", ""))
        self.now = max(self.now, self._idle_at)

    def wait(self, seconds: float) -> None:
        """Let the caller do something else for a while."""
        self.now += seconds

    def task(self, name: str, seconds: float, cold: float = 0.0) -> Callable[[], None]:
        """A function whose call puts this many seconds of work into the queue.

        cold: extra seconds of the first call, which compiles; the caller waits for them.
        """

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
        """How fast the machine works now; 1.0 when cold."""
        return 1 / (1 + self.heat * (1 - math.exp(-self._worked / self.warmth)))

    def _factor(self, name: str) -> float:
        # The random numbers depend only on the task and on the number of this call. Programs that
        # differ elsewhere therefore see the same times.
        random = Random(f"{self.seed} {name} {self._calls[name]}")
        factor = (1 + self.noise * random.random()) / self.speed
        chance = random.random()
        if chance < self.disturbed:
            factor *= self.disturbance * (0.5 + random.random())
        elif chance > 1 - self.boosted:
            factor *= self.boost
        return factor


class EngineClock:
    """A clock for the engine on the bundled model. Each step advances it by the cost of its tokens.

        timer = EngineClock()
        llm = LLM(device="cpu", build_batch=timer.build_batch)  # it sees every step
        start = timer.clock()

    step: seconds per step. token: seconds per token in the step. cold: extra seconds of the first
    step. pace: factors for the time of the steps in the first stretch between two readings of the
    clock, in the second stretch and so on; after the last factor the first one follows. A factor
    above 1 is a slow stretch, as if another program used the machine.
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
        """The time in seconds, like `time.perf_counter`."""
        self.num_readings += 1
        return self.now

    def build_batch(self, rows: Any, *more: Any) -> Any:
        """Advance the clock by this step's cost, and call the package's `build_batch`."""
        from minivllm.engine.batch import build_batch

        tokens = sum(len(row.token_ids) for row in rows)
        seconds = self.step + self.token * tokens
        if self.num_tokens == 0:
            seconds += self.cold
        # Two readings make one measurement.
        stretch = max(0, self.num_readings - 1) // 2
        self.now += seconds * self.pace[stretch % len(self.pace)]
        self.num_tokens += tokens
        return build_batch(rows, *more)
