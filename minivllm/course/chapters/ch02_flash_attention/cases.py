"""Inputs for attention of one head: ordinary ones, and those that show what ordinary ones hide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minivllm.course.grading.judges import seeded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Head:
    """Inputs of one head. about: what is special in them, in words for the learner; "": nothing."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    about: str = ""

    @property
    def args(self) -> tuple:
        """The arguments (query, key, value, scale)."""
        return self.query, self.key, self.value, self.scale


def plain(
    queries: int, keys: int, dim: int, seed: int, *, size: float = 1.0, scale: float | None = None
) -> Head:
    """Random inputs, float32. The tensors are slices of larger ones, so they are not contiguous."""
    import torch

    random = seeded(seed)
    query, key, value = (
        torch.randn(count, 2, dim, generator=random)[:, 1] for count in (queries, keys, keys)
    )
    scale = dim**-0.5 if scale is None else scale
    return Head(query * size if size != 1.0 else query, key, value, scale)


def steep(dim: int, seed: int) -> Head:
    """A prompt of 12 tokens whose scores lie far below 0, and far apart from row to row.

    Row 0: a little below -10¹². Rows 1 to 3: around -150. Rows 4 to 7: around 0, 60, 120 and 180.
    """
    import torch

    head = plain(12, 12, dim, seed)
    levels = torch.tensor([-1.001e12, *[-150.0] * 3, 0.0, 60.0, 120.0, 180.0, *[0.0] * 4])
    query, key = head.query.clone(), head.key.clone()
    key[:, 0], query[:, 0] = 1.0, levels / head.scale
    return Head(
        query,
        key,
        head.value,
        head.scale,
        "the scores of query 0 are about -10¹², those of queries 1 to 3 about -150, and those of"
        " queries 4 to 7 about 0, 60, 120 and 180",
    )


def abyss(dim: int, seed: int) -> Head:
    """A query after 19 keys whose scores are about -10¹², but for key 2, which has half of that."""
    head = plain(1, 20, dim, seed)
    query, key = head.query.clone(), head.key.clone()
    key[:, 0], key[2, 0], query[:, 0] = 1.0, 0.5, -1e12 / head.scale
    return Head(query, key, head.value, head.scale, "all scores are far below 0")


def giants(dim: int, seed: int) -> Head:
    """A chunk of 9 after 5: key 0 has a score of 200, and key 8, which queries 0 to 2 must not
    see, one of 400.
    """
    head = plain(9, 14, dim, seed)
    query, key = head.query.clone(), head.key.clone()
    key[:, 0], query[:, 0] = 0.0, 200.0 / head.scale
    key[0, 0], key[8, 0] = 1.0, 2.0
    # So large a value shows the smallest weight that a hidden key gets.
    value = head.value.clone()
    value[8] = 1e6
    return Head(
        query,
        key,
        value,
        head.scale,
        "key 0 has a score of about 200, far above the keys after it, and key 8, which queries 0 to"
        " 2 must not see, one of about 400",
    )


def long(queries: int, keys: int, dim: int, seed: int) -> Head:
    """The last tokens of a long context. The first key weighs as much as all ordinary ones, and one
    in its last quarter more, so that the maximum grows late.
    """
    import math

    head = plain(queries, keys, dim, seed)
    query, key = head.query.clone(), head.key.clone()
    key[:, 0], query[:, 0] = 0.0, math.log(keys) / head.scale
    key[0, 0], late = 1.0, keys - keys // 4
    key[late, 0] = 1.05
    about = f"the context has {keys:,} tokens, and most of the weight lies on tokens 0 and {late:,}"
    return Head(query, key, head.value, head.scale, about)


def faint(dim: int, seed: int) -> Head:
    """A chunk of 9 after 191: the second half of the past has tiny weights and huge values."""
    head = plain(9, 200, dim, seed, size=0.5)
    query, key, value = head.query.clone(), head.key.clone(), head.value.clone()
    key[:, 0], query[:, 0] = 0.0, 1.0 / head.scale
    # Tiles of up to 64 hold nothing else, too. Values of one sign add up without rounding away.
    key[96:, 0], value[96:] = -20.0, value[96:].abs() * 1e9
    about = "keys 96 to 199 have weights of about e⁻²⁰, and values of about 10⁹: they count, too"
    return Head(query, key, value, head.scale, about)
