# %% 05.1 no-empty-places: the last batch has as many places as requests
def wasted_share(lengths: list[int], places: int) -> float:
    had = used = 0
    for i in range(0, len(lengths), places):
        batch = lengths[i : i + places]
        had += max(batch) * len(batch)
        used += sum(batch)
    return 1 - used / had if had else 0.0


# %% 05.1 mean-of-batches: every batch counts alike
def wasted_share(lengths: list[int], places: int) -> float:
    shares = []
    for i in range(0, len(lengths), places):
        batch = lengths[i : i + places]
        shares.append(1 - sum(batch) / (places * max(batch)))
    return sum(shares) / len(shares) if shares else 0.0


# %% 05.1 longest-of-all: every batch runs as long as the longest request
def wasted_share(lengths: list[int], places: int) -> float:
    if not lengths:
        return 0.0
    num_batches = -(-len(lengths) // places)
    return 1 - sum(lengths) / (num_batches * places * max(lengths))


# %% 05.1 sorted-first: batches of equally long ones waste less, but nobody knows lengths
def wasted_share(lengths: list[int], places: int) -> float:
    lengths = sorted(lengths)
    had = places * sum(max(lengths[i : i + places]) for i in range(0, len(lengths), places))
    return 1 - sum(lengths) / had if had else 0.0


# %% 05.1 longest-first: the other way round
def wasted_share(lengths: list[int], places: int) -> float:
    lengths = sorted(lengths, reverse=True)
    had = places * sum(lengths[::places])
    return 1 - sum(lengths) / had if had else 0.0


# %% 05.1 useful-share: what was used
def wasted_share(lengths: list[int], places: int) -> float:
    had = places * sum(max(lengths[i : i + places]) for i in range(0, len(lengths), places))
    return sum(lengths) / had if had else 0.0


# %% 05.1 wrong-values: percent
def wasted_share(lengths: list[int], places: int) -> float:
    had = places * sum(max(lengths[i : i + places]) for i in range(0, len(lengths), places))
    return 100 * (1 - sum(lengths) / had) if had else 0.0


# %% 05.1 right: place by place
def wasted_share(lengths: list[int], places: int) -> float:
    idle = steps = 0
    queue = list(lengths)
    while queue:
        batch, queue = queue[:places], queue[places:]
        longest = max(batch)
        steps += longest
        idle += sum(longest - length for length in batch) + longest * (places - len(batch))
    return idle / (steps * places) if steps else 0.0


# %% 05.2 ignores-decodes: chunks of the whole budget
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    return [min(budget, prompt - start) for start in range(0, prompt, budget)]


# %% 05.2 fixed-chunk: what the first step leaves, in every step
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    room = max(1, budget - sum(1 for tokens in decodes if tokens > 0))
    return [min(room, prompt - start) for start in range(0, prompt, room)]


# %% 05.2 decodes-never-end: len(decodes) tokens in every step
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    chunks = []
    while prompt > 0:
        chunk = min(prompt, max(1, budget - len(decodes)))
        chunks.append(chunk)
        prompt -= chunk
    return chunks


# %% 05.2 ends-too-early: counts down before it counts
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        left = [tokens - 1 for tokens in left if tokens > 1]
        chunk = min(prompt, max(0, budget - len(left)))
        chunks.append(chunk)
        prompt -= chunk
    return chunks


# %% 05.2 last-chunk-too-long: forgets that the prompt ends
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while sum(chunks) < prompt:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
        for i in chosen:
            left[i] -= 1
        chunks.append(budget - len(chosen))
    return chunks


# %% 05.2 over-budget: everybody decodes, however small the budget
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        active = sum(tokens > 0 for tokens in left)
        left = [max(0, tokens - 1) for tokens in left]
        chunk = min(prompt, max(0, budget - active))
        chunks.append(chunk)
        prompt -= chunk
    return chunks


# %% 05.2 never-waits: a token for the prompt in every step, so that it gets on
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        active = sum(tokens > 0 for tokens in left)
        left = [max(0, tokens - 1) for tokens in left]
        chunk = min(prompt, max(1, budget - active))
        chunks.append(chunk)
        prompt -= chunk
    return chunks


# %% 05.2 negative-chunk: more decode than the budget has
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        active = sum(tokens > 0 for tokens in left)
        left = [tokens - 1 for tokens in left]
        chunks.append(min(prompt, budget - active))
        prompt -= chunks[-1]
    return chunks


# %% 05.2 skips-empty-steps: leaves out the steps in which the prompt waits
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][:budget]
        for i in chosen:
            left[i] -= 1
        chunk = min(prompt, budget - len(chosen))
        if chunk:
            chunks.append(chunk)
        prompt -= chunk
    return chunks


# %% 05.2 newest-first: the last ones decode when the budget is short
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left, chunks = list(decodes), []
    while prompt > 0:
        chosen = [i for i, tokens in enumerate(left) if tokens > 0][-budget:]
        for i in chosen:
            left[i] -= 1
        chunks.append(min(prompt, budget - len(chosen)))
        prompt -= chunks[-1]
    return chunks


# %% 05.2 changed-input: counts down the caller's list
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    chunks = []
    while prompt > 0:
        chosen = [i for i, tokens in enumerate(decodes) if tokens > 0][:budget]
        for i in chosen:
            decodes[i] -= 1
        chunks.append(min(prompt, budget - len(chosen)))
        prompt -= chunks[-1]
    return chunks


# %% 05.2 right: one by one
def chunks_of(prompt: int, decodes: list[int], budget: int) -> list[int]:
    left = decodes.copy()
    chunks = []
    while True:
        room = budget
        for i in range(len(left)):
            if left[i] and room:
                left[i] -= 1
                room -= 1
        if prompt <= room:
            return [*chunks, prompt]
        chunks.append(room)
        prompt -= room


# %% 05.3 preempts-the-oldest: whoever needs the block goes
victim = "A"
num_steps = 9
first_step_back = 9
computed_again = 8

# %% 05.3 wrong-victim: the one in the middle, for A needs one block and B the next
victim = "B"
num_steps = 9
first_step_back = 9
computed_again = 8

# %% 05.3 nobody-waits: as if there were room
victim = "C"
num_steps = 6
first_step_back = 9
computed_again = 8

# %% 05.3 forgets-its-answer: six tokens from the beginning
victim = "C"
num_steps = 12
first_step_back = 9
computed_again = 8

# %% 05.3 wrong-steps: forgets that the step back brings a token
victim = "C"
num_steps = 10
first_step_back = 9
computed_again = 8

# %% 05.3 only-the-prompt: as a new request
victim = "C"
num_steps = 9
first_step_back = 6
computed_again = 6

# %% 05.3 wrong-first-step: the token that was sampled last is forgotten
victim = "C"
num_steps = 9
first_step_back = 8
computed_again = 8

# %% 05.3 counts-the-new-one: all of its tokens are counted as done twice
victim = "C"
num_steps = 9
first_step_back = 9
computed_again = 9

# %% 05.3 right: a small letter
victim = "c"
num_steps = 9
first_step_back = 6 + 3
computed_again = 6 + 2

# %% 05.4 lost-request: put back when there are no blocks, not when there is no budget
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


# %% 05.4 lost-request: goes on with the next one instead of stopping
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            seq = self.waiting.popleft()
            num_new = min(seq.num_tokens, budget)
            if not self.block_manager.allocate(seq, num_new):
                continue
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new


# %% 05.4 overtaken: put back at the end of the queue
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting:
            seq = self.waiting.popleft()
            num_new = min(seq.num_tokens, budget)
            no_place = len(self.running) == self.max_num_seqs
            if num_new == 0 or no_place or not self.block_manager.allocate(seq, num_new):
                self.waiting.append(seq)
                break
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new


# %% 05.4 overtaken: who does not fit is skipped, and the next one tried
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        for seq in list(self.waiting):
            num_new = min(seq.num_tokens, budget)
            no_place = len(self.running) == self.max_num_seqs
            if num_new == 0 or no_place or not self.block_manager.allocate(seq, num_new):
                continue
            self.waiting.remove(seq)
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new


# %% 05.4 over-budget: takes the whole prompt whenever anything of the budget is left
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


# %% 05.4 stalled: waits until the whole prompt fits the budget
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting:
            seq = self.waiting[0]
            no_place = len(self.running) == self.max_num_seqs
            if seq.num_tokens > budget or no_place or not self.block_manager.allocate(seq, seq.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
            self.compute(batch, seq, seq.num_tokens)
            budget -= seq.num_tokens


# %% 05.4 another-plan: one admission a step
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        if not self.waiting or budget == 0 or len(self.running) == self.max_num_seqs:
            return
        seq = self.waiting[0]
        num_new = min(seq.num_tokens, budget)
        if self.block_manager.allocate(seq, num_new):
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
            self.compute(batch, seq, num_new)


# %% 05.4 too-many-places: the check for a free place got lost
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting and budget > 0:
            seq = self.waiting[0]
            num_new = min(seq.num_tokens, budget)
            if not self.block_manager.allocate(seq, num_new):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new


# %% 05.4 right: put back where it was
class NightShift(Scheduler):
    def schedule_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        while self.waiting:
            seq = self.waiting.popleft()
            num_new = min(seq.num_tokens, budget)
            no_place = len(self.running) == self.max_num_seqs
            if num_new == 0 or no_place or not self.block_manager.allocate(seq, num_new):
                self.waiting.appendleft(seq)
                break
            self.running.append(seq)
            self.start(batch, seq)
            self.compute(batch, seq, num_new)
            budget -= num_new


# %% 05.4 right: the conditions in the loop's head
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


# %% 05.5 lost-request: the one that had to make room for itself is gone
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.give_up(batch, newest)
            if newest is seq:
                return False
            self.waiting.appendleft(newest)
        return True


# %% 05.5 preempted-to-the-back: behind those who came later
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.append(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 preempts-the-oldest: the longest has most to give
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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


# %% 05.5 whole-prompts-only: admits who fits the budget as a whole
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            prefix = self.block_manager.find_cached_prefix(seq)
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = seq.num_tokens - num_cached
            # An empty step takes anybody, in chunks if need be: nobody is stuck for ever.
            if num_new > left and self.running:
                break
            num_new = min(num_new, left)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
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


# %% 05.5 over-budget: decodes are not counted
class MyScheduler(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            if num_new > 1:
                left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 lost-its-answer: back to the prompt
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            del newest.token_ids[newest.num_prompt_tokens :]
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 writes-shared-blocks: num_cached in blocks
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            prefix = self.block_manager.find_cached_prefix(seq)
            num_cached = len(prefix)
            num_new = min(seq.num_tokens - num_cached, left)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
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


# %% 05.5 reads-what-nobody-wrote: counts the prefix, and does not take its blocks
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            num_cached = len(self.block_manager.find_cached_prefix(seq)) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, left)
            if not self.block_manager.allocate(seq, num_cached + num_new):
                break
            self.running.append(self.waiting.popleft())
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


# %% 05.5 ignores-prefix-cache: computes everything
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            num_new = min(seq.num_tokens, left)
            if not self.block_manager.allocate(seq, num_new):
                break
            self.running.append(self.waiting.popleft())
            self.start(batch, seq)
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


# %% 05.5 overtaken: tries the next one when the head does not fit
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


# %% 05.5 admits-after-preempting: who has just gone comes right back
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
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 needless-preemption: makes room for everybody beforehand, a block each
class MyScheduler(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
        while len(self.running) > max(1, self.block_manager.num_free_blocks):
            self.waiting.appendleft(self.running.pop())
            self.give_up(batch, self.waiting[0])
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 skips-the-running: somebody is preempted, and whoever had to make room gets nothing in this step
class MyScheduler(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        for seq in list(self.running):
            if seq not in self.running or left == 0:
                continue
            num_new = min(seq.num_uncomputed_tokens, left)
            if self.block_manager.allocate(seq, seq.num_computed_tokens + num_new):
                self.compute(batch, seq, num_new)
                left -= num_new
        if not batch and self.running:  # nobody could go on: now make room
            seq = self.running[0]
            num_new = min(seq.num_uncomputed_tokens, left)
            if self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                self.compute(batch, seq, num_new)
                left -= num_new
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 never-given-up: moves the victim from queue to queue, and tells nobody
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            if newest is seq:
                return False
        return True


# %% 05.5 freed-not-given-up: gives back the blocks alone
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.block_manager.free(newest)
            newest.num_computed_tokens = 0
            if newest is seq:
                return False
        return True


# %% 05.5 whole-prompts-only: a prompt longer than the budget never comes in
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            prefix = self.block_manager.find_cached_prefix(seq)
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = seq.num_tokens - num_cached
            if num_new > left:
                break
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
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


# %% 05.5 whole-prompts-only: wants blocks for the whole prompt before its first chunk, and stops
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            prefix = self.block_manager.find_cached_prefix(seq)
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = seq.num_tokens - num_cached
            if num_new > left and batch:
                break
            num_new = min(num_new, left)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
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


# %% 05.5 never-started: admits by moving alone
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            prefix = self.block_manager.find_cached_prefix(seq)
            num_cached = len(prefix) * self.block_manager.block_size
            num_new = min(seq.num_tokens - num_cached, left)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
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


# %% 05.5 wrong-queue: gives up whom it has not moved yet
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running[-1]
            self.give_up(batch, newest)
            self.running.pop()
            self.waiting.appendleft(newest)
            if newest is seq:
                return False
        return True


# %% 05.5 too-many-places: counts tokens, and no places
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 planned-and-preempted: the second goes, for the first may not
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop(1 if len(self.running) > 1 else 0)
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 computed-without-blocks: asks for the blocks of the new tokens alone
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            if not self.make_room(batch, seq, num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 wrong-number: a running sequence computes all of its tokens once more
class MyScheduler(SchedulerBase):

    def schedule(self) -> ScheduledBatch:
        batch, left = ScheduledBatch(), self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_tokens, left)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
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
        while not self.block_manager.allocate(seq, num_tokens):
            newest = self.running.pop()
            self.waiting.appendleft(newest)
            self.give_up(batch, newest)
            if newest is seq:
                return False
        return True


# %% 05.5 right: a loop over a copy, and everything in one method
class MyScheduler(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        batch = ScheduledBatch()
        left = self.max_num_batched_tokens
        for seq in list(self.running):
            count = min(seq.num_uncomputed_tokens, left)
            if count == 0 or seq not in self.running:
                continue
            while seq in self.running and not self.block_manager.allocate(seq, seq.num_computed_tokens + count):
                victim = self.running[-1]
                self.running.remove(victim)
                self.waiting.insert(0, victim)
                self.give_up(batch, victim)
            if seq in self.running:
                self.compute(batch, seq, count)
                left -= count
        while not batch.preempted and self.waiting and left and len(self.running) < self.max_num_seqs:
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


# %% 05.5 right: takes a shorter chunk where a whole one has no blocks
class MyScheduler(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        batch, left, index = ScheduledBatch(), self.max_num_batched_tokens, 0
        size = self.block_manager.block_size
        while index < len(self.running) and left > 0:
            seq = self.running[index]
            num_new = min(seq.num_uncomputed_tokens, left)
            room = (len(seq.block_table) + self.block_manager.num_free_blocks) * size - seq.num_computed_tokens
            if room > 0:
                num_new = min(num_new, room)
            if not self.make_room(batch, seq, seq.num_computed_tokens + num_new):
                break
            self.compute(batch, seq, num_new)
            left -= num_new
            index += 1
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs and not batch.preempted:
            seq = self.waiting[0]
            prefix = self.block_manager.find_cached_prefix(seq)
            num_cached = len(prefix) * size
            num_new = min(seq.num_tokens - num_cached, left)
            if not self.block_manager.allocate(seq, num_cached + num_new, prefix):
                break
            self.running.append(self.waiting.popleft())
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


# %% 05.6 starves: the shortest first
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.num_tokens))
        return super().schedule()


# %% 05.6 starves: the newest first, whose median is just as good
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: -seq.seq_id))
        return super().schedule()


# %% 05.6 starves: two lanes, the short one first; best on the busy day
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: (seq.num_tokens > 900, seq.seq_id)))
        return super().schedule()


# %% 05.6 no-better: in order of arrival, which it is anyway
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.seq_id))
        return super().schedule()


# %% 05.6 no-better: age counts so much that nothing else does
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}

    def schedule(self) -> ScheduledBatch:
        now = self.stats.num_steps
        order = sorted(self.waiting, key=lambda seq: seq.num_tokens - 1000 * (now - self.born[seq.seq_id]))
        self.waiting = deque(order)
        return super().schedule()


# %% 05.6 worst-too-long: age counts, but too little
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}

    def schedule(self) -> ScheduledBatch:
        now = self.stats.num_steps
        order = sorted(self.waiting, key=lambda seq: seq.num_tokens - 100 * (now - self.born[seq.seq_id]))
        self.waiting = deque(order)
        return super().schedule()


# %% 05.6 lost-request: long prompts are sent away
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        for seq in [seq for seq in self.waiting if seq.num_tokens > 2500]:
            self.finish(seq, "abort")
        return super().schedule()


# %% 05.6 too-slow: one at a time, so that nobody waits behind a long one
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        waiting = sorted(self.waiting, key=lambda seq: seq.seq_id)
        keep = waiting if len(self.running) < 8 else []
        self.waiting = deque(keep)
        batch = super().schedule()
        if not keep:
            self.waiting = deque(waiting)
        return batch


# %% 05.6 machine-clock: patience by the machine's clock, in simulated proportion
import time


class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: time.monotonic()}

    def schedule(self) -> ScheduledBatch:
        now = time.monotonic()
        order = sorted(self.waiting, key=lambda seq: seq.num_tokens - 3e6 * (now - self.born[seq.seq_id]))
        self.waiting = deque(order)
        return super().schedule()


# %% 05.6 machine-clock: a clock under a name of its own, which decides the order of arrival only
from time import perf_counter_ns as now


class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: (now(), self.stats.num_steps)}

    def schedule(self) -> ScheduledBatch:
        late = self.stats.num_steps - 20
        self.waiting = deque(sorted(self.waiting, key=lambda s: self.rank(s, late)))
        return super().schedule()

    def rank(self, seq: Sequence, late: int) -> tuple:
        born, step = self.born[seq.seq_id]
        return (0, born) if step < late else (1, seq.num_tokens)


# %% 05.6 machine-clock: the time of day
from datetime import datetime


class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: datetime.now()}

    def schedule(self) -> ScheduledBatch:
        by_age = self.stats.num_steps % 2 == 0
        self.waiting = deque(sorted(self.waiting, key=lambda s: (self.born[s.seq_id] if by_age else datetime.min, s.num_tokens)))
        return super().schedule()


# %% 05.6 not-the-same-twice: every now and then it is somebody's lucky day
import random


class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        by_age = random.random() < 0.5
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.seq_id if by_age else seq.num_tokens))
        return super().schedule()


# %% 05.6 right: age against length
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}

    def schedule(self) -> ScheduledBatch:
        now = self.stats.num_steps
        order = sorted(self.waiting, key=lambda seq: seq.num_tokens - 300 * (now - self.born[seq.seq_id]))
        self.waiting = deque(order)
        return super().schedule()


# %% 05.6 right: every second step belongs to the oldest
class FairQueue(Scheduler):
    def schedule(self) -> ScheduledBatch:
        by_age = self.stats.num_steps % 2 == 0
        self.waiting = deque(sorted(self.waiting, key=lambda seq: seq.seq_id if by_age else seq.num_tokens))
        return super().schedule()


# %% 05.6 right: two lanes, and patience
class FairQueue(Scheduler):
    def add(self, seq: Sequence) -> None:
        super().add(seq)
        self.born = getattr(self, "born", {}) | {seq.seq_id: self.stats.num_steps}

    def schedule(self) -> ScheduledBatch:
        late = self.stats.num_steps - 25
        self.waiting = deque(
            sorted(self.waiting, key=lambda s: (self.born[s.seq_id] > late, self.born[s.seq_id] > late and s.num_tokens > 900, s.seq_id))
        )
        return super().schedule()
