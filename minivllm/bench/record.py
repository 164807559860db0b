"""Everything in one call, for a GPU machine that is at hand for minutes: each benchmark in a
process of its own.

Each has its own process, because a kernel that fails spoils the GPU state of its process, and a
process that hangs can be ended. Every benchmark writes its file as soon as it is done. One that
fails leaves its log and does not stop the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minivllm.bench.report import save_report, say


@dataclass(frozen=True)
class Job:
    """A benchmark, its arguments, and its seconds: after `soft` it begins no further row, after
    `hard` it is ended.
    """

    name: str
    arguments: tuple[str, ...]
    soft: int
    hard: int


def jobs(shape: str, on_gpu: bool, compiled: bool = True) -> list[Job]:
    """What is recorded. The soft bounds add up to almost seven minutes on a GPU."""
    if not on_gpu:
        few = (
            "--repeats",
            "1",
            "--batches",
            "1,4",
            "--running",
            "1,4",
            "--contexts",
            "64,256",
            "--num-steps",
            "8",
        )
        return [
            Job("kernels", ("--shape", shape, "--seconds", "0.02"), 30, 60),
            Job("throughput", ("--shape", shape, "--case", "decode1", "--repeats", "2"), 30, 60),
            Job("latency", ("--shape", shape, *few), 30, 60),
            Job("breakdown", ("--shape", shape, "--running", "4", "--num-steps", "8"), 30, 60),
        ]
    compile_option = "--compile" if compiled else "--no-compile"
    return [
        Job("kernels", ("--shape", shape, compile_option), 100, 170),
        # The budget that vLLM, too, takes for offline work on such a GPU.
        Job(
            "throughput",
            (
                "--shape",
                shape,
                "--case",
                "all",
                "--repeats",
                "3",
                "--max-num-batched-tokens",
                "16384",
            ),
            100,
            170,
        ),
        Job("latency", ("--shape", shape), 90, 150),
        Job(
            "breakdown",
            ("--shape", shape, "--running", "1,64,256", "--graphs", "both"),
            110,
            170,
        ),
    ]


def machine_name() -> str:
    """For file names: "h200" for an NVIDIA H200, "cpu" without a GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name(0).lower().removeprefix("nvidia").split()
    return "-".join(word for word in words[:2] if word not in ("geforce", "80gb"))


def run_job(job: Job, path: Path, log: Path) -> str | None:
    """Run a benchmark in a process of its own; its output goes to `log`. Returns what went wrong,
    or None.
    """
    command = [sys.executable, "-u", "-m", "minivllm", "bench", job.name, *job.arguments]
    command += ["--max-seconds", str(job.soft), "--out", str(path)]
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=job.hard
            ).returncode
        except subprocess.TimeoutExpired:
            return f"ended after {job.hard} s"
    return None if code == 0 else f"exit status {code}"


def run(out: Path, shape: str | None = None, compiled: bool = True) -> dict[str, Any]:
    """Run every benchmark and write NAME-MACHINE.json, and logs, into `out`. Returns seconds and
    failures by name.
    """
    on_gpu = torch.cuda.is_available()
    shape = shape or ("qwen3-0.6b" if on_gpu else "tiny")
    out.mkdir(parents=True, exist_ok=True)
    where = machine_name()
    summary: dict[str, Any] = {}
    for job in jobs(shape, on_gpu, compiled):
        path, log = out / f"{job.name}-{where}.json", out / f"{job.name}.log"
        say(f"record: {job.name} (at most {job.hard} s)")
        start = time.perf_counter()
        problem = run_job(job, path, log)
        summary[job.name] = {"seconds": round(time.perf_counter() - start, 1), "problem": problem}
        say(f"record: {job.name} {problem or 'done'} after {summary[job.name]['seconds']} s")
        if problem:
            say(
                "".join(
                    log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[
                        -15:
                    ]
                )
            )
    _add_roofline(out, where, summary)
    return summary


def _add_roofline(out: Path, where: str, summary: dict[str, Any]) -> None:
    from minivllm.bench import roofline

    path = out / f"throughput-{where}.json"
    try:
        report = roofline.run(json.loads(path.read_text(encoding="utf-8")))
        save_report(report, out / f"roofline-{where}.json")
        summary["roofline"] = {"seconds": 0.0, "problem": None}
    except Exception as error:  # the other files are there already
        summary["roofline"] = {"seconds": 0.0, "problem": f"{type(error).__name__}: {error}"}
