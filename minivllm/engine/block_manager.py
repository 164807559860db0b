"""The block manager: which sequence owns which KV blocks, and which blocks can be shared.

Plain Python, no tensors.

The KV cache is an array of blocks of `block_size` tokens. A sequence's `block_table` lists its
blocks in order, so its token at position p lies in ``block_table[p // block_size]`` at offset
``p % block_size`` (PagedAttention: Kwon et al., 2023, arXiv 2309.06180). Taught in
notebooks/04_block_manager.ipynb.

A block is in one of three states:

    used    ref_count >= 1: that many sequences have it in their table
    cached  ref_count == 0, but its content is known by hash: free to take, worth keeping
    free    ref_count == 0, content unknown

Prefix caching: a full block is registered under a hash of its tokens, chained to the hash of the
block before it. The chain is needed because keys and values depend on all earlier tokens. So equal
hashes mean equal *prefixes*. A sequence's extra keys (its cache_salt) go into the first hash, and
the chain carries them into all later hashes.

Shared blocks are full, so they are never written again, and no copy-on-write is needed: a sequence
appends only to blocks of its own.
"""

from array import array
from collections import OrderedDict, abc
from dataclasses import dataclass

import xxhash

from minivllm.engine.sequence import PENDING, Sequence


def hash_block(
    previous_hash: int | None, token_ids: abc.Sequence[int], extra_keys: abc.Sequence[str] = ()
) -> int:
    """Hash a block's tokens, chained to the hash of the block before it. Returns 128 bits.

    previous_hash: None for the first block. extra_keys: what else must be equal for the block to be
    shared, such as a request's cache_salt. Only the first block hashes them; the chain carries them
    into the hashes of the later blocks.
    """
    hasher = xxhash.xxh3_128()
    if previous_hash is not None:
        hasher.update(previous_hash.to_bytes(16, "little"))
    # Each key is hashed with its length, so that ("ab", "c") differs from ("a", "bc").
    for key in extra_keys:
        # "surrogatepass": a key may hold half of a surrogate pair.
        encoded = key.encode("utf-8", "surrogatepass")
        hasher.update(b"key" + len(encoded).to_bytes(8, "little") + encoded)
    hasher.update(array("q", token_ids).tobytes())
    return hasher.intdigest()


@dataclass(slots=True)
class Block:
    block_id: int
    ref_count: int = 0
    #: Set together with `token_ids` when the block is registered in the prefix cache.
    block_hash: int | None = None
    token_ids: tuple[int, ...] = ()


class BlockManager:
    """Hand out blocks, share full ones, and keep freed ones until their space is needed."""

    #: Whether sequences share blocks only if their `extra_keys` are equal. A block manager without
    #: this attribute counts as one that ignores `extra_keys`: the engine then refuses requests with
    #: a cache_salt.
    supports_extra_keys = True

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        #: Blocks with ref_count 0, in order of eviction: blocks of unknown content first, then the
        #: least recently used.
        self.free_blocks: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_blocks))
        self.hash_to_block: dict[int, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_free_blocks(self) -> int:
        """The number of blocks that can be allocated now, cached ones included."""
        return len(self.free_blocks)

    @property
    def num_cached_blocks(self) -> int:
        """The number of free blocks whose content the prefix cache still knows."""
        return sum(self.blocks[i].block_hash is not None for i in self.free_blocks)

    @property
    def cached_blocks(self) -> list[int]:
        """The free blocks whose content the prefix cache still knows, in order of eviction."""
        return [i for i in self.free_blocks if self.blocks[i].block_hash is not None]

    @property
    def registered_blocks(self) -> list[int]:
        """The blocks in the prefix cache, those in use included, in ascending order."""
        return sorted(self.hash_to_block.values())

    def num_blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold num_tokens tokens: the quotient, rounded up."""
        return -(-num_tokens // self.block_size)

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Return the block ids of the longest cached prefix of seq. Changes no block.

        The prefix ends at the first miss; blocks that are cached beyond the miss do not count. At
        least the last token of seq is left to compute: without it there would be no logits to
        sample from.
        """
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        found: list[int] = []
        self.extend_hashes(seq)
        for index in range((seq.num_tokens - 1) // self.block_size):
            block_id = self.hash_to_block.get(seq.block_hashes[index])
            if block_id is None or self.blocks[block_id].token_ids != self._tokens_of_block(
                seq, index
            ):
                break
            found.append(block_id)
        return found

    def allocate(
        self, seq: Sequence, num_tokens: int, cached_prefix: abc.Sequence[int] = ()
    ) -> bool:
        """Grow seq's block table until it holds num_tokens tokens, or change nothing.

        cached_prefix: block ids from `find_cached_prefix`, for a sequence whose table is empty.
        They become the start of the table. Returns False, and changes nothing, if there are too few
        free blocks.
        """
        num_new = self.num_blocks_for(num_tokens) - len(seq.block_table) - len(cached_prefix)
        if num_new <= 0 and not cached_prefix:
            return True
        # A cached block with ref_count 0 counts as free. Once the prefix takes it, it is no longer
        # available.
        num_revived = sum(self.blocks[i].ref_count == 0 for i in cached_prefix)
        if num_new + num_revived > len(self.free_blocks):
            return False
        for block_id in cached_prefix:
            self.blocks[block_id].ref_count += 1
            self.free_blocks.pop(block_id, None)
            seq.block_table.append(block_id)
        for _ in range(num_new):
            block_id, _ = self.free_blocks.popitem(last=False)
            self._forget(self.blocks[block_id])
            self.blocks[block_id].ref_count = 1
            seq.block_table.append(block_id)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """Register the full blocks of seq, now that its tokens from start to end are computed.

        From here on other sequences can share these blocks.
        """
        first, last = start // self.block_size, end // self.block_size
        if first == last or not self.enable_prefix_caching:
            return
        self.extend_hashes(seq)
        for index in range(first, last):
            block, block_hash = self.blocks[seq.block_table[index]], seq.block_hashes[index]
            # Two sequences may compute equal blocks in the same step. The block that is registered
            # first serves both.
            if block.block_hash is None and block_hash not in self.hash_to_block:
                block.block_hash, block.token_ids = block_hash, self._tokens_of_block(seq, index)
                self.hash_to_block[block_hash] = block.block_id

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq. Registered ones stay cached until their space is needed."""
        # From the last block to the first, so that the end of a prefix is evicted before its
        # beginning: the end is useless without the beginning.
        self.trim(seq, 0)

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Give back the blocks of seq that its first num_tokens tokens do not need."""
        num_kept = self.num_blocks_for(num_tokens)
        while len(seq.block_table) > num_kept:
            block = self.blocks[seq.block_table.pop()]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_blocks[block.block_id] = None
                if block.block_hash is None:
                    self.free_blocks.move_to_end(block.block_id, last=False)

    def extend_hashes(self, seq: Sequence) -> None:
        """Add the missing hashes to seq.block_hashes: one per full block of known tokens."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            token_ids = self._tokens_of_block(seq, index)
            # With a step planned ahead, the last two tokens may both be unknown.
            if token_ids[-1] == PENDING:
                break
            if seq.block_hashes:
                seq.block_hashes.append(hash_block(seq.block_hashes[-1], token_ids))
            else:
                seq.block_hashes.append(hash_block(None, token_ids, seq.extra_keys))

    def reset_prefix_cache(self) -> None:
        """Forget the content of all blocks. Blocks in use stay in use."""
        for block in self.blocks:
            self._forget(block)

    def check(self, sequences: abc.Sequence[Sequence]) -> None:
        """Raise AssertionError if an invariant is broken. sequences: all that may own blocks."""
        references = [0] * self.num_blocks
        for seq in sequences:
            assert len(set(seq.block_table)) == len(seq.block_table), (
                f"sequence {seq.seq_id} lists a block twice"
            )
            assert len(seq.block_table) * self.block_size >= seq.num_computed_tokens, (
                "computed tokens without a block"
            )
            for block_id in seq.block_table:
                references[block_id] += 1
        for block in self.blocks:
            assert block.ref_count == references[block.block_id], (
                f"block {block.block_id}: wrong reference count"
            )
            assert (block.ref_count == 0) == (block.block_id in self.free_blocks), (
                f"block {block.block_id}: leaked"
            )
            if block.block_hash is None:
                assert block.token_ids == (), f"block {block.block_id}: tokens without a hash"
            else:
                assert self.hash_to_block[block.block_hash] == block.block_id, (
                    "a registered block is not in the table"
                )
                assert len(block.token_ids) == self.block_size, (
                    "a block that is not full was registered"
                )
                assert PENDING not in block.token_ids, (
                    "a block with an unknown token was registered"
                )
        for block_hash, block_id in self.hash_to_block.items():
            assert self.blocks[block_id].block_hash == block_hash, (
                "the hash of an evicted block is still in the table"
            )

    def _tokens_of_block(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _forget(self, block: Block) -> None:
        if block.block_hash is not None:
            del self.hash_to_block[block.block_hash]
            block.block_hash, block.token_ids = None, ()
