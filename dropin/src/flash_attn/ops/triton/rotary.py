"""Rotary embedding of one tensor, and its Triton kernel (None where Triton is not installed)."""

from flash_attn_plus.fused.device_code import rotary_kernel
from flash_attn_plus.fused.rotary import apply_rotary

__all__ = ["apply_rotary", "rotary_kernel"]
