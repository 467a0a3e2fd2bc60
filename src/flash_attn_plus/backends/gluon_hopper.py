"""The Hopper backend: warp-specialised Gluon kernels for compute capability 9.0.

A call whose tensors the copy engine cannot reach (base or strides no multiple of 16 bytes), or whose softmax scale is
not positive, runs on the portable Triton kernels instead: the description of a call does not tell these.
"""

import importlib.util

import torch
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import hopper


class GluonHopper(Backend):
    """Forward and backward on H100, H200 and GH200."""

    name = "gluon"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        devices=frozenset({"cuda"}),
        refused={
            "has_softcap": "softcap not implemented",
            "has_alibi": "alibi_slopes not implemented",
            "has_dropout": "dropout not implemented",
            "page_size": "paged keys not implemented",
            "has_seqused_k": "seqused_k not implemented",
            "has_leftpad_k": "leftpad_k not implemented",
        },
    )

    def unavailable(self) -> str | None:
        """Gluon is experimental, so only the releases of Triton with which the kernels are tested count."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; install the triton package (it comes with PyTorch's GPU builds)"
        if not torch.cuda.is_available() or torch.version.hip:
            return "no NVIDIA GPU is visible to PyTorch"
        import triton

        if not triton.__version__.startswith("3.6."):
            return f"triton {triton.__version__} has another Gluon than the kernels are written for; install triton 3.6"
        return None

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability and device limits."""
        found = super().reasons(problem)
        if found:
            return found
        if device.probe(problem.device).family != "cuda90":
            found.append(f"device {problem.device} is not of compute capability 9.0 (Hopper)")
        if problem.head_dim_v != problem.head_dim:
            found.append(f"head_dim_v {problem.head_dim_v} is not head_dim {problem.head_dim}")
        if problem.head_dim % 8:
            found.append(f"head_dim {problem.head_dim} is no multiple of 8")
        if problem.is_backward and problem.head_dim > max(hopper.BACKWARD):
            found.append(f"head_dim {problem.head_dim} > {max(hopper.BACKWARD)} not implemented in the backward pass")
        if problem.is_backward and problem.is_deterministic:
            found.append("deterministic not implemented: dq is summed in no fixed order")
        return found

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward; one kernel."""
        from flash_attn_plus.backends import gluon_launch, triton_launch

        fits = inputs.softmax_scale > 0.0 and all(map(gluon_launch.can_copy, (inputs.q, inputs.k, inputs.v, out)))
        (gluon_launch if fits else triton_launch).forward(problem, inputs, out, lse)

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """See Backend.backward; three kernels."""
        from flash_attn_plus.backends import gluon_launch, triton_launch

        tensors = (inputs.q, inputs.k, inputs.v, dout, out, dq, dk, dv)
        fits = inputs.softmax_scale > 0.0 and all(map(gluon_launch.can_copy, tensors))
        launch = gluon_launch if fits else triton_launch
        launch.backward(problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta)
