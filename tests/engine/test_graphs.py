"""What only a GPU can show: recorded decode steps, overlap, and bfloat16."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from minivllm import LLM, Kernels, SamplingParams
from support.checkpoints import TransformersReference, random_prompt, write_checkpoint

pytestmark = pytest.mark.gpu
LENGTHS = (3, 17, 64, 65, 130)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return write_checkpoint(tmp_path_factory.mktemp("graphs") / "qwen3", "qwen3")


def engine(path: Path, **options) -> LLM:
    options = {"max_num_seqs": 16, "num_kv_blocks": 64, "dtype": "bfloat16", **options}
    return LLM(path, skip_tokenizer_init=True, **options)


def decode_tokens(llm: LLM, prompts: list[list[int]], num_tokens: int = 32) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def prompts(count: int = len(LENGTHS), salt: int = 0) -> list[list[int]]:
    return [random_prompt(LENGTHS[i % len(LENGTHS)], salt + i) for i in range(count)]


@pytest.mark.parametrize("running", [1, 3, 5, 8, 11])
def test_replay_equals_the_same_padded_batch_run_eagerly(path: Path, running: int) -> None:
    """Bit for bit, padding included; and the padded rows change nothing in the cache (reference bug
    29).
    """
    with engine(path) as llm:
        core = llm.llm_engine
        for prompt in prompts(running):
            core.add_request(prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        for _ in range(6):
            core.step()
        runner = core.model_runner
        torch.cuda.synchronize()
        slots = [seq.slot for seq in core.scheduler.running]
        assert len(slots) == running
        graphs, state = runner.graphs, runner._state
        size = next(size for size in graphs.sizes if size >= running)
        padded = torch.tensor(slots + [graphs.spare_slot] * (size - running), device="cuda")
        tensors = [
            state.block_table,
            state.position,
            state.last_token,
            *(x for kv in runner.kv_caches for x in kv),
        ]
        before = [tensor.clone() for tensor in tensors]
        with torch.inference_mode():
            tokens, hidden = (x.clone() for x in graphs.replay(slots))
            after = [tensor.clone() for tensor in tensors]
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
            eager_tokens, eager_hidden = runner._decode_step(padded)
        assert torch.equal(tokens, eager_tokens[:running])
        assert torch.equal(hidden, eager_hidden[:running])
        for one, other in zip(after, tensors, strict=True):
            assert torch.equal(one, other)
        changed = sum(
            int((a != b).any(dim=(1, 3)).sum()) for a, b in zip(after[3:], before[3:], strict=True)
        )
        assert 0 < changed <= running * len(before[3:]), (
            "a step writes one place a sequence in each cache"
        )


def test_a_padded_graph_leaves_the_others_alone(path: Path) -> None:
    """Reference bug 29: the largest graph is not the one for every batch, and padding keeps no old
    slot alive.
    """
    reference = TransformersReference(path, "cuda")
    with engine(path, dtype="float32", max_num_seqs=32) as llm:
        assert decode_tokens(llm, prompts(20)) == [
            reference.greedy(p, 32).token_ids for p in prompts(20)
        ]
        replayed = []
        graphs = llm.llm_engine.model_runner.graphs
        replay = llm.llm_engine.model_runner.graphs.replay
        graphs.replay = lambda slots: (replayed.append(len(slots)), replay(slots))[1]
        # The slots of the 20 are free, their blocks cached; three newcomers run in a smaller,
        # padded graph.
        few = prompts(3, salt=100)
        assert decode_tokens(llm, few) == [reference.greedy(p, 32).token_ids for p in few]
        assert set(replayed) == {3}
        # And the cache of the twenty, which the prefix cache still knows, is what it was.
        assert decode_tokens(llm, prompts(20)) == [
            reference.greedy(p, 32).token_ids for p in prompts(20)
        ]


def test_graphs_serve_the_longest_sequence(path: Path) -> None:
    """Reference bug 30: a graph's block table holds max_model_len tokens."""
    reference = TransformersReference(path, "cuda")
    with engine(path, dtype="float32", max_model_len=1000, block_size=16, num_kv_blocks=128) as llm:
        long = random_prompt(900, 7)
        assert decode_tokens(llm, [long, long[:5]], 95) == [
            reference.greedy(p, 95).token_ids for p in (long, long[:5])
        ]
        assert llm.llm_engine.model_runner._state.block_table.shape[1] * 16 >= 1000


@pytest.mark.parametrize("count", [1, 7, 16])
def test_overlap_changes_no_bit(path: Path, count: int) -> None:
    """Greedy and seeded sampling in bfloat16, scheduled one step ahead or not."""
    params = [
        SamplingParams(
            temperature=0.8 * (i % 2), seed=i, max_tokens=40, ignore_eos=True, logprobs=1
        )
        for i in range(count)
    ]
    results = []
    for overlap in (True, False):
        with engine(path, async_scheduling=overlap) as llm:
            outputs = llm.generate(prompts(count), params, use_tqdm=False)
            results.append(
                [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]
            )
    assert results[0] == results[1]


@pytest.mark.parametrize("model", ["random", "bundled"])
def test_bfloat16_is_as_exact_as_transformers(path: Path, model: str) -> None:
    """RMS error of the logits against transformers in float32: at most 1.1 x that of transformers'
    own bfloat16.
    """
    from transformers import AutoModelForCausalLM

    import minivllm.bundled

    folder = path if model == "random" else Path(minivllm.bundled.__file__).parent
    seen: list[torch.Tensor] = []
    triton = Kernels.triton()

    def recording(logits: torch.Tensor, *args, **kwargs):
        seen.append(logits.float().clone())
        return triton.sample(logits, *args, **kwargs)

    texts = [random_prompt(length, length) for length in (5, 33, 64, 100, 127, 128, 200, 300)] * 2
    texts = [[(token + i // 8) % 1000 for token in text] for i, text in enumerate(texts)]
    kernels = dataclasses.replace(triton, sample=recording)
    with LLM(
        folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        kernels=kernels,
        num_kv_blocks=64,
        max_num_seqs=16,
        max_num_batched_tokens=8192,
        async_scheduling=False,
    ) as llm:
        seen.clear()
        llm.generate(texts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    ours = torch.cat(seen)
    assert len(ours) == len(texts)

    def transformers_logits(dtype: torch.dtype) -> torch.Tensor:
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()
        with torch.inference_mode():
            return torch.stack(
                [hf(torch.tensor([text], device="cuda")).logits[0, -1].float() for text in texts]
            )

    exact = transformers_logits(torch.float32)
    # Our batch may hold the sequences in another order: each row is compared with the text that it
    # belongs to.
    owner = torch.cdist(ours, exact).argmin(dim=1)
    assert sorted(owner.tolist()) == list(range(len(texts)))
    error = (ours - exact[owner]).square().mean().sqrt().item()
    theirs = (transformers_logits(torch.bfloat16) - exact).square().mean().sqrt().item()
    print(
        f"\n{model}: RMS error of bfloat16 logits {error:.5f}, transformers' {theirs:.5f}, ratio"
        f" {error / theirs:.3f}"
    )
    assert error <= 1.1 * theirs
