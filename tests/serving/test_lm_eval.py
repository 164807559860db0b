"""lm-evaluation-harness scores the model through the server as it scores the checkpoint itself.

lm-eval is heavy, so it is in no extra: CONTRIBUTING.md says how to run these tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import minivllm
from support.servers import Running, server

lm_eval = pytest.importorskip("lm_eval", reason="needs: pip install 'lm-eval[api]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BUNDLED = str(Path(minivllm.__file__).parent / "bundled")

#: A generation task, and a loglikelihood task: YAML as lm-eval's users write it.
SUMS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/sums.json"}}
test_split: test
output_type: generate_until
doc_to_text: "<|im_start|>user\\nWhat is {{a}} plus {{b}}?<|im_end|>\\n<|im_start|>assistant\\n"
doc_to_target: "{{a}} + {{b}} = {{a + b}}"
generation_kwargs: {until: [".", "<|im_end|>"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
MEANINGS = """
task: meanings
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/meanings.json"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
#: The sums without the template of a chat: the server, or lm-eval, puts it around them.
CHATS = """
include: sums.yaml
task: chats
doc_to_text: "What is {{a}} plus {{b}}?"
"""
#: A rolling loglikelihood: the whole text, from its first token on.
STORIES = """
task: stories
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/stories.json"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
ANSWERS = [" a pig named", " of the same", " the", " \U0001f98a", ".\n", " step which requests run"]
BEGINNINGS = [
    "Once upon a time there was",
    "Prefix caching means that the blocks",
    "Mabel the pig said to",
    "A scheduler takes every",
]
NAMES = ["sums", "meanings", "stories"]


@dataclass
class Scores:
    """What an evaluation found: the numbers of each task, and the model's answer to each ask."""

    results: dict[str, dict[str, Any]]
    answers: dict[str, list[Any]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows: dict[str, list[dict[str, Any]]] = {
        "sums": [{"a": a, "b": b} for a in (2, 7, 38, 951) for b in (3, 6, 47)],
        "meanings": [
            {"text": text, "choices": ANSWERS, "answer": number % len(ANSWERS)}
            for number, text in enumerate(BEGINNINGS)
        ],
        "stories": [{"text": f"{text} it. The end."} for text in BEGINNINGS],
    }
    for name, found in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    for name, text in zip([*NAMES, "chats"], (SUMS, MEANINGS, STORIES, CHATS), strict=True):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", folder.as_posix()))
    return folder


def evaluate(
    tasks: Path, backend: str, names: list[str] = NAMES, in_chat: bool = False, **arguments: Any
) -> Scores:
    """in_chat: each question becomes a message of a chat."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=names,
        apply_chat_template=in_chat,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    answers = {}
    for name, samples in found["samples"].items():
        samples.sort(key=lambda sample: sample["doc_id"])
        answers[name] = [sample["filtered_resps"] for sample in samples]
    return Scores(found["results"], answers)


@pytest.fixture(scope="module")
def expected(tasks: Path) -> Scores:
    """The scores of the checkpoint in transformers."""
    return evaluate(tasks, "hf", pretrained=BUNDLED, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server(dtype="float32") as running:
        yield running


def same(found: Any, expected: Any) -> bool:
    """Equal, with numbers up to rounding."""
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-3)
    return bool(found == expected)


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer_backend": "huggingface", "tokenizer": BUNDLED, "batch_size": 8},
        {"tokenizer_backend": "huggingface", "tokenizer": BUNDLED, "num_concurrent": 4},
        {"tokenizer_backend": "huggingface", "tokenizer": BUNDLED, "tokenized_requests": False},
        {"tokenizer_backend": "auto"},
    ],
    ids=["batches of ids", "at once", "texts", "the server's tokenizer"],
)
def test_the_scores_are_those_of_transformers(
    tasks: Path, expected: Scores, running: Running, options: dict[str, Any]
) -> None:
    found = evaluate(
        tasks,
        "local-completions",
        model="bundled",
        base_url=f"{running.address}/v1/completions",
        **options,
    )
    for name in NAMES:
        assert same(found.answers[name], expected.answers[name]), name
        scores = expected.results[name]
        numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
        assert numbers
        for key, value in numbers.items():
            assert same(found.results[name][key], value), (name, key)
    assert 0 < expected.results["sums"]["exact_match,none"] < 1
    greedy = [bool(best) for asks in expected.answers["meanings"] for _, best in asks]
    assert 0 < sum(greedy) < len(greedy)
    assert running.is_idle()


@pytest.mark.parametrize(
    ("backend", "path", "options"),
    [
        ("local-chat-completions", "chat/completions", {"num_concurrent": 4}),
        (
            "local-completions",
            "completions",
            {"tokenizer_backend": "huggingface", "tokenizer": BUNDLED},
        ),
    ],
    ids=["the server's API", "transformers"],
)
def test_chats(
    tasks: Path, expected: Scores, running: Running, backend: str, path: str, options: dict
) -> None:
    """Whoever applies the chat's template, the answers are the same."""
    url = f"{running.address}/v1/{path}"
    found = evaluate(tasks, backend, ["chats"], True, model="bundled", base_url=url, **options)
    assert found.answers["chats"] == expected.answers["sums"]
