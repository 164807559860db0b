"""Train the bundled model from scratch: corpus, tokenizer and weights, in minutes on one GPU.

    python -m minivllm.bundled.training.train --out DIR --minutes 5

Worker processes draw and tokenize new documents while the GPU trains, so the model sees no document
twice. Rows of 2,048 tokens start with the start of a document and are filled with whole documents.
The loss covers raw text and what the assistant says, nothing else. The optimizer is AdamW with
warm-up and a cosine schedule that ends when the time (or the number of steps) is over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

from minivllm.bundled.training import corpus, glossary

log = logging.getLogger("minivllm.bundled.training.train")

VOCAB_SIZE = 2048
ROW_LENGTH = 2048
# Qwen's split: contractions, words with their leading space, single digits, punctuation, white
# space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Each entry of a row is a token id, plus this bit where the loss does not cover the token.
NOT_TRAINED = 1 << 15
IGNORED_LABEL = -100

ARCHITECTURE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 256,
    "head_dim": 64,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": ROW_LENGTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}


# --- tokenizer ------------------------------------------------------------------------------------


def train_tokenizer(num_documents: int) -> Tokenizer:
    """Train byte-level BPE without a normalizer: any text survives encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(corpus.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        segment.text.replace(corpus.TURN_END, "").replace(corpus.END_OF_TEXT, "")
        for document in islice(corpus.documents("tokenizer"), num_documents)
        for segment in document.segments
        if segment.trained
    )
    names = "system user assistant"
    tokenizer.train_from_iterator((names, *texts), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": ROW_LENGTH,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": corpus.TURN_END,
        "pad_token": corpus.END_OF_TEXT,
        "unk_token": None,
        "extra_special_tokens": {},
        "chat_template": corpus.CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", config)


# --- rows of tokens -------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, document: corpus.Document) -> np.ndarray:
    """The token ids of a document, with NOT_TRAINED set where the text is only read."""
    encoded = tokenizer.encode_batch([s.text for s in document.segments], add_special_tokens=False)
    parts = [
        np.array(e.ids, dtype=np.uint16) | np.uint16(0 if s.trained else NOT_TRAINED)
        for s, e in zip(document.segments, encoded, strict=True)
    ]
    return np.concatenate(parts)[:ROW_LENGTH]


def pack(
    pieces: Iterator[np.ndarray], num_rows: int, padding: int, waiting_limit: int = 64
) -> np.ndarray:
    """Fill rows with whole documents. Padding ends a row.

    The longest waiting document that still fits comes next.
    """
    rows = np.full((num_rows, ROW_LENGTH), padding | NOT_TRAINED, dtype=np.uint16)
    waiting: list[np.ndarray] = []
    for row in rows:
        filled = 0
        while True:
            while len(waiting) < waiting_limit:
                waiting.append(next(pieces))
            # The oldest document opens the row. The next ones are taken in order, and near the end
            # the best fit.
            room = ROW_LENGTH - filled
            fitting = [i for i, piece in enumerate(waiting) if len(piece) <= room]
            if not fitting:
                break
            at = fitting[0] if room > 400 else max(fitting, key=lambda i: len(waiting[i]))
            piece = waiting.pop(at)
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
    return rows


_WORKER: dict[str, Any] = {}


def start_worker(tokenizer_json: str, excluded: frozenset[str], rows_per_shard: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER.update(
        tokenizer=Tokenizer.from_str(tokenizer_json), excluded=excluded, rows=rows_per_shard
    )


def make_shard(index: int) -> np.ndarray:
    """Rows of new documents; the same for the same index."""
    tokenizer: Tokenizer = _WORKER["tokenizer"]
    stream = (
        encode(tokenizer, document)
        for document in corpus.documents(f"train {index}", _WORKER["excluded"])
    )
    return pack(stream, _WORKER["rows"], padding=tokenizer.token_to_id(corpus.END_OF_TEXT))


# --- training -------------------------------------------------------------------------------------


def new_model(
    seed: int, special: dict[str, int], architecture: dict[str, Any] = ARCHITECTURE
) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    settings = {k: v for k, v in architecture.items() if k not in ("architectures", "model_type")}
    config = Qwen3Config(
        **settings, pad_token_id=special["pad"], eos_token_id=special["eos"], bos_token_id=None
    )
    model = Qwen3ForCausalLM(config)
    # Each layer's addition to the residual stream is small at the beginning.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def loss_of(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


def to_batch(rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    ids = packed & (NOT_TRAINED - 1)
    return ids, torch.where(packed >= NOT_TRAINED, IGNORED_LABEL, ids)


def learning_rate(progress: float, step: int, peak: float, warmup: int) -> float:
    """Linear warm-up over some steps, then a cosine from the peak to 1 % of it."""
    return (
        peak
        * min(1.0, (step + 1) / warmup)
        * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    )


class Trainer:
    """The training loop: AdamW, gradients clipped to a norm of 1, matrices in bfloat16 on a GPU.

    loss: (model, token ids [B, T], labels [B, T]) -> the loss to minimize, or several [S], for
    models that are trained together; their sum is minimized.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        device: torch.device,
        arguments: argparse.Namespace,
        loss: Callable[..., torch.Tensor] = loss_of,
    ) -> None:
        self._model, self._device, self._arguments = model, device, arguments
        self._on_gpu = device.type == "cuda"
        self._forward = torch.compile(loss, dynamic=False) if arguments.compile else loss
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": arguments.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=arguments.learning_rate,
            betas=(0.9, 0.95),
            fused=self._on_gpu,
        )
        torch.set_float32_matmul_precision("high")
        #: The number of steps so far, and the seconds that they took.
        self.num_steps, self.seconds = 0, 0.0
        #: Every `--log-every` steps: the step, the mean loss since the last entry, tokens per
        #: second.
        self.history: list[dict[str, Any]] = []

    def warm_up(self, rows: np.ndarray) -> None:
        """Compile on these rows, without an update, before the clock starts."""
        self._backward(rows)
        self._optimizer.zero_grad(set_to_none=True)
        if self._on_gpu:
            torch.cuda.synchronize()

    def run(self, stream: Iterator[np.ndarray]) -> None:
        """Train until the requested steps or minutes have passed."""
        clock, losses = time.monotonic(), []
        for rows in stream:
            elapsed = time.monotonic() - clock
            progress = self._progress(elapsed)
            if progress >= 1:
                break
            losses.append(self._step(rows, progress))
            if self.num_steps % self._arguments.log_every == 0:
                loss = torch.stack(losses).mean(0).double().cpu().numpy().round(4).tolist()
                losses.clear()
                rate = self.num_steps * rows.size / (time.monotonic() - clock)
                self._note(elapsed, loss, rate)
        else:
            log.warning("the shards ran out before the time did: ask for more with --shards")
        self.seconds = time.monotonic() - clock

    def _progress(self, elapsed: float) -> float:
        """The finished share of the training."""
        if self._arguments.steps:
            return self.num_steps / self._arguments.steps
        return elapsed / (60 * self._arguments.minutes)

    def _step(self, rows: np.ndarray, progress: float) -> torch.Tensor:
        """Do one update; returns the loss before it."""
        peak, warmup = self._arguments.learning_rate, self._arguments.warmup
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(progress, self.num_steps, peak, warmup)
        loss = self._backward(rows)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        return loss

    def _backward(self, rows: np.ndarray) -> torch.Tensor:
        ids, labels = to_batch(rows, self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._on_gpu):
            loss = self._forward(self._model, ids, labels)
        loss.sum().backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        return loss.detach()

    def _note(self, elapsed: float, loss: float | list[float], rate: float) -> None:
        step = self.num_steps
        self.history.append({"step": step, "loss": loss, "tokens_per_second": round(rate)})
        log.info("step %5d  %4.0f s  loss %s  %.2f M tokens/s", step, elapsed, loss, rate / 1e6)


def batches(shards: Iterable[np.ndarray], batch_rows: int) -> Iterator[np.ndarray]:
    """The rows of the shards in batches.

    The rest of a shard that does not fill a batch is dropped.
    """
    for shard in shards:
        for start in range(0, len(shard) - batch_rows + 1, batch_rows):
            yield shard[start : start + batch_rows]


def shares_of(rows: np.ndarray, padding: int) -> dict[str, float]:
    """The share of tokens that the loss covers, and the share of padding."""
    return {
        "share_of_tokens_trained_on": round(float((rows < NOT_TRAINED).mean()), 3),
        "share_of_padding": round(float((rows == (padding | NOT_TRAINED)).mean()), 4),
    }


def train(arguments: argparse.Namespace) -> None:
    """Train tokenizer and model, and save them with a record of the training."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    excluded, record_excluded = read_excluded(arguments.exclude_questions)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    tokenizer = train_tokenizer(arguments.tokenizer_documents)
    save_tokenizer(tokenizer, out)
    vocab_size = tokenizer.get_vocab_size()
    log.info("tokenizer of %d tokens after %.0f s", vocab_size, time.monotonic() - began)
    special = {
        "pad": tokenizer.token_to_id(corpus.END_OF_TEXT),
        "eos": tokenizer.token_to_id(corpus.TURN_END),
    }

    # The banks are built once, here: the workers are forked and share them.
    for term in glossary.TERMS:
        glossary.question_bank(term, excluded=excluded)
    log.info("question banks after %.0f s", time.monotonic() - began)
    job = (tokenizer.to_str(), excluded, arguments.rows_per_shard)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(arguments.workers, start_worker, job) as pool:
        stream = batches(pool.imap(make_shard, range(arguments.shards)), arguments.batch_rows)
        first = next(stream)
        shares = shares_of(first, special["pad"])
        log.info(
            "first rows after %.0f s: %.0f %% trained on, %.1f %% padding",
            time.monotonic() - began,
            100 * shares["share_of_tokens_trained_on"],
            100 * shares["share_of_padding"],
        )

        model = new_model(arguments.seed, special).to(device).train()
        trainer = Trainer(model, device, arguments)
        trainer.warm_up(first)
        num_parameters = sum(p.numel() for p in model.parameters())
        millions = num_parameters / 1e6
        log.info("%.2f M parameters; first step after %.0f s", millions, time.monotonic() - began)
        trainer.run(stream)

    save_model(model, out, special)
    record = {
        **where_and_when(device),
        "parameters": num_parameters,
        "steps": trainer.num_steps,
        "tokens": trainer.num_steps * arguments.batch_rows * ROW_LENGTH,
        **shares,
        "training_seconds": round(trainer.seconds),
        "total_seconds": round(time.monotonic() - began),
        "final_loss": trainer.history[-1]["loss"] if trainer.history else None,
        "settings": {name: getattr(arguments, name) for name in RECORDED_SETTINGS},
        "excluded_questions": record_excluded,
        "history": trainer.history[:: max(1, len(trainer.history) // 40)],
    }
    write_json(out / "training_record.json", record)
    log.info(
        "%d steps in %.0f s; everything took %.0f s",
        trainer.num_steps,
        trainer.seconds,
        time.monotonic() - began,
    )


RECORDED_SETTINGS = (
    "batch_rows",
    "learning_rate",
    "weight_decay",
    "warmup",
    "seed",
    "minutes",
    "steps",
    "rows_per_shard",
    "tokenizer_documents",
    "compile",
)


def where_and_when(device: torch.device) -> dict[str, Any]:
    """The date, the hardware and the versions, for the record of a training."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "versions": versions(),
    }


def save_model(
    model: Qwen3ForCausalLM,
    out: Path,
    special: dict[str, int],
    architecture: dict[str, Any] = ARCHITECTURE,
) -> None:
    """Save bfloat16 weights under the names of Qwen3 checkpoints, and the configuration."""
    from safetensors.torch import save_file

    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ends = {"bos_token_id": None, "eos_token_id": special["eos"], "pad_token_id": special["pad"]}
    write_json(out / "config.json", {**architecture, **ends, "torch_dtype": "bfloat16"})
    write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.95,
            "eos_token_id": [special["eos"], special["pad"]],
            "pad_token_id": special["pad"],
        },
    )


def read_excluded(path: Path | None) -> tuple[frozenset[str], dict[str, Any] | None]:
    """The normalised questions that the corpus must not contain, and a note for the record."""
    if path is None:
        return frozenset(), None
    content = path.read_bytes()
    questions = frozenset(glossary.normalise(item["question"]) for item in json.loads(content))
    return questions, {"count": len(questions), "sha256": hashlib.sha256(content).hexdigest()}


def versions() -> dict[str, str]:
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def write_json(path: Path, value: Collection[Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a training."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="time for the training loop alone"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="stop after this number of steps, not by time"
    )
    parser.add_argument(
        "--batch-rows", type=int, default=32, help=f"rows of {ROW_LENGTH} tokens per step"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=150, help="warm-up steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--shards", type=int, default=600, help="the most shards of new text")
    parser.add_argument("--rows-per-shard", type=int, default=512)
    parser.add_argument("--tokenizer-documents", type=int, default=60_000)
    parser.add_argument(
        "--exclude-questions",
        type=Path,
        help="questions to leave out: JSON list, 'question' in each item",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available()
    )
    parser.add_argument("--log-every", type=int, default=100)
    return parser


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    train(argument_parser(__doc__).parse_args())


if __name__ == "__main__":
    main()
