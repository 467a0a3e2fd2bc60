"""Calls that another engine runs measurably faster than our own kernels, and by how much.

A row is here when the other engine was more than 3% faster in the same run. Forward passes have no rows: cuDNN plans
anew for every shape, which costs the calls of a varying length more than the few per cent it gains there.
"""

from typing import NamedTuple

from flash_attn_plus.backends.foreign import compute_capability
from flash_attn_plus.problem import AttentionProblem


class Row(NamedTuple):
    """One measured family of backward calls: dense, square, without a window."""

    capability: int
    ours: str  # the backend of ours that would serve
    engine: str  # of the cuda backend
    head_dims: range
    is_causal: bool
    seqlens: range
    ratio: float  # the smallest of the measured speed-ups
    device: str


_LONGEST = 1 << 30
ROWS = (
    # The portable kernels split head dim 256 into two passes; cuDNN's are written for Hopper.
    Row(90, "triton", "cudnn", range(248, 257), True, range(2048, _LONGEST), 1.45, "an H200"),
)


def _rows(problem: AttentionProblem, over: str) -> list[Row]:
    p = problem
    if not p.is_backward or p.left >= 0 or p.right > 0 or p.seqlen_q != p.seqlen_k or p.is_varlen_q or p.is_varlen_k:
        return []
    found = [r for r in ROWS if r.ours == over and p.head_dim in r.head_dims and p.seqlen_k in r.seqlens]
    found = [r for r in found if r.is_causal == (p.right == 0)]
    return [r for r in found if r.capability == compute_capability(p.device)] if found else []


def is_measured(problem: AttentionProblem, over: str) -> bool:
    """Whether some engine was faster here than `over`; asked first, for it loads nothing."""
    return bool(_rows(problem, over))


def advantage(problem: AttentionProblem, over: str, engine: str) -> str | None:
    """The sentence for `explain`, with the number; None when this engine was not measured to be faster."""
    for row in _rows(problem, over):
        if row.engine == engine:
            return f"yields to cuda, whose {engine} is {row.ratio:.2f} times as fast here, measured on {row.device}"
    return None
