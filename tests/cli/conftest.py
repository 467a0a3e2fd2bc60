"""Environments of processes that tests of the command line start."""

import os

import pytest


@pytest.fixture
def plain_environment() -> dict[str, str]:
    """As the tests run, without wishes to the engine and one thread each."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLASH_ATTENTION_") and k != "COLUMNS"}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def compiling_environment(plain_environment, tmp_path) -> dict[str, str]:
    """The same for processes that compile, into a cache of their own."""
    return {**plain_environment, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
