"""The capstone: all pieces that a learner wrote in chapters 01 to 07, run as one engine.

`check`, which is ``minivllm check capstone``, collects the answers from the exercises and sends
them to a worker. The worker is this file, run as a program in its own Python process, because an
answer may hang or crash. The worker runs the bundled model with all of the pieces. It counts their
calls, and it notices when one of the package's own implementations is called instead of a piece.

If that run fails, `check` has every piece run alone in the package's engine, to find the piece that
is wrong. If it succeeds, `check` also runs the exercise checks of the pieces that have not passed
them yet: those checks find more than the nine requests do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import linecache
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.records import FAILED, PASSED, Records, keep, states_of
from minivllm.course.notebooks import CourseNotFoundError, chapters, find_root, role

if TYPE_CHECKING:
    from types import CodeType

    from rich.console import Console

    from minivllm.engine.output_processor import Request
    from minivllm.llm import LLM
    from minivllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Piece:
    """A place in the engine that a learner's answer takes.

    name: the piece's name in the report. chapter, answer: the chapter, and the name that the answer
    defines there. own: the package's implementations, as "module:function" or
    "module:Class.method". None of these may be called while the learner's piece is in use.
    """

    name: str
    chapter: str
    answer: str
    own: tuple[str, ...]


_KERNELS_FOLDER = str(Path(__file__).resolve().parents[2] / "kernels") + os.sep


def _pair(module: str, *names: str) -> tuple[str, ...]:
    """The kernels with these names: the launcher and the reference of each."""
    return tuple(
        f"minivllm.kernels.{module}:{name}{end}" for name in names for end in ("", "_reference")
    )


def _on_cpu(name: str) -> str:
    return f"minivllm.kernels.cpu:{name}"


def _methods(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"minivllm.{owner}.{name}" for name in names)


#: The pieces, in the order of the chapters.
PIECES = (
    Piece("merging softmaxes", "01", "merge_attention", _pair("online_softmax", "merge_attention")),
    Piece(
        "flash attention", "02", "prefill_attention", _pair("flash_attention", "prefill_attention")
    ),
    Piece("writing pages", "03", "store_kv", (*_pair("kv_cache", "store_kv"), _on_cpu("store_kv"))),
    Piece(
        "reading pages",
        "03",
        "decode_attention",
        (*_pair("paged_attention", "decode_attention"), _on_cpu("decode_attention")),
    ),
    Piece(
        "block manager",
        "04",
        "MyBlockManager",
        _methods(
            "engine.block_manager:BlockManager",
            "allocate",
            "free",
            "find_cached_prefix",
            "register_computed",
        ),
    ),
    Piece(
        "scheduler",
        "05",
        "MyScheduler",
        _methods(
            "engine.scheduler:Scheduler",
            "schedule",
            "schedule_running",
            "schedule_waiting",
            "make_room",
        ),
    ),
    Piece("RMSNorm", "06", "rms_norm", _pair("norm", "rms_norm", "add_rms_norm")),
    Piece(
        "QK-norm and RoPE",
        "06",
        "qk_norm_rope",
        (*_pair("rotary", "qk_norm_rope"), _on_cpu("qk_norm_rope")),
    ),
    Piece("SwiGLU", "06", "silu_mul", _pair("activation", "silu_mul")),
    Piece(
        "model",
        "06",
        "Qwen3",
        _methods("models.qwen3:Qwen3ForCausalLM", "forward", "compute_logits"),
    ),
    Piece("batch", "07", "build_batch", ("minivllm.engine.batch:build_batch",)),
    Piece(
        "sampler",
        "07",
        "sample",
        (*_pair("sampling", "sample"), "minivllm.kernels.sampling:filter_logits"),
    ),
    Piece(
        "text stream",
        "07",
        "TextStream",
        _methods("tokenizer:Detokenizer", "append", "finish", "emit"),
    ),
    Piece(
        "loop",
        "07",
        "MyEngine",
        _methods("engine.llm_engine:LLMEngine", "step", "advance", "add_request"),
    ),
)
KERNELS = (
    "merge_attention",
    "prefill_attention",
    "store_kv",
    "decode_attention",
    "rms_norm",
    "qk_norm_rope",
    "silu_mul",
    "sample",
)
OPTIONS = {
    "block_manager_cls": "MyBlockManager",
    "scheduler_cls": "MyScheduler",
    "model_cls": "Qwen3",
    "build_batch": "build_batch",
}

#: A small cache, so that there are chunks, mixed steps, preemptions and prefix hits.
ROOM = {
    "max_num_batched_tokens": 32,
    "num_kv_blocks": 13,
    "max_num_seqs": 6,
    "max_model_len": 192,
    "block_size": 16,
}
#: A decode reads a longer context in parts of this many tokens and then merges them. A GPU with
#: idle multiprocessors does the same.
SPLIT = 32
_LONG = "You know many stories, and you explain terms in a few words. "
_LONGER = _LONG + "There was a fox who lived by the sea, and an owl who kept a silver key. " * 3
#: The requests include a stop string that may begin where a text ends, a text that ends inside a
#: character, and contexts of more than one tile.
REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("What is 12 + 7?", {"temperature": 0.0, "stop": ". "}),
    (f"{_LONG}What is a KV cache?", {"temperature": 0.0}),
    ("Tell me a story about a fox named Zoë.", {"temperature": 0.0}),
    ("Show me the emoji for a fox.", {"temperature": 0.0, "max_tokens": 2}),
    (f"{_LONGER}Tell me a story about the owl.", {"temperature": 0.0}),
    (f"{_LONG}Tell me a story about an owl.", {"temperature": 0.7, "seed": 1}),
    ("Tell me a story about a robot.", {"temperature": 1.5, "top_p": 0.8, "seed": 5}),
    ("Tell me a story about a robot.", {"temperature": 1.5, "top_k": 5, "top_p": 0.7, "seed": 6}),
    (
        f"{_LONG}What is a block table?",
        {"temperature": 2.0, "min_p": 0.3, "seed": 4, "stop": [". ", "!"]},
    ),
)
MAX_TOKENS = 24
# The index of the request whose answer is printed.
SHOWN = 1


# --- what the command does ------------------------------------------------------------------------


@dataclass
class Finding:
    """A fault of one piece.

    name: like the name of a `Mistake`. piece: "" where the fault cannot be attributed to one piece.
    """

    piece: str
    name: str
    message: str


@dataclass
class Report:
    """The result of the capstone.

    found: the exercise of each piece, by its answer's name. speed: tokens per second, the learner's
    engine first. calls: the number of calls of each piece in the run that shows that the piece is
    right.
    """

    found: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_tokens: int = 0
    text: str = ""
    stats: dict[str, int] = field(default_factory=dict)
    speed: tuple[float, float] | None = None

    @property
    def passed(self) -> bool:
        return not self.problems and self.speed is not None


def check(console: Console, timeout: float = 120.0) -> int:
    """Run the capstone on this repository's exercises and print the result. Returns the exit code.

    timeout: seconds. Each part may take half of it, because an endless part is run a second time to
    find the piece.
    """
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text("Capstone: the engine that you wrote", style="bold"))
    root = find_root()
    with console.status("Running your pieces together …"):
        report = examine(root, timeout / 2)
    if problem := _keep(root, report):
        console.print(Text(problem, style="yellow"), soft_wrap=True)
    wrong = {finding.piece: finding for finding in report.problems}
    for piece in PIECES:
        finding = wrong.get(piece.answer)
        sign, style = ("✗", "red") if finding else ("✓", "green") if report.passed else ("·", "dim")
        where = f"{report.found.get(piece.answer, piece.chapter)}"
        calls = (
            f"  {report.calls[piece.answer]:>6,} calls"
            if piece.answer in report.calls and not finding
            else ""
        )
        line = f" {sign} {piece.name:18} {piece.answer:18} {where}{calls}"
        console.print(Text(line + (f"  {finding.name}" if finding else ""), style=style))
    said = dict.fromkeys((finding.name, finding.message) for finding in report.problems)
    for name, message in said:
        pieces = [
            f.piece for f in report.problems if (f.name, f.message) == (name, message) and f.piece
        ]
        title = ", ".join([*pieces, name])
        console.print(Padding(Text(f"{title}: {message}"), (1, 0, 0, 3), expand=False))
    for note in report.notes:
        console.print(Padding(Text(note, style="dim"), (1, 0, 0, 3), expand=False))
    if report.passed:
        _celebrate(report, console)
    elif not report.problems:
        console.print(Padding(Text("The run did not finish, for an unknown reason."), (1, 0, 0, 3)))
    return int(not report.passed)


def _keep(root: Path, report: Report) -> str:
    """Write the result and the answers' digest into the records. Returns "", or why not."""
    records = Records(root)
    record = records["capstone"]
    record.answer, record.state = _digest(root, records), PASSED if report.passed else FAILED
    return keep(records)


def standing(root: Path) -> tuple[str, bool]:
    """Return the learner's progress towards the capstone, and whether the capstone comes next.

    The progress is a few words; it is "" where the capstone's chapters are missing.
    """
    records = Records(root)
    known = {chapter.number for chapter in chapters(root)}
    if not {piece.chapter for piece in PIECES} <= known:
        return "", False
    if records["capstone"].state == PASSED and records["capstone"].answer == _digest(root, records):
        return "passed", False
    states = _states(root, records)
    count = sum(states.get(id) == PASSED for id in _homes(root).values())
    return f"{count} of {len(PIECES)} pieces have passed their checks", count == len(PIECES)


def _homes(root: Path) -> dict[str, str]:
    """The exercise that asks for each piece, by the name of its answer."""
    from minivllm.course.stubs import defined_names

    homes = {}
    for chapter in chapters(root):
        names = {piece.answer for piece in PIECES if piece.chapter == chapter.number}
        for cell in chapter.solution.cells if names else ():
            if role(cell)[0] == "exercise":
                for name in (defined_names(cell.source) & names) - homes.keys():
                    homes[name] = role(cell)[1]
    return homes


def _states(root: Path, records: Records) -> dict[str, str]:
    """The state of every exercise in the chapters that the pieces come from."""
    numbers = {piece.chapter for piece in PIECES}
    here = [
        chapter
        for chapter in chapters(root)
        if chapter.number in numbers and chapter.exercises.exists()
    ]
    return {id: state for chapter in here for id, state in states_of(chapter, records).items()}


def _digest(root: Path, records: Records) -> str:
    """A digest of the states and the last checked answers of the pieces' exercises."""
    states = _states(root, records)
    pieces = [(id, states.get(id), records[id].answer) for id in sorted(set(_homes(root).values()))]
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:16]


def _celebrate(report: Report, console: Console) -> None:
    from rich.padding import Padding
    from rich.text import Text

    mine, packages = report.speed or (1.0, 1.0)
    ratio = packages / mine
    beside = (
        f"{ratio:.1f} times as fast as yours"
        if ratio >= 1
        else f"{1 / ratio:.1f} times slower than yours"
    )
    if 0.95 < ratio < 1.05:
        beside = "as fast as yours"
    stats = report.stats
    lines = [
        f"Asked “{REQUESTS[SHOWN][0].removeprefix(_LONG)}”, your engine says:",
        f"    {report.text}",
        "",
        (
            f"{len(REQUESTS)} requests, greedy and seeded: all {report.num_tokens} tokens and"
            f" all texts equal the package's. {stats['num_steps']} steps,"
            f" {stats['num_mixed_steps']} of them mixed, with {stats['num_preemptions']}"
            " preemptions."
        ),
        (
            f"Yours: {mine:,.0f} tokens per second. The package: {packages:,.0f}, {beside}, on this"
            " CPU, in plain torch."
        ),
        "",
        (
            "None of the package's own pieces was used in these places. You have built an inference"
            " engine."
        ),
    ]
    console.print(Padding(Text("\n".join(lines)), (1, 0, 1, 3), expand=False), highlight=False)


def examine(root: Path, timeout: float = 60.0) -> Report:
    """Run the capstone on the exercises in root.

    timeout: seconds for each part. ChangedSolutionError where a solution differs from the published
    one.
    """
    report = Report()
    cells = _collect(root, report)
    if report.problems:
        return report
    job = {"cells": cells, "found": report.found}
    for event in _work({**job, "task": "together"}, root / "exercises", timeout):
        _take(event, report)
    if not report.problems:
        report.problems += _own_checks(root, report, timeout)
        return report
    if any(finding.piece for finding in report.problems):
        return report
    report.problems, trouble = [], report.problems
    _find_out_which(job, root / "exercises", timeout, report)
    report.problems = report.problems or trouble
    return report


def _own_checks(root: Path, report: Report, timeout: float) -> list[Finding]:
    """Run the exercise checks of the answers that have not passed them yet, and return the faults.

    The verdicts are saved.
    """
    from minivllm.course.grading.graft import graft
    from minivllm.course.grading.runner import FAILED, NOT_RUNNABLE, verdicts

    records, problems = Records(root), []
    states = _states(root, records)
    for chapter in chapters(root):
        ids = {
            id for id in report.found.values() if id[:2] == chapter.number and states[id] != PASSED
        }
        if not ids:
            continue
        groups = graft(chapter.exercises, chapter)
        by_id = {group.id: group for group in groups}
        for verdict in verdicts(groups, chapter.exercises.parent, ids, timeout):
            records.note(by_id[verdict.id], verdict)
            pieces = [piece for piece, id in report.found.items() if id == verdict.id]
            why = (
                f"The tokens are right, but the piece's own check, {verdict.id}, finds a mistake:"
                f" {verdict.message}"
            )
            if verdict.state == FAILED:
                problems += [Finding(piece, verdict.name, why) for piece in pieces]
            elif verdict.state == NOT_RUNNABLE:
                report.notes.append(
                    f"The check of {verdict.id} cannot run on this machine: {verdict.message}"
                )
    with contextlib.suppress(OSError):
        records.save()
    return problems


def _find_out_which(job: dict[str, Any], folder: Path, timeout: float, report: Report) -> None:
    """Run each piece alone in the package's engine, to find the piece that is wrong.

    If each works alone, run all pieces but one, for every piece.
    """
    for task in ("alone", "without"):
        left = [piece.answer for piece in PIECES]
        while left:
            events = list(_work({**job, "task": task, "pieces": left}, folder, timeout))
            for event in events:
                _take(event, report)
            last = next((event["piece"] for event in reversed(events) if "piece" in event), left[0])
            done = left.index(last) + 1 if last in left else len(left)
            left = left[done:] if any("ended" in event for event in events) else []
        if report.problems:
            return


def _collect(root: Path, report: Report) -> dict[str, list[tuple[str, str, str]]]:
    """Collect the cells that have to run for the pieces.

    Returns chapter -> (exercise's id, kind, source). Problems go to the report.
    """
    from minivllm.course.grading.graft import graft

    known, homes, cells = {chapter.number: chapter for chapter in chapters(root)}, _homes(root), {}
    for number in dict.fromkeys(piece.chapter for piece in PIECES):
        pieces = [piece for piece in PIECES if piece.chapter == number]
        try:
            chapter = known[number]
            groups = graft(chapter.exercises, chapter)
        except (KeyError, CourseNotFoundError) as error:
            why = (
                str(error)
                if isinstance(error, CourseNotFoundError)
                else f"There is no chapter {number} here."
            )
            report.problems += [Finding(piece.answer, "missing", why) for piece in pieces]
            continue
        by_id = {group.id: group for group in groups}
        for piece in pieces:
            report.found[piece.answer] = id = homes[piece.answer]
            if by_id[id].broken:
                report.problems.append(Finding(piece.answer, *by_id[id].broken))
            elif by_id[id].untouched:
                report.problems.append(_not_written(piece, id))
        # Pictures and checks are left out. The answers to other exercises stay, because these
        # answers may use them.
        cells[number] = [
            (group.id, cell.kind, cell.source)
            for group in groups
            for cell in group.cells
            if cell.kind in (("given", "own") if not group.id else ("answer", "own"))
        ]
    return cells


def _not_written(piece: Piece, id: str) -> Finding:
    why = (
        f"{piece.answer} is still to write: exercise {id}. `minivllm check {id}` checks it by"
        " itself."
    )
    return Finding(piece.answer, "not-attempted", why)


def _take(event: dict[str, Any], report: Report) -> None:
    """Add an event of the worker to the report."""
    if "problem" in event:
        report.problems.append(Finding(**event["problem"]))
    elif "ended" in event:
        piece, id = event.get("piece", ""), report.found.get(event.get("piece", ""), "")
        where = (
            f"With {piece} ({id}) alone in the package's engine"
            if piece
            else "With all of your pieces together"
        )
        report.problems.append(Finding(piece, event["name"], f"{where}: {event['ended']}."))
    elif "note" in event:
        report.notes.append(event["note"])
    elif "calls" in event:
        report.calls |= event["calls"]
    elif "result" in event:
        for name, value in event["result"].items():
            setattr(report, name, tuple(value) if isinstance(value, list) else value)


def _start(folder: Path) -> subprocess.Popen:
    """Start a worker in folder.

    The worker reads its job from stdin and answers on stdout.
    """
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUTF8": "1",
    }
    paths = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, "-m", "minivllm.course.grading.capstone"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )


def _work(job: dict[str, Any], folder: Path, timeout: float) -> Iterator[dict[str, Any]]:
    """Yield the worker's events as they arrive.

    A worker that is silent for longer than timeout is ended; the last event is then {"ended": why}.
    """
    process = _start(folder)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        # The pipe is closed.
        with contextlib.suppress(ValueError):
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    piece: dict[str, str] = {}
    try:
        threading.Thread(target=read, daemon=True).start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        while True:
            try:
                line = lines.get(timeout=timeout)
            except queue.Empty:
                yield {
                    **piece,
                    "name": "endless",
                    "ended": f"it still ran after {timeout:g} seconds",
                }
                return
            if line is None:
                yield {
                    **piece,
                    "name": "process-ended",
                    "ended": "the Python process ended (exit(), or a crash)",
                }
                return
            event = json.loads(line)
            if "begins" in event:
                piece = {"piece": event["begins"]} if event["begins"] else {}
            elif "done" in event:
                return
            else:
                yield event
    finally:
        process.kill()
        process.wait()


# --- the worker -----------------------------------------------------------------------------------


def main() -> None:
    """Do the job that stands on the standard input, and print each result as one line."""
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    job = json.loads(sys.stdin.read())

    def say(**event: Any) -> None:
        print(json.dumps(event), file=said, flush=True)

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        say(begins="")
        answers, problems = _load(job["cells"], job["found"])
        if problems:
            for finding in problems:
                say(problem=vars(finding))
        elif job["task"] == "together":
            _together(answers, job["found"], say)
        else:
            right = _package_run()
            for name in job["pieces"]:
                say(begins=name)
                task = _alone if job["task"] == "alone" else _without
                for finding in task(name, answers, job["found"], right):
                    say(problem=vars(finding))
    say(done=True)


def _load(cells: dict[str, list], found: dict[str, str]) -> tuple[dict[str, Any], list[Finding]]:
    """Run the answers. Returns what they define, by name, and what is wrong with them.

    Each chapter runs in its own namespace.
    """
    from minivllm.course.grading.errors import raised
    from minivllm.course.grading.exercise import unattempted

    answers: dict[str, Any] = {}
    problems: list[Finding] = []
    for chapter, sources in cells.items():
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for number, (id, kind, source) in enumerate(sources):
            pieces = [
                p.answer for p in PIECES if p.chapter == chapter and found.get(p.answer) == id
            ]
            try:
                _execute(source, f"<{id or chapter}, cell {number}>", namespace)
            except Exception as error:
                if kind == "answer":
                    problems += [Finding(name, "raised", raised(error).message) for name in pieces]
                elif kind == "given":
                    raise
            # Keep the value now: a later exercise may use the name for something else.
            if kind == "answer":
                answers |= {name: namespace[name] for name in pieces if name in namespace}
    for piece in PIECES:
        id = found.get(piece.answer)
        if id is None or any(finding.piece == piece.answer for finding in problems):
            continue
        if piece.answer not in answers:
            problems.append(
                Finding(piece.answer, "missing", f"The answer to {id} defines no {piece.answer}.")
            )
        elif unattempted(answers[piece.answer]):
            problems.append(_not_written(piece, id))
    return answers, problems


def _execute(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute a cell, and register its lines with `linecache`.

    Triton reads the lines of a function again to compile it as a kernel.
    """
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


@dataclass
class Run:
    """The texts that an engine wrote, and the reason why each text ended.

    calls: the number of calls of each piece. blocks_lost: blocks still in use at the end. own:
    piece -> the package's function that was called instead of it, if any; only watched pieces are
    listed.
    """

    tokens: list[list[int]]
    texts: list[str]
    ends: list[tuple[str | None, str | int | None]]
    calls: Counter[str] = field(default_factory=Counter)
    own: dict[str, str] = field(default_factory=dict)
    stats: dict[str, int] = field(default_factory=dict)
    blocks_lost: int = 0


def _asked(
    llm: LLM, requests: Iterable[tuple[str, dict[str, Any]]]
) -> tuple[list[list[int]], list[SamplingParams]]:
    """(prompts in the chat template, their parameters), as a loop's `run` takes them."""
    from minivllm import SamplingParams

    prompts, params = [], []
    for prompt, wishes in requests:
        prompts.append(llm.render_chat([{"role": "user", "content": prompt}]))
        params.append(SamplingParams(**{"max_tokens": MAX_TOKENS, **wishes}))
    return prompts, params


def _package_run() -> Run:
    """The right answers: the package's engine, by its own face."""
    from minivllm import LLM

    with LLM(device="cpu", **ROOM) as llm:
        outputs = [o.outputs[0] for o in llm.generate(*_asked(llm, REQUESTS), use_tqdm=False)]
        stats = vars(llm.llm_engine.scheduler.stats)
    ends = [(o.finish_reason, o.stop_reason) for o in outputs]
    return Run([o.token_ids for o in outputs], [o.text for o in outputs], ends, stats=dict(stats))


def _engine(
    answers: dict[str, Any], calls: Counter[str], room: dict[str, Any], split: int = 0
) -> tuple[LLM, Callable[[], Any]]:
    """Return an LLM that uses these answers, and the factory of its loop.

    calls: is increased at each call of an answer. split: how many tokens a decode reads at once;
    longer contexts are read in parts and merged. 0: whole contexts.
    """
    from minivllm import LLM, Kernels
    from minivllm.course.sim.requests import EngineLoop, RequestMaker

    def noted(name: str) -> Callable:
        def note(*args: Any, **kwargs: Any) -> Any:
            # The methods of a class are counted when they run.
            calls[name] += not isinstance(answers[name], type)
            return answers[name](*args, **kwargs)

        return note

    fields: dict[str, Any] = {name: noted(name) for name in KERNELS if name in answers}
    if "decode_attention" in answers and split:
        fields["decode_attention"] = _in_parts(fields["decode_attention"], split)
    if "rms_norm" in answers:  # its fused form, which the package's model calls
        norm = fields["rms_norm"]
        fields["add_rms_norm"] = lambda x, residual, weight, eps: (
            norm(x + residual, weight, eps),
            x + residual,
        )
    kernels = replace(Kernels.reference(), name="yours", **fields)
    options = {option: noted(name) for option, name in OPTIONS.items() if name in answers}
    llm = LLM(device="cpu", kernels=kernels, **options, **room)
    tokenizer = llm.get_tokenizer()

    def stream(stops: Iterable[str] = ()) -> Any:
        return noted("TextStream")(
            lambda token_ids: tokenizer.decode(list(token_ids)), tuple(stops)
        )

    def loop() -> Any:
        engine = llm.llm_engine
        request_cls = _with_stream(stream) if "TextStream" in answers else None
        new_request = RequestMaker(tokenizer, request_cls)
        parts = (engine.input_processor, engine.core, engine.processor, new_request)
        return noted("MyEngine")(*parts) if "MyEngine" in answers else EngineLoop(*parts)

    return llm, loop


def _with_stream(new_stream: Callable[[Iterable[str]], Any]) -> type[Request]:
    """A `Request` whose texts come from a learner's `TextStream`. new_stream: makes one, from stop
    strings.
    """
    from minivllm.engine.output_processor import Request

    class StreamedRequest(Request):
        def add_completion(self, seq_id: int) -> None:
            super().add_completion(seq_id)
            self.completions[-1].detokenizer = _StreamedText(new_stream(self.params.stop_strings))

    return StreamedRequest


class _StreamedText:
    """A learner's `TextStream` where a completion has a `Detokenizer`."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.text = stream, ""

    def append(self, token_id: int, check_stop: bool = True) -> str | None:
        self.text += self.stream.append(token_id)
        return self.stream.stopped

    def extend(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.append(token_id)

    def finish(self, check_stop: bool = True) -> str | None:
        self.text += self.stream.finish()
        return self.stream.stopped

    def num_safe(self, finished: bool) -> int:
        """All of it: a stream gives out only what stays."""
        return len(self.text)


def _in_parts(decode: Callable, split: int) -> Callable:
    """Wrap a decode attention: compute each `split` tokens of a context alone, then merge.

    A GPU's decode kernel does the same where it would otherwise leave multiprocessors idle. It has
    the log-sum-exp of each part at hand.
    """
    import torch

    # The arguments are those of `Kernels.decode_attention`.
    def decode_in_parts(  # noqa: PLR0913
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        *,
        max_seq_len: int,
        merge_attention: Callable,
    ) -> torch.Tensor:
        block_size, kv_heads = k_cache.shape[2], k_cache.shape[1]
        limits = {"max_seq_len": min(split, max_seq_len), "merge_attention": merge_attention}
        outs, sums = [], []
        for first in range(0, max_seq_len, split):
            lens = (seq_lens - first).clamp(0, split)
            table = block_table[:, first // block_size : (first + split) // block_size].contiguous()
            outs.append(decode(query, k_cache, v_cache, table, lens, scale, **limits))
            keys = k_cache[table.long()].transpose(1, 2).flatten(2, 3)  # [B, KH, tokens, D]
            grouped = query.unflatten(1, (kv_heads, -1))
            scores = torch.einsum("bkgd,bktd->bkgt", grouped.float(), keys.float()) * scale
            beyond = torch.arange(keys.shape[2]) >= lens[:, None]
            sums.append(
                scores.masked_fill(beyond[:, None, None], -torch.inf).logsumexp(dim=-1).flatten(1)
            )
        if len(outs) == 1:
            return outs[0]
        return merge_attention(torch.stack(outs).float(), torch.stack(sums)).to(query.dtype)

    return decode_in_parts


def _run(answers: dict[str, Any], watched: Iterable[str]) -> Run:
    """Serve the requests with these answers, and with the package's pieces elsewhere.

    watched: the pieces for which calls of the package's own implementation are recorded.
    """
    run = Run([], [], [])
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
        for code, name in _own(piece)
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

    llm, loop = _engine(answers, run.calls, ROOM, SPLIT)
    asked = _asked(llm, REQUESTS)
    room, before = llm.llm_engine.scheduler.block_manager.num_free_blocks, sys.getprofile()
    sys.setprofile(profile)
    try:
        outputs = [output.outputs[0] for output in loop().run(*asked)]
    finally:
        sys.setprofile(before)
    if len(outputs) != len(REQUESTS):
        raise ValueError(f"`run` gave {len(outputs)} outputs for {len(REQUESTS)} prompts.")
    run.texts = [output.text for output in outputs]
    run.tokens = [output.token_ids for output in outputs]
    run.ends = [(output.finish_reason, output.stop_reason) for output in outputs]
    scheduler = llm.llm_engine.scheduler
    run.stats = dict(vars(scheduler.stats))
    run.blocks_lost = room - scheduler.block_manager.num_free_blocks
    return run


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


def _own(piece: Piece) -> Iterator[tuple[CodeType, str]]:
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


def _differs(run: Run, right: Run) -> str:
    """Describe the first difference between a run and the right run; "" where there is none."""
    for (prompt, wishes), mine, theirs in zip(REQUESTS, run.tokens, right.tokens, strict=True):
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
                f"the answer to {prompt!r} ({how}) begins with {same} tokens of the package's; then"
                f" comes {mine[same : same + 1]}, expected {theirs[same : same + 1]}"
            )
    for (prompt, _), mine, theirs in zip(
        REQUESTS, [*run.texts, *[""] * len(REQUESTS)], right.texts, strict=False
    ):
        if mine != theirs:
            return (
                f"the tokens are right, but the text for {prompt!r} is {mine!r}, expected"
                f" {theirs!r}"
            )
    for (prompt, _), mine, theirs in zip(REQUESTS, run.ends, right.ends, strict=True):
        if mine != theirs:
            why = f"(finish_reason, stop_reason) for {prompt!r} is {mine}, expected {theirs}"
            return f"the texts are right, but {why}"
    if run.blocks_lost:
        return (
            f"the texts are right, but {run.blocks_lost} blocks of the KV cache were not freed"
            " at the end"
        )
    return ""


def _together(answers: dict[str, Any], found: dict[str, str], say: Callable[..., None]) -> None:
    """Run all pieces in one engine, and alone those that were not called in it."""
    from minivllm.course.grading.errors import raised

    right = _package_run()
    try:
        run = _run(answers, answers)
    except Exception as error:
        say(problem=vars(Finding("", "raised", raised(error).message)))
        return
    problems = _packages_own(run.own, found)
    why = _differs(run, right)
    if why and not problems:
        say(problem=vars(Finding("", "together", f"With all of your pieces together, {why}.")))
        return
    for name in answers:
        if not run.calls[name] and not problems:
            say(begins=name)
            problems += _alone(name, answers, found, right, run.calls)
            others = "your other pieces did not call it, so it ran alone in the package's engine"
            if not problems:
                say(note=f"{name} ({found[name]}): {others}.")
    for finding in problems:
        say(problem=vars(finding))
    if problems:
        return
    say(begins="")
    say(calls=run.calls)
    result = {"num_tokens": sum(map(len, run.tokens)), "text": run.texts[SHOWN], "stats": run.stats}
    say(result={**result, "speed": [_speed(answers), _speed({})]})


def _packages_own(own: dict[str, str], found: dict[str, str]) -> list[Finding]:
    return [
        Finding(
            piece,
            "packages-own",
            f"The package's own `{name}` ran instead of {piece} ({found[piece]}): your answer is"
            " the package's code, inherits from it, or calls it. The capstone needs your own"
            " code.",
        )
        for piece, name in own.items()
    ]


def _alone(
    name: str,
    answers: dict[str, Any],
    found: dict[str, str],
    right: Run,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Run one piece alone in the package's engine, and return its fault, if there is one.

    Its calls are added to `calls`.
    """
    from minivllm.course.grading.errors import raised

    closer = f"`minivllm check {found[name]}` checks it in more detail."
    try:
        run = _run({name: answers[name]}, [name])
    except Exception as error:
        return [
            Finding(
                name, "raised", f"Alone in the package's engine: {raised(error).message}\n{closer}"
            )
        ]
    if problems := _packages_own(run.own, found):
        return problems
    if why := _differs(run, right):
        return [
            Finding(
                name,
                "wrong",
                f"With {name} ({found[name]}) alone in the package's engine, {why}.\n{closer}",
            )
        ]
    if not run.calls[name]:
        return [
            Finding(name, "not-used", f"The engine never called {name} ({found[name]}).\n{closer}")
        ]
    if calls is not None:
        calls[name] += run.calls[name]
    return []


def _without(
    name: str, answers: dict[str, Any], found: dict[str, str], right: Run
) -> list[Finding]:
    """Whether the engine works with the package's implementation in place of this piece.

    If it does, this piece does not fit together with the others.
    """
    others = {other: answer for other, answer in answers.items() if other != name}
    try:
        heals = not _differs(_run(others, []), right)
    except Exception:
        return []
    why = (
        f"Each piece is right alone. With the package's own code instead of {name} ({found[name]}),"
        f" the other pieces are right together. So {name} and another piece of yours disagree about"
        " the data that they pass to each other."
    )
    return [Finding(name, "disagrees", why)] if heals else []


def _speed(answers: dict[str, Any]) -> float:
    """Tokens a second, for the greedy requests in an engine with room; the better of two runs."""
    seconds, count = [], 0
    greedy = [request for request in REQUESTS if not request[1]["temperature"]]
    for _ in range(2):
        llm, loop = _engine(answers, Counter(), {})
        asked, engine = _asked(llm, greedy), loop()
        start = time.perf_counter()
        outputs = engine.run(*asked)
        seconds.append(time.perf_counter() - start)
        count = sum(len(output.outputs[0].token_ids) for output in outputs)
    return count / min(seconds)


if __name__ == "__main__":
    main()
