"""Calls that another engine runs measurably faster than our own kernels, and by how much.

A row is here when the other engine was more than 3% faster in the same run, which benchmarks/results/nvidia-h200.json
records. Forward passes have no rows: cuDNN plans anew for every shape, which costs calls of varying lengths more than
the few per cent it gains there.
"""

from typing import NamedTuple

from flash_attn_plus.backends.foreign import compute_capability
from flash_attn_plus.problem import AttentionProblem


class Row(NamedTuple):
    """One measured family of backward passes: dense, as many queries and heads as keys have, without a window."""

    capability: int
    ours: str  # the backend of ours that would serve
    engine: str  # of the cuda backend
    head_dim: int
    is_causal: bool
    shortest: int  # from this many keys on
    ours_tflops: float  # at the shortest; at 8,192 keys the engine is as far ahead, within 4 %
    engine_tflops: float
    device: str


ROWS = (
    Row(90, "triton", "cudnn", 128, False, 2048, 421.6, 509.8, "an H200"),
    Row(90, "triton", "cudnn", 128, True, 2048, 357.0, 406.9, "an H200"),
    # The portable kernels split head dim 256 into two passes over the scores; cuDNN's keep it in one.
    Row(90, "triton", "cudnn", 256, False, 2048, 278.7, 365.3, "an H200"),
    Row(90, "triton", "cudnn", 256, True, 2048, 231.2, 319.7, "an H200"),
)


def _row(problem: AttentionProblem, over: str) -> Row | None:
    p = problem
    is_square = p.seqlen_q == p.seqlen_k and p.heads == p.heads_k and not (p.is_varlen_q or p.is_varlen_k)
    if not (p.is_backward and is_square) or p.left >= 0 or p.right > 0:
        return None
    kind = (over, p.head_dim, p.right == 0)
    for row in ROWS:
        if kind == (row.ours, row.head_dim, row.is_causal) and p.seqlen_k >= row.shortest:
            return row if compute_capability(p.device) == row.capability else None
    return None


def is_measured(problem: AttentionProblem, over: str) -> bool:
    """Whether some engine was faster here than `over`; asked first, for it loads nothing."""
    return _row(problem, over) is not None


def advantage(problem: AttentionProblem, over: str, engine: str) -> str | None:
    """The sentence for `explain`, with the numbers; None when this engine was not measured to be faster."""
    row = _row(problem, over)
    if row is None or row.engine != engine:
        return None
    return (
        f"yields to cuda, whose {engine} reached {row.engine_tflops:.0f} TFLOP/s here where {over} reached"
        f" {row.ours_tflops:.0f}, measured on {row.device}"
    )
