"""A linear layer on a CPU: bounded memory whatever the batches' sizes, and the right numbers.

oneDNN keeps a program for each number of rows that it has met, and a batch's number of rows differs
from step to step. Which library multiplies depends on the CPU: both are tested on every CPU.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from minivllm.kernels import cpu

pytestmark = pytest.mark.slow

has_onednn = pytest.mark.skipif(not cpu.HAS_ONEDNN, reason="this build of torch has no oneDNN")

#: Multiplies with each number of rows in turn, prints by how many MB the process grew.
GROWTH = """
import sys, torch
from minivllm import Kernels

torch.set_num_threads(1)
shapes = ((512, 256), (256, 256), (1536, 256), (256, 768))
linear = Kernels.cpu(frozenset(shapes if sys.argv[1] == "True" else ())).linear
weights = [torch.randn(shape) for shape in shapes]

def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

with torch.inference_mode():
    for weight in weights:
        linear(torch.ones(300, weight.shape[1]), weight)
    start = megabytes()
    for rows in range(3, 300):
        for weight in weights:
            linear(torch.ones(rows, weight.shape[1]), weight)
print(megabytes() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize("prefers", [pytest.param(True, marks=has_onednn), False])
def test_memory_does_not_grow_with_the_sizes_that_batches_have_had(prefers: bool) -> None:
    command = [sys.executable, "-c", GROWTH, str(prefers)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 110, "700 when every number of rows has a program of its own"


@has_onednn
def test_onednn_is_asked_for_few_numbers_of_rows() -> None:
    """Between them no gap wastes more than a third of a product's rows, from 12 rows on a
    quarter.
    """
    sizes = cpu.ONEDNN_ROWS
    assert sizes == tuple(sorted(set(sizes)))
    assert len(sizes) < 50
    for small, large in pairwise(sizes):
        assert large - small - 1 <= small / (1 if small < 12 else 4), (small, large)


@has_onednn
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_number_of_rows_gives_the_same_by_onednn_and_by_mkl(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 6, generator=generator)
    bias = torch.randn(10, generator=generator) if with_bias else None
    wide = torch.randn(4300, 12, generator=generator)
    for rows in (*range(300), 511, 512, 513, 2047, 2048, 2049, 4096, 4300):
        for x in (wide[:rows, :6], wide[:rows, :6].contiguous()):  # strided rows, too
            out = cpu.linear(x, weight, bias, onednn=frozenset({(10, 6)}))
            assert out.shape == (rows, 10)
            assert out.is_contiguous()
            torch.testing.assert_close(out, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
