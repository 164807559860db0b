# Answers to the exercises of chapter 08 that people really write. Each section replaces the whole answer cell.

# %% 08.1 launch-and-kernel-added: launches and kernels one after the other
small_eager = 100 * (10 + 4)
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200


# %% 08.1 launch-and-kernel-added: for the large kernels
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 100 * (10 + 30)
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200


# %% 08.1 the-end-forgotten: the last kernel is still to run
small_eager = 100 * 10
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200


# %% 08.1 the-beginning-forgotten: kernels alone
small_eager = 100 * 10 + 4
small_graph = 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200


# %% 08.1 kernels-forgotten: a replay returns at once
small_eager = 100 * 10 + 4
small_graph = 20
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200


# %% 08.1 the-faster-one: the CPU sets the pace, also for large kernels
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 100 * 10 + 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200


# %% 08.1 waiting-is-not-free: as without waiting
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 10 + 100 * 30
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200


# %% 08.1 launches-forgotten: in each step
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 10 * 1000 + 200


# %% 08.1 ends-forgotten: the GPU's steps alone
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 10 * 1000


# %% 08.1 nothing-overlapped: one step ahead as without
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 10 * (300 + 20 + 1000 + 200)


# %% 08.1 wrong-prediction: a sum gone wrong
small_eager = 100 * 10 + 4
small_graph = 20 + 100 * 4
large_eager = 10 + 100 * 30
large_waiting = 100 * (10 + 30)
ten_steps = 10 * (300 + 20 + 1000 + 200)
ten_steps_ahead = 300 + 20 + 9 * 1000 + 200


# %% 08.2 powers-of-two: whatever comes
def choose_sizes(seen, max_num_seqs, num_graphs):
    sizes, power = [max_num_seqs], 1
    while power < max_num_seqs and len(sizes) < num_graphs:
        sizes.append(power)
        power *= 2
    return sorted(sizes)


# %% 08.2 powers-of-two: the largest ones
def choose_sizes(seen, max_num_seqs, num_graphs):
    powers = [2**i for i in range(20) if 2**i < max_num_seqs]
    return (powers[-(num_graphs - 1) :] if num_graphs > 1 else []) + [max_num_seqs]


# %% 08.2 evenly-spaced: whatever comes
def choose_sizes(seen, max_num_seqs, num_graphs):
    return sorted({max(1, max_num_seqs * (i + 1) // num_graphs) for i in range(num_graphs)})


# %% 08.2 most-frequent: the numbers that come most often
def choose_sizes(seen, max_num_seqs, num_graphs):
    others = [n for n in seen if n != max_num_seqs]
    others.sort(key=lambda n: seen[n], reverse=True)
    return sorted(others[: num_graphs - 1] + [max_num_seqs])


# %% 08.2 greedy: always the one that helps most now
def choose_sizes(seen, max_num_seqs, num_graphs):
    def padding(sizes):
        return sum(steps * (min(s for s in sizes if s >= n) - n) for n, steps in seen.items())

    sizes = [max_num_seqs]
    while len(sizes) < num_graphs and set(seen) - set(sizes):
        sizes.append(min(sorted(set(seen) - set(sizes)), key=lambda n: padding(sizes + [n])))
    return sorted(sizes)


# %% 08.2 merged-step-by-step: drop the cheapest until few are left
def choose_sizes(seen, max_num_seqs, num_graphs):
    def padding(sizes):
        return sum(steps * (min(s for s in sizes if s >= n) - n) for n, steps in seen.items())

    sizes = sorted(set(seen) | {max_num_seqs})
    while len(sizes) > num_graphs:
        drop = min(sizes[:-1], key=lambda n: padding([s for s in sizes if s != n]))
        sizes.remove(drop)
    return sizes


# %% 08.2 frequency-ignored: every number counts once
def choose_sizes(seen, max_num_seqs, num_graphs):
    counts = sorted({*seen, max_num_seqs})
    best = {0: (0, [])}
    for _ in range(num_graphs):
        further = dict(best)
        for done, (padding, sizes) in best.items():
            for end in range(done + 1, len(counts) + 1):
                size = counts[end - 1]
                more = sum(size - n for n in counts[done:end])
                if end not in further or padding + more < further[end][0]:
                    further[end] = padding + more, [*sizes, size]
        best = further
    return best[len(counts)][1]


# %% 08.2 largest-missing: only numbers that were seen
def choose_sizes(seen, max_num_seqs, num_graphs):
    counts = sorted(seen)
    best = {0: (0, [])}
    for _ in range(num_graphs):
        further = dict(best)
        for done, (padding, sizes) in best.items():
            for end in range(done + 1, len(counts) + 1):
                size = counts[end - 1]
                more = sum(seen[n] * (size - n) for n in counts[done:end])
                if end not in further or padding + more < further[end][0]:
                    further[end] = padding + more, [*sizes, size]
        best = further
    return best[len(counts)][1]


# %% 08.2 too-many-graphs: the largest comes on top
def choose_sizes(seen, max_num_seqs, num_graphs):
    often = sorted(seen, key=lambda n: -seen[n])[:num_graphs]
    return sorted({*often, max_num_seqs})


# %% 08.2 not-ascending: in the order in which they were found
def choose_sizes(seen, max_num_seqs, num_graphs):
    often = sorted((n for n in seen if n != max_num_seqs), key=lambda n: -seen[n])
    return [max_num_seqs, *often[: num_graphs - 1]]


# %% 08.2 right: recursion with a memory
def choose_sizes(seen, max_num_seqs, num_graphs):
    from functools import cache

    counts = sorted(set(seen) | {max_num_seqs})

    @cache
    def cost(first, last):
        return sum(seen.get(n, 0) * (counts[last] - n) for n in counts[first : last + 1])

    @cache
    def best(last, graphs):
        alone = (cost(0, last), (counts[last],))
        if graphs == 1:
            return alone
        options = [alone]
        for before in range(last):
            padding, sizes = best(before, graphs - 1)
            options.append((padding + cost(before + 1, last), (*sizes, counts[last])))
        return min(options)

    return list(best(len(counts) - 1, num_graphs)[1])


# %% 08.3 spare-row-reads: everybody reads position + 1
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, (positions + 1).int(), block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 spare-row-writes: to where its table says
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    return positions, seq_lens, block_table, block * block_size + positions % block_size


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 spare-row-writes: 0 in place of -1
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, 0)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 spare-slot-moves-on: everybody moves on
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    state.last_token[slots] = token_ids
    state.position[slots] += 1


# %% 08.3 own-token-not-read: as many as the position says
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 block-not-looked-up: the number in the table is not the block
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, slots * block_table.shape[1] * block_size + positions, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 block-not-looked-up: the first block for all
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block_table[:, 0] * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 wrong-dtype: seq_lens stay int64
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0)
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 waits-for-the-gpu: a mask as an index
def decode_inputs(state, slots, block_size):
    spare = len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = (positions + 1).int()
    slot_mapping = block * block_size + positions % block_size
    seq_lens[slots == spare] = 0
    slot_mapping[slots == spare] = -1
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    spare = len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(slots < spare, state.position[slots] + 1, 0)


# %% 08.3 waits-for-the-gpu: advance looks which slots are real
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    real = slots[slots < len(state.position) - 1]
    state.last_token[slots] = token_ids
    state.position[real] += 1


# %% 08.3 waits-for-the-gpu: a loop in Python
def decode_inputs(state, slots, block_size):
    spare = len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    seq_lens, places = torch.zeros_like(slots).int(), torch.full_like(slots, -1)
    for row in range(len(slots)):
        if slots[row] != spare:
            p = positions[row]
            seq_lens[row] = p + 1
            places[row] = block_table[row, (p // block_size).item()] * block_size + p % block_size
    return positions, seq_lens, block_table, places


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 position-not-advanced: another tensor gets the sum
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    state.last_token[slots] = token_ids
    positions = state.position[slots]
    positions += 1


# %% 08.3 others-changed: all slots move on
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    state.last_token[slots] = token_ids
    state.position.add_(1)
    state.position[-1] = 0


# %% 08.3 token-not-noted: only the position moves
def decode_inputs(state, slots, block_size):
    is_real = slots < len(state.position) - 1
    positions = state.position[slots]
    block_table = state.block_table[slots]
    block = block_table.gather(1, (positions // block_size)[:, None])[:, 0]
    seq_lens = torch.where(is_real, positions + 1, 0).int()
    slot_mapping = torch.where(is_real, block * block_size + positions % block_size, -1)
    return positions, seq_lens, block_table, slot_mapping


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 right: masks as numbers, and the spare slot put back at the end
def decode_inputs(state, slots, block_size):
    real = (slots != state.position.shape[0] - 1).long()
    positions = state.position.index_select(0, slots)
    block_table = state.block_table.index_select(0, slots)
    block = torch.take_along_dim(block_table, (positions // block_size).unsqueeze(1), 1).squeeze(1).long()
    places = (block * block_size + positions % block_size) * real - (1 - real)
    return positions, ((positions + 1) * real).to(torch.int32), block_table, places


def advance(state, slots, token_ids):
    state.last_token[slots] = token_ids
    state.position[slots] += 1
    state.position[-1] = 0


# %% 08.4 not-warmed-up: recorded at once
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        fitting = [size for size in self.graphs if size >= len(slots)]
        if not fitting:
            raise ValueError("too many")
        size = min(fitting)
        padded = [*slots, *[self.spare_slot] * (size - len(slots))]
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 inputs-not-updated: a new tensor at each replay
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        self.slots = self.gpu.tensor(slots + [self.spare_slot] * (size - len(slots)))
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 waits-for-the-gpu: a copy from ordinary memory
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        self.slots[:size].copy_(torch.tensor(slots + [self.spare_slot] * (size - len(slots))))
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 waits-for-the-gpu: not pinned, so non_blocking does not help
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = torch.tensor(slots + [self.spare_slot] * (size - len(slots)))
        self.slots[:size].copy_(padded, non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 stale-rows: only the real rows are written
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu = gpu
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        self.slots[: len(slots)].copy_(self.gpu.pinned(slots), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 padded-with-somebody: zeros
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu = gpu
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [0] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 padded-with-somebody: the last one again
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu = gpu
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + slots[-1:] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 warmed-up-on-somebody: a buffer of zeros
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), 0)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 a-pool-for-each: gpu.graph without a pool
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs = {}
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 a-pool-for-each: a handle for each
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs = {}
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=gpu.graph_pool_handle()):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 largest-graph-always: the largest fits all
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        size = max(self.graphs)
        if len(slots) > size:
            raise ValueError("too many")
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots.copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 not-the-smallest: the first in the list that is large enough
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot, self.sizes = gpu, spare_slot, sorted(sizes, key=lambda n: (n != 4, n))
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = next(size for size in self.sizes if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 not-the-smallest: one too large where it fits exactly
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min([size for size in self.graphs if size > len(slots)], default=max(self.graphs))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 padding-returned: the whole result
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids


# %% 08.4 pinned-overwritten: one pinned buffer for all
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.host = gpu.pinned([spare_slot] * max(sizes))
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        if len(slots) > max(self.graphs):
            raise ValueError("too many")
        size = min(size for size in self.graphs if size >= len(slots))
        self.host[:size] = torch.tensor(slots + [self.spare_slot] * (size - len(slots)))
        self.slots[:size].copy_(self.host[:size], non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 launched-not-replayed: recorded, and then launched one by one
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.step, self.sizes, self.spare_slot = gpu, step, sizes, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        pool = gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            with gpu.graph(gpu.CUDAGraph(), pool=pool):
                step(self.slots[:size])

    def replay(self, slots):
        if len(slots) > max(self.sizes):
            raise ValueError("too many")
        size = min(size for size in self.sizes if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        return self.step(self.slots[:size])[: len(slots)]


# %% 08.4 not-recorded: recorded when first needed
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.step, self.sizes, self.spare_slot = gpu, step, sizes, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, self.pool = {}, gpu.graph_pool_handle()
        step(self.slots[:1])

    def replay(self, slots):
        if len(slots) > max(self.sizes):
            raise ValueError("too many")
        size = min(size for size in self.sizes if size >= len(slots))
        if size not in self.graphs:
            graph = self.gpu.CUDAGraph()
            with self.gpu.graph(graph, pool=self.pool):
                token_ids = self.step(self.slots[:size])
            self.graphs[size] = graph, token_ids
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 too-many-accepted: the largest has to do
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot = gpu, spare_slot
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        size = min([size for size in self.graphs if size >= len(slots)], default=max(self.graphs))
        padded = (slots + [self.spare_slot] * size)[:size]
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 wrong-error: whatever Python raises
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot, self.sizes = gpu, spare_slot, sorted(sizes)
        self.slots = gpu.full((max(sizes),), spare_slot)
        self.graphs, pool = {}, gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                token_ids = step(self.slots[:size])
            self.graphs[size] = graph, token_ids

    def replay(self, slots):
        size = next(size for size in self.sizes if size >= len(slots))
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, token_ids = self.graphs[size]
        graph.replay()
        return token_ids[: len(slots)]


# %% 08.4 right: bisect, a copy only where something changed, and a clone of the result
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        import bisect

        self.gpu, self.spare, self.sizes, self.bisect = gpu, spare_slot, sorted(sizes), bisect.bisect_left
        self.buffers = {size: gpu.full((size,), spare_slot) for size in sizes}
        self.held = {size: [spare_slot] * size for size in sizes}
        pool = gpu.graph_pool_handle()
        for size in self.sizes[::-1]:
            step(self.buffers[size])
        self.graphs = {}
        for size in self.sizes[::-1]:
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool):
                out = step(self.buffers[size])
            self.graphs[size] = graph, out

    def replay(self, slots):
        index = self.bisect(self.sizes, len(slots))
        if index == len(self.sizes):
            raise ValueError("no graph is large enough")
        size = self.sizes[index]
        padded = list(slots) + [self.spare] * (size - len(slots))
        if padded != self.held[size]:
            self.buffers[size].copy_(self.gpu.pinned(torch.tensor(padded)), non_blocking=True)
            self.held[size] = padded
        graph, out = self.graphs[size]
        graph.replay()
        return out[: len(slots)].clone()


# %% 08.5 not-mended: another return, the same bugs
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-longest_prompt // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return max(self.sizes)

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 table-too-narrow: rows and size mended
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-longest_prompt // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self.seq_lens.fill_(0)
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 table-too-narrow: twice the longest prompt will do
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-2 * longest_prompt // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self.seq_lens.fill_(0)
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 stale-rows: width and size mended; a graph as large as the batch hides it
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 stale-rows: they write nowhere, and still read
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 stale-rows: padded with zeros, which is a place
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        for tensor in (self.token_ids, self.positions, self.seq_lens, self.block_table, self.slot_mapping):
            tensor.zero_()
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 largest-graph-always: width and rows mended
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self.seq_lens.fill_(0)
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return self.sizes[-1]

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 no-such-graph: a graph for every number
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return len(rows)

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 new-address: fresh tensors for slots and lengths
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self.seq_lens = self.gpu.full((self.sizes[-1],), 0, dtype=torch.int32)
        self.slot_mapping = self.gpu.full((self.sizes[-1],), -1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 table-not-filled: the table is wide enough, but still filled only as far as the longest prompt
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], -(-max_model_len // block_size)
        self.width = -(-longest_prompt // block_size)
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows):
        size, width = self.block_size, self.block_table.shape[1]
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        self.seq_lens.fill_(0)
        self.slot_mapping.fill_(-1)
        self._put(self.token_ids, [row.token_id for row in rows])
        self._put(self.positions, [row.position for row in rows])
        self._put(self.seq_lens, [row.position + 1 for row in rows])
        self._put(self.block_table, [(row.blocks[: self.width] + [0] * width)[:width] for row in rows])
        self._put(self.slot_mapping, places)
        return next(n for n in self.sizes if n >= len(rows))

    def _put(self, tensor, values):
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)


# %% 08.5 right: everything reset first, then the real rows
class StaticBatch:
    def __init__(self, gpu, sizes, block_size, max_model_len, longest_prompt):
        self.gpu, self.sizes, self.block_size = gpu, sorted(sizes), block_size
        rows = max(sizes)
        self.width = (max_model_len + block_size - 1) // block_size
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.zeros(rows, self.width, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)

    def fill(self, rows):
        self.slot_mapping.fill_(-1)
        self.seq_lens.zero_()
        for tensor, values in (
            (self.token_ids, [r.token_id for r in rows]),
            (self.positions, [r.position for r in rows]),
            (self.seq_lens, [r.position + 1 for r in rows]),
            (self.slot_mapping, [r.blocks[r.position // self.block_size] * self.block_size
                                 + r.position % self.block_size for r in rows]),
            (self.block_table, [r.blocks + [0] * (self.width - len(r.blocks)) for r in rows]),
        ):
            tensor[: len(rows)].copy_(self.gpu.pinned(values, dtype=tensor.dtype), non_blocking=True)
        return min(size for size in self.sizes if size >= len(rows))


# %% 08.6 no-overlap: wait for each step
def serve(engine):
    count = 0
    while (batch := engine.schedule()) is not None:
        step = engine.launch(batch)
        count += 1
        step.arrived.synchronize()
        engine.update(batch, step.token_ids.tolist())
    return count


# %% 08.6 no-overlap: the older step first, then the next one
def serve(engine):
    count, before = 0, None
    while True:
        if before is not None:
            before[1].arrived.synchronize()
            engine.update(before[0], before[1].token_ids.tolist())
            before = None
        batch = engine.schedule()
        if batch is None:
            return count
        before = batch, engine.launch(batch)
        count += 1


# %% 08.6 tokens-read-too-early: no event
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            engine.update(oldest, step.token_ids.tolist())


# %% 08.6 tokens-read-too-early: read first, waited afterwards
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            step = engine.launch(batch)
            under_way.append((batch, step, step.token_ids.tolist()))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step, tokens = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, tokens)


# %% 08.6 waits-for-everything: the whole GPU
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            engine.gpu.synchronize()
            engine.update(oldest, step.token_ids.tolist())


# %% 08.6 waits-for-the-newest: the event of the step just launched
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            under_way[-1][1].arrived.synchronize()
            oldest, step = under_way.popleft()
            engine.update(oldest, step.token_ids.tolist())


# %% 08.6 last-step-lost: None means done
def serve(engine):
    under_way, count = deque(), 0
    while (batch := engine.schedule()) is not None:
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    return count


# %% 08.6 stops-too-early: empties what is under way, and leaves
def serve(engine):
    under_way, count = deque(), 0
    while (batch := engine.schedule()) is not None:
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    for oldest, step in under_way:
        step.arrived.synchronize()
        engine.update(oldest, step.token_ids.tolist())
    return count


# %% 08.6 out-of-order: takes from the side where it puts
def serve(engine):
    under_way, count = [], 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.pop()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())


# %% 08.6 too-far-ahead: three under way
def serve(engine):
    under_way, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        elif not under_way:
            return count
        while len(under_way) > (2 if batch is not None else 0):
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())


# %% 08.6 never-ends: None is passed over, and nothing is brought
def serve(engine):
    under_way, count = deque(), 0
    while engine.unfinished:
        batch = engine.schedule()
        if batch is None:
            continue
        under_way.append((batch, engine.launch(batch)))
        count += 1
        if len(under_way) > 1:
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())
    return count


# %% 08.6 wrong-count: nothing returned
def serve(engine):
    under_way = deque()
    while True:
        batch = engine.schedule()
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
        elif not under_way:
            return
        while len(under_way) > (1 if batch is not None else 0):
            oldest, step = under_way.popleft()
            step.arrived.synchronize()
            engine.update(oldest, step.token_ids.tolist())


# %% 08.6 right: one variable in place of a queue
def serve(engine):
    before, count = None, 0
    while True:
        batch = engine.schedule()
        now = (batch, engine.launch(batch)) if batch is not None else None
        count += now is not None
        if before is None and now is None:
            return count
        if before is not None:
            before[1].arrived.synchronize()
            engine.update(before[0], before[1].token_ids.tolist())
        before = now


# %% 08.6 right: asks the event before it waits
def serve(engine):
    under_way, count = [], 0
    batch = engine.schedule()
    while batch is not None or under_way:
        if batch is not None:
            under_way.append((batch, engine.launch(batch)))
            count += 1
        if batch is None or len(under_way) == 2:
            oldest, step = under_way.pop(0)
            if not step.arrived.query():
                step.arrived.synchronize()
            engine.update(oldest, [int(token) for token in step.token_ids])
        batch = engine.schedule()
    return count


# %% 08.3 block-size-fixed: 16 typed in
def decode_inputs(state, slots, block_size):
    is_real, position = slots < len(state.position) - 1, state.position[slots]
    table = state.block_table[slots]
    block = table.gather(1, (position // 16)[:, None])[:, 0]
    places = torch.where(is_real, block * 16 + position % 16, -1)
    return position, torch.where(is_real, position + 1, 0).int(), table, places


def advance(state, slots, token_ids):
    is_real = slots < len(state.position) - 1
    state.last_token[slots] = token_ids
    state.position[slots] = torch.where(is_real, state.position[slots] + 1, 0)


# %% 08.3 not-in-place: new tensors in the state
def decode_inputs(state, slots, block_size):
    is_real, position = slots < len(state.position) - 1, state.position[slots]
    table = state.block_table[slots]
    block = table.gather(1, (position // block_size)[:, None])[:, 0]
    places = torch.where(is_real, block * block_size + position % block_size, -1)
    return position, torch.where(is_real, position + 1, 0).int(), table, places


def advance(state, slots, token_ids):
    position = state.position.clone()
    position[slots] += 1
    state.position = position


# %% 08.4 changed-input: sorts the caller's sizes
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot, self.graphs = gpu, spare_slot, {}
        sizes.sort()
        self.slots = gpu.full((sizes[-1],), spare_slot)
        pool = gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                out = step(self.slots[:size])
            self.graphs[size] = graph, out

    def replay(self, slots):
        size = min((s for s in self.graphs if s >= len(slots)), default=None)
        if size is None:
            raise ValueError("too many")
        padded = slots + [self.spare_slot] * (size - len(slots))
        self.slots[:size].copy_(self.gpu.pinned(padded), non_blocking=True)
        graph, out = self.graphs[size]
        graph.replay()
        return out[: len(slots)]


# %% 08.4 changed-input: pads the caller's slots
class DecodeGraphs:
    def __init__(self, gpu, step, sizes, spare_slot):
        self.gpu, self.spare_slot, self.graphs = gpu, spare_slot, {}
        self.slots = gpu.full((max(sizes),), spare_slot)
        pool = gpu.graph_pool_handle()
        for size in sizes:
            step(self.slots[:size])
            graph = gpu.CUDAGraph()
            with gpu.graph(graph, pool=pool):
                out = step(self.slots[:size])
            self.graphs[size] = graph, out

    def replay(self, slots):
        size, count = min((s for s in self.graphs if s >= len(slots)), default=None), len(slots)
        if size is None:
            raise ValueError("too many")
        slots += [self.spare_slot] * (size - count)
        self.slots[:size].copy_(self.gpu.pinned(slots), non_blocking=True)
        graph, out = self.graphs[size]
        graph.replay()
        return out[:count]


# %% 08.6 waits-before-launch: plans, waits for the older step, launches
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is None and not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            step.arrived.synchronize()
            engine.update(before, step.token_ids.tolist())
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1


# %% 08.6 spins: asks until the answer is yes
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1
        elif not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            while not step.arrived.query():
                pass
            engine.update(before, step.token_ids.tolist())


# %% 08.6 no-list-of-integers: the tensor as it is
def serve(engine):
    in_flight, count = deque(), 0
    while True:
        batch = engine.schedule()
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
            count += 1
        elif not in_flight:
            return count
        while len(in_flight) > (1 if batch is not None else 0):
            before, step = in_flight.popleft()
            step.arrived.synchronize()
            engine.update(before, step.token_ids)


# %% 08.5 rounded-down: whole blocks only
class StaticBatch:
    """The inputs of recorded steps: a row for each sequence, at fixed addresses."""

    def __init__(self, gpu, sizes: list[int], block_size: int, max_model_len: int, longest_prompt: int) -> None:
        self.gpu, self.sizes = gpu, sorted(sizes)
        rows, width = self.sizes[-1], max_model_len // block_size
        self.token_ids = gpu.full((rows,), 0)
        self.positions = gpu.full((rows,), 0)
        self.seq_lens = gpu.full((rows,), 0, dtype=torch.int32)
        self.block_table = gpu.full((rows, width), 0, dtype=torch.int32)
        self.slot_mapping = gpu.full((rows,), -1)
        self.block_size = block_size

    def fill(self, rows: list[Row]) -> int:
        """Write these sequences into the first rows; returns the size of the graph to replay."""
        size, width = self.block_size, self.block_table.shape[1]
        graph_size = next(graph_size for graph_size in self.sizes if graph_size >= len(rows))
        padding = graph_size - len(rows)
        places = [row.blocks[row.position // size] * size + row.position % size for row in rows]
        tables = [(row.blocks + [0] * width)[:width] for row in rows]
        self._put(self.token_ids, [row.token_id for row in rows] + [0] * padding)
        self._put(self.positions, [row.position for row in rows] + [0] * padding)
        self._put(self.seq_lens, [row.position + 1 for row in rows] + [0] * padding)
        self._put(self.block_table, tables + [[0] * width] * padding)
        self._put(self.slot_mapping, places + [-1] * padding)
        return graph_size

    def _put(self, tensor: torch.Tensor, values: list) -> None:
        host = self.gpu.pinned(values, dtype=tensor.dtype)
        tensor[: len(values)].copy_(host, non_blocking=True)
