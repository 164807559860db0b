"""The engine: add requests, run steps, get outputs.

`LLM` (minivllm/llm.py) is the simpler interface to this engine. `LLMEngine` is for a loop of your
own::

    engine = LLMEngine()                       # the bundled model
    engine.add_request("Once upon a time", SamplingParams(max_tokens=32))
    while engine.has_unfinished_requests():
        for output in engine.step():           # one forward pass for everything that is running
            print(output.request_id, output.outputs[0].text)

The engine has three parts in one thread: `EngineCore` computes tokens, `OutputProcessor` turns them
into text, and `LLMEngine` checks requests and connects the two.

The engine can be interrupted anywhere: by Ctrl-C, by an error in a callback, by a lack of memory.
The next call then begins with `_recover`, which builds the core anew from what is known about the
requests. So no other code needs special care, and only the work of the interrupted step is lost.
Taught in notebooks/07_engine.ipynb.
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
from minivllm.engine.trace import StepRecord, Trace, TraceTexts
from minivllm.inputs import PromptType
from minivllm.models.loader import load_config, resolve_model_path
from minivllm.outputs import RequestMetrics, RequestOutput
from minivllm.parallel.group import TensorParallelGroup
from minivllm.sampling_params import SamplingParams
from minivllm.tokenizer import Tokenizer


@dataclass
class EngineMetrics(SchedulerStats):
    """Counters since the engine started: those of the scheduler, and these."""

    num_generated_tokens: int = 0
    num_finished_requests: int = 0
    num_kv_blocks: int = 0
    num_used_kv_blocks: int = 0
    peak_used_kv_blocks: int = 0
    step_time: float = 0.0  # seconds spent in `step`


def _changes_engine(method: Callable) -> Callable:
    """Wrap a method that changes the engine: one thread at a time, and safe to interrupt.

    `_is_cut_short` is True while such a method runs. A call that finds the flag set recovers first.
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

    model: None (the bundled one), a directory, or a Hugging Face hub id. config: how the engine
    runs; its fields may be given as keyword arguments instead. pieces: your own parts in place of
    the package's. group: the group of ranks, if the ranks have met already. Without a group,
    tensor_parallel_size > 1 starts the ranks, or joins those of torchrun.
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
        config = EngineConfig.choose(config, options)
        self.model_path = BUNDLED_MODEL_PATH if model is None else resolve_model_path(model)
        # First check that this is a model directory, so that the error does not name its tokenizer.
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
            self.core.model_runner.grammars,
        )
        self.processor = OutputProcessor()
        self._requests = self.processor.requests
        # Collects the outputs of the requests that have no collector of their own, for `step`.
        self.collector = OutputCollector()
        self._request_numbers = itertools.count()
        self._trace_texts = None if self.tokenizer is None else TraceTexts(self.tokenizer)
        self._step_time = 0.0
        self._is_cut_short = False
        self._is_closed = False
        #: "thread" -> the id of the thread that is inside a method which changes the engine.
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
        """The record of all steps, with the texts of those that have ended; None without
        ``trace=True``.
        """
        if self.core.trace is not None and self._trace_texts is not None:
            self._trace_texts.add_to(self.core.trace)
        return self.core.trace

    # --- requests ---------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: PromptType,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        collector: OutputCollector | None = None,
    ) -> str:
        """Queue a request and return its id.

        prompt: text, token ids, or a dict as in vLLM (`TextPrompt`, ...). params: None takes the
        checkpoint's defaults. collector: gets the outputs of this request; without one, `step`
        returns them. vLLM's order of arguments, (request_id, prompt, params), works as well.

        Raises a `RequestError` for a request that can never be served; other requests are not
        affected.
        """
        self._check_open()
        prompt, params, request_id = in_our_order(prompt, params, request_id)
        if request_id in self._requests:
            raise errors.RequestError(
                f"Request id {request_id!r} is in use; finish or abort that request first."
            )
        checked = self.input_processor.process(prompt, params)
        return self.add_checked(request_id, checked, collector or self.collector)

    @_changes_engine
    def add_checked(
        self, request_id: str | None, checked: EngineInput, collector: OutputCollector
    ) -> str:
        """Queue a request that an `InputProcessor` for this engine has checked; return its id.

        For a driver that checks requests elsewhere, such as a server's event loop. request_id: None
        makes one; the caller knows that a given one is not in use.
        """
        # Only served requests are counted, so that refused ones do not change the derived seeds.
        number = next(self._request_numbers)
        if request_id is None:
            # A caller may have used this number as a request id.
            taken = str(number) in self._requests
            request_id = f"{number}-{uuid4().hex}" if taken else str(number)
        request = Request(
            request_id,
            number,
            checked.prompt_text,
            checked.prompt_token_ids,
            checked.params,
            self.tokenizer,
            RequestMetrics(arrival_time=checked.arrival_time),
            collector,
            functools.partial(self._new_sequence, checked),
        )
        if self.core.trace is not None and self.tokenizer is not None:
            prompt = self.tokenizer.decode(checked.prompt_token_ids, skip_special_tokens=True)
            self.core.trace.prompts[request_id] = prompt
        self.processor.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request_id

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End requests now; the next `step` returns what they have, with finish_reason "abort".

        Ids of requests that have finished, and unknown ids, are ignored: a request may finish while
        the caller decides to abort it.
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
        """End and forget requests whose reader is gone, for example after an interrupt."""
        for request in list(self._requests.values()):
            if request.collector.is_abandoned:
                if not request.is_finished:
                    self._end_aborted(request)
                self.processor.forget(request)

    def _end_aborted(self, request: Request) -> None:
        # Set the intention first: if this call is interrupted, `_recover` completes it.
        request.ends_with = "abort"
        self.core.finish(self.processor.end(request), "abort")

    def has_unfinished_requests(self) -> bool:
        """Whether a `step` has anything to compute or to report."""
        requests = self._requests.values()
        return bool(self.collector.news) or any(not request.is_finished for request in requests)

    def get_num_unfinished_requests(self) -> int:
        return sum(not request.is_finished for request in self._requests.values())

    def watch(self, watcher: Callable[[StepRecord], None] | None) -> None:
        """Give the record of each step from now on to `watcher`, when the step has ended.

        None ends this. Unlike a trace, records are not kept.
        """
        self.core.watcher = watcher

    # --- stepping ---------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step for everything that is running, and return the outputs with news."""
        self.advance()
        return self.collect(self.collector)

    def advance(self) -> None:
        """Compute one step. Its outputs wait for `collect`."""
        self._check_open()
        self._advance()

    @_changes_engine
    def _advance(self) -> None:
        step = self.core.step()
        for seq_id, stop_string in self.processor.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        for output in step.outputs:
            # A sequence with an error ends its whole request.
            if output.finish_reason == "error":
                request = self.processor.owner_of(output.seq_id)
                self.core.finish(self.processor.end(request), "error")
        self._step_time += time.perf_counter() - step.start_time

    @_changes_engine
    def collect(self, collector: OutputCollector) -> list[RequestOutput]:
        """Return the new outputs of the requests that were added with this collector."""
        return self.processor.collect(collector)

    @_changes_engine
    def reset_prefix_cache(self) -> bool:
        """Forget the content of all KV blocks.

        Does nothing and returns False while requests are unfinished. Raises
        `UnsupportedFeatureError` if your own block manager has no `reset_prefix_cache`.
        """
        return self.core.reset_prefix_cache()

    def cached_hashes(self) -> list[int]:
        """The hashes of all KV blocks in the prefix cache, in any order.

        Empty if your own block manager has no `hash_to_block`.
        """
        return list(getattr(self.core.scheduler.block_manager, "hash_to_block", ()))

    def close(self) -> None:
        """Free model and cache, and end the other ranks. The engine cannot step afterwards."""
        self._is_closed = True
        self.core.close()
        self.core.model_runner.release()
        self.core.restore_collector()
        if self.core.speculator is not None:
            self.core.speculator.release()
        if self.tokenizer is not None:
            self.tokenizer.close()

    def metrics(self) -> EngineMetrics:
        """A snapshot of the counters."""
        self._recover_if_cut_short()
        core, processor = self.core, self.processor
        stats = vars(core.scheduler.stats)
        return EngineMetrics(
            **{**stats, "num_accepted_tokens_per_pos": [*stats["num_accepted_tokens_per_pos"]]},
            num_generated_tokens=processor.num_generated_tokens,
            num_finished_requests=processor.num_finished_requests,
            num_kv_blocks=self.config.num_kv_blocks,
            num_used_kv_blocks=core.num_used_kv_blocks,
            peak_used_kv_blocks=core.peak_used_kv_blocks,
            step_time=self._step_time,
        )

    # --- one thread, and interrupts ---------------------------------------------------------------

    def _enter(self) -> None:
        """Note the thread that is inside; raise `ConcurrentUseError` if another thread is."""
        me = threading.get_ident()
        # `setdefault` is one operation of the interpreter, so only one thread can set the value.
        owner = self._inside.setdefault("thread", me)
        if owner == me:
            return
        if owner in sys._current_frames():
            raise errors.ConcurrentUseError()
        # The other thread has ended without leaving; take its place.
        self._inside["thread"] = me

    def _check_open(self) -> None:
        if self._is_closed:
            raise errors.EngineEndedError("This engine has been closed. Make a new one.")

    def _recover_if_cut_short(self) -> None:
        if self._is_cut_short and threading.get_ident() == self._inside.get(
            "thread", threading.get_ident()
        ):
            self._recover()

    def _recover(self) -> None:
        """Build the core anew from the requests, after a method was interrupted.

        This method may be interrupted as well; the next call runs it again.
        """
        self.core.restart(self.processor.settle())
        self._is_cut_short = False

    # --- sequences --------------------------------------------------------------------------------

    def _new_sequence(self, checked: EngineInput, request: Request, index: int) -> Sequence:
        """Make the sequence of one completion, with the tokens that it has so far."""
        params, completion = request.params, request.completions[index]
        return Sequence(
            completion.seq_id,
            [*request.prompt_token_ids, *completion.token_ids],
            # Only the first completion computes the prompt's logprobs. The other completions may
            # then share its blocks.
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
        """The key of a sequence's random numbers, 63 bits.

        The key is derived from the request's seed, or from the engine's seed and the request's
        number of arrival.
        """
        if seed is not None and index == 0:
            return seed % (1 << 63)
        origin = f"request {seed}" if seed is not None else f"engine {self.config.seed} {number}"
        return xxhash.xxh3_64_intdigest(f"{origin} {index}".encode()) >> 1
