"""05.4: debug this: requests that vanish."""

from __future__ import annotations

from dataclasses import replace

from minivllm.course.chapters.ch05_scheduler.machine import expect_places_kept, play_many
from minivllm.course.chapters.ch05_scheduler.rules import ADMISSION
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.engine.scheduler import Scheduler


def check_admission(answer: type) -> str:
    expect(
        isinstance(answer, type)
        and issubclass(answer, Scheduler)
        and answer.schedule_waiting is not Scheduler.schedule_waiting,
        "wrong-type",
        "Leave it a subclass of Scheduler, with a method `schedule_waiting(self, batch,"
        f" budget)`.\nYou handed in {answer!r}.",
    )
    requests, *_ = play_many(answer, EXERCISE.suspects, False, 4, (100, 8))
    expect_places_kept(answer)
    return f"{requests} requests in, {requests} answers out"


#: Answers for the mistakes that the rules name.
ANSWERS = {
    "overtaken": r"""
# %% put back at the end of the queue
@@
-            seq = self.waiting[0]
+            seq = self.waiting.popleft()
@@
-                break
-            self.running.append(self.waiting.popleft())
+                self.waiting.append(seq)
+                break
+            self.running.append(seq)

# %% who does not fit is skipped, and the next one tried
@@
-        while self.waiting:
-            seq = self.waiting[0]
+        for seq in list(self.waiting):
@@
-                break
-            self.running.append(self.waiting.popleft())
+                continue
+            self.waiting.remove(seq)
+            self.running.append(seq)

# %% after 300 steps whoever finds no blocks goes to the end of the queue
@@
-                break
+                if self.stats.num_steps > 300:
+                    self.waiting.rotate(-1)
+                break
""",
    "whole-prompts-only": r"""
# %% waits until the whole prompt fits the budget
@@
-            num_new = min(seq.num_tokens, budget)
+            num_new = seq.num_tokens
@@
-                num_new == 0
+                num_new > budget
""",
    "one-admission": r"""
# %% `if` for `while`
@@
-        while self.waiting:
+        for _ in range(min(1, len(self.waiting))):
""",
    "prompt-only": r"""
# %% a request that comes back computes its prompt
@@
-            num_new = min(seq.num_tokens, budget)
+            num_new = min(seq.num_prompt_tokens, budget)
""",
    "blocks-for-all": r"""
# %% blocks for the whole prompt, before its first chunk
@@
-                or not self.block_manager.allocate(seq, num_new)
+                or not self.block_manager.allocate(seq, seq.num_tokens)
""",
    "block-in-reserve": r"""
# %% one block stays free for those who run
@@
-                num_new == 0
+                num_new == 0
+                or self.running
+                and self.block_manager.num_free_blocks
+                <= self.block_manager.num_blocks_for(num_new)
""",
    "place-unused": r"""
# %% a place stays empty
@@
-            no_place = len(self.running) == self.max_num_seqs
+            no_place = len(self.running) + 1 >= self.max_num_seqs
""",
    "budget-unused": r"""
# %% the last token of the budget stays
@@
-                num_new == 0
+                budget <= 1
""",
}

EXERCISE = Exercise(
    id="05.4",
    title="Debug this: requests that vanish",
    check=check_admission,
    mistakes=(
        *(replace(known, answers=ANSWERS.get(known.name, "")) for known in ADMISSION),
        Known(
            "too-short-a-chunk",
            answers=r"""
# %% no chunk above 512 tokens
@@
-            num_new = min(seq.num_tokens, budget)
+            num_new = min(seq.num_tokens, budget, 512)
""",
        ),
        Known(
            "leaves-budget",
            answers=r"""
# %% 64 in a step, and no more
@@
             budget -= num_new
+            if len(batch.admitted) == 64:
+                break
""",
        ),
        Known(
            "lost-request",
            hint=2,
            answers=r"""
# %% put back when there are no blocks, not when there is no budget
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting:
            seq = self.waiting.popleft()
            num_new = min(seq.num_tokens, budget)
            if num_new == 0 or len(self.running) == self.max_num_seqs:
                break
            if not self.block_manager.allocate(seq, num_new):
                self.waiting.appendleft(seq)
                break
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new

# %% sends away whose prompt is long
@@
             seq = self.waiting[0]
+            if seq.num_tokens > 500:
+                self.waiting.popleft()
+                continue

# %% goes on with the next one instead of stopping
@@
-        while self.waiting:
-            seq = self.waiting[0]
+        while self.waiting and budget and len(self.running) < self.max_num_seqs:
+            seq = self.waiting.popleft()
@@
-                break
-            self.running.append(self.waiting.popleft())
+                continue
+            self.running.append(seq)
""",
        ),
        Known(
            "never-computed",
            answers=r"""
# %% starts, and forgets to compute
@@
-            self.compute(batch, seq, num_new)
             budget -= num_new
""",
        ),
        Known(
            "over-budget",
            answers=r"""
# %% takes the whole prompt whenever anything of the budget is left
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not self.block_manager.allocate(seq, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
            self.compute(batch, seq, seq.num_tokens)
            budget -= seq.num_tokens

# %% the budget is not counted down
@@
-            budget -= num_new
""",
        ),
        Known(
            "too-many-places",
            answers=r"""
# %% the check for a free place got lost
@@
-                or no_place

# %% counts whom this step computes
@@
-            no_place = len(self.running) == self.max_num_seqs
+            no_place = len(batch.items) == self.max_num_seqs
""",
        ),
        Known(
            "blocks-while-waiting",
            answers=r"""
# %% asks for the blocks first, and for a place and the budget then
@@
-                num_new == 0
+                not self.block_manager.allocate(seq, num_new)
                 or no_place
-                or not self.block_manager.allocate(seq, num_new)
+                or num_new == 0
""",
        ),
        Known(
            "computed-without-blocks",
            answers=r"""
# %% blocks are not asked for
@@
-                or not self.block_manager.allocate(seq, num_new)
""",
        ),
    ),
    right=r"""
# %% put back where it was
@@
-            seq = self.waiting[0]
+            seq = self.waiting.popleft()
@@
-                break
-            self.running.append(self.waiting.popleft())
+                self.waiting.appendleft(seq)
+                break
+            self.running.append(seq)

# %% the conditions in the loop's head
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            num_new = min(seq.num_tokens, budget)
            if not self.block_manager.allocate(seq, num_new):
                return
            self.waiting.popleft()
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new
""",
)
