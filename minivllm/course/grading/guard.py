"""Tensors inside a buffer of poison, which reveal reads and writes out of bounds."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Poisoned numbers on each side of a `guarded` tensor.
MARGIN = 1024
#: What to look at after a write out of bounds. A check can replace this by a better text with
#: `wording`.
BEYOND = (
    "Does each store have a mask, and does each row begin where it does in the tensor that is"
    " written?"
)


_payloads = itertools.count(1)


def guarded(
    *shape: int, dtype: torch.dtype | None = None, fill: float | None = None
) -> torch.Tensor:
    """A contiguous tensor inside a larger buffer of poison.

    A read beyond the tensor gives NaN (integers: a large negative number). `intact` finds a write
    beyond it. The inside is poison, too, unless fill is given.
    """
    import torch

    dtype = dtype or torch.float32
    numel = functools.reduce(int.__mul__, shape, 1)
    bits = {
        torch.float32: (torch.int32, 0x7FC00000),
        torch.float16: (torch.int16, 0x7E00),
        torch.bfloat16: (torch.int16, 0x7FC0),
        torch.float64: (torch.int64, 0x7FF8 << 48),
    }
    # Each buffer has its own NaN, so that a NaN that was read elsewhere does not look like it.
    if dtype in bits:
        integer, pattern = bits[dtype]
        buffer = torch.full(
            (numel + 2 * MARGIN,), pattern + next(_payloads) % 63 + 1, dtype=integer
        ).view(dtype)
    else:
        buffer = torch.full((numel + 2 * MARGIN,), torch.iinfo(dtype).min // 2, dtype=dtype)
    inside = buffer[MARGIN : MARGIN + numel].view(shape)
    return inside if fill is None else inside.fill_(fill)


def guard(tensor: torch.Tensor) -> torch.Tensor:
    """A `guarded` copy of a tensor."""
    return guarded(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def intact(*tensors: torch.Tensor) -> bool:
    """Whether the poison around these `guarded` tensors is unchanged.

    ValueError for a tensor that is not guarded.
    """
    import torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}
    for tensor in tensors:
        if not is_guarded(tensor):
            raise ValueError("intact: this tensor was not made by guarded()")
        whole = torch.as_strided(tensor, (tensor.numel() + 2 * MARGIN,), (1,), 0).view(
            integers[tensor.element_size()]
        )
        if not (whole[:MARGIN] == whole[0]).all() or not (whole[-MARGIN:] == whole[0]).all():
            return False
        if tensor.is_floating_point() and not torch.as_strided(tensor, (1,), (1,), 0).isnan().all():
            return False
    return True


def is_guarded(value: Any) -> bool:
    """Whether value was made by `guarded` or `guard`."""
    if not hasattr(value, "untyped_storage"):
        return False
    room = value.untyped_storage().nbytes() // value.element_size()
    return (
        value.is_contiguous()
        and value.storage_offset() == MARGIN
        and room == value.numel() + 2 * MARGIN
    )
