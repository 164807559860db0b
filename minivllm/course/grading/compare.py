"""Compare two values, and say in few words how they differ."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def show(value: Any, limit: int = 6) -> str:
    """A value in a few characters: for a tensor its dtype, shape and first numbers."""
    if is_tensor(value):
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        numbers = value.detach().flatten()[: limit + 1].tolist()
        texts = [f"{x:.5g}" if isinstance(x, float) else str(x) for x in numbers[:limit]]
        return f"{kind} ({', '.join(texts)}{', …' if len(numbers) > limit else ''})"
    if isinstance(value, tuple | list):
        text = ", ".join(
            [show(item, limit) for item in value[:limit]] + ["…"] * (len(value) > limit)
        )
        return f"({text})" if isinstance(value, tuple) else f"[{text}]"
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        # A count may differ from another in its last digits only.
        text = text if float(text) == value else str(int(value))
    return text if len(text) <= 120 else f"{text[:119]}…"


def is_tensor(value: Any) -> bool:
    """Whether value is a tensor; does not import torch."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def difference(
    got: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5
) -> tuple[str, str] | None:
    """Compare two values. None where they agree, else (mistake's name, what differs).

    The names are wrong-type, wrong-shape, wrong-dtype and wrong-values. Tensors agree in dtype,
    shape and, within the tolerances, in their numbers (NaN agrees with NaN). Floats agree within
    the tolerances. Lists, tuples and dicts are compared item by item, everything else with `==`.
    """
    if got is expected or (type(got) is type(expected) is int and got == expected):
        return None  # a check compares millions of numbers: the rest is for what may differ
    if is_tensor(expected):
        return _tensor_difference(got, expected, rtol, atol)
    if isinstance(expected, tuple | list):
        return _sequence_difference(got, expected, rtol, atol)
    if isinstance(expected, dict):
        return _dict_difference(got, expected, rtol, atol)
    if is_tensor(got) and got.numel() == 1:
        got = got.item()
    if isinstance(expected, float) and isinstance(got, int | float):
        # An infinite number is near to nothing but itself.
        near = math.isfinite(expected) and abs(got - expected) <= atol + rtol * abs(expected)
        same = near or got == expected or (math.isnan(got) and math.isnan(expected))
    else:
        same = bool(got == expected)
    return None if same else ("wrong-values", f"got {show(got)}, expected {show(expected)}")


def _sequence_difference(
    got: Any, expected: Sequence[Any], rtol: float, atol: float
) -> tuple[str, str] | None:
    if not isinstance(got, tuple | list):
        return "wrong-type", f"got {_kind(got)}, expected {_kind(expected)} of {len(expected)}"
    if len(got) != len(expected):
        return (
            "wrong-values",
            f"got {len(got)} items, {show(got)}, expected {len(expected)}, {show(expected)}",
        )
    for index, (mine, right) in enumerate(zip(got, expected, strict=True)):
        if found := difference(mine, right, rtol, atol):
            return found[0], f"item {index}: {found[1]}"
    return None


def _dict_difference(got: Any, expected: dict, rtol: float, atol: float) -> tuple[str, str] | None:
    if not isinstance(got, dict):
        return "wrong-values", f"got {show(got)}, expected {show(expected)}"
    keys = {
        "missing": expected.keys() - got.keys(),
        "not asked for": got.keys() - expected.keys(),
    }
    if said := [
        f"{what}: {', '.join(sorted(map(repr, some)))}" for what, some in keys.items() if some
    ]:
        return "wrong-values", f"the keys differ ({'; '.join(said)})"
    for key in expected:
        if found := difference(got[key], expected[key], rtol, atol):
            return found[0], f"{key}: {found[1]}"
    return None


def _tensor_difference(
    got: Any, expected: torch.Tensor, rtol: float, atol: float
) -> tuple[str, str] | None:
    import torch

    if not isinstance(got, torch.Tensor):
        hint = " (is a `return` missing?)" if got is None else ""
        return "wrong-type", f"got {_kind(got)}{hint}, expected a tensor {show(expected)}"
    if got.shape != expected.shape:
        return "wrong-shape", f"got the shape {list(got.shape)}, expected {list(expected.shape)}"
    if got.dtype != expected.dtype:
        return "wrong-dtype", f"got {got.dtype}, expected {expected.dtype}"
    if expected.dtype.is_floating_point or expected.dtype.is_complex:
        wrong = ~torch.isclose(got.cpu(), expected.cpu(), rtol=rtol, atol=atol, equal_nan=True)
    else:
        # A slot, a position or a token is right or wrong; no tolerance.
        wrong = got.cpu() != expected.cpu()
    if not wrong.any():
        return None
    where = wrong.nonzero()[0].tolist()
    mine, right = got[tuple(where)].item(), expected[tuple(where)].item()
    count = (
        f"{int(wrong.sum())} of {wrong.numel()} numbers differ, the first at {where}: "
        if where
        else ""
    )
    return "wrong-values", f"{count}got {show(mine)}, expected {show(right)}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def shares_memory(result: Any, args: tuple) -> bool:
    """Whether a returned value is, holds or looks into one of the arguments."""
    if isinstance(result, tuple | list):
        return any(result is arg for arg in args) or any(shares_memory(r, args) for r in result)
    if is_tensor(result):
        storages = {arg.untyped_storage().data_ptr() for arg in args if is_tensor(arg)}
        return result.untyped_storage().data_ptr() in storages
    return any(result is arg for arg in args)
