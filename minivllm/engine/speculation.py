"""Speculative decoding: who proposes tokens, for which sequences, and how many. Plain Python.

A decode step waits for the memory: it reads all weights to compute one token per sequence, and
computing a few tokens more takes hardly longer. So a `Proposer` guesses a sequence's next tokens,
and one step computes them all and samples after each of them (Leviathan et al., 2023, arXiv
2211.17192). The scheduler plans the proposals (`SchedulerBase.propose`, `verify`), the model runner
verifies them, and `update` takes the wrong ones back.

Exact. A sample is a function of logits, seed and position. A proposal is accepted if it equals the
token that the model itself samples there, so a proposer changes how many steps a text takes, and
never the text: at every temperature, with penalties, stop strings, grammars. A proposer may be
wrong, or malicious. (Rejection sampling, as in the paper, keeps only the distribution.)

How many. The `Speculator` asks for fewer tokens for a sequence whose proposals are often rejected,
and for none while so many sequences run that a step computes enough without them. It decides by
counts, never by the clock. With tensor parallelism rank 0 proposes for all ranks.

Steps do not run ahead of their results (`async_scheduling`) with speculation: a proposal follows
known tokens, and a step with proposals gives an unknown number of tokens. Steps of decodes with
proposals replay CUDA graphs that have room for the most proposals (`engine/cuda_graphs.py`).
Taught in notebooks/13_speculative_decoding.ipynb.
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass

from minivllm.config import SpeculativeConfig
from minivllm.engine.scheduler import SchedulerBase
from minivllm.engine.sequence import ScheduledSequence, Sequence
from minivllm.errors import ProposalError
from minivllm.parallel.group import SINGLE, TensorParallelGroup

#: What is known of a sequence's rate of acceptance at first: so many accepted of so many tries.
FIRST_GUESS = (2.0, 2.5)
#: The weight of older tries, per step with proposals.
MEMORY = 0.85
#: A sequence that is worth no proposal gets one token proposed all the same, once in so many steps:
#: its text may have become easier.
PROBE_INTERVAL = 16


class Proposer:
    """Guesses the next tokens of sequences. Write a subclass; pass it as ``LLM(proposer=...)``.

    A proposer may keep what it likes between the calls. It may not change the sequences.
    """

    #: The i-th token after the known ones is proposed if it is accepted with at least this
    #: probability. It is about what one more token costs, proposed and verified, as a share of a
    #: step.
    least_chance = 0.2

    def propose(
        self, sequences: abc.Sequence[Sequence], num_tokens: abc.Sequence[int]
    ) -> list[list[int]]:
        """Return a list of token ids for each sequence: guesses of the tokens that follow.

        sequences: those that decode in the next step. All their `token_ids` are known; `params` and
        `seed` say how the next token is sampled. num_tokens: for each of them the most tokens that
        are of use, at least 1; longer lists are cut. An empty list is no guess.
        """
        raise TypeError(f"{type(self).__name__} proposes nothing: write a `propose` method.")

    def restart(self) -> None:
        """Forget all sequences. Called after an interrupt, perhaps in the middle of `propose`."""

    def release(self) -> None:
        """Free all memory. Called when the engine is closed."""


class NgramProposer(Proposer):
    """Prompt lookup: what followed when the last tokens occurred before (Saxena, 2023).

    It costs no model, and is right where a text repeats itself or its prompt: summaries, edits of a
    text, code. longest, shortest: how many of the last tokens are searched for, the most first.
    """

    # Only the verifying costs something.
    least_chance = 0.08

    def __init__(self, longest: int, shortest: int) -> None:
        self.longest, self.shortest = longest, shortest
        #: seq_id -> its tokens, each as one character: Python's search of strings is fast.
        self._texts: dict[int, str] = {}

    def propose(
        self, sequences: abc.Sequence[Sequence], num_tokens: abc.Sequence[int]
    ) -> list[list[int]]:
        """Look each sequence up in itself."""
        before, self._texts = self._texts, {}
        found = []
        for seq, count in zip(sequences, num_tokens, strict=True):
            text = before.get(seq.seq_id, "")
            text += "".join(map(chr, seq.token_ids[len(text) :]))
            self._texts[seq.seq_id] = text
            found.append(self.look_up(text, count))
        return found

    def look_up(self, text: str, count: int) -> list[int]:
        """The count tokens that followed the newest other occurrence of text's end, or none."""
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            place = text.rfind(text[-size:], 0, len(text) - 1)
            if place >= 0:
                # Where the text runs out, it goes on with what has just been proposed: the end
                # repeats itself.
                text = text[place + size :]
                period = len(text)
                return [ord(text[i % period]) for i in range(count)]
        return []

    def restart(self) -> None:
        self._texts = {}


@dataclass(slots=True)
class Pace:
    """How often the proposals for a sequence are right, and how many are worth their cost."""

    num_accepted: float = FIRST_GUESS[0]
    #: Proposals that were looked at: the accepted ones, and the first wrong one.
    num_tried: float = FIRST_GUESS[1]
    #: Steps since the last proposal, while none is worth its cost.
    num_rested: int = 0

    def num_tokens(self, most: int, least_chance: float) -> int:
        """The number of tokens to propose next, from 0 to most.

        least_chance: see `Proposer`.
        """
        rate = min(self.num_accepted / self.num_tried, 0.999)
        count = int(math.log(least_chance) / math.log(rate)) if rate > 0 else 0
        if count:
            return min(count, most)
        self.num_rested += 1
        return int(self.num_rested >= PROBE_INTERVAL)

    def note(self, num_proposed: int, num_accepted: int) -> None:
        """Take in what a step has accepted."""
        self.num_accepted = MEMORY * self.num_accepted + num_accepted
        self.num_tried = MEMORY * self.num_tried + min(num_accepted + 1, num_proposed)
        self.num_rested = 0


class Speculator:
    """Asks a proposer between the steps, and learns from what they accept.

    config: with a num_speculative_tokens and a disable_by_batch_size. vocab_size: the number of
    valid token ids. proposer: None on the ranks other than 0.
    """

    def __init__(
        self,
        proposer: Proposer | None,
        config: SpeculativeConfig,
        vocab_size: int,
        group: TensorParallelGroup = SINGLE,
    ) -> None:
        self.proposer, self.group, self.vocab_size = proposer, group, vocab_size
        self.num_tokens = config.num_speculative_tokens or 1
        self.largest_batch = config.disable_by_batch_size or 1
        #: seq_id -> how its proposals fare.
        self._paces: dict[int, Pace] = {}

    def propose(self, scheduler: SchedulerBase) -> None:
        """Propose tokens for the running sequences. Call it before each `schedule`.

        Raises `ProposalError` if the proposer returns what are no lists of token ids.
        """
        running = scheduler.running
        if not running or len(running) > self.largest_batch:
            return
        wanted: list[tuple[Sequence, int]] = []
        if self.proposer is not None:
            wanted = [(seq, count) for seq in running if (count := self._num_useful(seq))]
        proposals: abc.Sequence[tuple[int, list[int]]] = self._ask(wanted) if wanted else []
        if self.group.size > 1:
            _, proposals = self.group.broadcast(0, proposals)
        by_id = {seq.seq_id: seq for seq in running} if proposals else {}
        for seq_id, token_ids in proposals:
            scheduler.propose(by_id[seq_id], token_ids)

    def note(self, items: abc.Iterable[ScheduledSequence]) -> None:
        """Take in the results of a step with proposals."""
        for item in items:
            pace = self._paces.get(item.sequence.seq_id)
            if pace is not None and item.proposed_token_ids:
                pace.note(len(item.proposed_token_ids), item.num_accepted)

    def forget(self, seq_id: int) -> None:
        """Forget a sequence that has ended."""
        self._paces.pop(seq_id, None)

    def restart(self) -> None:
        """Forget all sequences, after an interrupt."""
        self._paces = {}
        if self.proposer is not None:
            self.proposer.restart()

    def release(self) -> None:
        """Free the proposer's memory."""
        if self.proposer is not None:
            self.proposer.release()

    def _num_useful(self, seq: Sequence) -> int:
        """The most proposals that are of use to a running sequence now."""
        # The rest of a prompt comes first. Another step's token is not known yet.
        if seq.num_uncomputed_tokens != 1 or seq.has_pending_token:
            return 0
        # A step samples one token more than there are proposals.
        room = min(self.num_tokens, seq.max_num_tokens - seq.num_tokens - 1)
        if room < 1:
            return 0
        pace = self._paces.get(seq.seq_id)
        if pace is None:
            pace = self._paces[seq.seq_id] = Pace()
        assert self.proposer is not None
        return pace.num_tokens(room, self.proposer.least_chance)

    def _ask(self, wanted: list[tuple[Sequence, int]]) -> list[tuple[int, list[int]]]:
        """(seq_id, proposals) for each sequence that gets some."""
        assert self.proposer is not None
        sequences, counts = [seq for seq, _ in wanted], [count for _, count in wanted]
        found = self.proposer.propose(sequences, counts)
        name = f"{type(self.proposer).__name__}.propose"
        if not isinstance(found, list | tuple) or len(found) != len(wanted):
            raise ProposalError(
                f"{name} must return one list per sequence, here {len(wanted)}, and returned"
                f" {found!r:.80}."
            )
        proposals = []
        for (seq, count), token_ids in zip(wanted, found, strict=True):
            if not hasattr(token_ids, "__getitem__") or isinstance(token_ids, str | dict):
                raise ProposalError(
                    f"{name} must return a list of token ids for each sequence, and returned"
                    f" {token_ids!r:.80} for one; an empty list is no guess."
                )
            checked = [self._checked(name, token_id) for token_id in token_ids[:count]]
            if checked:
                proposals.append((seq.seq_id, checked))
        return proposals

    def _checked(self, name: str, token_id: object) -> int:
        # NumPy's and torch's integers are numbers, too.
        number = token_id.__index__() if hasattr(token_id, "__index__") else -1
        if not 0 <= number < self.vocab_size:
            raise ProposalError(
                f"{name} proposed {token_id!r:.80}; a token id is an integer from 0 to"
                f" {self.vocab_size - 1}."
            )
        return number
