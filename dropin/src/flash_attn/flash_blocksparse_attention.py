"""Modules over block-sparse attention, which is refused; see `flash_blocksparse_attn_interface`."""

from torch import nn

from flash_attn.flash_blocksparse_attn_interface import _REPLACEMENT


class FlashBlocksparseAttention(nn.Module):
    """Refused when constructed; the message names what to use."""

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
        raise NotImplementedError(_REPLACEMENT)


class FlashBlocksparseMHA(nn.Module):
    """Refused when constructed; the message names what to use."""

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
        raise NotImplementedError(_REPLACEMENT)
