"""Sequences of different lengths, as a list or as a nested (jagged) tensor, laid end to end for the engine."""

from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from flash_attn_plus import InvalidArgument


class Ragged(NamedTuple):
    """Sequences one behind the other: rows (total, ...), int32 `cu_seqlens` (b + 1,), and the longest's length.

    `lengths` tells on the host whether two hold the same lengths: a list's own, or a nested tensor's symbol for them.
    """

    rows: Tensor
    cu_seqlens: Tensor
    longest: int
    lengths: Any

    def positions(self) -> Tensor:
        """int64 (total,): the position of each row within its sequence."""
        total = self.rows.shape[0]
        first = self.cu_seqlens[:-1].long()
        starts = torch.repeat_interleave(first, self.cu_seqlens.diff(), output_size=total)
        return torch.arange(total, device=first.device) - starts

    def with_rows(self, rows: Tensor) -> "Ragged":
        """Other rows of the same sequences."""
        return Ragged(rows, self.cu_seqlens, self.longest, self.lengths)


Sequences: TypeAlias = Any  # a list or tuple of tensors, a nested tensor of layout torch.jagged, or a Ragged


def is_ragged(x: Sequences) -> bool:
    """Whether x holds sequences of different lengths: a list or tuple, a nested tensor, or a `Ragged`."""
    return not isinstance(x, Tensor) or x.is_nested


def _from_list(name: str, items: list[Tensor] | tuple[Tensor, ...], dim: int, ndim: int) -> Ragged:
    if not items or not all(isinstance(x, Tensor) and x.ndim == ndim for x in items):
        raise InvalidArgument(
            f"{name} must hold at least one tensor, each of {ndim} dimensions, a sequence without batch"
        )
    first, like = items[0], [n for i, n in enumerate(items[0].shape) if i != dim]
    for x in items:
        if [n for i, n in enumerate(x.shape) if i != dim] != like or x.dtype != first.dtype or x.device != first.device:
            raise InvalidArgument(
                f"the sequences of {name} must agree in dtype, device and every size but the length: one has shape"
                f" {tuple(x.shape)}, dtype {x.dtype} and device {x.device}, another {tuple(first.shape)}, {first.dtype}"
                f" and {first.device}"
            )
    lengths = [x.shape[dim] for x in items]
    starts = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    rows = torch.cat([x.transpose(0, dim) for x in items])
    return Ragged(rows, starts.to(first.device, non_blocking=True), max(lengths), lengths)


def _from_nested(name: str, x: Any, dim: int, ndim: int) -> Ragged:
    if x.layout != torch.jagged:
        raise InvalidArgument(f"{name} must be a nested tensor with layout=torch.jagged, not {x.layout}")
    if x.lengths() is not None:
        raise InvalidArgument(f"{name} must hold its sequences without gaps between them; call .contiguous() on it")
    if x.dim() != ndim + 1 or x._ragged_idx != dim + 1:
        raise InvalidArgument(
            f"{name} must be a nested tensor of {ndim + 1} dimensions whose dimension {dim + 1} is the length, not of"
            f" shape {tuple(x.shape)}"
        )
    rows, longest = x.values().transpose(0, dim), x._maybe_max_seqlen
    if longest is None:  # a bound serves as well; eager calls find the length once, and the tensor keeps it
        longest = rows.shape[0] if torch.compiler.is_compiling() else x._get_max_seqlen()
    return Ragged(rows, x.offsets().to(torch.int32), longest, x.shape[dim + 1])


def lay_out(name: str, x: Sequences, dim: int, ndim: int) -> Ragged:
    """The sequences end to end; `dim` is the length's dimension in one of them, which has `ndim` dimensions.

    A list is copied, a nested tensor is viewed.
    """
    if isinstance(x, Ragged):
        return x
    return _from_nested(name, x, dim, ndim) if isinstance(x, Tensor) else _from_list(name, x, dim, ndim)


def _as_nested(values: Tensor, like: Any, dim: int) -> Tensor:
    bounds = {"min_seqlen": like._maybe_min_seqlen, "max_seqlen": like._maybe_max_seqlen}
    return nested_tensor_from_jagged(values, like.offsets(), jagged_dim=dim + 1, **bounds)


def hand_back(rows: Tensor, like: Sequences, dim: int) -> Sequences:
    """Rows (total, ...) as what came in: a list or a nested tensor of views, in order; rows for a `Ragged`."""
    if isinstance(like, Ragged):
        return like.with_rows(rows)
    if isinstance(like, Tensor):
        return _as_nested(rows.transpose(0, dim), like, dim)
    return [x.transpose(0, dim) for x in rows.split([item.shape[dim] for item in like])]


def sequences_of(x: Sequences, dim: int) -> list[Tensor]:
    """Each sequence as a tensor of its own, with its length in dimension `dim`; a `Ragged` is read on the host."""
    if isinstance(x, Ragged):
        return [part.transpose(0, dim) for part in x.rows.split(x.cu_seqlens.diff().tolist())]
    return list(x.unbind()) if isinstance(x, Tensor) else list(x)
