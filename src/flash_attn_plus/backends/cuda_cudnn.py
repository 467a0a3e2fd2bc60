"""cuDNN's fused attention, through PyTorch's operators."""

from typing import Any

import torch
from torch import Tensor

from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.backends.cuda_fa2 import DROPOUT, HAS_DLSE
from flash_attn_plus.backends.foreign import (
    Probe,
    compute_capability,
    fill_delta,
    on,
    padded,
    store_gradients,
    store_out,
    with_positive_scale,
)
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

_OLDEST = 91000  # the first version with backward passes up to head dim 256


def _load() -> Any:
    aten = torch.ops.aten
    names = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")
    forward, backward = (getattr(aten, name).default for name in names)
    version = torch.backends.cudnn.version()
    if version is None:
        raise RuntimeError("this PyTorch is built without cuDNN")
    if version < _OLDEST:
        raise RuntimeError(f"cuDNN {version} is older than {_OLDEST}")
    return forward, backward


PROBE = Probe("cuDNN's attention", _load, "install a CUDA build of PyTorch with cuDNN 9.10 or later")


class Cudnn(Backend):
    """Forward and backward of dense calls without a window, on Hopper, where it was checked and is fast."""

    name = "cudnn"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        refused={
            "has_softcap": "softcap: PyTorch's operator has none",
            "has_alibi": "alibi_slopes: PyTorch's operator has none",
            "has_dropout": DROPOUT,
            "has_dlse": HAS_DLSE,
            "is_varlen_q": "packed sequences: not in PyTorch's operator",
            "is_varlen_k": "packed sequences: not in PyTorch's operator",
            "page_size": "paged keys: not in PyTorch's operator",
            "has_seqused_k": "seqused_k: not in PyTorch's operator",
            "has_leftpad_k": "leftpad_k: not in PyTorch's operator",
            "is_deterministic": "deterministic: not promised by cuDNN",
        },
    )

    def unavailable(self) -> str | None:
        """Why the operators cannot be used, with the remedy."""
        return PROBE.failure

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability, device, and a mask that begins in the top-left corner."""
        found = super().reasons(problem)
        if found:
            return found
        if compute_capability(problem.device) != 90:
            found.append(f"device {problem.device} is not of compute capability 9.0, on which it was checked")
        if problem.left >= 0 or problem.right > 0:
            found.append("window_size: not in PyTorch's operator")
        if problem.seqlen_q == problem.seqlen_k == 1:
            found.append("one query of one key: cuDNN refuses it")
        if problem.right == 0 and problem.seqlen_q != problem.seqlen_k:
            found.append(f"causal with {problem.seqlen_q} queries of {problem.seqlen_k} keys: it aligns them otherwise")
        return found

    def _operands(self, problem: AttentionProblem, x: AttentionInputs) -> tuple[list[Tensor], float, float]:
        """q, k and v as (b, h, s, d), the positive scale, and the factor of dq."""
        dim = -(-max(problem.head_dim, problem.head_dim_v) // 8) * 8
        q, scale, factor = with_positive_scale(x.q, x.softmax_scale)
        return [padded(t, dim).transpose(1, 2) for t in (q, x.k, x.v)], scale, factor

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward."""
        with on(problem.device):
            tensors, scale, _ = self._operands(problem, inputs)
            result, statistics, *_ = PROBE.value[0](*tensors, None, True, 0.0, problem.right == 0, False, scale=scale)
            store_out(out, result.transpose(1, 2))
            lse.copy_(statistics.view(lse.shape))

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """See Backend.backward; `dlse` is refused before."""
        with on(problem.device):
            tensors, scale, factor = self._operands(problem, inputs)
            fill_delta(dout, out, delta)
            dout_heads, out_heads = (padded(t, tensors[0].shape[-1]).transpose(1, 2) for t in (dout, out))
            state = torch.zeros((), dtype=torch.int64, device=lse.device)
            grads = PROBE.value[1](
                dout_heads, *tensors, out_heads, lse[..., None], state, state, None, None, None,
                problem.seqlen_q, problem.seqlen_k, 0.0, problem.right == 0, scale=scale,
            )  # fmt: skip
            store_gradients((dq, dk, dv), tuple(g.transpose(1, 2) for g in grads), factor)
