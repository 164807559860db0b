"""The server costs `LLM.generate` nothing: neither at the import nor in a step."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

#: What only a server, or only a structured output, needs.
OF_THE_SERVER = [
    *("fastapi", "httptools", "httpx", "llguidance", "prometheus_client", "pydantic"),
    *("starlette", "uvicorn", "uvloop", "minivllm.serving"),
]

PROGRAM = f"""
import sys
import threading
from collections import Counter
from pathlib import Path

for name in {OF_THE_SERVER}:
    sys.modules[name] = None  # what an import of a missing package meets

from minivllm import LLM, SamplingParams

STEPS, REQUESTS = 20, 8
calls = Counter()


def count(frame, event, _):
    if event == "call":
        calls[Path(frame.f_code.co_filename).name, frame.f_code.co_name] += 1


with LLM(device="cpu", num_kv_blocks=100) as llm:
    params = SamplingParams(max_tokens=STEPS, ignore_eos=True)
    llm.generate(["warm up"], params, use_tqdm=False)
    sys.setprofile(count)
    llm.generate(["a fox"] * REQUESTS, params, use_tqdm=False)
    sys.setprofile(None)
    threads = [thread.name for thread in threading.enumerate()]
    assert not any("core" in name for name in threads), threads

steps = calls["engine_core.py", "step"]
assert STEPS <= steps <= STEPS + 3, steps
# The engine's record of steps is for whoever looks, and grammars are for those who ask for one.
recorded = {{name: n for name, n in calls.items() if name[0] == "trace.py"}}
assert not recorded, recorded
grammars = sum(n for name, n in calls.items() if name[0] == "structured_outputs.py")
assert grammars <= steps + REQUESTS, grammars
# Text is made once per answer, not once per token.
decoded = calls["tokenizer.py", "decode"]
assert 0 < decoded <= 2 * REQUESTS, decoded
"""


def test_llm_needs_nothing_of_the_server() -> None:
    """Not even a lazy import: each of the server's packages is missing here."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=250
    )
    assert found.returncode == 0, found.stderr


def test_an_import_reads_nothing_of_the_server() -> None:
    program = "import sys; from minivllm import LLM; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    modules = set(found.stdout.decode().split())
    assert "minivllm.config" in modules
    assert not modules & set(OF_THE_SERVER)
