"""A simulated GPU on a CPU: one stream of kernels, events and graphs, by the rules of CUDA.

Its tensors take PyTorch's operations. Each operation is *launched*: the CPU goes on at once. The
kernel runs when the simulated clock reaches it, on the values that are in memory then. `gpu.graph`
records launches, and `replay` launches the whole recording, at the same addresses. What CUDA
forbids raises CUDA's error. Some faults CUDA does not report: a buffer overwritten too early, a
result read too early, a Python number that a recording fixes. They raise nothing here either, and
give wrong numbers. Taught in notebooks/08_cuda_graphs.ipynb.

    gpu = SimulatedGPU()
    x, graph = gpu.zeros(3), gpu.CUDAGraph()
    with gpu.graph(graph):
        y = x + 1                  # recorded, not run
    x.fill_(41)
    graph.replay()
    y.tolist()                     # waits for the GPU: [42.0, 42.0, 42.0]

The names are those of `torch.cuda` where it has them. Simplified: there is one stream. A launch and
a replay have constant costs, and there are no gaps between kernels. A kernel takes the time of
moving its bytes at the memory's rate, or a least time. Only recordings reuse freed memory.
"""

from __future__ import annotations

import contextlib
import math
from collections import abc, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.engine.batch import BatchRow, build_batch
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.cuda_graphs import DecodeState
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import ScheduledBatch, Sequence
from minivllm.errors import MiniVLLMError
from minivllm.kernels import Kernels
from minivllm.layers.attention import AttentionMetadata
from minivllm.models.loader import LoadOptions, load_config, load_model
from minivllm.sampling_params import SamplingParams

aten = torch.ops.aten

#: The error of `Event.query` after many calls in a row: only waiting or work moves the simulated
#: clock.
STANDS_STILL = "the simulated clock stands still"

#: CUDA's error where a recording waits for the GPU.
NOT_WHILE_CAPTURING = "CUDA error: operation not permitted when stream is capturing"
#: Operations whose result has a size that depends on values: PyTorch waits for the values.
_NEEDS_VALUES = (
    "nonzero",
    "masked_select",
    "unique",
    "unique_dim",
    "unique_consecutive",
    "bincount",
)
#: Bytes: a recording's pool gives out memory in multiples of this.
_GRAIN = 512


class CudaError(MiniVLLMError, RuntimeError):
    """An error that CUDA, or PyTorch for CUDA, would have raised."""


@dataclass(frozen=True)
class Span:
    """Something that the CPU or the GPU did, in microseconds of the simulated clock."""

    lane: str  # "CPU" or "GPU"
    name: str
    kind: str  # CPU: "launch", "replay", "work", "wait"; GPU: "kernel", "copy"
    start: float
    end: float


@dataclass(frozen=True)
class _Op:
    """A kernel or a copy, as it is launched or recorded."""

    name: str
    kind: str
    us: float
    run: Callable[[], Any]


class DeviceTensor(torch.Tensor):
    """A tensor in the simulated GPU's memory.

    Made by `SimulatedGPU`, and by operations on such tensors.
    """

    _memory: torch.Tensor
    _gpu: SimulatedGPU
    _block: _Block | None

    @staticmethod
    def __new__(
        cls, memory: torch.Tensor, gpu: SimulatedGPU, block: _Block | None = None
    ) -> DeviceTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
        )
        self._memory, self._gpu, self._block = memory, gpu, block
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found: list[DeviceTensor] = []
        tree_map(
            lambda x: found.append(x) if isinstance(x, DeviceTensor) else None, (args, kwargs or {})
        )
        return found[0]._gpu._operation(func, args, kwargs or {})

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        """A copy in the CPU's memory. Waits for the GPU."""
        return self._gpu._read(self).clone()

    def tolist(self) -> list:
        return self._gpu._read(self).tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor"
            " to host memory first."
        )

    __array__ = numpy

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        target = kwargs.get("device", args[0] if args else None)
        if isinstance(target, str | torch.device) and torch.device(target).type == "cpu":
            return self.cpu()
        return super().to(*args, **kwargs)

    def data_ptr(self) -> int:
        """The tensor's address: the same number means the same place in memory."""
        return self._memory.data_ptr()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{repr(self._gpu._read(self))[:-1]}, device='simulated')"

    def __deepcopy__(self, memo: Any) -> DeviceTensor:
        raise CudaError("a tensor of the simulated GPU is not copied this way; use .clone()")


class SimulatedGPU:
    """The simulated GPU; the module describes it. Times are in microseconds.

    launch_us: CPU time to launch a kernel or a copy. replay_us: CPU time to launch a whole graph.
    kernel_us: the least time of a kernel on the GPU. bytes_per_us: the bytes that a kernel reads
    and writes per microsecond. `now` is the CPU's clock. `spans` is the record of what happened.
    num_launches, num_replays and num_waits count.
    """

    def __init__(
        self,
        *,
        launch_us: float = 10.0,
        replay_us: float = 20.0,
        kernel_us: float = 2.0,
        bytes_per_us: float = 4e6,
    ) -> None:
        self.launch_us = launch_us
        self.replay_us = replay_us
        self.kernel_us = kernel_us
        self.bytes_per_us = bytes_per_us
        self.now = 0.0
        self.spans: list[Span] = []
        self.num_launches = self.num_replays = self.num_waits = 0
        # When everything launched so far will have run.
        self._stream_free = 0.0
        # Launched and not run: (end, operation).
        self._pending: deque[tuple[float, _Op]] = deque()
        self._capture: CUDAGraph | None = None
        self._pinned: dict[int, torch.Tensor] = {}
        self._broken = ""
        # The time of the last unsuccessful query, and the number of them at that time.
        self._asked = (0.0, 0)

    # --- memory -----------------------------------------------------------------------------------

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> DeviceTensor:
        """Uninitialized memory: it holds NaN, or a large negative integer."""
        return self._allocate(_size(size), dtype)

    def zeros(self, *size: int, dtype: torch.dtype = torch.float32) -> DeviceTensor:
        """A tensor of zeros. Launches a kernel that writes them."""
        return self.full(_size(size), 0, dtype=dtype)

    def full(
        self, size: abc.Sequence[int], value: float, dtype: torch.dtype | None = None
    ) -> DeviceTensor:
        """A tensor filled with value. Launches a kernel that writes it."""
        kind = dtype or (torch.float32 if isinstance(value, float) else torch.int64)
        return self._allocate(tuple(size), kind).fill_(value)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> DeviceTensor:
        """Copy from the CPU's ordinary (pageable) memory. Waits for everything launched."""
        host = (
            values.detach()
            if isinstance(values, torch.Tensor)
            else torch.tensor(values, dtype=dtype)
        )
        if self._capture is not None:
            raise CudaError(NOT_WHILE_CAPTURING)
        return self._allocate(tuple(host.shape), dtype or host.dtype).copy_(host)

    def pinned(self, values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor in the CPU's memory that the GPU can reach itself.

        A copy of such a tensor need not wait.
        """
        host = (
            torch.tensor(values, dtype=dtype)
            if not isinstance(values, torch.Tensor)
            else values.clone()
        )
        # Kept, so that no other tensor gets this address.
        self._pinned[host.untyped_storage().data_ptr()] = host
        return host

    def move(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move a module's parameters, and tensors that are plain attributes, to the GPU's memory.

        Returns the module.
        """
        moved: dict[int, DeviceTensor] = {}
        holders = (h for part in module.modules() for h in (part._parameters, part.__dict__))
        for holder in holders:
            for name, value in list(holder.items()):
                if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor):
                    if id(value) not in moved:
                        moved[id(value)] = DeviceTensor(value.detach(), self)
                    holder[name] = moved[id(value)]
        return module

    def _allocate(
        self, size: abc.Sequence[int], dtype: torch.dtype, stride: abc.Sequence[int] | None = None
    ) -> DeviceTensor:
        stride = torch.empty(size, device="meta").stride() if stride is None else stride
        if self._capture is not None:
            block = self._capture.pool.allocate(_extent(size, stride) * dtype.itemsize)
            memory = block.memory.view(dtype).as_strided(
                size, stride, block.offset // dtype.itemsize
            )
        else:
            block, memory = None, torch.empty_strided(size, stride, dtype=dtype)
        memory.fill_(
            float("nan")
            if dtype.is_floating_point
            else False
            if dtype == torch.bool
            else -(1 << 30)
        )
        return DeviceTensor(memory, self, block)

    # --- the clock --------------------------------------------------------------------------------

    def work(self, name: str, us: float) -> None:
        """Let the CPU work for this time; the GPU goes on meanwhile."""
        self._check()
        self._advance(name, "work", us)

    def launch(self, name: str, us: float) -> None:
        """Launch a kernel that only takes time."""
        self._launch(_Op(name, "kernel", us, lambda: None))

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        self._wait(self._stream_free, "wait for the GPU")

    @property
    def elapsed_us(self) -> float:
        """The time from the start to the end of the last thing that was done or launched."""
        return max([self.now, *(span.end for span in self.spans[-1:]), self._stream_free])

    def forget_spans(self) -> None:
        """Set the clock back to 0 and begin a new record of spans.

        Waits for the GPU first.
        """
        self.synchronize()
        self.now = self._stream_free = 0.0
        self.spans.clear()
        self.num_launches = self.num_replays = self.num_waits = 0

    def _advance(self, name: str, kind: str, us: float) -> None:
        self.spans.append(Span("CPU", name, kind, self.now, self.now + us))
        self.now += us
        self._settle()

    def _settle(self) -> None:
        """Run the operations that the GPU has finished by now."""
        while self._pending and self._pending[0][0] <= self.now + 1e-9:
            _, op = self._pending.popleft()
            try:
                op.run()
            except (IndexError, RuntimeError) as error:
                self._broken = (
                    f"CUDA error: device-side assert triggered\n(in the kernel {op.name}: {error})"
                )
                self._pending.clear()

    def _wait(self, until: float, name: str) -> None:
        if self._capture is not None:
            raise CudaError(NOT_WHILE_CAPTURING)
        self.num_waits += 1
        if until > self.now:
            self._advance(name, "wait", until - self.now)
        self._settle()
        self._check()

    def _check(self) -> None:
        if self._broken:
            raise CudaError(self._broken)

    def _read(self, tensor: DeviceTensor) -> torch.Tensor:
        """Read a tensor's values on the CPU."""
        self._wait(self._stream_free, "read a value")
        return tensor._memory

    # --- operations -------------------------------------------------------------------------------

    def _launch(self, op: _Op) -> None:
        self._check()
        if self._capture is not None:
            self._capture.ops.append(op)
            return
        self.num_launches += 1
        self._advance(op.name, "launch", self.launch_us)
        self._enqueue(op)

    def _enqueue(self, op: _Op) -> None:
        start = max(self.now, self._stream_free)
        self._stream_free = start + op.us
        self.spans.append(Span("GPU", op.name, op.kind, start, self._stream_free))
        self._pending.append((self._stream_free, op))

    def _microseconds(self, *values: Any) -> float:
        """The time of a kernel that reads and writes these values."""
        numbers = [0]
        tree_map(
            lambda x: (
                numbers.append(x.numel() * x.element_size())
                if isinstance(x, torch.Tensor)
                else None
            ),
            values,
        )
        return max(self.kernel_us, sum(numbers) / self.bytes_per_us)

    def _operation(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Launch one operation of PyTorch; at least one of its tensors is a `DeviceTensor`."""
        name = func._schema.name.removeprefix("aten::")
        if func is aten._local_scalar_dense.default:
            return self._read(args[0]).item()
        if func is aten.equal.default:
            return torch.equal(*(self._read(x) if isinstance(x, DeviceTensor) else x for x in args))
        if func is aten.copy_.default and not all(
            isinstance(x, DeviceTensor) or x.dim() == 0 for x in args[:2]
        ):
            return self._copy(*args, **kwargs)
        returns = func._schema.returns
        if returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write:
            return self._view(func, args, kwargs)
        args, kwargs = self._on_device(name, args), self._on_device(name, kwargs)
        if name in _NEEDS_VALUES or _has_mask(name, args):
            return self._with_values(func, args, kwargs)
        return self._kernel(name, func, args, kwargs)

    def _view(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return another view of the same memory. Nothing is launched."""
        memory = func(*_memory(args), **_memory(kwargs))
        return tree_map(
            lambda x: DeviceTensor(x, self, args[0]._block) if isinstance(x, torch.Tensor) else x,
            memory,
        )

    def _on_device(self, name: str, values: Any) -> Any:
        """Replace single numbers in CPU tensors by their values.

        A kernel cannot read a whole tensor of the CPU: CudaError.
        """

        def one(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, DeviceTensor):
                return value
            if value.dim() == 0:
                return value.clone()
            # PyTorch moves indices itself.
            if name in ("index", "index_put_", "index_put"):
                return self.tensor(value)
            raise CudaError(
                "Expected all tensors to be on the same device, but found at least two devices,"
                f" cuda:0 and cpu!\n(in {name}; gpu.tensor(...), gpu.zeros(...) and"
                " x.new_zeros(...) make tensors on the simulated GPU)"
            )

        return tree_map(one, values)

    def _kernel(self, name: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        shapes = func(*_meta(args), **_meta(kwargs))
        written = [
            x for x, about in zip(args, func._schema.arguments, strict=False) if _is_write(about)
        ]
        written += [
            kwargs[a.name] for a in func._schema.arguments if a.name in kwargs and _is_write(a)
        ]
        if written:
            ours = written[0]
            inputs, named = _memory(args), _memory(kwargs)
            us = self._microseconds(inputs, named)
            self._launch(_Op(name, "kernel", us, lambda: func(*inputs, **named)))
            return ours
        out = tree_map(
            lambda x: self._allocate(x.shape, x.dtype, x.stride()) if _is_tensor(x) else x, shapes
        )
        if name not in ("empty_like", "new_empty", "empty_strided", "new_empty_strided"):
            self._launch_into(name, func, args, kwargs, out)
        return out

    def _launch_into(
        self, name: str, func: Any, args: tuple, kwargs: dict[str, Any], out: Any
    ) -> None:
        inputs, named, results = _memory(args), _memory(kwargs), _memory(out)

        def run() -> None:
            tree_map(
                lambda into, new: into.copy_(new) if _is_tensor(into) else None,
                results,
                func(*inputs, **named),
            )

        self._launch(_Op(name, "kernel", self._microseconds(inputs, named, results), run))

    def _with_values(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operation whose result's size depends on values, so PyTorch waits for them."""
        self._read(next(x for x in args if isinstance(x, DeviceTensor)))
        out = func(*_memory(args), **_memory(kwargs))
        self.launch(func._schema.name.removeprefix("aten::"), self.kernel_us)
        if any(map(_is_write, func._schema.arguments)):
            return args[0]
        return tree_map(lambda x: DeviceTensor(x, self) if _is_tensor(x) else x, out)

    def _copy(
        self, into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        """Copy between the two memories.

        A copy of pinned memory with non_blocking runs in the stream, like a kernel. For any other
        copy the CPU waits.
        """
        host, name = (
            (source, "copy to the GPU")
            if isinstance(into, DeviceTensor)
            else (into, "copy to the CPU")
        )
        free = non_blocking and host.untyped_storage().data_ptr() in self._pinned
        if self._capture is not None and not free:
            raise CudaError(NOT_WHILE_CAPTURING)
        one, other = _memory((into, source))
        self._launch(_Op(name, "copy", self.kernel_us, lambda: one.copy_(other)))
        if not free:
            self._wait(self._stream_free, "wait for a copy")
        return into

    def kernel(
        self, function: Callable, outputs: Callable[..., list] = lambda *args: [], name: str = ""
    ) -> Callable:
        """A user's kernel, for example in Triton: one launch, whatever it computes.

        function runs when the clock reaches the launch, on the tensors' memory, as if on a CPU.
        outputs(*args) gives the (size, dtype) of each tensor that the kernel returns. The first
        launch compiles the kernel, which a recording must not do.
        """
        name, compiled = name or getattr(function, "__name__", "kernel"), False

        def launcher(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled
            if not compiled and self._capture is not None:
                raise CudaError(
                    f"{NOT_WHILE_CAPTURING}\n(the kernel {name} is compiled and loaded when it is"
                    " first launched)"
                )
            compiled = True
            out = [self._allocate(tuple(size), dtype) for size, dtype in outputs(*args)]
            # The recorded call must not refer to `out`: the memory of `out` is free again when no
            # other reference to it is left.
            self._launch_into(name, _lists if out else _nothing, (function, *args), kwargs, out)
            return out[0] if len(out) == 1 else tuple(out) if out else None

        return launcher

    # --- graphs and events ------------------------------------------------------------------------

    def CUDAGraph(self) -> CUDAGraph:
        """An empty graph, to be recorded with `graph` and replayed."""
        return CUDAGraph(self)

    def graph_pool_handle(self) -> Pool:
        """Memory that several graphs can share, if they never run at the same time."""
        return Pool()

    @contextlib.contextmanager
    def graph(self, cuda_graph: CUDAGraph, pool: Pool | None = None) -> Iterator[None]:
        """Record the launches inside, without running them.

        pool: the memory for the recording's tensors; None makes a new pool.
        """
        self.synchronize()
        cuda_graph.pool, cuda_graph.ops = pool or Pool(), []
        self._capture = cuda_graph
        try:
            yield
        except BaseException:
            cuda_graph.ops = None
            raise
        finally:
            self._capture = None

    def Event(self) -> Event:
        """A mark to put into the stream and to wait for."""
        return Event(self)


class CUDAGraph:
    """A recorded sequence of kernels and copies, at fixed addresses.

    Made by `SimulatedGPU.CUDAGraph`.
    """

    def __init__(self, gpu: SimulatedGPU) -> None:
        self._gpu = gpu
        self.ops: list[_Op] | None = None
        self.pool = Pool()
        self.num_replays = 0

    def __len__(self) -> int:
        """The number of recorded kernels and copies."""
        return len(self.ops or [])

    def replay(self) -> None:
        """Launch the whole recording at once. Returns before it has run."""
        gpu = self._gpu
        if gpu._capture is not None:
            raise CudaError(NOT_WHILE_CAPTURING)
        if self.ops is None:
            raise CudaError("Called CUDAGraph::replay without a preceding successful capture.")
        gpu._check()
        gpu.num_replays += 1
        self.num_replays += 1
        gpu._advance("replay", "replay", gpu.replay_us)
        for op in self.ops:
            gpu._enqueue(op)


class Event:
    """A place in the stream. Made by `SimulatedGPU.Event`."""

    def __init__(self, gpu: SimulatedGPU) -> None:
        self._gpu, self._time = gpu, None

    def record(self) -> None:
        """Put the event behind everything launched so far."""
        if self._gpu._capture is not None:
            # Simplified: CUDA records the event, too.
            raise CudaError(NOT_WHILE_CAPTURING)
        self._time = max(self._gpu.now, self._gpu._stream_free)

    def query(self) -> bool:
        """Whether the GPU has reached the event.

        CudaError after 10,000 unsuccessful queries at the same time.
        """
        gpu = self._gpu
        if self._time is None or self._time <= gpu.now + 1e-9:
            return True
        gpu._asked = (gpu.now, gpu._asked[1] + 1 if gpu._asked[0] == gpu.now else 1)
        if gpu._asked[1] > 10_000:
            raise CudaError(
                f"{STANDS_STILL}: query() was asked 10,000 times in a row; synchronize() waits"
            )
        return False

    def synchronize(self) -> None:
        """Wait until the GPU has reached the event, and no longer."""
        self._gpu._wait(self._time or 0.0, "wait for an event")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to the other one."""
        if self._time is None or end._time is None:
            raise CudaError("Both events must be recorded before calculating elapsed time.")
        return (end._time - self._time) / 1000


@dataclass(eq=False)
class Pool:
    """The memory of recordings.

    Memory that no tensor refers to any more is given out again, also to another recording.
    """

    #: (memory, offset, bytes).
    _free: list[tuple[torch.Tensor, int, int]] = field(default_factory=list)
    num_bytes: int = 0

    def allocate(self, num_bytes: int) -> _Block:
        """The smallest free piece that is large enough, or new memory."""
        num_bytes = max(1, math.ceil(num_bytes / _GRAIN)) * _GRAIN
        fitting = [piece for piece in self._free if piece[2] >= num_bytes]
        if not fitting:
            self.num_bytes += num_bytes
            return _Block(self, torch.empty(num_bytes, dtype=torch.uint8), 0, num_bytes)
        memory, offset, size = piece = min(fitting, key=lambda piece: piece[2])
        self._free = [other for other in self._free if other is not piece]
        if size > num_bytes:
            self._free.append((memory, offset + num_bytes, size - num_bytes))
        return _Block(self, memory, offset, num_bytes)

    def release(self, memory: torch.Tensor, offset: int, num_bytes: int) -> None:
        """Take a piece back, and join it with its free neighbours."""
        for piece in [p for p in self._free if p[0] is memory]:
            if piece[1] + piece[2] == offset or offset + num_bytes == piece[1]:
                self._free = [other for other in self._free if other is not piece]
                offset, num_bytes = min(offset, piece[1]), num_bytes + piece[2]
        self._free.append((memory, offset, num_bytes))


class _Block:
    """A piece of a pool, for as long as a tensor refers to it."""

    def __init__(self, pool: Pool, memory: torch.Tensor, offset: int, num_bytes: int) -> None:
        self.pool, self.memory, self.offset, self.num_bytes = pool, memory, offset, num_bytes

    def __del__(self) -> None:
        self.pool.release(self.memory, self.offset, self.num_bytes)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _lists(function: Callable, *args: Any, **kwargs: Any) -> list:
    value = function(*args, **kwargs)
    return [value] if _is_tensor(value) else list(value)


def _nothing(function: Callable, *args: Any, **kwargs: Any) -> list:
    function(*args, **kwargs)
    return []


def _memory(values: Any) -> Any:
    """Replace our tensors by the memory behind them."""
    return tree_map(lambda x: x._memory if isinstance(x, DeviceTensor) else x, values)


def _meta(values: Any) -> Any:
    """Replace our tensors by meta tensors: shapes without numbers.

    PyTorch derives the shape of an operation's result from them.
    """

    def one(x: Any) -> Any:
        if not isinstance(x, DeviceTensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    return tree_map(one, values)


def _is_write(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _has_mask(name: str, args: tuple) -> bool:
    """Whether this is an index with a mask.

    PyTorch must know how many values of the mask are true.
    """
    if name not in ("index", "index_put_", "index_put"):
        return False
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _size(size: tuple) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], abc.Sequence) else tuple(size)


def _extent(size: abc.Sequence[int], stride: abc.Sequence[int]) -> int:
    """The number of elements from the first to the last of a strided tensor."""
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


# --- the bundled model on a simulated GPU ---------------------------------------------------------


def simulated_kernels(gpu: SimulatedGPU) -> Kernels:
    """A model's operations: each is one launch on this GPU, computed by the torch reference."""
    r = Kernels.reference()

    def like(*which: int) -> Callable[..., list]:
        return lambda *args: [(args[i].shape, args[i].dtype) for i in which]

    def attend(
        query: Any,
        k_cache: Any,
        v_cache: Any,
        block_table: Any,
        seq_lens: Any,
        *args: Any,
        **more: Any,
    ) -> Any:
        """Compute attention as a kernel does: follow the pointer to a row of the block table.

        Where the row is too short, the kernel reads the next row.
        """
        width, needed = block_table.shape[1], -(-int(seq_lens.max()) // k_cache.shape[2])
        if needed > width:
            at = (torch.arange(len(seq_lens)) * width)[:, None] + torch.arange(needed)
            block_table = block_table.flatten()[at.clamp(max=block_table.numel() - 1)]
        return r.decode_attention(query, k_cache, v_cache, block_table, seq_lens, *args, **more)

    return Kernels(
        name="simulated",
        prefill_attention=gpu.kernel(r.prefill_attention, like(0), "prefill_attention"),
        decode_attention=gpu.kernel(attend, like(0), "decode_attention"),
        merge_attention=r.merge_attention,
        store_kv=gpu.kernel(r.store_kv, name="store_kv"),
        rms_norm=gpu.kernel(r.rms_norm, like(0), "rms_norm"),
        add_rms_norm=gpu.kernel(r.add_rms_norm, like(0, 0), "add_rms_norm"),
        qk_norm_rope=gpu.kernel(r.qk_norm_rope, like(0, 1), "qk_norm_rope"),
        linear=gpu.kernel(
            r.linear, lambda x, w, *_: [((*x.shape[:-1], w.shape[0]), x.dtype)], "linear"
        ),
        silu_mul=gpu.kernel(
            r.silu_mul, lambda x: [((*x.shape[:-1], x.shape[-1] // 2), x.dtype)], "silu_mul"
        ),
        sample=gpu.kernel(r.sample, lambda logits, *_: [(logits.shape[:1], torch.int64)], "sample"),
    )


class SimulatedModel:
    """The bundled model with its KV cache on a simulated GPU, with greedy decoding.

    Each sequence has a slot. state: the GPU's state of each slot, as in the engine; the last slot,
    `spare_slot`, belongs to no sequence. At admission a slot gets all blocks that it will need.
    These are scattered over the cache, and block 0 belongs to the first slot.
    """

    def __init__(
        self,
        gpu: SimulatedGPU,
        *,
        num_slots: int = 8,
        block_size: int = 16,
        max_model_len: int = 256,
        num_blocks: int = 64,
    ) -> None:
        self.gpu = gpu
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.spare_slot = num_slots
        config = load_config(BUNDLED_MODEL_PATH)
        options = LoadOptions(torch.float32, torch.device("cpu"), max_model_len)
        self._model = load_model(BUNDLED_MODEL_PATH, config, simulated_kernels(gpu), options)
        gpu.move(self._model)
        shape = (num_blocks, config.num_key_value_heads, block_size, config.head_dim)
        self.caches = [
            (gpu.zeros(*shape), gpu.zeros(*shape)) for _ in range(config.num_hidden_layers)
        ]
        self.max_blocks = -(-max_model_len // block_size)
        self.state = DecodeState(
            gpu.zeros(num_slots + 1, self.max_blocks, dtype=torch.int32),
            *(gpu.zeros(num_slots + 1, dtype=torch.int64) for _ in range(2)),
        )
        #: Slot -> its blocks.
        self.blocks: dict[int, list[int]] = {}
        # Neighbours in a block table must not be neighbours in memory.
        self._free_blocks = [block for start in range(3) for block in range(start, num_blocks, 3)]

    @torch.no_grad()
    def admit(self, slot: int, prompt: abc.Sequence[int], num_tokens: int) -> int:
        """Compute a sequence's prompt in a slot. Returns its first token.

        num_tokens: the most tokens that the sequence will have.
        """
        gpu, size = self.gpu, self.block_size
        needed = -(-num_tokens // size)
        if needed > min(len(self._free_blocks), self.max_blocks) or slot in self.blocks:
            raise ValueError(f"admit: no {needed} free blocks for slot {slot}, or it is taken")
        self.blocks[slot], self._free_blocks = (
            self._free_blocks[:needed],
            self._free_blocks[needed:],
        )
        table = torch.zeros(1, self.max_blocks, dtype=torch.int32)
        table[0, :needed] = torch.tensor(self.blocks[slot])
        inputs = build_batch([BatchRow(list(prompt), 0, True)], table.numpy(), size)
        about = inputs.attention
        metadata = AttentionMetadata(
            **vars(about)
            | {name: gpu.tensor(value) for name, value in vars(about).items() if _is_tensor(value)}
        )
        ids, positions = gpu.tensor(inputs.token_ids), gpu.tensor(inputs.positions)
        hidden = self._model(ids, positions, self.caches, metadata)
        token = int(self._model.compute_logits(hidden[-1:]).argmax(dim=-1)[0])
        self.state.block_table[slot] = gpu.tensor(table[0])
        self.state.last_token[slot], self.state.position[slot] = token, len(prompt)
        return token

    def release(self, slot: int) -> None:
        """Free the blocks of a sequence that has ended; they are the next to be given out.

        The state of its slot stays as it is.
        """
        self._free_blocks = self.blocks.pop(slot)[::-1] + self._free_blocks

    @torch.no_grad()
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """Compute one token of each of B sequences. Returns the next token of each, [B] int64.

        token_ids, positions: [B] int64. seq_lens: [B] int32, the context including this token; 0
        reads nothing. block_table: [B, blocks] int32. slot_mapping: [B] int64, where K and V are
        written; -1 is nowhere.
        """
        batch = len(token_ids)
        metadata = AttentionMetadata(
            query_start_loc=seq_lens,
            seq_lens=seq_lens,
            block_table=block_table,
            slot_mapping=slot_mapping,
            num_decodes=batch,
            max_query_len=1,
            max_seq_len=self.max_model_len,
            max_decode_seq_len=self.max_model_len,
        )
        hidden = self._model(token_ids, positions, self.caches, metadata)
        return self._model.compute_logits(hidden).argmax(dim=-1)

    def step(self, slots: torch.Tensor) -> torch.Tensor:
        """Compute the next tokens of some slots: the operation that the engine records.

        slots: [B] int64. Returns the tokens, [B]; `state` stores them, too.
        """
        state = self.state
        about = state.decode_metadata(slots, self.block_size, self.max_model_len)
        token_ids = self.forward(
            state.last_token[slots],
            state.position[slots],
            about.seq_lens,
            about.block_table,
            about.slot_mapping,
        )
        state.advance(slots, token_ids)
        return token_ids

    def written(self) -> torch.Tensor:
        """The sums of the first layer's keys, one number per place in the cache.

        Returns [num_blocks, block_size] on the CPU; 0 where nothing was written.
        """
        return self.gpu._read(self.caches[0][0]).abs().sum(dim=(1, 3)).clone()


@dataclass(frozen=True)
class Row:
    """A decode step's input for one sequence: its last token, that token's position, its blocks."""

    token_id: int
    position: int
    blocks: list[int]


class RowServer:
    """A server of requests that come and go. Recordings decode them.

    A recording reads a batch of rows at fixed addresses. batch_cls: called with (gpu, sizes,
    block_size, max_model_len, longest_prompt). It has the tensors token_ids, positions, seq_lens,
    block_table and slot_mapping with one row per sequence; a graph of size n takes the first n
    rows. Its method `fill(rows)` returns the size to replay.
    """

    def __init__(
        self,
        gpu: SimulatedGPU,
        batch_cls: Callable[..., Any],
        sizes: abc.Sequence[int],
        longest_prompt: int,
    ) -> None:
        self.gpu, self.model = gpu, SimulatedModel(gpu, num_slots=max(sizes))
        model = self.model
        self.batch = batch_cls(
            gpu, list(sizes), model.block_size, model.max_model_len, longest_prompt
        )
        #: Name -> (slot, its prompt's length, its tokens), in the order of the rows.
        self.running: dict[str, tuple[int, int, list[int]]] = {}
        self.answers: dict[str, list[int]] = {}
        #: The number of sequences, and of the graph's rows, in each step.
        self.counts: list[tuple[int, int]] = []
        self._graphs: dict[int, tuple[CUDAGraph, DeviceTensor]] = {}
        self._pool = gpu.graph_pool_handle()

    def admit(self, name: str, prompt: abc.Sequence[int], max_tokens: int) -> None:
        """Admit a request: compute its prompt and its first token."""
        slot = min(
            set(range(len(self.running) + 1)) - {slot for slot, _, _ in self.running.values()}
        )
        first = self.model.admit(slot, prompt, len(prompt) + max_tokens)
        self.answers[name] = [first]
        self.running[name] = slot, len(prompt), self.answers[name]

    def leave(self, name: str) -> None:
        """Remove a request; its blocks are the next to be given out."""
        self.model.release(self.running.pop(name)[0])

    def rows(self) -> list[Row]:
        """The rows of the next step."""
        return [
            Row(tokens[-1], prompt + len(tokens) - 1, list(self.model.blocks[slot]))
            for slot, prompt, tokens in self.running.values()
        ]

    def tables(self) -> dict[str, list[int]]:
        """Name -> blocks, for the running requests."""
        return {name: self.model.blocks[slot] for name, (slot, _, _) in self.running.items()}

    def step(self) -> None:
        """Compute one token of every request."""
        size = self.batch.fill(self.rows())
        self.counts.append((len(self.running), size))
        if size not in self._graphs:
            self._graphs[size] = self._record(size)
        graph, token_ids = self._graphs[size]
        graph.replay()
        for (_, _, tokens), token in zip(self.running.values(), token_ids.tolist(), strict=False):
            tokens.append(token)

    def _record(self, size: int) -> tuple[CUDAGraph, DeviceTensor]:
        graph, batch = self.gpu.CUDAGraph(), self.batch
        inputs = (
            batch.token_ids,
            batch.positions,
            batch.seq_lens,
            batch.block_table,
            batch.slot_mapping,
        )
        # The first launch compiles the kernels. This call writes nothing.
        if not self._graphs:
            empty = [torch.zeros_like(tensor[:1]) for tensor in inputs]
            self.model.forward(*empty[:-1], empty[-1] - 1)
        with self.gpu.graph(graph, pool=self._pool):
            token_ids = self.model.forward(*(tensor[:size] for tensor in inputs))
        return graph, token_ids


# --- steps planned by the real scheduler ----------------------------------------------------------


@dataclass(frozen=True)
class StepInFlight:
    """A step that was launched.

    token_ids: in pinned memory, one for each of `batch.sampled`; valid after the event `arrived`.
    """

    token_ids: torch.Tensor
    arrived: Event


class SimulatedEngine:
    """The package's scheduler on a simulated GPU, for your own drivers.

    The model is replaced by sums. requests: (prompt tokens, most output tokens) of each. Some
    answers end earlier, by an end token. schedule_us, update_us: CPU time to plan a step and to
    process its tokens. step_us: GPU time of a step.
    """

    VOCABULARY, END = 97, 1

    def __init__(
        self,
        gpu: SimulatedGPU,
        requests: abc.Sequence[tuple[int, int]],
        *,
        schedule_us: float = 400.0,
        update_us: float = 600.0,
        step_us: float = 1500.0,
        max_num_seqs: int = 4,
    ) -> None:
        self.gpu = gpu
        self.schedule_us = schedule_us
        self.update_us = update_us
        self.step_us = step_us
        manager = BlockManager(512, 16, False)
        self._scheduler = Scheduler(manager, max_num_seqs, 4096)
        self.sequences = [
            Sequence(
                i,
                [(5 * i + j) % 90 + 2 for j in range(prompt)],
                SamplingParams(),
                frozenset([self.END]),
                prompt + answer,
            )
            for i, (prompt, answer) in enumerate(requests)
        ]
        for seq in self.sequences:
            self._scheduler.add(seq)
        # On the GPU: the last token of each slot.
        self._last = [0] * max_num_seqs
        self._in_flight: deque[ScheduledBatch] = deque()
        self.num_steps = self.most_in_flight = 0

    @property
    def answers(self) -> list[list[int]]:
        """The tokens of every request so far."""
        return [[token for token in seq.output_token_ids if token >= 0] for seq in self.sequences]

    @property
    def unfinished(self) -> int:
        """The number of requests that are not finished."""
        return sum(not seq.is_finished for seq in self.sequences)

    def schedule(self) -> ScheduledBatch | None:
        """Plan the next step.

        None when there is nothing to compute, or nothing until results arrive.
        """
        self.gpu.work("schedule", self.schedule_us)
        return self._scheduler.schedule() or None

    def launch(self, batch: ScheduledBatch) -> StepInFlight:
        """Start a step, and after it the copy of its tokens to the CPU. Returns at once."""
        gpu = self.gpu
        rows = [
            (
                item.sequence.slot,
                list(item.sequence.token_ids[item.start : item.end]),
                item.sample_position,
            )
            for item in batch.items
        ]
        sampled: list[int] = []

        def run() -> None:
            for slot, tokens, position in rows:
                last = self._last[slot] if tokens == [-1] else sum(tokens)
                self._last[slot] = (31 * last + 7 * (position or 0) + 3) % self.VOCABULARY
                sampled.append(self._last[slot])

        host = gpu.pinned([0] * len(batch.sampled))
        gpu._advance("launch", "replay", gpu.replay_us)
        gpu._enqueue(_Op(f"step {self.num_steps}", "kernel", self.step_us, run))
        gpu._enqueue(
            _Op("tokens", "copy", gpu.kernel_us, lambda: host.copy_(torch.tensor(sampled)))
        )
        arrived = gpu.Event()
        arrived.record()
        self._in_flight.append(batch)
        self.num_steps += 1
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        return StepInFlight(host, arrived)

    def update(self, batch: ScheduledBatch, token_ids: abc.Sequence[int]) -> None:
        """Process the tokens of a step. The steps must come in the order of their launches."""
        if not self._in_flight or self._in_flight[0] is not batch:
            raise ValueError("update: results must be brought in the order of the steps, each once")
        self._in_flight.popleft()
        self.gpu.work("update", self.update_us)
        self._scheduler.update(batch, [[token_id] for token_id in token_ids])


def drive(engine: SimulatedEngine, ahead: int) -> int:
    """Serve all requests. Returns the number of steps.

    ahead: the number of steps to plan before the tokens of the step before are known; 0: none. The
    loop is that of `LLMEngine.step`, with async_scheduling (1) and without it (0).
    """
    in_flight: deque[tuple[ScheduledBatch, StepInFlight]] = deque()
    while True:
        batch = engine.schedule()
        if batch is not None:
            in_flight.append((batch, engine.launch(batch)))
        elif not in_flight:
            return engine.num_steps
        while len(in_flight) > (ahead if batch is not None else 0):
            batch_before, step = in_flight.popleft()
            step.arrived.synchronize()
            engine.update(batch_before, step.token_ids.tolist())
