"""Logits that are not finite end their request with a typed error, and nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.errors import InvalidLogitsError
from minivllm.kernels.sampling import NOT_A_TOKEN, sample, sample_reference
from minivllm.models.qwen3 import Qwen3ForCausalLM
from support.checkpoints import TINY, write_checkpoint

POISON = 50  # a sequence that holds this token gets logits that are not finite
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=1, max_tokens=8, ignore_eos=True),
    SamplingParams(
        temperature=1.0, seed=1, top_k=5, top_p=0.9, min_p=0.01, max_tokens=8, ignore_eos=True
    ),
    SamplingParams(
        temperature=0.0, max_tokens=8, ignore_eos=True, repetition_penalty=1.2, logprobs=2
    ),
]


class Poisoned(Qwen3ForCausalLM):
    """Rows of logits turn bad in a step that reads the token POISON."""

    bad = float("nan")

    def forward(self, token_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        hidden = super().forward(token_ids, *args)
        return torch.where((token_ids == POISON)[:, None], self.bad, hidden)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("nan"), **TINY)


def make(path: Path, **options: Any) -> LLM:
    fixed = {"device": "cpu", "skip_tokenizer_init": True, "num_kv_blocks": 32, "block_size": 4}
    return LLM(path, **fixed, model_cls=Poisoned, **options)


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "one-step-late"])
@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "sampled", "filtered", "edited"])
def test_only_the_request_with_bad_logits_ends(
    path: Path, params: SamplingParams, late: bool
) -> None:
    good, bad = [[1, 2, 3, 4, 5], [7, 8]], [1, 2, 3, 4, POISON]
    expected = [o.outputs[0].token_ids for o in make(path).generate(good, params, use_tqdm=False)]
    llm = make(path, async_scheduling=late)
    for _ in range(2):  # what it has computed is not taken from the prefix cache afterwards
        outputs = llm.generate([good[0], bad, good[1]], params, use_tqdm=False)
        assert [outputs[0].outputs[0].token_ids, outputs[2].outputs[0].token_ids] == expected
        assert outputs[1].outputs[0].finish_reason == "error"
        assert outputs[1].outputs[0].token_ids == []
        assert isinstance(outputs[1].error, InvalidLogitsError)
    assert llm.metrics().num_used_kv_blocks == 0
    llm.llm_engine.scheduler.check()


def test_alone_it_raises_and_in_a_stream_it_is_said(path: Path) -> None:
    llm = make(path)
    with pytest.raises(InvalidLogitsError, match="bfloat16"):
        llm.generate([1, POISON], PARAMS[0], use_tqdm=False)
    pieces = list(llm.stream([[1, POISON], [1, 2]], PARAMS[0]))
    [end] = [piece for piece in pieces if piece.finish_reason == "error"]
    assert end.prompt_index == 0
    assert isinstance(end.error, InvalidLogitsError)
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["error", "length"]


def test_all_completions_of_the_request_end(path: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=8)
    [output, other] = make(path).generate([[1, POISON], [1, 2]], params, use_tqdm=False)
    assert {c.finish_reason for c in output.outputs} == {"error"}
    assert {c.finish_reason for c in other.outputs} == {"length"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kernel", [sample_reference, sample], ids=["reference", "triton"])
def test_the_kernels_say_not_a_token(kernel: Any, bad: float) -> None:
    if kernel is sample:
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() and kernel is sample else "cpu"
    torch.manual_seed(0)
    logits = torch.randn(6, 5000, device=device)
    if bad == float("-inf"):  # nothing is left to choose
        logits[1] = logits[4] = bad
    else:
        logits[1, 4500] = logits[4, 7] = bad
    temperature = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], device=device)
    seeds, positions = torch.arange(6, device=device), torch.full((6,), 9, device=device)
    for asked in (
        (None,) * 3,
        (torch.full((6,), 40, dtype=torch.int32, device=device), None, None),
    ):
        token_ids = kernel(logits, temperature, *asked, seeds, positions).tolist()
        assert [t == NOT_A_TOKEN for t in token_ids] == [False, True, False, False, True, False]
    greedy = kernel(logits, None, None, None, None, None, None).tolist()
    assert [t == NOT_A_TOKEN for t in greedy] == [False, True, False, False, True, False]
