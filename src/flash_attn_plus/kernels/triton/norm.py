"""Layer norm and RMS norm over rows held in registers, with residual, second input, row scale and dropout fused.

    t = dropout(x * rowscale) + dropout(x1) + residual;  y = (t - mean) * rstd * weight + bias

RMS norm leaves the mean out. Optional pointers are None, which Triton compiles away.
"""

from typing import NamedTuple

import triton
import triton.language as tl

ROUNDS: tl.constexpr = tl.constexpr(7)


class NormFlags(NamedTuple):
    """Compile-time switches of one variant."""

    is_rms_norm: bool
    is_zero_centered: bool  # the weight is stored minus one


@triton.jit
def keep_bits(seeds_ptr, rows, in_rows, threshold, BLOCK_N: tl.constexpr):
    """[BLOCK_R, BLOCK_N] bool: Philox of (row seed, column // 8); each of its eight 16-bit halves decides a column."""
    seed = tl.load(seeds_ptr + rows, mask=in_rows, other=0)[:, None]
    group = (tl.arange(0, BLOCK_N // 8)[None, :] + (seed * 0).to(tl.int32)).to(tl.uint32)
    zero = group * 0
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(group, zero, zero, zero, low, high, ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (rows, groups, 2, 2): w0, w1, w2, w3 in memory order
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves.to(tl.int32), (seed.shape[0], BLOCK_N)) < threshold


@triton.jit
def _weight(weight_ptr, cols, in_cols, F: tl.constexpr):
    weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    return weight + 1.0 if F.is_zero_centered else weight


@triton.jit
def _affine(normed, weight_ptr, bias_ptr, cols, in_cols, F: tl.constexpr):
    y = normed * _weight(weight_ptr, cols, in_cols, F)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _store_rows(ptr, stride, value, rows, cols, inside):
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_rows(ptr, stride, rows, cols, inside):
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _drop(
    value, seeds_ptr, mask_ptr, rows, cols, in_rows, inside, threshold, scale, N: tl.constexpr, BLOCK_N: tl.constexpr
):
    keep = keep_bits(seeds_ptr, rows, in_rows, threshold, BLOCK_N)
    if mask_ptr is not None:
        _store_rows(mask_ptr, N, keep, rows, cols, inside)
    return tl.where(keep, value * scale, 0.0)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def norm_forward_kernel(
    x_ptr, residual_ptr, x1_ptr, rowscale_ptr, seeds_ptr, weight_ptr, bias_ptr, weight1_ptr, bias1_ptr,
    y_ptr, y1_ptr, t_ptr, mean_ptr, rstd_ptr, mask_ptr, mask1_ptr,
    num_rows, eps, threshold, keep_scale,
    x_stride, residual_stride, x1_stride, y_stride, y1_stride, t_stride,
    N: tl.constexpr, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < num_rows, cols < N
    inside = in_rows[:, None] & in_cols[None, :]
    t = _load_rows(x_ptr, x_stride, rows, cols, inside)
    if rowscale_ptr is not None:
        t *= tl.load(rowscale_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if seeds_ptr is not None:
        t = _drop(t, seeds_ptr, mask_ptr, rows, cols, in_rows, inside, threshold, keep_scale, N, BLOCK_N)
    if x1_ptr is not None:
        x1 = _load_rows(x1_ptr, x1_stride, rows, cols, inside)
        if seeds_ptr is not None:  # the second half of the seeds
            x1 = _drop(
                x1, seeds_ptr + num_rows, mask1_ptr, rows, cols, in_rows, inside, threshold, keep_scale, N, BLOCK_N
            )
        t += x1
    if residual_ptr is not None:
        t += _load_rows(residual_ptr, residual_stride, rows, cols, inside)
    if t_ptr is not None:
        _store_rows(t_ptr, t_stride, t, rows, cols, inside)
    if not F.is_rms_norm:
        mean = tl.sum(t, 1) / N
        tl.store(mean_ptr + rows, mean, mask=in_rows)
        t = tl.where(in_cols[None, :], t - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(t * t, 1) / N + eps)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    t *= rstd[:, None]
    _store_rows(y_ptr, y_stride, _affine(t, weight_ptr, bias_ptr, cols, in_cols, F), rows, cols, inside)
    if weight1_ptr is not None:
        _store_rows(y1_ptr, y1_stride, _affine(t, weight1_ptr, bias1_ptr, cols, in_cols, F), rows, cols, inside)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def norm_backward_kernel(
    t_ptr, dy_ptr, dy1_ptr, dt_ptr, rowscale_ptr, seeds_ptr, weight_ptr, bias_ptr, weight1_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dx1_ptr, dresidual_ptr, y_ptr, dweight_ptr, dbias_ptr, dweight1_ptr, dbias1_ptr,
    num_rows, threshold, keep_scale,
    t_stride, dy_stride, dy1_stride, dt_stride, dx_stride, dx1_stride, dresidual_stride, y_stride,
    N: tl.constexpr, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    REREAD_ABOVE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    in_cols = cols < N
    weight = _weight(weight_ptr, cols, in_cols, F)
    dweight = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    dbias, dweight1, dbias1 = dweight, dweight, dweight  # sums whose pointer is None stay zero and cost nothing
    for first in tl.range(program * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R, num_stages=NUM_STAGES):
        rows = first + tl.arange(0, BLOCK_R)
        in_rows = rows < num_rows
        inside = in_rows[:, None] & in_cols[None, :]
        normed = _load_rows(t_ptr, t_stride, rows, cols, inside)
        dy = _load_rows(dy_ptr, dy_stride, rows, cols, inside)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]
        if not F.is_rms_norm:
            normed -= tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
        normed = tl.where(in_cols[None, :], normed * rstd, 0.0)
        if y_ptr is not None:
            _store_rows(y_ptr, y_stride, _affine(normed, weight_ptr, bias_ptr, cols, in_cols, F), rows, cols, inside)
        if BLOCK_N > REREAD_ABOVE:  # registers are short: read the weight again, from the first-level cache
            weight = _weight(weight_ptr, cols, in_cols, F)
        dnormed = dy * weight
        if dweight_ptr is not None:
            dweight += dy * normed
        if dbias_ptr is not None:
            dbias += dy
        if dy1_ptr is not None:
            dy1 = _load_rows(dy1_ptr, dy1_stride, rows, cols, inside)
            dnormed += dy1 * _weight(weight1_ptr, cols, in_cols, F)
            if dweight1_ptr is not None:
                dweight1 += dy1 * normed
            if dbias1_ptr is not None:
                dbias1 += dy1
        if F.is_rms_norm:
            slope = tl.sum(normed * dnormed, 1) / N
        else:  # both sums in one reduction: threads wait for each other once
            slope, shift = tl.split(tl.sum(tl.join(normed * dnormed, dnormed), 1) / N)
            dnormed -= shift[:, None]
        dt = (dnormed - normed * slope[:, None]) * rstd
        if dt_ptr is not None:  # the gradient that arrives at t itself
            dt += _load_rows(dt_ptr, dt_stride, rows, cols, inside)
        if dresidual_ptr is not None:
            _store_rows(dresidual_ptr, dresidual_stride, dt, rows, cols, inside)
        if dx1_ptr is not None:
            dx1 = dt
            if seeds_ptr is not None:
                dx1 = _drop(
                    dt, seeds_ptr + num_rows, None, rows, cols, in_rows, inside, threshold, keep_scale, N, BLOCK_N
                )
            _store_rows(dx1_ptr, dx1_stride, dx1, rows, cols, inside)
        if seeds_ptr is not None:
            dt = _drop(dt, seeds_ptr, None, rows, cols, in_rows, inside, threshold, keep_scale, N, BLOCK_N)
        if rowscale_ptr is not None:
            dt *= tl.load(rowscale_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        _store_rows(dx_ptr, dx_stride, dt, rows, cols, inside)
    if dweight_ptr is not None:
        _store_sums(dweight_ptr, dweight, program, cols, in_cols, N)
    if dbias_ptr is not None:
        _store_sums(dbias_ptr, dbias, program, cols, in_cols, N)
    if dweight1_ptr is not None:
        _store_sums(dweight1_ptr, dweight1, program, cols, in_cols, N)
    if dbias1_ptr is not None:
        _store_sums(dbias1_ptr, dbias1, program, cols, in_cols, N)


@triton.jit
def _store_sums(ptr, partial, program, cols, in_cols, N: tl.constexpr):
    """One row of partial sums a program: no atomics, so the weight gradient is bitwise repeatable."""
    tl.store(ptr + program.to(tl.int64) * N + cols, tl.sum(partial, 0), mask=in_cols)


@triton.jit(do_not_specialize=["num_rows"])
def norm_column_sums_kernel(
    t_ptr, dy_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, num_rows, t_stride, dy_stride,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over rows of dy and of dy * normalised t, for rows too long to keep these in the backward kernel."""
    chunk = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    dweight = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    dbias = dweight
    for first in tl.range(chunk * BLOCK_R, num_rows, tl.num_programs(1) * BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        in_rows = rows < num_rows
        inside = in_rows[:, None] & in_cols[None, :]
        dy = _load_rows(dy_ptr, dy_stride, rows, cols, inside)
        if dbias_ptr is not None:
            dbias += dy
        if dweight_ptr is not None:
            normed = _load_rows(t_ptr, t_stride, rows, cols, inside)
            if mean_ptr is not None:
                normed -= tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
            dweight += dy * normed * tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]
    if dweight_ptr is not None:
        _store_sums(dweight_ptr, dweight, chunk, cols, in_cols, N)
    if dbias_ptr is not None:
        _store_sums(dbias_ptr, dbias, chunk, cols, in_cols, N)


@triton.jit
def _total(partial_ptr, total_ptr, count, cols, N: tl.constexpr, BLOCK_P: tl.constexpr):
    total = tl.zeros((BLOCK_P, cols.shape[0]), dtype=tl.float32)
    for first in tl.range(0, count, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(partial_ptr + parts * N + cols[None, :], mask=(parts < count) & (cols < N)[None, :], other=0.0)
    tl.store(total_ptr + cols, tl.sum(total, 0).to(total_ptr.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["count"])
def norm_totals_kernel(
    partial0_ptr, partial1_ptr, partial2_ptr, partial3_ptr, total0_ptr, total1_ptr, total2_ptr, total3_ptr, count,
    N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up `count` rows of partial sums, all weight gradients in one launch; absent ones are None."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    if partial0_ptr is not None:
        if which == 0:
            _total(partial0_ptr, total0_ptr, count, cols, N, BLOCK_P)
    if partial1_ptr is not None:
        if which == 1:
            _total(partial1_ptr, total1_ptr, count, cols, N, BLOCK_P)
    if partial2_ptr is not None:
        if which == 2:
            _total(partial2_ptr, total2_ptr, count, cols, N, BLOCK_P)
    if partial3_ptr is not None:
        if which == 3:
            _total(partial3_ptr, total3_ptr, count, cols, N, BLOCK_P)
