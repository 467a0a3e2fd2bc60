"""Attention on the CPU by PyTorch's fused operator, which returns and takes the LSE.

The operator masks only by a causal triangle aligned to the top-left corner, or by an additive bias. A band with at
most a right bound is therefore a rectangle of keys that all rows see, and a triangle; the halves are merged by their
LSE, and their gradients add up because both are given the merged LSE. Any other band, and ALiBi, runs row block by row
block against the keys that the block sees, with the band and the bias added to the scores.

Beside padded or converted copies of the inputs, temporaries are a second `out` (merge), float32 accumulators of dk and
dv (row blocks), and one bias of block rows * visible keys, times the heads with ALiBi: linear in the sequence length.
Releases of PyTorch whose operator knows no shared heads get keys and values repeated for every query head.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus.backends.torch_band import Band, row_blocks
from flash_attn_plus.backends.torch_tiles import accumulation_dtype, alibi_bias

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_BIAS_NUMBERS = 2**22  # of one row block's ALiBi bias: 16 MiB
_MIN_ROWS, _NARROW_ROWS, _WIDE_ROWS = 32, 64, 256  # of a row block; measured from windows of 64 to 4096 keys
_NARROW_BAND = 768  # keys; below it small blocks, which compute fewer hidden scores, are fastest
_SUMMED_ROWS = 256  # of a key head, in one call: the operator sums their bfloat16 dk and dv in bfloat16


class Pieces(NamedTuple):
    """A band without a left bound as `open_keys` leading keys that every row sees, then a top-left causal triangle.

    `has_triangle` is false where every row sees every key.
    """

    open_keys: int
    has_triangle: bool


def pieces(band: Band) -> Pieces:
    """The pieces of a band without a left bound, for the rows from `first_row` on."""
    if band.right < 0:
        return Pieces(band.len_k, False)
    open_keys = band.first_row + band.offset + band.right
    return Pieces(min(open_keys, band.len_k), open_keys < band.len_k)


def block_rows(band: Band, bias_heads: int) -> int:
    """Rows of a block: few where a narrow band would hide much of a larger tile, or where the bias has many heads."""
    is_narrow = band.left >= 0 and band.right >= 0 and band.left + band.right < _NARROW_BAND
    wanted = _NARROW_ROWS if is_narrow else _WIDE_ROWS
    return max(_MIN_ROWS, min(wanted, _BIAS_NUMBERS // (bias_heads * band.keys_per_block(wanted))))


def _operand(x: Tensor, dim: int, is_summed_long: bool = False) -> Tensor:
    """(n, s, h, d) as the operator's (n, h, s, dim): zero-padded, and float32 for float16, which it runs slowly.

    With `is_summed_long`, float32 for bfloat16 too: over many rows its sums in bfloat16 lose more than one rounding.
    """
    if x.dtype == torch.float16 or (is_summed_long and x.dtype == torch.bfloat16):
        x = x.float()
    if x.shape[-1] < dim:
        x = F.pad(x, (0, dim - x.shape[-1]))
    return x.transpose(1, 2)


@cache
def _shares_heads() -> bool:
    """Whether the operator lets query heads share a key head; older ones read on behind the last key head."""
    q, heads = torch.ones(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    heads[:, 1] = 1.0  # what is read in place of the one head that is given
    out, _ = _forward(q, heads[:, :1], heads[:, :1], 0.0, False)
    return not out.any()


def _for_each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values (n, hk, s, d) as the operator wants them for that many query heads."""
    return x if x.shape[1] == heads or _shares_heads() else x.repeat_interleave(heads // x.shape[1], 1)


def _summed(x: Tensor, heads_k: int) -> Tensor:
    """The operator's gradient of keys or values, one for every key head; float32 sums of repeated ones."""
    if x.shape[1] == heads_k:
        return x
    return x.unflatten(1, (heads_k, -1)).sum(2, dtype=accumulation_dtype(x.dtype))


def _positive(scale: float) -> tuple[float, float]:
    """(sign of q, positive scale): the operator masks before it scales, so a negative scale would unmask."""
    return (1.0, scale) if scale > 0.0 else (-1.0, -scale)


class _Biases:
    """The additive bias of row blocks; blocks equally placed on the diagonal share one."""

    def __init__(self, band: Band, slopes: Tensor | None, dtype: torch.dtype) -> None:
        self.band, self.slopes = band, slopes
        self.dtype = accumulation_dtype(dtype)
        self.last: tuple[tuple[int, int, int], Tensor] | None = None

    def of(self, rows: range, cols: range) -> Tensor | None:
        """(rows, cols), or (n or 1, h, rows, cols) with slopes; None when nothing is hidden or biased."""
        band = self.band
        if self.slopes is None and band.is_open(rows, cols):
            return None
        placed = (cols.start - rows.start, len(rows), len(cols))
        if self.last is None or self.last[0] != placed:
            self.last = placed, self._make(rows, cols)
        return self.last[1]

    def _make(self, rows: range, cols: range) -> Tensor:
        device = torch.device("cpu")
        hidden = self.band.hidden(rows, cols, device)
        if self.slopes is None:
            return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
        bias = alibi_bias(self.slopes, self.band.distance(rows, cols, device), self.dtype)
        return bias if hidden is None else bias.masked_fill_(hidden, float("-inf"))


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over both key sets; out (n, h, s, d), lse (n, h, s)."""
    merged = torch.logaddexp(lse, other_lse)
    weight, other_weight = (lse - merged).exp_()[..., None], (other_lse - merged).exp_()[..., None]
    return (out * weight).addcmul_(other, other_weight), merged


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float, slopes: Tensor | None
) -> None:
    """Fill out (n, sq, h, dv) and lse (n, h, sq) from q (n, sq, h, d), k (n, sk, hk, d), v (n, sk, hk, dv)."""
    first, dim, dim_v = band.first_row, max(q.shape[-1], v.shape[-1]), v.shape[-1]
    if first > 0:
        out[:, :first] = 0.0
        lse[..., :first] = float("inf")
    if first == band.len_q:
        return
    q_heads, k_heads, v_heads = _operand(q[:, first:], dim), _operand(k, dim), _operand(v, dim)
    k_heads, v_heads = (_for_each_head(x, q_heads.shape[1]) for x in (k_heads, v_heads))
    sign, scale = _positive(scale)
    if sign < 0.0:
        q_heads = -q_heads
    out_heads, lse = out[:, first:].transpose(1, 2), lse[..., first:]
    if slopes is not None or band.left >= 0:
        biases = _Biases(band, slopes, q.dtype)
        for rows in row_blocks(first, band.len_q, block_rows(band, 1 if slopes is None else slopes.numel())):
            cols = band.keys(rows)
            here, seen = slice(rows.start - first, rows.stop - first), slice(cols.start, cols.stop)
            block, block_lse = _forward(
                q_heads[:, :, here], k_heads[:, :, seen], v_heads[:, :, seen], 0.0, False,
                attn_mask=biases.of(rows, cols), scale=scale,
            )  # fmt: skip
            out_heads[:, :, here] = block[..., :dim_v]
            lse[..., here] = block_lse
        return
    open_keys, has_triangle = pieces(band)
    result = None
    if open_keys > 0:
        result = _forward(q_heads, k_heads[:, :, :open_keys], v_heads[:, :, :open_keys], 0.0, False, scale=scale)
    if has_triangle:
        triangle = _forward(q_heads, k_heads[:, :, open_keys:], v_heads[:, :, open_keys:], 0.0, True, scale=scale)
        result = triangle if result is None else _merge(*result, *triangle)
    out_heads.copy_(result[0][..., :dim_v])
    lse.copy_(result[1])


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    band: Band,
    scale: float,
    slopes: Tensor | None,
) -> None:
    """Fill dq, dk and dv, laid out like q, k and v, from dout and out (n, sq, h, dv) and lse (n, h, sq)."""
    first, dim = band.first_row, max(q.shape[-1], v.shape[-1])
    if first > 0:
        dq[:, :first] = 0.0
    if first == band.len_q:
        dk.zero_()
        dv.zero_()
        return
    sign, scale = _positive(scale)
    is_blocked = slopes is not None or band.left >= 0
    rows = band.len_q - first
    if is_blocked:
        rows = min(rows, block_rows(band, 1 if slopes is None else slopes.numel()))
    is_long = rows * (q.shape[2] // k.shape[2]) > _SUMMED_ROWS
    dout_heads, q_heads = (_operand(x[:, first:], dim, is_long) for x in (dout, q))
    if sign < 0.0:
        q_heads = -q_heads
    k_heads, v_heads = (_for_each_head(_operand(x, dim, is_long), q_heads.shape[1]) for x in (k, v))
    tensors = dout_heads, q_heads, k_heads, v_heads
    out_heads, lse = _operand(out[:, first:], dim, is_long), lse[..., first:]
    grads = dq[:, first:].transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    if is_blocked:
        _backward_blocks(*tensors, out_heads, lse, grads, band, scale, slopes)
    else:
        _backward_pieces(*tensors, out_heads, lse, grads, pieces(band), scale)
    if sign < 0.0:
        dq.neg_()


def _write(target: Tensor, x: Tensor) -> None:
    target.copy_(x[..., : target.shape[-1]])


def _backward_pieces(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], split: Pieces, scale: float,
) -> None:  # fmt: skip
    dq, dk, dv = grads
    parts = [(slice(0, split.open_keys), False)] if split.open_keys > 0 else []
    if split.has_triangle:
        parts.append((slice(split.open_keys, k.shape[2]), True))
    sum_dq = None
    for seen, is_triangle in parts:
        dq_part, dk_part, dv_part = _backward(
            dout, q, k[:, :, seen], v[:, :, seen], out, lse, 0.0, is_triangle, scale=scale
        )
        sum_dq = dq_part if sum_dq is None else sum_dq.add_(dq_part)
        _write(dk[:, :, seen], _summed(dk_part, dk.shape[1]))
        _write(dv[:, :, seen], _summed(dv_part, dv.shape[1]))
    _write(dq, sum_dq)


def _backward_blocks(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], band: Band, scale: float, slopes: Tensor | None,
) -> None:  # fmt: skip
    dq, dk, dv = grads
    dtype, biases = accumulation_dtype(q.dtype), _Biases(band, slopes, q.dtype)
    sum_dk, sum_dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for rows in row_blocks(band.first_row, band.len_q, block_rows(band, 1 if slopes is None else slopes.numel())):
        cols = band.keys(rows)
        here = slice(rows.start - band.first_row, rows.stop - band.first_row)
        seen = slice(cols.start, cols.stop)
        dq_block, dk_block, dv_block = _backward(
            dout[:, :, here], q[:, :, here], k[:, :, seen], v[:, :, seen], out[:, :, here], lse[..., here], 0.0, False,
            attn_mask=biases.of(rows, cols), scale=scale,
        )  # fmt: skip
        _write(dq[:, :, here], dq_block)
        sum_dk[:, :, seen] += dk_block
        sum_dv[:, :, seen] += dv_block
    _write(dk, _summed(sum_dk, dk.shape[1]))
    _write(dv, _summed(sum_dv, dv.shape[1]))
