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
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from minivllm.errors import ConfigError, RankFailedError
from minivllm.parallel import symmetric

logger = logging.getLogger(__name__)


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
    CPU. key: a secret of the group, which signs the messages of rank 0. store: where the ranks of a
    group with GPUs meet once more, to share memory; None if they are on several machines.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        tensors: Any = None,
        objects: Any = None,
        key: bytes = b"",
        store: dist.Store | None = None,
    ) -> None:
        self.rank, self.size, self._tensors, self._objects = rank, size, tensors, objects
        self._key, self._store = key, store
        self._shared: symmetric.SharedBuffer | None = None
        #: Which way an all-reduce takes; filled by `share_memory`.
        self.all_reduce_choice = symmetric.Choice([], [])
        #: What was measured for that: size (in numbers) -> way -> seconds.
        self.all_reduce_seconds: dict[int, dict[str, float]] = {}
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
        """Return the sum of x over all ranks. The content of x is lost."""
        if self.size == 1:
            return x
        self.check()
        if self._shared is not None and self._shared.holds(x):
            way = self.all_reduce_choice(x.numel())
            if way == "one shot":
                return self._shared.one_shot(x)
            if way == "two shots":
                return self._shared.two_shots(x)
        return self._all_reduce_nccl(x)

    def share_memory(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Have all-reduces of [up to rows, width] go through shared memory where that is faster.

        Collective. Does nothing for ranks without GPUs. Where memory cannot be shared, every
        all-reduce goes through NCCL, as it does before this call.
        """
        if self.size == 1 or self._tensors is self._objects:
            return
        can_share = self._store is not None and symmetric.is_available()
        if not all(self.exchange(int(can_share))):
            logger.warning("The ranks' GPUs cannot share memory; all-reduces go through NCCL.")
            return
        rows = min(rows, symmetric.MOST_BYTES // (width * dtype.itemsize))
        problem: Exception | None = None
        try:
            assert self._store is not None
            self._shared = symmetric.SharedBuffer(
                self._store, self.rank, self.size, rows * width, dtype
            )
        except (RuntimeError, AttributeError, TypeError) as error:
            problem = error
        if not all(self.exchange(int(problem is None))):
            self._shared = None
            logger.warning("All-reduces go through NCCL: %s", problem or "another rank failed")
            return
        self._measure_all_reduce(symmetric.sizes_up_to(width, rows), dtype)

    def _measure_all_reduce(self, sizes: list[int], dtype: torch.dtype) -> None:
        """Time every way at these sizes (in numbers). Rank 0's times decide for all ranks."""
        assert self._shared is not None
        ways = {
            "NCCL": self._all_reduce_nccl,
            "one shot": self._shared.one_shot,
            "two shots": self._shared.two_shots,
        }
        names = []
        for size in sizes:
            x = torch.zeros(size, dtype=dtype, device="cuda")
            times = {name: symmetric.seconds_of(way, x) for name, way in ways.items()}
            self.all_reduce_seconds[size] = times
            names.append(min(times, key=times.__getitem__))
        _, chosen = self.broadcast(0, names)
        self.all_reduce_choice = symmetric.Choice(sizes, list(chosen))

    def _all_reduce_nccl(self, x: torch.Tensor) -> torch.Tensor:
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

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Wait until the GPU has come to `event`. Raises `RankFailedError` if the group is aborted.

        `Event.synchronize` would not return while a kernel waits for a rank that is gone.
        """
        while event is not None and self._shared is not None and not event.query():
            self.check()
            time.sleep(5e-5)

    def abort(self) -> None:
        """Abort the communication of tensors, even if a GPU waits for a rank that is gone."""
        self.is_broken = True
        helper = None
        if self._shared is not None:
            # At the same time: NCCL's kernels may stand behind those that wait here, or before.
            helper = threading.Thread(target=self._shared.let_go, daemon=True)
            helper.start()
        self._tensors.abort()
        if helper is not None:
            helper.join()

    def close(self) -> None:
        """Leave the group. The next collective of the other ranks fails."""
        if self._tensors is not self._objects and not self.is_broken:
            self.abort()
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()
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
