"""FlashAttention-4 (`flash_attn.cute`, the distribution flash-attn-4): kernels that CuTe DSL compiles at first use."""

import importlib
import inspect
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.backends.foreign import (
    Probe,
    compute_capability,
    fill_delta,
    on,
    padded,
    require_version,
    store_gradients,
    store_out,
    with_positive_scale,
    without_trailing,
)
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

OLDEST, BELOW = (4, 0), (4, 1)
_SHARED = frozenset({
    "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right", "cu_seqlens_q", "cu_seqlens_k",
    "max_seqlen_q", "max_seqlen_k",
})  # fmt: skip
# What was held to the oracle on an H200; every other combination is compiled anew, so it is refused.
_HEAD_DIMS = (64, 128, 256)
_SHORTEST = 256


def _load() -> Any:
    require_version("flash-attn-4", metadata.version("flash-attn-4"), OLDEST, BELOW)
    module = importlib.import_module("flash_attn.cute.interface")
    for function, own in ((module._flash_attn_fwd, {"return_lse"}), (module._flash_attn_bwd, set())):
        missing = (_SHARED | own) - inspect.signature(function).parameters.keys()
        if missing:
            raise RuntimeError(f"{function.__name__} has another interface, without {', '.join(sorted(missing))}")
    return module


PROBE = Probe("FlashAttention-4", _load, "install flash-attn-4 4.0, which lives beside this package")


def _options(p: AttentionProblem, x: AttentionInputs, scale: float) -> dict[str, Any]:
    is_causal = p.left < 0 and p.right == 0
    return {
        "softmax_scale": scale,
        "causal": is_causal,
        "softcap": 0.0,
        "window_size_left": p.left if p.left >= 0 else None,
        "window_size_right": p.right if p.right >= 0 and not is_causal else None,
        "cu_seqlens_q": x.cu_seqlens_q,
        "cu_seqlens_k": x.cu_seqlens_k,
        "max_seqlen_q": p.seqlen_q if p.is_varlen_q else None,
        "max_seqlen_k": p.seqlen_k if p.is_varlen_k else None,
    }


class Fa4(Backend):
    """Forward and backward on Hopper, dense and packed, with windows.

    Like FlashAttention-3's, its kernels multiply what follows the last sequence by 0, so packed tensors are copied
    without that.
    """

    name = "fa4"
    capability = Capability(
        dtypes=frozenset({torch.bfloat16}),
        max_head_dim=256,
        refused={
            "has_softcap": "softcap: not checked",
            "has_alibi": "alibi_slopes: FlashAttention-4 has none",
            "has_dropout": "dropout: FlashAttention-4 has none",
            "has_dlse": "a gradient of the LSE: not checked",
            "page_size": "paged keys: not checked",
            "has_seqused_k": "seqused_k: NaN in the unused part of a cache would reach the output",
            "has_leftpad_k": "leftpad_k: FlashAttention-4 has none",
            "is_deterministic": "deterministic: not checked",
        },
    )

    def unavailable(self) -> str | None:
        """Why the package cannot be used, with the remedy."""
        return PROBE.failure

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability and device; the package is loaded only when nothing else speaks against it."""
        found = self.capability.reasons(problem)
        if compute_capability(problem.device) != 90:
            found.append(f"device {problem.device} is not of compute capability 9.0, on which it was checked")
        if problem.head_dim_v != problem.head_dim:
            found.append(f"head_dim_v {problem.head_dim_v} is not head_dim {problem.head_dim}")
        if problem.head_dim not in _HEAD_DIMS:
            found.append(f"head_dim {problem.head_dim} is not one of {', '.join(map(str, _HEAD_DIMS))}")
        if (problem.left < 0) != (problem.right < 0) and problem.right != 0:
            found.append("window_size open on one side: not checked")
        if problem.is_varlen_q != problem.is_varlen_k:
            found.append("packed queries beside dense keys, or the reverse: not checked")
        if min(problem.seqlen_q, problem.seqlen_k) < _SHORTEST:
            found.append(f"fewer than {_SHORTEST} queries or keys: not checked")
        missing = None if found else self.unavailable()
        return [missing] if missing else found

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward."""
        x = inputs
        with on(problem.device):
            q, scale, _ = with_positive_scale(x.q, x.softmax_scale)
            q, k, v = _operands(problem, (q, x.cu_seqlens_q), (x.k, x.cu_seqlens_k), (x.v, x.cu_seqlens_k))
            found = PROBE.value._flash_attn_fwd(q, k, v, return_lse=True, **_options(problem, x, scale))
            store_out(out, found[0])
            lse.copy_(found[1])
            lse.masked_fill_(lse == float("-inf"), float("inf"))  # rows without keys

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """See Backend.backward; `dlse` is refused before."""
        x = inputs
        with on(problem.device):
            fill_delta(dout, out, delta)
            q, scale, factor = with_positive_scale(x.q, x.softmax_scale)
            rows_q = ((t, x.cu_seqlens_q) for t in (q, out, dout))
            q, out, dout, k, v = _operands(problem, *rows_q, (x.k, x.cu_seqlens_k), (x.v, x.cu_seqlens_k))
            grads = PROBE.value._flash_attn_bwd(q, k, v, out, dout, lse, **_options(problem, x, scale))
            store_gradients((dq, dk, dv), grads[:3], factor)


def _operands(problem: AttentionProblem, *rows: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    """Each tensor with rows that its loads reach and nothing behind the last of its sequences."""
    return [without_trailing(padded(x, problem.head_dim), cu_seqlens) for x, cu_seqlens in rows]
