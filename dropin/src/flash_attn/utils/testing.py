"""Reference attention and the inputs of tests, under the names that flash-attn's own tests import."""

import math

import torch
from einops import rearrange, repeat

from flash_attn.bert_padding import pad_input, unpad_input


def generate_random_padding_mask(max_seqlen, batch_size, device, mode="random", zero_lengths=False):
    """Bool (batch_size, max_seqlen), true for the tokens of each sequence.

    Args:
        mode: "full"; "random", up to 20 tokens less; or "third", at least a third of the tokens.
        zero_lengths: the first of every five sequences and the last one are empty.
    """
    assert mode in ("full", "random", "third"), f"mode must be 'full', 'random' or 'third', not {mode!r}"
    shortest = {"full": max_seqlen, "random": max(0 if zero_lengths else 1, max_seqlen - 20), "third": max_seqlen // 3}
    lengths = torch.randint(shortest[mode], max_seqlen + 1, (batch_size, 1), device=device)
    if zero_lengths:
        lengths[::5] = 0
        lengths[-1] = 0
    return torch.arange(max_seqlen, device=device) < lengths


def _unpad(x, padding_mask, unused_mask):
    """(rows, cu_seqlens, max_seqlen, seqused, pack, pad): x without padding, and functions for tensors like it."""
    batch, seqlen = x.shape[:2]
    if padding_mask is None and unused_mask is None:
        cu_seqlens = torch.arange(0, (batch + 1) * seqlen, step=seqlen, dtype=torch.int32, device=x.device)
        return (
            x.flatten(0, 1),
            cu_seqlens,
            seqlen,
            None,
            lambda t: t.flatten(0, 1),
            lambda t: t.unflatten(0, (batch, seqlen)),
        )
    if padding_mask is None:
        padding_mask = torch.ones_like(unused_mask)
    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, padding_mask, unused_mask)
    return (
        rows,
        cu_seqlens,
        max_seqlen,
        seqused,
        lambda t: t.flatten(0, 1)[indices],
        lambda t: pad_input(t, indices, batch, seqlen),
    )


def _leaf(x):
    return x.detach().requires_grad_()


def generate_qkv(
    q, k, v, query_padding_mask=None, key_padding_mask=None, qv=None, kvpacked=False, qkvpacked=False,
    query_unused_mask=None, key_unused_mask=None,
):  # fmt: skip
    """Packed and padded leaves of the same inputs, and functions that pad outputs and gradients again.

    Args:
        q: (b, sq, h, d); k: (b, sk, hk, d); v: (b, sk, hk, dv); qv: (b, sq, h, dv).
        query_padding_mask, key_padding_mask: bool (b, sq) and (b, sk), true for tokens.
        query_unused_mask, key_unused_mask: bool, true for tokens that have room but are not used.

    Returns:
        With `qkvpacked`: qkv_unpad, cu_seqlens_q, max_seqlen_q, qkv, output_pad_fn, dqkv_pad_fn. With `kvpacked`:
        q_unpad, kv_unpad, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, kv, output_pad_fn, dq_pad_fn,
        dkv_pad_fn. Else: q_unpad, k_unpad, v_unpad, qv_unpad, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, q, k, v, qv, output_pad_fn, dq_pad_fn, dk_pad_fn.
    """
    assert not (kvpacked and qkvpacked), "kvpacked and qkvpacked exclude each other"
    batch, _, _, d = q.shape
    assert k.shape == (batch, k.shape[1], k.shape[2], d), "k must have q's batch size and head dim"
    assert v.shape[:3] == k.shape[:3], "v must have k's batch size, length and heads"
    q_unpad, cu_seqlens_q, max_seqlen_q, seqused_q, pack_q, pad_q = _unpad(q, query_padding_mask, query_unused_mask)
    k_unpad, cu_seqlens_k, max_seqlen_k, seqused_k, pack_k, pad_k = _unpad(k, key_padding_mask, key_unused_mask)
    v_unpad = pack_k(v)
    if qkvpacked:
        assert k.shape[1:3] == q.shape[1:3], "qkvpacked needs as many keys and key heads as queries and query heads"
        assert (query_padding_mask is None) == (key_padding_mask is None), "qkvpacked needs equal padding masks"
        assert query_padding_mask is None or torch.equal(query_padding_mask, key_padding_mask), "masks must be equal"
        qkv_unpad, qkv = torch.stack((q_unpad, k_unpad, v_unpad), 1), torch.stack((q, k, v), 2)
        return _leaf(qkv_unpad), cu_seqlens_q, max_seqlen_q, _leaf(qkv), pad_q, pad_q
    if kvpacked:
        kv_unpad, kv = torch.stack((k_unpad, v_unpad), 1), torch.stack((k, v), 2)
        return (
            _leaf(q_unpad), _leaf(kv_unpad), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            _leaf(q), _leaf(kv), pad_q, pad_q, pad_k,
        )  # fmt: skip
    return (
        _leaf(q_unpad), _leaf(k_unpad), _leaf(v_unpad), None if qv is None else pack_q(qv).detach(),
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        _leaf(q), _leaf(k), _leaf(v), None if qv is None else qv.detach(), pad_q, pad_q, pad_k,
    )  # fmt: skip


def _positions(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device):
    """(query's place on the diagonal, key's index, number of keys), broadcastable to (b, 1, sq, sk)."""
    rows = torch.arange(seqlen_q, device=device)[:, None]
    cols = torch.arange(seqlen_k, device=device)
    if key_leftpad is not None:
        first = key_leftpad.view(-1, 1, 1, 1)
        cols = torch.where(cols >= first, cols - first, 2**32)  # padding lies behind every query
    used_k = torch.tensor(seqlen_k, device=device)
    used_k = used_k if key_padding_mask is None else key_padding_mask.sum(-1).view(-1, 1, 1, 1)
    used_q = seqlen_q if query_padding_mask is None else query_padding_mask.sum(-1).view(-1, 1, 1, 1)
    return rows + used_k - used_q, cols, used_k


def construct_local_mask(
    seqlen_q, seqlen_k, window_size=(None, None), sink_token_length=0, query_padding_mask=None,
    key_padding_mask=None, key_leftpad=None, device=None,
):  # fmt: skip
    """Bool, broadcastable to (b, 1, sq, sk), true where attention is forbidden.

    Args:
        window_size: (left, right) keys visible beside the bottom-right diagonal; None is unbounded.
        sink_token_length: this many first keys stay visible whatever the left bound.
    """
    diagonal, cols, used_k = _positions(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device)
    left, right = window_size
    hidden = cols >= used_k if right is None else cols > torch.minimum(diagonal + right, used_k)
    if left is None:
        return hidden
    return hidden | ((cols < diagonal - left) & (cols >= sink_token_length))


def construct_chunk_mask(
    seqlen_q, seqlen_k, attention_chunk, query_padding_mask=None, key_padding_mask=None, key_leftpad=None, device=None
):
    """Bool, broadcastable to (b, 1, sq, sk), true where the key lies outside the query's chunk of keys."""
    diagonal, cols, used_k = _positions(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device)
    first = diagonal - diagonal % attention_chunk
    return (cols < first) | (cols >= first + attention_chunk) | (cols >= used_k)


def _hidden(q, k, query_padding_mask, key_padding_mask, key_leftpad, window_size, attention_chunk, sink_token_length):
    """Bool, broadcastable to (b, h, sq, sk), true where attention is forbidden."""
    options = (query_padding_mask, key_padding_mask, key_leftpad, q.device)
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        hidden = hidden | rearrange(~key_padding_mask, "b s -> b 1 1 s")
    if key_leftpad is not None:
        hidden = hidden | (torch.arange(k.shape[1], device=q.device) < key_leftpad.view(-1, 1, 1, 1))
    if window_size != (None, None):
        hidden = hidden | construct_local_mask(q.shape[1], k.shape[1], window_size, sink_token_length, *options)
    if attention_chunk > 0:
        hidden = hidden | construct_chunk_mask(q.shape[1], k.shape[1], attention_chunk, *options)
    return hidden


def _weights(scores, learnable_sink):
    """Softmax over the last dimension; a sink (h,) takes its part and gives no value."""
    if learnable_sink is None:
        return torch.softmax(scores, dim=-1)
    sink = rearrange(learnable_sink.to(scores.dtype), "h -> h 1 1")
    sink = sink.expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]


def _descaled(x, descale, heads_per_scale):
    if descale is None:
        return x
    return (x.float() * repeat(descale, "b h -> b 1 (h g) 1", g=heads_per_scale)).to(x.dtype)


def attention_ref(
    q, k, v, query_padding_mask=None, key_padding_mask=None, key_leftpad=None, attn_bias=None, dropout_p=0.0,
    dropout_mask=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(None, None), attention_chunk=0, sink_token_length=0, learnable_sink=None, softcap=0.0, upcast=True,
    reorder_ops=False, intermediate_dtype=None,
):  # fmt: skip
    """Attention by its formula, in float32, or with `upcast=False` in the inputs' dtype.

    Args:
        q: (b, sq, h, d); k: (b, sk, hk, d); v: (b, sk, hk, dv); qv: (b, sq, h, dv), whose scores with v are added.
        query_padding_mask, key_padding_mask: bool (b, sq) and (b, sk), true for tokens.
        attn_bias: broadcastable to (b, h, sq, sk).
        dropout_mask: bool (b, h, sq, sk), true where a weight is kept.
        window_size: (left, right); None is unbounded.
        q_descale, k_descale, v_descale: (b, hk) factors.
        learnable_sink: (h,) scores of a key without a value.
        reorder_ops: scale k instead of q.
        intermediate_dtype: of the attention weights that meet v.

    Returns:
        out (b, sq, h, dv) and attention (b, h, sq, sk), both in the inputs' dtype.
    """
    dtype = q.dtype
    groups = q.shape[2] // k.shape[2]
    q, k, v = _descaled(q, q_descale, groups), _descaled(k, k_descale, 1), _descaled(v, v_descale, 1)
    if upcast:
        q, k, v, qv = (None if x is None else x.float() for x in (q, k, v, qv))
    k, v = (repeat(x, "b s h d -> b s (h g) d", g=groups) for x in (k, v))
    scale = 1.0 / math.sqrt(q.shape[-1] + (0 if qv is None else qv.shape[-1]))
    q, k = (q, k * scale) if reorder_ops else (q * scale, k)
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    if qv is not None:
        scores = scores + torch.einsum("bthd,bshd->bhts", qv * scale, v)
    if softcap > 0.0:
        scores = torch.tanh(scores / softcap) * softcap
    window = (window_size[0], 0) if causal else tuple(window_size)
    hidden = _hidden(
        q, k, query_padding_mask, key_padding_mask, key_leftpad, window, attention_chunk, sink_token_length
    )
    scores = scores.masked_fill(hidden, float("-inf"))
    if attn_bias is not None:
        scores = scores + attn_bias
    # Rows without keys have weights 0 / 0.
    attention = _weights(scores, learnable_sink).to(v.dtype).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    if query_padding_mask is not None:
        attention = attention.masked_fill(rearrange(~query_padding_mask, "b s -> b 1 s 1"), 0.0)
    kept = attention if dropout_mask is None else attention.masked_fill(~dropout_mask, 0.0)
    if intermediate_dtype is not None:
        kept = kept.to(intermediate_dtype).to(kept.dtype)
    out = torch.einsum("bhts,bshd->bthd", kept, v / (1.0 - dropout_p))
    if query_padding_mask is not None:
        out = out.masked_fill(rearrange(~query_padding_mask, "b s -> b s 1 1"), 0.0)
    return out.to(dtype), attention.to(dtype)
