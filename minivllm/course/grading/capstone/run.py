"""One round served by an engine: what it wrote, what it called, and how that differs from the right
run.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.capstone.engine import build
from minivllm.course.grading.capstone.pieces import PIECES, Piece
from minivllm.course.grading.capstone.requests import Round

if TYPE_CHECKING:
    from types import CodeType

    from minivllm.llm import LLM
    from minivllm.sampling_params import SamplingParams

_KERNELS_FOLDER = str(Path(__file__).resolve().parents[3] / "kernels") + os.sep


@dataclass
class Run:
    """The texts that an engine wrote, and the reason why each text ended.

    calls: the number of calls of each piece. blocks_lost: blocks still in use at the end. own:
    piece -> the package's function that was called instead of it, if any; only watched pieces are
    listed.
    """

    round: Round
    tokens: list[list[int]]
    texts: list[str]
    ends: list[tuple[str | None, str | int | None]]
    calls: Counter[str] = field(default_factory=Counter)
    own: dict[str, str] = field(default_factory=dict)
    stats: dict[str, int] = field(default_factory=dict)
    blocks_lost: int = 0


def asked(llm: LLM, round: Round) -> tuple[list[list[int]], list[SamplingParams]]:
    """(prompts in the chat template, their parameters), as a loop's `run` takes them."""
    from minivllm import SamplingParams

    prompts, params = [], []
    for prompt, wishes in round.requests:
        prompts.append(llm.render_chat([{"role": "user", "content": prompt}]))
        params.append(SamplingParams(**{"max_tokens": round.max_tokens, **wishes}))
    return prompts, params


def package_run(round: Round) -> Run:
    """The right answers: the package's engine, by its own face."""
    from minivllm import LLM

    with LLM(device="cpu", **round.room) as llm:
        prompts, params = asked(llm, round)
        outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
        stats = _counts(llm.llm_engine.scheduler.stats)
    ends = [(o.finish_reason, o.stop_reason) for o in outputs]
    tokens, texts = [o.token_ids for o in outputs], [o.text for o in outputs]
    return Run(round, tokens, texts, ends, stats=stats)


def run_with(answers: dict[str, Any], watched: Iterable[str], round: Round) -> Run:
    """Serve a round's requests with these answers, and with the package's pieces elsewhere.

    watched: the pieces for which calls of the package's own implementation are recorded.
    """
    run = Run(round, [], [], [])
    mine = {
        code: name
        for name, answer in answers.items()
        if isinstance(answer, type)
        for code in _methods_of(answer)
    }
    codes = {
        code: (piece.answer, name)
        for piece in PIECES
        if piece.answer in set(watched)
        for code, name in own_codes(piece)
    }

    def profile(frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        if frame.f_code in mine:
            run.calls[mine[frame.f_code]] += 1
        elif frame.f_code in codes:
            caller = frame.f_back.f_code.co_filename if frame.f_back else ""
            # One of the package's kernels may use another.
            if not caller.startswith(_KERNELS_FOLDER):
                piece, name = codes[frame.f_code]
                run.own.setdefault(piece, name)

    llm, loop = build(answers, run.calls, round.room, round.split)
    prompts, params = asked(llm, round)
    room, before = llm.llm_engine.scheduler.block_manager.num_free_blocks, sys.getprofile()
    sys.setprofile(profile)
    try:
        outputs = [output.outputs[0] for output in loop().run(prompts, params)]
    finally:
        sys.setprofile(before)
    if len(outputs) != len(prompts):
        raise ValueError(f"`run` gave {len(outputs)} outputs for {len(prompts)} prompts.")
    run.texts = [output.text for output in outputs]
    run.tokens = [output.token_ids for output in outputs]
    run.ends = [(output.finish_reason, output.stop_reason) for output in outputs]
    scheduler = llm.llm_engine.scheduler
    run.stats = _counts(scheduler.stats)
    run.blocks_lost = room - scheduler.block_manager.num_free_blocks
    return run


def _counts(stats: Any) -> dict[str, int]:
    """The scheduler's plain counters."""
    return {name: count for name, count in vars(stats).items() if isinstance(count, int)}


def _methods_of(answer: type) -> Iterator[CodeType]:
    """The code objects of a class's behaviour.

    These are its own methods and those of its bases that the learner wrote, without `__init__`.
    """
    libraries = ("minivllm", "torch", "builtins")
    for base in answer.__mro__:
        if base.__module__.partition(".")[0] in libraries:
            continue
        for name, member in vars(base).items():
            code = getattr(getattr(member, "fget", member), "__code__", None)
            if code is not None and name != "__init__":
                yield code


def own_codes(piece: Piece) -> Iterator[tuple[CodeType, str]]:
    """Yield (code object, name) of each of the package's implementations of a piece."""
    from importlib import import_module

    for path in piece.own:
        module, _, name = path.partition(":")
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        code = getattr(getattr(found, "__wrapped__", found), "__code__", None)
        if code is not None:
            yield code, name


def difference(run: Run, right: Run) -> str:
    """Describe the first difference between a run and the right run; "" where there is none."""
    requests = run.round.requests
    for (prompt, wishes), mine, theirs in zip(requests, run.tokens, right.tokens, strict=True):
        if mine != theirs:
            same = next(
                (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
                min(len(mine), len(theirs)),
            )
            how = (
                "greedy"
                if not wishes["temperature"]
                else ", ".join(f"{k}={v}" for k, v in wishes.items())
            )
            return (
                f"the answer to {_short(prompt)!r} ({how}) begins with {same} tokens of the"
                f" package's; then comes {mine[same : same + 1]}, expected"
                f" {theirs[same : same + 1]}"
            )
    for (prompt, _), mine, theirs in zip(
        requests, [*run.texts, *[""] * len(requests)], right.texts, strict=False
    ):
        if mine != theirs:
            return (
                f"the tokens are right, but the text for {_short(prompt)!r} is {mine!r}, expected"
                f" {theirs!r}"
            )
    for (prompt, _), mine, theirs in zip(requests, run.ends, right.ends, strict=True):
        if mine != theirs:
            why = (
                f"(finish_reason, stop_reason) for {_short(prompt)!r} is {mine}, expected {theirs}"
            )
            return f"the texts are right, but {why}"
    if run.blocks_lost:
        return (
            f"the texts are right, but {run.blocks_lost} blocks of the KV cache were not freed"
            " at the end"
        )
    return ""


def _short(prompt: str) -> str:
    """A prompt as a message shows it: the end of a long one, which holds the question."""
    return prompt if len(prompt) <= 80 else f"… {prompt[-70:]}"
