"""Causal attention in (b, h, s, d) layout, as attention tutorials write it."""

import torch.nn.functional as F


def attention(q, k, v, sm_scale):
    """softmax(sm_scale * q k^T, causal) v of q, k, v (b, h, s, d), by PyTorch's attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=sm_scale)
