"""12.4: the client has gone."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from minivllm.course.chapters.ch12_serving.common import output_of, run_virtual
from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.errors import EngineEndedError

if TYPE_CHECKING:
    from minivllm.course.sim.clients import VirtualLoop
    from minivllm.outputs import RequestOutput
    from minivllm.sampling_params import SamplingParams

#: Seconds of virtual time from one output to the next.
GAP = 1.0


class _Engine:
    """An engine for an event loop, with eyes open. Its requests get a word per second.

    first: seconds until a request's first word. fails_at: which of its words a request fails at.
    """

    def __init__(self, loop: VirtualLoop, *, first: float = GAP, fails_at: int = 0) -> None:
        self.loop, self._first, self._fails_at = loop, first, fails_at
        self.running: dict[str, tuple[float, list[str], int]] = {}
        self.ended: set[str] = set()
        #: Request's id -> when it was aborted.
        self.aborted: dict[str, float] = {}
        self.faults: dict[str, str] = {}
        self.num_started = 0

    def start(self, prompt: str, params: SamplingParams) -> str:
        self.num_started += 1
        request_id = f"{prompt}-{self.num_started * 37 % 10_007}"
        self.running[request_id] = self.loop.time(), [], int(params.max_tokens or 1)
        return request_id

    async def next(self, request_id: str) -> RequestOutput:
        if request_id not in self.running:
            raise KeyError(f"no request {request_id!r} is running")
        began, words, count = self.running[request_id]
        due = began + self._first + GAP * len(words)
        await asyncio.sleep(max(0.0, due - self.loop.time()))
        if len(words) + 1 == self._fails_at:
            self._end(request_id)
            raise EngineEndedError("the engine has failed")
        words.append(f"{request_id.partition('-')[0]}{len(words)}")
        is_last = len(words) == count
        if is_last:
            self._end(request_id)
        return output_of(request_id, list(words), "length" if is_last else None)

    def abort(self, request_id: str) -> None:
        if request_id in self.aborted:
            self.faults.setdefault("aborted-twice", f"{request_id!r} was aborted twice.")
        elif request_id in self.ended:
            self.faults.setdefault("aborts-the-ended", f"{request_id!r} had ended.")
        elif request_id not in self.running:
            raise KeyError(f"no request is called {request_id!r}")
        else:
            self.aborted[request_id] = self.loop.time()
            del self.running[request_id]

    def _end(self, request_id: str) -> None:
        if self.running.pop(request_id, None):
            self.ended.add(request_id)


def _params(count: int) -> SamplingParams:
    from minivllm.sampling_params import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count)


async def _turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _right(prompt: str, count: int) -> list[str]:
    return [" ".join(f"{prompt}{i}" for i in range(n + 1)) for n in range(count)]


def _expect_texts(got: list[str], prompt: str, count: int) -> None:
    expect(
        got == _right(prompt, count),
        "outputs-left-out",
        f"A reader of a stream of {count} words got {show(got)}.\nExpected {count} outputs, each as"
        " it comes, the last one too.",
    )


def _expect_aborted(engine: _Engine, how: str, name: str, at: float | None = None) -> None:
    """Require that every request which was started has ended or was aborted, by this time."""
    if engine.running:
        raise EXERCISE.mistake(name, f"{how}: {next(iter(engine.running))!r} runs on.")
    late = [when for when in engine.aborted.values() if at is not None and when > at]
    if late:
        seen = f"{how}, {at:g} seconds after the start: it was aborted after {late[0]:g}."
        raise EXERCISE.mistake("late-abort", seen)


async def _expect_no_tasks(how: str) -> None:
    # Who was cancelled ends in the next turns.
    await _turns()
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    if left:
        name = getattr(left[0].get_coro(), "__qualname__", "a coroutine")
        raise EXERCISE.mistake("task-left", f"{how}: a task with `{name}` is still waiting.")


# --- stream ---------------------------------------------------------------------------------------

Stream = Callable[..., AsyncIterator["RequestOutput"]]


async def _reads_all(stream: Stream, loop: VirtualLoop) -> _Engine:
    engine = _Engine(loop)
    for count in (1, 4):
        texts = [o.outputs[0].text async for o in stream(engine, "fox", _params(count))]
        _expect_texts(texts, "fox", count)
    return engine


async def _closes(stream: Stream, loop: VirtualLoop) -> _Engine:
    """The reader closes the stream after some outputs; then the server does something else."""
    engine = _Engine(loop)
    for taken in (1, 3):
        outputs: Any = stream(engine, "fox", _params(6))
        for _ in range(taken):
            await anext(outputs)
        await outputs.aclose()
        how = f"The reader closed the stream after {taken} of 6 outputs"
        _expect_aborted(engine, how, "left-on-close")
        await asyncio.sleep(2 * GAP)
    return engine


async def _closes_at_the_end(stream: Stream, loop: VirtualLoop) -> _Engine:
    """The reader leaves with the last output in its hand."""
    engine = _Engine(loop)
    outputs: Any = stream(engine, "fox", _params(2))
    texts = [(await anext(outputs)).outputs[0].text for _ in range(2)]
    await outputs.aclose()
    _expect_texts(texts, "fox", 2)
    return engine


async def _never_reads(stream: Stream, loop: VirtualLoop) -> _Engine:
    engine = _Engine(loop)
    outputs: Any = stream(engine, "fox", _params(3))
    await outputs.aclose()
    _expect_aborted(engine, "A stream that nobody read was closed", "left-on-close")
    return engine


async def _is_cancelled(stream: Stream, loop: VirtualLoop) -> _Engine:
    """The reader's task is cancelled before the first output, and later."""
    engine = _Engine(loop)
    for after, how in ((0.5, "before the first output"), (2.5, "after two outputs")):
        got: list[str] = []

        async def read(got: list[str]) -> None:
            async for output in stream(engine, "owl", _params(9)):
                got.append(output.outputs[0].text)

        task = asyncio.create_task(read(got))
        await asyncio.sleep(after)
        task.cancel()
        await asyncio.wait([task])
        _expect_aborted(engine, f"The reader's task was cancelled {how}", "left-on-cancel")
        if not task.cancelled():
            raise EXERCISE.mistake("swallows-cancel", f"A reader's task was cancelled {how}.")
    return engine


async def _fails(stream: Stream, loop: VirtualLoop) -> _Engine:
    engine = _Engine(loop, fails_at=3)
    texts: list[str] = []
    try:
        async for output in stream(engine, "fox", _params(5)):
            texts.append(output.outputs[0].text)
    except EngineEndedError:
        expect(
            texts == _right("fox", 2),
            "outputs-left-out",
            f"`next` failed after two outputs; the reader got {show(texts)}.\nExpected both, and"
            " then the error.",
        )
        return engine
    raise EXERCISE.mistake(
        "error-lost", f"`next` raised; the reader got {show(texts)}, and an end."
    )


class _BrokenError(Exception):
    """A class that no answer knows."""


async def _throws(stream: Stream, loop: VirtualLoop) -> _Engine:
    """The reader's own error ends the stream."""
    engine = _Engine(loop)
    outputs: Any = stream(engine, "fox", _params(5))
    await anext(outputs)
    try:
        await outputs.athrow(_BrokenError("the connection is broken"))
    except _BrokenError:
        _expect_aborted(engine, "The reader threw its error into the stream", "left-on-close")
        return engine
    except StopAsyncIteration:
        pass
    raise EXERCISE.mistake("error-lost", "A reader's own error was thrown in, and disappeared.")


async def _others_stay(stream: Stream, loop: VirtualLoop) -> _Engine:
    """Of three readers of the same prompt one leaves."""
    engine = _Engine(loop)

    async def read(most: int) -> list[str]:
        outputs: Any = stream(engine, "fox", _params(6))
        texts: list[str] = []
        async for output in outputs:
            texts.append(output.outputs[0].text)
            if len(texts) == most:
                break
        await outputs.aclose()
        return texts

    read_by = await asyncio.gather(read(9), read(2), read(9), return_exceptions=True)
    expect(
        len(engine.aborted) == 1 and read_by[0] == read_by[2] == _right("fox", 6),
        "others-aborted",
        f"Three read the same prompt, and one left. {len(engine.aborted)} requests were aborted:"
        f" {show(sorted(engine.aborted))}.\nEach stream has an id of its own, the one that `start`"
        " returned: abort just that.",
    )
    return engine


# --- whole ----------------------------------------------------------------------------------------


class _Client:
    """A client that goes away after some seconds; None: it stays."""

    def __init__(self, after: float | None) -> None:
        self._after = after
        self.num_asked = 0

    async def gone(self) -> None:
        self.num_asked += 1
        if self._after is None:
            await asyncio.Event().wait()
        else:
            await asyncio.sleep(self._after)


async def _finishes(whole: Callable, loop: VirtualLoop) -> _Engine:
    engine = _Engine(loop)
    for after, count in ((None, 3), (100.0, 1)):
        found = await whole(engine, "fox", _params(count), _Client(after).gone)
        what = found.outputs[0].text if hasattr(found, "outputs") else found
        right = _right("fox", count)[-1]
        expect(
            hasattr(found, "outputs") and what == right,
            "wrong-answer",
            f"The client stays, and `whole` returned {show(what)}.\nExpected the last output, which"
            f" says {right!r}.",
        )
        expect(
            loop.time() < 50,
            "waits-for-both",
            "The answer was there, and `whole` went on waiting until the client had left.\nWhoever"
            " comes first decides: `asyncio.wait(…, return_when=asyncio.FIRST_COMPLETED)`.",
        )
        await _expect_no_tasks("The answer was there")
    return engine


async def _waits_long(whole: Callable, loop: VirtualLoop) -> _Engine:
    """A long queue: the first token comes after two hours, and the client stays."""
    engine = _Engine(loop, first=7200.0)
    # And a long answer.
    found = await whole(engine, "fox", _params(1100), _Client(None).gone)
    if getattr(found, "finished", True) is False:
        seen = (
            f"The client stays, and `whole` returned an output that is not the last: {found!r:.80}"
        )
        raise Mistake("wrong-answer", f"{seen}.")
    if found is None:
        seen = f"The client stayed, and `whole` returned None after {loop.time():g} seconds."
        raise EXERCISE.mistake("gives-up", seen)
    return engine


async def _leaves(whole: Callable, loop: VirtualLoop) -> _Engine:
    """The client goes away before the first token, between two, and at once."""
    engine = _Engine(loop, first=60.0)
    for after, how in (
        (5.03, "before the first token"),
        (63.47, "after four tokens"),
        (0.0, "at once"),
    ):
        begin = loop.time()
        found = await whole(engine, "fox", _params(90), _Client(after).gone)
        await _turns()
        at = begin + after
        said = f"The client went away {how}"
        _expect_aborted(engine, said, "left-on-leaving", at + 0.001)
        expect(
            found is None,
            "not-none",
            f"{said}, and `whole` returned {show(found and found.outputs[0].text)}.\nNobody is"
            f" there"
            " to read it: return None.",
        )
        if loop.time() > at + 0.001:
            seen = f"{said}, and `whole` returned {loop.time() - at:g} seconds later."
            raise EXERCISE.mistake("late-abort", seen)
        await _expect_no_tasks(said)
    return engine


async def _whole_fails(whole: Callable, loop: VirtualLoop) -> _Engine:
    engine = _Engine(loop, fails_at=2)
    try:
        found = await whole(engine, "fox", _params(5), _Client(None).gone)
    except EngineEndedError:
        await _expect_no_tasks("The engine failed, and `whole` raised the error")
        return engine
    raise EXERCISE.mistake("error-lost", f"The engine failed, and `whole` returned {show(found)}.")


async def _whole_is_cancelled(whole: Callable, loop: VirtualLoop) -> _Engine:
    """The server ends, and cancels its handlers."""
    engine = _Engine(loop)
    task = asyncio.create_task(whole(engine, "fox", _params(9), _Client(None).gone))
    await asyncio.sleep(2.5)
    task.cancel()
    await asyncio.wait([task])
    await _turns()
    how = "The task of `whole` was cancelled"
    _expect_aborted(engine, how, "left-on-cancel")
    if not task.cancelled():
        raise EXERCISE.mistake("swallows-cancel", f"{how}, and it returned as if nothing were.")
    await _expect_no_tasks(how)
    return engine


async def _two_at_once(whole: Callable, loop: VirtualLoop) -> _Engine:
    """One client leaves, another one stays."""
    engine = _Engine(loop)
    asked = [whole(engine, "fox", _params(6), _Client(after).gone) for after in (None, 2.5, None)]
    found = await asyncio.gather(*asked)
    texts = [one and one.outputs[0].text for one in found]
    right = _right("fox", 6)[-1]
    expect(
        texts == [right, None, right],
        "others-aborted",
        f"Of three clients the second went away. They got {show(texts)}.\nEach has a request of its"
        " own.",
    )
    return engine


# --- the real engine ------------------------------------------------------------------------------


class _Real:
    """`LLMEngine` behind the names of `_Engine`: one step per second of virtual time."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._news: dict[str, asyncio.Queue[RequestOutput]] = {}

    def start(self, prompt: str, params: SamplingParams) -> str:
        request_id: str = self._engine.add_request(prompt, params)
        self._news[request_id] = asyncio.Queue()
        return request_id

    async def next(self, request_id: str) -> RequestOutput:
        return await self._news[request_id].get()

    def abort(self, request_id: str) -> None:
        self._engine.abort_request(request_id)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(GAP)
            if self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    self._news[output.request_id].put_nowait(output)

    @property
    def num_blocks(self) -> int:
        return int(self._engine.metrics().num_used_kv_blocks)


async def _real_scene(stream: Stream, engine: Any) -> None:
    real = _Real(engine)
    driver = asyncio.create_task(real.run())
    try:
        outputs: Any = stream(real, "Tell me a story about a fox.", _params(60))
        for _ in range(3):
            await anext(outputs)
        used = real.num_blocks
        assert used, "a request that runs has blocks"
        await outputs.aclose()
        await asyncio.sleep(GAP)
        expect(
            not real.num_blocks,
            "left-on-close",
            f"With the real engine: the reader left, and after one more step {real.num_blocks} of"
            f" the request's {used} KV blocks are in use.\nAbort the request at once.",
        )
    finally:
        driver.cancel()


@functools.cache
def _real_engine() -> Any:
    from minivllm.engine.llm_engine import LLMEngine

    return LLMEngine(device="cpu", num_kv_blocks=32, max_model_len=256)


# --- the check ------------------------------------------------------------------------------------

_STUCK = (
    "All tasks of the event loop wait, and nothing is left that could wake one of them.\nWhat does"
    " your code await, and who ends that?"
)


def check_gone(stream_: Callable, whole_: Callable) -> str:
    scenes: list[tuple[Callable[..., Awaitable[_Engine]], Callable]] = [
        *((scene, stream_) for scene in (_reads_all, _closes, _closes_at_the_end, _never_reads)),
        *((scene, stream_) for scene in (_is_cancelled, _fails, _throws, _others_stay)),
        *((scene, whole_) for scene in (_finishes, _leaves, _waits_long, _whole_fails)),
        *((scene, whole_) for scene in (_whole_is_cancelled, _two_at_once)),
    ]
    for scene, answer in scenes:

        async def main(
            loop: VirtualLoop, scene: Callable = scene, answer: Callable = answer
        ) -> None:
            try:
                engine = await scene(answer, loop)
            except asyncio.CancelledError:
                seen = "`CancelledError` was raised, and nobody had cancelled the caller."
                raise EXERCISE.mistake("cancels-its-caller", seen) from None
            await _turns()
            for name, seen in engine.faults.items():
                raise EXERCISE.mistake(name, seen)
            _expect_aborted(engine, "All readers have ended or left", "left-on-leaving")

        run_virtual(
            main, Mistake("stuck", _STUCK), EXERCISE.mistake("polls", "Nobody sleeps here.")
        )
    engine = _real_engine()
    run_virtual(lambda loop: _real_scene(stream_, engine), Mistake("stuck", _STUCK))
    return f"{len(scenes)} ways to come and go, and the real engine has its blocks back in a step"


EXERCISE = Exercise(
    id="12.4",
    title="The client has gone",
    check=check_gone,
    mistakes=(
        Known(
            "left-on-close",
            "Nobody reads that answer, and the engine computes it to its end: its blocks and its"
            " place are lost for all others. When the reader closes a generator, the `yield` in it"
            " raises `GeneratorExit`; `finally` runs in any case.",
            hint=1,
            answers=r"""
# %% only cancelled tasks
@@
-    try:
-        while not ended:
+    try:
+        while not ended:
@@
-    finally:
-        if not ended:
-            engine.abort(request_id)
+    except asyncio.CancelledError:
+        engine.abort(request_id)
+        raise

# %% no finally
@@
-    try:
-        while not ended:
-            try:
-                output = await engine.next(request_id)
-            except Exception:  # it has ended by itself
-                ended = True
-                raise
-            ended = output.finished
-            yield output
-    finally:
-        if not ended:
-            engine.abort(request_id)
+    while not ended:
+        output = await engine.next(request_id)
+        ended = output.finished
+        yield output

# %% only the errors that come to mind
@@
-    finally:
-        if not ended:
-            engine.abort(request_id)
+    except (GeneratorExit, asyncio.CancelledError, ValueError, RuntimeError, OSError):
+        if not ended:
+            engine.abort(request_id)
+        raise

# %% expects an exception that is an Exception
@@
-    finally:
-        if not ended:
-            engine.abort(request_id)
+    except Exception:
+        if not ended:
+            engine.abort(request_id)
+        raise
""",
        ),
        Known(
            "left-on-cancel",
            "A server cancels the task of a client that went away: what it awaits raises"
            " `CancelledError`, which is no `Exception`. `finally` runs in any case.",
            hint=1,
            answers=r"""
# %% only closed generators
@@
-    finally:
-        if not ended:
-            engine.abort(request_id)
+    except GeneratorExit:
+        if not ended:
+            engine.abort(request_id)
+        raise

# %% takes a cancelled wait for an end
@@
-            except Exception:  # it has ended by itself
+            except BaseException:

# %% whole leaves its tasks to themselves when it is cancelled
@@
-    try:
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
-        return work.result() if work.done() else None
-    finally:
-        for task in (work, leaving):
-            task.cancel()
-        await asyncio.gather(work, leaving, return_exceptions=True)
+    await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
+    for task in (work, leaving):
+        task.cancel()
+    await asyncio.wait({work, leaving})
+    return None if work.cancelled() else work.result()
""",
        ),
        Known(
            "polls",
            "Your code wakes up again and again to see whether something has happened. With a"
            " thousand clients the event loop does nothing else, and each is noticed late: await"
            " both at the same time, `asyncio.wait(…, return_when=asyncio.FIRST_COMPLETED)`.",
            hint=2,
            answers=r"""
# %% looks every millisecond
@@
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
+        while not (work.done() or leaving.done()):
+            await asyncio.sleep(0.001)
""",
        ),
        Known(
            "left-on-leaving",
            "Who starts a request sees it to its end, or aborts it. Here it runs on, and nobody"
            " reads it.",
            hint=2,
            answers=r"""
# %% whole just returns
@@
-    finally:
-        for task in (work, leaving):
-            task.cancel()
-        await asyncio.gather(work, leaving, return_exceptions=True)
+    finally:
+        leaving.cancel()
""",
        ),
        Known(
            "aborts-the-ended",
            "A request that has finished, or that has failed, is no longer there; its id may belong"
            " to somebody else already. Abort only what still runs.",
            hint=1,
            answers=r"""
# %% always, in finally
@@
-        if not ended:
-            engine.abort(request_id)
+        engine.abort(request_id)

# %% does not notice the end before somebody asks for more
@@
-            ended = output.finished
-            yield output
+            yield output
+            ended = output.finished

# %% a failure is no end
@@
-            try:
-                output = await engine.next(request_id)
-            except Exception:  # it has ended by itself
-                ended = True
-                raise
+            output = await engine.next(request_id)
""",
        ),
        Known(
            "aborted-twice",
            "Once is enough. Who aborts, `stream` or its reader?",
            answers=r"""
# %% where it is caught, and in finally
@@
-            yield output
-    finally:
+            yield output
+    except asyncio.CancelledError:
+        engine.abort(request_id)
+        raise
+    finally:
""",
        ),
        Known(
            "swallows-cancel",
            "Whoever cancelled the task waits for it to end as cancelled. Let `CancelledError` go"
            " on after the abort.",
            answers=r"""
# %% catches it
@@
-    finally:
-        if not ended:
-            engine.abort(request_id)
+    except asyncio.CancelledError:
+        pass
+    finally:
+        if not ended:
+            engine.abort(request_id)

# %% whole returns None when it is cancelled
@@
-    finally:
-        for task in (work, leaving):
-            task.cancel()
-        await asyncio.gather(work, leaving, return_exceptions=True)
+    except asyncio.CancelledError:
+        return None
+    finally:
+        for task in (work, leaving):
+            task.cancel()
+        await asyncio.gather(work, leaving, return_exceptions=True)
""",
        ),
        Known(
            "cancels-its-caller",
            "A task that you have cancelled raises `CancelledError` where you wait for it. That is"
            " no news for the caller: `gather(…, return_exceptions=True)`, or `asyncio.wait`.",
            hint=3,
            answers=r"""
# %% gathers what it has cancelled
@@
-        await asyncio.gather(work, leaving, return_exceptions=True)
+        await asyncio.gather(work, leaving)
""",
        ),
        Known(
            "error-lost",
            "Errors go on to the caller: a half answer that looks like a whole one is worse.",
            answers=r"""
# %% ends quietly
@@
-                ended = True
-                raise
+                ended = True
+                return

# %% whole takes a failure for a client that left
@@
-        return work.result() if work.done() else None
+        return work.result() if work.done() and not work.exception() else None
""",
        ),
        Known(
            "late-abort",
            "It was noticed too late. A first token may take a minute, and whoever asks now and"
            " then is late, too: wait for the answer and for the client *at the same time*.",
            hint=2,
            answers=r"""
# %% asks every tenth of a second
@@
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
+        while not (work.done() or leaving.done()):
+            await asyncio.sleep(0.1)

# %% looks after each output
@@
-    async def read():
-        last = None
-        async for output in stream(engine, prompt, params):
-            last = output
-        return last
-
-    work, leaving = asyncio.create_task(read()), asyncio.create_task(gone())
-    try:
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
-        return work.result() if work.done() else None
-    finally:
-        for task in (work, leaving):
-            task.cancel()
-        await asyncio.gather(work, leaving, return_exceptions=True)
+    leaving, last, outputs = (
+        asyncio.create_task(gone()),
+        None,
+        stream(engine, prompt, params),
+    )
+    try:
+        async for output in outputs:
+            last = output
+            if leaving.done():
+                return None
+        return last
+    finally:
+        await outputs.aclose()
+        leaving.cancel()
+        await asyncio.gather(leaving, return_exceptions=True)
""",
        ),
        Known(
            "task-left",
            "A task that nobody ends waits for ever, and holds what it knows: a server has"
            " thousands"
            " of them after a day. Cancel both tasks at the end, in `finally`, and wait for them.",
            hint=3,
            answers=r"""
# %% cancels only the work
@@
-        for task in (work, leaving):
-            task.cancel()
-        await asyncio.gather(work, leaving, return_exceptions=True)
+        work.cancel()
+        await asyncio.gather(work, return_exceptions=True)

# %% cancels only after the answer
@@
-    try:
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
-        return work.result() if work.done() else None
-    finally:
-        for task in (work, leaving):
-            task.cancel()
-        await asyncio.gather(work, leaving, return_exceptions=True)
+    await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
+    if work.done():
+        found = work.result()
+        leaving.cancel()
+        await asyncio.wait({leaving})
+        return found
+    work.cancel()
+    await asyncio.wait({work})
+    return None
""",
        ),
        Known(
            "not-none",
            answers=r"""
# %% what there is so far
@@
-    async def read():
-        last = None
-        async for output in stream(engine, prompt, params):
-            last = output
-        return last
+    last = None
+
+    async def read():
+        nonlocal last
+        async for output in stream(engine, prompt, params):
+            last = output
+        return last
@@
-        return work.result() if work.done() else None
+        return work.result() if work.done() else last
""",
        ),
        Known(
            "outputs-left-out",
            answers=r"""
# %% not the last one
@@
-            ended = output.finished
-            yield output
+            ended = output.finished
+            if not ended:
+                yield output
""",
        ),
        Known(
            "others-aborted",
            answers=r"""
# %% aborts by prompt
@@
-            engine.abort(request_id)
+            for other in list(engine.running):
+                if other.startswith(prompt):
+                    engine.abort(other)
""",
        ),
        Known(
            "waits-for-both",
            answers=r"""
# %% waits for all tasks
@@
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
+        await asyncio.wait({work, leaving}, timeout=200)
""",
        ),
        Known(
            "gives-up",
            "How long an answer may take is the client's business: wait without a limit.",
            answers=r"""
# %% not longer than a minute
@@
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
+        both, first = {work, leaving}, asyncio.FIRST_COMPLETED
+        await asyncio.wait(both, return_when=first, timeout=60)
""",
        ),
        Known(
            "wrong-answer",
            answers=r"""
# %% the first output
@@
-        async for output in stream(engine, prompt, params):
-            last = output
-        return last
+        async for output in stream(engine, prompt, params):
+            last = last or output
+        return last
""",
        ),
        Known(
            "stuck",
            answers=r"""
# %% waits for the client
@@
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
+        await asyncio.wait({work, leaving})
""",
        ),
    ),
    right=r"""
# %% cancels, and leaves the rest to the event loop
@@
-        for task in (work, leaving):
-            task.cancel()
-        await asyncio.gather(work, leaving, return_exceptions=True)
+        work.cancel()
+        leaving.cancel()

# %% catches both by name, whole without stream
@@
-    try:
-        while not ended:
-            try:
-                output = await engine.next(request_id)
-            except Exception:  # it has ended by itself
-                ended = True
-                raise
-            ended = output.finished
-            yield output
-    finally:
-        if not ended:
-            engine.abort(request_id)
+    while True:
+        try:
+            output = await engine.next(request_id)
+        except asyncio.CancelledError:
+            engine.abort(request_id)
+            raise
+        try:
+            yield output
+        except BaseException:
+            if not output.finished:
+                engine.abort(request_id)
+            raise
+        if output.finished:
+            return

# %% a task group
@@
-    work, leaving = asyncio.create_task(read()), asyncio.create_task(gone())
-    try:
-        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
-        return work.result() if work.done() else None
-    finally:
-        for task in (work, leaving):
-            task.cancel()
-        await asyncio.gather(work, leaving, return_exceptions=True)
+    try:
+        async with asyncio.TaskGroup() as group:
+            work, leaving = group.create_task(read()), group.create_task(gone())
+            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
+            work.cancel()
+            leaving.cancel()
+    except ExceptionGroup as group:
+        raise group.exceptions[0]
+    return None if work.cancelled() else work.result()
""",
)
