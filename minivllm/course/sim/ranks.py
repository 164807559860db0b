"""Ranks in one process: threads that take turns, with collectives that check each other.

    ranks = Ranks(4)

    def program(group, x):                       # runs four times, once per rank
        part = x[group.rank :: group.size].sum()
        return group.all_reduce(part)

    ranks.run(program, torch.arange(8.0))        # [28., 28., 28., 28.]
    ranks.calls                                  # the collectives that ran, with their shapes

One rank computes at a time, until it calls a collective or ends; then the next rank computes. So
each run gives the same result and prints the same lines. All ranks must call the same collective. A
rank that does not call it is found at once: `CollectiveError` names the rank, and the others do not
wait forever.

Two things differ from real ranks. The memory is shared, so a program can read the tensors of
another rank. And several ranks are not faster than one. Taught in
notebooks/09_tensor_parallel.ipynb.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from minivllm.errors import MiniVLLMError

#: Seconds that a rank may compute between two collectives.
TIME_LIMIT = 20.0


class CollectiveError(MiniVLLMError, RuntimeError):
    """The ranks do not fit together.

    name: "never-called", "different-collectives", "different-shapes" or "endless".
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class _Abandoned(BaseException):
    """Ends the thread of a rank after another rank has failed."""


@dataclass(frozen=True)
class Call:
    """A collective that all ranks called.

    shape, dtype: of the tensor that each rank passed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: The number of ranks.
    size: int
    #: What else must agree: "dim 1", "from rank 0".
    detail: str = ""

    def __str__(self) -> str:
        words = f"{self.name}({str(self.dtype).removeprefix('torch.')} {list(self.shape)})"
        return f"{words}, {self.detail}" if self.detail else words

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor that each rank passed."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends when the ranks form a ring.

        For a broadcast: the bytes that each rank but the last one sends.
        """
        steps = {
            "all_reduce": 2 * (self.size - 1) / self.size,
            "all_gather": self.size - 1,
            "barrier": 0,
        }
        return self.num_bytes * (steps.get(self.name, 1) if self.size > 1 else 0)


class Group:
    """A rank's view of the ranks: its own number, the number of ranks, and the collectives.

    Every rank must call each collective.
    """

    def __init__(self, rank: int, size: int, meet: Callable[[Call, torch.Tensor], Any]) -> None:
        self.rank, self.size, self._meet = rank, size, meet

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, as a new tensor. All ranks pass the same shape and dtype."""
        return self._collective("all_reduce", tensor)

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The tensors of all ranks side by side along dim, in the order of the ranks.

        All ranks pass the same shape.
        """
        return self._collective("all_gather", tensor, f"dim {dim % max(tensor.dim(), 1)}")

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """The tensor of rank src. The other ranks pass a tensor of its shape."""
        return self._collective("broadcast", tensor, f"from rank {src}")

    def send_right(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send the tensor to rank + 1, and return the tensor from rank - 1.

        The last rank sends to rank 0. All ranks pass the same shape.
        """
        return self._collective("send_right", tensor)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self._collective("barrier", torch.empty(0))

    def _collective(self, name: str, tensor: torch.Tensor, detail: str = "") -> torch.Tensor:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{name} takes a tensor, not {type(tensor).__name__} (rank {self.rank})"
            )
        return self._meet(Call(name, tuple(tensor.shape), tensor.dtype, self.size, detail), tensor)


@dataclass
class _Rank:
    """One rank's thread and its state.

    turn: released to let the thread go on. stopped: released when the thread waits again or has
    ended.
    """

    rank: int
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None
    #: The collective that the rank waits in.
    call: Call | None = None
    #: The tensor that the rank passed; then the result.
    tensor: torch.Tensor | None = None
    computing: bool = False
    ended: bool = False
    abandoned: bool = False
    result: Any = None
    error: BaseException | None = None


class Ranks:
    """A number of ranks that run a program together.

    calls: the collectives of the last run, in order.
    """

    def __init__(self, size: int, time_limit: float = TIME_LIMIT) -> None:
        if size < 1:
            raise ValueError(f"{size} ranks: there must be at least one.")
        self.size, self.time_limit = size, time_limit
        self.calls: list[Call] = []

    def run(self, program: Callable[..., Any], *args: Any) -> list[Any]:
        """Run program(group, *args) on every rank. Returns the results in the order of ranks.

        An exception of a rank is raised here, and the other ranks are ended. Where several ranks
        raise, it is the exception of the lowest rank. CollectiveError where the ranks do not meet
        in the same collective with the same shape and dtype, or where a rank computes longer than
        the time limit.
        """
        self.calls = []
        # A new thread begins without inference mode.
        inference = torch.is_inference_mode_enabled()
        ranks = [_Rank(rank) for rank in range(self.size)]
        for rank in ranks:
            work = (rank, program, args, inference)
            rank.thread = threading.Thread(
                target=self._work, args=work, daemon=True, name=f"rank {rank.rank}"
            )
            rank.thread.start()
        try:
            while not all(rank.ended for rank in ranks):
                for rank in ranks:
                    self._go_on(rank)
                if not all(rank.ended for rank in ranks):
                    self._exchange(ranks)
        finally:
            _abandon([rank for rank in ranks if not rank.ended])
        return [rank.result for rank in ranks]

    def _work(self, rank: _Rank, program: Callable[..., Any], args: tuple, inference: bool) -> None:
        """Run the program as one rank; the body of the rank's thread."""

        def meet(call: Call, tensor: torch.Tensor) -> Any:
            if rank.abandoned:
                raise _Abandoned
            rank.call, rank.tensor = call, tensor
            rank.stopped.release()
            rank.turn.acquire()
            if rank.abandoned:
                raise _Abandoned
            return rank.tensor

        try:
            rank.turn.acquire()
            if not rank.abandoned:
                with torch.inference_mode(inference):
                    rank.result = program(Group(rank.rank, self.size, meet), *args)
        except BaseException as error:
            rank.error = error
        finally:
            rank.ended = True
            rank.stopped.release()

    def _go_on(self, rank: _Rank) -> None:
        """Let a rank compute until its next collective or its end."""
        if rank.ended:
            return
        rank.call, rank.computing = None, True
        rank.turn.release()
        if not rank.stopped.acquire(timeout=self.time_limit):
            after = (
                f"after {self.calls[-1].name} number {len(self.calls)}"
                if self.calls
                else "from the start"
            )
            raise CollectiveError(
                "endless",
                f"rank {rank.rank} computed for more than {self.time_limit:g} seconds {after},"
                " without calling a collective or ending. The others wait for it.",
            )
        rank.computing = False
        if rank.error is not None:
            rank.error.add_note(f"(on rank {rank.rank} of {self.size})")
            raise rank.error

    def _exchange(self, ranks: list[_Rank]) -> None:
        """Check that all ranks wait in the same collective, and give each rank its result.

        No rank computes meanwhile.
        """
        call = _agreed(ranks)
        self.calls.append(call)
        tensors = [rank.tensor for rank in ranks]
        for rank, result in zip(ranks, _results(call, tensors), strict=True):
            rank.tensor = result


def _agreed(ranks: list[_Rank]) -> Call:
    """The collective that all ranks wait in. CollectiveError where they do not agree."""
    waiting = [rank for rank in ranks if not rank.ended]
    first = waiting[0]
    for rank in ranks:
        if rank.ended:
            raise CollectiveError(
                "never-called",
                f"rank {rank.rank} never called {first.call.name}: it has ended, and"
                f" {_these(waiting)} in {first.call} would wait for it for ever.",
            )
    for rank in ranks:
        mine, theirs = first.call, rank.call
        if (mine.name, mine.detail) != (theirs.name, theirs.detail):
            name = "different-collectives"
            what = "Ranks must call the same collectives in the same order"
        elif (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            name, what = "different-shapes", "All ranks must bring the same shape and dtype"
        else:
            continue
        raise CollectiveError(
            name, f"{what}: rank {first.rank} calls {mine}, rank {rank.rank} calls {theirs}."
        )
    return first.call


def _these(ranks: list[_Rank]) -> str:
    numbers = [str(rank.rank) for rank in ranks]
    return (
        f"rank {numbers[0]}"
        if len(numbers) == 1
        else f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"
    )


def _results(call: Call, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result for each rank.

    Each rank gets its own tensor, as if the ranks shared no memory.
    """
    if call.name == "all_reduce":
        total = tensors[0].clone()
        for tensor in tensors[1:]:
            total = total + tensor
        return [total.clone() for _ in tensors]
    if call.name == "all_gather":
        dim = int(call.detail.removeprefix("dim "))
        return [
            torch.cat(tensors, dim=dim) if call.shape else torch.stack(tensors) for _ in tensors
        ]
    if call.name == "broadcast":
        return [tensors[int(call.detail.removeprefix("from rank "))].clone() for _ in tensors]
    # Only send_right is left: a barrier has no tensors.
    return [tensors[rank - 1].clone() for rank in range(len(tensors))]


def _abandon(ranks: list[_Rank]) -> None:
    """End the threads of the ranks that wait.

    In ranks that compute, raise an exception, as far as Python allows it.
    """
    for rank in ranks:
        rank.abandoned = True
        rank.turn.release()
        if rank.computing and rank.thread is not None and rank.thread.ident is not None:
            thread_id = ctypes.c_ulong(rank.thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, ctypes.py_object(_Abandoned))
    for rank in ranks:
        if rank.thread is not None:
            rank.thread.join(timeout=1.0)
