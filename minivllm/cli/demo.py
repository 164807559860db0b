"""`minivllm demo`: the engine serves a batch of requests, and its block tables and KV cache are on
the screen.

The KV cache is small on purpose. So requests wait for blocks, long prompts are computed in chunks
beside the decodes of other requests, a common system message is found in the prefix cache, and now
and then the newest request is preempted and computed again.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from minivllm.cli.options import Engine, Mine, Model, open_llm, open_mine, require_number
from minivllm.cli.trace import save_page, save_trace
from minivllm.errors import ConfigError
from minivllm.files import reason, require_writable, write_atomically
from minivllm.text import printable
from minivllm.viz.palette import request_letter
from minivllm.viz.terminal import (
    SafeConsole,
    engine_view,
    events,
    kv_bar,
    request_tag,
    shared_blocks,
    step_counts,
    summary_table,
)

if TYPE_CHECKING:
    from minivllm.engine.trace import StepRecord
    from minivllm.llm import LLM

#: Small enough that twelve requests do not fit, and that a long prompt takes several steps.
ENGINE_OPTIONS: dict[str, Any] = {
    "block_size": 16,
    "num_kv_blocks": 48,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 6,
}
#: Seconds that a step stays on the screen; the engine itself is faster than the eye.
PACE = 0.05

SYSTEM = (
    "You are a helpful assistant that explains terms, tells stories and solves small tasks. Answer"
    " in a few sentences. You are the tiny model bundled with minivllm. You are a patient teacher"
    " of LLM inference. Be brief and correct."
)


@dataclass(frozen=True)
class DemoRequest:
    """One line of the demo's script."""

    messages: tuple[tuple[str, str], ...]
    max_tokens: int = 120
    #: The step before which it arrives.
    arrival: int = 0
    n: int = 1

    @property
    def question(self) -> str:
        return self.messages[-1][1]


def _ask(question: str, *, system: bool = False, **options: Any) -> DemoRequest:
    return DemoRequest(((("system", SYSTEM),) if system else ()) + (("user", question),), **options)


_CONVERSATION = (
    ("system", SYSTEM),
    ("user", "What is a KV cache?"),
    (
        "assistant",
        (
            "A KV cache keeps the keys and values of the tokens that the model has read, so that"
            " each new token needs one step of work and not the whole text again. It grows by one"
            " entry per layer and head with every token."
        ),
    ),
    ("user", "What is a block table?"),
    (
        "assistant",
        (
            "A block table lists, for one sequence, the physical blocks that hold its keys and"
            " values, in order. They may lie anywhere in memory, as the pages of a process do."
        ),
    ),
    ("user", "What is prefix caching?"),
)

SCRIPT: tuple[DemoRequest, ...] = (
    _ask("Tell me a story about a fox named Pip and a silver key.", system=True, max_tokens=300),
    _ask("What is continuous batching?", system=True),
    _ask("Count from 1 to 12.", max_tokens=60),
    _ask(
        "Write a story with a penguin and a balloon.", system=True, n=2, max_tokens=300, arrival=2
    ),
    _ask("What is paged attention?", system=True, arrival=4),
    _ask("What is 17 + 25?", max_tokens=30, arrival=6),
    DemoRequest(_CONVERSATION, arrival=10),
    _ask("Tell me a story about a clockmaker and a broken bell.", max_tokens=300, arrival=14),
    _ask("Sort these numbers: 42, 7, 19, 88, 3", max_tokens=40, arrival=18),
    _ask("What is preemption?", system=True, arrival=22),
    DemoRequest(_CONVERSATION[:4], arrival=26),
    _ask("What does the scheduler do?", system=True, arrival=30),
)


def demo(
    model: Model = None,
    pace: Annotated[
        float | None,
        typer.Option(
            help="How many seconds each step stays on the screen, at least; 0 is full speed.",
            min=0.0,
            max=3600.0,
            show_default="0.05",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also save the trace to this file.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Also write a page that plays the run in any browser."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the busiest step into this file, as SVG.")
    ] = None,
    mine: Mine = False,
    engine: Engine = None,
) -> None:
    """Watch the engine serve a batch of prompts: its block tables, its KV cache, and the texts as
    they come.
    """
    if out is not None:
        require_writable(out, "The trace")
    if html is not None:
        require_writable(html, "The page")
    if picture is not None:
        require_writable(picture, "The picture")
    if pace is not None:
        require_number(pace, "--pace")
    console = SafeConsole()
    console.print("Loading the model …", style="dim")
    options = {"trace": True, **ENGINE_OPTIONS}
    llm = open_mine(model, engine, **options).llm if mine else open_llm(model, engine, **options)
    if mine:
        console.print(
            "This engine is your own: the pieces that you wrote, in a loop of the package that lets"
            " requests arrive one after the other.",
            style="bold",
        )
    _show_script(llm, console, pace, picture)
    if out is not None:
        save_trace(llm.trace, out)
    if html is not None:
        save_page(llm.trace, html)


def _show_script(llm: LLM, console: SafeConsole, pace: float | None, picture: Path | None) -> None:
    """Serve `SCRIPT` and show it.

    In a terminal the view is live, and a step stays for at least `pace` seconds (four times that if
    it reads a prompt); elsewhere it is plain lines. picture: where to save the busiest step's view
    as SVG.
    """
    live = console.is_terminal and not console.is_dumb_terminal and "NO_COLOR" not in os.environ
    run = _Run(llm)
    show = _live_view(console, run) if live else _plain_lines(console, run)
    pace = (PACE if live else 0.0) if pace is None else pace
    busiest: tuple[tuple[int, ...], Group] | None = None
    with show as on_step:
        for record in run.steps():
            on_step(record)
            if picture is not None and (busiest is None or _busy(record) > busiest[0]):
                busiest = _busy(record), _still(run, record)
            reads_prompt = any(item.kind == "prefill" for item in record.scheduled)
            time.sleep(max(0.0, (4 * pace if reads_prompt else pace) - record.duration))
    _print_summary(console, run, paced=pace > 0)
    if busiest is not None:
        try:
            write_atomically(picture, _svg(busiest[1]))
        except OSError as error:
            raise ConfigError(
                f"The picture cannot be written to {picture}: {reason(error)}."
            ) from error


_STILL_WIDTH = 104


def _busy(record: StepRecord) -> tuple[int, ...]:
    """How much a step has to show, to be compared: prompts beside decodes first, then running
    requests, events, shared blocks, and a queue.
    """
    prompts = sum(item.kind == "prefill" for item in record.scheduled)
    mixed = 0 < prompts < len(record.scheduled)
    return (
        int(mixed),
        len(record.running),
        bool(events(record)),
        len(shared_blocks(record)),
        len(record.waiting),
    )


def _still(run: _Run, record: StepRecord) -> Group:
    """The view of one step, without what depends on the machine's speed."""
    names = {label: run.letter(label) for label in run.order}
    news = "; ".join(events(record, names))
    return engine_view(
        run.trace,
        record,
        dict(run.texts),
        width=_STILL_WIDTH,
        max_rows=len(record.running),
        news=news,
    )


def _svg(view: Group) -> str:
    """The view as an SVG of a terminal. It uses the reader's fonts: nothing is fetched from the
    web.
    """
    console = SafeConsole(
        record=True,
        width=_STILL_WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(view)
    drawn = console.export_svg(title="minivllm demo", unique_id="demo")
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)


class _Run:
    """`SCRIPT` while it is served, and what the views need to know of it."""

    def __init__(self, llm: LLM) -> None:
        from minivllm.sampling_params import RequestOutputKind, SamplingParams

        self.llm, self.trace = llm, llm.trace
        self._params = [
            SamplingParams(
                n=request.n,
                temperature=0.7,
                max_tokens=request.max_tokens,
                output_kind=RequestOutputKind.DELTA,
            )
            for request in SCRIPT
        ]
        #: "request/index" of every completion, by arrival: gives letters and colours.
        self.order = [
            f"{i}/{index}" for i, request in enumerate(SCRIPT) for index in range(request.n)
        ]
        self.texts = dict.fromkeys(self.order, "")
        self.num_tokens = 0
        self.num_finished = 0
        #: Labels of the completions that ended in the last step.
        self.ended: list[str] = []
        #: Engine seconds (steps only, without the pauses of the view) from arrival to the first
        #: token.
        self.first_token: dict[str, float] = {}
        self.seconds = 0.0

    def letter(self, label: str) -> str:
        return request_letter(self.order.index(label))

    def question(self, label: str) -> str:
        return SCRIPT[int(label.partition("/")[0])].question

    def steps(self) -> Iterator[StepRecord]:
        """Add what arrives, step, and yield the step's record, until everything has finished."""
        engine = self.llm.llm_engine
        to_come = list(enumerate(SCRIPT))
        arrived: dict[str, float] = {}
        step = 0
        while to_come or engine.has_unfinished_requests():
            while to_come and to_come[0][1].arrival <= step:
                i, request = to_come.pop(0)
                messages = [
                    {"role": role, "content": content} for role, content in request.messages
                ]
                engine.add_request(
                    self.llm.render_chat(messages), self._params[i], request_id=str(i)
                )
                arrived[str(i)] = self.seconds
            outputs = engine.step()
            self.seconds = engine.metrics().step_time
            self.ended = []
            for output in outputs:
                self.first_token.setdefault(
                    output.request_id, self.seconds - arrived[output.request_id]
                )
                for completion in output.outputs:
                    label = f"{output.request_id}/{completion.index}"
                    self.texts[label] += (
                        completion.text if output.error is None else f" ({output.error})"
                    )
                    self.num_tokens += len(completion.token_ids)
            record = self.trace.steps[-1]
            self.ended = [label for label in record.finished if label in self.texts]
            self.num_finished += len(self.ended)
            step += 1
            yield record


@contextmanager
def _live_view(console: Console, run: _Run) -> Iterator[Callable[[StepRecord], None]]:
    """Show the engine at the bottom of the screen; finished texts scroll away above it."""
    progress = Progress(
        TextColumn("[bold]minivllm"),
        BarColumn(bar_width=None, complete_style="#56B4E9", finished_style="#009E73"),
        TextColumn(
            "{task.completed}/{task.total} texts · {task.fields[tokens]} tokens ·"
            " {task.fields[speed]:.0f} a second"
        ),
        console=console,
        expand=True,
    )
    names = {label: run.letter(label) for label in run.order}
    recent: deque[str] = deque(maxlen=2)
    task = progress.add_task("", total=len(run.order), tokens=0, speed=0.0)
    with Live(
        console=console, transient=True, auto_refresh=False, vertical_overflow="crop"
    ) as live:

        def on_step(record: StepRecord) -> None:
            for label in run.ended:
                console.print(Group(*_finished_text(run, label)))
            progress.update(
                task,
                completed=run.num_finished,
                tokens=run.num_tokens,
                speed=run.num_tokens / max(run.seconds, 1e-9),
            )
            recent.extend(events(record, names))
            max_rows = max(1, min(run.trace.max_num_seqs, (console.height - 6) // 2))
            view = engine_view(
                run.trace,
                record,
                run.texts,
                width=console.width,
                max_rows=max_rows,
                header=[progress],
                news="; ".join(recent),
            )
            live.update(view, refresh=True)

        yield on_step


@contextmanager
def _plain_lines(console: Console, run: _Run) -> Iterator[Callable[[StepRecord], None]]:
    """Print a line for every step in which something changes, and each text when it is done. No
    colour, no cursor movement.
    """
    names = {label: run.letter(label) for label in run.order}

    def on_step(record: StepRecord) -> None:
        happened = events(record, names)
        if happened or any(item.kind == "prefill" for item in record.scheduled):
            bar = kv_bar(run.trace, record, 60).plain
            line = f"step {record.step:>3}  {step_counts(record):<42} {bar}"
            console.print(Text(line, no_wrap=True), soft_wrap=True)
            for event in happened:
                console.print(Text(f"          {event}"), soft_wrap=True)
        for label in run.ended:
            for text in _finished_text(run, label):
                console.print(text, soft_wrap=True)
            done = round(20 * run.num_finished / len(run.order))
            console.print(
                f"[{'#' * done}{'.' * (20 - done)}] {run.num_finished}/{len(run.order)} texts"
            )

    yield on_step


def _finished_text(run: _Run, label: str) -> list[Text]:
    question = request_tag(run.order.index(label)).append(
        f" {run.question(label)}", style="bold default on default"
    )
    return [question, Text(printable(run.texts[label].strip())), Text()]


def _print_summary(console: Console, run: _Run, paced: bool) -> None:
    metrics, trace = run.llm.metrics(), run.trace
    hits, queries = metrics.prefix_cache_hits, metrics.prefix_cache_queries
    config = run.llm.llm_engine.config
    block_bytes = trace.block_size * trace.kv_bytes_per_token
    rows = [
        (
            "tokens per second",
            f"{metrics.num_generated_tokens / metrics.step_time:.0f}",
            f"{metrics.num_generated_tokens} in {metrics.step_time:.2f} s ({metrics.num_steps}"
            f" steps), {config.device}" + (", pauses left out" if paced else ""),
        ),
        (
            "time to first token",
            f"{1000 * statistics.median(run.first_token.values()):.0f} ms",
            f"median of {len(run.first_token)} requests, queueing included",
        ),
        (
            "blocks used",
            f"{metrics.peak_used_kv_blocks} of {metrics.num_kv_blocks}",
            f"at the peak; each is {trace.block_size} tokens, {block_bytes / 1024:.0f} KiB",
        ),
        (
            "prefix-cache hits",
            f"{hits} tokens",
            f"{100 * hits / max(queries, 1):.0f} % of prompt tokens: not computed again",
        ),
        ("chunks", str(metrics.num_chunks), "parts of prompts too long for one step"),
        ("mixed steps", str(metrics.num_mixed_steps), "read prompts and wrote tokens at once"),
        ("preemptions", str(metrics.num_preemptions), "blocks taken away, computed again later"),
    ]
    console.print(summary_table(rows))
    command = _command()
    console.print(
        f"\n{'Talk with the model':<28} {command} chat\n{'Look closer at this run':<28} {command}"
        f" demo --out trace.json; {command} trace --show"
        f" trace.json\n{'Learn how all of it works':<28} make lab",
        style="dim",
        soft_wrap=True,
    )


def _command() -> str:
    """How to call `minivllm` from here: by its name if it is on PATH, else by its path."""
    beside = Path(sys.executable).with_name("minivllm")
    if shutil.which("minivllm") or not beside.exists():
        return "minivllm"
    return min(str(beside), os.path.relpath(beside), key=len)
