"""FlashAttention-2 inside PyTorch: aten::_flash_attention_forward and _backward, as far as their schemas go."""

from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from flash_attn_plus.backends.base import Capability
from flash_attn_plus.backends.cuda_fa2 import DROPOUT, HAS_DLSE, Fa2, Fa2Call
from flash_attn_plus.backends.foreign import Probe
from flash_attn_plus.problem import AttentionInputs, AttentionProblem


def _load() -> Any:
    aten = torch.ops.aten
    forward, backward = aten._flash_attention_forward.default, aten._flash_attention_backward.default
    if not torch.backends.cuda.is_flash_attention_available():
        raise RuntimeError("this PyTorch is built without FlashAttention-2")
    if "rng_state" not in {r.name for r in forward._schema.returns}:
        raise RuntimeError(f"torch {torch.__version__} pads the LSE of packed sequences")
    return forward, backward


PROBE = Probe("PyTorch's FlashAttention-2", _load, "install a CUDA build of PyTorch 2.7 or later")


def _replacement() -> str | None:
    """The kernels that someone put behind PyTorch's operators, whose results differ for rows without keys."""
    ask = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return ask() if ask else None


def _arguments(operator: Any) -> frozenset[str]:
    return frozenset(a.name for a in operator._schema.arguments)


class Fa2Torch(Fa2):
    """aten::_flash_attention_forward and _backward, which every CUDA build of PyTorch holds."""

    name = "torch_fa2"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        refused={
            "has_softcap": "softcap: PyTorch's operator has none",
            "has_alibi": "alibi_slopes: PyTorch builds its copy without them, though its operator has the argument",
            "has_dropout": DROPOUT,
            "has_dlse": HAS_DLSE,
            "page_size": "paged keys: not in the operator of every PyTorch",
            "has_leftpad_k": "leftpad_k: PyTorch's operator has none",
            "is_deterministic": "deterministic: PyTorch's operator knows the process's setting only",
        },
    )

    def unavailable(self) -> str | None:
        """Why the operators cannot be used, with the remedy."""
        return PROBE.failure

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability, device, and what the operators' schemas lack."""
        found = super().reasons(problem) or self.common_reasons(problem)
        if found:
            return found
        if _replacement():
            return [f"PyTorch's operator runs {_replacement()}; call torch.nn.attention.restore_flash_attention_impl()"]
        wanted = {
            "window_size_left": problem.left >= 0 or problem.right > 0,
            "seqused_k": problem.has_seqused_k,
        }
        has = _arguments(PROBE.value[problem.is_backward])
        return [
            f"{name}: not in this PyTorch's operator" for name, is_wanted in wanted.items() if is_wanted > (name in has)
        ]

    def call_forward(self, c: Fa2Call, x: AttentionInputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Fa2.call_forward."""
        options: dict[str, Any] = {"seqused_k": x.seqused_k} if x.seqused_k is not None else {}
        found = PROBE.value[0](
            c.q,
            c.k,
            c.v,
            c.cu_q,
            c.cu_k,
            c.max_q,
            c.max_k,
            0.0,
            c.is_causal,
            False,
            scale=c.scale,
            **options,
            **_window_options(c),
        )
        return found[0], found[1]

    def call_backward(
        self, c: Fa2Call, x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, is_deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Fa2.call_backward."""
        state = torch.zeros(2, dtype=torch.uint64, device=c.q.device)
        return PROBE.value[1](
            dout, c.q, c.k, c.v, out, lse, c.cu_q, c.cu_k, c.max_q, c.max_k, 0.0, c.is_causal, state, state[:1],
            scale=c.scale, **_window_options(c),
        )  # fmt: skip


def _window_options(c: Fa2Call) -> dict[str, int]:
    sides = {"window_size_left": c.left, "window_size_right": c.right}
    return {name: side for name, side in sides.items() if side >= 0}
