# %% 04.1 unchained: every block for itself
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    return [
        hash_block(None, token_ids[i * block_size : (i + 1) * block_size]) for i in range(len(token_ids) // block_size)
    ]


# %% 04.1 partial-block-named: the rest of the prompt gets a name, too
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names = []
    for start in range(0, len(token_ids), block_size):
        names.append(hash_block(names[-1] if names else None, token_ids[start : start + block_size]))
    return names


# %% 04.1 last-block-dropped: takes an exact multiple for a block that is not full
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        name = hash_block(name, token_ids[index * block_size : (index + 1) * block_size])
        names.append(name)
    return names


# %% 04.1 last-block-dropped: range ends one too early
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, name = [], None
    for start in range(0, len(token_ids) - block_size, block_size):
        name = hash_block(name, token_ids[start : start + block_size])
        names.append(name)
    return names


# %% 04.1 whole-prefix: hashes the whole beginning anew each time
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    return [hash_block(None, token_ids[:end]) for end in range(block_size, len(token_ids) + 1, block_size)]


# %% 04.1 always-the-first-name: names[0] for names[-1]
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        previous = names[0] if names else None
        names.append(hash_block(previous, token_ids[start : start + block_size]))
    return names


# %% 04.1 one-step-memory: chains to a name that was made without a chain
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, before = [], None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = token_ids[start : start + block_size]
        names.append(hash_block(before, tokens))
        before = hash_block(None, tokens)
    return names


# %% 04.1 changed-input: eats the caller's list
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names, name = [], None
    while len(token_ids) >= block_size:
        name = hash_block(name, token_ids[:block_size])
        del token_ids[:block_size]
        names.append(name)
    return names


# %% 04.1 right: a while loop, and numpy would do as well
def block_names(token_ids: list[int], block_size: int) -> list[int]:
    names = []
    end = block_size
    while end <= len(token_ids):
        names += [hash_block(names[-1] if names else None, tuple(token_ids[end - block_size : end]))]
        end += block_size
    return names


# %% 04.2 nothing-left-to-compute: all 64 are known
same_again = 64
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 less-than-a-block: all but one token
same_again = 63
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 partial-block-shared: 40 tokens are equal
same_again = 48
longer = 40
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 hit-after-a-miss: only the changed block is a miss
same_again = 48
longer = 32
changed = 48
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 less-than-a-block: twenty tokens are equal
same_again = 48
longer = 32
changed = 20
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 block-before-lost: a changed token spoils everything
same_again = 48
longer = 32
changed = 0
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 last-token-not-fed-back: 50 + 30 = 80 = five full blocks
same_again = 48
longer = 32
changed = 16
second_turn = 80
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 answer-not-cached: only prompts are cached
same_again = 48
longer = 32
changed = 16
second_turn = 48
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 nothing-shared: four times three blocks
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 12
evicted = [2, 1, 0]


# %% 04.2 half-full-block-shared: all four share the whole prompt
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 3
evicted = [2, 1, 0]


# %% 04.2 heads-first: in the order of the prompt
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [0, 1, 2]


# %% 04.2 wrong-values: miscounted
same_again = 48
longer = 48
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = [2, 1, 0]


# %% 04.2 wrong-type: how many, and not which
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = 3


# %% 04.2 wrong-values: shares the two full blocks, and counts them for each
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 8
evicted = [2, 1, 0]


# %% 04.2 right: a tuple for the list
same_again = 48
longer = 32
changed = 16
second_turn = 64
blocks_of_four = 6
evicted = (2, 1, 0)


# %% 04.3 fresh-count-zero: a fresh block has count 0, and share makes it 1
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 0
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if not all(self.counts[block] for block in blocks):
            raise ValueError(f"not all of {blocks} are in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 freed-while-shared: who releases, frees
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if not all(self.counts[block] for block in blocks):
            raise ValueError(f"not all of {blocks} are in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            self.free[block] = None


# %% 04.3 not-all-or-nothing: hands out what is left
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        taken = [self.free.popitem(last=False)[0] for _ in range(min(count, len(self.free)))]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if not all(self.counts[block] for block in blocks):
            raise ValueError(f"not all of {blocks} are in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 not-all-or-nothing: notices too late that there are too few
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        taken = []
        for _ in range(count):
            if not self.free:
                return None
            block, _ = self.free.popitem(last=False)
            self.counts[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if not all(self.counts[block] for block in blocks):
            raise ValueError(f"not all of {blocks} are in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 last-block-refused: wants one block to spare
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count >= len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if not all(self.counts[block] for block in blocks):
            raise ValueError(f"not all of {blocks} are in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 still-in-the-queue: a revived block stays on the free list
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if not all(self.counts[block] for block in blocks):
            raise ValueError(f"not all of {blocks} are in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 double-free: counts below zero
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 double-free: a second release is ignored
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        for block in reversed(blocks):
            if self.counts[block] == 0:
                continue
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 half-released: raises when half of it is done
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        for block in blocks:
            if self.counts[block] == 0:
                raise ValueError(f"{block} is not in use")
            self.counts[block] -= 1
        for block in reversed(blocks):
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 half-released: looks at a block when it comes to it, from the end
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        for block in reversed(blocks):
            if self.counts[block] == 0:
                raise ValueError(f"{block} is not in use")
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 double-free: looks at the last block only
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if blocks and self.counts[blocks[-1]] == 0:
            raise ValueError(f"{blocks[-1]} is not in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 heads-first: frees a list from its beginning
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if not all(self.counts[block] for block in blocks):
            raise ValueError(f"not all of {blocks} are in use")
        for block in blocks:
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 newest-first: a stack: the block freed last is taken first
class CountedPool:
    """Blocks by number, with a reference count each."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = [0] * num_blocks
        self.free = OrderedDict.fromkeys(reversed(range(num_blocks)))

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many owners a block has."""
        return self.counts[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take that many free blocks, each with one owner now; None, and no change, if there are fewer."""
        if count > len(self.free):
            return None
        taken = [self.free.popitem(last=True)[0] for _ in range(count)]
        for block in taken:
            self.counts[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of these blocks, free or not."""
        for block in blocks:
            self.counts[block] += 1
            self.free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """One owner less for each, the last block first. ValueError, and no change, where one has no owner."""
        if not all(self.counts[block] for block in blocks):
            raise ValueError(f"not all of {blocks} are in use")
        for block in reversed(blocks):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free[block] = None


# %% 04.3 right: a deque, and a Counter
class CountedPool:
    def __init__(self, num_blocks: int) -> None:
        self.owners = {block: 0 for block in range(num_blocks)}
        self.queue = deque(self.owners)

    @property
    def num_free(self) -> int:
        return list(self.owners.values()).count(0)

    def ref_count(self, block: int) -> int:
        return self.owners[block]

    def allocate(self, count: int) -> list[int] | None:
        if len(self.queue) < count:
            return None
        table = []
        while len(table) < count:
            table.append(self.queue.popleft())
            self.owners[table[-1]] += 1
        return table

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if not self.owners[block]:
                self.queue.remove(block)
            self.owners[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.owners[block] < 1:
                raise ValueError(block)
        for block in blocks:
            self.owners[block] -= 1
        self.queue.extend(block for block in blocks[::-1] if not self.owners[block])


# %% 04.4 nothing-left-to-compute: all full blocks
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range(len(token_ids) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found


# %% 04.4 block-given-up: always one block less
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range(len(token_ids) // block_size - 1):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found


# %% 04.4 hash-trusted: an equal name is enough
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None:
            break
        found.append(hit[0])
    return found


# %% 04.4 hit-after-a-miss: looks at every block for itself
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            continue
        found.append(hit[0])
    return found


# %% 04.4 hit-after-a-miss: a flag for each block, and the names are trusted
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is not None:
            found.append(hit[0])
    return found


# %% 04.4 unchained: forgets the name before
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(None, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found


# %% 04.4 list-against-tuple: a list never equals a tuple
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = token_ids[index * block_size : (index + 1) * block_size]
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found


# %% 04.4 nothing-left-to-compute: all full blocks, and no look at the tokens
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range(len(token_ids) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None:
            break
        found.append(hit[0])
    return found


# %% 04.4 last-hit-given-up: one block back, to be safe
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found[:-1]


# %% 04.4 last-hit-given-up: all full blocks, and one back
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range(len(token_ids) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found[:-1]


# %% 04.4 not-the-numbers: what the cache gives, as it is
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit)
    return found


# %% 04.4 not-the-numbers: the names
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(name)
    return found


# %% 04.4 block-index-for-position: the slice begins at the index of the block
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index : index + block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found


# %% 04.4 two-tokens-left: one token more than needed
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range(max(0, len(token_ids) - 2) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found


# %% 04.4 another-chain: chains to the block's number
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        name = hit[0]
        found.append(name)
    return found


# %% 04.4 another-chain: the whole beginning, hashed at once
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(None, token_ids[: (index + 1) * block_size])
        hit = cache.get(name)
        if hit is None or hit[1] != tokens:
            break
        found.append(hit[0])
    return found


# %% 04.4 hit-after-a-miss: passes over a miss, and chains to the last hit
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        hit = cache.get(hash_block(name, tokens))
        if hit is None or hit[1] != tokens:
            continue
        name = hash_block(name, tokens)
        found.append(hit[0])
    return found


# %% 04.4 hit-after-a-miss: stops at a miss, passes over a collision
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    """Numbers of the cached blocks that hold the longest usable beginning of a prompt."""
    found, name = [], None
    for index in range((len(token_ids) - 1) // block_size):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        name = hash_block(name, tokens)
        hit = cache.get(name)
        if hit is None:
            break
        if hit[1] != tokens:
            continue
        found.append(hit[0])
    return found


# %% 04.4 right: names first, then the walk
def cached_prefix(token_ids: list[int], cache: dict[int, tuple[int, tuple[int, ...]]], block_size: int) -> list[int]:
    blocks = [token_ids[i : i + block_size] for i in range(0, len(token_ids), block_size)][:-1]
    found, name = [], None
    for tokens in blocks:
        name = hash_block(name, tokens)
        block, known = cache.get(name, (None, ()))
        if list(known) != tokens:
            return found
        found.append(block)
    return found


# %% 04.5 still-in-the-queue: counts the revived ones, but leaves them in the queue
class NamedCache:
    """Blocks that can be found by what is in them. Names are strings here, to be easy to read."""

    def __init__(self, num_blocks: int) -> None:
        self.uses = [0] * num_blocks  # owners of each block
        self.queue = list(range(num_blocks))  # blocks that nobody uses, the next to be taken first
        self.names = [None] * num_blocks  # what is in each block, where that is known
        self.where = {}  # name -> block

    def look_up(self, names: list[str]) -> list[int]:
        """The blocks that hold the longest known beginning."""
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        """A table of the blocks found and num_new more; None, and no change, where there is no room."""
        revived = [block for block in found if self.uses[block] == 0]
        if num_new + len(revived) > len(self.queue):
            return None
        for block in found:
            self.uses[block] += 1
        fresh = []
        for _ in range(num_new):
            block = self.queue.pop(0)
            self.where.pop(self.names[block], None)
            self.names[block] = None
            self.uses[block] = 1
            fresh.append(block)
        return found + fresh

    def name(self, block: int, name: str) -> None:
        """Say what is in a block, now that it is computed."""
        if self.names[block] is None and name not in self.where:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        """Give a table back, its tail first."""
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


# %% 04.5 revived-not-counted: looks for room as before
class NamedCache:
    """Blocks that can be found by what is in them. Names are strings here, to be easy to read."""

    def __init__(self, num_blocks: int) -> None:
        self.uses = [0] * num_blocks  # owners of each block
        self.queue = list(range(num_blocks))  # blocks that nobody uses, the next to be taken first
        self.names = [None] * num_blocks  # what is in each block, where that is known
        self.where = {}  # name -> block

    def look_up(self, names: list[str]) -> list[int]:
        """The blocks that hold the longest known beginning."""
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        """A table of the blocks found and num_new more; None, and no change, where there is no room."""
        revived = [block for block in found if self.uses[block] == 0]
        if num_new > len(self.queue):
            return None
        for block in found:
            self.uses[block] += 1
        for block in revived:
            self.queue.remove(block)
        fresh = []
        for _ in range(num_new):
            block = self.queue.pop(0)
            self.where.pop(self.names[block], None)
            self.names[block] = None
            self.uses[block] = 1
            fresh.append(block)
        return found + fresh

    def name(self, block: int, name: str) -> None:
        """Say what is in a block, now that it is computed."""
        if self.names[block] is None and name not in self.where:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        """Give a table back, its tail first."""
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


# %% 04.5 name-outlives-content: mends only what the first picture shows
class NamedCache:
    """Blocks that can be found by what is in them. Names are strings here, to be easy to read."""

    def __init__(self, num_blocks: int) -> None:
        self.uses = [0] * num_blocks  # owners of each block
        self.queue = list(range(num_blocks))  # blocks that nobody uses, the next to be taken first
        self.names = [None] * num_blocks  # what is in each block, where that is known
        self.where = {}  # name -> block

    def look_up(self, names: list[str]) -> list[int]:
        """The blocks that hold the longest known beginning."""
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        """A table of the blocks found and num_new more; None, and no change, where there is no room."""
        revived = [block for block in found if self.uses[block] == 0]
        if num_new + len(revived) > len(self.queue):
            return None
        for block in found:
            self.uses[block] += 1
        for block in revived:
            self.queue.remove(block)
        fresh = []
        for _ in range(num_new):
            block = self.queue.pop(0)
            self.uses[block] = 1
            fresh.append(block)
        return found + fresh

    def name(self, block: int, name: str) -> None:
        """Say what is in a block, now that it is computed."""
        if self.names[block] is None and name not in self.where:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        """Give a table back, its tail first."""
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


# %% 04.5 name-outlives-content: forgets one way of two
class NamedCache:
    """Blocks that can be found by what is in them. Names are strings here, to be easy to read."""

    def __init__(self, num_blocks: int) -> None:
        self.uses = [0] * num_blocks  # owners of each block
        self.queue = list(range(num_blocks))  # blocks that nobody uses, the next to be taken first
        self.names = [None] * num_blocks  # what is in each block, where that is known
        self.where = {}  # name -> block

    def look_up(self, names: list[str]) -> list[int]:
        """The blocks that hold the longest known beginning."""
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        """A table of the blocks found and num_new more; None, and no change, where there is no room."""
        revived = [block for block in found if self.uses[block] == 0]
        if num_new + len(revived) > len(self.queue):
            return None
        for block in found:
            self.uses[block] += 1
        for block in revived:
            self.queue.remove(block)
        fresh = []
        for _ in range(num_new):
            block = self.queue.pop(0)
            self.names[block] = None
            self.uses[block] = 1
            fresh.append(block)
        return found + fresh

    def name(self, block: int, name: str) -> None:
        """Say what is in a block, now that it is computed."""
        if self.names[block] is None and name not in self.where:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        """Give a table back, its tail first."""
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


# %% 04.5 new-name-lost: forgets the other way of two
class NamedCache:
    """Blocks that can be found by what is in them. Names are strings here, to be easy to read."""

    def __init__(self, num_blocks: int) -> None:
        self.uses = [0] * num_blocks  # owners of each block
        self.queue = list(range(num_blocks))  # blocks that nobody uses, the next to be taken first
        self.names = [None] * num_blocks  # what is in each block, where that is known
        self.where = {}  # name -> block

    def look_up(self, names: list[str]) -> list[int]:
        """The blocks that hold the longest known beginning."""
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        """A table of the blocks found and num_new more; None, and no change, where there is no room."""
        revived = [block for block in found if self.uses[block] == 0]
        if num_new + len(revived) > len(self.queue):
            return None
        for block in found:
            self.uses[block] += 1
        for block in revived:
            self.queue.remove(block)
        fresh = []
        for _ in range(num_new):
            block = self.queue.pop(0)
            self.where.pop(self.names[block], None)
            self.uses[block] = 1
            fresh.append(block)
        return found + fresh

    def name(self, block: int, name: str) -> None:
        """Say what is in a block, now that it is computed."""
        if self.names[block] is None and name not in self.where:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        """Give a table back, its tail first."""
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


# %% 04.5 shared-refused: takes every found block for revived
class NamedCache:
    """Blocks that can be found by what is in them. Names are strings here, to be easy to read."""

    def __init__(self, num_blocks: int) -> None:
        self.uses = [0] * num_blocks  # owners of each block
        self.queue = list(range(num_blocks))  # blocks that nobody uses, the next to be taken first
        self.names = [None] * num_blocks  # what is in each block, where that is known
        self.where = {}  # name -> block

    def look_up(self, names: list[str]) -> list[int]:
        """The blocks that hold the longest known beginning."""
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        """A table of the blocks found and num_new more; None, and no change, where there is no room."""
        revived = found
        if num_new + len(revived) > len(self.queue):
            return None
        for block in found:
            self.uses[block] += 1
        for block in revived:
            if block in self.queue:
                self.queue.remove(block)
        fresh = []
        for _ in range(num_new):
            block = self.queue.pop(0)
            self.where.pop(self.names[block], None)
            self.names[block] = None
            self.uses[block] = 1
            fresh.append(block)
        return found + fresh

    def name(self, block: int, name: str) -> None:
        """Say what is in a block, now that it is computed."""
        if self.names[block] is None and name not in self.where:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        """Give a table back, its tail first."""
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


# %% 04.5 not-all-or-nothing: raises the counts first and then looks for room
class NamedCache:
    """Blocks that can be found by what is in them. Names are strings here, to be easy to read."""

    def __init__(self, num_blocks: int) -> None:
        self.uses = [0] * num_blocks  # owners of each block
        self.queue = list(range(num_blocks))  # blocks that nobody uses, the next to be taken first
        self.names = [None] * num_blocks  # what is in each block, where that is known
        self.where = {}  # name -> block

    def look_up(self, names: list[str]) -> list[int]:
        """The blocks that hold the longest known beginning."""
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        """A table of the blocks found and num_new more; None, and no change, where there is no room."""
        revived = [block for block in found if self.uses[block] == 0]
        for block in found:
            self.uses[block] += 1
        for block in revived:
            self.queue.remove(block)
        if num_new > len(self.queue):
            return None
        fresh = []
        for _ in range(num_new):
            block = self.queue.pop(0)
            self.where.pop(self.names[block], None)
            self.names[block] = None
            self.uses[block] = 1
            fresh.append(block)
        return found + fresh

    def name(self, block: int, name: str) -> None:
        """Say what is in a block, now that it is computed."""
        if self.names[block] is None and name not in self.where:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        """Give a table back, its tail first."""
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


# %% 04.5 right: one pass over what was found, and a check before it
class NamedCache:
    """Blocks that can be found by what is in them. Names are strings here, to be easy to read."""

    def __init__(self, num_blocks: int) -> None:
        self.uses = [0] * num_blocks  # owners of each block
        self.queue = list(range(num_blocks))  # blocks that nobody uses, the next to be taken first
        self.names = [None] * num_blocks  # what is in each block, where that is known
        self.where = {}  # name -> block

    def look_up(self, names: list[str]) -> list[int]:
        """The blocks that hold the longest known beginning."""
        found = []
        for name in names:
            if name not in self.where:
                break
            found.append(self.where[name])
        return found

    def open(self, found: list[int], num_new: int) -> list[int] | None:
        """A table of the blocks found and num_new more; None, and no change, where there is no room."""
        rest = [block for block in self.queue if block not in found]
        if len(rest) < num_new:
            return None
        self.queue = rest
        for block in found:
            self.uses[block] += 1
        fresh = []
        for _ in range(num_new):
            block = self.queue.pop(0)
            self.where.pop(self.names[block], None)
            self.names[block] = None
            self.uses[block] = 1
            fresh.append(block)
        return found + fresh

    def name(self, block: int, name: str) -> None:
        """Say what is in a block, now that it is computed."""
        if self.names[block] is None and name not in self.where:
            self.names[block], self.where[name] = name, block

    def close(self, table: list[int]) -> None:
        """Give a table back, its tail first."""
        for block in reversed(table):
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.queue.append(block)


# %% 04.6 leaked: a fresh block has count 0, and free waits for 0 after subtracting
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 0
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 nothing-returned: takes its blocks and does not say so
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 nothing-returned: says nothing where nothing is missing
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        if num_new <= 0 and not cached_prefix:
            return
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 freed-while-shared: who leaves, frees all its blocks
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if block not in self.free_blocks:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 wrong-boundary: one block more at an exact multiple
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = (num_tokens // self.block_size + 1) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 not-all-or-nothing: takes blocks until there are none
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            if not self.free_blocks:
                return False
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 forgets-when-freed: free clears what a block holds
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                self.where.pop(self.names[block], None)
                self.names[block], self.tokens[block] = None, ()
        seq.block_table.clear()


# %% 04.6 nothing-left-to-compute: a prompt may be served whole
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range(seq.num_tokens // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 hit-after-a-miss: a miss is a matter of one block
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                continue
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 unchained: names without a chain
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        num_known = seq.num_tokens - seq.has_pending_token
        for index in range(len(seq.block_hashes), num_known // self.block_size):
            previous = None
            seq.block_hashes.append(hash_block(previous, self._tokens_of(seq, index)))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 hash-trusted: a name is enough
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 name-overwritten: the newest block takes the name
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 registered-before-computed: names the blocks up to the sequence's last token
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, min(len(seq.block_table), len(seq.block_hashes))):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 registered-before-computed: names what was allocated
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        self.register_computed(seq, 0, num_tokens)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 registered-too-late: counts full blocks from where the step began
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(-(-start // self.block_size), end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 still-in-the-queue: a revived block stays on the free list
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 revived-not-counted: room is what is free now
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if num_new > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 cached-evicted-first: all freed blocks go to the front
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 cached-evicted-first: one queue for all, in order of time
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
        seq.block_table.clear()


# %% 04.6 heads-first: frees a table from its beginning
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in seq.block_table:
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 first-in-first-out: the order of eviction is that of first use
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            if block in self.free_blocks:
                del self.free_blocks[block]
                self.revived = {*getattr(self, "revived", ()), block}
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None or block in getattr(self, "revived", ()):
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 name-outlives-content: an evicted block can still be found, by its tokens
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            self.names[block] = None
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 pending-token-named: takes the last token alone for unknown
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        num_known = seq.num_tokens - seq.has_pending_token
        for index in range(len(seq.block_hashes), num_known // self.block_size):
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, self._tokens_of(seq, index)))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 nothing-returned: says nothing where there is no room
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 names-not-extended: looks for names that nobody has made
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 names-not-extended: goes through the names that are there, and none is
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        found = []
        for index, name in enumerate(seq.block_hashes[: (seq.num_tokens - 1) // self.block_size]):
            block = self.where.get(name)
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 names-not-extended: leaves it to find_cached_prefix
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 names-not-extended: names what has been named, at its registration
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        for index in range(start // self.block_size, min(end // self.block_size, len(seq.block_hashes))):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 hits-for-prompt-logprobs: serves everybody from the cache
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 caching-not-off: never looks at the switch
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 table-not-cleared: the sequence keeps its table
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)


# %% 04.6 too-few-hits: keeps the names to itself, so nobody waits for a block that is being computed
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def _names_of(self, seq: Sequence) -> list[int]:
        names = []
        for index in range(seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break
            names.append(hash_block(names[-1] if names else None, tokens))
        return names

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        names = self._names_of(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(names[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        names = self._names_of(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], names[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 changed-by-looking: takes what it finds at once
class MyBlockManager:
    """Hands out blocks, shares full ones, and keeps freed ones until their space is needed."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # in order of eviction
        self.names = [None] * num_blocks  # what is in each block: its name,
        self.tokens = [()] * num_blocks  # and its tokens
        self.where = {}  # name -> block

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now, the cached ones included."""
        return len(self.free_blocks)

    def _tokens_of(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _extend_names(self, seq: Sequence) -> None:
        """Bring seq.block_hashes up to all full blocks of seq whose tokens are known."""
        for index in range(len(seq.block_hashes), seq.num_tokens // self.block_size):
            tokens = self._tokens_of(seq, index)
            if PENDING in tokens:
                break  # sampled, but not known yet
            previous = seq.block_hashes[-1] if seq.block_hashes else None
            seq.block_hashes.append(hash_block(previous, tokens))

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        """Blocks of the longest cached prefix of seq, which leaves at least one token to compute. Changes no block."""
        if not self.enable_prefix_caching or seq.params.prompt_logprobs is not None:
            return []
        self._extend_names(seq)
        found = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self.where.get(seq.block_hashes[index])
            if block is None or self.tokens[block] != self._tokens_of(seq, index):
                break
            found.append(block)
        for block in found:
            seq.block_table.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        """Grow seq.block_table until it holds num_tokens tokens, the cached prefix first. False: no room, no change."""
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(cached_prefix)
        revived = [block for block in cached_prefix if self.counts[block] == 0]
        if max(num_new, 0) + len(revived) > len(self.free_blocks):
            return False
        for block in cached_prefix:
            self.counts[block] += 1
            self.free_blocks.pop(block, None)
            seq.block_table.append(block)
        for _ in range(num_new):
            block, _ = self.free_blocks.popitem(last=False)
            if self.names[block] is not None:
                del self.where[self.names[block]]
                self.names[block], self.tokens[block] = None, ()
            self.counts[block] = 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        """The tokens of seq from position start to end are computed: blocks that are full now can be found."""
        if not self.enable_prefix_caching:
            return
        self._extend_names(seq)
        for index in range(start // self.block_size, end // self.block_size):
            block, name = seq.block_table[index], seq.block_hashes[index]
            if self.names[block] is None and name not in self.where:
                self.names[block], self.tokens[block] = name, self._tokens_of(seq, index)
                self.where[name] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks of seq; those with a name can be found until they are taken."""
        for block in reversed(seq.block_table):
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self.free_blocks[block] = None
                if self.names[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table.clear()


# %% 04.6 not-yours: the package's, under another name
from minivllm.engine.block_manager import BlockManager


class MyBlockManager(BlockManager):
    pass


# %% 04.6 right: a set of free blocks with times of last use, and blocks as objects
class MyBlockManager:
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size, self.caching = block_size, enable_prefix_caching
        self.owners = [0] * num_blocks
        self.content = [None] * num_blocks  # (name, tokens)
        self.last_use = [0] * num_blocks
        self.clock = 0

    @property
    def num_free_blocks(self) -> int:
        return self.owners.count(0)

    def _tokens_of(self, seq: Sequence, index: int) -> list[int]:
        return seq.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _extend_names(self, seq: Sequence) -> None:
        while (len(seq.block_hashes) + 1) * self.block_size <= seq.num_tokens:
            tokens = self._tokens_of(seq, len(seq.block_hashes))
            if PENDING in tokens:
                return
            seq.block_hashes.append(hash_block(seq.block_hashes[-1] if seq.block_hashes else None, tokens))

    def _block_of(self, name: int) -> int | None:
        return next((i for i, content in enumerate(self.content) if content and content[0] == name), None)

    def find_cached_prefix(self, seq: Sequence) -> list[int]:
        found = []
        if self.caching and seq.params.prompt_logprobs is None:
            self._extend_names(seq)
            for index, name in enumerate(seq.block_hashes):
                block = self._block_of(name)
                enough = (index + 1) * self.block_size < seq.num_tokens
                if block is None or not enough or self.content[block][1] != self._tokens_of(seq, index):
                    break
                found.append(block)
        return found

    def allocate(self, seq: Sequence, num_tokens: int, cached_prefix: list[int] = ()) -> bool:
        missing = (num_tokens + self.block_size - 1) // self.block_size - len(seq.block_table) - len(cached_prefix)
        candidates = [i for i, count in enumerate(self.owners) if count == 0 and i not in cached_prefix]
        if len(candidates) < missing:
            return False
        candidates.sort(key=lambda i: (self.content[i] is not None, self.last_use[i]))
        fresh = candidates[: max(missing, 0)]
        for block in fresh:
            self.content[block] = None
        for block in [*cached_prefix, *fresh]:
            self.owners[block] += 1
            seq.block_table.append(block)
        return True

    def register_computed(self, seq: Sequence, start: int, end: int) -> None:
        if self.caching:
            self._extend_names(seq)
            for index in range(start // self.block_size, end // self.block_size):
                block, name = seq.block_table[index], seq.block_hashes[index]
                if self.content[block] is None and self._block_of(name) is None:
                    self.content[block] = (name, self._tokens_of(seq, index))

    def free(self, seq: Sequence) -> None:
        while seq.block_table:
            block = seq.block_table.pop()
            self.clock += 1
            self.last_use[block] = self.clock
            self.owners[block] -= 1
