"""Portable Triton kernels and the small device functions they share."""

from flash_attn_plus.kernels import keys
from flash_attn_plus.kernels.triton import (
    activation,
    backward,
    block_lists,
    cache_append,
    cross_entropy,
    decode,
    dropout,
    forward,
    mask,
    norm,
    norm_long,
    rotary,
    score,
    sequence,
    softmax,
    splits,
)

keys.settle(dropout, mask, score, sequence, softmax, block_lists, forward, backward, splits, decode)
keys.settle(norm, norm_long, activation, cross_entropy, rotary, cache_append)
