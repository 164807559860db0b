"""What a caller gets back. Field names are vLLM's. Taught in notebooks/11_using_minivllm.ipynb."""

from dataclasses import dataclass, field

from minivllm.errors import RequestError


@dataclass
class Logprob:
    """One token's natural-log probability at one position, before all edits and filters."""

    logprob: float
    rank: int | None = None  # 1 is the likeliest token of the position
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One completion of a prompt; a request with n > 1 has n of them."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    #: One dict per generated token; the chosen one is always in it.
    logprobs: list[dict[int, Logprob]] | None = None
    #: "stop" (end of sequence, stop token or stop string), "length", "abort", "error"; None while
    #: running.
    finish_reason: str | None = None
    #: The stop string or stop token that ended it; None for end of sequence.
    stop_reason: str | int | None = None

    @property
    def finished(self) -> "Answer":
        """Whether it has ended; `finished()`, vLLM's form, says the same."""
        return Answer(self.finish_reason is not None)


class Answer(int):
    """True or False, also as a call: vLLM has as a method what is a property here."""

    def __call__(self) -> bool:
        return bool(self)

    def __repr__(self) -> str:
        return repr(bool(self))


@dataclass
class RequestMetrics:
    """When things happened to one request, in seconds of `time.perf_counter`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    #: Tokens of the longest completion, which is what TPOT divides by.
    num_generation_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first step that computed a token of it."""
        if self.first_scheduled_time is None:
            return None
        return self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """TTFT: seconds from arrival to the first generated token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def time_per_output_token(self) -> float | None:
        """TPOT: mean seconds between generated tokens after the first."""
        if self.finished_time is None or self.first_token_time is None:
            return None
        if self.num_generation_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (self.num_generation_tokens - 1)


@dataclass
class RequestOutput:
    """The state of one request: so far, or final when `finished`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    #: One entry per prompt token; the first is None, for nothing precedes it.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    #: Prompt tokens found in the prefix cache when the request was first scheduled.
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    #: Why this request of a batch was refused; finish_reason is then "error".
    error: RequestError | None = None


@dataclass
class StreamOutput:
    """What one completion gained since the last increment."""

    request_id: str
    prompt_index: int  # position of the prompt in the list given to `stream`
    index: int  # which of the n completions
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: RequestError | None = None  # why the request ended early; finish_reason is then "error"
