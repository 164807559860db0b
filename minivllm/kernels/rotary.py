"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with Qwen3's per-head RMSNorm
before it.

A head is D/2 pairs ``(x[i], x[i + D/2])`` ("rotate half", the neox order). Pair i is turned by the
angle ``position · base^(-2i/D)``: ``(a, b) -> (a·cos - b·sin, b·cos + a·sin)``. So the dot product
of two turned vectors depends only on the difference of their positions. Taught in
notebooks/06_qwen3.ipynb.

Cost with e bytes per number: 2·T·(H + KH)·D·e bytes, and 4·D bytes of table per token, against
about 10 FLOPs per number, so bandwidth is the floor. The fusion of norm and rotation saves the
norm's write and the rotation's read. `qk_norm_rope_store` also saves a key's write and read on its
way into the cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minivllm.kernels._triton import check_rows, tl, triton
from minivllm.kernels.early import launched_early, wait_for_earlier
from minivllm.kernels.kv_cache import Cache, cache_parts, head_scales, largest_of, to_8_bits
from minivllm.kernels.norm import rms_norm_reference


class NormRope(NamedTuple):
    """What norm and rotation take besides query and key, in the order of `qk_norm_rope`."""

    q_weight: Tensor | None  # [D]
    k_weight: Tensor | None  # [D]; both weights or neither
    cos_sin: Tensor  # [max_pos, D] float32: D/2 cosines, then D/2 sines
    positions: Tensor  # [T] int64, below max_pos
    eps: float


def check_heads(query: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    if (q_weight is None) != (k_weight is None):
        raise ValueError("qk_norm_rope: give both norm weights or neither")
    if query.shape[-1] % 2:
        raise ValueError(f"qk_norm_rope: pairs need an even head_dim, got {query.shape[-1]}")


def qk_norm_rope_reference(
    query: Tensor,
    key: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """query ``[T, H, D]``, key ``[T, KH, D]`` -> the same shapes, normed by head and turned."""
    check_heads(query, q_weight, k_weight)
    if q_weight is not None and k_weight is not None:
        query = rms_norm_reference(query, q_weight, eps)
        key = rms_norm_reference(key, k_weight, eps)
    # [T, 1, D/2]: one angle for all heads
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(heads: Tensor) -> Tensor:
        a, b = heads.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(heads.dtype)

    return turn(query), turn(key)


@triton.jit
def _turn_heads(
    out_ptr,
    out_head_stride,
    scales_ptr,
    first_place,
    x_ptr,
    weight_ptr,
    cos,
    sin,
    first_head,
    num_heads,
    eps,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
):
    """Norm and rotation of some heads of one token, each held as two halves
    ``[BLOCK_HEADS, BLOCK_HALF]``.

    out_ptr, x_ptr, first_place (of a scale): the token's head 0. Without TURN the heads are copied.
    KIND: of the cache that they go to, "auto" for one of their own dtype.
    """
    heads = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (heads < num_heads) & (columns < HALF)
    source = x_ptr + heads * (2 * HALF) + columns
    target = out_ptr + heads * out_head_stride + columns
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + HALF, mask=inside, other=0.0)
    dtype = a.dtype
    if TURN:
        a, b = a.to(tl.float32), b.to(tl.float32)
        if NORM:
            scale = 1.0 / tl.sqrt(
                (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps
            )
            weight_a = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0)
            weight_b = tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0)
            # Rounded as the norm alone would round, so that fused and unfused engines agree.
            a = ((a * scale[:, None]).to(dtype) * weight_a).to(tl.float32)
            b = ((b * scale[:, None]).to(dtype) * weight_b).to(tl.float32)
        a, b = a * cos - b * sin, b * cos + a * sin
    if KIND == "auto":
        tl.store(target, a, mask=inside)
        tl.store(target + HALF, b, mask=inside)
    else:
        # Rounded first as a key in memory would be.
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
        heads = first_head + tl.arange(0, BLOCK_HEADS)
        largest = tl.maximum(largest_of(a), largest_of(b)) + 0.0 * (largest_of(a) + largest_of(b))
        scale = head_scales(
            scales_ptr, heads, first_place + heads * BLOCK_SIZE, largest, heads < num_heads, KIND
        )
        tl.store(target, to_8_bits(a, scale, KIND), mask=inside)
        tl.store(target + HALF, to_8_bits(b, scale, KIND), mask=inside)


@triton.jit(do_not_specialize=["slot_mapping_ptr"])
def _qk_norm_rope_kernel(
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    k_scales_ptr,
    v_scales_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    slot_mapping_ptr,
    q_heads,
    k_heads,
    q_stride,
    k_stride,
    v_stride,
    eps,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (token, group of heads): first query heads, then key heads, then, where BLOCK_SIZE >
    0, value heads.

    BLOCK_SIZE 0: keys are written side by side, like queries; else keys and values go to their slot
    in the caches.
    """
    wait_for_earlier(EARLY)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    row = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + columns
    cos = tl.load(row, mask=columns < HALF, other=0.0)
    sin = tl.load(row + HALF, mask=columns < HALF, other=0.0)
    q_groups, k_groups = tl.cdiv(q_heads, BLOCK_HEADS), tl.cdiv(k_heads, BLOCK_HEADS)
    if BLOCK_SIZE > 0:
        slot = tl.load(slot_mapping_ptr + token)
        place = slot // BLOCK_SIZE * (k_heads * BLOCK_SIZE) + slot % BLOCK_SIZE
        target = place * (2 * HALF)
        head_stride = BLOCK_SIZE * 2 * HALF
        written = tl.where(slot >= 0, k_heads, 0)  # -1 writes nowhere
    else:
        place = token * k_heads
        target = place * (2 * HALF)
        head_stride = 2 * HALF
        written = k_heads
    if group < q_groups:
        _turn_heads(
            q_out_ptr + token * q_heads * (2 * HALF),
            2 * HALF,
            k_scales_ptr,
            0,
            q_ptr + token * q_stride,
            q_weight_ptr,
            cos,
            sin,
            group * BLOCK_HEADS,
            q_heads,
            eps,
            HALF,
            BLOCK_HALF,
            BLOCK_HEADS,
            NORM,
            True,
            BLOCK_SIZE,
            "auto",
        )
    elif group < q_groups + k_groups:
        _turn_heads(
            k_out_ptr + target,
            head_stride,
            k_scales_ptr,
            place,
            k_ptr + token * k_stride,
            k_weight_ptr,
            cos,
            sin,
            (group - q_groups) * BLOCK_HEADS,
            written,
            eps,
            HALF,
            BLOCK_HALF,
            BLOCK_HEADS,
            NORM,
            True,
            BLOCK_SIZE,
            KIND,
        )
    else:
        _turn_heads(
            v_out_ptr + target,
            head_stride,
            v_scales_ptr,
            place,
            v_ptr + token * v_stride,
            k_weight_ptr,
            cos,
            sin,
            (group - q_groups - k_groups) * BLOCK_HEADS,
            written,
            eps,
            HALF,
            BLOCK_HALF,
            BLOCK_HEADS,
            NORM,
            False,
            BLOCK_SIZE,
            KIND,
        )


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """query ``[T, H, D]``, key ``[T, KH, D]`` (slices of a fused projection allowed) -> the same
    shapes, new.

    q_weight, k_weight ``[D]``, or both None for rotation alone; cos_sin ``[max_pos, D]`` float32,
    D/2 cosines then D/2 sines; positions ``[T]`` int64 below max_pos (not checked: a check would
    wait for the GPU). ValueError for one weight without the other, an odd D, or anything but the
    tokens strided.
    """
    k_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    given = NormRope(q_weight, k_weight, cos_sin, positions, eps)
    q_out = _launch((query, key, key), given, (k_out, k_out), positions, 0)
    return q_out, k_out


def qk_norm_rope_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: NormRope,
    cache: tuple[Cache, Cache],
    slot_mapping: Tensor,
) -> Tensor:
    """`qk_norm_rope`, then `store_kv` of the keys and of value ``[T, KH, D]``, in one launch ->
    query ``[T, H, D]``.

    Arguments and errors are theirs; cache: k_cache and v_cache. A key is not written and read again
    on its way into the cache.
    """
    k_cache, v_cache = cache
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("qk_norm_rope_store: needs contiguous caches")
    return _launch((query, key, value), given, cache, slot_mapping, k_cache.shape[2])


def _launch(
    heads: tuple[Tensor, Tensor, Tensor],
    given: NormRope,
    targets: tuple[Cache, Cache],
    slot_mapping: Tensor,
    block_size: int,
) -> Tensor:
    """heads: query, key, value; targets: where keys and values go. block_size 0: keys alone, side
    by side.
    """
    query, key, value = heads
    q_weight, k_weight, cos_sin, positions, eps = given
    check_heads(query, q_weight, k_weight)
    check_rows("qk_norm_rope", query, key, value)
    (tokens, q_heads, dim), k_heads = query.shape, key.shape[1]
    q_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    (k_values, k_scales, kind), (v_values, v_scales, _) = map(cache_parts, targets)
    if tokens:
        block_heads = min(8, triton.next_power_of_2(q_heads))
        groups = triton.cdiv(q_heads, block_heads) + (2 if block_size else 1) * triton.cdiv(
            k_heads, block_heads
        )
        _qk_norm_rope_kernel[(tokens, groups)](
            q_out,
            k_values,
            v_values,
            k_scales,
            v_scales,
            query,
            key,
            value,
            query if q_weight is None else q_weight,
            key if k_weight is None else k_weight,
            cos_sin,
            positions,
            slot_mapping,
            q_heads,
            k_heads,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            eps,
            HALF=dim // 2,
            BLOCK_HALF=triton.next_power_of_2(dim // 2),
            BLOCK_HEADS=block_heads,
            NORM=q_weight is not None,
            BLOCK_SIZE=block_size,
            KIND=kind,
            num_warps=2,
            **launched_early(tokens, query.device),
        )
    return q_out
