"""Portable Triton kernels and the small device functions they share."""

from flash_attn_plus.kernels import keys

keys.settle(__name__)
