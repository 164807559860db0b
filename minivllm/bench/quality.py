"""What fewer bits cost: the same texts through an engine with full numbers and through others.

Three numbers tell it, each over all positions of the texts that are scored:

- perplexity, ``exp(mean(-log p(token)))``: how well the model predicts the text;
- agreement: how often the most likely token is the one of the engine with full numbers;
- KL divergence, ``mean(Σ p · (log p - log q))`` in nats: how far the distribution q of the next
  token has moved from that engine's p. It sees what the other two do not.

The bundled model is measured on stories about pairs of a character and an object that its training
never joined. Other models are measured on a text of yours or, without one, on what Python's
`help()` knows about the language: real text that every machine has. Taught in
notebooks/14_quantization.ipynb.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from minivllm.bench.report import environment, say
from minivllm.config import EngineConfig
from minivllm.errors import ConfigError
from minivllm.files import reason
from minivllm.llm import LLM
from minivllm.sampling_params import SamplingParams

#: Tokens of a document of a long text; each is read without the ones before it.
WINDOW = 512
#: The first tokens of such a document, which have little context, are not scored.
WARM = 32


@dataclass(frozen=True)
class Document:
    """token_ids are read, and those from position `first` on are scored."""

    token_ids: list[int]
    first: int


@dataclass
class Score:
    """Sums over the scored positions."""

    positions: int = 0
    nll: float = 0.0
    agreeing: int = 0
    kl: float = 0.0

    def add(self, base: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """base and logits: [T, V], of the engine with full numbers and of this one; targets: [T],
        the next tokens of the text.
        """
        p, q = (x.double().log_softmax(-1) for x in (base, logits))
        self.positions += len(targets)
        self.nll -= float(q.gather(1, targets[:, None]).sum())
        self.agreeing += int((base.argmax(-1) == logits.argmax(-1)).sum())
        self.kl += float((p.exp() * (p - q)).sum())

    def report(self) -> dict[str, float]:
        n = self.positions
        return {
            "perplexity": math.exp(self.nll / n),
            "agreement": self.agreeing / n,
            "kl": self.kl / n,
        }


@dataclass
class Recorder:
    """An engine, and the logits that it computes for one document at a time."""

    llm: LLM
    _rows: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = self._runner.model
        compute = model.compute_logits

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            logits = compute(hidden)
            self._rows.append(logits)
            return logits

        model.compute_logits = keep

    @property
    def _runner(self) -> Any:
        assert self.llm.llm_engine is not None
        return self.llm.llm_engine.model_runner

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T - 1, V]: after each token but the last."""
        self._rows.clear()
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        self.llm.generate([token_ids], params, use_tqdm=False)
        # The document is one step. Its first rows are those that the new token is sampled from.
        return torch.cat(self._rows[1:])

    def sizes(self) -> dict[str, int]:
        """Bytes: of the weights of the blocks, without embedding and head; of a token's KV."""
        runner = self._runner
        blocks = runner.model.model.layers.parameters()
        return {
            "block_weight_bytes": sum(p.numel() * p.element_size() for p in blocks),
            "kv_bytes_per_token": runner.kv_bytes_per_token,
        }


def default_rows() -> list[dict[str, Any]]:
    """The engine options whose cost is measured when nothing else is asked for."""
    rows: list[dict[str, Any]] = [{"quantization": "int8"}, {"quantization": "fp8"}]
    if "kv_cache_dtype" in {field.name for field in fields(EngineConfig)}:
        rows.append({"kv_cache_dtype": "int8"})
        if torch.cuda.is_available():
            rows.append({"kv_cache_dtype": "fp8"})
    return rows


def run(
    model: str | Path | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    *,
    text: Path | None = None,
    num_tokens: int = 8192,
    **options: Any,
) -> dict[str, Any]:
    """Measure the engine options of each row against an engine without them.

    text: a file whose text is read instead of the default one. num_tokens: about how many positions
    are scored. options: of all engines.
    """
    start = time.perf_counter()
    plan = [{}, *(rows or default_rows())]
    options = {"max_num_seqs": 1, "enforce_eager": True, "enable_prefix_caching": False} | options
    with ExitStack() as stack:
        engines = []
        for row in plan:
            say(f"quality: an engine with {_name(row)}")
            engines.append(Recorder(stack.enter_context(_open(model, {**options, **row}))))
        base = engines[0].llm
        documents = list(_documents(base, model, text, num_tokens))
        scores = [Score() for _ in plan]
        for number, document in enumerate(documents):
            _score(engines, scores, document)
            if number % 8 == 7:
                say(f"quality: {number + 1} of {len(documents)} texts")
        assert base.llm_engine is not None
        report = {
            "benchmark": "quality",
            "model": "bundled" if model is None else Path(model).name,
            "engine": {k: v for k, v in asdict(base.llm_engine.config).items() if k != "device"},
            "text": _text_name(model, text),
            "documents": len(documents),
            "positions": scores[0].positions,
            "rows": [
                {"options": dict(row), **score.report(), **engine.sizes()}
                for row, score, engine in zip(plan, scores, engines, strict=True)
            ],
        }
    seconds = round(time.perf_counter() - start, 1)
    return report | {"seconds": seconds, "environment": environment()}


def _name(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.items()) or "full numbers"


def _open(model: str | Path | None, options: dict[str, Any]) -> LLM:
    """An engine with room for one document, which is one step."""
    block_size = options.get("block_size") or 64
    length = options.setdefault("max_model_len", 1024)
    options.setdefault("block_size", block_size)
    options.setdefault("num_kv_blocks", -(-length // block_size) + 1)
    options.setdefault("max_num_batched_tokens", length)
    return LLM(model, **options)


@torch.inference_mode()
def _score(engines: list[Recorder], scores: list[Score], document: Document) -> None:
    base = engines[0].logits(document.token_ids)[document.first - 1 :]
    targets = torch.tensor(document.token_ids[document.first :], device=base.device)
    for number, (engine, score) in enumerate(zip(engines, scores, strict=True)):
        logits = base
        if number:
            logits = engine.logits(document.token_ids)[document.first - 1 :]
        score.add(base, logits, targets)


# --- texts ----------------------------------------------------------------------------------------


def _text_name(model: str | Path | None, text: Path | None) -> str:
    if text is not None:
        return text.name
    return "held-out stories" if model is None else "topics of Python's help()"


def _documents(
    llm: LLM, model: str | Path | None, text: Path | None, num_tokens: int
) -> Iterator[Document]:
    source = _stories(llm) if model is None and text is None else _windows(llm, text)
    scored = 0
    for document in source:
        yield document
        scored += len(document.token_ids) - document.first
        if scored >= num_tokens:
            return


def _stories(llm: LLM) -> Iterator[Document]:
    """Requests and stories about pairs that the bundled model's training never joined; the stories
    are scored.
    """
    from minivllm.bundled.training import stories

    tokenizer, rng = llm.get_tokenizer(), random.Random("minivllm quality")
    while True:
        cast = stories.draw_held_out_cast(rng)
        request = [{"role": "user", "content": stories.write_request(rng, cast)}]
        prompt = tokenizer.apply_chat_template(request, add_generation_prompt=True, tokenize=False)
        context = tokenizer.encode(prompt)
        answer = tokenizer.encode(stories.write_story(rng, cast).text + "<|im_end|>")
        yield Document([*context, *answer], len(context))


def _windows(llm: LLM, text: Path | None) -> Iterator[Document]:
    """Pieces of a text. Raises `ConfigError` for one that is too short or cannot be read."""
    if text is None:
        from pydoc_data.topics import topics

        content = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise ConfigError(f"The text {text} cannot be read: {why}.") from error
    token_ids = llm.get_tokenizer().encode(content)
    assert llm.llm_engine is not None
    window = min(WINDOW, llm.llm_engine.config.max_model_len - 1)
    if len(token_ids) <= WARM + 1:
        raise ConfigError(f"The text has {len(token_ids)} tokens; give one of some thousand.")
    for start in range(0, len(token_ids), window):
        piece = token_ids[start : start + window]
        if len(piece) > WARM + 1:
            yield Document(piece, WARM)
