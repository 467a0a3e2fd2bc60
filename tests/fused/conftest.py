"""Every test runs by the PyTorch path and by the Triton kernels, interpreted on the CPU and compiled on a GPU."""

import os

import pytest
import torch
from serving import test_device

if test_device() == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from flash_attn_plus import use_backend


def pytest_configure(config) -> None:
    # The interpreter computes masked-out elements too, about which numpy warns.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")


@pytest.fixture(params=["torch", "triton"])
def path(request):
    """The implementation that serves the test."""
    torch.manual_seed(0)
    with use_backend(request.param):
        yield request.param
