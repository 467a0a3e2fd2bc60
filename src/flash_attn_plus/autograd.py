"""The one differentiable attention, for separate and packed q, k, v alike."""

from typing import Literal

import torch
from torch import Tensor

from flash_attn_plus import ops
from flash_attn_plus.derivatives import once_differentiable

Packing = Literal["q_k_v", "q_kv", "qkv"]


def unpack(packing: Packing, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k and v as views; the packed dimension of qkv and kv is the third from the end."""
    if packing == "qkv":
        return tensors[0].unbind(-3)
    if packing == "q_kv":
        return (tensors[0], *tensors[1].unbind(-3))
    return tensors


def dropout_state(q: Tensor, dropout_p: float) -> Tensor | None:
    """int64 (2,): seed and offset, drawn from torch's generator of q's device; None without dropout."""
    if dropout_p == 0.0:
        return None
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=q.device)


def forward(ctx, packing: Packing, tensors, sequences, options, window_size_left, window_size_right, deterministic):
    """Run the forward pass and save on ctx what `backward` needs; returns out, lse, rng_state.

    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (alibi_slopes, dropout_p, softmax_scale, softcap)
    """
    tensors = tuple(map(ops.rows_last, tensors))
    q, k, v = unpack(packing, tensors)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = sequences
    alibi_slopes, dropout_p, softmax_scale, softcap = options
    rng_state = dropout_state(q, dropout_p)
    out, lse = ops.forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, None,
        alibi_slopes, rng_state, dropout_p, softmax_scale, window_size_left, window_size_right, softcap,
    )  # fmt: skip
    ctx.save_for_backward(out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, *tensors)
    ctx.packing = packing
    ctx.lengths = (max_seqlen_q, max_seqlen_k)
    ctx.numbers = (dropout_p, softmax_scale, window_size_left, window_size_right, softcap, deterministic)
    return out, lse, rng_state


def backward(ctx, dout: Tensor, dlse: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of the tensors that went in, packed as they were."""
    out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, *tensors = ctx.saved_tensors
    q, k, v = unpack(ctx.packing, tuple(tensors))
    given = dout, q, k, v, out, lse, dlse
    options = cu_seqlens_q, cu_seqlens_k, *ctx.lengths, None, None, None, alibi_slopes, rng_state, *ctx.numbers
    if ctx.packing == "q_k_v" or torch.compiler.is_compiling():
        return _pack(ctx.packing, ops.gradients(*given, *options))
    grads = _allocate_packed(ctx.packing, q, k)
    ops.backward(*given, *unpack(ctx.packing, grads), *options)
    return grads


def _pack(packing: Packing, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """dq, dk and dv joined: with sizes that vary, Inductor loses what an operator writes into slices of one tensor."""
    if packing == "qkv":
        return (torch.stack(grads, -3),)
    return (grads[0], torch.stack(grads[1:], -3)) if packing == "q_kv" else grads


def _allocate_packed(packing: Packing, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=q.dtype, device=q.device)

    if packing == "qkv":
        return (empty(*q.shape[:-2], 3, *q.shape[-2:]),)
    return empty(*q.shape), empty(*k.shape[:-2], 2, *k.shape[-2:])


class Attention(torch.autograd.Function):
    """out and lse, both differentiable, of separate q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, sequences, options, window_size_left, window_size_right, deterministic):
        ctx.set_materialize_grads(False)
        out, lse, _ = forward(
            ctx, "q_k_v", (q, k, v), sequences, options, window_size_left, window_size_right, deterministic
        )
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None:
            dout = torch.zeros_like(ctx.saved_tensors[0])
        return (*backward(ctx, dout, dlse), None, None, None, None, None)
