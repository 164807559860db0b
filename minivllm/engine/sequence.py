"""A sequence: one completion, as the scheduler and the block manager see it. Plain Python.

One idea carries the engine: a sequence has `num_computed_tokens`, and each step computes some more
of its tokens. A decode computes one token. A prefix-cache hit starts the count above 0. Preemption
sets the count back to 0. Proposals of speculative decoding raise it by several tokens, and rejected
proposals lower it again. Taught in notebooks/05_scheduler.ipynb.
"""

import enum
from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

from minivllm.sampling_params import SamplingParams

#: Stands in `token_ids` for a token that a step in flight will sample: its position is known, its
#: value is not.
PENDING = -1


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """The state of one completion. Counts are derived from `token_ids` where possible."""

    #: Order of arrival, and the key of everything that is kept per sequence.
    seq_id: int
    #: Prompt, then output; the last token may be PENDING.
    token_ids: list[int]
    params: SamplingParams
    #: Tokens that end the sequence: end-of-sequence unless ignored, and the request's stop tokens.
    stop_ids: frozenset[int] = frozenset()
    #: The sequence ends at this many tokens, prompt included.
    max_num_tokens: int = 1 << 30
    #: Key of the random numbers; see kernels/sampling.py.
    seed: int = 0
    request_id: str = ""  # the request of this completion, for traces
    index: int = 0  # the index of this completion in its request
    #: Token sequences that the output must not contain.
    bad_words: tuple[tuple[int, ...], ...] = ()
    #: What else must be equal if two sequences share cached blocks: the request's cache_salt.
    extra_keys: tuple[str, ...] = ()

    status: SequenceStatus = SequenceStatus.WAITING
    num_prompt_tokens: int = 0  # 0: all of token_ids
    #: Tokens whose K and V are in the cache once every step that is planned so far has run.
    num_computed_tokens: int = 0
    #: The part of these that the prefix cache supplied when the sequence was last admitted.
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    #: Guesses of the next tokens, for the next step to verify; see `SchedulerBase.propose`.
    proposed_token_ids: list[int] = field(default_factory=list)
    #: `SchedulerStats.num_steps` at the last step that computes a part of it; 0: none yet.
    last_step: int = 0
    block_table: list[int] = field(default_factory=list)
    #: Chained hashes of the full blocks of known tokens. The block manager adds to them; they stay
    #: across preemptions.
    block_hashes: list[int] = field(default_factory=list)
    #: The row of the runner's per-sequence tensors, while running.
    slot: int | None = None
    #: "stop", "length", "abort" or "error" once finished.
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or token
    #: Why its grammar cannot go on. None: it can, or there is none.
    failure: str | None = None

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
        """The number of tokens left to compute now.

        It is 0 once the last permitted token is planned, because no token follows it. It is also 0
        while a step verifies proposals, because the tokens after them are not known.
        """
        num_tokens = self.num_tokens
        if num_tokens >= self.max_num_tokens:
            return 0
        # Negative while several proposals are verified: proposals count as computed, but are not
        # tokens of the sequence.
        num_left = num_tokens - self.num_computed_tokens
        return num_left if num_left > 0 else 0

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_pending(self) -> int:
        """Append a place for the token that the planned step will sample. Returns its position."""
        position = len(self.token_ids)
        self.token_ids.append(PENDING)
        return position


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """The part of one sequence in a step: compute `num_new_tokens` tokens from `start` on.

    With k proposals, the last k of these tokens are the proposals. The step then samples k + 1
    tokens: one after the last known token, and one after each proposal.
    """

    sequence: Sequence
    start: int
    num_new_tokens: int
    #: Position of the first token that this step samples; None while the prompt is incomplete.
    sample_position: int | None
    #: The sequence's `num_preemptions` when this part was planned. If the sequence was preempted
    #: since, the results do not touch its blocks.
    num_preemptions: int
    #: Guesses at the tokens from `sample_position` on, which the step computes and verifies.
    proposed_token_ids: abc.Sequence[int] = ()
    #: The tokens that the step gave to the sequence; set by `SchedulerBase.update`.
    new_token_ids: abc.Sequence[int] = ()
    #: How many of the proposals were right; set by `SchedulerBase.update`.
    num_accepted: int = 0

    @property
    def end(self) -> int:
        return self.start + self.num_new_tokens

    @property
    def sample_positions(self) -> range:
        """Positions of the tokens that the step samples.

        All positions after the first hold only if the proposals before them are right.
        """
        first = self.sample_position
        if first is None:
            return range(0)
        return range(first, first + len(self.proposed_token_ids) + 1)

    @property
    def token_ids(self) -> list[int]:
        """The tokens that this part computes, [num_new_tokens].

        The last token is PENDING if only the device knows it.
        """
        if not self.proposed_token_ids:
            return self.sequence.token_ids[self.start : self.end]
        return [
            *self.sequence.token_ids[self.start : self.sample_position],
            *self.proposed_token_ids,
        ]


def num_equal(proposals: abc.Sequence[int], tokens: abc.Sequence[int]) -> int:
    """The number of tokens up to the first one that is not the proposal."""
    count = 0
    for proposal, token in zip(proposals, tokens, strict=False):
        if proposal != token:
            break
        count += 1
    return count


def slots_of(items: Iterable[ScheduledSequence]) -> list[int]:
    """The slots of a step's sequences. Every sequence in a step runs, so it has a slot."""
    return cast("list[int]", [item.sequence.slot for item in items])


@dataclass(eq=False, slots=True)
class ScheduledBatch:
    """The sequences and tokens that one step computes."""

    items: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    #: Sequences that start to run in this step. The runner has not filled their slots yet.
    admitted: list[Sequence] = field(default_factory=list)
    #: Hashes of the prompt blocks that this step computes. Other sequences cannot read these blocks
    #: yet, and need not compute them.
    block_hashes: set[int] = field(default_factory=set)
    #: Whether the step computes prompt tokens, output tokens, and proposals. With these flags no
    #: item need be looked at.
    has_prompts: bool = False
    has_decodes: bool = False
    has_proposals: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.items)

    @property
    def sampled(self) -> list[ScheduledSequence]:
        """The items that yield tokens, in the order of `items`."""
        return [item for item in self.items if item.sample_position is not None]

    def __bool__(self) -> bool:
        return bool(self.items)


def max_steps(requests: Iterable[tuple[int, int]]) -> int:
    """Bound on the number of steps until all requests have finished.

    requests: (prompt tokens, largest number of output tokens) for each request.

    The oldest unfinished request gets at least one token in every step and is never preempted, so
    it ends within prompt + output steps. Then the next request is the oldest. Two more steps per
    request are added: one for a step that waits for a block of another request, and one for results
    that arrive one step late. (With proposals and late results the bound is twice as large, because
    a sequence rests while its proposals are verified.)
    """
    return sum(prompt + output + 2 for prompt, output in requests)
