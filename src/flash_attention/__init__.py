"""Attention for (batch, heads, seqlen, head_dim): modules and a function over the `flash_attn_plus` engine."""

from flash_attention.cache import KeyValueCache
from flash_attention.functional import flash_attention
from flash_attention.maps import attention_map, attention_rows, collect_attention_maps, plot_attention_map
from flash_attention.modules import FlashAttention
from flash_attention.multihead import MultiHeadFlashAttention
from flash_attn_plus import __version__

__all__ = [
    "FlashAttention",
    "KeyValueCache",
    "MultiHeadFlashAttention",
    "__version__",
    "attention_map",
    "attention_rows",
    "collect_attention_maps",
    "flash_attention",
    "plot_attention_map",
]
