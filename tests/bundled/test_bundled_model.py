"""The bundled model: its files, its corpus, and whether it still does what its card says.

The scores are those of `python -m minivllm.bundled.training.evaluate`, here with the thresholds
that a release must meet. Everything runs on a CPU with transformers alone, so a failure is the
model's and not the engine's.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.bundled.training import corpus, glossary, stories

MAX_BYTES = 13_000_000
PARAPHRASES = Path(__file__).parents[1] / "data" / "glossary_paraphrases.json"
# The first 500 documents of the first training shard. If this changes, the checkpoint is not of
# this corpus any more.
CORPUS_DIGEST = "8e557dd5c6d4cae96dbae198c3c8bc272a5d404be62e752597dbfd27d33d0952"
MESSAGES = [
    {"role": "system", "content": "Be kind. 🌟"},
    {"role": "user", "content": "Hi!\n\nWho are you?"},
    {"role": "assistant", "content": "A tiny model."},
    {"role": "user", "content": "  Un café, s'il vous plaît  "},
]


@pytest.fixture(scope="module")
def bundle():
    from minivllm.bundled.training.evaluate import load

    return load()


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    return json.loads(PARAPHRASES.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def excluded() -> frozenset[str]:
    from minivllm.bundled.training.train import read_excluded

    return read_excluded(PARAPHRASES)[0]


# --- files ---


def test_the_checkpoint_is_complete_and_small():
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    names |= {"training_record.json", "evaluation.json", "README.md"}
    assert names <= {path.name for path in BUNDLED_MODEL_PATH.iterdir()}
    assert (
        sum(path.stat().st_size for path in BUNDLED_MODEL_PATH.iterdir() if path.is_file())
        <= MAX_BYTES
    )


def test_the_configuration_exercises_what_an_engine_must_handle():
    config = json.loads((BUNDLED_MODEL_PATH / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["tie_word_embeddings"]
    assert config["max_position_embeddings"] == 2048
    ends = json.loads((BUNDLED_MODEL_PATH / "generation_config.json").read_text(encoding="utf-8"))[
        "eos_token_id"
    ]
    assert isinstance(ends, list)
    assert len(ends) == 2


def test_importing_the_corpus_needs_no_torch():
    code = (
        "import sys, minivllm.bundled.training.corpus; sys.exit('torch' in sys.modules or"
        " 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_auto_classes_of_transformers_load_it():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL_PATH)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL_PATH)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token == corpus.TURN_END


# --- tokenizer ---


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives_encode_and_decode(text: str):
    tokenizer = _tokenizer()
    assert (
        tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
        == text
    )


@pytest.mark.parametrize(
    "text",
    [
        "naïve café 👩‍👩‍👧 e\u0301",
        "  two  spaces\n\n\ttab\r\n",
        "こんにちは 世界",
        "¡Señor! 🦊🗝️",
        "a" * 500,
        "\x00\ufffd",
    ],
)
def test_multibyte_text_survives_transformers_too(text: str):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL_PATH)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids == _tokenizer().encode(text).ids


@pytest.mark.parametrize("count", range(1, len(MESSAGES) + 1))
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_chat_template_is_what_the_corpus_was_rendered_with(
    count: int, add_generation_prompt: bool
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL_PATH)
    rendered = tokenizer.apply_chat_template(
        MESSAGES[:count], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert rendered == corpus.render_chat(
        [corpus.Message(**m) for m in MESSAGES[:count]], add_generation_prompt
    )


def _tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(BUNDLED_MODEL_PATH / "tokenizer.json"))


# --- corpus ---


@pytest.mark.slow
def test_the_corpus_is_the_one_the_checkpoint_was_trained_on(excluded: frozenset[str]):
    digest = hashlib.sha256()
    for document in islice(corpus.documents("train 0", excluded), 500):
        digest.update(
            repr((document.kind, [tuple(segment) for segment in document.segments])).encode()
        )
    assert digest.hexdigest() == CORPUS_DIGEST


@pytest.mark.slow
def test_different_seeds_give_different_documents():
    first, again, other = (list(islice(corpus.documents(seed), 20)) for seed in ("a", "a", "b"))
    assert first == again
    assert first != other


@pytest.mark.slow
def test_encoding_by_segments_is_encoding_the_whole():
    """What the model is trained on is what an engine sees when it encodes a rendered chat in one
    go.
    """
    tokenizer = _tokenizer()
    for document in islice(corpus.documents("whole"), 300):
        parts = [
            id
            for s in document.segments
            for id in tokenizer.encode(s.text, add_special_tokens=False).ids
        ]
        assert parts == tokenizer.encode(document.text, add_special_tokens=False).ids


def test_one_pair_in_ten_is_held_out():
    pairs = [
        stories.pair_is_held_out(kind, noun) for kind in stories.KINDS for noun in stories.NOUNS
    ]
    assert 0.09 < sum(pairs) / len(pairs) < 0.11


@pytest.mark.slow
def test_no_training_story_joins_a_held_out_pair():
    """Looked for in the words of the text, not in what the generator says about it."""
    kinds, nouns = set(stories.KINDS), set(stories.NOUNS)
    seen = 0
    for document in islice(corpus.documents("held out"), 4000):
        if document.kind not in ("story chat", "story raw", "long story"):
            continue
        seen += 1
        for text in (segment.text for segment in document.segments if segment.trained):
            words = set(re.findall(r"\w+", text.lower()))
            joined = [
                (k, n)
                for k in words & kinds
                for n in words & nouns
                if stories.pair_is_held_out(k, n)
            ]
            assert not joined, f"{joined} in {text!r}"
    assert seen > 500


@pytest.mark.slow
def test_every_held_out_request_asks_for_a_held_out_pair():
    for prompt, cast in corpus.held_out_requests(200):
        assert stories.pair_is_held_out(cast.hero.kind, cast.thing.noun)
        assert cast.hero.kind in prompt
        assert cast.thing.phrase in prompt


@pytest.mark.parametrize("term", glossary.TERMS)
def test_the_scorer_accepts_every_reference_answer_and_no_other_terms(term: str):
    for answer in glossary.BY_TERM[term].answers:
        assert glossary.answer_is_right(term, answer)
        assert not any(
            glossary.answer_is_right(other, answer) for other in glossary.TERMS if other != term
        )


@pytest.mark.slow
def test_no_paraphrase_is_a_question_of_the_corpus(
    questions: list[dict[str, str]], excluded: frozenset[str]
):
    """Exact, not sampled: the banks hold every question that training can have used."""
    record = json.loads((BUNDLED_MODEL_PATH / "training_record.json").read_text(encoding="utf-8"))
    assert (
        record["excluded_questions"]["sha256"]
        == hashlib.sha256(PARAPHRASES.read_bytes()).hexdigest()
    )
    assert {q["term"] for q in questions} <= set(glossary.TERMS)
    emitted = {glossary.normalise(question) for question in corpus.all_glossary_questions(excluded)}
    assert not [q["question"] for q in questions if glossary.normalise(q["question"]) in emitted]


# --- what the model says ---


@pytest.mark.slow
def test_held_out_stories(bundle):
    from minivllm.bundled.training.evaluate import score_stories

    scores, _ = score_stories(bundle, 100)
    assert scores["both_named_and_ended"] >= 0.95
    assert scores["distinct_texts"] >= 75
    assert scores["pairs_sharing_20_tokens"] < 0.1


@pytest.mark.slow
def test_unseen_glossary_questions(bundle, questions: list[dict[str, str]]):
    from minivllm.bundled.training.evaluate import score_glossary

    scores, details = score_glossary(bundle, questions)
    assert scores["questions"] >= 60
    assert scores["share_right"] >= 0.85, [d for d in details if not d["right"]]


@pytest.mark.slow
def test_small_tasks(bundle):
    from minivllm.bundled.training.evaluate import score_tasks

    scores = score_tasks(bundle, 20)
    assert min(scores.values()) >= 0.8, scores


@pytest.mark.slow
def test_raw_text_is_continued_as_a_story(bundle):
    from minivllm.bundled.training.evaluate import generate

    story = generate(bundle, ["Once upon a time"], 400)[0]
    assert story.ended
    assert len(story.text.split()) > 50


@pytest.mark.slow
def test_long_pages_are_no_worse_than_short_ones(bundle):
    from minivllm.bundled.training.evaluate import score_positions

    for buckets in score_positions(bundle, 6).values():
        losses = list(buckets.values())
        assert losses[-1] < losses[0] + 0.15, buckets
