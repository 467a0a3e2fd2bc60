"""Attention kernels for NVIDIA Hopper in Gluon, Triton's lower-level language: warp-specialised, TMA-fed."""

from flash_attn_plus.kernels import keys

keys.settle(__name__)
