"""The checks have power: kernels with one line made wrong, each a mistake that people make, must be
caught by them.

A mutant is the source of a kernel file with one piece replaced, imported from a temporary file.
They run in the interpreter only: a wrong address there reads a fence, on a GPU it can end the
process's CUDA context. Each runs in a forked process, for one that writes outside of its tensors
may leave that process's memory corrupted.
"""

import dataclasses
import importlib.util
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable

import pytest
import torch

from minivllm.kernels import Fused, Kernels, online_softmax, paged_attention
from support import kernel_checks as checks

pytestmark = pytest.mark.slow

CPU, FLOAT = torch.device("cpu"), torch.float32
FOLDER = pathlib.Path(paged_attention.__file__).parent


def with_operation(name: str, function) -> Kernels:
    return dataclasses.replace(Kernels.triton(), **{name: function})


SURVIVED, CAUGHT, BROKEN = 0, 1, 2


def run_forked(check: Callable[[], None]) -> int:
    """SURVIVED, CAUGHT, BROKEN (an error of another kind), or minus the signal that ended the
    process.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        torch.set_num_threads(1)  # OpenMP's other threads are not in the fork
        code = BROKEN
        try:
            check()
            code = SURVIVED
        except (AssertionError, IndexError):
            code = CAUGHT
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# How a mutated module is checked.
CHECKS = {
    "rms_norm": lambda m: checks.check_norm(
        dataclasses.replace(Kernels.triton(), rms_norm=m.rms_norm, add_rms_norm=m.add_rms_norm),
        CPU,
        FLOAT,
    ),
    "silu_mul": lambda m: checks.check_silu_mul(with_operation("silu_mul", m.silu_mul), CPU, FLOAT),
    "qk_norm_rope": lambda m: checks.check_qk_norm_rope(
        with_operation("qk_norm_rope", m.qk_norm_rope), CPU, FLOAT
    ),
    "qk_norm_rope_store": lambda m: checks.check_qk_norm_rope_store(
        with_operation("fused", Fused(m.qk_norm_rope_store, online_softmax.merge_attention)),
        CPU,
        FLOAT,
    ),
    "linear": lambda m: checks.check_linear(with_operation("linear", m.linear), CPU, FLOAT),
    "store_kv": lambda m: checks.check_store_kv(with_operation("store_kv", m.store_kv), CPU, FLOAT),
    "store int8": lambda m: checks.check_store_quantized(
        with_operation("store_kv", m.store_kv), CPU, FLOAT, "int8"
    ),
    "fused int8": lambda m: checks.check_qk_norm_rope_store(
        with_operation("fused", Fused(m.qk_norm_rope_store, online_softmax.merge_attention)),
        CPU,
        FLOAT,
        "int8",
    ),
    "softmax": lambda m: checks.check_softmax(lambda x: m.softmax(x, block=16), CPU, FLOAT),
    "merge": lambda m: checks.check_merge(m.merge_attention, CPU),
    "decode": lambda m: checks.check_decode(
        with_operation("decode_attention", m.decode_attention), CPU, FLOAT
    ),
    "prefill": lambda m: checks.check_prefill(
        with_operation("prefill_attention", m.prefill_attention), CPU, FLOAT
    ),
    "decode int8": lambda m: checks.check_decode(
        with_operation("decode_attention", m.decode_attention),
        CPU,
        FLOAT,
        [(4, 2, 24, 16, 2, (1, 17, 0, 65, 130))],
        "int8",
    ),
    **{
        f"prefill {kind}": lambda m, kind=kind: checks.check_prefill(
            with_operation("prefill_attention", m.prefill_attention),
            CPU,
            FLOAT,
            [(4, 2, 24, 16, ((20, 20), (0, 40), (33, 97), (1, 64)))],
            kind,
        )
        for kind in ("int8", "fp8")
    },
    "filter": lambda m: checks.check_filter(m.filter_logits),
    "sample": lambda m: checks.check_sample(with_operation("sample", m.sample), CPU, FLOAT),
}

# file, check, what is wrong, right piece, wrong piece
MUTANTS = [
    (
        "norm",
        "rms_norm",
        "mean over the padded width",
        "axis=0) / N + eps",
        "axis=0) / BLOCK + eps",
    ),
    ("norm", "rms_norm", "eps outside of the root", "/ N + eps))", "/ N) + eps)"),
    ("norm", "rms_norm", "stride taken for the width", "x_ptr + row * x_stride", "x_ptr + row * N"),
    (
        "norm",
        "rms_norm",
        "residual's stride taken for the width",
        "residual_ptr + row * residual_stride",
        "residual_ptr + row * N",
    ),
    (
        "norm",
        "rms_norm",
        "x's stride taken for the residual's",
        "residual_ptr + row * residual_stride",
        "residual_ptr + row * x_stride",
    ),
    (
        "norm",
        "rms_norm",
        "the sum is written in the next row",
        "sum_ptr + row * N + columns",
        "sum_ptr + (row + 1) * N + columns",
    ),
    (
        "norm",
        "rms_norm",
        "the sum is not stored",
        "tl.store(sum_ptr + row * N + columns, x,",
        "tl.store(sum_ptr + row * N + columns, x * 0.0,",
    ),
    (
        "activation",
        "silu_mul",
        "halves swapped",
        "silu * up",
        "(up.to(tl.float32) / (1.0 + tl.exp(-up))) * gate",
    ),
    ("activation", "silu_mul", "no mask at the edge", "silu * up, mask=inside)", "silu * up)"),
    ("rotary", "qk_norm_rope", "turned the other way", "a * cos - b * sin", "a * cos + b * sin"),
    (
        "rotary",
        "qk_norm_rope",
        "keys by the queries' weight",
        "key if k_weight is None else k_weight",
        "key if k_weight is None else q_weight",
    ),
    ("rotary", "qk_norm_rope_store", "-1 is written", "tl.where(slot >= 0, k_heads, 0)", "k_heads"),
    (
        "rotary",
        "qk_norm_rope_store",
        "values turned too",
        "            NORM,\n            False,",
        "            NORM,\n            True,",
    ),
    (
        "rotary",
        "qk_norm_rope_store",
        "heads side by side in the cache",
        "head_stride = BLOCK_SIZE * 2 * HALF",
        "head_stride = 2 * HALF",
    ),
    ("linear", "linear", "edge of the features written", "total, mask=features < N)", "total)"),
    (
        "linear",
        "linear",
        "only the first tile of columns",
        "range(0, K, BLOCK_K)",
        "range(0, BLOCK_K, BLOCK_K)",
    ),
    ("linear", "linear", "width taken for the stride", "row * x_stride", "row * K"),
    (
        "linear",
        "linear",
        "bias of the first features",
        "bias_ptr + features",
        "bias_ptr + features * 0",
    ),
    (
        "rotary",
        "qk_norm_rope",
        "row number for position",
        "tl.load(positions_ptr + token) *",
        "token *",
    ),
    (
        "rotary",
        "qk_norm_rope",
        "heads not masked",
        "(heads < num_heads) & (columns < HALF)",
        "(heads >= 0) & (columns < HALF)",
    ),
    ("rotary", "qk_norm_rope", "mean over half a head", "axis=1)) / (2 * HALF)", "axis=1)) / HALF"),
    ("kv_cache", "store_kv", "-1 is written", "tl.where(slot >= 0, KH * D, 0)", "KH * D"),
    (
        "kv_cache",
        "store_kv",
        "heads and offsets exchanged",
        "((block * KH + index // D) * BLOCK_SIZE + offset) * D",
        "((block * BLOCK_SIZE + offset) * KH + index // D) * D",
    ),
    (
        "kv_cache",
        "store_kv",
        "values from the keys' rows",
        "value_ptr + token * value_stride",
        "key_ptr + token * key_stride",
    ),
    (
        "online_softmax",
        "softmax",
        "sum not rescaled",
        "row_sum = row_sum * tl.exp(row_max - finite_max) +",
        "row_sum = row_sum +",
    ),
    (
        "online_softmax",
        "softmax",
        "edge read as 0",
        'mask=start + columns < N,\n            other=float("-inf")',
        "mask=start + columns < N,\n            other=0.0",
    ),
    (
        "online_softmax",
        "softmax",
        "-inf minus -inf",
        'tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf',
        "new_max  # -inf - -inf",
    ),
    ("online_softmax", "merge", "output not rescaled", "acc = acc * rescale +", "acc = acc +"),
    ("online_softmax", "merge", "sum not rescaled", "total = total * rescale +", "total = total +"),
    (
        "online_softmax",
        "merge",
        "empty parts give NaN",
        'tl.where(new_max == float("-inf"), 0.0, new_max)\n        rescale = tl.exp(total_max',
        "new_max\n        rescale = tl.exp(total_max",
    ),
    (
        "online_softmax",
        "merge",
        "0 / 0 in empty rows",
        "tl.where(total > 0.0, total, 1.0)",
        "total",
    ),
    (
        "online_softmax",
        "merge",
        "parts weighted equally",
        "weights = tl.exp(lse - finite_max)",
        "weights = tl.where(lse > -1e30, 1.0, 0.0)",
    ),
    (
        "online_softmax",
        "merge",
        "no maximum subtracted",
        "new_max = tl.maximum(total_max, tl.max(lse, axis=0))",
        "new_max = total_max * 0 + 1.0",
    ),
    (
        "paged_attention",
        "decode",
        "values beyond the context read",
        "tl.load(value_rows + columns[None, :], mask=inside,",
        "tl.load(value_rows + columns[None, :], mask=(columns < D)[None, :],",
    ),
    (
        "paged_attention",
        "decode",
        "scores beyond the context kept",
        'tl.where(known[None, :], scores, float("-inf"))',
        "scores",
    ),
    ("paged_attention", "decode", "output not rescaled", "acc * rescale[:, None]", "acc"),
    ("paged_attention", "decode", "sum not rescaled", "row_sum * rescale + ", "row_sum + "),
    (
        "paged_attention",
        "decode",
        "last token left out",
        "begin + share, context)",
        "begin + share, context - 1)",
    ),
    ("paged_attention", "decode", "log-sum-exp in base 2", "* 0.6931471805599453", ""),
    (
        "paged_attention",
        "decode",
        "heads of a group interleaved",
        "heads = kv_head * GROUP + members",
        "heads = kv_head + members * KH",
    ),
    (
        "paged_attention",
        "decode",
        "padding rows stored",
        "out_ptr + target[:, None] * D + columns[None, :], acc / safe_sum[:, None], mask=inside_q",
        (
            "out_ptr + target[:, None] * D + columns[None, :], acc / safe_sum[:, None],"
            " mask=(columns < D)[None, :]"
        ),
    ),
    ("paged_attention", "decode", "exp2 without log2 e", "scale * math.log2(math.e)", "scale"),
    (
        "paged_attention",
        "decode",
        "shares rounded down",
        "tl.cdiv(tl.cdiv(context, BLOCK_N), num_splits)",
        "(tl.cdiv(context, BLOCK_N) // num_splits)",
    ),
    (
        "paged_attention",
        "decode",
        "empty splits weigh something",
        "lse = (row_max + tl.log2(safe_sum))",
        "lse = (tl.where(row_sum > 0.0, row_max, 0.0) + tl.log2(safe_sum))",
    ),
    (
        "paged_attention",
        "decode",
        "empty splits divide 0 by 0",
        "tl.where(row_sum > 0.0, row_sum, 1.0)",
        "row_sum",
    ),
    (
        "paged_attention",
        "decode",
        "another block size than the cache's",
        "BLOCK_SIZE=block_size,",
        "BLOCK_SIZE=2 * block_size,",
    ),
    (
        "paged_attention",
        "decode",
        "stride taken for the width",
        "sequence * query_stride",
        "sequence * (KH * GROUP * D)",
    ),
    (
        "paged_attention",
        "decode",
        "block table row of one sequence",
        "sequence * table_stride",
        "0 * table_stride",
    ),
    (
        "flash_attention",
        "prefill",
        "mask aligned to the start",
        "context - query_len + members, context - 1)",
        "members, context - 1)",
    ),
    (
        "flash_attention",
        "prefill",
        "a token does not see itself",
        "tokens[None, :] <= positions",
        "tokens[None, :] < positions",
    ),
    (
        "flash_attention",
        "prefill",
        "diagonal taken for unmasked",
        "seen_by_all // BLOCK_N",
        "(seen_by_all + BLOCK_N - 1) // BLOCK_N",
    ),
    (
        "flash_attention",
        "prefill",
        "stops before the diagonal's end",
        "first_row + BLOCK_M, context)",
        "first_row + 1, context)",
    ),
    (
        "flash_attention",
        "prefill",
        "everything beyond the context read",
        "inside = inside & (tokens < context)[:, None]",
        "inside = inside & (tokens >= 0)[:, None]",
    ),
    ("flash_attention", "prefill", "output not rescaled", "acc * rescale[:, None]", "acc"),
    ("flash_attention", "prefill", "sum not rescaled", "row_sum * rescale + ", "row_sum + "),
    ("flash_attention", "prefill", "the wrong KV head", "head // (H // KH)", "head % KH"),
    (
        "flash_attention",
        "prefill",
        "rows of the next sequence stored",
        "(members < query_len)[:, None]",
        "(members >= 0)[:, None]",
    ),
    (
        "flash_attention",
        "prefill",
        "-inf minus -inf",
        'tl.where(new_max == float("-inf"), 0.0, new_max)',
        "new_max",
    ),
    (
        "flash_attention",
        "prefill",
        "0 / 0 in rows without a key",
        "tl.where(row_sum > 0.0, row_sum, 1.0)",
        "row_sum",
    ),
    (
        "flash_attention",
        "prefill",
        "tiles of short queries not ended",
        "if first_row < query_len:",
        "if first_row < query_len - BLOCK_M:",
    ),
    (
        "flash_attention",
        "prefill",
        "another block size than the cache's",
        "BLOCK_SIZE=block_size,",
        "BLOCK_SIZE=2 * block_size,",
    ),
    (
        "sampling",
        "sample",
        "tiles not weighted by their maxima",
        "tile_sum * tl.exp((tile_max - row_max) / temperature)",
        "tile_sum",
    ),
    (
        "sampling",
        "sample",
        "temperature only between tiles",
        "weights = tl.exp((logits - row_max) / temperature)",
        "weights = tl.exp(logits - row_max)",
    ),
    (
        "sampling",
        "sample",
        "position cut to 32 bits",
        "low, high, low * 0",
        "low, low * 0, low * 0",
    ),
    (
        "sampling",
        "sample",
        "edge of the vocabulary read",
        "mask=tokens < V, other",
        "mask=tokens >= 0, other",
    ),
    ("sampling", "sample", "the tile's start is forgotten", "(tile * TILE + choice)", "choice"),
    (
        "sampling",
        "sample",
        "what was before the tile not subtracted",
        "return choice, target - tl.sum(",
        "return choice, target - 0.0 * tl.sum(",
    ),
    (
        "sampling",
        "sample",
        "the last among equals",
        "choice, _ = _pick(weights, target, TILE)",
        "choice, _ = _pick(weights, target + greedy, TILE)",
    ),
    (
        "sampling",
        "filter",
        "top-p ignores what top-k left",
        'scaled.masked_fill(~keep, float("-inf")).softmax',
        "scaled.softmax",
    ),
    (
        "sampling",
        "filter",
        "top-p drops the token that crosses",
        "probability.cumsum(dim=-1) - probability < p",
        "probability.cumsum(dim=-1) < p",
    ),
    (
        "sampling",
        "filter",
        "filters before temperature",
        "(ordered - ordered[:, :1]) / _divisor(temperature[rows]).unsqueeze(1)",
        "(ordered - ordered[:, :1])",
    ),
    (
        "sampling",
        "filter",
        "ties cut at the higher ids",
        "logits[rows].float().sort(dim=-1, descending=True, stable=True)",
        (
            "(lambda s: (s[0], logits.shape[1] - 1 -"
            " s[1]))(logits[rows].float().flip(1).sort(dim=-1, descending=True, stable=True))"
        ),
    ),
    # --- quantized caches
    (
        "kv_cache",
        "store int8",
        "cut off, not rounded",
        "steps = (x + 12582912.0) - 12582912.0",
        "steps = x",
    ),
    (
        "kv_cache",
        "store int8",
        "one scale for all heads",
        "return tl.max(tl.abs(x), axis=1) + tl.sum(x * 0.0, axis=1)",
        "return tl.max(tl.max(tl.abs(x), axis=1), axis=0) + tl.sum(x * 0.0, axis=1)",
    ),
    (
        "kv_cache",
        "store int8",
        "NaN is lost",
        "tl.max(tl.abs(x), axis=1) + tl.sum(x * 0.0, axis=1)",
        "tl.max(tl.where(tl.abs(x) < 1e30, tl.abs(x), 0.0), axis=1)",
    ),
    (
        "kv_cache",
        "store int8",
        "the values' scales beside the keys",
        "head_scales(v_scales_ptr,",
        "head_scales(k_scales_ptr,",
    ),
    (
        "kv_cache",
        "store int8",
        "-1 is written",
        "written = heads < tl.where(slot >= 0, KH, 0)",
        "written = heads < KH",
    ),
    (
        "rotary",
        "fused int8",
        "the largest of half a head",
        "tl.maximum(largest_of(a), largest_of(b))",
        "largest_of(a)",
    ),
    (
        "rotary",
        "fused int8",
        "scales of all heads at one place",
        "first_place + heads * BLOCK_SIZE",
        "first_place + heads * 0",
    ),
    (
        "paged_attention",
        "decode int8",
        "keys without their scales",
        "scores *= tl.load(k_scales_ptr",
        "scores += 0.0 * tl.load(k_scales_ptr",
    ),
    (
        "paged_attention",
        "decode int8",
        "the sum of scaled weights",
        "row_sum = row_sum * rescale + tl.sum(weights, axis=1)",
        "row_sum = row_sum * rescale + tl.sum(weights * known[None, :] * 0.01, axis=1)",
    ),
    (
        "paged_attention",
        "decode int8",
        "scales beyond the context read",
        "tl.load(v_scales_ptr + scale_rows, mask=known, other=0.0)",
        "tl.load(v_scales_ptr + scale_rows)",
    ),
    (
        "paged_attention",
        "decode int8",
        "scales of another head",
        "scale_rows = base // D + rows // D",
        "scale_rows = base // D + rows // D - kv_head * BLOCK_SIZE",
    ),
    (
        "paged_attention",
        "decode int8",
        "even and odd numbers exchanged",
        "tl.join(acc, acc_odd)",
        "tl.join(acc_odd, acc)",
    ),
    (
        "flash_attention",
        "prefill fp8",
        "the first head's scale",
        "scale_log2 *= tl.load(k_scales_ptr + kv_head)",
        "scale_log2 *= tl.load(k_scales_ptr)",
    ),
    (
        "flash_attention",
        "prefill int8",
        "values by the keys' scales",
        "weights *= tl.load(v_scales_ptr",
        "weights *= tl.load(k_scales_ptr",
    ),
    (
        "flash_attention",
        "prefill fp8",
        "values without a scale",
        "out *= tl.load(v_scales_ptr + kv_head)",
        "out *= 1.0",
    ),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy notices some mutants too
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="mutants run in the interpreter: on a GPU they could end CUDA"
)
@pytest.mark.parametrize(
    ("file", "check", "mistake", "right", "wrong"),
    MUTANTS,
    ids=[f"{m[1]}: {m[2]}" for m in MUTANTS],
)
def test_mutant_is_caught(
    triton_kernels, tmp_path, monkeypatch, file, check, mistake, right: str, wrong: str
):
    source = (FOLDER / f"{file}.py").read_text()
    assert right in source, "the kernel changed: bring the mutant up to date"
    path = tmp_path / f"mutant_{file}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    triton_kernels.silu_mul(torch.ones(1, 2))  # imports Triton here, once, and not in every fork
    exit_code = run_forked(lambda: CHECKS[check](module))
    assert exit_code != SURVIVED, "the mutant passes"
    # A write outside of its buffer may end the process, at once or when memory is freed.
    assert exit_code in (CAUGHT, -signal.SIGSEGV, -signal.SIGABRT), (
        f"the mutant failed in another way: {exit_code}"
    )


def test_mutants_of_the_merge_are_caught_through_the_references_too():
    """A learner's merge runs inside the reference's decode_attention on a CPU, and is judged there
    as well.
    """

    def forgets_to_rescale(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return out.mean(0)

    kernels = dataclasses.replace(Kernels.reference(), merge_attention=forgets_to_rescale)
    with pytest.raises(AssertionError):
        checks.check_decode(kernels, CPU, FLOAT)
    checks.check_merge(online_softmax.merge_attention_reference, CPU)
