"""Before the backward kernel: the rows' statistics, and counters of dq's parts at 0."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
COLS: tl.constexpr = tl.constexpr(16)  # for terms, the depth of a matrix instruction (see backward_statistics)
TERMS: tl.constexpr = tl.constexpr(3)  # of a statistic


@triton.jit
def _even(stride):
    """A stride of a tensor that the copy engine reaches, a multiple of 8 elements, in a form that the compiler sees."""
    return (stride // 8).to(tl.int64) * 8


@triton.jit
def _aligned(rows):
    return (rows // 64).to(tl.int64) * 64


@triton.jit
def _row(ptr, batch, head, stride_batch, stride_head):
    """The first row of a head of a batch."""
    return ptr + batch * _even(stride_batch) + head * _even(stride_head)


@triton.jit
def _rows(cu_q_ptr, len_q, heads, ROWS: tl.constexpr, ALIGN: tl.constexpr):
    """(batch, head, first row of the tile, first row of the sequence, its length, its padded first row).

    Neighbouring programs take neighbouring heads, which lie next to each other in memory.
    """
    tiles = tl.cdiv(len_q, ALIGN) * (ALIGN // ROWS)
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    row0, batch = rest % tiles * ROWS, rest // tiles
    start, padded = 0, 0
    if cu_q_ptr is not None:
        start = tl.load(cu_q_ptr + batch)
        len_q = tl.load(cu_q_ptr + batch + 1) - start
        padded = (start + batch * ALIGN) // ALIGN * ALIGN
    return batch, head, row0, start, len_q, padded


@triton.jit
def _terms(x, first, column):
    """The bfloat16 terms of float32 rows in the columns from `first` on, zeros elsewhere."""
    terms = tl.zeros_like(x[:, None] + column)
    for i in tl.static_range(TERMS):
        term = x.to(tl.bfloat16).to(tl.float32)
        terms = tl.where(column == first + i, term[:, None], terms)
        x -= term
    return terms


@triton.jit(
    do_not_specialize=["stride_ob", "stride_os", "stride_oh", "stride_gb", "stride_gs", "stride_gh", "lse_rows",
                       "lines", "padded_rows", "len_q", "heads"],
    do_not_specialize_on_alignment=["lse_ptr", "dlse_ptr", "delta_ptr", "parts_ptr", "cu_q_ptr"],
)  # fmt: skip
def attention_prepare_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, statistics_ptr, parts_ptr, cu_q_ptr,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh,
    lse_rows, lines, padded_rows, len_q, heads, inverse_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout) - dlse, and statistics (log2 LSE, delta) for the main kernel.

    Statistics are (2, lines, padded_rows), where a line is a head, of a batch unless rows are packed; in bfloat16 they
    are (lines, padded_rows, 16) terms of LSE / softmax_scale and of delta, `inverse_scale` being 1 / softmax_scale.
    Rows beyond a sequence get an LSE of +inf, or as good as that, so their weights are 0. `parts_ptr`, unless None:
    zeros, one for each line's tile of ALIGN rows.
    """
    batch, head, row0, start, length, padded = _rows(cu_q_ptr, len_q, heads, ROWS, ALIGN)
    if row0 >= tl.cdiv(length, ALIGN) * ALIGN:
        return
    rows, dims = row0 + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)[None, :]
    is_row, is_dim = rows < length, dims < HEAD_DIM
    inside = is_row[:, None] & is_dim
    at = (start + rows).to(tl.int64)[:, None]
    out = tl.load(_row(out_ptr, batch, head, stride_ob, stride_oh) + at * _even(stride_os) + dims, inside, 0.0)
    dout = tl.load(_row(dout_ptr, batch, head, stride_gb, stride_gh) + at * _even(stride_gs) + dims, inside, 0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    line = head if cu_q_ptr is not None else batch * heads + head
    offset = line.to(tl.int64) * lse_rows + start + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offset, is_row, 0.0)
    tl.store(delta_ptr + offset, delta, is_row)
    lse = tl.load(lse_ptr + offset, is_row, float("inf"))
    slot = line.to(tl.int64) * _aligned(padded_rows) + padded + rows
    if statistics_ptr.dtype.element_ty == tl.float32:
        tl.store(statistics_ptr + slot, lse * LOG2E)
        tl.store(statistics_ptr + lines.to(tl.int64) * _aligned(padded_rows) + slot, delta)
    else:
        column = tl.arange(0, COLS)[None, :]
        # finite, since zeros stand beside it in products; more than any product that a float32 exponent can outweigh
        lse = tl.minimum(tl.maximum(lse * inverse_scale, -1e30), 1e30)
        terms = _terms(lse, 0, column) + _terms(delta, TERMS, column)
        tl.store(statistics_ptr + slot[:, None] * COLS + column, terms.to(tl.bfloat16))
    if parts_ptr is not None:
        if row0 % ALIGN == 0:
            tl.store(parts_ptr + (line.to(tl.int64) * _aligned(padded_rows) + padded + row0) // ALIGN, 0)
