"""Rotary position embedding: differentiable functions on q, packed qkv and packed kv, and the module with tables."""

import torch
from einops import rearrange, repeat
from torch import nn

from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn_plus.derivatives import once_differentiable


def rotate_half(x, interleaved=False):
    """(x1, x2) -> (-x2, x1) on the halves of the last dimension, or on its even and odd elements."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_emb_torch(x, cos, sin, interleaved=False):
    """The plain PyTorch formula: x (b, s, h, d), cos and sin (s, r / 2) or (b, s, r / 2) with r <= d."""
    rotary_dim = cos.shape[-1] * 2
    assert rotary_dim <= x.shape[-1], "rotary_dim must be at most the head dim"
    pattern = "... d -> ... 1 (d 2)" if interleaved else "... d -> ... 1 (2 d)"
    cos, sin = repeat(cos, pattern), repeat(sin, pattern)
    turned = x[..., :rotary_dim]
    return torch.cat((turned * cos + rotate_half(turned, interleaved) * sin, x[..., rotary_dim:]), dim=-1)


def _writable(gradient):
    """The incoming gradient, or a copy of an expanded one (as that of a sum is), whose elements share memory."""
    return gradient.contiguous() if 0 in gradient.stride() else gradient


class ApplyRotaryEmb(torch.autograd.Function):
    """Rotation of one tensor; in place it also turns the incoming gradient in place."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
        out = apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)
        is_tensor = isinstance(seqlen_offsets, torch.Tensor)
        ctx.save_for_backward(cos, sin, cu_seqlens, seqlen_offsets if is_tensor else None)
        ctx.seqlen_offset = None if is_tensor else seqlen_offsets
        ctx.interleaved, ctx.inplace, ctx.max_seqlen = interleaved, inplace, max_seqlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        cos, sin, cu_seqlens, offsets = ctx.saved_tensors
        offsets = ctx.seqlen_offset if offsets is None else offsets
        dout = _writable(dout) if ctx.inplace else dout
        dx = apply_rotary(
            dout, cos, sin, offsets, cu_seqlens, ctx.max_seqlen, ctx.interleaved, ctx.inplace, conjugate=True
        )
        return dx, None, None, None, None, None, None, None


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    """Turn the first r features of each head by its position's angles; differentiable in x.

    Args:
        x: (b, s, h, d), or (total, h, d) with `cu_seqlens`.
        cos, sin: (S, r / 2) tables.
        interleaved: pair features 2t and 2t + 1 (GPT-J) instead of t and t + r / 2 (GPT-NeoX).
        inplace: write into x, and in the backward pass into the gradient.
        seqlen_offsets: int or (b,) tensor, position of each sequence's first token.
        cu_seqlens, max_seqlen: (b + 1,) int32 starts of packed sequences, and the longest one.

    Returns:
        Like x.
    """
    return ApplyRotaryEmb.apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)


apply_rotary_emb_func = apply_rotary_emb


def _apply_rotary_emb_qkv(
    qkv,
    cos,
    sin,
    cos_k=None,
    sin_k=None,
    interleaved=False,
    inplace=False,
    conjugate=False,
    seqlen_offsets=0,
    num_heads_q=None,
):
    """Turn q and k inside a packed tensor, without autograd; one launch when they lie side by side and share tables."""
    if not inplace:
        qkv = qkv.clone()
    options = {"interleaved": interleaved, "inplace": True, "conjugate": conjugate, "seqlen_offsets": seqlen_offsets}
    if qkv.dim() == 5:
        assert qkv.shape[2] == 3, "qkv must be (b, s, 3, h, d)"
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        heads_qk = 2 * qkv.shape[3]
    else:
        assert qkv.dim() == 4, "qkv must be (b, s, 3, h, d) or (b, s, h + 2 * h_k, d)"
        assert num_heads_q is not None, "num_heads_q must be passed for qkv of shape (b, s, h + 2 * h_k, d)"
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        assert qkv.shape[2] == num_heads_q + 2 * num_heads_k, "qkv must hold as many key heads as value heads"
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]
        heads_qk = num_heads_q + num_heads_k
    if cos_k is None and sin_k is None and qkv.is_contiguous():
        heads = qkv.view(qkv.shape[0], qkv.shape[1], -1, qkv.shape[-1])
        apply_rotary(heads[:, :, :heads_qk], cos, sin, **options)
    else:
        apply_rotary(q, cos, sin, **options)
        apply_rotary(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, **options)
    return qkv


class ApplyRotaryEmbQKV_(torch.autograd.Function):
    """Rotation of q and k inside a packed tensor, in place, and of the incoming gradient, in place too."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None):
        _apply_rotary_emb_qkv(
            qkv, cos, sin, cos_k, sin_k, interleaved, True, seqlen_offsets=seqlen_offsets, num_heads_q=num_heads_q
        )
        is_tensor = isinstance(seqlen_offsets, torch.Tensor)
        ctx.save_for_backward(cos, sin, cos_k, sin_k, seqlen_offsets if is_tensor else None)
        ctx.seqlen_offset = None if is_tensor else seqlen_offsets
        ctx.interleaved, ctx.num_heads_q = interleaved, num_heads_q
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv):
        cos, sin, cos_k, sin_k, offsets = ctx.saved_tensors
        offsets = ctx.seqlen_offset if offsets is None else offsets
        dqkv = _apply_rotary_emb_qkv(
            _writable(dqkv), cos, sin, cos_k, sin_k, ctx.interleaved, True, True, offsets, ctx.num_heads_q
        )
        return dqkv, None, None, None, None, None, None, None


def apply_rotary_emb_qkv_(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None):
    """Turn q and k inside qkv in place; differentiable in qkv, whose gradient is turned in place too.

    Args:
        qkv: (b, s, 3, h, d), or (b, s, h + 2 * h_k, d) with `num_heads_q` = h.
        cos, sin: (S, r / 2) tables of q, and of k unless `cos_k` and `sin_k` are given (xPos).
        seqlen_offsets: int or (b,) tensor.

    Returns:
        qkv.
    """
    return ApplyRotaryEmbQKV_.apply(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q)


class ApplyRotaryEmbKV_(torch.autograd.Function):
    """Rotation of k inside a packed tensor, in place, and of the incoming gradient, in place too."""

    @staticmethod
    def forward(ctx, kv, cos, sin, interleaved=False, seqlen_offsets=0):
        apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        is_tensor = isinstance(seqlen_offsets, torch.Tensor)
        ctx.save_for_backward(cos, sin, seqlen_offsets if is_tensor else None)
        ctx.seqlen_offset = None if is_tensor else seqlen_offsets
        ctx.interleaved = interleaved
        return kv

    @staticmethod
    @once_differentiable
    def backward(ctx, dkv):
        cos, sin, offsets = ctx.saved_tensors
        offsets, dkv = ctx.seqlen_offset if offsets is None else offsets, _writable(dkv)
        apply_rotary(dkv[:, :, 0], cos, sin, offsets, interleaved=ctx.interleaved, inplace=True, conjugate=True)
        return dkv, None, None, None, None


def apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0):
    """Turn k inside kv (b, s, 2, h_k, d) in place; differentiable in kv, whose gradient is turned in place too."""
    return ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)


class RotaryEmbedding(nn.Module):
    """Rotary embedding with cached tables (Su et al., RoFormer, arXiv 2104.09864), in place on what it is given.

    Args:
        dim: features turned of each head.
        base: the slowest pair turns by about 1 / base a token.
        interleaved: pair features 2t and 2t + 1.
        scale_base: with a number (512 is usual), decay with distance as in xPos (Sun et al., arXiv 2212.10554).
        device: of the buffers.
    """

    def __init__(self, dim, base=10000.0, interleaved=False, scale_base=None, device=None):
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.interleaved = interleaved
        self.scale_base = scale_base
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device, dtype=torch.float32) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = None
        self._sin_cached = None
        self._cos_k_cached = None
        self._sin_k_cached = None

    def _compute_inv_freq(self, device=None):
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _is_stale(self, seqlen, device, dtype):
        return (
            seqlen > self._seq_len_cached
            or self._cos_cached is None
            or self._cos_cached.device != device
            or self._cos_cached.dtype != dtype
            # Autograd cannot keep tables made under inference mode, whether in training or for gradients in evaluation.
            or ((self.training or torch.is_grad_enabled()) and self._cos_cached.is_inference())
        )

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        """Make the tables (seqlen, dim / 2) in dtype unless those at hand serve."""
        if not self._is_stale(seqlen, device, dtype):
            return
        self._seq_len_cached = seqlen
        t = torch.arange(seqlen, device=device, dtype=torch.float32)
        # Angles need float32: a module cast to 16 bits has lost its frequencies.
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        angles = torch.outer(t, inv_freq.to(t.device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (t - seqlen // 2) / self.scale_base
        zeta = self.scale.to(device=t.device, dtype=torch.float32) ** rearrange(power, "s -> s 1")
        self._cos_cached, self._sin_cached = (cos * zeta).to(dtype), (sin * zeta).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / zeta).to(dtype), (sin / zeta).to(dtype)

    def forward(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None):
        """Turn q and k in place.

        Args:
            qkv: (b, s, 3, h, d), or (b, s, h + 2 * h_k, d) with `num_heads_q`; with `kv`, q alone (b, s, h, d).
            kv: (b, s, 2, h_k, d).
            seqlen_offset: int or (b,) tensor, position of the first token.
            max_seqlen: rows that the tables need; required once with a tensor offset.

        Returns:
            qkv, or (q, kv).
        """
        seqlen = qkv.shape[1]
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(seqlen + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        assert self._cos_cached is not None, (
            "max_seqlen must be passed once with a tensor of offsets: no tables are made"
        )
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv,
                self._cos_cached,
                self._sin_cached,
                self._cos_k_cached,
                self._sin_k_cached,
                interleaved=self.interleaved,
                seqlen_offsets=seqlen_offset,
                num_heads_q=num_heads_q,
            )
        q = apply_rotary_emb_func(
            qkv,
            self._cos_cached,
            self._sin_cached,
            interleaved=self.interleaved,
            inplace=True,
            seqlen_offsets=seqlen_offset,
        )
        kv = apply_rotary_emb_kv_(
            kv,
            self._cos_cached if self._cos_k_cached is None else self._cos_k_cached,
            self._sin_cached if self._sin_k_cached is None else self._sin_k_cached,
            interleaved=self.interleaved,
            seqlen_offsets=seqlen_offset,
        )
        return q, kv
