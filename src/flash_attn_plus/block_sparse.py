"""Attention under a mask of blocks: hidden blocks cost nothing, forward and backward."""

import torch
from torch import Tensor

from flash_attn_plus import ops
from flash_attn_plus.arguments import as_length, as_number, resolve_scale, window_bounds
from flash_attn_plus.autograd import dropout_state
from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.errors import InvalidArgument
from flash_attn_plus.functional import autocast
from flash_attn_plus.problem import AttentionInputs, AttentionProblem, describe

_CALL = (
    "Tensor block_mask, SymInt block_q, SymInt block_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? alibi_slopes, Tensor? rng_state, float dropout_p,"
    " float softmax_scale, SymInt window_size_left, SymInt window_size_right, float softcap"
)
_library = torch.library.Library("flash_attn_plus", "FRAGMENT")
_library.define(f"block_sparse_forward(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor out, Tensor lse)")
_library.define(
    "block_sparse_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse,"
    f" Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, {_CALL}) -> Tensor delta"
)


def _check_blocks(x: AttentionInputs, problem: AttentionProblem) -> None:
    """The mask's dtype, device and shape."""
    mask, (block_q, block_k) = x.block_mask, x.block_size
    if mask.dtype != torch.bool:
        raise InvalidArgument(f"block_mask must have dtype bool, true where visible, not {mask.dtype}; call .bool()")
    if mask.device != x.q.device:
        raise InvalidArgument(f"block_mask must be on {x.q.device} like q, but is on {mask.device}")
    if block_q < 1 or block_k < 1:
        raise InvalidArgument(f"block_size must be two positive numbers (queries, keys), not {(block_q, block_k)}")
    blocks = -(-problem.seqlen_q // block_q), -(-problem.seqlen_k // block_k)
    leading_fits = mask.shape[0] in (1, problem.batch) and mask.shape[1] in (1, problem.heads)
    if not leading_fits or mask.shape[2:] != blocks:
        raise InvalidArgument(
            f"block_mask must have shape (1 or {problem.batch}, 1 or {problem.heads}, {blocks[0]}, {blocks[1]}) for"
            f" {problem.seqlen_q} queries and {problem.seqlen_k} keys in blocks of {block_q} x {block_k}, leading"
            f" dimensions optional, not {tuple(mask.shape)}"
        )


def _describe(
    q, k, v, block_mask, block_q, block_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes,
    rng_state, dropout_p, softmax_scale, window_size_left, window_size_right, softcap, is_backward=False,
) -> tuple[AttentionProblem, AttentionInputs]:  # fmt: skip
    """The checked call."""
    inputs = ops.gather_inputs(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, None, None, alibi_slopes, rng_state, dropout_p, softmax_scale,
        softcap,
    )._replace(block_mask=ops.rows_last(block_mask), block_size=(block_q, block_k))  # fmt: skip
    problem = describe(inputs, max_seqlen_q, max_seqlen_k, window_size_left, window_size_right, is_backward)
    _check_blocks(inputs, problem)
    return problem, inputs


def _forward(q, k, v, *call):
    problem, inputs = _describe(q, k, v, *call)
    out, lse = ops.allocate_outputs(q, v, problem.is_varlen_q)
    ops.run_forward(problem, inputs, out, lse)
    return out, lse


def _forward_fake(q, k, v, *call):
    problem, _ = _describe(q, k, v, *call)
    return ops.allocate_outputs(q, v, problem.is_varlen_q)


def _backward(dout, q, k, v, out, lse, dlse, dq, dk, dv, *call):
    problem, inputs = _describe(q, k, v, *call, is_backward=True)
    dlse = None if dlse is None else dlse.contiguous()
    given = ops.rows_last(dout), ops.rows_last(out), lse, dlse
    return ops.plan_backward(problem, inputs)((dq, dk, dv), inputs, *given)[1]


def _backward_fake(dout, q, k, v, out, lse, dlse, dq, dk, dv, *call):
    return torch.empty_like(lse)


for _name, _implementation, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake)):
    _library.impl(f"block_sparse_{_name}", _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn_plus::block_sparse_{_name}", _fake, lib=_library)

forward = torch.ops.flash_attn_plus.block_sparse_forward.default
backward = torch.ops.flash_attn_plus.block_sparse_backward.default


class BlockSparseAttention(torch.autograd.Function):
    """out and lse, both differentiable; `numbers` follow the tensors in the operators' arguments."""

    @staticmethod
    def forward(ctx, q, k, v, block_mask, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, sizes, numbers):
        """sizes = (block_q, block_k), (max_seqlen_q, max_seqlen_k)."""
        ctx.set_materialize_grads(False)
        q, k, v = (ops.rows_last(x) for x in (q, k, v))
        blocks, lengths = sizes
        out, lse = forward(
            q, k, v, block_mask, *blocks, cu_seqlens_q, cu_seqlens_k, *lengths, alibi_slopes, rng_state, *numbers
        )
        ctx.save_for_backward(q, k, v, out, lse, block_mask, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state)
        ctx.sizes, ctx.numbers = sizes, numbers
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        """Gradients of q, k and v."""
        q, k, v, out, lse, block_mask, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state = ctx.saved_tensors
        blocks, lengths = ctx.sizes
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        backward(
            torch.zeros_like(out) if dout is None else dout, q, k, v, out, lse, dlse, *grads, block_mask, *blocks,
            cu_seqlens_q, cu_seqlens_k, *lengths, alibi_slopes, rng_state, *ctx.numbers,
        )  # fmt: skip
        return (*grads, *(None,) * 7)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which whole blocks of scores are hidden, in time proportional to the visible ones.

    A score is visible when its block is, and when causal and window_size let it be. Blocks may have any size; those
    whose sides are multiples of 128 (64) run fastest, since no tile of the kernels then holds parts of two of them.
    Gradients are bitwise repeatable. The lists that the kernels walk are made on the device, without waiting for it,
    and hold one number for each pair of tiles and each mask.

    Args:
        q, k, v: as for `attention`: dense (b, s, heads, d), or packed (total, heads, d) with `cu_seqlens`.
        block_mask: bool ([[1 or b,] 1 or h,] query blocks, key blocks), true where visible; block (i, j) holds the
            queries [i block_size[0], (i + 1) block_size[0]) and the keys of j alike, counted from the start of each
            sequence, ceil(max_seqlen / block_size) blocks in all. `block_mask_of_lists` makes one of lists.
        block_size: queries and keys of a block.
        The other arguments are those of `attention`.

    Returns:
        out (b, sq, h, dv) or (total_q, h, dv); with return_lse also lse, float32 (b, h, sq) or (h, total_q), which is
        differentiable. A row that sees no key has out 0 and lse +inf.

    Raises:
        InvalidArgument: a shape, dtype, device or option breaks the contract; the message names it.
        NoBackend: no permitted backend serves the call; the message lists all reasons.
    """
    q, k, v = autocast(q, k, v)
    if not 2 <= block_mask.ndim <= 4 or len(block_size) != 2:
        raise InvalidArgument(
            f"block_mask must have 2 to 4 dimensions and block_size 2 numbers, not {block_mask.ndim} and {block_size}"
        )
    block_mask = block_mask[(None,) * (4 - block_mask.ndim)]
    left, right = window_bounds(window_size, causal)
    scale = resolve_scale(softmax_scale, q)
    lengths = (
        as_length("max_seqlen_q", max_seqlen_q, cu_seqlens_q),
        as_length("max_seqlen_k", max_seqlen_k, cu_seqlens_k),
    )
    dropout_p, softcap = as_number("dropout_p", dropout_p), as_number("softcap", softcap)
    numbers = dropout_p, scale, left, right, softcap
    tensors = cu_seqlens_q, cu_seqlens_k, alibi_slopes, dropout_state(q, dropout_p)
    out, lse = BlockSparseAttention.apply(q, k, v, block_mask, *tensors, (tuple(block_size), lengths), numbers)
    return (out, lse) if return_lse else out


def block_mask_of_lists(counts: Tensor, indices: Tensor, key_blocks: int) -> Tensor:
    """The block mask of a list of visible key blocks for each block of queries.

    Args:
        counts: int (..., query blocks), how many entries of each list count.
        indices: int (..., query blocks, n), numbers of visible key blocks in any order; entries behind are ignored.
        key_blocks: the number of key blocks.

    Returns:
        bool (..., query blocks, key_blocks), on the lists' device; made without waiting for it.

    Raises:
        InvalidArgument: the shapes do not go together.
    """
    if indices.shape[:-1] != counts.shape:
        raise InvalidArgument(
            f"counts must have shape {tuple(indices.shape[:-1])}, that of indices but for the last dimension, not"
            f" {tuple(counts.shape)}"
        )
    is_entry = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    mask = torch.zeros((*counts.shape, key_blocks + 1), dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(is_entry, indices, key_blocks).long(), True)[..., :-1]
