"""What every benchmark writes down beside its numbers: the machine, the versions, the date, the
commit.

`recorded/` holds reports of machines that not everybody has; `recorded("kernels-h200")` reads one.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import minivllm
from minivllm.files import write_atomically
from minivllm.text import printable

#: Where recorded reports lie.
RECORDED = Path(__file__).parent / "recorded"


def environment() -> dict[str, Any]:
    """Hardware, versions, date and commit; no machine names or paths."""
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "cpu": _cpu_name(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": (
            {"minivllm": minivllm.__version__}
            | {name: _version(name) for name in ("torch", "triton", "transformers", "numpy")}
        ),
        "commit": _commit(),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, greatest, and the values themselves."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": [round(value, 6) for value in values],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile (linear between neighbours), least, greatest and how many
    there are.
    """
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, part = int(place), place - int(place)
        return ordered[low] + part * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return {
        "median": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "min": ordered[0],
        "max": ordered[-1],
        "count": len(ordered),
    }


def save_report(report: dict[str, Any], path: str | Path) -> None:
    """Write a report as JSON. What cannot be a JSON number (NaN, infinity) is refused with
    ValueError.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def recorded(name: str) -> dict[str, Any]:
    """A recorded report by the name of its file, with or without ".json". FileNotFoundError lists
    what there is.
    """
    path = RECORDED / f"{name.removesuffix('.json')}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"No recorded report {name!r}; there are: {', '.join(list_recorded()) or 'none'}."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def list_recorded() -> list[str]:
    """Names that `recorded` takes."""
    return sorted(path.stem for path in RECORDED.glob("*.json"))


def machine(report: dict[str, Any]) -> str:
    """One line that says where and when a report was measured."""
    found = report["environment"]
    what = (
        found["gpu"]["name"]
        if found["gpu"]
        else f"{found['cpu']}, {found['torch_threads']} threads"
    )
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    return f"{what}; {versions}; {found['date'][:10]}, commit {found['commit']}"


class Deadline:
    """A time bound that a benchmark looks at between rows. seconds: None is no bound."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds, self._start = seconds, time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    @property
    def passed(self) -> bool:
        return self.seconds is not None and self.elapsed > self.seconds


def say(text: str) -> None:
    """Progress, to stderr, at once."""
    print(printable(text), file=sys.stderr, flush=True)


def attempt(
    name: str, deadline: Deadline, measure: Callable[[], dict[str, Any]], quiet: bool = False
) -> dict[str, Any]:
    """What `measure` returns; or {"failed": why} when it raises, or when the time bound has passed
    before it starts.

    quiet: success is not announced.
    """
    if deadline.passed:
        say(f"  {name}: left out, the bound of {deadline.seconds:g} s has passed")
        return {"failed": f"left out: the time bound of {deadline.seconds:g} s had passed"}
    start = time.perf_counter()
    try:
        result = measure()
    except Exception as error:  # one row must not take the others with it
        reason = " ".join(str(error).split())[:300]
        say(f"  {name}: FAILED, {type(error).__name__}: {reason}")
        return {"failed": f"{type(error).__name__}: {reason}"}
    if not quiet:
        say(f"  {name}: {time.perf_counter() - start:.1f} s")
    return result


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _commit() -> str | None:
    """MINIVLLM_COMMIT if set (for a copy without its history), else the checkout's, with "+" when
    files differ.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    if commit := os.environ.get("MINIVLLM_COMMIT"):
        return commit
    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
