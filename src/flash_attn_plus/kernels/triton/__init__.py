"""Portable Triton kernels and the small device functions they share."""

from flash_attn_plus.kernels import keys
from flash_attn_plus.kernels.triton import (
    activation,
    backward,
    block_lists,
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

keys.settle(dropout, mask, score, sequence, softmax, block_lists, forward, backward)
keys.settle(norm, activation, cross_entropy, rotary)
