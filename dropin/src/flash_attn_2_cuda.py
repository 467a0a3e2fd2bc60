"""The extension module's name, which some callers import directly: the raw calls of `flash_attn`."""

from flash_attn._raw import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
