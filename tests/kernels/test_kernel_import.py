"""The package imports and its references run where Triton is missing, and nothing pays for Triton
before a launch.
"""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_triton():
    run("""
import sys

import pytest
sys.modules["triton"] = None  # what an import of a missing package meets
import torch
from minivllm.kernels import Kernels
x = torch.ones(2, 4)
assert Kernels.reference().rms_norm(x, x[0], 0.0).tolist() == x.tolist()
try:
    Kernels.triton().rms_norm(x, x[0], 0.0)
except ImportError as error:
    assert "Linux only" in str(error)
else:
    raise AssertionError("a launch without Triton must say so")
""")


def test_importing_kernels_does_not_import_triton():
    run("""
import sys

import pytest
import torch
before = "triton" in sys.modules
import minivllm.kernels
minivllm.kernels.Kernels.triton()
assert ("triton" in sys.modules) == before
""")
