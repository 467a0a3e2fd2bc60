"""The running softmax over tiles of keys (Milakov and Gimelshein, arXiv 1805.02867), in log2 units."""

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def step(scores, scale_log2, row_max, row_sum):
    """Fold one tile of scores in: (weights, decay of what was summed before, new row_max, new row_sum)."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key seen yet: avoid inf - inf
    weights = tl.exp2(scores * scale_log2 - pivot[:, None])
    decay = tl.exp2(row_max - pivot)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def finish(row_max, row_sum):
    """(factor for the accumulator, natural-log LSE); a row without keys gets 0 and +inf."""
    is_empty = row_sum == 0.0
    total = tl.where(is_empty, 1.0, row_sum)
    lse = tl.where(is_empty, float("inf"), (row_max + tl.log2(total)) * LN2)
    return tl.where(is_empty, 0.0, 1.0 / total), lse
