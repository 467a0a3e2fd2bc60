"""Portable Triton kernels and the small device functions they share."""

from flash_attn_plus.kernels import keys
from flash_attn_plus.kernels.triton import (
    activation,
    backward,
    cross_entropy,
    dropout,
    forward,
    mask,
    norm,
    rotary,
    score,
    sequence,
    softmax,
)

keys.settle(dropout, mask, score, sequence, softmax, forward, backward, norm, activation, cross_entropy, rotary)
