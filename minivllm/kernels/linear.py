"""A linear layer, ``x Wᵀ + b``: cuBLAS's matrix product, except where x has few rows, as in the
decode of one request.

Cost of x [T, K] and W [N, K] with e bytes per number: N·K·e bytes of weights (x and the result are
small) against 2·T·N·K FLOPs. For few rows bandwidth is the floor: 4096 x 1024 in bf16 is 8.4 MB,
1.9 µs at 4.4 TB/s.

cuBLAS cuts a product into tiles for the tensor cores. At T = 1 a narrow one (o_proj, down_proj) has
few tiles, and most of the GPU is idle. Here every program takes a few rows of W instead and reads
them once, in order. Reached on an H200 with T = 1, in µs (cuBLAS / this): 4096 x 1024 5.3 / 4.2,
1024 x 2048 12.8 / 3.3, 6144 x 1024 5.9 / 5.2, 1024 x 3072 6.6 / 4.2, 151936 x 1024 77 / 71. With
T = 4: 1024 x 2048 8.3 / 4.6, but 4096 x 1024 5.3 / 5.5: each row of x reads W again, from the L2
cache. Tried: all rows of x in one program, slower from T = 2 on (registers); `tl.dot`, 9 % faster
than cuBLAS at T = 64 and 21 % slower at T = 256.
"""

import torch
import torch.nn.functional as F

from minivllm.kernels._triton import check_rows, tl, triton
from minivllm.kernels.early import launched_early

#: T and N up to which a product of several rows is one for the kernel.
MAX_ROWS, MAX_FEATURES = 4, 2048


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x ``[T, K]``, weight ``[N, K]``, bias ``[N]`` or None -> ``[T, N]`` in x.dtype."""
    return F.linear(x, weight, bias)


@triton.jit
def _linear_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    x_stride,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (some rows of W, row of x). Products are added lane by lane, and the lanes once, at
    the end. The next piece of W is always on its way; the first one before there is an x.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    weight_rows = weight_ptr + features.to(tl.int64)[:, None] * K
    columns = tl.arange(0, BLOCK_K)
    inside = (features < N)[:, None] & (columns < K)[None, :]
    weight = tl.load(weight_rows + columns[None, :], mask=inside, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        following = columns + BLOCK_K
        inside = (features < N)[:, None] & (following < K)[None, :]
        next_weight = tl.load(weight_rows + following[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < K, other=0.0).to(tl.float32)
        acc += weight.to(tl.float32) * x[None, :]
        weight = next_weight
    total = tl.sum(acc, axis=1)
    if BIAS:
        total += tl.load(bias_ptr + features, mask=features < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + features, total, mask=features < N)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x ``[T, K]``, weight ``[N, K]``, bias ``[N]`` or None -> ``[T, N]`` in x.dtype, summed in
    float32.

    Rows of x may be strided, weight and bias are contiguous, all of one dtype; ValueError
    otherwise.
    """
    (rows, width), features = x.shape, len(weight)
    if rows == 0 or rows > (MAX_ROWS if features <= MAX_FEATURES else 1):
        return F.linear(x, weight, bias)
    check_rows("linear", x)
    if not weight.is_contiguous() or x.dtype != weight.dtype or weight.shape[1] != width:
        raise ValueError(f"linear: needs a contiguous weight [N, {width}] of dtype {x.dtype}")
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    block_n, block_k = 8, min(1024, triton.next_power_of_2(width))
    _linear_kernel[(triton.cdiv(features, block_n), rows)](
        out,
        x,
        weight,
        weight if bias is None else bias,
        x.stride(0),
        features,
        width,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BIAS=bias is not None,
        num_warps=8,
        **launched_early(rows, x.device),
    )
    return out
