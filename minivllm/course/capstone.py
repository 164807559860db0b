"""The capstone: all pieces that a learner wrote in chapters 01 to 07, taken from their exercises,
run as one engine.

`check`, which is ``minivllm check capstone``, collects answers and hands them to a worker, a Python
process of its own that may hang or crash: this file, run as a program. The worker runs the bundled
model with all of the pieces, counting their calls and watching whether any of the package's own
implementations is called in their places; where that goes wrong, `check` has every piece run alone
in the package's engine, and so finds the one to name. Where it goes well, the pieces whose own
checks have not passed yet are checked, too: those see more than any nine requests do.
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

from minivllm.course.chapters import CourseNotFoundError, chapters, find_root, role
from minivllm.course.records import FAILED, PASSED, Records, keep, states_of

if TYPE_CHECKING:
    from types import CodeType

    from rich.console import Console

    from minivllm.engine.output_processor import Request
    from minivllm.llm import LLM
    from minivllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Piece:
    """A place in the engine that a learner's answer takes.

    name: how it is called in the report; chapter and answer: where it is, and the name that the
    answer gives it. own: the package's implementations, as "module:function" or
    "module:Class.method", none of which may be called then.
    """

    name: str
    chapter: str
    answer: str
    own: tuple[str, ...]


_KERNELS_FOLDER = str(Path(__file__).resolve().parents[1] / "kernels") + os.sep


def _pair(module: str, *names: str) -> tuple[str, ...]:
    """The kernels of these names: the launcher and the reference."""
    return tuple(
        f"minivllm.kernels.{module}:{name}{end}" for name in names for end in ("", "_reference")
    )


def _on_cpu(name: str) -> str:
    return f"minivllm.kernels.cpu:{name}"


def _methods(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"minivllm.{owner}.{name}" for name in names)


#: The table of the design's section 4, in the order of the chapters.
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

#: Chunks, mixed steps, preemptions and prefix hits, in a small cache.
ROOM = {
    "max_num_batched_tokens": 32,
    "num_kv_blocks": 13,
    "max_num_seqs": 6,
    "max_model_len": 192,
    "block_size": 16,
}
#: Decodes read a longer context in parts of so many tokens, which are then merged, as on a GPU with
#: room for more.
SPLIT = 32
_LONG = "You know many stories, and you explain terms in a few words. "
_LONGER = _LONG + "There was a fox who lived by the sea, and an owl who kept a silver key. " * 3
#: A stop string that may begin where a text ends; a text cut inside a character; contexts of more
#: than one tile.
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
SHOWN = 1  # the request whose answer is printed


# --- what the command does ------------------------------------------------------------------------


@dataclass
class Finding:
    """What is wrong with a piece. name as that of a `Mistake`; piece "" where no single one is to
    blame.
    """

    piece: str
    name: str
    message: str


@dataclass
class Report:
    """How it went. found: exercise of each piece, by its answer's name. speed: tokens a second,
    yours first.

    calls: how often each piece was called in the run that shows it right.
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
    """Run the capstone on the exercises of this repository and print how it went. Returns the exit
    code.

    timeout: seconds; half of it is what each part may take, for an endless one is run once more, to
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
        console.print(
            Padding(Text("It did not come to an end, and nothing says why."), (1, 0, 0, 3))
        )
    return int(not report.passed)


def _keep(root: Path, report: Report) -> str:
    """Note in the records how it went, and with which answers. Returns "", or why that could not be
    done.
    """
    records = Records(root)
    record = records["capstone"]
    record.answer, record.state = _digest(root, records), PASSED if report.passed else FAILED
    return keep(records)


def standing(root: Path) -> tuple[str, bool]:
    """(how far a learner is on the way to the capstone, in a few words; whether it is what comes
    next).

    ("", False) where its chapters are not here.
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
    """The exercise that each piece is an answer of, by the answer's name."""
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
    """Exercise -> its state, in the chapters that pieces are from."""
    numbers = {piece.chapter for piece in PIECES}
    here = [
        chapter
        for chapter in chapters(root)
        if chapter.number in numbers and chapter.exercises.exists()
    ]
    return {id: state for chapter in here for id, state in states_of(chapter, records).items()}


def _digest(root: Path, records: Records) -> str:
    """A digest of what all pieces were when they were last checked, and whether they have changed
    since.
    """
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
            f"{len(REQUESTS)} requests, greedy and seeded: all {report.num_tokens} tokens are the"
            f" package's, and so are the texts; in {stats['num_steps']} steps,"
            f" {stats['num_mixed_steps']} of them mixed, with {stats['num_preemptions']}"
            " preemptions."
        ),
        (
            f"Yours: {mine:,.0f} tokens a second. The package: {packages:,.0f}, {beside}, on this"
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
    """Run the capstone on root's exercises. timeout: seconds that each part of it may take.

    ChangedSolutionError where a solution is not as it was published.
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
    """What the pieces' own checks find, of the answers that have not passed them yet. The verdicts
    are kept.
    """
    from minivllm.course.graft import graft
    from minivllm.course.runner import FAILED, NOT_RUNNABLE, verdicts

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
                f"The tokens are right. But its own check, {verdict.id}, sees more:"
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
    """Each piece alone among the package's; if all of them work so, all but one of the pieces."""
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
    """chapter -> (exercise's id, kind, source) of what is to be run for its pieces. Problems go to
    the report.
    """
    from minivllm.course.graft import graft

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
        # Pictures and checks are left out; what was written for other exercises may be used in
        # these.
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
    """Add what the worker says to the report."""
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
    """A worker, which reads its job from stdin and answers on stdout. folder: where it runs."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUTF8": "1",
    }
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, "-m", "minivllm.course.capstone"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )


def _work(job: dict[str, Any], folder: Path, timeout: float) -> Iterator[dict[str, Any]]:
    """What a worker says, as it comes. A worker that is silent for longer than timeout is ended:
    {"ended": why}.
    """
    process = _start(folder)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(ValueError):  # closed
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
    """Do what the job on the standard input says, and tell it line by line."""
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
    """(what the answers define, by name; what is wrong with them). A chapter is run in a namespace
    of its own.
    """
    from minivllm.course.checking import raised, unattempted

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
            if (
                kind == "answer"
            ):  # as it is now: a later exercise may use the name for something else
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
    """Execute a cell whose lines can be found again, as Triton does to compile a kernel."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


@dataclass
class Run:
    """What an engine wrote, and why each text ended there. calls: of each piece; blocks_lost: still
    in use at the end.

    own: piece -> the package's function that was called in its place, of those that were watched
    for.
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
    """(an LLM with these answers in their places, what makes its loop). calls: counts those of
    answers as they run.

    split: tokens that a decode reads at once; longer contexts are read in parts and merged. 0:
    whole contexts.
    """
    from minivllm import LLM, Kernels
    from minivllm.course.checks import ch07

    def noted(name: str) -> Callable:
        def note(*args: Any, **kwargs: Any) -> Any:
            # a class's methods are counted as they run
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
        new_request = ch07.RequestMaker(tokenizer, request_cls)
        parts = (engine.input_processor, engine.core, engine.processor, new_request)
        return noted("MyEngine")(*parts) if "MyEngine" in answers else ch07._RightEngine(*parts)

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
    """The same attention, for every `split` tokens of a context by itself; what that gives is
    merged.

    A GPU's decode kernel does so where it would leave multiprocessors idle, and has each part's
    log-sum-exp at hand.
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
    """Serve the requests with these answers, the package's elsewhere. watched: pieces whose own are
    looked for.
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
            if not caller.startswith(
                _KERNELS_FOLDER
            ):  # one of the package's kernels may use another
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
    run.stats, run.blocks_lost = (
        dict(vars(scheduler.stats)),
        room - scheduler.block_manager.num_free_blocks,
    )
    return run


def _methods_of(answer: type) -> Iterator[CodeType]:
    """The code of what a class does: its own methods and those of bases that a learner wrote, but
    for `__init__`.
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
    """(code, name) of the package's implementations of a piece."""
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
    """Where a run first says something else, in words; "" if it does not."""
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
            f"the texts are right, but {run.blocks_lost} blocks of the KV cache were not given back"
            " in the end"
        )
    return ""


def _together(answers: dict[str, Any], found: dict[str, str], say: Callable[..., None]) -> None:
    """All of the pieces in one engine; and alone those that the others had no use for."""
    from minivllm.course.checking import raised

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
            others = "your other pieces had no use for it, so it ran alone in the package's engine"
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
            f"In the place of {piece} ({found[piece]}) the package's own `{name}` is at work: your"
            " answer is it, inherits it, or calls it. The capstone wants yours.",
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
    """What is wrong with one piece in the package's engine, if anything is. Its calls are added to
    `calls`.
    """
    from minivllm.course.checking import raised

    closer = f"`minivllm check {found[name]}` looks closer."
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
    """Whether all works with the package's own in the place of this piece: then the others do not
    get on with it.
    """
    others = {other: answer for other, answer in answers.items() if other != name}
    try:
        heals = not _differs(_run(others, []), right)
    except Exception:
        return []
    why = (
        f"Each piece is right alone, and with the package's own in the place of {name}"
        f" ({found[name]}) the others are right together. So {name} and another of yours disagree,"
        " about what they hand to each other."
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
