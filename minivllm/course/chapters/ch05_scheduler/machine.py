"""A scheduler at work on a model that is a hash, compared with the rules in each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, NoReturn

from minivllm.course.chapters.ch05_scheduler.common import misuse, the_count
from minivllm.course.chapters.ch05_scheduler.moment import Moment, Plan
from minivllm.course.chapters.ch05_scheduler.rules import RIGHT
from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import CheckError, Mistake
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.sequence import ScheduledBatch, Sequence, SequenceStatus, max_steps
from minivllm.sampling_params import SamplingParams

#: How many steps that break a rule are enough to tell mistakes apart.
ENOUGH = 30


@dataclass
class Evidence:
    """Steps of a scheduler from the first one on that breaks the rules.

    symptom: what to raise when no suspect does the same. broken: how many steps break a rule.
    """

    symptom: Mistake | None = None
    seen: str = ""
    broken: int = 0
    steps: list[tuple[Moment, Plan]] = field(default_factory=list)

    def settle(self, suspects: Mapping[str, tuple], enough: int = 0) -> None:
        """Raise the mistake of the first suspect that plans all these steps as they were planned.

        Without a suspect, raise the symptom. Nothing is raised where no rule was broken, or in
        fewer steps than enough. suspects: as in `Exercise.suspects`, subclasses of
        SchedulerBase.
        """
        if self.symptom is None or self.broken < enough:
            return
        for name, (message, *policies) in suspects.items():
            if any(self._explains(policy) for policy in policies):
                raise Mistake(name, f"{self.seen}\n{message}")
        raise self.symptom

    def _explains(self, policy: type) -> bool:
        return all(moment.plan(policy) == plan for moment, plan in self.steps)


class Machine:
    """An engine without a model, with the learner's scheduler.

    An entry of the KV cache is a hash of all tokens up to there. A token follows from the entry
    before it, as read through the block table, so that a block that is wrong, stale or somebody
    else's changes the text.
    """

    def __init__(
        self,
        answer: type,
        blocks: int,
        size: int,
        places: int,
        budget: int,
        caching: bool,
        evidence: Evidence,
    ) -> None:
        self.size, self.places, self.budget, self.evidence = size, places, budget, evidence
        self.manager = BlockManager(blocks, size, caching)
        self.scheduler = answer(self.manager, places, budget)
        self._watch_preemptions()
        self.content: dict[tuple[int, int], int] = {}
        self.live: dict[int, Sequence] = {}
        self.texts: dict[int, list[int]] = {}
        self.number = -1
        self.last_batch: ScheduledBatch | None = None
        self.room = blocks * size
        self.told = (
            f"With a budget of {budget}, {the_count(places, 'place')}, {blocks} blocks of"
            f" {the_count(size, 'token')}" + ", prefix caching on" * caching
        )

    def fail(self, name: str, what: str, hint: str) -> NoReturn:
        raise Mistake(name, f"{self.told}: {what}\n{hint}")

    # --- what it does -----------------------------------------------------------------------------

    def add(self, prompt: list[int], num_output: int) -> Sequence:
        """A request arrives. Its prompt and answer are cut where the cache could not hold them."""
        prompt = prompt[: self.room - 1]
        end = min(len(prompt) + num_output, self.room)
        seq = Sequence(len(self.texts), list(prompt), SamplingParams(), max_num_tokens=end)
        text, chain = list(prompt), 0
        for token in prompt:
            chain = hash((chain, token))
        while len(text) < end:
            text.append(chain % 3)
            chain = hash((chain, text[-1]))
        self.live[seq.seq_id], self.texts[seq.seq_id] = seq, text
        self.scheduler.add(seq)
        if seq not in self.scheduler.waiting:
            self.fail(
                "lost-request",
                f"request {seq.seq_id} came, and is not in `waiting`.",
                "If you write an `add` of your own, call `super().add(seq)` in it.",
            )
        return seq

    def step(self) -> None:
        """The learner's scheduler plans a step, and the step is computed and judged."""
        scheduler = self.scheduler
        known = {i: seq.num_tokens for i, seq in self.live.items()}
        self.number += 1
        self.freed_by_hand.clear()
        moment = Moment(scheduler)
        try:
            batch = scheduler.schedule()
        except AssertionError as error:
            if not str(error):
                raise
            self._refused(moment, error)
        self._judge_queues(batch, known)
        plan = Plan.of(batch, scheduler)
        tokens = self._compute(batch)
        self._compare(moment, plan, batch)
        if not batch:
            # Nothing more can come of it.
            assert self.evidence.symptom is not None
            raise self.evidence.symptom
        self._finish(batch, tokens)

    def serve(self, suspects: Mapping[str, tuple]) -> None:
        """Step until all have finished; raises the Mistake that this shows."""
        try:
            while self.live:
                self.step()
        except CheckError:
            self.evidence.settle(suspects)
            raise
        self.evidence.settle(suspects)

    def reckless_step(self, rng: Random) -> None:
        """The check plans a step, by no rules: chunks of any length, and others beside them."""
        self.step_of(rng.choice((1, 1, 2, 3, 5, self.budget)) for _ in range(self.places))

    def step_of(self, counts: Iterable[int]) -> None:
        """The check plans a step: so many tokens for the first, the second, … request.

        Fewer where a request has no more, or the budget is used up; none where there are no blocks.
        """
        scheduler, batch, left = self.scheduler, ScheduledBatch(), self.budget
        self.number += 1
        for seq, most in zip([*scheduler.running, *scheduler.waiting], counts, strict=False):
            count = min(most, seq.num_uncomputed_tokens, left)
            if not count or not self.manager.allocate(seq, seq.num_computed_tokens + count):
                break
            if seq.slot is None:
                scheduler.running.append(scheduler.waiting.popleft())
                scheduler.start(batch, seq)
            scheduler.compute(batch, seq, count)
            left -= count
        if batch:
            self._finish(batch, self._compute(batch))

    def _finish(self, batch: ScheduledBatch, tokens: list[list[int]]) -> None:
        for item in self.scheduler.update(batch, tokens):
            if item.sequence.is_finished:
                del self.live[item.sequence.seq_id]

    def _compute(self, batch: ScheduledBatch) -> list[list[int]]:
        """Fill the cache, and sample. Mistake where a request computes what is not its own."""
        tokens = []
        for item in batch.items:
            if item.sequence in batch.admitted:
                self._require_cached(item.sequence, item.start)
        for item in batch.items:
            seq = item.sequence
            for position in range(item.start, item.end):
                block = self.manager.blocks[seq.block_table[position // self.size]]
                if block.ref_count != 1 or block.block_hash is not None:
                    self.fail(
                        "writes-shared-blocks",
                        f"in step {self.number} request {seq.seq_id} computes token {position},"
                        " which lies in a block from the prefix cache.",
                        "What is cached is counted in tokens: a block has block_size of them. Start"
                        " behind them; and only a waiting sequence may take a prefix.",
                    )
                before = self._entry(seq, position - 1, item.start) if position else 0
                self.content[block.block_id, position % self.size] = hash(
                    (before, seq.token_ids[position])
                )
            if item.sample_position is not None:
                token = self._entry(seq, item.end - 1, item.start) % 3
                tokens.append([token])
                if token != self.texts[seq.seq_id][item.sample_position]:
                    self.fail(
                        "wrong-tokens",
                        f"in step {self.number} request {seq.seq_id} writes another token than it"
                        " would alone.",
                        "It read K and V of somebody else. Is num_cached what `find_cached_prefix`"
                        " found, and did `allocate` get those blocks?",
                    )
        return tokens

    def _require_cached(self, seq: Sequence, start: int) -> None:
        """Whatever an admitted sequence skips must lie in blocks that the prefix cache knows."""
        for index in range(start // self.size):
            if self.manager.blocks[seq.block_table[index]].block_hash is None:
                self.fail(
                    "reads-what-nobody-wrote",
                    f"in step {self.number} request {seq.seq_id} computes from token {start} on,"
                    f" but token {index * self.size} before it was never computed in its blocks.",
                    "Only tokens in blocks from the prefix cache may be skipped: hand `allocate`"
                    " the blocks that `find_cached_prefix` found. They are good until the next"
                    " `allocate`, which may take them for somebody else.",
                )

    def _entry(self, seq: Sequence, position: int, start: int) -> int:
        key = (seq.block_table[position // self.size], position % self.size)
        if key not in self.content:
            self.fail(
                "reads-what-nobody-wrote",
                f"in step {self.number} request {seq.seq_id} computes from token {start} on, but"
                f" token {position} before it was never computed.",
                "Only tokens in blocks from the prefix cache may be skipped.",
            )
        return self.content[key]

    # --- how it judges ----------------------------------------------------------------------------

    def _watch_preemptions(self) -> None:
        """Have `start` refuse whom nobody has given up, and note whose blocks were freed by hand
        in this step.
        """
        start, give_up, free = self.scheduler.start, self.scheduler.give_up, self.manager.free
        self.freed_by_hand: set[int] = set()

        def started(batch: Any, seq: Any, num_cached: int = 0) -> None:
            self._require_given_up(seq, "is started a second time")
            start(batch, seq, num_cached)

        def given_up(batch: Any, seq: Any) -> None:
            before = set(self.freed_by_hand)
            give_up(batch, seq)
            self.freed_by_hand = before

        def freed(seq: Any) -> None:
            self.freed_by_hand.add(seq.seq_id)
            free(seq)

        self.scheduler.start, self.scheduler.give_up, self.manager.free = started, given_up, freed

    def _require_given_up(self, seq: Sequence, what: str) -> None:
        if seq.status is not SequenceStatus.RUNNING:
            return
        where = f"in step {self.number} request {seq.seq_id} {what}, and still counts as running."
        if seq.seq_id in self.freed_by_hand:
            self.fail(
                "freed-not-given-up",
                where,
                "Freeing its blocks is one half: it also has a place, and tokens that count as"
                " computed. `give_up` takes back all of it.",
            )
        self.fail(
            "never-given-up",
            where,
            "Who goes from `running` to `waiting` is preempted: call `give_up`, which takes back"
            " its blocks and its place.",
        )

    def _judge_queues(self, batch: Any, known: dict[int, int]) -> None:
        """What has one cause only: who is missing, who is there twice, who was not given up."""
        here = f"in step {self.number}"
        if not isinstance(batch, ScheduledBatch):
            self.fail(
                "wrong-type",
                f"schedule returned {show(batch)}.",
                "It returns the ScheduledBatch that it has filled.",
            )
        scheduler = self.scheduler
        if batch is self.last_batch:
            self.fail(
                "another-batch",
                f"{here} the batch of an earlier step is returned again.",
                "Each step is a new `ScheduledBatch`.",
            )
        self.last_batch = batch
        if any(other is not batch for other in scheduler.in_flight):
            self.fail(
                "another-batch",
                f"{here} `start` or `compute` wrote into another batch than the one returned.",
                "A step is one `ScheduledBatch`: make it once, hand it to all calls, return it.",
            )
        queued = [seq.seq_id for seq in [*scheduler.running, *scheduler.waiting]]
        if missing := sorted(set(self.live) - set(queued)):
            self._fail_lost(missing[0], batch, here)
        if twice := {i for i in queued if queued.count(i) > 1}:
            where = f"{here} request {min(twice)} stands in the queues twice."
            self.fail("queued-twice", where, "Who enters one queue leaves the other.")
        computed = {item.sequence.seq_id for item in batch.items}
        if idle := [seq.seq_id for seq in batch.admitted if seq.seq_id not in computed]:
            self.fail(
                "never-computed",
                f"{here} request {idle[0]} is started, and the step computes nothing of it.",
                "After `start` comes `compute`, with the tokens that its blocks were asked for.",
            )
        if batch.num_tokens > self.budget:
            shares = " + ".join(str(item.num_new_tokens) for item in batch.items)
            self.fail(
                "over-budget",
                f"{here} {batch.num_tokens} tokens are planned: {shares}.",
                "Whatever a sequence computes counts against the budget, decodes as well as"
                " prompts.",
            )
        for seq in scheduler.waiting:
            self._require_given_up(seq, "stands in `waiting`")
            if seq.block_table:
                self.fail(
                    "blocks-while-waiting",
                    f"{here} request {seq.seq_id} waits, and holds"
                    f" {the_count(len(seq.block_table), 'block')}.",
                    "`allocate` gives the blocks at once. Ask for them last, when nothing else"
                    " stands against the admission.",
                )
        for i, count in known.items():
            if self.live[i].num_tokens < count:
                self.fail(
                    "lost-its-answer",
                    f"{here} request {i} has {self.live[i].num_tokens} tokens left of {count}.",
                    "Who is preempted keeps its tokens: they are computed again as if they were a"
                    " prompt.",
                )

    def _fail_lost(self, lost: int, batch: ScheduledBatch, here: str) -> NoReturn:
        why, hint = (
            "You took it out of a queue",
            "Who leaves `waiting` runs, and who leaves `running` waits. Who cannot run now stays"
            " where it was.",
        )
        if lost in [seq.seq_id for seq in batch.preempted]:
            why, hint = (
                "It was preempted",
                "It goes back to `waiting`, also when it is the one that you were making room for.",
            )
        elif lost in [seq.seq_id for seq in batch.admitted]:
            why, hint = "You started it", "Whoever is started belongs at the end of `running`."
        where = f"{here} request {lost} is neither in `running` nor in `waiting`."
        self.fail("lost-request", where, f"{why}. {hint}")

    def _compare(self, moment: Moment, plan: Plan, batch: ScheduledBatch) -> None:
        """Note the step where it, or one before it, is not as the rules have it."""
        evidence, expected = self.evidence, moment.plan(RIGHT[0])
        if plan != expected and all(plan != moment.plan(other) for other in RIGHT[1:]):
            evidence.broken += 1
            if evidence.symptom is None:
                evidence.seen = (
                    f"{self.told}: step {self.number} computes {plan.words()}.\nBy the rules:"
                    f" {expected.words()}."
                )
                evidence.symptom = self._symptom(plan, expected, batch)
        if evidence.symptom is not None:
            evidence.steps.append((moment, plan))

    def _refused(self, moment: Moment, error: AssertionError) -> NoReturn:
        """Raise the mistake for a refusal of SchedulerBase, and note the step."""
        name, hint = misuse(str(error))
        evidence, seen = self.evidence, f"{self.told}: in step {self.number}, {error}."
        if evidence.symptom is None:
            evidence.seen, evidence.symptom = seen, Mistake(name, f"{seen}\n{hint}")
        evidence.broken += 1
        evidence.steps.append((moment, Plan.failed(error)))
        raise evidence.symptom from error

    def _symptom(self, plan: Plan, expected: Plan, batch: ScheduledBatch) -> Mistake:
        """A step that is not by the rules, described."""
        here = f"{self.told}: in step {self.number}"
        both = f"It computes {plan.words()}.\nBy the rules: {expected.words()}."

        def mistake(name: str, what: str, hint: str) -> Mistake:
            return Mistake(name, f"{here} {what}\n{both}\n{hint}")

        return (
            self._preemption_symptom(mistake, plan, expected)
            or (None if batch else self._stalled_symptom(mistake, plan))
            or self._order_symptom(mistake, plan, expected)
            or self._left_over_symptom(mistake, plan, expected)
            or mistake(
                "another-plan",
                "another step is planned than by the rules.",
                "Compare the two, request by request.",
            )
        )

    def _stalled_symptom(self, mistake: Any, plan: Plan) -> Mistake:
        return mistake(
            "stalled",
            f"nothing is planned. Running: {len(plan.running)}, waiting: {len(plan.waiting)}.",
            "The oldest request must get at least a token in every step."
            if plan.running
            else "Nobody runs, and the head of the queue fits. Which condition keeps your code"
            " from admitting it, and does it depend on an earlier step?",
        )

    def _preemption_symptom(self, mistake: Any, plan: Plan, expected: Plan) -> Mistake | None:
        went = sorted(plan.preempted)
        if went and not expected.preempted:
            return mistake(
                "needless-preemption",
                f"request {went[0]} is preempted, although there are blocks for everybody who"
                " runs.",
                "Preempt only when `allocate` has said False.",
            )
        admitted = set(plan.running) - set(expected.running)
        if went and plan.preempted == expected.preempted and admitted & set(plan.tokens):
            return mistake(
                "admits-after-preempting",
                f"request {went[0]} had to go, and {min(admitted)} came in.",
                "A step that had to make room admits nobody, or it would soon have to make room"
                " again.",
            )
        if went and plan.preempted < expected.preempted:
            return mistake(
                "too-few-preempted",
                "the sequence that needs blocks does not get them, and newer ones run on.",
                "Preempt until `allocate` says True, or until the sequence itself has gone.",
            )
        if wrong := sorted(plan.preempted - expected.preempted):
            return mistake(
                "wrong-victim",
                f"request {wrong[0]} is preempted.",
                "The newest goes: take from the end of `running`, until `allocate` says True.",
            )
        return None

    def _order_symptom(self, mistake: Any, plan: Plan, expected: Plan) -> Mistake | None:
        order = [*plan.running, *plan.waiting]
        if order == sorted(order):
            return None
        if sorted(plan.running) == sorted(expected.running) and plan.running != expected.running:
            return mistake(
                "running-out-of-order",
                f"`running` is {list(plan.running)} afterwards (by number of arrival).",
                "Who is admitted, in order of arrival, goes to the end of `running`, and the others"
                " keep their order.",
            )
        queues = f"running are {list(plan.running)}, waiting {list(plan.waiting)[:12]}"
        if plan.preempted & {i for i, j in zip(order, sorted(order), strict=True) if i != j}:
            return mistake(
                "preempted-to-the-back",
                f"{queues} (by number of arrival); {sorted(plan.preempted)} were preempted.",
                "Who was preempted is older than those who wait: it goes to the front. Several go"
                " so that they stay in order.",
            )
        return mistake(
            "overtaken",
            f"{queues} (by number of arrival).",
            "Whoever is at the head of the queue and does not fit stays there, and nobody passes."
            " `running` keeps its order, too.",
        )

    def _left_over_symptom(self, mistake: Any, plan: Plan, expected: Plan) -> Mistake | None:
        for i, (start, _) in expected.tokens.items():
            if i in plan.tokens and plan.tokens[i][0] < start:
                return mistake(
                    "prefix-not-used",
                    f"request {i} begins with token {plan.tokens[i][0]}, although its first"
                    f" {start} tokens are in the prefix cache.",
                    "A waiting sequence takes all blocks that `find_cached_prefix` finds for it.",
                )
        left = self.budget - sum(count for _, count in plan.tokens.values())
        for i, (_, count) in expected.tokens.items():
            mine = plan.tokens.get(i, (0, 0))[1]
            if mine >= count or not left:
                continue
            if i in plan.waiting:
                return mistake(
                    "leaves-budget",
                    f"request {i} waits, although {the_count(left, 'token')} of the budget, a place"
                    " and blocks are free for it.",
                    "Admit in each step as many as budget, places and blocks allow.",
                )
            if not mine:
                return mistake(
                    "skips-the-running",
                    f"the budget has {the_count(left, 'token')} left, and request {i}, which runs,"
                    " gets none.",
                    "Running sequences come first, oldest first, each with as many tokens as it has"
                    " left to compute.",
                )
            return mistake(
                "too-short-a-chunk",
                f"request {i} computes {the_count(mine, 'token')}, and the budget has"
                f" {the_count(left, 'token')} left.",
                "A chunk is as long as the budget allows.",
            )
        return None


@dataclass(frozen=True)
class Sizes:
    """The limits of a machine, and what its requests are like at most."""

    blocks: int
    size: int
    places: int
    budget: int
    requests: int
    prompt: int = 7
    shared: int = 9
    #: Whether all requests arrive before the first step.
    at_once: bool = False

    @classmethod
    def small(cls, rng: Random, requests: int) -> Sizes:
        """So small that all limits are reached."""
        budget = rng.choice([1, 2, 3, 5, 8, 16, 64])
        return cls(rng.randint(4, 14), rng.randint(1, 4), rng.randint(1, 4), budget, requests)

    @classmethod
    def large(cls, rng: Random) -> Sizes:
        """Long prompts with long beginnings in common, and more places."""
        size = rng.choice([1, 3, 4, 8, 16])
        blocks = rng.randint(90, 160) // size + 2
        places, budget = rng.randint(3, 9), rng.choice([7, 24, 33, 64])
        return cls(blocks, size, places, budget, 12, prompt=40, shared=50)


def play(answer: type, sizes: Sizes, caching: bool, rng: Random, evidence: Evidence) -> Machine:
    """Serve random requests to the end; Mistake where that cannot be. Returns the machine.

    Now and then the check plans a step itself, so that the learner's scheduler comes into states
    that it would not have brought about.
    """
    limits = (sizes.blocks, sizes.size, sizes.places, sizes.budget)
    machine = Machine(answer, *limits, caching, evidence)
    reckless = rng.random() < 0.4
    for _ in range(sizes.requests):
        texts = list(machine.texts.values())
        source = rng.choice(texts) if texts and rng.random() < 0.6 else []
        new = [rng.randrange(3) for _ in range(rng.randint(1, sizes.prompt))]
        machine.add(source[: rng.randint(0, sizes.shared)] + new, rng.randint(1, 9))
        if not sizes.at_once and rng.random() < 0.5:
            if reckless and rng.random() < 0.5:
                machine.reckless_step(rng)
            if machine.live:
                machine.step()
    limit = max_steps((s.num_prompt_tokens, s.max_num_tokens) for s in machine.live.values())
    while machine.live:
        machine.step()
        limit -= 1
        if limit < 0:
            machine.fail(
                "starves",
                f"after {machine.number + 1} steps {len(machine.live)} requests are still not"
                " done.",
                "The oldest must get on in every step.",
            )
    return machine


def expect_places_kept(answer: type) -> None:
    """A request that has nothing left to compute has its place until its last token has come.

    The engine plans a step before the one before it has come back.
    """
    scheduler = answer(BlockManager(64, 4, False), 2, 64)
    for number, most in enumerate((4, 20, 20)):
        seq = Sequence(number, [1, 2, number], SamplingParams(), max_num_tokens=most)
        scheduler.add(seq)
    scheduler.schedule()
    try:
        batch = scheduler.schedule()
        admitted = [seq.seq_id for seq in batch.admitted]
    except AssertionError as error:
        if "places are taken" not in str(error):
            raise
        admitted = [2]
    if admitted:
        raise Mistake(
            "too-many-places",
            "Two places. Requests 0 and 1 run, and in the first step 0 gets the last token that it"
            f" may have. The next step is planned before that token has come; it starts request"
            f" {admitted[0]}.\nWho has nothing left to compute is in no step, and yet in `running`:"
            " count `self.running`, not what this step computes.",
        )


def play_many(
    answer: type, suspects: Mapping[str, tuple], caching: bool, seed: int, counts: tuple[int, int]
) -> tuple[int, int, int]:
    """Many small histories and some large ones; raises the Mistake that they show.

    caching: whether the prefix cache is on in every second history. counts: of small and of large
    histories. Returns the numbers of requests, preemptions and chunks.
    """
    rng, evidence = Random(seed), Evidence()
    small, large = counts
    sizes = [Sizes.small(rng, 1 + i * 6 // small + rng.randint(0, 3)) for i in range(small)]
    sizes += [Sizes.large(rng) for _ in range(large)]
    # A long queue; many steps with few blocks; many admissions in one step.
    sizes += [Sizes(60, 4, 9, 9, 320), Sizes(12, 4, 6, 16, 320)]
    # Long prompts, in long chunks.
    sizes.append(Sizes(700, 16, 3, 1500, 7, prompt=3000))
    sizes += [Sizes(600, 4, 200, budget, 150, at_once=True) for budget in (1200, 250)]
    done = [0, 0, 0]
    for number, size in enumerate(sizes):
        try:
            machine = play(answer, size, caching and number % 2 == 1, rng, evidence)
        except CheckError:
            # More histories tell mistakes apart that look the same in the steps so far.
            if evidence.symptom is None:
                raise
            evidence.settle(suspects, ENOUGH)
            continue
        evidence.settle(suspects, ENOUGH)
        stats = machine.scheduler.stats
        for i, more in enumerate((len(machine.texts), stats.num_preemptions, stats.num_chunks)):
            done[i] += more
    evidence.settle(suspects)
    return done[0], done[1], done[2]
