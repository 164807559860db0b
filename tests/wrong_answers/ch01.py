# %% 01.1 no-maximum: the formula as it stands in the book
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x)
    return weights / weights.sum(dim=1, keepdim=True)


# %% 01.1 one-maximum-for-all-rows: x.max() is the largest of the whole table
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.max())
    return weights / weights.sum(dim=1, keepdim=True)


# %% 01.1 sum-over-all-rows: the sum forgets its dimension
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.amax(dim=1, keepdim=True))
    return weights / weights.sum()


# %% 01.1 wrong-axis: dim=0 runs down the columns
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    maximum = x.amax(dim=0, keepdim=True)
    weights = torch.exp(x - torch.where(maximum == -math.inf, 0.0, maximum))
    return weights / weights.sum(dim=0, keepdim=True)


# %% 01.1 wrong-axis: dim=0, and a column of -inf is nan
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x - x.amax(dim=0, keepdim=True))
    return weights / weights.sum(dim=0, keepdim=True)


# %% 01.1 clamped: cuts off what overflows
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(torch.clamp(x, max=88))
    return weights / weights.sum(dim=1, keepdim=True)


# %% 01.1 largest-magnitude: subtracts the largest absolute value
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    size = torch.where(x == -math.inf, 0.0, x).abs().amax(dim=1, keepdim=True)
    weights = torch.exp(x - size)
    return weights / weights.sum(dim=1, keepdim=True)


# %% 01.1 changed-input: works in place on the caller's scores
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    x -= x.amax(dim=1, keepdim=True)
    x.exp_()
    return x / x.sum(dim=1, keepdim=True)


# %% 01.1 torch-did-it: torch.softmax
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, dim=1)


# %% 01.1 not-divided: weights, not probabilities
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x - x.amax(dim=1, keepdim=True))


# %% 01.1 right: by way of the log-sum-exp
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x - torch.logsumexp(x, dim=1, keepdim=True))


# %% 01.1 right: row by row
def safe_softmax(x: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in x:
        weights = torch.exp(row - row.max())
        rows.append(weights / weights.sum())
    return torch.stack(rows)


# %% 01.2 not-mended: as it was given
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        tile_max = tile.max()
        weights = torch.exp(tile - tile_max)
        new = torch.maximum(m, tile_max)
        l = l * torch.exp(m - new) + weights.sum()
        m = new
    return m, l


# %% 01.2 tile-under-its-own-maximum: only the nan is mended
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        tile_max = tile.max()
        weights = torch.exp(tile - torch.where(tile_max == -math.inf, 0.0, tile_max))
        new = torch.maximum(m, tile_max)
        l = l * torch.exp(m - torch.where(new == -math.inf, 0.0, new)) + weights.sum()
        m = new
    return m, l


# %% 01.2 tile-under-its-own-maximum: nan made 0 at the end of each step
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        tile_max = tile.max()
        weights = torch.exp(tile - tile_max)
        new = torch.maximum(m, tile_max)
        l = l * torch.exp(m - new).nan_to_num(0.0) + weights.sum().nan_to_num(0.0)
        m = new
    return m, l


# %% 01.2 masked-tile-is-nan: only the tiles are mended
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * torch.exp(m - new) + torch.exp(tile - new).sum()
        m = new
    return m, l


# %% 01.2 no-rescale: takes the tile under the new maximum, and loses the rescaling
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        finite = torch.where(new == -math.inf, 0.0, new)
        l = l + torch.exp(tile - finite).sum()
        m = new
    return m, l


# %% 01.2 rescaled-the-wrong-way: new minus old
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * (torch.exp(new - m) if l > 0 else 0.0) + torch.exp(tile - new).sum()
        m = new
    return m, l


# %% 01.2 maximum-starts-at-zero: 0 in place of -inf gets rid of the nan
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(0.0), torch.tensor(0.0)
    for tile in scores.split(block):
        new = torch.maximum(m, tile.max())
        l = l * torch.exp(m - new) + torch.exp(tile - new).sum()
        m = new
    return m, l


# %% 01.2 two-passes: the maximum first, in a loop of its own
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        m = torch.maximum(m, tile.max())
    finite = torch.where(m == -math.inf, 0.0, m)
    for tile in scores.split(block):
        l = l + torch.exp(tile - finite).sum()
    return m, l


# %% 01.2 whole-row: the maximum of the row before its tiles
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m = scores.max()
    finite = torch.where(m == -math.inf, 0.0, m)
    return m, sum(torch.exp(tile - finite).sum() for tile in scores.split(block))


# %% 01.2 whole-row: by the log-sum-exp of all
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m = torch.tensor(-math.inf)
    for tile in scores.split(block):
        m = torch.maximum(m, tile.max())
    finite = torch.where(m == -math.inf, 0.0, m)
    return m, torch.exp(torch.logsumexp(scores, 0) - finite)


# %% 01.2 whole-row: as a list
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[float, float]:
    row = scores.tolist()
    m = max(row)
    return m, sum(math.exp(x - m) for x in row if x > -math.inf)


# %% 01.2 right: score by score, whatever the block
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for x in scores:
        new = torch.maximum(m, x)
        finite = torch.where(new == -math.inf, 0.0, new)
        l = l * torch.exp(m - finite) + torch.exp(x - finite)
        m = new
    return m, l


# %% 01.2 right: each tile under its own maximum, then merged
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, l = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in scores.split(block):
        tile_max = tile.max()
        if tile_max == -math.inf:
            continue
        new = torch.maximum(m, tile_max)
        l = l * torch.exp(m - new) + torch.exp(tile - tile_max).sum() * torch.exp(tile_max - new)
        m = new
    return m, l


# %% 01.2 right: plain floats
def max_and_sum(scores: torch.Tensor, block: int) -> tuple[float, float]:
    m, l = -math.inf, 0.0
    for start in range(0, len(scores), block):
        tile = scores[start : start + block].tolist()
        new = max(m, *tile)
        if new > -math.inf:
            l = l * math.exp(m - new) + sum(math.exp(x - new) for x in tile)
            m = new
    return m, l


# %% 01.3 forgot-the-write: three passes, three moves
safe_bytes = 256 * 151_936 * 4 * 3
online_bytes = 256 * 151_936 * 4 * 2
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 forgot-passes: the table's own size
safe_bytes = 256 * 151_936 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 no-pass-saved: online is only another order
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 4
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 forgot-the-write: online reads twice, and writes
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 2
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 numbers-not-bytes: numbers, not bytes
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 forgot-the-rescale: one exp a score
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 forgot-the-rescale: one exp a score, in tiles too
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 rescaled-each-score: tiles as dear as single scores
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 * 2
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 half-the-matrix: the masked half is not counted
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4 // 2
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 one-row: a row is not the matrix
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 forgot-lse: the outputs alone
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 128 * 4


# %% 01.3 max-and-sum: m and l, not their log-sum-exp
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 130 * 4


# %% 01.3 counted-the-write: what is written, too
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4 + 4 * 16 * 128 * 4


# %% 01.3 wrong-prediction: a guess
safe_bytes = 256 * 151_936 * 4 * 4
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 5000
matrix_bytes = 8192 * 8192 * 4
merge_bytes = 8 * 4 * 16 * 129 * 4


# %% 01.3 right: in floats, and worked out by hand
safe_bytes = 622.3e6
online_bytes = 256 * 151_936 * 4 * 3
exps_one_by_one = 2 * 4096
exps_in_tiles = 4096 + 64
matrix_bytes = 2.0**28
merge_bytes = 264_192.0


# %% 01.4 equal-weights: the mean of the parts
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    return partial_out.mean(dim=0)


# %% 01.4 equal-weights: the mean of the parts that are not empty
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    full = (partial_lse > -math.inf).float().unsqueeze(-1)
    return (partial_out * full).sum(dim=0) / full.sum(dim=0).clamp(min=1.0)


# %% 01.4 no-maximum: exp of log-sum-exps
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(partial_lse)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / weights.sum(dim=0).unsqueeze(-1)


# %% 01.4 no-maximum: exp of log-sum-exps, nothing divided by 0
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(partial_lse)
    total = weights.sum(dim=0)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / torch.where(total == 0.0, 1.0, total).unsqueeze(-1)


# %% 01.4 no-maximum: every nan taken for an empty row
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(partial_lse).unsqueeze(-1)
    return torch.nan_to_num((weights * partial_out).sum(dim=0) / weights.sum(dim=0), 0.0)


# %% 01.4 not-divided: weights that do not add up to 1
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    largest = partial_lse.amax(dim=0)
    weights = torch.exp(partial_lse - torch.where(largest == -math.inf, 0.0, largest))
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)


# %% 01.4 empty-row-is-nan: softmax of -inf alone
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)


# %% 01.4 empty-row-is-nan: -inf - -inf is mended, 0 / 0 is not
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    largest = partial_lse.amax(dim=0)
    weights = torch.exp(partial_lse - torch.where(largest == -math.inf, 0.0, largest))
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0) / weights.sum(dim=0).unsqueeze(-1)


# %% 01.4 one-maximum-for-all: the maximum over everything
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(partial_lse - partial_lse.max())
    total = weights.sum(dim=0)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / torch.where(total == 0.0, 1.0, total).unsqueeze(-1)


# %% 01.4 wrong-axis: softmax over the heads
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=-1).nan_to_num(0.0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)


# %% 01.4 wrong-axis: softmax over the sequences
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=1)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)


# %% 01.4 base-two: powers of two, as inside the kernels
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    largest = partial_lse.amax(dim=0)
    weights = torch.exp2(partial_lse - torch.where(largest == -math.inf, 0.0, largest))
    total = weights.sum(dim=0)
    merged = (weights.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / torch.where(total == 0.0, 1.0, total).unsqueeze(-1)


# %% 01.4 lse-as-weight: logarithms as weights
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    merged = (partial_lse.unsqueeze(-1) * partial_out).sum(dim=0)
    return merged / partial_lse.sum(dim=0).unsqueeze(-1)


# %% 01.4 right: softmax, and nan_to_num for the empty rows
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(partial_lse, dim=0).nan_to_num(0.0)
    return torch.einsum("sbh,sbhd->bhd", weights, partial_out)


# %% 01.4 right: part by part, as the recurrence does it
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    m, l = torch.full_like(partial_lse[0], -math.inf), torch.zeros_like(partial_lse[0])
    acc = torch.zeros_like(partial_out[0])
    for out, lse in zip(partial_out, partial_lse):
        new = torch.maximum(m, lse)
        finite = torch.where(new == -math.inf, 0.0, new)
        rescale, weight = torch.exp(m - finite), torch.exp(lse - finite)
        l = l * rescale + weight
        acc = acc * rescale.unsqueeze(-1) + weight.unsqueeze(-1) * out
        m = new
    return acc / l.clamp(min=1e-30).unsqueeze(-1)


# %% 01.4 right: with logsumexp
def merge_attention(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    total = torch.logsumexp(partial_lse, dim=0)
    weights = torch.exp(partial_lse - torch.where(total == -math.inf, 0.0, total))
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)


# %% 01.5 output-not-rescaled: the sum is rescaled, the output forgotten
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc + weights @ tile_v
        m = new
    return acc / l


# %% 01.5 sum-not-rescaled: the output is rescaled, the sum forgotten
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ tile_v
        m = new
    return acc / l


# %% 01.5 no-rescale: neither is
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l + weights.sum(dim=1, keepdim=True)
        acc = acc + weights @ tile_v
        m = new
    return acc / l


# %% 01.5 rescaled-the-wrong-way: new minus old
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.where(m == -math.inf, 0.0, torch.exp(new - m)), torch.exp(scores - new)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ tile_v
        m = new
    return acc / l


# %% 01.5 tile-under-its-own-maximum: weights under the tile's maximum
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - scores.amax(dim=1, keepdim=True))
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ tile_v
        m = new
    return acc / l


# %% 01.5 one-maximum-for-all-queries: scores.max() is the largest of all queries
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T * scale
        new = torch.maximum(m, scores.max())
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ tile_v
        m = new
    return acc / l


# %% 01.5 not-divided: the weighted sum
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ tile_v
        m = new
    return acc


# %% 01.5 no-scale: scale is not used
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ tile_v
        m = new
    return acc / l


# %% 01.5 scaled-twice: 1 / sqrt(D) once more
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        scores = q @ tile_k.T * scale / math.sqrt(q.shape[1])
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ tile_v
        m = new
    return acc / l


# %% 01.5 no-maximum: sums of exp as they are
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    l, acc = torch.zeros(len(q), 1), torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        weights = torch.exp(q @ tile_k.T * scale)
        l += weights.sum(dim=1, keepdim=True)
        acc += weights @ tile_v
    return acc / l


# %% 01.5 tail-dropped: whole tiles only
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    l = torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for i in range(len(k) // block):
        tile = slice(i * block, (i + 1) * block)
        scores = q @ k[tile].T * scale
        new = torch.maximum(m, scores.amax(dim=1, keepdim=True))
        rescale, weights = torch.exp(m - new), torch.exp(scores - new)
        l = l * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + weights @ v[tile]
        m = new
    return acc / l


# %% 01.5 tiles-averaged: a softmax for each tile, then the mean
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    parts = []
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        parts.append(torch.softmax(q @ tile_k.T * scale, dim=1) @ tile_v)
    return torch.stack(parts).mean(dim=0)


# %% 01.5 whole-row: the plain way
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    return torch.softmax(q @ k.T * scale, dim=1) @ v


# %% 01.5 whole-row: scores tile by tile, but all of them kept
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    scores = torch.cat([q @ tile.T * scale for tile in k.split(block)], dim=1)
    weights = torch.exp(scores - scores.amax(dim=1, keepdim=True))
    return weights @ v / weights.sum(dim=1, keepdim=True)


# %% 01.5 two-passes: the maximum first, in a loop of its own
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m = torch.full((len(q), 1), -math.inf)
    for tile_k in k.split(block):
        m = torch.maximum(m, (q @ tile_k.T * scale).amax(dim=1, keepdim=True))
    l, acc = torch.zeros(len(q), 1), torch.zeros(len(q), v.shape[1])
    for tile_k, tile_v in zip(k.split(block), v.split(block)):
        weights = torch.exp(q @ tile_k.T * scale - m)
        l += weights.sum(dim=1, keepdim=True)
        acc += weights @ tile_v
    return acc / l


# %% 01.5 query-by-query: a loop over the queries around it
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    outputs = []
    for query in q:
        m, l, acc = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(v.shape[1])
        for tile_k, tile_v in zip(k.split(block), v.split(block)):
            scores = tile_k @ query * scale
            new = torch.maximum(m, scores.max())
            rescale, weights = torch.exp(m - new), torch.exp(scores - new)
            l = l * rescale + weights.sum()
            acc = acc * rescale + weights @ tile_v
            m = new
        outputs.append(acc / l)
    return torch.stack(outputs)


# %% 01.5 torch-did-it: torch has it ready
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]


# %% 01.5 right: queries as columns
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m, l = torch.full((len(q),), -math.inf), torch.zeros(len(q))
    acc = torch.zeros(v.shape[1], len(q))
    for start in range(0, len(k), block):
        scores = k[start : start + block] @ (q * scale).T
        new = torch.maximum(m, scores.amax(dim=0))
        weights = torch.exp(scores - new)
        l = l * torch.exp(m - new) + weights.sum(dim=0)
        acc = acc * torch.exp(m - new) + v[start : start + block].T @ weights
        m = new
    return (acc / l).T.contiguous()


# %% 01.5 right: each tile's softmax, merged by log-sum-exps
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    out, lse = torch.zeros(len(q), v.shape[1]), torch.full((len(q), 1), -math.inf)
    for tile_k, tile_v in zip(torch.split(k, block), torch.split(v, block)):
        scores = torch.einsum("md,nd->mn", q, tile_k) * scale
        tile_lse = torch.logsumexp(scores, dim=1, keepdim=True)
        new = torch.logaddexp(lse, tile_lse)
        out = out * torch.exp(lse - new) + torch.exp(scores - new) @ tile_v
        lse = new
    return out


# %% 01.5 right: key by key, whatever the block
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int) -> torch.Tensor:
    m, l = torch.full((len(q), 1), -math.inf), torch.zeros(len(q), 1)
    acc = torch.zeros(len(q), v.shape[1])
    for key, value in zip(k, v):
        score = (q @ key * scale).unsqueeze(1)
        new = torch.maximum(m, score)
        l = l * torch.exp(m - new) + torch.exp(score - new)
        acc = acc * torch.exp(m - new) + torch.exp(score - new) * value
        m = new
    return acc / l


# %% 01.6 tail-as-zero: masked lanes read as 0
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=0.0)
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=0.0)
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 no-rescale: the sum stays as it was
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 no-rescale: the sum stays as it was, and masked tiles are nan
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = new_max
        row_sum = row_sum + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 masked-tile-is-nan: -inf - -inf
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = new_max
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 maximum-starts-at-zero: 0 in place of -inf
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = 0.0
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 tile-under-its-own-maximum: weights under the tile's maximum
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - tl.max(x, axis=0)), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 row-stride-ignored: rows as if they lay side by side
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * N + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * N + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 load-without-mask: reads beyond the row
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes)
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes)
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 out-of-bounds-write: stores without a mask
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum)


# %% 01.6 output-rows-too-far-apart: the output's rows as far apart as the input's
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * row_stride + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 tail-not-summed: one tile too few in the first loop
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N // BLOCK * BLOCK, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 tail-not-written: one tile too few in the second loop
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N // BLOCK * BLOCK, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 not-divided: weights, not probabilities
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp(row_max - finite) + tl.sum(tl.exp(x - finite), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max), mask=inside)


# %% 01.6 first-tile-only: no loop: the chapter's kernel for rows that fit into a tile
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + lanes, mask=lanes < N, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * N + lanes, weights / tl.sum(weights, axis=0), mask=lanes < N)


# %% 01.6 a-softmax-for-each-tile: one loop that writes at once
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        weights = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row * N + start + lanes, weights / tl.sum(weights, axis=0), mask=inside)


# %% 01.6 three-passes: maximum, then sum, then result
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    row_max = float("-inf")
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        row_max = tl.maximum(row_max, tl.max(x, axis=0))
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        row_sum += tl.sum(tl.exp(x - row_max), axis=0)
    for start in range(0, N, BLOCK):
        inside = start + lanes < N
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=inside, other=float("-inf"))
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=inside)


# %% 01.6 right: a running maximum and sum for each lane, merged after the loop
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    lane_max = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    lane_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=start + lanes < N, other=float("-inf"))
        new_max = tl.maximum(lane_max, x)
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        lane_sum = lane_sum * tl.exp(lane_max - finite) + tl.exp(x - finite)
        lane_max = new_max
    row_max = tl.max(lane_max, axis=0)
    row_sum = tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0)
    for start in range(0, N, BLOCK):
        x = tl.load(x_ptr + row * row_stride + start + lanes, mask=start + lanes < N, other=0.0)
        tl.store(out_ptr + row * N + start + lanes, tl.exp(x - row_max) / row_sum, mask=start + lanes < N)


# %% 01.6 right: pointers that walk, and the log-sum-exp
@triton.jit
def softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    x_ptr += tl.program_id(0) * row_stride
    out_ptr += tl.program_id(0) * N
    lse = float("-inf")
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < N, other=float("-inf"))
        top = tl.maximum(lse, tl.max(x, axis=0))
        if top > float("-inf"):
            lse = top + tl.log(tl.exp(lse - top) + tl.sum(tl.exp(x - top), axis=0))
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.exp(tl.load(x_ptr + at, mask=at < N) - lse), mask=at < N)
