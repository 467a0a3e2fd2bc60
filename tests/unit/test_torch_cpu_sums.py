"""Gradients on the CPU in bfloat16, in which PyTorch's operator sums dk and dv over the query rows of a key head."""

import pytest
import torch

from flash_attn_plus import use_backend
from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs, run_engine

LONG = {
    "open": Case(seqlen_q=512, seqlen_k=2, heads=8, heads_k=1, head_dim=64),
    "window": Case(seqlen_q=512, seqlen_k=4, heads=8, heads_k=1, head_dim=64, left=511, right=500),
}


@pytest.mark.parametrize("name", LONG)
def test_gradients_of_many_rows_round_once(name):
    call = make_inputs(LONG[name], torch.bfloat16, "cpu")
    with use_backend("torch"):
        assert_matches_reference(call, run_engine(call, with_gradients=True))
