"""Several engines behind one router, simulated: real schedulers and block managers, a calculated
clock, and people who talk with a model turn by turn.

    from minivllm.bench.conversations import TraceSettings, draw_conversations
    from minivllm.course.sim.fleet import Fleet

    fleet = Fleet(3, lambda asked, engines: min(engines, key=lambda engine: engine.load))
    fleet.play(draw_conversations(TraceSettings()))
    print(fleet.hit_rate, fleet.imbalance)

A router is a function of a request and of the engines that take requests; it returns one of them.
What happens at a set time (an engine dies, another one starts) is given to `Fleet.at`. Steps take
the time of a `CostModel`; the router, the network and sampling take none. Taught in
notebooks/15_a_fleet.ipynb.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from minivllm.bench.conversations import Conversation
from minivllm.course.sim.simulator import H200, CostModel, Limits
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.scheduler import ScheduledBatch, Scheduler
from minivllm.engine.sequence import Sequence as EngineSequence
from minivllm.errors import SchedulerStalledError
from minivllm.sampling_params import SamplingParams
from minivllm.serving.replicas.prefixes import num_leading, pack_hashes, prompt_hashes

#: Seconds after which a person asks again whose answer has ended with an error.
AGAIN = 1.0
_MASK = 0xFFFFFFFF


@dataclass
class Asked:
    """One request, from the time at which it is sent. Times are in seconds.

    hashes: of the prompt's full blocks (`prompt_hashes`). engine: the name of the one that has it.
    num_cached: prompt tokens that it need not compute. tries: how many engines got it. failed:
    whether its engine died after the first token.
    """

    conversation: int
    turn: int
    time: float
    token_ids: list[int]
    answer: list[int]
    hashes: list[int]
    engine: int = -1
    num_cached: int = 0
    tries: int = 0
    token_times: list[float] = field(default_factory=list)
    failed: bool = False
    end: float = float("inf")
    #: Called with the request when it has ended.
    on_end: Callable[[Asked], None] = field(default=lambda asked: None, repr=False)

    @property
    def ttft(self) -> float:
        """Time to first token; infinite where there was none."""
        return self.token_times[0] - self.time if self.token_times else float("inf")

    @property
    def tpot(self) -> float:
        """Time per token after the first one; 0 for an answer of one token."""
        times = self.token_times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0

    @property
    def gaps(self) -> list[float]:
        """The times between its tokens."""
        return [b - a for a, b in pairwise(self.token_times)]


@dataclass(frozen=True)
class Step:
    """One step of an engine. prompt_tokens, decodes: what it computed."""

    begin: float
    end: float
    prompt_tokens: int
    decodes: int


class _Table(dict[int, int]):
    """A block manager's table of hashes, with their lowest 32 bits kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.low: set[int] = set()

    def __setitem__(self, block_hash: int, block_id: int) -> None:
        super().__setitem__(block_hash, block_id)
        self.low.add(block_hash & _MASK)

    def __delitem__(self, block_hash: int) -> None:
        super().__delitem__(block_hash)
        self.low.discard(block_hash & _MASK)


class Engine:
    """One engine of a fleet: a scheduler, a block manager, and what it has done so far."""

    def __init__(self, name: int, limits: Limits, cost: CostModel) -> None:
        self.name, self.cost = name, cost
        self.block_manager = BlockManager(limits.num_blocks, limits.block_size)
        self.block_manager.hash_to_block = self._table = _Table()
        self.scheduler = Scheduler(
            self.block_manager, limits.max_num_seqs, limits.max_num_batched_tokens
        )
        #: What it works on: seq_id -> request.
        self.requests: dict[int, Asked] = {}
        self.steps: list[Step] = []
        self.is_alive, self.batch = True, None
        self.num_cached = 0

    @property
    def load(self) -> int:
        """Its requests that run or wait."""
        return len(self.requests)

    @property
    def num_computed(self) -> int:
        """The tokens that it has computed, of prompts and of answers."""
        return sum(step.prompt_tokens + step.decodes for step in self.steps)

    def blocks_of(self, hashes: Sequence[int]) -> int:
        """How many leading blocks of a prompt it has in its cache now."""
        return num_leading(hashes, self._table.low)

    def summary(self) -> bytes:
        """What it publishes about its cache: 4 bytes per block (`pack_hashes`)."""
        return pack_hashes(self.block_manager.hash_to_block)

    def begin_step(self, now: float) -> float:
        """Plan a step. Returns when it will end; raises `SchedulerStalledError` if it is empty."""
        self.batch = batch = self.scheduler.schedule()
        if not batch:
            raise SchedulerStalledError(f"engine {self.name}: {self.load} requests, an empty step")
        seconds = self.cost.seconds((item.start, item.num_new_tokens) for item in batch.items)
        decodes = sum(item.start >= item.sequence.num_prompt_tokens for item in batch.items)
        tokens = sum(item.num_new_tokens for item in batch.items)
        self.steps.append(Step(now, now + seconds, tokens - decodes, decodes))
        return now + seconds

    def end_step(self, now: float) -> list[Asked]:
        """Hand out the tokens of the step. Returns the requests that have all of theirs."""
        batch = self.batch
        assert isinstance(batch, ScheduledBatch)
        self.batch = None
        tokens = []
        for item in batch.sampled:
            asked = self.requests[item.sequence.seq_id]
            tokens.append([asked.answer[len(asked.token_times)]])
            if not asked.token_times:
                asked.num_cached = item.sequence.num_cached_tokens
                self.num_cached += asked.num_cached
            asked.token_times.append(now)
        self.scheduler.update(batch, tokens)
        done = [item.sequence.seq_id for item in batch.sampled if item.sequence.is_finished]
        return [self.requests.pop(seq_id) for seq_id in done]


#: Chooses one of the engines for a request.
Router = Callable[[Asked, Sequence[Engine]], Engine]


class Fleet:
    """num_engines engines behind a router, and everything that they were asked.

    limits: of each engine, as in `simulate`. cost: of their steps.
    """

    def __init__(
        self, num_engines: int, router: Router, cost: CostModel = H200, **limits: int
    ) -> None:
        self.router, self.cost, self.limits = router, cost, Limits(**limits)
        self.now = 0.0
        #: All that there have been, those that take requests, and all requests.
        self.all: list[Engine] = []
        self.engines: list[Engine] = []
        self.requests: list[Asked] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        for _ in range(num_engines):
            self.start()

    def at(self, time: float, what: Callable[[], object]) -> None:
        """Do something at a time."""
        self._count += 1
        heapq.heappush(self._events, (time, self._count, what))

    def play(self, conversations: Iterable[Conversation], seed: int = 0) -> Fleet:
        """Have these conversations, to the end of all of them. seed: of the answers' tokens."""
        for talk in conversations:
            _Talk(self, talk, random.Random(f"{seed}:{talk.number}:answers")).begin()
        self.run()
        return self

    def run(self) -> None:
        """Let time pass until nothing is left to happen."""
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()

    # --- engines ----------------------------------------------------------------------------------

    def start(self) -> Engine:
        """A new engine with an empty cache; it takes requests from now on."""
        engine = Engine(len(self.all), self.limits, self.cost)
        self.all.append(engine)
        self.engines.append(engine)
        return engine

    def drain(self, engine: Engine) -> None:
        """Give an engine no more requests. It finishes what it has."""
        self.engines.remove(engine)

    def kill(self, engine: Engine) -> None:
        """End an engine at once.

        What has not begun goes to another engine; what has begun ends with an error.
        """
        if engine in self.engines:
            self.engines.remove(engine)
        engine.is_alive = False
        lost, engine.requests = list(engine.requests.values()), {}
        for asked in lost:
            if asked.token_times:
                asked.failed, asked.end = True, self.now
                asked.on_end(asked)
            else:
                self.send(asked)

    # --- requests ---------------------------------------------------------------------------------

    def ask(self, asked: Asked) -> None:
        """Take a new request."""
        self.requests.append(asked)
        self.send(asked)

    def send(self, asked: Asked) -> None:
        """Let the router choose an engine; without any engine, wait until there is one."""
        if not self.engines:
            self.at(self.now + AGAIN, lambda: self.send(asked))
            return
        self.hand_over(asked, self.router(asked, self.engines), len(asked.answer))

    def hand_over(self, asked: Asked, engine: Engine, num_tokens: int) -> None:
        """Put a request into an engine's queue, until its answer has num_tokens tokens.

        The answer goes on after the tokens that it has.
        """
        self._count += 1
        asked.engine, asked.tries = engine.name, asked.tries + 1
        known = [*asked.token_ids, *asked.answer[: len(asked.token_times)]]
        most = len(asked.token_ids) + num_tokens
        seq = EngineSequence(self._count, known, SamplingParams(), max_num_tokens=most)
        engine.requests[seq.seq_id] = asked
        engine.scheduler.add(seq)
        self._go_on(engine)

    def _go_on(self, engine: Engine) -> None:
        if engine.batch is None and engine.is_alive and engine.scheduler.has_unfinished:
            self.at(engine.begin_step(self.now), lambda: self._step_ended(engine))

    def _step_ended(self, engine: Engine) -> None:
        if not engine.is_alive:
            return
        for asked in engine.end_step(self.now):
            self.left(asked, engine)
        self._go_on(engine)

    def left(self, asked: Asked, engine: Engine) -> None:
        """An engine has given a request all the tokens that it was handed over for."""
        asked.end = self.now
        asked.on_end(asked)

    # --- numbers ----------------------------------------------------------------------------------

    @property
    def answered(self) -> list[Asked]:
        """The requests that got their whole answers."""
        return [asked for asked in self.requests if not asked.failed]

    @property
    def hit_rate(self) -> float:
        """The share of the prompts' tokens that a cache knew."""
        prompts = sum(len(asked.token_ids) for asked in self.requests)
        return sum(asked.num_cached for asked in self.requests) / prompts

    @property
    def imbalance(self) -> float:
        """The tokens that the busiest engine has computed, divided by the mean."""
        work = [engine.num_computed for engine in self.all]
        return max(work) * len(work) / sum(work)


class _Talk:
    """A conversation as its person has it."""

    def __init__(self, fleet: Fleet, talk: Conversation, rng: random.Random) -> None:
        self.fleet, self.talk, self.rng = fleet, talk, rng
        self.answers: list[list[int]] = []

    def begin(self) -> None:
        self.fleet.at(self.talk.start, self.send)

    def send(self) -> None:
        number, fleet = len(self.answers), self.fleet
        turn = self.talk.turns[number]
        ids = self.talk.prompt(number, self.answers)
        answer = self.rng.choices(range(1 << 16), k=turn.answer)
        hashes = prompt_hashes(ids, fleet.limits.block_size)
        asked = Asked(self.talk.number, number, fleet.now, ids, answer, hashes)
        asked.on_end = self.ended
        fleet.ask(asked)

    def ended(self, asked: Asked) -> None:
        if asked.failed:
            self.fleet.at(self.fleet.now + AGAIN, self.send)
            return
        self.answers.append(asked.answer)
        if len(self.answers) < len(self.talk.turns):
            pause = self.talk.turns[len(self.answers)].pause
            self.fleet.at(self.fleet.now + pause, self.send)
