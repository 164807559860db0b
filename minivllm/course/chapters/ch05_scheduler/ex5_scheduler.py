"""05.5: your scheduler, in the engine."""

from __future__ import annotations

from random import Random
from typing import Any

from minivllm.course.chapters.ch05_scheduler.common import misuse, the_count
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.course.grading.with_engine import engine_agrees
from minivllm.engine.scheduler import Scheduler


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
            f"With a budget of {budget}, {the_count(places, 'place')}, {blocks} blocks of"
            f" {the_count(size, 'token')}"
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
        name, hint = misuse(what)
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


EXERCISE = Exercise(
    id="05.5",
    title="Your scheduler, in the engine",
    check=check_scheduler,
    mistakes=(
        Known(
            "lost-request",
            hint=2,
            answers=r'''
# %% the one that had to make room for itself is gone
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
@@
-            self.waiting.appendleft(newest)
@@
                 return False
+            self.waiting.appendleft(newest)
''',
        ),
        Known(
            "preempted-to-the-back",
            hint=2,
            answers=r'''
# %% behind those who came later
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
@@
-            self.waiting.appendleft(newest)
+            self.waiting.append(newest)
''',
        ),
        Known(
            "preempts-the-oldest",
            hint=2,
            answers=r"""
# %% the longest has most to give
class MyScheduler(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        for seq in list(self.running):
            if left == 0 or seq not in self.running:
                continue
            num_new = min(seq.num_uncomputed_tokens, left)
            if self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                self.compute(batch, seq, num_new)
                left -= num_new
        while (
            self.waiting
            and left > 0
            and len(self.running) < self.max_num_seqs
            and not batch.preempted
        ):
            seq = self.waiting[0]
            prefix = self.block_manager.find_cached_prefix(seq)
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, left)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq, num_cached)
            self.compute(batch, seq, num_new)
            left -= num_new
        return batch

    def make_room(self, batch: ScheduledBatch, seq: Sequence, num_tokens: int) -> bool:
        planned = [item.sequence for item in batch.items]
        while not self.block_manager.allocate(seq, num_tokens):
            victim = next(other for other in self.running if other not in planned)
            self.running.remove(victim)
            self.waiting.appendleft(victim)
            self.give_up(batch, victim)
            if victim is seq:
                return False
        return True
""",
        ),
        Known(
            "whole-prompts-only",
            hint=3,
            answers=r'''
# %% admits who fits the budget as a whole
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
-            num_new = min(seq.num_tokens - num_cached, left)
+            num_new = seq.num_tokens - num_cached
+            # An empty step takes anybody, in chunks if need be: nobody is stuck for ever.
+            if num_new > left and self.running:
+                break
+            num_new = min(num_new, left)
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""

# %% a prompt longer than the budget never comes in
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-            num_new = min(seq.num_tokens - num_cached, left)
+            num_new = seq.num_tokens - num_cached
+            if num_new > left:
+                break
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""

# %% wants blocks for the whole prompt before its first chunk, and stops
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-            num_new = min(seq.num_tokens - num_cached, left)
+            num_new = seq.num_tokens - num_cached
+            if num_new > left and batch:
+                break
+            num_new = min(num_new, left)
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "over-budget",
            answers=r'''
# %% decodes are not counted
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
             self.compute(batch, seq, num_new)
-            left -= num_new
+            if num_new > 1:
+                left -= num_new
             index += 1
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "lost-its-answer",
            answers=r'''
# %% back to the prompt
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
@@
             newest = self.running.pop()
+            del newest.token_ids[newest.num_prompt_tokens :]
''',
        ),
        Known(
            "writes-shared-blocks",
            hint=3,
            answers=r'''
# %% num_cached in blocks
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
-            num_cached = len(prefix) * self.block_manager.block_size
+            num_cached = len(prefix)
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "reads-what-nobody-wrote",
            hint=3,
            answers=r'''
# %% counts the prefix, and does not take its blocks
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
-            prefix = self.block_manager.find_cached_prefix(seq)
-            num_cached = len(prefix) * self.block_manager.block_size
+            num_cached = (
+                len(self.block_manager.find_cached_prefix(seq))
+                * self.block_manager.block_size
+            )
@@
-            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
+            if not self.block_manager.allocate(seq, num_cached + num_new):
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "ignores-prefix-cache",
            hint=3,
            answers=r'''
# %% computes everything
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
-            prefix = self.block_manager.find_cached_prefix(seq)
-            num_cached = len(prefix) * self.block_manager.block_size
-            num_new = min(seq.num_tokens - num_cached, left)
-            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
+            num_new = min(seq.num_tokens, left)
+            if not self.block_manager.allocate(seq, num_new):
@@
-            self.start(batch, seq, num_cached)
+            self.start(batch, seq)
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "overtaken",
            answers=r"""
# %% tries the next one when the head does not fit
class MyScheduler(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        for seq in list(self.waiting):
            if left == 0 or len(self.running) == self.max_num_seqs or batch.preempted:
                break
            prefix = self.block_manager.find_cached_prefix(seq)
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, left)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                continue
            self.waiting.remove(seq)
            self.running.append(seq)
            self.start(batch, seq, num_cached)
            self.compute(batch, seq, num_new)
            left -= num_new
        return batch

    def make_room(self, batch: ScheduledBatch, seq: Sequence, num_tokens: int) -> bool:
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True
""",
        ),
        Known(
            "admits-after-preempting",
            answers=r'''
# %% who has just gone comes right back
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
@@
-        while (
-            self.waiting
-            and left > 0
-            and len(self.running) < self.max_num_seqs
-            and not batch.preempted
-        ):
+        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs:
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "needless-preemption",
            answers=r'''
# %% makes room for everybody beforehand, a block each
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
+        while len(self.running) > max(1, self.block_manager.num_free_blocks):
+            self.waiting.appendleft(self.running.pop())
+            self.give_up(batch, self.waiting[0])
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "skips-the-running",
            answers=r'''
# %% somebody is preempted, and whoever had to make room gets nothing in this step
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-        index = 0
-        while index < len(self.running) and left > 0:
-            seq = self.running[index]
+        for seq in list(self.running):
+            if seq not in self.running or left == 0:
+                continue
@@
-            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
-                break
-            self.compute(batch, seq, num_new)
-            left -= num_new
-            index += 1
+            if self.block_manager.allocate(seq, seq.num_computed_tokens + num_new):
+                self.compute(batch, seq, num_new)
+                left -= num_new
+        if not batch and self.running:  # nobody could go on: now make room
+            seq = self.running[0]
+            num_new = min(seq.num_uncomputed_tokens, left)
+            if self.make_room(batch, seq, seq.num_computed_tokens + num_new):
+                self.compute(batch, seq, num_new)
+                left -= num_new
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "never-given-up",
            hint=2,
            answers=r'''
# %% moves the victim from queue to queue, and tells nobody
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
@@
-            self.give_up(batch, newest)
''',
        ),
        Known(
            "freed-not-given-up",
            hint=2,
            answers=r'''
# %% gives back the blocks alone
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
@@
-            self.give_up(batch, newest)
+            self.block_manager.free(newest)
+            newest.num_computed_tokens = 0
''',
        ),
        Known(
            "never-started",
            hint=3,
            answers=r'''
# %% admits by moving alone
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-            self.start(batch, seq, num_cached)
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "wrong-queue",
            answers=r'''
# %% gives up whom it has not moved yet
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
@@
-            newest = self.running.pop()
+            newest = self.running[-1]
+            self.give_up(batch, newest)
+            self.running.pop()
@@
             self.waiting.appendleft(newest)
-            self.give_up(batch, newest)
''',
        ),
        Known(
            "too-many-places",
            answers=r'''
# %% counts tokens, and no places
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-        while (
-            self.waiting
-            and left > 0
-            and len(self.running) < self.max_num_seqs
-            and not batch.preempted
-        ):
+        while self.waiting and left > 0 and not batch.preempted:
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "planned-and-preempted",
            answers=r'''
# %% the second goes, for the first may not
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
@@
-            newest = self.running.pop()
+            newest = self.running.pop(1 if len(self.running) > 1 else 0)
''',
        ),
        Known(
            "computed-without-blocks",
            answers=r'''
# %% asks for the blocks of the new tokens alone
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
+            if not self.make_room(batch, seq, num_new):
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
        Known(
            "wrong-number",
            answers=r'''
# %% a running sequence computes all of its tokens once more
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
@@
-            num_new = min(seq.num_uncomputed_tokens, left)
+            num_new = min(seq.num_tokens, left)
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
        ),
    ),
    right=r'''
# %% a loop over a copy, and everything in one method
class MyScheduler(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        batch = ScheduledBatch()
        left = self.max_num_batched_tokens
        for seq in list(self.running):
            count = min(seq.num_uncomputed_tokens, left)
            if count == 0 or seq not in self.running:
                continue
            while seq in self.running and not self.block_manager.allocate(
                seq, seq.num_computed_tokens + count
            ):
                victim = self.running[-1]
                self.running.remove(victim)
                self.waiting.insert(0, victim)
                self.give_up(batch, victim)
            if seq in self.running:
                self.compute(batch, seq, count)
                left -= count
        while (
            not batch.preempted
            and self.waiting
            and left
            and len(self.running) < self.max_num_seqs
        ):
            seq = self.waiting.popleft()
            prefix = self.block_manager.find_cached_prefix(seq)
            cached = self.block_manager.block_size * len(prefix)
            count = min(left, seq.num_tokens - cached)
            if self.block_manager.allocate(seq, cached + count, prefix):
                self.running.append(seq)
                self.start(batch, seq, cached)
                self.compute(batch, seq, count)
                left -= count
            else:
                self.waiting.appendleft(seq)
                return batch
        return batch

    def make_room(self, batch: ScheduledBatch, seq: Sequence, num_tokens: int) -> bool:
        return True

# %% takes a shorter chunk where a whole one has no blocks
@@
-    """Running sequences first, then waiting ones in order of arrival; the newest is preempted first."""
-
@@
-        """Plan the next step."""
-        batch, left = ScheduledBatch(), self.max_num_batched_tokens
-        index = 0
+        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
+        size = self.block_manager.block_size
@@
             num_new = min(seq.num_uncomputed_tokens, left)
+            room = (
+                len(seq.block_table) + self.block_manager.num_free_blocks
+            ) * size - seq.num_computed_tokens
+            if room > 0:
+                num_new = min(num_new, room)
@@
-            num_cached = len(prefix) * self.block_manager.block_size
+            num_cached = len(prefix) * size
@@
-        """Blocks for the first num_tokens tokens of seq; False if seq itself had to go."""
''',
)
