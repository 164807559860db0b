"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with Qwen3's per-head RMSNorm before it.

A head is D/2 pairs ``(x[i], x[i + D/2])`` ("rotate half", the neox order), and pair i is turned by the angle ``position
· base^(-2i/D)``: ``(a, b) -> (a·cos - b·sin, b·cos + a·sin)``. So the dot product of two turned vectors depends on the
difference of their positions only.

Cost with e bytes a number: 2·T·(H + KH)·D·e bytes, and 4·D a token of table, against some 10 FLOPs a number: bandwidth.
The fusion saves the norm's write and the rotation's read.
"""

import torch

from minivllm.kernels._triton import check_rows, tl, triton
from minivllm.kernels.norm import rms_norm_reference


@triton.jit
def _turn_heads(
    out_ptr, x_ptr, weight_ptr, cos, sin, token, first_head, num_heads, token_stride, eps,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of some heads of one token, each held as two halves ``[BLOCK_HEADS, BLOCK_HALF]``."""
    heads = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (heads < num_heads) & (columns < HALF)
    source = x_ptr + token * token_stride + heads * (2 * HALF) + columns
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + HALF, mask=inside, other=0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)
        weight_a = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0)
        weight_b = tl.load(weight_ptr + HALF + columns, mask=columns < HALF, other=0.0)
        # Rounded as the norm alone would round, so that fused and unfused engines agree.
        a = ((a * scale[:, None]).to(dtype) * weight_a).to(tl.float32)
        b = ((b * scale[:, None]).to(dtype) * weight_b).to(tl.float32)
    target = out_ptr + (token * num_heads + heads) * (2 * HALF) + columns
    tl.store(target, a * cos - b * sin, mask=inside)
    tl.store(target + HALF, b * cos + a * sin, mask=inside)


@triton.jit
def _qk_norm_rope_kernel(
    q_out_ptr, k_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_sin_ptr, positions_ptr,
    q_heads, k_heads, q_stride, k_stride, eps,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Program (token, group of heads): the first groups are query heads, the others key heads."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    row = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + columns
    cos = tl.load(row, mask=columns < HALF, other=0.0)
    sin = tl.load(row + HALF, mask=columns < HALF, other=0.0)
    q_groups = tl.cdiv(q_heads, BLOCK_HEADS)
    if group < q_groups:
        _turn_heads(
            q_out_ptr, q_ptr, q_weight_ptr, cos, sin, token, group * BLOCK_HEADS, q_heads, q_stride, eps,
            HALF, BLOCK_HALF, BLOCK_HEADS, NORM,
        )  # fmt: skip
    else:
        _turn_heads(
            k_out_ptr, k_ptr, k_weight_ptr, cos, sin, token, (group - q_groups) * BLOCK_HEADS, k_heads, k_stride, eps,
            HALF, BLOCK_HALF, BLOCK_HEADS, NORM,
        )  # fmt: skip


def _check(query: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None) -> None:
    if (q_weight is None) != (k_weight is None):
        raise ValueError("qk_norm_rope: give both norm weights or neither")
    if query.shape[-1] % 2:
        raise ValueError(f"qk_norm_rope: pairs need an even head_dim, got {query.shape[-1]}")


def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """query ``[T, H, D]``, key ``[T, KH, D]`` (slices of a fused projection allowed) -> the same shapes, new.

    q_weight, k_weight ``[D]``, or both None for rotation alone; cos_sin ``[max_pos, D]`` float32, D/2 cosines then D/2
    sines; positions ``[T]`` int64 below max_pos (not checked: a check would wait for the GPU).
    ValueError for one weight without the other, an odd D, or anything but the tokens strided.
    """
    _check(query, q_weight, k_weight)
    check_rows("qk_norm_rope", query, key)
    tokens, q_heads, dim = query.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    if tokens:
        block_heads = min(8, triton.next_power_of_2(q_heads))
        groups = triton.cdiv(q_heads, block_heads) + triton.cdiv(key.shape[1], block_heads)
        _qk_norm_rope_kernel[(tokens, groups)](
            q_out, k_out, query, key, query if q_weight is None else q_weight, key if k_weight is None else k_weight,
            cos_sin, positions, q_heads, key.shape[1], query.stride(0), key.stride(0), eps, HALF=dim // 2,
            BLOCK_HALF=triton.next_power_of_2(dim // 2), BLOCK_HEADS=block_heads, NORM=q_weight is not None,
            num_warps=2,
        )  # fmt: skip
    return q_out, k_out


def qk_norm_rope_reference(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(query, q_weight, k_weight)
    q_heads, k_heads = query.shape[1], key.shape[1]
    heads = torch.cat((query, key), dim=1)  # all heads are turned alike, and normed alike but for the weight
    if q_weight is not None and k_weight is not None:
        weight = torch.cat((q_weight.expand(q_heads, -1), k_weight.expand(k_heads, -1)))
        heads = rms_norm_reference(heads, weight, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2]: one angle for all heads
    a, b = heads.float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(heads.dtype)
    return turned[:, :q_heads], turned[:, q_heads:]
