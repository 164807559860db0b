"""`minivllm doctor`: what is installed here, what it means for the course, and how to repair what
is broken.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import typer

import minivllm
from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.errors import MiniVLLMError

OK, NOTE, BROKEN = "ok", "note", "broken"
SYMBOLS = {OK: ("✓", "green"), NOTE: ("•", "yellow"), BROKEN: ("✗", "bold red")}

MIN_PYTHON = (3, 11)
BUNDLED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    status: str
    found: str
    #: What it means, or what to do about it.
    meaning: str = ""


def doctor() -> None:
    """Look at what is installed here, say what it means for the course, and how to repair what is
    broken.
    """
    raise typer.Exit(run_doctor())


def run_doctor() -> int:
    """Print the report; returns the exit code: 1 when something is broken."""
    from rich.table import Table
    from rich.text import Text

    from minivllm.viz.terminal import SafeConsole

    console = SafeConsole()
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(width=1)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    findings = list(examine())
    for finding in findings:
        symbol, style = SYMBOLS[finding.status]
        text = Text(finding.found)
        if finding.meaning:
            text.append(f"\n{finding.meaning}", style="bold" if finding.status == BROKEN else "dim")
        table.add_row(Text(symbol, style=style), finding.what, text)
    console.print(table)
    broken = [finding.what for finding in findings if finding.status == BROKEN]
    if broken:
        console.print(
            f"\nBroken: {', '.join(broken)}. The cure stands beside each.", style="bold red"
        )
        return 1
    console.print("\nEverything that this machine needs for minivllm works.", style="bold")
    return 0


def examine() -> Iterator[Finding]:
    """All findings, the quick ones first. A check that itself fails is a finding too."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _dependencies,
        _torch,
        _triton,
        _memory,
        _bundled_model,
        _tested_versions,
        _course_tools,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # the doctor must not fall ill
            name = check.__name__.strip("_").replace("_", " ")
            yield Finding(name, BROKEN, f"{type(error).__name__}: {error}", "Please report this.")


def _python() -> Iterator[Finding]:
    found = (
        f"{platform.python_version()} at {sys.executable} ({platform.system()}"
        f" {platform.machine()})"
    )
    if sys.version_info < MIN_PYTHON:
        yield Finding("Python", BROKEN, found, "minivllm needs Python 3.11 or newer.")
    else:
        yield Finding("Python", OK, found)
    yield Finding("minivllm", OK, f"{minivllm.__version__} at {Path(minivllm.__file__).parent}")


def _dependencies() -> Iterator[Finding]:
    """Base requirements of the installed package that are missing or too old; torch has a finding
    of its own.
    """
    try:
        required = metadata.requires("minivllm") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages",
            NOTE,
            "minivllm runs from a directory and is not installed",
            "pip install -e . installs it.",
        )
        return
    problems, wanted = [], []
    for line in required:
        if "extra ==" in line or line.startswith("torch"):
            continue
        name, minimum = re.match(r"[\w.-]+", line).group(), re.search(r">=\s*([\d.]+)", line)
        version = _version(name)
        if version is None:
            problems.append(f"{name} is missing")
        elif minimum and _release(version) < _release(minimum.group(1)):
            problems.append(f"{name} {version} is older than {minimum.group(1)}")
        else:
            continue
        wanted.append(f"'{name}>={minimum.group(1)}'" if minimum else name)
    if problems:
        yield Finding("packages", BROKEN, "; ".join(problems), _cure(" ".join(wanted)))
    else:
        yield Finding("packages", OK, "everything that minivllm requires is installed")


def _torch() -> Iterator[Finding]:
    cure = _cure("'torch>=2.10'")
    try:
        import torch
    except Exception as error:  # a broken build may raise anything
        yield Finding("torch", BROKEN, f"cannot be imported: {error}", cure)
        return
    if _release(torch.__version__) < (2, 10):
        yield Finding("torch", BROKEN, f"{torch.__version__} is too old", cure)
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", OK, f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")
    yield _gpu(torch)


def _gpu(torch: Any) -> Finding:
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = ", ".join(
            f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})"
            for p in properties
        )
        return Finding(
            "GPU",
            OK,
            found,
            "The engine runs there with the Triton kernels; chapters measure afresh what they"
            " show.",
        )
    meaning = (
        "The engine runs on the CPU in float32 with the torch kernels; what only a GPU can show"
        " is shown from a record."
    )
    if Path("/proc/driver/nvidia/version").exists():
        why = "torch is a CPU build" if not torch.version.cuda else "torch cannot use it"
        return Finding(
            "GPU",
            NOTE,
            f"there is an NVIDIA driver, but {why}",
            f"{meaning} README.md says how to change that.",
        )
    return Finding("GPU", OK, "none", meaning)


def _triton() -> Iterator[Finding]:
    if sys.platform != "linux":
        yield Finding(
            "triton",
            NOTE,
            f"has no wheels for {platform.system()}",
            "The library works without it. Cells that run Triton kernels say so, and show the same"
            " in torch.",
        )
        return
    try:
        triton = import_module("triton")
    except ImportError:
        yield Finding(
            "triton",
            NOTE,
            "not installed",
            "The library works without it on a CPU; the kernel chapters need it."
            f" {_cure('triton')}",
        )
        return
    where = (
        "on the GPU"
        if _has_gpu()
        else "in Triton's interpreter, on the CPU: right in float32, slow"
    )
    note = ""
    if _release(triton.__version__) < (3, 7) and _release(_version("numpy") or "0") >= (2, 4):
        # Seen with Triton 3.6 on NumPy 2.5; on NumPy 2.3 chapters 01 to 03 ran through.
        cure = (  # constraints.txt has a newer one
            f"Run: {sys.executable} -m pip install 'numpy<2.4'"
        )
        note = (
            f" Triton {triton.__version__}'s interpreter, which chapters 01 to 03 use, fails on"
            " NumPy"
        )
        note += f" {_version('numpy')}. {cure}"
    yield Finding("triton", NOTE if note else OK, triton.__version__, f"Kernels run {where}.{note}")


def _has_gpu() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False


def _memory() -> Iterator[Finding]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):  # Windows has no sysconf
        return
    found = f"{total:.1f} GiB, {os.cpu_count()} CPU cores"
    if total < 3:
        yield Finding(
            "memory",
            NOTE,
            found,
            "Enough for the bundled model; two notebooks at once may be too much.",
        )
    else:
        yield Finding("memory", OK, found)


def _bundled_model() -> Iterator[Finding]:
    sizes = {
        name: (
            (BUNDLED_MODEL_PATH / name).stat().st_size
            if (BUNDLED_MODEL_PATH / name).is_file()
            else 0
        )
        for name in BUNDLED_FILES
    }
    missing = [name for name, size in sizes.items() if size == 0]
    cure = (
        "In a checkout: git restore minivllm/bundled. Elsewhere: pip install --force-reinstall the"
        " wheel of minivllm."
    )
    if missing:
        found = f"missing or empty in {BUNDLED_MODEL_PATH}: {', '.join(missing)}"
        yield Finding("bundled model", BROKEN, found, cure)
        return
    try:
        from minivllm.llm import LLM
        from minivllm.sampling_params import SamplingParams
    except ImportError as error:
        yield Finding(
            "bundled model",
            BROKEN,
            f"the engine cannot be imported: {error}",
            "Cure the others first.",
        )
        return
    try:
        with LLM(num_kv_blocks=16, attention_backend="torch", device="cpu") as llm:
            prompt = llm.render_chat([{"role": "user", "content": "What is a KV cache?"}])
            output = llm.generate(
                prompt, SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False
            )[0]
    except (MiniVLLMError, OSError, ValueError, RuntimeError) as error:
        yield Finding("bundled model", BROKEN, f"does not load: {error}", cure)
        return
    total = sum(sizes.values()) / 1e6
    yield Finding(
        "bundled model",
        OK,
        f"{total:.1f} MB, loads and writes: “{' '.join(output.outputs[0].text.split())} …”",
    )


def _tested_versions() -> Iterator[Finding]:
    file = _constraints_file()
    if file is None:
        return
    pins = re.findall(
        r"^([\w.-]+)==([^\s;]+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    installed = [(name, pin, _version(name)) for name, pin in pins]
    others = [
        f"{name} {version} (tested: {pin})"
        for name, pin, version in installed
        if version is not None and version.partition("+")[0] != pin
    ]
    same = sum(version is not None for _, _, version in installed) - len(others)
    if others:
        meaning = (
            "Other versions usually work; if something fails, `make clean setup` goes back to"
            " these."
        )
        yield Finding(
            "tested versions",
            NOTE,
            f"{same} as in constraints.txt, but {', '.join(others)}",
            meaning,
        )
    else:
        yield Finding(
            "tested versions", OK, f"all {same} installed packages are as in constraints.txt"
        )


#: What `make lab` installs: for the notebooks, and for checking the exercises.
LAB_TOOLS = ("jupyterlab", "ipywidgets", "matplotlib", "pytest", "nbval", "transformers")
#: What `make test` installs besides.
TEST_TOOLS = ("hypothesis", "pytest-xdist", "ruff")


def _course_tools() -> Iterator[Finding]:
    if missing := [name for name in LAB_TOOLS if _version(name) is None]:
        yield Finding(
            "notebooks",
            NOTE,
            f"{', '.join(missing)} not installed",
            "`make lab` installs all that the notebooks and the exercises need, pytest, nbval and"
            " transformers among it; or pip install -e '.[lab]'.",
        )
    else:
        found = f"JupyterLab {_version('jupyterlab')}: make lab opens the course"
        yield Finding("notebooks", OK, found)
    if missing := [name for name in (*LAB_TOOLS, *TEST_TOOLS) if _version(name) is None]:
        yield Finding(
            "tests",
            NOTE,
            f"{', '.join(missing)} not installed",
            "`make test` installs them, or pip install -e '.[dev]'.",
        )
    else:
        found = f"pytest {_version('pytest')}, nbval {_version('nbval')}: make test runs everything"
        yield Finding("tests", OK, found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """``"2.13.0+cpu"`` -> (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d", version).group().split("."))


def _constraints_file() -> Path | None:
    """constraints.txt of the checkout that this package runs from; None when it was installed from
    a wheel.
    """
    file = Path(minivllm.__file__).resolve().parents[1] / "constraints.txt"
    return file if file.is_file() and (file.parent / "pyproject.toml").is_file() else None


def _cure(packages: str) -> str:
    constraint = f" -c {_constraints_file()}" if _constraints_file() else ""
    return f"Run: {sys.executable} -m pip install {packages}{constraint}"
