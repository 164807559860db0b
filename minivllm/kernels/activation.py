"""SwiGLU's elementwise half: ``silu(gate) · up`` with ``silu(z) = z / (1 + exp(-z))`` (Shazeer
2020, arXiv:2002.05202).

One matrix product gives gate and up side by side, ``[T, 2N]``. The kernel reads both halves of a
row and writes one. Cost with e bytes per number: 3·T·N·e bytes against about 5·T·N FLOPs, so
bandwidth is the floor. Eager torch writes silu(gate) and reads it again: 5·T·N·e bytes. Taught in
notebooks/06_qwen3.ipynb.
"""

import torch
import torch.nn.functional as F

from minivllm.kernels._triton import check_rows, tl, triton
from minivllm.kernels.early import launched_early, wait_for_earlier


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """``[T, 2N] -> [T, N]`` in gate_up.dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@triton.jit
def _silu_mul_kernel(out_ptr, gate_up_ptr, row_stride, N, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Program (row, tile): BLOCK columns of one row."""
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    gate = tl.load(gate_up_ptr + row * row_stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * row_stride + N + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # rounded here, as the two eager operations do
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * N + columns, silu * up, mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``[T, 2N] -> [T, N]`` in gate_up.dtype. ValueError for an odd width or anything but the rows
    strided.
    """
    check_rows("silu_mul", gate_up)
    rows, width = gate_up.shape
    if width % 2:
        raise ValueError(
            f"silu_mul: gate and up must have the same width, got {width} columns together"
        )
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(1024, triton.next_power_of_2(width // 2))
        grid = (rows, triton.cdiv(width // 2, block))
        early = launched_early(rows, out.device)
        _silu_mul_kernel[grid](out, gate_up, gate_up.stride(0), width // 2, BLOCK=block, **early)
    return out
