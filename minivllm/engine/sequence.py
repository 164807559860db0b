"""A sequence: one completion in the making, as the scheduler and the block manager see it. Plain
Python.

One idea carries the engine: a sequence has `num_computed_tokens`, and each step computes some more
of its tokens. Decode is the case of one token; a prefix-cache hit starts the count above 0;
preemption sets it back to 0. Taught in notebooks/05_scheduler.ipynb."""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from minivllm.sampling_params import SamplingParams

#: Stands in `token_ids` for a token that a step in flight will sample: its place is known, its
#: value is not.
PENDING = -1


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """Counts are derived from `token_ids` wherever they can be, so that they cannot disagree with
    it.
    """

    seq_id: int  # arrival order; also the key of everything kept per sequence
    token_ids: list[int]  # prompt, then output; the last may be PENDING
    params: SamplingParams
    #: Tokens that end the sequence: end-of-sequence unless ignored, and the request's stop tokens.
    stop_ids: frozenset[int] = frozenset()
    max_num_tokens: int = 1 << 30  # the sequence ends at this many tokens, prompt included
    seed: int = 0  # key of the random numbers; see kernels/sampling.py
    request_id: str = ""  # whose it is, for traces
    index: int = 0  # which of the request's completions
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the output may not complete

    status: SequenceStatus = SequenceStatus.WAITING
    num_prompt_tokens: int = 0  # 0: all of token_ids
    #: tokens whose K and V are in the cache once every step scheduled so far has run
    num_computed_tokens: int = 0
    #: of these, how many the prefix cache supplied when the sequence was last admitted
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    block_table: list[int] = field(default_factory=list)
    #: Chained hashes of the full blocks of known tokens; grown by the block manager, kept across
    #: preemptions.
    block_hashes: list[int] = field(default_factory=list)
    slot: int | None = None  # row of the runner's per-sequence tensors while running
    finish_reason: str | None = None  # "stop", "length", "abort" or "error" once finished
    stop_reason: str | int | None = None  # the stop string or token

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def has_pending_token(self) -> bool:
        return self.token_ids[-1] == PENDING

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens left to compute now; 0 once the last token it may have is planned, for nothing
        follows that one.
        """
        num_tokens = self.num_tokens
        return 0 if num_tokens >= self.max_num_tokens else num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_pending(self) -> int:
        """Make room for the token that the step being planned will sample; returns its position."""
        position = len(self.token_ids)
        self.token_ids.append(PENDING)
        return position


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """One sequence's part in a step: compute `num_new_tokens` tokens from position `start` on."""

    sequence: Sequence
    start: int
    num_new_tokens: int
    #: of the token this step samples; None where a prompt is still incomplete
    sample_position: int | None
    #: `num_preemptions` when planned: results that come after a preemption leave the blocks alone
    generation: int

    @property
    def end(self) -> int:
        return self.start + self.num_new_tokens


@dataclass(eq=False, slots=True)
class ScheduledBatch:
    """What one step computes."""

    items: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    #: entered `running` now: their slots are not theirs yet
    admitted: list[Sequence] = field(default_factory=list)
    #: Hashes of the prompt blocks that this step computes: nobody may read them yet, and nobody
    #: need compute them too.
    block_hashes: set[int] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.items)

    @property
    def sampled(self) -> list[ScheduledSequence]:
        """The items that yield a token, in order."""
        return [item for item in self.items if item.sample_position is not None]

    def __bool__(self) -> bool:
        return bool(self.items)


def max_steps(requests: Iterable[tuple[int, int]]) -> int:
    """Bound on the steps until all of these (prompt tokens, most output tokens) have finished.

    The oldest unfinished request gets at least one token in every step and is never preempted, so
    it ends within prompt + output steps; then the next is the oldest. Two more steps a request
    cover a step of waiting for a block that another request computes, and results that arrive one
    step late.
    """
    return sum(prompt + output + 2 for prompt, output in requests)
