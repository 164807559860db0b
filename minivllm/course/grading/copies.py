"""Copies of arguments and results, guard bands included.

A check copies the arguments of each call, and tries hundreds of wrong implementations. `deepcopy`
needs 0.2 ms for a tensor of 100 numbers, because a tensor's storage is copied through Python.
"""

from __future__ import annotations

import copy
import sys
from typing import Any


def copied(value: Any) -> Any:
    """`copy.deepcopy` of value. Tensors that share memory share it in the copy, too."""
    memo: dict[int, Any] = {}
    if "torch" in sys.modules:
        _copy_tensors(value, memo, {})
    return copy.deepcopy(value, memo)


def _copy_tensors(value: Any, memo: dict[int, Any], storages: dict[int, Any]) -> None:
    """Put the copies of the tensors in tuples and lists where `deepcopy` looks for them."""
    import torch

    if type(value) in (tuple, list):
        for item in value:
            _copy_tensors(item, memo, storages)
    elif _is_plain(value) and id(value) not in memo:
        storage = value.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()
        memo[id(value)] = torch.empty(0, dtype=value.dtype).set_(
            storages[storage._cdata], value.storage_offset(), value.shape, value.stride()
        )


def _is_plain(value: Any) -> bool:
    """Whether value is a tensor on the CPU that is its numbers and nothing more."""
    import torch

    return (
        type(value) is torch.Tensor
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and not value.requires_grad
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
        and not value.__dict__
    )
