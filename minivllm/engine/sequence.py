"""A sequence: one completion in the making, as the scheduler and the block manager see it. Plain
Python.

One idea carries the engine: a sequence has `num_computed_tokens`, and each step computes some more
of its tokens. Decode is the case of one token; a prefix-cache hit starts the count above 0;
preemption sets it back to 0; proposals of speculative decoding raise it by several, and those that
the step rejects lower it again. Taught in notebooks/05_scheduler.ipynb."""

import enum
from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

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
    #: What else must be equal for two sequences to share cached blocks: the request's cache_salt.
    extra_keys: tuple[str, ...] = ()

    status: SequenceStatus = SequenceStatus.WAITING
    num_prompt_tokens: int = 0  # 0: all of token_ids
    #: tokens whose K and V are in the cache once every step scheduled so far has run
    num_computed_tokens: int = 0
    #: of these, how many the prefix cache supplied when the sequence was last admitted
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    #: Guesses at the tokens that follow, for the next step to verify; see `Scheduler.propose`.
    proposed_token_ids: list[int] = field(default_factory=list)
    #: `SchedulerStats.num_steps` at the last step that computes some of it; 0: none yet.
    last_step: int = 0
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
        follows that one, and 0 while a step verifies proposals, for nobody knows what follows them.
        """
        num_tokens = self.num_tokens
        if num_tokens >= self.max_num_tokens:
            return 0
        # Below 0 while several proposals are verified: they count as computed, and are no tokens
        # of the sequence.
        num_left = num_tokens - self.num_computed_tokens
        return num_left if num_left > 0 else 0

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
    """One sequence's part in a step: compute `num_new_tokens` tokens from position `start` on.

    With k proposals the last k of these are the proposals, and the step samples k + 1 tokens: the
    one behind the last known token, and one behind each proposal.
    """

    sequence: Sequence
    start: int
    num_new_tokens: int
    #: of the first token this step samples; None where a prompt is still incomplete
    sample_position: int | None
    #: The sequence's when this was planned: results that come after another preemption leave the
    #: blocks alone.
    num_preemptions: int
    #: Guesses at the tokens from `sample_position` on, which the step computes and verifies.
    proposed_token_ids: abc.Sequence[int] = ()
    #: What the step gave the sequence; set by `SchedulerBase.update`.
    new_token_ids: abc.Sequence[int] = ()

    @property
    def end(self) -> int:
        return self.start + self.num_new_tokens

    @property
    def sample_positions(self) -> range:
        """Positions of the tokens that the step samples; all but the first hold only if the
        proposals before them are right.
        """
        first = self.sample_position
        if first is None:
            return range(0)
        return range(first, first + len(self.proposed_token_ids) + 1)

    @property
    def token_ids(self) -> list[int]:
        """The tokens that this part computes [num_new_tokens]; the last is PENDING where only the
        device knows it.
        """
        if not self.proposed_token_ids:
            return self.sequence.token_ids[self.start : self.end]
        return [
            *self.sequence.token_ids[self.start : self.sample_position],
            *self.proposed_token_ids,
        ]


def slots_of(items: Iterable[ScheduledSequence]) -> list[int]:
    """The slots of a step's sequences, which run and so have one each."""
    return cast("list[int]", [item.sequence.slot for item in items])


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
    has_prompts: bool = False
    has_decodes: bool = False
    has_proposals: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.items)

    @property
    def sampled(self) -> list[ScheduledSequence]:
        """The items that yield tokens, in order."""
        return [item for item in self.items if item.sample_position is not None]

    def __bool__(self) -> bool:
        return bool(self.items)


def max_steps(requests: Iterable[tuple[int, int]]) -> int:
    """Bound on the steps until all of these (prompt tokens, most output tokens) have finished.

    The oldest unfinished request gets at least one token in every step and is never preempted, so
    it ends within prompt + output steps; then the next is the oldest. Two more steps a request
    cover a step of waiting for a block that another request computes, and results that arrive one
    step late. (With proposals and results one step late, twice as many: a sequence rests while its
    proposals are verified.)
    """
    return sum(prompt + output + 2 for prompt, output in requests)
