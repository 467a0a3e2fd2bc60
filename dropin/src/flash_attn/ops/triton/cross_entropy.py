"""Cross-entropy per row of logits, and its Triton kernels (None where Triton is not installed)."""

from flash_attn_plus.fused.cross_entropy import CrossEntropyFunction as CrossEntropyLoss
from flash_attn_plus.fused.cross_entropy import cross_entropy as cross_entropy_loss
from flash_attn_plus.fused.device_code import cross_entropy_bwd_kernel, cross_entropy_fwd_kernel

__all__ = ["CrossEntropyLoss", "cross_entropy_bwd_kernel", "cross_entropy_fwd_kernel", "cross_entropy_loss"]
