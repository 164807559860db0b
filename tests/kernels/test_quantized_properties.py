"""Whatever is stored in a quantized cache comes back as near as its format promises, from its own
slot, and changes no other.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels import Kernels
from minivllm.kernels.kv_cache import QuantizedCache, read_blocks

BLOCKS, BLOCK_SIZE = 5, 3


@st.composite
def keys(draw: st.DrawFn) -> torch.Tensor:
    """Keys of some tokens, [T, KH, D], of sizes from 1e-6 to 1e6, some of them zero."""
    tokens, heads = draw(st.integers(1, BLOCKS * BLOCK_SIZE)), draw(st.integers(1, 3))
    dim = 2 * draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = 10.0 ** torch.randint(-6, 7, (tokens, heads, 1), generator=generator)
    x = torch.randn(tokens, heads, dim, generator=generator) * sizes
    return x * (torch.rand(x.shape, generator=generator) > draw(st.sampled_from([0.0, 0.5, 1.0])))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["reference", "cpu"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(x=keys(), power=st.integers(-12, 6), seed=st.integers(0, 2**31))
def test_what_is_stored_comes_back(
    name: str, kind: str, x: torch.Tensor, power: int, seed: int
) -> None:
    tokens, heads, dim = x.shape
    shape = (BLOCKS, heads, BLOCK_SIZE, dim)
    caches = [QuantizedCache.zeros(shape, kind) for _ in range(2)]
    for cache in caches:
        if kind == "fp8":
            cache.scales.fill_(2.0**power)
        else:
            cache.scales.fill_(0.5)
        cache.values.view(torch.uint8).fill_(1)
    before = read_blocks(caches[0], torch.arange(BLOCKS))
    order = torch.randperm(BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(seed))
    slots = order[:tokens].clone()
    slots[tokens // 2] = -1
    getattr(Kernels, name)().store_kv(x, -x, *caches, slots)
    after, negative = (read_blocks(cache, torch.arange(BLOCKS)) for cache in caches)

    rows = after.transpose(1, 2).reshape(-1, heads, dim)
    written = slots >= 0
    stored = rows[slots[written]]
    wanted = x[written]
    if kind == "int8":
        limit = wanted.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5) + 1e-28
    else:
        top = 448 * 2.0**power
        wanted = wanted.clamp(-top, top)
        # Half a step: of 3 bits of fraction, or of the numbers below the smallest normal one.
        limit = torch.maximum(wanted.abs() / 16, torch.tensor(2.0 ** (power - 10)))
    assert ((stored - wanted).abs() <= limit).all()
    mirrored = negative.transpose(1, 2).reshape(-1, heads, dim)[slots[written]]
    assert torch.equal(mirrored, -stored), "a number and its negative are rounded alike"
    untouched = torch.ones(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[slots[written]] = False
    old = before.transpose(1, 2).reshape(-1, heads, dim)
    assert torch.equal(rows[untouched], old[untouched])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(x=keys(), power=st.integers(-12, 6))
def test_fp8_stores_what_it_has_read_without_a_change(x: torch.Tensor, power: int) -> None:
    """e4m3 times a power of two is exact, so a second round changes nothing."""
    tokens, heads, dim = x.shape
    caches = [QuantizedCache.zeros((BLOCKS, heads, BLOCK_SIZE, dim), "fp8") for _ in range(4)]
    for cache in caches:
        cache.scales.fill_(2.0**power)
    slots = torch.arange(tokens)
    store = Kernels.reference().store_kv
    store(x, x, *caches[:2], slots)
    once = read_blocks(caches[0], torch.arange(BLOCKS)).transpose(1, 2).reshape(-1, heads, dim)
    store(once[:tokens], once[:tokens], *caches[2:], slots)
    assert torch.equal(caches[0].values.view(torch.uint8), caches[2].values.view(torch.uint8))
