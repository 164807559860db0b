"""The paged KV cache (Kwon et al. 2023, arXiv:2309.06180): where a token's key and value lie, and
how they get there.

A cache is ``[num_blocks, KH, block_size, D]``. Token p of a sequence lies in block
``block_table[p // block_size]`` at offset ``p % block_size``. Its *slot* is
``block · block_size + offset``. Heads come before offsets: what one attention program reads of a
block, one head's ``[block_size, D]``, is one contiguous piece.

Cost of storing with e bytes per number: 4·T·KH·D·e bytes (K and V, read and written) and no
arithmetic, so bandwidth is the floor. A token of Qwen3-0.6B's shape in bf16 is 4 kB per layer.

A cache may hold 8 bits per number (`QuantizedCache`), which halves what decoding reads. A number is
stored as ``x / scale``, rounded to the nearest of the 8-bit numbers (ties to even):

- "fp8" is e4m3: 4 bits of exponent and 3 of fraction, so its error is at most 1/16 of the number,
  whatever the scale, from 2^-6 to 448 times the scale. One scale per head, given beforehand, is
  enough. What is larger becomes 448 times the scale.
- "int8" has 255 equal steps, so its error is at most 1/254 of the largest number that shares the
  scale. Each token's head has a scale of its own, its largest number / 127, written beside it: 4
  bytes for D numbers, 3 % with a head_dim of 128.

NaN and infinity are never stored as a number that is finite: what attends to them is NaN. Taught
in notebooks/03_paged_kv_cache.ipynb.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels._triton import check_rows, tl, triton

#: What a cache may hold in place of the model's own numbers, by the name of `kv_cache_dtype`.
QUANTIZED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
#: The largest number of e4m3, and of an int8 that is used (-128 is not).
FP8_MAX, INT8_MAX = 448.0, 127.0
#: A scale below this divides nothing: such a head is stored as zeros.
TINY = 1e-30

#: Where a tensor's numbers may begin: at a multiple of a cache line, in bytes.
_ALIGNED = 64


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros, of which memory is taken only where something is written.

    `torch.zeros` writes each zero: for a cache of 256 MiB that takes longer than the bundled
    model's load. Here the operating system gives zeros with each page, at the page's first use.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    whole = torch.from_numpy(np.zeros(num_bytes + _ALIGNED, np.uint8))
    start = -whole.data_ptr() % _ALIGNED
    return whole[start : start + num_bytes].view(dtype).view(*shape)


@dataclass(frozen=True)
class QuantizedCache:
    """K or V of one layer in 8 bits per number. It stands where a cache of the model's dtype may.

    values: ``[num_blocks, KH, block_size, D]``, float8_e4m3fn or int8. scales, float32: ``[KH]``
    with fp8, set before the first token is stored; ``[num_blocks, KH, block_size]`` with int8,
    written with the values.
    """

    values: Tensor
    scales: Tensor

    @staticmethod
    def zeros(
        shape: tuple[int, int, int, int], kind: str, device: torch.device | str = "cpu"
    ) -> QuantizedCache:
        """A cache of zeros. kind: "fp8" or "int8". The scales of fp8 are 1."""
        values = torch.zeros(shape, dtype=torch.uint8, device=device).view(QUANTIZED[kind])
        if kind == "int8":
            return QuantizedCache(values, torch.zeros(shape[:3], device=device))
        return QuantizedCache(values, torch.ones(shape[1], device=device))

    @property
    def kind(self) -> str:
        """ "fp8" or "int8"."""
        return "int8" if self.values.dtype == torch.int8 else "fp8"

    @property
    def shape(self) -> torch.Size:
        """That of the values."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def is_contiguous(self) -> bool:
        return self.values.is_contiguous() and self.scales.is_contiguous()


#: A cache as the kernels take it.
Cache = Tensor | QuantizedCache


def cache_parts(cache: Cache) -> tuple[Tensor, Tensor, str]:
    """Values, scales and kind of a cache. One of the model's dtype has none: "auto", and what
    stands for the scales is not read.
    """
    if isinstance(cache, Tensor):
        return cache, cache, "auto"
    return cache.values, cache.scales, cache.kind


def quantize_reference(x: Tensor, cache: QuantizedCache) -> tuple[Tensor, Tensor | None]:
    """x ``[T, KH, D]`` -> the same in 8 bits, and the scales ``[T, KH]`` of int8 (None with fp8).

    Computed in float32. fp8: what is beyond 448 times the scale becomes that, and NaN and infinity
    become NaN. int8: a head with one of these gets the scale NaN.
    """
    x = x.float()
    if cache.kind == "fp8":
        x = x / cache.scales.unsqueeze(-1)
        return (x.clamp(-FP8_MAX, FP8_MAX) + x * 0.0).to(torch.float8_e4m3fn), None
    scales = (x.abs().amax(dim=-1) + (x * 0.0).sum(dim=-1)) * (1.0 / INT8_MAX)
    divisors = torch.where(scales > TINY, scales, 1.0).unsqueeze(-1)
    steps = (x / divisors).round().nan_to_num(0.0)
    return steps.clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def read_blocks(cache: Cache, blocks: Tensor) -> Tensor:
    """Blocks of a cache in float32: ``[...]`` int -> ``[..., KH, block_size, D]``."""
    if isinstance(cache, Tensor):
        return cache[blocks].float()
    scales = cache.scales[blocks] if cache.kind == "int8" else cache.scales.unsqueeze(-1)
    return cache.values[blocks].float() * scales.unsqueeze(-1)


def store_kv_reference(
    key: Tensor, value: Tensor, k_cache: Cache, v_cache: Cache, slot_mapping: Tensor
) -> None:
    """Write key, value ``[T, KH, D]`` to the slots slot_mapping ``[T]`` int64 of the caches; -1
    writes nowhere.
    """
    block_size = k_cache.shape[2]
    wanted = slot_mapping >= 0
    slots = slot_mapping[wanted]
    blocks, offsets = slots // block_size, slots % block_size
    for x, cache in ((key[wanted], k_cache), (value[wanted], v_cache)):
        if isinstance(cache, Tensor):
            cache[blocks, :, offsets] = x
            continue
        values, scales = quantize_reference(x, cache)
        cache.values.view(torch.uint8)[blocks, :, offsets] = values.view(torch.uint8)
        if scales is not None:
            cache.scales[blocks, :, offsets] = scales


@triton.jit
def _store_kv_kernel(
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    key_stride,
    value_stride,
    KH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token moves all KH·D numbers of its key and its value."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    index = tl.arange(0, BLOCK)
    # -1: a padded row, or a token whose K and V are there already
    inside = index < tl.where(slot >= 0, KH * D, 0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    target = ((block * KH + index // D) * BLOCK_SIZE + offset) * D + index % D
    tl.store(
        k_cache_ptr + target,
        tl.load(key_ptr + token * key_stride + index, mask=inside),
        mask=inside,
    )
    tl.store(
        v_cache_ptr + target,
        tl.load(value_ptr + token * value_stride + index, mask=inside),
        mask=inside,
    )


@triton.jit
def head_scales(scales_ptr, heads, places, largest, inside, KIND: tl.constexpr):
    """The scales of some heads of a token, [n] float32, to divide by.

    "fp8": they stand in scales_ptr. "int8": they are made of each head's largest number, and stored
    at places.
    """
    if KIND == "int8":
        scale = largest * (1.0 / 127.0)
        tl.store(scales_ptr + places, scale, mask=inside)
        scale = tl.where(scale > 1e-30, scale, 1.0)
    else:
        scale = tl.load(scales_ptr + heads, mask=inside, other=1.0)
    return scale


@triton.jit
def largest_of(x):
    """The largest magnitude of each row of [n, D]; not finite where one of its numbers is not."""
    return tl.max(tl.abs(x), axis=1) + tl.sum(x * 0.0, axis=1)


@triton.jit
def to_8_bits(x, scale, KIND: tl.constexpr):
    """x [n, D] float32 / scale [n], rounded as `quantize_reference` rounds."""
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    if KIND == "int8":
        # Beside 1.5 · 2^23 a float32 has no bits left for a fraction: the sum is rounded to even.
        steps = (x + 12582912.0) - 12582912.0
        stored = tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8)
    else:
        # NaN and infinity times 0 are NaN, which min and max would lose.
        stored = (tl.minimum(tl.maximum(x, -448.0), 448.0) + x * 0.0).to(tl.float8e4nv)
    return stored


@triton.jit
def _store_quantized_kernel(
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    slot_mapping_ptr,
    key_stride,
    value_stride,
    KH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
):
    """Program (token, group of heads): one row of a tile per head."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_D)
    # -1: a padded row, or a token whose K and V are there already
    written = heads < tl.where(slot >= 0, KH, 0)
    inside = written[:, None] & (columns < D)[None, :]
    places = (slot // BLOCK_SIZE * KH + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
    source = heads[:, None] * D + columns[None, :]
    target = places[:, None] * D + columns[None, :]
    x = tl.load(key_ptr + token * key_stride + source, mask=inside, other=0.0).to(tl.float32)
    scale = head_scales(k_scales_ptr, heads, places, largest_of(x), written, KIND)
    tl.store(k_cache_ptr + target, to_8_bits(x, scale, KIND), mask=inside)
    x = tl.load(value_ptr + token * value_stride + source, mask=inside, other=0.0).to(tl.float32)
    scale = head_scales(v_scales_ptr, heads, places, largest_of(x), written, KIND)
    tl.store(v_cache_ptr + target, to_8_bits(x, scale, KIND), mask=inside)


def store_kv(
    key: Tensor, value: Tensor, k_cache: Cache, v_cache: Cache, slot_mapping: Tensor
) -> None:
    """Write key, value ``[T, KH, D]`` (tokens may be strided) to slot_mapping ``[T]`` int64; -1 =
    nowhere.

    Contiguous caches ``[num_blocks, KH, block_size, D]``, any block_size, changed in place. Slots
    differ and lie within the cache (not checked: a check would wait for the GPU). ValueError for
    other strides.
    """
    check_rows("store_kv", key, value)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("store_kv: needs contiguous caches")
    tokens, num_kv_heads, dim = key.shape
    (k_values, k_scales, kind), (v_values, v_scales, _) = map(cache_parts, (k_cache, v_cache))
    if not tokens:
        return
    strides = key.stride(0), value.stride(0)
    if kind == "auto":
        _store_kv_kernel[(tokens,)](
            key,
            value,
            k_values,
            v_values,
            slot_mapping,
            *strides,
            KH=num_kv_heads,
            D=dim,
            BLOCK_SIZE=k_cache.shape[2],
            BLOCK=triton.next_power_of_2(num_kv_heads * dim),
        )
        return
    block_heads = min(8, triton.next_power_of_2(num_kv_heads))
    _store_quantized_kernel[(tokens, triton.cdiv(num_kv_heads, block_heads))](
        key,
        value,
        k_values,
        v_values,
        k_scales,
        v_scales,
        slot_mapping,
        *strides,
        KH=num_kv_heads,
        D=dim,
        BLOCK_SIZE=k_cache.shape[2],
        BLOCK_H=block_heads,
        BLOCK_D=triton.next_power_of_2(dim),
        KIND=kind,
        num_warps=2,
    )


# --- what both attention kernels use ------------------------------------------------------------


@triton.jit
def cache_rows(
    table_ptr,
    first,
    context,
    kv_head,
    KH: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where in a cache the rows of tokens first ... first + BLOCK_N - 1 begin: a base, and offsets
    [BLOCK_N] from it.

    first is a multiple of BLOCK_N. The table's entries beyond the context are never read: they may
    be anything.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        # The tile lies within one block: one look-up, and every tile has the same offsets.
        block = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
        base = ((block * KH + kv_head) * BLOCK_SIZE + first % BLOCK_SIZE) * D
        offsets = tl.arange(0, BLOCK_N) * D
    else:
        tokens = first + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < context, other=0).to(
            tl.int64
        )
        base = kv_head.to(tl.int64) * BLOCK_SIZE * D
        offsets = (block * KH * BLOCK_SIZE + tokens % BLOCK_SIZE) * D
    return base, offsets


def check_attention(name: str, query: Tensor, k_cache: Cache, v_cache: Cache, table: Tensor):
    """What both attention kernels ask of their inputs; ValueError otherwise."""
    check_rows(name, query, table)
    heads, num_kv_heads, block_size = query.shape[1], k_cache.shape[1], k_cache.shape[2]
    if heads % num_kv_heads:
        raise ValueError(f"{name}: {heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"{name}: block_size must be a power of two from 16 up, got {block_size}")
    (keys, _, kind), (values, _, v_kind) = cache_parts(k_cache), cache_parts(v_cache)
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and kind == v_kind) or (
        kind == "auto" and not query.dtype == keys.dtype == values.dtype
    ):
        raise ValueError(
            f"{name}: needs contiguous caches of the query's dtype, {query.dtype}, or two quantized"
            " ones of the same kind"
        )
