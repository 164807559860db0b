"""A small model to sample from, and a textbook greedy decoding to compare with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivllm import LLM, RequestOutput, SamplingParams
from support.checkpoints import TransformersReference, write_checkpoint

VOCAB = 48
PROMPT = [3, 14, 15, 9, 26, 5]


def write_model(path: Path) -> Path:
    """Write a model with two layers and 48 tokens; at temperature 1 many tokens are likely."""
    return write_checkpoint(
        path,
        seed=3,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )


def make_llm(checkpoint: Path, **options: Any) -> LLM:
    return LLM(checkpoint, **{"device": "cpu", "block_size": 4, "num_kv_blocks": 1024, **options})


def generate(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens_of(llm: LLM, prompts: Any, params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in generate(llm, prompts, params)]


def decode_reference(
    reference: TransformersReference,
    prompt: list[int],
    params: SamplingParams,
    stop_ids: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Decode greedily like a textbook: one full forward pass per token.

    The edits of the logits are computed from the token ids alone. bad_words: those of params as
    token ids. A word's last token is banned after its first tokens, as vLLM documents it.
    """
    output: list[int] = []
    stop_ids = {*stop_ids, *(params.stop_token_ids or ())}
    while len(output) < params.max_tokens:
        logits = reference.logits([*prompt, *output])[-1].double()
        for token in range(len(logits)):
            if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
                logits[token] = -math.inf
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        if len(output) < params.min_tokens:
            for token in stop_ids:
                logits[token] = -math.inf
        for *begin, last in bad_words:
            if len(output) >= len(begin) and output[len(output) - len(begin) :] == begin:
                logits[last] = -math.inf
        counts = Counter(output)
        for token in range(len(logits)):
            if token in counts or token in prompt:
                logits[token] *= (
                    params.repetition_penalty
                    if logits[token] <= 0
                    else 1 / params.repetition_penalty
                )
            logits[token] -= params.frequency_penalty * counts[token] + params.presence_penalty * (
                token in counts
            )
        output.append(int(logits.argmax()))
        if output[-1] in stop_ids and len(output) >= params.min_tokens:
            break
    return output
