"""What the exercises of chapter 04 share."""

from __future__ import annotations

from collections import abc

from minivllm.engine.block_manager import hash_block


def the_names(tokens: abc.Sequence[int], size: int) -> list[int]:
    names: list[int] = []
    for start in range(0, len(tokens) - size + 1, size):
        names.append(hash_block(names[-1] if names else None, tokens[start : start + size]))
    return names
