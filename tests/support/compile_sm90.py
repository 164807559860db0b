"""Compile every launcher's kernels for Hopper on a machine without a GPU; prints one JSON object.

test_kernel_compile.py runs this in another process, because TRITON_INTERPRET must not be set here.
The launchers run unchanged, on CPU tensors. Instead of a launch, the kernel is compiled with the
arguments and options that the launcher chose.
"""

import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from functools import partial

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from minivllm.kernels import Kernels, online_softmax, quantized
from minivllm.kernels.kv_cache import QuantizedCache
from minivllm.kernels.rotary import NormRope

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
launches: list[tuple[JITFunction, dict, dict, dict, dict]] = []


def record(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
    """Replace `JITFunction.run`: record what Triton would specialise this launch on."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = inspect.signature(self.fn).bind(*args, **kwargs).arguments.values()
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(self.params, values, strict=True)):
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            divisible = isinstance(value, int) and value % 16 == 0
        if divisible and specialised:
            attributes[(index,)] = [["tt.divisibility", 16]]
    launches.append((self, signature, constants, attributes, options))


def compile_for_hopper(
    kernel: JITFunction, signature: dict, constants: dict, attributes: dict, options: dict
) -> dict:
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared, **options}


def cases(dtype: torch.dtype) -> dict:
    """Launches of Qwen3-0.6B's shape; together they cover every variant that an engine meets."""
    kernels = Kernels.triton()
    tokens, heads, kv_heads, dim = 64, 16, 8, 128
    x = torch.zeros(tokens, 1024, dtype=dtype)
    qkv = torch.zeros(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype).unflatten(1, (-1, dim))
    query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
    pages: dict = {size: torch.zeros(8, kv_heads, size, dim, dtype=dtype) for size in (16, 64)}
    pages |= {kind: QuantizedCache.zeros((8, kv_heads, 64, dim), kind) for kind in ("fp8", "int8")}
    weight, cos_sin = torch.zeros(dim, dtype=dtype), torch.zeros(99, dim)
    longs = torch.zeros(tokens, dtype=torch.int64)

    def prefill(
        pages_of: int | str,
        longest: int,
        batch: int = 4,
        width: int = 20,
        skip: int = 0,
        context: int = 999,
    ) -> None:
        table = torch.zeros(batch, width, dtype=torch.int32)[skip:]
        lengths = torch.ones(batch, dtype=torch.int32)[skip:]
        starts = torch.arange(batch + 1, dtype=torch.int32)[skip:]
        bounds = {"max_query_len": longest, "max_seq_len": context}
        kernels.prefill_attention(
            query[skip:],
            pages[pages_of],
            pages[pages_of],
            table,
            starts,
            lengths,
            0.1,
            **bounds,
        )

    def decode(
        pages_of: int | str, splits: int, batch: int = 4, width: int = 20, longest: int = 999
    ) -> None:
        table = torch.zeros(batch, width, dtype=torch.int32)
        lengths = torch.ones(batch, dtype=torch.int32)
        kernels.decode_attention(
            query[:batch],
            pages[pages_of],
            pages[pages_of],
            table,
            lengths,
            0.1,
            max_seq_len=longest,
            num_splits=splits,
            merge_attention=kernels.merge_attention,
        )

    def eight_bit_cache(kind: str) -> None:
        """What differs most between the kinds; each compiles for some seconds."""
        cache = pages[kind], pages[kind]
        if kind == "fp8":
            kernels.store_kv(key, value, *cache, longs)
            decode(kind, 1)
            prefill(kind, 999)
        else:
            given = NormRope(weight, weight, cos_sin, longs, 1e-6)
            kernels.qk_norm_rope_store(query, key, value, given, cache, longs)
            decode(kind, 4)
            prefill(kind, 9)

    def sample(batch: int = 4) -> None:
        logits, row = torch.zeros(batch, 9000, dtype=dtype), longs[:batch]
        kernels.sample(logits, torch.ones(batch), None, None, None, row, row)

    def w8(operation: str, weight_dtype: torch.dtype, rows: int, block: int = 0) -> None:
        features, width = 4096, 1024
        scale = torch.ones((32, 8) if block else (features, 1))
        weight = torch.zeros(features, width, dtype=weight_dtype)
        getattr(kernels, operation)(x[:1].expand(rows, -1), weight, scale)

    def many_shapes() -> None:
        """Launch with many shapes. No shape may need a second version of a kernel.

        The exception is 1, which Triton always specialises on.
        """
        for batch, width, longest in ((2, 20, 900), (3, 21, 901), (16, 32, 1024), (33, 77, 4000)):
            prefill(64, longest, batch, width, skip=batch // 3)
            decode(64, 1 + batch, batch, width, longest)
            sample(batch)

    return {
        "rms_norm": lambda: kernels.rms_norm(x, x[0], 1e-6),
        "add_rms_norm": lambda: kernels.add_rms_norm(x, x, x[0], 1e-6),
        "qk_norm_rope": lambda: kernels.qk_norm_rope(
            query, key, weight, weight, cos_sin, longs, 1e-6
        ),
        "rope": lambda: kernels.qk_norm_rope(query, key, None, None, cos_sin, longs, 1e-6),
        "silu_mul": lambda: kernels.silu_mul(x),
        "store_kv": lambda: kernels.store_kv(key, value, pages[64], pages[64], longs),
        "qk_norm_rope_store": lambda: kernels.qk_norm_rope_store(
            query,
            key,
            value,
            NormRope(weight, weight, cos_sin, longs, 1e-6),
            (pages[64], pages[64]),
            longs,
        ),
        "linear": lambda: kernels.linear(x[:1], torch.zeros(4096, 1024, dtype=dtype)),
        "w8a16, one row": lambda: w8("linear_w8a16", torch.int8, 1),
        "w8a16, blocks, one row": lambda: w8("linear_w8a16", quantized.FP8, 1, block=128),
        "w8a16, some rows": lambda: w8("linear_w8a16", torch.int8, 64),
        "w8a16, blocks, some rows": lambda: w8("linear_w8a16", quantized.FP8, 64, block=128),
        "w8a16, many rows": lambda: w8("linear_w8a16", torch.int8, 257),
        "w8a8, one row": lambda: w8("linear_w8a8", quantized.FP8, 1),
        "w8a8, some rows": lambda: w8("linear_w8a8", quantized.FP8, 64),
        "softmax": lambda: online_softmax.softmax(x),
        "prefill, block_size 64": lambda: prefill(64, 999),
        "prefill, block_size 64, long": lambda: prefill(64, 999, context=9999),
        "prefill, block_size 64, short": lambda: prefill(64, 99),
        "prefill, block_size 64, single tokens": lambda: prefill(64, 9),
        "prefill, block_size 16": lambda: prefill(16, 999),
        "decode, block_size 64": lambda: decode(64, 1),
        "decode, block_size 64, splits": lambda: decode(64, 4),
        "decode, block_size 16, splits": lambda: decode(16, 4),
        # In bfloat16 alone, which saves time: the GPU's tests compile the other dtypes.
        **{
            f"store and attention, {kind}": partial(eight_bit_cache, kind)
            for kind in ("fp8", "int8")
            if dtype == torch.bfloat16
        },
        "sample": sample,
        "many shapes": many_shapes,
    }


JITFunction.run = record
results: dict[str, dict] = {}
for dtype in (torch.float32, torch.bfloat16):
    for name, launch in cases(dtype).items():
        result = results[f"{name} {str(dtype).removeprefix('torch.')}"] = {
            "kernels": [],
            "versions": {},
        }
        try:
            launches.clear()
            launch()
            versions = {repr(launched): launched for launched in launches}
            for launched in versions.values():
                count = result["versions"].get(launched[0].fn.__name__, 0)
                result["versions"][launched[0].fn.__name__] = count + 1
                if name != "many shapes":
                    result["kernels"].append(
                        {"name": launched[0].fn.__name__, **compile_for_hopper(*launched)}
                    )
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
json.dump(results, sys.stdout, indent=1)
