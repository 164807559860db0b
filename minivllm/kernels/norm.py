"""RMSNorm, ``x / sqrt(mean(x²) + eps) · weight`` (Zhang & Sennrich 2019, arXiv:1910.07467), alone
and with a residual.

Rounding follows transformers' `Qwen3RMSNorm`: statistics and division in float32, back to x.dtype,
then the weight.

Cost of [T, N] with e bytes per number: 2·T·N·e bytes (4·T·N·e with the residual: two reads, two
writes) against about 4·T·N FLOPs. That is less than one FLOP per byte, so bandwidth is the floor:
256 x 1024 in bf16 is 1 MB, 0.24 µs at 4.4 TB/s, far less than the launch. Fusing pays because each
of the five eager operations reads and writes those bytes again. Taught in
notebooks/06_qwen3.ipynb.
"""

import torch
from torch import Tensor

from minivllm.kernels._triton import check_rows, tl, triton
from minivllm.kernels.early import launched_early, wait_for_earlier


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x ``[..., N]``, weight ``[N]`` -> ``[..., N]`` in x.dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype).mul_(weight)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``, each ``[..., N]`` in x.dtype."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


@triton.jit
def _rms_norm_kernel(
    out_ptr,
    sum_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    x_stride,
    residual_stride,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per row; the row fits into registers, so x is read once."""
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        tl.store(sum_ptr + row * N + columns, x, mask=inside)
    wide = x.to(tl.float32)
    normed = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / N + eps))
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * N + columns, normed.to(x.dtype) * weight, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``[T, N] -> [T, N]`` in x.dtype. Rows may be strided (a slice of a fused projection), else
    ValueError.
    """
    check_rows("rms_norm", x)
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``, both new, ``[T, N]`` in x.dtype; strides as for
    `rms_norm`.
    """
    check_rows("add_rms_norm", x, residual)
    return _launch(x, residual, weight, eps)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # without a residual, neither is touched
    total, other = (
        (out, x)
        if residual is None
        else (torch.empty(x.shape, dtype=x.dtype, device=x.device), residual)
    )
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            out,
            total,
            x,
            other,
            weight,
            x.stride(0),
            other.stride(0),
            eps,
            N=width,
            BLOCK=block,
            ADD=residual is not None,
            **launched_early(rows, x.device),
            num_warps=8 if block > 2048 else 4,
        )
    return out, total
