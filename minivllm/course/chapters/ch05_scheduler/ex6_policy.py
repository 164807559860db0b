"""05.6: a better queue."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from minivllm.course.chapters.ch05_scheduler.common import busy_day, longest_early_wait
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.course.sim.simulator import Simulation
from minivllm.engine.scheduler import Scheduler
from minivllm.errors import SchedulerStalledError

#: What a policy must reach, beside the order of arrival.
MEDIAN, WORST, THROUGHPUT = 0.7, 1.5, 0.97


@contextmanager
def _leaping_clocks(answer: type) -> Iterator[list[str]]:
    """The machine's clocks leap by a minute at every look; yields the names of those that were
    looked at.

    Clocks that a cell has imported by name (`from time import monotonic`) are replaced in the
    answer's own module. They leap for this thread only: those of a Jupyter kernel that wait for
    messages look at the clock as well.
    """
    seen: list[str] = []
    real, here = datetime.datetime, threading.get_ident()

    def leaping(name: str, clock: Callable) -> Callable:
        def read(*args: Any) -> Any:
            if threading.get_ident() != here:
                return clock(*args)
            seen.append(name)
            return clock(*args) + 60 * len(seen) * (10**9 if name.endswith("_ns") else 1)

        return read

    class Leaping(real):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            if threading.get_ident() != here:
                return real.now(tz)
            seen.append("datetime.now")
            return real.now(tz) + datetime.timedelta(minutes=len(seen))

        today = utcnow = now

    names = [
        base + end
        for base in ("time", "monotonic", "perf_counter", "process_time")
        for end in ("", "_ns")
    ]
    clocks: dict[Any, Any] = {
        getattr(time, name): leaping(f"time.{name}", getattr(time, name)) for name in names
    }
    functions = [
        f for kind in answer.__mro__ for f in vars(kind).values() if isinstance(f, FunctionType)
    ]
    spaces = [
        space
        for f in functions
        if (space := f.__globals__).get("__name__", "").split(".")[0] != "minivllm"
    ]
    old = [
        (space, key, value)
        for space in spaces
        for key, value in space.items()
        if _is_in(value, clocks)
    ]
    old += [
        (space, key, value) for space in spaces for key, value in space.items() if value is real
    ]
    old += [(vars(time), name, getattr(time, name)) for name in names]
    datetime.datetime = Leaping  # type: ignore[misc]
    for space, key, value in old:
        space[key] = Leaping if value is real else clocks[value]
    try:
        yield seen
    finally:
        datetime.datetime = real  # type: ignore[misc]
        for space, key, value in old:
            space[key] = value


def _is_in(value: Any, clocks: dict[Any, Any]) -> bool:
    return any(value is clock for clock in clocks)


def _check_clockless(answer: type, first: Simulation) -> None:
    """Mistake where the order depends on anything but the requests and the steps: `first` is the
    answer's busy day.
    """
    with _leaping_clocks(answer) as seen:
        again = busy_day(answer)
    expect(
        not seen,
        "machine-clock",
        f"Your order looks at the machine's clock ({', '.join(sorted(set(seen)))}).\nSeveral GPUs,"
        " each with a process and a clock of its own, must decide alike, and a slow machine like a"
        " fast one. Count steps: `self.stats.num_steps`.",
    )
    when = [[request.token_times for request in run.requests] for run in (first, again)]
    late = next((i for i, (a, b) in enumerate(zip(*when, strict=True)) if a != b), None)
    expect(
        late is None,
        "not-the-same-twice",
        "The same requests, served twice by a scheduler of yours, were not served alike: request"
        f" {late} got its tokens at other times.\nSeveral GPUs must decide alike: no clock, no"
        " chance, and notes in `self`, not in the class.",
    )


def check_policy(answer: type) -> str:
    expect(
        isinstance(answer, type) and issubclass(answer, Scheduler),
        "wrong-type",
        f"Hand in a subclass of Scheduler.\nYou handed in {answer!r}.",
    )
    try:
        mine, right = busy_day(answer), busy_day(Scheduler)
        waits = [longest_early_wait(answer, count) for count in (150, 300)]
    except SchedulerStalledError as error:
        raise Mistake(
            "stalled", f"{error}\nReorder `self.waiting`; leave the planning to super().schedule()."
        ) from error
    if mine.lost:
        raise Mistake(
            "lost-request",
            f"{len(mine.lost)} of {len(mine.requests)} requests did not get their whole answer.\nA"
            " policy may let people wait, but not send them away: `waiting` must hold the same"
            " requests afterwards.",
        )
    _check_clockless(answer, mine)
    expect(
        waits[1] <= 1.25 * waits[0] + 4,
        "starves",
        "Requests keep coming, a bit faster than the GPU can take them. Of those who came in the"
        f" first half second somebody waits {waits[0]} steps if 150 come in all, and {waits[1]} if"
        " 300 do: as long as others keep coming.\nWhoever has waited long enough must be next,"
        " however long the prompt, whoever has come since. `self.stats.num_steps` is a clock.",
    )
    expect(
        mine.throughput >= THROUGHPUT * right.throughput,
        "too-slow",
        f"{mine.throughput:,.0f} tokens a second, beside {right.throughput:,.0f} in order of"
        " arrival.\nIs the budget used up in every step while somebody waits?",
    )
    mine_median, right_median = (run.summary()["TTFT median"] for run in (mine, right))
    mine_worst, right_worst = (max(run.ttfts) for run in (mine, right))
    expect(
        mine_median <= MEDIAN * right_median,
        "no-better",
        f"The median TTFT is {mine_median:.0f} milliseconds, beside {right_median:.0f} in order of"
        f" arrival; at most {MEDIAN * right_median:.0f} are asked for.\nLet short prompts pass more"
        " often, or patience last longer.",
    )
    expect(
        mine_worst <= WORST * right_worst,
        "worst-too-long",
        f"Somebody waits {1000 * mine_worst:,.0f} milliseconds for the first token; in order of"
        f" arrival it was at most {1000 * right_worst:,.0f}, and {WORST} times that is"
        " allowed.\nYou starve nobody for ever, but some for too long: let patience end earlier.",
    )
    return "better for most, bearable for all, and nobody starves"


EXERCISE = Exercise(
    id="05.6",
    title="A better queue",
    check=check_policy,
    mistakes=(
        Known(
            "starves",
            hint=1,
            answers=r"""
# %% the shortest first
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.num_tokens))
        return super().schedule()

# %% the newest first, whose median is just as good
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: -seq.seq_id))
        return super().schedule()

# %% two lanes, the short one first; best on the busy day
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(
            sorted(self.waiting, key=lambda seq: (seq.num_tokens > 900, seq.seq_id))
        )
        return super().schedule()
""",
        ),
        Known(
            "no-better",
            hint=3,
            answers=r"""
# %% in order of arrival, which it is anyway
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.seq_id))
        return super().schedule()

# %% age counts so much that nothing else does
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}

    def schedule(self) -> ScheduledBatch:
        now = self.stats.num_steps
        order = sorted(
            self.waiting,
            key=lambda seq: seq.num_tokens - 1000 * (now - self.born[seq.seq_id]),
        )
        self.waiting = deque(order)
        return super().schedule()
""",
        ),
        Known(
            "worst-too-long",
            hint=3,
            answers=r"""
# %% age counts, but too little
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}

    def schedule(self) -> ScheduledBatch:
        now = self.stats.num_steps
        order = sorted(
            self.waiting,
            key=lambda seq: seq.num_tokens - 100 * (now - self.born[seq.seq_id]),
        )
        self.waiting = deque(order)
        return super().schedule()
""",
        ),
        Known(
            "lost-request",
            answers=r"""
# %% long prompts are sent away
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        for seq in [seq for seq in self.waiting if seq.num_tokens > 2500]:
            self.finish(seq, "abort")
        return super().schedule()
""",
        ),
        Known(
            "too-slow",
            answers=r"""
# %% one at a time, so that nobody waits behind a long one
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        waiting = sorted(self.waiting, key=lambda seq: seq.seq_id)
        keep = waiting if len(self.running) < 8 else []
        self.waiting = deque(keep)
        batch = super().schedule()
        if not keep:
            self.waiting = deque(waiting)
        return batch
""",
        ),
        Known(
            "machine-clock",
            hint=2,
            answers=r"""
# %% patience by the machine's clock, in simulated proportion
import time


class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: time.monotonic()}

    def schedule(self) -> ScheduledBatch:
        now = time.monotonic()
        order = sorted(
            self.waiting,
            key=lambda seq: seq.num_tokens - 3e6 * (now - self.born[seq.seq_id]),
        )
        self.waiting = deque(order)
        return super().schedule()

# %% a clock under a name of its own, which decides the order of arrival only
from time import perf_counter_ns as now


class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {
            seq.seq_id: (now(), self.stats.num_steps)
        }

    def schedule(self) -> ScheduledBatch:
        late = self.stats.num_steps - 20
        self.waiting = deque(sorted(self.waiting, key=lambda s: self.rank(s, late)))
        return super().schedule()

    def rank(self, seq: Sequence, late: int) -> tuple:
        born, step = self.born[seq.seq_id]
        return (0, born) if step < late else (1, seq.num_tokens)

# %% the time of day
from datetime import datetime


class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: datetime.now()}

    def schedule(self) -> ScheduledBatch:
        by_age = self.stats.num_steps % 2 == 0
        self.waiting = deque(
            sorted(
                self.waiting,
                key=lambda s: (
                    self.born[s.seq_id] if by_age else datetime.min,
                    s.num_tokens,
                ),
            )
        )
        return super().schedule()
""",
        ),
        Known(
            "not-the-same-twice",
            answers=r"""
# %% every now and then it is somebody's lucky day
import random


class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        by_age = random.random() < 0.5
        self.waiting = deque(
            sorted(
                self.waiting, key=lambda seq: seq.seq_id if by_age else seq.num_tokens
            )
        )
        return super().schedule()
""",
        ),
    ),
    right=r"""
# %% age against length
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}

    def schedule(self) -> ScheduledBatch:
        now = self.stats.num_steps
        order = sorted(
            self.waiting,
            key=lambda seq: seq.num_tokens - 300 * (now - self.born[seq.seq_id]),
        )
        self.waiting = deque(order)
        return super().schedule()

# %% every second step belongs to the oldest
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        by_age = self.stats.num_steps % 2 == 0
        self.waiting = deque(
            sorted(
                self.waiting, key=lambda seq: seq.seq_id if by_age else seq.num_tokens
            )
        )
        return super().schedule()

# %% two lanes, and patience
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}

    def schedule(self) -> ScheduledBatch:
        late = self.stats.num_steps - 25
        self.waiting = deque(
            sorted(
                self.waiting,
                key=lambda s: (
                    self.born[s.seq_id] > late,
                    self.born[s.seq_id] > late and s.num_tokens > 900,
                    s.seq_id,
                ),
            )
        )
        return super().schedule()
""",
)
