"""The raw calls of `flash_attn`, which the original gives an AMD device through this module."""

from flash_attn._raw import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
