"""What is faster on a CPU than the references, and gives the same up to rounding: `Kernels.cpu`.

The references say what is right, and stay plain. Some operations are worth more work on a CPU,
where a small tensor operation takes 2 to 10 µs whatever it computes:

- `linear`: torch multiplies by Intel's MKL. oneDNN, which torch has on board too, is faster on some
  CPUs for some shapes. `choose_onednn` measures it.
- `decode_attention`: V's rows are added up where they lie, not gathered first. Which rows is
  planned once per step, not in each layer.
- `qk_norm_rope`: query and key heads go through norm and rotation together: 118 µs instead of 151
  for 16 tokens of the bundled model.
- Of an int8 cache K and V are read in float32 without their scales, which multiply the scores and
  the weights: a head's row has one.
- `store_kv`: the cache is written as rows of one matrix, not by an index in two dimensions: 162 µs
  instead of 264 for 256 tokens.
- `linear_w8a16`: oneDNN multiplies the int8 weights as they are stored; the reference converts them
  to float32 each time.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels.kv_cache import (
    Cache,
    cache_parts,
    quantize_reference,
)
from minivllm.kernels.norm import rms_norm_reference
from minivllm.kernels.quantized import linear_w8a16_reference
from minivllm.kernels.rotary import check_heads

#: A weight's shape: [output features, input features].
Shape = tuple[int, int]

# --- the matrix product ---------------------------------------------------------------------------

#: The only numbers of rows that oneDNN is asked for. For each pair of a number of rows and a
#: weight's shape it compiles a program of 0.6 MB and keeps it, up to 1,024 of them. A batch's
#: number of rows differs from step to step, so memory would grow by 700 MB. With this list it grows
#: by 27 MB per shape.
ONEDNN_ROWS = (
    *range(4, 64, 4),
    *range(64, 128, 8),
    *range(128, 256, 16),
    *range(256, 512, 32),
    *range(512, 1024, 128),
    *range(1024, 2049, 256),
)
#: With fewer rows, reading W takes the time, and padding to 4 rows costs more than it gains.
MIN_ONEDNN_ROWS = 3
#: What `choose_onednn` times: rows of x, tries (the least time counts), and how many columns and
#: numbers of a large weight take part.
MEASURED_ROWS, TRIES, MAX_WIDTH, MAX_NUMBERS = (8, 32), 4, 1 << 16, 1 << 20
#: oneDNN is chosen where it takes less than this share of MKL's time.
MARGIN = 0.9
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, onednn: frozenset[Shape]
) -> Tensor:
    """As `linear_reference`. onednn: the shapes of weight that oneDNN multiplies, in float32 and
    from 3 rows on.
    """
    if len(x) < MIN_ONEDNN_ROWS or weight.shape not in onednn or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product of the next number in `ONEDNN_ROWS`: x is padded with zeros, and the result
    cut.
    """
    rows, most = len(x), ONEDNN_ROWS[-1]
    if rows > most:
        out = x.new_empty(rows, len(weight))
        for part, piece in zip(out.split(most), x.split(most), strict=True):
            part.copy_(onednn_linear(piece, weight, bias))
        return out
    missing = ONEDNN_ROWS[bisect_left(ONEDNN_ROWS, rows)] - rows
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    # As torch.compile calls oneDNN.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")[:rows]


def choose_onednn(shapes: Iterable[Shape]) -> frozenset[Shape]:
    """Of these shapes of a float32 weight, those that oneDNN multiplies faster than MKL, measured
    here and now.

    Takes 27 ms for the bundled model's five shapes and 75 ms for Qwen3-0.6B's (EPYC, one thread).
    oneDNN must win by a tenth, so noise decides only where little depends on it. The two libraries
    differ in the last bits. So a measurement holds as long as the process, and its engines agree.

    The CPU's name does not tell. µs for 32 rows of the bundled model's shapes together, MKL and
    oneDNN: 936 and 534 on an EPYC with AVX-512, 980 and 986 on another one, 1421 and 1611 on one
    with AVX2 only, 1311 and 1682 on a Xeon.
    """
    if not HAS_ONEDNN:
        return frozenset()
    threads = torch.get_num_threads()
    return frozenset(shape for shape in sorted(set(shapes)) if is_onednn_faster(shape, threads))


@cache
def is_onednn_faster(shape: Shape, threads: int) -> bool:
    """Whether oneDNN wins with this many threads of torch; measured once per process."""
    # A large weight is cut: all its rows are multiplied alike, and so are the parts of a long row.
    width = min(shape[1], MAX_WIDTH)
    weight = torch.ones(min(shape[0], MAX_NUMBERS // width), width)
    by_mkl = by_onednn = 0.0
    with torch.inference_mode():
        for rows in MEASURED_ROWS:
            x = torch.ones(rows, width)
            onednn_linear(x, weight)  # compiles
            # They take turns, so that a busy moment of the machine hits both.
            products = (F.linear, onednn_linear) * TRIES
            times = [_seconds(product, x, weight) for product in products]
            by_mkl, by_onednn = by_mkl + min(times[::2]), by_onednn + min(times[1::2])
    return by_onednn < MARGIN * by_mkl


def _seconds(product: Callable[..., Tensor], x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    product(x, weight)
    return time.perf_counter() - start


# --- int8 weights ---------------------------------------------------------------------------------

#: Numbers of rows that oneDNN is asked for here.
PACKED_ROWS = (1, 2, *ONEDNN_ROWS)
#: The largest activation in digits: 63 · 128 + 63.
DIGITS_MAX = 8127
#: Makes a number from -8127 to 8127 positive, with digits from 1 to 127, and rounds it when it is
#: cut.
DIGITS_OFFSET = 64 * 128 + 64 + 0.5
HAS_PACKED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")


def pack_w8a16(weight: Tensor, scale: Tensor) -> Tensor:
    """An int8 weight with a scale per channel in oneDNN's layout, N·K bytes; another as it is."""
    if not HAS_PACKED or weight.dtype != torch.int8 or scale.shape != (len(weight), 1):
        return weight
    return torch.ops.onednn.qlinear_prepack(weight, None)


def linear_w8a16(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear_w8a16_reference`, for a weight of `pack_w8a16`. Activations keep 14 bits: the
    result is off by 0.01 %, an int8 weight by 0.5 %.

    oneDNN multiplies unsigned activations of 8 bits by int8 weights. Here an activation has two
    digits of 7 bits, and each digit is a row: ``x = (128 · high + low) · maximum / 8127``. The sums
    are sums of integers, so the result of a row does not depend on the batch. Digits have 7 bits
    because two products of 7 and 8 bits fit into 16: CPUs without VNNI add pairs there, and with 8
    bits they saturate (as `torch._int_mm` does on them; all other paths of torch round activations
    to bfloat16, or quantize a whole batch by one scale).

    Best of 40, one thread of an EPYC with VNNI, in µs, float32 by MKL and this: 3072 x 576 with 1
    row 131 and 113, with 4 rows 347 and 155, with 32 rows 1375 and 622; but 512 x 256, which is in
    the cache, with 1 row 11 and 72: 15 operations. Reading float32 from memory takes longer still.
    """
    if not weight.is_mkldnn:
        return linear_w8a16_reference(x, weight, scale, bias)
    (rows, width), most = x.shape, PACKED_ROWS[-1]
    if rows > most:
        parts = x.split(most)
        return torch.cat([linear_w8a16(part, weight, scale, bias) for part in parts])
    if not rows:
        return x.new_empty(0, len(scale))
    wide = x.float()
    top = wide.abs().amax(1, keepdim=True)
    # Of a row of zeros this makes NaN, of which any digits do: they are multiplied by 0 below.
    number = torch.addcmul(_DIGITS_OFFSET, wide, DIGITS_MAX / top).to(torch.int16)
    padded = PACKED_ROWS[bisect_left(PACKED_ROWS, rows)]
    digits = torch.empty(2, padded, width, dtype=torch.uint8)
    torch.bitwise_right_shift(number, 7, out=digits[0, :rows])
    torch.bitwise_and(number, 127, out=digits[1, :rows])
    features = len(scale)
    high, low = torch.ops.onednn.qlinear_pointwise(
        digits.view(-1, width),
        1.0,  # of the activations: scale and zero point
        64,
        weight,
        scale.flatten(),
        torch.zeros(features, dtype=torch.int64),
        None,
        1.0,  # of the result, which is float32
        0,
        torch.float32,
        "none",
        [],
        "",
    ).view(2, padded, features)
    out = low[:rows].add_(high[:rows], alpha=128).mul_(top / DIGITS_MAX)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


_DIGITS_OFFSET = torch.tensor(DIGITS_OFFSET)

# --- attention ------------------------------------------------------------------------------------


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `qk_norm_rope_reference`. All heads are turned alike, and normed alike but for the weight:
    half as many operations.
    """
    check_heads(query, q_weight, k_weight)
    q_heads, k_heads = query.shape[1], key.shape[1]
    heads = torch.cat((query, key), dim=1)
    if q_weight is not None and k_weight is not None:
        weight = torch.cat((q_weight.expand(q_heads, -1), k_weight.expand(k_heads, -1)))
        heads = rms_norm_reference(heads, weight, eps)
    # [T, 1, D/2]: one angle for all heads
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    a, b = heads.float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(heads.dtype)
    return turned[:, :q_heads], turned[:, q_heads:]


def store_kv(
    key: Tensor, value: Tensor, k_cache: Cache, v_cache: Cache, slot_mapping: Tensor
) -> None:
    """As `store_kv_reference`, for contiguous caches."""
    _, num_kv_heads, block_size, dim = k_cache.shape
    wanted = slot_mapping >= 0
    if not wanted.all():
        slot_mapping, key, value = slot_mapping[wanted], key[wanted], value[wanted]
    first = slot_mapping // block_size * (num_kv_heads * block_size) + slot_mapping % block_size
    # [T · KH]
    rows = (first.unsqueeze(1) + torch.arange(num_kv_heads) * block_size).flatten()
    for x, target in ((key, k_cache), (value, v_cache)):
        if isinstance(target, Tensor):
            target.view(-1, dim).index_copy_(0, rows, x.reshape(-1, dim))
            continue
        values, scales = quantize_reference(x, target)
        values, held = values.view(torch.uint8), target.values.view(torch.uint8)
        held.view(-1, dim).index_copy_(0, rows, values.view(-1, dim))
        if scales is not None:
            target.scales.view(-1).index_copy_(0, rows, scales.view(-1))


@dataclass(frozen=True)
class DecodePlan:
    """Where `decode_attention` reads and writes. A block that a context uses is a split, so nothing
    is padded to the longest context. B sequences, P pairs of a split and a sequence whose context
    reaches it, H query heads, bs tokens per block.

    block_table, seq_lens: copies of those that the plan was made from.
    """

    block_table: Tensor
    seq_lens: Tensor
    num_splits: int
    sequence: Tensor  # [P] int64
    block: Tensor  # [P] int32 or int64, as in block_table
    used: Tensor  # [P] int64: the row of a pair in [num_splits · B]
    outside: Tensor  # [P, 1, bs] bool: positions beyond the context
    #: [P, bs] int64: each position of a block, those beyond the context as the context's last one.
    positions: Tensor

    @staticmethod
    def of(block_table: Tensor, seq_lens: Tensor, block_size: int) -> "DecodePlan":
        """The plan for a block_table [B, max_blocks] and seq_lens [B]."""
        blocks_used = (seq_lens + block_size - 1) // block_size
        splits = max(1, int(blocks_used.max()))
        pairs = (torch.arange(splits)[:, None] < blocks_used).nonzero(as_tuple=True)
        split, sequence = pairs
        tokens = (seq_lens[sequence] - split * block_size).unsqueeze(1)  # [P, 1]: left from here on
        offsets = torch.arange(block_size)
        return DecodePlan(
            block_table.clone(),
            seq_lens.clone(),
            splits,
            sequence,
            block_table[sequence, split],
            split * len(seq_lens) + sequence,
            (offsets >= tokens).unsqueeze(1),
            torch.minimum(offsets, tokens - 1),
        )

    def fits(self, block_table: Tensor, seq_lens: Tensor, block_size: int) -> bool:
        """Whether `of` would give this plan."""
        return (
            self.positions.shape[1] == block_size
            and torch.equal(self.seq_lens, seq_lens)
            and torch.equal(self.block_table, block_table)
        )


class PlannedAttention:
    """Attention of decodes. All layers of a step read the same blocks, so the plan of
    the last call is kept: for one sequence of 130 tokens of the bundled model it is 58 of 190 µs,
    for 32 it is 79 of 465.
    """

    def __init__(self) -> None:
        self._plan: DecodePlan | None = None

    def decode_attention(
        self,
        query: Tensor,
        k_cache: Cache,
        v_cache: Cache,
        block_table: Tensor,
        seq_lens: Tensor,
        scale: float,
        *,
        max_seq_len: int,
        merge_attention: Callable,
        num_splits: int | None = None,
    ) -> Tensor:
        """As `decode_attention_reference`."""
        block_size = k_cache.shape[2]
        plan = self._plan  # read once: another thread may replace it
        if plan is None or not plan.fits(block_table, seq_lens, block_size):
            plan = self._plan = DecodePlan.of(block_table, seq_lens, block_size)
        return attend(query, k_cache, v_cache, scale, plan, merge_attention)


def attend(
    query: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    scale: float,
    plan: DecodePlan,
    merge_attention: Callable,
) -> Tensor:
    """query: [B, H, D] -> [B, H, D], attention to what the plan names."""
    batch, heads, dim = query.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group, blocks = heads // num_kv_heads, plan.block
    (keys, k_scales, kind), (values, v_scales, _) = map(cache_parts, (k_cache, v_cache))

    # [P · KH, H / KH, D] and [P · KH, bs, D]
    scaled = (query.float() * scale).index_select(0, plan.sequence).view(-1, group, dim)
    key = _rows_of(keys, blocks).view(-1, block_size, dim)
    scores = torch.bmm(scaled, key.transpose(1, 2)).view(-1, heads, block_size)
    if kind != "auto":
        scores = scores * _scales_of(k_scales, blocks, group)
    scores.masked_fill_(plan.outside, float("-inf"))
    weights = scores.softmax(dim=-1)
    # the largest weight is 1 / sum(exp(score - maximum))
    lse = scores.amax(dim=-1) - weights.amax(dim=-1).log_()

    if kind != "auto":  # beyond a context a scale may be NaN, and 0 · NaN is NaN
        weights = torch.where(weights > 0.0, weights * _scales_of(v_scales, blocks, group), weights)

    # V's rows are added up where they lie, not gathered like K. Weights of 0 go with the context's
    # last token.
    if values.dtype != torch.float32:
        values, blocks = _rows_of(values, blocks), torch.arange(len(blocks))
    # [P, H]: the row of a block's token 0
    kv_heads = torch.arange(heads) // group
    first = ((blocks * num_kv_heads).unsqueeze(1) + kv_heads) * block_size
    # [P, H, bs]
    rows = first.unsqueeze(2) + plan.positions.unsqueeze(1)
    bags = (rows.view(-1, block_size), values.view(-1, dim))
    out = F.embedding_bag(*bags, mode="sum", per_sample_weights=weights.view(-1, block_size))

    splits = plan.num_splits
    partial_out = torch.zeros(splits * batch, heads * dim)
    partial_out.index_copy_(0, plan.used, out.view(-1, heads * dim))
    partial_lse = torch.full((splits * batch, heads), float("-inf"))
    partial_lse.index_copy_(0, plan.used, lse)
    partial_out = partial_out.view(splits, batch, heads, dim)
    partial_lse = partial_lse.view(splits, batch, heads)
    merged = merge_attention(partial_out, partial_lse) if splits > 1 else partial_out[0]
    return merged.to(query.dtype)


def _rows_of(cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks [P] of a cache's numbers in float32: [P, KH · block_size · D]."""
    return cache.flatten(1).index_select(0, blocks).float()


def _scales_of(scales: Tensor, blocks: Tensor, group: int) -> Tensor:
    """The scales of blocks [P] for each query head, [P, H, block_size], or [H, 1] with fp8."""
    if scales.dim() == 1:
        return scales.repeat_interleave(group).unsqueeze(1)
    return scales.index_select(0, blocks).repeat_interleave(group, dim=1)
