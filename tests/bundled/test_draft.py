"""The bundled draft: small, of the same tokenizer, and mostly right about what the model says."""

from __future__ import annotations

import json

from minivllm import LLM, SamplingParams
from minivllm.bundled import BUNDLED_DRAFT_PATH, BUNDLED_MODEL_PATH
from minivllm.bundled.training.corpus import held_out_requests

K = 4


def test_it_is_small_and_knows_the_same_tokens() -> None:
    files = [path for path in BUNDLED_DRAFT_PATH.iterdir() if path.is_file()]
    assert {"README.md", "config.json", "evaluation.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 1.5e6
    tokenizers = [folder / "tokenizer.json" for folder in (BUNDLED_DRAFT_PATH, BUNDLED_MODEL_PATH)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def test_what_its_card_says_is_what_was_measured() -> None:
    scores = json.loads((BUNDLED_DRAFT_PATH / "evaluation.json").read_text(encoding="utf-8"))
    record = json.loads((BUNDLED_DRAFT_PATH / "training_record.json").read_text(encoding="utf-8"))
    card = (BUNDLED_DRAFT_PATH / "README.md").read_text(encoding="utf-8")
    assert scores["num_speculative_tokens"] == K
    rows = {
        "stories, 0": "stories, temperature 0.0",
        "stories, 0.7": "stories, temperature 0.7",
        "answers about the glossary, 0": "glossary chat, temperature 0.0",
        "small tasks, 0": "task chat, temperature 0.0",
        "chats of several turns, 0": "chat of several turns, temperature 0.0",
    }
    for name, key in rows.items():
        assert f"| {name} | {100 * scores[key]['share_accepted']:.0f} % |" in card
    assert f"{record['parameters']:,} parameters" in card
    assert f"{record['written_texts']:,} texts" in card
    assert f"{record['steps']:,} steps" in card


def test_it_is_mostly_right_about_stories() -> None:
    """In the engine, on stories that no training has joined: the same text, in fewer steps."""
    temperatures = [0.0, 0.0, 0.7, 0.7]
    asked = [[{"role": "user", "content": r.prompt}] for r in held_out_requests(4, "draft test")]
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=100)
        for i, temperature in enumerate(temperatures)
    ]
    draft = {"method": "draft_model", "model": "draft", "num_speculative_tokens": K}
    said: list[list[list[int]]] = []
    for config in (None, draft):
        with LLM(device="cpu", speculative_config=config) as llm:
            outputs = llm.chat(asked, params, use_tqdm=False)
            said.append([output.outputs[0].token_ids for output in outputs])
    assert said[0] == said[1]
    for some in (outputs[:2], outputs[2:]):
        found = [output.metrics for output in some if output.metrics is not None]
        proposed = sum(metrics.num_draft_tokens for metrics in found)
        assert proposed > 100
        assert sum(metrics.num_accepted_tokens for metrics in found) >= 0.6 * proposed
