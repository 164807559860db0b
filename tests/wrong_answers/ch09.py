# Answers to the exercises of chapter 09 that people really write. Each section replaces the whole answer cell.

# %% 09.1 no-kv-head-left: KV heads divided like query heads
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    k = num_kv_heads // size
    return queries, range(rank * k, (rank + 1) * k)


# %% 09.1 kv-heads-beyond-the-last: at least one, counted on and on
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    k = max(1, num_kv_heads // size)
    return queries, range(rank * k, rank * k + k)


# %% 09.1 dealt-around: replicated like cards
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    if num_kv_heads >= size:
        k = num_kv_heads // size
        return queries, range(rank * k, rank * k + k)
    k = rank % num_kv_heads
    return queries, range(k, k + 1)


# %% 09.1 every-nth-head: strided
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    return range(rank, num_heads, size), range(rank, num_kv_heads, size)


# %% 09.1 all-kv-heads: the cache is not split
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    return queries, range(num_kv_heads)


# %% 09.1 a-kv-head-for-each-query-head: a list with repetitions
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, [h // group for h in queries]


# %% 09.1 last-head-left-out: the range ends too early
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, range(queries[0] // group, queries[-1] // group)


# %% 09.1 no-kv-head-left: rounded down at both ends
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    return queries, range(rank * num_kv_heads // size, (rank + 1) * num_kv_heads // size)


# %% 09.1 order-exchanged: KV heads first
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return range(queries[0] // group, queries[-1] // group + 1), queries


# %% 09.1 not-refused: rounds down instead
def my_heads(rank, size, num_heads, num_kv_heads):
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)


# %% 09.1 not-refused: looks at the query heads only
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size:
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)


# %% 09.1 raised: refuses more ranks than KV heads
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or num_kv_heads % size:
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    k = num_kv_heads // size
    return queries, range(rank * k, (rank + 1) * k)


# %% 09.1 right: by the number of ranks that share a KV head
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    if num_kv_heads >= size:
        k = num_kv_heads // size
        return queries, range(rank * k, (rank + 1) * k)
    k = rank // (size // num_kv_heads)
    return queries, range(k, k + 1)


# %% 09.1 right: lists, of the KV heads that are read
def my_heads(rank, size, num_heads, num_kv_heads):
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ValueError('cannot be split')
    q = num_heads // size
    queries = range(rank * q, (rank + 1) * q)
    group = num_heads // num_kv_heads
    return list(queries), sorted({h // group for h in queries})


# %% 09.2 forgot-the-embedding: two a layer
all_reduces = 2 * 36
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 one-a-layer: attention and MLP together
all_reduces = 36
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 after-every-matrix: seven matrices
all_reduces = 7 * 36
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 one-sequence: the step has sixteen
all_reduces = 2 * 36 + 1
one_all_reduce = 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 divided-by-the-ranks: a term is taken for a part
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2 / 4
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 before-down: the wide numbers
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 12_288 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 once-the-tensor: each sends its tensor once
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = 73 * 16 * 4096 * 2
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 sent-to-each: each to each
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = 73 * 16 * 4096 * 2 * 3
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 half-of-the-ring: while sums grow
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = 73 * 16 * 4096 * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 own-part-counted: all of the logits
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * 151_936 * 2
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 own-part-only: what it brings
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * 151_936 * 2 / 4
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 not-divided: weights of the whole model
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096)
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 tied: one matrix for embedding and head
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 numbers-not-bytes: one byte a number
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 not-divided: the whole cache
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 8 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 keys-or-values: one of the two
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 half-a-head: eight heads on sixteen ranks
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 8 * 128 * 2 / 16


# %% 09.2 wrong-prediction: a sum gone wrong
all_reduces = 74 + 36
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.2 two-heads: as on four ranks
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 2
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 2 * 128 * 2


# %% 09.2 float32: four bytes a number
all_reduces = 2 * 36 + 1
one_all_reduce = 16 * 4096 * 4
sent = (2 * 36 + 1) * (16 * 4096 * 2) * 2 * 3 / 4
gathered = 16 * (151_936 / 4) * 2 * 3
weights = 2 * (36 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 12_288) + 2 * 151_936 * 4096) / 4
kv_bytes = 2 * 36 * 2 * 128 * 2
kv_bytes_16 = 2 * 36 * 1 * 128 * 2


# %% 09.3 gates-here-ups-there: the fused matrix cut in blocks
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    return gate_up.chunk(size)[rank], down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T)


# %% 09.3 down-cut-the-wrong-way: rows of down as stored
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T)


# %% 09.3 kept-whole: down is needed whole, one thinks
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T)


# %% 09.3 columns-of-others: gate and up strided, down in blocks
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate[rank::size], up[rank::size])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T)


# %% 09.3 not-summed: each rank's own term
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


# %% 09.3 summed-too-early: before down
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce(F.silu(gate) * up) @ down.T


# %% 09.3 summed-too-early: both times
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce(group.all_reduce(F.silu(gate) * up) @ down.T)


# %% 09.3 averaged: divided by the ranks
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T) / group.size


# %% 09.3 wrong-shape: terms side by side
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_gather((F.silu(gate) * up) @ down.T)


# %% 09.3 too-much-sent: terms gathered, then summed
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    terms = group.all_gather((F.silu(gate) * up) @ down.T)
    return terms.unflatten(-1, (group.size, -1)).sum(dim=1)


# %% 09.3 not-refused: cut off what does not fit
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    n = down.shape[1] // size
    gate, up = gate_up.chunk(2)
    mine = slice(rank * n, (rank + 1) * n)
    return torch.cat((gate[mine], up[mine])), down[:, mine]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T)


# %% 09.3 never-called: only rank 0 wants the sum
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    term = (F.silu(gate) * up) @ down.T
    return group.all_reduce(term) if group.rank == 0 else term


# %% 09.3 up-before-gate: the halves exchanged
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])), down.chunk(size, dim=1)[rank]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    up, gate = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T)


# %% 09.3 right: slices, and all three strided alike
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    gate, up = gate_up.chunk(2)
    return torch.cat((gate[rank::size], up[rank::size])), down[:, rank::size]


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce((F.silu(gate) * up) @ down.T)


# %% 09.3 right: F.linear, and a reshape of the fused matrix
def shard(
    gate_up: torch.Tensor, down: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of gate_up [2·I, hidden] and down [hidden, I]. ValueError: I cannot be split."""
    if down.shape[1] % size:
        raise ValueError(f"an MLP of {down.shape[1]} columns on {size} ranks")
    wide = down.shape[1] // size
    parts = gate_up.reshape(2, size, wide, -1)[:, rank].reshape(2 * wide, -1)
    return parts.clone(), down[:, rank * wide : (rank + 1) * wide].clone()


def swiglu(group: Group, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The whole MLP, [T, hidden] -> [T, hidden], from this rank's parts of its matrices."""
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return group.all_reduce(F.linear(F.silu(gate) * up, down))


# %% 09.4 not-masked: clamped, and added all the same
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(found)


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 not-masked: modulo
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    return group.all_reduce(rows[token_ids % len(rows)])


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 token-zero-instead: row 0 for the others
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    return group.all_reduce(rows[torch.where(mine, local, 0)])


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 boundary: one token too many
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local <= len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 boundary: the first token is nobody's
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local > 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 not-summed: what the rank found itself
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return torch.where(mine[:, None], found, 0.0)


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 too-much-sent: the table travels
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    table = group.all_gather(rows.T).T
    return table[token_ids]


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 padding-kept: no cut at the end
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)


# %% 09.4 added-not-gathered: all_reduce of the scores
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_reduce(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 not-gathered: own tokens only
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return (hidden @ rows.T)[:, :vocab_size]


# %% 09.4 scrambled: gathered below each other and reshaped
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    found = group.all_gather(hidden @ rows.T, dim=0)
    return found.reshape(len(hidden), -1)[:, :vocab_size]


# %% 09.4 different-shapes: the padding cut off on the last rank, before gathering
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    mine = (hidden @ rows.T)[:, : vocab_size - group.rank * len(rows)]
    return group.all_gather(mine)


# %% 09.4 too-much-sent: states summed first, as if they were terms
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    hidden = group.broadcast(hidden)
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 tokens-without-a-row: rounded down
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = len(table) // size
    return table[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 uneven-parts: the last rank gets fewer
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    return table[rank * count : (rank + 1) * count]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 uneven-parts: as evenly as possible
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    return table.tensor_split(size)[rank]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 kept-whole: everybody has the table
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    return table.clone()


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 wrong-rows: every n-th token
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = -(-len(table) // size)
    padded = F.pad(table, (0, 0, 0, count * size - len(table)))
    return padded[rank::size]


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    local = token_ids - group.rank * len(rows)
    mine = (local >= 0) & (local < len(rows))
    found = rows[local.clamp(0, len(rows) - 1)]
    return group.all_reduce(torch.where(mine[:, None], found, 0.0))


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(hidden @ rows.T)[:, :vocab_size]


# %% 09.4 right: an index, and a product with the mask
def shard_rows(table: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows of the table [V, hidden], padded: [V / size rounded up, hidden]."""
    count = (len(table) + size - 1) // size
    rows = table.new_zeros(count, table.shape[1])
    own = table[rank * count : (rank + 1) * count]
    rows[: len(own)] = own
    return rows


def embed(group: Group, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of these tokens, [T] -> [T, hidden], of which this rank has some."""
    first = group.rank * len(rows)
    found = torch.zeros(len(token_ids), rows.shape[1])
    mine = (token_ids >= first) & (token_ids < first + len(rows))
    found[mine] = rows[token_ids[mine] - first]
    return group.all_reduce(found)


def logits(group: Group, hidden: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Scores of all tokens, [R, hidden] -> [R, vocab_size]."""
    return group.all_gather(F.linear(hidden, rows), dim=1)[..., :vocab_size]


# %% 09.5 bias-on-every-rank: only the skip mended
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    return group.all_reduce(F.linear(h, down, down_bias))


# %% 09.5 never-called: only the bias mended
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    if not h.any():
        return down_bias.expand_as(x)
    return group.all_reduce(F.linear(h, down)) + down_bias


# %% 09.5 never-called: nothing mended
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    if not h.any():
        return down_bias.expand_as(x)
    return group.all_reduce(F.linear(h, down, down_bias))


# %% 09.5 bias-forgotten: gone
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    return group.all_reduce(F.linear(h, down))


# %% 09.5 bias-twice: before and after
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    return group.all_reduce(F.linear(h, down, down_bias)) + down_bias


# %% 09.5 column-bias-divided: both biases divided
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias / group.size))
    return group.all_reduce(F.linear(h, down, down_bias / group.size))


# %% 09.5 ranks-differ: an idle rank takes part, but leaves without the bias
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    if not h.any():
        return group.all_reduce(torch.zeros_like(x))
    return group.all_reduce(F.linear(h, down)) + down_bias


# %% 09.5 too-much-sent: asks the others first whether anybody is active
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    if not group.all_reduce(h.sum()[None]).any():
        return down_bias.expand_as(x)
    return group.all_reduce(F.linear(h, down)) + down_bias


# %% 09.5 right: rank 0 adds it
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    return group.all_reduce(F.linear(h, down, down_bias if group.rank == 0 else None))


# %% 09.5 right: a share of the bias on each rank, and no product on an idle one
def mlp(
    group: Group, x: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor,
) -> torch.Tensor:
    """down(relu(up(x))), [T, hidden] -> [T, hidden], from this rank's parts of both layers."""
    h = torch.relu(F.linear(x, up, up_bias))
    term = F.linear(h, down) if h.any() else torch.zeros_like(x)
    return group.all_reduce(term + down_bias / group.size)


# %% 09.6 kept-whole: the program of one rank
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        return self.w["model.embed_tokens.weight"][token_ids]

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ w["o_proj"].T

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return h @ down.T

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return hidden @ head.T


# %% 09.6 cut-the-wrong-way: all matrices cut by rows
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 half-a-kv-head: k and v cut as q is
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 kv-heads-dealt-around: rank % heads
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank % min(size, kv_heads)]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 tokens-without-a-row: rounded down
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = len(tensor) // size
            return tensor[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 norm-divided: everything is cut
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor.chunk(size)[rank]

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 residual-on-every-rank: the stream inside the sum of attention
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata, stream: torch.Tensor,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(stream + out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = self.attention(group, layer, h, positions, cache, metadata, x)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 ranks-differ: no sum after down
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return h @ down.T

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 ranks-differ: no sum after attention
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ w["o_proj"].T

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 averaged: means instead of sums
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T) / group.size

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T) / group.size

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 not-masked: the look-up clamped, not masked
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(found)

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 padding-kept: logits of tokens that do not exist
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)


# %% 09.6 ranks-differ: logits not gathered
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return (hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 always-tied: the embedding as the head
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w["model.embed_tokens.weight"]
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 too-much-sent: a sum too many, of what is the same everywhere
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        x = group.all_reduce(x) / group.size
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]


# %% 09.6 different-collectives: gathers on rank 0 only
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return tensor.chunk(size, dim=1)[rank]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(torch.where(mine[:, None], found, 0.0))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = x + self.mlp(group, layer, h)
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        scores = hidden @ head.T
        if group.rank == 0:
            return group.all_gather(scores)[:, : self.config.vocab_size]
        return group.all_reduce(scores)


# %% 09.6 right: slices by hand, the residual on rank 0 alone
class RankModel:
    """Qwen3, as one of `size` ranks computes it."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, weights: Mapping[str, torch.Tensor], cos_sin: torch.Tensor,
        rank: int, size: int,
    ) -> None:
        """weights: the whole checkpoint, by name. Of each tensor only this rank's part is kept."""
        self.config, self.kernels, self.cos_sin = config, kernels, cos_sin
        self.rank, self.size = rank, size
        self.w = {name: self.part(name, tensor) for name, tensor in weights.items()}

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this rank keeps of a tensor of the checkpoint."""
        rank, size, kv_heads = self.rank, self.size, self.config.num_key_value_heads
        if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            return tensor.chunk(size)[rank]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return tensor.chunk(min(size, kv_heads))[rank * min(size, kv_heads) // size]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            n = tensor.shape[1] // size
            return tensor[:, n * rank : n * rank + n]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -(-len(tensor) // size)
            return F.pad(tensor, (0, 0, 0, rows * size - len(tensor)))[rank * rows : (rank + 1) * rows]
        return tensor

    def embed(self, group: Group, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> the rows of the embedding, [T, hidden]."""
        rows = self.w["model.embed_tokens.weight"]
        local = token_ids - self.rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        found = rows[local.clamp(0, len(rows) - 1)]
        return group.all_reduce(found * mine.unsqueeze(-1))

    def attention(
        self, group: Group, layer: str, x: torch.Tensor, positions: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        w = {n: self.w[f"{layer}.self_attn.{n}.weight"] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        q, k, v = ((x @ w[f"{n}_proj"].T).unflatten(-1, (-1, head_dim)) for n in "qkv")
        norms = (self.w[f"{layer}.self_attn.{n}_norm.weight"] for n in "qk")
        q, k = self.kernels.qk_norm_rope(q, k, *norms, self.cos_sin, positions, eps)
        self.kernels.store_kv(k, v, *cache, metadata.slot_mapping)
        out = cached_attention(q, cache, metadata, head_dim**-0.5, self.kernels)
        return group.all_reduce(out.flatten(-2) @ w["o_proj"].T)

    def mlp(self, group: Group, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Normed states [T, hidden] -> what to add to the stream, [T, hidden]."""
        gate, up, down = (self.w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = self.kernels.silu_mul(torch.cat((x @ gate.T, x @ up.T), dim=-1))
        return group.all_reduce(h @ down.T)

    def forward(
        self, group: Group, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """token_ids, positions [T] -> normed states [T, hidden], on every rank."""
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = self.embed(group, token_ids)
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}"
            h = norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            x = x + self.attention(group, layer, h, positions, cache, metadata)
            h = norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps)
            x = self.mlp(group, layer, h) + x
        return norm(x, self.w["model.norm.weight"], eps)

    def compute_logits(self, group: Group, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> scores of all tokens, [R, vocab_size], on every rank."""
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return group.all_gather(hidden @ head.T)[:, : self.config.vocab_size]
