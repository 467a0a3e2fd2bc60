"""The interface of flash-attn 2.8.3 over FlashAttention-Plus."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # another distribution may own flash_attn.cute

from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn_plus import __version__ as __plus_version__

__version__ = "2.8.3"
__all__ = [
    "__plus_version__",
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
