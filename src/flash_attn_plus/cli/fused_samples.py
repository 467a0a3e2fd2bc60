"""The fused operations of a model, as samples that `warmup` compiles: norms, cross-entropy and rotary embedding."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.cli.shapes import META
from flash_attn_plus.fused import cross_entropy, norm_launch, rotary

# Kernels take any number of rows. More of them than programs, on which the steps depend in which partial sums are added
# up; and few enough that tensors are below 2 GB, for which AMD's have shorter offsets.
ROWS = 4096


class FusedSample(NamedTuple):
    """One pass of one operation on tensors without contents."""

    operation: str  # rmsnorm, layernorm, vocab or rotary, as the model's word is
    sizes: tuple[int, ...]  # features, classes, or heads and head dim
    dtype: torch.dtype
    is_backward: bool = False
    has_residual: bool = False  # a norm's

    def launch(self) -> None:
        """Prepare and launch the pass's kernels, as a call with such tensors would."""
        {"vocab": self._cross_entropy, "rotary": self._rotary}.get(self.operation, self._norm)()

    def place(self) -> tuple[str, str]:
        """(form, where it is first needed), for people."""
        return self.operation, " ".join(map(str, self.sizes)) + (" with residual" if self.has_residual else "")

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=META)

    def _norm(self) -> None:
        (cols,) = self.sizes
        is_rms_norm = self.operation == "rmsnorm"
        x, weight, numbers = self._empty(ROWS, cols), self._empty(cols), self._empty(ROWS, dtype=torch.float32)
        bias, mean = (None, None) if is_rms_norm else (weight, numbers)
        residual = x if self.has_residual else None
        if self.is_backward:
            norm_launch.norm_backward(
                x, x, weight, bias, None, None, residual, None, None, mean, numbers, 0.0, False, is_rms_norm,
                x, None, None, None, weight, bias, None, None,
            )  # fmt: skip
            return
        norm_launch.norm_forward(
            x, weight, bias, residual, None, None, None, None, None, 1e-5, 0.0, False, is_rms_norm,
            x, None, residual, mean, numbers, None, None,
        )  # fmt: skip

    def _cross_entropy(self) -> None:
        (classes,) = self.sizes
        rows = ROWS // 8
        logits, row = self._empty(rows, classes), self._empty(rows, dtype=torch.float32)
        labels, numbers = self._empty(rows, dtype=torch.int64), (0.0, 1.0, 0.0, -100, 0, classes)
        if self.is_backward:
            cross_entropy._backward_triton(row, logits, row, labels, *numbers, logits)
        else:
            cross_entropy._forward_triton(logits, labels, None, *numbers, False, row, row, row)

    def _rotary(self) -> None:
        heads, dim = self.sizes
        x, table = self._empty(2, 64, heads, dim), self._empty(64, dim // 2)
        rotary._apply_triton(x, table, table, 0, None, False, torch.empty_like(x), self.is_backward)


def samples(found: dict[str, Any], dtype: torch.dtype) -> Iterator[FusedSample]:
    """The passes that a model's words ask for."""
    passes = (False, True) if found.get("train") else (False,)
    for operation in ("rmsnorm", "layernorm"):
        if operation in found:
            for is_backward in passes:
                for has_residual in (False, True):
                    yield FusedSample(operation, (found[operation],), dtype, is_backward, has_residual)
    if "vocab" in found:
        for is_backward in passes:
            yield FusedSample("vocab", (found["vocab"],), dtype, is_backward)
    if found.get("rotary"):
        heads = found.get("h", 16)
        for count in sorted({heads, found.get("hk", heads)}):
            for is_backward in passes:
                yield FusedSample("rotary", (count, found.get("d", 128)), dtype, is_backward)
