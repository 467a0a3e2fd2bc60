"""Multi-head attention with its projections, rotary embedding and key/value cache, serial and tensor-parallel."""

from functools import partial

import torch
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules._attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedDense, RowParallelLinear
from flash_attn.utils.distributed import get_dim_for_local_rank

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "LinearResidual",
    "ParallelMHA",
    "SelfAttention",
    "_update_kv_cache",
    "get_alibi_slopes",
]


class LinearResidual(nn.Linear):
    """nn.Linear that returns its input too."""

    def forward(self, input):
        """(out, input)."""
        return super().forward(input), input


def _update_kv_cache(kv, inference_params, layer_idx):
    """Write kv (b, s, 2, hk, d) behind what a layer's cache holds, and return all of it up to there.

    The cache, (max_batch_size, max_seqlen, 2, hk, d), is allocated on first use.
    """
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        shape = (inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:])
        caches[layer_idx] = torch.empty(shape, dtype=kv.dtype, device=kv.device)
    cache = caches[layer_idx]
    first, start = inference_params.batch_size_offset, inference_params.seqlen_offset
    last, end = first + kv.shape[0], start + kv.shape[1]
    assert last <= cache.shape[0], (
        f"the cache has room for {cache.shape[0]} sequences, not {last}: raise max_batch_size"
    )
    assert end <= cache.shape[1], f"the cache holds {cache.shape[1]} keys, not {end}: raise max_seqlen"
    cache[first:last, start:end] = kv
    return cache[first:last, :end]


def _lengths(inference_params, batch):
    """Keys already in the cache: int32 (b,) where each sequence has its own number, else an int."""
    lengths = inference_params.lengths_per_sample
    if lengths is None:
        return inference_params.seqlen_offset
    first = inference_params.batch_size_offset
    return lengths[first : first + batch]


class _CachedAttention(nn.Module):
    """What MHA and ParallelMHA share: attention between their projections.

    Uses `num_heads_q` and `num_heads_k` (on this rank), `head_dim`, `layer_idx`, `use_flash_attn`, `checkpointing`,
    `rotary_emb_dim`, and the modules `rotary_emb`, `inner_attn` and `inner_cross_attn`.
    """

    def _add_attention(
        self, softmax_scale, causal, dropout, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved,
        alibi_slopes, window_size, device,
    ):  # fmt: skip
        if self.rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                self.rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        self_cls, cross_cls = SelfAttention, CrossAttention
        if self.use_flash_attn:
            self_cls = partial(FlashSelfAttention, alibi_slopes=alibi_slopes, window_size=window_size)
            cross_cls = partial(FlashCrossAttention, alibi_slopes=alibi_slopes, window_size=window_size)
        self.inner_attn = self_cls(causal=causal, softmax_scale=softmax_scale, attention_dropout=dropout)
        self.inner_cross_attn = cross_cls(causal=causal, softmax_scale=softmax_scale, attention_dropout=dropout)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
        """An uninitialised cache (batch_size, max_seqlen, 2, hk, d), in the dtype of the weights by default."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_k, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def _rotate(self, qkv, inference_params, max_seqlen):
        """qkv (b, s, h + 2 hk, d) with q and k turned, in place, by their positions' angles."""
        offset = 0
        if inference_params is not None:
            offset, max_seqlen = _lengths(inference_params, qkv.shape[0]), inference_params.max_seqlen
        return self.rotary_emb(qkv, seqlen_offset=offset, max_seqlen=max_seqlen, num_heads_q=self.num_heads_q)

    def _split(self, qkv):
        """qkv (..., h + 2 hk, d) as q (..., h, d) and kv (..., 2, hk, d)."""
        q, kv = qkv.split((self.num_heads_q, 2 * self.num_heads_k), dim=-2)
        return q, kv.unflatten(-2, (2, self.num_heads_k))

    def _has_fused_rotary(self):
        """Whether `flash_attn_with_kvcache` can turn q and k: not with the two pairs of tables of xPos."""
        return self.rotary_emb_dim > 0 and self.rotary_emb_dim % 16 == 0 and self.rotary_emb.scale is None

    def _decode(self, q, kv, inference_params):
        """Append kv to the cache and attend to it, all in one call that a CUDA graph can hold."""
        first, batch = inference_params.batch_size_offset, q.shape[0]
        cache = inference_params.key_value_memory_dict[self.layer_idx][first : first + batch]
        rotary = {}
        if self._has_fused_rotary():
            self.rotary_emb._update_cos_sin_cache(cache.shape[1], device=q.device, dtype=q.dtype)
            rotary = {
                "rotary_cos": self.rotary_emb._cos_cached,
                "rotary_sin": self.rotary_emb._sin_cached,
                "rotary_interleaved": self.rotary_emb.interleaved,
            }
        inner = self.inner_cross_attn
        return flash_attn_with_kvcache(
            q,
            *cache.unbind(2),
            *kv.unbind(2),
            cache_seqlens=_lengths(inference_params, batch),
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=None if inner.alibi_slopes is None else inner.alibi_slopes.float(),
            **rotary,
        )

    def _generate(self, qkv, inference_params):
        """Attention over the cache after the new keys and values have been written behind what it holds."""
        assert self.layer_idx is not None, "generation needs layer_idx in the constructor"
        is_first = inference_params.seqlen_offset == 0
        is_fused = self.use_flash_attn and not is_first
        assert is_first or is_fused or inference_params.lengths_per_sample is None, (
            "lengths_per_sample needs use_flash_attn=True"
        )
        if self.rotary_emb_dim > 0 and not (is_fused and self._has_fused_rotary()):
            qkv = self._rotate(qkv, inference_params, None)
        q, kv = self._split(qkv)
        if is_fused:
            return self._decode(q, kv, inference_params)
        return self.inner_cross_attn(q, _update_kv_cache(kv, inference_params, self.layer_idx))

    def _run(self, attention, *tensors, **kwargs):
        if self.checkpointing:
            return checkpoint(attention, *tensors, use_reentrant=False, **kwargs)
        return attention(*tensors, **kwargs)

    def _attend(self, qkv, inference_params, max_seqlen, kwargs):
        """(..., (h + 2 hk) d) projected features -> (..., h, d)."""
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        if inference_params is not None:
            return self._generate(qkv, inference_params)
        if self.rotary_emb_dim > 0:
            qkv = self._rotate(qkv, None, max_seqlen)
        if self.num_heads_q == self.num_heads_k:
            return self._run(self.inner_attn, qkv.unflatten(-2, (3, -1)), **kwargs)
        if kwargs.get("key_padding_mask") is not None:  # behind which a cross-attention would end its diagonal
            q, kv = self._split(qkv)
            kv = kv.repeat_interleave(self.num_heads_q // self.num_heads_k, dim=-2)
            return self._run(self.inner_attn, torch.cat((q.unsqueeze(-3), kv), dim=-3), **kwargs)
        if kwargs.get("cu_seqlens") is not None:  # keys are those of the queries
            kwargs = {"cu_seqlens_k": kwargs["cu_seqlens"], "max_seqlen_k": kwargs["max_seqlen"], **kwargs}
        return self._run(self.inner_cross_attn, *self._split(qkv), **kwargs)


def _check_heads(embed_dim, num_heads, num_heads_kv):
    assert num_heads % num_heads_kv == 0, f"num_heads ({num_heads}) must be divisible by num_heads_kv ({num_heads_kv})"
    assert embed_dim % num_heads == 0, f"embed_dim ({embed_dim}) must be divisible by num_heads ({num_heads})"


def _check_flash_only(use_flash_attn, use_alibi, window_size):
    assert use_flash_attn or not use_alibi, "use_alibi needs use_flash_attn=True"
    assert use_flash_attn or tuple(window_size) == (-1, -1), "window_size needs use_flash_attn=True"


class MHA(_CachedAttention):
    """Multi-head self-attention, or cross-attention with `cross_attn`.

    Parameters are `Wqkv`, its rows all query heads, then key heads, then value heads (or `Wq` and `Wkv` for
    cross-attention), and `out_proj`.

    Args:
        num_heads_kv: key and value heads, a divisor of num_heads; default num_heads.
        dropout: in training, probability to drop an attention weight.
        softmax_scale: default head_dim ** -0.5.
        layer_idx: key of this layer's cache during generation.
        dwconv: a causal depthwise convolution over three tokens behind the input projections.
        rotary_emb_dim: features of each head that turn; rotary_emb_scale_base makes it xPos.
        use_alibi, window_size: need use_flash_attn.
        fused_bias_fc: use FusedDense.
        use_flash_attn: attention by the engine instead of its formula in PyTorch.
        return_residual: return the input too.
        checkpointing: recompute attention in the backward pass.
    """

    def __init__(
        self, embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True,
        dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0,
        rotary_emb_base=10000.0, rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False,
        window_size=(-1, -1), fused_bias_fc=False, use_flash_attn=False, return_residual=False, checkpointing=False,
        device=None, dtype=None,
    ):  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        self.embed_dim = embed_dim
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.dwconv = dwconv
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        self.num_heads = self.num_heads_q = num_heads
        self.num_heads_kv = self.num_heads_k = num_heads_kv if num_heads_kv is not None else num_heads
        _check_heads(embed_dim, num_heads, self.num_heads_kv)
        _check_flash_only(use_flash_attn, use_alibi, window_size)
        assert not (cross_attn and rotary_emb_dim > 0), "rotary embedding and cross_attn exclude each other"
        self.head_dim = embed_dim // num_heads
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        self._add_projections(qkv_proj_bias, out_proj_bias, fused_bias_fc, factory)
        self._add_attention(
            softmax_scale, causal, dropout, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, slopes,
            window_size, device,
        )  # fmt: skip

    def _add_projections(self, qkv_proj_bias, out_proj_bias, fused_bias_fc, factory):
        linear_cls = residual_cls = FusedDense if fused_bias_fc else nn.Linear
        if self.return_residual:
            residual_cls = partial(FusedDense, return_residual=True) if fused_bias_fc else LinearResidual
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        convolved = {}
        if self.cross_attn:
            self.Wq = linear_cls(self.embed_dim, self.embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = residual_cls(self.embed_dim, kv_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = residual_cls(self.embed_dim, self.embed_dim + kv_dim, bias=qkv_proj_bias, **factory)
        if self.dwconv and not self.cross_attn and self.num_heads == self.num_heads_kv:
            convolved = {"dwconv_qkv": self.embed_dim + kv_dim}
        elif self.dwconv:
            convolved = {"dwconv_q": self.embed_dim, "dwconv_kv": kv_dim}
        for name, dim in convolved.items():
            self.add_module(name, nn.Conv1d(dim, dim, kernel_size=3, padding=2, groups=dim, **factory))
        self.out_proj = linear_cls(self.embed_dim, self.embed_dim, bias=out_proj_bias, **factory)

    def _check_call(self, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, x_kv, inference_params):
        if cu_seqlens is not None:
            assert max_seqlen is not None, "cu_seqlens needs max_seqlen"
            assert key_padding_mask is None, "cu_seqlens and key_padding_mask exclude each other"
            assert self.use_flash_attn, "cu_seqlens needs use_flash_attn=True"
            assert not self.dwconv, "cu_seqlens and dwconv exclude each other"
            assert self.rotary_emb_dim == 0, "cu_seqlens and rotary embedding exclude each other"
        if key_padding_mask is not None:
            assert max_seqlen is None, "key_padding_mask and max_seqlen exclude each other"
            assert not self.use_flash_attn, "key_padding_mask needs use_flash_attn=False; remove the padding instead"
        if inference_params is not None:
            assert key_padding_mask is None, "generation takes no key_padding_mask"
            assert cu_seqlens is None, "generation takes no cu_seqlens"
            assert max_seqlen is None, "generation takes no max_seqlen"
            assert not self.dwconv, "generation and dwconv exclude each other"
            assert not self.cross_attn, "generation and cross_attn exclude each other"
        if not self.cross_attn:
            assert x_kv is None, "x_kv needs cross_attn=True"
            assert mixer_subset is None, "mixer_subset needs cross_attn=True"

    def _convolve(self, name, x):
        """x (b, s, dim), each token with the two before it."""
        conv = getattr(self, name)
        return rearrange(conv(rearrange(x, "b s d -> b d s"))[..., :-2], "b d s -> b s d").contiguous()

    def _cross(self, x, x_kv, mixer_subset, kwargs):
        """(x as the residual, attention's result)."""
        kv = self.Wkv(x if x_kv is None else x_kv)
        if self.return_residual:
            kv, source = kv
            x, x_kv = (source, None) if x_kv is None else (x, source)
        q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
        if self.dwconv:
            q, kv = self._convolve("dwconv_q", q), self._convolve("dwconv_kv", kv)
        q = rearrange(q, "... (h d) -> ... h d", d=self.head_dim)
        kv = rearrange(kv, "... (two h d) -> ... two h d", two=2, d=self.head_dim)
        return x, self._run(self.inner_cross_attn, q, kv, **kwargs)

    def forward(
        self, x, x_kv=None, key_padding_mask=None, cu_seqlens=None, max_seqlen=None, mixer_subset=None,
        inference_params=None, **kwargs,
    ):  # fmt: skip
        """Attention of x over itself, or over x_kv.

        Args:
            x: (b, s, embed_dim), or with `cu_seqlens` (total, embed_dim).
            x_kv: source of keys and values for cross-attention; default x.
            key_padding_mask: bool (b, s), true = keep; only without flash attention.
            cu_seqlens, max_seqlen: int32 (b + 1,) starts of packed sequences, and the longest one.
            mixer_subset: index of the positions of x that ask; only for cross-attention.
            inference_params: an InferenceParams, whose cache is read and written.
            kwargs: for the inner attention, such as cu_seqlens_k and max_seqlen_k.

        Returns:
            Like x, or (that, x) with `return_residual`.
        """
        self._check_call(key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, x_kv, inference_params)
        if self.use_flash_attn:
            kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        else:
            kwargs = {"key_padding_mask": key_padding_mask, **kwargs}
        if self.cross_attn:
            x, context = self._cross(x, x_kv, mixer_subset, kwargs)
        else:
            qkv = self.Wqkv(x)
            if self.return_residual:
                qkv, x = qkv
            if self.dwconv and self.num_heads == self.num_heads_kv:
                qkv = self._convolve("dwconv_qkv", qkv)
            elif self.dwconv:
                q, kv = qkv.split((self.embed_dim, qkv.shape[-1] - self.embed_dim), dim=-1)
                qkv = torch.cat((self._convolve("dwconv_q", q), self._convolve("dwconv_kv", kv)), dim=-1)
            context = self._attend(qkv, inference_params, max_seqlen, kwargs)
        out = self.out_proj(rearrange(context, "... h d -> ... (h d)"))
        return (out, x) if self.return_residual else out


class ParallelMHA(_CachedAttention):
    """`MHA` for self-attention with its heads spread over the ranks of a process group, evenly or not.

    `Wqkv` is column-parallel and `out_proj` row-parallel, in units of a key head with its query heads.

    Raises:
        ValueError: there are fewer key/value heads than ranks.
    """

    def __init__(
        self, embed_dim, num_heads, process_group, num_heads_kv=None, qkv_proj_bias=True, out_proj_bias=True,
        dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, rotary_emb_dim=0, rotary_emb_base=10000.0,
        rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False, window_size=(-1, -1),
        use_flash_attn=False, checkpointing=False, sequence_parallel=True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.embed_dim = embed_dim
        self.causal = causal
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing
        self.process_group = process_group
        self.world_size = process_group.size()
        self.local_rank = process_group.rank()
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv if num_heads_kv is not None else num_heads
        _check_heads(embed_dim, num_heads, self.num_heads_kv)
        _check_flash_only(use_flash_attn, use_alibi, window_size)
        if self.num_heads_kv < self.world_size:
            raise ValueError(f"{self.num_heads_kv} key/value heads cannot be spread over {self.world_size} ranks")
        self.head_dim = embed_dim // num_heads
        group = num_heads // self.num_heads_kv
        shares = [get_dim_for_local_rank(self.num_heads_kv, self.world_size, r) for r in range(self.world_size)]
        self.num_heads_kv_per_rank = self.num_heads_k = shares[self.local_rank]
        self.num_heads_per_rank = self.num_heads_q = group * self.num_heads_k
        slopes = None
        if use_alibi:
            first = group * sum(shares[: self.local_rank])
            slopes = torch.tensor(get_alibi_slopes(num_heads)[first : first + self.num_heads_q], device=device)
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.Wqkv = ColumnParallelLinear(
            embed_dim, self.head_dim * (num_heads + 2 * self.num_heads_kv), process_group, bias=qkv_proj_bias,
            multiple_of=self.head_dim * (group + 2), **options,
        )  # fmt: skip
        self.out_proj = RowParallelLinear(
            embed_dim, embed_dim, process_group, bias=out_proj_bias, multiple_of=self.head_dim * group, **options
        )
        self._add_attention(
            softmax_scale, causal, dropout, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, slopes,
            window_size, device,
        )  # fmt: skip

    def forward(self, x, seqlen=None, inference_params=None, **kwargs):
        """Attention of x over itself.

        Args:
            x: (b, s, embed_dim), or with `seqlen` (b * s, embed_dim), of which a sequence-parallel rank holds a share.
            seqlen: s.
            inference_params: an InferenceParams, whose cache is read and written.
            kwargs: for the inner attention.

        Returns:
            Like x.
        """
        qkv = self.Wqkv(x)
        if seqlen is not None:
            qkv = rearrange(qkv, "(b s) ... -> b s ...", s=seqlen)
        context = rearrange(self._attend(qkv, inference_params, None, kwargs), "b s h d -> b s (h d)")
        if seqlen is not None:
            context = rearrange(context, "b s d -> (b s) d")
        return self.out_proj(context)
