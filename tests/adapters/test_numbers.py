"""Adapters against the oracle through stand-ins that mask, bias and lay out as the real engines do."""

import json
from pathlib import Path

import pytest
import torch
from cases import cache, dense, varlen
from serving import engine, run_directly

from flash_attn_plus.backends import cuda_fa4, cuda_measured
from flash_attn_plus.backends.base import Backend
from flash_attn_plus.testing import Case, make_inputs

ENGINES = ("flaggems", "cuda fa2", "cuda torch_fa2", "cuda fa3", "cuda fa4", "cuda cudnn")
CASES = dense("small") | varlen("small") | cache("small")
ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0)


def run(backend: Backend, case: Case) -> bool:
    """Hold the passes that the engine serves to the tolerance rule; false where it serves none."""
    dtype = torch.float16 if torch.float16 in backend.capability.dtypes else torch.bfloat16
    problem = case.problem(dtype, DEVICE)
    if backend.reasons(problem) or backend.input_reasons(make_inputs(case, dtype).inputs):
        return False
    if 0 not in (problem.seqlen_q, problem.seqlen_k):  # else answered before any backend
        with_backward = case.has_backward and not backend.reasons(problem._replace(is_backward=True))
        run_directly(backend, case, dtype, "cpu", with_backward)
    return True


@pytest.mark.parametrize("name", ENGINES)
def test_every_case_that_is_served(installed, monkeypatch, name):
    monkeypatch.setattr(cuda_fa4, "_SHORTEST", 0)  # the cases are small
    head_dim = 64 if name == "cuda fa4" else None  # it serves few others
    cases = {n: c._replace(head_dim=head_dim, head_dim_v=None) if head_dim else c for n, c in CASES.items()}
    served = [case for case, sizes in cases.items() if run(engine(name), sizes)]
    assert len(served) > (8 if name == "cuda cudnn" else 40), served


@pytest.mark.parametrize("name", ENGINES)
def test_a_gradient_of_the_lse_is_refused(installed, name):
    problem = CASES["causal"].problem(torch.float16, DEVICE, is_backward=True)._replace(has_dlse=True)
    assert any("gradient" in reason for reason in engine(name).reasons(problem))


def test_the_table_of_faster_engines_says_what_the_results_file_says():
    rows = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200.json").read_text())["rows"]
    measured = {(r["metric"], r["case"], r["provider"]): r["value"] for r in rows}
    assert cuda_measured.ROWS
    for row in cuda_measured.ROWS:
        case = f"d{row.head_dim} {'causal' if row.is_causal else 'full'} s"
        theirs = {"cudnn": "cuDNN (SDPA)"}[row.engine]
        assert round(measured["backward", f"{case}{row.shortest}", row.ours], 1) == row.ours_tflops
        assert round(measured["backward", f"{case}{row.shortest}", theirs], 1) == row.engine_tflops
        assert row.engine_tflops > 1.03 * row.ours_tflops
        assert measured["backward", f"{case}8192", theirs] > 1.03 * measured["backward", f"{case}8192", row.ours]
