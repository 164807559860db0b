"""Ctrl-C, or any error, at every line of engine and LLM, twice in a row: no engine breaks, and
nothing is lost.

A strike is an exception raised by a trace function at the n-th line that runs in the files below:
all that lies between a caller and the model. After it the engine must serve new requests with the
right tokens, give all blocks and slots back, and a stream that was open must go on as if nothing
had been.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minivllm
from minivllm import LLM, SamplingParams
from minivllm.errors import ConcurrentUseError
from minivllm.sampling_params import RequestOutputKind
from support.checkpoints import TINY, write_checkpoint

pytestmark = pytest.mark.slow

PACKAGE = Path(minivllm.__file__).parent
NAMES = (
    "scheduler",
    "block_manager",
    "sequence",
    "engine_core",
    "output_processor",
    "llm_engine",
    "model_runner",
    "speculation",
    "draft_model",
)
STRUCK = {str(PACKAGE / "llm.py"), *(str(PACKAGE / "engine" / f"{name}.py") for name in NAMES)}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
#: A small pool and budget: chunks, preemptions, prefix hits and waiting are met within few steps.
TIGHT = {"num_kv_blocks": 7, "block_size": 4, "max_num_seqs": 3, "max_num_batched_tokens": 8}
#: How often every line is struck; MINIVLLM_STRIKES=20 for more.
ROUNDS = int(os.environ.get("MINIVLLM_STRIKES", 1))
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 11, 12], [7, 8], [9, 10, 11]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cut"), **TINY)


def make(path: Path, **options: Any) -> LLM:
    return LLM(path, device="cpu", skip_tokenizer_init=True, **{**TIGHT, **options})


class Strikes:
    """Raises at the lines of these numbers, counted from the beginning of the block; counts on
    where none is left.
    """

    def __init__(self, *at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at: set[int] | None = set(at)
        self.error, self.count, self.places = error, 0, []

    def __enter__(self) -> Strikes:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.settrace(None)

    def _call(self, frame: Any, event: str, _: Any) -> Callable | None:
        return self._line if frame.f_code.co_filename in STRUCK else None

    def _line(self, frame: Any, event: str, _: Any) -> Callable:
        if event == "line":
            self.count += 1
            if self.at is None or self.count in self.at:
                self.places.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if self.at is not None and self.count in self.at:
                sys.setprofile(self._go_on)
                raise self.error
        return self._line

    def _go_on(self, *_: object) -> None:
        """Python stops tracing when a trace function raises. Begin again as soon as a frame ends or
        begins: in what cleans up after the strike.
        """
        sys.setprofile(None)
        sys.settrace(self._call)


def in_a_thread(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a thread of its own.

    An exception that a trace function raises in the middle of Python's own clean-up can leave
    traces in the thread: the next error of another test would have it as its context.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        errors: list[BaseException] = []

        def body() -> None:
            try:
                test(*args, **kwargs)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    return run


def lines_of(action: Callable[[], Any]) -> list[tuple[str, int]]:
    """(file, line) of each line that runs; strike number n is the n-th of them, from 1 on."""
    strikes = Strikes()
    strikes.at = None
    with strikes:
        action()
    return strikes.places


def one_each(lines: list[tuple[str, int]], seed: int) -> list[int]:
    """For every line of code one of the times that it runs, in order."""
    times: dict[tuple[str, int], list[int]] = {}
    for number, line in enumerate(lines, 1):
        times.setdefault(line, []).append(number)
    rng = random.Random(seed)
    return sorted(rng.choice(numbers) for numbers in times.values())


def ids(outputs: list) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def generate(llm: LLM, prompts: list = PROMPTS, params: SamplingParams = GREEDY) -> list:
    return llm.generate(prompts, params, use_tqdm=False)


def assert_whole(llm: LLM, expected: list[list[int]], where: Any) -> None:
    """It serves, twice, and then nothing is left."""
    for _ in range(2):
        assert ids(generate(llm)) == expected, where
    engine = llm.llm_engine
    assert not engine.has_unfinished_requests(), where
    assert engine.processor.requests == engine.core._sequences == {}, where
    engine.scheduler.check()
    assert len(engine.scheduler.free_slots) == TIGHT["max_num_seqs"], where
    assert engine.metrics().num_used_kv_blocks == 0, where


@in_a_thread
def test_strikes_strike_again() -> None:
    """Also while the code is on its way out after the first one."""

    def leave() -> None:
        for _ in range(3):
            pass

    class Everywhere(Strikes):
        def _call(self, frame: Any, event: str, _: Any) -> Callable:
            return self._line

    with Everywhere(2, 4) as strikes:
        found = []
        for _ in range(2):
            try:
                leave()
            except KeyboardInterrupt:
                found.append(strikes.count)
    assert found == [2, 4]


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "one-step-late"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@in_a_thread
def test_at_every_line_of_generate(path: Path, late: bool, error: type[BaseException]) -> None:
    """Each line once, and a second strike soon after it: in what cleans up after the first."""
    expected = ids(generate(make(path)))
    llm = make(path, async_scheduling=late)
    generate(llm)
    found = llm.metrics()
    assert (
        min(found.num_preemptions, found.num_chunks, found.num_mixed_steps, found.prefix_cache_hits)
        > 0
    )
    params = [GREEDY, SamplingParams(**{**vars(GREEDY), "n": 2, "logprobs": 1}), GREEDY, GREEDY]
    lines = lines_of(lambda: generate(llm, params=params))
    assert len(set(lines)) > 250
    rng = random.Random(0)
    places = [n for seed in range(ROUNDS) for n in one_each(lines, seed)]
    for place in places if error is KeyboardInterrupt else places[::4]:
        with (
            Strikes(
                place, place + rng.choice([1, 2, 3, 5, 9, 20, 60, 200]), error=error
            ) as strikes,
            contextlib.suppress(error),
        ):
            generate(llm, params=params)
        made = llm.metrics().num_generated_tokens
        assert ids(generate(llm, PROMPTS[2:3])) == expected[2:3], strikes.places
        # Nobody waits for the requests that were cut short, so nothing is computed for them any
        # more.
        assert llm.metrics().num_generated_tokens - made == GREEDY.max_tokens, strikes.places
        if place % 20 == 0:
            assert_whole(llm, expected, strikes.places)
    assert_whole(llm, expected, "at the end")


@in_a_thread
def test_at_every_line_of_speculation(path: Path) -> None:
    """Strikes where proposals are made and verified, in the draft's own runner, too."""
    draft = {"model": str(path), "num_speculative_tokens": 3}
    expected = ids(generate(make(path)))
    llm = make(path, speculative_config=draft)
    lines = lines_of(lambda: generate(llm))
    assert llm.metrics().num_accepted_tokens > 10
    new = {"speculation.py", "draft_model.py"}
    assert {name for name, _ in lines} >= new
    places = [n for n in one_each(lines, 1) if lines[n - 1][0] in new]
    # Also in steps that verify, and in what the draft's runner and block manager do.
    places += random.Random(1).sample(range(len(lines)), 30)
    rng = random.Random(0)
    for place in sorted(places):
        with (
            Strikes(place, place + rng.choice([1, 3, 9, 60, 200])) as strikes,
            contextlib.suppress(KeyboardInterrupt),
        ):
            generate(llm)
        assert ids(generate(llm, PROMPTS[2:3])) == expected[2:3], strikes.places
        if place % 9 == 0:
            assert_whole(llm, expected, strikes.places)
    assert_whole(llm, expected, "at the end")


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "one-step-late"])
@in_a_thread
def test_an_open_stream_goes_on_as_if_nothing_had_been(path: Path, late: bool) -> None:
    long = SamplingParams(
        temperature=0.8, seed=3, max_tokens=18, ignore_eos=True, logprobs=1, presence_penalty=0.5
    )
    llm = make(path, async_scheduling=late)
    [expected] = generate(llm, PROMPTS[:1], long)
    lines = lines_of(lambda: generate(llm))
    for place in one_each(lines, 1)[:: 1 if ROUNDS > 1 else 5]:
        stream = llm.stream(PROMPTS[0], long)
        parts = [next(stream), next(stream)]
        with Strikes(place, place + 7) as strikes, contextlib.suppress(KeyboardInterrupt):
            generate(llm)
        parts += list(stream)
        assert [t for part in parts for t in part.token_ids] == expected.outputs[0].token_ids, (
            strikes.places
        )
        assert parts[-1].finish_reason == "length", strikes.places


@in_a_thread
def test_a_stream_that_is_struck_is_over_and_forgotten(path: Path) -> None:
    expected = ids(generate(make(path)))
    llm = make(path)
    kept: list[BaseException] = []  # a notebook keeps the last traceback, and with it the frames

    def read() -> None:
        for _ in llm.stream(PROMPTS, GREEDY):
            pass

    for place in one_each(lines_of(read), 2)[:: 1 if ROUNDS > 1 else 4]:
        with Strikes(place, place + 4) as strikes:
            try:
                read()
            except KeyboardInterrupt as error:
                kept.append(error)
        made = llm.metrics().num_generated_tokens
        assert ids(generate(llm, PROMPTS[2:3])) == expected[2:3], strikes.places
        assert llm.metrics().num_generated_tokens - made == GREEDY.max_tokens, strikes.places
    assert_whole(llm, expected, "at the end")


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@in_a_thread
def test_a_loop_of_ones_own_gets_every_token(path: Path, kind: RequestOutputKind) -> None:
    """The engine is driven by hand and struck again and again; whoever goes on stepping gets all,
    once.
    """
    expected = ids(generate(make(path)))
    params = SamplingParams(**{**vars(GREEDY), "output_kind": kind})
    for place in range(1, 400, 3 if ROUNDS > 1 else 40):
        engine = make(path).llm_engine
        found: dict[str, list[int]] = {}
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(prompt, params, request_id=str(number))
        strikes = Strikes(*range(place, 6000, 401))
        with strikes:
            unfinished = True
            while unfinished:
                with contextlib.suppress(KeyboardInterrupt):
                    engine.advance()
                    # Not has_unfinished_requests: outputs that nobody collects are news for ever.
                    unfinished = engine.get_num_unfinished_requests() > 0
        for output in engine.collect(engine.collector):
            found[output.request_id] = output.outputs[0].token_ids
        assert [found[str(i)] for i in range(len(PROMPTS))] == expected, strikes.places
        engine.scheduler.check()


@in_a_thread
def test_an_abort_that_is_cut_short_is_carried_out(path: Path) -> None:
    llm = make(path)
    engine = llm.llm_engine
    params = SamplingParams(**{**vars(GREEDY), "n": 2, "max_tokens": 20})

    def abort() -> None:
        engine.abort_request(request_id)

    request_id = engine.add_request(PROMPTS[0], params)
    lines = len(lines_of(abort))
    engine.step()
    for place in range(1, lines + 1):
        request_id = engine.add_request(PROMPTS[0], params)
        engine.step()
        with Strikes(place), contextlib.suppress(KeyboardInterrupt):
            abort()
        abort()
        outputs = engine.step()
        assert [c.finish_reason for o in outputs for c in o.outputs] == ["abort", "abort"], place
        assert not engine.has_unfinished_requests()
    engine.scheduler.check()
    assert llm.metrics().num_used_kv_blocks == 0


@in_a_thread
def test_add_request_is_all_or_nothing(path: Path) -> None:
    llm = make(path)
    engine = llm.llm_engine
    params = SamplingParams(**{**vars(GREEDY), "n": 3})
    lines = len(lines_of(lambda: engine.add_request(PROMPTS[0], params, "counted")))
    engine.abort_request("counted")
    engine.step()
    for place in range(1, lines + 1):
        with Strikes(place), contextlib.suppress(KeyboardInterrupt):
            engine.add_request(PROMPTS[0], params, f"struck {place}")
        outputs = {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
        assert [len(o.outputs) for o in outputs.values()] in ([], [3]), place
        assert all(o.finished for o in outputs.values())
    engine.scheduler.check()


def interrupts(count: int) -> Iterator[threading.Thread]:
    """Ctrl-C from another thread after a random while, as a person presses it."""
    import _thread

    rng = random.Random(1)
    for _ in range(count):
        thread = threading.Timer(rng.uniform(0.0, 0.02), _thread.interrupt_main)
        thread.start()
        yield thread


def test_timed_interrupts(path: Path) -> None:
    """MINIVLLM_INTERRUPTS=1000 for more."""
    expected = ids(generate(make(path)))
    llm = make(path)
    num_struck, is_armed = 0, False

    def strike(*_: object) -> None:
        if is_armed:  # anywhere else it would end the test, or the process that runs it
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, strike)
    try:
        for thread in interrupts(int(os.environ.get("MINIVLLM_INTERRUPTS", 60))):
            try:
                is_armed = True
                while thread.is_alive():
                    generate(llm)
                is_armed = False
            except KeyboardInterrupt:
                is_armed = False
                num_struck += 1
            thread.join()
            assert ids(generate(llm)) == expected
    finally:
        signal.signal(signal.SIGINT, before)
    assert num_struck > 10
    assert_whole(llm, expected, "at the end")


# --- one thread at a time -------------------------------------------------------------------------


def in_another_thread(action: Callable[[], Any]) -> Any:
    """What it returns, or the error that it raises."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(action())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def test_a_second_thread_is_refused_while_the_first_is_at_work(path: Path) -> None:
    llm = make(path)
    expected = ids(generate(llm))
    refused: list[Any] = []
    execute = llm.llm_engine.model_runner.execute

    def watched(batch: Any) -> Any:
        engine = llm.llm_engine
        actions = [lambda: generate(llm), engine.step, lambda: llm.abort("0")]
        actions.append(lambda: engine.add_request([1]))
        refused.extend(in_another_thread(action) for action in actions)
        return execute(batch)

    llm.llm_engine.model_runner.execute = watched
    assert ids(generate(llm)) == expected
    assert len(refused) > 8
    assert {type(error) for error in refused} == {ConcurrentUseError}
    assert "Lock" in str(refused[0])


def test_an_open_stream_keeps_other_threads_out_until_it_ends(path: Path) -> None:
    llm = make(path)
    expected = ids(generate(llm))
    stream = llm.stream(PROMPTS[0], GREEDY)
    parts = [next(stream)]
    assert isinstance(in_another_thread(lambda: generate(llm)), ConcurrentUseError)
    parts += list(stream)
    assert [t for part in parts for t in part.token_ids] == expected[0]
    assert ids(in_another_thread(lambda: generate(llm))) == expected


def test_a_stream_of_a_thread_that_is_gone_locks_nobody_out(path: Path) -> None:
    llm = make(path)
    expected = ids(generate(llm))
    kept = []

    def begin() -> None:
        kept.append(llm.stream(PROMPTS[0], GREEDY))
        next(kept[0])

    in_another_thread(begin)
    assert ids(generate(llm)) == expected
