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
    """Write the first R rows of each share of a split, out [(SHARES,) BLOCK_M, BLOCK_DV] and lse, as parts.

    Rows without keys become zeros, whatever their products were, of LSE -inf: what adds nothing to a sum.
    """
    axis: tl.constexpr = len(lse.shape)
    is_empty = lse == float("inf")
    lse = tl.where(is_empty, float("-inf"), lse)
    out = tl.where(tl.expand_dims(is_empty, axis), 0.0, out)
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
def join(
    out, lse, split, number, parts_ptr, counters_ptr, rows, target, R: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, SHARES: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Write a program's parts, and by the last of the `number` programs of a tile the tile's results.

    Programs are (tile, split); behind the parts of all lie their LSEs.
    """
    tile, launched = tl.program_id(0), tl.num_programs(1)
    begin = tile.to(tl.int64) * launched * (SHARES * R)
    parts_lse_ptr = parts_ptr + tl.num_programs(0).to(tl.int64) * launched * (SHARES * R * HEAD_DIM_V) + begin
    parts_ptr += begin * HEAD_DIM_V
    store_parts(out, lse, parts_ptr, parts_lse_ptr, split, SHARES, R, HEAD_DIM_V)
    if is_last(counters_ptr + tile, number):
        combine(parts_ptr, parts_lse_ptr, number * SHARES, rows, target, R, ROWS, STEP, HEAD_DIM_V, BLOCK_DV, F)


@triton.jit
def combine(
    parts_ptr, parts_lse_ptr, number, rows, target, R: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """out and LSE of R rows from `number` parts of them; ROWS rows of STEP parts are on their way at a time.

    Every thread sums up its own elements, in the order of the parts.
    """
    dims = tl.arange(0, BLOCK_DV)[None, :]
    for first in tl.range(0, R, ROWS):
        local = first + tl.arange(0, ROWS)
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        for i in tl.range(0, number, STEP):
            lse_ptrs = parts_lse_ptr + (i * R + local)
            ptrs = parts_ptr + ((i * R + local)[:, None] * HEAD_DIM_V + dims)
            sums, values = (), ()
            higher = maximum
            for j in tl.static_range(STEP):  # at offsets that the compiler knows: this code runs once, so it is short
                is_read = i + j < number
                lse = tl.load(lse_ptrs + j * R, mask=is_read, other=float("-inf"), cache_modifier=".cg")
                if BLOCK_DV != HEAD_DIM_V:
                    is_read &= dims < HEAD_DIM_V
                x = tl.load(ptrs + j * R * HEAD_DIM_V, mask=is_read, other=0.0, cache_modifier=".cg")
                higher = tl.maximum(higher, lse)
                sums, values = sums + (lse,), values + (x,)  # noqa: RUF005 - Triton has no other way
            pivot = tl.where(higher == float("-inf"), 0.0, higher) * score.unit(F)
            decay = score.power(maximum * score.unit(F) - pivot, F)
            total *= decay
            out *= decay[:, None]
            for j in tl.static_range(STEP):
                weight = score.power(sums[j] * score.unit(F) - pivot, F)
                total += weight
                out += values[j] * weight[:, None]
            maximum = higher
        is_empty = total == 0.0
        total = tl.where(is_empty, 1.0, total)
        whole = tl.where(is_empty, float("inf"), maximum + tl.log2(total) * softmax.LN2)
        is_row, out_ptrs, lse_ptrs = _places(local, rows, target)
        tl.store(lse_ptrs, whole, mask=is_row)
        out = (out / total[:, None]).to(target.out_ptr.dtype.element_ty)
        tl.store(out_ptrs[:, None] + dims, out, mask=is_row[:, None] & (dims < HEAD_DIM_V))
