"""CUDA graphs of the decode step: one launch from running slots to their next tokens.

A decode step consists of some hundred small kernels. Launching them one by one from Python takes
longer than running them. So a graph is recorded once for each of a few batch sizes, and then
replayed as a whole. The addresses in a graph are fixed, so the data that changes from step to step
lies in tensors that stay in place (`DecodeState`): block tables, positions, last tokens. The graph
reads these tensors and advances them itself. The CPU sends only the slots that run and the blocks
that are new.

With speculative decoding a second set of graphs verifies up to k proposals per slot. All rows of a
graph have k + 1 tokens; a slot with fewer proposals has padding in front of them, which writes
nothing and sees only earlier tokens.

A batch is padded to the next recorded size. A padded row stands for the spare slot: its context is
0 tokens long, and its K and V are written nowhere (slot_mapping -1), so it cannot change the other
rows. Taught in notebooks/08_cuda_graphs.ipynb.
"""

from __future__ import annotations

import bisect
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from minivllm.layers.attention import AttentionMetadata

#: In place of a proposal where a slot has fewer of them than others.
NO_PROPOSAL = -1


@dataclass(frozen=True)
class DecodeState:
    """What the GPU knows about each slot: N slots and, as the last entry, the spare one."""

    block_table: torch.Tensor  # [N + 1, max_blocks] int32
    position: torch.Tensor  # [N + 1] int64: the position of the token to compute next
    last_token: torch.Tensor  # [N + 1] int64: the token to compute next

    @staticmethod
    def empty(num_slots: int, max_blocks: int, device: torch.device) -> DecodeState:
        """A state of zeros."""
        table = torch.zeros(num_slots + 1, max_blocks, dtype=torch.int32, device=device)
        return DecodeState(table, *torch.zeros(2, num_slots + 1, dtype=torch.int64, device=device))

    def decode_metadata(
        self, slots: torch.Tensor, block_size: int, max_seq_len: int
    ) -> AttentionMetadata:
        """Metadata of a step with one token per slot, each at the position of its slot.

        slots: [B] int64. max_seq_len: an upper bound of the context lengths of all these slots.
        """
        is_real, position = slots < len(self.position) - 1, self.position[slots]
        block_table = self.block_table[slots]
        block = block_table.gather(1, (position // block_size)[:, None])[:, 0]
        return AttentionMetadata(
            query_start_loc=torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device),
            seq_lens=torch.where(is_real, position + 1, 0).int(),
            block_table=block_table,
            slot_mapping=torch.where(is_real, block * block_size + position % block_size, -1),
            num_decodes=len(slots),
            max_query_len=1,
            max_seq_len=max_seq_len,
            max_decode_seq_len=max_seq_len,
        )

    def verify_metadata(
        self, slots: torch.Tensor, place: torch.Tensor, block_size: int, max_seq_len: int
    ) -> AttentionMetadata:
        """Metadata of a step with as many tokens per slot, of which the first ones may be padding.

        slots: [B] int64. place: [B, W] int64, each token's distance from the position of its slot;
        below 0 it is padding. max_seq_len: as for `decode_metadata`.
        """
        num_seqs, width = place.shape
        is_real = (slots < len(self.position) - 1)[:, None]
        position = (self.position[slots][:, None] + place).clamp_min(0)
        block_table = self.block_table[slots]
        block = block_table.gather(1, position // block_size)
        slot_mapping = torch.where(
            is_real & (place >= 0), block * block_size + position % block_size, -1
        )
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=slots.device) * width
        return AttentionMetadata(
            query_start_loc=starts,
            seq_lens=torch.where(is_real[:, 0], position[:, -1] + 1, 0).int(),
            block_table=block_table,
            slot_mapping=slot_mapping.flatten(),
            num_decodes=0,
            max_query_len=width,
            max_seq_len=max_seq_len,
            max_decode_seq_len=0,
        )

    def set_last_token(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Store the token that each slot computes next. slots, token_ids: [B] int64.

        Only the low word of `NOT_A_TOKEN` is kept, which is a valid id. This takes views and one
        write; a replacement would take one more kernel.
        """
        _low_words(self.last_token)[slots] = _low_words(token_ids)

    def advance(
        self, slots: torch.Tensor, token_ids: torch.Tensor, count: torch.Tensor | int = 1
    ) -> None:
        """Note the last of `count` new tokens per slot, [B] or for all. The spare slot stays at
        position 0.
        """
        self.set_last_token(slots, token_ids)
        self.position[slots] = torch.where(
            slots < len(self.position) - 1, self.position[slots] + count, 0
        )


def _low_words(numbers: torch.Tensor) -> torch.Tensor:
    """[N] int64 -> [N] int32: a view of the low halves (torch runs on little-endian machines)."""
    return numbers.contiguous().view(torch.int32).view(-1, 2)[:, 0]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to record.

    The sizes lie close together where steps are short. Above 64 at most a quarter of a step is
    padding.
    """
    sizes = [
        1,
        2,
        4,
        *range(8, 65, 8),
        *range(80, 129, 16),
        *range(160, 257, 32),
        *range(320, 1025, 64),
    ]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@contextmanager
def recording() -> Iterator[Callable[[Callable[[], Any]], tuple[torch.cuda.CUDAGraph, Any]]]:
    """A function that records what it is given as a graph, and returns the graph and the results.

    The graphs share one pool of memory, so the largest should be recorded first: the smaller ones
    reuse its memory. No two of them may be replayed at the same time.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        # The first run compiles kernels, which is not allowed during a recording.
        function()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may use the GPU during the recording. NCCL's watchdog does.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = function()
        return graph, results

    # Collect garbage now: during a recording the collector might release another engine's memory,
    # which would invalidate the recording.
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield record
    finally:
        if was_enabled:
            gc.enable()


class DecodeGraphs:
    """Recorded decode steps.

    step: the function to record, from slots [B] int64 to (token ids [B], hidden states
    [B, hidden_size]), all on the GPU. num_proposals: k > 0 if it also takes proposals [B, k] int64;
    its results are then [B, k + 1] and [B (k + 1), hidden_size].
    """

    def __init__(
        self,
        step: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        sizes: Sequence[int],
        spare_slot: int,
        device: torch.device,
        num_proposals: int = 0,
    ) -> None:
        self.sizes, self.spare_slot, self.num_proposals = list(sizes), spare_slot, num_proposals
        self._slots = torch.full((max(sizes),), spare_slot, dtype=torch.int64, device=device)
        self._padded: list[int] = []  # the content of `_slots`
        self._proposals = torch.full(
            (max(sizes), num_proposals), NO_PROPOSAL, dtype=torch.int64, device=device
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        torch.cuda.empty_cache()  # a recording does it, too, which would hide what it takes
        before = torch.cuda.mem_get_info(device)[0]
        try:
            with recording() as record:
                for size in tqdm(sorted(sizes, reverse=True), desc="CUDA graphs", leave=False):
                    inputs = [self._slots[:size]]
                    if num_proposals:
                        inputs.append(self._proposals[:size])
                    graph, found = record(functools.partial(step, *inputs))
                    self._graphs[size] = graph, *found
        except BaseException:
            self.release()
            raise
        torch.cuda.synchronize(device)
        # GPU memory that the recordings take.
        self.memory_bytes = max(0, before - torch.cuda.mem_get_info(device)[0])

    def release(self) -> None:
        """Destroy the recordings.

        They keep other objects alive, above all NCCL's communicators, which must end after them.
        """
        for graph, *_ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def replay(
        self, slots: Sequence[int], proposals: Sequence[Sequence[int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the step for these slots. The next replay overwrites the results.

        proposals: for each slot exactly k, if the graphs take any; `NO_PROPOSAL` in front of those
        that there are.
        """
        size = self.sizes[bisect.bisect_left(self.sizes, len(slots))]
        num_padded = size - len(slots)
        padded = [*slots, *[self.spare_slot] * num_padded]
        if padded != self._padded:
            # Empty until the copy has been started.
            self._padded = []
            self._send(padded, self._slots[:size])
            self._padded = padded
        if self.num_proposals:
            none = [NO_PROPOSAL] * self.num_proposals
            self._send([*proposals, *[none] * num_padded], self._proposals[:size])
        graph, token_ids, hidden = self._graphs[size]
        graph.replay()
        num_rows = len(slots) * (self.num_proposals + 1)
        return token_ids[: len(slots)], hidden[:num_rows]

    @staticmethod
    def _send(values: list, where: torch.Tensor) -> None:
        # Pinned memory: a copy from pageable memory first waits for all queued work of the GPU.
        where.copy_(torch.tensor(values, pin_memory=True), non_blocking=True)
