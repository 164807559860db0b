"""A real, trained model: SmolLM2-135M-Instruct answers as in transformers. `make test-real-weights`
runs this.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import pytest
import torch

from minivllm import LLM
from minivllm.models.loader import load_config
from support.checkpoints import TransformersReference
from support.parity import RecordedLLM, Report, assert_same_greedy, greedy
from support.real_weights import smollm2

pytestmark = [pytest.mark.real_weights, pytest.mark.timeout(1200)]
NUM_TOKENS = 40
USER = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a KV cache is in one paragraph.",
    "How many days are there in a leap year, and why?",
    "Give me three tips for sleeping better.",
    "Translate 'good morning' into Spanish, French and German.",
    "What is 17 + 25?",
    "List the planets of the solar system in order.",
    "Tell me a joke about computers.",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "Summarise the plot of Cinderella.",
    "Why is the sky blue?",
    "What should I cook with eggs, tomatoes and rice?",
    "Describe a forest in winter.",
    "Name a fruit for each letter from A to E.",
    "Ünïcödé, 日本語 and 🙂: which of these are words?",
]
CONVERSATIONS = [
    *[[{"role": "user", "content": text}] for text in USER],
    [
        {"role": "system", "content": "You answer in the voice of a pirate."},
        {"role": "user", "content": "Where did you hide the treasure?"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [
        {
            "role": "user",
            "content": "Continue this list: " + ", ".join(str(n * n) for n in range(1, 60)),
        }
    ],
]


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def reference(path: Path) -> TransformersReference:
    return TransformersReference(path, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_same_answers_as_transformers(
    path: Path, reference: TransformersReference, backend: str
) -> None:
    """20 conversations at once, with chunks, mixed steps, preemption and (the system prompt) prefix
    hits.
    """
    from transformers import AutoTokenizer

    config = load_config(path)
    assert (config.architecture, config.num_hidden_layers, config.tie_word_embeddings) == (
        "LlamaForCausalLM",
        30,
        True,
    )
    assert config.num_attention_heads // config.num_key_value_heads == 3
    llm = RecordedLLM(
        path,
        attention_backend=backend,
        skip_tokenizer_init=False,
        max_model_len=512,
        block_size=16,
        num_kv_blocks=72,
        max_num_batched_tokens=128,
    )
    outputs = llm.chat(CONVERSATIONS, greedy(NUM_TOKENS, ignore_eos=False), use_tqdm=False)
    assert len(outputs) == 20

    tokenizer = AutoTokenizer.from_pretrained(path)
    for messages, output in zip(CONVERSATIONS, outputs, strict=True):
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert output.prompt_token_ids == tokenizer.encode(rendered, add_special_tokens=False)
        [answer] = output.outputs
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        ended = answer.token_ids[-1] in config.eos_token_ids
        assert answer.finish_reason == ("stop" if ended else "length")
        assert ended or len(answer.token_ids) == NUM_TOKENS
    assert "Paris" in outputs[0].outputs[0].text
    assert {o.outputs[0].finish_reason for o in outputs} == {"stop", "length"}

    metrics = llm.metrics()
    assert metrics.prefix_cache_hits > 0
    assert metrics.num_mixed_steps > 0
    assert metrics.num_chunks > 0
    assert metrics.num_preemptions > 0
    report = Report()
    assert_same_greedy(
        reference, llm.completions(), NUM_TOKENS, partial=True, min_distinct=1, report=report
    )
    distinct = [len(set(c.token_ids)) for c in llm.completions()]
    assert sorted(distinct)[len(distinct) // 2] >= 20
    print(
        f"{report.num_tokens} tokens, {report.differences=}, logit error {report.max_error:.1e} of"
        " their deviation"
    )


COPIED = (
    "The old harbour was quiet in the early morning. Three grey boats lay at the pier, and their"
    " colours had faded in the sun. A fisherman mended his nets and hummed a tune that his"
    " neighbour had taught him. When the bell of the theatre rang, he folded the nets, put on his"
    " coat and walked slowly up the hill to the centre of the town."
)


def test_prompt_lookup_on_a_text_to_edit(path: Path) -> None:
    """The answer repeats the prompt: the same tokens, in far fewer steps. Speed is printed: both
    engines run in turn. (This small model copies; it does not do the edit.)
    """
    asked = f"Copy this text, but write 'harbor' instead of 'harbour':\n\n{COPIED}"
    chat, params = [{"role": "user", "content": asked}], greedy(96, ignore_eos=False)
    lookup = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    lookup["num_speculative_tokens"] = 8
    engines = [LLM(path, max_model_len=512, speculative_config=how) for how in (None, lookup)]
    rates: list[list[float]] = [[], []]
    for _ in range(3):
        said = []
        for llm, found in zip(engines, rates, strict=True):
            llm.reset_prefix_cache()
            start = time.perf_counter()
            [output] = llm.chat(chat, params, use_tqdm=False)
            said.append(output.outputs[0].token_ids)
            found.append(len(said[-1]) / (time.perf_counter() - start))
        assert said[0] == said[1]
        assert len(said[0]) > 60
    metrics = engines[1].metrics()
    plain, other = (statistics.median(found[1:]) for found in rates)
    print(
        f"\nprompt lookup: {other:.1f} tokens/s beside {plain:.1f} ({other / plain:.2f} x);"
        f" {metrics.num_accepted_tokens} of {metrics.num_draft_tokens} proposals accepted in"
        f" {metrics.num_drafts} steps"
    )
    assert metrics.num_accepted_tokens > 3 * metrics.num_drafts


def test_perplexity_of_a_quantized_cache(path: Path) -> None:
    """Within 1 % of the unquantized cache's, over documents of this project."""
    root = Path(__file__).parents[2]
    found = {}
    for kind in ("auto", "fp8", "int8"):
        llm = LLM(path, kv_cache_dtype=kind, max_model_len=512, num_kv_blocks=96, block_size=16)
        documents = [(root / name).read_text() for name in ("README.md", "ARCHITECTURE.md")]
        prompts = [llm.get_tokenizer().encode(text)[:400] for text in documents]
        outputs = llm.generate(prompts, greedy(1, prompt_logprobs=0), use_tqdm=False)
        scored = [
            (output.prompt_logprobs[position][token].logprob)
            for prompt, output in zip(prompts, outputs, strict=True)
            for position, token in enumerate(prompt)
            if position
        ]
        found[kind] = math.exp(-sum(scored) / len(scored))
        llm.close()
    for kind in ("fp8", "int8"):
        assert found[kind] == pytest.approx(found["auto"], rel=0.01), found
        assert found[kind] != found["auto"]
