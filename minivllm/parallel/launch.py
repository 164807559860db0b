"""The device of an engine and its ranks: how ranks start, stay in step, and end.

This process starts the ranks on this machine, or torchrun starts them, on one machine or several.
Taught in notebooks/09_tensor_parallel.ipynb.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from minivllm.errors import ConfigError, EngineEndedError, RankFailedError, RankMismatchError
from minivllm.parallel.group import SINGLE, TensorParallelGroup

#: MEETING: how long rank 0 waits for started processes to meet it. IDLE: how long ranks wait in all
#: other cases; it is long because other ranks may load a model and an engine may be idle. A waiting
#: rank ends when rank 0 ends, or torchrun ends it.
MEETING, IDLE = timedelta(seconds=20), timedelta(days=365)


def connect(
    store: dist.Store,
    rank: int,
    size: int,
    device_type: str,
    host: str | None = "127.0.0.1",
    gpu: int | None = None,
    key: bytes = b"",
) -> TensorParallelGroup:
    """Meet the other ranks at `store`, and make their group.

    host: None if the ranks run on several machines. gpu: this rank's GPU; None takes its rank.

    key: a secret of these ranks. It signs their messages. It also names the places in the store
    where they meet, because any process of the machine can reach the store.

    The process groups are made directly, without `init_process_group`, so there is no global state.
    """
    if key:
        store = dist.PrefixStore(hashlib.sha256(b"store" + key).hexdigest(), store)
    gloo = dist.ProcessGroupGloo
    options = gloo._Options()  # type: ignore[attr-defined]
    options._timeout = MEETING if host and rank == 0 else IDLE
    options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
    objects: Any = gloo(dist.PrefixStore("objects", store), rank, size, options)
    objects._set_default_timeout(IDLE)
    tensors = objects
    if device_type == "cuda":
        # Each rank is a process with one GPU, which is the engine's "cuda".
        torch.cuda.set_device(rank if gpu is None else gpu)
        nccl = dist.ProcessGroupNCCL
        tensors = nccl(dist.PrefixStore("tensors", store), rank, size, nccl.Options())
    # Ranks on several machines share no memory.
    on_one_machine = host is not None or os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    shared = dist.PrefixStore("shared memory", store) if on_one_machine else None
    return TensorParallelGroup(rank, size, tensors, objects, key, shared)


def pick_device(device: str) -> str:
    """Replace "auto" by "cuda" or "cpu". Raises `ConfigError` for a device that does not exist."""
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError as error:
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}.") from error
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}.")
    if kind == "cuda" and not available:
        raise ConfigError(
            "device='cuda' was asked for, but torch sees no CUDA GPU; `minivllm doctor` says more."
        )
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device!r} was asked for; torch sees {torch.cuda.device_count()} GPUs, from"
            " cuda:0."
        )
    return device


class EngineRanks:
    """The ranks that run an engine together, as one of them sees them. Keeps them in step.

    Under torchrun the ranks exist already, and get the same calls from the same script. Otherwise
    this process is rank 0. It starts the other ranks, which run ``target(group, *args)``, and
    passes its calls on to them. Each rank plans and samples for itself. Before every step rank 0
    sends a hash of its state, and a rank with another state raises an error.
    """

    def __init__(
        self,
        size: int,
        device: str,
        target: Callable[..., None],
        *args: Any,
        group: TensorParallelGroup | None = None,
    ) -> None:
        """Find or start the ranks. Raises `ConfigError`.

        device: "cpu", or "cuda" for one GPU per rank. group: the group, if the ranks have met
        already.
        """
        self._processes: RankProcesses | None = None
        self._calls: list[tuple[str, tuple]] = []  # calls that the other ranks have yet to make
        self._ended = ""  # the reason why the ranks have ended
        #: Releases the CUDA graphs of this rank; set by the engine core. The graphs must go before
        #: the communication ends: NCCL waits for every CUDA graph that holds one of its
        #: collectives.
        self.release: Callable[[], None] = lambda: None
        self.group = group or self._find(size, device, target, *args)

    @property
    def were_started_here(self) -> bool:
        """Whether this process has started the other ranks, and passes its calls on to them."""
        return self._processes is not None

    def mirror(self, name: str, *args: Any) -> None:
        """Have the other ranks' cores make this call before their next step.

        Does nothing if this process has not started the ranks. args: values of JSON's types:
        numbers, strings, lists, dicts with strings as keys.
        """
        if self.were_started_here:
            self._calls.append((name, args))

    def agree(self, core: Any, state: Callable[[], int]) -> None:
        """Bring this rank's core to the state of rank 0's core.

        state: returns a hash (63 bits) of everything that the core's plans depend on. Raises
        `RankMismatchError` if this rank's state differs from that of rank 0.
        """
        if self._ended:
            raise EngineEndedError(f"{self._ended} Make a new engine.")
        if self.group.size == 1:
            return
        if self.group.rank == 0:
            self.group.broadcast(state(), self._calls)
            self._calls = []
            return
        expected, calls = self.group.broadcast(0)
        for name, args in calls:
            getattr(core, name)(*args)
        if state() != expected:
            raise RankMismatchError(
                f"Rank {self.group.rank} is not in the same state as rank 0: it has other requests,"
                " or has sampled other tokens. Every rank must run the same code and get the same"
                " calls."
            )

    def give_up(self, error: BaseException) -> None:
        """End the ranks after an interrupted step: no rank knows the state of the others.

        Raises the error of another rank, if that was the cause.
        """
        if self.group.size == 1 or self._ended:
            return
        lost = isinstance(error, RankFailedError) or self.group.is_broken
        failure = self._processes.failure() if self._processes and lost else None
        self.close(
            f"A step was cut short ({type(failure or error).__name__}), and this ended the engine's"
            " ranks."
        )
        if failure is not None:
            raise failure from error

    def close(self, reason: str = "This engine has been closed.") -> None:
        """Release the CUDA graphs, end the started processes, and leave the group."""
        self._ended = self._ended or reason
        if self.group.size > 1:
            self.release()
            (self._processes or self.group).close()

    def _find(
        self, size: int, device: str, target: Callable[..., None], *args: Any
    ) -> TensorParallelGroup:
        if size == 1:
            return SINGLE
        started = _number_from_torchrun("WORLD_SIZE", 1)
        if started not in (1, size):
            raise ConfigError(
                f"torchrun has started {started} ranks; set tensor_parallel_size={started}."
            )
        local = _number_from_torchrun("LOCAL_WORLD_SIZE", size) if started == size else size
        if device != "cpu" and (device != "cuda" or local > torch.cuda.device_count()):
            raise ConfigError(
                f"{local} ranks on this machine take device='cuda' and {local} GPUs; device is"
                f" {device!r}, and there are {torch.cuda.device_count()}."
            )
        if started == size:
            return join_torchrun(device)
        self._processes = RankProcesses(size, device, target, *args)
        return self._processes.group


def _number_from_torchrun(name: str, default: int) -> int:
    """Read a number that torchrun has set in the environment."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise ConfigError(
            f"The environment variable {name} must be a number, as torchrun sets it, got {value!r}."
            " Start with torchrun, or unset WORLD_SIZE to have the ranks started here."
        )
    return int(value)


def join_torchrun(device_type: str) -> TensorParallelGroup:
    """Make the group of all ranks that torchrun has started, on all machines."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"The environment has WORLD_SIZE and lacks {', '.join(missing)}, all of which torchrun"
            " sets. Start with torchrun, or unset WORLD_SIZE to have the ranks started here."
        )
    rank, size = _number_from_torchrun("RANK", 0), _number_from_torchrun("WORLD_SIZE", 1)
    # Without this check the rank would wait for ever.
    if rank >= size:
        raise ConfigError(
            f"The environment has RANK={rank} with WORLD_SIZE={size}; ranks count from 0. "
            "Start with torchrun, or unset WORLD_SIZE to have the ranks started here."
        )
    try:
        store, rank, size = next(dist.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            "The ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe cannot meet;"
            " torchrun sets them. Start with torchrun, or unset WORLD_SIZE to have the ranks"
            f" started here. ({str(error).splitlines()[0]})"
        ) from error
    # A process may make several engines. Every rank makes them in the same order.
    number = store.add(f"minivllm engines of rank {rank}", 1)
    store = dist.PrefixStore(f"minivllm engine {number}", store)
    # On a shared network the user sets the same key on every machine.
    key = os.environ.get("MINIVLLM_RANK_KEY", "").encode()
    return connect(
        store, rank, size, device_type, None, _number_from_torchrun("LOCAL_RANK", rank), key
    )


class RankProcesses:
    """Ranks 1 to size - 1 as processes on this machine. This process is rank 0.

    Each process runs ``target(group, *args)``. Each holds one end of a pipe, on which it reports
    the cause of a failure. It lives until this end of the pipe is closed: by `close`, or because
    this process is gone.
    """

    def __init__(
        self, size: int, device_type: str, target: Callable[..., None], *args: Any
    ) -> None:
        self.group = SINGLE
        self._ranks: list[Any] = []
        self._reports: dict[int, Any] = {}
        # The ranks get the key through the pipe that starts them.
        key = secrets.token_bytes(32)
        try:
            work = pickle.dumps((target, args))
        except Exception as error:
            raise ConfigError(
                f"The other ranks cannot be sent this ({error}). Define your pieces at the top"
                " level of a module."
            ) from error
        # A free port, reserved for us from here on.
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        try:
            with _sigint_blocked():
                for rank in range(1, size):
                    self._start(rank, size, port, device_type, key, work)
            # The store starts a thread, so it is made after the processes: SIGINT would reach that
            # thread while it is blocked in this one.
            store = dist.TCPStore(
                "127.0.0.1", port, size, True, IDLE, False, master_listen_fd=listener.detach()
            )
            # Wait here, where the end of a process is noticed.
            for rank, (_, pipe) in enumerate(self._ranks, 1):
                with suppress(EOFError):
                    self._reports[rank] = pipe.recv()
                if self._reports.get(rank) != "ready":
                    raise self.failure()
            try:
                self.group = connect(store, 0, size, device_type, key=key)
            except RuntimeError as error:
                raise self.failure() from error
        except BaseException:
            listener.close()
            self.close()
            raise
        if device_type == "cuda":
            threading.Thread(target=self._watch, daemon=True).start()

    def failure(self) -> Exception:
        """The error to raise for a lost rank. It names the rank that failed first, and why."""
        deadline = time.monotonic() + 5.0
        while True:
            causes = {rank: self._cause(rank) for rank in range(1, len(self._ranks) + 1)}
            # `RankFailedError` means that a rank has only noticed the failure of another rank.
            first = [
                (r, *cause)
                for r, cause in causes.items()
                if cause and cause[0] != "RankFailedError"
            ]
            if first or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        if not first:
            return RankFailedError(
                f"The ranks have lost each other: {[c for c in causes.values() if c]}"
            )
        rank, kind, text = first[0]
        error = RankMismatchError if kind == "RankMismatchError" else RankFailedError
        return error(f"Rank {rank} {text}")

    def close(self) -> None:
        """End the ranks. Returns when all processes are gone."""
        ranks, self._ranks = self._ranks, []
        for _, pipe in ranks:
            pipe.close()
        for process, _ in ranks:
            process.join(5.0)
            process.kill()  # does nothing if the process has ended
            process.join()
        self.group.close()

    def _start(self, rank: int, *args: Any) -> None:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_run_rank, args=(theirs, rank, *args), name=f"rank {rank}", daemon=True
        )
        process.start()
        theirs.close()
        self._ranks.append((process, ours))

    def _cause(self, rank: int) -> tuple[str, str] | None:
        """(type of the error, what happened) for a rank that has ended."""
        process, pipe = self._ranks[rank - 1]
        code = process.exitcode
        with suppress(EOFError, OSError):
            while pipe.poll():
                self._reports[rank] = pipe.recv()
        if isinstance(self._reports.get(rank), tuple) or code is None:
            return self._reports.get(rank) if code is not None else None
        if code < 0:
            return "", f"was killed by signal {-code} ({signal.Signals(-code).name})."
        return (
            "",
            (
                f"exited with code {code} before it could report an error; see its output. A script"
                " that starts ranks needs `if __name__ == '__main__':` around its code."
            ),
        )

    def _watch(self) -> None:
        """Abort the communication when a rank is gone: a GPU would wait for that rank for ever."""
        wait([process.sentinel for process, _ in self._ranks])
        # If `close` ended the ranks, the list is empty.
        if self._ranks:
            self.group.abort()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start processes with SIGINT blocked, so that Ctrl-C does not interrupt them.

    Ctrl-C reaches every process of the terminal, and rank 0 handles it for all ranks. Windows
    cannot block a signal; there the started processes get it too.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Start multiprocessing's own helper process first: its start would unblock the signal.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _run_rank(
    pipe: Connection, rank: int, size: int, port: int, device_type: str, key: bytes, work: bytes
) -> None:
    """The main function of a rank that `RankProcesses` has started."""
    threading.Thread(target=_end_with_rank_0, args=(pipe,), daemon=True).start()
    report = ("SystemExit", "ended.")
    os.environ["TQDM_DISABLE"] = "1"  # rank 0 shows the progress bars
    try:
        target, args = pickle.loads(work)
        if device_type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // size))
        pipe.send("ready")
        store = dist.TCPStore("127.0.0.1", port, size, False, IDLE)
        target(connect(store, rank, size, device_type, key=key), *args)
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
