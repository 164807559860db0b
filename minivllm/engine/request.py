"""A request as its caller sees it: one prompt, n completions, each with its text, its logprobs and its end."""

from dataclasses import dataclass, field, replace

from minivllm.engine.sampler import TokenLogprobs
from minivllm.engine.sequence import PENDING, Sequence
from minivllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.tokenizer import Detokenizer, Tokenizer


@dataclass(eq=False)
class Completion:
    """What becomes of one sequence. detokenizer: None without a tokenizer."""

    sequence: Sequence
    output: CompletionOutput
    detokenizer: Detokenizer | None
    num_reported: int = 0  # tokens that a DELTA output has reported


@dataclass(eq=False)
class Request:
    """What the engine keeps of a request besides its sequences: how to report them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer | None
    metrics: RequestMetrics
    completions: list[Completion] = field(default_factory=list)
    num_cached_tokens: int = 0
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt_token_ids)

    def add_completion(self, seq: Sequence) -> None:
        """Report seq as the next of the n completions."""
        output = CompletionOutput(index=len(self.completions))
        if self.params.logprobs is not None:
            output.logprobs, output.cumulative_logprob = [], 0.0
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, self.params.stop_strings, self.params.skip_special_tokens)
        self.completions.append(Completion(seq, output, detokenizer))

    @property
    def follows_text(self) -> bool:
        """Whether somebody looks at the text while it grows; otherwise it is decoded once, at the end."""
        return bool(self.params.stop_strings) or self.params.output_kind is not RequestOutputKind.FINAL_ONLY

    def add_token(self, index: int, token_id: int, num_output_tokens: int) -> str | None:
        """Follow the text of a completion, which now has so many tokens. Returns the stop string completed, if any."""
        seq, detokenizer = self.completions[index].sequence, self.completions[index].detokenizer
        # The token that stopped a sequence is not part of its text.
        if detokenizer is None or not self.follows_text or seq.finish_reason == "stop":
            return None
        return detokenizer.append(token_id, num_output_tokens >= self.params.min_tokens)

    def add_logprobs(self, index: int, logprobs: TokenLogprobs, row: int) -> None:
        """Note the logprobs of the token that a completion has just got."""
        output = self.completions[index].output
        output.logprobs.append(self._logprob_dict(logprobs, row, self.params.logprobs))
        output.cumulative_logprob += logprobs.logprobs[row].item()

    def add_prompt_logprobs(self, start: int, logprobs: TokenLogprobs) -> None:
        """Note the logprobs of the prompt's tokens from position `start` on."""
        for row in range(len(logprobs.token_ids)):
            self.prompt_logprobs[start + row] = self._logprob_dict(logprobs, row, self.params.prompt_logprobs)

    def finish_completion(self, index: int) -> None:
        """Take over how the sequence ended, and settle its text."""
        completion = self.completions[index]
        seq, output, detokenizer = completion.sequence, completion.output, completion.detokenizer
        output.finish_reason, output.stop_reason = seq.finish_reason, seq.stop_reason
        self.finished = all(completion.output.finished for completion in self.completions)
        if detokenizer is None:
            return
        if not self.follows_text:
            token_ids = _known(seq.output_token_ids)
            shown = token_ids[:-1] if seq.finish_reason == "stop" else token_ids
            detokenizer.text = self.tokenizer.decode(shown, self.params.skip_special_tokens)
        elif not isinstance(seq.stop_reason, str) and (stop := detokenizer.finish()) is not None:
            output.finish_reason, output.stop_reason = "stop", stop

    def report(self) -> RequestOutput:
        """The request as it is now; in DELTA mode, what is new since the last report."""
        outputs = [self._report_completion(completion) for completion in self.completions]
        self.metrics.num_generation_tokens = max(completion.num_reported for completion in self.completions)
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, outputs, self.finished, self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens, metrics=self.metrics,
        )  # fmt: skip

    def _report_completion(self, completion: Completion) -> CompletionOutput:
        output, detokenizer = completion.output, completion.detokenizer
        delta = self.params.output_kind is RequestOutputKind.DELTA
        start = completion.num_reported if delta else 0
        token_ids = _known(completion.sequence.output_token_ids[start:])
        completion.num_reported = start + len(token_ids)
        new_text = "" if detokenizer is None else detokenizer.emit(output.finished)
        text = new_text if delta or detokenizer is None else detokenizer.emitted
        logprobs = None if output.logprobs is None else output.logprobs[start:]
        return replace(output, text=text, token_ids=token_ids, logprobs=logprobs)

    def _logprob_dict(self, logprobs: TokenLogprobs, row: int, k: int) -> dict[int, Logprob]:
        """The k likeliest tokens and the chosen one."""
        ids, values = logprobs.top_ids[row, :k].tolist(), logprobs.top_logprobs[row, :k].tolist()
        found = {t: Logprob(v, i + 1, self._decode_one(t)) for i, (t, v) in enumerate(zip(ids, values, strict=True))}
        chosen = logprobs.token_ids[row].item()
        if chosen not in found:
            value, rank = logprobs.logprobs[row].item(), logprobs.ranks[row].item()
            found[chosen] = Logprob(value, rank, self._decode_one(chosen))
        return found

    def _decode_one(self, token_id: int) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode([token_id], skip_special_tokens=False)


def _known(token_ids: list[int]) -> list[int]:
    """Without the tokens at the end that steps in flight will bring."""
    end = len(token_ids)
    while end and token_ids[end - 1] == PENDING:
        end -= 1
    return token_ids[:end]
