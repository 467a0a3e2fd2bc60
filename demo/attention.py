"""The attentions that are compared; each takes and returns (batch, seqlen, heads, head_dim) and is causal."""

from collections.abc import Callable

import torch
from flash_attn import flash_attn_func
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """This project, under the name that existing code imports."""
    return flash_attn_func(q, k, v, causal=True)


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v as the textbook writes it: the whole (seqlen, seqlen) matrix lies in memory."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


CONTENDERS: dict[str, Attention] = {"flash_attn": flash, "standard": standard}
