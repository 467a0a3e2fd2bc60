"""`verify` finds what is wrong, says what it did not run, and is quiet about what is right."""

import json
import re

import pytest
import torch

from flash_attn_plus.cli import verify
from flash_attn_plus.cli.main import main
from flash_attn_plus.testing import Case

CPU = torch.device("cpu")
SMALL = {
    "causal": Case(batch=1, seqlen_q=20, seqlen_k=33, heads=2, heads_k=1, head_dim=16, right=0),
    "paged": Case(batch=2, seqlen_q=1, seqlen_k=40, used=(40, 3), page_size=16, head_dim=16),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(verify, "cases", lambda _size: SMALL)


def run(capsys, *arguments):
    code = main(["verify", "--json", "--device", "cpu", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_right_results_are_told_with_exit_code_0(small, capsys):
    code, found = run(capsys, "--backend", "torch")
    assert code == 0
    assert found["right"] is True
    assert {(r["case"], r["dtype"]) for r in found["results"]} == {
        (name, dtype) for name in SMALL for dtype in ("bfloat16", "float16", "float32")
    }
    assert {r["status"] for r in found["results"]} == {"right"}


def test_a_wrong_output_and_a_wrong_gradient_are_found(small, capsys, monkeypatch):
    forward, gradients = verify.run_forward, verify.gradients
    monkeypatch.setattr(verify, "run_forward", lambda call: forward(call) | {"out": forward(call)["out"] * 1.1})
    code, found = run(capsys, "--backend", "torch")
    assert code == 1
    assert all(r["status"] == "wrong" and r["told"].startswith("out: error") for r in found["results"])
    monkeypatch.setattr(verify, "run_forward", forward)
    monkeypatch.setattr(verify, "gradients", lambda *a: gradients(*a) | {"dk": torch.zeros_like(gradients(*a)["dk"])})
    assert main(["verify", "--device", "cpu", "--backend", "torch"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"causal +WRONG: bfloat16 float16 float32\n", text)
    assert "wrong: causal (float32) by torch: dk: error" in text
    assert "3 right, 3 wrong" in text


def test_a_crash_counts_as_a_failure_not_as_a_traceback(small, capsys, monkeypatch):
    def crash(_call):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(verify, "run_forward", crash)
    code, found = run(capsys, "--backend", "torch")
    assert code == 1
    assert found["results"][0]["told"] == "RuntimeError: an illegal memory access"


def test_what_the_time_does_not_reach_is_told(small, capsys):
    code, found = run(capsys, "--backend", "torch", "--seconds", "1e-9")
    assert code == 0
    assert {r["status"] for r in found["results"]} == {"not run"}


def test_backends_that_are_not_here_are_told_with_the_reason(small, capsys):
    code, found = run(capsys)
    assert code == 0
    assert found["absent"]["gluon"]
    assert verify.available(torch.device("cpu"), ["torch", "torch"])[0] == ["torch"]  # asked for twice, checked once
    assert main(["verify", "--device", "cpu", "--backend", "gluon"]) == 2
    assert "no backend runs on cpu (gluon:" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["interpreter", "cpu", "accelerator"])
def test_every_feature_of_a_problem_has_a_case(size):
    problems = [case.problem(torch.float16) for case in verify.cases(size).values()]
    for feature in ("has_softcap", "has_alibi", "has_dropout", "is_varlen_q", "is_varlen_k", "page_size"):
        assert any(getattr(p, feature) for p in problems), feature
    assert any(p.left >= 0 for p in problems)
    assert any(p.heads != p.heads_k for p in problems)
    assert any(p.head_dim != p.head_dim_v for p in problems)
