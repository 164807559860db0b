"""Copies of arguments and results, guard bands included.

A check copies the arguments of each call, and tries hundreds of wrong implementations. `deepcopy`
needs 0.2 ms for a tensor of 100 numbers, because a tensor's storage is copied through Python; and
it asks of each number in a list how to copy it.
"""

from __future__ import annotations

import copy
import operator
import sys
from typing import Any

#: Types whose values cannot change, so that a copy is the value itself.
_FIXED = frozenset((bool, int, float, complex, str, bytes, type(None)))


def copied(value: Any) -> Any:
    """`copy.deepcopy` of value. Tensors that share memory share it in the copy, too."""
    memo: dict[int, Any] = {}
    if "torch" in sys.modules:
        _copy_tensors(value, memo, {})
    return _copy(value, memo)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """`deepcopy` with this memo, faster for tuples, lists and dicts."""
    kind = type(value)
    if kind in _FIXED:
        return value
    if kind not in (tuple, list, dict):
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    if kind is tuple:
        if _FIXED.issuperset(map(type, value)):
            return value
        parts = tuple([_copy(item, memo) for item in value])
        if all(map(operator.is_, parts, value)):
            return value
        # A list in it may hold the tuple itself, and has copied it then.
        return memo.setdefault(id(value), parts)
    found: Any = kind()
    memo[id(value)] = found
    if kind is dict:
        found.update((_copy(key, memo), _copy(item, memo)) for key, item in value.items())
    elif _FIXED.issuperset(map(type, value)):
        found += value
    else:
        found += [_copy(item, memo) for item in value]
    return found


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
