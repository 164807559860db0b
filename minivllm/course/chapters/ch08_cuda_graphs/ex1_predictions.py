"""08.1: warm-up: predict the clock."""

from __future__ import annotations

from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import Prediction, expect_predictions

#: What the statement gives: microseconds of the CPU for a launch, and for a graph's launch.
LAUNCH, REPLAY = 10, 20


def _measure(kernels: int, us: float, *, graph: bool = False, wait: bool = False) -> float:
    """Microseconds until so many kernels have run. wait: for each of them, before the next."""
    from minivllm.course.sim.streams import SimulatedGPU

    gpu = SimulatedGPU(launch_us=LAUNCH, replay_us=REPLAY)
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
    """Microseconds until so many steps are done, each planned, launched and looked at."""
    from minivllm.course.sim.streams import SimulatedGPU

    gpu, events = SimulatedGPU(launch_us=LAUNCH, replay_us=REPLAY), []
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


def _predict(
    name: str, right: float, advice: str, usual: dict[str, tuple[float, str]]
) -> Prediction:
    """A prediction in microseconds. usual: mistake's name -> (the number, why it is wrong)."""
    both = usual | {"milliseconds": (right / 1000, "That looks like milliseconds.")}
    return Prediction(name, right, "microseconds", 5e-4, both, advice)


ADDED = "While a kernel runs, the CPU launches the next one: the two times do not add up."
THE_END = "When the last launch is done, its kernel is still to run."
THE_BEGINNING = "Before the first kernel can run, it must have been launched."


def _small() -> tuple[Prediction, Prediction]:
    """Kernels that are shorter than their launches: one by one, and as a graph."""
    eager = _predict(
        "small_eager",
        _measure(100, 4),
        "A launch takes longer than a kernel. So who waits for whom, and what is left to do when"
        " the CPU has launched everything?",
        {
            "launch-and-kernel-added": (1400, ADDED),
            "the-end-forgotten": (1000, THE_END),
            "the-faster-one": (
                410,
                "You let the GPU set the pace. Here a launch takes longer than a kernel, so the CPU"
                " sets it.",
            ),
            "launches-forgotten": (400, "That is the kernels alone; each must be launched."),
        },
    )
    graph = _predict(
        "small_graph",
        _measure(100, 4, graph=True),
        "The CPU launches once. After that, what does the GPU have to do?",
        {
            "the-beginning-forgotten": (400, THE_BEGINNING),
            "kernels-forgotten": (20, "Then the CPU is free again, and the GPU begins."),
            "one-kernel-only": (24, "A graph has all its kernels to run, one after the other."),
            "a-launch-for-each-kernel": (
                2400,
                "A graph is launched once, however many kernels are in it.",
            ),
            "kernel-launches-counted": (
                410,
                "Launching a graph takes another time than launching a kernel: see the statement.",
            ),
            "launched-twice": (
                1420,
                "The kernels of a graph need no launches of their own.",
            ),
        },
    )
    return eager, graph


def _large() -> tuple[Prediction, Prediction]:
    """Kernels that are longer than their launches: without a wait, and with one for each."""
    eager = _predict(
        "large_eager",
        _measure(100, 30),
        "A kernel takes longer than a launch. So who waits for whom, and when does the first kernel"
        " begin?",
        {
            "launch-and-kernel-added": (4000, ADDED),
            "the-beginning-forgotten": (3000, THE_BEGINNING),
            "the-faster-one": (
                1030,
                "You let the CPU set the pace. Here a kernel takes longer than a launch, so the GPU"
                " sets it.",
            ),
            "kernels-forgotten": (1000, "That is the launches alone."),
        },
    )
    waiting = _predict(
        "large_waiting",
        _measure(100, 30, wait=True),
        "Draw three kernels: launch, kernel, launch, kernel. Does anything overlap?",
        {
            "waiting-is-not-free": (3010, "A CPU that waits launches nothing meanwhile."),
            "launches-forgotten": (3000, "A CPU that waits launches nothing meanwhile."),
            "kernels-forgotten": (1000, "That is the launches alone."),
            "the-end-forgotten": (3970, "Wait for the last kernel, too."),
        },
    )
    return eager, waiting


def _steps() -> tuple[Prediction, Prediction]:
    """Ten steps: one after the other, and one step ahead."""
    waiting = _predict(
        "ten_steps",
        _measure_steps(0),
        "Write down the four things of one step in a row. Does anything overlap?",
        {
            "cpu-forgotten": (
                10_000,
                "That is the GPU alone. While the CPU plans or looks, it has nothing to do.",
            ),
            "launches-forgotten": (15_000, "Each step's graph must be launched, too."),
            "one-step-only": (1_520, "That is one step; there are ten."),
            "overlapped-already": (
                10_520,
                "Here the CPU waits for the step before it goes on, so nothing overlaps.",
            ),
            "looks-forgotten": (13_200, "The CPU looks at the tokens of each step."),
            "plans-forgotten": (12_200, "The CPU plans each step."),
            "kernel-launches-counted": (
                15_100,
                "Launching a graph takes another time than launching a kernel: see the statement.",
            ),
        },
    )
    ahead = _predict(
        "ten_steps_ahead",
        _measure_steps(1),
        "Draw both lanes for three steps. The GPU is idle at the two ends only: what happens then?",
        {
            "nothing-overlapped": (
                15_200,
                "While the GPU computes step n, the CPU plans n + 1 and looks at n − 1.",
            ),
            "ends-forgotten": (
                10_000,
                "The GPU's ten steps lie side by side, but not from the very beginning to the end.",
            ),
            "the-end-forgotten": (10_320, "Somebody must still look at the last step's tokens."),
            "the-beginning-forgotten": (
                10_200,
                "The first step must be planned and launched before the GPU can begin.",
            ),
            "first-launch-forgotten": (10_500, "The first step's graph must be launched, too."),
            "the-faster-one": (
                5_200,
                "That is the CPU alone; the GPU needs longer, and sets the pace.",
            ),
            "launches-added": (
                10_700,
                "The later launches happen while the GPU computes: they do not add up.",
            ),
            "one-step-overlapped": (
                11_500,
                "All steps overlap with the CPU's work, not only one.",
            ),
        },
    )
    return waiting, ahead


def check_predictions(
    small_eager: float,
    small_graph: float,
    large_eager: float,
    large_waiting: float,
    ten_steps: float,
    ten_steps_ahead: float,
) -> str:
    said = (small_eager, small_graph, large_eager, large_waiting, ten_steps, ten_steps_ahead)
    expect_predictions(*zip((*_small(), *_large(), *_steps()), said, strict=True))
    return "six predictions, all as measured"


EXERCISE = Exercise(
    id="08.1",
    title="Warm-up: predict the clock",
    check=check_predictions,
    mistakes=(
        Known(
            "launch-and-kernel-added",
            hint=1,
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
            hint=1,
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
            hint=1,
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
            hint=1,
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
            hint=2,
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
            hint=2,
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
            "one-kernel-only",
            answers=r"""
# %% one kernel of the graph
@@
-small_graph = 20 + 100 * 4
+small_graph = 20 + 4
""",
        ),
        Known(
            "a-launch-for-each-kernel",
            answers=r"""
# %% a launch of the graph per kernel
@@
-small_graph = 20 + 100 * 4
+small_graph = 100 * (20 + 4)
""",
        ),
        Known(
            "kernel-launches-counted",
            answers=r"""
# %% a launch of a kernel for the graph
@@
-small_graph = 20 + 100 * 4
+small_graph = 10 + 100 * 4
""",
        ),
        Known(
            "cpu-forgotten",
            answers=r"""
# %% the GPU alone
@@
-ten_steps = 10 * (300 + 20 + 1000 + 200)
+ten_steps = 10 * 1000
""",
        ),
        Known(
            "overlapped-already",
            answers=r"""
# %% as if one step ahead
@@
-ten_steps = 10 * (300 + 20 + 1000 + 200)
+ten_steps = 300 + 20 + 10 * 1000 + 200
""",
        ),
        Known(
            "launches-added",
            hint=2,
            answers=r"""
# %% every launch adds up
@@
-ten_steps_ahead = 300 + 20 + 10 * 1000 + 200
+ten_steps_ahead = 300 + 10 * (20 + 1000) + 200
""",
        ),
        Known(
            "milliseconds",
            answers=r"""
# %% milliseconds
@@
-small_eager = 100 * 10 + 4
+small_eager = 1.004
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% not a number
@@
-large_eager = 10 + 100 * 30
+large_eager = float("nan")

# %% a range
@@
-large_waiting = 100 * (10 + 30)
+large_waiting = (3000, 5000)
""",
        ),
        Known(
            "wrong-ten-steps-ahead",
            hint=2,
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
        Known(
            "wrong-large-waiting",
            answers=r"""
# %% a sum gone wrong
@@
-large_waiting = 100 * (10 + 30)
+large_waiting = 101 * (10 + 30)
""",
        ),
    ),
)
