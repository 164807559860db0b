# %% 03.1 query-heads: counts query heads
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    row = config["num_attention_heads"] * config["head_dim"]
    return 2 * config["num_hidden_layers"] * row * bytes_per_number


# %% 03.1 head-dim-from-hidden-size: hidden_size / heads, as in older models
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * bytes_per_number


# %% 03.1 hidden-size: as without GQA, where heads · head_dim is the hidden size
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    return 2 * config["num_hidden_layers"] * config["hidden_size"] * bytes_per_number


# %% 03.1 one-layer: forgets the layers
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    return 2 * config["num_key_value_heads"] * config["head_dim"] * bytes_per_number


# %% 03.1 ignores-bytes-per-number: two bytes, always
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    return 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


# %% 03.1 right: bit by bit, as a sum over layers
def kv_bytes_per_token(config: dict[str, int], bytes_per_number: int = 2) -> int:
    total = 0
    for _ in range(config["num_hidden_layers"]):
        for _ in ("key", "value"):
            total += config["num_key_value_heads"] * config["head_dim"] * bytes_per_number
    return total


# %% 03.2 position-from-zero: the new tokens are counted from 0
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[i // block_size] * block_size + i % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 table-from-its-first-entry: the entry is counted from the chunk's first token
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[i // block_size] * block_size + position % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 offset-from-the-chunk: the offset is counted from the chunk's first token
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] * block_size + i % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 table-ignored: position taken for the slot
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(position)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 block-not-a-slot: forgets to multiply
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] + position % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 no-offset: every token at its block's begin
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] * block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 one-table-for-all: the first request's blocks
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(block_table[0, position // block_size] * block_size + position % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 padded-with-zero: 0 seems harmless
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] * block_size + position % block_size)
    return torch.tensor(slots + [0] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 not-padded: pad_to is not used
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] * block_size + position % block_size)
    return torch.tensor(slots + [], dtype=torch.int64)


# %% 03.2 wrong-dtype: as int32, like the table
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_size] * block_size + position % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int32)


# %% 03.2 slots-in-a-row: only the first slot is looked up
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        first = table[start // block_size] * block_size + start % block_size
        slots += range(first, first + count)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 wrong-block-size: 16, as the engine has it
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // 16] * 16 + position % 16)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 wrong-block-size: 4, as in the example
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // 4] * 4 + position % 4)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 wrong-block-size: the table's width
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for i in range(count):
            position = start + i
            slots.append(table[position // block_table.shape[1]] * block_table.shape[1] + position % block_table.shape[1])
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 ends-at-the-length: range(start, n)
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    slots = []
    for table, start, count in zip(block_table.tolist(), starts, query_lens):
        for position in range(start, count):
            slots.append(table[position // block_size] * block_size + position % block_size)
    return torch.tensor(slots + [-1] * (pad_to - len(slots)), dtype=torch.int64)


# %% 03.2 right: vectorised
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    lens, begin = torch.tensor(query_lens), torch.tensor(starts)
    row = torch.repeat_interleave(torch.arange(len(query_lens)), lens)
    first = torch.cumsum(lens, 0) - lens
    positions = torch.arange(len(row)) - first[row] + begin[row]
    out = torch.full((pad_to,), -1, dtype=torch.int64)
    out[: len(row)] = block_table[row, positions // block_size].long() * block_size + positions % block_size
    return out


# %% 03.2 right: divmod, and a tensor written in place
def slot_mapping(
    block_table: torch.Tensor, starts: list[int], query_lens: list[int], block_size: int, pad_to: int
) -> torch.Tensor:
    out, at = torch.full((pad_to,), -1), 0
    for i, start in enumerate(starts):
        for position in range(start, start + query_lens[i]):
            index, offset = divmod(position, block_size)
            out[at] = block_table[i][index] * block_size + offset
            at += 1
    return out


# %% 03.3 minus-one-is-the-last-slot: -1 // 16 is -1, which is a block, too
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        k_cache[slot // size, :, slot % size] = key[token]
        v_cache[slot // size, :, slot % size] = value[token]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 minus-one-is-slot-0: clamped, so that it does not fail
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    size, slots = k_cache.shape[2], slot_mapping.clamp(min=0).tolist()
    for token, slot in enumerate(slots):
        k_cache[slot // size, :, slot % size] = key[token]
        v_cache[slot // size, :, slot % size] = value[token]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 stops-at-minus-one: padding is at the end, is it not?
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            break
        k_cache[slot // size, :, slot % size] = key[token]
        v_cache[slot // size, :, slot % size] = value[token]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 rows-out-of-step: filters the slots, not the rows
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    slots, size = slot_mapping[slot_mapping >= 0], k_cache.shape[2]
    k_cache[slots // size, :, slots % size] = key[: len(slots)]
    v_cache[slots // size, :, slots % size] = value[: len(slots)]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 tokens-before-heads: the cache as rows of slots
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    _, kv_heads, _, dim = k_cache.shape
    k_cache.view(-1, kv_heads, dim)[slot_mapping[wanted]] = key[wanted]
    v_cache.view(-1, kv_heads, dim)[slot_mapping[wanted]] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 keys-as-values: copied the line, changed one name
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = key[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 not-in-place: indexing twice makes a copy
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size][:, :, 0] = key[wanted]
    v_cache[slots // size][:, :, 0] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 reads-beyond-the-context: the last block in full
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 values-not-masked: scores are masked, values are not
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        if context == 0:
            continue
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        scores = q @ k.transpose(1, 2) * scale
        scores[..., context:] = -math.inf
        out[i] = (torch.softmax(scores, dim=-1) @ v).flatten(0, 1)
    return out


# %% 03.3 heads-interleaved: repeat instead of repeat_interleave
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    group, size = query.shape[1] // k_cache.shape[1], k_cache.shape[2]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        k, v = k.repeat(group, 1, 1), v.repeat(group, 1, 1)
        weights = torch.softmax((query[i].unsqueeze(1) @ k.transpose(1, 2)) * scale, dim=-1)
        out[i] = (weights @ v).squeeze(1)
    return out


# %% 03.3 own-scale: 1 / √head_dim, as always
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * query.shape[-1] ** -0.5, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 table-ignored: blocks from 0 on
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = torch.arange(math.ceil(context / size))
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 one-table-for-all: block_table[0]
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[0, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 new-token-missing: the context without the new token
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, : max(context - 1, 0)] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 last-block-missing: rounds down
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : context // size]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 heads-and-tokens-mixed: reshape without transpose
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].reshape(kv_heads, -1, query.shape[-1])[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 padded-row: a mask over one block, even for a context of 0
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : max(1, math.ceil(context / size))]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache))
        beyond = torch.arange(k.shape[1]) >= context
        scores = query[i].unflatten(0, (kv_heads, -1)) @ k.transpose(1, 2) * scale
        weights = torch.softmax(scores.masked_fill(beyond, -math.inf), dim=-1)
        out[i] = (weights @ v.masked_fill(beyond[:, None], 0.0)).flatten(0, 1)
    return out


# %% 03.3 table-beyond-the-context: all entries first, then the cut
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 table-beyond-the-context: one block more, when the last is full
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : context // size + 1]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 wrong-dtype: float32, always
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros(query.shape)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q, k, v = query[i].unflatten(0, (kv_heads, -1)).float(), k.float(), v.float()
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 slot-0-dropped: more than 0
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping > 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 not-in-place: a transposed cache cannot be laid out anew without a copy
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    _, kv_heads, _, dim = k_cache.shape
    k_cache.transpose(1, 2).reshape(-1, kv_heads, dim)[slot_mapping[wanted]] = key[wanted]
    v_cache.transpose(1, 2).reshape(-1, kv_heads, dim)[slot_mapping[wanted]] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 wrong-block-size: 16, as the engine has it, to store
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = 16, slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 wrong-block-size: the number of KV heads, to store
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[1], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1:3]
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 wrong-block-size: 16, to read
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    wanted = slot_mapping >= 0
    size, slots = k_cache.shape[2], slot_mapping[wanted]
    k_cache[slots // size, :, slots % size] = key[wanted]
    v_cache[slots // size, :, slots % size] = value[wanted]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    kv_heads, size = k_cache.shape[1], 16
    out = torch.zeros_like(query)
    for i, context in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : math.ceil(context / size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context] for cache in (k_cache, v_cache))
        q = query[i].unflatten(0, (kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out[i] = (weights @ v).flatten(0, 1)
    return out


# %% 03.3 right: plain loops, token by token and head by head
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    size = k_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        for head in range(key.shape[1]):
            k_cache[slot // size, head, slot % size] = key[token, head]
            v_cache[slot // size, head, slot % size] = value[token, head]


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    heads, size = query.shape[1], k_cache.shape[2]
    group = heads // k_cache.shape[1]
    out = torch.zeros_like(query)
    for i in range(len(query)):
        context = int(seq_lens[i])
        if context == 0:
            continue
        rows = [(int(block_table[i, p // size]), p % size) for p in range(context)]
        for head in range(heads):
            k = torch.stack([k_cache[block, head // group, offset] for block, offset in rows])
            v = torch.stack([v_cache[block, head // group, offset] for block, offset in rows])
            out[i, head] = torch.softmax(k @ query[i, head] * scale, dim=0) @ v
    return out


# %% 03.3 right: block by block, with the online softmax, and parts merged
def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    _, kv_heads, size, dim = k_cache.shape
    heads = torch.arange(kv_heads)
    for slot, k, v in zip(slot_mapping, key, value):
        if slot != -1:
            k_cache[slot // size, heads, slot % size] = k
            v_cache[slot // size, heads, slot % size] = v


def decode_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, *, max_seq_len: int, merge_attention: Callable,
    num_splits: int | None = None,
) -> torch.Tensor:
    (batch, heads, dim), (kv_heads, size) = query.shape, k_cache.shape[1:3]
    splits = max(1, -(-max_seq_len // size))
    out = torch.zeros(splits, batch, heads, dim)
    lse = torch.full((splits, batch, heads), -math.inf)
    for i, context in enumerate(seq_lens.tolist()):
        for s in range(-(-context // size)):
            inside = min(size, context - s * size)
            k, v = (cache[block_table[i, s], :, :inside] for cache in (k_cache, v_cache))
            scores = query[i].view(kv_heads, -1, dim) @ k.transpose(1, 2) * scale
            lse[s, i] = torch.logsumexp(scores.float(), dim=-1).flatten()
            out[s, i] = (torch.softmax(scores, dim=-1) @ v).flatten(0, 1)
    return merge_attention(out, lse).to(query.dtype)


# %% 03.4 tile-taken-for-a-block: as it was
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // tile]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % tile])
    return torch.stack(rows)


# %% 03.4 look-up-in-tiles: the offset mended, the look-up not
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // tile]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % size])
    return torch.stack(rows)


# %% 03.4 offset-in-tiles: the look-up mended, the offset not
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        for token in range(first, min(first + tile, context)):
            rows.append(cache[table[token // size], :, token % tile])
    return torch.stack(rows)


# %% 03.4 offset-in-tiles: the offset counted from the tile's first token
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        for token in range(first, min(first + tile, context)):
            rows.append(cache[table[token // size], :, token - first])
    return torch.stack(rows)


# %% 03.4 one-look-up-a-tile: right as long as a tile lies inside a block
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // size]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % size])
    return torch.stack(rows)


# %% 03.4 one-look-up-a-tile: with a running offset
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // size]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, first % size + token - first])
    return torch.stack(rows)


# %% 03.4 whole-tiles: reads the last tile to its end
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        for token in range(first, first + tile):
            rows.append(cache[table[token // size], :, token % size])
    return torch.stack(rows)


# %% 03.4 wrong-block-size: 16
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = 16
    rows = []
    for first in range(0, context, tile):
        for token in range(first, min(first + tile, context)):
            rows.append(cache[table[token // size], :, token % size])
    return torch.stack(rows)


# %% 03.4 wrong-block-size: the number of KV heads
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[1]
    rows = []
    for first in range(0, context, tile):
        for token in range(first, min(first + tile, context)):
            rows.append(cache[table[token // size], :, token % size])
    return torch.stack(rows)


# %% 03.4 one-look-up-a-tile: steps that are no larger than a block
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size = cache.shape[2]
    rows = []
    tile = min(tile, size)
    for first in range(0, context, tile):
        block = table[first // size]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % size])
    return torch.stack(rows)


# %% 03.4 right: a tile is made as large as a block
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    tile = cache.shape[2]
    rows = []
    for first in range(0, context, tile):
        block = table[first // tile]
        for token in range(first, min(first + tile, context)):
            rows.append(cache[block, :, token % tile])
    return torch.stack(rows)


# %% 03.4 right: a tile at once, vectorised
def read_context(cache: torch.Tensor, table: torch.Tensor, context: int, tile: int) -> torch.Tensor:
    size, rows = cache.shape[2], []
    for first in range(0, context, tile):
        tokens = torch.arange(first, min(first + tile, context))
        rows.append(cache[table[tokens // size], :, tokens % size])
    return torch.cat(rows)


# %% 03.5 query-heads: 32 heads instead of 8
blocks = 14_000_000_000 // (16 * 2 * 36 * 32 * 128 * 2)
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16


# %% 03.5 only-keys: forgets that there are two
blocks = 14_000_000_000 // (16 * 36 * 8 * 128 * 2)
reserved = 14_000_000_000 // (4096 * 36 * 8 * 128 * 2)
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16


# %% 03.5 rounded-up: math.ceil of blocks
blocks = 5934
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16


# %% 03.5 rounded-up: math.ceil of chats
blocks = 5933
reserved = 24
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16


# %% 03.5 rounded-up: not rounded at all
blocks = 14_000_000_000 / (16 * 2 * 36 * 8 * 128 * 2)
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16


# %% 03.5 tokens-not-blocks: tokens divided by 700
blocks = 5933
reserved = 23
paged = 135
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16


# %% 03.5 rounded-down: 43 blocks a chat
blocks = 5933
reserved = 23
paged = 137
wasted_16 = 1.5
wasted_256 = 20.5
splits = 16


# %% 03.5 whole-block: a whole block is empty
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 100 * 16 / (500.5 + 16)
wasted_256 = 100 * 256 / (500.5 + 256)
splits = 16


# %% 03.5 share-of-tokens: empty room divided by tokens
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 100 * 128 / 500.5
splits = 16


# %% 03.5 not-in-percent: as a share
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 0.0148
wasted_256 = 20.5
splits = 16


# %% 03.5 kv-heads-forgotten: one program a multiprocessor
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 132


# %% 03.5 query-heads: one program for each query head
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 4


# %% 03.5 rounded-up: 17 · 8 is more than 132
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.5
wasted_256 = 20.5
splits = 17


# %% 03.5 right: counted exactly
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 1.477
wasted_256 = 20.65
splits = 16


# %% 03.5 right: with half a block
blocks = 5933
reserved = 23
paged = 134
wasted_16 = 100 * 8 / 508.5
wasted_256 = 100 * 128 / 628.5
splits = 16


# %% 03.6 every-split-reads-all: the chapter's loop, as it was
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(0, context, TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 splits-overlap: each split runs to the context's end
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, context, TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 splits-overlap: shares are not whole tiles
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(context, num_splits)
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 tokens-left-out: rounds the share down
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = (tl.cdiv(context, TILE) // num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 tokens-left-out: only tiles that are full
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    context = context // TILE * TILE
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 lse-without-the-maximum: log(l) alone
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, tl.log(safe))


# %% 03.6 lse-in-base-2: log2
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log2(safe))


# %% 03.6 not-divided: the merge will divide, will it not?
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 empty-split-is-nan: 0 / 0
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / l)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 no-rescale: the sum is rescaled, the output is not
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 empty-split-counts: the maximum starts at 0
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = 0.0, 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 no-rescale: neither
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l + tl.sum(weights, axis=0)
        acc = acc + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 reads-beyond-the-context: no mask at all on keys, values and scores
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows)
        v = tl.load(v_cache_ptr + rows)
        scores = tl.sum(k * query[None, :], axis=1)
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 reads-beyond-the-context: masked keys give scores of 0, which count
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.sum(k * query[None, :], axis=1)
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 values-not-masked: their weight is 0 anyway
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 tile-taken-for-a-block: one look-up a tile, by the tile's number
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        block = tl.load(table_ptr + first // TILE)
        rows = ((block * KH + head // GROUP) * SIZE + tokens % SIZE)[:, None] * D + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 heads-interleaved: head % KH
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head % KH, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 query-head-as-kv-head: head
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 no-scale: forgets it
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns)
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 query-stride-ignored: heads · D
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + (request * KH * GROUP + head) * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 out-of-bounds-write: a tile of columns twice as wide as the head
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    if target == tl.num_programs(0) * KH * GROUP * num_splits - 1:
        tl.store(out_ptr + (target + 1) * D + columns, acc)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 no-maximum: exp of the scores as they are
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    l, acc = 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        weights = tl.exp(scores)
        l = l + tl.sum(weights, axis=0)
        acc = acc + tl.sum(weights[:, None] * v, axis=0)
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, tl.log(l))


# %% 03.6 no-maximum: nor is an empty split thought of
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    l, acc = 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        weights = tl.exp(scores)
        l = l + tl.sum(weights, axis=0)
        acc = acc + tl.sum(weights[:, None] * v, axis=0)
    tl.store(out_ptr + target * D + columns, acc / l)
    tl.store(lse_ptr + target, tl.log(l))


# %% 03.6 empty-split-wrote-nothing: returns early
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    if begin >= context:
        return
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 target-counts-rows: out at target + columns
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 walks-beyond-the-context: walks over tiles beyond the context
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, begin + share, TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 tokens-left-out: context // num_splits
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = context // num_splits
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 tokens-left-out: context // num_splits, with a mask for the split's end
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = context // num_splits
    begin = split * share
    end = tl.minimum(begin + share, context)
    for first in range(begin, end, TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < end
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 right: tiles dealt out in turn: split s takes tiles s, s + num_splits …
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    for first in range(split * TILE, context, num_splits * TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))


# %% 03.6 right: base 2 inside, natural at the end
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * (scale * 1.4426950408889634)
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(context, TILE), num_splits) * TILE
    begin = split * share
    for first in range(begin, tl.minimum(begin + share, context), TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp2(scores - new), tl.exp2(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, (m + tl.log2(safe)) * 0.6931471805599453)


# %% 03.6 right: shares of tokens, with a mask for the split's end
@triton.jit
def split_decode_kernel(
    out_ptr, lse_ptr, query_ptr, k_cache_ptr, v_cache_ptr, block_table_ptr, seq_lens_ptr,
    scale, query_stride, table_stride, num_splits,
    KH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):
    """Program (request, query head, split): attention over the split's share of the context."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    target = (split * tl.num_programs(0) + request) * KH * GROUP + head  # of [num_splits, B, heads]
    columns = tl.arange(0, D)
    context = tl.load(seq_lens_ptr + request)
    table_ptr = block_table_ptr + request * table_stride
    query = tl.load(query_ptr + request * query_stride + head * D + columns) * scale
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], dtype=tl.float32)
    share = tl.cdiv(context, num_splits)
    begin = split * share
    context = tl.minimum(begin + share, context)
    for first in range(begin, context, TILE):
        tokens = first + tl.arange(0, TILE)
        known = tokens < context
        rows = rows_of(table_ptr, tokens, known, head // GROUP, KH, SIZE, D)[:, None] + columns[None, :]
        k = tl.load(k_cache_ptr + rows, mask=known[:, None], other=0.0)
        v = tl.load(v_cache_ptr + rows, mask=known[:, None], other=0.0)
        scores = tl.where(known, tl.sum(k * query[None, :], axis=1), float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=0))
        weights, rescale = tl.exp(scores - new), tl.exp(m - new)
        l = l * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * v, axis=0)
        m = new
    safe = tl.where(l > 0.0, l, 1.0)
    tl.store(out_ptr + target * D + columns, acc / safe)
    tl.store(lse_ptr + target, m + tl.log(safe))
