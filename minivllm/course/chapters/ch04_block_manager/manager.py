"""The block manager that 04.6 asks for, with its usual mistakes: each slip is one."""

from __future__ import annotations

from collections import OrderedDict, abc

from minivllm.engine.block_manager import hash_block
from minivllm.engine.sequence import PENDING, Sequence


class Manager:
    """What 04.6 asks for. slips: names of mistakes that its methods make on purpose."""

    slips: frozenset[str] = frozenset()

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))
        self.names: list[int | None] = [None] * num_blocks
        self.tokens: list[tuple[int, ...]] = [()] * num_blocks
        self.where: dict[int, int] = {}
        self.revived: set[int] = set()
        self.looked: dict[tuple[int, int], tuple[Sequence, list[int]]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks)

    # --- names ------------------------------------------------------------------------------------

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        known = seq.num_tokens - seq.has_pending_token
        for index in range(len(seq.block_hashes), known // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens and "last token alone unknown" not in self.slips:
                break
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            if "unchained" in self.slips:
                previous = None
            seq.block_hashes.append(hash_block(previous, tokens))

    def _is_off(self, seq: Sequence) -> bool:
        if not self.enable_prefix_caching and "never off" not in self.slips:
            return True
        if seq.num_preemptions and "preempted finds nothing" in self.slips:
            return True
        wants = seq.params.prompt_logprobs is not None
        if "logprobs 0 is none" in self.slips:
            wants = bool(seq.params.prompt_logprobs)
        return wants and "logprobs ignored" not in self.slips

    # --- find_cached_prefix -----------------------------------------------------------------------

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        if self._is_off(seq):
            return []
        if not {"find does not extend", "nobody extends"} & self.slips:
            self._extend_names(seq)
        most, found = self._most(seq), []
        if "names as they are" in self.slips:
            most = min(most, len(seq.block_hashes))
        for index in range(most):
            block = self.where.get(seq.block_hashes[index])
            used = "only free ones found" in self.slips and block is not None and self.counts[block]
            if used or block is None or not self._agree(self.tokens[block], seq, index):
                if "after a miss" in self.slips:
                    continue
                break
            found.append(block)
        if "counted when found" in self.slips:
            for block in found:
                self.counts[block] += 1
        if "looks once" in self.slips:
            _, found = self.looked.setdefault((id(seq), seq.num_tokens), (seq, found))
        return found[:-1] if "last hit given up" in self.slips else found

    def _most(self, seq: Sequence) -> int:
        """How many blocks of seq may come from the cache."""
        if "served whole" in self.slips:
            return seq.num_tokens // self.block_size
        if "one block less" in self.slips:
            return seq.num_tokens // self.block_size - 1
        spare = 2 if "two tokens left" in self.slips else 1
        return (seq.num_tokens - spare) // self.block_size

    def _agree(self, known: tuple[int, ...], seq: Sequence, index: int) -> bool:
        mine = self._tokens_of(seq, index)
        if "name trusted" in self.slips:
            return True
        if "first token compared" in self.slips:
            return known[0] == mine[0]
        if "last token compared" in self.slips:
            return known[-1] == mine[-1]
        if "ends compared" in self.slips:
            return (known[0], known[-1]) == (mine[0], mine[-1])
        if "tokens sorted" in self.slips:
            return sorted(known) == sorted(mine)
        if "first block compared" in self.slips and index:
            return True
        if "first block not compared" in self.slips and not index:
            return True
        return known == mine

    # --- allocate ---------------------------------------------------------------------------------

    def allocate(
        self, seq: Sequence, num_tokens: int, cached_prefix: abc.Sequence[int] = ()
    ) -> bool:
        num_new = self._missing(seq, num_tokens, cached_prefix)
        if "prefix first" in self.slips:
            self._take_prefix(seq, cached_prefix)
        if not self._is_room(num_new, cached_prefix):
            return False
        if "prefix first" not in self.slips:
            self._take_prefix(seq, cached_prefix)
        for _ in range(num_new):
            if not self.free_blocks and "until there are none" in self.slips:
                return False
            self._take_new(seq)
        if "named when allocated" in self.slips:
            self.register_computed(seq, 0, num_tokens)
        return True

    def _missing(self, seq: Sequence, num_tokens: int, prefix: abc.Sequence[int]) -> int:
        needed = -(-num_tokens // self.block_size)
        if "one block more" in self.slips:
            needed = num_tokens // self.block_size + 1
        if "rounded down" in self.slips:
            needed = num_tokens // self.block_size
        if "table not counted" not in self.slips:
            needed -= len(seq.block_table)
        return needed if "prefix not counted" in self.slips else needed - len(prefix)

    def _is_room(self, num_new: int, prefix: abc.Sequence[int]) -> bool:
        if {"until there are none", "never looks"} & self.slips:
            return True
        revived = [block for block in prefix if self.counts[block] == 0]
        if "revived not counted" in self.slips or "prefix first" in self.slips:
            revived = []
        if "all revived" in self.slips:
            revived = list(prefix)
        room = len(self.free_blocks)
        if "cached are not free" in self.slips:
            room = sum(self.names[block] is None for block in self.free_blocks)
        if "one to spare" in self.slips and num_new > 0:
            room -= 1
        return max(num_new, 0) + len(revived) <= room

    def _take_prefix(self, seq: Sequence, prefix: abc.Sequence[int]) -> None:
        for block in prefix:
            counted = "sharing not counted" in self.slips and self.counts[block] > 0
            if not counted and "counted when found" not in self.slips:
                self.counts[block] += 1
            if "stays in the queue" not in self.slips:
                if block in self.free_blocks:
                    self.revived.add(block)
                self.free_blocks.pop(block, None)
            seq.block_table.append(block)

    def _take_new(self, seq: Sequence) -> None:
        if "smallest number" in self.slips:
            for block in sorted(self.free_blocks, key=lambda b: (self.names[b] is not None, b)):
                self.free_blocks.move_to_end(block)
        block, _ = self.free_blocks.popitem(last="newest first" in self.slips)
        name = self.names[block]
        if name is not None and "old name stays" not in self.slips:
            if not {"still found", "block of the name stays"} & self.slips:
                self.where.pop(name, None)
            if "name not cleared" not in self.slips:
                self.names[block] = None
            if not {"still found", "name not cleared"} & self.slips:
                self.tokens[block] = ()
        self.counts[block] = 0 if "no owner" in self.slips else 1
        seq.block_table.append(block)

    # --- register_computed ------------------------------------------------------------------------

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        if not self.enable_prefix_caching and "never off" not in self.slips:
            return
        if not {"register does not extend", "nobody extends"} & self.slips:
            self._extend_names(seq)
        for index in self._full(seq, start, end):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self._may_name(block, name):
                self.names[block] = name
                if "tokens not kept" not in self.slips:
                    self.tokens[block] = self._tokens_of(seq, index)
                if "twin named" not in self.slips or name not in self.where:
                    self.where[name] = block

    def _full(self, seq: Sequence, start: int, end: int) -> range:
        """Indices of the blocks that are full since this step."""
        size = self.block_size
        first, last = start // size, end // size
        if "one block per call" in self.slips:
            last = min(last, first + 1)
        if "from the next block" in self.slips:
            first = -(-start // size)
        if "from the beginning" in self.slips:
            first = 0
        if "not the first block" in self.slips:
            first += 1
        if "one token late" in self.slips:
            last = (end - 1) // size
        if "started blocks" in self.slips:
            last = -(-end // size)
        if "up to the last token" in self.slips:
            last = min(len(seq.block_table), len(seq.block_hashes))
        if {"names as they are", "started blocks"} & self.slips:
            last = min(last, len(seq.block_hashes))
        if "prompt only" in self.slips:
            last = min(last, seq.num_prompt_tokens // size)
        return range(first, last)

    def _may_name(self, block: int, name: int) -> bool:
        if "newest takes the name" in self.slips:
            return self.names[block] is None
        if "twin named" in self.slips:
            return self.names[block] is None
        return self.names[block] is None and name not in self.where

    # --- free -------------------------------------------------------------------------------------

    def free(self, seq: Sequence) -> None:
        table = seq.block_table if "head first" in self.slips else seq.block_table[::-1]
        if "cleared before" in self.slips:
            table = []
        for block in table:
            self.counts[block] = 0 if "no count" in self.slips else self.counts[block] - 1
            at_once = "freed at once" in self.slips and block not in self.free_blocks
            if at_once or self.counts[block] == 0:
                self._put_back(block)
        seq.block_table.clear()

    def _put_back(self, block: int) -> None:
        if "forgets" in self.slips and self.names[block] is not None:
            self.where.pop(self.names[block], None)
            self.names[block], self.tokens[block] = None, ()
        self.free_blocks[block] = None
        to_the_front = self.names[block] is None
        if "one queue" in self.slips:
            to_the_front = False
        if "all to the front" in self.slips:
            to_the_front = True
        if "named to the front" in self.slips:
            to_the_front = self.names[block] is not None
        if "revived to the front" in self.slips and block in self.revived:
            to_the_front = True
        if to_the_front:
            self.free_blocks.move_to_end(block, last=False)
