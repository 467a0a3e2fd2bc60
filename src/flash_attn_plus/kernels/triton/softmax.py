"""The running softmax over tiles of keys (Milakov and Gimelshein, arXiv 1805.02867)."""

import triton
import triton.language as tl

from flash_attn_plus.kernels.triton import score

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
PARTS: tl.constexpr = tl.constexpr(8)  # columns that a group of threads holds in NVIDIA's matrix layouts


@triton.jit
def step(scores, multiplier, row_max, row_sum, F: tl.constexpr):
    """Fold one tile of scores, keys last, in: (weights, decay of the sums before, new row_max, new row_sum)."""
    axis: tl.constexpr = len(scores.shape) - 1
    new_max = tl.maximum(row_max, tl.max(scores, axis) * multiplier)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key seen yet: avoid inf - inf
    weights = score.power(scores * multiplier - tl.expand_dims(pivot, axis), F)
    decay = score.power(row_max - pivot, F)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, axis)


@triton.jit
def peak_in_parts(scores, multiplier, row_max):
    """(new row_max, what weights are taken relative to): the first half of `step_in_parts`."""
    apart: tl.constexpr = [scores.shape[0], scores.shape[1] // PARTS, PARTS]
    new_max = tl.maximum(row_max, tl.max(tl.max(scores.reshape(apart), 1), 1) * multiplier)
    return new_max, tl.where(new_max == float("-inf"), 0.0, new_max)


@triton.jit
def weights_in_parts(scores, multiplier, row_max, pivot, row_sums, F: tl.constexpr):
    """(weights, decay, new row_sums) from the row_max before and the new pivot: the second half."""
    apart: tl.constexpr = [scores.shape[0], scores.shape[1] // PARTS, PARTS]
    weights = score.power(scores * multiplier - pivot[:, None], F)
    decay = score.power(row_max - pivot, F)
    return weights, decay, row_sums * decay[:, None] + tl.sum(weights.reshape(apart), 1)


@triton.jit
def step_in_parts(scores, multiplier, row_max, row_sums, F: tl.constexpr):
    """`step` with sums [M, PARTS], added up after the last tile: the sum of a tile takes no exchange among threads."""
    new_max, pivot = peak_in_parts(scores, multiplier, row_max)
    weights, decay, row_sums = weights_in_parts(scores, multiplier, row_max, pivot, row_sums, F)
    return weights, decay, new_max, row_sums


@triton.jit
def finish(row_max, row_sum, F: tl.constexpr):
    """(factor for the accumulator, natural-log LSE); a row without keys gets 0 and +inf."""
    is_empty = row_sum == 0.0
    total = tl.where(is_empty, 1.0, row_sum)
    maximum = row_max * (1.0 if F.is_exact else LN2)  # from the scores' units
    lse = maximum + tl.log2(total) * LN2
    lse = tl.where(is_empty, float("inf"), lse)
    return tl.where(is_empty, 0.0, 1.0 / total), lse
