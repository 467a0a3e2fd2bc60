"""What a backend is: its limits as data, and two functions that fill given outputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flash_attn_plus.problem import AttentionInputs, AttentionProblem


@dataclass(frozen=True)
class Capability:
    """The limits of a backend; `reasons` turns each that a problem breaks into a sentence with the offending value."""

    dtypes: frozenset[torch.dtype]
    max_head_dim: int
    devices: frozenset[str] | None = None  # None: any device type
    refused: dict[str, str] = field(default_factory=dict)  # a true AttentionProblem field -> why it is refused
    takes_block_mask: bool = False
    cache_dtypes: frozenset[torch.dtype] = frozenset()  # of keys and values, besides that of the queries

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Why the problem lies outside these limits; empty when it does not."""
        found = []
        if self.devices is not None and problem.device.type not in self.devices:
            found.append(f"device {problem.device.type} is not one of {', '.join(sorted(self.devices))}")
        if problem.dtype not in self.dtypes:
            found.append(f"dtype {str(problem.dtype).removeprefix('torch.')} not supported")
        if problem.head_dim > self.max_head_dim:
            found.append(f"head_dim {problem.head_dim} > {self.max_head_dim}")
        if problem.head_dim_v > self.max_head_dim:
            found.append(f"head_dim_v {problem.head_dim_v} > {self.max_head_dim}")
        found += [why for name, why in self.refused.items() if getattr(problem, name)]
        if problem.has_block_mask and not self.takes_block_mask:
            found.append("block_mask not implemented")
        if problem.cache_dtype is not None and problem.cache_dtype not in self.cache_dtypes:
            found.append(f"keys and values in {str(problem.cache_dtype).removeprefix('torch.')} not implemented")
        return found


class Backend(ABC):
    """One engine. Implementations hold no state that depends on a call."""

    name: str
    capability: Capability

    def unavailable(self) -> str | None:
        """Why the backend cannot run in this process at all, with the remedy; None when it can."""
        return None

    def dormant(self) -> str | None:
        """What to tell, instead of loading the backend, where nobody asks for it; None when asking loads nothing."""
        return None

    def reasons(self, problem: AttentionProblem) -> list[str]:
        """Every reason why this backend does not serve the problem; empty means that it does."""
        missing = self.unavailable()
        return [missing] if missing else self.capability.reasons(problem)

    def yields(self, problem: AttentionProblem) -> str | None:
        """Why the next backend should rather serve what this one can; asked when none is asked for by name."""
        return None

    def engine_name(self, problem: AttentionProblem) -> str:
        """Which of several engines inside the backend would run the call; empty where it has one."""
        return ""

    def leads(self, problem: AttentionProblem, over: str) -> str | None:
        """Why this backend should go before `over`, which serves the problem too, with the measured number."""
        return None

    def input_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Reasons that only the tensors tell, such as alignment; asked after `reasons` found none."""
        return []

    def plan_forward(self, problem: AttentionProblem, inputs: AttentionInputs) -> Callable[..., None]:
        """What runs `forward(problem, ...)` for these inputs and any others of the same shapes, strides and numbers.

        A backend with costly launches overrides it to work out once what such calls share.
        """
        return partial(self.forward, problem)

    def plan_outputs(
        self, problem: AttentionProblem, inputs: AttentionInputs
    ) -> Callable[[AttentionInputs], tuple[Tensor, Tensor]] | None:
        """As `plan_forward`, but for (out, lse) in memory that the backend has anyway; None: it fills buffers.

        Spares a backend whose operators allocate their results a copy of each.
        """
        return None

    @abstractmethod
    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """Write every covered row of `out` (like q with v's head dim) and of `lse`.

        `lse` is natural-log float32, (b, h, sq) or (h, total_q); a row that sees no key gets out 0 and LSE +inf.
        """

    def gradients(
        self, problem: AttentionProblem, inputs: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...] | None:
        """As `plan_outputs`, dq, dk and dv, where no gradient of the LSE arrives; None: `backward` fills buffers."""
        return None

    def plan_backward(
        self,
        problem: AttentionProblem,
        inputs: AttentionInputs,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> Callable[..., None]:
        """As `plan_forward`, what runs `backward(problem, ...)` for these tensors and any others laid out alike."""
        return partial(self.backward, problem)

    @abstractmethod
    def backward(
        self,
        problem: AttentionProblem,
        inputs: AttentionInputs,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        delta: Tensor,
    ) -> None:
        """Write dq, dk and dv (any strides, last one 1) and `delta` = rowsum(dout * out) - dlse, float32 like `lse`.

        `out` and `lse` may come from any backend, or from a softmax merged over more keys than are given here.
        """
