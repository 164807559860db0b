"""Score the bundled model: held-out stories, unseen glossary questions, long pages, small tasks.

    python -m minivllm.bundled.training.evaluate

The measurements:

- **stories**: 200 requests, sampled at temperature 0.7 with a fixed seed. No training story joins
  the (character, object) pair of a request. A story counts when it names the character's kind and
  the whole object ("silver key") and ends by itself. Names, kinds and objects are replaced before
  two stories are compared; the two share a run when any 20 consecutive tokens are the same.
- **glossary**: questions whose author had not seen the corpus, answered greedily. An answer is
  right when it shows the key facts of the asked term, and when this term's reference answers are
  the closest ones among all 58.
- **overlap**: the corpus cannot contain any of these questions (upper and lower case, spaces and
  punctuation are ignored).
- **positions**: loss by position on documents with seeds that training does not use.
- **tasks**: counting, sorting, sums and similar tasks, greedily, by exact match.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.bundled.training import corpus, glossary, stories
from minivllm.bundled.training.corpus import Message, render_chat

DEFAULT_PARAPHRASES = Path("tests/data/glossary_paraphrases.json")
STORY_TEMPERATURE = 0.7
SHARED_RUN = 20
BUCKET = 512


@dataclass(frozen=True)
class Bundle:
    model: PreTrainedModel
    tokenizer: Tokenizer
    ends: frozenset[int]

    @property
    def device(self) -> torch.device:
        return self.model.device


@dataclass(frozen=True)
class Generated:
    text: str
    #: The text ended by itself, before the limit.
    ended: bool


def load(path: Path = BUNDLED_MODEL_PATH, dtype: torch.dtype = torch.float32) -> Bundle:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    ends = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return Bundle(model, Tokenizer.from_file(str(path / "tokenizer.json")), frozenset(ends))


@torch.inference_mode()
def generate(
    bundle: Bundle,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 100,
) -> list[Generated]:
    """Continue each prompt with transformers' `generate`, in batches padded on the left."""
    results: list[Generated] = []
    padding = bundle.tokenizer.token_to_id(corpus.END_OF_TEXT)
    torch.manual_seed(seed)
    for start in range(0, len(prompts), batch):
        encoded = [
            bundle.tokenizer.encode(p, add_special_tokens=False).ids
            for p in prompts[start : start + batch]
        ]
        width = max(map(len, encoded))
        ids = torch.tensor(
            [[padding] * (width - len(e)) + e for e in encoded], device=bundle.device
        )
        mask = torch.tensor(
            [[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=bundle.device
        )
        sampling: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        output = bundle.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            eos_token_id=sorted(bundle.ends),
            **sampling,
        )[:, width:].tolist()
        for row in output:
            end = next((i for i, token in enumerate(row) if token in bundle.ends), None)
            results.append(Generated(bundle.tokenizer.decode(row[:end]), end is not None))
    return results


def user_prompt(question: str) -> str:
    return render_chat([Message("user", question)], add_generation_prompt=True)


# --- stories --------------------------------------------------------------------------------------

_NAMES = re.compile(r"\b(?:" + "|".join(sorted(stories.NAMES, key=len, reverse=True)) + r")\b")
_KINDS = re.compile(r"\b(?:" + "|".join(sorted(stories.KINDS, key=len, reverse=True)) + r")\b")


def anonymous(text: str, cast: stories.Cast) -> str:
    """The story with object, names and kinds replaced, so that only the wording is compared."""
    text = text.replace(cast.thing.phrase, "OBJECT").replace(cast.thing.noun, "OBJECT")
    return _KINDS.sub("KIND", _NAMES.sub("NAME", text))


def share_of_pairs_with_a_common_run(
    tokenizer: Tokenizer, texts: Sequence[str], run: int = SHARED_RUN
) -> float:
    """The share of all pairs of texts that have `run` consecutive tokens in common."""
    where: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for at in range(len(ids) - run + 1):
            where[tuple(ids[at : at + run])].add(index)
    pairs = {(a, b) for owners in where.values() for a in owners for b in owners if a < b}
    return len(pairs) / (len(texts) * (len(texts) - 1) / 2)


def names_both(text: str, cast: stories.Cast) -> bool:
    lower = text.lower()
    return cast.thing.phrase in lower and re.search(rf"\b{cast.hero.kind}\b", lower) is not None


def score_stories(
    bundle: Bundle, count: int = 200, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    requests = corpus.held_out_requests(count)
    texts = generate(
        bundle, [user_prompt(r.prompt) for r in requests], 512, STORY_TEMPERATURE, seed
    )
    good = [g.ended and names_both(g.text, r.cast) for g, r in zip(texts, requests, strict=True)]
    named = [
        r.cast.hero.name in g.text
        for g, r in zip(texts, requests, strict=True)
        if r.cast.hero.name in r.prompt
    ]
    summary = {
        "requests": count,
        "temperature": STORY_TEMPERATURE,
        "seed": seed,
        "both_named_and_ended": sum(good) / count,
        "ended": sum(g.ended for g in texts) / count,
        "requested_name_used": sum(named) / max(1, len(named)),
        "distinct_texts": len({g.text for g in texts}),
        f"pairs_sharing_{SHARED_RUN}_tokens": share_of_pairs_with_a_common_run(
            bundle.tokenizer,
            [anonymous(g.text, r.cast) for g, r in zip(texts, requests, strict=True)],
        ),
        "mean_tokens": sum(len(bundle.tokenizer.encode(g.text).ids) for g in texts) / count,
    }
    details = [
        {"prompt": r.prompt, "text": g.text, "ended": g.ended, "good": ok}
        for r, g, ok in zip(requests, texts, good, strict=True)
    ]
    return summary, details


# --- glossary -------------------------------------------------------------------------------------


def score_glossary(
    bundle: Bundle, questions: Sequence[dict[str, str]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the answers to glossary questions.

    questions: a list of {"question", "term"}.
    """
    answers = generate(bundle, [user_prompt(q["question"]) for q in questions], 160)
    details = []
    for question, answer in zip(questions, answers, strict=True):
        term = question["term"]
        details.append(
            {
                **question,
                "answer": answer.text,
                "key_facts": glossary.has_key_facts(glossary.BY_TERM[term], answer.text),
                "closest": glossary.closest_term(answer.text),
                "right": answer.ended and glossary.answer_is_right(term, answer.text),
            }
        )
    right = sum(bool(d["right"]) for d in details)
    return {
        "questions": len(details),
        "right": right,
        "share_right": right / max(1, len(details)),
    }, details


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def score_overlap(questions: Sequence[dict[str, str]], excluded: frozenset[str]) -> dict[str, Any]:
    """Count the questions that the corpus can contain, with and without the exclusion.

    Also measure the share of words that a question has in common with the nearest one in the bank.
    """
    normalised = [glossary.normalise(q["question"]) for q in questions]
    emitted = {glossary.normalise(q) for q in corpus.all_glossary_questions(excluded)}
    unfiltered = {glossary.normalise(q) for q in corpus.all_glossary_questions()}
    nearest = []
    for question in questions:
        words = _words(question["question"])
        bank = glossary.question_bank(question["term"], excluded=excluded)
        nearest.append(max(len(words & other) / len(words | other) for other in map(_words, bank)))
    return {
        "questions_in_corpus": len(emitted),
        "exact_overlap": sum(key in emitted for key in normalised),
        "exact_overlap_had_they_not_been_excluded": sum(key in unfiltered for key in normalised),
        "nearest_word_overlap_median": float(np.median(nearest)),
        "nearest_word_overlap_max": max(nearest),
    }


# --- long pages -----------------------------------------------------------------------------------


@torch.inference_mode()
def score_positions(bundle: Bundle, count: int = 48) -> dict[str, Any]:
    """The mean loss of the trained tokens by position, on documents with fresh seeds.

    Long documents and packed rows are measured separately.
    """
    from minivllm.bundled.training import train

    padding = bundle.tokenizer.token_to_id(corpus.END_OF_TEXT)
    long_rows = np.full((count, train.ROW_LENGTH), padding | train.NOT_TRAINED, dtype=np.uint16)
    for row, document in zip(long_rows, corpus.long_documents("evaluation"), strict=False):
        piece = train.encode(bundle.tokenizer, document)
        row[: len(piece)] = piece
    stream = (
        train.encode(bundle.tokenizer, document) for document in corpus.documents("evaluation")
    )
    packed_rows = train.pack(stream, count, padding)
    result: dict[str, Any] = {}
    for name, rows in (("long documents", long_rows), ("packed rows", packed_rows)):
        sums, counts = np.zeros(train.ROW_LENGTH), np.zeros(train.ROW_LENGTH)
        for start in range(0, count, 4):
            ids, labels = train.to_batch(rows[start : start + 4], bundle.device)
            logits = bundle.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
            )
            sums[1:] += loss.view(len(ids), -1).sum(0).double().cpu().numpy()
            counts[1:] += (labels[:, 1:] >= 0).sum(0).cpu().numpy()
        result[name] = {
            f"{low}-{low + BUCKET}": round(
                float(sums[low : low + BUCKET].sum() / counts[low : low + BUCKET].sum()), 3
            )
            for low in range(0, train.ROW_LENGTH, BUCKET)
        }
    return result


# --- tasks ----------------------------------------------------------------------------------------


def score_tasks(bundle: Bundle, count: int = 60) -> dict[str, float]:
    """The share of exact matches for each kind of small task.

    One more kind is a question about a story earlier in the chat.
    """
    result: dict[str, float] = {}
    for task, _ in corpus.TASKS:
        rng = random.Random(f"evaluation {task.__name__}")
        exchanges = [task(rng) for _ in range(count)]
        answers = generate(bundle, [user_prompt(question) for question, _ in exchanges], 120)
        right = sum(
            a.ended and a.text == expected
            for a, (_, expected) in zip(answers, exchanges, strict=True)
        )
        result[task.__name__.removesuffix("_task")] = right / count
    rng = random.Random("evaluation follow-up")
    prompts, things = [], []
    for _ in range(count):
        cast = stories.draw_cast(rng)
        messages = [
            Message("user", stories.write_request(rng, cast)),
            Message("assistant", stories.write_story(rng, cast).text),
            Message("user", "What was the object in that story?"),
        ]
        prompts.append(render_chat(messages, add_generation_prompt=True))
        things.append(cast.thing.phrase)
    answers = generate(bundle, prompts, 40)
    result["follow-up"] = (
        sum(thing in a.text for a, thing in zip(answers, things, strict=True)) / count
    )
    return result


# --- everything -----------------------------------------------------------------------------------


def evaluate(
    path: Path, paraphrases: Path | None, num_stories: int = 200, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All scores, and the texts that they are about."""
    bundle = load(path, dtype)
    began = time.monotonic()
    scores: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bundle.device.type == "cuda" else "CPU"
    }
    scores["stories"], story_details = score_stories(bundle, num_stories)
    details: dict[str, Any] = {"stories": story_details}
    if paraphrases is not None:
        from minivllm.bundled.training.train import read_excluded

        questions = json.loads(paraphrases.read_text(encoding="utf-8"))
        record = json.loads((path / "training_record.json").read_text(encoding="utf-8"))
        excluded = read_excluded(paraphrases)[0] if record["excluded_questions"] else frozenset()
        scores["glossary"], details["glossary"] = score_glossary(bundle, questions)
        scores["overlap"] = score_overlap(questions, excluded)
    scores["positions"] = score_positions(bundle)
    scores["tasks"] = score_tasks(bundle)
    scores["seconds"] = round(time.monotonic() - began)
    return scores, details


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=BUNDLED_MODEL_PATH, help="folder of the checkpoint"
    )
    parser.add_argument(
        "--paraphrases",
        type=Path,
        default=DEFAULT_PARAPHRASES,
        help="unseen glossary questions (JSON)",
    )
    parser.add_argument("--stories", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the scores here (JSON)")
    parser.add_argument("--details", type=Path, help="write every generated text here (JSON)")
    arguments = parser.parse_args()
    paraphrases = arguments.paraphrases if arguments.paraphrases.exists() else None
    if paraphrases is None:
        print(f"no {arguments.paraphrases}: the glossary is not scored")
    scores, details = evaluate(arguments.model, paraphrases, arguments.stories)
    print(json.dumps(scores, indent=2))
    for path, value in ((arguments.out, scores), (arguments.details, details)):
        if path:
            path.write_text(
                json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    main()
