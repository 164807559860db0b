"""Where the course's notebooks are, and what their cells are for.

The metadata of a cell names its role: ``{"minivllm": {kind: id}}`` with kind "statement",
"exercise" (the answer) or "check". All other cells are given. A notebook in exercises/ names its
chapter in its own metadata, so that a copy under another name is recognized. Cells are matched by
their ids, which Jupyter keeps.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from minivllm.errors import MiniVLLMError

if TYPE_CHECKING:
    from nbformat import NotebookNode

#: The repository's folders with notebooks that are committed with their outputs.
FOLDERS = ("notebooks", "solutions")
KINDS = ("statement", "exercise", "check")
#: The metadata of a committed notebook: nothing about the machine that it ran on.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
#: Metadata of cells that are about one run or one browser.
CELL_STATE = ("execution", "collapsed", "scrolled", "trusted")
DIGESTS = Path(__file__).parent / "published"
_EFFORT = re.compile(r"^\s*([●○]+)\s*·\s*(\d+) minutes?\s*$", re.MULTILINE)


class CourseNotFoundError(MiniVLLMError, FileNotFoundError):
    """The notebooks are missing: this is not the repository, or the chapter does not exist."""


class ChangedSolutionError(MiniVLLMError):
    """The notebook in solutions/ differs from the published one.

    Answers cannot be checked by such a notebook.
    """


class JupyterMissingError(MiniVLLMError, ImportError):
    """Notebooks cannot be read or run: Jupyter is not installed or does not start."""


def find_root(start: Path | None = None) -> Path:
    """The nearest folder at or above start that has solutions/ and exercises/ in it.

    start: the working directory by default. If there is no such folder, the repository that this
    package stands in is returned. CourseNotFoundError where that has no notebooks either.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents, Path(__file__).resolve().parents[2]):
        if (folder / "solutions").is_dir() and (folder / "exercises").is_dir():
            return folder
    raise CourseNotFoundError(
        "The course's notebooks are not here: minivllm is installed without them. Clone its"
        " repository, and run this in it."
    )


def read(path: Path) -> NotebookNode:
    """Read a notebook in the current format. CourseNotFoundError if it is missing or unreadable."""
    try:
        import nbformat
    except ImportError as error:
        raise JupyterMissingError(f"Notebooks need Jupyter ({error}): make lab") from error

    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        for cell in notebook.cells:
            _ = cell.cell_type, cell.source.encode(), cell.metadata.items()
        return notebook
    except FileNotFoundError as error:
        raise CourseNotFoundError(f"{path.parent.name}/{path.name} is missing.") from error
    except Exception as error:  # nbformat raises many types of error.
        raise CourseNotFoundError(
            f"{path.parent.name}/{path.name} is not a notebook that can be read ({error})."
        ) from error


def as_committed(path: Path) -> tuple[str | None, str]:
    """Return the text of a notebook to judge by the rules, and a note.

    The note is "", or it says why the text is not the file's own. A learner runs notebooks again
    and saves them with other outputs, or writes new notebooks. So where git knows the file, the
    committed text is returned; where git does not know it, None. Without git, the file's own text
    is returned.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    here = {
        "cwd": path.parent,
        "capture_output": True,
        "text": True,
        "encoding": "utf-8",
        "check": False,
    }
    try:
        known = subprocess.run(["git", "ls-files", "--cached", "--", path.name], **here)
        committed = subprocess.run(["git", "show", f"HEAD:./{path.name}"], **here)
    except OSError:
        return text, ""
    shown = f"{path.parent.name}/{path.name}"
    # This is not a repository.
    if known.returncode:
        return text, ""
    if not known.stdout:
        return None, f"{shown} is not in git, and was left out."
    if committed.returncode or committed.stdout == text:
        return text, ""
    restore = f"To have that again: git checkout -- {shown}"
    return committed.stdout, f"{shown} was changed; its committed copy was tested. {restore}"


def role(cell: NotebookNode) -> tuple[str, str]:
    """The kind of a cell and its exercise's id; ("given", "") for a cell of no other kind."""
    ours = cell.metadata.get("minivllm", {})
    return next(((kind, str(ours[kind])) for kind in KINDS if kind in ours), ("given", ""))


@dataclass(frozen=True)
class Chapter:
    """The files of one chapter.

    name: for example "01_online_softmax".
    """

    root: Path
    name: str

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def notebook(self) -> Path:
        return self.root / "notebooks" / f"{self.name}.ipynb"

    @property
    def exercises(self) -> Path:
        return self.root / "exercises" / f"{self.name}.ipynb"

    @property
    def solution_path(self) -> Path:
        return self.root / "solutions" / f"{self.name}.ipynb"

    @property
    def digests(self) -> Path:
        return DIGESTS / f"ch{self.number}.json"

    @cached_property
    def solution(self) -> NotebookNode:
        """The solution's notebook. ChangedSolutionError where it is missing or cannot be read."""
        try:
            return read(self.solution_path)
        except CourseNotFoundError as error:
            raise ChangedSolutionError(
                f"{error} Restore it: git checkout -- solutions/{self.name}.ipynb"
            ) from error

    @property
    def reading_minutes(self) -> int:
        """The reading time at the top of the chapter's notebook ("about 50 minutes"), in minutes.

        0 where there is no notebook.
        """
        try:
            cells = read(self.notebook).cells[:5]
        except CourseNotFoundError:
            return 0
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        said = re.search(r"(\d+|five)\s+minutes|\ban hour\b", text)
        if not said:
            return 0
        return 60 if said[1] is None else 5 if said[1] == "five" else int(said[1])

    @cached_property
    def statements(self) -> list[Statement]:
        return [
            Statement.parse(id, cell.source)
            for cell in self.solution.cells
            for kind, id in [role(cell)]
            if kind == "statement"
        ]


@dataclass(frozen=True)
class Statement:
    """What the statement of an exercise says.

    hints: in order, from a small hint to nearly the answer.
    """

    id: str
    title: str
    difficulty: str
    minutes: int
    hints: tuple[str, ...]

    @staticmethod
    def parse(id: str, text: str) -> Statement:
        title = re.search(r"^#+\s*(?:[\d.]+\s*·\s*)?(.+)$", text, re.MULTILINE)
        effort = _EFFORT.search(text)
        hints = re.findall(r"<details>\s*<summary>.*?</summary>(.*?)</details>", text, re.DOTALL)
        return Statement(
            id,
            title[1].strip() if title else id,
            effort[1] if effort else "",
            int(effort[2]) if effort else 0,
            tuple(hint.strip() for hint in hints),
        )


@dataclass(frozen=True)
class Stop:
    """A chapter's place on the map of the course.

    needs: the chapters to read before this one. helps: chapters that are good to know. reading,
    exercises: minutes, filled in by `road`; 0 where there is nothing to read or to do, or nothing
    yet.
    """

    name: str
    part: str
    #: What the reader does, in a few words.
    about: str
    needs: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()
    reading: int = 0
    exercises: int = 0

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def title(self) -> str:
        return _TITLES.get(self.number, self.name[3:].replace("_", " "))


_TITLES = {
    "00": "the tour",
    "03": "paged KV cache",
    "06": "Qwen3",
    "08": "CUDA graphs",
    "11": "using minivllm",
}
ROAD = (
    Stop("00_tour", "begin", "generate, and look inside"),
    Stop("01_online_softmax", "kernels", "attention without ever seeing a whole row"),
    Stop("02_flash_attention", "kernels", "why the N² matrix is never written down", ("01",)),
    Stop(
        "03_paged_kv_cache", "kernels", "the block table, in memory and in a kernel", ("01", "02")
    ),
    Stop("04_block_manager", "plain Python", "sharing, hashing, evicting", ("03",)),
    Stop("05_scheduler", "plain Python", "who runs in the next step, and who waits", ("03", "04")),
    Stop("06_qwen3", "model", "the model, layer by layer, from its checkpoint", ("01", "03")),
    Stop(
        "07_engine", "engine", "the loop that ties it together, and sampling", ("03", "05"), ("06",)
    ),
    Stop("08_cuda_graphs", "engine", "where a GPU's time goes when nothing computes", ("03", "05")),
    Stop("09_tensor_parallel", "engine", "one model on several GPUs", ("03", "05", "06", "07")),
    Stop("10_measuring", "use", "how fast it is, and how fast it could be", ("07",), ("08",)),
    Stop("11_using_minivllm", "use", "every option, with an example", ("07",)),
    Stop("12_serving", "use", "many clients, one engine", ("05", "07")),
    Stop("13_speculative_decoding", "use", "several tokens per step", ("07", "08")),
    Stop("14_quantization", "use", "fewer bits per number", ("03", "06")),
    Stop("15_a_fleet", "use", "many engines, one service", ("04", "12")),
)


#: The modules of the package that a chapter teaches. Each module names its chapter, and the
#: chapter's notebook links to the module.
MODULES = {
    "01": ("kernels/online_softmax.py",),
    "02": ("kernels/flash_attention.py",),
    "03": ("kernels/kv_cache.py", "kernels/paged_attention.py", "layers/attention.py"),
    "04": ("engine/block_manager.py",),
    "05": (
        "engine/scheduler.py",
        "engine/sequence.py",
        "course/sim/simulator.py",
        "course/sim/overlap.py",
    ),
    "06": (
        "models/qwen3.py",
        "models/loader.py",
        "kernels/norm.py",
        "kernels/rotary.py",
        "kernels/activation.py",
        "layers/norm.py",
        "layers/rotary.py",
    ),
    "07": (
        "engine/engine_core.py",
        "engine/input_processor.py",
        "engine/output_processor.py",
        "engine/llm_engine.py",
        "engine/model_runner.py",
        "engine/sampler.py",
        "kernels/sampling.py",
        "engine/batch.py",
        "tokenizer.py",
    ),
    "08": ("engine/cuda_graphs.py", "engine/mixed_graphs.py", "course/sim/streams.py"),
    "09": (
        "parallel/group.py",
        "parallel/launch.py",
        "layers/linear.py",
        "layers/embedding.py",
        "course/sim/ranks.py",
    ),
    "10": ("bench/costs.py", "bench/roofline.py", "bench/latency.py", "bench/breakdown.py"),
    "11": (
        "llm.py",
        "config.py",
        "sampling_params.py",
        "outputs.py",
        "engine/trace.py",
        "errors.py",
    ),
    "12": ("serving/async_llm.py", "serving/core_loop.py", "bench/loads.py", "bench/served.py"),
    "13": ("engine/speculation.py", "engine/draft_model.py"),
    "14": (
        "kernels/quantized.py",
        "layers/quantization.py",
        "models/quantization_config.py",
        "bench/quality.py",
    ),
    "15": (
        "serving/replicas/routing.py",
        "serving/replicas/prefixes.py",
        "bench/conversations.py",
        "course/sim/fleet.py",
        "course/sim/apart.py",
    ),
}


def road(root: Path) -> list[Stop]:
    """The map of the course, with the minutes from its notebooks and exercises.

    A chapter that is not in root has 0 minutes.
    """
    stops = []
    for stop in ROAD:
        chapter = Chapter(root, stop.name)
        there = chapter.solution_path.exists()
        exercises = sum(statement.minutes for statement in chapter.statements) if there else 0
        stops.append(replace(stop, reading=chapter.reading_minutes, exercises=exercises))
    return stops


def is_kept(path: Path) -> bool:
    """Whether `minivllm course reset` set this file aside."""
    return ".kept-" in path.name


def chapters(root: Path) -> list[Chapter]:
    """All chapters that have a solution, in order."""
    return [
        Chapter(root, path.stem) for path in sorted((root / "solutions").glob("[0-9][0-9]_*.ipynb"))
    ]


def compared_text(cell: NotebookNode) -> str:
    """The text that a check cell printed on stdout."""
    return "".join(
        o.get("text", "") for o in cell.get("outputs", []) if o.get("name") == "stdout"
    ).strip()
