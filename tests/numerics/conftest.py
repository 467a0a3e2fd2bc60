"""On the CPU the Triton kernels run under Triton's interpreter, which must be known before Triton is imported."""

import os

from serving import test_device

if test_device() == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config) -> None:
    # The interpreter computes masked-out elements too, about which numpy warns.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
