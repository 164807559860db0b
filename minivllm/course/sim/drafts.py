"""Two tiny language models with caches: speculative decoding without an engine, to look into.

A `CachedModel` computes rows of logits, and keeps what it has computed, as a KV cache does. Each
row depends on every token before it: what does not belong into the cache changes the text. A draft
is the same model with some noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_WORD = (1 << 64) - 1


def _mixed(number: int) -> int:
    """A well-mixed 64-bit number (splitmix64; Steele, Lea and Flood, 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _WORD
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _WORD
    return number ^ number >> 31


def _share(number: int) -> float:
    """A number from 0 to 1, without 0 and 1."""
    return ((_mixed(number) >> 12) + 0.5) / (1 << 52)


@dataclass
class CachedModel:
    """A model with a cache.

    seed: models with the same seed write the same, apart from noise: how much a draft's logits
    differ from those of its target.
    """

    seed: int
    noise: float = 0.0
    vocab_size: int = 12
    _token_ids: list[int] = field(default_factory=list, repr=False)
    _states: list[int] = field(default_factory=list, repr=False)

    @property
    def cache(self) -> list[int]:
        """The tokens whose keys and values the cache holds, in order: a copy, to look at."""
        return list(self._token_ids)

    @property
    def num_computed(self) -> int:
        return len(self._token_ids)

    def compute(self, token_ids: Iterable[int]) -> list[list[float]]:
        """Compute tokens behind those in the cache. A row of logits [vocab_size] after each."""
        rows = []
        for token_id in token_ids:
            state = self._states[-1] if self._states else _mixed(self.seed)
            state = _mixed(state ^ (token_id + 1) * 0x2545F4914F6CDD1D & _WORD)
            self._token_ids.append(token_id)
            self._states.append(state)
            rows.append([self._logit(state, i) for i in range(self.vocab_size)])
        return rows

    def rewind(self, count: int) -> None:
        """Keep the first `count` tokens in the cache. ValueError if it holds fewer."""
        if not 0 <= count <= self.num_computed:
            raise ValueError(f"the cache holds {self.num_computed} tokens; it cannot keep {count}")
        del self._token_ids[count:], self._states[count:]

    def _logit(self, state: int, token_id: int) -> float:
        own = 5 * _share(state + token_id)
        return own + self.noise * 5 * _share(state ^ 0x5DEECE66D + token_id << 3)


def picker(seed: int, temperature: float) -> Callable[[list[float], int], int]:
    """A function pick(logits, position): the token that is sampled there.

    It is a pure function: the random number comes from seed and position. Temperature 0 takes the
    likeliest token.
    """

    def pick(logits: list[float], position: int) -> int:
        if temperature == 0:
            return logits.index(max(logits))
        best = max(logits)
        weights = [math.exp((logit - best) / temperature) for logit in logits]
        left = _share(_mixed(seed) ^ position) * sum(weights)
        for token_id, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return token_id
        return len(weights) - 1

    return pick
