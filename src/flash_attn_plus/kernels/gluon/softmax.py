"""The online softmax over wgmma accumulators, in log2 units.

What exponentials refer to follows a row's maximum only once it has fallen behind by SLACK. So what is summed is seldom
scaled, though maxima move in most steps, which gains 1 to 5 % beyond head dim 64 (h200-hopper-variants.json). Weights
up to 2**SLACK fit every dtype as well as those up to 1 do.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LN2 = gl.constexpr(0.6931471805599453)
SLACK = gl.constexpr(8.0)
# Row sums stay spread over a row's four lanes until the end, so a step needs no shuffle for them.
SUM_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@gluon.jit
def _partial_sum(p):
    rows = gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)
    return gl.convert_layout(rows, SUM_LAYOUT, assert_trivial=True)


@gluon.jit
def start(scores, scale):
    """(references, weights, partial row sums) of the first tile: its maxima, but finite where all keys are hidden."""
    row_max = gl.maximum(gl.max(scores, 1) * scale, -1e30)
    p = gl.exp2(scores * scale - gl.expand_dims(row_max, 1))
    return row_max, p, _partial_sum(p)


def _scaling(count: int) -> str:
    """Multiply `count` numbers by as many factors, those of two rows, unless they are 1 in all threads of the warp."""
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return (
        "{ .reg .pred moved, other;"
        f"setp.neu.f32 moved, ${2 * count}, 0f3F800000;"
        f"setp.neu.f32 other, ${2 * count + 2}, 0f3F800000;"
        "or.pred moved, moved, other;"
        "vote.sync.any.pred moved, moved, 0xffffffff;"
        f"@!moved bra SCALED; {products} SCALED: }}"
    )


_COUNTS = (32, 64, 128)
_SCALING = gl.constexpr({n: _scaling(n) for n in _COUNTS})
_OPERANDS = gl.constexpr({n: ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n) for n in _COUNTS})


@gluon.jit
def rescale(o, decay):
    """o * decay of its rows, skipped by a warp whose references have not moved.

    The compiler sees no multiplication in the branch, so it leaves it between two products, under the first.
    """
    COUNT: gl.constexpr = o.shape[1] // 2  # numbers a thread: of two rows, two columns of each in turn
    decays = gl.expand_dims(decay, 1)
    return gl.inline_asm_elementwise(
        _SCALING[COUNT], _OPERANDS[COUNT], [o, decays], dtype=gl.float32, is_pure=False, pack=COUNT
    )


@gluon.jit
def step(scores, scale, row_max, row_sum):
    """(references, decay of what was summed before, weights, partial row sums) with one more tile."""
    tile_max = gl.max(scores, 1) * scale
    new_max = gl.where(tile_max > row_max + SLACK, tile_max, row_max)
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
