"""FlashAttention-Plus: exact, memory-linear attention in Python, on any device."""

from flash_attn_plus.block_sparse import block_mask_of_lists, block_sparse_attention
from flash_attn_plus.errors import InvalidArgument, NoBackend
from flash_attn_plus.functional import attention, explain
from flash_attn_plus.kvcache import attention_with_kvcache
from flash_attn_plus.problem import AttentionProblem
from flash_attn_plus.selection import use_backend

__version__ = "0.1.0"
__all__ = [
    "AttentionProblem",
    "InvalidArgument",
    "NoBackend",
    "attention",
    "attention_with_kvcache",
    "block_mask_of_lists",
    "block_sparse_attention",
    "explain",
    "use_backend",
]
