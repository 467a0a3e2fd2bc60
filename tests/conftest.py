"""Shared by every folder of tests."""

import pytest
from serving import test_device


def pytest_report_header() -> str:
    return f"flash_attn_plus: numerics on {test_device()}"


@pytest.fixture
def device() -> str:
    """The type of the device under test."""
    return test_device()
