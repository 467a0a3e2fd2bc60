"""Results of programs that share the keys of the same rows: parts in float32, and their sum by the last program.

A part is R rows of out and LSE over some of the keys; those of one tile of rows follow one another in memory.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from flash_attn_plus.kernels.triton import score, softmax


class Rows(NamedTuple):
    """Packed rows of one tile: row = query * group + head within the group of heads that share keys."""

    first: tl.tensor
    batch: tl.tensor
    q_start: tl.tensor  # of the sequence, in packed queries
    len_q: tl.tensor
    head_k: tl.tensor
    group: tl.tensor


class Target(NamedTuple):
    """Where out and LSE lie."""

    out_ptr: tl.tensor
    lse_ptr: tl.tensor
    stride_ob: tl.tensor
    stride_os: tl.tensor
    stride_oh: tl.tensor
    stride_lb: tl.tensor
    stride_lh: tl.tensor


@triton.jit
def _places(local, rows, target):
    """(whether they exist, pointers to out, pointers to LSE) of rows of a tile."""
    packed = rows.first + local
    row, head = packed // rows.group, rows.head_k * rows.group + packed % rows.group
    out_ptr = target.out_ptr + rows.batch.to(tl.int64) * target.stride_ob + rows.q_start * target.stride_os
    lse_ptr = target.lse_ptr + rows.batch.to(tl.int64) * target.stride_lb + rows.q_start
    out_ptrs = out_ptr + row.to(tl.int64) * target.stride_os + head * target.stride_oh
    return row < rows.len_q, out_ptrs, lse_ptr + head * target.stride_lh + row


@triton.jit
def store(out, lse, rows, target, HEAD_DIM_V: tl.constexpr):
    """Write a tile's results, out [BLOCK_M, BLOCK_DV] and lse [BLOCK_M]."""
    is_row, out_ptrs, lse_ptrs = _places(tl.arange(0, out.shape[0]), rows, target)
    dims = tl.arange(0, out.shape[1])[None, :]
    tl.store(lse_ptrs, lse, mask=is_row)
    out = out.to(target.out_ptr.dtype.element_ty)
    tl.store(out_ptrs[:, None] + dims, out, mask=is_row[:, None] & (dims < HEAD_DIM_V))


@triton.jit
def store_parts(
    out, lse, parts_ptr, parts_lse_ptr, split, SHARES: tl.constexpr, R: tl.constexpr, HEAD_DIM_V: tl.constexpr
):
    """Write the first R rows of each share of a split, out [(SHARES,) BLOCK_M, BLOCK_DV] and lse, as parts."""
    axis: tl.constexpr = len(lse.shape)
    local = tl.arange(0, out.shape[axis - 1])
    at = split * (SHARES * R) + local
    if SHARES > 1:
        at = at[None, :] + (tl.arange(0, SHARES) * R)[:, None]
    is_part = (at >= 0) & (local < R)
    dims = tl.arange(0, out.shape[axis])
    tl.store(parts_lse_ptr + at, lse, mask=is_part)
    out_ptrs = parts_ptr + tl.expand_dims(at, axis) * HEAD_DIM_V + dims
    tl.store(out_ptrs, out, mask=tl.expand_dims(is_part, axis) & (dims < HEAD_DIM_V))


@triton.jit
def is_last(counter_ptr, number):
    """Whether all others of `number` programs that share a counter have written their parts; it is zero again then."""
    tl.debug_barrier()  # every thread of this one has, too
    is_last = number == 1
    if number > 1:
        is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == number - 1
        if is_last:
            tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def combine(
    parts_ptr, parts_lse_ptr, number, rows, target, R: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """out and LSE of R rows from `number` parts of them; ROWS rows of STEP parts are on their way at a time.

    Every thread sums up its own elements, in the order of the parts.
    """
    flat = tl.arange(0, ROWS * BLOCK_DV)
    dim = flat % BLOCK_DV
    for first in tl.range(0, R, ROWS):
        local = first + flat // BLOCK_DV
        maximum = tl.full([ROWS * BLOCK_DV], float("-inf"), tl.float32)
        total = tl.zeros([ROWS * BLOCK_DV], tl.float32)
        out = tl.zeros([ROWS * BLOCK_DV], tl.float32)
        for i in tl.range(0, number, STEP):
            for j in tl.static_range(STEP):
                part = tl.minimum(i + j, number - 1)
                lse = tl.load(parts_lse_ptr + part * R + local, cache_modifier=".cg")
                ptrs = parts_ptr + (part * R + local) * HEAD_DIM_V + dim
                x = tl.load(ptrs, mask=dim < HEAD_DIM_V, other=0.0, cache_modifier=".cg")
                has_keys = (lse != float("inf")) & (i + j < number)
                lse = tl.where(has_keys, lse, float("-inf"))
                higher = tl.maximum(maximum, lse)
                pivot = tl.where(higher == float("-inf"), 0.0, higher)
                decay = score.power((maximum - pivot) * score.unit(F), F)
                weight = score.power((lse - pivot) * score.unit(F), F)
                total = total * decay + weight
                out = out * decay + tl.where(has_keys, x, 0.0) * weight
                maximum = higher
        is_empty = total == 0.0
        total = tl.where(is_empty, 1.0, total)
        whole = tl.where(is_empty, float("inf"), maximum + tl.log2(total) * softmax.LN2)
        is_row, out_ptrs, lse_ptrs = _places(local, rows, target)
        tl.store(lse_ptrs, whole, mask=is_row & (dim == 0))
        out = (out / total).to(target.out_ptr.dtype.element_ty)
        tl.store(out_ptrs + dim, out, mask=is_row & (dim < HEAD_DIM_V))
