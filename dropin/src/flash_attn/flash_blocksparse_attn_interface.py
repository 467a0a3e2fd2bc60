"""Packed self-attention under a mask of blocks of 16 queries by 256 keys; the engine takes blocks of any size."""

import torch

from flash_attn._softmax_dump import TILE, _padded
from flash_attn_plus import autograd, block_sparse, ops
from flash_attn_plus.arguments import as_length, as_number, resolve_scale
from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.dropout import keep_mask
from flash_attn_plus.errors import InvalidArgument

BLOCK_SIZE = (16, 256)


def convert_blockmask(blockmask, causal):
    """The 0/1 mask (rows of 16, columns of 256) as int32 (columns, rows): per column the set blocks, then -1.

    An entry is four times the row, plus 1 if the block is its row's first, plus 2 if it is its row's last.
    """
    assert not causal, "causal is not supported; put zeros above the diagonal of blockmask"
    blockmask = blockmask.bool()
    before = blockmask.cumsum(1)
    is_first = blockmask & (before == 1)
    is_last = blockmask & (before == before[:, -1:])
    rows = torch.arange(blockmask.shape[0], device=blockmask.device)[:, None]
    entries = 4 * rows + is_first.int() + 2 * is_last.int()
    order = (~blockmask).int().argsort(dim=0, stable=True)
    return torch.where(blockmask, entries, -1).gather(0, order).t().contiguous().to(torch.int32)


def _visible_blocks(converted, max_s):
    """Bool (1, 1, rows, columns) of the blocks that sequences of max_s meet, from `convert_blockmask`'s form."""
    needed = tuple(-(-max_s // size) for size in BLOCK_SIZE)
    if converted.ndim != 2 or converted.shape[1] < needed[0] or converted.shape[0] < needed[1]:
        raise InvalidArgument(
            f"blockmask must have at least {needed[0]} rows and {needed[1]} columns of blocks of 16 x 256 for max_s"
            f" {max_s}; converted, which is (columns, rows), it has shape {tuple(converted.shape)}"
        )
    blocks = block_sparse.block_mask_of_lists((converted >= 0).sum(-1), converted >> 2, converted.shape[1]).t()
    return blocks[None, None, : needed[0], : needed[1]]


def _forward(ctx, qkv, cu_seqlens, blockmask, dropout_p, max_s, softmax_scale, causal):
    """(out, lse), with what `_backward` needs saved on ctx, and the tensors that `_weights` needs."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise InvalidArgument(f"qkv must have shape (total, 3, heads, head_dim), not {tuple(qkv.shape)}")
    qkv, max_s = ops.rows_last(qkv), as_length("max_s", max_s, cu_seqlens)
    blocks = _visible_blocks(blockmask, max_s)
    dropout_p = as_number("dropout_p", dropout_p)
    rng_state = autograd.dropout_state(qkv, dropout_p)
    scale = resolve_scale(softmax_scale, qkv)
    ctx.call = BLOCK_SIZE, (max_s, max_s), (dropout_p, scale, -1, 0 if causal else -1, 0.0)
    tensors = qkv, blocks, cu_seqlens, rng_state
    out, lse = block_sparse.forward(*qkv.unbind(1), *_arguments(ctx, *tensors[1:]))
    ctx.save_for_backward(*tensors, out, lse)
    return out, lse, tensors


def _arguments(ctx, blocks, cu_seqlens, rng_state):
    """What follows the tensors in the arguments of the engine's operators."""
    block_size, lengths, numbers = ctx.call
    return blocks, *block_size, cu_seqlens, cu_seqlens, *lengths, None, rng_state, *numbers


@once_differentiable
def _backward(ctx, dout):
    """Gradients of `apply`'s arguments: that of qkv is one tensor, into whose slices dq, dk and dv go."""
    qkv, *tensors, out, lse = ctx.saved_tensors
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    block_sparse.backward(dout, *qkv.unbind(1), out, lse, None, *dqkv.unbind(1), *_arguments(ctx, *tensors))
    return dqkv, None, None, None, None, None, None


def _weights(ctx, lse, qkv, blocks, cu_seqlens, rng_state):
    """S_dmask and the LSE of padded sequences; see `FlashBlocksparseAttnFunWithS`."""
    _, (longest, _), (dropout_p, scale, _, right, _) = ctx.call
    q, k, _ = _padded(qkv, cu_seqlens[:-1], longest).unbind(2)
    batch, heads = q.shape[0], q.shape[2]
    cols, lengths = torch.arange(longest, device=qkv.device), cu_seqlens.diff()[:, None, None]
    lse = _padded(lse.t(), cu_seqlens[:-1], longest).transpose(1, 2).where(cols < lengths, float("inf"))
    weights = qkv.new_empty((batch, heads, longest, longest))
    keys = k.to(lse.dtype).permute(0, 2, 3, 1)
    numbers = torch.arange(batch * heads, device=qkv.device).view(batch, heads)
    for start in range(0, longest, TILE):
        rows = torch.arange(start, min(start + TILE, longest), device=qkv.device)
        scores = q[:, start : start + TILE].transpose(1, 2).to(lse.dtype) @ keys * scale
        inside = blocks[:, :, rows // BLOCK_SIZE[0]][..., cols // BLOCK_SIZE[1]] & (cols < lengths[..., None])
        if right == 0:
            inside = inside & (cols <= rows[:, None])
        part = (scores - lse[..., start : start + TILE, None]).exp_().where(inside, 0.0)
        if dropout_p > 0.0:
            kept = keep_mask(rng_state, numbers, range(start, start + len(rows)), range(longest), dropout_p)
            part = part.where(kept, -part)
        weights[:, :, start : start + TILE] = part
    return weights, lse


class FlashBlocksparseAttnFun(torch.autograd.Function):
    """apply(qkv, cu_seqlens, converted blockmask, dropout_p, max_s, softmax_scale, causal) -> out."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, blockmask, dropout_p, max_s, softmax_scale, causal):
        """out (total, heads, head_dim)."""
        return _forward(ctx, qkv, cu_seqlens, blockmask, dropout_p, max_s, softmax_scale, causal)[0]

    @staticmethod
    def backward(ctx, dout):
        """The gradient of qkv."""
        return _backward(ctx, dout)


class FlashBlocksparseAttnFunWithS(torch.autograd.Function):
    """Like `FlashBlocksparseAttnFun`, and returns (out, S_dmask, softmax_lse); gradients flow through out only.

    S_dmask (b, heads, max_s, max_s) holds the attention weights before dropout, negative where dropped, 0 where hidden;
    softmax_lse (b, heads, max_s) is +inf beyond a sequence's end.
    """

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, blockmask, dropout_p, max_s, softmax_scale, causal):
        """(out, S_dmask, softmax_lse)."""
        out, lse, tensors = _forward(ctx, qkv, cu_seqlens, blockmask, dropout_p, max_s, softmax_scale, causal)
        extras = _weights(ctx, lse, *tensors)
        ctx.mark_non_differentiable(*extras)
        return out, *extras

    @staticmethod
    def backward(ctx, dout, *unused):
        """The gradient of qkv from that of out."""
        return _backward(ctx, dout)


def flash_blocksparse_attn_func(
    qkv,
    cu_seqlens,
    blockmask,
    dropout_p,
    max_s,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
    convert_mask=True,
):
    """Self-attention of packed sequences in which whole blocks of 16 queries by 256 keys are hidden, with gradients.

    Args:
        qkv: (total, 3, heads, head_dim), any float dtype on any device.
        cu_seqlens: int32 (b + 1,), starts of the sequences, and the total.
        blockmask: 0/1 (rows, columns), nonzero where a block is visible, counted from the start of each sequence;
            with convert_mask=False already in the form of `convert_blockmask`. It may be larger than max_s needs.
        dropout_p: probability to drop an attention weight; 0 during evaluation.
        max_s: the longest sequence's length.
        softmax_scale: default head_dim ** -0.5.
        causal: hide the keys behind each query besides.
        return_attn_probs: also return S_dmask and softmax_lse; see `FlashBlocksparseAttnFunWithS`.

    Returns:
        out (total, heads, head_dim), 0 for a row that sees no key; or (out, S_dmask, softmax_lse).

    Raises:
        InvalidArgument: a shape, dtype or device breaks the contract; the message names it.
    """
    if convert_mask:
        if blockmask.ndim != 2:
            raise InvalidArgument(f"blockmask must have shape (rows, columns), not {tuple(blockmask.shape)}")
        blockmask = convert_blockmask(blockmask, causal=False)
    function = FlashBlocksparseAttnFunWithS if return_attn_probs else FlashBlocksparseAttnFun
    return function.apply(qkv, cu_seqlens, blockmask, dropout_p, max_s, softmax_scale, causal)
