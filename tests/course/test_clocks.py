"""The machine with a calculated clock behaves as it says, and so does the engine's clock."""

from __future__ import annotations

import pytest

from minivllm import LLM, SamplingParams
from minivllm.course.sim.clocks import EngineClock, SimulatedMachine

US = 1e-6


def once(machine: SimulatedMachine, task) -> float:
    machine.synchronize()
    start = machine.clock()
    task()
    machine.synchronize()
    return machine.clock() - start


def test_calls_return_before_the_work_is_done() -> None:
    machine = SimulatedMachine(launch=5 * US)
    task = machine.task("task", 100 * US)
    task()
    assert machine.now == pytest.approx(5 * US)
    task()
    machine.synchronize()
    assert machine.now == pytest.approx(205 * US), "the second waits for the first"
    assert [kind for kind, _ in machine.log] == ["call", "call", "synchronize"]


def test_the_first_call_of_each_task_is_cold() -> None:
    machine = SimulatedMachine()
    one, other = machine.task("one", 10 * US, cold=0.5), machine.task("other", 10 * US, cold=0.2)
    assert [round(once(machine, task), 3) for task in (one, one, other, other)] == [
        0.5,
        0.0,
        0.2,
        0.0,
    ]


def test_it_slows_down_as_it_gets_warm_and_no_further() -> None:
    machine = SimulatedMachine(heat=0.5, warmth=0.01)
    task = machine.task("task", 100 * US)
    times = [once(machine, task) for _ in range(1500)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(105 * US)
    assert times[-1] == pytest.approx(155 * US, rel=1e-3)
    assert machine.speed == pytest.approx(1 / 1.5, rel=1e-3)


def test_disturbances_come_as_often_as_asked_for_and_from_the_seed() -> None:
    def times(seed: int) -> list[float]:
        machine = SimulatedMachine(seed=seed, disturbed=0.2, boosted=0.1)
        task = machine.task("task", 100 * US)
        return [round(once(machine, task) / US) for _ in range(1000)]

    found = times(1)
    assert found == times(1) != times(2)
    assert 150 < sum(us > 200 for us in found) < 250
    assert 60 < sum(us < 100 for us in found) < 140
    assert sum(us == 105 for us in found) > 600


def test_what_else_is_called_changes_no_drawn_time() -> None:
    alone, shared = (SimulatedMachine(noise=0.1, disturbed=0.2) for _ in range(2))
    first, second, other = alone.task("a", US), shared.task("a", US), shared.task("b", US)
    for _ in range(20):
        other()
        assert once(alone, first) == pytest.approx(once(shared, second), abs=1e-12)


def test_the_engine_s_clock_goes_on_with_its_steps() -> None:
    timer = EngineClock(step=1.0, token=0.01, cold=5.0, pace=(1.0, 3.0))
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with LLM(device="cpu", build_batch=timer.build_batch, num_kv_blocks=64) as llm:
        start = timer.clock()
        llm.generate([[5] * 10], params, use_tqdm=False)
        assert timer.clock() - start == pytest.approx(5.0 + 3 * 1.0 + 0.01 * 12), (
            "a cold step, 10 + 1 + 1 tokens"
        )
        start = timer.clock()
        llm.generate([[7] * 10], params, use_tqdm=False)
        assert timer.clock() - start == pytest.approx(3 * (3 * 1.0 + 0.01 * 12)), (
            "the second stretch is slower"
        )
        assert timer.num_tokens == 24
