"""What the exercises of chapter 03 share."""

from __future__ import annotations

import re
from collections import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.guard import guarded
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    pass


#: A block that is none: what stands in it lies before the cache, in the poison of a guarded tensor.
NO_BLOCK = -1


#: What a block size is taken to be by somebody who writes a number.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def the_diagnose(
    answer: Callable, cases: abc.Sequence[tuple], right: Callable, suspects: dict, **more: Any
) -> int:
    """`diagnose`, without the numbers of tensors: of keys and values the shape says enough, and
    the table is seen.
    """
    try:
        return diagnose(answer, cases, right, suspects, **more)
    except Mistake as mistake:
        message = re.sub(r"= (float32 \[[\d, ]+\]) \([^()]*\)", r"= \1", mistake.message)
        raise Mistake(mistake.name, message) from mistake.__cause__


def the_pages(
    contexts: abc.Sequence[int],
    kv_heads: int,
    dim: int,
    size: int,
    seed: int,
    junk: str = "nan",
    stale: str = "other",
    width: int = 0,
) -> tuple:
    """Caches, block table ``[B, …]`` and contexts ``[B]``.

    junk: what is in slots that hold no token, "nan" or "numbers". stale: table entries that no
    context needs, "other" (a block that belongs to nobody) or "none" (no block at all).
    """
    import torch

    random = seeded(seed)
    needed = [-(-context // size) for context in contexts]
    total = sum(needed) + 2  # the first and the last are nobody's
    k_cache, v_cache = (guarded(total, kv_heads, size, dim) for _ in range(2))
    for cache in (k_cache, v_cache):
        if junk == "numbers":
            cache.copy_(torch.randn(cache.shape, generator=random) * 3)
    order = torch.randperm(total - 2, generator=random).int() + 1
    full = torch.full(
        (len(contexts), max(1, width, max(needed, default=1)) + 4), NO_BLOCK, dtype=torch.int32
    )
    table = full[:, :-2]
    if stale == "other":
        table[:] = total - 1
    for i, context in enumerate(contexts):
        table[i, : needed[i]] = order[sum(needed[:i]) : sum(needed[: i + 1])]
        for p in range(context):
            for cache in (k_cache, v_cache):
                cache[table[i, p // size], :, p % size] = torch.randn(
                    kv_heads, dim, generator=random
                )
    return k_cache, v_cache, table, torch.tensor(contexts, dtype=torch.int32)
