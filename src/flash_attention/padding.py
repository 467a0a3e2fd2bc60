"""Key padding masks without padding computed: rows are packed, and put back, on the device without waiting for it.

The number of kept rows is known to the device alone, so packed tensors keep the size of the padded ones: kept rows
come first, in order, and the rest lies behind `cu_seqlens[-1]`, where the engine computes nothing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn_plus import InvalidArgument


class Packing(NamedTuple):
    """Where the rows of a mask `keep`, bool (b, s), go: int64 `order` (b * s,), its inverse, int32 `cu_seqlens`."""

    keep: Tensor
    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, keep: Tensor) -> "Packing":
        """The packing that brings kept rows to the front and leaves their order."""
        flat = keep.flatten()
        row = torch.arange(flat.shape[0], device=keep.device)
        kept = flat.cumsum(0)  # up to and with each row
        inverse = torch.where(flat, kept - 1, kept[-1:] + row - kept)
        order = torch.empty_like(row).scatter_(0, inverse, row)
        return cls(keep, order, inverse, F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32))

    def pack(self, x: Tensor) -> Tensor:
        """(b, s, ...) -> (b * s, ...); what arrives as the gradient of a row that is not kept is taken as 0."""
        return _Pack.apply(x, self.keep, self.order, self.inverse)

    def unpack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(b * s, ...) -> (b, s, ...) with `fill` in the rows that are not kept."""
        return _Unpack.apply(x, self.keep, self.order, self.inverse, fill)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """(b, s, ...) of any strides -> (b * s, ...) in order."""
    return x[order // x.shape[1], order % x.shape[1]]


def _scatter(x: Tensor, inverse: Tensor, keep: Tensor, fill: float) -> Tensor:
    """(b * s, ...) -> (b, s, ...); the engine leaves open what rows behind the last sequence hold."""
    rows = x[inverse].unflatten(0, keep.shape)
    return rows.masked_fill(~keep.view(*keep.shape, *(1,) * (x.ndim - 1)), fill)


class _Pack(torch.autograd.Function):
    """Rows move by a permutation, so the gradient is gathered as well, with no addition whose order could vary."""

    @staticmethod
    def forward(ctx, x: Tensor, keep: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(keep, inverse)
        return _gather(x, order)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        keep, inverse = ctx.saved_tensors
        return _scatter(gradient, inverse, keep, 0.0), None, None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, keep: Tensor, order: Tensor, inverse: Tensor, fill: float) -> Tensor:
        ctx.save_for_backward(order)
        return _scatter(x, inverse, keep, fill)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (order,) = ctx.saved_tensors
        return _gather(gradient, order), None, None, None, None


def check_mask(mask: Tensor, shape: tuple[int, int], device: torch.device, name: str = "key_padding_mask") -> None:
    """Raise InvalidArgument unless the mask is bool, of that shape and on that device."""
    if mask.dtype != torch.bool:
        raise InvalidArgument(
            f"{name} must be bool, True where a token takes part, not {mask.dtype}; compare or call .bool() on it"
        )
    if mask.shape != shape:
        raise InvalidArgument(f"{name} must have shape (batch, seqlen) = {tuple(shape)}, not {tuple(mask.shape)}")
    if mask.device != device:
        raise InvalidArgument(f"{name} must be on {device} like the tokens, but is on {mask.device}")


def aligned_queries(keep: Tensor, seqlen_q: int) -> Tensor:
    """Bool (b, sq): whether the key at each query's own position is kept; queries before the first key are too.

    Queries and keys end together, so query i stands at key i + sk - sq.
    """
    more = seqlen_q - keep.shape[1]
    return F.pad(keep, (more, 0), value=True) if more > 0 else keep[:, -more:]
