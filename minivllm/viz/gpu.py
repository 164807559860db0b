"""Pictures of a GPU: the parts of one (`draw_gpu`), and what kernels reach on it (`draw_variants`).

`Gpu` holds the numbers, so that a page can calculate with what its picture shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minivllm.viz import palette
from minivllm.viz.figure import WIDTH, Box, describe, prepare


@dataclass(frozen=True)
class Gpu:
    """What a GPU has of each part, as its maker specifies it. All sizes are bytes."""

    name: str
    multiprocessors: int
    #: Registers have 32 bits.
    registers_per_multiprocessor: int
    registers_per_thread: int
    shared_per_multiprocessor: int
    #: The most that one program may use.
    shared_per_program: int
    tensor_cores_per_multiprocessor: int
    l2: int
    memory: int
    memory_bytes_per_second: float
    #: Products of 16-bit matrices, on the tensor cores.
    matmul_flops_per_second: float
    threads_per_warp: int = 32

    @property
    def registers(self) -> int:
        """Bytes of all registers together."""
        return 4 * self.multiprocessors * self.registers_per_multiprocessor

    @property
    def shared(self) -> int:
        """Bytes of all shared memory together."""
        return self.multiprocessors * self.shared_per_multiprocessor


#: Sources: NVIDIA's data sheet of the H200 (memory, rates) and its tuning guide for Hopper GPUs
#: (the multiprocessor, L2). Some tools report 60 MB of L2 for an H200.
H200 = Gpu(
    name="H200",
    multiprocessors=132,
    registers_per_multiprocessor=65_536,
    registers_per_thread=255,
    shared_per_multiprocessor=228 * 1024,
    shared_per_program=227 * 1024,
    tensor_cores_per_multiprocessor=4,
    l2=50_000_000,
    memory=141_000_000_000,
    memory_bytes_per_second=4.8e12,
    matmul_flops_per_second=989e12,
)

#: What keeps numbers, and what computes with them.
_KEEPS = palette.tint(palette.USED, 0.35)
_COMPUTES = palette.tint(palette.WASTED, 0.55)
_SMS_ABREAST, _SM_PITCH, _SM_SIDE = 22, 0.2, 0.15


# --- the parts ------------------------------------------------------------------------------------


def draw_gpu(gpu: Gpu = H200, ax: Axes | None = None) -> Figure:
    """Draw the chip with its multiprocessors, L2 cache and memory; beside it, one multiprocessor.

    Blue parts keep numbers, orange parts compute. Sizes are not drawn to scale. ax: draw there
    instead of on a new figure.
    """
    height = 4.3
    figure, ax = prepare(ax, height)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(height, 0)
    ax.set_axis_off()
    title = f"The parts of an {gpu.name}"
    ax.text(0.1, 0.2, title, fontsize=12, weight="bold", color=palette.INK, va="center")
    for x, color, words in ((2.6, _KEEPS, "keeps numbers"), (4.1, _COMPUTES, "computes")):
        _part(ax, Box(x, 0.12, 0.18, 0.16), color)
        ax.text(x + 0.25, 0.2, words, fontsize=9, color=palette.INK, va="center")
    chip, inside = Box(0.1, 0.45, 4.7, 2.75), Box(5.4, 0.45, 3.5, 3.7)
    chosen = _draw_chip(ax, gpu, chip)
    for y, end in ((chosen.y, inside.y), (chosen.y + _SM_SIDE, inside.y + inside.height)):
        line = [chosen.x + _SM_SIDE, inside.x], [y, end]
        ax.plot(*line, color=palette.SOFT_INK, linewidth=0.8, linestyle=(0, (3, 2)))
    _draw_multiprocessor(ax, gpu, inside)
    describe(
        figure,
        f"Picture: the parts of an {gpu.name}: {gpu.multiprocessors} multiprocessors, an L2 cache"
        f" of {gpu.l2 / 1e6:.0f} MB, {gpu.memory / 1e9:.0f} GB of device memory; and one"
        f" multiprocessor: {gpu.registers_per_multiprocessor:,} registers,"
        f" {gpu.shared_per_multiprocessor // 1024} KiB of shared memory,"
        f" {gpu.tensor_cores_per_multiprocessor} tensor cores.",
        "The chip on the left; on the right, one of its multiprocessors, enlarged.",
    )
    return figure


def _draw_chip(ax: Axes, gpu: Gpu, chip: Box) -> Box:
    """Draw the chip and the memory below it; returns the multiprocessor that is enlarged."""
    _part(ax, chip, palette.FREE)
    words = f"{gpu.multiprocessors} multiprocessors (SMs)"
    ax.text(chip.x + 0.15, chip.y + 0.2, words, fontsize=9.5, color=palette.INK, va="center")
    chosen = chip
    for index in range(gpu.multiprocessors):
        row, column = divmod(index, _SMS_ABREAST)
        x, y = chip.x + 0.17 + column * _SM_PITCH, chip.y + 0.4 + row * _SM_PITCH
        place = Box(x, y, _SM_SIDE, _SM_SIDE)
        last_of_first_row = index == min(_SMS_ABREAST, gpu.multiprocessors) - 1
        _part(ax, place, _COMPUTES, palette.INK if last_of_first_row else palette.LINE)
        chosen = place if last_of_first_row else chosen
    cache = Box(chip.x + 0.17, chip.y + 1.95, chip.width - 0.34, 0.6)
    _part(ax, cache, _KEEPS, text=f"L2 cache, one for all: {gpu.l2 / 1e6:.0f} MB")
    memory = Box(chip.x, chip.y + chip.height + 0.4, chip.width, 0.55)
    _part(ax, memory, _KEEPS, text=f"device memory: {gpu.memory / 1e9:.0f} GB")
    x, top = chip.x + 0.6, chip.y + chip.height
    arrow = {"arrowstyle": "<->", "color": palette.INK, "linewidth": 1.4}
    ax.annotate("", (x, memory.y), (x, top), arrowprops=arrow)
    rate = f"{gpu.memory_bytes_per_second / 1e12:.1f} TB/s, by the data sheet"
    ax.text(x + 0.15, (top + memory.y) / 2, rate, fontsize=9, color=palette.INK, va="center")
    return chosen


def _draw_multiprocessor(ax: Axes, gpu: Gpu, place: Box) -> None:
    """Draw one multiprocessor from the inside."""
    _part(ax, place, palette.FREE)
    left, width = place.x + 0.15, place.width - 0.3
    small = {"fontsize": 9.5, "color": palette.INK, "va": "center"}
    ax.text(left, place.y + 0.2, "one multiprocessor", **small)
    ax.text(left, place.y + 0.52, f"warps: {gpu.threads_per_warp} threads each", **small)
    pitch = width / gpu.threads_per_warp
    for row in range(4):
        for thread in range(gpu.threads_per_warp):
            tick = Box(left + thread * pitch, place.y + 0.68 + 0.14 * row, 0.7 * pitch, 0.1)
            _part(ax, tick, _COMPUTES)
    count = gpu.tensor_cores_per_multiprocessor
    ax.text(left, place.y + 1.45, f"{count} tensor cores: products of small matrices", **small)
    for core in range(count):
        pitch = (width + 0.1) / count
        _part(ax, Box(left + core * pitch, place.y + 1.6, pitch - 0.1, 0.4), _COMPUTES)
    registers = gpu.registers_per_multiprocessor
    text = f"{registers:,} registers of 32 bits: {registers * 4 // 1024} KiB"
    _part(ax, Box(left, place.y + 2.2, width, 0.6), _KEEPS, text=text)
    text = f"shared memory: {gpu.shared_per_multiprocessor // 1024} KiB"
    _part(ax, Box(left, place.y + 2.95, width, 0.6), _KEEPS, text=text)


def _part(ax: Axes, place: Box, color: str, edge: str = palette.LINE, text: str = "") -> None:
    """Draw one part: a rectangle with a name in its middle."""
    style = {"facecolor": color, "edgecolor": edge, "linewidth": 0.8 if edge == palette.LINE else 2}
    ax.add_patch(Rectangle(place.corner, place.width, place.height, **style))
    if text:
        words = {"fontsize": 9.5, "color": palette.INK, "ha": "center", "va": "center"}
        ax.text(*place.center, text, **words)


# --- what kernels reach ---------------------------------------------------------------------------

#: The first implementation of a comparison stands out; the others are paler.
_VARIANTS = (palette.USED, palette.tint(palette.SOFT_INK, 0.75), palette.tint(palette.INK, 0.3))


def draw_variants(
    cases: Mapping[str, Mapping[str, float]],
    unit: str,
    limit: float | None = None,
    limit_name: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Draw a group of bars for each case: the speed of each implementation.

    cases: case -> implementation -> speed. There are at most three implementations; a case may lack
    some of them. unit: of the speeds. limit: a speed to mark by a line, with
    its name. ax: draw there instead of on a new figure.
    """
    names = list(dict.fromkeys(name for row in cases.values() for name in row))
    own, bar, gap = ax is None, 0.2, 0.16
    group = bar * len(names) + gap
    figure, ax = prepare(ax, 0.95 + group * len(cases))
    if own:
        height = figure.get_figheight()
        ax.set_position((0.19, 0.4 / height, 0.77, 1 - 0.9 / height))
    longest = max([limit or 0, *(speed for row in cases.values() for speed in row.values())])
    for index, row in enumerate(cases.values()):
        for place, name in enumerate(names):
            y, color = index * group + place * bar, _VARIANTS[place]
            _draw_speed(ax, y, row.get(name), color, limit, longest)
    middle = bar * (len(names) - 1) / 2
    ticks = [index * group + middle for index in range(len(cases))]
    ax.set_yticks(ticks, list(cases), fontsize=9.5, color=palette.INK)
    ax.set_ylim(len(cases) * group - gap, -gap)
    ax.set_xlim(0, longest * 1.1)
    if limit is not None:
        ax.axvline(limit, color=palette.RESERVED, linewidth=1.6)
    ax.set_facecolor(palette.PAPER)
    ax.set_xlabel(unit, fontsize=9.5, color=palette.SOFT_INK)
    ax.tick_params(colors=palette.SOFT_INK, labelsize=9, length=0)
    ax.tick_params(axis="y", labelcolor=palette.INK, labelsize=9.5)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(palette.LINE)
    _name_variants(ax, names, limit_name if limit is not None else "")
    said = "; ".join(
        f"{case}: " + ", ".join(f"{name} {_spoken(speed)}" for name, speed in row.items())
        for case, row in cases.items()
    )
    longest_bar = max(cases, key=lambda case: cases[case].get(names[0], 0.0))
    describe(
        figure,
        f"Chart: bars of {', '.join(names)} in {len(cases)} cases, in {unit}. {said}.",
        f"The longest bar of “{names[0]}”: {longest_bar}.",
    )
    return figure


def _draw_speed(
    ax: Axes, y: float, speed: float | None, color: str, limit: float | None, longest: float
) -> None:
    """Draw one bar with its number; a dash where an implementation has no number."""
    text = {"va": "center", "fontsize": 8.5, "color": palette.INK}
    if speed is None:
        ax.text(longest * 0.008, y, "–", **text)
        return
    ax.barh(y, speed, 0.17, color=color)
    beside = speed + longest * 0.008
    if limit is not None and speed < limit < beside + longest * 0.04:
        # The line of the limit would cross the number.
        text |= {"color": palette.text_on(color), "ha": "right"}
        beside = speed - longest * 0.008
    ax.text(beside, y, _spoken(speed), **text)


def _name_variants(ax: Axes, names: list[str], limit_name: str) -> None:
    """Draw the legend above the bars."""
    handles: list = [
        Rectangle((0, 0), 1, 1, facecolor=color) for color, _ in zip(_VARIANTS, names, strict=False)
    ]
    labels = list(names)
    if limit_name:
        handles.append(ax.plot([], [], color=palette.RESERVED, linewidth=1.6)[0])
        labels.append(limit_name)
    ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(labels),
        frameon=False,
        fontsize=9.5,
        labelcolor=palette.INK,
        handlelength=1.3,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


def _spoken(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
