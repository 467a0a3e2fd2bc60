"""The online softmax over wgmma accumulators, in log2 units."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LN2 = gl.constexpr(0.6931471805599453)
# Row sums stay spread over a row's four lanes until the end, so a step needs no shuffle for them.
SUM_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@gluon.jit
def _partial_sum(p):
    rows = gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)
    return gl.convert_layout(rows, SUM_LAYOUT, assert_trivial=True)


@gluon.jit
def start(scores, scale):
    """(row maxima, weights, partial row sums) of the first tile; the maxima stay finite where all keys are hidden."""
    row_max = gl.maximum(gl.max(scores, 1) * scale, -1e30)
    p = gl.exp2(scores * scale - gl.expand_dims(row_max, 1))
    return row_max, p, _partial_sum(p)


@gluon.jit
def step(scores, scale, row_max, row_sum):
    """(row maxima, decay of what was summed before, weights, partial row sums) with one more tile."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale)
    decay = gl.exp2(row_max - new_max)
    p = gl.exp2(scores * scale - gl.expand_dims(new_max, 1))
    spread = gl.convert_layout(decay, gl.SliceLayout(1, SUM_LAYOUT), assert_trivial=True)
    return new_max, decay, p, row_sum * gl.expand_dims(spread, 1) + _partial_sum(p)


@gluon.jit
def finish(row_max, row_sum, layout: gl.constexpr):
    """(factor that normalises the output, natural-log LSE): 0 and +inf for a row without keys."""
    total = gl.convert_layout(gl.sum(row_sum, 1), layout, assert_trivial=True)
    is_empty = total == 0.0
    lse = gl.where(is_empty, float("inf"), (row_max + gl.log2(total)) * LN2)
    return gl.where(is_empty, 0.0, 1.0 / total), lse
