"""The six autograd classes of the interface: one computation, and the original's orders of arguments.

`apply` takes everything by position and ends with `is_grad_enabled`, since grad mode is off inside `forward`. Gradients
flow through `out` only; those of softmax_lse and S_dmask are discarded.
"""

import torch

from flash_attn._softmax_dump import softmax_dump
from flash_attn_plus import autograd, ops
from flash_attn_plus.arguments import as_length, as_number, resolve_scale, window_bounds
from flash_attn_plus.derivatives import once_differentiable
from flash_attn_plus.errors import InvalidArgument

DENSE = (None, None, 0, 0)
_SHAPES = {
    ("qkv", True): "qkv must have shape (batch, seqlen, 3, heads, head_dim)",
    ("qkv", False): "qkv must have shape (total, 3, heads, head_dim)",
    ("q_kv", True): "kv must have shape (batch, seqlen_k, 2, heads_k, head_dim)",
    ("q_kv", False): "kv must have shape (total_k, 2, heads_k, head_dim)",
}


def _check_packing(packing, tensors, sequences) -> None:
    packed, slots = tensors[-1], 3 if packing == "qkv" else 2
    is_dense = sequences[0] is None
    if packed.ndim != (5 if is_dense else 4) or packed.shape[-3] != slots:
        raise InvalidArgument(f"{_SHAPES[packing, is_dense]}, not {tuple(packed.shape)}")


def _resolve(packing, tensors, sequences, dropout_p, softmax_scale, softcap, causal, window_size):
    """sequences with integer lengths, the three numbers, and the band."""
    if packing != "q_k_v":
        _check_packing(packing, tensors, sequences)
    if sequences[0] is not None:
        cu_q, cu_k, longest_q, longest_k = sequences
        sequences = (cu_q, cu_k, as_length("max_seqlen_q", longest_q, cu_q), as_length("max_seqlen_k", longest_k, cu_k))
    dropout_p, softcap = as_number("dropout_p", dropout_p), as_number("softcap", softcap)
    scale = resolve_scale(softmax_scale, tensors[0])
    return sequences, dropout_p, scale, softcap, *window_bounds(window_size, causal)


def _with_probabilities(out, lse, q, k, sequences, rng_state, alibi_slopes, dropout_p, scale, left, right, block_table):
    """The triple of `return_attn_probs=True`; S_dmask is empty without dropout."""
    if dropout_p == 0.0:
        return out, lse, q.new_empty(0)
    dump = softmax_dump(
        q, k, *sequences, None, None, block_table, alibi_slopes, rng_state, dropout_p, scale, left, right
    )
    return out, lse, dump


def attend(
    packing, tensors, sequences, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax,
    block_table=None,
):  # fmt: skip
    """The forward pass alone, for calls that need no gradient.

    tensors = (qkv,), (q, kv) or (q, k, v) as `packing` says;
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), or DENSE.
    """
    sequences, dropout_p, scale, softcap, left, right = _resolve(
        packing, tensors, sequences, dropout_p, softmax_scale, softcap, causal, window_size
    )
    q, k, v = autograd.unpack(packing, tensors)
    rng_state = autograd.dropout_state(q, dropout_p)
    out, lse = ops.forward(
        q, k, v, *sequences, None, None, block_table, alibi_slopes, rng_state, dropout_p, scale, left, right, softcap
    )
    if not return_softmax:
        return out
    return _with_probabilities(
        out, lse, q, k, sequences, rng_state, alibi_slopes, dropout_p, scale, left, right, block_table
    )


def _forward(
    ctx, packing, tensors, sequences, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, return_softmax, is_grad_enabled, block_table=None,
):  # fmt: skip
    """`attend`, with what the backward pass needs saved on ctx."""
    ctx.refusal = None
    if not (is_grad_enabled and (tensors[0].requires_grad or any(x.requires_grad for x in tensors))):
        ctx.refusal = "this call was made with is_grad_enabled=False and saved nothing for a backward pass"
    elif block_table is not None:
        ctx.refusal = "block_table has no backward; gather the pages into packed k and v for training"
    if ctx.refusal is not None:
        return attend(
            packing, tensors, sequences, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            return_softmax, block_table,
        )  # fmt: skip
    sequences, dropout_p, scale, softcap, left, right = _resolve(
        packing, tensors, sequences, dropout_p, softmax_scale, softcap, causal, window_size
    )
    options = (alibi_slopes, dropout_p, scale, softcap)
    out, lse, rng_state = autograd.forward(ctx, packing, tensors, sequences, options, left, right, deterministic)
    if not return_softmax:
        return out
    q, k, _ = autograd.unpack(packing, tensors)
    return _with_probabilities(out, lse, q, k, sequences, rng_state, alibi_slopes, dropout_p, scale, left, right, None)


@once_differentiable
def _backward(ctx, dout, others: int):
    """Gradients of the tensors, packed as they came in, then None for the `others`."""
    if ctx.refusal is not None:
        raise InvalidArgument(ctx.refusal)
    return *autograd.backward(ctx, dout), *(None,) * others


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    """qkv (b, s, 3, h, d)."""

    @staticmethod
    def forward(
        ctx, qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_softmax,
        is_grad_enabled,
    ):  # fmt: skip
        return _forward(
            ctx, "qkv", (qkv,), DENSE, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_softmax, is_grad_enabled,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dout, *_):
        return _backward(ctx, dout, 9)


class FlashAttnVarlenQKVPackedFunc(torch.autograd.Function):
    """qkv (total, 3, h, d)."""

    @staticmethod
    def forward(
        ctx, qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_softmax, is_grad_enabled,
    ):  # fmt: skip
        return _forward(
            ctx, "qkv", (qkv,), (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), dropout_p, softmax_scale, causal,
            window_size, softcap, alibi_slopes, deterministic, return_softmax, is_grad_enabled,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dout, *_):
        return _backward(ctx, dout, 11)


class FlashAttnKVPackedFunc(torch.autograd.Function):
    """q (b, sq, h, d), kv (b, sk, 2, hk, d)."""

    @staticmethod
    def forward(
        ctx, q, kv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, is_grad_enabled,
    ):  # fmt: skip
        return _forward(
            ctx, "q_kv", (q, kv), DENSE, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_softmax, is_grad_enabled,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dout, *_):
        return _backward(ctx, dout, 9)


class FlashAttnVarlenKVPackedFunc(torch.autograd.Function):
    """q (total_q, h, d), kv (total_k, 2, hk, d)."""

    @staticmethod
    def forward(
        ctx, q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_softmax, is_grad_enabled,
    ):  # fmt: skip
        return _forward(
            ctx, "q_kv", (q, kv), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), dropout_p, softmax_scale,
            causal, window_size, softcap, alibi_slopes, deterministic, return_softmax, is_grad_enabled,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dout, *_):
        return _backward(ctx, dout, 13)


class FlashAttnFunc(torch.autograd.Function):
    """q (b, sq, h, d), k and v (b, sk, hk, d)."""

    @staticmethod
    def forward(
        ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, is_grad_enabled,
    ):  # fmt: skip
        return _forward(
            ctx, "q_k_v", (q, k, v), DENSE, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_softmax, is_grad_enabled,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dout, *_):
        return _backward(ctx, dout, 9)


class FlashAttnVarlenFunc(torch.autograd.Function):
    """q (total_q, h, d), k and v (total_k, hk, d), or paged with a block_table."""

    @staticmethod
    def forward(
        ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_softmax, block_table, is_grad_enabled,
    ):  # fmt: skip
        return _forward(
            ctx, "q_k_v", (q, k, v), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), dropout_p,
            softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_softmax, is_grad_enabled,
            block_table,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dout, *_):
        return _backward(ctx, dout, 14)
