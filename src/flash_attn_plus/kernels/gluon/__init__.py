"""Attention kernels for NVIDIA Hopper in Gluon, Triton's lower-level language: warp-specialised, TMA-fed."""

from flash_attn_plus.kernels import keys
from flash_attn_plus.kernels.gluon import (
    backward,
    backward_dq,
    backward_ends,
    backward_wide,
    backward_work,
    band,
    forward,
    hopper,
    norm,
    query_tiles,
    score,
    softmax,
    tiles,
)

keys.settle(hopper, band, tiles, softmax, score, query_tiles, forward, backward_ends, backward_work)
keys.settle(backward, backward_wide, backward_dq, norm)
