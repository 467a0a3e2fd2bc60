"""Attention in plain PyTorch, one row block against its visible keys at a time; any device, dtype and feature.

Products and softmax are in float32 (float64 for float64 inputs). Beside float32 copies of 16-bit inputs and
float32 accumulators of dk and dv, the largest temporaries are a few tiles of batch * heads * block rows * keys numbers,
TILE_NUMBERS each, or 16 rows against all keys where that is more: linear in the sequence length.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.backends.torch_band import Band, Keys, Runs, row_blocks, selector
from flash_attn_plus.dropout import keep_mask

TILE_NUMBERS = {"cpu": 2**21, "other": 2**25}  # 8 MiB stays in a CPU's cache; devices want more work a launch
MIN_ROWS = 16
_CHAIN = 128  # keys that a product of few rows sums in one go
Tiles = Iterable[tuple[range, Keys]]  # blocks of rows, each with the keys that it sees


class Rule(NamedTuple):
    """How a score becomes a weight. slopes is (1 or n, h); batch_heads int64 (n, h) indexes the dropout bits."""

    softmax_scale: float
    softcap: float = 0.0
    slopes: Tensor | None = None
    dropout_p: float = 0.0
    rng_state: Tensor | None = None
    batch_heads: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for itself, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def alibi_bias(slopes: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """(1 or n, h, rows, cols): -slope * |distance|."""
    return -slopes.to(dtype)[..., None, None] * distance.abs()


def _by_group(x: Tensor, heads_k: int) -> Tensor:
    """(n, rows, h, d) -> (n, hk, group * rows, d): the heads of a group become rows against their shared keys."""
    grouped = x.unflatten(2, (heads_k, -1)).permute(0, 2, 3, 1, 4)
    return grouped.reshape(x.shape[0], heads_k, -1, x.shape[-1])


def _from_group(x: Tensor, rows: int) -> Tensor:
    """(n, hk, group * rows, d) -> (n, rows, h, d), the inverse of `_by_group`."""
    return x.unflatten(2, (-1, rows)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _summed_over_heads(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """a^T b of (n, hk, group * rows, ...), summed a head at a time: shorter chains of roundings than over all rows."""
    a, b = a.unflatten(2, (-1, rows)), b.unflatten(2, (-1, rows))
    return (a.transpose(-1, -2) @ b).sum(2)


def _summed_over_keys(weights: Tensor, x: Tensor) -> Tensor:
    """weights (n, hk, rows, cols) @ x (n, hk, cols, d); few rows in short chains: one of all keys rounds too often."""
    cols = weights.shape[-1]
    if weights.shape[2] > MIN_ROWS or cols <= _CHAIN:
        return weights @ x
    whole = cols - cols % _CHAIN
    chains = weights[..., :whole].unflatten(-1, (-1, _CHAIN)).transpose(2, 3) @ x[:, :, :whole].unflatten(
        2, (-1, _CHAIN)
    )
    return chains.sum(2).add_(weights[..., whole:] @ x[:, :, whole:])


def block_rows(n: int, heads: int, band: Band, device: torch.device) -> int:
    """Rows whose scores against all keys that they may see are a tile of the wanted size."""
    budget = TILE_NUMBERS["cpu" if device.type == "cpu" else "other"]
    size = max(MIN_ROWS, budget // (n * heads * max(1, band.keys_per_block(MIN_ROWS))))
    return max(MIN_ROWS, budget // (n * heads * max(1, band.keys_per_block(size))))


def _scores(q: Tensor, k: Tensor, band: Band, rule: Rule, rows: range, cols: Keys) -> tuple[Tensor, Tensor | None]:
    """Masked scores (n, h, rows, cols) of q (n, hk, group * rows, d) and k (n, hk, cols, d), and the softcap's tanh."""
    scores = (q @ k.transpose(-1, -2)).view(q.shape[0], -1, len(rows), len(cols)).mul_(rule.softmax_scale)
    squashed = None
    if rule.softcap > 0.0:
        squashed = scores.div_(rule.softcap).tanh_()
        scores = squashed * rule.softcap
    if rule.slopes is not None:
        scores += alibi_bias(rule.slopes, band.distance(rows, cols, q.device), q.dtype)
    hidden = band.hidden(rows, cols, q.device)
    return scores if hidden is None else scores.masked_fill_(hidden, float("-inf")), squashed


def _dropout_factor(rule: Rule, rows: range, cols: Keys, dtype: torch.dtype) -> Tensor | None:
    """(n, h, rows, cols): 1 / (1 - p) where the weight is kept, else 0; None without dropout."""
    if rule.dropout_p == 0.0:
        return None
    runs = cols.runs if isinstance(cols, Runs) else (cols,)
    keep = torch.cat([keep_mask(rule.rng_state, rule.batch_heads, rows, run, rule.dropout_p) for run in runs], -1)
    return keep.to(dtype).mul_(1.0 / (1.0 - rule.dropout_p))


def _band_tiles(q: Tensor, band: Band) -> Tiles:
    """Every block of rows that see a key, against the band's keys."""
    size = block_rows(q.shape[0], q.shape[2], band, q.device)
    return ((rows, band.keys(rows)) for rows in row_blocks(band.first_row, band.len_q, size))


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, rule: Rule, tiles: Tiles | None = None
) -> None:
    """Fill out (n, sq, h, dv) and lse (n, h, sq) from q (n, sq, h, d), k (n, sk, hk, d), v (n, sk, hk, dv).

    `tiles` leave out what is hidden besides the band, and cover the rows from band.first_row on.
    """
    dtype, heads_k = accumulation_dtype(q.dtype), k.shape[2]
    out[:, : band.first_row] = 0.0
    lse[..., : band.first_row] = float("inf")
    k_heads, v_heads = k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype)
    for rows, cols in _band_tiles(q, band) if tiles is None else tiles:
        here, seen = slice(rows.start, rows.stop), selector(cols, q.device)
        if len(cols) == 0:
            out[:, here] = 0.0
            lse[..., here] = float("inf")
            continue
        scores, _ = _scores(_by_group(q[:, here].to(dtype), heads_k), k_heads[:, :, seen], band, rule, rows, cols)
        peak = scores.amax(-1, keepdim=True)
        if tiles is not None:  # a row may see none of the block's keys
            peak.masked_fill_(peak == float("-inf"), 0.0)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)  # weights by the LSE would all carry its rounding
        factor = _dropout_factor(rule, rows, cols, dtype)
        if factor is not None:
            weights *= factor
        grouped = _summed_over_keys(weights.view(q.shape[0], heads_k, -1, len(cols)), v_heads[:, :, seen])
        block_lse = total.log().add_(peak)
        if tiles is not None:
            block_lse.masked_fill_(total == 0.0, float("inf"))
            total.masked_fill_(total == 0.0, 1.0)
        out[:, here] = _from_group(grouped.div_(total.view(*grouped.shape[:3], 1)), len(rows))
        lse[..., here] = block_lse[..., 0]


def zero_sums(x: Tensor) -> Tensor:
    """Where the gradient of x (n, sk, hk, d) is summed: (n, hk, sk, d) in the precision of sums."""
    return torch.zeros_like(x.transpose(1, 2), dtype=accumulation_dtype(x.dtype))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    band: Band,
    rule: Rule,
) -> None:
    """Fill dq, dk and dv, laid out like q, k and v, from dout (n, sq, h, dv), lse and delta (n, h, sq)."""
    sum_dk, sum_dv = zero_sums(k), zero_sums(v)
    accumulate(q, k, v, dout, lse, delta, dq, sum_dk, sum_dv, band, rule, _band_tiles(q, band))
    dk.copy_(sum_dk.transpose(1, 2))
    dv.copy_(sum_dv.transpose(1, 2))


def accumulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    sum_dk: Tensor,
    sum_dv: Tensor,
    band: Band,
    rule: Rule,
    tiles: Tiles,
) -> None:
    """Fill dq, and add to sum_dk (n, hk, sk, d) and sum_dv (n, hk, sk, dv), over the tiles of `forward`."""
    dtype, n, heads_k = accumulation_dtype(q.dtype), q.shape[0], k.shape[2]
    k_heads, v_heads = k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype)
    dq[:, : band.first_row] = 0.0
    for rows, cols in tiles:
        here, seen = slice(rows.start, rows.stop), selector(cols, q.device)
        if len(cols) == 0:
            dq[:, here] = 0.0
            continue
        q_block, dout_block = (_by_group(x[:, here].to(dtype), heads_k) for x in (q, dout))
        scores, squashed = _scores(q_block, k_heads[:, :, seen], band, rule, rows, cols)
        weights = scores.sub_(lse[..., here, None]).exp_()
        dweights = (dout_block @ v_heads[:, :, seen].transpose(-1, -2)).view_as(weights)
        factor = _dropout_factor(rule, rows, cols, dtype)
        kept = weights if factor is None else weights * factor
        if factor is not None:
            dweights *= factor
        sum_dv[:, :, seen] += _summed_over_heads(kept.view(n, heads_k, -1, len(cols)), dout_block, len(rows))
        dscores = dweights.sub_(delta[..., here, None]).mul_(weights)
        if squashed is not None:
            dscores *= 1.0 - squashed.square()
        grouped = dscores.mul_(rule.softmax_scale).view(n, heads_k, -1, len(cols))
        dq[:, here] = _from_group(_summed_over_keys(grouped, k_heads[:, :, seen]), len(rows))
        sum_dk[:, :, seen] += _summed_over_heads(grouped, q_block, len(rows))
