"""What the exercises of chapter 10 share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def close(one: float, other: float, tolerance: float = 0.01) -> bool:
    return math.isclose(one, other, rel_tol=tolerance)
