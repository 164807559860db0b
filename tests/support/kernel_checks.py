"""One checking function per operation: it compares an implementation with a textbook in float64.

The tensors are prepared such that errors outside the compared numbers show, too. Outputs are
allocated full of NaN between guard bands. Inputs stand between bands of NaN. Caches are NaN where
they hold no token, and block tables end in garbage.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from minivllm.kernels import Kernels
from minivllm.kernels.kv_cache import Cache, QuantizedCache
from minivllm.kernels.rotary import NormRope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The value around outputs; bfloat16 and e4m3 represent it exactly.
OUTPUT_BAND = 208.0
# The numbers before and after a fenced tensor: more than one cache block of any case here.
BAND = 8192
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _version(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


def require_triton() -> None:
    try:
        version = _version("triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Triton is not installed (it has wheels for Linux only)")
    if DEVICE.type == "cpu" and version < (3, 7) and _version("numpy") > (2, 2):
        pytest.skip("Triton's interpreter before 3.7 breaks on NumPy newer than 2.2")


def fence(tensor: torch.Tensor, band: float = math.nan) -> torch.Tensor:
    """The same numbers between two bands of NaN.

    A read outside shows in the result; `assert_fence` finds a write outside.
    """
    buffer = torch.full(
        (tensor.numel() + 2 * BAND,), band, dtype=tensor.dtype, device=tensor.device
    )
    inner = buffer[BAND : BAND + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def assert_fence(inner: torch.Tensor, band: float = math.nan) -> None:
    buffer = torch.as_strided(
        inner, (inner.numel() + 2 * BAND,), (1,), inner.storage_offset() - BAND
    )
    outside = torch.cat((buffer[:BAND], buffer[-BAND:]))
    changed = ~outside.isnan() if math.isnan(band) else outside != band
    assert not changed.any(), f"wrote outside of a buffer, {int(changed.sum())} numbers"


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Let `torch.empty` give poison between guard bands.

    A number that was not written and a write outside then both show.
    """
    empty, floats, integers = torch.empty, [], []

    def poisoned(*shape, dtype=torch.float32, device=None) -> torch.Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if dtype.is_floating_point:
            # No kernel reads an output, and a wrong write beside it may be NaN. A band of numbers
            # reveals such a write.
            floats.append(
                fence(torch.full(tuple(size), math.nan, dtype=dtype, device=device), OUTPUT_BAND)
            )
            return floats[-1]
        integers.append(torch.full((math.prod(size) + 64,), -7, dtype=dtype, device=device))
        return integers[-1][32:-32].view(tuple(size))

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty
    for inner in floats:
        assert_fence(inner, OUTPUT_BAND)
    for buffer in integers:
        assert (buffer[:32] == -7).all(), "wrote before a buffer"
        assert (buffer[-32:] == -7).all(), "wrote behind a buffer"


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that actual has this dtype and is as near to expected (float64) as it allows."""
    assert actual.dtype == dtype, f"result is {actual.dtype}, not {dtype}"
    torch.testing.assert_close(
        actual.double().cpu(),
        expected.cpu(),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
        check_dtype=True,
    )


def rms_norm_by_hand(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5 * weight.double()


# --- elementwise operations -----------------------------------------------------------------------


def check_norm(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, width in ((1, 1), (3, 24), (2, 64), (5, 129), (0, 8), (2, 3000)):
        fused = fence((torch.randn(rows, width + 11, generator=generator) * 3).to(device, dtype))
        x = fused[:, 7 : 7 + width]
        weight = fence(torch.randn(width, generator=generator).to(device, dtype))
        wide = fence(torch.randn(rows, width + 6, generator=generator).to(device, dtype))
        residual = wide[:, 5 : 5 + width]  # another stride than that of x
        for eps in (1e-6, 0.5):
            with guarded_outputs():
                out = kernels.rms_norm(x, weight, eps)
                normed, total = kernels.add_rms_norm(x, residual, weight, eps)
            assert_near(out, rms_norm_by_hand(x, weight, eps), dtype)
            assert torch.equal(total, x + residual), "the residual sum is not x + residual"
            assert_near(normed, rms_norm_by_hand(x + residual, weight, eps), dtype)


def check_silu_mul(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    for rows, width in ((1, 1), (3, 24), (2, 1025), (0, 8), (2, 2048)):
        gate_up = fence(
            (torch.randn(rows, 2 * width + 8, generator=generator) * 4).to(device, dtype)
        )[:, 8:]
        with guarded_outputs():
            out = kernels.silu_mul(gate_up)
        gate, up = gate_up.double()[:, :width], gate_up.double()[:, width:]
        assert_near(out, gate / (1 + (-gate).exp()) * up, dtype)


def check_qk_norm_rope(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """The reference rotates pairs as complex numbers: (a + ib)·exp(i·position·frequency)."""
    generator = torch.Generator().manual_seed(3)
    for tokens, heads, kv_heads, dim in (
        (1, 1, 1, 2),
        (5, 4, 2, 24),
        (3, 17, 3, 64),
        (2, 9, 9, 80),
        (0, 4, 2, 16),
    ):
        frequencies = 100.0 ** -(torch.arange(0, dim, 2).double() / dim)
        angles = torch.arange(40).double()[:, None] * frequencies
        cos_sin = fence(torch.cat((angles.cos(), angles.sin()), dim=1).float().to(device))
        positions = torch.tensor([39, 0, 7, 7, 20])[:tokens]
        width = (heads + 2 * kv_heads) * dim
        qkv = fence(torch.randn(tokens, width, generator=generator).to(device, dtype)).unflatten(
            1, (-1, dim)
        )
        weights = [
            fence((torch.rand(dim, generator=generator) / 2 + 0.5).to(device, dtype))
            for _ in range(2)
        ]
        for with_norm in (True, False):
            query, key, _ = qkv.split((heads, kv_heads, kv_heads), dim=1)
            q_weight, k_weight = weights if with_norm else (None, None)
            with guarded_outputs():
                results = kernels.qk_norm_rope(
                    query, key, q_weight, k_weight, cos_sin, positions.to(device), 0.01
                )
            for x, weight, actual in zip((query, key), (q_weight, k_weight), results, strict=True):
                wide = (
                    rms_norm_by_hand(x, weight, 0.01) if weight is not None else x.double()
                ).cpu()
                pairs = torch.complex(wide[..., : dim // 2], wide[..., dim // 2 :])
                turned = pairs * torch.exp(1j * angles[positions])[:, None]
                assert_near(actual, torch.cat((turned.real, turned.imag), dim=-1), dtype)


def check_store_kv(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    for tokens, kv_heads, dim, block_size in (
        (1, 1, 4, 16),
        (9, 3, 24, 16),
        (17, 2, 80, 1),
        (6, 2, 64, 3),
        (0, 1, 8, 16),
    ):
        num_blocks = 20
        caches = [
            fence(
                torch.full((num_blocks, kv_heads, block_size, dim), 9.0, dtype=dtype, device=device)
            )
        ]
        caches.append(fence(caches[0]))
        expected = [cache.clone() for cache in caches]
        slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens]
        slots[1::4] = -1
        kv = fence(
            torch.randn(tokens, 2 * kv_heads + 1, dim, generator=generator).to(device, dtype)
        )
        key, value = kv[:, 1 : 1 + kv_heads], kv[:, 1 + kv_heads :]
        kernels.store_kv(key, value, *caches, slots.to(device))
        for token, slot in enumerate(slots.tolist()):
            for new, cache in zip((key, value), expected, strict=True):
                if slot >= 0:
                    for head in range(kv_heads):
                        cache[slot // block_size, head, slot % block_size] = new[token, head]
        for cache, right in zip(caches, expected, strict=True):
            assert_fence(cache)
            assert torch.equal(cache, right), "a cache differs from what was to be stored"


# --- quantized caches -----------------------------------------------------------------------------

#: What stands around and between an int8 cache's numbers; no number is stored as this.
GARBAGE = -128
#: Every finite number of e4m3, by its bits.
E4M3 = [
    (-1) ** (bits >> 7)
    * (2.0 ** ((bits >> 3 & 15) - 7) * (1 + (bits & 7) / 8) if bits >> 3 & 15 else (bits & 7) / 512)
    for bits in range(256)
    if bits & 127 != 127
]


def fenced_cache(shape: tuple, kind: str, device: torch.device, scales: Sequence[float]) -> Cache:
    """A quantized cache of garbage between bands of garbage: NaN, or numbers with NaN as scale."""
    numbers = torch.full((math.prod(shape) + 2 * BAND,), GARBAGE, dtype=torch.int8)
    if kind == "fp8":
        numbers = torch.full_like(numbers, 0x7F).view(torch.float8_e4m3fn)
    values = numbers.to(device)[BAND:-BAND].view(shape)
    if kind == "int8":
        return QuantizedCache(values, fence(torch.full(shape[:3], math.nan, device=device)))
    return QuantizedCache(values, fence(torch.tensor(scales, device=device)))


def assert_cache_fence(cache: QuantizedCache) -> None:
    """Nothing was written beside a cache of `fenced_cache`."""
    assert_fence(cache.scales)
    whole = torch.as_strided(
        cache.values.view(torch.int8),
        (cache.values.numel() + 2 * BAND,),
        (1,),
        cache.values.storage_offset() - BAND,
    )
    right = GARBAGE if cache.kind == "int8" else 0x7F
    assert (torch.cat((whole[:BAND], whole[-BAND:])) == right).all(), "wrote outside of a cache"


def scales_of_heads(kv_heads: int) -> list[float]:
    """Another scale for each head; no kernel may take a neighbour's."""
    return [2.0 ** (head % 5 - 2) for head in range(kv_heads)]


def stored_by_hand(x: Sequence[float], kind: str, scale: float) -> tuple[list[float], float]:
    """(the numbers that are stored for one head of one token, its scale), each number by itself.

    A number that is not finite is stored as NaN (fp8), or makes the scale NaN (int8).
    """
    if kind == "fp8":
        stored = []
        for number in x:
            wanted = number / scale
            if not math.isfinite(wanted):
                stored.append(math.nan)
                continue
            # The nearest; of two, the one whose last bit is 0: it has the even index.
            near = sorted(E4M3, key=lambda e, wanted=wanted: abs(e - wanted))[:3]
            ties = [e for e in near if abs(e - wanted) == abs(near[0] - wanted)]
            stored.append(min(ties, key=lambda e: E4M3.index(abs(e)) % 2))
        return stored, scale
    if not all(map(math.isfinite, x)):
        return [], math.nan
    scale = float(torch.tensor(max(map(abs, x))) * (1.0 / 127.0))
    divided = (torch.tensor(x) / (scale if scale > 1e-30 else 1.0)).tolist()
    return [float(round(number)) for number in divided], scale  # Python rounds ties to even


def check_store_quantized(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, kind: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    for tokens, kv_heads, dim, block_size in ((9, 3, 24, 16), (6, 9, 16, 3), (0, 1, 8, 16)):
        shape, scales = (20, kv_heads, block_size, dim), scales_of_heads(kv_heads)
        caches = [fenced_cache(shape, kind, device, scales[::way]) for way in (1, -1)]
        before = [cache.values.clone() for cache in caches]
        slots = torch.randperm(20 * block_size, generator=generator)[:tokens]
        slots[1::4] = -1
        kv = fence(
            (torch.randn(tokens, 2 * kv_heads + 1, dim, generator=generator) * 5).to(device, dtype)
        )
        if tokens:
            kv[0, 1] = 0.0
            kv[0, 2, 3], kv[2, 1, 0], kv[2, -1, 1] = math.nan, math.inf, 1e4
            kv[3, 1] *= 1e-3
            kv[4, 1, :8] = 127.0 * torch.tensor([1, 0.5, 0.25, -0.5, 0.75, 1, -1, 0.125])
        key, value = kv[:, 1 : 1 + kv_heads], kv[:, 1 + kv_heads :]
        kernels.store_kv(key, value, *caches, slots.to(device))
        for new, cache, old, way in zip((key, value), caches, before, (1, -1), strict=True):
            assert_cache_fence(cache)
            untouched = torch.ones(shape[:3], dtype=torch.bool)
            for token, slot in enumerate(slots.tolist()):
                for head in range(kv_heads if slot >= 0 else 0):
                    place = slot // block_size, head, slot % block_size
                    untouched[place] = False
                    numbers = new[token, head].float().tolist()
                    stored, scale = stored_by_hand(numbers, kind, scales[::way][head])
                    if kind == "int8":
                        found = float(cache.scales[place])
                        assert found == scale or (math.isnan(found) and math.isnan(scale))
                    held = cache.values[place].float().cpu()
                    same = torch.equal(held.nan_to_num(7e7), torch.tensor(stored).nan_to_num(7e7))
                    assert same or math.isnan(scale), (kind, numbers, stored, held)
            now = cache.values.view(torch.uint8).cpu()[untouched]
            assert torch.equal(now, old.view(torch.uint8).cpu()[untouched]), "wrote to other slots"


def check_qk_norm_rope_store(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, kind: str = "auto"
) -> None:
    """The fused operation gives exactly the numbers of its parts, and writes nothing else."""
    generator = torch.Generator().manual_seed(14)
    for tokens, heads, kv_heads, dim, block_size in (
        (1, 1, 1, 2, 16),
        (9, 4, 2, 24, 16),
        (6, 17, 3, 64, 3),
        (0, 2, 1, 8, 1),
    ):
        cos_sin = fence(torch.randn(40, dim, generator=generator).to(device))
        positions = torch.randint(0, 40, (tokens,), generator=generator).to(device)
        slots = torch.randperm(20 * block_size, generator=generator)[:tokens]
        slots[1::4] = -1
        qkv = fence(
            torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(device, dtype)
        )
        parts = qkv.unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=1)
        weights = [
            fence((torch.rand(dim, generator=generator) / 2 + 0.5).to(device, dtype))
            for _ in range(2)
        ]
        for norms in (weights, (None, None)):
            shape = (20, kv_heads, block_size, dim)
            blank = torch.full(shape, 9.0, dtype=dtype, device=device)
            caches, expected = [fence(blank), fence(blank)], [blank.clone(), blank.clone()]
            if kind != "auto":
                scales = scales_of_heads(kv_heads)
                caches, expected = (
                    [fenced_cache(shape, kind, device, scales) for _ in range(2)] for _ in range(2)
                )
            with guarded_outputs():
                given = NormRope(*norms, cos_sin, positions, 0.01)
                actual = kernels.qk_norm_rope_store(*parts, given, tuple(caches), slots.to(device))
            query, key = kernels.qk_norm_rope(*parts[:2], *given)
            kernels.store_kv(key, parts[2], *expected, slots.to(device))
            assert torch.equal(actual, query)
            for cache, right in zip(caches, expected, strict=True):
                if kind == "auto":
                    assert_fence(cache)
                    assert torch.equal(cache, right)
                    continue
                assert_cache_fence(cache)
                assert torch.equal(cache.values.view(torch.uint8), right.values.view(torch.uint8))
                assert torch.equal(cache.scales.nan_to_num(-1.0), right.scales.nan_to_num(-1.0))


def check_linear(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(15)
    for rows, width, features in (
        (1, 1, 1),
        (1, 100, 21),
        (3, 1030, 9),
        (4, 64, 40),
        (5, 100, 8),
        (0, 8, 8),
    ):
        x = fence(torch.randn(rows, 2 * width, generator=generator).to(device, dtype))[:, width:]
        weight = fence(
            (torch.randn(features, width, generator=generator) / width**0.5).to(device, dtype)
        )
        for bias in (None, fence(torch.randn(features, generator=generator).to(device, dtype))):
            with guarded_outputs():
                actual = kernels.linear(x, weight, bias)
            expected = (x.double().unsqueeze(1) * weight.double()).sum(-1) + (
                0 if bias is None else bias.double()
            )
            assert_near(actual, expected, dtype)


W8_SHAPES = (
    (1, 1, 2),
    (1, 100, 21),
    (3, 1030, 9),
    (4, 64, 40),
    (5, 100, 150),
    (20, 300, 33),
    (70, 72, 40),
    (260, 40, 24),
    (0, 8, 8),
)


def quantized_weight(
    features: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of all sizes of int8 or e4m3, and a scale per channel that makes them weights."""
    numbers = torch.randn(features, width, generator=generator) * 40
    weight = numbers.round().clamp(-127, 127).to(dtype)
    scale = (torch.rand(features, 1, generator=generator) + 0.5) / (40 * width**0.5)
    return weight, scale


def check_linear_w8a16(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, digits: float = 0.0
) -> None:
    """int8 and e4m3, with scales per channel and per block. digits: the largest activation, where
    activations are rounded to integers.
    """
    generator = torch.Generator().manual_seed(21)
    for rows, width, features in W8_SHAPES:
        x = fence(torch.randn(rows, 2 * width, generator=generator).to(device, dtype))[:, width:]
        for stored in (torch.int8, torch.float8_e4m3fn):
            weight, channels = quantized_weight(features, width, stored, generator)
            weight = fence(weight.to(device), 100.0 if stored == torch.int8 else math.nan)
            grid = (-(-features // 128), -(-width // 128))
            blocks = torch.rand(grid, generator=generator) / 40
            expanded = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
            for scale, each in ((channels, channels), (blocks, expanded[:features, :width])):
                scale = fence(scale.to(device))
                meant = weight.double() * each.to(device).double()
                bias = fence(torch.randn(features, generator=generator).to(device, dtype))
                packed = kernels.pack_w8a16(weight, scale)
                for added in (None, bias):
                    with guarded_outputs():
                        actual = kernels.linear_w8a16(x, packed, scale, added)
                    expected = x.double() @ meant.T
                    expected += 0 if added is None else added.double()
                    if digits and rows:
                        step = x.double().abs().amax(1, keepdim=True) / digits
                        slack = 0.5 * step * meant.abs().sum(1) + TOLERANCE[dtype]
                        slack += TOLERANCE[dtype] * expected.abs()
                        assert actual.dtype == dtype
                        assert ((actual.double() - expected).abs() <= slack).all()
                    elif device.type == "cuda" and dtype != torch.float32:
                        # Of many rows, W is rounded to the dtype of x before it is multiplied.
                        slack = torch.finfo(dtype).eps * (x.double().abs() @ meant.abs().T)
                        slack += TOLERANCE[dtype] * (1 + expected.abs())
                        assert actual.dtype == dtype
                        assert ((actual.double() - expected).abs() <= slack).all()
                    else:
                        assert_near(actual, expected, dtype)


def check_linear_w8a8(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Activations of e4m3, rounded by torch, and sums in float64."""
    generator = torch.Generator().manual_seed(22)
    for rows, width, features in W8_SHAPES:
        if rows > 100:
            continue  # as 70 rows here
        x = torch.randn(rows, 2 * width, generator=generator) * 30
        x[:1] = 0.0  # a row without a maximum
        x = fence(x.to(device, dtype))[:, width:]
        weight, scale = quantized_weight(features, width, torch.float8_e4m3fn, generator)
        weight, scale = fence(weight.to(device)), fence(scale.to(device))
        bias = fence(torch.randn(features, generator=generator).to(device, dtype))
        top = x.float().abs().amax(1, keepdim=True) if rows else x.float()
        rounded = (x.float() * torch.where(top > 0, 448 / top, 0)).to(torch.float8_e4m3fn)
        product = rounded.double() @ weight.double().T * (top.double() / 448) * scale.double().T
        for added in (None, bias):
            with guarded_outputs():
                actual = kernels.linear_w8a8(x, weight, scale, added)
            # One activation may be rounded to its other neighbour.
            size = float(product.abs().max()) if rows else 0.0
            expected = product + (0 if added is None else added.double())
            torch.testing.assert_close(
                actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * (1 + size)
            )
            assert actual.dtype == dtype


def check_rows_are_apart(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """A row that is not finite spoils its own results only."""
    generator = torch.Generator().manual_seed(23)
    for rows in (2, 9):
        x = torch.randn(rows, 48, generator=generator)
        x[0, 3], x[1, 5] = math.nan, math.inf
        x = x.to(device, dtype)
        for stored in (torch.int8, torch.float8_e4m3fn):
            weight, scale = (t.to(device) for t in quantized_weight(24, 48, stored, generator))
            packed = kernels.pack_w8a16(weight, scale)
            results = [kernels.linear_w8a16(x, packed, scale)]
            if stored != torch.int8:
                results.append(kernels.linear_w8a8(x, weight, scale))
            for result in results:
                assert result[0].isnan().all()
                assert not result[1].isfinite().any()
                assert result[2:].isfinite().all()


# --- softmax and merging --------------------------------------------------------------------------


def check_softmax(softmax, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    for rows, width in ((1, 1), (3, 15), (2, 16), (2, 17), (4, 100), (0, 5)):
        x = (torch.randn(rows, width + 3, generator=generator) * 5).to(device, dtype)
        # Whole tiles of -inf come before the row's maximum is known.
        x[:, : width // 2] = -math.inf
        x = fence(x)[:, :width]
        with guarded_outputs():
            out = softmax(x)
        powers = (x.double() - (x.double().amax(-1, keepdim=True) if rows else 0)).exp()
        assert_near(out, powers / powers.sum(-1, keepdim=True), dtype)


def check_merge(merge_attention, device: torch.device) -> None:
    """Merge parts of one attention.

    Some rows have empty parts, only empty parts, or very unequal parts.
    """
    generator = torch.Generator().manual_seed(6)
    for splits, batch, heads, dim in ((1, 1, 1, 4), (2, 3, 2, 24), (21, 2, 3, 64), (53, 3, 1, 80)):
        out = torch.randn(splits, batch, heads, dim, generator=generator)
        lse = torch.randn(splits, batch, heads, generator=generator) * 6
        # The first part is empty, and one in the middle or at the end.
        lse[:: max(2, splits - 1), 0] = -math.inf
        lse[1:, -1, 0] += 200.0  # exp(200) overflows float32
        if batch > 1:
            lse[:, 1, -1] = -math.inf
        out[lse == -math.inf] = 0.0
        peak = lse.double().amax(0).clamp_min(-1e9)
        weights = (lse.double() - peak).exp()
        total = weights.sum(0)
        expected = torch.where(total > 0, 1 / total, 0.0)[..., None] * (
            weights[..., None] * out.double()
        ).sum(0)
        with guarded_outputs():
            actual = merge_attention(fence(out.to(device)), fence(lse.to(device)))
        assert_near(actual, expected, torch.float32)


# --- attention ------------------------------------------------------------------------------------


class PagedContexts:
    """Keys and values of some sequences, dense (for the textbook) and paged (for the kernels).

    kind: of the caches. The dense numbers are what a quantized cache holds, in float32.
    """

    def __init__(
        self,
        contexts: Sequence[int],
        kv_heads: int,
        dim: int,
        block_size: int,
        device,
        dtype,
        seed: int = 0,
        kind: str = "auto",
    ):
        generator = torch.Generator().manual_seed(seed)
        self.keys, self.values = (
            [torch.randn(n, kv_heads, dim, generator=generator).to(device, dtype) for n in contexts]
            for _ in range(2)
        )
        width = -(-max(contexts) // block_size) + 2
        num_blocks = len(contexts) * width + 1
        order = torch.randperm(num_blocks, generator=generator)
        # Garbage behind each context: -1, and one beyond the last block. Both point into the fence,
        # where all is NaN.
        self.block_table = torch.full((len(contexts), width), -1, dtype=torch.int32)
        self.block_table[:, 1::2] = num_blocks
        caches = [
            torch.full((num_blocks, kv_heads, block_size, dim), math.nan, dtype=dtype)
            for _ in range(2)
        ]
        for i, context in enumerate(contexts):
            for token in range(context):
                block = int(order[i * width + token // block_size])
                self.block_table[i, token // block_size] = block
                for cache, dense in zip(caches, (self.keys, self.values), strict=True):
                    cache[block, :, token % block_size] = dense[i][token].cpu()
        self.k_cache, self.v_cache = (fence(cache.to(device)) for cache in caches)
        if kind != "auto":
            self._quantize(kind)
        self.block_table = self.block_table.to(device)
        self.seq_lens = torch.tensor(contexts, dtype=torch.int32, device=device)

    def _quantize(self, kind: str) -> None:
        shape, device = tuple(self.k_cache.shape), self.k_cache.device
        for name, dense, way in (("k_cache", self.keys, 1), ("v_cache", self.values, -1)):
            scales = scales_of_heads(shape[1])[::way]
            cache = fenced_cache(shape, kind, device, scales)
            for i, tokens in enumerate(dense):
                dense[i] = torch.empty(tokens.shape, device=device)
                for token, x in enumerate(tokens.float() / 4):
                    block = int(self.block_table[i, token // shape[2]])
                    place = block, slice(None), token % shape[2]
                    if kind == "int8":
                        # Scales of quite different sizes, so that a neighbour's is noticed.
                        scale = (
                            1.0 + (token * 7 + way + torch.arange(len(x), device=device)) % 5
                        ) / 500
                        cache.scales[place] = scale
                        numbers = (x * 100).round().clamp(-127, 127).to(torch.int8)
                    else:
                        scale = cache.scales
                        numbers = (x / scale[:, None]).to(torch.float8_e4m3fn)
                    cache.values.view(torch.uint8)[place] = numbers.view(torch.uint8)
                    dense[i][token] = numbers.float() * scale[:, None]
            setattr(self, name, cache)


def attention_by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention in float64 for one query token and head at a time: [q_len, H, D].

    query: [q_len, H, D]. key, value: [context, KH, D].
    """
    query, key, value = query.double().cpu(), key.double().cpu(), value.double().cpu()
    q_len, heads, _ = query.shape
    context, kv_heads, _ = key.shape
    out = torch.zeros_like(query)
    for i in range(q_len):
        visible = context - q_len + i + 1
        for head in range(heads):
            if visible > 0:
                shared = head * kv_heads // heads
                scores = key[:visible, shared] @ query[i, head] * scale
                powers = (scores - scores.max()).exp()
                out[i, head] = powers @ value[:visible, shared] / powers.sum()
    return out


# heads, kv_heads, dim, block_size, num_splits, contexts. Tiles are 64 tokens for dim <= 64 in
# float32, else 32.
DECODE_CASES = [
    (4, 2, 24, 16, 1, (1, 15, 16, 17, 63, 64, 65, 0, 129)),
    (4, 2, 24, 16, 3, (1, 0, 200, 16, 64, 65, 257)),
    (6, 2, 80, 64, 2, (1, 31, 32, 33, 0, 63, 64, 65, 130)),
    (3, 3, 64, 128, 1, (129, 1, 128, 127)),
    (16, 1, 96, 32, 5, (100, 33, 1)),
    (2, 1, 16, 16, None, (300, 5)),
]


def check_decode(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    cases=DECODE_CASES,
    kind: str = "auto",
) -> None:
    for heads, kv_heads, dim, block_size, num_splits, contexts in cases:
        pages = PagedContexts(contexts, kv_heads, dim, block_size, device, dtype, heads, kind)
        generator = torch.Generator().manual_seed(dim)
        # The queries are large, so that the weights are far from equal.
        qkv = fence(
            (2 * torch.randn(len(contexts), heads + 2, dim, generator=generator)).to(device, dtype)
        )
        query, scale, merged = qkv[:, 1 : 1 + heads], 0.7 / dim**0.5, []

        def merge(out: torch.Tensor, lse: torch.Tensor, merged=merged) -> torch.Tensor:
            merged.append(lse.shape[0])
            assert out.dtype == lse.dtype == torch.float32
            assert out.shape == (*lse.shape, dim)  # noqa: B023
            assert not out.isnan().any(), "a partial output is NaN"
            return kernels.merge_attention(out, lse)

        with guarded_outputs():
            actual = kernels.decode_attention(
                query,
                pages.k_cache,
                pages.v_cache,
                pages.block_table,
                pages.seq_lens,
                scale,
                max_seq_len=max(contexts) + 7,
                merge_attention=merge,
                num_splits=num_splits,
            )
        if kernels.name == "triton" and num_splits is not None:
            assert merged == ([num_splits] if num_splits > 1 else []), (
                f"merged {merged}, asked for {num_splits} splits"
            )
        elif num_splits != 1:
            assert merged, "merge_attention was not used"
        rows = zip(query, pages.keys, pages.values, strict=True)
        expected = torch.cat([attention_by_hand(q[None], k, v, scale) for q, k, v in rows])
        assert_near(actual, expected, dtype)


# heads, kv_heads, dim, block_size, (query length, context) of each sequence. Tiles are 64 x 32 or
# 16 x 64 (queries x keys) for dim <= 64 in float32, else 32 x 32.
PREFILL_CASES = [
    (4, 2, 24, 16, ((70, 70), (1, 1), (0, 40), (33, 97), (1, 64), (65, 65), (64, 129))),
    (2, 1, 16, 64, ((16, 16), (1, 130), (15, 79), (3, 64), (0, 0))),
    (3, 3, 80, 32, ((33, 33), (32, 64), (5, 95), (40, 41))),
    (6, 2, 64, 16, ((17, 49), (5, 3))),
    (2, 1, 64, 128, ((70, 200), (65, 65), (0, 0), (1, 129))),
]


def check_prefill(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    cases=PREFILL_CASES,
    kind: str = "auto",
) -> None:
    for heads, kv_heads, dim, block_size, lengths in cases:
        contexts = [context for _, context in lengths]
        pages = PagedContexts(contexts, kv_heads, dim, block_size, device, dtype, heads, kind)
        starts = torch.tensor([0, *(q_len for q_len, _ in lengths)]).cumsum(0)
        generator = torch.Generator().manual_seed(dim)
        qkv = fence(
            (2 * torch.randn(int(starts[-1]), heads + 2, dim, generator=generator)).to(
                device, dtype
            )
        )
        query, scale = qkv[:, 1 : 1 + heads], 0.7 / dim**0.5
        with guarded_outputs():
            actual = kernels.prefill_attention(
                query,
                pages.k_cache,
                pages.v_cache,
                pages.block_table,
                starts.int().to(device),
                pages.seq_lens,
                scale,
                max_query_len=max(q_len for q_len, _ in lengths),
                max_seq_len=max(contexts) + 7,
            )
        parts = zip(
            query.split([q_len for q_len, _ in lengths]), pages.keys, pages.values, strict=True
        )
        assert_near(
            actual, torch.cat([attention_by_hand(q, k, v, scale) for q, k, v in parts]), dtype
        )


# --- sampling -------------------------------------------------------------------------------------


def philox_by_hand(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as in the paper, on Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            right >> 32 ^ c[1] ^ k[0],
            right & 0xFFFFFFFF,
            left >> 32 ^ c[3] ^ k[1],
            left & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniform_by_hand(seed: int, position: int) -> float:
    seed, position = seed % 2**64, position % 2**64
    word = philox_by_hand((position % 2**32, position >> 32, 0, 0), (seed % 2**32, seed >> 32))[0]
    return ((word >> 9) + 0.5) / 2**23


def filter_by_hand(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[int]:
    """The token ids that stay, in float64, one token at a time."""
    kept = sorted(
        (i for i in range(len(logits)) if logits[i] > -math.inf), key=lambda i: (-logits[i], i)
    )
    kept = kept[:top_k] if top_k > 0 else kept
    powers = [math.exp((logits[i] - logits[kept[0]]) / temperature) for i in kept]
    if top_p < 1:
        total, reached, count = sum(powers), 0.0, 0
        while count == 0 or reached < top_p * total:
            reached += powers[count]
            count += 1
        kept, powers = kept[:count], powers[:count]
    return [i for i, power in zip(kept, powers, strict=True) if i == kept[0] or power >= min_p]


def check_filter(filter_logits) -> None:
    generator = torch.Generator().manual_seed(8)
    for vocabulary in (1, 6, 100):
        rows = 40
        logits = torch.randn(rows, vocabulary, generator=generator) * 2
        logits[::3, ::2] = -math.inf if vocabulary > 1 else 0.0
        # Many equal logits.
        logits[::5] = logits[::5].round()
        temperature = torch.rand(rows, generator=generator) * 2 + 0.2
        top_k = torch.randint(-1, 8, (rows,), generator=generator, dtype=torch.int32)
        top_p = (torch.rand(rows, generator=generator) * 1.2).clamp_max(1.0)
        min_p = (torch.rand(rows, generator=generator) - 0.6).clamp_min(0.0)
        for filters in (
            (top_k, None, None),
            (None, top_p, None),
            (None, None, min_p),
            (top_k, top_p, min_p),
        ):
            out = filter_logits(logits, temperature, *filters)
            for row in range(rows):
                asked = [
                    off if f is None else f[row].item()
                    for f, off in zip(filters, (0, 1.0, 0.0), strict=True)
                ]
                kept = sorted(filter_by_hand(logits[row].tolist(), temperature[row].item(), *asked))
                assert (out[row] > -math.inf).nonzero().flatten().tolist() == kept, (
                    f"row {row}, asked for {asked}"
                )
                assert torch.equal(out[row, kept], logits[row, kept])


def check_sample(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Each token is the first one whose cumulative float64 share passes the uniform number."""
    generator = torch.Generator().manual_seed(7)
    for vocabulary in (1, 50, 4096, 4097, 9000):
        rows = 12
        logits = torch.randn(rows, vocabulary + 3, generator=generator) * 3
        # Masked at the start; and at the end, where whole tiles are empty.
        logits[1:, : vocabulary // 3] = -math.inf
        logits[3, -(-vocabulary // 2) :] = -math.inf
        logits[4] = 1.5  # all equal
        logits = fence(logits.to(device, dtype))[:, :vocabulary]
        temperature = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0, 1e-4, 10.0, 1.0, 0.7, 1.0, 1.3])
        seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
        positions = torch.tensor([0, 1, 2, 2**33 + 5, 4, 5, 6, 7, 8, 9, 10, 40_000])
        top_k = torch.tensor([0, 3, 0, 0, 5, 1, 7, -1, 1, 200, 10**6, 40], dtype=torch.int32)
        top_p = torch.tensor([1.0, 1.0, 0.9, 1.0, 1.0, 0.5, 1.0, 0.3, 0.9, 0.95, 1.0, 1e-9])
        min_p = torch.tensor([0.0, 0.0, 0.0, 0.2, 0.0, 0.5, 0.0, 0.01, 1.0, 0.05, 0.0, 0.0])
        for filters in (
            (None, None, None),
            (top_k, None, None),
            (None, top_p, min_p),
            (top_k, top_p, min_p),
        ):
            on_device = [
                None if t is None else t.to(device)
                for t in (temperature, *filters, seeds, positions)
            ]
            before = logits.clone()
            with guarded_outputs():
                tokens = kernels.sample(logits, *on_device)
            assert tokens.dtype == torch.int64
            assert torch.equal(before, logits), "the logits were changed"
            for row, token in enumerate(tokens.tolist()):
                values = logits[row].double().tolist()
                assert 0 <= token < vocabulary, f"token {token} of {vocabulary}"
                if temperature[row] == 0:
                    assert token == values.index(max(values)), (
                        "a greedy row is not the first maximum"
                    )
                    continue
                off = (0, 1.0, 0.0)
                asked = [
                    o if f is None else f[row].item() for f, o in zip(filters, off, strict=True)
                ]
                kept = torch.tensor(filter_by_hand(values, temperature[row].item(), *asked))
                assert token in kept, f"row {row}: token {token} was filtered out"
                powers = torch.zeros(vocabulary, dtype=torch.float64)
                powers[kept] = (
                    (logits[row].double().cpu()[kept] - max(values)) / temperature[row].double()
                ).exp()
                running = powers.cumsum(0) / powers.sum()
                target = uniform_by_hand(int(seeds[row]), int(positions[row]))
                before_token = running[token - 1].item() if token else 0.0
                assert before_token - 5e-6 <= target <= running[token].item() + 5e-6, (
                    f"row {row}: not the token at u"
                )
    ties = torch.zeros(3, 9000, device=device, dtype=dtype)
    ties[1, 5000:5003] = 1.0
    ties[2, 4095:4097] = 1.0
    assert kernels.sample(ties, None, None, None, None, None, None).tolist() == [0, 5000, 4095]
    zeros = torch.zeros(3, dtype=torch.int64, device=device)
    with guarded_outputs():
        assert kernels.sample(ties, zeros.float(), None, None, None, zeros, zeros).tolist() == [
            0,
            5000,
            4095,
        ]
