"""The composition of each step: its tokens by kind, against the token budget.

`composition` computes what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from minivllm.engine.trace import Trace
from minivllm.viz import palette
from minivllm.viz.block_table import check_step
from minivllm.viz.figure import describe, plain_axes, prepare, side_legend
from minivllm.viz.timeline import AGAIN, DECODE, PROMPT, is_prompt, name_of, num_again


@dataclass(frozen=True)
class Composition:
    """The tokens of each step.

    The step computes decode + prompt + again; their sum never exceeds the budget.
    """

    budget: int
    decode: list[int]
    prompt: list[int]
    #: Computed before, and lost in a preemption.
    again: list[int]
    #: The unused part of the budget, and the requests that waited nevertheless.
    unused: list[int]
    waiting: list[int]

    def total(self, step: int) -> int:
        """The tokens that the step computes."""
        return self.decode[step] + self.prompt[step] + self.again[step]


def composition(trace: Trace) -> Composition:
    """Count the tokens of each step by kind. Raises IndexError for an empty trace."""
    check_step(trace, 0)
    found = Composition(trace.max_num_batched_tokens, [], [], [], [], [])
    for record, lost in zip(trace.steps, num_again(trace), strict=True):
        decode = sum(item.num_new_tokens for item in record.scheduled if not is_prompt(item))
        again = sum(lost[name_of(item)] for item in record.scheduled if is_prompt(item))
        found.decode.append(decode)
        found.again.append(again)
        found.prompt.append(record.num_tokens - decode - again)
        found.unused.append(trace.max_num_batched_tokens - record.num_tokens)
        found.waiting.append(len(record.waiting))
    return found


def draw_composition(trace: Trace, step: int | None = None, ax: Axes | None = None) -> Figure:
    """Draw the tokens of every step by kind, under the budget, with the numbers of one step.

    step: the step whose numbers are shown; negative steps count from the end; None is the (first)
    step with the most tokens. ax: draw there instead of on a new figure. Returns the figure; it
    displays itself, with a caption in words.
    """
    made = composition(trace)
    count = len(made.decode)
    step = max(range(count), key=made.total) if step is None else check_step(trace, step)
    own = ax is None
    figure, ax = prepare(ax, 3.2)
    if own:
        ax.set_position((0.075, 0.155, 0.65, 0.7))
    edges = [float(i) for i in range(count + 1)]
    bottom = [0] * count
    for values, color, hatch in (
        (made.decode, DECODE, ""),
        (made.prompt, PROMPT, ""),
        (made.again, AGAIN, "xxxx"),
    ):
        top = [b + v for b, v in zip(bottom, values, strict=True)]
        style = {"hatch": hatch, "edgecolor": palette.PAPER} if hatch else {}
        ax.stairs(top, edges, baseline=bottom, fill=True, linewidth=0, facecolor=color, **style)
        bottom = top
    highest = max(bottom)
    # A line far above the bars would make all bars too flat to read.
    beyond = made.budget > 3 * highest
    if not beyond:
        ax.axhline(made.budget, color=palette.RESERVED, linewidth=2, linestyle=(0, (4, 2)))
    ax.axvline(step + 0.5, color=palette.INK, linewidth=1.2)
    _style(ax, count, 1.12 * (highest if beyond else max(made.budget, highest)))
    _key(ax, made, step)
    describe(
        figure,
        f"Chart: the tokens of each of {count} steps, by kind, and the budget."
        f" {_in_words(made, step)}",
        _caption(made, step),
    )
    return figure


def _style(ax: Axes, count: int, top: float) -> None:
    ax.set(xlim=(0, count), ylim=(0, top))
    ax.set_title(
        "What each step is made of", loc="left", fontsize=12, weight="bold", color=palette.INK
    )
    ax.set_xlabel("step", fontsize=9.5, color=palette.SOFT_INK)
    ax.set_ylabel("tokens", fontsize=9.5, color=palette.SOFT_INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    plain_axes(ax)


def _key(ax: Axes, made: Composition, step: int) -> None:
    """The legend, with the numbers of one step, right of the axes."""
    again = Patch(facecolor=AGAIN, hatch="xxxx", edgecolor=palette.PAPER, linewidth=0)
    entries = [
        (
            Line2D([], [], color=palette.RESERVED, linewidth=2, linestyle=(0, (4, 2))),
            "the budget",
            made.budget,
        ),
        (again, "computed again", made.again[step]),
        (Patch(facecolor=PROMPT), "of prompts", made.prompt[step]),
        (Patch(facecolor=DECODE), "decodes", made.decode[step]),
    ]
    if not any(made.again):
        del entries[1]
    side_legend(
        ax,
        [handle for handle, _, _ in entries],
        [f"{number:,}  {name}" for _, name, number in entries],
        f"Tokens of step {step}",
    )


def _caption(made: Composition, step: int) -> str:
    kinds = {
        "decodes": made.decode[step],
        "prompt tokens": made.prompt[step],
        "tokens computed again": made.again[step],
    }
    present = [kind for kind, tokens in kinds.items() if tokens]
    if len(present) > 1:
        return f"Step {step} mixes {', '.join(present[:-1])} and {present[-1]}."
    return f"Step {step} holds {present[0]} only." if present else f"Step {step} holds nothing."


def _in_words(made: Composition, step: int) -> str:
    text = (
        f"Step {step}: {made.total(step):,} tokens of at most {made.budget:,}:"
        f" {made.decode[step]:,} decoded, {made.prompt[step]:,} of prompts"
    )
    if any(made.again):
        text += f", {made.again[step]:,} computed again"
    mixed = sum(
        d > 0 and p + a > 0 for d, p, a in zip(made.decode, made.prompt, made.again, strict=True)
    )
    return (
        f"{text}. {mixed} of {len(made.decode)} steps compute prompt tokens and decodes together."
    )
