"""Attention on the CPU by PyTorch's fused operator, which returns and takes the LSE.

The operator masks only by a causal triangle aligned to the top-left corner, or by an additive bias. A band with at
most a right bound is therefore a rectangle of keys that all rows see, and a triangle; the halves are merged by their
LSE, and their gradients add up because both are given the merged LSE. Any other band, and ALiBi, runs row block by row
block against the keys that the block sees, with the band and the bias added to the scores. So does a long backward
pass in bfloat16, without a bias, since the operator sums dk and dv in that dtype.

Beside padded or converted copies of the inputs, temporaries are a second `out` (merge), float32 accumulators of dk and
dv (row blocks), keys, values and their gradients for every query head (bfloat16 with shared heads), and one bias of
block rows * visible keys, times the heads with ALiBi: linear in the sequence length.
Releases of PyTorch whose operator knows no shared heads get keys and values repeated for every query head.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus.backends.torch_band import Band, row_blocks
from flash_attn_plus.backends.torch_tiles import accumulation_dtype, alibi_bias
from flash_attn_plus.problem import AttentionInputs, AttentionProblem

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_BIAS_NUMBERS = 2**22  # of one row block's ALiBi bias: 16 MiB
_MIN_ROWS, _NARROW_ROWS, _WIDE_ROWS = 32, 64, 256  # of a row block; measured from windows of 64 to 4096 keys
_NARROW_BAND = 768  # keys; below it small blocks, which compute fewer hidden scores, are fastest
_OPERATOR_ROWS = 256  # of the operator's own blocks, where there are many rows
_MOST_SUMS = 16  # in bfloat16; a key's sum over so many blocks of rows keeps the error of plain PyTorch


class Pieces(NamedTuple):
    """A band without a left bound as `open_keys` leading keys that every row sees, then a top-left causal triangle.

    `has_triangle` is false where every row sees every key.
    """

    open_keys: int
    has_triangle: bool


def pieces(band: Band, row: int) -> Pieces:
    """The pieces of a band without a left bound, for the rows from `row` on, which all see a key."""
    if band.right < 0:
        return Pieces(band.len_k, False)
    open_keys = row + band.offset + band.right
    return Pieces(min(open_keys, band.len_k), open_keys < band.len_k)


def block_rows(band: Band, bias_heads: int) -> int:
    """Rows of a block: few where a narrow band would hide much of a larger tile, or where the bias has many heads."""
    is_narrow = band.left >= 0 and band.right >= 0 and band.left + band.right < _NARROW_BAND
    wanted = _NARROW_ROWS if is_narrow else _WIDE_ROWS
    return max(_MIN_ROWS, min(wanted, _BIAS_NUMBERS // (bias_heads * band.keys_per_block(wanted))))


def _operand(x: Tensor, dim: int) -> Tensor:
    """(n, s, h, d) as the operator's (n, h, s, dim): zero-padded, and float32 for float16, which it runs slowly."""
    if x.dtype == torch.float16:
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


def _for_each_head(x: Tensor, heads: int, shares: bool = True) -> Tensor:
    """Keys or values (n, hk, s, d) for that many query heads, repeated where the operator cannot or must not share."""
    group = heads // x.shape[1]
    return x if group == 1 or (shares and _shares_heads()) else x.repeat_interleave(group, 1)


def _sums_well(rows: int, group: int, dtype: torch.dtype) -> bool:
    """Whether dk and dv keep their precision: the operator sums bfloat16 ones in bfloat16, a head's block a time."""
    block = _OPERATOR_ROWS if rows >= 768 else 64 if rows >= 192 else 32
    return dtype != torch.bfloat16 or group * math.ceil(rows / block) <= _MOST_SUMS


def _rows_at_once(rows: int, dtype: torch.dtype) -> int:
    """Rows of one backward call without a bias: all, or so many that a head's dk and dv keep their precision."""
    return min(rows, _MOST_SUMS * _OPERATOR_ROWS) if dtype == torch.bfloat16 else rows


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
    open_keys, has_triangle = pieces(band, first)
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
    size = (
        block_rows(band, 1 if slopes is None else slopes.numel()) if is_blocked else _rows_at_once(band.len_q, q.dtype)
    )
    blocks = row_blocks(first, band.len_q, size)
    dout_heads, q_heads = (_operand(x[:, first:], dim) for x in (dout, q))
    if sign < 0.0:
        q_heads = -q_heads
    shares = _sums_well(len(blocks[0]), q.shape[2] // k.shape[2], q.dtype)
    k_heads, v_heads = (_for_each_head(_operand(x, dim), q.shape[2], shares) for x in (k, v))
    tensors = dout_heads, q_heads, k_heads, v_heads, _operand(out[:, first:], dim), lse[..., first:]
    dq_heads = dq[:, first:].transpose(1, 2)
    of_keys = _KeyGradients(dk.transpose(1, 2), dv.transpose(1, 2), is_blocked or len(blocks) > 1)
    if is_blocked:
        _backward_blocks(*tensors, dq_heads, of_keys, blocks, _Biases(band, slopes, q.dtype), scale)
    else:
        _backward_pieces(*tensors, dq_heads, of_keys, blocks, band, scale)
    of_keys.finish()
    if sign < 0.0:
        dq.neg_()


def keeps_precision(problem: AttentionProblem) -> bool:
    """Whether one backward call of the operator can round dk and dv as seldom as the rule of tolerance asks."""
    return _rows_at_once(problem.seqlen_q, problem.dtype) == problem.seqlen_q


def whole_forward(x: AttentionInputs, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of the operator on dense q, k and v of one head dim."""
    with torch.no_grad():
        q, k, v = (t.transpose(1, 2) for t in x[:3])
        k, v = (_for_each_head(t, q.shape[1]) for t in (k, v))
        out, lse = _forward(q, k, v, 0.0, is_causal, scale=x.softmax_scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def whole_backward(x: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    """dq, dk and dv of the operator on dense q, k and v of one head dim."""
    with torch.no_grad():
        heads_k = x.k.shape[2]
        dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, *x[:3], out))
        shares = _sums_well(q.shape[2], q.shape[1] // heads_k, q.dtype)
        k, v = (_for_each_head(t, q.shape[1], shares) for t in (k, v))
        dq, dk, dv = _backward(dout, q, k, v, out, lse, 0.0, is_causal, scale=x.softmax_scale)
        dk, dv = (_summed(t, heads_k).to(t.dtype) for t in (dk, dv))
        return tuple(t.transpose(1, 2).contiguous() for t in (dq, dk, dv))


def _write(target: Tensor, x: Tensor) -> None:
    target.copy_(x[..., : target.shape[-1]])


class _KeyGradients:
    """dk and dv (n, hk, sk, d), of which every part is given once, or summed over blocks of rows."""

    def __init__(self, dk: Tensor, dv: Tensor, is_summed: bool) -> None:
        self.targets = dk, dv
        self.sums = [torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (dk, dv)] if is_summed else None

    def give(self, seen: slice, *parts: Tensor) -> None:
        """The operator's gradients of the keys and of the values in `seen`."""
        for target, x in zip(self.sums or self.targets, parts, strict=True):
            part = _summed(x, target.shape[1])
            if self.sums is None:
                _write(target[:, :, seen], part)
            else:
                target[:, :, seen] += part[..., : target.shape[-1]]

    def finish(self) -> None:
        """Write the sums."""
        for target, total in zip(self.targets, self.sums or (), strict=False):
            target.copy_(total)


def _backward_pieces(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, of_keys: _KeyGradients, blocks: list[range], band: Band, scale: float,
) -> None:  # fmt: skip
    for rows in blocks:
        here = slice(rows.start - band.first_row, rows.stop - band.first_row)
        open_keys, has_triangle = pieces(band, rows.start)
        parts = [(slice(0, open_keys), False)] if open_keys > 0 else []
        if has_triangle:
            parts.append((slice(open_keys, band.keys(rows).stop), True))
        sum_dq = None
        for seen, is_triangle in parts:
            dq_part, *parts_of_keys = _backward(
                dout[:, :, here], q[:, :, here], k[:, :, seen], v[:, :, seen], out[:, :, here], lse[..., here], 0.0,
                is_triangle, scale=scale,
            )  # fmt: skip
            sum_dq = dq_part if sum_dq is None else sum_dq.add_(dq_part)
            of_keys.give(seen, *parts_of_keys)
        _write(dq[:, :, here], sum_dq)


def _backward_blocks(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, of_keys: _KeyGradients, blocks: list[range], biases: _Biases, scale: float,
) -> None:  # fmt: skip
    for rows in blocks:
        cols = biases.band.keys(rows)
        here = slice(rows.start - biases.band.first_row, rows.stop - biases.band.first_row)
        seen = slice(cols.start, cols.stop)
        dq_block, *parts_of_keys = _backward(
            dout[:, :, here], q[:, :, here], k[:, :, seen], v[:, :, seen], out[:, :, here], lse[..., here], 0.0, False,
            attn_mask=biases.of(rows, cols), scale=scale,
        )  # fmt: skip
        _write(dq[:, :, here], dq_block)
        of_keys.give(seen, *parts_of_keys)
