"""What a prompt and a replica's cache have in common, told by hashes of blocks.

The hashes are the block manager's own (`hash_block`): chained, so equal hashes mean equal prefixes,
and with the request's cache_salt in the first one. So a prompt's leading hashes that a replica
knows are exactly the blocks that it need not compute. That takes token ids, and only the front has
encoded the prompt when a replica is chosen; a hash of the text would guess where blocks end.

On the way, a hash is its lowest 32 bits. A cache of 15,000 blocks is then 60 kB. A block that is
not there looks as if it were with a chance of 15,000 / 2**32, which is 3.5e-6. That would cost a
prompt its better place, and never a wrong text: the engine compares whole hashes, and the tokens.
Taught in notebooks/15_a_fleet.ipynb.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence

from minivllm.engine.block_manager import hash_block

_MASK = 0xFFFFFFFF


def prompt_hashes(
    token_ids: Sequence[int], block_size: int, cache_salt: str | None = None
) -> list[int]:
    """The hashes of a prompt's full blocks, each its lowest 32 bits.

    The last token is always computed, so a block that ends with it does not count.
    """
    found: list[int] = []
    previous: int | None = None
    keys = () if cache_salt is None else (cache_salt,)
    for end in range(block_size, len(token_ids), block_size):
        block = token_ids[end - block_size : end]
        previous = hash_block(previous, block, keys if previous is None else ())
        found.append(previous & _MASK)
    return found


def pack_hashes(hashes: Iterable[int]) -> bytes:
    """A summary of a cache: 4 bytes per block. hashes: `hash_block`'s, of 128 bits."""
    return array("I", sorted({block_hash & _MASK for block_hash in hashes})).tobytes()


def unpack_hashes(summary: bytes) -> frozenset[int]:
    """The hashes of a summary, 32 bits each."""
    return frozenset(array("I", summary))


def num_leading(hashes: Sequence[int], known: Collection[int]) -> int:
    """How many of a prompt's blocks, from its first one on without a gap, are known."""
    for count, block_hash in enumerate(hashes):
        if block_hash not in known:
            return count
    return len(hashes)
