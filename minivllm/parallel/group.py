"""Tensor parallelism: the group of ranks that run one model together, and its collectives.

The weights of every layer are split over the ranks (Shoeybi et al., Megatron-LM, 2019, arXiv
1909.08053): a rank computes some of the attention heads and some of the MLP's features alone, and
one all-reduce per branch adds up the results of all ranks.

There is no global state: a group has its own process groups (NCCL for tensors on a GPU, gloo for
everything else), so two groups in one process are independent. A group of one rank (`SINGLE`) takes
the same code path and communicates nothing. Taught in notebooks/09_tensor_parallel.ipynb.
"""

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
    """The rows or columns from `start` up to `stop`, of `total`."""

    total: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


class TensorParallelGroup:
    """One rank's view of its group.

    tensors: the process group for model tensors. objects: the process group for messages of the
    CPU. key: a secret of the group, which signs the messages of rank 0.
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
        """This rank's share of `count` units of `unit` rows each, in order of rank.

        If there are fewer units than ranks, neighbouring ranks hold the same unit. pad: the last
        ranks may get fewer units, or none.
        """
        if not pad and count % self.size and self.size % count:
            raise ConfigError(f"{count} units cannot be split evenly over {self.size} ranks.")
        each = -(-count // self.size)
        first = min(self.rank * each, count) if pad else self.rank * count // self.size
        return Part(count * unit, first * unit, min(first + each, count) * unit)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over all ranks, in place. Returns x."""
        if self.size > 1:
            self._run("allreduce", self._tensors, [x])
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] of every rank -> [..., size * n], in order of rank."""
        return self._gather(self._tensors, x)

    def exchange(self, number: int) -> list[int]:
        """Collect one integer from every rank. Returns them in order of rank."""
        return self._gather(self._objects, torch.tensor([number])).tolist()

    def broadcast(self, number: int, items: Sequence[Any] = ()) -> tuple[int, Sequence[Any]]:
        """Send rank 0's integer and list to every rank: 16 bytes, then the items if there are any.

        items: values of JSON's types. They arrive as JSON returns them (tuples become lists). What
        arrives is never unpickled. A message without the group's signature raises
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
        """Raise `RankFailedError` if the group was aborted: the GPU's results are then invalid."""
        if self.is_broken:
            raise RankFailedError("The ranks' communication has been aborted.")

    def abort(self) -> None:
        """Abort the communication of tensors, even if a GPU waits for a rank that is gone."""
        self.is_broken = True
        self._tensors.abort()

    def close(self) -> None:
        """Leave the group. The next collective of the other ranks fails."""
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


#: A group of one rank, which needs no other rank.
SINGLE = TensorParallelGroup()
