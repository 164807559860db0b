"""Every check runs on both implementations: the references everywhere, Triton on the GPU or in the interpreter."""

import importlib.metadata

import pytest
import torch

from minivllm.kernels import Kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _version(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


def require_triton() -> None:
    try:
        version = _version("triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Triton is not installed (it has wheels for Linux only)")
    if DEVICE.type == "cpu" and version < (3, 7) and _version("numpy") > (2, 2):
        pytest.skip("Triton's interpreter before 3.7 breaks on NumPy newer than 2.2")


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
