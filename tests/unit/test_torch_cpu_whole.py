"""Calls that are one call of PyTorch's fused CPU operator hand its results over instead of copying them."""

import pytest
import torch

from flash_attn_plus import attention, ops, use_backend
from flash_attn_plus.backends import torch_cpu_flash
from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs

HANDED_OVER = {
    "full": Case(seqlen_q=37, seqlen_k=70),
    "causal": Case(seqlen_q=70, seqlen_k=70, right=0),
    "grouped": Case(seqlen_q=70, seqlen_k=70, heads=6, heads_k=2, right=0),
    "sliced": Case(seqlen_q=70, seqlen_k=70, layout="sliced"),
}
FILLED = {
    "uneven": Case(seqlen_q=37, seqlen_k=70, right=0),
    "window": Case(seqlen_q=70, seqlen_k=70, left=9, right=0),
    "alibi": Case(seqlen_q=70, seqlen_k=70, alibi="heads"),
    "wider": Case(seqlen_q=70, seqlen_k=70, head_dim_v=40),
    "negative": Case(seqlen_q=70, seqlen_k=70, softmax_scale=-0.3),
    "softcap": Case(seqlen_q=70, seqlen_k=70, softcap=3.0),
}


def differentiated(case, dtype):
    """The call, and what autograd gives for it."""
    call = make_inputs(case, dtype, "cpu")
    x = call.inputs
    q, k, v = (t.detach().requires_grad_() for t in x[:3])
    with use_backend("torch"):
        out, lse = attention(
            q, k, v, softmax_scale=x.softmax_scale, softcap=x.softcap, window_size=(call.left, call.right),
            alibi_slopes=x.alibi_slopes, return_lse=True,
        )  # fmt: skip
        grads = torch.autograd.grad(out, (q, k, v), call.dout)
    return call, dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", HANDED_OVER | FILLED)
def test_results_are_right_and_dense(name, dtype, monkeypatch):
    filled = []
    for maker in ("allocate_alike", "allocate_gradients"):
        original = getattr(ops, maker)
        monkeypatch.setattr(ops, maker, lambda *a, original=original: filled.append(a) or original(*a))
    call, results = differentiated((HANDED_OVER | FILLED)[name], dtype)
    assert_matches_reference(call, results)
    assert all(x.is_contiguous() for x in results.values())
    assert len(filled) == (0 if name in HANDED_OVER else 2)


def test_repeated_heads_are_handed_over(monkeypatch):
    monkeypatch.setattr(torch_cpu_flash, "_MOST_SUMS", 3)  # those of one head's 70 rows
    monkeypatch.setattr(ops, "allocate_gradients", None)
    call, results = differentiated(Case(seqlen_q=70, seqlen_k=70, heads=8, heads_k=1, right=0), torch.bfloat16)
    assert_matches_reference(call, results)


def test_long_sums_are_not_handed_over(monkeypatch):
    case = Case(seqlen_q=600, seqlen_k=600, heads=2, heads_k=1, right=0)
    monkeypatch.setattr(torch_cpu_flash, "_MOST_SUMS", 1)
    monkeypatch.setattr(torch_cpu_flash, "whole_backward", None)
    call, results = differentiated(case, torch.bfloat16)
    assert_matches_reference(call, results)
