"""The results that a caller gets. Field names are vLLM's.

Taught in notebooks/11_using_minivllm.ipynb.
"""

from dataclasses import dataclass, field

from minivllm.errors import RequestError


@dataclass
class Logprob:
    """One token's natural-log probability at one position, before all edits and filters."""

    logprob: float
    rank: int | None = None  # 1 is the likeliest token at this position
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One completion of a prompt. A request with n > 1 has n completions."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    #: One dict per generated token. It always holds the chosen token.
    logprobs: list[dict[int, Logprob]] | None = None
    #: "stop" (end of sequence, stop token or stop string), "length", "abort" or "error"; None while
    #: the completion is running.
    finish_reason: str | None = None
    #: The stop string or stop token that ended the completion; None for end of sequence.
    stop_reason: str | int | None = None

    @property
    def finished(self) -> "Answer":
        """Whether the completion has ended. `finished()`, vLLM's form, works as well."""
        return Answer(self.finish_reason is not None)


class Answer(int):
    """A boolean that can be called, because vLLM has a method where minivllm has a property."""

    def __call__(self) -> bool:
        return bool(self)

    def __repr__(self) -> str:
        return repr(bool(self))


@dataclass
class RequestMetrics:
    """The times of one request's events, in seconds of `time.perf_counter`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    #: Tokens of the longest completion. TPOT divides by this number.
    num_generation_tokens: int = 0
    #: With speculative decoding: the proposals that were verified, and the right ones of them.
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first step that computed a token of the request."""
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
    """The state of one request: so far, or final if `finished`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    #: One entry per prompt token. The first entry is None, because no token precedes it.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    #: Prompt tokens that were in the prefix cache when the request was first scheduled.
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    #: Why this request of a batch was refused. finish_reason is then "error".
    error: RequestError | None = None


@dataclass
class StreamOutput:
    """The new text and tokens of one completion since the last piece."""

    request_id: str
    #: Position of the prompt in the list given to `stream`.
    prompt_index: int
    #: The index of this completion among the n completions.
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    #: Why the request ended early. finish_reason is then "error".
    error: RequestError | None = None
