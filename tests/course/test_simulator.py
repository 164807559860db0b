"""The course's simulator plans as the engine does, and its clock is that of the recorded steps."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path
from random import Random

import pytest

from minivllm import LLM, SamplingParams
from minivllm.bench import steps as bench_steps
from minivllm.bench.report import recorded
from minivllm.course.sim.simulator import (
    H200,
    STEPS,
    Arrival,
    CostModel,
    azure_chat,
    percentile,
    simulate,
    workload_of,
)
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.scheduler import Scheduler, SchedulerBase, SchedulerStats
from minivllm.engine.sequence import ScheduledBatch, Sequence
from minivllm.engine.trace import Trace
from minivllm.errors import SchedulerStalledError
from support.checkpoints import write_checkpoint


def plan(trace: Trace) -> list[list[tuple[str, int, int]]]:
    return [
        [(i.request_id, i.start, i.num_new_tokens) for i in sorted(s.scheduled, key=str)]
        for s in trace.steps
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("simulator") / "model")


def test_it_plans_as_the_engine_does(model: Path) -> None:
    rng = Random(0)
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "block_size": 4}
    with LLM(
        model,
        device="cpu",
        skip_tokenizer_init=True,
        trace=True,
        num_kv_blocks=16,
        max_model_len=60,
        enable_prefix_caching=False,
        **sizes,
    ) as llm:
        prompts = [[rng.randrange(900) for _ in range(rng.randint(1, 30))] for _ in range(12)]
        params = [SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 20)) for _ in prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        trace, metrics = llm.trace, llm.metrics()
    run = simulate(workload_of(outputs), cost=STEPS, num_blocks=16, **sizes)
    assert metrics.num_preemptions > 0
    assert metrics.num_chunks > 0
    assert plan(run.trace) == plan(trace)
    assert [s.preempted for s in run.trace.steps] == [s.preempted for s in trace.steps]
    assert [s.block_tables for s in run.trace.steps] == [s.block_tables for s in trace.steps]
    assert run.stats == SchedulerStats(**{name: getattr(metrics, name) for name in vars(run.stats)})


# --- the clock ------------------------------------------------------------------------------------


def parts(step: dict) -> list[tuple[float, int]]:
    decodes, prompt, start = step["decodes"], step["prompt_tokens"], step["start"]
    each = (step["context"] - prompt - start) / max(decodes, 1)
    return [(each, 1)] * decodes + [(start, prompt)] * (prompt > 0)


def test_the_cost_model_is_the_record() -> None:
    steps = recorded("steps-h200")["steps"]
    errors = {
        i: H200.seconds(parts(step)) / step["gpu_seconds"] - 1 for i, step in enumerate(steps)
    }
    assert statistics.median(map(abs, errors.values())) < 0.05
    assert all(abs(error) < 0.5 for error in errors.values())
    # What is far off: small chunks, whose programs are too few for the GPU, and small steps of many
    # rows.
    far = [steps[i] for i, error in errors.items() if abs(error) > 0.15]
    assert all(0 < step["prompt_tokens"] <= 256 or step["decodes"] == 256 for step in far)


def test_the_cost_model_by_hand() -> None:
    cost = CostModel("by hand", weights=10.0, token=1.0, key=0.5, pair=0.25)
    assert cost.seconds([]) == 0.0
    assert cost.seconds([(3, 1)]) == 10.0 + max(0.5 * 4, 0.25 * 4)
    assert cost.seconds([(0, 1), (7, 1)]) == 10.0 + 0.5 + 4.0
    assert cost.seconds([(0, 16)]) == 16.0 + 0.25 * 16 * 17 / 2
    assert cost.seconds([(100, 16)]) == 16.0 + 0.25 * (1600 + 136)


# --- what a run says ------------------------------------------------------------------------------


def test_times_of_a_request() -> None:
    run = simulate([Arrival(0, 10, 3), Arrival(5, 4, 2)], cost=STEPS, max_num_batched_tokens=4)
    first, second = run.requests
    assert first.token_times == [3, 4, 5]
    assert (first.ttft, first.gaps, first.latency) == (3, [1, 1], 5)
    assert second.token_times == [6, 7]
    assert (second.first_scheduled, second.ttft) == (5, 1)
    assert run.seconds == 7
    assert run.throughput == 5 / 7
    assert run.gaps == [1, 1, 1]
    assert run.summary()["TTFT worst"] == 3000
    assert (run.lost, run.stalled, run.num_wasted_tokens) == ([], "", 0)


def test_nothing_is_computed_before_it_arrives() -> None:
    run = simulate([Arrival(2.5, 3, 2), Arrival(100, 3, 2)], cost=STEPS)
    assert [record.start_time for record in run.trace.steps] == [2.5, 3.5, 100, 101]
    assert [request.first_scheduled for request in run.requests] == [2.5, 100]


def test_waiting_is_counted_in_steps() -> None:
    run = simulate([Arrival(0, 2, 4)] * 3, cost=STEPS, max_num_seqs=1)
    assert [request.steps_waited for request in run.requests] == [0, 4, 8]


def test_a_scheduler_does_not_know_when_answers_end() -> None:
    seen: list[tuple] = []

    class Curious(Scheduler):
        def add(self, seq: Sequence) -> None:
            seen.append((seq.max_num_tokens - seq.num_prompt_tokens, seq.params.max_tokens))
            super().add(seq)

    for length in (3, 30):
        simulate([Arrival(0, 5, length)], scheduler_cls=Curious)
    assert seen[0] == seen[1]


def test_wasted_tokens_are_those_computed_twice() -> None:
    work = [Arrival(0, 6, 14)] * 4
    run = simulate(
        work, cost=STEPS, max_num_batched_tokens=32, max_num_seqs=4, num_blocks=12, block_size=4
    )
    assert run.stats.num_preemptions == 2
    assert run.stats.num_computed_tokens - run.num_wasted_tokens == 4 * (6 + 13)


def test_without_a_trace_the_rest_is_the_same() -> None:
    runs = [simulate(azure_chat(faster=20)[:30], trace=trace) for trace in (True, False)]
    assert runs[0].summary() == runs[1].summary()
    assert runs[1].trace is None


class Idle(Scheduler):
    def schedule(self) -> ScheduledBatch:
        return ScheduledBatch() if len(self.stats_seen()) > 3 else super().schedule()

    def stats_seen(self) -> range:
        return range(self.stats.num_steps)


def test_a_stall_is_an_error_or_the_end() -> None:
    work = [Arrival(0, 3, 9), Arrival(1, 3, 9)]
    with pytest.raises(
        SchedulerStalledError, match="nothing in it, although 2 requests run and 0 wait"
    ):
        simulate(work, scheduler_cls=Idle, cost=STEPS)
    run = simulate(work, scheduler_cls=Idle, cost=STEPS, raise_on_stall=False)
    assert "nothing in it" in run.stalled
    assert run.lost == [0, 1]
    assert run.requests[0].latency == float("inf")
    assert len(run.trace.steps) == 4


def test_a_scheduler_that_comes_to_no_end_is_stopped() -> None:
    class Sisyphus(Scheduler):
        def schedule(self) -> ScheduledBatch:
            while self.running:  # forgets what has been computed
                self.waiting.appendleft(self.running.pop())
                self.give_up(ScheduledBatch(), self.waiting[0])
            return super().schedule()

    with pytest.raises(SchedulerStalledError, match="more than one token at a time"):
        simulate([Arrival(0, 8, 2)], scheduler_cls=Sisyphus, cost=STEPS, max_num_batched_tokens=4)


def test_the_chat_log() -> None:
    log = azure_chat()
    assert len(log) == 111
    assert [a.time for a in log] == sorted(a.time for a in log)
    assert sum(a.prompt_tokens for a in log) == 110_025
    assert sum(a.output_tokens for a in log) == 32_116
    assert azure_chat(faster=2)[-1].time == log[-1].time / 2


def test_percentiles() -> None:
    assert [percentile([4, 1, 3, 2], p) for p in (0, 25, 26, 50, 99, 100)] == [1, 1, 2, 2, 4, 4]
    assert percentile([7], 50) == 7


# --- the scheduler without decisions --------------------------------------------------------------


class FirstComeFirstServed(SchedulerBase):
    """The least that works: whole requests, one after the other."""

    def schedule(self) -> ScheduledBatch:
        batch = ScheduledBatch()
        if not self.running:
            self.running.append(self.waiting.popleft())
            self.start(batch, self.running[0])
        [seq] = self.running
        count = min(seq.num_uncomputed_tokens, self.max_num_batched_tokens)
        assert self.block_manager.allocate(seq, seq.num_computed_tokens + count)
        self.compute(batch, seq, count)
        return batch


def test_decisions_are_all_that_is_missing() -> None:
    work = [Arrival(i, 5 + i, 4) for i in range(6)]
    one, package = (
        simulate(work, scheduler_cls=cls, cost=STEPS, max_num_seqs=1, max_num_batched_tokens=4)
        for cls in (FirstComeFirstServed, Scheduler)
    )
    assert plan(one.trace) == plan(package.trace)
    assert one.stats == package.stats


def test_the_base_decides_nothing() -> None:
    scheduler = SchedulerBase(BlockManager(4, 4), 2, 8)
    with pytest.raises(TypeError, match="write a `schedule`"):
        scheduler.schedule()


def test_the_base_notices_what_cannot_be() -> None:
    def fresh() -> tuple[SchedulerBase, ScheduledBatch, Sequence]:
        seq = Sequence(0, [1] * 6, SamplingParams())
        scheduler = SchedulerBase(BlockManager(4, 4, False), 1, 8)
        return scheduler, ScheduledBatch(), seq

    scheduler, batch, seq = fresh()
    with pytest.raises(AssertionError, match="was not started"):
        scheduler.compute(batch, seq, 1)
    with pytest.raises(AssertionError, match="was not running"):
        scheduler.give_up(batch, seq)
    scheduler.start(batch, seq)
    with pytest.raises(AssertionError, match="has blocks for 0"):
        scheduler.compute(batch, seq, 4)
    with pytest.raises(AssertionError, match="all 1 places are taken"):
        scheduler.start(batch, seq)
    assert scheduler.block_manager.allocate(seq, 6)
    with pytest.raises(AssertionError, match="7 tokens of 6 uncomputed"):
        scheduler.compute(batch, seq, 7)
    scheduler.compute(batch, seq, 6)
    with pytest.raises(AssertionError, match="twice"):
        scheduler.compute(batch, seq, 1)
    with pytest.raises(AssertionError, match="this step computes"):
        scheduler.give_up(batch, seq)
    scheduler.give_up(ScheduledBatch(), seq)
    assert (seq.slot, seq.block_table, seq.num_computed_tokens) == (None, [], 0)
    assert scheduler.waiting == deque()


# --- the benchmark behind the clock ---------------------------------------------------------------


def test_steps_are_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_steps, "_timed", lambda engine: (bench_steps._wall(engine), 0.001))
    options = {"device": "cpu", "skip_tokenizer_init": True, "enable_prefix_caching": False}
    engine = LLMEngine(max_num_seqs=8, max_num_batched_tokens=300, num_kv_blocks=200, **options)
    for shape, context in (((2, 128, 0, 0), 256), ((0, 0, 64, 128), 192), ((4, 64, 32, 0), 288)):
        found = bench_steps.time_step(engine, *shape, repeats=4)
        assert [found[k] for k in ("decodes", "prompt_tokens", "start")] == [
            shape[0],
            shape[2],
            shape[3],
        ]
        assert context <= found["context"] <= context + 40 * max(1, shape[0])
        assert 0 < found["min"] <= found["seconds"] <= found["max"]
        assert found["gpu_seconds"] == 0.001
        assert not engine.has_unfinished_requests()
    assert engine.scheduler.max_num_batched_tokens == 300
