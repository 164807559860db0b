"""Ranks that are threads of this process: every layer, loader and engine of tensor parallelism,
without any start-up.

`ThreadGroup` has the collectives of `TensorParallelGroup` and nothing of torch.distributed. What
processes can do and threads cannot (die, be killed, disagree about their code) is tested with
processes, in test_parallel.py.
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
    """function(group) on every rank at once; what each returned, or the first error that is not of
    the barrier.
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
