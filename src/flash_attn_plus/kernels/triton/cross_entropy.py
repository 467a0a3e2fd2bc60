"""Cross-entropy over rows of logits: the forward pass reads them once, the backward pass reads and writes them once.

With x = scale * logits and L = logsumexp(x):
    loss = L - (1 - smoothing) * x[label] - smoothing * sum(x) / total_classes + lse_square_scale * L^2
Exponents are in log2 units inside, natural logarithms outside.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _columns(first, LANES: tl.constexpr, WIDTH: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """[LANES, WIDTH] column numbers, such that the elements of a lane belong to one thread.

    Aligned rows are loaded by vectors, and a lane is one vector; else neighbouring threads load neighbouring elements.
    """
    lane, element = tl.arange(0, LANES)[:, None], tl.arange(0, WIDTH)[None, :]
    return first + (lane * WIDTH + element if IS_ALIGNED else element * LANES + lane)


@triton.jit
def _log2_sum_exp(
    row_ptr, num_cols, factor,
    HAS_SUM: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of 2^(factor * row), and the sum of the row if HAS_SUM: one pass, each lane on its own."""
    lane_max = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    lane_sum = tl.zeros((LANES,), dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for first in tl.range(0, num_cols, LANES * WIDTH):
        cols = _columns(first, LANES, WIDTH, IS_ALIGNED)
        x = tl.load(row_ptr + cols, mask=cols < num_cols, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(lane_max, tl.max(x, 1) * factor)
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing finite yet: avoid inf - inf
        lane_sum = lane_sum * tl.exp2(lane_max - pivot) + tl.sum(tl.exp2(x * factor - pivot[:, None]), 1)
        lane_max = new_max
        if HAS_SUM:
            total += tl.sum(tl.where(cols < num_cols, x, 0.0), 1)
    row_max = tl.max(lane_max, 0)
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(lane_sum * tl.exp2(lane_max - pivot), 0)
    return pivot + tl.log2(row_sum), tl.sum(total, 0)


@triton.jit(do_not_specialize=["class_start", "total_classes", "ignore_index"])
def cross_entropy_fwd_kernel(
    losses_ptr, lse_ptr, z_losses_ptr, logits_ptr, labels_ptr, precomputed_lse_ptr,
    smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes, num_cols, row_stride,
    IS_SPLIT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row a program. IS_SPLIT: these columns are a part of the vocabulary, and the caller adds logsumexp terms."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    label = tl.load(labels_ptr + row).to(tl.int64)
    if precomputed_lse_ptr is not None:
        lse, total = tl.load(precomputed_lse_ptr + row).to(tl.float32), 0.0
    else:
        lse2, total = _log2_sum_exp(row_ptr, num_cols, scale * LOG2E, HAS_SMOOTHING, LANES, WIDTH, IS_ALIGNED)
        lse, total = lse2 * LN2, total * scale
    tl.store(lse_ptr + row, lse)
    is_counted = label != ignore_index
    column = label - class_start
    is_here = is_counted & (column >= 0) & (column < num_cols)
    picked = tl.load(row_ptr + column, mask=is_here, other=0.0).to(tl.float32) * scale
    loss = tl.where(is_here, -(1.0 - smoothing) * picked, 0.0)
    if HAS_SMOOTHING:
        loss -= smoothing * total / total_classes
    if not IS_SPLIT:
        # A label that is no class of ours has no cross-entropy, only its smoothing part.
        loss += lse * tl.where(is_here, 1.0, smoothing)
        z_loss = lse_square_scale * lse * lse
        loss += z_loss
        tl.store(z_losses_ptr + row, tl.where(is_counted, z_loss, 0.0))
    tl.store(losses_ptr + row, tl.where(is_counted, loss, 0.0))


@triton.jit(do_not_specialize=["class_start", "total_classes", "ignore_index", "dlosses_stride"])
def cross_entropy_bwd_kernel(
    dlogits_ptr, dlosses_ptr, logits_ptr, lse_ptr, labels_ptr,
    smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes, num_cols,
    row_stride, dlogits_stride, dlosses_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row a program; dlogits may be logits."""
    blocks = tl.cdiv(num_cols, BLOCK)
    row = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < num_cols
    label = tl.load(labels_ptr + row).to(tl.int64)
    dloss = tl.load(dlosses_ptr + row.to(tl.int64) * dlosses_stride).to(tl.float32)
    dloss = tl.where(label != ignore_index, dloss, 0.0)
    lse = tl.load(lse_ptr + row).to(tl.float32)
    x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + cols, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp2((x * scale - lse) * LOG2E)  # subtract first: the large probabilities have small differences
    gradient = p * (1.0 + 2.0 * lse_square_scale * lse) - smoothing / total_classes
    gradient = tl.where(cols == label - class_start, gradient - (1.0 - smoothing), gradient)
    gradient *= dloss * scale
    gradient = gradient.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + row.to(tl.int64) * dlogits_stride + cols, gradient, mask=inside)
