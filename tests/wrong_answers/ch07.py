# %% 07.1 no-zero: the ends alone
query_start_loc = [1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 no-end: the beginnings alone
query_start_loc = [0, 1, 2, 8]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 lengths-not-sums: how long each row is
query_start_loc = [1, 1, 6, 3]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 whole-contexts: counts what is in the cache, too
query_start_loc = [0, 10, 15, 29, 32]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 restarted: C's tokens counted from 0
query_start_loc = [0, 1, 2, 8, 11]
slot = 2 * 4 + 5 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 position: takes the position for the slot
query_start_loc = [0, 1, 2, 8, 11]
slot = 13
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 one-too-far: the position behind the last
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 14 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 half-a-prompt: everybody gets a token
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 4
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 decodes-only: a prompt's last token says nothing
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 2
token = 2
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 greedy: the likeliest
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 0
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 one-too-low: 0.7 is nearly 0.75
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 1
kept = 2
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 stops-short: stays below top_p
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 2
kept = 1
kept_cold = 1
tpot = (100 - 50) / 3


# %% 07.1 top-p-first: top-p of the probabilities as they were
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 2
tpot = (100 - 50) / 3


# %% 07.1 counts-the-first-wait: the whole time by all tokens
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = 100 / 4


# %% 07.1 divides-by-tokens: four tokens, so four gaps
query_start_loc = [0, 1, 2, 8, 11]
slot = 9 * 4 + 13 % 4
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = 50 / 4


# %% 07.1 right: numbers, worked out
query_start_loc = [0, 1, 2, 8, 11]
slot = 37
num_sampled = 3
token = 2
kept = 2
kept_cold = 1
tpot = 16.67


# %% 07.2 restarts-at-zero: positions from 0, whatever is in the cache
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 restarts-at-zero: right positions, slots from 0
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, j // block_size]) * block_size + j % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 every-row-samples: asks every row what comes next
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 forgets-the-past: contexts of the new tokens alone
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 no-zero: the ends of the rows
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], []
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 position-as-slot: no look at the block table
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(position)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 block-size-forgotten: block + offset
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 first-table-for-all: the first row's blocks for everybody
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[0, min(position // block_size, block_table.shape[1] - 1)]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 one-too-far: the token behind the last
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids))
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 row-numbers: numbers of rows, not of tokens
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(i)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 all-rows: all rows are decodes
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(rows),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 old-rows-only: a decode is a row with a past
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=sum(row.start > 0 and len(row.token_ids) == 1 for row in rows),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 wrong-dtype: everything int64
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int64),
        seq_lens=torch.tensor(contexts, dtype=torch.int64),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 new-tokens: the longest row for the longest context
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(lens),
        max_decode_seq_len=max(decodes, default=0),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 all-rows: the longest context of all
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Lay the rows' tokens end to end, and say what belongs to whom."""
    token_ids, positions, slots, logits_indices, ends = [], [], [], [], [0]
    for i, row in enumerate(rows):
        for j, token in enumerate(row.token_ids):
            position = row.start + j
            token_ids.append(token)
            positions.append(position)
            slots.append(int(block_table[i, position // block_size]) * block_size + position % block_size)
        ends.append(len(token_ids))
        if row.samples:
            logits_indices.append(len(token_ids) - 1)
    lens = [len(row.token_ids) for row in rows]
    contexts = [row.start + len(row.token_ids) for row in rows]
    decodes = [context for context, n in zip(contexts, lens) if n == 1]
    attention = AttentionMetadata(
        query_start_loc=torch.tensor(ends, dtype=torch.int32),
        seq_lens=torch.tensor(contexts, dtype=torch.int32),
        block_table=torch.from_numpy(block_table),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decodes=len(decodes),
        max_query_len=max(lens),
        max_seq_len=max(contexts),
        max_decode_seq_len=max(contexts),
    )
    numbers = (torch.tensor(values, dtype=torch.int64) for values in (token_ids, positions, logits_indices))
    token_ids, positions, logits_indices = numbers
    return BatchInputs(token_ids, positions, attention, logits_indices)


# %% 07.2 right: with torch's own repeat_interleave
def build_batch(rows: list[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    table = torch.tensor(block_table)
    lens = torch.tensor([len(row.token_ids) for row in rows])
    starts = torch.tensor([row.start for row in rows])
    edges = torch.cat((torch.zeros(1, dtype=torch.int64), lens.cumsum(0)))
    owner = torch.arange(len(rows)).repeat_interleave(lens)
    positions = torch.arange(int(edges[-1])) - edges[owner] + starts[owner]
    slots = table[owner, positions // block_size].long() * block_size + positions % block_size
    contexts, single = starts + lens, lens == 1
    attention = AttentionMetadata(
        edges.int(), contexts.int(), table, slots, int(single.sum()), int(lens.max()), int(contexts.max()),
        int(contexts[single].max()) if single.any() else 0,
    )
    token_ids = torch.tensor([token for row in rows for token in row.token_ids])
    samples = torch.tensor([row.samples for row in rows])
    return BatchInputs(token_ids, positions, attention, (edges[1:] - 1)[samples])


# %% 07.3 not-mended: as it was given
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_tokens, self.last_token = len(prompt), prompt[-1]
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        if self.num_computed == 0:
            return self.token_ids[: self.num_prompt_tokens], 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = self.num_tokens
        self.token_ids.append(token)

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = self.num_tokens - self.num_prompt_tokens
        return written >= self.max_tokens or self.last_token == self.eos


# %% 07.3 same-token-again: only the length grows
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_tokens, self.last_token = len(prompt), prompt[-1]
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        if self.num_computed == 0:
            return self.token_ids[: self.num_prompt_tokens], 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        self.num_tokens += 1

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = self.num_tokens - self.num_prompt_tokens
        return written >= self.max_tokens or self.last_token == self.eos


# %% 07.3 never-ends: only the last token is noted
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_tokens, self.last_token = len(prompt), prompt[-1]
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        if self.num_computed == 0:
            return self.token_ids[: self.num_prompt_tokens], 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        self.last_token = token

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = self.num_tokens - self.num_prompt_tokens
        return written >= self.max_tokens or self.last_token == self.eos


# %% 07.3 loses-what-it-said: the first complaint alone
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_tokens, self.last_token = len(prompt), prompt[-1]
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        if self.num_computed == 0:
            return self.token_ids[: self.num_prompt_tokens], 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        self.num_tokens, self.last_token = self.num_tokens + 1, token

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = self.num_tokens - self.num_prompt_tokens
        return written >= self.max_tokens or self.last_token == self.eos


# %% 07.3 begins-again: a preemption starts the answer anew
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_tokens, self.last_token = len(prompt), prompt[-1]
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        if self.num_computed == 0:
            return self.token_ids[: self.num_prompt_tokens], 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        self.num_tokens, self.last_token = self.num_tokens + 1, token

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        del self.token_ids[self.num_prompt_tokens :]
        self.num_tokens, self.last_token = len(self.token_ids), self.token_ids[-1]
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = self.num_tokens - self.num_prompt_tokens
        return written >= self.max_tokens or self.last_token == self.eos


# %% 07.3 computes-everything-again: the whole text at every step
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        return self.token_ids, 0

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = len(self.token_ids)
        self.token_ids.append(token)

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = len(self.token_ids) - self.num_prompt_tokens
        return written >= self.max_tokens or self.token_ids[-1] == self.eos


# %% 07.3 repeats-the-last-token: recomputes all but the last
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_tokens, self.last_token = len(prompt), prompt[-1]
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        if self.num_computed == 0:
            known = self.num_prompt_tokens if len(self.token_ids) == self.num_prompt_tokens else -1
            return (self.token_ids[:known] if known < 0 else self.token_ids[:]), 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        self.num_tokens, self.last_token = self.num_tokens + 1, token

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = self.num_tokens - self.num_prompt_tokens
        return written >= self.max_tokens or self.last_token == self.eos


# %% 07.3 one-too-many: ends after max_tokens + 1
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        return self.token_ids[self.num_computed :], self.num_computed

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = len(self.token_ids)
        self.token_ids.append(token)

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = len(self.token_ids) - self.num_prompt_tokens
        return written > self.max_tokens or self.token_ids[-1] == self.eos


# %% 07.3 right: three numbers, all updated
class Answer:
    """One answer in the making: its tokens, and how many of them are in the cache."""

    def __init__(self, prompt: list[int], max_tokens: int, eos: int) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens, self.max_tokens, self.eos = len(prompt), max_tokens, eos
        self.num_tokens, self.last_token = len(prompt), prompt[-1]
        self.num_computed = 0

    def to_compute(self) -> tuple[list[int], int]:
        """The tokens that the next step computes, and the position of the first of them."""
        if self.num_computed == 0:
            return list(self.token_ids), 0
        return [self.last_token], self.num_tokens - 1

    def append(self, token: int) -> None:
        """The step has run, and this token was chosen."""
        self.num_computed = self.num_tokens
        self.token_ids.append(token)
        self.num_tokens, self.last_token = self.num_tokens + 1, token

    def preempt(self) -> None:
        """All blocks are gone, and with them the keys and values of everything."""
        self.num_computed = 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to write."""
        written = self.num_tokens - self.num_prompt_tokens
        return written >= self.max_tokens or self.last_token == self.eos


# %% 07.4 top-p-before-temperature: filters first, then the temperature
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float()
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled / divisor >= scaled.max() / divisor + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 min-p-before-temperature: min-p of the logits as they came
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            row = logits[i].float()
            keep &= row >= row.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 stops-short: the token that crosses the line is dropped
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            keep[order[probability.cumsum(0) > top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 top-p-of-everything: top-p without a softmax over what is left
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 top-k-keeps-ties: a threshold instead of places
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep &= scaled >= scaled[order[top_k[i] - 1]]
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 absolute-min-p: a probability of min_p at least
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled.masked_fill(~keep, -torch.inf).softmax(0) >= min_p[i]
        if min_p is None:
            keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 zero-is-a-logit: 0 for what is excluded
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = 0.0
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 first-row-for-all: the first row's wishes
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[0] < len(scaled):
            keep[order[top_k[0] :]] = False
        if top_p is not None and top_p[0] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[0]]] = False
        if min_p is not None and min_p[0] > 0:
            keep &= scaled >= scaled.max() + min_p[0].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 no-temperature: no temperature
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = logits.softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 multiplied-by-temperature: hot is cold
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits * divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 filters-ignored: no filter
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = logits.float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 same-number-every-time: the seed alone
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, torch.zeros_like(positions))[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 seed-ignored: the position alone
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(torch.zeros_like(seeds), positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 swapped-key: positions and seeds
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(positions, seeds)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 one-number-for-all: the first row's number
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:1, None].expand(len(logits), 1)
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 not-repeatable: torch's own generator
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = torch.rand(len(logits), 1)
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 not-repeatable: torch.multinomial
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    chosen = torch.multinomial((logits / divisor[:, None]).softmax(dim=-1), 1)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 one-number-for-all: a generator for the batch, seeded by the first request
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    random = torch.Generator().manual_seed(int(seeds[0] + positions[0]))
    u = torch.rand(len(logits), 1, generator=random)
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 sorted-order: the likeliest first
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    weights, order = (logits / divisor[:, None]).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    ruler = weights.cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    chosen = order.gather(1, chosen)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 half-precision: the softmax of what came
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p)
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None].to(logits.dtype)).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, (u * ruler[:, -1:]).to(ruler.dtype), right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 greedy-not-greedy: temperature 0 drawn as temperature 1
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[1] - 1)


# %% 07.4 always-greedy: the likeliest token, always
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return greedy


# %% 07.4 overflow: exp of the scores as they are
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits.clone()
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).exp().cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 changed-input: filters in place
def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """logits [B, V] with -inf for what top-k, then top-p, then min-p exclude, after the temperature."""
    filtered = logits
    for i in range(len(logits)):
        divisor = temperature[i] if temperature[i] > 0 else 1.0
        scaled = logits[i].float() / divisor
        order = scaled.sort(descending=True, stable=True).indices
        keep = torch.ones_like(scaled, dtype=torch.bool)
        if top_k is not None and 0 < top_k[i] < len(scaled):
            keep[order[top_k[i] :]] = False
        if top_p is not None and top_p[i] < 1:
            probability = scaled.masked_fill(~keep, -torch.inf).softmax(0)[order]
            before = probability.cumsum(0) - probability
            keep[order[before >= top_p[i]]] = False
        if min_p is not None and min_p[i] > 0:
            keep &= scaled >= scaled.max() + min_p[i].log()
        keep[order[0]] = True
        filtered[i, ~keep] = -torch.inf
    return filtered


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, seeds: torch.Tensor | None, positions: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B] int64 from logits [B, V]: greedy, or one number a row inverted through the running sum."""
    greedy = logits.argmax(dim=-1)
    if temperature is None:
        return greedy
    logits = filter_logits(logits, temperature, top_k, top_p, min_p).float()
    divisor = torch.where(temperature == 0, 1.0, temperature)
    ruler = (logits / divisor[:, None]).softmax(dim=-1).cumsum(dim=-1)
    u = philox_uniform(seeds, positions)[:, None]
    chosen = torch.searchsorted(ruler, u * ruler[:, -1:], right=True)[:, 0]
    return torch.where(temperature == 0, greedy, chosen.clamp(max=logits.shape[1] - 1))


# %% 07.4 right: row by row, with loops
def filter_logits(logits, temperature, top_k, top_p, min_p):
    rows = []
    for i, row in enumerate(logits):
        scaled = row.double() / (float(temperature[i]) or 1.0)
        places = sorted(range(len(row)), key=lambda t: (-float(scaled[t]), t))
        if top_k is not None and top_k[i] > 0:
            places = places[: int(top_k[i])]
        weights = torch.exp(scaled[places] - scaled.max())
        if top_p is not None and top_p[i] < 1:
            total, so_far, kept = float(weights.sum()), 0.0, 0
            while so_far < float(top_p[i]) * total - 1e-7 and kept < len(places):
                so_far, kept = so_far + float(weights[kept]), kept + 1
            places = places[: max(kept, 1)]
        if min_p is not None and min_p[i] > 0:
            least = float(min_p[i]) - 1e-7
            places = [t for t in places if t == places[0] or torch.exp(scaled[t] - scaled.max()) >= least]
        out = torch.full_like(row, -torch.inf)
        out[places] = row[places]
        rows.append(out)
    return torch.stack(rows)


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    if temperature is None:
        return logits.argmax(-1)
    kept = filter_logits(logits, temperature, top_k, top_p, min_p)
    chosen = []
    for i in range(len(logits)):
        if temperature[i] == 0:
            chosen.append(int(logits[i].argmax()))
            continue
        scaled = kept[i].double() / float(temperature[i])
        weights = torch.exp(scaled - scaled.max())
        target = float(philox_uniform(seeds[i : i + 1], positions[i : i + 1])) * float(weights.sum())
        chosen.append(int((weights.cumsum(0) > target).nonzero()[0]))
    return torch.tensor(chosen)


# %% 07.5 tokens-decoded-alone: each token by itself
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.text = getattr(self, "text", "") + self.decode([token_id])
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = getattr(self, "text", "")
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = len(text) - max(held, default=0)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 half-characters: shows what is not a character yet
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text)
        else:
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = len(text) - max(held, default=0)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 stop-in-one-piece-only: looks for the stop string in what is new
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop, self.num_shown), stop) for stop in self.stops if stop in text[self.num_shown :]]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            end = len(text)
        end = max(end, self.num_shown)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 shows-the-stop: ends behind the stop string
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
            end += len(self.stopped)
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = len(text) - max(held, default=0)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 shows-half-a-stop: holds nothing back
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = len(text)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 holds-too-much: always holds back the longest stop
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = max(len(text) - max(map(len, self.stops), default=1) + 1, self.num_shown)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 loses-the-end: nothing to show at the end
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return ""

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = len(text) - max(held, default=0)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 first-in-the-list: the list's order decides
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = found[0]
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = len(text) - max(held, default=0)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 drops-broken-bytes: strips what no token completed
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text.rstrip("\ufffd"))
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = len(text) - max(held, default=0)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 waits-for-a-space: words only
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
            end = len(text) - max(held, default=0) if self.stops else text.rfind(" ") + 1
            end = max(end, self.num_shown)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 holds-one-character: one character could begin a stop
class TextStream:
    """The text of one answer, as its tokens come."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.token_ids: list[int] = []
        self.num_shown = 0
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that can be shown now."""
        self.token_ids.append(token_id)
        return self.show(last=False)

    def finish(self) -> str:
        """No more tokens will come: returns what is left to show."""
        return self.show(last=True)

    def show(self, last: bool) -> str:
        """What is new of the text that may be seen."""
        if self.stopped is not None:
            return ""
        text = self.decode(self.token_ids)
        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.stopped = min(found)
        elif last:
            end = len(text)
        else:
            text = text.rstrip("\ufffd")
            held = [k for stop in self.stops for k in (1,) if text.endswith(stop[:k])]
            end = len(text) - max(held, default=0)
        new = text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return new


# %% 07.5 right: decodes the last tokens only
class TextStream:
    def __init__(self, decode, stops=()):
        self.decode, self.stops, self.stopped = decode, stops, None
        self.tokens, self.prefix, self.read = [], 0, 0
        self.text, self.shown = "", ""

    def append(self, token_id):
        self.tokens.append(token_id)
        new = self.fresh()
        if new.endswith("\ufffd"):
            return self.out(new.rstrip("\ufffd"), keep=True)
        return self.out(new)

    def fresh(self):
        known = self.decode(self.tokens[self.prefix : self.read])
        return self.decode(self.tokens[self.prefix :])[len(known) :]

    def finish(self):
        return self.out(self.fresh(), last=True)

    def out(self, new, keep=False, last=False):
        if self.stopped is not None:
            return ""
        whole = self.text + new
        if not keep:
            self.text, self.prefix, self.read = whole, self.read, len(self.tokens)
        end = len(whole)
        places = {whole.find(s): s for s in self.stops if s in whole}
        if places:
            end = min(places)
            self.stopped = places[end]
        elif not last:
            while end > 0 and any(s.startswith(whole[end - 1 :]) for s in self.stops):
                end -= 1
            for start in range(len(whole)):
                if any(s.startswith(whole[start:]) for s in self.stops):
                    end = start
                    break
            else:
                end = len(whole)
        piece = whole[len(self.shown) : end]
        self.shown += piece
        return piece


# %% 07.6 order-of-the-end: outputs as they finish
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [output for id, output in ended.items() if id in ids]


# %% 07.6 one-at-a-time: one request after the other
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ended = []
        for one in checked:
            id, last = self.queue(one), None
            while last is None:
                last = next((o for o in self.step() if o.request_id == id and o.finished), None)
            ended.append(last)
        return ended


# %% 07.6 computes-past-the-stop: the text stops, the work does not
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        self.outputs.process(step)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 computes-past-the-stop: goes on until the core has nothing left, which nobody tells of stops
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        self.outputs.process(step)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while self.core.scheduler.running or self.core.scheduler.waiting:
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 no-stop-reason: does not say which
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop")
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 no-stop-reason: a stop string is taken for an abort
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "abort")
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 texts-overwritten: keeps outputs by prompt
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        by_prompt = {}
        while not all(id in ended for id in ids):
            for output in self.step():
                if output.finished:
                    ended[output.request_id] = by_prompt[str(output.prompt_token_ids)] = output
        return [by_prompt[str(prompt)] for prompt in prompts]


# %% 07.6 endless: what a step brought is not handed on
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 endless: looks for the end in the core, which knows other ids
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(int(id) + len(prompts) in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 unfinished: the first output of each, not the last
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step()}
        return [ended[id] for id in ids]


# %% 07.6 more-than-a-step: step serves all to the end
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        while True:
            step = self.core.step()
            self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
            for seq_id, stop_string in self.outputs.process(step):
                self.core.finish([seq_id], "stop", stop_string)
            if not step.outputs:
                break
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 idle-step: gives nothing where there is nothing
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector) or None

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() or [] if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 unfinished-left-out: step mentions only requests that have ended
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return [output for output in self.outputs.collect(self.collector) if output.finished]

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 no-id: add says nothing
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 foreign-request: run knows only its own requests
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {id: None for id in ids}
        while None in ended.values():
            for output in self.step():
                if output.finished and ended[output.request_id] is None:
                    ended[output.request_id] = output
        return [ended[id] for id in ids]


# %% 07.6 foreign-request: returns whatever ends
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        while self.outputs.requests:
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in sorted(ended, key=int)]


# %% 07.6 queued-before-checked: queues one after the other
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        ids = [self.add(*asked) for asked in zip(prompts, params)]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 completions-left-out: one sequence for a request
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        self.core.add(request.new_sequence(request, 0))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 abort-goes-on: ends it for the reader only
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.outputs.end(request)

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 abort-unreported: ends it in the core only
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish([one.seq_id for one in request.completions], "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 abort-unreported: ends it, and forgets it before anybody has heard
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")
            self.outputs.forget(request)

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 abort-raises: expects every id to be there
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        self.core.finish(self.outputs.end(self.outputs.requests[request_id]), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 abort-hits-others: ends everything
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            for other in list(self.outputs.requests.values()):
                self.core.finish(self.outputs.end(other), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 request-dropped: leaves out what is refused
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = []
        for asked in zip(prompts, params):
            try:
                checked.append(self.inputs.process(*asked))
            except ValueError:
                pass
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 one-token-per-step: counts sequences
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += len(step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 one-token-per-step: counts steps
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += 1
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
        ids = [self.queue(one) for one in checked]
        ended = {}
        while not all(id in ended for id in ids):
            ended |= {output.request_id: output for output in self.step() if output.finished}
        return [ended[id] for id in ids]


# %% 07.6 right: keeps the last output of each, asks the output processor who is left
class MyEngine:
    """Prompts in, steps, outputs out: the loop between the two doors of the core."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        outputs: OutputProcessor,
        new_request: Callable[[EngineInput, OutputCollector], Request],
    ) -> None:
        self.inputs, self.core, self.outputs = inputs, core, outputs
        self.new_request = new_request
        self.collector = OutputCollector()  # who waits for the outputs: whoever calls step
        self.num_tokens = 0  # that the core has brought so far

    def add(self, prompt: list[int], params: SamplingParams) -> str:
        """Queue a request; returns its request_id. What can't be served raises."""
        return self.queue(self.inputs.process(prompt, params))

    def queue(self, checked: EngineInput) -> str:
        """Queue what has been checked."""
        request = self.new_request(checked, self.collector)
        self.outputs.add(request)
        for index in range(checked.params.n):
            self.core.add(request.new_sequence(request, index))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it. An unknown id is ignored."""
        request = self.outputs.requests.get(request_id)
        if request is not None:
            self.core.finish(self.outputs.end(request), "abort")

    def step(self) -> list[RequestOutput]:
        """One step for everything that runs: the outputs of the requests with news."""
        step = self.core.step()
        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
        for seq_id, stop_string in self.outputs.process(step):
            self.core.finish([seq_id], "stop", stop_string)
        return self.outputs.collect(self.collector)

    def run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        """Serve these to their ends; the last output of each, in their order."""
        checked = [self.inputs.process(*asked) for asked in zip(prompts, params, strict=True)]
        ids = [self.queue(one) for one in checked]
        last = {}
        while any(id in self.outputs.requests for id in ids):
            for output in self.step():
                last[output.request_id] = output
        return [last[id] for id in ids]
