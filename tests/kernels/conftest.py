"""Every check runs on every implementation: the references everywhere, what is fast on a CPU there,
Triton on the GPU or in the interpreter.
"""

import pytest
import torch

from minivllm.kernels import Kernels
from support.kernel_checks import DEVICE, require_triton


@pytest.fixture(params=["torch", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "torch":
        return Kernels.reference()
    if request.param == "cpu":
        if DEVICE.type != "cpu":
            pytest.skip("for a CPU only")
        return Kernels.cpu()
    require_triton()
    return Kernels.triton()


@pytest.fixture
def triton_kernels() -> Kernels:
    require_triton()
    return Kernels.triton()


@pytest.fixture(
    params=[
        pytest.param(torch.float32, id="float32"),
        # The interpreter computes bfloat16 wrongly and float16 slowly: these wait for a GPU.
        pytest.param(torch.float16, id="float16", marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.gpu),
    ]
)
def device_dtype(request: pytest.FixtureRequest) -> tuple[torch.device, torch.dtype]:
    return DEVICE, request.param
