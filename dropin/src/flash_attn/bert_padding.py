"""Removing and restoring padding: between (batch, seqlen, ...) and the packed rows (nnz, ...) of its valid tokens."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "repeat",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def _scatter_rows(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) zeros with values (z, ...) at rows `indices` (z,)."""
    out = values.new_zeros((first_axis_dim, *values.shape[1:]))
    out[indices] = values
    return out


class IndexFirstAxis(torch.autograd.Function):
    """Rows `indices` (z,) of input (n, ...); the gradient is assigned, not added, to its rows."""

    @staticmethod
    def forward(ctx, input, indices):
        assert input.ndim >= 2, f"input must be (n, ...) with features behind its rows, not {tuple(input.shape)}"
        ctx.save_for_backward(indices)
        ctx.first_axis_dim = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        return _scatter_rows(grad_output, indices, ctx.first_axis_dim), None


class IndexPutFirstAxis(torch.autograd.Function):
    """Values (z, ...) at rows `indices` (z,) of a zero tensor of first_axis_dim rows."""

    @staticmethod
    def forward(ctx, values, indices, first_axis_dim):
        assert indices.ndim == 1, f"indices must be (z,), not {tuple(indices.shape)}"
        assert values.ndim >= 2, f"values must be (z, ...) with features behind its rows, not {tuple(values.shape)}"
        ctx.save_for_backward(indices)
        return _scatter_rows(values, indices, first_axis_dim)

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """Rows `indices` of input, and input itself for a residual branch whose gradient buffer takes both gradients."""

    @staticmethod
    def forward(ctx, input, indices):
        assert input.ndim >= 2, f"input must be (n, ...) with features behind its rows, not {tuple(input.shape)}"
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx, grad_output, grad_residual):
        (indices,) = ctx.saved_tensors
        if 0 in grad_residual.stride():  # an expanded gradient has no memory of its own to add into
            grad_residual = grad_residual.clone(memory_format=torch.contiguous_format)
        return grad_residual.index_add_(0, indices, grad_output), None


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def _cumulative(seqlens: Tensor) -> Tensor:
    return F.pad(torch.cumsum(seqlens, dim=0, dtype=torch.int32), (1, 0))


def _longest(seqlens: Tensor) -> int:
    return seqlens.max().item() if seqlens.numel() else 0


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """Pack the rows of the tokens that a mask selects.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1 where a token is valid.
        unused_mask: (batch, seqlen), 1 where a token is allocated but unused; packed, but not counted in `seqused`.

    Returns:
        hidden_states (nnz, ...) of the tokens in either mask; their indices (nnz,), int64, into batch * seqlen;
        cu_seqlens (batch + 1,), int32; the longest sequence as an int, which waits for the device; and
        seqused (batch,), int32, the counts of `attention_mask` alone.
    """
    is_valid = attention_mask != 0
    is_packed = is_valid if unused_mask is None else is_valid | (unused_mask != 0)
    seqlens = is_packed.sum(dim=-1, dtype=torch.int32)
    seqused = is_valid.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(is_packed.flatten(), as_tuple=False).flatten()
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, _cumulative(seqlens), _longest(seqlens), seqused


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """Pack rows that hold several sequences each, keeping every sequence apart.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), int; row n lists the lengths of the sequences packed from the start
            of row n of hidden_states, zeros elsewhere. `[[2, 3, 0, 0, 0, 0]]` says that tokens 0-1 are one sequence,
            2-4 another, and token 5 is padding.

    Returns:
        hidden_states (nnz, ...), indices (nnz,), cu_seqlens (sequences + 1,) and the longest sequence, as `unpad_input`
        returns them, with one entry of cu_seqlens per packed sequence.
    """
    row_lengths = attention_mask_in_length.sum(dim=-1)
    positions = torch.arange(attention_mask_in_length.shape[-1], device=row_lengths.device)
    indices = torch.nonzero((positions < row_lengths[:, None]).flatten(), as_tuple=False).flatten()
    lengths = attention_mask_in_length.flatten()
    seqlens = lengths[lengths != 0].to(torch.int32)
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, _cumulative(seqlens), _longest(seqlens)


def pad_input(hidden_states, indices, batch, seqlen):
    """(batch, seqlen, ...) with hidden_states (nnz, ...) at the flat `indices` (nnz,), zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
