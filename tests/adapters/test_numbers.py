"""Adapters against the oracle through stand-ins that mask, bias and lay out as the real engines do."""

import pytest
import torch
from cases import cache, crossed, dense, varlen

from flash_attn_plus.backends import cuda_original
from flash_attn_plus.backends.base import Backend
from flash_attn_plus.backends.flaggems import FlagGems
from flash_attn_plus.ops import allocate_outputs
from flash_attn_plus.testing import Case, arrange, assert_matches_reference, make_inputs

ENGINES = ("flaggems", "fa2", "torch_fa2", "fa3", "fa4", "cudnn")
CASES = dense("small") | varlen("small") | cache("small") | dict(list(crossed("small").items())[::4])
DEVICE = torch.device("cuda", 0)


def engine(name: str) -> Backend:
    return FlagGems() if name == "flaggems" else cuda_original.engine(name)


def poisoned(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)


def run(backend: Backend, case: Case, with_dlse: bool = False) -> bool:
    """Hold the passes that the engine serves to the tolerance rule; false where it serves none."""
    call = make_inputs(case, torch.float16)
    x, problem = call.inputs, call.problem()
    if backend.reasons(problem._replace(device=DEVICE)) or backend.input_reasons(x):
        return False
    if 0 in (problem.seqlen_q, problem.seqlen_k):
        return True  # answered before any backend
    out, lse = map(poisoned, allocate_outputs(x.q, x.v, problem.is_varlen_q))
    backend.forward(problem, x, out, lse)
    results = {"out": out, "lse": lse}
    backwards = call.problem(is_backward=True)._replace(has_dlse=with_dlse)
    if case.has_backward and not backend.reasons(backwards._replace(device=DEVICE)):
        grads = [arrange(poisoned(t), "sliced") for t in x[:3]]
        delta = poisoned(lse)
        backend.backward(backwards, x, call.dout, out, lse, call.dlse if with_dlse else None, *grads, delta)
        results |= dict(zip(("dq", "dk", "dv"), grads, strict=True)) | {"delta": delta}
    assert_matches_reference(call, results, with_dlse=with_dlse)
    return True


@pytest.mark.parametrize("name", ENGINES)
def test_every_case_that_is_served(installed, name):
    served = [case for case, sizes in CASES.items() if run(engine(name), sizes)]
    assert len(served) > (10 if name == "cudnn" else 60), served


def test_a_gradient_of_the_lse_is_taken_where_it_is_served(installed):
    assert run(engine("fa4"), CASES["causal_tall"], with_dlse=True)
    problem = CASES["causal"].problem(torch.float16, DEVICE, is_backward=True)._replace(has_dlse=True)
    for name in ("fa2", "torch_fa2", "cudnn"):
        assert any("gradient of the LSE" in reason for reason in engine(name).reasons(problem)), name
