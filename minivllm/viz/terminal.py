"""Pictures for a terminal, as rich renderables: block tables, KV memory, and a trace as a table.

Every cell shows its meaning twice, by colour and by a character, so that no reader depends on
colours. Names and texts from outside are made safe here, and once more by `SafeConsole`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from minivllm.text import one_line, printable
from minivllm.viz.palette import CACHED, DARK_TEXT, request_color, request_letter, text_on

if TYPE_CHECKING:
    from minivllm.engine.trace import StepRecord, Trace

#: How full a block is, in eighths.
FILL = " ▁▂▃▄▅▆▇█"
USED_CELL, CACHED_CELL, FREE_CELL = "█", "▒", "·"
USED_STYLE, CACHED_STYLE, FREE_STYLE = "#56B4E9", "#E69F00", "dim"
SHARED_STYLE = f"{DARK_TEXT} on {CACHED}"
SHARED_MARK = "="


class SafeConsole(Console):
    """A console for untrusted text.

    No text controls the terminal, and "[red]" is a word like others.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            # Control segments are rich's own: they move the cursor of a live view.
            yield segment if control else Segment(printable(text), style)


def shared_blocks(record: StepRecord) -> set[int]:
    """Blocks that stand in more than one block table."""
    counts = Counter(block for table in record.block_tables.values() for block in table)
    return {block for block, count in counts.items() if count > 1}


def used_blocks(trace: Trace, record: StepRecord) -> int:
    """The number of blocks that running requests hold."""
    return trace.num_blocks - record.num_free_blocks


def block_table_cells(
    trace: Trace, record: StepRecord, label: str, color: str, shared: set[int], max_cells: int
) -> Text:
    """One sequence's block table: one cell per block.

    A cell shows the block's id; then "=" if the block is shared, or how full it is if it is not
    full. shared: `shared_blocks(record)`. max_cells: where there are more blocks than that, a
    number replaces the first ones.
    """
    table, computed = record.block_tables[label], record.num_computed_tokens[label]
    width = len(str(trace.num_blocks - 1))
    text = Text(no_wrap=True, overflow="crop")
    first = 0
    if len(table) > max_cells:
        first = len(table) - max_cells + 1
        text.append(f"+{first}".rjust(width + 1), style="dim").append(" ")
    for position in range(first, len(table)):
        block = table[position]
        filled = min(max(computed - position * trace.block_size, 0), trace.block_size)
        mark = (
            FILL[max(1, 8 * filled // trace.block_size)] if 0 < filled < trace.block_size else " "
        )
        if block in shared:
            text.append(f"{block:>{width}}{SHARED_MARK}", style=SHARED_STYLE)
        elif filled:
            text.append(f"{block:>{width}}{mark}", style=f"{text_on(color)} on {color}")
        else:
            text.append(f"{block:>{width}} ", style=f"{color} dim")
        text.append(" ")
    return text


def request_tag(index: int) -> Text:
    """The letter of the index-th request on its colour.

    It is readable on dark and on light terminals.
    """
    color = request_color(index)
    return Text(f"{request_letter(index):^3}", style=f"bold {text_on(color)} on {color}")


def kv_bar(trace: Trace, record: StepRecord, width: int) -> Text:
    """The KV pool as one bar of at most `width` cells, with the counts.

    The bar shows used blocks, free blocks with cached content, and other free blocks.
    """
    used, cached = used_blocks(trace, record), len(record.cached_blocks)
    free = record.num_free_blocks - cached
    counts = ((used, USED_CELL, USED_STYLE, "used"), (cached, CACHED_CELL, CACHED_STYLE, "cached"))
    counts += ((free, FREE_CELL, FREE_STYLE, "free"),)
    legend = Text()
    for count, cell, style, name in counts:
        legend.append(f"  {cell} ", style=style).append(f"{count:>3} {name}")
    cells = min(trace.num_blocks, max(10, width - len(legend)))
    bar, edge = Text(no_wrap=True, overflow="crop"), 0
    total = 0
    for count, cell, style, _ in counts:
        total += count
        new_edge = round(total * cells / trace.num_blocks)
        bar.append(cell * (new_edge - edge), style=style)
        edge = new_edge
    return bar.append_text(legend)


def step_counts(record: StepRecord) -> str:
    """What a step computed, in words: ``2 prompts (1 chunk) + 4 decodes = 53 tokens``."""
    prompts = [item for item in record.scheduled if item.kind == "prefill"]
    chunks = sum(not item.samples for item in prompts)
    parts = []
    if prompts:
        note = f" ({_count(chunks, 'chunk')})" if chunks else ""
        parts.append(_count(len(prompts), "prompt") + note)
    if num_decodes := len(record.scheduled) - len(prompts):
        parts.append(_count(num_decodes, "decode"))
    return f"{' + '.join(parts) or 'nothing'} = {_count(record.num_tokens, 'token')}"


def events(record: StepRecord, name: Mapping[str, str] | None = None) -> list[str]:
    """What changed in a step: admissions with their prefix hits, preemptions, ends.

    name: the label for each "request/index"; without it, the request's id (and the index, if there
    are several).
    """
    found = []
    for item in record.scheduled:
        if item.num_cached_tokens:
            label = _name(f"{item.request_id}/{item.index}", name)
            found.append(
                f"{label} takes {_count(item.num_cached_tokens, 'token')} from the prefix cache"
            )
    found += [f"{_name(label, name)} preempted" for label in record.preempted]
    found += [f"{_name(label, name)} done" for label in record.finished]
    return found


def engine_view(
    trace: Trace,
    record: StepRecord,
    tails: Mapping[str, str],
    *,
    width: int,
    max_rows: int = 8,
    header: Iterable[RenderableType] = (),
    news: str = "",
) -> Group:
    """The engine at one step: KV bar, what the step computed, and two lines per running sequence.

    tails: the text so far of every "request/index", in order of arrival, which determines letters
    and colours. header: shown at the top. news: a line about the latest event.
    """
    shared = shared_blocks(record)
    rank = {label: i for i, label in enumerate(tails)}
    state = Text(no_wrap=True, overflow="ellipsis")
    state.append(f"step {record.step:<4}", style="bold").append(step_counts(record))
    state.append(f"   running {len(record.running)}, waiting {len(record.waiting)}", style="dim")
    rows = Table.grid(padding=(0, 1))
    rows.add_column(width=3)
    rows.add_column(no_wrap=True, overflow="crop")
    cell = len(str(trace.num_blocks - 1)) + 2
    for label in record.running[:max_rows]:
        color = request_color(rank.get(label, 0))
        letter = request_tag(rank.get(label, 0))
        rows.add_row(
            letter, block_table_cells(trace, record, label, color, shared, (width - 4) // cell)
        )
        rows.add_row(
            "", Text(tail(tails.get(label, ""), width - 5) or "…", style="dim", no_wrap=True)
        )
    for _ in range(max_rows - len(record.running)):
        rows.add_row("", "")
        rows.add_row("", "")
    legend = Text(no_wrap=True, overflow="ellipsis", style="dim")
    legend.append(f"A cell is a block of {trace.block_size} tokens; ").append(
        f"7{SHARED_MARK}", style=SHARED_STYLE
    )
    legend.append(" is shared by several requests; ▄ is how full the last one is.")
    bar = Text("KV   ").append_text(kv_bar(trace, record, width - 5))
    return Group(
        *header, bar, state, Text(f"     {news}", no_wrap=True, overflow="ellipsis"), rows, legend
    )


def tail(text: str, width: int) -> str:
    """The end of a text on one line of `width` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= width else "…" + line[-(width - 1) :]


def summary_table(rows: Sequence[tuple[str, str, str]], title: str = "") -> Table:
    """A table of (what, value, what it means)."""
    table = Table(
        title=title or None, box=None, padding=(0, 2, 0, 0), show_header=False, title_justify="left"
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right", style="bold")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def step_table(trace: Trace, every_step: bool = False) -> Table:
    """The trace as a table, one row per step.

    Consecutive steps that do the same and change nothing share a row.
    """
    title = (
        f"{one_line(trace.model)}: {trace.num_blocks} blocks of {trace.block_size} tokens,"
        f" {trace.num_blocks * trace.block_size * trace.kv_bytes_per_token / 2**20:.1f} MiB; a step"
        f" takes at most {trace.max_num_batched_tokens} tokens of {trace.max_num_seqs} sequences"
    )
    table = Table(
        title=Text(title, style="italic"),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
    for name in ("step", "ms", "run", "wait", "used", "cached", "free"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what it computed, and what changed", overflow="fold")
    several = {
        item.request_id for record in trace.steps for item in record.scheduled if item.index > 0
    }
    names = {
        label: label if label.rpartition("/")[0] in several else label.rpartition("/")[0]
        for record in trace.steps
        for label in (*record.running, *record.finished, *record.preempted)
    }
    for _, group in groupby(trace.steps, key=lambda record: _row_key(record, every_step)):
        records = list(group)
        first, last = records[0], records[-1]
        cached = len(last.cached_blocks)
        times = "" if first is last else f", {len(records)} times"
        changes = [
            step_counts(last) + times,
            *(f"request {event}" for event in events(last, names)),
        ]
        table.add_row(
            str(first.step) if first is last else f"{first.step}–{last.step}",
            f"{1000 * sum(record.duration for record in records):.1f}",
            str(len(last.running)),
            str(len(last.waiting)),
            str(used_blocks(trace, last)),
            str(cached),
            str(last.num_free_blocks - cached),
            Text("; ".join(changes)),
        )
    return table


def _row_key(record: StepRecord, every_step: bool) -> object:
    quiet = (
        not every_step
        and not events(record)
        and all(item.kind == "decode" for item in record.scheduled)
    )
    return (tuple(record.running), len(record.waiting)) if quiet else record.step


def _name(label: str, name: Mapping[str, str] | None) -> str:
    return one_line(name[label] if name and label in name else label.removesuffix("/0"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
