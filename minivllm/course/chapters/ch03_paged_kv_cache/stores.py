"""Storing keys and values in a paged cache, right and with the usual mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minivllm.course.chapters.ch03_paged_kv_cache.common import SIZES

if TYPE_CHECKING:
    import torch

#: (cache, slots, rows): changes the cache.
Put = Callable[..., None]
#: (rows, slots) -> those that are stored.
Choose = Callable[..., tuple]


def put(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows to slots, one after the other, as a loop would."""
    size = cache.shape[2]
    for slot, row in zip(slots.tolist(), rows, strict=True):
        cache[slot // size, :, slot % size] = row


def put_in_blocks_of(size_of: Callable[[torch.Size], int]) -> Put:
    """As `put`, with another block size, which may depend on the cache's shape."""

    def wrong(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        size = size_of(cache.shape)
        for slot, row in zip(slots.tolist(), rows, strict=True):
            cache[slot // size, :, slot % size] = row

    return wrong


def put_in_copy(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Write to what a reshape gives: a view only where there is a single KV head."""
    cache.transpose(1, 2).reshape(-1, *cache.shape[1::2])[slots] = rows


def put_tokens_first(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Take a block to be ``[block_size, KV heads, head_dim]``."""
    cache.view(-1, *cache.shape[1::2])[slots] = rows


def put_nowhere(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Leave the cache as it is."""


def wanted(rows: torch.Tensor, slots: torch.Tensor) -> tuple:
    return rows[slots >= 0], slots[slots >= 0]


def until_padding(rows: torch.Tensor, slots: torch.Tensor) -> tuple:
    count = next((i for i, slot in enumerate(slots.tolist()) if slot < 0), len(slots))
    return rows[:count], slots[:count]


def out_of_step(rows: torch.Tensor, slots: torch.Tensor) -> tuple:
    slots = slots[slots >= 0]
    return rows[: len(slots)], slots


@dataclass(frozen=True)
class Store:
    """Store keys and values. choose: the tokens that are stored; keys, values: how they are put."""

    choose: Choose = wanted
    keys: Put = put
    values: Put = put
    #: What goes to the key cache and to the value cache: 0 is the keys, 1 the values.
    sources: tuple[int, int] = (0, 1)

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        caches = (k_cache, self.keys), (v_cache, self.values)
        for source, (cache, put_rows) in zip(self.sources, caches, strict=True):
            rows, slots = self.choose((key, value)[source], slot_mapping)
            put_rows(cache, slots, rows)


def in_other_blocks() -> tuple[Store, ...]:
    """All that take a number of their own, or another part of the shape, for the block size."""
    sizes = [lambda shape, axis=axis: shape[axis] for axis in (0, 1, 3)]
    sizes += [lambda shape, size=size: size for size in SIZES]
    sizes += [lambda shape, most=most: min(most, shape[2]) for most in (8, 16, 32)]
    puts = [put_in_blocks_of(size) for size in sizes]
    return tuple(Store(keys=wrong, values=wrong) for wrong in puts)
