"""The device under test, and the cases that each backend says it serves there."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch

from flash_attn_plus import selection
from flash_attn_plus.backends import cuda_original
from flash_attn_plus.backends.base import Backend
from flash_attn_plus.ops import allocate_outputs
from flash_attn_plus.testing import Case, arrange, assert_matches_reference, make_inputs

BACKENDS = ("torch", "triton")  # ours that serve every device; the others have tests/gpu and the support matrix
CUDA_ENGINES = ("fa2", "fa3", "fa4", "cudnn", "torch_fa2")
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


def engine(name: str) -> Backend:
    """A backend by its name, or one engine of the cuda backend as "cuda fa3" and the like."""
    backend, _, part = name.partition(" ")
    return cuda_original.engine(part) if part else selection.get(backend)


def refuses(backend: Backend, case: Case, dtype: torch.dtype, is_backward: bool, has_dlse: bool = False) -> bool:
    """Whether the backend declares that it does not take the case, its tensors included, on the device under test."""
    problem = case.problem(dtype, test_device(), is_backward)._replace(has_dlse=has_dlse)
    if backend.reasons(problem):
        return True
    if type(backend).input_reasons is Backend.input_reasons:
        return False
    return bool(backend.input_reasons(make_inputs(case, dtype).inputs))  # strides and alignment are those of a GPU's


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)


def run_directly(
    backend: Backend, case: Case, dtype: torch.dtype, device: str, with_backward: bool, with_dlse: bool = False
) -> None:
    """Hold the backend's passes, called without selection on poisoned outputs, to the tolerance rule."""
    call = make_inputs(case, dtype, device)
    x, problem = call.inputs, call.problem()
    out, lse = map(_poisoned, allocate_outputs(x.q, x.v, problem.is_varlen_q))
    backend.forward(problem, x, out, lse)
    results = {"out": out, "lse": lse}
    if with_backward:
        problem = call.problem(is_backward=True)._replace(has_dlse=with_dlse)
        layout = "packed" if case.layout == "packed" else "contiguous"
        grads = [arrange(_poisoned(t), layout) for t in x[:3]]
        delta = _poisoned(lse)
        backend.backward(problem, x, call.dout, out, lse, call.dlse if with_dlse else None, *grads, delta)
        results |= dict(zip(("dq", "dk", "dv"), grads, strict=True)) | {"delta": delta}
    assert_matches_reference(call, results, with_dlse=with_dlse)


def is_served(backend: str, case: Case, dtype: torch.dtype) -> bool:
    """Whether the backend declares the case, with its backward pass where that is defined."""
    passes = (False, True) if case.has_backward else (False,)
    return not any(refuses(selection.get(backend), case, dtype, is_backward) for is_backward in passes)


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
