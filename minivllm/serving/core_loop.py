"""The loop around an engine: messages in, the news of each step out.

The loop is the only one that touches the engine. It runs in a thread or in a process of its own
(core_client.py), so a step never waits for the event loop: `send` only puts news into a queue.
Between two steps it takes in everything that has arrived. With nothing to compute, it sleeps until
a message comes. Taught in notebooks/12_serving.ipynb.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.output_processor import OutputCollector
from minivllm.engine.trace import StepRecord, TraceTexts
from minivllm.sampling_params import RequestOutputKind
from minivllm.serving import wire

#: How many steps per second a viewer is shown: as many as a screen can show.
STEPS_PER_SECOND = 30
#: Seconds after which the engine's state is reported although no request has news.
STATS_INTERVAL = 0.1


class CoreLoop:
    """Runs an engine until a `Close` comes. send: takes each message for the event loop."""

    def __init__(
        self, engine: LLMEngine, inbox: SimpleQueue[Any], send: Callable[[Any], None]
    ) -> None:
        self.engine, self.inbox, self.send = engine, inbox, send
        self.collector = OutputCollector()
        #: Requests whose prompt's logprobs have not been sent.
        self._asks_prompt: set[str] = set()
        self._viewer: Viewer | None = None
        self._is_closed = False
        self._reported_at = 0.0

    def started(self) -> wire.Started:
        """What the event loop must know to check requests itself."""
        engine = self.engine
        return wire.Started(
            str(engine.model_path),
            engine.model_config,
            engine.config,
            engine.input_processor.takes_cache_salt,
            engine.model_runner.kv_bytes_per_token,
        )

    def run(self) -> None:
        """Serve until `Close`. An error of a step ends the loop and is raised."""
        while not self._is_closed:
            self._take_in()
            if not self._is_closed and self.engine.has_unfinished_requests():
                self.engine.advance()
            self._report()

    def _take_in(self) -> None:
        """Handle the messages that have arrived; without work, wait for one."""
        if not self.engine.has_unfinished_requests() and not self.collector.news:
            self._handle(self.inbox.get())
        while not self._is_closed:
            try:
                message = self.inbox.get_nowait()
            except Empty:
                return
            self._handle(message)

    def _handle(self, message: Any) -> None:
        match message:
            case wire.Add(request_id, checked):
                params = checked.params
                if params.prompt_logprobs is not None:
                    self._asks_prompt.add(request_id)
                if params.output_kind is RequestOutputKind.CUMULATIVE:
                    # What is new is sent; the other side adds it up.
                    delta = replace(params, output_kind=RequestOutputKind.DELTA)
                    checked = replace(checked, params=delta)
                self.engine.add_checked(request_id, checked, self.collector)
            case wire.Abort(request_ids):
                self.engine.abort_request(request_ids)
            case wire.Ping(number):
                self.send(wire.Pong(number))
            case wire.ResetPrefixCache(number):
                self.send(wire.Pong(number, self.engine.reset_prefix_cache()))
            case wire.ListCached(number):
                self.send(wire.Pong(number, self.engine.cached_hashes()))
            case wire.Watch(is_on, with_text):
                self._watch(is_on, with_text)
            case wire.Close():
                self._is_closed = True

    def _report(self) -> None:
        # Before `collect`, which forgets the requests that have finished.
        step = self._viewer.take() if self._viewer is not None else None
        gains = []
        for output in self.engine.collect(self.collector):
            asks = output.request_id in self._asks_prompt
            gains.append(wire.pack(output, asks))
            if asks:
                self._asks_prompt.discard(output.request_id)
        now = time.perf_counter()
        # Now and then without news of a request: who watches the engine wants to see it work.
        if gains or step is not None or now - self._reported_at > STATS_INTERVAL:
            self._reported_at = now
            self.send(wire.News(gains, self.stats(), step))

    def stats(self) -> wire.Stats:
        scheduler = self.engine.scheduler
        return wire.Stats(len(scheduler.running), len(scheduler.waiting), self.engine.metrics())

    def _watch(self, is_on: bool, with_text: bool) -> None:
        """Record steps only while somebody looks: a record costs time in each step."""
        self._viewer = Viewer(self.engine, with_text) if is_on else None
        self.engine.watch(None if self._viewer is None else self._viewer.add)


class Viewer:
    """Describes an engine's steps for people: at most `STEPS_PER_SECOND`, however fast it is.

    with_text: whether prompts and answers are shown.
    """

    def __init__(self, engine: LLMEngine, with_text: bool) -> None:
        self.engine = engine
        self._with_text = with_text and engine.tokenizer is not None
        self._texts = TraceTexts(engine.tokenizer) if engine.tokenizer is not None else None
        #: Steps that have ended and are not shown yet.
        self._records: list[StepRecord] = []
        self._known: set[str] = set()
        self._shown_at = 0.0

    def add(self, record: StepRecord) -> None:
        """Take in a step that has ended."""
        self._records.append(record)

    def take(self) -> wire.Step | None:
        """The latest step, if it is time to show one; what others in between brought is in it."""
        now = time.perf_counter()
        if not self._records or (
            now - self._shown_at < 1 / STEPS_PER_SECOND
            and not any(record.finished for record in self._records)
        ):
            return None
        self._shown_at = now
        records, self._records = self._records, []
        step = wire.Step(**vars(records[-1]))
        step.finished = [name for record in records for name in record.finished]
        step.preempted = [name for record in records for name in record.preempted]
        step.texts, step.new_token_ids, step.rejected_texts = {}, {}, {}
        for record in records:
            if self._with_text and self._texts is not None:
                self._texts.add(record)
                for name, text in record.texts.items():
                    step.texts[name] = step.texts.get(name, "") + text
        if self._with_text:
            step.rejected_texts = records[-1].rejected_texts
        # A sequence may come and go between two steps that are shown.
        appeared = {name for record in records for name in (*record.running, *record.waiting)}
        step.prompts = {name: self._prompt(name) for name in sorted(appeared - self._known)}
        self._known |= appeared
        self._known -= set(step.finished)
        return step

    def _prompt(self, name: str) -> str:
        """The text of a sequence's prompt, as long as its request is known."""
        request = self.engine.processor.requests.get(name.rpartition("/")[0])
        if request is None or self.engine.tokenizer is None or not self._with_text:
            return ""
        return self.engine.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)
