"""Attention kernels for NVIDIA Hopper in Gluon, Triton's lower-level language: warp-specialised, TMA-fed."""

from flash_attn_plus.kernels import keys
from flash_attn_plus.kernels.gluon import backward, backward_ends, band, forward, hopper, softmax, tiles

keys.settle(hopper, band, tiles, softmax, forward, backward_ends, backward)
