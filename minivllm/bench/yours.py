"""The kernels measured on the reader's own GPU, for the pages of the course that quote a record of
somebody else's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def your_gpu(*kernels: str, seconds: float = 0.1) -> list[dict[str, Any]] | None:
    """Rows of ``minivllm bench kernels`` for these kernels (`bench.cases.KERNELS`); None where
    there is no GPU.

    seconds: about how long a row is measured. In a process of its own, because a page that shows
    Triton's interpreter has set TRITON_INTERPRET in this one. RuntimeError with what that process
    printed last, should it fail.
    """
    if not torch.cuda.is_available():
        return None
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "minivllm", "bench", "kernels", "--no-compile"]
        command += ["--seconds", str(seconds), "--out", str(report)]
        for kernel in kernels:
            command += ["--only", kernel]
        clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"minivllm bench kernels failed: {done.stderr.strip().splitlines()[-1:]}"
            )
        return json.loads(report.read_text(encoding="utf-8"))["rows"]
