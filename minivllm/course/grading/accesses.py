"""Which elements of its tensors a Triton kernel reads and writes.

A mask that is missing at a load often changes no result: what was read beyond a tensor is hidden
later, and on another day it ends the process. Triton's interpreter shows each address.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass
class Accesses:
    """What kernels did in an `accesses` block.

    read, written: tensor's name -> which of its elements, a flat bool array. read_outside,
    written_outside: for the first access of each load or store that lies in none of the tensors,
    the place in words. All of them stay empty where no interpreter runs the kernels.
    """

    read: dict[str, np.ndarray] = field(default_factory=dict)
    written: dict[str, np.ndarray] = field(default_factory=dict)
    read_outside: list[str] = field(default_factory=list)
    written_outside: list[str] = field(default_factory=list)


@contextlib.contextmanager
def accesses(**tensors: torch.Tensor) -> Iterator[Accesses]:
    """Watch the loads, stores and atomics of the kernels that are launched in this block.

    tensors: all that the kernels get, by name; contiguous, on the CPU. What lies outside of them is
    neither read nor written: a load gives NaN there (integers: 0), a store does nothing. A masked
    load without `other` gives NaN, too, where the mask is False.
    """
    import numpy as np

    seen = Accesses(
        {name: np.zeros(tensor.numel(), dtype=bool) for name, tensor in tensors.items()},
        {name: np.zeros(tensor.numel(), dtype=bool) for name, tensor in tensors.items()},
    )
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield seen
        return
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    def inside(ptrs: Any, mask: Any, elements: dict[str, np.ndarray], missed: list[str]) -> Any:
        """The mask without the lanes that lie outside of all tensors; notes what the others do."""
        address = np.asarray(ptrs.data).astype(np.int64)
        wanted = np.broadcast_to(np.asarray(mask.data, dtype=bool), address.shape)
        found = np.zeros(address.shape, dtype=bool)
        for name, tensor in tensors.items():
            place = (address - tensor.data_ptr()) // tensor.element_size()
            here = wanted & (place >= 0) & (place < tensor.numel())
            elements[name][place[here]] = True
            found |= here
        if (lost := wanted & ~found).any():
            missed.append(_described(int(address[lost][0]), tensors))
        return TensorHandle(found, mask.dtype)

    def load(original: Callable, ptrs: Any, mask: Any, other: Any, *more: Any) -> Any:
        allowed = inside(ptrs, mask, seen.read, seen.read_outside)
        result = original(ptrs, allowed, other, *more)
        # Triton does not say what a masked lane gets where `other` is missing.
        lost = ~allowed.data if other is None else np.asarray(mask.data, bool) & ~allowed.data
        if lost.any() and np.issubdtype(result.data.dtype, np.floating):
            result.data = np.where(lost, np.asarray(np.nan, result.data.dtype), result.data)
        return result

    def store(original: Callable, ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
        allowed = inside(ptrs, mask, seen.written, seen.written_outside)
        return original(ptrs, value, allowed, *more)

    def atomic(original: Callable, op: Any, ptr: Any, value: Any, mask: Any, *more: Any) -> Any:
        allowed = inside(ptr, mask, seen.written, seen.written_outside)
        return original(op, ptr, value, allowed, *more)

    watching = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
    }
    with contextlib.ExitStack() as undo:
        for name, watch in watching.items():
            original = getattr(interpreter_builder, name)
            setattr(interpreter_builder, name, functools.partial(watch, original))
            undo.callback(delattr, interpreter_builder, name)
        yield seen


def _described(address: int, tensors: dict[str, torch.Tensor]) -> str:
    """A place outside of all tensors, in words, as seen from the nearest one."""

    def distance(tensor: torch.Tensor) -> int:
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        return max(tensor.data_ptr() - address, address - end)

    name = min(tensors, key=lambda name: distance(tensors[name]))
    tensor = tensors[name]
    element = (address - tensor.data_ptr()) // tensor.element_size()
    if tensor.ndim < 2:
        return f"element {element} of {name}, which has {tensor.numel()}"
    width = tensor.numel() // len(tensor)
    return f"row {element // width} of {name}, which has the rows 0 to {len(tensor) - 1}"
