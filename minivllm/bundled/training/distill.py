"""Distil a draft for speculative decoding from the bundled model, and measure what it is worth.

    python -m minivllm.bundled.training.distill --out DIR --minutes 5

The draft has the tokenizer of the bundled model, two layers of width 128 and 0.66 million
parameters: 1.3 MB in bfloat16 (with `--layers 1` 0.46 million and 0.9 MB). On one busy EPYC core a
step of two layers took 2.5 ms of CPU time, of one layer 1.9 ms, and of the bundled model 8 ms: most
of it is spent on calls, not on arithmetic.

The draft learns the distribution of the bundled model at every token that the corpus trains on
(Hinton et al., 2015, arXiv 1503.02531), from text that no model has seen. The loss is the
Kullback-Leibler divergence from the bundled model to the draft, in nats.

The measurement: the bundled model writes stories for held-out requests. A proposal is accepted if
all proposals before it are, and if it is the token of the story; so the draft's own choices at each
position of a story say what a step accepts, without an engine. At a temperature the draft draws
with the story's random number, as the engine does (`engine/draft_model.py`).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.bundled.training import corpus, evaluate, glossary, train

log = logging.getLogger("minivllm.bundled.training.distill")

ARCHITECTURE: dict[str, Any] = train.ARCHITECTURE | {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
}
#: Proposals per step in the measurement.
NUM_SPECULATIVE_TOKENS = 4
#: Tokens of a story at most.
STORY_TOKENS = 300


def divergence_from(teacher: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """The loss of a student: its divergence from the teacher, mean over the trained tokens."""

    def loss(student: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float()
        got = student(input_ids=ids, use_cache=False).logits[:, :-1].float()
        per_token = F.kl_div(
            got.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        trained = labels[:, 1:] != train.IGNORED_LABEL
        return (per_token * trained).sum() / trained.sum()

    return loss


def distil(arguments: argparse.Namespace) -> None:
    """Train the draft, and save it with the tokenizer's files and a record of the training."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED_MODEL_PATH / name, out / name)
    began = time.monotonic()
    excluded, record_excluded = train.read_excluded(arguments.exclude_questions)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    special = {
        "pad": tokenizer.token_to_id(corpus.END_OF_TEXT),
        "eos": tokenizer.token_to_id(corpus.TURN_END),
    }
    for term in glossary.TERMS:
        glossary.question_bank(term, excluded=excluded)
    job = (tokenizer.to_str(), excluded, arguments.rows_per_shard)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(arguments.workers, train.start_worker, job) as pool:
        shards = pool.imap(train.make_shard, range(arguments.shards))
        stream = train.batches(shards, arguments.batch_rows)
        first = next(stream)
        teacher = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL_PATH, dtype=torch.float32)
        teacher = teacher.to(device).eval().requires_grad_(False)
        architecture = ARCHITECTURE | {"num_hidden_layers": arguments.layers}
        student = train.new_model(arguments.seed, special, architecture).to(device).train()
        trainer = train.Trainer(student, device, arguments, divergence_from(teacher))
        trainer.warm_up(first)
        num_parameters = sum(p.numel() for p in student.parameters())
        log.info("%d parameters; first step after %.0f s", num_parameters, time.monotonic() - began)
        trainer.run(stream)
    train.save_model(student, out, special, architecture)
    record = {
        **train.where_and_when(device),
        "teacher": BUNDLED_MODEL_PATH.name,
        "parameters": num_parameters,
        "steps": trainer.num_steps,
        "tokens": trainer.num_steps * arguments.batch_rows * train.ROW_LENGTH,
        "training_seconds": round(trainer.seconds),
        "final_divergence": trainer.history[-1]["loss"] if trainer.history else None,
        "settings": {
            name: getattr(arguments, name)
            for name in train.RECORDED_SETTINGS
            if name != "tokenizer_documents"
        },
        "excluded_questions": record_excluded,
        "history": trainer.history[:: max(1, len(trainer.history) // 40)],
    }
    train.write_json(out / "training_record.json", record)


# --- what it is worth -----------------------------------------------------------------------------


def accepted_per_step(agrees: Sequence[bool], count: int = NUM_SPECULATIVE_TOKENS) -> list[int]:
    """How many of `count` proposals each step accepts.

    agrees: for each token of a text whether the draft, after the tokens before it, proposes it.
    """
    steps, place = [], 0
    # The step that ends the text has fewer proposals, so it is left out.
    while place + count < len(agrees):
        run = 0
        while run < count and agrees[place + run]:
            run += 1
        steps.append(run)
        place += run + 1
    return steps


def draw(logits: torch.Tensor, temperature: float, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens [T] from logits [T, V]: uniform numbers [T] through the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    running = (logits / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(running, numbers[:, None]).clamp_max(logits.shape[1] - 1)[:, 0]


@torch.inference_mode()
def agreement(
    teacher: evaluate.Bundle, draft: evaluate.Bundle, prompt: str, temperature: float, seed: int
) -> list[bool]:
    """Write a text with the teacher; for each of its tokens, whether the draft proposes it."""
    ids = teacher.tokenizer.encode(prompt, add_special_tokens=False).ids
    start = len(ids)
    numbers = torch.rand(STORY_TOKENS, generator=torch.Generator().manual_seed(seed))
    cache = None
    while len(ids) < start + STORY_TOKENS and not (len(ids) > start and ids[-1] in teacher.ends):
        new = torch.tensor([ids if cache is None else ids[-1:]], device=teacher.device)
        found = teacher.model(input_ids=new, past_key_values=cache, use_cache=True)
        cache, place = found.past_key_values, len(ids) - start
        logits = found.logits[0, -1:].float().cpu()
        ids.append(int(draw(logits, temperature, numbers[place : place + 1])))
    known = torch.tensor([ids[:-1]], device=draft.device)
    logits = draft.model(input_ids=known, use_cache=False).logits[0, start - 1 :].float().cpu()
    proposed = draw(logits, temperature, numbers[: len(logits)]).tolist()
    return [a == b for a, b in zip(proposed, ids[start:], strict=True)]


def measure(path: Path, num_stories: int = 50) -> dict[str, Any]:
    """Acceptance of the draft in a directory, at the temperatures 0 and 0.7."""
    teacher, draft = evaluate.load(), evaluate.load(path)
    requests = corpus.held_out_requests(num_stories)
    scores: dict[str, Any] = {"num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
    for temperature in (0.0, 0.7):
        texts = [
            agreement(teacher, draft, evaluate.user_prompt(request.prompt), temperature, seed)
            for seed, request in enumerate(requests)
        ]
        steps = [count for agrees in texts for count in accepted_per_step(agrees)]
        scores[f"stories, temperature {temperature}"] = {
            "texts": len(texts),
            "steps": len(steps),
            "share_accepted": round(sum(steps) / (NUM_SPECULATIVE_TOKENS * len(steps)), 3),
            "tokens_per_step": round(1 + sum(steps) / len(steps), 2),
            "accepted_per_position": [
                round(sum(count > place for count in steps) / len(steps), 3)
                for place in range(NUM_SPECULATIVE_TOKENS)
            ],
        }
    return scores


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = train.argument_parser(__doc__)
    parser.add_argument("--layers", type=int, default=2, help="layers of the draft")
    parser.add_argument("--stories", type=int, default=50, help="texts of the measurement")
    parser.add_argument(
        "--only-measure", action="store_true", help="do not train; measure the draft in --out"
    )
    arguments = parser.parse_args()
    if not arguments.only_measure:
        distil(arguments)
    scores = measure(arguments.out, arguments.stories)
    print(json.dumps(scores, indent=2))
    train.write_json(arguments.out / "evaluation.json", scores)


if __name__ == "__main__":
    main()
