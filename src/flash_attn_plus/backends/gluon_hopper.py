"""The Hopper backend: warp-specialised Gluon kernels for compute capability 9.0.

The copy engine wants addresses and strides in multiples of 16 bytes. Inputs without them are refused; outputs and
gradients without them, which come after the choice of a backend, are filled by the portable Triton kernels.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import decode


def can_copy(x: Tensor) -> bool:
    """Whether the copy engine reaches the tensor: base and strides in multiples of 16 bytes, none of them 0."""
    mask = 16 // x.element_size() - 1
    for n, s in zip(x.shape[:-1], x.stride(), strict=False):
        if n > 1 and (s <= 0 or s & mask):
            return False
    return x.data_ptr() & 15 == 0


# Releases of Triton under which every kernel passed on an H200: Gluon is experimental and changes with each.
PROVEN = ("3.6.", "3.7.")
FAILED = {"3.9.": "the backward pass hangs under it"}


def has_proven_gluon() -> bool:
    """Whether Triton is of a release under which the kernels are proven."""
    import triton

    return triton.__version__.startswith(PROVEN)


PAGE = 128  # rows of the largest tile of keys, which must lie within a page
# Products of a call that runs for about 20 microseconds: below it the host's time for a launch decides.
SMALLEST_WORK = 2 * 10**9


class GluonHopper(Backend):
    """Forward and backward on H100, H200 and GH200."""

    name = "gluon"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        devices=frozenset({"cuda"}),
        refused={"has_dropout": "dropout not implemented"},
    )

    def unavailable(self) -> str | None:
        """Gluon is experimental, so only the releases of Triton with which the kernels are tested count."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; install the triton package (it comes with PyTorch's GPU builds)"
        if not torch.cuda.is_available() or torch.version.hip:
            return "no NVIDIA GPU is visible to PyTorch"
        import triton

        if not has_proven_gluon():
            found = triton.__version__
            why = next((w for v, w in FAILED.items() if found.startswith(v)), "the kernels are not proven under it")
            return f"triton {found}: {why}; install triton 3.6 or 3.7"
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
        if problem.page_size % PAGE:
            found.append(f"page_size {problem.page_size} is no multiple of {PAGE}")
        if problem.page_size and problem.has_leftpad_k:
            found.append("leftpad_k not implemented for paged keys")
        if problem.is_backward and (problem.page_size or problem.has_seqused_k or problem.has_leftpad_k):
            found.append("caches not implemented in the backward pass")
        return found

    def yields(self, problem: AttentionProblem) -> str | None:
        """Small calls to the portable kernels, whose launch takes half the host time, and few queries to split keys."""
        p = problem
        if decode.is_decode(p, device.probe(p.device)):
            return "yields few queries to kernels that split the keys"
        if p.is_batch_invariant:
            return "yields where the size of the batch must decide nothing"
        if p.batch * p.heads * p.seqlen_q * p.seqlen_k * p.head_dim < SMALLEST_WORK:
            return "yields a call this small to kernels that launch faster"
        return None

    def input_reasons(self, inputs: AttentionInputs) -> list[str]:
        """The copy engine's conditions, and a positive scale: maxima are taken before it is applied."""
        found = [
            f"{name} has an address or strides {x.stride()} that are no positive multiples of 16 bytes"
            for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))
            if not can_copy(x)
        ]
        if inputs.seqused_k is not None or inputs.leftpad_k is not None or inputs.block_table is not None:
            from flash_attn_plus.backends.gluon_tiles import rows_between

            if not rows_between(inputs.k) or rows_between(inputs.k) != rows_between(inputs.v):
                found.append(f"k and v have strides {inputs.k.stride()} and {inputs.v.stride()}, not rows in common")
        if inputs.softmax_scale <= 0.0:
            found.append(f"softmax_scale {inputs.softmax_scale} is not positive")
        return found

    def plan_forward(self, problem: AttentionProblem, inputs: AttentionInputs) -> Callable[..., None]:
        """See Backend.plan_forward: keeps the compiled kernel and the shapes of its descriptors."""
        from flash_attn_plus.backends import gluon_launch

        return gluon_launch.ForwardPlan(problem, inputs)

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward; one kernel."""
        from flash_attn_plus.backends import gluon_launch, triton_launch

        (gluon_launch if can_copy(out) else triton_launch).forward(problem, inputs, out, lse)

    def plan_backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv) -> Callable[..., None]:
        """See Backend.plan_backward: keeps the compiled kernels and the shapes of their descriptors."""
        from flash_attn_plus.backends import gluon_backward, triton_launch

        if all(map(can_copy, (dout, out, dq, dk, dv))):
            return gluon_backward.BackwardPlan(problem, inputs, dout, out, lse, dlse, dq, dk, dv)
        return partial(triton_launch.backward, problem)

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """See Backend.backward; three kernels."""
        given = inputs, dout, out, lse, dlse, dq, dk, dv
        self.plan_backward(problem, *given)(*given, delta)
