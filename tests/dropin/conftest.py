"""Calls of the interface made from the engine's test cases."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flash_attn import flash_attn_interface as interface
from torch import Tensor

from flash_attn_plus.autograd import dropout_state
from flash_attn_plus.testing import Case, make_inputs, poisoned_outputs

SEED = 1234
GOLDEN = json.loads((Path(__file__).parent / "interface_golden.json").read_text())


class Invocation:
    """One public function with the tensors and options of a case, packed as that function takes them.

    Shapes that the function cannot express are fitted: `varlen` functions get packed sequences, `qkvpacked` ones
    equal lengths and heads. `call.inputs.rng_state` is what the function draws after `torch.manual_seed(SEED)`.
    """

    def __init__(self, name: str, case: Case, dtype: torch.dtype, device: str):
        if "varlen" in name and case.lengths_q is None:
            case = case._replace(lengths_q=(7, case.seqlen_q, 1), lengths_k=(case.seqlen_k, 30, 5))
        if "qkvpacked" in name:
            case = case._replace(heads_k=case.heads, seqlen_k=case.seqlen_q, lengths_k=case.lengths_q)
        self.name, self.function = name, getattr(interface, name)
        self.call = make_inputs(case, dtype, device)
        if case.dropout_p > 0.0:
            torch.manual_seed(SEED)
            state = dropout_state(self.call.inputs.q, case.dropout_p)
            self.call = self.call._replace(inputs=self.call.inputs._replace(rng_state=state))
        x, call = self.call.inputs, self.call
        self.options = {
            "dropout_p": x.dropout_p,
            "softmax_scale": x.softmax_scale,
            "causal": call.right == 0,
            "window_size": (call.left, -1 if call.right == 0 else call.right),
            "softcap": x.softcap,
            "alibi_slopes": x.alibi_slopes,
        }
        self.sequences = []
        if "varlen_qkvpacked" in name:
            self.sequences = [x.cu_seqlens_q, call.max_seqlen_q]
        elif "varlen" in name:
            self.sequences = [x.cu_seqlens_q, x.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k]
        self.leaves = [t.requires_grad_() for t in self._packed(*(t.detach() for t in x[:3]))]

    def _packed(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        if "qkvpacked" in self.name:
            return [torch.stack((q, k, v), -3)]
        return [q, torch.stack((k, v), -3)] if "kvpacked" in self.name else [q, k, v]

    def _unpacked(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if "qkvpacked" in self.name:
            return grads[0].unbind(-3)
        return (grads[0], *grads[1].unbind(-3)) if "kvpacked" in self.name else grads

    def __call__(self, **options):
        """The function's own result."""
        torch.manual_seed(SEED)
        return self.function(*self.leaves, *self.sequences, **self.options | options)

    def results(self, **options) -> dict[str, Tensor]:
        """out, lse, dq, dk and dv; the gradients of packed tensors must be contiguous tensors of their own."""
        with poisoned_outputs():
            out, lse, _ = self(return_attn_probs=True, **options)
            grads = torch.autograd.grad(out, self.leaves, self.call.dout)
        for leaf, grad in zip(self.leaves, grads, strict=True):
            assert grad.shape == leaf.shape
            assert grad.is_contiguous()
        return {"out": out.detach(), "lse": lse.detach()} | dict(
            zip(("dq", "dk", "dv"), self._unpacked(grads), strict=True)
        )


@pytest.fixture
def precise(device: str) -> torch.dtype:
    """The widest dtype of the device: errors of meaning stand out from rounding."""
    return torch.float64 if device == "cpu" else torch.float32


@pytest.fixture
def invoke(device: str, precise: torch.dtype) -> Callable[..., Invocation]:
    """invoke(name, case, dtype): an Invocation on the device under test."""
    return lambda name, case, dtype=None: Invocation(name, case, dtype or precise, device)


@pytest.fixture(scope="session")
def golden() -> dict:
    """Upstream's names, parameters and numbers of results, written from its contract."""
    return GOLDEN
