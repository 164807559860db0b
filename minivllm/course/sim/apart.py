"""Prefill and decode apart, simulated: some engines compute prompts, others write the answers.

Between them a request's keys and values travel over a link. They arrive as what they are for a
block manager: cached blocks. So the engine that writes the answer finds its prompt in its cache, as
after a hit; of a prompt's last block, which is not full, it computes the tokens again. Taught in
notebooks/15_a_fleet.ipynb.
"""

from __future__ import annotations

from dataclasses import dataclass

from minivllm.course.sim.fleet import Asked, Engine, Fleet
from minivllm.course.sim.simulator import H200, CostModel
from minivllm.engine.sequence import Sequence
from minivllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Link:
    """What moves, and how fast: bytes of K and V per token, and bytes per second.

    An engine that computes prompts sends one request's cache after the other.
    """

    kv_bytes: float
    bandwidth: float

    def seconds(self, num_tokens: int) -> float:
        """How long the keys and values of so many tokens travel."""
        return num_tokens * self.kv_bytes / self.bandwidth


class Apart(Fleet):
    """num_prefill engines that compute prompts, and num_decode that write the answers.

    Among equals, the one with the fewest requests gets the next one. A request's first token comes
    from the first kind, all others from the second.
    """

    def __init__(
        self, num_prefill: int, num_decode: int, link: Link, cost: CostModel = H200, **limits: int
    ) -> None:
        super().__init__(num_prefill + num_decode, lambda _, ours: _shortest(ours), cost, **limits)
        self.link = link
        self.engines, self.decoders = self.all[:num_prefill], self.all[num_prefill:]
        #: When each link is free again, and the bytes that have moved.
        self._free = dict.fromkeys((engine.name for engine in self.engines), 0.0)
        self.num_bytes = 0.0

    def send(self, asked: Asked) -> None:
        """Hand a request over for its first token."""
        self.hand_over(asked, _shortest(self.engines), 1)

    def left(self, asked: Asked, engine: Engine) -> None:
        """After the first token, the cache travels; after the last one, the request has ended."""
        if engine in self.decoders or len(asked.answer) == 1:
            super().left(asked, engine)
            return
        begin = max(self.now, self._free[engine.name])
        self._free[engine.name] = begin + self.link.seconds(len(asked.token_ids))
        self.num_bytes += len(asked.token_ids) * self.link.kv_bytes
        self.at(self._free[engine.name], lambda: self._arrive(asked))

    def _arrive(self, asked: Asked) -> None:
        engine, count = _shortest(self.decoders), len(asked.token_ids)
        manager = engine.block_manager
        sent = Sequence(-1, asked.token_ids, SamplingParams())
        prefix = manager.find_cached_prefix(sent)
        # Without room nothing is stored, and the engine computes the prompt again.
        if manager.allocate(sent, count, prefix):
            manager.register_computed(sent, len(prefix) * manager.block_size, count)
            manager.free(sent)
        self.hand_over(asked, engine, len(asked.answer))


def _shortest(engines: list[Engine]) -> Engine:
    return min(engines, key=lambda engine: engine.load)
