"""The engine: requests in, steps, outputs out. `LLM` (minivllm/llm.py) is the friendly face of this.

For a loop of one's own::

    engine = LLMEngine()                       # the bundled model
    engine.add_request("Once upon a time", SamplingParams(max_tokens=32))
    while engine.has_unfinished_requests():
        for output in engine.step():           # one forward pass for everything that is running
            print(output.request_id, output.outputs[0].text)

Not safe for use from several threads at once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from minivllm.batch import build_batch
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.config import EngineConfig
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.model_runner import ModelRunner, StepResult, pick_device
from minivllm.engine.sampler import TokenLogprobs
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import ScheduledBatch, ScheduledSequence
from minivllm.engine.sequence import Sequence as EngineSequence
from minivllm.engine.trace import Trace, record_step
from minivllm.errors import (
    EmptyPromptError,
    InvalidTokenError,
    PromptTooLongError,
    RequestError,
    SamplingParamsError,
    SchedulerStalledError,
    TokenizerRequiredError,
)
from minivllm.kernels import Kernels
from minivllm.models.loader import load_config, resolve_model_path
from minivllm.models.qwen3 import Qwen3ForCausalLM
from minivllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.tokenizer import Detokenizer, Tokenizer


@dataclass(eq=False)
class Request:
    """What the engine keeps of a request besides its sequences: how to report them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[EngineSequence]
    completions: list[CompletionOutput]
    #: One a completion; None without a tokenizer.
    detokenizers: list[Detokenizer | None]
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    #: Tokens of each completion that a DELTA output has reported.
    num_reported: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self.completions)


@dataclass(frozen=True)
class EngineMetrics:
    """Counters since the engine started."""

    num_steps: int
    num_preemptions: int
    num_mixed_steps: int
    num_chunks: int
    #: Tokens that went through the model, and tokens that came out of it.
    num_computed_tokens: int
    num_generated_tokens: int
    #: Tokens that admitted sequences brought, and how many of them the prefix cache supplied.
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_finished_requests: int
    num_kv_blocks: int
    num_used_kv_blocks: int
    peak_used_kv_blocks: int
    #: Seconds spent in `step`.
    step_time: float


class LLMEngine:
    """Continuous batching over one model.

    model: None (the bundled one), a directory, or a Hugging Face hub id. options: the fields of `EngineConfig`.
    kernels, block_manager_cls, scheduler_cls, model_cls, build_batch: your own pieces in place of the package's.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        kernels: Kernels | None = None,
        block_manager_cls: Callable[..., BlockManager] = BlockManager,
        scheduler_cls: Callable[..., Scheduler] = Scheduler,
        model_cls: Callable[..., Any] = Qwen3ForCausalLM,
        build_batch: Callable[..., Any] = build_batch,
        **options: Any,
    ) -> None:
        config = EngineConfig(**options)
        device = pick_device(config.device)
        self.model_path = BUNDLED_MODEL_PATH if model is None else resolve_model_path(model)
        self.model_config = load_config(self.model_path)
        self.config = replace(config, device=device).resolve(self.model_config, device.partition(":")[0])
        self.tokenizer = None if config.skip_tokenizer_init else Tokenizer(self.model_path)
        if kernels is None:
            kernels = Kernels.triton() if self.config.attention_backend == "triton" else Kernels.reference()
        self.model_runner = ModelRunner(
            self.model_path, self.model_config, self.config, kernels, model_cls=model_cls, build_batch=build_batch
        )
        self.config = replace(self.config, num_kv_blocks=self.model_runner.num_kv_blocks)
        manager = block_manager_cls(self.config.num_kv_blocks, self.config.block_size, config.enable_prefix_caching)
        self.scheduler = scheduler_cls(manager, self.config.max_num_seqs, self.config.max_num_batched_tokens)
        self.trace = self._new_trace() if config.trace else None
        self._requests: dict[str, Request] = {}
        #: seq_id -> (its request, which of its completions).
        self._owners: dict[int, tuple[Request, int]] = {}
        self._request_numbers, self._seq_ids = itertools.count(), itertools.count()
        #: Outputs of aborted requests, for the next step to return.
        self._undelivered: list[RequestOutput] = []
        self._num_generated = self._num_finished = self._peak_used = 0
        self._step_time = self._trace_start = 0.0

    # --- requests -------------------------------------------------------------------------------------------------

    def add_request(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a request and return its id. prompt: text, or token ids.

        Raises a `RequestError` for a request that can never be served; nothing else is affected by it.
        """
        params = params or SamplingParams()
        number = next(self._request_numbers)
        request_id = str(number) if request_id is None else request_id
        if request_id in self._requests:
            raise RequestError(f"Request id {request_id!r} is in use; finish or abort that request first.")
        token_ids = self._encode(prompt)
        max_num_tokens = self._check_request(token_ids, params)
        request = Request(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            params=params,
            sequences=[self._new_sequence(token_ids, params, i, number, max_num_tokens) for i in range(params.n)],
            completions=[CompletionOutput(index=i) for i in range(params.n)],
            detokenizers=[self._new_detokenizer(params) for _ in range(params.n)],
            metrics=RequestMetrics(arrival_time=time.perf_counter()),
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(token_ids),
            num_reported=[0] * params.n,
        )
        if params.logprobs is not None:
            for completion in request.completions:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
        self._requests[request_id] = request
        for index, seq in enumerate(request.sequences):
            self._owners[seq.seq_id] = (request, index)
            self.scheduler.add(seq)
        return request_id

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End requests now; the next `step` returns what they have, with finish_reason "abort".

        Ids of requests that have finished, or never were, are ignored: a request may finish while one decides.
        """
        for one in [request_id] if isinstance(request_id, str) else list(request_id):
            request = self._requests.get(one)
            if request is None:
                continue
            for index, seq in enumerate(request.sequences):
                if not seq.is_finished:
                    self.scheduler.finish(seq, "abort")
                    self._finish_completion(request, index)
            self._undelivered.append(self._report(request))
            self._forget(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests or self._undelivered)

    def get_num_unfinished_requests(self) -> int:
        return len(self._requests)

    # --- stepping -------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one step for everything that is running; returns the requests that have something to report."""
        start = time.perf_counter()
        batch = self.scheduler.schedule()
        if not batch and self._requests:
            raise SchedulerStalledError(
                f"The scheduler planned nothing while {len(self._requests)} requests are unfinished."
            )
        touched: dict[str, Request] = {}
        if batch:
            used = self.config.num_kv_blocks - self.scheduler.block_manager.num_free_blocks
            self._peak_used = max(self._peak_used, used)
            record = self._record(batch, start) if self.trace is not None else None
            self._note_admissions(batch, start)
            result = self.model_runner.execute(batch)
            touched = self._apply(batch, result)
            if record is not None:
                record.duration = time.perf_counter() - start
                record.finished = [self._label(item.sequence) for item in batch.sampled if item.sequence.is_finished]
        outputs, self._undelivered = self._undelivered, []
        for request in touched.values():
            if request.finished:
                self._forget(request)
            if request.finished or request.params.output_kind is not RequestOutputKind.FINAL_ONLY:
                outputs.append(self._report(request))
        self._step_time += time.perf_counter() - start
        return outputs

    def metrics(self) -> EngineMetrics:
        """A snapshot of the counters."""
        stats = self.scheduler.stats
        num_free = self.scheduler.block_manager.num_free_blocks
        return EngineMetrics(
            **vars(stats),
            num_generated_tokens=self._num_generated,
            num_finished_requests=self._num_finished,
            num_kv_blocks=self.config.num_kv_blocks,
            num_used_kv_blocks=self.config.num_kv_blocks - num_free,
            peak_used_kv_blocks=self._peak_used,
            step_time=self._step_time,
        )

    # --- what a request may ask -----------------------------------------------------------------------------------

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TokenizerRequiredError("This engine has no tokenizer; give the prompt as token ids.")
            return self.tokenizer.encode(prompt)
        vocab_size = self.model_config.vocab_size
        for token_id in prompt:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise InvalidTokenError(f"Token id {token_id!r} is not an integer from 0 to {vocab_size - 1}.")
        return list(prompt)

    def _check_request(self, token_ids: list[int], params: SamplingParams) -> int:
        """Raise for what can never be served; returns at how many tokens, prompt included, its sequences end."""
        if not token_ids:
            raise EmptyPromptError("The prompt has no tokens; give at least one.")
        limit = self.config.max_model_len
        if len(token_ids) >= limit:
            raise PromptTooLongError(
                f"The prompt has {len(token_ids)} tokens; max_model_len={limit} leaves room for {limit - 1} and one of "
                "output. Shorten the prompt or raise max_model_len."
            )
        # The last token of a sequence is never fed back, so it needs no place in the cache.
        pool = self.config.num_kv_blocks * self.config.block_size + 1
        wanted = len(token_ids) + (params.max_tokens or limit)
        max_num_tokens = min(limit, wanted if params.max_tokens else min(wanted, pool))
        if max_num_tokens > pool or len(token_ids) >= pool:
            raise PromptTooLongError(
                f"{len(token_ids)} prompt tokens with max_tokens={params.max_tokens} never fit the KV cache of "
                f"{pool - 1} tokens. Lower max_tokens, shorten the prompt or raise num_kv_blocks."
            )
        self._check_params(params)
        return max_num_tokens

    def _check_params(self, params: SamplingParams) -> None:
        vocab_size = self.model_config.vocab_size
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token_id in ids or ():
                if token_id >= vocab_size:
                    raise SamplingParamsError(
                        f"{name} names token {token_id}; the vocabulary ends at {vocab_size - 1}."
                    )
        if params.stop_strings and self.tokenizer is None:
            raise TokenizerRequiredError("Stop strings need a tokenizer, and this engine has none; use stop_token_ids.")

    def _new_sequence(
        self, token_ids: list[int], params: SamplingParams, index: int, number: int, max_num_tokens: int
    ) -> EngineSequence:
        stop_ids = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids.update(self.model_config.eos_token_ids)
        # Only the first completion computes the prompt's logprobs; the others may share its blocks.
        params = params if index == 0 else replace(params, prompt_logprobs=None)
        return EngineSequence(
            seq_id=next(self._seq_ids),
            token_ids=list(token_ids),
            params=params,
            stop_ids=frozenset(stop_ids),
            max_num_tokens=max_num_tokens,
            seed=self._seed(params.seed, number, index),
        )

    def _seed(self, seed: int | None, number: int, index: int) -> int:
        """The key of a sequence's random numbers: the request's seed, or one from the engine's seed and the arrival."""
        if seed is not None and index == 0:
            return seed % (1 << 63)
        origin = f"request {seed}" if seed is not None else f"engine {self.config.seed} {number}"
        return xxhash.xxh3_64_intdigest(f"{origin} {index}".encode()) >> 1

    def _new_detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, params.stop_strings, params.skip_special_tokens)

    # --- results --------------------------------------------------------------------------------------------------

    def _note_admissions(self, batch: ScheduledBatch, now: float) -> None:
        for seq in batch.admitted:
            request, _ = self._owners[seq.seq_id]
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
                request.num_cached_tokens = seq.num_cached_tokens

    def _apply(self, batch: ScheduledBatch, result: StepResult) -> dict[str, Request]:
        """Give every sequence its token; returns the requests that changed, by id."""
        accepted = self.scheduler.update(batch, result.wait())
        now = time.perf_counter()
        for item, logprobs in result.prompt_logprobs:
            self._add_prompt_logprobs(item, logprobs)
        row_of = {id(item): row for row, item in enumerate(batch.sampled)} if result.logprobs is not None else {}
        touched: dict[str, Request] = {}
        for item in accepted:
            request, index = self._owners[item.sequence.seq_id]
            touched[request.request_id] = request
            token_id = item.sequence.token_ids[item.sample_position]
            self._num_generated += 1
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            if request.params.logprobs is not None:
                self._add_logprobs(request.completions[index], result.logprobs, row_of[id(item)], request.params)
            self._detokenize(request, index, item.sequence, token_id)
            if item.sequence.is_finished:
                self._finish_completion(request, index)
                request.metrics.finished_time = now
        return touched

    def _detokenize(self, request: Request, index: int, seq: EngineSequence, token_id: int) -> None:
        """Follow the text where somebody looks at it while it grows; otherwise it is decoded once, at the end."""
        detokenizer, params = request.detokenizers[index], request.params
        wanted = params.stop_strings or params.output_kind is not RequestOutputKind.FINAL_ONLY
        if detokenizer is None or not wanted or seq.finish_reason == "stop":
            return  # the token that stopped a sequence is not part of its text
        stop = detokenizer.append(token_id, check_stop=seq.num_output_tokens >= params.min_tokens)
        if stop is not None:
            if seq.is_finished:  # its last permitted token completed the stop string
                seq.finish_reason, seq.stop_reason = "stop", stop
            else:
                self.scheduler.finish(seq, "stop", stop)

    def _finish_completion(self, request: Request, index: int) -> None:
        seq, completion, detokenizer = request.sequences[index], request.completions[index], request.detokenizers[index]
        completion.finish_reason, completion.stop_reason = seq.finish_reason, seq.stop_reason
        completion.token_ids = [t for t in seq.output_token_ids if t >= 0]
        if detokenizer is None:
            return
        if request.params.stop_strings or request.params.output_kind is not RequestOutputKind.FINAL_ONLY:
            if not isinstance(seq.stop_reason, str):
                detokenizer.finish()
            return
        by_token = seq.finish_reason == "stop"
        shown = completion.token_ids[:-1] if by_token else completion.token_ids
        detokenizer.text = self.tokenizer.decode(shown, request.params.skip_special_tokens)

    def _report(self, request: Request) -> RequestOutput:
        """The request as its caller sees it now."""
        delta = request.params.output_kind is RequestOutputKind.DELTA
        outputs = []
        for index, (seq, state) in enumerate(zip(request.sequences, request.completions, strict=True)):
            detokenizer = request.detokenizers[index]
            start = request.num_reported[index] if delta else 0
            token_ids = [t for t in seq.token_ids[seq.num_prompt_tokens + start :] if t >= 0]
            text = ""
            if detokenizer is not None:
                new_text = detokenizer.emit(state.finished)
                text = new_text if delta else detokenizer.emitted
            outputs.append(
                replace(
                    state,
                    text=text,
                    token_ids=token_ids,
                    logprobs=None if state.logprobs is None else state.logprobs[start:],
                )
            )
            request.num_reported[index] = start + len(token_ids) if delta else 0
        request.metrics.num_generation_tokens = max(seq.num_output_tokens for seq in request.sequences)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
            finished=request.finished,
            prompt_logprobs=request.prompt_logprobs,
            num_cached_tokens=request.num_cached_tokens,
            metrics=request.metrics,
        )

    def _forget(self, request: Request) -> None:
        self._num_finished += 1
        del self._requests[request.request_id]
        for seq in request.sequences:
            del self._owners[seq.seq_id]

    # --- logprobs -------------------------------------------------------------------------------------------------

    def _add_logprobs(
        self, completion: CompletionOutput, logprobs: TokenLogprobs, row: int, params: SamplingParams
    ) -> None:
        completion.logprobs.append(self._logprob_dict(logprobs, row, params.logprobs))
        completion.cumulative_logprob += logprobs.logprobs[row].item()

    def _add_prompt_logprobs(self, item: ScheduledSequence, logprobs: TokenLogprobs) -> None:
        request, _ = self._owners.get(item.sequence.seq_id, (None, 0))
        if request is None:
            return
        for row in range(len(logprobs.token_ids)):
            position = item.start + 1 + row
            request.prompt_logprobs[position] = self._logprob_dict(logprobs, row, request.params.prompt_logprobs)

    def _logprob_dict(self, logprobs: TokenLogprobs, row: int, k: int) -> dict[int, Logprob]:
        """The k likeliest tokens and the chosen one."""
        found = {
            token_id: Logprob(value, rank, self._decode_one(token_id))
            for rank, (token_id, value) in enumerate(
                zip(logprobs.top_ids[row, :k].tolist(), logprobs.top_logprobs[row, :k].tolist(), strict=True), start=1
            )
        }
        chosen = logprobs.token_ids[row].item()
        if chosen not in found:
            rank = logprobs.ranks[row].item()
            found[chosen] = Logprob(logprobs.logprobs[row].item(), rank, self._decode_one(chosen))
        return found

    def _decode_one(self, token_id: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token_id], skip_special_tokens=False)

    # --- trace ----------------------------------------------------------------------------------------------------

    def _new_trace(self) -> Trace:
        return Trace(
            model=self.model_path.name,
            num_blocks=self.config.num_kv_blocks,
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            kv_bytes_per_token=self.model_runner.kv_bytes_per_token,
        )

    def _record(self, batch: ScheduledBatch, now: float) -> Any:
        if not self.trace.steps:
            self._trace_start = now
        names = {seq_id: (request.request_id, index) for seq_id, (request, index) in self._owners.items()}
        return record_step(self.trace, batch, self.scheduler, names, now - self._trace_start)

    def _label(self, seq: EngineSequence) -> str:
        request, index = self._owners[seq.seq_id]
        return f"{request.request_id}/{index}"
