"""Check values against type annotations: the options of an engine, the fields of a JSON file.

A field declares its valid values in its annotation: ``seed: Annotated[int, Range(0)]``. So every
field of such a class is checked, and none can be forgotten here. Python's own rules are too lenient
for options: ``"off"`` is true, and ``True`` is the integer 1.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Bounds of a number. Both are included; with `above` the value must be greater than `low`."""

    low: float | None = None
    high: float | None = None
    above: bool = False

    def holds(self, value: float) -> bool:
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or value <= self.high

    def __str__(self) -> str:
        if self.low is None:
            return "" if self.high is None else f" of at most {self.high}"
        if self.above:
            return f" above {self.low}" + ("" if self.high is None else f" and at most {self.high}")
        return (
            f" of at least {self.low}" if self.high is None else f" from {self.low} to {self.high}"
        )


def check(value: Any, annotation: Any) -> Any:
    """Convert the value to the annotated type: NumPy's int to int, an integer to float.

    annotation: bool, int, float, str, a `Literal` of strings, one of these `Annotated` with a
    `Range`, or any of these or None. Raises ValueError with the valid values: "must be …, got …".
    """
    options = (
        get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    )
    if value is None and NoneType in options:
        return None
    [kind] = [option for option in options if option is not NoneType]
    kind, *bounds = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    converted = _convert(_plain(value), kind)
    if converted is None or not all(bound.holds(converted) for bound in bounds):
        raise ValueError(
            f"must be {_describe(kind)}{''.join(map(str, bounds))}, got {shown(value)}"
        )
    return converted


@lru_cache
def annotations_of(cls: type) -> dict[str, Any]:
    """The annotations of a class's fields, with their ranges."""
    return get_type_hints(cls, include_extras=True)


def shown(value: Any) -> str:
    """Show a value in an error message: on one line of limited length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python scalar; any other value as it is."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value


def _convert(value: Any, kind: Any) -> Any:
    """Convert the value to this type. Returns None if it does not fit."""
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else None
    if kind in (bool, str):
        return value if isinstance(value, kind) else None
    if isinstance(value, bool):
        return None
    try:
        if kind is int:
            return operator.index(value)
        number = float(value) if isinstance(value, int | float) else math.nan
    except (TypeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return {bool: "true or false", str: "text", int: "an integer", float: "a finite number"}[kind]
