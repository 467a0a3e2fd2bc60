"""Shared key heads on the CPU, where PyTorch's operator may not know them: in releases before 2.9 it reads on."""

import pytest
import torch

from flash_attn_plus import attention, use_backend
from flash_attn_plus.backends import torch_cpu_flash
from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs, run_engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [{"right": 0}, {}, {"left": 5, "right": 2}, {"alibi": "heads"}], ids=str)
def test_repeated_for_every_query_head(bounds, dtype, monkeypatch):
    monkeypatch.setattr(torch_cpu_flash, "_shares_heads", lambda: False)
    shapes = []
    fused = torch_cpu_flash._forward
    monkeypatch.setattr(
        torch_cpu_flash, "_forward", lambda q, k, v, *a, **o: (shapes.append((q, k)), fused(q, k, v, *a, **o))[1]
    )
    call = make_inputs(Case(batch=2, seqlen_q=9, seqlen_k=13, heads=6, heads_k=2, head_dim=24, **bounds), dtype, "cpu")
    with use_backend("torch"):
        results = run_engine(call, with_gradients=True)
    assert shapes
    assert all(q.shape[1] == k.shape[1] == 6 for q, k in shapes)
    assert_matches_reference(call, results)


def test_this_release_reads_no_other_head():
    q, k, v = (torch.randn(1, 5, heads, 16) for heads in (4, 2, 2))
    expanded = [x.repeat_interleave(2, 2) for x in (k, v)]
    with use_backend("torch"):
        torch.testing.assert_close(attention(q, k, v, causal=True), attention(q, *expanded, causal=True))
