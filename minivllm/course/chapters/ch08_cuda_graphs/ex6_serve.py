"""08.6: one step ahead."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch08_cuda_graphs.common import cuda_errors, amount
from minivllm.course.grading.exercise import Exercise, Known


class _TooLong(Exception):
    pass


def check_serve(answer: Callable) -> str:
    random = Random(6)
    cases: list[tuple[list[tuple[int, int]], dict[str, Any]]] = [
        ([(5, 1)], {}),
        ([(5, 6)], {}),
        ([(5, 9), (7, 20), (3, 4)], {}),
        ([(5, 4), (7, 3), (3, 5)], {"max_num_seqs": 1}),
        ([(5, 9), (7, 20), (3, 4), (9, 30), (4, 12), (6, 25), (8, 1)], {}),
        ([(4, 10)] * 3, {"schedule_us": 900.0, "update_us": 900.0, "step_us": 1000.0}),
        ([(random.randint(2, 40), random.randint(1, 40)) for _ in range(14)], {"step_us": 2500.0}),
    ]
    saved = 0.0
    for requests, times in cases:
        saved = max(saved, _serve_one(answer, requests, times))
    expect(
        saved > 1.2,
        "no-overlap",
        "Nothing was faster than waiting for each step.\nPlan the next one first.",
    )
    return f"{len(cases)} loads, the right tokens, and never more than two steps under way"


def _serve_one(answer: Callable, requests: list[tuple[int, int]], times: dict[str, Any]) -> float:
    """How many times faster than waiting for each step it was."""
    from minivllm.course.sim.streams import SimulatedEngine, SimulatedGPU, drive

    what = f"Requests {show(requests)}"
    reference = SimulatedEngine(SimulatedGPU(), requests, **times)
    limit = 4 * (drive(reference, ahead=0) + 10)
    ideal = SimulatedEngine(SimulatedGPU(), requests, **times)
    drive(ideal, ahead=1)

    class Watched(SimulatedEngine):
        calls = 0
        launched: list = []
        waits_when_planned = 0

        def schedule(self) -> Any:
            self.calls += 1
            if self.calls > limit:
                raise _TooLong
            batch = super().schedule()
            self.waits_when_planned = self.gpu.num_waits
            return batch

        def launch(self, batch: Any) -> Any:
            expect(
                self.gpu.num_waits == self.waits_when_planned,
                "waits-before-launch",
                f"{what}: between schedule() and launch() your loop waits for the GPU. Meanwhile"
                " the step that you have planned could run already.\nPlan, launch, and only then"
                " wait for the older step.",
            )
            step = super().launch(batch)
            self.launched = [*self.launched, (batch, step)]
            return step

        def update(self, batch: Any, token_ids: Any) -> None:
            expect(
                isinstance(token_ids, list | tuple)
                and all(isinstance(token, int) for token in token_ids),
                "no-list-of-integers",
                f"{what}: update got {show(token_ids)}.\nIt wants a list of integers:"
                " step.token_ids.tolist().",
            )
            step = next((step for other, step in self.launched if other is batch), None)
            if step is not None and not step.arrived.query():
                raise Mistake(
                    "tokens-read-too-early",
                    f"{what}: update got the tokens {show(list(token_ids))} of a step that had not"
                    " run yet.\nThe pinned tensor holds whatever was there until the copy has run:"
                    " wait for `step.arrived` first.",
                )
            if list(token_ids) != step_tokens(step):
                raise Mistake(
                    "tokens-read-too-early",
                    f"{what}: update got the tokens {show(list(token_ids))}; the step's are "
                    f"{show(step_tokens(step))}.\n"
                    "Were they read before its event had passed, or from another step?",
                )
            super().update(batch, token_ids)

    def step_tokens(step: Any) -> list[int]:
        return step.token_ids.tolist() if step is not None else []

    gpu = SimulatedGPU()
    engine = Watched(gpu, requests, **times)
    try:
        with cuda_errors("in serve"):
            count = answer(engine)
    except _TooLong:
        raise Mistake(
            "never-ends",
            f"{what}: after {limit} calls of schedule() your loop still runs;"
            f" {amount(engine.unfinished, 'request')} unfinished, {amount(len(engine._in_flight), 'step')}"
            " under way.\nWhen schedule() gives None, the tokens of a step that is under way may"
            " be what it lacks: bring them. When nothing is under way either, you are done.",
        ) from None
    except ValueError as error:
        if "in the order of the steps" not in str(error):
            raise
        raise Mistake(
            "out-of-order",
            f"{what}: {error}.\nThe oldest step that is under way comes first: append on one side,"
            " take from the other.",
        ) from error
    _judge_serve(engine, gpu, what, count, (reference, ideal))
    return reference.gpu.now / gpu.now


def _judge_serve(engine: Any, gpu: Any, what: str, count: Any, others: tuple[Any, Any]) -> None:
    reference, ideal = others
    if engine._in_flight:
        raise Mistake(
            "last-step-lost",
            f"{what}: your loop has ended with {amount(len(engine._in_flight), 'step')} under way,"
            " whose tokens nobody got.\nBefore you leave, bring what is still under way.",
        )
    expect(
        not engine.unfinished,
        "stops-too-early",
        f"{what}: your loop has ended; {amount(engine.unfinished, 'request')} unfinished.\nschedule()"
        " may give None only because tokens are missing. After an update, ask again.",
    )
    expect(
        engine.answers == reference.answers,
        "wrong-values",
        f"{what}: the answers are {show(engine.answers)}, expected"
        f" {show(reference.answers)}.\nWhich step's tokens went where?",
    )
    expect(
        engine.most_in_flight <= 2,
        "too-far-ahead",
        f"{what}: {engine.most_in_flight} steps were under way at once.\nOne ahead is enough to"
        " keep the GPU busy. Every further one is computed for nothing when an answer ends, and"
        " delays whoever is new.",
    )
    slower = gpu.now / ideal.gpu.now
    if engine.most_in_flight < 2 and ideal.most_in_flight == 2:
        raise Mistake(
            "no-overlap",
            f"{what}: never more than one step was under way, and it took {gpu.now:,.0f}"
            f" microseconds; one step ahead takes {ideal.gpu.now:,.0f}.\nLaunch the next step"
            " *before* you wait for the one that runs.",
        )
    if slower > 1.05:
        everything = any(span.name == "wait for the GPU" for span in gpu.spans)
        name = "waits-for-everything" if everything else "waits-for-the-newest"
        why = (
            "gpu.synchronize() waits for all that was launched, the next step too. Wait for the"
            " event of the older one."
            if everything
            else (
                "You wait for the event of the step that you have just launched. The older one's"
                " has come long before."
            )
        )
        raise Mistake(
            name,
            f"{what}: it took {gpu.now:,.0f} microseconds; one step ahead takes"
            f" {ideal.gpu.now:,.0f}.\n{why}",
        )
    is_count = isinstance(count, int) and not isinstance(count, bool) and count == engine.num_steps
    expect(
        is_count,
        "wrong-count",
        f"{what}: serve returned {show(count)}; {engine.num_steps} steps were "
        "launched.\nReturn how "
        "many.",
    )


EXERCISE = Exercise(
    id="08.6",
    title="One step ahead",
    check=check_serve,
    mistakes=(
        Known(
            "no-overlap",
            answers=r"""
# %% wait for each step
def serve(engine):
    count = 0
    while (batch := engine.schedule()) is not None:
        step = engine.launch(batch)
        count += 1
        step.arrived.synchronize()
        engine.update(batch, step.token_ids.tolist())
    return count

# %% the older step first, then the next one
def serve(engine):
    count, before = 0, None
    while True:
        if before is not None:
            before[1].arrived.synchronize()
            engine.update(before[0], before[1].token_ids.tolist())
            before = None
        batch = engine.schedule()
        if batch is None:
            return count
        before = batch, engine.launch(batch)
        count += 1
""",
        ),
        Known(
            "tokens-read-too-early",
            answers=r"""
# %% no event
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            engine.update(oldest, step.token_ids.tolist())

# %% read first, waited afterwards
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            step = engine.launch(batch)
            under_way.append((batch, step, step.token_ids.tolist()))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step, tokens = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, tokens)
""",
        ),
        Known(
            "waits-for-everything",
            answers=r"""
# %% the whole GPU
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            engine.gpu.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "waits-for-the-newest",
            answers=r"""
# %% the event of the step just launched
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            under_way[-1][1].arrived.synchronize()
            oldest, step = under_way.popleft()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "last-step-lost",
            answers=r"""
# %% None means done
def serve(engine):
    under_way, count = deque(), 0
    while (batch := engine.schedule()) is not None:
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    return count
""",
        ),
        Known(
            "stops-too-early",
            answers=r"""
# %% empties what is under way, and leaves
def serve(engine):
    under_way, count = deque(), 0
    while (batch := engine.schedule()) is not None:
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    for oldest, step in under_way:
        step.arrived.synchronize()
        engine.update(oldest, step.token_ids.tolist())
    return count
""",
        ),
        Known(
            "out-of-order",
            answers=r"""
# %% takes from the side where it puts
def serve(engine):
    under_way, count = [], 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.pop()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "too-far-ahead",
            answers=r"""
# %% three under way
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (2 if batch is not None else 0):
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "never-ends",
            answers=r"""
# %% None is passed over, and nothing is brought
def serve(engine):
    under_way, count = deque(), 0
    while engine.unfinished:
        batch = engine.schedule()
        if batch is None:
            continue
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    return count
""",
        ),
        Known(
            "wrong-count",
            answers=r"""
# %% nothing returned
def serve(engine):
    under_way = deque()
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
        elif not under_way:
            return
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
""",
        ),
        Known(
            "waits-before-launch",
            answers=r"""
# %% plans, waits for the older step, launches
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is None and not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            step.arrived.synchronize()
            engine.update(before, step.token_ids.tolist())
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1
""",
        ),
        Known(
            "spins",
            answers=r"""
# %% asks until the answer is yes
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1
        elif not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            while not step.arrived.query():
                pass
            engine.update(before, step.token_ids.tolist())
""",
        ),
        Known(
            "no-list-of-integers",
            answers=r"""
# %% the tensor as it is
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1
        elif not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            step.arrived.synchronize()
            engine.update(before, step.token_ids)
""",
        ),
    ),
    right=r"""
# %% one variable in place of a queue
def serve(engine):
    before, count = None, 0
    while True:
        batch = engine.schedule()
        now = (batch, engine.launch(batch)) if batch is not None else None
        count += now is not None
        if before is None and now is None:
            return count
        if before is not None:
            before[1].arrived.synchronize()
            engine.update(before[0], before[1].token_ids.tolist())
        before = now

# %% asks the event before it waits
def serve(engine):
    under_way, count = [], 0
    batch = engine.schedule()
    while batch is not None or under_way:
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        if batch is None or len(under_way) == 2:
            oldest, step = under_way.pop(0)
            if not step.arrived.query():
                step.arrived.synchronize()
            engine.update(oldest, [int(token) for token in step.token_ids])
        batch = engine.schedule()
    return count
""",
)
