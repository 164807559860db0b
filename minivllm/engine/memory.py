"""Check before an engine starts whether it fits into memory, and raise a typed error if not.

When a program asks for more memory than there is, one of three things happens on a CPU: torch
raises a RuntimeError that names a line of C++; or the system promises the memory and kills the
process at the first write; or Python builds objects for minutes. So the sum is computed before
anything is allocated. A GPU reports clearly when it is full; for an engine on a GPU, only its
memory on the CPU is counted here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from minivllm.config import ModelConfig, ResolvedConfig
from minivllm.errors import ConfigError, OutOfMemoryError

GIB = 1 << 30
#: Bytes of Python objects and of rows of small tensors: a little more than was measured.
SLOT_BYTES, BLOCK_BYTES = 160, 256


def check_memory(
    model: ModelConfig, config: ResolvedConfig, num_ranks: int, cache_bytes: int
) -> None:
    """Raise `OutOfMemoryError` if this rank's start cannot fit into the CPU's memory.

    config: resolved. cache_bytes: the size of this rank's KV cache; 0 if it lies on a GPU or is
    not known.
    """
    parts = {"the sequences' tables": _table_bytes(config), "the KV cache": cache_bytes}
    if config.device.partition(":")[0] == "cpu":
        itemsize = getattr(torch, config.dtype).itemsize
        weights = model.num_parameters * itemsize
        if config.quantization is not None:  # all layers but embedding and head
            weights -= model.num_block_parameters * (itemsize - 1)
        parts["the weights"] = weights // num_ranks
        parts["the table of rotary angles"] = 2 * config.max_model_len * model.head_dim * 4
    needed, free = sum(parts.values()), available_bytes()
    if free is None or needed <= free:
        return
    largest = max(parts, key=lambda name: parts[name])
    raise OutOfMemoryError(
        f"Starting takes {_gib(needed)} of memory, of which {_gib(parts[largest])} are {largest}; "
        f"{_gib(free)} are free. {_advice(largest, config)}."
    )


def available_bytes() -> int | None:
    """The memory that this process may still take, in bytes; None where unknown (not on Linux).

    The smallest of three: the machine's available memory and swap, the limit of the control group
    (of a container), and the limit of the address space (`ulimit -v`).
    """
    found = [_machine(), _control_group(), _address_space()]
    known = [number for number in found if number is not None]
    return max(0, min(known)) if known else None


@contextmanager
def typed_start_errors(device_type: str) -> Iterator[None]:
    """Turn out-of-memory errors of torch, NumPy and the system into `OutOfMemoryError`."""
    try:
        yield
    except ImportError as error:
        # The first launch of a kernel imports Triton.
        if "Triton" not in str(error):
            raise
        raise ConfigError(f"{error} attention_backend='torch' needs no Triton.") from error
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OutOfMemoryError(
            f"The {device_type} has too little memory to start: lower num_kv_blocks,"
            " gpu_memory_utilization, max_num_batched_tokens or max_num_seqs, or use a smaller"
            f" dtype. ({reason})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error reports a lack of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    texts = (
        "can't allocate memory",
        "not enough memory",
        "Cannot allocate memory",
        "calculation overflowed",
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _table_bytes(config: ResolvedConfig) -> int:
    """Bytes of the block table, on the CPU and on the device, and of each slot and block."""
    blocks_per_seq = -(-config.max_model_len // config.block_size)
    tables = config.max_num_seqs * (blocks_per_seq * 8 + SLOT_BYTES)
    return tables + (config.num_kv_blocks or 0) * BLOCK_BYTES


def _advice(largest: str, config: ResolvedConfig) -> str:
    if largest == "the weights":
        smaller = (
            "" if config.dtype != "float32" else " or dtype='bfloat16', which is half as large"
        )
        if config.quantization is None:
            smaller += " or quantization='int8', whose layers take a quarter of float32's memory"
        return f"Use a smaller model{smaller}"
    if largest == "the KV cache" and config.num_kv_blocks:
        return f"Lower num_kv_blocks={config.num_kv_blocks}"
    if largest == "the sequences' tables":
        return f"Lower max_num_seqs={config.max_num_seqs}, max_model_len or num_kv_blocks"
    return f"Lower max_model_len={config.max_model_len}"


def _machine() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        return (
            (kib["MemAvailable"] + kib.get("SwapFree", 0)) * 1024 if "MemAvailable" in kib else None
        )
    return None


def _control_group() -> int | None:
    """The limit of the control group (version 2), minus its memory that cannot be reclaimed."""
    folder = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        # The file holds "max" if there is no limit.
        limit = int((folder / "memory.max").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - int(stat.get("anon", 0)) - int(stat.get("unevictable", 0))
    return None


def _address_space() -> int | None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            return limit - used
    return None


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"
