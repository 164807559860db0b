"""Which replica gets a request.

The rule: of the replicas whose queue is at most `balance` requests longer than the shortest one,
the one that holds most of the prompt's leading blocks. Where several hold as many, or none holds
any, the one with the shortest queue, and between equal ones chance decides. So the turns of a
conversation stay together while that makes nobody wait much longer, and a replica that holds what
everybody asks for (a common system prompt) does not get everybody.

A replica says now and then which blocks it has. In between, `PrefixTable` remembers what was sent
where: those blocks will be there soon. Taught in notebooks/15_a_fleet.ipynb.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from minivllm.serving.replicas.prefixes import num_leading, unpack_hashes

#: How much longer than the shortest queue that of the best replica may be, in requests.
BALANCE = 4
#: Blocks per replica that are remembered as sent, and not yet said to be there: some 64 prompts of
#: 1,000 blocks.
MOST_EXPECTED = 65536


@dataclass(frozen=True)
class Candidate:
    """A replica that could take a request.

    load: its requests that run or wait. num_cached: how many of the prompt's leading blocks it has.
    """

    name: str
    load: int
    num_cached: int = 0


def rank(
    candidates: Sequence[Candidate], balance: int = BALANCE, dice: random.Random | None = None
) -> list[Candidate]:
    """The candidates, the best one first. dice: decides between equal ones.

    The others follow for the case that the first ones refuse.
    """
    if not candidates:
        return []
    least = min(candidate.load for candidate in candidates)
    draw = (dice or random).random

    def place(candidate: Candidate) -> tuple[bool, int, int, float]:
        is_too_long = candidate.load > least + balance
        gain = 0 if is_too_long else candidate.num_cached
        return is_too_long, -gain, candidate.load, draw()

    return sorted(candidates, key=place)


@dataclass
class _Known:
    """The blocks of one replica."""

    summary: bytes = b""
    hashes: frozenset[int] = frozenset()
    #: Sent there since: hash -> when, in seconds; the oldest first.
    expected: OrderedDict[int, float] = field(default_factory=OrderedDict)


class PrefixTable:
    """What is known of each replica's cached blocks.

    keep: seconds for which a block that was sent to a replica is expected there although its
    summary does not name it. It must be longer than a summary is old when it arrives.
    """

    def __init__(self, keep: float = 10.0) -> None:
        self.keep = keep
        self._known: dict[str, _Known] = {}

    def publish(self, name: str, summary: bytes) -> None:
        """Take in a replica's summary (`pack_hashes`), which replaces its last one."""
        known = self._known.setdefault(name, _Known())
        if summary != known.summary:
            known.summary, known.hashes = summary, unpack_hashes(summary)

    def note_sent(self, name: str, hashes: Sequence[int], now: float) -> None:
        """A prompt with these hashes was sent to a replica. now: in seconds, of any clock."""
        expected = self._known.setdefault(name, _Known()).expected
        for block_hash in hashes:
            expected[block_hash] = now
            expected.move_to_end(block_hash)
        while expected and (
            len(expected) > MOST_EXPECTED or next(iter(expected.values())) < now - self.keep
        ):
            expected.popitem(last=False)

    def num_cached(self, name: str, hashes: Sequence[int], now: float) -> int:
        """How many of a prompt's leading blocks a replica has, or will have soon."""
        known = self._known.get(name)
        if known is None:
            return 0
        count = num_leading(hashes, known.hashes)
        for block_hash in hashes[count:]:
            is_expected = known.expected.get(block_hash, now - self.keep - 1) >= now - self.keep
            if not is_expected and block_hash not in known.hashes:
                break
            count += 1
        return count

    def keep_only(self, names: Sequence[str]) -> None:
        """Forget every replica but these."""
        self._known = {name: self._known[name] for name in names if name in self._known}
