"""Triton at the first launch, not at import: it costs 0.2 s, and macOS and Windows have no wheel
for it.

A kernel file writes ``from minivllm.kernels._triton import tl, triton`` and then reads like any
other Triton file. Until the first launch the two names are stand-ins. That launch puts the real
modules in their place, and Triton's own functions in place of the `Kernel`s, so that from then on
nothing of this file is in the way."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from minivllm.kernels._interpreter import quicken

# before a launch only annotations are read; Triton takes strings
tl: Any = SimpleNamespace(constexpr="tl.constexpr")


def _load() -> Any:
    try:
        import triton.language
    except ImportError as error:
        raise ImportError(
            "Triton is not installed; it has wheels for Linux only (pip install"
            " 'minivllm[triton]'). Kernels.reference() runs everywhere."
        ) from error
    quicken()
    return triton


class LazyKernel:
    """A function under ``@triton.jit`` that Triton has not seen yet."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        self.fn, self._options, self._jitted = (
            function,
            options,
            None,
        )  # `fn` as in Triton's own JITFunction

    def jitted(self) -> Any:
        """Triton's function; the stand-ins in its file's globals go, where Triton looks `tl` and
        helpers up.
        """
        if self._jitted is None:
            self._jitted = _load().jit(self.fn, **self._options)
            names = self.fn.__globals__
            names.update(triton=_load(), tl=_load().language)
            names.update(
                {
                    name: value.jitted()
                    for name, value in list(names.items())
                    if isinstance(value, LazyKernel)
                }
            )
        return self._jitted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.jitted()[grid]


class _Triton:
    """`triton` before the first launch: `jit` waits, whatever else is asked for imports the real
    one.
    """

    @staticmethod
    def jit(function: Callable | None = None, **options: Any) -> Any:
        return (
            LazyKernel(function, options) if function else functools.partial(_Triton.jit, **options)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(_load(), name)


triton: Any = _Triton()


def check_rows(operation: str, *tensors: torch.Tensor) -> None:
    """Kernels step through the first dimension by its stride and take the rest as contiguous; else
    ValueError.
    """
    for tensor in tensors:
        if not tensor[:1].is_contiguous():
            raise ValueError(
                f"{operation}: only the first dimension may be strided, got strides"
                f" {tensor.stride()}"
            )


def num_multiprocessors(device: torch.device) -> int:
    """About how many programs run at once; the interpreter runs one, and 4 there lets splits be
    seen.
    """
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )


#: Rows up to which a kernel is launched early. Larger steps have no idle multiprocessors for it: on
#: an H200 it made steps of one request 1.2 times as fast, and those of 256 requests 2 % slower.
EARLY_ROWS = 16


def launched_early(rows: int, device: torch.device) -> dict[str, bool]:
    """Options of a launch that may begin while the kernel before it still runs (Hopper's
    programmatic dependent launch), and the kernel's constant EARLY that says so.

    Between two small kernels the GPU would be idle for a microsecond. An early kernel is started
    already, and waits at `gdc_wait` until everything that the kernels before it wrote can be read.
    What stands before that line may only read what no kernel writes, such as weights.
    """
    early = rows <= EARLY_ROWS and device.type == "cuda" and _is_hopper(device.index)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@functools.cache
def _is_hopper(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)
