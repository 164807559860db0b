"""Each kernel beside its floor, and beside torch's own ways to compute the same.

The floor of a row is the longer of bytes / (read bandwidth) and FLOPs / (matmul rate), both
measured in the same run. "minivllm" means the kernels that an engine takes there: on a GPU the
Triton kernels, on a CPU `Kernels.cpu`, with few and small cases.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minivllm.bench.cases import KERNELS
from minivllm.bench.costs import (
    Rates,
    attention_bytes,
    attention_flops,
    causal_pairs,
    kv_row_bytes,
)
from minivllm.bench.report import Deadline, attempt, environment, say
from minivllm.bench.shapes import shape_config
from minivllm.bench.timing import measure, measure_rates, num_sets, rates_of
from minivllm.config import ModelConfig
from minivllm.kernels import Kernels
from minivllm.kernels.cpu import choose_onednn
from minivllm.kernels.kv_cache import Cache, QuantizedCache
from minivllm.kernels.online_softmax import softmax, softmax_reference
from minivllm.kernels.rotary import NormRope
from minivllm.models.loader import weight_shapes
from minivllm.parallel.launch import pick_device

#: (sequences, new tokens each, context each, the new tokens included)
PREFILL = {
    "cuda": [(64, 256, 256), (16, 1024, 1024), (4, 4096, 4096), (1, 16384, 16384), (4, 512, 8192)],
    "cpu": [(4, 64, 64), (1, 256, 256), (2, 32, 192)],
}
#: (sequences, context each); a pair of contexts is a range to draw from.
DECODE: dict[str, list[tuple[int, int | tuple[int, int]]]] = {
    "cuda": [(256, 1024), (64, 8192), (256, 4096), (256, (100, 2000)), (32, 1024), (1, 4096)],
    "cpu": [(8, 256), (1, 1024), (16, (10, 200))],
}
#: The quantized caches that the first case of DECODE is measured with, too.
QUANTIZED = {"cuda": ["fp8", "int8"], "cpu": ["int8"]}
#: Tokens of a step, for the operations on rows; rows and vocabulary of the logits (None: the
#: model's).
ROWS = {"cuda": [256, 8192], "cpu": [16, 256]}
#: Rows and numbers per row, for the softmax of chapter 01. The long rows do not stay in the cache
#: between two passes.
SOFTMAX = {"cuda": [(8192, 1024), (512, 262_144)], "cpu": [(64, 512)]}
LOGITS: dict[str, tuple[int, int | None]] = {"cuda": (256, None), "cpu": (16, 8192)}
#: Tokens of a step, for the matrix products.
LINEAR_ROWS = {"cuda": [1, 64, 256], "cpu": [1, 16]}


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. prepare: what to make of a set of inputs first, outside of the
    time.
    """

    call: Callable[..., Any]
    prepare: Callable[..., tuple] | None = None
    graph: bool = True
    #: Brings the output into the form of ours, to compare them.
    view: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """Some work: its cost, a maker of inputs, and the ways to do it; the first is ours."""

    kernel: str
    name: str
    bytes: int
    flops: int
    make: Callable[[], tuple]
    variants: dict[str, Variant]
    #: Whether arithmetic is the limit, so that rows quote TFLOP/s.
    arithmetic: bool = False
    comparable: bool = True


@dataclass(frozen=True)
class Setting:
    """What the cases are made for."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    block_size: int
    kernels: Kernels
    compiled: bool
    generator: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads, head_dim."""
        return (
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.head_dim,
        )

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)


# --- attention ------------------------------------------------------------------------------------


def paged_inputs(
    setting: Setting, contexts: list[int], kind: str = "auto"
) -> tuple[Cache, Cache, Tensor, Tensor]:
    """K cache, V cache, block table, context lengths; every sequence's blocks lie scattered over
    the cache. kind: a kv_cache_dtype.
    """
    _, kv_heads, dim = setting.heads
    size = setting.block_size
    needed = [-(-context // size) for context in contexts]
    shape = (sum(needed), kv_heads, size, dim)
    caches = [_cache(setting, shape, kind) for _ in range(2)]
    blocks = torch.randperm(sum(needed)).int().split(needed)
    table = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True)
    return (
        *caches,
        table.to(setting.device),
        torch.tensor(contexts, dtype=torch.int32, device=setting.device),
    )


def _cache(setting: Setting, shape: tuple[int, int, int, int], kind: str) -> Cache:
    """A cache of random numbers. Of a quantized one all scales are 1 / 32."""
    numbers = setting.randn(*shape)
    if kind == "auto":
        return numbers
    cache = QuantizedCache.zeros(shape, kind, setting.device)
    cache.values.copy_((32 * numbers).clamp_(-127, 127))
    cache.scales.fill_(1 / 32)
    return cache


def dense(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """``[B, KH, context, D]`` from pages, for what reads contiguous keys and values; all contexts
    are equal.
    """
    pages = cache[table.long()]  # [B, blocks, KH, size, D]
    return pages.transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous()


def _sdpa(
    backend: SDPBackend | None, causal: bool, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=gqa)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=gqa)


def _sdpa_variants(
    setting: Setting, causal: bool, prepare: Callable[..., tuple], view: Callable
) -> dict[str, Variant]:
    backends: dict[str, SDPBackend | None] = {"sdpa": None}
    if setting.device.type == "cuda":
        backends = {
            "sdpa flash": SDPBackend.FLASH_ATTENTION,
            "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        }
    return {
        name: Variant(partial(_sdpa, b, causal), prepare, view=view) for name, b in backends.items()
    }


def decode_cases(setting: Setting) -> Iterator[Case]:
    """Attention of one new token per sequence over its paged context."""
    for batch, context in DECODE[setting.device.type]:
        if isinstance(context, tuple):
            contexts = [setting.generator.randint(*context) for _ in range(batch)]
            yield _decode_case(setting, f"{batch} ragged {context[0]}..{context[1]}", contexts)
        else:
            yield _decode_case(setting, f"{batch} x {context}", [context] * batch)
    batch, context = DECODE[setting.device.type][0]
    assert isinstance(context, int)
    for kind in QUANTIZED[setting.device.type]:
        name = f"{batch} x {context}, {kind} cache"
        yield _decode_case(setting, name, [context] * batch, kind)


def _decode_case(setting: Setting, name: str, contexts: list[int], kind: str = "auto") -> Case:
    (heads, kv_heads, dim), longest, batch = setting.heads, max(contexts), len(contexts)
    element = setting.dtype.itemsize
    kernels, scale = setting.kernels, dim**-0.5

    def make() -> tuple:
        return setting.randn(batch, heads, dim), *paged_inputs(setting, contexts, kind)

    def ours(query: Tensor, k_cache: Cache, v_cache: Cache, table: Tensor, lens: Tensor) -> Tensor:
        limits = {"max_seq_len": longest, "merge_attention": kernels.merge_attention}
        return kernels.decode_attention(query, k_cache, v_cache, table, lens, scale, **limits)

    def contiguous(
        query: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, _: Tensor
    ) -> tuple:
        # The query heads that share a KV head become that head's query tokens: the same result, and
        # no GQA is needed.
        packed = query.view(batch, kv_heads, heads // kv_heads, dim)
        return packed, dense(k_cache, table, longest), dense(v_cache, table, longest)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.transpose(2, 3) * scale, dim=-1) @ value

    def view(out: Tensor) -> Tensor:
        return out.reshape(batch, heads, dim)

    variants = {"minivllm": Variant(ours, graph=kernels.can_be_recorded)}
    # A dense cache would be padded to the longest, and torch has no quantized one.
    if min(contexts) == longest and kind == "auto":
        variants |= _sdpa_variants(setting, False, contiguous, view)
        variants["torch matmuls"] = Variant(eager, contiguous, view=view)
    row = kv_row_bytes(dim, element, kind)
    moved = 2 * batch * heads * dim * element + 2 * sum(contexts) * kv_heads * row
    flops = sum(attention_flops(heads, dim, context) for context in contexts)
    return Case("decode_attention", name, moved, flops, make, variants)


def prefill_cases(setting: Setting) -> Iterator[Case]:
    """Causal attention of many new tokens per sequence over the paged context, which holds them."""
    for batch, query_len, context in PREFILL[setting.device.type]:
        name = f"{batch} x {query_len}" + (f" at context {context}" if context > query_len else "")
        yield _prefill_case(setting, name, batch, query_len, context)


def _prefill_case(setting: Setting, name: str, batch: int, query_len: int, context: int) -> Case:
    heads, kv_heads, dim = setting.heads
    kernels, scale = setting.kernels, dim**-0.5

    def make() -> tuple:
        starts = torch.arange(
            0, batch * query_len + 1, query_len, dtype=torch.int32, device=setting.device
        )
        return (
            setting.randn(batch * query_len, heads, dim),
            starts,
            *paged_inputs(setting, [context] * batch),
        )

    def ours(
        query: Tensor, starts: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lens: Tensor
    ) -> Tensor:
        limits = {"max_query_len": query_len, "max_seq_len": context}
        return kernels.prefill_attention(
            query, k_cache, v_cache, table, starts, lens, scale, **limits
        )

    def contiguous(
        query: Tensor, _: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, __: Tensor
    ) -> tuple:
        rows = query.view(batch, query_len, heads, dim).transpose(1, 2).contiguous()
        return rows, dense(k_cache, table, context), dense(v_cache, table, context)

    def expanded(*inputs: Tensor) -> tuple:
        rows, key, value = contiguous(*inputs)
        group = heads // kv_heads
        return rows, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)

    def view(out: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(batch * query_len, heads, dim)

    variants = {"minivllm": Variant(ours, graph=kernels.can_be_recorded)}
    if (
        context == query_len
    ):  # torch aligns a causal mask to the start: chunks of a prompt are beyond it
        variants |= _sdpa_variants(setting, True, contiguous, view)
        cudnn = _sdpa_variants(setting, True, expanded, view).get("sdpa cudnn")
        if cudnn is not None:
            variants["sdpa cudnn, heads expanded"] = cudnn
    moved = batch * attention_bytes(
        query_len, context, heads, kv_heads, dim, setting.dtype.itemsize
    )
    flops = batch * attention_flops(heads, dim, causal_pairs(query_len, context))
    return Case("prefill_attention", name, moved, flops, make, variants, arithmetic=True)


# --- sampling -------------------------------------------------------------------------------------


def _sample_eager(logits: Tensor, temperature: Tensor) -> Tensor:
    """Softmax, then the largest of probability / Exponential(1): the usual way without a search."""
    probabilities = torch.softmax(logits.float() / temperature.unsqueeze(1), dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(dim=-1)


def sample_cases(setting: Setting) -> Iterator[Case]:
    """Sampling one token per row, with a temperature and nothing else."""
    rows, vocabulary = LOGITS[setting.device.type]
    vocabulary = vocabulary or setting.config.vocab_size

    def make() -> tuple:
        temperature = torch.full((rows,), 0.6, device=setting.device)
        seeds, positions = torch.arange(2 * rows, device=setting.device).chunk(2)
        return setting.randn(rows, vocabulary), temperature, seeds, positions

    def ours(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        return setting.kernels.sample(logits, temperature, None, None, None, seeds, positions)

    def two(logits: Tensor, temperature: Tensor, *_: Tensor) -> tuple:
        return logits, temperature

    variants = {
        "minivllm": Variant(ours, graph=setting.kernels.can_be_recorded),
        "torch eager": Variant(_sample_eager, two),
        "torch argmax (greedy)": Variant(lambda logits, _: logits.argmax(dim=-1), two),
    }
    if setting.compiled:
        variants["torch compiled"] = Variant(torch.compile(_sample_eager), two, graph=False)
    moved = rows * vocabulary * setting.dtype.itemsize
    name = f"{rows} x {vocabulary}, temperature"
    yield Case("sample", name, moved, 5 * rows * vocabulary, make, variants, comparable=False)


def softmax_cases(setting: Setting) -> Iterator[Case]:
    """Whole rows, read and written once at best; ours reads them twice, eager torch once for each
    of its operations.
    """

    def three_passes(x: Tensor) -> Tensor:
        weights = torch.exp(x - x.amax(dim=-1, keepdim=True))
        return weights / weights.sum(dim=-1, keepdim=True)

    for rows, width in SOFTMAX[setting.device.type]:
        ours = softmax if setting.device.type == "cuda" else softmax_reference
        variants = {"minivllm": Variant(ours), "torch": Variant(partial(torch.softmax, dim=-1))}
        variants["torch, operation by operation"] = Variant(three_passes)
        moved = 2 * rows * width * setting.dtype.itemsize

        def make(rows: int = rows, width: int = width) -> tuple:
            return (setting.randn(rows, width),)

        yield Case("softmax", f"{rows} x {width}", moved, 5 * rows * width, make, variants)


# --- operations on rows ---------------------------------------------------------------------------


def row_cases(setting: Setting) -> Iterator[Case]:
    """Norms, SwiGLU, rotation and the cache's write, on the tokens of a decode step and of a
    prefill step.
    """
    for rows in ROWS[setting.device.type]:
        yield from _norm_cases(setting, rows)
        yield _silu_case(setting, rows)
        yield _rope_case(setting, rows)
        if setting.kernels.fused_operations is not None:
            yield _fused_case(setting, rows)
        yield _store_case(setting, rows)


def _beside_eager(setting: Setting, name: str, wait: bool = False) -> dict[str, Variant]:
    """Ours and, on a GPU, the reference in eager torch. wait: the reference waits for the GPU."""
    variants = {"minivllm": Variant(getattr(setting.kernels, name))}
    if setting.device.type == "cuda":
        variants["torch eager"] = Variant(getattr(Kernels.reference(), name), graph=not wait)
    return variants


def _norm_cases(setting: Setting, rows: int) -> Iterator[Case]:
    width = setting.config.hidden_size
    element = setting.dtype.itemsize
    eps = setting.config.rms_norm_eps
    once = rows * width * element

    def make(residual: bool) -> tuple:
        x = [setting.randn(rows, width) for _ in range(1 + residual)]
        return *x, setting.randn(width), eps

    for name, passes in (("rms_norm", 2), ("add_rms_norm", 4)):
        variants = _beside_eager(setting, name)
        yield Case(
            name,
            f"{rows} x {width}",
            passes * once,
            4 * rows * width,
            partial(make, passes == 4),
            variants,
        )


def _silu_case(setting: Setting, rows: int) -> Case:
    width, element = setting.config.intermediate_size, setting.dtype.itemsize
    variants = _beside_eager(setting, "silu_mul")
    moved = 3 * rows * width * element
    return Case(
        "silu_mul",
        f"{rows} x {width}",
        moved,
        5 * rows * width,
        lambda: (setting.randn(rows, 2 * width),),
        variants,
    )


def _rope_inputs(setting: Setting, rows: int) -> tuple:
    """Query, key, value, norm weights, table, positions. Q, K and V stand in one row, as the
    projection gives them.
    """
    heads, kv_heads, dim = setting.heads
    fused = setting.randn(rows, heads + 2 * kv_heads, dim)
    table = torch.randn(4096, dim, device=setting.device)
    positions = torch.randint(4096, (rows,), device=setting.device)
    return (
        *fused.split([heads, kv_heads, kv_heads], dim=1),
        setting.randn(dim),
        setting.randn(dim),
        table,
        positions,
    )


def _rope_case(setting: Setting, rows: int) -> Case:
    heads, kv_heads, dim = setting.heads
    numbers = rows * (heads + kv_heads) * dim

    def make() -> tuple:
        query, key, _, *rest = _rope_inputs(setting, rows)
        return query, key, *rest, 1e-6

    moved = 2 * numbers * setting.dtype.itemsize + rows * dim * 4
    variants = _beside_eager(setting, "qk_norm_rope")
    return Case(
        "qk_norm_rope",
        f"{rows} x ({heads} + {kv_heads}) x {dim}",
        moved,
        10 * numbers,
        make,
        variants,
    )


def _cache_inputs(setting: Setting, rows: int) -> tuple:
    """K cache, V cache with room for twice the tokens, and where in them to write."""
    _, kv_heads, dim = setting.heads
    num_blocks = 2 * -(-rows // setting.block_size)
    shape = (num_blocks, kv_heads, setting.block_size, dim)
    caches = [torch.zeros(shape, dtype=setting.dtype, device=setting.device) for _ in range(2)]
    return *caches, torch.randperm(num_blocks * setting.block_size, device=setting.device)[:rows]


def _fused_case(setting: Setting, rows: int) -> Case:
    """Norm, rotation and the cache's write in one launch, beside our two."""
    heads, kv_heads, dim = setting.heads
    kernels, numbers = setting.kernels, rows * (heads + kv_heads) * dim

    def make() -> tuple:
        return *_rope_inputs(setting, rows), *_cache_inputs(setting, rows)

    def fused(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        *turn, k_cache, v_cache, slots = rest
        given = NormRope._make((*turn, 1e-6))
        return kernels.qk_norm_rope_store(query, key, value, given, (k_cache, v_cache), slots)

    def apart(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        *turn, k_cache, v_cache, slots = rest
        query, key = kernels.qk_norm_rope(query, key, *turn, 1e-6)
        kernels.store_kv(key, value, k_cache, v_cache, slots)
        return query

    moved = 2 * (numbers + rows * kv_heads * dim) * setting.dtype.itemsize + rows * (dim * 4 + 8)
    variants = {
        "minivllm": Variant(fused),
        "minivllm, two launches": Variant(apart),
    }
    name = f"{rows} x ({heads} + 2 x {kv_heads}) x {dim}"
    return Case("qk_norm_rope_store", name, moved, 10 * numbers, make, variants)


def _store_case(setting: Setting, rows: int) -> Case:
    _, kv_heads, dim = setting.heads

    def make() -> tuple:
        pairs = [setting.randn(rows, kv_heads, dim) for _ in range(2)]
        return *pairs, *_cache_inputs(setting, rows)

    moved = 4 * rows * kv_heads * dim * setting.dtype.itemsize + 8 * rows
    variants = _beside_eager(setting, "store_kv", wait=True)
    return Case(
        "store_kv", f"{rows} x {kv_heads} x {dim}", moved, 0, make, variants, comparable=False
    )


def linear_cases(setting: Setting) -> Iterator[Case]:
    """The model's matrix products at the rows of decode steps; ours is often torch's."""
    config, (heads, kv_heads, dim) = setting.config, setting.heads
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = {
        "qkv_proj": ((heads + 2 * kv_heads) * dim, hidden),
        "o_proj": (hidden, heads * dim),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
        "lm_head": (config.vocab_size, hidden),
    }
    for rows in LINEAR_ROWS[setting.device.type]:
        for name, (out, into) in matrices.items():

            def make(rows: int = rows, out: int = out, into: int = into) -> tuple:
                return setting.randn(rows, into), setting.randn(out, into)

            moved = (out * into + rows * (out + into)) * setting.dtype.itemsize
            variants = {"minivllm": Variant(setting.kernels.linear)}
            variants["torch"] = Variant(F.linear)
            yield Case(
                "linear",
                f"{rows} x {into} to {out} ({name})",
                moved,
                2 * rows * out * into,
                make,
                variants,
            )


# --- measuring ------------------------------------------------------------------------------------


def make_row(case: Case, variant: str, timing: Any, rates: Rates) -> dict[str, Any]:
    """The row of one variant: its time, what it moved and computed per second, and which share of
    the floor that is.
    """
    seconds = timing.median_us * 1e-6
    speed = (
        {"tflops": case.flops / seconds / 1e12}
        if case.arithmetic
        else {"tb_per_s": case.bytes / seconds / 1e12}
    )
    return {
        "kernel": case.kernel,
        "case": case.name,
        "variant": variant,
        **asdict(timing),
        "bytes": case.bytes,
        "flops": case.flops,
        **speed,
        "share_of_floor": rates.seconds(case.bytes, case.flops) / seconds,
    }


def difference(out: Any, expected: Any) -> float:
    """Root mean square of out - expected, relative to expected's."""
    out, expected = (x[0] if isinstance(x, tuple) else x for x in (out, expected))
    return (
        ((out.float() - expected.float()).square().mean() / expected.float().square().mean())
        .sqrt()
        .item()
    )


def run_case(
    case: Case, rates: Rates, device: torch.device, deadline: Deadline, seconds: float
) -> list[dict]:
    """The rows of a case, one per variant; a variant that fails is a row with "failed"."""
    inputs: list[tuple] = []
    outputs: dict[str, Any] = {}

    def make_inputs() -> dict[str, Any]:
        inputs.extend(case.make() for _ in range(num_sets(case.bytes, device)))
        return {}

    def row(name: str, variant: Variant) -> dict[str, Any]:
        prepared = [variant.prepare(*each) if variant.prepare else each for each in inputs]
        calls = [partial(variant.call, *each) for each in prepared]
        found = make_row(
            case, name, measure(calls, device, graph=variant.graph, seconds=seconds), rates
        )
        if case.comparable:
            out = calls[0]()
            out = variant.view(out) if variant.view else out
            if name == "minivllm":
                outputs[name] = out
            elif outputs:
                found["differs_from_ours"] = difference(out, outputs["minivllm"])
        return found

    rows = []
    problem = attempt(f"{case.kernel} {case.name}", deadline, make_inputs, quiet=True)
    for name, variant in case.variants.items():
        label = f"{case.kernel} {case.name} {name}"
        found = problem or attempt(label, deadline, partial(row, name, variant))
        rows.append({"kernel": case.kernel, "case": case.name, "variant": name} | found)
        _release(device)
    return rows


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Budget:
    """How long to measure: about so many seconds per row, and the seconds after which no further
    row begins (None: no bound).
    """

    row_seconds: float = 0.2
    max_seconds: float | None = None


def make_setting(
    shape: str | None, device: str, dtype: str, block_size: int | None, compiled: bool | None
) -> tuple[str, Setting]:
    """(shape, setting). None and "auto" are replaced by what suits the device, as `run` says."""
    where = torch.device(pick_device(device))
    on_gpu = where.type == "cuda"
    shape = shape or ("qwen3-0.6b" if on_gpu else "tiny")
    number_type = (
        getattr(torch, dtype) if dtype != "auto" else (torch.bfloat16 if on_gpu else torch.float32)
    )
    config = shape_config(shape)
    return shape, Setting(
        config=config,
        device=where,
        dtype=number_type,
        block_size=block_size or (64 if on_gpu else 16),
        kernels=Kernels.triton() if on_gpu else Kernels.cpu(choose_onednn(weight_shapes(config))),
        compiled=on_gpu if compiled is None else compiled,
    )


def all_cases(setting: Setting) -> Iterator[Case]:
    """The cases of every kernel."""
    for maker in (
        decode_cases,
        prefill_cases,
        sample_cases,
        softmax_cases,
        linear_cases,
        row_cases,
    ):
        yield from maker(setting)


@torch.inference_mode()
def run(
    shape: str | None = None,
    *,
    names: tuple[str, ...] = KERNELS,
    device: str = "auto",
    dtype: str = "auto",
    block_size: int | None = None,
    compiled: bool | None = None,
    budget: Budget = Budget(),
) -> dict[str, Any]:
    """Time the kernels that are named.

    shape: heads and widths; None is Qwen3-0.6B's on a GPU, tiny on a CPU. dtype: "auto" is bfloat16
    on a GPU, float32 on a CPU. block_size: None is 64 on a GPU, 16 on a CPU. compiled: whether
    torch.compile is tried too; None is on a GPU.
    """
    torch.manual_seed(0)
    shape, setting = make_setting(shape, device, dtype, block_size, compiled)
    deadline = Deadline(budget.max_seconds)
    say("kernels: measuring the machine's own rates")
    measured = measure_rates(setting.device, setting.dtype)
    _release(setting.device)
    rows: list[dict[str, Any]] = []
    for case in all_cases(setting):
        if case.kernel in names:
            rows += run_case(case, rates_of(measured), setting.device, deadline, budget.row_seconds)
            _release(setting.device)
    return {
        "benchmark": "kernels",
        "shape": shape,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "kernels": setting.kernels.name,
        "block_size": setting.block_size,
        "rates": measured,
        "rows": rows,
        "seconds": round(deadline.elapsed, 1),
        "environment": environment(),
    }
