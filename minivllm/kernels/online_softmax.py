"""Softmax in one pass, and the merging of softmaxes computed apart (Milakov & Gimelshein 2018,
arXiv:1805.02867).

Go through a row tile by tile, and keep the maximum m so far and the sum l of ``exp(x - m)``. A tile
with maximum m' gives ``M = max(m, m')`` and ``l <- l·exp(m - M) + sum(exp(tile - M))``: what was
summed under the old maximum is rescaled, never summed again. FlashAttention rescales its output by
the same factor. Split-KV decoding needs it once more: the parts of a context give (out_s, lse_s)
with ``lse = m + log(l)``, and then ``out = sum(exp(lse_s - LSE)·out_s)`` with
``LSE = logsumexp(lse_s)``. Taught in notebooks/01_online_softmax.ipynb.

Cost of softmax over [T, N] with e bytes per number: 3·T·N·e bytes (two reads, one write) against
about 5·T·N FLOPs, so bandwidth is the floor. With a pass each for maximum, sum and result, a row is
read three times. Merging reads 4·S·B·H·(D + 1) bytes and writes 4·B·H·D.
"""

import torch

from minivllm.kernels._triton import check_rows, tl, triton
from minivllm.kernels.early import launched_early, wait_for_earlier


def softmax_reference(x: torch.Tensor) -> torch.Tensor:
    """``[T, N] -> [T, N]`` in x.dtype, computed in float32."""
    weights = torch.exp(x.float() - x.float().amax(dim=-1, keepdim=True))
    return (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)


@triton.jit
def _softmax_kernel(out_ptr, x_ptr, row_stride, N, BLOCK: tl.constexpr):
    """One program per row: one pass for maximum and sum together, one to write."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row_max = float("-inf")
    row_sum = 0.0
    for start in range(0, N, BLOCK):
        x = tl.load(
            x_ptr + row * row_stride + start + columns,
            mask=start + columns < N,
            other=float("-inf"),
        )
        x = x.to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(x, axis=0))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf would be NaN
        row_sum = row_sum * tl.exp(row_max - finite_max) + tl.sum(tl.exp(x - finite_max), axis=0)
        row_max = new_max
    for start in range(0, N, BLOCK):
        inside = start + columns < N
        x = tl.load(
            x_ptr + row * row_stride + start + columns, mask=inside, other=float("-inf")
        ).to(tl.float32)
        tl.store(out_ptr + row * N + start + columns, tl.exp(x - row_max) / row_sum, mask=inside)


def softmax(x: torch.Tensor, block: int = 1024) -> torch.Tensor:
    """``[T, N] -> [T, N]`` in x.dtype, by tiles of block (a power of two). A row of -inf alone
    gives NaN, as in torch.

    ValueError where anything but the rows is strided.
    """
    check_rows("softmax", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _softmax_kernel[(len(x),)](out, x, x.stride(0), x.shape[1], BLOCK=block)
    return out


BLOCK_S = 32  # parts merged at a time


def merge_attention_reference(partial_out: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    """Float32 outputs ``[S, B, H, D]`` and log-sum-exps ``[S, B, H]`` of S parts ->
    ``[B, H, D]``.
    """
    # exp(lse_s - LSE); NaN where all parts are empty
    weights = partial_lse.softmax(dim=0).nan_to_num_(0.0)
    return (weights.unsqueeze(-1) * partial_out).sum(dim=0)


@triton.jit(do_not_specialize=["num_splits", "rows"])
def _merge_kernel(
    out_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    num_splits,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per (sequence, head): BLOCK_S parts at a time, merged online."""
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    total_max = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        lse = tl.load(
            partial_lse_ptr + splits * rows + row, mask=splits < num_splits, other=float("-inf")
        )
        inside = (splits < num_splits)[:, None] & (columns < D)[None, :]
        part = tl.load(
            partial_out_ptr + (splits * rows + row)[:, None] * D + columns[None, :],
            mask=inside,
            other=0.0,
        )
        new_max = tl.maximum(total_max, tl.max(lse, axis=0))
        # all parts empty so far: weights 0, not NaN
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp(total_max - finite_max)
        weights = tl.exp(lse - finite_max)
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * part, axis=0)
        total_max = new_max
    tl.store(out_ptr + row * D + columns, acc / tl.where(total > 0.0, total, 1.0), mask=columns < D)


def merge_attention(
    partial_out: torch.Tensor, partial_lse: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Merge S float32 parts, outputs ``[S, B, H, D]`` and natural log-sum-exps ``[S, B, H]`` ->
    ``[B, H, D]`` of dtype.

    An empty part has lse -inf and a finite output; a row whose parts are all empty gives 0.
    ValueError unless contiguous.
    """
    if not (partial_out.is_contiguous() and partial_lse.is_contiguous()):
        raise ValueError("merge_attention: needs contiguous parts")
    splits, batch, heads, dim = partial_out.shape
    out = torch.empty(batch, heads, dim, dtype=dtype, device=partial_out.device)
    if batch:
        _merge_kernel[(batch * heads,)](
            out,
            partial_out,
            partial_lse,
            splits,
            batch * heads,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_S=BLOCK_S,
            **launched_early(batch, out.device),
        )
    return out
