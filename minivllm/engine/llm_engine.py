"""The engine: requests in, steps, outputs out. `LLM` (minivllm/llm.py) is the friendly face of
this.

For a loop of one's own::

    engine = LLMEngine()                       # the bundled model
    engine.add_request("Once upon a time", SamplingParams(max_tokens=32))
    while engine.has_unfinished_requests():
        for output in engine.step():           # one forward pass for everything that is running
            print(output.request_id, output.outputs[0].text)

Three parts in one thread: `EngineCore` computes tokens, `OutputProcessor` makes texts of them, and
this class checks requests and passes on. It can be cut short anywhere, by Ctrl-C, an error in a
callback or a lack of memory: the next call begins with `_recover`, which builds the core anew from
what is known of the requests. So no place in the code needs care of its own, and nothing is lost
but the work of the step. Taught in notebooks/07_engine.ipynb.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from minivllm import errors
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.config import EngineArgs, EngineConfig
from minivllm.engine.engine_core import EngineCore, EnginePieces
from minivllm.engine.input_processor import EngineInput, InputProcessor, in_our_order
from minivllm.engine.model_runner import ModelRunner
from minivllm.engine.output_processor import OutputCollector, OutputProcessor, Request
from minivllm.engine.scheduler import SchedulerBase, SchedulerStats
from minivllm.engine.sequence import Sequence
from minivllm.engine.trace import Trace
from minivllm.inputs import PromptType
from minivllm.models.loader import load_config, resolve_model_path
from minivllm.outputs import RequestMetrics, RequestOutput
from minivllm.parallel.group import TensorParallelGroup
from minivllm.sampling_params import SamplingParams
from minivllm.tokenizer import Tokenizer


@dataclass
class EngineMetrics(SchedulerStats):
    """Counters since the engine started: the scheduler's, and these."""

    num_generated_tokens: int = 0
    num_finished_requests: int = 0
    num_kv_blocks: int = 0
    num_used_kv_blocks: int = 0
    peak_used_kv_blocks: int = 0
    step_time: float = 0.0  # seconds spent in `step`


def _changes_engine(method: Callable) -> Callable:
    """A method that changes the engine: for one thread at a time, and safe to cut short.

    `_is_cut_short` stands from the beginning to the end of such a method. Whoever finds it standing
    recovers first.
    """

    @functools.wraps(method)
    def run(self: LLMEngine, *args: Any, **kwargs: Any) -> Any:
        self._enter()
        try:
            if self._is_cut_short:
                self._recover()
            self._is_cut_short = True
            result = method(self, *args, **kwargs)
            self._is_cut_short = False
            return result
        finally:
            self._inside.clear()

    return run


class LLMEngine:
    """Continuous batching over one model.

    model: None (the bundled one), a directory, or a Hugging Face hub id. config: how it runs; its
    fields may be given as keyword arguments instead. pieces: your own in place of the package's.
    group: of ranks that have met already; otherwise tensor_parallel_size > 1 starts them, or finds
    torchrun's.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: EngineConfig | None = None,
        pieces: EnginePieces | None = None,
        group: TensorParallelGroup | None = None,
        **options: Any,
    ) -> None:
        if config is None:
            config = EngineConfig.from_options(options)
        elif options:
            raise errors.ConfigError(f"Give {', '.join(options)} in the config, or no config.")
        self.model_path = BUNDLED_MODEL_PATH if model is None else resolve_model_path(model)
        # What is no model directory is said so, before its tokenizer is missed.
        load_config(self.model_path)
        self.tokenizer = None if config.skip_tokenizer_init else Tokenizer(self.model_path)
        self.core = EngineCore(self.model_path, config, pieces or EnginePieces(), group)
        self.model_config, self.config = self.core.model_config, self.core.config
        self.input_processor = InputProcessor(
            self.model_path,
            self.model_config,
            self.config,
            self.tokenizer,
            getattr(self.core.scheduler.block_manager, "supports_extra_keys", False),
        )
        self.processor = OutputProcessor()
        self._requests = self.processor.requests
        # of the requests for which nobody else waits: `step` returns their outputs
        self.collector = OutputCollector()
        self._request_numbers = itertools.count()
        self._step_time = 0.0
        self._is_cut_short = False
        self._is_closed = False
        #: "thread" -> the one that is in a method which changes the engine
        self._inside: dict[str, int] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        """The engine that these arguments describe, as in vLLM."""
        return cls(engine_args.model, **engine_args.options)

    @property
    def scheduler(self) -> SchedulerBase:
        self._recover_if_cut_short()
        return self.core.scheduler

    @property
    def model_runner(self) -> ModelRunner:
        return self.core.model_runner

    @property
    def trace(self) -> Trace | None:
        return self.core.trace

    # --- requests ---------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: PromptType,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        collector: OutputCollector | None = None,
    ) -> str:
        """Queue a request and return its id. prompt: text, token ids, or a dict as in vLLM
        (`TextPrompt`, ...).

        params: None takes the checkpoint's own. collector: who waits for its outputs; None: whoever
        calls `step`. Raises a `RequestError` for a request that can never be served; nothing else
        is affected by it. vLLM's order of arguments, (request_id, prompt, params), is understood.
        """
        self._check_open()
        prompt, params, request_id = in_our_order(prompt, params, request_id)
        if request_id in self._requests:
            raise errors.RequestError(
                f"Request id {request_id!r} is in use; finish or abort that request first."
            )
        checked = self.input_processor.process(prompt, params)
        return self._add(request_id, checked, collector or self.collector)

    @_changes_engine
    def _add(self, request_id: str | None, checked: EngineInput, collector: OutputCollector) -> str:
        # of served requests: seeds derived from it do not depend on refused ones
        number = next(self._request_numbers)
        if request_id is None:
            # A caller may have used the number as an id of its own.
            taken = str(number) in self._requests
            request_id = f"{number}-{uuid4().hex}" if taken else str(number)
        request = Request(
            request_id,
            number,
            checked.prompt_text,
            checked.prompt_token_ids,
            checked.params,
            self.tokenizer,
            RequestMetrics(arrival_time=time.perf_counter()),
            collector,
            functools.partial(self._new_sequence, checked),
        )
        self.processor.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request_id

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End requests now; the next `step` returns what they have, with finish_reason "abort".

        Ids of requests that have finished, or never were, are ignored: a request may finish while
        one decides.
        """
        self._check_open()
        self._abort([request_id] if isinstance(request_id, str) else list(request_id))

    @_changes_engine
    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None and not request.is_finished:
                self._end_aborted(request)

    @_changes_engine
    def drop_abandoned(self) -> None:
        """End and forget the requests that nobody waits for any more: an interrupt took away who
        did.
        """
        for request in list(self._requests.values()):
            if request.collector.is_abandoned:
                if not request.is_finished:
                    self._end_aborted(request)
                self.processor.forget(request)

    def _end_aborted(self, request: Request) -> None:
        # the intention first: should this be cut short, `_recover` carries it out
        request.ends_with = "abort"
        self.core.finish(self.processor.end(request), "abort")

    def has_unfinished_requests(self) -> bool:
        """Whether a `step` has anything to compute or to report."""
        return bool(self.collector.news) or self.get_num_unfinished_requests() > 0

    def get_num_unfinished_requests(self) -> int:
        return sum(not request.is_finished for request in self._requests.values())

    # --- stepping ---------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step for everything that is running; returns the requests that have something
        to report.
        """
        self.advance()
        return self.collect(self.collector)

    def advance(self) -> None:
        """Compute one step. What it brings waits for `collect`."""
        self._check_open()
        self._advance()

    @_changes_engine
    def _advance(self) -> None:
        step = self.core.step()
        for seq_id, stop_string in self.processor.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        for output in step.outputs:
            if output.finish_reason == "error":  # and so ends the whole request
                request = self.processor.owner_of(output.seq_id)
                self.core.finish(self.processor.end(request), "error")
        self._step_time += time.perf_counter() - step.start_time

    @_changes_engine
    def collect(self, collector: OutputCollector) -> list[RequestOutput]:
        """What is new of the requests that were added with this collector, since the last call."""
        return self.processor.collect(collector)

    @_changes_engine
    def reset_prefix_cache(self) -> bool:
        """Forget the content of all KV blocks. False, and nothing done, while requests are
        unfinished.

        Raises `UnsupportedFeatureError` for a block manager of your own without
        `reset_prefix_cache`.
        """
        return self.core.reset_prefix_cache()

    def close(self) -> None:
        """Let go of model and cache, and end the other ranks, if there are any; this engine cannot
        step any more.
        """
        self._is_closed = True
        self.core.close()
        self.core.model_runner.release()
        if self.tokenizer is not None:
            self.tokenizer.close()

    def metrics(self) -> EngineMetrics:
        """A snapshot of the counters."""
        self._recover_if_cut_short()
        core, processor = self.core, self.processor
        return EngineMetrics(
            **vars(core.scheduler.stats),
            num_generated_tokens=processor.num_generated_tokens,
            num_finished_requests=processor.num_finished_requests,
            num_kv_blocks=self.config.num_kv_blocks,
            num_used_kv_blocks=core.num_used_kv_blocks,
            peak_used_kv_blocks=core.peak_used_kv_blocks,
            step_time=self._step_time,
        )

    # --- one thread, and interrupts ---------------------------------------------------------------

    def _enter(self) -> None:
        """Note which thread is inside; raises `ConcurrentUseError` where another one is."""
        me = threading.get_ident()
        # one operation of the interpreter: only one thread sets it
        owner = self._inside.setdefault("thread", me)
        if owner == me:
            return
        if owner in sys._current_frames():
            raise errors.ConcurrentUseError()
        self._inside["thread"] = me  # left behind by a thread that is gone

    def _check_open(self) -> None:
        if self._is_closed:
            raise errors.EngineEndedError("This engine has been closed. Make a new one.")

    def _recover_if_cut_short(self) -> None:
        if self._is_cut_short and threading.get_ident() == self._inside.get(
            "thread", threading.get_ident()
        ):
            self._recover()

    def _recover(self) -> None:
        """A method was cut short: build the core anew from the requests. May be cut short itself,
        and called again.
        """
        self.core.restart(self.processor.settle())
        self._is_cut_short = False

    # --- sequences --------------------------------------------------------------------------------

    def _new_sequence(self, checked: EngineInput, request: Request, index: int) -> Sequence:
        """The sequence of one completion, with the tokens that it has so far."""
        params, completion = request.params, request.completions[index]
        return Sequence(
            completion.seq_id,
            [*request.prompt_token_ids, *completion.token_ids],
            # Only the first completion computes the prompt's logprobs; the others may share its
            # blocks.
            params if index == 0 else replace(params, prompt_logprobs=None),
            checked.stop_ids,
            max_num_tokens=checked.max_num_tokens,
            seed=self._seed(params.seed, request.number, index),
            bad_words=checked.bad_words,
            extra_keys=() if checked.cache_salt is None else (checked.cache_salt,),
            request_id=request.request_id,
            index=index,
            num_prompt_tokens=len(request.prompt_token_ids),
        )

    def _seed(self, seed: int | None, number: int, index: int) -> int:
        """The key of a sequence's random numbers: the request's seed, or one from the engine's seed
        and the arrival.
        """
        if seed is not None and index == 0:
            return seed % (1 << 63)
        origin = f"request {seed}" if seed is not None else f"engine {self.config.seed} {number}"
        return xxhash.xxh3_64_intdigest(f"{origin} {index}".encode()) >> 1
