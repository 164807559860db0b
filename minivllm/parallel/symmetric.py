"""All-reduce through memory that the GPUs of one machine share (PyTorch's symmetric memory).

Decoding adds up a few rows per layer: 8 kB per row of an 8B model. NCCL moves megabytes well, and
its start alone takes 15 µs, some seventy times per step. Where the GPUs can read each other's
memory, one kernel per rank does the same: signal the others, wait for their signals, read.

    one shot    every rank reads the parts of all ranks, and adds up everything itself
    two shots   every rank adds up its share of the rows, then reads the others' shares

With n ranks, one shot reads (n - 1)·bytes per rank and waits once; two shots read and write about
2·bytes·(n - 1) / n and wait twice. So one shot is for the smallest messages and NCCL, perhaps, for
the largest. Where the borders lie depends on the machine: the group measures at the start, and rank
0 decides for all ranks. PyTorch's operations alone, on two H200s in a CUDA graph, [rows, 4096] in
bf16, µs (NCCL / one shot / two shots): 1 row 15.7 / 6.3 / 6.3, 64 rows 21.8 / 9.5 / 8.1, 1,024 rows
54.8 / 53.1 / 32.7.
"""

from __future__ import annotations

import bisect
import logging
import os
import re
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

#: Bytes that each rank's buffer holds at most. Larger messages go through NCCL.
MOST_BYTES = 64 << 20
#: The operations read and write 16 bytes at a time.
ALIGNMENT = 16
#: What is measured: all-reduces per graph, and replays of it after one that warms up.
CALLS, REPLAYS = 8, 5

#: How long a rank waits for the others to share their memory.
PATIENCE = timedelta(seconds=30)

#: Seconds for kernels that wait for a rank that is gone to be let go.
PATIENCE_AT_END = 5.0
#: Buffers that a kernel may still read. Freeing one would wait for that kernel.
_never_freed: list[torch.Tensor] = []

Operation = Callable[[torch.Tensor], torch.Tensor]


def is_available() -> bool:
    """Whether this PyTorch and this rank's GPU have what is needed; the other ranks may not."""
    try:
        import torch.distributed._symmetric_memory as symmetric  # registers the operations

        names = ("one_shot_all_reduce_copy_out", "two_shot_all_reduce_out")
        has_operations = all(hasattr(torch.ops.symm_mem, name) for name in names)
        device, count = torch.cuda.current_device(), torch.cuda.device_count()
        reaches_all = all(
            other == device or torch.cuda.can_device_access_peer(device, other)
            for other in range(count)
        )
    except (ImportError, RuntimeError, AssertionError):
        return False
    return has_operations and reaches_all and symmetric is not None


def _c10d() -> Any:
    from torch._C import _distributed_c10d

    return _distributed_c10d


class SharedBuffer:
    """A buffer of this rank that the other ranks read, and theirs. Making it is collective.

    store: where the ranks of this group, and no others, meet. numel: of dtype. RuntimeError if the
    ranks cannot share memory.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, numel: int, dtype: torch.dtype
    ) -> None:
        c10d = _c10d()
        # The buffer is read directly; a multicast address would be made for nothing.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        # PyTorch looks groups up by name, in a table of the process. A name of our own per group
        # keeps engines apart; it need not be the same on all ranks.
        self._name = f"minivllm {uuid4().hex}"
        self._store = _FreshNumbers(store)
        self._group: Any = c10d.ProcessGroup(self._store, rank, size)
        self._group._set_group_name(self._name)
        c10d._register_process_group(self._name, self._group)
        symmetric: Any = c10d._SymmetricMemory
        symmetric.set_group_info(self._name, rank, size, self._store)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._buffer = symmetric.empty_strided_p2p((numel,), (1,), dtype, self._device)
        handle = symmetric.rendezvous(self._buffer, self._name)
        #: Of each rank, the words with which the others signal to it: a sender writes 1, and the
        #: receiver 0 again.
        self._pads = [handle.get_signal_pad(peer, (), torch.int32, 0) for peer in range(size)]
        self._rank, self._size = rank, size
        # `let_go` needs this kernel at a time when none can be loaded.
        torch.empty(ALIGNMENT, dtype=torch.int32, device=self._device).fill_(1)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether x can be added up through the buffer."""
        fits = x.dtype == self._buffer.dtype and x.numel() <= self._buffer.numel()
        is_even = x.numel() * x.itemsize % (ALIGNMENT * self._size) == 0
        return fits and is_even and x.is_contiguous()

    def one_shot(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in a new tensor."""
        out, flat = torch.empty_like(x), x.view(-1)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(
            self._buffer[: x.numel()], flat, "sum", self._name, out.view(-1)
        )
        return out

    def two_shots(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, in a new tensor."""
        out, mine = torch.empty_like(x), self._buffer[: x.numel()]
        mine.copy_(x.view(-1))
        torch.ops.symm_mem.two_shot_all_reduce_out(mine, "sum", self._name, out.view(-1))
        return out

    def let_go(self) -> bool:
        """Wait until everything that this GPU's default stream has to do has run, and say whether.

        A kernel here waits for the others' signals, and a rank that has ended gives none. So its
        signals are given in its place, as often as needed. The sums are wrong from then on.
        """
        deadline = time.monotonic() + PATIENCE_AT_END
        with torch.cuda.device(self._device):
            done = torch.cuda.Event()
            done.record(torch.cuda.default_stream())
            with torch.cuda.stream(torch.cuda.Stream()):
                while not done.query():
                    if time.monotonic() > deadline:
                        return False
                    for peer, pad in enumerate(self._pads):
                        pad.fill_(int(peer == self._rank))
                    torch.cuda.current_stream().synchronize()
        return True

    def close(self) -> None:
        """Free this rank's buffer. No recorded graph may use it afterwards."""
        _c10d()._unregister_process_group(self._name)
        if not self.let_go():
            logger.warning("A kernel still waits for a rank that is gone; its memory stays taken.")
            _never_freed.append(self._buffer)
        self._buffer = self._group = None
        self._pads = []


class _FreshNumbers(dist.Store):
    """A store in which this group's exchanges count from 0.

    PyTorch numbers the exchanges of symmetric memory per process, and rank 0 may have made other
    groups before. With its own numbers it would wait for keys that nobody writes.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store, self._first = store, -1

    def _key(self, key: str) -> str:
        found = re.search(r"/(\d+)", key)
        if found is None:
            return key
        if self._first < 0:
            self._first = int(found[1])
        return f"{key[: found.start()]}/{int(found[1]) - self._first}{key[found.end() :]}"

    def set(self, key: str, value: str) -> None:
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        self._store.wait([self._key(key)], PATIENCE)  # for a rank that has failed, not for ever
        return self._store.get(self._key(key))

    def add(self, key: str, value: int) -> int:
        return self._store.add(self._key(key), value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check([self._key(key) for key in keys])

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._store.wait([self._key(key) for key in keys], *timeout)


class Choice:
    """Which of several ways to take for a message of so many numbers.

    sizes: ascending. names: the fastest way for each of them. A message takes the way of the next
    size above its own; above the last size there is no way.
    """

    def __init__(self, sizes: list[int], names: list[str]) -> None:
        self.sizes, self.names = sizes, names

    def __call__(self, numel: int) -> str | None:
        place = bisect.bisect_left(self.sizes, numel)
        return self.names[place] if place < len(self.names) else None


def sizes_up_to(width: int, rows: int) -> list[int]:
    """Messages to measure: 1, 4, 16, ... rows of `width` numbers, and all rows."""
    counts = [4**power for power in range(rows.bit_length()) if 4**power < rows]
    return [count * width for count in (*counts, rows)]


@torch.inference_mode()
def seconds_of(operation: Operation, x: torch.Tensor) -> float:
    """Seconds of one call within a CUDA graph, as decode steps make it. Collective."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        operation(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            operation(x)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    # NCCL never ends a communicator while a graph holds one of its collectives.
    graph.reset()
    times = [before.elapsed_time(after) for before, after in pairwise(events)]
    return statistics.median(times) / CALLS / 1e3
