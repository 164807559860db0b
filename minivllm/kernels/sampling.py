"""Choosing a token: one uniform number per row, inverted through the cumulative distribution in the
order of the tokens.

With ``w[i] = exp((logit[i] - max) / temperature)`` the token is the first i with
``w[0] + ... + w[i] > u·sum(w)``. The kernels find it on two levels: one sums w tile by tile, the
other finds the tile into which the target falls, and reads only that tile again. Floor of [256,
151936] bf16 logits: 78 MB read once, 17 µs on an H200. Reached there: 34 µs. Tried: an argmax per
tile and a division per entry, 46 µs; Gumbel-max, which needs a random number per entry, 71 µs;
eager torch, 627 µs.

u comes from Philox4x32-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"): a pure function of (seed, position), without a state. So a seeded request
draws the same numbers in any batch. Taught in notebooks/07_engine.ipynb.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels._triton import check_rows, tl, triton
from minivllm.kernels.early import launched_early, wait_for_earlier

TILE = 4096  # vocabulary entries summed together
#: Stands for a token where there is none to choose, because a logit is NaN or the greatest one is
#: infinite. Beyond every vocabulary; its low 32 bits are the valid token 0, with which a step that
#: has begun already can go on.
NOT_A_TOKEN = 1 << 32


def philox_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Uniform float32 ``[B]`` in (0, 1) from seeds, positions ``[B]`` int64: the very bits of the
    Triton kernel.

    Ten rounds on a 128-bit counter, here the position, under a 64-bit key, the seed. The result is
    the first 23 bits of the first word, plus a half, times 2^-23: exact in float32, and neither 0
    nor 1 can come out.
    """
    word, device = 0xFFFFFFFF, seeds.device
    multiplier = torch.tensor([[0xD2511F53], [0xCD9E8D57]], device=device)
    weyl = torch.tensor([[0x9E3779B9], [0xBB67AE85]], device=device)
    keys = torch.stack((seeds & word, seeds >> 32 & word)) + weyl * torch.arange(
        10, device=device
    ).view(10, 1, 1)
    even = torch.stack((positions & word, torch.zeros_like(positions)))  # counter words 0 and 2
    # counter words 1 and 3
    odd = torch.stack((positions >> 32 & word, torch.zeros_like(positions)))
    for key in keys & word:
        product = multiplier * even  # 64 bits; int64 wraps, and the mask undoes the sign
        even = (product >> 32 & word).flip(0) ^ odd ^ key
        odd = (product & word).flip(0)
    return ((even[0] >> 9).float() + 0.5) * 2.0**-23


def filter_logits(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor:
    """logits ``[B, V]`` with -inf for what top-k, then top-p, then min-p exclude; only the rows
    that ask are touched.

    top_k <= 0, top_p >= 1 and min_p <= 0 ask for nothing. top-k keeps exactly k tokens, of equal
    ones the lower id first; top-p the fewest whose probability reaches top_p, of what top-k left;
    min-p those at least min_p times as probable as the best. The best token always stays. Plain
    torch; finding the rows that ask waits for the GPU.
    """
    if top_k is None and top_p is None and min_p is None:
        return logits
    nobody = torch.zeros_like(temperature)
    top_k, min_p = (nobody if asked is None else asked for asked in (top_k, min_p))
    top_p = nobody + 1 if top_p is None else top_p
    rows = (
        (((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1) | (min_p > 0)).nonzero().squeeze(1)
    )
    if rows.numel() == 0:
        return logits
    ordered, order = logits[rows].float().sort(dim=-1, descending=True, stable=True)
    scaled = (ordered - ordered[:, :1]) / _divisor(temperature[rows]).unsqueeze(1)
    k, p, least = (asked[rows].unsqueeze(1) for asked in (top_k, top_p, min_p))
    keep = (torch.arange(logits.shape[1], device=logits.device) < k) | (k <= 0)
    probability = scaled.masked_fill(~keep, float("-inf")).softmax(dim=-1)
    keep &= (probability.cumsum(dim=-1) - probability < p) | (p >= 1)
    keep &= scaled >= least.log()
    keep[:, 0] = True
    kept = torch.empty_like(ordered).scatter_(1, order, ordered.masked_fill(~keep, float("-inf")))
    filtered = logits.clone()
    filtered[rows] = kept.to(logits.dtype)
    return filtered


def _divisor(temperature: Tensor) -> Tensor:
    return temperature.masked_fill(temperature == 0, 1.0)  # greedy rows: the result is not used


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(the first of the likeliest tokens or `NOT_A_TOKEN`, its logit), each ``[B]``."""
    token_ids = logits.argmax(dim=-1)  # where there is a NaN, its place
    best = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return torch.where(best.isfinite(), token_ids, NOT_A_TOKEN), best


def _random_keys(seeds: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    if seeds is None or positions is None:
        raise ValueError(
            "sample: needs seeds and positions unless temperature is None, that is, all rows are"
            " greedy"
        )
    return seeds, positions


def _pick_reference(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    running = weights.cumsum(dim=-1)
    choice = torch.searchsorted(running, target, right=True).clamp_max(weights.shape[1] - 1)
    if (weights.gather(1, choice) == 0).any():
        # Rounding left the target above the last sum: the last weight above 0.
        index = torch.arange(weights.shape[1], device=weights.device)
        choice = torch.where((weights > 0) & (index <= choice), index, 0).amax(dim=-1, keepdim=True)
    return choice, (target - (running - weights).gather(1, choice)).clamp_min(0.0)


def sample_reference(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """As `sample`: the kernels' two levels, and sums in their order."""
    greedy, best = _greedy(logits)
    if temperature is None:
        return greedy
    seeds, positions = _random_keys(seeds, positions)
    logits = filter_logits(logits, temperature, top_k, top_p, min_p)
    width = min(TILE, logits.shape[1])
    weights = (
        (logits.float() - best.float().unsqueeze(1)) / _divisor(temperature).unsqueeze(1)
    ).exp()
    tiles = F.pad(weights, (0, -logits.shape[1] % width)).unflatten(1, (-1, width))
    tile_sums = tiles.sum(dim=-1)
    target = philox_uniform(seeds, positions).unsqueeze(1) * tile_sums.sum(dim=-1, keepdim=True)
    tile, target = _pick_reference(tile_sums, target)
    choice, _ = _pick_reference(
        tiles.gather(1, tile.unsqueeze(2).expand(-1, -1, width)).squeeze(1), target
    )
    choose_greedily = (temperature == 0) | (greedy == NOT_A_TOKEN)
    return torch.where(choose_greedily, greedy, (tile * width + choice).squeeze(1))


@triton.jit
def uniform(seed, position):
    """`philox_uniform` for one (seed, position)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32 & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def _pick(weights, target, BLOCK: tl.constexpr):
    """First index whose running sum exceeds target, and what is left of target there; only ever a
    weight above 0.
    """
    index = tl.arange(0, BLOCK)
    running = tl.cumsum(weights, axis=0)
    first = tl.min(tl.where((running > target) & (weights > 0.0), index, BLOCK), axis=0)
    last = tl.max(tl.where(weights > 0.0, index, 0), axis=0)
    # rounding can leave the target above the last sum
    choice = tl.where(first < BLOCK, first, last)
    return choice, target - tl.sum(tl.where(index == choice, running - weights, 0.0), axis=0)


@triton.jit(do_not_specialize=["num_tiles"])
def _tile_sums_kernel(
    tile_max_ptr,
    tile_sum_ptr,
    logits_ptr,
    temperature_ptr,
    row_stride,
    V,
    num_tiles,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (row, tile): the maximum, and the sum of
    ``exp((logit - tile's maximum) / temperature)``.
    """
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tokens = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(
        logits_ptr + row * row_stride + tokens, mask=tokens < V, other=float("-inf")
    ).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    temperature = tl.where(temperature == 0.0, 1.0, temperature)
    tile_max = tl.max(logits, axis=0)
    finite_max = tl.where(tile_max == float("-inf"), 0.0, tile_max)
    # one division per row, not per entry
    tile_sum = tl.sum(tl.exp((logits - finite_max) * (1.0 / temperature)), axis=0)
    tl.store(tile_max_ptr + row * num_tiles + tile, tile_max)
    tl.store(tile_sum_ptr + row * num_tiles + tile, tile_sum)


@triton.jit(do_not_specialize=["num_tiles"])
def _choose_kernel(
    out_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    row_stride,
    V,
    num_tiles,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    NOT_A_TOKEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per row: the tile first, then the token in it."""
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK_TILES)
    there = tiles < num_tiles
    tile_max = tl.load(tile_max_ptr + row * num_tiles + tiles, mask=there, other=float("-inf"))
    tile_sum = tl.load(tile_sum_ptr + row * num_tiles + tiles, mask=there, other=0.0)
    temperature = tl.load(temperature_ptr + row)
    row_max = tl.max(tile_max, axis=0)
    # Greedy: all the weight lies on what equals the maximum, and a target of 0 finds the first of
    # it.
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    weights = tl.where(there, tile_sum * tl.exp((tile_max - row_max) / temperature), 0.0)
    mass = tl.sum(weights, axis=0)  # NaN if any logit is, or if the greatest is infinite
    is_best = tl.where(there, (tile_max == row_max).to(tl.float32), 0.0)
    weights = tl.where(greedy, is_best, weights)
    number = uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    target = tl.where(greedy, 0.0, number * tl.sum(weights, axis=0))
    tile, target = _pick(weights, target, BLOCK_TILES)
    tokens = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(
        logits_ptr + row * row_stride + tokens, mask=tokens < V, other=float("-inf")
    ).to(tl.float32)
    weights = tl.exp((logits - row_max) / temperature)
    weights = tl.where(greedy, (logits == row_max).to(tl.float32), weights)
    choice, _ = _pick(weights, target, TILE)
    token = (tile * TILE + choice).to(tl.int64)
    tl.store(out_ptr + row, tl.where(mass == mass, token, NOT_A_TOKEN))


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """Token ids ``[B]`` int64 from logits ``[B, V]`` (rows may be strided) of any float dtype;
    computed in float32.

    temperature ``[B]`` float32, 0 = greedy; None = all rows greedy (argmax, the first among
    equals). top_k ``[B]`` int32, top_p, min_p ``[B]`` float32, see `filter_logits`; None = nobody
    asks. seeds, positions ``[B]`` int64, see `philox_uniform`. Entries of -inf are never chosen; a
    row with a NaN, or whose greatest entry is infinite, gives `NOT_A_TOKEN`. ValueError for missing
    seeds or positions, or other strides.
    """
    if temperature is None:
        return _greedy(logits)[0]
    check_rows("sample", logits)
    seeds, positions = _random_keys(seeds, positions)
    logits = filter_logits(logits, temperature, top_k, top_p, min_p)
    batch, vocabulary = logits.shape
    num_tiles = triton.cdiv(vocabulary, TILE)
    tile_max, tile_sum = (
        torch.empty(batch, num_tiles, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    early = launched_early(batch, logits.device)
    if batch:
        _tile_sums_kernel[(batch, num_tiles)](
            tile_max,
            tile_sum,
            logits,
            temperature,
            logits.stride(0),
            vocabulary,
            num_tiles,
            TILE=TILE,
            num_warps=8,
            **early,
        )
        _choose_kernel[(batch,)](
            out,
            tile_max,
            tile_sum,
            logits,
            temperature,
            seeds,
            positions,
            logits.stride(0),
            vocabulary,
            num_tiles,
            TILE=TILE,
            BLOCK_TILES=triton.next_power_of_2(num_tiles),
            NOT_A_TOKEN=NOT_A_TOKEN,
            num_warps=8,
            **early,
        )
    return out
