"""Linear layers whose weights have 8 bits: ``y = x Wᵀ + b`` with ``W = scale · weight``.

- `linear_w8a16`: only the weights are quantized (int8 or e4m3), with a scale per output channel or
  per block of 128 x 128. ``y[t, n] = Σ_k x[t, k] · weight[n, k] · scale[n, k] + b[n]``.
- `linear_w8a8`: the activations are quantized, too, to e4m3 with a scale per token that is computed
  here ("dynamic"): ``y[t, n] = x_scale[t] · scale[n] · Σ_k x8[t, k] · weight[n, k] + b[n]``.

The scale of a channel, a token or a block is its absolute maximum over the largest number of the
format, 127 or 448 ("absmax"): that maximum is represented exactly.

Cost of x [T, K] and W [N, K]: N·K bytes of weights, half of bf16's and a quarter of float32's,
against 2·T·N·K FLOPs. With few rows bandwidth is the floor: 4096 x 4096 takes 3.8 µs at 4.4 TB/s in
8 bits and 7.6 µs in bf16. With many rows the tensor cores are: e4m3 times e4m3 runs at twice the
rate of bf16, and W8A16 at that of bf16.

So there are four ways. One row: a program reads some rows of W in order, and quantizes x itself
where it must. Some rows: `tl.dot` over tiles, converted on the fly. Many rows of W8A16: W is
converted once, and cuBLAS multiplies; this moves 3·N·K bytes more, 3 % of the product's time at
T = 8192. Some and many rows of W8A8 on Hopper, in bf16: `torch._scaled_mm`. Taught in
notebooks/14_quantization.ipynb.
"""

import torch
import torch.nn.functional as F

from minivllm.kernels._triton import check_rows, tl, triton

#: Output and input features of a block that has one scale, as DeepSeek-V3 and Qwen3 publish them.
BLOCK = 128
INT8_MAX, FP8_MAX = 127.0, 448.0
FP8 = torch.float8_e4m3fn
#: T up to which every row reads W again, and the most output features if T is above 1; as in
#: linear.py.
MAX_ROWS, MAX_FEATURES = 4, 2048
#: Above so many rows W8A16 converts W once, for cuBLAS.
MANY_ROWS = 256


# --- references -----------------------------------------------------------------------------------


def quantize_channels(
    weight: torch.Tensor, dtype: torch.dtype, top: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [N, K] -> (int8 or e4m3 [N, K], scale [N, 1] float32): one scale per output channel.

    top: [N, 1], the absolute maxima where they are not those of this weight's rows.
    """
    largest = INT8_MAX if dtype == torch.int8 else FP8_MAX
    if top is None:
        top = weight.abs().amax(1, keepdim=True) if weight.shape[1] else weight.new_zeros(1)
    scale = top.float() / largest
    quantized = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    # Some rows at a time: the float32 copy of a large weight would take four times its bytes.
    for rows, divisor, out in zip(
        weight.split(1024), scale.split(1024), quantized.split(1024), strict=True
    ):
        values = (rows.float() / divisor.clamp(min=torch.finfo(torch.float32).tiny)).clamp_(
            -largest, largest
        )
        out.copy_(values.round_() if dtype == torch.int8 else values)
    return quantized, scale


def quantize_tokens_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[T, K]`` -> (e4m3 [T, K], scale [T, 1] float32): one scale per token."""
    wide = x.float()
    top = wide.abs().amax(1, keepdim=True)
    inverse = FP8_MAX / torch.where(top > 0, top, FP8_MAX)
    return (wide * inverse).clamp_(-FP8_MAX, FP8_MAX).to(FP8), top / FP8_MAX


def dequantize_reference(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """weight ``[N, K]``, int8 or e4m3, and scale, as `linear_w8a16_reference` -> ``[N, K]``."""
    features, width = weight.shape
    if scale.shape != (features, 1):
        scale = scale.repeat_interleave(BLOCK, 0)[:features].repeat_interleave(BLOCK, 1)[:, :width]
    return (weight.float() * scale).to(dtype)


def linear_w8a16_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x ``[T, K]``, weight ``[N, K]`` int8 or e4m3, bias ``[N]`` or None -> ``[T, N]`` in x.dtype.

    scale: float32, ``[N, 1]`` or, per block, ``[⌈N / 128⌉, ⌈K / 128⌉]``.
    """
    wide = dequantize_reference(weight, scale, torch.float32)
    out = F.linear(x.float(), wide, None if bias is None else bias.float())
    return out.to(x.dtype)


def linear_w8a8_reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x ``[T, K]``, weight ``[N, K]`` e4m3, scale ``[N, 1]`` float32, bias ``[N]`` or None ->
    ``[T, N]`` in x.dtype.
    """
    quantized, x_scale = quantize_tokens_reference(x)
    out = F.linear(quantized.float(), weight.float()) * x_scale * scale.flatten()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def unpacked(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The form of a weight that `linear_w8a16` reads: here, as it is. `scale` is part of the
    signature of `Kernels.pack_w8a16`.
    """
    del scale
    return weight


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _round_to_e4m3(x):
    """float32 -> the nearest number of e4m3, ties to even, as float32; |x| <= 448, NaN stays NaN.

    Adding and subtracting a number whose last bit is worth e4m3's last bit at x rounds there. With
    this, every conversion to e4m3 is exact: that of Triton 3.6's interpreter does not carry.
    """
    power = (x.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, 0.015625) * 1572864.0  # 2**-6 and 1.5 * 2**20
    return (x + shift) - shift


@triton.jit
def _row_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    x_stride,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Program (some rows of W, row of x). SCALE_BLOCK: 128, or 0 for a scale per channel.
    QUANTIZE: x is rounded to e4m3, with a scale of its own. 128 is a multiple of BLOCK_N.

    A tile of W is on its way while x, or the tile before it, is computed with.
    """
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    weight_rows = weight_ptr + features.to(tl.int64)[:, None] * K
    columns = tl.arange(0, BLOCK_K)
    inside = (features < N)[:, None] & (columns < K)[None, :]
    weight = tl.load(weight_rows + columns[None, :], mask=inside, other=0.0)
    factor = 1.0
    inverse = 1.0
    if QUANTIZE:
        top = tl.zeros([BLOCK_K], dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + row * x_stride + columns, mask=columns < K, other=0.0)
            top = tl.maximum(top, tl.abs(x.to(tl.float32)))
        largest = tl.max(top, axis=0)
        factor = largest / 448.0
        inverse = 448.0 / tl.where(largest > 0.0, largest, 448.0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        coming = columns + BLOCK_K
        inside = (features < N)[:, None] & (coming < K)[None, :]
        following = tl.load(weight_rows + coming[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < K, other=0.0).to(tl.float32)
        if QUANTIZE:
            x = _round_to_e4m3(x * inverse)
        if SCALE_BLOCK > 0:
            # All features of this program are in one row of blocks.
            first = tl.program_id(0) * BLOCK_N // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK)
            scale = tl.load(scale_ptr + first + columns // SCALE_BLOCK, mask=columns < K, other=0.0)
            x *= scale
        acc += weight.to(tl.float32) * x[None, :]
        weight = following
    total = tl.sum(acc, axis=1)
    if SCALE_BLOCK == 0:
        scale = tl.load(scale_ptr + features, mask=features < N, other=0.0)
        total *= scale * factor
    if BIAS:
        total += tl.load(bias_ptr + features, mask=features < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + features, total, mask=features < N)


@triton.jit
def _tile_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    x_scale_ptr,
    bias_ptr,
    x_stride,
    T,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Program (tile of output features, tile of rows). QUANTIZED: x is e4m3, and both factors are
    multiplied as float16, which represents them exactly. 128 is a multiple of BLOCK_K.
    """
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    x_rows = x_ptr + rows[:, None] * x_stride
    weight_rows = weight_ptr + features.to(tl.int64)[None, :] * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = (rows < T)[:, None] & (columns < K)[None, :]
        x = tl.load(x_rows + columns[None, :], mask=inside, other=0.0)
        inside = (columns < K)[:, None] & (features < N)[None, :]
        weight = tl.load(weight_rows + columns[:, None], mask=inside, other=0.0)
        if QUANTIZED:
            x = x.to(tl.float16)
        part = tl.dot(x, weight.to(x.dtype), input_precision="ieee")
        if SCALE_BLOCK > 0:
            places = features // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + start // SCALE_BLOCK
            part *= tl.load(scale_ptr + places, mask=features < N, other=0.0)[None, :]
        acc += part
    if SCALE_BLOCK == 0:
        acc *= tl.load(scale_ptr + features, mask=features < N, other=0.0)[None, :]
    if QUANTIZED:
        acc *= tl.load(x_scale_ptr + rows, mask=rows < T, other=0.0)[:, None]
    if BIAS:
        bias = tl.load(bias_ptr + features, mask=features < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    inside = (rows < T)[:, None] & (features < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + features[None, :], acc, mask=inside)


@triton.jit
def _quantize_tokens_kernel(
    out_ptr, scale_ptr, x_ptr, x_stride, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Program (row): its maximum first, then its numbers, which are in the cache by then. The
    scale of a row that is not finite is NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK_K], dtype=tl.float32)
    spoiled = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < K, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(x))
        spoiled += x * 0.0
    largest = tl.max(top, axis=0)
    inverse = 448.0 / tl.where(largest > 0.0, largest, 448.0)
    tl.store(scale_ptr + row, largest / 448.0 + tl.sum(spoiled, axis=0))
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < K, other=0.0).to(tl.float32)
        x = _round_to_e4m3(x * inverse)
        tl.store(out_ptr + row * K + columns, x.to(tl.float8e4nv), mask=columns < K)


@triton.jit
def _dequantize_kernel(
    out_ptr, weight_ptr, scale_ptr, K, SCALE_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Program (row of W, tile of columns)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight = tl.load(weight_ptr + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    if SCALE_BLOCK > 0:
        places = row // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + columns // SCALE_BLOCK
        weight *= tl.load(scale_ptr + places, mask=columns < K, other=0.0)
    else:
        weight *= tl.load(scale_ptr + row)
    tl.store(out_ptr + row * K + columns, weight, mask=columns < K)


# --- launchers ------------------------------------------------------------------------------------


def linear_w8a16(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `linear_w8a16_reference`, summed in float32. Rows of x may be strided, everything else is
    contiguous; ValueError otherwise.

    Above `MANY_ROWS` rows, the weights are rounded to x.dtype before the product.
    """
    _check("linear_w8a16", x, weight, scale)
    rows, features = len(x), len(weight)
    if rows > MANY_ROWS:
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)
    if rows <= (MAX_ROWS if features <= MAX_FEATURES else 1):
        return _few_rows(x, weight, scale, bias, quantize=False)
    return _tiles(x, None, weight, scale, bias, x.dtype)


def linear_w8a8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `linear_w8a8_reference`, summed in float32 or, by `torch._scaled_mm`, as the tensor cores
    of Hopper sum e4m3. Rows of x may be strided, everything else is contiguous; ValueError
    otherwise.
    """
    _check("linear_w8a8", x, weight, scale)
    (rows, width), features = x.shape, len(weight)
    if scale.shape != (features, 1) or weight.dtype != FP8:
        raise ValueError("linear_w8a8: needs an e4m3 weight [N, K] and a scale [N, 1]")
    if rows <= (MAX_ROWS if features <= MAX_FEATURES else 1):
        return _few_rows(x, weight, scale, bias, quantize=True)
    quantized, x_scale = quantize_tokens(x)
    if x.dtype == torch.bfloat16 and width % 16 == features % 16 == 0 and _is_hopper(x.device):
        return torch._scaled_mm(
            quantized,
            weight.t(),
            scale_a=x_scale,
            scale_b=scale.view(1, -1),
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
    return _tiles(quantized, x_scale, weight, scale, bias, x.dtype)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_tokens_reference`. Rows may be strided; ValueError for anything else."""
    check_rows("quantize_tokens", x)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=FP8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = min(4096, triton.next_power_of_2(width))
        _quantize_tokens_kernel[(rows,)](
            out, scale, x, x.stride(0), width, BLOCK_K=block, num_warps=8 if block > 1024 else 4
        )
    return out, scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `dequantize_reference`, for contiguous tensors."""
    features, width = weight.shape
    out = torch.empty(features, width, dtype=dtype, device=weight.device)
    block = min(4096, triton.next_power_of_2(width))
    grid = (features, triton.cdiv(width, block))
    _dequantize_kernel[grid](
        out, weight, scale, width, SCALE_BLOCK=_scale_block(weight, scale), BLOCK_K=block
    )
    return out


def _few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    quantize: bool,
) -> torch.Tensor:
    (rows, width), features = x.shape, len(weight)
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    block_n, block_k = 8, min(1024, triton.next_power_of_2(width))
    _row_kernel[(triton.cdiv(features, block_n), rows)](
        out,
        x,
        weight,
        scale,
        weight if bias is None else bias,
        x.stride(0),
        features,
        width,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SCALE_BLOCK=_scale_block(weight, scale),
        QUANTIZE=quantize,
        BIAS=bias is not None,
        num_warps=8,
    )
    return out


def _tiles(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    (rows, width), features = x.shape, len(weight)
    out = torch.empty(rows, features, dtype=dtype, device=x.device)
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    block_n = 32 if rows <= 64 else 64
    # Registers and shared memory hold as many float32 of half as many columns.
    most = 32 if x.dtype == torch.float32 else 128
    block_k = min(most, max(32, triton.next_power_of_2(width)))
    grid = (triton.cdiv(features, block_n), triton.cdiv(rows, block_m))
    _tile_kernel[grid](
        out,
        x,
        weight,
        scale,
        scale if x_scale is None else x_scale,
        weight if bias is None else bias,
        x.stride(0),
        rows,
        features,
        width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SCALE_BLOCK=_scale_block(weight, scale),
        QUANTIZED=x_scale is not None,
        BIAS=bias is not None,
        num_warps=4,
        num_stages=3,
    )
    return out


def _scale_block(weight: torch.Tensor, scale: torch.Tensor) -> int:
    return 0 if scale.shape == (len(weight), 1) else BLOCK


def _check(operation: str, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    check_rows(operation, x)
    features, width = weight.shape
    blocks = (-(-features // BLOCK), -(-width // BLOCK))
    if not weight.is_contiguous() or width != x.shape[1]:
        raise ValueError(f"{operation}: needs a contiguous weight [N, {x.shape[1]}]")
    if tuple(scale.shape) not in ((features, 1), blocks) or scale.dtype != torch.float32:
        raise ValueError(
            f"{operation}: needs a float32 scale [{features}, 1] or {list(blocks)}, got"
            f" {scale.dtype} {list(scale.shape)}"
        )


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
