"""A linear layer, ``x Wᵀ + b``: cuBLAS's matrix product, except for a few rows of x, which is what decoding asks for.

Cost of x [T, K] and W [N, K] with e bytes a number: N·K·e bytes of weights (x and the result are small) against 2·T·N·K
FLOPs. For few rows bandwidth is the floor: 4096 x 1024 in bf16 is 8.4 MB, 1.9 µs at 4.4 TB/s. A matrix product is cut
into tiles for the tensor cores, and at T = 1 the narrow ones (o_proj, down_proj) leave most of the GPU idle. Here every
program takes a few rows of W instead and reads them once, in order. On an H200, T = 1, µs (cuBLAS / this): 4096 x 1024
5.3 / 4.3, 1024 x 2048 12.8 / 3.4, 1024 x 3072 7.5 / 4.4. Tiles of 16 rows with `tl.dot` gained nothing over it, and
from 8 rows of x on cuBLAS is as fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels._triton import check_rows, tl, triton

MAX_ROWS = 4  # of x; from 8 on cuBLAS was as fast


@triton.jit
def _linear_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, x_stride, N, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Program (some rows of W, row of x). Products are added lane by lane, and the lanes once, at the end."""
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    weight_rows = weight_ptr + features.to(tl.int64)[:, None] * K
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = (features < N)[:, None] & (columns < K)[None, :]
        weight = tl.load(weight_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < K, other=0.0).to(tl.float32)
        acc += weight * x[None, :]
    total = tl.sum(acc, axis=1)
    if BIAS:
        total += tl.load(bias_ptr + features, mask=features < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + features, total, mask=features < N)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x ``[T, K]``, weight ``[N, K]``, bias ``[N]`` or None -> ``[T, N]`` in x.dtype, summed in float32.

    Rows of x may be strided, weight and bias are contiguous, all of one dtype; ValueError otherwise.
    """
    if len(x) > MAX_ROWS:
        return F.linear(x, weight, bias)
    check_rows("linear", x)
    if not weight.is_contiguous() or x.dtype != weight.dtype or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear: needs a contiguous weight [N, {x.shape[1]}] of dtype {x.dtype}")
    (rows, width), features = x.shape, len(weight)
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    if rows:
        block_n, block_k = 8, min(1024, triton.next_power_of_2(width))
        _linear_kernel[(triton.cdiv(features, block_n), rows)](
            out, x, weight, weight if bias is None else bias, x.stride(0), features, width,
            BLOCK_N=block_n, BLOCK_K=block_k, BIAS=bias is not None, num_warps=8,
        )  # fmt: skip
    return out


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)
