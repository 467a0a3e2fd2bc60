"""Tensors that no asynchronous copy can take, with values narrower than keys: their tiles differ in layout."""

import pytest
import torch
from serving import BACKENDS

from flash_attn_plus import use_backend
from flash_attn_plus.testing import Case, assert_matches_reference, make_inputs, run_engine

SLICED = Case(batch=1, seqlen_q=40, seqlen_k=70, heads=2, heads_k=1, layout="sliced")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 16), (64, 32), (33, 1), (128, 16), (16, 64)])
def test_narrow_values(head_dim, head_dim_v, right, backend, device):
    case = SLICED._replace(head_dim=head_dim, head_dim_v=head_dim_v, right=right)
    call = make_inputs(case, torch.float16, device)
    with use_backend(backend):
        assert_matches_reference(call, run_engine(call, with_gradients=True))
