"""Attention without parameters: by the engine and, to compare with, by its formula in PyTorch."""

import math

import torch
from einops import rearrange, repeat
from torch import nn

from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def get_alibi_slopes(nheads):
    """ALiBi's slopes, one a head (Press et al., arXiv 2108.12409).

    A power of two n of heads gets 2 ** (-8 i / n) for i = 1..n; another number the slopes of the power of two below,
    then every second slope of the power of two above.
    """
    below = 2 ** math.floor(math.log2(nheads))
    slopes = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    between = [2 ** (-4 * i / below) for i in range(1, 2 * below, 2)]
    return slopes + between[: nheads - below]


def _check_lengths(name, cu_seqlens, max_seqlen):
    assert cu_seqlens.dtype == torch.int32, f"cu_seqlens{name} must have dtype int32, not {cu_seqlens.dtype}"
    assert max_seqlen is not None, f"cu_seqlens{name} needs max_seqlen{name}"
    assert isinstance(max_seqlen, int), f"max_seqlen{name} must be an int, not {type(max_seqlen).__name__}"


class _FlashAttention(nn.Module):
    """The options that both engine modules share."""

    def __init__(self, causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic):
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def _options(self, causal):
        slopes = self.alibi_slopes
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if slopes is None else slopes.float(),  # a cast module has lost their precision
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_FlashAttention):
    """Attention of packed q, k and v, by the engine.

    Args:
        causal: a query sees keys up to its own position.
        softmax_scale: default head_dim ** -0.5.
        attention_dropout: in training, probability to drop a weight.
        window_size: (left, right) keys visible beside the diagonal; -1 is unbounded.
        alibi_slopes: float (heads,) or (batch, heads).
        deterministic: bitwise repeatable gradients.
    """

    def __init__(
        self, causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1), alibi_slopes=None,
        deterministic=False,
    ):  # fmt: skip
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None):
        """(b, s, 3, h, d) -> (b, s, h, d), or with `cu_seqlens` (total, 3, h, d) -> (total, h, d)."""
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        _check_lengths("", cu_seqlens, max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(_FlashAttention):
    """Attention of q over packed k and v, by the engine; the arguments are those of `FlashSelfAttention`."""

    def __init__(
        self, causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None, window_size=(-1, -1),
        deterministic=False,
    ):  # fmt: skip
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None, max_seqlen_k=None):
        """q (b, sq, h, d), kv (b, sk, 2, hk, d) -> (b, sq, h, d), or all packed with `cu_seqlens`."""
        options = self._options(causal)
        if cu_seqlens is None:
            assert kv.shape[0] == q.shape[0], f"q has batch size {q.shape[0]}, kv {kv.shape[0]}"
            return flash_attn_kvpacked_func(q, kv, **options)
        assert cu_seqlens_k is not None, "cu_seqlens needs cu_seqlens_k"
        _check_lengths("", cu_seqlens, max_seqlen)
        _check_lengths("_k", cu_seqlens_k, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options)


_MASKED = -10000.0  # the score of a key that must not be seen; finite in float16 too


class CrossAttention(nn.Module):
    """Attention of q over packed k and v by its formula in PyTorch; keeps the scores in memory."""

    def __init__(self, causal=False, softmax_scale=None, attention_dropout=0.0):
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def _attend(self, q, kv, causal, key_padding_mask, keys):
        """The diagonal of a causal mask ends at key number `keys`, an int or (b, 1, 1, 1)."""
        if kv.shape[3] != q.shape[2]:
            kv = repeat(kv, "... hk d -> ... (hk g) d", g=q.shape[2] // kv.shape[3])
        k, v = kv.unbind(2)
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.einsum("bthd,bshd->bhts", q, k * scale)
        if key_padding_mask is not None:
            hidden = rearrange(key_padding_mask == 0, "b s -> b 1 1 s")
            scores = scores + scores.new_zeros(hidden.shape).masked_fill(hidden, _MASKED)
        if self.causal if causal is None else causal:
            rows = torch.arange(q.shape[1], device=q.device)[:, None]
            cols = torch.arange(k.shape[1], device=q.device)
            scores = scores.masked_fill(cols > rows + keys - q.shape[1], _MASKED)
        weights = self.drop(torch.softmax(scores, dim=-1, dtype=v.dtype))
        return torch.einsum("bhts,bshd->bthd", weights, v)

    def forward(self, q, kv, causal=None, key_padding_mask=None):
        """q (b, sq, h, d), kv (b, sk, 2, hk, d) -> (b, sq, h, d); key_padding_mask bool or int (b, sk), 1 = keep.

        With a causal mask the last query sees as many keys as key_padding_mask keeps.
        """
        keys = kv.shape[1] if key_padding_mask is None else rearrange((key_padding_mask != 0).sum(-1), "b -> b 1 1 1")
        return self._attend(q, kv, causal, key_padding_mask, keys)


class SelfAttention(CrossAttention):
    """Attention of packed q, k and v by its formula in PyTorch; keeps the scores in memory."""

    def forward(self, qkv, causal=None, key_padding_mask=None):
        """(b, s, 3, h, d) -> (b, s, h, d); key_padding_mask bool or int (b, s), 1 = keep."""
        return self._attend(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask, qkv.shape[1])
