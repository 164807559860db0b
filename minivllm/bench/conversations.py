"""Conversations as a load: many people who talk with a model at the same time, turn by turn.

The prompt of a turn is everything so far: the system prompt, which the conversations of a group
share, and all messages and answers. So almost all of a later turn's prompt is known to the replica
that served the turn before, and to no other. The prompts are token ids, the same for the same seed;
what the model answers is not known here, only how long it is.

Nothing here needs torch or Ray: a simulator can play the same conversations. Taught in
notebooks/15_a_fleet.ipynb.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.serving.replicas.prefixes import num_leading, prompt_hashes

#: Least and most of a number that is drawn.
Span = tuple[int, int]


@dataclass(frozen=True)
class TraceSettings:
    """What is drawn. Lengths are in tokens, times in seconds.

    groups: of conversations with the same system prompt. rate: conversations that begin per second
    (a Poisson process). pause: the mean time for which a person reads and writes between an answer
    and the next message (exponential).
    """

    conversations: int = 60
    groups: int = 4
    turns: Span = (3, 6)
    system: int = 64
    first: Span = (100, 300)
    later: Span = (20, 80)
    answer: Span = (16, 48)
    rate: float = 2.0
    pause: float = 2.0
    vocab: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    """A message, how long the answer to it is, and the pause before it."""

    message: list[int]
    answer: int
    pause: float


@dataclass(frozen=True)
class Conversation:
    """One conversation. start: when its first turn is sent, in seconds after the trace's start."""

    number: int
    start: float
    system: list[int]
    turns: list[Turn]

    def prompt(self, turn: int, answers: Sequence[Sequence[int]]) -> list[int]:
        """The token ids of a turn, after these answers to the turns before it."""
        ids = list(self.system)
        for message, answer in zip(self.turns[:turn], answers, strict=True):
            ids += [*message.message, *answer]
        return ids + self.turns[turn].message

    @property
    def most_tokens(self) -> int:
        """The length at its end."""
        return len(self.system) + sum(len(t.message) + t.answer for t in self.turns)


def draw_conversations(trace: TraceSettings) -> list[Conversation]:
    """The conversations of a trace, in order of their start."""
    rng = random.Random(f"{trace.seed}:conversations")

    def tokens(count: int) -> list[int]:
        return rng.choices(range(trace.vocab), k=count)

    systems = [tokens(trace.system) for _ in range(trace.groups)]
    found, start = [], 0.0
    for number in range(trace.conversations):
        turns = []
        for turn in range(rng.randint(*trace.turns)):
            message = tokens(rng.randint(*(trace.later if turn else trace.first)))
            pause = rng.expovariate(1 / trace.pause) if turn and trace.pause else 0.0
            turns.append(Turn(message, rng.randint(*trace.answer), pause))
        found.append(Conversation(number, start, rng.choice(systems), turns))
        start += rng.expovariate(trace.rate)
    return found


def cacheable(
    prompts: Sequence[Sequence[int]], block_size: int, answers: Sequence[Sequence[int]] = ()
) -> int:
    """How many tokens of these prompts one endless cache would have known, asked in this order.

    answers: to the prompts, whose blocks are then known, too. An answer's last token is not
    computed, so its block is not full.
    """
    known: set[int] = set()
    total = 0
    for number, prompt in enumerate(prompts):
        total += block_size * num_leading(prompt_hashes(prompt, block_size), known)
        # `prompt_hashes` leaves a prompt's last token out, and so an answer's.
        written = [*prompt, *answers[number]] if answers else prompt
        known.update(prompt_hashes(written, block_size))
    return total
