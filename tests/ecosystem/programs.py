"""What the tests of other people's programs share: finding them, and counting how often our operators ran."""

import importlib
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

ECOSYSTEM = "FLASH_ATTENTION_PLUS_ECOSYSTEM"  # set by `make test-ecosystem`, where nothing may be skipped


def require(name: str) -> ModuleType:
    """The module. Where it is missing the tests are skipped, but fail under `make test-ecosystem`."""
    return importlib.import_module(name) if ECOSYSTEM in os.environ else pytest.importorskip(name)


def find(name: str) -> Path:
    """The folder of a package, which is not imported; as `require` where it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None and ECOSYSTEM not in os.environ:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    assert spec is not None, f"{name} is not installed"
    return Path(spec.submodule_search_locations[0])


def open_packages(name: str, *parts: str) -> None:
    """Let modules of a package, and of its parts, be imported without running the `__init__` files.

    Those import far more than the modules under test, which run unchanged.
    """
    folder = find(name)
    for part in ("", *parts):
        package = ModuleType(f"{name}.{part}".rstrip("."))
        package.__path__ = [str(folder / part.replace(".", os.sep))]
        assert os.path.isdir(package.__path__[0]), package.__name__
        sys.modules[package.__name__] = package


@contextmanager
def operator_calls() -> Iterator[Counter]:
    """Counts of our operators that run within the block, whatever calls them: "forward", "forward packed", ..."""
    calls: Counter = Counter()
    options = {"record_shapes": True, "experimental_config": _ExperimentalConfig(profile_all_threads=True)}
    with profile(activities=[ProfilerActivity.CPU], **options) as record:
        yield calls
    for event in record.profiler.kineto_results.events():  # the raw ones, since making the public ones takes longer
        if event.name().startswith("flash_attn_plus::"):
            is_packed = len(event.shapes()[0]) == 3
            calls[event.name().removeprefix("flash_attn_plus::") + (" packed" if is_packed else "")] += 1


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype of tensors that a program makes without naming one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
