"""The device under test, and the cases that each backend says it serves there."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch

from flash_attn_plus import selection
from flash_attn_plus.testing import Case

BACKENDS = ("torch", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def test_device() -> str:
    """FLASH_ATTENTION_TEST_DEVICE, else cuda where there is one, else cpu."""
    return os.environ.get("FLASH_ATTENTION_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


test_device.__test__ = False  # a helper, though its name starts like a test's


def is_interpreted(backend: str) -> bool:
    """Whether the backend's kernels run in Triton's interpreter, some hundred times slower than compiled."""
    return backend == "triton" and test_device() == "cpu"


def size(backend: str) -> str:
    """The size of cases that the backend can run in reasonable time on the device under test."""
    if test_device() != "cpu":
        return "large"
    return "small" if is_interpreted(backend) else "medium"


def is_served(backend: str, case: Case, dtype: torch.dtype) -> bool:
    """Whether the backend declares the case, with its backward pass where that is defined."""
    passes = (False, True) if case.has_backward else (False,)
    engine = selection.get(backend)
    return not any(engine.reasons(case.problem(dtype, test_device(), is_backward)) for is_backward in passes)


def _dtypes(backend: str, dtypes: Sequence[torch.dtype], number: int) -> Sequence[torch.dtype]:
    """All dtypes; under the interpreter float32 and, for two cases of three, one of the others."""
    if not is_interpreted(backend) or len(dtypes) < 3:
        return dtypes
    return [dtype for i, dtype in enumerate(dtypes) if i == 0 or number % 3 == i - 1]


def served(
    make_cases: Callable[[str], dict[str, Case]], dtypes: Sequence[torch.dtype] = FLOATS
) -> pytest.MarkDecorator:
    """Parametrize a test by (backend, case, dtype), over what each backend declares.

    What is left out here shows in the support matrix, which is compared with the committed one.
    """
    found = []
    for backend in BACKENDS:
        for number, (name, case) in enumerate(make_cases(size(backend)).items()):
            for dtype in _dtypes(backend, dtypes, number):
                if is_served(backend, case, dtype):
                    dtype_name = str(dtype).removeprefix("torch.")
                    found.append(pytest.param(backend, case, dtype, id=f"{backend}-{name}-{dtype_name}"))
    return pytest.mark.parametrize(("backend", "case", "dtype"), found)
