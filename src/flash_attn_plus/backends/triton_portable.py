"""The portable Triton backend: launches the kernels of `kernels/triton` on any device Triton compiles for."""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.problem import AttentionInputs, AttentionProblem
from flash_attn_plus.tuning import decode, heuristics

_GPU_TYPES = frozenset({"cuda", "xpu", "npu", "musa", "mlu"})


def is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes"}


def _series(package: str) -> tuple[int, ...]:
    """The first two numbers of an installed package's version."""
    return tuple(int(number) for number in metadata.version(package).split(".")[:2])


@cache
def interpreter_lacks() -> str | None:
    """What Triton's interpreter needs and does not find, or None; asked once, for packages do not change."""
    if importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs numpy; install it"
    if _series("numpy") >= (2, 4) and _series("triton") < (3, 7):
        return "Triton's interpreter before Triton 3.7 needs numpy before 2.4; install 'numpy<2.4'"
    return None


class TritonPortable(Backend):
    """Forward and backward on any Triton target; under TRITON_INTERPRET=1 on CPU tensors, when asked for by name."""

    name = "triton"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        max_head_dim=512,
        takes_block_mask=True,
        cache_dtypes=frozenset({torch.float8_e4m3fn}),
    )

    def unavailable(self) -> str | None:
        """Triton is optional: say how to get it."""
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; install the triton package (it comes with PyTorch's GPU builds)"
        return None

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Capability, device and tile limits."""
        found = super().reasons(problem)
        if found:
            return found
        if problem.device.type == "cpu":
            if not is_interpreted():
                return ["device cpu: Triton reaches CPU tensors only with TRITON_INTERPRET=1"]
            if lacking := interpreter_lacks():
                return [lacking]
            # Triton 3.6 multiplies the raw bits of bfloat16 as integers there.
            return (
                ["dtype bfloat16: Triton's interpreter cannot multiply it"] if problem.dtype == torch.bfloat16 else []
            )
        if problem.device.type not in _GPU_TYPES:
            return [f"device {problem.device.type} has no Triton target"]
        if problem.cache_dtype is not None and not device.reads_e4m3(problem.device):
            return ["keys and values in float8_e4m3fn need compute capability 8.9 or later"]
        facts = device.probe(problem.device)
        if not heuristics.fits(problem, facts):
            return [f"head_dim {problem.head_dim} does not fit the {facts.shared_memory // 1024} KB of shared memory"]
        return []

    def plan_forward(self, problem: AttentionProblem, inputs: AttentionInputs) -> Callable[..., None]:
        """See Backend.plan_forward: keeps the compiled kernels and their arguments."""
        from flash_attn_plus.backends import triton_decode, triton_launch

        is_decode = decode.is_decode(problem, device.probe(problem.device))
        return (triton_decode.SplitPlan if is_decode else triton_launch.ForwardPlan)(problem, inputs)

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward; one kernel, or two where the keys of a sequence are split."""
        self.plan_forward(problem, inputs)(inputs, out, lse)

    def plan_backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv) -> Callable[..., None]:
        """See Backend.plan_backward: keeps the compiled kernels and their arguments."""
        from flash_attn_plus.backends import triton_launch

        return triton_launch.BackwardPlan(problem, inputs)

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """See Backend.backward; three kernels, no atomics, so always bitwise repeatable."""
        from flash_attn_plus.backends import triton_launch

        triton_launch.backward(problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta)
