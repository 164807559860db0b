"""An engine's steps on a calculated clock: CPU and GPU in turns, or the CPU one step ahead.

The real scheduler plans the steps. Which tokens the model samples is given, and so is how long the
CPU and the GPU take, so the result shows one thing only: who waits for whom. Each step notes what
`schedule` knew of the tokens when it was called. Taught in notebooks/05_scheduler.ipynb.

    times = StepTimes(plan=1.5, compute=5.0, update=3.0)
    in_turns = run_steps({"A": [41, 42, END], "B": [71, 72, 73]}, times)
    ahead = run_steps({"A": [41, 42, END], "B": [71, 72, 73]}, times, ahead=True)
"""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minivllm.engine.block_manager import BlockManager
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import PENDING, ScheduledBatch, Sequence
from minivllm.sampling_params import SamplingParams

#: The stop token of all answers.
END = 0
#: The prompt of every request: one token, so that the first step computes as much as the others.
_PROMPT = 1


@dataclass(frozen=True)
class StepTimes:
    """How long the parts of a step take, in any unit.

    plan: the CPU calls `schedule` and starts the GPU. compute: the GPU runs the model and samples.
    update: the CPU calls `update` and passes the tokens on.
    """

    plan: float
    compute: float
    update: float


@dataclass(eq=False)
class OverlapStep:
    """One step: when it was planned, computed and taken in, each as (start, end)."""

    number: int
    planned: tuple[float, float]
    computed: tuple[float, float]
    #: What `schedule` knew: name -> the request's output tokens, PENDING where one has no value.
    known: dict[str, list[int]]
    #: The requests that the step computes.
    names: list[str]
    updated: tuple[float, float] = (0.0, 0.0)
    #: The requests among these that had ended before: the step computed them for nothing.
    wasted: list[str] = field(default_factory=list)


def run_steps(
    answers: Mapping[str, abc.Sequence[int]],
    times: StepTimes,
    *,
    ahead: bool = False,
    scheduler_cls: Callable[..., Any] = Scheduler,
) -> list[OverlapStep]:
    """Serve some requests that arrive together, and return the steps in order.

    answers: name -> the tokens that the model samples for it. An answer that ends in END is ended
    by this stop token; any other ends at its greatest length, which the scheduler knows in advance.
    ahead: plan each step while the one before runs.
    """
    scheduler = scheduler_cls(BlockManager(1024, 16, False), len(answers), 16 * len(answers))
    sequences = {
        name: _sequence(i, name, tokens) for i, (name, tokens) in enumerate(answers.items())
    }
    for seq in sequences.values():
        scheduler.add(seq)
    steps: list[OverlapStep] = []
    in_flight: deque[tuple[ScheduledBatch, OverlapStep]] = deque()
    now = gpu_is_free = 0.0
    # The order is that of `EngineCore.step`.
    while scheduler.has_unfinished or in_flight:
        known = {name: _known(seq) for name, seq in sequences.items()}
        batch = scheduler.schedule()
        if batch:
            planned, now = (now, now + times.plan), now + times.plan
            begin = max(now, gpu_is_free)
            gpu_is_free = begin + times.compute
            names = [item.sequence.request_id for item in batch.items]
            step = OverlapStep(len(steps), planned, (begin, gpu_is_free), known, names)
            steps.append(step)
            in_flight.append((batch, step))
        while len(in_flight) > (1 if ahead and batch else 0):
            batch_done, step = in_flight.popleft()
            begin = max(now, step.computed[1])
            step.updated, now = (begin, begin + times.update), begin + times.update
            _take_in(scheduler, batch_done, step, answers)
    return steps


def _known(seq: Sequence) -> list[int]:
    """The output tokens, without the place of a token that the end of the request made useless."""
    tokens = seq.output_token_ids
    return [token for token in tokens if token != PENDING] if seq.is_finished else tokens


def _take_in(
    scheduler: Any,
    batch: ScheduledBatch,
    step: OverlapStep,
    answers: Mapping[str, abc.Sequence[int]],
) -> None:
    """Give the step's tokens to the scheduler."""
    tokens = []
    for item in batch.sampled:
        seq, answer = item.sequence, answers[item.sequence.request_id]
        assert item.sample_position is not None
        position = item.sample_position - seq.num_prompt_tokens
        # A step that was planned for a request that has ended samples something, too.
        tokens.append([answer[position] if position < len(answer) else END])
    counted = {item.sequence.request_id for item in scheduler.update(batch, tokens)}
    step.wasted = [name for name in step.names if name not in counted]


def _sequence(number: int, name: str, answer: abc.Sequence[int]) -> Sequence:
    stops = bool(answer) and answer[-1] == END
    length = 1 << 20 if stops else 1 + len(answer)
    params, ends = SamplingParams(), frozenset([END])
    return Sequence(number, [_PROMPT], params, ends, length, request_id=name)
