# %% 02.1 aligned-to-start: tril as it comes
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril()


# %% 02.1 aligned-to-start: row i sees the columns up to i
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.arange(context)[None, :] <= torch.arange(query_len)[:, None]


# %% 02.1 sees-the-next-token: off by one at the diagonal
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(diagonal=context - query_len + 1)


# %% 02.1 hides-its-own-token: strictly before
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    positions = torch.arange(context - query_len, context)
    return torch.arange(context) < positions[:, None]


# %% 02.1 hides-nothing: the diagonal too far to the right
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(diagonal=context)


# %% 02.1 same-for-all-queries: the past and one, for every row
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    visible = torch.arange(context) <= context - query_len
    return visible.repeat(query_len, 1)


# %% 02.1 true-means-hidden: what masked_fill wants
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).triu(diagonal=context - query_len + 1)


# %% 02.1 wrong-dtype: numbers instead of truths
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context).tril(diagonal=context - query_len)


# %% 02.1 wrong-shape: the queries' own square only
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, query_len, dtype=torch.bool).tril()


# %% 02.1 right: tril with the right diagonal
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(query_len, context, dtype=torch.bool).tril(diagonal=context - query_len)


# %% 02.1 right: the last rows of the whole mask
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    return torch.ones(context, context, dtype=torch.bool).tril()[context - query_len :]


# %% 02.1 right: cell by cell
def causal_mask(query_len: int, context: int) -> torch.Tensor:
    past = context - query_len
    return torch.tensor([[j <= past + i for j in range(context)] for i in range(query_len)])


# %% 02.2 half-is-skipped: as for a whole prompt
computed_tiles = 16 * 64 // 2
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2


# %% 02.2 nothing-is-skipped: the corner forgotten
computed_tiles = 16 * 64
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2


# %% 02.2 past-forgotten: the chunk's own triangle
computed_tiles = 16 * 17 // 2
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2


# %% 02.2 diagonal-forgotten: full tiles only
computed_tiles = 888
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2


# %% 02.2 wrong-computed-tiles: one off
computed_tiles = 905
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 25.2


# %% 02.2 all-computed-are-masked: a mask everywhere
computed_tiles = 904
masked_tiles = 904
matrix_mb = 134.2
flash_mb = 25.2


# %% 02.2 a-mask-for-each-column: one a column
computed_tiles = 904
masked_tiles = 64
matrix_mb = 134.2
flash_mb = 25.2


# %% 02.2 two-in-a-row: as if the past ended within a tile
computed_tiles = 904
masked_tiles = 32
matrix_mb = 134.2
flash_mb = 25.2


# %% 02.2 one-head: scores of one head
computed_tiles = 904
masked_tiles = 16
matrix_mb = 1024 * 4096 * 2 / 1e6
flash_mb = 25.2


# %% 02.2 kv-heads: scores of 8 heads
computed_tiles = 904
masked_tiles = 16
matrix_mb = 8 * 1024 * 4096 * 2 / 1e6
flash_mb = 25.2


# %% 02.2 in-float32: four bytes
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 4096 * 4 / 1e6
flash_mb = 25.2


# %% 02.2 square: 4,096 × 4,096
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 4096 * 4096 * 2 / 1e6
flash_mb = 25.2


# %% 02.2 chunk-only: 1,024 × 1,024
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 1024 * 2 / 1e6
flash_mb = 25.2


# %% 02.2 heads-not-shared: 16 KV heads
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (2 * 1024 + 2 * 4096) * 16 * 128 * 2 / 1e6


# %% 02.2 keys-of-the-chunk-only: the past not read
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 1024 * (2 * 16 + 2 * 8) * 128 * 2 / 1e6


# %% 02.2 result-forgotten: only what is read
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (1024 * 16 + 2 * 4096 * 8) * 128 * 2 / 1e6


# %% 02.2 values-forgotten: only the keys
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = (2 * 1024 * 16 + 4096 * 8) * 128 * 2 / 1e6


# %% 02.2 as-if-whole-prompt: 4,096 queries
computed_tiles = 904
masked_tiles = 16
matrix_mb = 134.2
flash_mb = 4096 * (2 * 16 + 2 * 8) * 128 * 2 / 1e6


# %% 02.2 wrong-matrix-mb: in bytes
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 4096 * 2
flash_mb = 25.2


# %% 02.2 right: in MiB
computed_tiles = 904
masked_tiles = 16
matrix_mb = 16 * 1024 * 4096 * 2 / 2**20
flash_mb = 24


# %% 02.3 aligned-to-start: no past in mask and walk
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = 0, torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 walk-ends-too-early: the mask knows of the past, the walk does not
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 no-scale: the constant for base two without scale
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * math.log2(math.e)  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 scaled-twice: with the query, and again with the scores
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T * scale
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 no-log2e: exp2 with the scale for exp
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * scale  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 exp-of-base-two-scores: exp of scores for base two
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 mixed-bases: the rescaling stays in base e
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 mixed-bases: base e, and the rescaling in base two
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * scale  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 sum-not-rescaled: only acc is
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 output-not-rescaled: only l is
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 not-rescaled: neither is
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc + weights @ value[columns]
            l = l + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 tile-under-its-own-maximum: scores - scores.amax
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - scores.amax(dim=1, keepdim=True))
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 not-divided: returns acc
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc
    return out


# %% 02.3 divided-in-each-tile: normalised at once
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
            acc = acc / l[:, None]
        out[rows] = acc
    return out


# %% 02.3 diagonal-not-masked: stops at the diagonal and thinks that is enough
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 indices-within-the-tile: torch.triu of the tile
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 mask-of-the-first-query: one position for the tile
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + top, -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 hides-its-own-token: >= for >
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] >= past + top:  # on the diagonal
                scores = scores.masked_fill(columns >= past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 sees-the-next-token: one too many
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None] + 1, -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 maximum-starts-at-zero: zeros for everything
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.zeros(len(rows)), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 rescaled-the-wrong-way: new - m for m - new
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(new - m), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 maximum-not-kept: m = new is missing
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 straddling-tile-not-masked: masked from the tile on that begins at the diagonal
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if first >= past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 hidden-scores-are-zero: multiplies with the mask
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores * (columns <= past + rows[:, None])
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 one-maximum-for-all-rows: the tile's largest score
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax())
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 stops-before-the-diagonal: only the tiles before
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = (past + top) // block_n * block_n  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 tail-dropped: whole tiles only
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for j in range(end // block_n):
            columns = torch.arange(j * block_n, (j + 1) * block_n)
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 a-softmax-for-each-tile: torch.softmax of each tile, added up
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            acc = acc + torch.softmax(scores / math.log2(math.e), dim=1) @ value[columns]
        out[rows] = acc
    return out


# %% 02.3 visits-the-future: walks to the end of the context
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = len(key)  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 whole-matrix: the naive way, and it is right
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    hidden = torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
    return (query @ key.T * scale).masked_fill(hidden, -math.inf).softmax(-1) @ value


# %% 02.3 whole-matrix: tiles of scores, and the mask of all tokens
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    hidden = torch.ones(len(query), len(key), dtype=torch.bool).triu(past + 1)
    for top in range(0, len(query), block_m):
        rows = slice(top, min(top + block_m, len(query)))
        acc, m, l = 0.0, torch.full((rows.stop - top, 1), -math.inf), 0.0
        for first in range(0, past + rows.stop, block_n):
            tile = slice(first, first + block_n)
            scores = (query[rows] @ key[tile].T * scale).masked_fill(hidden[rows, tile], -math.inf)
            new = torch.maximum(m, scores.amax(1, keepdim=True))
            weights, rescale, m = torch.exp(scores - new), torch.exp(m - new), new
            acc, l = acc * rescale + weights @ value[tile], l * rescale + weights.sum(1, keepdim=True)
        out[rows] = acc / l
    return out


# %% 02.3 whole-rows: tiles of queries against all keys
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        end = past + int(rows[-1]) + 1
        scores = query[rows] @ key[:end].T * scale
        scores = scores.masked_fill(torch.arange(end) > past + rows[:, None], -math.inf)
        out[rows] = scores.softmax(-1) @ value[:end]
    return out


# %% 02.3 done-by-torch: what torch has
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    hidden = torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=~hidden, scale=scale
    )[0]


# %% 02.3 changed-input: scales the caller's query
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    query *= scale * math.log2(math.e)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows].mul_(1.0)
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 mixed-bases: natural scores, weights in base two, rescaling in base e
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * scale
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp2(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 mixed-bases: scores in base two, weights in base e, rescaling in base two
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * (scale * math.log2(math.e))  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            if columns[-1] > past + top:  # on the diagonal
                scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp2(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 right: base e, all tiles masked, -1e30 for -inf
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head: [Q, D], [N, D], [N, D] -> [Q, D]."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        tile = query[rows] * scale  # scores in base two
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        end = past + int(rows[-1]) + 1  # behind the last key that the last of these queries sees
        for first in range(0, end, block_n):
            columns = torch.arange(first, min(first + block_n, end))
            scores = tile @ key[columns].T
            scores = scores.masked_fill(columns > past + rows[:, None], -1e30)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.3 right: slices, columns of m and l, padded tiles
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    dim = query.shape[1]
    for top in range(0, len(query), block_m):
        count = min(block_m, len(query) - top)
        tile = torch.zeros(block_m, dim)
        tile[:count] = query[top : top + count] * scale
        acc, m, l = torch.zeros(block_m, dim), torch.full((block_m, 1), -math.inf), torch.zeros(block_m, 1)
        for first in range(0, past + top + count, block_n):
            k, v = torch.zeros(block_n, dim), torch.zeros(block_n, dim)
            there = min(block_n, len(key) - first)
            k[:there], v[:there] = key[first : first + there], value[first : first + there]
            visible = torch.arange(first, first + block_n) <= torch.arange(past + top, past + top + block_m)[:, None]
            scores = torch.where(visible, tile @ k.T, -math.inf)
            new = torch.maximum(m, scores.max(dim=1, keepdim=True).values)
            rescale, weights = (m - new).exp(), (scores - new).exp()
            acc, l, m = acc * rescale + weights @ v, l * rescale + weights.sum(1, keepdim=True), new
        out[top : top + count] = (acc / l)[:count]
    return out


# %% 02.3 right: the full tiles first, then the diagonal, with einsum
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block_m: int = 16, block_n: int = 16,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.zeros_like(query)

    def add(state, rows, first, last, masked):
        acc, m, l = state
        scores = torch.einsum("md,nd->mn", query[rows], key[first:last]) * scale
        if masked:
            scores[torch.arange(first, last)[None, :] > (past + rows)[:, None]] = -math.inf
        new = torch.maximum(m, scores.amax(1))
        weights, rescale = torch.exp(scores - new[:, None]), torch.exp(m - new)
        return rescale[:, None] * acc + torch.einsum("mn,nd->md", weights, value[first:last]), new, l * rescale + weights.sum(1)

    for top in range(0, len(query), block_m):
        rows = torch.arange(top, min(top + block_m, len(query)))
        state = torch.zeros(len(rows), query.shape[1]), torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        diagonal = (past + top + 1) // block_n * block_n
        for first in range(0, diagonal, block_n):
            state = add(state, rows, first, first + block_n, masked=False)
        for first in range(diagonal, past + int(rows[-1]) + 1, block_n):
            state = add(state, rows, first, min(first + block_n, len(key)), masked=True)
        out[rows] = state[0] / state[2][:, None]
    return out


# %% 02.4 walk-ends-too-early: as it came
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, min(top + block, len(key)), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 mask-spoilt-instead: the walk mended, and the mask changed with it
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, min(past + top + block, len(key)), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 mask-spoilt-instead: mask and walk both without a past
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, min(top + block, len(key)), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 stops-before-the-diagonal: up to the past and the tile's first row
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, (past + top) // block * block, block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 all-walks-end-alike: top is gone
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, min(past + block, len(key)), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 visits-the-future: simply all keys
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, len(key), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 visits-the-future: all keys, but for the last tile
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, min(past + len(query), len(key)), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 visited-not-noted: the notes thrown away
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, min(past + top + block, len(key)), block):  # … walks along the keys
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 walk-ends-too-early: the length of the queries for that of the keys
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, min(past + top + block, len(query)), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 stops-before-the-diagonal: up to the position of the first query
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, past + top, block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 stops-one-short: up to the position of the last query, which range leaves out
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, past + int(rows[-1]), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 walks-beyond-the-context: no min at the end of the context
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, past + top + block, block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 past-not-visited: the walk begins where the chunk does
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(past, min(past + top + block, len(key)), block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 right: by the last row
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, past + int(rows[-1]) + 1, block):  # … walks along the keys
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.4 right: all keys, with a break
def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    block: int = 16, visited: list | None = None,
) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head; appends (first query, first key) of each tile to visited."""
    past, out = len(key) - len(query), torch.empty_like(query)
    for top in range(0, len(query), block):  # a tile of queries …
        rows = torch.arange(top, min(top + block, len(query)))
        acc = torch.zeros(len(rows), value.shape[1])
        m, l = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))
        for first in range(0, len(key), block):  # … walks along the keys
            if first > past + rows[-1]:
                break
            if visited is not None:
                visited.append((top, first))
            columns = torch.arange(first, min(first + block, len(key)))
            scores = query[rows] @ key[columns].T * scale
            scores = scores.masked_fill(columns > past + rows[:, None], -math.inf)
            new = torch.maximum(m, scores.amax(dim=1))
            rescale, weights = torch.exp(m - new), torch.exp(scores - new[:, None])
            acc = acc * rescale[:, None] + weights @ value[columns]
            l = l * rescale + weights.sum(dim=1)
            m = new
        out[rows] = acc / l[:, None]
    return out


# %% 02.5 aligned-to-start: query i at position i
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(query))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 wrong-kv-head: head modulo KH
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head % kv_heads
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 block-table-ignored: blocks in the order of the cache
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = torch.arange(-(-context // block_size))
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 table-of-the-first-sequence: row 0 for all
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[0, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 reads-beyond-the-context: the last block to its end
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, context: int) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(context - len(query), context)[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, len(blocks) * block_size) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale, context)
    return out


# %% 02.5 no-mask: all see all
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 no-scale: scale unused
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 not-rescaled: the first tile's maximum is enough
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc + weights @ value[tile]
        l = l + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 sum-not-rescaled: acc alone
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 maximum-not-kept: m = new is missing
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last Q of N tokens, one head, in tiles of keys: [Q, D], [N, D], [N, D] -> [Q, D]."""
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 whole-matrix: the naive way for each head
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    hidden = torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
    return (query @ key.T * scale).masked_fill(hidden, -math.inf).softmax(-1) @ value


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 done-by-torch: what torch has
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    hidden = torch.arange(len(key)) > torch.arange(len(key) - len(query), len(key))[:, None]
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(query[None], key[None], value[None], attn_mask=~hidden, scale=scale)[0]


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    """Each request's new tokens over its whole context: [T, H, D] -> [T, H, D]."""
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 blocks-rounded-down: whole blocks only
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : context // block_size]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 blocks-rounded-down: whole blocks only, and the formula
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    hidden = torch.ones(len(query), len(key), dtype=torch.bool).triu(len(key) - len(query) + 1)
    return (query @ key.T * scale).masked_fill(hidden, -math.inf).softmax(dim=-1) @ value


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        blocks = block_table[i, : context // block_size]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 one-length-for-all: the longest context for all
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        context = max_seq_len
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 one-length-for-all: the first request's context for all
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    positions = torch.arange(len(key) - len(query), len(key))[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((len(query), 1), -math.inf), torch.zeros(len(query), 1)
    for first in range(0, len(key), 64):
        tile = slice(first, min(first + 64, len(key)))
        scores = query @ key[tile].T * scale
        scores = scores.masked_fill(torch.arange(tile.start, tile.stop) > positions, -math.inf)
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        acc = acc * rescale + weights @ value[tile]
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        m = new
    return acc / l


def prefill_attention(
    query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, *, max_query_len: int, max_seq_len: int,
) -> torch.Tensor:
    out, starts = torch.empty_like(query), query_start_loc.tolist()
    heads, (kv_heads, block_size) = query.shape[1], k_cache.shape[1:3]
    for i, context in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        context = int(seq_lens[0])
        blocks = block_table[i, : -(-context // block_size)]
        keys, values = (side_by_side(cache, blocks, context) for cache in (k_cache, v_cache))
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            out[rows, head] = attend(query[rows, head], keys[kv_head], values[kv_head], scale)
    return out


# %% 02.5 right: all heads of a request at once
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """query [KH, group, Q, D], key and value [KH, 1, N, D]."""
    q, n = query.shape[2], key.shape[2]
    positions = torch.arange(n - q, n)[:, None]
    acc, m, l = torch.zeros_like(query), torch.full((*query.shape[:3], 1), -math.inf), torch.zeros(*query.shape[:3], 1)
    for k, v, tokens in zip(key.split(32, 2), value.split(32, 2), torch.arange(n).split(32)):
        scores = (query @ k.transpose(2, 3) * scale).masked_fill(tokens > positions, -math.inf)
        new = torch.maximum(m, scores.amax(-1, keepdim=True))
        rescale, weights, m = torch.exp(m - new), torch.exp(scores - new), new
        acc, l = acc * rescale + weights @ v, l * rescale + weights.sum(-1, keepdim=True)
    return acc / l


def prefill_attention(
    query, k_cache, v_cache, block_table, query_start_loc, seq_lens, scale, *, max_query_len, max_seq_len
):
    out = torch.empty_like(query)
    kv_heads = k_cache.shape[1]
    for i, (start, stop) in enumerate(zip(query_start_loc[:-1].tolist(), query_start_loc[1:].tolist())):
        keys, values = (side_by_side(c, block_table[i], int(seq_lens[i]))[:, None] for c in (k_cache, v_cache))
        mine = query[start:stop].transpose(0, 1).unflatten(0, (kv_heads, -1))
        out[start:stop] = attend(mine, keys, values, scale).flatten(0, 1).transpose(0, 1)
    return out


# %% 02.6 aligned-to-start: no past
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 aligned-to-start: no past in the mask, and the walk goes on
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 walk-ends-too-early: no past in the walk
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 reads-beyond-the-keys: no mask for keys and values
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places)
        value = tl.load(value_ptr + places)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 reads-beyond-the-keys: no mask for the values: their weight is 0 anyway
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 out-of-bounds-write: no mask at the store
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None])


# %% 02.6 program-id-ignored: every program does the first tile
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 exp-of-base-two-scores: tl.exp
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp(m - new), tl.exp(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 mixed-bases: tl.exp for the rescaling
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 not-rescaled: neither sum nor output
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc + tl.dot(weights, value, input_precision="ieee")
        l = l + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 sum-not-rescaled: acc alone
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 output-not-rescaled: l alone
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 no-scale: scale_log2 unused
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 diagonal-not-masked: the end of the walk is taken for a mask
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where((tokens < N)[None, :], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 diagonal-not-masked: no tl.where at all
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 hidden-scores-are-zero: 0 for -inf
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, 0.0)
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 one-maximum-for-all-rows: tl.max over everything
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(tl.max(scores, axis=1), axis=0))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 stops-before-the-diagonal: the last tile left out
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = (N - Q + tl.program_id(0) * BLOCK_M) // BLOCK_N * BLOCK_N
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 maximum-not-kept: m = new is missing
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 straddling-tile-not-masked: no mask before the tile's first position
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where((tokens[None, :] <= positions[:, None]) | (first < N - Q + tl.program_id(0) * BLOCK_M), scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 visits-the-future: all keys
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = N
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 not-divided: acc as it is
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc, mask=(rows < Q)[:, None])


# %% 02.6 right: two loops, and base e
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for first in range(0, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2 * 0.6931471805599453
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp(m - new), tl.exp(scores - new[:, None])
        acc = acc * rescale[:, None] + tl.dot(weights, value, input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])


# %% 02.6 right: acc inside of the dot, ceil-divided loop
@triton.jit
def flash_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, Q, N, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Causal attention of the last Q of N tokens, one head; program p does the queries from p · BLOCK_M on."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_places = rows[:, None] * D + columns[None, :]
    query = tl.load(query_ptr + query_places, mask=(rows < Q)[:, None], other=0.0)
    positions = N - Q + rows

    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = tl.minimum(N - Q + (tl.program_id(0) + 1) * BLOCK_M, N)
    for j in range(0, tl.cdiv(end, BLOCK_N)):
        first = j * BLOCK_N
        tokens = first + tl.arange(0, BLOCK_N)
        places, inside = tokens[:, None] * D + columns[None, :], (tokens < N)[:, None]
        key = tl.load(key_ptr + places, mask=inside, other=0.0)
        value = tl.load(value_ptr + places, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new = tl.maximum(m, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(m - new), tl.exp2(scores - new[:, None])
        acc = tl.dot(weights, value, acc * rescale[:, None], input_precision="ieee")
        l = l * rescale + tl.sum(weights, axis=1)
        m = new
    tl.store(out_ptr + query_places, acc / l[:, None], mask=(rows < Q)[:, None])
