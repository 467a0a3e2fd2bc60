"""Where a sequence and its tiles lie in memory: dense, packed, partly used, left-padded or paged."""

import triton
import triton.language as tl


@triton.jit
def query_span(cu_q_ptr, batch, len_q, F: tl.constexpr):
    """(first row as int64, length) of a sequence's queries."""
    start = tl.full((), 0, tl.int64)
    if F.has_cu_q:
        start = tl.load(cu_q_ptr + batch).to(tl.int64)
        len_q = (tl.load(cu_q_ptr + batch + 1).to(tl.int64) - start).to(tl.int32)
    return start, len_q


@triton.jit
def key_span(cu_k_ptr, used_k_ptr, leftpad_ptr, batch, len_k, F: tl.constexpr):
    """(first row as int64, length) of a sequence's keys; paged keys count from their own first slot."""
    start = tl.full((), 0, tl.int64)
    if F.has_cu_k:
        begin = tl.load(cu_k_ptr + batch).to(tl.int64)
        len_k = (tl.load(cu_k_ptr + batch + 1).to(tl.int64) - begin).to(tl.int32)
        if not F.is_paged:
            start = begin
    if F.has_used_k:
        len_k = tl.minimum(tl.load(used_k_ptr + batch), len_k)  # never beyond what is allocated
    if F.has_leftpad:
        pad = tl.load(leftpad_ptr + batch)
        start += pad
        len_k = tl.maximum(len_k - pad, 0)
    return start, len_k


@triton.jit
def base(ptr, batch, head, start, stride_batch, stride_head, stride_row):
    """Pointer to a sequence's first row of one head."""
    return ptr + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head + start * stride_row


@triton.jit
def tile(base_ptr, row0, rows, stride_row, dims):
    """Pointers [rows, dims] (or [dims, rows]) of a tile whose first row is row0; rows and dims carry the axes.

    Offsets within a tile do not depend on row0, so a loop over row0 computes them once.
    """
    return (base_ptr + (rows.to(tl.int64) * stride_row + dims)) + tl.cast(row0, tl.int64) * stride_row


@triton.jit
def paged_tile(base_ptr, cols, table_ptr, page_size, stride_page, stride_row, len_k, dims):
    """Pointers of a tile of paged keys: `cols` and `dims` carry the axes; unused columns point at page 0."""
    page = tl.load(table_ptr + cols // page_size, mask=cols < len_k, other=0).to(tl.int64)
    return base_ptr + page * stride_page + (cols % page_size).to(tl.int64) * stride_row + dims


@triton.jit
def load(ptrs, rows, len_rows, dims, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_MASKED: tl.constexpr):
    """A tile with zeros beyond the sequence's end and beyond the head dim, masked only where it must be."""
    if IS_MASKED:
        return tl.load(ptrs, mask=(rows < len_rows) & (dims < HEAD_DIM), other=0.0)
    if BLOCK_D != HEAD_DIM:
        return tl.load(ptrs, mask=dims < HEAD_DIM, other=0.0)
    return tl.load(ptrs)


@triton.jit
def described(descriptor, batch, head, row0, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile [ROWS, BLOCK_D] of a descriptor of (batch, row, head, dim) in such boxes; zeros beyond the tensor."""
    return descriptor.load([batch, row0, head, 0]).reshape([ROWS, BLOCK_D])
