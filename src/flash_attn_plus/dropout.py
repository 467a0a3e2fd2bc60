"""The definition of the dropout bits: which attention weights are kept, as a function of their coordinates alone.

Philox4x32 with 7 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), with
key (seed low, seed high) and counter (col // 8, row, batch * heads + head, offset low); the low and high 16-bit halves
of the four output words, in order, decide columns 8c to 8c + 7. Row and col are positions within the sequence.
Every backend computes these bits, so any backward can serve any forward, however each tiles the scores.
"""

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
COLUMNS_PER_COUNTER = 8
_WORD = 0xFFFFFFFF


def keep_threshold(p: float) -> int:
    """A weight is kept iff its 16-bit number is below this; at least 1."""
    return max(1, int((1.0 - p) * 65536 + 0.5))


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers; the int64 product may wrap, its bits are right."""
    product = x * a
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four output words, int64 tensors holding 32 bits, of broadcastable counters and keys of the same kind."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(rng_state: Tensor, batch_heads: Tensor, rows: range, cols: range, p: float) -> Tensor:
    """Whether each weight is kept.

    Args:
        rng_state: int64 (2,), seed and offset; read on its device, without synchronisation.
        batch_heads: int64 (...), batch * heads + head of each score matrix, on the same device.
        rows, cols: positions of the wanted tile within the sequence, both with step 1.
        p: probability to drop.

    Returns:
        bool (..., len(rows), len(cols)).
    """
    device = rng_state.device
    first = cols.start // COLUMNS_PER_COUNTER
    groups = torch.arange(first, -(-cols.stop // COLUMNS_PER_COUNTER), device=device)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    seed, offset = rng_state[0], rng_state[1]
    words = philox(
        (groups, row, batch_heads[..., None, None], offset & _WORD),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    shape = (*batch_heads.shape, len(rows), len(groups))
    threshold = keep_threshold(p)
    halves = [half.expand(shape) < threshold for word in words for half in (word & 0xFFFF, word >> 16)]
    skipped = cols.start - first * COLUMNS_PER_COUNTER
    return torch.stack(halves, -1).flatten(-2)[..., skipped : skipped + len(cols)]
