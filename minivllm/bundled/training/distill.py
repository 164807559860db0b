"""Distil drafts for speculative decoding from the bundled model, and measure what they are worth.

    python -m minivllm.bundled.training.distill --out DIR --minutes 4

A draft has the tokenizer of the bundled model and about 0.6 million parameters: 1.3 MB in bfloat16.
Drafts of several shapes are trained together, on the same batches, so that one run can
choose: `--shapes 1x160 2x128` are one layer of width 160, and two of width 128. Each gets a folder
of its own in DIR.

What a draft learns from: the distribution of the bundled model at every trained token (Hinton et
al., 2015, arXiv 1503.02531). Half of the batches are the corpus, in text that no model has seen.
The other half are texts that the bundled model itself has written, for prompts of the corpus, at
the temperatures 0, 0.7 and 1: a draft is judged on such texts, each at the start of a context. The
loss is the Kullback-Leibler divergence from the bundled model to the draft, in nats, plus the same
for both distributions at temperature 0.5. Both are least for the same draft; the second weighs what
is probable more, because texts are sampled at low temperatures.

The measurement: the bundled model writes stories for held-out requests, and answers for other
prompts. A proposal is accepted if all proposals before it are, and if it is the token of the text;
so the draft's own choices at each position of a text say what a step accepts, without an engine. At
a temperature the draft draws with the text's random number, as the engine does
(`engine/draft_model.py`).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.bundled.training import corpus, evaluate, glossary, train

log = logging.getLogger("minivllm.bundled.training.distill")

#: Proposals per step in the measurement.
NUM_SPECULATIVE_TOKENS = 4
#: Tokens of a prompt, and of the text that the bundled model writes for it, at most.
PROMPT_TOKENS, TEXT_TOKENS = 128, 256
#: The temperatures of the texts that a draft learns from.
TEMPERATURES = (0.0, 0.7, 1.0)
#: The temperature of the second divergence in the loss.
LOW_TEMPERATURE = 0.5
#: The share of stories among the prompts that the bundled model continues.
SHARE_OF_STORIES = 0.5


class Prompt(NamedTuple):
    kind: str
    ids: list[int]


def architecture(shape: str) -> dict[str, Any]:
    """The settings of a draft, from LAYERSxWIDTH."""
    layers, width = map(int, shape.split("x"))
    return train.ARCHITECTURE | {
        "hidden_size": width,
        "head_dim": 32,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
    }


# --- texts of the bundled model -------------------------------------------------------------------


def prompts(tokenizer: Tokenizer, seed: str, excluded: frozenset[str]) -> Iterator[Prompt]:
    """The beginnings of the corpus's chats, up to the first answer."""
    for document in corpus.documents(seed, excluded):
        first = next(i for i, segment in enumerate(document.segments) if segment.trained)
        text = "".join(segment.text for segment in document.segments[:first])
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if 0 < len(ids) <= PROMPT_TOKENS:
            yield Prompt(document.kind, ids)


def make_prompts(job: tuple[int, int]) -> list[list[int]]:
    """In a worker: so many prompts to continue, the same for the same index."""
    index, count = job
    stories, others = [], []
    worker, num_stories = train._WORKER, round(SHARE_OF_STORIES * count)
    for prompt in prompts(worker["tokenizer"], f"prompts {index}", worker["excluded"]):
        (stories if prompt.kind == "story chat" else others).append(prompt.ids)
        if len(stories) >= num_stories and len(others) >= count - num_stories:
            break
    return stories[:num_stories] + others[: count - num_stories]


def draw(logits: torch.Tensor, temperature: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens [N] from logits [N, V]: uniform numbers [N] through the cumulative distribution.

    temperature: [N]; 0 is the most probable token.
    """
    greedy = temperature == 0
    running = (logits / torch.where(greedy, 1.0, temperature)[:, None]).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(running, numbers[:, None]).clamp_max(logits.shape[1] - 1)[:, 0]
    return torch.where(greedy, logits.argmax(-1), drawn)


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    starts: Sequence[Sequence[int]],
    temperature: torch.Tensor,
    numbers: torch.Tensor,
    ends: frozenset[int],
) -> list[list[int]]:
    """Continue each start until a token of `ends`, which is kept. Returns the new tokens.

    temperature: [N]. numbers: [N, T] uniform random numbers, one for each token that is drawn.
    """
    device, lengths = model.device, [len(start) for start in starts]
    longest, count = max(lengths), numbers.shape[1]
    # Rows start together. Where a prompt is longer than the shortest one, its tokens take the place
    # of what is drawn, so there is no padding and no mask.
    known = torch.tensor([[*s, *[-1] * (longest - len(s))] for s in starts], device=device)
    known = F.pad(known, (0, count), value=-1)
    length, ending = torch.tensor(lengths, device=device), torch.tensor(sorted(ends), device=device)
    temperature, numbers = temperature.to(device), numbers.to(device)
    has_ended = torch.zeros(len(starts), dtype=torch.bool, device=device)
    new, cache = known[:, : min(lengths)], None
    for place in range(min(lengths), longest + count):
        found = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = found.past_key_values
        which = (place - length).clamp(0, count - 1)
        number = numbers.gather(1, which[:, None])[:, 0]
        token_ids = draw(found.logits[:, -1].float(), temperature, number)
        token_ids = torch.where(known[:, place] < 0, token_ids, known[:, place])
        known[:, place] = token_ids
        has_ended |= torch.isin(token_ids, ending) & (place >= length)
        # The GPU is waited for now and then only.
        if place % 16 == 15 and has_ended.all():
            break
        new = token_ids[:, None]
    texts = []
    for row, start in zip(known.tolist(), starts, strict=True):
        text = [token_id for token_id in row[len(start) :][:count] if token_id >= 0]
        end = next((i for i, token_id in enumerate(text) if token_id in ends), len(text))
        texts.append(text[: end + 1])
    return texts


def write_rows(
    teacher: PreTrainedModel, starts: list[list[int]], padding: int, seed: int
) -> np.ndarray:
    """Rows of one text each, as `train.pack` makes them: prompts, and what the teacher writes."""
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.tensor([TEMPERATURES[i % len(TEMPERATURES)] for i in range(len(starts))])
    numbers = torch.rand(len(starts), TEXT_TOKENS, generator=generator)
    ends = frozenset((padding, teacher.config.eos_token_id))
    texts = write(teacher, starts, temperature, numbers, ends)
    rows = np.full((len(starts), PROMPT_TOKENS + TEXT_TOKENS), padding | train.NOT_TRAINED)
    for row, start, text in zip(rows, starts, texts, strict=True):
        row[: len(start)] = np.array(start) | train.NOT_TRAINED
        row[len(start) : len(start) + len(text)] = text
    return rows.astype(np.uint16)


def mixed(
    fresh: Iterator[np.ndarray], written: np.ndarray, num_rows: int, seed: int
) -> Iterator[np.ndarray]:
    """A batch of the corpus, then num_rows rows of the written ones, and so on."""
    rng = np.random.default_rng(seed)
    for rows in fresh:
        yield rows
        yield written[rng.integers(len(written), size=num_rows)]


# --- the training ---------------------------------------------------------------------------------


def divergence(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence [...] of two distributions, given as logits [..., V]."""
    return F.kl_div(
        got.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def divergence_from(teacher: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """The losses [S] of S students: (students, ids [B, T], labels [B, T]) -> the sum of the
    divergences from the teacher at temperature 1 and at a low one, mean over the trained tokens.
    """

    def losses(
        students: torch.nn.ModuleList, ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float()
        trained = labels[:, 1:] != train.IGNORED_LABEL
        found = []
        for student in students:
            got = student(input_ids=ids, use_cache=False).logits[:, :-1].float()
            per_token = divergence(got, wanted) + divergence(
                got / LOW_TEMPERATURE, wanted / LOW_TEMPERATURE
            )
            found.append((per_token * trained).sum() / trained.sum())
        return torch.stack(found)

    return losses


@contextmanager
def workers(
    arguments: argparse.Namespace, tokenizer: Tokenizer, excluded: frozenset[str]
) -> Iterator[Any]:
    """Processes that draw from the corpus."""
    # The banks are built once, here: the workers are forked and share them.
    for term in glossary.TERMS:
        glossary.question_bank(term, excluded=excluded)
    job = (tokenizer.to_str(), excluded, arguments.rows_per_shard)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(arguments.workers, train.start_worker, job) as pool:
        yield pool


def load_teacher(device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    teacher = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL_PATH, dtype=dtype)
    return teacher.to(device).eval().requires_grad_(False)


def distil(arguments: argparse.Namespace) -> None:
    """Train the drafts, and save each with the tokenizer's files and a record of the training."""
    began = time.monotonic()
    # Every student is compiled for both kinds of batches.
    torch._dynamo.config.recompile_limit = 64
    excluded, record_excluded = train.read_excluded(arguments.exclude_questions)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(BUNDLED_MODEL_PATH / "tokenizer.json"))
    special = {
        "pad": tokenizer.token_to_id(corpus.END_OF_TEXT),
        "eos": tokenizer.token_to_id(corpus.TURN_END),
    }
    with workers(arguments, tokenizer, excluded) as pool:
        count = arguments.texts_per_round
        jobs = [(index, count) for index in range(arguments.rounds)]
        starts = pool.imap(make_prompts, jobs)
        shards = pool.imap(train.make_shard, range(arguments.shards))
        writer = load_teacher(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        written = np.concatenate(
            [write_rows(writer, some, special["pad"], seed) for seed, some in enumerate(starts)]
        )
        num_written = int((written < train.NOT_TRAINED).sum())
        log.info("%d tokens written after %.0f s", num_written, time.monotonic() - began)
        students = torch.nn.ModuleList(
            train.new_model(arguments.seed, special, architecture(shape))
            for shape in arguments.shapes
        )
        trainer = train.Trainer(
            students.to(device).train(),  # type: ignore[arg-type]
            device,
            arguments,
            divergence_from(load_teacher(device)),
        )
        num_rows = arguments.batch_rows * train.ROW_LENGTH // written.shape[1]
        fresh = train.batches(shards, arguments.batch_rows)
        stream = mixed(fresh, written, num_rows, arguments.seed)
        for _ in range(2):
            trainer.warm_up(next(stream))
        log.info("first step after %.0f s", time.monotonic() - began)
        trainer.run(stream)
    record = {
        **train.where_and_when(device),
        "teacher": BUNDLED_MODEL_PATH.name,
        "trained_together": list(arguments.shapes),
        "steps": trainer.num_steps,
        "tokens": trainer.num_steps * arguments.batch_rows * train.ROW_LENGTH,
        "written_texts": len(written),
        "written_tokens": num_written,
        "training_seconds": round(trainer.seconds),
        "total_seconds": round(time.monotonic() - began),
        "settings": {
            name: getattr(arguments, name)
            for name in (*train.RECORDED_SETTINGS, "rounds", "texts_per_round")
            if name != "tokenizer_documents"
        },
        "excluded_questions": record_excluded,
    }
    history = trainer.history[:: max(1, len(trainer.history) // 40)]
    for number, (shape, student) in enumerate(zip(arguments.shapes, students, strict=True)):
        losses = [entry | {"loss": entry["loss"][number]} for entry in history]
        save(student, arguments.out / shape, special, shape, record | {"history": losses})  # type: ignore[arg-type]


def save(
    student: Any, out: Path, special: dict[str, int], shape: str, record: dict[str, Any]
) -> None:
    """Save a draft, the tokenizer's files and the record of its training."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED_MODEL_PATH / name, out / name)
    train.save_model(student, out, special, architecture(shape))
    num_parameters = sum(p.numel() for p in student.parameters())
    train.write_json(
        out / "training_record.json", {"shape": shape, "parameters": num_parameters} | record
    )


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


@torch.inference_mode()
def agreement(
    draft: PreTrainedModel,
    start: Sequence[int],
    text: Sequence[int],
    temperature: torch.Tensor,
    numbers: torch.Tensor,
) -> list[bool]:
    """For each token of a text, whether the draft proposes it.

    start: the prompt. temperature: [1]. numbers: [T] of the text.
    """
    known = torch.tensor([[*start, *text[:-1]]], device=draft.device)
    logits = draft(input_ids=known, use_cache=False).logits[0, len(start) - 1 :].float().cpu()
    proposed = draw(logits, temperature.expand(len(text)), numbers[: len(text)]).tolist()
    return [a == b for a, b in zip(proposed, text, strict=True)]


def measured(texts: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """What steps accept in texts; for each text, whether the draft proposes each token."""
    steps = [count for agrees in texts for count in accepted_per_step(agrees)]
    num_steps = max(1, len(steps))
    return {
        "texts": len(texts),
        "steps": len(steps),
        "share_accepted": round(sum(steps) / (NUM_SPECULATIVE_TOKENS * num_steps), 3),
        "tokens_per_step": round(1 + sum(steps) / num_steps, 2),
        "accepted_per_position": [
            round(sum(count > place for count in steps) / num_steps, 3)
            for place in range(NUM_SPECULATIVE_TOKENS)
        ],
    }


def held_out(
    tokenizer: Tokenizer, num_texts: int, excluded: frozenset[str]
) -> dict[str, list[list[int]]]:
    """Kind -> num_texts prompts: stories that training never joins, and new chats of the corpus."""
    requests = [
        evaluate.user_prompt(request.prompt) for request in corpus.held_out_requests(num_texts)
    ]
    found = {"stories": [tokenizer.encode(r, add_special_tokens=False).ids for r in requests]}
    for prompt in islice(prompts(tokenizer, "draft evaluation", excluded), 40 * num_texts):
        if prompt.kind not in ("story chat", "long story"):
            found.setdefault(prompt.kind, []).append(prompt.ids)
    return {kind: some[:num_texts] for kind, some in found.items()}


def measure(
    paths: Sequence[Path], num_texts: int = 100, excluded: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """Acceptance of the drafts in some directories: stories at 0 and 0.7, other texts at 0."""
    teacher, drafts = evaluate.load(), [evaluate.load(path).model for path in paths]
    scores: list[dict[str, Any]] = [
        {"num_speculative_tokens": NUM_SPECULATIVE_TOKENS} for _ in paths
    ]
    for kind, starts in held_out(teacher.tokenizer, num_texts, excluded).items():
        for degree in (0.0, 0.7) if kind == "stories" else (0.0,):
            numbers = torch.rand(
                len(starts), TEXT_TOKENS, generator=torch.Generator().manual_seed(0)
            )
            temperature = torch.full((len(starts),), degree)
            texts = write(teacher.model, starts, temperature, numbers, teacher.ends)
            for draft, found in zip(drafts, scores, strict=True):
                agrees = [
                    agreement(draft, start, text, temperature[:1], row)
                    for start, text, row in zip(starts, texts, numbers, strict=True)
                ]
                found[f"{kind}, temperature {degree}"] = measured(agrees)
    return scores


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = train.argument_parser(__doc__)
    parser.set_defaults(learning_rate=5e-3)
    parser.add_argument(
        "--shapes", nargs="+", default=["1x160", "2x128"], help="drafts: LAYERSxWIDTH"
    )
    parser.add_argument("--texts", type=int, default=100, help="texts per kind in the measurement")
    parser.add_argument(
        "--rounds", type=int, default=6, help="rounds in which the bundled model writes texts"
    )
    parser.add_argument("--texts-per-round", type=int, default=4096)
    parser.add_argument(
        "--only-measure", action="store_true", help="do not train; measure the drafts in --out"
    )
    arguments = parser.parse_args()
    if not arguments.only_measure:
        distil(arguments)
    paths = [arguments.out / shape for shape in arguments.shapes]
    excluded, _ = train.read_excluded(arguments.exclude_questions)
    for path, scores in zip(paths, measure(paths, arguments.texts, excluded), strict=True):
        print(path.name, json.dumps(scores, indent=2))
        train.write_json(path / "evaluation.json", scores)


if __name__ == "__main__":
    main()
