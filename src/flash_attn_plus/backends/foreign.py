"""What the adapters to engines of others share: loading them, and bringing calls into the forms they take."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus import device
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

# What importing a package that probes hardware, compiles or registers operators raises where it does not fit.
LOAD_FAILURES = (ImportError, RuntimeError, AttributeError, AssertionError, TypeError, ValueError, OSError)
_DELTA_NUMBERS = 2**23  # of one block of rows whose products are held in float32: 32 MiB


class Probe:
    """A package loaded at the first question about it; what came of it is remembered."""

    def __init__(self, name: str, load: Callable[[], Any], remedy: str) -> None:
        """`load` returns the package or raises one of LOAD_FAILURES; the remedy ends every refusal."""
        self._name, self._load, self._remedy = name, load, remedy
        self._answer: tuple[Any, str | None] | None = None

    def _ask(self) -> tuple[Any, str | None]:
        if self._answer is None:
            try:
                self._answer = (self._load(), None)
            except LOAD_FAILURES as error:
                cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                self._answer = (None, f"{self._name} not available: {' '.join(cause.split())[:300]}; {self._remedy}")
        return self._answer

    @property
    def failure(self) -> str | None:
        """Why the package cannot be used, with the remedy; None when it can."""
        return self._ask()[1]

    @property
    def value(self) -> Any:
        """What was loaded."""
        return self._ask()[0]

    def forget(self) -> None:
        """Ask anew at the next question, as after an installation."""
        self._answer = None


def require_version(name: str, found: str, oldest: tuple[int, ...], below: tuple[int, ...]) -> None:
    """Raise RuntimeError unless oldest <= found < below, compared by their leading numbers."""
    numbers: list[int] = []
    for part in found.split("+")[0].split(".")[: len(below)]:
        digits = part[: next((i for i, c in enumerate(part) if not c.isdigit()), len(part))]
        numbers.append(int(digits or 0))
    numbers += [0] * (len(below) - len(numbers))
    if not oldest <= tuple(numbers) < below:
        wanted = f"at least {'.'.join(map(str, oldest))} and below {'.'.join(map(str, below))}"
        raise RuntimeError(f"{name} {found} is not among the versions whose results were checked, {wanted}")


def compute_capability(where: torch.device) -> int:
    """90 for an NVIDIA device of compute capability 9.0, as far as families of devices are told apart; 0 for others."""
    family = device.probe(where).family
    return int(family.removeprefix("cuda")) if family.startswith("cuda") else 0


def on(where: torch.device) -> AbstractContextManager:
    """Make the tensors' device current: engines launch on the current one."""
    return nullcontext() if where.type == "cpu" else torch.get_device_module(where.type).device(where)


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q, scale, factor of dq) of the same scores with a positive scale: engines take maxima before they scale."""
    if scale > 0.0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0.0 else (torch.zeros_like(q), 1.0, 0.0)


def padded(x: Tensor, dim: int) -> Tensor:
    """x with zeros up to that last dimension, and with rows that 16-byte loads reach; x itself where it has both."""
    if x.shape[-1] < dim:
        return F.pad(x, (0, dim - x.shape[-1]))
    mask = 16 // x.element_size() - 1
    strides = zip(x.shape[:-1], x.stride(), strict=False)
    is_reachable = x.data_ptr() & 15 == 0 and all(n == 1 or (s > 0 and s & mask == 0) for n, s in strides)
    return x if is_reachable else x.clone(memory_format=torch.contiguous_format)


def even_starts(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens of equal lengths: int32 (batch + 1,)."""
    return torch.arange(0, batch * length + 1, max(length, 1), dtype=torch.int32, device=device)[: batch + 1]


def without_trailing(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A copy with zeros behind the last sequence, for kernels that multiply what lies there by 0; dense x as it is."""
    if cu_seqlens is None:
        return x
    is_covered = torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1]
    return x.where(is_covered[:, None, None], 0.0)


def packed_statistics(x: Tensor, is_packed: bool) -> Tensor:
    """Statistics (b, h, sq) as (h, b * sq); packed ones as they are."""
    return x if is_packed else x.transpose(0, 1).reshape(x.shape[1], -1)


def store_statistics(target: Tensor, packed: Tensor) -> None:
    """Write statistics (h, b * sq) into `target` (b, h, sq), or packed ones as they are."""
    if target.ndim == 3:
        packed = packed.view(target.shape[1], target.shape[0], target.shape[2]).transpose(0, 1)
    target.copy_(packed)


def fill_delta(dout: Tensor, out: Tensor, delta: Tensor) -> None:
    """delta = rowsum(dout * out) in float32, block of rows by block of rows; (b, h, sq) or (h, total_q)."""
    flat_dout, flat_out = (x.reshape(-1, *x.shape[-2:]) for x in (dout, out))
    rows = max(1, _DELTA_NUMBERS // max(1, flat_out.shape[-2] * flat_out.shape[-1]))
    flat = torch.empty(flat_out.shape[:2], dtype=delta.dtype, device=delta.device)
    for first in range(0, flat.shape[0], rows):
        block = slice(first, first + rows)
        torch.sum(flat_dout[block].float() * flat_out[block], -1, out=flat[block])
    store_statistics(delta, flat.t())


def diagonal(problem: AttentionProblem, x: AttentionInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """(p, len_k, sequence) of each query row: p(i) = i + len_k - len_q, its keys, its sequence's index.

    Rows are (b, sq), or (total_q,) for packed queries; the index is None for dense ones.
    """
    if x.seqused_k is not None:
        len_k = x.seqused_k
    elif x.cu_seqlens_k is not None:
        len_k = x.cu_seqlens_k.diff()
    else:
        len_k = torch.full((problem.batch,), problem.seqlen_k, dtype=torch.int32, device=x.q.device)
    if x.leftpad_k is not None:
        len_k = len_k - x.leftpad_k
    if not problem.is_varlen_q:
        rows = torch.arange(problem.seqlen_q, device=x.q.device)
        return rows + (len_k - problem.seqlen_q)[:, None], len_k[:, None].expand(-1, problem.seqlen_q), None
    token = torch.arange(x.q.shape[0], dtype=torch.int32, device=x.q.device)
    sequence = torch.searchsorted(x.cu_seqlens_q[1:], token, right=True).clamp_(max=problem.batch - 1)
    len_q = x.cu_seqlens_q.diff()
    return (token - x.cu_seqlens_q[sequence] + (len_k - len_q)[sequence], len_k[sequence], sequence)


def slopes_of_rows(problem: AttentionProblem, x: AttentionInputs, sequence: Tensor | None) -> Tensor:
    """ALiBi slopes that broadcast against statistics: (b or 1, h, 1), or (h, total_q or 1) for packed queries."""
    slopes = x.alibi_slopes
    if sequence is None:
        return slopes.view(-1, problem.heads, 1)
    return slopes[sequence].t() if slopes.ndim == 2 else slopes[:, None]


def target_of(out: Tensor, like: Tensor) -> Tensor | None:
    """`out` in the shape of an engine's result, where the engine can write it in place."""
    return out.view(like.shape) if out.shape[-1] == like.shape[-1] and out.is_contiguous() else None


def store_out(out: Tensor, result: Tensor) -> None:
    """Write an engine's result, perhaps packed and of a padded head dim; nothing to do where it is `out` itself."""
    if result.data_ptr() != out.data_ptr():
        out.copy_(result[..., : out.shape[-1]].reshape(out.shape))


def store_gradients(targets: tuple[Tensor, ...], gradients: tuple[Tensor, ...], dq_factor: float) -> None:
    """Write dq, dk and dv, perhaps packed and of padded head dims; dq times the factor of `with_positive_scale`."""
    for target, gradient in zip(targets, gradients, strict=True):
        target.copy_(gradient[..., : target.shape[-1]].reshape(target.shape))
    if dq_factor != 1.0:
        targets[0].mul_(dq_factor)
