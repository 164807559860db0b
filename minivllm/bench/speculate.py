"""What speculative decoding costs, and what it brings.

The costs: of a step that verifies k proposals per request, and of the draft's k steps, beside a
plain step. Proposals are the last token again, so with random weights hardly any is accepted, and
contexts stay as long as they are. From the costs follows the rate of acceptance from which on it
pays: if each proposal is right with the chance a once all before it are, a step gives
1 + a + ... + a^k tokens.

The texts: how many tokens per second an engine with speculation writes, beside one without. Both
run in turn, so that a change of the machine's speed meets both, and both must write the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from minivllm.bench.report import Deadline, attempt, environment, spread
from minivllm.bench.running import drain, start_decoding
from minivllm.engine.draft_model import DraftModel, draft_path
from minivllm.engine.llm_engine import LLMEngine
from minivllm.llm import LLM
from minivllm.parallel.launch import pick_device
from minivllm.sampling_params import SamplingParams

#: Rounds of a row that are not timed: they compile.
WARM_UP = 2


def expected_tokens(rate: float, k: int) -> float:
    """The tokens that a step with k proposals gives, on average.

    rate: the chance that a proposal is right if all before it are.
    """
    return sum(rate**i for i in range(k + 1))


def pays_from(cost: float, k: int) -> float | None:
    """The least rate of acceptance at which a step gives as many tokens as the plain steps that
    take its time. None: not even if every proposal is right.

    cost: of a step with k proposals and of proposing them, in plain steps.
    """
    if expected_tokens(1.0, k) < cost:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if expected_tokens(middle, k) >= cost else (middle, high)
    return round(high, 4)


# --- costs ----------------------------------------------------------------------------------------


def time_steps(engine: LLMEngine, k: int, repeats: int) -> dict[str, Any]:
    """The times of plain and of verifying steps, and of k draft steps, for the requests that decode
    now. Its speculator must not propose by itself.
    """
    core = engine.core
    assert core.speculator is not None
    draft = core.speculator.proposer
    times: dict[str, list[float]] = {name: [] for name in ("plain", "verify", "draft")}
    for repeat in range(WARM_UP + repeats):
        took = {"plain": _seconds(engine.step)}
        running = list(core.scheduler.running)
        if isinstance(draft, DraftModel):
            took["draft"] = _seconds(partial(draft.propose, running, [k] * len(running)))
        for seq in running:
            core.scheduler.propose(seq, [seq.token_ids[-1]] * k)
        took["verify"] = _seconds(engine.step)
        for name, seconds in took.items() if repeat >= WARM_UP else ():
            times[name].append(seconds)
    row: dict[str, Any] = {f"{name}_seconds": spread(some) for name, some in times.items() if some}
    plain, verify, drafted = (statistics.median(some or [0.0]) for some in times.values())
    row["cost"] = round((verify + drafted) / plain, 4)
    row["cost_without_draft"] = round(verify / plain, 4)
    row["pays_from"] = pays_from(row["cost"], k)
    row["pays_from_without_draft"] = pays_from(row["cost_without_draft"], k)
    return row


def _seconds(call: Any) -> float:
    """How long a call takes that waits for its results."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure_costs(
    engine: LLMEngine, count: int, k: int, context: int, repeats: int
) -> dict[str, Any]:
    """`time_steps` for so many requests of so many tokens."""
    start_decoding(engine, count, context, _num_tokens(k, repeats))
    try:
        return time_steps(engine, k, repeats)
    finally:
        drain(engine)


def _num_tokens(k: int, repeats: int) -> int:
    """The most tokens that the steps of a row give to a request."""
    return (WARM_UP + repeats) * (2 + k) + 8


# --- texts ----------------------------------------------------------------------------------------

_HEROES = ("fox", "bear", "owl", "rabbit", "mouse", "whale", "cat", "dragon")
_OBJECTS = ("silver key", "red kite", "map", "lantern", "drum", "boat", "bell", "compass")
STORIES = [
    f"Tell me a story about a {hero} and a {thing}."
    for hero, thing in zip(_HEROES, _OBJECTS, strict=True)
]
COUNTS = [f"Count from {start} to {start + 14}." for start in (1, 20, 31, 42, 7, 12, 25, 36)]
SUMMARY = "Summarise the story in one sentence."
#: Proposals per step, and the tokens of an answer at most.
NUM_SPECULATIVE_TOKENS, ANSWER_TOKENS = 4, 128
#: In the short texts of the bundled model, looking up the last token alone found most.
CONFIGS: dict[str, dict[str, Any]] = {
    "draft_model": {"method": "draft_model"},
    "ngram": {"method": "ngram", "prompt_lookup_max": 1, "prompt_lookup_min": 1},
}


@dataclass(frozen=True)
class Load:
    """Chats that are answered `requests` at a time."""

    texts: str
    temperature: float
    requests: int
    method: str


LOADS = [
    Load("stories", 0.0, 1, "draft_model"),
    Load("stories", 0.7, 1, "draft_model"),
    Load("stories", 0.0, 4, "draft_model"),
    Load("stories", 0.0, 32, "draft_model"),
    Load("counts", 0.0, 1, "ngram"),
    Load("summaries", 0.0, 1, "ngram"),
    Load("stories", 0.0, 32, "ngram"),
]


def chats(texts: str, plain: LLM) -> list[list[dict[str, str]]]:
    """The chats of a kind. plain: tells the stories of which summaries are made."""
    asked = [[{"role": "user", "content": text}] for text in STORIES]
    if texts == "counts":
        return [[{"role": "user", "content": text}] for text in COUNTS]
    if texts == "summaries":
        told = plain.chat(asked, SamplingParams(temperature=0.0, max_tokens=256), use_tqdm=False)
        for chat, output in zip(asked, told, strict=True):
            chat.append({"role": "assistant", "content": output.outputs[0].text})
            chat.append({"role": "user", "content": SUMMARY})
    return asked


def measure_texts(load: Load, plain: LLM, other: LLM, repeats: int) -> dict[str, Any]:
    """Answer the chats of a load with both engines in turn."""
    asked = chats(load.texts, plain)
    asked = [asked[i % len(asked)] for i in range(max(load.requests, len(asked)))]
    rates: dict[str, list[float]] = {"plain": [], "other": []}
    before, same = other.metrics(), True
    for repeat in range(1 + repeats):
        said = {}
        # The first of a round may find the caches of the machine cold; so they take turns.
        for name in ("plain", "other") if repeat % 2 else ("other", "plain"):
            rate, said[name] = _answer(plain if name == "plain" else other, load, asked)
            if repeat:  # the first round is a warm-up
                rates[name].append(rate)
        same &= said["plain"] == said["other"]
    found = other.metrics()
    drafts = found.num_drafts - before.num_drafts
    proposed = found.num_draft_tokens - before.num_draft_tokens
    accepted = found.num_accepted_tokens - before.num_accepted_tokens
    return {
        "plain_tokens_per_second": spread(rates["plain"]),
        "tokens_per_second": spread(rates["other"]),
        "speed_up": spread([b / a for a, b in zip(rates["plain"], rates["other"], strict=True)]),
        "share_accepted": round(accepted / proposed, 4) if proposed else None,
        "tokens_per_step": round(1 + accepted / drafts, 3) if drafts else None,
        "same_tokens": same,
    }


def _answer(llm: LLM, load: Load, asked: list) -> tuple[float, list[list[int]]]:
    """(tokens per second, tokens of each answer).

    What was said before the last question is in the prefix cache, as when a conversation goes on.
    """
    llm.reset_prefix_cache()
    earlier = [chat[:-1] for chat in asked if len(chat) > 1]
    if earlier:
        llm.chat(earlier, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    params = [
        SamplingParams(temperature=load.temperature, max_tokens=ANSWER_TOKENS, seed=i)
        for i in range(len(asked))
    ]
    began, outputs = time.perf_counter(), []
    for first in range(0, len(asked), load.requests):
        part = slice(first, first + load.requests)
        outputs += llm.chat(asked[part], params[part], use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(map(len, tokens)) / seconds, tokens


# --- both -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is measured. requests, context: None is what suits the device.

    has_texts: whether the model is the bundled one, which writes texts.
    """

    requests: Sequence[int] | None = None
    ks: Sequence[int] = (1, 2, 4, 8)
    context: int | None = None
    repeats: int = 8
    has_texts: bool = False
    max_seconds: float | None = None


def run(model: str | Path | None, draft: str | Path, plan: Plan, **options: Any) -> dict[str, Any]:
    """The report of `minivllm bench speculate`.

    model, draft: as `LLM` takes them. options: of the engine.
    """
    deadline = Deadline(plan.max_seconds)
    on_gpu = torch.device(pick_device(options.get("device", "auto"))).type == "cuda"
    requests = plan.requests or ([1, 4, 16, 64] if on_gpu else [1, 4, 16, 32])
    context, most = plan.context or (384 if on_gpu else 128), max(plan.ks)
    wanted = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": most}
    more = {
        "speculative_config": {**wanted, "disable_by_batch_size": max(requests)},
        "max_model_len": context + _num_tokens(most, plan.repeats) + 64,
        "max_num_seqs": max(requests),
        "skip_tokenizer_init": True,
    }
    with LLM(model, **{**more, **options}) as llm:
        engine = llm.llm_engine
        assert engine.core.speculator is not None
        # It proposes nothing by itself.
        engine.core.speculator.largest_batch = 0
        report: dict[str, Any] = {
            "benchmark": "speculate",
            "model": _name(engine.model_path, options),
            "draft": _name(draft_path(str(draft)), options),
            "dtype": engine.config.dtype,
            "context": context,
            "graphs": engine.model_runner.graphs is not None,
        }
        rows = []
        for count, k in product(requests, plan.ks):
            name = f"{count} requests, {k} proposals"
            measure = partial(measure_costs, engine, count, k, context, plan.repeats)
            row = {"requests": count, "num_speculative_tokens": k}
            rows.append(row | attempt(name, deadline, measure))
    report["costs"], report["texts"] = rows, []
    if plan.has_texts:
        for method, config in CONFIGS.items():
            config = config | {"num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
            config |= {"model": str(draft)} if method == "draft_model" else {}
            with (
                LLM(model, **options) as plain,
                LLM(model, speculative_config=config, **options) as other,
            ):
                loads = [load for load in LOADS if load.method == method]
                report["texts"] += _text_rows(loads, plain, other, plan, deadline)
    return report | {"environment": environment()}


def _text_rows(
    loads: list[Load], plain: LLM, other: LLM, plan: Plan, deadline: Deadline
) -> list[dict[str, Any]]:
    rows = []
    for load in loads:
        name = f"{load.texts}, temperature {load.temperature}, {load.requests} at a time"
        measure = partial(measure_texts, load, plain, other, plan.repeats)
        row = {**vars(load), "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
        rows.append(row | attempt(f"{name}, {load.method}", deadline, measure))
    return rows


def _name(path: Path, options: dict[str, Any]) -> str:
    return path.name + (" (random weights)" if options.get("load_format") == "dummy" else "")
