"""12.3: an async engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch12_serving.common import PATIENCE, WatchingLoop, output_of
from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.course.grading.with_engine import PROMPTS
from minivllm.course.sim.clients import run_in_thread
from minivllm.errors import EngineEndedError

if TYPE_CHECKING:
    from minivllm.outputs import RequestOutput
    from minivllm.sampling_params import SamplingParams


class _Engine:
    """An engine with `LLMEngine`'s names: one word per step for each request, and eyes open.

    gated: a step waits until the check lets it go on. fails_at: the step that raises.
    """

    def __init__(self, *, gated: bool = False, fails_at: int = 0) -> None:
        self.loop_thread = 0
        self.threads: set[threading.Thread] = set()
        #: Mistake's name -> what was seen.
        self.faults: dict[str, str] = {}
        #: How many requests each step served.
        self.batches: list[int] = []
        self.num_calls = 0
        #: Whether a step is waiting at the gate.
        self.at_gate = threading.Event()
        self._gate = threading.Semaphore(0)
        self._is_open, self._fails_at = not gated, fails_at
        self._inside = threading.Lock()
        self._stepped = threading.Condition()
        self._running: dict[str, tuple[list[str], int]] = {}
        self._number = 0

    # What the answer calls.

    def add_request(self, prompt: str, params: SamplingParams) -> str:
        with self._entered("add_request"):
            if prompt == "refused":
                raise ValueError("this prompt is too long")
            self._number += 1
            request_id = f"{prompt}-{self._number * 37 % 10_007}"
            self._running[request_id] = [], int(params.max_tokens or 1)
            return request_id

    def has_unfinished_requests(self) -> bool:
        with self._entered("has_unfinished_requests"):
            return bool(self._running)

    def step(self) -> list[RequestOutput]:
        with self._entered("step"):
            if not self._running:
                self.faults.setdefault("idle-step", "Your thread called `step` with no request.")
            self.batches.append(len(self._running))
            self._pass_gate()
            if len(self.batches) == self._fails_at:
                # Of the kind that `add_request` raises, too.
                raise ValueError(f"step {self._fails_at} has failed")
            return list(self._write())

    def _write(self) -> Iterator[RequestOutput]:
        running = list(self._running.items())
        # An engine's outputs come in its own order, not in that of the requests.
        for request_id, (words, count) in reversed(running):
            words.append(_word(request_id.partition("-")[0], len(words)))
            if len(words) == count:
                del self._running[request_id]
            yield output_of(request_id, list(words), "length" if len(words) == count else None)
        with self._stepped:
            self._stepped.notify_all()

    def _pass_gate(self) -> None:
        if self._is_open:
            return
        self.at_gate.set()
        if not self._gate.acquire(timeout=PATIENCE):
            self.faults.setdefault(
                "loop-waits", f"A step took {PATIENCE:g} seconds, and the event loop stood still."
            )
            self._is_open = True

    @contextlib.contextmanager
    def _entered(self, method: str) -> Iterator[None]:
        self.num_calls += 1
        self.threads.add(threading.current_thread())
        if threading.get_ident() == self.loop_thread:
            self.faults.setdefault(
                "in-the-event-loop", f"`{method}` was called in the event loop's thread."
            )
        if not self._inside.acquire(blocking=False):
            self.faults.setdefault(
                "two-at-a-time", f"`{method}` was called while another method was running."
            )
            raise RuntimeError("another thread is using this engine")
        try:
            yield
        finally:
            self._inside.release()

    def close(self) -> None:
        self.faults.setdefault("closes-the-engine", "Your class called `engine.close()`.")

    # What the check calls.

    def let_one_go(self) -> None:
        """Let the step at the gate go on, and stop the next one."""
        self.at_gate.clear()
        self._gate.release()

    def open(self) -> None:
        """Let this step and all others go on."""
        self._is_open = True
        self._gate.release()

    def waits_for_steps(self, count: int) -> bool:
        """Wait, with the thread that calls this, until so many steps have ended."""
        with self._stepped:
            return self._stepped.wait_for(lambda: len(self.batches) >= count, PATIENCE)

    @property
    def is_left(self) -> bool:
        """Whether all threads that have called it have ended."""
        return bool(self.threads) and not any(thread.is_alive() for thread in self.threads)


def _word(prompt: str, number: int) -> str:
    """The word of a step. With "b", the first one is empty: a token that gives no text yet."""
    return "" if prompt[0] == "b" and not number else f"{prompt}{number}"


class _Stage:
    """The answer and its engine in an event loop, for one scenario."""

    def __init__(self, mine: Any, engine: _Engine, loop: WatchingLoop) -> None:
        self.mine, self.engine, self.loop = mine, engine, loop

    def read(self, prompt: str, count: int) -> asyncio.Task[list[tuple[str, bool]]]:
        """Read the outputs of one request: (text, whether it has finished)."""
        from minivllm.sampling_params import SamplingParams

        async def read() -> list[tuple[str, bool]]:
            outputs = self.mine.generate(prompt, SamplingParams(max_tokens=count))
            return [(o.outputs[0].text, o.finished) async for o in outputs]

        return asyncio.get_running_loop().create_task(read())

    async def at_gate(self) -> None:
        """Wait until a step stands at the gate."""
        await self.until(self.engine.at_gate.is_set, "never-stepped", "No step was run.")

    async def until(self, condition: Callable[[], bool], name: str, message: str) -> None:
        end, left_at = time.monotonic() + PATIENCE, 0.0
        while not condition():
            now = time.monotonic()
            left_at = (left_at or now) if self.engine.is_left else 0.0
            # A thread that has ended will not call anything any more.
            if now > end or (left_at and now > left_at + 1.5):
                raise EXERCISE.mistake(name, message)
            await asyncio.sleep(0.002)

    async def result(self, task: Awaitable[Any], name: str, message: str) -> Any:
        """What the task returns, or the exception that it raises."""
        task = asyncio.ensure_future(task)
        await self.until(task.done, name, message)
        if task.cancelled():
            return asyncio.CancelledError()
        return task.exception() or task.result()

    async def turns(self, count: int = 8) -> None:
        for _ in range(count):
            await asyncio.sleep(0)


Scenario = Callable[[_Stage], Awaitable[None]]


def _play(answer: Callable, scenario: Scenario, engine: _Engine) -> None:
    """Run a scenario in an event loop of its own, and raise what was seen meanwhile."""
    died: list[BaseException | None] = []

    async def main() -> None:
        engine.loop_thread = threading.get_ident()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, WatchingLoop)
        stage = _Stage(answer(engine), engine, loop)
        await scenario(stage)
        engine.open()
        closed = stage.result(stage.mine.close(), "close-hangs", "`await close()` does not return.")
        expect_returned(await closed)
        expect(
            not loop.num_foreign,
            "not-threadsafe",
            _NOT_THREADSAFE,
        )

    hook = threading.excepthook
    threading.excepthook = lambda args: died.append(args.exc_value)
    try:
        run_in_thread(main, WatchingLoop, timeout=6 * PATIENCE)
    except Exception as error:
        engine.open()
        _raise_fault(engine)
        if isinstance(error, TimeoutError):
            raise EXERCISE.mistake("loop-waits", "The event loop stood still.") from error
        if died and isinstance(error, Mistake):
            seen = f"Your thread ended with {type(died[0]).__name__}: {died[0]}"
            raise Mistake(error.name, f"{seen}\n{error.message}") from died[0]
        raise
    finally:
        threading.excepthook = hook
    _raise_fault(engine)


_NOT_THREADSAFE = (
    "Your thread wakes a task of the event loop directly, by a queue, an event or a future.\nThese"
    " belong to the loop's thread: called from another one, they do not wake a loop that sleeps,"
    " and may break it. Send it over: `loop.call_soon_threadsafe(function, argument)`."
)


def expect_returned(result: Any) -> None:
    if isinstance(result, BaseException):
        raise result


def _raise_fault(engine: _Engine) -> None:
    order = ("in-the-event-loop", "two-at-a-time", "loop-waits", "idle-step", "closes-the-engine")
    for name in order:
        if name in engine.faults:
            raise EXERCISE.mistake(name, engine.faults[name])


def _right(prompt: str, count: int) -> list[tuple[str, bool]]:
    words = [_word(prompt, i) for i in range(count)]
    return [(" ".join(words[: i + 1]), i + 1 == count) for i in range(count)]


def _expect_outputs(got: Any, prompt: str, count: int) -> None:
    """got: the outputs that were read, or an exception."""
    if isinstance(got, Exception):
        raise got
    right = _right(prompt, count)
    if got == right:
        return
    seen = f"A request for {count} words of {prompt!r} yielded {show([t for t, _ in got])}."
    own = [pair for pair in got if pair in right]
    expect(len(own) == len(got), "mixed-up", f"{seen}\n{_message('mixed-up')}")
    expect(
        right[-1] in got,
        "last-output-lost",
        f"{seen}\nThe last output, with `finished`, is missing. Yield it, and end then.",
    )
    expect(
        own == sorted(own, key=right.index) and len(set(own)) == len(own),
        "wrong-order",
        f"{seen}\nThe outputs come in the order of the steps, each once.",
    )
    raise Mistake("outputs-left-out", f"{seen}\n{_message('outputs-left-out')}")


def _message(name: str) -> str:
    return next(known.message for known in EXERCISE.mistakes if known.name == name)


_WAITING = "It waits, and nothing comes any more."


# --- scenarios ------------------------------------------------------------------------------------


async def _alone(stage: _Stage) -> None:
    """One request; its reader sleeps while the first step runs."""
    reader = stage.read("fox", 3)
    await stage.at_gate()
    before = stage.loop.num_turns
    await asyncio.sleep(0.2)
    turns = stage.loop.num_turns - before
    expect(
        turns <= 12,
        "polls",
        f"While a reader waited for a step, the event loop woke up {turns} times in 0.2 seconds."
        "\nYour code asks again and again whether there is news. With hundreds of readers the loop"
        " does nothing else: await something that the thread wakes.",
    )
    stage.engine.open()
    got = await stage.result(reader, "caller-left-waiting", f"One request of 3 words. {_WAITING}")
    if stage.loop.num_foreign:
        raise Mistake("not-threadsafe", _NOT_THREADSAFE)
    _expect_outputs(got, "fox", 3)


async def _free_loop(stage: _Stage) -> None:
    """Many requests come while a step of the first one runs."""
    first = stage.read("fox", 4)
    await stage.at_gate()
    second = stage.read("owl", 3)
    crowd = [stage.read("crow", 1) for _ in range(300)]
    await stage.turns()
    stage.engine.open()
    said = "300 requests came during a step of the first one."
    for reader, prompt, count in ((first, "fox", 4), (second, "owl", 3)):
        got = await stage.result(reader, "caller-left-waiting", f"{said} {_WAITING}")
        _expect_outputs(got, prompt, count)
    for reader in crowd:
        got = await stage.result(reader, "caller-left-waiting", f"{said} {_WAITING}")
        _expect_outputs(got, "crow", 1)
    served = stage.engine.batches
    if max(served) < 2:
        raise EXERCISE.mistake("one-at-a-time", f"{said} The steps served {show(served)} requests.")
    if served[1] != 302:
        seen = f"{said} Then another one, and the next step served {served[1]}."
        raise EXERCISE.mistake("not-in-the-next-step", seen)


async def _free_steps(stage: _Stage) -> None:
    """The event loop is busy with something else for six steps."""
    reader = stage.read("fox", 6)
    await stage.at_gate()
    stage.engine.open()
    if not stage.engine.waits_for_steps(6):
        raise EXERCISE.mistake("step-waits", "The event loop was busy, and no step was run.")
    got = await stage.result(reader, "caller-left-waiting", f"The event loop was busy. {_WAITING}")
    _expect_outputs(got, "fox", 6)


async def _many(stage: _Stage) -> None:
    rng, readers = Random(3), []
    for number in range(40):
        count = rng.choice((1, 1, 2, 5, 9))
        # Some ask for the same.
        prompt = f"{rng.choice('abcdef')}{number % 3}"
        readers.append((stage.read(prompt, count), prompt, count))
        if number % 4 == 3:
            await stage.turns(rng.randint(0, 3))
    for reader, prompt, count in readers:
        got = await stage.result(reader, "caller-left-waiting", f"40 requests. {_WAITING}")
        _expect_outputs(got, prompt, count)


async def _refused(stage: _Stage) -> None:
    """The engine refuses a request: while others run, and alone."""
    said = "`add_request` raised a ValueError for one request"
    first = stage.read("fox", 4)
    await stage.at_gate()
    refused, third = stage.read("refused", 3), stage.read("owl", 2)
    await stage.turns()
    stage.engine.open()
    for reader, prompt, count in ((first, "fox", 4), (third, "owl", 2)):
        got = await stage.result(reader, "harms-others", f"{said}, and another one waits for ever.")
        if isinstance(got, Exception):
            seen = f"{said}, and another one got {type(got).__name__}: {got}."
            raise EXERCISE.mistake("harms-others", seen)
        _expect_outputs(got, prompt, count)
    _expect_refused(await stage.result(refused, "refusal-lost", f"{said}. {_WAITING}"))
    alone = stage.read("refused", 2)
    _expect_refused(await stage.result(alone, "refusal-lost", f"{said}. {_WAITING}"))
    last = stage.read("ram", 2)
    got = await stage.result(last, "harms-others", f"{said}, and a later one waits for ever.")
    _expect_outputs(got, "ram", 2)


def _expect_refused(got: Any) -> None:
    if not isinstance(got, ValueError) or "too long" not in str(got):
        seen = (
            f"`add_request` raised ValueError('this prompt is too long'); its caller got {got!r}."
        )
        raise EXERCISE.mistake("refusal-lost", seen)


async def _fails(stage: _Stage) -> None:
    """The second step raises."""
    readers = [stage.read("fox", 5), stage.read("owl", 5)]
    await stage.at_gate()
    stage.engine.let_one_go()
    await stage.at_gate()
    # It comes while the step runs that fails.
    readers.append(stage.read("ram", 2))
    await stage.turns()
    stage.engine.open()
    for reader in readers:
        seen = "The second step raised a ValueError, and a caller waits for ever."
        _expect_failure(await stage.result(reader, "failure-hidden", seen), "one that waited")
    later = stage.read("ram", 2)
    seen = "A step has failed. A request that comes afterwards waits for ever."
    _expect_failure(await stage.result(later, "serves-after-failure", seen), "a later one")
    expect(
        len(stage.engine.batches) == 2,
        "serves-after-failure",
        "A step has failed, and your thread called `step` again.\nNobody knows in which state the"
        " engine is then: end the thread, and give all callers the error.",
    )


def _fails_at_line(number: int, seen: list[int]) -> Scenario:
    """The step fails, and the thread ends, when `generate` has run so many lines.

    seen: gets the number of lines that a call runs before it waits.
    """

    async def scenario(stage: _Stage) -> None:
        first = stage.read("fox", 5)
        await stage.at_gate()
        file, count = type(stage.mine).generate.__code__.co_filename, 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename != file:
                return None
            count += event == "line"
            if event == "line" and count == number:
                stage.engine.open()
                for thread in stage.engine.threads:
                    thread.join(0.5)
            return trace

        before = sys.gettrace()
        second = stage.read("ram", 2)
        sys.settrace(trace)
        try:
            await stage.turns(1)
        finally:
            sys.settrace(before)
        seen.append(count)
        stage.engine.open()
        said = (
            "A step raised just when a caller put in its request, and this caller waits for ever."
        )
        for reader in (first, second):
            _expect_failure(await stage.result(reader, "failure-hidden", said), "one that waited")

    return scenario


def _expect_failure(got: Any, who: str) -> None:
    if isinstance(got, ValueError) and "has failed" in str(got):
        return
    seen = f"A step raised ValueError('step … has failed'). Of the callers {who} got"
    seen += f" {got!r}." if isinstance(got, Exception) else f" {len(got)} outputs, and an end."
    raise EXERCISE.mistake(
        "failure-hidden" if who == "one that waited" else "serves-after-failure", seen
    )


async def _closes(stage: _Stage) -> None:
    """Closed during a step, with two readers."""
    readers = [stage.read("fox", 400), stage.read("owl", 500)]
    await stage.at_gate()
    # It waits in front of the order to end.
    readers.append(stage.read("ape", 2))
    await stage.turns()
    closing = asyncio.get_running_loop().create_task(stage.mine.close())
    await asyncio.sleep(0.05)
    # It comes while the thread is about to end.
    readers.append(stage.read("ram", 2))
    await stage.turns()
    if closing.done() and not closing.exception():
        seen = "`await close()` returned while a step was running."
        raise EXERCISE.mistake("close-does-not-wait", seen)
    stage.engine.open()
    expect_returned(await stage.result(closing, "close-hangs", "`await close()` does not return."))
    count = len(stage.engine.batches)
    expect(
        count <= 3,
        "serves-on-after-close",
        f"`close` was called during step 1, and the thread ran {count} steps.\nIt ends after the"
        " step that runs: whoever closes an engine does not wait for a thousand tokens.",
    )
    for reader in readers:
        seen = "The engine was closed, and a caller waits for ever."
        _expect_ended(await stage.result(reader, "close-leaves-callers", seen), "A caller")
    later = stage.read("ram", 2)
    seen = "A request that comes after `close` waits for ever."
    _expect_ended(await stage.result(later, "serves-after-close", seen), "A later one")
    _expect_ended_threads(stage.engine)


def _expect_ended(got: Any, who: str) -> None:
    if isinstance(got, EngineEndedError):
        return
    said = f"{got!r}" if isinstance(got, BaseException) else f"{len(got)} outputs, and an end"
    name = "close-leaves-callers" if who == "A caller" else "serves-after-close"
    raise EXERCISE.mistake(name, f"The engine was closed. {who} got {said}.")


def _expect_ended_threads(engine: _Engine) -> None:
    # A thread has a few instructions left after it has told somebody that it ends.
    own = [thread for thread in engine.threads if not thread.name.startswith("asyncio_")]
    for thread in own:
        thread.join(PATIENCE)
    expect(
        not any(thread.is_alive() for thread in own),
        "thread-left",
        "`await close()` has returned, and your thread is alive.\nIt holds the engine, and the"
        " model's memory. Tell it to end, and wait until it has.",
    )


async def _closes_unused(stage: _Stage) -> None:
    for _ in range(2):
        closed = stage.result(stage.mine.close(), "close-hangs", "`await close()` hangs.")
        expect_returned(await closed)


async def _idles(stage: _Stage) -> None:
    """Before the first request, and after the last one."""
    for when in ("before the first request", "after the last one"):
        calls, cpu = stage.engine.num_calls, time.process_time()
        await asyncio.sleep(0.25)
        calls, cpu = stage.engine.num_calls - calls, time.process_time() - cpu
        if calls > 20 or cpu > 0.03:
            seen = f"In 0.25 seconds {when} your thread asked the engine {calls} times, and Python"
            raise EXERCISE.mistake("busy-wait", f"{seen} computed for {cpu:.2f} seconds.")
        reader = stage.read("fox", 2)
        got = await stage.result(reader, "caller-left-waiting", f"One request. {_WAITING}")
        _expect_outputs(got, "fox", 2)


async def _forgets(stage: _Stage) -> None:
    """Many requests, one after the other."""
    counts = []
    for number in (60, 300):
        for _ in range(number):
            reader = stage.read("fox", 1)
            got = await stage.result(reader, "caller-left-waiting", f"Many requests. {_WAITING}")
            _expect_outputs(got, "fox", 1)
        gc.collect()
        counts.append(len(gc.get_objects()))
    if counts[1] - counts[0] > 200:
        seen = (
            f"After 300 requests that have ended, {counts[1] - counts[0]} more objects are alive."
        )
        raise EXERCISE.mistake("never-forgets", seen)


# --- the real engine ------------------------------------------------------------------------------


_MORE = ("What is 30 - 4?", "Tell me a story about an owl.", "What is a scheduler?")
_OPTIONS = {"device": "cpu", "num_kv_blocks": 128, "max_model_len": 512}


def _questions() -> list[tuple[str, int]]:
    return [(prompt, 6 + 3 * i) for i, prompt in enumerate((*PROMPTS[:4], *_MORE))]


def _asked(count: int) -> SamplingParams:
    from minivllm.sampling_params import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count)


@functools.cache
def _expected() -> list[str]:
    from minivllm import LLM

    with LLM(**_OPTIONS) as llm:
        prompts, counts = zip(*_questions(), strict=True)
        asked = [_asked(count) for count in counts]
        return [o.outputs[0].text for o in llm.generate(list(prompts), asked, use_tqdm=False)]


def _serves_the_engine(answer: Callable) -> int:
    """The real engine behind the answer. Returns the number of requests."""
    from minivllm.engine.llm_engine import LLMEngine

    right, engine = _expected(), LLMEngine(**_OPTIONS)

    async def read(mine: Any, prompt: str, count: int) -> str:
        text = ""
        async for output in mine.generate(prompt, _asked(count)):
            text = output.outputs[0].text
        return text

    async def main() -> list[str]:
        mine = answer(engine)
        try:
            return await asyncio.gather(*(read(mine, *one) for one in _questions()))
        finally:
            await mine.close()

    try:
        texts = run_in_thread(main, timeout=10 * PATIENCE)
    except TimeoutError:
        raise EXERCISE.mistake("caller-left-waiting", f"With the real engine: {_WAITING}") from None
    finally:
        engine.close()
    for (prompt, _), mine, wanted in zip(_questions(), texts, right, strict=True):
        expect(
            mine == wanted,
            "engine-differs",
            f"With the real engine behind it, the answer to {prompt!r} is {mine!r}.\n`LLM.generate`"
            f" says {wanted!r}.",
        )
    return len(texts)


def check_async_engine(answer: Callable) -> str:
    scenarios: list[tuple[Scenario, dict[str, Any]]] = [
        (_alone, {"gated": True}),
        (_free_loop, {"gated": True}),
        (_free_steps, {"gated": True}),
        (_many, {}),
        (_refused, {"gated": True}),
        (_fails, {"gated": True, "fails_at": 2}),
        (_closes, {"gated": True}),
        (_closes_unused, {}),
        (_idles, {}),
        (_forgets, {}),
    ]
    for scenario, options in scenarios:
        _play(answer, scenario, _Engine(**options))
    lines: list[int] = [1]
    while len(lines) <= lines[-1] and len(lines) < 40:
        engine = _Engine(gated=True, fails_at=1)
        _play(answer, _fails_at_line(len(lines), lines), engine)
    _expect_no_loop_needed(answer)
    count = _serves_the_engine(answer)
    return f"{len(scenarios)} scenes, and {count} texts at once that are those of `LLM.generate`"


def _expect_no_loop_needed(answer: Callable) -> None:
    """The class is made where no event loop runs, as in a program that then calls asyncio.run."""
    made: list[Any] = []

    def make() -> None:
        try:
            made.append(answer(_Engine()))
        except Exception as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], Exception):
        raise EXERCISE.mistake("needs-a-loop", f"It raised {made[0]!r}.")
    run_in_thread(made[0].close, WatchingLoop, timeout=PATIENCE)


EXERCISE = Exercise(
    id="12.3",
    title="An async engine",
    check=check_async_engine,
    mistakes=(
        Known(
            "not-threadsafe",
            hint=2,
            answers=r"""
# %% the thread puts into the loop's queue
@@
-            loop.call_soon_threadsafe(news.put_nowait, item)
+            news.put_nowait(item)
""",
        ),
        Known(
            "in-the-event-loop",
            "The engine belongs to your thread alone. A call may take as long as a step, or wait"
            " for one, and meanwhile no client of this event loop is served. Put the request into a"
            " queue, which the thread empties between two steps.",
            hint=1,
            answers=r"""
# %% adds the request itself
@@
-        self.inbox.put((prompt, params, tell))
+        self.inbox.put((self.engine.add_request(prompt, params), tell))
@@
-            prompt, params, tell = message
-            try:
-                readers[self.engine.add_request(prompt, params)] = tell
-            except ValueError as error:
-                tell(error)
+            readers[message[0]] = message[1]

# %% a lock in place of the queue
@@
-        self.inbox.put((prompt, params, tell))
+        with self.lock:
+            self.inbox.put((self.engine.add_request(prompt, params), tell))
@@
-        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
+        self.lock = threading.Lock()
+        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
@@
-            prompt, params, tell = message
-            try:
-                readers[self.engine.add_request(prompt, params)] = tell
-            except ValueError as error:
-                tell(error)
+            readers[message[0]] = message[1]
@@
-                for output in self.engine.step():
+                with self.lock:
+                    outputs = self.engine.step()
+                for output in outputs:
""",
        ),
        Known(
            "two-at-a-time",
            "An engine serves one thread at a time: two of your threads used it together.",
            answers=r"""
# %% requests are added by threads of the pool
@@
-        self.inbox.put((prompt, params, tell))
+        request_id = await asyncio.to_thread(self.engine.add_request, prompt, params)
+        self.inbox.put((request_id, tell))
@@
-            prompt, params, tell = message
-            try:
-                readers[self.engine.add_request(prompt, params)] = tell
-            except ValueError as error:
-                tell(error)
+            readers[message[0]] = message[1]
""",
        ),
        Known(
            "loop-waits",
            "Something in `generate` or `close` blocks: a queue's `get`, a lock, `event.wait()`,"
            " `future.result()`, `thread.join()`. All other clients stand still meanwhile. In the"
            " event loop, wait with `await` only.",
            hint=2,
            answers=r"""
# %% a queue that may be full
@@
-        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
+        self.inbox: queue.Queue = queue.Queue(8)

# %% a queue of threads, read in the event loop
@@
-        loop, news = asyncio.get_running_loop(), asyncio.Queue()
+        news = queue.SimpleQueue()
@@
-            loop.call_soon_threadsafe(news.put_nowait, item)
+            news.put(item)
@@
-            item = await news.get()
+            item = news.get()

# %% close joins the thread in the event loop
@@
-        await asyncio.to_thread(self.thread.join)
+        self.thread.join()
""",
        ),
        Known(
            "idle-step",
            "With nothing to compute, the thread sleeps until a request comes.",
            hint=3,
            answers=r"""
# %% always goes on
@@
-        while not (self.engine.has_unfinished_requests() and self.inbox.empty()):
+        while not self.inbox.empty():

# %% waits for a message, which may be a request that is refused
@@
-        while not (self.engine.has_unfinished_requests() and self.inbox.empty()):
-            message = self.inbox.get()
+        idle = not self.engine.has_unfinished_requests()
+        while idle or not self.inbox.empty():
+            idle = False
+            message = self.inbox.get()
""",
        ),
        Known(
            "busy-wait",
            "Without requests your thread runs in circles, and takes a core (and Python's lock)"
            " from"
            " everybody else. It should sleep: `get` of a queue waits until something is in it.",
            hint=3,
            answers=r"""
# %% asks until there is something
@@
-            message = self.inbox.get()
+            if self.inbox.empty():
+                continue
+            message = self.inbox.get()

# %% does not even ask the engine
@@
-            message = self.inbox.get()
+            while self.inbox.empty():
+                pass
+            message = self.inbox.get()
""",
        ),
        Known(
            "polls",
            answers=r"""
# %% looks into a list, again and again
@@
-        loop, news = asyncio.get_running_loop(), asyncio.Queue()
+        news = []
@@
-            loop.call_soon_threadsafe(news.put_nowait, item)
+            news.append(item)
@@
-            item = await news.get()
+            while not news:
+                await asyncio.sleep(0.001)
+            item = news.pop(0)
""",
        ),
        Known(
            "one-at-a-time",
            "The second request waited until the first one had ended. An engine serves its requests"
            " together: take new ones in between two steps.",
            hint=3,
            answers=r"""
# %% looks for requests only when nothing runs
@@
-        while not (self.engine.has_unfinished_requests() and self.inbox.empty()):
+        while not self.engine.has_unfinished_requests():

# %% a lock of asyncio around each request
@@
-        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
+        self.lock = asyncio.Lock()
+        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
@@
-        self.inbox.put((prompt, params, tell))
-        if self.error is not None:  # the thread has ended in between
-            raise self.error
-        while True:
-            item = await news.get()
-            if isinstance(item, Exception):
-                raise item
-            yield item
-            if item.finished:
-                return
+        async with self.lock:
+            self.inbox.put((prompt, params, tell))
+            if self.error is not None:
+                raise self.error
+            while True:
+                item = await news.get()
+                if isinstance(item, Exception):
+                    raise item
+                yield item
+                if item.finished:
+                    return
""",
        ),
        Known(
            "not-in-the-next-step",
            "Who comes during a step takes part in the next one, however many they are: before each"
            " step, take in all that has come.",
            hint=3,
            answers=r"""
# %% takes in one before each step
@@
-                readers[self.engine.add_request(prompt, params)] = tell
-            except ValueError as error:
-                tell(error)
+                readers[self.engine.add_request(prompt, params)] = tell
+                break
+            except ValueError as error:
+                tell(error)
""",
        ),
        Known(
            "step-waits",
            "Your thread waits until the event loop has taken what a step brought. A loop that"
            " writes to hundreds of clients is often busy: hand it over, and go on.",
            hint=2,
            answers=r"""
# %% waits until it is in the queue
@@
-            loop.call_soon_threadsafe(news.put_nowait, item)
+            asyncio.run_coroutine_threadsafe(news.put(item), loop).result()
""",
        ),
        Known(
            "harms-others",
            "A request that the engine refuses is its own caller's trouble. Catch the error where"
            " the thread adds the request, and send it to this caller alone.",
            answers=r"""
# %% the thread ends
@@
-            try:
-                readers[self.engine.add_request(prompt, params)] = tell
-            except ValueError as error:
-                tell(error)
+            readers[self.engine.add_request(prompt, params)] = tell

# %% everybody gets it
@@
-            except ValueError as error:
-                tell(error)
+            except ValueError as error:
+                for other in [tell, *readers.values()]:
+                    other(error)
""",
        ),
        Known(
            "refusal-lost",
            "The error of `add_request` reaches the caller who asked: `generate` raises it.",
            answers=r"""
# %% drops it
@@
-            except ValueError as error:
-                tell(error)
+            except ValueError:
+                pass

# %% another error
@@
-            except ValueError as error:
-                tell(error)
+            except ValueError:
+                tell(RuntimeError("the request was refused"))
""",
        ),
        Known(
            "failure-hidden",
            "After a failed step nothing comes any more. All callers who wait must hear why: send"
            " the error to each of them, and let `generate` raise it.",
            hint=4,
            answers=r"""
# %% forgets those whose request is still in the queue
@@
-        while not self.inbox.empty():
-            if (message := self.inbox.get()) is not None:
-                message[2](self.error)

# %% does not look again after it has put its request in
@@
-        if self.error is not None:  # the thread has ended in between
-            raise self.error

# %% takes a step's ValueError for a request's
@@
-        except Exception as error:
-            self.error = error
+        except ValueError as error:
+            self.error = EngineEndedError(str(error))
+        except Exception as error:
+            self.error = error

# %% the thread just ends
@@
-        except Exception as error:
-            self.error = error
-        else:
-            self.error = EngineEndedError("This engine has been closed.")
+        except Exception as error:
+            self.error = error
+            return
+        self.error = EngineEndedError("This engine has been closed.")
""",
        ),
        Known(
            "serves-after-failure",
            "Nobody knows in which state the engine is after a failed step: `generate` raises that"
            " error at once, for ever.",
            hint=4,
            answers=r"""
# %% later requests are put into the queue of a thread that has ended
@@
-        except Exception as error:
-            self.error = error
-        else:
-            self.error = EngineEndedError("This engine has been closed.")
+        except Exception as error:
+            while not self.inbox.empty():
+                readers[object()] = self.inbox.get()[2]
+            for tell in readers.values():
+                tell(error)
+            return
+        self.error = EngineEndedError("This engine has been closed.")
""",
        ),
        Known(
            "close-does-not-wait",
            "Who closes an engine frees its memory next, and a step still uses it. `close` returns"
            " when the thread has ended.",
            hint=4,
            answers=r"""
# %% only says so
@@
-        await asyncio.to_thread(self.thread.join)
""",
        ),
        Known(
            "close-leaves-callers",
            "At the end the thread gives everybody who waits an `EngineEndedError`.",
            hint=4,
            answers=r"""
# %% a flag, seen when a request has been taken out of the queue
@@
-        self.error: Exception | None = None
+        self.error: Exception | None = None
+        self.closing = False
@@
-            if message is None:
+            if message is None or self.closing:
@@
-        self.inbox.put(None)
+        self.closing = True
+        self.inbox.put(None)

# %% forgets those whose request is still in the queue
@@
-        while not self.inbox.empty():
+        while not (self.inbox.empty() or isinstance(self.error, EngineEndedError)):

# %% forgets them
@@
-        for tell in readers.values():
-            tell(self.error)
+        if not isinstance(self.error, EngineEndedError):
+            for tell in readers.values():
+                tell(self.error)
""",
        ),
        Known(
            "serves-after-close",
            "A closed engine refuses: `generate` raises an `EngineEndedError`.",
            hint=4,
            answers=r"""
# %% puts it into a queue that nobody reads
@@
-        if self.error is not None:
-            raise self.error
-        loop, news = asyncio.get_running_loop(), asyncio.Queue()
+        loop, news = asyncio.get_running_loop(), asyncio.Queue()
@@
-        if self.error is not None:  # the thread has ended in between
+        if self.error is not None and not isinstance(self.error, EngineEndedError):
""",
        ),
        Known(
            "serves-on-after-close",
            answers=r"""
# %% finishes what runs
@@
-            if message is None:
-                return False
+            if message is None:
+                self.is_closing = True
+                if not self.engine.has_unfinished_requests():
+                    return False
+                continue
@@
-            while self._take_in(readers):
+            while not (self.is_closing and not readers) and self._take_in(readers):
@@
-        self.error: Exception | None = None
+        self.error: Exception | None = None
+        self.is_closing = False
""",
        ),
        Known(
            "close-hangs",
            "`await close()` must return, also when it is called twice, or before any request.",
            answers=r"""
# %% waits for an answer that comes once
@@
-        await asyncio.to_thread(self.thread.join)
+        loop, ended = asyncio.get_running_loop(), asyncio.Event()
+        self.ended = lambda: loop.call_soon_threadsafe(ended.set)
+        await ended.wait()
@@
-        for tell in readers.values():
-            tell(self.error)
+        for tell in readers.values():
+            tell(self.error)
+        self.ended()
@@
-        self.error: Exception | None = None
+        self.error: Exception | None = None
+        self.ended = lambda: None
""",
        ),
        Known(
            "never-forgets",
            "A server runs for weeks. Forget a request when its last output has gone to its"
            " caller.",
            answers=r"""
# %% keeps its readers
@@
-                    if output.finished:
-                        del readers[output.request_id]
""",
        ),
        Known("thread-left"),
        Known(
            "closes-the-engine",
            "The engine belongs to whoever made it, and may be used again: end your thread only.",
            answers=r"""
# %% tidies up too much
@@
-        await asyncio.to_thread(self.thread.join)
+        await asyncio.to_thread(self.thread.join)
+        self.engine.close()
""",
        ),
        Known(
            "caller-left-waiting",
            "Does the thread take the request in, and does what a step brings reach the queue that"
            " its caller awaits?",
            answers=r"""
# %% ends with the first output of anybody that is finished
@@
-                for output in self.engine.step():
+                for output in self.engine.step()[:1]:
""",
        ),
        Known("never-stepped", "Your thread must call `step` as long as requests are unfinished."),
        Known(
            "mixed-up",
            "Outputs of several requests reach one reader. `output.request_id` says whose it is:"
            " `add_request` has returned the same id.",
            answers=r"""
# %% the outputs in the order of the requests
@@
-                for output in self.engine.step():
-                    readers[output.request_id](output)
+                for output, tell in zip(self.engine.step(), list(readers.values())):
+                    tell(output)

# %% everything to everybody
@@
-                    readers[output.request_id](output)
+                    for tell in readers.values():
+                        tell(output)
""",
        ),
        Known(
            "last-output-lost",
            answers=r"""
# %% ends too early
@@
-            yield item
-            if item.finished:
-                return
+            if item.finished:
+                return
+            yield item
""",
        ),
        Known("wrong-order"),
        Known(
            "outputs-left-out",
            "Each step's output of the request is asked for: a reader wants to see the words come.",
            answers=r"""
# %% leaves out what has no new text
@@
-                    readers[output.request_id](output)
+                    if output.finished or output.outputs[0].text:
+                        readers[output.request_id](output)

# %% only the last
@@
-            yield item
-            if item.finished:
-                return
+            if item.finished:
+                yield item
+                return
""",
        ),
        Known(
            "needs-a-loop",
            "The constructor may run before there is an event loop: ask for the loop in"
            " `generate`.",
            answers=r"""
# %% asks in the constructor
@@
-        self.error: Exception | None = None
+        self.error: Exception | None = None
+        self.loop = asyncio.get_running_loop()
""",
        ),
        Known("engine-differs"),
    ),
    right=r"""
# %% a future for each wait, and news in a deque
@@
-        loop, news = asyncio.get_running_loop(), asyncio.Queue()
+        loop, news, has_news = asyncio.get_running_loop(), deque(), asyncio.Event()
@@
-            loop.call_soon_threadsafe(news.put_nowait, item)
+            news.append(item)
+            loop.call_soon_threadsafe(has_news.set)
@@
-            item = await news.get()
+            while not news:
+                has_news.clear()
+                if not news:
+                    await has_news.wait()
+            item = news.popleft()

# %% one call per step for all readers, through a dict of queues in the event loop
@@
-                for output in self.engine.step():
-                    readers[output.request_id](output)
-                    if output.finished:
-                        del readers[output.request_id]
+                outputs = self.engine.step()
+                for output in outputs:
+                    tell = readers[output.request_id]
+                    tell(output)
+                ended = [output.request_id for output in outputs if output.finished]
+                readers = {k: tell for k, tell in readers.items() if k not in ended}
""",
)
