"""The engine: requests in, steps, outputs out. `LLM` (minivllm/llm.py) is the friendly face of this.

For a loop of one's own::

    engine = LLMEngine()                       # the bundled model
    engine.add_request("Once upon a time", SamplingParams(max_tokens=32))
    while engine.has_unfinished_requests():
        for output in engine.step():           # one forward pass for everything that is running
            print(output.request_id, output.outputs[0].text)

Not safe for use from several threads at once. Taught in notebooks/07_engine.ipynb."""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from minivllm import errors
from minivllm.batch import build_batch
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.config import EngineConfig
from minivllm.distributed import TensorParallelGroup
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.input_processor import EngineInput, InputProcessor, in_our_order
from minivllm.engine.model_runner import ModelRunner, StepResult
from minivllm.engine.request import Request
from minivllm.engine.scheduler import Scheduler, SchedulerStats
from minivllm.engine.sequence import ScheduledBatch, ScheduledSequence
from minivllm.engine.sequence import Sequence as EngineSequence
from minivllm.engine.trace import StepRecord, Trace, record_step
from minivllm.inputs import PromptType
from minivllm.kernels import Kernels
from minivllm.launch import Ranks, pick_device
from minivllm.models.loader import load_config, resolve_model_path
from minivllm.models.qwen3 import Qwen3ForCausalLM
from minivllm.outputs import RequestMetrics, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass
class EngineMetrics(SchedulerStats):
    """Counters since the engine started: the scheduler's, and these."""

    num_generated_tokens: int = 0
    num_finished_requests: int = 0
    num_kv_blocks: int = 0
    num_used_kv_blocks: int = 0
    peak_used_kv_blocks: int = 0
    step_time: float = 0.0  # seconds spent in `step`


class LLMEngine:
    """Continuous batching over one model.

    model: None (the bundled one), a directory, or a Hugging Face hub id. options: the fields of `EngineConfig`.
    kernels, block_manager_cls, scheduler_cls, model_cls, build_batch: your own pieces in place of the package's.
    group: for a rank of an engine whose other ranks have been started already.

    With tensor_parallel_size > 1 every rank runs an engine like this one on its share of the model; see launch.py.
    """

    def __init__(
        self, model: str | Path | None = None, *, kernels: Kernels | None = None,
        block_manager_cls: Callable[..., BlockManager] = BlockManager,
        scheduler_cls: Callable[..., Scheduler] = Scheduler, model_cls: Callable[..., Any] = Qwen3ForCausalLM,
        build_batch: Callable[..., Any] = build_batch, group: TensorParallelGroup | None = None, **options: Any,
    ) -> None:  # fmt: skip
        config = EngineConfig(**options)
        pieces = {"kernels": kernels, "block_manager_cls": block_manager_cls, "scheduler_cls": scheduler_cls}
        pieces |= {"model_cls": model_cls, "build_batch": build_batch}
        device = pick_device(config.device)
        self.model_path = BUNDLED_MODEL_PATH if model is None else resolve_model_path(model)
        self.model_config = load_config(self.model_path)
        self.config = replace(config, device=device).resolve(self.model_config, device.partition(":")[0])
        self.tokenizer = None if config.skip_tokenizer_init else Tokenizer(self.model_path)
        if kernels is None:
            kernels = Kernels.triton() if self.config.attention_backend == "triton" else Kernels.reference()
        elif kernels.name != "triton":  # a graph cannot record a function that waits for the GPU
            self.config = replace(self.config, enforce_eager=True)
        arguments = (self.config.device, _run_rank, self.model_path, {**options, **pieces})
        self.ranks = Ranks(config.tensor_parallel_size, *arguments, group=group)
        weakref.finalize(self, self.ranks.close)
        self._token_hash = xxhash.xxh3_64()  # of every token so far
        try:
            self.model_runner = ModelRunner(
                self.model_path, self.model_config, self.config, kernels, model_cls=model_cls,
                build_batch=build_batch, group=self.ranks.group,
            )  # fmt: skip
        except BaseException as error:
            self.ranks.give_up(error)
            raise
        self.config = replace(self.config, num_kv_blocks=self.model_runner.num_kv_blocks)
        self.input_processor = InputProcessor(self.model_path, self.model_config, self.config, self.tokenizer)
        manager = block_manager_cls(self.config.num_kv_blocks, self.config.block_size, config.enable_prefix_caching)
        self.scheduler = scheduler_cls(manager, self.config.max_num_seqs, self.config.max_num_batched_tokens)
        self.trace = self._new_trace() if config.trace else None
        self._requests: dict[str, Request] = {}
        self._owners: dict[int, tuple[Request, int]] = {}  # seq_id -> (its request, which of its completions)
        self._request_numbers, self._seq_ids = itertools.count(), itertools.count()
        #: Steps that have been started and not looked at, and how many may be.
        self._in_flight: deque[tuple[ScheduledBatch, StepResult, StepRecord | None]] = deque()
        self._depth = int(self.config.async_scheduling)
        #: Requests with news for the next report, and reports that no step has returned yet.
        self._touched: dict[str, Request] = {}
        self._undelivered: list[RequestOutput] = []
        self._metrics = EngineMetrics(num_kv_blocks=self.config.num_kv_blocks)
        self._trace_start = 0.0

    # --- requests -------------------------------------------------------------------------------------------------

    def add_request(self, prompt: PromptType, params: SamplingParams | None = None,
                    request_id: str | None = None) -> str:  # fmt: skip
        """Queue a request and return its id. prompt: text, token ids, or a dict as in vLLM (`TextPrompt`, ...).

        params: None takes the checkpoint's own. Raises a `RequestError` for a request that can never be served;
        nothing else is affected by it. vLLM's order of arguments (request_id, prompt, params) is understood.
        """
        prompt, params, request_id = in_our_order(prompt, params, request_id)
        if request_id in self._requests:
            raise errors.RequestError(f"Request id {request_id!r} is in use; finish or abort that request first.")
        new = self.input_processor.process(prompt, params)
        number = next(self._request_numbers)  # of served requests: seeds derived from it do not depend on refused ones
        if request_id is None:
            # A caller may have used the number as an id of its own.
            request_id = str(number) if str(number) not in self._requests else f"{number}-{uuid4().hex}"
        tokenizer = self.tokenizer if new.params.detokenize else None
        metrics = RequestMetrics(arrival_time=time.perf_counter())
        request = Request(request_id, new.prompt_text, new.prompt_token_ids, new.params, tokenizer, metrics)
        self._requests[request_id] = request
        for index in range(new.params.n):
            seq = self._new_sequence(new, index, number)
            request.add_completion(seq)
            self._owners[seq.seq_id] = (request, index)
            self.scheduler.add(seq)
        self.ranks.mirror("add_request", new.prompt_token_ids, new.params, request_id)
        return request_id

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End requests now; the next `step` returns what they have, with finish_reason "abort".

        Ids of requests that have finished, or never were, are ignored: a request may finish while one decides.
        """
        for one in [request_id] if isinstance(request_id, str) else list(request_id):
            request = self._requests.get(one)
            if request is None:
                continue
            for index, completion in enumerate(request.completions):
                if not completion.output.finished:
                    if not completion.sequence.is_finished:
                        self.scheduler.finish(completion.sequence, "abort")
                    request.finish_completion(index)
            self._touched.pop(one, None)
            self._undelivered.append(request.report())
            self._forget(request)
            self.ranks.mirror("abort_request", one)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests or self._undelivered)

    def get_num_unfinished_requests(self) -> int:
        return len(self._requests)

    # --- stepping -------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step for everything that is running; returns the requests that have something to report."""
        start = time.perf_counter()
        try:
            self.ranks.agree(self, self._state)
            batch = self.scheduler.schedule()
            if batch:
                self._launch(batch, start)
            elif self._requests and not self._in_flight and not self._touched:
                raise errors.SchedulerStalledError(
                    f"Nothing was planned while {len(self._requests)} requests are unfinished."
                )
            # The results of the step before this one are looked at while this one runs; without overlap, its own.
            while len(self._in_flight) > (self._depth if batch else 0):
                self._apply(*self._in_flight.popleft())
        except BaseException as error:  # Ctrl-C in a notebook included: the requests go on at the next step
            self._in_flight.clear()
            self.scheduler.recover()
            self.ranks.give_up(error)
            raise
        for request in list(self._touched.values()):
            self._undelivered.append(request.report())
            if request.finished:
                self._forget(request)
            del self._touched[request.request_id]
        self._metrics.step_time += time.perf_counter() - start
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def _launch(self, batch: ScheduledBatch, start: float) -> None:
        """Start a step that has just been planned."""
        used = self.config.num_kv_blocks - self.scheduler.block_manager.num_free_blocks
        self._metrics.peak_used_kv_blocks = max(self._metrics.peak_used_kv_blocks, used)
        record = self._record(batch, start) if self.trace is not None else None
        self._note_admissions(batch, start)
        self._in_flight.append((batch, self.model_runner.execute(batch), record))

    def reset_prefix_cache(self) -> bool:
        """Forget the content of all KV blocks. False, and nothing done, while requests are unfinished.

        Raises `UnsupportedFeatureError` for a block manager of your own without `reset_prefix_cache`.
        """
        reset = getattr(self.scheduler.block_manager, "reset_prefix_cache", None)
        if reset is None:
            raise errors.UnsupportedFeatureError(
                f"{type(self.scheduler.block_manager).__name__} has no method reset_prefix_cache; write one."
            )
        if self._requests:
            logger.warning("The prefix cache is not reset: %d requests are unfinished.", len(self._requests))
            return False
        reset()
        self.ranks.mirror("reset_prefix_cache")
        return True

    def close(self) -> None:
        """End the other ranks, if there are any; this engine cannot step any more then."""
        self.ranks.close()

    def metrics(self) -> EngineMetrics:
        """A snapshot of the counters."""
        self._metrics.num_used_kv_blocks = self.config.num_kv_blocks - self.scheduler.block_manager.num_free_blocks
        return replace(self._metrics, **vars(self.scheduler.stats))

    # --- sequences ------------------------------------------------------------------------------------------------

    def _new_sequence(self, request: EngineInput, index: int, number: int) -> EngineSequence:
        # Only the first completion computes the prompt's logprobs; the others may share its blocks.
        params = request.params if index == 0 else replace(request.params, prompt_logprobs=None)
        return EngineSequence(
            next(self._seq_ids), list(request.prompt_token_ids), params, request.stop_ids, request.max_num_tokens,
            seed=self._seed(params.seed, number, index), bad_words=request.bad_words,
        )  # fmt: skip

    def _seed(self, seed: int | None, number: int, index: int) -> int:
        """The key of a sequence's random numbers: the request's seed, or one from the engine's seed and the arrival."""
        if seed is not None and index == 0:
            return seed % (1 << 63)
        origin = f"request {seed}" if seed is not None else f"engine {self.config.seed} {number}"
        return xxhash.xxh3_64_intdigest(f"{origin} {index}".encode()) >> 1

    # --- results --------------------------------------------------------------------------------------------------

    def _note_admissions(self, batch: ScheduledBatch, now: float) -> None:
        for seq in batch.admitted:
            request, _ = self._owners[seq.seq_id]
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
                request.num_cached_tokens = seq.num_cached_tokens

    def _apply(self, batch: ScheduledBatch, result: StepResult, record: StepRecord | None) -> None:
        """Give every sequence its token."""
        token_ids = result.wait()
        self.ranks.group.check()
        self._token_hash.update(array("q", token_ids).tobytes())
        accepted = self.scheduler.update(batch, token_ids)
        now = time.perf_counter()
        for item, logprobs in result.prompt_logprobs:
            if item.sequence.seq_id in self._owners:
                self._owners[item.sequence.seq_id][0].add_prompt_logprobs(item.start + 1, logprobs)
        row_of = {id(item): row for row, item in enumerate(batch.sampled)}
        for number, item in enumerate(accepted):
            try:
                self._note_token(item, result, row_of[id(item)], now)
            except BaseException:  # interrupted: these have lost a token's text, so they end here
                self.abort_request([self._owners[i.sequence.seq_id][0].request_id for i in accepted[number:]])
                raise
        if record is not None:
            record.duration = now - self._trace_start - record.start_time
            record.finished = [self._label(item.sequence) for item in accepted if item.sequence.is_finished]

    def _note_token(self, item: ScheduledSequence, result: StepResult, row: int, now: float) -> None:
        """Report the token that a sequence has got to its request."""
        seq, token_id = item.sequence, item.sequence.token_ids[item.sample_position]
        request, index = self._owners[seq.seq_id]
        self._metrics.num_generated_tokens += 1
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        if request.params.logprobs is not None:
            request.add_logprobs(index, result.logprobs, row)
        stop_string = request.add_token(index, token_id, item.sample_position + 1 - seq.num_prompt_tokens)
        if stop_string is not None:
            self.scheduler.finish(seq, "stop", stop_string)
        if seq.is_finished:
            request.finish_completion(index)
            request.metrics.finished_time = now
        if request.finished or request.params.output_kind is not RequestOutputKind.FINAL_ONLY:
            self._touched[request.request_id] = request

    def _state(self) -> int:
        """A hash of the tokens so far and of what the next plan depends on: the same on every rank."""
        state, scheduler = self._token_hash.copy(), self.scheduler
        plan = [seq.seq_id for seq in (*scheduler.running, *scheduler.waiting)]
        state.update(array("q", [*plan, scheduler.block_manager.num_free_blocks]).tobytes())
        return state.intdigest() >> 1

    def _forget(self, request: Request) -> None:
        self._metrics.num_finished_requests += 1
        del self._requests[request.request_id]
        for completion in request.completions:
            del self._owners[completion.sequence.seq_id]

    # --- trace ----------------------------------------------------------------------------------------------------

    def _new_trace(self) -> Trace:
        names = ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
        return Trace(
            self.model_path.name, self.config.num_kv_blocks, kv_bytes_per_token=self.model_runner.kv_bytes_per_token,
            **{name: getattr(self.config, name) for name in names},
        )  # fmt: skip

    def _record(self, batch: ScheduledBatch, now: float) -> StepRecord:
        if not self.trace.steps:
            self._trace_start = now
        names = {seq_id: (request.request_id, index) for seq_id, (request, index) in self._owners.items()}
        return record_step(self.trace, batch, self.scheduler, names, now - self._trace_start)

    def _label(self, seq: EngineSequence) -> str:
        request, index = self._owners[seq.seq_id]
        return f"{request.request_id}/{index}"


def _run_rank(group: TensorParallelGroup, model: Path, arguments: dict[str, Any]) -> None:
    """The engine of a rank that `RankProcesses` has started: it steps whenever rank 0 does."""
    engine = LLMEngine(model, group=group, **arguments)
    while True:
        engine.step()
