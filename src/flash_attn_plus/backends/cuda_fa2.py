"""What the ways to FlashAttention-2's CUDA kernels share: they mask, bias and pad alike, which is put right here."""

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor

from flash_attn_plus.backends.base import Backend
from flash_attn_plus.backends.foreign import (
    compute_capability,
    diagonal,
    even_starts,
    fill_delta,
    on,
    packed_statistics,
    padded,
    slopes_of_rows,
    store_gradients,
    store_out,
    store_statistics,
    target_of,
    with_positive_scale,
)
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

DROPOUT = "dropout: its random numbers follow the tiles, so no other backend could serve the backward pass"
HAS_DLSE = "a gradient of the LSE: its backward pass takes none"


class Fa2Call(NamedTuple):
    """A call as the kernels take it: rows 16-byte aligned, head dims equal, the scale positive."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    dq_factor: float
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    is_causal: bool
    left: int
    right: int


def _is_packed(problem: AttentionProblem) -> bool:
    """Whether the entry for packed sequences must serve: lengths differ, or dense lengths would cut a window."""
    p = problem
    has_lengths = p.is_varlen_q or p.is_varlen_k or p.page_size or p.has_seqused_k or p.has_leftpad_k
    return bool(has_lengths) or _reach(p) > p.seqlen_k


def _reach(problem: AttentionProblem) -> int:
    """The maximal length of keys to state: the kernels drop a window's side from there on, or set an open one to it."""
    is_window = problem.left >= 0 or problem.right > 0
    return max(problem.seqlen_k, problem.seqlen_q) if is_window else problem.seqlen_k


def fa2_call(problem: AttentionProblem, x: AttentionInputs) -> Fa2Call:
    """The operands of a forward or backward pass."""
    p, dim = problem, -(-max(problem.head_dim, problem.head_dim_v) // 8) * 8
    q, scale, factor = with_positive_scale(x.q, x.softmax_scale)
    q, k, v = (padded(t, dim) for t in (q, x.k, x.v))
    is_causal = p.left < 0 and p.right == 0
    band = (is_causal, p.left, -1 if is_causal else p.right)
    if not _is_packed(p):
        return Fa2Call(q, k, v, scale, factor, None, None, p.seqlen_q, p.seqlen_k, *band)
    cu_q, cu_k, max_q = x.cu_seqlens_q, x.cu_seqlens_k, p.seqlen_q
    if cu_q is None:
        q, cu_q = q.reshape(-1, *q.shape[2:]), even_starts(p.batch, p.seqlen_q, q.device)
    elif max_q == 1:
        max_q = 2  # with 1 the kernels regroup heads, and then want a query in every sequence
    if cu_k is None:
        cu_k = even_starts(p.batch, p.seqlen_k, q.device)
    if not (p.is_varlen_k or p.page_size):
        k, v = (t.reshape(-1, *t.shape[2:]) for t in (k, v))
    return Fa2Call(q, k, v, scale, factor, cu_q, cu_k, max_q, _reach(p), *band)


def _alibi_shift(problem: AttentionProblem, x: AttentionInputs) -> Tensor:
    """What the causal kernels' LSE has above the contract's, packed: they add slope * j instead of slope * (j - p)."""
    position, _, sequence = diagonal(problem, x)
    slopes = slopes_of_rows(problem, x, sequence)
    shift = slopes * (position[:, None] if sequence is None else position).float()
    return packed_statistics(shift.expand(problem.batch, -1, -1) if sequence is None else shift, sequence is not None)


class Fa2(Backend):
    """What both ways to the kernels share."""

    def common_reasons(self, problem: AttentionProblem) -> list[str]:
        """Limits of the kernels beside the capability's."""
        capability = compute_capability(problem.device)
        return (
            [] if capability >= 80 else [f"device {problem.device}: the kernels need compute capability 8.0 or later"]
        )

    @abstractmethod
    def call_forward(self, c: Fa2Call, x: AttentionInputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out, lse) in the call's form, `out` where it was given and fits."""

    @abstractmethod
    def call_backward(
        self, c: Fa2Call, x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, is_deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) in the call's form."""

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor) -> None:
        """See Backend.forward."""
        c = fa2_call(problem, inputs)
        with on(problem.device):
            result, statistics = self.call_forward(c, inputs, target_of(out, c.q))
            store_out(out, result)
            if c.cu_q is None:
                statistics = packed_statistics(statistics, False)
            if problem.has_alibi and c.is_causal:
                statistics = statistics - _alibi_shift(problem, inputs)
            store_statistics(lse, statistics)

    def backward(self, problem, inputs, dout, out, lse, dlse, dq, dk, dv, delta) -> None:
        """See Backend.backward; `dlse` is refused before."""
        c = fa2_call(problem, inputs)
        dim = c.q.shape[-1]
        with on(problem.device):
            fill_delta(dout, out, delta)
            statistics = packed_statistics(lse, problem.is_varlen_q)
            if problem.has_alibi and c.is_causal:
                statistics = statistics + _alibi_shift(problem, inputs)
            if c.cu_q is None:
                statistics = statistics.view(problem.heads, problem.batch, -1).transpose(0, 1).contiguous()
            packed_dout, packed_out = (padded(t.contiguous(), dim).view(c.q.shape) for t in (dout, out))
            grads = self.call_backward(c, inputs, packed_dout, packed_out, statistics, problem.is_deterministic)
            store_gradients((dq, dk, dv), grads, c.dq_factor)
