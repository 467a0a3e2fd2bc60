"""Layer norm and RMS norm of long rows: read in steps, three times over, of which only the first reaches memory.

A program that held a long row in registers would leave few others on its processor to keep the memory busy meanwhile.
"""

import triton
import triton.language as tl


@triton.jit
def _inputs(x_ptr, residual_ptr, x1_ptr, scale, cols, inside, POLICY: tl.constexpr):
    """Float32 x * scale + x1 + residual at some columns of a row; POLICY says whether they will be read again."""
    t = tl.load(x_ptr + cols, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32) * scale
    if x1_ptr is not None:
        t += tl.load(x1_ptr + cols, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if residual_ptr is not None:
        t += tl.load(residual_ptr + cols, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    return t


@triton.jit
def _store_output(y_ptr, normed, weight_ptr, bias_ptr, cols, inside, F: tl.constexpr):
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y = normed * (weight + 1.0 if F.is_zero_centered else weight)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_long_forward_kernel(
    x_ptr, residual_ptr, x1_ptr, rowscale_ptr, weight_ptr, bias_ptr, weight1_ptr, bias1_ptr,
    y_ptr, y1_ptr, t_ptr, mean_ptr, rstd_ptr,
    eps, x_stride, residual_stride, x1_stride, y_stride, y1_stride, t_stride,
    N: tl.constexpr, F: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One row a program. Outputs are written on the last reading, so they may lie where the inputs do."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * y_stride
    scale = 1.0
    if rowscale_ptr is not None:
        scale = tl.load(rowscale_ptr + row).to(tl.float32)
    if x1_ptr is not None:
        x1_ptr += row * x1_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    if y1_ptr is not None:
        y1_ptr += row * y1_stride
    if t_ptr is not None:
        t_ptr += row * t_stride
    lane = tl.arange(0, BLOCK_N)
    mean = 0.0
    if not F.is_rms_norm:
        sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in tl.range(0, N, BLOCK_N, loop_unroll_factor=UNROLL):
            cols = first + lane
            sums += _inputs(x_ptr, residual_ptr, x1_ptr, scale, cols, cols < N, "evict_last")
        mean = tl.sum(sums, 0) / N
        tl.store(mean_ptr + row, mean)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in tl.range(0, N, BLOCK_N, loop_unroll_factor=UNROLL):
        cols = first + lane
        t = _inputs(x_ptr, residual_ptr, x1_ptr, scale, cols, cols < N, "evict_last") - mean
        squares += tl.where(cols < N, t * t, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / N + eps)
    tl.store(rstd_ptr + row, rstd)
    for first in tl.range(0, N, BLOCK_N, loop_unroll_factor=UNROLL):
        cols = first + lane
        inside = cols < N
        t = _inputs(x_ptr, residual_ptr, x1_ptr, scale, cols, inside, "evict_first")
        if t_ptr is not None:
            tl.store(t_ptr + cols, t.to(t_ptr.dtype.element_ty), mask=inside)
        normed = (t - mean) * rstd
        _store_output(y_ptr, normed, weight_ptr, bias_ptr, cols, inside, F)
        if weight1_ptr is not None:
            _store_output(y1_ptr, normed, weight1_ptr, bias1_ptr, cols, inside, F)
