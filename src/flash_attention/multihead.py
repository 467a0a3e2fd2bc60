"""Multi-head attention with its projections, rotary embedding and key/value cache."""

from typing import Any

import torch
from torch import Tensor, nn

from flash_attention.cache import KeyValueCache
from flash_attention.conversion import from_torch, to_torch
from flash_attention.modules import FlashAttention
from flash_attention.padding import check_mask
from flash_attention.ragged import Ragged, Sequences, hand_back, is_ragged, lay_out
from flash_attention.rotary import rotary_tables, rotate
from flash_attn_plus import InvalidArgument
from flash_attn_plus.fused.rotary import MAX_HEAD_DIM


class MultiHeadFlashAttention(nn.Module):
    """Self- or cross-attention of (b, s, d_model) features, or of sequences of different lengths.

    Parameters are those of the linear layers `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    Args:
        d_model: features of a token, a multiple of num_heads.
        num_kv_heads: heads of keys and values, a divisor of num_heads; default num_heads.
        causal: a token sees no later one.
        dropout: in training, the probability to drop an attention weight.
        bias: whether the linear layers have one.
        d_context: features of a token of `context`; default d_model.
        rotary_dim: how many features of each head turn with the token's position; even, at most d_model // num_heads.
        rotary_base: angles are position * rotary_base ** (-2 t / rotary_dim).
        rotary_interleaved: pair features 2t and 2t + 1 instead of t and t + rotary_dim / 2.
        softmax_scale, window_size, softcap, alibi_slopes, deterministic: see `flash_attention`.

    Raises:
        InvalidArgument: sizes do not divide one another, or an option is out of range.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        d_context: int | None = None,
        rotary_dim: int = 0,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or d_model % num_heads:
            raise InvalidArgument(f"num_heads must be a divisor of d_model {d_model}, not {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise InvalidArgument(f"num_kv_heads must be a divisor of num_heads {num_heads}, not {num_kv_heads}")
        self.d_model, self.d_context = d_model, d_model if d_context is None else d_context
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        if rotary_dim % 2 or not 0 <= rotary_dim <= self.head_dim:
            raise InvalidArgument(f"rotary_dim must be even and at most the head dim {self.head_dim}, not {rotary_dim}")
        if rotary_dim and self.head_dim > MAX_HEAD_DIM:
            raise InvalidArgument(f"rotary_dim must be 0 for head dims above {MAX_HEAD_DIM}, here {self.head_dim}")
        self.rotary_dim, self.rotary_base, self.rotary_interleaved = rotary_dim, rotary_base, rotary_interleaved
        linear: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(d_model, d_model, **linear)
        self.k_proj = nn.Linear(self.d_context, num_kv_heads * self.head_dim, **linear)
        self.v_proj = nn.Linear(self.d_context, num_kv_heads * self.head_dim, **linear)
        self.out_proj = nn.Linear(d_model, d_model, **linear)
        self.attention = FlashAttention(
            causal, softmax_scale, dropout, window_size, softcap, alibi_slopes, deterministic
        )

    def make_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> KeyValueCache:
        """An empty cache on the weights' device; `dtype` defaults to autocast's where that is on, else the weights'."""
        weight = self.k_proj.weight
        device = weight.device
        if dtype is None:
            is_cast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if is_cast else weight.dtype
        return KeyValueCache(batch_size, max_seqlen, self.num_kv_heads, self.head_dim, dtype, device)

    def forward(
        self,
        x: Tensor | Sequences,
        context: Tensor | Sequences | None = None,
        key_padding_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Any:
        """Attention of each token of x to the tokens of x, or of `context`.

        Args:
            x: (b, s, d_model); or a list of (s_i, d_model), or a nested (jagged) tensor (b, *, d_model), for which no
                padding is computed.
            context: (b, sk, d_context) or sequences, whose tokens are attended instead of x's.
            key_padding_mask: bool (b, s), or (b, sk) with a context: True where a token takes part, False where it is
                padding (the opposite of torch.nn.MultiheadAttention's). Rotary positions count the tokens that take
                part; `flash_attention` tells the rest.
            cache: from `make_cache`. x are the next tokens of each sequence; they see all that came before, and are
                added to it. With a mask the padding, wherever it is, is not added. Needs causal=True, self-attention
                and torch.no_grad() or inference_mode().

        Returns:
            Like x; in the rows of padding of a causal module, or of one with a cache, what `out_proj` makes of 0.

        Raises:
            InvalidArgument: sizes or options disagree; the message names the argument.
        """
        source = x if context is None else context
        self._check(x, source, context, cache)
        if is_ragged(x):
            return self._forward_ragged(x, source, key_padding_mask)
        if key_padding_mask is not None:
            check_mask(key_padding_mask, (source.shape[0], source.shape[1]), source.device)
        if cache is not None:
            return self.out_proj(self._extend(x, key_padding_mask, cache))
        positions = None
        if self.rotary_dim:
            if key_padding_mask is None:
                positions = torch.arange(x.shape[1], device=x.device)
            else:
                positions = key_padding_mask.cumsum(1) - 1
        q, k, v = self._project(x, source, positions)
        out = self.attention(*(t.transpose(1, 2) for t in (q, k, v)), key_padding_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _check(self, x, source, context, cache: KeyValueCache | None) -> None:
        if context is not None and self.rotary_dim:
            raise InvalidArgument("context has positions of its own; use it with rotary_dim=0")
        if is_ragged(x) != is_ragged(source):
            raise InvalidArgument("context must be a list or nested tensor exactly when x is one")
        if not is_ragged(x):
            for name, t, features in (("x", x, self.d_model), ("context", source, self.d_context)):
                if t.ndim != 3 or t.shape[-1] != features:
                    raise InvalidArgument(f"{name} must have shape (batch, seqlen, {features}), not {tuple(t.shape)}")
        if cache is None:
            return
        if is_ragged(x) or context is not None:
            raise InvalidArgument("cache is for self-attention of one tensor; pass padded x with key_padding_mask")
        if not self.attention.causal:
            raise InvalidArgument("cache needs causal=True: earlier tokens cannot see the new ones any more")
        if torch.is_grad_enabled() and (x.requires_grad or self.k_proj.weight.requires_grad):
            raise InvalidArgument("cache has no backward; call under torch.no_grad() or torch.inference_mode()")
        if self.training and self.attention.dropout > 0.0:
            raise InvalidArgument("cache has no dropout; call .eval() on the module before it generates")
        cache.check_room(*x.shape[:2])

    def _project(self, x: Tensor, source: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., h, d), k and v (..., hk, d), turned by the angles of their positions."""
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if positions is not None:
            cos, sin = rotary_tables(positions, self.rotary_dim, self.rotary_base, q.dtype)
            q, k = (rotate(t, cos, sin, self.rotary_interleaved) for t in (q, k))
        return q, k, v

    def _forward_ragged(self, x: Sequences, source: Sequences, key_padding_mask: Tensor | None) -> Sequences:
        queries = lay_out("x", x, 0, 2)
        keys = queries if source is x else lay_out("context", source, 0, 2)
        q, k, v = self._project(queries.rows, keys.rows, queries.positions() if self.rotary_dim else None)
        laid = (queries.with_rows(q), keys.with_rows(k), keys.with_rows(v))
        out: Ragged = self.attention(*laid, key_padding_mask)
        return hand_back(self.out_proj(out.rows.flatten(1)), x, 0)

    def _extend(self, x: Tensor, keep: Tensor | None, cache: KeyValueCache) -> Tensor:
        """Attention (b, s, h * d) of the tokens that follow the cache's, which they join."""
        taken: Tensor | int = x.shape[1]
        order = None
        if keep is not None:  # padding goes behind the tokens, where nothing sees it and the next call writes over it
            order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
            taken = keep.sum(1, dtype=torch.int32)
            x = x.take_along_dim(order[..., None], 1)
        q, k, v = self._project(x, x, cache.positions(x.shape[1]) if self.rotary_dim else None)
        inner = self.attention
        out = cache.attend(
            q, k, v, taken, softmax_scale=inner.softmax_scale, window_size=inner.window_size, softcap=inner.softcap,
            alibi_slopes=inner.alibi_slopes,
        ).flatten(2)  # fmt: skip
        if order is None:
            return out
        return out.take_along_dim(order.argsort(1)[..., None], 1).masked_fill(~keep[..., None], 0.0)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, causal: bool = False) -> "MultiHeadFlashAttention":
        """The same function as a `torch.nn.MultiheadAttention`, with copies of its weights, for batch-first input.

        Masks mean the opposite: that module's key_padding_mask is True where a token is ignored.

        Raises:
            InvalidArgument: the module has add_bias_kv, add_zero_attn, or different kdim and vdim.
        """
        return from_torch(cls, module, causal)

    def to_torch(self) -> nn.MultiheadAttention:
        """A batch-first `torch.nn.MultiheadAttention` with copies of the weights; shared key heads are repeated.

        It has no causal option: a causal module's equal is it, called with a causal attn_mask.

        Raises:
            InvalidArgument: rotary embedding, a window, softcap, ALiBi or another softmax_scale, which it cannot do.
        """
        return to_torch(self)
