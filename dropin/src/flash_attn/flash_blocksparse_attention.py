"""Modules over block-sparse attention with a fixed layout of blocks."""

import pkgutil
from collections.abc import Mapping

import torch
from torch import nn

from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_blocksparse_attn_interface import convert_blockmask, flash_blocksparse_attn_func
from flash_attn_plus.errors import InvalidArgument


def _instantiate(sparsity_config):
    """The object that makes the layout: itself, or what a mapping with `_target_`, a dotted name, describes."""
    if isinstance(sparsity_config, Mapping):
        options = dict(sparsity_config)
        target = options.pop("_target_", None)
        is_flat = not any(str(name).startswith("_") or isinstance(x, Mapping) for name, x in options.items())
        if target is None or not is_flat:
            raise InvalidArgument(
                "sparsity_config as a mapping must hold `_target_` and plain arguments; build anything else with"
                " hydra.utils.instantiate and pass the object"
            )
        sparsity_config = pkgutil.resolve_name(target)(**options)
    if not hasattr(sparsity_config, "make_layout"):
        raise InvalidArgument(
            f"sparsity_config must have a method make_layout(max_seq_length), which {sparsity_config!r} has not"
        )
    return sparsity_config


class FlashBlocksparseAttention(nn.Module):
    """Attention over qkv in which the blocks that `sparsity_config` leaves out are hidden.

    Args:
        sparsity_config: has make_layout(max_seq_length) -> 0/1 (max_seq_length / 16, max_seq_length / 256), nonzero
            where 16 queries see 256 keys; or a mapping with its class's dotted name as `_target_` and its arguments.
        softmax_temp: factor on the scores; default head_dim ** -0.5.
        attention_dropout: probability to drop a weight while training.
        max_seq_length: the longest sequence served, rounded up to a multiple of 256.
    """

    def __init__(
        self,
        sparsity_config,
        softmax_temp=None,
        attention_dropout=0.0,
        max_seq_length=2048,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.sparsity_config = _instantiate(sparsity_config)
        self.softmax_temp = softmax_temp
        self.dropout_p = attention_dropout
        length = -(-max_seq_length // 256) * 256
        layout = torch.as_tensor(self.sparsity_config.make_layout(length), device=device)
        if layout.shape != (length // 16, length // 256):
            raise InvalidArgument(
                f"make_layout({length}) must return {(length // 16, length // 256)} blocks of 16 x 256, not"
                f" {tuple(layout.shape)}"
            )
        self.register_buffer("layout", layout)
        self.register_buffer("blockmask_converted", convert_blockmask(layout, causal=False))

    def forward(
        self,
        qkv,
        attn_mask=None,
        key_padding_mask=None,
        causal=False,
        cu_seqlens=None,
        max_s=None,
        need_weights=False,
        convert_mask=True,
    ):
        """(out, None).

        Args:
            qkv: (b, s, 3, heads, head_dim), or packed (total, 3, heads, head_dim) with cu_seqlens and max_s.
            key_padding_mask: bool (b, s), true at tokens, or an object with it as `bool_matrix`; out is 0 elsewhere.
            causal: hide the keys behind each query besides.
            convert_mask: both values give the same; with False the layout converted once is used.

        Raises:
            InvalidArgument: attn_mask or need_weights is asked for, or a shape breaks the contract.
        """
        if attn_mask is not None or need_weights:
            raise InvalidArgument("attn_mask and need_weights are not served; hide blocks by sparsity_config's layout")
        if cu_seqlens is not None:
            if max_s is None or key_padding_mask is not None:
                raise InvalidArgument("cu_seqlens goes with max_s and without key_padding_mask")
            return self._attend(qkv, cu_seqlens, max_s, causal, convert_mask), None
        batch, seqlen = qkv.shape[:2]
        if key_padding_mask is None:
            starts = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=qkv.device)
            out = self._attend(qkv.flatten(0, 1), starts, seqlen, causal, convert_mask)
            return out.unflatten(0, (batch, seqlen)), None
        mask = getattr(key_padding_mask, "bool_matrix", key_padding_mask)
        tokens, indices, starts, longest, _ = unpad_input(qkv, mask)
        out = self._attend(tokens, starts, longest, causal, convert_mask)
        return pad_input(out, indices, batch, seqlen), None

    def _attend(self, qkv, cu_seqlens, max_s, causal, convert_mask):
        return flash_blocksparse_attn_func(
            qkv,
            cu_seqlens,
            self.layout if convert_mask else self.blockmask_converted,
            self.dropout_p if self.training else 0.0,
            max_s,
            softmax_scale=self.softmax_temp,
            causal=causal,
            convert_mask=convert_mask,
        )


class FlashBlocksparseMHA(nn.Module):
    """Multi-head self-attention over `FlashBlocksparseAttention`: x (b, s, embed_dim) -> (the like, None)."""

    def __init__(
        self,
        embed_dim,
        num_heads,
        sparsity_config,
        bias=True,
        batch_first=True,
        attention_dropout=0.0,
        causal=False,
        max_seq_length=2048,
        device=None,
        dtype=None,
        **kwargs,
    ):
        super().__init__()
        if not batch_first or kwargs:
            raise InvalidArgument(f"batch_first must be True, and there is no argument {', '.join(kwargs) or 'more'}")
        if embed_dim % num_heads:
            raise InvalidArgument(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.causal = causal
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn = FlashBlocksparseAttention(
            sparsity_config, None, attention_dropout, max_seq_length, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x, x_ignored_, x_ignored_1_, attn_mask=None, key_padding_mask=None, need_weights=False):
        """(out, None); the second and third argument, there for callers of attention, are x again or None."""
        if any(other is not None and other is not x for other in (x_ignored_, x_ignored_1_)):
            raise InvalidArgument("x_ignored_ and x_ignored_1_ must be x or None: this is self-attention")
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        out, weights = self.inner_attn(qkv, attn_mask, key_padding_mask, self.causal, need_weights=need_weights)
        return self.out_proj(out.flatten(-2)), weights
