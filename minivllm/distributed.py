"""Tensor parallelism: the ranks that run one model together, and what they say to each other.

Every layer's weights are split over the ranks (Shoeybi et al., Megatron-LM, 2019, arXiv 1909.08053): a rank computes
some attention heads and some features of the MLP alone, and one all-reduce a branch adds up what the ranks have found.
Every rank runs the same engine and makes the same decisions, so no plan of a step is ever sent.

No global state: a group has process groups of its own, NCCL's for tensors on a GPU and gloo's for all else, and two
groups in one process never meet. A group of one rank (`SINGLE`) takes the same code path and communicates nothing.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from minivllm.errors import ConfigError, RankFailedError, RankMismatchError

#: How long ranks wait for each other to begin, and for the next step of an idle engine.
TO_MEET, FOR_EVER = timedelta(seconds=60), timedelta(days=365)


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
    """One rank's view of its group. tensors, objects: process groups for model tensors and for what the CPU says."""

    def __init__(self, rank: int = 0, size: int = 1, tensors: Any = None, objects: Any = None, gpu: int = 0) -> None:
        self.rank, self.size, self.gpu, self._tensors, self._objects = rank, size, gpu, tensors, objects
        self._is_broken = False

    @staticmethod
    def connect(store: dist.Store, rank: int, size: int, device_type: str, host: str | None = "127.0.0.1",
                gpu: int | None = None) -> TensorParallelGroup:  # fmt: skip
        """Meet the other ranks at `store`. host: None when they run on several machines. gpu: this rank's."""
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = FOR_EVER
        options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
        objects = tensors = gloo(dist.PrefixStore("objects", store), rank, size, options)
        if device_type == "cuda":
            tensors = dist.ProcessGroupNCCL(
                dist.PrefixStore("tensors", store), rank, size, dist.ProcessGroupNCCL.Options()
            )
        return TensorParallelGroup(rank, size, tensors, objects, rank if gpu is None else gpu)

    @staticmethod
    def from_torchrun(device_type: str) -> TensorParallelGroup:
        """The group of all ranks that torchrun has started, on however many machines."""
        store, rank, size = next(dist.rendezvous("env://"))
        number = store.add(f"minivllm engines of rank {rank}", 1)  # a process may make several, all in the same order
        store = dist.PrefixStore(f"minivllm engine {number}", store)
        return TensorParallelGroup.connect(
            store, rank, size, device_type, None, int(os.environ.get("LOCAL_RANK", rank))
        )

    def part(self, count: int, unit: int = 1, pad: bool = False) -> Part:
        """This rank's share of `count` units of `unit` rows, in order of rank.

        Where there are fewer units than ranks, neighbours hold the same one. pad: the last ranks may get less, or none.
        """
        if not pad and count % self.size and self.size % count:
            raise ConfigError(f"{count} units cannot be split evenly over {self.size} ranks.")
        each = -(-count // self.size)
        first = self.rank * count // self.size if count < self.size and not pad else min(self.rank * each, count)
        return Part(count * unit, first * unit, min(first + each, count) * unit)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, in place of x."""
        if self.size > 1:
            self._run("allreduce", self._tensors, [x])
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] of every rank -> [..., size * n], in order of rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run("allgather", self._tensors, [parts], [x.contiguous()])
        return torch.cat(parts, dim=-1)

    def exchange(self, number: int) -> list[int]:
        """An integer of every rank, by rank."""
        if self.size == 1:
            return [number]
        parts = list(torch.empty(self.size, 1, dtype=torch.int64))
        self._run("allgather", self._objects, [parts], [torch.tensor([number])])
        return [int(part) for part in parts]

    def broadcast(self, number: int, items: Sequence[Any] = ()) -> tuple[int, Sequence[Any]]:
        """Rank 0's integer and list, on every rank: 16 bytes, and a second message only if there are items."""
        data = torch.frombuffer(bytearray(pickle.dumps(items)), dtype=torch.uint8) if items else torch.empty(0)
        head = torch.tensor([number, len(data)])
        self._run("broadcast", self._objects, head, 0)
        number, length = head.tolist()
        if length:
            data = data if self.rank == 0 else torch.empty(length, dtype=torch.uint8)
            self._run("broadcast", self._objects, data, 0)
            items = pickle.loads(data.numpy().tobytes())
        return number, items

    def check(self) -> None:
        """Raise `RankFailedError` if the group was given up while this rank waited for its GPU."""
        if self._is_broken:
            raise RankFailedError("The group of ranks has been given up.")

    def abort(self) -> None:
        """Free a GPU that waits for a rank that is gone; what it computes from here on means nothing."""
        self._is_broken = True
        self._tensors.abort()

    def close(self) -> None:
        """Leave the group. The other ranks' next collective fails."""
        if self._tensors is not self._objects and not self._is_broken:
            self.abort()
        self._tensors = self._objects = None

    def _run(self, name: str, group: Any, *args: Any) -> None:
        self.check()
        try:
            getattr(group, name)(*args).wait()
        except RuntimeError as error:
            raise RankFailedError(f"Rank {self.rank} has lost another rank: {error}") from error


#: One rank that needs nobody.
SINGLE = TensorParallelGroup()


class RankProcesses:
    """Ranks 1 to size - 1 as processes on this machine, each running ``target(group, *args)``. This process is rank 0.

    Each holds one end of a pipe, on which it reports why it failed, and lives until the pipe is closed at this end: by
    `close`, or because this process is gone.
    """

    def __init__(self, size: int, device_type: str, target: Callable[..., None], *args: Any) -> None:
        self.group, self._ranks, self._reports = SINGLE, [], {}
        try:
            work = pickle.dumps((target, args))
        except Exception as error:
            raise ConfigError(
                f"The other ranks cannot be sent this ({error}). Define your pieces at the top level of a module."
            ) from error
        listener = socket.create_server(("127.0.0.1", 0))  # a port that is free, and nobody else's from here on
        port, fd = listener.getsockname()[1], listener.detach()
        store = dist.TCPStore("127.0.0.1", port, size, True, TO_MEET, False, master_listen_fd=fd)
        try:
            # Ctrl-C reaches every process of the terminal. The ranks leave it to this one: they are born deaf to it.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for rank in range(1, size):
                    self._start(rank, size, port, device_type, work)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for _, pipe in self._ranks:  # wait here, where their end is noticed
                with suppress(EOFError):
                    if pipe.recv() == "ready":
                        continue
                raise self.failure()
            self.group = TensorParallelGroup.connect(store, 0, size, device_type)
        except BaseException:
            self.close()
            raise
        if device_type == "cuda":
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def failure(self) -> Exception:
        """The error to raise now that a rank is lost: it names the rank that failed first, and why."""
        deadline = time.monotonic() + 5.0
        while True:
            causes = {rank: self._cause(rank) for rank in range(1, len(self._ranks) + 1)}
            # The others fail with `RankFailedError`: they have only noticed.
            first = [(r, *cause) for r, cause in causes.items() if cause and cause[0] != "RankFailedError"]
            if first or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if not first:
            return RankFailedError(f"The ranks have lost each other: {[c for c in causes.values() if c]}")
        rank, kind, text = first[0]
        error = RankMismatchError if kind == "RankMismatchError" else RankFailedError
        return error(f"Rank {rank} {text}")

    def close(self) -> None:
        """End the ranks; returns when they are gone."""
        for _, pipe in self._ranks:
            pipe.close()
        for process, _ in self._ranks:
            process.join(5.0)
            process.kill()  # nothing, if it has ended
            process.join()
        self._ranks.clear()
        self.group.close()

    def _start(self, rank: int, *args: Any) -> None:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_run_rank, args=(theirs, rank, *args), name=f"rank {rank}", daemon=True)
        self._ranks.append((process, ours))
        process.start()
        theirs.close()

    def _cause(self, rank: int) -> tuple[str, str] | None:
        """(kind of error, what happened) of a rank that has ended."""
        process, pipe = self._ranks[rank - 1]
        code = process.exitcode
        with suppress(EOFError, OSError):
            while pipe.poll():
                self._reports[rank] = pipe.recv()
        if isinstance(self._reports.get(rank), tuple) or code is None:
            return self._reports.get(rank) if code is not None else None
        if code < 0:
            return "", f"was killed by signal {-code} ({signal.Signals(-code).name})."
        return "", (
            f"exited with code {code} before it could say why; what it printed may. A script that starts ranks needs "
            "`if __name__ == '__main__':` around what it does."
        )

    def _watch(self) -> None:
        """A GPU waits for ever for a rank that is gone: abort its communication."""
        ranks = list(self._ranks)
        wait([process.sentinel for process, _ in ranks])
        if self._ranks:  # not closed by ourselves
            self.group.abort()


def _run_rank(pipe: Connection, rank: int, size: int, port: int, device_type: str, work: bytes) -> None:
    """The life of a rank that `RankProcesses` has started."""
    threading.Thread(target=_end_with_rank_0, args=(pipe,), daemon=True).start()
    report = ("SystemExit", "ended.")
    try:
        pipe.send("ready")
        target, args = pickle.loads(work)
        store = dist.TCPStore("127.0.0.1", port, size, False, TO_MEET)
        target(TensorParallelGroup.connect(store, rank, size, device_type), *args)
    except BaseException as error:
        report = (type(error).__name__, f"failed: {type(error).__name__}: {error}")
    with suppress(OSError):
        pipe.send(report)
    sys.stdout.flush()
    os._exit(1)


def _end_with_rank_0(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv()
    os._exit(0)
