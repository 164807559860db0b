"""Ranks that are threads of this process, for tests of tensor parallelism without start-up time.

`ThreadGroup` has the collectives of `TensorParallelGroup` and does not use torch.distributed.
Processes can do what threads cannot: die, be killed, run different code. test_parallel.py tests
that with processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from minivllm.parallel.group import TensorParallelGroup


class ThreadGroup(TensorParallelGroup):
    """A rank that meets the others at a barrier."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        super().__init__(rank, size)
        self._barrier, self._table = barrier, table
        self.num_collectives = 0

    def _meet(self, value: Any) -> list[Any]:
        self.num_collectives += 1
        self._table[self.rank] = value
        self._barrier.wait(60.0)
        values = list(self._table)
        self._barrier.wait(60.0)
        return values

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._meet(x.clone())).sum(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meet(x), dim=-1)

    def exchange(self, number: int) -> list[int]:
        return self._meet(number)

    def broadcast(self, number: int, items: Sequence[Any] = ()) -> tuple[int, Sequence[Any]]:
        return self._meet((number, items))[0]


def run_ranks(size: int, function: Callable[[ThreadGroup], Any]) -> list[Any]:
    """Run function(group) on every rank at once. Returns each rank's result.

    Raises the first error that is not the barrier's.
    """
    barrier, table = threading.Barrier(size), [None] * size
    results, errors = [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(rank, size, barrier, table))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results
