"""Sums on the CPU: bfloat16 dk and dv over many rows, and products of few rows with many keys."""

import pytest
import torch

from flash_attn_plus import use_backend
from flash_attn_plus.backends import torch_cpu_flash
from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs, run_engine

LONG = {
    "open": Case(seqlen_q=512, seqlen_k=2, heads=8, heads_k=1, head_dim=64),
    "window": Case(seqlen_q=512, seqlen_k=4, heads=8, heads_k=1, head_dim=64, left=511, right=500),
    "rows": Case(seqlen_q=4300, seqlen_k=16, heads=1, heads_k=1, head_dim=64),
}
CUT = {
    "causal": Case(seqlen_q=600, seqlen_k=650, heads=2, heads_k=1, head_dim=40, right=0),
    "causal_tall": Case(seqlen_q=600, seqlen_k=300, heads=2, heads_k=1, head_dim=40, head_dim_v=24, right=0),
    "right": Case(seqlen_q=600, seqlen_k=600, heads=2, heads_k=2, head_dim=40, right=70, softmax_scale=-0.3),
}


def check(case):
    call = make_inputs(case, torch.bfloat16, "cpu")
    with use_backend("torch"):
        assert_matches_reference(call, run_engine(call, with_gradients=True))


@pytest.mark.parametrize("name", LONG)
def test_gradients_of_many_rows_round_once(name):
    check(LONG[name])


@pytest.mark.parametrize("seqlen_k", [128, 256, 300])
def test_few_rows_add_up_over_all_keys(seqlen_k):
    case = Case(seqlen_q=2, seqlen_k=seqlen_k, heads=4, heads_k=2, softcap=5.0)
    call = make_inputs(case, torch.float32, "cpu")
    with use_backend("torch"):
        assert_matches_reference(call, run_engine(call, with_gradients=True))


@pytest.mark.parametrize("name", CUT)
def test_blocks_of_rows_add_up(name, monkeypatch):
    monkeypatch.setattr(torch_cpu_flash, "_MOST_SUMS", 1)
    check(CUT[name])
