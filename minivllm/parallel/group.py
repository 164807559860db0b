"""Tensor parallelism: the group of ranks that run one model together, and its collectives.

Every layer's weights are split over the ranks (Shoeybi et al., Megatron-LM, 2019, arXiv
1909.08053): a rank computes some attention heads and some features of the MLP alone, and one
all-reduce a branch adds up what the ranks have found. No global state: a group has process groups
of its own, NCCL's for tensors on a GPU and gloo's for all else, and two groups in one process never
meet. A group of one rank (`SINGLE`) takes the same code path and communicates nothing. Taught in
notebooks/09_tensor_parallel.ipynb."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minivllm.errors import ConfigError, RankFailedError


@dataclass(frozen=True)
class Part:
    """Of `total` rows or columns, those from `start` up to `stop`."""

    total: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


class TensorParallelGroup:
    """One rank's view of its group. tensors, objects: process groups for model tensors and for what
    the CPU says.

    key: a secret of the group, which signs what rank 0 tells the others.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        tensors: Any = None,
        objects: Any = None,
        key: bytes = b"",
    ) -> None:
        self.rank, self.size, self._tensors, self._objects = rank, size, tensors, objects
        self._key = key
        self.is_broken = False

    def part(self, count: int, unit: int = 1, pad: bool = False) -> Part:
        """This rank's share of `count` units of `unit` rows, in order of rank.

        Where there are fewer units than ranks, neighbours hold the same one. pad: the last ranks
        may get less, or none.
        """
        if not pad and count % self.size and self.size % count:
            raise ConfigError(f"{count} units cannot be split evenly over {self.size} ranks.")
        each = -(-count // self.size)
        first = min(self.rank * each, count) if pad else self.rank * count // self.size
        return Part(count * unit, first * unit, min(first + each, count) * unit)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, in place of x."""
        if self.size > 1:
            self._run("allreduce", self._tensors, [x])
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] of every rank -> [..., size * n], in order of rank."""
        return self._gather(self._tensors, x)

    def exchange(self, number: int) -> list[int]:
        """An integer of every rank, by rank."""
        return self._gather(self._objects, torch.tensor([number])).tolist()

    def broadcast(self, number: int, items: Sequence[Any] = ()) -> tuple[int, Sequence[Any]]:
        """Rank 0's integer and list, on every rank: 16 bytes, and a second message only if there
        are items.

        items: what JSON can say; it comes back as JSON has it (tuples as lists). Nothing that
        arrives is ever unpickled. A message that does not carry the group's signature raises
        `RankFailedError`.
        """
        data = self._sign(json.dumps(items).encode()) if items else b""
        head = torch.tensor([number, len(data)])
        self._run("broadcast", self._objects, head, 0)
        number, length = head.tolist()
        if length:
            message = torch.empty(length, dtype=torch.uint8)
            if self.rank == 0:
                message = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self._run("broadcast", self._objects, message, 0)
            items = json.loads(self._verify(message.numpy().tobytes()))
        return number, items

    def _sign(self, message: bytes) -> bytes:
        return hmac.digest(self._key, message, hashlib.sha256) + message

    def _verify(self, data: bytes) -> bytes:
        message = data[hashlib.sha256().digest_size :]
        if not hmac.compare_digest(self._sign(message), data):
            raise RankFailedError("A message between the ranks does not carry their signature.")
        return message

    def check(self) -> None:
        """Raise `RankFailedError` where the group was aborted: what the GPU has computed since
        means nothing.
        """
        if self.is_broken:
            raise RankFailedError("The ranks' communication has been aborted.")

    def abort(self) -> None:
        """End the communication of tensors, also for a GPU that is waiting for a rank that is
        gone.
        """
        self.is_broken = True
        self._tensors.abort()

    def close(self) -> None:
        """Leave the group. The other ranks' next collective fails."""
        if self._tensors is not self._objects and not self.is_broken:
            self.abort()
        self._tensors = self._objects = None

    def _gather(self, group: Any, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run("allgather", group, [parts], [x])
        return torch.cat(parts, dim=-1)

    def _run(self, name: str, group: Any, *args: Any) -> None:
        self.check()
        try:
            getattr(group, name)(*args).wait()
        except RuntimeError as error:
            raise RankFailedError(f"Rank {self.rank} has lost another rank: {error}") from error


SINGLE = TensorParallelGroup()  # one rank that needs nobody
