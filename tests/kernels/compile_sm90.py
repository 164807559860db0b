"""Compile for Hopper what every launcher would launch, on a machine without a GPU; prints one JSON object.

Run by test_compile.py in a process of its own, because TRITON_INTERPRET must not be set here. The launchers run as they
are, on CPU tensors; instead of a launch, the kernel is compiled with the very arguments and options they chose.
"""

import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from minivllm.kernels import Kernels, online_softmax

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
results: dict[str, dict] = {}


def compile_instead(self, *args, grid, warmup, **kwargs):
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    bound = inspect.signature(self.fn).bind(*args, **kwargs).arguments
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(self.params, bound.values(), strict=True)):
        divisible = False
        if parameter.is_constexpr or (
            value == 1 if isinstance(value, int) and not parameter.do_not_specialize else False
        ):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name], divisible = "i32", value % 16 == 0 and not parameter.do_not_specialize
        else:
            signature[parameter.name] = "fp32"
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(self, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    numbers = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
    results.setdefault(case, {})[self.fn.__name__] = {**numbers, "shared": compiled.metadata.shared, **options}


def launch_everything(dtype: torch.dtype) -> None:
    """Qwen3-0.6B's shape; every constexpr variant that an engine meets."""
    global case
    kernels = Kernels.triton()
    tokens, heads, kv_heads, dim, block_size, vocabulary = 64, 16, 8, 128, 64, 9000
    x = torch.zeros(tokens, 1024, dtype=dtype)
    qkv = torch.zeros(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype).unflatten(1, (-1, dim))
    query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
    cache = torch.zeros(8, kv_heads, block_size, dim, dtype=dtype)
    small = torch.zeros(8, kv_heads, 16, dim, dtype=dtype)
    table = torch.zeros(4, 20, dtype=torch.int32)
    lengths, starts = torch.ones(4, dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    weight, cos_sin, long = torch.zeros(dim, dtype=dtype), torch.zeros(99, dim), torch.zeros(tokens, dtype=torch.int64)
    rows = torch.zeros(4, dtype=torch.int64)
    case = f"{str(dtype).removeprefix('torch.')}"

    def prefill(cache, longest):
        kernels.prefill_attention(
            query, cache, cache, table, starts, lengths, 0.1, max_query_len=longest, max_seq_len=999
        )

    def decode(cache, splits):
        kernels.decode_attention(
            query[:4], cache, cache, table, lengths, 0.1, max_seq_len=999, num_splits=splits,
            merge_attention=kernels.merge_attention,
        )  # fmt: skip

    cases = {
        "rms_norm": lambda: kernels.rms_norm(x, x[0], 1e-6),
        "add_rms_norm": lambda: kernels.add_rms_norm(x, x, x[0], 1e-6),
        "qk_norm_rope": lambda: kernels.qk_norm_rope(query, key, weight, weight, cos_sin, long, 1e-6),
        "rope": lambda: kernels.qk_norm_rope(query, key, None, None, cos_sin, long, 1e-6),
        "silu_mul": lambda: kernels.silu_mul(x),
        "store_kv": lambda: kernels.store_kv(key, value, cache, cache, long),
        "softmax": lambda: online_softmax.softmax(x),
        "prefill, block_size 64": lambda: prefill(cache, 999),
        "prefill, short": lambda: prefill(cache, 99),
        "prefill, decodes": lambda: prefill(cache, 9),
        "prefill, block_size 16": lambda: prefill(small, 999),
        "decode": lambda: decode(cache, 1),
        "decode, splits": lambda: decode(cache, 4),
        "decode, block_size 16": lambda: decode(small, 4),
        "sample": lambda: kernels.sample(
            torch.zeros(4, vocabulary, dtype=dtype), torch.ones(4), None, None, None, rows, rows
        ),
    }
    for name, launch in cases.items():
        case = f"{name} {str(dtype).removeprefix('torch.')}"
        started = time.perf_counter()
        try:
            launch()
        except Exception as error:
            results.setdefault(case, {})["error"] = f"{type(error).__name__}: {error}"
        results[case]["seconds"] = round(time.perf_counter() - started, 2)


JITFunction.run = compile_instead
case = ""
for dtype in (torch.float32, torch.bfloat16):
    launch_everything(dtype)
json.dump(results, sys.stdout, indent=1)
