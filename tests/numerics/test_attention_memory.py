"""The torch backend never makes a tensor of queries times keys."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_attn_plus import selection
from flash_attn_plus.testing import Case, make_inputs

LENGTH = 4096
OPTIONS = {
    "full": {},
    "causal": {"right": 0},
    "causal_wide": {"right": 0, "seqlen_q": LENGTH // 2},
    "left": {"left": LENGTH // 2},
    "window": {"left": 300, "right": 20},
    "softcap": {"softcap": 5.0, "right": 0},
    "alibi": {"alibi": "heads", "right": 0},
    "dropout": {"dropout_p": 0.2},
    "value_wider": {"head_dim_v": 16, "right": 0},
}


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        # A view such as an expanded one takes no memory: count what its storage holds.
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_largest_temporary(options):
    case = Case(seqlen_q=LENGTH, seqlen_k=LENGTH, head_dim=8)._replace(**options)
    call, backend = make_inputs(case), selection.get("torch")
    q, k, v = call.inputs[:3]
    out, lse = torch.empty_like(call.dout), torch.empty(1, 1, case.seqlen_q)
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    with Largest() as largest:
        backend.forward(call.problem(), call.inputs, out, lse)
        results = out, lse, call.dlse if case.softcap else None, dq, dk, dv, delta
        backend.backward(call.problem(is_backward=True), call.inputs, call.dout, *results)
    assert 0 < largest.numbers <= case.seqlen_q * case.seqlen_k // 7
