"""Philox against its published answers; sampled frequencies against the distribution; torch and
Triton alike.
"""

import math

import pytest
import torch

from minivllm.kernels import Kernels, sampling
from minivllm.kernels._triton import tl, triton
from support import kernel_checks as checks

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x1234_5678_9ABC_DEF0, 42]
POSITIONS = [0, 7, 2**32 - 1, 2**32, 2**63 - 1, 2**33 + 1, 3, 0]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_tests_own_philox_gives_the_published_answers(counter, key, expected):
    assert checks.philox_by_hand(counter, key) == expected


def test_philox_uniform():
    uniform = sampling.philox_uniform(torch.tensor(SEEDS), torch.tensor(POSITIONS))
    assert uniform.dtype == torch.float32
    assert uniform[0].item() == ((0x6627E8D5 >> 9) + 0.5) / 2**23
    assert uniform.tolist() == [
        checks.uniform_by_hand(*pair) for pair in zip(SEEDS, POSITIONS, strict=True)
    ]
    many = sampling.philox_uniform(torch.arange(200_000), torch.full((200_000,), 5))
    assert many.min() > 0
    assert many.max() < 1
    assert abs(many.mean().item() - 0.5) < 0.003


@triton.jit
def _uniform_kernel(out_ptr, seeds_ptr, positions_ptr):
    row = tl.program_id(0)
    tl.store(
        out_ptr + row, sampling_uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    )


sampling_uniform = sampling.uniform


def test_triton_computes_the_same_bits(triton_kernels: Kernels, device_dtype):
    device, dtype = device_dtype
    if dtype != torch.float32:
        pytest.skip("the uniform number is float32 whatever the model's dtype")
    seeds, positions = torch.tensor(SEEDS, device=device), torch.tensor(POSITIONS, device=device)
    out = torch.zeros(len(SEEDS), device=device)
    _uniform_kernel[(len(SEEDS),)](out, seeds, positions)
    assert torch.equal(out, sampling.philox_uniform(seeds, positions))


@pytest.mark.slow
def test_sample(kernels: Kernels, device_dtype):
    checks.check_sample(kernels, *device_dtype)


def chi_square_bound(freedom: int) -> float:
    """The value that chi-square exceeds once in 10,000 times (Wilson and Hilferty's
    approximation).
    """
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.3}, {"top_k": 6, "top_p": 0.9, "min_p": 0.15}],
    ids=lambda filters: "+".join(filters) or "unfiltered",
)
def test_frequencies(kernels: Kernels, filters: dict, monkeypatch: pytest.MonkeyPatch):
    """Different seeds at one position, and one seed at different positions, both give the
    distribution asked for.
    """
    monkeypatch.setattr(sampling, "TILE", 4)  # three tiles
    device = checks.DEVICE
    interpreted = kernels.name == "triton" and device.type == "cpu"  # 10 ms a row
    rows, temperature = 40 if interpreted else 20_000, 0.8
    logits = torch.tensor([0.3, -0.5, 1.5, -math.inf, 1.0, 0.9, -1.0, 0.6, 0.0])
    kept = checks.filter_by_hand(
        logits.tolist(),
        temperature,
        filters.get("top_k", 0),
        filters.get("top_p", 1.0),
        filters.get("min_p", 0.0),
    )
    expected = torch.zeros(len(logits))
    expected[kept] = (logits[kept] / temperature).softmax(0) * rows

    def column(name: str, dtype=torch.float32):
        return (
            torch.full((rows,), filters[name], dtype=dtype, device=device)
            if name in filters
            else None
        )

    count, fixed = torch.arange(rows, device=device), torch.full((rows,), 1234, device=device)
    for seeds, positions in ((count, fixed), (fixed, count))[: 1 if interpreted else 2]:
        tokens = kernels.sample(
            logits.to(device).expand(rows, -1).contiguous(),
            torch.full((rows,), temperature, device=device),
            column("top_k", torch.int32),
            column("top_p"),
            column("min_p"),
            seeds,
            positions,
        )
        observed = torch.bincount(tokens.cpu(), minlength=len(logits)).float()
        assert not observed[expected == 0].any(), "a token was chosen that cannot be"
        statistic = ((observed - expected) ** 2 / expected)[expected > 0].sum().item()
        assert statistic < chi_square_bound(max(1, len(kept) - 1)), (observed, expected)


def test_the_same_token_whatever_the_batch(kernels: Kernels):
    """The same seed and position give the same token in another row of another batch (bug 35)."""
    device = checks.DEVICE
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)).to(device)
    hot, seeds = torch.ones(6, device=device), torch.arange(6, device=device)
    together = kernels.sample(logits, hot, None, None, None, seeds, seeds + 100)
    for row in range(6):
        one = slice(row, row + 1)
        assert (
            kernels.sample(logits[one], hot[one], None, None, None, seeds[one], seeds[one] + 100)
            == together[row]
        )
    backwards = kernels.sample(
        logits.flip(0),
        hot,
        None,
        torch.ones(6, device=device),
        None,
        seeds.flip(0),
        seeds.flip(0) + 100,
    )
    assert torch.equal(backwards.flip(0), together)


@pytest.mark.slow
def test_torch_and_triton_choose_the_same_token(triton_kernels: Kernels, device_dtype):
    """Not by necessity, sums round differently, but with this seed no target lies within rounding
    of a boundary.
    """
    device, dtype = device_dtype
    logits = (torch.randn(24, 10_000, generator=torch.Generator().manual_seed(0)) * 2).to(
        device, dtype
    )
    arguments = (
        torch.full((24,), 0.9, device=device),
        None,
        torch.full((24,), 0.95, device=device),
        None,
    )
    seeds = torch.arange(24, device=device) * 997
    theirs = Kernels.reference().sample(logits, *arguments, seeds, seeds + 1)
    ours = triton_kernels.sample(logits, *arguments, seeds, seeds + 1)
    assert (theirs == ours).sum() >= 23


def test_filter_logits():
    checks.check_filter(sampling.filter_logits)


def test_filters_touch_only_the_rows_that_ask():
    logits = torch.randn(3, 20)
    same = torch.tensor([0, 0, 0], dtype=torch.int32)
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert sampling.filter_logits(logits, ones, same, ones, zeros) is logits
    top_k = torch.tensor([0, 2, 0], dtype=torch.int32)
    filtered = sampling.filter_logits(logits, ones, top_k, None, None)
    assert torch.equal(filtered[[0, 2]], logits[[0, 2]])
    assert (filtered[1] > -math.inf).sum() == 2


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(1, 1.0, 0.0), (0, 0.0, 0.0), (0, 1.0, 1.0), (3, 1e-9, 5.0)]
)
def test_a_filtered_row_keeps_its_best_token(
    kernels: Kernels, top_k: int, top_p: float, min_p: float
):
    device = checks.DEVICE
    logits = torch.tensor([[0.0, 3.0, 1.0, -math.inf]], device=device)
    columns = [torch.tensor([value], device=device) for value in (1.0, top_k, top_p, min_p)]
    for seed in range(5):
        where = torch.tensor([seed], device=device)
        assert kernels.sample(logits, *columns, where, where).item() == 1


def test_equal_logits_are_cut_at_the_lower_ids():
    logits = torch.zeros(1, 6)
    kept = sampling.filter_logits(logits, torch.ones(1), torch.tensor([4]), None, None)
    assert kept.tolist() == [[0.0] * 4 + [-math.inf] * 2]
