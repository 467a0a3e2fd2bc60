"""The CUDA backend: the original kernels, by whichever installed engine fits a call best."""

import importlib
from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor

from flash_attn_plus.backends import cuda_measured
from flash_attn_plus.backends.base import Backend, Capability
from flash_attn_plus.backends.foreign import compute_capability
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

_ENGINES = {
    "fa2": ("flash_attn_plus.backends.cuda_fa2_extension", "Fa2Extension"),
    "fa3": ("flash_attn_plus.backends.cuda_fa3", "Fa3"),
    "fa4": ("flash_attn_plus.backends.cuda_fa4", "Fa4"),
    "cudnn": ("flash_attn_plus.backends.cuda_cudnn", "Cudnn"),
    "torch_fa2": ("flash_attn_plus.backends.cuda_fa2_torch", "Fa2Torch"),
}
_LONG = 2048  # from this many queries and keys on FlashAttention-4 is faster than cuDNN on an H200, below it slower


@cache
def engine(name: str) -> Backend:
    """The engine of that name; nothing foreign is loaded before it is asked about a problem."""
    module, cls = _ENGINES[name]
    return getattr(importlib.import_module(module), cls)()


def order(problem: AttentionProblem) -> tuple[str, ...]:
    """Engines, the fittest first: on Hopper those written for it, elsewhere FlashAttention-2."""
    if compute_capability(problem.device) != 90:
        return ("fa2", "torch_fa2", "fa3", "fa4", "cudnn")
    if min(problem.seqlen_q, problem.seqlen_k) >= _LONG:
        return ("fa3", "fa4", "cudnn", "fa2", "torch_fa2")
    return ("fa3", "cudnn", "fa4", "fa2", "torch_fa2")


@lru_cache(maxsize=4096)
def judge(problem: AttentionProblem) -> tuple[Backend | None, tuple[str, ...]]:
    """(the first engine that serves the problem or None, why those before it do not)."""
    found: list[str] = []
    for name in order(problem):
        reasons = engine(name).reasons(problem)
        if not reasons:
            return engine(name), tuple(found)
        found.append(f"{name}: {', '.join(reasons)}")
    return None, tuple(found)


class CudaOriginal(Backend):
    """FlashAttention-2, -3 and -4 and cuDNN's attention, forward and backward."""

    name = "cuda"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        max_head_dim=256,
        devices=frozenset({"cuda"}),
        refused={"is_batch_invariant": "batch invariance: the engines split keys by how many sequences there are"},
    )

    def unavailable(self) -> str | None:
        """The kernels are NVIDIA's; whether one is there depends on the call."""
        is_there = torch.cuda.is_available() and not torch.version.hip
        return None if is_there else "no NVIDIA GPU is visible to PyTorch"

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Limits of all engines, else each engine's own reasons."""
        found = self.capability.reasons(problem)
        missing = None if found else self.unavailable()
        if found or missing:
            return [missing] if missing else found
        chosen, reasons = judge(problem)
        return [] if chosen else list(reasons)

    def engine_name(self, problem: AttentionProblem) -> str:
        """See Backend.engine_name."""
        chosen, _ = judge(problem)
        return chosen.name if chosen else ""

    def leads(self, problem: AttentionProblem, over: str) -> str | None:
        """See Backend.leads: by the table of measured calls, for the engine that would serve this one."""
        if not cuda_measured.is_measured(problem, over) or self.reasons(problem):
            return None
        chosen, _ = judge(problem)
        return cuda_measured.advantage(problem, over, chosen.name)

    def plan_forward(self, problem: AttentionProblem, inputs: AttentionInputs) -> Callable[..., None]:
        """See Backend.plan_forward: keeps the engine."""
        chosen, _ = judge(problem)
        return chosen.plan_forward(problem, inputs)

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward."""
        chosen, _ = judge(problem)
        chosen.forward(problem, inputs, out, lse)

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """See Backend.backward."""
        chosen, _ = judge(problem)
        chosen.backward(problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta)
