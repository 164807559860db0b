"""Every check runs on both implementations: the references everywhere, Triton on the GPU or in the
interpreter.
"""

import pytest
import torch

from minivllm.kernels import Kernels
from support.kernel_checks import DEVICE, require_triton


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "torch":
        return Kernels.reference()
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
