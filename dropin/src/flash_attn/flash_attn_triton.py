"""Attention with an additive bias: (b, s, h, d) layout, causal masks aligned to the top left corner."""

import torch
import torch.nn.functional as F


def _attention(q, k, v, bias, causal, softmax_scale):
    """PyTorch's attention; its causal mask is top-left aligned. A bias gets no gradient."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is not None:
        bias = bias.detach().to(q.dtype)
        if causal:
            visible = q.new_ones((q.shape[2], k.shape[2]), dtype=torch.bool).tril()
            bias = bias.masked_fill(~visible, float("-inf"))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal and bias is None, scale=softmax_scale
    )
    return out.transpose(1, 2)


def flash_attn_func(q, k, v, bias=None, causal=False, softmax_scale=None):
    """Attention of q (b, sq, h, d) over k, v (b, sk, h, d).

    Args:
        bias: added to the scaled scores, broadcastable to (b, h, sq, sk); has no gradient.
        causal: query i sees keys up to i, counted from the first key.
        softmax_scale: default d ** -0.5.

    Returns:
        (b, sq, h, d).
    """
    return _attention(q, k, v, bias, causal, softmax_scale)


def flash_attn_kvpacked_func(q, kv, bias=None, causal=False, softmax_scale=None):
    """`flash_attn_func` with kv (b, sk, 2, h, d)."""
    return _attention(q, *kv.unbind(2), bias, causal, softmax_scale)


def flash_attn_qkvpacked_func(qkv, bias=None, causal=False, softmax_scale=None):
    """`flash_attn_func` with qkv (b, s, 3, h, d)."""
    return _attention(*qkv.unbind(2), bias, causal, softmax_scale)
