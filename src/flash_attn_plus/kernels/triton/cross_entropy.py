"""Cross-entropy over rows of logits: the forward pass reads them once, the backward pass reads and writes them once.

With x = scale * logits and L = logsumexp(x):
    loss = L - (1 - smoothing) * x[label] - smoothing * sum(x) / total_classes + lse_square_scale * L^2
Exponentials are powers of two inside, logarithms natural outside.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _whole_vectors(row, row_stride, num_cols, WIDTH: tl.constexpr):
    """(start, head, body): `body` elements of a row from `start` on are vectors of WIDTH; `head` elements go before.

    Rows may start anywhere: an odd vocabulary aligns one in WIDTH of them only, and loads by elements are slow.
    """
    first = row.to(tl.int64) * row_stride
    start = (first + WIDTH - 1) // WIDTH * WIDTH
    head = tl.minimum((start - first).to(tl.int32), num_cols)
    return tl.multiple_of(start, WIDTH), head, (num_cols - head) // WIDTH * WIDTH


@triton.jit
def _edge_columns(head, body, WIDTH: tl.constexpr):
    """[2 * WIDTH] columns before and behind the whole vectors; those that do not exist are beyond the last."""
    edge = tl.arange(0, 2 * WIDTH)
    return tl.where(edge < head, edge, body + edge)


@triton.jit
def _log_sum_exp(
    logits_ptr, row, row_stride, num_cols, scale, HAS_SUM: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """logsumexp of scale * row, and the sum of the row if HAS_SUM: one pass, each lane on its own."""
    factor = scale * LOG2E
    start, head, body = _whole_vectors(row, row_stride, num_cols, WIDTH)
    lane_top = tl.full((LANES,), float("-inf"), dtype=tl.float32)  # the largest element, and this times factor
    lane_max = lane_top
    lane_sum = tl.zeros((LANES,), dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for first in tl.range(0, body, LANES * WIDTH):
        at = (first + tl.arange(0, LANES) * WIDTH)[:, None]
        vectors_ptr = logits_ptr + start + at + tl.arange(0, WIDTH)[None, :]
        x = tl.load(vectors_ptr, mask=at < body, other=float("-inf")).to(tl.float32)
        top = tl.max(x, 1)
        lane_top = tl.maximum(lane_top, top)
        new_max = tl.maximum(lane_max, top * factor)
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing finite yet: avoid inf - inf
        lane_sum = lane_sum * tl.exp2(lane_max - pivot) + tl.sum(tl.exp2(tl.fma(x, factor, -pivot[:, None])), 1)
        lane_max = new_max
        if HAS_SUM:
            total += tl.sum(tl.where(at < body, x, 0.0), 1)
    cols = _edge_columns(head, body, WIDTH)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    edge = tl.load(row_ptr + cols, mask=cols < num_cols, other=float("-inf")).to(tl.float32)
    row_max = tl.maximum(tl.max(lane_max, 0), tl.max(edge, 0) * factor)
    is_finite = row_max > float("-inf")
    pivot = tl.where(is_finite, row_max, 0.0)
    top = tl.where(is_finite, tl.maximum(tl.max(lane_top, 0), tl.max(edge, 0)), 0.0)
    row_sum = tl.sum(lane_sum * tl.exp2(lane_max - pivot), 0) + tl.sum(tl.exp2(tl.fma(edge, factor, -pivot)), 0)
    edge_total = tl.sum(tl.where(cols < num_cols, edge, 0.0), 0)
    # The pivot's own rounding is taken out again, so that only the last addition rounds by more than the sum does:
    # what is wrong with the result is wrong with every probability of the backward pass.
    log_sum = (tl.log2(row_sum) - tl.fma(top, factor, -pivot)) * LN2
    return tl.fma(top, scale, log_sum), tl.sum(total, 0) + edge_total


@triton.jit(do_not_specialize=["class_start", "total_classes", "ignore_index"])
def cross_entropy_fwd_kernel(
    losses_ptr, lse_ptr, z_losses_ptr, logits_ptr, labels_ptr, precomputed_lse_ptr,
    smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes, num_cols, row_stride,
    IS_SPLIT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row a program. IS_SPLIT: these columns are a part of the vocabulary, and the caller adds logsumexp terms."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if precomputed_lse_ptr is not None:
        lse, total = tl.load(precomputed_lse_ptr + row).to(tl.float32), 0.0
    else:
        lse, total = _log_sum_exp(logits_ptr, row, row_stride, num_cols, scale, HAS_SMOOTHING, LANES, WIDTH)
        total *= scale
    tl.store(lse_ptr + row, lse)
    is_counted = label != ignore_index
    column = label - class_start
    is_here = is_counted & (column >= 0) & (column < num_cols)
    picked_ptr = logits_ptr + row.to(tl.int64) * row_stride + column
    picked = tl.load(picked_ptr, mask=is_here, other=0.0).to(tl.float32) * scale
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


@triton.jit
def _store_gradient(out_ptr, x_ptr, inside, is_label, lse, factor, uniform, smoothing, scale, lse_square_scale):
    """The gradient of logits: `factor` is that of the loss, `uniform` every class's share of the smoothing."""
    x = tl.load(x_ptr, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp2((x * scale - lse) * LOG2E)  # subtract first: the large probabilities have small differences
    gradient = p * (1.0 + 2.0 * lse_square_scale * lse) - uniform
    gradient = tl.where(is_label, gradient - (1.0 - smoothing), gradient) * factor
    tl.store(out_ptr, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["class_start", "total_classes", "ignore_index", "dlosses_stride"])
def cross_entropy_bwd_kernel(
    dlogits_ptr, dlosses_ptr, logits_ptr, lse_ptr, labels_ptr,
    smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes, dlosses_stride,
    num_cols, row_stride, dlogits_stride,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row a program; dlogits may be logits. Rows of both start at equal places."""
    blocks = tl.cdiv(num_cols, LANES * WIDTH)
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    label = tl.load(labels_ptr + row).to(tl.int64)
    dloss = tl.load(dlosses_ptr + row.to(tl.int64) * dlosses_stride).to(tl.float32)
    factor = tl.where(label != ignore_index, dloss, 0.0) * scale
    lse = tl.load(lse_ptr + row).to(tl.float32)
    column, uniform = label - class_start, smoothing / total_classes
    start, head, body = _whole_vectors(row, row_stride, num_cols, WIDTH)
    dstart, _, _ = _whole_vectors(row, dlogits_stride, num_cols, WIDTH)
    at = (block * LANES * WIDTH + tl.arange(0, LANES) * WIDTH)[:, None]
    cols = at + tl.arange(0, WIDTH)[None, :]
    _store_gradient(
        dlogits_ptr + dstart + cols, logits_ptr + start + cols, at < body, cols + head == column,
        lse, factor, uniform, smoothing, scale, lse_square_scale,
    )  # fmt: skip
    if (block == 0) & (body < num_cols):
        edge = _edge_columns(head, body, WIDTH)
        edge_ptr = logits_ptr + row.to(tl.int64) * row_stride + edge
        dedge_ptr = dlogits_ptr + row.to(tl.int64) * dlogits_stride + edge
        _store_gradient(
            dedge_ptr, edge_ptr, edge < num_cols, edge == column, lse, factor, uniform, smoothing, scale,
            lse_square_scale,
        )  # fmt: skip
