"""Chapter 05, the scheduler: the checks of its exercises."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from random import Random
from types import FunctionType
from typing import Any

from minivllm.course.grading.checking import Mistake, diagnose, engine_agrees, exercise, expect
from minivllm.course.sim.simulator import STEPS, Arrival, Simulation, azure_chat, simulate
from minivllm.engine.scheduler import Scheduler
from minivllm.errors import SchedulerStalledError

# --- 05.1 -----------------------------------------------------------------------------------------


@exercise(
    "05.1",
    "Warm-up: what static batching wastes",
    hints={"no-empty-places": 2, "longest-of-all": 2},
)
def check_wasted_share(answer: Callable) -> str:
    def batches(lengths: list[int], places: int) -> list[list[int]]:
        return [lengths[i : i + places] for i in range(0, len(lengths), places)]

    def share(used: float, had: float) -> float:
        return 1 - used / had if had else 0.0

    def right(lengths: list[int], places: int) -> float:
        return share(sum(lengths), places * sum(map(max, batches(lengths, places))))

    def sorted_first(lengths: list[int], places: int) -> float:
        return right(sorted(lengths), places)

    def sorted_down(lengths: list[int], places: int) -> float:
        return right(sorted(lengths, reverse=True), places)

    def no_empty_places(lengths: list[int], places: int) -> float:
        return share(
            sum(lengths), sum(len(batch) * max(batch) for batch in batches(lengths, places))
        )

    def mean_of_batches(lengths: list[int], places: int) -> float:
        shares = [share(sum(batch), places * max(batch)) for batch in batches(lengths, places)]
        return sum(shares) / len(shares) if shares else 0.0

    def longest_of_all(lengths: list[int], places: int) -> float:
        return share(sum(lengths), places * max(lengths, default=0) * len(batches(lengths, places)))

    def useful(lengths: list[int], places: int) -> float:
        return 1 - right(lengths, places) if lengths else 0.0

    suspects = {
        "useful-share": (
            "That is the share of the steps that was used; the share that was wasted is asked for.",
            useful,
        ),
        "sorted-first": (
            (
                "You sort the requests before you batch them. Nobody knows lengths beforehand: they"
                " come as they come."
            ),
            sorted_first,
        ),
        "longest-first": (
            "You sort the requests, the longest first. They come as they come.",
            sorted_down,
        ),
        "no-empty-places": (
            (
                "In the last batch fewer requests may be left than places. Those places are empty"
                " from its first step to its last, and that is waste too."
            ),
            no_empty_places,
        ),
        "mean-of-batches": (
            (
                "You take the mean of the batches' shares. A batch of 300 steps wastes more than"
                " one of 10: add up steps and places of all batches, and divide once."
            ),
            mean_of_batches,
        ),
        "longest-of-all": (
            (
                "You let every batch run as long as the longest request of all. A batch ends with"
                " its own longest."
            ),
            longest_of_all,
        ),
    }
    rng = Random(1)
    cases = [
        ([7], 1),
        ([5, 5], 2),
        ([4, 1], 2),
        ([3, 9, 2, 2], 2),
        ([10, 1, 1], 2),
        ([], 4),
        ([6, 6, 6, 6, 6], 4),
    ]
    cases += [
        ([rng.randint(1, 200) for _ in range(count)], places)
        for count, places in ((8, 4), (13, 4), (30, 7))
    ]
    diagnose(answer, cases, right, suspects)
    return f"right for {len(cases)} queues"


# --- 05.2 -----------------------------------------------------------------------------------------


@exercise(
    "05.2",
    "Chunks between decodes",
    hints={"negative-chunk": 2, "over-budget": 2, "newest-first": 2, "last-chunk-too-long": 3},
)
def check_chunks_of(answer: Callable) -> str:
    def planned(
        prompt: int, decodes: list[int], budget: int, decode: Callable, limit: int = 400
    ) -> list[int]:
        """Chunks where decode(tokens left of each, budget) says how many decodes a step has, and
        counts them off.
        """
        left, chunks = list(decodes), []
        while prompt > 0 and len(chunks) < limit:
            chunks.append(min(prompt, budget - decode(left, budget)))
            prompt -= chunks[-1]
        return chunks

    def oldest_first(left: list[int], budget: int) -> int:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
        for i in chosen:
            left[i] -= 1
        return len(chosen)

    def everybody(left: list[int], budget: int) -> int:
        active = [i for i, tokens in enumerate(left) if tokens > 0]
        for i in active:
            left[i] -= 1
        return len(active)

    def one_too_few(left: list[int], budget: int) -> int:
        everybody(left, budget)
        return sum(tokens > 0 for tokens in left)

    def newest_first(left: list[int], budget: int) -> int:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][-budget:]
        for i in chosen:
            left[i] -= 1
        return len(chosen)

    def right(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, oldest_first)

    def ignoring(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, lambda left, budget: 0)

    def endless(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, lambda left, budget: len(left))

    def early(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, one_too_few)

    def even(prompt: int, decodes: list[int], budget: int) -> list[int]:
        count = len(right(prompt, decodes, budget))
        return [prompt // count + (i < prompt % count) for i in range(count)]

    def fixed(prompt: int, decodes: list[int], budget: int) -> list[int]:
        chunk = max(1, budget - sum(tokens > 0 for tokens in decodes))
        return [min(chunk, prompt - start) for start in range(0, prompt, chunk)]

    def full_last(prompt: int, decodes: list[int], budget: int) -> list[int]:
        chunks = right(prompt, decodes, budget)
        left = [max(0, tokens - len(chunks) + 1) for tokens in decodes]
        return [*chunks[:-1], budget - sum(tokens > 0 for tokens in left)] if chunks else []

    suspects = {
        "ignores-decodes": (
            (
                "Every chunk is as large as the whole budget. Those who decode take a token each"
                " out of it first."
            ),
            ignoring,
        ),
        "decodes-never-end": (
            (
                "Your running requests decode for ever. `decodes[i]` is how many tokens request i"
                " has left: once they are decoded, its token of the budget goes to the prompt."
            ),
            endless,
        ),
        "fixed-chunk": (
            (
                "Your chunk is the same in every step. When a running request ends, its token of"
                " the budget is free."
            ),
            fixed,
        ),
        "ends-too-early": (
            (
                "In the step in which a running request decodes its last token, it still takes one"
                " token of the budget; you count it off before."
            ),
            early,
        ),
        "even-chunks": (
            (
                "You cut the prompt into equal chunks. Each step gives it all that is left of the"
                " budget."
            ),
            even,
        ),
        "last-chunk-too-long": (
            (
                "Your chunks add up to more than the prompt. The last one is what is left of it,"
                " not of the budget."
            ),
            full_last,
        ),
    }
    rng = Random(2)
    roomy = [
        (100, [3, 1], 32),
        (5, [], 8),
        (8, [], 8),
        (9, [], 8),
        (7, [2, 2, 2], 4),
        (1, [9], 2),
        (30, [0, 4], 8),
    ]
    for _ in range(6):
        decodes = [rng.randint(1, 12) for _ in range(rng.randint(1, 8))]
        roomy.append((rng.randint(20, 150), decodes, len(decodes) + rng.randint(4, 24)))
    diagnose(answer, roomy, right, suspects)

    def negative(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, everybody)

    def clamped(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(
            prompt, decodes, budget, lambda left, budget: min(budget, everybody(left, budget))
        )

    def from_behind(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(prompt, decodes, budget, newest_first)

    def without_zeros(function: Callable) -> Callable:
        return lambda prompt, decodes, budget: [
            chunk for chunk in function(prompt, decodes, budget) if chunk
        ]

    def at_least_one(prompt: int, decodes: list[int], budget: int) -> list[int]:
        return planned(
            prompt, decodes, budget, lambda left, budget: min(budget - 1, everybody(left, budget))
        )

    full = {
        "negative-chunk": (
            (
                "More requests decode than the budget has tokens, and your chunk becomes negative:"
                " the prompt grows. Only as many decode as the budget allows, and the chunk is 0."
            ),
            negative,
        ),
        "over-budget": (
            (
                "More requests want to decode than the budget has tokens. You let all of them go"
                " on; only the oldest, as many as fit, get their token in this step. The others"
                " have as many left as before."
            ),
            clamped,
        ),
        "newest-first": (
            "When the budget is too small for all who decode, the *oldest* go first.",
            from_behind,
        ),
        "skips-empty-steps": (
            (
                "A step that has nothing left for the prompt is a step all the same: the prompt"
                " waits, and its chunk is 0. Only as many requests decode in it as the budget"
                " allows."
            ),
            without_zeros(right),
            without_zeros(clamped),
        ),
        "never-waits": (
            (
                "You give the prompt a token in every step, even where those who decode have used"
                " up the budget."
            ),
            at_least_one,
        ),
    }
    tight = [
        (6, [2, 2], 2),
        (5, [3, 1, 2], 2),
        (10, [1, 1, 1, 1], 3),
        (4, [1, 5, 1], 1),
        (3, [2], 1),
    ]
    for _ in range(5):
        decodes = [rng.randint(1, 9) for _ in range(rng.randint(5, 9))]
        tight.append((rng.randint(5, 40), decodes, rng.randint(1, 4)))
    diagnose(answer, tight, right, full)
    return f"right for {len(roomy) + len(tight)} prompts"


# --- 05.3 -----------------------------------------------------------------------------------------

#: The situation of the prediction: three requests, and a cache of 24 tokens.
CROWDED = [Arrival(0, 6, 6)] * 3
CROWDED_LIMITS = {"max_num_batched_tokens": 32, "max_num_seqs": 3, "num_blocks": 6, "block_size": 4}


@exercise(
    "05.3",
    "Predict: who has to go",
    hints={"nobody-waits": 2, "forgets-its-answer": 3, "only-the-prompt": 3, "wrong-first-step": 3},
)
def check_prediction(victim: Any, num_steps: Any, first_step_back: Any, computed_again: Any) -> str:
    run = simulate(CROWDED, cost=STEPS, **CROWDED_LIMITS)
    preempted = [name for step in run.trace.steps for name in step.preempted]
    right = "ABC"[int(preempted[0].partition("/")[0])]
    steps = run.trace.steps
    back = next(
        item.num_new_tokens
        for step in steps[1:]
        for item in step.scheduled
        if f"{item.request_id}/{item.index}" == preempted[0] and item.start == 0
    )
    expect(
        isinstance(victim, str) and len(victim.strip()) == 1,
        "wrong-type",
        f'victim is the letter of a request, "A", "B" or "C".\nYou have {victim!r}.',
    )
    letter = victim.strip().upper()
    expect(
        letter != "A",
        "preempts-the-oldest",
        "A is the oldest. It is A that needs a block first; the scheduler makes room *for* it.\n"
        "If the oldest had to go, nobody would be sure ever to finish.",
    )
    expect(
        letter == right,
        "wrong-victim",
        f"{letter} is not the one to go: the newest is, for it has the least to lose.\n"
        "Once it has gone, its two blocks are enough for the two others.",
    )
    expect(
        num_steps != 6,
        "nobody-waits",
        "6 steps would be enough if the cache had room for all three to the end.\nThe one that is"
        " preempted waits until somebody has finished; count what it does after that.",
    )
    expect(
        num_steps != 12,
        "forgets-its-answer",
        "12 steps: you let the one that comes back write its answer from the beginning.\n"
        "Preemption takes its blocks, not its tokens. What it had written it keeps.",
    )
    expect(
        num_steps == len(steps),
        "wrong-steps",
        f"The simulator counts {len(steps)} steps, not {num_steps!r}.\nA step in which a prompt is"
        " computed brings the first token, too. So A and B finish in the sixth step, and the third"
        f" request comes back in the one after that, with {back - 6} tokens of its answer written.",
    )
    expect(
        first_step_back != 6 and computed_again != 6,
        "only-the-prompt",
        "6 is its prompt alone. Its blocks are gone, and with them K and V of what it had"
        " written.\nAll of its tokens have to be computed again before it can go on.",
    )
    expect(
        first_step_back == back,
        "wrong-first-step",
        f"In its first step back it computes {back} tokens, not {first_step_back!r}: all that it"
        f" has.\nThat is its prompt of 6 and the {back - 6} tokens that it had written before it"
        " went.",
    )
    expect(
        computed_again != back,
        "counts-the-new-one",
        f"{back} tokens are computed in that step, but the last of them for the first time: it had"
        " been sampled, and was about to be computed when its request had to go.\nCounted twice"
        f" are {run.num_wasted_tokens}.",
    )
    expect(
        computed_again == run.num_wasted_tokens,
        "wrong-recomputed",
        f"{run.num_wasted_tokens} tokens are computed a second time, not {computed_again!r}.\n"
        "Those are the tokens whose K and V lay in the blocks that were taken away.",
    )
    return (
        f"{right} goes, {len(steps)} steps, {back} tokens in its first step back,"
        f" {run.num_wasted_tokens} of them again"
    )


#: What the refusals of `SchedulerBase` say, and how to call and explain the mistake.
_MISUSES = {
    "places are taken": ("too-many-places", "Admit only while fewer than `max_num_seqs` run."),
    "was not started": (
        "never-started",
        "Whoever is admitted gets a place by `start`, and only then computes.",
    ),
    "still in `": (
        "wrong-queue",
        "Move the sequence from one queue to the other first, then tell the base.",
    ),
    "in this step": (
        "planned-and-preempted",
        "Make room before you plan, and for nobody twice in a step.",
    ),
    "this step computes": (
        "planned-and-preempted",
        "Whoever is in the step already keeps its blocks: take from the end of `running`.",
    ),
    "has blocks for": (
        "computed-without-blocks",
        "`allocate` counts all of its tokens, from the first on.",
    ),
    "uncomputed": (
        "wrong-number",
        "A step computes 1 to `num_uncomputed_tokens` tokens of a sequence.",
    ),
}


def _misuse(what: str) -> tuple[str, str]:
    """(name of the mistake, hint) for a refusal of SchedulerBase."""
    pairs = (pair for part, pair in _MISUSES.items() if part in what)
    return next(pairs, ("misused", "That cannot be."))


# --- 05.4 -----------------------------------------------------------------------------------------


@exercise(
    "05.4",
    "Debug this: requests that vanish",
    hints={"lost-request": 2, "stalled": 2, "overtaken": 3},
)
def check_admission(answer: type) -> str:
    expect(
        isinstance(answer, type) and issubclass(answer, Scheduler),
        "wrong-type",
        "Leave it a subclass of Scheduler, with a method `schedule_waiting(self, batch,"
        f" budget)`.\nYou handed in {answer!r}.",
    )
    rng = Random(4)
    count = 0
    for number in range(60):
        work = [
            Arrival(rng.randint(0, 12), rng.randint(1, 20), rng.randint(1, 8))
            for _ in range(3 + number // 4)
        ]
        limits = {
            "max_num_batched_tokens": rng.choice([3, 8, 16, 64]),
            "max_num_seqs": rng.randint(1, 4),
            "num_blocks": rng.randint(8, 20),
            "block_size": 4,
        }
        told = f"With {len(work)} requests, {_words(limits)}:"
        try:
            run = simulate(work, scheduler_cls=answer, cost=STEPS, **limits)
        except SchedulerStalledError as error:
            raise Mistake(
                "stalled", f"{told} {error}\nDoes anybody wait who fits, or would fit in chunks?"
            ) from error
        except AssertionError as error:
            if not str(error):
                raise
            name, hint = _misuse(str(error))
            raise Mistake(name, f"{told} {error}.\n{hint}") from error
        _check_admission(run, told, limits)
        right = simulate(work, cost=STEPS, **limits)
        for step, (mine, theirs) in enumerate(zip(_plans(run), _plans(right), strict=False)):
            if mine != theirs:
                raise Mistake(
                    "another-plan",
                    f"{told} nobody is lost, but step {step} computes {mine}; expected {theirs}"
                    " (request: tokens).\nAdmit whoever is at the head of the queue with as many"
                    " tokens as fit the budget; stop at the first who does not fit.",
                )
        count += len(work)
    return f"{count} requests in, {count} answers out"


def _check_admission(run: Simulation, told: str, limits: dict[str, int]) -> None:
    budget = limits["max_num_batched_tokens"]
    for step in run.trace.steps:
        expect(
            step.num_tokens <= budget,
            "over-budget",
            f"{told} step {step.step} computes {step.num_tokens} tokens.\nThe budget is {budget}"
            " tokens a step.",
        )
    if run.lost:
        first = run.lost[0]
        waited = run.requests[first].steps_waited
        raise Mistake(
            "lost-request",
            f"{told} {len(run.lost)} never get an answer. The first is number {first}: it stood in"
            f" the queue for {_count(waited, 'step')}, then it was neither there nor running.\nWho"
            " takes a request out of the queue must run it, or put it back where it was.",
        )
    started = sorted(run.requests, key=lambda r: (r.first_scheduled, r.sequence.seq_id))
    ids = [request.sequence.seq_id for request in started]
    late = next((b for a, b in pairwise(ids) if b < a), None)
    for (
        step
    ) in run.trace.steps:  # who was preempted has started before, and may be overtaken all the same
        running, waiting = (
            [int(name.partition("/")[0]) for name in names]
            for names in (step.running, step.waiting)
        )
        if late is None and running and waiting and min(waiting) < max(running):
            late = min(waiting)
    if late is not None:
        raise Mistake(
            "overtaken",
            f"{told} nobody is lost, but request {late} waits while one that came later runs.\nA"
            " request that does not fit stays at the head of the queue: put back at its end, or"
            " skipped, it could wait for ever.",
        )


def _plans(run: Simulation) -> list[dict[str, int]]:
    return [
        {item.request_id: item.num_new_tokens for item in step.scheduled}
        for step in run.trace.steps
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _words(limits: dict[str, int]) -> str:
    return (
        f"a budget of {limits['max_num_batched_tokens']}, {_count(limits['max_num_seqs'], 'place')}"
        f" and {limits['num_blocks']} blocks of {limits['block_size']} tokens"
    )


# --- 05.5 -----------------------------------------------------------------------------------------


class _Machine:
    """A scheduler at work on a model that is a hash: an entry of the KV cache is a hash of all
    tokens up to there.

    A token follows from the entry before it, as read through the block table, so that a block that
    is wrong, stale or somebody else's changes the text.
    """

    def __init__(
        self, answer: type, blocks: int, size: int, places: int, budget: int, caching: bool
    ) -> None:
        from minivllm.engine.block_manager import BlockManager

        self.size, self.places, self.budget = size, places, budget
        self.manager = BlockManager(blocks, self.size, caching)
        self.scheduler = answer(self.manager, self.places, self.budget)
        self._watch_preemptions()
        self.content: dict[tuple[int, int], int] = {}
        self.live: dict[int, Any] = {}
        self.texts: dict[int, list[int]] = {}
        self.number = -1
        self.room = blocks * self.size
        self.told = (
            f"With a budget of {budget}, {_count(places, 'place')}, {blocks} blocks of"
            f" {_count(size, 'token')}"
        )
        self.told += ", prefix caching on" * caching

    def fail(self, name: str, what: str, hint: str) -> None:
        raise Mistake(name, f"{self.told}: {what}\n{hint}")

    def _watch_preemptions(self) -> None:
        """Have `start` refuse whom nobody has given up, and note whose blocks were freed by hand
        in this step.
        """
        start, give_up, free = self.scheduler.start, self.scheduler.give_up, self.manager.free
        self.freed_by_hand: set[int] = set()

        def started(batch: Any, seq: Any, num_cached: int = 0) -> None:
            self._check_given_up(seq, "is started a second time")
            start(batch, seq, num_cached)

        def given_up(batch: Any, seq: Any) -> None:
            before = set(self.freed_by_hand)
            give_up(batch, seq)
            self.freed_by_hand = before

        def freed(seq: Any) -> None:
            self.freed_by_hand.add(seq.seq_id)
            free(seq)

        self.scheduler.start, self.scheduler.give_up, self.manager.free = started, given_up, freed

    def _check_given_up(self, seq: Any, what: str) -> None:
        from minivllm.engine.sequence import SequenceStatus

        if seq.status is not SequenceStatus.RUNNING:
            return
        where = f"in step {self.number} request {seq.seq_id} {what}, and still counts as running."
        if seq.seq_id in self.freed_by_hand:
            hint = (
                "Freeing its blocks is one half: it also has a place, and tokens that count as"
                " computed."
            )
            self.fail("freed-not-given-up", where, f"{hint} `give_up` takes back all of it.")
        self.fail(
            "never-given-up",
            where,
            "Who goes from `running` to `waiting` is preempted: call `give_up`, which takes back"
            " its blocks and its place.",
        )

    def add(self, prompt: list[int], num_output: int) -> None:
        from minivllm.engine.sequence import Sequence
        from minivllm.sampling_params import SamplingParams

        prompt = prompt[: self.room - 1]
        end = min(len(prompt) + num_output, self.room)
        seq = Sequence(len(self.texts), list(prompt), SamplingParams(), max_num_tokens=end)
        text = list(prompt)
        chain = 0
        for token in prompt:
            chain = hash((chain, token))
        while len(text) < end:
            text.append(chain % 3)
            chain = hash((chain, text[-1]))
        self.live[seq.seq_id], self.texts[seq.seq_id] = seq, text
        self.scheduler.add(seq)

    def step(self) -> None:
        scheduler = self.scheduler
        known = {i: seq.num_tokens for i, seq in self.live.items()}
        free, wanted = self.manager.num_free_blocks, self._wanted()
        self.number += 1
        self.freed_by_hand.clear()
        try:
            batch = scheduler.schedule()
        except AssertionError as error:
            if not str(error):
                raise
            self._misused(str(error), error)
        self._check_batch(batch, known, free >= wanted)
        tokens = self._compute(batch)
        for item in scheduler.update(batch, tokens):
            if item.sequence.is_finished:
                del self.live[item.sequence.seq_id]

    def _misused(self, what: str, error: AssertionError) -> None:
        """Raise the Mistake for a refusal of SchedulerBase, in whose words it is told."""
        name, hint = _misuse(what)
        raise Mistake(name, f"{self.told}: in step {self.number}, {what}.\n{hint}") from error

    def _wanted(self) -> int:
        """Blocks that the running sequences need in this step, if all get what the budget
        allows.
        """
        left, blocks = self.budget, 0
        for seq in self.scheduler.running:
            new = min(seq.num_uncomputed_tokens, left)
            blocks += self.manager.num_blocks_for(seq.num_computed_tokens + new) - len(
                seq.block_table
            )
            left -= new
        return blocks

    def _check_batch(self, batch: Any, known: dict[int, int], fits: bool) -> None:
        from minivllm.engine.sequence import ScheduledBatch

        here = f"in step {self.number}"
        if not isinstance(batch, ScheduledBatch):
            self.fail(
                "wrong-type",
                f"schedule returned {batch!r}.",
                "It returns the ScheduledBatch that it has filled.",
            )
        running = [seq.seq_id for seq in self.scheduler.running]
        waiting = [seq.seq_id for seq in self.scheduler.waiting]
        preempted = [seq.seq_id for seq in batch.preempted]
        if missing := sorted(set(self.live) - {*running, *waiting}):
            lost = missing[0]
            why = "You took it out of a queue"
            hint = "Who leaves `waiting` runs, and who leaves `running` waits."
            if lost in preempted:
                why = "It was preempted"
                hint = (
                    "It goes back to `waiting`, also when it is the one that you were making room"
                    " for."
                )
            elif lost in [seq.seq_id for seq in batch.admitted]:
                why, hint = "You started it", "Whoever is started belongs at the end of `running`."
            where = f"{here} request {lost} is neither in `running` nor in `waiting`."
            self.fail("lost-request", where, f"{why}. {hint}")
        if twice := {i for i in [*running, *waiting] if [*running, *waiting].count(i) > 1}:
            self.fail(
                "queued-twice",
                f"{here} request {min(twice)} stands in the queues twice.",
                "One queue, one place.",
            )
        if batch.num_tokens > self.budget:
            self.fail(
                "over-budget",
                f"{here} {batch.num_tokens} tokens are planned: {self._shares(batch)}.",
                "Whatever a sequence computes counts against the budget, decodes as well as"
                " prompts.",
            )
        for seq in self.scheduler.waiting:
            self._check_given_up(seq, "stands in `waiting`")
        if not batch:
            head = self.scheduler.waiting[0] if waiting and not running else None
            if head is not None and head.num_tokens > self.budget:
                self.fail(
                    "whole-prompts-only",
                    f"{here} nothing is planned: request {head.seq_id} has {head.num_tokens}"
                    " tokens, more than a step may have, and waits.",
                    "Admit it with as many tokens as the budget has left; the rest of its prompt"
                    " comes in later steps.",
                )
            self.fail(
                "stalled",
                f"{here} nothing is planned, although {len(running)} requests run and"
                f" {len(waiting)} wait.",
                "The oldest request must get at least a token in every step.",
            )
        self._check_preempted(preempted, running, known, here, fits)
        if [*running, *waiting] != sorted([*running, *waiting]):
            first = next(
                i
                for i in [*preempted, *waiting, *running]
                if self._is_out_of_order(i, running, waiting)
            )
            if first in preempted:
                self.fail(
                    "preempted-to-the-back",
                    f"{here} request {first} was preempted; now running are {running}, waiting"
                    f" {waiting}.",
                    "It is older than those who wait: it goes to the front. Several go so that they"
                    " stay in order.",
                )
            self.fail(
                "overtaken",
                f"{here} running are {running}, waiting {waiting} (by number of arrival).",
                "Whoever is at the head of the queue and does not fit stays there, and nobody"
                " passes.",
            )
        self._check_left_over(batch, here)

    @staticmethod
    def _is_out_of_order(i: int, running: list[int], waiting: list[int]) -> bool:
        order = [*running, *waiting]
        return order.index(i) != sorted(order).index(i)

    def _check_preempted(
        self, preempted: list[int], running: list[int], known: dict[int, int], here: str, fits: bool
    ) -> None:
        for i in preempted:
            if self.live[i].num_tokens < known[i]:
                self.fail(
                    "lost-its-answer",
                    f"{here} request {i} was preempted and has {self.live[i].num_tokens} tokens"
                    f" left of {known[i]}.",
                    "Its blocks go, its tokens stay: they are computed again as if they were a"
                    " prompt.",
                )
        if not preempted:
            return
        if fits:
            self.fail(
                "needless-preemption",
                f"{here} request {preempted[0]} is preempted, although there are blocks for"
                " everybody who runs.",
                "Preempt only when `allocate` has said False.",
            )
        if min(self.live) in preempted:
            self.fail(
                "preempts-the-oldest",
                f"{here} request {min(self.live)}, the oldest, is preempted.",
                "The newest of the running goes, the last in the list; else nobody is sure ever to"
                " finish.",
            )
        if running and min(preempted) < max(running):
            self.fail(
                "wrong-victim",
                f"{here} request {min(preempted)} is preempted, and the newer {max(running)}"
                " runs on.",
                "Take from the end of `running`, until `allocate` says True.",
            )

    def _check_left_over(self, batch: Any, here: str) -> None:
        left, planned = self.budget - batch.num_tokens, {id(item.sequence) for item in batch.items}
        admitted = {id(seq) for seq in batch.admitted}
        if batch.preempted and batch.admitted:
            self.fail(
                "admits-after-preempting",
                f"{here} request {batch.preempted[0].seq_id} had to go, and"
                f" {batch.admitted[0].seq_id} came in.",
                "A step that had to make room admits nobody, or it would soon have to make room"
                " again.",
            )
        idle = [seq for seq in self.scheduler.running if id(seq) not in planned]
        if left and idle:
            self.fail(
                "skips-the-running",
                f"{here} {left} tokens of the budget are left, and request {idle[0].seq_id}, which"
                " runs, gets none.",
                "Running sequences come first, oldest first, each with as many tokens as it has"
                " left to compute.",
            )
        for item in batch.items:
            rest = item.sequence.num_prompt_tokens - item.end
            if rest > 0 and left and self.manager.num_free_blocks:
                self.fail(
                    "too-short-a-chunk",
                    f"{here} request {item.sequence.seq_id} gets {item.num_new_tokens} tokens,"
                    f" {rest} of its prompt are left, and so are {left} of the budget, and blocks.",
                    "A chunk is as long as the budget allows.",
                )
        waiting, running = self.scheduler.waiting, self.scheduler.running
        if not (left and waiting and len(running) < self.places) or batch.preempted:
            return
        head = waiting[0]
        cached = self.manager.find_cached_prefix(head)
        new = min(head.num_tokens - len(cached) * self.size, left)
        revived = sum(self.manager.blocks[i].ref_count == 0 for i in cached)
        blocks = self.manager.num_blocks_for(len(cached) * self.size + new) - len(cached) + revived
        # Its prefix may have been computed by this very step; without it, it must fit as well.
        plain = self.manager.num_blocks_for(min(head.num_tokens, left))
        if max(blocks, plain) <= self.manager.num_free_blocks and id(head) not in admitted:
            name = "whole-prompts-only" if head.num_tokens > left else "leaves-budget"
            self.fail(
                name,
                f"{here} request {head.seq_id} waits with {head.num_tokens} tokens; {left} tokens"
                " of the budget, a place and blocks are free.",
                "Admit it with as many tokens as the budget has left; the rest of its prompt comes"
                " in later steps.",
            )

    def _shares(self, batch: Any) -> str:
        return " + ".join(str(item.num_new_tokens) for item in batch.items)

    def _compute(self, batch: Any) -> list[list[int]]:
        tokens = []
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
                        " behind them.",
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

    def _entry(self, seq: Any, position: int, start: int) -> int:
        key = (seq.block_table[position // self.size], position % self.size)
        if key not in self.content:
            self.fail(
                "reads-what-nobody-wrote",
                f"in step {self.number} request {seq.seq_id} computes from token {start} on, but"
                f" token {position} before it was never computed.",
                "Only tokens in blocks from the prefix cache may be skipped.",
            )
        return self.content[key]


@exercise(
    "05.5",
    "Your scheduler, in the engine",
    hints={
        "lost-request": 2,
        "preempted-to-the-back": 2,
        "never-given-up": 2,
        "freed-not-given-up": 2,
        "preempts-the-oldest": 2,
        "whole-prompts-only": 3,
        "ignores-prefix-cache": 3,
        "writes-shared-blocks": 3,
        "reads-what-nobody-wrote": 3,
        "never-started": 3,
    },
)
def check_scheduler(answer: type) -> str:
    from minivllm.engine.scheduler import SchedulerBase
    from minivllm.engine.sequence import max_steps

    expect(
        isinstance(answer, type)
        and issubclass(answer, SchedulerBase)
        and not issubclass(answer, Scheduler)  # its decisions are not for sale here
        and "schedule" in vars(answer),
        "wrong-type",
        "Hand in a subclass of SchedulerBase with a method `schedule` of its own.\nYou handed in"
        f" {answer!r}.",
    )
    rng = Random(5)
    preemptions = chunks = 0
    for number in range(240):
        sizes = (
            rng.randint(4, 14),
            rng.randint(1, 4),
            rng.randint(1, 4),
            rng.choice([1, 2, 3, 5, 8, 16, 64]),
        )
        machine = _Machine(answer, *sizes, caching=number % 2 == 1)
        for _ in range(1 + number // 40 + rng.randint(0, 3)):
            source = (
                rng.choice(list(machine.texts.values()))
                if machine.texts and rng.random() < 0.6
                else []
            )
            prompt = source[: rng.randint(0, 8)] + [
                rng.randrange(3) for _ in range(rng.randint(1, 7))
            ]
            machine.add(prompt, rng.randint(1, 9))
            if rng.random() < 0.5:
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
        preemptions += machine.scheduler.stats.num_preemptions
        chunks += machine.scheduler.stats.num_chunks
    _check_prefix_hits(answer)
    assert preemptions > 100
    assert chunks > 100
    return f"240 random histories; {_check_in_engine(answer)}"


def _check_prefix_hits(answer: type) -> None:
    """The second of two equal prompts must profit from the first."""
    machine = _Machine(answer, blocks=16, size=4, places=2, budget=64, caching=True)
    for _ in range(2):
        machine.add([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], 2)
        seq = machine.live[len(machine.texts) - 1]
        while machine.live:
            machine.step()
    expect(
        seq.num_cached_tokens == 8,
        "ignores-prefix-cache",
        f"The same prompt of 10 tokens came a second time, in blocks of 4: {seq.num_cached_tokens}"
        " tokens were taken from the prefix cache, expected 8.\nBefore you admit a sequence, ask"
        " `find_cached_prefix`; hand the blocks to `allocate`, and their tokens to `start`.",
    )


def _check_in_engine(answer: type) -> str:
    made: list[Any] = []

    class Watched(answer):  # type: ignore[misc, valid-type]
        calls = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            made.append(self)

        def schedule(self) -> Any:
            Watched.calls += 1
            return super().schedule()

    Watched.__name__ = "schedule"
    small = {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 24,
        "num_kv_blocks": 5,
        "max_model_len": 64,
    }
    line = engine_agrees(Watched, scheduler_cls=Watched, **small)
    stats = made[-1].stats
    expect(
        stats.num_chunks and stats.num_preemptions,
        "not-used",
        f"In the engine {stats.num_chunks} chunks and {stats.num_preemptions} preemptions were"
        " counted.\nA budget of 24 tokens and 5 blocks should have led to both.",
    )
    return line


# --- 05.6 -----------------------------------------------------------------------------------------

#: What a policy must reach, beside the order of arrival.
MEDIAN, WORST, THROUGHPUT = 0.7, 1.5, 0.97


def busy_day(policy: type) -> Simulation:
    """The traffic of the chapter under a policy: eight times as fast as it came, a budget of
    1,024.
    """
    return simulate(
        azure_chat(faster=8), scheduler_cls=policy, max_num_batched_tokens=1024, trace=False
    )


def longest_early_wait(policy: type, num_short: int) -> int:
    """Steps that anybody waits who comes in the first half second, where so many come, a bit faster
    than they can go.

    They have 400 tokens each; one that comes early has 3,000.
    """
    stream = [Arrival(0.008 * i, 400, 40) for i in range(num_short)] + [Arrival(0.05, 3000, 40)]
    limits = {"max_num_batched_tokens": 256, "max_num_seqs": 32, "trace": False}
    requests = simulate(stream, scheduler_cls=policy, **limits).requests
    return max(request.steps_waited for request in requests if request.arrival.time <= 0.5)


def scoreboard(**policies: type) -> None:
    """Print how each policy does: for most, for whom it is worst, in all; and whether somebody
    starves.
    """
    print(
        f"{'':16} TTFT median  TTFT worst  tokens/second  longest early wait, of 150 / 300 requests"
    )
    for name, policy in policies.items():
        s = busy_day(policy).summary()
        waits = " / ".join(f"{longest_early_wait(policy, count)}" for count in (150, 300))
        print(
            f"{name:16} {s['TTFT median']:11,} {s['TTFT worst']:11,} {s['output tokens/s']:14,} "
            f" {waits} steps"
        )


@contextmanager
def _leaping_clocks(answer: type) -> Iterator[list[str]]:
    """The machine's clocks leap by a minute at every look; yields the names of those that were
    looked at.

    Clocks that a cell has imported by name (`from time import monotonic`) are replaced in the
    answer's own module. They leap for this thread only: those of a Jupyter kernel that wait for
    messages look at the clock as well.
    """
    seen: list[str] = []
    real, here = datetime.datetime, threading.get_ident()

    def leaping(name: str, clock: Callable) -> Callable:
        def read(*args: Any) -> Any:
            if threading.get_ident() != here:
                return clock(*args)
            seen.append(name)
            return clock(*args) + 60 * len(seen) * (10**9 if name.endswith("_ns") else 1)

        return read

    class Leaping(real):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            if threading.get_ident() != here:
                return real.now(tz)
            seen.append("datetime.now")
            return real.now(tz) + datetime.timedelta(minutes=len(seen))

        today = utcnow = now

    names = [
        base + end
        for base in ("time", "monotonic", "perf_counter", "process_time")
        for end in ("", "_ns")
    ]
    clocks: dict[Any, Any] = {
        getattr(time, name): leaping(f"time.{name}", getattr(time, name)) for name in names
    }
    functions = [
        f for kind in answer.__mro__ for f in vars(kind).values() if isinstance(f, FunctionType)
    ]
    spaces = [
        space
        for f in functions
        if (space := f.__globals__).get("__name__", "").split(".")[0] != "minivllm"
    ]
    old = [
        (space, key, value)
        for space in spaces
        for key, value in space.items()
        if _is_in(value, clocks)
    ]
    old += [
        (space, key, value) for space in spaces for key, value in space.items() if value is real
    ]
    old += [(vars(time), name, getattr(time, name)) for name in names]
    datetime.datetime = Leaping  # type: ignore[misc]
    for space, key, value in old:
        space[key] = Leaping if value is real else clocks[value]
    try:
        yield seen
    finally:
        datetime.datetime = real  # type: ignore[misc]
        for space, key, value in old:
            space[key] = value


def _is_in(value: Any, clocks: dict[Any, Any]) -> bool:
    return any(value is clock for clock in clocks)


def _check_clockless(answer: type, first: Simulation) -> None:
    """Mistake where the order depends on anything but the requests and the steps: `first` is the
    answer's busy day.
    """
    with _leaping_clocks(answer) as seen:
        again = busy_day(answer)
    expect(
        not seen,
        "machine-clock",
        f"Your order looks at the machine's clock ({', '.join(sorted(set(seen)))}).\nSeveral GPUs,"
        " each with a process and a clock of its own, must decide alike, and a slow machine like a"
        " fast one. Count steps: `self.stats.num_steps`.",
    )
    when = [[request.token_times for request in run.requests] for run in (first, again)]
    late = next((i for i, (a, b) in enumerate(zip(*when, strict=True)) if a != b), None)
    expect(
        late is None,
        "not-the-same-twice",
        "The same requests, served twice by a scheduler of yours, were not served alike: request"
        f" {late} got its tokens at other times.\nSeveral GPUs must decide alike: no clock, no"
        " chance, and notes in `self`, not in the class.",
    )


@exercise(
    "05.6",
    "A better queue",
    hints={"starves": 1, "machine-clock": 2, "no-better": 3, "worst-too-long": 3},
)
def check_policy(answer: type) -> str:
    expect(
        isinstance(answer, type) and issubclass(answer, Scheduler),
        "wrong-type",
        f"Hand in a subclass of Scheduler.\nYou handed in {answer!r}.",
    )
    try:
        mine, right = busy_day(answer), busy_day(Scheduler)
        waits = [longest_early_wait(answer, count) for count in (150, 300)]
    except SchedulerStalledError as error:
        raise Mistake(
            "stalled", f"{error}\nReorder `self.waiting`; leave the planning to super().schedule()."
        ) from error
    if mine.lost:
        raise Mistake(
            "lost-request",
            f"{len(mine.lost)} of {len(mine.requests)} requests did not get their whole answer.\nA"
            " policy may let people wait, but not send them away: `waiting` must hold the same"
            " requests afterwards.",
        )
    _check_clockless(answer, mine)
    expect(
        waits[1] <= 1.25 * waits[0] + 4,
        "starves",
        "Requests keep coming, a bit faster than the GPU can take them. Of those who came in the"
        f" first half second somebody waits {waits[0]} steps if 150 come in all, and {waits[1]} if"
        " 300 do: as long as others keep coming.\nWhoever has waited long enough must be next,"
        " however long the prompt, whoever has come since. `self.stats.num_steps` is a clock.",
    )
    expect(
        mine.throughput >= THROUGHPUT * right.throughput,
        "too-slow",
        f"{mine.throughput:,.0f} tokens a second, beside {right.throughput:,.0f} in order of"
        " arrival.\nIs the budget used up in every step while somebody waits?",
    )
    mine_median, right_median = (run.summary()["TTFT median"] for run in (mine, right))
    mine_worst, right_worst = (max(run.ttfts) for run in (mine, right))
    expect(
        mine_median <= MEDIAN * right_median,
        "no-better",
        f"The median TTFT is {mine_median:.0f} milliseconds, beside {right_median:.0f} in order of"
        f" arrival; at most {MEDIAN * right_median:.0f} are asked for.\nLet short prompts pass more"
        " often, or patience last longer.",
    )
    expect(
        mine_worst <= WORST * right_worst,
        "worst-too-long",
        f"Somebody waits {1000 * mine_worst:,.0f} milliseconds for the first token; in order of"
        f" arrival it was at most {1000 * right_worst:,.0f}, and {WORST} times that is"
        " allowed.\nYou starve nobody for ever, but some for too long: let patience end earlier.",
    )
    return "better for most, bearable for all, and nobody starves"
