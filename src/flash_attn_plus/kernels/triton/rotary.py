"""Rotary position embedding: each pair (x0, x1) of a head turns by the angle of its position.

A program turns some heads of some tokens, and reads the angles of a token once for all its heads.
"""

import triton
import triton.language as tl


@triton.jit
def _sequence_of(tokens, cu_seqlens_ptr, num_sequences, search_steps):
    """The last sequence that starts at or before each token, by bisection; num_sequences is the tail behind all."""
    low = tokens * 0
    high = low + num_sequences + 1
    for _ in range(search_steps):
        middle = (low + high) // 2
        starts = tl.load(cu_seqlens_ptr + tl.minimum(middle, num_sequences))
        is_right = starts <= tokens
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle)
    return low


@triton.jit
def _rotate(x0, x1, cos, sin, IS_CONJUGATE: tl.constexpr):
    if IS_CONJUGATE:
        sin = -sin
    return x0 * cos - x1 * sin, x0 * sin + x1 * cos


@triton.jit(do_not_specialize=["num_tokens", "heads", "table_length", "offset", "num_sequences", "search_steps"])
def rotary_kernel(
    out_ptr, x_ptr, cos_ptr, sin_ptr, offsets_ptr, cu_seqlens_ptr,
    num_tokens, heads, table_length, offset, num_sequences, search_steps,
    out_batch_stride, out_token_stride, out_head_stride, x_batch_stride, x_token_stride, x_head_stride,
    HALF: tl.constexpr, REST: tl.constexpr, IS_INTERLEAVED: tl.constexpr, IS_CONJUGATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Turn the first 2 * HALF features of num_tokens x heads rows a batch, and copy the REST that follow.

    Nothing that changes between calls of one model is a constant here, so the kernel compiles once a direction.
    """
    head_blocks, token_blocks = tl.cdiv(heads, BLOCK_H), tl.cdiv(num_tokens, BLOCK_T)
    head = (tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    tokens = (tl.program_id(0) // head_blocks % token_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = tl.program_id(0) // (head_blocks * token_blocks)
    in_tokens = tokens < num_tokens
    in_rows = (in_tokens[:, None] & (head < heads)[None, :])[:, :, None]
    out_ptr += batch.to(tl.int64) * out_batch_stride
    x_ptr += batch.to(tl.int64) * x_batch_stride
    out_rows = (tokens.to(tl.int64)[:, None] * out_token_stride + head[None, :] * out_head_stride)[:, :, None]
    x_rows = (tokens.to(tl.int64)[:, None] * x_token_stride + head[None, :] * x_head_stride)[:, :, None]

    position = tokens
    is_known = in_tokens
    sequence = batch + tokens * 0
    if cu_seqlens_ptr is not None:
        sequence = _sequence_of(tokens, cu_seqlens_ptr, num_sequences, search_steps)
        is_known &= sequence < num_sequences
        position -= tl.load(cu_seqlens_ptr + sequence)
    if offsets_ptr is not None:
        position += tl.load(offsets_ptr + sequence, mask=is_known, other=0).to(tl.int32)
    position += offset
    is_known &= (position >= 0) & (position < table_length)  # elsewhere the angle is zero

    pair = tl.arange(0, BLOCK_HALF)
    at_table = position.to(tl.int64)[:, None] * HALF + pair[None, :]
    has_angle = is_known[:, None] & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + at_table, mask=has_angle, other=1.0).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + at_table, mask=has_angle, other=0.0).to(tl.float32)[:, None, :]
    if IS_INTERLEAVED:  # whole rows in order; the two of a pair are parted in registers
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        inside = in_rows & (cols < 2 * HALF)
        x = tl.load(x_ptr + x_rows + cols, mask=inside, other=0.0).to(tl.float32)
        x0, x1 = tl.split(tl.reshape(x, (BLOCK_T, BLOCK_H, BLOCK_HALF, 2)))
        y0, y1 = _rotate(x0, x1, cos, sin, IS_CONJUGATE)
        y = tl.reshape(tl.join(y0, y1), (BLOCK_T, BLOCK_H, 2 * BLOCK_HALF))
        tl.store(out_ptr + out_rows + cols, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        cols = pair[None, None, :]
        inside = in_rows & (cols < HALF)
        x0 = tl.load(x_ptr + x_rows + cols, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + x_rows + HALF + cols, mask=inside, other=0.0).to(tl.float32)
        y0, y1 = _rotate(x0, x1, cos, sin, IS_CONJUGATE)
        tl.store(out_ptr + out_rows + cols, y0.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + out_rows + HALF + cols, y1.to(out_ptr.dtype.element_ty), mask=inside)
    if REST > 0:
        cols = tl.arange(0, BLOCK_REST)[None, None, :]
        inside = in_rows & (cols < REST)
        rest = tl.load(x_ptr + x_rows + 2 * HALF + cols, mask=inside, other=0.0)
        tl.store(out_ptr + out_rows + 2 * HALF + cols, rest, mask=inside)
