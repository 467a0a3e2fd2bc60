"""Cross-entropy over rows of logits in plain PyTorch; the formulas of the kernels."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # float32 copies of the logits are made for so many at a time


def _row_chunks(logits: Tensor) -> range:
    return range(0, logits.shape[0], max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1])))


def _chunk(x: Tensor, start: int, step: int) -> Tensor:
    return x[start : start + step]


def forward(
    logits, labels, precomputed_lse, smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes,
    is_split, losses, lse, z_losses,
) -> None:  # fmt: skip
    """Fill losses, lse and z_losses (rows,); split losses lack the terms in logsumexp."""
    rows = _row_chunks(logits)
    columns = labels.long() - class_start
    is_counted = labels != ignore_index
    is_here = is_counted & (columns >= 0) & (columns < logits.shape[1])
    picked_at = torch.where(is_here, columns, 0)
    for start in rows:
        x = _chunk(logits, start, rows.step).to(lse.dtype) * scale
        _chunk(lse, start, rows.step).copy_(
            x.logsumexp(-1) if precomputed_lse is None else _chunk(precomputed_lse, start, rows.step)
        )
        here = _chunk(is_here, start, rows.step)
        picked = x.gather(1, _chunk(picked_at, start, rows.step)[:, None])[:, 0]
        loss = torch.where(here, -(1.0 - smoothing) * picked, 0.0)
        if smoothing > 0.0:
            loss = loss - smoothing * x.sum(-1) / total_classes
        _chunk(losses, start, rows.step).copy_(loss)
    if not is_split:
        z_losses.copy_(torch.where(is_counted, lse_square_scale * lse * lse, 0.0))
        losses.add_(lse * torch.where(is_here, 1.0, smoothing)).add_(z_losses)
    losses.masked_fill_(~is_counted, 0.0)


def backward(
    dlosses, logits, lse, labels, smoothing, scale, lse_square_scale, ignore_index, class_start, total_classes, dlogits
) -> None:
    """Fill dlogits, which may be logits."""
    rows = _row_chunks(logits)
    columns = labels.long() - class_start
    is_here = (columns >= 0) & (columns < logits.shape[1])
    dloss = torch.where(labels != ignore_index, dlosses.to(lse.dtype), 0.0)[:, None] * scale
    picked_at = torch.where(is_here, columns, 0)[:, None]
    onehot = torch.where(is_here, 1.0 - smoothing, 0.0).to(lse.dtype)[:, None]
    for start in rows:
        level = _chunk(lse, start, rows.step)[:, None]
        gradient = (_chunk(logits, start, rows.step).to(lse.dtype) * scale - level).exp_()
        gradient.mul_(1.0 + 2.0 * lse_square_scale * level).sub_(smoothing / total_classes)
        gradient.scatter_add_(1, _chunk(picked_at, start, rows.step), -_chunk(onehot, start, rows.step))
        _chunk(dlogits, start, rows.step).copy_(gradient.mul_(_chunk(dloss, start, rows.step)))
