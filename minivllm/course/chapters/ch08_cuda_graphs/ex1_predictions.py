"""08.1: warm-up: predict the clock."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake

if TYPE_CHECKING:
    pass
from minivllm.course.grading.exercise import Exercise, Known


def _measure(kernels: int, us: float, *, graph: bool = False, wait: bool = False) -> float:
    from minivllm.course.sim.streams import SimulatedGPU

    gpu = SimulatedGPU(launch_us=10, replay_us=20)
    recorded = gpu.CUDAGraph()
    with gpu.graph(recorded):
        for _ in range(kernels):
            gpu.launch("kernel", us)
    if graph:
        recorded.replay()
    for _ in range(0 if graph else kernels):
        gpu.launch("kernel", us)
        if wait:
            gpu.synchronize()
    gpu.synchronize()
    return gpu.now


def _measure_steps(ahead: int, steps: int = 10) -> float:
    from minivllm.course.sim.streams import SimulatedGPU

    gpu, events = SimulatedGPU(launch_us=10, replay_us=20), []
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        gpu.launch("step", 1000)
    for step in range(steps + ahead):
        if step < steps:
            gpu.work("plan", 300)
            graph.replay()
            events.append(gpu.Event())
            events[-1].record()
        if step >= ahead:
            events[step - ahead].synchronize()
            gpu.work("look", 200)
    gpu.synchronize()
    return gpu.now


def check_predictions(
    small_eager: float,
    small_graph: float,
    large_eager: float,
    large_waiting: float,
    ten_steps: float,
    ten_steps_ahead: float,
) -> str:
    def judge(
        name: str, guess: Any, right: float, measured: str, known: dict[float, tuple[str, str]]
    ) -> None:
        if isinstance(guess, bool) or not isinstance(guess, int | float):
            raise Mistake(
                "wrong-type",
                f"{name} is {show(guess)}.\nA prediction is one number, of microseconds.",
            )
        if math.isclose(guess, right, rel_tol=5e-4):
            return
        for value, (mistake, why) in known.items():
            if math.isclose(guess, value, rel_tol=5e-4):
                raise Mistake(
                    mistake,
                    f"{name}: you predicted {guess:,g}, measured: {right:,g}.\n{why} {measured}",
                )
        thousand = (
            "\nThat looks like milliseconds."
            if math.isclose(guess * 1000, right, rel_tol=5e-4)
            else ""
        )
        raise Mistake(
            "milliseconds" if thousand else "wrong-prediction",
            f"{name}: you predicted {guess:,g}, measured: {right:,g}"
            f" microseconds.{thousand}\n{measured}",
        )

    added = (
        "launch-and-kernel-added",
        "While a kernel runs, the CPU launches the next: they do not add up.",
    )
    last = "the-end-forgotten", "When the last launch is done, its kernel is still to run."
    first = (
        "the-beginning-forgotten",
        "Before the first kernel can run, it must have been launched.",
    )
    judge(
        "small_eager",
        small_eager,
        _measure(100, 4),
        "The CPU launches for 1000 without a break; then the last kernel runs.",
        {
            1400: added,
            1000: last,
            410: (
                "the-faster-one",
                (
                    "You let the GPU set the pace; here a launch takes longer "
                    "than "
                    "a kernel, so the CPU does."
                ),
            ),
            400: ("launches-forgotten", "That is the kernels alone."),
        },
    )
    judge(
        "small_graph",
        small_graph,
        _measure(100, 4, graph=True),
        "One launch of 20, then the kernels, one behind the other.",
        {
            400: (
                "the-beginning-forgotten",
                "The graph must be launched before its first kernel runs.",
            ),
            20: ("kernels-forgotten", "20 is when the CPU is free again; then the GPU begins."),
            2400: (
                "a-launch-for-each-kernel",
                "A graph is launched once, however many kernels are in it.",
            ),
            24: ("kernels-forgotten", "A graph has all its kernels to run, one after the other."),
            1004: ("no-graph", "That is how long it takes one by one."),
        },
    )
    judge(
        "large_eager",
        large_eager,
        _measure(100, 30),
        "After the first launch the GPU never has to wait for the next.",
        {
            4000: added,
            3000: first,
            1030: (
                "the-faster-one",
                (
                    "You let the CPU set the pace; here a kernel takes longer "
                    "than "
                    "a launch, so the GPU does."
                ),
            ),
            1000: ("kernels-forgotten", "That is the launches alone."),
        },
    )
    judge(
        "large_waiting",
        large_waiting,
        _measure(100, 30, wait=True),
        "Launch, wait, launch, wait: nothing overlaps.",
        {
            3010: ("waiting-is-not-free", "A CPU that waits launches nothing meanwhile."),
            3000: ("waiting-is-not-free", "A CPU that waits launches nothing meanwhile."),
            1000: ("kernels-forgotten", "That is the launches alone."),
        },
    )
    judge(
        "ten_steps",
        ten_steps,
        _measure_steps(0),
        "Plan, launch, compute, look: one after the other, ten times.",
        {
            10_000: (
                "cpu-forgotten",
                "That is the GPU alone. While the CPU plans or looks, the GPU has nothing to do.",
            ),
            15_000: ("launches-forgotten", "Each step's graph must be launched, too."),
            1_520: ("one-step-only", "That is one step; there are ten."),
            10_520: (
                "overlapped-already",
                "That is one step ahead. Here the CPU waits before it goes on.",
            ),
        },
    )
    judge(
        "ten_steps_ahead",
        ten_steps_ahead,
        _measure_steps(1),
        "Only before the first step (plan, launch) and after the last (look) is the GPU idle.",
        {
            15_200: (
                "nothing-overlapped",
                "While the GPU computes step n, the CPU plans n + 1 and looks at n − 1.",
            ),
            10_000: (
                "ends-forgotten",
                "The GPU's ten steps lie side by side, but not from the very beginning to the end.",
            ),
            10_320: ("the-end-forgotten", "Somebody must still look at the last step's tokens."),
            10_200: (
                "the-beginning-forgotten",
                "The first step must be planned and launched before the GPU can begin.",
            ),
            5_200: (
                "the-faster-one",
                "That is the CPU alone; the GPU needs longer, and sets the pace.",
            ),
            11_500: ("one-step-overlapped", "All steps overlap with the CPU's work, not only one."),
        },
    )
    return "six predictions, all as measured"


EXERCISE = Exercise(
    id="08.1",
    title="Warm-up: predict the clock",
    check=check_predictions,
    mistakes=(
        Known(
            "launch-and-kernel-added",
            answers=r"""
# %% launches and kernels one after the other
small_eager = 100 * (10 + 4)
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200

# %% for the large kernels
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 100 * (10 + 30)
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200
""",
        ),
        Known(
            "the-end-forgotten",
            answers=r"""
# %% the last kernel is still to run
small_eager = 100 * 10
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200
""",
        ),
        Known(
            "the-beginning-forgotten",
            answers=r"""
# %% kernels alone
small_eager = 100 * 10 + 4
small_graph = 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200
""",
        ),
        Known(
            "kernels-forgotten",
            answers=r"""
# %% a replay returns at once
small_eager = 100 * 10 + 4
small_graph = 20
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200
""",
        ),
        Known(
            "the-faster-one",
            answers=r"""
# %% the CPU sets the pace, also for large kernels
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 100 * 10 + 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200
""",
        ),
        Known(
            "waiting-is-not-free",
            answers=r"""
# %% as without waiting
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 10 + 100 * 30
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200
""",
        ),
        Known(
            "launches-forgotten",
            answers=r"""
# %% in each step
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200
""",
        ),
        Known(
            "ends-forgotten",
            answers=r"""
# %% the GPU's steps alone
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 10 * 1000
""",
        ),
        Known(
            "nothing-overlapped",
            answers=r"""
# %% one step ahead as without
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 10 * (300 + 20 + 1000 + 200)
""",
        ),
        Known(
            "wrong-prediction",
            answers=r"""
# %% a sum gone wrong
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 9 * 1000 + 200
""",
        ),
    ),
)
