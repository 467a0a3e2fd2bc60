"""Small bundles of scalars that travel together through the device functions of one call."""

from typing import NamedTuple

import triton.language as tl


class Band(NamedTuple):
    """One sequence's lengths and the visible strip around its diagonal."""

    len_q: tl.tensor
    len_k: tl.tensor
    left: tl.tensor
    right: tl.tensor


class Rule(NamedTuple):
    """What turns q k^T into scores."""

    scale: tl.tensor  # positive
    sign: tl.tensor  # of the scale; applied to q
    softcap: tl.tensor
    slope: tl.tensor


class Drop(NamedTuple):
    """Dropout of one head of one sequence."""

    rng_ptr: tl.tensor
    batch_head: tl.tensor
    threshold: tl.tensor  # 16-bit numbers below it are kept
    factor: tl.tensor  # of kept weights
