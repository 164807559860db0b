"""Every operation against the textbook, in every implementation; then what only one of them
promises.
"""

import dataclasses

import pytest
import torch

from minivllm.kernels import Fused, Kernels, cpu, online_softmax
from minivllm.kernels.paged_attention import choose_num_splits
from minivllm.kernels.rotary import NormRope
from support import kernel_checks as checks


def test_norm(kernels: Kernels, device_dtype):
    checks.check_norm(kernels, *device_dtype)


def test_linear_w8a16(kernels: Kernels, device_dtype):
    is_rounded = kernels.name == "cpu" and cpu.HAS_PACKED
    checks.check_linear_w8a16(kernels, *device_dtype, digits=cpu.DIGITS_MAX if is_rounded else 0)


def test_linear_w8a8(kernels: Kernels, device_dtype):
    checks.check_linear_w8a8(kernels, *device_dtype)


def test_rows_of_8_bit_layers_are_apart(kernels: Kernels, device_dtype):
    checks.check_rows_are_apart(kernels, *device_dtype)


def test_silu_mul(kernels: Kernels, device_dtype):
    checks.check_silu_mul(kernels, *device_dtype)


@pytest.mark.slow
def test_qk_norm_rope(kernels: Kernels, device_dtype):
    checks.check_qk_norm_rope(kernels, *device_dtype)


def test_store_kv(kernels: Kernels, device_dtype):
    checks.check_store_kv(kernels, *device_dtype)


KINDS = ["int8", "fp8"]


def skip_in_the_interpreter(kernels: Kernels, kind: str) -> None:
    """It rounds float8 wrong, and has no inline assembly; an engine refuses fp8 there."""
    if kind == "fp8" and kernels.name == "triton" and checks.DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter cannot do this kernel with float8")


@pytest.mark.parametrize("kind", KINDS)
def test_store_quantized(kernels: Kernels, device_dtype, kind: str):
    skip_in_the_interpreter(kernels, kind)
    checks.check_store_quantized(kernels, *device_dtype, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_qk_norm_rope_store_quantized(triton_kernels: Kernels, device_dtype, kind: str):
    checks.check_qk_norm_rope_store(triton_kernels, *device_dtype, kind)


@pytest.mark.slow
def test_qk_norm_rope_store(triton_kernels: Kernels, device_dtype):
    checks.check_qk_norm_rope_store(triton_kernels, *device_dtype)


@pytest.mark.slow
def test_qk_norm_rope_store_is_its_two_parts(kernels: Kernels, device_dtype):
    """Also for kernels that have no fused one."""
    checks.check_qk_norm_rope_store(dataclasses.replace(kernels), *device_dtype)


class TestReplaced:
    """A fused operation must not bypass what somebody put in the place of one of its parts."""

    cache = (torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
    given = NormRope(None, None, torch.ones(3, 8), torch.zeros(2, dtype=torch.int64), 1e-6)

    @staticmethod
    def whole(calls: list[str]) -> Kernels:
        def fused(query, *_):
            calls.append("fused")
            return query

        def merge(out, lse, dtype):
            calls.append("merge and convert")
            return out[0].to(dtype)

        return dataclasses.replace(Kernels.reference(), fused=Fused(fused, merge))

    def store(self, kernels: Kernels) -> None:
        heads = torch.ones(2, 1, 8)
        slots = torch.arange(2)
        kernels.qk_norm_rope_store(heads, heads, heads, self.given, self.cache, slots)

    @pytest.mark.parametrize("part", ["qk_norm_rope", "store_kv"])
    def test_a_replaced_part_is_called(self, part: str) -> None:
        calls: list[str] = []
        whole = self.whole(calls)
        self.store(whole)
        assert calls == ["fused"]

        def mine(*args):
            calls.append(part)
            return args[:2]

        self.store(dataclasses.replace(whole, **{part: mine}))
        assert calls == ["fused", part]

    def test_a_replaced_merge_is_called(self) -> None:
        calls: list[str] = []
        parts = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3)
        whole = self.whole(calls)
        assert whole.merge_into(torch.float16)(*parts).dtype == torch.float16
        assert calls == ["merge and convert"]

        def mine(out, lse):
            calls.append("mine")
            return out[0]

        replaced = dataclasses.replace(whole, merge_attention=mine)
        replaced.merge_into(torch.float16)(*parts)
        assert calls[1:] == ["mine"]

    def test_who_hands_the_fused_operations_on_keeps_them(self) -> None:
        calls: list[str] = []
        whole = self.whole(calls)
        kept = dataclasses.replace(whole, rms_norm=print, fused=whole.fused_operations)
        self.store(kept)
        assert calls == ["fused"]
        assert kept.rms_norm is print


def test_only_triton_kernels_can_be_recorded():
    """And whoever replaces one of them answers for it."""
    assert Kernels.triton().can_be_recorded
    assert dataclasses.replace(Kernels.triton(), silu_mul=print).can_be_recorded
    assert not Kernels.reference().can_be_recorded
    assert not Kernels.cpu().can_be_recorded


def test_linear(kernels: Kernels, device_dtype):
    checks.check_linear(kernels, *device_dtype)


def test_softmax(kernels: Kernels, device_dtype):
    if kernels.name != "triton":
        checks.check_softmax(online_softmax.softmax_reference, *device_dtype)
    else:
        checks.check_softmax(lambda x: online_softmax.softmax(x, block=16), *device_dtype)


def test_merge_attention(kernels: Kernels, device_dtype):
    device, dtype = device_dtype
    if dtype != torch.float32:
        pytest.skip("merging is in float32 whatever the model's dtype")
    checks.check_merge(kernels.merge_attention, device)


@pytest.mark.slow
def test_decode_attention(kernels: Kernels, device_dtype):
    checks.check_decode(kernels, *device_dtype)


#: As DECODE_CASES and PREFILL_CASES, fewer: tiles are 64 and 128 tokens here.
QUANTIZED_DECODE = [
    (4, 2, 24, 16, 1, (1, 16, 17, 63, 64, 65, 0, 129)),
    (6, 2, 80, 64, 2, (31, 0, 65, 130)),
    (3, 3, 64, 128, 3, (129, 1, 300)),
]
QUANTIZED_PREFILL = [
    (4, 2, 24, 16, ((70, 70), (1, 1), (0, 40), (33, 97), (1, 64))),
    (2, 1, 16, 64, ((16, 16), (1, 130), (15, 79), (0, 0))),
]


@pytest.mark.parametrize("kind", KINDS)
def test_decode_of_a_quantized_cache(kernels: Kernels, device_dtype, kind: str):
    skip_in_the_interpreter(kernels, kind)
    checks.check_decode(kernels, *device_dtype, QUANTIZED_DECODE, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_of_a_quantized_cache(kernels: Kernels, device_dtype, kind: str):
    checks.check_prefill(kernels, *device_dtype, QUANTIZED_PREFILL, kind)


@pytest.mark.slow
def test_prefill_attention(kernels: Kernels, device_dtype):
    checks.check_prefill(kernels, *device_dtype)


@pytest.mark.parametrize("block_size", [1, 3, 256])
@pytest.mark.parametrize("kernels", [Kernels.reference(), Kernels.cpu()], ids=["torch", "cpu"])
def test_torch_takes_any_block_size(block_size: int, kernels: Kernels):
    device, dtype = torch.device("cpu"), torch.float32
    checks.check_decode(kernels, device, dtype, [(4, 2, 16, block_size, 3, (1, 3, 0, 4, 257, 256))])
    checks.check_prefill(
        kernels, device, dtype, [(4, 2, 16, block_size, ((7, 7), (1, 257), (3, 256), (2, 2)))]
    )


@pytest.mark.parametrize("lengths", [(0, 0), (5,), (0, 16)])
def test_decode_of_padded_rows_and_single_blocks(kernels: Kernels, lengths):
    device = checks.DEVICE
    pages = checks.PagedContexts(lengths, 2, 16, 16, device, torch.float32)
    query = torch.randn(len(lengths), 2, 16, device=device)
    out = kernels.decode_attention(
        query,
        pages.k_cache,
        pages.v_cache,
        pages.block_table,
        pages.seq_lens,
        0.25,
        max_seq_len=16,
        merge_attention=kernels.merge_attention,
        num_splits=1,
    )
    for row, length in enumerate(lengths):
        expected = checks.attention_by_hand(
            query[row : row + 1], pages.keys[row], pages.values[row], 0.25
        )
        checks.assert_near(out[row : row + 1], expected, torch.float32)
        assert length or not out[row].any()


@pytest.mark.gpu
def test_caches_of_more_than_2_to_the_31_numbers(triton_kernels: Kernels):
    """Offsets into a cache need 64 bits: 4 GB of keys is ordinary."""
    block_size, dim, blocks = 64, 128, 2**31 // (64 * 128) + 3
    caches = [
        torch.zeros(blocks, 1, block_size, dim, dtype=torch.bfloat16, device="cuda")
        for _ in range(2)
    ]
    key, value, query = (torch.randn(70, 1, dim, device="cuda").bfloat16() for _ in range(3))
    table = torch.tensor([[blocks - 1, blocks - 3]], dtype=torch.int32, device="cuda")
    tokens = torch.arange(70, device="cuda")
    triton_kernels.store_kv(
        key,
        value,
        *caches,
        table[0].long()[tokens // block_size] * block_size + tokens % block_size,
    )
    lengths, starts = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([70], [0, 70]))
    bounds = {"max_seq_len": 70, "max_query_len": 70}
    out = triton_kernels.prefill_attention(query, *caches, table, starts, lengths, 0.1, **bounds)
    expected = checks.attention_by_hand(query, key, value, 0.1)
    checks.assert_near(out, expected, torch.bfloat16)
    last = triton_kernels.decode_attention(
        query[-1:],
        *caches,
        table,
        lengths,
        0.1,
        max_seq_len=70,
        merge_attention=triton_kernels.merge_attention,
    )
    checks.assert_near(last, expected[-1:], torch.bfloat16)


def test_number_of_splits():
    # one sequence of Qwen3-0.6B: as many as fill the GPU
    assert choose_num_splits(8, 4096, 132) == 17
    assert choose_num_splits(128, 4096, 132) == 2  # four multiprocessors would have none
    assert choose_num_splits(8, 200, 132) == 2  # but not shorter than 128 tokens
    assert choose_num_splits(256, 8192, 132) == 1  # enough programs already
    assert choose_num_splits(0, 1, 132) == 1


def test_unsuitable_inputs_are_refused(triton_kernels: Kernels):
    def decode(heads=4, kv_heads=2, block_size=16, dtype=torch.float32, table=None):
        cache = torch.zeros(2, kv_heads, block_size, 16, dtype=dtype)
        table = torch.zeros(1, 2, dtype=torch.int32) if table is None else table
        triton_kernels.decode_attention(
            torch.zeros(1, heads, 16),
            cache,
            cache,
            table,
            torch.ones(1, dtype=torch.int32),
            1.0,
            max_seq_len=1,
            merge_attention=triton_kernels.merge_attention,
        )

    with pytest.raises(ValueError, match="share 2 KV heads evenly"):
        decode(heads=3)
    with pytest.raises(ValueError, match="at most 16 query heads"):
        decode(heads=17, kv_heads=1)
    with pytest.raises(ValueError, match="power of two"):
        decode(block_size=48)
    with pytest.raises(ValueError, match="power of two"):
        decode(block_size=8)
    with pytest.raises(ValueError, match="query's dtype"):
        decode(dtype=torch.float16)
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="strided"):
        triton_kernels.rms_norm(x[:, ::2], x[0, :3], 1e-6)
    with pytest.raises(ValueError, match="same width"):
        triton_kernels.silu_mul(x[:, :5])
    heads = torch.zeros(2, 2, 4)
    for kernels in (triton_kernels, Kernels.reference()):
        with pytest.raises(ValueError, match="both norm weights"):
            kernels.qk_norm_rope(
                heads, heads, torch.ones(4), None, x, torch.zeros(2, dtype=torch.int64), 1e-6
            )
        with pytest.raises(ValueError, match="seeds"):
            kernels.sample(x, torch.ones(4), None, None, None, None, None)
