"""The raw calls of the extension module: positional, unpadded, without autograd.

`flash_attn.flash_attn_interface.flash_attn_gpu` is this module. Beyond the original it takes any device, float32 and
float64, and head dims up to flash_attn_plus.problem.MAX_HEAD_DIM; it refuses the rest with the original's words.
"""

import torch
from torch.nn.functional import pad

from flash_attn._checks import check_head_dim, check_rows, deliver
from flash_attn._kvcache import fwd_kvcache
from flash_attn._softmax_dump import softmax_dump
from flash_attn_plus import ops
from flash_attn_plus.autograd import dropout_state
from flash_attn_plus.errors import InvalidArgument

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]


def _refuse_generator(generator) -> None:
    if generator is not None:
        raise InvalidArgument(
            "The `generator` argument is no longer supported; seed torch's default generator instead and pass None"
        )


def _uncovered(q, cu_seqlens_q):
    """bool (total_q,): the rows behind the last sequence."""
    return torch.arange(q.shape[0], device=q.device) >= cu_seqlens_q[-1]


def _forward(
    q, k, v, out, sequences, alibi_slopes, p_dropout, softmax_scale, left, right, softcap, return_softmax, generator,
    zero_tensors=False,
):  # fmt: skip
    """sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table)."""
    _refuse_generator(generator)
    check_rows(q=q, k=k, v=v, out=out)
    check_head_dim(q.shape[-1], is_backward=False)
    if return_softmax and not p_dropout > 0.0:
        raise InvalidArgument("return_softmax is only supported when p_dropout > 0.0; pass return_softmax=False")
    with torch.no_grad():
        rng_state = dropout_state(q, p_dropout)
        if rng_state is None:
            rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
        result, lse = ops.forward(
            q, k, v, *sequences, alibi_slopes, rng_state, p_dropout, softmax_scale, left, right, softcap
        )
        if zero_tensors:
            is_uncovered = _uncovered(q, sequences[0])
            result.masked_fill_(is_uncovered[:, None, None], 0.0)
            lse.masked_fill_(is_uncovered, float("-inf"))
        if return_softmax:
            dump = softmax_dump(q, k, *sequences, alibi_slopes, rng_state, p_dropout, softmax_scale, left, right)
        else:
            dump = q.new_empty(0)
        return deliver(result, out), lse, dump, rng_state


def fwd(
    q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal, window_left, window_right, softcap,
    return_softmax, generator,
):  # fmt: skip
    """Dense forward: (out, lse, S_dmask, rng_state) of q (b, sq, h, d) and k, v (b, sk, hk, d)."""
    return _forward(
        q, k, v, out, (None, None, 0, 0, None, None, None), alibi_slopes, p_dropout, softmax_scale, window_left,
        0 if is_causal else window_right, softcap, return_softmax, generator,
    )  # fmt: skip


def varlen_fwd(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
    max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_left, window_right, softcap,
    return_softmax, generator, num_splits=0,
):  # fmt: skip
    """Packed forward: (out, lse, S_dmask, rng_state) of q (total_q, h, d) and k, v packed or paged.

    `num_splits` is a hint that does not change the result.
    """
    if num_splits > 1 and block_table is not None:
        is_unmasked = max(window_left, window_right) < 0 and p_dropout == 0.0 and alibi_slopes is None
        if not (is_unmasked and max_seqlen_q == 1 and q.shape[1] > k.shape[-2]):
            raise InvalidArgument("num_splits > 1 is not supported with block_table; pass num_splits=0")
    if num_splits > 128:
        raise InvalidArgument(f"num_splits > 128 not supported; {num_splits} was passed")
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k, block_table)
    return _forward(
        q, k, v, out, sequences, alibi_slopes, p_dropout, softmax_scale, window_left,
        0 if is_causal else window_right, softcap, return_softmax, generator, zero_tensors,
    )  # fmt: skip


def _backward(
    dout, q, k, v, out, lse, grads, sequences, alibi_slopes, rng_state, p_dropout, softmax_scale, left, right,
    softcap, deterministic, generator, zero_tensors=False,
):  # fmt: skip
    """dq, dk, dv (the caller's buffers, or new ones) and delta like lse."""
    _refuse_generator(generator)
    check_rows(dout=dout, q=q, k=k, v=v, out=out, dq=grads[0], dk=grads[1], dv=grads[2])
    check_head_dim(q.shape[-1], is_backward=True)
    with torch.no_grad():
        dq, dk, dv = (torch.empty_like(like) if g is None else g for g, like in zip(grads, (q, k, v), strict=True))
        if zero_tensors:
            for x in (dq, dk, dv):
                x.zero_()
        delta = ops.backward(
            dout, q, k, v, out, lse, None, dq, dk, dv, *sequences, None, None, None, alibi_slopes,
            rng_state if p_dropout > 0.0 else None, p_dropout, softmax_scale, left, right, softcap, deterministic,
        )  # fmt: skip
        if zero_tensors:
            delta.masked_fill_(_uncovered(q, sequences[0]), 0.0)
    return dq, dk, dv, delta


def bwd(
    dout, q, k, v, out, lse, dq, dk, dv, alibi_slopes, p_dropout, softmax_scale, is_causal, window_left,
    window_right, softcap, deterministic, generator, rng_state,
):  # fmt: skip
    """Dense backward: (dq, dk, dv, softmax_d); softmax_d is float32 (b, h, sq rounded up to 128)."""
    dq, dk, dv, delta = _backward(
        dout, q, k, v, out, lse, (dq, dk, dv), (None, None, 0, 0), alibi_slopes, rng_state, p_dropout,
        softmax_scale, window_left, 0 if is_causal else window_right, softcap, deterministic, generator,
    )  # fmt: skip
    return dq, dk, dv, pad(delta, (0, -delta.shape[-1] % 128))


def varlen_bwd(
    dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q,
    max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_left, window_right, softcap,
    deterministic, generator, rng_state,
):  # fmt: skip
    """Packed backward: (dq, dk, dv, softmax_d); softmax_d is float32 (h, total_q + 128 * b)."""
    dq, dk, dv, delta = _backward(
        dout, q, k, v, out, lse, (dq, dk, dv), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        alibi_slopes, rng_state, p_dropout, softmax_scale, window_left, 0 if is_causal else window_right,
        softcap, deterministic, generator, zero_tensors,
    )  # fmt: skip
    return dq, dk, dv, pad(delta, (0, 128 * (cu_seqlens_q.shape[0] - 1)))
