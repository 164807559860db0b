"""Turn tokens into what callers get: text, stop strings, logprobs, and news for each reader.

The engine's core says which tokens a step gave to which sequence. This file keeps each request as
its caller sees it: one prompt and n completions, each with its tokens, text, logprobs and end. It
knows nothing about blocks and steps. After an interrupt, the core is built anew from the requests
that are kept here (`OutputProcessor.settle`). Taught in
notebooks/07_engine.ipynb.
"""

from __future__ import annotations

import inspect
import itertools
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from minivllm.engine.engine_core import SequenceOutput, StepOutput
from minivllm.engine.sampler import TokenLogprobs
from minivllm.engine.sequence import Sequence
from minivllm.errors import InvalidLogitsError, RequestError, StructuredOutputError
from minivllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.tokenizer import Detokenizer, Tokenizer

#: The state of a completion: (number of tokens taken in, finish_reason, stop_reason). It is one
#: object, so that all three change at once.
Settled = tuple[int, str | None, str | int | None]


class OutputCollector:
    """Collects the outputs of some requests for one reader (the name is vLLM's)."""

    def __init__(self) -> None:
        self.news: dict[str, Request] = {}
        self.is_closed = False
        #: The iterator that reads the outputs, if there is one. When it has ended or is gone, the
        #: requests are abandoned.
        self.reader: Callable[[], Generator | None] | None = None

    def read_by(self, reader: Generator) -> None:
        """Note the generator that reads the outputs."""
        self.reader = weakref.ref(reader)

    @property
    def is_abandoned(self) -> bool:
        if self.is_closed or self.reader is None:
            return self.is_closed
        reader = self.reader()
        return reader is None or inspect.getgeneratorstate(reader) == inspect.GEN_CLOSED


@dataclass(eq=False)
class Completion:
    """One completion of a request. detokenizer: None if no text is wanted."""

    seq_id: int
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    settled: Settled = (0, None, None)
    num_reported: int = 0  # tokens in the reports so far
    num_shown: int = 0  # characters of the text in the reports so far

    @property
    def finish_reason(self) -> str | None:
        return self.settled[1]

    @property
    def is_finished(self) -> bool:
        return self.settled[1] is not None


@dataclass(eq=False)
class Request:
    """What the engine keeps about a request, apart from its sequences."""

    request_id: str
    #: In order of arrival; seeds are derived from it.
    number: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer | None
    metrics: RequestMetrics
    collector: OutputCollector
    #: (request, index) -> a sequence with the tokens so far.
    new_sequence: Callable[[Request, int], Sequence]
    completions: list[Completion] = field(default_factory=list)
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    #: Set if the unfinished completions have to end now: "abort", or "error" (then `error` is set).
    #: It is set before they are ended, so that an interrupt in between loses nothing.
    ends_with: str | None = None
    error: RequestError | None = None
    #: Whether the end of the request has been reported.
    is_reported: bool = False
    #: Whether the request has news before it has finished.
    shows_progress: bool = False
    #: Whether text is decoded as tokens come; otherwise it is decoded once, at the end.
    follows_text: bool = False
    stop_strings: tuple[str, ...] = ()
    #: Whether a report holds only what is new.
    is_delta: bool = False

    def __post_init__(self) -> None:
        self.stop_strings = self.params.stop_strings
        self.is_delta = self.params.output_kind is RequestOutputKind.DELTA
        self.shows_progress = self.params.output_kind is not RequestOutputKind.FINAL_ONLY
        wants_text = self.tokenizer is not None and self.params.detokenize
        self.follows_text = wants_text and (self.shows_progress or bool(self.stop_strings))
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        # A plain loop: this is asked for each token of a stream, and `all` makes a generator.
        for completion in self.completions:  # noqa: SIM110
            if completion.settled[1] is None:
                return False
        return True

    @property
    def has_news(self) -> bool:
        if self.is_finished or not self.shows_progress:
            return self.is_finished and not self.is_reported
        return any(
            completion.num_reported < completion.settled[0] for completion in self.completions
        )

    def add_completion(self, seq_id: int) -> None:
        """Add one of the n completions."""
        completion = Completion(seq_id, self._new_detokenizer())
        if self.params.logprobs is not None:
            completion.logprobs, completion.cumulative_logprob = [], 0.0
        self.completions.append(completion)

    def take(self, index: int, output: SequenceOutput) -> str | None:
        """Take in a step's output of a completion; return the stop string that ends it, if any."""
        completion = self.completions[index]
        finish_reason = output.finish_reason
        stop_reason: str | int | None = output.stop_reason
        ended_by: str | None = None
        if finish_reason is None and completion.logprobs is None and not self.stop_strings:
            # The usual case: no end, no logprobs, and no string that may end the text.
            completion.token_ids += output.token_ids
            detokenizer = completion.detokenizer
            if self.follows_text and detokenizer is not None:
                for token_id in output.token_ids:
                    detokenizer.append(token_id, check_stop=False)
            completion.settled = (len(completion.token_ids), None, None)
            return None
        if finish_reason == "error":
            self.error, self.ends_with = _error_of(self.params, stop_reason), "error"
            stop_reason = None
        for number, token_id in enumerate(output.token_ids):
            completion.token_ids.append(token_id)
            if output.logprobs is not None:
                self._add_logprobs(completion, output.logprobs, output.row + number)
            # The stop token is not part of the text, unless the request wants it.
            is_stop = finish_reason == "stop" and number == len(output.token_ids) - 1
            detokenizer = completion.detokenizer if self.follows_text else None
            if detokenizer and not (is_stop and not self.params.include_stop_str_in_output):
                may_stop = len(completion.token_ids) >= self.params.min_tokens and not is_stop
                ended_by = detokenizer.append(token_id, may_stop)
            if ended_by is not None:
                finish_reason, stop_reason = "stop", ended_by
                break
        self._settle_at(completion, finish_reason, stop_reason)
        return ended_by

    def end(self, index: int, finish_reason: str) -> None:
        """End an unfinished completion from outside."""
        self._settle_at(self.completions[index], finish_reason, None)

    def restore(self) -> None:
        """After an interrupt, remove what completions have taken in only in part."""
        for completion in self.completions:
            if completion.is_finished:
                continue
            num_tokens = completion.settled[0]
            del completion.token_ids[num_tokens:]
            if completion.logprobs is not None:
                del completion.logprobs[num_tokens:]
                pairs = zip(completion.token_ids, completion.logprobs, strict=True)
                completion.cumulative_logprob = sum((found[t].logprob for t, found in pairs), 0.0)
            completion.detokenizer = detokenizer = self._new_detokenizer()
            if self.follows_text and detokenizer is not None:
                for number, token_id in enumerate(completion.token_ids, 1):
                    detokenizer.append(token_id, number >= self.params.min_tokens)

    def add_prompt_logprobs(self, start: int, logprobs: TokenLogprobs) -> None:
        """Store the logprobs of the prompt's tokens from position `start` on."""
        if self.prompt_logprobs is None:
            return
        for row in range(len(logprobs.token_ids)):
            found = self._logprob_dict(logprobs, row, self.params.prompt_logprobs or 0)
            self.prompt_logprobs[start + row] = found

    def report(self) -> RequestOutput:
        """Describe the request as it is now. Changes nothing.

        In DELTA mode, the output holds only what is new since the last report.
        """
        outputs = [self._report_completion(i) for i in range(len(self.completions))]
        # A plain loop, as in `is_finished`.
        longest = 0
        for completion in self.completions:
            longest = max(longest, completion.settled[0])
        self.metrics.num_generation_tokens = longest
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            self.is_finished,
            self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
            error=self.error,
        )

    def note_report(self) -> None:
        """Note that a report was made. In DELTA mode the next report starts here."""
        for completion in self.completions:
            completion.num_reported = completion.settled[0]
            completion.num_shown = self._end_of_shown(completion)
        self.is_reported = self.is_finished

    def _report_completion(self, index: int) -> CompletionOutput:
        completion = self.completions[index]
        num_tokens, finish_reason, stop_reason = completion.settled
        start, shown = (completion.num_reported, completion.num_shown) if self.is_delta else (0, 0)
        text = ""
        if completion.detokenizer is not None:
            text = completion.detokenizer.text[shown : self._end_of_shown(completion)]
        logprobs = completion.logprobs
        return CompletionOutput(
            index,
            text,
            completion.token_ids[start:num_tokens],
            completion.cumulative_logprob,
            None if logprobs is None else logprobs[start:num_tokens],
            finish_reason,
            stop_reason,
        )

    def _end_of_shown(self, completion: Completion) -> int:
        """The number of characters that may be shown.

        An end of the text that may become part of a stop string is held back.
        """
        detokenizer = completion.detokenizer
        if detokenizer is None:
            return 0
        if not self.stop_strings:
            return len(detokenizer.text)
        return max(completion.num_shown, detokenizer.num_safe(completion.is_finished))

    def _settle_at(
        self, completion: Completion, finish_reason: str | None, stop_reason: str | int | None
    ) -> None:
        if finish_reason is not None and (detokenizer := completion.detokenizer) is not None:
            if not self.follows_text:
                stopped = finish_reason == "stop" and not self.params.include_stop_str_in_output
                ids = completion.token_ids
                detokenizer.extend(ids[:-1] if stopped else ids)
                detokenizer.finish(check_stop=False)
            elif not isinstance(stop_reason, str) and (stop := detokenizer.finish()) is not None:
                finish_reason, stop_reason = "stop", stop
        completion.settled = (len(completion.token_ids), finish_reason, stop_reason)

    def _new_detokenizer(self) -> Detokenizer | None:
        params = self.params
        if self.tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(
            self.tokenizer,
            params.stop_strings,
            params.skip_special_tokens,
            self.prompt_token_ids,
            include_stop=params.include_stop_str_in_output,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )

    def _add_logprobs(self, completion: Completion, logprobs: TokenLogprobs, row: int) -> None:
        # Without logprobs of its own: another request of the step asked for them.
        if completion.logprobs is None:
            return
        completion.logprobs.append(self._logprob_dict(logprobs, row, self.params.logprobs or 0))
        so_far = completion.cumulative_logprob or 0.0
        completion.cumulative_logprob = so_far + logprobs.logprobs[row].item()

    def _logprob_dict(self, logprobs: TokenLogprobs, row: int, k: int) -> dict[int, Logprob]:
        """The k likeliest tokens, and the chosen one."""
        ids, values = logprobs.top_ids[row, :k].tolist(), logprobs.top_logprobs[row, :k].tolist()
        pairs = enumerate(zip(ids, values, strict=True), 1)
        found = {t: Logprob(value, rank, self._decode_one(t)) for rank, (t, value) in pairs}
        chosen = int(logprobs.token_ids[row])
        if chosen not in found:
            value, rank = logprobs.logprobs[row].item(), int(logprobs.ranks[row])
            found[chosen] = Logprob(value, rank, self._decode_one(chosen))
        return found

    def _decode_one(self, token_id: int) -> str | None:
        if self.tokenizer is None or not self.params.detokenize:
            return None
        return self.tokenizer.decode([token_id], skip_special_tokens=False)


def _error_of(params: SamplingParams, why: str | int | None) -> RequestError:
    """The error of a request for which no token could be chosen. why: its grammar's failure."""
    if why is not None:
        return StructuredOutputError(f"structured_outputs: the grammar cannot go on: {why}")
    if params.structured_outputs and (params.allowed_token_ids is not None or params.bad_words):
        return StructuredOutputError(
            "No token could be chosen: allowed_token_ids or bad_words leave none of those that the"
            " grammar allows, or the model's logits are not finite."
        )
    return InvalidLogitsError()


class OutputProcessor:
    """All requests whose end has not been reported yet, in order of arrival."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        #: seq_id -> (its request, the index of its completion).
        self._owners: dict[int, tuple[Request, int]] = {}
        self._seq_ids = itertools.count()
        self.num_generated_tokens = 0
        self.num_finished_requests = 0

    def add(self, request: Request) -> None:
        """Keep a request and its completions. The last line makes the request visible."""
        for index in range(request.params.n):
            request.add_completion(next(self._seq_ids))
            self._owners[request.completions[index].seq_id] = (request, index)
        self.requests[request.request_id] = request

    def process(self, step: StepOutput) -> list[tuple[int, str]]:
        """Take in the results of a step.

        Returns (seq_id, stop string) for each sequence that a stop string ends.
        """
        now, ended = time.perf_counter(), []
        for seq_id, num_cached_tokens in step.admitted:
            request = self._owners[seq_id][0]
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = step.start_time
                request.num_cached_tokens = num_cached_tokens
        for seq_id, start, logprobs in step.prompt_logprobs:
            if seq_id in self._owners:
                self._owners[seq_id][0].add_prompt_logprobs(start, logprobs)
        for output in step.outputs:
            request, index = self._owners[output.seq_id]
            completion, metrics = request.completions[index], request.metrics
            num_tokens = completion.settled[0]
            if metrics.first_token_time is None:
                metrics.first_token_time = now
            if output.num_draft_tokens:
                metrics.num_draft_tokens += output.num_draft_tokens
                metrics.num_accepted_tokens += output.num_accepted_tokens
            stop_string = request.take(index, output)
            if stop_string is not None:
                ended.append((output.seq_id, stop_string))
            # A stop string may end the completion in the middle of the step's tokens.
            self.num_generated_tokens += completion.settled[0] - num_tokens
            is_finished = completion.settled[1] is not None
            if is_finished:
                metrics.finished_time = now
            if request.shows_progress or (is_finished and request.is_finished):
                request.collector.news[request.request_id] = request
        return ended

    def end(self, request: Request) -> list[int]:
        """End the unfinished completions of a request, as its `ends_with` says.

        Returns the ids of their sequences.
        """
        ended = []
        for index, completion in enumerate(request.completions):
            if not completion.is_finished:
                request.end(index, request.ends_with or "abort")
                ended.append(completion.seq_id)
        request.collector.news[request.request_id] = request
        return ended

    def collect(self, collector: OutputCollector) -> list[RequestOutput]:
        """Return the news of a collector's requests, and forget those that have finished."""
        news = list(collector.news.values())
        outputs = [request.report() for request in news]
        for request in news:
            request.note_report()
            if request.is_finished:
                self.forget(request)
        collector.news.clear()
        return outputs

    def forget(self, request: Request) -> None:
        if self.requests.pop(request.request_id, None) is not None:
            self.num_finished_requests += 1
        request.collector.news.pop(request.request_id, None)
        for completion in request.completions:
            self._owners.pop(completion.seq_id, None)

    def owner_of(self, seq_id: int) -> Request:
        return self._owners[seq_id][0]

    def settle(self) -> list[Sequence]:
        """After an interrupt, bring every request into a consistent state, and derive the rest.

        Returns sequences for all unfinished completions, in order of arrival. This method may be
        interrupted as well; then it is called again.
        """
        self._owners = {}
        sequences = []
        for request in list(self.requests.values()):
            request.restore()
            if request.ends_with is not None:
                self.end(request)
            if request.is_reported:
                self.forget(request)
                continue
            for index, completion in enumerate(request.completions):
                self._owners[completion.seq_id] = (request, index)
                if not completion.is_finished:
                    sequences.append(request.new_sequence(request, index))
            if request.has_news:
                request.collector.news[request.request_id] = request
            else:
                request.collector.news.pop(request.request_id, None)
        return sequences
