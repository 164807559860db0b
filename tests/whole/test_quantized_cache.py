"""An engine with a quantized KV cache gives what its own reference kernels give, in every mode; its
cache takes the bytes that it says; and what cannot work is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import LLM, Kernels, SamplingParams
from minivllm.errors import ConfigError
from minivllm.kernels.kv_cache import QuantizedCache
from support.parity import (
    NUM_TOKENS,
    Checkpoint,
    Errs,
    ParityError,
    RecordedLLM,
    Report,
    assert_same_greedy,
)
from support.quantized_cache import TOLERANCE, QuantizedReference
from support.ranks import ThreadGroup, run_ranks

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.gpu)]
KINDS = ["int8", "fp8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def references(model: Checkpoint) -> dict[str, QuantizedReference]:
    return {kind: QuantizedReference(model.path, kind) for kind in KINDS}


def same(reference: QuantizedReference, completions: list, **more: Any) -> Report:
    """Raise unless tokens and logits are the reference's; returns what was measured."""
    report = Report()
    assert_same_greedy(
        reference, completions, min_distinct=20, tolerance=TOLERANCE, report=report, **more
    )
    return report


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_chunks(model: Checkpoint, references: dict, backend: str, kind: str) -> None:
    """Prompts join in chunks while others decode, and share prefixes; then the same text without
    any of this.
    """
    options = {"attention_backend": backend, "kv_cache_dtype": kind, "num_kv_blocks": 64}
    llm = RecordedLLM(model.path, block_size=16, max_num_batched_tokens=24, **options)
    shared = model.prompt(33)
    prompts = [shared, model.prompt(1), model.prompt(20, after=shared), *model.prompts(17, 90)]
    completions = llm.complete(prompts)
    metrics = llm.metrics()
    assert metrics.num_mixed_steps > 0
    assert metrics.num_chunks > 0
    assert metrics.prefix_cache_hits >= 32
    same(references[kind], completions)
    again = llm.complete([shared])
    same(references[kind], again)
    assert llm.metrics().prefix_cache_hits > metrics.prefix_cache_hits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_preemption(model: Checkpoint, references: dict, backend: str, kind: str) -> None:
    options = {"attention_backend": backend, "kv_cache_dtype": kind, "num_kv_blocks": 9}
    llm = RecordedLLM(model.path, block_size=16, **options)
    completions = llm.complete(model.prompts(20, 33, 16, 31))
    assert llm.metrics().num_preemptions > 0
    same(references[kind], completions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_late(model: Checkpoint, references: dict, backend: str) -> None:
    options = {"attention_backend": backend, "kv_cache_dtype": "int8", "num_kv_blocks": 12}
    llm = RecordedLLM(model.path, block_size=16, **options)
    for prompt in model.prompts(20, 33, 5):
        llm.add(prompt)
    same(references["int8"], llm.run_one_step_late())


@pytest.mark.parametrize("how", ["errs", "itself"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_speculation(model: Checkpoint, references: dict, backend: str, how: str) -> None:
    """Steps that verify proposals; a draft model's own cache is quantized, too."""
    proposes: dict[str, Any] = {"proposer": Errs(references["int8"])}  # type: ignore[arg-type]
    if how == "itself":
        wanted = {"model": str(model.path), "num_speculative_tokens": 4}
        proposes = {"speculative_config": wanted}
    options = {"attention_backend": backend, "kv_cache_dtype": "int8", "num_kv_blocks": 40}
    llm = RecordedLLM(model.path, block_size=16, **options, **proposes)
    completions = llm.complete(model.prompts(20, 33, 5))
    metrics = llm.metrics()
    assert metrics.num_accepted_tokens > 50
    if how == "itself":
        assert metrics.num_accepted_tokens > 0.95 * metrics.num_draft_tokens
        drafts = llm.llm_engine.core.speculator.proposer.runner.kv_caches
        assert {cache.kind for pair in drafts for cache in pair} == {"int8"}
    same(references["int8"], completions)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels run all of this")
def test_triton_interpreter(tmp_path: Path) -> None:
    """Chunks, a shared prefix and preemption on Triton kernels with an int8 cache."""
    pytest.importorskip("triton")
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "head_dim": 16, "intermediate_size": 48}
    tiny = Checkpoint(tmp_path, **shape)
    llm = RecordedLLM(
        tmp_path,
        attention_backend="triton",
        kv_cache_dtype="int8",
        block_size=16,
        num_kv_blocks=5,
        max_num_batched_tokens=24,
    )
    shared = tiny.prompt(33)
    completions = llm.complete([shared, tiny.prompt(16), [*shared[:32], 7]], num_tokens=3)
    metrics = llm.metrics()
    assert metrics.num_preemptions > 0
    assert metrics.prefix_cache_hits >= 32
    assert metrics.num_chunks > 0
    assert llm.launches["qk_norm_rope_store"] > 0
    reference = QuantizedReference(tmp_path, "int8")
    assert_same_greedy(reference, completions, 3, min_distinct=2, tolerance=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 9])
def test_padded_graphs(model: Checkpoint, references: dict, size: int, kind: str) -> None:
    options = {"attention_backend": "triton", "kv_cache_dtype": kind, "num_kv_blocks": 80}
    llm = RecordedLLM(model.path, block_size=16, **options)
    completions = llm.complete(model.prompts(*[20 + i for i in range(size)]))
    assert llm.num_replays > NUM_TOKENS // 2
    same(references[kind], completions)


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_sees_quantization(model: Checkpoint, references: dict, kind: str) -> None:
    """The unquantized engine, and the other kind, are further away than rounding."""
    other = KINDS[1 - KINDS.index(kind)]
    for wrong in ("auto", other):
        llm = RecordedLLM(model.path, kv_cache_dtype=wrong, num_kv_blocks=48)
        with pytest.raises(ParityError, match="logits differ"):
            same(references[kind], llm.complete(model.prompts(33)))


def test_ranks(model: Checkpoint, references: dict) -> None:
    """Each rank quantizes the heads that it has."""
    prompt, options = model.prompt(33), {"kv_cache_dtype": "int8", "num_kv_blocks": 16}

    def run(group: ThreadGroup) -> list:
        llm = RecordedLLM(model.path, tensor_parallel_size=2, group=group, device="cpu", **options)
        caches = llm.llm_engine.model_runner.kv_caches
        assert caches[0][0].shape[1] == model.reference.model.config.num_key_value_heads // 2
        return llm.complete([prompt])

    for completions in run_ranks(2, run):
        same(references["int8"], completions)


def test_reference_kernels(model: Checkpoint, references: dict) -> None:
    options = {"kv_cache_dtype": "fp8", "num_kv_blocks": 48}
    llm = RecordedLLM(model.path, kernels=Kernels.reference(), **options)
    same(references["fp8"], llm.complete(model.prompts(33)))


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), [("auto", 16), ("fp8", 8), ("int8", 9)])
def test_tokens_in_the_same_memory(model: Checkpoint, kind: str, bits: int) -> None:
    """Against bfloat16: twice as many, less the scales, 4 bytes for each head of 32 numbers."""
    llm = LLM(model.path, dtype="bfloat16", kv_cache_dtype=kind, skip_tokenizer_init=True,
              device="cpu", max_model_len=128)  # fmt: skip
    runner = llm.llm_engine.model_runner
    config = runner.model_config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert config.head_dim == 32
    assert runner.kv_bytes_per_token == numbers * bits // 8
    assert runner.num_kv_blocks == (256 << 20) // (16 * numbers * bits // 8)
    held = sum(cache.nbytes for pair in runner.kv_caches for cache in pair)
    of_fp8 = 2 * config.num_hidden_layers * config.num_key_value_heads * 4 * (kind == "fp8")
    assert held == runner.num_kv_blocks * 16 * runner.kv_bytes_per_token + of_fp8


def test_the_trace_counts_quantized_bytes(model: Checkpoint) -> None:
    llm = LLM(model.path, kv_cache_dtype="int8", skip_tokenizer_init=True, trace=True)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert llm.trace.kv_bytes_per_token == llm.llm_engine.model_runner.kv_bytes_per_token


# --- scales ---------------------------------------------------------------------------------------


def test_measured_scales(model: Checkpoint) -> None:
    """Powers of two that leave room for twice the largest number; the same on every start."""
    options = {"kv_cache_dtype": "fp8", "num_kv_blocks": 32, "skip_tokenizer_init": True}
    plain = LLM(model.path, **options)
    first, second = (LLM(model.path, calculate_kv_scales=True, **options) for _ in range(2))
    prompt = [[5, 9, 100, 7, 3, 250] * 8]
    for llm in (plain, first):
        llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    for one, two, unscaled in zip(
        *(llm.llm_engine.model_runner.kv_caches for llm in (first, second, plain)), strict=True
    ):
        for mine, same_again, ones in zip(one, two, unscaled, strict=True):
            assert isinstance(mine, QuantizedCache)
            assert torch.equal(mine.scales, same_again.scales)
            assert torch.equal(ones.scales, torch.ones_like(ones.scales))
            assert torch.equal(mine.scales.log2(), mine.scales.log2().round())
            largest = mine.values.float().abs().amax(dim=(0, 2, 3))
            # This prompt is not the one that was measured; it is of the same size.
            assert (largest > 448 / 16).all()
            assert (largest < 448).all()


def test_numbers_that_are_not_finite_end_their_request_alone(tmp_path: Path) -> None:
    """An 8-bit cache must not turn them into numbers."""
    checkpoint = Checkpoint(tmp_path)
    for kind in KINDS:
        llm = LLM(tmp_path, kv_cache_dtype=kind, skip_tokenizer_init=True, num_kv_blocks=32)
        embedding = llm.llm_engine.model_runner.model.model.embed_tokens.weight
        with torch.inference_mode():
            embedding[7] = float("inf")
        good, bad = checkpoint.prompt(20), [*checkpoint.prompt(5), 7, 3]
        good = [token if token != 7 else 8 for token in good]
        outputs = llm.generate([good, bad], SamplingParams(max_tokens=4), use_tqdm=False)
        assert outputs[0].error is None
        assert outputs[1].error is not None


# --- options --------------------------------------------------------------------------------------


def test_the_name_that_vllm_has_too(model: Checkpoint) -> None:
    llm = LLM(model.path, kv_cache_dtype="fp8_e4m3", skip_tokenizer_init=True, num_kv_blocks=8)
    assert llm.llm_engine.config.kv_cache_dtype == "fp8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, "one of auto, fp8, int8"),
        ({"kv_cache_dtype": "int8", "calculate_kv_scales": True}, "int8 measures the scale"),
        ({"calculate_kv_scales": True}, "belongs to kv_cache_dtype='fp8'"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "triton"}, "kv_cache_dtype='int8'"),
    ],
)
def test_refused(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=message):
        LLM(model.path, skip_tokenizer_init=True, device="cpu", **options)
