"""What the exercises of chapter 03 share: paged caches to read, and how answers are judged."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import difference
from minivllm.course.grading.diagnose import Suspects, diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.guard import guarded
from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    import torch

#: A block that is none: what stands in it lies before the cache, in the poison of a guarded tensor.
NO_BLOCK = -1
#: A block that no cache has.
NOWHERE = 1_000_000
#: What a block size is taken to be by somebody who writes a number.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def judge(
    answer: Callable,
    cases: Sequence[tuple],
    right: Callable,
    suspects: Suspects,
    *,
    closer: Callable[[], str] | None = None,
    **more: Any,
) -> int:
    """`diagnose`, with more to say about a wrong result; returns the number of cases.

    Messages show the shapes of keys and values and not their numbers. closer: for a wrong result
    that no known mistake gives; returns a line that describes it.
    """
    try:
        return diagnose(answer, cases, right, suspects, **more)
    except Mistake as mistake:
        message = re.sub(r"= (float32 \[[\d, ]+\]) \([^()]*\)", r"= \1", mistake.message)
        name = mistake.name
        if name == "wrong-values" and closer:
            rounded = "writes" not in more and _nearly_right(answer, cases, right)
            name = "low-precision" if rounded else name
            message += "\n" + (_ROUNDED if name == "low-precision" else closer())
        raise Mistake(name, message) from mistake.__cause__


_ROUNDED = (
    "Most results are nearly right, within 2 %, and not exact: somewhere your code computes in half"
    " precision.\nLook for .half(), .bfloat16(), or a dtype that you gave to a new tensor."
)


def _nearly_right(answer: Callable, cases: Sequence[tuple], right: Callable) -> bool:
    """Whether most results differ from the right ones by less than 2 %, and few are exact."""
    near = exact = 0
    for case in cases:
        got, expected = answer(*copy.deepcopy(case)), right(*copy.deepcopy(case))
        exact += difference(got, expected) is None
        near += difference(got, expected, 0.02, 0.02) is None
    return 3 * near >= 2 * len(cases) and 3 * exact <= len(cases)


def pages(
    contexts: Sequence[int],
    shape: tuple[int, int, int],
    seed: int,
    *,
    junk: str = "nan",
    stale: int | None = None,
    width: int = 0,
) -> tuple:
    """Guarded caches ``[num_blocks, *shape]``, block table ``[B, …]`` and contexts ``[B]``.

    shape: KV heads, block size, head_dim. junk: what is in slots that hold no token, "nan" or
    "numbers". stale: table entries that no context needs; None: a block that belongs to nobody. The
    table is a part of a wider one; width: its least number of entries per request.
    """
    import torch

    kv_heads, size, dim = shape
    random = seeded(seed)
    needed = [-(-context // size) for context in contexts]
    total = sum(needed) + 2  # the first and the last are nobody's
    k_cache, v_cache = (guarded(total, kv_heads, size, dim) for _ in range(2))
    for cache in (k_cache, v_cache):
        if junk == "numbers":
            cache.copy_(torch.randn(cache.shape, generator=random) * 3)
    order = torch.randperm(total - 2, generator=random).int() + 1
    entries = max(1, width, max(needed, default=1)) + 4
    table = torch.full((len(contexts), entries), NO_BLOCK, dtype=torch.int32)[:, :-2]
    table[:] = total - 1 if stale is None else stale
    for i, context in enumerate(contexts):
        table[i, : needed[i]] = order[sum(needed[:i]) : sum(needed[: i + 1])]
        tokens = torch.arange(context)
        for cache in (k_cache, v_cache):
            rows = torch.randn(context, kv_heads, dim, generator=random)
            cache[table[i].long()[tokens // size], :, tokens % size] = rows
    return k_cache, v_cache, table, torch.tensor(contexts, dtype=torch.int32)


#: What to say where `weights_seen` finds nothing.
WEIGHTS_ARE_RIGHT = (
    "With one request and one head all weights are right. Look at what is different with several"
    " requests or heads, other sizes, or large scores."
)


def weights_seen(attend: Callable[..., torch.Tensor], context: int = 11, size: int = 4) -> str:
    """A line that says which tokens have the wrong weight, with one request and one head; or "".

    attend(query, k_cache, v_cache, block_table, seq_lens, scale) gives the output ``[1, 1, D]``.
    The values of token j are 0 but for a 1 in column j, so that the output shows the weights.
    """
    import torch

    dim, scale = 1 << context.bit_length(), 0.3
    k_cache, v_cache, table, lens = pages([context], (1, size, dim), seed=7, junk="numbers")
    k_cache[..., 16:] = 0.0
    tokens = torch.arange(context)
    places = table[0].long()[tokens // size], 0, tokens % size
    v_cache.zero_()
    v_cache[..., -1] = 1.0
    v_cache[places] = torch.eye(dim)[:context]
    query = torch.randn(1, 1, dim, generator=seeded(8))
    expected = (k_cache[places] @ query[0, 0] * scale).softmax(dim=0)
    where = f"A closer look: one request with {context} tokens in blocks of {size}, one head."
    try:
        got = attend(query, k_cache, v_cache, table, lens, scale)[0, 0]
    except Exception as error:
        return f"{where} Your code raises {type(error).__name__}: {error}"
    near = 1e-3 if context < 50 else 1e-4
    wrong = [j for j in range(context) if not abs(got[j] - expected[j]) < near]
    if abs(got[-1]) > near:
        return (
            f"{where} What lies beyond the context, or in other blocks, has a weight of"
            f" {got[-1]:.4f}; it should have none."
        )
    shown = ", ".join(f"token {j} {got[j]:.4f} (right: {expected[j]:.4f})" for j in wrong[:4])
    if not wrong:
        return ""
    count = "" if len(wrong) <= 4 else f" and those of {len(wrong) - 4} tokens more"
    return f"{where} These weights are wrong: {shown}{count}."
