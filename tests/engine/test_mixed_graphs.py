"""Recorded steps with prompts in them. What the CPU sends is tested here; the rest needs a GPU."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minivllm import LLM, Kernels, SamplingParams
from minivllm.engine.batch import BatchRow, build_batch
from minivllm.engine.mixed_graphs import MixedGraphs, RecordedInputs, StepShape, step_shapes
from support.checkpoints import TransformersReference, random_prompt, write_checkpoint

BLOCK_SIZE, SPARE = 16, 99


def test_shapes() -> None:
    shapes = step_shapes(max_num_seqs=256, max_num_batched_tokens=8192)
    assert len(shapes) == len(set(shapes))
    assert {shape.num_decodes for shape in shapes} == {32, 128, 256}
    assert max(shape.num_tokens for shape in shapes) == 2048
    # A budget or a number of sequences below all others is a shape of its own.
    assert step_shapes(3, 40) == [StepShape(3, 40)]
    assert StepShape(1024, 2048) in step_shapes(1024, 8192)


@pytest.mark.parametrize("seed", range(20))
def test_what_the_gpu_reads_is_the_step(seed: int) -> None:
    """Decodes at the start, chunks behind all rows of decodes, and nothing else."""
    draw = random.Random(seed)
    shape = StepShape(draw.choice([1, 8, 32]), draw.choice([64, 128, 640]))
    decodes = draw.randint(0, shape.num_decodes)
    chunks = draw.randint(0 if decodes else 1, shape.num_chunks)
    lengths = [1] * decodes + [draw.randint(2, shape.num_tokens // shape.num_chunks)] * chunks
    rows = [
        BatchRow([draw.randrange(500) for _ in range(n)], draw.randrange(200), True)
        for n in lengths
    ]
    # Each sequence has its own blocks.
    table = np.arange(len(rows) * 64, dtype=np.int32).reshape(len(rows), 64)
    inputs = build_batch(rows, table, BLOCK_SIZE)
    slots = draw.sample(range(SPARE), len(rows))

    array = torch.full((sum(shape.sections),), -12345)
    recorded = RecordedInputs(*array.split(shape.sections))
    recorded.clear(shape, SPARE)
    recorded.write(shape, inputs, slots)
    assert (array != -12345).all(), "every number is written"

    starts = recorded.query_start_loc.tolist()
    places = [*range(decodes), *range(shape.num_decodes, shape.num_decodes + chunks)]
    for place, row, slot, blocks in zip(places, rows, slots, table, strict=True):
        tokens = slice(starts[place], starts[place + 1])
        assert recorded.token_ids[tokens].tolist() == list(row.token_ids)
        positions = range(row.start, row.start + len(row.token_ids))
        assert recorded.positions[tokens].tolist() == list(positions)
        written = [int(blocks[p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        assert recorded.slot_mapping[tokens].tolist() == written
        assert recorded.slots[place] == slot
        assert recorded.seq_lens[place] == row.start + len(row.token_ids)
    unused = sorted(set(range(shape.num_seqs)) - set(places))
    assert (recorded.slots[unused] == SPARE).all()
    assert (recorded.seq_lens[unused] == 0).all()
    assert int((recorded.slot_mapping >= 0).sum()) == sum(lengths), "padding is written nowhere"
    # An unused decode has its row; an unused chunk has none.
    sizes = recorded.query_start_loc.diff()
    assert (sizes[: shape.num_decodes] == 1).all()
    assert (sizes[shape.num_decodes + chunks :] == 0).all()


def test_a_step_takes_the_smallest_shape_that_it_fits_into() -> None:
    graphs = object.__new__(MixedGraphs)
    graphs.shapes = step_shapes(max_num_seqs=256, max_num_batched_tokens=8192)

    def fitting(lengths: list[int], starts: list[int]) -> StepShape | None:
        rows = [BatchRow([1] * n, start, True) for n, start in zip(lengths, starts, strict=True)]
        table = np.zeros((len(rows), 2000), dtype=np.int32)
        return graphs.fitting(build_batch(rows, table, BLOCK_SIZE).attention)

    assert fitting([1] * 32 + [128], [9] * 32 + [0]) == StepShape(32, 128)
    assert fitting([1] * 33 + [100], [9] * 33 + [0]) == StepShape(128, 128)
    assert fitting([129], [0]) == StepShape(32, 256)
    assert fitting([2] * 5, [0] * 5) == StepShape(32, 768), "five chunks"
    assert fitting([2049], [0]) is None
    assert fitting([1] * 257 + [5], [9] * 257 + [0]) is None
    # A long context counts where a chunk has it; decodes have kernels for any.
    assert fitting([1, 100], [20_000, 0]) == StepShape(32, 128)
    assert fitting([1, 100], [9, 8_100]) is None


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return write_checkpoint(tmp_path_factory.mktemp("mixed") / "qwen3", "qwen3")


def _requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    prompts = [random_prompt(3 + 37 * i % 250, i) for i in range(count)]
    params = [
        SamplingParams(temperature=0, max_tokens=5 + 11 * i % 40, ignore_eos=True)
        for i in range(count)
    ]
    return prompts, params


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"async_scheduling": False}, {"max_num_batched_tokens": 96}, {"num_kv_blocks": 24}],
    ids=["ahead", "not ahead", "chunks", "preempted"],
)
def test_tokens_are_those_of_transformers(path: Path, options: dict) -> None:
    """30 requests of all lengths over 8 slots: nearly every step has prompts and decodes."""
    reference = TransformersReference(path, "cuda")
    prompts, params = _requests(30)
    options = {"num_kv_blocks": 64, "max_num_seqs": 8, "max_model_len": 512, **options}
    with LLM(path, skip_tokenizer_init=True, dtype="float32", **options) as llm:
        graphs = llm.llm_engine.model_runner.mixed_graphs
        replay, replayed = graphs.replay, []
        graphs.replay = lambda shape, *rest: (replayed.append(shape), replay(shape, *rest))[1]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert len(replayed) > 5
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        expected = reference.greedy(prompt, param.max_tokens).token_ids
        assert output.outputs[0].token_ids == expected


@pytest.mark.gpu
def test_samples_logprobs_and_filters_are_those_without_graphs(path: Path) -> None:
    prompts, _ = _requests(24)
    params = [
        SamplingParams(
            temperature=0.9 * (i % 2),
            top_p=0.8 if i % 3 else 1.0,
            seed=i,
            max_tokens=20,
            ignore_eos=True,
            logprobs=2 if i % 4 else None,
            prompt_logprobs=1 if i % 5 == 0 else None,
        )
        for i in range(24)
    ]
    seen, logprobs = [], []
    for eager in (False, True):
        with LLM(
            path,
            skip_tokenizer_init=True,
            dtype="float32",
            max_num_seqs=8,
            num_kv_blocks=64,
            enforce_eager=eager,
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        seen.append([o.outputs[0].token_ids for o in outputs])
        asked = [output for output in outputs if output.prompt_logprobs]
        assert len(asked) == 5
        of_prompts = [entry for o in asked for entry in o.prompt_logprobs if entry]
        of_answers = [entry for o in outputs for entry in o.outputs[0].logprobs or ()]
        logprobs.append([x.logprob for e in of_prompts + of_answers for x in e.values()])
    assert seen[0] == seen[1]
    assert len(logprobs[0]) > 500
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)


@pytest.mark.gpu
def test_a_kernel_that_waits_costs_the_graphs_of_prompts_only(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A learner's own prefill kernel may read numbers on the CPU. Decodes are recorded still."""
    triton = Kernels.triton()

    def waits(query, *args, **limits):
        assert float(query.sum().item()) is not None
        return triton.prefill_attention(query, *args, **limits)

    kernels = replace(triton, prefill_attention=waits)
    options = {"num_kv_blocks": 64, "max_num_seqs": 8, "dtype": "float32"}
    prompts, params = _requests(6)
    caplog.set_level(logging.WARNING)
    with LLM(path, skip_tokenizer_init=True, kernels=kernels, **options) as llm:
        assert llm.llm_engine.model_runner.mixed_graphs is None
        assert llm.llm_engine.model_runner.graphs is not None
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert "could not be recorded" in caplog.text
    reference = TransformersReference(path, "cuda")
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        assert output.outputs[0].token_ids == reference.greedy(prompt, param.max_tokens).token_ids
